"""What a broken rule suggests instead: the legal numbers nearest to a value."""

from __future__ import annotations

from collections.abc import Sequence


def indivisible(value: int, divisor: int) -> bool:
    """Whether the division leaves a rest; False where either is not positive."""
    return value > 0 and divisor > 0 and value % divisor != 0


def multiples(value: int, step: int) -> str:
    """The nearest multiples of `step` around `value`, for a message."""
    below = value // step * step
    return join([below, below + step] if below else [step])


def divisors(value: int) -> list[int]:
    """All of them, 1 and the value itself included."""
    return [d for d in range(1, value + 1) if value % d == 0]


def join(values: Sequence[int]) -> str:
    """1, 2, 3."""
    return ", ".join(map(str, values))
