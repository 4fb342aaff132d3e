"""The picture of runs: what the panels hold, and what a user is told when there is none."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_xielu.analysis.plot import draw, plot_runs
from megatron_xielu.errors import UserError
from megatron_xielu.training.report import Reporter, StepMetrics

TOKENS_PER_STEP = 1_000_000


def make_run(
    run_dir: Path, *, steps: int = 200, layers: int = 3, offset: float = 0.0, nan_at: int = -1
) -> Path:
    """A run of `steps` records: the loss falls from 11 to 3, every layer's alphas drift apart."""
    reporter = Reporter(
        run_dir=run_dir,
        train_iters=steps,
        tokens_per_step=TOKENS_PER_STEP,
        flops_per_token=1e9,
        num_devices=1,
        peak_flops=None,
        out=io.StringIO(),
    )
    for step in range(1, steps + 1):
        loss = 3 + offset + 8 * math.exp(-step) + 1 / math.sqrt(step)
        drift = step / steps
        metrics = StepMetrics(
            step=step,
            loss=math.nan if step == nan_at else loss,
            grad_norm=1.0,
            lr=1e-3,
            alpha_p=tuple(0.8 + 0.1 * layer * drift for layer in range(layers)),
            alpha_n=tuple(0.8 - 0.1 * layer * drift for layer in range(layers)),
            seconds_per_step=1.0,
        )
        reporter.step(metrics)
        if step % 50 == 0:
            reporter.validation(step, loss + 0.1)
    reporter.close()
    return run_dir


def with_data(run_dir: Path, entropy: float) -> Path:
    data = run_dir.parent / "data"
    data.mkdir(exist_ok=True)
    (data / "dataset.json").write_text(json.dumps({"unigram_entropy_nats": entropy}))
    (run_dir / "recipe.yaml").write_text(f"name: test\ndata:\n  path: {data}\n")
    return run_dir


def panel(figure: Figure, label: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_label() == label)


def xy(line: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def legend(axes: Axes) -> list[str]:
    box = axes.get_legend()
    assert box is not None
    return [text.get_text() for text in box.get_texts()]


def test_the_file_is_a_png_of_readable_size(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    out = plot_runs([run], tmp_path / "new" / "loss.png")
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    print(f"{width} x {height}, {len(content)} bytes")
    assert width >= 1500
    assert height >= 800
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(("suffix", "magic"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_names_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = plot_runs([make_run(tmp_path / "run", steps=5)], tmp_path / f"loss{suffix}")
    assert out.read_bytes().startswith(magic)


def test_three_panels_hold_what_the_run_recorded(tmp_path: Path) -> None:
    figure = draw([make_run(tmp_path / "run")])
    train, valid = panel(figure, "loss").get_lines()
    tokens, loss = xy(train)
    np.testing.assert_array_equal(tokens, np.arange(1, 201) * TOKENS_PER_STEP)
    assert loss[-1] == pytest.approx(3 + 1 / math.sqrt(200))
    assert train.get_linestyle() == "-"
    assert train.get_linewidth() <= 1
    np.testing.assert_array_equal(xy(valid)[0], np.array([50, 100, 150, 200]) * TOKENS_PER_STEP)
    assert (valid.get_linestyle(), valid.get_marker()) == ("None", "o")
    assert legend(panel(figure, "loss")) == ["train", "valid"]
    for label, sign in (("a_p", 1), ("a_n", -1)):
        lines = panel(figure, label).get_lines()
        last = [xy(line)[1][-1] for line in lines]
        assert last == pytest.approx([0.8, 0.8 + sign * 0.1, 0.8 + sign * 0.2])
        assert len({line.get_color() for line in lines}) == 3


def test_axes_are_labelled_with_units(tmp_path: Path) -> None:
    figure = draw([make_run(tmp_path / "my-run")])
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "my-run"
    loss, a_p, a_n = (panel(figure, label) for label in ("loss", "a_p", "a_n"))
    assert loss.get_ylabel() == "loss (nats per token)"
    assert (a_p.get_ylabel(), a_n.get_ylabel()) == ("$a_p$", "$a_n$")
    assert loss.get_xlabel() == a_n.get_xlabel() == "tokens"
    ticks = [text.get_text() for text in loss.get_xticklabels()]
    assert ticks[1:-1] == ["0", "40M", "80M", "120M", "160M", "200M"]
    (bar,) = (axes for axes in figure.axes if "layer" in axes.get_ylabel())
    assert [text.get_text() for text in bar.get_yticklabels()][1:-1] == ["0", "1", "2"]


def test_nothing_overlaps(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{'a-long-run-name-' * 5}{index}") for index in range(4)]
    for chosen in (runs[:1], runs):
        figure = draw(chosen)
        figure.draw_without_rendering()
        print(figure.get_suptitle())
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        title = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
        for one, other in itertools.combinations([*boxes, title], 2):
            assert not one.overlaps(other)
        assert title.x0 > 0
        assert title.x1 < figure.bbox.x1


def test_the_start_of_a_long_run_does_not_flatten_the_rest(tmp_path: Path) -> None:
    low, high = panel(draw([make_run(tmp_path / "long", steps=200)]), "loss").get_ylim()
    print(f"loss from {low:.2f} to {high:.2f}")
    assert low < 3 + 1 / math.sqrt(200)
    assert 3 + 1 / math.sqrt(4) < high < 5
    _, high = panel(draw([make_run(tmp_path / "short", steps=20)]), "loss").get_ylim()
    assert high > 3 + 8 / math.e + 1, "a short run is shown whole"


def test_alphas_that_did_not_move_are_not_magnified(tmp_path: Path) -> None:
    figure = draw([make_run(tmp_path / "run", steps=1, layers=1)])
    low, high = panel(figure, "a_p").get_ylim()
    assert low < 0.8 < high
    assert high - low >= 0.02
    # a line through one point shows nothing
    assert all(line.get_marker() == "." for line in panel(figure, "a_p").get_lines())


@pytest.mark.parametrize(
    ("entropy", "label", "visible"),
    [(3.9, "unigram entropy 3.90", True), (7.31, "unigram entropy 7.31 (off scale)", False)],
)
def test_unigram_entropy_of_the_run_s_data(
    tmp_path: Path, entropy: float, label: str, visible: bool
) -> None:
    axes = panel(draw([with_data(make_run(tmp_path / "run"), entropy)]), "loss")
    assert legend(axes) == ["train", "valid", label]
    low, high = axes.get_ylim()
    assert (low < entropy < high) == visible
    axes.figure.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    line_y = axes.transData.transform((0, entropy))[1]
    assert not box.y0 <= line_y <= box.y1, "the line runs through the legend"


@pytest.mark.parametrize(
    "recipe", ["data: {path: /nowhere}", "data: {path: null}", "[]", "{", "data: 3"]
)
def test_a_run_without_its_data_is_drawn_without_the_line(tmp_path: Path, recipe: str) -> None:
    run = make_run(tmp_path / "run", steps=5)
    (run / "recipe.yaml").write_text(recipe)
    assert "unigram" not in " ".join(legend(panel(draw([run]), "loss")))


def test_several_runs_share_the_loss_panel(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", offset=0.2, layers=5)]
    figure = draw([with_data(run, 3.9) for run in runs])
    axes = panel(figure, "loss")
    assert legend(axes) == ["one", "two", "unigram entropy 3.90"]
    assert figure.get_suptitle() == "one, two"
    for train, valid in (axes.get_lines()[:2], axes.get_lines()[2:4]):
        assert train.get_color() == valid.get_color()
    first, second = panel(figure, "a_p").get_lines()
    assert xy(first)[1][-1] == pytest.approx(0.9)
    assert xy(second)[1][-1] == pytest.approx(1.0)
    bands = [
        band.get_datalim(panel(figure, "a_p").transData)
        for band in panel(figure, "a_p").collections
    ]
    assert [band.y1 for band in bands] == pytest.approx([1.0, 1.2])


def test_alphas_are_drawn_of_the_runs_that_have_them(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "swiglu", layers=0), make_run(tmp_path / "xielu")]
    figure = draw(runs)
    assert legend(panel(figure, "loss")) == ["swiglu", "xielu"]
    (mean,) = panel(figure, "a_p").get_lines()
    assert mean.get_color() == panel(figure, "loss").get_lines()[2].get_color() == "C1"
    for alone in (draw(runs[:1]), draw([runs[0], runs[0]])):
        assert [axes.get_label() for axes in alone.axes] == ["loss"]
        assert alone.axes[0].get_xlabel() == "tokens"


def test_runs_of_one_name_are_told_apart_and_names_stay_text(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=3) for name in ("a/run", "b/run")]
    names = legend(panel(draw(runs), "loss"))
    assert [name[-6:] for name in names] == ["/a/run", "/b/run"]
    odd = make_run(tmp_path / "_lr$1$", steps=3)
    figure = draw([odd, runs[0]])
    figure.draw_without_rendering()
    assert legend(panel(figure, "loss")) == [r"lr\$1\$", "run"]


def test_a_nan_is_a_gap(tmp_path: Path) -> None:
    figure = draw([make_run(tmp_path / "run", nan_at=100)])
    train = panel(figure, "loss").get_lines()[0]
    assert np.flatnonzero(np.isnan(xy(train)[1])).tolist() == [99]
    assert np.isfinite(panel(figure, "loss").get_ylim()).all()


def test_a_run_that_only_diverged_still_has_a_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, nan_at=1)
    assert plot_runs([run], tmp_path / "loss.png").stat().st_size > 0


def test_what_cannot_be_plotted_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    for runs, out, message in [
        ([], "a.png", "nothing to plot: name at least one run folder"),
        ([tmp_path / "no"], "a.png", "name a run folder that `pretrain` wrote"),
        ([run, empty], "a.png", f"{empty}/metrics.jsonl has no records"),
        ([run], "a.xyz", "a.xyz does not end in the name of an image format; use .png"),
        ([run], "a", "a does not end in the name of an image format"),
        ([run], "folder.png", "is a folder; give the name of the image file"),
    ]:
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=re.escape(message)):
            plot_runs(runs, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.png", "run"]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    out = tmp_path / "loss.png"
    out.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            plot_runs([run], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run"]
