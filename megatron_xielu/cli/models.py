"""`convert`, `checkpoint`, `verify`, `generate` and `plot`: what becomes of a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_xielu.cli.values import argument, positive, size


def add(commands: Any) -> None:
    """The commands on runs, checkpoints and exports."""
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
    command.add_argument("--max-new-tokens", type=positive, default=64)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_generate)

    command = commands.add_parser("plot", help="loss and alphas of runs to a PNG")
    command.add_argument("runs", type=Path, nargs="+")
    command.add_argument("--out", type=Path, default=Path("plot.png"))
    command.set_defaults(run=_plot)


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
        "--max-shard-size", type=size, default=size("5GB"), metavar="5GB", help="of one file"
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
            command.add_argument("steps", type=positive, nargs=steps, metavar="STEP")
        command.set_defaults(run=action)


def _add_arg(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--arg",
        type=argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of Megatron's that a checkpoint without recipe.yaml lacks; may be given "
        "again",
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
