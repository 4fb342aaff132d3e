"""A real Slurm of two nodes on this machine, from Debian's packages, for as long as a test file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ranks import environment

CONFIGURATION = """\
ClusterName=xielu
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
# a requeued job waits for the credentials of its last start to expire
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
SlurmdTimeout=30
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=n[1-2] MaxTime=30:00 State=UP OverSubscribe=NO
PartitionName=debug Default=YES GraceTime=60
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class Cluster:
    """A controller and two nodes, all of them processes of this machine."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For its commands; the nodes' names mean nothing outside of it."""
        configuration = self.folder / "slurm.conf"
        return environment(SLURM_CONF=configuration, MASTER_ADDR="127.0.0.1")

    def start(self, name: str) -> None:
        """The controller, or the node of that name."""
        words = ["slurmctld", "-D"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def run(self, *words: str, text: str | None = None) -> str:
        """The output of one of Slurm's commands, with `text` as its input."""
        done = subprocess.run(
            words, env=self.environment, input=text, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait(self, job: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """What Slurm says of a job once it is in one of the states."""
        deadline = time.monotonic() + seconds
        while True:
            words = self.run("scontrol", "--oneliner", "show", "job", job).split()
            said = dict(word.split("=", 1) for word in words if "=" in word)
            if said["JobState"] in states:
                return said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with_port = [socket.socket() for _ in range(count)]
    for each in with_port:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_port]
    for each in with_port:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm with the nodes n1 and n2."""
    if os.geteuid() or not (shutil.which("slurmctld") and shutil.which("slurmd")):
        pytest.skip("needs root and the packages slurmctld, slurmd and slurm-client")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    controller, n1, n2 = _free_ports(3)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            controller=controller, n1=n1, n2=n2, folder=folder, host=socket.gethostname()
        )
    )
    cluster = Cluster(folder)
    try:
        for name in ("slurmctld", "n1", "n2"):
            cluster.start(name)
        deadline = time.monotonic() + 60
        while cluster_states(cluster) != ["idle", "idle"]:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        for daemon in cluster.daemons.values():
            daemon.terminate()
        for daemon in cluster.daemons.values():
            daemon.wait(timeout=60)


def cluster_states(cluster: Cluster) -> list[str]:
    """Of each node: idle, alloc, down; empty while the controller does not answer."""
    words = ["sinfo", "--noheader", "--Node", "--partition=debug", "--format=%t"]
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True)
    return done.stdout.split()


def arguments_of(program: str, script: str, folder: Path) -> list[str]:
    """What a shell script gives to a program, whose place one takes that prints it."""
    folder.mkdir(exist_ok=True)
    (folder / program).write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (folder / program).chmod(0o755)
    done = subprocess.run(
        ["bash"],
        env=environment(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}"),
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]
