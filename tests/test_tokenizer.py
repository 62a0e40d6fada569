"""pytest tests/test_tokenizer.py"""

import functools
import http.server
import itertools
import json
import random
import threading
import unicodedata
from pathlib import Path

import pytest
import regex
from conftest import CODE, ROOT, reference_data

import tokenizer as module
from support.files import InputError, characters_of, fetch, hub_folder, whole_folder
from tokenizer import (BYTE_ORDER, PATTERN, SPECIAL_TOKENS, TextStream, Tokenizer, encode_word,
                       learn_merges, token_view)

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())

# ---- byte pair encoding


@pytest.mark.parametrize("words,merges", [
    # (e, s), (s, t) and (es, t) come 9 times each, the smaller ids first; (l, o), (o, w) 7 times
    ({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3},
     [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]),
    ({b"abc": 1}, []),                                              # each pair occurs only once
    ({b"aaaa": 2}, [(b"a", b"a"), (b"aa", b"aa")])])                # overlapping pairs
def test_merges_of_small_examples(words, merges):
    assert learn_merges(words, 4) == merges


def test_training_learns_the_merges_of_hugging_face(small_tokenizer):
    char_of = characters_of(BYTE_ORDER)
    merges = [["".join(char_of[byte] for byte in part) for part in pair]
              for pair in small_tokenizer.merges]
    assert merges == GOLDEN["merges"]


@pytest.mark.parametrize("vocabulary", ["small", "published"])
def test_reference_encoding_equals_tiktoken(vocabulary, request, small_tokenizer):
    """All words of 1,000 texts."""
    tokenizer = small_tokenizer
    if vocabulary == "published":
        tokenizer = Tokenizer.load(request.getfixturevalue("published_folder"))
    rng = random.Random(0)
    code = Path(module.__file__).read_text() + "naïve Größe 変数 🙂\t\r\n  x" * 3
    texts = [code[start:start + 300] for start in (rng.randrange(len(code)) for _ in range(1000))]
    id_of = {token: i for i, token in enumerate(tokenizer.tokens)}
    cached = functools.cache(lambda word: encode_word(word, id_of))
    for text in texts:
        words = regex.findall(PATTERN, unicodedata.normalize("NFC", text))
        assert [i for word in words for i in cached(word.encode())] == tokenizer.encode(text)


def test_published_vocabulary(published_folder):
    tokenizer = Tokenizer.load(published_folder)
    assert tokenizer.vocab_size == 151_665 and tokenizer.special["<|fim_middle|>"] == 151_660
    assert tokenizer.encode("Hello world") == [9707, 1879]
    with open(reference_data("tokenizer/ggml-vocab-qwen2.gguf.inp"), newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:46]
    lines = reference_data("tokenizer/ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[:46]]
    assert tokenizer.encode_batch(texts) == expected


def test_special_tokens_follow_the_base_vocabulary(small_tokenizer):
    base = 256 + len(small_tokenizer.merges)
    assert list(small_tokenizer.special) == SPECIAL_TOKENS
    assert list(small_tokenizer.special.values()) == list(range(base, base + 22))
    assert small_tokenizer.vocab_size == base + 22


def test_text_survives_encoding_and_decoding(small_tokenizer):
    rng = random.Random(0)
    texts = ["", "a" + " " * 1_200_000 + "b"]
    for _ in range(100):
        characters = [rng.choice([rng.randrange(32, 127), rng.randrange(1, 0xD800),
                                  rng.randrange(0xE000, 0x110000), 10, 32]) for _ in range(20)]
        texts.append("".join(map(chr, characters)))
    lengths = small_tokenizer.byte_lengths()
    assert len(lengths) == small_tokenizer.vocab_size
    for text, ids in zip(texts, small_tokenizer.encode_batch(texts)):
        normal = unicodedata.normalize("NFC", text)
        assert small_tokenizer.decode(ids) == normal
        assert sum(lengths[i] for i in ids) == len(normal.encode())


def test_text_cannot_inject_special_tokens(small_tokenizer):
    text = "<|im_end|><|fim_middle|>"
    ids = small_tokenizer.encode(text)
    assert not set(ids) & set(small_tokenizer.special.values())
    assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.encode(text, allow_special=True) == [
        small_tokenizer.special["<|im_end|>"], small_tokenizer.special["<|fim_middle|>"]]
    special_ids = list(small_tokenizer.special.values())        # Hugging Face hides those of ChatML
    assert "<|fim_middle|>" in small_tokenizer.decode(special_ids, skip_special=True)
    assert "<|im_end|>" not in small_tokenizer.decode(special_ids, skip_special=True)


# ---- ChatML

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " two\nlines "},
     {"role": "assistant", "content": "ok"}, {"role": "system", "content": "again"},
     {"role": "user", "content": ""}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function",
          "function": {"name": "get", "arguments": {"city": "Zürich <x>", "n": [1]}}},
         {"name": "now", "arguments": {}}]},
     {"role": "tool", "content": "12°"}, {"role": "tool", "content": "noon"},
     {"role": "assistant", "content": "It is 12°.", "tool_calls": []},
     {"role": "assistant", "content": "More?",
      "tool_calls": [{"name": "f", "arguments": {"a": None}}]},
     {"role": "tool", "content": "x"}],
    [{"role": "tool", "content": "first"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "size?"},
     {"role": "assistant", "content": None, "tool_calls": [{"name": "size", "arguments": {}}]},
     {"role": "tool", "content": 12}, {"role": "tool", "content": {"unit": "cm"}}]]
TOOLS = [{"type": "function",
          "function": {"name": "get", "description": "é & <b>", "parameters": {}}}]
EVERY_CHAT = list(itertools.product(CHATS, [None, TOOLS], [False, True]))
CALL = {"name": "get", "arguments": {"city": "Zürich", "days": [1, 2]}}


@pytest.fixture(params=["our", "the published"])
def chat_template(request, small_tokenizer, tmp_path):
    """The template that save() writes, and Qwen's."""
    if request.param == "the published":
        return reference_data("tokenizer/Qwen2.5-Instruct.chat_template.jinja").read_text()
    small_tokenizer.save(tmp_path)
    return json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]


def test_chat_equals_the_template(small_tokenizer, chat_template):
    """Rendered as by transformers, with its white-space settings and its tojson."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 comes with torch")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    render = environment.from_string(chat_template).render
    for messages, tools, prompt in EVERY_CHAT:
        text = small_tokenizer.render_chat(messages, tools, prompt)
        assert text == render(messages=messages, tools=tools, add_generation_prompt=prompt)
    # Qwen's template leaves out a role that it does not know; render_chat() refuses it, see below
    unknown = [*CHATS[0], {"role": "developer", "content": "x"}]
    assert render(messages=unknown) == small_tokenizer.render_chat(CHATS[0])


@pytest.mark.parametrize("arguments", ['{"city": "Zürich", "days": [1, 2]}',
                                       ' {"city":"Z\\u00fcrich","days":[1,2]}'])
def test_chat_arguments_in_a_json_string_are_not_encoded_twice(small_tokenizer, arguments):
    call = {"type": "function", "function": {**CALL, "arguments": arguments}}
    text = small_tokenizer.render_chat(
        [CHATS[0][0], {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert text.endswith('<|im_start|>assistant\n<tool_call>\n{"name": "get", "arguments": '
                         '{"city": "Zürich", "days": [1, 2]}}\n</tool_call><|im_end|>\n')


def test_chat_content_may_be_text_parts_or_nothing(small_tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    text = small_tokenizer.render_chat([
        {"role": "system", "content": None}, {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "four"}]}])
    assert text == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\none\ntwo\nthree<|im_end|>\n"
                    "<|im_start|>assistant\nfour<|im_end|>\n")


def test_chat_parts_tell_markup_from_content(small_tokenizer):
    messages = [{"role": "user", "content": "<|im_end|> <tool_call>"},
                {"role": "assistant", "content": "ok", "tool_calls": [CALL]}]
    parts = small_tokenizer.chat_parts(messages, TOOLS)
    assert "".join(text for text, _, _ in parts) == small_tokenizer.render_chat(messages, TOOLS)
    special = [(text, role) for text, is_special, role in parts if is_special]
    tool_call = ("<tool_call>", "</tool_call>")
    assert special == [
        *[(text, "system") for text in ("<|im_start|>", *tool_call, *tool_call, "<|im_end|>")],
        *[(text, "user") for text in ("<|im_start|>", "<|im_end|>")],
        *[(text, "assistant") for text in ("<|im_start|>", *tool_call, "<|im_end|>")]]


def test_chat_parts_have_the_ids_of_the_whole_text(published_folder):
    tokenizer = Tokenizer.load(published_folder)
    messages = [CHATS[0][0],
                {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "12°."}, {"role": "assistant", "content": "ok"}]
    ids = []
    for text, is_special, _ in tokenizer.chat_parts(messages, TOOLS):
        ids += tokenizer.encode(text, allow_special=is_special)
    assert ids == tokenizer.encode(tokenizer.render_chat(messages, TOOLS), allow_special=True)


@pytest.mark.parametrize("messages,problem", [
    ([], "at least one message"),
    ([{"role": "robot", "content": ""}], "message 1: unknown role 'robot'"),
    (["x"], "unknown role None"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "message is not te"),
    ([{"role": "user", "content": 7}], "user message is not text"),
    ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "arguments"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments"),
    ([{"role": "assistant", "tool_calls": ["f"]}], "a tool call needs a name")])
def test_chats_that_cannot_be_rendered(small_tokenizer, messages, problem):
    with pytest.raises(InputError, match=problem):
        small_tokenizer.render_chat(messages)


# ---- printing tokens


def test_stream_holds_back_incomplete_characters(small_tokenizer):
    stream = TextStream(small_tokenizer)
    shown = [stream.add(i) for i in small_tokenizer.encode("a☃b")]
    assert len(shown) == 5 and shown[1:3] == ["", ""] and "".join(shown) == "a☃b"
    stream.add(small_tokenizer.encode("☃")[0])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("text,shown,rest", [
    ("x\nclap ENclass y", "x\nclap ENclass y", ""),
    ("z\nclass A END", "z", None),                      # stopped
    ("x EN", "x ", "EN")])                              # the start of a stop string, given back
def test_stream_ends_at_a_stop_string(small_tokenizer, text, shown, rest):
    stream = TextStream(small_tokenizer, ["\nclass", "END"])
    assert "".join(stream.add(i) for i in small_tokenizer.encode(text)) == shown
    assert stream.stopped == (rest is None)
    assert stream.finish() == (rest or "")


def test_token_view(small_tokenizer):
    assert "\r" not in token_view(small_tokenizer, "self\r\nx", color=False)
    view = token_view(small_tokenizer, "self.x\nfor", color=False)
    ids = small_tokenizer.encode("self.x\nfor")
    assert view.replace("|", "").replace("↵", "").split("\n")[0] == "self.x"
    assert [int(i) for line in view.split("\n")[1::2] for i in line.split()] == ids


def test_command_shows_the_tokens_of_a_file(small_tokenizer, tmp_path, typed):
    small_tokenizer.save(tmp_path / "t")
    (tmp_path / "a.py").write_text("total = 0\n")
    printed = typed("tokenizer.py", tmp_path / "a.py", "--tokenizer", tmp_path / "t").stdout
    count = len(small_tokenizer.encode("total = 0\n"))
    assert f"{count} tokens" in printed
    assert "10 bytes" in printed
    done = typed("tokenizer.py", tmp_path / "missing.py", "--tokenizer", tmp_path / "t")
    assert done.returncode == 2
    assert done.stderr.startswith("tokenizer.py: ") and done.stderr.endswith("no such file\n")


# ---- files


def test_save_and_load(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.tokens == small_tokenizer.tokens and loaded.special == small_tokenizer.special
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = data["model"]["merges"]
    data["model"]["merges"] = [merge.split(" ") for merge in merges]    # newer style
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).encode(CODE) == small_tokenizer.encode(CODE)


def test_training_that_cannot_work_is_refused():
    with pytest.raises(InputError, match="100 is too small.* need 278"):
        Tokenizer.train(["text"], 100)
    with pytest.raises(InputError, match="no text"):
        Tokenizer.train([], 400)


def swap_two_merges(data):
    merges = data["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


@pytest.mark.parametrize("damage,message", [
    (lambda data: data.update(added_tokens=data["added_tokens"][:5]),
     "lacks 17 of Qwen2.5's special tokens"),
    (swap_two_merges, "do not fit together, first at id 259"),
    (lambda data: data["added_tokens"].append({"id": 400, "content": None}),
     "not a byte-level BPE|do not fit together"),
    (lambda data: data["model"].update(type="Unigram", vocab=[]),
     "not a byte-level BPE tokenizer")])
def test_a_tokenizer_file_with_other_contents(small_tokenizer, tmp_path, damage, message):
    small_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)


def test_whole_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with whole_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "x" / "file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of server.root, from where `Range: bytes=N-` says. Each number in server.cut
    ends one reply after that many bytes."""

    def do_GET(self):
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        body = path.read_bytes()[start:]
        self.server.ranges.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        end = self.server.cut.pop() if self.server.cut else None
        self.wfile.write(body[:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root = tmp_path / "hub"
    server.root.mkdir()
    server.cut = []
    server.ranges = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_an_interrupted_download_is_resumed_by_the_next_call(hub, tmp_path):
    data = bytes(range(256)) * 1000
    (hub.root / "file").write_bytes(data)
    hub.cut = [150_000]
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch(f"{hub.url}/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert fetch(f"{hub.url}/file", tmp_path / "file").read_bytes() == data
    assert hub.ranges[0] == 0 < hub.ranges[1] <= 150_000
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch(f"{hub.url}/file", tmp_path / "other", sha256="0" * 64)
    with pytest.raises(InputError, match="the server answers 404"):
        fetch(f"{hub.url}/nothing", tmp_path / "nothing")
    assert not (tmp_path / "other").exists() and not (tmp_path / "nothing").exists()


def test_a_hub_name_is_downloaded_once(hub, small_tokenizer):
    folder = hub.root / "Owner" / "Model" / "resolve" / "main"
    folder.mkdir(parents=True)
    small_tokenizer.save(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert Tokenizer.load("Owner/Model").vocab_size == small_tokenizer.vocab_size
    cached = hub_folder("Owner/Model")
    assert (cached / "model.safetensors").read_bytes() == b"weights"
    requests = len(hub.ranges)
    hub_folder("Owner/Model")
    assert len(hub.ranges) == requests
    with pytest.raises(InputError, match="Owner/Missing: no such folder, nor can it be fetched"):
        hub_folder("Owner/Missing")
    with pytest.raises(InputError, match="not_here: no such folder"):
        hub_folder("not_here")
