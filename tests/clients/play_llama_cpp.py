"""What llama.cpp makes of a GGUF file, through its server: run as `play_llama_cpp.py JOB ANSWER`.

The server of xllamacpp runs inside this process and listens on a free port of 127.0.0.1. Keys and
values are kept in fp32 (by default llama.cpp rounds them to fp16, which changes logits by 1e-3).
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp

job = json.loads(Path(sys.argv[1]).read_text())
params = xllamacpp.CommonParams()
params.model.path = job["file"]
params.n_ctx = 128
params.n_parallel = 1
params.verbosity = 0
params.warmup = False
params.cpuparams.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)


def post(path: str, **body: object) -> dict:
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def complete(prompt: list[int], count: int, **more: object) -> dict:
    return post(
        "/completion",
        prompt=prompt,
        n_predict=count,
        temperature=0,
        return_tokens=True,
        cache_prompt=False,
        **more,
    )


def log_probabilities(prompt: list[int]) -> list[float]:
    """Of every id after a prompt.

    The server lists them beside the token it chose, unless that is a part of a character. So one
    that is text is chosen for it: the bias decides what is chosen, not the list.
    """
    bias = [[job["text_id"], 1000]]
    reply = complete(prompt, 1, n_probs=job["vocab_size"], logit_bias=bias)
    (position,) = reply["completion_probabilities"]
    by_id = {row["id"]: row["logprob"] for row in position["top_logprobs"]}
    return [by_id[i] for i in range(job["vocab_size"])]


answer = {
    "version": version("xllamacpp"),
    "log_probabilities": [
        [log_probabilities(prompt[: end + 1]) for end in range(len(prompt))]
        for prompt in job.get("prompts", [])
    ],
    "greedy": [complete(prompt, job["new_tokens"])["tokens"] for prompt in job.get("prompts", [])],
    "ids": [
        post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        for text in job.get("texts", [])
    ],
}
Path(sys.argv[2]).write_text(json.dumps(answer))
