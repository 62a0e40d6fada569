"""What an editor would hand to a model: the text around a cursor, and other files that matter."""

import contextlib
import re
from collections import Counter
from pathlib import Path

from support.files import InputError, read_text, walk_files

FILL = "<FILL>"             # marks the place to infill
IDENTIFIER = re.compile(r"[A-Za-z_]\w{2,}")
LARGEST = 1_000_000         # bytes of a file that is considered
# Files that use one another although their names end differently: a C file needs its header, a
# .tsx file imports .ts files, a .pyi file declares what a .py file defines
RELATED_SUFFIXES = [
    {".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".inl", ".cu", ".cuh", ".m", ".mm"},
    {".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".mts", ".cts", ".vue", ".svelte"},
    {".py", ".pyi", ".pyw", ".pyx", ".pxd"},
    {".java", ".kt", ".kts", ".scala", ".groovy"}]


def split_at_cursor(text, path, line=None, column=None):
    """Split the text of a file where to infill -> (prefix, middle, suffix).

    The middle is empty at the mark <FILL> and at a line and column; with a line only, it is that
    line. Lines and columns count from 1, in the text as an editor shows it.
    """
    if line is None:
        if text.count(FILL) != 1:
            raise InputError(f"{path}: holds {text.count(FILL)} {FILL} marks, expected one; "
                             "mark the place to fill or give --line N")
        prefix, suffix = text.split(FILL)
        return prefix, "", suffix
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{path}: has lines 1 to {len(lines)}, there is no line {line}")
    length = len(lines[line - 1])
    if column is not None and not 1 <= column <= length + 1:
        raise InputError(f"{path}: line {line} has columns 1 to {length + 1}, not {column}")
    line_start = sum(len(before) + 1 for before in lines[:line - 1])
    start = line_start if column is None else line_start + column - 1
    end = line_start + length if column is None else start
    return text[:start], text[start:end], text[end:]


def relevant_files(folder, file, prefix, suffix, count=8):
    """The files of a folder that have most in common with the code around a cursor -> a list of
    (path, text), the most relevant last.

    Each identifier that a file shares with that code counts 1 / (number of files that have it).
    Candidates are text files of a related type, without links, hidden files and installed packages
    (`walk_files`). Not published; ours.
    """
    folder, file = Path(folder), Path(file)
    if not folder.is_dir():
        raise InputError(f"--repo {folder}: no such folder")
    ending = file.suffix.lower()
    related = next((group for group in RELATED_SUFFIXES if ending in group), {ending})
    around = set(IDENTIFIER.findall(prefix[-2000:] + suffix[:1000]))
    texts = {}
    shared = {}                             # path -> the identifiers in common
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if (path.suffix.lower() not in related or path.name[0] == "." or not name.isprintable()
                or path.is_symlink() or path.resolve() == file.resolve()):
            continue
        with contextlib.suppress(InputError, OSError):      # not text, not readable, or just gone
            if path.is_file() and path.stat().st_size < LARGEST:
                texts[name] = read_text(path)
                shared[name] = around & set(IDENTIFIER.findall(texts[name]))
    files_with = Counter(word for words in shared.values() for word in words)
    relevance = {name: sum(1 / files_with[word] for word in words)
                 for name, words in shared.items() if words}
    ranked = sorted(relevance, key=lambda name: (relevance[name], name))
    return [(name, texts[name]) for name in ranked[-count:]]
