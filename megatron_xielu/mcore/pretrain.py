"""Pretraining through Megatron's own loop: arguments in, trained checkpoints out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_tensorboard_writer
from megatron.training.training import pretrain as megatron_pretrain
from torch import Tensor

from megatron_xielu.errors import UserError
from megatron_xielu.mcore import (
    contract,
    cpu_platform,
    fp8_emulation,
    other_checkpoints,
    patches,
    safe_load,
    weight_gradients,
)
from megatron_xielu.mcore.activation import XIELUPlaceholder
from megatron_xielu.mcore.datasets import Datasets
from megatron_xielu.mcore.fp8_emulation import FP8Settings
from megatron_xielu.mcore.fp8_watch import Watch, WatchSettings
from megatron_xielu.mcore.health import Health, HealthSettings
from megatron_xielu.mcore.model_config import model_config
from megatron_xielu.mcore.observer import LOSS, Listener, Observer, is_reporting_rank
from megatron_xielu.mcore.preemption import Preemption
from megatron_xielu.mcore.recompute import recomputed_by_megatron
from megatron_xielu.mcore.saving import Saving, Store
from megatron_xielu.signals import StopSignals


def pretrain(
    argv: Sequence[str],
    activation: XIELUPlaceholder | None,
    listener: Listener,
    *,
    alpha_lr_mult: float = 1.0,
    evaluate_first: bool = True,
    store: Store | None = None,
    async_save: bool = False,
    signals: StopSignals | None = None,
    health: HealthSettings = HealthSettings(),  # noqa: B008 - frozen
    emulated_fp8: FP8Settings = FP8Settings(),  # noqa: B008 - frozen
    watch: WatchSettings | None = None,
    watch_record: Path | None = None,
    joined: Callable[[], None] | None = None,
) -> bool:
    """Run Megatron's pretraining on this rank; RANK, WORLD_SIZE and so on are in the environment.

    Args:
        argv: Megatron's own flags, without a program name.
        activation: xIELU's settings; None trains what argv says, such as --swiglu.
        listener: gets the run's numbers on the last rank, and notes on every rank.
        alpha_lr_mult: learning rate of the alphas relative to the other parameters.
        evaluate_first: evaluate before the first step of a new run.
        store: takes the checkpoints; None leaves saving to Megatron alone.
        async_save: let a child process write checkpoints where there is no GPU; with GPUs
            Megatron's own flags decide.
        signals: what this process was sent so far; None means that it listens from now on.
        health: what to check while the run trains.
        emulated_fp8: FP8 whose numbers the layers compute with, without a GPU; off by default.
        watch: looks at what FP8 does to xIELU's output; None for none.
        watch_record: where `watch` keeps the layers that it took out of FP8.
        joined: called on every rank when all of them have communicated and the model is built.

    Returns:
        Whether a signal has stopped it before the last step, with a checkpoint saved if training
        had begun; the same on all ranks.

    Raises:
        UserError: the installed Megatron-Core is not one this was written against, an argument is
            refused, or a checkpoint could run code.
        UnhealthyRun: a check failed, on all ranks at once.
        RuntimeError: Megatron ended the process by itself.
    """
    contract.check_version()
    on_cpu = cpu_platform.enable()
    patches.skip_dataset_helper_build()
    refused = safe_load.enable()
    other_checkpoints.enable()
    patches.mend_optimizers()
    if activation is not None:
        patches.group_alphas(alpha_lr_mult)
    preemption = Preemption(signals or StopSignals())
    # before the arguments are parsed: Megatron makes its own signal handler then
    preemption.attach()
    args = _parse(argv)
    if async_save and on_cpu:
        # its parser wants the writer that is handed GPU memory; a fork has a snapshot of its own
        args.async_save = True
    model = model_config(args, activation)
    whole = recomputed_by_megatron(model.transformer)
    if activation is not None and activation.recompute and whole is not None:
        listener.note(
            f"xielu.recompute=true is ignored: {whole} recomputes every MLP as a whole, fc2's "
            "input included"
        )
    if emulated_fp8.recipe != "off":
        listener.note(
            f"FP8 is emulated ({emulated_fp8.recipe}, {emulated_fp8.format}): its numbers at a "
            "higher cost than without it"
        )
    model.pre_wrap_hooks.append(partial(fp8_emulation.install_on_chunks, settings=emulated_fp8))
    if joined is not None:
        # between Megatron's first collective and the loading of a checkpoint
        model.pre_wrap_hooks.append(partial(_call, joined))
    if args.transformer_impl == "transformer_engine":
        from megatron_xielu.mcore import delayed_scaling

        delayed_scaling.save_as_numbers(needed=bool(args.fp8) and args.fp8_recipe == "delayed")
        if args.gradient_accumulation_fusion and not on_cpu:
            weight_gradients.use_transformer_engine()
    datasets = Datasets()
    observer = Observer(
        listener,
        datasets,
        preemption,
        evaluate_first=evaluate_first,
        has_alphas=activation is not None,
        watch=Watch(watch, listener, watch_record) if watch is not None else None,
    )
    observer.attach()
    if store is not None:
        Saving(store, listener, preemption).attach(args)
    Health(health, observer).attach()
    ended_early = False
    try:
        megatron_pretrain(
            pretrain_cfg_container_from_args(args, model),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except SystemExit as end:
        # no code at all is its way out of a checkpoint that it cannot load
        if end.code != 0:
            raise RuntimeError(f"Megatron ended the process with code {end.code}") from end
        ended_early = True
    except BaseException as error:
        if refused:
            raise refused[0] from error
        raise
    finally:
        # Megatron leaves what came after the last step to the end of the process
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.flush()
    if (ended_early or preemption.agreed) and is_reporting_rank():
        listener.stopped(
            trained=observer.trained,
            seconds=preemption.seconds_since_signal(),
            bound=preemption.bound(),
        )
    return preemption.agreed and observer.step < args.train_iters


def _call(joined: Callable[[], None], chunks: list[Any]) -> list[Any]:
    joined()
    return chunks


def _parse(argv: Sequence[str]) -> Any:
    with patches.command_line(argv), redirect_stderr(io.StringIO()) as said:
        try:
            return parse_and_validate_args()
        except SystemExit as refusal:
            reason = said.getvalue().strip().splitlines()[-1:] or [str(refusal)]
            raise UserError(f"Megatron refuses its arguments: {reason[0]}") from refusal


def forward_step(data_iterator: Any, model: GPTModel) -> tuple[Tensor, Any]:
    """One micro-batch through this pipeline stage, with the function that makes its loss."""
    batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def forward_tokens(data: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
    """`forward_step` for batches that are nothing but tokens, on every stage: [batch, seq + 1]."""
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    mask = torch.ones_like(inputs, dtype=torch.float32)
    output = chunk(inputs, positions, None, labels=labels, loss_mask=mask)
    return output, partial(loss_function, mask)


def loss_function(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed next-token loss of a micro-batch.

    Args:
        loss_mask, output: [micro_batch_size, seq_length]; 0 hides a token, output is its loss.

    Returns:
        The sum, the number of tokens, and both for Megatron's report.
    """
    mask = loss_mask.flatten().float()
    loss = (output.flatten().float() * mask).sum()
    num_tokens = mask.sum().to(torch.int)
    return loss, num_tokens, {LOSS: torch.stack((loss.detach(), num_tokens.float()))}


def _batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    args = get_args()
    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not first and not last:
        return dict.fromkeys(names)
    batch: dict[str, Any] = dict.fromkeys(names)
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch.update((key, value.cuda(non_blocking=True)) for key, value in sample.items())
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        # multi-token prediction stands at the end of the last stage and reads the tokens again
        mtp_on_this_rank=last and args.mtp_num_layers is not None,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    if args.context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return batch
