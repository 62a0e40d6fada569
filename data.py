"""Source trees to documents, documents to batches.

The default corpus is what every machine already has: the Python standard library without its tests,
and for sizes from `small` on the packages installed beside it. `--source DIR` takes your own code.
Files are read safely, exact duplicates dropped, whole top-level modules held out for validation,
and what resembles a held-out document is kept out of training. The tokenizer is trained here too,
on training documents only.

A batch row is made on the fly and is a pure function of (seed, step, row): the state of the loader
is the step, and the batch at a step is the same on one device and on eight.

This file knows nothing of models and optimizers (model.py, pretrain.py) nor of the FIM format
(fim.py).

    python data.py                                 # out/data and out/tokenizer, about 10 s
    python data.py --source ~/my/code --out mine   # from your own code
"""

import argparse
import hashlib
import json
import os
import re
import stat
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from evaluate import read_documents
from fim import FIM_RATE, fim_document, fim_ids, normalize
from tokenizer import (ENDOFTEXT, InputError, Tokenizer, read_json, run, whole_folder, write_json,
                       write_text)

LANGUAGES = {               # by extension; what is not here is not read
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++",
    ".cxx": "c++", ".hpp": "c++", ".hh": "c++", ".cu": "cuda", ".cs": "c#", ".css": "css",
    ".dart": "dart", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang", ".go": "go",
    ".hs": "haskell", ".html": "html", ".java": "java", ".jl": "julia", ".js": "javascript",
    ".jsx": "javascript", ".mjs": "javascript", ".kt": "kotlin", ".lua": "lua", ".md": "markdown",
    ".ml": "ocaml", ".php": "php", ".pl": "perl", ".proto": "protocol-buffer", ".r": "r",
    ".rb": "ruby", ".rs": "rust", ".rst": "restructuredtext", ".scala": "scala", ".sh": "shell",
    ".sql": "sql", ".swift": "swift", ".tex": "tex", ".ts": "typescript", ".tsx": "typescript",
    ".zig": "zig"}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages", "build", "dist"}
STDLIB_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
LARGEST_FILE = 1_000_000    # bytes
HELD_OUT_SHARE = 0.05       # of the corpus' text, in whole top-level modules; not published; ours
NEAR = 0.5                  # Jaccard similarity of a copy, from here on; not published; ours
SHORTEST_FIM = 16           # tokens; smaller pieces are not worth cutting in three
TOKENIZER_TEXT = 100_000_000    # characters that a tokenizer is trained on, at most

# ------------------------------------------------------------------------------------------------
# Source trees -> documents


def read_document(path, root, repo, dropped):
    """One file as a document, or None with the reason counted in dropped."""
    text, reason = "", None
    try:
        status = path.lstat()
        name = path.relative_to(root).as_posix()
        name.encode()
        if not stat.S_ISREG(status.st_mode):
            reason = "link or no plain file"                # a pipe would be waited for
        elif status.st_size > LARGEST_FILE:
            reason = "over 1 MB"
        else:
            text = normalize(path.read_bytes().decode("utf-8-sig"))
            reason = "binary" if "\0" in text else None if text.strip() else "empty"
    except UnicodeError:
        reason = "not UTF-8"
    except OSError:
        reason = "unreadable"
    if reason:
        dropped[reason] += 1
        return None
    return {"text": text, "path": name, "repo": repo, "language": LANGUAGES[path.suffix.lower()]}


def documents(source, dropped=None):
    """Yield the documents of a source, in the order of their paths.

    source: "stdlib", "packages" (installed beside it; each is a repository of its own) or a folder.
    Links are not followed. dropped: a Counter for the files left out, by reason.
    """
    dropped = Counter() if dropped is None else dropped
    paths, skipped = sysconfig.get_paths(), set(SKIPPED_FOLDERS)
    if source == "stdlib":
        root, skipped = Path(paths["stdlib"]), skipped | STDLIB_SKIPPED
    else:
        root = Path(paths["purelib"] if source == "packages" else source).resolve()
    if not root.is_dir():
        raise InputError(f"--source {source}: no such folder")
    suffixes = {".py"} if source == "stdlib" else set(LANGUAGES)
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders
                               if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in suffixes:
                module = path.relative_to(root).parts[0]
                repo = {"stdlib": "cpython", "packages": module}.get(source, root.name)
                document = read_document(path, root, repo, dropped)
                if document:
                    yield {**document, "source": str(source)}


def drop_duplicates(corpus, dropped):
    """Of equal texts keep that of the standard library, else the first by (source, path)."""
    kept = {}
    for document in sorted(corpus, key=lambda document: (
            document["source"] != "stdlib", document["source"], document["path"])):
        kept.setdefault(hashlib.sha256(document["text"].encode()).digest(), document)
    dropped["exact duplicate"] += len(corpus) - len(kept)
    return list(kept.values())


# ------------------------------------------------------------------------------------------------
# Training and validation


def split(corpus):
    """Hold out whole top-level modules, in the order of the hash of their names -> (train, held).

    With `packages` the held-out modules are those of the standard library alone, so that every size
    is measured on the same text. A corpus of one module is split by file.
    """
    candidates = [d for d in corpus if d["source"] == "stdlib"] or corpus
    by_module = len({document["path"].split("/")[0] for document in candidates}) > 1

    def module(document):
        return document["source"], document["path"].split("/")[0] if by_module else document["path"]

    size = Counter()
    for document in candidates:
        size[module(document)] += len(document["text"])
    room, held = HELD_OUT_SHARE * sum(size.values()), set()
    for name in sorted(size, key=lambda name: hashlib.sha256(repr(name).encode()).digest()):
        if size[name] <= room:
            held.add(name)
            room -= size[name]
    if not held:
        held = {min(size, key=size.get)} if len(size) > 1 else set()
    train = [document for document in corpus if module(document) not in held]
    validation = [document for document in candidates if module(document) in held]
    if not train or not validation:
        raise InputError(f"{len(corpus)} documents are too few to train on some and hold out "
                         "others; give a folder with more code")
    return train, validation


def shingles(text):
    """All runs of five words: the set that near-duplicates share."""
    words = re.findall(r"\w+", text)
    return set(zip(*(words[i:] for i in range(5))))


def drop_near_copies(train, validation, dropped):
    """Leave out training documents whose shingles have a Jaccard similarity of NEAR or more with
    those of a held-out document."""
    sizes, owners = [], defaultdict(list)           # shingle -> the held-out documents that have it
    for i, document in enumerate(validation):
        own = shingles(document["text"])
        sizes.append(len(own))
        for shingle in own:
            owners[shingle].append(i)

    def near(document):
        own = shingles(document["text"])
        shared = Counter(i for shingle in own for i in owners.get(shingle, ()))
        return any(n / (len(own) + sizes[i] - n) >= NEAR for i, n in shared.items())

    kept = [document for document in train if not near(document)]
    dropped["like a held-out document"] += len(train) - len(kept)
    if not kept:
        raise InputError("every document resembles a held-out one; give a folder with more code")
    return kept


def text_bytes(corpus):
    return sum(len(document["text"].encode()) for document in corpus)


def load_documents(out, part):
    """The documents of out/data: part is "train" or "validation"."""
    return read_documents(Path(out) / "data" / f"{part}.jsonl")


def made_from(folder, settings):
    """What about.json says of a folder; InputError if it was made from other settings."""
    about = read_json(folder / "about.json")
    for name, value in settings.items():
        if about.get(name) != value:
            raise InputError(f"{folder} was made from {name} {about.get(name)}, not {value}; "
                             "give another --out, or --fresh to make it anew")
    return about


def prepare_data(out, sources, fresh=False):
    """Make out/data from the sources unless it is there -> its about.json."""
    folder, sources = Path(out) / "data", [str(source) for source in sources]
    if fresh or not folder.exists():
        dropped = Counter()
        corpus = [document for source in sources for document in documents(source, dropped)]
        if not corpus:
            raise InputError(f"--source {' '.join(sources)}: no source code found there")
        train, validation = split(drop_duplicates(corpus, dropped))
        train = drop_near_copies(train, validation, dropped)
        about = {"sources": sources, "dropped": dict(dropped)}
        with whole_folder(folder) as new:
            for part, kept in (("train", train), ("validation", validation)):
                lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in kept]
                write_text(new / f"{part}.jsonl", "".join(lines))
                about[part] = {"documents": len(kept), "bytes": text_bytes(kept)}
            write_json(new / "about.json", about)
    return made_from(folder, {"sources": sources})


def prepare_tokenizer(out, vocab_size, fresh=False):
    """Train out/tokenizer on the training documents in out/data unless it is there."""
    folder = Path(out) / "tokenizer"
    if fresh or not folder.exists():
        texts, left = [], TOKENIZER_TEXT
        for document in load_documents(out, "train"):
            texts.append(document["text"][:left])
            left -= len(texts[-1])
        tokenizer = Tokenizer.train(texts, vocab_size)
        with whole_folder(folder) as new:
            tokenizer.save(new)
            write_json(new / "about.json", {"vocab_size": vocab_size})
    made_from(folder, {"vocab_size": vocab_size})


def print_about(out, about):
    """Print what out/data holds."""
    for part in ("train", "validation"):
        print(f"{out}/data/{part}.jsonl: {about[part]['documents']:,} documents, "
              f"{about[part]['bytes']:,} bytes")
    reasons = ", ".join(f"{n} {reason}" for reason, n in about["dropped"].items() if n)
    print(f"left out: {reasons or 'nothing'}")


# ------------------------------------------------------------------------------------------------
# Documents -> batches


def generator(seed, purpose, index):
    """Randomness that depends on nothing but its three names."""
    return np.random.default_rng([seed, *purpose.encode(), index])


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


class Batches:
    """batches(step) -> the step's rows for one rank: a list of device batches, dicts of tensors.

    All documents stand one after another, each preceded by <|endoftext|>, in one long stream of
    ids. An epoch cuts the stream into slices of T + 1 ids that overlap by one, and visits them in
    a random order. A slice is a row: its pieces of documents are turned into FIM or not, each by
    itself. An <|endoftext|> is the last target of the document before it and the first input of
    the one after it, so no prediction crosses documents.
    """

    def __init__(self, corpus, tokenizer, seq_len, batch_rows, device_batch=None, seed=0,
                 fim_rate=FIM_RATE, rank=0, world=1):
        if batch_rows % world:
            raise InputError(f"{batch_rows} rows a step cannot be shared evenly by {world} "
                             "processes; change --batch-tokens")
        self.tokenizer, self.T, self.seed, self.fim_rate = tokenizer, seq_len, seed, fim_rate
        self.batch_rows, self.rank, self.world = batch_rows, rank, world
        self.device_batch = device_batch or batch_rows
        self.end, self.epoch = tokenizer.special[ENDOFTEXT], None
        encoded = []
        for start in range(0, len(corpus), 1000):           # lists of ids are large, arrays small
            texts = [document["text"] for document in corpus[start:start + 1000]]
            encoded += [np.array([self.end, *ids], dtype=np.uint32)
                        for ids in tokenizer.encode_batch(texts)]
        self.stream = np.concatenate([*encoded, [self.end]]).astype(np.uint32)
        if len(self.stream) < 2 * seq_len + 2:
            raise InputError(f"{len(self.stream):,} tokens are too few for rows of {seq_len}; "
                             "give more code or a smaller --seq-len")
        self.rows_per_epoch = (len(self.stream) - 1) // seq_len - 1     # one to spare: the offset

    def start_epoch(self, epoch):
        """Where the epoch's first row begins and in which order its rows come."""
        rng = generator(self.seed, "order", epoch)
        self.offset, self.order = int(rng.integers(self.T)), rng.permutation(self.rows_per_epoch)
        self.epoch = epoch

    def slice(self, index):
        """Row `index` of the endless run, before FIM: a list of T + 1 ids."""
        epoch, place = divmod(index, self.rows_per_epoch)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        start = self.offset + int(self.order[place]) * self.T
        return self.stream[start:start + self.T + 1].tolist()

    def fim_piece(self, ids, rng):
        """A piece of a document as FIM ids, no more than there were: the sentinels and the new
        borders between tokens take room, so the end of its text is left out until it fits."""
        for kept in range(len(ids) - 3, -1, -1):
            text = self.tokenizer.decode_bytes(ids[:kept]).decode("utf-8", errors="ignore")
            prefix, middle, suffix = map(self.tokenizer.encode, fim_document(text, rng))
            new = fim_ids(self.tokenizer, prefix, suffix, middle)
            if len(new) <= len(ids):
                return new

    def row(self, index):
        """Row `index`: input_ids, targets and document_starts, each (T,).

        A FIM piece is closed by <|endoftext|>; where it came out shorter than its place, the rest
        is <|endoftext|> without targets.
        """
        ids, rng = self.slice(index), generator(self.seed, "fim", index)
        borders = [0, *(i for i in range(1, self.T) if ids[i] == self.end), self.T]
        out, targets, starts = [], [], []
        for start, stop in zip(borders, borders[1:]):
            piece, after = ids[start:stop], ids[stop]       # after: the target of its last id
            head = piece[:1] if piece[0] == self.end else []
            inside = piece[len(head):]
            if len(inside) >= SHORTEST_FIM and rng.random() < self.fim_rate:
                piece, after = head + self.fim_piece(inside, rng), self.end
            missing = stop - start - len(piece)
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


def source_flag(parser):
    parser.add_argument("--source", action="append", metavar="DIR",
                        help="folder of source code, repeatable; also `stdlib` and `packages`, "
                        "the installed ones (default: stdlib, from --size small on both)")


def main():
    parser = argparse.ArgumentParser(description="Gather code, hold some out, train a tokenizer.")
    source_flag(parser)
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096,
                        help="ids of the tokenizer, control tokens included (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="make both anew")
    args = parser.parse_args()
    print_about(args.out, prepare_data(args.out, args.source or ["stdlib"], args.fresh))
    prepare_tokenizer(args.out, args.vocab_size, args.fresh)
    print(f"{args.out}/tokenizer: {Tokenizer.load(Path(args.out) / 'tokenizer').vocab_size:,} ids")


if __name__ == "__main__":
    run(main)
