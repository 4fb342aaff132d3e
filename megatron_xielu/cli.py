"""The `megatron-xielu` command: each subcommand parses its arguments and calls the library.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_xielu import __version__
from megatron_xielu.errors import SharedUserError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse would swallow the separator
    split = words.index("--") if "--" in words else len(words)
    parser = _parser()
    args, rest = parser.parse_known_args(words[:split])
    # argparse wants positional words in one piece; overrides may stand between options
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.words = words
    args.megatron_flags = tuple(words[split + 1 :])
    if args.megatron_flags and not hasattr(args, "overrides"):
        parser.error("only pretrain and launch take flags of Megatron's after --")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        return _refuse(str(error), shared=isinstance(error, SharedUserError))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron_xielu"):
            raise
        return _refuse(f"{error}; install what this command needs: pip install {_extra(error)}")
    except KeyboardInterrupt:
        return 130


def _refuse(message: str, *, shared: bool = False) -> int:
    from megatron_xielu.training import launch

    # under torchrun every rank finds the same mistake; one of a machine says it, or one of all
    if not launch.is_rank() or (launch.rank() if shared else launch.local_rank()) == 0:
        print(f"{launch.ERROR_MARK}{message}", file=sys.stderr)
    return 2


def _extra(error: ModuleNotFoundError) -> str:
    extras = {"yaml": "recipes", "transformers": "hf", "tokenizers": "hf", "safetensors": "hf"}
    extras |= {"matplotlib": "plot", "gguf": "gguf", "sentencepiece": "gguf", "google": "gguf"}
    return f"'megatron-xielu[{extras.get((error.name or '').partition('.')[0], 'megatron')}]'"


def _pretrain(args: argparse.Namespace) -> int:
    from megatron_xielu.launch import join
    from megatron_xielu.signals import StopSignals
    from megatron_xielu.training import launch

    if not (args.dry_run or args.for_gpu):
        join.join_srun()
        if join.is_node_of_torchrun():
            join.become_torchrun(args.words)
    signals = StopSignals()
    if launch.is_rank():
        # before the imports below, which take seconds
        signals.listen()
    from megatron_xielu.training.pretrain import Request, dry_run, pretrain

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
        if args.submit:
            local.run(job, args.head)
        print(local.render(job, args.head), end="")
    elif args.target == "docker":
        command = docker.render(
            job, image=args.image, head=args.head, volumes=args.volume, cpu=args.cpu
        )
        print(command, end="", flush=True)
        if args.submit:
            docker.submit(command)
    elif args.target == "slurm":
        script = slurm.render(job, time=args.time, image=args.image)
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


def _convert_to_hf(args: argparse.Namespace) -> int:
    from megatron_xielu.checkpoint.to_hf import convert_to_hf
    from megatron_xielu.checkpoint.verify import VerifyError

    if not args.no_verify:
        # what is missing should be said before the work, not after it
        import transformers  # noqa: F401
    try:
        convert_to_hf(
            args.source,
            args.out,
            arch=args.arch,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            max_shard_bytes=args.max_shard_size,
            untie=args.untie,
            drop_mtp=args.drop_mtp,
            given=dict(args.arg),
            check=not args.no_verify,
        )
    except VerifyError as error:
        print(f"verification failed, nothing was written: {error}", file=sys.stderr)
        return 1
    return 0


def _convert_from_hf(args: argparse.Namespace) -> int:
    from megatron_xielu.checkpoint.from_hf import convert_from_hf
    from megatron_xielu.checkpoint.verify import VerifyError

    if not args.no_verify:
        # what is missing should be said before the work, not after it
        import transformers  # noqa: F401
    try:
        convert_from_hf(args.hf_dir, args.out, check=not args.no_verify)
    except VerifyError as error:
        print(f"verification failed, nothing was written: {error}", file=sys.stderr)
        return 1
    return 0


def _convert_to_gguf(args: argparse.Namespace) -> None:
    from megatron_xielu.checkpoint.to_gguf import convert_to_gguf

    convert_to_gguf(args.hf_dir, args.out, dtype=args.dtype, tokenizer=not args.no_tokenizer)


def _checkpoint_ls(args: argparse.Namespace) -> None:
    from megatron_xielu.checkpoint.inventory import table
    from megatron_xielu.checkpoint.store import open_store

    print(table(open_store(args.folder)))


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from megatron_xielu.checkpoint.inventory import verify
    from megatron_xielu.checkpoint.store import open_store

    return 0 if verify(open_store(args.folder), args.steps, report=print) else 1


def _checkpoint_rm(args: argparse.Namespace) -> None:
    from megatron_xielu.checkpoint.store import open_store

    open_store(args.folder).remove(args.steps)
    print(f"removed {', '.join(f'step {step}' for step in args.steps)}")


def _verify(args: argparse.Namespace) -> int:
    from megatron_xielu.checkpoint.verify import VerifyError, verify

    try:
        print(verify(args.a, args.b, given=dict(args.arg)))
    except VerifyError as error:
        print(f"verification failed: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(args: argparse.Namespace) -> None:
    from megatron_xielu.checkpoint.generate import generate_text

    texts = generate_text(args.hf_dir, args.prompts, args.max_new_tokens, args.seed)
    for prompt, text in zip(args.prompts, texts, strict=True):
        print(f"{prompt}{text}\n")


def _plot(args: argparse.Namespace) -> None:
    from megatron_xielu.analysis.plot import plot_runs

    print(plot_runs(args.runs, args.out))


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


def _quickstart(args: argparse.Namespace) -> int:
    from megatron_xielu.training.quickstart import quickstart

    return quickstart(args.dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-xielu",
        description="Pretrain language models with the activation xIELU on Megatron-Core.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "pretrain",
        help="train a model; again on the same run folder goes on",
        usage="%(prog)s --recipe NAME|FILE [options] [section.key=value ...] [-- MEGATRON FLAGS]",
    )
    command.add_argument("--recipe", required=True, help="a preset's name or a YAML file")
    command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
    command.add_argument(
        "--nproc", type=_positive, help="ranks to start here (default: one per GPU, or TP x PP)"
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
    command.add_argument("--vocab-size", type=_positive, default=4096, help="of a new tokenizer")
    command.add_argument("--tokenizer", type=Path, help="a Hugging Face tokenizer folder to use")
    command.add_argument("--valid-fraction", type=float, default=0.05, help="share to hold out")
    command.add_argument("--seed", type=int, default=42, help="chooses what is held out")
    command.add_argument("--text-key", default="text", help="of a line of .jsonl")
    command.add_argument("--force", action="store_true", help="replace another data folder")
    command.set_defaults(run=_prepare_data)

    _add_convert(commands)
    _add_checkpoint(commands)

    command = commands.add_parser(
        "verify", help="compare two models, checkpoints or Hugging Face folders; 1: they differ"
    )
    for name in ("a", "b"):
        command.add_argument(
            name, type=Path, metavar=name.upper(), help="a run, its checkpoint or an export"
        )
    _add_arg(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("generate", help="text from an export, with transformers")
    command.add_argument("hf_dir", type=Path)
    command.add_argument("prompts", nargs="+")
    command.add_argument("--max-new-tokens", type=_positive, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_generate)

    command = commands.add_parser("plot", help="loss and alphas of runs to a PNG")
    command.add_argument("runs", type=Path, nargs="+")
    command.add_argument("--out", type=Path, default=Path("plot.png"))
    command.set_defaults(run=_plot)

    _add_bench(commands)
    _add_doctor(commands)

    command = commands.add_parser("quickstart", help="all of it once, on a tiny model")
    command.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where to")
    command.set_defaults(run=_quickstart)
    return parser


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="a checkpoint to another format")
    formats = convert.add_subparsers(required=True, metavar="FORMAT")
    command = formats.add_parser("to-hf", help="to a Hugging Face folder")
    command.add_argument("source", type=Path, help="a run folder or one of its checkpoints")
    command.add_argument("out", type=Path, help="the folder to write")
    command.add_argument(
        "--arch",
        choices=("auto", "arcee", "apertus", "llama", "qwen3"),
        default="auto",
        help="the class of transformers (default: the one that fits)",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of all but xIELU's alphas (default: the checkpoint's)",
    )
    command.add_argument("--tokenizer", type=Path, help="if the run's data is not here")
    command.add_argument(
        "--max-shard-size", type=_size, default=_size("5GB"), metavar="5GB", help="of one file"
    )
    command.add_argument("--untie", action="store_true", help="write tied embeddings twice")
    command.add_argument(
        "--drop-mtp", action="store_true", help="leave out layers of multi-token prediction"
    )
    command.add_argument(
        "--no-verify", action="store_true", help="do not compare the result with the checkpoint"
    )
    _add_arg(command)
    command.set_defaults(run=_convert_to_hf)

    command = formats.add_parser("to-gguf", help="of an Apertus folder, for llama.cpp")
    command.add_argument("hf_dir", type=Path, help="a Hugging Face folder, such as to-hf writes")
    command.add_argument("out", type=Path, help="the .gguf file to write")
    command.add_argument(
        "--dtype", choices=("f32", "bf16", "q8_0"), help="of the matrices (default: the folder's)"
    )
    command.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    command.set_defaults(run=_convert_to_gguf)

    command = formats.add_parser("from-hf", help="a Hugging Face folder to a run to train on")
    command.add_argument("hf_dir", type=Path, help="with safetensors files")
    command.add_argument("out", type=Path, help="the run folder to write")
    command.add_argument(
        "--no-verify", action="store_true", help="do not compare the result with the folder"
    )
    command.set_defaults(run=_convert_from_hf)


def _add_checkpoint(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="the saved steps of a run")
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    for name, text, steps, action in (
        ("ls", "list them", None, _checkpoint_ls),
        ("verify", "read every byte; 1: a step is damaged", "*", _checkpoint_verify),
        ("rm", "remove some, never the latest", "+", _checkpoint_rm),
    ):
        command = actions.add_parser(name, help=text)
        command.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
        if steps:
            command.add_argument("steps", type=_positive, nargs=steps, metavar="STEP")
        command.set_defaults(run=action)


def _add_launch(commands: Any) -> None:
    from megatron_xielu.launch.job import FABRICS

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
        command.add_argument("--nodes", type=_positive, default=1)
        command.add_argument(
            "--gpus-per-node", type=_positive, required=True, help="ranks of each node"
        )
        command.add_argument("--run-dir", type=Path, help="the run folder (default: runs/NAME)")
        command.add_argument(
            "--stop-seconds",
            type=_positive,
            default=300,
            help="what a stopped run gets to save (default: 300; a run prints what it needs)",
        )
        command.add_argument(
            "--fabric",
            choices=FABRICS,
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
    command.add_argument("--threads", type=_positive, help="with --cpu (default: 2)")
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
    command.add_argument("--nproc", type=_positive, help="ranks to start (default: 4)")
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


def _add_arg(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--arg",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of Megatron's that a checkpoint without recipe.yaml lacks; may be given "
        "again",
    )


def _argument(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, as in rotary_base=500000")
    try:
        # a number or true, else a word
        return name, json.loads(value.lower())
    except ValueError:
        return name, value


def _size(text: str) -> int:
    number = text.upper().removesuffix("B")
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        size = int(float(number.rstrip("KMG")) * scale)
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB or 500MB")
    return size


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number
