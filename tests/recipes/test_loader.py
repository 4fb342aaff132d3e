"""Recipes from YAML and overrides: presets, strictness, round trip, diff."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import RecipeError, diff, load_recipe, preset_names, to_yaml

MINIMAL = """
name: minimal
model:
  {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 256, seq_length: 32}
training: {train_iters: 10, global_batch_size: 4, micro_batch_size: 2}
optimizer: {lr: 1e-3}
schedule: {lr_warmup_iters: 1, lr_wsd_decay_iters: 2}
"""


def _write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def _problems(name_or_path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    message = str(caught.value)
    print(message)
    assert isinstance(caught.value, UserError)
    assert [f"  {problem}" for problem in caught.value.problems] == message.splitlines()[1:]
    return list(caught.value.problems)


def test_minimal_file_takes_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, MINIMAL))
    # 1e-3 is a string in YAML 1.1
    assert recipe.optimizer.lr == 1e-3
    assert type(recipe.optimizer.lr) is float
    assert recipe.xielu.alpha_p_init == 0.8
    assert recipe.parallel.tensor_model_parallel_size == 1


def test_paper_presets_are_the_papers_runs() -> None:
    # arXiv 2411.13010's reference repository
    small, large = load_recipe("llama-1.1b-xielu"), load_recipe("llama-3b-xielu")
    assert [small.model.num_layers, small.model.hidden_size, small.model.ffn_hidden_size] == [
        24,
        1536,
        9216,
    ]
    assert [large.model.num_layers, large.model.hidden_size, large.model.ffn_hidden_size] == [
        36,
        2048,
        12288,
    ]
    for recipe, gated_width in ((small, 6144), (large, 8192)):
        assert 2 * recipe.model.ffn_hidden_size == 3 * gated_width
        assert recipe.model.num_attention_heads == 16
        assert recipe.model.vocab_size == 147456
        assert recipe.model.seq_length == 4096
        assert recipe.model.init_std == 0.025
        assert recipe.model.rope_theta == 5e5
        assert recipe.model.norm_epsilon == 1e-6
        assert recipe.training.micro_batch_size == 5
        assert recipe.schedule.lr_warmup_iters == 2000
        assert recipe.optimizer.adam_beta2 == 0.95
        assert recipe.optimizer.weight_decay == 0.1
    assert small.model.tie_embeddings
    assert not large.model.tie_embeddings
    assert (small.training.global_batch_size, small.training.train_iters) == (440, 70_000)
    assert (large.training.global_batch_size, large.training.train_iters) == (640, 48_000)
    assert (small.schedule.lr_wsd_decay_iters, small.optimizer.lr) == (14_500, 8e-4)
    assert (large.schedule.lr_wsd_decay_iters, large.optimizer.lr) == (10_000, 7e-4)
    assert large.parallel.tensor_model_parallel_size == 2
    assert large.parallel.sequence_parallel


@pytest.mark.parametrize("size", ["1.1b", "3b"])
def test_the_presets_of_the_baselines_differ_in_the_mlp_alone(size: str) -> None:
    ours = load_recipe(f"llama-{size}-xielu")
    width = ours.model.ffn_hidden_size
    for activation in ("swiglu", "relu2"):
        narrower = [f"model.ffn_hidden_size: {width} -> {width * 2 // 3}"]
        assert diff(ours, load_recipe(f"llama-{size}-{activation}")) == [
            f"name: 'llama-{size}-xielu' -> 'llama-{size}-{activation}'",
            *(narrower if activation == "swiglu" else []),
            f"model.activation: 'xielu' -> '{activation}'",
        ]


def test_overrides_are_yaml_values() -> None:
    recipe = load_recipe(
        "tiny",
        [
            "model.num_layers=6",
            "optimizer.lr=8e-4",
            "optimizer.min_lr=0",
            "model.tie_embeddings=false",
            "model.vocab_size=1_024",
            "model.num_query_groups=null",
            "data.path=/data/a=b",
            "name=mine",
        ],
    )
    assert recipe.model.num_layers == 6
    assert recipe.optimizer.lr == 8e-4
    assert type(recipe.optimizer.min_lr) is float
    assert recipe.model.tie_embeddings is False
    assert recipe.model.vocab_size == 1024
    assert recipe.model.num_query_groups is None
    assert recipe.data.path == "/data/a=b"
    assert recipe.name == "mine"
    assert load_recipe("tiny", ["optimizer.lr=1", "optimizer.lr=2"]).optimizer.lr == 2.0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.num_layer=6", "model.num_layer: unknown key; did you mean model.num_layers?"),
        ("modle.num_layers=6", "modle: unknown section; did you mean model?"),
        ("training.lr=1", "training.lr: unknown key; did you mean optimizer.lr?"),
        ("micro_batch_size=1", "micro_batch_size: unknown key; did you mean training.micro_batch"),
        ("data.zzz=1", "data.zzz: unknown key; known: data.path, data.num_workers"),
        ("zzz=1", "zzz: unknown key; known: name, model, xielu"),
        ("model.num_layers=abc", "model.num_layers: expected an integer, got 'abc'"),
        ("model.num_layers=true", "model.num_layers: expected an integer, got true"),
        ("model.num_layers=4.0", "model.num_layers: expected an integer, got 4.0"),
        ("model.num_layers=null", "model.num_layers: expected an integer, got null"),
        ("model.vocab_size=x", "model.vocab_size: expected an integer or null, got 'x'"),
        ("model.tie_embeddings=1", "model.tie_embeddings: expected true or false, got 1"),
        ("xielu.recompute=mlp", "xielu.recompute: expected true or false, got 'mlp'"),
        ("optimizer.lr=fast", "optimizer.lr: expected a finite number, got 'fast'"),
        ("optimizer.lr=true", "optimizer.lr: expected a finite number, got true"),
        ("optimizer.lr=.inf", "optimizer.lr: expected a finite number, got inf"),
        ("optimizer.lr=nan", "optimizer.lr: expected a finite number, got 'nan'"),
        ("data.path=7", "data.path: expected text or null, got 7"),
        ("training.precision=fp8", "expected one of auto, fp32, bf16, got 'fp8'"),
        ("model=tiny", "model=tiny: expected section.key=value"),
        ("--fast", "--fast: expected section.key=value"),
        ("data.path=[a", "data.path=[a: '[a' is not a YAML value"),
        ("data.path={a: 1, a: 2}", "is not a YAML value"),
    ],
)
def test_wrong_override_is_named(override: str, problem: str) -> None:
    (message,) = _problems("tiny", override)
    assert problem in message


def test_all_problems_come_in_one_report(tmp_path: Path) -> None:
    text = MINIMAL.replace("hidden_size: 64, ", "").replace("lr: 1e-3", "lr: [1]")
    problems = _problems(_write(tmp_path, text + "extra: 1\ndata: 3\n"), "model.num_layer=1", "x")
    assert len(problems) == 6
    for part in (
        "x: expected section.key=value",
        "extra: unknown key",
        "model.num_layer: unknown key; did you mean model.num_layers?",
        "model.hidden_size: this key is required",
        "optimizer.lr: expected a finite number, got [1]",
        "data: expected a section of keys, got 3",
    ):
        assert any(part in problem for problem in problems), part


def test_missing_section_is_named(tmp_path: Path) -> None:
    problems = _problems(_write(tmp_path, "name: a\nmodel:\n"))
    assert "training: this section is required" in problems
    # an empty section is one without keys
    assert "model.num_layers: this key is required" in problems


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected sections (name, model"),
        ("just words", "expected sections (name, model"),
        ("model: {a: 1, a: 2}", "the key 'a' is there twice"),
        ("model: [", "line 1"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, text: str, part: str) -> None:
    assert part in "\n".join(_problems(_write(tmp_path, text)))


def test_unknown_recipe_lists_the_presets(tmp_path: Path) -> None:
    problems = _problems("tinny")
    assert "did you mean tiny?" in problems[0]
    assert all(name in problems[1] for name in preset_names())
    assert "recipe.yaml" in _problems(str(tmp_path))[0]
    binary = tmp_path / "model.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in _problems(str(binary))[0]


@pytest.mark.parametrize("name", preset_names())
def test_to_yaml_round_trips_and_is_complete(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, ["optimizer.adam_eps=1e-12", "data.path='8e-4'"])
    text = to_yaml(recipe)
    again = load_recipe(_write(tmp_path, text))
    assert again == recipe
    assert to_yaml(again) == text
    assert again.data.path == "8e-4"
    for section in dataclasses.fields(recipe):
        value = getattr(recipe, section.name)
        for key in dataclasses.fields(value) if dataclasses.is_dataclass(value) else []:
            assert f"  {key.name}: " in text


def test_diff_names_every_changed_field() -> None:
    a = load_recipe("tiny", ["model.num_layers=4"])
    b = load_recipe("tiny", ["model.num_layers=6", "data.path=/d", "model.tie_embeddings=no"])
    assert diff(a, a) == []
    assert diff(a, b) == [
        "model.num_layers: 4 -> 6",
        "model.tie_embeddings: true -> false",
        "data.path: null -> '/d'",
    ]
    assert diff(a, dataclasses.replace(a, name="b")) == ["name: 'tiny' -> 'b'"]


def test_error_survives_a_process_boundary() -> None:
    error = RecipeError("recipe 'x'", ["a: b", "c: d"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "recipe 'x':\n  a: b\n  c: d"
