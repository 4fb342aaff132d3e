"""What the GPU kernels cost, read from their machine code: no GPU is needed, and nothing is timed.

Every kernel is compiled as its launch on a GPU would compile it (`ahead`) and disassembled
(`sass`). All instructions of a kernel are counted, those that it needs once per program too, and
divided by the elements that its loads cover. From bytes and instructions per element and the GPU's
data sheet follow times that no run of this code can beat; a real one takes longer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_xielu.bench import ahead, inductor, sass
from megatron_xielu.bench.variants import COLUMNS, ROWS, Variant, variants
from megatron_xielu.errors import UserError

CAPABILITIES = (80, 89, 90, 100)


class Gpu(NamedTuple):
    """What bounds the speed of a kernel."""

    name: str
    memory: float
    """Bytes per second."""
    multiprocessors: int
    clock: float
    """Hz."""
    lanes: dict[str, int]
    """Results of a unit per clock and multiprocessor."""


GPUS = {
    90: Gpu(
        "H100 SXM",
        # data sheet of the H100 SXM, and "NVIDIA H100 Tensor Core GPU Architecture"
        memory=3.35e12,
        multiprocessors=132,
        # what it keeps under load; the highest is 1.98e9
        clock=1.755e9,
        # CUDA C++ Programming Guide, throughput of arithmetic instructions, compute capability 9.0;
        # "issue": each of four schedulers starts one instruction of a warp
        lanes={"issue": 4 * 32, "alu": 64, "multiply": 64, "mufu": 16, "fp64": 64},
    )
}


class Limits(NamedTuple):
    """What a kernel must keep to on compute capability 9.0, per element."""

    instructions: float
    """At most, where the tiles fit the size."""
    bytes: int
    """Exactly, read and written."""


LIMITS = {
    "forward bf16": Limits(16, 4),
    "backward bf16": Limits(28, 6),
    "forward bf16 to e4m3": Limits(26, 4),
    "backward bf16 to e5m2": Limits(42, 6),
}


@dataclass(frozen=True)
class Row:
    """What one kernel costs.

    Attributes:
        name, size: of the `Variant`.
        kernel: its name.
        capability: what it was compiled for.
        registers, warps, shared: of a thread, of a program, and of a program in bytes.
        spills, atomics: instructions of these kinds.
        untraced: loads and stores whose tensor is unknown.
        widths: bits of each load and store of tensors of x's size. There are none where a kernel
            finishes what another one computed; what is per element is 0 then.
        loops: whether the kernel has a loop. Where it reads such tensors in it, what is per element
            is counted in the loop.
        bytes: of such tensors, read and written per element.
        instructions: per element, by the classes of `sass`, and all of them as "issue".
        coverage: elements that all programs load, relative to those of x.
    """

    name: str
    size: str
    kernel: str
    capability: int
    registers: int
    warps: int
    shared: int
    spills: int
    atomics: int
    untraced: int
    widths: tuple[int, ...]
    loops: bool
    bytes: float = 0.0
    instructions: Mapping[str, float] = field(default_factory=dict)
    coverage: float = 0.0

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor of an A100 or newer holds at a time, of at most 64."""
        # registers are given to a warp in units of 256, of 65,536
        programs = min(65536 // (-(-self.registers * 32 // 256) * 256), 64) // self.warps
        # 227 KB are shared, and each program takes one more than it asks for
        programs = min(programs, 227 * 1024 // (self.shared + 1024))
        return programs * self.warps

    def microseconds(self, gpu: Gpu) -> dict[str, float]:
        """The least time that the memory and each unit need for `ROWS` x `COLUMNS` elements."""
        clocks = gpu.clock * gpu.multiprocessors
        seconds = {"memory": self.bytes / gpu.memory}
        for unit, results in gpu.lanes.items():
            seconds[unit] = self.instructions.get(unit, 0) / (clocks * results)
        return {unit: 1e6 * ROWS * COLUMNS * time for unit, time in seconds.items()}


def run(architecture: str) -> bool:
    """Compile and read every kernel, print a table, and say whether all limits are kept.

    Args:
        architecture: sm_80, sm_89, sm_90 or sm_100. Limits and times belong to sm_90; elsewhere
            kernels must compile without spills and atomics.

    Raises:
        UserError: another architecture, or Triton is missing.
    """
    capability = _capability(architecture)
    rows = measure(variants(capability), capability)
    gpu = GPUS.get(capability)
    print(f"{architecture}, {ROWS} x {COLUMNS} elements; least times, computed and not measured")
    if gpu:
        rates = f"{gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:g} GHz"
        print(f"{gpu.name}: {gpu.memory / 1e12:g} TB/s, {rates}")
    print("\n" + table(_without_repetition(rows), gpu))
    if gpu:
        print("\nwhat torch.compile generates for the published code\n")
        try:
            print(table(peers(capability), gpu))
        except inductor.Unobtainable as reason:
            print(f"could not be obtained: {reason}")
    violations = check(rows)
    print("\n" + ("\n".join(violations) or "all limits are kept"))
    return not violations


def check(rows: Sequence[Row]) -> list[str]:
    """What breaks a limit, one sentence each."""
    violations = []
    for row in rows:
        name = f"{row.name} ({row.kernel}, size {row.size}, sm_{row.capability})"
        for what, count in (("register spills", row.spills), ("atomics", row.atomics)):
            if count:
                violations.append(f"{name}: {count} {what}; none are allowed")
        if row.untraced:
            violations.append(f"{name}: {row.untraced} accesses whose tensor is unknown")
        if row.widths and row.size != "any" and min(row.widths) < 128:
            violations.append(f"{name}: an access of {min(row.widths)} bits instead of 128")
        limits = LIMITS.get(row.name)
        if limits and row.widths and row.capability in GPUS:
            violations += [f"{name}: {text}" for text in _beyond(row, limits)]
    seen = {row.name for row in rows if row.widths}
    if any(row.capability in GPUS for row in rows):
        violations += [f"no kernel was found for {name}" for name in LIMITS if name not in seen]
    return violations


def _beyond(row: Row, limits: Limits) -> Iterator[str]:
    if row.loops:
        yield "it loops, so that counting its instructions says little"
    if row.size == "even":
        if row.instructions["issue"] > limits.instructions:
            count = row.instructions["issue"]
            yield f"{count:.2f} instructions per element; at most {limits.instructions:g}"
        if row.coverage != 1:
            yield f"each element is loaded {row.coverage:g} times instead of once"
    if row.size != "any" and row.bytes != limits.bytes:
        yield f"{row.bytes:g} bytes per element instead of {limits.bytes}"


def measure(variants: Sequence[Variant], capability: int) -> list[Row]:
    """Compile what the variants launch; a row for each kernel."""
    return [
        _row(variant, launch, capability)
        for variant in variants
        for launch in ahead.record(variant.work, capability)
    ]


def peers(capability: int = 90) -> list[Row]:
    """What torch.compile generates for the published code, forward and backward.

    Raises:
        inductor.Unobtainable: this version of torch does not let it be obtained.
    """
    rows = []
    for name, candidates in inductor.launches(ROWS, COLUMNS, capability):
        variant = Variant(f"torch.compile {name}", "even", ROWS * COLUMNS, lambda: None)
        # it times them where it runs, and keeps the fastest
        found = [_row(variant, launch, capability) for launch in candidates]
        rows.append(min(found, key=lambda row: row.instructions.get("issue", 0.0)))
    return rows


def table(rows: Sequence[Row], gpu: Gpu | None) -> str:
    """The rows, aligned; times in microseconds where there is a GPU."""
    titles = ["what", "kernel", "size", "regs", "warps/SM", "spills", "atomics", "ld/st bits"]
    titles += ["B/elem", "insn/elem", "limit"]
    if gpu:
        titles += ["memory", "issue", "alu", "mufu", "floor us", "by"]
    lines = [titles]
    for row in rows:
        line = [row.name, row.kernel.removesuffix("_kernel"), row.size, str(row.registers)]
        line += [str(row.resident_warps), str(row.spills), str(row.atomics)]
        if row.widths:
            line.append("/".join(str(width) for width in sorted(set(row.widths))))
            line += [f"{row.bytes:g}", f"{row.instructions['issue']:.2f}"]
            limits = LIMITS.get(row.name) if row.size == "even" and gpu else None
            line.append(f"{limits.instructions:g}" if limits else "")
            if gpu:
                times = row.microseconds(gpu)
                unit = max(times, key=lambda name: times[name])
                line += [f"{times[name]:.0f}" for name in ("memory", "issue", "alu", "mufu")]
                line += [f"{times[unit]:.0f}", unit]
        lines.append(line + [""] * (len(titles) - len(line)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    left = (0, 1, 2, len(titles) - 1 if gpu else -1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _without_repetition(rows: Sequence[Row]) -> list[Row]:
    """Kernels that finish another one's work are the same for many."""
    kept, seen = [], set()
    for row in rows:
        if row.widths or row.kernel not in seen:
            kept.append(row)
        seen.add(row.kernel)
    return kept


def _capability(architecture: str) -> int:
    match = re.fullmatch(r"sm_(\d+)", architecture)
    if match is None or int(match[1]) not in CAPABILITIES:
        legal = ", ".join(f"sm_{capability}" for capability in CAPABILITIES)
        raise UserError(f"--static {architecture}: choose one of {legal}")
    return int(match[1])


def _row(variant: Variant, launch: ahead.Launch, capability: int) -> Row:
    code = sass.read(launch.cubin)
    large: dict[int | None, int] = {
        ordinal: tensor.itemsize
        for ordinal, tensor in launch.tensors.items()
        if tensor.elements >= variant.elements
    }
    data = [access for access in code.accesses if access.parameter in large]
    counted = range(len(code.opcodes))
    if any(access.position in code.loop for access in data):
        counted = code.loop
        data = [access for access in data if access.position in counted]
    row = Row(
        name=variant.name,
        size=variant.size,
        kernel=launch.kernel,
        capability=capability,
        registers=code.registers,
        warps=launch.warps,
        shared=launch.shared,
        spills=code.spills,
        atomics=code.atomics,
        untraced=sum(access.parameter is None for access in code.accesses),
        widths=tuple(access.bits for access in data),
        loops=bool(code.loop),
    )
    if not data:
        return row
    # a program's loads of the first tensor that it loads say how many elements it computes
    first = next((access for access in data if not access.store), data[0])
    loaded = sum(a.bits for a in data if (a.parameter, a.store) == (first.parameter, first.store))
    elements = loaded / 8 / large[first.parameter]
    found = sass.classes([code.opcodes[position] for position in counted])
    found["issue"] = len(counted)
    return replace(
        row,
        bytes=sum(row.widths) / 8 / elements,
        instructions={name: count / elements for name, count in found.items()},
        coverage=elements * launch.threads * launch.programs / variant.elements,
    )
