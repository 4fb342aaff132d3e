"""Small exports with trained alphas, what Megatron computes of them, and what the clients said."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from megatron_xielu.checkpoint.hf_model import load_exact
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.recipes import to_yaml
from tests.clients.record import Record
from tests.ranks import run_ranks

WRITE_CHECKPOINT = Path(__file__).parents[1] / "checkpoint"
# these tests read what the checkpoint tests write
sys.path.append(str(WRITE_CHECKPOINT))
NEW_TOKENS = 24
ARCEE, APERTUS, TIED = "Arcee", "Apertus", "Apertus (tied, llama3 rope)"


@dataclass(frozen=True)
class Export:
    """A Hugging Face folder of a model of 4 layers, whose alphas differ from layer to layer."""

    model: str
    folder: Path
    prompts: list[list[int]]
    logits: list[Tensor]
    """Megatron's own, in fp32, of every position of the prompts: (tokens, vocabulary)."""
    greedy: list[list[int]]
    """The most probable NEW_TOKENS tokens after each prompt, with the alphas exact."""

    @property
    def vocab_size(self) -> int:
        return self.logits[0].shape[-1]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """These models are so small that more threads only wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece BPE of 384 ids, trained on English, as tokenizer.model and tokenizer.json."""
    import sentencepiece
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    model = io.BytesIO()
    lines = (line for text in list(topics.values())[:30] for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Export]:
    """The exports by architecture, from checkpoints of true Megatron models; not to be changed."""
    from checkpoint_layouts import recipe_of
    from write_checkpoint import PROMPTS, Job

    root = tmp_path_factory.mktemp("exports")
    models: dict[str, dict[str, object]] = {
        ARCEE: {},
        APERTUS: {"qk_layernorm": True},
        TIED: {"qk_layernorm": True, "tie_embeddings": True, "rope_scaling_factor": 4.0},
    }
    for index, changes in enumerate(models.values()):
        recipe = recipe_of("gqa")
        # heads of 32: vLLM has no attention for 16, and mlx-lm demands hidden_size / heads
        sizes = {"vocab_size": 384, "padded_vocab_size": None}
        model = replace(recipe.model, hidden_size=128, seq_length=64, **sizes, **changes)
        recipe = replace(recipe, model=model)
        (root / f"run{index}").mkdir()
        (root / f"run{index}" / "recipe.yaml").write_text(to_yaml(recipe))
    jobs = [asdict(Job(run_dir=str(root / f"run{index}"))) for index in range(len(models))]
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(WRITE_CHECKPOINT / "write_checkpoint.py", [str(root / "jobs.json")], 1)
    found = {}
    for index, name in enumerate(models):
        run, folder = root / f"run{index}", root / f"hf{index}"
        convert_to_hf(run, folder, tokenizer=tokenizer, progress=lambda line: None)
        logits = [each[:, :384] for each in torch.load(run / "logits.pt")]
        found[name] = Export(name, folder, PROMPTS, logits, greedy(folder, PROMPTS))
    return found


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model, found = load_exact(folder), []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    # no client may stop early
    assert not any(model.config.eos_token_id in ids for ids in found)
    return found


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Collects what every test saw; written at the end, for tools/clients_table.py."""
    found = Record()
    yield found
    found.save()
