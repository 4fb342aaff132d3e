"""The same micro-batches once more, with an eye on every module: where a number stops being finite.

Costs nothing until it is needed: Megatron keeps the micro-batches of the step at work for its own
checks, and the hooks are there for the time of the replay alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_args
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_xielu.mcore.nonfinite import is_finite
from megatron_xielu.mcore.places import pipeline_position, place


@dataclass(frozen=True, order=True)
class Sighting:
    """The first tensor that was not finite; the smallest of several is the earliest."""

    order: tuple[int, int]
    """Pipeline chunk in the order of computation, then the place within it."""
    rank: int
    micro_batch: int
    """Of its rank, from 1."""
    what: str

    def __str__(self) -> str:
        return f"{self.what} (micro-batch {self.micro_batch} of rank {self.rank})"


class Probe:
    """Hooks on every module of a model: notes what is first not finite, forward and backward.

    A module's inputs are looked at as well as its outputs, for what happens between modules. In
    backward it is the gradient of the inputs, named by the innermost module that takes them.
    """

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self.forward: Sighting | None = None
        self.backward: Sighting | None = None
        self._chunks = [unwrap_model(chunk) for chunk in model]
        self._handles: list[RemovableHandle] = []
        self._inside: int | None = None
        self._seen = 0
        self._micro_batches = Counter[int]()
        self._gradients = Counter[tuple[int, int]]()

    def __enter__(self) -> Probe:
        for index, chunk in enumerate(self._chunks):
            for path, module in chunk.named_modules():
                name = place(chunk, path) if path else _whole(chunk)
                self._watch(index, module, name, is_chunk=not path)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, index: int, module: nn.Module, name: str, *, is_chunk: bool) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if is_chunk:
                self._inside, self._seen = index, 0
                self._micro_batches[index] += 1
            # what runs again in backward, to save memory, has been looked at
            if self._inside is not None:
                self._look(f"the input of {name}", args, kwargs)
                self._follow(f"the gradient that leaves {name}", args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._inside is not None:
                self._look(name if is_chunk else f"the output of {name}", output)
                if is_chunk:
                    self._follow(f"the gradient that enters {name}", output)
                    self._inside = None

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _look(self, what: str, *values: Any) -> None:
        assert self._inside is not None
        self._seen += 1
        order = (pipeline_position(self._inside), self._seen)
        if self.forward is not None and self.forward.order <= order:
            return
        if not all(is_finite(tensor) for tensor in _activations(values)):
            micro_batch = self._micro_batches[self._inside]
            self.forward = Sighting(order, _rank(), micro_batch, what)

    def _follow(self, what: str, *values: Any) -> None:
        assert self._inside is not None
        index, micro_batch = self._inside, self._micro_batches[self._inside]
        for tensor in _activations(values):
            if not tensor.requires_grad:
                continue
            names = getattr(tensor, "_probed_as", None)
            if names is not None:
                # the module within is nearer to what is computed
                names[0] = what
                continue
            names = [what]
            tensor._probed_as = names  # type: ignore[attr-defined]
            tensor.register_hook(self._backward_hook(index, micro_batch, names))

    def _backward_hook(
        self, index: int, micro_batch: int, names: list[str]
    ) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            self._gradients[index, micro_batch] += 1
            order = (-pipeline_position(index), self._gradients[index, micro_batch])
            if self.backward is not None and self.backward.order <= order:
                return
            if not is_finite(gradient):
                self.backward = Sighting(order, _rank(), micro_batch, names[0])

        return look


def why_impossible() -> str | None:
    """Why this run's steps cannot be computed again with hooks, or None if they can."""
    args = get_args()
    if args.cuda_graph_impl != "none":
        return "the modules of a CUDA graph cannot be watched"
    if get_rerun_state_machine().get_mode() == RerunMode.DISABLED:
        return "--rerun-mode disabled keeps no micro-batches"
    if args.reuse_grad_buf_for_mxfp8_param_ag:
        return "gradients and parameters share their memory"
    return None


def replay(
    forward_step: Callable[..., Any],
    data: Any,
    model: Sequence[Any],
    optimizer: Any,
    config: Any,
    forward_backward: Callable[..., Any],
    **groups: Any,
) -> Probe:
    """Forward and backward of the step that has just ended, as Megatron's train_step runs them.

    Gradients are those of this rank's data: they are not summed over the layout's other marks, and
    nothing but the gradients changes.

    Args:
        data: the data iterator of the step, a list of them under virtual pipeline parallelism.
        groups: what train_step hands on to the schedule.
    """
    args = get_args()
    # the random numbers of the step; what follows goes on as if there had been no replay
    get_rerun_state_machine()._restore_state()
    iterators = [one for one in (data if isinstance(data, list) else [data]) if one is not None]
    for iterator in iterators:
        iterator.rewind()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    kept, config.finalize_model_grads_func = config.finalize_model_grads_func, _end_gradient_sync
    try:
        with Probe(model) as probe:
            forward_backward(
                forward_step_func=forward_step,
                data_iterator=data,
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=False,
                **groups,
            )
    finally:
        config.finalize_model_grads_func = kept
        for iterator in iterators:
            iterator.advance()
    return probe


def _end_gradient_sync(model: Sequence[Any], *args: Any, **kwargs: Any) -> None:
    # upstream's function would also move the routers' biases once more
    for chunk in model:
        chunk.finish_grad_sync()


def _activations(value: Any) -> Iterator[Tensor]:
    match value:
        case nn.Parameter():
            return
        case Tensor():
            if value.is_floating_point():
                yield value
        case list() | tuple():
            for one in value:
                yield from _activations(one)
        case dict():
            yield from _activations(list(value.values()))


def _whole(chunk: nn.Module) -> str:
    if getattr(chunk, "post_process", False):
        return "the loss"
    return f"pipeline stage {mpu.get_pipeline_model_parallel_rank()}"


def _rank() -> int:
    return int(torch.distributed.get_rank())
