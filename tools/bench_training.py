"""Training speed on a CPU: Megatron with xIELU here against stock transformers, in alternation.

Both train the same model (sizes below, fp32, AdamW, gradient clipping) on one process each. The two
take turns, one step at a time, so that whatever else the machine does slows both; the ratio of each
pair is taken and their median printed.

    python tools/bench_training.py [--steps 30] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, FFN, HEADS, SEQUENCE, MICRO_BATCH, VOCAB = 6, 256, 1024, 8, 256, 8, 4096
WARMUP = 3
RECIPE = (
    f"model.num_layers={LAYERS}",
    f"model.hidden_size={HIDDEN}",
    f"model.ffn_hidden_size={FFN}",
    f"model.num_attention_heads={HEADS}",
    f"model.seq_length={SEQUENCE}",
    f"model.vocab_size={VOCAB}",
    "parallel.tensor_model_parallel_size=1",
    "parallel.use_distributed_optimizer=false",
    f"training.global_batch_size={MICRO_BATCH}",
    f"training.micro_batch_size={MICRO_BATCH}",
    "schedule.lr_warmup_iters=1",
    "schedule.lr_wsd_decay_iters=1",
    "logging.log_interval=1",
    "logging.eval_iters=0",
    "checkpoint.save_interval=1000000",
)


def wait_for_turn(seconds: float | None = None) -> None:
    """Tell the parent how long the last step took, and wait until it says go on."""
    print(f"step {seconds}", file=sys.__stdout__, flush=True)
    if sys.stdin.readline() != "go\n":
        os._exit(0)


def run_transformers(steps: int) -> None:
    """Steps of transformers' ArceeForCausalLM with SDPA and torch's fused AdamW."""
    import torch
    from transformers import ArceeConfig, ArceeForCausalLM

    config = ArceeConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=SEQUENCE,
        hidden_act="xielu",
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = ArceeForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(VOCAB, (MICRO_BATCH, SEQUENCE))
    seconds = None
    for _ in range(steps):
        wait_for_turn(seconds)
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = time.perf_counter() - begin
    wait_for_turn(seconds)


class Turns:
    """A listener that gives the turn away after each step; the wait is not part of a step."""

    def __init__(self) -> None:
        self._began: float | None = None

    def begin(self, **_: Any) -> None:
        pass

    def step(self, *, seconds_per_step: float, **_: Any) -> None:
        # Megatron's clock runs through the wait before the step, which belongs to the other side
        now = time.perf_counter()
        wait_for_turn(None if self._began is None else now - self._began)
        self._began = time.perf_counter()

    def validation(self, **_: Any) -> None:
        pass


def run_megatron(steps: int) -> None:
    """Steps of Megatron's own training loop."""
    from megatron_xielu.mcore.activation import XIELUPlaceholder
    from megatron_xielu.mcore.pretrain import pretrain
    from megatron_xielu.recipes import load_recipe, megatron_args

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29577")
    recipe = load_recipe("tiny", [*RECIPE, f"training.train_iters={steps + 1}"])
    with tempfile.TemporaryDirectory() as folder:
        argv = megatron_args(
            recipe,
            world_size=1,
            device="cpu",
            run_dir=Path(folder),
            precision="fp32",
            transformer_impl="local",
        )
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        pretrain([*argv, "--mock-data", "--split", "1,0,0"], XIELUPlaceholder(), Turns())


def compare(steps: int, threads: int) -> None:
    """Print both medians and the median of the pairs' ratios."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONWARNINGS"] = "ignore"
    sides = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--side", name, "--steps", str(steps + WARMUP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for name in ("megatron", "transformers")
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name in sides:
        _next(sides[name])
    for turn in range(steps + WARMUP):
        for name, process in sides.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            took = _next(process)
            if turn >= WARMUP:
                seconds[name].append(took)
    for process in sides.values():
        process.kill()
        process.wait()
    ratios = [a / b for a, b in zip(seconds["megatron"], seconds["transformers"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"{LAYERS} layers, hidden {HIDDEN}, ffn {FFN}, sequence {SEQUENCE}, micro-batch "
        f"{MICRO_BATCH}, fp32, {threads} threads, {steps} pairs of steps\n"
        f"Megatron with xIELU   {1e3 * statistics.median(seconds['megatron']):7.1f} ms a step\n"
        f"transformers (SDPA)   {1e3 * statistics.median(seconds['transformers']):7.1f} ms a step\n"
        f"ratio                 {statistics.median(ratios):7.3f}   quartiles {low:.3f}-{high:.3f}"
    )


def _next(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            return float("nan" if "None" in line else line.split()[1])
    raise SystemExit(f"a side ended early: {process.args}")


def main() -> None:
    """Compare, or be one of the two sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("megatron", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "transformers":
        run_transformers(args.steps)
    elif args.side == "megatron":
        run_megatron(args.steps)
    else:
        compare(args.steps, args.threads)


if __name__ == "__main__":
    main()
