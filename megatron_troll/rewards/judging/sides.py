"""The two processes that try an answer on one test, each in a sandbox: `serve` and `judge`.

serve   loads the answer as a module and carries out what is asked of it: calls, attributes, items
judge   runs the test; names that it does not define are the answer's, as values or as stand-ins (Remote)

All values between them are copies of plain types (judging/wire.py). So nothing of the answer runs where its
verdict is made: what it returns are numbers, texts and collections of them, and its objects are stand-ins
that equal nothing. It learns of a test only the arguments of calls. Standard library only: it runs in the
sandbox.
"""

import ast
import builtins
import functools
import importlib.machinery
import json
import operator
import os
import sys
import types

from megatron_troll.rewards.judging.wire import ANSWER, SHARED, TEST, Channel, Gone, exception_of, imported

# Names with which tests compare: always the judge's own, whatever the answer defines.
OWN = {name: (name, None) for name in SHARED} | {
    "np": ("numpy", None),
    "isclose": ("math", "isclose"),
    "allclose": ("numpy", "allclose"),
    "array_equal": ("numpy", "array_equal"),
    "deepcopy": ("copy", "deepcopy"),
    "Decimal": ("decimal", "Decimal"),
    "Fraction": ("fractions", "Fraction"),
    "date": ("datetime", "date"),
    "timedelta": ("datetime", "timedelta"),
    **{
        name: ("collections", name)
        for name in ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple")
    },
}
NUMPY_ASSERTS = (
    *("assert_allclose", "assert_almost_equal"),
    *("assert_array_almost_equal", "assert_array_equal"),
)
MUTABLE = (list, dict, set, bytearray)
UNARY = ("neg", "pos", "invert", "abs")
BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


class Peer:
    """One side: it asks the other for actions, and carries out those that it is asked for meanwhile."""

    shared_in_calls = True

    def __init__(self, descriptor):
        self.channel = Channel(descriptor, Remote, self)

    def ask(self, action, *arguments, **named):
        """Have the other side carry out `action` of ACTIONS. Mutable arguments get the contents that they
        have after the call. Raises what it raises there, by its nearest built-in exception."""
        encode, decode = self.channel.encode, self.channel.decode
        named_parts = {name: encode(value) for name, value in named.items()}
        self.channel.send(["ask", action, [encode(one) for one in arguments], named_parts])
        while True:
            kind, *parts = self.channel.receive()
            if kind == "ask":
                self.answer(*parts)
                continue
            if kind == "raised":
                raise decode(parts[0])(*decode(parts[1]))
            value, changed, named_changed = parts
            for before, after in [
                *zip(arguments, changed),
                *((named[n], one) for n, one in named_changed.items()),
            ]:
                renew(before, decode(after))
            return decode(value)

    def answer(self, action, arguments, named):
        """Carry out `action` and send its value or its exception."""
        decode = functools.partial(self.channel.decode, shared=self.shared_in_calls)
        try:
            values = [decode(one) for one in arguments]
            others = {name: decode(value) for name, value in named.items()}
            self.permit(action, values)
            result = ACTIONS[action](*values, **others)
            changed = [self.changed(before, value) for before, value in zip(arguments, values)]
            named_changed = {name: self.changed(named[name], value) for name, value in others.items()}
            message = ["value", self.channel.encode(result), changed, named_changed]
        except Exception as error:  # noqa: BLE001 (whatever it is, the other side gets it)
            message = ["raised", exception_of(type(error)), self.channel.encode(error.args)]
        self.channel.send(message)

    def permit(self, action, values):
        """Raise Gone if the other side may not ask for this."""

    def changed(self, before, value):
        """An argument after a call; None if it is as before, or cannot change."""
        after = self.channel.encode(value) if type(value) in MUTABLE else before
        return None if after == before else after


class Judge(Peer):
    """The test's side. The answer may call the test's functions, and look into objects of its classes:
    nothing from which a name of the judge could be reached."""

    shared_in_calls = False

    def permit(self, action, values):
        target = values[0]
        own = getattr(type(target), "__module__", None) == TEST
        function = isinstance(target, (types.FunctionType, types.MethodType)) and target.__module__ == TEST
        public = all(not name.startswith("_") for name in values[1:2] if isinstance(name, str))
        if not ((action == "call" and function) or (own and public)):
            raise Gone


def renew(before, after):
    """Give a mutable argument the contents that it has after a call."""
    if type(before) is type(after) and type(before) in MUTABLE:
        before.clear()
        (before.extend if isinstance(before, (list, bytearray)) else before.update)(after)


class Remote:
    """A stand-in for an object of the other process. It can be called and looked into. It cannot be compared
    or calculated with together with values of the test, which would show these to the answer."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer, number):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, action, *arguments, **named):
        return object.__getattribute__(self, "_peer").ask(action, self, *arguments, **named)

    def __call__(self, *arguments, **named):
        return Remote._ask(self, "call", *arguments, **named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote._ask(self, "getattr", name)

    def __setattr__(self, name, value):
        Remote._ask(self, "setattr", name, value)

    def __getitem__(self, key):
        return Remote._ask(self, "getitem", key)

    def __setitem__(self, key, value):
        Remote._ask(self, "setitem", key, value)

    def __delitem__(self, key):
        Remote._ask(self, "delitem", key)

    def __len__(self):
        return Remote._ask(self, "len")

    def __bool__(self):
        return Remote._ask(self, "bool") is True

    def __iter__(self):
        return Remote._ask(self, "iter")

    def __next__(self):
        return Remote._ask(self, "next")

    def __enter__(self):
        return Remote._ask(self, "enter")

    def __exit__(self, *error):
        Remote._ask(self, "exit")

    def __str__(self):
        return str(Remote._ask(self, "str"))

    def __repr__(self):
        return str(Remote._ask(self, "repr"))

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and Remote._ask(self, "has instance", value) is True

    def __eq__(self, other):
        if other is None:
            return False
        if isinstance(object.__getattribute__(self, "_peer"), Judge):
            raise TypeError("an object of the answer equals nothing: compare its values")
        return self is other

    __hash__ = object.__hash__


def between(action):
    """An operator of two stand-ins."""

    def method(self, other):
        return Remote._ask(self, action, other) if isinstance(other, Remote) else NotImplemented

    return method


def alone(action):
    return lambda self: Remote._ask(self, action)


for _name in BINARY:
    setattr(Remote, f"__{_name}__", between(_name))
for _name in UNARY:
    setattr(Remote, f"__{_name}__", alone(_name))

ACTIONS = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "delitem": lambda target, key: target.__delitem__(key),
    "len": len,
    "bool": bool,
    "iter": iter,
    "next": next,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "str": str,
    "repr": repr,
    "has instance": lambda kind, value: isinstance(value, kind),
    **{name: getattr(operator, f"__{name}__") for name in BINARY + UNARY},
}


def serve(descriptor):
    """Load answer.py as the module `answer`, send what it defines, and do what is asked of it until the judge
    ends."""
    loader = importlib.machinery.SourceFileLoader(ANSWER, "answer.py")
    module = types.ModuleType(ANSWER)
    module.__file__, module.__spec__ = "answer.py", importlib.machinery.ModuleSpec(ANSWER, loader)
    sys.modules[ANSWER] = module
    loader.exec_module(module)
    peer = Peer(descriptor)
    peer.channel.send(dict(defined(module, peer.channel)))
    try:
        while True:
            _, *parts = peer.channel.receive()
            peer.answer(*parts)
    except Gone:
        os._exit(0)


def defined(module, channel):
    for name, value in vars(module).items():
        if not name.startswith("__"):
            try:
                yield name, channel.encode(value)
            except RecursionError:
                yield name, channel.reference(value)


def compares_with(test):
    """Names of OWN that a test uses. A module cannot be called: a function of its name is the answer's."""
    used = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    return {name for name in used & set(OWN) if OWN[name][1] is not None or name not in called}


def comparable(actual, desired):
    """Whether arrays can be equal: shapes are, or `desired` is one number for all of some elements. numpy
    broadcasts: to it, [] is close to every number."""
    import numpy

    actual, desired = numpy.shape(actual), numpy.shape(desired)
    return actual == desired or (desired == () and 0 not in actual)


def compare_shapes(test):
    """Make what numpy compares for `test`, if it uses numpy, false or an error unless `comparable`."""
    if "np" not in test and "numpy" not in test and "allclose" not in test:
        return
    try:
        import numpy
    except ImportError:
        return
    close = numpy.allclose
    numpy.allclose = lambda a, b, *rest, **named: comparable(a, b) and close(a, b, *rest, **named)
    for name in NUMPY_ASSERTS if "testing" in test else ():
        setattr(numpy.testing, name, strict(getattr(numpy.testing, name)))


def strict(compare):
    def method(actual, desired, *rest, **named):
        if not comparable(actual, desired):
            raise AssertionError("the shapes differ")
        compare(actual, desired, *rest, **named)

    return method


def judge(descriptor):
    """Run the test of stdin on the answer, once it is loaded, and write the word that proves a pass."""
    peer = Judge(descriptor)
    names = peer.channel.receive()
    test, passed = json.load(sys.stdin)
    tree = ast.parse(test)
    compare_shapes(test)
    own = compares_with(tree)
    known = {"__name__": TEST, "__builtins__": builtins}
    for name, value in names.items():
        if name in own:
            known[name] = imported(*OWN[name])
        elif not hasattr(builtins, name) and not name.startswith("__"):
            known[name] = peer.channel.decode(value)
    exec(compile(tree, "test.py", "exec"), known)
    sys.stdout.write("\n" + passed)
    sys.stdout.flush()
    os._exit(0)
