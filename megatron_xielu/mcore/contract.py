"""What this package relies on in Megatron-Core, written down so that a check names what moved."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from megatron_xielu.errors import UserError

MEGATRON_CORE = (Version("0.19.2"), Version("0.20"))


@dataclass(frozen=True)
class Seam:
    """One upstream symbol and what about it matters here."""

    symbol: str
    """Module and attribute, dotted."""
    use: str
    """What this package does with it."""
    parameters: str = ""
    """Names its parameters must begin with, in order."""
    source: str = ""
    """Text that its source must hold."""


_LOOP = "megatron.training.training"
_SAVE = "megatron.training.checkpointing"
SEAMS = (
    Seam(
        "megatron.core.transformer.mlp.MLP.forward",
        "calls the module installed as activation_func",
        "self hidden_states",
        "self.activation_func(intermediate_parallel)",
    ),
    Seam(
        "megatron.core.transformer.mlp.MLP.__init__",
        "takes the placeholder from the config and keeps tp_group",
        source="self.activation_func = self.config.activation_func",
    ),
    Seam(
        "megatron.core.transformer.mlp.MLP.sharded_state_dict",
        "saves the activation's parameters as a submodule's",
        source="self._modules.items()",
    ),
    Seam(
        "megatron.core.transformer.transformer_layer.TransformerLayer.__init__",
        "builds the MLP by calling submodules.mlp",
        source="self.mlp = submodules.mlp(",
    ),
    Seam(
        "megatron.core.transformer.transformer_block.TransformerBlockSubmodules",
        "carries our norm to the end of the block",
        "layer_specs layer_norm",
    ),
    Seam(
        "megatron.core.transformer.transformer_block.get_num_layers_to_build",
        "says how many layers a pipeline stage has",
        "config vp_stage",
    ),
    Seam(
        "megatron.training.argument_utils.gpt_config_from_args",
        "makes the model's config, which then gets the RoPE scaling factor",
        "args",
        "rope_scaling",
    ),
    Seam(
        "megatron.training.models.gpt.GPTModelBuilder.build_model",
        "hands the RoPE scaling factor to the model",
        source="rope_scaling_factor=self._model_config.rope_scaling_factor",
    ),
    Seam(
        "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding",
        "scales RoPE as Llama 3 does, with constants that exports name",
        source="original_max_position_embeddings=8192",
    ),
    Seam(
        "megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
        "is overridden by SDPAttention",
        "self query key value attention_mask attn_mask_type",
    ),
    Seam(
        "megatron.core.tensor_parallel.ColumnParallelLinear.forward",
        "multiplies through _forward_impl, which the FP8 emulation replaces",
        "self input_",
        "output_parallel = self._forward_impl(\n            input=input_parallel,",
    ),
    Seam(
        "megatron.core.tensor_parallel.RowParallelLinear.forward",
        "multiplies through _forward_impl, which the FP8 emulation replaces",
        "self input_",
        "output_parallel = self._forward_impl(\n            input=input_parallel,",
    ),
    Seam(
        "megatron.core.tensor_parallel.ColumnParallelLinear.get_extra_state",
        "puts the emulation's FP8 histories into checkpoints",
        "self",
    ),
    Seam(
        "megatron.core.tensor_parallel.RowParallelLinear.get_extra_state",
        "puts the emulation's FP8 histories into checkpoints",
        "self",
    ),
    Seam(
        "megatron.core.parallel_state.get_amax_reduction_group",
        "has the ranks whose amaxes make one scale",
        "with_context_parallel",
    ),
    Seam(
        "megatron.core.tensor_parallel.random.model_parallel_cuda_manual_seed",
        "makes random states that a CUDA graph can hold",
        "seed te_rng_tracker inference_rng_tracker use_cudagraphable_rng",
    ),
    Seam(
        "megatron.core.transformer.transformer_config.TransformerConfig",
        "says that each layer is captured in a CUDA graph",
        source="cuda_graph_impl: Literal['none', 'local'",
    ),
    Seam(
        "megatron.core.activations.squared_relu",
        "is ReLU squared, beside which training with xIELU is timed",
    ),
    Seam(
        "megatron.core.transformer.utils.make_sharded_tensors_for_checkpoint",
        "makes the alphas' checkpoint shards",
        "state_dict prefix",
    ),
    Seam(
        "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads",
        "sums the gradients of marked parameters under sequence parallelism",
        source='config.sequence_parallel and getattr(param, "sequence_parallel", False)',
    ),
    Seam(
        "megatron.core.tensor_parallel.copy_to_tensor_model_parallel_region",
        "sums the alphas' gradients in backward otherwise",
        "input_ group",
    ),
    Seam(
        "megatron.core.optimizer.get_standard_config_overrides",
        "spares one-dimensional parameters from weight decay",
        "config",
        "len(param.shape) == 1",
    ),
    Seam(
        "megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups",
        "builds GroupStepAdamW through the module's Adam",
        source="if USING_PYTORCH_OPTIMIZER:",
    ),
    Seam(
        "megatron.core.optimizer.optimizer.param_group_identifier_keys",
        "tells the alphas' parameter group from the norms' when a checkpoint is loaded",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        "tells the distributed optimizer where the step is counted",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
        "sharded_param_state_fully_reshardable",
        "is wrapped to look parameters up where the gathered state has them",
        "self model_sharded_state_dict is_loading metadata",
        "buffer.param_index_map.items()",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
        "get_parameter_state_dp_zero",
        "gathers the optimizer's state without the padding between buckets",
        source="offset_in_world_tensors += gbuf_world_numel_unpadded",
    ),
    Seam(
        "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        "refuses the state of another number of optimizers, which match_optimizers spares it",
        "self state_dict",
        "len(self.chained_optimizers) != len(state_dict)",
    ),
    Seam(
        "megatron.core.models.hybrid.hybrid_block.HybridStack.__init__",
        "can be built without a last norm, which finish_norms adds",
        source="if self.post_process and self.post_layer_norm:",
    ),
    Seam(
        "megatron.core.datasets.utils.compile_helpers",
        "is skipped where the helpers are built",
        source='"make"',
    ),
    Seam(
        "megatron.core.utils.get_batch_on_this_tp_rank",
        "hands a batch to the tensor-parallel ranks",
        "batch has_cu_seqlens is_hybrid_cp create_attention_mask_in_dataloader",
    ),
    Seam(
        "megatron.training.models.gpt.default_layer_spec",
        "is the spec that xielu_layer_spec changes",
        "config vp_stage",
    ),
    Seam(
        "megatron.training.models.gpt.GPTModelBuilder.build_distributed_models",
        "runs pre_wrap_hooks on the built model",
        source="pre_wrap_hook",
    ),
    Seam(
        f"{_LOOP}.get_megatron_optimizer_config",
        "gets a parameter group for the alphas",
        "args",
    ),
    Seam(
        f"{_LOOP}.train",
        "is wrapped for the evaluation before the first step",
        "forward_step_func model optimizer opt_param_scheduler train_data_iterator "
        "valid_data_iterator process_non_loss_data_func config",
    ),
    Seam(
        f"{_LOOP}.training_log",
        "is wrapped for the step line",
        "loss_dict total_loss_dict learning_rate iteration loss_scale "
        "report_memory_flag skipped_iter grad_norm",
    ),
    Seam(
        f"{_LOOP}.evaluate",
        "is wrapped for the held-out loss, and left after a signal",
        "forward_step_func data_iterator model process_non_loss_data_func config",
        "ft_integration.on_eval_step_start()",
    ),
    Seam(
        f"{_LOOP}.build_train_valid_test_data_loaders",
        "reads consumed_valid_samples after the dataset provider has reset it",
        source="build_pretraining_data_loader(valid_d, args.consumed_valid_samples)",
    ),
    Seam(
        "megatron.training.datasets.data_samplers.build_pretraining_data_loader",
        "serves each evaluation from the first sample",
        "dataset consumed_samples",
    ),
    Seam(
        f"{_LOOP}.evaluate_and_print_results",
        "is wrapped for the held-out loss",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config",
    ),
    Seam(
        f"{_LOOP}.save_checkpoint_and_time",
        "is wrapped so that saving does not count as training time",
        "iteration",
    ),
    Seam(
        f"{_LOOP}.save_checkpoint",
        "is wrapped so that a save goes beside, and counts once it is whole",
        "iteration model optimizer",
        "ensure_directory_exists(checkpoint_name, check_parent=False)",
    ),
    Seam(
        f"{_LOOP}.maybe_finalize_async_save",
        "is wrapped so that a failed asynchronous save is a warning",
        "blocking",
    ),
    Seam(
        f"{_SAVE}.get_checkpoint_name",
        "names the folder of a save",
        "checkpoints_path iteration",
    ),
    Seam(
        f"{_SAVE}.get_checkpoint_tracker_filename",
        "names the file that says which step is the latest",
        "checkpoints_path",
    ),
    Seam(
        "megatron.training.wandb_utils.on_save_checkpoint_success",
        "is told of a step once it is published",
        "checkpoint_path tracker_filename save_dir iteration",
    ),
    Seam(
        f"{_SAVE}.check_checkpoint_args",
        "is handed the arguments of a loaded checkpoint, with its count of tokens",
        "checkpoint_args",
    ),
    Seam(
        f"{_SAVE}.load_checkpoint",
        "takes the count of sequences from the same arguments",
        source="getattr(checkpoint_args, 'consumed_train_samples', 0)",
    ),
    Seam(
        f"{_SAVE}.schedule_async_save",
        "takes the request to which publishing is added",
        "async_request",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        "is wrapped so that a stop signal does not end the process that it starts",
        "mp_mode",
        ".Manager().Queue()",
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization.save_config",
        "is wrapped so that rank 0's error does not leave the others waiting",
        "config checkpoint_dir",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver."
        "save_state_dict_async_finalize",
        "raises CheckpointException on every rank when one could not write",
        source='raise CheckpointException("write", node_failures)',
    ),
    Seam(
        "megatron.core.distributed.distributed_data_parallel.partition_buckets",
        "is kept from putting two types into one group on gloo",
        "buffers force_single_bucket_group",
    ),
    Seam(
        "megatron.core.dist_checkpointing.load",
        "is asked for alphas in the shape that older checkpoints hold",
        "sharded_state_dict checkpoint_dir",
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization.load_common",
        "loads an older checkpoint's common.pt, with weights alone",
        "checkpoint_dir",
    ),
    Seam(
        "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
        "unpickles an index, which is looked at before",
        source="pickle.load",
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        "unpickles objects, which are loaded with weights alone before",
        "self read_item value",
    ),
    Seam(
        "megatron.training.global_vars._GLOBAL_TENSORBOARD_WRITER",
        "is replaced by one that outlives a full disk",
    ),
    Seam(
        f"{_LOOP}.train_step",
        "is wrapped to trace a step that is not finite",
        "forward_step_func data_iterator model optimizer opt_param_scheduler config "
        "forward_backward_func iteration",
        "update_successful, grad_norm, num_zeros_in_grad = optimizer.step()",
    ),
    Seam(
        f"{_LOOP}.post_training_step_callbacks",
        "is wrapped to compare the copies of parameters before a checkpoint is saved",
        "model optimizer opt_param_scheduler iteration",
    ),
    Seam(
        f"{_LOOP}.disable_forward_pre_hook",
        "completes this rank's parameters before they are compared",
        "model_chunks optimizer",
    ),
    Seam(
        f"{_LOOP}.enable_forward_pre_hook",
        "undoes disable_forward_pre_hook",
        "model_chunks",
    ),
    Seam(
        f"{_LOOP}.should_disable_forward_pre_hook",
        "says whether parameters are gathered late",
        "args",
    ),
    Seam(
        "megatron.core.optimizer.ChainedOptimizer.step",
        "asks get_grad_norm first and steps only by step_with_ready_grads",
        source="else self.step_with_ready_grads()",
    ),
    Seam(
        "megatron.core.optimizer.ChainedOptimizer.get_grad_norm",
        "is wrapped to see whether the norm is finite",
        "self",
    ),
    Seam(
        "megatron.core.distributed.DistributedDataParallel.finish_grad_sync",
        "ends the gradient sync of a replayed step",
        "self",
    ),
    Seam(
        "megatron.core.distributed.DistributedDataParallel.zero_grad_buffer",
        "makes a replayed step start with no gradient",
        "self",
    ),
    Seam(
        "megatron.core.rerun_state_machine.RerunStateMachine._restore_state",
        "gives a replayed step the same random numbers",
        "self",
    ),
    Seam(
        "megatron.core.rerun_state_machine.RerunDataIterator.rewind",
        "gives a replayed step the same micro-batches",
        "self",
    ),
    Seam(
        "megatron.core.rerun_state_machine.RerunDataIterator.advance",
        "goes on to new micro-batches after a replay",
        "self",
    ),
    Seam(
        f"{_LOOP}.checkpoint_and_decide_exit",
        "saves and ends the run after a signal",
        source="if any(signal_handler.signals_received()):",
    ),
    Seam(
        "megatron.training.global_vars._set_signal_handler",
        "is replaced by a handler that knows of earlier signals",
        "exit_signal",
        "_GLOBAL_SIGNAL_HANDLER = DistributedSignalHandler(exit_signal)",
    ),
    Seam(
        "megatron.training.dist_signal_handler.all_gather_item",
        "tells every rank of a signal",
        "item dtype",
    ),
    Seam(
        "megatron.core.transformer.mlp.MLP.forward",
        "multiplies an expert's activation, which recompute repeats",
        "self hidden_states per_token_scale",
        "intermediate_parallel = intermediate_parallel * per_token_scale.unsqueeze(-1)",
    ),
    Seam(
        "megatron.core.transformer.mlp.MLP.forward",
        "calls fc2 as a module, so that its forward hooks run",
        source="apply_module(self.linear_fc2)(",
    ),
    Seam(
        "megatron.core.tensor_parallel.random.is_checkpointing",
        "says that Megatron recomputes the MLP as a whole",
    ),
    Seam(
        "megatron.core.tensor_parallel.random.CheckpointFunction.backward",
        "tells is_checkpointing of the second forward pass",
        source="_set_checkpointing()",
    ),
    Seam(
        "megatron.core.transformer.transformer_layer.TransformerLayer.__init__",
        "recomputes whole dense MLPs by this name",
        source='"mlp" in self.config.recompute_modules',
    ),
    Seam(
        "torch._C._autograd._top_saved_tensors_default_hooks",
        "says whether activation offloading holds what is saved",
    ),
    Seam(
        "torch._C._autograd.SavedTensor.register_hooks",
        "puts the way to make fc2's input again in its place",
    ),
    Seam(
        "torch._C._FunctionBase._raw_saved_tensors",
        "is where an autograd function keeps fc2's input",
    ),
    Seam(
        "megatron.training.ft_integration.on_eval_step_start",
        "is where an evaluation can be left",
    ),
)

_TE = "transformer_engine.pytorch"
# what is there where TransformerEngine is installed only
TRANSFORMER_ENGINE_SEAMS = (
    Seam(
        "megatron.core.extensions.transformer_engine.TEFusedMLP._make_activation_op",
        "is where xIELU enters the fused MLP",
        "self activation_func gated_linear_unit cache_quantized_input",
    ),
    Seam(
        "megatron.core.extensions.transformer_engine.TEFusedMLP._make_fused_impl",
        "puts the activation between two linears",
        source="op = self._make_activation_op(",
    ),
    Seam(
        f"{_TE}.ops.op.BasicOperation.op_forward",
        "computes xIELU and tells what reads it next",
        "self ctx input_ prev_op_grad_output_quantizer next_op_input_quantizer",
    ),
    Seam(
        f"{_TE}.ops.op.BasicOperation.op_backward",
        "computes xIELU's gradients",
        "self ctx grad_output",
    ),
    Seam(
        f"{_TE}.ops.BasicLinear._functional_forward",
        "takes an input that is FP8 already, and keeps its transpose alone",
        source="x_local.update_usage(rowwise_usage=False, columnwise_usage=True)",
    ),
    Seam(
        f"{_TE}.ops.BasicLinear._functional_backward",
        "takes a gradient that is FP8 already",
        source="dy_local.update_usage(",
    ),
    Seam(
        f"{_TE}.quantized_tensor.Quantizer.make_empty",
        "allocates what the kernels write",
        "self shape dtype device",
    ),
    Seam(
        f"{_TE}.Float8Quantizer.copy",
        "has the scale and the amax of delayed scaling",
        source="amax=self.amax",
    ),
    Seam(
        f"{_TE}.Float8CurrentScalingQuantizer.copy",
        "says how a scale is rounded and whether ranks share an amax",
        source="with_amax_reduction=self.with_amax_reduction",
    ),
    Seam(
        f"{_TE}.Float8BlockQuantizer.inner_tensor_specs",
        "names the tensors of blockwise scaling",
        source="_columnwise_scale_inv",
    ),
    Seam(
        f"{_TE}.quantization.FP8GlobalStateManager.get_fp8_recipe",
        "says whether backward is computed in high precision",
    ),
    Seam(
        f"{_TE}.quantization.FP8GlobalStateManager.reset",
        "forgets the histories of models that train no more",
    ),
    Seam(f"{_TE}.utils.clear_tensor_data", "frees xIELU's input"),
    Seam(
        f"{_TE}.module.base.TransformerEngineBaseModule.get_extra_state",
        "keeps the state of delayed scaling",
        "self",
        'state["amax_history_fwd"] = to_cpu(self.fp8_meta["scaling_fwd"].amax_history)',
    ),
    Seam(
        f"{_TE}.module.base.TransformerEngineBaseModule.set_extra_state",
        "takes the state of delayed scaling back",
        "self state",
        'self.init_fp8_meta_tensors(self.fp8_meta["recipe"])',
    ),
    Seam(
        f"{_TE}.ops.op.BasicOperation.reset_recipe_state",
        "keeps delayed scaling's state that is there before the first forward",
        "self recipe",
        "if not isinstance(recipe, type(recipe_state.recipe)):",
    ),
    Seam(
        f"{_TE}.quantization.DelayedScalingRecipeState",
        "has scales and histories",
        source="amax_history: torch.Tensor",
    ),
    Seam(
        f"{_TE}.quantization._update_amax_history",
        "puts the newest amax at the end",
        source="torch.roll(amax_history, -1, 0)",
    ),
    Seam(
        f"{_TE}.ops.register_forward_backward_fusion",
        "puts xIELU and fc2 into one operation",
        "op_fusion_func",
    ),
    Seam(
        f"{_TE}.ops.BasicLinear.op_forward",
        "saves its input first, and knows from the state whether FP8 is on",
        source="ctx.save_for_backward(saved_input, saved_weight)",
    ),
    Seam(
        f"{_TE}.ops.BasicLinear.op_backward",
        "reads its input and weight from the context",
        source="(x_local, w) = ctx.saved_tensors",
    ),
    Seam(
        f"{_TE}.module.linear._linear_forward_impl",
        "takes an input that is FP8 already, and leaves its data alone",
        source="if isinstance(inputmat, QuantizedTensorStorage):\n"
        "                inputmat.update_usage(rowwise_usage=True)",
    ),
    Seam(
        f"{_TE}.module.linear._linear_backward_impl",
        "multiplies the transpose of an input that was FP8 already",
        source="inputmat_total.update_usage(columnwise_usage=True)",
    ),
    Seam(
        f"{_TE}.Linear._get_quantizers",
        "says what fc2 casts its input with",
        source='self.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_INPUT]',
    ),
    Seam(
        f"{_TE}.module.base.TransformerEngineBaseModule.init_fp8_metadata",
        "makes fc2's quantizers before its forward pass, and then does nothing in it",
        "self num_gemms",
        "if self.fp8_initialized and FP8GlobalStateManager.get_fp8_recipe() == _original_recipe:",
    ),
    Seam(
        f"{_TE}.distributed.is_fp8_activation_recompute_enabled",
        "tells of recomputation, before which fc2 copies its scales",
    ),
    Seam(
        f"{_TE}.distributed.in_fp8_activation_recompute_phase",
        "tells of recomputation, in which fc2 takes its old scales",
    ),
    Seam(f"{_TE}.cpu_offload.is_cpu_offload_enabled", "tells of activation offloading"),
    Seam(
        "transformer_engine.debug.pytorch.debug_state.TEDebugState",
        "tells of TransformerEngine's debug quantizers",
        source="debug_enabled",
    ),
    Seam(
        f"{_TE}.quantized_tensor.QuantizedTensor",
        "is what autograd takes for xIELU's output in FP8",
    ),
)


def check_version() -> None:
    """Raise UserError unless the installed Megatron-Core is one this was written against."""
    lowest, below = MEGATRON_CORE
    found = Version(version("megatron-core"))
    if not lowest <= found < below:
        raise UserError(
            f"megatron-core {found} is installed; this release is written against "
            f">={lowest},<{below}: pip install 'megatron-core=={lowest}'"
        )


def problem_with(seam: Seam) -> str | None:
    """What is no longer as this package needs it, with the symbol's name; None if all is well."""
    try:
        found = _resolve(seam.symbol)
    except (ImportError, AttributeError) as error:
        return f"{seam.symbol}, which {seam.use}, is gone: {error}"
    if seam.parameters:
        names = " ".join(inspect.signature(found).parameters)
        if not f"{names} ".startswith(f"{seam.parameters} "):
            return f"{seam.symbol}, which {seam.use}, takes ({names}), not ({seam.parameters} ...)"
    if seam.source and seam.source not in inspect.getsource(inspect.unwrap(found)):
        return f"{seam.symbol}, which {seam.use}, no longer holds {seam.source!r}"
    return None


def _resolve(symbol: str) -> Any:
    parts = symbol.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"no module {parts[0]}")
