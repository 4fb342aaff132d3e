"""Text from an export, with stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_xielu.checkpoint.hf_model import load_exact, quiet_transformers
from megatron_xielu.errors import UserError


def generate_text(
    hf_dir: Path, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """Samples one continuation of each prompt, without the prompt itself.

    The same seed gives the same text; the process's random state is left as it was.

    Raises:
        UserError: the folder is no export or holds no tokenizer, or a prompt is empty or too long.
    """
    if not (Path(hf_dir) / "tokenizer_config.json").is_file():
        raise UserError(
            f"{hf_dir} holds no tokenizer, so text cannot become tokens. Convert again with the "
            f"tokenizer's folder."
        )
    from transformers import AutoTokenizer

    model = load_exact(hf_dir)
    tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    context = model.config.max_position_embeddings
    texts = []
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            length = inputs["input_ids"].shape[1]
            if not 0 < length <= context - max_new_tokens:
                raise UserError(
                    f"prompt {prompt!r} has {length} tokens; with {max_new_tokens} new ones it "
                    f"must have 1 to {context - max_new_tokens}: the context is {context}."
                )
            output = model.generate(
                **inputs,
                do_sample=True,
                max_new_tokens=max_new_tokens,
                pad_token_id=_pad(tokenizer.pad_token_id, tokenizer.eos_token_id),
            )
            texts.append(str(tokenizer.decode(output[0, length:], skip_special_tokens=True)))
    return texts


def _pad(pad: int | None, eos: int | None) -> int | None:
    # one prompt at a time is never padded; naming an id spares a notice
    return eos if pad is None else pad
