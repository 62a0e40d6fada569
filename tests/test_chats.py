"""pytest tests/test_chats.py: the formats of conversations and of preference pairs."""

import itertools
import json

import pytest
from conftest import reference_data

from support.chats import (
    ask_judge,
    normalize_conversation,
    normalize_pair,
    print_manifest,
    read_data,
)
from support.files import InputError
from tokenizer import assistant_parts

CHAT = [{"role": "user", "content": "Add 1 to n."},
        {"role": "assistant", "content": "```python\nn + 1\n```"},
        {"role": "user", "content": "And 2?"},
        {"role": "assistant", "content": "n + 2"}]


def turns(*contents, roles=("user", "assistant")):
    """Turns by a user and an assistant, one after the other."""
    return [{"role": role, "content": content}
            for role, content in zip(itertools.cycle(roles), contents)]


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
SIGNATURE = {"name": "add", "description": "Add two numbers."}
WRAPPED = {"type": "function", "function": SIGNATURE}
CALLED = [{"role": "user", "content": "1 + 2?"},
          {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]


@pytest.mark.parametrize("row, messages", [
    ({"messages": CHAT}, CHAT),
    # Alpaca: the input is a part of the question, the history comes before it
    ({"instruction": "a", "input": "b", "output": "c"}, turns("a\nb", "c")),
    ({"instruction": "Say hi.", "input": "", "output": "hi", "history": [], "system": ""},
     turns("Say hi.", "hi")),
    ({"instruction": "And in Rust?", "output": "fn f()", "system": "Be brief.",
      "history": [["In C?", "int f()"], ["In Go?", "func f()"]]},
     [SYSTEM, *turns("In C?", "int f()", "In Go?", "func f()", "And in Rust?", "fn f()")]),
    ({"instruction": "a", "context": "b", "response": "c"}, turns("a\nb", "c")),     # Dolly
    ({"system_prompt": "Be brief.", "question": "a", "response": "c"},               # Orca
     [SYSTEM, *turns("a", "c")]),
    # prompt and completion: earlier answers are context, as in TRL
    ({"prompt": "a", "completion": "b"}, turns("a", "b")),
    ({"prompt": turns("a", "b", "c"), "completion": turns("d", roles=["assistant"])},
     [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}, *turns("c", "d")]),
    ({"prompt": "Add 1 to n.", "prompt_id": "x", "messages": CHAT}, CHAT),           # UltraChat
    # ShareGPT
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b"}], "id": "x"}, [SYSTEM, *turns("a", "b")]),
    ({"system": "Be brief.", "conversations": [{"from": "human", "value": "a"},
                                               {"from": "gpt", "value": "b"}]},
     [SYSTEM, *turns("a", "b")]),
    ({"conversations": [
        {"from": "human", "value": "1 + 2?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}]}, CALLED),
    # OpenAI
    ({"messages": [CALLED[0], {**CALLED[1], "content": None},
                   {**CALLED[2], "tool_call_id": "1", "name": "add"}, CALLED[3]]}, CALLED),
    ({"messages": [CALLED[0], {"role": "assistant", "content": None, "function_call": CALL},
                   {"role": "function", "name": "add", "content": "3"}, CALLED[3]]}, CALLED),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                {"type": "text", "text": "b"}]}, CHAT[1]]},
     [*turns("a\nb"), CHAT[1]]),
    # turns that are not learned
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]},
     [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]),
    ({"messages": [CHAT[0], {**CHAT[1], "train": False}, {**CHAT[2], "train": False},
                   {**CHAT[3], "loss": True}]}, [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]),
    # metadata
    ({"messages": CHAT, "id": 7, "source": "x", "language": "c", "tags": ["a"], "meta": {"n": 1},
      "score": 0.5, "documents": None, "images": []}, CHAT)])
def test_formats_of_conversations(row, messages):
    assert normalize_conversation(row) == {"messages": messages, "source": "file"}


@pytest.mark.parametrize("row", [{"tools": [WRAPPED]}, {"tools": json.dumps([WRAPPED])},
                                 {"functions": [SIGNATURE]},
                                 {"functions": json.dumps([SIGNATURE])}])
def test_signatures_of_tools_are_kept(row):
    assert normalize_conversation({**row, "messages": CALLED})["tools"] == [WRAPPED]


PIXEL = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize("row, reason", [
    ({"messages": CHAT[1:]}, "roles out of order"), ({"messages": CHAT[:3]}, "roles out of order"),
    ({"system": "Be long.", "messages": [SYSTEM, *CHAT]}, "roles out of order"),
    ({"messages": CHAT[:1]}, "no assistant turn"), ({"text": "x"}, "no assistant turn"),
    ({"messages": 3}, "a question, an answer or messages are neither text nor a list"),
    ({"instruction": "2 + 2?", "output": 4},
     "a question, an answer or messages are neither text nor a list"),
    ({"messages": ["hello"]}, "a turn is not an object with role and content"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
    ({"messages": [{"content": "x"}]}, "unknown role 'None'"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "empty content"),
    ({"messages": [{"role": "user", "content": [PIXEL]}, CHAT[1]]},
     "the content of a user message is not text"),
    ({"messages": [{**CHAT[0], "images": ["x.png"]}, CHAT[1]]},
     "the field 'images' is not supported here"),
    ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]},
     "the field 'reasoning_content' is not supported here"),
    ({"messages": CHAT, "documents": ["x"]}, "the field 'documents' is not supported here"),
    ({"messages": CHAT, "instruction": "x"}, "the field 'instruction' is not supported here"),
    ({"messages": CHAT, "conversations": CHAT}, "both 'messages' and 'conversations' are given"),
    ({"instruction": "x", "output": "y", "history": [["a"]]},
     "history is not a list of [question, answer] pairs"),
    ({"instruction": "x", "output": "y", "history": "a"},
     "history is not a list of [question, answer] pairs"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]},
     "a turn's weight is neither 0 nor 1"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 1, "train": False}]},
     "both 'weight' and 'train' are given"),
    ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "a user turn is to be learned"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "no turn is to be learned"),
    ({"messages": CALLED, "tools": "add"}, "tools are not a JSON list of objects"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
     "a function call is not JSON")])
def test_rows_that_say_more_than_can_be_learned_are_skipped(row, reason):
    with pytest.raises(InputError) as error:
        normalize_conversation(row)
    assert str(error.value) == reason


def test_unused_rows_and_fields_are_counted(tmp_path, capsys):
    """A byte order mark is no reason to skip a row."""
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": CHAT, "id": 1}, {"messages": CHAT, "id": 2}, {"messages": CHAT[:1]}, {},
            {"instruction": "Say hi.", "output": "hi", "topic": "x", "id": 3}, {"text": "x"},
            {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "add"}]}]}]
    path.write_text("\ufeff" + "\n".join(json.dumps(row) if row else "" for row in rows))
    samples, summary = read_data([path], normalize_conversation, assistant_parts, "messages")
    assert samples == [
        {"messages": CHAT, "source": "file", "where": f"{path}, line 1"},
        {"messages": turns("Say hi.", "hi"), "source": "file", "where": f"{path}, line 5"}]
    assert summary == {"skipped": {"the same as a row before it": [1, f"{path}, line 2"],
                                   "no assistant turn": [2, f"{path}, line 3"],
                                   "a tool call needs a name, and arguments that are JSON":
                                   [1, f"{path}, line 7"]},
                       "unused fields": {"id": 2, "topic": 1}}
    print_manifest({"counts": {"built": 2}, "kept": 2, **summary}, "conversations")
    printed = capsys.readouterr().out
    assert "conversations: 2 built, 2 kept\n" in printed
    assert f"--data: skipped 2: no assistant turn (first: {path}, line 3)\n" in printed
    assert "--data: ignored fields: id (2 rows), topic (1 rows)\n" in printed


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text, problem in (('{"instruction": "a", "output": "b"}\n{"instr', "line 2: not a JSON"),
                          ("[" * 9 ** 5, "line 1: not a JSON object"), ("", "it is empty"),
                          ('{"text": "x"}\n', "no usable row; line 1: no assistant turn")):
        path.write_text(text)
        with pytest.raises(InputError, match=problem):
            read_data([path], normalize_conversation, assistant_parts, "messages")


# ---- preference pairs


def asked(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


FIRST = [asked("q1"), answer("a1"), asked("q2")]        # the turns that both sides share


@pytest.mark.parametrize("row, prompt", [
    # standard, and with the prompt as turns
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [asked("q")]),
    ({"prompt": [asked("q")], "chosen": [answer("good")], "rejected": [answer("bad")]},
     [asked("q")]),
    ({"system": "Be brief.", "question": "q", "chosen": "good", "rejected": "bad"},
     [SYSTEM, asked("q")]),
    # turns that follow on the prompt
    ({"prompt": "q1", "chosen": [*FIRST[1:], answer("good")],
      "rejected": [*FIRST[1:], answer("bad")]}, FIRST),
    # whole conversations, with and without their first turns as the prompt
    ({"chosen": [*FIRST, answer("good")], "rejected": [*FIRST, answer("bad")]}, FIRST),
    ({"chosen": [SYSTEM, *FIRST, answer("good")], "rejected": [SYSTEM, *FIRST, answer("bad")]},
     [SYSTEM, *FIRST]),
    ({"prompt": "q1", "chosen": [*FIRST, answer("good")], "rejected": [*FIRST, answer("bad")]},
     FIRST),
    ({"prompt": "q1", "chosen": [SYSTEM, *FIRST, answer("good")],
      "rejected": [SYSTEM, *FIRST, answer("bad")]}, [SYSTEM, *FIRST]),
    ({"prompt": [SYSTEM, FIRST[0]], "chosen": [*FIRST, answer("good")],
      "rejected": [*FIRST, answer("bad")]}, [SYSTEM, *FIRST]),
    # UltraFeedback: the chosen side again as messages
    ({"prompt": "q1", "prompt_id": "x", "messages": [*FIRST, answer("good")], "score_chosen": 8,
      "chosen": [*FIRST, answer("good")], "rejected": [*FIRST, answer("bad")]}, FIRST),
    # a conversation in ShareGPT's format and the answers beside it
    ({"conversations": [{"from": "human", "value": "q"}],
      "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
     [asked("q")])])
def test_formats_of_pairs(row, prompt):
    assert normalize_pair(row) == {"prompt": prompt, "chosen": "good", "rejected": "bad",
                                   "source": "file"}


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "q", "chosen": "a"}, "chosen or rejected is missing or empty"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "chosen or rejected is missing or empty"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty content"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"},
     "a question, an answer or messages are neither text nor a list"),
    ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"},
     "chosen and rejected are texts without a prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"chosen": [asked("q"), answer("a")], "rejected": [asked("other"), answer("b")]},
     "chosen and rejected differ before their last turn"),
    ({"chosen": [*FIRST, answer("a")],
      "rejected": [FIRST[0], answer("other"), FIRST[2], answer("b")]},
     "chosen and rejected differ before their last turn"),
    ({"prompt": "q1", "chosen": [answer("a"), asked("q2"), answer("c")],
      "rejected": [answer("b"), asked("q2"), answer("d")]},
     "chosen and rejected differ before their last turn"),
    ({"prompt": [SYSTEM, asked("q")], "rejected": "b",
      "chosen": [{**SYSTEM, "content": "Be long."}, asked("q"), answer("a")]},
     "roles out of order"),
    ({"prompt": "other", "chosen": [*FIRST, answer("a")], "rejected": [*FIRST, answer("b")]},
     "roles out of order"),
    ({"chosen": FIRST, "rejected": FIRST[:1]}, "roles out of order"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x"]},
     "the field 'images' is not supported here"),
    ({"prompt": "q", "chosen": [{**answer("a"), "weight": 0}], "rejected": "b"},
     "weights are not supported in pairs"),
    ({"prompt": "q", "rejected": "b", "chosen": [
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]},
     "the answer calls a tool")])
def test_rows_that_are_no_pair_are_skipped(row, reason):
    with pytest.raises(InputError) as error:
        normalize_pair(row)
    assert str(error.value) == reason


def test_real_pairs():
    """Repaired real functions and the faulty ones; five are equal, as the repair is elsewhere."""
    path = reference_data("instruct/thealgorithms_fix_pairs.jsonl.gz")
    pairs, summary = read_data([path], normalize_pair, assistant_parts, "pairs")
    assert summary["skipped"] == {"chosen and rejected are the same": [5, f"{path}, line 40"]}
    assert summary["unused fields"]["context_before"] == 139
    assert len(pairs) == 159


def test_a_judge_is_asked_in_both_orders():
    """Ties, unclear replies and a preference for the first answer are no verdict."""
    replies = ["A", "**B**", "Answer B is better.", "A", "A", "A", "A tie.", "B",
               "B is better than A", "A", "no idea", ""]
    questions = []
    verdicts = ask_judge([(f"question {i}", "one", "two") for i in range(6)],
                         lambda requests: questions.extend(requests) or replies)
    assert verdicts == ["A", "B", "tie", "tie", "unclear", "unclear"]
    first, second = (request[0]["content"] for request in questions[2:4])
    assert first.index("one") < first.index("two") and second.index("two") < second.index("one")
    assert len(questions) == 12 and "question 1" in first and "question 1" in second
