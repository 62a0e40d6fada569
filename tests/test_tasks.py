"""pytest tests/test_tasks.py: the task grammar, and exercises from functions in existing code."""

import ast
import hashlib
import json
import random
from collections import Counter

import pytest

from evaluate import code_block
from support import tasks
from support.files import InputError
from support.functions import example_problem, mutated
from support.sandbox import grade_all
from support.tasks import held_out_tasks, read_grammar, training_tasks


def test_operations_do_what_their_types_say():
    """Each makes its output type from its input type, for any parameters, and both phrasings state
    all parameters; no two operations have the same code."""
    rng, types = random.Random(0), {"number": int, "list": list, "text": str, "words": list,
                                    "table": dict, "truth": bool}
    operations = tasks.operations()
    assert len(operations) == len({(o.input_type, o.code) for o in operations}) > 40
    for operation in operations:
        assert len(set(operation.phrasings)) == 2
        for _ in range(20):
            [values], _ = tasks.draw_parameters([operation], rng)
            argument = tasks.draw_value(operation.input_type, rng, [7, 12], ["a", "b", "x"])
            result = eval(tasks.fill_in(operation.code, values),
                          {tasks.VARIABLES[operation.input_type][0]: argument})
            assert type(result) is types[operation.output_type], operation
            for phrasing in operation.phrasings:
                text = tasks.fill_in(phrasing, values)
                assert all(str(value) in text for value in values.values())


@pytest.mark.parametrize("text, line", [("add : n + 1\n", 1), ("# x\n\nlist -> list\nsort\n", 4)])
def test_a_wrong_line_of_the_grammar_is_named(tmp_path, text, line):
    path = tmp_path / "grammar.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=f"grammar.txt, line {line}: expected `phrasing"):
        read_grammar(path)
    path.write_text("number -> table\nmap it | store it : {n : n}\n")
    assert read_grammar(path) == [("number", "table", ["map it", "store it"], "{n : n}")]


def test_a_task_is_its_composition():
    """Its solution does what its chain does, step by step, whatever its arguments are called."""
    rng, checked = random.Random(1), 0
    for chain in rng.sample(tasks.chains_of(3), 300):
        task = tasks.make_task(chain, rng)
        if task is None or "," in task["prompt"].split("\n")[0]:
            continue
        drawn = list(task["parameters"])
        value = tasks.draw_value(chain[0].input_type, rng, [7], ["a"])
        namespace = {}
        exec(task["prompt"] + task["canonical_solution"], namespace)
        result = namespace[task["entry_point"]](value)
        for operation in chain:
            keys = [key for key in "kfcds" if f"{{{key}}}" in operation.code]
            code = tasks.fill_in(operation.code, {key: drawn.pop(0) for key in keys})
            value = eval(code, {tasks.VARIABLES[operation.input_type][0]: value})
        assert result == value and not drawn
        checked += 1
    assert checked > 100


@pytest.fixture(scope="module")
def held_out():
    return {split: held_out_tasks(split, 300) for split in ("parameters", "compositions")}


def test_held_out_tasks_are_those_of_the_files_and_right(held_out):
    for split, problems in held_out.items():
        rows = tasks.held_out_problems(split)
        assert rows == json.loads(json.dumps(problems))
        depths = Counter(row["depth"] for row in rows)
        assert set(depths.values()) == {100 if split == "parameters" else 150}
        chosen = rows[::20]
        assert all(g.passed for g in grade_all([(r, r["canonical_solution"]) for r in chosen]))
        wrong = [(r, "    return 'nothing'\n") for r in chosen]
        assert not any(g.passed for g in grade_all(wrong))


def test_training_tasks_are_the_same_for_a_seed_and_not_held_out(held_out):
    problems = training_tasks(0, 1500)
    assert hashlib.sha256(json.dumps(problems).encode()).hexdigest().startswith("495bd787353070e7")
    lines = {(t["canonical_solution"], tuple(t["parameters"])) for t in problems}
    assert Counter(t["depth"] for t in problems) == {1: 500, 2: 500, 3: 500}
    for rows in held_out.values():
        assert not lines & {(t["canonical_solution"], tuple(t["parameters"])) for t in rows}
    assert training_tasks(0, 50) == problems[:50] and training_tasks(1, 50) != problems[:50]


# ---- functions in existing code


def test_mutations_change_one_thing():
    code = "def f(a):\n    if a < 3 and True:  # so\n        return a + 1\n    return -a\n"
    results = {mutated(code, random.Random(i)) for i in range(60)}
    assert code not in results and len(results) == 6
    for wrong in results:
        assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(code)) and "  # so\n" in wrong
    assert mutated("def f(a):\n    return a\n", random.Random(0)) is None


def fenced(code):
    return f"```python\n{code}```"


def double(docstring, body="    return 2 * n\n"):
    return f'def f(n, k=1):\n    """Twice.\n\n    {docstring}\n    """\n{body}'


def test_examples_in_the_docstring_of_an_answer_become_tests():
    answer = fenced(double(">>> f(2)\n    4\n    >>> f(n=0, k='a')\n    0"))
    assert example_problem(answer, "Write f.", code_block) == {
        "prompt": "def f():\n", "entry_point": "f", "test": "def check(candidate):\n"
        "    assert candidate(2) == 4\n    assert candidate(n=0, k='a') == 0\n"}


@pytest.mark.parametrize("before, answer", [
    # the result in the question is the fault
    ("add is broken: `>>> add(2, 2)` gives 5, fix it", "def add(a, b):\n    return a + b\n"),
    ("Mend it.\n" + fenced(double(">>> f(2)\n    5", "    return 5\n")),
     double(">>> f(2)\n    5")),
    # what is shown is printed, an ellipsis, rounded, skipped, or does not tell all
    ("Write f.", double(">>> f(2)\n    4", "    print(2 * n)\n")),
    ("Write f.", double(">>> f(2)\n    ...")), ("Write f.", double(">>> f(2)\n    [1, ...]")),
    ("Write f.", double(">>> f(2)\n    4.33")), ("Write f.", double(">>> f(2)\n    four")),
    ("Write f.", double(">>> f(2)  # doctest: +SKIP\n    5")),
    ("Write f.", double(">>> f(2)\n    4\n    5")), ("Write f.", double(">>> f(2)")),
    ("Write f.", double(">>> f(2)\n    Traceback (most recent call last):\n    ValueError: 4")),
    ("Write f.", double(">>> g(2)\n    4")), ("Write f.", double(">>> f(2) + 1\n    4")),
    ("Write f.", "import os\n" + double(">>> f(2)\n    4")),
    # a call that is not made of literals must not run next to the test
    ("Write f.", double(">>> f(__import__('os').write(1, b'x'))\n    4")),
    ("Write f.", double(">>> f(2, k=exit())\n    4")), ("Write f.", double(">>> f(*[2])\n    4")),
    ("Write f.", double(">>> f(**{'n': 2})\n    4")), ("Write f.", double(">>> f(1e999)\n    4")),
    ("Write f.", double(">>> f(2) or exit()\n    4")),
    ("Write f.", double(">>> f(2)\n    exit()")),
    # which block is the answer?
    ("Write f.", double(">>> f(2)\n    4") + "```\nor\n```python\n" + double(">>> f(2)\n    4"))])
def test_in_doubt_an_example_is_no_test(before, answer):
    assert example_problem(fenced(answer), before, code_block) is None
