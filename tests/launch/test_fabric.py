"""`launch --fabric`: every way to start ranks gives them what the network between nodes needs."""

from __future__ import annotations

import re

import pytest
import yaml

from megatron_xielu import cli
from megatron_xielu.launch import kubernetes, local, slurm
from megatron_xielu.launch.job import FABRICS, Job, settings
from megatron_xielu.recipes import load_recipe
from tests.launch.test_launch import own_address


def job(fabric: str | None) -> Job:
    return Job(recipe="llama-3b-xielu", nodes=2, gpus_per_node=8, fabric=fabric)  # type: ignore[arg-type]


@pytest.mark.parametrize("fabric", FABRICS)
def test_every_start_gets_what_the_fabric_needs(
    fabric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    wanted = {
        setting.name: setting.value
        for setting in settings(load_recipe("llama-3b-xielu"), [], job(fabric).fabric)
    }
    # TCP is taken where it is asked for, and nowhere else
    assert (wanted["NCCL_NET"] == "Socket") is (fabric == "ethernet")
    head = own_address()
    batch = slurm.render(job(fabric), time="1:00:00")
    here = local.render(job(fabric), head)
    for script in (batch, here):
        exported = dict(re.findall(r"^export (\w+)=(.*)$", script, re.MULTILINE))
        assert wanted.items() <= exported.items()
    interface = re.search(r"^export NCCL_SOCKET_IFNAME=(.*)$", here, re.MULTILINE)
    assert (interface is not None) is (fabric == "ethernet")
    if interface:
        # of that name alone, and the one that gloo gets
        assert f"GLOO_SOCKET_IFNAME={interface[1].removeprefix('=')}\n" in here
    manifest = kubernetes.render(job(fabric), image="image", volume="claim:/data")
    (container,) = list(yaml.safe_load_all(manifest))[1]["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert wanted.items() <= variables.items()


def test_every_fabric_can_be_asked_for() -> None:
    # the command line names them itself: reading recipes needs what not every install has
    words = ["launch", "slurm", "tiny", "--gpus-per-node", "1", "--fabric"]
    assert [cli._parser().parse_args([*words, each]).fabric for each in FABRICS] == [*FABRICS]


def test_without_a_fabric_nccl_chooses() -> None:
    names = {setting.name for setting in settings(load_recipe("llama-3b-xielu"), [])}
    assert not {name for name in names if name.startswith(("NCCL", "FI_"))}
