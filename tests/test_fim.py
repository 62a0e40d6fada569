"""pytest tests/test_fim.py"""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import regex
from conftest import CODE, ROOT, SMALL, fill_weights

import fim
from fim import (
    MIDDLE,
    PREFIX,
    SPANS,
    SUFFIX,
    control_stops,
    draw,
    fim_document,
    fim_ids,
    gap,
    infill,
    infill_all,
    infill_prompt,
    load,
    newest_model,
    normalize,
    relevant_files,
    repeats,
    repository_ids,
    shorten,
    span,
    suffix_start,
    syntax_nodes,
)
from model import CausalLM, Config, generate, save_model
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
        assert "".join(fim_document(text, rng, syntax_nodes(text))) == text


@pytest.mark.slow
def test_a_hundred_thousand_documents(small_tokenizer):
    """All documents come back from ids of three parts, whatever is in them."""
    rng, special = np.random.default_rng(1), small_tokenizer.special
    for _ in range(100_000):
        text = normalize(some_text(rng))
        parts = fim_document(text, rng, syntax_nodes(text))
        ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, (parts[0], parts[2], parts[1])))
        at = [ids.index(special[name]) for name in (PREFIX, SUFFIX, MIDDLE)]
        prefix, suffix, middle = (small_tokenizer.decode(ids[a + 1:b])
                                  for a, b in zip(at, [*at[1:], None]))
        assert prefix + middle + suffix == text
        assert sum(i in special.values() for i in ids) == 3


def test_cuts_between_characters_are_uniform():
    rng = np.random.default_rng(0)
    cuts = [span("abcd", "characters", rng) for _ in range(20_000)]
    # 25 ordered pairs of places among 5: an empty middle for 5 of them, an empty prefix for 9
    assert np.mean([start == end for start, end in cuts]) == pytest.approx(5 / 25, abs=0.01)
    assert np.mean([start == 0 for start, _ in cuts]) == pytest.approx(9 / 25, abs=0.01)
    assert np.mean([cut == (1, 3) for cut in cuts]) == pytest.approx(2 / 25, abs=0.01)


def test_what_is_cut_is_what_its_kind_says():
    """Lines are whole, words end where BPE may, nodes are nodes; each kind as often as declared."""
    rng, nodes = np.random.default_rng(0), syntax_nodes(CODE)
    lines, single = CODE.split("\n"), 0
    for _ in range(500):
        start, end = span(CODE, "lines", rng)
        middle = CODE[start:end].split("\n")
        assert CODE[end] == "\n" and CODE[:start].split("\n")[-1].strip() == ""
        assert all(part in lines for part in middle[1:]) and 1 <= len(middle) <= 25
        single += len(middle) == 1
        start, end = span(CODE, "words", rng)
        words = regex.findall(PATTERN, CODE[start:end])
        assert regex.findall(PATTERN, CODE[:start]) + words + regex.findall(
            PATTERN, CODE[end:]) == regex.findall(PATTERN, CODE) and len(words) <= 16
        assert span(CODE, "syntax", rng, nodes) in {node[1:] for node in nodes}
        start, end = span(CODE, "syntax", rng)                  # of no known language: lines
        assert CODE[end] == "\n"
    assert single / 500 == pytest.approx(0.5, abs=0.07)
    chosen = Counter(draw(SPANS, rng) for _ in range(20_000))
    assert {kind: chosen[kind] / 20_000 for kind in SPANS} == pytest.approx(SPANS, abs=0.012)
    cuts = [fim_document(CODE, rng, nodes) for _ in range(5000)]
    for part in range(3):
        empty = np.mean([not parts[part] for parts in cuts])
        assert 0.004 < empty < 0.06, part


def test_syntax_nodes():
    text = """import os
@cached
def f(α, b):
    'Doc.'
    é = g(α, *b, key=1)
    for x in b:
        é += x
    else:
        pass
    while é:
        return é
class A: pass
"""
    assert [(node.kind, text[node.start:node.end]) for node in syntax_nodes(text)] == [
        ("import", "import os"),
        ("function", text[text.index("'Doc"):text.index("\nclass")]),
        ("assignment", "é = g(α, *b, key=1)"), ("expression", "α, *b, key=1"),
        ("for", "é += x"), ("assignment", "é += x"), ("for", "pass"),
        ("while", "return é"), ("return", "return é"), ("class", "pass")]
    text = ("class A:\n    @property\n    def f(self): return g(a=1, *b)\n"
            "sum(x for x in y)\nh((1), (2))\n")
    assert [(node.kind, text[node.start:node.end]) for node in syntax_nodes(text)] == [
        ("class", text[13:text.index("\nsum")]), ("function", "return g(a=1, *b)"),
        ("return", "return g(a=1, *b)"), ("expression", "a=1, *b")]
    assert syntax_nodes("def f(:") == syntax_nodes("") == syntax_nodes("\0") == []


def test_a_sample_is_the_same_everywhere():
    """Seed and text alone decide: these values must not change from machine to machine."""
    cuts = [fim_document(CODE, np.random.default_rng([0, i]), syntax_nodes(CODE))
            for i in range(200)]
    digest = hashlib.sha256(repr([(len(a), len(b)) for a, b, _ in cuts]).encode()).hexdigest()
    assert digest[:16] == "e5bee949839fed9f"


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
    stops = control_stops(Tokenizer.load(published_folder))
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
        for row in range(len(prompts)):
            for n, token in enumerate(said):
                on_token(row, token)
                if stop(said[:n + 1]):
                    break

    monkeypatch.setattr(fim, "generate", parrot)
    gaps = [("a = 2\n", suffix), ("", "")]
    assert infill_all(model, tokenizer, gaps, 20) == ["total = 1", "total = 1" + suffix + "more"]
    assert infill(model, tokenizer, *gaps[0], 20, guard=False) == "total = 1" + suffix + "more"


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


def test_many_gaps_are_filled_as_each_alone(checkpoint):
    model, tokenizer = load(checkpoint, "cpu")
    gaps = [("def f(x):\n    ", "\n"), ("", "return"), (CODE, CODE)]
    seen = {}
    texts = infill_all(model, tokenizer, gaps, 12,
                       on_text=lambda row, piece: seen.update({row: seen.get(row, "") + piece}))
    assert texts == [infill(model, tokenizer, *gap, 12) for gap in gaps]
    assert [seen.get(row, "") for row in range(3)] == texts


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


def test_gap():
    assert gap("ab\ncd\n", 2, "f", 1) == ("ab\n", "", "cd\n")
    assert gap("ab\ncd\n", 1, "f", 3) == ("ab", "", "\ncd\n")
    with pytest.raises(InputError, match="a cursor in line 1 stands in columns 1 to 3, not 4"):
        gap("ab\ncd\n", 1, "f", 4)
    assert gap("e\u0301 = 1\n", 1, "f", 3) == ("é", "", " = 1\n")      # as an editor counts
    assert gap("a\nb\nc", 2, "f") == ("a\n", "b", "\nc")
    assert gap("a\nb\n", 3, "f") == ("a\nb\n", "", "")
    assert gap("x = <FILL>\n", None, "f") == ("x = ", "", "\n")
    with pytest.raises(InputError, match="f: has lines 1 to 2, there is no line 3"):
        gap("a\nb", 3, "f")
    with pytest.raises(InputError, match="f: holds 2 <FILL> marks"):
        gap("<FILL><FILL>", None, "f")


def test_command(checkpoint, tmp_path, typed):
    (tmp_path / "a.py").write_text(CODE)
    command = ["fim.py", tmp_path / "a.py", "--out", tmp_path / "out", "--max-new-tokens", "8",
               "--device", "cpu"]
    done = typed(*command, "--line", "5")
    assert "for number in numbers:\n⟦" in done.stdout
    assert "stood there: total += number" in done.stdout
    done = typed(*command, "--line", "5", "--column", "9", "--repo", tmp_path)
    assert "for number in numbers:\n        ⟦" in done.stdout and "⟧total += num" in done.stdout
    assert "is read first as far as there is room: nothing" in done.stdout
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "0 <FILL> marks" in done.stderr


def test_show(tmp_path, typed):
    (tmp_path / "a.py").write_bytes(CODE.replace("\n", "\r\n").encode())
    done = typed("fim.py", "show", tmp_path / "a.py")
    for kind in SPANS:
        assert f"--- {kind}: " in done.stdout
    shown = done.stdout.split("--- ")[1:]
    plain = {re.sub("[⟦⟧]", "", part.split("\n", 1)[1]) for part in shown[:4]}
    assert len(plain) == 1 and plain.pop().strip() in CODE      # one function, cut four times
    for order, part in zip(("PSM", "SMP", "PSM"), shown[4:]):
        names = re.findall(r"fim_(p|s|m)", part)
        assert "".join(names).upper() == order or order == "SMP" and names == ["p", "s", "m"]
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
