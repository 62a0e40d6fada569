"""How good a model is, and a grader that is hard to fool.

Programs that a model wrote are run to see whether they are right, and such programs may do
anything: hang, fill the memory, read files, or return an object that equals everything. So each
check takes two locked-in processes. The *candidate* holds the program and no test; the *tester*
holds the test, calls check(candidate) and sees of the candidate only plain values that came
through a pipe. What the candidate prints, its exit code and late answers count for nothing. A
third, the *worker*, forks them, ends them in time and sees neither programs nor tests. One door
stays ajar: a clock tells which files were read before, so that samples could leave signs for one
another in the system's cache.

On top of that stand benchmarks in the formats of HumanEval, MBPP, EvalPlus, infilling, CRUXEval
and GSM8K, our own ladder for small models, the needle in the code, bits per byte, and pass@k
(report, sections 6 and 7). assets/benchmarks.json holds their addresses, prompts and stops.

This file knows models and benchmarks, not training (pretrain.py) nor where data comes from
(data.py): held-out documents reach it as a file.

    python evaluate.py                              # the newest model in out/; 2 to 3 minutes
    python evaluate.py --benchmark humaneval --model FOLDER --problems HumanEval.jsonl.gz [--chat]
    python evaluate.py --benchmark needle           # a heat map, PNG; 20 seconds
    python evaluate.py score --benchmark humaneval --problems HumanEval.jsonl.gz --samples S.jsonl
                                                    # ... some 350 samples a second on two cores
    python evaluate.py --model FOLDER --text FILE   # bits per byte of any text; seconds
"""

import argparse
import ast
import atexit
import builtins
import bz2
import contextlib
import ctypes
import errno
import functools
import gc
import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import math
import os
import platform
import queue
import random
import re
import resource
import select
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
import traceback
import types
import warnings
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Imports of ours stand inside functions, so that a sandbox worker starts without loading torch.

ASSETS = Path(__file__).resolve().parent / "assets"
TOKENS_AT_ONCE = 16384      # in a forward pass: enough to keep a device busy
MESSAGE_BYTES = 64 << 20    # of an answer by a candidate
OUTPUT_BYTES = 1 << 20      # of what a program prints
MEMORY_BYTES = 1 << 30      # of address space for a program

# ------------------------------------------------------------------------------------------------
# Plain values over a pipe: what a candidate may receive and return

PLAIN = (bool, int, float, str, type(None))


def encode(value):
    """A plain value as JSON data. What JSON lacks is an object with one key: {"tuple": [...]}.

    Subclasses cross as the plain value they hold, read by the base's own method, so that nothing
    they redefine is called. TypeError for what isn't plain; RecursionError for what holds itself.
    """
    kind = type(value)
    if kind is int and value.bit_length() > 1 << 12:
        return {"int": hex(value)}                          # decimal digits take quadratic time
    if kind in PLAIN:
        return value
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    for base in (tuple, set, frozenset):
        if isinstance(value, base):
            return {base.__name__: [encode(item) for item in base.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for base in (bytes, bytearray):
        if isinstance(value, base):
            return {base.__name__: base.decode(value, "latin-1")}
    if isinstance(value, complex):
        return {"complex": [complex.real.__get__(value), complex.imag.__get__(value)]}
    for base, plain in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if isinstance(value, base):
            return encode(plain(value))
    if getattr(value, "ndim", None) == 0:                   # a number of numpy's
        return encode(value.item())
    raise TypeError(f"a value of type {kind.__name__} cannot be sent")


def decode(data):
    """The inverse of encode. It makes plain values only, whatever the data; else ValueError."""
    if type(data) in PLAIN:
        return data
    if type(data) is list:
        return [decode(item) for item in data]
    try:
        [(kind, data)] = data.items()
        if kind in ("bytes", "bytearray"):
            return getattr(builtins, kind)(data.encode("latin-1"))
        if kind == "int":
            return int(data, 16)
        if kind == "complex":
            return complex(*map(float, data))
        return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](
            map(decode, data))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a plain value: {error}") from None


def send(fd, value):
    """Write one message: its length in four bytes, then JSON."""
    data = json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
    data = memoryview(struct.pack("<I", len(data)) + data)
    while data:
        data = data[os.write(fd, data):]


def read_exactly(fd, size):
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(fd, limit=1 << 31):
    """Read one message. EOFError at the end of the pipe, ValueError if it is none."""
    [size] = struct.unpack("<I", read_exactly(fd, 4))
    if size > limit:
        raise ValueError(f"a message of {size:,} bytes")
    return json.loads(read_exactly(fd, size).decode(errors="surrogatepass"))


# ------------------------------------------------------------------------------------------------
# The jail

# What a jailed program may ask of Linux: name, number on x86-64, on aarch64 (- : it has none).
# To everything else the answer is "no such call": processes, signals, sockets, links, limits, ...
CALLS = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, pread64 17 67, readv 19 65, writev 20 66, access 21 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, nanosleep 35 101, getpid 39 172, exit 60 93, uname 63 160,
getcwd 79 17, readlink 89 -, gettimeofday 96 169, getrusage 98 165, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, sigaltstack 131 132, gettid 186 178, time 201 -,
recvmsg 47 212, getdents64 217 61, clock_getres 229 114, exit_group 231 94, newfstatat 262 79,
pselect6 270 72, ppoll 271 73, set_robust_list 273 99, getrandom 318 278, membarrier 324 283,
statx 332 291, rseq 334 293
"""
# Allowed where an argument has none (0) or one (1) of some bits: files are opened for reading
# only, what is started shares the process (a thread), what waits (futex) is private to it, and
# clocks and cores are asked for without the number of another process. Fields: numbers, argument,
# bits, 0 or 1. A pipe's number would tell how many were made before it: there are none.
CHECKED = [(2, None, 1, 0o1103, 0), (257, 56, 2, 0o1103, 0), (56, 220, 0, 0x10000, 1),
           (202, 98, 1, 128, 1), (228, 113, 0, 1 << 31, 0), (230, 115, 0, 1 << 31, 0),
           (204, 123, 0, (1 << 32) - 1, 0)]
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}    # as the kernel numbers them
PRELOADED = """__future__ math cmath re string random itertools functools collections heapq bisect
operator copy datetime decimal fractions statistics typing hashlib dataclasses enum threading
textwrap unicodedata array calendar numbers""".split()          # imported before the doors close


def seccomp_filter(machine):
    """The classic BPF program that answers every system call, packed; None on other machines."""
    if machine not in MACHINES:
        return None
    column, load, equal, test, answer = list(MACHINES).index(machine), 0x20, 0x15, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (answer, 0, 0, kill),
               (load, 0, 0, 0)]                                     # the call's number
    for *numbers, argument, bits, wanted in CHECKED:
        if numbers[column] is not None:
            program += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument),
                        (test, 1 - wanted, wanted, bits), (answer, 0, 0, allow),
                        # "again" to who joins a thread and waits in public: it does ask again
                        (answer, 0, 0, error + (errno.EAGAIN if wanted else errno.EACCES))]
    for call in CALLS.split(","):
        if (number := call.split()[1 + column]) != "-":
            program += [(equal, 0, 1, int(number)), (answer, 0, 0, allow)]
    program.append((answer, 0, 0, error + errno.ENOSYS))
    return b"".join(struct.pack("HBBI", *step) for step in program)


LIBC = ctypes.CDLL(None, use_errno=True)
# prctl's operations, the namespaces of unshare, system calls without a function in libc
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38
KEEP_CAPABILITIES, CAPABILITIES_VERSION, ADMINISTRATION = 8, 0x20080522, 1 << 21
NEW_USER, NEW_PROCESSES = 0x10000000, 0x20000000
NEW_OTHERS = 0x40000000 | 0x08000000 | 0x04000000 | 0x00020000  # network, IPC, host name, mounts
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_ENTER = 444, 445, 446
NOBODY = 2_000_000_000       # from here on users have no files


def system(name, *args):
    """Call a function of libc; OSError if it returns -1."""
    args = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    if (result := getattr(LIBC, name)(*args)) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces():
    """Network, IPC, host name, mounts and, for its children, process numbers of its own."""
    user, group = os.getuid(), os.getgid()
    system("unshare", NEW_OTHERS | NEW_PROCESSES | (NEW_USER if user else 0))   # root may without
    if user:
        with contextlib.suppress(OSError):  # an unmapped user cannot mount; the rest holds
            for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                               ("gid_map", f"{group} {group} 1")):
                Path("/proc/self", file).write_text(line)


def set_capabilities(bits):
    """Of root's powers, keep these only."""
    system("capset", struct.pack("Ii", CAPABILITIES_VERSION, 0),
           struct.pack("6I", bits, bits, 0, 0, 0, 0))


def enter_mounts(readable):
    """An empty file system that holds what is readable. Its root is mounted over /proc."""
    bind, recursive, private, plain, fixed = 4096, 16384, 1 << 18, 2 | 4, 32 | 1
    system("mount", None, b"/", None, recursive | private, None)
    system("mount", b"tmpfs", b"/proc", b"tmpfs", plain, None)
    for path in readable:
        target = Path("/proc" + path)
        if Path(path).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        system("mount", path.encode(), str(target).encode(), None, bind | recursive, None)
        with contextlib.suppress(OSError):      # read-only, so that reading leaves no time behind
            system("mount", None, str(target).encode(), None, bind | fixed | plain, None)
    os.chroot("/proc")
    os.chdir("/")


def enter_landlock(readable):
    """From here on files are opened for reading only, and only below the readable paths."""
    version = system("syscall", LANDLOCK_CREATE, None, 0, 1)
    access = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1      # all the rights it knows
    ruleset = system("syscall", LANDLOCK_CREATE, struct.pack("Q", access), 8, 0)
    for path in readable:
        file = os.open(path, os.O_PATH)
        read = 1 << 2 | (1 << 3 if os.path.isdir(path) else 0)      # a file, and list a folder
        system("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", read, file), 0)
        os.close(file)
    system("syscall", LANDLOCK_ENTER, ruleset, 0)
    os.close(ruleset)


def jail(readable, without):
    """Lock this process in, with all that it forks -> the names of the layers that hold.

    Root becomes a user without rights. With namespaces this returns in a child, process 1 of its
    own numbering; the parent waits for it and ends.
    """
    layers = ["rlimits"]
    for name, enter in (("no-new-privileges",
                         lambda: system("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)),
                        ("namespaces", enter_namespaces),
                        ("mounts", lambda: enter_mounts(readable)),
                        ("Landlock", lambda: enter_landlock(readable))):
        if name not in without and (name != "mounts" or "namespaces" in layers):
            with contextlib.suppress(OSError, AttributeError):      # not on this system
                enter()
                layers.append(name)
    if os.getuid() == 0:
        if "namespaces" in layers:
            system("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
        for user in (NOBODY + os.getpid(), 65534):      # of its own: a limit counts by user
            with contextlib.suppress(OSError):                  # not known to this container
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                break
    if "namespaces" in layers:
        set_capabilities(ADMINISTRATION)                        # to number its children anew
        if os.fork():               # only a child stands in the new numbering, as its process 1
            os.close(0)
            os.close(1)
            os.wait()
            os._exit(0)
        system("prctl", PDEATHSIG, 9, 0, 0, 0)                      # die with the parent
    if "no-new-privileges" in layers:
        system("prctl", DUMPABLE, 0, 0, 0, 0)                       # nobody reads its memory
    return layers


def set_limits(seconds, threads):
    """Set the rlimits of one program."""
    limits = {"CORE": 0, "FSIZE": 0, "NOFILE": 64, "AS": MEMORY_BYTES, "CPU": int(seconds) + 2,
              "NPROC": 512 if threads else 0}
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):      # macOS lacks some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


# ------------------------------------------------------------------------------------------------
# Who does what. The tester reads the jobs, programs and tests, and judges. For each it asks the
# worker for a candidate, a process that gets the program alone, and talks to it over two pipes. The
# worker forks and kills in time; it sees neither programs nor tests nor verdicts, so that none of
# its forks can find in its memory what was given to an earlier one.


def failure(error):
    """(what it is, the builtin exception it derives from, its message) of an exception."""
    builtin = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
    message = ""
    with contextlib.suppress(BaseException):
        message = str(error.args[0] if isinstance(error, KeyError) else error)[:200]
    reason = {"MemoryError": "memory"}.get(builtin, "exception")
    return [f"{reason}: {type(error).__name__}: {message}".removesuffix(": "), builtin, message]


def load_program(program):
    """Run a program as a module of its own -> its names. What stands under __main__ is not run."""
    module = types.ModuleType("completion")
    sys.modules["completion"] = module                              # dataclasses look it up
    exec(compile(program, "completion.py", "exec"), module.__dict__)
    return module.__dict__


def candidate(requests, replies):
    """Load a program and answer each request [args, kwargs] with what its function returns."""
    try:
        program, entry_point = receive(requests)
        function = load_program(program).get(entry_point)
        if not callable(function):
            return send(replies, [f"no entry point: {entry_point} is not defined", "", ""])
    except BaseException as error:
        reason, *rest = failure(error)
        syntax = isinstance(error, SyntaxError) and f"syntax: line {error.lineno}: {error.msg}"
        return send(replies, [syntax or reason, *rest])
    send(replies, {"value": None, "after": None, "error": None})
    while request := receive(requests):
        (args, kwargs), value, error = decode(request), None, None
        try:
            value = function(*args, **kwargs)
        except BaseException as raised:
            error = failure(raised)
        try:
            after = encode([args, kwargs])
            reply = {"value": encode(value), "after": None if after == request else after,
                     "error": error}
        except (TypeError, RecursionError) as refused:
            reply = error or [f"protocol: {refused}", "TypeError", str(refused)]
        send(replies, reply)


ENDINGS = (StopIteration, StopAsyncIteration)       # would end a loop of the test's instead


def become(old, new):
    """Give old, an argument, the contents that it has in the candidate -> it, or new."""
    if isinstance(old, list) and isinstance(new, list):
        old[:] = [*map(become, old, new), *new[len(old):]]
    elif isinstance(old, dict) and isinstance(new, dict):
        items = {key: become(old.get(key), item) for key, item in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set) and isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    else:
        return new
    return old


class Lost(BaseException):
    """There is no candidate any more. Not an Exception, so that no test catches it."""


class Proxy:
    """Stands for the candidate's function in the tester. fault: why the check has failed."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies
        self.fault, self.raised, self.reason, self.calls = None, None, None, 0

    def lost(self, reason):
        self.fault = self.fault or reason
        raise Lost

    def ask(self, message):
        try:
            send(self.requests, message)
        except OSError:
            self.lost("killed")

    def reply(self):
        """Its answer -> (None or a failure, the value, None or the arguments as they are now)."""
        try:
            reply = receive(self.replies, MESSAGE_BYTES)
            if type(reply) is list:
                reply = {"value": None, "after": None, "error": reply}
            if error := reply["error"]:
                reason, builtin, message = (str(part)[:300] for part in error)
                error = reason, builtin, message
            return error, decode(reply["value"]), reply["after"] and decode(reply["after"])
        except EOFError:
            self.lost("killed")
        except MemoryError:
            self.lost("memory: too large an answer")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            self.lost(f"protocol: not an answer ({error})")

    def start(self, program, entry_point):
        """Hand the program over; raises Lost if it cannot be loaded."""
        self.ask([program, entry_point])
        if error := self.reply()[0]:
            self.lost(error[0])

    def __call__(self, *args, **kwargs):
        request = encode([args, kwargs])
        if self.fault or select.select([self.replies], [], [], 0)[0]:
            self.lost("protocol: an answer before it was asked")
        self.calls += 1
        self.ask(request)
        error, value, after = self.reply()
        if after:                               # it changed what it was given: so do we
            for old, new in zip((*args, *kwargs.values()), (*after[0], *after[1].values())):
                become(old, new)
        if error:
            self.reason, name, message = error
            kind, self.raised = getattr(builtins, name, None), Exception(message)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind not in ENDINGS:
                for base in kind.__mro__:       # the nearest that takes a message and no more
                    with contextlib.suppress(TypeError):
                        self.raised = base(message)
                        break
            raise self.raised
        return value


def judge(names, job, function):
    """Run the test's check(function), beside names -> {"passed", "reason"}."""
    test = job["test"]
    try:
        exec(compile(test, "<test>", "exec"), names)
        check = names["check"]
        names[job["entry_point"]] = function                    # a test may call it by name
        check(function)
        return {"passed": True, "reason": "passed"}
    except Exception as error:
        if error is getattr(function, "raised", None):
            return {"passed": False, "reason": function.reason}
        if isinstance(error, MemoryError):
            return {"passed": False, "reason": "memory: in the test"}
        lines = [0] + [line for frame, line in traceback.walk_tb(error.__traceback__)
                       if frame.f_code.co_filename == "<test>"]
        what = "" if isinstance(error, AssertionError) else failure(error)[0] + " in "
        where = str(error) if str(error) and not what else test.split("\n")[lines[-1] - 1].strip()
        return {"passed": False, "reason": f"wrong answer: {what}{where[:200]}"}


def own_names(job):
    """What a test finds: DATA, the names of the problem's own program, its solution."""
    names = {}
    with contextlib.suppress(Exception):                        # a prompt alone may be no program
        names = load_program(job["helpers"])
    return {**names, "DATA": decode(job["data"]), "REFERENCE": names.get(job["entry_point"])}


def inside(requests, replies):
    """Program and test in one process, for values that cannot cross: it may forge its verdict."""
    job = receive(requests)
    try:
        own, names = own_names(job), load_program(job["program"])
        result = judge({**own, **names}, job, names[job["entry_point"]])
    except BaseException as error:
        result = {"passed": False, "reason": failure(error)[0]}
    send(replies, result)


def script(*_):
    """Run a program as a script. Before its standard input comes the program itself."""
    program, module = receive(0), types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except SystemExit as end:
        if end.code:
            raise
    finally:                                                    # what Python does at its end
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            with contextlib.suppress(AttributeError, ValueError):       # None, or closed
                stream.flush()


KINDS = {b"c": candidate, b"i": inside, b"s": script}       # what a tester asks a worker to fork


class Tester:
    """Does job after job. Of a candidate it sees plain values only, so none can spoil it.

    control: a socket to the worker.
    """

    def __init__(self, control):
        self.control = control

    def serve(self, jobs, results):
        """Read jobs and write results until there are no more."""
        with contextlib.suppress(EOFError):
            while job := receive(jobs):
                random.seed()                                   # no candidate knows its numbers
                send(results, getattr(self, job["kind"])(job))  # check, inside or program
                job = None
                gc.collect()                                    # what the test's frames still hold

    def borrow(self, kind, seconds):
        """A new process of this kind -> where to write to it, where to read from it."""
        os.write(self.control.fileno(), struct.pack("<cd", kind, seconds))
        return socket.recv_fds(self.control, 1, 2)[1]

    def give_back(self, *fds, wait=False):
        """End a borrowed process, or wait for its own end -> its status, whether it was late."""
        for fd in fds:
            os.close(fd)
        os.write(self.control.fileno(), b"w" if wait else b"k")
        return struct.unpack("<i?", read_exactly(self.control.fileno(), 5))

    def verdict(self, result, status, late):
        if result["reason"] == "killed":
            result["reason"] += f": signal {-status}" if status < 0 else f": it ended with {status}"
        return {"passed": False, "reason": "timeout"} if late else result

    def check(self, job):
        """Let a test judge a candidate."""
        proxy = Proxy(*self.borrow(b"c", job["timeout"]))
        try:
            proxy.start(job["program"], job["entry_point"])
            result = judge(own_names(job), job, proxy)
            if result["passed"] and not proxy.calls:
                proxy.lost("protocol: the test never calls the function")
        except Lost:
            pass
        if proxy.fault:
            result = {"passed": False, "reason": proxy.fault}
        return self.verdict(result, *self.give_back(proxy.requests, proxy.replies))

    def inside(self, job):
        """Let one process be program and test."""
        requests, replies = self.borrow(b"i", job["timeout"])
        try:
            send(requests, job)
            said = receive(replies, OUTPUT_BYTES)
            result = {"passed": said["passed"] is True, "reason": str(said["reason"])[:300]}
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            result = {"passed": False, "reason": "killed"}
        return self.verdict(result, *self.give_back(requests, replies))

    def program(self, job):
        """Run a script with the given standard input."""
        requests, replies = self.borrow(b"s", job["timeout"])
        data, stdin = bytearray(), memoryview(job["stdin"].encode(errors="replace"))
        with contextlib.suppress(OSError):
            send(requests, job["program"])
        open_ends = [requests]
        while len(data) <= OUTPUT_BYTES:
            if not stdin and open_ends:
                os.close(open_ends.pop())
            read, write, _ = select.select([replies], open_ends, [])
            if write:
                try:
                    stdin = stdin[os.write(requests, stdin[:4096]):]    # as much as never blocks
                except OSError:
                    stdin = b""                                 # it reads no more
            if read:
                data += (part := os.read(replies, 1 << 16))
                if not part:
                    break
        status, late = self.give_back(replies, *open_ends, wait=len(data) <= OUTPUT_BYTES)
        status = {0: "ok", 1: "exception", 3: "memory"}.get(
            status, f"killed: signal {-status}" if status < 0 else f"exception: status {status}")
        if len(data) > OUTPUT_BYTES:
            status = "killed: it prints too much"
        return {"output": data[:OUTPUT_BYTES].decode(errors="replace"),
                "reason": "timeout" if late else status}


class Worker:
    """The process behind a Sandbox: forks what its tester asks for."""

    def __init__(self, readable, packages, without):
        for name in PRELOADED:
            importlib.import_module(name)
        sys.path += packages
        sys.set_int_max_str_digits(0)
        builtins.exit = builtins.quit = sys.exit                # which -S leaves out
        self.jobs, self.results = os.dup(0), os.dup(1)
        self.null, self.filter = os.open(os.devnull, os.O_RDWR), None
        self.layers, self.tester, self.myself = jail(readable, without), None, None
        if "namespaces" in self.layers:
            with contextlib.suppress(OSError, AttributeError):      # an old kernel
                self.myself = os.pidfd_open(os.getpid())
        gc.collect()
        gc.freeze()                                             # so that forks copy less
        if "seccomp" not in without and "no-new-privileges" in self.layers:
            steps = seccomp_filter(platform.machine()) or b""
            self.steps = ctypes.create_string_buffer(steps)
            self.filter = struct.pack("HP", len(steps) // 8, ctypes.addressof(self.steps))
            if not steps or os.waitpid(self.fork(lambda: None, 1), 0)[1]:           # a trial
                self.filter = None
            self.layers += ["seccomp"] if self.filter else []
        send(self.results, self.layers)

    def number_anew(self):
        """Let the next child be process 1 of its own: its number would tell what came before."""
        try:
            system("setns", self.myself, NEW_PROCESSES)
            system("unshare", NEW_PROCESSES)
        except OSError:
            self.myself = None

    def fork(self, body, seconds, *keep, stdin=None, stdout=None):
        """Start a jailed process that keeps these descriptors, runs body() and ends -> its id."""
        if self.myself is not None:
            self.number_anew()
        if pid := os.fork():
            return pid
        self.tester, status = None, 1
        try:
            os.setsid()
            with contextlib.suppress(AttributeError):           # not on Linux
                system("prctl", PDEATHSIG, 9, 0, 0, 0)
                set_capabilities(0)
            for target, fd in enumerate((stdin, stdout, None)):
                os.dup2(self.null if fd is None else fd, target)
            for low, high in itertools.pairwise((2, *sorted(keep), 1 << 16)):
                os.closerange(low + 1, high)
            set_limits(seconds, threads=self.filter)
            if self.filter:
                system("prctl", SECCOMP, 2, self.filter, 0, 0)
            body()
            status = 0
        except MemoryError:
            status = 3
        finally:
            os._exit(status)

    def end(self, pid, ended=(0, 0)):
        """Kill a process, unless it has ended, and its group -> how it had ended."""
        with contextlib.suppress(OSError):
            if not ended[0]:
                os.kill(pid, 9)
            os.killpg(pid, 9)
        return os.waitstatus_to_exitcode((ended if ended[0] else os.waitpid(pid, 0))[1])

    def word(self, control, deadline):
        """The next byte that a tester says; none if it dies or says none in time."""
        left = deadline - time.monotonic()
        return control.recv(1) if left > 0 and select.select([control], [], [], left)[0] else b""

    def lend(self, kind, control, deadline):
        """Fork a process for a tester, until that is done with it or it is time -> what the tester
        said, how the process ended."""
        requests, replies = os.pipe(), os.pipe()
        ends = requests[0], replies[1]
        streams = {"stdin": ends[0], "stdout": ends[1]} if kind == b"s" else {}
        pid = self.fork(lambda: KINDS[kind](*ends), deadline - time.monotonic(),
                        *(() if streams else ends), **streams)
        socket.send_fds(control, [b"f"], [requests[1], replies[0]])
        for fd in (*requests, *replies):
            os.close(fd)
        word, ended = self.word(control, deadline), (0, 0)
        while word == b"w" and time.monotonic() < deadline and not ended[0]:
            ended = os.waitpid(pid, os.WNOHANG)         # it has closed its output before its end
            time.sleep(0 if ended[0] else 0.001)
        return word, self.end(pid, ended)

    def serve(self):
        """Lend processes to testers until there are no more jobs."""
        while True:
            control, theirs = socket.socketpair()
            with control, theirs:
                self.tester = self.fork(lambda: Tester(theirs).serve(self.jobs, self.results),
                                        1 << 20, theirs.fileno(), self.jobs, self.results)
                theirs.close()
                while request := control.recv(9):
                    kind, seconds = struct.unpack("<cd", request)
                    deadline = time.monotonic() + seconds
                    word, status = self.lend(kind, control, deadline)
                    late = time.monotonic() >= deadline
                    if not word:                                # it sees that its candidate is gone
                        word = self.word(control, time.monotonic() + 0.2)
                    if not word:
                        break
                    control.send(struct.pack("<i?", status, late))
                    status = late = word = None                 # for the next fork not to see
                self.end(self.tester)
            if not request:
                return
            send(self.results, {"passed": False,
                                "reason": "timeout" if late else "killed: the test itself"})


# ------------------------------------------------------------------------------------------------
# Grading


# passed, why not ("wrong answer: ...", "timeout", ...), and whether by the weaker way (inside)
Grade = namedtuple("Grade", "passed reason weak", defaults=[False])
REQUIRED = {"rlimits", "no-new-privileges", "seccomp"}


class Sandbox:
    """A worker process that grades and runs programs, one at a time. Close it at the end.

    weak: go on where the system offers too little; else InputError. without: names of layers to
    leave out, to see what they are for.
    """

    def __init__(self, weak=False, without=()):
        paths = sysconfig.get_paths()
        packages = sorted({paths["purelib"], paths["platlib"]})
        readable = {paths["stdlib"], paths["platstdlib"], *packages,
                    sysconfig.get_config_var("LIBDIR"), "/lib", "/lib64", "/usr/lib", "/usr/lib64",
                    "/etc/ld.so.cache", "/usr/share/zoneinfo"}
        self.options = {"packages": packages, "without": list(without), "readable": sorted(
            path for path in readable if path and os.access(path, os.R_OK))}
        self.crosses = {}
        self.start()
        layers = set(self.layers)
        if not weak and not (REQUIRED <= layers and {"mounts", "Landlock"} & layers):
            from tokenizer import InputError
            self.close()
            raise InputError("this system offers too little to lock programs in ("
                             f"{', '.join(self.layers)}); --weak-sandbox runs them all the same")

    def start(self):
        """Start the worker, as a bare Python that has neither our modules nor our environment."""
        folder = str(Path(__file__).resolve().parent)
        code = (f"import sys; sys.path.insert(0, {folder!r}); import evaluate; del sys.path[0]; "
                "evaluate.Worker(**evaluate.json.loads(sys.argv[1])).serve()")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", code, json.dumps(self.options)],
            env={"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}, cwd="/", bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.layers = self.answer(60)
        if self.layers is None:
            self.close()
            raise OSError(f"{sys.executable} -I -S cannot be started as a sandbox")

    def answer(self, seconds):
        """The worker's next message, or None."""
        with contextlib.suppress(OSError, EOFError):
            if select.select([self.process.stdout], [], [], seconds)[0]:
                return receive(self.process.stdout.fileno())

    def ask(self, job):
        """Let a worker do a job. One that gives no answer is replaced, and its job tried again."""
        for _ in range(2):
            with contextlib.suppress(OSError):
                send(self.process.stdin.fileno(), job)
                if (result := self.answer(job["timeout"] + 30)) is not None:
                    return result
            self.close()
            self.start()
        return {"passed": False, "reason": "killed: the sandbox had to be started anew"}

    def check(self, program, entry_point, helpers, test, timeout, inside=False, data=None):
        """Load a program and let a test check its entry point -> passed, reason.

        helpers: a program whose names the test may use; data: what it finds as DATA, encoded.
        """
        return self.ask({"kind": "inside" if inside else "check", "program": program,
                         "entry_point": entry_point, "helpers": helpers, "test": test,
                         "data": data, "timeout": timeout})

    def grade(self, problem, completion, timeout=3.0):
        """Grade one completion of a problem -> Grade."""
        return self.grade_program(problem, assemble(problem, completion), timeout)

    def grade_program(self, problem, program, timeout=3.0):
        """Grade a whole program as the answer to a problem -> Grade.

        A problem whose own solution fails this way, because its values cannot cross a pipe, is
        graded in one process with its test. Only the problem decides that, never the program.
        """
        own = assemble(problem, problem.get("canonical_solution") or "    pass\n")
        rest = problem["entry_point"], own, problem["test"], timeout
        data = encode(problem.get("inputs"))
        result = self.check(program, *rest, data=data)
        if not result["passed"] and problem.get("canonical_solution"):
            key = problem["prompt"], problem["test"]
            if key not in self.crosses:                         # a busy machine is no reason
                reason = self.check(own, *rest, data=data)["reason"]
                self.crosses[key] = reason.split(":")[0] in (
                    "passed", "timeout", "killed", "memory")
            if not self.crosses[key]:
                return Grade(**self.check(program, *rest, inside=True, data=data), weak=True)
        return Grade(**result)

    def run(self, source, stdin="", timeout=3.0):
        """Run a script -> (what it printed, "ok" or what went wrong)."""
        result = self.ask({"kind": "program", "program": source, "stdin": stdin,
                           "timeout": timeout})
        return result.get("output", ""), result["reason"]

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(1)                                # it may be at work
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def assemble(problem, completion):
    """The program that a completion makes: what stands before it, it, and what stands after."""
    return problem["prompt"] + completion + problem.get("suffix", "")


def cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def grades(pairs, workers=None, timeout=3.0, weak=False):
    """Yield the Grade of each (problem, whole program), in order; one sandbox per core."""
    pairs, boxes = list(pairs), queue.SimpleQueue()
    workers = workers or cores()
    with contextlib.ExitStack() as stack:
        for _ in range(max(1, min(workers, len(pairs)))):
            boxes.put(stack.enter_context(contextlib.closing(Sandbox(weak))))

        def grade_one(pair):
            box = boxes.get()
            try:
                return box.grade_program(*pair, timeout)
            finally:
                boxes.put(box)

        with ThreadPoolExecutor(workers) as threads:
            try:
                yield from threads.map(grade_one, pairs)
            finally:
                threads.shutdown(cancel_futures=True)


def grade_all(pairs, workers=None, timeout=3.0, weak=False):
    """The Grade of each (problem, completion), in order. InputError: no way to lock them in."""
    pairs = [(problem, assemble(problem, completion)) for problem, completion in pairs]
    return list(grades(pairs, workers, timeout, weak))


def grade(problem, completion, timeout=3.0, weak=False):
    """Grade one completion: problem has prompt, entry_point and test, as in HumanEval.

    Starting a sandbox takes most of its time: use grade_all for more than one.
    """
    return grade_all([(problem, completion)], 1, timeout, weak)[0]


def run_program(source, stdin="", timeout=3.0, weak=False):
    """Run a script in a sandbox -> (what it printed, "ok" or what went wrong)."""
    with contextlib.closing(Sandbox(weak)) as box:
        return box.run(source, stdin, timeout)


# ------------------------------------------------------------------------------------------------
# Problem files

# How EvalPlus compares; the names are those of functions with several right answers
EVALPLUS_TEST = '''
import copy
import math

SETS = ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
        "larg_nnum", "intersection_array", "find_dissimilar", "Diff"]


def floats(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and len(value) > 0
                                        and all(isinstance(item, float) for item in value))


def close(value, expected, tolerance):
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(
            close(*pair, tolerance) for pair in zip(value, expected))
    return value == expected or abs(value - expected) <= tolerance + 1e-7 * abs(expected) < math.inf


def right(value, expected, inputs, tolerance):
    if NAME == "find_zero":
        return abs(sum(c * math.pow(value, i) for i, c in enumerate(inputs[0]))) <= tolerance
    if NAME == "are_equivalent" or NAME == "sum_div" and value == 0:
        return True
    if NAME == "surface_Area":
        edge, height = inputs
        other = round(edge ** 2 + 2 * edge * math.sqrt(edge ** 2 / 4 + height ** 2))
        return value == expected or abs(value - other) <= tolerance
    if NAME == "digit_distance_nums":
        first, second = (str(number).zfill(40) for number in inputs)
        other = sum(abs(int(a) - int(b)) for a, b in zip(first, second))
        return value in (expected, other)
    if NAME in SETS:
        return set(value) == set(expected)
    if NAME in ("check_str", "text_match_three", "text_starta_endb"):
        found = value if isinstance(value, bool) else value is not None
        return found == (expected is not None)
    if tolerance == 0 and floats(expected):
        tolerance = 1e-6
    if value == expected or tolerance == 0:
        return value == expected
    return type(value) == type(expected) and close(value, expected, tolerance)


def check(candidate):
    for inputs in DATA:
        expected = REFERENCE(*copy.deepcopy(inputs))
        value = candidate(*copy.deepcopy(inputs))
        assert right(value, expected, inputs, TOLERANCE), f"{NAME}{tuple(inputs)}"[:200]
'''


def deep_tuple(value):
    return tuple(map(deep_tuple, value)) if isinstance(value, list) else value


# The arguments of MBPP+ that JSON could not hold, by the number of the task
MBPP_ARGUMENTS = [
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     lambda *args: [tuple(item) for item in args]),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
     lambda *args: [[tuple(item) for item in part] for part in args]),
    ("75 413 444 753", lambda first, *rest: [[tuple(item) for item in first], *rest]),
    ("250 307 405 446 617 720 763 808", lambda first, *rest: [tuple(first), *rest]),
    ("106 750", lambda first, second: [first, tuple(second)]),
    ("278", lambda first: [tuple(tuple(item) if isinstance(item, list) else item
                                 for item in first)]),
    ("259 401 445 580 615 791", lambda *args: list(map(deep_tuple, args))),
    ("115", lambda first: [[set(item) if isinstance(item, list) and item else {}
                            for item in first]]),
    ("124", lambda first, second: [float(first), complex(second)]),
    ("252", lambda first: [complex(first)]),
    ("722", lambda first, *rest: [{key: tuple(value) for key, value in first.items()}, *rest])]


def mbpp_arguments(task, inputs):
    """The arguments of the calls of a task of MBPP+ as its solution expects them."""
    convert = next((convert for tasks, convert in MBPP_ARGUMENTS if task in tasks.split()),
                   lambda *args: list(args))
    return [convert(*args) for args in inputs]


def called_name(code, test):
    """The function of a program that a test calls first."""
    with warnings.catch_warnings(action="ignore"):          # old programs have odd escapes
        code, test = ast.parse(code), ast.parse(test)
    defined = {node.name for node in ast.walk(code)
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return next(node.func.id for node in ast.walk(test) if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name) and node.func.id in defined)


def evalplus_problem(row, name):
    """HumanEval+ and MBPP+: our solution is compared with the problem's own on many inputs."""
    inputs = row["base_input"] + (list(row["plus_input"]) if name.endswith("+") else [])
    if row["task_id"].startswith("Mbpp"):
        inputs = mbpp_arguments(row["task_id"].split("/")[-1], inputs)
    settings = f"NAME, TOLERANCE = {row['entry_point']!r}, {row['atol']!r}\n"
    return {**{key: row[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
            "inputs": inputs, "test": settings + EVALPLUS_TEST}


def mbpp_problem(row):
    tests = textwrap.indent("\n".join(row["test_list"]), "    ")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    text = row.get("text") or row["prompt"]
    return {"task_id": f"MBPP/{row['task_id']}", "canonical_solution": row["code"] + "\n",
            "prompt": f'"""\n{text}\n{row["test_list"][0]}\n"""\n',
            "entry_point": called_name(row["code"], "\n".join(row["test_list"])),
            "test": f"{setup}\ndef check(candidate):\n{tests}\n"}


def cruxeval_problem(row, name):
    """The arguments or the value of a call of f; f itself is the test's."""
    problem = {**row, "task_id": row["id"], "entry_point": "answer"}
    code, answer = f"{row['code']}\n\n\n", "def answer():\n    return "
    if name.startswith("cruxeval-input"):
        return {**problem, "canonical_solution": f"f({row['input']})",
                "prompt": f"{code}def f(*args, **kwargs):\n    return args, kwargs\n\n\n{answer}",
                "test": f"{code}def check(candidate):\n    args, kwargs = candidate()\n"
                        f"    assert f(*args, **kwargs) == {row['output']}\n"}
    return {**problem, "canonical_solution": row["output"], "prompt": answer,
            "test": f"{code}def check(candidate):\n    assert candidate() == f({row['input']})\n"}


def to_problem(row, name="", number=0):
    """One row of a benchmark file, told apart by its fields, as a problem; None: not a benchmark.

    A problem: task_id, what its prompt needs, and how it is graded: entry_point and test with
    check(candidate), for a program; line, for one line; answer, for a number. It may have
    canonical_solution, suffix (infilling), inputs (EvalPlus: name+ takes all, name the base ones)
    and group (scored apart). number: of the row.
    """
    if {"language", "prompt", "tests"} <= set(row) and "suffix" not in row:
        from tokenizer import InputError
        raise InputError("this is a MultiPL-E file; only Python programs can be graded so far")
    if "base_input" in row:
        return evalplus_problem(row, name)
    if {"prompt", "entry_point", "test"} <= set(row):
        level = re.match(r"ladder/(\d)", row["task_id"])
        return {**row, "group": f"level {level[1]}"} if level else row
    if {"code", "test_list"} <= set(row):
        return mbpp_problem(row)
    if {"code", "input", "output"} <= set(row):
        return cruxeval_problem(row, name)
    if {"question", "answer"} <= set(row):                  # GSM8K
        return {"task_id": f"gsm8k/{number}", "question": row["question"],
                "answer": float(final_number(row["answer"].split("####")[-1])),
                "canonical_solution": row["answer"]}
    if {"prompt", "suffix", "canonical_solution", "language"} <= set(row):      # HumanEval-FIM
        return {**row, "task_id": f"{row['language']}/{number}", "group": row["language"],
                "line": row["canonical_solution"]}
    return None


def read_rows(path):
    """The rows of a .jsonl or .json file, also compressed; InputError names file and line."""
    from tokenizer import InputError
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path}: cut off, or no text") from None
    rows, number = [], 1
    try:
        lines = json.loads(text) if text.startswith("[") else text.split("\n")
        for number, line in enumerate(lines, 1):
            if not isinstance(line, str) or line.strip():
                rows.append((number, {**(json.loads(line) if isinstance(line, str) else line)}))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}, line {number}: not a JSON object") from None
    return rows


# ------------------------------------------------------------------------------------------------
# Answers that are no programs


def first_line(text):
    """The line that is scored where one line was asked for (the report's HumanEval-FIM script)."""
    lines = text.split("\n")
    return lines[1 if text.startswith(("\n", " \n")) else 0].strip()


def final_number(text):
    r"""The number after the last \boxed or "answer is", else the last one; None without any."""
    number = r"(?:(?<!\d)-)?\d+(?:\.\d+)?"
    text = text.split("\nQuestion:")[0].replace(",", "")
    for mark in ("\\boxed", "answer is"):
        if mark in text and (found := re.search(number, text.rpartition(mark)[2])):
            return float(found[0])
    numbers = re.findall(number, text)
    return float(numbers[-1]) if numbers else None


def compare(problem, completion):
    """Grade an answer that is no program: a line or a number."""
    right = (first_line(completion) == problem["line"].strip() if "line" in problem
             else final_number(completion) == problem["answer"])
    return Grade(right, "passed" if right else "wrong answer")


# ------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n, c, k):
    """The chance that one of k of n samples passes when c do, unbiased (arXiv 2107.03374, 2.1).
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right")
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def bootstrap(values, rounds=1000):
    """The 95 % interval of the mean, over problems drawn again with replacement."""
    draw, n = random.Random(0), len(values)
    means = sorted(sum(draw.choices(values, k=n)) / n for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]


def edit_similarity(text, target):
    """100 x 2 M / T: M characters in the longest common subsequence, T in both (InDel ratio)."""
    if not text and not target:
        return 100.0
    row = [0] * (len(target) + 1)
    for a in text:
        last, row = row, [0]
        for j, b in enumerate(target):
            row.append(last[j] + 1 if a == b else max(last[j + 1], row[j]))
    return 200.0 * row[-1] / (len(text) + len(target))


def compressed_bits_per_byte(texts):
    """name -> bits per byte of the concatenated texts under gzip, bz2 and xz at their best."""
    data = "".join(texts).encode()
    sizes = {"gzip": len(gzip.compress(data, 9)), "bz2": len(bz2.compress(data, 9)),
             "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def heldout_rows(model, tokenizer, documents, T):
    """Batches of (input_ids, targets): each document after one <|endoftext|>, in rows of T."""
    import torch

    from tokenizer import ENDOFTEXT

    end, rows, B = tokenizer.special[ENDOFTEXT], [], max(1, TOKENS_AT_ONCE // T)
    for ids in tokenizer.encode_batch([document["text"] for document in documents]):
        ids = [end, *ids, end]
        rows += [ids[start:start + T + 1] for start in range(0, len(ids) - 1, T)]
    rows.sort(key=len)                                      # short ones share a batch
    for batch in (rows[start:start + B] for start in range(0, len(rows), B)):
        longest, device = max(map(len, batch)), model.head.device
        yield (torch.tensor([row[:-1] + [end] * (longest - len(row)) for row in batch],
                            device=device),
               torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in batch],
                            device=device))


def bits_per_byte(model, tokenizer, documents):
    """Bits over all tokens of all documents, their <|endoftext|> included, per UTF-8 byte.

    Each document is preceded by one <|endoftext|> and cut into rows of T tokens, T being the
    context the model was trained on: no token sees beyond its row.
    """
    import torch

    with torch.no_grad():
        nats = sum(float(model(input_ids, targets=targets)) for input_ids, targets in heldout_rows(
            model, tokenizer, documents, model.config.max_position_embeddings))
    return nats / math.log(2) / sum(len(document["text"].encode()) for document in documents)


def bits_by_position(model, tokenizer, documents, T, parts):
    """Bits per byte of the tokens in each of so many equal parts of rows of T tokens."""
    import torch

    size = torch.tensor(tokenizer.byte_lengths(), device=model.head.device)
    nats, length = torch.zeros(parts), torch.zeros(parts)
    with torch.no_grad():
        for input_ids, targets in heldout_rows(model, tokenizer, documents, T):
            costs = -model(input_ids, targets=targets, reduce="none")               # (B, T)
            sizes = torch.where(targets == -100, 0, size[targets.clamp(min=0)])     # (B, T)
            part = torch.arange(targets.shape[1]) * parts // T                      # (T,)
            nats.index_add_(0, part, costs.sum(0).float().cpu())
            length.index_add_(0, part, sizes.sum(0).float().cpu())
    return (nats / math.log(2) / length).tolist()


def batches_of(rows, more=0):
    """The numbers of rows of ids in batches: those of like length share one. more: ids to come."""
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not batches or (len(batches[-1]) + 1) * (len(rows[i]) + more) > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(i)
    return batches


def answer_bits(model, prompts, answers):
    """The bits that each answer costs after its prompt; all are lists of ids."""
    import torch

    rows, nats = [prompt + answer for prompt, answer in zip(prompts, answers)], {}
    with torch.no_grad():
        for batch in batches_of(rows):
            longest = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in batch],
                               device=model.head.device)                            # (B, T + 1)
            targets = torch.full_like(ids[:, 1:], -100)                             # (B, T)
            for row, i in enumerate(batch):
                inside = slice(len(prompts[i]) - 1, len(rows[i]) - 1)
                targets[row, inside] = ids[row, 1:][inside]
            known = model(ids[:, :-1], targets=targets, reduce="none")              # (B, T)
            nats.update(zip(batch, known.sum(1).tolist()))
    return [-nats[i] / math.log(2) for i in range(len(rows))]


def read_documents(path):
    """The documents of a JSON-lines file with a text field, or one document: the file's text."""
    from fim import normalize
    from tokenizer import InputError, read_text

    path, text = Path(path), read_text(path)
    if path.suffix != ".jsonl":
        return [{"text": normalize(text), "path": path.name}]
    documents = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        try:
            documents.append(json.loads(line))
            documents[-1]["text"] = normalize(documents[-1]["text"])
            documents[-1]["text"].encode()      # no half surrogate pairs
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f'{path}, line {number}: expected {{"text": "..."}}') from None
    return documents


# ------------------------------------------------------------------------------------------------
# Asking a model


@functools.cache
def benchmarks():
    """assets/benchmarks.json: files, addresses and hashes, prompts with their stops, and what the
    report gives, in per cent, for each of the published sizes."""
    return json.loads((ASSETS / "benchmarks.json").read_text(encoding="utf-8"))


def benchmark_file(benchmark):
    """Where the problems of an entry of benchmarks() lie: the ladder with us, others in a cache."""
    from tokenizer import cache_folder
    ours = benchmark["file"] == "ladder.jsonl"
    return (ASSETS if ours else cache_folder() / "benchmarks") / benchmark["file"]


# What a problem holds of these is text
TEXT_FIELDS = ("prompt", "suffix", "test", "entry_point", "code", "input", "output", "question")


def find_problems(name, file=None, limit=None):
    """task_id -> problem, of a file, the cache or the official place; limit: only the first."""
    from tokenizer import InputError, fetch
    benchmark = benchmarks()["benchmarks"][name]
    if file is None:
        file = benchmark_file(benchmark)
        try:
            if not file.exists() and not benchmark["url"]:
                raise InputError("there is no address to fetch it from")
            fetch(benchmark["url"], file)
        except InputError as error:
            raise InputError(f"{name}: put {benchmark['file']} to {file} or give --problems "
                             f"({error})") from None
        data = file.read_bytes()
        with contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):       # the hash will tell
            data = gzip.decompress(data) if file.suffix == ".gz" else data
        if benchmark["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
            raise InputError(f"{file}: not the published file (its SHA-256 differs); delete it")
    problems = {}
    for number, row in read_rows(file):
        try:
            problem = to_problem(row, name, number)
            texts = [problem.get(field, "") for field in TEXT_FIELDS]
            texts.append(problem.get("canonical_solution") or "")           # it may be null
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            problems[problem["task_id"]] = problem
            if name.endswith("+") and "inputs" not in problem:
                raise InputError(f"{name} needs EvalPlus's file; these are the plain problems")
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except Exception:                                       # whatever such a row provokes
            raise InputError(f"{file}, line {number}: no problem of HumanEval, MBPP, EvalPlus, "
                             "infilling, CRUXEval or GSM8K") from None
    if not problems:
        raise InputError(f"{file}: holds no problem")
    if len({"test" in problem for problem in problems.values()}) > 1:
        raise InputError(f"{file}: holds programs and questions; give a file of one kind")
    return dict(itertools.islice(problems.items(), limit))


def complete(model, tokenizer, prompts, max_new_tokens, stops=(), stop_ids=(), kept=None,
             **sampling):
    """Continue prompts (lists of ids) -> (text, whether it stopped by itself) of each, in order.

    Of a prompt too long for the context the end is kept. kept: a file of batches done; what it
    holds of the same question is not asked again.
    """
    from model import generate
    from tqdm import tqdm
    T = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, T // 2)
    prompts = [prompt[-(T - max_new_tokens):] for prompt in prompts]
    results, done = [None] * len(prompts), {}
    if kept and kept.exists():
        try:
            whole = kept.read_text(encoding="utf-8").rpartition("\n")[0]    # the last: cut off?
            kept.write_text(whole + "\n" * bool(whole), encoding="utf-8")
            done = dict(map(json.loads, whole.splitlines()))
        except (ValueError, TypeError):                                 # damaged: asked again
            kept.unlink()
    which = float(model.head.detach().float().abs().mean())     # other weights, another text

    def stop(ids):
        tail = tokenizer.decode(ids[-16:])
        return any(text in tail for text in stops)

    batches = tqdm(batches_of(prompts, max_new_tokens), desc="batches", disable=None)
    for number, rows in enumerate(batches):
        batch = [prompts[i] for i in rows]
        # generate() adds each row's number, and torch reads 32 bits of a seed: spread over them
        seed = sampling.get("seed", 0) * 0x9E3779B1 + number * TOKENS_AT_ONCE
        key = json.dumps([which, batch, max_new_tokens, stops, {**sampling, "seed": seed}])
        key = hashlib.sha256(key.encode()).hexdigest()
        if key not in done:
            new = generate(model, batch, max_new_tokens, stop=stop, stop_ids=stop_ids,
                           vocab_size=tokenizer.vocab_size, **{**sampling, "seed": seed})
            texts = [tokenizer.decode(ids) for ids in new]
            cuts = [min((text.find(part) for part in stops if part in text), default=len(text))
                    for text in texts]
            done[key] = [(text[:cut], len(ids) < max_new_tokens or cut < len(text))
                         for text, cut, ids in zip(texts, cuts, new)]
            if kept:
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps([key, done[key]]) + "\n")
        for i, result in zip(rows, done[key]):
            results[i] = tuple(result)
    return results


def code_block(text):
    """The first fenced block of an answer that may begin inside one; all of it without a fence."""
    block = re.search(r"```\w*\n(.*?)(?:```|$)", text, re.DOTALL)
    return block[1] if block else text.split("```")[0]


def extract(name, text):
    """The answer in what a model said to a prompt; assets/benchmarks.json has it in words."""
    if name == "code chat":
        return code_block(text)
    if name in ("code", "short code", "mbpp"):
        return text.replace("\t", "    ")
    if name.startswith("cruxeval"):                         # ... [ANSWER] assert f(16) == 17
        text = text.split("[ANSWER]")[1 if "[ANSWER]" in text else 0]
        call, value = (text.split("==") + [text])[:2]
        if "output" in name:
            return value.strip()
        return "f" + call.split("assert f")[1].strip() if "assert f" in call else call.strip()
    return text


def prompt_ids(model, tokenizer, way, problem):
    """A prompt of assets/benchmarks.json, filled with a problem's fields, as ids; of a gap no more
    than there is room for."""
    from fim import infill_prompt
    if way["prompt"][0].startswith("<|fim_prefix|>"):           # each part encoded by itself
        T = model.config.max_position_embeddings
        return infill_prompt(tokenizer, problem["prompt"], problem["suffix"],
                             T - min(way["max_new_tokens"], T // 2))
    fields = {**problem, "prompt": problem.get("prompt", "").strip()}
    text = re.sub(r"\{(prompt|code|input|output|question)\}", lambda field: fields[field[1]],
                  "\n".join(way["prompt"]))
    return tokenizer.encode(text, allow_special=True)


def model_samples(model, tokenizer, name, problems, n=1, kept=None, **sampling):
    """n completions of each problem by a model -> rows of a samples file. name: of the prompt."""
    from fim import control_stops
    way, ends = benchmarks()["prompts"][name], control_stops(tokenizer)
    field = "solution" if name == "code chat" else "completion"     # the whole program or its rest
    T = model.config.max_position_embeddings
    new = min(way["max_new_tokens"], T // 2)
    print(f"prompt of {name!r} ({way['source']}):\n"
          + "\n".join("  | " + line for line in way["prompt"])
          + f"\nstops: {way['stops']}, {len(ends)} control tokens; at most "
          f"{new} new tokens; answer: {way['answer']}")
    prompts = [prompt_ids(model, tokenizer, way, problem) for problem in problems.values()]
    room = T - new - way["prompt"][0].startswith("<|fim_prefix|>")      # a gap's are cut already
    if cut := sum(len(ids) > room for ids in prompts):
        print(f"{cut} of {len(prompts)} prompts are cut to fit: the context has {T} tokens")
    texts = complete(model, tokenizer, [p for p in prompts for _ in range(n)],
                     way["max_new_tokens"], way["stops"], ends, kept, **sampling)
    ids = [task_id for task_id in problems for _ in range(n)]
    return [{"task_id": task_id, field: extract(name, text), "stopped": stopped}
            for task_id, (text, stopped) in zip(ids, texts)]


def read_samples(path, problems):
    """The samples of a file whose task is among the problems; InputError names the line."""
    from tokenizer import InputError
    samples = []
    for number, row in read_rows(path):
        task = row.get("task_id")
        if not isinstance(task, str) or task not in problems:
            raise InputError(f"{path}, line {number}: no task {task!r} in this benchmark")
        program = "test" in problems[task]
        text = row.get("solution" if program and "solution" in row else "completion")
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: expected a completion"
                             + " or a solution" * program)
        samples.append(row)
    if not samples:
        raise InputError(f"{path}: holds no sample")
    if repeated := len(samples) - len(set(map(json.dumps, samples))):
        print(f"{path}: {repeated} lines repeat another; all are graded")
    present = {sample["task_id"] for sample in samples}
    if missing := [task_id for task_id in problems if task_id not in present]:
        print(f"{len(missing)} of {len(problems)} tasks have no sample, {missing[0]} the first: "
              "the score is of the others")
    return samples


def problems_hash(problems):
    """The same in each process, although MBPP+ holds sets."""
    text = json.dumps(problems, default=lambda value: (
        sorted(map(repr, value)) if isinstance(value, set) else repr(value)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def grade_samples(name, samples, problems, results, args):
    """Grade samples of a benchmark -> rows with their grades; each is written as it comes.

    With --resume, what the results file already says of the same samples is not graded again.
    """
    from tqdm import tqdm
    slow = any("inputs" in problem for problem in problems.values())
    done, settings = [], {"benchmark": name, "timeout": args.timeout or (20.0 if slow else 3.0),
                          "problems": problems_hash(problems)}
    if args.resume and results.exists():
        with contextlib.suppress(ValueError, TypeError):    # cut off or damaged: graded again
            for line, sample in zip(results.read_text(encoding="utf-8").split("\n"), samples):
                row = json.loads(line)
                if {**row, **sample, **settings} != row:
                    break
                done.append(row)
    todo, problem = samples[len(done):], next(iter(problems.values()))
    if "test" in problem:
        pairs = [(problems[s["task_id"]], s["solution"] if "solution" in s else
                  assemble(problems[s["task_id"]], s["completion"])) for s in todo]
        found = grades(pairs, args.workers, settings["timeout"], args.weak_sandbox)
    else:
        found = (compare(problems[s["task_id"]], s["completion"]) for s in todo)
    with open(results, "w", encoding="utf-8") as file:
        for row in done:
            file.write(json.dumps(row) + "\n")
        for sample, result in zip(todo, tqdm(found, total=len(todo), desc="graded",
                                             disable=None)):
            done.append({**sample, **settings, **result._asdict()})
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return done


def print_scores(name, rows, problems):
    """Print pass@k with its interval and why the others failed -> scores."""
    counts, groups = {}, {}
    for row in rows:
        counts.setdefault(row["task_id"], []).append(row["passed"])
        if group := problems[row["task_id"]].get("group"):
            groups.setdefault(group, []).append(row["passed"])
    smallest = min(map(len, counts.values()))
    scores = {"samples": len(rows), "problems": len(counts)}
    lines = "line" in next(iter(problems.values()))
    for k in (k for k in (1, 10, 100) if k <= smallest):
        values = [pass_at_k(len(passed), sum(passed), k) for passed in counts.values()]
        word = "exact match" if lines and k == 1 else f"pass@{k}"
        low, high = bootstrap(values)
        scores[word] = sum(values) / len(values)
        print(f"{name} {word}: {scores[word]:.4f} (95 % between {low:.3f} and {high:.3f}, "
              f"{len(values)} problems)")
    if lines:
        scores["edit similarity"] = sum(
            edit_similarity(first_line(row["completion"]), problems[row["task_id"]]["line"].strip())
            for row in rows) / len(rows)
        print(f"  edit similarity {scores['edit similarity']:.1f}")
    scores["reasons"] = dict(Counter(row["reason"].split(":")[0] for row in rows).most_common())
    scores["weak"] = sum(row["weak"] for row in rows)
    print("  " + ", ".join(f"{count} {reason}" for reason, count in scores["reasons"].items())
          + (f"; {scores['weak']} graded in one process with their test" * bool(scores["weak"])))
    if all("stopped" in row for row in rows):
        scores["stopped"] = sum(row["stopped"] for row in rows) / len(rows)
        print(f"  {scores['stopped']:.0%} stopped by themselves")
    scores.update({group: sum(passed) / len(passed) for group, passed in sorted(groups.items())})
    if groups:
        print("  " + ", ".join(f"{group} {scores[group]:.1%}" for group in sorted(groups)))
    return scores


def measure_bits(model, tokenizer, documents, folder):
    """Print bits per byte of documents, beside what compressors need."""
    texts = [document["text"] for document in documents]
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes, rows of "
          f"{model.config.max_position_embeddings} tokens; bits per byte:")
    results = compressed_bits_per_byte(texts)
    results[str(folder)] = bits_per_byte(model, tokenizer, documents)
    for name, bits in results.items():
        print(f"  {name:24} {bits:.3f}")
    return results


# ------------------------------------------------------------------------------------------------
# Infilling: gaps of every kind in held-out code

LONGEST_MIDDLE, WINDOW = 160, 600       # characters of a middle, and around it; not published; ours


def held_out_gaps(documents, count=200):
    """`count` gaps of each kind of cut in held-out documents, always the same -> dicts of kind,
    prefix, middle, suffix and whether it is Python."""
    import numpy as np

    from fim import SPANS, Node, span, syntax_nodes
    from tokenizer import InputError
    python = [document.get("language") == "python" or str(document.get("path")).endswith(".py")
              for document in documents]
    trees = [syntax_nodes(d["text"]) if own else [] for d, own in zip(documents, python)]
    sizes, gaps = np.array([len(d["text"]) for d in documents], float), []
    for kind in SPANS:
        rng, found = np.random.default_rng([0, *kind.encode()]), []
        for _ in range(100 * count):                    # what is empty or long is drawn anew
            if len(found) == count:
                break
            i = rng.choice(len(documents), p=sizes / sizes.sum())
            text, at = documents[i]["text"], int(rng.integers(sizes[i]))
            start = text.rfind("\n", 0, at) + 1
            stop = len(text) if (end := text.find("\n", start + WINDOW)) < 0 else end
            nodes = [Node(node.kind, node.start - start, node.end - start) for node in trees[i]
                     if start <= node.start and node.end <= stop]
            if kind == "syntax" and not nodes:
                continue
            low, high = (start + place for place in span(text[start:stop], kind, rng, nodes))
            if text[low:high].strip() and high - low <= LONGEST_MIDDLE:
                found.append({"kind": kind, "prefix": text[:low], "middle": text[low:high],
                              "suffix": text[high:], "python": python[i]})
        gaps += found
    if not gaps:
        raise InputError("the held-out documents have nothing to fill in")
    return gaps


def mark_insertion(gap, text, stopped, inserted, middle):
    """What one insertion is worth. inserted, middle: how many tokens it and the true one have."""
    from fim import python_tree, suffix_start
    start = suffix_start(gap["suffix"])
    return {"exact, %": 100 * (text == gap["middle"]),
            "similar": edit_similarity(text.strip(), gap["middle"].strip()),
            "parses, %": (100 * bool(python_tree(gap["prefix"] + text + gap["suffix"]))
                          if gap["python"] else None),
            "stops, %": 100 * (stopped and inserted < 2 * (middle + 1) + 16),
            "runs on, %": 100 * (bool(start) and start in text), "length": inserted / middle}


def measure_infilling(model, tokenizer, gaps, path=None):
    """Print how well a model fills gaps, greedily, without the guard -> kind -> measure -> value.

    exact, %: to the letter; similar: mean edit similarity; parses, %: the whole Python file with
    the insertion; stops, %: by itself, within twice the tokens of the true middle and 16; runs on,
    %: into what stands after the gap; length: median of the insertion's over the middle's; bits
    per byte of the true middle with its end. path: of a picture of three insertions.
    """
    from fim import control_stops, infill_prompt
    T, end = model.config.max_position_embeddings, tokenizer.special["<|endoftext|>"]
    middles = [tokenizer.encode(gap["middle"])[:T // 2 - 1] + [end] for gap in gaps]
    new = min(2 * max(map(len, middles)) + 16, T // 2)
    prompts = [infill_prompt(tokenizer, gap["prefix"][-4 * T:], gap["suffix"][:4 * T], T - new)
               for gap in gaps]
    began = time.monotonic()
    texts = complete(model, tokenizer, prompts, new, stop_ids=control_stops(tokenizer))
    seconds = time.monotonic() - began
    bits, tokens, groups = answer_bits(model, prompts, middles), 0, {}
    for gap, middle, cost, (text, stopped) in zip(gaps, middles, bits, texts):
        inserted = len(tokenizer.encode(text))
        tokens += inserted
        groups.setdefault(gap["kind"], []).append({
            **mark_insertion(gap, text, stopped, inserted, len(middle) - 1),
            "bits": cost, "bytes": len(gap["middle"].encode())})
    scores = {}
    for kind, rows in groups.items():
        values = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
        density = sum(values.pop("bits")) / sum(values.pop("bytes"))
        score = {name: sum(own) / len(own) for name, own in values.items() if own}
        score |= {"length": statistics.median(values["length"]), "bits per byte": density}
        scores[kind] = {name: round(value, 4) for name, value in score.items()}
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    print(f"infilling of held-out code, {len(gaps)} gaps, {tokens / seconds:,.0f} tokens/s\n"
          f"  {'':12}" + "".join(f"{name:>14}" for name in names))
    for kind, score in scores.items():
        print(f"  {kind:12}" + "".join(f"{score[name]:14.2f}" if name in score else f"{'-':>14}"
                                       for name in names))
    if path:
        draw_insertions([(gap, text) for gap, (text, _) in zip(gaps, texts)], path)
    return scores


def draw_insertions(pairs, path):
    """Write a picture (PNG) of one insertion of each of three kinds: what was inserted in green,
    what stood there in grey. pairs: (gap, inserted text)."""
    from matplotlib.figure import Figure

    rows, first = [], {gap["kind"]: (gap, text) for gap, text in reversed(pairs)}
    for kind, (gap, text) in list(first.items())[:3]:
        parts = [(f"{kind}\n", "tab:blue"), ("\n".join(gap["prefix"].split("\n")[-5:]), "black"),
                 ("\n".join(text.split("\n")[:8]) or "(nothing inserted)", "tab:green"),
                 ("\n".join(gap["suffix"].split("\n")[:4]) + "\n", "black"),
                 ("stood there: " + gap["middle"] + "\n\n", "tab:gray")]
        rows.append([])
        for part, colour in parts:                      # each line a row of coloured pieces
            for i, piece in enumerate(part.split("\n")):
                rows += [[]] * (i > 0)
                rows[-1].append((piece, colour))
    figure = Figure(figsize=(9, 0.19 * len(rows)))
    for line, pieces in enumerate(rows):
        column = 1
        for piece, colour in pieces:                    # 9 points of a monospaced font: 0.0753 inch
            piece = piece if column + len(piece) < 119 else piece[:118 - column] + "…"
            figure.text(column * 0.0753 / 9, 1 - (line + 1) / (len(rows) + 1), piece, color=colour,
                        family="monospace", fontsize=9, va="center", parse_math=False)
            column += len(piece)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# Needle in the code: is a function, seen once far above, written again (report, figure 6)?

# Their product is the number of names; what a needle looks like is not published; ours
NEEDLE_WORDS = ("amber brisk copper dusty early fuzzy gentle hollow ivory jolly".split(),
                "anchor basket candle dragon engine falcon garden hammer island jacket".split(),
                "size weight price depth width score limit speed level rank".split())
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plant(tokenizer, hay, length, depth, draw):
    """Hide a function in code -> (context with it, context without it, its body), as ids.

    Both contexts end with the function's head, so that the body is due. Context and body have
    `length` ids together; depth, from 0 to 1, says where the function stands.
    """
    from tokenizer import InputError
    first, second, argument = (draw.choice(words) for words in NEEDLE_WORDS)
    a, b, c = (draw.randrange(11, 990) for _ in range(3))
    head = f"\ndef {first}_{second}({argument}):\n"
    body = f"    {argument} = {argument} * {a} + {b}\n    return {argument} % {c}\n"
    function, question, answer = map(tokenizer.encode, (head + body, head, body))
    room = length - len(question) - len(answer)
    if room < len(function):
        raise InputError(f"needle: {length} tokens of context cannot hold a function of "
                         f"{len(function)} and be asked for it")
    start = draw.randrange(max(1, len(hay) - room))
    hay = hay[start:start + room]
    cut = int(depth * (len(hay) - len(function)))
    planted = hay[:cut] + function + hay[cut:len(hay) - len(function)]
    return planted + question, hay + question, answer


def needle_map(model, tokenizer, documents, path, count=8):
    """Draw how well planted functions are written again, by depth and length -> scores.

    Two measures: the share of functions that greedy writing repeats to the letter and, as small
    models repeat none, the bits per byte that seeing the function saves on its body.
    """
    from tokenizer import InputError
    T, draw = model.config.max_position_embeddings, random.Random(0)
    longest = T - 16                                    # bodies differ by some tokens
    shortest = min(longest, max(T // 8, 160))           # twice the function and some code
    lengths = [shortest + (longest - shortest) * i // 4 for i in range(5)]
    hay = []
    for document in documents:
        hay += tokenizer.encode(document["text"] + "\n") if len(hay) < 10 * T else []
    if len(hay) < T:
        raise InputError(f"{len(hay)} tokens of code for a context of {T}: give more with --text")

    planted, plain, answers = zip(*(
        plant(tokenizer, hay, length, depth, draw)
        for depth, length, _ in itertools.product(DEPTHS, lengths, range(count))))
    bodies = [tokenizer.decode(answer) for answer in answers]
    saved = [(before - after) / len(body.encode()) for before, after, body in zip(
        answer_bits(model, plain, answers), answer_bits(model, planted, answers), bodies)]
    texts = complete(model, tokenizer, planted, max(map(len, answers)) + 1)
    repeated = [100.0 * text.startswith(body) for (text, _), body in zip(texts, bodies)]
    maps = {}
    for name, values in (("repeated, %", repeated), ("bits saved per byte", saved)):
        cells = [sum(values[i:i + count]) / count for i in range(0, len(values), count)]
        maps[name] = [cells[i:i + len(lengths)] for i in range(0, len(cells), len(lengths))]
        print(f"{name} (rows: depth of the function, columns: tokens of context)\n        "
              + "".join(f"{length:8}" for length in lengths))
        for depth, row in zip(DEPTHS, maps[name]):
            print(f"  {depth:6.0%}" + "".join(f"{value:8.2f}" for value in row))
    draw_map(maps, lengths, path)
    return {"repeated": sum(repeated) / len(repeated), "bits saved per byte": sum(saved)
            / len(saved), "lengths": lengths, "depths": DEPTHS, "maps": maps}


def draw_map(maps, lengths, path):
    """Write a heat map (PNG): repeated functions, or the bits saved where none is repeated."""
    from matplotlib.figure import Figure

    name = next((name for name, rows in maps.items() if any(map(any, rows))), [*maps][-1])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    most = 100 if "%" in name else max(0, *map(max, maps[name]))
    image = axes.imshow(maps[name], cmap="YlGn", aspect="auto", vmin=0, vmax=most)
    for row, values in enumerate(maps[name]):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center",
                      color="white" if value > 0.7 * most else "black")
    axes.set(title=f"needle in the code: {name}", xlabel="tokens of context",
             ylabel="depth of the function", xticks=range(len(lengths)), xticklabels=lengths,
             yticks=range(len(DEPTHS)), yticklabels=[f"{depth:.0%}" for depth in DEPTHS])
    figure.colorbar(image, label=name)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


# ------------------------------------------------------------------------------------------------
# The command


def save_scores(stem, scores, args):
    """Write {stem}.json and .md: what was measured, how, with which versions."""
    import torch

    from tokenizer import write_json, write_text
    write_json(Path(f"{stem}.json"), {
        "scores": scores, "settings": {key: str(value) for key, value in vars(args).items()},
        "python": platform.python_version(), "torch": torch.__version__})
    rows = [f"| {part} | {name} | {value:.4g} |" for part, values in scores.items()
            for name, value in values.items() if isinstance(value, (int, float))]
    write_text(Path(f"{stem}.md"), "\n".join(["| benchmark | score | value |", "|---|---|---:|",
                                             *rows]) + "\n")
    print(f"written: {stem}.json and .md")


def parse_args():
    from tokenizer import InputError
    names = ["infilling", "needle", *benchmarks()["benchmarks"]]
    parser = argparse.ArgumentParser(description="Measure a model, or grade samples.")
    parser.add_argument("command", nargs="?", choices=["score"], help="grade existing --samples")
    parser.add_argument("--benchmark", choices=names, metavar="NAME", help="one of "
                        f"{', '.join(names)} (default: bits per byte and infilling of held-out "
                        "code, and the ladder)")
    parser.add_argument("--chat", action="store_true", help="ask as an instruct model is asked")
    parser.add_argument("--problems", help="the benchmark's file, .jsonl or .jsonl.gz")
    parser.add_argument("--samples", type=Path, help="for score: .jsonl with task_id and "
                        "completion (or solution: a whole program)")
    parser.add_argument("--resume", action="store_true",
                        help="keep what an interrupted run has written and graded")
    parser.add_argument("--limit", type=int, help="only the first problems")
    parser.add_argument("--n", type=int, default=1, help="samples a problem (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--timeout", type=float, help="seconds for a whole check (default: 3, or "
                        "20 where the problem's own solution runs beside, as in EvalPlus)")
    parser.add_argument("--workers", type=int, help="sandboxes at work (default: one a core)")
    parser.add_argument("--weak-sandbox", action="store_true", help="run programs where the system "
                        "cannot lock them in, under resource limits alone")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--text", nargs="+", help="bits per byte of text files or .jsonl alone; "
                        "with needle: the code that hides it")
    parser.add_argument("--out", default="out", help="root folder of the stages (default: out)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args()
    if not args.temperature >= 0 or any(count is not None and count < 1
                                        for count in (args.n, args.limit, args.workers)):
        raise InputError("--n, --limit and --workers must be at least 1, --temperature at least 0")
    if not 0 < args.top_p <= 1 or args.timeout is not None and not 0 < args.timeout < 1e6:
        raise InputError("--top-p must be above 0 and at most 1, --timeout above 0 seconds")
    if args.n > 1 and not args.temperature:
        raise InputError(f"--n {args.n}: equal samples at temperature 0; give --temperature 0.8")
    if args.problems and not args.benchmark:
        raise InputError("--problems: give the --benchmark that they belong to")
    return args


def score(args):
    """Grade the samples of a file."""
    from tokenizer import InputError
    if not args.samples or args.benchmark in (None, "infilling", "needle"):
        raise InputError("score needs --samples and the --benchmark that they answer")
    if args.limit:
        raise InputError("score: all samples of the file are graded; --limit is for a model's own")
    problems = find_problems(args.benchmark, args.problems)
    samples = read_samples(args.samples, problems)
    print_layers(problems, args)
    results = args.samples.with_name(f"{args.samples.name}_results.jsonl")
    rows = grade_samples(args.benchmark, samples, problems, results, args)
    print_scores(args.benchmark, rows, problems)
    print(f"written: {results}")


def print_layers(problems, args):
    """Print the locks on the programs, if these problems ask for programs -> their names."""
    if "test" not in next(iter(problems.values())):
        return []
    with contextlib.closing(Sandbox(args.weak_sandbox)) as box:
        print("sandbox: " + ", ".join(box.layers))
    return box.layers


def ask_and_grade(model, tokenizer, name, problems, stem, args):
    """Let a model answer the problems of a benchmark, and grade what it says -> scores.

    Samples and grades go to the file {stem}.jsonl.
    """
    from tokenizer import InputError
    benchmark = benchmarks()["benchmarks"][name]
    prompt = benchmark.get("chat prompt" if args.chat else "prompt")
    if not prompt:
        raise InputError(f"{name} has no prompt for --chat")
    layers = print_layers(problems, args)
    kept, results = Path(f"{stem}.batches.jsonl"), Path(f"{stem}.jsonl")
    if not args.resume:
        kept.unlink(missing_ok=True)
    samples = model_samples(model, tokenizer, prompt, problems, args.n, kept, seed=args.seed,
                            temperature=args.temperature, top_p=args.top_p)
    rows = grade_samples(name, samples, problems, results, args)
    kept.unlink(missing_ok=True)
    scores = {**print_scores(name, rows, problems), "layers": layers}
    sizes, parameters = benchmarks()["sizes"], sum(p.numel() for p in model.parameters())
    reported = benchmark.get("reported chat" if args.chat else "reported")
    if reported and parameters in sizes and not args.limit and not args.temperature:
        scores["published"] = reported[sizes.index(parameters)] / 100
        print(f"  the report, for {'instruct' if args.chat else 'base'} models of this size, on "
              f"{benchmark['file']}: {scores['published']:.3f}")
    return scores


def main():
    from tokenizer import InputError
    args = parse_args()
    if args.command == "score":
        return score(args)

    from fim import load, newest_model
    from model import choose_attention, default_device, loss_head
    names = [args.benchmark] if args.benchmark else ["infilling", "ladder"][args.chat:]
    names = [] if args.text and not args.benchmark else names
    documents, folder = [], args.model or newest_model(args.out)
    if args.text or not args.benchmark or {"infilling", "needle"} & set(names):
        files = args.text or [Path(args.out) / "data" / "validation.jsonl"]
        documents = [document for file in files for document in read_documents(file)
                     if document["text"]]
        if not documents:
            raise InputError(f"{files[0]}: no text to measure")
    problems = {name: find_problems(name, args.problems, args.limit) for name in names
                if name not in ("infilling", "needle")}
    model, tokenizer = load(folder, args.device or default_device())
    T, scores = model.config.max_position_embeddings, {}
    print(f"{folder} on {model.head.device}: {choose_attention(model, 'auto', T)}, loss head by "
          f"{loss_head(model)}")
    if not args.benchmark:
        scores["bits per byte"] = measure_bits(model, tokenizer, documents, folder)
    if not names:
        return
    target, chat = Path(args.out) / "evaluate", "_chat" * args.chat
    model_name = Path(os.path.abspath(folder)).name             # of "." too
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        stem = target / f"{model_name}_{name}{chat}"
        if name == "needle":
            scores[name] = needle_map(model, tokenizer, documents, f"{stem}.png")
        elif name == "infilling":
            gaps = held_out_gaps(documents, args.limit or 200)
            scores.update({f"infilling, {kind}": values for kind, values in measure_infilling(
                model, tokenizer, gaps, f"{stem}.png").items()})
        else:
            scores[name] = ask_and_grade(model, tokenizer, name, problems[name], stem, args)
    save_scores(stem if args.benchmark else target / f"{model_name}{chat}", scores, args)


if __name__ == "__main__":
    from tokenizer import run
    run(main)
