"""Draw runs from their `metrics.jsonl`: the loss, and what the alphas of every layer did.

Nothing here touches matplotlib's global state, so that it works anywhere, display or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from megatron_xielu.errors import UserError
from megatron_xielu.training.report import METRICS_FILE, read_metrics

Array = NDArray[np.float64]

_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "font.size": 11,
    "grid.alpha": 0.3,
    # the curves may pass behind the legend, never through its text
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
}
# the start of a long run, where the loss falls from ln(vocab_size), would flatten the rest
_START_OF_RUN = 0.02
_LONG_RUN = 100
_FEW_RECORDS = 30
_MIN_ALPHA_SPAN = 0.02
_LONGEST_NAME = 40
_LONGEST_TITLE = 100
_ALPHAS = {"a_p": "$a_p$", "a_n": "$a_n$"}
_SIDES = {"a_p": "x > 0", "a_n": "x ≤ 0"}


@dataclass(frozen=True)
class Curves:
    """What the panels show of one run; all arrays are float64, NaN where the run had no number."""

    name: str
    tokens: Array
    """(records,) tokens seen."""
    loss: Array
    """(records,) training loss in nats per token."""
    valid_tokens: Array
    valid_loss: Array
    alphas: dict[str, Array]
    """{"a_p", "a_n"}: (records, layers) effective values."""
    unigram_entropy: float | None
    """Nats per token of the held-out text under the training text's token frequencies."""


def plot_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw the runs into `out`, an image of the format that its suffix names.

    Raises:
        UserError: there is nothing to plot, or `out` is not the name of an image.
    """
    figure = draw(run_dirs)
    image_format = out.suffix.removeprefix(".").lower()
    if image_format not in (known := figure.canvas.get_supported_filetypes()):
        raise UserError(
            f"{out} does not end in the name of an image format; "
            f"use .png, .pdf or .svg (known: {', '.join(sorted(known))})"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of the image file")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with rc_context(_STYLE):
            figure.savefig(temporary, format=image_format, dpi=150)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def draw(run_dirs: Sequence[Path]) -> Figure:
    """The figure of `plot_runs`: axes "loss", "a_p" and "a_n", by their labels.

    One run shows its alphas layer by layer; several show the mean over layers and the range. Where
    no run has alphas, because none has xIELU, the loss is all.

    Raises:
        UserError: no run is named, or one has no records yet.
    """
    if not run_dirs:
        raise UserError("nothing to plot: name at least one run folder")
    runs = [
        _read_curves(run_dir, name)
        for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True)
    ]
    with rc_context(_STYLE):
        figure = Figure(figsize=(13, 6.5), layout="constrained")
        panels = _panels(figure, has_alphas=any(run.alphas["a_p"].size for run in runs))
        for label, axes in panels.items():
            axes.set_label(label)
        _draw_loss(panels["loss"], runs)
        if "a_p" in panels and len(runs) == 1:
            _draw_layers(figure, panels, runs[0])
        elif "a_p" in panels:
            _draw_layer_ranges(panels, runs)
        _finish(figure, panels, [run.name for run in runs])
    return figure


def _panels(figure: Figure, *, has_alphas: bool) -> dict[str, Axes]:
    if not has_alphas:
        return figure.subplot_mosaic([["loss"]])
    return figure.subplot_mosaic(
        [["loss", "a_p"], ["loss", "a_n"]], width_ratios=[1.25, 1], sharex=True
    )


def _read_curves(run_dir: Path, name: str) -> Curves:
    path = run_dir / METRICS_FILE
    records = read_metrics(path)
    train = [record for record in records if record.get("type") == "train"]
    valid = [record for record in records if record.get("type") == "valid"]
    if not train and not valid:
        raise UserError(
            f"{path} has no records, so there is nothing to plot: "
            "wait until the run has logged its first interval"
        )
    return Curves(
        name=name,
        tokens=_column(train, "tokens"),
        loss=_column(train, "loss"),
        valid_tokens=_column(valid, "tokens"),
        valid_loss=_column(valid, "loss"),
        alphas={"a_p": _layers(train, "alpha_p"), "a_n": _layers(train, "alpha_n")},
        unigram_entropy=_unigram_entropy(run_dir),
    )


def _column(records: Iterable[dict[str, Any]], key: str) -> Array:
    # float64 makes NaN of the null that stands for a number JSON cannot express
    return np.array([record[key] for record in records], dtype=np.float64)


def _layers(records: Sequence[dict[str, Any]], key: str) -> Array:
    num_layers = len(records[0][key]) if records else 0
    return _column(records, key).reshape(len(records), num_layers)


def _unigram_entropy(run_dir: Path) -> float | None:
    """From the data folder that the run's recipe names; a run may have outlived its data."""
    try:
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        dataset = json.loads((Path(recipe["data"]["path"]) / "dataset.json").read_text("utf-8"))
        return float(dataset["unigram_entropy_nats"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names, or paths as given where folder names collide; safe to show as labels."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in run_dirs]
    # the ends of long names differ; matplotlib reads $ as mathematics and hides labels with _ first
    short = [name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}" for name in names]
    return [name.replace("$", r"\$").lstrip("_") for name in short]


def _draw_loss(axes: Axes, runs: Sequence[Curves]) -> None:
    several = len(runs) > 1
    for index, run in enumerate(runs):
        color = f"C{index}"
        label = run.name if several else "train"
        axes.plot(run.tokens, run.loss, label=label, **_line(run, color))
        axes.plot(
            run.valid_tokens,
            run.valid_loss,
            color=color if several else "C3",
            linestyle="none",
            marker="o",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=None if several else "valid",
        )
    entropies = sorted({run.unigram_entropy for run in runs if run.unigram_entropy is not None})
    low, high = _loss_limits(runs, entropies) or axes.get_ylim()
    for entropy in entropies:
        note = "" if low <= entropy <= high else " (off scale)"
        label = f"unigram entropy {entropy:.2f}{note}"
        axes.axhline(entropy, color="0.4", linestyle="--", linewidth=1, label=label)
    axes.set_ylim(low, high)
    axes.set_title("loss (line: train, dots: valid)" if several else "loss")
    axes.set_ylabel("loss (nats per token)")
    # below a reference line that runs through the upper right corner, where curves seldom are
    heights = [(entropy - low) / (high - low) for entropy in entropies]
    top = min((height for height in heights if 0.7 < height < 1), default=1.0)
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, top))


def _draw_layers(figure: Figure, panels: dict[str, Axes], run: Curves) -> None:
    num_layers = run.alphas["a_p"].shape[1]
    # viridis without its end, which is too pale on white
    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, max(1, num_layers))))
    for label, symbol in _ALPHAS.items():
        axes = panels[label]
        for layer in range(num_layers):
            axes.plot(run.tokens, run.alphas[label][:, layer], **_line(run, colors(layer)))
        axes.set_title(f"effective {symbol} of every layer ({_SIDES[label]})")
    if num_layers > 1:
        boundaries = BoundaryNorm(np.arange(num_layers + 1) - 0.5, num_layers)
        bar = figure.colorbar(
            ScalarMappable(norm=boundaries, cmap=colors),
            ax=[panels["a_p"], panels["a_n"]],
            label="layer (0 follows the embedding)",
            ticks=MaxNLocator(integer=True, nbins=12),
        )
        bar.minorticks_off()


def _draw_layer_ranges(panels: dict[str, Axes], runs: Sequence[Curves]) -> None:
    for label, symbol in _ALPHAS.items():
        axes = panels[label]
        for index, run in enumerate(runs):
            alphas, color = run.alphas[label], f"C{index}"
            if alphas.size == 0:
                continue
            axes.fill_between(
                run.tokens, alphas.min(axis=1), alphas.max(axis=1), color=color, alpha=0.15, lw=0
            )
            axes.plot(run.tokens, alphas.mean(axis=1), **_line(run, color))
        axes.set_title(f"effective {symbol}, {_SIDES[label]} (line: mean over layers, band: range)")


def _finish(figure: Figure, panels: dict[str, Axes], names: Sequence[str]) -> None:
    for label in panels.keys() & _ALPHAS.keys():
        axes = panels[label]
        axes.set_ylabel(_ALPHAS[label])
        low, high = axes.get_ylim()
        # alphas that have not moved yet would show their rounding at full height
        if high - low < _MIN_ALPHA_SPAN:
            middle = (low + high) / 2
            axes.set_ylim(middle - _MIN_ALPHA_SPAN / 2, middle + _MIN_ALPHA_SPAN / 2)
        axes.ticklabel_format(axis="y", useOffset=False)
    for label in panels.keys() - {"a_p"}:
        panels[label].set_xlabel("tokens")
        panels[label].xaxis.set_major_locator(MaxNLocator(nbins=6))
        panels[label].xaxis.set_major_formatter(FuncFormatter(lambda x, _: _token_tick(x)))
    if "a_p" in panels:
        panels["a_p"].tick_params(labelbottom=False)
    figure.suptitle(_title(names), fontsize=14, fontweight="bold")


def _title(names: Sequence[str]) -> str:
    title = ", ".join(names)
    for shown in range(len(names) - 1, 0, -1):
        if len(title) > _LONGEST_TITLE:
            title = f"{', '.join(names[:shown])} and {len(names) - shown} more"
    return title


def _loss_limits(runs: Sequence[Curves], references: Sequence[float]) -> tuple[float, float] | None:
    """The range without each long run's start, and with the references that are not far off."""
    kept = []
    for run in runs:
        tokens = np.concatenate([run.tokens, run.valid_tokens])
        loss = np.concatenate([run.loss, run.valid_loss])
        start = _START_OF_RUN * tokens.max() if len(run.loss) >= _LONG_RUN else 0
        late = loss[np.isfinite(loss) & (tokens >= start)]
        kept.append(late if late.size else loss[np.isfinite(loss)])
    values = np.concatenate(kept)
    if values.size == 0:
        return None
    low, high = float(values.min()), float(values.max())
    span = high - low
    near = [entropy for entropy in references if low - span <= entropy <= high + span]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.05 * max(high - low, 0.1)
    return low - pad, high + pad


def _line(run: Curves, color: Any) -> dict[str, Any]:
    # a line through one point is invisible, and a few points deserve to be seen
    marker = "." if len(run.tokens) <= _FEW_RECORDS else ""
    return {"color": color, "linewidth": 1.0, "marker": marker, "markersize": 3}


def _token_tick(tokens: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(tokens) >= scale:
            return f"{tokens / scale:g}{unit}"
    return f"{tokens:g}"
