"""pytest tests/test_dpo.py: the losses, the pairs, and the real script."""

import argparse
import contextlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import CODE, ROOT, SMALL, answered, fill_weights, script_folder

import dpo
import pretrain
import sft
from data import tokens_in_memory
from dpo import answer_log_probs, balanced, closest, dpo_loss, pair_batch, preference_loss
from model import CausalLM, Config, load_model
from support.checkpoint import read_metrics
from support.files import InputError, read_rows

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())["preferences"]
PAIRS = [([5, 17, 3], [88, 42, 9, 61], [88, 30]), ([7, 7], [1, 2], [3, 4, 5, 6]),
         ([9, 8, 7, 6, 5], [11], [12])]

# ---- the losses


@pytest.mark.parametrize("case", GOLDEN, ids=[case["kind"] for case in GOLDEN])
def test_losses_rewards_and_gradients_equal_trl(case):
    inputs = [torch.tensor(row, requires_grad=True) for row in case["inputs"]]
    losses = dpo_loss(*inputs, beta=case["beta"], kind=case["kind"])
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(case["losses"], abs=1e-6, rel=1e-6)
    for name, policy, reference, gradient in zip(("chosen", "rejected"), inputs[:2], inputs[2:],
                                                 case["gradients"]):
        assert policy.grad.tolist() == pytest.approx(gradient, abs=1e-6)
        rewards = case["beta"] * (policy - reference)
        assert rewards.tolist() == pytest.approx(case[name], rel=1e-6)


@pytest.mark.parametrize("kind, expected", [("sigmoid", math.log(2)), ("length", math.log(2)),
                                          ("ipo", 1 / (4 * 0.1 ** 2))])
def test_the_loss_at_the_first_step(small_model, kind, expected):
    batch = pair_batch(PAIRS)
    with torch.no_grad():
        batch["reference"], _ = answer_log_probs(small_model, batch)
    loss, metrics = preference_loss(small_model, batch, 0.1, kind, 0.0)
    assert loss.item() / 3 == pytest.approx(expected, abs=1e-6)
    assert all(metrics[f"rewards/{name}"].item() == 0
               for name in ("chosen", "rejected", "margins", "accuracies"))
    with_nll, _ = preference_loss(small_model, batch, 0.1, kind, 0.5)
    chosen_alone, _ = preference_loss(small_model, batch, 0.1, "chosen", 0.5)
    assert with_nll.item() == pytest.approx(3 * expected + 0.5 * chosen_alone.item(), abs=1e-5)
    assert metrics["loss/preference"].item() == pytest.approx(3 * expected, abs=1e-5)
    assert metrics["loss/chosen"].item() == pytest.approx(chosen_alone.item(), abs=1e-5)


def test_log_probabilities_are_those_of_the_answers(small_model):
    """Equal to sums by hand, whatever the batch; those of the reference model, too."""
    sums, counts = dpo.pair_log_probs(small_model, PAIRS, 2)
    for i, (prompt, *answers) in enumerate(PAIRS):
        for j, answer in enumerate(answers):
            with torch.no_grad():
                logits = small_model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
            expected = logits.float().log_softmax(-1)[range(len(answer)), answer].sum().item()
            assert sums[j, i].item() == pytest.approx(expected, abs=1e-5)
            assert counts[j, i] == len(answer)


def test_fim_sequences_beside_the_pairs(small_tokenizer):
    """A quarter as many as pairs; their mean loss weighs as much as a pair's."""
    documents = [{"text": CODE * 3, "path": f"{i}.py", "language": "python"} for i in range(9)]
    tokens = tokens_in_memory(documents, small_tokenizer)
    # 32 pairs a step, and eight FIM sequences in batches of 6 and 2
    args = SimpleNamespace(seed=0, seq_len=64, batch_tokens=4096, device_batch=6)
    batches = dpo.PairBatches(PAIRS, torch.zeros(2, 3), tokens, small_tokenizer, args)
    pairs = [batch for batch in batches(0) if batch["count"]]
    code = batches(0)[len(pairs):]
    assert sum(batch["count"] for batch in pairs) == 32
    assert [len(batch["input_ids"]) for batch in code] == [6, 2]
    assert all(small_tokenizer.special["<|fim_middle|>"] in ids
               for batch in code for ids in batch["input_ids"])
    assert not torch.equal(code[0]["input_ids"], batches(1)[len(pairs)]["input_ids"])
    model = fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": small_tokenizer.vocab_size})))
    summed = sum(model(batch["input_ids"], batch["document_starts"], batch["targets"]).item()
                 for batch in code)
    mean = summed / sum((batch["targets"] != -100).sum().item() for batch in code)
    for kind, nll in (("sigmoid", 10), ("chosen", 1)):
        losses, metrics = zip(*(dpo.step_loss(model, batch, 1, kind, 10) for batch in code))
        assert sum(losses).item() == pytest.approx(32 * nll * mean, rel=1e-5)
        assert sum(m["loss/code"] for m in metrics).item() == pytest.approx(32 * mean, rel=1e-5)


# ---- pairs


def test_the_closest_pairs():
    passed, failed = ["return n + 12", "m = n\nreturn m + 12"], ["while n: pass", "return n + 13"]
    assert closest(passed, failed) == [("return n + 12", "return n + 13"),
                                       ("m = n\nreturn m + 12", "while n: pass")]
    assert closest(passed, failed, 1) == [("return n + 12", "return n + 13")]
    assert closest(passed, []) == []


def test_lengths_are_balanced():
    pairs = [{"chosen": "x" * n, "rejected": "x" * 10} for n in [*range(10, 31), 4, 4, 4]]
    remaining = balanced(pairs)
    assert abs(sum(len(pair["chosen"]) - 10 for pair in remaining)) <= len(remaining)
    assert max(len(pair["chosen"]) for pair in remaining) < 30 and len(remaining) > 9
    assert balanced([]) == []


def test_pairs_from_the_sandbox(monkeypatch, small_model, small_tokenizer):
    """Of each task the passing and the failing answers, each text once, none cut off."""
    samples = [[("a", True, True), ("a", True, True), ("b", True, False), ("c", False, False)],
               [("a", True, True)] * 4, [("b", True, False)] * 4, [("c", False, False)] * 4]
    monkeypatch.setattr(dpo, "solve", lambda *args, **sampling: samples)
    monkeypatch.setattr(dpo, "TASKS", 4)
    args = SimpleNamespace(seed=0, weak_sandbox=False, problems=None)
    counts = Counter()
    [pair] = dpo.sampled_pairs(small_model, small_tokenizer, args, 1, counts)
    assert pair["chosen"] == "```python\na\n```" and pair["rejected"] == "```python\nb\n```"
    assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
    assert counts == {"answers": 16, "that pass": 6, "tasks always solved": 1,
                      "tasks never solved": 1}


def test_ids_of_a_pair(small_tokenizer):
    """The prompt ends where the answer begins; each answer has its <|im_end|>."""
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no",
            "tools": [{"type": "function", "function": {"name": "add"}}]}
    prompt, chosen, rejected = dpo.pair_ids(small_tokenizer, pair)
    assert small_tokenizer.decode(prompt) == small_tokenizer.render_chat(
        pair["prompt"], pair["tools"], add_generation_prompt=True)
    assert small_tokenizer.decode(chosen) == "yes<|im_end|>"
    assert small_tokenizer.decode(rejected) == "no<|im_end|>"


# ---- the real script

FAST = ["--device", "cpu", "--steps", "6", "--seq-len", "128", "--batch-tokens", "1024",
        "--eval-every", "3", "--save-every", "2", "--dtype", "float32", "--lr", "1e-3"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A root folder with data, a random model as out/sft, and pairs.jsonl."""
    script_folder(tmp_path, "sft", monkeypatch)
    monkeypatch.setattr(dpo, "TASKS", 3)
    write_pairs(tmp_path / "pairs.jsonl", [(f"return {i}", f"return {i + 1}") for i in range(20)])
    return tmp_path


def write_pairs(path, answers):
    path.write_text("".join(json.dumps(
        {"prompt": f"Give {i}.", "chosen": chosen, "rejected": rejected}) + "\n"
        for i, (chosen, rejected) in enumerate(answers)))


def script(monkeypatch, out, *flags):
    monkeypatch.setattr("sys.argv", ["dpo.py", "--out", str(out), *FAST, *flags])
    dpo.main()


def test_pairs_from_a_judge(monkeypatch, out, teacher):
    (out / "instructions").mkdir()
    (out / "instructions" / "train.jsonl").write_text("".join(json.dumps(
        {"messages": [{"role": "user", "content": f"question {i}"}, {}], "source": "code",
         "tools": None}) + "\n" for i in range(2)))
    answers = [("one", True), ("two", True)] * 2
    monkeypatch.setattr(dpo, "complete", lambda *args, **sampling: answers)

    def judge(body):                        # always the first answer to question 1
        text = body["messages"][0]["content"]
        one_is_first = text.index("one") < text.index("two")
        return answered("A" if one_is_first or "question 1" in text else "B")

    teacher.answer = judge
    script(monkeypatch, out, "--build", "--judge", teacher.url)
    [(_, pair)] = read_rows(out / "preferences_1" / "pairs.jsonl")
    assert pair == {"prompt": [{"role": "user", "content": "question 0"}], "chosen": "one",
                    "rejected": "two", "source": "judge"}


def test_pairs_from_problems_with_tests(out, monkeypatch, capsys):
    """Of MBPP only the training split is used, without what it shares with the test split."""
    def row(number, name, text="Return the larger number"):
        return {"task_id": number, "text": f"{text} as {name}.",
                "code": f"def {name}(a, b):\n    return max(a, b)",
                "test_list": [f"assert {name}(1, 2) == 2", f"assert {name}(3, 2) == 3"]}

    long_text = "Write a function that tells which one of two given numbers is the larger one."
    rows = [row(11, "test_split", long_text), row(600, "validation"), row(601, "first"),
            row(974, "last"), row(700, "test_split", long_text)]
    problems = out / "mbpp.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    def complete(model, tokenizer, prompts, tokens, *rest, samples, **sampling):
        asked.extend(map(tokenizer.decode, prompts))
        assert tokens == 64 and samples == 4                        # half of --seq-len
        return [(f"def first(a, b):\n    return {value}", True)
                for _ in prompts for value in ("max(a, b)", "min(a, b)", "min(b, a)", "max(b, a)")]

    monkeypatch.setattr(sft, "complete", complete)
    script(monkeypatch, out, "--build", "--problems", str(problems))
    assert "3 problems, 1 contaminated" in capsys.readouterr().out
    assert [text.split("assert ")[1].split("(")[0] for text in asked] == ["first", "last"]
    pairs = [pair for _, pair in read_rows(out / "preferences_1" / "pairs.jsonl")]
    assert {pair["chosen"] for pair in pairs} == {
        f"```python\ndef first(a, b):\n    return max({order})\n```" for order in ("a, b", "b, a")}
    assert all(pair["prompt"][1]["content"].startswith("Can you complete") for pair in pairs)


@pytest.mark.parametrize("solution", [{}, {"canonical_solution": None}])
def test_problems_need_no_solution(tmp_path, solution):
    problem = {"task_id": "my/0", "prompt": 'def double(x):\n    """Twice x."""\n',
               "entry_point": "double", **solution,
               "test": "def check(candidate):\n    assert candidate(2) == 4\n"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    [read] = dpo.problems_of_file(tmp_path / "problems.jsonl", {})
    assert read["prompt"] == problem["prompt"]


def test_pairs_of_a_file(out, monkeypatch, capsys):
    """They stay whatever their lengths; skipped rows are reported; other settings are refused."""
    path = out / "own.jsonl"
    write_pairs(path, [("n = 1  # one", "n = 1"), ("a", "a"), ("b", "b")])
    script(monkeypatch, out, "--build", "--data", str(path))
    [(_, pair)] = read_rows(out / "preferences_1" / "pairs.jsonl")
    assert pair["chosen"] == "n = 1  # one"
    assert (f"--data: skipped 2: chosen and rejected are the same (first: {path}, line 2)\n"
            in capsys.readouterr().out)
    with pytest.raises(InputError, match="preferences_1 was made from data .*own.jsonl"):
        script(monkeypatch, out, "--build")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_prefers_and_resumes_exactly(out, monkeypatch, capsys):
    flags = ("--data", str(out / "pairs.jsonl"), "--nll", "0", "--rounds", "2")
    monkeypatch.setattr(sft, "measure", lambda folder, *args: {
        "x": [0.0, 100.0 * (folder == str(out / "dpo"))], "y": 0.5})
    monkeypatch.setattr(sft, "solve", lambda *args: [])
    script(monkeypatch, out, *flags)
    printed = capsys.readouterr().out
    assert "preferences_1: 20 pairs" in printed and "20 kept" in printed
    assert "+50.0 (+0.0 to +100.0)" in printed and "+0.00" in printed      # what was gained
    first, *_, last = read_metrics(out / "dpo_1")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and last["loss"] < first["loss"]
    assert last["rewards/margins"] > 0 and last["rewards/accuracies"] > 0.5
    assert "validation accuracy" in last
    assert (out / "dpo" / "preferences.png").stat().st_size > 10_000
    weights = {name: load_model(out / name, "cpu").state_dict() for name in ("dpo", "dpo_1")}
    script(monkeypatch, out, *flags)
    assert "dpo is finished" in capsys.readouterr().out

    def stop(model, step):
        raise KeyboardInterrupt

    train = dpo.train
    monkeypatch.setattr(dpo, "train", lambda *args: train(*args[:5], stop))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        script(monkeypatch, out, *flags, "--fresh")
    assert (out / "dpo").exists() and not (out / "dpo_1").exists()      # the old model is kept
    monkeypatch.setattr(dpo, "train", train)
    script(monkeypatch, out, *flags)
    printed = capsys.readouterr().out
    assert "resuming after step 2 of" in printed and "round 2, starting from" in printed
    for folder, before in weights.items():
        resumed = load_model(out / folder, "cpu").state_dict()
        assert all(torch.equal(before[name], resumed[name]) for name in before)


def test_lora(out, monkeypatch):
    """The reference is the model before training, whose adapter changes nothing."""
    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    script(monkeypatch, out, "--data", str(out / "pairs.jsonl"), "--nll", "0", "--lora", "4",
           "--lr", "0.003")
    first, *_, last = read_metrics(out / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and last["loss"] < first["loss"]
    assert (out / "dpo" / "adapter" / "adapter_model.safetensors").exists()
    base, tuned = (load_model(out / stage, "cpu").state_dict() for stage in ("sft", "dpo"))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(name.endswith("proj.weight") for name in changed)


def test_a_collapse_stops_the_run(out, monkeypatch):
    monkeypatch.setattr(dpo, "COLLAPSED", -9.0)
    with pytest.raises(InputError, match="step 3: the chosen answers have lost .* lower --lr"):
        script(monkeypatch, out, "--data", str(out / "pairs.jsonl"))
    assert not (out / "dpo").exists()


@pytest.mark.parametrize("loss, accuracy", [("sigmoid", 1.0), ("length", 0.0)])
def test_validation_pairs_are_compared_as_the_loss_does(out, monkeypatch, loss, accuracy):
    """Two nats gained in 20 tokens are more than one and a half in 10 as sums, less as means."""
    def train(*args):
        monkeypatch.setattr(dpo, "pair_log_probs", lambda *args: (
            torch.tensor([[2.0], [1.5]]), torch.tensor([[20], [10]])))
        evaluate = args[-1]
        assert evaluate(None, 3) == {"bpb": 1.0, "validation accuracy": accuracy}
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "train", train)
    monkeypatch.setattr(dpo, "bits_per_byte", lambda *args: 1.0)
    monkeypatch.setattr(dpo, "pair_log_probs",
                        lambda model, pairs, _: (torch.zeros(2, len(pairs)), None))
    with pytest.raises(KeyboardInterrupt):
        script(monkeypatch, out, "--data", str(out / "pairs.jsonl"), "--loss", loss)


@pytest.mark.parametrize("flags, problem", [
    ([], "no pairs: 12 answers, 0 that pass.*; train the model longer"),
    (["--data", "PAIRS", "--seq-len", "8", "--batch-tokens", "64"], "0 pairs are left"),
    (["--data", "PAIRS", "--batch-tokens", "128"], "0 pairs of two sequences of 128 tokens"),
    (["--beta", "nan"], "--rounds and --beta must be above 0"),
    (["--save-every", "0"], "--save-every: must be at least 1"),
    (["--judge", "http://127.0.0.1:9/v1"], "lists no model"),
    (["--data", "none"], "none: no such file"),
    (["--out", "empty"], "no finished model of sft; run `python sft.py` first")])
def test_bad_input(out, monkeypatch, flags, problem):
    flags = [flag.replace("PAIRS", str(out / "pairs.jsonl")) for flag in flags]
    with pytest.raises(InputError, match=problem):
        script(monkeypatch, out, *flags)
    assert not (out / "dpo").exists()


@pytest.mark.parametrize("stage", [pretrain, sft, dpo])
def test_every_preset_is_made_of_whole_sequences(stage):
    """None is refused once the model is loaded."""
    parser = argparse.ArgumentParser()
    pretrain.training_flags(parser)
    presets = [*stage.PRESETS.values(), stage.PUBLISHED]
    if stage is pretrain:
        presets = [preset for phases in presets for preset in phases.values()]
    for preset in presets:
        args = pretrain.fill_in(parser.parse_args([]), preset)
        assert args.batch_tokens // args.seq_len >= args.device_batch
