"""Values over a pipe: how the processes of the sandbox exchange arguments, results and exceptions.

A value is sent as JSON: [part, nodes]. The part of a number, text or None is the value itself. Any
other object has a node, [name of its type, its parts...], and its part is [number of the node]. So
lists can share lists, contain themselves, and be nested to any depth.

The receiver builds values of a fixed list of types only: those in MUTABLE, IMMUTABLE and SPECIAL.
Nothing that a program defines is ever called there.

Read first: MUTABLE, IMMUTABLE, Encoder, Decoder.
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
    """JSON data as bytes: four bytes with the length, then the text."""
    data = to_json(message).encode(errors="surrogatepass")
    return struct.pack("<I", len(data)) + data


def send(fd, message):
    data = memoryview(pack(message))
    while data:
        data = data[os.write(fd, data):]


def receive(fd, limit=1 << 31, deadline=None):
    """Read one message; raises EOFError at the end of the pipe, ValueError if it is not a message,
    and TimeoutError after the deadline."""
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
# Types that can be sent

ATOMS = (bool, int, float, str, type(None))     # sent as themselves
PLAIN = {int: int.__int__, float: float.__float__, str: str.__str__}    # from values of subclasses
LONG_INT = 4096             # bits; converting longer ones to decimal takes quadratic time
BUILTINS = {name: value for name, value in vars(builtins).items()
            if isinstance(value, type) or value in (Ellipsis, NotImplemented)}


def to_text(data):
    return [base64.b64encode(data).decode()]


def pairs_of(base):
    """A function from a mapping to its parts: [key, value, key, value, ...]."""
    return lambda mapping: [part for pair in base.items(mapping) for part in pair]


def add_pairs(mapping, parts):
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        mapping[key] = value


def default_factory(mapping):
    return getattr(mapping.default_factory, "__name__", None)


# Types whose values can contain themselves. They are created empty, and filled once all other
# values exist: type -> (value to parts, parts to empty value, how to fill a value with parts)
MUTABLE = {
    list: (list.__iter__, lambda *_: [], list.extend),
    set: (set.__iter__, lambda *_: set(), set.update),
    dict: (pairs_of(dict), lambda *_: {}, add_pairs),
    Counter: (pairs_of(dict), lambda *_: Counter(), add_pairs),
    OrderedDict: (pairs_of(OrderedDict), lambda *_: OrderedDict(), add_pairs),
    defaultdict: (lambda value: [default_factory(value), *pairs_of(dict)(value)],
                  lambda factory, *_: defaultdict(BUILTINS.get(factory)),
                  lambda value, parts: add_pairs(value, parts[1:])),
    deque: (lambda value: [value.maxlen, *value],
            lambda maxlen, *_: deque(maxlen=maxlen),
            lambda value, parts: value.extend(parts[1:])),
    bytearray: (to_text, lambda *_: bytearray(),
                lambda value, parts: value.extend(base64.b64decode(parts[0]))),
}


def match_parts(match):
    """The pattern, text, start and end with which a re.Match is found again."""
    where = match.string, match.start(), match.endpos
    again = match.re.match(*where)
    if again is None or again.regs != match.regs:
        raise TypeError("a match that depends on the text before it cannot be sent")
    return match.re, *where


def make_from_text(base, text):
    return base(text)


# All other types: type -> (value to parts, parts to value)
IMMUTABLE = {
    tuple: (tuple.__iter__, lambda *parts: parts),
    frozenset: (frozenset.__iter__, lambda *parts: frozenset(parts)),
    bytes: (to_text, base64.b64decode),
    memoryview: (lambda value: [value.tobytes()], memoryview),
    array.array: (lambda value: [value.typecode, *value],
                  lambda code, *items: array.array(code, items)),
    datetime.timezone: (datetime.timezone.__getinitargs__, datetime.timezone),
    time.struct_time: (lambda value: [tuple(value)], time.struct_time),
    re.Pattern: (attrgetter("pattern", "flags"), re.compile),
    re.Match: (match_parts, lambda pattern, *where: pattern.match(*where)),
    ChainMap: (attrgetter("maps"), ChainMap),
    types.MappingProxyType: (lambda value: [dict(value)], types.MappingProxyType),
    type({}.keys()): (iter, lambda *keys: dict.fromkeys(keys).keys()),
    type({}.values()): (iter, lambda *values: dict(enumerate(values)).values()),
    type({}.items()): (iter, lambda *pairs: dict(pairs).items()),
}
CLOCK = "hour minute second microsecond tzinfo"
# Types with a constructor that takes these attributes
FROM_ATTRIBUTES = {
    complex: "real imag", range: "start stop step", slice: "start stop step",
    fractions.Fraction: "numerator denominator", datetime.date: "year month day",
    datetime.time: CLOCK, datetime.datetime: "year month day " + CLOCK,
    datetime.timedelta: "days seconds microseconds"}
for base, names in FROM_ATTRIBUTES.items():
    IMMUTABLE[base] = attrgetter(*names.split()), base
FROM_TEXT = (decimal.Decimal, uuid.UUID, pathlib.PosixPath, pathlib.PurePosixPath)
for base in FROM_TEXT:
    IMMUTABLE[base] = (lambda value: [str(value)]), functools.partial(make_from_text, base)

BASES = {*ATOMS, *MUTABLE, *IMMUTABLE}
BY_NAME = {base.__name__: base for base in (*MUTABLE, *IMMUTABLE)}
FROM_ATOMS = {base.__name__ for base in (*FROM_ATTRIBUTES, *FROM_TEXT)} - {"slice"}
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


def make_exception(name, attributes, cause, *args):
    kind = BUILTINS[name]
    if not issubclass(kind, BaseException):
        raise TypeError(name)
    for base in kind.__mro__:                   # the nearest class that takes these arguments
        with contextlib.suppress(TypeError):
            error = base(*args)
            break
    error.__dict__, error.__cause__ = attributes, cause
    return error


@functools.cache
def namedtuple_class(name, fields):
    return namedtuple(name, fields, rename=True)    # the sender may have renamed fields, too


# Kinds of nodes that are not named after a type -> parts to value
SPECIAL = {
    "int": lambda digits: int(digits, 16),
    "builtin": BUILTINS.__getitem__,
    "iterator": lambda *items: iter(items),
    "namedtuple": lambda name, fields, *items: namedtuple_class(name, fields)(*items),
    "exception": make_exception,
    "numpy": make_numpy,
}

# ------------------------------------------------------------------------------------------------
# What a test runner refuses from a child, so that no value influences how a test compares it


def check_parts(kind, parts):
    """Raise TypeError for parts that the encoder never sends. A class must not become an attribute
    whose name the child chooses, as a test might call it: result.startswith("ab")."""
    if kind in FROM_ATOMS and not all(type(part) in (*ATOMS, datetime.timezone) for part in parts):
        raise TypeError(f"parts of a {kind}")
    shows_arguments = kind in ("namedtuple", "slice", "struct_time")
    if kind == "exception":
        shows_arguments = issubclass(BUILTINS[parts[0]], WITH_MEMBERS)
    if shows_arguments and any(isinstance(part, type) for part in parts):
        raise TypeError(f"a class in a {kind}")


def check_attributes(error):
    """The same for the attributes of an exception. numpy would read some special ones
    (__array_interface__ holds an address in memory)."""
    attributes = dict(vars(error))                          # not the dict of an argument
    for name, value in attributes.items():
        if isinstance(value, type) or (name.startswith("__") and name != "__notes__"):
            raise TypeError(f"the attribute {name} of an exception")
    error.__dict__ = attributes


def widened(values):
    """Numbers in their widest dtype. In a narrow one, a test would round the number that it
    expects: np.float16("inf") == 1e9 is true."""
    import numpy
    kind = values.dtype.kind
    if kind not in WIDE:
        return values
    wide = values.astype(numpy.promote_types(values.dtype, WIDE[kind]))
    return wide if isinstance(values, numpy.ndarray) else wide[()]


# ------------------------------------------------------------------------------------------------
# Values to nodes


def builtin_class(error):
    """The nearest builtin class of an exception."""
    return next(base for base in type(error).__mro__ if base.__module__ == "builtins")


def is_same(node, other):
    """Whether two nodes are the same: 1, 1.0 and True are not."""
    return node == other and json.dumps(node) == json.dumps(other)


class Encoder:
    """Turns values into nodes.

    objects: what the first nodes stand for, such as the arguments of the function that returns.
    iterators: the list where iterators stay, as only their index is sent; if None, their items are.
    """

    def __init__(self, objects=(), iterators=None):
        self.objects = list(objects)
        self.iterators = iterators
        self.numbers = {id(value): number for number, value in enumerate(self.objects)}

    def encode(self, value, old_nodes=()):
        """A value as JSON data: [part, nodes]. Nodes that are as in old_nodes become None."""
        part = self.part(value)
        nodes = []
        for number, value in enumerate(self.objects):           # the list grows meanwhile
            old = old_nodes[number] if number < len(old_nodes) else None
            if old and BY_NAME.get(old[0]) not in MUTABLE and old[0] != "numpy":
                nodes.append(None)                              # it cannot change
            else:
                node = self.node(value)
                nodes.append(None if is_same(node, old) else node)
        return [part, nodes]

    def part(self, value):
        """The value itself, or [number of its node]."""
        kind = type(value)
        if kind in ATOMS and (kind is not int or value.bit_length() <= LONG_INT):
            return value
        if kind not in BASES and self.base(value) in PLAIN:     # such as an IntEnum
            return self.part(PLAIN[self.base(value)](value))
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return [self.numbers[id(value)]]

    def base(self, value):
        """The nearest class of a value that can be sent, or None."""
        kind = type(value)
        if kind in BASES:
            return kind
        for base in kind.__mro__:
            numpy = base.__module__ == "numpy" and base.__name__ in ("ndarray", "generic")
            if base in BASES or numpy:
                return base

    def node(self, value):
        """[name of its type, its parts...]; raises TypeError if the value cannot be sent."""
        base = self.base(value)
        kind = type(value)
        if base is tuple and hasattr(kind, "_fields"):
            return ["namedtuple", kind.__name__, " ".join(kind._fields), *map(self.part, value)]
        if base in MUTABLE or base in IMMUTABLE:
            to_parts = (MUTABLE.get(base) or IMMUTABLE[base])[0]
            return [base.__name__, *map(self.part, to_parts(value))]
        if base is int:
            return ["int", hex(value)]
        if base is not None:                                    # of numpy
            if value.dtype.kind not in NUMPY_KINDS:
                raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
            data = to_text(value.tobytes())
            return ["numpy", base.__name__, value.dtype.str, *data, *value.shape]
        if isinstance(value, BaseException):
            return ["exception", *map(self.part, self.exception_parts(value))]
        if hasattr(kind, "__next__") and self.iterators is None:
            return ["iterator", *map(self.part, value)]         # all its items
        if hasattr(kind, "__next__"):
            self.iterators.append(value)
            return ["iterator", len(self.iterators) - 1]
        name = value.__name__ if kind is type else str(value)[:20]
        if kind in (type, type(...), type(NotImplemented)) and BUILTINS.get(name) is value:
            return ["builtin", name]
        raise TypeError(f"a value of type {kind.__name__} cannot be sent")

    def exception_parts(self, error):
        """The name of its builtin class, its attributes, its cause and its arguments."""
        builtin = builtin_class(error)
        args = builtin.__reduce__(error)[1]                     # of an OSError the file name, too
        if isinstance(error, BaseExceptionGroup):
            args = error.message, tuple(error.exceptions)
        elif type(error).__str__ is not builtin.__str__:
            args = [str(error)]
        return builtin.__name__, vars(error), error.__cause__, *args


def encode(value):
    return Encoder().encode(value)


# ------------------------------------------------------------------------------------------------
# Nodes to values

MISSING = object()


class Decoder:
    """Turns nodes into objects; raises some exception if the nodes are false.

    arguments: what the first nodes stand for; they are changed to what the nodes say.
    make_iterator: for data of a child, which are checked; it makes an iterator whose items stay
    there. None: the data can be trusted.
    """

    def __init__(self, nodes, arguments, make_iterator):
        self.nodes = nodes
        self.arguments = arguments
        self.make_iterator = make_iterator
        self.objects = list(arguments)
        for kind, *parts in nodes[len(arguments):]:
            base = BY_NAME.get(kind)
            self.objects.append(MUTABLE[base][1](*parts) if base in MUTABLE else MISSING)

    def create_missing(self):
        """Create the immutable objects, each as soon as all its parts exist."""
        waiting = [number for number, value in enumerate(self.objects) if value is MISSING]
        while waiting:
            later = []
            for number in reversed(waiting):        # parts mostly have higher numbers
                kind, *parts = self.nodes[number]
                parts = [self.resolve(part) for part in parts]
                if any(part is MISSING for part in parts):
                    later.append(number)
                else:
                    self.objects[number] = self.create(kind, parts)
            if len(later) == len(waiting):
                raise ValueError("an immutable value that contains itself")
            waiting = later

    def create(self, kind, parts):
        if self.make_iterator:
            if kind == "iterator":
                return self.make_iterator(*parts)
            check_parts(kind, parts)
        make = SPECIAL[kind] if kind in SPECIAL else IMMUTABLE[BY_NAME[kind]][1]
        value = make(*parts)
        return widened(value) if self.make_iterator and kind == "numpy" else value

    def resolve(self, part):
        """The object of a part; MISSING if it is yet to be created."""
        if type(part) in ATOMS:
            return part
        [number] = part
        return self.objects[range(len(self.objects))[number]]   # or an IndexError or TypeError

    def fill(self):
        """Give mutable objects their contents, and arguments their new ones."""
        for number, (value, node) in enumerate(zip(self.objects, self.nodes, strict=True)):
            if not node:                                        # an argument that is unchanged
                continue
            kind, *parts = node
            base = BY_NAME.get(kind)
            is_argument = number < len(self.arguments)
            if is_argument:
                self.check_type(value, kind)
            if base in MUTABLE:
                if is_argument:
                    base.clear(value)
                MUTABLE[base][2](value, [self.resolve(part) for part in parts])
            elif is_argument:                                   # an array, which keeps its shape
                value[...] = self.create(kind, parts)

    def check_type(self, argument, kind):
        base = Encoder().base(argument)
        if base is not BY_NAME.get(kind) and (base.__name__, kind) != ("ndarray", "numpy"):
            raise ValueError(f"a {base.__name__} that became a {kind}")


def decode(data, arguments=(), make_iterator=None):
    """The inverse of Encoder.encode -> (value, the objects of its nodes). See Decoder."""
    part, nodes = data
    decoder = Decoder(nodes, arguments, make_iterator)
    decoder.create_missing()
    decoder.fill()
    for value in decoder.objects[len(arguments):]:
        if make_iterator and isinstance(value, BaseException):
            check_attributes(value)
    return decoder.resolve(part), decoder.objects
