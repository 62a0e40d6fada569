"""Text to ids and back: Qwen2.5's byte-level BPE, its 22 control tokens and ChatML.

A token is a sequence of bytes. Training starts from the 256 single bytes and joins, again and
again, the pair of neighbours that occurs most often; encoding replays those joins. Text is first
cut into pre-tokens (a word with the blank before it, one digit, a run of signs, ...) and no token
crosses a cut. After the base vocabulary stand the control tokens: end of text, ChatML, tool calls,
fill-in-the-middle, repository layout (report, section 2.2 and table 2).

This file knows text and ids only: no tensors, no infilling (fim.py), no batches (data.py).

    python tokenizer.py FILE                        # how FILE is cut into tokens, in colour
    python tokenizer.py FILE --tokenizer FOLDER     # with another vocabulary; well under a second
"""

import argparse
import codecs
import heapq
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

from support.files import InputError, hub_folder, read_json, read_text, run, write_json

# ------------------------------------------------------------------------------------------------
# What Qwen2.5 fixes

# One piece per match: a contraction, a word with at most one sign or blank before it, ONE digit
# (GPT-4's pattern takes up to three), a run of signs, line ends, blanks. `\s+(?!\S)` leaves the
# last blank of a run to the word that follows it.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LONGEST_BLANK = 100_000     # characters; tiktoken's pattern engine fails on runs ten times as long

ENDOFTEXT = "<|endoftext|>"
SPECIAL_TOKENS = [
    ENDOFTEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>"]
HIDDEN_TOKENS = set(SPECIAL_TOKENS[:14])    # those that decode(skip_special=True) leaves out

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_BEFORE = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
                "\n\nYou are provided with function signatures within <tools></tools> XML tags:"
                "\n<tools>")
TOOLS_AFTER = ("\n</tools>\n\nFor each function call, return a json object with function name and "
               "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
               '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')

# Tokenizer.render_chat() below, in the language that Hugging Face folders carry it in
CHAT_TEMPLATE = "".join(line.strip() for line in r"""
{{- '<|im_start|>system\n' }}
{{- messages[0].content if messages[0].role == 'system' else SYSTEM_PROMPT }}
{%- if tools %}
    {{- TOOLS_BEFORE }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- TOOLS_AFTER }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}{{- '\n' + message.content if message.content }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function or call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
""".splitlines())
CHAT_TEMPLATE = (CHAT_TEMPLATE.replace("SYSTEM_PROMPT", json.dumps(SYSTEM_PROMPT))
                 .replace("TOOLS_BEFORE", json.dumps(TOOLS_BEFORE))
                 .replace("TOOLS_AFTER", json.dumps(TOOLS_AFTER)))


def byte_alphabet():
    """byte -> the visible character that stands for it in vocabulary files (GPT-2's table)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte if i < len(visible) else 256 + i - len(visible))
            for i, byte in enumerate(visible + hidden)}


TO_CHAR = byte_alphabet()                                   # its order is that of ids 0 to 255
TO_BYTE = {char: byte for byte, char in TO_CHAR.items()}


def to_chars(token):
    return "".join(TO_CHAR[byte] for byte in token)


def to_bytes(chars):
    return bytes(TO_BYTE[char] for char in chars)


# ------------------------------------------------------------------------------------------------
# Learning the vocabulary


def join(word, pair, new):
    """The ids of word with each occurrence of pair, from the left, replaced by new."""
    joined, i = [], 0
    while i < len(word):
        found = tuple(word[i:i + 2]) == pair
        joined.append(new if found else word[i])
        i += 2 if found else 1
    return joined


def learn_merges(words, count):
    """Byte-pair encoding: the merges, most frequent first.

    words: bytes -> number of occurrences. count: how many merges at most; pairs that occur only
    once are not joined. Returns a list of (left, right) in bytes. Ties go to the pair with the
    smaller ids. A merge touches only the words that hold its pair, never the whole text.
    """
    tokens = [bytes([byte]) for byte in TO_CHAR]
    byte_ids = {byte: i for i, byte in enumerate(TO_CHAR)}
    occurrences = list(words.values())
    spelled = [[byte_ids[byte] for byte in word] for word in words]
    pair_count, pair_words = Counter(), defaultdict(set)
    for w, word in enumerate(spelled):
        for pair in zip(word, word[1:]):
            pair_count[pair] += occurrences[w]
            pair_words[pair].add(w)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    merges = []
    while heap and len(merges) < count:
        negative, pair = heapq.heappop(heap)
        if -negative != pair_count[pair]:                   # an old entry: its count has changed
            continue
        if pair_count[pair] < 2:
            break
        new = len(tokens)
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in pair_words.pop(pair):
            word, joined = spelled[w], join(spelled[w], pair, new)
            for old in zip(word, word[1:]):
                pair_count[old] -= occurrences[w]
            for now in zip(joined, joined[1:]):
                pair_count[now] += occurrences[w]
                pair_words[now].add(w)
            changed.update(zip(word, word[1:]), zip(joined, joined[1:]))
            spelled[w] = joined
        for p in changed:
            if pair_count[p] > 0:
                heapq.heappush(heap, (-pair_count[p], p))
    return merges


# ------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """The merges (they fix the base vocabulary) and the control tokens after it.

    special: name -> id. vocab_size: ids in use; a model may have more rows than that.
    """

    def __init__(self, merges, special=None):
        self.merges = merges
        self.tokens = [bytes([b]) for b in TO_CHAR] + [left + right for left, right in merges]
        base = len(self.tokens)
        self.special = special or {name: base + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = max(self.special.values()) + 1
        self.encoding = tiktoken.Encoding(
            "minicoder", pat_str=PATTERN, special_tokens=self.special,
            mergeable_ranks={token: i for i, token in enumerate(self.tokens)})
        self.hidden_ids = {i for name, i in self.special.items() if name in HIDDEN_TOKENS}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a vocabulary of vocab_size ids, the 22 control tokens included, from texts."""
        smallest = len(TO_CHAR) + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise InputError(f"a vocabulary of {vocab_size} is too small: "
                             f"256 bytes and {len(SPECIAL_TOKENS)} control tokens need {smallest}")
        words = Counter()
        for text in texts:
            words.update(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
        words = {word.encode("utf-8", "replace"): n for word, n in words.items()}
        if not words:
            raise InputError("no text to train a tokenizer on")
        return cls(learn_merges(words, vocab_size - smallest))

    @classmethod
    def load(cls, folder_or_hub_name):
        """Read tokenizer.json, or vocab.json with merges.txt, from a folder or a hub name."""
        folder = hub_folder(folder_or_hub_name, weights=False)
        path = folder / "tokenizer.json"
        try:
            if path.exists():
                data = read_json(path)
                vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
                special = {token["content"]: token["id"] for token in data["added_tokens"]}
            else:
                path = folder / "merges.txt"
                vocabulary = read_json(folder / "vocab.json")
                merges = [line for line in read_text(path).split("\n")[1:] if line]
                special = {name: len(vocabulary) + i for i, name in enumerate(SPECIAL_TOKENS)}
            pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
            pairs = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
            tokens = [bytes([byte]) for byte in TO_CHAR] + [left + right for left, right in pairs]
            wrong = [i for i, token in enumerate(tokens) if vocabulary.get(to_chars(token)) != i]
            after = [*range(len(tokens), len(tokens) + len(special))]
            follow = sorted(special.values()) == after and all(name.encode() for name in special)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: not a byte-level BPE tokenizer of Qwen's kind") from None
        if missing := [name for name in SPECIAL_TOKENS if name not in special]:
            raise InputError(f"{path}: lacks {len(missing)} of Qwen2.5's control tokens, "
                             f"the first is {missing[0]}")
        if wrong or not follow:
            first = (wrong or [len(tokens)])[0]
            raise InputError(f"{path}: vocabulary, merges and control tokens do not fit together, "
                             f"first at id {first}; copy or download it again")
        return cls(pairs, special)

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as Hugging Face tokenizers read them."""
        added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": name in HIDDEN_TOKENS}
                 for name, i in sorted(self.special.items(), key=lambda item: item[1])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                      "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
                 "invert": False}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"}, "post_processor": byte_level, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {to_chars(token): i for i, token in enumerate(self.tokens)},
                      "merges": [f"{to_chars(a)} {to_chars(b)}" for a, b in self.merges]}})
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False,
            "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"}
                                     for token in added},
            "bos_token": None, "eos_token": ENDOFTEXT, "pad_token": ENDOFTEXT, "unk_token": None,
            "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
            "errors": "replace", "model_max_length": 32768, "split_special_tokens": False})

    def encode(self, text, allow_special=False):
        """Text -> ids, after Unicode NFC. A control token's name in text stays plain text unless
        allow_special: so nothing that was read from a file can steer the model."""
        text, cuts = unicodedata.normalize("NFC", text), []
        if len(text) > LONGEST_BLANK:
            cuts = [cut for blank in re.finditer(r"\s+", text)
                    for cut in range(blank.start() + LONGEST_BLANK, blank.end(), LONGEST_BLANK)]
        ids = []
        for start, end in zip([0, *cuts], [*cuts, None]):
            part = text[start:end]
            ids += (self.encoding.encode(part, allowed_special="all") if allow_special
                    else self.encoding.encode_ordinary(part))
        return ids

    def encode_batch(self, texts):
        """encode() of many texts, on all cores -> one list of ids per text."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:    # tiktoken lets other threads run
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids):
        """Ids -> bytes; control tokens give the bytes of their names. KeyError: no such id."""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids, skip_special=False):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD. skip_special leaves out what Hugging
        Face marks special: end of text, ChatML and vision tokens, not FIM, repository or tools."""
        if skip_special:
            ids = [i for i in ids if i not in self.hidden_ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self):
        """The number of bytes of text that each id stands for (0 for control tokens)."""
        return [*map(len, self.tokens), *[0] * len(self.special)]

    def render_chat(self, messages, tools=None, add_generation_prompt=False):
        """Messages -> ChatML text, equal to Qwen2.5's (chat_template in tokenizer_config.json).

        messages: dicts with role and content; an assistant's may have tool_calls (dicts with name
        and arguments, or with both under "function"). tools: JSON-like function signatures.
        InputError: no message, or an unknown role.
        """
        if not messages:
            raise InputError("a chat needs at least one message")
        first = messages[0]
        system = first["content"] if first["role"] == "system" else SYSTEM_PROMPT
        if tools:
            lines = ["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools]
            system += TOOLS_BEFORE + "".join(lines) + TOOLS_AFTER
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        roles = [None, *(message["role"] for message in messages), None]
        for i, message in enumerate(messages, 1):
            role, content = message["role"], message.get("content")
            if role == "tool":                              # neighbours share one user turn
                text += "<|im_start|>user" * (roles[i - 1] != "tool")
                text += f"\n<tool_response>\n{content}\n</tool_response>"
                text += "<|im_end|>\n" * (roles[i + 1] != "tool")
            elif role == "assistant" and message.get("tool_calls"):
                text += "<|im_start|>assistant" + (f"\n{content}" if content else "")
                for call in (call.get("function", call) for call in message["tool_calls"]):
                    arguments = json.dumps(call["arguments"], ensure_ascii=False)
                    text += (f'\n<tool_call>\n{{"name": "{call["name"]}", '
                             f'"arguments": {arguments}}}\n</tool_call>')
                text += "<|im_end|>\n"
            elif role not in ("system", "user", "assistant"):
                raise InputError(f"message {i}: unknown role {role!r}")
            elif role != "system" or i > 1:
                text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        return text + "<|im_start|>assistant\n" * add_generation_prompt


class TextStream:
    """Ids, one at a time -> text that is safe to show: no half characters, no half stop strings.

    add() and finish() return new text. Once a stop string is complete, stopped is True, text ends
    before it, and nothing more comes out.
    """

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def add(self, token_id, final=False):
        if self.stopped:
            return ""
        data = b"" if token_id is None else self.tokenizer.decode_bytes([token_id])
        self.held += self.utf8.decode(data, final)
        cuts = [cut for stop in self.stop_strings if (cut := self.held.find(stop)) >= 0]
        self.stopped = bool(cuts)
        keep = 0 if final else max((n for stop in self.stop_strings for n in range(1, len(stop))
                                    if self.held.endswith(stop[:n])), default=0)
        cut = min(cuts, default=len(self.held) - keep)
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def finish(self):
        return self.add(None, final=True)


# ------------------------------------------------------------------------------------------------
# The token view


def token_view(tokenizer, text, colour=True):
    """Text with its tokens set apart, each source line followed by the ids that begin in it."""
    inks, border = (("\x1b[30;46m", "\x1b[30;43m"), "\x1b[0m") if colour else (("", ""), "|")
    dim, plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    view, shown, ids, stream = [], "", [], TextStream(tokenizer)
    encoded = tokenizer.encode(text)
    for n, i in enumerate(encoded):
        ids.append(str(i))
        piece = stream.add(i) or "·"                        # a part of a character
        for line in piece.replace("\r", "␍").replace("\n", "↵\n").splitlines(keepends=True):
            shown += inks[n % 2] + line.rstrip("\n") + border
            if line.endswith("\n") or n == len(encoded) - 1:
                view += [shown, f"{dim}    {' '.join(ids)}{plain}"]
                shown, ids = "", []
    return "\n".join(view)


def main():
    parser = argparse.ArgumentParser(description="Show how a file is cut into tokens.")
    parser.add_argument("file", type=Path, help="any text file")
    parser.add_argument("--tokenizer", default="out/tokenizer",
                        help="folder or hub name of a tokenizer (default: %(default)s)")
    args = parser.parse_args()
    if args.tokenizer == "out/tokenizer" and not Path(args.tokenizer).is_dir():
        raise InputError("out/tokenizer: not there yet; `python pretrain.py` makes it, "
                         "or give --tokenizer FOLDER")
    tokenizer = Tokenizer.load(args.tokenizer)
    text = read_text(args.file, newline="")
    ids, size = tokenizer.encode(text), len(text.encode())
    print(token_view(tokenizer, text, colour=sys.stdout.isatty()))
    print(f"\n{size:,} bytes, {len(text):,} characters, {len(ids):,} tokens of {args.tokenizer}: "
          f"{size / max(len(ids), 1):.2f} bytes per token")


if __name__ == "__main__":
    run(main)
