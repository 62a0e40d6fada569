"""Values over a pipe: how the processes of the sandbox exchange arguments, results and exceptions.

A value is sent as JSON: a list of nodes, one for each object in it that is no number, text or None.
A node is [name of its type, its parts...]; the part [n] stands for the object of node n. So lists
may share lists, contain themselves, and be nested to any depth.

The receiver makes only real values of the types in MUTABLE, IMMUTABLE and SPECIAL, of plain parts.
Nothing that a program defines is ever called there.

Read first: MUTABLE, IMMUTABLE, Encoder, decode.
"""

import array
import base64
import builtins
import contextlib
import datetime
import decimal
import fractions
import functools
import json
import os
import pathlib
import re
import select
import struct
import time
import types
import uuid
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
from operator import attrgetter

# ------------------------------------------------------------------------------------------------
# Messages


to_json = json.JSONEncoder(ensure_ascii=False).encode


def pack(message):
    """JSON data as bytes: the length in four of them, then the text."""
    data = to_json(message).encode(errors="surrogatepass")
    return struct.pack("<I", len(data)) + data


def send(fd, message):
    data = memoryview(pack(message))
    while data:
        data = data[os.write(fd, data):]


def receive(fd, limit=1 << 31, deadline=None):
    """Read one message. EOFError at the end of the pipe, ValueError if it is none, TimeoutError."""
    [size] = struct.unpack("<I", read_exactly(fd, 4, deadline))
    if size > limit:
        raise ValueError(f"a message of {size:,} bytes")
    return json.loads(read_exactly(fd, size, deadline).decode(errors="surrogatepass"))


def read_exactly(fd, size, deadline=None):
    parts = []
    while size:
        if deadline and not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------
# Types

ATOMS = (bool, int, float, str, type(None))     # sent as themselves
LONG_INT = 4096             # bits; the decimal digits of longer ones take quadratic time


def to_text(data):
    return [base64.b64encode(data).decode()]


def pairs_of(base):
    """What takes a mapping apart: [key, value, key, value, ...]."""
    return lambda mapping: [part for pair in base.items(mapping) for part in pair]


def add_pairs(mapping, parts):
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        mapping[key] = value


def default_factory(mapping):
    return getattr(mapping.default_factory, "__name__", None)


# Types whose values may contain themselves: they are made empty, and filled when all others exist.
# type -> (the parts of a value, an empty one made of the parts, how to fill it with them)
MUTABLE = {
    list: (list.__iter__, lambda *_: [], list.extend),
    set: (set.__iter__, lambda *_: set(), set.update),
    dict: (pairs_of(dict), lambda *_: {}, add_pairs),
    Counter: (pairs_of(dict), lambda *_: Counter(), add_pairs),
    OrderedDict: (pairs_of(OrderedDict), lambda *_: OrderedDict(), add_pairs),
    defaultdict: (
        lambda value: [default_factory(value), *pairs_of(dict)(value)],
        lambda factory, *_: defaultdict(BUILTIN_VALUES.get(factory)),
        lambda value, parts: add_pairs(value, parts[1:])),
    deque: (
        lambda value: [value.maxlen, *value],
        lambda maxlen, *_: deque(maxlen=maxlen),
        lambda value, parts: value.extend(parts[1:])),
    bytearray: (
        to_text,
        lambda *_: bytearray(),
        lambda value, parts: value.extend(base64.b64decode(parts[0]))),
}
BUILTIN_VALUES = {name: value for name, value in vars(builtins).items()
                  if isinstance(value, type) or value in (Ellipsis, NotImplemented)}


def match_parts(match):
    """A re.Match as what finds it again: the pattern, the text, where it begins, where to end."""
    where = match.string, match.start(), match.endpos
    again = match.re.match(*where)
    if again is None or again.regs != match.regs:
        raise TypeError("a match that depends on what stands before it cannot be sent")
    return match.re, *where


# All others: type -> (the parts of a value, how to make it of them)
IMMUTABLE = {
    tuple: (tuple.__iter__, lambda *parts: parts),
    frozenset: (frozenset.__iter__, lambda *parts: frozenset(parts)),
    bytes: (to_text, base64.b64decode),
    memoryview: (lambda value: [value.tobytes()], memoryview),
    array.array: (lambda value: [value.typecode, *value],
                  lambda code, *items: array.array(code, items)),
    complex: (attrgetter("real", "imag"), complex),
    range: (attrgetter("start", "stop", "step"), range),
    slice: (attrgetter("start", "stop", "step"), slice),
    fractions.Fraction: (attrgetter("numerator", "denominator"), fractions.Fraction),
    decimal.Decimal: (lambda value: [str(value)], decimal.Decimal),
    datetime.date: (attrgetter("year", "month", "day"), datetime.date),
    datetime.time: (attrgetter("hour", "minute", "second", "microsecond", "tzinfo"), datetime.time),
    datetime.datetime: (
        attrgetter("year", "month", "day", "hour", "minute", "second", "microsecond", "tzinfo"),
        datetime.datetime),
    datetime.timedelta: (attrgetter("days", "seconds", "microseconds"), datetime.timedelta),
    datetime.timezone: (datetime.timezone.__getinitargs__, datetime.timezone),
    time.struct_time: (lambda value: [tuple(value)], time.struct_time),
    uuid.UUID: (lambda value: [str(value)], lambda text: uuid.UUID(text)),
    pathlib.PosixPath: (lambda value: [str(value)], pathlib.PosixPath),
    pathlib.PurePosixPath: (lambda value: [str(value)], pathlib.PurePosixPath),
    re.Pattern: (attrgetter("pattern", "flags"), re.compile),
    re.Match: (match_parts, lambda pattern, *where: pattern.match(*where)),
    ChainMap: (attrgetter("maps"), ChainMap),
    types.MappingProxyType: (lambda value: [dict(value)], types.MappingProxyType),
    type({}.keys()): (iter, lambda *keys: dict.fromkeys(keys).keys()),
    type({}.values()): (iter, lambda *values: dict(enumerate(values)).values()),
    type({}.items()): (iter, lambda *pairs: dict(pairs).items()),
}
BASES = {*ATOMS, *MUTABLE, *IMMUTABLE}
BY_NAME = {base.__name__: base for base in (*MUTABLE, *IMMUTABLE)}
# Types that are made of numbers and text only: their constructors would take more than is ever sent
OF_ATOMS = {"complex", "range", "Fraction", "Decimal", "date", "timedelta", "UUID", "PosixPath",
            "PurePosixPath"}
NUMPY_KINDS = "biufcSUmM"   # of dtypes: numbers, text and dates, but no Python objects
WIDE = {"i": "i8", "u": "u8", "f": "f8", "c": "c16"}
# Exceptions that show their arguments as attributes
WITH_MEMBERS = (StopIteration, SystemExit, ImportError, OSError, SyntaxError, UnicodeError)


def make_numpy(kind, dtype, data, *shape):
    import numpy
    if numpy.dtype(dtype).kind not in NUMPY_KINDS:
        raise TypeError(f"dtype {dtype}")
    values = numpy.frombuffer(base64.b64decode(data), dtype).reshape(shape)
    return values.copy() if kind == "ndarray" else values[()]


def widened(values):
    """Numbers of a child in their widest dtype. In a narrow one, a test would round the number that
    it expects: np.float16("inf") == 1e9 is true."""
    import numpy
    kind = values.dtype.kind
    if kind not in WIDE:
        return values
    wide = values.astype(numpy.promote_types(values.dtype, WIDE[kind]))
    return wide if isinstance(values, numpy.ndarray) else wide[()]


def check_parts(kind, parts):
    """Raise TypeError for parts that the encoder never sends. A class must not become an attribute
    of a name that the child chooses, as a test might call it: result.startswith("ab")."""
    if kind in OF_ATOMS and not all(type(part) in ATOMS for part in parts):
        raise TypeError(f"parts of a {kind}")
    if kind in ("time", "datetime") and any(isinstance(part, bytes) for part in parts):
        raise TypeError(f"parts of a {kind}")
    shows_arguments = kind in ("namedtuple", "slice", "struct_time")
    if kind == "exception":
        shows_arguments = issubclass(BUILTIN_VALUES[parts[0]], WITH_MEMBERS)
    if shows_arguments and any(isinstance(part, type) for part in parts):
        raise TypeError(f"a class in a {kind}")


def check_attributes(error):
    """The same for the attributes of an exception, when they are all there. numpy would read some
    of its own (__array_interface__ names an address in memory)."""
    attributes = dict(vars(error))                          # not the dict of an argument
    for name, value in attributes.items():
        if isinstance(value, type) or (name.startswith("__") and name != "__notes__"):
            raise TypeError(f"the attribute {name} of an exception")
    error.__dict__ = attributes


def make_exception(name, attributes, cause, *args):
    kind = BUILTIN_VALUES[name]
    if not issubclass(kind, BaseException):
        raise TypeError(name)
    for base in kind.__mro__:                   # the nearest that takes these arguments
        with contextlib.suppress(TypeError):
            error = base(*args)
            break
    error.__dict__, error.__cause__ = attributes, cause
    return error


@functools.cache
def namedtuple_class(name, fields):
    return namedtuple(name, fields, rename=True)    # it may have been made so, too


# Kinds of nodes that are not named after a type: how to make a value of the parts
SPECIAL = {
    "int": lambda digits: int(digits, 16),
    "builtin": BUILTIN_VALUES.__getitem__,
    "iterator": lambda *items: iter(items),
    "namedtuple": lambda name, fields, *items: namedtuple_class(name, fields)(*items),
    "exception": make_exception,
    "numpy": make_numpy,
}

# ------------------------------------------------------------------------------------------------


def builtin_class(error):
    """The nearest builtin class of an exception."""
    return next(base for base in type(error).__mro__ if base.__module__ == "builtins")


def is_same(node, other):
    """Whether two nodes are the same: 1, 1.0 and True are not."""
    return node == other and json.dumps(node) == json.dumps(other)


class Encoder:
    """Makes nodes of values. exact: whether all of them arrive as what they are.

    objects: what the first nodes stand for; when a function returns, the arguments that it got.
    iterators: the list where iterators stay; their place in it is sent. Without: all their items.
    """

    def __init__(self, objects=(), iterators=None):
        self.objects, self.iterators, self.exact = list(objects), iterators, True
        self.numbers = {id(value): number for number, value in enumerate(self.objects)}

    def encode(self, value, known_nodes=()):
        """A value as JSON data: [part, nodes]. Nodes that are as in known_nodes become None."""
        part, nodes = self.part(value), []
        for number, value in enumerate(self.objects):           # more come in the meantime
            known = known_nodes[number] if number < len(known_nodes) else None
            if known and BY_NAME.get(known[0]) not in MUTABLE and known[0] != "numpy":
                nodes.append(None)                              # it cannot change
            else:
                node = self.node(value)
                nodes.append(None if is_same(node, known) else node)
        return [part, nodes]

    def part(self, value):
        """The value itself, or [number of its node]."""
        kind = type(value)
        if kind in ATOMS and (kind is not int or value.bit_length() <= LONG_INT):
            return value
        if kind not in BASES:
            plain = {int: int.__int__, float: float.__float__, str: str.__str__}.get(
                self.base(value))
            if plain:                                           # such as an IntEnum: what it holds
                return self.part(plain(value))
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return [self.numbers[id(value)]]

    def base(self, value):
        """The nearest class of a value that can be sent; None: there is none."""
        kind = type(value)
        if kind in BASES:
            return kind
        for base in kind.__mro__:
            numpy = base.__module__ == "numpy" and base.__name__ in ("ndarray", "generic")
            if base in BASES or numpy:
                self.exact = self.exact and (
                    base is kind or kind.__module__ in ("builtins", "numpy"))
                return base

    def node(self, value):
        """[name of its type, its parts...]. TypeError: it cannot be sent."""
        base, kind = self.base(value), type(value)
        if base is tuple and hasattr(kind, "_fields"):
            return ["namedtuple", kind.__name__, " ".join(kind._fields), *map(self.part, value)]
        if base in MUTABLE or base in IMMUTABLE:
            parts = (MUTABLE if base in MUTABLE else IMMUTABLE)[base][0](value)
            if base is defaultdict and value.default_factory is not None:
                known = BUILTIN_VALUES.get(default_factory(value)) is value.default_factory
                self.exact = self.exact and known           # a lambda stays behind
            return [base.__name__, *map(self.part, parts)]
        if base is int:
            return ["int", hex(value)]
        if base is not None:
            if value.dtype.kind not in NUMPY_KINDS:
                raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
            if self.iterators is not None and value.dtype.kind in WIDE:     # from a child: widened
                self.exact = self.exact and value.dtype.itemsize >= int(WIDE[value.dtype.kind][1:])
            return ["numpy", base.__name__, value.dtype.str, *to_text(value.tobytes()),
                    *value.shape]
        if isinstance(value, BaseException):
            return ["exception", *map(self.part, self.exception_parts(value))]
        if hasattr(kind, "__next__"):
            if self.iterators is None:
                self.exact = False                              # as it is used up here
                return ["iterator", *map(self.part, value)]
            self.exact = self.exact and kind.__module__ in ("builtins", "itertools")
            self.iterators.append(value)
            return ["iterator", len(self.iterators) - 1]
        name = value.__name__ if kind is type else str(value)[:20]
        if kind in (type, type(...), type(NotImplemented)) and BUILTIN_VALUES.get(name) is value:
            return ["builtin", name]
        raise TypeError(f"a value of type {kind.__name__} cannot be sent")

    def exception_parts(self, error):
        """The name of its builtin class, its attributes, its cause and its arguments."""
        builtin = builtin_class(error)
        self.exact = self.exact and builtin is type(error)
        args = builtin.__reduce__(error)[1]                     # of an OSError the file's name, too
        if isinstance(error, BaseExceptionGroup):
            args = error.message, tuple(error.exceptions)
        elif type(error).__str__ is not builtin.__str__:
            args = [str(error)]
        return builtin.__name__, vars(error), error.__cause__, *args


def encode(value):
    return Encoder().encode(value)


MISSING = object()


def decode(data, objects=(), make_iterator=None):
    """The inverse of Encoder.encode -> (value, the objects of its nodes); raises on false data.

    objects: those that the first nodes stand for; they are changed to what the nodes say.
    make_iterator: makes an iterator whose items stay at the other end, which is then a child: its
    data are checked and its numbers widened, so that it cannot influence how a test compares.
    """
    from_child = make_iterator is not None
    part, nodes = data
    objects, given = list(objects), len(objects)

    def resolve(part):
        if type(part) in ATOMS:
            return part
        [number] = part
        return objects[range(len(objects))[number]]             # an index, or an exception

    def make(kind, *parts):
        if kind == "iterator" and from_child:
            return make_iterator(*parts)
        if from_child:
            check_parts(kind, parts)
        value = SPECIAL[kind](*parts) if kind in SPECIAL else IMMUTABLE[BY_NAME[kind]][1](*parts)
        return widened(value) if from_child and kind == "numpy" else value

    for kind, *parts in nodes[given:]:
        base = BY_NAME.get(kind)
        objects.append(MUTABLE[base][1](*parts) if base in MUTABLE else MISSING)
    waiting = [number for number, value in enumerate(objects) if value is MISSING]
    while waiting:                                  # for parts that have yet to be made
        later = []
        for number in reversed(waiting):
            kind, *parts = nodes[number]
            parts = list(map(resolve, parts))
            if any(part is MISSING for part in parts):
                later.append(number)
            else:
                objects[number] = make(kind, *parts)
        if len(later) == len(waiting):
            raise ValueError("an immutable value that contains itself")
        waiting = later
    for number, (value, node) in enumerate(zip(objects, nodes, strict=True)):
        if not node:                                            # it is as it was
            continue
        base = BY_NAME.get(node[0])
        if number < given:
            before = Encoder().base(value)
            if before is not base and (before.__name__, node[0]) != ("ndarray", "numpy"):
                raise ValueError(f"a {before.__name__} that became a {node[0]}")
            if base in MUTABLE:
                base.clear(value)
        if base in MUTABLE:
            MUTABLE[base][2](value, list(map(resolve, node[1:])))
        elif number < given:                                    # an array
            value[...] = make(*node)
    for value in objects[given:]:
        if from_child and isinstance(value, BaseException):
            check_attributes(value)
    return resolve(part), objects
