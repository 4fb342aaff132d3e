"""What vLLM makes of exports, on the CPU: run as `play_vllm.py JOB ANSWER`.

The answer holds tokens only; fp32 log-probabilities of vLLM differ, because it has bf16 alphas.
"""

import json
import sys
from pathlib import Path

import vllm

# the engine starts processes, which import this file again
if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    greedy = []
    for folder in job["folders"]:
        model = vllm.LLM(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=64,
        )
        replies = model.generate(prompts, sampling, use_tqdm=False)
        greedy.append([list(reply.outputs[0].token_ids) for reply in replies])
        del model
    Path(sys.argv[2]).write_text(json.dumps({"version": vllm.__version__, "greedy": greedy}))
