from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xielu.checkpoint.safetensors_file import SafetensorsWriter, TensorSpec

TENSORS = {
    "odd": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
    "scalar": torch.tensor(-1e-6),
    "half": torch.full((3, 1), 0.1, dtype=torch.float16),
    "matrix": torch.arange(6.0).view(2, 3),
    "a name with ü": torch.zeros(0, 4),
}


def write(path: Path, names: list[str]) -> None:
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    with SafetensorsWriter(path, specs) as file:
        for name in names:
            file.write(name, TENSORS[name])


@pytest.mark.parametrize("reverse", [False, True])
def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path, reverse: bool) -> None:
    path = tmp_path / "model.safetensors"
    write(path, sorted(TENSORS, reverse=reverse))
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(7), tensor.nan_to_num(7)), name


def test_it_is_as_long_as_the_librarys_own(tmp_path: Path) -> None:
    write(tmp_path / "ours", list(TENSORS))
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    # the headers hold the same in another order
    sizes = [(tmp_path / name).stat().st_size for name in ("ours", "theirs")]
    assert abs(sizes[0] - sizes[1]) <= 40


def test_a_tensor_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"not written: \['matrix'\]"):
        write(tmp_path / "model.safetensors", [name for name in TENSORS if name != "matrix"])
    with pytest.raises(FileExistsError):
        write(tmp_path / "model.safetensors", [])
