"""Supervised fine-tuning: a model that completes code learns to do what it is told.

Section 4 of the report in one file. Conversations are made from code on disk and from a grammar of
small tasks, read from files, or asked of a teacher; a checklist scores them and what runs is run.
Training goes from coarse to fine, which is here from all that is correct to what scores best (the
report: from many samples of low quality to those chosen by rejection sampling). The loss is taken
on answers alone (not published; ours), and fill-in-the-middle stays in the mix, as in the report,
so that it is not forgotten.

The loop is pretrain.py's train(), the sandbox evaluate.py's. Preferences are dpo.py's business.

    python sft.py                       # build, train, measure; 5 to 13 minutes on 2 cores
    python sft.py --chat                # talk with the newest model
    python sft.py --build               # out/instructions alone: conversations, scores, a picture
    python sft.py --data FILE           # conversations of your own beside them (JSON or JSON lines)
    python sft.py --teacher http://localhost:8000/v1        # and some by a larger model
"""

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import random
import re
import string
import textwrap
import warnings
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import (Batches, Classifier, Contamination, ask_all, default_benchmarks, generator,
                  language_of, load_documents, made_from, user)
from evaluate import (ASSETS, benchmarks, bits_per_byte, bootstrap, code_block, complete,
                      find_problems, held_out_gaps, measure_infilling, pass_at_k, prompt_ids)
from fim import control_stops, load, newest_model, nodes_of, python_tree, words_of
from model import generate
from pretrain import (RANK, WORLD, barrier, fill_in, load_base, next_token_loss, print_table, say,
                      size_of, start_processes, stop_processes, train, training_flags)
from support.files import InputError, read_rows, run, whole_folder, write_json, write_text
from support.sandbox import grades
from tokenizer import ENDOFTEXT, SYSTEM_PROMPT, TextStream, Tokenizer

PRESETS = {"tiny": dict(seq_len=512, batch_tokens=4096, device_batch=8, steps=500, lr=2e-3),
           "mini": dict(seq_len=512, batch_tokens=8192, device_batch=8, steps=1000, lr=1e-3),
           "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=500, lr=1e-3)}
# Rows and batch of the released script (finetuning/sft), lr of Qwen2.5 (arXiv 2412.15115, section
# 4.1); steps: not published; ours
PUBLISHED = dict(seq_len=1280, batch_tokens=1280 * 1024, device_batch=4, steps=3000, lr=7e-6)
COARSE, FINE = 2 / 3, 0.5       # of the steps: those that see all; of the conversations: the best
FIM_SHARE = 0.3                 # of the rows; the report's "small part" is not published; ours

# ------------------------------------------------------------------------------------------------
# A grammar of small tasks
#
# assets/grammar.txt lists operations by what they take and give: two ways to ask for each, and its
# Python. In both, {k} is a number, {f} a small one, {c} and {d} are letters, {s} is a separator.

Operation = namedtuple("Operation", "takes gives ways code")
NAMES = {"number": ["n", "x", "number", "value"], "list": ["numbers", "values", "items", "scores"],
         "text": ["text", "name", "title", "line"], "words": ["words", "names", "lines", "parts"],
         "table": ["counts", "stock", "prices", "points"]}      # the first is the grammar's own
SECOND = ["limit", "amount", "size", "other", "k"]              # a number that is an argument, too
FUNCTIONS = ["solve", "convert", "process", "transform", "compute", "answer", "apply", "change",
             "evaluate", "handle", "prepare", "work"]
TWO_ARGUMENTS = 0.25    # of the tasks with a number
HELD_OUT = 0.1          # of compositions, and of parameters: never trained on
LONGEST_EXAMPLE = 60    # characters of what a docstring's example takes and gives


def read_grammar(path):
    """The operations of the grammar."""
    found, types = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if " : " in line:
            ways, code = line.split(" : ")
            found.append(Operation(*types, ways.split(" | "), code))
        else:
            types = line.split(" -> ")
    return found


OPERATIONS = read_grammar(ASSETS / "grammar.txt")


def fill(text, parameters):
    """Put parameters for the {k}, {f}, {c}, {d}, {s} of an operation's English or Python."""
    return re.sub(r"{([kfcds])}", lambda match: str(parameters[match[1]]), text)


def compositions(depth):
    """The chains of operations whose types fit."""
    chains = [(operation,) for operation in OPERATIONS]
    for _ in range(depth - 1):
        chains = [(*chain, operation) for chain in chains for operation in OPERATIONS
                  if operation.takes == chain[-1].gives]
    return chains


def draw_parameters(chain, rng):
    """The parameters of each operation, and the key of the one that is an argument, or None:
    ([{"k": 12, "c": "ab"}, {}], (0, "k"))."""
    def letters():
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 3)))

    drawn = []
    for operation in chain:
        values = {"k": rng.randint(2, 10 ** rng.randint(1, 3)), "f": rng.randint(2, 9),
                  "c": letters(), "d": letters(),
                  "s": rng.choice(["-", ", ", "_", "+", "/", ":", ";", "."])}
        drawn.append({key: value for key, value in values.items()
                      if f"{{{key}}}" in operation.code})
    places = [(i, key) for i, values in enumerate(drawn) for key in values if key in "kf"]
    return drawn, rng.choice(places) if places and rng.random() < TWO_ARGUMENTS else None


def draw_argument(kind, rng, numbers, pieces):
    """A value of a type; the task's own numbers and letters turn up in it."""
    if kind == "number":
        return rng.choice([*numbers, rng.randint(-30, 120), rng.randint(0, 9)]) + rng.randint(-1, 1)
    if kind == "list":
        return [draw_argument("number", rng, numbers, pieces) for _ in range(rng.randint(0, 7))]
    words = ["".join(rng.choices(pieces, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 5))]
    if kind == "words":
        return words
    if kind == "text":
        return " ".join(words)
    return {word: draw_argument("number", rng, numbers, pieces) for word in words}


def write_program(chain, drawn, second, rng):
    """A composition's docstring, and its function as (first line, body)."""
    names = {kind: own[0] for kind, own in NAMES.items()}
    argument = names[chain[0].takes] = rng.choice(NAMES[chain[0].takes])
    arguments = f"{argument}, {rng.choice(SECOND)}" if second else argument
    steps, body = [], ""
    for i, (operation, values) in enumerate(zip(chain, drawn)):
        if second and second[0] == i:
            values = {**values, second[1]: arguments.split(", ")[1]}
        steps.append(fill(rng.choice(operation.ways), values))
        code = re.sub(rf"\b{NAMES[operation.takes][0]}\b", names[operation.takes], operation.code)
        result = "return" if i == len(chain) - 1 else f"{names[operation.gives]} ="
        body += f"    {result} {fill(code, values)}\n"
    summary = ", then ".join(steps)
    return summary[0].upper() + summary[1:], f"def {rng.choice(FUNCTIONS)}({arguments}):\n", body


def make_task(chain, rng):
    """A composition as a task: HumanEval's fields, and the `parameters` that its text states; None
    where its tests would tell nothing. What tests expect is what the solution returns."""
    drawn, second = draw_parameters(chain, rng)
    summary, head, body = write_program(chain, drawn, second, rng)
    name, space = head[4:head.index("(")], {}
    exec(head + body, space)                    # ours, line by line: it needs no sandbox
    numbers = [values["k"] for values in drawn if "k" in values] or [7]
    pieces = [values[key] for values in drawn for key in "cd" if key in values]
    pieces += rng.choices(string.ascii_lowercase, k=4)
    cases = {}
    for _ in range(12):
        case = [draw_argument(chain[0].takes, rng, numbers, pieces)]
        if second:
            case.append(rng.randint(1, 6) if second[1] == "f" else rng.choice(numbers) + len(cases))
        cases[", ".join(map(repr, case))] = repr(space[name](*case))
    shown, expected = min((case for case in cases.items() if len(case[0]) > 3),
                          key=lambda case: abs(len("".join(case)) - 24), default=("", ""))
    if len(set(cases.values())) < 2 or not 0 < len(shown + expected) <= LONGEST_EXAMPLE:
        return None
    test = "def check(candidate):\n" + "".join(
        f"    assert candidate({case}) == {out}\n" for case, out in cases.items())
    if second:
        del drawn[second[0]][second[1]]
    example = f">>> {name}({shown})\n    {expected}\n"
    return {"prompt": f'{head}    """{summary}.\n\n    {example}    """\n',
            "entry_point": name, "canonical_solution": body, "test": test,
            "parameters": [value for values in drawn for value in values.values()]}


def held_out(*what):
    """Whether something is kept from training: by its hash."""
    return hashlib.sha256(repr(what).encode()).digest()[0] < 256 * HELD_OUT


def held_out_as(chain, parameters):
    """What keeps a task from training: "compositions", "parameters", or "" for nothing."""
    codes = [operation.code for operation in chain]
    if len(chain) > 1 and held_out(codes):
        return "compositions"
    return "parameters" if parameters and held_out(codes, parameters) else ""


def tasks(depths, rng, kind):
    """Endless tasks, their depths in turn, that are held out as `kind` ("": none is)."""
    chains = {depth: compositions(depth) for depth in depths}
    for depth in itertools.cycle(depths):
        while True:
            chain = rng.choice(chains[depth])
            task = make_task(chain, rng)
            if task and held_out_as(chain, task["parameters"]) == kind:
                break
        yield {"depth": depth, **task}


def training_tasks(seed, count):
    """Tasks of the grammar to learn from, none twice and none that is held out."""
    found, distinct = tasks((1, 2, 3), random.Random(f"{seed} tasks"), ""), {}
    while len(distinct) < count:
        task = next(found)
        distinct[task["prompt"], task["canonical_solution"]] = task
    return list(distinct.values())


def held_out_tasks(kind, count):
    """Tasks of the grammar that no training sees: the problems of assets/tasks_{kind}.jsonl."""
    depths = (2, 3) if kind == "compositions" else (1, 2, 3)
    found = itertools.islice(tasks(depths, random.Random(f"held out {kind}"), kind), count)
    return [{"task_id": f"{kind}/{number:03}", **task} for number, task in enumerate(found)]


# ------------------------------------------------------------------------------------------------
# Conversations

# What evaluate.py asks, taken apart: <|im_start|>role, then the content up to its <|im_end|>
SYSTEM, ASKED = (turn.partition("\n")[2].split("<|im_end|>")[0] for turn in "\n".join(
    benchmarks()["prompts"]["code chat"]["prompt"]).split("<|im_start|>")[1:3])
BLOCK = "\n```python\n{code}\n```"
WAYS = {"write": "Write a Python function `{name}`: {summary}",
        "fix": "This function is wrong. Mend it." + BLOCK,
        "explain": "What does this function do?" + BLOCK,
        "complete": "Complete this function." + BLOCK}
LONGEST_FUNCTION = 24           # lines
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
         ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Add}


def conversation(question, answer, source, **more):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}], "source": source, **more}


def task_conversation(task, in_words=False):
    """A task of the grammar, asked for as evaluate.py asks for HumanEval's, or as one does who
    talks with the model."""
    head, words = task["prompt"].split("\n")[:2]
    question = ASKED.replace("{prompt}", task["prompt"].strip())
    if in_words:
        question = WAYS["write"].format(name=head[len("def "):-1], summary=words.strip(' "'))
    made = conversation(question, f"```python\n{head}\n{task['canonical_solution']}```", "tasks",
                        problem=task)
    if not in_words:
        made["messages"].insert(0, {"role": "system", "content": SYSTEM})
    return made


def mutated(code, rng):
    """A function with one operator (SWAPS), whole number (n + 1) or truth value changed, the rest
    as it was written; None where there is none."""
    tree = ast.parse(code)
    places = [node for node in ast.walk(tree)
              if type(getattr(node, "op", getattr(node, "ops", [None])[0])) in SWAPS
              or isinstance(node, ast.Constant) and type(node.value) in (int, bool)]
    if not places or not code.isascii():                        # columns are counted in bytes
        return None
    node = rng.choice(places)
    before = ast.get_source_segment(code, node)
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        node.op = SWAPS[type(node.op)]()
    lines = code.split("\n")
    start = sum(map(len, lines[:node.lineno - 1])) + node.lineno - 1 + node.col_offset
    return code[:start] + ast.unparse(node) + code[start + len(before):]


def functions(text):
    """The functions of a Python text with a docstring: (name, first paragraph of it, code)."""
    lines = text.split("\n")
    for node in nodes_of(text):
        if not isinstance(node, ast.FunctionDef) or not (summary := ast.get_docstring(node)) or (
                node.args.args[:1] and node.args.args[0].arg in ("self", "cls")):
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
        summary = " ".join(summary.split("\n\n")[0].split())
        if 3 < code.count("\n") + 1 <= LONGEST_FUNCTION and 20 < len(summary) < 200 and (
                python_tree(code)):
            yield node.name, summary, code


def code_conversations(documents, seed):
    """Functions on disk, each in one of four ways: written, mended, explained, completed."""
    rng = random.Random(f"{seed} functions")
    for document in documents:
        for name, summary, code in functions(document["text"]) if (
                document["language"] == "python") else ():
            way, answer, shown = rng.choice(list(WAYS)), f"```python\n{code}\n```", code
            if way == "fix" and (shown := mutated(code, rng)) in (None, code):
                continue
            if way == "explain":
                answer = summary
            if way == "complete":
                shown = "\n".join(code.split("\n")[:rng.randint(1, code.count("\n"))])
            question = WAYS[way].format(name=name, summary=summary, code=shown)
            yield conversation(question, answer, "code", way=way)


def check_messages(messages):
    """What is wrong with a conversation, or None."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages are no list of objects"
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in roles:
        return "no assistant turn"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "roles out of order"
    if not all(isinstance(m.get("content"), str) and m["content"].strip() for m in messages):
        return "empty content"


def read_conversations(path, broken):
    """The conversations of a file, messages or Alpaca's shape, also mixed. broken: reason -> lines
    of what is left out."""
    found, first = [], "it is empty"
    for number, row in read_rows(path):
        parts = [row.get("instruction"), row.get("input") or "", row.get("output")]
        if all(isinstance(part, str) for part in parts):
            row = conversation("\n".join(filter(None, parts[:2])), parts[2], "file")
        fault = check_messages(row["messages"]) if "messages" in row else "unknown shape"
        if fault:
            broken[fault].append(f"{path}, line {number}")
            first = f"{fault}, line {number}" if number == 1 else first
        else:
            found.append({"messages": [{"role": m["role"], "content": m["content"]}
                                       for m in row["messages"]], "source": "file"})
    if not found:
        raise InputError(f"{path}: no conversation ({first}); expected messages, or instruction, "
                         "input and output")
    return found


# What a teacher is asked; the report does not publish its prompts; ours
TEACHER_QUESTION = ("Here is a piece of a program:\n\n{}\n\nWrite one task for a programmer that "
                    "has to do with it and can be solved by one self-contained function. Answer "
                    "the task alone.")
TEACHER_SCORE = ("Question:\n{}\n\nAnswer:\n{}\n\nMark the answer from 0 to 10 in each of these: "
                 "consistency, relevance, difficulty, code exists, correctness, form, clarity, "
                 "comments, easy to learn. Answer with nine numbers separated by blanks.")
SNIPPET_TOKENS = 1024           # report, section 4.1
TAUGHT, ANSWERS = 200, 3        # questions, and candidates for each, of which the best stays


def taught_conversations(url, documents, tokenizer, seed):
    """Instructions by a teacher, each about a snippet of a training document, with several answers
    and their marks."""
    rng, snippets = random.Random(f"{seed} snippets"), []
    for document in rng.choices(documents, k=TAUGHT):
        ids = tokenizer.encode(document["text"])
        start = rng.randint(0, max(0, len(ids) - SNIPPET_TOKENS))
        snippets.append(tokenizer.decode(ids[start:start + SNIPPET_TOKENS]))
    questions = ask_all(url, [user(TEACHER_QUESTION.format(snippet)) for snippet in snippets],
                        temperature=0.7)
    for number in range(ANSWERS):
        answers = ask_all(url, [user(question) for question in questions], temperature=0.7,
                          seed=number)
        marks = ask_all(url, [user(TEACHER_SCORE.format(*pair))
                              for pair in zip(questions, answers)], temperature=0.0)
        for question, answer, mark in zip(questions, answers, marks):
            numbers = [min(10, int(n[:9])) / 10 for n in re.findall(r"\d+", mark)]
            given = {"taught": numbers} if len(numbers) == len(CHECKLIST) else {}
            yield conversation(question, answer, "teacher", **given)


# ------------------------------------------------------------------------------------------------
# The checklist (report, section 4.1): nine items, each 0 to 1 by what can be seen


def share(values):
    values = list(values)
    return sum(map(bool, values)) / max(1, len(values))


def consistent(question, answer, code):
    """Of the names that the question gives in code, those that the answer uses."""
    names = {a or b for a, b in re.findall(r"`(\w+)|def (\w+)", question)} - {""}
    return share(name in answer for name in names) if names else 0.5


def relevant(question, answer, code):
    """Whether the question speaks of programs."""
    return min(1.0, len(COMPUTING & set(words_of(question.lower()))) / 2)


def difficult(question, answer, code):
    """Statements, loops and branches of the answer, ten for full marks."""
    return min(1.0, sum(isinstance(node, (ast.stmt, ast.comprehension)) for node in nodes_of(code))
               / 10)


def has_code(question, answer, code):
    return float(bool(code.strip()))


def correct(question, answer, code):
    """Whether the code parses; that it does what was asked is seen when it is run."""
    return float(bool(code.strip() and python_tree(code)))


def well_formed(question, answer, code):
    """Lines of at most 100 characters, four blanks, names in small letters."""
    lines = code.split("\n")
    names = [n.name for n in nodes_of(code) if isinstance(n, ast.FunctionDef)]
    return (share(len(line) <= 100 and "\t" not in line for line in lines)
            + share(name == name.lower() for name in names or ["x"])) / 2


def clear(question, answer, code):
    """Short functions, and names of more than a letter."""
    names = {n.id for n in nodes_of(code) if isinstance(n, ast.Name)}
    long_names = share(len(name) > 1 for name in names or ["xx"])
    return (min(1.0, 20 / max(1, code.count("\n"))) + long_names) / 2


def commented(question, answer, code):
    """A docstring or a comment for every ten lines."""
    notes = code.count("#") + code.count('"""') / 2
    return min(1.0, notes * 10 / max(10, code.count("\n")))


def easy_to_learn(question, answer, code):
    """Words of explanation around the code, forty for full marks, or an example in the question."""
    prose = re.sub(r"(?s)```.*?(```|$)", "", answer)
    return min(1.0, len(prose.split()) / 40 + 0.5 * (">>>" in question))


COMPUTING = set("function program code python list string array sort loop algorithm class method "
                "return value number text dictionary data file bug complete words".split())
# The weights are not published; ours
CHECKLIST = {consistent: 2, relevant: 1, difficult: 2, has_code: 1, correct: 3, well_formed: 1,
             clear: 1, commented: 1, easy_to_learn: 1}


def score(made):
    """A conversation's nine marks, by its last two turns or a teacher, and their weighted mean."""
    question, answer = (message["content"] for message in made["messages"][-2:])
    code = code_block(answer) if "```" in answer else ""
    marks = made.get("taught") or [item(question, answer, code) for item in CHECKLIST]
    return marks, sum(w * s for w, s in zip(CHECKLIST.values(), marks)) / sum(CHECKLIST.values())


# ------------------------------------------------------------------------------------------------
# Candidates -> out/instructions

KEPT_WITHOUT_CODE, TAIL, KEPT_IN_TAIL = 0.3, 0.02, 0.5      # shares; not published; ours
TASKS, CODE = 8000, 750        # conversations of the grammar, of code on disk


def text_of(made):
    return "\n".join(message["content"] for message in made["messages"])


def answer_of(made):
    return made["messages"][-1]["content"]


def question_of(made):
    return json.dumps(made["messages"][:-1])


def mark_of(made):
    return made.get("passed", False), made["score"]


def candidates(args, documents, tokenizer, broken):
    """Conversations from every source, before anything is asked of them."""
    found = [task_conversation(task, in_words=number < TASKS // 4)
             for number, task in enumerate(training_tasks(args.seed, TASKS))]
    for first, second in zip(found[:TASKS // 8], found[TASKS // 8:TASKS // 4]):     # two turns
        second["messages"] = first["messages"] + second["messages"]
    found += itertools.islice(code_conversations(documents, args.seed), CODE)
    for path in args.data or []:
        found += read_conversations(path, broken)
    if args.teacher:
        found += taught_conversations(args.teacher, documents, tokenizer, args.seed)
    return found


def name_languages(found, documents):
    """Give each conversation the language of its answer: what the fence says, else what the
    classifier does, which learns from the training documents; text where there is no code."""
    texts = [(document["text"][:2000], document["language"]) for document in documents[::3]]
    names = sorted({name for _, name in texts})
    classifier = Classifier(names).fit(*zip(*texts), epochs=2)
    guesses = classifier.predict([answer_of(made) for made in found]).argmax(-1)
    for made, guess in zip(found, guesses):
        fence = re.search(r"```(\w*)", answer_of(made))
        name = fence[1].lower() if fence else "text"
        made["language"] = language_of(f".{name.removesuffix('3')}") or name or names[guess]


def is_literal(text):
    with (contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
          warnings.catch_warnings(action="ignore")):            # of odd escapes
        ast.literal_eval(text)
        return True
    return False


def shown_calls(made):
    """A problem for the sandbox from a function in the last answer and calls of it (>>>), with the
    values that they give, in it or its question; None without, or where it needs a module."""
    code, (question, answer) = code_block(answer_of(made)), made["messages"][-2:]
    calls = re.findall(r">>> ((\w+)\(.*\))\n *([^\s>].*)",
                       question["content"] + "\n" + answer["content"])
    for name in re.findall(r"^def (\w+)\(", code, re.MULTILINE):
        tests = [f"    assert candidate{call[len(name):]} == {value}\n" for call, called, value
                 in calls if called == name and python_tree(call) and is_literal(value)]
        if tests and python_tree(code) and not re.search(r"^\s*(import|from) ", code, re.MULTILINE):
            return {"prompt": f"def {name}():\n", "entry_point": name,
                    "test": "def check(candidate):\n" + "".join(tests)}


def verify(found, weak):
    """Run the answers that can be run: against the hidden tests of their task (one in twenty: they
    come from the same code), or against the calls that they show. Sets `passed`."""
    tasks = [(made, made["problem"]) for made in found if "problem" in made][::20]
    others = [(made, shown_calls(made)) for made in found if "problem" not in made]
    pairs = [(made, problem) for made, problem in tasks + others if problem]
    programs = [(problem, code_block(answer_of(made))) for made, problem in pairs]
    for (made, _), grade in zip(pairs, grades(programs, weak=weak)):
        made["passed"] = grade.passed


def build(args, tokenizer, settings):
    """Make out/instructions: train.jsonl, the best last; pairs.jsonl, answers that fail their tests
    beside one that passes, for dpo.py; scores.png; a manifest of what was dropped and why."""
    documents, broken, counts = load_documents(args.out, "train"), defaultdict(list), {}
    kept = candidates(args, documents, tokenizer, broken)
    rng, contamination = random.Random(f"{args.seed} thinned"), Contamination(default_benchmarks())
    counts["made"], seen, best = len(kept), set(), {}

    def drop(reason, unwanted):
        nonlocal kept
        before, kept = kept, [made for made in kept if not unwanted(made)]
        counts[reason] = len(before) - len(kept)

    drop("the same twice", lambda made: text_of(made) in seen or seen.add(text_of(made)))
    drop("contaminated", lambda made: contamination.hit(text_of(made)))
    name_languages(kept, documents)
    often = Counter(made["language"] for made in kept)
    drop("no code, thinned", lambda made: made["language"] == "text"
         and made["source"] != "file" and rng.random() > KEPT_WITHOUT_CODE)
    drop("rare language, thinned", lambda made: often[made["language"]] < TAIL * len(kept)
         and made["source"] != "file" and rng.random() > KEPT_IN_TAIL)
    verify(kept, args.weak_sandbox)
    rejected = [made for made in kept if made.get("passed") is False]
    drop("fails its tests", lambda made: made.get("passed") is False)
    for made in kept:
        made["marks"], made["score"] = score(made)
        best[question_of(made)] = max(made, best.get(question_of(made), made), key=mark_of)
    drop("another answer is better", lambda made: mark_of(made) < mark_of(best[question_of(made)]))
    kept.sort(key=lambda made: made["score"])
    pairs = [{"prompt": made["messages"][:-1], "chosen": answer_of(other),
              "rejected": answer_of(made)} for made in rejected
             if (other := best.get(question_of(made))) and other.get("passed")]
    with whole_folder(Path(args.out) / "instructions") as new:
        fields = ("messages", "source", "language", "passed", "marks", "score")
        rows = [{name: made.get(name) for name in fields} for made in kept]
        for name, part in (("train", rows), ("pairs", pairs)):
            write_text(new / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        draw_scores(kept, new / "scores.png")
        write_json(new / "manifest.json", {
            **settings, "counts": counts, "kept": len(kept),
            "sources": Counter(made["source"] for made in kept),
            "languages": Counter(made["language"] for made in kept),
            "broken": {reason: [len(lines), lines[0]] for reason, lines in broken.items()}})


def file_hashes(paths):
    """Path -> the start of its content's hash."""
    missing = [path for path in paths or [] if not Path(path).is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file")
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in paths or []}


def draw_scores(kept, path):
    """scores.png: how the checklist marks the conversations of each source."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for source in dict.fromkeys(made["source"] for made in kept):
        scores = [made["score"] for made in kept if made["source"] == source]
        axes.hist(scores, bins=np.linspace(0, 1, 51), histtype="step", lw=2,
                  label=f"{source}: {len(scores):,}")
    axes.set(title="What the checklist says of the conversations", xlabel="score", yscale="log",
             ylabel="conversations")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def prepare_instructions(args, tokenizer):
    """Make out/instructions unless it is there, print what it holds -> its conversations."""
    folder = Path(args.out) / "instructions"
    settings = {"data": file_hashes(args.data), "teacher": args.teacher, "seed": args.seed}
    if RANK == 0 and (args.fresh or not folder.exists()):
        build(args, tokenizer, settings)
    barrier()
    manifest = made_from(folder, settings)
    say("conversations: " + ", ".join(f"{n:,} {reason}" for reason, n in manifest["counts"].items())
        + f", {manifest['kept']:,} kept")
    for name in ("sources", "languages"):
        say(f"{name}: " + ", ".join(f"{k} {n:,}" for k, n in manifest[name].items()))
    for reason, (count, first) in manifest["broken"].items():
        say(f"left out: {count} with {reason}, the first in {first}")
    return [row for _, row in read_rows(folder / "train.jsonl")]


# ------------------------------------------------------------------------------------------------
# Conversations -> ids, targets, rows


def chat_ids(tokenizer, messages, last_turn=False, published_mask=False):
    """A conversation in ChatML -> (ids, whether each is learned), as lists.

    Learned are what an assistant says and the <|im_end|> after it, in all turns or the last alone.
    published_mask: as the released script has it, the turns' marks of all roles and the line ends
    after <|im_end|> too. SYSTEM_PROMPT comes first where no system message does. Contents are text:
    a control token written in one stays what was written.
    """
    begin, end = (tokenizer.special[name] for name in ("<|im_start|>", "<|im_end|>"))
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    ids, learned = [], []
    for number, message in enumerate(messages, 1):
        own = message["role"] == "assistant" and (not last_turn or number == len(messages))
        if message["role"] == "assistant":          # as it comes after a generation prompt
            head, text = (tokenizer.encode(part) for part in ("assistant\n", message["content"]))
        else:
            head, text = tokenizer.encode(f"{message['role']}\n{message['content']}"), []
        ids += [begin, *head, *text, end, *tokenizer.encode("\n")]
        learned += [published_mask, *[False] * len(head), *[own] * len(text),
                    own or published_mask, published_mask]
    return ids, learned


def conversation_row(parts, T, end):
    """Conversations, (ids, learned) each, one after another in a row of T: input_ids, targets and
    document_starts, which keep them from seeing one another."""
    inputs, targets, starts = [], [], []
    for ids, learned in parts:
        starts += [len(inputs)] * len(ids)
        inputs += ids
        targets += [token if keep else -100 for token, keep in zip(ids[1:], learned[1:])] + [-100]
    missing = T - len(inputs)
    return (np.array(inputs + [end] * missing), np.array(targets + [-100] * missing),
            np.array(starts + [len(inputs)] * missing))


def best_of_each(conversations):
    """The numbers of those with the best scores among their kind, so that none of the ways to ask
    is lost. conversations: sorted by score."""
    kinds = defaultdict(list)
    for number, made in enumerate(conversations):
        kinds[made["source"], made["messages"][0]["role"]].append(number)
    return [number for numbers in kinds.values()
            for number in numbers[round(len(numbers) * (1 - FINE)):]]


class Rows:
    """rows[i]: the conversations in the i-th row of T tokens of an endless run over a list, each
    epoch in an order of its own; of those that wait, the first that fits comes next."""

    WAITING = 64

    def __init__(self, lengths, T, seed, name):
        self.lengths, self.T, self.seed, self.name = lengths, T, seed, name
        self.rows, self.epoch = [], 0

    def __getitem__(self, index):
        while len(self.rows) <= index:
            order = generator(self.seed, f"order {self.name}", self.epoch).permutation(
                len(self.lengths)).tolist()
            self.epoch += 1
            while order:
                row, room = [], self.T
                for i in order[:self.WAITING]:
                    if self.lengths[i] <= room:
                        row.append(i)
                        room -= self.lengths[i]
                        order.remove(i)
                self.rows.append(row)
        return self.rows[index]


class ConversationBatches(Batches):
    """batches(step) as in data.py, of rows of conversations: two thirds of the steps of all of
    them, then of the best alone. Between them stands a share of rows of code with gaps."""

    def __init__(self, documents, tokenizer, args, encoded, fine):
        """encoded: (ids, learned) of each conversation; fine: the numbers of the best."""
        super().__init__(documents, tokenizer, args.seq_len, args.batch_tokens // args.seq_len,
                         args.device_batch, args.seed, 1.0, RANK, WORLD, (1, 0, 0))
        self.encoded, self.fine, self.fim_share = encoded, fine, args.fim_share
        coarse = round(COARSE * args.steps) * self.batch_rows
        self.first_fine = coarse - int(coarse * args.fim_share)
        lengths = [len(ids) for ids, _ in encoded]
        self.coarse_rows = Rows(lengths, self.T, self.seed, "coarse")
        self.fine_rows = Rows([lengths[i] for i in fine], self.T, self.seed, "fine")

    def row(self, index):
        before, after = (int(i * self.fim_share) for i in (index, index + 1))   # rows with a gap
        if after > before:
            return super().row(before)
        number = index - before                         # among the rows of conversations
        if number < self.first_fine:
            numbers = self.coarse_rows[number]
        else:
            numbers = [self.fine[i] for i in self.fine_rows[number - self.first_fine]]
        return conversation_row([self.encoded[i] for i in numbers], self.T, self.end)


# ------------------------------------------------------------------------------------------------
# Measuring

ASKED_TOKENS = 160              # of an answer, when measuring
SAMPLED = 100                   # problems that are answered several times
GAPS = 50                       # of each kind


def solve(model, tokenizer, problems, weak, n=1, **sampling):
    """n answers to each problem, graded -> for each a list of (text, stopped by itself, passed)."""
    way = benchmarks()["prompts"]["code chat"]
    prompts = [prompt_ids(model, tokenizer, way, problem) for problem in problems]
    texts = complete(model, tokenizer, [prompt for prompt in prompts for _ in range(n)],
                     ASKED_TOKENS, way["stops"], control_stops(tokenizer), **sampling)
    pairs = [(problems[i // n], code_block(text)) for i, (text, _) in enumerate(texts)]
    found = [(*text, grade.passed) for text, grade in zip(texts, grades(pairs, weak=weak))]
    return [found[i:i + n] for i in range(0, len(found), n)]


def held_out_problems(kind):
    return [row for _, row in read_rows(ASSETS / f"tasks_{kind}.jsonl")]


def measure(folder, args, device, samples=0):
    """What a checkpoint can do -> {name: value, or a list of values over problems}. samples: of
    each of some problems at temperature 0.8, for pass@k."""
    print(f"\nmeasuring {folder}")
    model, tokenizer = load(folder, device)
    heldout, values = load_documents(args.out, "validation"), {}
    problems = {"unseen parameters": held_out_problems("parameters"),
                "unseen compositions": held_out_problems("compositions"),
                "ladder": list(find_problems("ladder").values())}
    found = {name: solve(model, tokenizer, asked, args.weak_sandbox)
             for name, asked in problems.items()}
    for name, answers in found.items():
        values[f"{name}: pass@1, %"] = [100 * passed for [(_, _, passed)] in answers]
    if samples:
        answers = solve(model, tokenizer, problems["unseen parameters"][:SAMPLED],
                        args.weak_sandbox, samples, temperature=0.8, seed=args.seed)
        for k in (1, samples):
            values[f"{SAMPLED} sampled {samples} times: pass@{k}, %"] = [
                100 * pass_at_k(samples, sum(passed for _, _, passed in tries), k)
                for tries in answers]
    answers = [answer for [answer] in found["unseen parameters"]]
    values["answers that stop, %"] = 100 * share(stopped for _, stopped, _ in answers)
    values["length of an answer, tokens"] = sum(
        len(tokenizer.encode(text)) for text, _, _ in answers) / len(answers)
    scores = measure_infilling(model, tokenizer, held_out_gaps(heldout, GAPS)).values()
    for name in ("bits per byte", "exact, %", "stops, %"):
        values[f"infilling: {name}"] = sum(score[name] for score in scores) / len(scores)
    return {**values, "code: bits per byte": bits_per_byte(model, tokenizer, heldout)}


def cell(value):
    """A measure as the table has it: of a list the mean and its 95 % interval."""
    if not isinstance(value, list):
        return f"{value:.2f}"
    low, high = bootstrap(value)
    return f"{sum(value) / len(value):.1f} ({low:.1f} to {high:.1f})"


def compare(folders, args, device, samples=0):
    """Print what checkpoints can do, side by side, and three answers of the last -> measures."""
    values = [measure(folder, args, device, samples) for folder in folders]
    print()
    print_table([["", *(Path(folder).name for folder in folders)]] + [
        [name, *(cell(value[name]) for value in values)] for name in values[0]])
    problems = held_out_problems("parameters")[:3]
    for problem, [(text, _, _)] in zip(problems, solve(*load(folders[-1], device), problems,
                                                       args.weak_sandbox)):
        print(f"\n--- asked\n{problem['prompt']}--- answered\n{code_block(text).rstrip()}")
    return values


# ------------------------------------------------------------------------------------------------
# Talking

CHAT_TOKENS = 256               # of an answer


def chat(args):
    """Talk with the newest model in the terminal, until an empty line."""
    folder = args.init or newest_model(args.out)
    model, tokenizer = load(folder, args.device)
    messages, T = [], model.config.max_position_embeddings
    new_tokens = min(CHAT_TOKENS, T // 2)
    print(f"{folder}; an empty line ends the chat")
    while question := next_line():
        messages += user(question)
        while len(ids := prompt_of(tokenizer, messages)) > T - new_tokens and len(messages) > 1:
            messages = messages[2:]                     # the oldest turn is forgotten
        stream = TextStream(tokenizer)
        [new] = generate(model, [ids[-(T - new_tokens):]], new_tokens, args.temperature,
                         stop_ids=control_stops(tokenizer), vocab_size=tokenizer.vocab_size,
                         seed=args.seed + len(messages),
                         on_token=lambda _, token: print(stream.add(token), end="", flush=True))
        print(stream.finish())
        messages.append({"role": "assistant", "content": tokenizer.decode(new)})


def next_line():
    try:
        return input("> ").strip()
    except EOFError:                    # Ctrl-D, or a file's end
        return ""


def prompt_of(tokenizer, messages):
    """A conversation as ids, up to where the assistant's next answer begins."""
    begin = tokenizer.special["<|im_start|>"]
    return [*chat_ids(tokenizer, messages)[0], begin, *tokenizer.encode("assistant\n")]


# ------------------------------------------------------------------------------------------------
# The stage


def warn_if_untrained(model, tokenizer):
    """Say so if the base has never seen <|im_start|>: its row is as short as those of no use."""
    norms = model.head.detach().float().norm(dim=1)                                 # (V,)
    own, usual = norms[tokenizer.special["<|im_start|>"]], norms.median()
    if own < usual / 2:
        say("the base has hardly seen <|im_start|>: all it knows of conversations is learned here")


def train_stage(args, device):
    """From a base model and conversations to out/sft."""
    folder = Path(args.out) / "sft"
    if folder.exists() and not args.fresh and not folder.with_name("sft.unfinished").exists():
        return say(f"{folder} is finished; --fresh trains it again")
    say(f"starting from {args.init}")
    model, tokenizer = load_base(args.init, device)
    args.size = args.size or size_of(model, device)
    fill_in(args, PRESETS.get(args.size, PUBLISHED))
    longest = max(model.config.max_position_embeddings, args.seq_len)
    model.config.max_position_embeddings = longest
    # as in the generation_config.json of the published instruct models: where others look for it
    model.config.eos_token_id = [tokenizer.special[name] for name in ("<|im_end|>", ENDOFTEXT)]
    warn_if_untrained(model, tokenizer)
    conversations = prepare_instructions(args, tokenizer)
    encoded = [chat_ids(tokenizer, made["messages"], args.last_turn, args.published_mask)
               for made in conversations]
    fits = [len(ids) <= args.seq_len for ids, _ in encoded]
    say(f"{fits.count(False):,} longer than {args.seq_len} tokens are left out")
    if not any(fits):
        raise InputError("no conversation is left; give a larger --seq-len")
    encoded = list(itertools.compress(encoded, fits))
    best = best_of_each(itertools.compress(conversations, fits))
    batches = ConversationBatches(load_documents(args.out, "train"), tokenizer, args, encoded, best)
    heldout = load_documents(args.out, "validation")

    def evaluate(model, step):
        return {"bpb": bits_per_byte(model, tokenizer, heldout)}

    train(model, tokenizer, batches, next_token_loss, args, evaluate)
    if RANK == 0:
        compare([args.init, folder], args, device)
        print(f"\nTo talk with it: python sft.py --chat --init {folder}")


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a Qwen2.5-Coder on conversations.")
    training_flags(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="conversations "
                        "of your own, messages or Alpaca's shape, beside ours (repeatable)")
    parser.add_argument("--teacher", metavar="URL", help="an OpenAI-compatible server that writes "
                        "more of them")
    parser.add_argument("--build", action="store_true", help="make out/instructions alone")
    parser.add_argument("--chat", action="store_true", help="talk with the newest model")
    parser.add_argument("--temperature", type=float, default=0.0, help="of --chat (default: 0)")
    parser.add_argument("--last-turn", action="store_true", help="learn the last answer alone")
    parser.add_argument("--published-mask", action="store_true", help="learn the turns' marks "
                        "too, as the released script does")
    parser.add_argument("--fim-share", type=float, default=FIM_SHARE, help="rows of "
                        "fill-in-the-middle among the conversations' (default: %(default)s)")
    parser.add_argument("--weak-sandbox", action="store_true", help="run programs where the system "
                        "cannot lock them in, under resource limits alone")
    args = parser.parse_args()
    build_only, chat_only = vars(args).pop("build"), vars(args).pop("chat")
    if not 0 <= args.fim_share < 1 or not args.temperature >= 0:
        raise InputError("--fim-share must be at least 0 and below 1, --temperature at least 0")
    if chat_only:
        return chat(args)
    vars(args).pop("temperature")
    args.stage, args.before, args.after = "sft", 0, 0
    args.init = str(args.init or newest_model(args.out, ("repository", "pretrain")))
    device = start_processes(args.device)
    if build_only:
        prepare_instructions(args, Tokenizer.load(args.init))
    else:
        train_stage(args, device)
    stop_processes()


if __name__ == "__main__":
    run(main)
