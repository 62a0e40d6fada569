"""Text to ids and back: Qwen2.5's byte-level BPE, its 22 special tokens and ChatML.

A token is a short sequence of bytes, numbered by its id. Training starts from the 256 single bytes
and repeatedly merges the most frequent pair of neighboring tokens into a new one; encoding replays
these merges on new text. Before either, a regular expression splits the text into words, and no
token ever crosses a word boundary. After the learned vocabulary come the special tokens: end of
text, ChatML, tool calls, fill-in-the-middle and repository structure (report, section 2.2 and
table 2).

This file deals with text and ids only. What the fill-in-the-middle tokens mean is in fim.py, and
how ids become batches is in data.py.

    python tokenizer.py FILE                        # show FILE's tokens in color; under a second
    python tokenizer.py FILE --tokenizer FOLDER     # with another vocabulary

Read first: learn_merges, encode_word, Tokenizer.encode, Tokenizer.chat_parts
"""

import argparse
import codecs
import heapq
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import regex
import tiktoken

from support.files import InputError, hub_folder, read_text, read_vocabulary, run, write_vocabulary

# How text is split into words: a contraction, a run of letters with at most one other character
# before it, ONE digit (GPT-4's pattern takes up to three), a run of punctuation, line ends, white
# space. `\s+(?!\S)` leaves the last space of a run to the word that follows it.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LONGEST_BLANK = 100_000     # characters of white space; tiktoken fails on runs ten times as long

ENDOFTEXT = "<|endoftext|>"
SPECIAL_TOKENS = [
    ENDOFTEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>"]
HIDDEN_TOKENS = set(SPECIAL_TOKENS[:14])    # those that decode(skip_special=True) leaves out

# The bytes in the order of their ids, as in GPT-2: first the printable characters of Latin-1
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]

# ------------------------------------------------------------------------------------------------
# Byte-pair encoding: learning the merges, and applying them


def merge_pair(ids, pair, new_id):
    """The list ids with every occurrence of pair, from left to right, replaced by new_id."""
    merged = []
    i = 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges(words, count):
    """Learn up to `count` merges, the most frequent first -> list of (left, right), in bytes.

    words: bytes -> how often the word occurs. Of equally frequent pairs the one with the smaller
    ids is merged first; pairs that occur only once are never merged. A merge visits only the words
    that contain its pair, so training does not read the whole text again for each merge.
    """
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    id_of_byte = {byte: i for i, byte in enumerate(BYTE_ORDER)}
    frequency = list(words.values())
    spelling = [[id_of_byte[byte] for byte in word] for word in words]  # each word as ids so far

    pair_count = Counter()                  # (id, id) -> occurrences in the text
    words_with = defaultdict(set)           # (id, id) -> indices of words that contain it, or did
    for w, ids in enumerate(spelling):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += frequency[w]
            words_with[pair].add(w)
    # A heap yields the most frequent pair. Counts change, but instead of searching the heap for an
    # outdated entry, we push a new one and skip the outdated entry when it is popped.
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    merges = []
    while heap and len(merges) < count:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_count[pair]:             # outdated
            continue
        if pair_count[pair] < 2:
            break
        left, right = tokens[pair[0]], tokens[pair[1]]
        new_id = len(tokens)
        tokens.append(left + right)
        merges.append((left, right))
        changed = set()
        for w in words_with.pop(pair):
            before = spelling[w]
            after = merge_pair(before, pair, new_id)
            for old in zip(before, before[1:]):
                pair_count[old] -= frequency[w]
            for new in zip(after, after[1:]):
                pair_count[new] += frequency[w]
                words_with[new].add(w)
            changed.update(zip(before, before[1:]), zip(after, after[1:]))
            spelling[w] = after
        for changed_pair in changed:
            if pair_count[changed_pair] > 0:
                heapq.heappush(heap, (-pair_count[changed_pair], changed_pair))
    return merges


def encode_word(word, id_of):
    """Encode one word (bytes) by replaying the merges -> list of ids.

    id_of: token (bytes) -> id. Tokens that were learned earlier have smaller ids, so in each round
    the pair whose merged token has the smallest id is merged, until no pair forms a token. This is
    the reference implementation: tiktoken, which Tokenizer uses, does the same in Rust.
    """
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        mergeable = [(id_of[left + right], i) for i, (left, right) in enumerate(
            zip(parts, parts[1:])) if left + right in id_of]
        if not mergeable:
            return [id_of[part] for part in parts]
        _, i = min(mergeable)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


# ------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """A vocabulary: single bytes, one token per merge, then the special tokens.

    tokens: the bytes of each id below the special tokens. special: name -> id. vocab_size: the
    number of ids; a model's embedding matrix may have more rows.
    """

    def __init__(self, merges, special=None):
        self.merges = merges
        self.tokens = [bytes([byte]) for byte in BYTE_ORDER]
        self.tokens += [left + right for left, right in merges]
        base = len(self.tokens)
        self.special = special or {name: base + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = max(self.special.values()) + 1
        self.encoding = tiktoken.Encoding(
            "minicoder", pat_str=PATTERN, special_tokens=self.special,
            mergeable_ranks={token: i for i, token in enumerate(self.tokens)})
        self.hidden_ids = {i for name, i in self.special.items() if name in HIDDEN_TOKENS}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a vocabulary of vocab_size ids, including the 22 special tokens, from texts."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise InputError(f"a vocabulary of {vocab_size} is too small: 256 bytes and "
                             f"{len(SPECIAL_TOKENS)} special tokens need {smallest}")
        words = Counter()
        for text in texts:
            words.update(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
        words = {word.encode("utf-8", "replace"): n for word, n in words.items()}
        if not words:
            raise InputError("no text to train a tokenizer on")
        return cls(learn_merges(words, vocab_size - smallest))

    def encode(self, text, allow_special=False):
        """Text -> ids, after Unicode normalization (NFC).

        The name of a special token in the text is encoded as plain text unless allow_special, so
        that nothing read from a file can act as a special token.
        """
        text = unicodedata.normalize("NFC", text)
        cuts = []
        if len(text) > LONGEST_BLANK:
            cuts = [cut for blank in re.finditer(r"\s+", text)
                    for cut in range(blank.start() + LONGEST_BLANK, blank.end(), LONGEST_BLANK)]
        ids = []
        for start, end in zip([0, *cuts], [*cuts, None]):
            if allow_special:
                ids += self.encoding.encode(text[start:end], allowed_special="all")
            else:
                ids += self.encoding.encode_ordinary(text[start:end])
        return ids

    def encode_batch(self, texts):
        """encode() of many texts, on all cores -> one list of ids per text."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:    # tiktoken releases Python's lock
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids):
        """Ids -> bytes; a special token gives its name. KeyError if there is no such id."""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids, skip_special=False):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD. skip_special leaves out the tokens
        that Hugging Face marks as special: end of text, ChatML and vision, but not FIM or tools."""
        if skip_special:
            ids = [i for i in ids if i not in self.hidden_ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self):
        """The number of bytes of each token, by id (0 for special tokens)."""
        return [len(token) for token in self.tokens] + [0] * len(self.special)

    @classmethod
    def load(cls, folder_or_hub_name):
        """Read tokenizer.json, or vocab.json and merges.txt, from a folder or a hub name."""
        folder = hub_folder(folder_or_hub_name, weights=False)
        return cls(*read_vocabulary(folder, BYTE_ORDER, SPECIAL_TOKENS))

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as Hugging Face tokenizers read them."""
        template = read_text(Path(__file__).with_name("assets") / "chat_template.jinja")
        write_vocabulary(
            Path(folder), BYTE_ORDER, self.merges, self.special, hidden=HIDDEN_TOKENS,
            pattern=PATTERN, end=ENDOFTEXT,
            chat_template="".join(line.strip() for line in template.splitlines()))

    def chat_parts(self, messages, tools=None):
        """A conversation in ChatML, in parts: a list of (text, is_special, role).

        messages: dicts with role and content; content is text, a list of text parts, or None.
        An assistant's message may have tool_calls: dicts with name and arguments, or with a dict
        "function" that holds both. tools: JSON-like function signatures, for the system turn.

        is_special: whether ChatML itself writes the text, as a special token. In all other text,
        the name of a special token stays plain text. role: whose turn the part belongs to; the
        responses of tools form a user turn. An assistant's "assistant\\n" is a part of its own,
        because a generation prompt ends with it. InputError if messages are not a conversation.
        """
        check_messages(messages)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
        turns = []                                          # (role, [(text, is_special), ...])
        for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
            if role == "assistant":
                turns += [(role, assistant_parts(message)) for message in group]
            elif role == "tool":                            # consecutive responses share a turn
                responses = "\n".join(f"<tool_response>\n{content_text(message)}\n</tool_response>"
                                      for message in group)
                turns.append(("user", [(f"user\n{responses}", False)]))
            else:
                turns += [(role, [(f"{role}\n{content_text(message)}", False)])
                          for message in group]
        if tools:
            [(system_text, _)] = turns[0][1]
            signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            system_text += TOOLS_BEFORE + signatures + TOOLS_AFTER
            turns[0] = ("system", [(system_text, False), *TOOL_CALL_FORMAT])
        parts = []
        for role, contents in turns:
            turn = [("<|im_start|>", True), *contents, ("<|im_end|>", True), ("\n", False)]
            parts += [(text, is_special, role) for text, is_special in turn]
        return parts

    def render_chat(self, messages, tools=None, add_generation_prompt=False):
        """The conversation as ChatML text; the arguments are those of `chat_parts`."""
        text = "".join(text for text, _, _ in self.chat_parts(messages, tools))
        return text + "<|im_start|>assistant\n" if add_generation_prompt else text


# ------------------------------------------------------------------------------------------------
# ChatML: <|im_start|>role, the content and <|im_end|> for each turn

# assets/chat_template.jinja: this format, as a template for Hugging Face folders
SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_BEFORE = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
                "\n\nYou are provided with function signatures within <tools></tools> XML tags:"
                "\n<tools>")
TOOLS_AFTER = ("\n</tools>\n\nFor each function call, return a json object with function name and "
               "arguments within ")
TOOL_CALL_FORMAT = [        # what follows, in parts: the tags are special tokens
    ("<tool_call>", True), ("</tool_call>", True), (" XML tags:\n", False), ("<tool_call>", True),
    ('\n{"name": <function-name>, "arguments": <args-json-object>}\n', False),
    ("</tool_call>", True)]


def check_messages(messages):
    """Raise InputError unless messages is a list of dicts whose roles ChatML knows."""
    if not isinstance(messages, list) or not messages:
        raise InputError("a chat needs a list of at least one message")
    for i, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise InputError(f"message {i}: unknown role {role!r}")


def content_text(message):
    """The content of a message as text: a string, a list of text parts (joined by line feeds), or
    nothing. A tool may return any value. InputError if a part is not text, such as an image."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    elif isinstance(content, str) or message["role"] == "tool":
        return str(content)
    raise InputError(f"the content of a {message['role']} message is not text")


def tool_call_text(call):
    """A tool call as ChatML writes it between the tags. call: as in chat_parts(), arguments: a JSON
    value or, as OpenAI does, its text."""
    try:
        function = call.get("function") or call
        name, arguments = function["name"], function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        arguments = json.dumps(arguments, ensure_ascii=False)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise InputError("a tool call needs a name, and arguments that are JSON") from None
    # the name is not escaped: the published template does not escape it either
    return f'\n{{"name": "{name}", "arguments": {arguments}}}\n'


def assistant_parts(message):
    """An assistant's turn without <|im_start|> and <|im_end|>, as (text, is_special) parts."""
    text = content_text(message)
    calls = message.get("tool_calls") or []
    if text and calls:
        text += "\n"                        # not a part of its own: ".\n" is one token
    parts = [("assistant\n", False)]
    if text:
        parts.append((text, False))
    for number, call in enumerate(calls):
        if number:
            parts.append(("\n", False))
        # the tags are special tokens; the JSON between them is plain text, whatever it contains
        parts += [("<tool_call>", True), (tool_call_text(call), False), ("</tool_call>", True)]
    return parts


class TextStream:
    """Turns ids, one at a time, into text that is safe to print: it holds back incomplete
    characters, and text that may become a stop string. Once a stop string is complete, `stopped`
    is True, and the text ends before it."""

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""                          # decoded, but not returned yet
        self.stopped = False

    def add(self, token_id, final=False):
        """The text that is safe to print after token_id; with final, all that was held."""
        if self.stopped:
            return ""
        data = b"" if token_id is None else self.tokenizer.decode_bytes([token_id])
        self.held += self.utf8.decode(data, final)
        cut = len(self.held) if final else len(self.held) - self.possible_stop()
        for stop in self.stop_strings:
            if stop in self.held:
                cut = min(cut, self.held.find(stop))
                self.stopped = True
        safe, self.held = self.held[:cut], self.held[cut:]
        return safe

    def possible_stop(self):
        """How many characters at the end of `held` are the beginning of a stop string."""
        return max((n for stop in self.stop_strings for n in range(1, len(stop))
                    if self.held.endswith(stop[:n])), default=0)

    def finish(self):
        return self.add(None, final=True)


# ------------------------------------------------------------------------------------------------
# The command: show how a file is split into tokens

DIM, RESET, COLORS = "\x1b[2m", "\x1b[0m", ("\x1b[30;46m", "\x1b[30;43m")


def token_view(tokenizer, text, color=True):
    """The text with its tokens set apart, by alternating colors or by "|", and below each line the
    ids of the tokens that begin in it."""
    stream = TextStream(tokenizer)
    encoded = tokenizer.encode(text)
    view, line_view, line_ids = [], "", []
    for n, token_id in enumerate(encoded):
        line_ids.append(str(token_id))
        token_text = stream.add(token_id) or "·"            # nothing yet: an incomplete character
        token_text = token_text.replace("\r", "␍").replace("\n", "↵\n")
        for line in token_text.splitlines(keepends=True):
            visible = line.rstrip("\n")
            line_view += (COLORS[n % 2] + visible + RESET) if color else (visible + "|")
            if line.endswith("\n") or n == len(encoded) - 1:
                ids = "    " + " ".join(line_ids)
                view += [line_view, DIM + ids + RESET if color else ids]
                line_view, line_ids = "", []
    return "\n".join(view)


def main():
    parser = argparse.ArgumentParser(description="Show how a file is split into tokens.")
    parser.add_argument("file", type=Path, help="any text file")
    parser.add_argument("--tokenizer", default="out/tokenizer",
                        help="folder or hub name of a tokenizer (default: %(default)s)")
    args = parser.parse_args()
    if args.tokenizer == "out/tokenizer" and not Path(args.tokenizer).is_dir():
        raise InputError("out/tokenizer: no such folder; run `python pretrain.py` first, "
                         "or give --tokenizer FOLDER")
    tokenizer = Tokenizer.load(args.tokenizer)
    text = read_text(args.file, newline="")
    ids, size = tokenizer.encode(text), len(text.encode())
    print(token_view(tokenizer, text, color=sys.stdout.isatty()))
    print(f"\n{size:,} bytes, {len(text):,} characters, {len(ids):,} tokens of {args.tokenizer}: "
          f"{size / max(len(ids), 1):.2f} bytes per token")


if __name__ == "__main__":
    run(main)
