"""The image, built from the Dockerfile on a stand-in for NVIDIA's and used as users would."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_xielu import __version__
from tests.conftest import SMALL
from tests.docker.engine import Engine, engine, why_not
from tests.launch.test_launch import own_address
from tests.ranks import environment

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
ROOT = Path(__file__).parents[2]
REVISION = "0123abc"
# neither root, nor the image's user, nor known in /etc/passwd
OWNER = 4321
LOCKED = (
    *("--network", "none", "--read-only", "--tmpfs", "/tmp", "--shm-size", "1g"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{OWNER}:{OWNER}"),
    *("--env", "OMP_NUM_THREADS=1"),
)
TINY = (
    *("pretrain", "--recipe", "tiny", "--run-dir", "runs/tiny"),
    *SMALL,
    *("data.path=data", "model.vocab_size=512", "parallel.tensor_model_parallel_size=2"),
)
SECRETS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\bgh[ps]_\w{36}\b",
)
# packages give examples of these
URL_WITH_PASSWORD = r"://[^/\s:@{}$<]+:[^/\s:@{}$<]+@[\w.]+"
# what lies on the disk: permissions, path, and whether it holds what looks like a secret
SURVEY = """
import os, re, sys
secrets = "|".join(sys.argv[2:])
in_packages, elsewhere = (re.compile(p.encode()) for p in (secrets, f"{secrets}|{sys.argv[1]}"))
for folder, folders, files in os.walk("/"):
    folders[:] = [each for each in folders if not os.path.ismount(os.path.join(folder, each))]
    for name in folders + files:
        path = os.path.join(folder, name)
        status = os.lstat(path)
        text = b""
        if os.path.isfile(path) and not os.path.islink(path) and status.st_size < 1 << 20:
            text = open(path, "rb").read()
        example = "/site-packages/" in path and not path.endswith("direct_url.json")
        found = (in_packages if example else elsewhere).search(text)
        print(oct(status.st_mode), int(bool(found)), path)
"""


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    with engine() as client:
        yield client


@pytest.fixture(scope="module")
def base(docker: Engine) -> str:
    return docker.stand_in()


def build(docker: Engine, base: str, buildkit: bool) -> str:
    tag = f"megatron-xielu:{'buildkit' if buildkit else 'legacy'}"
    arguments = [f"BASE_IMAGE={base}", f"REVISION={REVISION}"]
    # the private engine has no bridge
    words = ["build", "--network=host", *(f"--build-arg={each}" for each in arguments)]
    begin = time.monotonic()
    docker(*words, "-t", tag, ROOT, timeout=1800, DOCKER_BUILDKIT=str(int(buildkit)))
    print(f"{tag}: built in {time.monotonic() - begin:.0f} s")
    return tag


@pytest.fixture(scope="module")
def image(docker: Engine, base: str) -> Iterator[str]:
    tag = build(docker, base, buildkit=False)
    yield tag
    # layers that newer ones have replaced
    docker("image", "prune", "-f")


@pytest.fixture(scope="module")
def trained(docker: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after text was prepared and a model trained in containers."""
    folder = tmp_path_factory.mktemp("work")
    texts = [text for text in pydoc_data.topics.topics.values() if len(text) > 2000]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:40])
    (folder / "books.jsonl").write_text(lines)
    os.chown(folder, OWNER, OWNER)
    run(docker, image, folder, "prepare-data", "data", "books.jsonl", "--vocab-size", "512")
    begin = time.monotonic()
    run(docker, image, folder, *TINY)
    print(f"five steps of two ranks, start and end included: {time.monotonic() - begin:.1f} s")
    return folder


def run(docker: Engine, image: str, folder: Path, *words: str) -> str:
    """A command that succeeds, shut off from all but this folder."""
    return docker("run", "--rm", *LOCKED, "--volume", f"{folder}:/work", image, *words)


def python(docker: Engine, image: str, program: str, *words: str) -> str:
    options = ("--rm", "--network=none", "--user=0", "--entrypoint=python3")
    return docker("run", *options, image, "-c", program, *words)


def outside(folder: Path, *words: str) -> None:
    """The same command without a container."""
    program = [sys.executable, "-m", "megatron_xielu", *words]
    done = subprocess.run(
        program, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def train_steps(folder: Path) -> list[int]:
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["type"] == "train"]


def test_buildkit_builds_it_too(docker: Engine, base: str) -> None:
    tag = build(docker, base, buildkit=True)
    assert "usage: megatron-xielu" in docker("run", "--rm", "--network=none", tag)


def test_the_base_stays_and_its_constraints_go(docker: Engine, base: str, image: str) -> None:
    program = """
import importlib.metadata
for each in importlib.metadata.distributions():
    print(each.name.lower(), each.version)
"""
    before, after = (
        dict(line.split() for line in python(docker, tag, program).splitlines())
        for tag in (base, image)
    )
    assert {name: after[name] for name in before if name not in ("pip", "setuptools")} == {
        name: before[name] for name in before if name not in ("pip", "setuptools")
    }
    assert len([name for name in before if name.startswith(("torch", "triton", "nvidia"))]) > 10
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    added = {name: version for name, version in after.items() if name in pins}
    assert added == {name: pins[name] for name in added}
    # the base's constraint file pins an older one
    assert after["packaging"] == pins["packaging"]


def test_labels_and_user(docker: Engine, base: str, image: str) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.base.name"] == base
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", found["Config"]["User"])


def test_its_size(docker: Engine, base: str, image: str) -> None:
    added = docker.size(image) - docker.size(base)
    print(f"\n{added / 1e6:.0f} MB over the base of {docker.size(base) / 1e9:.2f} GB")
    print(docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image))
    # of which the pinned packages are 358 MB
    assert added < 450e6


def test_nothing_in_it_is_secret_or_writable_by_all(docker: Engine, base: str, image: str) -> None:
    words = (SURVEY, URL_WITH_PASSWORD, *SECRETS)
    before, after = ({*python(docker, tag, *words).splitlines()} for tag in (base, image))
    added = [line.split(maxsplit=2) for line in after - before]
    assert len(added) > 1000
    # a link's own permissions mean nothing
    assert not [each for each in added if int(each[0], 8) & 0o2 and not each[0].startswith("0o12")]
    assert not [path for _, secret, path in added if secret == "1"]
    names = {Path(path).name for _, _, path in added}
    assert not names & {".git", ".netrc", ".env", "pip.conf", ".pypirc", ".docker"}
    assert "constraints.txt" in names
    assert not re.search(
        "|".join((URL_WITH_PASSWORD, *SECRETS)), docker("history", "--no-trunc", image)
    )


def test_a_user_without_a_name_trains_and_owns_what_came_of_it(trained: Path) -> None:
    assert train_steps(trained) == [1, 2, 3, 4, 5]
    owners = {(p.stat().st_uid, p.stat().st_gid) for p in (trained / "runs").rglob("*")}
    assert owners == {(OWNER, OWNER)}


def test_its_run_is_converted(docker: Engine, image: str, trained: Path) -> None:
    run(docker, image, trained, "convert", "to-hf", "runs/tiny", "models/tiny")
    assert "same token 100.00%" in run(docker, image, trained, "verify", "models/tiny", "runs/tiny")
    assert (trained / "models/tiny/model.safetensors").stat().st_uid == OWNER


def test_the_plan_and_the_doctor(docker: Engine, image: str, trained: Path) -> None:
    words = ("pretrain", "--recipe", "llama-1.1b-xielu", "--for-gpu", "--nproc", "88")
    assert "MFU" in run(docker, image, trained, *words)
    printed = run(docker, image, trained, "doctor")
    assert re.search(r"^  CPU kernels +pass", printed, re.MULTILINE)
    assert re.search(r"^  torch +\S+ +as tested$", printed, re.MULTILINE)
    assert "0 failed" in printed


def test_the_image_cannot_change_and_needs_no_compiler(
    docker: Engine, image: str, trained: Path
) -> None:
    program = "from megatron_xielu.ops.cpu import build; print(build.built())"
    words = ("--env", "CXX=/no/compiler", "--volume", f"{trained}:/work", image)
    found = docker("run", "--rm", *LOCKED, *words, "python", "-c", program)
    assert found.startswith("/opt/megatron_xielu/kernels/")


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, ("nonsense",), "invalid choice"),
        (2, ("pretrain", "--recipe", "no-such-recipe"), "no-such-recipe"),
        (3, ("sh", "-c", "exit 3"), ""),
    ],
)
def test_exit_codes_pass_through(
    code: int, words: tuple[str, ...], said: str, docker: Engine, image: str
) -> None:
    done = docker.call("run", "--rm", *LOCKED, image, *words)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_temporary_folder_that_is_missing_is_said(docker: Engine, image: str) -> None:
    done = docker.call("run", "--rm", "--network=none", "--read-only", image, "--help")
    assert done.returncode == 2
    assert "add --tmpfs /tmp:exec" in done.stderr


def test_the_bases_choice_of_cuda_libraries_is_kept(docker: Engine, image: str) -> None:
    said = docker("run", "--rm", *LOCKED, image, "sh", "-c", "echo $CUDA_CHOSEN")
    assert said == "here\n"


def documented() -> list[str]:
    documents = (ROOT / "README.md", ROOT / "docs/docker.md")
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    return re.findall(r"^ *(docker run .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", documented())
def test_what_the_documents_say_runs(
    line: str, docker: Engine, image: str, trained: Path, tmp_path: Path
) -> None:
    os.chown(tmp_path, OWNER, OWNER)
    shutil.copytree(trained / "data", tmp_path / "data/books")
    shutil.copytree(trained / "data", tmp_path / "data", dirs_exist_ok=True)
    # without GPUs, the right to lock memory, and a network
    for option in ("--gpus all ", "--ulimit memlock=-1 ", "--network none "):
        line = line.replace(option, "")
    line = line.replace("$(id -u):$(id -g)", f"{OWNER}:{OWNER}").replace("$PWD", str(tmp_path))
    line = line.replace("-v /data:", f"-v {tmp_path}/data:").replace(
        " megatron-xielu ", f" {image} "
    )
    options = ("--rm", "--network=none", "--env=OMP_NUM_THREADS=1")
    docker("run", *options, *shlex.split(line)[2:], *SMALL, "model.vocab_size=512")
    assert len(list(tmp_path.glob("runs/*/checkpoints/iter_0000005"))) == 1


def test_docker_stop_saves_and_the_run_goes_on_outside(
    docker: Engine, image: str, trained: Path
) -> None:
    run_dir = trained / "runs/tiny"
    longer = ("training.train_iters=100000", "checkpoint.save_interval=100000")
    words = (*TINY, *longer, "logging.eval_interval=100000")
    words += ("--allow-changed", "training.train_iters")
    mount = ("--volume", f"{trained}:/work")
    container = docker("run", "--detach", *LOCKED, *mount, image, *words).strip()
    begin = time.monotonic()
    while train_steps(trained)[-1] < 20:
        running = docker("inspect", "-f", "{{.State.Running}}", container).strip()
        assert running == "true", docker.call("logs", container)
        time.sleep(0.2)
    print(f"at step {train_steps(trained)[-1]} {time.monotonic() - begin:.1f} s after the start")
    begin = time.monotonic()
    docker("stop", "--time", 60, container)
    print(f"stopped within {time.monotonic() - begin:.1f} s")
    # 137 would be a kill
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container).strip() == "0"
    stopped = train_steps(trained)[-1]
    assert (run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(stopped)
    docker("rm", container)

    outside(trained, "checkpoint", "verify", "runs/tiny")
    outside(trained, *words, f"training.train_iters={stopped + 3}")
    assert train_steps(trained)[-3:] == [stopped + 1, stopped + 2, stopped + 3]


def launched(
    docker: Engine, image: str, folder: Path, *words: str, name: str = "tiny", **more: str
) -> subprocess.Popen[str]:
    """The container of `launch docker`, as it is rendered for CPUs but for `more` and its name."""
    program = [sys.executable, "-m", "megatron_xielu", "launch", "docker", "tiny", "--cpu"]
    program += ["--image", image, "--run-dir", "runs/tiny", *TINY[5:], *words]
    variables = environment(
        XDG_CACHE_HOME=folder / "cache",
        DOCKER_HOST=docker.socket,
        # the client beside the engine comes first
        PATH=f"/usr/bin:{os.environ['PATH']}",
    )
    script = subprocess.run(
        program, cwd=folder, env=variables, capture_output=True, text=True, check=True
    ).stdout
    for old, new in {"--name tiny": f"--name {name}", **more}.items():
        assert old in script, script
        script = script.replace(old, new)
    return subprocess.Popen(
        ["sh", "-c", script],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder: Path, step: int, *running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not (folder / "runs/tiny/metrics.jsonl").exists() or train_steps(folder)[-1:] < [step]:
        assert all(each.poll() is None for each in running), running[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def prepared(trained: Path, tmp_path: Path) -> Path:
    """A folder with data and no run."""
    shutil.copytree(trained / "data", tmp_path / "data")
    return tmp_path


def test_launch_docker_runs_here_and_a_stop_saves(
    docker: Engine, image: str, prepared: Path
) -> None:
    # the private engine has no network to give
    alone = {"docker run --rm": "docker run --rm --network none"}
    words = ("--gpus-per-node", "2", "training.train_iters=100000")
    words += ("checkpoint.save_interval=100000", "logging.eval_interval=100000")
    container = launched(docker, image, prepared, *words, **alone)
    wait_for_step(prepared, 20, container)
    begin = time.monotonic()
    docker("stop", "tiny", timeout=400)
    print(f"stopped within {time.monotonic() - begin:.1f} s")
    assert container.wait(timeout=60) == 0
    stopped = train_steps(prepared)[-1]
    latest = prepared / "runs/tiny/checkpoints/latest_checkpointed_iteration.txt"
    assert latest.read_text() == str(stopped)
    again = launched(docker, image, prepared, *words, **alone)
    wait_for_step(prepared, stopped + 3, again)
    docker("stop", "tiny", timeout=400)
    assert again.wait(timeout=60) == 0
    assert train_steps(prepared).count(stopped + 1) == 1


def test_two_containers_train_together_and_one_is_replaced(
    docker: Engine, image: str, prepared: Path
) -> None:
    head = own_address()
    records = prepared / "runs/tiny/metrics.jsonl"
    words = ("--nodes", "2", "--gpus-per-node", "1", "--head", head, "training.train_iters=60")
    words += ("checkpoint.save_interval=20", "logging.eval_interval=1000")

    def machine(name: str) -> subprocess.Popen[str]:
        # each with a network of its own, as two machines have
        own = {"--network host": f"--network machines --hostname {name}"}
        own[f"--head {head}"] = "--head machine0"
        return launched(docker, image, prepared, *words, name=name, **own)

    docker("network", "create", "--internal", "--subnet=10.79.0.0/24", "machines")
    try:
        first, killed = machine("machine0"), machine("machine1")
        while not (prepared / "runs/tiny/checkpoints/iter_0000020").exists():
            for each in (first, killed):
                assert each.poll() is None, each.communicate()[0]
            time.sleep(0.2)
        # speeds included, which no two runs share
        trained_once = records.read_text().splitlines()[:20]
        docker("kill", "machine1")
        assert killed.wait(timeout=60) == 137
        begin = time.monotonic()
        second = machine("machine1")
        outputs = [each.communicate(timeout=600)[0] for each in (first, second)]
        print(f"a container replaced and all 60 steps done after {time.monotonic() - begin:.0f} s")
    finally:
        docker.call("rm", "-f", "machine0", "machine1")
        docker.call("network", "rm", "machines")
    assert [each.returncode for each in (first, second)] == [0, 0], outputs
    assert train_steps(prepared) == list(range(1, 61))
    assert records.read_text().splitlines()[:20] == trained_once


def test_a_second_container_of_a_machine_is_told_that_it_is_one_too_many(
    docker: Engine, image: str, prepared: Path
) -> None:
    head = own_address()
    words = ("--nodes", "2", "--gpus-per-node", "1", "--head", head)
    first = launched(docker, image, prepared, *words)
    try:
        # the network is the machine's, and so are its sockets
        while f"@megatron-xielu {head}" not in Path("/proc/net/unix").read_text():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        same = launched(docker, image, prepared, *words)
        output = same.communicate(timeout=300)[0]
        assert same.returncode == 125, output
        assert "is already in use by container" in output
        other = launched(docker, image, prepared, *words, name="other")
        output = other.communicate(timeout=300)[0]
        assert other.returncode == 2, output
        # process ids in containers differ by chance
        assert any(
            text in output
            for text in (
                f"another torchrun at {head} has the process id",
                f"the port of --head {head} is taken on this machine",
            )
        )
    finally:
        docker.call("rm", "-f", "tiny", "other")
        first.communicate(timeout=60)
