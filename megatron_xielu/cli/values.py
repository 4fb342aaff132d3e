"""The kinds of values that arguments take."""

from __future__ import annotations

import argparse
import json
from typing import Any


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def size(text: str) -> int:
    """Bytes, of a text such as 5GB."""
    number = text.upper().removesuffix("B")
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        count = int(float(number.rstrip("KMG")) * scale)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB or 500MB")
    return count


def argument(text: str) -> tuple[str, Any]:
    """The name and value of an argument of Megatron's."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, as in rotary_base=500000")
    try:
        # a number or true, else a word
        return name, json.loads(value.lower())
    except ValueError:
        return name, value
