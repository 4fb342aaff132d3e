"""Speed of a model of transformers with the fused activation against the same model as it is.

Training steps and greedy generation of a small random Arcee with xIELU. The two models take turns
in one process, so that a slow moment slows both; the ratio of each pair is taken and their median
printed. Nothing is timed before both models have given the same results.

    python tools/bench_transformers.py [--dtype bf16] [--device cuda] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ArceeConfig, ArceeForCausalLM
from transformers.utils import logging

from megatron_xielu.bench.timing import compare
from megatron_xielu.integrations.transformers import use_fused_xielu
from megatron_xielu.ops.dispatch import describe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB, SEQUENCE, BATCH, PROMPT, NEW_TOKENS = 4096, 256, 8, 16, 64


def build(layers: int, hidden: int, dtype: torch.dtype, device: str) -> Any:
    """A random model in which each layer has alphas of its own."""
    torch.manual_seed(0)
    config = ArceeConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        vocab_size=VOCAB,
        max_position_embeddings=SEQUENCE,
        hidden_act="xielu",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = ArceeForCausalLM(config).to(dtype=dtype, device=device)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.act_fn.alpha_p.add_(0.1 * layer)
            block.mlp.act_fn.alpha_n.sub_(0.1 * layer)
    return model


def refuse_different_results(stock: Any, fused: Any, tokens: Tensor) -> None:
    """End the program unless the fused model is as near to float64 as stock."""
    exact_model = copy.deepcopy(stock).double()
    for block in exact_model.model.layers:
        # without the clamp inside which stock's slope is not the formula's
        block.mlp.act_fn.eps.zero_()
    truth = results(exact_model, tokens)
    measured = [results(model, tokens) for model in (stock, fused)]
    for name, exact in truth.items():
        errors = [float((side[name].double() - exact).norm() / exact.norm()) for side in measured]
        print(f"{name}: error of stock {errors[0]:.1e}, fused {errors[1]:.1e}")
        if not errors[1] <= errors[0] + torch.finfo(stock.dtype).eps:
            raise SystemExit(f"nothing was timed: the fused model's {name} are further off")
    if stock.dtype == torch.float32:
        generated = [generate(model, tokens[:1, :PROMPT]) for model in (stock, fused)]
        if not torch.equal(*generated):
            raise SystemExit("nothing was timed: the models generate different tokens")


def results(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradient of all weights in one vector."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    grads = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    model.zero_grad()
    return {"logits": output.logits.detach(), "gradients": grads}


def generate(model: Any, prompt: Tensor) -> Tensor:
    """Greedy, and always NEW_TOKENS long."""
    tokens: Tensor = model.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return tokens


def training(model: Any, tokens: Tensor) -> Callable[[], object]:
    """A step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return finished(step, tokens)


def generation(model: Any, prompts: Tensor) -> Callable[[], object]:
    """NEW_TOKENS tokens for each prompt."""
    model.eval()
    return finished(lambda: generate(model, prompts), prompts)


def finished(work: Callable[[], object], tensor: Tensor) -> Callable[[], object]:
    """The work until the device is done with it."""

    def run() -> None:
        work()
        if tensor.is_cuda:
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()

    dtype = DTYPES[args.dtype]
    stock = build(args.layers, args.hidden, dtype, args.device)
    fused = use_fused_xielu(copy.deepcopy(stock))
    tokens = torch.randint(1, VOCAB, (BATCH, SEQUENCE), device=args.device)
    refuse_different_results(stock, fused, tokens[:2, :64])

    on_gpu = torch.device(args.device).type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    print(
        f"{where}, {args.threads} threads, {args.dtype}, {args.layers} layers, hidden {args.hidden}"
        f", ffn {4 * args.hidden}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}\nfused: {describe(args.device, dtype)}"
    )
    for name, work, ids, count in (
        ("generation", generation, tokens[:, :PROMPT], BATCH * NEW_TOKENS),
        ("training", training, tokens, BATCH * SEQUENCE),
    ):
        ratio = compare(work(stock, ids), work(fused, ids), pairs=args.pairs)
        speed = count / ratio.milliseconds * 1e3
        print(f"{name:<12}stock {speed:10,.0f} tokens/s, fused {ratio} times as many", flush=True)


if __name__ == "__main__":
    main()
