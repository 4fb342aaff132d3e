"""The machine code of the GPU kernels keeps its limits, and what would break one is noticed.

Kernels are compiled for real, without a GPU. The kernels written here are small enough that their
code can be said beforehand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA)")

import triton
import triton.language as tl

from megatron_xielu.bench import ahead, inductor, sass, static
from megatron_xielu.bench.variants import Variant, variants
from megatron_xielu.errors import UserError

COUNT = 1 << 20
BLOCK = 1024


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh, and leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def limited() -> list[static.Row]:
    """The kernels that have limits."""
    chosen = [v for v in variants(90) if v.name in static.LIMITS and v.size in ("even", "16")]
    rows = static.measure(chosen, 90)
    print("\n" + static.table(rows, static.GPUS[90]))
    return rows


def test_every_limit_is_kept(limited: list[static.Row]) -> None:
    assert static.check(limited) == []


@pytest.mark.parametrize(
    ("name", "instructions", "moved"),
    [
        ("forward bf16", 16, 4),
        ("backward bf16", 28, 6),
        ("forward bf16 to e4m3", 26, 4),
        ("backward bf16 to e5m2", 42, 6),
    ],
)
def test_cost_per_element(
    limited: list[static.Row], name: str, instructions: float, moved: int
) -> None:
    """Stated again, so that a limit cannot be weakened by accident."""
    even, multiple = (row for row in limited if row.name == name and row.widths)
    assert (even.size, multiple.size) == ("even", "16")
    assert even.instructions["issue"] <= instructions
    assert even.coverage == 1
    for row in (even, multiple):
        assert row.bytes == moved
        assert set(row.widths) == {128}
        assert (row.spills, row.atomics, row.untraced) == (0, 0, 0)


def test_memory_is_what_limits_them(limited: list[static.Row]) -> None:
    for row in limited:
        if row.widths:
            times = row.microseconds(static.GPUS[90])
            assert max(times, key=lambda unit: times[unit]) == "memory", (row.name, times)


@triton.jit
def scale_kernel(y, x, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.exp2(tl.load(x + index) * tl.load(factor)))


@pytest.mark.parametrize("capability", static.CAPABILITIES)
def test_code_of_a_small_kernel(capability: int) -> None:
    """Eight float32 elements per thread: two loads, two stores, eight exponentials."""
    y, x, factor = meta(torch.float32), meta(torch.float32), meta(torch.float32)[:1]

    def work() -> None:
        scale_kernel[(COUNT // BLOCK,)](y, x, factor, BLOCK=BLOCK, num_warps=4)

    (launch,) = ahead.record(work, capability)
    assert (launch.kernel, launch.programs, launch.threads) == ("scale_kernel", 1024, 128)
    tensors = {ordinal: tuple(tensor) for ordinal, tensor in launch.tensors.items()}
    assert tensors == {0: ("y", COUNT, 4), 1: ("x", COUNT, 4), 2: ("factor", 1, 4)}

    code = sass.read(launch.cubin)
    accesses = sorted((a.parameter, a.store, a.bits) for a in code.accesses)
    assert accesses == [(0, True, 128)] * 2 + [(1, False, 128)] * 2 + [(2, False, 32)]
    for access in code.accesses:
        assert code.opcodes[access.position].startswith("STG" if access.store else "LDG")
    assert code.classes["mufu"] == 8
    assert code.classes.total() == len(code.opcodes)
    assert "NOP" not in code.opcodes
    assert 16 <= code.registers <= 64
    assert (code.atomics, code.spills, code.stack, len(code.loop)) == (0, 0, 0, 0)


def test_a_listing_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="another form than expected"):
        sass.parse("Fatbin elf code:\n")


@triton.jit
def copy_kernel(y, x, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index))


@triton.jit
def atomic_kernel(y, x, total, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(x + index)
    tl.store(y + index, elements)
    tl.atomic_add(total, tl.sum(elements.to(tl.float32)))


@triton.jit
def twice_kernel(y, x, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    index = tl.arange(0, BLOCK)
    # the same elements in another order
    other = tl.load(x + start + (index ^ (BLOCK // 2)))
    tl.store(y + start + index, tl.load(x + start + index) + other)


@triton.jit
def loop_kernel(y, x, times, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(x + index)
    for _ in range(times):
        elements = elements * elements + 1.0
    tl.store(y + index, elements)


@triton.jit
def choose_kernel(y, x, z, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(tl.where(tl.program_id(0) % 3 == 0, x + index, z + index)))


@triton.jit
def long_kernel(y, x, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(x + index).to(tl.float32)
    for _ in tl.static_range(40):
        elements = tl.sqrt(elements)
    tl.store(y + index, elements.to(tl.bfloat16))


@triton.jit
def sum_kernel(y, x, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(x + index)
    # no element can be stored before all of them are there
    tl.store(y + index, elements * tl.sum(elements))


def meta(dtype: torch.dtype = torch.bfloat16, count: int = COUNT) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")


def broken(kernel: Any, *arguments: object, block: int = BLOCK, warps: int = 4) -> list[str]:
    """What `check` says of a kernel, as if it were the forward one."""

    def work() -> None:
        kernel[(COUNT // block,)](*arguments, BLOCK=block, num_warps=warps)

    rows = static.measure([Variant("forward bf16", "even", COUNT, work)], 90)
    print("\n" + static.table(rows, static.GPUS[90]))
    found = [text for text in static.check(rows) if not text.startswith("no kernel was found")]
    print(*found, sep="\n")
    return found


def test_a_copy_breaks_nothing() -> None:
    assert broken(copy_kernel, meta(), meta()) == []


def test_an_atomic_is_reported() -> None:
    (found,) = broken(atomic_kernel, meta(), meta(), meta(torch.float32, 1))
    assert "1 atomics; none are allowed" in found


def test_misaligned_loads_are_reported() -> None:
    (found,) = broken(copy_kernel, meta(), meta(count=COUNT + 1)[1:])
    assert "an access of 16 bits instead of 128" in found


def test_reading_twice_is_reported() -> None:
    found = " ".join(broken(twice_kernel, meta(), meta()))
    assert "each element is loaded 2 times instead of once" in found
    assert "3 bytes per element instead of 4" in found


def test_wider_elements_are_reported() -> None:
    (found,) = broken(copy_kernel, meta(torch.float32), meta(torch.float32))
    assert "8 bytes per element instead of 4" in found


def test_a_loop_is_reported() -> None:
    (found,) = broken(loop_kernel, meta(), meta(), 7)
    assert "it loops" in found


def test_an_address_of_two_tensors_is_reported() -> None:
    found = " ".join(broken(choose_kernel, meta(), meta(), meta()))
    assert "1 accesses whose tensor is unknown" in found


def test_too_many_instructions_are_reported() -> None:
    (found,) = broken(long_kernel, meta(), meta())
    assert "instructions per element; at most 16" in found


def test_spills_are_reported() -> None:
    # 256 elements in a thread's 255 registers
    x = meta(torch.float32)
    found = " ".join(broken(sum_kernel, torch.empty_like(x), x, block=32 * 256, warps=1))
    assert "register spills; none are allowed" in found


def test_a_missing_kernel_is_reported(limited: list[static.Row]) -> None:
    rows = [row for row in limited if row.name != "backward bf16"]
    assert static.check(rows) == ["no kernel was found for backward bf16"]


def test_times(limited: list[static.Row]) -> None:
    """By hand, for 188,743,680 elements."""
    row = next(row for row in limited if row.name == "forward bf16")
    row = replace(row, bytes=4, instructions={"issue": 64, "mufu": 4})
    times = row.microseconds(static.GPUS[90])
    print(times)
    assert times["memory"] == pytest.approx(225.4, abs=0.1)
    # 132 x 1.755 GHz x 128 lanes for 64 instructions, x 16 for 4
    assert times["issue"] == pytest.approx(407.4, abs=0.1)
    assert times["mufu"] == pytest.approx(203.7, abs=0.1)
    assert times["fp64"] == 0


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "resident"),
    # by hand: 65,536 registers, 64 warps, 227 KB
    [(32, 4, 0, 64), (36, 4, 0, 48), (128, 8, 0, 16), (255, 4, 0, 8), (32, 8, 65536, 24)],
)
def test_resident_warps(
    limited: list[static.Row], registers: int, warps: int, shared: int, resident: int
) -> None:
    row = replace(limited[0], registers=registers, warps=warps, shared=shared)
    assert row.resident_warps == resident


def test_recording_leaves_no_pretended_gpu() -> None:
    from triton.runtime.driver import driver

    with ahead.pretended_driver(90) as recorder:
        assert driver.active is recorder
    # it looks for a GPU again, and may find none
    with contextlib.suppress(RuntimeError):
        assert driver.active is not recorder


def test_user_errors() -> None:
    with pytest.raises(UserError, match="choose one of sm_80, sm_89, sm_90, sm_100"):
        static.run("sm_75")
    with pytest.raises(UserError, match="choose one of"):
        static.run("hopper")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="unset it"):
        ahead.record(lambda: None, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [f"sm_{number}" for number in static.CAPABILITIES])
def test_every_variant_compiles(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With torch.compile's code beside it on sm_90."""
    passed = static.run(architecture)
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert passed


@pytest.mark.slow
def test_what_torch_compile_moves() -> None:
    """Backward reads x and dy twice: once for dx, once for the alphas."""
    try:
        rows = [row for row in static.peers() if row.widths]
    except inductor.Unobtainable as reason:
        if torch.__version__.startswith("2.13."):
            raise
        pytest.skip(str(reason))
    print("\n" + static.table(rows, static.GPUS[90]))
    moved = [(row.name, row.bytes) for row in rows]
    assert sorted(moved) == [
        ("torch.compile backward", 4),
        ("torch.compile backward", 6),
        ("torch.compile forward", 4),
    ]
