"""Manifests for Kubernetes: a plain Indexed Job, or a TrainJob of Kubeflow Trainer v2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from posixpath import normpath
from textwrap import indent

import yaml

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job, Setting, name_of, settings
from megatron_xielu.launch.pet import STOPPED
from megatron_xielu.recipes import preset_names
from megatron_xielu.training.launch import REFUSED

_PORT = 29500
# for what is not the save: ending torchrun and writing logs
_MARGIN = 60
_RESTARTS = 3
# the image's, tested to be that of the Dockerfile
ENTRYPOINT = ("tini", "-s", "--", "/opt/megatron_xielu/entrypoint.sh")
# where a pod finds the file of its recipe
_RECIPE = Path("/etc/megatron-xielu/recipe.yaml")

# the last of a container and of its pod, in both manifests
_STORAGE = """\
  volumeMounts:
  - name: shared
    mountPath: {mount}
{recipe_mount}  # NCCL and data workers use it; a container has 64 MB by default
  - name: shm
    mountPath: /dev/shm
volumes:
- name: shared
  persistentVolumeClaim:
    claimName: {claim}
{recipe_volume}- name: shm
  emptyDir:
    medium: Memory
"""

_RECIPE_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
data:
  {file}: |2
{text}
---
"""

_RECIPE_MOUNT = f"""\
  - name: recipe
    mountPath: {_RECIPE.parent}
"""

_RECIPE_VOLUME = """\
- name: recipe
  configMap:
    name: {name}
"""

_IPC_LOCK = """\
securityContext:
  capabilities:
    # RDMA locks memory, of which a container may have little
    add: [IPC_LOCK]
"""

_HOST_NETWORK = """\
# the machine's own network cards, as fast as they are
hostNetwork: true
# without this a pod would then not find the name of the first one
dnsPolicy: ClusterFirstWithHostNet
"""

_JOB = """\
# written by `megatron-xielu launch k8s`
{recipe_map}apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  # no address of its own: it gives the pods names; they meet at {name}-0.{name}
  clusterIP: None
  # they look for each other before they are ready
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  # failures of a pod, {restarts} for each; its torchrun has started the ranks again as often before
  backoffLimit: {backoff}
  podFailurePolicy:
    rules:
    # an evicted or pre-empted pod is no failure of the run
    - action: Ignore
      onPodConditions:
      - type: DisruptionTarget
        status: "True"
    # nor is one that was stopped and has saved, or has lost the others
    - action: Ignore
      onExitCodes:
        containerName: pretrain
        operator: In
        values: [{stopped}]
    # a mistake, which would only repeat
    - action: FailJob
      onExitCodes:
        containerName: pretrain
        operator: In
        values: [{refused}]
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
{network}      # the ranks need up to {stop} s to save
      terminationGracePeriodSeconds: {grace}
      containers:
      - name: pretrain
        image: {image}
        args: {arguments}
        env:
        # torchrun's options, of which `pretrain` makes the rest; a pod's number comes from the Job
        - name: PET_NNODES
          value: "{nodes}"
        - name: PET_NPROC_PER_NODE
          value: "{gpus}"
        - name: PET_MASTER_ADDR
          value: {name}-0.{name}
        - name: PET_MASTER_PORT
          value: "{port}"
{env}
        resources:
          limits:
            nvidia.com/gpu: "{gpus}"
{rdma}{capability}{storage}"""

_TRAIN_JOB = """\
# written by `megatron-xielu launch k8s --trainjob`
{recipe_map}apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  # sets PET_*, from which `pretrain`, become torchrun, knows nodes, ranks and where they meet
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {image}
    # of the image, because the runtime has a command of its own
    command: {entrypoint}
    args: {arguments}
    numNodes: {nodes}
    numProcPerNode: {gpus}
    resourcesPerNode:
      limits:
        nvidia.com/gpu: "{gpus}"
{rdma}    env:
{env}
  runtimePatches:
  - manager: megatron-xielu.launch/cli
    trainingRuntimeSpec:
      template:
        spec:
          replicatedJobs:
          - name: node
            template:
              spec:
                template:
                  spec:
                    # the ranks need up to {stop} s to save
                    terminationGracePeriodSeconds: {grace}
                    containers:
                    - name: node
{capability}{storage}"""


def render(
    job: Job,
    *,
    image: str,
    volume: str,
    trainjob: bool = False,
    rdma: str | None = None,
    host_network: bool = False,
) -> str:
    """The manifest.

    Args:
        volume: CLAIM:FOLDER, a persistent volume claim that all nodes can write and where it is
            mounted; without --run-dir the run folder is FOLDER/runs/ and the recipe's name.
        rdma: RESOURCE[=COUNT], what the cluster calls its RDMA devices and how many a node gets.
        host_network: the pods use their machine's network.

    Raises:
        UserError: the recipe, the volume or the network is wrong.
    """
    recipe = job.load()
    is_file = job.recipe not in preset_names()
    if trainjob and host_network:
        raise UserError(
            "--host-network cannot be had with --trainjob, which may not patch it: leave one of "
            "them out, or set hostNetwork in a runtime of your own"
        )
    claim, mount = _parse(volume)
    folder = Path(normpath(mount / job.folder(recipe)))
    _check_on_volume(f"--run-dir {folder}", folder, mount)
    if recipe.data.path is not None:
        _check_on_volume(f"data.path={recipe.data.path}", Path(recipe.data.path), mount)
    name = name_of(folder)
    timeout = f"ranks get {job.stop_seconds} s to save after a signal, not 30"
    variables = [
        *settings(recipe, job.megatron_flags, job.fabric),
        Setting("PET_SHUTDOWN_TIMEOUT", str(job.stop_seconds), timeout),
    ]
    storage = _STORAGE.format(
        mount=json.dumps(str(mount)),
        claim=json.dumps(claim),
        recipe_mount=_RECIPE_MOUNT if is_file else "",
        recipe_volume=_RECIPE_VOLUME.format(name=name) if is_file else "",
    )
    words = replace(job, recipe=str(_RECIPE) if is_file else job.recipe).arguments(folder)
    return (_TRAIN_JOB if trainjob else _JOB).format(
        name=name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        restarts=_RESTARTS,
        backoff=_RESTARTS * job.nodes,
        stopped=STOPPED,
        refused=REFUSED,
        stop=job.stop_seconds,
        grace=job.stop_seconds + _MARGIN,
        # a string of JSON is one of YAML
        image=json.dumps(image),
        entrypoint=json.dumps(ENTRYPOINT),
        arguments=json.dumps(words),
        recipe_map=_recipe_map(name, job.recipe) if is_file else "",
        storage=indent(storage, (20 if trainjob else 6) * " "),
        port=_PORT,
        env=indent(_env(variables), (4 if trainjob else 8) * " "),
        rdma=indent(_limit(rdma), (8 if trainjob else 12) * " "),
        capability=indent(_IPC_LOCK if rdma else "", (22 if trainjob else 8) * " "),
        network=indent(_HOST_NETWORK if host_network else "", 6 * " "),
    )


def _parse(volume: str) -> tuple[str, Path]:
    claim, _, mount = volume.partition(":")
    if not claim or not mount.startswith("/") or ":" in mount:
        raise UserError(f"--volume {volume} must be CLAIM:FOLDER, as in training:/data")
    return claim, Path(normpath(mount))


def _check_on_volume(given: str, path: Path, mount: Path) -> None:
    if not Path(normpath(path)).is_relative_to(mount):
        raise UserError(
            f"{given} is not on the volume at {mount}, the only folder that pods share and that "
            f"outlives them: give its path there, as in {mount / path.name}"
        )


def _recipe_map(name: str, file: str) -> str:
    text = indent(Path(file).read_text(encoding="utf-8").rstrip(), 4 * " ")
    return _RECIPE_MAP.format(name=name, file=_RECIPE.name, text=text)


def _limit(rdma: str | None) -> str:
    if rdma is None:
        return ""
    resource, sign, count = rdma.partition("=")
    if "/" not in resource or (sign and not (count.isdecimal() and int(count))):
        raise UserError(
            f"--rdma {rdma} must be RESOURCE or RESOURCE=COUNT, as in vpc.amazonaws.com/efa=32; "
            "`kubectl describe node` lists a node's resources"
        )
    return f'{resource}: "{count or 1}"\n'


def _env(variables: Sequence[Setting]) -> str:
    lines = []
    for each in variables:
        lines += [f"# {each.reason}", f"- name: {each.name}", f"  value: {json.dumps(each.value)}"]
    return "\n".join(lines)


def submit(manifest: str) -> None:
    """Hand it to kubectl, which touches nothing that is there.

    Raises:
        UserError: there is no kubectl here, or it refuses.
    """
    # `apply` would leave a job that has ended as it is, and `replace` end one that runs
    try:
        subprocess.run(["kubectl", "create", "-f", "-"], input=manifest, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError(
            "kubectl is not here: keep the manifest and give it to `kubectl create -f` elsewhere"
        ) from error
    except subprocess.CalledProcessError as error:
        objects = " ".join(
            f"{each['kind'].lower()}/{each['metadata']['name']}"
            for each in yaml.safe_load_all(manifest)
        )
        raise UserError(
            "kubectl refused the manifest; what it said stands above. Where a run of this name is "
            "there already, `kubectl delete --cascade=foreground --ignore-not-found "
            f"{objects}` removes it, or stops it if it still trains, which saves; then submit again"
        ) from error
