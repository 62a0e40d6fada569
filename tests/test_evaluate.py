"""pytest tests/test_evaluate.py"""

import contextlib
import errno
import itertools
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CODE, ROOT, SMALL, fill_weights, reference_data

import evaluate
from evaluate import (
    benchmarks,
    bits_per_byte,
    bootstrap,
    code_block,
    compare,
    complete,
    compressed_bits_per_byte,
    edit_similarity,
    final_number,
    pass_at_k,
    plant,
    read_documents,
)
from model import CausalLM, Config, generate, save_model
from support import answers
from support.benchmarks import to_problem
from support.files import InputError, read_rows
from support.functions import parse
from support.supervisor import CALLS, CONDITIONS, MACHINES, seccomp_filter
from support.values import decode, encode


@pytest.fixture
def model(small_tokenizer):
    return fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": 416}))).eval()


def test_a_model_that_knows_nothing(model, small_tokenizer):
    """All rows equally likely: every token costs log2(416) bits, the <|endoftext|> too."""
    with torch.no_grad():
        model.head.zero_()
    documents = [{"text": "héllo\n"}, {"text": CODE}]
    tokens = sum(len(small_tokenizer.encode(d["text"])) + 1 for d in documents)
    expected = tokens * math.log2(416) / (7 + len(CODE))
    assert bits_per_byte(model, small_tokenizer, documents) == pytest.approx(expected, rel=1e-5)


def test_each_document_is_read_in_sequences_after_an_end_of_text(model, small_tokenizer):
    T, end = model.config.max_position_embeddings, small_tokenizer.special["<|endoftext|>"]
    text = CODE * 3
    ids = [end, *small_tokenizer.encode(text), end]
    assert len(ids) > 2 * T
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        row = torch.tensor([ids[start:start + T + 1]])
        logits = model(row[:, :-1]).log_softmax(-1).detach()
        nats -= float(logits.gather(-1, row[:, 1:, None]).sum())
    expected = nats / math.log(2) / len(text)
    single = bits_per_byte(model, small_tokenizer, [{"text": text}])
    assert single == pytest.approx(expected, rel=1e-5)
    both = bits_per_byte(model, small_tokenizer, [{"text": text}, {"text": text}])
    assert both == pytest.approx(expected, rel=1e-5)


def test_compressors():
    bits = compressed_bits_per_byte(["ab" * 5000, "ab" * 5000])
    assert set(bits) == {"gzip", "bz2", "xz"} and max(bits.values()) < 0.1
    assert compressed_bits_per_byte([CODE])["gzip"] > 2


def test_documents_from_files(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x\r\ny")
    assert read_documents(tmp_path / "a.py") == [{"text": "x\ny", "path": "a.py"}]
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n{"text": "2", "path": "p"}\n')
    assert [d["text"] for d in read_documents(tmp_path / "b.jsonl")] == ["1", "2"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n{"text": "\\ufeff2"}\r\n')
    assert [d["text"] for d in read_documents(tmp_path / "b.jsonl")] == ["1", "2"]
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1")
    assert read_documents(tmp_path / "a.py")[0]["text"] == "x = 1"
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n{"txt": "2"}\n')
    with pytest.raises(InputError, match='b.jsonl, line 2: expected {"text"'):
        read_documents(tmp_path / "b.jsonl")
    (tmp_path / "c.py").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="c.py: not UTF-8 text"):
        read_documents(tmp_path / "c.py")


def test_command(model, small_tokenizer, tmp_path, typed):
    save_model(model, tmp_path / "m")
    small_tokenizer.save(tmp_path / "m")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CODE}))
    command = ["evaluate.py", "--model", tmp_path / "m", "--device", "cpu"]
    out = typed(*command, "--text", tmp_path / "a.jsonl").stdout
    score = bits_per_byte(model, small_tokenizer, [{"text": CODE}])
    assert f"{score:.3f}" in out and "1 documents" in out and "gzip" in out
    done = typed(*command, "--text", tmp_path / "no")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_batch_says_what_each_prompt_says_alone(model, small_tokenizer):
    """Ends included: a stop string, the tokens run out, a prompt longer than the context."""
    prompts = [small_tokenizer.encode(text) for text in
               ("def", CODE[:40], CODE[:17], CODE * 2, "class Stack:")]
    alone = [complete(model, small_tokenizer, [prompt], 20, ["e", "\n"])[0] for prompt in prompts]
    assert complete(model, small_tokenizer, prompts, 20, ["e", "\n"]) == alone
    for text, _ in alone:
        assert "e" not in text and "\n" not in text
    [(text, stopped)] = complete(model, small_tokenizer, prompts[:1], 20)
    assert not stopped and text.startswith(alone[0][0])


def test_the_newest_model_on_everything(model, small_tokenizer, tmp_path, typed):
    save_model(model, tmp_path / "pretrain")
    small_tokenizer.save(tmp_path / "pretrain")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps({"text": CODE}))
    command = [sys.executable, ROOT / "evaluate.py", "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run([*command, "--limit", "3", "--n", "2", "--temperature", "0.8"],
                          capture_output=True, text=True)
    if "weak-sandbox" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "evaluate" / "pretrain.json").read_text())["scores"]
    assert scores["ladder"]["samples"] == 6 and scores["ladder"]["problems"] == 3
    assert scores["ladder"]["level 1"] == 0 and "seccomp" in scores["ladder"]["layers"]
    assert 0 <= scores["infilling, lines"]["similar"] < 60
    assert (tmp_path / "evaluate" / "pretrain_infilling.png").read_bytes()[:4] == b"\x89PNG"
    assert scores["bits per byte"]["gzip"] > 2
    assert "| ladder | pass@1 | 0 |" in (tmp_path / "evaluate" / "pretrain.md").read_text()
    for flags, message in ((["--limit", "0"], "must be at least 1"),
                           (["--n", "2"], "equal samples"),
                           (["--problems", "x"], "give the --benchmark")):
        none = typed("evaluate.py", *command[2:], *flags)
        assert none.returncode == 2 and message in none.stderr and none.stderr.count("\n") == 1
    missing = subprocess.run([*command, "--benchmark", "infilling-multi-line"], text=True,
                             capture_output=True, env={**os.environ, "MINICODER_CACHE": "/nowhere"})
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "put HumanEval-MultiLineInfilling.jsonl.gz to /nowhere" in missing.stderr


def test_seeds_share_no_sample(model, small_tokenizer):
    """Not even shifted by one: sample i is drawn from seed + i, and seeds are far apart."""
    asked = [small_tokenizer.encode("def f(x):\n")]
    texts = [text for seed in (0, 1, 2) for text, _ in complete(
        model, small_tokenizer, asked, 12, samples=4, temperature=2.0, seed=seed)]
    assert len(set(texts)) == 12


@pytest.mark.parametrize("tokens_at_once", [16384, 100, 30, 1])
def test_several_samples_of_each_prompt(model, small_tokenizer, monkeypatch, tokens_at_once):
    """They come in the order of the prompts, and are read once as far as a batch has room."""
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", tokens_at_once)
    prompts = [small_tokenizer.encode(text) for text in (CODE[:40], "def", "class Stack:")]
    alone = complete(model, small_tokenizer, prompts, 9, ["e"])
    repeated = complete(model, small_tokenizer, prompts, 9, ["e"], samples=3)
    assert repeated == [text for text in alone for _ in range(3)]           # greedy
    sizes = []

    def counted(model, batch, *rest, **options):
        sizes.append((len(batch), options["samples"]))
        return generate(model, batch, *rest, **options)

    monkeypatch.setattr(evaluate, "generate", counted)
    drawn = complete(model, small_tokenizer, prompts, 9, samples=5, temperature=2.0, seed=3)
    assert len(set(drawn)) == 15                                            # no two are the same
    assert drawn == complete(model, small_tokenizer, prompts, 9, samples=5, temperature=2.0,
                             seed=3)
    assert sum(batch * samples for batch, samples in sizes) == 30
    if tokens_at_once == 16384:
        assert sizes == [(3, 5)] * 2
    assert all(batch * samples == 1 for batch, samples in sizes) == (tokens_at_once == 1)


def test_yarn_extends_the_context_of_prompts(model, small_tokenizer):
    """Prompts may be as long as YaRN allows; bits per byte keep the sequences of training."""
    prompt = small_tokenizer.encode(CODE * 2)[:150]
    before = complete(model, small_tokenizer, [prompt], 8)
    assert before == complete(model, small_tokenizer, [prompt[-56:]], 8)    # of 64, 8 are new
    bits = bits_per_byte(model, small_tokenizer, [{"text": CODE}])
    model.config.rope_scaling = {"type": "yarn", "factor": 4.0,
                                 "original_max_position_embeddings": 64}
    assert model.config.context_length == 256
    [whole] = complete(model, small_tokenizer, [prompt], 8)
    assert whole[0] == small_tokenizer.decode(generate(
        model, [prompt], 8, vocab_size=small_tokenizer.vocab_size)[0])
    assert bits_per_byte(model, small_tokenizer, [{"text": CODE}]) == bits


def test_cached_batches_are_not_generated_again(model, small_tokenizer, tmp_path, monkeypatch):
    prompts = [small_tokenizer.encode(CODE[:n]) for n in range(5, 45)]
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 240)
    cache = tmp_path / "cache"
    texts = complete(model, small_tokenizer, prompts, 9, ["e"], cache=cache)
    lines = cache.read_text().split("\n")
    sizes = [len(json.loads(line)[1]) for line in lines[:-1]]
    assert len(sizes) > 2 and sum(sizes) == 40 and max(sizes) < 20
    cache.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])      # killed in the third batch
    asked = []
    monkeypatch.setattr("evaluate.generate", lambda model, prompts, *rest, **options: (
        asked.append(len(prompts)), generate(model, prompts, *rest, **options))[1])
    assert complete(model, small_tokenizer, prompts, 9, ["e"], cache=cache) == texts
    assert asked == sizes[2:]
    complete(model, small_tokenizer, prompts, 8, ["e"], cache=cache)           # another request
    assert sum(asked) == sum(sizes[2:]) + 40
    for damaged in (b"\xff", b"5\n"):
        cache.write_bytes(damaged)
        assert complete(model, small_tokenizer, prompts, 9, ["e"], cache=cache) == texts
        before = len(asked)
        assert complete(model, small_tokenizer, prompts, 9, ["e"], cache=cache) == texts
        assert len(asked) == before


def asked(monkeypatch, model, tokenizer, name, row, answers, *flags):
    """Grades of answers to one problem, and what the model was asked, as text."""
    seen = []

    def complete(model, tokenizer, prompts, *rest, **options):
        seen.extend(map(tokenizer.decode, prompts))
        assert options["samples"] == len(answers)
        return [(answer, True) for answer in answers]

    monkeypatch.setattr(evaluate, "complete", complete)
    problem = to_problem(row, name, 1)
    prompt = benchmarks()["benchmarks"][name]["chat prompt" if "chat" in flags else "prompt"]
    return problem, seen, evaluate.model_samples(model, tokenizer, prompt, {"id": problem},
                                                 len(answers))


def test_prompts_of_the_report(model, small_tokenizer, monkeypatch):
    row = {"task_id": "a", "prompt": '\ndef f(x):\n    """One more."""\n\n', "entry_point": "f",
           "test": ""}
    ask = (monkeypatch, model, small_tokenizer)
    _, seen, samples = asked(*ask, "humaneval", row, ["\treturn 1"])
    assert seen == ['def f(x):\n    """One more."""\n']
    assert samples == [{"task_id": "id", "completion": "    return 1", "stopped": True}]
    answers = ["def f(x): pass", "Sure:\n```python\na = 1\n```\nand `b`", "a\n```"]
    _, seen, samples = asked(*ask, "humaneval", row, answers, "chat")
    assert seen[0] == (
        "<|im_start|>system\nYou are an intelligent programming assistant to produce Python "
        "algorithmic solutions<|im_end|>\n<|im_start|>user\nCan you complete the following Python "
        'function?\n```python\ndef f(x):\n    """One more."""\n```\n<|im_end|>\n'
        "<|im_start|>assistant\n```python\n")
    assert [s["solution"] for s in samples] == ["def f(x): pass", "a = 1\n", "a\n"]

    row = {"code": "def f(a):\n    return {a}", "input": "'{code}'", "output": "{1}", "id": "s"}
    answers = ["I think.\n[/THOUGHT]\n[ANSWER]\nassert f('x') == {1}\n", "f(2)", "assert f(3)"]
    _, seen, samples = asked(*ask, "cruxeval-input", row, answers)
    assert seen[0].endswith("[PYTHON]\ndef f(a):\n    return {a}\nassert f(??) == {1}\n[/PYTHON]\n"
                            "[THOUGHT]\n")
    assert [s["completion"] for s in samples] == ["f('x')", "f(2)", "f(3)"]
    _, seen, samples = asked(*ask, "cruxeval-output-direct", row, answers)
    assert seen[0].endswith("assert f('{code}') == ??\n[/PYTHON]\n[ANSWER]\n")
    assert [s["completion"] for s in samples] == ["{1}", "f(2)", "assert f(3)"]


def test_numbers():
    """The last number is the answer, but for one that is announced as such."""
    cases = {"The answer is 1,234.50 dollars, not 3.": 1234.5, r"\boxed{-7} or 8": -7,
             "10-5 = 5": 5, "it costs $18": 18, "none": None, "a 3\nQuestion: b 4": 3,
             "The answer is: **42**": 42, "The answer is unknown. 6": 6, "-0.5": -0.5, "5-3": 3}
    assert {text: final_number(text) for text in cases} == cases
    boxed = {r"9{,}500": 9500, r"\$9,500.00": 9500, r"\text{9}": 9, "-3": -3, r"1\,000": 1000,
             r"10\%": 10, "{9}": 9, r"\frac{1}{2}": 0.5, r"-\dfrac34": -0.75, "1 000": 1000,
             r"3\frac{1}{2}": 3.5, r"12{,}345{,}678": 12345678, r"12,\!345": 12345, "x = 5": 5,
             r"70,000 \text{ dollars}": 70000, r"5 \times 4 = 20": 20, r"\mathbf{\$7}": 7,
             "1\u202f000": 1000, "3/4": 0.75, "\u22127": -7, "18.5 - 3.5 = 15.0": 15}
    for text, number in boxed.items():
        assert final_number(f"So 2 and $\\boxed{{{text}}}$.\n\nCheck: 4 = 4") == number, text
    cases = {"$1,234.50.": 1234.5, "it costs $409 500.": 409500, "in 2019 300 people": 300,
             "so -$5": -5, "it is $.75": 0.75, "all in all 1 1/2 hours": 1.5, "1,00,000": 100000,
             "The answer is 18 - 3 = 15 dollars, not 4": 15, "The answer is 3. As 9 - 3 = 6": 3}
    assert {text: final_number(text) for text in cases} == cases
    problem = to_problem({"question": "?", "answer": "<<3*6=18>>18\n#### 1,018"}, "gsm8k", 7)
    assert problem["task_id"] == "gsm8k/7" and problem["answer"] == 1018
    assert compare(problem, "so 1018.0 it is").passed and not compare(problem, "").passed
    rows = [row for _, row in read_rows(reference_data("eval/gsm8k_test.jsonl.gz"))]
    problems = [to_problem(row, "gsm8k", n) for n, row in enumerate(rows)]
    assert all(compare(p, p["canonical_solution"]).passed for p in problems)
    assert sum(p["answer"] for p in problems) == sum(
        int(row["answer"].split("#### ")[1].replace(",", "")) for row in rows)


RIGHT = "def f(x):\n    return x\n"
WRONG = "def f(x):\n    return 0\n"
USE = "```python\nprint(f(2))\n```\nprints\n```\n2\n```\n"


@pytest.mark.parametrize("info", [
    "", " ", "python", "python ", " python", "{python}", "{.python .numberLines}", "py", "Python3",
    "python title=a.py", 'python title="a.py"', "python:solution.py", "solution.py", "c++"])
def test_code_after_any_fence(info):
    for marks, end in (("```", "```"), ("~~~", "~~~ "), ("````", "````"), ("```", "`````")):
        answer = f"Run `f`:\n{marks}{info}\n{RIGHT}{end}\nDone."
        for entry_point in ("f", None):
            assert code_block(answer, entry_point) == RIGHT
            assert code_block(answer.replace("\n", "\r\n"), entry_point) == RIGHT
            assert code_block(f"```bash\nls\n```\n{answer}\n{USE}", entry_point) == RIGHT
            for margin, first in (("   ", "   "), ("    ", "    "), ("\t", "\t"), ("  ", "- "),
                                  ("   ", "1. "), ("> ", "> ")):
                lines = "".join(margin + line + "\n" for line in [*RIGHT.splitlines(), end])
                assert code_block(f"{first}{marks}{info}\n{lines}2. run", entry_point) == RIGHT


def test_code_that_counts():
    """The last block that defines the function; what was cut off, or is in no block, if need be."""
    fixed = f"```python\n{WRONG}```\nNo, rather:\n```python\n{RIGHT}```\n"
    cases = {
        fixed: RIGHT, fixed + USE: RIGHT, USE + fixed: RIGHT,
        fixed.removeprefix("```python\n"): RIGHT,               # the prompt has opened the block
        f"{RIGHT}```\nIt returns\n```\nf(2)\n```\n": RIGHT,
        RIGHT: RIGHT, f"So:\n```python\n{RIGHT}": RIGHT,
        f"```python\n{RIGHT}```\nOr:\n```python\ndef f(x):\n    if (": RIGHT,
        "```python\ndef f(x):\n    return x```\nDone": RIGHT,
        f"```python\n{RIGHT}\n{USE}": RIGHT + "\n",             # never closed
        f"```markdown\nHere:\n```python\n{RIGHT}```\n```\n": RIGHT,
        f"````md\nHere:\n```python\n{RIGHT}```\n````\n": RIGHT,
        f"Solution\n```\n{RIGHT}```\n": RIGHT,
        f"```python\n{RIGHT}```\n```python\nfrom a import f\n\nf(2)\n```\n": RIGHT,
        f"```python\n{RIGHT}```\n```python\nclass A:\n    def f(self):\n        2\n```\n": RIGHT,
        "```python\nf = lambda x: x\n```\n" + USE: "f = lambda x: x\n",
        "```python\ndef f(x)\n    return\n```\n" + USE: "def f(x)\n    return\n",
        "I cannot do that.": "I cannot do that.", "": ""}
    assert {text: code_block(text, "f") for text in cases} == cases
    cases = {"Run\n```\nprint(1)\n```\nIt prints\n```\n1\n```": "print(1)\n",
             "No.\n```c++\nint f() {}\n```\n": "int f() {}\n",
             "No.\n```c++\nint f() {}\n": "int f() {}\n"}
    assert {text: code_block(text) for text in cases} == cases


@pytest.mark.parametrize("example", ["```\nf(1)\n```", "```python\nf(1)\n```", "~~~\nf(1)\n~~~"])
def test_a_fence_in_a_docstring_ends_nothing(example):
    inside = f'def f(x):\n    """Doc.\n\n{example}"""\n    return x\n'
    indented = inside.replace("```", "    ```").replace("~~~", "    ~~~")
    for program in (inside, indented, f'"""Doc.\n\n{example}\n"""\n\n{RIGHT}',
                    f'"""Doc.\n\n```python\n{WRONG}```\n"""\n\n{RIGHT}'):
        for text in (f"```python\n{program}```\n", f"```python\n{program}```\n{USE}", program,
                     f"{program}```\n{USE}", f"```python\n{WRONG}```\n```python\n{program}```"):
            assert code_block(text, "f").strip() == program.strip()


def test_code_in_several_blocks():
    """Earlier blocks come along if they hold what the function needs, and only then."""
    helper = "import math\n\n\ndef double(x):\n    return 2 * x\n"
    program = "def f(x):\n    return math.sqrt(double(x))\n"
    text = f"```python\n{helper}```\n{USE}\nand\n```python\n{program}```\n"
    assert code_block(text, "f") == f"{helper}\n\n{program}"
    names = {}
    exec(code_block(text, "f"), names)
    assert names["f"](8) == 4
    program = "def f(x):\n    return max(x)\n"
    text = f"```python\nx = max = 1\n```\n```python\n{program}```"
    assert code_block(text, "f") == program


def test_a_loop_of_fences_is_read_soon(monkeypatch):
    """What small models write: the number of parses in search of ends is bounded."""
    sizes = []
    monkeypatch.setattr(answers, "parse", lambda text: (sizes.append(len(text)), parse(text))[1])
    for line in ("```python\n", "```\n", "```python\nfoo bar\n```\n", "    ```a b\n", "~~~\n(\n",
                 "```python\ndef f(x):\n    return x\n```\n", "````\n```\n("):
        text = line * (20_000 // len(line))
        sizes.clear()
        assert isinstance(code_block(text, "f"), str)
        assert sum(sizes) < 110 * len(text)             # 50 parses in each of two readings, ranks


def test_helpers_in_very_many_blocks():
    """A program that needs something of each of 300 blocks gets it all."""
    blocks = [f"```python\nx{i} = x{i - 1} + 1\n```\n" for i in range(1, 300)]
    text = "```python\nx0 = 0\n```\n" + "".join(blocks) + (
        "```python\ndef f():\n    return x299\n```\n")
    names = {}
    exec(code_block(text, "f"), names)
    assert names["f"]() == 299


def test_only_known_reasons_are_displayed(tmp_path, capsys):
    """Whatever a sample, a results file or a problem says: no forged score, no escape codes."""
    problems = {"a": {"line": "x", "group": "py\x1b[2J\ud800"}}
    reasons = ["passed", "pass@1: 1.0", "\x1b[2Jpassed: 1", "\ud800", "timeout\x07", "",
               "wrong answer: \x1b[2J", "timeout", "killed: signal 9", "no entry point: f"]
    rows = [{"task_id": "a", "completion": "\ud800", "passed": False, "reason": reason,
             "weak": False, "stopped": "\x1b"} for reason in reasons]
    rows.append({**rows[0], "passed": True, "reason": "syntax: none"})
    scores = evaluate.print_scores("humaneval-fim", rows, problems)
    assert scores["reasons"] == {"other": 6, "wrong answer": 1, "timeout": 1, "killed": 1,
                                 "no entry point": 1, "passed": 1}
    assert scores["py?[2J?"] == 1 / 11
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "10 passed" not in printed
    evaluate.save_scores(tmp_path / "s", {"a": scores}, SimpleNamespace(model="\udcff"))
    assert json.loads((tmp_path / "s.json").read_text())["settings"] == {"model": "?"}


def test_samples_with_half_characters(tmp_path, typed):
    """They are graded and written as they are; a results file that lacks a grade is graded anew."""
    row = {"prompt": "ab", "suffix": "cd", "canonical_solution": "  x = 1", "language": "py"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    sample = {"task_id": "py/1", "completion": "x = '\ud800'", "reason": "\ud800", "stopped": None}
    (tmp_path / "s.jsonl").write_text("\ufeff" + json.dumps(sample) + "\n", encoding="utf-8")
    command = ["evaluate.py", "score", "--benchmark", "humaneval-fim", "--problems",
               tmp_path / "p.jsonl", "--samples", tmp_path / "s.jsonl"]
    results = tmp_path / "s.jsonl_results.jsonl"
    done = typed(*command)
    assert done.returncode == 0 and "1 wrong answer" in done.stdout, done.stderr
    graded = json.loads(results.read_text())
    assert graded["completion"] == sample["completion"] and graded["reason"] == "wrong answer"
    for field in ("passed", "weak", "reason"):
        damaged = {**graded, field: None}
        results.write_text(json.dumps(damaged))
        assert typed(*command, "--resume").returncode == 0
        assert json.loads(results.read_text()) == graded


def test_humaneval_fim(model, small_tokenizer, monkeypatch):
    """The first line of what was filled in counts; languages are scored apart."""
    row = {"prompt": "ab", "suffix": "cd", "canonical_solution": "  x = 1", "language": "py"}
    problem, seen, samples = asked(monkeypatch, model, small_tokenizer, "humaneval-fim", row,
                                   ["\n  x = 1\ny", "x = 2", ""])
    assert seen == ["<|fim_prefix|>ab<|fim_suffix|>cd<|fim_middle|>"]
    grades = [compare(problem, sample["completion"]) for sample in samples]
    assert [grade.passed for grade in grades] == [True, False, False]
    rows = [{**sample, **grade._asdict()} for sample, grade in zip(samples, grades)]
    rows.append({**rows[0], "task_id": "js"})
    scores = evaluate.print_scores("humaneval-fim", rows, {"id": problem, "js": {**problem,
                                                                          "group": "js"}})
    assert scores["py"] == pytest.approx(1 / 3) and scores["js"] == 1
    assert scores["edit similarity"] == pytest.approx((100 + 80 + 0 + 100) / 4)
    assert scores["exact match"] == pytest.approx((1 / 3 + 1) / 2)      # the mean over problems
    scores = evaluate.print_scores("humaneval-fim", rows[:3] * 4, {"id": problem})
    assert scores["exact match"] == pytest.approx(1 / 3) and scores["pass@10"] == 1


def test_the_reports_number_stands_beside_ours(model, small_tokenizer, monkeypatch, tmp_path,
                                               capsys):
    monkeypatch.setitem(benchmarks(), "sizes", [5, sum(p.numel() for p in model.parameters())])
    row = {"prompt": "ab", "suffix": "cd", "canonical_solution": "  x = 1", "language": "py"}
    problems = {"py/1": to_problem(row, "humaneval-fim", 1)}
    args = SimpleNamespace(chat=False, resume=False, timeout=None, n=2, seed=0, temperature=0.5,
                           top_p=1.0, limit=None)

    def asked():
        return evaluate.ask_and_grade(model, small_tokenizer, "humaneval-fim", problems,
                                      tmp_path / "a", args)

    args.temperature, args.n = 0.0, 1
    assert asked()["published"] == 0.835                    # of 1.5B, the second size
    assert re.search("the report, for base models of this size, on .*: 0.835",
                     capsys.readouterr().out)
    args.limit = 1
    assert "published" not in asked()                       # that was of all problems, greedy
    args.limit, args.temperature, args.n = None, 0.5, 2
    scores = asked()
    assert "published" not in scores and scores["samples"] == 2
    rows = [row for _, row in read_rows(tmp_path / "a.jsonl")]
    assert [row["task_id"] for row in rows] == ["py/1"] * 2
    assert rows[0]["completion"] != rows[1]["completion"]
    assert not (tmp_path / "a.batches.jsonl").exists()
    args.chat = True
    with pytest.raises(InputError, match="no prompt for --chat"):
        evaluate.ask_and_grade(model, small_tokenizer, "humaneval-fim", problems, "a", args)


def test_needle(model, small_tokenizer, tmp_path):
    hay = small_tokenizer.encode(CODE * 20)
    for depth, length in itertools.product((0, 0.5, 1), (200, 333)):
        planted, plain, answer = plant(small_tokenizer, hay, length, depth, random.Random(3))
        text, body = map(small_tokenizer.decode, (planted, answer))
        head = text[text.rindex("\ndef "):]
        assert len(planted) == len(plain) == length - len(answer)
        assert text.count(head + body) == 1 and text.endswith(head)
        plain = small_tokenizer.decode(plain)
        assert body not in plain and plain.endswith(head)
        names = {}
        exec((head + body).strip(), names)                              # a function indeed
        assert text.index(head + body) == pytest.approx(depth * (len(text) - 2 * len(head + body)),
                                                        abs=len(head + body))
    model.config.max_position_embeddings = 256
    scores = evaluate.measure_needle(model, small_tokenizer, [{"text": CODE * 20}],
                                     tmp_path / "n.png", count=1)
    assert scores["repeated"] == 0 and abs(scores["bits saved per byte"]) < 3
    assert len(scores["maps"]["repeated, %"]) == 5 and scores["lengths"][-1] == 240
    assert (tmp_path / "n.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="60 tokens of context cannot hold a function"):
        plant(small_tokenizer, hay, 60, 0, random.Random(3))
    with pytest.raises(InputError, match="give more with --text"):
        evaluate.measure_needle(model, small_tokenizer, [{"text": "a"}], tmp_path / "n.png")


def test_needle_is_found_by_a_model_that_copies(small_tokenizer, tmp_path, monkeypatch):
    """Stand-ins that know what was seen in the context: all is repeated, and bits are saved."""
    class Copier:
        config = type("C", (), {"context_length": 512})
        head = torch.zeros(1)

        def __call__(self, ids, targets, reduce):
            known = torch.zeros(targets.shape)
            for row, wanted in enumerate(targets):
                kept = wanted[wanted >= 0].tolist()
                before = ids[row].tolist()[:int((wanted >= 0).nonzero()[0]) + 1]
                seen = any(before[i:i + len(kept)] == kept for i in range(len(before)))
                bits = 0 if seen else 8 * len(small_tokenizer.decode(kept))
                known[row][wanted >= 0] = -bits * math.log(2) / len(kept)
            return known

    def complete(model, tokenizer, prompts, *rest):
        texts = list(map(tokenizer.decode, prompts))
        return [(text.split(text[text.rindex("\ndef "):])[1], True) for text in texts]

    monkeypatch.setattr(evaluate, "complete", complete)
    scores = evaluate.measure_needle(Copier(), small_tokenizer, [{"text": CODE * 99}],
                                 tmp_path / "n.png", count=2)
    assert scores["repeated"] == 100
    assert scores["bits saved per byte"] == pytest.approx(8)


def test_infilling_of_a_model_that_knows(model, small_tokenizer, tmp_path, monkeypatch):
    """Each measure says what is true of the text; examples are of all span types, always the
    same, and have real spans of their type."""
    documents = [{"text": CODE.replace("item", f"item{i}"), "path": f"{i}.py"} for i in range(5)]
    examples = evaluate.infilling_examples(documents, 20)
    assert examples == evaluate.infilling_examples(documents, 20) and len(examples) == 100
    for example in examples:
        text = example["prefix"] + example["middle"] + example["suffix"]
        assert text in [document["text"] for document in documents]
        assert example["middle"].strip() and len(example["middle"]) <= 160
        if example["span_type"] == "arguments":
            assert re.search(r"\w\($", example["prefix"]) and example["suffix"][0] == ")"
        if example["span_type"] == "block":
            assert re.search(r":\n *$", example["prefix"])
    plain = [{"text": "a b c\nd e f\n" * 9, "language": "text"}]
    assert {example["span_type"] for example in evaluate.infilling_examples(plain, 5)} == {
        "characters", "lines", "words"}
    model_texts = {
        "characters": lambda example: (example["middle"], True),
        "lines": lambda example: ("(", True),
        "words": lambda example: (example["middle"], False),
        "block": lambda example: (example["middle"] + example["suffix"], True),
        "arguments": lambda example: (example["middle"] + "x" * 500, True)}
    monkeypatch.setattr(evaluate, "complete", lambda *args, **other: [
        model_texts[example["span_type"]](example) for example in examples])
    scores = evaluate.measure_infilling(model, small_tokenizer, examples, tmp_path / "figure.png")
    exact = {"exact, %": 100, "similar": 100, "parses, %": 100, "runs on, %": 0, "length": 1}
    for name, value in exact.items():
        assert scores["characters"][name] == scores["words"][name] == value, name
    assert scores["characters"]["stops, %"] == 100 and scores["words"]["stops, %"] == 0
    assert scores["lines"]["parses, %"] == scores["lines"]["exact, %"] == 0
    assert scores["block"]["runs on, %"] > 20 and scores["lines"]["length"] < 0.5
    assert scores["arguments"]["stops, %"] == 0
    assert 1 < scores["lines"]["bits per byte"] < 20
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="nothing to infill"):
        evaluate.infilling_examples([{"text": "\n\n", "path": "a.py"}])


def test_bits_of_an_answer_are_its_own(model, small_tokenizer):
    """In a batch as alone, and the sum of what its tokens cost."""
    prompts = [small_tokenizer.encode(CODE[:n]) for n in (9, 30, 17)]
    answers = [small_tokenizer.encode(CODE[n:n + m]) for n, m in ((9, 5), (30, 20), (17, 11))]
    bits = evaluate.answer_bits(model, prompts, answers)
    for prompt, answer, cost in zip(prompts, answers, bits):
        logits = model(torch.tensor([prompt + answer])).detach().log_softmax(-1)[0]
        alone = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert cost == pytest.approx(alone / math.log(2), rel=1e-4)


def test_sandbox_needs_no_package():
    code = "import sys, support.sandbox; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.stdout == "False\n"


def run_filter(program, arch, number, *args):
    """What a seccomp program answers to a call: a small classic BPF machine."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    steps, at, value = list(struct.iter_unpack("HBBI", program)), 0, None
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x20:                                        # load
            [value] = struct.unpack_from("<I", data, operand)
        elif code == 0x54:                                      # and
            value &= operand
        elif code == 0x15:                                      # jump if equal
            at += yes if value == operand else no
        else:
            assert code == 0x06                                 # return
            return operand


def test_system_calls():
    allow, no_call, denied, again = 0x7FFF0000, *(
        0x50000 + number for number in (errno.ENOSYS, errno.EACCES, errno.EAGAIN))
    reading = [os.O_RDONLY | os.O_CLOEXEC]
    writing = [os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC]
    for column, (machine, arch) in enumerate(MACHINES.items()):
        program, with_folder = seccomp_filter(machine), seccomp_filter(machine, writing=True)
        numbers = {name: int(fields[column]) for name, *fields in map(str.split, CALLS.split(","))
                   if fields[column] != "-"}
        opens = {name: place for name, place in (("open", 1), ("openat", 2)) if name in numbers}
        conditional = {numbers[name] for name in (*CONDITIONS, *opens) if name in numbers}
        for number in set(range(600)) - conditional:
            answer = allow if number in numbers.values() else no_call
            assert run_filter(program, arch, number) == answer, (machine, number)
        for name, place in opens.items():
            for mode in reading + writing:
                args = arch, numbers[name], *[0] * place, mode
                assert run_filter(program, *args) == (allow if mode in reading else denied)
                assert run_filter(with_folder, *args) == allow
        for name in ("clock_gettime", "clock_nanosleep"):
            assert run_filter(program, arch, numbers[name], 2) == allow             # of the process
            assert run_filter(program, arch, numbers[name], 0xFFFFFFF2) == denied   # of process 1
        for name in ("sched_getaffinity", "prlimit64"):
            assert run_filter(program, arch, numbers[name], 0) == allow
            assert run_filter(program, arch, numbers[name], 7) == denied
        clone = arch, numbers["clone"]
        assert run_filter(program, *clone, 0x3D0F00) == allow                       # a thread
        for flags in (0x1200011, 0x3D0F00 | 0x1000, 0x3D0F00 & ~0x10000):   # a process, pidfd, ...
            assert run_filter(program, *clone, flags) == again
        assert run_filter(program, arch, numbers["futex"], 0, 128) == allow         # of the process
        assert run_filter(program, arch, numbers["futex"], 0, 0) == again           # of all
        assert run_filter(program, 0x40000003, 1) == 0x80000000                     # i386: killed
        assert run_filter(program, arch, 0x40000000 + 1) == no_call                 # x32
    assert seccomp_filter("riscv64") is None


def test_plain_values_cross():
    class Liar(list):
        def __iter__(self):
            return itertools.count()

    values = [None, True, 2**70, -10**3000, 0.1, -0.0, math.inf, 1j, "é\ud800\0", b"\xff", [1, [2]],
              (1, (2,)), {1, 2}, frozenset([3]), {(1, 2): {"a": ()}}, [], (), {}, bytearray(b"x")]
    for value in values:
        back, _ = decode(json.loads(json.dumps(encode(value))))
        assert back == value and type(back) is type(value)
    assert decode(encode(Liar([1, 2])))[0] == [1, 2]
    for bad in ([[0], [["set", [0]]]], [[1], [["list"]]], [[0], [["eval", "1"]]], {}, [[0], 3]):
        with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
            decode(bad)


def test_ladder_cannot_be_guessed():
    rows = [row for _, row in read_rows(ROOT / "assets" / "ladder.jsonl")]
    for answer in ("None", "0", "1", "True", "False", "''", "[]", "{}", "first"):
        count = 0
        for row in rows:
            names = {}
            exec(row["test"], names)
            with contextlib.suppress(Exception):            # written by us: no sandbox needed
                names[row["entry_point"]] = function = lambda *args: (
                    args[0] if answer == "first" else eval(answer))
                names["check"](function)
                count += 1
        assert count <= 0.02 * len(rows), answer


def test_pass_at_k():
    for n in range(1, 11):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            expected = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError):
        pass_at_k(2, 1, 3)
    low, high = bootstrap([1.0] * 50 + [0.0] * 50)
    assert 0.36 < low < 0.44 < 0.56 < high < 0.64


def test_edit_similarity():
    """2 M / T by hand: abcd and abxd share a, b, d."""
    cases = {("abcd", "abxd"): 75.0, ("", ""): 100.0, ("a", ""): 0.0, ("kitten", "sitting"):
             200 * 4 / 13, ("x = 1", "x = 1"): 100.0, ("ab", "ba"): 50.0,
             ("abcdxx", "xxadbc"): 50.0}
    for (a, b), score in cases.items():
        assert edit_similarity(a, b) == edit_similarity(b, a) == pytest.approx(score)


def test_the_line_that_is_scored():
    lines = {"a = 1\nb": "a = 1", "\n  a\nb": "a", " \n a\n": "a", "": "", "  x  ": "x"}
    assert {text: evaluate.first_line(text) for text in lines} == lines
