"""Fill-in-the-middle (FIM): training examples from documents, and infilling inside a file.

A document is split into prefix, middle and suffix, and the middle is moved to the end. Thus a model
that predicts one token at a time learns to write a middle that fits both sides (report, figure 3).
At inference the prompt ends with <|fim_middle|>, and the model writes the rest:

    <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|endoftext|>

In a repository, other files come first (figure 4):

    <|repo_name|>{repository}
    <|file_sep|>{path of another file}
    {its text}
    <|file_sep|>{path}
    <|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{middle}<|endoftext|>

Generation stops at <|endoftext|> or any other special token, since none of them is text.

This file is about spans, formats and infilling. data.py decides which documents become FIM examples
and packs them; pretrain.py trains on them.

    python fim.py show FILE          # an excerpt: a span of each type, and both formats
    python fim.py FILE --line 12     # rewrite line 12 of FILE with the newest model in out/
    python fim.py FILE               # replace the mark <FILL> in FILE; a few seconds
    python fim.py FILE --line 12 --column 9 --repo DIR      # at a cursor, given other files
    python fim.py serve              # for editors: a page, and the interfaces of their plug-ins

Read first: fim_document, choose_span, block_spans, argument_spans, fim_ids, infill, MiddleStream
"""

import argparse
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import regex
import torch

from model import (check_vocabulary, choose_attention, default_device, generate, load_model,
                   sample)
from support.batching import Batch
from support.editor import FILL, middle_end, repository_at_cursor, split_at_cursor
from support.engine import Engine
from support.files import InputError, read_text, run
from support.server import Server
from tokenizer import ENDOFTEXT, PATTERN, TextStream, Tokenizer

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"
FIM_RATE = 0.5              # not published; value from DeepSeek-Coder (arXiv 2401.14196, 3.1)
# Types of spans and how often each is chosen. Not published; ours, measured (docs/experiments.md)
SPAN_TYPES = {"characters": 0.35, "lines": 0.25, "words": 0.1, "block": 0.2, "arguments": 0.1}
FALLBACK = {"arguments": "lines", "block": "lines", "words": "characters", "lines": "characters"}
MAX_LINES = 10              # in a span of type lines; value from ExecRepoBench
MAX_WORDS = 16              # in a span of type words; not published; ours
EMPTY = 0.01                # share of examples with an empty middle; likewise prefix, suffix; ours
FILES_SHARE = 0.5           # at most this share of a prompt is other files; not published; ours
SUFFIX_SHARE = 0.25         # at least this share is for a long suffix; not published; ours
DTYPES = ["auto", "float32", "bfloat16", "int8"]
# Printed around an infilled middle: green on a terminal, else brackets
LEFT, RIGHT = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")

# ------------------------------------------------------------------------------------------------
# Text to prefix, middle and suffix


def fim_document(text, rng):
    """Split a text at random -> (prefix, middle, suffix), each of which may be empty.

    The middle is chosen in characters, not tokens, because a cursor may be inside a token
    (arXiv 2207.14255, section 3). rng: a numpy Generator.
    """
    shares = np.array(list(SPAN_TYPES.values()))
    span_type = rng.choice(list(SPAN_TYPES), p=shares / shares.sum())
    start, end = choose_span(text, span_type, rng)
    # A model should also learn to insert nothing, and to write the start and the end of a file.
    uniform = rng.random()
    if uniform < EMPTY:
        end = start
    elif uniform < 2 * EMPTY:
        start = 0
    elif uniform < 3 * EMPTY:
        end = len(text)
    return text[:start], text[start:end], text[end:]


def choose_span(text, span_type, rng):
    """Choose a span of one of SPAN_TYPES in a text -> (start, end), in characters.

    characters: both ends are uniform in 0 ... len(text). words: 1 to MAX_WORDS consecutive matches
    of PATTERN. lines: 1 to MAX_LINES consecutive matches of LINE, so the last line feed stays in
    the suffix. block, arguments: one of block_spans() or argument_spans(). Lines and blocks may
    start after their indentation, which an editor may already have inserted. If the text has no
    span of the type, one of its FALLBACK type is chosen. rng: a numpy Generator.
    """
    if span_type == "characters":
        return tuple(sorted(rng.integers(0, len(text) + 1, size=2).tolist()))
    longest = 1                         # a span is 1 to `longest` consecutive units
    if span_type == "words":            # as BPE splits a text: no token crosses the end of a word
        units = [match.span() for match in regex.finditer(PATTERN, text)]
        longest = MAX_WORDS
    elif span_type == "lines":          # half of the time exactly one line
        units = [match.span() for match in LINE.finditer(text)]
        longest = MAX_LINES if rng.random() < 0.5 else 1
    elif span_type == "block":
        units = block_spans(text)
    else:
        units = argument_spans(text)
    if not units:
        return choose_span(text, FALLBACK[span_type], rng)
    first = rng.integers(len(units))
    last = min(first + rng.integers(longest), len(units) - 1)
    start, _ = units[first]
    _, end = units[last]
    if span_type in ("lines", "block") and rng.random() < 0.5:
        # Start after the indentation, which an editor may already have inserted.
        start = end - len(text[start:end].lstrip())
    return start, end


LINE = re.compile(r"^([^\S\n]*)\S.*", re.MULTILINE)         # not blank; [1]: its indentation


def block_spans(text):
    """The spans of all blocks: whole lines that are indented deeper than the line above them.

    In Python this is the body of a function, in C the lines between two braces, since the closing
    brace is indented like the line above the block. Blank lines are ignored.
    """
    blocks = []
    open_blocks = []                    # (indentation of the line above, start), innermost last
    previous_indentation = float("inf")         # so that the first line opens no block
    previous_end = 0
    for line in LINE.finditer(text):
        indentation = len(line[1].expandtabs())
        # this line closes all blocks that it is not deep enough for
        while open_blocks and indentation <= open_blocks[-1][0]:
            _, start = open_blocks.pop()
            blocks.append((start, previous_end))
        if indentation > previous_indentation:
            open_blocks.append((previous_indentation, line.start()))
        previous_indentation = indentation
        previous_end = line.end()
    return blocks + [(start, previous_end) for _, start in open_blocks]


# Three things to tell apart: a string on one line, whose brackets do not count; an opening bracket
# after a name (or a Rust macro, as in println!), which begins arguments; any other bracket. An
# apostrophe after a letter, "&" or "<" (a Rust lifetime) begins no string.
BRACKET = re.compile(r'"(?:[^"\\\n]|\\.){0,200}"'
                     r"|(?<![\w&<])[bBfFrRuU]{0,2}'(?:[^'\\\n]|\\.){0,200}'"
                     r"|\w!?\(|[()\[\]{}]")
CLOSING = {"(": ")", "[": "]", "{": "}"}


def argument_spans(text):
    """The spans of all arguments: what a balanced pair of parentheses after a name encloses.

    If a closing bracket does not match (a comment may hold any), it is unclear which of the open
    brackets were misread, so all of them are given up.
    """
    arguments = []
    open_brackets = []                  # (its closing bracket, start of the arguments or None)
    for match in BRACKET.finditer(text):
        bracket = match[0][-1]          # a quote, if the match is a string
        if bracket in CLOSING:
            has_name = len(match[0]) > 1
            open_brackets.append((CLOSING[bracket], match.end() if has_name else None))
        elif bracket in ")]}":
            if not open_brackets or open_brackets[-1][0] != bracket:
                open_brackets.clear()
                continue
            _, start = open_brackets.pop()
            if start is not None and text[start:match.start()].strip():
                arguments.append((start, match.start()))
    return arguments


# ------------------------------------------------------------------------------------------------
# Prefix, suffix and middle to ids


def fim_ids(tokenizer, prefix_ids, suffix_ids, middle_ids=()):
    """The file format, without the final <|endoftext|>. The three parts must have been encoded
    separately, because at inference the middle is unknown when prefix and suffix are encoded."""
    prefix, middle, suffix = (tokenizer.special[name] for name in (PREFIX, MIDDLE, SUFFIX))
    return [prefix, *prefix_ids, suffix, *suffix_ids, middle, *middle_ids]


def repository_ids(tokenizer, name, files, path):
    """The repository format up to the path of the last file, whose text or `fim_ids` come next.

    files: (path, text) of the files before it.
    """
    ids = [tokenizer.special[REPO_NAME], *tokenizer.encode(name + "\n")]
    for other_path, text in files:
        ids += [tokenizer.special[FILE_SEP], *tokenizer.encode(f"{other_path}\n{text}\n")]
    return [*ids, tokenizer.special[FILE_SEP], *tokenizer.encode(path + "\n")]


def normalize(text):
    """Unicode NFC, "\\n" line ends and no byte order mark. Offsets in characters are then the same
    before and after encoding, and no line end is split between prefix and suffix."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------------------------------
# Infilling


def infill(model, tokenizer, prefix, suffix, max_new_tokens=64, guard=True, on_text=None, files=(),
           name="", path="", seed=0, **sampling):
    """The middle that the model writes between prefix and suffix; greedy by default.

    It ends at a special token or, with guard, where `MiddleStream` ends it earlier. on_text(text)
    is called with each new piece of text. files, name and path: as in `infill_prompt`. InputError:
    no room for a prompt.
    """
    room = model.config.context_length - max_new_tokens
    if room < 4:                            # three special tokens and one id of text
        raise InputError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a "
                         f"context of {model.config.context_length}")
    prompt_prefix = without_last_space(prefix) if guard else prefix
    prompt = infill_prompt(tokenizer, prompt_prefix, suffix, room, files=files, name=name,
                           path=path)
    stream = MiddleStream(tokenizer, prefix, suffix) if guard else TextStream(tokenizer)
    texts = []

    def pass_on(text):
        texts.append(text)
        if on_text:
            on_text(text)

    def on_token(_, token):
        pass_on(stream.add(token))
        return stream.stopped

    generate(model, [prompt], max_new_tokens, on_token=on_token, stop_ids=stop_ids(tokenizer),
             vocab_size=tokenizer.vocab_size, seeds=[seed], **sampling)
    pass_on(stream.finish())
    return "".join(texts)


def without_last_space(prefix):
    """A prefix without the space or tab right before a cursor inside the indentation.

    A tokenizer puts the last space before a word into the token of the word, so a prompt that ends
    with this space is unlike nearly all that the model has seen. It can write the space itself.
    After a word that made no difference.
    """
    last_line = prefix.rpartition("\n")[2]
    return prefix[:-1] if last_line and not last_line.strip() else prefix


class MiddleStream(TextStream):
    """The text of a middle as it is generated. The space that `without_last_space` removed from the
    prompt is skipped when the model writes it. The middle ends where `middle_end` ends it, or where
    the same ids come three times in a row."""

    def __init__(self, tokenizer, prefix, suffix, stop_strings=()):
        super().__init__(tokenizer, stop_strings)
        self.prefix, self.suffix = normalize(prefix), normalize(suffix)
        self.ids = []
        self.skip_space = without_last_space(self.prefix) != self.prefix
        self.middle = ""                        # so far
        self.passed_on = 0                      # how many of its characters add() has returned

    def add(self, token_id, final=False):
        if self.stopped and not final:
            return ""
        text = super().add(token_id, final)
        if self.skip_space and text:
            text = text[1:] if text[0] in " \t" else text
            self.skip_space = False
        self.middle += text
        self.ids.append(token_id)
        self.stopped = self.stopped or repeats(self.ids)
        end = middle_end(self.middle, self.prefix, self.suffix, final or self.stopped)
        if end is not None:
            self.stopped = True
            self.middle = self.middle[:end]
        elif not (final or self.stopped):       # more may come, and some of this may be cut off
            end = self.certain()
        new = self.middle[self.passed_on:end]   # None: to the end
        self.passed_on += len(new)
        return new

    def certain(self):
        """How many characters of the middle are sure to stay. Of several lines all but the last,
        which may be cut off as a whole; of one line all but an end that may be the start of the
        text after the cursor. White space before a cut goes, too."""
        above, line_end, _ = self.middle.rpartition("\n")
        if line_end:
            return len(above.rstrip())
        after = self.suffix.partition("\n")[0].rstrip()
        text = self.middle.rstrip()
        return len(text) - max((n for n in range(1, len(after) + 1) if text.endswith(after[:n])),
                               default=0)


def infill_prompt(tokenizer, prefix, suffix, room, files=(), name="", path=""):
    """A prompt of at most `room` ids. Text far from the cursor is left out.

    files: (path, text) of other files of the repository, the most relevant last. They are tried
    from the last on; those that still fit in FILES_SHARE of the room precede the file, in the given
    order. name: of the repository; path: of the file.
    """
    repository = []                         # the ids before the file
    included = []
    for other_path, text in reversed(files):
        more = [(other_path, normalize(text)), *included]
        ids = repository_ids(tokenizer, name, more, path)
        if len(ids) <= room * FILES_SHARE:          # else try the next one
            repository = ids
            included = more
    prefix_ids, suffix_ids = shorten(tokenizer.encode(normalize(prefix)),
                                     tokenizer.encode(normalize(suffix)),
                                     room - len(repository) - 3)    # three special tokens
    return repository + fim_ids(tokenizer, prefix_ids, suffix_ids)


def shorten(prefix_ids, suffix_ids, room):
    """Shorten both to `room` ids: the prefix loses its start, the suffix its end."""
    # the suffix gets what the prefix leaves free, but at least its share
    suffix_ids = suffix_ids[:max(int(room * SUFFIX_SHARE), room - len(prefix_ids))]
    excess = len(prefix_ids) + len(suffix_ids) - room
    return prefix_ids[max(0, excess):], suffix_ids


def stop_ids(tokenizer):
    """The ids that end a completion: those of all special tokens, since none of them is text."""
    return set(tokenizer.special.values())


def repeats(ids, shortest=5):
    """Whether a list of ids ends with three copies of the same `shortest` or more ids."""
    return any(ids[-n:] == ids[-2 * n:-n] == ids[-3 * n:-2 * n]
               for n in range(shortest, len(ids) // 3 + 1))


def load(folder_or_hub_name, device=None, dtype="auto", int8=False):
    """A checkpoint's model and tokenizer; InputError if they do not belong together.

    dtype: one of DTYPES or of torch. "auto" is the fastest for inference, with int8 among the
    candidates if `int8` is true; model.dtype_reason says why.
    """
    if dtype in ("float32", "bfloat16"):
        dtype = getattr(torch, dtype)
    model = load_model(folder_or_hub_name, device, dtype, int8)
    tokenizer = Tokenizer.load(folder_or_hub_name)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def print_model(folder, model):
    """Choose an attention implementation, and print where and how the model runs, with reasons."""
    attention = choose_attention(model, "auto", model.config.context_length)
    print(f"{folder} on {model.device} in {model.dtype_name} ({model.dtype_reason}), {attention}")


def newest_model(out, stages=("dpo", "sft", "repository", "pretrain")):
    """The folder of the first finished stage in this list; the latest stage comes first."""
    for stage in stages:
        if (Path(out) / stage / "config.json").exists():
            return Path(out) / stage
    script = "sft" if stages == ("sft",) else "pretrain"
    raise InputError(f"{out}: no finished model of {' or '.join(stages)}; run `python {script}.py` "
                     "first, or name a model")


# ------------------------------------------------------------------------------------------------
# The command


def show(path):
    """Print an excerpt of a file with a span of each type, the last one also in both formats."""
    source = normalize(read_text(path))
    text = "\n".join(source.split("\n")[:16])
    for start, end in block_spans(source):          # unless there is a block of a good size
        if 4 < source[start:end].count("\n") < 16:
            header = source.rfind("\n", 0, start - 1) + 1       # where the line above it begins
            text = source[header:end] + "\n"
            break
    rng = np.random.default_rng(0)
    for span_type, share in SPAN_TYPES.items():
        start, end = choose_span(text, span_type, rng)
        print(f"--- {span_type}: {share:.0%} of the examples")
        print(f"{text[:start]}{LEFT}{text[start:end]}{RIGHT}{text[end:]}")
    middle = f"{LEFT}{text[start:end]}{RIGHT}{ENDOFTEXT}"
    example = f"{PREFIX}{text[:start]}{SUFFIX}{text[end:]}{MIDDLE}{middle}"
    print(f"--- file format\n{example}")
    print(f"--- repository format\n{REPO_NAME}my-project\n{FILE_SEP}other.py\nX = 1\n")
    print(f"{FILE_SEP}{Path(path).name}\n{example}")


class Backend:
    """What support/server.py asks of a model. complete(), infill() and chat() return the ids of a
    prompt, at most `room`; a stream that turns new ids into text; and the ids that end it."""

    def __init__(self, model, tokenizer, name):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.context_length = model.config.context_length

    def complete(self, text, room, stops):
        """Continue a text. Editors also send whole FIM prompts as text."""
        fim = re.fullmatch(re.escape(PREFIX) + "(.*)" + re.escape(SUFFIX) + "(.*)"
                           + re.escape(MIDDLE), text, re.DOTALL)
        if fim:
            return self.infill(fim[1], fim[2], room, stops)
        ids = self.tokenizer.encode(text, allow_special=True)[-room:]
        if not ids:
            ids = [self.tokenizer.special[ENDOFTEXT]]
        return ids, TextStream(self.tokenizer, stops), stop_ids(self.tokenizer)

    def infill(self, prefix, suffix, room, stops, files=()):
        # editors do not send the path of the file, which the repository format needs
        ids = infill_prompt(self.tokenizer, without_last_space(prefix), suffix, room, files,
                            path="main")
        stream = MiddleStream(self.tokenizer, prefix, suffix, stops)
        return ids, stream, stop_ids(self.tokenizer)

    def chat(self, messages, tools, room, stops):
        ids = []
        for text, is_special, _ in self.tokenizer.chat_parts(messages, tools):
            ids += self.tokenizer.encode(text, allow_special=is_special)
        ids += self.tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
        if len(ids) > room:
            raise InputError(f"messages: {len(ids):,} tokens, there is room for {room:,}")
        ends = {self.tokenizer.special[name] for name in (ENDOFTEXT, "<|im_end|>")}
        return ids, TextStream(self.tokenizer, stops), ends

    def choose(self, logits, samplings):
        """The next id of each sequence, (B,): logits (B, V), and the settings of each, which also
        keep its generator of random numbers."""
        logits = logits.float()
        logits[:, self.tokenizer.vocab_size:] = float("-inf")
        ids = []
        for row, settings in zip(logits[:, None], samplings):                       # (1, V)
            if "generator" not in settings:
                settings["generator"] = torch.Generator().manual_seed(settings["seed"] % 2 ** 63)
            uniform = [torch.rand(1, generator=settings["generator"])]
            ids.append(sample(row, settings["temperature"], settings["top_k"], settings["top_p"],
                              uniform))
        return torch.cat(ids)


def serve(flags):
    """python fim.py serve: answer requests until Ctrl-C."""
    parser = argparse.ArgumentParser("fim.py serve", description="Serve a model to editors.")
    model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every machine in the network "
                        "may send requests (default: %(default)s, only this one)")
    parser.add_argument("--port", type=int, default=8012, help="default: %(default)s")
    args = parser.parse_args(flags)
    folder = args.model or newest_model(args.out)
    model, tokenizer = load(folder, args.device, args.dtype, int8=True)
    print_model(folder, model)
    backend = Backend(model, tokenizer, Path(folder).name)
    page = (Path(__file__).parent / "assets" / "editor.html").read_text()
    engine = Engine(lambda: Batch(model), backend.choose)
    try:
        server = Server((args.host, args.port), backend, engine, page)
    except (OSError, OverflowError) as error:               # taken, forbidden, or above 65535
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"--host {args.host} --port {args.port}: {problem}") from None
    print(f"open http://{args.host}:{args.port}/, or give that address to an editor plug-in; "
          "Ctrl-C ends the server", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def model_flags(parser):
    parser.add_argument("--model", help="checkpoint folder or hub name (default: newest in --out)")
    parser.add_argument("--out", default="out", help="root folder of the stages (default: out)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the fastest by "
                        "measurement; int8: 8-bit weights, on a CPU")


def parse_args():
    parser = argparse.ArgumentParser(
        description="Infill a file.", epilog="python fim.py show FILE: what a model is trained on; "
        "python fim.py serve: for editors")
    model_flags(parser)
    add = parser.add_argument
    add("file", type=Path, help=f"a source file, with a {FILL} mark or with --line")
    add("--line", type=int, help="the line to rewrite, from 1")
    add("--column", type=int, help="insert at this column, from 1, instead of replacing the line")
    add("--repo", type=Path, metavar="DIR", help="add its most relevant files to the prompt")
    add("--max-new-tokens", type=int, default=64, help="length of the middle (default: 64)")
    add("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    add("--no-guard", action="store_true", help="let the model repeat itself or the suffix")
    add("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not args.temperature >= 0:
        raise InputError("--max-new-tokens must be at least 1, --temperature at least 0")
    if args.column is not None and args.line is None:
        raise InputError("--column needs --line")
    return args


def main():
    if sys.argv[1:2] == ["show"]:
        if len(sys.argv) != 3:
            raise InputError("expected: python fim.py show FILE")
        return show(sys.argv[2])
    if sys.argv[1:2] == ["serve"]:
        return serve(sys.argv[2:])
    args = parse_args()
    text = read_text(args.file).removeprefix("\ufeff")      # editors do not count it as a column
    prefix, truth, suffix = split_at_cursor(text, args.file, args.line, args.column)
    folder = args.model or newest_model(args.out)
    model, tokenizer = load(folder, args.device, args.dtype, int8=True)
    repository = {}
    if args.repo:
        repository = repository_at_cursor(args.repo, args.file, prefix, suffix)
        print("other files, the most relevant last; the prompt takes those that fit: "
              + (", ".join(name for name, _ in repository["files"]) or "none"))
    print_model(folder, model)
    print("\n" + "\n".join(prefix.split("\n")[-12:]) + LEFT, end="", flush=True)
    infill(model, tokenizer, prefix, suffix, args.max_new_tokens, guard=not args.no_guard,
           on_text=lambda text: print(text, end="", flush=True), seed=args.seed,
           temperature=args.temperature, **repository)
    print(RIGHT + "\n".join(suffix.split("\n")[:12]))
    if truth.strip():
        print(f"\nground truth: {truth.strip()}")


if __name__ == "__main__":
    run(main)
