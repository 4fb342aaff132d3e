"""Every rule of a recipe: its exact message, its nearest legal values, and that those are legal."""

from __future__ import annotations

import pytest

from megatron_xielu.recipes import (
    Recipe,
    RecipeError,
    check,
    load_recipe,
    preset_names,
    validate,
)

# the batch of 440 goes with these alone; 16, 32 and 64 are not among them
SIZES_1B = {1, 2, 4, 8, 11, 22, 44, 88}
SIZES_3B = {2, 4, 8, 16, 32, 64, 128, 256}
WORLD_SIZES = {
    "tiny": {2},
    **{f"llama-1.1b-{activation}": SIZES_1B for activation in ("xielu", "swiglu", "relu2")},
    **{f"llama-3b-{activation}": SIZES_3B for activation in ("xielu", "swiglu", "relu2")},
}
# what the messages below name, whatever the preset is tuned to
BASE = [
    "model.num_layers=4",
    "model.hidden_size=192",
    "model.num_attention_heads=6",
    "model.ffn_hidden_size=768",
    "model.seq_length=256",
    "parallel.tensor_model_parallel_size=2",
    "training.train_iters=240",
    "training.global_batch_size=16",
    "training.micro_batch_size=16",
    "optimizer.lr=3e-3",
    "schedule.lr_warmup_iters=20",
    "schedule.lr_wsd_decay_iters=48",
]


def _recipe(overrides: list[str]) -> Recipe:
    return load_recipe("tiny", [*BASE, *overrides])


@pytest.mark.parametrize("name", preset_names())
def test_presets_run_on_exactly_the_documented_world_sizes(name: str) -> None:
    recipe = load_recipe(name)
    for world_size in range(1, 3 if name == "tiny" else 520):
        is_legal = validate(recipe, world_size) == []
        if world_size in WORLD_SIZES[name]:
            check(recipe, world_size)
        else:
            assert not is_legal, world_size


RULES = [
    (
        [
            "parallel.tensor_model_parallel_size=1",
            "training.global_batch_size=440",
            "training.micro_batch_size=5",
        ],
        16,
        "training.global_batch_size=440 is not divisible by micro_batch_size x data_parallel_size "
        "= 5 x 16 = 80; nearest legal: 400, 480",
    ),
    (
        ["training.micro_batch_size=32"],
        2,
        "training.global_batch_size=16 is not divisible by micro_batch_size x data_parallel_size "
        "= 32 x 1 = 32; nearest legal: 32",
    ),
    (
        ["model.num_attention_heads=16", "parallel.tensor_model_parallel_size=3"],
        3,
        "parallel.tensor_model_parallel_size=3: num_attention_heads=16 must be divisible by it; "
        "legal: 1, 2, 4, 8, 16",
    ),
    (
        ["model.num_query_groups=4"],
        2,
        "model.num_query_groups=4 must divide num_attention_heads=6; legal: 1, 2, 3, 6",
    ),
    (
        ["model.num_query_groups=3"],
        2,
        "model.num_query_groups=3 must be a multiple or a divisor of tensor_model_parallel_size=2; "
        "legal: 1, 2, 6",
    ),
    (
        ["model.hidden_size=200"],
        2,
        "model.hidden_size=200 is not divisible by num_attention_heads=6; nearest legal: 198, 204; "
        "or set model.head_dim",
    ),
    (
        ["model.head_dim=33"],
        2,
        "model.head_dim=33 must be even, RoPE turns channels in pairs; nearest legal: 32, 34",
    ),
    (
        ["model.rope_theta=10000.5"],
        2,
        "model.rope_theta=10000.5 must be a whole number, as Megatron's --rotary-base is; "
        "nearest legal: 10000",
    ),
    (
        ["model.rope_scaling_factor=0.5"],
        2,
        "model.rope_scaling_factor=0.5 must be at least 1; nearest legal: 1",
    ),
    (
        ["model.ffn_hidden_size=769"],
        2,
        "model.ffn_hidden_size=769 is not divisible by tensor_model_parallel_size=2; "
        "nearest legal: 768, 770",
    ),
    (
        ["model.vocab_size=1001"],
        2,
        "model.vocab_size=1001 is not divisible by tensor_model_parallel_size=2; "
        "nearest legal: 1000, 1002",
    ),
    (
        ["model.vocab_size=1001", "model.padded_vocab_size=1005"],
        2,
        "model.padded_vocab_size=1005 is not divisible by tensor_model_parallel_size=2; "
        "nearest legal: 1004, 1006",
    ),
    (
        ["model.vocab_size=1001", "model.padded_vocab_size=1000"],
        2,
        "model.padded_vocab_size=1000 is less than vocab_size=1001, and every id has a row; "
        "nearest legal: 1001",
    ),
    (
        ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=true"],
        1,
        "parallel.sequence_parallel=true needs tensor_model_parallel_size greater than 1, not 1; "
        "legal: sequence_parallel=false, or tensor_model_parallel_size=2, 3, 6",
    ),
    (
        ["parallel.sequence_parallel=true", "model.seq_length=255"],
        2,
        "model.seq_length=255 is not divisible by tensor_model_parallel_size=2, which "
        "sequence_parallel needs; nearest legal: 254, 256",
    ),
    (
        ["parallel.pipeline_model_parallel_size=3"],
        6,
        "parallel.pipeline_model_parallel_size=3: num_layers=4 must be divisible by it; "
        "legal: 1, 2, 4",
    ),
    (
        ["parallel.pipeline_model_parallel_size=2"],
        6,
        "world_size=6 is not divisible by tensor_model_parallel_size x "
        "pipeline_model_parallel_size = 2 x 2 = 4; nearest legal: 4, 8",
    ),
    (
        ["schedule.lr_wsd_decay_iters=230"],
        2,
        "schedule.lr_warmup_iters + lr_wsd_decay_iters = 20 + 230 = 250 is more than "
        "training.train_iters=240; nearest legal: lr_wsd_decay_iters=220, or train_iters=250",
    ),
    (
        ["training.train_iters=10"],
        2,
        "schedule.lr_warmup_iters=20 must be less than training.train_iters=10; nearest legal: 9",
    ),
    (
        ["optimizer.min_lr=1.0"],
        2,
        "optimizer.min_lr=1.0 must not be greater than optimizer.lr=0.003; legal: 0 to 0.003",
    ),
    (
        ["xielu.alpha_n_init=0.5"],
        2,
        "xielu.alpha_n_init=0.5 must be greater than xielu.beta=0.5; "
        "the paper's distance gives 0.8",
    ),
    (
        ["model.activation=swiglu", "xielu.recompute=true"],
        2,
        "xielu.recompute=true has no meaning with model.activation=swiglu; "
        "legal: false, or model.activation=xielu",
    ),
    (
        ["model.activation=relu2", "xielu.alpha_n_init=0.4"],
        2,
        "xielu.alpha_n_init=0.4 has no meaning with model.activation=relu2; "
        "legal: 0.8, or model.activation=xielu",
    ),
    (
        ["xielu.saved_input=e4m3", "xielu.impl=reference"],
        2,
        "xielu.saved_input=e4m3 cannot go with xielu.impl=reference, whose backward is "
        "autograd's; legal: saved_input=exact, or impl=auto, triton, cpu or eager",
    ),
    (["xielu.alpha_p_init=0"], 2, "xielu.alpha_p_init=0.0 must be greater than 0"),
    (["xielu.beta=-1"], 2, "xielu.beta=-1.0 must be greater than 0"),
    (
        ["optimizer.adam_beta2=1"],
        2,
        "optimizer.adam_beta2=1.0 must be at least 0 and less than 1; usual: 0.9, 0.95",
    ),
    (["training.seed=0"], 2, "training.seed=0 must be at least 1; nearest legal: 1"),
    (
        ["training.precision=bf16", "parallel.use_distributed_optimizer=false"],
        2,
        "parallel.use_distributed_optimizer=false cannot go with training.precision=bf16: "
        "Megatron's plain bf16 optimizer cannot save the fp32 alphas; legal: true, or fp32",
    ),
    (["checkpoint.keep_last=0"], 2, "checkpoint.keep_last=0 must be at least 1; nearest legal: 1"),
    (
        ["checkpoint.keep_every=200"],
        2,
        "checkpoint.keep_every=200 means nothing while keep_last=null keeps all steps; "
        "legal: keep_last=2, or keep_every=null",
    ),
    (
        ["checkpoint.keep_last=2", "checkpoint.keep_every=150"],
        2,
        "checkpoint.keep_every=150 is not a multiple of save_interval=100, so no such step is "
        "saved; nearest legal: 100, 200",
    ),
    (["logging.eval_iters=-1"], 2, "logging.eval_iters=-1 must not be negative; nearest legal: 0"),
    (["health.every=-1"], 2, "health.every=-1 must not be negative; nearest legal: 0"),
    (
        ["health.max_skipped_steps=0"],
        2,
        "health.max_skipped_steps=0 must be at least 1; nearest legal: 1",
    ),
    ([], 0, "world_size=0 must be at least 1; nearest legal: 1"),
]


@pytest.mark.parametrize(("overrides", "world_size", "message"), RULES)
def test_one_broken_rule_gives_one_message(
    overrides: list[str], world_size: int, message: str
) -> None:
    assert validate(_recipe(overrides), world_size) == [message]


@pytest.mark.parametrize(
    ("broken", "world_size", "fix"),
    [
        (["training.global_batch_size=18"], 8, ["training.global_batch_size=20"]),
        (
            ["parallel.tensor_model_parallel_size=4", "training.global_batch_size=12"],
            12,
            ["parallel.tensor_model_parallel_size=6"],
        ),
        (["model.num_query_groups=3"], 2, ["model.num_query_groups=1"]),
        (["model.hidden_size=200"], 2, ["model.hidden_size=204"]),
        (["schedule.lr_wsd_decay_iters=230"], 2, ["schedule.lr_wsd_decay_iters=220"]),
        (["training.train_iters=10"], 2, ["schedule.lr_warmup_iters=9"]),
    ],
)
def test_the_remedy_is_legal(broken: list[str], world_size: int, fix: list[str]) -> None:
    broken = ["training.micro_batch_size=1", *broken]
    (message,) = validate(_recipe(broken), world_size)
    assert fix[0].partition("=")[2] in message.rpartition("legal:")[2]
    remaining = validate(_recipe(broken + fix), world_size)
    # the shortened run still has to shorten its decay
    assert message not in remaining
    assert all("lr_wsd_decay_iters" in problem for problem in remaining)


def test_every_broken_rule_is_reported() -> None:
    overrides = [
        "model.num_layers=5",
        "model.ffn_hidden_size=769",
        "model.head_dim=33",
        "parallel.pipeline_model_parallel_size=2",
        "training.global_batch_size=18",
        "schedule.lr_wsd_decay_iters=1000",
        "optimizer.lr=0",
        "xielu.alpha_n_init=0.1",
    ]
    with pytest.raises(RecipeError) as caught:
        check(_recipe(overrides), 4)
    print(caught.value)
    assert str(caught.value).startswith("recipe 'tiny' cannot run on 4 ranks:\n  optimizer.lr=0.0")
    # the layers and the stages are one problem
    assert len(caught.value.problems) == len(overrides) - 1


def test_sizes_out_of_bounds_divide_nothing() -> None:
    names = ["num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length"]
    names += ["vocab_size", "padded_vocab_size", "num_query_groups", "head_dim"]
    overrides = [f"model.{name}=0" for name in names]
    overrides += [f"parallel.{way}_model_parallel_size=0" for way in ("tensor", "pipeline")]
    overrides += ["training.micro_batch_size=-1", "training.train_iters=0"]
    problems = validate(_recipe(overrides), -2)
    assert len(problems) == len(overrides) + 1
    assert all("must be at least 1" in problem for problem in problems)
