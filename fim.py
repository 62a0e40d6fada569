"""Fill-in-the-middle: documents cut in three for training, prompts for completing inside a file.

A document becomes prefix, middle and suffix, and the middle is moved to the end, so that a model
that only ever predicts the next token learns to fill a gap from both sides (report, figure 3):

    <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|endoftext|>

Where the cuts lie decides what is learned: at any two characters, around whole lines, around a few
words, or around a node of the syntax tree, which is what people ask for. With other files of the
repository before it, the same format serves completion across files (figure 4).

This file knows the formats, the cuts and how to ask a model for a middle. Which documents are cut
and how they are packed into rows is data.py's business, training pretrain.py's.

    python fim.py show FILE          # one function under every kind of cut and in every format
    python fim.py FILE --line 12     # write line 12 of FILE anew with the newest model in out/
    python fim.py FILE               # fill the place marked <FILL>; a few seconds
    python fim.py FILE --line 12 --column 9 --repo DIR      # at a cursor, other files at hand
"""

import argparse
import ast
import contextlib
import math
import re
import sys
import textwrap
import unicodedata
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import regex

from model import check_vocabulary, choose_attention, default_device, generate, load_model
from support.files import InputError, read_text, run, walk_files
from tokenizer import ENDOFTEXT, PATTERN, TextStream, Tokenizer

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"
FIM_RATE = 0.5              # not published; value of DeepSeek-Coder (arXiv 2401.14196, 3.1)
# The kinds of middles and their shares; not published; ours (README: measured)
SPANS = {"characters": 0.35, "lines": 0.25, "words": 0.1, "syntax": 0.3}
EMPTY = 0.01                # share of empty middles, of empty prefixes and of empty suffixes; ours
LINES, WORDS = 10, 16       # of a middle, at most; lines: value of ExecRepoBench; words: ours
# Syntax nodes, their weights in the span sampler of ExecRepoBench, by the report's authors, and
# their classes; comments (0.05), which Python's ast does not hold, are left out
NODES = {"import": (0.1, ast.Import, ast.ImportFrom), "return": (0.1, ast.Return),
         "if": (0.15, ast.If), "for": (0.15, ast.For, ast.AsyncFor), "while": (0.1, ast.While),
         "class": (0.1, ast.ClassDef), "function": (0.1, ast.FunctionDef, ast.AsyncFunctionDef),
         "assignment": (0.05, ast.Assign, ast.AnnAssign, ast.AugAssign),
         "expression": (0.05, ast.Call)}
KIND_OF = {node: kind for kind, (_, *nodes) in NODES.items() for node in nodes}
FILES_SHARE = 0.5           # of a prompt's room, for other files; not published; ours
SUFFIX_SHARE = 0.25         # of a prompt's room, for the suffix; not published; ours
MARK = "<FILL>"
# Files that use one another although their names end differently: a C file needs its header, a
# .tsx file imports .ts files, a .pyi file declares what a .py file defines
RELATED_SUFFIXES = [
    {".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".inl", ".cu", ".cuh", ".m", ".mm"},
    {".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".mts", ".cts", ".vue", ".svelte"},
    {".py", ".pyi", ".pyw", ".pyx", ".pxd"},
    {".java", ".kt", ".kts", ".scala", ".groovy"}]

# ------------------------------------------------------------------------------------------------
# A text -> where its middle lies

# A node of the syntax tree that makes a middle: its kind (of NODES), and where, in characters
Node = namedtuple("Node", "kind start end")


def normalize(text):
    """Unicode NFC, "\\n" line ends and no byte order mark, so that character offsets mean the same
    before and after encoding and no "\\r" stands next to a control token."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text)


def python_tree(text):
    """The syntax tree of a Python text; None if it does not parse."""
    with warnings.catch_warnings(action="ignore"):          # old programs have odd escapes
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def nodes_of(text):
    """All nodes of a Python text's syntax tree; none if it does not parse."""
    return [*ast.walk(tree)] if (tree := python_tree(text)) else []


def syntax_nodes(text):
    """The nodes of a Python text that make a middle, in its order; none if it does not parse.

    Of what has a body (or an else) it is that, of a call its arguments, of other statements all.
    """
    lines, found = text.split("\n"), []
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()

    def place(line, column):                            # ast counts the bytes of a line
        text = lines[line - 1]
        return starts[line - 1] + (column if text.isascii() else
                                   len(text.encode()[:column].decode(errors="ignore")))

    for node in nodes_of(text):
        if kind := KIND_OF.get(type(node)):
            parts = [node.args + node.keywords] if kind == "expression" else (
                [node.body, getattr(node, "orelse", [])] if hasattr(node, "body") else [[node]])
            for part in filter(None, parts):
                heads = part + getattr(part[0], "decorator_list", [])
                start = min(place(item.lineno, item.col_offset) for item in heads)
                start -= len(heads) > len(part)                         # the @
                end = max(place(item.end_lineno, item.end_col_offset) for item in part)
                before = text[place(node.func.end_lineno, node.func.end_col_offset):start] if (
                    kind == "expression") else "("
                if before.strip() == "(":               # not of f(x for x in y), nor of f((1), 2)
                    found.append(Node(kind, start, end))
    return sorted(found, key=lambda node: node[1:])


def draw(weights, rng):
    """One of the names of {name: weight}."""
    return list(weights)[rng.choice(len(weights), p=np.array([*weights.values()])
                                    / sum(weights.values()))]


def span(text, kind, rng, nodes=()):
    """Where a middle of a kind of SPANS lies in text -> (start, end), in characters.

    lines: half of the time one, else 2 to LINES, without the last line's end, and half of the time
    from where the code begins. words: 1 to WORDS pre-tokens. syntax: a kind by its weight in NODES,
    then one of its nodes. nodes: those of `syntax_nodes` that lie in the text. A text without any
    is cut by lines, one without a line that is not blank by characters. rng: numpy Generator.
    """
    if kind == "syntax" and nodes:
        present = {node.kind for node in nodes}
        kind = draw({name: NODES[name][0] for name in NODES if name in present}, rng)
        chosen = [node for node in nodes if node.kind == kind]
        return chosen[rng.integers(len(chosen))][1:]
    if kind == "words" and text:                                 # up to 16 of what BPE never joins
        words = [match.span() for match in regex.finditer(PATTERN, text)]
        first = rng.integers(len(words))
        return words[first][0], words[min(first + rng.integers(WORDS), len(words) - 1)][1]
    lines = [match.span() for match in re.finditer(r"[^\n]+", text) if not match[0].isspace()]
    if kind in ("lines", "syntax") and lines:           # half of the time a single one
        first = rng.integers(len(lines))
        last = first + (rng.integers(1, LINES) if rng.random() < 0.5 else 0)
        (start, end), end_of_last = lines[first], lines[min(last, len(lines) - 1)][1]
        if rng.random() < 0.5:                          # the cursor stands where the code begins
            start = end - len(text[start:end].lstrip())
        return start, end_of_last
    return tuple(sorted(rng.integers(0, len(text) + 1, size=2).tolist()))


def fim_document(text, rng, nodes=()):
    """Cut a text in three -> (prefix, middle, suffix), whose sum it is; any may be empty.

    Cuts lie between characters, not tokens: a cursor may stand inside a word (arXiv 2207.14255,
    section 3). rng: numpy Generator; nodes: as in `span`.
    """
    start, end = span(text, draw(SPANS, rng), rng, nodes)
    chance = rng.random()
    if chance < EMPTY:
        end = start
    elif chance < 2 * EMPTY:
        start = 0
    elif chance < 3 * EMPTY:
        end = len(text)
    return text[:start], text[start:end], text[end:]


# ------------------------------------------------------------------------------------------------
# Three parts -> ids


def fim_ids(tokenizer, prefix_ids, suffix_ids, middle_ids=()):
    """The three parts in the order in which a model reads them, without the closing
    <|endoftext|>. Each was encoded by itself: at a cursor nobody knows what follows."""
    prefix, middle, suffix = (tokenizer.special[name] for name in (PREFIX, MIDDLE, SUFFIX))
    return [prefix, *prefix_ids, suffix, *suffix_ids, middle, *middle_ids]


def repository_ids(tokenizer, name, files, path):
    """What stands before a file of a repository, from its name to the file's path (figure 4).

    files: (path, text) of those before it. The file follows, as it is or as `fim_ids`.
    """
    ids = [tokenizer.special[REPO_NAME], *tokenizer.encode(name + "\n")]
    for other, text in files:
        ids += [tokenizer.special[FILE_SEP], *tokenizer.encode(f"{other}\n{text}\n")]
    return [*ids, tokenizer.special[FILE_SEP], *tokenizer.encode(path + "\n")]


# ------------------------------------------------------------------------------------------------
# Asking a model for the middle


def load(folder_or_hub_name, device=None, dtype="auto"):
    """A checkpoint's model and tokenizer; InputError if they do not belong together."""
    model = load_model(folder_or_hub_name, device, dtype)
    tokenizer = Tokenizer.load(folder_or_hub_name)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def control_stops(tokenizer):
    """The ids that end a completion: those of all special tokens, as none of them is text. The
    published set has 7 of the 22; the others have no place in a completion either."""
    return set(tokenizer.special.values())


def newest_model(out, stages=("dpo", "sft", "repository", "pretrain")):
    """The folder of the first of some stages that is finished: without them, of the last stage."""
    for stage in stages:
        if (Path(out) / stage / "config.json").exists():
            return Path(out) / stage
    before = "sft" if stages == ("sft",) else "pretrain"
    raise InputError(f"{out}: no finished model of {' or '.join(stages)}; run `python {before}.py` "
                     "first, or name a model")


def shorten(prefix_ids, suffix_ids, room):
    """Shorten both to `room` ids: the prefix loses its start, the suffix its end."""
    suffix_room = max(int(room * SUFFIX_SHARE), room - len(prefix_ids))
    suffix_ids = suffix_ids[:suffix_room]
    return prefix_ids[max(0, len(prefix_ids) - (room - len(suffix_ids))):], suffix_ids


def suffix_start(suffix):
    """What a completion has no business to write: the suffix up to the end of its second line that
    is not blank; "" if it has no such, or these have fewer than four words."""
    lines = list(re.finditer(r"[^\n]*\S[^\n]*\n", suffix))[:2]
    start = suffix[:lines[-1].end()] if len(lines) == 2 else ""
    return start if len(start.split()) > 3 else ""


def repeats(ids, least=5):
    """Whether a list of ids ends with the same piece, of at least so many, three times over."""
    return any(ids[-n:] == ids[-2 * n:-n] == ids[-3 * n:-2 * n]
               for n in range(least, len(ids) // 3 + 1))


def infill_prompt(tokenizer, prefix, suffix, room, files=(), name="", path=""):
    """A prompt of at most `room` ids for the gap between prefix and suffix.

    files: (path, text) of others of the repository, the most relevant last; of those as many as fit
    half the room stand before. Then prefix and suffix lose what is far from the cursor.
    """
    before, kept = [], []
    for file in reversed(files):                        # what does not fit is left out
        ids = repository_ids(tokenizer, name, [file, *kept], path)
        if len(ids) <= room * FILES_SHARE:
            before, kept = ids, [file, *kept]
    parts = shorten(tokenizer.encode(normalize(prefix)), tokenizer.encode(normalize(suffix)),
                    room - len(before) - 3)                                     # three sentinels
    return before + fim_ids(tokenizer, *parts)


def infill_all(model, tokenizer, gaps, max_new_tokens=64, guard=True, on_text=None, files=(),
               name="", path="", **sampling):
    """The texts that a model puts into gaps, (prefix, suffix) each; one batch, greedy by default.

    It ends at a stop token, and with guard also where it starts to write the suffix once more, or
    has written the same piece three times over.
    What does not fit the model's context is left out far from the cursor; files, name and path as
    in `infill_prompt`. on_text(row, piece) sees the text as it comes. InputError: no room.
    """
    room = model.config.context_length - max_new_tokens
    if room < 4:
        raise InputError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a "
                         f"context of {model.config.context_length}")
    prompts = [infill_prompt(tokenizer, *gap, room, files, name, path) for gap in gaps]
    starts = [suffix_start(normalize(suffix)) if guard else "" for _, suffix in gaps]
    streams = [TextStream(tokenizer, [start] if start else []) for start in starts]
    texts, last = [""] * len(gaps), [0]

    def add(row, piece):
        texts[row] += piece
        if on_text:
            on_text(row, piece)

    def on_token(row, token):
        last[0] = row
        add(row, streams[row].add(token))

    generate(model, prompts, max_new_tokens, on_token=on_token,
             stop=lambda ids: streams[last[0]].stopped or guard and repeats(ids),
             stop_ids=control_stops(tokenizer), vocab_size=tokenizer.vocab_size, **sampling)
    for row, stream in enumerate(streams):
        add(row, stream.finish())
    return texts


def infill(model, tokenizer, prefix, suffix, max_new_tokens=64, on_text=None, **other):
    """The text that the model puts between prefix and suffix. Further arguments: `infill_all`."""
    return infill_all(model, tokenizer, [(prefix, suffix)], max_new_tokens,
                      on_text=on_text and (lambda row, piece: on_text(piece)), **other)[0]


# ------------------------------------------------------------------------------------------------
# Other files of a repository


def words_of(text):
    return re.findall(r"[A-Za-z_]\w{2,}", text)


def related_suffixes(file):
    """The suffixes of files of the same kind, in lower case."""
    suffix = file.suffix.lower()
    return next((group for group in RELATED_SUFFIXES if suffix in group), {suffix})


def relevant_files(folder, file, prefix, suffix, count=8):
    """The files of a folder that share most with what stands around a cursor, the best one last.

    -> [(path, text)]. Ranked by BM25, as ExecRepoBench's are, over identifiers (ours). Candidates
    are UTF-8 files of the same kind (RELATED_SUFFIXES), at most 1 MB each, without links and
    without folders of installed packages (`walk_files`).
    """
    folder, file = Path(folder), Path(file)
    if not folder.is_dir():
        raise InputError(f"--repo {folder}: no such folder")
    query, texts = set(words_of(prefix[-2000:] + suffix[:1000])), {}
    suffixes = related_suffixes(file)
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        with contextlib.suppress(InputError, OSError):          # binary, locked or gone
            if (path.suffix.lower() in suffixes and path.name[0] != "." and name.isprintable()
                    and not path.is_symlink() and path.is_file()
                    and path.stat().st_size < 1_000_000 and path.resolve() != file.resolve()):
                texts[name] = normalize(read_text(path))
    counts = {path: Counter(word for word in words_of(text) if word in query)
              for path, text in texts.items()}
    spread = Counter(word for count in counts.values() for word in count)
    mean = sum(map(len, texts.values())) / max(1, len(texts)) or 1

    def score(path):                                    # BM25 with its usual k = 1.2, b = 0.75
        return sum(math.log(1 + (len(texts) - spread[word] + 0.5) / (spread[word] + 0.5))
                   * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * (len(texts[path]) / mean)))
                   for word, n in counts[path].items())

    best = sorted(filter(counts.get, texts), key=lambda path: (score(path), path))[-count:]
    return [(path, texts[path]) for path in best]


# ------------------------------------------------------------------------------------------------
# The command


def gap(text, line, path, column=None):
    """Where to fill: (prefix, what stands there, suffix), by <FILL>, by the number of a line, which
    is to be written anew, or by line and column of a cursor; all count from 1, in the text as it
    stands in an editor. The parts are normalized."""
    if line is None:
        if text.count(MARK) != 1:
            raise InputError(f"{path}: holds {text.count(MARK)} {MARK} marks, expected one; "
                             "mark the place to fill or give --line N")
        prefix, suffix = map(normalize, text.split(MARK))
        return prefix, "", suffix
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{path}: has lines 1 to {len(lines)}, there is no line {line}")
    before, here, after = lines[:line - 1], lines[line - 1], lines[line:]
    start, stop = (0, len(here)) if column is None else (column - 1, column - 1)
    if not 0 <= start <= len(here):
        raise InputError(f"{path}: a cursor in line {line} stands in columns 1 to {len(here) + 1}, "
                         f"not {column}")
    return tuple(map(normalize, ("\n".join([*before, here[:start]]), here[start:stop],
                                 "\n".join([here[stop:], *after]))))


def inks():
    """What begins and ends an inserted text, and a control token, on a terminal or elsewhere."""
    if sys.stdout.isatty():
        return "\x1b[1;32m", "\x1b[0m", "\x1b[35m", "\x1b[0m"
    return "⟦", "⟧", "", ""


def show(path):
    """Print one function of a file under every kind of cut and in every format."""
    text = normalize(read_text(path))
    bodies = [node for node in syntax_nodes(text) if node.kind == "function"
              and 4 < text[node.start:node.end].count("\n") < 16]
    if bodies:                                          # with the line of its name
        start = text.rfind("def ", 0, bodies[0].start)
        text = text[text.rfind("\n", 0, start) + 1:bodies[0].end] + "\n"
    else:
        text = "\n".join(text.split("\n")[:16])
    text, rng = textwrap.dedent(text), np.random.default_rng(0)
    left, right, violet, plain = inks()
    for kind, share in SPANS.items():
        start, end = span(text, kind, rng, syntax_nodes(text))
        print(f"--- {kind}: {share:.0%} of what is cut\n"
              f"{text[:start]}{left}{text[start:end]}{right}{text[end:]}")
    prefix, suffix = text[:start], text[end:]
    middle = f"{left}{text[start:end]}{right}{ENDOFTEXT}"
    file = f"{PREFIX}{prefix}{SUFFIX}{suffix}{MIDDLE}{middle}"
    formats = {
        "file, as trained: what is to be written comes last (PSM)": file,
        "suffix first (SPM, variant 2 of arXiv 2207.14255): while you type, what was read stays":
            f"{PREFIX}{SUFFIX}{suffix}{MIDDLE}{prefix}{middle}",
        "repository: other files first": f"{REPO_NAME}my-project\n{FILE_SEP}other.py\nX = 1\n\n"
                                         f"{FILE_SEP}{Path(path).name}\n{file}"}
    for title, whole in formats.items():
        print(f"--- {title}\n" + re.sub(r"<\|\w+\|>", lambda m: violet + m[0] + plain, whole))


def parse_args():
    parser = argparse.ArgumentParser(description="Fill a gap in a file.",
                                     epilog="python fim.py show FILE: what a model learns from")
    parser.add_argument("file", type=Path, help=f"a source file, with a {MARK} mark or with --line")
    parser.add_argument("--line", type=int, help="number of the line to write anew, from 1")
    parser.add_argument("--column", type=int, help="of a cursor in that line, from 1; then nothing "
                        "is replaced")
    parser.add_argument("--repo", type=Path, metavar="DIR", help="a folder whose files, those that "
                        "fit best, the model reads first")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64,
                        help="longest insertion, in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--no-guard", action="store_true",
                        help="do not end what begins to repeat itself or the text after the gap")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not args.temperature >= 0:
        raise InputError("--max-new-tokens must be at least 1, --temperature at least 0")
    if args.column is not None and args.line is None:
        raise InputError("--column: give --line, too")
    return args


def main():
    if sys.argv[1:2] == ["show"]:
        if len(sys.argv) != 3:
            raise InputError("expected: python fim.py show FILE")
        return show(sys.argv[2])
    args = parse_args()
    text = read_text(args.file).removeprefix("\ufeff")          # no editor counts it
    prefix, present, suffix = gap(text, args.line, args.file, args.column)
    folder = args.model or newest_model(args.out)
    model, tokenizer = load(folder, args.device)
    other = {}
    if args.repo:
        files = relevant_files(args.repo, args.file, prefix, suffix)
        inside = args.file.resolve().is_relative_to(args.repo.resolve())
        own = args.file.resolve().relative_to(args.repo.resolve()) if inside else args.file
        other = {"files": files, "name": args.repo.resolve().name, "path": own.as_posix()}
        print("what fits best, the best last, is read first as far as there is room: "
              + (", ".join(path for path, _ in files) or "nothing"))
    left, right, _, _ = inks()
    before, after = prefix.split("\n")[-12:], suffix.split("\n")[:12]
    attention = choose_attention(model, "auto", model.config.context_length)
    dtype = str(model.head.dtype).removeprefix("torch.")
    print(f"{folder} infills {args.file} on {args.device} in {dtype} ({model.dtype_reason}); "
          f"{attention}:\n\n" + "\n".join(before) + left, end="", flush=True)
    infill(model, tokenizer, prefix, suffix, args.max_new_tokens, guard=not args.no_guard,
           on_text=lambda piece: print(piece, end="", flush=True), seed=args.seed,
           temperature=args.temperature, **other)
    print(right + "\n".join(after))
    if present.strip():
        print(f"\nstood there: {present.strip()}")


if __name__ == "__main__":
    run(main)
