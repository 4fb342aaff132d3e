"""The FP8 kernels: in Triton's interpreter here, on a GPU where there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("triton_quantized_interpreted.py")
ANYWHERE = (
    "delayed_forward",
    "delayed_backward",
    "amax_is_raised_only",
    "current_scaling",
    "blockwise_forward",
    "blockwise_backward",
    "extreme_values",
    "a_bias_counts_in_rows_that_exist_only",
    "scales_at_the_edges",
    "bytes_are_packed_in_order",
    "what_is_left_out_changes_nothing",
    "the_same_bits_again",
    "nothing_to_compute",
    "wrong_tensors_are_refused",
)
ON_A_GPU = ("bytes_are_torchs_cast",)

Results = dict[str, dict[str, object]]


def run_checks(folder: Path, device: str, names: tuple[str, ...], **variables: str) -> Results:
    """What each check measured, or its traceback, from one process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results = folder / "results.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(results), device, *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_checks(tmp_path_factory.mktemp("interpreted"), "cpu", ANYWHERE, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Results:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("there is no GPU that computes in FP8")
    folder = tmp_path_factory.mktemp("on_a_gpu")
    return run_checks(folder, "cuda", ANYWHERE + ON_A_GPU, TRITON_INTERPRET="0")


def report(results: Results, name: str) -> None:
    print(f"{name}: {results[name]['measured']}")
    assert results[name]["error"] is None, results[name]["error"]


@pytest.mark.parametrize("name", ANYWHERE)
def test_interpreted(interpreted: Results, name: str) -> None:
    report(interpreted, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ANYWHERE + ON_A_GPU)
def test_on_a_gpu(on_a_gpu: Results, name: str) -> None:
    report(on_a_gpu, name)


def test_assembly_transposes_four_words_of_bytes() -> None:
    """The one instruction sequence that the interpreter cannot run, carried out by hand."""
    from megatron_xielu.ops.triton.quantized_kernels import TRANSPOSE_BYTES

    # operands $0 to $3 are results, $4 to $7 the words of four rows
    rows = [bytes(range(4 * row, 4 * row + 4)) for row in range(4)]
    registers = {f"${4 + row}": rows[row] for row in range(4)}
    steps = re.findall(r"prmt\.b32 (\S+), (\S+), (\S+), 0x([0-9a-f]{4});", TRANSPOSE_BYTES.value)
    for target, low, high, selector in steps:
        pair = registers[low] + registers[high]
        # each digit, from the lowest, picks one of the eight bytes
        registers[target] = bytes(pair[int(digit)] for digit in reversed(selector))
    columns = [registers[f"${column}"] for column in range(4)]
    assert columns == [bytes(column) for column in zip(*rows, strict=True)]
    print(f"{len(steps)} instructions for 16 bytes")
