"""pytest tests/test_fim.py"""

import collections
import hashlib
import re

import numpy as np
import pytest
import regex
from conftest import CODE, SMALL, fill_weights

import fim
from fim import (MIDDLE, PREFIX, SPAN_TYPES, SUFFIX, argument_spans, block_spans, choose_span,
                 fim_document, fim_ids, infill, infill_prompt, load, newest_model, normalize,
                 repeats, repository_ids, shorten, stop_ids)
from model import CausalLM, Config, generate, save_model
from support.editor import relevant_files, split_at_cursor
from support.files import InputError
from tokenizer import PATTERN, Tokenizer


@pytest.fixture
def checkpoint(small_tokenizer, tmp_path):
    """The folder out/pretrain, with a model of fixed weights."""
    folder = tmp_path / "out" / "pretrain"
    save_model(fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": 416}))), folder)
    small_tokenizer.save(folder)
    return folder


WORDS = ["def f(x):", "\n", "    ", "return", " ", "日本", "☃", "\r\n", "e\u0301", "\t", "x = 1",
         "<|fim_middle|>", "<|endoftext|>", "(", ")", "\ufeff", "if x:\n        pass", "\0", "😀"]


def test_the_file_format_keeps_every_character(small_tokenizer):
    rng = np.random.default_rng(0)
    special = small_tokenizer.special
    for _ in range(500):
        text = normalize("".join(rng.choice(WORDS, rng.integers(0, 40))))
        prefix, middle, suffix = fim_document(text, rng)
        assert prefix + middle + suffix == text
        ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, (prefix, suffix, middle)))
        assert small_tokenizer.decode(ids) == f"{PREFIX}{prefix}{SUFFIX}{suffix}{MIDDLE}{middle}"
        # special tokens in the text itself stay text
        assert [i for i in ids if i in special.values()] == [
            special[name] for name in (PREFIX, SUFFIX, MIDDLE)]


def test_spans_of_characters_are_uniform():
    rng = np.random.default_rng(0)
    spans = [choose_span("abcd", "characters", rng) for _ in range(10_000)]
    # 25 ordered pairs of 5 positions: an empty middle for 5 of them, an empty prefix for 9
    assert np.mean([start == end for start, end in spans]) == pytest.approx(5 / 25, abs=0.015)
    assert np.mean([start == 0 for start, _ in spans]) == pytest.approx(9 / 25, abs=0.015)
    assert np.mean([span == (1, 3) for span in spans]) == pytest.approx(2 / 25, abs=0.015)


def test_each_span_is_of_its_type():
    """Lines and blocks are whole, words end where a BPE word ends, arguments are listed ones."""
    rng = np.random.default_rng(0)
    words = regex.findall(PATTERN, CODE)
    blocks = {CODE[start:end].strip() for start, end in block_spans(CODE)}
    for _ in range(200):
        start, end = choose_span(CODE, "lines", rng)
        assert CODE[end] == "\n" and CODE[:start].split("\n")[-1].strip() == ""
        assert set(CODE[start:end].split("\n")[1:]) <= set(CODE.split("\n"))
        start, end = choose_span(CODE, "block", rng)
        assert CODE[end] == "\n" and CODE[start:end].strip() in blocks
        start, end = choose_span(CODE, "words", rng)
        before, middle, after = (regex.findall(PATTERN, part) for part in
                                 (CODE[:start], CODE[start:end], CODE[end:]))
        assert before + middle + after == words and 1 <= len(middle) <= 16
        assert choose_span(CODE, "arguments", rng) in argument_spans(CODE)


def test_shares_of_span_types_and_of_empty_parts(monkeypatch):
    rng = np.random.default_rng(0)
    chosen = collections.Counter()

    def choose(text, span_type, rng):
        chosen[str(span_type)] += 1
        return 1, 2

    monkeypatch.setattr(fim, "choose_span", choose)
    splits = [fim_document("abc", rng) for _ in range(5000)]
    assert {name: chosen[name] / 5000 for name in SPAN_TYPES} == pytest.approx(SPAN_TYPES, abs=0.03)
    for part in range(3):
        assert 0.005 < np.mean([split[part] == "" for split in splits]) < 0.02


@pytest.mark.parametrize("text", ["", "\n\n", "x\ny\nz", "   "])
def test_a_text_without_spans_of_a_type(text):
    """Blocks and arguments fall back to lines, lines and words to characters."""
    rng = np.random.default_rng(0)
    for span_type in SPAN_TYPES:
        for _ in range(20):
            start, end = choose_span(text, span_type, rng)
            assert 0 <= start <= end <= len(text)
            if span_type in ("block", "arguments", "lines") and text.strip():
                assert text[start:end] in ("x", "y", "z", "x\ny", "y\nz", "x\ny\nz")


def texts_of(spans, text):
    return [text[start:end] for start, end in sorted(spans)]


SNIPPETS = {        # language: (text, its blocks, its arguments)
    "python": ("@cache\ndef f(a, b=(1, 2)):\n    \"\"\"Doc.\"\"\"\n\n    for x in g():\n\n"
               "        print(')', x)\n    return [h(a)]\n\n\ny = 1\n",
               ["    \"\"\"Doc.\"\"\"\n\n    for x in g():\n\n        print(')', x)\n"
                "    return [h(a)]", "        print(')', x)"],
               ["a, b=(1, 2)", "')', x", "a"]),
    "java": ("class A\n{\n    int f(List<Integer> x)\n    {\n        return x.get(0);\n    }\n\n"
             "    char c = '(';\n}\n",
             ["    int f(List<Integer> x)\n    {\n        return x.get(0);\n    }\n\n"
              "    char c = '(';", "        return x.get(0);"],
             ["List<Integer> x", "0"]),
    "rust": ("fn f<'a>(x: &'a str) -> &'a str {\n    println!(\"{}\", x);\n    match x {\n"
             "        \"(\" => g(x, ')'),\n    }\n}\n",
             ["    println!(\"{}\", x);\n    match x {\n        \"(\" => g(x, ')'),\n    }",
              "        \"(\" => g(x, ')'),"],
             ["\"{}\", x", "x, ')'"])}


@pytest.mark.parametrize("language", SNIPPETS)
def test_blocks_and_arguments(language):
    text, blocks, arguments = SNIPPETS[language]
    assert texts_of(block_spans(text), text) == blocks
    assert texts_of(argument_spans(text), text) == arguments


@pytest.mark.parametrize("spans, text, expected", [
    # a tab is as wide as eight spaces; a block is all that is deeper than the line above it
    (block_spans, "if a:\n\tb\n        c\n\td", ["\tb\n        c\n\td"]),
    (block_spans, "a\n    b\n  c\n d\ne", ["    b\n  c\n d"]),
    (block_spans, "    a\nb\n", []), (block_spans, "a\n\n\nb", []),
    # a bracket in a comment spoils those around it, and no others
    (argument_spans, "f(a, # 1) of :]\n  b)\ng(c)\nh( )\ni()\n(d)\nif (e): j(k)",
     ["a, # 1", "c", "k"]),
    (argument_spans, "f(g(1]\nh(2)", ["2"]),
    (argument_spans, "don't(f(1), it's)", ["f(1), it's", "1"]),
    (argument_spans, "f(" * 1000 + '"' * 999 + "\\'" * 999, [])])
def test_odd_indentation_and_unbalanced_brackets(spans, text, expected):
    assert texts_of(spans(text), text) == expected


def test_a_split_is_the_same_on_every_machine():
    """Seed and text alone decide: these values must not change."""
    splits = [fim_document(CODE, np.random.default_rng([0, i])) for i in range(200)]
    digest = hashlib.sha256(repr([(len(a), len(b)) for a, b, _ in splits]).encode()).hexdigest()
    assert digest[:16] == "3237b0438427c1c7"


def test_formats_of_the_report_in_the_published_vocabulary(published_folder):
    """Figures 3 and 4, and the example of the published README."""
    tokenizer = Tokenizer.load(published_folder)
    files = [("file_path1", "file_content1"), ("a/b.py", "import os\n")]
    ids = repository_ids(tokenizer, "library-system", files, "main.py") + fim_ids(
        tokenizer, *map(tokenizer.encode, ("def f():\n    ", "\n    return x", "x = 1")))
    text = ("<|repo_name|>library-system\n<|file_sep|>file_path1\nfile_content1\n"
            "<|file_sep|>a/b.py\nimport os\n\n<|file_sep|>main.py\n"
            "<|fim_prefix|>def f():\n    <|fim_suffix|>\n    return x<|fim_middle|>x = 1")
    assert ids == tokenizer.encode(text, allow_special=True) and tokenizer.decode(ids) == text
    assert [i for i in ids if i >= 151643] == [151663, 151664, 151664, 151664,
                                              151659, 151661, 151660]
    # the published stop ids, and all other special tokens
    assert stop_ids(tokenizer) == set(range(151643, 151665))


@pytest.mark.parametrize("prefix, suffix, prefix_left, suffix_left", [
    (100, 100, 30, 10), (5, 100, 5, 35), (100, 3, 37, 3), (5, 5, 5, 5)])
def test_what_is_far_from_the_cursor_is_cut(prefix, suffix, prefix_left, suffix_left):
    prefix, suffix = list(range(prefix)), list(range(suffix))
    assert shorten(prefix, suffix, 40) == (prefix[-prefix_left:], suffix[:suffix_left])


def test_a_prompt_with_other_files(small_tokenizer):
    """Half the room is for other files; the least relevant are left out first."""
    files = [("far.py", CODE), ("near.py", "X = 1")]
    ids = infill_prompt(small_tokenizer, "a = ", "\n", 100, files, "r", "own.py")
    assert small_tokenizer.decode(ids) == (
        "<|repo_name|>r\n<|file_sep|>near.py\nX = 1\n<|file_sep|>own.py\n"
        "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>")
    for room in range(4, 90, 5):
        ids = infill_prompt(small_tokenizer, CODE, CODE, room, files, "r", "own.py")
        assert len(ids) <= room and ids.count(small_tokenizer.special[MIDDLE]) == 1
    assert infill_prompt(small_tokenizer, "a", "b", 8, files, "r", "own.py") == fim_ids(
        small_tokenizer, small_tokenizer.encode("a"), small_tokenizer.encode("b"))


def write_files(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, errors="surrogateescape")
    return folder


def test_relevant_files(tmp_path):
    """The file that shares most names with the text at the cursor comes last."""
    texts = {"bank.py": "class Account:\n    def deposit(self, amount): ...\n",
             "shapes.py": "class Circle:\n    radius = 1\n", "notes.txt": "Account deposit",
             "sub/money.py": "def deposit(amount): ...\n", "own.py": "Account", "bad.py": "\udcff"}
    folder = write_files(tmp_path, texts)
    (folder / "link.py").symlink_to(folder / "notes.txt")
    files = relevant_files(folder, folder / "own.py", "account = Account()", "account.deposit(3)")
    assert files == [(name, texts[name]) for name in ("sub/money.py", "bank.py")]
    assert relevant_files(folder, folder / "own.py", "zebra", "") == []
    with pytest.raises(InputError, match="--repo .*none: no such folder"):
        relevant_files(folder / "none", folder / "own.py", "", "")


@pytest.mark.parametrize("file, expected", [
    ("main.c", {"a.c", "a.h", "B.H"}), ("main.tsx", {"b.ts", "b.vue"}), ("main.py", {"c.pyi"}),
    ("main.java", {"d.kt"}), ("main.unknown", {"g.unknown"}), ("main.zig", set())])
def test_relevant_files_of_related_languages(tmp_path, file, expected):
    """Hidden files, installed packages and names that a terminal would obey are left out."""
    names = ["a.c", "a.h", "B.H", "b.ts", "b.vue", "c.pyi", "d.kt", "f.rs", "g.unknown",
             "node_modules/x.ts", "\x1b[2J/x.ts", "venv/lib/site-packages/x.py", "env/lib/x.py",
             ".hidden/x.py", "env/pyvenv.cfg"]
    folder = write_files(tmp_path, dict.fromkeys(names, "shared_name"))
    files = relevant_files(folder, folder / file, "shared_name", "")
    assert {path for path, _ in files} == expected


@pytest.mark.parametrize("text, cursor, expected", [
    ("ab\ncd\n", (2, 1), ("ab\n", "", "cd\n")),
    ("ab\ncd\n", (1, 3), ("ab", "", "\ncd\n")),
    ("e\u0301 = 1\n", (1, 3), ("e\u0301", "", " = 1\n")),       # as an editor counts
    ("a\nb\nc", (2,), ("a\n", "b", "\nc")),
    ("a\nb\n", (3,), ("a\nb\n", "", "")),
    ("x = <FILL>\n", (), ("x = ", "", "\n")),
    ("ab\ncd\n", (1, 4), "line 1 has columns 1 to 3, not 4"),
    ("a\nb", (3,), "f: has lines 1 to 2, there is no line 3"),
    ("<FILL><FILL>", (), "f: holds 2 <FILL> marks")])
def test_split_at_cursor(text, cursor, expected):
    if isinstance(expected, tuple):
        assert split_at_cursor(text, "f", *cursor) == expected
    else:
        with pytest.raises(InputError, match=expected):
            split_at_cursor(text, "f", *cursor)


def test_infill_fits_its_context_and_streams(checkpoint):
    model, tokenizer = load(checkpoint, "cpu")
    streamed = []
    text = infill(model, tokenizer, CODE, CODE, max_new_tokens=20, on_text=streamed.append)
    assert text and text == "".join(streamed)
    assert text == infill(model, tokenizer, CODE, CODE, max_new_tokens=20)
    with pytest.raises(InputError, match="leaves no room for a prompt in a context of 64"):
        infill(model, tokenizer, CODE, CODE, max_new_tokens=64)


def test_infill_ends_before_any_special_token(checkpoint):
    model, tokenizer = load(checkpoint, "cpu")
    special = set(tokenizer.special.values())
    prompt = fim_ids(tokenizer, tokenizer.encode("a"), tokenizer.encode("b"))
    stopped_early = 0
    for seed in range(6):
        [ids] = generate(model, [prompt], 40, vocab_size=tokenizer.vocab_size, temperature=3.0,
                         seeds=[seed])
        end = next((i for i, token in enumerate(ids) if token in special), 40)
        stopped_early += end < 40
        text = infill(model, tokenizer, "a", "b", 40, guard=False, temperature=3.0, seed=seed)
        assert text == tokenizer.decode(ids[:end])
    assert stopped_early > 1


@pytest.fixture
def infill_text(checkpoint, monkeypatch):
    """infill_text(text, prefix, suffix): infill() with a model that wants to write this text."""
    model, tokenizer = load(checkpoint, "cpu")

    def call(text, prefix, suffix, **options):
        def generate(model, prompts, max_new_tokens, on_token, **other):
            for token in tokenizer.encode(text):
                if on_token(0, token):
                    break

        monkeypatch.setattr(fim, "generate", generate)
        call.pieces = []
        return infill(model, tokenizer, prefix, suffix, 20, on_text=call.pieces.append, **options)

    return call


IN_METHOD = "class Stack:\n    def push(self, item):\n        "


@pytest.mark.parametrize("prefix, suffix, text, expected", [
    # the next line of the suffix, which must be distinctive
    ("def f(x):\n    ", "\n\n    return total + x\n", "total = 1\n    return total + x\nmore",
     "total = 1"),
    ("while a:\n    ", "\n\n    }\n", "if (b) {\n    }\n    c()", "if (b) {\n    }\n    c()"),
    # the end of the block, in Python and with brackets
    (IN_METHOD, "\n\n    def pop(self):\n", "self.items.append(item)\n\n    def peek(self):\n",
     "self.items.append(item)"),
    ("int f() {\n\t", "\n}\n", "int x = 1;\n\treturn x;\n}\n\nint g() {",
     "int x = 1;\n\treturn x;"),
    (IN_METHOD, "\n", "if item:\n            self.pop(item)\n        else:\n            pass",
     "if item:\n            self.pop(item)\n        else:\n            pass"),
    # three equal lines
    ("", "", "x\nx\nx\nx\n", "x\nx\n"),
    # one line where the text continues right below
    ("def f():\n    a = 1\n    ", "\n    return a + b\n", "b = 2\n    c = 3", "b = 2"),
    ("def f():\n", "    return a\n", "    a = 1\n    b = 2\n", "    a = 1\n"),
    ("def f():\n    ", "\n\n    return a\n", "a = 1\n    b = 2\n", "a = 1\n    b = 2\n"),
    ("import os\n\n", "\n\n", "def f():\n    return 1\n", "def f():\n    return 1\n"),
    # inside a line: up to its end, to the bracket after the cursor, or to the text after it
    ("x = ", "  # a comment\n", "1\ny = 2", "1"),
    ("print(", ")\n", "f(a), b)\nprint(c", "f(a), b"),
    ("print(", ").upper()\n", "a, [b for b in (c)]", "a, [b for b in (c)]"),
    ("print(", ")\n", "f(a)", "f(a)"),
    ("if ", " is None:\n", "x is None:\n    y", "x"),
    ("if ", " is None:\n", "x is None:", "x"),
    # the space before the cursor is not part of the prompt, so the model writes it
    (IN_METHOD, "\n", " self.x = item", "self.x = item"),
    (IN_METHOD, "\n", "     item = 1\n        self.x = 2\n        y", "    item = 1"),
    ("a\n\t", "\n", "\tx", "x"), ("return ", "\n", " x", " x")])
def test_a_middle_ends_where_it_goes_on_too_far(infill_text, prefix, suffix, text, expected):
    """The stream passes on nothing that the rules cut off later."""
    assert infill_text(text, prefix, suffix) == expected
    assert infill_text(text, prefix, suffix, guard=False) == text
    assert "".join(infill_text.pieces) == text


def test_the_guard_stops_repetition(infill_text):
    """The same five or more tokens, three times in a row."""
    assert repeats([0, *[1, 2, 3, 4, 5] * 3]) and repeats([*range(9)] * 3)
    for ids in ([1, 2, 3, 4] * 3, [*[1, 2, 3, 4, 5] * 3, 9], [1, 2, 3, 4, 5] * 2, []):
        assert not repeats(ids)
    line = "        self.total = total\n"
    assert infill_text("self.x, " * 40, "", "") != "self.x, " * 40
    assert infill_text(line * 9, "", "", guard=False) == line * 9


def test_command(checkpoint, tmp_path, typed):
    (tmp_path / "a.py").write_text(CODE)
    command = ["fim.py", tmp_path / "a.py", "--out", tmp_path / "out", "--max-new-tokens", "8",
               "--device", "cpu"]
    out = typed(*command, "--line", "5").stdout
    assert "for number in numbers:\n⟦" in out and "cpu in float32 (" in out
    assert "ground truth: total += number" in out
    out = typed(*command, "--line", "5", "--column", "9", "--repo", tmp_path).stdout
    assert "for number in numbers:\n        ⟦" in out and "⟧total += num" in out
    assert "takes those that fit: none" in out
    result = typed(*command)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "0 <FILL> marks" in result.stderr


def test_show(tmp_path, typed):
    (tmp_path / "a.py").write_bytes(CODE.replace("\n", "\r\n").encode())
    parts = typed("fim.py", "show", tmp_path / "a.py").stdout.split("--- ")[1:]
    assert [part.split(":")[0] for part in parts[:5]] == list(SPAN_TYPES)
    excerpts = {re.sub("[⟦⟧]", "", part.split("\n", 1)[1]) for part in parts[:5]}
    assert len(excerpts) == 1 and excerpts.pop().strip() in CODE
    file_format = parts[5].removeprefix("file format\n")
    assert re.findall(r"<\|\w+\|>", file_format) == [PREFIX, SUFFIX, MIDDLE, "<|endoftext|>"]
    assert parts[6] == ("repository format\n<|repo_name|>my-project\n<|file_sep|>other.py\nX = 1\n"
                        f"\n<|file_sep|>a.py\n{file_format}")
    result = typed("fim.py", "show")
    assert result.returncode == 2 and "expected: python fim.py show FILE" in result.stderr


def test_serving_at_a_port_that_does_not_exist(checkpoint, typed):
    result = typed("fim.py", "serve", "--model", checkpoint, "--device", "cpu", "--dtype",
                   "float32", "--port", "99999")
    assert result.returncode == 2
    assert result.stderr == ("fim.py: --host 127.0.0.1 --port 99999: bind(): port must be "
                             "0-65535.\n")


def test_newest_model(checkpoint, tmp_path):
    assert newest_model(tmp_path / "out") == checkpoint
    with pytest.raises(InputError, match="no finished model of dpo or sft or repository or pret"):
        newest_model(tmp_path)
    save_model(fill_weights(CausalLM(Config(**SMALL))), checkpoint)     # for another tokenizer
    with pytest.raises(InputError, match="has 380 ids, the model only 96 "):
        load(checkpoint, "cpu")
