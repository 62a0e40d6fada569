"""The files in out/data, and an account of every file that data.py read."""

import hashlib
import json
import multiprocessing
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import InputError, whole_folder, write_json, write_text
from support.plots import plot_funnel, plot_grounding

DOCUMENT_FIELDS = ("path", "repo", "source", "kind", "bytes", "text", "language")
DROPPED_FIELDS = ("path", "repo", "source", "bytes", "reason", "value")
MIXTURE_KINDS = ("code", "text", "math")


def funnel(rows):
    """Count files and bytes by reason (or "kept"), language and source. text: the bytes of the
    documents that were made from the files."""
    table = {"reason": {}, "language": {}, "source": {}}
    for row in rows:
        reason = row.get("reason", "kept")
        entry = table["reason"].setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += row["bytes"]
        if reason != "kept" and len(entry["examples"]) < 3:
            entry["examples"].append(row["path"])
        groups = ("language", "source") if reason == "kept" else ("source",)
        for group in groups:
            entry = table[group].setdefault(row[group], {"documents": 0, "bytes": 0, "text": 0})
            entry["documents"] += 1
            entry["bytes"] += row["bytes"]
            entry["text"] += row["text_bytes"] if reason == "kept" else 0
    return table


def reason_summary(rows):
    """Why a source has no code to train on: how many files of each reason, and the first one."""
    reasons = [row.get("reason", f"kept as {row['kind']}") for row in rows]
    first = {}
    for reason, row in zip(reasons, rows):
        first.setdefault(reason, row["path"])
    return "; ".join(f"{reason}: {count:,}, such as {first[reason]}"
                     for reason, count in Counter(reasons).most_common()) or "no files"


def in_processes(function, items, workers):
    """[function(item) for item in items], computed by several processes, with a progress bar."""
    if workers == 1 or len(items) < 2:
        return [function(item) for item in tqdm(items, desc="files", disable=None)]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, total=len(items), desc="files", disable=None))


def write_corpus(folder, rows, parts, manifest):
    """Write {part}.jsonl for each part, dropped.jsonl, the figures and manifest.json."""
    with whole_folder(folder) as new:
        for part, documents in parts.items():
            digest = hashlib.sha256()
            with open(new / f"{part}.jsonl", "wb") as file:
                for row in documents:
                    document = {field: row[field] for field in DOCUMENT_FIELDS}
                    line = (json.dumps(document, ensure_ascii=False) + "\n").encode()
                    digest.update(line)
                    file.write(line)
            manifest[part] = {"documents": len(documents), "sha256": digest.hexdigest(),
                              "bytes": sum(row["text_bytes"] for row in documents)}
        write_text(new / "dropped.jsonl", "".join(
            json.dumps({field: row[field] for field in DROPPED_FIELDS}) + "\n"
            for row in rows if "reason" in row))
        plot_funnel(manifest["funnel"], new / "funnel.png")
        if manifest["grounding"]:
            plot_grounding(manifest["grounding"], new / "grounding.png")
        write_json(new / "manifest.json", manifest)


def print_corpus(out, manifest):
    """Print what out/data holds, and what became of the other files."""
    for part in manifest:
        if part.split("_")[0] in ("train", "validation"):
            print(f"{out}/data/{part}.jsonl: {manifest[part]['documents']:,} documents, "
                  f"{manifest[part]['bytes']:,} bytes")
    table = manifest["funnel"]
    reasons = sorted(table["reason"].items(),
                     key=lambda item: (item[0] != "kept", -item[1]["bytes"]))
    total = sum(entry["bytes"] for _, entry in reasons) or 1
    print(f"{'':28}{'files':>9}{'bytes':>14}{'share':>8}  such as")
    for reason, entry in reasons:
        print(f"{reason:28}{entry['documents']:9,}{entry['bytes']:14,}"
              f"{entry['bytes'] / total:8.1%}  {', '.join(entry['examples'])[:58]}")
    languages = sorted(table["language"].items(), key=lambda item: -item[1]["text"])
    print("kept: " + ", ".join(f"{name} {entry['text'] / 1e6:.1f} MB"
                               for name, entry in languages[:8]))
    for number, stage in enumerate(manifest["grounding"], 1):
        print(f"grounding stage {number}: {stage['documents']:,} documents, {stage['bytes']:,} "
              f"bytes left; the classifier recognized quality scores above "
              f"{stage['threshold']:.2f} with an AUC of {stage['auc']:.2f}")


# ------------------------------------------------------------------------------------------------
# Reading out/data one document or repository at a time


def mixture_kind(document):
    """The part of the mixture to which a document belongs; grounding counts as code."""
    kind = document.get("kind", "code")
    return "code" if kind == "grounding" else kind


def stream_documents(path, kind):
    """Yield the documents of one part of the mixture in a .jsonl file, one at a time."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                document = json.loads(line)
                has_text = isinstance(document["text"], str)
            except (ValueError, TypeError, LookupError):
                has_text = False
            if not has_text:
                raise InputError(f'{path}, line {number}: expected {{"text": "..."}}')
            if mixture_kind(document) == kind:
                yield document


def stream_repositories(path):
    """Yield the documents of each repository in a .jsonl file, as a list."""
    line_starts = defaultdict(list)                     # repository -> where its lines begin
    with open(path, "rb") as file:
        position = 0
        for line in file:
            document = json.loads(line)
            if mixture_kind(document) == "code":
                repository = document.get("source", ""), document.get("repo", "")
                line_starts[repository].append(position)
            position += len(line)
        for _, positions in sorted(line_starts.items()):
            documents = []
            for position in positions:
                file.seek(position)
                documents.append(json.loads(file.readline()))
            yield documents


def token_folder(out, tokenizer):
    """The folder of the token files of out/data for this tokenizer."""
    vocabulary = repr((tokenizer.tokens, sorted(tokenizer.special.items())))
    return Path(out, "data", "tokens-" + hashlib.sha256(vocabulary.encode()).hexdigest()[:8])


def map_tokens(folder, repository_length=None):
    """The token files of a folder as {kind: memory-mapped ids}."""
    names = {kind: kind for kind in MIXTURE_KINDS}
    if repository_length:
        names["code"] = f"repository_{repository_length}"
    tokens = {kind: np.memmap(folder / f"{name}.bin", np.uint32, "r")
              for kind, name in names.items()}
    return {kind: ids for kind, ids in tokens.items() if len(ids) > 1}      # 1: no documents
