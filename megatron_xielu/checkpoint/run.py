"""A run folder as the converter sees it: which step, which recipe, which tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.store import LATEST, Store
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, head_dim, load_recipe, num_query_groups
from megatron_xielu.unpickle import Opaque

_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunCheckpoint:
    """One saved step of one run."""

    run_dir: Path
    path: Path
    """The iter_ folder."""
    iteration: int
    recipe: Recipe
    tokenizer: Path | None
    """The tokenizer folder of the run's data, if it is on this machine."""


def open_run(path: Path) -> RunCheckpoint:
    """Finds the step, recipe and tokenizer behind a run, checkpoints or iter_ folder.

    An iter_ folder means that step, the others mean the latest one.

    Raises:
        UserError: nothing is saved there yet, or no recipe.yaml lies beside it.
    """
    path = Path(path).absolute()
    step = path if re.fullmatch(r"iter_\d+", path.name) else _latest_step(path)
    if not step.is_dir():
        raise UserError(f"{step} does not exist{_saved_steps(step.parent)}.")
    run_dir = _run_dir(step)
    recipe = load_recipe(str(run_dir / _RECIPE))
    return RunCheckpoint(
        run_dir=run_dir,
        path=step,
        iteration=int(step.name.removeprefix("iter_")),
        recipe=recipe,
        tokenizer=_tokenizer(recipe),
    )


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
        "squared_relu": model.activation == "relu2",
        "swiglu": model.activation == "swiglu",
        **_LLAMA,
    }
    # without scaling the saved factor is an unused default
    if model.rope_scaling_factor is not None:
        expected["rope_scaling_factor"] = model.rope_scaling_factor
    # without grouped queries the saved value is an unused default
    if getattr(args, "group_query_attention", False):
        expected["num_query_groups"] = num_query_groups(model)
    return expected


# a run may have passed any flag of Megatron's behind the recipe
_LLAMA: dict[str, Any] = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
}


def _latest_step(path: Path) -> Path:
    folder = next((f for f in (path / "checkpoints", path) if (f / LATEST).is_file()), None)
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
    folders = (step.parent.parent, step.parent, step)
    run_dir = next((folder for folder in folders if (folder / _RECIPE).is_file()), None)
    if run_dir is None:
        raise UserError(
            f"No {_RECIPE} beside {step} (looked in {', '.join(map(str, folders))}): the model's "
            f"sizes and rope_theta come from it. Copy the run's {_RECIPE} into {folders[0]}."
        )
    return run_dir


def _tokenizer(recipe: Recipe) -> Path | None:
    if recipe.data.path is None:
        return None
    folder = Path(recipe.data.path) / "tokenizer"
    return folder if folder.is_dir() else None
