from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import LAYOUTS, recipe_of
from safetensors.torch import load_file
from write_checkpoint import weight_of

from megatron_xielu.checkpoint import verify
from megatron_xielu.checkpoint.export_manifest import MANIFEST
from megatron_xielu.checkpoint.mapping import XIELU_CONSTANTS
from megatron_xielu.checkpoint.model_card import _trained_on
from megatron_xielu.checkpoint.run import arguments_of, open_run
from megatron_xielu.checkpoint.safetensors_file import SafetensorsWriter
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.checkpoint.verify import VerifyError
from megatron_xielu.cli import main
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, to_yaml
from megatron_xielu.recipes.schema import Xielu

SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def convert(run: Path, out: Path, **options: object) -> dict[str, torch.Tensor]:
    convert_to_hf(run, out, progress=lambda line: None, **options)  # type: ignore[arg-type]
    tensors: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_all_layouts_of_one_model_give_the_same_export(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    for same in (
        ["gqa", "gqa-tp2", "plain", "hybrid", "hybrid-tp2"],
        ["mha-tied-per-layer", "mha-tied-pp2"],
        ["llama", "llama-tp2"],
    ):
        first, *others = [convert(runs[name], tmp_path / name) for name in same]
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[name], other[name]) for name in first)


def test_values_and_types(runs: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    tensors = convert(runs["gqa"], tmp_path / "out", tokenizer=tokenizer)
    embedding = weight_of("embedding.word_embeddings.weight", (384, 64))
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding[:320])
    alpha_p = weight_of("decoder.layers.mlp.activation_func.alpha_p", (4, 1))
    qkv = weight_of("decoder.layers.self_attention.linear_qkv.weight", (4, 128, 64))
    for i in range(4):
        act = f"model.layers.{i}.mlp.act_fn."
        assert torch.equal(tensors[act + "alpha_p"], alpha_p[i])
        assert tensors[act + "alpha_p"].dtype == torch.float32
        assert (tensors[act + "beta"].shape, tensors[act + "beta"].item()) == ((), 0.5)
        assert tensors[act + "eps"].item() == pytest.approx(-1e-6)
        # the second group's key: behind q0 q1 k0 v0 q2 q3, each of 16 rows
        k_proj = tensors[f"model.layers.{i}.self_attn.k_proj.weight"]
        assert torch.equal(k_proj[16:], qkv[i, 6 * 16 : 7 * 16])


@pytest.mark.parametrize(
    ("layout", "dtype", "expected"),
    [
        ("gqa", "auto", torch.float32),
        ("gqa", "bf16", torch.bfloat16),
        ("bf16", "auto", torch.bfloat16),
        ("bf16", "fp32", torch.float32),
    ],
)
def test_dtype(
    runs: dict[str, Path], tmp_path: Path, layout: str, dtype: str, expected: torch.dtype
) -> None:
    tensors = convert(runs[layout], tmp_path / "out", dtype=dtype)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".act_fn." in name else expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(expected).removeprefix("torch.")


def test_config(runs: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    convert(runs["mha-tied-pp2"], tmp_path / "out", tokenizer=tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["ArceeForCausalLM"],
        "hidden_act": "xielu",
        "vocab_size": 320,
        "head_dim": 24,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tokenizer / file).read_bytes()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "apertus-scaled",
            {
                "architectures": ["ApertusForCausalLM"],
                "hidden_act": "xielu",
                "qk_norm": True,
                "mlp_bias": False,
                "rope_theta": 5000.0,
                "rope_scaling": SCALING,
                "rope_parameters": SCALING | {"rope_theta": 5000.0},
                "pad_token_id": None,
            },
        ),
        ("llama", {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}),
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}),
        ("relu2", {"architectures": ["ArceeForCausalLM"], "hidden_act": "relu2"}),
    ],
)
def test_config_of_other_classes(
    runs: dict[str, Path], tmp_path: Path, layout: str, expected: dict[str, object]
) -> None:
    convert(runs[layout], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected


def test_untied(runs: dict[str, Path], tmp_path: Path) -> None:
    tensors = convert(runs["apertus-tied-tp2"], tmp_path / "out", untie=True)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_plain_megatron_needs_what_it_does_not_say(
    runs: dict[str, Path], tmp_path: Path, tokenizer: Path
) -> None:
    copy = unsaid_vocabulary(runs["plain"], tmp_path)
    with pytest.raises(UserError, match=r"iter_0000007 \(no recipe.*does not say vocab_size; give"):
        convert(copy, tmp_path / "out")
    by_hand = convert(copy, tmp_path / "out", given={"vocab_size": 320})
    by_tokenizer = convert(copy, tmp_path / "out", tokenizer=tokenizer)
    for tensors in (by_hand, by_tokenizer):
        assert tensors["lm_head.weight"].shape == (320, 64)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained on | 1,792 tokens in 7 steps |" in card
    assert "## Recipe" not in card


def resized(tokenizer: Path, folder: Path, num_ids: int) -> Path:
    """A tokenizer of the first ids, or of more, each a token of its own."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocab = {key: id for key, id in content["model"]["vocab"].items() if id < num_ids}
    vocab |= {f"<{id}>": id for id in range(len(vocab), num_ids)}
    content["model"] |= {"vocab": vocab, "merges": []}
    shutil.copytree(tokenizer, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_must_fit_and_decides_no_row(
    runs: dict[str, Path], tmp_path: Path, tokenizer: Path
) -> None:
    # as the presets have it: far fewer ids than rows, and none of these is padding
    smaller = resized(tokenizer, tmp_path / "smaller", 100)
    for layout in ("gqa", "plain"):
        tensors = convert(runs[layout], tmp_path / layout, tokenizer=smaller)
        assert tensors["model.embed_tokens.weight"].shape == (320, 64)
        larger = resized(tokenizer, tmp_path / f"larger-{layout}", 321)
        with pytest.raises(UserError, match=r"ids up to 320, the model's vocab_size is 320: it is"):
            convert(runs[layout], tmp_path / "out", tokenizer=larger)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_ids", "exported"), [(384, 384), (257, 257), (256, 384), (100, 384), (385, None)]
)
def test_a_vocabulary_that_nothing_says_is_decided_by_megatrons_rounding(
    runs: dict[str, Path], tmp_path: Path, tokenizer: Path, num_ids: int, exported: int | None
) -> None:
    step = unsaid_vocabulary(runs["plain"], tmp_path)
    own = resized(tokenizer, tmp_path / "tokenizer", num_ids)
    lines: list[str] = []
    if exported is None:
        with pytest.raises(UserError, match=r"ids up to 384, the model's vocab_size is 384"):
            convert(step, tmp_path / "out", tokenizer=own)
        return
    convert_to_hf(step, tmp_path / "out", tokenizer=own, progress=lines.append)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (exported, 64)
    assert f"{num_ids} ids, which Megatron rounds up to a multiple of 128" in lines[0]
    assert f"so {exported} are exported. --arg vocab_size=NUMBER overrules that" in lines[0]
    lines.clear()
    given = {"vocab_size": 384}
    convert_to_hf(step, tmp_path / "out", tokenizer=own, given=given, progress=lines.append)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (384, 64)
    assert not any("vocab_size" in line for line in lines)


def unsaid_vocabulary(run: Path, folder: Path) -> Path:
    """A copy of a plain checkpoint as Megatron saves it where the tokenizer knows the size."""
    step = TorchDistReader(run / "checkpoints" / "iter_0000200")
    copy = folder / "iter_0000007"
    shutil.copytree(step.path, copy)
    args = arguments_of(step) | {"vocab_size": None, "consumed_train_samples": 56}
    torch.save({"args": Namespace(**args)}, copy / "common.pt")
    return copy


def test_the_padding_of_data_s_tokenizer_is_left_out_after_training(
    copy_run: Callable[[str], Path], tmp_path: Path
) -> None:
    # by the saved arguments alone, where recipe.yaml leaves the size to the data
    recipe = recipe_of("gqa")
    model = replace(recipe.model, vocab_size=None, padded_vocab_size=None)
    run = with_recipe(copy_run("gqa"), replace(recipe, model=model))
    tensors = convert(run, tmp_path / "out")
    assert tensors["lm_head.weight"].shape == (320, 64)


def test_an_export_that_differs_never_gets_its_name(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        whole(writer, name, tensor + 1 if name == "model.norm.weight" else tensor)

    whole = SafetensorsWriter.write
    lines: list[str] = []
    convert_to_hf(runs["gqa"], tmp_path / "good", check=True, progress=lines.append)
    assert any("same token 100.00%" in line for line in lines)
    monkeypatch.setattr(SafetensorsWriter, "write", faulty)
    with pytest.raises(VerifyError, match=r"1 tensor\(s\) differ; .* is model\.norm\.weight"):
        convert(runs["gqa"], tmp_path / "bad", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from megatron_xielu.checkpoint import to_hf\n"
        "to_hf.model_card = lambda *args, **how: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"to_hf.convert_to_hf(Path({str(runs['gqa'])!r}), Path({str(out)!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    lines: list[str] = []
    convert_to_hf(runs["gqa"], out, progress=lines.append)
    assert any(".out.new-" in line and "interrupted run" in line for line in lines)
    assert (out / MANIFEST).is_file()


def test_tied_embeddings_are_written_once(runs: dict[str, Path], tmp_path: Path) -> None:
    tensors = convert(runs["mha-tied-pp2"], tmp_path / "out")
    assert "lm_head.weight" not in tensors
    # of the embedding's 384 rows the recipe's
    assert tensors["model.embed_tokens.weight"].shape == (320, 64)


def test_large_models_are_split(runs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = convert(runs["gqa"], tmp_path / "whole")
    lines: list[str] = []
    out = tmp_path / "split"
    export = convert_to_hf(runs["gqa"], out, max_shard_bytes=150_000, progress=lines.append)
    files = sorted(out.glob("*.safetensors"))
    print(*lines, sep="\n")
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == stored
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes) == export.num_bytes
    assert max(sizes) <= 150_000
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if ".act_fn." not in name:
            assert torch.equal(tensor, whole[name]), name


def test_files_are_as_readable_as_any_other(runs: dict[str, Path], tmp_path: Path) -> None:
    convert(runs["gqa"], tmp_path / "out")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_an_earlier_export_is_replaced(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(runs["gqa"], out, max_shard_bytes=150_000)
    convert(runs["mha-tied-pp2"], out)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((out / MANIFEST).read_text())["recipe"] == "mha-tied-pp2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fine_tune(out: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out).save_pretrained(out)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: (out / "notes.md").touch(), r"\(added: notes\.md\)"),
        (lambda out: (out / "checkpoint-100").mkdir(), r"\(added: checkpoint-100/\)"),
        (lambda out: (out / "README.md").unlink(), r"\(removed: README\.md\)"),
        (fine_tune, r"\(changed: config\.json, .*model\.safetensors\)"),
        (
            lambda out: [(out / f"{i}.txt").touch() for i in range(7)],
            r"\(added: 0\.txt, .*, 4\.txt and 2 more\)",
        ),
    ],
)
def test_an_export_that_something_was_done_to_is_kept(
    runs: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    out = tmp_path / "out"
    convert(runs["gqa"], out)
    change(out)
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.iterdir()}
    with pytest.raises(UserError, match=rf"no longer what the export wrote {told}.*a new folder"):
        convert(runs["gqa"], out)
    after = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.iterdir()}
    assert after == before


def test_what_comes_while_an_export_is_written_is_kept(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for told in (r"has no megatron_xielu_export\.json", r"added: notes\.md"):
        with pytest.raises(UserError, match=told):
            convert_to_hf(runs["gqa"], out, progress=lambda line: note(out))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "notes.md").is_file()
        shutil.rmtree(out)
        convert(runs["gqa"], out)


def note(out: Path) -> None:
    out.mkdir(exist_ok=True)
    (out / "notes.md").touch()


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 2, "files": []}', "[]", "{"])
def test_an_export_whose_files_are_not_known_is_kept(
    runs: dict[str, Path], tmp_path: Path, content: str
) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"does not list what the export wrote, as of an older"):
        convert(runs["gqa"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_anything_else_is_left_alone(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.tex").touch()
    else:
        out.write_text("thesis")
    with pytest.raises(UserError, match=r"out exists and is not an export of this program"):
        convert(runs["gqa"], out)
    assert out.exists()


def test_a_full_disk_leaves_the_earlier_export(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(runs["gqa"], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_xielu.checkpoint.to_hf import convert_to_hf\n"
        "from megatron_xielu.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    convert_to_hf(Path({str(runs['mha-tied-pp2'])!r}), Path({str(out)!r}))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    print(done.stdout)
    assert "could not be written" in done.stdout
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_truncated_checkpoint_writes_nothing(
    copy_run: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copy_run("gqa-tp2")
    file = run / "checkpoints" / "iter_0000200" / "__1_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"__1_0\.distcp is cut short"):
        convert(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gqa-tp2"]


def test_needs_neither_megatron_nor_transformers(runs: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.modules['megatron'] = sys.modules['transformers'] = None\n"
        "from megatron_xielu.checkpoint.to_hf import convert_to_hf\n"
        f"convert_to_hf(Path({str(runs['gqa-tp2'])!r}), Path({str(tmp_path / 'out')!r}))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def with_recipe(run: Path, recipe: Recipe) -> Path:
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    return run


def test_what_a_class_cannot_hold_is_refused_with_every_reason(
    copy_run: Callable[[str], Path], tmp_path: Path
) -> None:
    run = with_recipe(copy_run("gqa"), replace(recipe_of("gqa"), xielu=Xielu(beta=0.4)))
    with pytest.raises(UserError) as error:
        convert(run, tmp_path / "out", arch="apertus")
    for reason in ("beta=0.4", "ApertusForCausalLM always normalizes queries and keys"):
        assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_recipe_edited_after_training_is_refused(
    copy_run: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of("gqa")
    model = replace(recipe.model, rope_theta=1e6)
    run = with_recipe(copy_run("gqa"), replace(recipe, model=model))
    with pytest.raises(UserError, match=r"rotary_base: 5000 in the checkpoint"):
        convert(run, tmp_path / "out")


def test_bad_arguments(
    copy_run: Callable[[str], Path],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"dtype 'fp16' is none of auto, fp32, bf16"):
        convert(runs["gqa"], tmp_path / "out", dtype="fp16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a Hugging Face tokenizer folder"):
        convert(runs["gqa"], tmp_path / "out", tokenizer=tmp_path / "empty")
    with pytest.raises(UserError, match=r"nothing is no folder\. Give the folder that holds tok"):
        convert(runs["gqa"], tmp_path / "out", tokenizer=tmp_path / "nothing")
    recipe = recipe_of("gqa")
    run = with_recipe(
        copy_run("gqa"), replace(recipe, model=replace(recipe.model, vocab_size=None))
    )
    monkeypatch.setattr(TorchDistReader, "common_state", lambda _: {})
    with pytest.raises(UserError, match=r"vocabulary's size is unknown"):
        convert(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa"]


def test_the_command_and_its_exit_codes(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    command = ["convert", "to-hf", str(runs["apertus-tied-tp2"]), str(out)]
    assert main([*command, "--untie", "--max-shard-size", "50KB", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr()
    assert "as ApertusForCausalLM: " in printed.out
    assert "rounded to the shorter type" in printed.out
    # the bar is for terminals
    assert printed.err == ""
    assert len(list(out.glob("model-*.safetensors"))) > 2
    (tmp_path / "empty").mkdir()
    assert main(["convert", "to-hf", str(tmp_path / "empty"), str(tmp_path / "x")]) == 2
    assert "empty has no checkpoint yet" in capsys.readouterr().err
    assert main([*command, "--arg", "rotary_base=1"]) == 2
    for wrong in (["--max-shard-size", "big"], ["--max-shard-size", "0"], ["--arg", "rotary_base"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *wrong])
    monkeypatch.setitem(XIELU_CONSTANTS, "model.layers.{i}.mlp.act_fn.beta", 0.25)
    monkeypatch.setattr(verify, "compare_tensors", lambda one, other: {})
    assert main([*command[:3], str(tmp_path / "wrong")]) == 1
    assert "verification failed, nothing was written: The two compute" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_model_card(copy_run: Callable[[str], Path], tokenizer: Path, tmp_path: Path) -> None:
    run = copy_run("gqa")
    records = [
        {"type": "train", "step": 190, "loss": 2.5},
        {"type": "valid", "step": 200, "loss": 2.25},
        {"type": "train", "step": 200, "loss": 2.125},
        {"type": "train", "step": 210, "loss": 1.0},
    ]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"type": "tra']))
    tensors = convert(run, tmp_path / "out", tokenizer=tokenizer)
    card = (tmp_path / "out" / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in tensors.values() if tensor.dim())
    assert f"| parameters | {parameters:,} (fp32;" in card
    # 200 steps of 8 sequences of 32 tokens
    assert "| trained on | 51,200 tokens in 200 steps |" in card
    assert "| training loss | 2.1250 nats per token at step 200 |" in card
    assert "| validation loss | 2.2500 nats per token at step 200 |" in card
    assert "--model-impl transformers" in card
    assert to_yaml(recipe_of("gqa")).rstrip() in card


@pytest.mark.parametrize(
    ("args", "told"),
    [
        # a sequence length that changed
        ({"consumed_train_tokens": 40_000, "consumed_train_samples": 900}, "40,000 tokens in 200"),
        ({"consumed_train_samples": 900, "seq_length": 64}, "57,600 tokens in 200"),
        ({"consumed_train_samples": None}, "200"),
        ({}, "200"),
    ],
)
def test_tokens_are_what_megatron_counted(
    runs: dict[str, Path], args: dict[str, object], told: str
) -> None:
    # the recipe's batch of the present says nothing of the past
    assert _trained_on(open_run(runs["gqa"]), args) == f"{told} steps"


def test_every_layout_is_covered() -> None:
    assert {parallel.tensor_model_parallel_size for _, parallel, _ in LAYOUTS.values()} == {1, 2}
