"""pytest tests/test_fim.py"""

import collections
import hashlib
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import regex
from conftest import CODE, ROOT, SMALL, fill_weights, reference_data

import fim
from fim import (
    MIDDLE,
    PREFIX,
    SPAN_TYPES,
    SUFFIX,
    argument_spans,
    block_spans,
    choose_span,
    fim_document,
    fim_ids,
    infill,
    infill_prompt,
    load,
    newest_model,
    normalize,
    repeats,
    repository_ids,
    shorten,
    stop_ids,
    suffix_start,
)
from model import CausalLM, Config, generate, save_model
from support.editor import relevant_files, split_at_cursor
from support.files import InputError
from tokenizer import PATTERN, Tokenizer


@pytest.fixture
def checkpoint(small_tokenizer, tmp_path):
    """out/pretrain with a model of fixed weights, and its out."""
    folder = tmp_path / "out" / "pretrain"
    config = Config(**{**SMALL, "vocab_size": 416})
    save_model(fill_weights(CausalLM(config)), folder)
    small_tokenizer.save(folder)
    return folder


WORDS = ["def f(x):", "\n", "    ", "return", " ", "日本", "☃", "\r\n", "e\u0301", "\t", "x = 1",
         "<|fim_middle|>", "<|endoftext|>", "(", ")", "\ufeff", "if x:\n        pass", "\0", "😀"]


def some_text(rng):
    return "".join(rng.choice(WORDS, rng.integers(0, 40)))


def test_parts_join_to_the_text():
    rng = np.random.default_rng(0)
    for i in range(3000):
        text = [CODE, "", "x", "\n\n", some_text(rng)][i % 5]
        assert "".join(fim_document(text, rng)) == text


@pytest.mark.slow
def test_a_hundred_thousand_documents(small_tokenizer):
    """All documents come back from ids of three parts, whatever is in them."""
    rng, special = np.random.default_rng(1), small_tokenizer.special
    for _ in range(100_000):
        text = normalize(some_text(rng))
        parts = fim_document(text, rng)
        ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, (parts[0], parts[2], parts[1])))
        at = [ids.index(special[name]) for name in (PREFIX, SUFFIX, MIDDLE)]
        prefix, suffix, middle = (small_tokenizer.decode(ids[a + 1:b])
                                  for a, b in zip(at, [*at[1:], None]))
        assert prefix + middle + suffix == text
        assert sum(i in special.values() for i in ids) == 3


def test_spans_of_characters_are_uniform():
    rng = np.random.default_rng(0)
    spans = [choose_span("abcd", "characters", rng) for _ in range(20_000)]
    # 25 ordered pairs of 5 positions: an empty middle for 5 of them, an empty prefix for 9
    assert np.mean([start == end for start, end in spans]) == pytest.approx(5 / 25, abs=0.01)
    assert np.mean([start == 0 for start, _ in spans]) == pytest.approx(9 / 25, abs=0.01)
    assert np.mean([span == (1, 3) for span in spans]) == pytest.approx(2 / 25, abs=0.01)


def test_each_span_is_of_its_type():
    """Lines are whole, words end where BPE may; each type is as frequent as declared."""
    rng = np.random.default_rng(0)
    lines, single = CODE.split("\n"), 0
    indented = {"lines": 0, "block": 0}
    for _ in range(500):
        for span_type in ("lines", "block"):
            start, end = choose_span(CODE, span_type, rng)
            middle = CODE[start:end].split("\n")
            assert CODE[end] == "\n" and CODE[:start].split("\n")[-1].strip() == ""
            assert all(line in lines for line in middle[1:]) and 1 <= len(middle) <= 25
            indented[span_type] += CODE[start] == " "
            single += span_type == "lines" and len(middle) == 1
        assert CODE[start:end].strip() in {CODE[a:b].strip() for a, b in block_spans(CODE)}
        start, end = choose_span(CODE, "words", rng)
        words = regex.findall(PATTERN, CODE[start:end])
        assert regex.findall(PATTERN, CODE[:start]) + words + regex.findall(
            PATTERN, CODE[end:]) == regex.findall(PATTERN, CODE) and len(words) <= 16
        assert choose_span(CODE, "arguments", rng) in argument_spans(CODE)
    assert 0.5 < single / 500 < 0.65                # of the other half, some reach the last line
    assert indented["block"] / 500 == pytest.approx(0.5, abs=0.07)
    splits = [fim_document(CODE, rng) for _ in range(5000)]
    for part in range(3):
        empty = np.mean([not parts[part] for parts in splits])
        assert 0.004 < empty < 0.06, part


def test_span_types_are_as_frequent_as_declared(monkeypatch):
    rng = np.random.default_rng(0)
    chosen = collections.Counter()
    monkeypatch.setattr(fim, "choose_span", lambda text, span_type, rng: (
        chosen.update([str(span_type)]), (0, 0))[1])
    for _ in range(10_000):
        fim_document("a", rng)
    assert {name: chosen[name] / 10_000 for name in SPAN_TYPES} == pytest.approx(
        SPAN_TYPES, abs=0.02)


@pytest.mark.parametrize("text", ["", "\n\n", "x", "x\ny\nz", "   "])
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
    "javascript": ("function f(a) {\n  items.map((x) => {\n    return g(`${x}`)\n  });\n}\n",
                   ["  items.map((x) => {\n    return g(`${x}`)\n  });", "    return g(`${x}`)"],
                   ["a", "(x) => {\n    return g(`${x}`)\n  }", "`${x}`"]),
    "java": ("class A\n{\n    int f(List<Integer> x)\n    {\n        return x.get(0);\n    }\n\n"
             "    char c = '(';\n}\n",
             ["    int f(List<Integer> x)\n    {\n        return x.get(0);\n    }\n\n"
              "    char c = '(';", "        return x.get(0);"],
             ["List<Integer> x", "0"]),
    "go": ("func f(a int) error {\n\tif a > 0 {\n\t\treturn errors.New(\"a)\")\n\t}\n\n"
           "\treturn nil\n}\n",
           ["\tif a > 0 {\n\t\treturn errors.New(\"a)\")\n\t}\n\n\treturn nil",
            "\t\treturn errors.New(\"a)\")"],
           ["a int", '"a)"']),
    "rust": ("fn f<'a>(x: &'a str) -> &'a str {\n    println!(\"{}\", x);\n    match x {\n"
             "        \"(\" => g(x, ')'),\n    }\n}\n",
             ["    println!(\"{}\", x);\n    match x {\n        \"(\" => g(x, ')'),\n    }",
              "        \"(\" => g(x, ')'),"],
             ["\"{}\", x", "x, ')'"]),
    "c++": ("int main(int argc, char** argv) {\n    std::vector<int> v;\n    call(\n"
            "        v[f(1)],\n        2);\n    return v.size();\n}\n",
            ["    std::vector<int> v;\n    call(\n        v[f(1)],\n        2);\n"
             "    return v.size();", "        v[f(1)],\n        2);"],
            ["int argc, char** argv", "\n        v[f(1)],\n        2", "1"])}


@pytest.mark.parametrize("language", SNIPPETS)
def test_blocks_and_arguments(language):
    text, blocks, arguments = SNIPPETS[language]
    assert texts_of(block_spans(text), text) == blocks
    assert texts_of(argument_spans(text), text) == arguments


def test_blocks_that_are_cut_off_or_mix_tabs_and_spaces():
    text = "if a:\n\tb\n        c\n\td"                      # a tab is as wide as eight spaces
    assert texts_of(block_spans(text), text) == ["\tb\n        c\n\td"]
    text = "a\n    b\n  c\n d\ne"                            # deeper than the line above them all
    assert texts_of(block_spans(text), text) == ["    b\n  c\n d"]
    assert block_spans("    a\nb\n") == block_spans("") == block_spans("a\n\n\nb") == []


def test_arguments_that_do_not_match():
    """A bracket in a comment spoils those around it, and no others."""
    text = "f(a, # 1) of :]\n  b)\ng(c)\nh( )\ni()\n(d)\nif (e): j(k)"
    assert texts_of(argument_spans(text), text) == ["a, # 1", "c", "k"]
    text = "f(g(1]\nh(2)"
    assert texts_of(argument_spans(text), text) == ["2"]
    text = "don't(f(1), it's)"
    assert texts_of(argument_spans(text), text) == ["f(1), it's", "1"]
    assert argument_spans("f(" * 1000 + '"' * 999 + "\\'" * 999) == []


def indentation(line):
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


@pytest.mark.parametrize("repository, ending", [
    ("express", ".js"), ("flask", ".py"), ("gson", ".java"), ("got", ".ts"), ("kilo", ".c"),
    ("thealgorithms-go", ".go"), ("thealgorithms-rust", ".rs"),
    ("thealgorithms-cpp", ".cpp"), ("try-convert", ".cs")])
def test_spans_of_real_files(repository, ending):
    """Every block is whole lines deeper than the line above them, all arguments are balanced."""
    path = reference_data(f"repos/{repository}.tar.gz")
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(ending)]
        texts = [archive.extractfile(m).read().decode(errors="ignore") for m in members[:15]]
    count = collections.Counter()
    for text in map(normalize, texts):
        text = text[:20_000]
        for start, end in block_spans(text):
            above = next(line for line in reversed(text[:start].split("\n")) if line.strip())
            lines = [line for line in text[start:end].split("\n") if line.strip()]
            assert text[start - 1] == "\n" and text[end:end + 1] in ("\n", "")
            assert min(map(indentation, lines)) > indentation(above)
            following = next((line for line in text[end:].split("\n") if line.strip()), "")
            assert indentation(following) <= indentation(above)
            count["block"] += 1
        for start, end in argument_spans(text):
            without_strings = fim.BRACKET.sub(
                lambda match: match[0] if match[0][-1] in "()[]{}" else "", text[start:end])
            brackets = re.sub(r"[^()\[\]{}]", "", without_strings)
            while brackets != (brackets := re.sub(r"\(\)|\[\]|\{\}", "", brackets)):
                pass
            assert brackets == "" and text[start:end].strip()
            assert re.search(r"\w!?\($", text[:start]) and text[end] == ")"
            count["arguments"] += 1
    assert count["block"] > 20 and count["arguments"] > 20, count


def test_a_sample_is_the_same_everywhere():
    """Seed and text alone decide: these values must not change from machine to machine."""
    splits = [fim_document(CODE, np.random.default_rng([0, i])) for i in range(200)]
    digest = hashlib.sha256(repr([(len(a), len(b)) for a, b, _ in splits]).encode()).hexdigest()
    assert digest[:16] == "3237b0438427c1c7"


def test_format_of_the_report(small_tokenizer):
    parts = ("def f(x):\n    ret", " x\n", "urn")          # prefix, suffix, middle
    ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, parts))
    text = "<|fim_prefix|>def f(x):\n    ret<|fim_suffix|> x\n<|fim_middle|>urn"
    assert small_tokenizer.decode(ids) == text
    assert ids == small_tokenizer.encode(text, allow_special=True)


def test_repository_format_of_the_report(published_folder):
    """Figure 4, and the example of the published README, by the published vocabulary."""
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


def test_sentinels_in_source_text_stay_text(small_tokenizer):
    parts = ("a<|fim_middle|>", "b<|endoftext|>", "c")
    ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, parts))
    assert ids.count(small_tokenizer.special[MIDDLE]) == 1
    assert small_tokenizer.special["<|endoftext|>"] not in ids


def test_every_special_token_ends_a_completion(published_folder):
    """Those of the published stop set, and the others."""
    stops = stop_ids(Tokenizer.load(published_folder))
    assert {151643, 151645, 151659, 151661, 151662, 151663, 151664} < stops
    assert stops == set(range(151643, 151665))


def test_normalize():
    assert normalize("\ufeffe\u0301\r\na\rb\n") == "é\na\nb\n"


def test_fit_cuts_far_from_the_cursor():
    prefix, suffix = list(range(100)), list(range(100, 200))
    assert shorten(prefix, suffix, 40) == (prefix[-30:], suffix[:10])
    assert shorten(prefix[:5], suffix, 40) == (prefix[:5], suffix[:35])
    assert shorten(prefix, suffix[:3], 40) == (prefix[-37:], suffix[:3])
    assert shorten(prefix[:5], suffix[:5], 40) == (prefix[:5], suffix[:5])


def test_infill_keeps_to_its_context_and_streams(checkpoint):
    model, tokenizer = load(checkpoint, "cpu")
    shown = []
    text = infill(model, tokenizer, CODE, CODE, max_new_tokens=20, on_text=shown.append)
    assert text and text == "".join(shown)
    assert len(tokenizer.encode(text)) <= 64
    assert text == infill(model, tokenizer, CODE, CODE, max_new_tokens=20)
    with pytest.raises(InputError, match="leaves no room for a prompt in a context of 64"):
        infill(model, tokenizer, CODE, CODE, max_new_tokens=64)


def test_infill_ends_at_a_special_token(checkpoint):
    """At any of them, so that none is ever shown as if it were text."""
    model, tokenizer = load(checkpoint, "cpu")
    stops = set(tokenizer.special.values())
    prompt = fim_ids(tokenizer, tokenizer.encode("a"), tokenizer.encode("b"))
    cut_short = 0
    for seed in range(15):                                  # chance: most runs meet a stop token
        chance = dict(temperature=3.0, seed=seed, vocab_size=tokenizer.vocab_size)
        [free] = generate(model, [prompt], 40, **chance)
        end = next((i for i, token in enumerate(free) if token in stops), 40)
        cut_short += end < 40
        shown = []
        text = infill(model, tokenizer, "a", "b", 40, temperature=3.0, seed=seed,
                      on_text=shown.append)
        assert "".join(shown) == text == tokenizer.decode(free[:end])
        assert not any(name in text for name in tokenizer.special)
    assert cut_short > 5


def test_the_guard_ends_what_repeats_the_suffix(checkpoint, monkeypatch):
    """What stands after the gap is not written again; two lines of it are enough to know it."""
    assert suffix_start(" + b\n    return c\n\ndef g():\n") == " + b\n    return c\n"
    assert suffix_start("\n    return total\n\n\ndef other(x):\n    pass\n") == (
        "\n    return total\n\n\ndef other(x):\n")
    for little in ("", "\n}\n", "\n" * 30_000, "\n}\n}\nreturn x\n", "\nonly this one line here\n"):
        assert suffix_start(little) == ""
    model, tokenizer = load(checkpoint, "cpu")
    suffix = "\n    return total + number\n\n\ndef other(x):\n    pass\n"
    said = tokenizer.encode("total = 1" + suffix + "more")

    def parrot(model, prompts, max_new_tokens, on_token, stop, **other):
        for n, token in enumerate(said):
            on_token(0, token)
            if stop(said[:n + 1]):
                break

    monkeypatch.setattr(fim, "generate", parrot)
    assert infill(model, tokenizer, "a = 2\n", suffix, 20) == "total = 1"
    assert infill(model, tokenizer, "", "", 20) == "total = 1" + suffix + "more"
    assert infill(model, tokenizer, "a = 2\n", suffix, 20, guard=False) == (
        "total = 1" + suffix + "more")


def test_the_guard_ends_what_repeats_itself(checkpoint, monkeypatch):
    """The same piece, of five tokens or more, three times over."""
    assert repeats([0, *[1, 2, 3, 4, 5] * 3]) and repeats([*range(9)] * 3)
    for fine in ([1, 2, 3, 4] * 3, [*[1, 2, 3, 4, 5] * 3, 9], [1, 2, 3, 4, 5] * 2, []):
        assert not repeats(fine)
    model, tokenizer = load(checkpoint, "cpu")
    line = "        self.total = total\n"

    def parrot(model, prompts, max_new_tokens, on_token, stop, **other):
        said = []
        for token in tokenizer.encode(line * 9):
            said.append(token)
            on_token(0, token)
            if stop(said):
                break

    monkeypatch.setattr(fim, "generate", parrot)
    assert infill(model, tokenizer, "", "", 20) == line * 3
    assert infill(model, tokenizer, "", "", 20, guard=False) == line * 9


def test_a_prompt_with_other_files(small_tokenizer):
    """Half the room is for other files, the worst of them left out first; then the rest."""
    files = [("far.py", CODE), ("near.py", "X = 1")]
    ids = infill_prompt(small_tokenizer, "a = ", "\n", 100, files, "r", "own.py")
    assert small_tokenizer.decode(ids) == (
        "<|repo_name|>r\n<|file_sep|>near.py\nX = 1\n<|file_sep|>own.py\n"
        "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>")
    for room in range(4, 90):
        ids = infill_prompt(small_tokenizer, CODE, CODE, room, files, "r", "own.py")
        assert len(ids) <= room and ids.count(small_tokenizer.special[MIDDLE]) == 1
    assert infill_prompt(small_tokenizer, "a", "b", 8, files, "r", "own.py") == fim_ids(
        small_tokenizer, small_tokenizer.encode("a"), small_tokenizer.encode("b"))


def test_relevant_files(tmp_path):
    """The file that the text around the cursor speaks of comes last; nothing unsafe is read."""
    files = {"bank.py": "class Account:\n    def deposit(self, amount): ...\n",
             "shapes.py": "class Circle:\n    radius = 1\n", "notes.txt": "Account deposit",
             "sub/money.py": "def deposit(amount): ...\n", "own.py": "Account", "bad.py": "\udcff"}
    (tmp_path / "sub").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "link.py").symlink_to(tmp_path / "notes.txt")
    found = relevant_files(tmp_path, tmp_path / "own.py", "account = Account()\n",
                           "\naccount.deposit(3)\n")
    assert [path for path, _ in found] == ["sub/money.py", "bank.py"]
    assert found[-1][1] == files["bank.py"]
    assert relevant_files(tmp_path / "sub", tmp_path / "x.rs", "", "") == []
    assert relevant_files(tmp_path, tmp_path / "own.py", "zebra", "") == []
    with pytest.raises(InputError, match="--repo .*none: no such folder"):
        relevant_files(tmp_path / "none", tmp_path / "own.py", "", "")


def test_relevant_files_of_related_languages(tmp_path):
    """A C file gets its header, a .tsx file a .ts file; other kinds and installed packages do not
    count, whatever they are called."""
    names = ["a.c", "a.h", "a.hpp", "B.H", "b.ts", "b.tsx", "b.vue", "c.py", "c.pyi", "d.kt",
             "e.java", "f.rs", "f.go", "g.unknown", "h.unknown", "node_modules/x.ts",
             "\x1b[2J/x.ts", "venv/lib/site-packages/x.py", "env/lib/x.py", ".hidden/x.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("shared_name")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    for file, expected in {"main.c": {"a.c", "a.h", "a.hpp", "B.H"},
                           "main.tsx": {"b.ts", "b.tsx", "b.vue"}, "main.py": {"c.py", "c.pyi"},
                           "main.java": {"d.kt", "e.java"}, "main.rs": {"f.rs"},
                           "main.unknown": {"g.unknown", "h.unknown"}, "main.zig": set()}.items():
        files = relevant_files(tmp_path, tmp_path / file, "shared_name", "")
        assert {path for path, _ in files} == expected, file


def test_split_at_cursor():
    assert split_at_cursor("ab\ncd\n", "f", 2, 1) == ("ab\n", "", "cd\n")
    assert split_at_cursor("ab\ncd\n", "f", 1, 3) == ("ab", "", "\ncd\n")
    with pytest.raises(InputError, match="line 1 has columns 1 to 3, not 4"):
        split_at_cursor("ab\ncd\n", "f", 1, 4)
    assert split_at_cursor("e\u0301 = 1\n", "f", 1, 3) == (      # as an editor counts
        "e\u0301", "", " = 1\n")
    assert split_at_cursor("a\nb\nc", "f", 2) == ("a\n", "b", "\nc")
    assert split_at_cursor("a\nb\n", "f", 3) == ("a\nb\n", "", "")
    assert split_at_cursor("x = <FILL>\n", "f") == ("x = ", "", "\n")
    with pytest.raises(InputError, match="f: has lines 1 to 2, there is no line 3"):
        split_at_cursor("a\nb", "f", 3)
    with pytest.raises(InputError, match="f: holds 2 <FILL> marks"):
        split_at_cursor("<FILL><FILL>", "f")


def test_command(checkpoint, tmp_path, typed):
    (tmp_path / "a.py").write_text(CODE)
    command = ["fim.py", tmp_path / "a.py", "--out", tmp_path / "out", "--max-new-tokens", "8",
               "--device", "cpu"]
    done = typed(*command, "--line", "5")
    assert "for number in numbers:\n⟦" in done.stdout
    assert "ground truth: total += number" in done.stdout
    assert "cpu in float32 (" in done.stdout
    done = typed(*command, "--line", "5", "--column", "9", "--repo", tmp_path)
    assert "for number in numbers:\n        ⟦" in done.stdout and "⟧total += num" in done.stdout
    assert "as far as there is room, the most relevant last: none" in done.stdout
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "0 <FILL> marks" in done.stderr


def test_show(tmp_path, typed):
    (tmp_path / "a.py").write_bytes(CODE.replace("\n", "\r\n").encode())
    done = typed("fim.py", "show", tmp_path / "a.py")
    shown = done.stdout.split("--- ")[1:]
    assert [part.split(":")[0] for part in shown[:5]] == list(SPAN_TYPES)
    plain = {re.sub("[⟦⟧]", "", part.split("\n", 1)[1]) for part in shown[:5]}
    assert len(plain) == 1 and plain.pop().strip() in CODE      # one function, with five spans
    file = shown[5].removeprefix("file format\n")
    assert re.findall(r"<\|\w+\|>", file) == [PREFIX, SUFFIX, MIDDLE, "<|endoftext|>"]
    assert shown[6] == ("repository format\n<|repo_name|>my-project\n<|file_sep|>other.py\nX = 1\n"
                        f"\n<|file_sep|>a.py\n{file}")
    read, write = os.pipe()
    os.close(read)                                              # as of `| head`, when it has enough
    done = subprocess.run([sys.executable, "fim.py", "show", tmp_path / "a.py"], cwd=ROOT,
                          stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode not in (0, 1, 2)
    done = typed("fim.py", "show")
    assert done.returncode == 2 and "expected: python fim.py show FILE" in done.stderr


def test_tokenizer_of_another_model(checkpoint, small_tokenizer):
    save_model(fill_weights(CausalLM(Config(**SMALL))), checkpoint)
    with pytest.raises(InputError, match="has 380 ids, the model only 96 "):
        load(checkpoint, "cpu")


def test_newest_model(checkpoint, tmp_path):
    assert newest_model(tmp_path / "out") == checkpoint
    with pytest.raises(InputError, match="no finished model of dpo or sft or repository or pret"):
        newest_model(tmp_path)
