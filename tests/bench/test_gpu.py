"""The GPU benchmark, mostly without a GPU: what it takes for right, figures, goals, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu import cli
from megatron_xielu.bench.gpu import device, report
from megatron_xielu.bench.gpu import run as gpu
from megatron_xielu.bench.gpu.device import Clocks, Machine, Timing, Work
from megatron_xielu.bench.gpu.problem import (
    BFLOAT16_ARITHMETIC,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    Float8,
    Problem,
    Results,
)
from megatron_xielu.bench.gpu.report import GOALS, Goal, Measured, judge
from megatron_xielu.errors import UserError
from megatron_xielu.ops import xielu
from megatron_xielu.ops.reference import xielu_as_published

pytest.importorskip("triton")

from megatron_xielu.bench.gpu import copies
from megatron_xielu.bench.gpu.cases import Contender, Operation
from megatron_xielu.bench.gpu.fp8_sides import SCALES, cast_and_transpose

MACHINE = Machine("some GPU", None, "2.13", "3.7")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# what is right


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(96, 64, torch.bfloat16, "cpu")


def results(problem: Problem, function: Callable[..., Tensor], dtype: torch.dtype) -> Results:
    leaves = [
        t.detach().requires_grad_() for t in (problem.x, *(a.to(dtype) for a in problem.alphas))
    ]
    y = function(*leaves)
    dx, *sums = torch.autograd.grad(y, leaves, problem.grad_y)
    return Results(y.detach(), dx, tuple(sums))


@pytest.fixture(scope="module")
def ours(problem: Problem) -> Results:
    return results(problem, xielu, torch.float32)


def test_our_kernels_are_right_and_published_code_is_so_within_its_arithmetic(
    problem: Problem, ours: Results
) -> None:
    published = results(problem, xielu_as_published, torch.bfloat16)
    assert problem.wrong(ONE_ROUNDING, "xielu", ours) is None
    assert problem.wrong(BFLOAT16_ARITHMETIC, "xielu", published) is None
    message = problem.wrong(ONE_ROUNDING, "xielu", published)
    print(message)
    assert message is not None
    assert "elements of y are wrong" in message


@pytest.mark.parametrize("allowance", [ONE_ROUNDING, BFLOAT16_ARITHMETIC])
def test_swapped_alphas_are_wrong(problem: Problem, allowance: object) -> None:
    swapped = dataclasses.replace(problem, alphas=problem.alphas[::-1])
    assert problem.wrong(allowance, "xielu", results(swapped, xielu, torch.float32))


@pytest.mark.parametrize("what", ["y", "dx"])
@pytest.mark.parametrize("change", ["neighbour", "nan"])
def test_a_single_wrong_element_is_found(
    problem: Problem, ours: Results, what: str, change: str
) -> None:
    tensor = getattr(ours, what).clone()
    if change == "nan":
        tensor[70, 5] = torch.nan
    else:
        tensor.view(torch.int16)[70, 5] += 1
    message = problem.wrong(ONE_ROUNDING, "xielu", dataclasses.replace(ours, **{what: tensor}))
    print(message)
    assert message is not None
    assert message.startswith(f"1 elements of {what} are wrong")
    assert repr(float(problem.x[70, 5])) in message


def test_a_wrong_alpha_gradient_is_found(problem: Problem, ours: Results) -> None:
    alpha_p, alpha_n = ours.alphas
    off = dataclasses.replace(ours, alphas=(alpha_p, alpha_n * (1 + 1e-5)))
    assert "the gradient of alpha_n is" in str(problem.wrong(ONE_ROUNDING, "xielu", off))
    assert problem.wrong(BFLOAT16_ARITHMETIC, "xielu", off) is None


def test_the_other_activations_have_their_own_truth(problem: Problem) -> None:
    gelu = Results(F.gelu(problem.x, approximate="tanh"))
    assert problem.wrong(TWO_ROUNDINGS, "gelu", gelu) is None
    assert problem.wrong(TWO_ROUNDINGS, "srelu", gelu)
    relu = F.relu(problem.x.float())
    slope = 2 * relu * problem.grad_y.float()
    srelu = Results(relu.square().bfloat16(), slope.bfloat16())
    assert problem.wrong(ONE_ROUNDING, "srelu", srelu) is None


def fp8(tensor: Tensor, dtype: torch.dtype) -> Float8:
    scale = torch.tensor([SCALES[dtype]])
    return Float8(*cast_and_transpose(tensor, scale, dtype), scale)


@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_fp8_is_judged_by_its_own_rounding(
    problem: Problem, ours: Results, dtype: torch.dtype
) -> None:
    right = fp8(results_in_float32(problem), dtype)
    assert problem.wrong(ONE_ROUNDING, "xielu", Results(right)) is None
    # a rounding to bfloat16 before the cast changes some bytes
    assert problem.wrong(TWO_ROUNDINGS, "xielu", Results(fp8(ours.y, dtype))) is None
    assert problem.wrong(ONE_ROUNDING, "xielu", Results(fp8(ours.y, dtype)))

    flipped = right.rowwise.clone()
    flipped.view(torch.uint8)[3, 4] ^= 1
    for broken, message in (
        (right._replace(rowwise=flipped, columnwise=flipped.t().contiguous()), "1 elements of y"),
        (right._replace(columnwise=right.columnwise.roll(1, 0)), "the transposed y differs"),
        (right._replace(amax=right.amax * 1.01), "the amax of y"),
        (right._replace(scale=right.scale * 2), "elements of y are wrong"),
    ):
        assert message in str(problem.wrong(ONE_ROUNDING, "xielu", Results(broken)))


def results_in_float32(problem: Problem) -> Tensor:
    return xielu(problem.x.float(), *problem.alphas)


# figures


class Script:
    """A timer whose times are given: by name, or one after the other where they are lists."""

    def __init__(self, times: Mapping[str, list[float]]) -> None:
        self.times, self.ran = times, []

    def prepare(self, work: Work) -> Work:
        return work

    def run(self, prepared: Mapping[str, Work], repetitions: int) -> Timing:
        self.ran.append((list(prepared), repetitions))
        return Timing({name: self.times[name] for name in prepared}, Clocks(1755, 2619, 650.5))


def contender(name: str, wrong: str | None = None) -> Contender:
    return Contender(name, Results, lambda results: wrong)


def failing(name: str) -> Contender:
    def work() -> Results:
        raise ImportError("no such module\nand more")

    return Contender(name, work, lambda results: None)


def test_what_is_wrong_or_missing_is_not_timed_and_says_why() -> None:
    operation = Operation(
        "forward",
        4_000_000,
        limits=(contender("slow copy"), contender("copy"), contender("no copy", "differs")),
        contenders=(contender("ours"), contender("peer", "it is off"), failing("absent")),
    )
    timer = Script({"copy": [2.0] * 3, "slow copy": [3.0] * 3, "ours": [2.2] * 3})
    measured = gpu.measure(operation, timer, repetitions=3)
    assert timer.ran == [(["slow copy", "copy"], gpu.TRIALS), (["copy", "ours"], 3)]
    assert measured.limit == "copy"
    assert measured.ratio("ours", "copy") == pytest.approx(1.1)
    assert measured.notes == {
        "no copy": "not timed, for it is wrong: differs",
        "peer": "not timed, for it is wrong: it is off",
        "absent": "not timed: ImportError: no such module",
    }
    found = report.rows(measured, MACHINE, "bf16", (1000, 1000))
    gpu.show(measured, found)
    assert [row.implementation for row in found] == ["copy", "ours", "no copy", "peer", "absent"]
    assert [row.p50_us for row in found] == [2.0, 2.2, None, None, None]


def measured(operation: str, times: dict[str, list[float]], notes: dict[str, str]) -> Measured:
    return Measured(operation, 10**9, "ours", "copy", Timing(times, Clocks(1755.0)), notes)


def test_ratios_are_those_of_neighbours() -> None:
    # the clock falls by half in the middle, so that medians of each alone compare different clocks
    times = {"copy": [1.0, 1.0, 2.0, 2.0, 2.0], "ours": [1.1, 1.1, 1.1, 2.2, 2.2]}
    figures = measured("forward", times, {})
    assert figures.ratio("ours", "copy") == pytest.approx(1.1)
    assert figures.ratio("ours", "absent") is None
    _, row = report.rows(figures, MACHINE, "bf16", (2, 3))
    assert (row.p20_us, row.p50_us, row.p80_us) == (1.1, 1.1, 2.2)
    assert (row.ratio_to_copy_limit, row.sm_clock_mhz, row.power_w) == (1.1, 1755.0, None)
    assert (row.driver, row.shape, row.bytes) == (None, "2x3", 10**9)


def test_the_goals_are_those_that_were_set() -> None:
    assert {str(goal) for goal in GOALS} == {
        "forward: <= 1.08 x the copy",
        "backward: <= 1.10 x the copy",
        "FP8 forward: <= 1.20 x the copy",
        "forward+backward: >= 1.35 x as fast as 'torch.compile'",
        "FP8 forward+backward: >= 1.50 x as fast as 'ours bf16, then'",
    }


def test_goals_are_met_missed_or_not_measured() -> None:
    times = {
        "copy": [10.0, 10.0],
        "ours": [10.8, 10.8],
        "torch.compile of it": [15.0, 15.0],
        "torch.compile of another": [14.0, 14.0],
    }
    figures = [
        measured("forward", times, {}),
        measured("backward", {"copy": [1.0, 1.0]}, {"ours": "not timed, for it is wrong: why"}),
    ]
    for goal, met, found in (
        (Goal("forward", 1.08), True, "1.080"),
        (Goal("forward", 1.07), False, "1.080"),
        # the faster of two peers counts
        (Goal("forward", 1.29, "torch.compile"), True, "1.296"),
        (Goal("forward", 1.35, "torch.compile"), False, "1.296"),
        (Goal("forward", 1.50, "ours bf16, then"), None, "nothing to compare"),
        (Goal("backward", 1.10), False, "not timed, for it is wrong: why"),
        (Goal("FP8 forward", 1.20), None, "cannot do it"),
    ):
        verdict = judge(goal, figures)
        print(verdict)
        assert verdict.met is met
        assert found in verdict.found


def test_the_csv_grows_and_keeps_one_header(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    figures = measured("forward", {"copy": [1.0, 2.0], "ours": [2.0, 3.0]}, {"peer": "no, none"})
    found = report.rows(figures, MACHINE, "bf16", (20480, 9216))
    for _ in range(2):
        report.check_appendable(path)
        report.append(path, found)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    print(path.read_text())
    assert len(lines) == 2 * len(found) == 6
    assert ",".join(lines[0]) == (
        "date,gpu,driver,torch,triton,version,op,implementation,dtype,shape,bytes,p20_us,p50_us,"
        "p80_us,ratio_to_copy_limit,sm_clock_mhz,mem_clock_mhz,power_w,note"
    )
    assert lines[1]["ratio_to_copy_limit"] == "1.75"
    assert (lines[2]["note"], lines[2]["p50_us"], lines[2]["driver"]) == ("no, none", "", "")
    assert lines[3:] == lines[:3]


def test_a_csv_that_cannot_be_appended_to_is_refused_first(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path, message in (
        (other, "has the columns a,b instead of date,gpu"),
        (tmp_path / "none/gpu.csv", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            report.check_appendable(path)
    assert other.read_text() == "a,b\n1,2\n"


# the machine


def test_what_nvidia_smi_answers_is_read() -> None:
    numbers = [device.number(text) for text in device.parse_answer("1755, [N/A], 650.27\n", 3)]
    assert numbers == [1755.0, None, 650.27]
    assert device.parse_answer("No devices were found", 3) == [None] * 3
    assert device.parse_answer("580.65.06\n", 1) == ["580.65.06"]


def test_a_smaller_gpu_gets_fewer_tokens() -> None:
    assert gpu.fitting_tokens(80 << 30) == 20480
    assert gpu.fitting_tokens(10 << 30) == 10240
    assert gpu.fitting_tokens(0) == 1


@without_a_gpu
def test_without_a_gpu_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.csv"
    assert cli.main(["bench", "--gpu", "--csv", str(path)]) == 2
    message = capsys.readouterr().err
    print(message)
    assert "bench --gpu cannot measure here: torch" in message
    assert "--static sm_90" in message
    assert not path.exists()


@without_a_gpu
def test_questions_to_an_absent_gpu_have_no_answer() -> None:
    assert device.clocks() == Clocks()


@pytest.mark.parametrize("tile", [min(copies.TILES), max(copies.TILES)], ids=str)
def test_copies_move_128_bits_at_a_time(tile: copies.Tile) -> None:
    from megatron_xielu.bench import ahead, sass

    x, grad_y, y = (torch.empty(4096, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))

    def work() -> None:
        copies.copy(x, y, tile)
        copies.read_two(x, grad_y, y, tile)

    for launch in ahead.record(work, 90):
        code = sass.read(launch.cubin)
        elements = 2 * tile.words
        print(
            f"{launch.kernel}: {len(code.opcodes) * 32 * launch.warps / elements:.1f} per element"
        )
        assert {access.bits for access in code.accesses} == {128}
        assert code.spills == 0


PROGRAM = """
import json, sys, time
import torch
from megatron_xielu.bench.gpu import report
from megatron_xielu.bench.gpu import run as gpu
from megatron_xielu.bench.gpu.cases import operations
from megatron_xielu.bench.gpu.device import Clocks, Machine, Timing
from megatron_xielu.bench.gpu.fp8_sides import fp8_sides
from megatron_xielu.bench.gpu.problem import Allowance, Problem

class Host:
    def prepare(self, work):
        return work

    def run(self, prepared, repetitions):
        times = {name: [] for name in prepared}
        for _ in range(2):
            for name, work in prepared.items():
                begin = time.perf_counter()
                work()
                times[name].append(1e6 * (time.perf_counter() - begin))
        return Timing(times, Clocks())

found = {}
for operation in operations(Problem.random(16, 64, torch.float32, "cpu"), "triton"):
    measured = gpu.measure(operation, Host())
    rows = report.rows(measured, Machine("interpreter", None, "", ""), "fp32", (16, 64))
    gpu.show(measured, rows)
    found[operation.name] = {row.implementation: [row.p50_us, row.note] for row in rows}

fp8 = {}
problem = Problem.random(32, 64, torch.bfloat16, "cpu")
# the interpreter loses the carry where FP8 rounds up to a power of two, so up to a half
allowance = Allowance(relative=0.6, absolute=0.05, sums=1e-6)
for side in fp8_sides(problem, "triton"):
    if "TransformerEngine" not in side.name:
        fp8[side.name] = problem.wrong(allowance, side.activation, (side.both or side.forward)())
print(json.dumps([found, fp8]))
"""


def test_everything_but_the_device_runs_in_the_interpreter() -> None:
    # in float32, whose stores the interpreter rounds as a GPU does; torch.compile is left out
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    found, fp8 = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["forward", "backward", "forward+backward"]
    for operation, rows in found.items():
        microseconds, note = rows.pop("ours")
        assert microseconds is not None, f"{operation}: {note}"
        # the fastest of the copies, all of which are right
        assert "words" in next(iter(rows))
        assert not any("wrong" in note for _, note in rows.values()), rows
    timed = {name for name, (microseconds, _) in found["forward"].items() if microseconds}
    assert {"published code", "transformers' module"} <= timed
    assert fp8 == {
        "ours": None,
        "ours bf16, then torch.compile of cast and transpose": None,
        "torch.compile of all": None,
    }


@pytest.mark.te
def test_transformer_engine_has_the_kernels_that_are_measured() -> None:
    pytest.importorskip("transformer_engine")
    from megatron_xielu.mcore import te_kernels

    for dtype, scale in SCALES.items():
        te_kernels.Quantizer(torch.tensor([scale]), dtype)
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    if not torch.cuda.is_available():
        # as far as it comes without one
        with pytest.raises(RuntimeError, match="CUDA"):
            te_kernels.forward("gelu", x)


@pytest.mark.gpu
@on_a_gpu
def test_a_small_measurement_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    measured = gpu.measure_all(tokens=256, csv=path, repetitions=5)
    assert {"forward", "backward", "forward+backward"} <= {found.operation for found in measured}
    for found in measured:
        assert found.ours in found.timing.microseconds, found.notes
        assert found.limit is not None
    assert len(path.read_text().splitlines()) > len(measured)
