"""Runs programs that a model wrote, and grades them so that they cannot forge the result.

Such programs may do anything: hang, fill the memory, read files, or return an object that equals
everything. So each check takes two locked-in processes. The *candidate* holds the program and no
test; the *tester* holds the test, calls check(candidate) and sees of the candidate only plain
values that came through a pipe. What the candidate prints, its exit code and late answers count
for nothing. A third process, the *worker*, forks them, ends them in time and sees neither programs
nor tests.

This file uses the standard library only: it is started as a bare Python process.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import gc
import importlib
import itertools
import json
import os
import platform
import queue
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import types
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


class SandboxError(OSError):
    """This system cannot lock programs in."""


class Sandbox:
    """A worker process that grades and runs programs, one at a time. Close it at the end.

    weak: go on where the system offers too little; else SandboxError. without: names of layers to
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
            self.close()
            raise SandboxError("this system offers too little to lock programs in ("
                             f"{', '.join(self.layers)}); --weak-sandbox runs them all the same")

    def start(self):
        """Start the worker, as a bare Python that has neither our modules nor our environment."""
        folder = str(Path(__file__).resolve().parent)
        code = (f"import sys; sys.path.insert(0, {folder!r}); import sandbox; del sys.path[0]; "
                "sandbox.Worker(**sandbox.json.loads(sys.argv[1])).serve()")
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
    """The Grade of each (problem, completion), in order. SandboxError: no way to lock them in."""
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
