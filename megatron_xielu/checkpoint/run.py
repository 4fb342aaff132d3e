"""A run folder as the converter sees it: which step, which recipe, which tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.architecture import (
    LLAMA,
    MEGATRON_ROPE_SCALING_FACTOR,
    Architecture,
    scales_rope,
)
from megatron_xielu.checkpoint.store import LATEST, Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, head_dim, load_recipe, num_query_groups
from megatron_xielu.unpickle import Opaque

_RECIPE = "recipe.yaml"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class RunCheckpoint:
    """One saved step of one run."""

    run_dir: Path
    """Holds the run's metrics, and its recipe as it is now."""
    path: Path
    """The iter_ folder, or `release` for weights alone."""
    iteration: int
    """0 for weights alone."""
    recipe: Recipe | None
    """Of this step: a run may go on with another one. None for a checkpoint of plain Megatron,
    beside which no recipe.yaml lies."""
    tokenizer: Path | None
    """The tokenizer folder of the run's data, if it is on this machine."""


def open_run(path: Path) -> RunCheckpoint:
    """Finds the step, recipe and tokenizer behind a run, checkpoints or iter_ folder.

    An iter_ folder (or `release`) means that step, the others mean the latest one.

    Raises:
        UserError: nothing is saved there yet.
    """
    path = Path(path).absolute()
    step = path if re.fullmatch(r"iter_\d+|release", path.name) else _latest_step(path)
    if not step.is_dir():
        raise UserError(f"{step} does not exist{_saved_steps(step.parent)}.")
    recipe = _recipe(step)
    return RunCheckpoint(
        run_dir=_run_dir(step),
        path=step,
        iteration=0 if step.name == "release" else int(step.name.removeprefix("iter_")),
        recipe=recipe,
        tokenizer=_tokenizer(step),
    )


def open_recipe(path: Path) -> tuple[RunCheckpoint, Recipe]:
    """A run that must have its recipe; see `open_run`.

    Raises:
        UserError: as `open_run`, or no recipe.yaml lies beside the step.
    """
    run = open_run(path)
    if run.recipe is None:
        raise UserError(f"No {_RECIPE} beside {run.path}. Copy the run's into {run.run_dir}.")
    return run, run.recipe


def architecture_of(
    run: RunCheckpoint,
    reader: TorchDistReader,
    *,
    vocab_size: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Architecture:
    """The architecture of a saved step: by its recipe, else by the arguments that Megatron saved.

    Args:
        vocab_size: without padding, for where neither the recipe nor the arguments say it.
        given: Megatron's arguments that the checkpoint lacks, by their names in it.

    Raises:
        UserError: the recipe is not this checkpoint's, or arguments are missing or describe no
            Llama.
    """
    if run.recipe is not None:
        if given:
            raise UserError(
                f"--arg {next(iter(given))} means nothing: the {_RECIPE} of {run.path} describes "
                f"the model."
            )
        check_arguments(reader, run.recipe)
        size = known_vocab_size(run, reader) or vocab_size
        if size is None:
            raise UserError(
                f"The vocabulary's size is unknown: the {_RECIPE} of {run.path} leaves "
                f"model.vocab_size open and the run's tokenizer is not here. Give the tokenizer's "
                f"folder."
            )
        return Architecture.of_recipe(run.recipe, size)
    args, given = arguments_of(reader), given or {}
    try:
        _check_rope_scaling(args, given)
        return Architecture.of_arguments(
            {**args, **given},
            has_alphas=any(map(_is_alpha, reader.keys())),
            vocab_size=vocab_size,
        )
    except UserError as error:
        raise UserError(f"{run.path} (no {_RECIPE} lies beside it): {error}") from error


def _check_rope_scaling(args: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UserError where nobody knows by which factor a model's RoPE was scaled.

    Megatron saves what it was told, and its own models compute with its default all the same.
    """
    factor = args.get("rope_scaling_factor", MEGATRON_ROPE_SCALING_FACTOR)
    known = "rope_scaling_factor" in given or factor == MEGATRON_ROPE_SCALING_FACTOR
    if known or not scales_rope({**args, **given}):
        return
    raise UserError(
        f"Its arguments say rope_scaling_factor={factor}, which Megatron-Core 0.19 hands on to no "
        f"model. Give --arg rope_scaling_factor={MEGATRON_ROPE_SCALING_FACTOR:g} if Megatron's own "
        f"scripts trained it, and --arg rope_scaling_factor={factor:g} if a program did that hands "
        f"it on, as `megatron-xielu pretrain` does."
    )


def known_vocab_size(
    run: RunCheckpoint, reader: TorchDistReader, given: Mapping[str, Any] | None = None
) -> int | None:
    """The vocabulary without padding: by the recipe, else by the arguments; None if none says it.

    Args:
        given: see `architecture_of`.
    """
    by_recipe = run.recipe.model.vocab_size if run.recipe is not None else None
    size: int | None = by_recipe or {**arguments_of(reader), **(given or {})}.get("vocab_size")
    return size


def _is_alpha(key: str) -> bool:
    return ".activation_func.alpha_" in key


def arguments_of(reader: TorchDistReader) -> dict[str, Any]:
    """The arguments that Megatron saved, by name; empty if there are none."""
    args = reader.common_state().get("args")
    return {} if args is None else dict(vars(args))


def check_arguments(
    reader: TorchDistReader, recipe: Recipe, *, overridden: Collection[str] = ()
) -> None:
    """Raises UserError where the arguments saved in the checkpoint contradict the recipe.

    Names in `overridden` are the user's own affair: a flag of Megatron's set them.

    Weights do not show a wrong rope_theta or norm_epsilon: a recipe edited after the run would
    become a model that loads everywhere and talks nonsense.
    """
    args = reader.common_state().get("args")
    if args is None:
        return
    wrong = [
        f"  {name}: {saved!r} in the checkpoint, {expected!r} by the recipe"
        for name, expected in _expected_arguments(recipe, args).items()
        if name not in overridden
        and not isinstance(saved := getattr(args, name, expected), Opaque)
        and saved != expected
    ]
    if wrong:
        raise UserError(
            f"{reader.path} was trained as another model than the recipe describes:\n"
            + "\n".join(wrong)
            + f"\nRestore the {_RECIPE} that the run wrote. What a recipe has no field for cannot "
            f"be exported."
        )


def _expected_arguments(recipe: Recipe, args: Any) -> dict[str, Any]:
    """Megatron's names and values for what decides the model's function and no shape shows."""
    model = recipe.model
    expected = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": head_dim(model),
        "layernorm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "rotary_base": model.rope_theta,
        "use_rope_scaling": model.rope_scaling_factor is not None,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "swiglu": model.activation == "swiglu",
        "squared_relu": model.activation == "relu2",
        **{name: value for name, (value, _) in LLAMA.items()},
    }
    # without scaling the saved factor is an unused default
    if model.rope_scaling_factor is not None:
        expected["rope_scaling_factor"] = model.rope_scaling_factor
    # without grouped queries the saved value is an unused default
    if getattr(args, "group_query_attention", False):
        expected["num_query_groups"] = num_query_groups(model)
    return expected


def _latest_step(path: Path) -> Path:
    folder = next((f for f in (path / _CHECKPOINTS, path) if (f / LATEST).is_file()), None)
    if folder is None:
        raise UserError(
            f"{path} has no checkpoint yet: neither it nor its checkpoints/ holds {LATEST}. Give "
            f"a run folder after its first save, or an iter_ folder."
        )
    store = Store(folder)
    return store.path(store.latest())


def _saved_steps(folder: Path) -> str:
    store = Store(folder)
    names = [store.path(step).name for step in store.steps()]
    return f"; saved there: {', '.join(names)}" if names else "; nothing is saved there"


def _run_dir(step: Path) -> Path:
    return step.parent.parent if step.parent.name == _CHECKPOINTS else step.parent


def _recipe(step: Path) -> Recipe | None:
    # a step keeps the recipe it was trained by; steps of older versions have the run's alone
    file = next(_recipe_files(step), None)
    return load_recipe(str(file)) if file is not None else None


def _recipe_files(step: Path) -> Iterator[Path]:
    files = (folder / _RECIPE for folder in (step, step.parent.parent, step.parent))
    return (file for file in files if file.is_file())


def _tokenizer(step: Path) -> Path | None:
    # the run's recipe knows the data that weights from elsewhere are trained on, or where they are
    # now
    for file in _recipe_files(step):
        path = load_recipe(str(file)).data.path
        if path is not None and (folder := Path(path) / "tokenizer").is_dir():
            return folder
    return None
