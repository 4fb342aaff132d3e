"""The `megatron-xielu` command: each subcommand parses its arguments and calls the library.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_xielu import __version__
from megatron_xielu.cli import checks, models, training
from megatron_xielu.errors import UserError


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
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron_xielu"):
            raise
        return _refuse(f"{error}; install what this command needs: pip install {_extra(error)}")
    except KeyboardInterrupt:
        return 130


def _refuse(message: str) -> int:
    from megatron_xielu.training import launch

    # under torchrun every rank finds the same mistake; one of a machine says it
    if not launch.is_rank() or launch.local_rank() == 0:
        print(f"{launch.ERROR_MARK}{message}", file=sys.stderr)
    return 2


def _extra(error: ModuleNotFoundError) -> str:
    extras = {"yaml": "recipes", "transformers": "hf", "tokenizers": "hf", "safetensors": "hf"}
    extras |= {"matplotlib": "plot", "gguf": "gguf", "sentencepiece": "gguf", "google": "gguf"}
    return f"'megatron-xielu[{extras.get((error.name or '').partition('.')[0], 'megatron')}]'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-xielu",
        description="Pretrain language models with the activation xIELU on Megatron-Core.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (training, models, checks):
        group.add(commands)
    return parser
