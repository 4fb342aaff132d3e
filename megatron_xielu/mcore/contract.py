"""What this package relies on in Megatron-Core, written down so that a test can name what moved."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from megatron_xielu.errors import UserError

MEGATRON_CORE = (Version("0.19.2"), Version("0.20"))


def check_version() -> None:
    """Raise UserError unless the installed Megatron-Core is one this was written against."""
    lowest, below = MEGATRON_CORE
    found = Version(version("megatron-core"))
    if not lowest <= found < below:
        raise UserError(
            f"megatron-core {found} is installed; this release is written against "
            f">={lowest},<{below}: pip install 'megatron-core=={lowest}'"
        )
