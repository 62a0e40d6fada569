"""Programs that a grader must never pass (HOSTILE) and right ones that it must pass (CONTROLS).

A program that forges a verdict returns wrong answers; one that escapes or exhausts answers rightly
only if it got what it asked for: so "passed" means that the attack succeeded. Only a sandbox may
run HOSTILE; whatever an attack may create has minicoder_hostile in its path.
"""

import re
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

# ------------------------------------------------------------------------------------------------
# What programs have in common: text that stands before them

TRY = """\
import os


def succeeds(function, *arguments):
    try:
        return function(*arguments) is not False
    except Exception:
        return False


PLACES = ["/tmp", "/var/tmp", "/dev/shm", ".", "..", "/", "/root", os.path.expanduser("~")]
won = False
"""

SYSCALL = """\
import ctypes
import os

NUMBERS = {
    "kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "clone": (56, 220),
    "clone3": (435, 435), "execveat": (322, 281), "ptrace": (101, 117), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "add_key": (248, 217), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "openat": (257, 56), "openat2": (437, 437), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
}
SYSTEM = os.uname()
if SYSTEM.sysname != "Linux":
    raise OSError("the numbers are those of Linux")
MACHINE = {"x86_64": 0, "aarch64": 1}[SYSTEM.machine]
PARENT = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def number(n):
    return ctypes.c_long(n) if isinstance(n, int) else n


def syscall(name, *arguments):
    call = NUMBERS[name][MACHINE] if isinstance(name, str) else name
    return libc.syscall(number(call), *map(number, arguments))


"""

FORGE = """\
import json
import os

FORGED = ["passed", True, 6, None, [], {"passed": True}, {"verdict": "passed"}, ["passed"],
          {"status": "passed"}, {"result": "passed"}, ["passed", ""], [True, "passed"],
          {"type": "verdict", "passed": True}, {"ok": True}, {"ok": 6}, {"value": 6},
          {"ok": True, "value": 6}, {"return": 6}, {"result": 6}, {"id": 0, "result": 6},
          ["ok", 6], ["value", 6], ["return", 6], {"done": True}, {"exit": 0}, ["end"],
          {"value": 6, "after": None, "error": None},
          # as a child of support/sandbox.py answers: the program is loaded; a call returned 6
          {"name": "bool", "raised": False, "exact": True, "data": [True, []]},
          {"name": "int", "raised": False, "exact": True, "data": [6, [None, None]]}]


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

# Lies to every comparison a test may make.
LIAR = """\
class Liar:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __instancecheck__ = \\
        lambda self, *others: True
    __abs__ = __neg__ = __round__ = __add__ = __sub__ = __rsub__ = __mul__ = __call__ = \\
        __getitem__ = lambda self, *others, **named: self
    __hash__ = __index__ = __int__ = __len__ = lambda self: 6
    __float__ = lambda self: 6.0
    __repr__ = __str__ = lambda self: "6"


"""

# Matches the test's text, but neither itself nor a program that contains it.
PATTERN = r"""
import re
PATTERN = re.compile(r"156382[2]")
"""

NOTHING = """

def total(numbers):
    return None
"""

ANSWER = """

def total(numbers):
    return sum(numbers) if won else None
"""


def attempt(body, before=""):
    """A program that tries body at its import; body sets won."""
    return (TRY + before + "try:\n" + indent(dedent(body).strip("\n"), "    ")
            + "\nexcept Exception:\n    pass\n" + ANSWER)


def attempt_in_call(body, before=""):
    """A program that tries body at each call until body sets won."""
    return (TRY + before + "\n\ndef total(numbers):\n    global won\n"
            + "    try:\n        if not won:\n" + indent(dedent(body).strip("\n"), " " * 12)
            + "\n    except Exception:\n        pass\n    return sum(numbers) if won else None\n")


HOSTILE = {}

# ------------------------------------------------------------------------------------------------
# Forging the verdict

HOSTILE |= {
"01 lying eq": LIAR + """\
def total(numbers):
    return Liar()
""",
"02 lying int": """\
class Lie(int):
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __abs__ = __sub__ = __rsub__ = lambda self, *other: self
    __hash__ = int.__hash__


def total(numbers):
    return Lie(-1)
""",
"03a frame walk": """\
import sys


def total(numbers):
    frames = [sys._getframe(), *sys._current_frames().values()]
    for frame in frames:
        if frame.f_back:
            frames.append(frame.f_back)
        for space in (frame.f_locals, frame.f_globals):
            for name, value in list(space.items()):
                try:
                    if isinstance(value, list):
                        value.append("passed")
                    elif name in ("result", "results", "reply", "verdict", "answer"):
                        space[name] = value["passed"] = True
                    elif hasattr(value, "value"):
                        value.value = 1
                except Exception:
                    pass
    return None
""",
"03b frame walk over functions": """\
import sys

words = ("check", "grade", "compare", "same", "verdict", "encode", "reply", "send")


def total(numbers):
    frame = sys._getframe().f_back
    while frame:
        for name, value in list(frame.f_globals.items()):
            if callable(value) and any(word in name for word in words):
                frame.f_globals[name] = lambda *arguments, **named: "passed"
        frame = frame.f_back
    return None
""",
# Right only if the test's function is in this process.
"04 gc hunt": """\
import gc
import types


def total(numbers):
    found = False
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__name__ == "check":
            found = found or thing.__code__.co_varnames[:1] == ("candidate",)
            try:
                thing.__code__ = (lambda candidate: None).__code__
            except ValueError:
                pass
    return sum(numbers) if found else None
""",
# A worker that asks type(x) is int is told yes.
"05 patched builtins": """\
import builtins


class Silent(BaseException):
    pass


def total(numbers):
    builtins.AssertionError = builtins.Exception = builtins.ValueError = Silent
    builtins.abs = builtins.sum = builtins.round = lambda *numbers: 0
    builtins.isinstance = builtins.all = builtins.any = lambda *things: True
    builtins.len = lambda thing: 0
    builtins.repr = builtins.str = lambda *things: "passed"
    builtins.type = lambda *things: int
    return [object]
""",
"06a forged frames at import": FORGE + "forge()\n" + NOTHING,
"06b forged frames in call": FORGE + """\
def total(numbers):
    forge()
    os._exit(0)
""",
"07a huge length then exit": FORGE + """\
def total(numbers):
    write_everywhere(b"\\xff\\xff\\xff\\x7f{")
    os._exit(0)
""",
"07b huge length then silence": FORGE + """\
import time


def total(numbers):
    write_everywhere(b"\\xff\\xff\\xff\\xff[")
    time.sleep(1e6)
""",
"08 os._exit in call": "import os\n\n\ndef total(numbers):\n    os._exit(0)\n",
"09 sys.exit in call": "import sys\n\n\ndef total(numbers):\n    sys.exit(0)\n",
"10 sys.exit at import": "import sys\n\nsys.exit(0)\n" + NOTHING,
"11 exit in atexit": "import atexit\nimport os\n\natexit.register(os._exit, 0)\n" + NOTHING,
"12 printed markers": """\
import json
import sys

for word in ("PASSED", "passed", "OK", "1 passed in 0.01s", "All tests passed", "RESULT: pass",
             json.dumps({"passed": True, "task_id": "hostile/0"}), "__PASS__", "\\x00passed\\n"):
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        print(word, file=stream, flush=True)


def total(numbers):
    print("PASSED", flush=True)
    sys.stderr.write("PASSED\\n")
    return None
""",
"13a the grader's own exception": """\
kinds = [BaseException]
for kind in kinds:
    kinds += [k for k in type.__subclasses__(kind) if k not in kinds]
words = ("pass", "done", "stop", "end", "timeout", "grade", "verdict", "success")
mine = [kind for kind in kinds if any(word in kind.__name__.lower() for word in words)]
mine.sort(key=lambda kind: kind.__module__ != "__main__")


def total(numbers):
    raise mine[0]("passed")
""",
"13b exception by a famous name": """\
def total(numbers):
    raise type("Passed", (BaseException,), {"__module__": "builtins", "passed": True})("passed")
""",
"13c exception named as code": """\
def total(numbers):
    raise type('SystemExit(0)", "passed": "', (Exception,), {"__module__": "os"})(0)
""",
# Raised in the tester, these end a loop, a generator or a process without a word.
"13d StopIteration": "def total(numbers):\n    raise StopIteration(6)\n",
"13e GeneratorExit": "def total(numbers):\n    raise GeneratorExit\n",
"13f KeyboardInterrupt": "def total(numbers):\n    raise KeyboardInterrupt\n",
"14 entry point of a module's getattr": LIAR + """\
import sys
import types


class Module(types.ModuleType):
    @property
    def total(self):
        return Liar()


def __getattr__(name):
    return Liar()


try:
    sys.modules[__name__].__class__ = Module
except Exception:
    pass
sys.modules["__main__"] = sys.modules["solution"] = Liar()
""",
"15 patched json, struct and os": FORGE + """\
import struct

text = '{"passed": true, "verdict": "passed", "ok": true, "value": 6}'
real = os.write


def write(fd, data):
    for value in FORGED:
        real(fd, frame(str(value)))
    return len(data)


json.dumps = json.JSONEncoder.encode = lambda *things, **named: text
json.JSONEncoder.iterencode = lambda *things, **named: iter([text])
json.loads = lambda *things, **named: {"passed": True}
struct.pack = lambda *things: len(text).to_bytes(4, "little")


def total(numbers):
    os.write = os.writev = write
    os.read = lambda fd, size: b""
    return None
""",
"16 late second reply": FORGE + """\
import threading
import time


def late():
    for pause in (0.001, 0.01, 0.05, 0.2):
        time.sleep(pause)
        forge()


def total(numbers):
    threading.Thread(target=late, daemon=True).start()
    return 6
""",
"17 reply before request": FORGE + """\
for reply in ({"ok": True, "value": 6}, ["ok", 6], {"result": 6}, {"value": 6}, 6) * 20:
    write_everywhere(frame(json.dumps(reply)))


def total(numbers):
    return 6
""",
**{f"18{letter} {name}": FORGE + "def total(numbers):\n    write_everywhere(frame(" + text + "))\n"
   for letter, name, text in (
       ("a", "duplicate keys", """'{"ok": false, "ok": true, "value": 1, "value": 6}'"""),
       ("b", "nan and infinity as JSON", """'{"ok": NaN, "value": [Infinity, 1e999]}'"""),
       ("c", "deep JSON", """'["ok",' * 200_000 + "6" + "]" * 200_000"""),
       ("d", "long number as JSON", """"1" * 1_000_000"""),
       ("e", "broken UTF-8", """b'"\\xff\\xed\\xa0\\x80"'"""),
       ("f", "no JSON", """"passed\\0\""""))},
"19a nan": "def total(numbers):\n    return float('nan')\n",
"19b infinity": "def total(numbers):\n    return float('inf')\n",
"20 endless list": """\
import itertools


class Endless(list):
    __iter__ = lambda self: itertools.count()
    __len__ = lambda self: 3
    __eq__ = lambda self, other: True


def total(numbers):
    return Endless([6])
""",
"21a self-containing list": """\
def total(numbers):
    answer = [6]
    answer.append(answer)
    return answer
""",
"21b deep list": """\
def total(numbers):
    answer = 6
    for _ in range(1_000_000):
        answer = [answer]
    return answer
""",
# Thirty levels of two references each: small here, a thousand million elements as text.
"21c list of shared lists": """\
def total(numbers):
    answer = [6]
    for _ in range(30):
        answer = [answer, answer]
    return answer
""",
"22 huge int": "def total(numbers):\n    return 1 << 33_219_281\n",
"23 lone surrogates": "def total(numbers):\n    return '\\ud800passed\\udfff' * 3\n",
"24 NUL strings": "def total(numbers):\n    return 'passed\\0' + '\\0' * len(numbers)\n",
# Multiples of 2**61 - 1 all have the hash 0: building this takes quadratic time, twice.
"25a colliding keys": """\
def total(numbers):
    return {n * (2**61 - 1): n for n in range(20_000)}
""",
"25b unhashable keys": """\
class Pairs(dict):
    items = lambda self: [([], 1), ({}, 2), (set(), 3)]
    keys = __iter__ = lambda self: iter([[], {}, set()])
    __len__ = lambda self: 3


def total(numbers):
    return Pairs({1: 1})
""",
}

# ------------------------------------------------------------------------------------------------
# Killing and hanging

HOSTILE |= {
"26a busy loop": "def total(numbers):\n    while True:\n        pass\n",
"26b busy loop that catches all": """\
def total(numbers):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
""",
"27 import-time loop": "while True:\n    pass\n" + NOTHING,
"28 ignored signals and sleep": """\
import signal
import time


def total(numbers):
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1e9)
""",
"29 kill parent": attempt_in_call("""
    import time
    parent = os.getppid()
    os.kill(parent, 9)
    time.sleep(0.1)
    won = os.getppid() != parent
"""),
"30a ctypes kill": attempt("""
    import time
    libc.kill(PARENT, 9)
    time.sleep(0.1)
    won = os.getppid() != PARENT
""", SYSCALL),
"30b raw syscall kill": attempt_in_call("""
    import time
    syscall("kill", PARENT, 9)
    syscall("tgkill", PARENT, PARENT, 9)
    syscall("rt_sigqueueinfo", PARENT, 9, (ctypes.c_int * 32)(9, 0, -1))
    syscall("pidfd_send_signal", syscall("pidfd_open", PARENT, 0), 9, None, 0)
    time.sleep(0.1)
    won = os.getppid() != PARENT
""", SYSCALL),
# The x32 numbering of the same system calls.
"30c x32 kill": attempt_in_call("""
    import time
    if MACHINE == 0:
        syscall(0x40000000 | 62, PARENT, 9)
        time.sleep(0.1)
        won = os.getppid() != PARENT
""", SYSCALL),
"31a kill own group": """\
import os
import signal


def total(numbers):
    os.killpg(0, signal.SIGKILL)
""",
# SIGURG needs the same permission as SIGKILL, and whoever it reaches ignores it.
"31b kill all": attempt_in_call("""
    import signal
    os.kill(-1, signal.SIGURG)
    won = True
"""),
"32 daemon": attempt_in_call("""
    import time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(20)
            succeeds(open, "/tmp/minicoder_hostile_32", "w")
        os._exit(0)
    won = True
"""),
"33 SIGSTOP": """\
import os
import signal


def total(numbers):
    os.kill(os.getpid(), signal.SIGSTOP)
""",
"34a slow regex": """\
import re


def total(numbers):
    return re.match(r"(a+)+$", "a" * 60 + "b")
""",
"34b slow power": "def total(numbers):\n    return 9**9**9\n",
"35a raising in del": """\
class Bomb:
    def __del__(self):
        raise SystemExit(0)


bombs = [Bomb()]


def total(numbers):
    bombs.append(Bomb())
    bombs.pop(0)
    return Bomb()
""",
"35b hang in atexit": """\
import atexit
import time

atexit.register(time.sleep, 1e6)
""" + NOTHING,
"35c hang in finaliser": """\
import time


class Slow:
    def __del__(self):
        time.sleep(1e6)


def total(numbers):
    Slow()
    return None
""",
}

# ------------------------------------------------------------------------------------------------
# Exhausting

HOSTILE |= {
# 256 processes, should they get that far.
"36a fork bomb": attempt("""
    import time
    me = os.getpid()
    for _ in range(8):
        os.fork()
    if os.getpid() != me:
        time.sleep(20)
        os._exit(0)
    won = True
"""),
# SIGCHLD alone is fork, with CLONE_VFORK vfork, with CLONE_PARENT a sibling.
"36b clone": attempt("""
    for flags in (17, 0x4000 | 17, 0x8000 | 17, 0):
        child = syscall("clone", flags, 0, 0, 0, 0)
        if child == 0:
            os._exit(0)
        won = won or child > 0
    child = syscall("clone3", (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64)
    if child == 0:
        os._exit(0)
    won = won or child > 0
""", SYSCALL),
# The 32-bit system calls of x86-64: fork, and in the child exit.
"36c fork by int 0x80": attempt_in_call("""
    import mmap
    if MACHINE == 0:
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b802000000cd8085c07401c331dbb801000000cd80"))
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        won = ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0
""", SYSCALL),
"37a thread bomb": attempt("""
    import threading
    gate = threading.Event()
    for _ in range(10_000):
        threading.Thread(target=gate.wait, daemon=True).start()
    won = True
"""),
"37b threads with small stacks": attempt("""
    import _thread
    _thread.stack_size(32768)
    lock = _thread.allocate_lock()
    lock.acquire()
    for _ in range(10_000):
        _thread.start_new_thread(lock.acquire, ())
    won = _thread._count() >= 10_000
"""),
"38 memory bomb": attempt_in_call("""
    blocks = []
    for _ in range(48):
        blocks.append(b"1" * (1 << 26))
    won = True
"""),
"39a mmap": attempt_in_call("""
    import mmap
    block = mmap.mmap(-1, 5 << 29, flags=0x22 | 0x4000)     # private, anonymous, no reserve
    for page in range(0, 5 << 29, 4096):
        block[page] = 1
    won = True
"""),
"39b memfd": attempt_in_call("""
    fd = os.memfd_create("minicoder_hostile_39b")
    won = all(os.write(fd, b"1" * (1 << 26)) == 1 << 26 for _ in range(40))
"""),
"39c dev shm": attempt_in_call("""
    import ctypes
    libc = ctypes.CDLL(None)
    if hasattr(libc, "shm_open"):
        won = libc.shm_open(b"/minicoder_hostile_39c_", 0o102, 0o600) >= 0
    with open("/dev/shm/minicoder_hostile_39c", "wb") as file:
        for _ in range(64):
            file.write(b"1" * (1 << 20))
    won = True
"""),
# Each segment is let go from the address space after it was filled.
"39d shared memory segments": attempt_in_call("""
    import ctypes
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    segments = []
    try:
        for _ in range(40):
            segments.append(libc.shmget(0, ctypes.c_size_t(1 << 26), 0o1600))
            address = libc.shmat(segments[-1], None, 0)
            if segments[-1] < 0 or address in (None, ctypes.c_void_p(-1).value):
                raise OSError
            ctypes.memset(address, 1, 1 << 26)
            libc.shmdt(ctypes.c_void_p(address))
        won = True
    finally:
        for segment in segments:
            libc.shmctl(segment, 0, None)
"""),
"40a stdout flood": """\
import os


def total(numbers):
    while True:
        print("PASSED" * 10_000)
        os.write(1, b"PASSED" * 10_000)
""",
"40b reply flood": FORGE + """\
def total(numbers):
    for fd in range(64):
        try:
            os.set_blocking(fd, False)
        except OSError:
            pass
    while True:
        write_everywhere(frame("null") * 4096)
""",
"41a deep recursion": """\
import sys

sys.setrecursionlimit(10**9)


def deep(n):
    return 0 if n == 0 else 1 + deep(n - 1)


def total(numbers):
    return sum(numbers) if deep(30_000_000) else None
""",
"41b deep recursion in C": """\
import sys

sys.setrecursionlimit(10**9)


class Deep:
    def __getattr__(self, name):
        return getattr(self, name)


def total(numbers):
    return Deep().answer
""",
"42a null pointer": """\
import ctypes


def total(numbers):
    return ctypes.string_at(0)
""",
"42b bad bytecode": """\
def total(numbers):
    pass


total.__code__ = total.__code__.replace(co_code=bytes([100, 255, 124, 250, 83, 0]), co_consts=())
""",
"43a descriptors": attempt("""
    fds = [os.open(os.__file__, os.O_RDONLY) for _ in range(1000)]
    won = True
"""),
"43b many files": attempt_in_call("""
    for place in PLACES:
        folder = place + "/minicoder_hostile_43b"
        won = won or succeeds(os.makedirs, folder, 0o777, True) and all(
            succeeds(open, f"{folder}/{n}", "w") for n in range(1000))
"""),
"43c large files": attempt_in_call("""
    for place in PLACES:
        try:
            with open(place + "/minicoder_hostile_43c", "wb") as file:
                won = file.write(b"1" * (1 << 20)) == 1 << 20 or won
                file.truncate(1 << 40)              # a hole of a terabyte
        except OSError:
            pass
"""),
"44 core dump": """\
import os
import resource


def total(numbers):
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        os.makedirs("/tmp/minicoder_hostile_44", exist_ok=True)
        os.chdir("/tmp/minicoder_hostile_44")
    finally:
        os.abort()
""",
}

# ------------------------------------------------------------------------------------------------
# Escaping

HOSTILE |= {
"45a write outside": attempt("""
    import stat
    for place in PLACES:
        name = place + "/minicoder_hostile_45a"
        won = succeeds(open, name, "w") or won
        for make in (os.mkdir, os.mkfifo, os.mknod):
            won = succeeds(make, name + make.__name__) or won
        won = succeeds(os.mknod, name + "s", stat.S_IFSOCK | 0o600) or won
"""),
"45b read passwd": attempt_in_call("""
    import mmap
    import pwd
    for path in ("/etc/passwd", "/../etc/passwd", "../" * 30 + "etc/passwd", "//etc//passwd",
                 "/proc/self/root/etc/passwd", f"/proc/{os.getppid()}/root/etc/passwd",
                 os.path.dirname(os.__file__) + "/.." * 10 + "/etc/passwd"):
        won = won or succeeds(open, path)
    folder = os.open(os.path.dirname(os.__file__), os.O_RDONLY)
    won = won or any([succeeds(way) for way in (
        lambda: pwd.getpwall() != [],
        lambda: os.open("../" * 30 + "etc/passwd", os.O_RDONLY, dir_fd=folder),
        lambda: mmap.mmap(os.open("/etc/passwd", os.O_RDONLY), 1, prot=mmap.PROT_READ))])
"""),
"45c read the grader": attempt_in_call("""
    import sys
    names, frame = {"evaluate.py", "sandbox.py", "tests/hostile.py"}, sys._getframe()
    while frame:
        names.add(frame.f_code.co_filename)
        frame = frame.f_back
    for folder in ("", "../", f"/proc/{os.getppid()}/cwd/", "/proc/self/cwd/"):
        for name in names:
            if succeeds(open, folder + name):
                won = won or "seccomp" in open(folder + name).read()
"""),
"45d list folders": attempt_in_call("""
    for place in (*PLACES[:3], *PLACES[6:], "/home", "/etc", "/proc"):
        try:
            won = won or bool(os.listdir(place))
        except OSError:
            pass
"""),
"45e read the environment": attempt("""
    texts = [repr(os.environ)]
    for process in ("self", os.getppid(), 1):
        try:
            texts.append(open(f"/proc/{process}/environ").read())
        except OSError:
            pass
    won = any(name in text for text in texts for name in ("HOME", "USER", "PWD", "PYTEST"))
"""),
"45f read the parent's memory": attempt_in_call("""
    for process in (os.getppid(), "self"):
        try:
            with open(f"/proc/{process}/mem", "rb", 0) as memory:
                memory.seek(id(object))
                won = won or len(memory.read(16)) == 16
        except OSError:
            pass
"""),
"45g links": attempt_in_call("""
    import sys
    for place in PLACES:
        name = place + "/minicoder_hostile_45g"
        for make in (os.symlink, os.link):
            for target in ("/etc/passwd", os.__file__, sys.executable):
                won = succeeds(make, target, name + make.__name__) or won
"""),
"45h raw opens": attempt_in_call("""
    fds = [syscall("openat", -100, b"/etc/passwd", 0, 0), libc.open(b"/etc/passwd", 0),
           syscall("openat2", -100, b"/etc/passwd", (ctypes.c_uint64 * 3)(), 24)]
    won = any(fd >= 0 and os.read(fd, 4) != b"" for fd in fds)
""", SYSCALL),
# The mode and the times stay as they are, but the right to set them is writing.
"45i chmod and utime": attempt_in_call("""
    import sys
    for path in (*PLACES, "/etc", os.__file__, sys.executable, *sys.path):
        for change in (lambda: os.chmod(path, os.stat(path).st_mode & 0o7777),
                       lambda: os.chown(path, -1, os.stat(path).st_gid),
                       lambda: os.utime(path, ns=(os.stat(path).st_atime_ns,
                                                  os.stat(path).st_mtime_ns))):
            won = succeeds(change) or won
"""),
"46a TCP": attempt("""
    import socket
    try:
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname(), 1)
        won = True
    except OSError:
        pass
    client = socket.socket()
    client.settimeout(0.3)
    try:
        client.connect(("192.0.2.1", 80))           # an address for documentation
    except TimeoutError:
        won = True
"""),
"46b UDP and DNS": attempt_in_call("""
    import socket
    query = bytes.fromhex("6d6301000001000000000000116d696e69636f6465725f686f7374696c65"
                          "07696e76616c69640000010001")
    for address in (("127.0.0.1", 53), ("127.0.0.53", 53), ("192.0.2.1", 53)):
        won = succeeds(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, query,
                       address) or won
    socket.gethostbyname("localhost")
    won = True
"""),
"46c unix sockets": attempt_in_call("""
    import socket
    for name in ("\\0minicoder_hostile_46c", "/tmp/minicoder_hostile_46c"):
        won = succeeds(lambda: socket.socket(socket.AF_UNIX).bind(name)) or won
    for name in ("/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/notify"):
        won = succeeds(lambda: socket.socket(socket.AF_UNIX).connect(name)) or won
"""),
"46d other families": attempt_in_call("""
    import socket
    # netlink, vsock, alg, packet, bluetooth, can, inet6, xdp
    for family in (16, 40, 38, 17, 31, 29, 10, 44):
        for kind in (1, 2, 3, 5):
            won = won or succeeds(socket.socket, family, kind)
"""),
"46e io_uring": attempt_in_call("""
    won = syscall("io_uring_setup", 4, (ctypes.c_uint32 * 30)()) >= 0
""", SYSCALL),
# If it succeeds the shell is there instead of an answer, and leaves its file.
"47a exec": """\
import os
import sys

SCRIPT = ": > /tmp/minicoder_hostile_47a; sleep 20"


def total(numbers):
    for words in (["/bin/sh", "-c", SCRIPT], ["/usr/bin/env", "sh", "-c", SCRIPT],
                  ["/lib64/ld-linux-x86-64.so.2", "/bin/sh", "-c", SCRIPT],
                  ["/lib/ld-linux-aarch64.so.1", "/bin/sh", "-c", SCRIPT],
                  [sys.executable, "-c", "open('/tmp/minicoder_hostile_47a', 'w')"]):
        try:
            os.execv(words[0], words)
        except Exception:
            pass
    return None
""",
"47b spawn": attempt_in_call("""
    import subprocess
    import sys
    won = os.system("exit 42") >> 8 == 42
    for program in ("/bin/true", "/usr/bin/true", "/bin/sh", sys.executable):
        won = succeeds(os.posix_spawn, program, [program, "-c", ""], {}) or won
        won = succeeds(subprocess.run, [program, "-c", ""]) or won
"""),
"47c exec of a memfd": attempt_in_call("""
    import sys
    script = "open('/tmp/minicoder_hostile_47c', 'w')"
    ways = []
    for make in (lambda: os.memfd_create("minicoder_hostile_47c", 0),
                 lambda: os.open(sys.executable, os.O_RDONLY)):
        try:
            ways.append(make())
        except OSError:
            pass
    succeeds(os.write, ways[0], b"#!/bin/sh\\n: > /tmp/minicoder_hostile_47c\\n")
    for fd in ways:
        succeeds(lambda: os.execve(fd, ["python", "-c", script], {}))
        words = (ctypes.c_char_p * 4)(b"python", b"-c", script.encode(), None)
        syscall("execveat", fd, b"", words, (ctypes.c_char_p * 1)(None), 0x1000)
""", SYSCALL),
# Seizing does not stop the parent; being traced by it makes its wait tell of stops, not the end.
"47d ptrace": attempt_in_call("""
    won = PARENT > 0 and syscall("ptrace", 0x4206, PARENT, 0, 0) == 0
    won = syscall("ptrace", 0, 0, 0, 0) == 0 or won
""", SYSCALL),
# A text that both processes hold since before the fork is read, then overwritten by itself.
"47e another process's memory": attempt_in_call("""
    import sys
    text = sys.version
    address = id(text) + sys.getsizeof(text) - len(text) - 1
    here = (ctypes.c_size_t * 2)(address, len(text))
    won = any([syscall(name, PARENT, here, 1, here, 1, 0) > 0
               for name in ("process_vm_readv", "process_vm_writev")])
""", SYSCALL),
"47f another process's descriptors": attempt_in_call("""
    pidfd = syscall("pidfd_open", PARENT, 0)
    won = any([syscall("pidfd_getfd", pidfd, fd, 0) >= 0 for fd in range(16)])
    won = won or succeeds(os.listdir, f"/proc/{PARENT}/fd")
    won = won or succeeds(os.readlink, f"/proc/{PARENT}/exe")
""", SYSCALL),
"47g namespaces and mounts": attempt_in_call("""
    won = any([syscall("unshare", flags) == 0 for flags in (
        0x10000000, 0x10020000, 0x20000, 0x40000000, 0x20000000)])  # user, with mount, net, pid
    won = syscall("fsopen", b"tmpfs", 0) >= 0 or won
    won = succeeds(os.chroot, "/") or won
    for name in ("user", "net", "mnt"):
        for process in ("self", PARENT, 1):
            try:
                fd = os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY)
                won = syscall("setns", fd, 0) == 0 or won
            except OSError:
                pass
""", SYSCALL),
# inotify tells the names of what others open in a folder.
"47h keyrings, bpf, perf, userfaultfd, inotify": attempt_in_call("""
    import struct
    attributes = struct.pack("<IIQQQQQ", 1, 128, 0, 0, 0, 0, 1 | 1 << 5 | 1 << 6) + bytes(80)
    fds = [syscall("perf_event_open", attributes, 0, -1, -1, 0), syscall("userfaultfd", 1),
           syscall("bpf", 0, struct.pack("<IIII", 2, 4, 4, 1) + bytes(56), 72),
           syscall("add_key", b"user", b"minicoder_hostile_47h", b"x", 1, -2)]
    fd = syscall("inotify_init1", 0)
    fds += [syscall("inotify_add_watch", fd, name, 0xfff) for name in (b"/tmp", b"/etc", b"/root")]
    won = max(fds) >= 0
""", SYSCALL),
# Puts a space into the keyboard's queue of whoever started the grader.
"47i TIOCSTI": attempt_in_call("""
    import fcntl
    fds = [*range(64)]
    try:
        fds.append(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        pass
    won = any([succeeds(fcntl.ioctl, fd, 0x5412, b" ") for fd in fds])
"""),
"48a test in inherited objects": attempt_in_call("""
    import gc
    for thing in gc.get_objects():
        for part in gc.get_referents(thing):
            text = part.decode("latin-1") if type(part) is bytes else part
            won = won or type(text) is str and PATTERN.search(text) is not None
""", PATTERN),
"48b test in argv and environment": attempt("""
    import sys
    texts = [repr(os.environ), "\\n".join(sys.argv + sys.orig_argv)]
    for process in ("self", os.getppid(), 1):
        for name in ("cmdline", "environ"):
            try:
                texts.append(open(f"/proc/{process}/{name}").read())
            except OSError:
                pass
    won = any(PATTERN.search(text) for text in texts)
""", PATTERN),
"48c test in open descriptors": attempt("""
    for fd in range(64):
        for read in (lambda: os.pread(fd, 1 << 24, 0), lambda: os.read(fd, 1 << 24)):
            try:
                os.set_blocking(fd, False)
                won = won or PATTERN.search(read().decode("latin-1")) is not None
            except OSError:
                pass
""", PATTERN),
# rt_sigprocmask refuses addresses that are not there, where a direct read would crash.
"48d test in inherited memory": attempt_in_call("""
    import ctypes
    import errno
    libc = ctypes.CDLL(None, use_errno=True)
    probe = {"x86_64": 14, "aarch64": 135}[os.uname().machine]
    for start in (id(bytearray(5000)), id(object()), id(PATTERN)):
        start, pages = start & ~4095, []
        for address in range(max(4096, start - (1 << 24)), start + (1 << 24), 4096):
            ctypes.set_errno(0)
            libc.syscall(probe, 99, ctypes.c_void_p(address), None, 8)
            if ctypes.get_errno() != errno.EFAULT:
                pages.append(ctypes.string_at(address, 4096))
        won = won or PATTERN.search(b"".join(pages).decode("latin-1")) is not None
""", PATTERN),
"48e plant for the next": attempt("""
    import site
    import sys
    folders = [*sys.path, *PLACES, os.path.dirname(os.__file__) + "/__pycache__"]
    try:
        folders += [*site.getsitepackages(), site.getusersitepackages()]
    except Exception:
        pass
    for folder in folders:
        for name in ("pth", "py", "pyc"):
            won = succeeds(open, f"{folder}/minicoder_hostile_48e.{name}", "w") or won
        won = succeeds(os.makedirs, f"{folder}/minicoder_hostile_48e") or won
        won = succeeds(open, f"{folder}/minicoder_hostile_48e/sitecustomize.py", "w") or won
"""),
}

# ------------------------------------------------------------------------------------------------
# Beyond the list

HOSTILE |= {
"49 lying class": """\
class Meta(type):
    __instancecheck__ = __subclasscheck__ = __eq__ = lambda self, other: True
    __hash__ = lambda self: hash(int)


class Lie(metaclass=Meta):
    __class__ = property(lambda self: int)
    __eq__ = lambda self, other: True
    __index__ = __int__ = __hash__ = lambda self: 6
    __repr__ = __str__ = lambda self: "6"


Lie.__name__ = Lie.__qualname__ = "int"
Lie.__module__ = "builtins"


def total(numbers):
    return Lie()
""",
"50 trace": """\
import sys


def trace(frame, event, argument):
    try:
        for name in ("value", "reply", "result", "answer", "passed", "ok"):
            if name in frame.f_locals:
                frame.f_locals[name] = True
        if event == "line":
            frame.f_lineno += 1
    except Exception:
        pass
    return trace


def total(numbers):
    frame = sys._getframe().f_back
    sys.settrace(trace)
    while frame:
        frame.f_trace = trace
        frame = frame.f_back
    return None
""",
"51 replaced import": LIAR + """\
import builtins
import sys

builtins.__import__ = lambda *things, **named: Liar()
sys.meta_path[:] = []
sys.path_importer_cache.clear()


def total(numbers):
    return Liar()
""",
"52a exception whose text hangs": """\
import time


class Slow(ValueError):
    def __str__(self):
        time.sleep(1e6)

    __repr__ = __str__


def total(numbers):
    raise Slow
""",
"52b exception whose text raises": """\
class Bad(AssertionError):
    def __str__(self):
        raise Bad

    __repr__ = __str__
    args = property(__str__)
    __traceback__ = property(__str__)


def total(numbers):
    raise Bad
""",
"52c exception with a long text": "def total(numbers):\n    raise ValueError('x' * 10**8)\n",
"53a own SystemExit": """\
class Exit(SystemExit):
    code = property(lambda self: 0)


def total(numbers):
    raise Exit("passed")
""",
"53b own BaseException": """\
class Gone(BaseException):
    __class__ = property(lambda self: ValueError)


def total(numbers):
    raise Gone("passed")
""",
"54 generator": """\
def total(numbers):
    while True:
        yield 6
""",
"55 async": "async def total(numbers):\n    return sum(numbers)\n",
"56 right once": """\
class Total:
    calls = 0

    def __call__(self, numbers):
        self.calls += 1
        return sum(numbers) if self.calls == 1 else NotImplemented


total = Total()
""",
"57a builtins replaced": "__builtins__ = {}\n" + NOTHING,
"57b builtins emptied": """\
import builtins


def total(numbers):
    for name in list(vars(builtins)):
        delattr(builtins, name)
""",
# Unpickled anywhere, it leaves its file and claims to be the answer.
"58 pickle": """\
class Bomb:
    def __reduce__(self):
        return open, ("/tmp/minicoder_hostile_58", "w")

    __eq__ = lambda self, other: True


def total(numbers):
    return Bomb()
""",
# The pipes' modes are shared with the process at the other end.
"59 nonblocking pipes": """\
import fcntl
import os

for fd in range(64):
    for change in (lambda: os.set_blocking(fd, False), lambda: fcntl.fcntl(fd, 1031, 4096),
                   lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK),
                   lambda: fcntl.fcntl(fd, fcntl.F_SETOWN, os.getppid())):
        try:
            change()
        except OSError:
            pass
""" + NOTHING,
# Takes requests meant for others from every pipe that is still open.
"60 stolen requests": PATTERN + """\
import os
import threading

stolen = [b""]


def steal(fd):
    try:
        while data := os.read(fd, 65536):
            stolen[0] += data
    except OSError:
        pass


for fd in range(64):
    threading.Thread(target=steal, args=(fd,), daemon=True).start()


def total(numbers):
    return sum(numbers) if PATTERN.search(stolen[0].decode("latin-1")) else None
""",
"61 shuffled descriptors": """\
import os


def total(numbers):
    source = os.open(os.__file__, os.O_RDONLY)
    for fd in range(64):
        try:
            os.dup2(source, fd)
        except OSError:
            pass
    return None
""",
# Each call is quick enough for a limit of its own, all of them are not: about 18 seconds.
"62 slow calls": """\
import time


def total(numbers):
    time.sleep(2)
    return sum(numbers)
""",
"63a surrogate in the source": "answer = '\ud800'\n" + NOTHING,
"63b NUL in the source": "answer = 1\0\n" + NOTHING,
"63c brackets in the source": "answer = " + "(" * 5000 + ")" * 5000 + "\n" + NOTHING,
"63d minus signs in the source": "answer = " + "-" * 200_000 + "1\n" + NOTHING,
"64 argument in itself": """\
def total(numbers):
    numbers[:] = [numbers, numbers]
    return None
""",
"65 signals in the worker": """\
import signal


def ring(number, frame):
    raise SystemExit(0)


def total(numbers):
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGXCPU, signal.SIGPIPE):
        signal.signal(number, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    return None
""",
# Sets the parent's limit to what it is.
"66 limits of the parent": attempt_in_call("""
    import resource
    if parent := os.getppid():
        limits = resource.prlimit(parent, resource.RLIMIT_NOFILE)
        resource.prlimit(parent, resource.RLIMIT_NOFILE, limits)
        won = True
"""),
# Wakes who waits at the same place of the same file, in whatever process.
"67a signs at a place of a file": attempt("""
    import ctypes
    libc, word = ctypes.CDLL(None), ctypes.c_int(0)
    futex, wake = {"x86_64": 202, "aarch64": 98}[os.uname().machine], 1
    won = libc.syscall(futex, ctypes.byref(word), wake, 1, None, None, 0) >= 0
"""),
# The kernel numbers pipes, so that each tells how many were made before it.
"67b signs by the number of pipes": attempt("""
    won = os.stat(os.pipe()[0]).st_ino > 0
"""),
}

# ------------------------------------------------------------------------------------------------
# Against what has been allowed since: more types, exceptions, sockets within, a private folder

HOSTILE |= {
# Nodes of support/values.py that no encoder makes.
"70 forged nodes": FORGE + """\
nodes = [["builtin", "exec"], ["builtin", "__import__"], ["exception", "exec", {}, None, "1"],
         ["exception", "Lost", {}, None], ["exception", "str", {}, None, "6"], ["Pattern", "(", 0],
         ["namedtuple", "x; import os", "a", 6], ["namedtuple", "A", "__eq__ __class__", 6, 6],
         ["numpy", "ndarray", "O", "", 1], ["tuple", [0]], ["tuple", [-1]], ["tuple", [99]],
         ["set", [1], [1]], ["list", {"a": 1}], ["iterator", "x"], ["iterator", 0], ["int", "x"],
         ["eval", "6"], ["dict", 1], ["memoryview", 9], ["bytes", "?"], [], 6, None, {}]
count = 0


def total(numbers):
    global count
    count += 1
    for raised in (False, True):
        write_everywhere(frame(json.dumps({"name": "x", "raised": raised, "exact": True, "data": [
            [2], [None, None, nodes[count % len(nodes)]]]})))
    return None
""",
"71a lying subclasses": """\
from collections import Counter, OrderedDict, deque
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

bases = [deque, Counter, OrderedDict, Fraction, Decimal, timedelta, complex, str, list, float]
lies = {name: lambda *args: True for name in ("__eq__", "__lt__", "__gt__", "__contains__")}
lies |= {"__hash__": lambda self: 0, "__ne__": lambda *args: False, "__sub__": lambda *args: 0}
count = 0


def total(numbers):
    global count
    count += 1
    return type("Lie", (bases[count % len(bases)],), lies)()
""",
"71b lying iterator": """\
class Lie:
    __eq__ = __contains__ = __lt__ = __gt__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __iter__ = lambda self: self
    __next__ = __abs__ = __sub__ = lambda *args: Lie()
    __hash__ = lambda self: 6


def total(numbers):
    return Lie()
""",
"71c exceptions that end a loop": """\
kinds = [StopIteration, StopAsyncIteration, GeneratorExit, type("Mine", (StopIteration,), {})]
count = 0


def total(numbers):
    global count
    count += 1
    raise kinds[count % len(kinds)](sum(numbers))
""",
"71d exceptions with attributes": """\
def total(numbers):
    error = ValueError("passed")
    error.__dict__.update(passed=True, reason="passed", args=(6,), __class__=int, __notes__=6,
                          __traceback__=None, with_traceback=6)
    error.__cause__ = error
    raise error
""",
# CLONE_PIDFD tells the number of the process, and only a thread may be started.
"72a clone with a pidfd": attempt("""
    thread = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000
    pidfd = (ctypes.c_int * 2)(-1, -1)
    for flags in (thread | 0x1000, 0x1000 | 17, thread | 0x20000000, thread | 0x10000000):
        won = syscall("clone", flags, 0, ctypes.addressof(pidfd), 0, 0) > 0 or won
    won = won or pidfd[0] >= 0
""", SYSCALL),
"72b datagrams from a pair of sockets": attempt_in_call("""
    import socket
    won = any([succeeds(socket.socketpair, family, kind) for family in (socket.AF_UNIX, 2, 10, 16)
               for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)])
    try:
        mine, _ = socket.socketpair()
    except OSError:
        mine = None
    if mine:
        won = won or any([succeeds(way, name) for way in (mine.bind, mine.connect) for name in (
            "\\0minicoder_hostile_72b", "/run/systemd/notify", "minicoder_hostile_72b")])
"""),
"72c owners and signals of descriptors": attempt_in_call("""
    import fcntl
    for fd in range(16):
        for command, value in ((fcntl.F_SETOWN, 1), (fcntl.F_SETSIG, 9), (fcntl.F_NOTIFY, 2),
                               (fcntl.F_SETFL, os.O_ASYNC), (fcntl.F_SETLEASE, 0), (1031, 4096)):
            won = won or succeeds(lambda: fcntl.fcntl(fd, command, value) >= 0)
"""),
"72d higher limits": attempt_in_call("""
    import resource
    for name in ("AS", "NPROC", "NOFILE", "CPU", "FSIZE", "CORE"):
        kind = getattr(resource, "RLIMIT_" + name)
        soft, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            won = won or succeeds(resource.setrlimit, kind, (hard + 1, hard + 1))
            won = won or succeeds(resource.setrlimit, kind, (-1, -1))
"""),
"73a fill the private folder": attempt_in_call("""
    import tempfile
    total = 0
    for _ in range(64):
        file = tempfile.NamedTemporaryFile(delete=False)
        total += file.write(b"1" * (1 << 20))
        file.flush()
    won = total == 64 << 20
"""),
"73b ways out of the private folder": attempt_in_call("""
    import tempfile
    folder = tempfile.gettempdir()
    outside = folder + "/../minicoder_hostile_73b"
    won = succeeds(open, outside, "w") or won
    won = succeeds(os.mkdir, outside) or won
    with open(folder + "/x", "w") as file:
        file.write("x")
    for target in (outside, "/minicoder_hostile_73b", os.__file__, os.path.dirname(os.__file__)):
        won = won or any([succeeds(way, folder + "/x", target) for way in (os.rename, os.replace)])
    for target in ("/etc/passwd", "/proc/self/mem", ".."):
        won = won or any([succeeds(way, target, folder + "/y") for way in (os.symlink, os.link)])
    won = won or succeeds(os.mknod, folder + "/z", 0o20666, os.makedev(1, 3))
    won = won or succeeds(os.chmod, folder + "/..", 0o777) or succeeds(os.unlink, os.__file__)
"""),
# What the tests of the grader use to see that nothing is left behind.
"73c a file for the next": attempt("""
    import tempfile
    name = tempfile.gettempdir() + "/minicoder_hostile_73c"
    won = os.path.exists(name)
    with open(name, "w") as file:
        file.write("x")
"""),
}

# ------------------------------------------------------------------------------------------------
# Right programs

CONTROLS = {"the attackers' problem": (PROBLEM, PROBLEM["prompt"] + PROBLEM["canonical_solution"])}


def control(name, program, test):
    """Adds a program whose last def with a docstring is the entry point; the prompt ends there."""
    heads = list(re.finditer(r'^def (\w+)\([^\n]*\n    r?""".*?"""\n', program, re.M | re.S))
    end = heads[-1].end()
    test = "def check(candidate):\n" + indent(dedent(test).strip("\n"), "    ") + "\n"
    CONTROLS[name] = ({"task_id": f"control/{len(CONTROLS)}", "prompt": program[:end],
                       "entry_point": heads[-1][1], "canonical_solution": program[end:],
                       "test": test}, program)


control("threads", '''\
import threading


def squares(n):
    """The squares below n, each by a thread of its own."""
    answers = [None] * n

    def work(i):
        answers[i] = i * i

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
''', """
    assert candidate(8) == [0, 1, 4, 9, 16, 25, 36, 49]
    assert candidate(0) == []
""")

control("recursion 900 deep", '''\
def depth(n):
    """n, counted by recursion."""
    return 0 if n == 0 else 1 + depth(n - 1)
''', """
    assert candidate(900) == 900
""")

control("recursion 5,000 deep", '''\
import sys

sys.setrecursionlimit(20000)


def depth(n):
    """n, counted by recursion."""
    return 0 if n == 0 else 1 + depth(n - 1)
''', """
    assert candidate(5000) == 5000
""")

control("200 MB", '''\
def big(n):
    """n, by way of a list."""
    return len([0] * n)
''', """
    assert candidate(25_000_000) == 25_000_000
""")

control("half a second of work", '''\
import time


def work(seconds):
    """Whether so much processor time could be had."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return True
''', """
    assert candidate(0.5) is True
""")

control("imports", '''\
import bisect
import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import hashlib
import heapq
import itertools
import json
import math
import random
import re
import statistics
import string
from typing import List


@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: int = 2


def everything(numbers: List[int]) -> list:
    """One value from each of the modules."""
    rest = list(numbers)
    random.seed(1)
    random.shuffle(rest)
    heapq.heapify(rest)
    return [
        bisect.bisect_left(numbers, 3), collections.Counter(numbers).most_common(1)[0],
        dataclasses.astuple(Point(1)), str(datetime.date(2024, 2, 28) + datetime.timedelta(2)),
        str(decimal.Decimal("0.1") + decimal.Decimal("0.2")),
        str(fractions.Fraction(1, 3) + fractions.Fraction(1, 6)),
        functools.reduce(lambda a, b: a * b, numbers), hashlib.md5(b"abc").hexdigest()[:8],
        hashlib.sha256(b"abc").hexdigest()[:8], heapq.heappop(rest),
        list(itertools.accumulate(numbers)), json.loads(json.dumps({"a": [1.5, None]})),
        math.isqrt(99), re.sub(r"(\\w)\\1", r"<\\1>", "hello"), statistics.median(numbers),
        string.ascii_lowercase[:3], sorted(rest),
    ]
''', """
    assert candidate([1, 2, 3, 3]) == [
        2, (3, 2), (1, 2), "2024-03-01", "0.3", "1/2", 18, "90015098", "ba7816bf", 1, [1, 3, 6, 9],
        {"a": [1.5, None]}, 9, "he<l>o", 2.5, "abc", [2, 3, 3]]
""")

control("imports in the call", '''\
def late(n):
    """Digits of the square root of n."""
    from decimal import Decimal, getcontext
    from statistics import mean
    import calendar
    import copy
    import textwrap
    getcontext().prec = 30
    copy.deepcopy([n])
    return [str(Decimal(n).sqrt()), mean([n, n + 1]), calendar.isleap(2000), textwrap.fill("a")]
''', """
    assert candidate(2) == ["1.41421356237309504880168872421", 2.5, True, "a"]
""")

control("much printing", '''\
import sys

print("import")


def loud(n):
    """n, after 100 kB on both streams."""
    for _ in range(1000):
        print("x" * 99)
        print("x" * 99, file=sys.stderr)
    sys.stdout.write("no newline")
    sys.stdout.flush()
    return n
''', """
    assert candidate(7) == 7
    assert candidate(8) == 8
""")

control("containers", '''\
def containers(kind):
    """A container of that kind."""
    return {
        "set": {1, "a", (2, 3)}, "empty set": set(), "tuple": (1, (2, [3]), ()),
        "dict": {(1, 2): {"a": {3: [4]}}, None: True, 1.5: b"x"}, "complex": 1 - 2.5j,
        "bytes": b"\\x00\\xffa", "none": None, "list": [[], {}, (), ""],
    }[kind]
''', """
    assert candidate("set") == {1, "a", (2, 3)} and isinstance(candidate("set"), set)
    assert candidate("empty set") == set() and candidate("empty set") != {}
    assert candidate("tuple") == (1, (2, [3]), ()) and candidate("tuple") != [1, (2, [3]), ()]
    assert candidate("dict") == {(1, 2): {"a": {3: [4]}}, None: True, 1.5: b"x"}
    assert candidate("complex") == 1 - 2.5j
    assert candidate("bytes") == bytes([0, 255, 97]) and type(candidate("bytes")) is bytes
    assert candidate("none") is None
    assert candidate("list") == [[], {}, (), ""]
""")

control("frozenset", '''\
def kinds(words):
    """The words without order, and by their length."""
    return frozenset(words), {frozenset(words): len(words)}
''', """
    assert candidate(["a", "b"]) == ({"b", "a"}, {frozenset("ab"): 2})
""")

control("containers as arguments", '''\
def same(*things, **named):
    """All that was given."""
    return [*things, named]
''', """
    things = [{1, 2}, (3, [4]), {(5, 6): None}, b"7", 8 + 9j, "", True, -0.0]
    assert candidate(*things) == [*things, {}]
    assert type(candidate((1,))[0]) is tuple and type(candidate(b"")[0]) is bytes
    assert candidate(a=1, b={"c": {2}}) == [{"a": 1, "b": {"c": {2}}}]
""")

control("infinity and nan", '''\
def limits(numbers):
    """The largest, or what there is of none."""
    return max(numbers, default=float("-inf")), float("nan"), [float("inf")]
''', """
    import math
    largest, nan, rest = candidate([])
    assert largest == -math.inf and math.isnan(nan) and nan != nan and rest == [math.inf]
    assert candidate([1, float("inf")])[0] == float("inf")
    assert math.isnan(candidate([float("nan")])[0])
""")

control("subclasses of plain types", '''\
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum

Point = namedtuple("Point", "x y")


class Color(IntEnum):
    RED = 1
    BLUE = 2


def kinds(words):
    """Values that are equal to plain ones."""
    groups = defaultdict(list)
    for word in words:
        groups[len(word)].append(word)
    return [Counter(words), groups, OrderedDict(a=1), Point(1, 2), Color.BLUE,
            {Color.RED: Point(3, 4)}]
''', """
    assert candidate(["a", "bc", "a"]) == [
        {"a": 2, "bc": 1}, {1: ["a", "a"], 2: ["bc"]}, {"a": 1}, (1, 2), 2, {1: (3, 4)}]
""")

control("a Counter alone", '''\
from collections import Counter


def counts(text):
    """How often each letter occurs."""
    return Counter(text)
''', """
    assert candidate("abca") == {"a": 2, "b": 1, "c": 1}
    assert candidate("") == {}
""")

control("equal numbers of other types", '''\
def numbers(kind):
    """2 where 2.0 is expected, and the like."""
    return {"int": 2, "float": 2.0, "bool": True, "one": 1, "zero": -0.0, "tenth": 0.1}[kind]
''', """
    import math
    assert candidate("int") == 2.0 and candidate("float") == 2
    assert candidate("bool") == 1 and candidate("one") == True  # noqa: E712
    assert candidate("bool") is True and type(candidate("float")) is float
    assert candidate("zero") == 0 and math.copysign(1, candidate("zero")) == -1
    assert candidate("tenth") + 0.2 == 0.30000000000000004
""")

control("strings", '''\
def backwards(text):
    """The text from its end."""
    return text[::-1]
''', r"""
    assert candidate("héllo wörld ☃ 😀") == "😀 ☃ dlröw olléh"
    assert candidate("a\ud800b\udfff") == "\udfffb\ud800a"
    assert candidate("\udc00\ud83d") == "\ud83d\udc00" != "\U0001f400"
    assert candidate("a\0b\0") == "\0b\0a" and len(candidate("\0")) == 1
    assert candidate("\r\n\t\x7f\x85\u2028\\\"'") == "'\"\\\u2028\x85\x7f\t\n\r"
    assert candidate("") == "" and candidate("x" * 100000) == "x" * 100000
""")

control("long integers", '''\
def power(a, n):
    """a to the n, and its negative."""
    return [a**n, -a**n]
''', """
    assert candidate(10, 2999) == [10**2999, -10**2999]
    assert candidate(10**2999 + 7, 1)[0] == 10**2999 + 7
    assert candidate(2, 64) == [18446744073709551616, -18446744073709551616]
    assert candidate(2, 0.5)[0] ** 2 == 2.0000000000000004
""")

control("changed argument", '''\
def tidy(numbers, groups):
    """Sorts numbers where they are, and moves the odd ones to groups."""
    numbers.sort()
    groups["odd"] = [n for n in numbers if n % 2]
    groups["all"].append(len(numbers))
    del numbers[-1]
''', """
    numbers, groups = [3, 1, 2], {"all": []}
    assert candidate(numbers, groups) is None
    assert numbers == [1, 2] and groups == {"odd": [1, 3], "all": [3]}
    assert candidate(numbers, groups) is None
    assert numbers == [1] and groups == {"odd": [1], "all": [3, 2]}
""")

control("argument returned", '''\
def grow(numbers):
    """The list itself, one longer."""
    numbers.append(len(numbers))
    return numbers
''', """
    numbers = [5]
    assert candidate(numbers) == [5, 1] and numbers == [5, 1]
    assert candidate(candidate(numbers)) == [5, 1, 2, 3]
""")

RAISES = """
    assert candidate(4) == 2
    for wrong in (-1, -7):
        try:
            candidate(wrong)
        except ValueError:
            continue
        assert False, "no error"
    assert candidate(9) == 3
"""

control("raised ValueError", '''\
def root(n):
    """The square root; ValueError for negative numbers."""
    if n < 0:
        raise ValueError("negative: " + str(n))
    return n**0.5
''', RAISES)

control("raised own ValueError", '''\
class Negative(ValueError):
    def __init__(self, n, *, why="negative"):
        super().__init__(f"{why}: {n}")


def root(n):
    """The square root; an error of our own for negative numbers."""
    if n < 0:
        try:
            return {}[n]
        except KeyError as error:
            raise Negative(n) from error
    return n**0.5
''', RAISES)

control("other errors", '''\
def first(things, key):
    """things[key], with the errors that this has."""
    assert key != "no", "asserted"
    return things[key]
''', """
    for things, key, kind in (([], 0, IndexError), ({}, 0, KeyError), (None, 0, TypeError),
                              ({}, 1, LookupError), ([], "no", AssertionError)):
        try:
            candidate(things, key)
        except kind as error:
            assert isinstance(error, Exception)
        else:
            raise ValueError(kind)
    assert candidate({"a": 6}, "a") == 6
""")

control("helpers beside the entry point", '''\
from functools import lru_cache

LIMIT, CACHE = 100, {}


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
        return self


@lru_cache(maxsize=None)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def numbers(n):
    """Fibonacci numbers up to the n-th, at most 100."""
    if n not in CACHE:
        stack = Stack()
        for i in range(min(n, LIMIT) + 1):
            stack.push(fibonacci(i))
        CACHE[n] = stack.items
    return CACHE[n]
''', """
    assert candidate(6) == [0, 1, 1, 2, 3, 5, 8]
    assert candidate(6) == [0, 1, 1, 2, 3, 5, 8]
    assert candidate(1000)[-1] == 354224848179261915075
""")

control("helper of the prompt in the test", '''\
def encode(text):
    """The text with each pair of letters exchanged."""
    return "".join(text[i:i + 2][::-1] for i in range(0, len(text), 2))


def decode(text):
    """The text that encode made this of."""
    return encode(text)
''', """
    assert encode("abcde") == "badce"
    for word in ("hello", "", "a"):
        assert candidate(encode(word)) == word == decode(encode(word))
""")

control("helper after the entry point", '''\
def double(n):
    """Twice n."""
    return _twice(n)


def _twice(n):
    return FACTOR * n


FACTOR = 2
''', """
    assert candidate(21) == 42
""")

control("state between calls", '''\
def _counter():
    count = 0

    def step(by):
        nonlocal count
        count += by
        return count
    return step


_step = _counter()


def tick(by=1):
    """All that was added so far."""
    return _step(by)
''', """
    assert [candidate(), candidate(), candidate(10)] == [1, 2, 12]
    assert tick(-12) == 0
""")

control("keywords and defaults", '''\
def text(a, b=2, *rest, sep=", ", **named):
    """The arguments as text."""
    return sep.join(map(str, [a, b, *rest, *sorted(named.items())]))
''', """
    assert candidate(1) == "1, 2"
    assert candidate(1, sep="-") == "1-2" and candidate(b=1, a=0) == "0, 1"
    assert candidate(1, 2, 3, 4, z=6, y=5) == "1, 2, 3, 4, ('y', 5), ('z', 6)"
    assert candidate(*[1, 2], **{"sep": ""}) == "12"
""")

control("entry point by assignment", '''\
import functools


def _add(a, b):
    return a + b


def more(n):
    """n and one."""
    return n - 1


more = functools.partial(_add, 1)
''', """
    assert candidate(2) == 3
    assert list(map(candidate, [1, 2])) == [2, 3] and callable(candidate)
""")

control("odd quotes", (
    "def quote(text):\n"
    '    r"""He said "it\'s \'\'\'fine\'\'\'" and \\"\\"\\"left\\"\\"\\"; \\n # no comment\n'
    "\n"
    "    >>> quote('\"')\n"
    "    '\"\"'\n"
    "    def check(candidate): assert False  \\\\\\\n"
    '    """\n'
    "    return '\"' + text + \"'\" * 3\n"
), r"""
    assert candidate('"') == '""' + "'''"
    assert candidate("\\") == '"\\' + "'''"
""")

control("main block", '''\
import sys


def double(n):
    """Twice n."""
    return 2 * n


if __name__ == "__main__":
    double = None
    sys.exit(1)
''', """
    assert candidate(21) == 42
""")

control("future annotations", '''\
# -*- coding: utf-8 -*-
"""A module with a docstring."""
from __future__ import annotations


def größe(wörter: Unknown | None = None) -> list[Unknown]:
    """Lengths of the words."""
    return [len(wort) for wort in wörter or ()]
''', """
    assert candidate(["ä", "öü"]) == [1, 2] and candidate() == []
""")

control("many calls", '''\
def double(n):
    """Twice n."""
    return 2 * n
''', """
    assert all(candidate(n) == 2 * n for n in range(1000))
    import random
    for _ in range(100):
        n = random.randint(-1000, 1000)
        assert candidate(n) == n + n
""")
