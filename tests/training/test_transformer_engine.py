"""TransformerEngine that is missing, too old or broken, and GPUs without FP8: said beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import load_recipe
from megatron_xielu.training.announce import fp8_results, libraries
from megatron_xielu.training.job import Job
from megatron_xielu.training.pretrain import _placeholder
from megatron_xielu.training.resolve import Machine, resolve
from megatron_xielu.training.transformer_engine import NEEDS, Found, can_run, check, install_command
from tests.ranks import environment

CU = f"cu{(torch.version.cuda or '13').partition('.')[0]}"
INSTALL = (
    f'pip install --no-build-isolation --no-cache-dir "transformer-engine[core_{CU},pytorch]>=2.17"'
)
UNDEFINED = (
    "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so: undefined symbol: "
    "_ZN3c104cuda9SetDeviceEab"
)
NO_CUDA = "libcublas.so.12: cannot open shared object file: No such file or directory"
H100 = ("NVIDIA H100 80GB HBM3", 9, 0)
B200 = ("NVIDIA B200", 10, 0)
A100 = ("NVIDIA A100-SXM4-80GB", 8, 0)
L4 = ("NVIDIA L4", 8, 9)

CHECK = """
import json
from megatron_xielu.errors import UserError
from megatron_xielu.training import transformer_engine
found, said = transformer_engine.probe(), {}
for recipe in ("off", "tensorwise"):
    try:
        transformer_engine.check(recipe, found)
    except UserError as error:
        said[recipe] = str(error)
print(json.dumps(said))
"""


def package(folder: Path, init: str, pytorch: str | None = "") -> Path:
    """A transformer_engine package with this source, and its own subpackage if not None."""
    path = folder / "transformer_engine"
    path.mkdir()
    (path / "__init__.py").write_text(init)
    if pytorch is not None:
        (path / "pytorch").mkdir()
        (path / "pytorch/__init__.py").write_text(pytorch)
    about = folder / "transformer_engine-2.20.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.20.2\n"
    )
    return folder


def said(folder: Path) -> dict[str, str]:
    """What `check` says, by fp8.recipe, in a process that finds the package of this folder."""
    return json.loads(in_process(CHECK, folder))


def in_process(program: str, folder: Path) -> str:
    # before a TransformerEngine that the tests themselves run with
    path = f"{folder}:{environment()['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# upstream's own package swallows its extension's ImportError and looks importable
SWALLOWS = (
    "__version__ = '2.20.2'\ntry:\n    from . import pytorch\nexcept ImportError:\n    pass\n"
)


@pytest.mark.parametrize(
    ("init", "pytorch", "found"),
    [
        (
            SWALLOWS,
            f"raise ImportError({UNDEFINED!r})",
            f"TransformerEngine 2.20.2 cannot be imported:\n  ImportError: {UNDEFINED}",
        ),
        (
            f"raise OSError({NO_CUDA!r})",
            None,
            f"TransformerEngine 2.20.2 cannot be imported:\n  OSError: {NO_CUDA}",
        ),
        # built without the extension for PyTorch
        (
            "",
            None,
            "TransformerEngine 2.20.2 cannot be imported:\n  ModuleNotFoundError: No module named "
            "'transformer_engine.pytorch'",
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
            None,
            "TransformerEngine cannot be imported:\n  the process that imported it ended with "
            "signal 11",
        ),
    ],
    ids=["undefined symbol", "wrong CUDA", "no extension", "crash"],
)
def test_a_broken_package_is_told_with_the_command_that_mends_it(
    tmp_path: Path, init: str, pytorch: str | None, found: str
) -> None:
    messages = said(package(tmp_path, init, pytorch))
    for recipe, wanted, instead in (
        ("tensorwise", "fp8.recipe=tensorwise", "fp8.recipe=off model.transformer_impl=local"),
        ("off", "model.transformer_impl=transformer_engine", "model.transformer_impl=local"),
    ):
        remove = "transformer-engine transformer-engine-torch transformer-engine-cu12"
        # a process that crashed could not tell torch's CUDA any more
        install = INSTALL.replace(CU, "cu13") if "signal" in found else INSTALL
        assert messages[recipe] == (
            f"{wanted} cannot run here: {found}\nInstall it anew, or set {instead}:\n"
            f"  pip uninstall -y {remove} transformer-engine-cu13\n  {install}"
        )


GPU_MACHINE = """
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import load_recipe
from megatron_xielu.training.job import Request, make_job
from megatron_xielu.training.resolve import Machine
recipe = load_recipe("tiny", ["model.vocab_size=512", "logging.eval_iters=1", "fp8.recipe=delayed"])
for machine in (Machine.gpu(), Machine("cuda", 2, True, False)):
    try:
        make_job(Request("tiny"), recipe, machine, check_data=False)
        print("passed")
    except UserError as error:
        print(error)
"""


def test_a_start_on_gpus_asks_and_a_plan_for_gpus_does_not(tmp_path: Path) -> None:
    folder = package(tmp_path, SWALLOWS, f"raise ImportError({UNDEFINED!r})")
    printed = in_process(GPU_MACHINE, folder).splitlines()
    assert printed[0] == "passed"
    assert printed[1].startswith("fp8.recipe=delayed cannot run here: TransformerEngine 2.20.2")
    assert UNDEFINED in printed[2]


def test_an_old_version(tmp_path: Path) -> None:
    message = said(package(tmp_path, "__version__ = '2.16.1+gabc123'"))["off"]
    assert message.startswith(
        "model.transformer_impl=transformer_engine cannot run here: this is TransformerEngine "
        "2.16.1+gabc123, and 2.17 or newer is needed. Install it anew, or set"
    )


def test_versions_that_are_new_enough(tmp_path: Path) -> None:
    assert said(package(tmp_path, "__version__ = '2.17.0'")) == {}
    for version in ("2.17.0.dev0+70f5366", "2.20.2", "3.0"):
        check("off", Found(version, None, "13.0", ()))
    for version in (None, "unknown", "2.9.0"):
        with pytest.raises(UserError, match=r"2\.17 or newer is needed"):
            check("off", Found(version, None, "13.0", ()))


@pytest.mark.parametrize(
    ("gpu", "cuda", "recipe", "message"),
    [
        (
            A100,
            "13.0",
            "tensorwise",
            "fp8.recipe=tensorwise needs compute capability 8.9 or newer; this machine has NVIDIA "
            "A100-SXM4-80GB (8.0) and torch for CUDA 13.0. Legal here: fp8.recipe=off",
        ),
        (
            H100,
            "12.8",
            "blockwise",
            "fp8.recipe=blockwise needs compute capability 9.0 or newer, and CUDA 12.9 or newer; "
            "this machine has NVIDIA H100 80GB HBM3 (9.0) and torch for CUDA 12.8. "
            "Legal here: fp8.recipe=delayed, tensorwise, off",
        ),
        (
            L4,
            "13.0",
            "blockwise",
            "fp8.recipe=blockwise needs compute capability 9.0 or newer, and CUDA 12.9 or newer; "
            "this machine has NVIDIA L4 (8.9) and torch for CUDA 13.0. "
            "Legal here: fp8.recipe=delayed, tensorwise, off",
        ),
        (
            H100,
            "13.0",
            "mxfp8",
            "fp8.recipe=mxfp8 needs compute capability 10.0 or newer and below 12.0; this machine "
            "has NVIDIA H100 80GB HBM3 (9.0) and torch for CUDA 13.0. "
            "Legal here: fp8.recipe=delayed, tensorwise, blockwise, off",
        ),
    ],
)
def test_gpus_without_the_recipe(
    gpu: tuple[str, int, int], cuda: str, recipe: str, message: str
) -> None:
    # beside another one: every GPU of the machine trains
    found = Found("2.20.2", None, cuda, (H100, gpu) if recipe == "tensorwise" else (gpu, B200))
    with pytest.raises(UserError) as caught:
        check(recipe, found)
    assert str(caught.value) == message
    check("off", found)


def test_the_commands_are_those_of_the_package() -> None:
    extra = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert install_command("13.0").split()[-1].strip('"') in extra
    assert "core_cu12," in install_command("12.9")
    assert install_command(None) == install_command("13.0")


def test_missing_where_there_are_gpus() -> None:
    machine = Machine("cuda", num_gpus=1, has_transformer_engine=False, has_gradient_fusion=False)
    for override, wanted, instead in (
        ("fp8.recipe=blockwise", "fp8.recipe=blockwise", "set fp8.recipe=off"),
        (
            "model.transformer_impl=transformer_engine",
            "model.transformer_impl=transformer_engine",
            "set it to auto or local",
        ),
    ):
        with pytest.raises(UserError) as caught:
            resolve(load_recipe("tiny", [override]), machine, None)
        assert str(caught.value) == (
            f"{wanted} cannot run here: there is no transformer_engine package. "
            f"Install it, or {instead}:\n  {INSTALL}"
        )
    auto = resolve(load_recipe("tiny"), machine, None)
    assert auto.model.transformer_impl == "local"


ASK = """
import json, sys
import torch
from transformer_engine.pytorch import quantization as q
answers = {}
for major, minor, cuda in json.load(sys.stdin):
    q.get_device_compute_capability = lambda: (major, minor)
    q.tex.get_cublasLt_version = lambda: 130000
    torch.version.cuda = cuda
    per_tensor = q._compute_fp8_support()[0]
    answers[f"{major}.{minor} {cuda}"] = {
        "delayed": per_tensor,
        "tensorwise": per_tensor,
        "blockwise": q._compute_fp8_block_scaling_support()[0],
        "mxfp8": q._compute_mxfp8_support()[0],
    }
print(json.dumps(answers))
"""


@pytest.mark.te
def test_gpus_are_those_of_transformer_engine() -> None:
    """Its own functions, told of each GPU and CUDA, agree with ours."""
    machines = [
        (*capability, cuda)
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
        for cuda in ("12.8", "12.9", "13.0")
    ]
    answers = asked(ASK, machines)
    for major, minor, cuda in machines:
        for recipe in NEEDS:
            expected = answers[f"{major}.{minor} {cuda}"][recipe]
            assert can_run(recipe, (major, minor), cuda) == expected, (recipe, major, minor, cuda)


SHAPES = """
import json, sys
import torch
from transformer_engine.pytorch.quantization import Format
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer, tex
from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec
mxfp8 = MXFP8Quantizer(tex.DType.kFloat8E4M3)
answers = []
for tokens, width in json.load(sys.stdin):
    tensor = torch.empty(tokens, width, device="meta")
    try:
        assert_dim_for_fp8_exec(tensor)
        fits = True
    except ValueError:
        fits = False
    answers.append([fits, mxfp8.is_quantizable(tensor)])
print(json.dumps(answers))
"""


@pytest.mark.te
def test_sizes_are_those_of_transformer_engine() -> None:
    """What its Python refuses is refused by ours; cuBLAS, which is not asked here, refuses more."""
    from megatron_xielu.recipes.fp8 import _MULTIPLE, _SHARDED_TOKENS

    shapes = [(tokens, width) for tokens in range(8, 80, 4) for width in range(8, 80, 4)]
    for (tokens, width), (fits, mxfp8) in zip(shapes, asked(SHAPES, shapes), strict=True):
        for recipe in ("delayed", "tensorwise", "blockwise"):
            legal = tokens % _SHARDED_TOKENS[recipe] == width % _MULTIPLE[recipe] == 0
            assert legal == fits, (recipe, tokens, width)
        legal = tokens % _SHARDED_TOKENS["mxfp8"] == width % _MULTIPLE["mxfp8"] == 0
        assert legal == mxfp8, (tokens, width)


def asked(program: str, question: object) -> object:
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(question),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "No module named 'transformer_engine'" in done.stderr:
        pytest.skip("needs TransformerEngine")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CAST = "in bf16, which TransformerEngine casts to FP8"


@pytest.mark.parametrize(
    ("settings", "flags", "text"),
    [
        (["fp8.recipe=off"], [], ""),
        (["fp8.recipe=blockwise", "fp8.emulate=true"], [], ""),
        (
            ["fp8.recipe=blockwise", "fp8.bf16_layers_at_start=1"],
            [],
            "; dense MLPs: in FP8 for fc2, and for fc1 in backward (blockwise scaling); first 1 "
            "layers: in bf16",
        ),
        (
            ["fp8.recipe=mxfp8"],
            ["--num-experts=4"],
            f"; dense MLPs: {CAST} (mxfp8: has no kernel of ours); experts: {CAST} (the router's "
            "probabilities come between)",
        ),
        (
            ["fp8.recipe=delayed", "fp8.fused=false"],
            [],
            "; dense MLPs: in FP8 for fc2 (delayed scaling, fp8.fused=false)",
        ),
        (
            ["fp8.recipe=delayed", "fp8.fused=false"],
            ["--recompute-granularity", "full"],
            "; dense MLPs: in FP8 for fc2 (delayed scaling, fp8.fused=false), but in bf16 where "
            "Megatron recomputes it",
        ),
        (
            ["fp8.recipe=delayed", "fp8.fc2_input=bf16"],
            [],
            "; dense MLPs: in bf16 for fc2 (fp8.fc2_input)",
        ),
    ],
)
def test_a_run_says_who_writes_fp8(settings: list[str], flags: list[str], text: str) -> None:
    assert fp8_results(load_recipe("tiny", settings), flags) == text


@pytest.mark.parametrize(
    ("machine", "flags", "text"),
    [
        (
            Machine("cuda", 1, True, False),
            (),
            "optimizer: TransformerEngine's FusedAdam; "
            "weight gradients: added by TransformerEngine's GEMM",
        ),
        (
            Machine("cuda", 1, True, True, has_apex=True),
            (),
            "optimizer: TransformerEngine's FusedAdam; weight gradients: added by Apex's extension",
        ),
        (
            Machine("cuda", 1, False, True, has_apex=True),
            (),
            "optimizer: Apex's FusedAdam; weight gradients: added by Apex's extension",
        ),
        (
            Machine("cuda", 1, False, False),
            (),
            "optimizer: torch's fused AdamW (neither TransformerEngine nor Apex is installed); "
            "weight gradients: added in a pass of their own, 4 bytes of traffic more per parameter "
            "and micro-batch (neither Apex's extension nor TransformerEngine's layers are there)",
        ),
        (
            Machine("cuda", 1, True, True),
            ("--no-gradient-accumulation-fusion",),
            "optimizer: TransformerEngine's FusedAdam; weight gradients: added in a pass of their "
            "own, 4 bytes of traffic more per parameter and micro-batch "
            "(--no-gradient-accumulation-fusion)",
        ),
        (Machine("cpu", 0, True, True), (), ""),
    ],
)
def test_a_run_says_whose_optimizer_and_gradients_it_has(
    machine: Machine, flags: tuple[str, ...], text: str
) -> None:
    recipe = resolve(load_recipe("llama-1.1b-xielu"), machine, None)
    job = Job(recipe, Path("run"), 1, machine, flags, None, ())
    assert libraries(job) == text
    fused = machine.device == "cuda" and "added by" in text
    if not flags:
        given = replace(recipe, model=replace(recipe.model, vocab_size=512))
        argv = replace(job, recipe=given).argv()
        assert ("--no-gradient-accumulation-fusion" not in argv) == fused


def test_xielus_settings_reach_its_placeholder() -> None:
    keys = ["xielu.alpha_p_init=1.25", "xielu.alpha_n_init=2", "xielu.beta=0.75"]
    keys += ["xielu.impl=eager", "xielu.recompute=true", "xielu.saved_input=e4m3"]
    keys += ["fp8.fc2_input=bf16"]
    found = vars(_placeholder(load_recipe("tiny", keys)))
    assert found == {
        "alpha_p_init": 1.25,
        "alpha_n_init": 2.0,
        "beta": 0.75,
        "impl": "eager",
        "recompute": True,
        "fc2_input": "bf16",
        "saved_input": "e4m3",
    }
