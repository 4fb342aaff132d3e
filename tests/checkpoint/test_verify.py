from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import LAYOUTS
from float64_llama import float64_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from write_checkpoint import PROMPTS

from megatron_xielu.checkpoint import mapping, verify
from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_model import HfFolder, load_exact
from megatron_xielu.checkpoint.megatron_model import MegatronCheckpoint, rope_frequencies
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.verify import VerifyError, default_prompts
from megatron_xielu.cli import main
from megatron_xielu.errors import UserError

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def exports(
    runs: dict[str, Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for layout, run in runs.items():
        convert_to_hf(run, root / layout, tokenizer=tokenizer, progress=lambda line: None)
    return {layout: root / layout for layout in runs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_equals_its_checkpoint_and_an_independent_float64_model(
    runs: dict[str, Path], exports: dict[str, Path], layout: str
) -> None:
    report = verify.verify(exports[layout], runs[layout])
    # 1, 2, 7 and 32 tokens; the context of 32 is there once
    assert report.logits.positions == 42
    assert report.logits.max_abs < 1e-4
    assert report.logits.agreement == 1.0
    assert report.num_rounded == 0
    prompts = default_prompts(320, 32)
    oracle = verify._compare(
        [logits[:, :320].float() for logits in float64_logits(layout, prompts)],
        HfFolder(exports[layout]).logits(prompts),
    )
    print(
        f"{layout}: fp32 against fp32 {report.logits.max_abs:.1e}, against float64 "
        f"{oracle.max_abs:.1e}, as loaded {report.stock.max_abs if report.stock else 0:.1e}"
    )
    assert oracle.max_abs < 1e-4
    # the measure is fine enough to see the rounding of alphas that stock loading of Arcee brings
    if json.loads((exports[layout] / "config.json").read_text())["hidden_act"] == "xielu":
        rounds = HfFolder(exports[layout]).target.name == "arcee"
        assert (report.stock is not None and report.stock.max_abs > 1e-3) == rounds


# one rank wrote them; those of bf16 are of bf16 arithmetic
UNCUT = [name for name in LAYOUTS if not name.endswith(("-tp2", "-pp2", "bf16"))]


@pytest.mark.parametrize("layout", UNCUT)
def test_export_equals_megatron_itself(
    runs: dict[str, Path], exports: dict[str, Path], layout: str
) -> None:
    megatron = torch.load(runs[layout] / "logits.pt")
    report = verify.verify(
        exports[layout], runs[layout], prompts=PROMPTS, reference_logits=lambda prompts: megatron
    )
    largest = max(logits.abs().max().item() for logits in megatron)
    print(f"{layout}: {report.logits.max_abs:.1e} from Megatron, logits up to {largest:.1f}")
    assert report.logits.max_abs < 1e-4


def test_every_pair_of_one_model(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [
        (runs["gqa"], exports["gqa"]),
        (exports["gqa"], exports["gqa-tp2"]),
        (runs["gqa"], runs["hybrid-tp2"]),
        (runs["gqa-tp2"] / "checkpoints" / "iter_0000200", exports["plain"]),
    ]
    for a, b in pairs:
        assert verify.verify(a, b).logits.agreement == 1.0
    untied = tmp_path / "untied"
    convert_to_hf(runs["apertus-tied-tp2"], untied, untie=True, progress=lambda line: None)
    assert verify.verify(runs["apertus-tied-tp2"], untied).logits.agreement == 1.0


def test_rounded_export(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_to_hf(runs["gqa"], out, dtype="bf16", progress=lambda line: None)
    report = verify.verify(out, runs["gqa"])
    print(report)
    # all but the alphas, beta and eps
    assert report.num_rounded == report.num_tensors - 4 * 4
    assert report.logits.max_abs < 1e-4
    assert "rounded to the shorter type" in str(report)


def test_alphas_stored_in_bf16_are_compared_as_stored(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    # as the published Apertus holds them
    folder = Path(shutil.copytree(exports["apertus"], tmp_path / "bf16"))
    tamper(
        folder,
        lambda t: t.update({k: v.bfloat16() for k, v in t.items() if ".act_fn." in k}),
    )
    report = verify.verify(folder, exports["apertus"])
    assert report.num_rounded == 4 * 4
    tamper(folder, lambda t: swap(t, act(1, "alpha_p"), act(2, "alpha_p")))
    message = r"^2 tensor\(s\) differ; the one .* model\.layers\.[12]\.mlp\.act_fn\.alpha_p,"
    with pytest.raises(VerifyError, match=message):
        verify.verify(folder, exports["apertus"])


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


def permute(tensors: dict[str, Tensor], parts: str, rows: Callable[[Tensor], Tensor]) -> None:
    for layer in range(4):
        for part in parts:
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            tensors[name] = rows(tensors[name]).contiguous()


def interleave(weight: Tensor) -> Tensor:
    """The order of channels that RoPE on neighbouring pairs has."""
    return weight.view(-1, 2, 8, 64).transpose(1, 2).reshape(weight.shape)


def shift_embedding(tensors: dict[str, Tensor]) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].roll(1, dims=0)


FAULTS: dict[str, Edit] = {
    "alphas of two layers swapped": lambda t: swap(t, act(1, "alpha_p"), act(2, "alpha_p")),
    "alphas reset": reset_alphas,
    "alpha_p and alpha_n exchanged": exchange_signs,
    "alpha_p after softplus": after_softplus,
    "alphas rounded to bf16": round_alphas,
    "groups of keys and values permuted": lambda t: permute(
        t, "kv", lambda w: w.view(2, 16, 64).flip(0).reshape(32, 64)
    ),
    "queries and keys in the other order of channels": lambda t: permute(t, "qk", interleave),
    "rows of the embedding shifted": shift_embedding,
}


def tamper(export: Path, edit: Edit) -> None:
    file = export / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(params=["gqa", "apertus"])
def own_export(
    exports: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    """A layout of Arcee and one of Apertus, with an export to damage."""
    return request.param, Path(shutil.copytree(exports[request.param], tmp_path / "own"))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_by_value_and_by_logits_alone(
    runs: dict[str, Path],
    own_export: tuple[str, Path],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, export = own_export
    tamper(export, FAULTS[fault])
    with pytest.raises(VerifyError, match=r"differ; .*(alpha_|_proj|embed_tok).* values differ"):
        verify.verify(export, runs[layout])
    monkeypatch.setattr(verify, "compare_tensors", lambda one, other: {})
    with pytest.raises(VerifyError, match=r"max logit difference .* First at prompt \d") as error:
        verify.verify(export, runs[layout])
    print(f"{layout}, {fault}: {str(error.value)[:130]}")


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_theta": 10_000.0, "rope_parameters": ROPE},
            r"describe two models: rope_theta is 10000\.0 and 5000\.0\.",
        ),
        ({"rms_norm_eps": 1e-3}, r"describe two models: norm_epsilon is 0\.001 and 1e-05\."),
        ({"num_key_value_heads": 4}, r"config\.json means"),
    ],
)
def test_a_config_that_means_another_model_is_caught(
    runs: dict[str, Path], own_export: tuple[str, Path], change: dict[str, object], message: str
) -> None:
    layout, export = own_export
    change_config(export, **change)
    with pytest.raises(VerifyError, match=message):
        verify.verify(export, runs[layout])


@pytest.mark.parametrize("change", [{"rope_theta": 1.0}, {"rope_parameters": ROPE}])
def test_a_config_that_contradicts_itself_is_refused(
    runs: dict[str, Path],
    own_export: tuple[str, Path],
    change: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # transformers 5 reads rope_parameters alone, transformers 4 and mlx-lm rope_theta
    layout, export = own_export
    change_config(export, **change)
    for models in ([export, runs[layout]], [runs[layout], export], [export, export]):
        assert main(["verify", *map(str, models)]) == 2
        assert "rope_theta and rope_scaling contradict each other" in capsys.readouterr().err


def test_what_decides_no_logit_may_differ(own_export: tuple[str, Path], tmp_path: Path) -> None:
    _, export = own_export
    other = Path(shutil.copytree(export, tmp_path / "other"))
    change_config(other, max_position_embeddings=16, initializer_range=0.01)
    assert verify.verify(export, other).logits.agreement == 1.0


def test_rows_that_an_export_lacks_are_missed(
    runs: dict[str, Path], own_export: tuple[str, Path]
) -> None:
    layout, export = own_export

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in (mapping.EMBEDDING, mapping.LM_HEAD):
            tensors[name] = tensors[name][:300].clone()

    tamper(export, cut)
    change_config(export, vocab_size=300)
    with pytest.raises(VerifyError, match=r"describe two models: vocab_size is 300 and 320\."):
        verify.verify(export, runs[layout])


def test_ropes_scaling_is_seen_by_logits(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    folder = HfFolder(exports["apertus-scaled"])
    scaled = MegatronCheckpoint(runs["apertus-scaled"], vocab_size=320)
    unscaled = MegatronCheckpoint(runs["apertus-scaled"], vocab_size=320)
    unscaled.arch = replace(unscaled.arch, rope_scaling_factor=None)
    prompts = default_prompts(320, 32)
    logits = folder.logits(prompts)
    differences = [
        verify._compare(model.logits(prompts, lambda name, tensor: tensor), logits).max_abs
        for model in (scaled, unscaled)
    ]
    print(f"scaled {differences[0]:.1e}, unscaled {differences[1]:.1e}")
    assert differences[0] < 1e-4 < differences[1]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_are_those_of_transformers(
    runs: dict[str, Path], exports: dict[str, Path], factor: float
) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arch: Architecture = MegatronCheckpoint(runs["apertus-scaled"], vocab_size=320).arch
    arch = replace(arch, rope_scaling_factor=factor, head_dim=128, rope_theta=500_000.0)
    config = transformers.AutoConfig.from_pretrained(exports["apertus-scaled"])
    config.head_dim = 128
    config.rope_parameters |= {"factor": factor, "rope_theta": 500_000.0}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    # theirs are fp32, through a power and a quotient
    torch.testing.assert_close(rope_frequencies(arch), theirs.double(), rtol=1e-6, atol=0)


def test_a_wrong_table_is_caught_by_logits(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # both readings of the tensors use the table, so only the logits can know
    crossed = {"alpha_p": "alpha_n", "alpha_n": "alpha_p"}
    table = tuple(
        replace(entry, hf=tuple(_cross(name, crossed) for name in entry.hf))
        for entry in mapping.TABLE
    )
    monkeypatch.setattr(mapping, "TABLE", table)
    convert_to_hf(runs["gqa"], tmp_path / "out", progress=lambda line: None)
    with pytest.raises(VerifyError, match=r"The two compute something else"):
        verify.verify(tmp_path / "out", runs["gqa"])


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
            r"0\.mlp\.act_fn\.alpha_p has shape \(\), config\.json means \(1,\)",
        ),
        (
            lambda t: t.update({act(0, "beta"): torch.tensor(0.25)}),
            r"0\.mlp\.act_fn\.beta, 100\.0% of whose 1 values differ, by at most 0\.25",
        ),
        (
            lambda t: t["model.norm.weight"].__setitem__(3, torch.nan),
            r"model\.norm\.weight, 1\.6% of whose 64 values differ, by at most inf",
        ),
    ],
)
def test_wrong_files_are_caught(
    runs: dict[str, Path], own_export: tuple[str, Path], edit: Edit, message: str
) -> None:
    layout, export = own_export
    tamper(export, edit)
    with pytest.raises(VerifyError, match=message):
        verify.verify(export, runs[layout])


def test_the_command_ends_with_1_and_names_the_worst_tensor(
    runs: dict[str, Path], own_export: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    layout, export = own_export
    assert main(["verify", str(runs[layout]), str(export)]) == 0
    assert "same token 100.00%" in capsys.readouterr().out
    tamper(export, FAULTS["alphas reset"])
    assert main(["verify", str(runs[layout]), str(export)]) == 1
    error = capsys.readouterr().err
    # the last layer's is the farthest from its start
    assert "8 tensor(s) differ; the one that differs most is model.layers.3.mlp.act_fn." in error


def test_other_models_are_caught(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    with pytest.raises(VerifyError, match=r"two models: num_query_groups is 4 and 2, head_dim is"):
        verify.verify(exports["mha-tied-pp2"], exports["gqa"])
    for llama in (exports["llama"], runs["llama"]):
        with pytest.raises(VerifyError, match=r"two models: activation is xielu and swiglu\."):
            verify.verify(exports["gqa"], llama)


def test_other_tensors_are_caught(exports: dict[str, Path]) -> None:
    gqa, mha, llama = (HfFolder(exports[name]) for name in ("gqa", "mha-tied-pp2", "llama"))
    with pytest.raises(VerifyError, match=r"k_proj\.weight has shape \(96, 64\) in .* \(32, 64\)"):
        verify.compare_tensors(mha, gqa)
    with pytest.raises(VerifyError, match=r"gqa lacks 4 tensor\(s\) .*0\.mlp\.gate_proj"):
        verify.compare_tensors(gqa, llama)


def test_a_broken_reference_is_not_equal(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    def nan(prompts: list[list[int]]) -> list[Tensor]:
        return [logits * torch.nan for logits in float64_logits("gqa", prompts)]

    with pytest.raises(VerifyError, match=r"max logit difference inf"):
        verify.verify(exports["gqa"], runs["gqa"], reference_logits=nan)


def test_default_prompts() -> None:
    prompts = default_prompts(100, 64)
    assert [len(prompt) for prompt in prompts] == [1, 2, 7, 32, 64]
    assert prompts == default_prompts(100, 64)
    assert [len(prompt) for prompt in default_prompts(100, 16)] == [1, 2, 7, 16]
    assert [len(prompt) for prompt in default_prompts(100, 4096)] == [1, 2, 7, 32, 128]
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
        verify.verify(exports["gqa"], runs["gqa"], prompts=[prompt])


def test_what_is_no_model(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match=r"folder has no checkpoint yet: neither it nor its"):
        verify.verify(folder, exports["gqa"])
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        verify.verify(folder, exports["gqa"])
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"model of type 'gpt2'; known are arcee, apertus, llama"):
        verify.verify(folder, exports["gqa"])
    (folder / "config.json").write_text((exports["gqa"] / "config.json").read_text())
    with pytest.raises(UserError, match=r"folder holds no safetensors file\.$"):
        verify.verify(folder, exports["gqa"])
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"bin is a pickle, .* save_pretrained, which writes"):
        verify.verify(folder, exports["gqa"])
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: .* get the file again"):
        verify.verify(folder, exports["gqa"])


def test_a_missing_shard_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_to_hf(runs["gqa"], out, max_shard_bytes=150_000, progress=lambda line: None)
    assert verify.verify(out, runs["gqa"]).logits.agreement == 1.0
    sorted(out.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"-00002-of-\d+\.safetensors is missing: .* 1 of them"):
        verify.verify(out, runs["gqa"])


def test_transformers_is_quiet_and_left_as_it_was(
    exports: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    load_exact(exports["gqa"])
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
