"""Benchmark files -> problems: HumanEval, MBPP, EvalPlus, HumanEval infilling, CRUXEval, GSM8K and
our ladder; and files of samples.

A problem is a dict with a task_id, the fields that its prompt needs, and how it is graded: a
program by entry_point and test, with check(candidate); one line by `line`; a number by `answer`.
"""

import ast
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import re
import textwrap
import zlib
from pathlib import Path

from support.answers import final_number
from support.files import InputError, cache_folder, fetch, read_rows
from support.functions import nodes_of

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MBPP_TRAINING = range(601, 975)
# The fields of a problem that must be text, where they exist
TEXT_FIELDS = ("prompt", "suffix", "test", "entry_point", "code", "input", "output", "question")


def evalplus_problem(row, name):
    """HumanEval+ and MBPP+: a solution is compared with the problem's own on many inputs."""
    inputs = row["base_input"] + (list(row["plus_input"]) if name.endswith("+") else [])
    settings = [row["task_id"], row["entry_point"], row["atol"]]
    test = (ASSETS / "evalplus.py").read_text(encoding="utf-8")
    return {**{key: row[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
            "inputs": inputs, "test": f"TASK, NAME, TOLERANCE = {settings!r}\n{test}"}


def mbpp_problem(row):
    """The prompt shows the first test; the entry point is the function that is called first."""
    tests = "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    defined = {node.name for node in nodes_of(row["code"])
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    called = [node.func.id for node in nodes_of(tests)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return {"task_id": f"MBPP/{row['task_id']}", "canonical_solution": row["code"] + "\n",
            "prompt": f'"""\n{row.get("text") or row["prompt"]}\n{row["test_list"][0]}\n"""\n',
            "entry_point": next(name for name in called if name in defined),
            "test": f"{setup}\ndef check(candidate):\n{textwrap.indent(tests, '    ')}\n"}


def cruxeval_problem(row, name):
    """The arguments or the value of a call of f; only the test has f itself."""
    problem = {**row, "task_id": row["id"], "entry_point": "answer"}
    code = f"{row['code']}\n\n\n"
    answer = "def answer():\n    return "
    if name.startswith("cruxeval-input"):
        return {**problem, "canonical_solution": f"f({row['input']})",
                "prompt": f"{code}def f(*args, **kwargs):\n    return args, kwargs\n\n\n{answer}",
                "test": f"{code}def check(candidate):\n    args, kwargs = candidate()\n"
                        f"    assert f(*args, **kwargs) == {row['output']}\n"}
    return {**problem, "canonical_solution": row["output"], "prompt": answer,
            "test": f"{code}def check(candidate):\n    assert candidate() == f({row['input']})\n"}


def to_problem(row, name="", number=0):
    """A row of a benchmark file, recognized by its fields, as a problem; None for other rows.

    It may also have canonical_solution, suffix (infilling), inputs (EvalPlus: with the plus inputs
    if name ends with "+") and group (which has a score of its own). number: of the row.
    """
    if {"language", "prompt", "tests"} <= set(row) and "suffix" not in row:
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


# ------------------------------------------------------------------------------------------------
# Files


@functools.cache
def benchmarks():
    """assets/benchmarks.json: files, addresses and hashes, prompts with their stop strings, and the
    scores in the report, in per cent, for each of the published sizes."""
    return json.loads((ASSETS / "benchmarks.json").read_text(encoding="utf-8"))


def benchmark_file(benchmark):
    """The path of an entry of benchmarks(): the ladder is in assets/, others are in a cache."""
    is_ladder = benchmark["file"] == "ladder.jsonl"
    return (ASSETS if is_ladder else cache_folder() / "benchmarks") / benchmark["file"]


def published_file(name):
    """The published file of a benchmark, downloaded if necessary and checked by its hash."""
    benchmark = benchmarks()["benchmarks"][name]
    file = benchmark_file(benchmark)
    try:
        if not file.exists() and not benchmark["url"]:
            raise InputError("no download address is known")
        fetch(benchmark["url"], file)
    except InputError as error:
        raise InputError(f"{name}: put {benchmark['file']} to {file} or give --problems "
                         f"({error})") from None
    data = file.read_bytes()
    if file.suffix == ".gz":
        with contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):   # the hash will differ
            data = gzip.decompress(data)
    if benchmark["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
        raise InputError(f"{file}: not the published file (its SHA-256 differs); delete it")
    return file


def find_problems(name, file=None, limit=None):
    """task_id -> problem, from a file or the published one; limit: how many at most."""
    file = file or published_file(name)
    problems = {}
    for number, row in read_rows(file):
        try:
            problem = to_problem(row, name, number)
            texts = [problem.get(field, "") for field in TEXT_FIELDS]
            texts.append(problem.get("canonical_solution") or "")           # it may be null
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            problems[problem["task_id"]] = problem
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except Exception:                                   # any: the row may hold anything
            raise InputError(f"{file}, line {number}: no problem of HumanEval, MBPP, EvalPlus, "
                             "infilling, CRUXEval or GSM8K") from None
        if name.endswith("+") and "inputs" not in problem:
            raise InputError(f"{file}: {name} needs EvalPlus's file; these are the plain problems")
    if not problems:
        raise InputError(f"{file}: no problems")
    if len({"test" in problem for problem in problems.values()}) > 1:
        raise InputError(f"{file}: holds programs and questions; give a file of one kind")
    return dict(itertools.islice(problems.items(), limit))


def training_problems(file):
    """The problems of a file that have tests and may be trained on -> (problems, their ids in the
    file): of MBPP its training split (arXiv 2108.07732, section 2.1), of other files all."""
    problems = [problem for problem in find_problems("", file).values() if "test" in problem]
    if problems and problems[0]["task_id"].startswith("MBPP/"):
        numbers = {int(problem["task_id"].removeprefix("MBPP/")): problem for problem in problems}
        split = {number: problem for number, problem in numbers.items() if number in MBPP_TRAINING}
        return list(split.values()), set(split)
    return problems, {problem["task_id"] for problem in problems}


def read_samples(path, problems):
    """The samples in a file, rows with a task_id of these problems; InputError names the line."""
    samples = []
    for number, row in read_rows(path):
        task = row.get("task_id")
        if not isinstance(task, str) or task not in problems:
            raise InputError(f"{path}, line {number}: no task {task!r} in this benchmark")
        is_program = "test" in problems[task]
        text = row.get("solution" if is_program and "solution" in row else "completion")
        if not isinstance(text, str):
            expected = "a completion or a solution" if is_program else "a completion"
            raise InputError(f"{path}, line {number}: expected {expected}")
        samples.append(row)
    if not samples:
        raise InputError(f"{path}: holds no sample")
    repeated = len(samples) - len(set(map(json.dumps, samples)))
    if repeated:
        print(f"{path}: {repeated} lines repeat another; all are graded")
    answered = {sample["task_id"] for sample in samples}
    unanswered = [task_id for task_id in problems if task_id not in answered]
    if unanswered:
        print(f"{len(unanswered)} of {len(problems)} tasks have no sample, the first is "
              f"{unanswered[0]!r}; they do not count")
    return samples
