"""Loss curves of emulated FP8 against bf16: xIELU, ReLU squared and SwiGLU, on a CPU.

Trains a small model (sizes in megatron_xielu/mcore/one_rank.py) on text that Python brings along,
once for each line of RUNS, and writes OUT.csv and OUT.png. Nothing here computes in FP8: operands
are quantized as TransformerEngine does and multiplied in float32 (docs/fp8-emulation.md).

    python tools/fp8_emulation.py --folder DIR [--out docs/benchmarks/fp8_emulation]
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

FORMATS = {"bf16": "hybrid", "delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}
SEEDS = (1, 2)
# activation, precision, micro-batches; two micro-batches round in another order and show how far
# runs drift apart by nothing but that
RUNS = (
    ("xielu", "bf16", 1),
    ("xielu", "bf16", 2),
    ("xielu", "delayed", 1),
    ("xielu", "tensorwise", 1),
    ("xielu", "blockwise", 1),
    ("relu2", "bf16", 1),
    ("relu2", "delayed", 1),
    ("swiglu", "bf16", 1),
    ("swiglu", "delayed", 1),
)
NAMES = {"xielu": "xIELU", "relu2": "ReLU²", "swiglu": "SwiGLU"}
VOCAB_SIZE = 2048
INTERVAL = 10
COLUMNS = (
    "activation",
    "precision",
    "micro_batches",
    "seed",
    "step",
    "loss",
    "fc2_input_amax",
    "fc2_input_saturated",
    "fc2_input_flushed",
    "gradients_saturated",
    "gradients_flushed",
    "held_out_loss",
)
Row = dict[str, Any]


def train(folder: Path, activation: Any, precision: str, micro_batches: int, seed: int) -> None:
    """One run in this process; prints its rows as JSON."""
    logging.disable(logging.WARNING)

    from megatron_xielu.mcore import cpu_platform

    cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron_xielu.data.prepare import load_info
    from megatron_xielu.mcore.indexed_dataset import open_dataset
    from megatron_xielu.mcore.one_rank import FP8Settings, Run, Training, only_rank

    info = load_info(folder / "data")
    tokens = {}
    for split in ("train", "valid"):
        documents = open_dataset(info.prefix(split))
        tokens[split] = np.concatenate([documents[i] for i in range(len(documents))])
    recipe: Any = "off" if precision == "bf16" else precision
    settings = FP8Settings(recipe=recipe, format=FORMATS[precision])  # type: ignore[arg-type]
    run = Run(activation, settings, seed, micro_batches)
    label = dict(zip(COLUMNS, (activation, precision, micro_batches, seed), strict=False))
    with only_rank("gloo"):
        training = Training(run, info.vocab_size)
        print(f"{training.parameters} parameters, {run.steps} steps", file=sys.stderr)
        rows, recent = [], []
        for number, step in enumerate(training.steps(tokens["train"]), start=1):
            recent.append(step)
            if number % INTERVAL == 0:
                rows.append({**label, "step": number, **summary(recent)})
                recent = []
        rows[-1]["held_out_loss"] = training.held_out_loss(tokens["valid"])
    sys.__stdout__.write("".join(json.dumps(row) + "\n" for row in rows))


def summary(steps: list[Any]) -> Row:
    """What an interval of steps showed; shares are of all values of all layers."""
    row: Row = {"loss": fmean(step.loss for step in steps)}
    for name, ending in {"fc2_input": "linear_fc2.input", "gradients": "grad_output"}.items():
        found = [
            statistics
            for step in steps
            for key, statistics in step.statistics.items()
            if key.endswith(ending)
        ]
        if not found:
            return row
        elements = sum(statistics.elements for statistics in found)
        if name == "fc2_input":
            row["fc2_input_amax"] = max(statistics.amax for statistics in found)
        row[f"{name}_saturated"] = sum(statistics.saturated for statistics in found) / elements
        row[f"{name}_flushed"] = sum(statistics.flushed for statistics in found) / elements
    return row


def train_all(folder: Path, jobs: int) -> list[Row]:
    """All runs, each in a process with one thread; returns their rows in order."""
    from megatron_xielu.data.prepare import prepare

    prepare(folder / "data", vocab_size=VOCAB_SIZE)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }

    def one(run: tuple[str, ...]) -> list[Row]:
        begin = time.monotonic()
        command = [sys.executable, __file__, "--folder", str(folder), "--one", *run]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(run)}:\n{done.stderr[-4000:]}")
        print(f"{' '.join(run)}: {time.monotonic() - begin:.0f} s", flush=True)
        # Megatron prints too
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    runs = [tuple(map(str, (*run, seed))) for run in RUNS for seed in SEEDS]
    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(one, runs) for row in rows]


def write_csv(rows: list[Row], path: Path) -> None:
    """One row per interval; shares and losses to 6 digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; absent numbers are nan."""
    with path.open(newline="") as file:
        return [
            {k: v if k in COLUMNS[:2] else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


class Curves:
    """The rows by run: [seeds, intervals] of each column."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, run: tuple[str, str, int], column: str) -> Any:
        """The numbers of one run."""
        found = [[row[column] for row in self._rows if key(row) == (*run, seed)] for seed in SEEDS]
        return np.array(found)

    def held_out(self, run: tuple[str, str, int]) -> Any:
        """[seeds] losses after the last step."""
        return self(run, "held_out_loss")[:, -1]


def key(row: Row) -> tuple[str, str, int, int]:
    """What tells runs apart."""
    return row["activation"], row["precision"], int(row["micro_batches"]), int(row["seed"])


def table(rows: list[Row]) -> str:
    """Held-out losses, and their differences from bf16 of the same seed, in Markdown."""
    curves = Curves(rows)
    lines = [
        "| activation | precision | held-out loss, seeds 1 and 2 | minus bf16, same seed |",
        "| --- | --- | --- | --- |",
    ]
    for activation, precision, cuts in RUNS:
        losses = curves.held_out((activation, precision, cuts))
        differences = losses - curves.held_out((activation, "bf16", 1))
        what = precision if cuts == 1 else f"{precision}, in {cuts} micro-batches"
        told = ", ".join(f"{d:+.4f}" for d in differences) if differences.any() else ""
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {NAMES[activation]} | {what} | {shown} | {told} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """The losses, their differences from bf16, and what FP8 lost of the gradients."""
    from matplotlib.figure import Figure

    curves = Curves(rows)
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    figure.suptitle(
        "Emulated FP8 (quantized as TransformerEngine does, multiplied in float32 on a CPU): "
        "1.3 M parameters, 300 steps of 1,024 tokens, mean of 2 seeds",
        fontsize=11,
    )
    loss, difference, lost = figure.subplots(1, 3)
    steps = curves(RUNS[0], "step")[0]
    for run in RUNS:
        activation, precision, cuts = run
        color = {"xielu": "C0", "relu2": "C1", "swiglu": "C2"}[activation]
        if activation == "xielu" and precision != "bf16":
            color = {"delayed": "C3", "tensorwise": "C4", "blockwise": "C5"}[precision]
        style = "-" if precision == "bf16" else "--"
        label = f"{NAMES[activation]} {precision}"
        mean = curves(run, "loss").mean(0)
        if cuts == 1:
            loss.plot(steps, mean, style, color=color, linewidth=1.2, label=label)
        if (precision, cuts) != ("bf16", 1):
            label += "" if cuts == 1 else f", {cuts} micro-batches"
            color = color if cuts == 1 else "0.4"
            gap = mean - curves((activation, "bf16", 1), "loss").mean(0)
            difference.plot(steps, gap, style, color=color, linewidth=1.2, label=label)
        if precision != "bf16":
            share = curves(run, "gradients_flushed").mean(0)
            lost.plot(steps, share, style, color=color, linewidth=1.2, label=label)
    first, second = curves(RUNS[0], "loss")
    spread = abs(first - second)
    difference.fill_between(
        steps, -spread, spread, color="C0", alpha=0.12, label="xIELU bf16, seed 1 from seed 2"
    )
    loss.set(title="training loss", ylabel="nats per token, mean of 10 steps", ylim=(None, 7))
    difference.set(
        title="minus bf16 of the same seeds", ylabel="nats per token", ylim=(-0.08, 0.08)
    )
    lost.set(title="gradients that became zero", ylabel="share of all values", yscale="log")
    for axes in (loss, difference, lost):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and draw; draw again what was trained; or be one of the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="scratch; its data/ is made, or used again")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/fp8_emulation"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--draw", action="store_true", help="from OUT.csv, without training")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.draw or args.folder):
        parser.error("give a --folder for the data, or --draw")
    if args.one:
        activation, precision, micro_batches, seed = args.one
        train(args.folder, activation, precision, int(micro_batches), int(seed))
        return
    if not args.draw:
        write_csv(train_all(args.folder, args.jobs), args.out.with_suffix(".csv"))
    rows = read_csv(args.out.with_suffix(".csv"))
    draw(rows, args.out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
