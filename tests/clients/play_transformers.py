"""What transformers makes of an export: run as `play_transformers.py JOB ANSWER`."""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
model, info = AutoModelForCausalLM.from_pretrained(
    job["folder"], dtype=torch.float32, output_loading_info=True
)
with torch.inference_mode():
    logits = [model(torch.tensor([prompt])).logits[0].tolist() for prompt in job["prompts"]]
answer = {
    "version": transformers.__version__,
    "differing_keys": sorted(str(key) for keys in info.values() for key in keys),
    "alphas": str(model.model.layers[0].mlp.act_fn.alpha_p.dtype),
    "logits": logits,
}
Path(sys.argv[2]).write_text(json.dumps(answer))
