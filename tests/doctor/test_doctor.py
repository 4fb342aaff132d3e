"""`doctor`: the checks that a CPU can do are done, the others skipped, and none harms another."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_xielu import cli
from megatron_xielu.doctor import machine
from megatron_xielu.doctor.checks import CHECKS, Check
from megatron_xielu.doctor.run import check_all, run
from megatron_xielu.training.transformer_engine import Found
from tests.ranks import ROOT, environment

H100 = Found("2.20.2", None, "13.0", (("NVIDIA H100 80GB HBM3", 9, 0),))
NOTHING = Found(None, "No module named 'transformer_engine'", "13.0", ())
ON_A_CPU = [check.name for check in CHECKS if not check.gpu and check.quick]


@pytest.fixture(scope="module")
def printed() -> str:
    """What the command prints on this machine without a GPU."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu", "doctor"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - begin < 120
    return done.stdout


@pytest.mark.parametrize("name", ON_A_CPU)
def test_what_a_cpu_can_do_is_done(name: str, printed: str) -> None:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name}  ")]
    # the CPU kernels may have no compiler here
    assert re.search(r" (pass|skipped) +\d+\.\d s  \w+", line), line


def test_what_needs_a_gpu_is_skipped_with_the_reason(printed: str) -> None:
    for check in CHECKS:
        if check.gpu and check.quick:
            assert re.search(
                rf"^  {re.escape(check.name)} +skipped +no GPU: CUDA_VISIBLE_DEVICES is empty$",
                printed,
                re.MULTILINE,
            ), check.name
    total = sum(check.quick for check in CHECKS)
    passed, failed, skipped = map(
        int, re.findall(r"(\d+) passed, (\d+) failed, (\d+) skipped", printed)[0]
    )
    assert (passed + skipped, failed) == (total, 0)


def test_the_versions_are_listed_beside_the_tested_ones(printed: str) -> None:
    tested = machine.tested_versions(machine.versions_file())
    assert tested["megatron-core"] == "0.19.2"
    found = machine.version("torch")
    state = "as tested" if found == tested["torch"] else f"tested with {tested['torch']}"
    assert re.search(rf"^  torch +{found} +{state}$", printed, re.MULTILINE)
    assert machine.tested_versions(ROOT / "no such file") == {}
    assert machine.version("no-such-package") is None


def fault(name: str, **settings: object) -> Check:
    return replace(Check(name, f"tests.doctor.faults:{name}"), **settings)


@pytest.mark.parametrize(
    ("name", "verdict", "said"),
    [
        ("crashes", "FAIL", "ended by SIGSEGV"),
        ("raises", "FAIL", "ended by exit code 1: ValueError: what went wrong"),
        ("fails", "FAIL", "3 is not 4"),
        ("skips", "skipped", "there is none"),
    ],
)
def test_a_check_that_goes_wrong_says_how(
    name: str, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = run(fault(name), NOTHING)
    assert (result.verdict, result.said) == (verdict, said)


def test_a_check_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    note = tmp_path / "pid"
    result = run(fault("hangs", argument=str(note), seconds=15), NOTHING)
    assert (result.verdict, result.said) == ("FAIL", "did not end within 15 s")
    assert_ends(int(note.read_text()))


def test_ctrl_c_ends_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    # where the tests themselves run in the background, a shell has told them to ignore it
    program = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.doctor.test_doctor import NOTHING, fault
from megatron_xielu.doctor.run import check_all
check_all([fault("hangs", argument={str(note)!r}, seconds=300)], NOTHING)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if note.exists() and note.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in said
    assert_ends(int(note.read_text()))


def assert_ends(pid: int) -> None:
    state = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        # init may not have reaped it yet
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("its process is still there")


def test_where_there_are_cores_checks_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    both = [replace(fault("meets", argument=str(tmp_path)), name=name) for name in ("b", "a")]
    assert check_all(both, NOTHING, workers=2)
    # in their order, whichever ends first
    assert re.findall(r"^  (\w) +pass", capsys.readouterr().out, re.MULTILINE) == ["b", "a"]


def test_a_check_is_no_rank_and_sees_a_gpu_only_if_it_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert run(fault("sees"), NOTHING).said == "'' False"
    assert run(fault("sees", gpu=True), H100).said == "'7' False"


def test_one_that_fails_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(machine, "probe", lambda: NOTHING)
    monkeypatch.setattr("megatron_xielu.doctor.run.CHECKS", (fault("fails"), fault("skips")))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^  fails +FAIL +\d+\.\d s  3 is not 4$", printed, re.MULTILINE)
    assert "0 passed, 1 failed, 1 skipped" in printed
    assert "CUDA_VISIBLE_DEVICES= " in printed


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        (H100, "FP8 blockwise, fused", None),
        (H100, "CPU kernels", None),
        (
            replace(H100, cuda="12.8"),
            "FP8 blockwise, fused",
            "needs compute capability 9.0 or newer, and CUDA 12.9 or newer",
        ),
        (
            replace(H100, gpus=(*H100.gpus, ("NVIDIA A100-SXM4-80GB", 8, 0))),
            "FP8 kernels",
            "NVIDIA A100-SXM4-80GB has no capability 8.9",
        ),
        (
            replace(H100, version=None, error="No module named 'transformer_engine'"),
            "training step, TransformerEngine",
            "TransformerEngine is not installed",
        ),
        (
            replace(H100, error="undefined symbol: x"),
            "training step, TransformerEngine",
            "TransformerEngine cannot be imported: undefined symbol: x",
        ),
    ],
)
def test_what_a_check_needs(found: Found, name: str, reason: str | None) -> None:
    (check,) = [check for check in CHECKS if check.name == name]
    assert check.why_not(found) == reason


@pytest.mark.parametrize("option", ["--quick", "--nproc=2", "--csv=x"])
def test_options_of_the_matrix_are_refused_without_it(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", option]) == 2
    name = option.partition("=")[0]
    assert f"{name} means nothing without --layouts" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", [check.name for check in CHECKS if check.gpu])
def test_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    (check,) = [check for check in CHECKS if check.name == name]
    result = run(check, machine.probe())
    if result.verdict == "skipped":
        pytest.skip(result.said)
    print(result)
    assert result.verdict == "pass", result.said
