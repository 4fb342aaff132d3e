"""Hugging Face folders become runs: the same bits, the same function, or a clear refusal."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS
from safetensors.torch import load_file, save_file
from tiny_hf import MODELS, write_hf
from torch import Tensor

from megatron_xielu import cli
from megatron_xielu.checkpoint import inventory
from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.from_hf import convert_from_hf
from megatron_xielu.checkpoint.hf_config import read_architecture
from megatron_xielu.checkpoint.hf_model import HfFolder, load_exact
from megatron_xielu.checkpoint.mapping import locate, read_weight
from megatron_xielu.checkpoint.reference import megatron_logits
from megatron_xielu.checkpoint.release import megatron_arguments
from megatron_xielu.checkpoint.run import architecture_of, open_run
from megatron_xielu.checkpoint.store import open_store
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import load_recipe, megatron_args, to_yaml
from tests.limits import file_limit

PROMPTS = [[5], [1, 2, 3], [7, 200, 11, 42, 42, 0, 199, 499, 3, 17, 8, 9], list(range(100, 132))]


def convert(hf: Path, out: Path) -> None:
    convert_from_hf(hf, out, progress=lambda line: None)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every model; not to be changed."""
    root = tmp_path_factory.mktemp("hf")
    return {name: write_hf(root / name, name) for name in MODELS}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a folder, to damage it."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(folders[name], tmp_path / "hf"))

    return copied


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights(run: Path) -> dict[tuple[str, int | None], Tensor]:
    """Every weight of a run by Megatron's name and layer, without padding."""
    opened = open_run(run)
    reader = TorchDistReader(opened.path)
    arch = architecture_of(opened, reader)
    return {
        (placement.entry.megatron[0], placement.layer): read_weight(reader, placement, arch)
        for placement in locate(reader, arch)
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    one, other = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_back_to_hugging_face_are_the_same_bits(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    convert(folders[name], tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "back", progress=lambda line: None)
    before, after = tensors(folders[name]), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # alphas are trained in fp32, whatever they were published in
        expected = tensor.float() if ".act_fn." in key else tensor
        if not key.endswith("act_fn.eps"):
            assert same_bits(after[key], expected), key
    configs = [HfFolder(folder) for folder in (folders[name], tmp_path / "back")]
    first, second = (read_architecture(c.config, c.target, c.path) for c in configs)
    assert first == second


# without a recipe: hybrid models and arguments that no recipe has
@pytest.mark.parametrize("name", [name for name in LAYOUTS if not LAYOUTS[name][2].get("plain")])
def test_back_to_megatron_are_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    convert_to_hf(runs[name], tmp_path / "hf", progress=lambda line: None)
    convert(tmp_path / "hf", tmp_path / "run")
    before, after = weights(runs[name]), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert [key for key, weight in before.items() if not same_bits(after[key], weight)] == []


# of both activations, with every option that no shape shows
@pytest.mark.parametrize("name", ["apertus", "qwen3-tied"])
def test_megatron_computes_what_transformers_does(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    convert(folders[name], tmp_path / "run")
    model = load_exact(folders[name])
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    found = megatron_logits(open_run(tmp_path / "run"))(PROMPTS)
    pairs = list(zip(expected, found, strict=True))
    difference = max(float((x - y[:, :500]).abs().max()) for x, y in pairs)
    scale = max(float(logits.abs().max()) for logits in expected)
    print(f"{name}: logits up to {scale:.2f} differ by at most {difference:.2e}")
    assert difference <= 1e-4
    # 12 padding rows are the mean of 500, which Jensen's inequality bounds
    rise = max(float((y.logsumexp(-1) - x.logsumexp(-1)).max()) for x, y in pairs)
    assert 0 < rise <= math.log(512 / 500) + 1e-5


def test_what_lies_in_the_run_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    told: list[str] = []
    done = convert_from_hf(folders["arcee"], tmp_path / "run", check=True, progress=told.append)
    recipe = load_recipe(str(done.path / "recipe.yaml"))
    assert recipe == done.recipe
    assert (recipe.name, recipe.model.vocab_size, recipe.model.head_dim) == ("run", 500, None)
    assert recipe.model.padded_vocab_size == 512
    # 500 x 64 twice, the final norm, and 3 layers
    layer = 2 * 64 + (4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 64 * 96 + 2
    assert done.num_parameters == 2 * 500 * 64 + 64 + 3 * layer
    assert any("39 tensors are equal bit for bit" in line for line in told)
    store = open_store(done.path)
    assert (store.steps(), store.latest()) == ([0], 0)
    assert inventory.verify(store, [], report=told.append)
    assert "whole, latest" in inventory.table(store)
    reader = TorchDistReader(store.path(0))
    arch = architecture_of(open_run(done.path), reader)
    assert arch == Architecture.of_arguments(megatron_arguments(arch), has_alphas=True)
    assert reader.read("decoder.layers.mlp.activation_func.alpha_p").dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the folder as one file without an index: another shard layout."""
    content = tensors(folder)
    change(content)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(content, folder / "weights.safetensors")


def refuse(folder: Path, out: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and this message, and leaves nothing."""
    assert cli.main(["convert", "from-hf", str(folder), str(out), "--no-verify"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(out.parent.glob(f"*{out.name}*"))


def test_one_file_without_index(
    copy: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy("llama")
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(folder, lambda content: content.update(inverse))
    convert(folder, tmp_path / "one")
    convert(folders["llama"], tmp_path / "several")
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert all(same_bits(one[key], several[key]) for key in several)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            "arcee",
            lambda t: t.pop("model.layers.1.mlp.act_fn.alpha_n"),
            "lacks 1 of the 39 tensors that its config.json means, the first is "
            "model.layers.1.mlp.act_fn.alpha_n",
        ),
        (
            "arcee",
            lambda t: t.pop("model.layers.1.mlp.act_fn.beta"),
            "the first is model.layers.1.mlp.act_fn.beta",
        ),
        (
            "arcee",
            lambda t: t["model.layers.2.mlp.act_fn.beta"].fill_(0.25),
            "model.layers.2.mlp.act_fn.beta is 0.25, only 0.5 is trained on",
        ),
        (
            "llama",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "holds 1 tensors that LlamaForCausalLM by its config.json has no place for, the first "
            "is model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "qwen3-tied",
            lambda t: t.update({"lm_head.weight": torch.zeros(500, 64)}),
            "config.json says tie_word_embeddings, but lm_head.weight is another tensor",
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "model.norm.weight is stored as I8",
        ),
    ],
)
def test_config_and_tensors_that_disagree(
    copy: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    folder = copy(model)
    change_tensors(folder, change)
    refuse(folder, tmp_path / "out", message, capsys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 4}, "lacks 12 of the 51 tensors"),
        ({"num_hidden_layers": 2}, "holds 12 tensors"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape (32, 64), its config.json means"),
        ({"vocab_size": 512}, "embed_tokens.weight has shape (500, 64)"),
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2'"),
        ({"rope_parameters": None, "rope_theta": 10000.5}, "rope_theta=10000.5 must be a whole"),
    ],
)
def test_another_config(
    copy: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, Any],
    message: str,
) -> None:
    folder = copy("arcee")
    change_config(folder, **keys)
    refuse(folder, tmp_path / "out", message, capsys)


def test_files_that_are_missing_or_damaged(
    copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copy("arcee"), tmp_path / "out"
    shards = sorted(folder.glob("*.safetensors"))
    cut = shards[0].read_bytes()
    shards[0].write_bytes(cut[:-100])
    refuse(folder, out, f"{shards[0]} is damaged", capsys)
    shards[0].write_bytes(cut)
    shards[1].unlink()
    refuse(folder, out, f"{shards[1]} is missing", capsys)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()
    refuse(folder, out, "is a pickle, which can run code and is not read", capsys)
    refuse(tmp_path / "nothing", out, "has no config.json", capsys)


INDEX, CONFIG = "model.safetensors.index.json", "config.json"


@pytest.mark.parametrize("kind", ["single", "index"])
def test_stale_files_beside_the_model_s_are_passed_over(
    copy: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = copy("llama")
    original = tensors(folder)
    if kind == "single":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        save_file(original, folder / "model.safetensors")
        (folder / INDEX).write_text("of an earlier save, not read")
    # of a save in more or other files; both sort behind the model's own
    for name in ("model-00099-of-00099.safetensors", "optimizer.safetensors"):
        save_file({"model.norm.weight": torch.zeros(64), "left.over": torch.ones(3)}, folder / name)
    convert_from_hf(folder, tmp_path / "run", check=True, progress=lambda line: None)
    convert_to_hf(tmp_path / "run", tmp_path / "back", progress=lambda line: None)
    back = tensors(tmp_path / "back")
    assert back.keys() == original.keys()
    assert all(same_bits(back[name], tensor) for name, tensor in original.items())


def test_files_that_contradict_each_other(
    copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copy("llama"), tmp_path / "out"
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, content = next(iter(load_file(first))), load_file(second)
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra": first.name}}))
    refuse(folder, out, f"{first} lacks model.extra, which {INDEX} names for it: they are", capsys)
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file(content | {name: torch.zeros(1)}, second)
    refuse(folder, out, f"{second} holds {name}, which no entry of {INDEX} names for it", capsys)
    save_file(content, second)
    index.unlink()
    save_file({name: torch.zeros(1)}, folder / "zzz.safetensors")
    refuse(folder, out, f"{first} and {folder / 'zzz.safetensors'} both hold {name}", capsys)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (INDEX, '{"metadata": {', "index.json is no JSON (Expecting"),
        (INDEX, "[]", "index.json holds list in place of names and values"),
        (INDEX, "{}", "index.json has no weight_map from tensors to files beside it"),
        (INDEX, '{"weight_map": {"a": 1}}', "has no weight_map from tensors to files beside it"),
        (INDEX, '{"weight_map": {"a": "../b"}}', "has no weight_map from tensors to files beside"),
        (CONFIG, "[1]", "config.json holds list in place of names and values"),
        (CONFIG, {"model_type": ["llama"]}, "model_type is ['llama'] and must be a name"),
        (CONFIG, {"num_hidden_layers": "3"}, "num_hidden_layers is '3' and must be a whole number"),
        (CONFIG, {"hidden_size": 64.0}, "hidden_size is 64.0 and must be a whole number above 0"),
        (CONFIG, {"num_attention_heads": 0}, "num_attention_heads is 0 and must be a whole number"),
        (CONFIG, {"head_dim": True}, "head_dim is True and must be a whole number above 0"),
        (CONFIG, {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention"),
        (
            CONFIG,
            {"num_attention_heads": 6, "head_dim": None},
            "heads=6 does not divide hidden",
        ),
        (CONFIG, {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5' and must be above 0"),
        (CONFIG, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan and must be above 0"),
        (CONFIG, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no' and must be true or"),
        (
            CONFIG,
            {"rope_parameters": "llama3"},
            "rope_parameters is 'llama3' and must be names",
        ),
        (CONFIG, {"rope_scaling": {"rope_theta": "x"}}, "rope_theta is 'x' and must be above 0"),
        (CONFIG, {"layer_types": [["full_attention"]]}, "and must be a list of names"),
        (CONFIG, {"eos_token_id": "</s>"}, "eos_token_id is '</s>' and must be a token's id or a"),
    ],
)
def test_damaged_json_is_one_message(
    copy: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str | dict[str, Any],
    message: str,
) -> None:
    folder = copy("arcee")
    if isinstance(content, dict):
        change_config(folder, **content)
    else:
        (folder / file).write_text(content)
    refuse(folder, tmp_path / "out", message, capsys)
    assert cli.main(["verify", str(folder), str(folder)]) == 2
    assert message in capsys.readouterr().err


def with_tokenizer(folder: Path, tokenizer: Path, **generation: Any) -> Path:
    """Put a tokenizer, generation_config.json and what is no business of an export beside."""
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    (folder / "tokenizer_tricks.py").write_text("raise SystemExit")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_tokenizer_and_ids_come_back(
    copy: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(
        copy("arcee"), tokenizer, bos_token_id=1, eos_token_id=[0, 2, 7], top_p=0.9
    )
    change_config(folder, eos_token_id=[0, 7])
    run, back = tmp_path / "run", tmp_path / "back"
    convert(folder, run)
    convert_to_hf(run, back, progress=lambda line: None)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, back))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [after[key] for key in ids] == [before[key] for key in ids] == [1, [0, 7], None]
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2, 7], "top_p": 0.9}
    for file in tokenizer.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("[rb]*/**/*.py"))
    from transformers import GenerationConfig

    stops = GenerationConfig.from_pretrained(back).eos_token_id
    assert stops == [0, 2, 7]


def test_ids_of_a_folder_without_any_files_beside(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["apertus"], tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "back", progress=lambda line: None)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "back" / file).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (1, 2)
    assert "holds no tokenizer" in (tmp_path / "back" / "README.md").read_text()


def test_another_tokenizer_of_the_data_counts(
    copy: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    folder, run, data = (
        with_tokenizer(copy("arcee"), tokenizer),
        tmp_path / "run",
        tmp_path / "data",
    )
    change_config(folder, eos_token_id=[0, 7])
    convert(folder, run)
    recipe = load_recipe(str(run / "recipe.yaml"), [f"data.path={data}"])
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    own = Path(shutil.copytree(tokenizer, data / "tokenizer")) / "tokenizer.json"
    found = []
    for name in ("same", "extended"):
        convert_to_hf(run, tmp_path / name, progress=lambda line: None)
        found.append(json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"])
        content = json.loads(own.read_text())
        content["model"]["vocab"]["another"] = 320
        own.write_text(json.dumps(content))
    assert found == [[0, 7], 0]
    assert '"another": 320' in (tmp_path / "extended" / "tokenizer.json").read_text()


@pytest.mark.parametrize("kind", ["same rows", "padding"])
def test_rows_without_a_token_are_kept_and_padding_is_not(
    tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    # 320 ids, far fewer than rows, as Qwen3 has it
    size = {"same rows": 640, "padding": 500}[kind]
    folder = with_tokenizer(write_hf(tmp_path / "hf", "qwen3-tied", vocab_size=size), tokenizer)
    run = tmp_path / "run"
    convert(folder, run)
    # as training goes on from it, with the arguments that Megatron would save
    recipe = load_recipe(str(run / "recipe.yaml"))
    flags = megatron_args(
        recipe,
        world_size=1,
        device="cpu",
        run_dir=run,
        precision="fp32",
        transformer_impl="local",
    )
    saved = {flags[flags.index(flag) + 1] for flag in ("--vocab-size", "--padded-vocab-size")}
    assert saved == {str(size), str(-(-size // 128) * 128)}
    for name, chosen in (("kept", None), ("given", tokenizer)):
        convert_to_hf(run, tmp_path / name, tokenizer=chosen, progress=lambda line: None)
        before, after = tensors(folder), tensors(tmp_path / name)
        assert all(same_bits(after[key], tensor) for key, tensor in before.items())


def test_another_models_tokenizer(
    copy: Callable[[str], Path],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy("arcee")
    shutil.copy(tokenizer / "tokenizer.json", folder)
    convert(folder, tmp_path / "fits")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"]["another"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(folder, tmp_path / "out", "has ids up to 500, the model's vocab_size is 500", capsys)


def test_an_existing_folder_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"out exists\. Choose a new folder"):
        convert(folders["arcee"], out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_folder_that_comes_meanwhile_stays(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"out exists\. Choose a new folder"):
        convert_from_hf(folders["arcee"], out, progress=lambda line: out.mkdir())
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]


def test_a_write_that_fails_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_limit(100_000):
        refuse(folders["arcee"], tmp_path / "out", "could not be written: [Errno 27]", capsys)


def test_a_full_disk_is_seen_before_anything_is_written(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        refuse(folders["arcee"], disk / "out", "Make room, or choose another disk", capsys)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_an_interruption_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = HfFolder.read, [0]

    def interrupted(self: HfFolder, name: str) -> Tensor:
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(HfFolder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folders["arcee"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
