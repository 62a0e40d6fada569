"""pytest tests/test_dpo.py: the losses, the pairs, and the real script."""

import argparse
import contextlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CODE, ROOT, SMALL, answered, fill_weights, script_folder

import dpo
import pretrain
import sft
from data import tokens_in_memory
from dpo import (
    PairBatches,
    answer_log_probs,
    balanced,
    closest,
    dpo_loss,
    judged_pairs,
    pair_batch,
    pair_ids,
    preference_loss,
    reference_log_probs,
    same_code,
    sampled_pairs,
    step_loss,
)
from model import CausalLM, Config, load_model
from support.checkpoint import read_metrics
from support.files import InputError, read_rows

GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())["preferences"]
PAIRS = [([5, 17, 3], [88, 42, 9, 61], [88, 30]), ([7, 7], [1, 2], [3, 4, 5, 6]),
         ([9, 8, 7, 6, 5], [11], [12])]

# ---- the losses


@pytest.mark.parametrize("case", GOLDEN, ids=[case["kind"] for case in GOLDEN])
def test_losses_rewards_and_gradients_equal_trl(case):
    rows = [torch.tensor(row, requires_grad=True) for row in case["inputs"]]
    losses = dpo_loss(*rows, beta=case["beta"], kind=case["kind"])
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(case["losses"], abs=1e-6, rel=1e-6)
    assert [row.grad.tolist() for row in rows[:2]] == [
        pytest.approx(row, abs=1e-6) for row in case["gradients"]]
    rewards = [case["beta"] * (a - b) for a, b in zip(rows[:2], rows[2:])]
    assert rewards[0].tolist() == pytest.approx(case["chosen"], rel=1e-6)
    assert rewards[1].tolist() == pytest.approx(case["rejected"], rel=1e-6)


def batch_of(model, pairs):
    batch = pair_batch(pairs)
    with torch.no_grad():
        return {**batch, "reference": answer_log_probs(model, batch)[0]}


@pytest.mark.parametrize("kind, expected", [("sigmoid", math.log(2)), ("length", math.log(2)),
                                          ("ipo", 1 / (4 * 0.1 ** 2))])
def test_the_loss_at_the_first_step(small_model, kind, expected):
    loss, metrics = preference_loss(small_model, batch_of(small_model, PAIRS), 0.1, kind, 0.0)
    assert loss.item() / 3 == pytest.approx(expected, abs=1e-6)
    assert all(metrics[f"rewards/{name}"].item() == 0
               for name in ("chosen", "rejected", "margins", "accuracies"))
    with_nll, _ = preference_loss(small_model, batch_of(small_model, PAIRS), 0.1, kind, 0.5)
    alone, _ = preference_loss(small_model, batch_of(small_model, PAIRS), 0.1, "chosen", 0.5)
    assert with_nll.item() == pytest.approx(3 * expected + 0.5 * alone.item(), abs=1e-5)
    assert metrics["loss/preference"].item() == pytest.approx(3 * expected, abs=1e-5)
    assert metrics["loss/chosen"].item() == pytest.approx(alone.item(), abs=1e-5)


def test_log_probabilities_are_those_of_the_answers(small_model):
    """Summed by hand; the order in a batch does not change them."""
    batch = pair_batch(PAIRS)
    with torch.no_grad():
        sums, counts = answer_log_probs(small_model, batch)
        expected = []
        for prompt, answer in [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]:
            logs = small_model(torch.tensor([prompt + answer])).float().log_softmax(-1)[0]
            expected.append(sum(logs[len(prompt) - 1 + i, token].item()
                              for i, token in enumerate(answer)))
        assert sums.tolist() == pytest.approx(expected, abs=1e-5)
        assert counts.tolist() == [4, 2, 1, 2, 4, 1]
        reversed_order, _ = answer_log_probs(small_model, pair_batch(PAIRS[::-1]))
        assert reversed_order.tolist() == pytest.approx(
            [expected[i] for i in (2, 1, 0, 5, 4, 3)], abs=1e-5)


def test_code_beside_the_pairs(small_tokenizer):
    """FIM sequences: a quarter as many as pairs; their mean loss weighs as much as a pair's."""
    documents = [{"text": CODE * 3, "path": f"{i}.py", "language": "python"} for i in range(9)]
    tokens = tokens_in_memory(documents, small_tokenizer)
    args = SimpleNamespace(seed=0, seq_len=64, batch_tokens=1024, device_batch=4)
    middle = small_tokenizer.special["<|fim_middle|>"]
    batches = PairBatches(PAIRS, np.zeros((2, 3), np.float32), tokens, small_tokenizer, args)
    *pairs, code = batches(0)
    assert [batch["count"] for batch in pairs] == [2] * 4 and code["count"] == 0
    assert code["input_ids"].shape == (2, 64) and code["pairs"] == 8
    assert all(middle in row for row in code["input_ids"])
    assert not torch.equal(code["input_ids"], batches(1)[-1]["input_ids"])
    model = fill_weights(CausalLM(Config(**{**SMALL, "vocab_size": small_tokenizer.vocab_size})))
    mean = model(code["input_ids"], code["document_starts"], code["targets"]).item() / (
        code["targets"] != -100).sum().item()
    for kind, expected in (("sigmoid", 8 * 10 * mean), ("chosen", 8 * mean)):
        loss, metrics = step_loss(model, code, 1, kind, 10)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert metrics["loss/code"].item() == pytest.approx(8 * mean, rel=1e-5)
    args.device_batch, args.batch_tokens = 6, 4096      # eight FIM sequences in batches of 6 and 2
    code = [batch for batch in PairBatches(PAIRS, np.zeros((2, 3), np.float32), tokens,
                                           small_tokenizer, args)(0) if not batch["count"]]
    targets = [(batch["targets"] != -100).sum().item() for batch in code]
    assert [batch["pairs"] for batch in code] == pytest.approx(         # each token weighs the same
        [32 * n / sum(targets) for n in targets]) and len(code) == 2
    same = step_loss(model, {**pairs[0]}, 1, "sigmoid", 10)[0].item()
    assert same == preference_loss(model, pairs[0], 1, "sigmoid", 10)[0].item()


# ---- pairs


def test_the_closest_pairs():
    passed, failed = ["return n + 12", "m = n\nreturn m + 12"], ["while n: pass", "return n + 13"]
    assert closest(passed, failed) == [("return n + 12", "return n + 13"),
                                       ("m = n\nreturn m + 12", "while n: pass")]
    assert closest(passed, failed, 1) == [("return n + 12", "return n + 13")]
    assert closest(passed, []) == []


def test_comments_and_white_space_are_no_difference():
    assert same_code("```python\nn = 1  # one\n```", "```python\nn=1\n```")
    assert not same_code("```python\nn = 1\n```", "```python\nn = 2\n```")
    assert same_code("yes it is\n", "yes it is") and not same_code("yes it", "yes")
    long = "n = 1" + " + 1" * 1500                          # deeper than Python's recursion
    assert same_code(long, long + "\n") and not same_code(long, long + " + 1")


def test_lengths_are_balanced():
    pairs = [{"chosen": "x" * n, "rejected": "x" * 10, "i": n} for n in range(10, 31)]
    pairs += [{"chosen": "x" * 4, "rejected": "x" * 10}] * 3
    kept = balanced(pairs)
    assert abs(sum(len(p["chosen"]) - 10 for p in kept)) <= len(kept)
    assert max(len(p["chosen"]) for p in kept) < 30 and len(kept) > 9
    assert balanced([]) == []


def test_pairs_from_the_sandbox(monkeypatch, small_model, small_tokenizer):
    """Of each task the passing and the failing answers, each text once, none cut off."""
    results = [[("a", True, True), ("a", True, True), ("b", True, False), ("c", False, False)],
               [("a", True, True)] * 4, [("b", True, False)] * 4, [("c", False, False)] * 4]
    monkeypatch.setattr(dpo, "solve", lambda *args, **sampling: results)
    monkeypatch.setattr(dpo, "TASKS", 4)
    args, counts = SimpleNamespace(seed=0, weak_sandbox=False), Counter()
    [pair] = sampled_pairs(small_model, small_tokenizer, args, 1, counts)
    assert pair["chosen"] == "```python\na\n```" and pair["rejected"] == "```python\nb\n```"
    assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
    assert counts == {"answers": 16, "that pass": 6, "tasks always solved": 1,
                      "tasks never solved": 1}
    for answers, what in ((results[1], "everything"), (results[2], "nothing")):
        monkeypatch.setattr(dpo, "solve", lambda *args, own=answers, **sampling: [own] * 4)
        with pytest.raises(InputError, match=f"solves {what} of 4 tasks"):
            sampled_pairs(small_model, small_tokenizer, args, 1, Counter())


def test_pairs_from_a_judge(monkeypatch, tmp_path, teacher, small_model, small_tokenizer):
    """What the judge prefers in both orders; a preference for the first answer gives no pair."""
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions" / "train.jsonl").write_text("".join(json.dumps(
        {"messages": [{"role": "user", "content": f"question {i}"},
                      {"role": "assistant", "content": "x"}], "source": "code"}) + "\n"
        for i in range(2)))
    monkeypatch.setattr(dpo, "complete", lambda *args, **sampling: [
        (f"{word} answer", True) for _ in range(2) for word in ("good", "bad")])

    def judge(body):
        text = body["messages"][0]["content"]
        good_first = text.index("good") < text.index("bad")
        return answered("A" if good_first or "question 1" in text else "B")

    teacher.answer = judge
    args, counts = SimpleNamespace(seed=0, out=tmp_path, judge=teacher.url), Counter()
    [pair] = judged_pairs(small_model, small_tokenizer, args, counts)
    assert (pair["chosen"], pair["rejected"]) == ("good answer", "bad answer")
    assert pair["prompt"][0]["content"] == "question 0" and len(teacher.asked) == 4
    assert counts == {"judged tie": 1}
    teacher.answer = lambda body: answered("tie")
    for path in (tmp_path / "cache" / "answers").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="prefers none of 2 pairs in both orders"):
        judged_pairs(small_model, small_tokenizer, args, counts)


def test_given_pairs_stay_and_older_folders_are_refused(out, monkeypatch, capsys):
    """Pairs of a file stay although no code differs; the reason why others are skipped is told."""
    path = out / "own.jsonl"
    rows = [("n = 1  # one", "n = 1"), ("a", "a"), ("b", "b")]
    path.write_text("".join(json.dumps({"prompt": "q", "chosen": chosen, "rejected": rejected})
                            + "\n" for chosen, rejected in rows))
    flags = ("--build", "--data", str(path))
    script(monkeypatch, out, *flags)
    [(_, pair)] = read_rows(out / "preferences_1" / "pairs.jsonl")
    assert pair["chosen"] == "n = 1  # one"
    assert (f"--data: skipped 2: chosen and rejected are the same (first: {path}, line 2)\n"
            in capsys.readouterr().out)
    manifest = out / "preferences_1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2,', ""))       # an older version's
    with pytest.raises(InputError, match="preferences_1 was made from format None, not 2"):
        script(monkeypatch, out, *flags)
    path.write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="no usable row; line 1: chosen or rejected is missing"):
        script(monkeypatch, out, *flags, "--fresh")


def test_the_reference_is_computed_once(small_model, small_tokenizer, tmp_path, monkeypatch):
    known = reference_log_probs(small_model, small_tokenizer, PAIRS, 2, tmp_path)
    with torch.no_grad():
        sums, _ = answer_log_probs(small_model, pair_batch(PAIRS))
    assert known.flatten().tolist() == pytest.approx(sums.tolist(), abs=1e-5)
    real = dpo.answer_log_probs
    monkeypatch.setattr(dpo, "answer_log_probs", None)
    assert (reference_log_probs(small_model, small_tokenizer, PAIRS, 2, tmp_path) == known).all()
    monkeypatch.setattr(dpo, "answer_log_probs", real)
    with torch.no_grad():
        small_model.model.norm.weight += 0.5
    assert (reference_log_probs(small_model, small_tokenizer, PAIRS, 2, tmp_path) != known).all()
    assert len(list(tmp_path.iterdir())) == 2


# ---- the real script

FAST = ["--device", "cpu", "--steps", "6", "--seq-len", "128", "--batch-tokens", "1024",
        "--eval-every", "3", "--save-every", "2", "--dtype", "float32", "--lr", "1e-3"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A root folder with data, a random model as out/sft, and pairs.jsonl."""
    script_folder(tmp_path, "sft", monkeypatch)
    monkeypatch.setattr(dpo, "TASKS", 3)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Give {i}.", "chosen": f"return {i}", "rejected": f"return {i + 1}"}) + "\n"
        for i in range(20)))
    return tmp_path


def script(monkeypatch, out, *flags):
    monkeypatch.setattr("sys.argv", ["dpo.py", "--out", str(out), *FAST, *flags])
    dpo.main()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_script_prefers_and_goes_on_after_a_stop(out, monkeypatch, capsys):
    flags = ("--data", str(out / "pairs.jsonl"), "--nll", "0")
    monkeypatch.setattr(sft, "measure", lambda folder, *args: {
        "x": [0.0, 100.0 * (folder == str(out / "dpo"))], "y": 0.5})
    monkeypatch.setattr(sft, "solve", lambda *args: [])
    script(monkeypatch, out, *flags, "--rounds", "2")
    printed = capsys.readouterr().out
    assert "preferences_1: 20 pairs" in printed and "20 kept" in printed
    assert "+50.0 (+0.0 to +100.0)" in printed and "+0.00" in printed      # what was gained
    rows = read_metrics(out / "dpo_1")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/accuracies"] > 0.5 and "validation accuracy" in rows[-1]
    assert (out / "dpo" / "preferences.png").stat().st_size > 10_000
    whole, one = (load_model(out / name, "cpu").state_dict() for name in ("dpo", "dpo_1"))
    script(monkeypatch, out, *flags, "--rounds", "2")
    assert "dpo is finished" in capsys.readouterr().out

    def stop(model, step):
        raise KeyboardInterrupt

    real = dpo.train
    monkeypatch.setattr(dpo, "train", lambda *args: real(*args[:5], stop))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        script(monkeypatch, out, *flags, "--fresh", "--rounds", "2")
    assert (out / "dpo").exists() and not (out / "dpo_1").exists()      # what was there is kept
    monkeypatch.setattr(dpo, "train", real)
    script(monkeypatch, out, *flags, "--rounds", "2")
    printed = capsys.readouterr().out
    assert "resuming after step 2 of" in printed and "round 2, starting from" in printed
    for name, before in (("dpo", whole), ("dpo_1", one)):
        again = load_model(out / name, "cpu").state_dict()
        assert all(torch.equal(x, before[name]) for name, x in again.items())
    assert not all(torch.equal(x, whole[name]) for name, x in one.items())
    script(monkeypatch, out, *flags, "--build", "--fresh")              # pairs alone
    assert "20 kept" in capsys.readouterr().out and not (out / "dpo.unfinished").exists()


def test_what_collapses_is_stopped(out, monkeypatch):
    monkeypatch.setattr(dpo, "COLLAPSED", -9.0)
    with pytest.raises(InputError, match="step 3: the chosen answers have lost .* lower --lr"):
        script(monkeypatch, out, "--data", str(out / "pairs.jsonl"))
    assert not (out / "dpo").exists()


@pytest.mark.parametrize("loss, right", [("sigmoid", 1.0), ("chosen", 1.0), ("length", 0.0)])
def test_held_out_pairs_are_compared_as_the_loss_does(out, monkeypatch, loss, right):
    """Two nats more over twenty tokens, or one and a half over ten: by sums, or by means."""
    seen = []
    for name, value in {
            "train": lambda *args: seen.append(args[5]), "bits_per_byte": lambda *args: 1.0,
            "compare_models": lambda *args, **more: None,
            "plot_preferences": lambda *args: None, "read_metrics": lambda *args: [],
            "reference_log_probs": lambda model, tokenizer, fits, *_: np.zeros((2, len(fits))),
            "pair_log_probs": lambda model, pairs, _: np.broadcast_to(
                [[[2.0], [1.5]], [[20], [10]]], (2, 2, len(pairs)))}.items():
        monkeypatch.setattr(dpo, name, value)
    script(monkeypatch, out, "--data", str(out / "pairs.jsonl"), "--loss", loss)
    assert seen[0](None, 3) == {"bpb": 1.0, "validation accuracy": right}


@pytest.mark.parametrize("flags, problem", [
    ([], "solves nothing of 3 tasks; if nothing, train it longer"),
    (["--data", "PAIRS", "--seq-len", "8", "--batch-tokens", "64"], "0 pairs are left"),
    (["--data", "PAIRS", "--batch-tokens", "128"], "0 pairs of two sequences of 128 tokens"),
    (["--rounds", "0"], "--rounds and --beta must be above 0"),
    (["--beta", "nan"], "--rounds and --beta must be above 0"),
    (["--save-every", "0"], "--save-every: must be at least 1"),
    (["--judge", "http://127.0.0.1:9/v1"], "lists no model"),
    (["--data", "none"], "none: no such file")])
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


def test_without_sft_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no finished model of sft; run `python sft.py` first"):
        script(monkeypatch, tmp_path)


def test_ids_of_a_pair(small_tokenizer):
    """The prompt ends where the answer begins; each answer has its <|im_end|>."""
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no"}
    prompt, chosen, rejected = pair_ids(small_tokenizer, pair)
    text = small_tokenizer.render_chat(pair["prompt"], add_generation_prompt=True)
    assert prompt == small_tokenizer.encode(text, allow_special=True)
    assert small_tokenizer.decode(chosen) == "yes<|im_end|>"
    assert small_tokenizer.decode(rejected) == "no<|im_end|>"
    pair["tools"] = [{"type": "function", "function": {"name": "add"}}]
    text = small_tokenizer.render_chat(pair["prompt"], pair["tools"], add_generation_prompt=True)
    prompt, _, _ = pair_ids(small_tokenizer, pair)
    assert prompt == small_tokenizer.encode(text, allow_special=True)
