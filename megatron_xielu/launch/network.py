"""Which network NCCL chose between nodes, read from what it says itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_RDMA = Path("/sys/class/infiniband")
# NCCL's own name for TCP, in NCCL_NET too
_TCP = "Socket"
# `INFO(NCCL_INIT, "Using network %s", ...)`, src/init.cc of NCCL 2.21.5 to 2.30.7, behind the
# prefix of src/debug.cc: host:pid:tid [cuda device] NCCL INFO
_USING = re.compile(r"NCCL INFO Using network (.+)$", re.MULTILINE)
# why none of RDMA was taken: plugins that were not found or failed, devices that were not
_WHY = re.compile(
    r"NCCL INFO ((?:NET/(?:IB|OFI|Plugin)|Failed to initialize NET).*)$", re.MULTILINE
)
_MOST_REASONS = 4


def ask_nccl(environment: MutableMapping[str, str], log: Path) -> bool:
    """Let NCCL write to a file what it does while communicators are made; that costs no step.

    Args:
        environment: of this process, whose NCCL has not spoken yet.

    Returns:
        False where the user has set NCCL_DEBUG, who then reads it himself.
    """
    if "NCCL_DEBUG" in environment:
        return False
    environment["NCCL_DEBUG"] = "INFO"
    environment["NCCL_DEBUG_SUBSYS"] = "INIT,NET"
    # NCCL takes % for a placeholder
    environment["NCCL_DEBUG_FILE"] = str(log).replace("%", "%%")
    return True


def chosen(said: str) -> str | None:
    """The network that NCCL uses: IB, Socket or a plugin's name; None where it does not say."""
    found = _USING.search(said)
    return found[1].strip() if found else None


def fell_back(
    said: str, environment: Mapping[str, str], rdma: Mapping[str, str] | None = None
) -> str | None:
    """Why a run on several nodes should not go on over what NCCL chose; None if it may.

    Args:
        said: by NCCL while it made its first communicator.
        rdma: this machine's devices, by default those that the kernel knows.
    """
    wanted = environment.get("NCCL_NET", "").lower() == _TCP.lower()
    if chosen(said) != _TCP or wanted or environment.get("NCCL_IB_DISABLE") == "1":
        return None
    rdma = devices() if rdma is None else rdma
    if not rdma:
        return None
    names = ", ".join(sorted(rdma))
    remedy = (
        "let the container see them (docker: --device=/dev/infiniband --cap-add IPC_LOCK; "
        "Kubernetes: `launch k8s --rdma`), or look at NCCL_IB_HCA"
    )
    if "EFA" in rdma.values():
        remedy = "EFA needs the plugin aws-ofi-nccl in the image and NCCL_NET_PLUGIN=ofi"
    reasons = list(dict.fromkeys(_WHY.findall(said)))[:_MOST_REASONS]
    return "\n".join(
        [
            f"NCCL goes over TCP between the nodes, although there is {names} "
            f"({', '.join(sorted(set(rdma.values())))}) with a link:",
            *(f"  {reason}" for reason in reasons),
            f"{remedy}. `launch --fabric` sets what each network needs; NCCL_NET=Socket says that "
            "TCP is meant.",
        ]
    )


def devices(folder: Path = _RDMA) -> dict[str, str]:
    """RDMA devices with an active port, and of which kind: InfiniBand, RoCE or EFA.

    The kernel shows them inside containers too, also in one that may not use them.
    """
    found = {}
    for port in sorted(folder.glob("*/ports/*")):
        device = port.parents[1]
        # "4: ACTIVE"
        if "ACTIVE" not in _read(port / "state"):
            continue
        driver = device / "device/driver"
        if driver.exists() and driver.resolve().name == "efa":
            found[device.name] = "EFA"
        else:
            kind = _read(port / "link_layer")
            found[device.name] = "RoCE" if kind == "Ethernet" else kind
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
