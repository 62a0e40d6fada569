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

import pytest
import requests

import support.sources
from data import documents
from support.files import InputError, walk_files

INTEGER = b"int identifier;\n"


def gathered(source):
    """The documents of a source as (path, text, language, repo), and (reason, path) of the rest."""
    dropped = []
    kept = [(d["path"], d["text"], d["language"], d["repo"])
            for d in documents(str(source), dropped)]
    return kept, sorted((d["reason"], d["path"]) for d in dropped)


def test_files_are_read_safely(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.py").write_text("secret")
    for name, content in {"b.py": b"\xef\xbb\xbfvalue = 1\r\n", "a.c": INTEGER,
                          "sub/c.py": b"yes\n", "big.py": b"x" * 1_000_001, "latin.py": b"\xe9",
                          "nul.py": b"a\0b", "empty.py": b" \n", "picture.png": b"x",
                          "x.so": b"x" * 1_000_001}.items():
        (root / name).write_bytes(content)
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.py")
    assert gathered(root) == (
        [("a.c", INTEGER.decode(), "c", "root"), ("b.py", "value = 1\n", "python", "root"),
         ("sub/c.py", "yes\n", "python", "root")],
        [("binary", "nul.py"), ("empty", "empty.py"), ("language unknown", "picture.png"),
         ("language unknown", "x.so"), ("link or no plain file", "link.py"),
         ("link or no plain file", "pipe.py"), ("not UTF-8", "latin.py"), ("over 1 MB", "big.py")])
    (root / "sub" / "README.md").write_text("Some words for a reader. " * 20)
    text, dropped = gathered(f"text:{root}")
    assert [path for path, *_ in text] == ["sub/README.md"]
    assert ("language unknown", "a.c") in dropped and ("little prose", "b.py") in dropped


def test_skipped_folders(tmp_path):
    """data.py and fim.py share one list; files identify virtual environments and caches."""
    files = ("own.c", "node_modules/a.c", "sub/vendor/a.c", "build/a.c", ".git/a.c", "env/a.c",
             "env/pyvenv.cfg", "env/lib/b.c", "conda/conda-meta/x", "conda/b.c", "target/a.c",
             "target/CACHEDIR.TAG", "aop/target/own.c", "venv/own.c", "__pycache__/a.c")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(INTEGER)
    assert [path.relative_to(tmp_path).as_posix() for path in walk_files(tmp_path)] == [
        "own.c", "aop/target/own.c", "venv/own.c"]
    _, dropped = gathered(tmp_path)
    assert [path for reason, path in dropped if reason == "skipped folder"] == [
        ".git/", "build/", "conda/", "env/", "node_modules/", "sub/vendor/", "target/"]
    assert {path.name for path in walk_files(tmp_path / "env")} == {"a.c", "b.c", "pyvenv.cfg"}


def test_a_folder_that_cannot_be_listed_is_counted(code_folder, monkeypatch):
    def walk(root, onerror):
        for folder, subfolders, files in real_walk(root):
            if "b" in subfolders:
                onerror(PermissionError(13, "Permission denied", str(root / "b")))
                subfolders.remove("b")
            yield folder, subfolders, files

    real_walk = os.walk
    monkeypatch.setattr(os, "walk", walk)
    kept, dropped = gathered(code_folder)
    assert len(kept) == 14 and dropped == [("link or no plain file", "b")]


def test_standard_library_without_tests():
    names = {name for batch in support.sources.file_batches("stdlib") for name in batch.names}
    assert {"json/decoder.py", "argparse.py"} <= names and len(names) > 300
    assert not [name for name in names if re.search(r"\btests?/.", name)]


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


def test_archives_are_read_in_memory(tmp_path):
    hostile = {"p/a.c": INTEGER, "../out.c": INTEGER, "/abs.c": INTEGER, "p/../../up.c": INTEGER,
               "p/big.c": b"x" * 1_000_001, "p/hard.c": (tarfile.LNKTYPE, "/etc/passwd"),
               "p/soft.c": (tarfile.SYMTYPE, "/etc/passwd"), "p/dev.c": (tarfile.CHRTYPE, "")}
    kept, dropped = gathered(tar(tmp_path / "one.tar.gz", hostile))
    assert kept == [("p/a.c", INTEGER.decode(), "c", "one")]
    assert dropped == [
        *(("link or no plain file", f"p/{name}.c") for name in ("dev", "hard", "soft")),
        ("over 1 MB", "p/big.c"),
        *(("path leaves the archive", name) for name in ("../out.c", "/abs.c", "p/../../up.c"))]
    assert [path.name for path in tmp_path.iterdir()] == ["one.tar.gz"]
    kept, _ = gathered(tar(tmp_path / "old.tar", {"caf\udce9.c": INTEGER}, "w"))    # Latin-1
    assert kept == [("caf?.c", INTEGER.decode(), "c", "old")]


def test_damaged_archives(tmp_path, monkeypatch):
    archive = tar(tmp_path / "cut.tar", {f"{i}.c": INTEGER * 400 for i in range(9)}, "w")
    archive.write_bytes(archive.read_bytes()[:30_000])
    kept, dropped = gathered(archive)
    assert len(kept) == 4 and dropped == [("archive broken from here on", "cut.tar")]
    noise = random.Random(0).randbytes(30_000)
    archive = tar(tmp_path / "x.tar.xz", {"a.c": noise, "b.c": noise}, "w:xz")
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    archive.write_bytes(damaged)
    assert gathered(archive)[1] == [("archive broken from here on", "x.tar.xz")]
    monkeypatch.setattr(support.sources, "LARGEST_ARCHIVE", 1 << 20)
    bomb = tar(tmp_path / "bomb.tar.gz", {f"{i}.c": b" " * 900_000 for i in range(3)})
    with pytest.raises(InputError, match="bomb.tar.gz: unpacks to more than"):
        gathered(bomb)


def test_rows_of_a_table(tmp_path):
    mark = "\ufeff"                                             # left by `cat` of several files
    rows = [json.dumps({"text": "int one;\n", "path": "a.c", "repo": "q"}), "{broken",
            mark + json.dumps({"content": "int two;\n"}), json.dumps({"code": "x"}), "[1]",
            json.dumps({"text": "x" * 1_000_001})]
    with gzip.open(tmp_path / "t.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(rows))
    kept, dropped = gathered(f"text:{tmp_path / 't.jsonl.gz'}")
    assert kept == [("a.c", "int one;\n", "text", "q"),
                    ("t.jsonl.gz:3", "int two;\n", "text", "t")]
    assert [reason for reason, _ in dropped] == ["no row with a text"] * 3 + ["over 1 MB"]
    (tmp_path / "a.jsonl.parts").mkdir()
    (tmp_path / "a.jsonl.parts" / "a.c").write_bytes(INTEGER)
    assert len(gathered(tmp_path / "a.jsonl.parts")[0]) == 1        # a folder, whatever its name


def test_github(tmp_path, monkeypatch):
    """An archive is downloaded once. The server is busy, then breaks off, then resumes."""
    noise = random.Random(0).randbytes(1 << 20).hex().encode()
    archive = tar(tmp_path / "x.tar.gz", {"r-1/a.c": INTEGER, "r-1/noise": noise}).read_bytes()
    half = len(archive) // 2
    requested = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append((self.path, self.headers.get("Range")))
            if len(requested) == 1:
                return self.send_error(503)
            start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(archive) - start))
            self.end_headers()
            self.wfile.write(archive[start:] if len(requested) > 2 else archive[:half])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MINICODER_GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="the same command continues where it stopped"):
        gathered("github:me/r@v1")
    for _ in range(2):
        assert gathered("github:me/r@v1")[0][0][::2] == ("r-1/a.c", "c")
    assert [path for path, _ in requested] == ["/me/r/tar.gz/v1"] * 3
    assert re.fullmatch("bytes=[1-9][0-9]*-", requested[2][1])
    for ref in ("v/1", "v-1"):                                  # two branches, two archives
        assert gathered(f"github:me/r@{ref}")[0][0][::2] == ("r-1/a.c", "c")
        assert requested[-1][0] == f"/me/r/tar.gz/{ref}"
    monkeypatch.setattr(support.sources, "LARGEST_ARCHIVE", 1000)
    with pytest.raises(InputError, match="/me/r/tar.gz/v2: larger than 1,000 bytes"):
        gathered("github:me/r@v2")
    server.shutdown()


@pytest.mark.parametrize("source,message", [
    ("nowhere", "--source nowhere: no such file or folder; expected a folder, an archive"),
    ("math:nowhere", "--source math:nowhere: no such file or folder"), ("", "no such file"),
    ("no.tar.gz", "--source no.tar.gz: no such file"), ("caf\udce9", "its name is not UTF-8"),
    ("rows.json", "--source rows.json: cannot be read; expected a folder, .* JSON Lines"),
    ("text:generated", "expected math:generated or code:generated"),
    ("github:me", "expected github:owner/name"), ("github:me/../r", "expected github:owner/name"),
    ("https://github.com/pallets/flask", "GitHub repository as --source github:owner/name"),
    ("text:https://me:secret@host/code.tar.gz", "URLs are not read; download the files")])
def test_sources_that_are_refused(source, message, tmp_path, monkeypatch):
    """In one line, without a request, and without showing what may be secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(requests.Session, "request", lambda *args, **kwargs: pytest.fail())
    (tmp_path / "rows.json").write_bytes(b"[]")
    with pytest.raises(InputError, match=message) as error:
        gathered(source)
    assert "secret" not in str(error.value)


def test_folders_named_like_a_kind_or_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.c").write_bytes(INTEGER)
    for source in ("text", "./packages", "code:./packages"):
        assert [path for path, *_ in gathered(source)[0]] == ["a.c"]
