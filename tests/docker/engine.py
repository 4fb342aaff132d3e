"""A private Docker engine and a stand-in for NVIDIA's image, kept in the user's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROGRAMS = ("dockerd", "docker", "mmdebstrap")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_xielu-docker"
# what NVIDIA's images pin, in part against Megatron-Core
PINS = "packaging==23.2\nnumpy==1.26.4\n"
PIN_FILE = "/etc/pip/constraint.txt"


def why_not() -> str | None:
    """Why no engine can be started here; None if it can."""
    if os.geteuid() != 0:
        return "a private Docker engine needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (Debian: docker.io, mmdebstrap)"
    if Path(sys.base_prefix) == Path("/usr"):
        return "the stand-in image takes a Python with a folder of its own, such as pyenv's"
    return None


class Engine:
    """A running engine's client."""

    def __init__(self, socket: str) -> None:
        # the client beside the engine has a builder of either kind
        beside = Path("/usr/bin/docker")
        self._client = str(beside) if beside.exists() else "docker"
        self.socket = socket
        self._environment = {**os.environ, "DOCKER_HOST": socket}

    def call(
        self, *words: object, timeout: float = 600, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker WORDS`."""
        return subprocess.run(
            [self._client, *map(str, words)],
            env={**self._environment, **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def __call__(self, *words: object, timeout: float = 600, **variables: str) -> str:
        """Run `docker WORDS`, which must succeed, and return what it printed."""
        done = self.call(*words, timeout=timeout, **variables)
        assert done.returncode == 0, f"docker {words}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def size(self, image: str) -> int:
        """Bytes of an image, its base included."""
        return int(self("image", "inspect", "-f", "{{.Size}}", image))

    def stand_in(self) -> str:
        """The tag of the stand-in, made now if it is not there."""
        parts = [inspect.getsource(each) for each in (_fill, _copy_python, _copy_torch)]
        parts += [PINS, importlib.metadata.version("torch"), sys.version]
        tag = f"stand-in:{hashlib.sha256(''.join(parts).encode()).hexdigest()[:12]}"
        if self.call("image", "inspect", tag).returncode != 0:
            # all that was built on another one
            self("system", "prune", "-a", "-f")
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _fill(Path(folder) / "root")
                self._import(Path(folder) / "root", tag)
        return tag

    def _import(self, root: Path, tag: str) -> None:
        changes = [f"ENV PIP_CONSTRAINT={PIN_FILE}", "ENV LANG=C.UTF-8"]
        # of this machine, like the certificates that it names
        changes += ["ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt"]
        options = [word for change in changes for word in ("--change", change)]
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                [self._client, "import", *options, "-", tag],
                env=self._environment,
                stdin=tar.stdout,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        assert tar.returncode == 0


@contextmanager
def engine() -> Iterator[Engine]:
    """An engine without bridge and firewall rules, whose images stay for the next time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (
        open(CACHE / "lock", "w") as lock,
        # a socket's path may have 107 bytes
        tempfile.TemporaryDirectory(prefix="docker-", dir="/tmp") as folder,
        open(CACHE / "dockerd.log", "w") as log,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        socket = f"unix://{folder}/socket"
        options = {"host": socket, "data-root": CACHE / "data", "exec-root": f"{folder}/exec"}
        options |= {"pidfile": f"{folder}/pid", "bridge": "none"}
        for name in ("iptables", "ip6tables", "ip-forward", "ip-masq"):
            options[name] = "false"
        words = ["dockerd", *(f"--{name}={value}" for name, value in options.items())]
        # containerd is in its process group, and Ctrl-C at the tests must not reach them first
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        client = Engine(socket)
        try:
            while client.call("info").returncode != 0:
                assert process.poll() is None, (CACHE / "dockerd.log").read_text()[-4000:]
                time.sleep(0.2)
            yield client
        finally:
            if containers := client.call("ps", "-aq").stdout.split():
                client("rm", "-f", *containers)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            # left mounted by the engine
            subprocess.run(["umount", "-l", f"{folder}/exec/netns/default"], capture_output=True)


def _fill(root: Path) -> None:
    """Debian, this Python and this torch, where NVIDIA's image has them."""
    release = Path("/etc/os-release").read_text()
    suite = re.findall(r"^VERSION_CODENAME=(\w+)", release, re.MULTILINE)[0]
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = re.findall(r"^URIs: (\S+)", sources.read_text(), re.MULTILINE)[:1]
    certificates = [
        f"--customize-hook=copy-in {file} /usr/local/share/ca-certificates/"
        for file in sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))
    ]
    # Debian's Python for the libraries that the modules of another are linked with
    packages = "ca-certificates,g++,libpython3-stdlib"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", *certificates]
    command += ['--customize-hook=chroot "$1" update-ca-certificates', suite, str(root), *mirror]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    _copy_python(root / "usr/local")
    _copy_torch(root / f"usr/local/lib/python{sys.version_info[0]}.{sys.version_info[1]}")
    (root / "etc/pip").mkdir()
    (root / "etc/pip/constraint.txt").write_text(PINS)
    # with what `set -eu` would not survive
    shell = "echo chosen\nfalse\nexport CUDA_CHOSEN=here$UNSET\n"
    (root / "etc/shinit_v2").write_text(shell)
    # whoever may not write into the image would compile all of it at each start
    compile_all = "python3 -m compileall -q -j 0 /usr/local/lib/python3*"
    for words in ("ldconfig", "python3 -m ensurepip", "python3 -c 'import torch'", compile_all):
        done = subprocess.run(
            ["chroot", root, "sh", "-c", words], capture_output=True, text=True, cwd="/"
        )
        # lib2to3 and others have files that are no Python on purpose
        assert done.returncode == 0 or words == compile_all, f"{words}\n{done.stderr}"


def _copy_python(target: Path) -> None:
    ignored = shutil.ignore_patterns("test", "__pycache__", "site-packages", "*.a")
    for name in ("bin", "lib", "include"):
        source = Path(sys.base_prefix) / name
        shutil.copytree(source, target / name, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    # scripts name an interpreter of this machine
    for script in (target / "bin").iterdir():
        if not script.name.startswith("python") and not script.is_symlink():
            script.unlink()


def _copy_torch(library: Path) -> None:
    """With all that it needs, and numpy."""
    names, todo = set(), ["torch", "numpy"]
    while todo:
        names.add(name := todo.pop())
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            # cuda-toolkit names its libraries by extras
            for extra in requirement.extras if wanted else ():
                for each in importlib.metadata.requires(requirement.name) or []:
                    part = Requirement(each)
                    if part.marker and part.marker.evaluate({"extra": extra}):
                        todo.append(canonicalize_name(part.name))
            if wanted:
                todo.append(canonicalize_name(requirement.name))
        todo = [each for each in todo if each not in names]
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or []:
            if file.parts[0] != ".." and file.suffix != ".pyc":
                target = library / "site-packages" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(distribution.locate_file(file), target)
