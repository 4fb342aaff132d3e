from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_xielu.checkpoint.generate import generate_text
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.errors import UserError


@pytest.fixture(scope="module")
def export(
    runs: dict[str, Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("export") / "gqa"
    convert_to_hf(runs["gqa"], out, tokenizer=tokenizer, progress=lambda line: None)
    return out


def test_the_seed_decides(export: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = ["rewrite", "preload unthink"]
    state = torch.get_rng_state()
    first = generate_text(export, prompts, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == generate_text(export, prompts, max_new_tokens=8, seed=1)
    assert first != generate_text(export, prompts, max_new_tokens=8, seed=2)
    assert len(first) == 2
    assert not any(text.startswith(prompt) for prompt, text in zip(prompts, first, strict=True))
    assert capfd.readouterr() == ("", "")


def test_bad_prompts(export: Path) -> None:
    with pytest.raises(UserError, match=r"prompt '' has 0 tokens; with 8 new ones it must have 1"):
        generate_text(export, [""], max_new_tokens=8, seed=1)
    with pytest.raises(UserError, match=r"must have 1 to 24: the context is 32"):
        generate_text(export, ["x y z " * 20], max_new_tokens=8, seed=1)


def test_no_tokenizer(runs: dict[str, Path], tmp_path: Path) -> None:
    convert_to_hf(runs["gqa"], tmp_path / "out", progress=lambda line: None)
    with pytest.raises(UserError, match=r"holds no tokenizer, so text cannot become tokens"):
        generate_text(tmp_path / "out", ["a"], max_new_tokens=1, seed=1)
