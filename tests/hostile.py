"""Programs that a grader must never pass (HOSTILE) and right ones that it must pass (RIGHT).

Each program answers the same small PROBLEM. One that forges a grade returns wrong answers; one that
escapes or exhausts the machine answers correctly only if it got what it wanted. So "passed" always
means that the attack succeeded. Run HOSTILE in a sandbox only. Every file that an attack may create
has minicoder_hostile in its path.
"""

from textwrap import dedent, indent

PROBLEM = {
    "task_id": "hostile/0",
    "prompt": 'def total(numbers):\n    """The sum of a list of numbers, 0 for none.\n\n'
              '    >>> total([1, 2, 3])\n    6\n    """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(numbers)\n",
    "test": """\
def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0
    assert candidate([-48213, 7]) == -48206
    assert abs(candidate([0.25, 1.5, 2.125]) - 3.875) < 1e-9
    assert candidate([918273, 645546, 3]) == 1563822
    assert not candidate([2.5, -1, 0.75]) != 2.25
    assert candidate(list(range(731, 1409, 7))) in (103499, 103499.0)
    assert candidate([10**18 + 7, 10**17 + 9, -5]) == 1100000000000000011
    assert total([3037, -9.5]) == 3027.5
""",
}
HOSTILE = {}


def define(name, body):
    """A function as text; the body is a triple-quoted string."""
    return f"def {name}:\n" + indent(dedent(body).strip("\n"), "    ") + "\n"


def answer(body):
    """A program whose total() has this body."""
    return define("total(numbers)", body)


# ------------------------------------------------------------------------------------------------
# Forging the grade with an object that lies to every comparison

LIAR = """\
class Liar:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = lambda self, *other: True
    __abs__ = __neg__ = __round__ = __add__ = __sub__ = __rsub__ = __call__ = __getitem__ = \\
        __iter__ = __next__ = lambda self, *others: self
    __hash__ = __index__ = __int__ = __len__ = lambda self: 6
    __float__ = lambda self: 6.0
    __repr__ = __str__ = lambda self: "6"
    __reduce__ = lambda self: (open, ("/tmp/minicoder_hostile_pickle", "w"))    # if it is pickled


"""

HOSTILE |= {
"lie: object": LIAR + answer("return Liar()"),
"lie: subclasses of what can be sent": answer("""
    import collections, datetime, decimal, fractions
    bases = [int, complex, list, float, decimal.Decimal, fractions.Fraction, datetime.timedelta,
             collections.Counter, collections.OrderedDict, collections.deque]
    lies = {name: lambda *args: True for name in ("__eq__", "__lt__", "__gt__", "__contains__")}
    lies |= {"__ne__": lambda *args: False, "__sub__": lambda *args: 0, "__hash__": lambda self: 0}
    return type("Lie", (bases[len(numbers) % len(bases)],), lies)()
"""),
"lie: class": LIAR + """\
class Meta(type):
    __instancecheck__ = __subclasscheck__ = __eq__ = lambda self, other: True
    __hash__ = lambda self: hash(int)


class Lie(Liar, metaclass=Meta):
    __class__ = property(lambda self: int)


Lie.__name__ = Lie.__qualname__ = "int"
Lie.__module__ = "builtins"


""" + answer("return Lie()"),
"lie: endless list": answer("""
    import itertools
    lies = {"__iter__": lambda self: itertools.count(), "__len__": lambda self: 3}
    return type("Endless", (list,), lies)([6])
"""),
"lie: the module": LIAR + """\
import sys
import types

kind = type("Module", (types.ModuleType,), {"total": property(lambda self: Liar())})
sys.modules[__name__].__class__ = kind
sys.modules["__main__"] = sys.modules["solution"] = Liar()
__getattr__ = lambda name: Liar()
""",
}

# ------------------------------------------------------------------------------------------------
# Forging the grade by changing what decides about it in the same process

HOSTILE |= {
"change: variables and functions up the stack": answer("""
    import sys
    words = ("check", "grade", "compare", "same", "verdict", "judge", "describe")
    frames = [sys._getframe(), *sys._current_frames().values()]
    for frame in frames:
        if frame.f_back:
            frames.append(frame.f_back)
        for names in (frame.f_locals, frame.f_globals):
            for name, value in list(names.items()):
                if isinstance(value, list) and value is not frames:
                    value.append("passed")
                elif name in ("result", "results", "reply", "verdict", "answer"):
                    names[name] = True
                elif callable(value) and any(word in name for word in words):
                    names[name] = lambda *args, **named: "passed"
"""),
# Right only if the test's function is in this process.
"change: the test among all objects": answer("""
    import gc
    import types
    functions = [thing for thing in gc.get_objects() if isinstance(thing, types.FunctionType)]
    for function in functions:
        if function.__name__ == "check" and function.__code__.co_varnames[:1] == ("candidate",):
            function.__code__ = (lambda candidate: None).__code__
            return sum(numbers)
"""),
"change: builtins": answer("""
    import builtins
    builtins.AssertionError = builtins.Exception = type("Silent", (BaseException,), {})
    builtins.abs = builtins.sum = builtins.round = lambda *numbers: 0
    builtins.isinstance = builtins.all = builtins.any = lambda *things: True
    builtins.repr = builtins.str = lambda *things: "passed"
    builtins.type = lambda *things: int
    builtins.__import__ = lambda *things, **named: object
    return [object]
"""),
"change: no builtins": answer("""
    import builtins
    for name in list(vars(builtins)):
        delattr(builtins, name)
"""),
}

# ------------------------------------------------------------------------------------------------
# Forging the grade with answers that the program itself writes into the pipes

FORGE = """\
import json
import os

FORGED = ["passed", True, 6, None, [], {"passed": True}, ["passed", ""], {"result": 6}, ["ok", 6],
          # what a child of support/sandbox.py sends: the program is loaded; a call returned 6
          {"name": "bool", "raised": False, "data": [True, []]},
          {"name": "int", "raised": False, "data": [6, [None, None]]},
          # what no child sends: a node that is no value
          {"name": "x", "raised": True, "data": [[1], [None, ["builtin", "exec"]]]}]


def frame(text):
    data = text if isinstance(text, bytes) else text.encode()
    return len(data).to_bytes(4, "little") + data


def write_everywhere(data):
    for fd in range(64):
        try:
            os.write(fd, data)
        except OSError:
            pass


def forge():
    for value in FORGED:
        write_everywhere(frame(json.dumps(value)))


"""
HOSTILE |= {
"answer: before the request": FORGE + "forge()\n" + answer("return 6"),
"answer: by hand, then exit": FORGE + answer("""
    forge()
    os._exit(0)
"""),
"answer: a late second one": FORGE + answer("""
    import threading
    for pause in (0.001, 0.01, 0.05, 0.2):
        threading.Timer(pause, forge).start()
    return 6
"""),
"answer: a huge length, then silence": FORGE + answer(r"""
    import time
    write_everywhere(b"\xff\xff\xff\xff[")
    time.sleep(1e6)
"""),
"answer: a flood": FORGE + answer("""
    while True:
        write_everywhere(frame("null") * 4096)
"""),
"answer: patched json, struct and os": FORGE + """\
import struct

text = '{"passed": true, "verdict": "passed", "ok": true, "value": 6}'
write = os.write
json.dumps = json.JSONEncoder.encode = lambda *things, **named: text
json.loads = lambda *things, **named: {"passed": True}
struct.pack = lambda *things: len(text).to_bytes(4, "little")


""" + answer("""
    os.write = os.writev = lambda fd, data: write(fd, frame(text)) and len(data)
    os.read = lambda fd, size: b""
"""),
"answer: printed": answer("""
    import sys
    for word in ("PASSED", "1 passed in 0.01s", '{"passed": true}', "\\x00passed"):
        for stream in (sys.stdout, sys.stderr, sys.__stdout__):
            print(word, file=stream, flush=True)
"""),
# The modes of a pipe are shared with the process at the other end.
"answer: pipes that do not block": answer("""
    import contextlib, fcntl, os
    for fd in range(64):
        for command, value in ((fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK), (1031, 4096)):
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, command, value)
"""),
}
JSON = {"duplicate keys": """'{"ok": false, "ok": true, "value": NaN, "value": 6}'""",
        "deep nesting": """'["ok",' * 200_000 + "6" + "]" * 200_000""",
        "a long number": """"1" * 1_000_000""", "broken UTF-8": r"""b'"\xff\xed\xa0\x80"'"""}
HOSTILE |= {f"answer: JSON with {name}": FORGE + answer(f"write_everywhere(frame({text}))")
            for name, text in JSON.items()}

# ------------------------------------------------------------------------------------------------
# Ends and exceptions that a test or its process might take for success

RAISES = {
    "os._exit": "import os; os._exit(0)", "exit": "exit(0)", "StopIteration": "raise StopIteration",
    "GeneratorExit": "raise GeneratorExit", "KeyboardInterrupt": "raise KeyboardInterrupt",
    "StopAsyncIteration": "raise StopAsyncIteration(6)",
    "famous name": 'raise type("Passed", (BaseException,), {"__module__": "builtins"})("passed")',
    "name that is code": """raise type('SystemExit(0)", "passed": "', (Exception,), {})(0)""",
    "subclass": 'raise type("Mine", (StopIteration,), {})(sum(numbers))',
    "own SystemExit": 'raise type("Exit", (SystemExit,), {"code": property(lambda self: 0)})',
    "lying class": 'raise type("E", (BaseException,), {"__class__": property(lambda _: OSError)})',
    "long text": "raise ValueError('x' * 10**8)",
    "text that hangs": """
        import time
        raise type("Slow", (ValueError,), {"__str__": lambda self: time.sleep(1e6)})""",
    "text that raises": """
        def fail(self):
            raise kind
        kind = type("Bad", (AssertionError,), {"__str__": fail, "args": property(fail)})
        raise kind""",
    "when deleted": """
        def fail(self):
            raise SystemExit(0)
        return type("Bomb", (), {"__del__": fail})()""",
    "its own cause": """
        error = ValueError("passed")
        error.__cause__ = error
        raise error""",
    "in a signal handler": """
        import signal
        def ring(number, frame):
            raise SystemExit(0)
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGXCPU, signal.SIGPIPE):
            signal.signal(number, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)""",
    "of the grader": """
        kinds = [BaseException]
        for kind in kinds:
            kinds += [k for k in type.__subclasses__(kind) if k not in kinds]
        lost = [kind for kind in kinds if kind.__name__ in ("Lost", "Passed", "Done")]
        raise lost[0]("passed")""",
}
HOSTILE |= {f"raise: {name}": answer(body) for name, body in RAISES.items()}
HOSTILE |= {
"raise: at import": "import sys\n\nsys.exit(0)\n",
"raise: at the end": "import atexit, os\n\natexit.register(os._exit, 0)\n" + answer("return 0"),
}

# ------------------------------------------------------------------------------------------------
# Values and sources that are hard to send, compare or compile

ODD = {
    "nan": "return float('nan')", "infinity": "return float('inf')",
    "huge number": "return 1 << 33_219_281",
    "surrogates": "return '\\ud800passed\\udfff' * 3",
    "NUL": "return 'passed\\0' + '\\0' * len(numbers)",
    "list in itself": "result = [6]; result.append(result); return result",
    "argument in itself": "numbers[:] = [numbers, numbers]",
    "generator": "while True: yield 6",
    "deep list": """
        result = 6
        for _ in range(1_000_000):
            result = [result]
        return result""",
    # Thirty levels of two references each: small in memory, a billion elements as text.
    "shared lists": """
        result = [6]
        for _ in range(30):
            result = [result, result]
        return result""",
    # Multiples of 2**61 - 1 all have the hash 0, so building the dict takes quadratic time.
    "colliding keys": "return {n * (2**61 - 1): n for n in range(20_000)}",
    "right once": """
        if numbers == [1, 2, 3]:
            return 6
        return NotImplemented""",
}
HOSTILE |= {f"odd: {name}": answer(body) for name, body in ODD.items()}
HOSTILE |= {
"odd: coroutine": "async " + answer("return sum(numbers)"),
"odd: surrogate in the source": "answer = '\ud800'\n",
"odd: NUL in the source": "answer = 1\0\n",
"odd: brackets in the source": "answer = " + "(" * 5000 + ")" * 5000 + "\n",
"odd: minus signs in the source": "answer = " + "-" * 200_000 + "1\n",
}

# ------------------------------------------------------------------------------------------------
# Hanging and crashing

HANGS = {
    "loop that catches everything": """
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass""",
    "signals ignored": """
        import signal, time
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(1e9)""",
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "regular expression": """import re; re.match(r"(a+)+$", "a" * 60 + "b")""",
    "null pointer": "import ctypes; return ctypes.string_at(0)",
    # Each call is quick enough for a limit of its own, but all of them together are not.
    "slow calls": "import time; time.sleep(0.5); return sum(numbers)",
    "flood of output": """
        import os
        while True:
            print("PASSED" * 10_000)
            os.write(1, b"PASSED" * 10_000)""",
    "recursion in C": """
        import sys
        sys.setrecursionlimit(10**9)
        kind = type("Deep", (), {"__getattr__": lambda self, name: getattr(self, name)})
        return kind().answer""",
}
HOSTILE |= {f"hang: {name}": answer(body) for name, body in HANGS.items()}
HOSTILE |= {
"hang: import": "while True:\n    pass\n",
"hang: core dump": answer("import os, tempfile; os.chdir(tempfile.gettempdir()); os.abort()"),
"hang: exit": "import atexit, time\n\natexit.register(time.sleep, 1e6)\n" + answer("return 0"),
}

# ------------------------------------------------------------------------------------------------
# Attempts to get what the sandbox refuses: other processes, files, memory, the network, the kernel.

PRELUDE = """\
import ctypes, fcntl, functools, gc, mmap, os, pwd, re, resource, signal, socket, stat, subprocess
import sys, tempfile, threading, time

# The numbers of system calls on x86-64 and on aarch64
NUMBERS = {
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "clone": (56, 220), "clone3": (435, 435),
    "execveat": (322, 281), "ptrace": (101, 117), "unshare": (272, 97), "setns": (308, 268),
    "fsopen": (430, 430), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "add_key": (248, 217), "bpf": (321, 280), "perf_event_open": (298, 241), "futex": (202, 98),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "openat": (257, 56),
    "openat2": (437, 437), "inotify_init1": (294, 26), "shmget": (29, 194),
}
MACHINE = ["x86_64", "aarch64"].index(os.uname().machine)
PLACES = ["/tmp", "/var/tmp", "/dev/shm", ".", "..", "/", "/root", os.path.expanduser("~")]
PARENT = os.getppid()
PROCESSES = ["self", PARENT, 1]
LIBRARY = os.path.dirname(os.__file__)
SCRIPT = ": > /tmp/minicoder_hostile_exec; sleep 20"
LIMITED = [resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU,
           resource.RLIMIT_FSIZE, resource.RLIMIT_CORE]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def syscall(name, *args):
    number = NUMBERS[name][MACHINE] if isinstance(name, str) else name
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def exit_child(pid):
    if pid == 0:
        os._exit(0)


def any_of(function, values):
    return any([succeeds(lambda: function(value)) for value in values])


def succeeds(function):
    try:
        return function() is not False
    except Exception:
        return False


# Matches the test's text, but neither itself nor a program that contains it.
def is_test(text):
    return re.search("156382[2]", text) is not None


"""
WHEN_WON = """

@functools.cache
def won():
    return attack()


def total(numbers):
    return sum(numbers) if won() else None
"""


# Each line of an attempt is an expression that succeeds if it raises nothing and is not False
ATTEMPTS = {
    # SIGURG needs the same permission as SIGKILL, and whoever receives it ignores it.
    "process: signals": """
        os.kill(PARENT, signal.SIGURG)
        os.kill(-1, signal.SIGURG)
        os.killpg(0, signal.SIGURG)
        libc.kill(PARENT, signal.SIGURG) == 0
        syscall("tgkill", PARENT, PARENT, signal.SIGURG)
        syscall("rt_sigqueueinfo", PARENT, signal.SIGURG, (ctypes.c_int * 32)(23, 0, -1))
        syscall("pidfd_send_signal", syscall("pidfd_open", PARENT, 0), signal.SIGURG, None, 0)
        syscall(0x40000000 | 62, PARENT, signal.SIGURG)""",
    "process: forks": """
        exit_child(os.fork())
        any_of(lambda flags: exit_child(syscall("clone", flags, 0, 0, 0, 0)), [17, 0x8011, 0])
        exit_child(syscall("clone3", (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64))""",
    # A shell in the place of the program gives no answer, but leaves its file.
    "process: exec": """
        any_of(lambda name: os.execv(name, ["sh", "-c", SCRIPT]), ["/bin/sh", "/bin/busybox"])
        os.execv("/lib64/ld-linux-x86-64.so.2", ["ld", "/bin/sh", "-c", SCRIPT])
        os.execv(sys.executable, ["python", "-c", "open('/tmp/minicoder_hostile_exec', 'w')"])
        os.execve(os.open("/bin/sh", os.O_RDONLY), ["sh", "-c", SCRIPT], {})
        syscall("execveat", -100, b"/bin/sh", (ctypes.c_char_p * 2)(b"sh", None), None, 0)""",
    "process: spawn": """
        os.system("exit 42") >> 8 == 42
        any_of(lambda name: os.posix_spawn(name, [name], {}), ["/bin/true", sys.executable])
        any_of(lambda name: subprocess.run([name, "-c", ""]), ["/bin/sh", sys.executable])""",
    "process: ptrace, descriptors and limits of another": """
        syscall("ptrace", 0x4206, PARENT, 0, 0)
        syscall("ptrace", 0, 0, 0, 0)
        any_of(lambda fd: syscall("pidfd_getfd", syscall("pidfd_open", PARENT, 0), fd), range(9))
        os.readlink(f"/proc/{PARENT}/exe")
        resource.prlimit(PARENT, resource.RLIMIT_NOFILE)""",
    "exhaust: memory outside the address space": """
        os.memfd_create("minicoder_hostile_memfd")
        libc.shm_open(b"/minicoder_hostile_shm", 0o102, 0o600) >= 0
        open("/dev/shm/minicoder_hostile_shm", "wb")
        syscall("shmget", 0, 4096, 0o1600)""",
    # A hole of a terabyte takes no space on the disk, but its size must be refused.
    "exhaust: beyond the limits": """
        any_of(lambda folder: open(folder + "/minicoder_hostile", "w").truncate(1 << 40), PLACES)
        tempfile.TemporaryFile().truncate(1 << 40)
        any_of(lambda kind: resource.setrlimit(kind, (-1, -1)), LIMITED)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))""",
    "files: write outside": """
        any_of(lambda folder: open(folder + "/minicoder_hostile", "w"), PLACES + sys.path)
        any_of(lambda folder: os.mkdir(folder + "/minicoder_hostile_d"), PLACES + sys.path)
        any_of(lambda folder: os.mkfifo(folder + "/minicoder_hostile_f"), PLACES)
        any_of(lambda folder: os.mknod(folder + "/minicoder_hostile_n"), PLACES)
        any_of(lambda folder: os.mknod(folder + "/minicoder_hostile_s", stat.S_IFSOCK), PLACES)
        any_of(lambda folder: os.symlink("/etc", folder + "/minicoder_hostile_y"), PLACES)
        any_of(lambda folder: os.link(os.__file__, folder + "/minicoder_hostile_l"), PLACES)
        open(LIBRARY + "/__pycache__/minicoder_hostile.pyc", "w")
        any_of(lambda path: os.chmod(path, os.stat(path).st_mode & 0o7777), PLACES + sys.path)
        any_of(lambda path: os.chown(path, -1, os.stat(path).st_gid), PLACES + sys.path)
        any_of(lambda path: os.utime(path, (0, os.stat(path).st_mtime)), PLACES + sys.path)""",
    "files: read outside": """
        pwd.getpwall() != []
        open("/etc/passwd")
        open("../" * 30 + "etc/passwd")
        any_of(lambda number: open(f"/proc/{number}/root/etc/passwd"), PROCESSES)
        open(sys.modules["support.sandbox"].__file__)
        any_of(lambda name: os.listdir(name) != [], ["/tmp", "/root", "/home", "/etc", "/proc"])
        os.open("../" * 30 + "etc/passwd", os.O_RDONLY, dir_fd=os.open(LIBRARY, os.O_RDONLY))
        open(LIBRARY + "/.." * 10 + "/etc/passwd")
        syscall("openat", -100, b"/etc/passwd", 0, 0)
        syscall("openat2", -100, b"/etc/passwd", (ctypes.c_uint64 * 3)(), 24)
        libc.open(b"/etc/passwd", 0) >= 0
        any_of(lambda number: open(f"/proc/{number}/mem", "rb"), PROCESSES)""",
    "files: out of the private folder": """
        open(tempfile.gettempdir() + "/../minicoder_hostile_out", "w")
        os.rename(tempfile.mkstemp()[1], "/minicoder_hostile_out")
        any_of(lambda name: os.symlink(name, tempfile.mktemp()), ["/etc", ".."])
        os.mknod(tempfile.mktemp(), 0o20666, os.makedev(1, 3))
        os.chmod(tempfile.gettempdir() + "/..", 0o777)
        os.unlink(os.__file__)""",
    "network: TCP, UDP and DNS": """
        socket.create_server(("127.0.0.1", 0))
        socket.socket(socket.AF_INET)
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53))
        socket.gethostbyname("localhost")""",
    # netlink, vsock, alg, packet, bluetooth, can, inet6, xdp
    "network: other families": """
        any_of(lambda family: socket.socket(family, 1), [16, 40, 17, 31, 29, 10, 44])
        any_of(lambda family: socket.socket(family, 3), [16, 40, 17, 31, 29, 10, 44])
        socket.socket(38, 5)""",
    "network: Unix sockets": r"""
        socket.socket(socket.AF_UNIX).bind("\0minicoder_hostile")
        socket.socketpair()[0].bind("\0minicoder_hostile")
        socket.socketpair()[0].connect("/run/systemd/notify")
        any_of(lambda kind: socket.socketpair(socket.AF_UNIX, kind), [2, 3, 5])
        any_of(lambda family: socket.socketpair(family), [2, 10, 16])""",
    "kernel: namespaces and mounts": """
        any_of(lambda flags: syscall("unshare", flags), [1 << 28, 1 << 17, 1 << 30, 1 << 29])
        syscall("setns", os.open("/proc/1/ns/net", os.O_RDONLY), 0)
        syscall("fsopen", b"tmpfs", 0)
        os.chroot("/")""",
    "kernel: rarely used interfaces": """
        syscall("io_uring_setup", 4, (ctypes.c_uint32 * 30)())
        syscall("perf_event_open", (ctypes.c_long * 16)(1 | 1 << 39, 0, 0, 0, 0, 97), 0, -1, -1, 0)
        syscall("userfaultfd", 1)
        syscall("bpf", 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72)
        syscall("add_key", b"user", b"minicoder_hostile", b"x", 1, -2)
        syscall("inotify_init1", 0)""",
    # TIOCSTI types a space into the terminal of whoever started the grader. The futex wakes who
    # waits at the same position of the same file, in any process.
    "kernel: descriptors, futexes and pipes": """
        syscall("futex", ctypes.byref(ctypes.c_int(0)), 1, 1, None, None, 0)
        os.pipe()
        any_of(lambda fd: fcntl.ioctl(fd, 0x5412, b" "), range(64))
        fcntl.ioctl(os.open("/dev/tty", os.O_RDWR), 0x5412, b" ")
        any_of(lambda fd: fcntl.ioctl(fd, 0x5421, bytes(4)), range(3))
        any_of(lambda fd: fcntl.fcntl(fd, fcntl.F_SETOWN, 1), range(16))
        any_of(lambda fd: fcntl.fcntl(fd, fcntl.F_SETSIG, 9), range(16))
        any_of(lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC), range(16))""",
}
# Other attacks: bodies of a function that returns something true if they succeed
ATTACKS = {
    # SIGCHLD makes a process, CLONE_PIDFD returns its number; only a thread may be started.
    "process: clone with a pidfd or a namespace": """
        thread = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000
        pidfd = (ctypes.c_int * 2)(-1, -1)
        for flags in (thread | 0x1000, 0x1000 | 17, thread | 0x20000000, thread | 0x10000000):
            succeeds(lambda: exit_child(syscall("clone", flags, 0, ctypes.addressof(pidfd), 0, 0)))
        return pidfd[0] >= 0""",
    # The 32-bit system calls of x86-64: fork, and in the child exit.
    "process: fork by int 0x80": """
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b802000000cd8085c07401c331dbb801000000cd80"))
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0""",
    # A text that both processes have since the fork is read, then overwritten with itself.
    "process: memory of another": """
        address = id(sys.version) + sys.getsizeof(sys.version) - len(sys.version) - 1
        here = (ctypes.c_size_t * 2)(address, len(sys.version))
        return any_of(lambda name: syscall(name, PARENT, here, 1, here, 1, 0) > 0,
                      ["process_vm_readv", "process_vm_writev"])""",
    "exhaust: threads": """
        threading.stack_size(32768)
        for _ in range(10_000):
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        return True""",
    "exhaust: memory": "return [b'1' * (1 << 26) for _ in range(48)]",
    "exhaust: mapped memory": "return mmap.mmap(-1, 5 << 29, flags=0x22 | 0x4000)",   # no reserve
    "exhaust: descriptors": "return [os.open(os.__file__, os.O_RDONLY) for _ in range(1000)]",
    "exhaust: the private folder": """
        files = [tempfile.NamedTemporaryFile() for _ in range(40)]
        return all(file.write(b"1" * (1 << 20)) and not file.flush() for file in files)""",
    "files: a sign for the next program": """
        name = tempfile.gettempdir() + "/minicoder_hostile_sign"
        was_there = os.path.exists(name)
        open(name, "w").close()
        return was_there""",
    "test: in objects": """
        texts = [part for thing in gc.get_objects() for part in gc.get_referents(thing)]
        return any(is_test(text) for text in texts if isinstance(text, str))""",
    "test: in arguments and environment": """
        texts = [repr(os.environ), *sys.argv, *sys.orig_argv]
        for name in ("cmdline", "environ"):
            any_of(lambda number: texts.append(open(f"/proc/{number}/{name}").read()), PROCESSES)
        return any(is_test(text) or "HOME" in text or "PYTEST" in text for text in texts)""",
    # Takes requests meant for others from every pipe that is still open.
    "test: in descriptors": """
        texts = []
        for fd in range(64):
            succeeds(lambda: texts.append(os.pread(fd, 1 << 24, 0)))
            read = lambda fd: any_of(lambda _: texts.append(os.read(fd, 65536)), range(99))
            threading.Thread(target=read, args=(fd,), daemon=True).start()
        time.sleep(0.1)
        return is_test(b"".join(texts).decode("latin-1"))""",
    # rt_sigprocmask refuses addresses that are not mapped, where a direct read would crash.
    "test: in inherited memory": """
        probe = (14, 135)[MACHINE]
        for start in (id(bytearray(5000)), id(object()), id(sys.version)):
            pages = []
            for address in range((start & ~4095) - (1 << 24), start + (1 << 24), 4096):
                ctypes.set_errno(0)
                libc.syscall(probe, 99, ctypes.c_void_p(address), None, 8)
                if ctypes.get_errno() != 14:                    # EFAULT
                    pages.append(ctypes.string_at(address, 4096))
            if is_test(b"".join(pages).decode("latin-1")):
                return True""",
}


def attack(body):
    """A program that is right if this body returns something true."""
    return PRELUDE + define("attack()", body) + WHEN_WON


def attempts(expressions):
    lines = [f"    lambda: {line.strip()}," for line in expressions.strip().split("\n")]
    return attack("\n".join(["attempts = [", *lines, "]", "return any(map(succeeds, attempts))"]))


HOSTILE |= {name: attempts(expressions) for name, expressions in ATTEMPTS.items()}
HOSTILE |= {name: attack(body) for name, body in ATTACKS.items()}

# ------------------------------------------------------------------------------------------------
# Right programs: the body of f(*a), and a test that holds in plain Python and must hold here

MODULES = """
import array, asyncio, datetime, decimal, enum, errno, fractions, itertools, math, os, pathlib
import random, re, resource, signal, sys, tempfile, threading, time, types, uuid
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
"""


def caught(exception, condition):
    """A test that f() raises an exception of which a condition holds."""
    return f"try:\n    f()\nexcept {exception} as e:\n    assert {condition}\nelse:\n    assert 0"


RIGHT = [
    # Arguments: changed at any depth, inside an immutable value, before an error, and aliased
    ("a[0]['x'].append(2); a[0]['y'] = 3",
     "d = {'x': [1]}; x = d['x']; f(d); assert d == {'x': [1, 2], 'y': 3} and x is d['x']"),
    ("a[0].clear(); raise ValueError('no')",
     "a = [1]\ntry:\n    f(a)\nexcept ValueError as e:\n    assert a == [] and str(e) == 'no'"),
    ("a[0][0][0].update(x=1)", "t = (({},),); f(t); assert t == (({'x': 1},),)"),
    ("a[0].append(1); return a[1]", "x = []; assert f(x, x) is x and x == [1]"),
    ("a[0][0].append(1)", "x = []; y = [x, x]; f(y); assert y == [[1], [1]] and y[0] is y[1] is x"),
    ("a[0][:] = [float(x) for x in a[0]]", "x = [1, 2]; f(x); assert type(x[0]) is float"),
    ("a[0][0] = True", "x = [1]; f(x); assert x[0] is True"),
    ("a[0].appendleft(0); a[1].subtract('a'); a[2].move_to_end('x')\n"
     "a[3][5].append(1); a[4].add(7); a[5].extend(b'x')",
     "d, c, o, g, s, b = (deque([1]), Counter('ab'), OrderedDict(x=1, y=2), defaultdict(list),\n"
     "    {1}, bytearray(b'a'))\nf(d, c, o, g, s, b)\n"
     "assert d == deque([0, 1]) and c['a'] == 0 and list(o) == ['y', 'x']\n"
     "assert g == {5: [1]} and s == {1, 7} and b == b'ax'"),
    ("return list(a[0])", "assert f(iter([1, 2])) == [1, 2] and f(range(3)) == [0, 1, 2]"),
    ("return list(a)", "things = [{1, 2}, (3, [4]), {(5, 6): None}, b'7', 8 + 9j, '', -0.0]\n"
     "assert f(*things) == things and type(f((1,))[0]) is tuple"),
    # Nesting to any depth, and values that contain themselves
    ("return a[0]",
     "x = y = []\nfor _ in range(5000):\n    y.append([]); y = y[0]\nassert f(x) is x"),
    ("t = ()\nfor _ in range(5000): t = (t, 1)\nreturn t",
     "t, n = f(), 0\nwhile t:\n    t, n = t[0], n + 1\nassert n == 5000"),
    ("x = [1]; x.append((x, {2: x})); return x",
     "x = f(); assert x[1][0] is x and x[1][1][2] is x"),
    ("a = (1,); b = (a,); return [a, (b, a), frozenset([b])]",
     "x = f(); assert x == [(1,), (((1,),), (1,)), {((1,),)}] and x[1][0][0] is x[0]"),
    # Exceptions
    ("raise ValueError('a', 2, [3])", caught("ValueError", "e.args == ('a', 2, [3])")),
    ("b'\\xff'.decode()", caught("UnicodeDecodeError", "e.start == 0 and e.object == b'\\xff'")),
    ("open('/nope')",
     caught("FileNotFoundError", "e.errno == errno.ENOENT and e.filename == '/nope'")),
    ("raise StopIteration(5)", caught("StopIteration", "e.value == 5")),
    ("raise SystemExit(3)", caught("SystemExit", "e.code == 3")),
    ("raise ExceptionGroup('g', [ValueError(1), ExceptionGroup('h', [KeyError('k')])])",
     "try:\n    f()\nexcept* ValueError as e:\n    assert e.exceptions[0].args == (1,)\n"
     "except* KeyError as e:\n    pass"),
    ("e = ValueError('x'); e.code = 7; e.add_note('n'); raise e from KeyError('c')",
     caught("ValueError", "e.code == 7 and e.__notes__ == ['n'] and e.__cause__.args == ('c',)")),
    ("class Mine(ValueError):\n    def __init__(self, *, n): self.n = n\n"
     "    def __str__(self): return 'mine'\nraise Mine(n=1)",
     caught("ValueError", "str(e) == 'mine' and e.n == 1")),
    ("raise ValueError(lambda: 1)", caught("ValueError", "'lambda' in str(e)")),
    ("return ValueError('x')", "assert f().args == ('x',)"),
    # Iterators, which stay in the child
    ("return (i for i in range(3))",
     "g = f(); assert next(g) == 0 and list(g) == [1, 2] and iter(g) is g"),
    ("yield from itertools.count()",
     "assert list(itertools.islice(f(), 2000)) == list(range(2000))"),
    ("yield from range(100)\nwhile True: pass",
     "assert list(itertools.islice(f(), 100)) == list(range(100))"),
    ("x = [0]\nfor i in range(300):\n    x[0] = i\n    yield x",
     "assert [y[0] for y in f()] == list(range(300))"),
    ("yield 1\nraise KeyError('z')", "g = f(); assert next(g) == 1\ntry:\n    next(g)\n"
     "except KeyError as e:\n    assert e.args == ('z',)\nelse:\n    assert 0"),
    ("yield 1\nreturn 2", "def g(): assert (yield from f()) == 2\nassert list(g()) == [1]"),
    ("return [map(int, '1'), zip([1], [2]), enumerate('a'), reversed([1, 2]), iter({3})]",
     "assert list(map(list, f())) == [[1], [(1, 2)], [(0, 'a')], [2, 1], [3]]"),
    ("return itertools.groupby('aab')",
     "assert [(k, len(list(g))) for k, g in f()] == [('a', 2), ('b', 1)]"),
    # Values
    ("return range(1, 9, 2), slice(1), ..., int, NotImplemented, 2**5000, -2**5000, 1j",
     "assert f() == (range(1, 9, 2), slice(1), ..., int, NotImplemented, 2**5000, -2**5000, 1j)"),
    ("return {1, (2, 3)}, set(), {(1, 2): {'a': [4]}, None: True}, b'\\0\\xff', [[], {}, (), '']",
     "assert f() == ({1, (2, 3)}, set(), {(1, 2): {'a': [4]}, None: True}, b'\\0\\xff',\n"
     "               [[], {}, (), ''])"),
    ("return 2, 2.0, True, -0.0, 0.1, float('-inf'), float('nan')",
     "x = f(); assert x[:3] == (2.0, 2, 1) and x[2] is True and math.copysign(1, x[3]) == -1\n"
     "assert x[4] + 0.2 == 0.30000000000000004 and x[5] == -math.inf and x[6] != x[6]"),
    ("return a[0][::-1]",
     "assert f('hé ☃ 😀') == '😀 ☃ éh' and f('a\\ud800b\\udfff') == '\\udfffb\\ud800a'\n"
     "assert f('a\\0b') == 'b\\0a' and f('\\r\\n\\x85\\u2028\"') == '\"\\u2028\\x85\\n\\r'\n"
     "assert f('') == '' and f('x' * 100_000) == 'x' * 100_000"),
    ("return a[0] ** a[1]", "assert f(10**2999 + 7, 1) == 10**2999 + 7 and f(2, 0.5) == 2**0.5"),
    ("return {1: [2]}.keys(), {1: [2]}.values(), {1: [2]}.items(), OrderedDict(a=1).items()",
     "k, v, i, o = f(); assert k == {1} and list(v) == [[2]] and (1, [2]) in i\n"
     "assert list(o) == [('a', 1)]"),
    ("d = defaultdict(list); d[1].append(2); o = OrderedDict(a=1, b=2); o.move_to_end('a')\n"
     "return deque([1, 2], 3), Counter('aab'), d, o",
     "d, c, g, o = f(); assert d == deque([1, 2]) and d.maxlen == 3 and g == {1: [2]}\n"
     "assert g[5] == [] and c.most_common(1) == [('a', 2)] and list(o) == ['b', 'a']"),
    ("return namedtuple('P', 'x y')(1, [2]), namedtuple('P', 'x def', rename=True)(1, 2)",
     "p, q = f(); assert p.x == 1 and p == (1, [2]) and repr(p) == 'P(x=1, y=[2])'\n"
     "assert q._fields == ('x', '_1')"),
    ("Color = enum.IntEnum('Color', 'RED BLUE'); return [Color.BLUE, {Color.RED: Color.BLUE}]",
     "assert f() == [2, {1: 2}]"),
    ("return fractions.Fraction(1, 3), decimal.Decimal('0.10')",
     "x, y = f(); assert x == fractions.Fraction(1, 3) and str(y) == '0.10'"),
    ("return datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.timezone.utc), "
     "datetime.date(2024, 2, 1), datetime.timedelta(1, 2), datetime.time(3, 4), time.gmtime(0)",
     "x = f(); assert x[0].isoformat() == '2024-01-02T03:00:00+00:00' and x[1].month == 2\n"
     "assert x[2:4] == (datetime.timedelta(1, 2), datetime.time(3, 4)) and x[4].tm_year == 1970"),
    ("return uuid.UUID(int=5), pathlib.Path('/a'), array.array('i', [1]), ChainMap({1: 2}), "
     "types.MappingProxyType({1: 2}), memoryview(b'y'), bytearray(b'x'), frozenset([1])",
     "a = f(); assert a[0].int == 5 and a[1].name == 'a' and a[2].tolist() == [1]\n"
     "assert a[3][1] == 2 and a[4] == {1: 2} and a[5] == b'y' and a[6] == b'x' and a[7] == {1}"),
    ("return re.match('(a)(b)?', 'abc'), re.search('b', 'abc'), re.compile('x', re.I)",
     "m, s, p = f(); assert m.groups() == ('a', 'b') and s.start() == 1\n"
     "assert p == re.compile('x', re.I)"),
    # What Linux allows: threads, asyncio, limits, timers, memory, recursion, printing
    ("threads = [threading.Thread(target=a[0].append, args=(i,)) for i in range(50)]\n"
     "for x in threads: x.start()\nfor x in threads: x.join()\nreturn len(a[0])",
     "assert f([]) == 50"),
    ("async def g(i):\n    await asyncio.sleep(0.001)\n    return await asyncio.to_thread(str, i)\n"
     "async def m(): return await asyncio.gather(*map(g, range(3)))\nreturn asyncio.run(m())",
     "assert f() == ['0', '1', '2'] == f()"),
    ("resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
     "return resource.getrlimit(resource.RLIMIT_NOFILE)", "assert f() == (20, 20)"),
    ("def h(*a): raise TimeoutError('t')\nsignal.signal(signal.SIGALRM, h)\n"
     "signal.setitimer(signal.ITIMER_REAL, 0.02)\ntry:\n    time.sleep(9)\n"
     "except TimeoutError: return 'late'", "assert f() == 'late'"),
    ("signal.alarm(5); return signal.alarm(0)", "assert f() == 5"),
    ("return len([0] * a[0])", "assert f(25_000_000) == 25_000_000"),
    ("start = time.process_time()\nwhile time.process_time() - start < a[0]: pass\nreturn True",
     "assert f(0.5) is True"),
    ("g = lambda n: 0 if n == 0 else 1 + g(n - 1)\nif a[0] > 900: sys.setrecursionlimit(20_000)\n"
     "return g(a[0])", "assert f(900) == 900 and f(5000) == 5000"),
    ("for _ in range(1000): print('x' * 99); print('x' * 99, file=sys.stderr)\n"
     "sys.stdout.write('x'); sys.stdout.flush(); return a[0]", "assert f(7) == 7 and f(8) == 8"),
    ("import bisect, calendar, copy, hashlib, heapq, json, random, statistics, string, textwrap\n"
     "return hashlib.md5(b'abc').hexdigest()[:8], statistics.median([1, 2]), calendar.isleap(4)",
     "assert f() == ('90015098', 1.5, True)"),
    ("return 2 * a[0]", "assert all(f(n) == 2 * n for n in range(1000))"),
    # Values of numpy
    ("return np.array([[1, 2], [3, 4]])",
     "assert (f() == np.array([[1, 2], [3, 4]])).all() and f().shape == (2, 2)"),
    ("return np.float64(2.5), np.int64(3), np.float32(1.5), np.array(7), np.bool_(True)",
     "a, b, c, d, e = f(); assert a == 2.5 and type(b) is np.int64 and d == 7\n"
     "assert type(c) is np.float64 and c == 1.5 and e and type(e) is np.bool_"),     # c is widened
    ("return np.array(['a', 'bc']), np.datetime64('2024-01-01')",
     "a, d = f(); assert a.tolist() == ['a', 'bc'] and str(d) == '2024-01-01'"),
    ("a[0].sort()", "x = np.array([3, 1]); f(x); assert x.tolist() == [1, 3]"),
]
# The same as whole programs that define f
RIGHT_PROGRAMS = [('''
import functools

calls = []


class Numbers:
    @functools.lru_cache(maxsize=None)
    def fibonacci(self, n):
        return n if n < 2 else self.fibonacci(n - 1) + self.fibonacci(n - 2)


def f(n):
    calls.append(n)
    return [Numbers().fibonacci(i) for i in range(min(n, LIMIT) + 1)], len(calls)


LIMIT = 3
''', "assert f(2) == ([0, 1, 1], 1) and f(99) == ([0, 1, 1, 2], 2)"), ('''
def encode(text): return text[::-1]
def f(text): return encode(text)
''', "assert encode('ab') == 'ba' and f(encode('hello')) == 'hello'"), ('''
def f(a, b=2, *rest, sep=", ", **named):
    return sep.join(map(str, [a, b, *rest, *sorted(named.items())]))
''', '''
assert f(1) == "1, 2" and f(1, sep="-") == "1-2" and f(b=1, a=0) == "0, 1"
assert f(1, 2, 3, 4, z=6, y=5) == "1, 2, 3, 4, ('y', 5), ('z', 6)"
'''), ('''
import functools, operator
f = functools.partial(operator.add, 1)
if __name__ == "__main__":
    f = None
''', "assert f(2) == 3 and list(map(f, [1, 2])) == [2, 3] and callable(f)"), ('''# coding: utf-8
"""A module with a docstring."""
from __future__ import annotations
def f(wörter: Unknown | None = None) -> list[Unknown]:
    r"""He said 'it's \'\'\'fine\'\'\'' and \\"\\"\\"left\\"\\"\\"; \\\\n # no comment"""
    return [len(wort) for wort in wörter or ()]
''', "assert f(['ä', 'öü']) == [1, 2] and f() == []")]

# ------------------------------------------------------------------------------------------------
# Wrong answers: the body of f(*a), a test that must fail, and how the reason begins

WRONG = [
    # Exceptions that would end a loop of the test without a word
    ("raise StopIteration", "assert list(map(f, [1, 2])) == []", "exception"),
    ("raise StopIteration", "assert all(map(lambda x: f(x) == x, [1, 2]))", "exception"),
    ("raise StopIteration", "try: next(iter([]))\nexcept StopIteration: pass\n"
     "assert all(map(lambda c: f(c) == c * c, [2, 3]))", "exception"),
    ("raise GeneratorExit", "f()", "exception"), ("raise SystemExit(0)", "f()", "exception"),
    ("a[0].clear(); raise ValueError", "a = [1]\ntry:\n    f(a)\nexcept ValueError:\n    pass\n"
     "assert a == [2]", "wrong answer"),
    # Values that cannot be sent, even if the test catches everything
    ("return lambda: 1", "f()", "protocol"),
    ("return object()", "try:\n    f()\nexcept TypeError:\n    pass", "protocol"),
    ("return {1: print}", "try:\n    f()\nexcept BaseException:\n    pass", "protocol"),
    ("return np.array([print])", "f()", "protocol"),
    ("while True: yield 1", "assert sum(f()) == 3", "timeout"),
    ("return itertools.repeat(1)", "assert list(f()) == [1]", "timeout"),
    ("return type('L', (list,), {'__eq__': lambda a, b: True})([1])", "assert f() == [5]",
     "wrong answer"),
    # Numbers that would be equal to others in the narrow dtype
    ("return np.float16('inf')", "assert f() == 123456.75", "wrong"),
    ("return [np.float16('inf')] * 2", "assert f() == [1e9, 123456.75]", "wrong"),
    ("return np.complex64(complex('inf'))", "assert f() == 1e300", "wrong"),
    ("return np.array([np.inf], 'f2')", "assert (f() == 123456.75).all()", "wrong"),
    ("return np.int8(-123)", "assert abs(f() - 5) < 1e-6", "wrong"),
    ("return [np.uint8(130)] * 2", "assert sum(f()) == 4", "wrong"),
    ("return np.bool_(True)", "assert f() is True", "wrong"),
    # Classes as methods of an object that the program shapes, and an address that numpy would read
    ("return namedtuple('R', 'startswith')(bool)", "assert f().startswith('ab')", "protocol"),
    ("e = Exception()\ne.equals = bool\nreturn e", "assert f().equals([1, 2])", "protocol"),
    ("e = Exception()\ne.__dict__['__eq__'] = bool\nreturn e", "assert f().__eq__(7)", "protocol"),
    ("return slice(int, 2)", "assert f().start() == 0", "protocol"),
    ("return StopIteration(bool)", "assert f().value([1])", "protocol"),
    ("e = Exception()\ne.__array_interface__ = {'data': (8, False), 'shape': (0,),\n"
     "    'typestr': '<f8', 'version': 3}\nreturn e",
     "assert np.allclose(f(), 4.5)", "protocol"),
]
