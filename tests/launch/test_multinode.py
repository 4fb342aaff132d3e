"""Two hosts, played by network namespaces: a rank is killed; a host is killed and replaced."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.launch.test_launch import LONG, TWO_RANKS, check_whole
from tests.ranks import ROOT, environment
from tests.training.test_pretrain import metrics

pytestmark = [pytest.mark.netns, pytest.mark.slow]
HOSTS = {"mxa": "10.77.0.1", "mxb": "10.77.0.2"}


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", "mxa"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this root may make no network namespace: {probe.stderr.strip()}")
    try:
        subprocess.run(["ip", "netns", "add", "mxb"], check=True)
        for name in HOSTS:
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        cable = "ip link add eth0 netns mxa type veth peer name eth0 netns mxb"
        subprocess.run(cable.split(), check=True)
        for name, address in HOSTS.items():
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield
    finally:
        for name in HOSTS:
            for pid in pids(name):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def pids(host: str) -> list[int]:
    words = ["ip", "netns", "pids", host]
    return [int(pid) for pid in subprocess.run(words, capture_output=True).stdout.split()]


def start(host: str, folder: Path, data: Path) -> subprocess.Popen[bytes]:
    """The example on a host."""
    words = ["ip", "netns", "exec", host, str(ROOT / "examples/multinode_torchrun.sh"), "tiny"]
    words += ["--run-dir", str(folder), *SMALL, TWO_RANKS, *LONG, f"data.path={data}"]
    variables = environment(HEAD=HOSTS["mxa"], NODES=2, GPUS=1, PYTHON=sys.executable)
    with (folder.parent / f"{host}.out").open("ab") as out:
        return subprocess.Popen(words, env=variables, stdout=out, stderr=out)


def wait_for_step(started: list[subprocess.Popen[bytes]], folder: Path, step: int) -> None:
    while not any(r["type"] == "train" and r["step"] >= step for r in metrics(folder)):
        assert all(process.poll() is None for process in started), said(folder)
        time.sleep(0.1)


def said(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.parent.glob("*.out")))


def rank_of(host: str) -> int:
    """The process id of the rank on a host."""
    for pid in pids(host):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(v.startswith(b"RANK=") for v in variables) and b"megatron_xielu" in command:
            return pid
    raise AssertionError(f"no rank on {host}")


def end(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for process in started:
        assert process.wait(timeout=300) == 0, said(folder)
    check_whole(folder, most_repeated=30)


@pytest.mark.usefixtures("hosts")
def test_a_rank_is_killed(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = [start(host, folder, data_dir) for host in HOSTS]
    wait_for_step(started, folder, 15)
    begin = time.monotonic()
    os.kill(rank_of("mxb"), signal.SIGKILL)
    wait_for_step(started, folder, 40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after the kill at step 15")
    end(started, folder)


@pytest.mark.usefixtures("hosts")
def test_a_host_is_killed_and_replaced(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = [start(host, folder, data_dir) for host in HOSTS]
    wait_for_step(started, folder, 15)
    for pid in pids("mxb"):
        os.kill(pid, signal.SIGKILL)
    started[1].wait()
    time.sleep(5)
    begin = time.monotonic()
    started[1] = start("mxb", folder, data_dir)
    wait_for_step(started, folder, 40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after a host lost at step 15 was replaced")
    end(started, folder)
