from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import LAYOUTS, recipe_of
from reference_llama import reference_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from write_checkpoint import PROMPTS, weight_of

from megatron_xielu.checkpoint import mapping, verify
from megatron_xielu.checkpoint.hf_model import hf_logits
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.verify import VerifyError, default_prompts, verify_export
from megatron_xielu.errors import UserError

Edit = Callable[[dict[str, Tensor]], None]


def float64_logits(layout: str) -> Callable[[list[list[int]]], list[Tensor]]:
    """The independent reference, on the weights the checkpoint was made from."""
    dims = mapping.Dims.of(recipe_of(layout), 384)
    shapes = {
        mapping._stacked(name): (dims.num_layers, *entry.shape(dims))
        if "{i}" in name
        else entry.shape(dims)
        for entry in mapping.TABLE
        for name in entry.megatron
    }

    def weight(key: str) -> Tensor:
        tensor = weight_of(key, shapes[key])
        bf16 = layout == "bf16" and "alpha" not in key
        return tensor.bfloat16() if bf16 else tensor

    return lambda prompts: reference_logits(recipe_of(layout), weight, prompts)


@pytest.fixture(scope="module")
def exports(
    runs: dict[str, Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for layout, run in runs.items():
        convert_to_hf(run, root / layout, tokenizer=tokenizer, progress=lambda line: None)
    return {layout: root / layout for layout in runs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_equals_an_independent_float64_model(
    runs: dict[str, Path], exports: dict[str, Path], layout: str
) -> None:
    report = verify_export(exports[layout], runs[layout], reference_logits=float64_logits(layout))
    print(
        f"{layout}: with exact alphas {report.logits.max_abs:.1e}, stock {report.stock.max_abs:.1e}"
    )
    # 1, 2, 7 and 32 tokens; the context of 32 is there once
    assert report.logits.positions == 42
    assert report.logits.max_abs < 1e-4
    assert report.logits.agreement == 1.0
    # the measure is fine enough to see the rounding of alphas that stock loading brings
    assert report.stock.max_abs > 1e-3
    assert not report.rounded


@pytest.mark.parametrize("layout", ["gqa", "mha-tied-per-layer"])
def test_export_equals_megatron_itself(
    runs: dict[str, Path], exports: dict[str, Path], layout: str
) -> None:
    megatron = torch.load(runs[layout] / "logits.pt")
    report = verify_export(
        exports[layout], runs[layout], prompts=PROMPTS, reference_logits=lambda prompts: megatron
    )
    largest = max(logits.abs().max().item() for logits in megatron)
    print(f"{layout}\n{report}\nlogits up to {largest:.1f}")
    assert report.logits.max_abs < 1e-4
    assert hf_logits(exports[layout], PROMPTS)[2].shape == (len(PROMPTS[2]), 320)


def test_rounded_export(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_to_hf(runs["gqa"], out, dtype="bf16", progress=lambda line: None)
    report = verify_export(out, runs["gqa"], reference_logits=float64_logits("gqa"))
    print(report)
    assert report.rounded
    assert report.logits.max_abs < 1e-4 < report.stock.max_abs


def swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def act(layer: int, name: str) -> str:
    return f"model.layers.{layer}.mlp.act_fn.{name}"


def reset_alphas(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        tensors[act(layer, "alpha_p")] = torch.tensor([0.8]).expm1().log()
        tensors[act(layer, "alpha_n")] = torch.tensor([0.3]).expm1().log()


def exchange_signs(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        swap(tensors, act(layer, "alpha_p"), act(layer, "alpha_n"))


def after_softplus(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        tensors[act(layer, "alpha_p")] = torch.nn.functional.softplus(
            tensors[act(layer, "alpha_p")]
        )


def round_alphas(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        for name in ("alpha_p", "alpha_n"):
            tensors[act(layer, name)] = tensors[act(layer, name)].bfloat16().float()


def permute_groups(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        for part in "kv":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            tensors[name] = tensors[name].view(2, 16, 64).flip(0).reshape(32, 64).contiguous()


FAULTS: dict[str, Edit] = {
    "alphas of two layers swapped": lambda t: swap(t, act(1, "alpha_p"), act(2, "alpha_p")),
    "alphas reset": reset_alphas,
    "alpha_p and alpha_n exchanged": exchange_signs,
    "alpha_p after softplus": after_softplus,
    "alphas rounded to bf16": round_alphas,
    "query groups permuted": permute_groups,
}


def tamper(export: Path, edit: Edit) -> None:
    file = export / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def own_export(runs: dict[str, Path], tmp_path: Path) -> Path:
    convert_to_hf(runs["gqa"], tmp_path / "own", progress=lambda line: None)
    return tmp_path / "own"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_by_value(runs: dict[str, Path], own_export: Path, fault: str) -> None:
    tamper(own_export, FAULTS[fault])
    with pytest.raises(
        VerifyError, match=r"(alpha_|q_proj).* differs from the checkpoint in \d+ of"
    ):
        verify_export(own_export, runs["gqa"], reference_logits=float64_logits("gqa"))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_by_logits_alone(
    runs: dict[str, Path], own_export: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(own_export, FAULTS[fault])
    monkeypatch.setattr(verify, "compare_tensors", lambda *_: (0, False))
    with pytest.raises(VerifyError, match=r"max logit difference .* First at prompt 0 ") as error:
        verify_export(own_export, runs["gqa"], reference_logits=float64_logits("gqa"))
    print(f"{fault}: {str(error.value)[:200]}")


def test_a_wrong_table_is_caught_by_logits(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # split and merge agree with each other, so only the reference can know
    crossed = {"alpha_p": "alpha_n", "alpha_n": "alpha_p"}
    table = tuple(
        replace(entry, hf=tuple(_cross(name, crossed) for name in entry.hf))
        for entry in mapping.TABLE
    )
    monkeypatch.setattr(mapping, "TABLE", table)
    convert_to_hf(runs["gqa"], tmp_path / "out", progress=lambda line: None)
    with pytest.raises(VerifyError, match=r"computes something else than the checkpoint"):
        verify_export(tmp_path / "out", runs["gqa"], reference_logits=float64_logits("gqa"))


def _cross(name: str, crossed: dict[str, str]) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.{crossed.get(last, last)}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(act(2, "eps")), r"lacks 1 tensor\(s\), the first .*2\.mlp\.act_fn\.eps"),
        (lambda t: t.update(extra=torch.ones(1)), r"holds 1 unknown tensor\(s\), the first extra"),
        (
            lambda t: t.update({act(0, "alpha_p"): t[act(0, "alpha_p")][0].clone()}),
            r"0\.mlp\.act_fn\.alpha_p has shape \(\), expected \(1,\)",
        ),
        (
            lambda t: t.update({act(0, "beta"): torch.tensor(0.25)}),
            r"0\.mlp\.act_fn\.beta is 0\.25, expected 0\.5 in float32",
        ),
        (
            lambda t: t["model.norm.weight"].__setitem__(3, torch.nan),
            r"model\.norm\.weight differs from the checkpoint in 1 of 64 values",
        ),
    ],
)
def test_wrong_files_are_caught(
    runs: dict[str, Path], own_export: Path, edit: Edit, message: str
) -> None:
    tamper(own_export, edit)
    with pytest.raises(VerifyError, match=message):
        verify_export(own_export, runs["gqa"], reference_logits=float64_logits("gqa"))


def test_transformers_own_report_is_read(
    runs: dict[str, Path], own_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(own_export, lambda t: t.pop(act(2, "eps")))
    monkeypatch.setattr(verify, "compare_tensors", lambda *_: (0, False))
    with pytest.raises(VerifyError, match=r"missing keys: model\.layers\.2\.mlp\.act_fn\.eps"):
        verify_export(own_export, runs["gqa"], reference_logits=float64_logits("gqa"))


def test_an_export_of_another_model_is_caught(
    runs: dict[str, Path], exports: dict[str, Path]
) -> None:
    with pytest.raises(VerifyError, match=r"lacks 1 tensor\(s\), the first lm_head\.weight"):
        verify_export(exports["mha-tied-pp2"], runs["gqa"], reference_logits=lambda prompts: [])


def test_a_broken_reference_is_not_equal(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    def nan(prompts: list[list[int]]) -> list[Tensor]:
        return [logits * torch.nan for logits in float64_logits("gqa")(prompts)]

    with pytest.raises(VerifyError, match=r"max logit difference inf"):
        verify_export(exports["gqa"], runs["gqa"], reference_logits=nan)


def test_default_prompts() -> None:
    prompts = default_prompts(100, 64)
    assert [len(prompt) for prompt in prompts] == [1, 2, 7, 32, 64]
    assert prompts == default_prompts(100, 64)
    assert [len(prompt) for prompt in default_prompts(100, 16)] == [1, 2, 7, 16]
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"prompt 0 must hold token ids from 0 to 319, got \[\]"),
        ([1, 320], r"from 0 to 319, got \[1, 320\]"),
        ([1] * 33, r"prompt 0 has 33 tokens, the model's context is 32"),
    ],
)
def test_bad_prompts(
    runs: dict[str, Path], exports: dict[str, Path], prompt: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        verify_export(
            exports["gqa"], runs["gqa"], prompts=[prompt], reference_logits=lambda prompts: []
        )


def test_not_an_export(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a Hugging Face model folder: it has no config\.json"):
        verify_export(tmp_path, runs["gqa"], reference_logits=lambda prompts: [])


def test_transformers_is_quiet_and_left_as_it_was(
    exports: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    hf_logits(exports["gqa"], [[1]])
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
