"""The step line and metrics.jsonl: what a person and a program see of a run."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.training import step_line
from megatron_xielu.training.report import Reporter, StepMetrics, read_metrics
from tests.limits import file_limit

TOKENS_PER_STEP = 1_835_008
CELL = re.compile(r"\S+(?: \S+)*")


class Clock:
    def __init__(self, now: float = 1_790_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def reporter(run_dir: Path, **changes: Any) -> tuple[Reporter, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "train_iters": 1000,
        "tokens_per_step": TOKENS_PER_STEP,
        "flops_per_token": 8e9,
        "num_devices": 64,
        "peak_flops": 989.4e12,
        "out": out,
        "clock": clock,
    }
    return Reporter(**settings | changes), out, clock


def metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.71344,
        "grad_norm": 0.25,
        "lr": 6e-4,
        "alpha_p": (0.79, 0.834),
        "alpha_n": (0.81, 1.2),
        "seconds_per_step": 1.5,
    }
    return StepMetrics(**values | changes)


def cells(line: str) -> list[str]:
    return CELL.findall(line)


def cell_ends(line: str) -> list[int]:
    return [match.end() for match in CELL.finditer(line)]


STRANGE = [
    {},
    {"loss": math.nan, "grad_norm": math.nan, "alpha_p": (math.nan, 0.8), "alpha_n": (0.8, 1e4)},
    {"loss": math.inf, "grad_norm": math.inf, "lr": 0.0, "alpha_p": (0.8, math.inf)},
    {"loss": 12.0, "grad_norm": None, "lr": 1e-12, "alpha_p": (), "alpha_n": ()},
    {"loss": 3.1e38, "grad_norm": 1e9, "lr": 123.0, "alpha_p": (12.345, 99.996)},
    {"loss": 999.99996, "grad_norm": 99999.99996, "alpha_p": (100.4, 123456.0)},
    {"loss": 1e-9, "grad_norm": 3e-5, "seconds_per_step": 0.2},
    {"loss": 0.0, "grad_norm": 0.0, "seconds_per_step": 99_999.0},
    {"seconds_per_step": 0.0},
]


@pytest.mark.parametrize(("peak_flops", "widest"), [(989.4e12, 150), (None, 130)])
def test_every_line_has_its_cells_at_the_heads(
    tmp_path: Path, peak_flops: float | None, widest: int
) -> None:
    report, out, clock = reporter(tmp_path, train_iters=1_000_000, peak_flops=peak_flops)
    report.header()
    steps = [1, 9, 10, 999, 1000, 99_999, 100_000, 999_999, 1_000_000]
    for step, strange in zip(steps, STRANGE, strict=True):
        clock.now += 40 * 86_400
        report.step(metrics(step, **strange))
    _, heads, *lines = out.getvalue().splitlines()
    print(out.getvalue(), max(map(len, lines)), "columns")
    for line in lines:
        assert cell_ends(line) == cell_ends(heads), line
        assert len(line) == len(heads) <= widest
    assert cells(lines[-1])[:2] == ["1000000/1000000", "100.0%"]
    assert cells(lines[-2])[1] == "99.9%", "100 % means done"
    assert "\x1b" not in out.getvalue()


def test_line_and_record_say_the_same(tmp_path: Path) -> None:
    report, out, clock = reporter(tmp_path, train_iters=2000)
    for step in (100, 200, 300, 400):
        clock.now += 150
        report.step(metrics(step))
    tokens_per_second = TOKENS_PER_STEP / 1.5
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {
        "type": "train",
        "step": 400,
        "train_iters": 2000,
        "tokens": 400 * TOKENS_PER_STEP,
        "loss": 2.71344,
        "grad_norm": 0.25,
        "lr": 6e-4,
        "alpha_p": [0.79, 0.834],
        "alpha_n": [0.81, 1.2],
        "tokens_per_second": tokens_per_second,
        "tflops_per_device": pytest.approx(tokens_per_second * 8e9 / 64 / 1e12),
        "mfu": pytest.approx(tokens_per_second * 8e9 / 64 / 989.4e12),
        "seconds": 600.0,
        "time": clock.now,
    }
    heads, line = (cells(out.getvalue().splitlines()[row]) for row in (1, -1))
    finish = time.strftime("%m-%d %H:%M", time.localtime(clock.now + 2400))
    assert dict(zip(heads, line, strict=True)) == {
        "step/total": "400/2000",
        "done": "20.0%",
        "tokens": "734.00M",
        "loss": "2.7134",
        "grad norm": "0.2500",
        "lr": "6.00e-04",
        "a_p": "0.79-0.83",
        "a_n": "0.81-1.20",
        "tok/s": "1.22M",
        "TFLOP/s": "152.9",
        "MFU": "15.5%",
        "ETA": "0:40:00",
        "finish": finish,
    }


def test_without_a_peak_there_is_no_mfu(tmp_path: Path) -> None:
    report, out, _ = reporter(tmp_path, peak_flops=None)
    report.step(metrics(10))
    report.close()
    assert "MFU" not in out.getvalue()
    assert "%" in out.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["mfu"] is None


def test_a_run_without_alphas_shows_none(tmp_path: Path) -> None:
    report, out, _ = reporter(tmp_path, with_alphas=False)
    report.step(metrics(1, alpha_p=(), alpha_n=()))
    legend, heads, line = out.getvalue().splitlines()
    assert "a_p" not in legend + heads
    assert cell_ends(line) == cell_ends(heads)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["alpha_p"] == record["alpha_n"] == []


def test_heads_come_back_every_25_lines(tmp_path: Path) -> None:
    report, out, _ = reporter(tmp_path)
    for step in range(1, 61):
        report.step(metrics(step)) if step % 10 else report.validation(step, 3.0)
    lines = out.getvalue().splitlines()
    assert [number for number, line in enumerate(lines) if "step/total" in line] == [1, 27, 53]
    assert sum(line.startswith("a_p, a_n:") for line in lines) == 1


def test_validation_is_a_line_and_a_record_of_its_own(tmp_path: Path) -> None:
    report, out, clock = reporter(tmp_path)
    report.step(metrics(50))
    report.validation(50, 3.0)
    heads, _, line = out.getvalue().splitlines()[1:]
    assert cells(line) == ["50/1000", "5.0%", "91.75M", "3.0000", "valid, perplexity 20.09"]
    assert cell_ends(line)[:4] == cell_ends(heads)[:4]
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {
        "type": "valid",
        "step": 50,
        "loss": 3.0,
        "tokens": 50 * TOKENS_PER_STEP,
        "time": clock.now,
    }


@pytest.mark.parametrize(
    ("loss", "shown"),
    [(math.nan, "nan"), (math.inf, "inf"), (1e4, "inf"), (20.0, "4.85e+08")],
)
def test_a_diverged_loss_is_null_in_json_and_readable_in_the_line(
    tmp_path: Path, loss: float, shown: str
) -> None:
    report, out, _ = reporter(tmp_path)
    report.step(metrics(1, loss=loss, alpha_p=(0.8, math.nan)))
    report.validation(1, loss)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        # `parse_constant` is called for what Python reads and JSON does not know
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["loss"] == (loss if math.isfinite(loss) else None)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["alpha_p"] == [0.8, None]
    _, _, train, valid = out.getvalue().splitlines()
    assert cells(train)[3] == step_line.decimal(loss)
    assert cells(train)[6] == "nan"
    assert valid.endswith(f"perplexity {shown}")


def test_eta_counts_wall_time_from_the_second_record(tmp_path: Path) -> None:
    report, out, clock = reporter(tmp_path, train_iters=100)
    # the first interval compiles; 30 s of evaluation and saving follow step 30
    for step, elapsed in [(10, 600), (20, 10), (30, 10), (40, 10 + 30), (50, 10), (100, 50)]:
        clock.now += elapsed
        report.step(metrics(step, seconds_per_step=1.0))
    etas = [cells(line)[-2] for line in out.getvalue().splitlines()[2:]]
    # after step 40: 50 s for 20 steps, 60 to go; after step 50: 60 s for 30 steps, 50 to go
    assert etas == ["-", "-", "-", "0:02:30", "0:01:40", "0:00:00"]


def test_eta_of_a_resumed_run_ignores_the_steps_before_it(tmp_path: Path) -> None:
    report, out, clock = reporter(tmp_path, train_iters=1000, start_step=900)
    for step in (910, 920, 930, 940):
        clock.now += 20
        report.step(metrics(step))
    assert [cells(line)[-2] for line in out.getvalue().splitlines()[2:]] == [*"---", "0:02:00"]


def test_a_clock_that_is_set_back_stops_nothing(tmp_path: Path) -> None:
    report, out, clock = reporter(tmp_path)
    for step in (1, 2, 3, 4):
        clock.now -= 3600
        report.step(metrics(step, seconds_per_step=-3600.0))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["tokens_per_second"] is None
    assert cells(out.getvalue().splitlines()[-1])[-2] == "0:00:00"


def test_records_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    report, _, _ = reporter(tmp_path)
    for step in (1, 2):
        report.step(metrics(step))
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == step


def killed_run(run_dir: Path) -> Path:
    """Trained to step 40, evaluated at 20 and 40, killed while it wrote step 50."""
    report, _, _ = reporter(run_dir)
    for step in (10, 20, 30, 40):
        report.step(metrics(step, loss=float(step)))
        if step % 20 == 0:
            report.validation(step, step + 0.5)
    report.close()
    path = run_dir / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"type": "train", "step": 50, "tok')
    return path


def test_resume_drops_what_no_checkpoint_holds(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    report, out, _ = reporter(tmp_path, start_step=20)
    assert path.read_bytes() == b"".join(kept), "what stays is not rewritten in another way"
    assert "dropped 3 records of an earlier attempt at the steps after 20" in out.getvalue()
    for step in (30, 40, 50):
        report.step(metrics(step, loss=-1.0))
    records = read_metrics(path)
    assert [(record["type"], record["step"], record["loss"]) for record in records] == [
        ("train", 10, 10.0),
        ("train", 20, 20.0),
        ("valid", 20, 20.5),
        ("train", 30, -1.0),
        ("train", 40, -1.0),
        ("train", 50, -1.0),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_resume_at_the_last_record_drops_the_torn_line_alone(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    report, out, _ = reporter(tmp_path, start_step=40)
    assert out.getvalue() == ""
    report.step(metrics(50))
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 20, 30, 40, 40, 50]


def test_a_skipped_step_is_no_loss_of_the_curve(tmp_path: Path) -> None:
    report, out, _ = reporter(tmp_path, start_step=0)
    report.step(metrics(10))
    report.skipped(11, math.nan, math.inf, "the output of layer 3")
    report.step(metrics(20))
    skipped = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert (skipped["type"], skipped["step"], skipped["where"]) == (
        "skipped", 11, "the output of layer 3",
    )  # fmt: skip
    assert (skipped["loss"], skipped["grad_norm"]) == (None, None)
    assert "skipped: loss nan, grad norm inf; the output of layer 3" in out.getvalue()


def test_a_run_that_starts_over_starts_its_file_over(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    reporter(tmp_path, start_step=0)
    assert path.read_bytes() == b""


def test_an_evaluation_that_a_restart_repeats_is_recorded_once(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    report, out, _ = reporter(tmp_path, start_step=40)
    report.validation(40, 9.0)
    assert [record["loss"] for record in read_metrics(path) if record["type"] == "valid"] == [
        20.5,
        40.5,
    ]
    assert "9.0000  valid" in out.getvalue()


def test_a_full_disk_at_resume_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), file_limit(100):
        reporter(tmp_path, start_step=20)
    assert path.read_bytes() == before
    reporter(tmp_path, start_step=20)
    assert len(read_metrics(path)) == 3


def test_a_torn_last_line_is_left_out_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 20, 30, 40, 40]
    whole = path.read_bytes().rpartition(b"\n")[0]
    # every place a kill can cut the last line at, the newline included
    last_line = whole.rindex(b"\n") + 1
    for cut in range(last_line, len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert len(read_metrics(path)) == (6 if cut == len(whole) else 5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"type": "train", "st', "is not a JSON object with a step"),
        (b"\x00\xff\xfe", "is not a JSON object with a step"),
        (b"[1, 2]", "is not a JSON object with a step"),
        (b'{"type": "valid", "loss": 1}', "is not a JSON object with a step"),
        (b'{"type": "valid", "step": 7}', "lacks loss, tokens"),
    ],
)
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"type": "valid", "step": 1, "loss": 2.0, "tokens": 5}'
    path.write_bytes(b"\n".join([good, b"", line, good, b""]))
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3 {complaint}")) as error:
        read_metrics(path)
    assert "repair or delete that line" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read .*name a run folder"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (step_line.quantity(999), "999"),
        (step_line.quantity(999_999), "1.00M"),
        (step_line.quantity(125e9), "125.00B"),
        (step_line.quantity(math.nan), "nan"),
        (step_line.decimal(1e-3), "0.0010"),
        (step_line.decimal(9.99e-4), "9.99e-04"),
        (step_line.throughput(0.0123), "0.0123"),
        (step_line.throughput(412.34), "412.3"),
        (step_line.lowest_highest((0.8, 0.794, 0.826)), "0.79-0.83"),
        (step_line.duration(59.6), "0:01:00"),
        (step_line.duration(86_399.4), "23:59:59"),
        (step_line.duration(86_399.6), "1d 00h"),
        (step_line.duration(999 * 86_400 + 23 * 3600), "999d 23h"),
        (step_line.duration(1e9), ">999d"),
        (
            step_line.clock_time(time.mktime((2029, 2, 3, 4, 5, 6, 0, 0, -1)), days_ahead=299),
            "02-03 04:05",
        ),
        (
            step_line.clock_time(time.mktime((2029, 2, 3, 4, 5, 6, 0, 0, -1)), days_ahead=301),
            "2029-02-03",
        ),
    ],
)
def test_numbers_at_the_edges_of_their_formats(text: str, expected: str) -> None:
    assert text == expected
