"""Manifests for Kubernetes: a plain Indexed Job, or a TrainJob of Kubeflow Trainer v2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from megatron_xielu.errors import UserError
from megatron_xielu.launch.job import Job, Setting, name_of, settings
from megatron_xielu.launch.join import SIGNALS_TO_HANDLE

_PORT = 29500
# for what is not the save: ending torchrun and writing logs
_MARGIN = 60
_RESTARTS = 3

# the last of a container and of its pod, in both manifests
_STORAGE = """\
  volumeMounts:
  - name: shared
    mountPath: {mount}
  # NCCL and data workers use it; a container has 64 MB by default
  - name: shm
    mountPath: /dev/shm
volumes:
- name: shared
  persistentVolumeClaim:
    claimName: {claim}
- name: shm
  emptyDir:
    medium: Memory
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
apiVersion: v1
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
  # one lost pod ends the ranks of all: {restarts} times that
  backoffLimit: {backoff}
  podFailurePolicy:
    rules:
    # an evicted or pre-empted pod is no failure of the run
    - action: Ignore
      onPodConditions:
      - type: DisruptionTarget
        status: "True"
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
{network}      # the ranks need up to {stop} s to save
      terminationGracePeriodSeconds: {grace}
      containers:
      - name: pretrain
        image: {image}
        command: {command}
        env:
        # torchrun reads its options from these; `pretrain` becomes torchrun where they are set
        - name: PET_NNODES
          value: "{nodes}"
        - name: PET_NPROC_PER_NODE
          value: "{gpus}"
        - name: PET_NODE_RANK
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
        - name: PET_MASTER_ADDR
          value: {name}-0.{name}
        - name: PET_MASTER_PORT
          value: "{port}"
{env}
        resources:
          limits:
            nvidia.com/gpu: "{gpus}"
{rdma}{capability}""" + indent(_STORAGE, 6 * " ")

_TRAIN_JOB = """\
# written by `megatron-xielu launch k8s --trainjob`
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  # sets PET_*, from which `pretrain`, become torchrun, knows nodes, ranks and where they meet
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {image}
    command: {command}
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
{capability}""" + indent(_STORAGE, 20 * " ")


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
    if trainjob and host_network:
        raise UserError(
            "--host-network cannot be had with --trainjob, which may not patch it: leave one of "
            "them out, or set hostNetwork in a runtime of your own"
        )
    claim, _, mount = volume.partition(":")
    if not claim or not mount.startswith("/"):
        raise UserError(f"--volume {volume} must be CLAIM:FOLDER, as in training:/data")
    folder = Path(mount) / job.folder(recipe)
    if not folder.is_relative_to(mount):
        raise UserError(
            f"--run-dir {folder} is not on the volume at {mount}, so it would be lost with its "
            "pod: put it there"
        )
    name = name_of(folder)
    timeout = f"ranks get {job.stop_seconds} s to save after a signal, not 30"
    variables = [
        *settings(recipe, job.megatron_flags, job.fabric),
        Setting("PET_SHUTDOWN_TIMEOUT", str(job.stop_seconds), timeout),
        Setting(
            "PET_SIGNALS_TO_HANDLE",
            SIGNALS_TO_HANDLE,
            "by default SIGUSR1 kills torchrun and leaves its ranks",
        ),
    ]
    return (_TRAIN_JOB if trainjob else _JOB).format(
        name=name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        restarts=_RESTARTS,
        backoff=_RESTARTS * job.nodes,
        stop=job.stop_seconds,
        grace=job.stop_seconds + _MARGIN,
        # a string of JSON is one of YAML
        image=json.dumps(image),
        command=json.dumps(["megatron-xielu", *job.arguments(folder)]),
        port=_PORT,
        mount=json.dumps(mount),
        claim=json.dumps(claim),
        env=indent(_env(variables), (4 if trainjob else 8) * " "),
        rdma=indent(_limit(rdma), (8 if trainjob else 12) * " "),
        capability=indent(_IPC_LOCK if rdma else "", (22 if trainjob else 8) * " "),
        network=indent(_HOST_NETWORK if host_network else "", 6 * " "),
    )


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
    """Hand it to kubectl.

    Raises:
        UserError: there is no kubectl here, or it refuses.
    """
    try:
        subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError(
            "kubectl is not here: keep the manifest and give it to `kubectl apply -f` elsewhere"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError("kubectl refused the manifest; what it said stands above") from error
