"""Hosts, played by network namespaces: ranks and hosts are killed, the head too, a link is cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from megatron_xielu.launch import kubernetes
from megatron_xielu.launch.job import Job
from megatron_xielu.launch.pet import STOPPED
from tests.conftest import SMALL
from tests.launch.test_join import TASK
from tests.launch.test_launch import LONG, SAVE_INTERVAL, TWO_RANKS, check_whole, restarts
from tests.ranks import ROOT, environment
from tests.training.test_pretrain import command, latest, metrics

pytestmark = [pytest.mark.netns, pytest.mark.slow]
# fewer than LONG's
STEPS = 60
DEADLINE = 300
# seconds without a link
CUT = 40


class Hosts:
    """Network namespaces on one switch; each runs one rank by the example, the first is the head.

    Namespaces are named by this process, so that tests may run beside each other.
    """

    def __init__(self, count: int, folder: Path, data: Path) -> None:
        self.switch = f"mx{os.getpid()}"
        self.names = [f"{self.switch}{letter}" for letter in "abcd"[:count]]
        self.run_dir = folder / "run"
        self.data = data
        self.flags: tuple[str, ...] = ()
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def connect(self) -> None:
        """Make the hosts and their switch."""
        _ip(f"-n {self.switch} link set br0 up")
        for number, host in enumerate(self.names, 1):
            _ip(f"netns add {host}")
            _ip(f"-n {host} link set lo up")
            _ip(f"link add eth0 netns {host} type veth peer name {host} netns {self.switch}")
            _ip(f"-n {self.switch} link set {host} master br0 up")
            _ip(f"-n {host} addr add 10.77.0.{number}/24 dev eth0")
            self.mend(host)

    def remove(self) -> None:
        """End and remove whatever there is of them."""
        for host in self.names:
            self.kill(host)
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self, host: str) -> None:
        """From now on nothing comes from or to the host."""
        _ip(f"-n {host} link set eth0 down")

    def mend(self, host: str) -> None:
        """End of `cut`."""
        _ip(f"-n {host} link set eth0 up")

    def command(self, host: str) -> tuple[list[str], dict[str, str]]:
        """What a host's user gives, and its variables."""
        words = [str(ROOT / "examples/multinode_torchrun.sh"), "tiny"]
        words += ["--run-dir", str(self.run_dir), *SMALL, TWO_RANKS, *LONG]
        words += [f"training.train_iters={STEPS}", f"data.path={self.data}"]
        words += ["--", *self.flags] if self.flags else []
        return words, environment(
            HEAD="10.77.0.1", NODES=len(self.names), GPUS=1, PYTHON=sys.executable
        )

    def start(self, *hosts: str) -> None:
        """Give the command on these hosts, or on all of them."""
        for host in hosts or self.names:
            words, variables = self.command(host)
            with self.output(host).open("ab") as out:
                self.started[host] = subprocess.Popen(
                    ["ip", "netns", "exec", host, *words], env=variables, stdout=out, stderr=out
                )

    def output(self, host: str) -> Path:
        """What the host's user sees."""
        return self.run_dir.parent / f"{host}.out"

    def pids(self, host: str) -> list[int]:
        """The processes of a host."""
        done = subprocess.run(["ip", "netns", "pids", host], capture_output=True)
        return [int(pid) for pid in done.stdout.split()]

    def rank_of(self, host: str) -> int:
        """The process id of the rank on a host."""
        for pid in self.pids(host):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(v.startswith(b"RANK=") for v in variables) and b"megatron_xielu" in command:
                return pid
        raise AssertionError(f"no rank on {host}")

    def kill(self, host: str) -> None:
        """Every process of a host."""
        # one may have been born in between
        while pids := self.pids(host):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if host in self.started:
            self.started[host].wait()

    def steps(self) -> list[int]:
        """The trained steps in their order."""
        return [r["step"] for r in metrics(self.run_dir) if r["type"] == "train"]

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: any(each >= step for each in self.steps()))

    def _wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not reached():
            assert all(each.poll() is None for each in self.started.values()), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return "\n".join(self.output(host).read_text()[-3000:] for host in self.names)

    def end(self, most_repeated: int = SAVE_INTERVAL) -> None:
        """Every host has ended well, and all steps were trained.

        Args:
            most_repeated: steps that were trained again.
        """
        for process in self.started.values():
            assert process.wait(timeout=DEADLINE) == 0, self.said()
        check_whole(self.run_dir, most_repeated=most_repeated, num_steps=STEPS)


class Pods(Hosts):
    """Hosts that do what the manifest of an Indexed Job says, each as the pod of its number."""

    def connect(self) -> None:
        super().connect()
        # what the cluster's name server and a kubelet would know
        for host in self.names:
            folder = Path("/etc/netns", host)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 run-0.run\n")

    def remove(self) -> None:
        super().remove()
        for host in self.names:
            shutil.rmtree(Path("/etc/netns", host), ignore_errors=True)

    def command(self, host: str) -> tuple[list[str], dict[str, str]]:
        changes = (*SMALL, TWO_RANKS, *LONG, f"training.train_iters={STEPS}")
        job = Job(
            recipe="tiny",
            overrides=(*changes, f"data.path={self.data}"),
            nodes=len(self.names),
            run_dir=self.run_dir,
        )
        volume = os.path.commonpath([self.run_dir, self.data])
        manifest = kubernetes.render(job, image="image", volume=f"claim:{volume}")
        _, found = yaml.safe_load_all(manifest)
        (container,) = found["spec"]["template"]["spec"]["containers"]
        variables = {each["name"]: each["value"] for each in container["env"]}
        # by the Job's controller
        variables["JOB_COMPLETION_INDEX"] = str(self.names.index(host))
        words = [sys.executable, "-m", "megatron_xielu", *container["args"]]
        return words, environment(**variables)

    def evict(self, host: str) -> None:
        """As a node that is drained does."""
        self.started[host].send_signal(signal.SIGTERM)
        assert self.started.pop(host).wait(timeout=120) == STOPPED, self.said()


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path, data_dir: Path) -> Iterator[Hosts]:
    """As many as the parameter says."""
    hosts = Hosts(request.param, tmp_path, data_dir)
    with connected(hosts):
        yield hosts


@pytest.fixture
def pods(tmp_path: Path, data_dir: Path) -> Iterator[Pods]:
    pods = Pods(2, tmp_path, data_dir)
    with connected(pods):
        yield pods


@contextmanager
def connected(hosts: Hosts) -> Iterator[None]:
    """Nothing of them is left."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    try:
        for words in (f"netns add {hosts.switch}", f"-n {hosts.switch} link add br0 type bridge"):
            probe = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if probe.returncode:
                pytest.skip(f"this root may make no network of its own: {probe.stderr.strip()}")
        hosts.connect()
        yield
    finally:
        hosts.remove()


@pytest.fixture
def named(hosts: Hosts) -> Iterator[Hosts]:
    """Two hosts whose own names are 127.0.1.1 to themselves, as Debian installs them."""
    folders = []
    try:
        for number, host in enumerate(hosts.names):
            folders.append(Path("/etc/netns", host))
            folders[-1].mkdir(parents=True)
            other = f"10.77.0.{2 - number} {hosts.names[1 - number]}"
            text = f"127.0.0.1 localhost\n127.0.1.1 {host}\n{other}\n"
            (folders[-1] / "hosts").write_text(text)
        yield hosts
    finally:
        for folder in folders:
            shutil.rmtree(folder)


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_hosts_whose_own_names_are_127(named: Hosts) -> None:
    task = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    task |= {"SLURM_STEP_NODELIST": ",".join(named.names)}
    # a host's name is not its network's
    named_so = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
    words = command(named.run_dir, named.data, TWO_RANKS)
    for number, host in enumerate(named.names):
        one = task | {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number)}
        with named.output(host).open("ab") as out:
            named.started[host] = subprocess.Popen(
                ["ip", "netns", "exec", host, *named_so, host, *words],
                env=environment(**one),
                stdout=out,
                stderr=out,
            )
    for process in named.started.values():
        assert process.wait(timeout=DEADLINE) == 0, named.said()
    assert named.steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("hosts", [2, 4], indirect=True)
def test_a_rank_is_killed(hosts: Hosts) -> None:
    hosts.start()
    hosts.wait_for_step(15)
    ranks = {hosts.rank_of(host) for host in hosts.names}
    begin = time.monotonic()
    os.kill(hosts.rank_of(hosts.names[1]), signal.SIGKILL)
    hosts.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after the kill at step 15")
    assert not ranks & {hosts.rank_of(host) for host in hosts.names}
    hosts.end()


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_one_host_is_told_to_stop_and_both_do(hosts: Hosts) -> None:
    hosts.start()
    hosts.wait_for_step(15)
    begin = time.monotonic()
    hosts.started[hosts.names[1]].send_signal(signal.SIGTERM)
    for host in hosts.names:
        assert hosts.started[host].wait(timeout=DEADLINE) == 0, hosts.said()
        print(f"{host} ended {time.monotonic() - begin:.1f} s after the signal at step 15")
    assert 15 <= latest(hosts.run_dir) == max(hosts.steps()) < STEPS
    assert "Traceback" not in hosts.said()


@pytest.mark.parametrize("hosts", [2, 4], indirect=True)
def test_a_host_is_killed_and_replaced(hosts: Hosts) -> None:
    hosts.start()
    hosts.wait_for_step(15)
    lost = hosts.names[-1]
    hosts.kill(lost)
    time.sleep(5)
    begin = time.monotonic()
    hosts.start(lost)
    hosts.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after a host lost at step 15 was replaced")
    hosts.end()


@pytest.mark.parametrize("hosts", [4], indirect=True)
def test_the_head_is_killed_and_all_are_started_again(hosts: Hosts) -> None:
    hosts.start()
    hosts.wait_for_step(15)
    head, *others = hosts.names
    begin = time.monotonic()
    hosts.kill(head)
    for host in others:
        assert hosts.started[host].wait(timeout=60) == 1
        said = hosts.output(host).read_text()
        problem, remedy = said.splitlines()[-2:]
        assert problem.startswith("error: no answer from the head 10.77.0.1: ")
        assert "If the head was lost, give the command again on every node" in remedy
        assert "Traceback" not in said
    print(f"the others had ended {time.monotonic() - begin:.1f} s after the kill at step 15")
    begin = time.monotonic()
    hosts.start()
    hosts.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after all were started again")
    hosts.end()


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_cut_shorter_than_the_timeout_is_a_pause(hosts: Hosts) -> None:
    hosts.start()
    hosts.wait_for_step(15)
    ranks = [hosts.rank_of(host) for host in hosts.names]
    seconds = cut(hosts)
    print(f"five steps further {seconds:.1f} s after the end of a cut of {CUT} s")
    assert [hosts.rank_of(host) for host in hosts.names] == ranks
    assert not restarts(hosts.run_dir)
    # the hosts' torchruns, which had lost each other meanwhile, can still recover
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    hosts.wait_for_step(50)
    print(f"at step 50 {time.monotonic() - begin:.1f} s after the kill of a rank")
    hosts.end()


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_cut_longer_than_the_timeout_is_a_restart(hosts: Hosts) -> None:
    hosts.flags = ("--distributed-timeout-seconds-after-init", str(CUT // 2))
    hosts.start()
    hosts.wait_for_step(15)
    ranks = {hosts.rank_of(host) for host in hosts.names}
    seconds = cut(hosts)
    print(f"five steps further {seconds:.1f} s after the end of a cut of {CUT} s")
    assert not ranks & {hosts.rank_of(host) for host in hosts.names}
    hosts.end()


def cut(hosts: Hosts) -> float:
    """Cut the last host off for a while; the seconds from then on until five steps further."""
    step = max(hosts.steps())
    hosts.cut(hosts.names[-1])
    time.sleep(CUT)
    begin = time.monotonic()
    hosts.mend(hosts.names[-1])
    hosts.wait_for_step(max([step, *hosts.steps()]) + 5)
    return time.monotonic() - begin


def test_a_pod_is_killed_and_replaced(pods: Pods) -> None:
    pods.start()
    pods.wait_for_step(15)
    lost = pods.names[1]
    pods.kill(lost)
    begin = time.monotonic()
    pods.start(lost)
    pods.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after a pod lost at step 15 was replaced")
    pods.end()


def test_an_evicted_pod_has_saved_and_the_other_waits_for_its_replacement(pods: Pods) -> None:
    pods.start()
    pods.wait_for_step(15)
    evicted = pods.names[1]
    begin = time.monotonic()
    pods.evict(evicted)
    print(f"saved and over {time.monotonic() - begin:.1f} s after the eviction at step 15")
    begin = time.monotonic()
    pods.start(evicted)
    pods.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after it was replaced")
    pods.end(most_repeated=0)


@pytest.mark.parametrize("lose", [Pods.kill, Pods.evict])
def test_the_first_pod_is_lost_and_all_are_started_again(
    pods: Pods, lose: Callable[[Pods, str], None]
) -> None:
    pods.start()
    pods.wait_for_step(15)
    first, other = pods.names
    begin = time.monotonic()
    lose(pods, first)
    assert pods.started[other].wait(timeout=120) == STOPPED, pods.said()
    print(f"the other had ended {time.monotonic() - begin:.1f} s after the loss at step 15")
    said = pods.output(other).read_text()
    assert "error: no answer from the first node" in said
    assert "Traceback" not in said
    begin = time.monotonic()
    pods.start()
    pods.wait_for_step(40)
    print(f"at step 40 {time.monotonic() - begin:.1f} s after both were started again")
    pods.end(most_repeated=0 if lose is Pods.evict else SAVE_INTERVAL)
