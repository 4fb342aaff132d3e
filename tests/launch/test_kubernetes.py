"""`launch k8s`: manifests that say what is meant, and that fit the published schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xielu.errors import UserError
from megatron_xielu.launch import kubernetes
from megatron_xielu.launch.job import Job
from megatron_xielu.launch.join import SIGNALS_TO_HANDLE

PAPER = Job(recipe="llama-3b-xielu", overrides=("data.path=/data/x y",), nodes=2, gpus_per_node=8)


def rendered(trainjob: bool, **network: Any) -> list[dict[str, Any]]:
    text = kubernetes.render(
        PAPER, image="repo/image:1", volume="training:/data", trainjob=trainjob, **network
    )
    return list(yaml.safe_load_all(text))


def test_the_indexed_job() -> None:
    service, job = rendered(trainjob=False)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    # the name that the service gives to the first pod
    assert variables["PET_MASTER_ADDR"] == "llama-3b-xielu-0.llama-3b-xielu"
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert variables["PET_SIGNALS_TO_HANDLE"] == SIGNALS_TO_HANDLE
    assert int(variables["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["command"][:2] == ["megatron-xielu", "pretrain"]
    assert "/data/runs/llama-3b-xielu" in container["command"]
    assert "data.path=/data/x y" in container["command"]


def test_rdma_devices_and_the_machines_network() -> None:
    _, job = rendered(trainjob=False, rdma="vpc.amazonaws.com/efa=32", host_network=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits = {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    assert container["resources"] == {"limits": limits}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert pod["hostNetwork"]
    # else the name of the first pod means nothing
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    (train_job,) = rendered(trainjob=True, rdma="rdma/ib")
    limits = {"nvidia.com/gpu": "8", "rdma/ib": "1"}
    assert train_job["spec"]["trainer"]["resourcesPerNode"] == {"limits": limits}
    _, plain = rendered(trainjob=False)
    (container,) = plain["spec"]["template"]["spec"]["containers"]
    assert "securityContext" not in container
    assert "hostNetwork" not in plain["spec"]["template"]["spec"]


def test_a_network_that_cannot_be_had() -> None:
    for wrong in ("efa", "vpc.amazonaws.com/efa=", "vpc.amazonaws.com/efa=0"):
        with pytest.raises(UserError, match=rf"--rdma {wrong} must be RESOURCE or RESOURCE=COUNT"):
            rendered(trainjob=False, rdma=wrong)
    with pytest.raises(UserError, match="--host-network cannot be had with --trainjob"):
        rendered(trainjob=True, host_network=True)


NETWORKS: list[dict[str, Any]] = [{}, {"rdma": "rdma/ib=2"}]


@pytest.mark.parametrize("network", [*NETWORKS, {"host_network": True}], ids=str)
def test_the_indexed_job_fits_kubernetes_schemas(network: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for manifest in rendered(trainjob=False, **network):
        validate(manifest, "1.31", strict=True)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_trainjob_fits_kubeflows_models(network: dict[str, Any]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (manifest,) = rendered(trainjob=True, **network)
    # unknown keys are dropped without a word
    read = models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict()
    read.pop("status", None)
    assert read == manifest


def test_a_run_folder_that_would_be_lost_with_its_pod() -> None:
    lost = Job(recipe="tiny", gpus_per_node=2, run_dir=Path("/runs/x"))
    with pytest.raises(UserError, match=r"--run-dir /runs/x is not on the volume at /data"):
        kubernetes.render(lost, image="x", volume="training:/data")
    with pytest.raises(UserError, match=r"--volume training must be CLAIM:FOLDER"):
        kubernetes.render(lost, image="x", volume="training")
