"""`bench --training` on a small model without a GPU, through the code that measures a GPU."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_xielu import cli
from megatron_xielu.analysis.planner import estimate_memory
from megatron_xielu.bench import training
from megatron_xielu.bench.training import Row, Variant, plan_of
from megatron_xielu.errors import UserError
from megatron_xielu.training.transformer_engine import Found, probe
from tests.ranks import ROOT

GIB = 2**30
NOTHING = Found(None, "No module named 'transformer_engine'", "13.0", ())
H100 = Found("2.20.2", None, "13.0", (("NVIDIA H100 80GB HBM3", 9, 0),), (85 * 10**9,))
A100 = replace(H100, gpus=(("NVIDIA A100-SXM4-40GB", 8, 0),), memory=(42 * 10**9,))
MEASURED = (
    Variant("xielu", "bf16"),
    Variant("xielu, torch.compile", "bf16"),
    Variant("relu2", "bf16"),
    Variant("xielu", "delayed"),
    Variant("swiglu", "delayed"),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    folder = tmp_path_factory.mktemp("bench")
    plan = replace(plan_of(NOTHING, tiny=True), variants=MEASURED, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        rows = training.measure_all(plan, csv=folder / "rows.csv", markdown=folder / "table.md")
    return rows, folder


def test_every_variant_trains(measured: tuple[list[Row], Path]) -> None:
    rows, _ = measured
    assert [(row.activation, row.precision) for row in rows] == [
        (variant.activation, variant.precision) for variant in MEASURED
    ]
    for row in rows:
        print(row)
        assert row.note == ""
        assert row.device == "cpu"
        # the ideal guess of 512 tokens, and a few steps on one batch
        assert 5 < row.loss < 6.4
        assert row.tokens_per_second == pytest.approx(256e3 / row.p50_ms, rel=1e-3)
        # no GPU has been seen: nothing to compare with
        assert row.mfu is None
        assert row.peak_gib is None
        assert row.planned_gib > 0
    parameters = {row.activation: row.parameters for row in rows}
    assert parameters["swiglu"] == parameters["relu2"] == parameters["xielu"] - 4


def test_ratios_are_to_xielu_in_the_same_precision(measured: tuple[list[Row], Path]) -> None:
    rows, _ = measured
    for row in rows:
        (ours,) = (
            its for its in rows if (its.activation, its.precision) == ("xielu", row.precision)
        )
        # one round, whose median step is that of all
        assert row.ratio_to_xielu == pytest.approx(ours.p50_ms / row.p50_ms, rel=1e-3)


def test_rows_and_table_are_written(measured: tuple[list[Row], Path]) -> None:
    rows, folder = measured
    with (folder / "rows.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["activation"] for row in written] == [row.activation for row in rows]
    assert [float(row["p50_ms"]) for row in written] == [row.p50_ms for row in rows]
    # of the same form: more rows go below
    training.check_writable(folder / "rows.csv", folder / "table.md")
    table = (folder / "table.md").read_text()
    assert "FP8 is emulated, torch.compile is off" in table
    assert len(re.findall(r"^\| (?:xielu|swiglu|relu2)", table, re.MULTILINE)) == len(rows)


def test_a_variant_that_cannot_train_is_a_row_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = plan_of(NOTHING, tiny=True)
    # 64 channels are not 7 heads
    model = replace(plan.recipe.model, num_attention_heads=7)
    plan = replace(plan, recipe=replace(plan.recipe, model=model), variants=MEASURED[:1])
    (row,) = training.measure_all(plan)
    assert re.match(r"ended by exit code 1: RuntimeError: \w+", row.note), row.note
    assert row.p50_ms is None
    assert row.note in training.as_markdown([row])


def test_a_gpu_gets_the_1_1b_model_and_what_it_can_compute() -> None:
    plan = plan_of(H100, tiny=False)
    assert plan.recipe.name == "llama-1.1b-xielu"
    assert plan.transformer_impl == "transformer_engine"
    assert [str(variant) for variant in plan.variants] == [
        f"{activation}, {precision}"
        for precision in ("bf16", "delayed", "tensorwise", "blockwise")
        for activation in ("xielu", "xielu, torch.compile", "swiglu", "relu2")
    ]
    size = plan.recipe.training.micro_batch_size
    assert estimate_memory(plan.recipe, 1).total <= 0.85 * H100.memory[0]
    larger = replace(
        plan.recipe,
        training=replace(
            plan.recipe.training, micro_batch_size=size + 1, global_batch_size=size + 1
        ),
    )
    assert size == 5 or estimate_memory(larger, 1).total > 0.85 * H100.memory[0]
    # an older CUDA has no blockwise scaling, and an A100 no FP8
    assert "blockwise" not in {
        v.precision for v in plan_of(replace(H100, cuda="12.8"), tiny=False).variants
    }
    assert {v.precision for v in plan_of(A100, tiny=False).variants} == {"bf16"}
    without = plan_of(replace(H100, version=None, error="x"), tiny=False)
    assert without.transformer_impl == "local"
    assert {variant.precision for variant in without.variants} == {"bf16"}


def test_a_gpu_that_is_too_small_is_refused_with_the_figures() -> None:
    with pytest.raises(UserError, match=r"needs \d+ GiB for one sequence.*has 15; --tiny"):
        plan_of(replace(H100, memory=(16 * 10**9,)), tiny=False)


@pytest.mark.parametrize(("number", "first"), [(0, 0), (1, 5), (2, 10)])
def test_another_variant_is_first_in_every_round(
    number: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan_of(H100, tiny=False), rounds=3)
    seen: list[str] = []

    def ran(command: list[str], *_: object) -> training.isolated.Ended:
        seen.append(command[-1])
        return training.isolated.Ended(
            '{"seconds": [1.0, 2.0], "peak_bytes": 1, "parameters": 1, "loss": 1.0, '
            '"device": "NVIDIA H100 80GB HBM3", "driver": "1", "torch": "2", '
            '"transformer_engine": "2.20.2"}',
            None,
        )

    monkeypatch.setattr(training.isolated, "run", ran)
    rows = training.measure_all(plan)
    count = len(plan.variants)
    assert seen[number * count] == training._command(plan, plan.variants[first])[-1]
    tokens = plan.recipe.training.micro_batch_size * 4096
    # 7.7007 GFLOPs a token (the planner's, by hand in its tests) of 989.4 TFLOP/s, in 1.5 s a step
    assert rows[0].mfu == pytest.approx(7_700_742_144 * tokens / 1.5 / 989.4e12, abs=1e-4)
    # FP8 needs less of a plan, and the operations of the fuser less than modules
    planned = {(row.activation, row.precision): row.planned_gib for row in rows}
    assert (
        planned["xielu", "tensorwise"] < planned["swiglu", "tensorwise"] < planned["swiglu", "bf16"]
    )


def test_files_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"has the columns a,b instead of date,version,.*new file"):
        training.check_writable(other, None)
    with pytest.raises(UserError, match=r"--markdown .*missing.* cannot be written"):
        training.check_writable(None, tmp_path / "missing" / "table.md")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training"], "bench --training measures a GPU, and there is none.*--tiny"),
        (["--tiny"], "--tiny means nothing with --cpu; it belongs to --training"),
        (["--accuracy", "--markdown", "x"], "--markdown means nothing with --accuracy"),
    ],
)
def test_what_the_command_refuses(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_xielu.doctor.machine.probe", lambda: NOTHING)
    assert cli.main(["bench", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.gpu
def test_every_variant_trains_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    rows = training.measure_all(plan_of(probe(), tiny=True))
    for row in rows:
        print(row)
        assert row.note == ""
        assert row.peak_gib is not None
