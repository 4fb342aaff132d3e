"""`launch k8s`: manifests that say what is meant, and that fit the published schemas."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xielu.errors import UserError
from megatron_xielu.launch import kubernetes
from megatron_xielu.launch.job import Job
from megatron_xielu.launch.pet import STOPPED
from megatron_xielu.training.launch import REFUSED
from tests.ranks import ROOT

PRESET = ROOT / "megatron_xielu/recipes/presets/llama-3b-xielu.yaml"
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
    assert int(variables["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["args"] == [
        *("pretrain", "--recipe", "llama-3b-xielu"),
        *("--run-dir", "/data/runs/llama-3b-xielu", "data.path=/data/x y"),
    ]


def test_the_images_entrypoint_runs() -> None:
    _, job = rendered(trainjob=False)
    # which `command` would replace
    assert "command" not in containers(job)[0]
    (train_job,) = rendered(trainjob=True)
    trainer = train_job["spec"]["trainer"]
    # Kubeflow's runtime has a command of its own, to which bare `args` would go
    (entrypoint,) = re.findall(
        r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert trainer["command"] == json.loads(entrypoint)
    assert trainer["args"] == containers(job)[0]["args"]


def test_what_a_pods_end_means() -> None:
    _, job = rendered(trainjob=False)
    evicted, parted, mistaken = job["spec"]["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert parted["onExitCodes"]["values"] == [STOPPED]
    assert [evicted["action"], parted["action"]] == ["Ignore", "Ignore"]
    assert mistaken["onExitCodes"]["values"] == [REFUSED]
    assert mistaken["action"] == "FailJob"
    (container,) = containers(job)
    assert {each["onExitCodes"]["containerName"] for each in (parted, mistaken)} == {
        container["name"]
    }


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = job["spec"]["template"]["spec"]["containers"]
    return found


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


@pytest.mark.parametrize("trainjob", [False, True])
def test_a_recipe_of_this_machine_goes_along(trainjob: bool, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    # a line at the begin that is further in than the others would end a block of YAML's
    mine.write_text("    # my own\n" + PRESET.read_text())
    job = replace(PAPER, recipe=str(mine))
    text = kubernetes.render(job, image="x", volume="training:/data", trainjob=trainjob)
    manifests = list(yaml.safe_load_all(text))
    recipe, *_, last = manifests
    assert recipe["kind"] == "ConfigMap"
    assert recipe["data"] == {"recipe.yaml": mine.read_text()}
    if trainjob:
        pod = last["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
        pod = pod["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        arguments = last["spec"]["trainer"]["args"]
    else:
        pod = last["spec"]["template"]["spec"]
        arguments = containers(last)[0]["args"]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "recipe"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "recipe"]
    assert volume["configMap"] == {"name": recipe["metadata"]["name"]}
    assert arguments[:3] == ["pretrain", "--recipe", f"{mount['mountPath']}/recipe.yaml"]
    if not trainjob:
        validate = pytest.importorskip("kubernetes_validate").validate
        for manifest in manifests:
            validate(manifest, "1.31", strict=True)


def test_what_is_not_on_the_volume_is_refused() -> None:
    for given in ("/runs/x", "/data/../runs/x"):
        lost = replace(PAPER, run_dir=Path(given))
        with pytest.raises(
            UserError, match=r"--run-dir /runs/x is not on the volume at /data, the"
        ):
            kubernetes.render(lost, image="x", volume="training:/data/")
    for given in ("books", "/mnt/books", "/data/../books"):
        elsewhere = replace(PAPER, overrides=(f"data.path={given}",))
        with pytest.raises(UserError, match=rf"data.path={given} is .* as in /data/books$"):
            kubernetes.render(elsewhere, image="x", volume="training:/data")
    for given in ("training", "training:data", ":/data", "training:/data:ro"):
        with pytest.raises(UserError, match=rf"--volume {given} must be CLAIM:FOLDER, as in"):
            kubernetes.render(PAPER, image="x", volume=given)


def test_a_run_that_is_there_already_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\ncat > {tmp_path}/given\nexit 1\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    manifest = kubernetes.render(PAPER, image="x", volume="training:/data")
    with pytest.raises(
        UserError,
        match="`kubectl delete --cascade=foreground --ignore-not-found "
        "service/llama-3b-xielu job/llama-3b-xielu` removes it",
    ):
        kubernetes.submit(manifest)
    assert (tmp_path / "said").read_text() == "create -f -\n"
    assert (tmp_path / "given").read_text() == manifest
