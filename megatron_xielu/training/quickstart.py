"""The whole path once: text, training, export, verification, generation, picture, summary."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_xielu.analysis.plot import plot_runs
from megatron_xielu.checkpoint.generate import generate_text
from megatron_xielu.checkpoint.reference import megatron_logits
from megatron_xielu.checkpoint.run import open_recipe
from megatron_xielu.checkpoint.to_hf import convert_to_hf
from megatron_xielu.checkpoint.verify import VerifyError, VerifyReport, verify
from megatron_xielu.data.manifest import DatasetInfo
from megatron_xielu.data.prepare import prepare
from megatron_xielu.training.job import Request
from megatron_xielu.training.pretrain import pretrain
from megatron_xielu.training.report import METRICS_FILE, read_metrics
from megatron_xielu.training.resolve import Machine

RECIPE = "tiny"
# small enough for two CPU cores: the output layer is a fifth of the work at this size
VOCAB_SIZE = 2048
PROMPTS = ("Return the", "If the argument is")
NEW_TOKENS = 40


def quickstart(folder: Path) -> int:
    """Do everything in `folder`; again, it reuses what is complete. Returns the exit code."""
    clock = _Clock()
    data, run, hf = folder / "data", folder / "run", folder / "hf"
    with clock("data"):
        info = prepare(data, vocab_size=VOCAB_SIZE)
    with clock("training"):
        code = pretrain(_request(data, run))
    if code:
        # failed; what happened has been said
        return code
    saved, recipe = open_recipe(run)
    if saved.iteration < recipe.training.train_iters:
        # stopped by the user
        return code
    with clock("export"):
        convert_to_hf(run, hf)
    with clock("verification"):
        try:
            report = verify(hf, run, reference_logits=megatron_logits(saved))
        except VerifyError as error:
            print(f"error: the export is not the trained model: {error}", file=sys.stderr)
            return 1
        print(report)
    with clock("text"):
        texts = generate_text(hf, PROMPTS, NEW_TOKENS, seed=0)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            print(f"{prompt}{text}\n")
    with clock("picture"):
        picture = plot_runs([run], folder / "plot.png")
        print(picture)
    first, last = _held_out(run)
    print(_summary(info, report, (first, last), clock))
    print(_where(data, run, hf, picture))
    if last >= info.unigram_entropy_nats:
        print("error: the model has not learned to use context", file=sys.stderr)
        return 1
    return 0


class _Clock:
    """Announces each stage and keeps its seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        print(f"\n== {stage}", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - begin


def _request(data: Path, run: Path) -> Request:
    # the recipe's two tensor-parallel ranks need two GPUs, or none
    gpus = Machine.detect().num_gpus
    cut = min(2, gpus) if gpus else 2
    overrides = (f"data.path={data}", f"parallel.tensor_model_parallel_size={cut}")
    return Request(RECIPE, overrides, run_dir=run, nproc=cut)


def _held_out(run: Path) -> tuple[float, float]:
    records = [r for r in read_metrics(run / METRICS_FILE) if r["type"] == "valid"]
    return records[0]["loss"], records[-1]["loss"]


def _summary(
    info: DatasetInfo,
    report: VerifyReport,
    held_out: tuple[float, float],
    clock: _Clock,
) -> str:
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items())
    return "\n".join(
        [
            "\n== summary",
            f"held-out loss    {held_out[0]:.3f} before training, {held_out[1]:.3f} after",
            f"token entropy    {info.unigram_entropy_nats:.3f}: the loss of guessing by frequency",
            f"logits           at most {report.logits.max_abs:.1e} from Megatron's, same token at "
            f"{report.logits.agreement:.0%} of {report.logits.positions} positions",
            f"time             {sum(clock.seconds.values()):.0f} s ({stages})",
        ]
    )


def _where(data: Path, run: Path, hf: Path, picture: Path) -> str:
    command = os.path.relpath(sys.argv[0])
    return f"""
data             {data}
run              {run} (recipe.yaml, checkpoints, tensorboard, metrics.jsonl, logs)
model            {hf} (Hugging Face, ArceeForCausalLM)
picture          {picture}

next
  {command} generate {hf} "{PROMPTS[0]}"
  {command} pretrain --recipe {RECIPE} --run-dir {run.parent / "longer"} data.path={data} \\
      training.train_iters=1000 schedule.lr_wsd_decay_iters=200
  {command} pretrain --recipe llama-1.1b-xielu --for-gpu --nproc 88
"""
