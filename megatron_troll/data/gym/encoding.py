"""Items of the library as JSON and back, exactly: what JSON lacks is an object with one key that begins
with #."""

from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np

TUPLE, SET, PAIRS, FRACTION = "#tuple", "#set", "#pairs", "#fraction"


def encode(value: Any) -> Any:
    """`value` as JSON has it. Raises TypeError for a value without a form."""
    match value:
        case Enum():
            return encode(value.value)
        case np.generic():
            return encode(value.item())
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [encode(one) for one in value]
        case tuple():
            return {TUPLE: [encode(one) for one in value]}
        case set() | frozenset():
            return {SET: [encode(one) for one in sorted(value, key=repr)]}
        case Fraction():
            return {FRACTION: [value.numerator, value.denominator]}
        case dict() if all(type(key) is str and not key.startswith("#") for key in value):
            return {key: encode(one) for key, one in value.items()}
        case dict():
            return {PAIRS: [[encode(key), encode(one)] for key, one in value.items()]}
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def decode(value: Any) -> Any:
    """A value that `encode` has written, made anew."""
    if isinstance(value, list):
        return [decode(one) for one in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [(str(key), list(inside))] if key.startswith("#"):
            return _special(key, [decode(one) for one in inside])
    return {key: decode(one) for key, one in value.items()}


def _special(key: str, inside: list[Any]) -> Any:
    if key == PAIRS:
        return dict(inside)
    if key == FRACTION:
        return Fraction(*inside)
    return {TUPLE: tuple, SET: set}[key](inside)
