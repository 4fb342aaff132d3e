"""The machine code of one compiled kernel, as figures that can be compared with a limit.

NVIDIA's `cuobjdump`, which comes with Triton, prints a kernel's registers, its parameters and one
instruction a line. What the kernel moves is read from its global loads and stores: their widths,
and the parameter whose memory each addresses, which is found by following the pointers from the
constant bank, where a kernel finds its parameters, through the registers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from megatron_xielu.errors import UserError

# instructions by the unit that executes them, as far as a figure here needs it; the others are
# control flow, barriers, and what a warp computes once for all of its threads
CLASSES = {
    "global": ("LDG", "STG", "LD", "ST", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "atomic": ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS"),
    "mufu": ("MUFU",),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "fp32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2"),
    "multiply": ("IMAD", "IDP"),
    # add, compare, select, logic, shift, permute, pack
    "alu": (
        *("IADD", "IADD3", "VIADD", "IABS", "LEA", "LOP3", "SHF", "PRMT", "MOV", "SEL", "FSEL"),
        *("ISETP", "FSETP", "PLOP3", "IMNMX", "VIMNMX", "FMNMX", "FMNMX3", "VIADDMNMX", "SGXT"),
        *("F2FP", "FCHK", "BMSK", "HSETP2", "HMNMX2", "POPC"),
    ),
    "convert": ("F2F", "F2I", "I2F", "I2FP", "FRND"),
    "warp": ("SHFL", "REDUX", "VOTE", "VOTEU"),
}
_CLASS = {mnemonic: name for name, mnemonics in CLASSES.items() for mnemonic in mnemonics}
_CONSTANT_LOADS = ("LDC", "ULDC", "LDCU")

_INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?\w+\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<text>.*?)\s*;"
)
_PARAMETER = re.compile(r"Ordinal : (\w+)\s+Offset\s+: (\w+)\s+Size\s+: \w+\s+.*?Space : (\w+)")
_PARAMETER_BANK = re.compile(r"EIATTR_PARAM_CBANK\s+Format:\s+\w+\s+Value:\s+\w+ (\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_PREDICATE = re.compile(r"!?U?P[T\d]$")
# behind a descriptor, if there is one
_ADDRESS = re.compile(r"(?:^|\s|\])\[([^\[\]]+)\]")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?:\.|$)")
_TARGET = re.compile(r"0x([0-9a-f]+)$")


@dataclass(frozen=True)
class Access:
    """One load from global memory, or one store to it.

    Attributes:
        position: index of the instruction.
        parameter: ordinal of the kernel's parameter that points to the memory; None where the
            address does not follow from exactly one.
        store: rather than a load.
        bits: moved by each thread.
    """

    position: int
    parameter: int | None
    store: bool
    bits: int


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel says.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: bytes of local memory of a thread.
        shared: bytes of shared memory that a block has whatever its launch asks for.
        opcodes: each instruction with its modifiers, such as LDG.E.128, in order, without NOP.
        accesses: the global loads and stores, in order.
        loop: positions of the longest loop's instructions; empty where nothing loops.
    """

    registers: int
    stack: int
    shared: int
    opcodes: tuple[str, ...]
    accesses: tuple[Access, ...]
    loop: range

    @cached_property
    def classes(self) -> Counter[str]:
        """Instructions by the names in `CLASSES`, and "other"."""
        return classes(self.opcodes)

    @property
    def atomics(self) -> int:
        """Instructions that read, modify and write global or shared memory."""
        return self.classes["atomic"]

    @property
    def spills(self) -> int:
        """Loads and stores of a thread's own memory, for which its registers did not suffice."""
        return self.classes["local"]


def classes(opcodes: Sequence[str]) -> Counter[str]:
    """Instructions by the names in `CLASSES`, and "other"."""
    return Counter(_CLASS.get(_mnemonic(opcode), "other") for opcode in opcodes)


@cache
def read(cubin: bytes) -> MachineCode:
    """Disassemble a compiled kernel.

    Raises:
        UserError: there is no disassembler.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-elf", "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(listing: str) -> MachineCode:
    """Read what `cuobjdump -elf -sass -res-usage` prints for one kernel.

    Raises:
        ValueError: something that each kernel has is missing.
    """
    resources, bank = _RESOURCES.search(listing), _PARAMETER_BANK.search(listing)
    instructions = list(_instructions(listing))
    if resources is None or bank is None or not instructions:
        raise ValueError("cuobjdump's listing has another form than expected: " + listing[:200])
    registers, stack, shared = map(int, resources.groups())
    pointers = _pointers(listing, first=int(bank[1], 16) & 0xFFFF)
    return MachineCode(
        registers=registers,
        stack=stack,
        shared=shared,
        opcodes=tuple(instruction.opcode for instruction in instructions),
        accesses=tuple(_accesses(instructions, pointers)),
        loop=_longest_loop(instructions),
    )


def _cuobjdump() -> str:
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "cuobjdump is missing, which disassembles kernels: it comes with Triton 3.4 and newer "
            f"for Linux; or name one in TRITON_CUOBJDUMP_PATH ({error})"
        ) from None


@dataclass(frozen=True)
class _Instruction:
    """One line, such as `/*0170*/ @!P2 LDG.E.128 R8, desc[UR8][R28.64+0x800] ;`."""

    address: int
    guarded: bool
    opcode: str
    text: str

    @property
    def mnemonic(self) -> str:
        return _mnemonic(self.opcode)

    @property
    def results(self) -> list[str]:
        """The registers it writes, from the lowest word up."""
        register = _REGISTER.fullmatch(self._operands[0]) if self._operands else None
        if register is None or self.mnemonic.startswith("ST") or "SETP" in self.mnemonic:
            return []
        parts = self.opcode.split(".")
        if self.mnemonic.startswith(("LD", "ULD")):
            words = max(1, self.bits // 32)
        else:
            words = 2 if "WIDE" in parts or "64" in parts or self.mnemonic == "CS2R" else 1
        return [f"{register[1]}{int(register[2]) + word}" for word in range(words)]

    @property
    def bits(self) -> int:
        """What a load or store moves."""
        width = _WIDTH.search(self.opcode)
        return int(width[1]) if width else 32

    @property
    def sources(self) -> str:
        """What it computes its results from."""
        return ", ".join(self._operands[1:])

    @property
    def _operands(self) -> list[str]:
        # predicates hold no address; those that it writes come before or behind the register
        operands = [operand.strip() for operand in self.text.split(",")]
        return [operand for operand in operands if operand and not _PREDICATE.match(operand)]


def _mnemonic(opcode: str) -> str:
    """LDG of LDG.E.128."""
    return opcode.partition(".")[0]


def _instructions(listing: str) -> Iterator[_Instruction]:
    for line in listing.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match["opcode"] != "NOP":
            address, guarded = int(match["address"], 16), match["guard"] is not None
            yield _Instruction(address, guarded, match["opcode"], match["text"])


def _pointers(listing: str, first: int) -> dict[int, int]:
    """The ordinal of each parameter that is a pointer, by its address in the constant bank."""
    found = {}
    for match in _PARAMETER.finditer(listing):
        ordinal, offset, space = (int(number, 16) for number in match.groups())
        if space:
            found[first + offset] = ordinal
    return found


def _accesses(instructions: Sequence[_Instruction], pointers: Mapping[int, int]) -> list[Access]:
    """Follow each pointer's low word from the constant bank to the addresses made of it.

    The code is read once from top to bottom. That is exact where nothing jumps back, and for loops
    whose addresses only advance.
    """
    accesses = []
    holds: dict[str, frozenset[int]] = {}

    def origin(text: str) -> frozenset[int]:
        constants = (pointers.get(int(address, 16)) for address in _CONSTANT.findall(text))
        found = frozenset(ordinal for ordinal in constants if ordinal is not None)
        names = (prefix + number for prefix, number in _REGISTER.findall(text))
        return found.union(*(holds.get(name, ()) for name in names))

    for position, instruction in enumerate(instructions):
        kind = instruction.mnemonic
        if _CLASS.get(kind) == "global":
            accesses.append(_access(position, instruction, origin))
        for word, register in enumerate(instruction.results):
            constant = _CONSTANT.search(instruction.sources)
            if kind in _CONSTANT_LOADS and constant:
                found = origin(f"c[0x0][{int(constant[1], 16) + 4 * word:#x}]")
            elif kind.startswith("LD"):
                found = frozenset()
            else:
                found = origin(instruction.sources)
            # a condition under which a pointer is written is that under which it is used
            kept = holds.get(register, frozenset()) if instruction.guarded else frozenset()
            holds[register] = found or kept
    return accesses


def _access(
    position: int, instruction: _Instruction, origin: Callable[[str], frozenset[int]]
) -> Access:
    address = _ADDRESS.search(instruction.text)
    plain = instruction.mnemonic in ("LDG", "STG")
    found = origin(address[1]) if address and plain else frozenset()
    return Access(
        position=position,
        parameter=next(iter(found)) if len(found) == 1 else None,
        store="ST" in instruction.mnemonic,
        bits=instruction.bits,
    )


def _longest_loop(instructions: Sequence[_Instruction]) -> range:
    positions = {instruction.address: i for i, instruction in enumerate(instructions)}
    longest = range(0)
    for end, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.text) if instruction.mnemonic == "BRA" else None
        begin = positions.get(int(target[1], 16)) if target else None
        if begin is None or begin >= end:
            continue
        # a rare case that is treated behind the end of the code returns by a jump too
        body = instructions[begin:end]
        ends = any(other.mnemonic in ("EXIT", "RET") and not other.guarded for other in body)
        if not ends and end + 1 - begin > len(longest):
            longest = range(begin, end + 1)
    return longest
