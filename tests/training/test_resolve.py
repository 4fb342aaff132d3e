from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xielu.analysis.planner import count_parameters
from megatron_xielu.data.manifest import load_info
from megatron_xielu.recipes import load_recipe
from megatron_xielu.training.resolve import Machine, resolve


@pytest.mark.parametrize(
    ("num_ids", "given", "sizes"),
    [
        (500, [], (500, 512)),
        (512, [], (512, None)),
        (500, ["model.padded_vocab_size=640"], (500, 640)),
        # the recipe's rows are the model's, none of them padding, whatever the tokenizer uses
        (500, ["model.vocab_size=600"], (600, None)),
    ],
)
def test_vocabulary_of_the_data(
    data_dir: Path, num_ids: int, given: list[str], sizes: tuple[int, int | None]
) -> None:
    data = replace(load_info(data_dir), vocab_size=num_ids)
    machine = Machine("cpu", 0, has_transformer_engine=False, has_gradient_fusion=False)
    model = resolve(load_recipe("tiny", given), machine, data).model
    assert (model.vocab_size, model.padded_vocab_size) == sizes
    rows = sizes[1] or sizes[0]
    assert count_parameters(model) == count_parameters(replace(model, vocab_size=rows))
