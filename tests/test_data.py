"""pytest tests/test_data.py"""

import itertools
import json
import random
import re
import threading
from collections import Counter

import numpy as np
import pytest
from conftest import CODE, answered, reference_data
from test_sources import gathered

import data
from data import (BANDS, ROWS, RULES, Contamination, broken_rule, documents, jaccard,
                  load_documents, near_duplicates, prepare_data, prepare_tokenizer, shingles,
                  signature, split)
from support import synthetic
from support.dependencies import dependency_order
from support.files import InputError, read_rows
from support.tasks import held_out_problems
from support.text import LANGUAGE_OF, docstrings, language_of, notebook_script, prose_and_code
from tokenizer import Tokenizer

WORDS = "some words of a file that anybody may read\n"


@pytest.mark.parametrize("path,first_line,language", [
    ("a/b.py", None, "python"), ("B.CPP", None, "c++"), ("x.R", None, "r"), ("a.txt", None, None),
    ("sub/Makefile", None, "makefile"), ("a.tar.py", None, "python"), ("Gemfile", None, "ruby"),
    ("a.h", None, "c"), ("a.pl", None, "perl"), ("a.v", None, "verilog"), ("a.m", None, "matlab"),
    ("run", b"#!/usr/bin/env python3\n", "python"), ("run", b"#!/bin/bash -e\n", "shell"),
    ("run", b"\xff", None), ("run", None, None)])
def test_languages(path, first_line, language):
    assert language_of(path, first_line) == language
    assert len(set(LANGUAGE_OF.values())) == 92


def test_notebooks_become_scripts(tmp_path):
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "two lines"]},
             {"cell_type": "code", "source": "import numpy\nprint(1)\n"},
             {"cell_type": "raw", "source": "x"}, {"cell_type": "code", "source": []}]
    text = notebook_script(json.dumps({"cells": cells}))
    assert text == "# # Title\n# two lines\n\nimport numpy\nprint(1)\n"
    (tmp_path / "a.ipynb").write_bytes(b"\xef\xbb\xbf" + json.dumps({"cells": cells}).encode())
    (tmp_path / "b.ipynb").write_text("{}")
    assert gathered(tmp_path) == ([("a.ipynb", text, "jupyter-notebook", tmp_path.name)],
                                  [("notebook broken", "b.ipynb")])


def test_prose_of_docstrings():
    text = '''"""Reads a file and
prints what it contains, line by line, for everybody who cares.

    >>> read("x")
    ['a']

Then it continues::

    for line in file:
        print(line)

and ends well."""
def short():
    """Too short to count."""
'''
    prose, code = prose_and_code(docstrings(text))
    assert prose == (
        "Reads a file and\nprints what it contains, line by line, for everybody who cares.\n"
        "\nThen it continues::\n\nand ends well.\n")
    assert code == ("    >>> read(\"x\")\n    ['a']\n"
                    "    for line in file:\n        print(line)")
    assert prose_and_code("# Title\n```py\nx = 1\n\ny\n```\nwords\n```\nz\n") == (
        "# Title\nwords\n", "x = 1\n\ny\nz\n")
    assert docstrings("def f(:") == ""


def test_generated_problems_are_correct():
    """Every equation holds and starts with the last result; the answer is the last number."""
    for number in range(40):
        text = synthetic.worked_problems(number)
        assert text == synthetic.worked_problems(number) != synthetic.worked_problems(number + 1)
        for problem in text.strip().split("\n\n"):
            result = float(re.search(r"has (\d+) ", problem)[1])
            steps = re.findall(r"has (\S.*?) = (\d+) ", problem)
            for equation, value in steps:
                assert eval(equation) == int(value) and float(equation.split()[0]) == result
                result = int(value)
            assert steps and problem.endswith(f"The answer is {result}.")


def test_generated_programs_pass_their_tests():
    programs = [document["text"] for document in documents("code:generated")]
    held_out = {task["prompt"] for name in ("compositions", "parameters")
                for task in held_out_problems(name)}
    for program in programs[:60]:
        exec(program, {})
        assert "check(" in program
        assert not [prompt for prompt in held_out if program.startswith(prompt)]


def test_programs_of_a_teacher(teacher, code_folder, tmp_path, monkeypatch):
    """A program is kept if it runs and prints something."""
    monkeypatch.setattr(synthetic, "FILES", 4)
    replies = ["Sure.\n```python\nprint(6 * 7)\n```\nIt prints:\n```text\n42\n```\n",
               "```python\nanswer = 6 * 7\n```", "I cannot.",
               "```python\nprint(1)\nprint(open('/etc/passwd').read())\n```"]
    questions = []
    lock = threading.Lock()

    def answer(body):
        with lock:
            questions.append(body["messages"][0]["content"])
            return answered(replies[len(questions) - 1])

    teacher.answer = answer
    manifest = prepare_data(tmp_path / "out", [code_folder], teacher=teacher.url)
    dropped = [row for _, row in read_rows(tmp_path / "out/data/dropped.jsonl")]
    assert Counter(row["reason"] for row in dropped) == {
        "program prints nothing": 1, "program fails": 1, "answer without a program": 1}
    texts = [d["text"] for part in ("train", "validation")
             for d in load_documents(tmp_path / "out", part)]
    assert texts.count("print(6 * 7)\n") == 1 and len(texts) == 17
    assert manifest["funnel"]["source"][f"teacher:{teacher.url}"]["documents"] == 4
    assert len(set(questions)) == 4
    prepare_data(tmp_path / "out", [code_folder], fresh=True, teacher=teacher.url)
    assert len(questions) == 4                                  # the answers are cached
    with pytest.raises(InputError, match="was made from teacher http"):
        prepare_data(tmp_path / "out", [code_folder], teacher="http://other/v1")


@pytest.mark.parametrize("name,language,bad,good", [
    ("more than 100,000 lines", "c", "a\n" * 100_001, WORDS),
    ("longest line", "c", WORDS * 9 + "a b " * 260, WORDS * 99 + "a b " * 240),
    ("longest line of data", "markdown", WORDS + "a b " * 26_000, WORDS + "a b " * 260),
    ("mean line", "c", "word " * 30, "word " * 15),
    ("few letters", "c", "1, 2, 3, 4 # one\n" * 9, "1, 2 # one two\n" * 9),
    ("generated", "python", "# This file is generated, do not change it.\n" + WORDS,
     "\n" * 5 + "# This file is generated by hand.\n"),
    ("encoded data", "c", "x = '" + "QUJD" * 20 + "'\n" * 2, "x = '" + "QUJD" * 3 + "'\n"),
    ("XML", "c", "<?xml version='1.0'?>" + WORDS, WORDS * 3 + "<?xml version='1.0'?>"),
    ("HTML with little text", "html", f"<p><script>{WORDS * 9}</script>hello", "<p>" + WORDS * 9),
    ("data too short or long", "json", '{"a": "words"}', f'{{"a": "{WORDS}{WORDS}"}}'),
    ("data of many lines", "yaml", "- entry\n" * 600, "- entry\n" * 500),
    ("does not parse", "python", "def f(:\n" + WORDS, "def f():\n    return None\n")])
def test_rules(name, language, bad, good):
    assert broken_rule(bad, language)[0] == name
    assert broken_rule(good, language) is None
    assert name in {rule.name for rule in RULES}


def test_shingles_are_runs_of_five_words():
    assert len(shingles("a b c d")) == 0 and len(shingles("a b c d e f")) == 2
    assert set(shingles("a, b; c D e")) == set(shingles("a b c d\ne"))
    texts = [CODE, CODE.replace("item", "Entry"), CODE[100:] + CODE[:300]]
    sets = []
    for text in texts:
        words = re.findall(r"[a-z0-9_]+", text.lower())
        sets.append({tuple(words[i:i + 5]) for i in range(len(words) - 4)})
    for text, a in zip(texts, sets):
        for other, b in zip(texts, sets):
            assert jaccard(shingles(text), shingles(other)) == len(a & b) / len(a | b)


def test_planted_near_duplicates():
    """Recall is at least 0.95 from a similarity of 0.8 on; nothing below 0.7 is joined."""
    rng = random.Random(1)
    sets = []
    pairs = {}                                                  # index of the first -> similarity
    for share in (0.5, 0.6, 0.65, 0.72, 0.8, 0.9, 1.0):
        for _ in range(60):
            values = [rng.getrandbits(64) for _ in range(600)]
            common = round(600 * share / (1 + share))
            pairs[len(sets)] = share
            sets += [np.unique(np.array(part, np.uint64))
                     for part in (values[:300], values[300 - common:600 - common])]
    first = near_duplicates(np.array(list(map(signature, sets))), lambda i: sets[i])
    recall = {share: sum(first[i + 1] == i for i, s in pairs.items() if s == share) / 60
              for share in set(pairs.values())}
    assert recall[0.5] == recall[0.6] == recall[0.65] == 0
    assert recall[0.8] >= 0.95 and recall[0.9] == recall[1.0] == 1 and recall[0.72] > 0.6
    assert all(first[i] in (i, i - 1) for i in range(len(first)))


def test_the_first_of_a_chain_of_copies_remains():
    values = np.sort(np.random.default_rng(0).integers(1, 1 << 63, 140, np.uint64))
    chain = [values[:100], values[10:110], values[20:120], values[30:130]]      # 0.82 to the next
    first = near_duplicates(np.array([signature(v) for v in chain]), lambda i: chain[i])
    assert first == [0, 0, 0, 0] and jaccard(chain[0], chain[3]) < 0.7
    # 0 and 1 are joined only later, by 2, which resembles both
    joined = [chain[0], chain[2], chain[1]]
    assert near_duplicates(np.array(list(map(signature, joined))), joined.__getitem__) == [0, 0, 0]
    assert jaccard(chain[0], chain[2]) < 0.7
    same = np.zeros((50, BANDS * ROWS), np.uint32)              # a bucket of many documents
    assert len(data.candidate_pairs(same)) == sum(49 - i for i in range(32))


SOLUTION = ("    if width < 1:\n        raise ValueError(width)\n    total = 0\n"
            "    for row in range(height):\n        total += width\n    return total\n")
PLAY = "to be or not — to be that is the question whether nobler in the mind"
PROBLEMS = [
    {"task_id": "T/1", "prompt": "def area(width, height):", "canonical_solution": SOLUTION},
    {"task_id": "T/2", "text": "Reverse a given string.", "test_list": [
        "assert f('abc') == 'cba'", "assert [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] == g()"]},
    {"task_id": "T/3", "prompt": PLAY}]


@pytest.fixture
def problem_file(tmp_path):
    (tmp_path / "P.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    return tmp_path / "P.jsonl"


@pytest.mark.parametrize("text,problem", [
    (SOLUTION, "P T/1"), (SOLUTION.replace("    ", "\t"), "P T/1"), (SOLUTION.upper(), "P T/1"),
    ("x = 1\n" + SOLUTION + "y = 2\n", "P T/1"), (SOLUTION.replace("(", " ( "), "P T/1"),
    ("# Task: Reverse a given string. Please.", "P T/2"),
    # what everybody writes
    (CODE, None), ("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]", None), ("", None),
    ("total = 0\nfor row in range(height):", None),
    ("for i in range(n):\n    for j in range(n):\n        total += 1", None)])
def test_contamination(problem_file, text, problem):
    hit = Contamination([problem_file]).hit(text)
    assert (hit and hit[0]) == problem


def test_contaminated_files_are_listed(code_folder, problem_file, tmp_path):
    (code_folder / "a" / "play.py").write_text(f"# {PLAY}\nSPEAKER = 'Hamlet'\n")
    prepare_data(tmp_path / "out", [code_folder], benchmark_files=[problem_file])
    [(_, row)] = read_rows(tmp_path / "out/data/dropped.jsonl")
    assert row["path"] == "a/play.py" and row["reason"] == "contaminated"
    assert row["value"] == ["P T/3", "to be or not to be that is the question"]


def test_published_benchmarks_are_recognized():
    file = reference_data("eval/HumanEval.jsonl.gz")
    contamination = Contamination([file])
    for _, row in read_rows(file):
        assert contamination.hit(row["prompt"] + row["canonical_solution"])


def test_auc_counts_pairs_in_the_right_order():
    assert data.auc([1, 2, 2, 3], [False, False, True, True]) == (1 + 0.5 + 1 + 1) / 4


def test_grounding_from_coarse_to_fine():
    """A text is good if its prose explains its code; the classifier sees words only."""
    good = ("The function `{n}_total` sums.\n\n"
            "```\ndef {n}_total(prices):\n    return sum(prices)\n```\n")
    assert data.quality_score(good.format(n="my")) == 1 / 13
    assert data.quality_score("Nothing but prose, of prices and a total.") == 0
    rng = random.Random(0)
    texts = []
    for n in range(200):
        parts = ["Once upon a time there was a king who had a daughter."] * rng.randrange(3, 9)
        parts += ["How to call the function that adds the prices in a list."] * (n % 4)
        texts.append("\n\n".join(parts + [good.format(n=f"f{n}_{i}") for i in range(n % 4)]))
    order = rng.sample(range(200), 200)
    dropped_by, stages = data.coarse_to_fine(
        [texts[i] for i in order], lambda texts: list(map(data.quality_score, texts)),
        shares=(0.7, 0.6))
    count = Counter((dropped_by[i], order[i] % 4) for i in range(200))
    assert count[0, 3] > 45 and count[1, 0] == 50
    assert stages[0]["threshold"] < stages[1]["threshold"] and stages[0]["auc"] > 0.95
    sizes = [sum(map(len, texts)), *(stage["bytes"] for stage in stages)]
    assert all(0.5 < after / before <= 0.7 for before, after in zip(sizes, sizes[1:]))
    assert stages[-1]["documents"] == (dropped_by == 0).sum()


@pytest.mark.parametrize("texts,score,stages", [
    # most have the best score, which is the median: the others are dropped
    ([f"w{i % 3} word" * (i % 3 + 1) for i in range(120)], lambda text: 5 - 4 * ("w0" in text), 1),
    (["a"] * 10, len, 0), (["a"] * 90, len, 0)])                # too few, nothing to distinguish
def test_grounding_of_few_or_equal_documents(texts, score, stages):
    assert len(data.coarse_to_fine(texts, lambda texts: list(map(score, texts)), (0.7,))[1]) == (
        stages)


def test_grounding_of_real_documents(tmp_path, code_folder):
    """The Python enhancement proposals."""
    rows = [row for _, row in read_rows(reference_data("text/peps.jsonl.gz"))][:90]
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"text": row["text"][:3000]}) + "\n" for row in rows))
    manifest = prepare_data(tmp_path / "out", [code_folder, f"grounding:{tmp_path}/few.jsonl"])
    reasons, stages = manifest["funnel"]["reason"], manifest["grounding"]
    assert len(stages) >= 2 and stages[-1]["mean score"] > stages[0]["mean score"]
    assert sum(entry["documents"] for name, entry in reasons.items()
               if name.startswith("grounding stage")) == 90 - stages[-1]["documents"]
    assert (tmp_path / "out/data/grounding.png").read_bytes()[:4] == b"\x89PNG"
    kept = [d for d in load_documents(tmp_path / "out", "train") if d["kind"] == "grounding"]
    assert len(kept) == stages[-1]["documents"]


def test_quality_scores_of_a_teacher(teacher):
    scores = {"On a scale from 0 to 5, I give 4.": 4, "<think>It has 3 parts</think>\n5": 5,
              "10": 0, "3.5 out of 5": 3.5, "**4**/5": 4, "I cannot judge 2024 documents": 0}
    teacher.answer = lambda body: answered(body["messages"][0]["content"].split("\n\n")[1])
    assert data.teacher_scores(teacher.url, list(scores)) == list(scores.values())


def test_a_file_that_is_code_and_grounding_counts_as_code(code_folder, tmp_path, monkeypatch):
    code_folder.rename(tmp_path / "src")                        # sorts behind "grounding:src"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src" / "a" / "README.md").write_text("Prose of a program, in words.\n" * 20)
    prepare_data(tmp_path / "out", ["grounding:src", "src"])
    rows = [d for part in ("train", "validation") for d in load_documents(tmp_path / "out", part)]
    assert [d["kind"] for d in rows if d["path"] == "a/README.md"] == ["code"]


def order_of(files, language):
    documents = [{"path": path, "text": text, "language": language} for path, text in files.items()]
    return [document["path"] for document in dependency_order(documents)]


@pytest.mark.parametrize("language, files", [
    ("python", {"p/z.py": "", "p/sub/y.py": "from ..z import a", "p/b.py": "import p.sub.y as q",
                "p/a.py": "from . import b\nimport os", "p/__init__.py": "from .a import f"}),
    ("c", {"src/z.h": "", "include/y.h": "#include <z.h>\n# include \"../src/z.h\"",
           "src/a.c": "#include \"y.h\""}),
    ("javascript", {"lib/z.js": "", "lib/deep/index.js": "const z = require('../z')",
                    "app.js": "import {a} from './lib/deep'"}),
    ("go", {"util/z.go": "package util", "core/y.go": "import (\n\t\"me.org/m/util\"\n)",
            "a.go": "import c \"me.org/m/core\""}),
    ("java", {"src/org/z/Z.java": "", "src/org/y/Y.java": "import org.z.Z;",
              "src/org/a/A.java": "import static org.y.Y.f;"}),
    ("rust", {"src/z.rs": "", "src/y/mod.rs": "use crate::z::Thing;", "src/a.rs": "mod y;"})])
def test_files_follow_their_dependencies(language, files):
    assert order_of(files, language) == list(files)
    assert order_of(dict(reversed(files.items())), language) == list(files)


def test_import_cycles_do_not_stall():
    files = {"a.py": "import b", "b.py": "import c", "c.py": "import a\nimport d", "d.py": "",
             "self.py": "import self"}
    assert order_of(files, "python") == ["d.py", "self.py", "a.py", "c.py", "b.py"]
    assert order_of({}, "python") == []


def test_repository_layout(small_tokenizer):
    """Dependencies first, in the layout of figure 4, in chunks of whole files."""
    files = {"a.py": "import b\n", "b.py": "x = 1\n", "big.py": "y = 2\n" * 40}
    repository = [{"path": path, "text": text, "language": "python", "repo": "me/r"}
                  for path, text in files.items()]
    [ids] = data.repository_chunks(repository, small_tokenizer, 10_000)
    text = small_tokenizer.decode(ids)
    assert text == (
        "<|repo_name|>me/r\n<|file_sep|>b.py\nx = 1\n\n<|file_sep|>a.py\nimport b\n\n"
        "<|file_sep|>big.py\n" + files["big.py"])
    assert ids == small_tokenizer.encode(text, allow_special=True)
    chunks = list(data.repository_chunks(repository, small_tokenizer, 60))
    texts = [small_tokenizer.decode(ids) for ids in chunks]
    assert [re.findall(r"\w+\.py", text) for text in texts] == [["b.py", "a.py"], ["big.py"]]
    assert len(chunks[0]) <= 60 < len(chunks[1])
    assert all(text.startswith("<|repo_name|>me/r\n") for text in texts)


def rows_of(kind, source, paths):
    return [{"kind": kind, "source": source, "path": path, "text_bytes": 9} for path in paths]


CORPUS = rows_of("code", "stdlib", [f"m{i}/a.py" for i in range(40)])


def test_whole_modules_are_held_out():
    corpus = rows_of("code", "s", [f"m{m}/f{f}.py" for m in range(40) for f in range(3)])
    train, validation = split(corpus)
    modules = [{d["path"].split("/")[0] for d in part} for part in (train, validation)]
    assert len(train) + len(validation) == 120 and not modules[0] & modules[1]
    assert 0.02 <= len(validation) / 120 <= 0.05
    assert split(corpus[::-1])[1] == [d for d in corpus[::-1] if d in validation]


def test_a_corpus_of_one_module_is_split_by_file():
    train, validation = split(rows_of("code", "s", [f"src/f{i}.py" for i in range(30)]))
    assert len(validation) == 1 and len(train) == 29
    with pytest.raises(InputError, match="1 documents are too few"):
        split(rows_of("code", "s", ["a.py"]))


def test_a_project_with_one_large_folder_is_split_by_file():
    """Else a single setup.py would be all there is to measure on."""
    paths = [f"src/f{i}.py" for i in range(90)] + [f"tests/t{i}.py" for i in range(9)]
    train, validation = split(rows_of("code", "s", [*paths, "setup.py"]))
    assert 3 <= len(validation) <= 5 and {d["path"][:3] for d in validation} & {"src"}


def test_packages_do_not_change_the_validation_set():
    packages = rows_of("code", "packages", [f"p{i}/a.py" for i in range(40)])
    text = rows_of("text", "text:packages", [f"p{i}/a.py" for i in range(40)])
    assert split(CORPUS + packages + text)[1] == split(CORPUS)[1]


def test_text_is_held_out_with_the_code_of_its_module():
    text = rows_of("text", "text:stdlib", [f"m{i}/a.py" for i in range(40)])
    math = rows_of("math", "math:generated", [f"{i}.txt" for i in range(400)])
    _, validation = split(CORPUS + text + math)
    paths = {kind: {d["path"] for d in validation if d["kind"] == kind}
             for kind in ("code", "text", "math")}
    assert paths["code"] == paths["text"] == {d["path"] for d in split(CORPUS)[1]}
    assert 10 <= len(paths["math"]) <= 30


@pytest.fixture
def folder_with_copies(code_folder):
    text = (code_folder / "a" / "part0.py").read_text()
    (code_folder / "a" / "zcopy.py").write_text(text.replace("\n", "  \n"))
    text = text.replace("a_0_3", "other").replace("a_0_9", "new")
    (code_folder / "h" / "znear.py").write_text(text)
    (code_folder / "b" / "made.py").write_text("# autogenerated\nx = 1\n")
    (code_folder / "b" / "picture.png").write_bytes(b"PNG")
    return code_folder


def test_every_file_is_accounted_for(folder_with_copies, tmp_path, monkeypatch):
    """And the corpus does not depend on the number of processes."""
    monkeypatch.setattr("support.sources.BATCH_FILES", 3)
    manifest = prepare_data(tmp_path / "out", [folder_with_copies], workers=1)
    prepare_data(tmp_path / "out2", [folder_with_copies], workers=2)
    for name in ("train.jsonl", "validation.jsonl", "dropped.jsonl", "manifest.json"):
        assert (tmp_path / "out/data" / name).read_bytes() == (
            tmp_path / "out2/data" / name).read_bytes()
    reasons = manifest["funnel"]["reason"]
    assert reasons["kept"]["documents"] == 16
    assert sum(entry["bytes"] for entry in reasons.values()) == sum(
        path.stat().st_size for path in folder_with_copies.rglob("*") if path.is_file())
    rows = [row for _, row in read_rows(tmp_path / "out/data/dropped.jsonl")]
    dropped = {row["path"]: (row["reason"], row["value"]) for row in rows}
    assert dropped == {
        "a/zcopy.py": ("exact duplicate", "a/part0.py"),
        "h/znear.py": ("near duplicate", "a/part0.py"),
        "b/picture.png": ("language unknown", "png"), "b/made.py": ("generated", "autogenerated")}
    paths = [d["path"] for part in ("train", "validation")
             for d in load_documents(tmp_path / "out", part)]
    assert len(set(paths)) == 16 and not set(paths) & set(dropped)
    assert (tmp_path / "out/data/funnel.png").read_bytes()[:4] == b"\x89PNG"


def test_training_text_like_a_validation_document_is_dropped(code_folder):
    """At a similarity from 0.5 to 0.7: no duplicate, but too near to the validation set."""
    document, other = itertools.islice(documents(str(code_folder)), 2)
    half = "\n\n".join(document["text"].split("\n\n")[:18] + CODE.split("\n\n"))
    assert 0.5 < jaccard(shingles(half), shingles(document["text"])) < 0.7
    train = [{**other, "text": half}, other]
    data.drop_near_validation(train, [document])
    assert (train[0]["reason"], train[0]["value"]) == ("like a validation document",
                                                       document["path"])
    assert "reason" not in other


def test_finished_stages_are_not_repeated(code_folder, tmp_path):
    manifest = prepare_data(tmp_path / "out", [code_folder])
    prepare_tokenizer(tmp_path / "out", 400)
    (code_folder / "h" / "new.py").write_text(CODE)
    assert prepare_data(tmp_path / "out", [code_folder]) == manifest
    with pytest.raises(InputError, match=r"was made from sources .*code'\], not \['stdlib'\]"):
        prepare_data(tmp_path / "out", ["stdlib"])
    with pytest.raises(InputError, match=r"was made from benchmarks .*, not \['other.jsonl'\]"):
        prepare_data(tmp_path / "out", [code_folder], benchmark_files=[tmp_path / "other.jsonl"])
    with pytest.raises(InputError, match="was made from vocab_size 400, not 500"):
        prepare_tokenizer(tmp_path / "out", 500)
    prepare_tokenizer(tmp_path / "out", 500, fresh=True)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").vocab_size <= 500
    prepare_data(tmp_path / "out", [code_folder], fresh=True)
    with pytest.raises(InputError, match="tokenizer was made from documents "):
        prepare_tokenizer(tmp_path / "out", 500)


def test_sources_without_code(tmp_path):
    (tmp_path / "in" / "build").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    for name in ("b.py", "c.py"):
        (tmp_path / "in" / name).write_text("def f(:")
    with pytest.raises(InputError) as error:
        prepare_data(tmp_path / "out", [tmp_path / "in"])
    assert str(error.value).endswith(
        "no source code found there (does not parse: 2, such as b.py; language unknown: 1, such as "
        "a.png; skipped folder: 1, such as build/)")
    (tmp_path / "in" / "a.md").write_text("Prose alone is no code to measure. " * 20)
    with pytest.raises(InputError, match="kept as text: 1, such as a.md"):
        prepare_data(tmp_path / "out", [f"text:{tmp_path / 'in'}"])
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("name,content,printed", [
    ("a.py", b"# autogenerated\nx = 1\n", "DROPS  generated: autogenerated"),
    ("b.py", b"value = 'me@work.org'\n", "kept, with fixed values in place of private data"),
    ("n.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": ["x = 'a_b'"]}],
                            "more": "x" * 5000}).encode(), "kept unchanged"),
    ("mark.py", b"\xef\xbb\xbf", "dropped: empty"),
    ("a.xyz", b"x", "none of the 92 languages"), ("c.py", None, "c.py: no such file")])
def test_why(tmp_path, typed, name, content, printed):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = typed("data.py", "--why", tmp_path / name)
    assert printed in result.stdout + result.stderr
    assert result.returncode == (2 if content is None else 0)
