from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import LAYOUTS, recipe_of, target_of
from index_file import edit_index, rename_keys
from torch.distributed.checkpoint.metadata import Metadata
from write_checkpoint import weight_of

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.mapping import (
    TABLE,
    XIELU_CONSTANTS,
    hf_shapes,
    locate,
    merge_qkv,
    read_weight,
    split_qkv,
    table,
)
from megatron_xielu.checkpoint.targets import TARGETS, SpecialTokens, hf_config
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError

VOCAB = 320
QKV = "decoder.layers.self_attention.linear_qkv.weight"


def open_layout(run: Path, layout: str) -> tuple[TorchDistReader, Architecture]:
    reader = TorchDistReader(run / "checkpoints" / "iter_0000200")
    return reader, Architecture.of_recipe(recipe_of(layout), VOCAB)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_exactly_those_of_transformers(
    runs: dict[str, Path], layout: str
) -> None:
    import transformers

    reader, arch = open_layout(runs[layout], layout)
    target = TARGETS[target_of(layout)]
    shapes: dict[str, tuple[int, ...]] = {}
    for placement in locate(reader, arch):
        shapes |= hf_shapes(placement, arch, target)
    if arch.activation == "xielu":
        for name in XIELU_CONSTANTS:
            shapes |= {name.format(i=layer): () for layer in range(arch.num_layers)}
    content = hf_config(target, arch, SpecialTokens(), torch.float32)
    config = transformers.AutoConfig.for_model(**content)
    with torch.device("meta"):
        stock = getattr(transformers, target.class_name)(config).state_dict()
    if arch.tie_embeddings:
        del stock["lm_head.weight"]
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stock.items()}


def test_gates_of_two_ranks_lie_before_the_others(runs: dict[str, Path]) -> None:
    # each rank holds a part of both, one above the other; the checkpoint does not
    reader, arch = open_layout(runs["llama-tp2"], "llama-tp2")
    (fc1,) = (p for p in locate(reader, arch) if p.key.endswith("fc1.weight") and p.layer == 1)
    whole = weight_of("decoder.layers.mlp.linear_fc1.weight", (4, 192, 64))[1]
    gate, up = fc1.entry.split(read_weight(reader, fc1, arch), arch)
    assert torch.equal(gate, whole[:96])
    assert torch.equal(up, whole[96:])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_qkv_splits_by_group(heads: int, groups: int) -> None:
    arch = Architecture.of_recipe(recipe_of("gqa"), VOCAB)
    arch = replace(arch, num_attention_heads=heads, num_query_groups=groups, head_dim=3)
    rows, names = [], []
    # every row holds the number of its head, so the split shows where each one went
    for group in range(groups):
        queries = range(group * heads // groups, (group + 1) * heads // groups)
        names += [f"q{head}" for head in queries] + [f"k{group}", f"v{group}"]
    for number in range(len(names)):
        rows += [torch.full((1, 5), float(number))] * arch.head_dim
    qkv = torch.cat(rows)
    parts = split_qkv(qkv, arch)
    for letter, part, count in zip("qkv", parts, (heads, groups, groups), strict=True):
        order = [names[int(value)] for value in part[:: arch.head_dim, 0]]
        assert order == [f"{letter}{head}" for head in range(count)]
    assert torch.equal(merge_qkv(parts, arch), qkv)


def test_every_entry_goes_both_ways() -> None:
    arch = Architecture.of_recipe(recipe_of("gqa"), VOCAB)
    for number, entry in enumerate(TABLE):
        weight = torch.randn(entry.shape(arch), generator=torch.Generator().manual_seed(number))
        parts = entry.split(weight, arch)
        assert len(parts) == len(entry.hf)
        assert torch.equal(entry.merge(parts, arch), weight), entry.hf
    for gated in (True, False):
        some = replace(arch, activation="swiglu" if gated else "xielu")
        names = [name for entry in table(some) for name in entry.hf]
        assert len(names) == len(set(names))


def test_tied_embeddings_have_no_output_layer() -> None:
    tied, untied = (
        Architecture.of_recipe(recipe_of(name), VOCAB) for name in ("mha-tied-pp2", "gqa")
    )
    assert len(table(untied)) == len(table(tied)) + 1


def test_layers_are_in_order_and_padding_is_cut(runs: dict[str, Path]) -> None:
    reader, arch = open_layout(runs["gqa"], "gqa")
    placements = locate(reader, arch)
    layers = [placement.layer for placement in placements if placement.layer is not None]
    assert layers == sorted(layers)
    assert [placement.layer for placement in placements[:1] + placements[-2:]] == [None] * 3
    assert read_weight(reader, placements[0], arch).shape == (VOCAB, 64)
    assert reader.shape(placements[0].key) == (384, 64)


@pytest.mark.parametrize("layout", ["gqa", "mha-tied-per-layer"])
def test_norms_under_either_name(copy_run: Callable[[str], Path], layout: str) -> None:
    run = copy_run(layout)
    fused = locate(*open_layout(run, layout))
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }

    def rename(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    rename_keys(run / "checkpoints" / "iter_0000200", rename)
    own = locate(*open_layout(run, layout))
    assert [(p.entry, p.layer) for p in own] == [(p.entry, p.layer) for p in fused]
    assert [p.key for p in own] == [rename(p.key) for p in fused]


def test_unknown_key_is_named(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")
    # a tensor that Adam's state becomes a weight of
    rename_keys(
        run / "checkpoints" / "iter_0000200",
        lambda key: (
            key.replace("optimizer.state.exp_avg.", "").replace(
                "linear_proj.weight", "linear_gate.weight"
            )
            if key.startswith("optimizer.")
            else key
        ),
    )
    with pytest.raises(UserError, match=r"no place for: decoder\..*linear_gate\.weight\. Is"):
        locate(*open_layout(run, "gqa"))


def test_unknown_object_is_named(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")
    rename_keys(
        run / "checkpoints" / "iter_0000200",
        lambda key: key.replace("mlp.linear_fc1._extra_state", "mlp.linear_fc1.lookup"),
    )
    with pytest.raises(UserError, match=r"unknown part of the model: .*linear_fc1\.lookup"):
        locate(*open_layout(run, "gqa"))


@pytest.mark.parametrize(
    ("layout", "missing", "message"),
    [
        ("gqa", QKV, r"has no decoder\.layers\.self_attention\.linear_qkv\.weight, which becomes"),
        (
            "mha-tied-per-layer",
            "decoder.layers.2.mlp.activation_func.alpha_n",
            r"holds no tensor 'decoder\.layers\.2\.mlp\.activation_func\.alpha_n'. Nearest",
        ),
        ("gqa", "output_layer.weight", r"has no output_layer\.weight, which becomes lm_head"),
    ],
)
def test_missing_key_is_named(
    copy_run: Callable[[str], Path], layout: str, missing: str, message: str
) -> None:
    run = copy_run(layout)
    rename_keys(run / "checkpoints" / "iter_0000200", lambda key: None if key == missing else key)
    with pytest.raises(UserError, match=message):
        locate(*open_layout(run, layout))


def test_one_weight_under_two_names(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")
    rename_keys(
        run / "checkpoints" / "iter_0000200",
        lambda key: "decoder.layers.input_layernorm.weight" if "fc1.layer_norm" in key else key,
    )
    with pytest.raises(UserError, match=r"one weight under two names: .*layer_norm_weight and"):
        locate(*open_layout(run, "gqa"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"has shape \(4, 64\), the recipe and tokenizer mean \(3, 64\)"),
        ({"ffn_hidden_size": 192}, r"fc1\.weight has shape \(4, 96, 64\).*mean \(4, 192, 64\)"),
        ({"vocab_size": 400}, r"word_embeddings\.weight has shape \(384, 64\).*mean \(400, 64\)"),
        ({"tie_embeddings": True}, r"and tied embeddings has no place for: output_layer\.weight"),
    ],
)
def test_another_models_recipe(runs: dict[str, Path], change: dict[str, int], message: str) -> None:
    reader, arch = open_layout(runs["gqa"], "gqa")
    with pytest.raises(UserError, match=message):
        locate(reader, replace(arch, **change))


def test_more_stored_layers_than_the_recipe_has(runs: dict[str, Path]) -> None:
    reader, arch = open_layout(runs["mha-tied-per-layer"], "mha-tied-per-layer")
    with pytest.raises(
        UserError, match=r"of 3 layers and tied .* no place for: decoder\.layers\.3"
    ):
        locate(reader, replace(arch, num_layers=3))


def add_mtp(step: Path) -> None:
    """What Adam keeps of a layer becomes a weight of a layer of multi-token prediction."""
    rename_keys(
        step,
        lambda key: (
            key.replace("optimizer.state.exp_avg.decoder.layers", "mtp.layers.0")
            if key.startswith("optimizer.")
            else key
        ),
    )


def test_multi_token_prediction_is_dropped_only_when_asked(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")
    before = locate(*open_layout(run, "gqa"))
    add_mtp(run / "checkpoints" / "iter_0000200")
    with pytest.raises(UserError, match=r"multi-token prediction \(mtp\.layers.*--drop-mtp leaves"):
        locate(*open_layout(run, "gqa"))
    assert locate(*open_layout(run, "gqa"), drop_mtp=True) == before


def test_numbers_without_their_scale_are_refused(copy_run: Callable[[str], Path]) -> None:
    run = copy_run("gqa")

    def store_fp8(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
        entry.properties.dtype = torch.float8_e4m3fn

    edit_index(run / "checkpoints" / "iter_0000200", store_fp8)
    with pytest.raises(UserError) as error:
        locate(*open_layout(run, "gqa"))
    message = str(error.value)
    assert "fc2.weight is stored as float8_e4m3fn; only float32, bfloat16 and float16" in message
    assert "so another program saved these: load the checkpoint with it and save" in message
