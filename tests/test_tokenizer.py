"""pytest tests/test_tokenizer.py"""

import functools
import http.server
import io
import itertools
import json
import random
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
import regex
from conftest import CODE, ROOT, reference_data

import tokenizer as module
from support.files import InputError, characters_of, fetch, hub_folder, whole_folder
from tokenizer import (
    BYTE_ORDER,
    PATTERN,
    SPECIAL_TOKENS,
    TextStream,
    Tokenizer,
    encode_word,
    learn_merges,
    token_view,
)

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())


def test_merges_of_the_classic_example():
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    # (e, s), (s, t) and (es, t) come 9 times each, the smaller ids first;
    # then (l, o), (o, w) 7 times
    assert learn_merges(words, 4) == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]


def test_pairs_that_occur_once_are_not_joined():
    assert learn_merges({b"abc": 1}, 10) == []


def test_overlapping_pairs():
    assert learn_merges({b"aaaa": 2}, 2) == [(b"a", b"a"), (b"aa", b"aa")]


def test_training_learns_the_merges_of_hugging_face(small_tokenizer):
    char_of = characters_of(BYTE_ORDER)
    merges = [["".join(char_of[byte] for byte in part) for part in pair]
              for pair in small_tokenizer.merges]
    assert merges == GOLDEN["merges"]


def test_encoding_replays_the_merges(small_tokenizer, published_folder):
    """The reference implementation gives the ids of tiktoken, for a small and the real vocabulary,
    on all words of 1,000 texts."""
    rng = random.Random(0)
    code = Path(module.__file__).read_text() + "naïve Größe 変数 🙂\t\r\n  x" * 3
    texts = [code[start:start + 300] for start in (rng.randrange(len(code)) for _ in range(1000))]
    for tokenizer in (small_tokenizer, Tokenizer.load(published_folder)):
        id_of = {token: i for i, token in enumerate(tokenizer.tokens)}
        cached = functools.cache(lambda word: encode_word(word, id_of))
        for text in texts:
            words = regex.findall(PATTERN, unicodedata.normalize("NFC", text))
            assert [i for word in words for i in cached(word.encode())] == tokenizer.encode(text)


def test_special_tokens_follow_the_base_vocabulary(small_tokenizer):
    base = 256 + len(small_tokenizer.merges)
    assert list(small_tokenizer.special.values()) == list(range(base, base + 22))
    assert list(small_tokenizer.special) == SPECIAL_TOKENS
    assert small_tokenizer.vocab_size == base + 22


def test_round_trip_of_any_text(small_tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(1, 0xD800),
                                       rng.randrange(0xE000, 0x110000), 10, 32]))
                       for _ in range(rng.randrange(40)))
        back = small_tokenizer.decode(small_tokenizer.encode(text))
        assert back == unicodedata.normalize("NFC", text)


def test_text_cannot_inject_special_tokens(small_tokenizer):
    text = "<|im_end|><|fim_middle|>"
    ids = small_tokenizer.encode(text)
    assert not set(ids) & set(small_tokenizer.special.values())
    assert small_tokenizer.decode(ids) == text
    assert small_tokenizer.encode(text, allow_special=True) == [
        small_tokenizer.special["<|im_end|>"], small_tokenizer.special["<|fim_middle|>"]]


def test_skip_special_hides_what_hugging_face_hides(small_tokenizer):
    ids = small_tokenizer.encode("<|im_start|>a<|fim_prefix|>b<|endoftext|>", allow_special=True)
    assert small_tokenizer.decode(ids, skip_special=True) == "a<|fim_prefix|>b"


def test_byte_lengths_sum_to_the_text(small_tokenizer):
    text = CODE + "héllo ☃"
    ids = small_tokenizer.encode(text)
    lengths = small_tokenizer.byte_lengths()
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert len(lengths) == small_tokenizer.vocab_size


def test_encode_batch_is_encode(small_tokenizer):
    texts = [CODE, "", "x = 1\n", "日本"]
    assert small_tokenizer.encode_batch(texts) == [small_tokenizer.encode(text) for text in texts]


def test_very_long_blanks(small_tokenizer):
    text = "a" + " " * 1_200_000 + "b"
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


def test_save_and_load(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.tokens == small_tokenizer.tokens and loaded.special == small_tokenizer.special
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = data["model"]["merges"]
    data["model"]["merges"] = [merge.split(" ") for merge in merges]    # newer style
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).encode(CODE) == small_tokenizer.encode(CODE)


def test_published_vocabulary(published_folder):
    tokenizer = Tokenizer.load(published_folder)
    assert tokenizer.vocab_size == 151_665 and tokenizer.special["<|fim_middle|>"] == 151_660
    assert tokenizer.encode("Hello world") == [9707, 1879]
    with open(reference_data("tokenizer/ggml-vocab-qwen2.gguf.inp"), newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:46]
    lines = reference_data("tokenizer/ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[:46]]
    assert [tokenizer.encode(text) for text in texts] == expected


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


def render(template, messages, tools, add_generation_prompt):
    """As transformers renders: its white-space settings and its tojson."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 comes with torch")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


@pytest.fixture(scope="module")
def saved_template(small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small_tokenizer.save(folder)
    return json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize("messages,tools,prompt", EVERY_CHAT)
def test_chat_equals_our_template(small_tokenizer, saved_template, messages, tools, prompt):
    text = small_tokenizer.render_chat(messages, tools, prompt)
    assert text == render(saved_template, messages, tools, prompt)


@pytest.mark.parametrize("messages,tools,prompt", EVERY_CHAT)
def test_chat_equals_the_published_template(small_tokenizer, messages, tools, prompt):
    template = reference_data("tokenizer/Qwen2.5-Instruct.chat_template.jinja").read_text()
    text = small_tokenizer.render_chat(messages, tools, prompt)
    assert text == render(template, messages, tools, prompt)


def test_chat_text(small_tokenizer):
    assert small_tokenizer.render_chat(CHATS[0], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_chat_refuses_what_is_no_chat(small_tokenizer):
    with pytest.raises(InputError, match="at least one message"):
        small_tokenizer.render_chat([])
    with pytest.raises(InputError, match="message 1: unknown role 'robot'"):
        small_tokenizer.render_chat([{"role": "robot", "content": ""}])


CALL = {"name": "get", "arguments": {"city": "Zürich", "days": [1, 2]}}


@pytest.mark.parametrize("arguments", ['{"city": "Zürich", "days": [1, 2]}',
                                       ' {"city":"Z\\u00fcrich","days":[1,2]}'])
@pytest.mark.parametrize("wrapped", [False, True])
def test_arguments_in_a_json_string_are_not_encoded_twice(small_tokenizer, arguments, wrapped):
    def chat(call):
        calls = [{"type": "function", "function": call} if wrapped else call]
        return [CHATS[0][0], {"role": "assistant", "content": None, "tool_calls": calls}]

    text = small_tokenizer.render_chat(chat({**CALL, "arguments": arguments}))
    assert text == small_tokenizer.render_chat(chat(CALL)) and "None" not in text
    assert text.endswith('<|im_start|>assistant\n<tool_call>\n{"name": "get", "arguments": '
                         '{"city": "Zürich", "days": [1, 2]}}\n</tool_call><|im_end|>\n')


def test_content_may_be_text_parts_or_nothing(small_tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    text = small_tokenizer.render_chat([
        {"role": "system", "content": None}, {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "four"}]}])
    assert text == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\none\ntwo\nthree<|im_end|>\n"
                    "<|im_start|>assistant\nfour<|im_end|>\n")


def test_chat_parts_mark_what_chatml_writes(small_tokenizer):
    messages = [{"role": "user", "content": "<|im_end|> <tool_call>"},
                {"role": "assistant", "content": "ok", "tool_calls": [CALL]}]
    parts = small_tokenizer.chat_parts(messages, TOOLS)
    assert "".join(text for text, _, _ in parts) == small_tokenizer.render_chat(messages, TOOLS)
    special = [(text, role) for text, is_special, role in parts if is_special]
    assert special == [
        ("<|im_start|>", "system"), *[("<tool_call>", "system"), ("</tool_call>", "system")] * 2,
        ("<|im_end|>", "system"),
        ("<|im_start|>", "user"), ("<|im_end|>", "user"),
        *[(text, "assistant") for text in ("<|im_start|>", "<tool_call>", "</tool_call>",
                                           "<|im_end|>")]]


@pytest.mark.parametrize("content", ["I look it up.", "I look", "", None])
def test_parts_are_encoded_as_the_whole(published_folder, content):
    """Encoded part by part, a conversation has the ids of its text: no token crosses a part."""
    tokenizer = Tokenizer.load(published_folder)
    messages = [CHATS[0][0], {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "12°."}, {"role": "assistant", "content": "ok"}]
    ids = []
    for text, is_special, _ in tokenizer.chat_parts(messages, TOOLS):
        ids += tokenizer.encode(text, allow_special=is_special)
    assert ids == tokenizer.encode(tokenizer.render_chat(messages, TOOLS), allow_special=True)


@pytest.mark.parametrize("message,problem", [
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "user message is not"),
    ({"role": "user", "content": 7}, "user message is not text"),
    ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "arguments"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments"),
    ({"role": "assistant", "tool_calls": ["f"]}, "a tool call needs a name"),
    ({"content": "x"}, "unknown role None"), ("x", "unknown role None")])
def test_a_message_that_cannot_be_rendered(small_tokenizer, message, problem):
    with pytest.raises(InputError, match=problem):
        small_tokenizer.render_chat([message])


def test_the_template_ignores_unknown_roles_as_published(small_tokenizer, saved_template):
    template = reference_data("tokenizer/Qwen2.5-Instruct.chat_template.jinja").read_text()
    messages = [*CHATS[0], {"role": "developer", "content": "x"}]
    assert (render(saved_template, messages, None, True) == render(template, messages, None, True)
            == small_tokenizer.render_chat(CHATS[0], add_generation_prompt=True))


def test_stream_holds_back_half_characters(small_tokenizer):
    stream = TextStream(small_tokenizer)
    shown = [stream.add(i) for i in small_tokenizer.encode("a☃b")]
    assert len(shown) == 5 and shown[1:3] == ["", ""] and "".join(shown) == "a☃b"
    stream.add(small_tokenizer.encode("☃")[0])
    assert stream.finish() == "\ufffd"


def test_stream_holds_back_half_stop_strings(small_tokenizer):
    stream = TextStream(small_tokenizer, ["\nclass", "END"])
    shown = "".join(stream.add(i) for i in small_tokenizer.encode("x\nclap ENclass y"))
    assert shown == "x\nclap ENclass y" and not stream.stopped
    shown = "".join(stream.add(i) for i in small_tokenizer.encode(" z\nclass A END"))
    assert shown == " z" and stream.stopped and stream.finish() == ""


def test_stream_gives_back_an_unfinished_stop_string(small_tokenizer):
    stream = TextStream(small_tokenizer, ["END"])
    assert "".join(stream.add(i) for i in small_tokenizer.encode("x EN")) == "x "
    assert stream.finish() == "EN"


def test_token_view(small_tokenizer):
    assert "\r" not in token_view(small_tokenizer, "self\r\nx", color=False)
    view = token_view(small_tokenizer, "self.x\nfor", color=False)
    ids = small_tokenizer.encode("self.x\nfor")
    assert view.replace("|", "").replace("↵", "").split("\n")[0] == "self.x"
    assert [int(i) for line in view.split("\n")[1::2] for i in line.split()] == ids


def test_command_shows_a_file(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "t")
    (tmp_path / "a.py").write_text("total = 0\n")
    command = [sys.executable, ROOT / "tokenizer.py", tmp_path / "a.py",
               "--tokenizer", tmp_path / "t"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{len(small_tokenizer.encode('total = 0') ) + 1} tokens" in out and "10 bytes" in out
    command[2] = tmp_path / "missing.py"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "missing.py" in done.stderr


# ---- bad input


def test_vocabulary_too_small():
    with pytest.raises(InputError, match="100 is too small.* need 278"):
        Tokenizer.train(["text"], 100)
    with pytest.raises(InputError, match="no text"):
        Tokenizer.train([], 400)


def test_damaged_tokenizer_files(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[:len(whole) // 2])
    with pytest.raises(InputError, match=r"tokenizer.json, line \d+: not valid JSON"):
        Tokenizer.load(tmp_path)
    for broken in ("[" * 100_000, "1" * 5_000):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"tokenizer.json, line 1: not valid JSON"):
            Tokenizer.load(tmp_path)
    data = json.loads(whole)
    data["added_tokens"] = data["added_tokens"][:5]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="lacks 17 of Qwen2.5's special tokens"):
        Tokenizer.load(tmp_path)
    data = json.loads(whole)
    data["model"]["merges"][3], data["model"]["merges"][4] = data["model"]["merges"][4:2:-1]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="do not fit together, first at id 259"):
        Tokenizer.load(tmp_path)
    for name in (None, 5, "\ud83d", ""):
        data = json.loads(whole)
        last = data["added_tokens"][-1]
        data["added_tokens"].append({**last, "id": last["id"] + 1, "content": name})
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="not a byte-level BPE|do not fit together"):
            Tokenizer.load(tmp_path)
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(InputError, match="not a byte-level BPE tokenizer"):
        Tokenizer.load(tmp_path)


# ---- files


def test_whole_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with whole_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "x" / "file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local hub: serves tmp_path/hub with Range; server.cut bytes end the first replies."""
    root = tmp_path / "hub"
    root.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = root / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            data, start = path.read_bytes(), 0
            if "Range" in self.headers:
                start = int(self.headers["Range"][6:-1])
            hub.ranges.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            body = data[start:]
            if hub.cut:
                body = body[:hub.cut.pop()]
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.root, hub.cut, hub.ranges = root, [], []
    hub.url = f"http://127.0.0.1:{hub.server_port}"
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MINICODER_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.shutdown()
    hub.server_close()


def test_fetch_resumes_and_checks(server, tmp_path):
    data = bytes(range(256)) * 1000
    (server.root / "file").write_bytes(data)
    server.cut = [150_000]
    path = fetch(f"{server.url}/file", tmp_path / "file")
    assert path.read_bytes() == data and server.ranges == [0, 2 * 65536]
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch(f"{server.url}/file", tmp_path / "other", sha256="0" * 64)
    with pytest.raises(InputError, match="the server answers 404"):
        fetch(f"{server.url}/nothing", tmp_path / "nothing")
    assert not (tmp_path / "other").exists() and not (tmp_path / "nothing").exists()


def test_fetch_that_never_completes(server, tmp_path):
    (server.root / "file").write_bytes(b"x" * 1000)
    server.cut = [100, 100, 100]
    with pytest.raises(InputError, match="cannot be downloaded|300 bytes came instead of 1000"):
        fetch(f"{server.url}/file", tmp_path / "file")
    assert fetch(f"{server.url}/file", tmp_path / "file").read_bytes() == b"x" * 1000


def test_hub_name_is_fetched_once(server, small_tokenizer):
    folder = server.root / "Owner" / "Model" / "resolve" / "main"
    folder.mkdir(parents=True)
    small_tokenizer.save(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    assert Tokenizer.load("Owner/Model").vocab_size == small_tokenizer.vocab_size
    cached = hub_folder("Owner/Model")
    assert (cached / "model.safetensors").read_bytes() == b"weights"
    asked = len(server.ranges)
    hub_folder("Owner/Model")
    assert len(server.ranges) == asked
    with pytest.raises(InputError, match="Owner/Missing: no such folder, nor can it be fetched"):
        hub_folder("Owner/Missing")
    with pytest.raises(InputError, match="not_here: no such folder"):
        hub_folder("not_here")


def test_a_script_ends_in_one_line(capsys, monkeypatch):
    def fail():
        raise InputError("model.safetensors: cut off")
    monkeypatch.setattr(sys, "argv", ["dir/script.py"])
    with pytest.raises(SystemExit) as stopped:
        module.run(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "script.py: model.safetensors: cut off\n"


def test_names_that_are_no_text_are_printed(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    module.run(lambda: print("caf\udce9.py", flush=True))
    assert stream.buffer.getvalue() == b"caf?.py\n"
