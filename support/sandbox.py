"""Runs programs that a model wrote, and grades them so that they cannot forge the result.

How are code graders fooled? A simple one (grade_naive) runs program and test in one process. There
the program can do whatever the test can: return an object that equals everything, replace
AssertionError, or look up the stack for the variable that holds the result. So each check takes two
processes, which exchange nothing but plain data (support/values.py):

    child         has the program and no test: it calls the function with the arguments it is sent
    test runner   has the test and no program: check(candidate) calls a Proxy, which asks the child

What the child prints and how it ends counts for nothing. Both run behind the layers of
support/supervisor.py, which keep them from files, the network, other processes and too much memory.
docs/sandbox.md says what each layer stops, and what nothing stops. All three files use the standard
library only, because a bare Python process runs them, too.

Read first: grade_naive, child, Proxy, judge, Sandbox.check_in_two, grades.
"""

import contextlib
import functools
import gc
import itertools
import json
import os
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
from concurrent.futures import Future
from pathlib import Path

from support.supervisor import ANSWER, COMMAND, END, SCRATCH, SCRIPT, cores
from support.values import (ATOMS, Encoder, builtin_class, decode, encode, pack, read_exactly,
                            receive, send)

MESSAGE_BYTES = 64 << 20    # of one answer by a child
OUTPUT_BYTES = 1 << 20      # of what a program prints
RUNNER_BYTES = 128 << 20    # a test runner that has grown beyond this is replaced

# passed, why not ("wrong answer: ...", "timeout", ...), and whether one process did it (forgeable)
Grade = namedtuple("Grade", "passed reason weak", defaults=[False])
# What may stand before the colon of a reason. Scores print it, so a program must not choose it.
REASONS = ("wrong answer", "exception", "syntax", "no entry point", "timeout", "memory", "killed",
           "protocol")

# ------------------------------------------------------------------------------------------------
# One process: a grader that can be fooled


def assemble(problem, completion):
    """The program that a completion makes: what stands before it, it, and what stands after."""
    return problem["prompt"] + completion + problem.get("suffix", "")


def grade_naive(problem, completion):
    """Grade in this very process, as simple harnesses do. Only for programs that you trust!"""
    names = {}
    try:
        exec(assemble(problem, completion), names)
        exec(problem["test"], names)
        names["check"](names[problem["entry_point"]])
        return Grade(True, "passed")
    except Exception as error:
        return Grade(False, f"wrong answer: {error!r}")


# ------------------------------------------------------------------------------------------------
# Two processes: the child has the program, the test runner has the test


def load_program(program):
    """Run a program as a module of its own -> its names. `if __name__ == "__main__"` is not run."""
    module = types.ModuleType("completion")
    sys.modules["completion"] = module                              # dataclasses look it up
    exec(compile(program, "completion.py", "exec"), module.__dict__)
    return module.__dict__


def take(iterator, count):
    """Up to `count` of the next items -> (items, None or the exception that came instead)."""
    items = []
    deadline = time.monotonic() + 0.01      # an item may take long that nobody asks for
    try:
        while len(items) < count and time.monotonic() < deadline:
            items.append(next(iterator))
            if type(items[-1]) not in ATOMS:    # such as a list, which the next item may change
                break
    except BaseException as error:                                  # StopIteration, mostly
        return items, error
    return items, None


def child(requests, replies):
    """Load the program, then answer requests: call its function, or go on with an iterator."""
    iterators = []

    def reply(action, objects=(), known_nodes=()):
        """Send what the action returns or raises."""
        raised = False
        try:
            result = action()
        except BaseException as error:
            result, raised = error, True
        message = {"raised": raised, "name": type(result).__name__}
        encoder = Encoder(objects, iterators)
        try:
            message["data"] = encoder.encode(result, known_nodes)
        except TypeError as refused:
            if raised:                                              # its arguments cannot be sent
                encoder = Encoder(objects, iterators)
                error = builtin_class(result)(str(result))
                message["data"] = encoder.encode(error, known_nodes)
            else:
                message["refused"] = str(refused)
            encoder.exact = False
        send(replies, {**message, "exact": encoder.exact})

    program, entry_point = receive(requests)
    function = None

    def load():
        nonlocal function
        function = load_program(program).get(entry_point)
        return callable(function)

    reply(load)
    while True:
        request = receive(requests)                                 # EOFError ends this process
        if "next" in request:
            number, count = request["next"]
            reply(lambda: take(iterators[number], count))
        else:
            values, objects = decode(request["call"])
            count = len(values) - len(request["names"])
            named = dict(zip(request["names"], values[count:]))
            reply(lambda: function(*values[:count], **named), objects, request["call"][1])


class Lost(BaseException):
    """The child is gone or breaks the rules."""                # few tests catch a BaseException


# Raised inside map() or a loop, these end it without a word: all(map(check_one, cases)) would pass.
# So they arrive as RuntimeError, as from a generator (PEP 479), unless the test names them.
SILENT = (StopIteration, StopAsyncIteration, GeneratorExit)


class Proxy:
    """Stands for the child's function in the test runner.

    fault: why the check has failed, whatever the test says. exact: whether all values arrived as
    what they were.
    """

    def __init__(self, requests, replies, job):
        self.requests, self.replies, self.job = requests, replies, job
        self.__name__ = job["entry_point"]
        self.fault, self.raised, self.reason, self.exact, self.calls = None, None, None, True, 0
        self.silent = []                    # errors that may have ended a loop of the test

    def lose(self, reason):
        self.fault = self.fault or reason
        raise Lost

    def ask(self, request, objects=()):
        """Send a request -> the value that comes back; raises what the child raised."""
        if self.fault or select.select([self.replies], [], [], 0)[0]:
            self.lose("protocol: an answer before it was asked")
        try:
            send(self.requests, request)
            reply = receive(self.replies, MESSAGE_BYTES)
            self.exact = self.exact and reply["exact"] is True
            if "refused" in reply:
                self.lose(f"protocol: {reply['refused']}")
            value, _ = decode(reply["data"], objects, self.remote_iterator)
            if reply["raised"] and not isinstance(value, BaseException):
                raise TypeError("no exception")
        except (EOFError, OSError):
            self.lose("killed")
        except MemoryError:
            self.lose("memory: too large an answer")
        except Exception as problem:                # whatever one can provoke with false data
            self.lose(f"protocol: not an answer ({problem})")
        if reply["raised"]:
            self.throw(value, reply.get("name"))
        return value

    def throw(self, error, name):
        """Raise the child's exception here."""
        kind = type(error).__name__
        if isinstance(error, SILENT) and kind not in self.job["test"]:
            error = RuntimeError(f"{kind} raised")
        elif isinstance(error, SILENT):
            self.silent.append(error)
        self.raised, self.reason = error, describe(error, name)
        raise error

    def start(self):
        """Hand the program over; raises Lost if it cannot be loaded."""
        try:
            if not self.ask([self.job["program"], self.job["entry_point"]]):
                self.lose(f"no entry point: {self.job['entry_point']} is not defined")
        except SyntaxError as error:
            line = error.lineno if isinstance(error.lineno, int) else "?"
            self.lose(f"syntax: line {line}: {str(error.msg)[:200]}")
        except BaseException:
            self.lose(self.reason or "exception")

    def __call__(self, *args, **kwargs):
        encoder = Encoder()
        try:
            values = encoder.encode((*args, *kwargs.values()))
        except TypeError as refused:
            self.exact = False
            self.lose(f"protocol: {refused}")
        self.exact = self.exact and encoder.exact
        self.calls += 1
        return self.ask({"call": values, "names": list(kwargs)}, encoder.objects)

    def remote_iterator(self, number):
        """The items of an iterator that stays in the child: it may never end."""
        received = 0
        while True:
            # At most a hundredth more than was asked for: it may search for more in vain.
            items, error = self.ask({"next": [number, min(1000, 1 + received // 100)]})
            received += len(items)
            yield from items
            if isinstance(error, StopIteration):
                return error.value
            if error is not None:
                self.throw(error, type(error).__name__)


def seen_by_test(error):
    """Whether an exception reached a function of the test that names its class."""
    return any(frame.f_code.co_filename == "<test>"
               and type(error).__name__ in frame.f_code.co_names
               for frame, _ in traceback.walk_tb(error.__traceback__))


def describe(error, name):
    """An exception as a reason; name: of its class."""
    text = ""
    with contextlib.suppress(BaseException):
        text = str(error)[:200]
    kind = "memory" if isinstance(error, MemoryError) else "exception"
    return f"{kind}: {name}: {text}".removesuffix(": ")


def judge(names, job, function):
    """Let the test's check() call a function -> {"passed", "reason"}."""
    test = job["test"]
    try:
        exec(compile(test, "<test>", "exec"), names)
        check = names["check"]
        names[job["entry_point"]] = function                    # a test may call it by name
        check(function)
        return {"passed": True, "reason": "passed"}
    except BaseException as error:
        if error is getattr(function, "raised", None):
            return {"passed": False, "reason": function.reason}
        if not isinstance(error, Exception):
            raise                                               # Lost; or the test ends the process
        if isinstance(error, MemoryError):
            return {"passed": False, "reason": "memory: in the test"}
        lines = [0] + [line for frame, line in traceback.walk_tb(error.__traceback__)
                       if frame.f_code.co_filename == "<test>"]
        where = test.split("\n")[lines[-1] - 1].strip()
        if not isinstance(error, AssertionError):
            where = f"{describe(error, type(error).__name__)} in {where}"
        elif str(error):
            where = str(error)
        return {"passed": False, "reason": f"wrong answer: {where[:200]}"}


def names_for_test(job):
    """What a test finds: DATA, the names of the problem's own program, its REFERENCE solution."""
    names = {}
    with contextlib.suppress(Exception):                        # a prompt alone may be no program
        names = load_program(job["helpers"])
    data, _ = decode(job["data"])
    return {**names, "DATA": data, "REFERENCE": names.get(job["entry_point"])}


def run_check(job, requests, replies):
    """Let a test judge the child at the other end of two pipes -> {"passed", "reason", "exact"}."""
    proxy = Proxy(requests, replies, job)
    result = {"passed": False}
    try:
        proxy.start()
        result = judge(names_for_test(job), job, proxy)
        if result["passed"] and not all(map(seen_by_test, proxy.silent)):
            proxy.lose("exception: it ended a loop of the test")
        if result["passed"] and not proxy.calls:
            proxy.lose("protocol: the test never calls the function")
    except Lost:
        pass
    if proxy.fault:                                             # even if the test has caught Lost
        result = {"passed": False, "reason": proxy.fault}
    return {**result, "exact": proxy.exact}


def test_runner(control):
    """Do job after job: each comes with the two pipes to a new child."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, control) as connection:
        while True:
            _, pipes, _, _ = socket.recv_fds(connection, 1, 2)
            if not pipes:
                return
            job = receive(control)
            random.seed()                                       # no child knows the test's numbers
            result = run_check(job, *pipes)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            send(control, {**result, "worn": peak > RUNNER_BYTES})
            for fd in pipes:
                os.close(fd)
            del job
            gc.collect()                                        # what the test's frames still hold


def one_process(requests, replies):
    """Program and test in one process, for values that cannot be sent: it can forge its result."""
    job = receive(requests)
    try:
        names = names_for_test(job)
        names.update(load_program(job["program"]))
        result = judge(names, job, names[job["entry_point"]])
    except BaseException as error:
        result = {"passed": False, "reason": describe(error, type(error).__name__)}
    send(replies, result)


CHILD, RUNNER, ONE_PROCESS = b"c", b"r", b"1"
ROLES = {CHILD: child, RUNNER: test_runner, ONE_PROCESS: one_process}


# ------------------------------------------------------------------------------------------------
# Grading


NUMBERS = itertools.count()


class SandboxError(OSError):
    """This system cannot lock programs in."""


class Sandbox:
    """Grades and runs programs, one at a time. To be closed.

    weak: go on where the system offers too few layers; else SandboxError. without: names of layers
    to leave out, to see what they are for.
    """

    def __init__(self, weak=False, without=()):
        paths = sysconfig.get_paths()
        packages = sorted({paths["purelib"], paths["platlib"]})
        readable = {paths["stdlib"], paths["platstdlib"], *packages,
                    sysconfig.get_config_var("LIBDIR"), "/lib", "/lib64", "/usr/lib", "/usr/lib64",
                    "/etc/ld.so.cache", "/usr/share/zoneinfo"}
        self.options = {
            "packages": packages, "without": list(without), "number": os.getpid() + next(NUMBERS),
            "readable": sorted(path for path in readable if path and os.access(path, os.R_OK))}
        self.cannot_cross = {}
        self.start()
        missing = {"rlimits", "no-new-privileges", "seccomp"} - set(self.layers)
        if not weak and (missing or not {"mounts", "Landlock"} & set(self.layers)):
            self.close()
            raise SandboxError("this system offers too little to lock programs in ("
                               f"{', '.join(self.layers)}); --weak-sandbox runs them all the same")

    def start(self):
        """Start the supervisor, a bare Python that has neither our modules nor our environment."""
        folder = str(Path(__file__).resolve().parent.parent)
        code = (f"import sys; sys.path.insert(0, {folder!r}); "
                "from support import sandbox, supervisor; del sys.path[0]; "
                "supervisor.serve(sandbox.ROLES, sys.argv[1])")
        self.control, theirs = socket.socketpair()
        self.runner = self.runner_pid = None
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", code,
                 json.dumps(self.options)], cwd="/", stdin=theirs, stdout=subprocess.DEVNULL,
                env={"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "TMPDIR": SCRATCH},
                start_new_session=True)
        try:
            self.layers, error = receive(self.control.fileno(), deadline=time.monotonic() + 60)
        except (OSError, EOFError, ValueError):
            error = f"{sys.executable} -I -S cannot be started as a sandbox"
        if error:
            self.close()
            raise SandboxError(error)

    def command(self, role, pid=0, seconds=0.0, fds=()):
        """Let the supervisor fork or end a process -> its id, or how it ended."""
        socket.send_fds(self.control, [COMMAND.pack(role, pid, seconds)], fds)
        answer = read_exactly(self.control.fileno(), ANSWER.size, time.monotonic() + seconds + 30)
        return ANSWER.unpack(answer)[0]

    def check_in_two(self, job, deadline):
        """Let a test runner judge a child -> its result."""
        if not self.runner:
            self.runner, theirs = socket.socketpair()
            with theirs:
                self.runner_pid = self.command(RUNNER, seconds=1e6, fds=[theirs.fileno()])
        requests, replies = os.pipe(), os.pipe()                # (read end, write end)
        try:
            socket.send_fds(self.runner, [b"j"], [requests[1], replies[0]])
            send(self.runner.fileno(), job)
            pid = self.command(CHILD, 0, job["timeout"], [requests[0], replies[1]])
        finally:
            for fd in (*requests, *replies):
                os.close(fd)
        result = None
        with contextlib.suppress(TimeoutError, EOFError):
            result = receive(self.runner.fileno(), deadline=deadline)
        late = time.monotonic() >= deadline
        status = self.command(END, pid)
        if late and result is None:
            with contextlib.suppress(TimeoutError, EOFError):   # it sees that the child is gone
                result = receive(self.runner.fileno(), deadline=time.monotonic() + 0.2)
        if result is None or result["worn"]:
            self.command(END, self.runner_pid)
            self.runner.close()
            self.runner = None
        return self.outcome(result or {"reason": "killed: the test itself"}, status, late)

    def check_in_one(self, job, deadline):
        """Let one process be program and test -> its result, which it may forge."""
        output, status, late = self.exchange(ONE_PROCESS, pack(job), deadline)
        result = {"reason": "killed"}
        with contextlib.suppress(ValueError, TypeError, RecursionError):        # none, or nonsense
            result.update(json.loads(output[4:]))
        return self.outcome(result, status, late)

    def outcome(self, result, status, late):
        """A result of which a program may have chosen the text after the colon, and no more."""
        kind, _, text = str(result["reason"]).partition(":")
        if late:
            kind, text = "timeout", ""
        elif kind == "killed" and not text:
            text = f" signal {-status}" if status < 0 else f" it ended with {status}"
        passed = not late and result.get("passed") is True
        if passed or kind not in REASONS:
            kind, text = ("passed", "") if passed else ("protocol", " no known reason")
        text = "".join(letter if letter.isprintable() else "?" for letter in text[:300])
        return {"passed": passed, "reason": f"{kind}:{text}".removesuffix(":"),
                "exact": late or result.get("exact") is not False}

    def exchange(self, role, data, deadline):
        """Give a process its input -> (its output, how it ended, whether that was too late)."""
        (stdin, write), (read, stdout) = os.pipe(), os.pipe()
        output, data = bytearray(), memoryview(data)
        with open(write, "wb", 0) as write, open(read, "rb", 0) as read:
            try:
                pid = self.command(role, 0, deadline - time.monotonic(), [stdin, stdout])
            finally:
                os.close(stdin)
                os.close(stdout)
            os.set_blocking(write.fileno(), False)
            while len(output) <= OUTPUT_BYTES and time.monotonic() < deadline:
                left = max(0, deadline - time.monotonic())
                readable, writable, _ = select.select([read], [write] if data else [], [], left)
                if writable:
                    try:
                        data = data[os.write(write.fileno(), data):]
                    except OSError:
                        data = b""                              # it reads no more
                    if not data:
                        write.close()
                if readable:
                    part = os.read(read.fileno(), 1 << 16)
                    if not part:
                        break
                    output += part
        left = deadline - time.monotonic() if len(output) <= OUTPUT_BYTES else 0
        return output, self.command(END, pid, max(0, left)), time.monotonic() >= deadline

    def try_twice(self, action, job, timeout):
        """Do a job. Where no readable answer comes, a new supervisor gets the job once more."""
        for _ in range(2):
            try:
                return action(job, time.monotonic() + timeout)
            except (OSError, EOFError, ValueError, LookupError, TypeError, struct.error):
                self.close()
                self.start()
        return self.outcome({"reason": "killed: the sandbox gives no readable answer"}, 0, False)

    def check(self, program, entry_point, helpers, test, timeout, inside=False, data=None):
        """Load a program and let a test check its entry point -> passed, reason, exact.

        helpers: a program whose names the test may use; data: its DATA, encoded; inside: in one.
        """
        job = {"program": program, "entry_point": entry_point, "helpers": helpers, "test": test,
               "data": data or encode(None), "timeout": timeout}
        return self.try_twice(self.check_in_one if inside else self.check_in_two, job, timeout)

    def grade(self, problem, completion, timeout=3.0):
        """Grade one completion of a problem -> Grade."""
        return self.grade_program(problem, assemble(problem, completion), timeout)

    def grade_program(self, problem, program, timeout=3.0):
        """Grade a whole program as the answer to a problem -> Grade.

        If the problem's own solution fails and a value of it cannot be sent as what it is (such as
        an object of a class of its own), the problem is graded in one process. So only the problem
        decides that, never the program.
        """
        own = assemble(problem, problem.get("canonical_solution") or "    pass\n")
        rest = problem["entry_point"], own, problem["test"], timeout
        data = encode(problem.get("inputs"))
        result, weak = self.check(program, *rest, data=data), False
        if not result["passed"] and problem.get("canonical_solution"):
            key = problem_key(problem)
            if key not in self.cannot_cross:
                own_result = self.check(own, *rest, data=data)
                self.cannot_cross[key] = not own_result["passed"] and not own_result["exact"]
            weak = self.cannot_cross[key]
            if weak:
                result = self.check(program, *rest, inside=True, data=data)
        return Grade(result["passed"], result["reason"], weak)

    def run(self, source, stdin="", timeout=3.0):
        """Run a script -> (what it printed, "ok" or what went wrong)."""
        data = pack(source) + stdin.encode(errors="replace")
        result = self.try_twice(functools.partial(self.exchange, SCRIPT), data, timeout)
        if isinstance(result, dict):
            return "", result["reason"]
        output, status, late = result
        reason = {0: "ok", 1: "exception", 3: "memory"}.get(status, f"exception: status {status}")
        if late:
            reason = "timeout"
        elif len(output) > OUTPUT_BYTES:
            reason = "killed: it prints too much"
        elif status < 0:
            reason = f"killed: signal {-status}"
        return output[:OUTPUT_BYTES].decode(errors="replace"), reason

    def close(self):
        """End the supervisor, and so all its processes."""
        if self.runner:
            self.runner.close()
        self.control.close()
        try:
            self.process.wait(1)                                # it may be at work
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def problem_key(problem):
    return problem["prompt"], problem["test"], problem.get("canonical_solution")


def grades(pairs, workers=None, timeout=3.0, weak=False):
    """Yield the Grade of each (problem, whole program), in order; one sandbox per core.

    A problem has prompt, entry_point and test, as in HumanEval. SandboxError: see Sandbox.
    """
    pairs = list(pairs)
    keys = [problem_key(problem) for problem, _ in pairs]
    results, waiting, lock = [Future() for _ in pairs], list(range(len(pairs))), threading.Lock()

    def work(sandbox):
        last = None
        while True:
            with lock:
                if not waiting:
                    return
                # Not two samples of one problem in a row: one might leave a sign for the next.
                number = next((number for number in waiting if keys[number] != last), waiting[0])
                waiting.remove(number)
            try:
                results[number].set_result(sandbox.grade_program(*pairs[number], timeout))
            except BaseException as error:
                results[number].set_exception(error)
            last = keys[number]

    def stop():
        with lock:
            waiting.clear()

    with contextlib.ExitStack() as stack:
        for _ in range(max(1, min(workers or cores(), len(pairs)))):
            sandbox = stack.enter_context(contextlib.closing(Sandbox(weak)))
            thread = threading.Thread(target=work, args=(sandbox,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop)                                # first, should nobody read on
        for result in results:
            yield result.result()


def grade_all(pairs, workers=None, timeout=3.0, weak=False):
    """The Grade of each (problem, completion), in order."""
    pairs = [(problem, assemble(problem, completion)) for problem, completion in pairs]
    return list(grades(pairs, workers, timeout, weak))


def grade(problem, completion, timeout=3.0, weak=False):
    """Grade one completion. Starting a sandbox takes most of the time: see grade_all for many."""
    return grade_all([(problem, completion)], 1, timeout, weak)[0]


def run_program(source, stdin="", timeout=3.0, weak=False):
    """Run a script in a sandbox -> (what it printed, "ok" or what went wrong)."""
    with contextlib.closing(Sandbox(weak)) as sandbox:
        return sandbox.run(source, stdin, timeout)
