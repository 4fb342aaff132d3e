"""Load an optimizer's state where experts have an optimizer of their own now and had none before.

Megatron gives experts that are spread over ranks a second optimizer (`ChainedOptimizer`) and saves
each optimizer's parameter groups under its number; with one optimizer there is no number. Moments
are saved by parameter and land anywhere, but a checkpoint of the one kind lacks the groups that the
other kind looks for, and Megatron-Core 0.19.2 refuses it. The groups hold the same settings either
way, so they can be taken from where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys


def match_optimizers(optimizer: Any, loaded: Any) -> Any:
    """The loaded state with its parameter groups where `optimizer.load_state_dict` expects them.

    Args:
        optimizer: Megatron's `ChainedOptimizer`.
        loaded: "optimizer" of what `dist_checkpointing.load` returned; it is left alone. A list,
            the form of checkpoints of other formats, is returned as it is.

    Raises:
        ValueError: the checkpoint has no group with a needed group's settings.
    """
    parts = optimizer.chained_optimizers
    if not isinstance(loaded, dict):
        return loaded
    saved_in_parts = [value for key, value in loaded.items() if isinstance(key, int)]
    saved_parts = [part for part in saved_in_parts if _has_settings(part)] or [loaded]
    if len(saved_parts) == len(parts):
        return loaded
    saved = [group for part in saved_parts for group in _groups(part)]
    common = {key: value for key, value in saved_parts[0].items() if not isinstance(key, int)}
    matched = {
        index: _with_groups(
            {**common, **(loaded if len(parts) == 1 else loaded[index])},
            [_needed(group, saved) for group in part.optimizer.param_groups],
        )
        for index, part in enumerate(parts)
    }
    return matched[0] if len(parts) == 1 else matched


def _groups(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of one optimizer's state, the distributed optimizer's or a plain one's."""
    inner: dict[str, Any] = part.get("optimizer", part)
    groups: list[dict[str, Any]] = inner.get("param_groups", [])
    return groups


def _has_settings(part: dict[str, Any]) -> bool:
    # without them only the numbers of this rank's own parameters are there
    return any("lr" in group for group in _groups(part))


def _with_groups(part: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if not isinstance(key, int)}
    if "optimizer" in part:
        return {**part, "optimizer": {**part["optimizer"], "param_groups": groups}}
    # a plain optimizer's parameters are numbered, in the order of its own groups
    numbered = zip(groups, part["param_groups"], strict=True)
    return {
        **part,
        "param_groups": [{**group, "params": own["params"]} for group, own in numbered],
    }


def _needed(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = dict(_identity(group))
    for candidate in saved:
        if dict(_identity(candidate)) == wanted:
            settings = {key: value for key, value in candidate.items() if key != "params"}
            return {**settings, "is_expert_parallel": group["is_expert_parallel"]}
    raise ValueError(f"no parameter group of the checkpoint has these settings: {wanted}")


def _identity(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in param_group_identifier_keys:
        if key != "is_expert_parallel":
            yield key, group.get(key, group.get(f"pre_{key}"))
