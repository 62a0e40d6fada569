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
    """Each turns its input type into its output type, for any parameters, and both phrasings state
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


def test_a_wrong_line_of_the_grammar_is_named(tmp_path):
    path = tmp_path / "grammar.txt"
    for text, line in (("add : n + 1\n", 1), ("# x\n\nlist -> list\nsort\n", 4)):
        path.write_text(text)
        with pytest.raises(InputError, match=f"grammar.txt, line {line}: expected `phrasing"):
            read_grammar(path)
    path.write_text("number -> table\nmap it | store it : {n : n}\n")
    assert read_grammar(path) == [("number", "table", ["map it", "store it"], "{n : n}")]


def test_held_out_tasks_and_training_tasks():
    """The files hold what the generator gives; solutions pass, wrong ones do not; training tasks
    are the same for a seed, and none of them is held out."""
    training = training_tasks(0, 1500)
    assert hashlib.sha256(json.dumps(training).encode()).hexdigest().startswith("495bd787353070e7")
    assert training_tasks(0, 50) == training[:50] and training_tasks(1, 50) != training[:50]
    assert Counter(task["depth"] for task in training) == {1: 500, 2: 500, 3: 500}
    keys = {(task["canonical_solution"], *task["parameters"]) for task in training}
    for split, count in (("parameters", 100), ("compositions", 150)):
        rows = tasks.held_out_problems(split)
        assert rows == json.loads(json.dumps(held_out_tasks(split, 300)))
        assert set(Counter(row["depth"] for row in rows).values()) == {count}
        assert not keys & {(row["canonical_solution"], *row["parameters"]) for row in rows}
        right = [(row, row["canonical_solution"]) for row in rows[::20]]
        wrong = [(row, "    return 'nothing'\n") for row in rows[::20]]
        assert [grade.passed for grade in grade_all(right + wrong)] == [True] * 15 + [False] * 15


# ---- functions in existing code


def test_mutations_change_one_thing():
    code = "def f(a):\n    if a < 3 and True:  # so\n        return a + 1\n    return -a\n"
    results = {mutated(code, random.Random(i)) for i in range(60)}
    assert code not in results and len(results) == 6
    for wrong in results:
        assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(code)) and "  # so\n" in wrong
    assert mutated("def f(a):\n    return a\n", random.Random(0)) is None


def double(docstring, body="    return 2 * n\n"):
    return f'def f(n, k=1):\n    """Twice.\n\n    {docstring}\n    """\n{body}'


def test_examples_in_the_docstring_of_an_answer_become_tests():
    answer = double(">>> f(2)\n    4\n    >>> f(n=0, k='a')\n    0")
    assert example_problem(f"```python\n{answer}```", "Write f.", code_block) == {
        "prompt": "def f():\n", "entry_point": "f", "test": "def check(candidate):\n"
        "    assert candidate(2) == 4\n    assert candidate(n=0, k='a') == 0\n"}


@pytest.mark.parametrize("before, answer", [
    # the result in the question is the fault
    ("add is broken: `>>> add(2, 2)` gives 5, fix it", "def add(a, b):\n    return a + b\n"),
    (f"Fix it.\n```python\n{double('>>> f(2)' + chr(10) + '    5')}```", double(">>> f(2)\n    5")),
    # printed, an ellipsis, rounded, no literal, skipped, of two lines, none, an exception
    *[("Write f.", double(f">>> f(2)\n    {result}")) for result in (
        "[1, ...]", "4.33", "four", "4\n    5", "", "exit()",
        "Traceback (most recent call last):\n    ValueError: 4")],
    ("Write f.", double(">>> f(2)\n    4", "    print(2 * n)\n")),
    ("Write f.", double(">>> f(2)  # doctest: +SKIP\n    5")),
    ("Write f.", "import os\n" + double(">>> f(2)\n    4")),
    # another call than that of the function with literals must not run next to the test
    *[("Write f.", double(f">>> {call}\n    4")) for call in (
        "g(2)", "f(2) + 1", "f(__import__('os').write(1, b'x'))", "f(2, k=exit())", "f(*[2])",
        "f(**{'n': 2})", "f(1e999)", "f(2) or exit()")],
    # which block is the answer?
    ("Write f.", double(">>> f(2)\n    4") + "```\nor\n```python\n" + double(">>> f(2)\n    4"))])
def test_in_doubt_an_example_is_no_test(before, answer):
    assert example_problem(f"```python\n{answer}```", before, code_block) is None
