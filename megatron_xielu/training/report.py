"""What a run says about itself: one aligned line and one JSON record per logging interval.

The line and the record come from the same numbers. `metrics.jsonl` holds one JSON object a line,
each step once, whatever kills and resumes the run went through; numbers that JSON cannot express
(NaN and infinity of a diverged run) are `null` there and stay readable in the line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_xielu.errors import UserError
from megatron_xielu.training import step_line

METRICS_FILE = "metrics.jsonl"
_LINES_PER_HEADER = 25
# the first interval compiles and fills caches, so time is counted from the second record on,
# and two more intervals have to pass before their mean says something about the rest of the run
_FIRST_TIMED_RECORD = 2
_FIRST_ETA_RECORD = 4
_REQUIRED_KEYS = {
    "train": ("step", "tokens", "loss", "alpha_p", "alpha_n"),
    "valid": ("step", "tokens", "loss"),
}


@dataclass(frozen=True)
class StepMetrics:
    """One logging interval: means over its steps, or the last step's value where no mean exists."""

    step: int
    loss: float
    """Mean training loss in nats per token."""
    grad_norm: float | None
    lr: float
    alpha_p: tuple[float, ...]
    """Effective a_p of every layer, in order; empty where the activation is not xIELU."""
    alpha_n: tuple[float, ...]
    """Effective a_n of every layer, in order."""
    seconds_per_step: float


class Reporter:
    """Prints the progress of one run and appends it to `run_dir/metrics.jsonl`.

    A run that starts at `start_step` first drops what an earlier process wrote after that step, so
    that the file has each step once. Only one rank may own a reporter.

    Args:
        run_dir: the run folder; made if missing.
        tokens_per_step: global batch size times sequence length.
        flops_per_token: FLOPs of forward and backward for one token.
        num_devices: ranks that share the work.
        peak_flops: a device's dense peak in FLOP/s, or None where it is unknown: no MFU then.
        start_step: steps done before this process; 0 starts the file afresh.
        with_alphas: the activation is xIELU, and lines show its a_p and a_n.
        clock: unix time in seconds.

    Raises:
        UserError: an existing `metrics.jsonl` cannot be read.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        train_iters: int,
        tokens_per_step: int,
        flops_per_token: float,
        num_devices: int,
        peak_flops: float | None,
        start_step: int = 0,
        with_alphas: bool = True,
        out: TextIO,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._train_iters = train_iters
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        self._out = out
        self._clock = clock
        self._with_alphas = with_alphas
        self._columns = step_line.columns(
            train_iters, with_alphas=with_alphas, with_mfu=peak_flops is not None
        )
        self._lines_since_header: int | None = None
        self._num_records = 0
        self._timed_from = (0.0, 0)

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept, num_dropped = _drop_after(path, start_step) if path.exists() else ([], 0)
        if num_dropped:
            self._print(
                f"{METRICS_FILE}: dropped {num_dropped} records of an earlier attempt "
                f"at the steps after {start_step}"
            )
        self._evaluated = {record["step"] for record in kept if record.get("type") == "valid"}
        # whoever follows the file sees whole records, at once
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._start_time = clock()

    def header(self) -> None:
        """Print the column heads; `step` and `validation` repeat them every 25 lines."""
        if self._lines_since_header is None:
            self._print(self._legend())
        self._lines_since_header = 0
        self._print(step_line.aligned([head for head, _ in self._columns], self._columns))

    def step(self, metrics: StepMetrics) -> None:
        """Report one logging interval."""
        now = self._clock()
        record = self._record(metrics, now)
        self._write(record)
        eta = self._eta(metrics.step, now)
        alphas = [step_line.lowest_highest(a) for a in (metrics.alpha_p, metrics.alpha_n)]
        cells = [
            *self._position(metrics.step),
            step_line.decimal(record["loss"]),
            step_line.decimal(record["grad_norm"]),
            f"{metrics.lr:.2e}",
            *(alphas if self._with_alphas else []),
            step_line.quantity(record["tokens_per_second"]),
            step_line.throughput(record["tflops_per_device"]),
            "-" if eta is None else step_line.duration(eta),
            "-" if eta is None else step_line.clock_time(now + eta, days_ahead=eta / 86_400),
        ]
        if record["mfu"] is not None:
            cells.insert(-2, f"{record['mfu']:.1%}")
        self._print_row(step_line.aligned(cells, self._columns))

    def validation(self, step: int, loss: float) -> None:
        """Report the mean held-out loss, in nats per token, of an evaluation.

        A step that the file already has, as when a finished run is started again, is only printed.
        """
        if step not in self._evaluated:
            self._evaluated.add(step)
            tokens, now = step * self._tokens_per_step, self._clock()
            self._write(
                {"type": "valid", "step": step, "loss": loss, "tokens": tokens, "time": now}
            )
        row = step_line.aligned([*self._position(step), step_line.decimal(loss)], self._columns)
        self._print_row(f"{row}  valid, perplexity {step_line.perplexity(loss)}")

    def skipped(self, step: int, loss: float | None, grad_norm: float, where: str) -> None:
        """Report a step that was not taken, because its numbers were not finite."""
        tokens, now = step * self._tokens_per_step, self._clock()
        record = {"type": "skipped", "step": step, "loss": loss, "grad_norm": grad_norm}
        self._write({**record, "where": where, "tokens": tokens, "time": now})
        position = step_line.aligned(self._position(step), self._columns)
        numbers = f"loss {step_line.decimal(loss)}, grad norm {step_line.decimal(grad_norm)}"
        self._print_row(f"{position}  skipped: {numbers}; {where}")

    def outliers(
        self, step: int, numbers: dict[str, list[float | None]], crossed: Sequence[str]
    ) -> None:
        """Report what FP8 did to xIELU's output; only a crossed threshold is printed."""
        tokens, now = step * self._tokens_per_step, self._clock()
        self._write({"type": "fp8", "step": step, **numbers, "tokens": tokens, "time": now})
        for text in crossed:
            position = step_line.aligned(self._position(step), self._columns)
            self._print_row(f"{position}  FP8 outlier, {text}")

    def close(self) -> None:
        """Close the metrics file; the reporter is of no use afterwards."""
        self._append(b"")
        self._file.close()

    def _record(self, metrics: StepMetrics, now: float) -> dict[str, Any]:
        seconds = metrics.seconds_per_step
        # a wall clock that was set back must not stop a run
        tokens_per_second = self._tokens_per_step / seconds if seconds > 0 else math.nan
        flops = tokens_per_second * self._flops_per_token / self._num_devices
        return {
            "type": "train",
            "step": metrics.step,
            "train_iters": self._train_iters,
            "tokens": metrics.step * self._tokens_per_step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "alpha_p": list(metrics.alpha_p),
            "alpha_n": list(metrics.alpha_n),
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": flops / 1e12,
            "mfu": None if self._peak_flops is None else flops / self._peak_flops,
            "seconds": now - self._start_time,
            "time": now,
        }

    def _eta(self, step: int, now: float) -> float | None:
        """Seconds left at the wall-clock pace so far, evaluation and saving included."""
        self._num_records += 1
        if self._num_records == _FIRST_TIMED_RECORD:
            self._timed_from = (now, step)
        if self._num_records < _FIRST_ETA_RECORD:
            return None
        from_time, from_step = self._timed_from
        return max(0.0, (now - from_time) / (step - from_step)) * (self._train_iters - step)

    def _position(self, step: int) -> list[str]:
        # rounded down, so that 100 % means done
        per_mille = 1000 * step // self._train_iters
        return [
            f"{step}/{self._train_iters}",
            f"{per_mille / 10:.1f}%",
            step_line.quantity(step * self._tokens_per_step),
        ]

    def _legend(self) -> str:
        legend = "TFLOP/s: per device"
        if self._with_alphas:
            legend = f"a_p, a_n: lowest-highest over the layers, effective values; {legend}"
        if self._peak_flops is not None:
            legend += f"; MFU: of {self._peak_flops / 1e12:.4g} TFLOP/s"
        return legend

    def _write(self, record: dict[str, Any]) -> None:
        self._append(json.dumps(_without_nonfinite(record), allow_nan=False).encode() + b"\n")

    def _append(self, lines: bytes) -> None:
        """Write lines, and those that a full disk did not take before; a run outlives that."""
        self._unwritten += lines
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _print_row(self, row: str) -> None:
        if self._lines_since_header is None or self._lines_since_header >= _LINES_PER_HEADER:
            self.header()
        assert self._lines_since_header is not None
        self._lines_since_header += 1
        self._print(row)

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a last line torn by a kill is left out.

    Raises:
        UserError: there is no such file, or a line in it is not a record.
    """
    return [record for _, record in _read_lines(path)]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name a run folder that `pretrain` wrote"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    records = [(line, _parse(line, path, number)) for number, line in numbered]
    if last.strip():
        # no newline at its end: a kill in mid-write, unless all but the newline was written
        with contextlib.suppress(UserError):
            records.append((last, _parse(last, path, len(lines) + 1)))
    return records


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        what = "is not a JSON object with a step"
    elif missing := set(_REQUIRED_KEYS.get(str(record.get("type")), ())) - record.keys():
        what = f"lacks {', '.join(sorted(missing))}"
    else:
        return record
    raise UserError(
        f"{path}, line {number} {what}: {line[:60].decode(errors='replace')!r}; "
        "repair or delete that line"
    )


def _drop_after(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Rewrite the file without the records after `step` and without a torn line.

    Returns:
        the records that are left, and how many were dropped.
    """
    records = _read_lines(path)
    # a run that starts from nothing has no past, not even an evaluation at step 0
    kept = [(line, record) for line, record in records if step > 0 and record["step"] <= step]
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(line + b"\n" for line, _ in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return [record for _, record in kept], len(records) - len(kept)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
