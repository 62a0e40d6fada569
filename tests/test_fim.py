"""pytest tests/test_fim.py"""

import subprocess
import sys

import numpy as np
import pytest
from conftest import CODE, ROOT, SMALL, fill_weights

from fim import (MIDDLE, STOP_TOKENS, fim_document, fim_ids, gap, infill, load,
                 newest_model, normalize, shorten)
from model import CausalLM, Config, generate, save_model
from tokenizer import InputError


@pytest.fixture
def checkpoint(small_tokenizer, tmp_path):
    """out/pretrain with a model of fixed weights, and its out."""
    folder = tmp_path / "out" / "pretrain"
    config = Config(**{**SMALL, "vocab_size": 416})
    save_model(fill_weights(CausalLM(config)), folder)
    small_tokenizer.save(folder)
    return folder


def test_parts_join_to_the_text():
    rng = np.random.default_rng(0)
    texts = [CODE, "", "x", "日本\n☃", "a\r"]
    for i in range(3000):
        text = texts[i % len(texts)]
        assert "".join(fim_document(text, rng)) == text


def test_cuts_are_uniform_and_may_be_empty():
    rng = np.random.default_rng(0)
    cuts = [fim_document("abcd", rng) for _ in range(20_000)]
    # 25 ordered pairs of places among 5: an empty middle for 5 of them, an empty prefix for 9
    assert np.mean([not middle for _, middle, _ in cuts]) == pytest.approx(5 / 25, abs=0.01)
    assert np.mean([not prefix for prefix, _, _ in cuts]) == pytest.approx(9 / 25, abs=0.01)
    assert np.mean([middle == "bc" for _, middle, _ in cuts]) == pytest.approx(2 / 25, abs=0.01)


def test_format_of_the_report(small_tokenizer):
    parts = ("def f(x):\n    ret", " x\n", "urn")          # prefix, suffix, middle
    ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, parts))
    text = "<|fim_prefix|>def f(x):\n    ret<|fim_suffix|> x\n<|fim_middle|>urn"
    assert small_tokenizer.decode(ids) == text
    assert ids == small_tokenizer.encode(text, allow_special=True)


def test_sentinels_in_source_text_stay_text(small_tokenizer):
    parts = ("a<|fim_middle|>", "b<|endoftext|>", "c")
    ids = fim_ids(small_tokenizer, *map(small_tokenizer.encode, parts))
    assert ids.count(small_tokenizer.special[MIDDLE]) == 1
    assert small_tokenizer.special["<|endoftext|>"] not in ids


def test_stop_set_is_the_published_one(published_folder):
    from tokenizer import Tokenizer
    special = Tokenizer.load(published_folder).special
    assert sorted(special[name] for name in STOP_TOKENS) == [
        151643, 151645, 151659, 151661, 151662, 151663, 151664]


def test_normalize():
    assert normalize("e\u0301\r\na\rb\n") == "é\na\nb\n"


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


def test_infill_ends_at_a_stop_token(checkpoint):
    model, tokenizer = load(checkpoint, "cpu")
    stops = {tokenizer.special[name] for name in STOP_TOKENS}
    prompt = fim_ids(tokenizer, tokenizer.encode("a"), tokenizer.encode("b"))
    cut_short = 0
    for seed in range(30):                                  # chance: most runs meet a stop token
        chance = dict(temperature=3.0, seed=seed, vocab_size=tokenizer.vocab_size)
        [free] = generate(model, [prompt], 40, **chance)
        end = next((i for i, token in enumerate(free) if token in stops), 40)
        cut_short += end < 40
        text = infill(model, tokenizer, "a", "b", 40, temperature=3.0, seed=seed)
        assert text == tokenizer.decode(free[:end])
    assert cut_short > 5


def test_gap():
    assert gap("a\nb\nc", 2, "f") == ("a\n", "b", "\nc")
    assert gap("a\nb\n", 3, "f") == ("a\nb\n", "", "")
    assert gap("x = <FILL>\n", None, "f") == ("x = ", "", "\n")
    with pytest.raises(InputError, match="f: has lines 1 to 2, there is no line 3"):
        gap("a\nb", 3, "f")
    with pytest.raises(InputError, match="f: holds 2 <FILL> marks"):
        gap("<FILL><FILL>", None, "f")


def test_command(checkpoint, tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    command = [sys.executable, ROOT / "fim.py", tmp_path / "a.py", "--out", tmp_path / "out",
               "--max-new-tokens", "8", "--device", "cpu"]
    done = subprocess.run([*command, "--line", "5"], capture_output=True, text=True, check=True)
    assert "for number in numbers:\n⟦" in done.stdout
    assert "stood there: total += number" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "0 <FILL> marks" in done.stderr


def test_tokenizer_of_another_model(checkpoint, small_tokenizer):
    save_model(fill_weights(CausalLM(Config(**SMALL))), checkpoint)
    with pytest.raises(InputError, match="has 380 ids, the model only 96 rows"):
        load(checkpoint, "cpu")


def test_newest_model(checkpoint, tmp_path):
    assert newest_model(tmp_path / "out") == checkpoint
    with pytest.raises(InputError, match="no finished model here"):
        newest_model(tmp_path)
