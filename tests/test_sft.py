"""pytest tests/test_sft.py: conversations, their targets and sequences, and the real script."""

import ast
import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CODE, ROOT, answered, script_folder

import sft
from data import tokens_in_memory
from model import CausalLM, Config, load_model
from sft import chat_ids, code_conversations, new_conversation, packed_sequence
from support import teacher as teacher_module
from support.benchmarks import ASSETS, benchmarks
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
          {"role": "assistant", "content": "I look it up.",
           "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]},
          {"role": "tool", "content": "<tool_call>"}, {"role": "assistant", "content": "It is 3."}]

# ---- ids and sequences


def test_ids_and_targets_of_a_chat_are_the_published_ones(published_folder):
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["chat"]
    ids, learned = chat_ids(Tokenizer.load(published_folder), golden["messages"])
    assert ids == golden["ids"]
    assert [i for i, is_target in enumerate(learned) if is_target] == golden["learned"]


@pytest.mark.parametrize("messages, flags, learned", [
    (CHAT, {}, ["```python\nn + 1\n```<|im_end|>", "n + 2<|im_end|>"]),
    (CHAT, {"last_turn": True}, ["n + 2<|im_end|>"]),
    ([CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]], {}, ["n + 2<|im_end|>"]),
    ([*CHAT[:3], {**CHAT[3], "weight": 0}], {"last_turn": True}, []),
    (CALLED, {"tools": [SIGNATURE]}, [
        'I look it up.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
        '</tool_call><|im_end|>', "It is 3.<|im_end|>"])])
def test_only_answers_are_learned(small_tokenizer, messages, flags, learned):
    """The ids are those of the published template; each answer ends with <|im_end|>."""
    ids, is_target = chat_ids(small_tokenizer, messages, **flags)
    assert small_tokenizer.decode(ids) == small_tokenizer.render_chat(messages, flags.get("tools"))
    groups = itertools.groupby(zip(ids, is_target), key=lambda pair: pair[1])
    assert [small_tokenizer.decode([i for i, _ in pairs])
            for is_learned, pairs in groups if is_learned] == learned


def test_the_published_mask_and_what_ends_an_answer(small_tokenizer):
    special = small_tokenizer.special
    ids, learned = chat_ids(small_tokenizer, CHAT)
    _, published = chat_ids(small_tokenizer, CHAT, published_mask=True)
    # five <|im_start|>, five line feeds, and the <|im_end|> of three turns that are not answers
    assert sum(published) - sum(learned) == 5 + 5 + 3
    assert all(is_target for i, is_target in zip(ids, published)
               if i in (special["<|im_start|>"], special["<|im_end|>"]))
    assert sft.answer_stop_ids(small_tokenizer) == set(special.values()) - {
        special["<tool_call>"], special["</tool_call>"]}


def test_packed_sequence_by_hand():
    """A first id that is learned (--published-mask) is no target of the conversation before it."""
    encoded = [([5, 6, 7, 8], [False, False, True, True]), ([9, 5, 6], [True, True, False])]
    input_ids, targets, document_starts = packed_sequence(encoded, 9, 1)
    assert input_ids.tolist() == [5, 6, 7, 8, 9, 5, 6, 1, 1]
    assert targets.tolist() == [-100, 7, 8, -100, 5, -100, -100, -100, -100]
    assert document_starts.tolist() == [0, 0, 0, 0, 4, 4, 4, 7, 7]


def test_packed_loss_is_that_of_each_alone(small_tokenizer):
    torch.manual_seed(0)
    model = CausalLM(Config(32, 2, 4, 2, 48, vocab_size=small_tokenizer.vocab_size))
    encoded = [chat_ids(small_tokenizer, chat) for chat in (CHAT, CHAT[:2], [CHAT[2], CHAT[1]])]

    def loss(conversations, T):
        inputs, targets, starts = (
            torch.from_numpy(array)[None] for array in packed_sequence(conversations, T, 0))
        return model(inputs, starts, targets).item(), int((targets != -100).sum())

    alone = [loss([one], len(one[0])) for one in encoded]
    together, count = loss(encoded, sum(len(ids) for ids, _ in encoded) + 9)
    assert together == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    assert count == sum(n for _, n in alone) == sum(sum(learned) for _, learned in encoded)


def test_fim_sequences_are_spread_among_the_others(small_tokenizer):
    """Two thirds of the steps see all conversations, each once an epoch, then the best alone."""
    args = SimpleNamespace(seq_len=64, batch_tokens=256, device_batch=4, seed=0, fim_share=0.25,
                           steps=30)
    tokens = tokens_in_memory([{"text": CODE * 3, "language": "python"}], small_tokenizer)
    start = small_tokenizer.special["<|im_start|>"]
    encoded = [([start] * 20 + [i], [True] * 21) for i in range(60)]       # three fill a sequence
    batches = sft.ConversationBatches(tokens, small_tokenizer, args, encoded, range(50, 60))
    sequences = [sequence.tolist() for step in range(30) for batch in batches(step)
                 for sequence in batch["input_ids"]]
    assert len(sequences) == 30 * 4
    assert [i for i, ids in enumerate(sequences) if ids[0] != start] == list(range(3, 120, 4))
    coarse, fine = ([i for ids in part if ids[0] == start for i in ids[20::21]]
                    for part in (sequences[:80], sequences[80:]))
    for epoch in range(3):
        assert sorted(coarse[60 * epoch:60 * (epoch + 1)]) == list(range(60))
    assert set(fine) - {small_tokenizer.special["<|endoftext|>"]} == set(range(50, 60))


def test_the_best_of_each_kind():
    kinds = [("tasks", "user"), ("code", "user"), ("tasks", "user"), ("tasks", "system"),
             ("code", "user"), ("tasks", "system"), ("tasks", "system"), ("tasks", "system")]
    conversations = [{"source": source, "messages": [{"role": role}]} for source, role in kinds]
    assert sorted(sft.best_conversations(conversations)) == [2, 4, 6, 7]


def test_packing_holds_each_conversation_once_an_epoch():
    lengths = np.random.default_rng(0).integers(10, 90, 300).tolist()
    packing = sft.Packing(lengths, 100, 0, "x")
    last = packing[400]                                 # more than an epoch
    order = list(itertools.chain(*packing.sequences))
    assert sorted(order[:300]) == list(range(300)) and order[300:600] != order[:300]
    assert all(sum(lengths[i] for i in sequence) <= 100 for sequence in packing.sequences)
    counts = list(itertools.accumulate(len(sequence) for sequence in packing.sequences))
    assert sum(lengths) / 100 / (counts.index(300) + 1) > 0.85      # little padding
    again = sft.Packing(lengths, 100, 0, "x")
    assert [again[i] for i in (7, 3)] == [packing[7], packing[3]] and again[400] == last


# ---- conversations


def test_a_task_is_asked_as_it_is_measured_and_in_words():
    task = training_tasks(0, 3)[2]
    as_measured, in_words = (sft.task_conversation(task, flag)["messages"]
                             for flag in (False, True))
    template = "\n".join(benchmarks()["prompts"]["code chat"]["prompt"])
    system, question = (turn["content"] for turn in as_measured[:2])
    assert template.replace("{prompt}", task["prompt"].strip()).startswith(
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n")
    assert in_words[0]["content"] == (
        "Write a Python function `apply(items, amount)`: Remove repeated numbers, then count the "
        "numbers equal to amount, then turn it into text.")
    assert in_words[1] == as_measured[2] and "return str(n)\n```" in in_words[1]["content"]


def test_functions_become_conversations():
    summary = "Two times a number, whatever the number is."
    code = f'def twice(n):\n    """{summary}"""\n    if n < 0:\n        return n + n\n    return 2'
    documents = [{"text": code, "language": language} for language in ["python"] * 40 + ["go"]]
    conversations = list(code_conversations(documents, 0))
    assert {chat["template"] for chat in conversations} == {"write", "fix", "explain", "complete"}
    for chat in conversations:
        question, answer = (message["content"] for message in chat["messages"])
        explains = chat["template"] == "explain"
        assert answer == (summary if explains else f"```python\n{code}\n```")
        if chat["template"] == "fix":
            wrong = question.split("```python\n")[1].rstrip("`\n")
            assert wrong != code and ast.parse(wrong)


def test_the_checklist():
    question = "Write `twice(n)`, a function of a number."
    good = "It adds.\n```python\ndef twice(n):\n    # twice\n    return 2 * n\n```"
    chat = new_conversation(question, good, "file")
    broken = new_conversation(question, good.replace("(n):", "(n)"), "file")
    taught = new_conversation(question, good, "teacher", scores=dict.fromkeys(sft.CHECKLIST, 1))
    for conversation in (chat, broken, taught):
        sft.set_score(conversation)
    assert chat["scores"] == pytest.approx({
        "consistency": 1, "relevance": 1, "difficulty": 0.2, "code exists": 1, "correctness": 1,
        "form": 1, "clarity": 0.5, "comments": 1, "easy to learn": 2 / 40})
    assert chat["score"] == pytest.approx((2 + 1 + 0.4 + 1 + 3 + 1 + 0.5 + 1 + 0.05) / 13)
    assert (broken["scores"]["code exists"], broken["scores"]["correctness"]) == (1, 0)
    assert taught["score"] == 1


def double(body):
    """An answer with a test in its docstring."""
    return f'```python\ndef f(n):\n    """Twice.\n\n    >>> f(2)\n    4\n    """\n    {body}\n```'


def test_only_a_wrong_value_is_a_failed_test():
    """An answer that lacks a name of the question, or ends the program, is kept as it is."""
    bodies = ["return 2 * n", "return n", "return helper(n)", "raise SystemExit"]
    conversations = [new_conversation("Write f.", double(body), "file") for body in bodies]
    sft.verify(conversations, weak=False)
    assert [chat.get("passed") for chat in conversations] == [True, False, None, None]


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


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_build_from_every_source(out, monkeypatch, teacher, capsys):
    """Conversations are sorted by score; of two answers the better one stays; those that fail their
    tests or are in a benchmark are dropped; a teacher that dies is asked only what is missing."""
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
    data, folder = out / "data.jsonl", out / "instructions"
    write_rows(data, {"messages": CHAT}, {"messages": CHAT}, {"messages": CHAT[:1]},
               {"instruction": ladder["prompt"], "output": ladder["canonical_solution"]},
               {"instruction": "Double.", "output": double("return n")},
               {"instruction": "Who are you?", "output": "A program."},
               {"instruction": "Who are you?", "output": "A program that writes Python code."})
    flags = ("--build", "--data", str(data), "--teacher", teacher.url)
    teacher.answer = lambda body: (401, b"")
    with pytest.raises(InputError, match="HTTP 401"):
        script(monkeypatch, out, *flags)
    assert not folder.exists()
    teacher.answer = answer
    script(monkeypatch, out, *flags)
    requests, chats = len(teacher.asked), rows_of(folder / "train.jsonl")
    manifest = read_json(folder / "manifest.json")
    counts = manifest["counts"]
    assert counts["contaminated"] == 1 and counts["fails its tests"] == 2
    assert 2 * counts["built"] - manifest["kept"] == sum(counts.values())
    assert manifest["skipped"] == {
        "the same as a row before it": [1, f"{data}, line 2"],
        "no assistant turn": [1, f"{data}, line 3"], "contaminated": [1, f"{data}, line 4"],
        "fails its tests": [1, f"{data}, line 5"]}
    assert [chat["score"] for chat in chats] == sorted(chat["score"] for chat in chats)
    assert manifest["languages"]["python"] > 100
    [taught] = [chat for chat in chats if chat["source"] == "teacher"]
    assert "n // 2" in taught["messages"][1]["content"] and taught["passed"]
    assert taught["score"] == pytest.approx(0.9)
    [pair] = rows_of(folder / "pairs.jsonl")            # the question of the other has no answer
    assert pair["prompt"] == taught["messages"][:1] and "return n\n" in pair["rejected"]
    assert pair["chosen"] == taught["messages"][1]["content"]
    # conversations of a file are neither thinned nor replaced by better ones
    assert sum("Who are you?" in all_text(chat["messages"]) for chat in chats) == 2
    script(monkeypatch, out, *flags, "--fresh")
    assert len(teacher.asked) == requests               # nothing is paid twice
    assert "--data: skipped 1: no assistant turn (first: " in capsys.readouterr().out
    write_rows(data, {"messages": CHAT[:2]})            # other data than the folder was made from
    with pytest.raises(InputError, match="was made from data .*data.jsonl"):
        script(monkeypatch, out, *flags)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": None}))
    with pytest.raises(InputError, match="instructions was made from format None, not 2"):
        script(monkeypatch, out, *flags)


def test_a_teacher_is_asked_about_all_languages(small_tokenizer, monkeypatch):
    """Equally many questions per language; repeated ones and solutions are left out."""
    prompts = []

    def ask_all(url, conversations, **options):
        prompts.extend(chat[0]["content"] for chat in conversations)
        return [f"task {min(i, 150)}" if i else "```python" for i in range(len(conversations))]

    monkeypatch.setattr(teacher_module, "ask_all", ask_all)
    documents = [{"language": language, "text": f"some {language} code"}
                 for language in ("java", "python", "go", "rust", "python")]
    questions = teacher_module.teacher_questions("", documents, small_tokenizer, 0)
    assert questions == [f"task {i}" for i in range(1, 151)]
    assert len(prompts) == 200
    for language in ("java", "python", "go"):
        assert sum(f"piece of a {language} program:\n\nsome {language} code" in prompt
                   for prompt in prompts) in (66, 67)
    assert teacher_module.teacher_questions("", documents[3:4], small_tokenizer, 0) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_interrupted_run_is_resumed_exactly(out, monkeypatch, capsys):
    script(monkeypatch, out)
    printed = capsys.readouterr().out
    assert "longer than 256 tokens are left out" in printed
    assert re.search(r"unseen parameters: pass@1, % +0\.0 \(0\.0 to 0\.0\) +0\.0", printed)
    assert printed.count("--- asked") == 3
    weights = load_model(out / "sft", "cpu").state_dict()
    base = load_model(out / "pretrain", "cpu").state_dict()
    assert any(not torch.equal(weights[name], base[name]) for name in weights)
    special = Tokenizer.load(out / "sft").special
    for file in ("config.json", "generation_config.json"):      # for other programs
        assert read_json(out / "sft" / file)["eos_token_id"] == [
            special["<|im_end|>"], special["<|endoftext|>"]]
    script(monkeypatch, out)
    assert "sft is finished" in capsys.readouterr().out

    def stop(model, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    train = sft.train
    monkeypatch.setattr(sft, "train", lambda *args: train(*args[:5], stop))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        script(monkeypatch, out, "--fresh")
    assert (out / "sft.unfinished").exists()
    monkeypatch.setattr(sft, "train", train)
    script(monkeypatch, out)
    assert "resuming after step 2 of" in capsys.readouterr().out
    resumed = load_model(out / "sft", "cpu").state_dict()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_lora(out, monkeypatch):
    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    script(monkeypatch, out, "--lora", "4", "--lr", "0.003")
    special = Tokenizer.load(out / "sft").special
    assert read_json(out / "sft" / "generation_config.json")["eos_token_id"] == [
        special["<|im_end|>"], special["<|endoftext|>"]]
    base, tuned = (load_model(out / stage, "cpu").state_dict() for stage in ("pretrain", "sft"))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    assert (out / "sft" / "adapter" / "adapter_config.json").exists()


def test_only_data_of_the_user(out, monkeypatch, capsys):
    """--only-data: no tasks and no code on disk; the data and the FIM sequences are made."""
    data, batches = out / "data.jsonl", []
    write_rows(data, {"instruction": "Who are you?", "output": "A program."},
               {"messages": CALLED, "tools": [SIGNATURE]})
    (out / "data").rename(out / "elsewhere")
    monkeypatch.setattr(sft, "DEFAULT_SOURCES", [str(out / "elsewhere" / "train.jsonl")])
    monkeypatch.setattr(sft, "compare_models", lambda *args: None)
    monkeypatch.setattr(sft, "train", lambda *args: batches.append(args[2]))
    flags = ("--data", str(data), "--seq-len", "512", "--batch-tokens", "1024")
    script(monkeypatch, out, *flags, "--only-data")
    tokenizer = Tokenizer.load(out / "pretrain")
    question = new_conversation("Who are you?", "A program.", "file")["messages"]
    assert {tokenizer.decode(ids) for ids, _ in batches[0].encoded} == {
        tokenizer.render_chat(question), tokenizer.render_chat(CALLED, [SIGNATURE])}
    printed = capsys.readouterr().out
    assert f"making {out}/data from {out}/elsewhere/train.jsonl" in printed
    assert "--only-data: no tasks of the grammar, no conversations from code on disk" in printed
    assert "30% of the sequences" in printed
    with pytest.raises(InputError, match="was made from only_data True, not False"):
        script(monkeypatch, out, *flags)


@pytest.mark.parametrize("flags, only_data", [((), True), (("--no-only-data",), False)])
def test_only_data_is_the_default_with_a_published_size(out, monkeypatch, flags, only_data):
    write_rows(out / "data.jsonl", {"messages": CHAT})
    settings = []
    monkeypatch.setattr(sft, "prepare_instructions",
                        lambda args, _: settings.append(args.only_data))
    script(monkeypatch, out, "--build", "--data", str(out / "data.jsonl"))
    monkeypatch.setitem(sft.CONFIGS, "0.5B", load_model(out / "pretrain", "cpu").config)
    script(monkeypatch, out, "--build", "--data", str(out / "data.jsonl"), *flags)
    script(monkeypatch, out, "--build")
    assert settings == [False, only_data, False]


def test_chat_streams_and_forgets_the_oldest_turns(out, monkeypatch, capsys):
    questions = [f"Say hi to {i}. " * 9 for i in range(9)]
    prompts, generate = [], sft.generate

    def generate_three(model, prompt, *args, **more):
        prompts.append(tokenizer.decode(prompt[0]))
        return generate(model, prompt, 3, **more)

    tokenizer = Tokenizer.load(out / "pretrain")
    monkeypatch.setattr("builtins.input", lambda _: questions.pop() if questions else "")
    monkeypatch.setattr(sft, "generate", generate_three)
    monkeypatch.setattr(sft, "CHAT_TOKENS", 20)
    script(monkeypatch, out, "--chat")
    assert "an empty line ends the chat" in capsys.readouterr().out and len(prompts) == 9
    assert all(prompt.startswith("<|im_start|>system\nYou are Qwen") for prompt in prompts)
    assert "to 8." in prompts[0] and "to 8." in prompts[1] and "to 7." in prompts[1]
    assert "to 8." not in prompts[-1] and "to 1." in prompts[-1]
    assert prompts[-1].endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("flags, problem", [
    (["--fim-share", "1"], "--fim-share must be at least 0 and below 1"),
    (["--only-data"], "--only-data needs --data FILE"),
    (["--data", "none.jsonl"], "none.jsonl: no such file"), (["--init", "none"], "none: no such f"),
    (["--seq-len", "32", "--batch-tokens", "32"], "no conversation is left; give a larger"),
    (["--steps", "0"], "--steps: must be at least 1"),
    (["--out", "empty"], "no finished model of repository or pretrain; run")])
def test_bad_flags(out, monkeypatch, flags, problem):
    with pytest.raises(InputError, match=problem):
        script(monkeypatch, out, *flags)
    assert not (out / "sft").exists()
