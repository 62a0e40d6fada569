"""Evaluation: bits per byte, benchmarks with pass@k, and infilling.

The benchmarks are HumanEval, MBPP, EvalPlus, HumanEval infilling, CRUXEval and GSM8K in their
published formats, and `ladder` (140 small problems of our own). Also measured: a needle hidden in
code, and infilling of validation files (report, sections 6 and 7). assets/benchmarks.json holds the
addresses, prompts and stop strings.

Programs that a model wrote are run by support/sandbox.py, which is a lesson of its own. This file
does not know how models are trained (pretrain.py) or where documents come from (data.py): it reads
the validation set from a file.

    python evaluate.py                              # the newest model in out/; 2 to 3 minutes
    python evaluate.py --benchmark humaneval --model FOLDER --problems HumanEval.jsonl.gz [--chat]
    python evaluate.py --benchmark needle           # a heat map, PNG; 20 seconds
    python evaluate.py score --benchmark humaneval --problems HumanEval.jsonl.gz --samples S.jsonl
                                                    # about 350 samples a second on two cores
    python evaluate.py --model FOLDER --text FILE   # bits per byte of any text; seconds

Read first: pass_at_k, bits_per_byte, complete, model_samples, measure_infilling
"""

import argparse
import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import math
import os
import platform
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fim import (DTYPES, SPAN_TYPES, MiddleStream, argument_spans, block_spans, choose_span,
                 infill_prompt, load, newest_model, normalize, print_model, stop_ids,
                 without_last_space)
from model import default_device, generate, parameter_count
from support.answers import code_block, final_number, first_line
from support.benchmarks import benchmarks, find_problems, read_samples
from support.files import (InputError, read_json, read_rows, read_text, run, write_json,
                           write_text)
from support.functions import parse
from support.plan import print_table
from support.plots import plot_infilling, plot_ladder, plot_needle
from support.sandbox import REASONS, Grade, Sandbox, assemble, grades
from tokenizer import ENDOFTEXT, TextStream

# Tokens of a forward pass: enough to keep the device busy, and little memory on a CPU
TOKENS_AT_ONCE = 16384 if torch.cuda.is_available() else 4096
LONGEST_SEQUENCE = 4096     # for bits per byte; longer ones take much time on a CPU
CACHE_BYTES = 1 << 30       # for the keys and values of completions, in main memory
LARGEST_BATCH = 256         # completions generated together, at most

# ------------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n, c, k):
    """The probability that at least one of k samples passes, estimated without bias from n samples
    of which c pass: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, section 2.1).
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right")
    if n - c < k:                           # any k samples include one that passes
        return 1.0
    # C(n - c, k) / C(n, k): all that does not cancel is (i - k) / i for these i
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


def bootstrap(values, rounds=1000):
    """The 95 % confidence interval of a mean, from resampling the values with replacement."""
    rng = random.Random(0)
    n = len(values)
    # how much the mean would vary if the problems had been others of the same kind
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds)]


def bits_per_byte(model, tokenizer, documents):
    """How many bits the model needs to encode documents, divided by their bytes in UTF-8.

    Unlike the loss per token, this compares models with different tokenizers. The <|endoftext|>
    that ends each document is counted, too. Documents are read in sequences of T tokens; no token
    sees what is before its sequence.
    """
    T = sequence_length(model)
    nats = 0.0
    with torch.no_grad():
        for input_ids, targets in validation_batches(model, tokenizer, documents, T):
            nats += float(model(input_ids, targets=targets))                # summed over (B, T)
    return nats / math.log(2) / sum(len(document["text"].encode()) for document in documents)


def sequence_length(model):
    """The tokens of a sequence that is evaluated: as many as the model was trained on, but at most
    LONGEST_SEQUENCE."""
    return min(model.config.max_position_embeddings, LONGEST_SEQUENCE)


def validation_batches(model, tokenizer, documents, T):
    """Yield (input_ids, targets), both (B, T): documents, each between two <|endoftext|>, in
    sequences of up to T tokens, padded on the right. Targets of -100 are ignored."""
    end = tokenizer.special[ENDOFTEXT]
    device = model.device
    sequences = []
    for ids in tokenizer.encode_batch([document["text"] for document in documents]):
        ids = [end, *ids, end]
        # T inputs and T targets, shifted by one: T + 1 ids, the last of which begins the next one
        sequences += [ids[start:start + T + 1] for start in range(0, len(ids) - 1, T)]
    sequences.sort(key=len)                 # similar lengths in a batch need little padding
    B = max(1, TOKENS_AT_ONCE // T)
    for start in range(0, len(sequences), B):
        batch = sequences[start:start + B]
        longest = len(batch[-1])
        inputs = [ids[:-1] + [end] * (longest - len(ids)) for ids in batch]
        targets = [ids[1:] + [-100] * (longest - len(ids)) for ids in batch]
        yield torch.tensor(inputs, device=device), torch.tensor(targets, device=device)


def bits_by_position(model, tokenizer, documents, T, parts):
    """Bits per byte in each of `parts` equal parts of a sequence of T tokens: does the model profit
    from a longer context?"""
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=model.device)     # (V,)
    nats = torch.zeros(parts)
    lengths = torch.zeros(parts)
    with torch.no_grad():
        for input_ids, targets in validation_batches(model, tokenizer, documents, T):
            losses = -model(input_ids, targets=targets, reduce="none")                  # (B, T)
            sizes = byte_lengths[targets.clamp(min=0)]                                  # (B, T)
            sizes = torch.where(targets == -100, 0, sizes)                              # (B, T)
            part = torch.arange(targets.shape[1]) * parts // T                          # (T,)
            # position t is added to the sum of the part that it lies in
            nats.index_add_(0, part, losses.sum(0).float().cpu())
            lengths.index_add_(0, part, sizes.sum(0).float().cpu())
    return (nats / math.log(2) / lengths).tolist()


def compressed_bits_per_byte(texts):
    """Name -> bits per byte of the concatenated texts under gzip, bz2 and xz at their best."""
    data = "".join(texts).encode()
    sizes = {"gzip": len(gzip.compress(data, 9)), "bz2": len(bz2.compress(data, 9)),
             "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def answer_bits(model, prompts, answers):
    """The bits that the model needs for each answer after its prompt; both are lists of ids."""
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers)]
    bits = [0.0] * len(sequences)
    with torch.no_grad():
        for batch in batches_of(sequences):
            longest = len(sequences[batch[-1]])
            ids = torch.tensor([sequences[i] + [0] * (longest - len(sequences[i])) for i in batch],
                               device=model.device)                            # (B, T + 1)
            targets = torch.full_like(ids[:, 1:], -100)                             # (B, T)
            for b, i in enumerate(batch):
                # targets are shifted by one: that of the prompt's last token begins the answer
                answer = slice(len(prompts[i]) - 1, len(sequences[i]) - 1)
                targets[b, answer] = ids[b, 1:][answer]
            log_probs = model(ids[:, :-1], targets=targets, reduce="none")          # (B, T)
            for i, log_prob in zip(batch, log_probs.sum(1).tolist()):
                bits[i] = -log_prob / math.log(2)
    return bits


def edit_similarity(text, target):
    """100 x 2 M / T, where M is the length of the longest common subsequence and T the sum of both
    lengths (InDel ratio); 100 if both are empty. text, target: strings, or lists of words."""
    if not text and not target:
        return 100.0
    # row[j]: the longest common subsequence of what was read of the text and target[:j]
    row = [0] * (len(target) + 1)
    for a in text:
        above = row
        row = [0]
        for j, b in enumerate(target):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
    return 200.0 * row[-1] / (len(text) + len(target))


# ------------------------------------------------------------------------------------------------
# Completions


def complete(model, tokenizer, prompts, max_new_tokens, stops=(), stop_ids=(), samples=1,
             cache=None, seed=0, contexts=None, **sampling):
    """Continue prompts, which are lists of ids.

    Returns (text, stopped) for each sample: the samples of the first prompt, then those of the
    second, and so on. A completion ends before the first stop string or stop id; `stopped` says
    whether there was one. A prompt that is too long for the context loses its start. cache: a file
    of completions, so that an interrupted run need not repeat them. contexts: the (prefix, suffix)
    of each prompt; then completions end as infilled middles do (MiddleStream), without `stops`.
    """
    T = model.config.context_length
    max_new_tokens = min(max_new_tokens, T // 2)
    prompts = [prompt[-(T - max_new_tokens):] for prompt in prompts]
    # prompts of similar length next to each other need little padding
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # (prompt, number) -> seed, in the order in which samples are generated. No two samples may
    # share random numbers, so the user's seeds are far apart (by any large odd number).
    seeds = {(i, number): seed * 0x9E3779B1 + i * samples + number
             for i in order for number in range(samples)}
    # of the weights: another model must not find these completions in the cache
    weights = float(model.head.detach().float().abs().mean())
    settings = [weights, max_new_tokens, stops, sorted(stop_ids), sampling]
    keys = {}                               # sample -> its key in the cache file
    for (i, number), sample_seed in seeds.items():
        request = [*settings, prompts[i], contexts and contexts[i], sample_seed]
        keys[i, number] = hashlib.sha256(json.dumps(request).encode()).hexdigest()
    cached = read_cache(cache)
    missing = [sample for sample in keys if keys[sample] not in cached]

    streams = [MiddleStream(tokenizer, *contexts[i]) if contexts else TextStream(tokenizer, stops)
               for i, _ in missing]
    texts = [[] for _ in missing]

    def on_token(index, token):
        texts[index].append(streams[index].add(token))
        return streams[index].stopped

    def keep(index, ids):
        key = keys[missing[index]]
        text = "".join(texts[index]) + streams[index].finish()
        cached[key] = text, streams[index].stopped or len(ids) < max_new_tokens
        if cache:
            # the line feed first, because an interrupted run may have cut off the line before
            with open(cache, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, cached[key]]))
        progress.update()

    if missing:
        with tqdm(total=len(missing), desc="completions", disable=None) as progress:
            generate(model, [prompts[i] for i, _ in missing], max_new_tokens, stop_ids=stop_ids,
                     vocab_size=tokenizer.vocab_size, on_token=on_token, on_end=keep,
                     seeds=[seeds[sample] for sample in missing],
                     batch_size=batch_size(model, len(prompts[order[-1]]) + max_new_tokens),
                     **sampling)
    return [tuple(cached[keys[i, number]])
            for i in range(len(prompts)) for number in range(samples)]


def batch_size(model, tokens):
    """How many sequences of `tokens` tokens are generated together: their keys and values fit in
    CACHE_BYTES, or on a GPU in half of its free memory."""
    config = model.config
    token_bytes = (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
                   * model.dtype.itemsize)
    memory = CACHE_BYTES
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info()[0] // 2
    return max(1, min(LARGEST_BATCH, memory // (token_bytes * tokens)))


def batches_of(sequences):
    """Group lists of ids by length, so that they need little padding -> lists of indices. A batch
    has at most TOKENS_AT_ONCE tokens, unless a single list has more."""
    batches = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        # padded to the length of this one, which is the longest so far
        if not batches or (len(batches[-1]) + 1) * len(sequences[i]) > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(i)
    return batches


def read_cache(path):
    """The completions in a cache file: key -> (text, stopped). Damaged lines are ignored."""
    cached = {}
    if path and path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError):
                key, completion = json.loads(line)
                cached[key] = completion
    return cached


def prompt_ids(model, tokenizer, template, problem):
    """A prompt of assets/benchmarks.json, filled with a problem's fields, as ids."""
    if template["prompt"][0].startswith("<|fim_prefix|>"):
        # encoded in parts and shortened here, because complete() would cut off <|fim_prefix|>
        T = model.config.context_length
        room = T - min(template["max_new_tokens"], T // 2)
        return infill_prompt(tokenizer, problem["prompt"], problem["suffix"], room)
    fields = {**problem, "prompt": problem.get("prompt", "").strip()}
    # in one pass, since a field such as the code may itself contain "{input}"
    text = re.sub(r"\{(prompt|code|input|output|question)\}", lambda match: fields[match[1]],
                  "\n".join(template["prompt"]))
    return tokenizer.encode(text, allow_special=True)


def model_samples(model, tokenizer, name, problems, n=1, cache=None, guard=False, **sampling):
    """Let a model write n samples for each problem -> the rows of a samples file.

    name: of a prompt in assets/benchmarks.json; guard: end infilled middles as `infill` does;
    sampling: seed, temperature, top_p.
    """
    template = benchmarks()["prompts"][name]
    T = model.config.context_length
    new_tokens = min(template["max_new_tokens"], T // 2)
    print(f"prompt {name!r} ({template['source']}):")
    for line in template["prompt"]:
        print("  | " + line)
    print(f"stops: {template['stops']} and all special tokens; at most {new_tokens} new tokens; "
          f"answer: {template['answer']}")
    contexts = None
    if guard and template["prompt"][0].startswith("<|fim_prefix|>"):
        contexts = [(problem["prompt"], problem["suffix"]) for problem in problems.values()]
        problems = {name: {**problem, "prompt": without_last_space(problem["prompt"])}
                    for name, problem in problems.items()}
    prompts = [prompt_ids(model, tokenizer, template, problem) for problem in problems.values()]
    too_long = sum(len(ids) > T - new_tokens for ids in prompts)
    if too_long:
        print(f"{too_long} of {len(prompts)} prompts are cut to fit: the context has {T} tokens")
    completions = complete(model, tokenizer, prompts, template["max_new_tokens"],
                           template["stops"], stop_ids(tokenizer), samples=n, cache=cache,
                           contexts=contexts, **sampling)
    # a chat model writes the whole program; a base model continues the prompt
    field = "solution" if name == "code chat" else "completion"
    task_ids = [task_id for task_id in problems for _ in range(n)]
    return [{"task_id": task_id, "stopped": stopped,
             field: extract(name, text, problems[task_id].get("entry_point"))}
            for task_id, (text, stopped) in zip(task_ids, completions)]


def extract(name, text, entry_point=None):
    """The answer in what a model wrote; assets/benchmarks.json describes it for each prompt."""
    if name == "code chat":
        return code_block(text, entry_point)
    if name in ("code", "short code", "mbpp"):
        return text.replace("\t", "    ")
    if name.startswith("cruxeval"):                         # [ANSWER] assert f(16) == 17
        if "[ANSWER]" in text:
            text = text.split("[ANSWER]")[1]
        call, *values = text.split("==")
        if "output" in name:
            return values[0].strip() if values else text.strip()
        if "assert f" in call:
            return "f" + call.split("assert f")[1].strip()
        return call.strip()
    return text


# ------------------------------------------------------------------------------------------------
# Grading


def compare(problem, completion):
    """Grade an answer that is not a program: a line or a number."""
    if "line" in problem:
        right = first_line(completion) == problem["line"].strip()
    else:
        right = final_number(completion) == problem["answer"]
    return Grade(right, "passed" if right else "wrong answer")


def graded_rows(results, samples, settings):
    """The rows at the start of a results file that grade these samples with these settings."""
    rows = []
    if not results.exists():
        return rows
    with contextlib.suppress(ValueError, TypeError):        # a line that is cut off or damaged
        for line, sample in zip(results.read_text(encoding="utf-8").split("\n"), samples):
            row = dict(json.loads(line))
            is_graded = (isinstance(row.get("passed"), bool) and isinstance(row.get("weak"), bool)
                         and isinstance(row.get("reason"), str))
            is_same_sample = {**sample, **settings}.items() <= row.items()
            if not is_graded or not is_same_sample:
                break
            rows.append(row)
    return rows


def grade_samples(name, samples, problems, results, args):
    """Grade samples of a benchmark -> rows with their grades, which are also written to the file
    `results`, one by one. With --resume, the samples that this file has graded are skipped."""
    many_inputs = any("inputs" in problem for problem in problems.values())
    # what a grade depends on: a row graded with other settings is graded again
    settings = {"benchmark": name, "timeout": args.timeout or (20.0 if many_inputs else 3.0),
                "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:8]}
    rows = graded_rows(results, samples, settings) if args.resume else []
    remaining = samples[len(rows):]
    pairs = [(problems[sample["task_id"]], sample) for sample in remaining]
    if "test" in next(iter(problems.values())):
        programs = [(problem, sample["solution"] if "solution" in sample
                     else assemble(problem, sample["completion"])) for problem, sample in pairs]
        new_grades = grades(programs, args.workers, settings["timeout"], args.weak_sandbox)
    else:
        new_grades = (compare(problem, sample["completion"]) for problem, sample in pairs)
    progress = tqdm(new_grades, total=len(remaining), desc="graded", disable=None)
    with open(results, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        for sample, grade in zip(remaining, progress):
            rows.append({**sample, **settings, **grade._asdict()})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()                    # so that an interrupted run can be resumed
    return rows


def reason_kind(row):
    """Why a graded sample failed: one of REASONS, "other" for whatever else a results file may say,
    or "passed"."""
    if row["passed"]:
        return "passed"
    kind = row["reason"].split(":")[0]
    return kind if kind in REASONS else "other"


def printable(text):
    """A text from a file, with "?" for characters that a terminal would obey or cannot show."""
    return "".join(char if char.isprintable() else "?" for char in text)


def print_scores(name, rows, problems):
    """Print pass@k with its confidence interval, and why samples failed -> scores."""
    by_problem = defaultdict(list)          # task_id -> whether each of its samples passed
    by_group = defaultdict(list)            # the same for a language or level
    for row in rows:
        by_problem[row["task_id"]].append(row["passed"])
        group = problems[row["task_id"]].get("group")
        if group:
            by_group[printable(group)].append(row["passed"])
    scores = {"samples": len(rows), "problems": len(by_problem)}
    one_line = "line" in next(iter(problems.values()))
    fewest = min(map(len, by_problem.values()))
    for k in (1, 10, 100):
        if k > fewest:
            break
        values = [pass_at_k(len(passed), sum(passed), k) for passed in by_problem.values()]
        measure = "exact match" if one_line and k == 1 else f"pass@{k}"
        low, high = bootstrap(values)
        scores[measure] = sum(values) / len(values)
        print(f"{name} {measure}: {scores[measure]:.4f} (95 % between {low:.3f} and {high:.3f}, "
              f"{len(values)} problems)")
    if one_line:
        similarities = [edit_similarity(first_line(row["completion"]),
                                        problems[row["task_id"]]["line"].strip()) for row in rows]
        scores["edit similarity"] = sum(similarities) / len(rows)
        print(f"  edit similarity {scores['edit similarity']:.1f}")
    scores["reasons"] = dict(Counter(map(reason_kind, rows)).most_common())
    print("  " + ", ".join(f"{count} {reason}" for reason, count in scores["reasons"].items()))
    scores["weak"] = sum(row["weak"] for row in rows)      # such a grade can be forged
    if scores["weak"]:
        print(f"  {scores['weak']} graded in one process with their test")
    if all(isinstance(row.get("stopped"), bool) for row in rows):
        scores["stopped"] = sum(row["stopped"] for row in rows) / len(rows)
        print(f"  {scores['stopped']:.0%} stopped by themselves")
    for group, passed in sorted(by_group.items()):
        scores[group] = sum(passed) / len(passed)
    if by_group:
        print("  " + ", ".join(f"{group} {scores[group]:.1%}" for group in sorted(by_group)))
    return scores


def pass_rates(results):
    """The rows of a results file -> {task_id: the share of its samples that pass}."""
    passed = defaultdict(list)
    for _, row in read_rows(results):
        if isinstance(row.get("task_id"), str) and isinstance(row.get("passed"), bool):
            passed[row["task_id"]].append(row["passed"])
    return {task_id: sum(values) / len(values) for task_id, values in passed.items()}


def print_difference(baseline, results):
    """Print how many more or fewer problems are solved than in an earlier results file. Most are
    solved in both or in neither, so the interval of the difference is narrower than those of the
    two scores."""
    before, after = pass_rates(baseline), pass_rates(results)
    differences = {task_id: after[task_id] - before[task_id] for task_id in after
                   if task_id in before}
    if not differences:
        raise InputError(f"{baseline}: none of these problems is graded in it")
    values = list(differences.values())
    low, high = bootstrap(values)
    print(f"  {sum(values) / len(values):+.4f} compared with {baseline} (95 % between {low:+.3f} "
          f"and {high:+.3f}, {len(values)} problems)")
    for word, sign in (("better", 1), ("worse", -1)):
        changed = [printable(task_id) for task_id in differences if sign * differences[task_id] > 0]
        print(f"  {word} at {len(changed)}: {' '.join(changed)}")


# ------------------------------------------------------------------------------------------------
# Infilling: spans of each type in validation documents

LONGEST_MIDDLE = 160        # characters; not published; ours
WINDOW = 600                # characters from which a span is chosen; not published; ours


def infilling_examples(documents, count=200):
    """Choose `count` examples of each span type from validation documents, always the same.

    Returns dicts with span_type, prefix, middle, suffix, and python: whether it is Python.
    """
    sizes = np.array([len(document["text"]) for document in documents], float)
    examples = []
    for span_type in SPAN_TYPES:
        rng = np.random.default_rng([0, *span_type.encode()])
        of_type = []
        for _ in range(100 * count):        # some attempts give no span, or one that is too long
            if len(of_type) == count:
                break
            document = documents[rng.choice(len(documents), p=sizes / sizes.sum())]
            text = document["text"]
            span = span_near(text, int(rng.integers(len(text))), span_type, rng)
            if span is None:
                continue
            start, end = span
            if text[start:end].strip() and end - start <= LONGEST_MIDDLE:
                python = (document.get("language") == "python"
                          or str(document.get("path")).endswith(".py"))
                of_type.append({"span_type": span_type, "prefix": text[:start], "python": python,
                                "middle": text[start:end], "suffix": text[end:]})
        examples += of_type
    if not examples:
        raise InputError("the validation documents have nothing to infill")
    return examples


def span_near(text, position, span_type, rng):
    """Choose a span in the lines that follow a position, about WINDOW characters; None if they have
    none of that type."""
    first = text.rfind("\n", 0, position) + 1
    last = text.find("\n", first + WINDOW)
    window = text[first:last] if last >= 0 else text[first:]
    # choose_span() would fall back to another type
    finder = {"block": block_spans, "arguments": argument_spans}.get(span_type)
    if finder and not finder(window):
        return None
    start, end = choose_span(window, span_type, rng)
    return first + start, first + end


def infilling_scores(example, text, stopped, text_tokens, middle_tokens):
    """The measures of one infilled text, except for bits per byte; `measure_infilling` explains
    them. None where a measure does not apply."""
    parses = None
    if example["python"]:
        parses = 100 * bool(parse(example["prefix"] + text + example["suffix"]))
    return {"exact, %": 100 * (text == example["middle"]),
            "similar": edit_similarity(text.strip(), example["middle"].strip()),
            "parses, %": parses,
            "stops, %": 100 * (stopped and text_tokens < 2 * (middle_tokens + 1) + 16),
            "length": text_tokens / middle_tokens}


def measure_infilling(model, tokenizer, examples, path=None):
    """Print how well a model infills, greedily and without the guard of `infill`.

    Returns span type -> measure -> value:
    exact, %        the infilled text is the true middle
    similar         mean edit similarity to the true middle
    parses, %       the whole file parses with it (Python only)
    stops, %        it ends by itself, within twice the tokens of the true middle and 16 more
    length          its length over that of the true middle, in tokens; the median
    bits per byte   of the true middle and its <|endoftext|>
    path: where to save a figure with three examples.
    """
    T = model.config.context_length
    end = tokenizer.special[ENDOFTEXT]
    middles = [tokenizer.encode(example["middle"])[:T // 2 - 1] + [end] for example in examples]
    new_tokens = min(2 * max(map(len, middles)) + 16, T // 2)
    # only about T tokens of a long file fit, so it need not be encoded as a whole
    prompts = [infill_prompt(tokenizer, example["prefix"][-4 * T:], example["suffix"][:4 * T],
                             T - new_tokens) for example in examples]
    started = time.monotonic()
    completions = complete(model, tokenizer, prompts, new_tokens, stop_ids=stop_ids(tokenizer))
    seconds = time.monotonic() - started
    bits = answer_bits(model, prompts, middles)
    lengths = [len(tokenizer.encode(text)) for text, _ in completions]
    rows = defaultdict(list)                # span type -> the measures of each example
    for i, (example, (text, stopped)) in enumerate(zip(examples, completions)):
        row = infilling_scores(example, text, stopped, lengths[i], len(middles[i]) - 1)
        row |= {"bits": bits[i], "bytes": len(example["middle"].encode())}
        rows[example["span_type"]].append(row)
    scores = {span_type: summary(rows_of_type) for span_type, rows_of_type in rows.items()}

    print(f"infilling, {len(examples)} examples, {sum(lengths) / seconds:,.0f} tokens/s")
    names = list(dict.fromkeys(name for score in scores.values() for name in score))
    table = [["", *names]]
    for span_type, score in scores.items():
        cells = [f"{score[name]:.2f}" if name in score else "-" for name in names]
        table.append([span_type, *cells])
    print_table(table)
    if path:
        shown = {}                          # span type -> its first example
        for example, (text, _) in zip(examples, completions):
            shown.setdefault(example["span_type"], (
                example["span_type"], example["prefix"], text, example["suffix"],
                example["middle"]))
        plot_infilling(list(shown.values())[:3], path)
    return scores


def summary(rows):
    """The measures of all examples of one span type, from the measures of each."""
    scores = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if name == "length":                # middles that never end would dominate the mean
            scores[name] = statistics.median(values)
        elif name not in ("bits", "bytes") and values:
            scores[name] = sum(values) / len(values)
    scores["bits per byte"] = sum(row["bits"] for row in rows) / sum(row["bytes"] for row in rows)
    return {name: round(value, 4) for name, value in scores.items()}


# ------------------------------------------------------------------------------------------------
# Needle in the code: does the model repeat a function that it saw far above? (report, figure 6)

# Words for the names of functions; what a needle looks like is not published; ours
NEEDLE_WORDS = ("amber brisk copper dusty early fuzzy gentle hollow ivory jolly".split(),
                "anchor basket candle dragon engine falcon garden hammer island jacket".split(),
                "size weight price depth width score limit speed level rank".split())
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plant(tokenizer, haystack, length, depth, rng):
    """Hide a function in code -> (context with it, context without it, its body), as ids.

    Both contexts end with the first line of the function, so that its body should follow. Context
    and body have `length` ids together. depth: where the function is, from 0 (start) to 1 (end).
    """
    first, second, argument = (rng.choice(words) for words in NEEDLE_WORDS)
    a, b, c = (rng.randrange(11, 990) for _ in range(3))
    head = f"\ndef {first}_{second}({argument}):\n"
    body = f"    {argument} = {argument} * {a} + {b}\n    return {argument} % {c}\n"
    function = tokenizer.encode(head + body)
    question = tokenizer.encode(head)
    answer = tokenizer.encode(body)
    room = length - len(question) - len(answer)
    if room < len(function):
        raise InputError(f"needle: {length} tokens of context cannot hold a function of "
                         f"{len(function)} and be asked for it")
    start = rng.randrange(max(1, len(haystack) - room))
    code = haystack[start:start + room]
    # the function replaces the end of the code, so that both contexts have the same length
    shortened = code[:len(code) - len(function)]
    position = int(depth * len(shortened))
    planted = shortened[:position] + function + shortened[position:]
    return planted + question, code + question, answer


def measure_needle(model, tokenizer, documents, path, count=8):
    """Measure and plot how well planted functions are repeated, by depth and length -> scores.

    Two measures: the share of functions that greedy generation repeats exactly and, since small
    models repeat none, how many bits per byte of its body are saved by having seen the function.
    """
    T = model.config.context_length
    rng = random.Random(0)
    longest = T - 16                                    # bodies differ by some tokens
    shortest = min(longest, max(T // 8, 160))           # twice the function and some code
    lengths = [shortest + (longest - shortest) * i // 4 for i in range(5)]
    haystack = []
    for document in documents:
        if len(haystack) < 10 * T:
            haystack += tokenizer.encode(document["text"] + "\n")
    if len(haystack) < T:
        raise InputError(f"{len(haystack)} tokens of code for a context of {T}: give more with "
                         "--text")
    needles = [plant(tokenizer, haystack, length, depth, rng)
               for depth in DEPTHS for length in lengths for _ in range(count)]
    with_needle, without_needle, answers = zip(*needles)
    bodies = [tokenizer.decode(answer) for answer in answers]
    bits_without = answer_bits(model, without_needle, answers)
    bits_with = answer_bits(model, with_needle, answers)
    saved = [(before - after) / len(body.encode())
             for before, after, body in zip(bits_without, bits_with, bodies)]
    completions = complete(model, tokenizer, with_needle, max(map(len, answers)) + 1, (),
                           stop_ids(tokenizer))
    repeated = [100.0 * text.startswith(body) for (text, _), body in zip(completions, bodies)]
    maps = {}                                           # measure -> depth x length
    for name, values in (("repeated, %", repeated), ("bits saved per byte", saved)):
        maps[name] = np.reshape(values, (len(DEPTHS), len(lengths), count)).mean(2).tolist()
        print(f"{name} (rows: depth of the function, columns: tokens of context)")
        table = [["", *map(str, lengths)]]
        for depth, row in zip(DEPTHS, maps[name]):
            table.append([f"{depth:.0%}", *(f"{value:.2f}" for value in row)])
        print_table(table)
    name = "repeated, %" if any(repeated) else "bits saved per byte"
    plot_needle(name, maps[name], lengths, DEPTHS, path)
    print(f"written: {path}")
    return {"repeated": sum(repeated) / len(repeated),
            "bits saved per byte": sum(saved) / len(saved),
            "lengths": lengths, "depths": DEPTHS, "maps": maps}


# ------------------------------------------------------------------------------------------------
# The command


def read_documents(path):
    """The documents of a .jsonl file with a text field, or one document: the file's text."""
    path = Path(path)
    if path.suffix != ".jsonl":
        return [{"text": normalize(read_text(path)), "path": path.name}]
    documents = []
    for number, row in read_rows(path):
        try:
            text = normalize(row["text"])
            text.encode()                       # fails for half a surrogate pair
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise InputError(f'{path}, line {number}: expected {{"text": "..."}}') from None
        documents.append({**row, "text": text})
    return documents


def measure_bits(model, tokenizer, documents, folder):
    """Print bits per byte of documents, next to those of compressors -> {name: bits per byte}."""
    texts = [document["text"] for document in documents]
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes, sequences "
          f"of {sequence_length(model)} tokens; bits per byte:")
    results = compressed_bits_per_byte(texts)
    results[str(folder)] = bits_per_byte(model, tokenizer, documents)
    for name, bits in results.items():
        print(f"  {name:24} {bits:.3f}")
    return results


def save_scores(stem, scores, args):
    """Write {stem}.json and .md: scores, settings and versions."""
    settings = {key: printable(str(value)) for key, value in vars(args).items()}
    write_json(Path(f"{stem}.json"), {
        "scores": scores, "settings": settings, "python": platform.python_version(),
        "torch": torch.__version__})
    table = ["| benchmark | score | value |", "|---|---|---:|"]
    table += [f"| {benchmark} | {name} | {round(value, 4):.10g} |"
              for benchmark, values in scores.items() for name, value in values.items()
              if isinstance(value, (int, float))]
    write_text(Path(f"{stem}.md"), "\n".join(table) + "\n")
    print(f"written: {stem}.json and .md")


def parse_args():
    names = ["infilling", "needle", *benchmarks()["benchmarks"]]
    parser = argparse.ArgumentParser(description="Measure a model, or grade samples.")
    add = parser.add_argument
    add("command", nargs="?", choices=["score"], help="grade existing --samples")
    add("--benchmark", choices=names, metavar="NAME", help=f"one of {', '.join(names)} (default: "
        "bits per byte, infilling of the validation set, and the ladder)")
    add("--chat", action="store_true", help="use the prompts for instruct models")
    add("--problems", help="the benchmark's file, .jsonl or .jsonl.gz")
    add("--samples", type=Path, help="for score: .jsonl with task_id and completion (or solution: "
        "a whole program)")
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--limit", type=int, help="only the first problems")
    add("--n", type=int, default=1, help="samples per problem (default: 1)")
    add("--temperature", type=float, default=0.0, help="default: 0, greedy")
    add("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    add("--seed", type=int, default=0, help="default: 0")
    add("--guard", action="store_true", help="end infilled middles as fim.py does, for models that "
        "do not stop by themselves")
    add("--dtype", choices=DTYPES, default="auto", help="auto (default): the faster of the stored "
        "one and float32; int8: 8-bit weights, on a CPU")
    add("--timeout", type=float, help="seconds per check (default: 3, or 20 where the reference "
        "solution runs, too, as in EvalPlus)")
    add("--workers", type=int, help="number of sandboxes (default: one per core)")
    add("--weak-sandbox", action="store_true", help="where the system has no sandbox: run programs "
        "under resource limits only")
    add("--model", help="checkpoint folder or hub name (default: newest in --out)")
    add("--baseline", type=Path, metavar="FILE", help="results of an earlier run with the same "
        "--benchmark, such as out/evaluate/NAME.jsonl: print the difference and its interval")
    add("--text", nargs="+", help="only bits per byte of these text files or .jsonl; with needle: "
        "the code around it")
    add("--out", default="out", help="root folder of the stages (default: out)")
    add("--device", help="default: a GPU if there is one")
    args = parser.parse_args()
    if not args.temperature >= 0 or any(count is not None and count < 1
                                        for count in (args.n, args.limit, args.workers)):
        raise InputError("--n, --limit and --workers must be at least 1, --temperature at least 0")
    if not 0 < args.top_p <= 1 or args.timeout is not None and not 0 < args.timeout < 1e6:
        raise InputError("--top-p must be above 0 and at most 1, --timeout above 0 seconds")
    if args.n > 1 and not args.temperature:
        raise InputError(f"--n {args.n}: equal samples at temperature 0; give --temperature 0.8")
    if args.problems and not args.benchmark:
        raise InputError("--problems: give the --benchmark of these problems")
    if args.baseline and (args.benchmark in (None, "infilling", "needle")
                          or not pass_rates(args.baseline)):
        raise InputError("--baseline: needs a --benchmark, and a file with its graded samples")
    return args


def score(args):
    """Grade the samples of a file."""
    if not args.samples or args.benchmark in (None, "infilling", "needle"):
        raise InputError("score needs --samples and the --benchmark that they answer")
    if args.limit:
        raise InputError("score: all samples of the file are graded; leave out --limit")
    problems = find_problems(args.benchmark, args.problems)
    samples = read_samples(args.samples, problems)
    print_layers(problems, args)
    results = args.samples.with_name(f"{args.samples.name}_results.jsonl")
    rows = grade_samples(args.benchmark, samples, problems, results, args)
    print_scores(args.benchmark, rows, problems)
    if args.baseline:
        print_difference(args.baseline, results)
    print(f"written: {results}")


def print_layers(problems, args):
    """Print the layers of the sandbox, if answers to these problems are programs -> their names."""
    if "test" not in next(iter(problems.values())):
        return []
    with contextlib.closing(Sandbox(args.weak_sandbox)) as sandbox:
        print("sandbox: " + ", ".join(sandbox.layers))
    return sandbox.layers


def ask_and_grade(model, tokenizer, name, problems, stem, args):
    """Let a model solve the problems of a benchmark, and grade its samples -> scores.

    Samples and grades are written to the file {stem}.jsonl.
    """
    benchmark = benchmarks()["benchmarks"][name]
    prompt = benchmark.get("chat prompt" if args.chat else "prompt")
    if not prompt:
        raise InputError(f"{name} has no prompt for --chat")
    layers = print_layers(problems, args)   # before generating: without a sandbox, stop at once
    cache = Path(f"{stem}.batches.jsonl")
    if not args.resume:
        cache.unlink(missing_ok=True)
    samples = model_samples(model, tokenizer, prompt, problems, n=args.n, cache=cache,
                            guard=args.guard, seed=args.seed, temperature=args.temperature,
                            top_p=args.top_p)
    rows = grade_samples(name, samples, problems, Path(f"{stem}.jsonl"), args)
    cache.unlink(missing_ok=True)
    scores = {**print_scores(name, rows, problems), "layers": layers}

    # the report's score, if this is a model of a published size, asked in the same way
    sizes = benchmarks()["sizes"]
    parameters = parameter_count(model)
    reported = benchmark.get("reported chat" if args.chat else "reported")
    if reported and parameters in sizes and not args.limit and not args.temperature:
        scores["published"] = reported[sizes.index(parameters)] / 100
        print(f"  the report, for {'instruct' if args.chat else 'base'} models of this size, on "
              f"{benchmark['file']}: {scores['published']:.3f}")
    return scores


def compare_ladders(folder):
    """Plot the ladder scores in all result files of a folder, by level -> folder/ladder.png."""
    models = {}
    for path in sorted(folder.glob("*.json")):
        scores = read_json(path).get("scores", {}).get("ladder")
        if scores and scores["problems"] == len(find_problems("ladder")):       # no --limit
            name = path.stem.replace("_ladder", "")
            models[name] = [value for key, value in scores.items() if key.startswith("level")]
    if models:
        plot_ladder(models, folder / "ladder.png")


def validation_documents(args):
    """The documents of --text, or of the validation set."""
    files = args.text or [Path(args.out) / "data" / "validation.jsonl"]
    documents = [document for file in files for document in read_documents(file)
                 if document["text"]]
    if not documents:
        raise InputError(f"{files[0]}: no text to measure")
    return documents


def main():
    args = parse_args()
    if args.command == "score":
        return score(args)
    if args.benchmark:
        names = [args.benchmark]
    elif args.text:
        names = []                                              # only bits per byte
    elif args.chat:
        names = ["ladder"]
    else:
        names = ["infilling", "ladder"]

    # read all input before the model is loaded, so that mistakes are reported at once
    folder = args.model or newest_model(args.out)
    documents = []
    if not args.benchmark or args.benchmark in ("infilling", "needle"):
        documents = validation_documents(args)
    problems = {name: find_problems(name, args.problems, args.limit) for name in names
                if name not in ("infilling", "needle")}
    model, tokenizer = load(folder, args.device or default_device(), args.dtype)
    print_model(folder, model)
    scores = {}
    if not args.benchmark:
        scores["bits per byte"] = measure_bits(model, tokenizer, documents, folder)
    if not names:
        return                                  # --text alone: printed, not saved
    target = Path(args.out) / "evaluate"
    target.mkdir(parents=True, exist_ok=True)
    model_name = Path(os.path.abspath(folder)).name             # abspath: "." has no name
    ending = ("_chat" if args.chat else "") + ("_guard" if args.guard else "")
    for name in names:
        stem = target / f"{model_name}_{name}{ending}"
        if name == "needle":
            scores[name] = measure_needle(model, tokenizer, documents, f"{stem}.png")
        elif name == "infilling":
            examples = infilling_examples(documents, args.limit or 200)
            by_span_type = measure_infilling(model, tokenizer, examples, f"{stem}.png")
            for span_type, values in by_span_type.items():
                scores[f"infilling, {span_type}"] = values
        else:
            scores[name] = ask_and_grade(model, tokenizer, name, problems[name], stem, args)
            if args.baseline:
                print_difference(args.baseline, f"{stem}.jsonl")
    # with --benchmark beside its other files, else one file for all
    name = f"{model_name}_{args.benchmark}" if args.benchmark else model_name
    save_scores(target / f"{name}{ending}", scores, args)
    if "ladder" in scores:
        compare_ladders(target)


if __name__ == "__main__":
    run(main)
