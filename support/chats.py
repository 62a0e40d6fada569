"""Conversations and preference pairs: reads the common formats and converts them to one.

A conversation becomes {"messages": [...]}, a preference pair {"prompt": messages, "chosen": text,
"rejected": text}, either with "tools" if the row lists any. A message has role and content, and may
have tool_calls, or "weight": 0 if it is context only. Formats are told apart by their field names
(FIELDS): messages (OpenAI, ShareGPT), instruction and output (Alpaca, Dolly), question and response
(Orca), prompt and completion, or prompt, chosen and rejected (TRL).

A row with content that this format cannot express, such as an image or a weight of 0.5, is skipped
and counted, because training on the rest of the row would teach something else.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

from support.distributed import say
from support.files import InputError, read_rows

# Part of a row or a turn -> the field names under which datasets store it
FIELDS = {"messages": ("messages", "conversations", "conversation"),
          "question": ("instruction", "prompt", "question", "query", "problem"),
          "context": ("input", "context"),                  # is appended to the question
          "answer": ("output", "completion", "response", "answer", "solution"),
          "system": ("system", "system_prompt", "system_message"),
          "tools": ("tools",),
          "calls": ("tool_calls",),                         # from here on: fields of a turn
          "role": ("role", "from"),
          "text": ("content", "value"),
          "weight": ("weight", "train", "training", "loss")}
# Other fields with a text or a number, such as "id", are ignored. But ignoring one of these, or a
# list or an object other than METADATA, would change what a row says, so the row is skipped.
MEANINGFUL = {"chosen", "rejected", "history", "document", "passage", "background", "knowledge",
              "persona", "schema", "code", "prefix", "suffix", "reasoning", "reasoning_content",
              "thinking", "image", "audio", "video", "functions", "function_call"}
MEANINGFUL.update(name for part, names in FIELDS.items() if part not in ("role", "text")
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
# Fields and turns


def nonempty_fields(row):
    return {name: value for name, value in row.items() if value not in (None, "", [], {})}


def pop_field(fields, part):
    """Remove one part of FIELDS, whatever its field is called -> its value, or None."""
    names = [name for name in FIELDS[part] if name in fields]
    if len(names) > 1:
        raise InputError(f"both {names[0]!r} and {names[1]!r} are given")
    return fields.pop(names[0]) if names else None


def check_unused(fields):
    """Raise InputError if one of the remaining fields must not be ignored."""
    for name, value in fields.items():
        if name in MEANINGFUL or (isinstance(value, (list, dict)) and name not in METADATA):
            raise InputError(f"the field {name!r} is not supported here")


def parse_json(value, error):
    """The value of a field that may be JSON text; InputError(error) if it is not valid."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(error) from None


def content_text(content, role):
    """The content of a turn, which may be a list of text parts. A tool may return any value."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    elif isinstance(content, str) or role == "tool":
        return str(content)
    raise InputError(f"the content of a {role} message is not text")


def normalize_message(message):
    """A turn in OpenAI's format (role, content) or ShareGPT's (from, value) as a message."""
    if not isinstance(message, dict):
        raise InputError("a turn is not an object with role and content")
    fields = nonempty_fields(message)
    original_role = str(pop_field(fields, "role"))
    role = ROLES.get(original_role, original_role)
    if role not in MAY_FOLLOW:
        raise InputError(f"unknown role {original_role!r}")
    content = pop_field(fields, "text")
    calls = pop_field(fields, "calls")
    weight = pop_field(fields, "weight")
    check_unused(fields)
    if original_role in ("function_call", "tool_call"):     # ShareGPT: the content is the call
        calls = parse_json(content, "a function call is not JSON")
        content = None
    turn = {"role": role, "content": "" if content is None else content_text(content, role)}
    if calls:
        if role != "assistant":
            raise InputError(f"a {role} turn calls a tool")
        turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
    elif not turn["content"].strip() and role != "tool":
        raise InputError("empty content")
    if weight not in (None, 0, 1):
        raise InputError("a turn's weight is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise InputError(f"a {role} turn is to be learned")
    if weight == 0 and role == "assistant":
        turn["weight"] = 0
    return turn


def normalize_turns(value, role):
    """A list of turns, a single turn, or the text of a turn with this role -> messages."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError("a question, an answer or messages are neither text nor a list")
    return [normalize_message(message) for message in value]


def check_turns(turns):
    """Raise InputError unless the turns are a conversation that ends with an answer."""
    roles = [None, *(turn["role"] for turn in turns)]
    if "assistant" not in roles:
        raise InputError("no assistant turn")
    if roles[-1] != "assistant" or not all(
            previous in MAY_FOLLOW[role] for previous, role in itertools.pairwise(roles)):
        raise InputError("roles out of order")


def is_learned(turn):
    return turn["role"] == "assistant" and turn.get("weight") != 0


# ------------------------------------------------------------------------------------------------
# Rows


def pop_prompt(fields):
    """Remove everything before the answer from the fields of a row -> messages."""
    system = pop_field(fields, "system")
    messages = pop_field(fields, "messages")
    if messages is not None:
        turns = normalize_turns(messages, "user")
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
    if system is not None:
        message = normalize_message({"role": "system", "content": system})
        if turns[:1] != [message]:                          # the messages may begin with it, too
            turns = [message, *turns]
    return turns


def pop_tools(fields):
    """Remove the signatures of tools from the fields of a row -> {"tools": list}, or {}."""
    error = "tools are not a JSON list of objects"
    tools = parse_json(pop_field(fields, "tools"), error) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(error)
    return {"tools": tools} if tools else {}


def normalize_conversation(row):
    """A row as a conversation; InputError says why it cannot be used."""
    fields = nonempty_fields(row)
    prompt_is_context = isinstance(fields.get("prompt"), list)      # TRL: learn the completion only
    turns = pop_prompt(fields)
    tools = pop_tools(fields)
    answer = pop_field(fields, "answer")
    check_unused(fields)
    if answer is not None:
        for turn in turns:
            if prompt_is_context and turn["role"] == "assistant":
                turn["weight"] = 0
        turns += normalize_turns(answer, "assistant")
    check_turns(turns)
    if not any(is_learned(turn) for turn in turns):
        raise InputError("no turn is to be learned")
    return {"messages": turns, "source": "file", **tools}


def split_system(turns):
    """Turns -> (a list with the system message that they begin with, if any; all other turns)."""
    count = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:count], turns[count:]


def whole_conversation(prompt, answer):
    """The turns of the prompt and of the chosen or the rejected answer, which is text or a list of
    turns and may repeat the prompt, with or without its system message."""
    if isinstance(answer, str) and not prompt:
        raise InputError("chosen and rejected are texts without a prompt")
    system, prompt = split_system(prompt)
    answer_system, turns = split_system(normalize_turns(answer, "assistant"))
    if answer_system != system:                             # two that differ are out of order
        system = system + answer_system
    if turns[:len(prompt)] != prompt:                       # it does not repeat the prompt
        turns = prompt + turns
    check_turns(system + turns)
    return system + turns


def normalize_pair(row):
    """A row as a preference pair; InputError says why it cannot be used.

    chosen and rejected are texts, or turns that follow the prompt, or whole conversations. They
    must differ in their last turn only, an answer; the turns before it become the prompt.
    """
    fields = nonempty_fields(row)
    if "chosen" not in fields or "rejected" not in fields:
        raise InputError("chosen or rejected is missing or empty")
    answers = [fields.pop("chosen"), fields.pop("rejected")]
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
    """The usable rows of files, each converted by `normalize` -> (a list of them, a summary of the
    skipped rows and ignored fields for print_manifest()).

    check_answer: raises InputError for an assistant message that cannot be rendered. expected: the
    formats, for the error about a file without any usable row.
    """
    samples, seen = [], set()
    skipped, unused = {}, Counter()
    for path in paths or []:
        count_before, number, reason = len(samples), 1, "it is empty"
        for number, row in read_rows(path):
            where = f"{path}, line {number}"
            try:
                sample = normalize(row)
                for message in sample.get("messages") or sample["prompt"]:
                    if message["role"] == "assistant":
                        check_answer(message)
                key = json.dumps(sample)
                if key in seen:
                    raise InputError("the same as a row before it")
                seen.add(key)
                samples.append({**sample, "where": where})
                unused.update(nonempty_fields(row).keys() - MEANINGFUL)
            except (InputError, RecursionError) as error:   # the latter: nested too deeply
                reason = str(error)
                count_skipped(skipped, reason, where)
        if len(samples) == count_before:
            raise InputError(f"{path}: no usable row; line {number}: {reason}; expected {expected}")
    return samples, {"skipped": skipped, "unused fields": unused}


def count_skipped(skipped, reason, where):
    """skipped: reason -> [how many rows, where the first of them is]."""
    skipped.setdefault(reason, [0, where])[0] += 1


def print_manifest(manifest, name):
    """Print how many samples a folder has, and which rows and fields of --data were not used."""
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
    """Path -> the first 16 digits of the SHA-256 of the file."""
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
    """The text of all messages, tool calls included."""
    calls = [json.dumps(turn["tool_calls"]) for turn in messages if "tool_calls" in turn]
    return "\n".join([turn["content"] for turn in messages] + calls)


def last_answer(conversation):
    return conversation["messages"][-1]["content"]


def last_question(conversation):
    return [turn["content"] for turn in conversation["messages"] if turn["role"] == "user"][-1]


def prompt_key(conversation):
    """A text that is the same for conversations that differ in their last answer only."""
    return json.dumps([conversation["messages"][:-1], conversation.get("tools")])


class Selection:
    """Conversations, and in summary["counts"] how many were dropped for which reason."""

    def __init__(self, conversations, summary):
        self.conversations = conversations
        self.summary = {"counts": {"built": len(conversations)}, **summary}

    def drop(self, reason, is_unwanted):
        """Drop conversations -> a list of them. InputError: none would be left."""
        remaining, dropped = [], []
        for chat in self.conversations:
            if is_unwanted(chat):
                dropped.append(chat)
            else:
                remaining.append(chat)
        if not remaining:
            raise InputError(f"no conversation is left of {len(self.conversations):,}: {reason}")
        for chat in dropped:
            if "where" in chat:                             # from a file of the user: say which row
                count_skipped(self.summary["skipped"], reason, chat["where"])
        self.summary["counts"][reason] = len(dropped)
        self.conversations = remaining
        return dropped

    def drop_duplicates(self):
        first = {}
        for chat in self.conversations:
            first.setdefault((prompt_key(chat), last_answer(chat)), chat)
        self.drop("duplicates",
                  lambda chat: first[prompt_key(chat), last_answer(chat)] is not chat)


def next_line():
    """The next line that the user types; "" at the end."""
    try:
        return input("> ").strip()
    except EOFError:                                        # Ctrl-D, or the end of a file
        return ""


# ------------------------------------------------------------------------------------------------
# LLM teacher and LLM judge

# Prompt templates; the report does not publish its own; ours
JUDGE = ("Which answer to the question is better?\n\nQuestion:\n{}\n\nAnswer A:\n{}\n\nAnswer B:\n"
         "{}\n\nAnswer with the one letter A or B, or with the word tie.")


def preferred(reply):
    """The verdict in a judge's reply: "A", "B", "tie", or "unclear"."""
    if re.search(r"(?i)\btie\b", reply):
        return "tie"
    letters = set(re.findall(r"\b[AB]\b", reply))
    return letters.pop() if len(letters) == 1 else "unclear"


def ask_judge(questions, answers, counts, ask_all):
    """Preference pairs of two answers to each question: chosen is the one that an LLM judge prefers
    in both orders, since judges tend to prefer the first.

    questions: the messages of each; answers: (text, stopped by itself), two for each question;
    counts: Counter to which the verdicts without a pair are added; ask_all: requests -> replies.
    """
    texts = [text if stopped else "" for text, stopped in answers]      # cut off: no answer
    candidates = [(question, a, b) for question, a, b in zip(questions, texts[::2], texts[1::2])
                  if a.strip() and b.strip() and a != b]
    requests = []
    for question, a, b in candidates:
        for first, second in ((a, b), (b, a)):
            text = JUDGE.format(question[-1]["content"], first, second)
            requests.append([{"role": "user", "content": text}])
    verdicts = [preferred(reply) for reply in ask_all(requests)]
    pairs = []
    for (question, a, b), in_order, swapped in zip(candidates, verdicts[::2], verdicts[1::2]):
        if (in_order, swapped) == ("A", "B"):
            pairs.append({"prompt": question, "chosen": a, "rejected": b, "source": "judge"})
        elif (in_order, swapped) == ("B", "A"):
            pairs.append({"prompt": question, "chosen": b, "rejected": a, "source": "judge"})
        else:
            unclear = "unclear" in (in_order, swapped)
            counts["judged unclear" if unclear else "judged tie"] += 1
    return pairs
