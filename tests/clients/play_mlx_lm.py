"""What mlx-lm makes of an export, on the CPU: run as `play_mlx_lm.py JOB ANSWER`."""

import json
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

job = json.loads(Path(sys.argv[1]).read_text())
model, _ = load_model(Path(job["folder"]))
answer = {
    "version": mlx_lm.__version__,
    "logits": [model(mx.array([prompt]))[0].tolist() for prompt in job["prompts"]],
    "greedy": [
        [token for token, _ in islice(generate_step(mx.array(prompt), model), job["new_tokens"])]
        for prompt in job["prompts"]
    ],
}
Path(sys.argv[2]).write_text(json.dumps(answer))
