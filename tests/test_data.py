"""pytest tests/test_data.py"""

import contextlib
import gzip
import io
import json
import os
import random
import re
import struct
import tarfile
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CODE, answered, reference_data

import data
import evaluate
from data import (
    BANDS,
    LANGUAGE_OF,
    ROWS,
    RULES,
    Batches,
    Contamination,
    broken_rule,
    candidate_pairs,
    check_document_starts,
    documents,
    jaccard,
    language_of,
    load_documents,
    near_duplicates,
    notebook_script,
    prepare_data,
    prepare_tokenizer,
    replace_private,
    shingles,
    signature,
    split,
)
from fim import MIDDLE, PREFIX, SUFFIX, fim_document, syntax_nodes
from support.files import InputError, walk_files
from tokenizer import Tokenizer

INTEGER = b"int identifier;\n"


def document(text, path, source="s"):
    return {"text": text, "path": path, "source": source, "repo": "r", "language": "python",
            "bytes": len(text), "text_bytes": len(text), "kind": "code"}


def gathered(source):
    """The documents of a source as (path, text, language, repo), and how often what was dropped."""
    dropped = []
    found = [(d["path"], d["text"], d["language"], d["repo"])
             for d in documents(str(source), dropped)]
    return found, sorted((d["reason"], d["path"]) for d in dropped)


# ---- sources


def test_files_are_read_safely(tmp_path):
    root = tmp_path / "root"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "sub" / "node_modules").mkdir()
    (tmp_path / "secret.py").write_text("secret")
    for name, content in {"b.py": b"\xef\xbb\xbfvalue = 1\r\n", "a.c": INTEGER,
                          "sub/c.py": b"yes\n", "big.py": b"x" * 1_000_001, "latin.py": b"\xe9",
                          "nul.py": b"a\0b", "empty.py": b" \n", "picture.png": b"x",
                          "x.so": b"x" * 1_000_001,
                          "sub/.git/d.py": b"z\n", "sub/node_modules/e.js": b"z\n"}.items():
        (root / name).write_bytes(content)
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    skipped = [("skipped folder", "sub/.git/"), ("skipped folder", "sub/node_modules/")]
    assert gathered(root) == (
        [("a.c", INTEGER.decode(), "c", "root"), ("b.py", "value = 1\n", "python", "root"),
         ("sub/c.py", "yes\n", "python", "root")],
        [("binary", "nul.py"), ("empty", "empty.py"), ("language unknown", "picture.png"),
         ("language unknown", "x.so"), ("link or no plain file", "link.py"),
         ("link or no plain file", "pipe.py"), ("not UTF-8", "latin.py"), ("over 1 MB", "big.py"),
         *skipped])
    (root / "sub" / "README.md").write_text("Some words for a reader. " * 20)
    text, dropped = gathered(f"text:{root}")
    assert [path for path, *_ in text] == ["sub/README.md"]
    assert ("language unknown", "a.c") in dropped and ("little prose", "b.py") in dropped


def test_a_folder_that_cannot_be_listed_is_counted(code_folder, monkeypatch):
    def walk(root, onerror):
        for folder, subfolders, files in real(root):
            if "b" in subfolders:
                onerror(PermissionError(13, "Permission denied", str(root / "b")))
                subfolders.remove("b")
            yield folder, subfolders, files

    real = os.walk
    monkeypatch.setattr(data.os, "walk", walk)
    found, dropped = gathered(code_folder)
    assert len(found) == 14 and dropped == [("link or no plain file", "b")]


def test_standard_library_without_tests():
    paths = [d["path"] for d in documents("stdlib")]
    assert {"json/decoder.py", "argparse.py"} <= set(paths) and len(paths) > 300
    assert len(set(paths)) == len(paths)
    assert not [path for path in paths if {"test", "tests", "encodings"} & set(path.split("/"))]
    # what rules that look for parts of words drop
    assert {"secrets.py", "plistlib.py", "getpass.py", "hashlib.py"} <= set(paths)


def tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return path


def test_archives_are_read_in_memory(tmp_path, monkeypatch):
    evil = {"p/a.c": INTEGER, "../out.c": INTEGER, "/abs.c": INTEGER, "p/../../up.c": INTEGER,
            "p/big.c": b"x" * 1_000_001, "p/hard.c": (tarfile.LNKTYPE, "/etc/passwd"),
            "p/soft.c": (tarfile.SYMTYPE, "/etc/passwd"), "p/dev.c": (tarfile.CHRTYPE, "")}
    before = sorted(tmp_path.rglob("*"))
    found, dropped = gathered(tar(tmp_path / "one.tar.gz", evil))
    assert found == [("p/a.c", INTEGER.decode(), "c", "one")]
    links, leaves = "link or no plain file", "path leaves the archive"
    assert dropped == [(links, "p/dev.c"), (links, "p/hard.c"), (links, "p/soft.c"),
                       ("over 1 MB", "p/big.c"), (leaves, "../out.c"), (leaves, "/abs.c"),
                       (leaves, "p/../../up.c")]
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("b/a.c", INTEGER)
        archive.writestr("../out.c", INTEGER)
        archive.writestr("big.c", b"x" * 1_000_001)
    assert gathered(tmp_path / "two.zip") == (
        [("b/a.c", INTEGER.decode(), "c", "two")], [("over 1 MB", "big.c"), (leaves, "../out.c")])
    lie = (tmp_path / "two.zip").read_bytes().replace(struct.pack("<I", 1_000_001),
                                                      struct.pack("<I", 1_000))
    (tmp_path / "lie.zip").write_bytes(lie)
    assert gathered(tmp_path / "lie.zip") == (
        [("b/a.c", INTEGER.decode(), "c", "lie")],
        [("archive broken from here on", "lie.zip"), (leaves, "../out.c")])
    found, _ = gathered(tar(tmp_path / "old.tar", {"caf\udce9.c": INTEGER}, "w"))   # Latin-1
    assert found == [("caf?.c", INTEGER.decode(), "c", "old")]
    whole = tar(tmp_path / "big.tar", {f"{i}.c": INTEGER * 400 for i in range(9)}, "w").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:30_000])
    found, dropped = gathered(tmp_path / "cut.tar")
    assert len(found) == 4 and dropped == [("archive broken from here on", "cut.tar")]
    noise = random.Random(0).randbytes(30_000)
    whole = bytearray(tar(tmp_path / "x.tar.xz", {"a.c": noise, "b.c": noise}, "w:xz").read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / "x.tar.xz").write_bytes(whole)
    assert gathered(tmp_path / "x.tar.xz")[1] == [("archive broken from here on", "x.tar.xz")]
    for name in ("junk.tar.gz", "junk.zip"):
        (tmp_path / name).write_bytes(b"no archive")
        assert gathered(tmp_path / name) == ([], [("archive broken from here on", name)])
    monkeypatch.setattr(data, "LARGEST_ARCHIVE", 1 << 20)
    bomb = tar(tmp_path / "bomb.tar.gz", {f"{i}.c": b" " * 900_000 for i in range(3)})
    with pytest.raises(InputError, match="bomb.tar.gz: unpacks to more than"):
        gathered(bomb)
    names = {"one.tar.gz", "two.zip", "lie.zip", "old.tar", "big.tar", "cut.tar", "junk.tar.gz",
             "junk.zip", "bomb.tar.gz", "x.tar.xz"}
    assert {path.name for path in tmp_path.rglob("*")} - {p.name for p in before} == names


def test_rows_of_a_table(tmp_path):
    rows = [json.dumps({"text": "int one;\n", "path": "a.c", "repo": "q"}), "{broken",
            json.dumps({"content": "int two;\n"}), json.dumps({"code": "x"}), "[1]",
            json.dumps({"text": "x" * 1_000_001})]
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    found, dropped = gathered(f"text:{tmp_path / 't.jsonl.gz'}")
    assert found == [("a.c", "int one;\n", "text", "q"),
                     ("t.jsonl.gz:3", "int two;\n", "text", "t")]
    assert [reason for reason, _ in dropped] == ["no row with a text"] * 3 + ["over 1 MB"]
    (tmp_path / "a.jsonl.parts").mkdir()
    (tmp_path / "a.jsonl.parts" / "t.json").write_text('[\n{"text": "plain words"}]')
    assert len(gathered(f"math:{tmp_path / 'a.jsonl.parts' / 't.json'}")[0]) == 1
    (tmp_path / "n.json").write_text("5")
    assert gathered(tmp_path / "n.json") == ([], [("archive broken from here on", "n.json")])
    (tmp_path / "t.json").write_text(json.dumps([{"text": "plain words"}]))
    assert gathered(f"math:{tmp_path / 't.json'}")[0] == [("t.json:1", "plain words", "text", "t")]


def test_github(tmp_path, monkeypatch):
    """A repository comes as an archive, once; the server first fails, then gives half."""
    noise = random.Random(0).randbytes(3 << 20).hex().encode()
    archive = tar(tmp_path / "x.tar.gz", {"r-1/a.c": INTEGER, "r-1/noise": noise}).read_bytes()
    half, asked = len(archive) // 2, []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Range")))
            if len(asked) == 1:
                return self.send_error(503)
            start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(archive) - start))
            if start:
                whole = len(archive)
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            self.end_headers()
            self.wfile.write(archive[start:] if start else archive[:half])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MINICODER_GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert gathered("github:me/r@v1")[0][0][::2] == ("r-1/a.c", "c")
    assert [path for path, _ in asked] == ["/me/r/tar.gz/v1"] * 3
    assert re.fullmatch("bytes=[1-9][0-9]*-", asked[2][1])      # what it had was not asked again
    for ref in ("v/1", "v-1"):                                  # two branches, two archives
        assert gathered(f"github:me/r@{ref}")[0][0][::2] == ("r-1/a.c", "c")
        assert asked[-1][0] == f"/me/r/tar.gz/{ref}"
    monkeypatch.setattr(data, "LARGEST_ARCHIVE", 1000)
    with pytest.raises(InputError, match="/me/r/tar.gz/v2: larger than 1,000 bytes"):
        gathered("github:me/r@v2")
    server.shutdown()
    for name in ("github:me", "github:me/../r", "github:a b/c"):
        with pytest.raises(InputError, match="expected github:owner/name"):
            gathered(name)


def test_missing_sources():
    for name in ("nowhere", "math:nowhere", "", "svn:x"):
        with pytest.raises(InputError, match=f"--source {name}: no such folder"):
            list(documents(name))
    with pytest.raises(InputError, match="its name is not UTF-8"):
        list(documents("caf\udce9"))
    with pytest.raises(InputError, match="--source no.tar.gz: no such file"):
        list(documents("no.tar.gz"))


@pytest.mark.parametrize("url,place", [
    ("https://github.com/pallets/flask", "github:pallets/flask"),
    ("https://github.com/pallets/flask/", "github:pallets/flask"),
    ("http://www.github.com/pallets/flask.git", "github:pallets/flask"),
    ("HTTPS://GitHub.com/pallets/flask.js/tree/2.3.x/src", "github:pallets/flask.js@2.3.x"),
    ("https://github.com/pallets/flask/blob/main/README.md#top", "github:pallets/flask@main"),
    ("https://github.com/pallets/flask?tab=readme", "github:pallets/flask"),
    ("https://me:secret@github.com/pallets/flask", "github:pallets/flask"),
    ("git@github.com:pallets/flask.git", "github:pallets/flask"),
    ("github.com/pallets/flask", "github:pallets/flask"),
    ("https://github.com/pallets", None), ("https://notgithub.com/a/b", None),
    ("https://github.com.evil.org/a/b", None),
    ("http://127.0.0.1:1/v1", None), ("https://host/rows.jsonl?key=secret", None),
    ("https://me:secret@host/code.tar.gz", None)])
def test_a_url_is_no_source(url, place, monkeypatch):
    """It is refused without a request, and what is secret in it is not shown."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setattr(data.requests.Session, "request", lambda *args, **kwargs: pytest.fail())
    for kind in ("", "code:", "text:", "math:"):
        with pytest.raises(InputError) as error:
            prepare_data("nowhere", [kind + url])
        assert "secret" not in str(error.value)
        if place:
            assert str(error.value).endswith(f"give --source {place}")
        else:
            assert "--teacher URL" in str(error.value) and "github:" not in str(error.value)


def test_a_checkout_named_like_a_url_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("github.com/o/r").mkdir(parents=True)
    Path("github.com/o/r/a.c").write_bytes(INTEGER)
    assert [path for path, *_ in gathered("github.com/o/r")[0]] == ["a.c"]


def test_folders_named_like_a_kind_or_a_place(code_folder, tmp_path, monkeypatch, capsys):
    """`--source text` is the folder; `packages` is not, which is said."""
    monkeypatch.chdir(tmp_path)
    for name in ("text", "packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.c").write_bytes(INTEGER)
        data.explain_place(name)
    assert capsys.readouterr().out == ("--source packages: the installed packages; for the folder "
                                       "packages give ./packages\n")
    data.explain_place("text:packages")
    assert capsys.readouterr().out.endswith("give text:./packages\n")
    for name in ("./packages", "code:./packages", "stdlib", "code"):    # the last: no folder `code`
        data.explain_place(name)
    assert capsys.readouterr().out == ""
    for name in ("text", "./packages", "code:./packages"):
        assert [path for path, *_ in gathered(name)[0]] == ["a.c"]
    monkeypatch.setattr(data, "units", lambda source: [])
    with pytest.raises(InputError, match="no files"):
        prepare_data("out", ["packages"])
    assert "the installed packages; for the folder" in capsys.readouterr().out


def test_skipped_folders(tmp_path):
    """One list for data.py and fim.py; virtual environments and caches are known by their files."""
    files = ("own.c", "node_modules/a.c", "sub/vendor/a.c", "build/a.c", ".git/a.c", "env/a.c",
             "env/pyvenv.cfg", "env/lib/b.c", "conda/conda-meta/x", "conda/b.c", "target/a.c",
             "target/CACHEDIR.TAG", "aop/target/own.c", "venv/own.c", "__pycache__/a.c")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(INTEGER)
    assert [path.relative_to(tmp_path).as_posix() for path in walk_files(tmp_path)] == [
        "own.c", "aop/target/own.c", "venv/own.c"]
    found, dropped = gathered(tmp_path)
    assert sorted(path for path, *_ in found) == ["aop/target/own.c", "own.c", "venv/own.c"]
    assert [path for _, path in dropped] == [
        ".git/", "build/", "conda/", "env/", "node_modules/", "sub/vendor/", "target/"]
    assert {path.name for path in walk_files(tmp_path / "env")} == {"a.c", "b.c", "pyvenv.cfg"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_is_left_out(tmp_path, packed):
    mark, rows = b"\xef\xbb\xbf", [{"text": "plain words"}, {"text": "more words"}]
    lines = b"".join(mark + json.dumps(row).encode() + b"\n" for row in rows)   # joined with cat
    for name, content in (("t.jsonl", lines), ("t.json", mark + json.dumps(rows).encode())):
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
        found, dropped = gathered(f"text:{path}")
        assert [text for _, text, *_ in found] == ["plain words", "more words"] and not dropped
    cells = [{"cell_type": "code", "source": "value = name"}]
    (tmp_path / "nb").mkdir()
    (tmp_path / "nb" / "a.ipynb").write_bytes(mark + json.dumps({"cells": cells}).encode())
    assert gathered(tmp_path / "nb")[0][0][1] == "value = name\n"
    (tmp_path / "data").mkdir()
    for name in ("validation", "train"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(mark + b'{"text": "int a;"}\n')
        assert load_documents(tmp_path, name)[0]["text"] == "int a;"


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
        text = data.worked_problems(number)
        assert text == data.worked_problems(number) != data.worked_problems(number + 1)
        for problem in text.strip().split("\n\n"):
            have = float(re.search(r"has (\d+) ", problem)[1])
            steps = re.findall(r"has (\S.*?) = (\d+) ", problem)
            for equation, result in steps:
                assert eval(equation) == int(result) and float(equation.split()[0]) == have
                have = int(result)
            assert steps and problem.endswith(f"The answer is {have}.")
            assert evaluate.final_number(problem) == have and have >= 0


def test_generated_programs_run_to_what_they_say():
    """Each step has a twin of other code; what both do not agree on is left out and counted."""
    sandboxed = []
    assert all(documents("code:generated", sandboxed))
    reasons = Counter(row["reason"] for row in sandboxed)
    assert set(reasons) == {"program runs to something else"} and 0 < sum(reasons.values()) < 20
    for number in range(60):
        text, expected = data.generated_program(number)
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(
                IndexError, ValueError):
            exec(text, {})
            assert output.getvalue() == expected
    assert data.generated_program(5) == data.generated_program(5) != data.generated_program(6)


def test_a_question_is_asked_again_but_paid_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    troubles = [(429, b"slow down"), (500, b""), (200, b"{"), (200, {"choices": []}),
                answered(None), answered([{"text": "4"}]), answered("four\ud83d")]
    teacher.answer, teacher.keys = lambda body: troubles.pop(0), ["Bearer secret"]
    question = [{"role": "user", "content": "2 + 2?"}]
    for _ in range(2):
        assert data.ask(teacher.url, question, tries=9, temperature=0) == "four?"
    path, key, body = teacher.asked[-1]
    assert len(teacher.asked) == 7 and path == "/v1/chat/completions" and key == "Bearer secret"
    assert body == {"model": "teacher-7b", "messages": question, "temperature": 0}
    teacher.answer = lambda body: answered(body["model"] + str(body.get("seed")))
    assert data.ask(teacher.url + "#other", question, seed=1) == "other1"
    assert data.ask(teacher.url + "#other", question, seed=2) == "other2"
    assert data.ask(teacher.url, question, seed=2) == "teacher-7b2"
    with monkeypatch.context() as patch:                        # the server has another model now
        patch.setattr(data, "first_model", lambda server: "student")
        assert data.ask(teacher.url, question, seed=2) == "student2"
    questions = [[{"role": "user", "content": str(n)}] for n in range(20)]
    before = len(teacher.asked)
    teacher.answer = lambda body: answered(body["messages"][0]["content"])
    assert data.ask_all(teacher.url, questions * 2) == [str(n) for n in range(20)] * 2
    assert len(teacher.asked) == before + 20
    [kept] = [file for file in (tmp_path / "cache" / "answers").iterdir()
              if "four" in file.read_text()]
    assert "secret" not in kept.read_text()
    kept.write_text("")                                         # cut off by a kill
    teacher.answer = lambda body: answered("five")
    assert data.ask(teacher.url, question, temperature=0) == "five"


def test_a_teacher_that_does_not_answer(teacher, monkeypatch):
    teacher.answer = lambda body: (401, b"no such\nkey")
    with pytest.raises(InputError, match=r"v1: HTTP 401 no such key$"):
        data.ask(teacher.url, [])
    assert len(teacher.asked) == 1                              # asking again would not help
    teacher.answer, rests = lambda body: (503, b""), []
    with monkeypatch.context() as patch, pytest.raises(
            InputError, match=r"no answer \(HTTP 503 \); the same command goes on"):
        patch.setattr(data, "RETRY_SECONDS", 1)
        patch.setattr(data.time, "sleep", rests.append)
        data.ask(teacher.url, [])
    assert rests == [0, 1, 2, 4, 8] and len(teacher.asked) == 6     # none after the last
    with pytest.raises(InputError, match="lists no model .ConnectionError.; expected a running"):
        data.ask("http://127.0.0.1:1/v1", [])
    for url in ("https://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(InputError, match="holds no key: give it as OPENAI_API_KEY"):
            data.ask(url, [])
    for url in ("localhost:8000/v1", "ftp://host/v1", ""):
        with pytest.raises(InputError, match="expected the URL of an OpenAI-compatible server"):
            data.teacher_units(url)
    teacher.keys = ["Bearer other"]
    data.first_model.cache_clear()
    with pytest.raises(InputError, match="lists no model .HTTP 401."):
        data.ask(teacher.url, [])


def test_the_key_follows_no_redirect(teacher, monkeypatch):
    """Not even to the same host: neither the key nor the texts go where nobody sent them."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", teacher.url + "/chat/completions")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(InputError, match="lists no model .HTTP 307."):
        data.ask(url, [])
    with pytest.raises(InputError, match="redirects to another address, which is not followed"):
        data.ask(url + "#model", [])
    server.shutdown()
    server.server_close()
    assert asked == ["/v1/models", "/v1/chat/completions"] and not teacher.asked


def test_programs_by_a_teacher(teacher, code_folder, tmp_path, monkeypatch):
    """A program is kept if it prints what the teacher said; other forms of answers are counted."""
    monkeypatch.setattr(data, "SYNTHETIC_FILES", 4)
    replies = ["Sure.\n```python\nprint(6 * 7)\n```\nIt prints:\n```text\n42\n```\n",
               "```python\nprint(6 * 7)\n```\n```text\n43\n```", "I cannot.",
               "```python\nimport os\nprint(os.listdir('/etc'))\n```\n```text\n[]\n```"]
    order, lock = [], threading.Lock()

    def answer(body):
        with lock:
            order.append(body["messages"][0]["content"])
            return answered(replies[len(order) - 1])

    teacher.answer = answer
    rows = [row for unit in data.teacher_units(teacher.url)
            for row in data.cleaned(unit, Contamination([]))]
    dropped = [row for row in rows if "reason" in row]
    [kept] = [row for row in rows if "text" in row]
    assert kept["text"] == "print(6 * 7)\n" and kept["language"] == "python"
    assert Counter(row["reason"] for row in dropped) == {
        "program runs to something else": 2, "program without a result": 1}
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


def test_private_data_get_fakes():
    cases = {"mail me@work.org or a.b+c@x-y.co.uk.": "mail user@example.com or user@example.com.",
             "x = a@b.weight  # user@example.org": "x = a@b.weight  # user@example.org",
             "at 93.184.216.34:80": "at 192.0.2.1:80", "version 1.2.3.4": "version 1.2.3.4",
             "127.0.0.1 10.0.0.7 8.8.8.8 1.2.3.4.5 999.1.1.1":
                 "127.0.0.1 10.0.0.7 8.8.8.8 1.2.3.4.5 999.1.1.1",
             "AKIA" + "ABCDEFGHIJKLMNOP": "KEY", "ghp_" + "a1" * 18: "KEY",
             "-----BEGIN RSA PRIVATE KEY-----\n" + "a1b2" * 16 + "\n-----END RSA PRIVATE KEY-----":
                 "KEY",
             "ME@WORK.COM and from 93.184.216.34.": "user@example.com and from 192.0.2.1.",
             r'"Mail:\nme@work.org"': r'"Mail:\nuser@example.com"',       # in source: an escape
             r"Doe\\jane@uni.edu": r"Doe\\user@example.com",
             r"CORP\john@corp.com": r"CORP\user@example.com",
             r'"\t93.184.216.34"': r'"\t192.0.2.1"', r'"\nsk-' + "a" * 40 + '"': r'"\nKEY"'}
    assert {text: replace_private(text) for text in cases} == cases
    code = ['START = b"-----BEGIN OPENSSH PRIVATE KEY-----"\nEND = b"-----END OPENSSH PRIVATE '
            'KEY-----"', 'ObjectIdentifier("2.5.29.17")', "git clone git@github.com:o/r.git"]
    assert all(replace_private(kept) == kept for kept in (*code, *cases.values()))


@pytest.mark.parametrize("text", [
    "kim@firma.co.kr", "li@uni.edu.tw", "a@b.co", "o'neil <x@y.museum>", "jörg@müller.de",
    "a+tag@sub.x-y.technology", "me@xn--bcher-kva.xn--p1ai", "kim@163.com", "(me@work.pizza)",
    "mail: me@work.org.", "mailto:me@work.ai", "http://h.de/?mail=me@work.org"])
def test_addresses_of_any_domain(text):
    address = re.search(r"[\w+]+@[\w.-]*\w", text)[0]
    assert replace_private(text) == text.replace(address, "user@example.com")


@pytest.mark.parametrize("text", [
    "icon@2x.png", "logo@large.svg", "left-pad@1.2.3", "lib@1.2.3.tgz", "react@^18.2.0",
    "user@host", "@app.route('/')", "x = q@k.transpose(1)", "x = a@b.weight",
    "y = x@self.scale.real", "return a@b.inv@c.imag", "git@github.com:o/r.git",
    "ssh://me@host.org/x", "s@foo@bar.baz@", "this@MainActivity.field", "getty@tty1.service",
    "https://unpkg.com/vue@3.2.1/dist/vue.js",
    "kim@example.org", "kim@mail.example.com", "kim@host.test", "a @ b.com", "memcpy@GLIBC_2.14"])
def test_what_is_no_address(text):
    assert replace_private(text) == text


@pytest.mark.parametrize("text,password", [
    ("postgres://kim:s3cr3t@db.firma.de/x", "s3cr3t"), ("redis://:p%40ss@10.0.0.7:6379", "p%40ss"),
    ("https://kim:ghx@[2001:db8::1]/", "ghx"), ("http://u:a:b@host", "a:b"),
    ("amqps://u:p@ss@host", "p@ss"),
    ("http://kim:${PASSWORD}@host.de", None), ("http://{user}:{key}@host.de", None),
    ("http://user:password@host.de", None), ("http://%s:%s@host.de", None),
    ("http://a:b@localhost:80/", None), ("http://host.de:80/@kim", None)])
def test_passwords_in_urls(text, password):
    replaced = text.replace(f":{password}@", ":KEY@")
    assert replace_private(text) == replaced == replace_private(replaced)


def test_ip_addresses():
    public = "2a00:1450:4001:82f::200e"
    fakes = {f"http://[{public}]:80/": "http://[2001:db8::1]:80/", f"{public}/64": "2001:db8::1/64",
             public.upper(): "2001:db8::1", "2606:4700::1111,": "2001:db8::1,",
             "2001:470:1f0b:1:2:3:4:5": "2001:db8::1", "2a00:1450:4001::93.184.216.34":
             "2001:db8::1", f"at {public}.": "at 2001:db8::1.", f"{public}%et": "2001:db8::1%et",
             "::ffff:93.184.216.34": "::ffff:192.0.2.1", "a 2a00:1450::1:0: b": "a 2001:db8::1: b",
             "93.184.216.34-93.184.216.40": "192.0.2.1-192.0.2.1",
             '"\\n' + public + '"': '"\\n2001:db8::1"', 'if ip == "93.184.216.34"':
             'if ip == "192.0.2.1"', "<ip>93.184.216.34</ip>": "<ip>192.0.2.1</ip>",
             "host = 93.184.216.34": "host = 192.0.2.1", "http://93.184.216.34/a":
             "http://192.0.2.1/a", "version 2.1 at 93.184.216.34": "version 2.1 at 192.0.2.1"}
    for name in ("server", "reverse", "verify", "covers", "release_host =", "Version: 2\n"):
        fakes[f"{name} 93.184.216.34"] = f"{name} 192.0.2.1"
    assert {text: replace_private(text) for text in fakes} == fakes
    kept = ["::1", "fe80::1%eth0", "fd12:3456:789a::1", "2001:db8::8a2e:370:7334", "x[2000::2]",
            "x[2000:3000:2]", "std::vector<int>", "a::b::c", "12:30:45", "2023:10:05 12:30:45",
            "2c:54:91:88:c9:e3", "20:c9:d0:7a:fa:31", "a {color: #2a2a2a}", "2001:4860:4860::8888",
            "x[2000::]", "sha256:2a2a:3b3b", "2000: 3f3f 4a4a",
            'VERSION = "4.12.33.100"', '"version": "4.12.33.100"', "<Version>4.12.33.100</Version>",
            'versions = ["14.12.33.100", "14.12.33.101"]', "pip install x==14.12.33.100",
            "x>=14.12.33.100", "v14.12.33.100", "v 14.12.33.100", "14.12.33.100-beta",
            "14.12.33.100b", "14.12.33.100.7", 'AssemblyVersion("14.12.33.100")',
            "Chrome/14.12.33.100", "pkgver=14.12.33.100", "'==14.12.33.100'", "tag: 14.12.33.100",
            "Version `14.12.33.100`", "The version number is 14.12.33.100",
            "x-14.12.33.100.tar.gz", "libx-14.12.33.100", "10.2.4\t16.8.172.17\t1.47.0",
            "14.12.33.300", "min_version='14.12.33.100'", "release 14.12.33.100",
            "__version__ = '14.12.33.100'"]
    assert [replace_private(text) for text in kept] == kept


LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 5
HEX = "0a1b2c3d4e5f6789" * 4


@pytest.mark.parametrize("key", [
    "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59], *(f"gh{c}_" + LETTERS[:36] for c in "pousr"),
    "glpat-" + LETTERS[:20], "xoxb-123456789012-123456789012-" + LETTERS[:24],
    "https://hooks.slack.com/services/T0123ABCD/B0123ABCD/" + LETTERS[:24],
    "sk_live_" + LETTERS[:24], "rk_live_" + LETTERS[:24], "sk-" + LETTERS[:48], "sk-" + HEX[:32],
    "sk-proj-" + LETTERS[:20] + "_-" + LETTERS[:40], "sk-ant-api03-" + LETTERS[:93] + "-AA",
    "hf_" + LETTERS[:34], "ASIA" + "ABCDEFGHIJKLMNOP", "AIza" + LETTERS[:35], "npm_" + LETTERS[:36],
    "pypi-AgEI" + LETTERS[:80], "SG." + LETTERS[:22] + "." + LETTERS[:43], "SK" + HEX[:32],
    "123456789:AA" + LETTERS[:33], f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:30]}.{LETTERS[:43]}",
    "dop_v1_" + HEX, "hvs." + LETTERS[:24]])
def test_keys_of_every_kind(key):
    fake = "https://KEY" if key.startswith("https") else "KEY"
    for text in ("{}", "key = '{}'", "KEY={}\n", '"\\n{}"', "Bearer {}, "):
        assert replace_private(text.format(key)) == text.format(fake)
    assert replace_private("x" + key) == "x" + key or key.startswith(("https", "1"))


@pytest.mark.parametrize("text", [
    "sk-toggleable-content-with-a-long-name", "task-0123456789abcdef0123456789abcdef",
    "hf_hub_download", "npm_config_registry", "SK1234", "glpat-", "eyJ.eyJ.", "AKIA",
    "sk_live_", "xoxb-"])
def test_what_is_no_key(text):
    assert replace_private(text) == text


def test_secret_keys_that_a_name_tells():
    secret = (LETTERS + "/+")[-40:]
    for text in ("AWS_SECRET_ACCESS_KEY={}\n", 'aws_secret_access_key = "{}"',
                 '{{"aws_secret_access_key": "{}"}}'):
        assert replace_private(text.format(secret)) == text.format("KEY")


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
    values = np.arange(1, 140, dtype=np.uint64)
    chain = [values[:100], values[10:110], values[20:120], values[30:130]]      # 0.82 to the next
    first = near_duplicates(np.array([signature(data.mixed(v)) for v in chain]), lambda i: chain[i])
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
    assert contamination.hit("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]") is not None  # the report's


def test_hits_are_listed(code_folder, tmp_path):
    words = "to be or not — to be that is the question whether nobler in the mind"
    (tmp_path / "plays.jsonl").write_text(json.dumps({"task_id": "H/1", "prompt": words}))
    (code_folder / "a" / "play.py").write_text(f"# {words}\nSPEAKER = 'Hamlet'\n")
    prepare_data(tmp_path / "out", [code_folder], benchmark_files=[tmp_path / "plays.jsonl"])
    [line] = (tmp_path / "out/data/contamination.jsonl").read_text().splitlines()
    hit = json.loads(line)
    assert hit["path"] == "a/play.py" and hit["value"][0] == "plays H/1"
    assert hit["value"][1] == " ".join(words.split()[:10])
    assert line in (tmp_path / "out/data/dropped.jsonl").read_text().splitlines()


def test_what_everybody_writes_is_no_contamination(contamination):
    for text in (CODE, "[1,2,3,4,5,6,7,8,9,10,11,12]", "total = 0\nfor row in range(height):",
                 "for i in range(n):\n    for j in range(n):\n        total += 1", ""):
        assert contamination.hit(text) is None, text


def test_benchmarks_and_real_repositories(tmp_path):
    """Every problem is found in itself, and in a repository that has solved some of them."""
    files = [reference_data(f"eval/{name}.jsonl.gz") for name in ("HumanEval", "mbpp")]
    found = Contamination(files)
    for _, row in data.read_rows(files[0]):
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
    assert data.grounded(good.format(n="my")) == 1 / 13
    assert data.grounded("Nothing but prose, of prices and a total.") == 0
    draw = random.Random(0)
    texts = []
    for n in range(400):
        explained = n % 4                                       # how many functions are spoken of
        parts = ["Once upon a time there was a king who had a daughter."] * draw.randrange(3, 9)
        parts += ["How to call the function that adds the prices in a list."] * explained
        texts.append("\n\n".join(parts + [good.format(n=f"f{n}_{i}") for i in range(explained)]))
    order = draw.sample(range(400), 400)
    stage_of, done = data.coarse_to_fine(
        [len(texts[i]) for i in order], lambda i: texts[order[i]],
        lambda texts: [data.grounded(text) for text in texts], shares=(0.7, 0.6, 0.6))
    explained = Counter((stage_of[i], order[i] % 4) for i in range(400))
    assert explained[0, 3] > 60 and explained[0, 2] < 20 and not explained[0, 1]
    assert explained[1, 0] == 100 and len(done) == 3
    bars = [stage["bar"] for stage in done]
    assert bars == sorted(bars) and bars[0] < bars[-1] and done[0]["auc"] > 0.95
    sizes = [sum(len(texts[i]) for i in order)] + [stage["bytes"] for stage in done]
    assert all(0.5 < after / before <= 0.7 for before, after in zip(sizes, sizes[1:]))
    for stage, about in enumerate(done, 1):
        assert about["documents"] == (stage_of == 0).sum() + (stage_of > stage).sum()
    most = data.coarse_to_fine([9] + [1] * 119, lambda i: f"w{i % 3} word" * (i % 3 + 1),
                               lambda texts: [5 - 4 * ("w0" in text) for text in texts], (0.7,))
    assert len(most[1]) == 1                            # the median is the best mark: the rest goes
    assert data.coarse_to_fine([1] * 10, str, lambda texts: [0] * len(texts))[1] == []
    assert data.coarse_to_fine([1] * 90, str, lambda texts: [0] * len(texts))[1] == []


def test_grounding_of_real_documents(tmp_path, teacher, code_folder):
    """The Python enhancement proposals, marked by what they hold and by a teacher."""
    source = f"grounding:{reference_data('text/peps.jsonl.gz')}"
    few = tmp_path / "few.jsonl"
    with gzip.open(source.partition(":")[2], "rt") as file:
        rows = [json.loads(line)["text"] for line in file][:160]
    few.write_text("".join(json.dumps({"text": text[:3000]}) + "\n" for text in rows))
    manifest = prepare_data(tmp_path / "out", [code_folder, f"grounding:{few}"])
    reasons, stages = manifest["funnel"]["reason"], manifest["grounding"]
    assert len(stages) >= 2 and stages[-1]["mean mark"] > stages[0]["mean mark"]
    assert sum(entry["documents"] for name, entry in reasons.items()
               if name.startswith("grounding stage")) == 160 - stages[-1]["documents"]
    assert (tmp_path / "out/data/grounding.png").read_bytes()[:4] == b"\x89PNG"
    kept = [d for d in load_documents(tmp_path / "out", "train") if d["kind"] == "grounding"]
    assert len(kept) == stages[-1]["documents"]
    teacher.answer = lambda body: answered(
        str(5 * ("Abstract" in body["messages"][0]["content"])) + " points")
    assert data.taught_marks(teacher.url, [text[:3000] for text in rows[:30]]) == [
        5.0 if "Abstract" in text[:3000] else 0.0 for text in rows[:30]]
    marks = {"On a scale from 0 to 5, I give 4.": 4, "<think>It has 3 parts</think>\n5": 5,
             "10": 0, "3.5 out of 5": 3.5, "**4**/5": 4, "I cannot judge 2024 documents": 0}
    teacher.answer = lambda body: answered(body["messages"][0]["content"].split("\n\n")[1])
    assert data.taught_marks(teacher.url, list(marks)) == list(marks.values())


def test_headers_get_their_language(tmp_path):
    for n in range(40):
        (tmp_path / f"c{n}.c").write_text(f"struct item{n} *first;\nint count(struct one *a);\n")
        (tmp_path / f"p{n}.cpp").write_text(f"namespace n{n} {{ class Box : public Base {{}}; }}\n")
    (tmp_path / "plain.h").write_text("struct item *next;\nint sum(struct item *all);\n")
    (tmp_path / "rich.h").write_text("namespace names { class Bag : public Base {}; }\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "Some words. " * 30, "path": "w.h"}))
    manifest = prepare_data(tmp_path / "out", [tmp_path, f"text:{tmp_path / 'rows.jsonl'}"])
    rows = [d for part in ("train", "validation") for d in load_documents(tmp_path / "out", part)]
    named = {d["path"]: d["language"] for d in rows}
    assert named["plain.h"] == "c" and named["rich.h"] == "c++" and named["w.h"] == "text"
    assert manifest["language accuracy"] == {".h: c, c++": 1.0}


# ---- repositories


def order_of(files, language):
    documents = [{"path": path, "text": text, "language": language} for path, text in files.items()]
    return [document["path"] for document in data.dependency_order(documents)]


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
    """Files in the order of need, as the figure has them, cut between files."""
    files = {"a.py": "import b\n", "b.py": "x = 1\n", "big.py": "y = 2\n" * 40}
    found = [{"path": path, "text": text, "language": "python", "source": "s", "repo": "me/r"}
             for path, text in files.items()] + [
        {"path": "z.py", "text": "z = 3", "language": "python", "source": "s", "repo": "me/other"}]
    texts = [small_tokenizer.decode(ids)
             for ids in data.repository_documents(found, small_tokenizer, 10_000)]
    assert texts == [
        "<|repo_name|>me/other\n<|file_sep|>z.py\nz = 3",
        "<|repo_name|>me/r\n<|file_sep|>b.py\nx = 1\n\n<|file_sep|>a.py\nimport b\n\n"
        "<|file_sep|>big.py\n" + files["big.py"]]
    assert list(data.repository_documents(found, small_tokenizer, 10_000))[1] == (
        small_tokenizer.encode(texts[1], allow_special=True))
    parts = list(data.repository_documents(found, small_tokenizer, 60))
    texts = [small_tokenizer.decode(ids) for ids in parts]
    assert [re.findall(r"\w+\.py", text) for text in texts] == [
        ["z.py"], ["b.py", "a.py"], ["big.py"]]
    assert max(len(ids) for ids in parts[:2]) <= 60 < len(parts[2])
    assert texts[2].endswith(files["big.py"])
    assert all(text.startswith("<|repo_name|>me/") for text in texts)
    assert list(data.repository_documents([], small_tokenizer, 60)) == []


def test_fim_of_repositories(corpus, small_tokenizer):
    """Of what a row holds of a repository the last file is cut, its path before the sentinels."""
    batches = make(corpus * 3, small_tokenizer, fim_rate=1.0, repositories=True, seq_len=160)
    special, paths, cut = small_tokenizer.special, 0, 0
    for index in range(60):
        inputs, targets, starts = (column.tolist() for column in batches.row(index))
        source = small_tokenizer.decode(batches.slice(index)[2])
        for start in sorted(set(starts)):
            stop = max(i for i in range(160) if starts[i] == start) + 1
            places = [i for i in range(start, stop) if inputs[i] == special[PREFIX]]
            if not places:
                continue
            before = small_tokenizer.decode(inputs[start:places[0]])
            assert before in source and data.FILE_SEP not in small_tokenizer.decode(
                inputs[places[0]:stop])
            paths += bool(re.search(r"<.file_sep.>\d+\.py\n+$", before))
            [at] = places                               # what is seen begins anew with each part
            end = next(i for i in range(at, stop) if targets[i] == batches.end)
            prefix, suffix, middle = re.fullmatch(
                r"(?s)<.fim_prefix.>(.*)<.fim_suffix.>(.*)<.fim_middle.>(.*)",
                small_tokenizer.decode(inputs[at:end + 1])).groups()
            assert prefix + middle + suffix in source
            cut += 1
    assert 25 < paths < cut and cut > 120


def test_syntax_nodes_of_repositories(small_tokenizer):
    """Those of each Python file, where it stands among the others."""
    found = [{"path": path, "text": text, "language": "python", "source": "s", "repo": "me/r"}
             for path, text in (("a.py", CODE), ("b.go", CODE), ("c.py", "# ☃\nf(1)\n" + CODE))]
    documents = list(data.repository_documents(found, small_tokenizer, 10_000)) * 3
    stream = data.Stream("code", documents, small_tokenizer, 16, 0)
    text = small_tokenizer.decode(documents[0])
    nodes = stream.nodes(stream.starts[1] + 1, stream.starts[2])
    own, extra = syntax_nodes(CODE), syntax_nodes("# ☃\nf(1)\n")
    assert [(node.kind, text[node.start:node.end]) for node in nodes] == [
        (node.kind, part[node.start:node.end])
        for part, nodes in ((CODE, own), ("# ☃\nf(1)\n", extra), (CODE, own)) for node in nodes]


def test_order_of_a_real_repository():
    """Of flask's own imports that are in no circle, all point backwards."""
    found = [d for d in documents(str(reference_data("repos/flask.tar.gz")))
             if "/src/flask/" in d["path"]]
    order = data.dependency_order(found)
    place = {d["path"]: i for i, d in enumerate(order)}
    needed = data.dependencies(found)
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
    assert not (tmp_path / "out/data.unfinished").exists()


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
    assert reasons["like a held-out document"]["documents"] == 1
    assert reasons["exact duplicate"]["documents"] == 6


def test_the_same_bytes_from_any_number_of_workers_and_after_a_kill(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "UNIT_FILES", 3)
    for workers in (1, 2, 4):
        prepare_data(tmp_path / f"out{workers}", [copies], workers=workers)
    process, done = data.process_unit, []

    def killed(unit, stem, files):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(stem)
        process(unit, stem, files)

    monkeypatch.setattr(data, "process_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(tmp_path / "killed", [copies], workers=1)
    monkeypatch.setattr(data, "process_unit", lambda unit, stem, files: (
        done.append(stem), process(unit, stem, files)))
    prepare_data(tmp_path / "killed", [copies], workers=1)
    assert len(done) == len(set(done)) == 7                     # 20 files, three at a time
    for name in ("train.jsonl", "validation.jsonl", "dropped.jsonl", "manifest.json"):
        assert len({(tmp_path / out / "data" / name).read_bytes()
                    for out in ("out1", "out2", "out4", "killed")}) == 1, name


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
    monkeypatch.setattr(data.Corpus, "filter_grounding", lambda self, teacher: [
        row.update(reason="grounding stage 1", value=None) for row in self.kept()
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


# ---- batches


@pytest.fixture(scope="module")
def corpus():
    long = [document(CODE.replace("item", f"item{i}") * (1 + i % 5), f"{i}.py") for i in range(12)]
    short = [document(f"x = {i}\n" * (1 + i % 3), f"short{i}.py") for i in range(8)]
    return long + short


def make(corpus, tokenizer, **other):
    return Batches(corpus, tokenizer, **{"seq_len": 64, "batch_rows": 8, **other})


def test_rows_without_fim_are_slices_of_the_stream(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.0)
    for index in range(60):
        inputs, targets, starts = batches.row(index)
        stream, _, ids = batches.slice(index)
        assert stream.name == "code" and inputs.tolist() == ids[:-1] and targets.tolist() == ids[1:]
        opened = np.flatnonzero(inputs == batches.end)
        expected = [max([0, *opened[opened <= i]]) for i in range(64)]
        assert starts.tolist() == expected


@pytest.mark.parametrize("row,message", [
    ([0, 0, 1, 1], "document_starts[1, 2] is 1, expected 0 (as before) or 2"),      # begun before
    ([0, 1, 0, 0], "document_starts[1, 2] is 0, expected 1 (as before) or 2"),      # falls
    ([0, 0, 3, 3], "document_starts[1, 2] is 3"), ([1, 1, 2, 3], "document_starts[1, 0] is 1")])
def test_wrong_document_starts_are_refused(row, message):
    with pytest.raises(ValueError) as error:
        check_document_starts(np.array([[0, 1, 1, 3], row]))
    assert message in str(error.value)


def test_an_epoch_visits_every_slice_once(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer)
    stream = batches.streams["code"]
    n = stream.rows
    for epoch in range(2):
        slices = sorted(tuple(batches.slice(epoch * n + i)[2]) for i in range(n))
        expected = [tuple(stream.ids[stream.offset + i * 64:stream.offset + i * 64 + 65].tolist())
                    for i in range(n)]
        assert slices == sorted(expected)
    first, second = ([tuple(batches.slice(epoch * n + i)[2]) for i in range(n)]
                     for epoch in range(2))
    assert first != second
    assert batches.epochs(n) == {"code": 8.0}


def test_a_mixture_holds_in_every_window(corpus, small_tokenizer):
    """Of any 40 rows in a row 28, 8 and 4, give or take one; each kind goes on where it was."""
    corpus = corpus + [{**d, "kind": kind, "text": f"{kind} " * 3 + d["text"]}
                       for kind in ("text", "math") for d in corpus]
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    kinds = [batches.slice(index)[0].name for index in range(400)]
    for start in range(360):
        window = kinds[start:start + 40]
        assert [window.count(kind) for kind in ("code", "text", "math")] == pytest.approx(
            [28, 8, 4], abs=1)
    for kind in ("code", "text", "math"):
        own = [batches.slice(i)[1:] for i in range(400) if kinds[i] == kind]
        stream = batches.streams[kind]
        assert own == [stream.slice(i) for i in range(len(own))]
        fim = [small_tokenizer.special[PREFIX] in batches.row(i)[0] for i in range(400)
               if kinds[i] == kind]
        assert any(fim) == (kind == "code")                     # text and math are read as they are
    only = make(corpus, small_tokenizer, mixture=(0, 3, 1))
    assert "-".join(only.round) in ("text-text-math-text", "text-math-text-text")
    with pytest.raises(InputError, match="no documents of the mixture"):
        make([d for d in corpus if d["kind"] == "code"], small_tokenizer, mixture=(0, 1, 1))
    for wrong in ("70", "70:20", "0:0:0", "a:b:c", "1:2:-3"):
        with pytest.raises(InputError, match="as in 70:20:10"):
            data.parse_mixture(wrong)


def test_fim_rows(corpus, small_tokenizer):
    """Every FIM piece is whole inside its row, holds the text of its slice, and is closed."""
    batches = make(corpus, small_tokenizer, fim_rate=1.0)
    special, pieces, lost = small_tokenizer.special, 0, 0
    for index in range(80):
        inputs, targets, starts = (column.tolist() for column in batches.row(index))
        ids = inputs + [targets[-1]]
        assert len(inputs) == len(targets) == len(starts) == 64
        for i in range(63):
            assert starts[i + 1] == i + 1 or targets[i] in (inputs[i + 1], -100, batches.end)
        source = small_tokenizer.decode(batches.slice(index)[2])
        for at in [i for i, token in enumerate(ids) if token == special[PREFIX]]:
            suffix, middle = ids.index(special[SUFFIX], at), ids.index(special[MIDDLE], at)
            close = next(i for i in range(middle + 1, 65) if targets[i - 1] == batches.end)
            assert at < suffix < middle < close and len(set(starts[at:close])) == 1
            parts = [small_tokenizer.decode(ids[a + 1:b]) for a, b in
                     ((at, suffix), (middle, close), (suffix, middle))]
            assert "".join(parts) in source
            pieces += 1
        lost += targets.count(-100)
    assert pieces > 80 and lost < 0.03 * 80 * 64


def test_syntax_nodes_of_a_piece(small_tokenizer):
    """A piece of a document has those nodes of the document that lie in it, wherever it was cut."""
    text = "# ünïcode ☃ 日本\n" + CODE
    documents = [{"text": "x = 1\n", "language": "python"}, {"text": text, "language": "python"},
                 {"text": CODE, "language": "go"}] * 3
    stream = data.Stream("code", data.encoded_documents(documents, small_tokenizer),
                         small_tokenizer, 16, 0, [d["language"] == "python" for d in documents])
    whole = {(node.kind, text[node.start:node.end]) for node in syntax_nodes(text)}
    start, stop = stream.starts[1] + 1, stream.starts[2]
    found = stream.nodes(start, stop)
    assert {(node.kind, text[node.start:node.end]) for node in found} == whole
    seen = 0
    for first in range(start, stop - 20, 7):
        nodes = stream.nodes(first, first + 20)
        piece = small_tokenizer.decode_bytes(stream.ids[first:first + 20].tolist()).decode(
            errors="ignore")
        assert {(node.kind, piece[node.start:node.end]) for node in nodes} <= whole
        seen += len(nodes)
    assert seen > 15
    assert stream.nodes(stream.starts[2] + 1, stream.starts[3]) == []   # another language


def test_a_fim_piece_is_cut_at_its_ends(corpus, small_tokenizer):
    """The middle stays whole: the suffix loses its end, then the prefix its start."""
    batches, ids = make(corpus, small_tokenizer), small_tokenizer.encode(CODE)[:40]
    text, special = small_tokenizer.decode(ids), small_tokenizer.special
    lost, none = Counter(), 0
    for seed in range(300):
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        new = batches.fim_piece(ids, syntax_nodes(text), rng)
        prefix, middle, suffix = fim_document(text, again, syntax_nodes(text))
        if new is None:
            none += 1
            assert len(small_tokenizer.encode(middle)) > len(ids) - 3
            continue
        at = [new.index(special[name]) for name in (PREFIX, SUFFIX, MIDDLE)]
        parts = [small_tokenizer.decode(new[a + 1:b]) for a, b in zip(at, [*at[1:], None])]
        assert at == sorted(at) and len(new) <= len(ids) and parts[2] == middle
        assert prefix.endswith(parts[0]) and suffix.startswith(parts[1])
        lost["suffix"] += parts[1] != suffix
        lost["prefix"] += parts[0] != prefix
        assert parts[0] == prefix or parts[1] == ""
    assert lost["suffix"] > 200 and 0 < lost["prefix"] < 150 and 0 < none < 60


def test_fim_rate_is_held(corpus, small_tokenizer):
    batches = make(corpus, small_tokenizer, fim_rate=0.5)
    pieces = fim = parts = 0
    for index in range(400):
        if batches.end not in batches.slice(index)[2][1:-1]:        # all of one document
            inputs, _, starts = batches.row(index)
            pieces += 1
            cut = (inputs == batches.tokenizer.special[PREFIX]).sum()
            fim, parts = fim + (cut > 0), parts + cut
            assert (cut > 0) == starts.any()        # what is not FIM stays one document
    assert fim / pieces == pytest.approx(0.5, abs=0.08)
    assert 2 < parts / fim < 4                      # of 16 to 25 tokens, in 64


def test_a_row_depends_on_seed_step_and_place_alone(corpus, small_tokenizer):
    one = make(corpus, small_tokenizer, device_batch=4)
    again = make(corpus, small_tokenizer, device_batch=4)
    again(7)                                                # another history
    two = [make(corpus, small_tokenizer, device_batch=2, rank=rank, world=2) for rank in range(2)]
    for step in (0, 1, 30):
        rows = torch.cat([batch["input_ids"] for batch in one(step)])
        assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in again(step)]))
        assert torch.equal(rows, torch.cat([batch["input_ids"] for b in two for batch in b(step)]))
        count = sum(batch["count"] for batch in one(step))
        assert count == sum(batch["count"] for b in two for batch in b(step))
    other = make(corpus, small_tokenizer, seed=1)
    assert not torch.equal(one(0)[0]["input_ids"], other(0)[0]["input_ids"][:4])


def test_batches_refuse_what_cannot_work(corpus, small_tokenizer):
    with pytest.raises(InputError, match="too few for rows of 4096"):
        make(corpus[:2], small_tokenizer, seq_len=4096)
    with pytest.raises(InputError, match="8 rows a step cannot be shared evenly by 3 processes"):
        make(corpus, small_tokenizer, world=3)
