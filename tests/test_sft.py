"""pytest tests/test_sft.py: conversations, their targets and sequences, and the real script."""

import ast
import contextlib
import itertools
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CODE, ROOT, answered, script_folder

import sft
from data import tokens_in_memory
from support.benchmarks import ASSETS, benchmarks
from model import CausalLM, Config, load_model
from sft import chat_ids, code_conversations, new_conversation, packed_sequence
from support.chats import all_text
from support.files import InputError, read_json, read_rows
from support.tasks import training_tasks
from tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Add 1 to n."},
        {"role": "assistant", "content": "```python\nn + 1\n```"},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "n + 2"}]
SIGNATURE = {"type": "function", "function": {"name": "add", "description": "Add two numbers."}}
CALLED = [{"role": "user", "content": "1 + 2?"},
          {"role": "assistant", "content": "",
           "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]},
          {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]

# ---- ids and sequences


def test_ids_and_targets_of_a_chat_are_the_published_ones(published_folder):
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["chat"]
    ids, learned = chat_ids(Tokenizer.load(published_folder), golden["messages"])
    assert ids == golden["ids"]
    assert [i for i, keep in enumerate(learned) if keep] == golden["learned"]


def test_only_answers_are_learned(small_tokenizer):
    """Ids equal to the published template's; learned are the answers and their <|im_end|>."""
    special = small_tokenizer.special
    ids, learned = chat_ids(small_tokenizer, CHAT)
    assert ids == small_tokenizer.encode(small_tokenizer.render_chat(CHAT), allow_special=True)
    parts = "".join(small_tokenizer.decode([i]) if keep else "·" for i, keep in zip(ids, learned))
    assert [part for part in parts.split("·") if part] == [
        "```python\nn + 1\n```<|im_end|>", "n + 2<|im_end|>"]
    _, last = chat_ids(small_tokenizer, CHAT, last_turn=True)
    assert sum(last) == len(small_tokenizer.encode("n + 2")) + 1 and last[-2] and not last[-1]
    _, marks = chat_ids(small_tokenizer, CHAT, published_mask=True)
    assert sum(marks) - sum(learned) == 5 + 5 + 3       # <|im_start|>, line ends, other <|im_end|>
    assert all(keep for i, keep in zip(ids, marks) if i in (special["<|im_start|>"],
                                                           special["<|im_end|>"]))


def spoken(tokenizer, messages, **flags):
    """The ids of a conversation, and the texts in it that are learned."""
    ids, learned = chat_ids(tokenizer, messages, **flags)
    parts = [tokenizer.decode([i for i, _ in group]) for keep, group in itertools.groupby(
        zip(ids, learned), key=lambda pair: pair[1]) if keep]
    return ids, parts


def test_calls_of_tools_are_rendered_and_learned(small_tokenizer):
    messages = [CALLED[0], {**CALLED[1], "content": "I look it up."}, CALLED[2],
                {"role": "tool", "content": "<tool_call>"}, CALLED[3]]
    ids, learned = spoken(small_tokenizer, messages, tools=[SIGNATURE])
    text = small_tokenizer.render_chat(messages, [SIGNATURE])
    assert small_tokenizer.decode(ids) == text and '{"type": "function"' in text
    assert learned == ['I look it up.\n<tool_call>\n{"name": "add", "arguments": '
                       '{"a": 1, "b": 2}}\n</tool_call><|im_end|>', "It is 3.<|im_end|>"]


def test_a_turn_of_weight_0_is_context(small_tokenizer):
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    ids, learned = spoken(small_tokenizer, messages)
    assert ids == chat_ids(small_tokenizer, CHAT)[0] and learned == ["n + 2<|im_end|>"]
    messages[3] = {**CHAT[3], "weight": 0}
    assert spoken(small_tokenizer, messages)[1] == []
    assert spoken(small_tokenizer, [*CHAT[:3], messages[3]], last_turn=True)[1] == []


def test_packed_loss_is_that_of_each_alone(small_tokenizer):
    torch.manual_seed(0)
    model = CausalLM(Config(32, 2, 4, 2, 48, vocab_size=small_tokenizer.vocab_size))
    chats = [CHAT, CHAT[:2], [CHAT[2], CHAT[1]]]
    encoded = [chat_ids(small_tokenizer, chat) for chat in chats]
    T = sum(len(ids) for ids, _ in encoded) + 9

    def loss(parts, T):
        inputs, targets, starts = (torch.from_numpy(x)[None] for x in packed_sequence(parts, T, 0))
        return model(inputs, starts, targets).item(), int((targets != -100).sum())

    alone = [loss([one], len(one[0])) for one in encoded]
    together = loss(encoded, T)
    assert together[0] == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    assert together[1] == sum(count for _, count in alone) == sum(
        sum(learned) for _, learned in encoded)


def test_fim_sequences_are_spread_among_the_others(small_tokenizer):
    """Two thirds of the steps see all conversations, each once an epoch, then the best alone."""
    args = SimpleNamespace(seq_len=64, batch_tokens=256, device_batch=4, seed=0, fim_share=0.25,
                           steps=30)
    documents = [{"text": CODE * 3, "language": "python"}]
    start = small_tokenizer.special["<|im_start|>"]
    encoded = [([start] * 20 + [i], [True] * 21) for i in range(60)]       # three fill a sequence
    tokens = tokens_in_memory(documents, small_tokenizer)
    batches = sft.ConversationBatches(tokens, small_tokenizer, args, encoded, range(50, 60))
    rows = [row for step in range(30) for batch in batches(step) for row in batch["input_ids"]]
    assert len(rows) == 30 * 4
    told = [[int(i) for i in row[20::21]] if row[0] == start else None for row in rows]
    assert [i for i, one in enumerate(told) if one is None] == list(range(3, 120, 4))
    coarse, fine = ([i for one in part if one for i in one] for part in (told[:80], told[80:]))
    for epoch in range(3):
        assert sorted(coarse[60 * epoch:60 * (epoch + 1)]) == list(range(60))
    assert set(fine) - {small_tokenizer.special["<|endoftext|>"]} == set(range(50, 60))


def test_the_best_of_each_kind():
    conversations = [
        {"source": source, "messages": [{"role": role}]} for source, role in
        [("tasks", "user"), ("code", "user"), ("tasks", "user"), ("tasks", "system"),
         ("code", "user"), ("tasks", "system"), ("tasks", "system"), ("tasks", "system")]]
    assert sorted(sft.best_conversations(conversations)) == [2, 4, 6, 7]


def test_packing_holds_each_conversation_once_an_epoch():
    lengths = np.random.default_rng(0).integers(10, 90, 300).tolist()
    packing = sft.Packing(lengths, 100, 0, "x")
    last = packing[400]                                 # more than an epoch
    seen = list(itertools.chain(*packing.sequences))
    assert sorted(seen[:300]) == list(range(300)) and seen[300:600] != seen[:300]
    assert all(sum(lengths[i] for i in sequence) <= 100 for sequence in packing.sequences)
    counts = list(itertools.accumulate(len(sequence) for sequence in packing.sequences))
    assert sum(lengths) / 100 / (counts.index(300) + 1) > 0.85      # little room is wasted
    again = sft.Packing(lengths, 100, 0, "x")
    assert [again[i] for i in (7, 3)] == [packing[7], packing[3]] and again[400] == last


def test_what_ends_an_answer(small_tokenizer):
    """Every special token but those of tool calls, which a model may emit."""
    special = small_tokenizer.special
    assert sft.answer_stop_ids(small_tokenizer) == set(special.values()) - {
        special["<tool_call>"], special["</tool_call>"]}


# ---- conversations


def test_a_task_is_asked_for_in_two_ways():
    task = training_tasks(0, 3)[2]
    assert task["prompt"].startswith("def apply(items, amount):")
    listed, spoken = (sft.task_conversation(task, in_words)["messages"]
                      for in_words in (False, True))
    template = "\n".join(benchmarks()["prompts"]["code chat"]["prompt"])     # as it is measured
    assert template.replace("{prompt}", task["prompt"].strip()).startswith(
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n".format(
            *(turn["content"] for turn in listed[:2])))
    assert [turn["role"] for turn in listed] == ["system", "user", "assistant"]
    assert spoken[0]["role"] == "user" and spoken[0]["content"] == (
        "Write a Python function `apply(items, amount)`: Remove repeated numbers, then count the "
        "numbers equal to amount, then turn it into text.")
    assert spoken[1] == listed[2] and "return str(n)\n```" in spoken[1]["content"]


def test_functions_become_conversations():
    text = CODE + "\n\ndef twice(n):\n    '''Two times a number, whatever the number is.'''\n" \
        "    if n < 0:\n        return n + n\n    return 2 * n\n"
    document = {"text": text, "language": "python"}
    conversations = list(code_conversations(
        [document] * 40 + [{"text": text, "language": "go"}], 0))
    templates = Counter(one["template"] for one in conversations)
    assert set(templates) == {"write", "fix", "explain", "complete"}
    for one in conversations:
        question, answer = (message["content"] for message in one["messages"])
        assert ("```" not in answer) == (one["template"] == "explain")
        assert answer in ("Two times a number, whatever the number is.",
                          "The mean of some numbers.") or "```python\ndef " in answer
        if one["template"] == "fix":
            wrong, right = question.split("```python\n")[1], answer.split("```python\n")[1]
            assert wrong != right and ast.parse(wrong.rstrip("`\n"))


def test_the_checklist():
    question = "Write `twice(n)`, a function of a number."
    good = "It adds.\n```python\ndef twice(n):\n    # twice\n    return 2 * n\n```"
    conversation = new_conversation(question, good, "file")
    sft.set_score(conversation)
    assert conversation["scores"] == pytest.approx({
        "consistency": 1, "relevance": 1, "difficulty": 0.2, "code exists": 1, "correctness": 1,
        "form": 1, "clarity": 0.5, "comments": 1, "easy to learn": 2 / 40})
    assert conversation["score"] == pytest.approx((2 + 1 + 0.4 + 1 + 3 + 1 + 0.5 + 1 + 0.05) / 13)
    broken = new_conversation(question, good.replace("(n):", "(n)"), "file")
    sft.set_score(broken)
    assert (broken["scores"]["code exists"], broken["scores"]["correctness"]) == (1, 0)
    for answer, scores, expected in (("No.", {}, 0.18), (good, dict.fromkeys(sft.CHECKLIST, 1), 1)):
        conversation = new_conversation(question, answer, "teacher")
        conversation |= {"scores": scores} if scores else {}
        sft.set_score(conversation)
        assert conversation["score"] == pytest.approx(expected, abs=0.07)


def fenced(code):
    return f"```python\n{code}```"


def double(docstring, body="    return 2 * n\n"):
    return f'def f(n, k=1):\n    """Twice.\n\n    {docstring}\n    """\n{body}'


def test_only_a_wrong_value_is_a_failed_test():
    """An answer that misses a name of the question, or ends the program, is kept as it is."""
    bodies = ["    return 2 * n\n", "    return n\n", "    return helper(n)\n",
              "    raise SystemExit\n"]
    conversations = [new_conversation("Write f.", fenced(double(">>> f(2)\n    4", body)), "file")
                     for body in bodies]
    sft.verify(conversations, weak=False)
    assert [one.get("passed") for one in conversations] == [True, False, None, None]


# ---- the build and the real script

FAST = ["--device", "cpu", "--steps", "6", "--seq-len", "256", "--batch-tokens", "512",
        "--eval-every", "3", "--save-every", "2", "--dtype", "float32"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    return script_folder(tmp_path, "pretrain", monkeypatch)


def script(monkeypatch, out, *flags):
    monkeypatch.setattr("sys.argv", ["sft.py", "--out", str(out), *FAST, *flags])
    sft.main()


def rows_of(path):
    return [row for _, row in read_rows(path)]


def test_build_from_every_source(out, monkeypatch, teacher, capsys):
    """What is kept is sorted by score, the better of two answers stays, what fails its tests or is
    a benchmark's is not learned; a teacher that dies is asked only what is missing."""
    def answer(body):
        text = body["messages"][0]["content"]
        if text.startswith("Here is a piece"):
            return answered('def half(n):\n    """Half of a number.\n\n    >>> half(4)\n    2\n'
                            '    """')
        if text.startswith("Question:"):
            return answered("9 9 9 9 9 9 9 9 9" if "n // 2" in text else "1 2")
        right = "n // 2" if body["seed"] else "n"
        return answered(f"```python\ndef half(n):\n    return {right}\n```")

    ladder = next(row for row in rows_of(ASSETS / "ladder.jsonl") if len(row["prompt"]) > 200)
    own = out / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in [
        {"messages": CHAT}, {"messages": CHAT}, {"messages": CHAT[:1]},
        {"instruction": ladder["prompt"], "output": ladder["canonical_solution"]},
        {"instruction": "Double.", "output": fenced(double(">>> f(2)\n    4", "    return n\n"))},
        {"instruction": "Why?\n>>> f(2)\n5", "output": fenced("def f(n):\n    return 2 * n\n")},
        {"instruction": "Who are you?", "output": "A program."},
        {"instruction": "Who are you?", "output": "A program that writes Python code."}]))
    flags = ("--build", "--data", str(own), "--teacher", teacher.url)
    teacher.answer = lambda body: (401, b"")
    with pytest.raises(InputError, match="HTTP 401"):
        script(monkeypatch, out, *flags)
    assert not (out / "instructions").exists()
    teacher.answer = answer
    script(monkeypatch, out, *flags)
    asked, kept = len(teacher.asked), rows_of(out / "instructions" / "train.jsonl")
    manifest = json.loads((out / "instructions" / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["contaminated"] == 1 and counts["fails its tests"] == 2
    assert counts["built"] - manifest["kept"] == sum(
        count for reason, count in counts.items() if reason != "built")
    assert manifest["skipped"] == {
        "the same as a row before it": [1, f"{own}, line 2"],
        "no assistant turn": [1, f"{own}, line 3"], "contaminated": [1, f"{own}, line 4"],
        "fails its tests": [1, f"{own}, line 5"]}
    assert [row["passed"] for row in kept if "Why?" in all_text(row["messages"])] == [None]
    assert [row["score"] for row in kept] == sorted(row["score"] for row in kept)
    [taught] = [row for row in kept if row["source"] == "teacher"]
    assert "n // 2" in taught["messages"][1]["content"] and taught["passed"]
    assert taught["score"] == pytest.approx(0.9)
    [pair] = rows_of(out / "instructions" / "pairs.jsonl")     # of the two that fail one has a twin
    assert pair["prompt"] == taught["messages"][:1] and "return n\n" in pair["rejected"]
    assert pair["chosen"] == taught["messages"][1]["content"]
    # conversations of a file are neither thinned nor replaced by better ones
    assert sum("Who are you?" in all_text(row["messages"]) for row in kept) == 2
    assert manifest["languages"]["python"] > 100
    script(monkeypatch, out, *flags, "--fresh")
    assert len(teacher.asked) == asked                      # nothing is paid twice
    older = dict(manifest)
    del older["format"]                                     # of an earlier version
    (out / "instructions" / "manifest.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match="instructions was made from format None, not 2"):
        script(monkeypatch, out, *flags)
    (out / "instructions" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was made from teacher http"):
        script(monkeypatch, out, "--build", "--data", str(own))
    own.write_text(own.read_text() + json.dumps({"messages": CHAT[:2]}))
    with pytest.raises(InputError, match="was made from data .*own.jsonl"):
        script(monkeypatch, out, *flags)
    assert "--data: skipped 1: no assistant turn (first: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_script_trains_stops_goes_on_and_answers(out, monkeypatch, capsys):
    """Interrupted and resumed it ends with the weights of a run that was not."""
    script(monkeypatch, out)
    printed = capsys.readouterr().out
    assert "longer than 256 tokens are left out" in printed
    assert re.search(r"unseen parameters: pass@1, % +0\.0 \(0\.0 to 0\.0\) +0\.0", printed)
    assert printed.count("--- asked") == 3
    whole = load_model(out / "sft", "cpu").state_dict()
    for file in ("config.json", "generation_config.json"):      # what ends an answer elsewhere
        special = Tokenizer.load(out / "sft").special
        assert read_json(out / "sft" / file)["eos_token_id"] == [
            special["<|im_end|>"], special["<|endoftext|>"]]
    base = load_model(out / "pretrain", "cpu").state_dict()
    assert any(not torch.equal(whole[name], base[name]) for name in whole)
    script(monkeypatch, out)
    assert "sft is finished" in capsys.readouterr().out

    def stop(model, step):
        raise KeyboardInterrupt

    real = sft.train
    monkeypatch.setattr(sft, "train", lambda *args: real(*args[:5], stop))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        script(monkeypatch, out, "--fresh")
    assert (out / "sft.unfinished").exists()
    monkeypatch.setattr(sft, "train", real)
    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    script(monkeypatch, out)
    assert "resuming after step 2 of" in capsys.readouterr().out
    again = load_model(out / "sft", "cpu").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_few_conversations_of_ones_own_alone(out, monkeypatch, capsys):
    """--only-data: no task and no code on disk among them; beside them rows with gaps alone."""
    own, seen = out / "own.jsonl", []
    own.write_text(json.dumps({"instruction": "Who are you?", "output": "A program."}) + "\n"
                   + json.dumps({"messages": CALLED, "tools": [SIGNATURE]}))
    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    real = sft.train
    monkeypatch.setattr(sft, "train", lambda model, tokenizer, batches, *rest: (
        seen.extend(batches.encoded), real(model, tokenizer, batches, *rest)))
    script(monkeypatch, out, "--data", str(own), "--only-data", "--seq-len", "512",
           "--batch-tokens", "1024")
    tokenizer = Tokenizer.load(out / "sft")
    texts = sorted(tokenizer.decode(ids) for ids, _ in seen)
    question = new_conversation("Who are you?", "A program.", "file")["messages"]
    assert texts == sorted([tokenizer.render_chat(question),
                            tokenizer.render_chat(CALLED, [SIGNATURE])])
    printed = capsys.readouterr().out
    assert "--only-data: no tasks of the grammar, no conversations from code on disk" in printed
    assert "30% of the sequences" in printed
    assert read_json(out / "instructions" / "manifest.json")["only_data"] is True
    with pytest.raises(InputError, match="was made from only_data True, not False"):
        script(monkeypatch, out, "--data", str(own), "--build")


@pytest.mark.parametrize("flags, published, alone", [
    ((), False, False), ((), True, True), (("--no-only-data",), True, False),
    (("--only-data",), False, True)])
def test_ones_own_alone_is_the_default_with_a_published_size(out, monkeypatch, flags, published,
                                                             alone):
    own, seen = out / "own.jsonl", []
    own.write_text(json.dumps({"messages": CHAT}))
    if published:
        monkeypatch.setitem(sft.CONFIGS, "0.5B", load_model(out / "pretrain", "cpu").config)
    monkeypatch.setattr(sft, "prepare_instructions", lambda args, _: seen.append(args.only_data))
    script(monkeypatch, out, "--build", "--data", str(own), *flags)
    script(monkeypatch, out, "--build")
    assert seen == [alone, False]


def test_missing_data_are_made(out, monkeypatch, code_folder, capsys):
    monkeypatch.setattr(sft, "DEFAULT_SOURCES", [str(code_folder)])
    script(monkeypatch, out / "new", "--build", "--init", str(out / "pretrain"))
    printed = capsys.readouterr().out
    assert f"{out}/new/data is missing and is made from {code_folder}" in printed
    assert (out / "new" / "data" / "train.jsonl").exists()
    assert rows_of(out / "new" / "instructions" / "train.jsonl")


def test_chat_streams_and_forgets_the_oldest_turns(out, monkeypatch, capsys):
    questions, prompts, real = [f"Say hi to {i}. " * 9 for i in range(9)], [], sft.generate

    def asked(_):
        if not questions:
            raise EOFError              # Ctrl-D
        return questions.pop()

    def generate(model, prompt, *args, **more):
        prompts.append(tokenizer.decode(prompt[0]))
        return real(model, prompt, 3, **more)

    tokenizer = Tokenizer.load(out / "pretrain")
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sft, "generate", generate)
    monkeypatch.setattr(sft, "CHAT_TOKENS", 20)
    script(monkeypatch, out, "--chat")
    assert "an empty line ends the chat" in capsys.readouterr().out and len(prompts) == 9
    assert all(prompt.startswith("<|im_start|>system\nYou are Qwen") for prompt in prompts)
    assert "to 8." in prompts[0] and "to 8." in prompts[1] and "to 7." in prompts[1]
    assert "to 8." not in prompts[-1] and "to 1." in prompts[-1]
    assert prompts[-1].endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("flags, problem", [
    (["--fim-share", "1"], "--fim-share must be at least 0 and below 1"),
    (["--only-data"], "--only-data: there is nothing to learn from without --data FILE"),
    (["--data", "none.jsonl"], "none.jsonl: no such file"), (["--init", "none"], "none: no such f"),
    (["--seq-len", "32", "--batch-tokens", "32"], "no conversation is left; give a larger"),
    (["--steps", "0"], "--steps: must be at least 1")])
def test_bad_flags(out, monkeypatch, flags, problem):
    with pytest.raises(InputError, match=problem):
        script(monkeypatch, out, *flags)
    assert not (out / "sft").exists()


def test_without_a_base_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no finished model of repository or pretrain; run"):
        script(monkeypatch, tmp_path)
