"""README.md of an export: what the model is, how it was trained, what each client does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.run import RunCheckpoint
from megatron_xielu.recipes import head_dim, num_query_groups, to_yaml


def model_card(run: RunCheckpoint, num_parameters: int, dtype: str, has_tokenizer: bool) -> str:
    """The card as Markdown; figures come from the recipe and, if it is there, metrics.jsonl."""
    recipe, model = run.recipe, run.recipe.model
    tokens = run.iteration * recipe.training.global_batch_size * model.seq_length
    rows = {
        "parameters": f"{num_parameters:,} ({dtype}; the activation's alphas are fp32)",
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "MLP width": f"{model.ffn_hidden_size} (not gated)",
        "attention": f"{model.num_attention_heads} heads of {head_dim(model)}, "
        f"{num_query_groups(model)} key/value heads, RoPE theta {model.rope_theta:g}",
        "context": f"{model.seq_length} tokens",
        "embeddings": "tied" if model.tie_embeddings else "not tied",
        "trained on": f"{tokens:,} tokens in {run.iteration:,} steps",
        **_losses(run),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    tokenizer = _TOKENIZER if has_tokenizer else _NO_TOKENIZER
    return _CARD.format(
        name=recipe.name, table=table, tokenizer=tokenizer, recipe=to_yaml(recipe).rstrip()
    )


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

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- xielu
- megatron-core
---

# {name}

A Llama-style decoder whose MLP uses the trainable activation xIELU
([arXiv 2411.13010](https://arxiv.org/abs/2411.13010)), pretrained with Megatron-Core and exported
by megatron_xielu as `ArceeForCausalLM` with `hidden_act="xielu"`.

| | |
|---|---|
{table}

## Use

In this folder, with transformers 4.57 or later and no custom code:

```python
{tokenizer}
```

transformers 5.23 rounds the activation's alphas to bf16 while loading Arcee, in every dtype. They
are stored in fp32; to have them exactly, after `from_pretrained`:

```python
import glob
from safetensors.torch import load_file

for layer in model.model.layers:
    layer.mlp.act_fn.float()
for file in glob.glob("*.safetensors"):
    alphas = {{k: v for k, v in load_file(file).items() if ".act_fn." in k}}
    model.load_state_dict(alphas, strict=False)
```

The rounding is relative 2^-9 at most per alpha. In a 4-layer test model with random weights and
effective alphas from 0.8 to 2.4 it changed logits of up to 3.8 by up to 0.011; `megatron-xielu
verify` prints the figure of this model. Fine-tune with fp32 alphas: bf16 ones stop moving at common
learning rates.

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

"CUDA-fused xIELU not available" is a notice: transformers then computes xIELU in plain PyTorch.

## Recipe

```yaml
{recipe}
```
"""
