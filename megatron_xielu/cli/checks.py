"""`bench` and `doctor`: what this machine computes, and how fast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xielu.cli.values import positive
from megatron_xielu.errors import UserError


def add(commands: Any) -> None:
    """The commands that check and time."""
    _add_bench(commands)
    _add_doctor(commands)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench", help="what xIELU costs, its kernels and training with it; 1: a gate missed"
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--cpu", action="store_true", help="time the CPU kernels (the default)")
    mode.add_argument("--accuracy", action="store_true", help="errors against float64")
    mode.add_argument(
        "--static", metavar="sm_90", help="compile the GPU kernels here and read the machine code"
    )
    mode.add_argument("--gpu", action="store_true", help="time the GPU kernels")
    mode.add_argument(
        "--training",
        action="store_true",
        help="every check of doctor and more, then training of the 1.1B model on one GPU",
    )
    command.add_argument("--threads", type=positive, help="with --cpu (default: 2)")
    command.add_argument("--dtype", choices=("fp32", "bf16"), action="append", help="with --cpu")
    command.add_argument(
        "--any-load", action="store_true", help="with --cpu: on a busy machine too"
    )
    command.add_argument("--quick", action="store_true", help="with --accuracy: smaller sums")
    command.add_argument(
        "--csv", type=Path, help="with --cpu, --gpu or --training: append the rows to it"
    )
    command.add_argument("--markdown", type=Path, help="with --training: write the table to it")
    command.add_argument(
        "--tiny", action="store_true", help="with --training: a small model, without a GPU too"
    )
    command.set_defaults(run=_bench)


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor", help="what is here, and whether it computes what it should; 1: it does not"
    )
    command.add_argument(
        "--layouts",
        action="store_true",
        help="instead: train small models under every parallel layout and compare",
    )
    command.add_argument("--nproc", type=positive, help="ranks to start (default: 4)")
    command.add_argument("--quick", action="store_true", help="a few layouts that cover every axis")
    command.add_argument("--model", help="one model of the matrix only, as the table names it")
    command.add_argument("--csv", type=Path, help="write the rows to it")
    command.add_argument("--markdown", type=Path, help="write the table to it")
    command.add_argument(
        "--dir", type=Path, help="scratch folder, under torchrun one that all machines share"
    )
    # plants a known fault, for tests of the matrix itself
    command.add_argument("--fault", help=argparse.SUPPRESS)
    command.set_defaults(run=_doctor)


def _bench(args: argparse.Namespace) -> int:
    mode = "cpu"
    for name in ("accuracy", "static", "gpu", "training"):
        mode = name if getattr(args, name) else mode
    of = {
        "threads": "cpu",
        "dtype": "cpu",
        "any_load": "cpu",
        "quick": "accuracy",
        "csv": "cpu gpu training",
        "markdown": "training",
        "tiny": "training",
    }
    for option, modes in of.items():
        if getattr(args, option) and mode not in modes.split():
            raise UserError(
                f"--{option.replace('_', '-')} means nothing with --{mode}; it belongs to "
                f"--{modes.replace(' ', ' and --')}"
            )
    if args.training:
        from megatron_xielu.doctor.full import full

        return full(tiny=args.tiny, csv=args.csv, markdown=args.markdown)
    if args.static:
        from megatron_xielu.bench import static

        passed = static.run(args.static)
    elif args.accuracy:
        from megatron_xielu.bench import accuracy

        passed = accuracy.run(quick=args.quick)
    elif args.gpu:
        from megatron_xielu.bench.gpu import run as gpu

        passed = gpu.run(csv=args.csv)
    else:
        from megatron_xielu.bench import cpu

        passed = cpu.run(
            threads=args.threads or 2,
            dtypes=tuple(args.dtype or cpu.DTYPES),
            any_load=args.any_load,
            csv=args.csv,
        )
    return 0 if passed else 1


def _doctor(args: argparse.Namespace) -> int:
    if not args.layouts:
        for option in ("quick", "model", "csv", "markdown", "dir", "fault", "nproc"):
            if getattr(args, option):
                raise UserError(f"--{option} means nothing without --layouts")
        from megatron_xielu.doctor.run import doctor

        return doctor()
    from megatron_xielu.training.layouts import Request, layouts

    return layouts(
        Request(
            nproc=args.nproc or 4,
            quick=args.quick,
            model=args.model,
            csv=args.csv,
            markdown=args.markdown,
            fault=args.fault,
            folder=args.dir,
        )
    )
