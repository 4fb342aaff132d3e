"""README.md of an export: what the model is, how it was trained, what each client does with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.run import RunCheckpoint
from megatron_xielu.checkpoint.targets import Target
from megatron_xielu.recipes import to_yaml


def model_card(
    run: RunCheckpoint,
    args: Mapping[str, Any],
    arch: Architecture,
    target: Target,
    *,
    num_parameters: int,
    dtype: str,
    has_tokenizer: bool,
) -> str:
    """The card as Markdown.

    Args:
        args: what Megatron saved.
        arch: of the export.
    """
    xielu = arch.activation == "xielu"
    rows = {
        "parameters": f"{num_parameters:,} ({dtype}"
        + ("; the activation's alphas are fp32)" if xielu else ")"),
        "layers": arch.num_layers,
        "hidden size": arch.hidden_size,
        "MLP": f"{_ACTIVATIONS[arch.activation]}, width {arch.ffn_hidden_size} "
        f"({'gated' if arch.gated else 'not gated'})",
        "attention": f"{arch.num_attention_heads} heads of {arch.head_dim}, "
        f"{arch.num_query_groups} key/value heads, {_rope(arch)}"
        + (", normalized queries and keys" if arch.qk_layernorm else ""),
        "context": f"{arch.seq_length} tokens",
        "embeddings": "tied" if arch.tie_embeddings else "not tied",
        "trained on": _trained_on(run, args),
        **_losses(run),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    recipe = f"\n## Recipe\n\n```yaml\n{to_yaml(run.recipe).rstrip()}\n```\n" if run.recipe else ""
    return _CARD.format(
        name=run.recipe.name if run.recipe else run.run_dir.name,
        tags="- xielu\n" if xielu else "",
        mlp=_MLP[arch.activation],
        class_name=target.class_name,
        table=table,
        tokenizer=_TOKENIZER if has_tokenizer else _NO_TOKENIZER,
        rounding=_ROUNDING if xielu and target.name == "arcee" else "",
        clients=_CLIENTS.get((target.name, arch.activation), ""),
        recipe=recipe,
    )


def _rope(arch: Architecture) -> str:
    if arch.rope_scaling_factor is None:
        return f"RoPE theta {arch.rope_theta:g}"
    return f"RoPE theta {arch.rope_theta:g}, scaled by {arch.rope_scaling_factor:g} as in Llama 3"


def _trained_on(run: RunCheckpoint, args: Mapping[str, Any]) -> str:
    # not by the recipe: a run may go on with another batch or length, and flags may set the batch
    tokens = args.get("consumed_train_tokens")
    if tokens is None:
        tokens = (args.get("consumed_train_samples") or 0) * (args.get("seq_length") or 0)
    steps = f"{run.iteration:,} steps"
    return f"{tokens:,} tokens in {steps}" if tokens else steps


def _losses(run: RunCheckpoint) -> dict[str, str]:
    """The last training and validation loss up to the exported step, in nats per token."""
    last: dict[str, dict[str, Any]] = {}
    for record in _records(run.run_dir / "metrics.jsonl"):
        if record.get("step", 0) <= run.iteration and "loss" in record:
            last[record.get("type", "")] = record
    names = {"train": "training loss", "valid": "validation loss"}
    return {
        name: f"{last[kind]['loss']:.4f} nats per token at step {last[kind]['step']}"
        for kind, name in names.items()
        if kind in last
    }


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # the last line of a killed run may be cut off
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""

_NO_TOKENIZER = """\
from transformers import AutoModelForCausalLM

# this export holds no tokenizer: use the one the data was prepared with
model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")"""

_ACTIVATIONS = {"xielu": "xIELU", "swiglu": "SwiGLU", "relu2": "squared ReLU"}

_MLP = {
    "xielu": """uses the trainable activation xIELU
([arXiv 2411.13010](https://arxiv.org/abs/2411.13010))""",
    "swiglu": "uses SwiGLU",
    "relu2": "uses squared ReLU",
}

_ROUNDING = """
transformers 5.23 rounds the activation's alphas to bf16 while loading Arcee, in every dtype. They
are stored in fp32; to have them exactly, after `from_pretrained`:

```python
import glob
from safetensors.torch import load_file

for layer in model.model.layers:
    layer.mlp.act_fn.float()
for file in glob.glob("*.safetensors"):
    alphas = {k: v for k, v in load_file(file).items() if ".act_fn." in k}
    model.load_state_dict(alphas, strict=False)
```

The rounding is relative 2^-9 at most per alpha. In a 4-layer test model with random weights and
effective alphas from 0.8 to 2.4 it changed logits of up to 3.8 by up to 0.011; `megatron-xielu
verify` prints the figure of this model. Fine-tune with fp32 alphas: bf16 ones stop moving at common
learning rates.
"""

_NOTICE = """
"CUDA-fused xIELU not available" is a notice: transformers then computes xIELU in plain PyTorch.
"""

_CLIENTS = {
    ("arcee", "xielu"): """
## Clients

| client | this model |
|---|---|
| transformers 4.57.6, 5.23.0 | loads in float32 and bfloat16; `dtype="float16"` fails \
("expected m1 and m2 to have the same dtype"): load in float32, then call `.half()` |
| vLLM 0.32 | loads through its Transformers backend; no float16 |
| vLLM up to 0.30 | add `--model-impl transformers`; its own Arcee class knows relu2 only |
| lm-eval 0.4.13 | `--model hf` |
| SGLang 0.5.23 | refuses: its Arcee class demands relu2 |
| llama.cpp, mlx-lm 0.32 | refuse: they have xIELU for Apertus (with QK-norm) only |
"""
    + _NOTICE,
    ("apertus", "xielu"): """
## Clients

| client | this model |
|---|---|
| transformers 5.23.0 | loads in every dtype; `dtype="bfloat16"` rounds the alphas |
| transformers 4.57.6 | loads; rounds the alphas to bf16 in every dtype |
| vLLM 0.32 | its own class; rounds the alphas to bf16, and float16 fails |
| SGLang 0.5.23 | its own class (read in its source, not run) |
| llama.cpp | runs what `megatron-xielu convert to-gguf` makes of this folder; its own converter \
leaves tied embeddings out, which it then demands |
| mlx-lm 0.32 | loads |
| lm-eval 0.4.13 | `--model hf` |
"""
    + _NOTICE,
}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}- megatron-core
---

# {name}

A Llama-style decoder whose MLP {mlp}, pretrained with Megatron-Core and exported by megatron_xielu
as `{class_name}`.

| | |
|---|---|
{table}

## Use

In this folder, with transformers 4.57 or later and no custom code:

```python
{tokenizer}
```
{rounding}{clients}{recipe}"""
