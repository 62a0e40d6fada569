"""pytest tests/test_chats.py: the formats of conversations and of preference pairs."""

import itertools
import json
from collections import Counter

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


def turns(*contents, roles=("user", "assistant")):
    """Turns of a user and an assistant, in alternation."""
    return [{"role": role, "content": content}
            for role, content in zip(itertools.cycle(roles), contents)]


CHAT = turns("Add 1 to n.", "```python\nn + 1\n```", "And 2?", "n + 2")
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add two numbers."}}]
CALLED = [{"role": "user", "content": "1 + 2?"},
          {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]


@pytest.mark.parametrize("row, messages", [
    # OpenAI, with metadata
    ({"messages": CHAT, "id": 7, "source": "x", "tags": ["a"], "meta": {"n": 1}, "score": 0.5,
      "documents": None, "images": []}, CHAT),
    ({"messages": [CALLED[0], {**CALLED[1], "content": None},
                   {**CALLED[2], "tool_call_id": "1", "name": "add"}, CALLED[3]]}, CALLED),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                {"type": "text", "text": "b"}]}, CHAT[1]]},
     [*turns("a\nb"), CHAT[1]]),
    # ShareGPT
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b"}], "id": "x"}, [SYSTEM, *turns("a", "b")]),
    ({"conversations": [
        {"from": "human", "value": "1 + 2?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}]}, CALLED),
    # Alpaca, Orca
    ({"instruction": "a", "input": "b", "output": "c"}, turns("a\nb", "c")),
    ({"instruction": "a", "input": "", "output": "c", "history": [], "system": ""},
     turns("a", "c")),
    ({"system_prompt": "Be brief.", "question": "a", "response": "c"}, [SYSTEM, *turns("a", "c")]),
    # prompt and completion: earlier answers are context, as in TRL
    ({"prompt": "a", "completion": "b"}, turns("a", "b")),
    ({"prompt": turns("a", "b", "c"), "completion": turns("d", roles=["assistant"])},
     [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}, *turns("c", "d")]),
    # UltraChat repeats the first turn
    ({"prompt": "Add 1 to n.", "prompt_id": "x", "messages": CHAT}, CHAT),
    # turns that are not learned
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, {**CHAT[2], "train": False},
                   {**CHAT[3], "loss": True}]}, [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]])])
def test_formats_of_conversations(row, messages):
    assert normalize_conversation(row) == {"messages": messages, "source": "file"}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tool_signatures_are_kept(tools):
    assert normalize_conversation({"tools": tools, "messages": CALLED})["tools"] == TOOLS


@pytest.mark.parametrize("row, reason", [
    ({"messages": CHAT[1:]}, "roles out of order"), ({"messages": CHAT[:3]}, "roles out of order"),
    ({"system": "Be long.", "messages": [SYSTEM, *CHAT]}, "roles out of order"),
    ({"text": "x"}, "no assistant turn"),
    ({"instruction": "2 + 2?", "output": 4},
     "a question, an answer or messages are neither text nor a list"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "empty content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]},
     "the content of a user message is not text"),
    ({"messages": [{**CHAT[0], "images": ["x.png"]}, CHAT[1]]},
     "the field 'images' is not supported here"),
    ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]},
     "the field 'reasoning_content' is not supported here"),
    ({"instruction": "x", "output": "y", "history": [["a", "b"]]},
     "the field 'history' is not supported here"),
    ({"messages": CHAT, "conversations": CHAT}, "both 'messages' and 'conversations' are given"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "a turn's weight is neither 0 nor 1"),
    ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "a user turn is to be learned"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "no turn is to be learned"),
    ({"messages": CALLED, "tools": "add"}, "tools are not a JSON list of objects")])
def test_rows_that_cannot_be_learned_as_they_are(row, reason):
    with pytest.raises(InputError) as error:
        normalize_conversation(row)
    assert str(error.value) == reason


def test_unused_rows_and_fields_are_counted(tmp_path, capsys):
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


@pytest.mark.parametrize("text, problem", [
    ('{"instruction": "a", "output": "b"}\n{"instr', "line 2: not a JSON"), ("", "it is empty"),
    ('{"text": "x"}\n', "no usable row; line 1: no assistant turn; expected messages")])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"rows.jsonl.*{problem}"):
        read_data([path], normalize_conversation, assistant_parts, "messages")


# ---- preference pairs

FIRST = turns("q1", "a1", "q2")             # the turns that both sides share


def ending(*messages):
    """The two sides of a pair: the messages, then "good" or "bad" as the answer."""
    return {side: [*messages, {"role": "assistant", "content": text}]
            for side, text in (("chosen", "good"), ("rejected", "bad"))}


@pytest.mark.parametrize("row, prompt", [
    # TRL: the prompt as text or as turns, or whole conversations without a prompt
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, turns("q")),
    ({"prompt": turns("q"), **ending()}, turns("q")),
    (ending(SYSTEM, *FIRST), [SYSTEM, *FIRST]),
    # turns that follow the prompt, or repeat it, with or without the system message
    ({"prompt": "q1", **ending(*FIRST[1:])}, FIRST),
    ({"prompt": "q1", **ending(SYSTEM, *FIRST)}, [SYSTEM, *FIRST]),
    ({"prompt": [SYSTEM, FIRST[0]], **ending(*FIRST)}, [SYSTEM, *FIRST]),
    # Orca; UltraFeedback, with the chosen side again as messages; ShareGPT's turns
    ({"system": "Be brief.", "question": "q", "chosen": "good", "rejected": "bad"},
     [SYSTEM, *turns("q")]),
    ({"prompt": "q1", "prompt_id": "x", "score_chosen": 8, "messages": ending(*FIRST)["chosen"],
      **ending(*FIRST)}, FIRST),
    ({"conversations": [{"from": "human", "value": "q"}],
      "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
     turns("q"))])
def test_formats_of_pairs(row, prompt):
    assert normalize_pair(row) == {"prompt": prompt, "chosen": "good", "rejected": "bad",
                                   "source": "file"}


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "chosen or rejected is missing or empty"),
    ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"},
     "chosen and rejected are texts without a prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"chosen": turns("q1", "a", "q2", "c"), "rejected": turns("q1", "b", "q2", "d")},
     "chosen and rejected differ before their last turn"),
    ({"prompt": [SYSTEM, *turns("q")], "rejected": "b",
      "chosen": [{**SYSTEM, "content": "Be long."}, *turns("q", "a")]}, "roles out of order"),
    ({"prompt": "other", **ending(*FIRST)}, "roles out of order"),
    ({"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "weight": 0}],
      "rejected": "b"}, "weights are not supported in pairs"),
    ({"prompt": "q", "chosen": [{"role": "assistant", "tool_calls": [CALL]}], "rejected": "b"},
     "the answer calls a tool")])
def test_rows_that_are_no_pair(row, reason):
    with pytest.raises(InputError) as error:
        normalize_pair(row)
    assert str(error.value) == reason


def test_real_pairs():
    """Real functions before and after a repair; five are equal, as the repair is elsewhere."""
    path = reference_data("instruct/thealgorithms_fix_pairs.jsonl.gz")
    pairs, summary = read_data([path], normalize_pair, assistant_parts, "pairs")
    assert summary["skipped"] == {"chosen and rejected are the same": [5, f"{path}, line 40"]}
    assert summary["unused fields"]["context_before"] == 139
    assert len(pairs) == 159


def test_a_judge_is_asked_in_both_orders():
    """Ties, unclear replies and a preference for the first answer make no pair."""
    replies = ["A", "**B**", "Answer B is better.", "A", "A", "A", "A tie.", "B",
               "B is better than A", "A", "no idea", ""]
    requests, counts = [], Counter()
    questions = [turns(f"question {i}") for i in range(8)]
    answers = [("one", True), ("two", True)] * 6
    answers += [("one", True), ("one", True), ("one", True), ("two", False)]    # equal; cut off
    pairs = ask_judge(questions, answers, counts, lambda asked: requests.extend(asked) or replies)
    assert pairs == [
        {"prompt": questions[0], "chosen": "one", "rejected": "two", "source": "judge"},
        {"prompt": questions[1], "chosen": "two", "rejected": "one", "source": "judge"}]
    assert counts == {"judged tie": 2, "judged unclear": 2} and len(requests) == 12
    first, second = (request[0]["content"] for request in requests[2:4])
    assert first.index("one") < first.index("two") and second.index("two") < second.index("one")
    assert "question 1" in first and "question 1" in second
