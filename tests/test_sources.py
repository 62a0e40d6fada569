"""pytest tests/test_sources.py"""

import gzip
import io
import json
import os
import random
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

import data
import support.sources
from data import documents, load_documents, prepare_data
from support.files import InputError, walk_files

INTEGER = b"int identifier;\n"


def gathered(source):
    """The documents of a source as (path, text, language, repo), and how often what was dropped."""
    dropped = []
    found = [(d["path"], d["text"], d["language"], d["repo"])
             for d in documents(str(source), dropped)]
    return found, sorted((d["reason"], d["path"]) for d in dropped)


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
    monkeypatch.setattr(os, "walk", walk)
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
    (tmp_path / "junk.tar.gz").write_bytes(b"no archive")
    assert gathered(tmp_path / "junk.tar.gz") == (
        [], [("archive broken from here on", "junk.tar.gz")])
    monkeypatch.setattr(support.sources, "LARGEST_ARCHIVE", 1 << 20)
    bomb = tar(tmp_path / "bomb.tar.gz", {f"{i}.c": b" " * 900_000 for i in range(3)})
    with pytest.raises(InputError, match="bomb.tar.gz: unpacks to more than"):
        gathered(bomb)
    names = {"one.tar.gz", "old.tar", "big.tar", "cut.tar", "junk.tar.gz", "bomb.tar.gz",
             "x.tar.xz"}
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
    (tmp_path / "a.jsonl.parts" / "a.c").write_bytes(INTEGER)
    assert len(gathered(tmp_path / "a.jsonl.parts")[0]) == 1        # a folder, whatever its name


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "code.zip", "notes.txt"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"[]")
    with pytest.raises(InputError, match=f"{name}: this type of file is not read; give a folder, "
                                         "an archive .* or JSON Lines"):
        gathered(tmp_path / name)


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
    monkeypatch.setattr(support.sources, "LARGEST_ARCHIVE", 1000)
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
    monkeypatch.setattr(requests.Session, "request", lambda *args, **kwargs: pytest.fail())
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
    monkeypatch.setattr(data, "file_batches", lambda source: [])
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
    path = tmp_path / ("t.jsonl.gz" if packed else "t.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
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
