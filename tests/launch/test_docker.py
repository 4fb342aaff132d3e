"""`launch docker`: what the shell hands to `docker run`; tests/docker runs it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.launch import docker
from megatron_xielu.launch.job import Job
from tests.launch.conftest import arguments_of
from tests.launch.test_launch import own_address
from tests.ranks import ROOT

JOB = Job(
    recipe="llama-3b-xielu",
    overrides=("data.path=/data/x y",),
    megatron_flags=("--data-cache-path=/data/$HOME",),
    nodes=2,
    gpus_per_node=8,
    stop_seconds=400,
)
ONE = Job(recipe="llama-3b-xielu", gpus_per_node=2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user stands, without variables for the libraries."""
    for name in [name for name in os.environ if name.startswith(docker._FORWARDED)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "it's $HOME `id`"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def words(job: Job, **how: object) -> list[str]:
    script = docker.render(job, image="image:1", **how)  # type: ignore[arg-type]
    return arguments_of("docker", script, Path.cwd().parent / "bin")


def values(given: list[str], option: str) -> list[str]:
    """Of an option of docker's, each time it is there."""
    outer = given[: given.index("image:1")]
    return [after for word, after in pairwise(outer) if word == option]


def sources(given: list[str]) -> dict[str, str]:
    """Of each mount's target, the cache's left out."""
    found = {}
    for mount in values(given, "--mount"):
        source, target = mount.removeprefix("type=bind,source=").split(",target=")
        found[target] = source
    assert Path(found.pop("/cache")).is_dir()
    return found


def test_two_machines_with_gpus(here: Path) -> None:
    head = own_address()
    given = words(JOB, head=head)
    inner = given.index("image:1") + 1
    run_dir = str(here / "runs/llama-3b-xielu")
    assert given[inner:] == [
        *("launch", "local", "llama-3b-xielu", "--submit", "--run-dir", run_dir),
        *("--nodes", "2", "--gpus-per-node", "8", "--stop-seconds", "400", "--head", head),
        *("data.path=/data/x y", "--", "--data-cache-path=/data/$HOME"),
    ]
    over_efa = words(replace(JOB, fabric="efa"), head=head)
    assert "NCCL_NET=Libfabric" in values(over_efa, "--env")
    assert over_efa[over_efa.index("--fabric") + 1] == "efa"
    assert given[:4] == ["run", "--rm", "--name", "llama-3b-xielu"]
    assert values(given, "--gpus") == ["all"]
    assert values(given, "--ulimit") == ["memlock=-1", "stack=67108864", "nofile=65536"]
    assert values(given, "--ipc") == values(given, "--network") == ["host"]
    # Docker's own limit comes after torchrun's
    assert values(given, "--stop-timeout") == ["460"]
    assert values(given, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert values(given, "--workdir") == [str(here)]
    assert values(given, "--env") == ["CUDA_DEVICE_MAX_CONNECTIONS=1"]
    assert sources(given) == {str(here): str(here), "/data/x y,readonly": "/data/x y"}


def test_on_cpus_it_asks_for_no_gpu_and_no_right(here: Path) -> None:
    given = words(ONE, cpu=True)
    assert not values(given, "--gpus") + values(given, "--ulimit") + values(given, "--network")
    assert "--head" not in given


def test_rdma_devices_are_those_of_the_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "_INFINIBAND", here / "none")
    assert not values(words(JOB, head=own_address()), "--device")
    monkeypatch.setattr(docker, "_INFINIBAND", here)
    assert values(words(JOB, head=own_address()), "--device") == [str(here)]
    # where the network is the container's own they would be of no use
    assert not values(words(ONE), "--device")


def test_variables_of_this_shell_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO\nexit 3")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0,lo")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("HF_TOKEN", "secret")
    ours = "CUDA_DEVICE_MAX_CONNECTIONS=1"
    assert values(words(ONE), "--env") == ["NCCL_DEBUG=INFO\nexit 3", ours]
    given = words(JOB, head=own_address())
    assert values(given, "--env") == [
        *("NCCL_DEBUG=INFO\nexit 3", "NCCL_SOCKET_IFNAME=^docker0,lo"),
        ours,
    ]


def test_a_volume_has_the_place_that_it_is_given(here: Path, tmp_path: Path) -> None:
    job = Job(
        recipe="tiny",
        overrides=("data.path=/data/books",),
        gpus_per_node=2,
        run_dir=Path("/data/runs/a"),
    )
    books = tmp_path / "books"
    given = words(job, volumes=[f"{books}:/data", "/scratch", "/etc/x:/x:ro"])
    assert sources(given) == {
        "/data": str(books),
        "/scratch": "/scratch",
        "/x,readonly": "/etc/x",
        str(here): str(here),
    }
    # it is the container's path
    assert not books.exists()


def test_what_lies_elsewhere_is_mounted_and_where_links_lead_to(here: Path, tmp_path: Path) -> None:
    (tmp_path / "disk/books").mkdir(parents=True)
    (here / "data").symlink_to(tmp_path / "disk/books")
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(ROOT / "megatron_xielu/recipes/presets/tiny.yaml", recipe)
    runs = tmp_path / "big/runs"
    job = Job(
        recipe=str(recipe),
        overrides=("data.path=data",),
        gpus_per_node=2,
        run_dir=runs / "a",
    )
    assert sources(words(job)) == {
        str(here): str(here),
        str(runs): str(runs),
        f"{tmp_path}/disk/books,readonly": f"{tmp_path}/disk/books",
        f"{recipe},readonly": str(recipe),
    }
    # by the script, as this user's
    assert runs.is_dir()


def test_a_mistake_is_said_before_docker_hears_of_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--nodes 2 needs a meeting point: give --head HOST"):
        words(JOB)
    with pytest.raises(UserError, match=r"--head localhost is \S+ here, which every node takes"):
        words(JOB, head="localhost")
    with pytest.raises(UserError, match="tensor_model_parallel_size"):
        words(Job(recipe="llama-3b-xielu", gpus_per_node=1))
    for volume in ("data:/data", "/data:data", "/data:/data:rw", ""):
        with pytest.raises(UserError, match=r"must be FOLDER\[:TARGET\[:ro\]\] with whole paths"):
            words(ONE, volumes=[volume])
    (here / "a,b").mkdir()
    monkeypatch.chdir("a,b")
    with pytest.raises(UserError, match=r"a,b cannot be mounted .* separated by ','"):
        words(ONE)
