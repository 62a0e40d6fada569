"""pytest tests/test_data.py"""

import gzip
import json
import random
import re
import threading
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from conftest import CODE, answered, reference_data
from test_sources import gathered

import data
import evaluate
from data import (
    BANDS,
    ROWS,
    RULES,
    Contamination,
    broken_rule,
    candidate_pairs,
    documents,
    jaccard,
    load_documents,
    near_duplicates,
    notebook_script,
    prepare_data,
    prepare_tokenizer,
    shingles,
    signature,
    split,
)
from support import synthetic
from support.dependencies import dependencies, dependency_order
from support.files import InputError, read_rows
from support.languages import LANGUAGE_OF, language_of
from support.tasks import held_out_problems
from tokenizer import Tokenizer


def document(text, path, source="s"):
    return {"text": text, "path": path, "source": source, "repo": "r", "language": "python",
            "bytes": len(text), "text_bytes": len(text), "kind": "code"}


def test_notebooks_become_scripts(tmp_path):
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "two lines"]},
             {"cell_type": "code", "source": "import numpy\nprint(1)\n"},
             {"cell_type": "raw", "source": "x"}, {"cell_type": "code", "source": []}]
    text = notebook_script(json.dumps({"cells": cells}))
    assert text == "# # Title\n# two lines\n\nimport numpy\nprint(1)\n"
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "b.ipynb").write_text("{}")
    assert gathered(tmp_path) == ([("a.ipynb", text, "jupyter-notebook", tmp_path.name)],
                                  [("notebook broken", "b.ipynb")])


def test_languages():
    assert len(set(LANGUAGE_OF.values())) == 92
    cases = {"a/b.py": "python", "B.CPP": "c++", "x.R": "r", "Dockerfile": "dockerfile",
             "sub/Makefile": "makefile", "CMakeLists.txt": "cmake", "a.txt": None, "noext": None,
             "a.tar.py": "python", "Gemfile": "ruby"}
    assert {path: language_of(path) for path in cases} == cases
    assert language_of("run", b"#!/usr/bin/env python3\n") == "python"
    assert language_of("run", b"#!/bin/bash -e\n") == "shell"
    assert language_of("run", b"\xff") is None


# ---- text and mathematics


def test_prose_has_no_code():
    text = '''"""Reads a file and
tells what stands in it, line by line, for everybody who cares.

    >>> read("x")
    ['a']

Then it goes on::

    for line in file:
        print(line)

and ends well."""


def short():
    """Too short to count."""


def f():
    """What this function does, said in a sentence that is long enough."""
    return "no prose in here, however long this string may be, as it is code"
'''
    prose, code = data.prose_and_code(data.docstrings(text))
    assert prose == (
        "Reads a file and\ntells what stands in it, line by line, for everybody who cares.\n"
        "\nThen it goes on::\n\nand ends well.\n\n"
        "What this function does, said in a sentence that is long enough.\n")
    assert code == ("    >>> read(\"x\")\n    ['a']\n"
                    "    for line in file:\n        print(line)")
    assert data.prose_and_code("# Title\n```py\nx = 1\n\ny\n```\nwords\n```\nz\n") == (
        "# Title\nwords\n", "x = 1\n\ny\nz\n")
    assert data.docstrings("def f(:") == ""


def test_generated_problems_are_right():
    """Every equation holds, each begins where the last ended, and the answer is the last number."""
    for number in range(40):
        text = synthetic.worked_problems(number)
        assert text == synthetic.worked_problems(number) != synthetic.worked_problems(number + 1)
        for problem in text.strip().split("\n\n"):
            have = float(re.search(r"has (\d+) ", problem)[1])
            steps = re.findall(r"has (\S.*?) = (\d+) ", problem)
            for equation, result in steps:
                assert eval(equation) == int(result) and float(equation.split()[0]) == have
                have = int(result)
            assert steps and problem.endswith(f"The answer is {have}.")
            assert evaluate.final_number(problem) == have and have >= 0


def test_generated_programs_pass_their_tests():
    """code:generated is the task grammar, without what is held out."""
    programs = synthetic.grammar_programs()
    assert programs == synthetic.grammar_programs() and len(set(programs)) == synthetic.FILES
    held_out = {task["prompt"] for split in ("compositions", "parameters")
                for task in held_out_problems(split)}
    for program in programs[:60]:
        exec(program, {})
        assert "check(" in program
        assert not [prompt for prompt in held_out if program.startswith(prompt)]
    dropped = []
    [first, *others] = documents("code:generated", dropped)
    assert first["path"] == "0000.py" and first["text"] in programs
    assert len(others) + 1 + len(dropped) == synthetic.FILES
    with pytest.raises(InputError, match="text:generated: expected math:generated or code:gen"):
        list(documents("text:generated"))


def test_programs_by_a_teacher(teacher, code_folder, tmp_path, monkeypatch):
    """A program is kept if it prints what the teacher said; other forms of answers are counted."""
    monkeypatch.setattr(synthetic, "FILES", 4)
    replies = ["Sure.\n```python\nprint(6 * 7)\n```\nIt prints:\n```text\n42\n```\n",
               "```python\nprint(6 * 7)\n```\n```text\n43\n```", "I cannot.",
               "```python\nimport os\nprint(os.listdir('/etc'))\n```\n```text\n[]\n```"]
    order, lock = [], threading.Lock()

    def answer(body):
        with lock:
            order.append(body["messages"][0]["content"])
            return answered(replies[len(order) - 1])

    teacher.answer = answer
    rows = list(data.cleaned(data.teacher_batch(teacher.url), Contamination([])))
    dropped = [row for row in rows if "reason" in row]
    [kept] = [row for row in rows if "text" in row]
    assert kept["text"] == "print(6 * 7)\n" and kept["language"] == "python"
    assert Counter(row["reason"] for row in dropped) == {
        "program prints something else": 2, "program without a result": 1}
    assert len(set(order)) == 4 and all("standard library alone" in text for text in order)
    manifest = prepare_data(tmp_path / "out", [code_folder], teacher=teacher.url)
    assert manifest["funnel"]["source"][f"teacher:{teacher.url}"]["documents"] == 4
    assert len(order) == 4                                      # nothing was asked again
    assert prepare_data(tmp_path / "out", [code_folder]) == manifest        # as pretrain.py asks
    with pytest.raises(InputError, match="was made from teacher http"):
        prepare_data(tmp_path / "out", [code_folder], teacher="http://other/v1")
    (code_folder / "synthetic").mkdir()                         # a name like any other
    (code_folder / "synthetic" / "app.py").write_text("name = 1\n")
    assert [row[0] for row in gathered(code_folder / "synthetic")[0]] == ["app.py"]


# ---- rules


def test_each_rule_drops_what_it_is_for():
    words = "some words of a file that anybody may read\n"
    cases = {
        "more than 100,000 lines": ("a\n" * 100_001, "c", words),
        "longest line": (words * 9 + "a b " * 260, "c", words * 99 + "a b " * 240),
        "longest line of data": (words + "a b " * 26_000, "markdown", words + "a b " * 260),
        "mean line": ("word " * 30, "c", "word " * 15),
        "few letters": ("1, 2, 3, 4 # one\n" * 9, "c", "1, 2 # one two\n" * 9),
        "generated": ("# This file is generated, do not change it.\n" + words, "python",
                      "\n" * 5 + "# This file is generated by hand.\n"),
        "encoded data": ("x = '" + "QUJD" * 20 + "'\n" * 2, "c", "x = '" + "QUJD" * 3 + "'\n"),
        "XML": ("<?xml version='1.0'?>" + words, "c", words * 3 + "<?xml version='1.0'?>"),
        "HTML with little text": ("<p><script>" + words * 9 + "</script>hello", "html",
                                  "<p>" + words * 9),
        "data too short or long": ('{"a": "words"}', "json", f'{{"a": "{words}{words}"}}'),
        "data of many lines": ("- entry\n" * 600, "yaml", "- entry\n" * 500),
        "does not parse": ("def f(:\n" + words, "python", "def f():\n    return None\n")}
    assert set(cases) == {rule.name for rule in RULES}
    for name, (bad, language, good) in cases.items():
        assert broken_rule(bad, language)[0] == name, name
        assert broken_rule(good, language) is None, (name, broken_rule(good, language))
    long_run = "word " * 3 + "QUJD" * 300
    assert broken_rule("\n".join([long_run[:900], long_run[900:]] + [words] * 99), "c") == (
        "encoded data", (1206, pytest.approx(0.216, abs=0.001)))    # line ends and "some" included


# ---- duplicates


def reference_shingles(text):
    words = re.findall(r"[a-z0-9_]+", text.lower())
    return set(zip(*(words[i:] for i in range(5))))


def test_shingles_are_runs_of_five_words():
    assert len(shingles("a b c d")) == 0 and len(shingles("")) == 0
    assert len(shingles("a b c d e f")) == 2
    assert set(shingles("a, b; c D e")) == set(shingles("a b c d\ne"))
    assert not set(shingles("a b c d e")) & set(shingles("b a c d e"))
    texts = [CODE, CODE.replace("item", "Entry"), CODE[100:] + CODE[:300]]
    for one in texts:
        assert len(shingles(one)) == len(reference_shingles(one))
        for two in texts:
            a, b = reference_shingles(one), reference_shingles(two)
            assert jaccard(shingles(one), shingles(two)) == len(a & b) / len(a | b)


def test_signatures_agree_as_often_as_sets_do():
    rng = random.Random(0)
    for share in (0.3, 0.8):
        values = np.array([rng.getrandbits(64) for _ in range(2000)], np.uint64)
        cut = int(2000 * (1 - share) / 2)
        a, b = signature(np.sort(values[cut:])), signature(np.sort(values[:2000 - cut]))
        assert (a == b).mean() == pytest.approx(share, abs=0.1)     # |and| / |or| = share


def test_planted_near_duplicates():
    """Recall at least 0.95 from a similarity of 0.8 on; what is below 0.7 is never joined."""
    rng, sets, pairs = random.Random(1), [], {}
    for share in (0.5, 0.6, 0.65, 0.72, 0.8, 0.9, 1.0):
        for _ in range(60):
            n, values = 300, [rng.getrandbits(64) for _ in range(600)]
            common = round(2 * n * share / (1 + share))
            one, two = values[:n], values[n - common:2 * n - common]
            pairs[len(sets)] = share
            sets += [np.unique(np.array(part, np.uint64)) for part in (one, two)]
    first = near_duplicates(np.array(list(map(signature, sets))), lambda i: sets[i])
    found = {share: sum(first[i + 1] == i for i, s in pairs.items() if s == share) / 60
             for share in set(pairs.values())}
    assert found[0.5] == found[0.6] == found[0.65] == 0
    assert found[0.8] >= 0.95 and found[0.9] == found[1.0] == 1 and found[0.72] > 0.6
    assert all(first[i] in (i, i - 1) for i in range(len(first)))


def test_of_a_crowd_and_of_a_chain_the_first_remains():
    same = np.zeros((50, BANDS * ROWS), np.uint32)
    assert len(candidate_pairs(same)) == sum(49 - i for i in range(32))
    values = np.sort(np.random.default_rng(0).integers(1, 1 << 63, 140, np.uint64))
    chain = [values[:100], values[10:110], values[20:120], values[30:130]]      # 0.82 to the next
    first = near_duplicates(np.array([signature(v) for v in chain]), lambda i: chain[i])
    assert first == [0, 0, 0, 0] and jaccard(chain[0], chain[3]) < 0.7


# ---- contamination


PROBLEM = {
    "task_id": "T/1",
    "prompt": 'def area(width, height):\n    """The area of a rectangle at least one wide."""\n',
    "canonical_solution": "    if width < 1:\n        raise ValueError(width)\n    total = 0\n"
                          "    for row in range(height):\n        total += width\n"
                          "    return total\n",
    "test": "def check(c):\n    assert c(3, 4) == 12\n"}


@pytest.fixture
def contamination(tmp_path):
    rows = [PROBLEM, {"task_id": "T/2", "text": "Reverse a given string.", "test_list": [
        "assert f('abc') == 'cba'", "assert [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] == g()"]}]
    (tmp_path / "P.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Contamination([tmp_path / "P.jsonl"])


def test_contamination_is_found(contamination):
    solution = PROBLEM["canonical_solution"]
    for text in (solution, solution.replace("    ", "\t"), "x = 1\n" + solution + "y = 2\n",
                 re.sub(r"\s+", " ", solution).replace(" < ", "<"), solution.upper(),
                 solution.replace("(", " ( ").replace(":", " :")):
        assert contamination.hit(text)[0] == "P T/1", text
    assert contamination.hit("# Task: Reverse a given string. Please.")[0] == "P T/2"


def test_hits_are_listed(code_folder, tmp_path):
    words = "to be or not — to be that is the question whether nobler in the mind"
    (tmp_path / "plays.jsonl").write_text(json.dumps({"task_id": "H/1", "prompt": words}))
    (code_folder / "a" / "play.py").write_text(f"# {words}\nSPEAKER = 'Hamlet'\n")
    prepare_data(tmp_path / "out", [code_folder], benchmark_files=[tmp_path / "plays.jsonl"])
    [line] = (tmp_path / "out/data/contamination.jsonl").read_text().splitlines()
    hit = json.loads(line)
    assert hit["path"] == "a/play.py" and hit["value"][0] == "plays H/1"
    assert hit["value"][1] == "to be or not to be that is the question"
    assert line in (tmp_path / "out/data/dropped.jsonl").read_text().splitlines()


def test_what_everybody_writes_is_no_contamination(contamination):
    for text in (CODE, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]",
                 "total = 0\nfor row in range(height):",
                 "for i in range(n):\n    for j in range(n):\n        total += 1", ""):
        assert contamination.hit(text) is None, text


def test_benchmarks_and_real_repositories(tmp_path):
    """Every problem is found in itself, and in a repository that has solved some of them."""
    files = [reference_data(f"eval/{name}.jsonl.gz") for name in ("HumanEval", "mbpp")]
    found = Contamination(files)
    for _, row in read_rows(files[0]):
        assert found.hit(row["prompt"] + row["canonical_solution"])
    archive = reference_data("repos/thealgorithms-python.tar.gz")
    dropped = []
    kept = list(documents(str(archive), dropped, found))
    hits = [row for row in dropped if row["reason"] == "contaminated"]
    assert 5 <= len(hits) <= 60 and len(kept) > 1000


# ---- the classifier


def test_a_classifier_learns_languages():
    """Of files it has not seen it names the language, from words alone; the same each time."""
    texts, labels = [], []
    for name, language in (("go", "go"), ("rust", "rust"), ("cpp", "c++")):
        archive = reference_data(f"repos/thealgorithms-{name}.tar.gz")
        found = [d["text"] for d in documents(str(archive)) if d["language"] == language][:150]
        texts, labels = texts + found, labels + [language] * len(found)
    train = [i for i in range(len(texts)) if i % 3]
    test = range(0, len(texts), 3)
    runs = []
    for _ in range(2):
        classifier = data.Classifier(["go", "rust", "c++"])
        classifier.fit([texts[i] for i in train], [labels[i] for i in train])
        runs.append(classifier.predict([texts[i] for i in test]))
    named = [classifier.names[i] for i in runs[0].argmax(1)]
    right = sum(name == labels[i] for name, i in zip(named, test)) / len(test)
    assert right > 0.97 and (runs[0] == runs[1]).all()
    assert data.auc(runs[0][:, 1], [labels[i] == "rust" for i in test]) > 0.99


def test_auc_by_counting():
    rng = random.Random(5)
    scores = [rng.randrange(6) for _ in range(40)]
    positive = [rng.random() < 0.4 for _ in range(40)]
    pairs = [(a, b) for a, p in zip(scores, positive) if p for b, q in zip(scores, positive)
             if not q]
    assert data.auc(scores, positive) == pytest.approx(
        sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_grounding_from_coarse_to_fine():
    """A text is worth what its prose says of its code; the stages find it by words alone."""
    good = ("The function `{n}_total` sums.\n\n"
            "```\ndef {n}_total(prices):\n    return sum(prices)\n```\n")
    assert data.quality_score(good.format(n="my")) == 1 / 13
    assert data.quality_score("Nothing but prose, of prices and a total.") == 0
    draw = random.Random(0)
    texts = []
    for n in range(400):
        explained = n % 4                                       # how many functions are spoken of
        parts = ["Once upon a time there was a king who had a daughter."] * draw.randrange(3, 9)
        parts += ["How to call the function that adds the prices in a list."] * explained
        texts.append("\n\n".join(parts + [good.format(n=f"f{n}_{i}") for i in range(explained)]))
    order = draw.sample(range(400), 400)
    stage_of, done = data.coarse_to_fine(
        [texts[i] for i in order],
        lambda texts: [data.quality_score(text) for text in texts], shares=(0.7, 0.6, 0.6))
    explained = Counter((stage_of[i], order[i] % 4) for i in range(400))
    assert explained[0, 3] > 60 and explained[0, 2] < 20 and not explained[0, 1]
    assert explained[1, 0] == 100 and len(done) == 3
    thresholds = [stage["threshold"] for stage in done]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[-1]
    assert done[0]["auc"] > 0.95
    sizes = [sum(len(texts[i]) for i in order)] + [stage["bytes"] for stage in done]
    assert all(0.5 < after / before <= 0.7 for before, after in zip(sizes, sizes[1:]))
    for stage, about in enumerate(done, 1):
        assert about["documents"] == (stage_of == 0).sum() + (stage_of > stage).sum()
    most = data.coarse_to_fine([f"w{i % 3} word" * (i % 3 + 1) for i in range(120)],
                               lambda texts: [5 - 4 * ("w0" in text) for text in texts], (0.7,))
    assert len(most[1]) == 1                        # the median is the best score: the rest goes
    assert data.coarse_to_fine(["a"] * 10, lambda texts: [0] * len(texts))[1] == []
    assert data.coarse_to_fine(["a"] * 90, lambda texts: [0] * len(texts))[1] == []


def test_grounding_of_real_documents(tmp_path, teacher, code_folder):
    """The Python enhancement proposals, marked by what they hold and by a teacher."""
    source = f"grounding:{reference_data('text/peps.jsonl.gz')}"
    few = tmp_path / "few.jsonl"
    with gzip.open(source.partition(":")[2], "rt") as file:
        rows = [json.loads(line)["text"] for line in file][:160]
    few.write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in rows))
    manifest = prepare_data(tmp_path / "out", [code_folder, f"grounding:{few}"])
    reasons, stages = manifest["funnel"]["reason"], manifest["grounding"]
    assert len(stages) >= 2 and stages[-1]["mean score"] > stages[0]["mean score"]
    assert sum(entry["documents"] for name, entry in reasons.items()
               if name.startswith("grounding stage")) == 160 - stages[-1]["documents"]
    assert (tmp_path / "out/data/grounding.png").read_bytes()[:4] == b"\x89PNG"
    kept = [d for d in load_documents(tmp_path / "out", "train") if d["kind"] == "grounding"]
    assert len(kept) == stages[-1]["documents"]
    teacher.answer = lambda body: answered(
        str(5 * ("Abstract" in body["messages"][0]["content"])) + " points")
    assert data.teacher_scores(teacher.url, [text[:3000] for text in rows[:30]]) == [
        5.0 if "Abstract" in text[:3000] else 0.0 for text in rows[:30]]
    marks = {"On a scale from 0 to 5, I give 4.": 4, "<think>It has 3 parts</think>\n5": 5,
             "10": 0, "3.5 out of 5": 3.5, "**4**/5": 4, "I cannot judge 2024 documents": 0}
    teacher.answer = lambda body: answered(body["messages"][0]["content"].split("\n\n")[1])
    assert data.teacher_scores(teacher.url, list(marks)) == list(marks.values())


def test_a_shared_ending_is_the_first_language_with_it():
    assert [language_of(f"a.{ending}") for ending in ("h", "pl", "v", "m", "sc")] == [
        "c", "perl", "verilog", "matlab", "scala"]


# ---- repositories


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
def test_files_come_after_what_they_need(language, files):
    assert order_of(files, language) == list(files)
    assert order_of(dict(reversed(files.items())), language) == list(files)


def test_circles_do_not_stall():
    files = {"a.py": "import b", "b.py": "import c", "c.py": "import a\nimport d", "d.py": "",
             "self.py": "import self"}
    order = order_of(files, "python")
    assert sorted(order) == sorted(files) and order[0] == "d.py"
    assert order_of({}, "python") == []


def test_repository_layout(small_tokenizer):
    """Files in the order of need, as in the figure, cut between files."""
    files = {"a.py": "import b\n", "b.py": "x = 1\n", "big.py": "y = 2\n" * 40}
    found = [{"path": path, "text": text, "language": "python", "source": "s", "repo": "me/r"}
             for path, text in files.items()]
    [ids] = data.repository_chunks(found, small_tokenizer, 10_000)
    text = small_tokenizer.decode(ids)
    assert text == (
        "<|repo_name|>me/r\n<|file_sep|>b.py\nx = 1\n\n<|file_sep|>a.py\nimport b\n\n"
        "<|file_sep|>big.py\n" + files["big.py"])
    assert ids == small_tokenizer.encode(text, allow_special=True)
    parts = list(data.repository_chunks(found, small_tokenizer, 60))
    texts = [small_tokenizer.decode(ids) for ids in parts]
    assert [re.findall(r"\w+\.py", text) for text in texts] == [["b.py", "a.py"], ["big.py"]]
    assert len(parts[0]) <= 60 < len(parts[1])
    assert texts[1].endswith(files["big.py"])
    assert all(text.startswith("<|repo_name|>me/") for text in texts)


def test_order_of_a_real_repository():
    """Of flask's own imports that are in no circle, all point backwards."""
    found = [d for d in documents(str(reference_data("repos/flask.tar.gz")))
             if "/src/flask/" in d["path"]]
    order = dependency_order(found)
    place = {d["path"]: i for i, d in enumerate(order)}
    needed = dependencies(found)
    edges = [(d["path"], found[j]["path"]) for d, own in zip(found, needed) for j in own]
    assert len(found) > 15 and len(edges) > 50
    assert sum(place[b] < place[a] for a, b in edges) > 0.6 * len(edges)
    assert place["flask/src/flask/typing.py"] < place["flask/src/flask/blueprints.py"]


# ---- the corpus


def test_split_by_module():
    corpus = [document(f"{m}{f}" * 20, f"m{m}/f{f}.py") for m in range(40) for f in range(3)]
    train, validation = split(corpus)
    modules = [{d["path"].split("/")[0] for d in part} for part in (train, validation)]
    assert len(train) + len(validation) == 120 and not modules[0] & modules[1]
    assert 0.02 <= len(validation) / 120 <= 0.05
    assert split(corpus[::-1])[1] == [d for d in corpus[::-1] if d in validation]


def test_split_of_one_module_is_by_file():
    train, validation = split([document("x" * 9, f"src/f{i}.py") for i in range(30)])
    assert len(validation) == 1 and len(train) == 29


def test_held_out_text_is_the_same_with_packages():
    library = [document("x" * 9, f"m{i}.py", "stdlib") for i in range(40)]
    packages = [document("y" * 9, f"p{i}/a.py", "packages") for i in range(40)]
    text = [{**d, "source": f"text:{d['source']}", "kind": "text"} for d in library + packages]
    train, validation = split(library + packages)
    assert validation == split(library)[1] and len(train) + len(validation) == 80
    validation = split(library + packages + text)[1]        # nor docstrings of code that trains
    assert validation == split(library + text[:40])[1] and any(d["kind"] == "text"
                                                               for d in validation)


def test_text_is_held_out_with_its_module():
    code = [document("x" * 9, f"m{i}/a.py", "stdlib") for i in range(40)]
    text = [{**document("y" * 9, f"m{i}/a.py", "text:stdlib"), "kind": "text"} for i in range(40)]
    maths = [{**document("z" * 9, f"{i}.txt", "math:generated"), "kind": "math"}
             for i in range(400)]
    made = [document("w" * 9, f"{i}.py", "code:generated") for i in range(40)]
    train, _ = split(code + made + maths)
    assert 10 <= len(maths) - sum(d["kind"] == "math" for d in train) <= 30
    validation = split(code + text + maths)[1]
    held = {kind: {d["path"] for d in validation if d["kind"] == kind}
            for kind in ("code", "text", "math")}
    assert held["code"] == held["text"] == {d["path"] for d in split(code)[1]}
    assert 10 <= len(held["math"]) <= 30


def test_too_little_to_split():
    with pytest.raises(InputError, match="1 documents are too few"):
        split([document("x", "a.py")])


@pytest.fixture
def copies(code_folder):
    """The folder with an exact copy, a near one, a generated file, and copies of all else."""
    text = (code_folder / "a" / "part0.py").read_text()
    (code_folder / "a" / "zcopy.py").write_text(text.replace("\n", "  \n"))
    text = text.replace("a_0_3", "other").replace("a_0_9", "new")
    (code_folder / "h" / "znear.py").write_text(text)
    (code_folder / "b" / "made.py").write_text("# autogenerated\nx = 1\n")
    (code_folder / "b" / "picture.png").write_bytes(b"PNG")
    return code_folder


def test_every_file_is_accounted_for(copies, tmp_path):
    manifest = prepare_data(tmp_path / "out", [copies])
    reasons = manifest["funnel"]["reason"]
    assert {name: entry["documents"] for name, entry in reasons.items()} == {
        "kept": 16, "exact duplicate": 1, "near duplicate": 1, "generated": 1,
        "language unknown": 1}
    files = [path for path in copies.rglob("*") if path.is_file()]
    assert sum(entry["bytes"] for entry in reasons.values()) == sum(
        path.stat().st_size for path in files)
    lines = (tmp_path / "out/data/dropped.jsonl").read_text().splitlines()
    dropped = {row["path"]: (row["reason"], row["value"]) for row in map(json.loads, lines)}
    assert dropped == {
        "a/zcopy.py": ("exact duplicate", "a/part0.py"),
        "h/znear.py": ("near duplicate", "a/part0.py"),
        "b/picture.png": ("language unknown", "png"), "b/made.py": ("generated", "autogenerated")}
    paths = [d["path"] for part in ("train", "validation")
             for d in load_documents(tmp_path / "out", part)]
    assert len(set(paths)) == 16 and not set(paths) & set(dropped)
    assert (tmp_path / "out/data/funnel.png").read_bytes()[:4] == b"\x89PNG"


def test_copies_of_held_out_code_are_left_out(code_folder, tmp_path):
    """At a similarity from 0.5 to 0.7: no duplicate, but too near to what is held out."""
    manifest = prepare_data(tmp_path / "out", [code_folder])
    [held, *_] = load_documents(tmp_path / "out", "validation")
    lines = held["text"].split("\n\n")
    half = "\n\n".join(lines[:18] + CODE.split("\n\n"))
    assert 0.5 < jaccard(shingles(half), shingles(held["text"])) < 0.7
    (code_folder / held["path"]).with_name("part9.py").write_text("")       # its module stays held
    for module in "abcdefgh":
        (code_folder / module / "half.py").write_text(half if module != held["path"][0] else "")
    again = prepare_data(tmp_path / "new", [code_folder])
    reasons = again["funnel"]["reason"]
    assert again["validation"]["sha256"] == manifest["validation"]["sha256"]
    assert reasons["like a validation document"]["documents"] == 1
    assert reasons["exact duplicate"]["documents"] == 6


def test_the_same_bytes_from_any_number_of_workers(copies, tmp_path, monkeypatch):
    monkeypatch.setattr("support.sources.BATCH_FILES", 3)
    for workers in (1, 2, 4):
        prepare_data(tmp_path / f"out{workers}", [copies], workers=workers)
    for name in ("train.jsonl", "validation.jsonl", "dropped.jsonl", "manifest.json"):
        assert len({(tmp_path / f"out{workers}" / "data" / name).read_bytes()
                    for workers in (1, 2, 4)}) == 1, name


def test_prepare_is_made_once(code_folder, tmp_path):
    manifest = prepare_data(tmp_path / "out", [code_folder])
    prepare_tokenizer(tmp_path / "out", 400)
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 16
    made = (tmp_path / "out/data/train.jsonl").stat().st_mtime_ns
    assert prepare_data(tmp_path / "out", [code_folder]) == manifest
    assert (tmp_path / "out/data/train.jsonl").stat().st_mtime_ns == made
    with pytest.raises(InputError, match=r"was made from sources .*code'\], not \['stdlib'\]"):
        prepare_data(tmp_path / "out", ["stdlib"])
    with pytest.raises(InputError, match=r"was made from benchmarks .*, not \['other.jsonl'\]"):
        prepare_data(tmp_path / "out", [code_folder], benchmark_files=[tmp_path / "other.jsonl"])
    with pytest.raises(InputError, match="was made from vocab_size 400, not 500"):
        prepare_tokenizer(tmp_path / "out", 500)
    prepare_tokenizer(tmp_path / "out", 500, fresh=True)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").vocab_size <= 500
    (code_folder / "h" / "new.py").write_text(CODE)
    prepare_data(tmp_path / "out", [code_folder], fresh=True)
    with pytest.raises(InputError, match="tokenizer was made from documents "):
        prepare_tokenizer(tmp_path / "out", 500)


def test_a_tokenizer_sees_some_of_all_when_there_is_too_much(code_folder, tmp_path, monkeypatch):
    prepare_data(tmp_path / "out", [code_folder])
    texts = [d["text"] for d in load_documents(tmp_path / "out", "train")]
    most = sum(map(len, texts)) // 2
    monkeypatch.setattr(data, "TOKENIZER_TEXT", most)
    with mock.patch.object(Tokenizer, "train", side_effect=Tokenizer.train) as train:
        prepare_tokenizer(tmp_path / "out", 400)
    seen = [text for text in train.call_args.args[0] if text]
    assert sum(map(len, seen)) == most and all(
        any(text.startswith(part) for text in texts) for part in seen)
    order = [next(i for i, text in enumerate(texts) if text.startswith(part)) for part in seen]
    assert order != sorted(order) and max(order) > len(texts) // 2 > min(order)


def test_what_grounding_drops_is_not_lost_as_code(code_folder, tmp_path, monkeypatch):
    """A file that is code and grounding counts as code; only the rest has to pass the stages."""
    code_folder = code_folder.rename(tmp_path / "src")          # "src" sorts behind "grounding:src"
    monkeypatch.chdir(tmp_path)
    (code_folder / "a" / "README.md").write_text("Prose of a program, in words.\n" * 20)
    monkeypatch.setattr(data, "filter_grounding", lambda rows, teacher: [
        data.drop(row, "grounding stage 1") for row in data.remaining(rows)
        if row["kind"] == "grounding"] and [])
    prepare_data(tmp_path / "out", ["grounding:src", "src"])
    rows = [d for part in ("train", "validation") for d in load_documents(tmp_path / "out", part)]
    assert [d["kind"] for d in rows if d["path"] == "a/README.md"] == ["code"]


def test_empty_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="no source code found there"):
        prepare_data(tmp_path / "out", [tmp_path / "in"])
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="no source code found there"):
        prepare_data(tmp_path / "out", [tmp_path / "in"])
    for name in ("b.py", "c.py"):
        (tmp_path / "in" / name).write_text("def f(:")
    (tmp_path / "in" / "build").mkdir()
    with pytest.raises(InputError) as error:
        prepare_data(tmp_path / "out", [tmp_path / "in"])
    assert str(error.value).endswith(
        "no source code found there (does not parse: 2, such as b.py; language unknown: 1, such as "
        "a.png; skipped folder: 1, such as build/)")
    (tmp_path / "in" / "a.md").write_text("Words alone are no code to measure. " * 20)
    with pytest.raises(InputError, match="no source code found there"):
        prepare_data(tmp_path / "out", [f"text:{tmp_path / 'in'}"])
    assert not (tmp_path / "out" / "data").exists()


def test_why(tmp_path, capsys):
    (tmp_path / "a.py").write_text("# autogenerated\nx = 'me@work.org'\n")
    (tmp_path / "b.py").write_text("value = 'me@work.org'\n")
    data.why(tmp_path / "a.py")
    out = capsys.readouterr().out
    assert "DROPS  generated: autogenerated" in out and "dropped: generated" in out
    data.why(tmp_path / "b.py")
    assert "kept, with fakes for private data" in capsys.readouterr().out
    for cells in ([], [{"cell_type": "code", "source": ["x = 'a_b'"]}]):
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "more": "x" * 5000}))
        data.why(tmp_path / "n.ipynb")
        out = capsys.readouterr().out
        assert ("DROPS" not in out and "kept, as it is" in out) if cells else "empty" in out
    (tmp_path / "mark.py").write_bytes(b"\xef\xbb\xbf")
    data.why(tmp_path / "mark.py")
    assert "dropped: empty" in capsys.readouterr().out
    with pytest.raises(InputError, match="c.py: no such file"):
        data.why(tmp_path / "c.py")
