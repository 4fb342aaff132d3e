"""Load an export with stock transformers, quietly, and with its alphas as they were trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.errors import UserError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No notices and progress bars of transformers inside; its own settings come back after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(hf_dir: Path) -> dict[str, Any]:
    """config.json; raises UserError if the folder has none."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{hf_dir} is not a Hugging Face model folder: it has no config.json.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def tensor_files(hf_dir: Path) -> dict[str, Path]:
    """The file of every tensor that the folder's safetensors files hold."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    for path in sorted(Path(hf_dir).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}. Convert again.") from error
    if not files:
        raise UserError(f"{hf_dir} holds no safetensors file.")
    return files


def read_tensors(files: dict[str, Path], names: Sequence[str]) -> list[Tensor]:
    """The named tensors, in order."""
    from safetensors import safe_open

    tensors = []
    for name in names:
        with safe_open(files[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return tensors


def load_stock(hf_dir: Path) -> tuple[Any, dict[str, Any]]:
    """(model in fp32, loading info), as any user of transformers gets them."""
    from transformers import AutoModelForCausalLM

    load_config(hf_dir)
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(hf_dir), dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    model, info = loaded
    return model.eval(), info


def restore_alphas(model: Any, hf_dir: Path) -> None:
    """Undo the rounding of alphas, beta and eps to bf16 that transformers does when it loads Arcee.

    `ACT2FN["xielu"]` builds the activation in bf16 whatever the model's dtype, and loading casts to
    that. The files hold fp32.
    """
    files = tensor_files(hf_dir)
    names = [name for name in files if ".act_fn." in name]
    for name, module in model.named_modules():
        if name.endswith(".act_fn"):
            module.float()
    state = dict(zip(names, read_tensors(files, names), strict=True))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected


def load_exact(hf_dir: Path) -> Any:
    """The model in fp32 with its alphas exactly as exported."""
    model, _ = load_stock(hf_dir)
    restore_alphas(model, hf_dir)
    return model


@torch.inference_mode()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 logits (tokens, vocabulary) of each prompt."""
    return [model(torch.tensor([list(prompt)])).logits[0].float() for prompt in prompts]


def hf_logits(hf_dir: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 logits (tokens, vocabulary) of stock transformers with the exact alphas."""
    return logits_of(load_exact(hf_dir), prompts)
