"""What decides the function of a saved model and the names of its weights, wherever it is known.

A run's recipe.yaml says it, or the arguments that Megatron stores in every checkpoint, or a
Hugging Face folder's config.json. Conversion, verification and the reference model know only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, head_dim, num_query_groups
from megatron_xielu.unpickle import Opaque

Activation = Literal["xielu", "swiglu", "relu2"]

LOW_FREQ_FACTOR = 1.0
HIGH_FREQ_FACTOR = 4.0
ORIGINAL_MAX_POSITION_EMBEDDINGS = 8192
"""What Megatron-Core's `--use-rope-scaling` (Llama 3's rule) has no flags for; constants of
`RotaryEmbedding._apply_scaling`."""
MEGATRON_ROPE_SCALING_FACTOR = 8.0
"""Its default of `--rope-scaling-factor`."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only Llama: RMSNorm before attention and MLP, RoPE in two halves, no biases."""

    num_layers: int
    """Pairs of attention and MLP."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Without the rows that Megatron pads the embedding with."""
    tie_embeddings: bool
    qk_layernorm: bool
    """RMSNorm over each head's channels of queries and keys, before RoPE."""
    activation: Activation
    """swiglu has a gate; the others are not gated."""
    beta: float = 0.5
    """xIELU's slope at 0; meaningless for the others."""
    norm_epsilon: float
    rope_theta: float
    rope_scaling_factor: float | None = None
    """Llama 3's scaling of RoPE by this factor; None for none."""
    seq_length: int
    init_std: float = 0.02

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies the activation with a second projection."""
        return self.activation == "swiglu"

    @staticmethod
    def of_recipe(recipe: Recipe, vocab_size: int) -> Architecture:
        """The architecture of a recipe's model."""
        model = recipe.model
        return Architecture(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=num_query_groups(model),
            head_dim=head_dim(model),
            vocab_size=vocab_size,
            tie_embeddings=model.tie_embeddings,
            qk_layernorm=model.qk_layernorm,
            activation=model.activation,
            beta=recipe.xielu.beta,
            norm_epsilon=model.norm_epsilon,
            rope_theta=model.rope_theta,
            rope_scaling_factor=model.rope_scaling_factor,
            seq_length=model.seq_length,
            init_std=model.init_std,
        )

    @staticmethod
    def of_arguments(
        args: Mapping[str, Any], *, has_alphas: bool, vocab_size: int | None = None
    ) -> Architecture:
        """The architecture that the arguments of a plain Megatron checkpoint describe.

        Args:
            args: names and values, `vars(common_state()["args"])`.
            has_alphas: the checkpoint holds xIELU's; stock Megatron has no argument for them.
            vocab_size: without padding, for where the arguments do not say it.

        Raises:
            UserError: an argument is missing, or describes what is no such Llama; all are named.
        """
        values = {
            name: value
            for name, value in args.items()
            if value is not None and not isinstance(value, Opaque)
        }
        if vocab_size is not None:
            values.setdefault("vocab_size", vocab_size)
        # older Megatrons have the shorter name
        values.setdefault("layernorm_epsilon", values.get("norm_epsilon"))
        values.setdefault("max_position_embeddings", values.get("seq_length"))
        if missing := [name for name in _REQUIRED if values.get(name) is None]:
            padded = values.get("padded_vocab_size")
            hint = f" ({padded} rows are stored, padding included)" if padded else ""
            raise UserError(
                "The checkpoint does not say "
                + ", ".join(missing)
                + "; give each with --arg, as in "
                + " ".join(f"--arg {name}=VALUE" for name in missing)
                + (f". vocab_size also follows from --tokenizer{hint}." * ("vocab_size" in missing))
            )
        if reasons := refusals(args):
            raise UserError(
                "No Llama-like architecture of Hugging Face's holds this model:\n"
                + "\n".join(f"  {reason}" for reason in reasons)
            )
        heads = values["num_attention_heads"]
        # without grouped queries the saved number of groups is an unused default
        grouped = values.get("group_query_attention")
        return Architecture(
            num_layers=_num_layers(values),
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=values["num_query_groups"] if grouped else heads,
            head_dim=values.get("kv_channels", values["hidden_size"] // heads),
            vocab_size=values["vocab_size"],
            tie_embeddings=not values["untie_embeddings_and_output_weights"],
            qk_layernorm=bool(values.get("qk_layernorm")),
            activation=_activation(values, has_alphas),
            beta=values.get("xielu_beta", 0.5),
            norm_epsilon=values["layernorm_epsilon"],
            rope_theta=float(values["rotary_base"]),
            rope_scaling_factor=(
                float(values.get("rope_scaling_factor", MEGATRON_ROPE_SCALING_FACTOR))
                if scales_rope(values)
                else None
            ),
            seq_length=values["max_position_embeddings"],
            init_std=values.get("init_method_std", 0.02),
        )


_REQUIRED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "untie_embeddings_and_output_weights",
    "layernorm_epsilon",
    "rotary_base",
    "max_position_embeddings",
    "vocab_size",
)

# Megatron's name, the value of a Llama, and why another one has no place; a run may have passed any
# flag of Megatron's behind its recipe
LLAMA: dict[str, tuple[Any, str]] = {
    "activation_func_clamp_value": (None, "gated MLPs clamp their input"),
    "add_bias_linear": (False, "linear layers have biases"),
    "add_qkv_bias": (False, "queries, keys and values have biases"),
    "apply_residual_connection_post_layernorm": (False, "the residual is taken after the norm"),
    "attention_output_gate": (False, "attention's output is gated"),
    "experimental_attention_variant": (None, "attention is not softmax over all of the past"),
    "glu_linear_offset": (0.0, "gated MLPs add a number to the half that is not activated"),
    "heterogeneous_layers_config_path": (None, "layers differ in what they are made of"),
    "layernorm_zero_centered_gamma": (False, "norms store their weight minus 1"),
    "multi_latent_attention": (False, "attention is multi-latent"),
    "no_rope_freq": (None, "some layers have no RoPE"),
    "normalization": ("RMSNorm", "norms are not RMSNorm"),
    "num_experts": (None, "the MLPs are mixtures of experts"),
    "position_embedding_type": ("rope", "positions are not RoPE"),
    "qk_l2_norm": (False, "queries and keys are normalized without weights"),
    "rotary_interleaved": (False, "RoPE pairs neighbouring channels, not the two halves"),
    "rotary_percent": (1.0, "RoPE turns only a part of the channels"),
    "rotary_seq_len_interpolation_factor": (None, "RoPE's positions are interpolated"),
    "softmax_type": ("vanilla", "attention's softmax has one term more in its denominator"),
    "use_mup": (False, "embeddings, attention and logits are scaled by muP"),
    "window_size": (None, "attention sees a window only"),
}


def refusals(args: Mapping[str, Any]) -> list[str]:
    """Why a model with these arguments of Megatron's is no such Llama, one line each."""
    return [
        f"{name}={args[name]!r}: {reason}"
        for name, (llama, reason) in LLAMA.items()
        # a feature that an older Megatron has no argument for is not there
        if name in args and not isinstance(args[name], Opaque) and args[name] != llama
    ]


def scales_rope(args: Mapping[str, Any]) -> bool:
    """Whether Megatron's model of these arguments scales RoPE; HybridModel never does."""
    return bool(args.get("use_rope_scaling")) and _hybrid_pattern(args) is None


def _hybrid_pattern(args: Mapping[str, Any]) -> str | None:
    # older Megatrons have the second name, newer ones both
    return args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")


def _num_layers(values: Mapping[str, Any]) -> int:
    """Pairs of layers: a hybrid model counts attention and MLP apart."""
    pattern = _hybrid_pattern(values)
    if pattern is None:
        return int(values["num_layers"])
    # the part behind / is of MTP, | cuts pipeline stages
    layers = pattern.partition("/")[0].replace("|", "")
    if layers != "*-" * (len(layers) // 2) or not layers:
        raise UserError(
            f"hybrid_layer_pattern={pattern!r} has no place in a Llama-like architecture: layers "
            f"must be attention and MLP in turns (*-*-...)."
        )
    return len(layers) // 2


def _activation(values: Mapping[str, Any], has_alphas: bool) -> Activation:
    if has_alphas or values.get("xielu"):
        if values.get("swiglu") or values.get("squared_relu"):
            raise UserError(
                "The checkpoint holds xIELU's alphas, and its arguments say swiglu or squared_relu."
            )
        return "xielu"
    if values.get("swiglu"):
        return "swiglu"
    if values.get("squared_relu"):
        return "relu2"
    raise UserError(
        "The checkpoint's MLPs have neither xIELU (there are no alphas) nor SwiGLU nor squared "
        "ReLU by its arguments; nothing else can be exported."
    )
