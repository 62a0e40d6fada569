"""How good a model is. So far: bits per byte, beside what compressors make of the same text.

Bits per byte is the code length that the model's predictions give a text, divided by its UTF-8
bytes. It does not depend on the tokenizer, so models with different vocabularies can be compared,
and so can gzip, bz2 and xz, which predict too.

This file knows models and benchmarks, not training (pretrain.py) nor where data comes from
(data.py): held-out documents reach it as a file.

    python evaluate.py                              # the newest model in out/ on held-out code
    python evaluate.py --model FOLDER --text FILE   # any model, any text; seconds
"""

import argparse
import bz2
import gzip
import json
import lzma
import math
from pathlib import Path

# Imports of ours stand inside functions, so that a sandbox worker starts without loading torch.

TOKENS_AT_ONCE = 16384      # in a forward pass: enough to keep a device busy


def compressed_bits_per_byte(texts):
    """name -> bits per byte of the concatenated texts under gzip, bz2 and xz at their best."""
    data = "".join(texts).encode()
    sizes = {"gzip": len(gzip.compress(data, 9)), "bz2": len(bz2.compress(data, 9)),
             "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def bits_per_byte(model, tokenizer, documents):
    """Bits over all tokens of all documents, their <|endoftext|> included, per UTF-8 byte.

    Each document is preceded by one <|endoftext|> and cut into rows of T tokens, T being the
    context the model was trained on: no token sees beyond its row.
    """
    import torch

    from tokenizer import ENDOFTEXT

    T, end = model.config.max_position_embeddings, tokenizer.special[ENDOFTEXT]
    texts = [document["text"] for document in documents]
    rows = []
    for ids in tokenizer.encode_batch(texts):
        ids = [end, *ids, end]
        rows += [ids[start:start + T + 1] for start in range(0, len(ids) - 1, T)]
    rows.sort(key=len)                                      # short ones share a batch
    nats, B = 0.0, max(1, TOKENS_AT_ONCE // T)
    with torch.no_grad():
        for start in range(0, len(rows), B):
            batch = rows[start:start + B]
            longest = max(map(len, batch))
            input_ids = torch.tensor([row[:-1] + [end] * (longest - len(row)) for row in batch])
            targets = torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in batch])
            device = model.head.device
            nats += float(model(input_ids.to(device), targets=targets.to(device)))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def read_documents(path):
    """The documents of a JSON-lines file with a text field, or one document: the file's text."""
    from fim import normalize
    from tokenizer import InputError, read_text

    path, text = Path(path), read_text(path)
    if path.suffix != ".jsonl":
        return [{"text": normalize(text), "path": path.name}]
    documents = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        try:
            documents.append(json.loads(line))
            documents[-1]["text"].encode()      # a string
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f'{path}, line {number}: expected {{"text": "..."}}') from None
    return documents


def main():
    from fim import load, newest_model
    from model import choose_attention, default_device, loss_head
    from tokenizer import InputError

    parser = argparse.ArgumentParser(description="Bits per byte of a model on text.")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--text", nargs="+", help="text files or .jsonl with a text field, "
                        "default: the held-out documents in --out")
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    args = parser.parse_args()
    folder = args.model or newest_model(args.out)
    files = args.text or [Path(args.out) / "data" / "validation.jsonl"]
    documents = [document for file in files for document in read_documents(file)]
    documents = [document for document in documents if document["text"]]
    if not documents:
        raise InputError(f"{files[0]}: no text to measure")
    model, tokenizer = load(folder, args.device)
    texts = [document["text"] for document in documents]
    size = sum(len(text.encode()) for text in texts)
    T = model.config.max_position_embeddings
    print(f"{len(texts)} documents, {size:,} bytes, rows of {T} tokens on {args.device}\n"
          f"{choose_attention(model, 'auto', T)}, loss head by {loss_head(model)}\nbits per byte:")
    results = compressed_bits_per_byte(texts)
    results[str(folder)] = bits_per_byte(model, tokenizer, documents)
    for name, bits in results.items():
        print(f"  {name:24} {bits:.3f}")


if __name__ == "__main__":
    from tokenizer import run
    run(main)
