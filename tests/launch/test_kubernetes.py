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


def rendered(trainjob: bool) -> list[dict[str, Any]]:
    text = kubernetes.render(
        PAPER, image="repo/image:1", volume="training:/data", trainjob=trainjob
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


def test_the_indexed_job_fits_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for manifest in rendered(trainjob=False):
        validate(manifest, "1.31", strict=True)


def test_the_trainjob_fits_kubeflows_models() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (manifest,) = rendered(trainjob=True)
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
