"""pytest tests/test_grader.py: the sandbox, problem files and scores of evaluate.py."""

import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, reference_data
from hostile import CONTROLS, HOSTILE, PROBLEM

import evaluate
from evaluate import to_problem
from support.files import InputError, read_rows
from support.sandbox import OUTPUT_BYTES, Sandbox, SandboxError, grade, grade_all, run_program

OWN = PROBLEM["prompt"] + PROBLEM["canonical_solution"]


def jail_here():
    """None, or why programs cannot be locked in on this system."""
    try:
        Sandbox().close()
    except SandboxError as error:
        return str(error)


pytestmark = pytest.mark.skipif(jail_here() is not None, reason=str(jail_here()))


@pytest.fixture(scope="module")
def box():
    with contextlib.closing(Sandbox()) as box:
        yield box


def remains():
    """The files that an attack left."""
    places = ["/tmp", "/var/tmp", "/dev/shm", "/", str(Path.home()), str(ROOT), *sys.path]
    return [name for place in places if os.path.isdir(place) for name in os.listdir(place)
            if "minicoder_hostile" in name]


def processes(mark):
    """The processes with a mark in their command line, which forks inherit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):                  # it has ended meanwhile
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def test_no_hostile_program_passes():
    before, mark = len(os.listdir("/proc/self/fd")), f"no layer {os.getpid()}"
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as stack:
        boxes = [stack.enter_context(contextlib.closing(Sandbox(without=[mark])))
                 for _ in range(2)]
        names = list(HOSTILE)

        def attack(i):
            return [(name, boxes[i].check(HOSTILE[name], "total", OWN, PROBLEM["test"], 0.7))
                    for name in names[i::2]]

        results = dict(itertools.chain(*threads.map(attack, range(2))))
        assert [name for name, result in results.items() if result["passed"]] == []
        for box in boxes:                                   # they go on as if nothing had been
            assert box.grade(PROBLEM, PROBLEM["canonical_solution"]) == (True, "passed", False)
        assert len(processes(mark)) >= 2
    assert remains() == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert processes(mark) == []
    reasons = {result["reason"].split(":")[0] for result in results.values()}
    assert reasons == {"wrong answer", "exception", "syntax", "no entry point", "timeout", "memory",
                       "killed", "protocol"}


def test_right_programs_pass(box):
    failed = {name: result for name, (problem, _) in CONTROLS.items()
              if (result := box.grade(problem, problem["canonical_solution"], 10))[::2]
              != (True, False)}
    assert failed == {}


@pytest.mark.parametrize("without", ["Landlock", "mounts", "namespaces"])
def test_one_layer_of_two_is_enough(without):
    names = [name for name in HOSTILE if name[:2] in ("29", "36", "43", "45", "46", "47")
             and name != "45d list folders"]                # of the file system made for it
    try:
        box = Sandbox(without=[without])
    except SandboxError:
        pytest.skip("this system has only that one")
    with contextlib.closing(box):
        assert without not in box.layers
        assert [name for name in names
                if box.check(HOSTILE[name], "total", OWN, PROBLEM["test"], 1)["passed"]] == []
        assert box.grade(PROBLEM, PROBLEM["canonical_solution"]).passed


def test_too_little_is_refused():
    for without in (["Landlock", "namespaces"], ["seccomp"], ["no-new-privileges"]):
        with pytest.raises(SandboxError, match="--weak-sandbox"):
            Sandbox(without=without)
    with contextlib.closing(Sandbox(weak=True, without=["Landlock", "namespaces", "seccomp"])) as b:
        assert b.grade(PROBLEM, PROBLEM["canonical_solution"]).passed
        assert not b.grade(PROBLEM, "    import os\n    os._exit(0)\n").passed


def test_reasons(box):
    reasons = {
        "    return sum(numbers": "syntax: line 7", "    return 1/0\n": "exception: ZeroDivision",
        "    pass\ndel total\n": "no entry point", "    return 3\n": "wrong answer: assert",
        "    return [0] * 10**10\n": "memory", "    import os\n    os._exit(3)\n": "killed: it",
        "    while True: pass\n": "timeout", "    return lambda: 1\n": "protocol: a value of type"}
    for completion, reason in reasons.items():
        result = box.grade(PROBLEM, completion, 1)
        assert not result.passed and result.reason.startswith(reason), result


def test_only_the_problem_decides_how_it_is_graded(box):
    """A test that needs an object of the program's: inside, marked. Else a liar stays outside."""
    problem = {"prompt": "class Pair:\n    def __init__(self, a, b):\n"
                         "        self.a, self.b = a, b\n\n\n"
                         "def larger(pair):\n    \"\"\"The larger one.\"\"\"\n",
               "entry_point": "larger", "canonical_solution": "    return max(pair.a, pair.b)\n",
               "test": "def check(candidate):\n    assert candidate(Pair(1, 2)) == 2\n"}
    assert box.grade(problem, "    return pair.b\n") == (True, "passed", True)
    assert box.grade(problem, "    return pair.a\n")[::2] == (False, True)
    assert box.grade(PROBLEM, "    return type('L', (), {'__eq__': lambda a, b: True})()\n").weak \
        is False
    ends = "import os\ndef check(f):\n    assert f([1]) == 1\n    os._exit(7)\n"
    for test in (ends, ends.replace("os._exit(7)", "raise SystemExit")):
        assert box.check(OWN, "total", "", test, 3)["reason"] == "killed: the test itself"
    assert box.check(OWN, "total", "", ends.replace("os._exit(7)", "while True: pass"),
                     0.3)["reason"] == "timeout"
    slow = {**PROBLEM, "canonical_solution": "    while True: pass\n"}
    assert box.grade(slow, "    return 1\n", 0.5) == (
        False, "wrong answer: assert candidate([1, 2, 3]) == 6", False)
    secret = ("    import gc\n    return any('assert' in str(o)[:9999] for o in gc.get_objects()"
              " if type(o) is str)\n")
    assert not box.grade(PROBLEM, secret).passed


SCAN = """
import ctypes, errno, os, re
def scan():
    libc = ctypes.CDLL(None, use_errno=True)
    probe = {"x86_64": 14, "aarch64": 135}[os.uname().machine]          # rt_sigprocmask
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]
    mark, top, found = b"sec" + b"ret_", libc.sbrk(0), set()
    own = bytearray(mark + b"own")
    around = [id(o) + (1 << 23) for o in (bytearray(5000), object(), own)]
    for end in (top, *around):
        pages = []
        for page in range((end & ~4095) - (1 << 24), end, 4096):
            ctypes.set_errno(0)
            libc.syscall(probe, 99, ctypes.c_void_p(page), None, 8)     # refuses what is not there
            if ctypes.get_errno() != errno.EFAULT:
                pages.append(ctypes.string_at(page, 4096))
        found.update(re.findall(mark + b"([a-z]+)", b"".join(pages)))
    return sorted(found)
"""


def test_nothing_of_earlier_checks_is_found(box):
    """The memory of a candidate holds nothing of an earlier test, sample, solution or script."""
    problem = {**PROBLEM, "canonical_solution": "    return sum(numbers)  # secret_solution\n",
               "test": "def check(candidate):\n    assert candidate([1]) == 'secret_expected', "
                       "'secret_message'\n"}
    for completion in ("    return 0  # secret_sample\n", "    return 1/0  # secret_sample\n",
                       "    return 'secret_value'\n", "    while True: pass  # secret_sample"):
        result = box.grade(problem, completion, 0.5)
        assert not result.passed
    assert box.run("print(input(), 'secret_script')", "secret_input")[1] == "ok"
    result = box.check(SCAN, "scan", "", "def check(scan):\n    assert scan() == [b'own']\n", 9)
    assert result["passed"], result


def test_no_program_learns_how_the_one_before_ended(box):
    """Neither from process numbers nor from the frames it inherits: else samples could agree."""
    look = "import os, sys\nframe, seen = sys._getframe(), []\nwhile frame:\n" \
           "    seen += [v for v in frame.f_locals.values() if type(v) in (int, bytes)]\n" \
           "    frame = frame.f_back\nprint(os.getpid(), seen)\n"
    first = box.run(look)
    thread = "import threading, os\nfor i in range(99): threading.Thread(target=print).start()\n"
    assert box.run(thread + "os._exit(42)")[1] == "exception: status 42"
    assert box.run(look) == first and first[1] == "ok"
    if "namespaces" in box.layers:
        assert first[0].startswith("1 [")


def test_random_numbers_of_a_test_are_its_own(box):
    problem = {"prompt": "import random\n", "entry_point": "draw", "canonical_solution": "",
               "test": "import random\ndef check(draw):\n    assert draw() == random.random()\n"}
    for _ in range(2):
        result = box.check("import random\ndef draw():\n    return random.random()\n", "draw", "",
                           problem["test"], 3)
        assert result["reason"] == "wrong answer: assert draw() == random.random()"
        box.check("while True: pass", "draw", "", problem["test"], 0.2)


def test_a_tester_forgets(box):
    """An answer of half its memory, kept by an exception, does not fail the next check."""
    hog = "calls = 0\ndef f(n):\n    global calls\n    calls += 1\n    if calls > 1:\n" \
          "        raise ValueError\n    return ['ab'] * 5_000_000\n"
    keeps = "def check(f):\n    first = f(1)\n    f(2)\n"
    large = "def check(f):\n    block = bytearray(650 << 20)\n    assert f(1) == 1\n"
    for _ in range(2):
        assert box.check(hog, "f", "", keeps, 9)["reason"] == "exception: ValueError"
        assert box.check("def f(n):\n    return n\n", "f", "", large, 9)["passed"]
        assert "memory" in box.check("def f(n):\n    return n\n", "f", "",
                                     large.replace("650", "1050"), 9)["reason"]


def test_a_dead_worker_fails_nobody(box):
    box.process.kill()
    assert box.grade(PROBLEM, PROBLEM["canonical_solution"]).passed
    assert box.run("print(1)") == ("1\n", "ok")
    assert box.grade(PROBLEM, PROBLEM["canonical_solution"]).passed


def test_programs():
    assert run_program("print(input()[::-1])", "abc\n") == ("cba\n", "ok")
    assert run_program("print(len(open(0).read()))", "x" * 200_000) == ("200000\n", "ok")
    assert run_program("print(1, flush=True)\nwhile True: pass", timeout=0.5) == ("1\n", "timeout")
    assert run_program("print(2)\nraise ValueError") == ("2\n", "exception")
    assert run_program("x = 'a' * 10**11")[1] == "memory"
    assert run_program("import ctypes; ctypes.string_at(0)")[1] == "killed: signal 11"
    text, status = run_program("while True: print('x' * 1000)")
    assert len(text) == OUTPUT_BYTES and status == "killed: it prints too much"
    assert run_program("import sys; sys.exit(0)", "x" * 200_000) == ("", "ok")
    assert run_program("import os; os.close(1); sum(range(10**6))") == ("", "ok")
    assert run_program("import os; os.close(0); print(1)", "x" * 200_000) == ("1\n", "ok")
    assert run_program("print(1)\nexit()\nprint(2)") == ("1\n", "ok")
    assert run_program("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), "
                       "print(1))).start()") == ("1\n", "ok")
    assert run_program("import atexit\natexit.register(print, 1)") == ("1\n", "ok")
    assert run_program("import argparse, sys\nargparse.ArgumentParser().parse_args()\n"
                       "print(sys.argv)") == ("['program.py']\n", "ok")
    assert run_program("import fileinput\nprint(*map(int, fileinput.input()))", "1\n2") == (
        "1 2\n", "ok")
    assert run_program("import threading\nb = threading.Barrier(40)\nfor _ in range(40):\n"
                       "    threading.Thread(target=b.wait).start()") == ("", "ok")
    echo = "import sys\nfor line in sys.stdin: print(line * 40, end='')"
    assert run_program(echo, "0123456789\n" * 2000) == ("0123456789\n" * 80_000, "ok")


def test_a_solution_in_a_problem_is_no_answer(box):
    assert not box.grade({**PROBLEM, "solution": OWN}, "    return 0\n").passed


def test_order_and_single_grade():
    pairs = [(PROBLEM, PROBLEM["canonical_solution"] if i % 3 else "    return 0\n")
             for i in range(12)]
    assert [g.passed for g in grade_all(pairs, 3)] == [bool(i % 3) for i in range(12)]
    assert grade(PROBLEM, PROBLEM["canonical_solution"]).passed


@pytest.mark.parametrize("file, name, count, weak", [
    ("HumanEval.jsonl.gz", "humaneval", 164, []),
    ("cruxeval.jsonl.gz", "cruxeval-output", 200, []),
    ("cruxeval.jsonl.gz", "cruxeval-input", 200, []),
    ("mbpp.jsonl.gz", "mbpp", 974, ["MBPP/367", "MBPP/533", "MBPP/601", "MBPP/927"]),
    ("HumanEval-RandomSpanInfillingLight.jsonl.gz", "infilling-random-span-light", 164, [])])
def test_published_solutions_pass(file, name, count, weak):
    problems = [to_problem(row, name) for _, row in read_rows(reference_data(f"eval/{file}"))]
    results = grade_all([(p, p["canonical_solution"]) for p in problems[:count]], timeout=20)
    assert len(results) == count and all(result.passed for result in results)
    assert [p["task_id"] for p, result in zip(problems, results) if result.weak] == weak


def test_what_comes_back_from_a_call(box):
    """Changed arguments, at any depth and before an error, too; the error and its message."""
    cases = [
        ("a[0].sort()", "row = [3, 1]; candidate([row]); assert row == [1, 3]", True),
        ("a[0].sort()", "row = [3, 1]; candidate([row]); assert row == [3, 1]", False),
        ("a['x'].append(2); a['y'] = 3", "d = {'x': [1]}; x = d['x']; candidate(d); "
         "assert d == {'x': [1, 2], 'y': 3} and x is d['x']", True),
        ("a.pop(); a[0] = 5", "a = [1, 2]; candidate(a); assert a == [5]", True),
        ("a.clear(); raise ValueError('no')", "a = [1]\ntry:\n    candidate(a)\n"
         "except ValueError as e:\n    assert a == [] and str(e) == 'no'", True),
        ("a.clear(); raise ValueError", "a = [1]\ntry:\n    candidate(a)\n"
         "except ValueError:\n    pass\nassert a == [1]", False),
        ("raise KeyError('k')", "try:\n    candidate([])\nexcept KeyError as e:\n"
         "    assert e.args == ('k',)", True),
        ("b'\\xff'.decode()", "try:\n    candidate([])\nexcept ValueError:\n    pass", True)]
    for body, test, passes in cases:
        problem = {"prompt": "def f(a):\n", "entry_point": "f",
                   "test": "def check(candidate):\n" + textwrap.indent(test, "    ") + "\n"}
        assert box.grade(problem, f"    {body}\n").passed == passes, (body, test)


def test_what_counts_as_near(box):
    def row(name, solution):
        return {"task_id": "HumanEval/x", "prompt": f"def {name}(xs):\n", "entry_point": name,
                "canonical_solution": f"    return {solution}\n", "base_input": [[[1, 0, 1]]],
                "plus_input": [], "atol": 1e-4}
    for solution, answer, passes in (("1.0", "1.00001", True), ("1.0", "1.001", False),
                                     ("float('inf')", "float('inf')", True),
                                     ("float('inf')", "1.0", False), ("1.0", "1e309", False)):
        problem = to_problem(row("g", solution), "humaneval")
        assert box.grade(problem, f"    return {answer}\n").passed == passes, (solution, answer)
    problem = to_problem(row("find_zero", "1.0"), "humaneval")
    assert not box.grade(problem, "    return 1j\n").passed                       # of x * x + 1


def test_evalplus(box):
    rows = [row for _, row in read_rows(reference_data("eval/HumanEvalPlus.jsonl.gz"))]
    for row in rows[:4] + [rows[32]]:
        problem = to_problem(row, "humaneval+")
        assert box.grade(problem, row["canonical_solution"], 20) == (True, "passed", False)
        assert not box.grade(problem, "    return None\n", 20).passed
    mbpp = {row["task_id"]: row for _, row in
            read_rows(reference_data("eval/MbppPlus-v0.1.0.jsonl.gz"))}
    for task in ("Mbpp/2", "Mbpp/115", "Mbpp/124", "Mbpp/252", "Mbpp/580", "Mbpp/581"):
        problem = to_problem(mbpp[task], "mbpp+")
        assert box.grade(problem, mbpp[task]["canonical_solution"], 20).passed, task
    program = "import evaluate; print(evaluate.problems_hash({'a': [{'abc', 'de', 'f'}]}))"
    assert len({subprocess.check_output(        # --resume knows sets again
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "01234"}) == 1
    problem = to_problem(mbpp["Mbpp/737"], "mbpp+")             # a truth for a match is as good
    start = "import re\ndef check_str(s):\n    return "
    for answer, passed in (("bool(re.match('[aeiouAEIOU]', s))", True), ("True", False),
                           ("re.match('[aeiouAEIOU]', s)", True), ("None", False)):
        assert box.grade(problem, start + answer + "\n", 20).passed == passed, answer
    problem = to_problem(mbpp["Mbpp/581"], "mbpp+")             # by either height, rounded
    start = "import math\ndef surface_Area(b, s):\n    return "
    other = "b * b + 4 * (b * math.sqrt((b / 2) ** 2 + s ** 2)) / 2"
    for answer, passed in ((f"round({other})", True), (other, False), ("2 * b * s + b * b", True)):
        assert box.grade(problem, start + answer + "\n", 20).passed == passed, answer


def test_cruxeval(box):
    """f belongs to the test: an answer that calls it to get the value is none."""
    row = {"code": "def f(a, b):\n    return a + b", "input": "1, 2", "output": "3", "id": "x"}
    problem = to_problem(row, "cruxeval-input")
    assert box.grade(problem, "f(1, 2)").passed and box.grade(problem, "f(b=3, a=0)").passed
    for wrong in ("f(3)", "f(1, 1)", "3", "", "f(1, 2) and 3"):
        assert not box.grade(problem, wrong).passed, wrong
    problem = to_problem(row, "cruxeval-output")
    assert box.grade(problem, "3").passed
    kept = "g()\nimport sys\ng = lambda: eval(sys._getframe(1).f_code.co_consts[0], {})(1, 2)"
    for wrong in ("f(1, 2)", "f( 1,2 )", "4", "", "??", kept):
        assert not box.grade(problem, wrong).passed, wrong
    assert "return a + b" not in problem["prompt"]          # nor does its code stand beside it


def test_ladder():
    problems = {row["task_id"]: row for _, row in read_rows(ROOT / "assets" / "ladder.jsonl")}
    wrong = json.loads((ROOT / "tests" / "ladder_wrong.json").read_text())
    assert len(problems) == 120 and set(wrong) == set(problems)
    right = grade_all([(p, p["canonical_solution"]) for p in problems.values()])
    assert all(result.passed and not result.weak for result in right)
    bad = [(problems[name], text) for name, texts in wrong.items() for text in texts]
    assert [pair for pair, result in zip(bad, grade_all(bad)) if result.passed] == []


@pytest.fixture
def score(tmp_path, typed):
    def call(samples, *flags, problems=None, benchmark="humaneval"):
        (tmp_path / "p.jsonl").write_text(json.dumps(problems or PROBLEM))
        (tmp_path / "s.jsonl").write_text(samples)
        return typed("evaluate.py", "score", "--benchmark", benchmark, "--problems",
                     tmp_path / "p.jsonl", "--samples", tmp_path / "s.jsonl", *flags)

    return call


def test_score_command(tmp_path, score):
    problem = reference_data("eval/human-eval_example_problem.jsonl")
    samples = reference_data("eval/human-eval_example_samples.jsonl")
    done = score(samples.read_text(), problems=json.loads(problem.read_text()))
    assert "pass@1: 0.5000" in done.stdout and "sandbox: rlimits" in done.stdout
    results = [row for _, row in read_rows(tmp_path / "s.jsonl_results.jsonl")]
    assert [row["passed"] for row in results] == [False, False, False, True, True, True]

    good = {"task_id": "hostile/0", "solution": OWN}
    lines = json.dumps(good) + "\n" + json.dumps({"task_id": "hostile/0", "completion": ""}) + "\n"
    done = score(lines, "--resume")
    assert "pass@1: 0.5000" in done.stdout, done.stderr
    results = [row for _, row in read_rows(tmp_path / "s.jsonl_results.jsonl")]
    kept = {**good, "benchmark": "humaneval", "timeout": 3.0, "passed": True, "reason": "kept",
            "weak": False, "problems": results[0]["problems"]}
    (tmp_path / "s.jsonl_results.jsonl").write_text(json.dumps(kept) + "\n")
    assert "1 kept" in score(lines, "--resume").stdout
    (tmp_path / "s.jsonl_results.jsonl").write_text(json.dumps({**kept, "problems": "other"}))
    assert "kept" not in score(lines, "--resume").stdout      # by other tests
    (tmp_path / "s.jsonl_results.jsonl").write_text(json.dumps(kept) + "\n")
    assert "kept" not in score(lines, "--resume", benchmark="ladder").stdout
    other = lines.replace("return sum", "return 1 or sum")
    assert "kept" not in score(other, "--resume").stdout      # another sample
    for damaged in (b'{"task_id": "hos', b"\xff", b"5\n"):
        (tmp_path / "s.jsonl_results.jsonl").write_bytes(damaged)
        assert "pass@1: 0.5000" in score(lines, "--resume").stdout
    assert "1 lines repeat" in score(json.dumps(good) + "\n" + lines).stdout


def test_bad_input(tmp_path, score):
    cases = {'{"task_id": "x", "completion": ""}\n': "line 1: no task 'x'",
             '{"task_id": ["x"], "completion": ""}\n': "line 1: no task ['x']",
             '{"task_id": "hostile/0"}': "line 1: expected a completion",
             '{"task_id": "hostile/0", "completion": "", "solution": 5}': "line 1: expected a com",
             '{"task_id": "hostile/0", "completion": "a"}\n{"task': "line 2: not a JSON object",
             "\n": "holds no sample"}
    for samples, message in cases.items():
        done = score(samples)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    for row in ({"task_id": "x/0", "prompt": 5, "entry_point": "f", "test": ""},
                {"code": "print 1", "test_list": ["f()"]}, {"code": "x = 1", "test_list": []},
                {"question": "", "answer": 5}, {"question": "", "answer": "it is none"},
                {"code": 1, "input": 2, "output": 3}, {"code": "", "input": "", "output": 3},
                {**PROBLEM, "canonical_solution": 5}, {**PROBLEM, "entry_point": 5}):
        done = score("", problems=row)
        assert done.returncode == 2 and "line 1: no problem" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    done = score(json.dumps({"task_id": "hostile/0", "completion": ""}), "--limit", "1")
    assert done.returncode == 2 and "all samples of the file are graded" in done.stderr
    done = score("", problems={"language": "java", "prompt": "", "tests": ""})
    assert done.returncode == 2 and "MultiPL-E" in done.stderr
    for flags in (["--timeout", "-1"], ["--timeout", "nan"], ["--top-p", "0"]):
        done = score("", *flags)
        assert done.returncode == 2 and "--timeout above 0 seconds" in done.stderr
    done = score(json.dumps({"task_id": "hostile/0", "completion": ""}),
                 benchmark="humaneval+")
    assert done.returncode == 2 and "needs EvalPlus's file" in done.stderr
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
