"""The layout matrix: real gloo ranks agree, and known faults planted into them are found."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_xielu.mcore.layouts import compare, grid
from megatron_xielu.mcore.layouts.compare import Distance, Step
from megatron_xielu.mcore.layouts.grid import AXES, FAULTS, MODELS, Case, Layout, Model
from tests.ranks import environment

DENSE, MOE = MODELS[0], Model("MoE", experts=True)


def doctor(*arguments: str, gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """`megatron-xielu doctor --layouts`, as a user would run it."""
    env = environment()
    if gpu:
        del env["CUDA_VISIBLE_DEVICES"]
    return subprocess.run(
        [sys.executable, "-m", "megatron_xielu", "doctor", "--layouts", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=840,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_covering_choice_of_layouts_agrees(tmp_path: Path) -> None:
    run = doctor("--quick", "--csv", str(tmp_path / "rows.csv"))
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["model"] for row in rows} == {model.name for model in MODELS}
    for axis, values in AXES.items():
        assert {row[axis] for row in rows} == {str(int(value)) for value in values}, axis
    # the runs are no copies of one another: sums were taken in other orders
    assert any(float(row["parameters"]) > 0 for row in rows)
    assert all(row["agrees"] == "1" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_layout_agrees(model: Model, tmp_path: Path) -> None:
    run = doctor("--model", model.name, "--csv", str(tmp_path / "rows.csv"))
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {row_key(row) for row in rows_of(tmp_path / "rows.csv")}
    assert found == {case_key(case) for case in grid.full(4) if case.model == model}


def row_key(row: dict[str, str]) -> tuple[str, ...]:
    return row["model"], *(row[axis] for axis in AXES)


def case_key(case: Case) -> tuple[str, ...]:
    return case.model.name, *(str(int(getattr(case.layout, axis))) for axis in AXES)


# tests/mcore/test_parallel.py leaves the sum out too, in `pretrain`
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=[] if name == "expert-average" else pytest.mark.slow)
        for name in FAULTS
    ],
)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    run = doctor("--nproc", "2", "--fault", fault, "--csv", str(tmp_path / "rows.csv"))
    print(run.stdout)
    assert run.returncode == 1, run.stdout + run.stderr
    rows = rows_of(tmp_path / "rows.csv")
    planted = [row for row in rows if int(row["tp"]) * int(row["pp"]) * int(row["dp"]) > 1]
    assert planted
    for row in planted:
        assert row["agrees"] == "0", row
        # far outside, so that no bound's size decides it
        worst = max(float(row[name]) / float(row[f"{name}_bound"]) for name in compare.NUMBERS)
        assert worst > 10, row
    assert f"{len(planted)} of {len(rows)} layouts disagree with one rank" in run.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_layouts_agree_on_gpus_with_nccl(tmp_path: Path) -> None:
    nproc = min(4, torch.cuda.device_count())
    if nproc < 2:
        pytest.skip("needs two GPUs")
    run = doctor("--quick", "--nproc", str(nproc), gpu=True)
    print(run.stdout)
    assert "(nccl)" in run.stdout
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("layout", "model", "reason"),
    [
        (Layout(tp=4, dp=2), DENSE, "more than 4 ranks"),
        (Layout(vpp=2), DENSE, "virtual pipeline chunks without"),
        (Layout(sp=True), DENSE, "sequence parallelism without"),
        (Layout(overlap=True), DENSE, "nothing to overlap"),
        (Layout(dp=2, ep=2), DENSE, "expert parallelism without experts"),
        (Layout(ep=2), MOE, "do not divide"),
        (Layout(dp=2, ep=2, etp=2), MOE, "do not divide"),
        (Layout(tp=2, dp=2, sp=True, ep=2, etp=2), MOE, "gathers unequal numbers of tokens"),
        (Layout(tp=2), MOE, "refuses experts under TP without SP"),
        (Layout(pp=2, vpp=2), Model("hybrid", kind="hybrid"), "knows no virtual pipeline"),
        (Layout(tp=2, sp=True), Model("MTP", mtp=True), "refuse SP without TransformerEngine"),
        (Layout(bf16=True), DENSE, "plain optimizer cannot save"),
        (Layout(bf16=True, distributed=True), MOE, "sends tokens to other experts"),
    ],
    ids=str,
)
def test_each_illegal_combination_has_its_reason(layout: Layout, model: Model, reason: str) -> None:
    why = grid.why_not(layout, model, 4)
    assert why is not None
    assert reason in why
    assert layout not in grid.legal(model, 4)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(), DENSE),
        (Layout(tp=2, pp=2, vpp=2, sp=True, distributed=True, bf16=True), DENSE),
        (Layout(tp=4, sp=True), DENSE),
        (Layout(dp=2, distributed=True, overlap=True, bf16=True), DENSE),
        (Layout(dp=2, ep=2), MOE),
        (Layout(tp=2, dp=2, sp=True, etp=2), MOE),
    ],
    ids=str,
)
def test_legal_layouts_are_in_the_matrix(layout: Layout, model: Model) -> None:
    assert grid.why_not(layout, model, 4) is None
    assert layout in grid.legal(model, 4)


def test_the_matrix_names_each_layout_once() -> None:
    names = [str(case) for case in grid.full(4)]
    assert len(names) == len(set(names))
    assert all(case.layout.world_size <= 2 for case in grid.full(2))


def test_quick_covers_what_fewer_ranks_allow() -> None:
    cases = grid.quick(2)
    assert {case.model for case in cases} == set(MODELS)
    assert {case.layout.tp for case in cases} == {1, 2}
    assert {case.layout.vpp for case in cases} == {1, 2}
    assert len(cases) < len(grid.full(2)) / 5


def steps(*losses: float) -> Sequence[Step]:
    return [Step(loss, 1.0) for loss in losses]


def test_differences_are_in_eps_of_the_reference() -> None:
    eps = torch.finfo(torch.float32).eps
    assert compare.of_steps(steps(2.0, 4.0 + 8 * eps), steps(2.0, 4.0)).loss == 2
    moment = "optimizer.state.exp_avg.w"
    alpha = "decoder.layers.mlp.activation_func.alpha_p"
    reference = {"w": torch.tensor([1.0, 4.0]), moment: torch.tensor([0.5]), alpha: torch.ones(2)}
    pieces = [
        ("w", (slice(0, 1),), torch.tensor([1.0 + 8 * eps])),
        (moment, (slice(0, 1),), torch.tensor([0.5 + 2 * eps])),
        (alpha, (slice(1, 2),), torch.tensor([1 + 3 * eps])),
    ]
    found = compare.of_tensors(pieces, reference)
    assert found == Distance(parameters=2, moments=4, alphas=3)
    assert sorted(compare.differing(pieces, reference)) == sorted(reference)
    assert not list(compare.differing([("w", (), reference["w"])], reference))


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    found = compare.of_steps(steps(math.nan), steps(1.0))
    assert not found.within(Distance(math.inf, math.inf, math.inf, math.inf, math.inf))
    assert math.isnan(Distance.largest([Distance(loss=1.0), found]).loss)


def test_the_bound_grows_with_the_roundings() -> None:
    bound = compare.round_off(num_layers=4, steps=4, elements=50_000)
    # sqrt(1/6) * sqrt(24 * 4 * 4) * sqrt(2 ln 50000)
    assert bound.loss == pytest.approx(0.40825 * 19.596 * 4.6518, rel=1e-3)
    assert compare.round_off(4, 16, 50_000).loss == pytest.approx(2 * bound.loss)
