"""What of a recipe's FP8 may change between two starts of a run, and by which word."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import diff, load_recipe
from megatron_xielu.training import run_dir
from megatron_xielu.training.changes import check_changes, megatron_names

FOLDER = Path("runs/a")
IN_RESULT = {
    "fp8.recipe": "blockwise",
    "fp8.format": "e4m3",
    "fp8.param_gather": "true",
    "fp8.bf16_layers_at_start": "1",
    "fp8.bf16_layers_at_end": "2",
    "fp8.amax_history_len": "16",
    "fp8.amax_compute_algo": "most_recent",
    "fp8.fc2_input": "bf16",
    "fp8.emulate": "true",
}


@pytest.mark.parametrize(("key", "value"), IN_RESULT.items())
def test_what_changes_the_result_is_asked_for(key: str, value: str) -> None:
    before = load_recipe("tiny", ["fp8.recipe=tensorwise"])
    changes = diff(before, load_recipe("tiny", ["fp8.recipe=tensorwise", f"{key}={value}"]))
    assert len(changes) == 1
    with pytest.raises(UserError) as caught:
        check_changes(changes, FOLDER, [])
    assert f"  {changes[0]}  (--allow-changed {key})" in str(caught.value).splitlines()
    check_changes(changes, FOLDER, [key])


def test_another_gradient_is_asked_for() -> None:
    changes = diff(load_recipe("tiny"), load_recipe("tiny", ["xielu.saved_input=e4m3"]))
    with pytest.raises(UserError, match=r"--allow-changed xielu\.saved_input"):
        check_changes(changes, FOLDER, [])


def test_another_scaling_of_rope_is_asked_for() -> None:
    changes = diff(load_recipe("tiny"), load_recipe("tiny", ["model.rope_scaling_factor=8"]))
    with pytest.raises(UserError, match=r"--allow-changed model\.rope_scaling_factor"):
        check_changes(changes, FOLDER, [])
    assert megatron_names(["model.rope_scaling_factor"]) == {
        "use_rope_scaling",
        "rope_scaling_factor",
    }


def test_to_bf16_and_back_is_one_key() -> None:
    on = ["fp8.recipe=tensorwise", "fp8.fc2_input=bf16", "fp8.bf16_layers_at_start=1"]
    fp8 = load_recipe("tiny", on)
    bf16 = load_recipe("tiny", [*on, "fp8.recipe=off"])
    assert diff(fp8, bf16) == ["fp8.recipe: 'tensorwise' -> 'off'"]
    for changes in (diff(fp8, bf16), diff(bf16, fp8)):
        check_changes(changes, FOLDER, ["fp8.recipe"])


def test_every_key_is_decided() -> None:
    given = load_recipe("tiny")
    others = {f"fp8.{key}" for key in vars(given.fp8)} - set(IN_RESULT)
    watch = {"watch_interval", "on_outlier", "max_saturated", "max_flushed", "max_kurtosis"}
    assert others == {"fp8.fused", *(f"fp8.{key}" for key in watch)}
    check_changes(diff(given, load_recipe("tiny", ["fp8.fused=false"])), FOLDER, [])


KEPT = '[{"layer": 3, "step": 20}, {"layer": 5, "step": 30}]'


@pytest.mark.parametrize(
    ("step", "overrides"),
    [(19, []), (30, ["fp8.fused=true"]), (30, ["fp8.emulate=true"]), (30, ["fp8.recipe=off"])],
)
def test_layers_in_bf16_go_on_where_they_can(
    tmp_path: Path, step: int, overrides: list[str]
) -> None:
    record = tmp_path / run_dir.BF16_LAYERS
    record.write_text(KEPT)
    recipe = load_recipe("tiny", ["fp8.recipe=tensorwise", "fp8.fused=false", *overrides])
    run_dir._check_bf16_layers(record, recipe, step)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"layer": 3, "step": 0}]', r"fc2 left FP8 in layer 3 .*fp8\.fused=true, or remove"),
        ('[{"layer": 3', r"fp8_bf16_layers\.json cannot be read \(JSONDecodeError"),
    ],
)
def test_layers_in_bf16_cannot_go_on_in_plain_modules(
    tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / run_dir.BF16_LAYERS).write_text(content)
    recipe = load_recipe("tiny", ["fp8.recipe=tensorwise", "fp8.fused=false"])
    with pytest.raises(UserError, match=told):
        run_dir.claim(tmp_path, recipe, progress=str)
