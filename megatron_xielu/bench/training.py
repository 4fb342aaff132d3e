"""What a training step of the 1.1B recipe costs with xIELU and with what it is compared with.

Each variant trains in a process of its own, which a crash or a lack of memory ends alone. All of
them run once in every round, another one first each time, so that a GPU whose clocks change slows
all alike; ratios are of one round, and their median is given.

The FLOPs that MFU counts are the planner's, and equal for all: the gated MLP is two thirds as wide.
"""

from __future__ import annotations

import csv as csv_files
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_xielu import __version__
from megatron_xielu.analysis.planner import estimate_memory, flops_per_token, peak_flops
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, load_recipe
from megatron_xielu.training import isolated
from megatron_xielu.training.transformer_engine import Found, can_run

OURS = "xielu"
ACTIVATIONS: dict[str, dict[str, Any]] = {
    OURS: {"activation": "xielu"},
    # the plain function, which the compiler sees into
    "xielu, torch.compile": {"activation": "xielu", "impl": "reference", "compiled": True},
    "swiglu": {"activation": "swiglu"},
    "relu2": {"activation": "relu2"},
}
FP8 = ("delayed", "tensorwise", "blockwise")
ON_A_GPU = {"rounds": 3, "warmup": 10, "steps": 20}
TINY = {"rounds": 1, "warmup": 1, "steps": 3}
SMALL_MODEL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=192",
    "model.seq_length=64",
    "model.vocab_size=512",
    "parallel.tensor_model_parallel_size=1",
    "training.micro_batch_size=4",
    "training.global_batch_size=4",
    "training.precision=bf16",
)
# of a device's memory, for what the plan leaves out: temporary tensors, the allocator, the context
ROOM = 0.85


@dataclass(frozen=True)
class Variant:
    """One model in one precision."""

    activation: str
    """Of `ACTIVATIONS`."""
    precision: str
    """bf16 or one of `FP8`."""

    def __str__(self) -> str:
        return f"{self.activation}, {self.precision}"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how."""

    recipe: Recipe
    variants: tuple[Variant, ...]
    transformer_impl: str
    on_gpu: bool
    rounds: int
    warmup: int
    steps: int
    seconds: float = 600
    """After which one process is ended."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV: one variant. None is an empty cell.

    Attributes:
        layers: whose.
        tokens: of a step.
        p20_ms, p50_ms, p80_ms: percentiles of all steps.
        tokens_per_second: by the median step.
        mfu: of the bf16 peak, whatever the precision.
        peak_gib, planned_gib: memory allocated at most, and the planner's prediction.
        ratio_to_xielu: of tokens per second, to xIELU in the same precision and round; the median.
        loss: mean of the counted steps, to see that it trains.
        note: what went wrong, and then there are no figures.
    """

    date: str
    version: str
    device: str | None
    driver: str | None
    torch: str | None
    transformer_engine: str | None
    model: str
    layers: str
    activation: str
    precision: str
    parameters: int | None = None
    tokens: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    planned_gib: float | None = None
    ratio_to_xielu: float | None = None
    loss: float | None = None
    note: str = ""


def plan_of(found: Found, *, tiny: bool) -> Plan:
    """What this machine can measure.

    Args:
        found: its GPUs and TransformerEngine.
        tiny: a small model that trains anywhere, FP8 emulated where it cannot be computed.
    """
    on_gpu = bool(found.gpus)
    with_te = on_gpu and found.version is not None and found.error is None
    precisions = ["bf16"]
    if with_te:
        _, major, minor = found.gpus[0]
        precisions += [name for name in FP8 if can_run(name, (major, minor), found.cuda)]
    elif not on_gpu:
        precisions += FP8
    recipe = load_recipe("tiny", SMALL_MODEL) if tiny else _fitting(found)
    return Plan(
        recipe=recipe,
        variants=tuple(Variant(name, fp8) for fp8 in precisions for name in ACTIVATIONS),
        transformer_impl="transformer_engine" if with_te else "local",
        on_gpu=on_gpu,
        **(TINY if tiny else ON_A_GPU),
    )


def _fitting(found: Found) -> Recipe:
    """The 1.1B recipe with as many sequences, up to its 5, as the plan fits into the memory."""
    total = found.memory[0] if found.memory else 0
    for size in range(5, 0, -1):
        words = [f"training.micro_batch_size={size}", f"training.global_batch_size={size}"]
        recipe = load_recipe("llama-1.1b-xielu", words)
        if estimate_memory(recipe, 1).total <= ROOM * total:
            return recipe
    needed = estimate_memory(recipe, 1).total / ROOM / 2**30
    raise UserError(
        f"bench --training needs {needed:.0f} GiB for one sequence of the 1.1B model, and the GPU "
        f"has {total / 2**30:.0f}; --tiny runs all of it on a small model"
    )


def check_writable(csv: Path | None, markdown: Path | None) -> None:
    """Refuse files that could not be written in the end, before hours of measuring.

    Raises:
        UserError: a file cannot be written, or the CSV has other columns.
    """
    for option, path in (("csv", csv), ("markdown", markdown)):
        if path is None:
            continue
        try:
            with path.open("a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                header = next(csv_files.reader(file), None)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--{option} {path} cannot be written: {error}") from error
        if option == "csv" and header is not None and header != _columns():
            raise UserError(
                f"--csv {path} has the columns {','.join(header)} instead of "
                f"{','.join(_columns())}; name a new file"
            )


def measure_all(plan: Plan, *, csv: Path | None = None, markdown: Path | None = None) -> list[Row]:
    """Every variant in every round, then the table, printed and written."""
    print(f"\n{_heading(plan)}", flush=True)
    results: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in plan.variants}
    problems: dict[Variant, str] = {}
    for number in range(plan.rounds):
        first = number * len(plan.variants) // plan.rounds
        for variant in plan.variants[first:] + plan.variants[:first]:
            if variant in problems:
                continue
            ended = isolated.run(_command(plan, variant), _environment(plan), plan.seconds)
            if ended.problem is None:
                results[variant].append(json.loads(ended.output))
                took = statistics.median(results[variant][-1]["seconds"])
                print(f"  round {number + 1}: {variant}: {1e3 * took:.1f} ms", flush=True)
            else:
                problems[variant] = ended.problem
                print(f"  round {number + 1}: {variant}: FAIL: {ended.problem}", flush=True)
    rows = [_row(plan, variant, results, problems.get(variant)) for variant in plan.variants]
    table = as_markdown(rows)
    print(f"\n{table}", end="")
    if csv is not None:
        _append(csv, rows)
    if markdown is not None:
        markdown.write_text(f"{_heading(plan)}\n\n{table}", encoding="utf-8")
    return rows


def _heading(plan: Plan) -> str:
    recipe = plan.recipe
    without = "" if plan.on_gpu else " (FP8 is emulated, torch.compile is off)"
    return (
        f"training {recipe.name}: {recipe.model.num_layers} layers, hidden "
        f"{recipe.model.hidden_size}, {recipe.training.micro_batch_size} sequences of "
        f"{recipe.model.seq_length} tokens a step, {plan.transformer_impl} layers{without}; "
        f"rounds: {plan.rounds}, steps in each: {plan.steps} after {plan.warmup} of warm-up"
    )


def _command(plan: Plan, variant: Variant) -> list[str]:
    model, fp8 = plan.recipe.model, variant.precision != "bf16"
    fused = plan.transformer_impl == "transformer_engine" and fp8 and variant.activation == OURS
    words = {
        "run": {
            **ACTIVATIONS[variant.activation],
            "transformer_impl": plan.transformer_impl,
            "fused": fused,
        },
        "sizes": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "ffn_hidden_size": model.ffn_hidden_size,
            "seq_length": model.seq_length,
            "global_batch_size": plan.recipe.training.micro_batch_size,
            "init_std": model.init_std,
        },
        "fp8": {
            "recipe": variant.precision if fp8 else "off",
            "format": "e4m3" if variant.precision == "blockwise" else "hybrid",
        },
        "vocab_size": model.vocab_size,
        "warmup": plan.warmup,
        "steps": plan.steps,
    }
    return [sys.executable, "-m", "megatron_xielu.bench.training_side", json.dumps(words)]


def _environment(plan: Plan) -> dict[str, str]:
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return connections if plan.on_gpu else {"CUDA_VISIBLE_DEVICES": "", **connections}


def _row(
    plan: Plan,
    variant: Variant,
    results: dict[Variant, list[dict[str, Any]]],
    problem: str | None,
) -> Row:
    mine = results[variant]
    seen = next((found[0] for found in results.values() if found), {})
    common: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        **{name: seen.get(name) for name in ("device", "driver", "torch", "transformer_engine")},
        "model": plan.recipe.name,
        "layers": plan.transformer_impl,
        **asdict(variant),
    }
    if problem is not None:
        return Row(**common, note=problem)
    model, tokens = plan.recipe.model, _tokens(plan)
    milliseconds = [1e3 * second for result in mine for second in result["seconds"]]
    p20, _, _, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
    speed = tokens / statistics.median(milliseconds) * 1e3
    peak = peak_flops(seen["device"])
    used = [result["peak_bytes"] for result in mine if result["peak_bytes"] is not None]
    pairs = list(_pairs(results, variant))
    return Row(
        **common,
        parameters=mine[0]["parameters"],
        tokens=tokens,
        p20_ms=round(p20, 3),
        p50_ms=round(statistics.median(milliseconds), 3),
        p80_ms=round(p80, 3),
        tokens_per_second=round(speed, 1),
        mfu=None if peak is None else round(flops_per_token(model) * speed / peak, 4),
        peak_gib=round(max(used) / 2**30, 5) if used else None,
        planned_gib=round(_planned(plan, variant) / 2**30, 5),
        ratio_to_xielu=round(statistics.median(pairs), 4) if pairs else None,
        loss=round(statistics.fmean(result["loss"] for result in mine), 4),
    )


def _pairs(results: dict[Variant, list[dict[str, Any]]], variant: Variant) -> Iterator[float]:
    """Tokens per second relative to xIELU's, round by round."""
    ours = results.get(Variant(OURS, variant.precision), [])
    for mine, its in zip(results[variant], ours, strict=False):
        yield statistics.median(its["seconds"]) / statistics.median(mine["seconds"])


def _tokens(plan: Plan) -> int:
    return plan.recipe.training.micro_batch_size * plan.recipe.model.seq_length


def _planned(plan: Plan, variant: Variant) -> float:
    """Bytes by the planner."""
    recipe, activation = plan.recipe, ACTIVATIONS[variant.activation]["activation"]
    ffn = recipe.model.ffn_hidden_size
    # as wide as `mcore.one_rank` builds it
    gated_or_not = ffn * 2 // 3 if activation == "swiglu" else ffn
    model = replace(recipe.model, activation=activation, ffn_hidden_size=gated_or_not)
    recipe = replace(recipe, model=model)
    if variant.precision != "bf16" and plan.transformer_impl == "transformer_engine":
        fused = variant.activation == OURS
        fp8 = replace(recipe.fp8, recipe=variant.precision, fused=fused)  # type: ignore[arg-type]
        recipe = replace(recipe, fp8=fp8)
    return estimate_memory(recipe, 1).total


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [
        "| activation | precision | ms a step (20-80 %) | tokens/s | MFU | peak GiB | planned GiB "
        "| tokens/s to xIELU's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.p50_ms is None:
            lines.append(f"| {row.activation} | {row.precision} | {row.note} | | | | | |")
            continue
        cells = [
            f"{row.p50_ms:.1f} ({row.p20_ms:.1f}-{row.p80_ms:.1f})",
            f"{row.tokens_per_second:,.0f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            "" if row.peak_gib is None else f"{row.peak_gib:.3g}",
            f"{row.planned_gib:.3g}",
            "" if row.ratio_to_xielu is None else f"{row.ratio_to_xielu:.3f}",
        ]
        lines.append(f"| {row.activation} | {row.precision} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _append(path: Path, rows: Iterable[Row]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv_files.DictWriter(file, _columns(), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _columns() -> list[str]:
    return [column.name for column in fields(Row)]
