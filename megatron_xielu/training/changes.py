"""What may differ between two starts of one run: the rules, and whether the data is the same."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_xielu.data.manifest import DatasetInfo
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import recipe_keys

DATA = "data.sha256"
_DATA_KEY = "data.path"
# how a run is computed, saved and reported; its numbers stay the same up to rounding
_FREE = (
    "checkpoint.",
    "data.num_workers",
    "fp8.fused",
    "fp8.max_flushed",
    "fp8.max_kurtosis",
    "fp8.max_saturated",
    "fp8.on_outlier",
    "fp8.watch_interval",
    "health.",
    "logging.",
    "model.transformer_impl",
    "name",
    "parallel.pipeline_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.tensor_model_parallel_size",
    "training.micro_batch_size",
    "xielu.impl",
    "xielu.recompute",
)
# the shapes of what is saved, the optimizer that saved it, and the rates by which Megatron finds
# its parameter groups again (with another one it ends with a KeyError)
_FIXED = (
    "model.activation",
    "model.ffn_hidden_size",
    "model.head_dim",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_layers",
    "model.num_query_groups",
    "model.padded_vocab_size",
    "model.qk_layernorm",
    "model.tie_embeddings",
    "model.vocab_size",
    "optimizer.lr",
    "optimizer.min_lr",
    "parallel.use_distributed_optimizer",
    "xielu.lr_mult",
)
# arguments of Megatron that a checkpoint keeps and that are compared with the recipe
_MEGATRON_NAMES = {
    "model.rope_theta": ("rotary_base",),
    "model.rope_scaling_factor": ("use_rope_scaling", "rope_scaling_factor"),
    "model.norm_epsilon": ("layernorm_epsilon",),
}


def check_changes(changes: Sequence[str], run_dir: Path, allowed: Collection[str]) -> None:
    """Raises UserError unless the run that is saved in `run_dir` may go on with these changes.

    Args:
        changes: lines such as "optimizer.lr: 0.003 -> 0.1".
        allowed: keys that the user lets change although they change the result.
    """
    fixed = [change for change in changes if _key(change) in _FIXED]
    asking = [c for c in changes if c not in fixed and not c.startswith(_FREE)]
    refused = [change for change in asking if _key(change) not in allowed]
    if not fixed and not refused:
        return
    lines = [f"{run_dir} holds a run of another recipe:"]
    lines += [f"  {change}  (can never change: the saved state depends on it)" for change in fixed]
    lines += [f"  {change}  (--allow-changed {_key(change)})" for change in refused]
    remedy = f"Go on with {run_dir / 'recipe.yaml'}, or choose another --run-dir."
    if refused and not fixed:
        options = " ".join(f"--allow-changed {_key(change)}" for change in refused)
        remedy += f" To change the run from here on, add {options}"
    raise UserError("\n".join([*lines, remedy]))


def check_keys(allowed: Collection[str]) -> None:
    """Raises UserError for a key that no recipe has."""
    for key in allowed:
        if key not in recipe_keys():
            near = difflib.get_close_matches(key, recipe_keys(), n=1)
            hint = f"did you mean {near[0]}?" if near else "keys look like optimizer.lr"
            raise UserError(f"--allow-changed {key}: no key of a recipe; {hint}")


def data_changes(changes: Sequence[str], run_dir: Path, data: DatasetInfo | None) -> list[str]:
    """The changes without a data folder that only moved, and with data that became other data."""
    record = run_dir / DATA
    if data is None or not record.is_file():
        return list(changes)
    others = [change for change in changes if _key(change) != _DATA_KEY]
    before, now = record.read_text().strip(), fingerprint(data)
    if before == now:
        return others
    return [*others, f"{_DATA_KEY}: {data.path} holds other data, {before[:12]} -> {now[:12]}"]


def fingerprint(data: DatasetInfo) -> str:
    """SHA-256 over the tokens and the tokenizer, wherever the folder lies."""
    parts = (data.train.sha256, data.valid.sha256, data.tokenizer_sha256)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def megatron_names(allowed: Collection[str]) -> set[str]:
    """Megatron's names of the allowed keys, where a checkpoint's arguments are compared."""
    return {name for key in allowed for name in _MEGATRON_NAMES.get(key, ())}


def _key(change: str) -> str:
    return change.partition(":")[0]
