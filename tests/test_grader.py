"""pytest tests/test_grader.py: the sandbox, problem files and scores of evaluate.py."""

import contextlib
import errno
import gzip
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, reference_data
from hostile import CONTROLS, HOSTILE, PROBLEM

import evaluate
from evaluate import (CALLS, MACHINES, Sandbox, bootstrap, decode, edit_similarity, encode, grade,
                      grade_all, pass_at_k, read_rows, run_program, seccomp_filter,
                      to_input_problem, to_problem)
from tokenizer import InputError

OWN = PROBLEM["prompt"] + PROBLEM["canonical_solution"]


def jail_here():
    """None, or why programs cannot be locked in on this system."""
    try:
        Sandbox().close()
    except InputError as error:
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
              if not (result := box.grade(problem, problem["canonical_solution"], 10)).passed}
    assert failed == {}


@pytest.mark.parametrize("without", ["Landlock", "mounts", "namespaces"])
def test_one_layer_of_two_is_enough(without):
    names = [name for name in HOSTILE if name[:2] in ("29", "36", "43", "45", "46", "47")
             and name != "45d list folders"]                # of the file system made for it
    try:
        box = Sandbox(without=[without])
    except InputError:
        pytest.skip("this system has only that one")
    with contextlib.closing(box):
        assert without not in box.layers
        assert [name for name in names
                if box.check(HOSTILE[name], "total", OWN, PROBLEM["test"], 1)["passed"]] == []
        assert box.grade(PROBLEM, PROBLEM["canonical_solution"]).passed


def test_too_little_is_refused():
    for without in (["Landlock", "namespaces"], ["seccomp"], ["no-new-privileges"]):
        with pytest.raises(InputError, match="--weak-sandbox"):
            Sandbox(without=without)
    with contextlib.closing(Sandbox(weak=True, without=["Landlock", "namespaces", "seccomp"])) as b:
        assert b.grade(PROBLEM, PROBLEM["canonical_solution"]).passed
        assert not b.grade(PROBLEM, "    import os\n    os._exit(0)\n").passed


def run_filter(program, arch, number, *args):
    """What a seccomp program answers to a call: a small classic BPF machine."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    steps, at, value = list(struct.iter_unpack("HBBI", program)), 0, None
    while True:
        code, yes, no, operand = steps[at]
        if code == 0x20:
            [value] = struct.unpack_from("<I", data, operand)
        elif code == 0x06:
            return operand
        else:
            at += yes if (value == operand if code == 0x15 else value & operand) else no
        at += 1


def test_system_calls():
    allow, no_call, denied = 0x7FFF0000, 0x50000 + errno.ENOSYS, 0x50000 + errno.EACCES
    for column, (machine, arch) in enumerate(MACHINES.items()):
        program = seccomp_filter(machine)
        allowed = {int(n) for call in CALLS.split(",") if (n := call.split()[1 + column]) != "-"}
        opens, clone = ([(2, 1), (257, 2)], 56) if column == 0 else ([(56, 2)], 220)
        for number in set(range(600)) - {clone, *dict(opens)}:
            answer = allow if number in allowed else no_call
            assert run_filter(program, arch, number) == answer, (machine, number)
        for number, place in opens:
            flags = [0] * place
            assert run_filter(program, arch, number, *flags, os.O_RDONLY | os.O_CLOEXEC) == allow
            for mode in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
                assert run_filter(program, arch, number, *flags, mode) == denied
        assert run_filter(program, arch, clone, 0x3D0F00) == allow              # a thread
        assert run_filter(program, arch, clone, 0x1200011) == no_call           # a process
        assert run_filter(program, 0x40000003, 1) == 0x80000000                 # i386: killed
        assert run_filter(program, arch, 0x40000000 + 1) == no_call             # x32
    assert seccomp_filter("riscv64") is None


def test_plain_values_cross():
    class Liar(list):
        def __iter__(self):
            return itertools.count()

    values = [None, True, 2**70, -10**3000, 0.1, -0.0, math.inf, 1j, "é\ud800\0", b"\xff", [1, [2]],
              (1, (2,)), {1, 2}, frozenset([3]), {(1, 2): {"a": ()}}, [], (), {}, bytearray(b"x")]
    for value in values:
        back = decode(json.loads(json.dumps(encode(value))))
        assert back == value and type(back) is type(value)
    assert encode(Liar([1, 2])) == [1, 2]
    with pytest.raises(TypeError, match="generator"):
        encode(i for i in [])
    for bad in ({"set": [[1]]}, {"list": [1]}, {}, {"a": 1, "b": 2}, {"tuple": 3}, {"eval": "1"}):
        with pytest.raises(ValueError):
            decode(bad)


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
    slow = {**PROBLEM, "canonical_solution": "    while True: pass\n"}
    assert box.grade(slow, "    return 1\n", 0.5) == (
        False, "wrong answer: assert candidate([1, 2, 3]) == 6", False)
    secret = ("    import gc\n    return any('assert' in str(o)[:9999] for o in gc.get_objects()"
              " if type(o) is str)\n")
    assert not box.grade(PROBLEM, secret).passed


def test_programs():
    assert run_program("print(input()[::-1])", "abc\n") == ("cba\n", "ok")
    assert run_program("print(len(open(0).read()))", "x" * 200_000) == ("200000\n", "ok")
    assert run_program("print(1, flush=True)\nwhile True: pass", timeout=0.5) == ("1\n", "timeout")
    assert run_program("print(2)\nraise ValueError") == ("2\n", "exception")
    assert run_program("x = 'a' * 10**11")[1] == "memory"
    assert run_program("import ctypes; ctypes.string_at(0)")[1] == "killed: signal 11"
    text, status = run_program("while True: print('x' * 1000)")
    assert len(text) == evaluate.OUTPUT_BYTES and status == "killed: it prints too much"
    assert run_program("import sys; sys.exit(0)") == ("", "ok")


def test_order_and_single_grade():
    pairs = [(PROBLEM, PROBLEM["canonical_solution"] if i % 3 else "    return 0\n")
             for i in range(12)]
    assert [g.passed for g in grade_all(pairs, 3)] == [bool(i % 3) for i in range(12)]
    assert grade(PROBLEM, PROBLEM["canonical_solution"]).passed


@pytest.mark.parametrize("name, count, weak", [
    ("HumanEval.jsonl.gz", 164, []), ("cruxeval.jsonl.gz", 200, []),
    ("mbpp.jsonl.gz", 974, ["MBPP/367", "MBPP/533", "MBPP/601", "MBPP/927"]),
    ("HumanEval-RandomSpanInfillingLight.jsonl.gz", 164, [])])
def test_published_solutions_pass(name, count, weak):
    problems = [to_problem(row) for _, row in read_rows(reference_data(f"eval/{name}"))][:count]
    results = grade_all([(p, p["canonical_solution"]) for p in problems], timeout=20)
    assert len(results) == count and all(result.passed for result in results)
    assert [p["task_id"] for p, result in zip(problems, results) if result.weak] == weak


def test_evalplus(box):
    rows = [row for _, row in read_rows(reference_data("eval/HumanEvalPlus.jsonl.gz"))]
    for row in rows[:4] + [rows[32]]:
        problem = to_problem(row, plus=True)
        assert box.grade(problem, row["canonical_solution"], 20) == (True, "passed", False)
        assert not box.grade(problem, "    return None\n", 20).passed
    mbpp = {row["task_id"]: row for _, row in
            read_rows(reference_data("eval/MbppPlus-v0.1.0.jsonl.gz"))}
    for task in ("Mbpp/2", "Mbpp/115", "Mbpp/124", "Mbpp/252", "Mbpp/580", "Mbpp/581"):
        problem = to_problem(mbpp[task], plus=True)
        assert box.grade(problem, mbpp[task]["canonical_solution"], 20).passed, task


def test_inputs_of_cruxeval(box):
    row = {"code": "def f(a, b):\n    return a + b", "input": "1, 2", "output": "3", "id": "x"}
    problem = to_input_problem(row)
    assert box.grade(problem, "1, 2)").passed and box.grade(problem, "b=3, a=0)").passed
    assert not box.grade(problem, "3)").passed
    assert not box.grade(problem, "1, 1) and 3").passed
    output = to_problem(row)
    assert box.grade(output, "3").passed and not box.grade(output, "f(1, 3)").passed


def test_ladder():
    problems = {row["task_id"]: row for _, row in read_rows(ROOT / "assets" / "ladder.jsonl")}
    wrong = json.loads((ROOT / "tests" / "ladder_wrong.json").read_text())
    assert len(problems) == 120 and set(wrong) == set(problems)
    right = grade_all([(p, p["canonical_solution"]) for p in problems.values()])
    assert all(result.passed and not result.weak for result in right)
    bad = [(problems[name], text) for name, texts in wrong.items() for text in texts]
    assert [pair for pair, result in zip(bad, grade_all(bad)) if result.passed] == []


def test_ladder_cannot_be_guessed():
    rows = [row for _, row in read_rows(ROOT / "assets" / "ladder.jsonl")]
    for answer in ("None", "0", "1", "True", "False", "''", "[]", "{}", "first"):
        count = 0
        for row in rows:
            names = {}
            exec(row["test"], names)
            with contextlib.suppress(Exception):            # written by us: no sandbox needed
                names[row["entry_point"]] = function = lambda *args: (
                    args[0] if answer == "first" else eval(answer))
                names["check"](function)
                count += 1
        assert count <= 0.02 * len(rows), answer


def test_pass_at_k():
    for n in range(1, 11):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            expected = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError):
        pass_at_k(2, 1, 3)
    low, high = bootstrap([1.0] * 50 + [0.0] * 50)
    assert 0.36 < low < 0.44 < 0.56 < high < 0.64


def test_edit_similarity():
    """2 M / T by hand: abcd and abxd share a, b, d."""
    cases = {("abcd", "abxd"): 75.0, ("", ""): 100.0, ("a", ""): 0.0, ("kitten", "sitting"):
             200 * 4 / 13, ("x = 1", "x = 1"): 100.0, ("ab", "ba"): 50.0}
    for (a, b), score in cases.items():
        assert edit_similarity(a, b) == edit_similarity(b, a) == pytest.approx(score)


def test_the_line_that_is_scored():
    lines = {"a = 1\nb": "a = 1", "\n  a\nb": "a", " \n a\n": "a", "": "", "  x  ": "x"}
    assert {text: evaluate.first_line(text) for text in lines} == lines


def score(tmp_path, samples, *flags, problems=None, benchmark="humaneval"):
    (tmp_path / "p.jsonl").write_text(json.dumps(problems or PROBLEM))
    (tmp_path / "s.jsonl").write_text(samples)
    return subprocess.run([sys.executable, ROOT / "evaluate.py", "score", "--benchmark", benchmark,
                           "--problems", tmp_path / "p.jsonl", "--samples", tmp_path / "s.jsonl",
                           *flags], capture_output=True, text=True)


def test_score_command(tmp_path):
    problem = reference_data("eval/human-eval_example_problem.jsonl")
    samples = reference_data("eval/human-eval_example_samples.jsonl")
    done = score(tmp_path, samples.read_text(), problems=json.loads(problem.read_text()))
    assert "pass@1: 0.5000" in done.stdout and "sandbox: rlimits" in done.stdout
    results = [row for _, row in read_rows(tmp_path / "s.jsonl_results.jsonl")]
    assert [row["passed"] for row in results] == [False, False, False, True, True, True]

    good = {"task_id": "hostile/0", "solution": OWN}
    lines = json.dumps(good) + "\n" + json.dumps({"task_id": "hostile/0", "completion": ""}) + "\n"
    done = score(tmp_path, lines, "--resume")
    assert "pass@1: 0.5000" in done.stdout, done.stderr
    (tmp_path / "s.jsonl_results.jsonl").write_text(json.dumps(
        {**good, "passed": True, "reason": "kept", "weak": False}) + "\n")
    assert "1 kept" in score(tmp_path, lines, "--resume").stdout
    other = lines.replace("return sum", "return 1 or sum")
    assert "kept" not in score(tmp_path, other, "--resume").stdout      # another sample
    (tmp_path / "s.jsonl_results.jsonl").write_text('{"task_id": "hos')         # cut off
    assert "pass@1: 0.5000" in score(tmp_path, lines, "--resume").stdout
    assert "1 lines repeat" in score(tmp_path, json.dumps(good) + "\n" + lines).stdout


def test_bad_input(tmp_path):
    cases = {'{"task_id": "x", "completion": ""}\n': "line 1: no task 'x'",
             '{"task_id": "hostile/0"}': "line 1: expected a completion",
             '{"task_id": "hostile/0", "completion": "a"}\n{"task': "line 2: not a JSON object",
             "\n": "holds no sample"}
    for samples, message in cases.items():
        done = score(tmp_path, samples)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    done = score(tmp_path, "", problems={"language": "java", "prompt": "", "tests": ""})
    assert done.returncode == 2 and "MultiPL-E" in done.stderr
    done = score(tmp_path, json.dumps({"task_id": "hostile/0", "completion": ""}),
                 benchmark="humaneval+")
    assert done.returncode == 2 and "needs EvalPlus's file" in done.stderr
    for text, line in (("[1, 2]", 1), ('[{"a": 1}, 3]', 2), ("[{", 1), ('{"a": 1}\n"x y"', 2)):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=f"line {line}: not a JSON object"):
            read_rows(tmp_path / "bad.json")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    with pytest.raises(InputError, match="cut off"):
        read_rows(tmp_path / "cut.gz")
