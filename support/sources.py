"""Sources of code and text -> files with their bytes, or with the reason why they are not read.

Nothing is unpacked to disk, and no link is followed.
"""

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

# Files that one process reads together: some files of a folder (names), or all of another source.
# kind: which part of the mixture they are for; place: the source without its kind
Batch = namedtuple("Batch", "kind source place repo names", defaults=[None])
# data: the bytes, or None for the given reason
File = namedtuple("File", "path repo data size reason", defaults=[None])

KINDS = ("code", "grounding", "text", "math")
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
TABLES = (".jsonl", ".jsonl.gz")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
LARGEST_FILE = 1_000_000    # bytes
LARGEST_ARCHIVE = 2 << 30   # bytes, both packed and unpacked
BATCH_FILES = 256


def source_flag(parser):
    parser.add_argument("--source", action="append", metavar="[KIND:]PLACE",
                        help="a folder, .tar.gz, .jsonl or github:owner/name[@ref]; `stdlib` or "
                        "`packages`, the installed ones (give a folder of that name as "
                        f"./packages); with one of {', '.join(KINDS)} as its kind; also "
                        "`math:generated` and `code:generated`; repeatable (default: stdlib, "
                        "text:stdlib and math:generated; from --size small on packages too)")


def file_batches(source):
    """The batches of a source, [kind:]place, in the order of their paths.

    kind: code (default), grounding, text or math. place: a folder; an archive such as .tar.gz; a
    .jsonl file with a text field (and a path, for code); github:owner/name[@ref]; stdlib or
    packages, the installed ones; or generated, for code and math.
    """
    kind, colon, place = source.partition(":")
    if not colon or kind not in KINDS:
        kind, place = "code", source
    if source.encode(errors="replace").decode() != source:
        raise InputError(f"--source {source}: its name is not UTF-8")
    if "://" in place:                                      # not printed, it may contain a password
        raise InputError("--source: URLs are not read; download the files and give their folder, a "
                         "GitHub repository as --source github:owner/name[@ref], or an LLM teacher "
                         "as --teacher URL")
    if place.startswith("github:"):
        return [Batch(kind, source, str(fetch_github(place)), place.split(":")[1])]
    if place == "generated":
        if kind not in ("code", "math"):
            raise InputError(f"--source {source}: expected math:generated or code:generated")
        return [Batch(kind, source, place, "synthetic")]
    if place.endswith(ARCHIVES + TABLES) and Path(place).is_file():
        return [Batch(kind, source, place, Path(place).name.split(".")[0])]
    return folder_batches(kind, source, place)


def folder_batches(kind, source, place):
    paths = sysconfig.get_paths()
    root = Path({"stdlib": paths["stdlib"], "packages": paths["purelib"]}.get(place, place))
    root = root.resolve()
    if not place or not root.is_dir():
        problem = "cannot be read" if Path(place).is_file() else "no such file or folder"
        raise InputError(f"--source {source}: {problem}; expected a folder, an archive "
                         f"({', '.join(ARCHIVES)}), JSON Lines ({', '.join(TABLES)}), stdlib, "
                         "packages, generated or github:owner/name, with or without code:, "
                         "grounding:, text: or math: in front")
    names = []                  # of files and, to account for them, of skipped folders

    def on_error(error):
        names.append(Path(error.filename).relative_to(root).as_posix())

    def on_skip(folder):
        if folder.name != "__pycache__":                    # holds nothing but bytecode
            names.append(folder.relative_to(root).as_posix() + "/")

    skipped = SKIPPED_FOLDERS | (STDLIB_SKIPPED if place == "stdlib" else set())
    for path in walk_files(root, skipped, on_error, on_skip):
        if place != "stdlib" or path.suffix == ".py":
            names.append(path.relative_to(root).as_posix())
    repo = {"stdlib": "cpython", "packages": None}.get(place, root.name)
    return [Batch(kind, source, str(root), repo, names[i:i + BATCH_FILES])
            for i in range(0, len(names), BATCH_FILES)]


def teacher_batch(url):
    """The programs of an LLM teacher. They have a flag of their own, --teacher, because a --source
    must never be sent the key in OPENAI_API_KEY."""
    check_server(url)
    return Batch("code", f"teacher:{url}", url, "synthetic")


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


def refusal(size, is_regular):
    """Why a file is not read, or None."""
    if not is_regular:                                      # reading a pipe would never end
        return "link or no plain file"
    return "over 1 MB" if size > LARGEST_FILE else None


def read_file(path, name, repo):
    if name.endswith("/"):
        return File(name, repo, None, 0, "skipped folder")
    data = None
    size = 0
    try:
        status = path.lstat()
        is_regular = stat.S_ISREG(status.st_mode)
        size = status.st_size if is_regular else 0
        name.encode()
        reason = refusal(size, is_regular)
        if not reason:
            data = path.read_bytes()
    except UnicodeError:
        reason = "name not UTF-8"
    except OSError:
        reason = "unreadable"
    return File(name, repo, data, size, reason)


def read_archive(batch):
    total = 0
    with tarfile.open(batch.place) as archive:
        for member in archive:
            total += member.size
            if total > LARGEST_ARCHIVE:
                raise InputError(f"{batch.place}: unpacks to more than {LARGEST_ARCHIVE >> 30} GB")
            if member.isdir():
                continue
            reason = refusal(member.size, member.isfile())
            if member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name):
                reason = "path leaves the archive"
            data = None if reason else archive.extractfile(member).read()
            size = member.size if member.isfile() else 0
            yield File(member.name, batch.repo, data, size, reason)


def read_table(batch):
    """The rows of a .jsonl file with a text (or content) field. A broken row counts as a file."""
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
            reason = refusal(len(data), True)
            repo = str(row.get("repo", batch.repo))
            yield File(name, repo, None if reason else data, len(data), reason)


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
