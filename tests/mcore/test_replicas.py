"""The hash that stands for a parameter, and what is said of copies that differ."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_xielu.mcore.places import place
from megatron_xielu.mcore.replicas import Difference, fingerprint

SHAPES = [(), (1,), (3,), (64,), (1023,), (1024, 2), (37, 129), (3, 5, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.rand(shape) * 100).to(dtype)
    before = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == before
    data = tensor.reshape(-1).view(torch.uint8)
    # every byte of the small ones, and some of all parts of the large ones
    for at in range(0, len(data), max(1, len(data) // 61)):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert int(fingerprint(tensor)) != before, (at, bit)
            data[at] ^= 1 << bit
    assert int(fingerprint(tensor)) == before


def test_the_place_of_a_number_counts() -> None:
    torch.manual_seed(0)
    tensor = torch.rand(6, 2050)
    seen = {int(fingerprint(tensor))}
    pairs = list(itertools.product((0, 1, 5), (0, 1, 1024, 2049)))
    for (i, j), (k, m) in itertools.combinations(pairs, 2):
        swapped = tensor.clone()
        swapped[i, j], swapped[k, m] = tensor[k, m], tensor[i, j]
        seen.add(int(fingerprint(swapped)))
    rows, columns = torch.arange(5, -1, -1), torch.arange(2049, -1, -1)
    seen |= {int(fingerprint(tensor[rows])), int(fingerprint(tensor[:, columns]))}
    assert len(seen) == 1 + len(pairs) * (len(pairs) - 1) // 2 + 2


def test_how_the_memory_lies_does_not_count() -> None:
    tensor = torch.rand(33, 70)
    expected = int(fingerprint(tensor))
    assert int(fingerprint(tensor.t().contiguous().t())) == expected
    # a view that does not begin at a whole word, as in a buffer of many parameters
    buffer = torch.empty(tensor.numel() + 1)
    buffer[1:] = tensor.reshape(-1)
    assert int(fingerprint(buffer[1:].view(33, 70))) == expected
    assert int(fingerprint(torch.tensor([0.0]))) != int(fingerprint(torch.tensor([-0.0])))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([7, 8], "w: ranks 0-1 differ (copies)"),
        ([7, 7, 8, 7], "w: rank 2 against ranks 0-1, 3 (copies)"),
        ([7, 7, 8, 8], "w: ranks 0-3 differ (copies)"),
        ([7] * 14 + [8, 9], "w: ranks 14-15 against ranks 0-13 (copies)"),
    ],
)
def test_the_ranks_that_differ_are_named(values: list[int], text: str) -> None:
    assert str(Difference("w", "copies", dict(enumerate(values)))) == text


def test_a_place_counts_layers_over_the_pipeline() -> None:
    layer = torch.nn.Module()
    layer.layer_number = 7  # type: ignore[assignment]
    chunk, inner, decoder = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([layer])
    inner.decoder = decoder
    inner.mtp = decoder
    chunk.module = inner
    assert place(chunk, "module.decoder.layers.0.mlp.weight") == "layer 7, mlp.weight"
    assert place(chunk, "module.decoder.layers.0") == "layer 7"
    assert place(chunk, "module.mtp.layers.0.eh_proj") == "MTP layer 7, eh_proj"
    assert place(chunk, "module.decoder.final_layernorm") == "decoder.final_layernorm"
