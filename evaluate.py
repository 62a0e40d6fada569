"""How good a model is: benchmarks, pass@k, bits per byte and infilling.

Benchmarks in the formats of HumanEval, MBPP, EvalPlus, infilling, CRUXEval and GSM8K, our own
ladder for small models, the needle in the code, bits per byte, and pass@k (report, sections 6 and
7). assets/benchmarks.json holds their addresses, prompts and stops. Programs that a model wrote
are run by support/sandbox.py.

This file knows models and benchmarks, not training (pretrain.py) nor where data comes from
(data.py): held-out documents reach it as a file.

    python evaluate.py                              # the newest model in out/; 2 to 3 minutes
    python evaluate.py --benchmark humaneval --model FOLDER --problems HumanEval.jsonl.gz [--chat]
    python evaluate.py --benchmark needle           # a heat map, PNG; 20 seconds
    python evaluate.py score --benchmark humaneval --problems HumanEval.jsonl.gz --samples S.jsonl
                                                    # ... some 350 samples a second on two cores
    python evaluate.py --model FOLDER --text FILE   # bits per byte of any text; seconds
"""

import argparse
import ast
import builtins
import bz2
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import statistics
import textwrap
import time
import warnings
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fim import (SPANS, Node, control_stops, infill_prompt, load, newest_model, nodes_of, normalize,
                 python_tree, span, suffix_start, syntax_nodes)
from model import choose_attention, default_device, generate
from support.files import (InputError, cache_folder, fetch, read_rows, read_text, run, write_json,
                           write_text)
from support.sandbox import REASONS, Grade, Sandbox, assemble, grades
from tokenizer import ENDOFTEXT

ASSETS = Path(__file__).resolve().parent / "assets"
TOKENS_AT_ONCE = 16384      # in a forward pass: enough to keep a device busy

# ------------------------------------------------------------------------------------------------
# Problem files

# How EvalPlus compares; the names are those of functions with several right answers
EVALPLUS_TEST = '''
import copy
import math

SETS = ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
        "larg_nnum", "intersection_array", "find_dissimilar", "Diff"]


def floats(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and len(value) > 0
                                        and all(isinstance(item, float) for item in value))


def close(value, expected, tolerance):
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(
            close(*pair, tolerance) for pair in zip(value, expected))
    return value == expected or abs(value - expected) <= tolerance + 1e-7 * abs(expected) < math.inf


def right(value, expected, inputs, tolerance):
    if NAME == "find_zero":
        return abs(sum(c * math.pow(value, i) for i, c in enumerate(inputs[0]))) <= tolerance
    if NAME == "are_equivalent" or NAME == "sum_div" and value == 0:
        return True
    if NAME == "surface_Area":
        edge, height = inputs
        other = round(edge ** 2 + 2 * edge * math.sqrt(edge ** 2 / 4 + height ** 2))
        return value == expected or abs(value - other) <= tolerance
    if NAME == "digit_distance_nums":
        first, second = (str(number).zfill(40) for number in inputs)
        other = sum(abs(int(a) - int(b)) for a, b in zip(first, second))
        return value in (expected, other)
    if NAME in SETS:
        return set(value) == set(expected)
    if NAME in ("check_str", "text_match_three", "text_starta_endb"):
        found = value if isinstance(value, bool) else value is not None
        return found == (expected is not None)
    if tolerance == 0 and floats(expected):
        tolerance = 1e-6
    if value == expected or tolerance == 0:
        return value == expected
    return type(value) == type(expected) and close(value, expected, tolerance)


def check(candidate):
    for inputs in DATA:
        expected = REFERENCE(*copy.deepcopy(inputs))
        value = candidate(*copy.deepcopy(inputs))
        assert right(value, expected, inputs, TOLERANCE), f"{NAME}{tuple(inputs)}"[:200]
'''


def deep_tuple(value):
    return tuple(map(deep_tuple, value)) if isinstance(value, list) else value


# The arguments of MBPP+ that JSON could not hold, by the number of the task
MBPP_ARGUMENTS = [
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     lambda *args: [tuple(item) for item in args]),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
     lambda *args: [[tuple(item) for item in part] for part in args]),
    ("75 413 444 753", lambda first, *rest: [[tuple(item) for item in first], *rest]),
    ("250 307 405 446 617 720 763 808", lambda first, *rest: [tuple(first), *rest]),
    ("106 750", lambda first, second: [first, tuple(second)]),
    ("278", lambda first: [tuple(tuple(item) if isinstance(item, list) else item
                                 for item in first)]),
    ("259 401 445 580 615 791", lambda *args: list(map(deep_tuple, args))),
    ("115", lambda first: [[set(item) if isinstance(item, list) and item else {}
                            for item in first]]),
    ("124", lambda first, second: [float(first), complex(second)]),
    ("252", lambda first: [complex(first)]),
    ("722", lambda first, *rest: [{key: tuple(value) for key, value in first.items()}, *rest])]


def mbpp_arguments(task, inputs):
    """The arguments of the calls of a task of MBPP+ as its solution expects them."""
    convert = next((convert for tasks, convert in MBPP_ARGUMENTS if task in tasks.split()),
                   lambda *args: list(args))
    return [convert(*args) for args in inputs]


def called_name(code, test):
    """The function of a program that a test calls first."""
    with warnings.catch_warnings(action="ignore"):          # old programs have odd escapes
        code, test = ast.parse(code), ast.parse(test)
    defined = {node.name for node in ast.walk(code)
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return next(node.func.id for node in ast.walk(test) if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name) and node.func.id in defined)


def evalplus_problem(row, name):
    """HumanEval+ and MBPP+: our solution is compared with the problem's own on many inputs."""
    inputs = row["base_input"] + (list(row["plus_input"]) if name.endswith("+") else [])
    if row["task_id"].startswith("Mbpp"):
        inputs = mbpp_arguments(row["task_id"].split("/")[-1], inputs)
    settings = f"NAME, TOLERANCE = {row['entry_point']!r}, {row['atol']!r}\n"
    return {**{key: row[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
            "inputs": inputs, "test": settings + EVALPLUS_TEST}


def mbpp_problem(row):
    tests = textwrap.indent("\n".join(row["test_list"]), "    ")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    text = row.get("text") or row["prompt"]
    return {"task_id": f"MBPP/{row['task_id']}", "canonical_solution": row["code"] + "\n",
            "prompt": f'"""\n{text}\n{row["test_list"][0]}\n"""\n',
            "entry_point": called_name(row["code"], "\n".join(row["test_list"])),
            "test": f"{setup}\ndef check(candidate):\n{tests}\n"}


def cruxeval_problem(row, name):
    """The arguments or the value of a call of f; f itself is the test's."""
    problem = {**row, "task_id": row["id"], "entry_point": "answer"}
    code, answer = f"{row['code']}\n\n\n", "def answer():\n    return "
    if name.startswith("cruxeval-input"):
        return {**problem, "canonical_solution": f"f({row['input']})",
                "prompt": f"{code}def f(*args, **kwargs):\n    return args, kwargs\n\n\n{answer}",
                "test": f"{code}def check(candidate):\n    args, kwargs = candidate()\n"
                        f"    assert f(*args, **kwargs) == {row['output']}\n"}
    return {**problem, "canonical_solution": row["output"], "prompt": answer,
            "test": f"{code}def check(candidate):\n    assert candidate() == f({row['input']})\n"}


def to_problem(row, name="", number=0):
    """One row of a benchmark file, told apart by its fields, as a problem; None: not a benchmark.

    A problem: task_id, what its prompt needs, and how it is graded: entry_point and test with
    check(candidate), for a program; line, for one line; answer, for a number. It may have
    canonical_solution, suffix (infilling), inputs (EvalPlus: name+ takes all, name the base ones)
    and group (scored apart). number: of the row.
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
# Answers that are no programs


def first_line(text):
    """The line that is scored where one line was asked for (the report's HumanEval-FIM script)."""
    lines = text.split("\n")
    return lines[1 if text.startswith(("\n", " \n")) else 0].strip()


# Between the digits of 9,500 stands a comma or a space, as text or as TeX; in India also 1,00,000
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,:;! ]|[,~\u00a0\u2009\u202f]|(?<!\d{4}) )"
                       r"(?=(?:\d\d,)*\d{3}(?!\d))")
FRACTION = re.compile(r"(-?)\\[dt]?frac *\{?(-?\d+)\}? *\{?(\d+)\}?")               # of TeX
# -7, 12.5, .5, 3/4 and 1 3/4
NUMBER = (r"(?:(?<![\w)}])-)?(?:\d+ +(?=\d+/\d))?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
          r"(?:/(?:\d*\.)?\d+)?")
# Of "18 - 3 = 15" the result is the answer: what stands before the "=" has no words
SUM = re.compile(rf"(?:{NUMBER}(?:[^A-Za-z=}}\n.]|\.\d)*=[^A-Za-z=}}\n\d.-]*)*({NUMBER})")


def to_number(text):
    """The value of a text that matches NUMBER."""
    whole, _, fraction = text.lstrip("-").rpartition(" ")
    numerator, _, denominator = fraction.partition("/")
    value = float(whole or 0) + float(numerator) / (float(denominator or 1) or math.nan)
    return -value if text.startswith("-") else value


def final_number(text):
    r"""The number after the last \boxed or "answer is", else the last one; None without any."""
    text = THOUSANDS.sub("", text.split("\nQuestion:")[0].replace("\u2212", "-"))
    text = FRACTION.sub(r" \1\2/\3", text)
    text = re.sub(r"\\?\$|\\(?:times|cdot|div)\b", "", text)     # "-$5" is -5
    for mark in ("\\boxed", "answer is"):
        announced = SUM.search(text.rpartition(mark)[2]) if mark in text else None
        if announced:
            return to_number(announced[1])
    numbers = re.findall(NUMBER, text)
    return to_number(numbers[-1]) if numbers else None


def compare(problem, completion):
    """Grade an answer that is no program: a line or a number."""
    right = (first_line(completion) == problem["line"].strip() if "line" in problem
             else final_number(completion) == problem["answer"])
    return Grade(right, "passed" if right else "wrong answer")


# ------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n, c, k):
    """The chance that one of k of n samples passes when c do, unbiased (arXiv 2107.03374, 2.1).
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right")
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def bootstrap(values, rounds=1000):
    """The 95 % interval of the mean, over problems drawn again with replacement."""
    draw, n = random.Random(0), len(values)
    means = sorted(sum(draw.choices(values, k=n)) / n for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]


def edit_similarity(text, target):
    """100 x 2 M / T: M characters in the longest common subsequence, T in both (InDel ratio)."""
    if not text and not target:
        return 100.0
    row = [0] * (len(target) + 1)
    for a in text:
        last, row = row, [0]
        for j, b in enumerate(target):
            row.append(last[j] + 1 if a == b else max(last[j + 1], row[j]))
    return 200.0 * row[-1] / (len(text) + len(target))


def compressed_bits_per_byte(texts):
    """name -> bits per byte of the concatenated texts under gzip, bz2 and xz at their best."""
    data = "".join(texts).encode()
    sizes = {"gzip": len(gzip.compress(data, 9)), "bz2": len(bz2.compress(data, 9)),
             "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def heldout_rows(model, tokenizer, documents, T):
    """Batches of (input_ids, targets): each document after one <|endoftext|>, in rows of T."""
    end, rows, B = tokenizer.special[ENDOFTEXT], [], max(1, TOKENS_AT_ONCE // T)
    for ids in tokenizer.encode_batch([document["text"] for document in documents]):
        ids = [end, *ids, end]
        rows += [ids[start:start + T + 1] for start in range(0, len(ids) - 1, T)]
    rows.sort(key=len)                                      # short ones share a batch
    for batch in (rows[start:start + B] for start in range(0, len(rows), B)):
        longest, device = max(map(len, batch)), model.head.device
        yield (torch.tensor([row[:-1] + [end] * (longest - len(row)) for row in batch],
                            device=device),
               torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in batch],
                            device=device))


def bits_per_byte(model, tokenizer, documents):
    """Bits over all tokens of all documents, their <|endoftext|> included, per UTF-8 byte.

    Each document is preceded by one <|endoftext|> and cut into rows of T tokens, T being the
    context the model was trained on: no token sees beyond its row.
    """
    with torch.no_grad():
        nats = sum(float(model(input_ids, targets=targets)) for input_ids, targets in heldout_rows(
            model, tokenizer, documents, model.config.max_position_embeddings))
    return nats / math.log(2) / sum(len(document["text"].encode()) for document in documents)


def bits_by_position(model, tokenizer, documents, T, parts):
    """Bits per byte of the tokens in each of so many equal parts of rows of T tokens."""
    size = torch.tensor(tokenizer.byte_lengths(), device=model.head.device)
    nats, length = torch.zeros(parts), torch.zeros(parts)
    with torch.no_grad():
        for input_ids, targets in heldout_rows(model, tokenizer, documents, T):
            costs = -model(input_ids, targets=targets, reduce="none")               # (B, T)
            sizes = torch.where(targets == -100, 0, size[targets.clamp(min=0)])     # (B, T)
            part = torch.arange(targets.shape[1]) * parts // T                      # (T,)
            nats.index_add_(0, part, costs.sum(0).float().cpu())
            length.index_add_(0, part, sizes.sum(0).float().cpu())
    return (nats / math.log(2) / length).tolist()


def batches_of(rows, more=0, copies=1):
    """The numbers of rows of ids in batches: those of like length share one. more: ids to come;
    copies: how often each row is in its batch."""
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        size = copies * (len(rows[i]) + more)
        if not batches or (len(batches[-1]) + 1) * size > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(i)
    return batches


def answer_bits(model, prompts, answers):
    """The bits that each answer costs after its prompt; all are lists of ids."""
    rows, nats = [prompt + answer for prompt, answer in zip(prompts, answers)], {}
    with torch.no_grad():
        for batch in batches_of(rows):
            longest = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in batch],
                               device=model.head.device)                            # (B, T + 1)
            targets = torch.full_like(ids[:, 1:], -100)                             # (B, T)
            for row, i in enumerate(batch):
                inside = slice(len(prompts[i]) - 1, len(rows[i]) - 1)
                targets[row, inside] = ids[row, 1:][inside]
            known = model(ids[:, :-1], targets=targets, reduce="none")              # (B, T)
            nats.update(zip(batch, known.sum(1).tolist()))
    return [-nats[i] / math.log(2) for i in range(len(rows))]


def read_documents(path):
    """The documents of a JSON-lines file with a text field, or one document: the file's text."""
    path, documents = Path(path), []
    if path.suffix != ".jsonl":
        return [{"text": normalize(read_text(path)), "path": path.name}]
    for number, row in read_rows(path):
        try:
            text = normalize(row["text"])
            text.encode()                       # no half surrogate pairs
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise InputError(f'{path}, line {number}: expected {{"text": "..."}}') from None
        documents.append({**row, "text": text})
    return documents


# ------------------------------------------------------------------------------------------------
# Asking a model


@functools.cache
def benchmarks():
    """assets/benchmarks.json: files, addresses and hashes, prompts with their stops, and what the
    report gives, in per cent, for each of the published sizes."""
    return json.loads((ASSETS / "benchmarks.json").read_text(encoding="utf-8"))


def benchmark_file(benchmark):
    """Where the problems of an entry of benchmarks() lie: the ladder with us, others in a cache."""
    ours = benchmark["file"] == "ladder.jsonl"
    return (ASSETS if ours else cache_folder() / "benchmarks") / benchmark["file"]


# What a problem holds of these is text
TEXT_FIELDS = ("prompt", "suffix", "test", "entry_point", "code", "input", "output", "question")


def find_problems(name, file=None, limit=None):
    """task_id -> problem, of a file, the cache or the official place; limit: only the first."""
    benchmark = benchmarks()["benchmarks"][name]
    if file is None:
        file = benchmark_file(benchmark)
        try:
            if not file.exists() and not benchmark["url"]:
                raise InputError("there is no address to fetch it from")
            fetch(benchmark["url"], file)
        except InputError as error:
            raise InputError(f"{name}: put {benchmark['file']} to {file} or give --problems "
                             f"({error})") from None
        data = file.read_bytes()
        with contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):       # the hash will tell
            data = gzip.decompress(data) if file.suffix == ".gz" else data
        if benchmark["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
            raise InputError(f"{file}: not the published file (its SHA-256 differs); delete it")
    problems = {}
    for number, row in read_rows(file):
        try:
            problem = to_problem(row, name, number)
            texts = [problem.get(field, "") for field in TEXT_FIELDS]
            texts.append(problem.get("canonical_solution") or "")           # it may be null
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            problems[problem["task_id"]] = problem
            if name.endswith("+") and "inputs" not in problem:
                raise InputError(f"{name} needs EvalPlus's file; these are the plain problems")
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except Exception:                                       # whatever such a row provokes
            raise InputError(f"{file}, line {number}: no problem of HumanEval, MBPP, EvalPlus, "
                             "infilling, CRUXEval or GSM8K") from None
    if not problems:
        raise InputError(f"{file}: holds no problem")
    if len({"test" in problem for problem in problems.values()}) > 1:
        raise InputError(f"{file}: holds programs and questions; give a file of one kind")
    return dict(itertools.islice(problems.items(), limit))


def complete(model, tokenizer, prompts, max_new_tokens, stops=(), stop_ids=(), kept=None, samples=1,
             **sampling):
    """Continue prompts (lists of ids) -> (text, whether it stopped by itself) of each sample: the
    samples of the first prompt, then those of the second, ...

    Of a prompt too long for the context the end is kept. kept: a file of finished batches; what it
    holds of the same question is not generated again.
    """
    T = model.config.context_length
    max_new_tokens = min(max_new_tokens, T // 2)
    prompts = [prompt[-(T - max_new_tokens):] for prompt in prompts]
    finished = read_finished(kept)
    weights = float(model.head.detach().float().abs().mean())   # other weights, another text

    def stop(ids):
        tail = tokenizer.decode(ids[-16:])
        return any(text in tail for text in stops)

    results = [None] * (len(prompts) * samples)
    batches = batches_of(prompts, max_new_tokens, samples)
    for number, indices in enumerate(tqdm(batches, desc="batches", disable=None)):
        batch = [prompts[i] for i in indices]
        # generate() adds the number of each sample, and torch reads 32 bits of a seed: spread them
        seed = sampling.get("seed", 0) * 0x9E3779B1 + number * TOKENS_AT_ONCE
        settings = {**sampling, "seed": seed, "samples": samples}
        key = json.dumps([weights, batch, max_new_tokens, stops, settings])
        key = hashlib.sha256(key.encode()).hexdigest()
        if key not in finished:
            new_ids = generate(model, batch, max_new_tokens, stop=stop, stop_ids=stop_ids,
                               vocab_size=tokenizer.vocab_size, **settings)
            finished[key] = [cut_at_stop(tokenizer.decode(ids), stops, len(ids) < max_new_tokens)
                             for ids in new_ids]
            if kept:
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps([key, finished[key]]) + "\n")
        for position, result in enumerate(finished[key]):
            prompt, sample = divmod(position, samples)
            results[indices[prompt] * samples + sample] = tuple(result)
    return results


def cut_at_stop(text, stops, stopped):
    """A text up to the first stop string in it, and whether it stopped by itself."""
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    return text[:cut], stopped or cut < len(text)


def read_finished(path):
    """The batches in a file of complete(); a last line that was cut off is removed."""
    if not path or not path.exists():
        return {}
    try:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        return dict(map(json.loads, whole.splitlines()))
    except (ValueError, TypeError):                             # damaged: generated again
        path.unlink()
        return {}


# A line that opens or closes a code block: margin (in a list or a quotation), marks, language etc.
FENCE = re.compile(r"((?:[ \t>]|[-*+][ \t]|\d+[.)][ \t])*)(`{3,}|~{3,})[ \t]*([^`\n]*)\n?")
PYTHON = re.compile(r"(?:i?python|py)[\d.]*|.*\.pyw?", re.IGNORECASE)       # solution.py, too
Block = namedtuple("Block", "language code closed")


def fenced_blocks(text):
    """The code blocks of a Markdown text, in order.

    As in CommonMark, a block ends at a fence of the same character, at least as long, with nothing
    after it. But if what precedes a later fence is Python as a whole, the block ends there: the
    other fences stand in a docstring. So does Python before a fence that names a language.
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(r"^([^`\n]*[^`\s])(`{3,}[ \t]*)$", r"\1\n\2", text, flags=re.M)   # return x```
    lines = re.findall(r".*\n|.+", text)
    fences = [FENCE.fullmatch(line) for line in lines]

    def code_of(margin, start, end):
        margin = rf"^[ \t>]{{0,{len(margin)}}}"
        return "".join(re.sub(margin, "", line) for line in lines[start:end])

    blocks, start = [], 0
    while start < len(lines):
        fence = fences[start]
        start += 1
        if not fence:
            continue
        margin, marks, info = fence.groups()
        language = re.search(r"[\w+#/-][\w.+#/-]*|$", info)[0]
        if language.lower() in ("markdown", "md"):          # around the whole answer: look inside
            continue
        ends = [i for i in range(start, len(lines)) if fences[i] and fences[i][2].startswith(marks)]
        plain = [i for i in ends if not fences[i][3].strip()]
        tries = [*ends[:20], len(lines)]                    # no program has more in its docstrings
        whole = (i for i in tries if python_tree(code_of(margin, start, i)))
        end = next(whole, plain[0] if plain else len(lines))
        blocks.append(Block(language, code_of(margin, start, end), end < len(lines)))
        start = end + (end in plain)
    return [block for block in blocks if block.code.strip()]


def is_python(block):
    """Whether a block is labelled as Python or, without a label, has Python that does something:
    a mere value may be the output of a program."""
    if block.language:
        return bool(PYTHON.fullmatch(block.language))
    statements = [node for node in nodes_of(block.code) if isinstance(node, (ast.stmt, ast.Call))]
    return any(not isinstance(node, ast.Expr) for node in statements)


def names_of(code):
    """The names that a Python text binds, and those that it reads; none if it does not parse."""
    bound, read = set(), set()
    for node in nodes_of(code):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return bound, read


def code_block(text, entry_point=None):
    """The program in a chat answer: the last code block that defines the entry point.

    Without an entry point: any function or class. A closed block goes before one that was cut off,
    Python before another language. Earlier blocks that hold what it lacks, such as imports, are
    put before it. The answer may begin inside a block, or have none: then it is all of the text.
    """
    definition = r"^(?:async def|def|class) \w"
    if entry_point:
        name = re.escape(entry_point)
        definition = rf"^(?:(?:async def|def|class) {name}\b|{name} *(?::.*)?=[^=])"

    def rank(block):
        defines = bool(re.search(definition, block.code, re.MULTILINE))
        runs = defines and bool(python_tree(block.code))
        return runs and block.closed, runs, defines, is_python(block), block.closed

    if python_tree(text) and re.search(definition, text, re.MULTILINE):     # no Markdown at all
        return text
    blocks, begun = fenced_blocks(text), fenced_blocks("```\n" + text)  # did the prompt open one?
    starts_as_python = bool(begun) and bool(names_of(begun[0].code)[0])
    readings = [begun, blocks] if starts_as_python else [blocks, begun]     # of equals the first
    blocks = max(readings, key=lambda blocks: max(map(rank, blocks), default=()))
    if not blocks:
        return text
    best = max(reversed(range(len(blocks))), key=lambda i: rank(blocks[i]))     # of equals the last
    program = blocks[best].code
    for block in reversed(blocks[:best]):
        bound, read = names_of(program)
        if names_of(block.code)[0] & (read - bound - set(dir(builtins))):
            program = block.code.rstrip("\n") + "\n\n\n" + program
    return program


def extract(name, text, entry_point=None):
    """The answer in what a model said to a prompt; assets/benchmarks.json has it in words."""
    if name == "code chat":
        return code_block(text, entry_point)
    if name in ("code", "short code", "mbpp"):
        return text.replace("\t", "    ")
    if name.startswith("cruxeval"):                         # ... [ANSWER] assert f(16) == 17
        text = text.split("[ANSWER]")[1 if "[ANSWER]" in text else 0]
        call, value = (text.split("==") + [text])[:2]
        if "output" in name:
            return value.strip()
        return "f" + call.split("assert f")[1].strip() if "assert f" in call else call.strip()
    return text


def prompt_ids(model, tokenizer, way, problem):
    """A prompt of assets/benchmarks.json, filled with a problem's fields, as ids; of a gap no more
    than there is room for."""
    if way["prompt"][0].startswith("<|fim_prefix|>"):           # each part encoded by itself
        T = model.config.context_length
        return infill_prompt(tokenizer, problem["prompt"], problem["suffix"],
                             T - min(way["max_new_tokens"], T // 2))
    fields = {**problem, "prompt": problem.get("prompt", "").strip()}
    text = re.sub(r"\{(prompt|code|input|output|question)\}", lambda field: fields[field[1]],
                  "\n".join(way["prompt"]))
    return tokenizer.encode(text, allow_special=True)


def model_samples(model, tokenizer, name, problems, n=1, kept=None, **sampling):
    """n completions of each problem by a model -> rows of a samples file. name: of the prompt."""
    way, ends = benchmarks()["prompts"][name], control_stops(tokenizer)
    field = "solution" if name == "code chat" else "completion"     # the whole program or its rest
    T = model.config.context_length
    new = min(way["max_new_tokens"], T // 2)
    print(f"prompt of {name!r} ({way['source']}):\n"
          + "\n".join("  | " + line for line in way["prompt"])
          + f"\nstops: {way['stops']}, {len(ends)} control tokens; at most "
          f"{new} new tokens; answer: {way['answer']}")
    prompts = [prompt_ids(model, tokenizer, way, problem) for problem in problems.values()]
    room = T - new - way["prompt"][0].startswith("<|fim_prefix|>")      # a gap's are cut already
    if cut := sum(len(ids) > room for ids in prompts):
        print(f"{cut} of {len(prompts)} prompts are cut to fit: the context has {T} tokens")
    texts = complete(model, tokenizer, prompts, way["max_new_tokens"], way["stops"], ends, kept,
                     samples=n, **sampling)
    ids = [task_id for task_id in problems for _ in range(n)]
    return [{"task_id": task_id, "stopped": stopped,
             field: extract(name, text, problems[task_id].get("entry_point"))}
            for task_id, (text, stopped) in zip(ids, texts)]


def read_samples(path, problems):
    """The samples of a file whose task is among the problems; InputError names the line."""
    samples = []
    for number, row in read_rows(path):
        task = row.get("task_id")
        if not isinstance(task, str) or task not in problems:
            raise InputError(f"{path}, line {number}: no task {task!r} in this benchmark")
        program = "test" in problems[task]
        text = row.get("solution" if program and "solution" in row else "completion")
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: expected a completion"
                             + " or a solution" * program)
        samples.append(row)
    if not samples:
        raise InputError(f"{path}: holds no sample")
    if repeated := len(samples) - len(set(map(json.dumps, samples))):
        print(f"{path}: {repeated} lines repeat another; all are graded")
    present = {sample["task_id"] for sample in samples}
    if missing := [task_id for task_id in problems if task_id not in present]:
        print(f"{len(missing)} of {len(problems)} tasks have no sample, {missing[0]!r} the first: "
              "the score is of the others")
    return samples


def problems_hash(problems):
    """The same in each process, although MBPP+ holds sets."""
    text = json.dumps(problems, default=lambda value: (
        sorted(map(repr, value)) if isinstance(value, set) else repr(value)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_graded(row):
    return (isinstance(row.get("passed"), bool) and isinstance(row.get("weak"), bool)
            and isinstance(row.get("reason"), str))


def grade_samples(name, samples, problems, results, args):
    """Grade samples of a benchmark -> rows with their grades; each is written as it comes.

    With --resume, what the results file already says of the same samples is not graded again.
    """
    slow = any("inputs" in problem for problem in problems.values())
    done, settings = [], {"benchmark": name, "timeout": args.timeout or (20.0 if slow else 3.0),
                          "problems": problems_hash(problems)}
    if args.resume and results.exists():
        with contextlib.suppress(ValueError, TypeError):    # cut off or damaged: graded again
            for line, sample in zip(results.read_text(encoding="utf-8").split("\n"), samples):
                row = json.loads(line)
                if {**row, **sample, **settings} != row or not is_graded(row):
                    break
                done.append(row)
    todo, problem = samples[len(done):], next(iter(problems.values()))
    if "test" in problem:
        pairs = [(problems[s["task_id"]], s["solution"] if "solution" in s else
                  assemble(problems[s["task_id"]], s["completion"])) for s in todo]
        found = grades(pairs, args.workers, settings["timeout"], args.weak_sandbox)
    else:
        found = (compare(problems[s["task_id"]], s["completion"]) for s in todo)
    with open(results, "w", encoding="utf-8") as file:
        for row in done:
            file.write(json.dumps(row) + "\n")
        for sample, result in zip(todo, tqdm(found, total=len(todo), desc="graded",
                                             disable=None)):
            done.append({**sample, **settings, **result._asdict()})
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return done


def reason_kind(row):
    """Why a graded sample failed: one of REASONS or, as a results file may hold anything, "other".
    "passed" if it did not fail."""
    if row["passed"]:
        return "passed"
    kind = row["reason"].split(":")[0]
    return kind if kind in REASONS else "other"


def printable(text):
    """A text from a file, with "?" for what a terminal would obey or cannot show."""
    return "".join(char if char.isprintable() else "?" for char in text)


def print_scores(name, rows, problems):
    """Print pass@k with its interval and why the others failed -> scores."""
    counts, groups = {}, {}
    for row in rows:
        counts.setdefault(row["task_id"], []).append(row["passed"])
        if group := problems[row["task_id"]].get("group"):
            groups.setdefault(printable(group), []).append(row["passed"])
    smallest = min(map(len, counts.values()))
    scores = {"samples": len(rows), "problems": len(counts)}
    lines = "line" in next(iter(problems.values()))
    for k in (k for k in (1, 10, 100) if k <= smallest):
        values = [pass_at_k(len(passed), sum(passed), k) for passed in counts.values()]
        word = "exact match" if lines and k == 1 else f"pass@{k}"
        low, high = bootstrap(values)
        scores[word] = sum(values) / len(values)
        print(f"{name} {word}: {scores[word]:.4f} (95 % between {low:.3f} and {high:.3f}, "
              f"{len(values)} problems)")
    if lines:
        scores["edit similarity"] = sum(
            edit_similarity(first_line(row["completion"]), problems[row["task_id"]]["line"].strip())
            for row in rows) / len(rows)
        print(f"  edit similarity {scores['edit similarity']:.1f}")
    scores["reasons"] = dict(Counter(map(reason_kind, rows)).most_common())
    scores["weak"] = sum(row["weak"] for row in rows)
    print("  " + ", ".join(f"{count} {reason}" for reason, count in scores["reasons"].items())
          + (f"; {scores['weak']} graded in one process with their test" * bool(scores["weak"])))
    if all(isinstance(row.get("stopped"), bool) for row in rows):
        scores["stopped"] = sum(row["stopped"] for row in rows) / len(rows)
        print(f"  {scores['stopped']:.0%} stopped by themselves")
    scores.update({group: sum(passed) / len(passed) for group, passed in sorted(groups.items())})
    if groups:
        print("  " + ", ".join(f"{group} {scores[group]:.1%}" for group in sorted(groups)))
    return scores


def measure_bits(model, tokenizer, documents, folder):
    """Print bits per byte of documents, beside what compressors need."""
    texts = [document["text"] for document in documents]
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes, rows of "
          f"{model.config.max_position_embeddings} tokens; bits per byte:")
    results = compressed_bits_per_byte(texts)
    results[str(folder)] = bits_per_byte(model, tokenizer, documents)
    for name, bits in results.items():
        print(f"  {name:24} {bits:.3f}")
    return results


# ------------------------------------------------------------------------------------------------
# Infilling: gaps of every kind in held-out code

LONGEST_MIDDLE, WINDOW = 160, 600       # characters of a middle, and around it; not published; ours


def held_out_gaps(documents, count=200):
    """`count` gaps of each kind of cut in held-out documents, always the same -> dicts of kind,
    prefix, middle, suffix and whether it is Python."""
    python = [document.get("language") == "python" or str(document.get("path")).endswith(".py")
              for document in documents]
    trees = [syntax_nodes(d["text"]) if own else [] for d, own in zip(documents, python)]
    sizes, gaps = np.array([len(d["text"]) for d in documents], float), []
    for kind in SPANS:
        rng, found = np.random.default_rng([0, *kind.encode()]), []
        for _ in range(100 * count):                    # what is empty or long is drawn anew
            if len(found) == count:
                break
            i = rng.choice(len(documents), p=sizes / sizes.sum())
            text, at = documents[i]["text"], int(rng.integers(sizes[i]))
            start = text.rfind("\n", 0, at) + 1
            stop = len(text) if (end := text.find("\n", start + WINDOW)) < 0 else end
            nodes = [Node(node.kind, node.start - start, node.end - start) for node in trees[i]
                     if start <= node.start and node.end <= stop]
            if kind == "syntax" and not nodes:
                continue
            low, high = (start + place for place in span(text[start:stop], kind, rng, nodes))
            if text[low:high].strip() and high - low <= LONGEST_MIDDLE:
                found.append({"kind": kind, "prefix": text[:low], "middle": text[low:high],
                              "suffix": text[high:], "python": python[i]})
        gaps += found
    if not gaps:
        raise InputError("the held-out documents have nothing to fill in")
    return gaps


def mark_insertion(gap, text, stopped, inserted, middle):
    """What one insertion is worth. inserted, middle: how many tokens it and the true one have."""
    start = suffix_start(gap["suffix"])
    return {"exact, %": 100 * (text == gap["middle"]),
            "similar": edit_similarity(text.strip(), gap["middle"].strip()),
            "parses, %": (100 * bool(python_tree(gap["prefix"] + text + gap["suffix"]))
                          if gap["python"] else None),
            "stops, %": 100 * (stopped and inserted < 2 * (middle + 1) + 16),
            "runs on, %": 100 * (bool(start) and start in text), "length": inserted / middle}


def measure_infilling(model, tokenizer, gaps, path=None):
    """Print how well a model fills gaps, greedily, without the guard -> kind -> measure -> value.

    exact, %: to the letter; similar: mean edit similarity; parses, %: the whole Python file with
    the insertion; stops, %: by itself, within twice the tokens of the true middle and 16; runs on,
    %: into what stands after the gap; length: median of the insertion's over the middle's; bits
    per byte of the true middle with its end. path: of a picture of three insertions.
    """
    T, end = model.config.context_length, tokenizer.special["<|endoftext|>"]
    middles = [tokenizer.encode(gap["middle"])[:T // 2 - 1] + [end] for gap in gaps]
    new = min(2 * max(map(len, middles)) + 16, T // 2)
    prompts = [infill_prompt(tokenizer, gap["prefix"][-4 * T:], gap["suffix"][:4 * T], T - new)
               for gap in gaps]
    began = time.monotonic()
    texts = complete(model, tokenizer, prompts, new, stop_ids=control_stops(tokenizer))
    seconds = time.monotonic() - began
    bits, tokens, groups = answer_bits(model, prompts, middles), 0, {}
    for gap, middle, cost, (text, stopped) in zip(gaps, middles, bits, texts):
        inserted = len(tokenizer.encode(text))
        tokens += inserted
        groups.setdefault(gap["kind"], []).append({
            **mark_insertion(gap, text, stopped, inserted, len(middle) - 1),
            "bits": cost, "bytes": len(gap["middle"].encode())})
    scores = {}
    for kind, rows in groups.items():
        values = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
        density = sum(values.pop("bits")) / sum(values.pop("bytes"))
        score = {name: sum(own) / len(own) for name, own in values.items() if own}
        score |= {"length": statistics.median(values["length"]), "bits per byte": density}
        scores[kind] = {name: round(value, 4) for name, value in score.items()}
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    print(f"infilling of held-out code, {len(gaps)} gaps, {tokens / seconds:,.0f} tokens/s\n"
          f"  {'':12}" + "".join(f"{name:>14}" for name in names))
    for kind, score in scores.items():
        print(f"  {kind:12}" + "".join(f"{score[name]:14.2f}" if name in score else f"{'-':>14}"
                                       for name in names))
    if path:
        draw_insertions([(gap, text) for gap, (text, _) in zip(gaps, texts)], path)
    return scores


def draw_insertions(pairs, path):
    """Write a picture (PNG) of one insertion of each of three kinds: what was inserted in green,
    what stood there in grey. pairs: (gap, inserted text)."""
    from matplotlib.figure import Figure

    rows, first = [], {gap["kind"]: (gap, text) for gap, text in reversed(pairs)}
    for kind, (gap, text) in list(first.items())[:3]:
        parts = [(f"{kind}\n", "tab:blue"), ("\n".join(gap["prefix"].split("\n")[-5:]), "black"),
                 ("\n".join(text.split("\n")[:8]) or "(nothing inserted)", "tab:green"),
                 ("\n".join(gap["suffix"].split("\n")[:4]) + "\n", "black"),
                 ("stood there: " + gap["middle"] + "\n\n", "tab:gray")]
        rows.append([])
        for part, colour in parts:                      # each line a row of coloured pieces
            for i, piece in enumerate(part.split("\n")):
                rows += [[]] * (i > 0)
                rows[-1].append((piece, colour))
    figure = Figure(figsize=(9, 0.19 * len(rows)))
    for line, pieces in enumerate(rows):
        column = 1
        for piece, colour in pieces:                    # 9 points of a monospaced font: 0.0753 inch
            piece = piece if column + len(piece) < 119 else piece[:118 - column] + "…"
            figure.text(column * 0.0753 / 9, 1 - (line + 1) / (len(rows) + 1), piece, color=colour,
                        family="monospace", fontsize=9, va="center", parse_math=False)
            column += len(piece)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# Needle in the code: is a function, seen once far above, written again (report, figure 6)?

# Their product is the number of names; what a needle looks like is not published; ours
NEEDLE_WORDS = ("amber brisk copper dusty early fuzzy gentle hollow ivory jolly".split(),
                "anchor basket candle dragon engine falcon garden hammer island jacket".split(),
                "size weight price depth width score limit speed level rank".split())
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plant(tokenizer, hay, length, depth, draw):
    """Hide a function in code -> (context with it, context without it, its body), as ids.

    Both contexts end with the function's head, so that the body is due. Context and body have
    `length` ids together; depth, from 0 to 1, says where the function stands.
    """
    first, second, argument = (draw.choice(words) for words in NEEDLE_WORDS)
    a, b, c = (draw.randrange(11, 990) for _ in range(3))
    head = f"\ndef {first}_{second}({argument}):\n"
    body = f"    {argument} = {argument} * {a} + {b}\n    return {argument} % {c}\n"
    function, question, answer = map(tokenizer.encode, (head + body, head, body))
    room = length - len(question) - len(answer)
    if room < len(function):
        raise InputError(f"needle: {length} tokens of context cannot hold a function of "
                         f"{len(function)} and be asked for it")
    start = draw.randrange(max(1, len(hay) - room))
    hay = hay[start:start + room]
    cut = int(depth * (len(hay) - len(function)))
    planted = hay[:cut] + function + hay[cut:len(hay) - len(function)]
    return planted + question, hay + question, answer


def needle_map(model, tokenizer, documents, path, count=8):
    """Draw how well planted functions are written again, by depth and length -> scores.

    Two measures: the share of functions that greedy writing repeats to the letter and, as small
    models repeat none, the bits per byte that seeing the function saves on its body.
    """
    T, draw = model.config.context_length, random.Random(0)
    longest = T - 16                                    # bodies differ by some tokens
    shortest = min(longest, max(T // 8, 160))           # twice the function and some code
    lengths = [shortest + (longest - shortest) * i // 4 for i in range(5)]
    hay = []
    for document in documents:
        hay += tokenizer.encode(document["text"] + "\n") if len(hay) < 10 * T else []
    if len(hay) < T:
        raise InputError(f"{len(hay)} tokens of code for a context of {T}: give more with --text")

    planted, plain, answers = zip(*(
        plant(tokenizer, hay, length, depth, draw)
        for depth, length, _ in itertools.product(DEPTHS, lengths, range(count))))
    bodies = [tokenizer.decode(answer) for answer in answers]
    saved = [(before - after) / len(body.encode()) for before, after, body in zip(
        answer_bits(model, plain, answers), answer_bits(model, planted, answers), bodies)]
    texts = complete(model, tokenizer, planted, max(map(len, answers)) + 1, (),
                     control_stops(tokenizer))
    repeated = [100.0 * text.startswith(body) for (text, _), body in zip(texts, bodies)]
    maps = {}
    for name, values in (("repeated, %", repeated), ("bits saved per byte", saved)):
        cells = [sum(values[i:i + count]) / count for i in range(0, len(values), count)]
        maps[name] = [cells[i:i + len(lengths)] for i in range(0, len(cells), len(lengths))]
        print(f"{name} (rows: depth of the function, columns: tokens of context)\n        "
              + "".join(f"{length:8}" for length in lengths))
        for depth, row in zip(DEPTHS, maps[name]):
            print(f"  {depth:6.0%}" + "".join(f"{value:8.2f}" for value in row))
    draw_map(maps, lengths, path)
    return {"repeated": sum(repeated) / len(repeated), "bits saved per byte": sum(saved)
            / len(saved), "lengths": lengths, "depths": DEPTHS, "maps": maps}


def draw_map(maps, lengths, path):
    """Write a heat map (PNG): repeated functions, or the bits saved where none is repeated."""
    from matplotlib.figure import Figure

    name = next((name for name, rows in maps.items() if any(map(any, rows))), [*maps][-1])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    most = 100 if "%" in name else max(0, *map(max, maps[name]))
    image = axes.imshow(maps[name], cmap="YlGn", aspect="auto", vmin=0, vmax=most)
    for row, values in enumerate(maps[name]):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center",
                      color="white" if value > 0.7 * most else "black")
    axes.set(title=f"needle in the code: {name}", xlabel="tokens of context",
             ylabel="depth of the function", xticks=range(len(lengths)), xticklabels=lengths,
             yticks=range(len(DEPTHS)), yticklabels=[f"{depth:.0%}" for depth in DEPTHS])
    figure.colorbar(image, label=name)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


# ------------------------------------------------------------------------------------------------
# The command


def save_scores(stem, scores, args):
    """Write {stem}.json and .md: what was measured, how, with which versions."""
    settings = {key: printable(str(value)) for key, value in vars(args).items()}
    write_json(Path(f"{stem}.json"), {
        "scores": scores, "settings": settings, "python": platform.python_version(),
        "torch": torch.__version__})
    rows = [f"| {part} | {name} | {value:.4g} |" for part, values in scores.items()
            for name, value in values.items() if isinstance(value, (int, float))]
    write_text(Path(f"{stem}.md"), "\n".join(["| benchmark | score | value |", "|---|---|---:|",
                                             *rows]) + "\n")
    print(f"written: {stem}.json and .md")


def parse_args():
    names = ["infilling", "needle", *benchmarks()["benchmarks"]]
    parser = argparse.ArgumentParser(description="Measure a model, or grade samples.")
    parser.add_argument("command", nargs="?", choices=["score"], help="grade existing --samples")
    parser.add_argument("--benchmark", choices=names, metavar="NAME", help="one of "
                        f"{', '.join(names)} (default: bits per byte and infilling of held-out "
                        "code, and the ladder)")
    parser.add_argument("--chat", action="store_true", help="ask as an instruct model is asked")
    parser.add_argument("--problems", help="the benchmark's file, .jsonl or .jsonl.gz")
    parser.add_argument("--samples", type=Path, help="for score: .jsonl with task_id and "
                        "completion (or solution: a whole program)")
    parser.add_argument("--resume", action="store_true",
                        help="keep what an interrupted run has written and graded")
    parser.add_argument("--limit", type=int, help="only the first problems")
    parser.add_argument("--n", type=int, default=1, help="samples a problem (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--timeout", type=float, help="seconds for a whole check (default: 3, or "
                        "20 where the problem's own solution runs beside, as in EvalPlus)")
    parser.add_argument("--workers", type=int, help="sandboxes at work (default: one a core)")
    parser.add_argument("--weak-sandbox", action="store_true", help="run programs where the system "
                        "cannot lock them in, under resource limits alone")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--text", nargs="+", help="bits per byte of text files or .jsonl alone; "
                        "with needle: the code that hides it")
    parser.add_argument("--out", default="out", help="root folder of the stages (default: out)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args()
    if not args.temperature >= 0 or any(count is not None and count < 1
                                        for count in (args.n, args.limit, args.workers)):
        raise InputError("--n, --limit and --workers must be at least 1, --temperature at least 0")
    if not 0 < args.top_p <= 1 or args.timeout is not None and not 0 < args.timeout < 1e6:
        raise InputError("--top-p must be above 0 and at most 1, --timeout above 0 seconds")
    if args.n > 1 and not args.temperature:
        raise InputError(f"--n {args.n}: equal samples at temperature 0; give --temperature 0.8")
    if args.problems and not args.benchmark:
        raise InputError("--problems: give the --benchmark that they belong to")
    return args


def score(args):
    """Grade the samples of a file."""
    if not args.samples or args.benchmark in (None, "infilling", "needle"):
        raise InputError("score needs --samples and the --benchmark that they answer")
    if args.limit:
        raise InputError("score: all samples of the file are graded; --limit is for a model's own")
    problems = find_problems(args.benchmark, args.problems)
    samples = read_samples(args.samples, problems)
    print_layers(problems, args)
    results = args.samples.with_name(f"{args.samples.name}_results.jsonl")
    rows = grade_samples(args.benchmark, samples, problems, results, args)
    print_scores(args.benchmark, rows, problems)
    print(f"written: {results}")


def print_layers(problems, args):
    """Print the locks on the programs, if these problems ask for programs -> their names."""
    if "test" not in next(iter(problems.values())):
        return []
    with contextlib.closing(Sandbox(args.weak_sandbox)) as box:
        print("sandbox: " + ", ".join(box.layers))
    return box.layers


def ask_and_grade(model, tokenizer, name, problems, stem, args):
    """Let a model answer the problems of a benchmark, and grade what it says -> scores.

    Samples and grades go to the file {stem}.jsonl.
    """
    benchmark = benchmarks()["benchmarks"][name]
    prompt = benchmark.get("chat prompt" if args.chat else "prompt")
    if not prompt:
        raise InputError(f"{name} has no prompt for --chat")
    layers = print_layers(problems, args)
    kept, results = Path(f"{stem}.batches.jsonl"), Path(f"{stem}.jsonl")
    if not args.resume:
        kept.unlink(missing_ok=True)
    samples = model_samples(model, tokenizer, prompt, problems, args.n, kept, seed=args.seed,
                            temperature=args.temperature, top_p=args.top_p)
    rows = grade_samples(name, samples, problems, results, args)
    kept.unlink(missing_ok=True)
    scores = {**print_scores(name, rows, problems), "layers": layers}
    sizes, parameters = benchmarks()["sizes"], sum(p.numel() for p in model.parameters())
    reported = benchmark.get("reported chat" if args.chat else "reported")
    if reported and parameters in sizes and not args.limit and not args.temperature:
        scores["published"] = reported[sizes.index(parameters)] / 100
        print(f"  the report, for {'instruct' if args.chat else 'base'} models of this size, on "
              f"{benchmark['file']}: {scores['published']:.3f}")
    return scores


def main():
    args = parse_args()
    if args.command == "score":
        return score(args)

    names = [args.benchmark] if args.benchmark else ["infilling", "ladder"][args.chat:]
    names = [] if args.text and not args.benchmark else names
    documents, folder = [], args.model or newest_model(args.out)
    if args.text or not args.benchmark or {"infilling", "needle"} & set(names):
        files = args.text or [Path(args.out) / "data" / "validation.jsonl"]
        documents = [document for file in files for document in read_documents(file)
                     if document["text"]]
        if not documents:
            raise InputError(f"{files[0]}: no text to measure")
    problems = {name: find_problems(name, args.problems, args.limit) for name in names
                if name not in ("infilling", "needle")}
    model, tokenizer = load(folder, args.device or default_device())
    T, scores = model.config.context_length, {}
    dtype = str(model.head.dtype).removeprefix("torch.")
    print(f"{folder} on {model.head.device} in {dtype} ({model.dtype_reason}); "
          + choose_attention(model, "auto", T))
    if not args.benchmark:
        scores["bits per byte"] = measure_bits(model, tokenizer, documents, folder)
    if not names:
        return
    target, chat = Path(args.out) / "evaluate", "_chat" * args.chat
    model_name = Path(os.path.abspath(folder)).name             # of "." too
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        stem = target / f"{model_name}_{name}{chat}"
        if name == "needle":
            scores[name] = needle_map(model, tokenizer, documents, f"{stem}.png")
        elif name == "infilling":
            gaps = held_out_gaps(documents, args.limit or 200)
            scores.update({f"infilling, {kind}": values for kind, values in measure_infilling(
                model, tokenizer, gaps, f"{stem}.png").items()})
        else:
            scores[name] = ask_and_grade(model, tokenizer, name, problems[name], stem, args)
    save_scores(stem if args.benchmark else target / f"{model_name}{chat}", scores, args)


if __name__ == "__main__":
    run(main)
