"""Fill-in-the-middle: documents cut in three for training, prompts for completing inside a file.

A document becomes prefix, middle and suffix, and the middle is moved to the end, so that a model
that only ever predicts the next token learns to fill a gap from both sides (report, figure 3):

    <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|endoftext|>

This file knows the formats, the cuts and how to ask a model for a middle. Which documents are cut
and how they are packed into rows is data.py's business, training pretrain.py's.

    python fim.py FILE --line 12     # write line 12 of FILE anew with the newest model in out/
    python fim.py FILE               # fill the place marked <FILL>; a few seconds
"""

import argparse
import sys
import unicodedata
from pathlib import Path

from model import check_vocabulary, choose_attention, default_device, generate, load_model
from tokenizer import ENDOFTEXT, InputError, TextStream, Tokenizer, read_text, run

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
# What ends a middle: its end, or a token that can only begin something else (the published set)
STOP_TOKENS = [PREFIX, SUFFIX, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", ENDOFTEXT,
               "<|im_end|>"]
FIM_RATE = 0.5              # not published; value of DeepSeek-Coder (arXiv 2401.14196, 3.1)
SUFFIX_SHARE = 0.25         # of a prompt's room at most; not published; ours
MARK = "<FILL>"

# ------------------------------------------------------------------------------------------------
# Text <-> three parts <-> ids


def normalize(text):
    """Unicode NFC and "\\n" line ends, so that character offsets mean the same before and after
    encoding and no "\\r" stands next to a control token."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def fim_document(text, rng):
    """Cut text at two uniform places between characters -> (prefix, middle, suffix).

    The cut is made on characters, not tokens: a cursor may stand inside a word. prefix + middle +
    suffix == text, and any part may be empty (arXiv 2207.14255, section 3). rng: numpy Generator.
    """
    low, high = sorted(rng.integers(0, len(text) + 1, size=2))
    return text[:low], text[low:high], text[high:]


def fim_ids(tokenizer, prefix_ids, suffix_ids, middle_ids=()):
    """The three parts in the order in which a model reads them, without the closing
    <|endoftext|>. Each was encoded by itself: at a cursor nobody knows what follows."""
    special = tokenizer.special
    return [special[PREFIX], *prefix_ids, special[SUFFIX], *suffix_ids, special[MIDDLE],
            *middle_ids]


# ------------------------------------------------------------------------------------------------
# Asking a model for the middle


def load(folder_or_hub_name, device=None):
    """A checkpoint's model and tokenizer; InputError if they do not belong together."""
    model, tokenizer = load_model(folder_or_hub_name, device), Tokenizer.load(folder_or_hub_name)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def newest_model(out):
    """The folder of the last finished stage: dpo, else sft, else repository, else pretrain."""
    for stage in ("dpo", "sft", "repository", "pretrain"):
        if (Path(out) / stage / "config.json").exists():
            return Path(out) / stage
    raise InputError(f"{out}: no finished model here; run `python pretrain.py`, or give --model")


def shorten(prefix_ids, suffix_ids, room):
    """Shorten both to `room` ids: the prefix loses its start, the suffix its end."""
    suffix_room = max(int(room * SUFFIX_SHARE), room - len(prefix_ids))
    suffix_ids = suffix_ids[:suffix_room]
    return prefix_ids[max(0, len(prefix_ids) - (room - len(suffix_ids))):], suffix_ids


def infill(model, tokenizer, prefix, suffix, max_new_tokens=64, temperature=0.0, on_text=None,
           **sampling):
    """The text that the model puts between prefix and suffix; greedy by default, no penalty.

    What does not fit the model's context is left out far from the cursor. on_text(piece) sees the
    text as it comes. Further arguments go to model.generate.
    """
    room = model.config.max_position_embeddings - max_new_tokens - 3        # three sentinels
    if room < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a "
                         f"context of {model.config.max_position_embeddings}")
    prefix_ids, suffix_ids = shorten(tokenizer.encode(normalize(prefix)),
                                     tokenizer.encode(normalize(suffix)), room)
    stream, on_text = TextStream(tokenizer), on_text or (lambda text: None)
    [new] = generate(model, [fim_ids(tokenizer, prefix_ids, suffix_ids)], max_new_tokens,
                     temperature, on_token=lambda row, token: on_text(stream.add(token)),
                     stop_ids={tokenizer.special[name] for name in STOP_TOKENS},
                     vocab_size=tokenizer.vocab_size, **sampling)
    on_text(stream.finish())
    return tokenizer.decode(new)


# ------------------------------------------------------------------------------------------------
# The command


def gap(text, line, path):
    """Where to fill: (prefix, what stands there, suffix), by <FILL> or by line number from 1."""
    if line is None:
        if text.count(MARK) != 1:
            raise InputError(f"{path}: holds {text.count(MARK)} {MARK} marks, expected one; "
                             "mark the place to fill or give --line N")
        prefix, suffix = text.split(MARK)
        return prefix, "", suffix
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{path}: has lines 1 to {len(lines)}, there is no line {line}")
    return "\n".join([*lines[:line - 1], ""]), lines[line - 1], "\n".join(["", *lines[line:]])


def main():
    parser = argparse.ArgumentParser(description="Fill a gap in a file.")
    parser.add_argument("file", type=Path, help=f"a source file, with a {MARK} mark or with --line")
    parser.add_argument("--line", type=int, help="number of the line to write anew, from 1")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64,
                        help="longest insertion, in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise InputError("--max-new-tokens must be at least 1, --temperature at least 0")
    text = normalize(read_text(args.file))
    prefix, present, suffix = gap(text, args.line, args.file)
    folder = args.model or newest_model(args.out)
    model, tokenizer = load(folder, args.device)
    green, plain = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    before, after = prefix.split("\n")[-12:], suffix.split("\n")[:12]
    path = choose_attention(model, "auto", model.config.max_position_embeddings)
    print(f"{folder} fills {args.file} on {args.device}, {path}:\n\n" + "\n".join(before) + green,
          end="", flush=True)
    infill(model, tokenizer, prefix, suffix, args.max_new_tokens, args.temperature,
           on_text=lambda piece: print(piece, end="", flush=True), seed=args.seed)
    print(plain + "\n".join(after))
    if present.strip():
        print(f"\nstood there: {present.strip()}")


if __name__ == "__main__":
    run(main)
