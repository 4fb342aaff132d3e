"""NCCL's choice of a network, in its own words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_xielu.errors import SharedUserError
from megatron_xielu.launch import network
from megatron_xielu.launch.meeting import Meeting
from megatron_xielu.training.meet import check_network
from tests.launch.test_nodes import free_port

# lines of NCCL's user guide (troubleshooting/logging.rst, 2.30.7)
OVER_IB = """\
node-01:3873285:3873285 [0] NCCL INFO Initialized NET plugin IB
node-01:3873285:3873285 [0] NCCL INFO Assigned NET plugin IB to comm
node-01:3873285:3873285 [0] NCCL INFO Assigned GIN plugin GIN_XXXX to comm
node-01:3873285:3873285 [0] NCCL INFO Using network IB
node-01:3873285:3873285 [0] NCCL INFO DMA-BUF is available on GPU device 0
"""
# lines of a run of NCCL 2.18 (pytorch/pytorch issue 124380)
OVER_TCP = """\
10-12-3-162:7990:8056 [0] NCCL INFO Plugin Path : /opt/hpcx/nccl_rdma_sharp_plugin/lib/libnccl-net.so
10-12-3-162:7990:8056 [0] NCCL INFO P2P plugin IBext
10-12-3-162:7990:8056 [0] NCCL INFO NET/IB : No device found.
10-12-3-162:7990:8056 [0] NCCL INFO NET/IB : No device found.
10-12-3-162:7990:8056 [0] NCCL INFO NET/Socket : Using [0]eno3:10.12.3.162<0>
10-12-3-162:7990:8056 [0] NCCL INFO Using non-device net plugin version 0
10-12-3-162:7990:8056 [0] NCCL INFO Using network Socket
"""  # noqa: E501
# lines of a run of NCCL 2.9.9 (NVIDIA/nccl issue 527)
OVER_EFA = """\
ip-10-216-179-87:417131:417177 [0] NCCL INFO NET/OFI Selected Provider is efa
ip-10-216-179-87:417131:417177 [0] NCCL INFO Using network AWS Libfabric
"""
# as src/plugin/net.cc and src/debug.cc of NCCL 2.29.7 print it, with times switched on
PLUGIN_FAILED = """\
[2026-05-05 06:16:47] node-01:12:34 [0] NCCL INFO Failed to initialize NET plugin Libfabric
[2026-05-05 06:16:47] node-01:12:34 [0] NCCL INFO Using network Socket
"""
RDMA = {"mlx5_0": "InfiniBand"}


def test_what_nccl_says_it_uses() -> None:
    found = [network.chosen(said) for said in (OVER_IB, OVER_TCP, OVER_EFA, PLUGIN_FAILED, "")]
    assert found == ["IB", "Socket", "AWS Libfabric", "Socket", None]


def test_tcp_beside_rdma_is_refused_with_nccls_reason() -> None:
    said = network.fell_back(OVER_TCP, {}, RDMA)
    assert said is not None
    assert "although there is mlx5_0 (InfiniBand) with a link:\n" in said
    assert said.count("  NET/IB : No device found.\n") == 1
    assert "--device=/dev/infiniband" in said
    said = network.fell_back(PLUGIN_FAILED, {}, {"rdmap0": "EFA"})
    assert "  Failed to initialize NET plugin Libfabric\nEFA needs the plugin" in str(said)


def test_tcp_that_is_all_there_is_or_meant() -> None:
    assert network.fell_back(OVER_TCP, {}, {}) is None
    assert network.fell_back(OVER_TCP, {"NCCL_NET": "socket"}, RDMA) is None
    assert network.fell_back(OVER_TCP, {"NCCL_IB_DISABLE": "1"}, RDMA) is None
    for said in (OVER_IB, OVER_EFA, ""):
        assert network.fell_back(said, {}, RDMA) is None


def test_a_user_who_asked_nccl_himself() -> None:
    own = {"NCCL_DEBUG": "WARN"}
    assert not network.ask_nccl(own, Path("/x"))
    assert own == {"NCCL_DEBUG": "WARN"}
    asked: dict[str, str] = {}
    assert network.ask_nccl(asked, Path("/runs/50%/nccl"))
    # NCCL would put a host's name for %h
    assert asked["NCCL_DEBUG_FILE"] == "/runs/50%%/nccl"
    assert asked["NCCL_DEBUG_SUBSYS"] == "INIT,NET"


def test_devices_with_a_link(tmp_path: Path) -> None:
    """As the kernel shows them: one file per port for its state and its kind of link."""
    for name, state, link, driver in (
        ("mlx5_0", "4: ACTIVE", "InfiniBand", "mlx5_core"),
        ("mlx5_1", "1: DOWN", "InfiniBand", "mlx5_core"),
        ("mlx5_2", "4: ACTIVE", "Ethernet", "mlx5_core"),
        ("rdmap16s27", "4: ACTIVE", "Unspecified", "efa"),
    ):
        port = tmp_path / "class" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{link}\n")
        (tmp_path / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (port.parents[1] / "device").mkdir()
        (port.parents[1] / "device/driver").symlink_to(tmp_path / "drivers" / driver)
    expected = {"mlx5_0": "InfiniBand", "mlx5_2": "RoCE", "rdmap16s27": "EFA"}
    assert network.devices(tmp_path / "class") == expected
    assert network.devices(tmp_path / "none") == {}


def check(logs: Sequence[Path | None]) -> list[str]:
    """What each rank, a thread here, prints or is refused with."""

    def come(rank: int) -> str:
        terminal = io.StringIO()
        try:
            check_network(Meeting(rank, len(logs), 60), logs[rank], terminal)
        except SharedUserError as error:
            return f"refused: {error}"
        return terminal.getvalue()

    with ThreadPoolExecutor(len(logs)) as pool:
        return list(pool.map(come, range(len(logs))))


def test_one_machine_on_tcp_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "devices", lambda: RDMA)
    monkeypatch.delenv("NCCL_NET", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    logs = [tmp_path / "nccl_00000.log", None, tmp_path / "nccl_00002.log"]
    (tmp_path / "nccl_00000.log").write_text(OVER_IB)
    (tmp_path / "nccl_00002.log").write_text(OVER_IB)
    assert check(logs) == ["NCCL between machines: IB\n", "", ""]
    (tmp_path / "nccl_00002.log").write_text(OVER_TCP)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    (said,) = set(check(logs))
    assert "(rank 2): NCCL goes over TCP between the nodes" in said
