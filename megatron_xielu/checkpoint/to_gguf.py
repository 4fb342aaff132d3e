"""A Hugging Face folder of Apertus to a GGUF file, which llama.cpp runs.

llama.cpp has xIELU in its Apertus model alone: one pair of alphas per layer, before softplus, in
the file's header. Queries and keys keep their order, for both sides rotate halves. Weights are
written one after the other, so that memory is that of the largest in its own type, in float32 and
as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_xielu.checkpoint.hf_model import HfFolder
from megatron_xielu.checkpoint.mapping import LM_HEAD
from megatron_xielu.checkpoint.verify import VerifyError, check_keys
from megatron_xielu.errors import UserError
from megatron_xielu.folders import new_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

GgufType = Literal["f32", "bf16", "q8_0"]
_EMBEDDING = "model.embed_tokens.weight"
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufFile:
    """What was written."""

    path: Path
    dtype: GgufType
    """Of the matrices; norms, alphas and rotary factors are f32."""
    num_tensors: int
    num_bytes: int
    """Of the tensors."""
    tokenizer: str | None
    """llama.cpp's name of the pre-tokenizer, None where no tokenizer was written."""


@dataclass(frozen=True, kw_only=True)
class _Apertus:
    """What config.json says that the file's header or the shapes depend on."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    rope_theta: float
    rope_factors: list[float] | None
    """What llama3 scaling divides each of the head_dim / 2 frequencies by."""


def convert_to_gguf(
    hf_dir: Path,
    out: Path,
    *,
    dtype: GgufType | None = None,
    tokenizer: bool = True,
    progress: Callable[[str], None] = print,
) -> GgufFile:
    """Writes the Apertus model and the tokenizer of a Hugging Face folder to one GGUF file.

    Args:
        hf_dir: a folder with config.json and safetensors files.
        out: must not exist; it appears complete or not at all.
        dtype: of the matrices. None keeps the folder's: bf16 where all are bf16, else f32.
        tokenizer: False writes none; llama.cpp then takes and gives token ids only.

    Raises:
        UserError: llama.cpp cannot hold the model or the tokenizer, config and tensors disagree, or
            the file exists or cannot be written.
    """
    import gguf

    hf_dir, out = Path(hf_dir), Path(out)
    _refuse_existing(out)
    folder = HfFolder(hf_dir)
    model = _read_config(folder)
    try:
        check_keys(folder)
    except VerifyError as error:
        raise UserError(f"config.json and tensors disagree: {error}") from error
    chosen = dtype or _type_of(folder)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.APERTUS])
    _add_model(writer, hf_dir, model, chosen)
    _add_alphas(writer, folder, model)
    kind = None
    if tokenizer:
        kind = _add_tokenizer(writer, hf_dir, model.vocab)
    else:
        writer.add_tokenizer_model("no_vocab")
    plan = _add_tensors(writer, folder, model, chosen)
    num_bytes = sum(tensor.nbytes for tensor in writer.tensors[0].values())
    progress(f"{hf_dir}: {len(plan)} tensors, {num_bytes / 1e9:.3g} GB as {chosen}")
    with _written(out) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, raw in plan.items():
            writer.write_tensor_data(_encode(_read(folder, name, model), raw))
        writer.close()
    progress(f"wrote {out}: {kind or 'no'} tokenizer")
    return GgufFile(out, chosen, len(plan), num_bytes, kind)


def _read_config(folder: HfFolder) -> _Apertus:
    hf_dir, config = folder.path, folder.config
    if folder.target.name != "apertus":
        why = "Only Apertus is written here; llama.cpp's own converter has this class."
        if config.get("hidden_act") == "xielu":
            why = (
                "llama.cpp computes xIELU in its Apertus alone, which has QK-norm. Train with "
                "model.qk_layernorm=true to get there."
            )
        raise UserError(f"{hf_dir} is of the class {folder.target.class_name}. {why}")
    expected = {
        "hidden_act": "xielu",
        "attention_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "post_norm": False,
    }
    wrong = [
        f"{key} is {config[key]!r} instead of {value!r}"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise UserError(
            f"llama.cpp's Apertus cannot hold {hf_dir}: in config.json {'; '.join(wrong)}."
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        theta, factors = _rope(hf_dir, config, head_dim)
        return _Apertus(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            ffn=config["intermediate_size"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            epsilon=config["rms_norm_eps"],
            rope_theta=theta,
            rope_factors=factors,
        )
    except KeyError as error:
        raise UserError(
            f"{hf_dir / 'config.json'} lacks {error}, whose default depends on who reads it. Add "
            f"it with the value that the model was trained with."
        ) from error


def _rope(hf_dir: Path, config: dict[str, Any], head_dim: int) -> tuple[float, list[float] | None]:
    """Base and factors; transformers 5 keeps both in rope_parameters, transformers 4 apart."""
    scaling = config.get("rope_parameters")
    if scaling is None:
        # null means none; without the key transformers scales as Llama 3.1 does
        scaling = config["rope_scaling"] or {}
    theta = scaling["rope_theta"] if "rope_theta" in scaling else config["rope_theta"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{hf_dir / 'config.json'}: rope_type {kind!r} cannot be written; default and llama3 "
            f"can."
        )
    return theta, llama3_factors(theta, head_dim, scaling)


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> list[float]:
    """What llama3 rope scaling divides each frequency theta^(-2i/head_dim) by, in float64.

    Waves longer than original_max_position_embeddings / low_freq_factor are stretched by `factor`,
    those shorter than the same / high_freq_factor not at all, and between the two the inverse goes
    linearly with the frequency (Llama 3.1's rule, `_compute_llama3_parameters` in transformers).

    Raises:
        KeyError: a parameter is missing.
    """
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(head_dim // 2):
        turns = context * theta ** (-2 * i / head_dim) / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / (share + (1 - share) / factor))
    return factors


def _type_of(folder: HfFolder) -> GgufType:
    stored = {spec.dtype for spec in folder.specs.values() if len(spec.shape) == 2}
    return "bf16" if stored == {torch.bfloat16} else "f32"


def _add_model(writer: GGUFWriter, hf_dir: Path, model: _Apertus, dtype: GgufType) -> None:
    import gguf

    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_name(hf_dir.resolve().name)
    writer.add_file_type(file_types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.groups)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab)


def _add_alphas(writer: GGUFWriter, folder: HfFolder, model: _Apertus) -> None:
    for kind in ("alpha_p", "alpha_n", "beta", "eps"):
        names = [f"model.layers.{i}.mlp.act_fn.{kind}" for i in range(model.layers)]
        getattr(writer, f"add_xielu_{kind}")([folder.read(name).item() for name in names])


def _add_tokenizer(writer: GGUFWriter, hf_dir: Path, vocab_size: int) -> str:
    from megatron_xielu.checkpoint.gguf_tokenizer import read_tokenizer

    tokenizer = read_tokenizer(hf_dir, vocab_size)
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    for role, id_ in tokenizer.special.items():
        getattr(writer, f"add_{role}_token_id")(id_)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.add_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return f"{tokenizer.model}/{tokenizer.pre}"


def _add_tensors(
    writer: GGUFWriter, folder: HfFolder, model: _Apertus, dtype: GgufType
) -> dict[str, GGMLQuantizationType]:
    """Announces every tensor; returns their types in the order in which they must be written."""
    import gguf
    import numpy as np

    shapes = {name: spec.shape for name, spec in folder.specs.items() if ".act_fn." not in name}
    # where embeddings are tied they are written twice: llama.cpp's Apertus demands an output matrix
    shapes[LM_HEAD] = shapes[_EMBEDDING]
    if model.rope_factors is not None:
        shapes[_ROPE_FREQS] = (len(model.rope_factors),)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.APERTUS, model.layers)
    plan: dict[str, GGMLQuantizationType] = {}
    for name, shape in shapes.items():
        raw = gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            raw = gguf.GGMLQuantizationType[dtype.upper()]
        block, size = gguf.GGML_QUANT_SIZES[raw]
        if shape[-1] % block:
            raise UserError(
                f"{name} has rows of {shape[-1]} numbers; {dtype} packs {block} at a time. Use "
                f"--dtype bf16."
            )
        target = names.get_name(name, try_suffixes=(".weight",)) or name
        num_bytes = math.prod(shape) // block * size
        writer.add_tensor_info(target, shape, np.dtype(np.float32), num_bytes, raw)
        plan[name] = raw
    return plan


def _read(folder: HfFolder, name: str, model: _Apertus) -> Tensor:
    if name == _ROPE_FREQS:
        return torch.tensor(model.rope_factors, dtype=torch.float32)
    return folder.read(_EMBEDDING if name == LM_HEAD and folder.tied else name)


def _encode(tensor: Tensor, raw: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    import gguf

    if raw is gguf.GGMLQuantizationType.BF16:
        # numpy has no bf16; the same bytes
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return gguf.quantize(tensor.float().numpy(), raw)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists. Choose another name, or move that one away.")


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    try:
        with new_file(out) as partial:
            yield partial
            # what came while this one was written
            _refuse_existing(out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}. Nothing was left.") from error
