"""Supervised fine-tuning: from a model that completes code to one that answers requests.

Section 4 of the report. Conversations come from a grammar of small tasks, from code on disk, from
files, or from an LLM teacher. A checklist scores them; answers that show examples are run. Training
goes from coarse to fine: first on all conversations, then on those with the best scores (in the
report: from many samples of low quality to those selected by rejection sampling). The loss is taken
on answers only (not published; ours). Some sequences are fill-in-the-middle, as in the report, so
that the model does not forget it. The training loop is in pretrain.py, the tasks are in
support/tasks.py, the formats of users' files in support/chats.py, and preferences in dpo.py.

    python sft.py                       # build, train, measure; 5 to 13 minutes on 2 CPU cores
    python sft.py --chat                # talk with the newest model
    python sft.py --build               # only make the conversations: out/instructions
    python sft.py --data FILE           # with your own conversations (JSON or JSON Lines)
    python sft.py --data FILE --only-data                   # with your own conversations only
    python sft.py --teacher http://localhost:8000/v1        # a larger model writes some of them

Read first: chat_ids, packed_sequence, Packing, ConversationBatches, train_stage
"""

import argparse
import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from data import (DEFAULT_SOURCES, Batches, Contamination, Sequence, default_benchmarks, generator,
                  load_documents, load_tokens, made_from, prepare_data, print_corpus)
from evaluate import (bits_per_byte, bootstrap, complete, infilling_examples, measure_infilling,
                      pass_at_k, prompt_ids)
from fim import load, newest_model
from model import CONFIGS, Config, generate
from pretrain import (download, fill_in, load_base, next_token_loss, size_of, train,
                      training_flags)
from support.answers import code_block
from support.benchmarks import benchmarks, find_problems
from support.chats import (Selection, all_text, file_hashes, is_learned, last_answer,
                           last_question, new_conversation, next_line, normalize_conversation,
                           print_manifest, prompt_key, read_data)
from support.distributed import RANK, WORLD, barrier, say, start_processes, stop_processes
from support.files import (InputError, hub_folder, read_rows, run, whole_folder, write_json,
                           write_text)
from support.functions import (answer_language, checklist_scores, documented_functions,
                               example_problem, mutated, share)
from support.llm_client import user
from support.plan import print_table
from support.plots import plot_scores
from support.sandbox import grades
from support.tasks import held_out_problems, training_tasks
from support.teacher import teacher_conversations
from tokenizer import ENDOFTEXT, TextStream, Tokenizer, assistant_parts

PRESETS = {"tiny": dict(seq_len=512, batch_tokens=4096, device_batch=8, steps=500, lr=2e-3),
           "mini": dict(seq_len=512, batch_tokens=8192, device_batch=8, steps=1000, lr=1e-3),
           "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=500, lr=1e-3)}
# seq_len and batch of the released script (finetuning/sft), lr of Qwen2.5 (arXiv 2412.15115,
# section 4.1); steps: not published; ours
PUBLISHED = dict(seq_len=1280, batch_tokens=1280 * 1024, device_batch=4, steps=3000, lr=7e-6)
COARSE = 2 / 3              # share of the steps that see all conversations; not published; ours
FINE = 0.5                  # share of the conversations that the other steps see; likewise
FIM_SHARE = 0.3             # of the sequences; the report's "small part" is not published; ours

# ------------------------------------------------------------------------------------------------
# A conversation -> ids and targets


def chat_ids(tokenizer, messages, tools=None, last_turn=False, published_mask=False):
    """A conversation in ChatML -> (ids, learned): learned[i] tells whether ids[i] is a target.

    Targets are the text of the assistant and the <|im_end|> after it. Turns with "weight": 0 have
    none; with last_turn, only the last message has any. published_mask: as in the released script,
    the <|im_start|>, the <|im_end|> and the line feed after it are targets in all turns, too.
    """
    learn_turns = iter([is_learned(turn) and (turn is messages[-1] or not last_turn)
                        for turn in messages if turn["role"] == "assistant"])   # one per answer
    ids, learned = [], []
    learn_turn = False
    previous = None                         # the special token before this part, if it is one
    for text, is_special, role in tokenizer.chat_parts(messages, tools):
        marker = text if is_special else None
        if marker == "<|im_start|>":        # a turn begins
            learn_turn = next(learn_turns) if role == "assistant" else False
            is_target = published_mask
        elif previous == "<|im_start|>":    # "assistant\n", or another role and all of its text
            is_target = False
        elif marker == "<|im_end|>":        # this is how the model learns to stop
            is_target = learn_turn or published_mask
        elif previous == "<|im_end|>":      # the line feed between two turns
            is_target = published_mask
        else:                               # an answer or tool call; in a system turn, more text
            is_target = learn_turn
        previous = marker
        part = tokenizer.encode(text, allow_special=is_special)
        ids += part
        learned += [is_target] * len(part)
    return ids, learned


def prompt_of(tokenizer, messages, tools=None):
    """The ids of a conversation up to where the assistant's next answer begins."""
    ids, _ = chat_ids(tokenizer, messages, tools)
    return [*ids, tokenizer.special["<|im_start|>"], *tokenizer.encode("assistant\n")]


def answer_stop_ids(tokenizer):
    """The ids that end an answer: all special tokens except those around a tool call."""
    return {i for name, i in tokenizer.special.items()
            if name not in ("<tool_call>", "</tool_call>")}


# ------------------------------------------------------------------------------------------------
# Conversations -> sequences of T tokens


def packed_sequence(encoded, T, end):
    """Conversations, each as (ids, learned), one after another -> input_ids, targets and
    document_starts, NumPy arrays of T integers each.

    Conversations do not attend to one another: document_starts holds, for each token, the index at
    which its conversation begins. The target of a token is the next one of its conversation, or
    -100 if that one is not learned or does not exist. The rest is padding: a document of `end`
    tokens without targets.
    """
    sequence = Sequence()
    for ids, learned in encoded:
        # the target of a position is the id after it; the last position has none
        targets = [token if is_target else -100 for token, is_target in zip(ids[1:], learned[1:])]
        sequence.add(ids, [*targets, -100])
    sequence.pad(T - len(sequence.input_ids), end)
    return sequence.arrays()


class Packing:
    """packing[i]: which conversations are in sequence i of an endless run over all of them.

    Each epoch has its own random order. A sequence takes every one of the next WAITING
    conversations that still fits, so there is little padding. None is cut: none is longer than T.
    """

    WAITING = 64

    def __init__(self, lengths, T, seed, name):
        self.lengths, self.T = lengths, T
        self.seed, self.name = seed, name
        self.sequences = []                 # of the epochs that were packed so far
        self.epoch = 0                      # the next one to pack

    def __getitem__(self, index):
        while index >= len(self.sequences):                 # pack another epoch
            rng = generator(self.seed, f"order {self.name}", self.epoch)
            waiting = rng.permutation(len(self.lengths)).tolist()   # a random order per epoch
            self.epoch += 1
            while waiting:
                sequence, room = [], self.T
                for i in waiting[:self.WAITING]:            # a copy: waiting gets shorter
                    if self.lengths[i] <= room:
                        sequence.append(i)
                        room -= self.lengths[i]
                        waiting.remove(i)
                self.sequences.append(sequence)
        return self.sequences[index]


def best_conversations(conversations):
    """The indices of the best FINE of the conversations, which are sorted by score. Each source,
    with or without a system message, has a share of its own, so that none disappears."""
    kinds = defaultdict(list)
    for i, conversation in enumerate(conversations):
        kinds[conversation["source"], conversation["messages"][0]["role"]].append(i)
    return [i for indices in kinds.values()
            for i in indices[round(len(indices) * (1 - FINE)):]]    # the best come last


class ConversationBatches(Batches):
    """batches(step) as in data.py. COARSE of the steps see all conversations, the rest the best
    ones. Sequences of fill-in-the-middle are spread evenly among them."""

    def __init__(self, tokens, tokenizer, args, encoded, best):
        """encoded: the (ids, learned) of each conversation; best: the indices of the best ones."""
        super().__init__(tokens, tokenizer, args.seq_len, args.batch_tokens // args.seq_len,
                         args.device_batch, args.seed, fim_rate=1.0, rank=RANK, world=WORLD,
                         mixture=(1, 0, 0))                         # code only, always as FIM
        self.encoded, self.best = encoded, best
        self.fim_share = args.fim_share
        coarse_sequences = round(COARSE * args.steps) * self.batch_rows     # FIM included
        self.first_fine = coarse_sequences - int(coarse_sequences * args.fim_share)  # without FIM
        lengths = [len(ids) for ids, _ in encoded]
        self.coarse = Packing(lengths, self.T, self.seed, "coarse")
        self.fine = Packing([lengths[i] for i in best], self.T, self.seed, "fine")

    def sequence(self, index):
        """Sequence `index` of the run, a pure function of the seed and the index."""
        # With a share of 0.3, sequences 0, 1, 2, ... have 0 0 0 0 1 1 1 2 2 2 3 FIM sequences
        # before them. A sequence is FIM if the next one has more.
        fim_before = int(index * self.fim_share)
        if int((index + 1) * self.fim_share) > fim_before:
            return super().sequence(fim_before)
        index -= fim_before                 # among the sequences of conversations
        if index < self.first_fine:
            chosen = self.coarse[index]
        else:
            chosen = [self.best[i] for i in self.fine[index - self.first_fine]]
        return packed_sequence([self.encoded[i] for i in chosen], self.T, self.end)


# ------------------------------------------------------------------------------------------------
# The stage


def encode_conversations(conversations, tokenizer, args):
    """The conversations to train on, and the (ids, learned) of each. Prints what is left out."""
    usable, encoded, too_long = [], [], 0
    for conversation in conversations:
        ids, learned = chat_ids(tokenizer, conversation["messages"], conversation["tools"],
                                args.last_turn, args.published_mask)
        if len(ids) > args.seq_len:         # cut off, it would teach not to stop
            too_long += 1
        elif any(learned):
            usable.append(conversation)
            encoded.append((ids, learned))
    say(f"{too_long:,} longer than {args.seq_len} tokens are left out")
    no_targets = len(conversations) - too_long - len(usable)
    if no_targets:
        say(f"{no_targets:,} without a target are left out: their answers have weight 0")
    if not usable:
        raise InputError("no conversation is left; give a larger --seq-len")
    return usable, encoded


def train_stage(args, device):
    """From a base model and conversations to out/sft."""
    folder = Path(args.out) / "sft"
    if folder.exists() and not args.fresh and not folder.with_name("sft.unfinished").exists():
        return say(f"{folder} is finished; --fresh trains it again")
    say(f"starting from {args.init}")
    model, tokenizer = load_base(args, device)
    args.size = args.size or size_of(model.config, args.device)
    fill_in(args, PRESETS.get(args.size, PUBLISHED))
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, args.seq_len)
    # as in the generation_config.json of the published instruct models
    stop_ids = [tokenizer.special[name] for name in ("<|im_end|>", ENDOFTEXT)]
    model.config.eos_token_id = model.generation_config["eos_token_id"] = stop_ids

    conversations, encoded = encode_conversations(
        prepare_instructions(args, tokenizer), tokenizer, args)
    say(f"fill-in-the-middle from {args.out}/data: {args.fim_share:.0%} of the sequences")
    batches = ConversationBatches(load_tokens(args.out, tokenizer), tokenizer, args, encoded,
                                  best_conversations(conversations))
    validation = load_documents(args.out, "validation")

    def evaluate(model, step):
        return {"bpb": bits_per_byte(model, tokenizer, validation)}

    train(model, tokenizer, batches, next_token_loss, args, evaluate)
    if RANK == 0:                           # the other processes have nothing to measure
        compare_models(args.init, folder, args, device)
        print(f"\nTo talk with it: python sft.py --chat --init {folder}")


# ------------------------------------------------------------------------------------------------
# Conversations from tasks, from code on disk, and by an LLM teacher

# How evaluate.py asks an instruct model: "code chat" in assets/benchmarks.json
SYSTEM = "You are an intelligent programming assistant to produce Python algorithmic solutions"
REQUEST = "Can you complete the following Python function?\n```python\n{prompt}\n```\n"
TASKS = 8000                # conversations from the task grammar
FUNCTIONS = 750             # conversations about functions on disk
TEMPLATES = {"write": "Write a Python function `{name}`: {summary}",
             "fix": "This function is wrong. Mend it.\n```python\n{code}\n```",
             "explain": "What does this function do?\n```python\n{code}\n```",
             "complete": "Complete this function.\n```python\n{code}\n```"}


def problem_prompt(problem):
    """The messages with which evaluate.py asks a problem of an instruct model."""
    return [{"role": "system", "content": SYSTEM},
            {"role": "user", "content": REQUEST.replace("{prompt}", problem["prompt"].strip())}]


def task_conversation(task, in_words=False):
    """A task of the grammar, asked as evaluate.py asks HumanEval's problems, or in words."""
    head, summary = task["prompt"].split("\n")[:2]
    answer = f"```python\n{head}\n{task['canonical_solution']}```"
    if in_words:
        signature = head.removeprefix("def ").removesuffix(":")
        question = TEMPLATES["write"].format(name=signature, summary=summary.strip(' "'))
        return new_conversation(question, answer, "tasks")
    conversation = new_conversation("", answer, "tasks")
    conversation["messages"][:1] = problem_prompt(task)
    return conversation


def task_conversations(seed):
    """TASKS conversations, a quarter of them in words; half of these have two turns."""
    conversations = [task_conversation(task, in_words=number < TASKS // 4)
                     for number, task in enumerate(training_tasks(seed, TASKS))]
    eighth = TASKS // 8         # the first eighth is also the first turn of the second
    for first, second in zip(conversations[:eighth], conversations[eighth:2 * eighth]):
        second["messages"] = first["messages"] + second["messages"]     # two turns
    return conversations


def code_conversations(documents, seed):
    """Functions on disk, each under one of four prompt templates: write, fix, explain, complete."""
    rng = random.Random(f"{seed} functions")
    functions = (function for document in documents if document["language"] == "python"
                 for function in documented_functions(document["text"]))
    for name, summary, code in functions:
        template = rng.choice(list(TEMPLATES))
        shown = code
        if template == "fix":
            shown = mutated(code, rng)
            if shown in (None, code):                       # there is nothing to mutate
                continue
        elif template == "complete":
            shown = "\n".join(code.split("\n")[:rng.randint(1, code.count("\n"))])
        question = TEMPLATES[template].format(name=name, summary=summary, code=shown)
        answer = summary if template == "explain" else f"```python\n{code}\n```"
        yield new_conversation(question, answer, "code", template=template)


# ------------------------------------------------------------------------------------------------
# Selecting conversations -> out/instructions

FORMAT = 2                  # of out/instructions; an older one is refused
KEPT_WITHOUT_CODE = 0.3     # share of the conversations without code; not published; ours
# The items of the checklist (report, section 4.1); their weights are not published; ours
CHECKLIST = {"consistency": 2, "relevance": 1, "difficulty": 2, "code exists": 1, "correctness": 3,
             "form": 1, "clarity": 1, "comments": 1, "easy to learn": 1}


def set_score(conversation):
    """Set the scores of the last answer, unless the LLM teacher has, and their weighted mean."""
    if "scores" not in conversation:
        answer = last_answer(conversation)
        code = code_block(answer) if "```" in answer else ""
        conversation["scores"] = checklist_scores(last_question(conversation), answer, code)
    total = sum(weight * conversation["scores"][item] for item, weight in CHECKLIST.items())
    conversation["score"] = total / sum(CHECKLIST.values())


def verify(conversations, weak):
    """Run the answers that show examples, and set `passed` if the values they return are right or
    wrong. Other failures decide nothing: the answer may just lack code that the question shows."""
    chats, programs = [], []
    for chat in conversations:
        if chat["source"] == "tasks":       # right by construction
            continue
        problem = example_problem(last_answer(chat), all_text(chat["messages"][:-1]), code_block)
        if problem:
            chats.append(chat)
            programs.append((problem, code_block(last_answer(chat), problem["entry_point"])))
    for chat, grade in zip(chats, grades(programs, weak=weak)):
        if grade.passed or grade.reason.startswith("wrong answer"):     # not an exception
            chat["passed"] = grade.passed


def all_conversations(args, documents, tokenizer):
    """All conversations, unfiltered, and a summary of the rows of --data that are skipped."""
    formats = "messages, or prompt and completion, or instruction, input and output"
    conversations, summary = read_data(args.data, normalize_conversation, assistant_parts, formats)
    if args.teacher:
        conversations += teacher_conversations(args.teacher, documents, tokenizer, args.seed,
                                               list(CHECKLIST))
    if not args.only_data:
        from_code = itertools.islice(code_conversations(documents, args.seed), FUNCTIONS)
        conversations = task_conversations(args.seed) + list(from_code) + conversations
    return conversations, summary


def build(args, tokenizer, settings):
    """Make out/instructions: train.jsonl, sorted by score; pairs.jsonl for dpo.py, answers that
    failed, each with one that passed; scores.png; a manifest of what was dropped and why."""
    documents = load_documents(args.out, "train")
    selection = Selection(*all_conversations(args, documents, tokenizer))
    selection.drop_duplicates()
    contamination = Contamination(default_benchmarks())
    selection.drop("contaminated", lambda chat: contamination.hit(all_text(chat["messages"])))
    # as in the report, where samples without code lowered the scores of several benchmarks
    rng = random.Random(f"{args.seed} thinned")
    selection.drop("without code", lambda chat: chat["source"] != "file" and "```" not in
                   last_answer(chat) and rng.random() > KEPT_WITHOUT_CODE)
    verify(selection.conversations, args.weak_sandbox)
    failed = selection.drop("fails its tests", lambda chat: chat.get("passed") is False)

    # rejection sampling: of several answers to a question, keep the best
    best = {}
    for chat in selection.conversations:
        set_score(chat)
        chat["language"] = answer_language(last_answer(chat))
        chat["rank"] = (chat.get("passed", False), chat["score"])   # first of all, it passes tests
        key = prompt_key(chat)
        if key not in best or chat["rank"] > best[key]["rank"]:
            best[key] = chat
    selection.drop("another answer is better", lambda chat: chat["source"] != "file"
                   and chat["rank"] < best[prompt_key(chat)]["rank"])

    conversations = sorted(selection.conversations, key=lambda chat: chat["score"])  # best last
    # a failed answer is still good for a preference pair, if another to its question passed
    pairs = [{"prompt": chat["messages"][:-1], "tools": chat.get("tools"),
              "chosen": last_answer(best[prompt_key(chat)]), "rejected": last_answer(chat)}
             for chat in failed if best.get(prompt_key(chat), {}).get("passed")]
    fields = ("messages", "tools", "source", "language", "passed", "scores", "score")
    rows = [{name: chat.get(name) for name in fields} for chat in conversations]
    with whole_folder(Path(args.out) / "instructions") as folder:
        for name, part in (("train", rows), ("pairs", pairs)):
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        plot_scores(rows, folder / "scores.png")
        write_json(folder / "manifest.json", {
            **settings, **selection.summary, "kept": len(conversations),
            "sources": Counter(row["source"] for row in rows),
            "languages": Counter(row["language"] for row in rows)})


def prepare_corpus(args):
    """Make out/data as pretrain.py does, unless it exists: FIM needs its code."""
    if RANK == 0 and not (Path(args.out) / "data").exists():
        say(f"making {args.out}/data from {', '.join(DEFAULT_SOURCES)}; for other code, run "
            "`python data.py --source FOLDER` first")
        print_corpus(args.out, prepare_data(args.out, DEFAULT_SOURCES))
    barrier()


def prepare_instructions(args, tokenizer):
    """Make out/instructions unless it exists, print a summary -> its conversations."""
    prepare_corpus(args)
    folder = Path(args.out) / "instructions"
    settings = {"format": FORMAT, "data": file_hashes(args.data), "teacher": args.teacher,
                "seed": args.seed, "only_data": args.only_data}
    if RANK == 0 and (args.fresh or not folder.exists()):
        build(args, tokenizer, settings)
    barrier()                               # the other processes read what the first has written
    manifest = made_from(folder, settings)
    if args.only_data:
        say("--only-data: no tasks of the grammar, no conversations from code on disk")
    print_manifest(manifest, "conversations")
    return [row for _, row in read_rows(folder / "train.jsonl")]


# ------------------------------------------------------------------------------------------------
# Measuring

ANSWER_TOKENS = 160         # of an answer, at most, when measuring
SAMPLED = 100               # problems that are answered several times, for pass@k
SPANS = 50                  # of each type, to infill


def solve(model, tokenizer, problems, weak, samples=1, tokens=None, **sampling):
    """Let the model answer problems and grade the answers -> for each problem a list of samples:
    (text, stopped by itself, passed). tokens: of an answer, at most (None: ANSWER_TOKENS)."""
    template = benchmarks()["prompts"]["code chat"]
    prompts = [prompt_ids(model, tokenizer, template, problem) for problem in problems]
    answers = complete(model, tokenizer, prompts, tokens or ANSWER_TOKENS, template["stops"],
                       answer_stop_ids(tokenizer), samples=samples, **sampling)
    repeated = [problem for problem in problems for _ in range(samples)]    # one per answer
    programs = [(problem, code_block(text, problem["entry_point"]))
                for problem, (text, _) in zip(repeated, answers)]
    graded = [(text, stopped, grade.passed)
              for (text, stopped), grade in zip(answers, grades(programs, weak=weak))]
    return [graded[i:i + samples] for i in range(0, len(graded), samples)]


def measure(folder, args, device, samples=0):
    """Measure a checkpoint -> {name: value, for pass@k a list with a value for each problem}.
    samples: how many answers to give to each of SAMPLED problems at temperature 0.8."""
    print(f"\nmeasuring {folder}")
    model, tokenizer = load(folder, device, dtype=None)     # the stored dtype, not the fastest here
    validation = load_documents(args.out, "validation")
    problems = {"unseen parameters": held_out_problems("parameters"),
                "unseen compositions": held_out_problems("compositions"),
                "ladder": list(find_problems("ladder").values())}
    values, answers = {}, {}
    for name, rows in problems.items():
        answers[name] = [result[0] for result in solve(model, tokenizer, rows, args.weak_sandbox)]
        values[f"{name}: pass@1, %"] = [100 * passed for _, _, passed in answers[name]]
    if samples:
        results = solve(model, tokenizer, problems["unseen parameters"][:SAMPLED],
                        args.weak_sandbox, samples, temperature=0.8, seed=args.seed)
        right = [sum(passed for _, _, passed in result) for result in results]  # by problem
        for k in (1, samples):
            values[f"{SAMPLED} sampled {samples} times: pass@{k}, %"] = [
                100 * pass_at_k(samples, n, k) for n in right]
    texts, stopped, _ = zip(*answers["unseen parameters"])
    lengths = [len(tokenizer.encode(text)) for text in texts]
    values["answers that stop, %"] = 100 * share(stopped)
    values["length of an answer, tokens"] = sum(lengths) / len(lengths)
    scores = measure_infilling(model, tokenizer, infilling_examples(validation, SPANS)).values()
    for name in ("bits per byte", "exact, %", "stops, %"):
        values[f"infilling: {name}"] = sum(score[name] for score in scores) / len(scores)
    return {**values, "code: bits per byte": bits_per_byte(model, tokenizer, validation)}


def table_cell(value, sign=""):
    """A number, or the mean of a list and its 95 % interval; sign "+" marks gains with a plus."""
    if not isinstance(value, list):
        return f"{value:{sign}.2f}"
    low, high = bootstrap(value)
    return f"{sum(value) / len(value):{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def compare_models(before, after, args, device, samples=0):
    """Print the scores of two checkpoints, what was gained, and three answers of the second. Models
    of a published size would need an hour on a CPU; for them, print a command."""
    if has_published_size(after):
        return print(f"to compare it with {before}: python evaluate.py --benchmark humaneval "
                     f"--chat --model {after}")
    old, new = (measure(folder, args, device, samples) for folder in (before, after))
    rows = [["", Path(before).name, Path(after).name, "gain"]]
    for name, value in new.items():
        if isinstance(value, list):         # paired by problem, which narrows the interval
            gain = [b - a for a, b in zip(old[name], value)]
        else:
            gain = value - old[name]
        rows.append([name, table_cell(old[name]), table_cell(value), table_cell(gain, "+")])
    print()
    print_table(rows)
    problems = held_out_problems("parameters")[:3]
    model, tokenizer = load(after, device, dtype=None)
    for problem, [(text, _, _)] in zip(problems, solve(model, tokenizer, problems,
                                                       args.weak_sandbox)):
        program = code_block(text, problem["entry_point"]).rstrip()
        print(f"\n--- asked\n{problem['prompt']}--- answered\n{program}")


# ------------------------------------------------------------------------------------------------
# The chat, and the command

CHAT_TOKENS = 256           # of an answer, at most


def talk(args):
    """Talk with the newest model in the terminal, until an empty line."""
    folder = args.init or newest_model(args.out)
    model, tokenizer = load(folder, args.device)
    T = model.config.context_length
    max_new_tokens = min(CHAT_TOKENS, T // 2)
    room = T - max_new_tokens                               # for the prompt
    messages = []
    print(f"{folder}; an empty line ends the chat")
    while question := next_line():
        messages += user(question)
        ids = prompt_of(tokenizer, messages)
        while len(ids) > room and len(messages) > 1:
            messages = messages[2:]                         # forget the oldest turn
            ids = prompt_of(tokenizer, messages)
        stream = TextStream(tokenizer)
        [new_ids] = generate(model, [ids[-room:]], max_new_tokens, temperature=args.temperature,
                             stop_ids=answer_stop_ids(tokenizer), vocab_size=tokenizer.vocab_size,
                             seeds=[args.seed + len(messages)],     # another one in each turn
                             on_token=lambda _, token: print(stream.add(token), end="", flush=True))
        print(stream.finish())
        messages.append({"role": "assistant", "content": tokenizer.decode(new_ids)})


def has_published_size(name):
    """Whether a checkpoint has the shape of a published model."""
    download(name, weights=False)
    config = Config.from_json(hub_folder(name, weights=False) / "config.json")
    return any((config.hidden_size, config.num_hidden_layers)
               == (published.hidden_size, published.num_hidden_layers)
               for size, published in CONFIGS.items() if size not in PRESETS)


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a Qwen2.5-Coder on conversations.")
    training_flags(parser)
    add = parser.add_argument
    add("--data", action="append", metavar="FILE", help="your own conversations, in the format of "
        "OpenAI, ShareGPT, Alpaca or TRL (repeatable)")
    add("--only-data", action=argparse.BooleanOptionalAction, help="learn from --data and "
        "--teacher, not from tasks and code on disk; --fim-share still applies (default: only with "
        "--data and a model of a published size)")
    add("--teacher", metavar="URL", help="an OpenAI-compatible server with an LLM teacher that "
        "writes more conversations")
    add("--build", action="store_true", help="only make out/instructions")
    add("--chat", action="store_true", help="talk with the newest model")
    add("--temperature", type=float, default=0.0, help="of --chat (default: 0)")
    add("--last-turn", action="store_true", help="learn only the last answer")
    add("--published-mask", action="store_true",
        help="also learn the special tokens of all turns, as the released script does")
    add("--fim-share", type=float, default=FIM_SHARE,
        help="share of sequences with fill-in-the-middle, from out/data (default: %(default)s)")
    add("--weak-sandbox", action="store_true",
        help="where the system has no sandbox: run programs under resource limits only")
    args = parser.parse_args()
    build_only = vars(args).pop("build")
    chat_only = vars(args).pop("chat")
    if not 0 <= args.fim_share < 1 or not args.temperature >= 0:
        raise InputError("--fim-share must be at least 0 and below 1, --temperature at least 0")
    if args.only_data and not (args.data or args.teacher):
        raise InputError("--only-data needs --data FILE or --teacher URL to learn from")
    if chat_only:
        return talk(args)
    vars(args).pop("temperature")
    args.stage, args.before, args.after = "sft", 0, 0
    args.init = str(args.init or newest_model(args.out, ("repository", "pretrain")))
    device = start_processes(args.device)
    file_hashes(args.data)                                  # report a missing file before any work
    if args.only_data is None:
        args.only_data = bool(args.data) and has_published_size(args.init)
    if build_only:
        prepare_instructions(args, Tokenizer.load(args.init))
    else:
        train_stage(args, device)
    stop_processes()


if __name__ == "__main__":
    run(main)
