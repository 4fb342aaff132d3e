"""Models larger than memory: logits and comparisons take matrices a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import write_hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_xielu.checkpoint import row_blocks, verify
from megatron_xielu.checkpoint.from_hf import convert_from_hf
from megatron_xielu.checkpoint.hf_model import HfFolder, load_exact
from megatron_xielu.checkpoint.verify import VerifyError

PROMPTS = [[5], [1, 2, 499], [7, 200, 7, 42]]
SMALLEST = 32 * 64
"""Numbers of the key's matrix, which has the fewest."""


class LargestFloat32(TorchDispatchMode):
    """The most numbers that an operation gave in fp32."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        """Calls the operation."""
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if (
                isinstance(each, Tensor)
                and each.dtype == torch.float32
                and each.device.type != "meta"
            ):
                self.numbers = max(self.numbers, each.numel())
        return result


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 64 columns, which divides no matrix, and two of 96."""
    monkeypatch.setattr(row_blocks, "_NUMBERS", 200)


@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 64), (1,), (7,), (7, 64), (6, 64), (2, 201), (3, 0)]
)
def test_blocks_are_the_tensor(shape: Sequence[int]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    blocks = list(row_blocks.row_blocks(tensor))
    assert all(block.numel() <= 200 or len(block) == 1 for block in blocks)
    if 0 in shape[:1]:
        assert not blocks
    else:
        assert torch.equal(torch.cat(blocks) if shape else blocks[0], tensor)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("apertus-bf16", {}),
        ("qwen3-tied", {"dtype": torch.bfloat16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_a_folders_logits_are_those_of_the_whole_model(
    tmp_path: Path, name: str, changed: dict[str, Any]
) -> None:
    folder = write_hf(tmp_path / "hf", name, **changed)
    model = load_exact(folder)
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    for found, whole in zip(HfFolder(folder).logits(PROMPTS), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["apertus-bf16", "qwen3-tied", "arcee-relu2-bf16"])
def test_verification_makes_no_matrix_fp32_and_reads_a_folder_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, run = write_hf(tmp_path / "hf", name, dtype=torch.bfloat16), tmp_path / "run"
    convert_from_hf(folder, run, progress=lambda line: None)
    read = HfFolder.read

    def small(self: HfFolder, name: str) -> Tensor:
        assert len(self.specs[name].shape) < 2, f"{name} was read whole"
        return read(self, name)

    monkeypatch.setattr(HfFolder, "read", small)
    with LargestFloat32() as largest:
        report = verify.verify(folder, run, prompts=PROMPTS[1:2])
    assert report.logits.max_abs <= 1e-5
    # three rows of logits
    assert 3 * 500 <= largest.numbers < SMALLEST


def test_the_numbers_of_a_difference_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    folder, run = write_hf(tmp_path / "hf", "apertus-bf16"), tmp_path / "run"
    convert_from_hf(folder, run, progress=lambda line: None)
    damaged = HfFolder(folder)
    whole = damaged.read("lm_head.weight").clone()
    # in the first, a middle and the last block
    whole[:3] += 1
    whole[250] -= 4
    whole[499] += 2
    blocks = damaged.blocks
    damaged.blocks = lambda name: (  # type: ignore[method-assign]
        row_blocks.row_blocks(whole) if name == "lm_head.weight" else blocks(name)
    )
    (_, checkpoint) = verify.open_models(folder, run)
    message = r"lm_head\.weight, 1\.0% of whose 32000 values differ, by at most 4"
    with pytest.raises(VerifyError, match=message):
        verify.compare_tensors(damaged, checkpoint)
