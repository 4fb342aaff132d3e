from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_layouts import recipe_of

from megatron_xielu.checkpoint.run import (
    _expected_arguments,
    architecture_of,
    check_arguments,
    open_recipe,
    open_run,
)
from megatron_xielu.checkpoint.store import LATEST
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, to_yaml
from megatron_xielu.recipes.schema import Data


def test_run_checkpoints_and_step_folder_are_one_thing(runs: dict[str, Path]) -> None:
    run = runs["gqa"]
    step = run / "checkpoints" / "iter_0000200"
    opened = [open_run(path) for path in (run, run / "checkpoints", step)]
    assert opened[0] == opened[1] == opened[2]
    assert (opened[0].path, opened[0].iteration) == (step, 200)
    assert opened[0].recipe == recipe_of("gqa")
    assert opened[0].tokenizer is None


def test_latest_step_by_the_tracker_and_any_by_name(copy_run: Callable[[str], Path]) -> None:
    folder = copy_run("gqa") / "checkpoints"
    shutil.copytree(folder / "iter_0000200", folder / "iter_0000400")
    assert open_run(folder.parent).iteration == 200
    assert open_run(folder / "iter_0000400").iteration == 400


def test_a_step_is_of_its_own_recipe_and_not_of_what_the_run_goes_on_with(
    copy_run: Callable[[str], Path],
) -> None:
    run = copy_run("gqa")
    step = run / "checkpoints" / "iter_0000200"
    shutil.copy(run / "recipe.yaml", step)
    (run / "recipe.yaml").write_text(to_yaml(with_model(rope_theta=1e6, seq_length=64)))
    opened = open_run(run)
    arch = architecture_of(opened, TorchDistReader(step))
    assert (arch.rope_theta, arch.seq_length) == (5000.0, 32)
    # what lies beside the steps is the run's
    assert opened.run_dir == run
    (run / "recipe.yaml").unlink()
    assert open_run(step) == opened


def test_tokenizer_of_the_runs_data(
    copy_run: Callable[[str], Path], tokenizer: Path, tmp_path: Path
) -> None:
    run = copy_run("gqa")
    data = tmp_path / "data"
    shutil.copytree(tokenizer, data / "tokenizer")
    recipe = replace(recipe_of("gqa"), data=Data(path=str(data)))
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    assert open_run(run).tokenizer == data / "tokenizer"
    shutil.rmtree(data)
    assert open_run(run).tokenizer is None


def test_nothing_saved_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint yet: neither it nor its checkpoints/"):
        open_run(tmp_path)


def test_tracker_without_its_step(copy_run: Callable[[str], Path]) -> None:
    folder = copy_run("gqa") / "checkpoints"
    tracker = folder / LATEST
    tracker.write_text("300")
    with pytest.raises(UserError, match=r"iter_0000300 does not exist; saved there: iter_0000200"):
        open_run(folder)
    tracker.write_text("release")
    with pytest.raises(UserError, match=r"says 'release' instead of a step number"):
        open_run(folder)


def test_no_recipe(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")
    (run / "recipe.yaml").unlink()
    opened = open_run(run)
    assert (opened.recipe, opened.iteration) == (None, 200)
    with pytest.raises(UserError, match=r"No recipe\.yaml beside .*iter_0000200"):
        open_recipe(run)


def test_arguments_may_be_given_only_where_no_recipe_says_them(runs: dict[str, Path]) -> None:
    run = open_run(runs["gqa"])
    with pytest.raises(UserError, match=r"--arg rotary_base means nothing: .*recipe\.yaml"):
        architecture_of(run, TorchDistReader(run.path), given={"rotary_base": 1})
    plain = replace(run, recipe=None)
    arch = architecture_of(plain, TorchDistReader(run.path), given={"rotary_base": 1})
    assert arch.rope_theta == 1.0


def test_the_factor_of_scaled_rope_is_asked_for_where_megatron_may_have_dropped_it(
    runs: dict[str, Path],
) -> None:
    run = replace(open_run(runs["apertus-scaled"]), recipe=None)
    reader = TorchDistReader(run.path)
    with pytest.raises(UserError) as error:
        architecture_of(run, reader)
    message = str(error.value)
    assert "iter_0000200 (no recipe.yaml lies beside it): Its arguments say" in message
    assert "rope_scaling_factor=4.0, which Megatron-Core 0.19 hands on to no model" in message
    assert "--arg rope_scaling_factor=8 if Megatron's own scripts trained it" in message
    assert "--arg rope_scaling_factor=4 if a program did that hands it on" in message
    for factor in (8, 4):
        arch = architecture_of(run, reader, given={"rope_scaling_factor": factor})
        assert arch.rope_scaling_factor == factor
    # nothing to ask without scaling
    assert (
        architecture_of(run, reader, given={"use_rope_scaling": False}).rope_scaling_factor is None
    )


def with_model(**change: object) -> Recipe:
    recipe = recipe_of("gqa")
    return replace(recipe, model=replace(recipe.model, **change))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rope_theta": 10_000.0}, r"rotary_base: 5000 in the checkpoint, 10000\.0 by the recipe"),
        ({"norm_epsilon": 1e-6}, r"layernorm_epsilon: 1e-05 in the checkpoint, 1e-06"),
        ({"num_query_groups": 4}, r"num_query_groups: 2 in the checkpoint, 4"),
    ],
)
def test_an_edited_recipe_is_caught(
    runs: dict[str, Path], change: dict[str, object], line: str
) -> None:
    reader = TorchDistReader(runs["gqa"] / "checkpoints" / "iter_0000200")
    check_arguments(reader, recipe_of("gqa"))
    with pytest.raises(UserError, match=line):
        check_arguments(reader, with_model(**change))


def test_every_checked_argument_is_one_of_megatrons(runs: dict[str, Path]) -> None:
    # a renamed argument would otherwise pass unchecked
    for layout in ("gqa", "mha-tied-pp2"):
        reader = TorchDistReader(runs[layout] / "checkpoints" / "iter_0000200")
        args = reader.common_state()["args"]
        names = _expected_arguments(recipe_of(layout), args)
        assert not [name for name in names if not hasattr(args, name)]
