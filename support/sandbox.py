"""Runs programs that a model wrote, and grades them so that they cannot forge the result.

How are code graders fooled? A simple one (grade_naive) runs program and test in one process. There
the program can do whatever the test can: return an object that equals everything, replace
AssertionError, or find the variable with the result on the stack. So each check takes two
processes, which exchange nothing but plain data (support/values.py):

    child         has the program, not the test: it calls the function with the arguments it is sent
    test runner   has the test, not the program: check(candidate) calls a Proxy that asks the child

What the child prints, and how it ends, does not count. Both run behind the layers of
support/supervisor.py, which keep them from files, the network, other processes and too much memory.
docs/sandbox.md says what each layer stops. All three files use only the standard library, because
they are also run by a bare Python process.

Read first: grade_naive, child, Proxy, judge, Sandbox.check_once.
"""

import contextlib
import functools
import gc
import itertools
import json
import os
import queue
import random
import resource
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.supervisor import ANSWER, COMMAND, END, SCRATCH, SCRIPT, cores
from support.values import (ATOMS, Encoder, builtin_class, decode, encode, pack, read_exactly,
                            receive, send)

MESSAGE_BYTES = 64 << 20    # the most that a child may send at once
OUTPUT_BYTES = 1 << 20      # the most that a program may print
RUNNER_BYTES = 128 << 20    # a test runner that has grown beyond this is replaced

# passed; why not ("wrong answer: ...", "timeout", ...); weak: by one process, so it may be forged
Grade = namedtuple("Grade", "passed reason weak", defaults=[False])
# What a reason may begin with, before the colon. Scores print it, so no program may choose it.
REASONS = ("wrong answer", "exception", "syntax", "no entry point", "timeout", "memory", "killed",
           "protocol")

# ------------------------------------------------------------------------------------------------
# One process: a grader that can be fooled


def assemble(problem, completion):
    """The whole program: the prompt, the completion and what follows it."""
    return problem["prompt"] + completion + problem.get("suffix", "")


def grade_naive(problem, completion):
    """Grade in this very process, as simple graders do. Only for programs that you trust!"""
    names = {}
    try:
        exec(assemble(problem, completion), names)
        exec(problem["test"], names)
        names["check"](names[problem["entry_point"]])
        return Grade(True, "passed")
    except Exception as error:
        return Grade(False, f"wrong answer: {error!r}")


# ------------------------------------------------------------------------------------------------
# Two processes: the child has the program


def load_program(program):
    """Run a program as a new module -> its names. `if __name__ == "__main__"` is false there."""
    module = types.ModuleType("completion")
    sys.modules["completion"] = module                          # dataclasses look it up
    exec(compile(program, "completion.py", "exec"), module.__dict__)
    return module.__dict__


def take(iterator, count):
    """Up to `count` more items -> (items, None or the exception that ended them)."""
    items = []
    deadline = time.monotonic() + 0.01      # the test may not need items that take longer
    try:
        while len(items) < count and time.monotonic() < deadline:
            items.append(next(iterator))
            if type(items[-1]) not in ATOMS:    # such as a list, which the next item may change
                break
    except BaseException as error:                              # mostly StopIteration
        return items, error
    return items, None


def answer(action, iterators, arguments=(), old_nodes=()):
    """What an action returns or raises, as a message to the test runner."""
    raised = False
    try:
        result = action()
    except BaseException as error:
        result = error
        raised = True
    message = {"raised": raised, "name": type(result).__name__}
    try:
        message["data"] = Encoder(arguments, iterators).encode(result, old_nodes)
    except TypeError as refused:
        if not raised:
            return {"refused": str(refused)}
        error = builtin_class(result)(str(result))      # without arguments that cannot be sent
        message["data"] = Encoder(arguments, iterators).encode(error, old_nodes)
    return message


def child(requests, replies):
    """Load the program, then answer requests: call its function, or get items of an iterator."""
    program, entry_point = receive(requests)
    iterators = []
    function = None

    def load():
        nonlocal function
        function = load_program(program).get(entry_point)
        return callable(function)

    send(replies, answer(load, iterators))
    while True:
        request = receive(requests)                             # EOFError ends this process
        if "next" in request:
            number, count = request["next"]
            message = answer(lambda: take(iterators[number], count), iterators)
        else:
            values, objects = decode(request["call"])
            count = len(values) - len(request["names"])
            named = dict(zip(request["names"], values[count:]))
            _, nodes = request["call"]
            message = answer(lambda: function(*values[:count], **named), iterators, objects, nodes)
        send(replies, message)


# ------------------------------------------------------------------------------------------------
# ... and the test runner has the test


class Lost(BaseException):
    """The child is gone or breaks the rules. Few tests catch a BaseException."""


# Raised inside map() or a loop, these end it silently: all(map(check_one, cases)) would pass.
# So they arrive as RuntimeError, as from a generator (PEP 479), unless the test names them.
SILENT = (StopIteration, StopAsyncIteration, GeneratorExit)


class Proxy:
    """Stands for the child's function in the test runner.

    fault: why the check has failed, whatever the test says. raised: the child's last exception.
    """

    def __init__(self, requests, replies, job):
        self.requests = requests
        self.replies = replies
        self.job = job
        self.__name__ = job["entry_point"]
        self.fault = self.raised = self.reason = None
        self.calls = 0
        self.silent = []                    # errors that may have ended a loop of the test

    def lose(self, reason):
        self.fault = self.fault or reason
        raise Lost

    def ask(self, request, arguments=()):
        """Send a request -> the value that comes back; raises what the child raised."""
        if self.fault or select.select([self.replies], [], [], 0)[0]:
            self.lose("protocol: an answer before the request")
        try:
            send(self.requests, request)
            reply = receive(self.replies, MESSAGE_BYTES)
            if "refused" in reply:
                self.lose(f"protocol: {reply['refused']}")
            value, _ = decode(reply["data"], arguments, self.remote_iterator)
            if reply["raised"] and not isinstance(value, BaseException):
                raise TypeError("no exception")
        except (EOFError, OSError):
            self.lose("killed")
        except MemoryError:
            self.lose("memory: the answer is too large")
        except Exception as problem:                # whatever false data can provoke
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
        self.raised = error
        self.reason = describe(error, name)
        raise error

    def start(self):
        """Send the program; raises Lost if it cannot be loaded."""
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
            self.lose(f"protocol: {refused}")
        self.calls += 1
        return self.ask({"call": values, "names": list(kwargs)}, encoder.objects)

    def remote_iterator(self, number):
        """The items of an iterator that stays in the child: it may never end."""
        received = 0
        while True:
            # At most a hundredth more than the test needs: finding more may take forever.
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
    """An exception as a reason; name: of its class, as the program calls it."""
    text = ""
    with contextlib.suppress(BaseException):
        text = str(error)[:200]
    kind = "memory" if isinstance(error, MemoryError) else "exception"
    return f"{kind}: {name}: {text}".removesuffix(": ")


def failed_line(test, error):
    """What went wrong in a test: its message, or the line that failed."""
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    lines = [0] + [line for frame, line in traceback.walk_tb(error.__traceback__)
                   if frame.f_code.co_filename == "<test>"]
    text = test.split("\n")[lines[-1] - 1].strip()
    if isinstance(error, AssertionError):
        return text
    return f"{describe(error, type(error).__name__)} in {text}"


def judge(names, job, function):
    """Let the test's check() call a function -> {"passed", "reason"}."""
    try:
        exec(compile(job["test"], "<test>", "exec"), names)
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
        reason = failed_line(job["test"], error)[:200]
        return {"passed": False, "reason": f"wrong answer: {reason}"}


def names_for_test(job):
    """The names that a test can use: DATA, REFERENCE, and those of the problem's own program."""
    names = {}
    with contextlib.suppress(Exception):                        # a prompt alone may not run
        names = load_program(job["helpers"])
    data, _ = decode(job["data"])
    return {**names, "DATA": data, "REFERENCE": names.get(job["entry_point"])}


def run_check(job, requests, replies):
    """Let a test judge the child at the other end of two pipes -> {"passed", "reason"}."""
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
        return {"passed": False, "reason": proxy.fault}
    return result


def run_check_inside(job):
    """The same for values that cannot be sent: here the program can forge its result."""
    try:
        names = names_for_test(job)
        names.update(load_program(job["program"]))
        return judge(names, job, names[job["entry_point"]])
    except BaseException as error:
        return {"passed": False, "reason": describe(error, type(error).__name__)}


def test_runner(control):
    """Do one job after another: each comes with the two pipes to a new child."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, control) as connection:
        while True:
            _, pipes, _, _ = socket.recv_fds(connection, 1, 2)
            if not pipes:
                return
            job = receive(control)
            random.seed()                   # no child may know the random numbers of the test
            result = run_check_inside(job) if job["inside"] else run_check(job, *pipes)
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            send(control, {**result, "worn": peak_bytes > RUNNER_BYTES})
            for fd in pipes:
                os.close(fd)
            del job
            gc.collect()                    # what exceptions hold in the frames of the test


CHILD, RUNNER = b"c", b"r"
ROLES = {CHILD: child, RUNNER: test_runner}

# ------------------------------------------------------------------------------------------------
# Grading

NUMBERS = itertools.count()     # of sandboxes: each uses another core


class SandboxError(OSError):
    """This system cannot isolate programs well enough."""


class Sandbox:
    """Grades and runs programs, one at a time. Close it after use.

    weak: continue where the system offers too few layers, instead of raising SandboxError.
    without: names of layers to leave out, to see what they are for.
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
        self.needs_one_process = {}                             # problem -> True or False
        self.start()
        missing = {"rlimits", "no-new-privileges", "seccomp"} - set(self.layers)
        if not weak and (missing or not {"mounts", "Landlock"} & set(self.layers)):
            self.close()
            raise SandboxError("this system offers too little to isolate programs ("
                               f"{', '.join(self.layers)}); --weak-sandbox runs them all the same")

    def start(self):
        """Start the supervisor, a bare Python process without our modules and environment."""
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

    def command(self, role, fds=(), pid=0, seconds=0.0):
        """Let the supervisor fork or end a process -> its id, or how it ended."""
        socket.send_fds(self.control, [COMMAND.pack(role, pid, seconds)], fds)
        reply = read_exactly(self.control.fileno(), ANSWER.size, time.monotonic() + seconds + 30)
        return ANSWER.unpack(reply)[0]

    def check_once(self, job, deadline):
        """Let a test runner judge a child -> its result."""
        if job["inside"]:                       # the program must not see what was there before
            self.end_runner()
        if not self.runner:
            self.runner, theirs = socket.socketpair()
            with theirs:
                self.runner_pid = self.command(RUNNER, [theirs.fileno()], seconds=1e6)
        child_reads, runner_writes = os.pipe()
        runner_reads, child_writes = os.pipe()
        pid = None
        try:
            socket.send_fds(self.runner, [b"j"], [runner_writes, runner_reads])
            send(self.runner.fileno(), job)
            if not job["inside"]:
                pid = self.command(CHILD, [child_reads, child_writes], seconds=job["timeout"])
        finally:
            for fd in (child_reads, runner_writes, runner_reads, child_writes):
                os.close(fd)
        result = None
        with contextlib.suppress(TimeoutError, EOFError):
            result = receive(self.runner.fileno(), deadline=deadline)
        late = time.monotonic() >= deadline
        status = self.command(END, pid=pid) if pid else 0
        if result is None or result["worn"] or job["inside"]:
            self.end_runner()
        return final_result(result or {"reason": "killed: the test itself"}, status, late)

    def end_runner(self):
        if self.runner:
            self.command(END, pid=self.runner_pid)
            self.runner.close()
            self.runner = None

    def exchange(self, role, data, deadline):
        """Give a process its input -> (its output, how it ended, whether that was too late)."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            stdin = os.open(file.name, os.O_RDONLY)
        read, stdout = os.pipe()
        output = b""
        with open(read, "rb", 0) as pipe:
            try:
                pid = self.command(role, [stdin, stdout], seconds=deadline - time.monotonic())
            finally:
                os.close(stdin)
                os.close(stdout)
            while len(output) <= OUTPUT_BYTES:
                seconds = max(0, deadline - time.monotonic())
                ready, _, _ = select.select([pipe], [], [], seconds)
                part = pipe.read(1 << 16) if ready else b""
                if not part:
                    break                                       # the end, or too late
                output += part
        seconds = 0 if len(output) > OUTPUT_BYTES else deadline - time.monotonic()
        status = self.command(END, pid=pid, seconds=seconds)
        return output, status, time.monotonic() >= deadline

    def try_twice(self, action, job, timeout):
        """Do a job. If no readable answer comes, a new supervisor gets the job once more."""
        for _ in range(2):
            try:
                return action(job, time.monotonic() + timeout)
            except Exception:                                   # whatever false data can cause
                self.close()
                self.start()
        return final_result({"reason": "killed: the sandbox gives no readable answer"}, 0, False)

    def check(self, program, entry_point, helpers, test, timeout, *, inside=False, data=None):
        """Load a program and let a test check its entry point -> {"passed", "reason"}.

        helpers: a program whose names the test may use. inside: in one process. data: encoded.
        """
        job = {"program": program, "entry_point": entry_point, "helpers": helpers, "test": test,
               "data": data or encode(None), "timeout": timeout, "inside": inside}
        return self.try_twice(self.check_once, job, timeout)

    def grade(self, problem, completion, timeout=3.0):
        """Grade one completion of a problem -> Grade."""
        return self.grade_program(problem, assemble(problem, completion), timeout)

    def grade_program(self, problem, program, timeout=3.0):
        """Grade a whole program as the answer to a problem -> Grade.

        If the problem's own solution passes in one process but not in two (as a value cannot be
        sent, such as an object of its own class), the problem is graded in one. So only the problem
        decides that, never the program.
        """
        solution = problem.get("canonical_solution")
        helpers = assemble(problem, solution or "    pass\n")
        check = functools.partial(
            self.check, entry_point=problem["entry_point"], helpers=helpers, test=problem["test"],
            timeout=timeout, data=encode(problem.get("inputs")))
        result = check(program)
        if result["passed"] or not solution:
            return Grade(result["passed"], result["reason"])
        key = problem["test"], helpers
        if key not in self.needs_one_process:
            kind = check(helpers)["reason"].split(":")[0]
            self.needs_one_process[key] = (kind in ("protocol", "exception", "wrong answer")
                                           and check(helpers, inside=True)["passed"])
        weak = self.needs_one_process[key]
        if weak:
            result = check(program, inside=True)
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
            self.process.wait(1)                                # it may be busy
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def final_result(result, status, late):
    """A result whose reason is a known one. At most the text after its colon is the program's."""
    kind, _, text = str(result["reason"]).partition(":")
    passed = not late and result.get("passed") is True
    if late:
        kind, text = "timeout", ""
    elif passed:
        kind, text = "passed", ""
    elif kind not in REASONS:
        kind, text = "protocol", " no known reason"
    elif kind == "killed" and not text:
        text = f" signal {-status}" if status < 0 else f" it ended with {status}"
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:300])
    return {"passed": passed, "reason": f"{kind}:{text}".removesuffix(":")}


def grades(pairs, workers=None, timeout=3.0, weak=False):
    """Yield the Grade of each (problem, whole program), in order; one sandbox per core. A problem
    has prompt, entry_point and test, as in HumanEval."""
    pairs = list(pairs)
    workers = max(1, min(workers or cores(), len(pairs)))
    idle = queue.SimpleQueue()

    def grade_pair(pair):
        problem, program = pair
        sandbox = idle.get()
        try:
            return sandbox.grade_program(problem, program, timeout)
        finally:
            idle.put(sandbox)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(contextlib.closing(Sandbox(weak))))
        yield from stack.enter_context(ThreadPoolExecutor(workers)).map(grade_pair, pairs)


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
