"""The module: its parameters stay exact whatever wraps it."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_xielu import XIELU, xielu
from megatron_xielu.activations import XIEP, TrainedActivation, XIPReLU


def test_initial_values_are_exact() -> None:
    a_p, a_n = XIELU().effective_alphas()
    assert float(a_p) == pytest.approx(0.8, abs=1e-7)
    assert float(a_n) == pytest.approx(0.8, abs=1e-7)
    a_p, a_n = XIELU(alpha_p_init=1.5, alpha_n_init=0.9, beta=0.25).effective_alphas()
    assert (float(a_p), float(a_n)) == (pytest.approx(1.5), pytest.approx(0.9))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_shorter_type_leaves_the_alphas_alone(cast: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), XIELU())
    before = copy.deepcopy(model[1].state_dict())
    parameters = list(model[1].parameters())
    getattr(model, cast)()
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in model[1].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    # optimizers hold on to the parameter objects
    assert all(a is b for a, b in zip(parameters, model[1].parameters(), strict=True))


def test_gradients_keep_the_type_of_their_parameters() -> None:
    module = XIELU()
    module(torch.ones(3)).sum().backward()
    module.bfloat16()
    for alpha in module.alphas():
        assert alpha.grad is not None
        assert alpha.dtype == alpha.grad.dtype == torch.float32
    module.to("meta", torch.bfloat16)
    assert {(a.device.type, a.dtype) for a in module.alphas()} == {("meta", torch.float32)}


def test_a_longer_type_is_followed() -> None:
    assert XIELU().double().alpha_p.dtype == torch.float64


def test_meta_device_construction_and_materialization() -> None:
    with torch.device("meta"):
        module = XIELU(alpha_p_init=1.25)
    module.bfloat16().to_empty(device="cpu")
    module.reset_parameters()
    assert module.alpha_p.dtype == torch.float32
    assert float(module.effective_alphas()[0]) == pytest.approx(1.25)


def test_state_dict_and_shapes() -> None:
    state = XIELU().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "alpha_p": (1,),
        "alpha_n": (1,),
    }


def test_forward_is_the_function_and_trains_both_alphas() -> None:
    module = XIELU(beta=0.4)
    x = torch.randn(16, 8, requires_grad=True)
    y = module(x)
    assert torch.equal(y, xielu(x, module.alpha_p, module.alpha_n, beta=0.4))
    y.square().sum().backward()
    for alpha in module.parameters():
        assert alpha.grad is not None
        assert float(alpha.grad) != 0


def test_repr_says_what_it_is() -> None:
    text = "XIELU(alpha_p_init=0.8, alpha_n_init=0.8, beta=0.5, impl=auto)"
    assert repr(XIELU()) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_p_init": 0.0}, "alpha_p_init=0.0 must be > 0"),
        ({"alpha_n_init": 0.5}, "alpha_n_init=0.5 must be > beta=0.5"),
        ({"beta": -1.0}, "beta=-1.0 must be > 0"),
    ],
)
def test_impossible_values_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XIELU(**settings)


@pytest.mark.parametrize(
    ("module", "initial"),
    [(XIELU(), (0.8, 0.8)), (XIPReLU(), (0.8, 0.8)), (XIEP(), (0.4, 0.8, 0.8))],
    ids=["XIELU", "XIPReLU", "XIEP"],
)
def test_the_family_starts_where_it_says_and_trains_every_alpha(
    module: TrainedActivation, initial: tuple[float, ...]
) -> None:
    assert [float(value) for value in module.effective_alphas()] == pytest.approx(initial)
    module(torch.linspace(-2, 2, 64)).square().sum().backward()
    for alpha in module.alphas():
        assert alpha.grad is not None
        assert float(alpha.grad) != 0
    assert len(list(module.parameters())) == len(initial)


def test_one_parabola_is_another_activation_than_one_exponential() -> None:
    x = torch.tensor([-2.0])
    # 0.8 x^2 + 0.5 x, and 0.8 (e^x - 1 - x) + 0.5 x
    assert float(XIPReLU()(x).detach()) == pytest.approx(2.2)
    assert float(XIELU()(x).detach()) == pytest.approx(-0.0917317, abs=1e-6)
