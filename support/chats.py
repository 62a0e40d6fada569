"""Conversations and preference pairs of users: many formats in, one format out.

A conversation becomes {"messages": [...]}, a preference pair {"prompt": messages, "chosen": text,
"rejected": text}, either with "tools" if the row lists any. A message has role and content, and may
have tool_calls, or "weight": 0 if it is context only. Formats are told apart by the names of their
fields (FIELDS): messages (OpenAI, ShareGPT), instruction and output (Alpaca, Dolly), question and
response (Orca), prompt and completion, or prompt, chosen and rejected (TRL).

A row that says something this format cannot express, such as an image or a weight of 0.5, is
skipped and counted, because training on the rest of it would teach something else.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

from support.distributed import say
from support.files import InputError, read_rows

# What a row says -> the fields that say it
FIELDS = {"messages": ("messages", "conversations", "conversation"),
          "question": ("instruction", "prompt", "question", "query", "problem"),
          "context": ("input", "context"),                  # is appended to the question
          "answer": ("output", "completion", "response", "answer", "solution"),
          "system": ("system", "system_prompt", "system_message"),
          "tools": ("tools", "functions"),
          "calls": ("tool_calls", "function_call"),         # from here on: fields of a turn
          "role": ("role", "from"),
          "text": ("content", "value"),
          "weight": ("weight", "train", "training", "loss")}
# Another text or number, such as "id" or "source", describes a row and is ignored; print_manifest()
# says so. But these fields, and all lists and objects except METADATA, say more than that.
MEANINGFUL = {"chosen", "rejected", "history", "document", "passage", "background", "knowledge",
              "persona", "schema", "code", "prefix", "suffix", "reasoning", "reasoning_content",
              "thinking", "image", "audio", "video"}
MEANINGFUL.update(name for kind, names in FIELDS.items() if kind not in ("role", "text")
                  for name in names)
METADATA = {"metadata", "meta", "info", "tags", "labels", "topics", "categories", "keywords",
            "languages", "licenses", "scores", "ratings"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
         "observation": "tool", "function": "tool", "function_response": "tool",
         "tool_response": "tool", "developer": "system"}
MAY_FOLLOW = {"system": {None}, "user": {None, "system", "assistant"},
              "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}

# ------------------------------------------------------------------------------------------------
# Fields


def given_fields(row):
    """The fields of a row or a turn that hold something."""
    return {name: value for name, value in row.items() if value not in (None, "", [], {})}


def pop_field(fields, kind):
    """Remove the field of a kind of FIELDS, whatever it is called -> its value, or None."""
    given = [name for name in FIELDS[kind] if name in fields]
    if len(given) > 1:
        raise InputError(f"both {given[0]!r} and {given[1]!r} are given")
    return fields.pop(given[0]) if given else None


def check_unused(fields):
    """Raise InputError if one of the fields that are left must not be ignored."""
    for name, value in fields.items():
        if name in MEANINGFUL or (isinstance(value, (list, dict)) and name not in METADATA):
            raise InputError(f"the field {name!r} is not supported here")


def parse_json(value, error):
    """The value of a field that may be given as JSON text; InputError(error) if it is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(error) from None


def text_of(content, role):
    """The content of a turn as text; it may be a list of text parts. A tool may return anything."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    elif isinstance(content, str) or role == "tool":
        return str(content)
    raise InputError(f"the content of a {role} message is not text")


# ------------------------------------------------------------------------------------------------
# Turns


def normalize_message(message):
    """A turn in OpenAI's format (role, content) or ShareGPT's (from, value) as a message."""
    if not isinstance(message, dict):
        raise InputError("a turn is not an object with role and content")
    fields = given_fields(message)
    given_role = str(pop_field(fields, "role"))
    role = ROLES.get(given_role, given_role)
    if role not in MAY_FOLLOW:
        raise InputError(f"unknown role {given_role!r}")
    content = pop_field(fields, "text")
    calls = pop_field(fields, "calls")
    weight = pop_field(fields, "weight")
    check_unused(fields)
    if given_role in ("function_call", "tool_call"):        # the content is the call, as JSON
        calls = parse_json(content, "a function call is not JSON")
        content = None
    turn = {"role": role, "content": "" if content is None else text_of(content, role)}
    if calls:
        if role != "assistant":
            raise InputError(f"a {role} turn calls a tool")
        turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
    elif not turn["content"].strip() and role != "tool":
        raise InputError("empty content")
    if weight not in (None, 0, 1):
        raise InputError("a turn's weight is neither 0 nor 1")
    if role == "assistant" and weight == 0:
        turn["weight"] = 0
    if role != "assistant" and weight == 1:
        raise InputError(f"a {role} turn is to be learned")
    return turn


def normalize_turns(value, role):
    """A list of turns, one turn, or the text of one turn of the given role, as messages."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError("a question, an answer or messages are neither text nor a list")
    return [normalize_message(message) for message in value]


def pop_prompt(fields):
    """Remove everything before the answer from the fields of a row -> messages."""
    system = pop_field(fields, "system")
    listed = pop_field(fields, "messages")
    if listed is not None:
        turns = normalize_turns(listed, "user")
        contents = [turn["content"] for turn in turns]
        for name in (*FIELDS["question"], *FIELDS["context"], *FIELDS["answer"]):
            if fields.get(name) in contents:                # UltraChat repeats the first turn
                del fields[name]
    else:
        parts = [pop_field(fields, "question"), pop_field(fields, "context")]
        parts = [part for part in parts if part is not None]
        if len(parts) == 2 and all(isinstance(part, str) for part in parts):
            parts = ["\n".join(parts)]
        turns = [turn for part in parts for turn in normalize_turns(part, "user")]
    turns = pop_history(fields) + turns
    if system is not None:
        first = normalize_turns({"role": "system", "content": system}, "system")
        turns = turns if turns[:1] == first else first + turns
    return turns


def pop_history(fields):
    """Remove Alpaca's history, a list of [question, answer] pairs, from the fields of a row ->
    messages."""
    history = fields.pop("history", [])
    if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise InputError("history is not a list of [question, answer] pairs")
    turns = []
    for question, answer in history:
        turns += normalize_turns(question, "user") + normalize_turns(answer, "assistant")
    return turns


def pop_tools(fields):
    """Remove the signatures of tools from the fields of a row -> {"tools": list}, or {}."""
    error = "tools are not a JSON list of objects"
    wrap = "functions" in fields                            # OpenAI's older name lacks the wrapper
    tools = parse_json(pop_field(fields, "tools"), error) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(error)
    if wrap:
        tools = [{"type": "function", "function": tool} for tool in tools]
    return {"tools": tools} if tools else {}


def check_turns(turns):
    """Raise InputError unless the turns are a conversation that ends with an answer."""
    roles = [None, *(turn["role"] for turn in turns)]
    if "assistant" not in roles:
        raise InputError("no assistant turn")
    if roles[-1] != "assistant" or not all(
            before in MAY_FOLLOW[role] for before, role in itertools.pairwise(roles)):
        raise InputError("roles out of order")


# ------------------------------------------------------------------------------------------------
# Rows


def is_learned(turn):
    return turn["role"] == "assistant" and turn.get("weight") != 0


def normalize_conversation(row):
    """A row as a conversation; InputError says why it cannot be used."""
    fields = given_fields(row)
    turns_are_context = isinstance(fields.get("prompt"), list)      # TRL learns the completion only
    turns = pop_prompt(fields)
    tools = pop_tools(fields)
    answer = pop_field(fields, "answer")
    check_unused(fields)
    if answer is not None:
        for turn in turns:
            if turns_are_context and turn["role"] == "assistant":
                turn["weight"] = 0
        turns += normalize_turns(answer, "assistant")
    check_turns(turns)
    if not any(is_learned(turn) for turn in turns):
        raise InputError("no turn is to be learned")
    return {"messages": turns, "source": "file", **tools}


def whole_conversation(prompt, answer):
    """The turns of the prompt and of the chosen or the rejected answer, which is text or a list of
    turns and may repeat the prompt, with or without its system turn."""
    if isinstance(answer, str) and not prompt:
        raise InputError("chosen and rejected are texts without a prompt")
    turns = normalize_turns(answer, "assistant")
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    if turns[0]["role"] == "user":
        turns = system + turns
    elif turns[0]["role"] == "system" and not system:
        prompt = turns[:1] + prompt
    if turns[:len(prompt)] != prompt:                       # it does not repeat the prompt
        turns = prompt + turns
    check_turns(turns)
    return turns


def normalize_pair(row):
    """A row as a preference pair; InputError says why it cannot be used.

    chosen and rejected are texts, or turns that follow the prompt, or whole conversations. All
    turns that they share become the prompt; they must differ in one answer, the last turn.
    """
    fields = given_fields(row)
    if "chosen" not in fields or "rejected" not in fields:
        raise InputError("chosen or rejected is missing or empty")
    answers = fields.pop("chosen"), fields.pop("rejected")
    if fields.get("messages") == answers[0]:                # UltraFeedback has it twice
        del fields["messages"]
    prompt = pop_prompt(fields)
    tools = pop_tools(fields)
    check_unused(fields)
    chosen, rejected = (whole_conversation(prompt, answer) for answer in answers)
    if chosen[:-1] != rejected[:-1]:
        raise InputError("chosen and rejected differ before their last turn")
    if any("weight" in turn for turn in [*chosen, rejected[-1]]):
        raise InputError("weights are not supported in pairs")
    if "tool_calls" in chosen[-1] or "tool_calls" in rejected[-1]:
        raise InputError("the answer calls a tool")
    if chosen[-1] == rejected[-1]:
        raise InputError("chosen and rejected are the same")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"], "source": "file", **tools}


# ------------------------------------------------------------------------------------------------
# Files


def read_data(paths, normalize, check_answer, expected):
    """The usable rows of files -> (a list of what `normalize` makes of each, a summary of the rest,
    which print_manifest() prints).

    check_answer: raises InputError for an assistant's message that cannot be rendered. expected:
    the formats, for the error about a file without any usable row.
    """
    samples = {}                                            # as JSON -> the sample
    skipped, unused = {}, Counter()
    for path in paths or []:
        before, reason, number = len(samples), "it is empty", 1
        for number, row in read_rows(path):
            where = f"{path}, line {number}"
            try:
                sample = normalize(row)
                for message in sample.get("messages") or sample["prompt"]:
                    if message["role"] == "assistant":
                        check_answer(message)
                key = json.dumps(sample)
                if key in samples:
                    raise InputError("the same as a row before it")
                samples[key] = {**sample, "where": where}
                unused.update(given_fields(row).keys() - MEANINGFUL)
            except RecursionError:
                reason = "nested too deeply"
                count_skipped(skipped, reason, where)
            except InputError as error:
                reason = str(error)
                count_skipped(skipped, reason, where)
        if len(samples) == before:
            raise InputError(f"{path}: no usable row; line {number}: {reason}; expected {expected}")
    return list(samples.values()), {"skipped": skipped, "unused fields": unused}


def count_skipped(skipped, reason, where):
    """skipped: reason -> [how many rows, where the first of them is]."""
    skipped.setdefault(reason, [0, where])[0] += 1


def print_manifest(manifest, name):
    """Print how many samples a folder has, and what is not used of --data: how many rows, why, and
    where the first of them is."""
    say(f"{name}: " + ", ".join(f"{n:,} {reason}" for reason, n in manifest["counts"].items())
        + f", {manifest['kept']:,} kept")
    for title in ("sources", "languages"):
        if title in manifest:
            say(f"{title}: " + ", ".join(f"{key} {n:,}" for key, n in manifest[title].items()))
    for reason, (count, first) in manifest["skipped"].items():
        say(f"--data: skipped {count:,}: {reason} (first: {first})")
    if manifest["unused fields"]:
        say("--data: ignored fields: " + ", ".join(
            f"{field} ({count:,} rows)" for field, count in manifest["unused fields"].items()))


def file_hashes(paths):
    """Path -> the start of the SHA-256 of the file's contents."""
    hashes = {}
    for path in paths or []:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
        hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return hashes


# ------------------------------------------------------------------------------------------------
# Conversations as a whole


def new_conversation(question, answer, source, **more):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}], "source": source, **more}


def all_text(messages):
    """Everything that is said, tool calls included."""
    calls = [json.dumps(turn["tool_calls"]) for turn in messages if "tool_calls" in turn]
    return "\n".join([turn["content"] for turn in messages] + calls)


def last_answer(conversation):
    return conversation["messages"][-1]["content"]


def last_question(conversation):
    return next(turn["content"] for turn in reversed(conversation["messages"])
                if turn["role"] == "user")


def prompt_key(conversation):
    """The same text for conversations that differ in their last answer only."""
    return json.dumps([conversation["messages"][:-1], conversation.get("tools")])


class Selection:
    """Conversations, and in summary["counts"] how many were dropped for which reason."""

    def __init__(self, conversations, summary):
        self.conversations = conversations
        self.summary = {"counts": {"built": len(conversations)}, **summary}

    def drop(self, reason, is_unwanted):
        """Drop conversations -> a list of them. InputError: none is left."""
        remaining, dropped = [], []
        for conversation in self.conversations:
            if is_unwanted(conversation):
                dropped.append(conversation)
            else:
                remaining.append(conversation)
        if not remaining:
            raise InputError(f"no conversation is left of {len(self.conversations):,}: {reason}")
        for conversation in dropped:
            if "where" in conversation:                     # the user's own: say which
                count_skipped(self.summary["skipped"], reason, conversation["where"])
        self.summary["counts"][reason] = len(dropped)
        self.conversations = remaining
        return dropped

    def drop_duplicates(self):
        seen = set()

        def is_repeated(conversation):
            key = prompt_key(conversation) + last_answer(conversation)
            repeated = key in seen
            seen.add(key)
            return repeated

        self.drop("duplicates", is_repeated)


def next_line():
    """What the user types next, "" at the end."""
    try:
        return input("> ").strip()
    except EOFError:                                        # Ctrl-D, or the end of a file
        return ""


# ------------------------------------------------------------------------------------------------
# LLM teacher and LLM judge

# Prompt templates; the report does not publish its own; ours
TEACHER_QUESTION = ("Here is a piece of a program:\n\n{}\n\nWrite one task for a programmer that "
                    "has to do with it and can be solved by one self-contained function. Answer "
                    "the task alone.")
TEACHER_SCORE = ("Question:\n{}\n\nAnswer:\n{}\n\nMark the answer from 0 to 10 in each of these: "
                 "consistency, relevance, difficulty, code exists, correctness, form, clarity, "
                 "comments, easy to learn. Answer with nine numbers separated by blanks.")
JUDGE = ("Which answer to the question is better?\n\nQuestion:\n{}\n\nAnswer A:\n{}\n\nAnswer B:\n"
         "{}\n\nAnswer with the one letter A or B, or with the word tie.")


def scores_in(reply, count):
    """The scores from 0 to 1 in an LLM teacher's reply; None unless there are `count` of them."""
    scores = [min(10, int(digits[:9])) / 10 for digits in re.findall(r"\d+", reply)]
    return scores if len(scores) == count else None


def preferred(reply):
    """What a judge has said: "A", "B", "tie", or "" if that is not clear."""
    if re.search(r"(?i)\btie\b", reply):
        return "tie"
    letters = set(re.findall(r"\b[AB]\b", reply))
    return letters.pop() if len(letters) == 1 else ""


def ask_judge(candidates, ask_all):
    """Let an LLM judge compare answers in both orders, as judges tend to prefer the first.

    candidates: (question, answer A, answer B); ask_all: conversations -> replies. Returns for each
    "A" or "B" if that answer won twice, "unclear" if a reply was, else "tie".
    """
    requests = []
    for question, a, b in candidates:
        for first, second in ((a, b), (b, a)):
            requests.append([{"role": "user", "content": JUDGE.format(question, first, second)}])
    replies = [preferred(reply) for reply in ask_all(requests)]
    verdicts = []
    for in_order, swapped in zip(replies[::2], replies[1::2]):
        if {in_order, swapped} == {"A", "B"}:
            verdicts.append(in_order)
        else:
            verdicts.append("unclear" if "" in (in_order, swapped) else "tie")
    return verdicts
