"""The task grammar: small programming problems with reference solutions and tests.

assets/grammar.txt lists operations: the input and output type, two English phrasings, and the
Python code of each. A chain of one to three operations whose types fit is a task. It has the fields
of a HumanEval problem: a prompt, the body of the solution, and a test, whose expected results are
computed by the solution. This is the prompt of one task:

    def compute(values, limit):
        \"\"\"Keep the numbers greater than limit, then take the sum.

        >>> compute([3, 12, 20], 10)
        32
        \"\"\"

A tenth of all chains, and a tenth of the parameters of each chain, are held out, chosen by a hash:
no seed ever trains on them, and both sets measure generalization.
"""

import functools
import hashlib
import itertools
import random
import re
import string
from collections import namedtuple
from pathlib import Path

from support.files import InputError, read_rows

GRAMMAR = Path(__file__).resolve().parent.parent / "assets" / "grammar.txt"
Operation = namedtuple("Operation", "input_type output_type phrasings code")
# Names of variables by type; the grammar's code uses the first of each
VARIABLES = {"number": ["n", "x", "number", "value"],
             "list": ["numbers", "values", "items", "scores"],
             "text": ["text", "name", "title", "line"],
             "words": ["words", "names", "lines", "parts"],
             "table": ["counts", "stock", "prices", "points"]}
SECOND_VARIABLES = ["limit", "amount", "size", "other", "k"]
FUNCTIONS = ["solve", "convert", "process", "transform", "compute", "answer", "apply", "change",
             "evaluate", "handle", "prepare", "work"]
TWO_ARGUMENTS = 0.25    # of the tasks with a number: it becomes the second argument
HELD_OUT = 0.1          # of the chains, and of the parameters of each chain
# Characters of the arguments and the result of the example in a prompt: the best, and the most
EXAMPLE_LENGTH, LONGEST_EXAMPLE = 24, 60


def read_grammar(path):
    """The operations in a grammar file; InputError names a line that cannot be read."""
    operations, types = [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        phrasings, colon, code = line.partition(" : ")
        if colon and types:
            operations.append(Operation(*types, phrasings.split(" | "), code))
        elif line.count(" -> ") == 1:
            types = line.split(" -> ")
        else:
            raise InputError(f"{path}, line {number}: expected `phrasing | phrasing : code`, below "
                             "a line such as `list -> number`")
    return operations


@functools.cache
def operations():
    return read_grammar(GRAMMAR)


def fill_in(text, parameters):
    """Replace the {k}, {f}, {c}, {d} and {s} in an operation's English or Python."""
    return re.sub(r"{([kfcds])}", lambda match: str(parameters[match[1]]), text)


def chains_of(depth):
    """All sequences of `depth` operations in which each accepts the output type of the previous."""
    chains = [(operation,) for operation in operations()]
    for _ in range(depth - 1):
        chains = [(*chain, operation) for chain in chains for operation in operations()
                  if operation.input_type == chain[-1].output_type]
    return chains


# ------------------------------------------------------------------------------------------------
# One task


def draw_parameters(chain, rng):
    """Parameters for each operation of a chain, and which of them becomes an argument of the
    function: ([{"k": 12, "c": "ab"}, {}], (0, "k")), or None as the second if none does."""
    def letters():
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 3)))

    parameters = []
    for operation in chain:
        values = {"k": rng.randint(2, 10 ** rng.randint(1, 3)), "f": rng.randint(2, 9),
                  "c": letters(), "d": letters(),
                  "s": rng.choice(["-", ", ", "_", "+", "/", ":", ";", "."])}
        parameters.append({key: value for key, value in values.items()
                           if f"{{{key}}}" in operation.code})
    numbers = [(i, key) for i, values in enumerate(parameters) for key in values if key in "kf"]
    if numbers and rng.random() < TWO_ARGUMENTS:
        return parameters, rng.choice(numbers)
    return parameters, None


def draw_value(value_type, rng, numbers, letters):
    """A random argument of a type, made from the numbers and letters of the task, so that, for
    example, some values lie above a limit and others below."""
    def number():
        return rng.choice([*numbers, rng.randint(-30, 120), rng.randint(0, 9)]) + rng.randint(-1, 1)

    if value_type == "number":
        return number()
    if value_type == "list":
        return [number() for _ in range(rng.randint(0, 7))]
    words = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 5))]
    if value_type == "words":
        return words
    if value_type == "text":
        return " ".join(words)
    return {word: number() for word in words}


def write_program(chain, parameters, argument, rng):
    """A chain and its parameters from draw_parameters() -> the docstring's sentence, the first line
    of the function, and its body with one line per operation."""
    variables = {value_type: names[0] for value_type, names in VARIABLES.items()}
    first = rng.choice(VARIABLES[chain[0].input_type])
    variables[chain[0].input_type] = first
    second = rng.choice(SECOND_VARIABLES) if argument else None
    phrases, body = [], ""
    for i, (operation, values) in enumerate(zip(chain, parameters)):
        if argument and argument[0] == i:
            values = {**values, argument[1]: second}
        phrases.append(fill_in(rng.choice(operation.phrasings), values))
        code = re.sub(rf"\b{VARIABLES[operation.input_type][0]}\b",
                      variables[operation.input_type], operation.code)
        is_last = i == len(chain) - 1
        target = "return" if is_last else f"{variables[operation.output_type]} ="
        body += f"    {target} {fill_in(code, values)}\n"
    sentence = ", then ".join(phrases)
    arguments = f"{first}, {second}" if argument else first
    head = f"def {rng.choice(FUNCTIONS)}({arguments}):\n"
    return sentence[0].upper() + sentence[1:], head, body


def draw_cases(function, chain, parameters, argument, rng):
    """Twelve calls of a task's function: {arguments: result}, both as Python source."""
    numbers = [values["k"] for values in parameters if "k" in values] or [7]
    letters = [values[key] for values in parameters for key in "cd" if key in values]
    letters += rng.choices(string.ascii_lowercase, k=4)
    cases = {}
    for _ in range(12):
        arguments = [draw_value(chain[0].input_type, rng, numbers, letters)]
        if argument and argument[1] == "f":
            arguments.append(rng.randint(1, 6))
        elif argument:
            arguments.append(rng.choice(numbers) + len(cases))
        cases[", ".join(map(repr, arguments))] = repr(function(*arguments))
    return cases


def make_task(chain, rng):
    """A task from a chain: HumanEval's fields, and the `parameters` that its text states. None if
    the drawn calls are a poor test: all return the same, or none is short enough to be shown."""
    parameters, argument = draw_parameters(chain, rng)
    sentence, head, body = write_program(chain, parameters, argument, rng)
    name = head[len("def "):head.index("(")]
    namespace = {}
    exec(head + body, namespace)                # our own code: it needs no sandbox
    cases = draw_cases(namespace[name], chain, parameters, argument, rng)
    if len(set(cases.values())) < 2:
        return None
    # the example should be neither trivial ("[]", "7") nor long
    examples = [(call, result) for call, result in cases.items()
                if len(call) > 3 and len(call + result) <= LONGEST_EXAMPLE]
    if not examples:
        return None
    call, result = min(examples, key=lambda example: abs(len("".join(example)) - EXAMPLE_LENGTH))
    if argument:                                # the text names it instead of stating its value
        index, key = argument
        del parameters[index][key]
    asserts = "".join(f"    assert candidate({arguments}) == {expected}\n"
                      for arguments, expected in cases.items())
    return {"prompt": f'{head}    """{sentence}.\n\n    >>> {name}({call})\n    {result}\n'
                      '    """\n',
            "entry_point": name, "canonical_solution": body,
            "test": f"def check(candidate):\n{asserts}",
            "parameters": [value for values in parameters for value in values.values()]}


# ------------------------------------------------------------------------------------------------
# Training tasks and held-out tasks


def is_held_out(*key):
    return hashlib.sha256(repr(key).encode()).digest()[0] < 256 * HELD_OUT


def held_out_split(chain, parameters):
    """The split to which a task belongs: "compositions", "parameters", or "" for training."""
    codes = [operation.code for operation in chain]
    if len(chain) > 1 and is_held_out(codes):
        return "compositions"
    return "parameters" if parameters and is_held_out(codes, parameters) else ""


def generate_tasks(depths, rng, split):
    """Yield tasks of a split without end; their depths take turns."""
    chains = {depth: chains_of(depth) for depth in depths}
    for depth in itertools.cycle(depths):
        task = None
        while task is None:
            chain = rng.choice(chains[depth])
            task = make_task(chain, rng)
            if task and held_out_split(chain, task["parameters"]) != split:
                task = None
        yield {"depth": depth, **task}


def training_tasks(seed, count):
    """Different tasks for training; none of them is held out."""
    tasks = {}
    for task in generate_tasks((1, 2, 3), random.Random(f"{seed} tasks"), ""):
        if len(tasks) == count:
            return list(tasks.values())
        tasks[task["prompt"], task["canonical_solution"]] = task


def held_out_tasks(split, count):
    """Tasks that are never trained on: the problems of assets/tasks_{split}.jsonl."""
    depths = (2, 3) if split == "compositions" else (1, 2, 3)
    tasks = generate_tasks(depths, random.Random(f"held out {split}"), split)
    return [{"task_id": f"{split}/{number:03}", **task}
            for number, task in enumerate(itertools.islice(tasks, count))]


def held_out_problems(split):
    """The held-out tasks that are measured: 300 of each split."""
    path = GRAMMAR.with_name(f"tasks_{split}.jsonl")
    return [row for _, row in read_rows(path)]
