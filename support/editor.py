"""What an editor hands to a model: the text around a cursor, and the most relevant other files."""

import contextlib
import re
from collections import Counter
from pathlib import Path

from support.files import InputError, read_text, walk_files

FILL = "<FILL>"             # marks where to infill
IDENTIFIER = re.compile(r"[A-Za-z_]\w{2,}")
LARGEST = 1_000_000         # bytes; larger files are not considered
# Files that use one another although their suffixes differ, such as a C file and its header
RELATED_SUFFIXES = [
    {".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".inl", ".cu", ".cuh", ".m", ".mm"},
    {".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".mts", ".cts", ".vue", ".svelte"},
    {".py", ".pyi", ".pyw", ".pyx", ".pxd"},
    {".java", ".kt", ".kts", ".scala", ".groovy"}]


def split_at_cursor(text, path, line=None, column=None):
    """Split the text of a file at the place to infill -> (prefix, middle, suffix).

    With the mark <FILL>, or a line and column, the middle is empty; with a line only, it is that
    line. Lines and columns count from 1, as in editors.
    """
    if line is None:
        if text.count(FILL) != 1:
            raise InputError(f"{path}: holds {text.count(FILL)} {FILL} marks, expected one; "
                             "insert the mark or give --line N")
        prefix, suffix = text.split(FILL)
        return prefix, "", suffix
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{path}: has lines 1 to {len(lines)}, there is no line {line}")
    length = len(lines[line - 1])
    start = sum(len(before) + 1 for before in lines[:line - 1])
    end = start + length
    if column is not None:
        if not 1 <= column <= length + 1:
            raise InputError(f"{path}: line {line} has columns 1 to {length + 1}, not {column}")
        start += column - 1
        end = start
    return text[:start], text[start:end], text[end:]


def relevant_files(folder, file, prefix, suffix, count=8):
    """The (path, text) of the files in a folder that have most in common with the code around a
    cursor, the most relevant last.

    A file scores 1 / (number of files that have it) for each identifier it shares with that code.
    Only text files with a related suffix are considered, not links, hidden files or installed
    packages. Not published; ours.
    """
    folder = Path(folder)
    file = Path(file)
    if not folder.is_dir():
        raise InputError(f"--repo {folder}: no such folder")
    suffixes = {file.suffix.lower()}
    for group in RELATED_SUFFIXES:
        if suffixes <= group:
            suffixes = group
    texts = {}
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if (path.suffix.lower() in suffixes and name.isprintable() and path.name[0] != "."
                and not path.is_symlink() and path.resolve() != file.resolve()):
            with contextlib.suppress(InputError, OSError):  # not text, not readable, or just gone
                if path.is_file() and path.stat().st_size < LARGEST:
                    texts[name] = read_text(path)
    around = set(IDENTIFIER.findall(prefix[-2000:] + suffix[:1000]))
    shared = {name: around & set(IDENTIFIER.findall(text)) for name, text in texts.items()}
    files_with = Counter(word for words in shared.values() for word in words)
    relevance = {name: sum(1 / files_with[word] for word in words)
                 for name, words in shared.items() if words}
    ranked = sorted(relevance, key=lambda name: (relevance[name], name))
    return [(name, texts[name]) for name in ranked[-count:]]


def repository_at_cursor(folder, file, prefix, suffix):
    """What a prompt says about a file's repository: its name, the file's path in it, and
    other files. These are arguments of `infill_prompt` in fim.py."""
    root = Path(folder).resolve()
    path = Path(file).resolve()
    if path.is_relative_to(root):
        path = path.relative_to(root)
    else:
        path = Path(file)
    return {"files": relevant_files(folder, file, prefix, suffix), "name": root.name,
            "path": path.as_posix()}


# ------------------------------------------------------------------------------------------------
# Where a middle ends

OPENING = {")": "(", "]": "[", "}": "{"}
DISTINCT = 4                # word characters a line needs to be recognized in the suffix; ours


def middle_end(middle, prefix, suffix, final=False):
    """Where to end a middle that is too long, in characters; None if it has not, so far.

    Models often do not stop by themselves, instruct models hardly ever. At a cursor inside a line
    the middle ends with its line, and earlier where it reaches the text after the cursor. Between
    the indentation of a line and its text no rule applies. Elsewhere it ends before the first line,
    from its second on, that

    1. is the next line of the suffix,
    2. is indented less than the line of the cursor, because the block is complete,
    3. is the third of three equal lines, or
    4. follows a line with text, if the suffix continues right below the cursor and at its
       indentation or deeper: then a line is missing there, not a block.

    final: the middle is complete. Otherwise its last line is not, and only rule 4 applies to it.
    """
    before = prefix.rpartition("\n")[2]                     # of the line of the cursor
    after, _, below = suffix.partition("\n")
    if before.strip() and after.strip():
        return inline_end(middle, after.rstrip(), final)
    if before and after.strip():                            # between the indentation and the text
        return None
    if after.strip():       # at the start of a line, with which the rest of the file begins
        below = suffix
    lines = middle.split("\n")
    cursor = indentation(before + lines[0])
    next_line = next((line for line in below.split("\n") if line.strip()), "")
    directly_below = below.partition("\n")[0]
    one_line = directly_below.strip() and indentation(directly_below) >= cursor
    position = 0                                            # of the line in the middle
    for i in range(1, len(lines)):
        position += len(lines[i - 1]) + 1
        complete = final or i < len(lines) - 1
        if (one_line and middle[:position].strip()
                or complete and ends_middle(lines[:i + 1], next_line, cursor)):
            kept = middle[:position]
            # the suffix may have the line end already
            return len(kept.rstrip()) if suffix.startswith("\n") else len(kept)
    return None


def ends_middle(lines, next_line, cursor):
    """Rules 1 to 3 of `middle_end` for the last of these lines."""
    line = lines[-1]
    if not line.strip():
        return False
    is_next = line.rstrip() == next_line.rstrip() and len(re.findall(r"\w", line)) >= DISTINCT
    return is_next or indentation(line) < cursor or lines[-3:] == [line] * 3


def inline_end(middle, after, final):
    """Where a middle that is followed by `after` on the same line ends: at the bracket that closes
    the one open before the cursor, else where it repeats `after`, else at the line end. None: not
    yet."""
    line, line_end, _ = middle.partition("\n")
    following = after.lstrip()[0]
    opening = OPENING.get(following)        # None: not a closing bracket
    depth = 0                               # of brackets that were opened in the middle
    for i, character in enumerate(line):
        if character == opening:
            depth += 1
        elif opening and character == following:
            depth -= 1
            if depth < 0:                   # this bracket is the one after the cursor
                return i
    if not line_end and not final:
        return None
    if not opening and line.rstrip().endswith(after):
        return len(line.rstrip()) - len(after)
    return len(line) if line_end else None


def indentation(line):
    """The columns before the text of a line; 0 if it is blank."""
    line = line.expandtabs()
    return len(line) - len(line.lstrip()) if line.strip() else 0
