"""Models of transformers with our activation against the same models as they are."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import ApertusConfig, ApertusForCausalLM, ArceeConfig, ArceeForCausalLM
from transformers.activations import XIELUActivation

from megatron_xielu.integrations.transformers import FusedXIELU, use_fused_xielu

LAYERS, HIDDEN, FFN, VOCAB = 4, 64, 256, 128
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 16384,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
STOCK = {
    "apertus": (ApertusForCausalLM, ApertusConfig),
    "arcee": (ArceeForCausalLM, ArceeConfig),
}
BUFFERS = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
DTYPES = [torch.float32, torch.bfloat16]
each_model = pytest.mark.parametrize("kind", STOCK)


def stock(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random model whose layers have alphas of their own, so that a mix-up of layers shows."""
    model_class, config_class = STOCK[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **{"hidden_act": "xielu"} | config)).to(dtype)
    with torch.no_grad():
        for layer, module in enumerate(activations(model)):
            module.alpha_p.fill_(0.2034 + 0.7123 * layer)
            module.alpha_n.fill_(-1.0502 + 0.5321 * layer)
    return model.eval()


def fused(model: nn.Module) -> Any:
    return use_fused_xielu(copy.deepcopy(model))


def activations(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, XIELUActivation)]


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor | None = None, call: Any = None) -> dict[str, Tensor]:
    """Logits and the gradients of all parameters, in float64."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    output = (model if call is None else call)(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    return {
        name: value.detach().double() for name, value in ({"logits": output.logits} | grads).items()
    }


def exact(model: nn.Module) -> Any:
    """Stock's own code in float64, without the clamp that gives it another slope near zero."""
    model = copy.deepcopy(model).double()
    for module in activations(model):
        module.eps.zero_()
    return model


def distances(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation of each tensor relative to the truth's largest element.

    The gradient of one alpha is a sum that may cancel, so theirs is the largest of all alphas'.
    """
    alphas = max(float(value.abs().max()) for name, value in truth.items() if "alpha_" in name)
    return {
        name: float((results[name] - value).abs().max())
        / (alphas if "alpha_" in name else float(value.abs().max()))
        for name, value in truth.items()
    }


def group_of(name: str) -> str:
    if name == "logits":
        return name
    return "alphas' gradients" if "alpha_" in name else "weights' gradients"


def assert_as_near_as_stock(model: Any, eps: float, autocast: bool = False) -> None:
    """Root mean square errors against float64, relative and over several batches."""
    sides = {"ours": fused(model), "stock": model}
    truth = exact(model)
    squares: Counter[tuple[str, str]] = Counter()
    for seed in range(4):
        ids = tokens(seed=seed)
        expected = run(truth, ids)
        for name, value in expected.items():
            squares["truth", group_of(name)] += float(value.square().sum())
        for side, candidate in sides.items():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                results = run(candidate, ids)
            for name, value in expected.items():
                squares[side, group_of(name)] += float((results[name] - value).square().sum())
    for group in ("logits", "weights' gradients", "alphas' gradients"):
        ours, theirs = ((squares[s, group] / squares["truth", group]) ** 0.5 for s in sides)
        print(f"{group}: ours {ours:.2e}, stock {theirs:.2e}")
        assert ours <= theirs + eps, group


@each_model
def test_float32_logits_and_gradients_are_those_of_stock(kind: str) -> None:
    model = stock(kind)
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        for module in activations(model)
    ]
    theirs = run(model)
    for handle in handles:
        handle.remove()
    inside = sum(int(((x > -1e-6) & (x <= 0)).sum()) for x in inputs)
    assert inside == 0, "choose another batch: stock's slope inside its clamp is not the formula's"

    # each layer adds the rounding of sums over up to FFN terms of random sign
    tolerance = LAYERS * FFN**0.5 * torch.finfo(torch.float32).eps
    ours, truth = run(fused(model)), run(exact(model))
    for label, a, b in (
        ("ours - stock", ours, theirs),
        ("ours - float64", ours, truth),
        ("stock - float64", theirs, truth),
    ):
        error = distances(a, b)
        worst = max(error, key=error.__getitem__)
        print(f"{label}: {error[worst]:.1e} ({worst}), allowed {tolerance:.1e}")
        assert error[worst] <= tolerance


@each_model
def test_bf16_is_as_near_to_float64_as_stock(kind: str) -> None:
    assert_as_near_as_stock(stock(kind, torch.bfloat16), torch.finfo(torch.bfloat16).eps)


@each_model
def test_autocast_is_as_near_to_float64_as_stock(kind: str) -> None:
    assert_as_near_as_stock(stock(kind), torch.finfo(torch.bfloat16).eps, autocast=True)


@each_model
@pytest.mark.parametrize("alphas", DTYPES, ids=str)
def test_float16_works_with_alphas_of_another_type(kind: str, alphas: torch.dtype) -> None:
    # stock's output would be float32 then, which the next matrix does not take
    model = fused(stock(kind, torch.float16))
    for module in activations(model):
        module.to(alphas)
    error = distances(run(model), run(exact(model)))
    print(f"logits {error['logits']:.1e}, worst {max(error.values()):.1e}")
    # a handful of roundings to float16 in each layer
    assert error["logits"] <= 4 * LAYERS * torch.finfo(torch.float16).eps
    assert {module.alpha_p.grad.dtype for module in activations(model)} == {alphas}


@each_model
def test_greedy_generation_gives_the_same_tokens(kind: str) -> None:
    model = stock(kind)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    theirs = model.generate(tokens(length=6), **options)
    ours = fused(model).generate(tokens(length=6), **options)
    print(f"{theirs[:, 6:].unique().numel()} different tokens generated")
    assert torch.equal(ours, theirs)
    assert theirs.shape == (2, 38)


@each_model
def test_parameters_and_buffers_stay_the_same_objects(kind: str) -> None:
    model = stock(kind)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    assert use_fused_xielu(model) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert state == {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    for layer in range(LAYERS):
        for name, shape in BUFFERS.items():
            assert state[f"model.layers.{layer}.mlp.act_fn.{name}"][0] == shape


@each_model
def test_no_stock_module_is_left_and_other_models_are_untouched(kind: str) -> None:
    model = stock(kind)
    ours = fused(model)
    assert [type(module) for module in activations(ours)] == [FusedXIELU] * LAYERS
    assert [type(module) for module in activations(model)] == [XIELUActivation] * LAYERS
    assert [type(module) for module in activations(stock(kind))] == [XIELUActivation] * LAYERS


@each_model
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_model_is_stocks_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = stock(kind, dtype)
    model.save_pretrained(tmp_path / "stock")
    fused(model).save_pretrained(tmp_path / "ours")
    model_class, _ = STOCK[kind]
    loaded, info = model_class.from_pretrained(
        tmp_path / "ours", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    assert [type(module) for module in activations(loaded)] == [XIELUActivation] * LAYERS
    expected = model_class.from_pretrained(tmp_path / "stock", dtype=dtype)
    assert loaded.config.to_json_string() == expected.config.to_json_string()
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # and from there to ours again
    assert torch.equal(fused(loaded)(tokens()).logits, fused(expected)(tokens()).logits)


@each_model
def test_training_moves_the_alphas_like_stock(kind: str) -> None:
    steps, rate = 6, 1e-2
    models = [stock(kind), stock(kind)]
    # these optimizers hold the parameters before one of the models changes
    optimizers = [torch.optim.AdamW(model.parameters(), lr=rate) for model in models]
    use_fused_xielu(models[0])
    for module in activations(models[1]):
        # between eps and 0 stock's slope is another one: a single input there moves everything
        module.eps.zero_()
    before = torch.stack(
        [torch.cat([m.alpha_p, m.alpha_n]).detach() for m in activations(models[0])]
    )
    losses: list[list[float]] = [[], []]
    for _ in range(steps):
        for model, optimizer, history in zip(models, optimizers, losses, strict=True):
            loss = model.train()(input_ids=tokens(), labels=tokens()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    ours, theirs = (
        torch.stack([torch.cat([m.alpha_p, m.alpha_n]).detach() for m in activations(model)])
        for model in models
    )
    moved, apart = (ours - before).abs(), (ours - theirs).abs()
    print(
        f"loss {losses[0][0]:.4f} -> {losses[0][-1]:.4f}; alphas moved {moved.min():.1e}"
        f"..{moved.max():.1e}, apart from stock by {apart.max():.1e}"
    )
    assert moved.max() > rate
    assert apart.max() <= 1e-4 * moved.max()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.5


@each_model
def test_gradient_checkpointing_recomputes_the_same_bits(kind: str) -> None:
    model = fused(stock(kind)).train()
    plain = run(model)
    model.gradient_checkpointing_enable()
    again = run(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@each_model
def test_compiles_into_one_graph(kind: str) -> None:
    model = fused(stock(kind))
    plain = run(model)
    compiled = run(model, call=torch.compile(model, fullgraph=True, backend="aot_eager"))
    tolerance = LAYERS * FFN**0.5 * torch.finfo(torch.float32).eps
    error = distances(compiled, plain)
    print(f"compiled - plain: {max(error.values()):.1e}")
    assert max(error.values()) <= tolerance


@pytest.mark.slow
@each_model
def test_the_default_compiler_computes_the_same(kind: str) -> None:
    model = fused(stock(kind))
    error = distances(run(model, call=torch.compile(model, fullgraph=True)), run(model))
    print(f"compiled - plain: {max(error.values()):.1e}")
    assert max(error.values()) <= LAYERS * FFN**0.5 * torch.finfo(torch.float32).eps


@each_model
def test_a_changed_model_follows_to(kind: str) -> None:
    model = fused(stock(kind))
    (module, *_) = activations(model.to(torch.bfloat16))
    assert {value.dtype for value in module.state_dict().values()} == {torch.bfloat16}
    assert model(tokens()).logits.dtype == torch.bfloat16
    (module, *_) = activations(model.to("meta"))
    assert module(torch.empty(2, 3, device="meta", dtype=torch.bfloat16)).shape == (2, 3)


def test_a_second_call_changes_nothing_but_impl() -> None:
    model = fused(stock("arcee"))
    first = model(tokens()).logits
    assert use_fused_xielu(model) is model
    assert torch.equal(model(tokens()).logits, first)
    use_fused_xielu(model, impl="reference")
    assert {module.impl for module in activations(model)} == {"reference"}
    assert "impl=reference" in repr(model)
    assert not torch.equal(model(tokens()).logits, first)


def test_beta_is_the_one_of_the_loaded_buffer() -> None:
    # stock's constructor knows 0.5 only; its formula takes the buffer
    model = stock("arcee")
    for module in activations(model):
        module.beta.fill_(0.25)
    difference = (fused(model)(tokens()).logits - model(tokens()).logits).abs().max()
    print(f"ours - stock at beta 0.25: {difference:.1e}")
    assert difference <= 1e-4 * model(tokens()).logits.abs().max()


def test_the_slope_at_zero_is_beta_where_stock_has_another() -> None:
    slopes = []
    for module in (use_fused_xielu(XIELUActivation(dtype=torch.float32)), XIELUActivation()):
        x = torch.tensor([0.0, -5e-7], requires_grad=True)
        module(x).sum().backward()
        slopes.append(x.grad.tolist())
    print(f"at 0 and -5e-7: ours {slopes[0]}, stock {slopes[1]}")
    assert slopes[0] == pytest.approx([0.5, 0.5], abs=1e-6)
    # beta - a_n: autograd gives the slope of stock's exponential to the constant it is clamped at
    assert slopes[1] == pytest.approx([-0.3, -0.3], abs=2e-3)


def test_an_activation_may_sit_anywhere_and_be_shared() -> None:
    shared = XIELUActivation(dtype=torch.float32)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": shared})
    use_fused_xielu(model)
    assert type(model["b"]) is FusedXIELU
    assert model["a"][1] is model["b"]
    alone = XIELUActivation(dtype=torch.float32)
    assert type(use_fused_xielu(alone)) is FusedXIELU


def test_hooks_stay() -> None:
    model, seen = stock("apertus"), []
    for module in activations(model):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    use_fused_xielu(model)(tokens())
    assert seen == [FusedXIELU] * LAYERS


def test_hooks_of_a_device_map_call_ours() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = stock("apertus")
    expected = fused(model)(tokens()).logits
    for module in activations(model):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(use_fused_xielu(model)(tokens()).logits, expected)
    for module in activations(model):
        hooks.remove_hook_from_module(module)
    assert torch.equal(model(tokens()).logits, expected)


def test_a_pickled_model_is_still_ours(tmp_path: Path) -> None:
    model = fused(stock("arcee"))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert [type(module) for module in activations(loaded)] == [FusedXIELU] * LAYERS
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def refused(model: Any, *, impl: str = "auto") -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        use_fused_xielu(model, impl=impl)  # type: ignore[arg-type]
    print(caught.value)
    return str(caught.value)


def test_refusals_say_what_was_found_and_what_to_do() -> None:
    message = refused(stock("arcee", hidden_act="relu2"))
    assert "ReLUSquaredActivation" in message
    assert "hidden_act='xielu'" in message
    assert "none of transformers" in refused(nn.Linear(2, 2))
    assert "got str" in refused("swiss-ai/Apertus-8B")
    assert "choose one of auto, triton" in refused(stock("arcee"), impl="fast")
    with torch.device("meta"):
        empty = ArceeForCausalLM(ArceeConfig(**SIZES, hidden_act="xielu"))
    assert "load the weights, then" in refused(empty)


@pytest.mark.parametrize("buffer", ["beta", "eps"])
def test_uninitialized_buffers_are_refused_before_anything_changes(buffer: str) -> None:
    model = stock("arcee")
    # what transformers leaves where a checkpoint holds no such tensor
    activations(model)[-1].get_buffer(buffer).fill_(3.2e32)
    if buffer == "beta":
        activations(model)[-1].beta.fill_(float("inf"))
    assert f"layers.{LAYERS - 1}.mlp.act_fn.{buffer}=" in refused(model)
    assert {type(module) for module in activations(model)} == {XIELUActivation}


def test_a_forward_replaced_by_someone_else_is_refused() -> None:
    model = stock("arcee")
    activations(model)[1].forward = torch.nn.functional.silu
    assert "layers.1.mlp.act_fn.forward has been replaced by <function silu" in refused(model)


def test_the_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/transformers.md").read_text()
    use, alphas = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    stock("arcee").save_pretrained(tmp_path / "models/books")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(use, names)
    exec(alphas, names)
    (module, *_) = activations(names["model"])
    assert (type(module), module.alpha_p.dtype) == (FusedXIELU, torch.float32)
    assert names["model"](tokens()).logits.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    root = Path(__file__).parents[2]
    sizes = ["--layers", "1", "--hidden", "64", "--threads", "1", "--pairs", "2"]
    for dtype in ("fp32", "bf16"):
        command = [sys.executable, root / "tools/bench_transformers.py", *sizes, "--dtype", dtype]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^training .* tokens/s, fused [\d.]+ \(", done.stdout, re.MULTILINE)
