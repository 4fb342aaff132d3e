from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_file import edit_index
from torch.distributed.checkpoint.metadata import Metadata
from write_checkpoint import weight_of

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.unpickle import Opaque

FC1 = "decoder.layers.mlp.linear_fc1.weight"
ALPHA_P = "decoder.layers.mlp.activation_func.alpha_p"


def step_of(run: Path) -> Path:
    return run / "checkpoints" / "iter_0000200"


@pytest.mark.parametrize("layout", ["gqa", "gqa-tp2", "bf16"])
def test_reads_stacked_tensors_whole_and_by_layer(runs: dict[str, Path], layout: str) -> None:
    reader = TorchDistReader(step_of(runs[layout]))
    keys = reader.keys()
    model_keys = [key for key in keys if not key.startswith("optimizer.")]
    assert len(model_keys) == 11
    for key in model_keys:
        expected = weight_of(key, reader.shape(key)).to(reader.dtype(key))
        assert torch.equal(reader.read(key), expected), key
        if "layers" in key:
            for layer in range(4):
                assert torch.equal(reader.read(key, layer), expected[layer]), key


@pytest.mark.parametrize("layout", ["mha-tied-per-layer", "mha-tied-pp2"])
def test_layouts_hold_the_same_weights(runs: dict[str, Path], layout: str) -> None:
    reader = TorchDistReader(step_of(runs[layout]))
    whole = weight_of(FC1, (4, 96, 64))
    for layer in range(4):
        if layout == "mha-tied-pp2":
            assert torch.equal(reader.read(FC1, layer), whole[layer])
        else:
            assert torch.equal(reader.read(FC1.replace("mlp", f"{layer}.mlp")), whole[layer])


def test_alphas_stay_fp32_in_a_bf16_model(runs: dict[str, Path]) -> None:
    reader = TorchDistReader(step_of(runs["bf16"]))
    assert reader.dtype(ALPHA_P) == torch.float32
    assert reader.dtype(FC1) == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes through Linux's /proc")
def test_reads_only_the_bytes_it_needs(runs: dict[str, Path]) -> None:
    reader = TorchDistReader(step_of(runs["gqa-tp2"]))
    reader.read(FC1, 0)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    reader.read(FC1, 2)
    read, needed = bytes_read() - before, 96 * 64 * 4
    print(f"{read} bytes read for {needed}")
    # looking into a chunk's zip archive costs torch.load about 42 kB, here for two ranks' chunks
    assert needed <= read < needed + 2 * 50_000


def test_needs_neither_megatron_nor_a_process_group(runs: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_xielu.checkpoint.torch_dist import TorchDistReader\n"
        f"reader = TorchDistReader({str(step_of(runs['gqa-tp2']))!r})\n"
        f"print(tuple(reader.read({FC1!r}).shape), reader.common_state()['args'].rotary_base)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "(4, 96, 64) 5000\n"


def test_common_state(runs: dict[str, Path]) -> None:
    state = TorchDistReader(step_of(runs["gqa"])).common_state()
    assert state["iteration"] == 200
    assert state["args"].layernorm_epsilon == 1e-5
    assert isinstance(state["args"].attention_backend, Opaque)


def test_common_state_does_not_depend_on_what_was_imported(runs: dict[str, Path]) -> None:
    # Megatron registers its classes with torch.load when it is imported
    pytest.importorskip("megatron.core.safe_globals")
    before = set(torch.serialization.get_safe_globals())
    args = TorchDistReader(step_of(runs["gqa"])).common_state()["args"]
    assert isinstance(args.attention_backend, Opaque)
    assert set(torch.serialization.get_safe_globals()) == before


def test_older_common_state_is_a_file_of_its_own(copy_run: Callable[[str], Path]) -> None:
    step = step_of(copy_run("gqa"))
    torch.save({"iteration": 7, "where": Path("x")}, step / "common.pt")
    assert TorchDistReader(step).common_state()["iteration"] == 7


def test_unknown_key_names_the_nearest(runs: dict[str, Path]) -> None:
    reader = TorchDistReader(step_of(runs["gqa"]))
    with pytest.raises(UserError, match=rf"'decoder.layers.mlp.fc1.weight'.*{FC1}"):
        reader.read("decoder.layers.mlp.fc1.weight")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        TorchDistReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no \.metadata file, which is written last"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1})])
def test_damaged_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is (damaged|not the index)"):
        TorchDistReader(tmp_path)


def test_missing_file_is_named_only_when_needed(copy_run: Callable[[str], Path]) -> None:
    step = step_of(copy_run("mha-tied-pp2"))
    (step / "__1_0.distcp").unlink()
    reader = TorchDistReader(step)
    reader.read(FC1, 1)
    for failing in (lambda: reader.read(FC1, 2), lambda: reader.check_files([FC1])):
        with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
            failing()


def test_truncated_file_is_named(copy_run: Callable[[str], Path]) -> None:
    step = step_of(copy_run("gqa-tp2"))
    file = step / "__1_0.distcp"
    os.truncate(file, 1000)
    with pytest.raises(UserError, match=r"__1_0\.distcp is cut short: 1000 bytes, at least \d+"):
        TorchDistReader(step).read(FC1)


def test_damaged_file_is_named(copy_run: Callable[[str], Path]) -> None:
    step = step_of(copy_run("gqa"))
    file = step / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=r"cannot be read from __0_0\.distcp, which is damaged"):
        TorchDistReader(step).read(FC1)


def test_incomplete_tensor_is_not_filled_with_garbage(copy_run: Callable[[str], Path]) -> None:
    step = step_of(copy_run("gqa-tp2"))

    def drop_a_chunk(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[FC1].chunks[0]  # type: ignore[union-attr]

    edit_index(step, drop_a_chunk)
    with pytest.raises(UserError, match=rf"{FC1} is incomplete, 21504 of 24576 elements"):
        TorchDistReader(step).read(FC1)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return shutil.rmtree, (str(self.path),)


def test_a_foreign_index_runs_no_code(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(RunsCode(victim)))
    with pytest.raises(UserError, match=r"names shutil\.rmtree, which no index needs"):
        TorchDistReader(tmp_path)
    assert victim.is_dir()


def test_foreign_arguments_run_no_code(copy_run: Callable[[str], Path], tmp_path: Path) -> None:
    step = step_of(copy_run("gqa"))
    victim = tmp_path / "victim"
    victim.mkdir()
    torch.save({"args": RunsCode(victim)}, step / "common.pt")
    assert isinstance(TorchDistReader(step).common_state()["args"], Opaque)
    assert victim.is_dir()
