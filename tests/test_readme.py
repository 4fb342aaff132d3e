"""The README is true: its commands run, in its order, and its figures are those of this code."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.ranks import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAM = f"{sys.executable} -m megatron_xielu"


def commands() -> Iterator[str]:
    """Every command line of the README's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        yield from block.strip().splitlines()


def run(command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, shell=True, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: with a corpus in books.jsonl."""
    folder = tmp_path_factory.mktemp("readme")
    texts = [text for text in pydoc_data.topics.topics.values() if len(text) > 2000]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "books.jsonl").write_text(lines)
    return folder


def test_the_make_targets_exist() -> None:
    targets = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert targets == {"quickstart"}
    for target in ("quickstart", "test"):
        plan = run(f"make -n {target}", ROOT)
        assert {"quickstart": "megatron-xielu quickstart", "test": "pytest"}[target] in plan


def test_the_commands_of_use_run_in_order(folder: Path) -> None:
    ran = []
    for line in commands():
        if line.startswith("megatron-xielu "):
            output = run(line.replace("megatron-xielu", PROGRAM, 1), folder)
            ran.append(line.split()[1])
            if ran[-1] == "verify":
                assert "same token 100.00%" in output
    assert ran == [
        *("prepare-data", "pretrain", "convert", "verify", "convert"),
        *("generate", "plot", "pretrain"),
    ]
    assert (folder / "books.png").read_bytes()[1:4] == b"PNG"
    kept = {path.name for path in (folder / "runs/books").iterdir()}
    assert {"recipe.yaml", "checkpoints", "tensorboard", "metrics.jsonl", "logs"} <= kept


def test_the_torchrun_command_runs_on_this_machine(data_dir: Path, tmp_path: Path) -> None:
    (line,) = (line for line in commands() if line.startswith("torchrun "))
    here = {
        "torchrun": f"{sys.executable} -m torch.distributed.run",
        "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500": (
            "--standalone --nproc-per-node 2"
        ),
        "--recipe llama-3b-xielu": "--recipe llama-3b-xielu " + " ".join(SMALL),
        "data.path=/data": f"data.path={data_dir} model.vocab_size=512",
        "parallel.tensor_model_parallel_size=4": "parallel.tensor_model_parallel_size=2",
    }
    for written, meant in here.items():
        assert written in line
        line = line.replace(written, meant, 1)
    run(line, tmp_path)
    records = (tmp_path / "runs/llama-3b-xielu/metrics.jsonl").read_text().splitlines()
    assert sum('"train"' in record for record in records) == 5
    log = (tmp_path / "runs/llama-3b-xielu/logs/rank_00001.log").read_text()
    assert "params norm:" in log


def test_quickstart_does_what_it_promises(tmp_path: Path) -> None:
    output = run(f"{PROGRAM} quickstart --dir here", tmp_path)
    print(output[output.index("== summary") :])

    def number(pattern: str) -> float:
        found = re.search(pattern, output)
        assert found, pattern
        return float(found.group(1))

    before, after = number(r"held-out loss +([\d.]+)"), number(r"([\d.]+) after")
    entropy = number(r"token entropy +([\d.]+)")
    assert after < entropy - 1.0 < before
    assert number(r"logits +at most ([\d.e-]+)") <= 1e-4
    assert "same token at 100% of" in output
    for name in ("data/dataset.json", "run/recipe.yaml", "hf/model.safetensors", "plot.png"):
        assert (tmp_path / "here" / name).is_file()
    config = json.loads((tmp_path / "here/hf/config.json").read_text())
    assert (config["architectures"], config["hidden_act"]) == (["ArceeForCausalLM"], "xielu")
    following = output[output.index("\nnext\n") :]
    assert len(re.findall(r"^  \S*megatron.xielu\S* \w", following, re.MULTILINE)) == 3


def test_the_figures_are_this_codes() -> None:
    from megatron_xielu.analysis.planner import count_parameters
    from megatron_xielu.recipes import load_recipe

    size = count_parameters(load_recipe("tiny", ["model.vocab_size=2048"]).model)
    assert f"{size / 1e6:.1f}M-parameter" in README
