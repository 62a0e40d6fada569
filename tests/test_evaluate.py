"""pytest tests/test_evaluate.py: scores, completions, prompts, answers; test_grader.py: grading."""

import itertools
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CODE, SMALL, fill_weights, reference_data

import evaluate
from evaluate import (benchmarks, bits_per_byte, bootstrap, code_block, compare, complete,
                      edit_similarity, final_number,
                      pass_at_k, plant, read_documents)
from fim import infill
from model import CausalLM, Config, generate, save_model
from support.benchmarks import to_problem
from support import plots
from support.files import InputError, read_rows


@pytest.fixture
def model(small_tokenizer):
    model = fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": 416}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)           # otherwise it would repeat a single token
    return model


def test_pass_at_k_counts_the_draws_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            expected = sum(min(draw) < c for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError):
        pass_at_k(2, 1, 3)
    low, high = bootstrap([1.0] * 50 + [0.0] * 50)
    assert 0.36 < low < 0.44 < 0.56 < high < 0.64


@pytest.mark.parametrize("a, b, score", [
    ("abcd", "abxd", 75.0), ("", "", 100.0), ("a", "", 0.0), ("kitten", "sitting", 800 / 13),
    ("ab", "ba", 50.0), ("abcdxx", "xxadbc", 50.0)])
def test_edit_similarity(a, b, score):
    assert edit_similarity(a, b) == edit_similarity(b, a) == pytest.approx(score)


def test_each_document_is_read_in_sequences_after_an_end_of_text(model, small_tokenizer):
    T = model.config.max_position_embeddings
    end = small_tokenizer.special["<|endoftext|>"]
    text = "é" + CODE * 3
    ids = [end, *small_tokenizer.encode(text), end]
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        sequence = torch.tensor([ids[start:start + T + 1]])
        log_probs = model(sequence[:, :-1]).log_softmax(-1).detach()
        nats -= float(log_probs.gather(-1, sequence[:, 1:, None]).sum())
    expected = pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    for count in (1, 2):
        assert bits_per_byte(model, small_tokenizer, [{"text": text}] * count) == expected


def test_bits_of_an_answer(model, small_tokenizer):
    """The sum of what its tokens cost, in a batch as alone."""
    prompts = [small_tokenizer.encode(CODE[:n]) for n in (9, 30, 17)]
    answers = [small_tokenizer.encode(CODE[n:n + m]) for n, m in ((9, 5), (30, 20), (17, 11))]
    bits = evaluate.answer_bits(model, prompts, answers)
    for prompt, answer, cost in zip(prompts, answers, bits):
        log_probs = model(torch.tensor([prompt + answer])).detach().log_softmax(-1)[0]
        nats = -sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert cost == pytest.approx(nats / math.log(2), rel=1e-4)


@pytest.mark.parametrize("name, data, expected", [
    ("a.py", b"\xef\xbb\xbfe\xcc\x81\r\ny", ["é\ny"]),
    ("b.jsonl", b'\xef\xbb\xbf{"text": "1"}\r\n{"text": "\\ufeff2"}\r\n', ["1", "2"]),
    ("b.jsonl", b'{"text": "1"}\n{"txt": "2"}\n', 'b.jsonl, line 2: expected {"text"'),
    ("c.py", b"\xff\xfe", "c.py: not UTF-8 text")])
def test_documents_from_files(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    if isinstance(expected, list):
        assert [document["text"] for document in read_documents(tmp_path / name)] == expected
    else:
        with pytest.raises(InputError, match=expected):
            read_documents(tmp_path / name)


def test_a_batch_gives_what_each_prompt_gives_alone(model, small_tokenizer):
    """Also where a stop string, the number of new tokens or the context ends a completion."""
    prompts = [small_tokenizer.encode(text) for text in
               ("def", CODE[:40], CODE[:17], CODE * 2, "class Stack:")]
    stops = ["def", "ota"]
    alone = [complete(model, small_tokenizer, [prompt], 20, stops)[0] for prompt in prompts]
    assert complete(model, small_tokenizer, prompts, 20, stops) == alone
    whole = complete(model, small_tokenizer, prompts, 20)
    assert alone == [(re.split("def|ota", text)[0], bool(re.search("def|ota", text)))
                     for text, _ in whole]
    assert {stopped for _, stopped in alone} == {True, False}


@pytest.mark.parametrize("cache_bytes", [1 << 30, 40_000, 1])
def test_several_samples_of_each_prompt(model, small_tokenizer, monkeypatch, cache_bytes):
    """They are in the order of the prompts, whatever the size of batches, and all differ."""
    monkeypatch.setattr(evaluate, "CACHE_BYTES", cache_bytes)
    prompts = [small_tokenizer.encode(text) for text in (CODE[:40], "def", "class Stack:")]
    greedy = complete(model, small_tokenizer, prompts, 6, ["e"])
    assert complete(model, small_tokenizer, prompts, 6, ["e"], samples=3) == [
        completion for completion in greedy for _ in range(3)]
    by_seed = [complete(model, small_tokenizer, prompts, 9, samples=3, temperature=2.0, seed=seed)
               for seed in (3, 4, 3)]
    assert by_seed[0] == by_seed[2]
    assert len({*by_seed[0], *by_seed[1]}) == 18


def test_yarn_extends_the_context_of_prompts(model, small_tokenizer, monkeypatch):
    """Bits per byte keep the sequences of training."""
    lengths = []

    def generate(model, prompts, *rest, **options):
        lengths.append(len(prompts[0]))
        options["on_end"](0, [])

    monkeypatch.setattr(evaluate, "generate", generate)
    bits = []
    for scaling in (None, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}):
        model.config.rope_scaling = scaling
        complete(model, small_tokenizer, [[65] * 150], 8)
        bits.append(bits_per_byte(model, small_tokenizer, [{"text": CODE}]))
    assert lengths == [64 - 8, 150] and bits[0] == bits[1]


def test_cached_completions_are_not_generated_again(model, small_tokenizer, tmp_path, monkeypatch):
    prompts = [small_tokenizer.encode(CODE[:n]) for n in range(5, 45)]
    cache = tmp_path / "cache"
    generated = []                                                      # how many each time

    def counting(model, prompts, *rest, **options):
        generated.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(evaluate, "generate", counting)
    sampling = dict(samples=2, temperature=1.0, cache=cache)
    completions = complete(model, small_tokenizer, prompts, 9, ["e"], **sampling)
    assert generated == [80]
    lines = cache.read_text().split("\n")
    killed = "\n".join([*lines[:31], lines[31][:30]]).encode()          # after 30 completions
    for data, expected in ((cache.read_bytes(), []), (b"\xff", [80]), (b"5\n", [80]),
                           (killed, [50])):
        cache.write_bytes(data)
        generated.clear()
        assert complete(model, small_tokenizer, prompts, 9, ["e"], **sampling) == completions
        assert generated == expected
    generated.clear()
    complete(model, small_tokenizer, prompts, 8, ["e"], **sampling)     # other settings
    assert generated == [80]


@pytest.fixture
def samples_of(model, small_tokenizer, monkeypatch):
    """samples_of(benchmark, row, texts): the first prompt, and the samples of a model that writes
    these texts."""
    def call(name, row, texts, prompt="prompt"):
        prompts = []

        def complete(model, tokenizer, ids, *rest, **options):
            prompts.extend(map(tokenizer.decode, ids))
            return [(text, True) for text in texts]

        monkeypatch.setattr(evaluate, "complete", complete)
        problems = {"id": to_problem(row, name, 1)}
        samples = evaluate.model_samples(
            model, small_tokenizer, benchmarks()["benchmarks"][name][prompt], problems, len(texts))
        return prompts[0], samples

    return call


def test_prompts_of_the_report(samples_of):
    row = {"task_id": "a", "prompt": '\ndef f(x):\n    """One more."""\n\n', "entry_point": "f",
           "test": ""}
    prompt, samples = samples_of("humaneval", row, ["\treturn 1"])
    assert prompt == 'def f(x):\n    """One more."""\n'
    assert samples == [{"task_id": "id", "completion": "    return 1", "stopped": True}]
    texts = ["def f(x): pass", "Sure:\n```python\na = 1\n```\nand `b`", "a\n```"]
    prompt, samples = samples_of("humaneval", row, texts, "chat prompt")
    assert prompt == (
        "<|im_start|>system\nYou are an intelligent programming assistant to produce Python "
        "algorithmic solutions<|im_end|>\n<|im_start|>user\nCan you complete the following Python "
        'function?\n```python\ndef f(x):\n    """One more."""\n```\n<|im_end|>\n'
        "<|im_start|>assistant\n```python\n")
    assert [s["solution"] for s in samples] == ["def f(x): pass", "a = 1\n", "a\n"]

    row = {"code": "def f(a):\n    return {a}", "input": "'{code}'", "output": "{1}", "id": "s"}
    texts = ["I think.\n[/THOUGHT]\n[ANSWER]\nassert f('x') == {1}\n", "f(2)", "assert f(3)"]
    prompt, samples = samples_of("cruxeval-input", row, texts)
    assert prompt.endswith("[PYTHON]\ndef f(a):\n    return {a}\nassert f(??) == {1}\n[/PYTHON]\n"
                           "[THOUGHT]\n")
    assert [s["completion"] for s in samples] == ["f('x')", "f(2)", "f(3)"]
    prompt, samples = samples_of("cruxeval-output-direct", row, texts)
    assert prompt.endswith("assert f('{code}') == ??\n[/PYTHON]\n[ANSWER]\n")
    assert [s["completion"] for s in samples] == ["{1}", "f(2)", "assert f(3)"]


def test_numbers():
    """The last number is the answer, except for one that is announced as such."""
    texts = {"The answer is 1,234.50 dollars, not 3.": 1234.5, r"\boxed{-7} or 8": -7,
             "10-5 = 5": 5, "it costs $18": 18, "none": None, "a 3\nQuestion: b 4": 3,
             "The answer is: **42**": 42, "The answer is unknown. 6": 6, "-0.5": -0.5, "5-3": 3,
             "it costs $409 500.": 409500, "in 2019 300 people": 300, "so -$5": -5,
             "it is $.75": 0.75, "all in all 1 1/2 hours": 1.5, "1,00,000": 100000,
             "The answer is 18 - 3 = 15 dollars, not 4": 15, "The answer is 3. As 9 - 3 = 6": 3}
    boxed = {r"9{,}500": 9500, r"\$9,500.00": 9500, r"\text{9}": 9, "-3": -3, r"1\,000": 1000,
             r"10\%": 10, r"\frac{1}{2}": 0.5, r"-\dfrac34": -0.75, "1 000": 1000,
             r"3\frac{1}{2}": 3.5, r"12,\!345": 12345, "x = 5": 5, r"5 \times 4 = 20": 20,
             "1\u202f000": 1000, "3/4": 0.75, "\u22127": -7, "18.5 - 3.5 = 15.0": 15}
    texts |= {f"So 2 and $\\boxed{{{text}}}$.\n\nCheck: 4 = 4": value
              for text, value in boxed.items()}
    assert {text: final_number(text) for text in texts} == texts


def test_gsm8k():
    problem = to_problem({"question": "?", "answer": "<<3*6=18>>18\n#### 1,018"}, "gsm8k", 7)
    assert problem["task_id"] == "gsm8k/7" and problem["answer"] == 1018
    assert compare(problem, "so 1018.0 it is").passed and not compare(problem, "").passed
    for number, row in read_rows(reference_data("eval/gsm8k_test.jsonl.gz")):
        problem = to_problem(row, "gsm8k", number)
        assert compare(problem, problem["canonical_solution"]).passed
        assert problem["answer"] == int(row["answer"].split("#### ")[1].replace(",", ""))


RIGHT = "def f(x):\n    return x\n"
WRONG = "def f(x):\n    return 0\n"
USE = "```python\nprint(f(2))\n```\nprints\n```\n2\n```\n"


@pytest.mark.parametrize("info", [
    "", "python ", "{.python .numberLines}", "py", 'python title="a.py"', "solution.py", "c++"])
def test_code_after_any_fence(info):
    for opening, closing in (("```", "```"), ("~~~", "~~~ "), ("```", "`````")):
        answer = f"Run `f`:\n{opening}{info}\n{RIGHT}{closing}\nDone."
        assert code_block(answer) == code_block(answer.replace("\n", "\r\n"), "f") == RIGHT
        assert code_block(f"```bash\nls\n```\n{answer}\n{USE}", "f") == RIGHT
        for margin, first in (("\t", "\t"), ("   ", "1. "), ("> ", "> ")):
            lines = "".join(margin + line + "\n" for line in [*RIGHT.splitlines(), closing])
            assert code_block(f"{first}{opening}{info}\n{lines}2. run", "f") == RIGHT


def test_code_of_the_entry_point():
    """The last block that defines it; if there is none, what was cut off or is in no block."""
    fixed = f"```python\n{WRONG}```\nNo, rather:\n```python\n{RIGHT}```\n"
    inside = 'def f(x):\n    """Doc.\n\n    ```\n    f(1)\n    ```"""\n    return x\n'
    cases = {
        fixed: RIGHT, fixed + USE: RIGHT, USE + fixed: RIGHT,
        fixed.removeprefix("```python\n"): RIGHT,               # the prompt has opened the block
        RIGHT: RIGHT, f"So:\n```python\n{RIGHT}": RIGHT,
        f"```python\n{RIGHT}```\nOr:\n```python\ndef f(x):\n    if (": RIGHT,
        "```python\ndef f(x):\n    return x```\nDone": RIGHT,
        f"```python\n{RIGHT}\n{USE}": RIGHT + "\n",             # never closed
        f"```markdown\nHere:\n```python\n{RIGHT}```\n```\n": RIGHT,
        f"```python\n{RIGHT}```\n```python\nfrom a import f\n\nf(2)\n```\n": RIGHT,
        f"```python\n{RIGHT}```\n```python\nclass A:\n    def f(self):\n        2\n```\n": RIGHT,
        "```python\nf = lambda x: x\n```\n" + USE: "f = lambda x: x\n",
        "```python\ndef f(x)\n    return\n```\n" + USE: "def f(x)\n    return\n",
        f"```python\n{inside}```\n{USE}": inside,               # a fence in a docstring
        "I cannot do that.": "I cannot do that.", "": ""}
    assert {text: code_block(text, "f") for text in cases} == cases
    cases = {"Run\n```\nprint(1)\n```\nIt prints\n```\n1\n```": "print(1)\n",
             "No.\n```c++\nint f() {}\n": "int f() {}\n"}
    assert {text: code_block(text) for text in cases} == cases


def test_code_in_several_blocks():
    """Earlier blocks are included if they define what the function needs, and only then."""
    helper = "import math\n\n\ndef double(x):\n    return 2 * x\n"
    program = "def f(x):\n    return math.sqrt(double(x))\n"
    text = f"```python\n{helper}```\n{USE}\nand\n```python\n{program}```\n"
    assert code_block(text, "f") == f"{helper}\n\n{program}"
    program = "def f(x):\n    return max(x)\n"
    assert code_block(f"```python\nx = max = 1\n```\n```python\n{program}```", "f") == program


FIM_ROW = {"prompt": "ab", "suffix": "cd", "canonical_solution": "  x = 1", "language": "py"}


def test_humaneval_fim(samples_of):
    """The first infilled line is compared; each language has a score of its own."""
    prompt, samples = samples_of("humaneval-fim", FIM_ROW, ["\n  x = 1\ny", "x = 2", ""])
    assert prompt == "<|fim_prefix|>ab<|fim_suffix|>cd<|fim_middle|>"
    problem = to_problem(FIM_ROW, "humaneval-fim", 1)
    rows = [{**sample, **compare(problem, sample["completion"])._asdict()} for sample in samples]
    assert [row["passed"] for row in rows] == [True, False, False]
    rows.append({**rows[0], "task_id": "js"})
    problems = {"id": problem, "js": {**problem, "group": "js"}}
    scores = evaluate.print_scores("humaneval-fim", rows, problems)
    assert scores["py"] == pytest.approx(1 / 3) and scores["js"] == 1
    assert scores["edit similarity"] == pytest.approx((100 + 80 + 0 + 100) / 4)
    assert scores["exact match"] == pytest.approx((1 / 3 + 1) / 2)      # the mean over problems
    scores = evaluate.print_scores("humaneval-fim", rows[:3] * 4, problems)
    assert scores["exact match"] == pytest.approx(1 / 3) and scores["pass@10"] == 1


@pytest.mark.parametrize("changes, published", [
    ({}, 0.835), ({"limit": 1}, None), ({"temperature": 0.5, "n": 2}, None)])
def test_published_scores(model, small_tokenizer, monkeypatch, tmp_path, changes, published):
    """Printed for a model of a published size, if all problems were solved greedily."""
    monkeypatch.setitem(benchmarks(), "sizes", [5, sum(p.numel() for p in model.parameters())])
    args = SimpleNamespace(**{"chat": False, "resume": False, "timeout": None, "n": 1, "seed": 0,
                              "temperature": 0.0, "top_p": 1.0, "limit": None, "guard": False,
                              **changes})
    ask = (model, small_tokenizer, "humaneval-fim", {"py/1": to_problem(FIM_ROW, number=1)})
    scores = evaluate.ask_and_grade(*ask, tmp_path / "a", args)
    assert scores.get("published") == published and scores["samples"] == args.n
    completions = [row["completion"] for _, row in read_rows(tmp_path / "a.jsonl")]
    assert len(set(completions)) == args.n
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(InputError, match="no prompt for --chat"):
        evaluate.ask_and_grade(*ask, tmp_path / "a", SimpleNamespace(chat=True))


def test_only_known_reasons_are_displayed(tmp_path, capsys):
    """No sample, results file or problem can forge a score or send escape codes to a terminal."""
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


def test_resumed_grading_ignores_damaged_rows(tmp_path, typed):
    """Rows without a valid grade are graded again. Samples may hold half a surrogate pair."""
    (tmp_path / "p.jsonl").write_text(json.dumps(FIM_ROW))
    sample = {"task_id": "py/1", "completion": "x = '\ud800'", "reason": "\ud800", "stopped": None}
    (tmp_path / "s.jsonl").write_text("\ufeff" + json.dumps(sample) + "\n", encoding="utf-8")
    command = ["evaluate.py", "score", "--benchmark", "humaneval-fim", "--problems",
               tmp_path / "p.jsonl", "--samples", tmp_path / "s.jsonl"]
    assert "1 wrong answer" in typed(*command).stdout
    results = tmp_path / "s.jsonl_results.jsonl"
    graded = json.loads(results.read_text())
    assert graded["completion"] == sample["completion"] and graded["reason"] == "wrong answer"
    for field in ("passed", "weak", "reason"):
        results.write_text(json.dumps({**graded, field: None}))
        assert typed(*command, "--resume").returncode == 0
        assert json.loads(results.read_text()) == graded


def test_comparison_with_a_baseline(tmp_path, typed):
    (tmp_path / "p.jsonl").write_text((json.dumps(FIM_ROW) + "\n") * 4)     # py/1 to py/4
    command = ["evaluate.py", "score", "--benchmark", "humaneval-fim", "--problems",
               tmp_path / "p.jsonl", "--samples"]
    answer = FIM_ROW["canonical_solution"]

    def samples(name, answers):
        (tmp_path / name).write_text("".join(
            json.dumps({"task_id": f"py/{number}", "completion": text}) + "\n"
            for number, text in enumerate(answers, 1)))
        return tmp_path / name

    typed(*command, samples("before", ["?", "?", answer, answer]))
    after = samples("after", [answer, answer, "?", answer])
    baseline = tmp_path / "before_results.jsonl"
    low, high = bootstrap([1, 1, -1, 0])
    assert typed(*command, after, "--baseline", baseline).stdout.endswith(
        f"  +0.2500 compared with {baseline} (95 % between {low:+.3f} and {high:+.3f}, "
        "4 problems)\n"
        "  better at 2: py/1 py/2\n  worse at 1: py/3\n"
        f"written: {tmp_path}/after_results.jsonl\n")

    (tmp_path / "other").write_text(json.dumps({"task_id": "other", "passed": True}))
    for arguments, problem in (
            ([*command, after, "--baseline", after], "--baseline: needs"),        # is not graded
            (["evaluate.py", "--baseline", baseline], "--baseline: needs"),
            ([*command, after, "--baseline", tmp_path / "other"], "none of these problems")):
        run = typed(*arguments)
        assert run.returncode == 2 and problem in run.stderr


def test_needle(model, small_tokenizer, tmp_path, monkeypatch):
    haystack = small_tokenizer.encode(CODE * 20)
    for depth in (0, 0.5, 1):
        context, plain, body = plant(small_tokenizer, haystack, 333, depth, random.Random(3))
        text, body_text = map(small_tokenizer.decode, (context, body))
        assert len(context) == len(plain) == 333 - len(body)
        assert text.index(body_text) / len(text) == pytest.approx(0.1 + 0.75 * depth, abs=0.1)
    with pytest.raises(InputError, match="60 tokens of context cannot hold a function"):
        plant(small_tokenizer, haystack, 60, 0, random.Random(3))

    # a model that copies from its context: a body that is not there costs 16 bits a byte
    def complete(model, tokenizer, prompts, *rest):
        texts = map(tokenizer.decode, prompts)
        return [(text.split(text[text.rindex("\ndef "):])[1], True) for text in texts]

    def answer_bits(model, prompts, answers):
        texts = [map(small_tokenizer.decode, pair) for pair in zip(prompts, answers)]
        return [0 if answer in prompt else 16 * len(answer) for prompt, answer in texts]

    monkeypatch.setattr(evaluate, "complete", complete)
    monkeypatch.setattr(evaluate, "answer_bits", answer_bits)
    model.config.max_position_embeddings = 256
    figure = tmp_path / "n.png"
    documents = [{"text": CODE * 20}]
    scores = evaluate.measure_needle(model, small_tokenizer, documents, figure, count=2)
    assert scores["repeated"] == 100 and scores["bits saved per byte"] == 16
    assert len(scores["maps"]["repeated, %"]) == 5 and scores["lengths"][-1] == 240
    assert figure.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="give more with --text"):
        evaluate.measure_needle(model, small_tokenizer, [{"text": "a"}], figure)


def test_infilling_examples():
    """Examples are always the same and have real spans of their type."""
    documents = [{"text": CODE.replace("item", f"item{i}"), "path": f"{i}.py"} for i in range(5)]
    examples = evaluate.infilling_examples(documents, 8)
    assert examples == evaluate.infilling_examples(documents, 8) and len(examples) == 40
    for example in examples:
        text = example["prefix"] + example["middle"] + example["suffix"]
        assert text in [document["text"] for document in documents]
        assert example["middle"].strip() and len(example["middle"]) <= 160
        if example["span_type"] == "arguments":
            assert re.search(r"\w\($", example["prefix"]) and example["suffix"][0] == ")"
        if example["span_type"] == "block":
            assert re.search(r":\n *$", example["prefix"])
    prose = [{"text": "a b c\nd e f\n" * 9}]
    assert {example["span_type"] for example in evaluate.infilling_examples(prose, 5)} == {
        "characters", "lines", "words"}
    with pytest.raises(InputError, match="nothing to infill"):
        evaluate.infilling_examples([{"text": "\n\n", "path": "a.py"}], 2)


def test_infilling_measures(model, small_tokenizer, tmp_path, monkeypatch):
    """A model that infills each span type in a way of its own, as the measures show."""
    examples = evaluate.infilling_examples([{"text": CODE, "path": "a.py"}], 8)
    completion_of = {
        "characters": lambda example: (example["middle"], True),
        "lines": lambda example: ("(", True),
        "words": lambda example: (example["middle"], False),
        "block": lambda example: (example["middle"] + example["suffix"], True),
        "arguments": lambda example: (example["middle"] + "x" * 500, True)}
    monkeypatch.setattr(evaluate, "complete", lambda *args, **other: [
        completion_of[example["span_type"]](example) for example in examples])
    scores = evaluate.measure_infilling(model, small_tokenizer, examples, tmp_path / "figure.png")
    exact = {"exact, %": 100, "similar": 100, "parses, %": 100, "length": 1}
    for span_type in ("characters", "words"):
        assert exact.items() <= scores[span_type].items()
    stops = {span_type: values["stops, %"] for span_type, values in scores.items()}
    assert stops["characters"] == 100 and stops["words"] == stops["arguments"] == 0
    assert scores["lines"]["parses, %"] == scores["lines"]["exact, %"] == 0
    assert scores["lines"]["length"] < 0.5
    assert 1 < scores["lines"]["bits per byte"] < 20
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def out(model, small_tokenizer, tmp_path):
    """A root folder of stages, with a pretrained model and a validation set."""
    save_model(model, tmp_path / "pretrain")
    small_tokenizer.save(tmp_path / "pretrain")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps({"text": CODE}))
    return tmp_path


def test_the_newest_model_on_everything(out, model, small_tokenizer, typed):
    command = ["evaluate.py", "--out", out, "--device", "cpu"]
    result = typed(*command, "--limit", "3", "--n", "2", "--temperature", "0.8")
    if "weak-sandbox" in result.stderr:
        pytest.skip(result.stderr)
    scores = json.loads((out / "evaluate" / "pretrain.json").read_text())["scores"]
    assert scores["ladder"]["samples"] == 6 and scores["ladder"]["problems"] == 3
    assert scores["ladder"]["level 1"] == 0 and "seccomp" in scores["ladder"]["layers"]
    assert 0 <= scores["infilling, lines"]["similar"] < 60
    assert (out / "evaluate" / "pretrain_infilling.png").read_bytes()[:4] == b"\x89PNG"
    assert set(scores["bits per byte"]) == {"gzip", "bz2", "xz", str(out / "pretrain")}
    assert "| ladder | pass@1 | 0 |" in (out / "evaluate" / "pretrain.md").read_text()
    printed = typed(*command, "--text", out / "data" / "validation.jsonl").stdout
    bits = bits_per_byte(model, small_tokenizer, [{"text": CODE}])
    assert f"{bits:.3f}" in printed and "1 documents" in printed


def test_ladders_of_all_models_in_one_figure(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "plot_ladder", lambda models, path: drawn.append(models))
    levels = {f"level {n}": n / 7 for n in range(1, 8)}
    for name, scores in (("a_ladder", {"ladder": {"problems": 140, **levels}}), ("b", {"x": {}}),
                         ("c_ladder_chat", {"ladder": {"problems": 140, **levels}}),
                         ("d_ladder", {"ladder": {"problems": 3, **levels}})):      # --limit
        (tmp_path / f"{name}.json").write_text(json.dumps({"scores": scores}))
    evaluate.compare_ladders(tmp_path)
    assert drawn == [{"a": list(levels.values()), "c_chat": list(levels.values())}]
    plots.plot_ladder(drawn[0], tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes()[:4] == b"\x89PNG"


def test_guard_ends_the_middles_of_a_benchmark(out, typed, model, small_tokenizer):
    """A row as in the published file; the middles are those of fim.py."""
    row = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "f", "suffix": "    b\n",
           "prompt": "def f(a, b):\n    ", "canonical_solution": "a",
           "test": "def check(f):\n    assert f(1, 2) is None\n"}
    problems = out / "HumanEval-SingleLineInfilling.jsonl"
    problems.write_text(json.dumps(row) + "\n")
    middles = set()
    for ending, flags in (("", []), ("_guard", ["--guard"])):
        result = typed("evaluate.py", "--out", out, "--device", "cpu", "--problems", problems,
                       "--benchmark", "infilling-single-line", *flags)
        if "weak-sandbox" in result.stderr:
            pytest.skip(result.stderr)
        samples = out / "evaluate" / f"pretrain_infilling-single-line{ending}.jsonl"
        expected = infill(model, small_tokenizer, row["prompt"], row["suffix"],
                          model.config.context_length // 2, guard=bool(flags))
        assert json.loads(samples.read_text())["completion"] == expected
        middles.add(expected)
    assert len(middles) == 2


@pytest.mark.parametrize("flags, message", [
    (["--limit", "0"], "must be at least 1"), (["--n", "2"], "equal samples"),
    (["--problems", "x"], "give the --benchmark"), (["--text", "no.py"], "no.py"),
    (["--benchmark", "infilling-multi-line"], "put HumanEval-MultiLineInfilling.jsonl.gz to /no")])
def test_bad_flags(out, typed, monkeypatch, flags, message):
    monkeypatch.setenv("MINICODER_CACHE", "/nowhere")
    result = typed("evaluate.py", "--out", out, *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr
