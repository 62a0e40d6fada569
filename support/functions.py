"""Python functions: exercises from files, bugs on purpose, tests from docstrings; and scores of
answers that hold one."""

import ast
import contextlib
import re
import textwrap
import warnings
from doctest import DocTestParser

LONGEST_FUNCTION = 24       # lines
PROGRAMMING_WORDS = set(
    "function program code python list string array sort loop algorithm class method return value "
    "number text dictionary data file bug complete words".split())
# How mutated() breaks a function: one operator becomes another
MUTATIONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
             ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
             ast.Sub: ast.Add, ast.Mult: ast.Add}


def parse(text, mode="exec"):
    """The syntax tree of a Python program (mode "eval": expression); None if it does not parse."""
    with warnings.catch_warnings(action="ignore"):          # about invalid escape sequences
        try:
            return ast.parse(text, mode=mode)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def nodes_of(code):
    """All nodes of the syntax tree of a Python text; none if it does not parse."""
    tree = parse(code)
    return list(ast.walk(tree)) if tree else []


def documented_functions(text):
    """Yield (name, first paragraph of the docstring, code) of the functions that are short enough
    for an exercise. Methods are left out."""
    lines = text.split("\n")
    for node in nodes_of(text):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not docstring or node.args.args[:1] and node.args.args[0].arg in ("self", "cls"):
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
        summary = " ".join(docstring.split("\n\n")[0].split())
        is_short = 3 < code.count("\n") + 1 <= LONGEST_FUNCTION and 20 < len(summary) < 200
        if is_short and parse(code):
            yield node.name, summary, code


def mutated(code, rng):
    """The source code of a function with one change, chosen by rng (random.Random): an operator
    becomes another (MUTATIONS), an integer grows by one, or a truth value is negated. Other lines,
    and comments, keep their text. None if there is nothing to change, or a character is not ASCII
    (`ast` counts columns in bytes)."""
    if not code.isascii():                                  # ast counts columns in bytes
        return None
    candidates = []
    for node in ast.walk(ast.parse(code)):
        operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
        is_number = isinstance(node, ast.Constant) and type(node.value) in (int, bool)
        if type(operator) in MUTATIONS or is_number:
            candidates.append(node)
    if not candidates:
        return None
    node = rng.choice(candidates)
    before = ast.get_source_segment(code, node)
    if isinstance(node, ast.Compare):
        node.ops[0] = MUTATIONS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        node.op = MUTATIONS[type(node.op)]()
    lines = code.split("\n")
    start = sum(len(line) + 1 for line in lines[:node.lineno - 1]) + node.col_offset
    return code[:start] + ast.unparse(node) + code[start + len(before):]


# ------------------------------------------------------------------------------------------------
# Problems from docstrings


def literal(node):
    """The repr() of a literal, given as a syntax node. ValueError if it is no literal or if its
    repr() is none, as for inf."""
    text = repr(ast.literal_eval(node))
    ast.literal_eval(text)
    return text


def docstring_tests(function):
    """The tests in the docstring of a function (its syntax node), as pairs of source text:
    ("2, k=3", "4") for `>>> f(2, k=3)` with the result 4.

    Only a call of the function itself, with literals, counts, and only a literal result without
    floats, which may be rounded. The texts are written from values and never copied, because the
    test runs outside of the process in which the program is locked up.
    """
    tests = []
    try:
        examples = DocTestParser().get_examples(ast.get_docstring(function) or "")
    except ValueError:                                      # lines that are not aligned
        return tests
    for example in examples:
        call = getattr(parse(example.source.strip(), "eval"), "body", None)
        result = getattr(parse(example.want.strip(), "eval"), "body", None)
        if not isinstance(call, ast.Call) or result is None or example.options:
            continue
        is_function = getattr(call.func, "id", None) == function.name
        has_float = any(isinstance(getattr(node, "value", None), float)
                        for node in ast.walk(result))
        has_stars = any(keyword.arg is None for keyword in call.keywords)           # **arguments
        if not is_function or has_float or has_stars:
            continue
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            arguments = [literal(argument) for argument in call.args]
            arguments += [f"{keyword.arg}={literal(keyword.value)}" for keyword in call.keywords]
            tests.append((", ".join(arguments), literal(result)))
    return tests


def functions_by_name(code):
    """Name -> syntax node of the top-level functions of a program; none if it does not parse."""
    body = getattr(parse(code), "body", [])
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def is_stub(function):
    """Whether a function has nothing but a docstring, `...`, `pass` or `raise`."""
    return all(isinstance(node, (ast.Pass, ast.Raise))
               or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
               for node in function.body)


def example_problem(answer, before, code_block):
    """A problem for the sandbox from the examples in a docstring, or None.

    before: the conversation up to the answer; code_block(answer): the answer's program. Examples
    count in the docstring of the answer's function, or of the stub that it completes. Examples in
    prose, or in a function that was there before, may show the bug that the answer fixes. Programs
    that import modules, read input or print do more than an example can test.
    """
    code = code_block(answer)
    has_effects = any(isinstance(node, (ast.Import, ast.ImportFrom, ast.Global))
                      or isinstance(node, ast.Name) and node.id in ("print", "input", "open")
                      for node in nodes_of(code))
    if has_effects or answer.count("```") > 2:              # of several blocks: which one?
        return None
    stubs = {}
    for block, rest in re.findall(r"```\w*\n(.*?)```|^(def .*)", before, re.DOTALL | re.MULTILINE):
        functions = functions_by_name(block + rest)
        stubs.update({name: node for name, node in functions.items() if is_stub(node)})
    for name, function in functions_by_name(code).items():
        tests = []
        if name in stubs or f"def {name}(" not in before:
            tests = docstring_tests(function)
        if name in stubs and not tests:
            tests = docstring_tests(stubs[name])
        if tests:
            asserts = "".join(f"    assert candidate({arguments}) == {result}\n"
                              for arguments, result in tests)
            return {"prompt": f"def {name}():\n", "entry_point": name,
                    "test": f"def check(candidate):\n{asserts}"}
    return None


# ------------------------------------------------------------------------------------------------
# Answers


def answer_language(answer):
    """The label of the answer's code block, such as "python"; "text" if there is no block."""
    label = re.search(r"```([\w+#-]*)", answer)
    if not label:
        return "text"
    return {"py": "python", "python3": "python", "": "unlabelled"}.get(label[1], label[1].lower())


def same_code(a, b):
    """Whether two answers differ in comments and white space only."""
    trees = [parse(textwrap.dedent(text.removeprefix("```python\n").removesuffix("```")))
             for text in (a, b)]
    with contextlib.suppress(RecursionError):           # an expression with a thousand operators
        if all(trees):
            return ast.dump(trees[0]) == ast.dump(trees[1])
    return a.strip() == b.strip()


def share(values):
    """The share of true values."""
    values = list(values)
    return sum(map(bool, values)) / max(1, len(values))


def checklist_scores(question, answer, code):
    """The nine items of the report's checklist, from 0 to 1, as far as the text shows them.
    code: the program in the answer, "" for none."""
    nodes = nodes_of(code)
    lines = code.split("\n")
    question_names = {quoted or defined for quoted, defined in
                      re.findall(r"`(\w+)|def (\w+)", question)} - {""}
    question_words = set(re.findall(r"[a-z]+", question.lower()))
    steps = [node for node in nodes if isinstance(node, (ast.stmt, ast.comprehension))]
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    tidy_lines = share(len(line) <= 100 and "\t" not in line for line in lines)
    lowercase_names = share(name == name.lower() for name in functions or ["x"])
    short_program = min(1.0, 20 / len(lines[1:] or [""]))
    long_names = share(len(name) > 1 for name in names or ["xx"])
    comments = code.count("#") + code.count('"""') / 2
    explanation = re.sub(r"(?s)```.*?(```|$)", "", answer).split()
    return {
        # the answer uses the names that the question mentions as code
        "consistency": share(name in answer for name in question_names) if question_names else 0.5,
        "relevance": min(1.0, len(PROGRAMMING_WORDS & question_words) / 2),
        "difficulty": min(1.0, len(steps) / 10),
        "code exists": float(bool(code.strip())),
        # only that it parses; whether it is right shows when it is run
        "correctness": float(bool(nodes and code.strip())),
        "form": (tidy_lines + lowercase_names) / 2,
        "clarity": (short_program + long_names) / 2,
        "comments": min(1.0, comments * 10 / max(10, len(lines) - 1)),      # one per ten lines
        "easy to learn": min(1.0, len(explanation) / 40 + 0.5 * (">>>" in question))}
