"""Ranks that do not start the same run are told apart before one of them waits for another."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_xielu.errors import SharedUserError, UnhealthyRun
from megatron_xielu.launch import meeting, nodes
from megatron_xielu.launch.meeting import Meeting, clocks_apart
from megatron_xielu.launch.nodes import Record
from megatron_xielu.training import meet as meet_module
from tests.launch.test_join import TASK, TWO_RANKS, run_together
from tests.ranks import environment
from tests.training.test_pretrain import command

TORCH = {"versions": {"torch": "2.13.0"}}


def records(*texts: str, kind: str = "versions", name: str = "torch") -> list[Record]:
    """Of two ranks on each machine."""
    return [Record(f"node{rank // 2}", {kind: {name: text}}) for rank, text in enumerate(texts)]


def test_who_differs_and_what_the_others_have() -> None:
    assert nodes.refusal(records("a", "a", "a", "a")) is None
    said = nodes.refusal(records("a", "a", "a", "a", "b", "b"))
    assert said is not None
    assert said.splitlines()[1:] == [
        "  torch: node2 (ranks 4-5) has b; the others have a",
        "Install the same versions on all nodes, or start the same image there.",
    ]
    # of as many, rank 0 is right
    assert "node1 (ranks 2-3) has b; the others have a" in str(
        nodes.refusal(records("a", "a", "b", "b"))
    )
    assert "node0 (rank 0) has x, node1 (rank 2) has y; the others have a" in str(
        nodes.refusal(records("x", "a", "y", "a"))
    )


def test_what_only_one_has() -> None:
    flags = [Record("node0", {"flags": {}}), Record("node1", {"flags": {"--lr": "0.1"}})]
    assert "--lr: node1 (rank 1) has 0.1; the others have nothing\nGive all nodes the same" in str(
        nodes.refusal(flags)
    )


def test_many_nodes_take_one_line() -> None:
    found = [replace(each, host=f"node{rank}") for rank, each in enumerate(records(*"aaaaabbbbbb"))]
    found += records(*"aaaaaaaa")
    said = nodes.where(found, range(5, 11))
    assert said == "node5 (rank 5), node6 (rank 6), node7 (rank 7), 3 more nodes"
    assert nodes.numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_what_is_no_harm() -> None:
    found = records("580.1", "590.2", name="GPU driver")
    assert nodes.refusal(found) is None
    assert nodes.warnings(found) == [
        "GPU driver differs: node0 (rank 1) has 590.2; the others have 580.1"
    ]


def test_a_problem_of_one_or_of_all() -> None:
    found = [Record("node0", TORCH), Record("node1", problem="no data"), Record("node1", TORCH)]
    assert nodes.refusal(found) == "node1 (rank 1): no data"
    everywhere = [replace(each, problem="no data") for each in found]
    assert nodes.refusal(everywhere) == "no data"


def test_clocks_apart_by_what_is_sure() -> None:
    found = records("", "", "", "", "", "")
    near = [(0.0, 0.0), (-0.1, 0.1), (-30.0, 0.5), (-0.5, 40.0)]
    assert clocks_apart(found[:4], near) == ("", 0.0)
    text, apart = clocks_apart(found, [*near, (-13.0, -12.5), (-12.9, -12.6)])
    assert (text, apart) == ("against node0's clock node2's is 12.5 s behind", 12.5)


def test_flags_are_compared_one_by_one() -> None:
    words = ["--lr=0.1", "--exit-on-missing-checkpoint", "--split", "9", "1", "--min-lr", "-1"]
    assert nodes._by_flag([*words, "--lr", "0.2"]) == {
        "--lr": "0.2",
        "--exit-on-missing-checkpoint": "no value",
        "--split": "9 1",
        "--min-lr": "-1",
    }


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


Outcome = list[str] | Exception


def meet(
    monkeypatch: pytest.MonkeyPatch,
    *given: Record,
    world_size: int = 0,
    ahead: float = 0.0,
    seconds: float = 60,
    **variables: object,
) -> list[Outcome]:
    """What each rank, a thread here, hears of the others.

    Args:
        world_size: larger where some do not come.
        ahead: of the last one's clock, in seconds.
    """
    port = variables.pop("MASTER_PORT", None) or free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}.items():
        monkeypatch.setenv(name, str(value))

    def come(rank: int) -> tuple[Meeting, Outcome]:
        late = ahead if rank == len(given) - 1 else 0.0
        meeting = Meeting(rank, world_size or len(given), seconds, lambda: time.time() + late)
        try:
            return meeting, meeting.compare(given[rank], "start")
        except (SharedUserError, UnhealthyRun) as error:
            return meeting, error

    with ThreadPoolExecutor(len(given)) as pool:
        return [outcome for _, outcome in pool.map(come, range(len(given)))]


ALIKE = Record("node0", TORCH)
OTHER = Record("node1", {"versions": {"torch": "2.12.0"}})


def test_ranks_that_fit_and_ranks_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meet(monkeypatch, ALIKE, ALIKE, ALIKE) == [[], [], []]
    said = meet(monkeypatch, ALIKE, ALIKE, OTHER)
    assert all(isinstance(each, SharedUserError) for each in said)
    assert len({str(each) for each in said}) == 1
    assert "torch: node1 (rank 2) has 2.12.0; the others have 2.13.0" in str(said[0])


def test_ranks_that_are_started_again_at_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    served = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    assert isinstance(meet(monkeypatch, ALIKE, OTHER, **served)[1], SharedUserError)
    assert meet(monkeypatch, ALIKE, ALIKE, **served) == [[], []]
    # nothing is left to mislead the next ones
    assert store.num_keys() == 0


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Record("node1", TORCH)
    first, second = meet(monkeypatch, ALIKE, other, ahead=42)
    assert second == []
    assert isinstance(first, list)
    assert re.search(r"against node0's clock node1's is 4[12]\.\d s ahead: nothing here", first[0])
    said = meet(monkeypatch, ALIKE, other, ahead=-42, TORCHELASTIC_RUN_ID="x")
    assert [type(each) for each in said] == [SharedUserError, SharedUserError]
    assert re.search(r"is 4[12]\.\d s behind: torchrun's nodes take each other for", str(said[1]))


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HEARING_SECONDS", 0.5)
    said = meet(monkeypatch, ALIKE, ALIKE, world_size=4, seconds=1)
    assert [type(each) for each in said] == [UnhealthyRun, UnhealthyRun]
    start = "ranks 2-3 of 4 did not come within 1 s; the others are on node0."
    assert str(said[0]).startswith(start)
    assert str(said[1]) == str(said[0])


def start(
    run_dir: Path, data: Path, *overrides: Sequence[str], **variables: object
) -> list[tuple[int, str]]:
    """Two machines of one rank each that srun starts, with overrides of their own.

    `variables` are the second one's.
    """
    task = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    task |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, own in enumerate(overrides):
        one = task | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
        processes.append(
            subprocess.Popen(
                command(run_dir, data, TWO_RANKS, *own),
                env=environment(**one, **(variables if rank else {})),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def check_refused(ended: list[tuple[int, str]], *texts: str) -> None:
    """Both end with 2, and rank 0 alone says why."""
    assert [code for code, _ in ended] == [2, 2], ended
    (_, first), (_, second) = ended
    assert first.count("error: ") == 1
    assert "Traceback" not in first
    assert "error: " not in second
    for text in texts:
        assert text in first


def test_another_recipe_and_another_version_on_one_machine(data_dir: Path, tmp_path: Path) -> None:
    site = tmp_path / "site/megatron_core-0.19.9.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.19.9\n")
    own = [[], ["optimizer.lr=0.5", "logging.eval_iters=2"]]
    python_path = f"{site.parent}:{environment()['PYTHONPATH']}"
    ended = start(tmp_path / "run", data_dir, *own, PYTHONPATH=python_path)
    here = socket.gethostname()
    check_refused(
        ended,
        f"optimizer.lr: {here} (rank 1) has 0.5; the others have 0.003\n",
        f"logging.eval_iters: {here} (rank 1) has 2; the others have 1\n",
        f"megatron-core: {here} (rank 1) has 0.19.9; the others have ",
        "Give all nodes the same recipe and overrides; install the same versions on all nodes",
    )


# rank 1 sees one GPU, as with --gpus-per-task=1; rank 0, which has no problem, a CPU
ONE_GPU = """
import os, sys
from megatron_xielu.training.resolve import Machine
if os.environ["LOCAL_RANK"] == "1":
    Machine.detect = classmethod(lambda cls: cls("cuda", 1, False, False))
from megatron_xielu.cli import main
sys.exit(main())
"""


def test_a_rank_without_a_gpu(data_dir: Path, tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    words = [sys.executable, "-c", ONE_GPU, *command(tmp_path / "run", data_dir, TWO_RANKS)[3:]]
    ranks = [environment(**meeting, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    text = "(rank 1): no GPU is left for this rank: 2 ranks were started on its machine, and it "
    check_refused(
        run_together(words, ranks), f"{text}sees 1 of the GPUs", "--gpus-per-node, without"
    )


def test_gloo_takes_the_way_to_the_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    meet_module._choose_interface("127.0.0.1", None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    for own, elsewhere, chosen in (
        ("127.0.0.1", None, "lo"),
        (None, "127.0.0.1", "lo"),
        (None, None, None),
        # of no interface here
        ("192.0.2.1", None, None),
    ):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        meet_module._choose_interface(own, elsewhere)
        assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_data_that_one_machine_lacks(data_dir: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-data"
    ended = start(tmp_path / "run", data_dir, [], [f"data.path={missing}"])
    check_refused(ended, f"(rank 1): no data folder at {missing}")
