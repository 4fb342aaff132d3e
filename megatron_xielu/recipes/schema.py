"""A recipe: everything that decides a pretraining run, as a tree of frozen dataclasses.

Field names follow Megatron-Core's arguments. `None` means "derived", and the resolved recipe that
is saved with a run holds no derived value that was left open. Rules that span fields are in
`validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only Llama: RMSNorm, RoPE, no biases, no dropout."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads; None means one per attention head (multi-head attention)."""
    head_dim: int | None = None
    """None means hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    """Width of the MLP: that of xielu and relu2 is 1.5 times swiglu's at equal parameters and
    FLOPs."""
    activation: Literal["xielu", "swiglu", "relu2"] = "xielu"
    """swiglu (gated) and relu2 (ReLU squared) are baselines, see docs/baselines.md."""
    seq_length: int
    vocab_size: int | None = None
    """Ids, each a row of the embedding; None means those of the data's tokenizer."""
    padded_vocab_size: int | None = None
    """Rows of the embedding; those beyond the ids are padding, which no export has. None means no
    padding, or up to a multiple of 128 where vocab_size comes from the data."""
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling_factor: float | None = None
    """Llama 3's scaling of RoPE's low frequencies, for contexts beyond 8,192 tokens; None for none.
    """
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    """Output projections are scaled by 1 / sqrt(2 * num_layers), as in Megatron."""
    qk_layernorm: bool = False
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: TransformerEngine where a GPU and the library are present, else local."""


@dataclass(frozen=True, kw_only=True)
class Xielu:
    """The activation where model.activation is xielu; alpha_*_init are the effective values after
    softplus."""

    alpha_p_init: float = 0.8
    alpha_n_init: float = 0.8
    beta: float = 0.5
    lr_mult: float = 1.0
    """Learning rate of the alphas relative to the other parameters."""
    impl: Literal["auto", "triton", "cpu", "eager", "reference"] = "auto"
    """auto: the fused kernel of the machine, plain torch where there is none."""
    recompute: bool = False
    """Backward computes fc2's input again instead of keeping it; see docs/memory.md."""
    saved_input: Literal["exact", "e4m3"] = "exact"
    """e4m3 keeps xIELU's input for backward in FP8, with gradients that differ; docs/memory.md."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is cut over ranks; data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True


@dataclass(frozen=True, kw_only=True)
class FP8:
    """FP8 matrix products of the layers, by TransformerEngine; see docs/fp8.md."""

    recipe: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """How scales are found, by Megatron's names; off is bf16, and nothing else here counts."""
    format: Literal["hybrid", "e4m3"] | None = None
    """hybrid has gradients in e5m2; None means TransformerEngine's own choice for the recipe:
    hybrid for delayed and tensorwise, e4m3 for blockwise and mxfp8."""
    param_gather: bool = False
    """Keep the weights in FP8 and gather them so from the distributed optimizer."""
    bf16_layers_at_start: int = 0
    bf16_layers_at_end: int = 0
    """Layers that stay in bf16, not with delayed scaling."""
    amax_history_len: int = 1024
    """Delayed scaling: the steps whose largest magnitudes decide the scale."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Delayed scaling: which magnitude of that history."""
    fc2_input: Literal["fp8", "bf16"] = "fp8"
    """bf16 keeps xIELU's output, which grows with the square of its input, and the product that
    reads it out of FP8; needs fused."""
    fused: bool = True
    """xIELU writes FP8 for both linears, as an operation of TransformerEngine's fuser; false: it
    writes fc2's input only, for TransformerEngine's plain modules."""
    watch_interval: int = 100
    """Steps between looks at what FP8 does to xIELU's output, by layer; 0 for none."""
    on_outlier: Literal["warn", "bf16_layer", "stop"] = "warn"
    """What follows where a look crosses one of the three below; bf16_layer goes on with fc2 of that
    layer in bf16."""
    max_saturated: float | None = 1e-4
    """Share of xIELU's output that may be too large for its scale; null for any."""
    max_flushed: float | None = 0.01
    """Share of it that may become zero."""
    max_kurtosis: float | None = None
    """Of xIELU's input."""
    emulate: bool = False
    """Compute with what FP8 leaves of the numbers in Megatron's local layers instead, on any
    machine; see docs/fp8-emulation.md."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length and batch of the run, in optimizer steps and sequences."""

    train_iters: int
    global_batch_size: int
    micro_batch_size: int
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW; 1-D parameters (norms and alphas) carry no weight decay."""

    lr: float
    min_lr: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warmup-stable-decay: linear warmup, flat, then 1 - sqrt to min_lr."""

    lr_warmup_iters: int
    lr_wsd_decay_iters: int
    lr_wsd_decay_style: Literal["minus_sqrt", "linear", "cosine", "exponential"] = "minus_sqrt"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens are."""

    path: str | None = None
    """A folder written by `prepare-data`; None is an error once training starts."""
    num_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the run is saved; SIGTERM, Ctrl-C and the last step always save."""

    save_interval: int = 1000
    keep_last: int | None = None
    """How many of the newest steps stay; None keeps all."""
    keep_every: int | None = None
    """With keep_last: steps that are a multiple of it stay as well."""
    async_save: bool = False
    """Train on while a process beside writes; a save counts once all of it is on disk."""
    on_corrupt: Literal["stop", "older"] = "stop"
    """Where the newest step is damaged: stop and say so, or go on from the next older whole one."""


@dataclass(frozen=True, kw_only=True)
class Logging:
    """How often the run reports, in steps."""

    log_interval: int = 10
    eval_interval: int = 1000
    eval_iters: int | None = 10
    """Global batches of an evaluation, the same each time; 0 for none, None for the whole set."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a run checks about itself; see docs/health.md."""

    every: int = 100
    """Steps between comparisons of the ranks' copies of parameters, which also come before regular
    saves; 0 for none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is not finite; the optimizer never takes that step."""
    max_skipped_steps: int = 10
    """Steps in a row that `skip` may leave out."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pretraining run."""

    name: str
    model: Model
    xielu: Xielu = field(default_factory=Xielu)
    parallel: Parallel = field(default_factory=Parallel)
    fp8: FP8 = field(default_factory=FP8)
    training: Training
    optimizer: Optimizer
    schedule: Schedule
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    health: Health = field(default_factory=Health)
