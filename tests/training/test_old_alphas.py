"""Checkpoints with the alphas of the swiss-ai fork: (layers,) or (layers, 1), in bf16."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.manifest import MANIFEST
from megatron_xielu.checkpoint.mapping import locate, read_weight
from megatron_xielu.checkpoint.store import LATEST
from megatron_xielu.checkpoint.targets import TARGETS
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.recipes import load_recipe
from tests.training.test_pretrain import command, metrics, run, saved

ALPHAS = {f"decoder.layers.mlp.activation_func.alpha_{sign}": sign for sign in "pn"}
LAYERS = 4


def old_form(step: Path, target: Path, flat: bool) -> dict[str, Tensor]:
    """Rewrite a checkpoint as the fork's, with a common.pt; returns its alphas.

    The alphas get values of their own, one per layer.
    """
    shutil.copytree(step, target)
    (target / MANIFEST).unlink()
    metadata = FileSystemReader(target).read_metadata()
    alphas = {
        name: (torch.arange(LAYERS) / 8 + (0.25 if sign == "p" else -1.5)).bfloat16()
        for name, sign in ALPHAS.items()
    }
    shard = "__0_0.distcp"
    for name, values in alphas.items():
        stored = values if flat else values.view(LAYERS, 1)
        chunk = ChunkStorageMetadata(torch.Size([0] * stored.dim()), stored.shape)
        properties = TensorProperties.create_from_tensor(stored)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(
            properties, stored.shape, [chunk]
        )
        for index in [index for index in metadata.storage_data if index.fqn == name]:
            del metadata.storage_data[index]
        with (target / shard).open("ab") as file:
            begin = file.tell()
            torch.save(stored, file)
            place = _StorageInfo(shard, begin, file.tell() - begin)
        metadata.storage_data[MetadataIndex(name, chunk.offsets, 0)] = place
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"iteration": 5, "checkpoint_version": 3.0}, target / "common.pt")
    return alphas


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run(command(folder, data_dir))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("flat", [True, False], ids=["(L,)", "(L, 1)"])
def test_they_are_start_weights(flat: bool, finished: Path, data_dir: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    step = finished / "checkpoints/iter_0000005"
    alphas = old_form(step, old / "iter_0000005", flat)
    (old / LATEST).write_text("5")
    folder = tmp_path / "run"
    # a learning rate of zero: what is saved is what was loaded
    flags = ["--load", str(old), "--finetune", "--no-load-optim", "--no-load-rng", "--lr", "0"]
    cut = "parallel.pipeline_model_parallel_size=2"
    done = run(command(folder, data_dir, cut, flags=flags))
    assert done.returncode == 0, done.stderr
    got, expected = saved(folder, 5), saved(finished, 5)
    for name, values in alphas.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], values.float().view(LAYERS, 1))
    weight = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(got[weight], expected[weight])
    shown = next(r for r in metrics(folder) if r["type"] == "train")["alpha_p"]
    softplus = torch.nn.functional.softplus(alphas[next(iter(ALPHAS))].float())
    assert shown == pytest.approx(softplus.tolist(), rel=1e-6)
    log = (folder / "logs/rank_00000.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("converted from the checkpoint")]
    print("\n".join(said))
    stored = f"({LAYERS},)" if flat else f"({LAYERS}, 1)"
    for name in ALPHAS:
        text = f"{name}: {stored} torch.bfloat16, read as ({LAYERS}, 1) torch.float32"
        assert sum(text in line for line in said) == 1


def test_they_can_be_exported(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000005"
    alphas = old_form(finished / "checkpoints/iter_0000005", target, flat=True)
    recipe = load_recipe(str(finished / "recipe.yaml"))
    assert recipe.model.vocab_size is not None
    arch = Architecture.of_recipe(recipe, recipe.model.vocab_size)
    reader = TorchDistReader(target)
    found = {}
    for placement in locate(reader, arch):
        if placement.entry.flat:
            found[placement.hf_names(TARGETS["arcee"])[0]] = read_weight(reader, placement, arch)
    assert len(found) == 2 * LAYERS
    for name, sign in ALPHAS.items():
        for layer in range(LAYERS):
            value = found[f"model.layers.{layer}.mlp.act_fn.alpha_{sign}"]
            assert value.shape == (1,)
            assert torch.equal(value, alphas[name][layer : layer + 1])
