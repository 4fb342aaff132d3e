"""The tokens a run has trained on, which Megatron does not count.

It counts sequences, whose length may be another one after a restart. The count is kept where the
count of sequences is, among the arguments that Megatron saves: `consumed_train_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.training.checkpointing
from megatron.training import get_args

from megatron_xielu.mcore import patches


class TokenCount:
    """Goes on from what the checkpoint says that is loaded."""

    def __init__(self) -> None:
        self._loaded_sequences = 0
        self._loaded_tokens = 0

    def attach(self) -> None:
        """Wrap the function of Megatron that is handed the arguments of a loaded checkpoint."""
        patches.wrap(megatron.training.checkpointing, "check_checkpoint_args", self._around_check)

    def update(self) -> None:
        """Bring the count in the arguments up to date; before they are saved."""
        run = get_args()
        new = (run.consumed_train_samples - self._loaded_sequences) * run.seq_length
        run.consumed_train_tokens = self._loaded_tokens + new

    def _around_check(self, check: Callable[..., None]) -> Callable[..., None]:
        def checked(saved: Any, *args: Any, **kwargs: Any) -> None:
            check(saved, *args, **kwargs)
            self._loaded_sequences = getattr(saved, "consumed_train_samples", 0)
            uncounted = self._loaded_sequences * getattr(saved, "seq_length", 0)
            self._loaded_tokens = getattr(saved, "consumed_train_tokens", uncounted)

        return checked
