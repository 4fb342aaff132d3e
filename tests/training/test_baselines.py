"""SwiGLU and ReLU squared in Megatron's own MLP, beside a Llama in float64 that shares nothing."""

from __future__ import annotations

import math
import pydoc_data.topics
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.data.prepare import prepare
from megatron_xielu.recipes import Recipe, head_dim, load_recipe
from tests.training.test_pretrain import command, metrics, refused, run, saved

LAYOUTS = {
    "one rank": (),
    "two ranks": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
}
# a step so small that what is saved after it is what it began with
ONE_STEP = (
    "optimizer.lr=1e-30",
    "schedule.lr_warmup_iters=0",
    "schedule.lr_wsd_decay_iters=0",
    "optimizer.clip_grad=0",
    "training.train_iters=1",
    "checkpoint.save_interval=1",
    "logging.eval_iters=0",
    # large enough for the MLPs and the positions to matter to the loss
    "model.init_std=0.2",
    # groups of their own have been tested elsewhere
    "model.num_query_groups=8",
)
# some roundings to fp32 in a row
CLOSE = 10 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def one_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose train text is one document, so that its sequences are known."""
    folder = tmp_path_factory.mktemp("two")
    for index, text in enumerate(list(pydoc_data.topics.topics.values())[:2]):
        (folder / f"{index}.txt").write_text(text[:4000])
    inputs = sorted(folder.glob("*.txt"))
    return prepare(folder / "data", inputs=inputs, vocab_size=512, progress=lambda _: None).path


def sequences(data: Path, length: int) -> Tensor:
    """[sequences, length + 1] token ids; a sequence begins with the last token of the one before.

    Their order in a batch of all of them is Megatron's, and does not change the loss.
    """
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int64)
    starts = range(0, len(tokens) - length, length)
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]))


def first_step(folder: Path, data: Path, *overrides: str) -> tuple[Recipe, dict[str, Tensor], Any]:
    """The recipe, the weights before the step in float64, and its record in metrics.jsonl."""
    batch = len(sequences(data, 32))
    sizes = (f"training.global_batch_size={batch}", f"training.micro_batch_size={batch}")
    done = run(command(folder, data, *ONE_STEP, *sizes, *overrides))
    assert done.returncode == 0, done.stderr
    weights = {
        key: tensor.double().requires_grad_()
        for key, tensor in saved(folder, 1).items()
        if not key.startswith(("optimizer", "rng", "chained"))
    }
    (record,) = (r for r in metrics(folder) if r["type"] == "train")
    return load_recipe(str(folder / "recipe.yaml")), weights, record


def reference_loss(recipe: Recipe, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Mean nats per token of [batch, length + 1] tokens, from Megatron's keys."""
    model, size = recipe.model, head_dim(recipe.model)
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens[:, :-1]]
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    turn = torch.polar(torch.tensor(1.0).double(), torch.outer(positions, frequencies(recipe)))
    for i in range(model.num_layers):

        def weight(name: str, i: int = i) -> Tensor:
            return weights[f"decoder.layers.{name}"][i]

        normed = rms_norm(x, weight("self_attention.linear_qkv.layer_norm_weight"), recipe)
        qkv = normed @ weight("self_attention.linear_qkv.weight").T
        qkv = qkv.unflatten(-1, (model.num_attention_heads, 3, size)).permute(3, 0, 2, 1, 4)
        query, key, value = rotated(qkv[0], turn), rotated(qkv[1], turn), qkv[2]
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = heads.transpose(1, 2).flatten(2)
        x = x + attended @ weight("self_attention.linear_proj.weight").T
        normed = rms_norm(x, weight("mlp.linear_fc1.layer_norm_weight"), recipe)
        hidden = normed @ weight("mlp.linear_fc1.weight").T
        if model.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = gate * torch.sigmoid(gate) * up
        else:
            hidden = hidden.clamp(min=0) ** 2
        x = x + hidden @ weight("mlp.linear_fc2.weight").T
    logits = rms_norm(x, weights["decoder.final_layernorm.weight"], recipe) @ embedding.T
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def rms_norm(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + recipe.model.norm_epsilon).sqrt() * weight


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x: [batch, heads, length, head_dim], whose halves are real and imaginary parts."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def frequencies(recipe: Recipe) -> Tensor:
    """RoPE's, by Llama 3.1's rule where they are scaled: long waves are turned more slowly."""
    model, size = recipe.model, head_dim(recipe.model)
    plain = model.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor = model.rope_scaling_factor
    if factor is None:
        return plain
    # of a context of 8,192 tokens: 1 at four waves and more, 0 at one and less
    smooth = ((8192 * plain / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_first_step_is_the_formula(
    activation: str, layout: str, one_document: Path, tmp_path: Path
) -> None:
    chosen = (f"model.activation={activation}", *LAYOUTS[layout])
    recipe, weights, record = first_step(tmp_path / "run", one_document, *chosen)
    expected = reference_loss(recipe, weights, sequences(one_document, 32))
    gradients = torch.autograd.grad(expected, list(weights.values()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    loss = expected.item()
    print(f"loss {record['loss']}, {loss}; gradient norm {record['grad_norm']}, {norm}")
    assert record["loss"] == pytest.approx(loss, rel=CLOSE)
    assert record["grad_norm"] == pytest.approx(norm, rel=CLOSE)
    assert record["alpha_p"] == record["alpha_n"] == []
    rows = (2 if activation == "swiglu" else 1) * recipe.model.ffn_hidden_size
    assert weights["decoder.layers.mlp.linear_fc1.weight"].shape == (4, rows, 64)


def test_rope_is_scaled_by_the_factor(one_document: Path, tmp_path: Path) -> None:
    chosen = ("model.activation=relu2", "model.rope_theta=500000", "model.head_dim=32")
    recipe, weights, record = first_step(
        tmp_path / "run", one_document, *chosen, "model.rope_scaling_factor=32"
    )
    tokens = sequences(one_document, 32)
    losses = {}
    for factor in (32.0, 8.0, None):
        model = replace(recipe.model, rope_scaling_factor=factor)
        with torch.no_grad():
            losses[factor] = float(reference_loss(replace(recipe, model=model), weights, tokens))
    print(record["loss"], losses)
    assert record["loss"] == pytest.approx(losses[32.0], rel=CLOSE)
    # upstream's default, and none at all
    assert record["loss"] != pytest.approx(losses[8.0], rel=CLOSE)
    assert record["loss"] != pytest.approx(losses[None], rel=CLOSE)


def test_what_a_baseline_shows_and_refuses(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # which alphas in fp32 would not allow
    plain = ("training.precision=bf16", "parallel.use_distributed_optimizer=false")
    words = command(folder, data_dir, "model.activation=swiglu", *plain)
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model.activation=swiglu, Megatron's own") == 1
    assert "xIELU" not in done.stdout
    assert not re.search(r"a_p|alpha", done.stdout)
    assert not [key for key in saved(folder, 5) if "alpha" in key]
    message = refused([*words, "model.activation=relu2"])
    assert "model.activation: 'swiglu' -> 'relu2'  (can never change" in message
    # a recipe edited by hand cannot deceive it either
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("activation: swiglu", "activation: relu2"))
    message = refused([*words, "model.activation=relu2"])
    assert "swiglu: True in the checkpoint, False by the recipe" in message
