"""`pretrain`, `quickstart`, `launch`, and the data they read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_xielu.cli.values import positive


def add(commands: Any) -> None:
    """The commands that lead to a trained model."""
    command = commands.add_parser(
        "pretrain",
        help="train a model; again on the same run folder goes on",
        usage="%(prog)s --recipe NAME|FILE [options] [section.key=value ...] [-- MEGATRON FLAGS]",
    )
    command.add_argument("--recipe", required=True, help="a preset's name or a YAML file")
    command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
    command.add_argument(
        "--nproc", type=positive, help="ranks to start here (default: one per GPU, or TP x PP)"
    )
    command.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="let this key of the recipe differ from the saved run's; may be given again",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print recipe, numbers and Megatron's arguments"
    )
    command.add_argument(
        "--for-gpu", action="store_true", help="a dry run for GPUs, on whatever machine"
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_pretrain)

    _add_launch(commands)

    command = commands.add_parser("prepare-data", help="text to a data folder")
    command.add_argument("out", type=Path, help="the data folder to write")
    command.add_argument(
        "inputs",
        type=Path,
        nargs="*",
        help=".txt, .jsonl or .jsonl.gz files (default: English that comes with Python)",
    )
    command.add_argument("--vocab-size", type=positive, default=4096, help="of a new tokenizer")
    command.add_argument("--tokenizer", type=Path, help="a Hugging Face tokenizer folder to use")
    command.add_argument("--valid-fraction", type=float, default=0.05, help="share to hold out")
    command.add_argument("--seed", type=int, default=42, help="chooses what is held out")
    command.add_argument("--text-key", default="text", help="of a line of .jsonl")
    command.add_argument("--force", action="store_true", help="replace another data folder")
    command.set_defaults(run=_prepare_data)

    command = commands.add_parser("quickstart", help="all of it once, on a tiny model")
    command.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where to")
    command.set_defaults(run=_quickstart)


def _add_launch(commands: Any) -> None:
    launch = commands.add_parser("launch", help="pretrain on many nodes: print what starts it")
    targets = launch.add_subparsers(required=True, metavar="TARGET", dest="target")
    for target, text, submit in (
        ("local", "torchrun; give the same command on every node", "run it"),
        ("docker", "docker run; give the same command on every node", "run it"),
        ("slurm", "a batch script", "hand it to sbatch"),
        ("k8s", "a manifest for Kubernetes", "hand it to kubectl"),
    ):
        command = targets.add_parser(
            target,
            help=text,
            usage="%(prog)s RECIPE [options] [section.key=value ...] [-- MEGATRON FLAGS]",
        )
        command.add_argument("recipe", metavar="RECIPE", help="a preset's name or a YAML file")
        command.add_argument("--nodes", type=positive, default=1)
        command.add_argument(
            "--gpus-per-node", type=positive, required=True, help="ranks of each node"
        )
        command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
        command.add_argument(
            "--stop-seconds",
            type=positive,
            default=300,
            help="what a stopped run gets to save (default: 300; a run prints what it needs)",
        )
        command.add_argument(
            "--fabric",
            choices=("infiniband", "roce", "efa", "ethernet"),
            help="what connects the nodes: sets what NCCL needs there (default: NCCL chooses)",
        )
        command.add_argument("--submit", action="store_true", help=f"{submit} as well")
        if target in ("local", "docker"):
            command.add_argument("--head", metavar="HOST[:PORT]", help="where the nodes meet")
        if target in ("docker", "k8s"):
            command.add_argument("--image", required=True, help="of the container")
        if target == "docker":
            command.add_argument(
                "--volume",
                action="append",
                default=[],
                metavar="FOLDER[:TARGET[:ro]]",
                help="mounted besides what the run reads and writes; may be given again",
            )
            command.add_argument("--cpu", action="store_true", help="ranks on CPUs, no GPUs")
        elif target == "slurm":
            command.add_argument("--time", default="24:00:00", help="of one job of the chain")
            command.add_argument("--image", help="a container, by pyxis")
            command.add_argument(
                "--sbatch",
                action="append",
                default=[],
                metavar="NAME[=VALUE]",
                help="an option of sbatch's, as in partition=gpu; may be given again",
            )
            command.add_argument(
                "--setup",
                action="append",
                default=[],
                metavar="FILE|LINE",
                help="shell before the ranks, as in 'module load cuda'; may be given again",
            )
        elif target == "k8s":
            command.add_argument(
                "--volume",
                required=True,
                metavar="CLAIM:FOLDER",
                help="a claim that all nodes can write, and where it is mounted",
            )
            command.add_argument(
                "--trainjob", action="store_true", help="a TrainJob of Kubeflow Trainer v2"
            )
            command.add_argument(
                "--rdma", metavar="RESOURCE[=COUNT]", help="RDMA devices that each node asks for"
            )
            command.add_argument(
                "--host-network", action="store_true", help="use the machine's own network"
            )
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.set_defaults(run=_launch)


def _pretrain(args: argparse.Namespace) -> int:
    from megatron_xielu.launch import join, pet
    from megatron_xielu.signals import StopSignals
    from megatron_xielu.training import launch

    if not (args.dry_run or args.for_gpu):
        join.join_srun()
        if pet.is_node():
            pet.become_torchrun(args.words)
    signals = StopSignals()
    if launch.is_rank():
        # before the imports below, which take seconds
        signals.listen()
    from megatron_xielu.training.job import Request
    from megatron_xielu.training.pretrain import dry_run, pretrain

    request = Request(
        recipe=args.recipe,
        overrides=tuple(args.overrides),
        run_dir=args.run_dir,
        nproc=args.nproc,
        megatron_flags=args.megatron_flags,
        allow_changed=tuple(args.allow_changed),
    )
    if args.dry_run or args.for_gpu:
        dry_run(request, for_gpu=args.for_gpu)
        return 0
    return pretrain(request, signals)


def _launch(args: argparse.Namespace) -> None:
    from megatron_xielu.launch import docker, kubernetes, local, slurm
    from megatron_xielu.launch.job import Job

    job = Job(
        recipe=args.recipe,
        overrides=tuple(args.overrides),
        megatron_flags=args.megatron_flags,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        run_dir=args.run_dir,
        stop_seconds=args.stop_seconds,
        fabric=args.fabric,
    )
    if args.target == "local":
        print(local.render(job, args.head), end="", flush=True)
        if args.submit:
            local.run(job, args.head)
    elif args.target == "docker":
        command = docker.render(
            job, image=args.image, head=args.head, volumes=args.volume, cpu=args.cpu
        )
        print(command, end="", flush=True)
        if args.submit:
            docker.submit(command)
    elif args.target == "slurm":
        script = slurm.render(
            job, time=args.time, image=args.image, options=args.sbatch, setup=args.setup
        )
        print(script, end="", flush=True)
        if args.submit:
            slurm.submit(script)
    else:
        manifest = kubernetes.render(
            job,
            image=args.image,
            volume=args.volume,
            trainjob=args.trainjob,
            rdma=args.rdma,
            host_network=args.host_network,
        )
        print(manifest, end="", flush=True)
        if args.submit:
            kubernetes.submit(manifest)


def _prepare_data(args: argparse.Namespace) -> None:
    from megatron_xielu.data.prepare import prepare

    prepare(
        args.out,
        inputs=args.inputs,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        text_key=args.text_key,
        force=args.force,
    )


def _quickstart(args: argparse.Namespace) -> int:
    from megatron_xielu.training.quickstart import quickstart

    return quickstart(args.dir)
