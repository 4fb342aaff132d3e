"""GGUF files hold what the folder held, under llama.cpp's names, or there is no file.

What llama.cpp makes of them is tested in tests/clients.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xielu import cli
from megatron_xielu.checkpoint.to_gguf import GgufFile, convert_to_gguf, llama3_factors
from megatron_xielu.errors import UserError
from tests.ranks import environment

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes an Apertus folder of two layers with random weights, saved by transformers."""

    def write(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        from transformers import ApertusConfig, ApertusForCausalLM

        settings = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        torch.manual_seed(0)
        model = ApertusForCausalLM(ApertusConfig(**settings | changes)).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return write


def convert(folder: Path, **options: Any) -> tuple[GgufFile, Any]:
    out = folder.parent / "out.gguf"
    done = convert_to_gguf(folder, out, progress=lambda line: None, **options)
    assert sorted(path.name for path in out.parent.iterdir()) == ["hf", "out.gguf"]
    return done, gguf.GGUFReader(out)


def numbers(tensor: Any) -> torch.Tensor:
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)


def test_every_number_is_there(save: Save) -> None:
    folder = save()
    stored = load_file(folder / "model.safetensors")
    done, reader = convert(folder, tokenizer=False)
    assert (done.dtype, done.num_tensors, done.tokenizer) == ("f32", len(reader.tensors), None)
    found = {tensor.name: numbers(tensor) for tensor in reader.tensors}
    ours = {"attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"}
    ours |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    ours |= {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
    ours |= {
        "self_attn.o_proj": "attn_output",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {
        f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{name}.weight"
        for theirs, name in ours.items()
        for i in range(2)
    }
    names |= {"model.embed_tokens.weight": "token_embd.weight"}
    names |= {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    assert found.keys() == set(names.values())
    assert all(torch.equal(found[name], stored[theirs]) for theirs, name in names.items())
    for kind in ("alpha_p", "alpha_n", "beta", "eps"):
        values = [stored[f"model.layers.{i}.mlp.act_fn.{kind}"].item() for i in range(2)]
        assert reader.fields[f"xielu.{kind}"].contents() == values
    header = {
        "general.architecture": "apertus",
        "apertus.attention.key_length": 32,
        "apertus.attention.head_count_kv": 2,
        "apertus.rope.freq_base": 5000.0,
        "apertus.context_length": 128,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {key: reader.fields[key].contents() for key in header} == header


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_smaller_types_round_to_their_neighbours(save: Save, dtype: str) -> None:
    folder = save()
    stored = load_file(folder / "model.safetensors")
    _, reader = convert(folder, dtype=dtype, tokenizer=False)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in types.items() if "norm" not in name} == {dtype.upper()}
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}
    (found,) = (numbers(t) for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    exact = stored["model.layers.1.mlp.up_proj.weight"]
    # bf16: half a step of a number of 8 bits. q8_0: half a step of 127 up to the largest of 32
    # numbers, and 2^-11 because the scale is kept in fp16
    difference, bound = (found - exact).abs(), exact.abs() * 2**-8
    if dtype == "q8_0":
        difference = difference.view(-1, 32)
        bound = exact.view(-1, 32).abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-11)
    assert (difference <= bound).all()
    assert not torch.equal(found, exact)


def test_bf16_stays_bf16(save: Save) -> None:
    folder = save(torch.bfloat16)
    done, reader = convert(folder, tokenizer=False)
    assert done.dtype == "bf16"
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    (output,) = (numbers(t) for t in reader.tensors if t.name == "output.weight")
    assert torch.equal(output, stored.float())


def test_tied_embeddings_are_written_twice(save: Save) -> None:
    folder = save(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    _, reader = convert(folder, tokenizer=False)
    found = {tensor.name: numbers(tensor) for tensor in reader.tensors}
    assert torch.equal(found["output.weight"], found["token_embd.weight"])


def test_llama3_rope_is_transformers_own(save: Save) -> None:
    from transformers import ApertusConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = save(rope_parameters=LLAMA3)
    config = ApertusConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = LLAMA3["rope_theta"] ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    _, reader = convert(folder, tokenizer=False)
    (factors,) = (numbers(t) for t in reader.tensors if t.name == "rope_freqs.weight")
    # untouched, between the two, stretched
    assert len(set(factors.tolist())) >= 3
    # fp32 on both sides
    torch.testing.assert_close(plain / factors, scaled.double(), rtol=1e-6, atol=0)


def test_the_rope_keys_of_transformers_4_are_read(save: Save) -> None:
    folder = save()
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit(folder, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    _, reader = convert(folder, tokenizer=False)
    assert reader.fields["apertus.rope.freq_base"].contents() == 5e5
    (factors,) = (numbers(t) for t in reader.tensors if t.name == "rope_freqs.weight")
    expected = torch.tensor(llama3_factors(5e5, 32, LLAMA3))
    assert torch.equal(factors, expected)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def refuse(folder: Path, match: str, **options: Any) -> None:
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError, match=match):
        convert_to_gguf(folder, folder.parent / "out.gguf", **{"tokenizer": False} | options)
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "arcee"}, r"class ArceeForCausalLM. llama.cpp computes xIELU in its Ap"),
        ({"model_type": "llama", "hidden_act": "silu"}, r"llama.cpp's own converter has this cl"),
        ({"model_type": "gpt2"}, r"holds a model of type 'gpt2'; known are arcee, apertus"),
        ({"hidden_act": "silu", "mlp_bias": True}, r"hidden_act is 'silu' in.*; mlp_bias is True"),
        ({"rope_parameters": None}, r"lacks 'rope_scaling', whose default depends on who reads i"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, r"rope_type 'yarn' cannot"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, r"lacks 'factor'"),
        ({"intermediate_size": 95}, r"mlp.up_proj.weight has shape \(96, 64\), config.json means"),
        ({"num_hidden_layers": 1}, r"holds 14 unknown tensor\(s\), the first model.layers.1."),
        ({"num_hidden_layers": 3}, r"lacks 14 tensor\(s\), the first model.layers.2."),
    ],
)
def test_bad_configs(save: Save, changes: dict[str, Any], match: str) -> None:
    folder = save()
    edit(folder, **changes)
    refuse(folder, match)


def test_bad_tensors(save: Save) -> None:
    folder = save()
    edit_tensors(folder, model__layers__1__mlp__act_fn__beta=None)
    refuse(folder, r"disagree: .*lacks 1 tensor\(s\), the first model.layers.1.mlp.act_fn.beta")
    edit_tensors(folder, model__layers__1__mlp__act_fn__beta=torch.zeros(2))
    refuse(folder, r"layers.1.mlp.act_fn.beta has shape \(2,\), config.json means \(\)")
    (folder / "model.safetensors").write_bytes(b"no")
    refuse(folder, r"model.safetensors is damaged")


def test_rows_that_q8_0_cannot_pack(save: Save) -> None:
    folder = save(intermediate_size=80)
    refuse(folder, r"down_proj.weight has rows of 80 numbers; q8_0 packs 32", dtype="q8_0")


def test_an_existing_file_is_kept(save: Save) -> None:
    folder = save()
    (folder.parent / "out.gguf").write_text("mine")
    refuse(folder, r"out.gguf exists")
    assert (folder.parent / "out.gguf").read_text() == "mine"


def test_a_file_that_comes_meanwhile_is_kept(save: Save) -> None:
    folder = save()
    out = folder.parent / "out.gguf"
    with pytest.raises(UserError, match=r"out\.gguf exists"):
        convert_to_gguf(folder, out, tokenizer=False, progress=lambda line: out.write_text("mine"))
    assert out.read_text() == "mine"
    assert sorted(path.name for path in out.parent.iterdir()) == ["hf", "out.gguf"]


def test_a_full_disk_leaves_nothing(save: Save) -> None:
    folder = save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so a file that grows beyond this is an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refuse(folder, r"out.gguf could not be written: .*Nothing was left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_memory_is_that_of_the_largest_weight(save: Save) -> None:
    folder = save(hidden_size=512, intermediate_size=4096, num_hidden_layers=24)
    program = """
import re, sys
from pathlib import Path
import gguf, transformers
from transformers import ApertusForCausalLM
from megatron_xielu.checkpoint.to_gguf import convert_to_gguf
def peak():
    # what getrusage says begins with the parent's
    (kilobytes,) = re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
before, folder = peak(), Path(sys.argv[1])
done = convert_to_gguf(folder, folder.parent / "out.gguf", tokenizer=False)
print(done.num_bytes, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    size, grown = map(int, done.stdout.split()[-2:])
    print(f"{size / 1e6:.0f} MB written with {grown / 1e6:.0f} MB")
    # 8 MB weights, and what config and header take
    assert grown < 100e6 < size / 3


def test_the_command(save: Save, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save()
    out = folder.parent / "made" / "out.gguf"
    assert cli.main(["convert", "to-gguf", str(folder), str(out)]) == 2
    assert "neither tokenizer.model nor tokenizer.json" in capsys.readouterr().err
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert cli.main(["convert", "to-gguf", str(folder), str(out), "--dtype", "q8_0"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}: gpt2/gpt-2 tokenizer\n")
    assert gguf.GGUFReader(out).fields["tokenizer.ggml.eos_token_id"].contents() == 0
