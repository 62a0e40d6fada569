"""Sources of code and text: folders, archives, JSON Lines, GitHub, what is installed, what is
generated -> files with their bytes, or with the reason why they have none.

Nothing is unpacked to the disk and no link is followed.
"""

import functools
import gzip
import json
import lzma
import os
import re
import stat
import sysconfig
import tarfile
import zlib
from collections import namedtuple
from pathlib import Path

from support import synthetic
from support.files import SKIPPED_FOLDERS, InputError, cache_folder, fetch, walk_files
from support.llm_client import check_server

# Files that one process reads together: some of a folder (names), or all of any other source.
# kind: which part of the mixture the source is; place: the source without its kind
Batch = namedtuple("Batch", "kind source place repo names", defaults=[None])
# data: the bytes, or None for the reason given
File = namedtuple("File", "path repo data size reason", defaults=[None])

KINDS = ("code", "grounding", "text", "math")
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
TABLES = (".jsonl", ".jsonl.gz")
INSTALLED = {"stdlib": "the standard library", "packages": "the installed packages",
             "generated": "generated text"}     # a folder of such a name is given as ./stdlib
STDLIB_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
LARGEST_FILE = 1_000_000    # bytes
LARGEST_ARCHIVE = 2 << 30   # bytes that an archive may have, and may unpack to
BATCH_FILES = 256


def kind_and_place(source):
    """The two parts of [kind:]place; the kind is code if it is not given."""
    kind, colon, place = source.partition(":")
    return (kind, place) if colon and kind in KINDS else ("code", source)


def explain_place(source):
    """Say so if there is a folder whose name means something else."""
    kind, place = kind_and_place(source)
    if place in INSTALLED and Path(place).is_dir():
        prefix = source.removesuffix(place)
        print(f"--source {source}: {INSTALLED[place]}; for the folder {place} give "
              f"{prefix}./{place}")


def file_batches(source):
    """The batches of a source, [kind:]place, in the order of their paths.

    kind: code (default), grounding, text or math. place: a folder, a .tar.gz archive, a .jsonl file
    with a text field (for code a path, too), github:owner/name[@ref], stdlib or packages (what is
    installed), or generated (code and math only).
    """
    kind, place = kind_and_place(source)
    if source.encode(errors="replace").decode() != source:
        raise InputError(f"--source {source}: its name is not UTF-8")
    if place.startswith("github:"):
        return [Batch(kind, source, str(fetch_github(place)), place.split(":")[1])]
    is_url = re.match("https?://", place, re.IGNORECASE)
    if is_url or (github_place(place) and not Path(place).exists()):
        refuse_url(place)
    if place == "generated":
        if kind not in ("code", "math"):
            raise InputError(f"--source {source}: expected math:generated or code:generated")
        return [Batch(kind, source, place, "synthetic")]
    if place.endswith(ARCHIVES + TABLES):
        if not Path(place).is_file():
            raise InputError(f"--source {source}: no such file")
        return [Batch(kind, source, place, Path(place).name.split(".")[0])]
    if Path(place).is_file():
        raise InputError(f"--source {source}: this type of file is not read; give a folder, an "
                         f"archive ({', '.join(ARCHIVES)}) or JSON Lines ({', '.join(TABLES)})")
    return folder_batches(kind, source, place)


def folder_batches(kind, source, place):
    paths = sysconfig.get_paths()
    root = Path({"stdlib": paths["stdlib"], "packages": paths["purelib"]}.get(place, place))
    root = root.resolve()
    if not place or not root.is_dir():
        raise InputError(f"--source {source}: no such folder; expected a folder, an archive "
                         f"({', '.join(ARCHIVES)}), JSON Lines ({', '.join(TABLES)}), stdlib, "
                         "packages, generated or github:owner/name, with code:, grounding:, text: "
                         "or math: before it or not")
    names = []                  # of files, and of folders that are skipped, to account for them

    def on_error(error):
        names.append(Path(error.filename).relative_to(root).as_posix())

    def on_skip(folder):
        if folder.name != "__pycache__":                    # it never holds anything but bytecode
            names.append(folder.relative_to(root).as_posix() + "/")

    skipped = SKIPPED_FOLDERS | (STDLIB_SKIPPED if place == "stdlib" else set())
    for path in walk_files(root, skipped, on_error, on_skip):
        if place != "stdlib" or path.suffix == ".py":
            names.append(path.relative_to(root).as_posix())
    repo = {"stdlib": "cpython", "packages": None}.get(place, root.name)
    return [Batch(kind, source, str(root), repo, names[i:i + BATCH_FILES])
            for i in range(0, len(names), BATCH_FILES)]


def teacher_batch(url):
    """The programs that an LLM teacher writes. Only --teacher gets here: a --source is never sent
    the key in OPENAI_API_KEY."""
    check_server(url)
    return Batch("code", f"teacher:{url}", url, "synthetic")


# ------------------------------------------------------------------------------------------------
# GitHub


def github_place(url):
    """github:owner/name[@ref] for the URL of a GitHub repository or of a page of it, else None."""
    match = re.match(r"(?:(?:https?|ssh|git)://)?(?:[^/@\s]*@)?(?:www\.)?github\.com(?::\d+)?[/:]"
                     r"([\w.-]+)/([\w.-]+?)(?:\.git)?(?:/(?:tree|blob|commits?|raw)/([\w.-]+))?"
                     r"(?=[/?#]|$)", url, re.IGNORECASE)
    if not match:
        return None
    owner, name, ref = match.groups()
    return f"github:{owner}/{name}" + (f"@{ref}" if ref else "")


def refuse_url(url):
    """Raise InputError for a source that is a URL, without the secrets that may be in it."""
    shown = re.sub(r"//[^/]*@", "//", url).partition("?")[0]
    advice = "download it and give the file or folder, or an LLM teacher as --teacher URL"
    place = github_place(url)
    if place:
        advice = f"for a GitHub repository give --source {place}"
    raise InputError(f"--source {shown}: URLs are not read; {advice}")


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


# ------------------------------------------------------------------------------------------------
# Batches -> files


def read_batch(batch):
    """Yield the files of a batch."""
    if batch.names is not None:
        for name in batch.names:
            yield read_file(Path(batch.place, name), name, batch.repo or name.split("/")[0])
    elif batch.repo == "synthetic":
        yield from synthetic_files(batch)
    else:
        reader = read_table if batch.place.endswith(TABLES) else read_archive
        try:
            yield from reader(batch)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError):
            yield File(Path(batch.place).name, batch.repo, None, 0, "archive broken from here on")


def checked(name, repo, size, is_regular, read):
    """A file with what read() gives, unless it is too large or no regular file."""
    if not is_regular:                                      # reading a pipe would never end
        return File(name, repo, None, 0, "link or no plain file")
    if size > LARGEST_FILE:
        return File(name, repo, None, size, "over 1 MB")
    return File(name, repo, read(), size)


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


def read_archive(batch):
    total = 0
    with tarfile.open(batch.place) as archive:
        for member in archive:
            total += member.size
            if total > LARGEST_ARCHIVE:
                raise InputError(f"{batch.place}: unpacks to more than {LARGEST_ARCHIVE >> 30} GB")
            if member.isdir():
                continue
            if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
                yield File(member.name, batch.repo, None, member.size, "path leaves the archive")
                continue
            read = functools.partial(member_bytes, archive, member)
            yield checked(member.name, batch.repo, member.size, member.isfile(), read)


def member_bytes(archive, member):
    return archive.extractfile(member).read()


def read_table(batch):
    """The rows of a .jsonl file with a text (or content) field; a broken row is a file, too."""
    opener = gzip.open if batch.place.endswith(".gz") else open
    with opener(batch.place, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(4 * LARGEST_FILE), b""), 1):
            name = f"{Path(batch.place).name}:{number}"
            try:
                row = json.loads(line)
                data = row.get("text", row.get("content")).encode()
                name = str(row.get("path", name))
            except (ValueError, AttributeError, RecursionError):
                yield File(name, batch.repo, None, len(line), "no row with a text")
                continue
            yield checked(name, str(row.get("repo", batch.repo)), len(data), True, lambda: data)


def synthetic_files(batch):
    if batch.kind == "math":
        results = [(synthetic.worked_problems(i), None) for i in range(synthetic.FILES)]
    elif batch.place == "generated":
        results = [(program, None) for program in synthetic.grammar_programs()]
    else:
        snippets = [Path(installed.place, name) for installed in file_batches("packages")
                    for name in installed.names if name.endswith(".py")]
        results = synthetic.teacher_programs(batch.place, snippets)
    ending = "txt" if batch.kind == "math" else "py"
    for number, (text, reason) in enumerate(results):
        data = text.encode(errors="replace")
        yield File(f"{number:04}.{ending}", batch.repo, None if reason else data, len(data), reason)
