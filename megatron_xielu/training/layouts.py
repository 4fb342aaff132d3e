"""`doctor --layouts`: the layout matrix on ranks of this machine or of torchrun's; its table."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from megatron_xielu.errors import UserError
from megatron_xielu.mcore.layouts import grid
from megatron_xielu.mcore.layouts.compare import NUMBERS, Distance
from megatron_xielu.training import launch
from megatron_xielu.training.resolve import Machine

if TYPE_CHECKING:
    from megatron_xielu.mcore.layouts.drive import Chain, Row

COLUMNS = ("loss", "grad norm", "parameters", "moments", "alphas", "replicas", "reshard")


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    nproc: int = 4
    quick: bool = False
    model: str | None = None
    """Of `grid.MODELS`; None means all."""
    csv: Path | None = None
    markdown: Path | None = None
    fault: str | None = None
    """One of `grid.FAULTS` to plant; only the layouts in which it shows are run."""
    folder: Path | None = None
    """Scratch that all ranks share; None means a temporary folder of this machine."""

    def cases(self, nproc: int) -> list[grid.Case]:
        """The rows to run on so many ranks."""
        if self.fault:
            return grid.with_fault(self.fault, nproc)
        cases = grid.quick(nproc) if self.quick else grid.full(nproc)
        return [case for case in cases if self.model in (None, case.model.name)]


def layouts(request: Request) -> int:
    """Run the matrix and print its table; 0 if every layout agrees, 1 if not.

    Raises:
        UserError: the request cannot be run here.
    """
    names = [model.name for model in grid.MODELS]
    if request.model not in (None, *names):
        raise UserError(f"--model {request.model} is none of {', '.join(names)}")
    if request.fault not in (None, *grid.FAULTS):
        raise UserError(f"--fault {request.fault} is none of {', '.join(grid.FAULTS)}")
    if launch.is_rank():
        _run_rank(request)
    machine = Machine.detect()
    if machine.num_gpus < request.nproc:
        # the ranks are this process's children, and run on the CPU where GPUs do not suffice
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = Path(tempfile.mkdtemp(prefix="megatron-xielu-layouts-", dir=request.folder))
    arguments = ["doctor", "--layouts", "--nproc", str(request.nproc), "--dir", str(folder)]
    arguments += ["--quick"] if request.quick else []
    arguments += ["--fault", request.fault] if request.fault else []
    arguments += ["--model", request.model] if request.model else []
    for name in ("csv", "markdown"):
        path = getattr(request, name)
        arguments += [f"--{name}", str(path.absolute())] if path else []
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    code = launch.launch(arguments, request.nproc, folder / "logs")
    if code == 0:
        shutil.rmtree(folder)
    return code


def _run_rank(request: Request) -> NoReturn:
    if request.folder is None:
        raise UserError(
            "under torchrun the ranks share checkpoints: name an empty folder that all machines "
            "see with --dir"
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launch.end_with_parent()
    log = launch.log_path(request.folder / "logs", launch.rank())
    with launch.logged_to(log) as terminal:
        try:
            code = 0 if _run_matrix(request, terminal) else 1
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            summary = str(error).strip().splitlines() or [type(error).__name__]
            launch.report_error(f"{summary[0]}\nthe whole story is in {log}", terminal)
            code = 2 if isinstance(error, UserError) else 1
    # another rank may be gone, so nothing may wait for one on exit
    os._exit(code)


def _run_matrix(request: Request, terminal: TextIO) -> bool:
    import torch

    from megatron_xielu.mcore import cpu_platform

    backend = _backend(Machine.detect())
    if backend == "nccl":
        torch.cuda.set_device(launch.local_rank())
    cpu_platform.hide_gpu_libraries()
    cpu_platform.enable()
    from megatron_xielu.mcore import contract
    from megatron_xielu.mcore.layouts import drive

    contract.check_version()
    nproc = launch.world_size()
    cases = request.cases(nproc)
    rows: list[Row] = []
    width = max(len(str(case)) for case in cases)
    if launch.rank() == 0:
        print(_opening(cases, nproc, backend, request.fault), file=terminal)
        print(_header(width), file=terminal, flush=True)

    def report(row: Row) -> None:
        rows.append(row)
        print(_line(row, width), file=terminal, flush=True)

    assert request.folder is not None
    chains = drive.run(cases, request.folder / "matrix", backend, report, request.fault)
    if launch.rank() != 0:
        return True
    print("\n".join(["", *explanation(chains), "", *excluded(nproc)]), file=terminal)
    if request.csv:
        _write_csv(request.csv, rows)
    if request.markdown:
        request.markdown.write_text(markdown(rows), encoding="utf-8")
    disagreeing = [str(row.case) for row in rows if not row.agrees]
    if disagreeing:
        launch.report_error(
            f"{len(disagreeing)} of {len(rows)} layouts disagree with one rank: "
            + "; ".join(disagreeing),
            terminal,
        )
        return False
    print(f"\nall {len(rows)} layouts agree", file=terminal, flush=True)
    return True


def _backend(machine: Machine) -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", launch.world_size()))
    if machine.num_gpus == 0:
        return "gloo"
    if machine.num_gpus < local:
        raise UserError(
            f"{local} ranks on {machine.num_gpus} GPUs: start as many ranks as GPUs, or set "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return "nccl"


def _opening(cases: Sequence[grid.Case], nproc: int, backend: str, fault: str | None) -> str:
    models = len({case.model.name for case in cases})
    planted = f", with the fault {fault} planted" if fault else ""
    return (
        f"{len(cases)} layouts of {models} models on up to {nproc} ranks ({backend}){planted}\n"
        "differences from one rank in fp32 eps; replicas: alphas bit-equal in all copies; "
        "reshard: bit-equal after loading\n"
    )


def _header(width: int) -> str:
    return f"{'layout':{width}s}" + "".join(f"{name:>12s}" for name in COLUMNS)


def _line(row: Row, width: int) -> str:
    cells = "".join(f"{cell:>12s}" for cell in _cells(row))
    return f"{row.case!s:{width}s}{cells}{'' if row.agrees else '   DISAGREES'}"


def _cells(row: Row) -> list[str]:
    numbers = [f"{getattr(row.distance, name):.1f}" for name in NUMBERS]
    return [
        *numbers,
        *("yes" if flag else "NO" for flag in (row.replicas_equal, row.reshard_equal)),
    ]


def explanation(chains: Sequence[Chain]) -> list[str]:
    """Which bound each number was held to, and where it comes from."""
    lines = []
    exact = [chain.bound.loss for chain in chains if not chain.layout.bf16]
    if exact:
        lines.append(
            f"fp32: every number within {min(exact):.0f} to {max(exact):.0f} eps (by model), what "
            "another order of summation may change: sqrt(1/6) eps a sum, 24 sums a layer, times "
            "sqrt(2 ln n) for the largest of n"
        )
    for chain in chains:
        if chain.spread is not None:
            lines.append(
                f"bf16, {chain.model.name}: within twice the largest distance of four bf16 runs on "
                "one rank (1, 2, 4 and 8 micro-batches) from the fp32 run of the same start: "
                + _numbers(chain.spread)
            )
    return lines


def _numbers(distance: Distance) -> str:
    values = (f"{name.replace('_', ' ')} {getattr(distance, name):.0f}" for name in NUMBERS)
    return ", ".join(values) + " eps"


def excluded(nproc: int) -> list[str]:
    """The combinations that are not run, counted by their reason."""
    counts: dict[str, int] = {}
    for model in grid.MODELS:
        for layout in grid.combinations():
            reason = grid.why_not(layout, model, nproc)
            if reason:
                counts[reason] = counts.get(reason, 0) + 1
    return ["combinations that are not run:", *(f"  {n:5d}  {why}" for why, n in counts.items())]


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, in the matrix's order."""
    lines = [f"| layout | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| {row.case} | {' | '.join(_cells(row))} |" for row in sorted(rows, key=_place)]
    return "\n".join(lines) + "\n"


def _place(row: Row) -> tuple[int, grid.Layout]:
    return grid.MODELS.index(row.case.model), row.case.layout


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        axes = list(grid.AXES)
        flags = ["replicas_equal", "reshard_equal", "agrees"]
        bounds = [f"{name}_bound" for name in NUMBERS]
        writer.writerow(["model", *axes, *NUMBERS, *bounds, *flags])
        for row in rows:
            writer.writerow(
                [
                    row.case.model.name,
                    *(int(getattr(row.case.layout, axis)) for axis in axes),
                    *(f"{getattr(row.distance, name):.3f}" for name in NUMBERS),
                    *(f"{getattr(row.bound, name):.3f}" for name in NUMBERS),
                    *(int(getattr(row, flag)) for flag in flags),
                ]
            )
