"""What importing TransformerEngine gives on this machine, as JSON; a program of its own.

The import may end the process and takes GPUs, so `training.transformer_engine` runs this in one
that is not a rank.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from typing import Any

# before TransformerEngine, which finds NCCL and cuDNN among the libraries that torch has loaded
import torch


def found() -> dict[str, Any]:
    """Version, the import's error, torch's CUDA, and of each GPU capability and memory."""
    seen: dict[str, Any] = {"cuda": torch.version.cuda, "version": None, "error": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        seen["version"] = importlib.metadata.version("transformer_engine")
    try:
        import transformer_engine

        seen["version"] = getattr(transformer_engine, "__version__", seen["version"])
        import transformer_engine.pytorch
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["gpus"] = [
        [torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)]
        for index in range(torch.cuda.device_count())
    ]
    seen["memory"] = [
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    ]
    return seen


if __name__ == "__main__":
    print(json.dumps(found()))
