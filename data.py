"""Source trees to documents, documents to batches.

A raw crawl is mostly not worth reading. This file gathers files from folders, archives, JSON lines
and GitHub, names their language, drops by rules what is generated, minified, encoded or broken,
replaces private data, drops exact and near duplicates and what resembles a benchmark, filters what
is written about code in four stages, holds whole modules out for validation, and accounts for every
byte it dropped. Synthetic programs are kept if they run to what they should print. The tokenizer is
trained here too, on training documents only (report, section 3.1; thresholds of StarCoder2, arXiv
2402.19173, and DeepSeek-Coder, arXiv 2401.14196, to which it points).

The default corpus is what every machine already has: the Python standard library without its tests,
the prose of its docstrings, generated word problems, and for sizes from `small` on the packages
installed beside it; code, text and mathematics are mixed 70:20:10 (report, section 3.1.2).

A batch row is made on the fly and is a pure function of (seed, step, row): the state of the loader
is the step, and the batch at a step is the same on one device and on eight.

This file knows nothing of models and optimizers (model.py, pretrain.py) nor of the FIM format
(fim.py).

    python data.py                                 # out/data and out/tokenizer, about 12 s
    python data.py --source ~/my/code --source github:pallets/flask --out mine
    python data.py --source stdlib --source grounding:packages --source code:generated --out mine
    python data.py --teacher http://localhost:8000/v1 --out taught    # a model writes programs, too
    python data.py --why FILE                      # what each rule says of a file; seconds
"""

import argparse
import ast
import contextlib
import functools
import gzip
import hashlib
import heapq
import ipaddress
import json
import keyword
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import stat
import sys
import sysconfig
import tarfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from evaluate import benchmark_file, benchmarks, read_documents
from fim import (FILE_SEP, FIM_RATE, Node, fim_document, fim_ids, nodes_of, normalize, python_tree,
                 repository_ids, syntax_nodes, words_of)
from support.files import (SKIPPED_FOLDERS, InputError, cache_folder, fetch, read_json, read_rows,
                           run, walk_files, whole_folder, write_json, write_text)
from support.sandbox import Sandbox, cores
from tokenizer import ENDOFTEXT, Tokenizer

STDLIB_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
LARGEST_FILE = 1_000_000    # bytes
LARGEST_ARCHIVE = 2 << 30   # bytes that an archive may have, and may unpack to
UNIT_FILES = 256            # that one process reads in one go
HELD_OUT_SHARE = 0.05       # of the corpus' text, in whole top-level modules; not published; ours
NEAR = 0.7                  # Jaccard similarity of a near-duplicate; value of The Stack
NEAR_HELD_OUT = 0.5         # of a copy of a held-out document; not published; ours
SHINGLE = 5                 # words that make a shingle
BANDS, ROWS = 18, 7         # of a signature; a pair at 0.8 is missed once in 69 times
MIXTURE = (70, 20, 10)      # of code, text and mathematics, by tokens (report, section 3.1.2)
RETRY_SECONDS = 1           # before a teacher is asked again; twice that each time
SHORTEST_FIM = 16           # tokens; smaller pieces are not worth cutting in three
# The size of a FIM part, as shares of a row of files, of repositories; not published; ours
FIM_PART = (0.1, 0.4), (0.05, 0.2)
TOKENIZER_TEXT = 100_000_000    # characters that a tokenizer is trained on, at most


def generator(seed, purpose, index):
    """Randomness that depends on nothing but its three names."""
    return np.random.default_rng([seed, *purpose.encode(), index])


# ------------------------------------------------------------------------------------------------
# Languages

# The report's 92, with the endings (or whole names) of their files
LANGUAGES = """
ada adb ads; agda agda; alloy als; antlr g4; applescript applescript scpt; assembly asm s S nasm;
augeas aug; awk awk; batchfile bat cmd; bluespec bsv; c c h; c# cs csx; c++ cc cpp cxx hpp hh hxx;
clojure clj cljs cljc; cmake cmake CMakeLists.txt; coffeescript coffee; common-lisp lisp lsp cl;
css css; cuda cu cuh; dart dart; dockerfile dockerfile Dockerfile; elixir ex exs; elm elm;
emacs-lisp el; erlang erl hrl; f# fs fsi fsx; fortran f f90 f95 f03 f08 for; glsl glsl vert frag;
go go; groovy groovy gradle; haskell hs; html html htm xhtml; idris idr; isabelle thy; java java;
java-server-pages jsp; javascript js jsx mjs cjs; json json; julia jl; jupyter-notebook ipynb;
kotlin kt kts; lean lean; literate-agda lagda; literate-coffeescript litcoffee;
literate-haskell lhs; lua lua; makefile mk mak Makefile makefile GNUmakefile; maple mpl;
markdown md markdown; mathematica nb wl; matlab m; objectc++ mm; ocaml ml mli; pascal pas pp;
perl pl pm; php php; powershell ps1 psm1; prolog pro; protocol-buffer proto; python py pyi pyw;
r r R; racket rkt; restructuredtext rst; rmarkdown rmd Rmd; ruby rb rake Rakefile Gemfile; rust rs;
sas sas; scala scala sc; scheme scm ss; shell sh bash zsh ksh; smalltalk st; solidity sol;
sparql rq sparql; sql sql; stan stan; standard-ml sml sig; stata do ado; swift swift;
systemverilog sv svh; tcl tcl; tcsh tcsh csh; tex tex sty cls; thrift thrift; typescript ts tsx;
verilog v vh; vhdl vhd vhdl; visual-basic vb bas vbs; vue vue; xslt xsl xslt; yacc y yy;
yaml yaml yml; zig zig
"""
LANGUAGE_OF = {ending: name for line in LANGUAGES.split(";")
               for name, *endings in [line.split()] for ending in endings}
AMBIGUOUS = {"h": ("c", "c++", "objectc++"), "pl": ("perl", "prolog"),
             "v": ("verilog", "systemverilog")}                 # by a classifier
INTERPRETERS = {"python": "python", "bash": "shell", "sh": "shell", "zsh": "shell", "node":
                "javascript", "perl": "perl", "ruby": "ruby", "lua": "lua", "awk": "awk", "tclsh":
                "tcl", "Rscript": "r", "php": "php", "tcsh": "tcsh", "csh": "tcsh"}


def language_of(path, data=None):
    """The language of a file by its name, else by its first line (#!); None: not of the 92."""
    name = path.rsplit("/", 1)[-1]
    ending = name.rpartition(".")[2]
    for key in (name, ending, ending.lower()):
        if key in LANGUAGE_OF:
            return LANGUAGE_OF[key]
    if match := re.match(rb"#!.*?/(?:env\s+)?([A-Za-z]+)[\d.]*\s", (data or b"")[:200]):
        return INTERPRETERS.get(match[1].decode())
    return None


# ------------------------------------------------------------------------------------------------
# Sources -> files

# What is read at once: of a folder some files, of an archive or .jsonl file all of it
Unit = namedtuple("Unit", "kind source place repo files", defaults=[None])
# One file: where it was, and its bytes or why it has none
File = namedtuple("File", "path repo data size reason", defaults=[None])
# What a source is, and to which part of the mixture it counts
KINDS = {"code": "code", "grounding": "code", "text": "text", "math": "math"}
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")
TABLES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


# Places that are no folder; a folder of such a name is given as ./stdlib
NAMED_PLACES = {"stdlib": "the standard library", "packages": "the installed packages",
                "generated": "generated text"}


def is_synthetic(place):
    return place == "generated" or is_url(place)


def is_url(place):
    return re.match("https?://", place, re.IGNORECASE) is not None


def kind_and_place(source):
    """The two parts of a source, [kind:]place; the kind is code if it is not given."""
    kind, colon, place = source.partition(":")
    return (kind, place) if colon and kind in KINDS else ("code", source)


def units(source):
    """The units of a source, in the order of their paths: [kind:]place.

    kind: code (default), grounding, text or math. place: a folder, an archive, a .jsonl file with a
    text field (code: a path, too), github:owner/name[@ref], stdlib and packages (installed; each a
    repository), or what is generated: math:generated, code:generated.
    """
    kind, place = kind_and_place(source)
    if source.encode(errors="replace").decode() != source:
        raise InputError(f"--source {source}: its name is not UTF-8")
    if place.startswith("github:"):
        return [Unit(kind, source, str(fetch_github(place)), place.split(":")[1])]
    if is_url(place) or github_place(place) and not Path(place).exists():
        refuse_url(place)
    if place == "generated":
        return synthetic_units(kind, source, place)
    if place.endswith(ARCHIVES + TABLES):
        if not Path(place).is_file():
            raise InputError(f"--source {source}: no such file")
        return [Unit(kind, source, place, Path(place).name.split(".")[0])]
    paths = sysconfig.get_paths()
    root = Path({"stdlib": paths["stdlib"], "packages": paths["purelib"]}.get(place, place))
    root = root.resolve()
    if not place or not root.is_dir():
        raise InputError(f"--source {source}: no such folder; expected a folder, an archive "
                         f"({', '.join(ARCHIVES)}), a table ({', '.join(TABLES)}), stdlib, "
                         "packages or github:owner/name, with code:, grounding:, text: or math: "
                         "before it or not; or code:generated, math:generated")
    names = []                  # of files, and of folders that are not read, to be accounted for

    def unlisted(error):
        names.append(Path(error.filename).relative_to(root).as_posix())

    def skipped(folder):
        if folder.name != "__pycache__":                    # it never holds anything but bytecode
            names.append(folder.relative_to(root).as_posix() + "/")

    never = SKIPPED_FOLDERS | (STDLIB_SKIPPED if place == "stdlib" else set())
    for path in walk_files(root, never, unlisted, skipped):
        if place != "stdlib" or path.suffix == ".py":
            names.append(path.relative_to(root).as_posix())
    repo = {"stdlib": "cpython", "packages": None}.get(place, root.name)
    return [Unit(kind, source, str(root), repo, names[i:i + UNIT_FILES])
            for i in range(0, len(names), UNIT_FILES)]


def synthetic_units(kind, source, place):
    """The units of what is generated; place: generated, or the URL of an LLM teacher."""
    ending = {"code": "py", "math": "txt"}.get(kind)
    if not ending:
        raise InputError(f"--source {source}: expected math:generated or code:generated")
    numbers = [f"{number:04}.{ending}" for number in range(SYNTHETIC_FILES)]
    return [Unit(kind, source, place, "synthetic", numbers[i:i + UNIT_FILES])
            for i in range(0, len(numbers), UNIT_FILES)]


def teacher_units(url):
    """The units of the programs that an LLM teacher writes. Only --teacher gets here: a --source is
    never sent a request as a teacher is, with the key in OPENAI_API_KEY."""
    check_server(url)
    return synthetic_units("code", f"teacher:{url}", url)


def github_place(url):
    """github:owner/name[@ref] for the address of a GitHub repository or of a page of it, else None.
    """
    match = re.match(r"(?:(?:https?|ssh|git)://)?(?:[^/@\s]*@)?(?:www\.)?github\.com(?::\d+)?[/:]"
                     r"([\w.-]+)/([\w.-]+?)(?:\.git)?(?:/(?:tree|blob|commits?|raw)/([\w.-]+))?"
                     r"(?=[/?#]|$)", url, re.IGNORECASE)
    if not match:
        return None
    owner, name, ref = match.groups()
    return f"github:{owner}/{name}" + (f"@{ref}" if ref else "")


def refuse_url(url):
    """Raise InputError for a source that is a URL; what is secret in it is not shown."""
    shown = re.sub(r"//[^/]*@", "//", url).partition("?")[0]
    advice = "download it and give the file or folder, or an LLM teacher as --teacher URL"
    if place := github_place(url):
        advice = f"for a GitHub repository give --source {place}"
    raise InputError(f"--source {shown}: addresses are not read; {advice}")


def fetch_github(place):
    """Download the archive of github:owner/name[@ref], once -> its path."""
    match = re.fullmatch(r"github:([\w.-]+)/([\w.-]+?)(?:\.git)?(?:@([\w./-]+))?", place)
    if not match or ".." in place:
        raise InputError(f"--source {place}: expected github:owner/name or github:owner/name@ref")
    owner, name, ref = match.groups()
    server = os.environ.get("MINICODER_GITHUB", "https://codeload.github.com")
    ref = ref or "HEAD"
    target = cache_folder() / "github" / f"{owner}--{name}--{ref.replace('/', '%2F')}.tar.gz"
    return fetch(f"{server}/{owner}/{name}/tar.gz/{ref}", target, largest=LARGEST_ARCHIVE)


def read_unit(unit):
    """Yield the files of a unit. Nothing is unpacked to the disk, no link is followed."""
    if is_synthetic(unit.place):
        yield from synthetic(unit)
        return
    if unit.files is not None:
        for name in unit.files:
            yield read_file(Path(unit.place, name), name, unit.repo or name.split("/")[0])
        return
    reader = (read_table if unit.place.endswith(TABLES) else read_zip if unit.place.endswith(".zip")
              else read_tar)
    try:
        yield from reader(unit)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError,
            RuntimeError, ValueError, TypeError):
        yield File(Path(unit.place).name, unit.repo, None, 0, "archive broken from here on")


def checked(name, repo, size, plain, read):
    """A file with what read() gives, unless it is no plain one or larger than it may be."""
    data, reason = None, None
    if not plain:
        reason, size = "link or no plain file", 0               # a pipe would be waited for
    elif size > LARGEST_FILE or len(data := read()) > LARGEST_FILE:     # its size may be a lie
        data, reason = None, "over 1 MB"
    return File(name, repo, data, size, reason)


def read_file(path, name, repo):
    size = 0
    if name.endswith("/"):
        return File(name, repo, None, 0, "skipped folder")
    try:
        status = path.lstat()
        size = status.st_size
        name.encode()
        return checked(name, repo, size, stat.S_ISREG(status.st_mode), path.read_bytes)
    except UnicodeError:
        reason = "name not UTF-8"
    except OSError:
        reason = "unreadable"
    return File(name, repo, None, size, reason)


def read_members(unit, members):
    """Yield files of an archive's members (name, size, is a plain file, function that reads it)."""
    total = 0
    for name, size, plain, read in members:
        total += size
        if total > LARGEST_ARCHIVE:
            raise InputError(f"{unit.place}: unpacks to more than {LARGEST_ARCHIVE >> 30} GB")
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            yield File(name, unit.repo, None, size, "path leaves the archive")
        else:
            yield checked(name, unit.repo, size, plain, read)


def read_tar(unit):
    with tarfile.open(unit.place) as archive:
        yield from read_members(unit, (
            (member.name, member.size, member.isfile(),
             lambda member=member: archive.extractfile(member).read())
            for member in archive if not member.isdir()))


def read_zip(unit):
    with zipfile.ZipFile(unit.place) as archive:
        yield from read_members(unit, (
            (member.filename, member.file_size, member.external_attr >> 28 in (0, 8),
             lambda member=member: archive.open(member).read(LARGEST_FILE + 1))
            for member in archive.infolist() if not member.is_dir()))


def read_table(unit):
    """The rows of a .jsonl file with a text (or content) field; a broken one is a file too."""
    opener = gzip.open if unit.place.endswith(".gz") else open
    with opener(unit.place, "rb") as file:
        rows = enumerate(iter(lambda: file.readline(4 * LARGEST_FILE), b""), 1)
        if unit.place.endswith((".json", ".json.gz")):
            rows = enumerate(map(json.dumps, json.load(file)), 1)
        for number, line in rows:
            name = f"{Path(unit.place).name}:{number}"
            try:
                row = json.loads(line)
                data = row.get("text", row.get("content")).encode()
                name = str(row.get("path", name))
            except (ValueError, AttributeError, RecursionError):
                yield File(name, unit.repo, None, len(line), "no row with a text")
                continue
            yield checked(name, str(row.get("repo", unit.repo)), len(data), True, lambda: data)


def notebook_script(text):
    """A Jupyter notebook as a script: code cells, and Markdown as comments."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            source = re.sub(r"^", "# ", source, flags=re.MULTILINE)
        if source and cell["cell_type"] in ("markdown", "code"):
            parts.append(source)
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------
# Text, and what is synthetic: mathematics and programs

PROSE = {"py", "md", "markdown", "rst", "txt", "METADATA"}      # endings of files that hold prose


def docstrings(text):
    """The docstrings of a Python file that are long enough to say something."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    if not (tree := python_tree(text)):
        return ""
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(part for part in found if part and len(part) > 60) + "\n"


def prose_and_code(text):
    """A text without its code (fenced, literal after ::, or a >>> example), and that code."""
    prose, code, literal, example, fenced = [], [], None, False, False
    for line in text.split("\n"):
        depth, blank = len(line) - len(line.lstrip()), not line.strip()
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        example = not blank and (example or line.lstrip().startswith(">>>"))
        if literal is not None and not blank and depth <= literal:
            literal = None
        (code if fenced or not blank and (example or literal is not None) else prose).append(line)
        if not fenced and literal is None and line.rstrip().endswith("::"):
            literal = depth
    return re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip() + "\n", "\n".join(code)


SYNTHETIC_FILES, PROBLEMS_IN_FILE = 512, 12         # of a source; not published; ours
PEOPLE = "Ada Ben Chen Dana Emil Fatima Grace Hugo Ines Jun Kofi Lena Mira Noah Olga Priya".split()
THINGS = "apples books coins eggs flowers marbles pencils shells stamps tickets".split()


def worked_problems(number):
    """Word problems with worked answers, in the form in which evaluate.py asks GSM8K's."""
    draw = random.Random(number)
    return "\n\n".join(worked_problem(draw) for _ in range(PROBLEMS_IN_FILE)) + "\n"


def worked_problem(draw):
    """One problem: what somebody has goes through some steps, each an equation that holds."""
    who, friend = draw.sample(PEOPLE, 2)
    what, have = draw.choice(THINGS), draw.randrange(3, 60)
    story, work = [f"{who} has {have} {what}."], []
    for _ in range(draw.randrange(1, 5)):
        n, step = draw.randrange(2, 30), draw.randrange(6)
        if step == 0:
            story.append(f"{friend} gives {who} {n} more.")
            equation, new = f"{have} + {n}", have + n
        elif step == 1 and n < have:
            story.append(f"{who} loses {n} of them.")
            equation, new = f"{have} - {n}", have - n
        elif step == 2 and have * (n := n % 4 + 2) < 5000:
            story.append(f"Then {who} finds a box, and now has {n} times as many.")
            equation, new = f"{have} * {n}", have * n
        elif step == 3 and (divisors := [d for d in range(2, 10) if have % d == 0 and have > d]):
            n = draw.choice(divisors)
            story.append(f"{who} shares them equally among {n} people and keeps one share.")
            equation, new = f"{have} / {n}", have // n
        elif step == 4 and have % 4 == 0:
            story.append(f"{who} sells a quarter of them.")
            equation, new = f"{have} * 3 / 4", have * 3 // 4
        else:
            bags, size = n % 5 + 2, draw.randrange(2, 12)
            story.append(f"{who} buys {bags} bags with {size} {what} each.")
            equation, new = f"{have} + {bags} * {size}", have + bags * size
        work.append(f"Now {who} has {equation} = {new} {what}.")
        have = new
    return (f"Question: {' '.join(story)} How many {what} does {who} have?\n"
            "Let's think step by step\n" + "\n".join(work) + f"\nThe answer is {have}.")


# What a generated program does to a list: in words, in code, and, by which what it should print is
# known, in other code
STEPS = [
    ("keeps the even ones", "values = [value for value in values if value % 2 == 0]",
     lambda values, n: list(filter(lambda value: not value & 1, values))),
    ("keeps those above {n}", "values = [value for value in values if value > {n}]",
     lambda values, n: list(filter(n.__lt__, values))),
    ("adds {n} to each", "values = [value + {n} for value in values]",
     lambda values, n: list(map(n.__add__, values))),
    ("squares them", "for i, value in enumerate(values):\n    values[i] = value ** 2",
     lambda values, n: [a * b for a, b in zip(values, values)]),
    ("puts them in order", "values.sort()", lambda values, n: sorted(values)),
    ("turns them round", "values = values[::-1]", lambda values, n: list(reversed(values))),
    ("forgets repeated ones",
     "seen = []\nfor value in values:\n    if value not in seen:\n        seen.append(value)\n"
     "values = seen", lambda values, n: list(dict.fromkeys(values))),
    ("sums up what came so far",
     "total = 0\nfor i in range(len(values)):\n    total += values[i]\n    values[i] = total",
     lambda values, n: [sum(values[:i]) for i in range(1, len(values) + 1)]),
    ("takes the differences of neighbours",
     "values = [after - before for before, after in zip(values, values[1:])]",
     lambda values, n: [values[i] - values[i - 1] for i in range(1, len(values))]),
    ("takes the least away from each", "least = min(values)\nvalues = [v - least for v in values]",
     lambda values, n: [value - sorted(values)[0] for value in values]),
    ("puts the first {n} last", "for _ in range({n}):\n    values.append(values.pop(0))",
     lambda values, n: [values[(i + n) % len(values)] for i in range(len(values))]),
    ("counts how often each occurs", "values = [values.count(value) for value in values]",
     lambda values, n: [sum(other == value for other in values) for value in values])]


def generated_program(number):
    """A program of two to four steps -> (text, what it should print)."""
    draw = random.Random(number)
    steps = [(*step, draw.randrange(2, 6)) for step in draw.sample(STEPS, draw.randrange(2, 5))]
    words = ", then ".join(words.format(n=n) for words, _, _, n in steps)
    lines = [line for _, code, _, n in steps for line in code.format(n=n).split("\n")]
    calls, printed = [], ""
    for _ in range(3):
        values = given = [draw.randrange(-9, 20) for _ in range(draw.randrange(3, 9))]
        for _, _, change, n in steps:
            values = change(values, n)
        calls.append(f"print(change({given}))    # {values}")
        printed += f"{values}\n"
    return "\n".join([
        "def change(values):", f'    """Of a list of numbers it {words}."""',
        *(f"    {line}" for line in ["values = list(values)", *lines, "return values"]),
        "", "", *calls, ""]), printed


def key_header():
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_server(url):
    """Raise InputError unless this is the URL of a server, without a secret: it is printed, and
    written to out/data."""
    server = url.partition("#")[0]
    if "@" in server or "?" in server:
        raise InputError("a teacher's URL holds no key: give it as OPENAI_API_KEY")
    if not is_url(server):
        raise InputError(f"{url}: expected the URL of an OpenAI-compatible server, as "
                         "http://host:8000/v1 or http://host:8000/v1#model")


@functools.cache
def first_model(server):
    """The name of the first model that an OpenAI-compatible server lists."""
    check_server(server)
    try:
        reply = requests.get(f"{server}/models", timeout=60, headers=key_header(),
                             allow_redirects=False)     # the key and the texts go nowhere else
        if reply.status_code == 200:
            return reply.json()["data"][0]["id"]
        problem = f"HTTP {reply.status_code}"
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        problem = type(error).__name__
    raise InputError(f"{server}: lists no model ({problem}); expected a running OpenAI-compatible "
                     "server, as http://host:8000/v1")


def reply_to(server, question):
    """Ask a server once -> (its answer or None, what went wrong, the seconds it wants to rest)."""
    try:
        reply = requests.post(f"{server}/chat/completions", json=question, timeout=600,
                              headers=key_header(), allow_redirects=False)
        if reply.status_code == 200:
            answer = reply.json()["choices"][0]["message"]["content"]
            if isinstance(answer, str) and answer:
                return answer.encode(errors="replace").decode(), None, 0    # half a surrogate pair
            raise ValueError
    except requests.RequestException as error:
        return None, type(error).__name__, 0
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, "a reply without an answer", 0
    problem = f"HTTP {reply.status_code} {' '.join(reply.text.split())[:100]}"
    if reply.is_redirect:
        raise InputError(f"{server}: redirects to another address, which is not followed; give the "
                         "server's own address")
    if reply.status_code < 500 and reply.status_code not in (408, 429):
        raise InputError(f"{server}: {problem}")
    told = reply.headers.get("Retry-After", "")                 # seconds, or a date
    return None, problem, min(60, int(told)) if told.isdecimal() else 0


def ask(url, messages, tries=5, **options):
    """What a model answers to a conversation. A question is paid once: answers stay in the cache.

    url: of an OpenAI-compatible server, as http://host:8000/v1, with #model if not its first, which
    it is asked for, so it must run even if all answers are kept. The key is OPENAI_API_KEY.
    options: temperature, seed, ... InputError if no answer is to be had.
    """
    check_server(url)
    server, _, model = url.partition("#")
    question = {"messages": messages, **options, "model": model or first_model(server)}
    name = hashlib.sha256(json.dumps([server, question]).encode()).hexdigest()
    path, rest = cache_folder() / "answers" / f"{name}.json", 0
    with contextlib.suppress(InputError, KeyError):             # none yet, or cut off by a kill
        return read_json(path)["answer"]
    for attempt in range(tries):
        time.sleep(rest * RETRY_SECONDS)
        answer, problem, rest = reply_to(server, question)
        if answer is not None:
            break
        rest = rest or 2 ** attempt
    else:
        raise InputError(f"{server}: no answer ({problem}); the same command goes on from here")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"question": question, "answer": answer})
    return answer


def user(text):
    """The conversation that begins with a question."""
    return [{"role": "user", "content": text}]


def ask_all(url, conversations, **options):
    """The answers to many conversations, eight asked at a time, equal ones once."""
    distinct = {json.dumps(messages): messages for messages in conversations}
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda messages: ask(url, messages, **options), distinct.values())
        answer_to = dict(zip(distinct, answers))
    return [answer_to[json.dumps(messages)] for messages in conversations]


TEACHER_PROGRAM = (             # the report does not publish its prompts; ours
    "Here is a piece of a program:\n\n{snippet}\n\nWrite a short, self-contained Python program "
    "that has to do with it. It reads nothing, uses the standard library alone, and prints some "
    "results. Answer with the program in a ```python block, and then exactly what it prints in a "
    "```text block.")


def taught_programs(url, numbers):
    """Yield programs by a teacher, each about a piece of an installed package (of which none is
    held out where the standard library is), and what they should print; None where the answer has
    another form."""
    files = [(unit.place, name) for unit in units("packages") for name in unit.files
             if name.endswith(".py")]
    conversations = []
    for number in numbers:
        draw = generator(0, "snippet", number)
        lines = Path(*files[draw.integers(len(files))]).read_text(errors="replace").split("\n")
        start = int(draw.integers(max(1, len(lines) - 40)))
        snippet = "\n".join(lines[start:start + 40])[:3000]
        conversations.append(user(TEACHER_PROGRAM.format(snippet=snippet)))
    for answer in ask_all(url, conversations, temperature=0.7):
        blocks = re.findall(r"^```\w*\n(.*?)^```", answer, re.DOTALL | re.MULTILINE)
        yield blocks if len(blocks) == 2 else (answer, None)


def synthetic(unit):
    """Yield the files of a synthetic unit. Programs are kept that run to what they should print (in
    the report, what an executor could run)."""
    numbers = [int(name.split(".")[0]) for name in unit.files]
    if unit.kind == "math":
        for name, number in zip(unit.files, numbers):
            text = worked_problems(number).encode()
            yield File(name, unit.repo, text, len(text))
        return
    programs = (map(generated_program, numbers) if unit.place == "generated" else
                taught_programs(unit.place, numbers))
    try:
        box = Sandbox()
    except InputError as error:
        raise InputError(f"{unit.source} runs programs: {str(error).partition(';')[0]}") from None
    with contextlib.closing(box):
        for name, (text, expected) in zip(unit.files, programs):
            reason = None if expected is not None else "program without a result"
            if not reason and box.run(text) != (expected, "ok"):
                reason = "program runs to something else"
            text = text.encode(errors="replace")
            yield File(name, unit.repo, None if reason else text, len(text), reason)


# ------------------------------------------------------------------------------------------------
# Rules

# A text is dropped if value(text, lines) drops it; of: the languages it applies to (None: all)
Rule = namedtuple("Rule", "name value drops of", defaults=[None])
DATA = {"html", "json", "markdown", "tex", "yaml", "xslt", "restructuredtext", "rmarkdown", "text"}
CODE = set(LANGUAGE_OF.values()) - DATA
GENERATED = ("auto-generated", "autogenerated", "automatically generated",
             "generated automatically", "this file is generated",       # of StarCoder2
             "@generated", "do not edit")                               # ours
ENCODED = re.compile(r"[a-zA-Z0-9+/\n=]{64,}|(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}"
                     r"|(?:\\u[0-9a-fA-F]{4}){8,}")


def alphabetic_share(text, lines):
    return sum(map(str.isalpha, text)) / len(text)


def encoded(text, lines):
    """The longest run of base64, hexadecimal or \\u data, and the share of all of them."""
    runs = [len(match[0]) for match in ENCODED.finditer(text)]
    return max(runs, default=0), sum(runs) / len(text)


def generated_mark(text, lines):
    """What says in the first five lines that a program wrote this."""
    head = "\n".join(lines[:5]).lower()
    return next((mark for mark in GENERATED if mark in head), None)


def syntax_error(text, lines):
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error)


def visible_text(text, lines):
    """Characters of HTML that a reader sees, and their share."""
    seen = re.sub(r"(?is)<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", "", text)
    seen = re.sub(r"\s+", " ", seen)
    return len(seen), len(seen) / len(text)


# Without a remark: StarCoder2 (section 3), whose limits are mostly DeepSeek-Coder's, too; ours:
# what counts as DATA, and that all assembly may have few letters
RULES = [
    Rule("more than 100,000 lines", lambda text, lines: len(lines), lambda n: n > 100_000),
    Rule("longest line", lambda text, lines: max(map(len, lines)), lambda n: n > 1000, CODE),
    Rule("longest line of data", lambda text, lines: max(map(len, lines)),
         lambda n: n > 100_000, DATA),
    Rule("mean line", lambda text, lines: len(text) / len(lines), lambda n: n > 100, CODE),
    Rule("few letters", alphabetic_share, lambda share: share < 0.25, CODE - {"assembly"} | DATA),
    Rule("generated", generated_mark, bool, CODE | DATA),
    Rule("encoded data", encoded, lambda found: found[0] > 1024 or found[1] > 0.5),
    Rule("XML", lambda text, lines: "<?xml version=" in text[:100], bool, CODE),  # DeepSeek-Coder
    Rule("HTML with little text", visible_text, lambda seen: seen[0] < 100 or seen[1] < 0.2,
         {"html"}),
    Rule("data too short or long", lambda text, lines: len(text),           # DeepSeek-Coder
         lambda n: not 50 <= n <= 5000, {"json", "yaml"}),
    Rule("data of many lines", lambda text, lines: len(lines), lambda n: n > 512, {"json", "yaml"}),
    Rule("does not parse", syntax_error, bool, {"python"}),     # DeepSeek-Coder: by a compiler
]


def broken_rule(text, language):
    """(the name of the first rule that drops a text, its value), or None."""
    lines = text.split("\n")
    for rule in RULES:
        if rule.of is None or language in rule.of:
            if rule.drops(value := rule.value(text, lines)):
                return rule.name, value
    return None


# ------------------------------------------------------------------------------------------------
# Private data

# A pattern for private data, and what replaces it: a fixed text, or a function that looks at the
# match and leaves it alone if it is something else. For speed: every match holds the string `mark`
# and what the pattern `quick` finds, so that most texts need no search with the full pattern.
Private = namedtuple("Private", "mark pattern fake quick", defaults=[re.compile("")])

# Where an address or key may begin. The n of "\n" in a source file is no letter of a word.
BEGIN = r"(?:(?<=\\[abfnrtv])|(?<!\\)\b|(?<=\\)(?![abfnrtv]))"

# Any top-level domain is taken, so what else looks like an address has to be named: labels and
# scopes (this@Main.field), versions of packages (lib@1.2.3.tgz), files (icon@2x.png, which have an
# ending that is no top-level domain), systemd units, and addresses that are reserved for examples.
# The name git@ is that of a server, not of a person.
EMAIL = re.compile(BEGIN + r"[\w.+-]{1,64}@(?:(?:[^\W_]|-)+\.)+(?:xn--[a-z0-9-]+|[^\W\d_]{2,24})"
                   r"(?!\w|-\w|\.\w|[@(\[])", re.IGNORECASE)
DOMAIN = re.compile(r"@(?<=[\w.+-]@)(?:[^\W_]|-)+\.[^\W\d_]")
NOT_EMAIL = re.compile(
    r"^(?:git|this|super|return|break|continue)@|@(?:self|cls|np|torch)\.|@\d+x\.|@v?\d+(?:\.\d+)+"
    r"[.-]|\.(?:png|jpe?g|gif|svg|webp|bmp|ico|tiff?|pdf|css|s[ac]ss|less|[cm]?[jt]sx?|json|html?|"
    r"xml|ya?ml|txt|java|class|jar|exe|dll|whl|tgz|tar|gz|service|socket|timer|weights?|bias|"
    r"values|data|grad)$|[@.]example\.[\w.]+$|\.(?:example|test|invalid|localhost)$", re.IGNORECASE)
# What may stand before a matrix product (x = a@b.real), another one (a@b.inv@c.real), and the host
# of a URL with a user's name (ssh://me@host.org)
BEFORE_PRODUCT = re.compile(r"(?:[=(+*/,-]|\breturn)\s*$")
NO_EMAIL_AFTER = re.compile(r"://[^\s/]*$|@[\w.]*$")

# A password in a URL, unless a variable or a word such as "password" stands for it
URL_PASSWORD = re.compile(
    r"(://[^\s:/@'\"`<>(){}]*:)"
    r"(?!(?:KEY|pass(?:word|wd)?|pwd?|secret|token|x+|\.+|\*+)@|[$%][\w({])"
    r"[^\s/'\"`<>(){}]+(?=@(?!localhost|127\.)[\w\[])", re.IGNORECASE)

IPV4 = re.compile(r"\d(?:(?<=\\[abfnrtv]\d)|(?<![\w.]\d))"              # quicker with a digit first
                  r"\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\w|-(?!\d+\.\d+\.))")
# Public IPv6 addresses lie in 2000::/3, so that times, MAC addresses and std:: are none.
IPV6 = re.compile(r"[23](?:(?<=\\[abfnrtv][23])|(?<![\w:.][23]))[0-9a-f]{3}:(?:[0-9a-f]{0,4}:){1,6}"
                  r"(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{1,4}|(?<=::))(?!\w|:[\w:]|\.\w)",
                  re.IGNORECASE)
# What stands before a version of four numbers: version = "4.12.33.100", v 4.12.33.100, ["version",
# lists of versions, pip install x==4.12.33.100, Chrome/4.12.33.100, and in tables other versions
BEFORE_VERSION = re.compile(
    r"(?:(?:version\w*|(?:\b|_|pkg)(?:v|ver|rev|release|tag|firmware|section)s?)(?:\.\w+)?"
    r"(?: number)?(?: is)?[ \t\"'`*\]:=()>{\[,\d.-]*|"
    r"[\w\]'\"][=~]=|[<>~]=\s*|[~^]>?\s*|(?<![\w./])[A-Z][a-z]\w*/|"
    r"(?<![\w.])\d+\.\d+\.\d+[ \t]+)$", re.IGNORECASE)
DNS_SERVERS = {"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"}

# The prefixes of keys, as secret scanners know them, and what follows each; the last two lines are
# Shopify, DigitalOcean, Databricks, Vault, Grafana, Groq, xAI and Replicate
KEYS = {
    "AKIA": "[0-9A-Z]{16}", "ASIA": "[0-9A-Z]{16}",                                # AWS
    "AIza": r"[\w-]{35}", "GOCSPX-": r"[\w-]{28}", "ya29.": r"[\w-]{20,}",         # Google
    "ghp_": "[A-Za-z0-9]{36,}", "gho_": "[A-Za-z0-9]{36,}", "ghu_": "[A-Za-z0-9]{36,}",     # GitHub
    "ghs_": "[A-Za-z0-9]{36,}", "ghr_": "[A-Za-z0-9]{36,}", "github_pat_": r"\w{22,}",
    "glpat-": r"[\w-]{20,}", "glrt-": r"[\w-]{20,}", "gldt-": r"[\w-]{20,}",       # GitLab
    "glptt-": r"[\w-]{20,}", "glcbt-": r"[\w-]{20,}", "gloas-": r"[\w-]{20,}",
    "xox": r"[abceoprs]-[\w-]{10,}", "xapp-": r"\d-[\w-]{20,}",                    # Slack
    "hooks.slack.com/services/": r"[\w/]{30,}",
    "sk-": r"(?:[A-Za-z0-9]{32,}|(?=[A-Za-z_-]{0,99}\d)[\w-]{32,})",     # OpenAI, Anthropic, others
    "sk_": "(?:live|test)_[A-Za-z0-9]{16,}", "rk_": "(?:live|test)_[A-Za-z0-9]{16,}",       # Stripe
    "whsec_": r"[A-Za-z0-9+/=]{32,}",
    "hf_": "[A-Za-z0-9]{30,}", "npm_": "[A-Za-z0-9]{36}", "pypi-AgEI": r"[\w-]{50,}",
    "dckr_pat_": r"[\w-]{20,}", "SG.": r"[\w-]{16,32}\.[\w-]{16,64}",              # SendGrid
    "SK": "[0-9a-f]{32}", "key-": "[0-9a-f]{32}",                        # Twilio, Mailgun
    "eyJ": r"[\w-]{10,999}\.eyJ[\w-]{10,9999}\.[\w-]*",          # JSON Web Token
    "shpat_": "[0-9a-fA-F]{32}", "shpss_": "[0-9a-fA-F]{32}", "dop_v1_": "[0-9a-f]{64}",
    "dapi": "[0-9a-f]{32}", "hvs.": r"[\w-]{24,}", "glsa_": r"\w{32,}",
    "gsk_": "[A-Za-z0-9]{40,}", "xai-": "[A-Za-z0-9]{60,}", "r8_": "[A-Za-z0-9]{37}"}


def fake_email(match):
    before = match.string[max(0, match.start() - 80):match.start()]
    product = re.match(r"\w@[^.]+\.\w+$", match[0]) and BEFORE_PRODUCT.search(before)
    if product or NOT_EMAIL.search(match[0]) or NO_EMAIL_AFTER.search(before):
        return match[0]
    return "user@example.com"


def is_public(address):
    """Whether an IP address is somebody's: not reserved, not that of a public DNS server."""
    try:
        return ipaddress.ip_address(address).is_global and address not in DNS_SERVERS
    except ValueError:
        return False


def fake_ipv4(match):
    """An address unless it is a version: most numbers below 10, or called one. 2.5.29. begins the
    names of X.509's extensions."""
    before = match.string[max(0, match.start() - 80):match.start()]
    small = sum(int(part) < 10 for part in match[0].split(".")) > 2
    version = small or match[0].startswith("2.5.29.") or BEFORE_VERSION.search(before)
    if before.endswith("-"):                                # the end of a range of addresses, or a
        version = version or not re.search(r"\d\.\d+-$", before)            # name-1.2.3.4
    return match[0] if version or not is_public(match[0]) else "192.0.2.1"


def fake_ipv6(match):
    is_slice = re.fullmatch(r"\d+::\d*", match[0])                         # as in x[2000::2]
    return match[0] if is_slice or not is_public(match[0].lower()) else "2001:db8::1"


PRIVATE = [
    Private("://", URL_PASSWORD, r"\1KEY"),
    Private("@", EMAIL, fake_email, DOMAIN),
    Private(":", IPV6, fake_ipv6),
    Private(".", IPV4, fake_ipv4),
    Private("PRIVATE KEY-", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
                                       r"((?:(?!-----)[\s\S])*)"
                                       r"-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
            lambda match: "KEY" if re.search("[A-Za-z0-9+/]{32}", match[1]) else match[0]),
    *(Private(name, re.compile(fr"({name}['\"]?\s*[:=]\s*['\"]?)[\w/+]{{40}}(?![\w/+])"), r"\1KEY")
      for name in ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY")),
    Private(":AA", re.compile(BEGIN + r"\d{8,10}:AA[\w-]{33}(?!\w)"), "KEY"),             # Telegram
    *(Private(prefix, re.compile(BEGIN + re.escape(prefix) + rest + r"(?!\w)"), "KEY")
      for prefix, rest in KEYS.items())]


def replace_private(text):
    """E-mail addresses, public IP addresses, passwords in URLs and keys become fixed fakes."""
    for private in PRIVATE:
        if private.mark in text and private.quick.search(text):
            text = private.pattern.sub(private.fake, text)
    return text


# ------------------------------------------------------------------------------------------------
# Fingerprints: every run of n words of a text as a 64-bit number, without a loop over the words

WORDS, NOT_BLANK = np.zeros(256, bool), np.ones(256, bool)
WORDS[list(b"0123456789_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True
WORDS[128:] = True                                  # letters beyond ASCII
NOT_BLANK[list(b" \t\n\r\v\f")] = False
LOWER = np.frombuffer(bytes(range(256)).lower(), np.uint8)
BASE = 0x9E3779B97F4A7C15                           # odd, so that it has an inverse modulo 2^64
MULTIPLIERS, OFFSETS = np.random.default_rng(0).integers(
    0, 1 << 64, (2, BANDS * ROWS), dtype=np.uint64) | np.array([[1], [0]], np.uint64)


@functools.cache
def powers(size):
    """BASE ** 0, 1, ... and their inverses, modulo 2^64: (size,) each."""
    base, inverse = (np.full(size, value, np.uint64) for value in (BASE, pow(BASE, -1, 1 << 64)))
    base[0] = inverse[0] = 1
    return np.cumprod(base), np.cumprod(inverse)


def mixed(hashes):
    """Spread each 64-bit number over all its bits (the finalizer of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def word_hashes(text, is_word=WORDS):
    """A number for each word of a text, in order. is_word: which bytes words are made of.

    The hash of a word is the difference of two running sums of byte x BASE ** place, brought to
    place 0: so all words take a few operations on the whole text.
    """
    data = np.frombuffer(text.encode(errors="replace"), np.uint8)
    edges = np.diff(is_word[data].astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    base, inverse = powers(1 << max(12, len(data).bit_length()))
    letters = LOWER[data] if is_word is WORDS else data
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((letters.astype(np.uint64) + np.uint64(1)) * base[:len(data)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * inverse[starts])


def run_hashes(words, n):
    """A number for each run of n words."""
    runs = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for i in range(n if len(runs) else 0):
        runs = runs * np.uint64(BASE) + words[i:len(words) - n + 1 + i]
    return mixed(runs)


def shingles(text):
    """The set of all runs of five words, lower-cased: what near-duplicates share. Sorted."""
    return np.unique(run_hashes(word_hashes(text), SHINGLE))


def jaccard(a, b):
    """|a and b| / |a or b| of two sorted sets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if len(a) + len(b) else 0.0


# ------------------------------------------------------------------------------------------------
# Near-duplicates: MinHash signatures, bands that agree, and then the exact similarity


def signature(runs):
    """The MinHash of shingles, in any order, (BANDS * ROWS,) uint32: two sets agree at a place with
    a probability equal to their Jaccard similarity (multiply-shift instead of permutations)."""
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(runs), 256):                      # a block stays in the cache
        block = runs[start:start + 256, None] * MULTIPLIERS + OFFSETS
        least = np.minimum(least, block.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


def candidate_pairs(signatures):
    """The pairs (i, j), i < j, of rows that agree in a whole band. signatures: (N, BANDS * ROWS).

    Of a crowd that agrees, each is paired with the first 32.
    """
    pairs = set()
    for start in range(0, BANDS * ROWS, ROWS):
        crowds = defaultdict(list)
        for i, band in enumerate(signatures[:, start:start + ROWS]):
            crowds[band.tobytes()].append(i)
        for crowd in crowds.values():
            pairs.update((i, j) for k, i in enumerate(crowd[:32]) for j in crowd[k + 1:])
    return sorted(pairs)


def near_duplicates(signatures, load):
    """Of each row the first row that it is a near-duplicate of, itself if none.

    load(i): the shingles of row i. `candidate_pairs` are verified (`jaccard` of at least NEAR);
    verified pairs are joined, so that of a chain of copies the first remains.
    """
    first = list(range(len(signatures)))

    def root(i):
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    load = functools.lru_cache(maxsize=1000)(load)
    for i, j in candidate_pairs(signatures):
        if root(i) != root(j) and jaccard(load(i), load(j)) >= NEAR:
            low, high = sorted((root(i), root(j)))
            first[high] = low
    return [root(i) for i in range(len(first))]


# ------------------------------------------------------------------------------------------------
# Contamination: training text that shares ten words in a row with a benchmark


class Contamination:
    """Finds the runs of ten words that a text shares with benchmark problems (report, section 5).

    Words are what stands between blanks, as in the report's tool, and also, so that reformatted
    code is found, what is made of letters, digits and underscores, whatever stands between them.
    There, which is ours, a run counts if eight of its words differ, numbers taken for one word: not
    1 2 3 4 ... nor for i in range n for j in range n. A statement of 3 to 9 words is looked for as
    a whole (DeepSeek-Coder, section 2.4).
    """

    STATEMENTS = ("prompt", "text", "question", "problem")      # the fields of problem files
    SOLUTIONS = ("canonical_solution", "code", "solution", "answer", "test", "test_list")
    BETWEEN = {"blanks": NOT_BLANK, "signs": WORDS}             # what stands between words

    def __init__(self, files):
        self.names, found = [], defaultdict(list)               # (between, n) -> [(runs, problem)]
        self.numbers = word_hashes(" ".join(map(str, range(1000))))
        for file in files:
            for number, row in read_rows(file):
                name = row.get("task_id", row.get("id", number))
                self.names.append(f"{Path(file).name.split('.')[0]} {name}")
                for field in (*self.STATEMENTS, *self.SOLUTIONS):
                    text = row.get(field, "")
                    text = "\n".join(map(str, text)) if isinstance(text, list) else str(text)
                    for between in self.BETWEEN:
                        self.add(found, between, text, field in self.STATEMENTS)
        self.runs = {}
        for key, parts in sorted(found.items()):
            runs = np.concatenate([runs for runs, _ in parts])
            owners = np.repeat([owner for _, owner in parts], [len(runs) for runs, _ in parts])
            order, maybe = np.argsort(runs, kind="stable"), np.zeros(1 << 22, bool)
            maybe[runs & np.uint64(len(maybe) - 1)] = True      # most runs are no hit: a fast no
            self.runs[key] = runs[order], owners[order], maybe

    def add(self, found, between, text, statement):
        words = word_hashes(text, self.BETWEEN[between])
        n = 10 if len(words) >= 10 else len(words) if statement else 0
        if n >= 3:
            runs = run_hashes(words, n)
            if between == "signs" and n == 10:
                words = np.where(np.isin(words, self.numbers), 0, words)
                inside = np.sort(np.lib.stride_tricks.sliding_window_view(words, n), axis=1)
                runs = runs[(np.diff(inside, axis=1) != 0).sum(axis=1) >= 7]
            found[between, n].append((runs, len(self.names) - 1))

    def hit(self, text):
        """[the problem, the words shared] of the first run that a text shares, or None."""
        words = {between: word_hashes(text, own) for between, own in self.BETWEEN.items()}
        for (between, n), (runs, owners, maybe) in self.runs.items():
            mine = run_hashes(words[between], n)
            places = np.flatnonzero(maybe[mine & np.uint64(len(maybe) - 1)])
            at = np.searchsorted(runs, mine[places]) % max(1, len(runs))
            hits = np.flatnonzero(runs[at] == mine[places])
            if len(hits):
                place, owner = places[hits[0]], owners[at[hits[0]]]
                word = rb"\S+" if between == "blanks" else rb"[\w\x80-\xff]+"
                data = text.encode(errors="replace")            # as word_hashes splits it
                shared = re.findall(word, data)[place:place + n]
                return [self.names[owner], b" ".join(shared).decode(errors="replace")]
        return None


load_contamination = functools.lru_cache(maxsize=1)(Contamination)      # once in a process


# ------------------------------------------------------------------------------------------------
# A classifier of texts, as fastText is one (arXiv 1607.01759)


class Classifier(torch.nn.Module):
    """The mean of the embeddings of a text's words and pairs of words, then one linear layer."""

    def __init__(self, names, buckets=1 << 18, size=16):
        super().__init__()
        self.names, self.buckets = list(names), buckets
        self.embedding = torch.nn.EmbeddingBag(buckets, size, mode="mean")
        self.linear = torch.nn.Linear(size, len(self.names))
        with torch.no_grad():
            values = generator(0, "classifier", 0).uniform(-1 / size, 1 / size, (buckets, size))
            self.embedding.weight.copy_(torch.from_numpy(values))
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def features(self, text):
        """The hashed words and pairs of words of the first 10,000 characters, as bucket numbers."""
        words = word_hashes(text[:10_000])
        return (np.concatenate([words, run_hashes(words, 2)]) % np.uint64(self.buckets)).astype(
            np.int64)

    def forward(self, features):
        """Features of B texts -> logits (B, names)."""
        lengths = [len(one) for one in features]
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)                        # (B,)
        return self.linear(self.embedding(torch.from_numpy(np.concatenate(features)), offsets))

    def fit(self, texts, named, epochs=6, lr=0.02, batch=32):
        """Learn from texts and their names -> self. The same texts give the same classifier."""
        features = [self.features(text) for text in texts]
        targets = torch.tensor([self.names.index(name) for name in named])
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for epoch in range(epochs):
            order = generator(0, "classifier order", epoch).permutation(len(texts))
            for start in range(0, len(order), batch):
                chosen = order[start:start + batch]
                loss = torch.nn.functional.cross_entropy(self([features[i] for i in chosen]),
                                                         targets[torch.from_numpy(chosen)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self

    @torch.no_grad()
    def predict(self, texts):
        """Probabilities (texts, names)."""
        parts = [self([self.features(text) for text in texts[start:start + 256]]).softmax(-1)
                 for start in range(0, len(texts), 256)]
        return torch.cat(parts).numpy()


def auc(scores, positive):
    """The chance that a positive has a higher score than a negative, ties counting half."""
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]       # 1 for the lowest, ties shared
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n))


# ------------------------------------------------------------------------------------------------
# Text-code grounding: of what is written about code, the part that is worth reading

# Of the bytes that a stage is given, those it keeps: from figure 1 of the report, of 582, 370, 147
# and 118 billion tokens after each stage; what the first was given is not published; ours
GROUNDING_STAGES = (0.6, 370 / 582, 147 / 370, 118 / 147)
GROUNDING_SAMPLE = 2000         # documents that are marked in a stage; not published; ours


def grounded(text):
    """How far a text's prose speaks of its code: of the names in the code, the share that the prose
    holds too (with ten more names, so that one alone does not make it high)."""
    prose, code = prose_and_code(text)
    names = set(words_of(code)) - set(keyword.kwlist)
    return len(names & set(re.findall(r"\w+", prose))) / (len(names) + 10)


TEACHER_MARK = ("How well does this document explain its code to a reader who wants to learn "
                "programming? Answer with one number from 0 (not at all, or no code) to 5.\n\n")


def taught_marks(url, texts):
    """What documents are worth, from 0 to 5, by a teacher who sees their first 4,000 characters:
    the last such number of an answer; an answer without any counts as 0."""
    answers = ask_all(url, [user(TEACHER_MARK + text[:4000]) for text in texts], temperature=0)
    answers = [re.sub(r"(?s)<think>.*</think>|(/|out of) ?5\b", "", answer) for answer in answers]
    return [float((re.findall(r"(?<![\d.])[0-5](?:\.\d+)?(?![\d.]*\d)", answer) or [0])[-1])
            for answer in answers]


def coarse_to_fine(sizes, load, mark, shares=GROUNDING_STAGES):
    """Filter documents in stages -> (the stage that dropped each, 0 if none; what each stage did).

    sizes: their bytes; load(i): the text of one; mark(texts): what each is worth, which may be dear
    to know. In each stage some of what is left are marked and a classifier learns which of them are
    better than the median. It knows words alone, and keeps the share with the highest scores. So
    what is left gets better, and with it the median, the bar of the next stage.
    """
    left, stage_of, done = np.arange(len(sizes)), np.zeros(len(sizes), int), []
    sizes = np.asarray(sizes)
    for stage, share in enumerate(shares, 1):
        some = generator(0, "grounding", stage).permutation(left)[:GROUNDING_SAMPLE]
        if len(some) < 50:
            break                                               # too few to learn from
        texts = [load(i) for i in some]
        marks = np.asarray(mark(texts))
        bar, learned = np.median(marks), np.flatnonzero(np.arange(len(some)) % 5)
        good = marks > bar if (marks > bar).any() else marks == bar     # most have the best mark
        if good[::5].all() or not good[::5].any():
            break                                               # nothing to tell apart
        names = np.where(good, "grounded", "plain")[learned]
        classifier = Classifier(("plain", "grounded")).fit([texts[i] for i in learned], names)
        quality = auc(classifier.predict(texts[::5])[:, 1], good[::5])
        scores = np.concatenate([classifier.predict([load(i) for i in left[k:k + 256]])[:, 1]
                                 for k in range(0, len(left), 256)])
        order = np.argsort(-scores, kind="stable")
        kept = np.cumsum(sizes[left[order]]) <= share * sizes[left].sum()
        kept[0] = True                                          # however large the best one is
        stage_of[left[order[~kept]]] = stage
        left = np.sort(left[order[kept]])
        done.append({"documents": len(left), "bytes": int(sizes[left].sum()), "bar": float(bar),
                     "mean mark": float(marks[np.isin(some, left)].mean()), "auc": float(quality)})
    return stage_of, done


# ------------------------------------------------------------------------------------------------
# Repositories: a file after those that it needs (DeepSeek-Coder, section 2.2)

# What names another file, by language; Python's imports come from its syntax tree
C_INCLUDE, JVM_IMPORT = r'#\s*include\s*"([^"]+)"', r"^\s*import\s+(?:static\s+)?([\w.]+)"
JS_IMPORT = r"""(?:from|import|require\()\s*["'](\.[^"']+)["']"""
IMPORTS = {"c": C_INCLUDE, "c++": C_INCLUDE, "cuda": C_INCLUDE, "java": JVM_IMPORT,
           "kotlin": JVM_IMPORT, "scala": JVM_IMPORT, "javascript": JS_IMPORT,
           "typescript": JS_IMPORT, "vue": JS_IMPORT,
           "go": r'^\s*(?:import\s+)?(?:\w+\s+)?"([\w.-]+(?:/[\w.-]+)+)"\s*$',
           "rust": r"^\s*(?:pub(?:\([^)]*\))?\s+)?(?:mod|use)\s+((?:\w+::)*\w+)"}


def imported(document):
    """What a document says it needs, as names with slashes; ./ and ../ are of its folder."""
    text, language = document["text"], document["language"]
    if language != "python":
        found = re.findall(IMPORTS[language], text, re.MULTILINE) if language in IMPORTS else []
        if language in ("java", "kotlin", "scala"):
            found = [name.replace(".", "/") for name in found]
        return [re.sub(r"^(crate|self|super)/", "", name.replace("::", "/")) for name in found]
    nodes = nodes_of(text)
    names = [alias.name.replace(".", "/") for node in nodes if isinstance(node, ast.Import)
             for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            start = "" if not node.level else "./" if node.level == 1 else "../" * (node.level - 1)
            module = start + (node.module or "").replace(".", "/")
            names += [f"{module}/{alias.name}".replace("//", "/") for alias in node.names]
    return names


def dependencies(documents):
    """For each document of a repository, the indices of those that it needs.

    A name fits a file whose path, without its ending, ends with it; so does the name without its
    last part, which may be something in the file. In Go a name is that of a folder.
    """
    paths, by_last = [], defaultdict(list)
    for i, document in enumerate(documents):
        path = os.path.dirname(document["path"]) if document["language"] == "go" else (
            re.sub(r"(/__init__|/mod|/index)?\.[^./]+$", "", document["path"]))
        paths.append("/" + path)
        by_last[path.rsplit("/", 1)[-1]].append(i)

    def fitting(name, i):
        folder, relative = os.path.dirname(documents[i]["path"]), name.startswith(".")
        name = re.sub(r"\.(h|hh|hpp|hxx|cuh|[cm]?js|jsx|tsx?|vue)$", "", name)
        parts = os.path.normpath(os.path.join(folder, name) if relative else name).split("/")
        if documents[i]["language"] == "go":
            parts = ["", *parts[-1:]]                           # before it stand host and project
        for own in (parts, parts[:-1]):
            end = "/" + "/".join(own).lstrip("/")
            found = {j for j in by_last[own[-1] if own else ""] if j != i and (
                paths[j] == end or not relative and paths[j].endswith(end))}
            if found:
                return found
        return set()

    return [set().union(*(fitting(name, i) for name in imported(document)))
            for i, document in enumerate(documents)]


def dependency_order(documents):
    """The documents of a repository, each after those that it needs: again and again the one that
    lacks fewest, so that circles do not stall. Equal ones come in the order of their paths."""
    needed = dependencies(documents)
    users = defaultdict(set)
    for i, own in enumerate(needed):
        for j in own:
            users[j].add(i)
    queue, order = [(len(own), documents[i]["path"], i) for i, own in enumerate(needed)], []
    heapq.heapify(queue)
    placed = set()
    while queue:
        missing, path, i = heapq.heappop(queue)
        if i in placed or missing != len(needed[i] - placed):   # out of date: there is a newer one
            continue
        placed.add(i)
        order.append(documents[i])
        for user in users[i] - placed:
            heapq.heappush(queue, (len(needed[user] - placed), documents[user]["path"], user))
    return order


def repository_documents(documents, tokenizer, length):
    """Yield the repositories among documents as ids in the report's layout (figure 4), each file
    after those that it needs; at most `length` ids at a time, cut between files, unless one is
    longer by itself."""
    repositories = defaultdict(list)
    for document in documents:
        repositories[document["source"], document["repo"]].append(document)

    def ids(files):
        *before, (path, text) = files
        return repository_ids(tokenizer, name, before, path) + tokenizer.encode(text)

    for key, found in sorted(repositories.items()):
        name, files, used = key[1], [], 0
        for document in dependency_order(found):
            file = document["path"], document["text"]
            size = len(tokenizer.encode("\n".join(file))) + 2          # <|file_sep|>, a line end
            if files and used + size > length:
                yield ids(files)
                files = []
            used = used + size if files else size + len(tokenizer.encode(name)) + 2
            files.append(file)
        yield ids(files)


# ------------------------------------------------------------------------------------------------
# A unit of the corpus -> its documents, and a line for each file that was dropped


def clean(file, unit, contamination):
    """A file of a unit as {"text", "language"}, or {"reason", "value"}: why it is dropped."""
    def drop(reason, value=None):
        return {"reason": reason, "value": value}

    ending = file.path.rpartition("/")[2].rpartition(".")[2]
    language = "text"
    if unit.kind == "code":
        language = language_of(file.path, file.data)
    elif unit.kind != "math" and not unit.place.endswith(TABLES) and ending not in PROSE:
        language = None
    if file.reason and (language or file.reason != "over 1 MB"):
        return drop(file.reason)
    if not language:
        return drop("language unknown", ending[:20].encode(errors="replace").decode())
    try:
        text = normalize(file.data.decode("utf-8-sig"))
    except UnicodeError:
        return drop("not UTF-8")
    if "\0" in text:
        return drop("binary")
    if language == "jupyter-notebook":
        try:
            text = notebook_script(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            return drop("notebook broken")
    if unit.kind in ("text", "grounding") and ending in PROSE:
        text = docstrings(text) if ending == "py" else text
        if unit.kind == "text":                                 # the report removes the code
            text, _ = prose_and_code(text)
        if len(text) < 200:                                     # not published; ours
            return drop("little prose")
    text = text.encode(errors="replace").decode()               # escapes may be half a character
    if not text.strip():
        return drop("empty")
    if broken := broken_rule(text, language):
        return drop(*broken)
    if hit := contamination.hit(text):
        return drop("contaminated", hit)
    return {"text": replace_private(text), "language": language}


def cleaned(unit, contamination):
    """Yield each file of a unit: path, repo, source, kind, bytes, and what `clean` makes of it."""
    for file in read_unit(unit):
        path, repo = (name.encode(errors="replace").decode() for name in (file.path, file.repo))
        yield {"path": path, "repo": repo, "source": unit.source, "kind": unit.kind,
               "bytes": file.size, **clean(file, unit, contamination)}


def documents(source, dropped=None, contamination=None):
    """Yield the documents of a source, in the order of their paths: text, path, repo, language,
    source. dropped: a list for what is left out, with its reason."""
    contamination = contamination or Contamination([])
    for unit in units(source):
        for found in cleaned(unit, contamination):
            if "text" in found:
                yield found
            elif dropped is not None:
                dropped.append(found)


def process_unit(unit, stem, benchmark_files):
    """Write a unit's documents to {stem}.jsonl, their signatures to {stem}.npy, and to {stem}.json
    where each of them lies and what was dropped. It depends on nothing else."""
    kept, dropped, signatures, offset = [], [], [], 0
    contamination = load_contamination(benchmark_files)
    with open(f"{stem}.jsonl", "wb") as output:
        for found in cleaned(unit, contamination):
            if "reason" in found:
                dropped.append(found)
                continue
            size = output.write((json.dumps(found, ensure_ascii=False) + "\n").encode())
            text = found.pop("text")
            runs = run_hashes(word_hashes(text), SHINGLE)
            same = "\n".join(part.rstrip() for part in text.split("\n")).strip()
            kept.append({**found, "offset": offset, "text_bytes": len(text.encode()),
                         "same": hashlib.sha256(same.encode()).hexdigest(),
                         "shingles": len(runs)})
            signatures.append(signature(runs))
            offset += size
    np.save(f"{stem}.npy", np.array(signatures, np.uint32).reshape(-1, BANDS * ROWS))
    write_json(Path(f"{stem}.json"), {"kept": kept, "dropped": dropped})     # last: it is done


def process_units(found, folder, benchmark_files, workers):
    """Process all units, by several processes; those that an earlier run has finished are kept."""
    stems = [str(folder / f"{number:06}") for number in range(len(found))]
    todo = [(unit, stem, benchmark_files) for unit, stem in zip(found, stems)
            if not Path(f"{stem}.json").exists()]
    bar = functools.partial(tqdm, total=len(todo), desc="units", disable=None)
    if workers > 1 and len(todo) > 1:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            list(bar(pool.map(process_unit, *zip(*todo))))
    else:
        for job in bar(todo):
            process_unit(*job)
    return stems


# ------------------------------------------------------------------------------------------------
# The corpus: the documents of all units, without duplicates, in training and validation


class Corpus:
    """The rows of all units in one order, whose texts stay on the disk.

    A row gets a reason when it is dropped. The order is that of the source (the standard library
    first, grounding, which is still to be filtered, last), then of the path: the first of several
    copies is kept.
    """

    def __init__(self, stems):
        self.rows, self.dropped = [], []
        signatures = [np.zeros((0, BANDS * ROWS), np.uint32)]
        for stem in stems:
            about = read_json(Path(f"{stem}.json"))
            self.rows += [{**row, "stem": stem} for row in about["kept"]]
            self.dropped += about["dropped"]
            signatures.append(np.load(f"{stem}.npy"))
        order = sorted(range(len(self.rows)), key=lambda i: (
            self.rows[i]["source"] != "stdlib", self.rows[i]["kind"] == "grounding",
            self.rows[i]["source"], self.rows[i]["path"]))
        self.rows = [self.rows[i] for i in order]
        self.signatures = np.concatenate(signatures)[order]

    def line(self, row):
        """A document's line of JSON."""
        with open(f"{row['stem']}.jsonl", "rb") as file:
            file.seek(row["offset"])
            line = file.readline()
        if row["path"].rpartition(".")[2] in AMBIGUOUS:         # its language may be another now
            line = {**json.loads(line), "language": row["language"]}
            line = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        return line

    def text(self, row):
        return json.loads(self.line(row))["text"]

    def shingles(self, row):
        return shingles(self.text(row))

    def name_ambiguous(self, examples=400):
        """Decide the language of files whose ending several languages share, by a classifier that
        learns from the corpus' other files of these languages -> accuracy on a fifth of them.

        Where fewer than two of the languages have 20 such files, the first keeps all.
        """
        accuracy = {}
        for ending, languages in AMBIGUOUS.items():
            known = {name: [] for name in languages}
            unsure = [row for row in self.rows if row["path"].endswith("." + ending)
                      and row["language"] in languages]                     # not of kind text
            for row in self.rows if unsure else []:
                if row["language"] in known and not row["path"].endswith("." + ending):
                    known[row["language"]].append(row)
            known = {name: rows[:examples] for name, rows in known.items() if len(rows) >= 20}
            if len(known) < 2:
                continue
            pairs = [(self.text(row), name) for name, rows in known.items() for row in rows]
            heldout, train = pairs[::5], [pair for i, pair in enumerate(pairs) if i % 5]
            classifier = Classifier(known).fit(*zip(*train))
            texts, languages = zip(*heldout)
            right = [classifier.names[i] == language for i, language in zip(
                classifier.predict(texts).argmax(1), languages)]
            accuracy[f".{ending}: {', '.join(known)}"] = sum(right) / len(right)
            for start in range(0, len(unsure), UNIT_FILES):     # not all texts at once
                some = unsure[start:start + UNIT_FILES]
                found = classifier.predict([self.text(row) for row in some]).argmax(1)
                for row, i in zip(some, found):
                    row["language"] = classifier.names[i]
        return accuracy

    def kept(self):
        return [row for row in self.rows if "reason" not in row]

    def drop_duplicates(self):
        seen = {}
        for row in self.rows:
            first = seen.setdefault(row["same"], row)
            if first is not row:
                row.update(reason="exact duplicate", value=first["path"])
        some = [i for i, row in enumerate(self.rows) if "reason" not in row and row["shingles"]]
        first = near_duplicates(self.signatures[some], lambda i: self.shingles(self.rows[some[i]]))
        for i, j in enumerate(first):
            if i != j:
                self.rows[some[i]].update(reason="near duplicate",
                                          value=self.rows[some[j]]["path"])

    def filter_grounding(self, teacher=None):
        """Keep of the text-code grounding what passes all stages -> what each stage did.

        What a document is worth is measured by `grounded`, or asked of a teacher.
        """
        rows = [row for row in self.kept() if row["kind"] == "grounding"]
        mark = functools.partial(taught_marks, teacher) if teacher else (
            lambda texts: [grounded(text) for text in texts])
        stages, done = coarse_to_fine([row["text_bytes"] for row in rows],
                                      lambda i: self.text(rows[i]), mark)
        for row, stage in zip(rows, stages):
            if stage:
                row.update(reason=f"grounding stage {stage}", value=None)
        return done

    def drop_near_copies(self, train, validation):
        """Leave out what has a similarity of NEAR_HELD_OUT or more with a held-out document."""
        sets = [self.shingles(row) for row in validation]
        every, owners = np.concatenate(sets), np.repeat(range(len(sets)), list(map(len, sets)))
        order = np.argsort(every, kind="stable")
        every, owners = every[order], owners[order]
        for row in train:
            if not row["shingles"]:
                continue
            own = self.shingles(row)
            low, high = np.searchsorted(every, own), np.searchsorted(every, own, side="right")
            if (high > low).sum() < len(own) * NEAR_HELD_OUT / (1 + NEAR_HELD_OUT):
                continue                                        # whatever the held-out one is
            shared = Counter(owner for a, b in zip(low, high) for owner in owners[a:b].tolist())
            for owner, n in shared.items():
                if n / (len(own) + len(sets[owner]) - n) >= NEAR_HELD_OUT and "reason" not in row:
                    row.update(reason="like a held-out document",
                               value=validation[owner]["path"])


def split(rows):
    """Hold out whole top-level modules, in the order of the hash of their names -> (train, held).

    With `packages` the held-out modules are those of the standard library alone, so that every size
    is measured on the same text. A corpus of one module is split by file. Text from a module that
    is held out is held out too; of mathematics, and of text from places that give no code, a
    twentieth of the files.
    """
    code = [row for row in rows if row["kind"] == "code"]
    candidates = [row for row in code if row["source"] == "stdlib"] or code
    by_module = len({row["path"].split("/")[0] for row in candidates}) > 1

    def module(row):
        place = row["source"].removeprefix(row["kind"] + ":")
        return place, row["path"].split("/")[0] if by_module else row["path"]

    def order(name):
        return hashlib.sha256(repr(name).encode()).digest()

    size = Counter()
    for row in candidates:
        size[module(row)] += row["text_bytes"]
    room, held = HELD_OUT_SHARE * sum(size.values()), set()
    for name in sorted(size, key=order):
        if size[name] <= room:
            held.add(name)
            room -= size[name]
    if not held:
        held = {min(size, key=size.get)} if len(size) > 1 else set()
    places = {module(row)[0] for row in rows if row["kind"] in ("code", "grounding")}
    train, validation = [], []
    for row in rows:
        apart = row["kind"] == "math" or row["kind"] == "text" and module(row)[0] not in places
        apart = apart and order(row["path"])[0] < 256 * HELD_OUT_SHARE
        (validation if apart or module(row) in held else train).append(row)
    if not train or not any(row["kind"] == code[0]["kind"] for row in validation):
        raise InputError(f"{len(rows)} documents are too few to train on some and hold out "
                         "others; give a folder with more code")
    return train, validation


def funnel(rows, dropped):
    """What became of every file: documents and bytes by reason, language and source; text: the
    bytes of the documents that were made of them."""
    table = {"reason": {}, "language": {}, "source": {}}
    for row in [*dropped, *rows]:
        reason = row.get("reason", "kept")
        entry = table["reason"].setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += row["bytes"]
        if reason != "kept" and len(entry["examples"]) < 3:
            entry["examples"].append(row["path"])
        for group in ("language", "source") if reason == "kept" else ("source",):
            entry = table[group].setdefault(row[group], {"documents": 0, "bytes": 0, "text": 0})
            entry["documents"] += 1
            entry["bytes"] += row["bytes"]
            entry["text"] += row["text_bytes"] if reason == "kept" else 0
    return table


def print_funnel(table):
    """Print a funnel: what was dropped why, and the languages of what was kept."""
    reasons = sorted(table["reason"].items(), key=lambda item: (item[0] != "kept",
                                                                -item[1]["bytes"]))
    total = sum(entry["bytes"] for _, entry in reasons) or 1
    print(f"{'':28}{'files':>9}{'bytes':>14}{'share':>8}  such as")
    for reason, entry in reasons:
        print(f"{reason:28}{entry['documents']:9,}{entry['bytes']:14,}"
              f"{entry['bytes'] / total:8.1%}  {', '.join(entry['examples'])[:58]}")
    languages = sorted(table["language"].items(), key=lambda item: -item[1]["text"])
    print("kept: " + ", ".join(f"{name} {entry['text'] / 1e6:.1f} MB"
                               for name, entry in languages[:8]))


def draw_funnel(table, path):
    """Write the picture of a funnel (PNG): what remains after each reason, and the languages."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, of, title in ((left, "reason", "bytes", "what became of the files"),
                                  (right, "language", "text", "languages of what was kept")):
        items = sorted(table[name].items(), key=lambda item: -item[1][of])[:16]
        bars = axes.barh([key for key, _ in items], [entry[of] / 1e6 for _, entry in items],
                         color=["tab:green" if key == "kept" or name == "language" else "tab:gray"
                                for key, _ in items])
        axes.bar_label(bars, fmt="{:.3g}", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set(title=title, xlabel="MB")
    figure.savefig(path, dpi=120)


def draw_grounding(stages, path):
    """Write the picture of the grounding's stages (PNG): what is left after each, and its worth."""
    names = [f"stage {number}" for number in range(1, len(stages) + 1)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(names, [stage["bytes"] / 1e6 for stage in stages], color="tab:gray")
    axes.bar_label(bars, [f"{stage['bytes'] / 1e6:.1f} MB" for stage in stages])
    axes.set(title="text-code grounding, from coarse to fine", ylabel="left after the stage, MB")
    axes.margins(y=0.1)
    marks = axes.twinx()
    marks.plot(names, [stage["mean mark"] for stage in stages], "o-", color="tab:green")
    marks.set_ylabel("mean mark of what is left", color="tab:green")
    marks.set_ylim(0)
    figure.savefig(path, dpi=120)


def default_benchmarks():
    """The benchmark files that are here: the ladder, and what evaluate.py has fetched."""
    found = {str(benchmark_file(entry)) for entry in benchmarks()["benchmarks"].values()}
    return [path for path in sorted(found) if Path(path).exists()]


def load_documents(out, part):
    """The documents of out/data: part is train, validation, validation_text or validation_math."""
    return read_documents(Path(out) / "data" / f"{part}.jsonl")


def made_from(folder, settings):
    """The manifest of a folder; InputError if it was made from other settings."""
    manifest = read_json(folder / "manifest.json")
    for name, value in settings.items():
        if manifest.get(name) != value:
            raise InputError(f"{folder} was made from {name} {manifest.get(name)}, not {value}; "
                             "give another --out, or --fresh to make it anew")
    return manifest


def fingerprint(found, benchmark_files):
    """A hash of all that the units' results depend on: files, benchmarks, and this code."""
    states = [(os.lstat if unit.files else os.stat)(Path(unit.place, name))[6:9:2]
              for unit in found if not is_synthetic(unit.place) for name in (unit.files or [""])]
    read = [*benchmark_files, *(Path(__file__).parent / name for name in (
        "data.py", "fim.py", "evaluate.py", "support/files.py", "support/sandbox.py",
        "support/supervisor.py", "support/values.py"))]
    state = [found, states, sys.version,
             [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in read]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def write_corpus(folder, corpus, parts, manifest):
    """Write {part}.jsonl for each part, dropped.jsonl, the funnel's picture and the manifest."""
    with whole_folder(folder) as new:
        for part, rows in parts.items():
            digest = hashlib.sha256()
            with open(new / f"{part}.jsonl", "wb") as file:
                for row in rows:
                    digest.update(line := corpus.line(row))
                    file.write(line)
            manifest[part] = {"documents": len(rows), "sha256": digest.hexdigest(),
                              "bytes": sum(row["text_bytes"] for row in rows)}
        lost = corpus.dropped + [row for row in corpus.rows if "reason" in row]
        keys = ("path", "repo", "source", "bytes", "reason", "value")
        for name, reason in (("dropped", None), ("contamination", "contaminated")):
            write_text(new / f"{name}.jsonl", "".join(
                json.dumps({key: row[key] for key in keys}) + "\n" for row in lost
                if reason in (None, row["reason"])))
        draw_funnel(manifest["funnel"], new / "funnel.png")
        if manifest["grounding"]:
            draw_grounding(manifest["grounding"], new / "grounding.png")
        write_json(new / "manifest.json", manifest)


def explain_place(source):
    """Say so if a folder has the name of one of NAMED_PLACES, which is not read."""
    kind, place = kind_and_place(source)
    if place in NAMED_PLACES and Path(place).is_dir():
        prefix = source.removesuffix(place)
        print(f"--source {source}: {NAMED_PLACES[place]}; for the folder {place} give "
              f"{prefix}./{place}")


def reason_summary(rows):
    """Why files are no code to train on: counts and an example of each reason, the most frequent
    first."""
    examples = defaultdict(list)
    for row in rows:
        examples[row.get("reason", f"kept as {row['kind']}")].append(row["path"])
    ordered = sorted(examples.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{reason}: {len(paths):,}, such as {paths[0]}"
                     for reason, paths in ordered) or "no files"


def prepare_data(out, sources, fresh=False, benchmark_files=None, workers=None, teacher=None):
    """Make out/data from the sources unless it is there -> its manifest. teacher: the URL of an LLM
    that writes programs and marks grounding documents."""
    folder, sources = Path(out) / "data", [str(source) for source in sources]
    wanted = {"benchmarks": [Path(f).name for f in benchmark_files]} if benchmark_files else {}
    if teacher:
        wanted["teacher"] = teacher
    if fresh or not folder.exists():
        benchmark_files = tuple(benchmark_files or default_benchmarks())
        found = [unit for source in sources for unit in units(source)]
        if teacher:
            found += teacher_units(teacher)
        for source in sources:
            explain_place(source)
        work, state = Path(out) / "data.unfinished", fingerprint(found, benchmark_files)
        if not (work / "state").exists() or (work / "state").read_text() != state:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_text(work / "state", state)
        corpus = Corpus(process_units(found, work, benchmark_files, workers or cores()))
        total, accuracy = len(corpus.rows) + len(corpus.dropped), corpus.name_ambiguous()
        corpus.drop_duplicates()
        if not any(row["kind"] == "code" for row in corpus.kept()):
            raise InputError(f"--source {' '.join(sources)}: no source code found there "
                             f"({reason_summary([*corpus.dropped, *corpus.rows])})")
        grounding = corpus.filter_grounding(teacher)
        train, validation = split(corpus.kept())
        corpus.drop_near_copies(train, validation)
        parts = {"train": [row for row in train if "reason" not in row],
                 "validation": [row for row in validation if row["kind"] == "code"]}
        for kind in ("text", "math", "grounding"):
            if rows := [row for row in validation if row["kind"] == kind]:
                parts[f"validation_{kind}"] = rows
        if not parts["train"]:
            raise InputError("every document resembles a held-out one; give more code")
        table = funnel(corpus.rows, corpus.dropped)
        assert sum(entry["documents"] for entry in table["reason"].values()) == total
        settings = {"rules": [rule.name for rule in RULES], "bands": [BANDS, ROWS], "near": NEAR,
                    "near held out": NEAR_HELD_OUT, "held out": HELD_OUT_SHARE,
                    "grounding stages": GROUNDING_STAGES,
                    "data.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
        manifest = {"sources": sources, "teacher": teacher,
                    "benchmarks": [Path(f).name for f in benchmark_files],
                    "settings": settings, "python": sys.version.split()[0],
                    "numpy": np.__version__, "torch": torch.__version__, "funnel": table,
                    "language accuracy": accuracy, "grounding": grounding}
        write_corpus(folder, corpus, parts, manifest)
        shutil.rmtree(work)
    return made_from(folder, {"sources": sources, **wanted})


def prepare_tokenizer(out, vocab_size, fresh=False):
    """Train out/tokenizer on the training documents in out/data unless it is there."""
    folder, train = Path(out) / "tokenizer", read_json(Path(out, "data", "manifest.json"))["train"]
    settings = {"vocab_size": vocab_size, "documents": train["sha256"]}
    if fresh or not folder.exists():
        texts = [document["text"] for document in load_documents(out, "train")]
        left = TOKENIZER_TEXT
        if sum(map(len, texts)) > left:                     # some of all of it
            order = generator(0, "tokenizer", 0).permutation(len(texts))
            texts = [texts[i] for i in order]
        for i, text in enumerate(texts):
            texts[i] = text[:left]
            left -= len(texts[i])
        tokenizer = Tokenizer.train(texts, vocab_size)
        with whole_folder(folder) as new:
            tokenizer.save(new)
            write_json(new / "manifest.json", settings)
    made_from(folder, settings)


def print_corpus(out, manifest):
    """Print what out/data holds, and what became of the rest."""
    for part in (name for name in manifest if name.split("_")[0] in ("train", "validation")):
        print(f"{out}/data/{part}.jsonl: {manifest[part]['documents']:,} documents, "
              f"{manifest[part]['bytes']:,} bytes")
    print_funnel(manifest["funnel"])
    for languages, share in manifest["language accuracy"].items():
        print(f"languages that share {languages} are told apart with an accuracy of {share:.1%}")
    for number, stage in enumerate(manifest["grounding"], 1):
        print(f"grounding stage {number}: {stage['documents']:,} documents, {stage['bytes']:,} "
              f"bytes left; marks above {stage['bar']:.2f} were told from others with an AUC of "
              f"{stage['auc']:.2f}")


# ------------------------------------------------------------------------------------------------
# Documents -> batches


def check_document_starts(starts):
    """Raise ValueError unless each start (B, T) is its own index or that of the token before it.

    The attention kernels rely on it, and cannot look themselves without stopping the GPU.
    """
    before = np.concatenate([np.zeros_like(starts[:, :1]), starts[:, :-1]], axis=1)
    wrong = np.argwhere((starts != before) & (starts != np.arange(starts.shape[1])))
    if len(wrong):
        row, place = wrong[0]
        raise ValueError(f"document_starts[{row}, {place}] is {starts[row, place]}, expected "
                         f"{before[row, place]} (as before) or {place} (a new document)")


def encoded_documents(documents, tokenizer):
    """Yield the ids of each document, a thousand at a time: lists of ids are large."""
    for start in range(0, len(documents), 1000):
        yield from tokenizer.encode_batch(
            [document["text"] for document in documents[start:start + 1000]])


class Stream:
    """Documents one after another, each preceded by <|endoftext|>, as one long run of ids.

    An epoch cuts it into slices of T + 1 ids that overlap by one, in a random order.
    """

    def __init__(self, name, documents, tokenizer, T, seed, python=None):
        """documents: the ids of each; python: whether it is Python, for the syntax nodes; None:
        they are repositories, where the paths of files say so."""
        self.name, self.T, self.seed, self.epoch = name, T, seed, None
        self.tokenizer, self.python, end = tokenizer, python, tokenizer.special[ENDOFTEXT]
        self.tree = functools.lru_cache(maxsize=4000)(self.tree)     # some 30 kB each
        encoded = [np.array([end, *ids], dtype=np.uint32) for ids in documents]
        self.ids = np.concatenate([*encoded, [end]]).astype(np.uint32)
        self.starts = np.cumsum([0, *map(len, encoded)])    # of the documents, at their <|endof...
        if len(self.ids) < 2 * T + 2:
            raise InputError(f"{len(self.ids):,} tokens of {name} are too few for rows of {T}; "
                             f"give more {name} or a smaller --seq-len")
        self.rows = (len(self.ids) - 1) // T - 1            # of an epoch; one to spare: the offset

    def slice(self, index):
        """Slice `index` of the endless run: where it starts, a list of T + 1 ids."""
        epoch, place = divmod(index, self.rows)
        if epoch != self.epoch:             # where its first slice begins, the order of all
            rng = generator(self.seed, f"order {self.name}", epoch)
            self.offset, self.order = int(rng.integers(self.T)), rng.permutation(self.rows)
            self.epoch = epoch
        start = self.offset + int(self.order[place]) * self.T
        return start, self.ids[start:start + self.T + 1].tolist()

    @functools.cached_property
    def heads(self):
        """How many characters begin in each token of the vocabulary."""
        pieces = (self.tokenizer.decode_bytes([i]) for i in range(self.tokenizer.vocab_size))
        return np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], np.int32)

    def tree(self, number):
        """Of a document: where each token begins, in characters, and the syntax nodes of its Python
        files, as arrays of their kinds, starts and ends."""
        ids = self.ids[self.starts[number] + 1:self.starts[number + 1]]
        places = np.concatenate([[0], np.cumsum(self.heads[ids])]).astype(np.int32)
        nodes = []
        for first, text in self.python_files(number, ids):
            shift = places[first]
            nodes += [(kind, start + shift, end + shift)
                      for kind, start, end in syntax_nodes(text)]
        kinds, starts, ends = zip(*nodes) if nodes else ((), (), ())
        return places, kinds, np.array(starts, np.int32), np.array(ends, np.int32)

    def python_files(self, number, ids):
        """The Python files of a document -> (index of its first id, text) of each."""
        if self.python is not None:
            return [(0, self.tokenizer.decode(ids.tolist()))] if self.python[number] else []
        borders = [*np.flatnonzero(ids == self.tokenizer.special[FILE_SEP]), len(ids)]
        files = []
        for start, stop in zip(borders, borders[1:]):
            first = start + path_end(self.tokenizer, ids[start:stop])
            if self.tokenizer.decode(ids[start + 1:first].tolist()).endswith(".py\n"):
                files.append((first, self.tokenizer.decode(ids[first:stop].tolist())))
        return files

    def nodes(self, start, stop):
        """The syntax nodes in the text of ids[start:stop], a piece of one document."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        places, kinds, starts, ends = self.tree(number)
        first, last = places[[start - self.starts[number] - 1, stop - self.starts[number] - 1]]
        text = self.tokenizer.decode_bytes(self.ids[max(start, stop - 4):stop].tolist())
        partial = text[-3:].decode(errors="replace").endswith("\ufffd")  # its last character is cut
        low, high = np.searchsorted(starts, [first, last])
        return [Node(kinds[i], int(starts[i] - first), int(ends[i] - first))
                for i in range(low, high) if ends[i] <= last - partial]


def path_end(tokenizer, ids):
    """Where a file begins in ids that begin with <|file_sep|> and its path (figure 4)."""
    return next((i + 1 for i, token in enumerate(ids)
                 if b"\n" in tokenizer.decode_bytes([int(token)])), len(ids))


def interleaved(weights):
    """One round of the kinds of a mixture {kind: weight}, each as evenly spread as can be."""
    total, round_, used = sum(weights.values()), [], Counter()
    step = math.gcd(*weights.values())
    for place in range(1, total // step + 1):
        kind = max(weights, key=lambda kind: weights[kind] * place / total - used[kind])
        round_.append(kind)
        used[kind] += 1
    return round_


class Batches:
    """batches(step) -> the step's rows for one rank: a list of device batches, dicts of tensors.

    A row is a slice of one kind's stream; the kinds take turns by their weights in the mixture
    (report, section 3.1.2), a kind that is absent leaves its turns to the others. Pieces of code
    are turned into FIM or not, each by itself. An <|endoftext|> is the last target of the document
    before it and the first input of the one after it, so no prediction crosses documents.
    """

    def __init__(self, corpus, tokenizer, seq_len, batch_rows, device_batch=None, seed=0,
                 fim_rate=FIM_RATE, rank=0, world=1, mixture=MIXTURE, repositories=False):
        if batch_rows % world:
            raise InputError(f"{batch_rows} rows a step cannot be shared evenly by {world} "
                             "processes; change --batch-tokens")
        self.tokenizer, self.T, self.seed, self.fim_rate = tokenizer, seq_len, seed, fim_rate
        self.batch_rows, self.rank, self.world = batch_rows, rank, world
        self.device_batch, self.repositories = device_batch or batch_rows, repositories
        self.end, self.file_sep = tokenizer.special[ENDOFTEXT], tokenizer.special.get(FILE_SEP)
        parts = defaultdict(list)
        for document in corpus:
            parts[KINDS[document.get("kind", "code")]].append(document)
        weights = {kind: weight for kind, weight in zip(("code", "text", "math"), mixture)
                   if weight and kind in parts}
        if not weights:
            raise InputError(f"no documents of the mixture {mixture} (code, text, math)")
        self.round, self.streams = interleaved(weights), {}
        for kind in weights:
            documents, python = encoded_documents(parts[kind], tokenizer), [
                document.get("language") == "python" for document in parts[kind]]
            if repositories and kind == "code":
                documents, python = repository_documents(parts[kind], tokenizer, seq_len), None
            self.streams[kind] = Stream(kind, documents, tokenizer, seq_len, seed, python)

    def epochs(self, steps):
        """How often each kind is seen in a number of steps."""
        return {kind: steps * self.batch_rows * self.round.count(kind) / len(self.round)
                / stream.rows for kind, stream in self.streams.items()}

    def slice(self, index):
        """Row `index` of the endless run, before FIM: its stream, where it starts there, a list
        of T + 1 ids."""
        rounds, place = divmod(index, len(self.round))
        kind = self.round[place]
        number = rounds * self.round.count(kind) + self.round[:place].count(kind)
        return self.streams[kind], *self.streams[kind].slice(number)

    def head(self, piece):
        """How many ids of a piece FIM leaves alone: an <|endoftext|> before it, and of a repository
        all up to the path of its last file (figure 4)."""
        files = [i for i, token in enumerate(piece) if self.repositories and token == self.file_sep]
        return files[-1] + path_end(self.tokenizer, piece[files[-1]:]) if files else (
            int(piece[0] == self.end))

    def fim_piece(self, ids, nodes, rng):
        """A piece of a document as FIM ids, no more than there were: the sentinels and the new
        borders between tokens take room, so the suffix loses its end, or the prefix its start.
        Where the middle alone is too long, the piece stays what it was, as None says."""
        text = self.tokenizer.decode_bytes(ids).decode("utf-8", errors="ignore")
        prefix, middle, suffix = map(self.tokenizer.encode, fim_document(text, rng, nodes))
        room = len(ids) - 3 - len(middle)                                       # three sentinels
        if room >= 0:
            suffix = suffix[:max(0, room - len(prefix))]
            prefix = prefix[max(0, len(prefix) - room):]
            return fim_ids(self.tokenizer, prefix, suffix, middle)

    def parts(self, start, head, stop, rng):
        """Where a piece that becomes FIM is cut into parts, the first with its head: short parts
        have more ends, and from few ends a small model does not learn to stop."""
        shares = FIM_PART[self.repositories]
        low, high = (max(SHORTEST_FIM, int(share * self.T)) for share in shares)
        sizes = rng.integers(low, high + 1, size=(stop - start) // low + 1)
        cuts = start + head + sizes.cumsum()
        return [start, *(int(cut) for cut in cuts if cut <= stop - low), stop]

    def row(self, index):
        """Row `index`: input_ids, targets and document_starts, each (T,).

        A FIM part is closed by <|endoftext|>; where it came out shorter than its place, the rest is
        <|endoftext|> without targets. The first part of a repository's last file sees the others.
        """
        [stream, at, ids], rng = self.slice(index), generator(self.seed, "fim", index)
        borders = [0, *(i for i in range(1, self.T) if ids[i] == self.end), self.T]
        out, targets, starts = [], [], []
        for start, stop in zip(borders, borders[1:]):
            fim = stream.name == "code" and rng.random() < self.fim_rate
            head = self.head(ids[start:stop]) if fim else 0
            inside = self.parts(start, head, stop, rng) if fim else [start, stop]
            for start, stop in zip(inside, inside[1:]):
                piece, after = ids[start:stop], ids[stop]       # after: the target of its last id
                if fim and stop - start - head >= SHORTEST_FIM:
                    nodes = stream.nodes(at + start + head, at + stop)
                    if new := self.fim_piece(piece[head:], nodes, rng):
                        piece, after = piece[:head] + new, self.end
                missing, head = stop - start - len(piece), 0
                out += piece + [self.end] * missing
                targets += piece[1:] + [after] + [-100] * missing
                starts += [start] * (stop - start)
        return np.array(out), np.array(targets), np.array(starts)

    def __call__(self, step):
        share = self.batch_rows // self.world
        first = step * self.batch_rows + self.rank * share
        rows = [self.row(first + j) for j in range(share)]
        return [self.device_rows(rows[j:j + self.device_batch])
                for j in range(0, share, self.device_batch)]

    def device_rows(self, rows):
        inputs, targets, starts = map(np.stack, zip(*rows))                         # (B, T) each
        check_document_starts(starts)
        inputs, targets, starts = map(torch.from_numpy, (inputs, targets, starts))
        return {"input_ids": inputs, "targets": targets, "count": int((targets != -100).sum()),
                "document_starts": starts if starts.any() else None}


def parse_mixture(text):
    """The weights of code, text and mathematics in "70:20:10"."""
    if not re.fullmatch(r"\d{1,3}:\d{1,3}:\d{1,3}", text) or not sum(map(int, text.split(":"))):
        raise InputError(f"--mixture {text}: expected three whole numbers, as in 70:20:10")
    return tuple(map(int, text.split(":")))


DEFAULT_SOURCES = ["stdlib", "text:stdlib", "math:generated"]


def source_flag(parser):
    parser.add_argument("--source", action="append", metavar="[KIND:]PLACE",
                        help="a folder, .tar.gz, .zip, .jsonl or github:owner/name[@ref], "
                        "repeatable; also `stdlib` and `packages`, the installed ones (a folder of "
                        f"that name is ./packages); kind: {', '.join(KINDS)}; also "
                        "`math:generated` and `code:generated` (default: stdlib, "
                        "text:stdlib and math:generated; from --size small on packages too)")


def why(path, benchmark_files=None):
    """Print what each rule says of a file."""
    file = read_file(path, path.as_posix(), "")
    if file.data is None and file.reason == "unreadable":
        raise InputError(f"{path}: no such file, or it cannot be read")
    contamination = Contamination(benchmark_files or default_benchmarks())
    found = clean(file, Unit("code", "", "", ""), contamination)
    language = language_of(file.path, file.data)
    print(f"{path}: {language or 'none of the 92 languages'}, {file.size:,} bytes")
    if file.data and language:
        text = normalize(file.data.decode("utf-8-sig", errors="replace"))
        if language == "jupyter-notebook":
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                text = notebook_script(text)
        for rule in RULES if text.strip() else ():
            if rule.of is None or language in rule.of:
                value = rule.value(text, text.split("\n"))
                print(f"  {'DROPS' if rule.drops(value) else 'keeps'}  {rule.name}: {value}")
    print(f"dropped: {found['reason']} ({found['value']})" if "reason" in found else
          f"kept, {'with fakes for private data' if found['text'] != text else 'as it is'}")


def main():
    parser = argparse.ArgumentParser(description="Gather code, hold some out, train a tokenizer.")
    source_flag(parser)
    parser.add_argument("--why", type=Path, metavar="FILE", help="what each rule says of a file")
    parser.add_argument("--benchmarks", nargs="+", metavar="FILE", help="problem files that "
                        "training text must not share ten words with (default: the ladder and "
                        "what evaluate.py has fetched)")
    parser.add_argument("--teacher", metavar="URL", help="an OpenAI-compatible server, as "
                        "http://host:8000/v1 or http://host:8000/v1#model; it writes programs and "
                        "marks grounding documents; it alone is sent the key in OPENAI_API_KEY")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096,
                        help="ids of the tokenizer, control tokens included (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="make both anew")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise InputError("--workers: must be at least 1")
    if args.why:
        return why(args.why, args.benchmarks)
    if args.teacher is not None:
        check_server(args.teacher)
    print_corpus(args.out, prepare_data(args.out, args.source or DEFAULT_SOURCES, args.fresh,
                                        args.benchmarks, args.workers, args.teacher))
    prepare_tokenizer(args.out, args.vocab_size, args.fresh)
    print(f"{args.out}/tokenizer: {Tokenizer.load(Path(args.out) / 'tokenizer').vocab_size:,} ids")


if __name__ == "__main__":
    run(main)
