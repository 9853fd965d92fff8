"""Values that pass between the two processes that try an answer on a test (judging/sides.py).

Lines of JSON over one file descriptor. Plain types and the collections of the standard library are copied;
other objects are numbers, for which the other process has stand-ins. Standard library only: it runs in the
sandbox.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import functools
import importlib
import json
import os
import sys
import types
from typing import Any

LONGEST_LINE = 1 << 26
ANSWER, TEST = "answer", "test"
# Modules whose members one side may name to the other, like `math` after `import math`.
SHARED = frozenset(
    {
        *(
            "bisect",
            "cmath",
            "collections",
            "copy",
            "dataclasses",
            "datetime",
            "decimal",
            "enum",
            "fractions",
        ),
        *(
            "functools",
            "heapq",
            "itertools",
            "json",
            "math",
            "numpy",
            "operator",
            "random",
            "re",
            "statistics",
        ),
        *("string", "typing"),
    }
)
# Built-in functions that may be named: they reach nothing but their arguments.
PURE = frozenset(
    {
        *(
            "abs",
            "all",
            "any",
            "bin",
            "bool",
            "bytes",
            "chr",
            "complex",
            "dict",
            "divmod",
            "enumerate",
            "filter",
        ),
        *(
            "float",
            "frozenset",
            "hash",
            "hex",
            "int",
            "len",
            "list",
            "map",
            "max",
            "min",
            "oct",
            "ord",
            "pow",
        ),
        *("range", "repr", "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip"),
    }
)


class Gone(BaseException):
    """The other process has ended, or wrote something else than a message. No `except Exception` hides it."""


class Channel:
    """Lines of JSON over a file descriptor, and the values in them. `mine` are objects that the other side
    refers to by number; objects of the class `stands_in` are those of the other side."""

    def __init__(self, descriptor, stands_in, peer):
        self.descriptor = descriptor
        self.stands_in = stands_in
        self.stand_in = functools.cache(functools.partial(stands_in, peer))
        self.mine = {}
        self.read = b""

    def send(self, message):
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self.descriptor, line) :]

    def receive(self):
        parts, size = [self.read], len(self.read)
        while b"\n" not in parts[-1]:
            part = os.read(self.descriptor, 1 << 16)
            size += len(part)
            if not part or size > LONGEST_LINE:
                raise Gone
            parts.append(part)
        line, _, self.read = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def encode(self, value):
        """`value` as JSON. Plain types and the collections of the standard library go by value; objects of
        other classes, and of subclasses that the answer or the test defines, by number."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is self.stands_in:
            return ["theirs", object.__getattribute__(value, "_number")]
        if is_named_tuple(kind):
            return ["named tuple", [kind.__name__, kind._fields, [self.encode(member) for member in value]]]
        if kind.__module__ not in (ANSWER, TEST):
            for name, (matches, parts) in BY_VALUE.items():
                if matches(value, kind):
                    return [name, parts(value, self.encode)]
        return self.reference(value)

    def reference(self, value):
        if isinstance(value, types.ModuleType) and value.__name__ in SHARED:
            return ["shared", value.__name__, None]
        if isinstance(value, type) and issubclass(value, Exception):
            return exception_of(value)
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if (
            isinstance(name, str)
            and allowed(module, name)
            and getattr(sys.modules.get(str(module)), name, None) is value
        ):
            return ["shared", module, name]
        self.mine[id(value)] = value
        return ["mine", id(value)]

    def decode(self, message: Any, shared: bool = True) -> Any:
        """The value of `message`. Raises Gone for one that names what it may not; `shared`: whether it may
        name modules and their members."""
        if not isinstance(message, list):
            return message
        name, *parts = message
        if name == "mine":
            return self.stand_in(int(parts[0]))
        if name == "theirs":
            return self.mine[parts[0]]
        if name in ("shared", "exception"):
            if not shared:
                raise Gone
            return imported(*parts) if name == "shared" else exception(tuple(parts[0]), parts[1])
        return FROM_VALUE[name](parts[0], functools.partial(self.decode, shared=shared))


def allowed(module, name):
    return name in PURE if module == "builtins" else module in SHARED and name.isidentifier()


def imported(module, name):
    if not (module in SHARED if name is None else allowed(module, name)):
        raise Gone
    found = importlib.import_module(module)
    return found if name is None else getattr(found, name)


def exception_of(kind):
    """An exception class: the names of its own classes, the outermost first, and of the built-in one."""
    own = [one.__name__ for one in kind.__mro__ if one.__module__ in (ANSWER, TEST)]
    return ["exception", own, next(one.__name__ for one in kind.__mro__ if one.__module__ == "builtins")]


@functools.cache
def exception(own, base):
    """A class like that of `exception_of`, with as many classes above the built-in one."""
    if own:
        return type(own[0], (exception(own[1:], base),), {})
    found = getattr(builtins, base)
    return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError


def is_named_tuple(kind):
    """Whether a class is a named tuple without methods of its own."""
    methods = [name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")]
    return issubclass(kind, tuple) and hasattr(kind, "_fields") and not methods


@functools.cache
def named_tuple(name, fields):
    return collections.namedtuple(name, fields)


def numpy_array(value, kind):
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray"


def numpy_number(value, kind):
    return (
        kind.__module__.startswith("numpy") and hasattr(value, "item") and getattr(value, "shape", None) == ()
    )


def of(*kinds):
    return lambda value, kind: isinstance(value, kinds)


def members(value, encode):
    return [encode(member) for member in value]


def make(kind):
    return lambda parts, decode: kind(decode(part) for part in parts)


def array(parts, decode):
    numpy = importlib.import_module("numpy")
    return numpy.array(decode(parts[1]), dtype=parts[0])


def pairs(value, encode):
    return [[encode(key), encode(item)] for key, item in value.items()]


BY_VALUE = {
    "int": (of(int), lambda value, encode: hex(int.__index__(value))),
    "float": (of(float), lambda value, encode: float.hex(float(value))),
    "numpy number": (numpy_number, lambda value, encode: encode(value.item())),
    "array": (numpy_array, lambda value, encode: [str(value.dtype), encode(value.tolist())]),
    "str": (of(str), lambda value, encode: str.__str__(value)),
    "list": (of(list), members),
    "tuple": (of(tuple), members),
    "set": (of(set), members),
    "frozenset": (of(frozenset), members),
    "dict": (of(dict), pairs),
    "deque": (of(collections.deque), members),
    "bytes": (of(bytes, bytearray), lambda value, encode: bytes(value).hex()),
    "complex": (of(complex), lambda value, encode: [value.real.hex(), value.imag.hex()]),
    "Decimal": (of(decimal.Decimal), lambda value, encode: decimal.Decimal.__str__(value)),
    "Fraction": (
        of(fractions.Fraction),
        lambda value, encode: [encode(value.numerator), encode(value.denominator)],
    ),
    "range": (
        of(range),
        lambda value, encode: [encode(end) for end in (value.start, value.stop, value.step)],
    ),
    "datetime": (of(datetime.datetime), lambda value, encode: value.isoformat()),
    "date": (of(datetime.date), lambda value, encode: value.isoformat()),
    "timedelta": (
        of(datetime.timedelta),
        lambda value, encode: [value.days, value.seconds, value.microseconds],
    ),
}
FROM_VALUE = {
    "int": lambda part, decode: int(part, 16),
    "float": lambda part, decode: float.fromhex(part),
    "numpy number": lambda part, decode: decode(part),
    "array": array,
    "str": lambda part, decode: str(part),
    "list": make(list),
    "tuple": make(tuple),
    "named tuple": lambda parts, decode: named_tuple(parts[0], tuple(parts[1]))(*map(decode, parts[2])),
    "set": make(set),
    "frozenset": make(frozenset),
    "dict": lambda parts, decode: {decode(key): decode(item) for key, item in parts},
    "deque": make(collections.deque),
    "bytes": lambda part, decode: bytes.fromhex(part),
    "complex": lambda parts, decode: complex(*map(float.fromhex, parts)),
    "Decimal": lambda part, decode: decimal.Decimal(part),
    "Fraction": lambda parts, decode: fractions.Fraction(*map(decode, parts)),
    "range": lambda parts, decode: range(*map(decode, parts)),
    "datetime": lambda part, decode: datetime.datetime.fromisoformat(part),
    "date": lambda part, decode: datetime.date.fromisoformat(part),
    "timedelta": lambda parts, decode: datetime.timedelta(*parts),
}
