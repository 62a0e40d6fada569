"""pytest tests/test_grader.py: the sandbox, problem files and scores of evaluate.py."""

import contextlib
import errno
import gzip
import json
import os
import struct
import sys
import textwrap
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, reference_data
from hostile import HOSTILE, LIAR, MODULES, PROBLEM, RIGHT, RIGHT_PROGRAMS, WRONG

import evaluate
import support.sandbox
from support.benchmarks import to_problem
from support.files import InputError, read_rows
from support.sandbox import (OUTPUT_BYTES, REASONS, Sandbox, SandboxError, grade, grade_all,
                             grade_naive, run_program)
from support.supervisor import (ALLOW, AND, CALLS, ERROR, JUMP_IF_EQUAL, LOAD, MACHINES, RETURN,
                                seccomp_filter)
from support.values import decode

SOLUTION = PROBLEM["canonical_solution"]
PROGRAM = PROBLEM["prompt"] + SOLUTION
LIE = "    return Liar()\n\n\n" + LIAR             # a completion that equals everything
LAYERS = ("process", "exhaust", "files", "network", "kernel")     # groups of HOSTILE


def short(value):
    """A part of the name of a test."""
    return str(value)[:30]


def no_sandbox_here():
    """None, or why programs cannot be locked in on this system."""
    try:
        Sandbox().close()
    except SandboxError as error:
        return str(error)


pytestmark = pytest.mark.skipif(no_sandbox_here() is not None, reason=str(no_sandbox_here()))


@pytest.fixture(scope="module")
def sandbox():
    with contextlib.closing(Sandbox()) as sandbox:
        yield sandbox


def attack(sandbox, names, timeout=0.7):
    """Grade hostile programs -> {name: result}."""
    return {name: sandbox.check(HOSTILE[name], "total", PROGRAM, PROBLEM["test"], timeout)
            for name in names}


def passed_names(results):
    return [name for name, result in results.items() if result["passed"]]


def remains():
    """The files that an attack left."""
    folders = ["/tmp", "/var/tmp", "/dev/shm", "/", str(Path.home()), str(ROOT), *sys.path]
    return [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)
            if "minicoder_hostile" in name]


def processes(mark):
    """The processes with a mark in their command line, which forks inherit."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):                  # it has ended meanwhile
            if mark.encode() in (folder / "cmdline").read_bytes():
                numbers.append(folder.name)
    return numbers


def check_of(test):
    return "def check(f):\n" + textwrap.indent(test.strip(), "    ") + "\n"


def function_check(sandbox, body, test, timeout=20):
    """Grade `def f(*a)` with this body by a test of f."""
    modules = MODULES
    if "np." in body + test:                                # its import takes half a second
        modules += "import numpy as np\n"
    program = modules + "def f(*a):\n" + textwrap.indent(body, "    ") + "\n"
    return sandbox.check(program, "f", program, check_of(modules + test), timeout)


# ------------------------------------------------------------------------------------------------
# Attacks and right programs


def test_no_hostile_program_passes():
    mark = f"no layer {os.getpid()}"
    descriptors = len(os.listdir("/proc/self/fd"))
    names = list(HOSTILE)
    with contextlib.ExitStack() as stack:
        sandboxes = [stack.enter_context(contextlib.closing(Sandbox(without=[mark])))
                     for _ in range(2)]
        with ThreadPoolExecutor(2) as threads:
            halves = list(threads.map(attack, sandboxes, [names[::2], names[1::2]]))
        results = halves[0] | halves[1]
        assert passed_names(results) == []
        for sandbox in sandboxes:                           # they go on as if nothing had happened
            assert sandbox.grade(PROBLEM, SOLUTION) == (True, "passed", False)
        assert len(processes(mark)) >= 2
    assert remains() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert processes(mark) == []
    assert {result["reason"].split(":")[0] for result in results.values()} == set(REASONS)


@pytest.mark.parametrize("without", ["Landlock", "mounts"])
def test_one_layer_of_two_is_enough(without):
    try:
        sandbox = Sandbox(without=[without])
    except SandboxError:
        pytest.skip("this system has only that one, or only root may read Python's library")
    with contextlib.closing(sandbox):
        assert without not in sandbox.layers
        names = [name for name in HOSTILE if name.startswith(LAYERS)]
        assert passed_names(attack(sandbox, names)) == []
        assert sandbox.grade(PROBLEM, SOLUTION).passed
    assert remains() == []


@pytest.mark.parametrize("without", [["Landlock", "mounts"], ["seccomp"], ["no-new-privileges"]])
def test_too_few_layers_are_refused(without):
    with pytest.raises(SandboxError, match="--weak-sandbox|library"):
        Sandbox(without=without)


def test_weak_sandbox():
    with contextlib.closing(Sandbox(weak=True, without=["seccomp"])) as sandbox:
        assert sandbox.grade(PROBLEM, SOLUTION).passed
        assert not sandbox.grade(PROBLEM, "    import os\n    os._exit(0)\n").passed


def test_a_library_that_programs_cannot_read(monkeypatch):
    """As where Python belongs to root alone: one line says so, before every program fails."""
    monkeypatch.setattr(support.sandbox.os, "access", lambda path, mode: path.startswith("/etc"))
    with pytest.raises(SandboxError, match="cannot read Python's library, .*: install") as caught:
        Sandbox()
    assert "\n" not in str(caught.value)


def test_right_programs_pass(sandbox):
    """Arguments, results and exceptions are in the test what they are in plain Python."""
    failed = {body: result["reason"] for body, test in RIGHT
              if not (result := function_check(sandbox, body, test))["passed"]}
    for program, test in RIGHT_PROGRAMS:
        result = sandbox.check(program, "f", program, check_of(test), 20)
        if not result["passed"]:
            failed[program] = result["reason"]
    assert failed == {}


@pytest.mark.parametrize("body, test, reason", WRONG)
def test_wrong_answers_fail(sandbox, body, test, reason):
    result = function_check(sandbox, body, test, 1 if reason == "timeout" else 20)
    assert not result["passed"] and result["reason"].startswith(reason), result


def test_one_process_can_be_fooled(sandbox):
    """Why there are two processes: the naive grader passes a program that equals everything."""
    assert grade_naive(PROBLEM, SOLUTION).passed
    assert not grade_naive(PROBLEM, "    return None\n").passed
    assert grade_naive(PROBLEM, LIE).passed
    assert not sandbox.grade(PROBLEM, LIE).passed


# ------------------------------------------------------------------------------------------------
# Grading


@pytest.mark.parametrize("completion, reason", [
    ("    return sum(numbers", "syntax: line 7"), ("    return 1/0\n", "exception: ZeroDivision"),
    ("    pass\ndel total\n", "no entry point"), ("    return 3\n", "wrong answer: assert"),
    ("    return [0] * 10**10\n", "memory"), ("    import os\n    os._exit(3)\n", "killed: it"),
    ("    while True: pass\n", "timeout"), ("    return lambda: 1\n", "protocol: a value of type")])
def test_reasons(sandbox, completion, reason):
    result = sandbox.grade(PROBLEM, completion, 1)
    assert not result.passed and result.reason.startswith(reason), result


@pytest.mark.parametrize("end, reason", [("import os; os._exit(7)", "killed: the test itself"),
                                         ("raise SystemExit", "killed: the test itself"),
                                         ("while True: pass", "timeout")])
def test_a_test_that_ends_its_process(sandbox, end, reason):
    test = f"def check(f):\n    assert f([1]) == 1\n    {end}\n"
    assert sandbox.check(PROGRAM, "total", "", test, 1)["reason"] == reason
    assert sandbox.grade(PROBLEM, SOLUTION).passed


def test_only_the_problem_decides_how_it_is_graded(sandbox):
    """In one process, marked as weak, only if the problem's own solution needs it to pass. A
    program that lies, or a solution that is wrong or slow, does not change that."""
    problem = {"prompt": "class Pair:\n    def __init__(self, a, b):\n"
                         "        self.a, self.b = a, b\n\n\n"
                         "def larger(pair):\n    \"\"\"The larger one.\"\"\"\n",
               "entry_point": "larger", "canonical_solution": "    return max(pair.a, pair.b)\n",
               "test": "def check(candidate):\n    assert candidate(Pair(1, 2)) == 2\n"}
    assert sandbox.grade(problem, "    return pair.b\n") == (True, "passed", True)
    assert sandbox.grade(problem, "    return pair.a\n")[::2] == (False, True)
    wrong = ("return map(str, numbers)\n", "return object()\n", "while True: pass\n")
    for solution in (SOLUTION, *["    " + body for body in wrong]):
        graded = sandbox.grade({**PROBLEM, "canonical_solution": solution}, LIE, 0.5)
        assert graded[::2] == (False, False)
    assert not sandbox.grade({**PROBLEM, "solution": PROGRAM}, "    return 0\n").passed


def test_random_numbers_of_a_test_are_its_own(sandbox):
    program = "import random\nf = random.random\n"
    test = "import random\ndef check(f):\n    assert f() == random.random()\n"
    for _ in range(2):
        result = sandbox.check(program, "f", "", test, 3)
        assert result["reason"] == "wrong answer: assert f() == random.random()"
        sandbox.check("while True: pass", "f", "", test, 0.2)       # and a new test runner


MANY = "def f(n):\n    return ['ab'] * 2_500_000 if n == 1 else 1 / 0\n"
WIDE = "def f(n):\n    return ['\\U0001f600' * 1000] * 15_000 if n == 1 else 1 / 0\n"


@pytest.mark.parametrize("large", [MANY, WIDE], ids=["many", "wide"])
def test_a_test_runner_forgets(sandbox, large):
    """A large answer, kept by an exception, leaves the next test the memory that a test may use."""
    keeps = "def check(f):\n    first = f(1)\n    f(2)\n"
    needs = "def check(f):\n    block = bytearray({} << 20)\n    assert f(1) == 1\n"
    right = "def f(n):\n    return n\n"
    for _ in range(2):
        assert sandbox.check(large, "f", "", keeps, 60)["reason"].startswith("exception: ")
        assert sandbox.check(right, "f", "", needs.format(850), 60)["passed"]
        assert "memory" in sandbox.check(right, "f", "", needs.format(1050), 60)["reason"]


def test_a_dead_supervisor_fails_nobody(sandbox):
    sandbox.process.kill()
    assert sandbox.grade(PROBLEM, SOLUTION).passed
    assert sandbox.run("print(1)") == ("1\n", "ok")
    assert sandbox.grade(PROBLEM, SOLUTION).passed


# Writes data into every descriptor, where the pipe of the answers or results may be
WRITE = """
    import os
    for fd in range(3, 64):
        try:
            os.write(fd, {})
        except OSError:
            pass
    os._exit(0)
"""


@pytest.mark.parametrize("data", [b"junk", b"\5\0\0\0junk!", b"\1\0\0\0" b"5", b"\2\0\0\0{}",
                                  b"\xff" * 99], ids=short)
def test_an_unreadable_result_is_no_end(sandbox, data):
    """A test that writes into the pipe of the results costs this job, and nothing else."""
    test = "def check(f):\n    f([1])" + WRITE.format(data)
    result = sandbox.check(PROGRAM, "total", "", test, 1)
    assert not result["passed"] and result["reason"].split(":")[0] in REASONS
    assert sandbox.grade(PROBLEM, SOLUTION) == (True, "passed", False)


def forged(message):
    data = json.dumps(message).encode()
    return WRITE.format(len(data).to_bytes(4, "little") + data)


@pytest.mark.parametrize("body", [
    "    raise type('passed', (Exception,), {})('passed')\n",
    "    raise ValueError('\\x1b[2K\\r\\npass@1: 1.0\\ud800')\n",
    forged({"refused": "passed"}), forged({"passed": False, "reason": "passed", "worn": False})])
@pytest.mark.parametrize("inside", [False, True])
def test_no_program_chooses_its_reason(sandbox, body, inside):
    """Else the word before the colon, which scores print, could say what the program likes."""
    program = "def total(numbers):\n" + body
    result = sandbox.check(program, "total", PROGRAM, PROBLEM["test"], 1, inside=inside)
    reason = result["reason"]
    assert reason.split(":")[0] in REASONS and reason.isprintable() and reason.isascii()


@pytest.mark.parametrize("source, stdin, result", [
    ("print(input()[::-1])", "abc\n", ("cba\n", "ok")),
    ("print(len(open(0).read()))", "x" * 200_000, ("200000\n", "ok")),
    ("print(1, flush=True)\nwhile True: pass", "", ("1\n", "timeout")),
    ("print(2)\nraise ValueError", "", ("2\n", "exception")),
    ("x = 'a' * 10**11", "", ("", "memory")),
    ("import ctypes; ctypes.string_at(0)", "", ("", "killed: signal 11")),
    ("while True: print('x' * 1023)", "", (("x" * 1023 + "\n") * (OUTPUT_BYTES >> 10),
                                          "killed: it prints too much")),
    ("import sys; sys.exit(0)", "x" * 200_000, ("", "ok")),
    ("import os; os.close(1); sum(range(10**6))", "", ("", "ok")),
    ("import os; os.close(0); print(1)", "x" * 200_000, ("1\n", "ok")),
    ("print(1)\nexit()\nprint(2)", "", ("1\n", "ok")),
    ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print(1))).start()",
     "", ("1\n", "ok")),
    ("import atexit\natexit.register(print, 1)", "", ("1\n", "ok")),
    ("import argparse, sys\nargparse.ArgumentParser().parse_args()\nprint(sys.argv)", "",
     ("['program.py']\n", "ok")),
    ("import fileinput\nprint(*map(int, fileinput.input()))", "1\n2", ("1 2\n", "ok")),
    ("import sys\nfor line in sys.stdin: print(line * 40, end='')", "0123456789\n" * 2000,
     ("0123456789\n" * 80_000, "ok"))], ids=short)
def test_scripts(sandbox, source, stdin, result):
    assert sandbox.run(source, stdin) == result


def test_order_and_single_calls():
    pairs = [(PROBLEM, SOLUTION if i % 3 else "    return 0\n") for i in range(12)]
    assert [g.passed for g in grade_all(pairs, 3)] == [bool(i % 3) for i in range(12)]
    assert grade(PROBLEM, SOLUTION).passed
    assert run_program("print(1)") == ("1\n", "ok")


@pytest.mark.parametrize("nodes", [
    ["builtin", "exec"], ["builtin", "__import__"], ["exception", "exec", {}, None, "1"],
    ["exception", "int", {}, None], ["exception", "ValueError", 6, None], ["tuple", [0]],
    ["tuple", [-1]], ["tuple", [9]], ["tuple", [0, 0]], ["set", [0]], ["list", {"a": 1}],
    ["dict", 1], ["namedtuple", "x; import os", "a", 6], ["namedtuple", "A", "a b", 6],
    ["eval", "6"], ["numpy", "ndarray", "O", "AAAAAAAAAAA=", 1], [], 6, ["memoryview", 9],
    ["Fraction", 1, 0], ["Pattern", "(", 0]])
def test_false_nodes_are_refused(nodes):
    with pytest.raises(Exception) as raised:        # which the test runner takes for a fault
        decode([[0], [nodes]])
    assert raised.type.__module__ in ("builtins", "re", "sre_constants", "_sre", "decimal")


@pytest.mark.parametrize("before, node", [
    (OrderedDict(), ["dict", 1, 2]), ({}, ["list", 1]), ((1,), ["tuple", 2]),
    ({}, ["numpy", "ndarray", "<i8", "AAAAAAAAAAA=", 1]), ([1], ["tuple", 2]),
    (iter([]), ["list"])])
def test_an_argument_keeps_its_type(before, node):
    """A false answer cannot make something else of what the test has passed."""
    with pytest.raises((ValueError, TypeError, AttributeError)):
        decode([None, [node]], [before])


@pytest.mark.parametrize("body, test", [
    ("with tempfile.TemporaryDirectory() as d:\n    p = pathlib.Path(d, 'x')\n"
     "    p.write_text('hi')\n    os.makedirs(d + '/a/b'); p.rename(d + '/a/b/y')\n"
     "    return os.listdir(d), open(d + '/a/b/y').read()", "assert f() == (['a'], 'hi')"),
    ("with tempfile.NamedTemporaryFile('w+') as t:\n    t.write('abc'); t.seek(0)\n"
     "    return t.read(), os.path.exists(t.name)", "assert f() == ('abc', True)"),
    ("with tempfile.TemporaryFile('w+') as t:\n    t.write('abc'); t.seek(0); return t.read()",
     "assert f() == 'abc'"),
    ("open(tempfile.gettempdir() + '/left', 'w').write('x')\n"
     "return os.listdir(tempfile.gettempdir())",
     "assert f() == ['left'] and os.listdir(tempfile.gettempdir()) == []")])
def test_a_private_folder(sandbox, body, test):
    if "mounts" not in sandbox.layers:
        pytest.skip("this system lets us mount no folder")
    for _ in range(2):                                      # nothing is left of the first time
        result = function_check(sandbox, body, test)
        assert result["passed"], result


def test_threads_of_the_same_user_elsewhere(sandbox):
    """RLIMIT_NPROC counts by user, so it must leave room for what runs outside."""
    gate = threading.Event()
    threads = [threading.Thread(target=gate.wait) for _ in range(600)]
    for thread in threads:
        thread.start()
    try:
        look = "import resource\nprint(resource.getrlimit(resource.RLIMIT_NPROC)[0])"
        text, _ = sandbox.run(look)
    finally:
        gate.set()
    assert int(text) >= 600 + 512


# ------------------------------------------------------------------------------------------------
# Benchmarks


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("file, name, count, weak, failing", [
    ("HumanEval.jsonl.gz", "humaneval", 164, [], []),
    ("cruxeval.jsonl.gz", "cruxeval-output", 200, [], []),
    ("cruxeval.jsonl.gz", "cruxeval-input", 200, [], []),
    ("mbpp.jsonl.gz", "mbpp", 974, ["MBPP/367", "MBPP/601", "MBPP/927"], []),
    ("HumanEval-RandomSpanInfillingLight.jsonl.gz", "infilling-random-span-light", 164, [], []),
    slow("HumanEvalPlus.jsonl.gz", "humaneval+", 164, [], []),
    # 255 takes more than a gigabyte, 599 about a minute
    slow("MbppPlus-v0.1.0.jsonl.gz", "mbpp+", None, [], ["Mbpp/255", "Mbpp/599"]),
    slow("sanitized-mbpp.json.gz", "mbpp", None, [], []),
    slow("cruxeval.jsonl.gz", "cruxeval-output", 800, [], []),
    slow("cruxeval.jsonl.gz", "cruxeval-input", 800, ["sample_344", "sample_364"], []),
    slow("HumanEval-SingleLineInfilling.jsonl.gz", "infilling", None, [], [])])
def test_published_solutions_pass(file, name, count, weak, failing):
    rows = [row for _, row in read_rows(reference_data(f"eval/{file}"))][:count]
    problems = [to_problem(row, name) for row in rows]
    results = grade_all([(p, p["canonical_solution"]) for p in problems], timeout=30)
    failed = [p["task_id"] for p, result in zip(problems, results) if not result.passed]
    assert len(results) == (count or len(rows)) and set(failed) <= set(failing)
    assert [p["task_id"] for p, result in zip(problems, results) if result.weak] == weak


def test_ladder():
    problems = {row["task_id"]: row for _, row in read_rows(ROOT / "assets" / "ladder.jsonl")}
    wrong = json.loads((ROOT / "tests" / "ladder_wrong.json").read_text())
    assert len(problems) == 140 and set(wrong) == set(problems)
    right = grade_all([(p, p["canonical_solution"]) for p in problems.values()])
    assert all(result.passed and not result.weak for result in right)
    bad = [(problems[name], text) for name, texts in wrong.items() for text in texts]
    assert [pair for pair, result in zip(bad, grade_all(bad)) if result.passed] == []


@pytest.mark.parametrize("solution, answer, passes", [
    ("1.0", "1.00001", True), ("1.0", "1.001", False), ("1.0", "1e309", False),
    ("float('inf')", "float('inf')", True), ("float('inf')", "1.0", False)])
def test_what_counts_as_near(sandbox, solution, answer, passes):
    row = {"task_id": "HumanEval/x", "prompt": "def g(xs):\n", "entry_point": "g",
           "canonical_solution": f"    return {solution}\n", "base_input": [[[1, 0, 1]]],
           "plus_input": [], "atol": 1e-4}
    problem = to_problem(row, "humaneval")
    assert sandbox.grade(problem, f"    return {answer}\n").passed == passes
    row |= {"prompt": "def find_zero(xs):\n", "entry_point": "find_zero"}
    problem = to_problem(row, "humaneval")
    assert not sandbox.grade(problem, "    return 1j\n").passed             # a root of x * x + 1


def test_humaneval_plus(sandbox):
    rows = [row for _, row in read_rows(reference_data("eval/HumanEvalPlus.jsonl.gz"))]
    for row in rows[:2] + [rows[32]]:
        problem = to_problem(row, "humaneval+")
        graded = sandbox.grade(problem, row["canonical_solution"], 20)
        assert graded == (True, "passed", False)
        assert not sandbox.grade(problem, "    return None\n", 20).passed


MBPP_PLUS = [("2", []), ("115", []), ("124", []), ("252", []), ("580", []),
             # the truth of a match is as good as the match
             ("737", [("bool(re.match('[aeiouAEIOU]', s))", True), ("True", False),
                      ("re.match('[aeiouAEIOU]', s)", True), ("None", False)]),
             # either height may be used, rounded
             ("581", [("round(b * b + 2 * b * math.hypot(b / 2, s))", True),
                      ("b * b + 2 * b * math.hypot(b / 2, s)", False),
                      ("2 * b * s + b * b", True)])]


@pytest.mark.parametrize("number, answers", MBPP_PLUS)
def test_mbpp_plus(sandbox, number, answers):
    rows = read_rows(reference_data("eval/MbppPlus-v0.1.0.jsonl.gz"))
    row = next(row for _, row in rows if row["task_id"] == f"Mbpp/{number}")
    problem = to_problem(row, "mbpp+")
    assert sandbox.grade(problem, row["canonical_solution"], 20).passed
    head = {"737": "check_str(s)", "581": "surface_Area(b, s)"}.get(number)
    for answer, passes in answers:
        program = f"import math\nimport re\ndef {head}:\n    return {answer}\n"
        assert sandbox.grade(problem, program, 20).passed == passes, answer


def test_cruxeval(sandbox):
    """f belongs to the test: an answer that calls it to get the value does not count."""
    row = {"code": "def f(a, b):\n    return a + b", "input": "1, 2", "output": "3", "id": "x"}
    problem = to_problem(row, "cruxeval-input")
    for answer in ("f(1, 2)", "f(b=3, a=0)"):
        assert sandbox.grade(problem, answer).passed
    for wrong in ("f(3)", "f(1, 1)", "3", "", "f(1, 2) and 3"):
        assert not sandbox.grade(problem, wrong).passed, wrong
    problem = to_problem(row, "cruxeval-output")
    assert sandbox.grade(problem, "3").passed
    stack = "g()\nimport sys\ng = lambda: eval(sys._getframe(1).f_code.co_consts[0], {})(1, 2)"
    for wrong in ("f(1, 2)", "f( 1,2 )", "4", "", "??", stack):
        assert not sandbox.grade(problem, wrong).passed, wrong
    assert "return a + b" not in problem["prompt"]


# ------------------------------------------------------------------------------------------------
# python evaluate.py score


@pytest.fixture
def score(tmp_path, typed):
    """Score samples, given as text, on a file of problems."""
    def call(samples, *flags, problems=None, benchmark="humaneval"):
        (tmp_path / "p.jsonl").write_text(json.dumps(problems or PROBLEM))
        (tmp_path / "s.jsonl").write_text(samples)
        return typed("evaluate.py", "score", "--benchmark", benchmark, "--problems",
                     tmp_path / "p.jsonl", "--samples", tmp_path / "s.jsonl", *flags)

    return call


RIGHT_SAMPLE = {"task_id": "hostile/0", "solution": PROGRAM}
WRONG_SAMPLE = json.dumps({"task_id": "hostile/0", "completion": ""}) + "\n"
SAMPLES = json.dumps(RIGHT_SAMPLE) + "\n" + WRONG_SAMPLE


def test_score_command(tmp_path, score):
    problem = reference_data("eval/human-eval_example_problem.jsonl")
    samples = reference_data("eval/human-eval_example_samples.jsonl")
    done = score(samples.read_text(), problems=json.loads(problem.read_text()))
    assert "pass@1: 0.5000" in done.stdout and "sandbox: rlimits" in done.stdout
    results = [row for _, row in read_rows(tmp_path / "s.jsonl_results.jsonl")]
    assert [row["passed"] for row in results] == [False, False, False, True, True, True]
    assert "1 lines repeat" in score(json.dumps(RIGHT_SAMPLE) + "\n" + SAMPLES).stdout


def test_score_resumes(tmp_path, score):
    """A grade is taken over only for the same sample, problems and benchmark."""
    file = tmp_path / "s.jsonl_results.jsonl"
    done = score(SAMPLES, "--resume")
    assert "pass@1: 0.5000" in done.stdout, done.stderr
    [_, row], *_ = read_rows(file)
    row |= {"passed": False, "reason": "timeout"}
    changed = SAMPLES.replace("return sum", "return 1 or sum")
    for earlier, samples, benchmark, resumed in (
            (row, SAMPLES, "humaneval", True), (row, changed, "humaneval", False),
            ({**row, "problems": "other"}, SAMPLES, "humaneval", False),
            (row, SAMPLES, "ladder", False)):
        file.write_text(json.dumps(earlier) + "\n")
        printed = score(samples, "--resume", benchmark=benchmark).stdout
        assert ("1 timeout" in printed) == resumed
    for damaged in (b'{"task_id": "hos', b"\xff", b"5\n"):
        file.write_bytes(damaged)
        assert "pass@1: 0.5000" in score(SAMPLES, "--resume").stdout


NO_PROBLEMS = [
    {"task_id": "x/0", "prompt": 5, "entry_point": "f", "test": ""},
    {"code": "print 1", "test_list": ["f()"]}, {"code": "x = 1", "test_list": []},
    {"question": "", "answer": 5}, {"question": "", "answer": "it is none"},
    {"code": 1, "input": 2, "output": 3},
    {**PROBLEM, "canonical_solution": 5}, {**PROBLEM, "entry_point": 5}]


@pytest.mark.parametrize("samples, flags, settings, message", [
    ('{"task_id": "x", "completion": ""}\n', [], {}, "line 1: no task 'x'"),
    ('{"task_id": ["x"], "completion": ""}\n', [], {}, "line 1: no task ['x']"),
    ('{"task_id": "hostile/0"}', [], {}, "line 1: expected a completion"),
    ('{"task_id": "hostile/0", "solution": 5}', [], {}, "line 1: expected a completion"),
    (WRONG_SAMPLE + '{"task', [], {}, "line 2: not a JSON object"),
    ("\n", [], {}, "holds no sample"),
    *[(WRONG_SAMPLE, [], {"problems": row}, "line 1: no problem") for row in NO_PROBLEMS],
    ("", [], {"problems": {"language": "java", "prompt": "", "tests": ""}}, "MultiPL-E"),
    (WRONG_SAMPLE, [], {"benchmark": "humaneval+"}, "needs EvalPlus's file"),
    (WRONG_SAMPLE, ["--limit", "1"], {}, "all samples of the file are graded"),
    (WRONG_SAMPLE, ["--timeout", "-1"], {}, "--timeout above 0 seconds"),
    (WRONG_SAMPLE, ["--timeout", "nan"], {}, "--timeout above 0 seconds"),
    (WRONG_SAMPLE, ["--top-p", "0"], {}, "--timeout above 0 seconds")])
def test_bad_input(score, samples, flags, settings, message):
    done = score(samples, *flags, **settings)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_bad_problem_files(tmp_path):
    for text, line in (("[1, 2]", 1), ('[{"a": 1}, 3]', 2), ("[{", 1), ('{"a": 1}\n"x y"', 2)):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=f"line {line}: not a JSON object"):
            read_rows(tmp_path / "bad.json")
    rows = [{"task_id": "a", "prompt": "", "entry_point": "f", "test": ""},
            {"question": "1 + 1?", "answer": "#### 2"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="holds programs and questions"):
        evaluate.find_problems("gsm8k", tmp_path / "mixed.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    with pytest.raises(InputError, match="cut off"):
        read_rows(tmp_path / "cut.gz")


# ---- the system call filter, also for the processor that this machine does not have


def run_filter(program, machine, number, *args):
    """What a seccomp program answers to a call: a small classic BPF machine."""
    data = struct.pack("<iIQ6Q", number, MACHINES[machine], 0, *args, *[0] * (6 - len(args)))
    steps = list(struct.iter_unpack("HBBI", program))
    at = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == LOAD:
            [value] = struct.unpack_from("<I", data, operand)
        elif code == AND:
            value &= operand
        elif code == JUMP_IF_EQUAL:
            at += if_true if value == operand else if_false
        else:
            assert code == RETURN
            return operand


@pytest.mark.parametrize("machine", MACHINES)
def test_system_calls(machine):
    column = 1 + list(MACHINES).index(machine)
    numbers = {fields[0]: int(fields[column]) for fields in map(str.split, CALLS.split(","))
               if fields[column] != "-"}

    def answer(name, *args, writing=False):
        return run_filter(seccomp_filter(machine, writing), machine, numbers[name], *args)

    denied = ERROR | errno.EACCES
    assert answer("read") == ALLOW
    unknown = run_filter(seccomp_filter(machine), machine, 599)
    assert unknown == ERROR | errno.ENOSYS
    for mode, expected in ((os.O_RDONLY, ALLOW), (os.O_WRONLY, denied), (os.O_CREAT, denied)):
        assert answer("openat", 0, 0, mode) == expected
        assert answer("openat", 0, 0, mode, writing=True) == ALLOW
    assert answer("clone", 0x3D0F00) == ALLOW                               # a thread
    assert answer("clone", 0x1200011) == ERROR | errno.EAGAIN               # a process
    assert answer("futex", 0, 128) == ALLOW                                 # of this process
    assert answer("futex", 0, 0) == ERROR | errno.EAGAIN                    # shared with others
    assert answer("prlimit64", 0) == ALLOW and answer("prlimit64", 7) == denied
    assert answer("clock_gettime", 2) == ALLOW
    assert answer("clock_gettime", 0xFFFFFFF2) == denied                    # of another process
    assert seccomp_filter("riscv64") is None
