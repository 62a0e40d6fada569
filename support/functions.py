"""Python code in answers and on disk: exercises from it, tests from its docstrings, its quality.

    documented_functions()    the functions of a file that can be explained, written or completed
    mutated()                 a function with one fault, to be mended
    example_problem()         a problem for the sandbox from the examples in a docstring
    checklist_scores()        how good an answer looks
"""

import ast
import contextlib
import re
import textwrap
import warnings
from doctest import DocTestParser

LONGEST_FUNCTION = 24       # lines
COMPUTING = set("function program code python list string array sort loop algorithm class method "
                "return value number text dictionary data file bug complete words".split())
# How mutated() breaks a function: one operator for another
MUTATIONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
             ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
             ast.Sub: ast.Add, ast.Mult: ast.Add}


def parse(text):
    """The syntax tree of a Python text; None if it does not parse."""
    with warnings.catch_warnings(action="ignore"):          # of odd escapes
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def nodes_of(code):
    """The nodes of the syntax tree of a Python text; none if it does not parse."""
    tree = parse(code)
    return list(ast.walk(tree)) if tree else []


def documented_functions(text):
    """The short functions with a docstring in a Python text: (name, first paragraph, code)."""
    lines = text.split("\n")
    for node in nodes_of(text):
        summary = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not summary or node.args.args[:1] and node.args.args[0].arg in ("self", "cls"):
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
        summary = " ".join(summary.split("\n\n")[0].split())
        is_short = 3 < code.count("\n") + 1 <= LONGEST_FUNCTION and 20 < len(summary) < 200
        if is_short and parse(code):
            yield node.name, summary, code


def mutated(code, rng):
    """A function with one operator (MUTATIONS), integer (n + 1) or truth value changed, and
    otherwise as it was written; None if it has none."""
    def can_change(node):
        operator = getattr(node, "op", getattr(node, "ops", [None])[0])
        return type(operator) in MUTATIONS or (
            isinstance(node, ast.Constant) and type(node.value) in (int, bool))

    candidates = [node for node in ast.walk(ast.parse(code)) if can_change(node)]
    if not candidates or not code.isascii():                # ast counts columns in bytes
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


def literal(node):
    """The syntax node of a literal -> its source, written by repr(). ValueError: it is no literal,
    or its value has none, such as inf."""
    text = repr(ast.literal_eval(node))
    ast.literal_eval(text)
    return text


def example_test(example, name):
    """A docstring's example as source: ("2, k=3", "4") for `>>> f(2, k=3)`. None unless it is
    certainly a test: one call of the function, with literals, that gives a literal without floats,
    which may have been rounded.

    The test runs outside of the process in which the program is locked up. It is therefore written
    from values and never contains text of the docstring, which might be any expression.
    """
    try:
        call = ast.parse(example.source.strip(), mode="eval").body
        result = ast.parse(example.want.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != name:
            return None
        if example.options or None in [keyword.arg for keyword in call.keywords]:   # **arguments
            return None
        if any(isinstance(getattr(node, "value", None), float) for node in ast.walk(result)):
            return None
        arguments = [literal(argument) for argument in call.args]
        arguments += [f"{keyword.arg}={literal(keyword.value)}" for keyword in call.keywords]
        return ", ".join(arguments), literal(result)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def docstring_tests(function):
    """The examples in the docstring of a function (its syntax node) that are certainly tests of it:
    a list of (arguments, result)."""
    try:
        examples = DocTestParser().get_examples(ast.get_docstring(function) or "")
    except ValueError:                                      # lines that are not aligned
        return []
    with warnings.catch_warnings(action="ignore"):          # of odd escapes
        tests = [example_test(example, function.name) for example in examples]
    return [test for test in tests if test]


def is_self_contained(code):
    """Whether the functions of a program only compute: no module, no input, nothing printed."""
    return not any(isinstance(node, (ast.Import, ast.ImportFrom, ast.Global))
                   or isinstance(node, ast.Name) and node.id in ("print", "input", "open")
                   for node in nodes_of(code))


def is_stub(function):
    """Whether a function has no body yet: a docstring, then nothing that computes."""
    return all(isinstance(node, (ast.Pass, ast.Raise))
               or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
               for node in function.body)


def functions_by_name(code):
    """Name -> syntax node of the functions of a program; none if it does not parse."""
    body = getattr(parse(code), "body", [])
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def example_problem(answer, before, code_block):
    """A problem for the sandbox from the examples in a docstring, or None.

    before: what was said before the answer; code_block(answer): the answer's code. Examples count
    in the docstring of the answer's function, or of a function without a body that it completes.
    Those in prose, or in code that was there before, may show the fault that the answer mends.
    """
    code = code_block(answer)
    if answer.count("```") > 2 or not is_self_contained(code):      # of several blocks: which one?
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
    """The label of the answer's code block, such as "python"; "text" if it has none."""
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
    values = list(values)
    return sum(map(bool, values)) / max(1, len(values))


def checklist_scores(question, answer, code):
    """The nine items of the report's checklist, from 0 to 1, as far as the text shows them.
    code: the program in the answer, "" for none."""
    nodes = nodes_of(code)
    lines = code.split("\n")
    asked_names = {quoted or defined
                   for quoted, defined in re.findall(r"`(\w+)|def (\w+)", question)} - {""}
    words = set(re.findall(r"[a-z]+", question.lower()))
    steps = [node for node in nodes if isinstance(node, (ast.stmt, ast.comprehension))]
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    tidy_lines = share(len(line) <= 100 and "\t" not in line for line in lines)
    comments = code.count("#") + code.count('"""') / 2
    explanation = re.sub(r"(?s)```.*?(```|$)", "", answer).split()
    return {
        # names that the question gives as code, and the answer uses
        "consistency": share(name in answer for name in asked_names) if asked_names else 0.5,
        "relevance": min(1.0, len(COMPUTING & words) / 2),
        "difficulty": min(1.0, len(steps) / 10),
        "code exists": float(bool(code.strip())),
        # that it does what was asked is seen only when it is run
        "correctness": float(bool(nodes and code.strip())),
        "form": (tidy_lines + share(name == name.lower() for name in functions or ["x"])) / 2,
        # short functions, and names of more than a letter
        "clarity": (min(1.0, 20 / len(lines[1:] or [""]))
                    + share(len(name) > 1 for name in names or ["xx"])) / 2,
        # one for every ten lines
        "comments": min(1.0, comments * 10 / max(10, code.count("\n"))),
        "easy to learn": min(1.0, len(explanation) / 40 + 0.5 * (">>>" in question))}
