"""Direct preference optimization: of two answers to a question, prefer the one that passes tests.

The last step of section 4.2 of the report. The model answers small tasks several times, the sandbox
grades the answers, and one that passes is preferred to the failed one that is most like it. Pairs
also come from a file or from an LLM judge. The loss compares the model with a frozen copy from
before, the reference model, whose log-probabilities are computed once and stored.

The training loop is in pretrain.py, the tasks are in support/tasks.py, and sft.py grades answers.

    python dpo.py                       # sample, grade, pair, train, measure; 12 to 18 minutes
    python dpo.py --rounds 3            # ... and twice more with the better model
    python dpo.py --build               # only out/preferences_1: the pairs, and what was dropped
    python dpo.py --data FILE           # your own pairs, in TRL's formats (JSON Lines)
    python dpo.py --judge http://localhost:8000/v1      # pairs by the verdicts of a larger model

Read first: dpo_loss, preference_loss, closest, balanced, PairBatches
"""

import argparse
import functools
import hashlib
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Batches, generator, load_documents, load_tokens, made_from
from evaluate import bits_per_byte, complete, edit_similarity
from fim import newest_model
from pretrain import (check_flags, dtype_of_run, fill_in, load_base, next_token_loss, size_of,
                      train, training_flags)
from sft import (ANSWER_TOKENS, answer_stop_ids, compare_models, prepare_corpus, prompt_of, solve,
                 task_conversation)
from support.chats import ask_judge, file_hashes, normalize_pair, print_manifest, read_data
from support.checkpoint import read_metrics, starting_point
from support.distributed import RANK, WORLD, barrier, say, start_processes, stop_processes
from support.files import (InputError, read_json, read_rows, run, whole_folder, write_json,
                           write_text)
from support.functions import same_code
from support.llm_client import ask_all, first_model
from support.plots import plot_preferences
from support.tasks import training_tasks
from tokenizer import assistant_parts

PRESETS = {"tiny": dict(seq_len=256, batch_tokens=16384, device_batch=16, steps=200, lr=5e-4),
           "mini": dict(seq_len=256, batch_tokens=16384, device_batch=16, steps=200, lr=3e-4),
           "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=100, lr=5e-5)}
# lr of Qwen2.5 (arXiv 2412.15115, section 4.2), the rest of the released script (finetuning/dpo)
PUBLISHED = dict(seq_len=3072, batch_tokens=3072 * 1024, device_batch=4, steps=1000, lr=7e-7)
BETA = 1                    # ours, measured; value of the released script: 0.1
NLL = 10                    # weight of the chosen answers' own loss; not published; ours, measured
CODE_SEQUENCES = 0.25       # FIM sequences per pair, so that infilling is not forgotten; ours
VALIDATION_PAIRS = 0.1      # share of the pairs
COLLAPSED = 1.0             # nats per token that the chosen answers may lose

# ------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=BETA,
             kind="sigmoid"):
    """Log-probabilities of the chosen and rejected answers under the model that is trained (the
    policy) and under the reference model, (P,) each -> the loss of each pair (P,).

    kind "sigmoid": of sums over tokens (arXiv 2305.18290, equation 7). "length": the same, of means
    per token (arXiv 2411.15124, section 5). "ipo": pulls the margin of the means to 1 / (2 beta)
    (arXiv 2310.12036, equation 17).
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)    # (P,)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * margin)


MEANS = ("length", "ipo")   # the losses of means per token instead of sums


def answer_log_probs(model, batch):
    """A batch of P pairs, 2 P sequences -> the summed log-probability of each answer in fp32, and
    its number of tokens: (2 P,) each."""
    log_probs = model(batch["input_ids"], targets=batch["targets"], reduce="none")  # (2 P, T)
    return log_probs.sum(1), (batch["targets"] != -100).sum(1)


def preference_loss(model, batch, beta, kind, nll):
    """The loss of a batch of P pairs, summed, and its metrics, named as in TRL."""
    sums, counts = answer_log_probs(model, batch)                                   # (2 P,)
    divisor = counts if kind in MEANS else 1
    policy_chosen, policy_rejected = (sums / divisor).chunk(2)                      # (P,) each
    reference_chosen, reference_rejected = (batch["reference"] / divisor).chunk(2)
    # Making the rejected answer less likely is enough to lower the DPO loss, and the chosen one may
    # sink with it. Its own loss, in nats per token, holds it up.
    chosen_loss = -(sums / counts).chunk(2)[0]                                      # (P,)
    preference = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                          beta, kind)
    losses = chosen_loss if kind == "chosen" else preference + nll * chosen_loss
    with torch.no_grad():
        chosen_reward = beta * (policy_chosen - reference_chosen)
        rejected_reward = beta * (policy_rejected - reference_rejected)
        metrics = {"loss/preference": preference, "loss/chosen": chosen_loss,
                   "rewards/chosen": chosen_reward, "rewards/rejected": rejected_reward,
                   "rewards/margins": chosen_reward - rejected_reward,
                   "rewards/accuracies": (chosen_reward > rejected_reward).float(),
                   "logps/chosen": sums.chunk(2)[0], "logps/rejected": sums.chunk(2)[1]}
    return losses.sum(), {name: values.sum() for name, values in metrics.items()}


def step_loss(model, batch, beta, kind, nll):
    """The loss of a batch of pairs, or of FIM sequences. The mean loss per token of the latter
    weighs as much as the chosen answer of every pair of the step. batch["pairs"]: of these pairs,
    the share that falls to this batch, by tokens."""
    if "reference" in batch:
        return preference_loss(model, batch, beta, kind, nll)
    loss, _ = next_token_loss(model, batch)
    loss = loss / (batch["targets"] != -100).sum() * batch["pairs"]
    return loss * (1 if kind == "chosen" else nll), {"loss/code": loss}


# ------------------------------------------------------------------------------------------------
# Pairs from the sandbox
#
# A pair is {"prompt": messages, "chosen": text, "rejected": text}, as in support/chats.py.

TASKS = 5000                # that are answered in a round; not published; ours
SAMPLES = 4                 # of each task; likewise
TEMPERATURE = 0.8           # likewise
PAIRS_PER_TASK = 4          # at most; likewise


def closest(passed, failed, most=PAIRS_PER_TASK):
    """Pairs of an answer that passed and one that failed, the most similar first; no answer is used
    twice. The fewer differences, the clearer what made the one fail."""
    words = {text: re.findall(r"\w+|[^\w\s]", text) for text in passed + failed}
    ranked = sorted((-edit_similarity(words[good], words[bad]), i, j)
                    for i, good in enumerate(passed) for j, bad in enumerate(failed))
    used_good, used_bad, pairs = set(), set(), []
    for _, i, j in ranked:
        if len(pairs) < most and i not in used_good and j not in used_bad:
            used_good.add(i)
            used_bad.add(j)
            pairs.append((passed[i], failed[j]))
    return pairs


def balanced(pairs):
    """Drop pairs, those with the largest difference in length first, until chosen and rejected
    answers are equally long on average: else the model learns to prefer a length."""
    def excess(pair):
        return len(pair["chosen"]) - len(pair["rejected"])

    remaining = sorted(pairs, key=excess)
    total = sum(excess(pair) for pair in remaining)
    while remaining and abs(total) > len(remaining):
        dropped = remaining.pop(-1 if total > 0 else 0)
        total -= excess(dropped)
    return remaining


def sampled_pairs(model, tokenizer, args, number, counts):
    """Pairs from the model's answers to new tasks of the grammar, none of them held out."""
    tasks = training_tasks(f"{args.seed} preferences {number}", TASKS)
    results = solve(model, tokenizer, tasks, args.weak_sandbox, SAMPLES, temperature=TEMPERATURE,
                    seed=args.seed)
    pairs = []
    for task, samples in zip(tasks, results):
        counts["answers"] += len(samples)
        counts["that pass"] += sum(passed for _, _, passed in samples)
        # each text once, and none that was cut off
        passed_by_text = {f"```python\n{text.rstrip()}\n```": passed
                          for text, stopped, passed in samples if stopped}
        good = [text for text, passed in passed_by_text.items() if passed]
        bad = [text for text, passed in passed_by_text.items() if not passed]
        counts["tasks always solved"] += bool(good) and not bad
        counts["tasks never solved"] += bool(bad) and not good
        prompt = task_conversation(task)["messages"][:-1]
        pairs += [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "sandbox"}
                  for chosen, rejected in closest(good, bad)]
    if not pairs:
        which = "everything" if counts["that pass"] else "nothing"
        raise InputError(f"no pairs: the model solves {which} of {len(tasks)} tasks; if nothing, "
                         "train it longer first (python sft.py --fresh --steps N), or give pairs "
                         "with --data")
    return pairs


# ------------------------------------------------------------------------------------------------
# Pairs from an LLM judge


def judged_pairs(model, tokenizer, args, counts):
    """Pairs of two answers to prompts of out/instructions that no test decides: the answer that an
    LLM judge prefers in both orders, as judges tend to prefer the first."""
    path = Path(args.out) / "instructions" / "train.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no questions for the judge; run `python sft.py --build` first")
    questions = [row["messages"][:-1] for _, row in read_rows(path)
                 if row.get("messages") and row.get("source") != "tasks" and not row.get("tools")]
    questions = random.Random(args.seed).sample(questions, min(TASKS, len(questions)))
    prompts = [prompt_of(tokenizer, question) for question in questions]
    answers = complete(model, tokenizer, prompts, ANSWER_TOKENS, (), answer_stop_ids(tokenizer),
                       samples=2, temperature=TEMPERATURE, seed=args.seed)
    texts = [text if stopped else "" for text, stopped in answers]      # cut off: no answer
    candidates = [(question, a, b) for question, a, b in zip(questions, texts[::2], texts[1::2])
                  if a.strip() and b.strip() and a != b]
    verdicts = ask_judge([(question[-1]["content"], a, b) for question, a, b in candidates],
                         lambda requests: ask_all(args.judge, requests, temperature=0.0))
    pairs = []
    for (question, a, b), verdict in zip(candidates, verdicts):
        if verdict in ("A", "B"):
            chosen, rejected = (a, b) if verdict == "A" else (b, a)
            pairs.append({"prompt": question, "chosen": chosen, "rejected": rejected,
                          "source": "judge"})
        else:
            counts[f"judged {verdict}"] += 1
    if not pairs:
        raise InputError(f"{args.judge}: prefers none of {len(candidates)} pairs in both orders; "
                         "give another judge")
    return pairs


# ------------------------------------------------------------------------------------------------
# All pairs -> out/preferences_N

FORMAT = 2                  # of the folder; an older one is refused


def build(model, tokenizer, args, number, settings):
    """Make out/preferences_N: pairs.jsonl, and a manifest of what was dropped and why."""
    counts = Counter()
    given, summary = read_data(args.data, normalize_pair, assistant_parts,
                               "chosen, rejected and their prompt")
    ours = judged_pairs(model, tokenizer, args, counts) if args.judge else []
    if not given and not ours:
        ours = sampled_pairs(model, tokenizer, args, number, counts)
    counts["pairs"] = len(given) + len(ours)
    distinct = list({json.dumps(pair): pair for pair in ours}.values())
    different = [pair for pair in distinct if not same_code(pair["chosen"], pair["rejected"])]
    pairs = balanced(different) + given                 # the user's own stay as they are
    pairs.sort(key=lambda pair: hashlib.sha256(json.dumps(pair["prompt"]).encode()).digest())
    counts["duplicates"] = len(ours) - len(distinct)
    counts["same code"] = len(distinct) - len(different)
    counts["dropped for equal lengths"] = len(different) + len(given) - len(pairs)
    with whole_folder(Path(args.out) / f"preferences_{number}") as folder:
        write_text(folder / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
        write_json(folder / "manifest.json", {**settings, "counts": counts, "kept": len(pairs),
                                              **summary})


def prepare_pairs(model, tokenizer, args, number):
    """Make out/preferences_N unless it exists, print what is in it -> its pairs."""
    folder = Path(args.out) / f"preferences_{number}"
    settings = {"format": FORMAT, "init": args.init, "seed": args.seed, "judge": args.judge,
                "weights": starting_point(model, tokenizer.tokens),
                "data": file_hashes(args.data)}
    if RANK == 0 and (args.fresh or not folder.exists()):
        build(model, tokenizer, args, number, settings)
    barrier()
    print_manifest(made_from(folder, settings), str(folder))
    return [row for _, row in read_rows(folder / "pairs.jsonl")]


# ------------------------------------------------------------------------------------------------
# Pairs -> batches


def pair_ids(tokenizer, pair):
    """A pair as (ids of the prompt, of the chosen answer, of the rejected answer); an answer ends
    with <|im_end|>."""
    end = tokenizer.special["<|im_end|>"]
    return (prompt_of(tokenizer, pair["prompt"], pair.get("tools")),
            [*tokenizer.encode(pair["chosen"]), end], [*tokenizer.encode(pair["rejected"]), end])


def pair_batch(pairs):
    """P pairs of ids -> input_ids and targets (2 P, T): first the sequences with chosen answers,
    then those with rejected ones. Only answers have targets. T is a multiple of 32, since every new
    shape costs a CPU time and memory."""
    sequences = [(prompt, chosen) for prompt, chosen, _ in pairs]
    sequences += [(prompt, rejected) for prompt, _, rejected in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences) - 1
    T = math.ceil(longest / 32) * 32
    inputs = torch.zeros(len(sequences), T, dtype=torch.long)   # no answer attends to its padding
    targets = torch.full((len(sequences), T), -100)
    for i, (prompt, answer) in enumerate(sequences):
        ids = torch.tensor(prompt + answer)
        inputs[i, :len(ids) - 1] = ids[:-1]
        targets[i, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
    return {"input_ids": inputs, "targets": targets, "count": len(pairs)}


def pairs_per_step(args):
    """The pairs of a step, over all processes; InputError unless each gets equally many."""
    pairs = args.batch_tokens // (2 * args.seq_len)
    if pairs % WORLD or not pairs:
        raise InputError(f"--batch-tokens: {pairs} pairs of two sequences of {args.seq_len} tokens "
                         f"cannot be shared evenly by {WORLD} processes")
    return pairs


class PairBatches:
    """batches(step) -> this process's pairs of the step, then its FIM sequences. Each epoch has its
    own random order; within a step, pairs of similar length share a batch."""

    def __init__(self, encoded, reference, tokens, tokenizer, args):
        """encoded: pair_ids() of N pairs; reference: the reference model's log-probabilities of
        the chosen and the rejected answers, (2, N)."""
        self.encoded, self.reference = encoded, torch.from_numpy(reference)
        self.seed = args.seed
        self.device_pairs = max(1, args.device_batch // 2)
        self.pairs = pairs_per_step(args)
        sequences = WORLD * max(1, int(self.pairs * CODE_SEQUENCES / WORLD))
        self.code = Batches(tokens, tokenizer, args.seq_len, sequences, args.device_batch,
                            self.seed, fim_rate=1.0, rank=RANK, world=WORLD, mixture=(1, 0, 0))

    def pair_index(self, index):
        """Which pair is number `index` of the endless run."""
        epoch, position = divmod(index, len(self.encoded))
        return int(generator(self.seed, "pairs", epoch).permutation(len(self.encoded))[position])

    def __call__(self, step):
        share = self.pairs // WORLD
        first = step * self.pairs + RANK * share
        indices = sorted((self.pair_index(first + j) for j in range(share)),
                         key=lambda i: sum(map(len, self.encoded[i])))
        batches = []
        for j in range(0, share, self.device_pairs):
            part = indices[j:j + self.device_pairs]
            batches.append({**pair_batch([self.encoded[i] for i in part]),
                            "reference": self.reference[:, part].flatten()})        # (2 P,)
        code = self.code(step)
        targets = sum(batch["count"] for batch in code)
        # count 0: the loss of a step is averaged over its pairs
        return batches + [{**batch, "count": 0, "pairs": share * batch["count"] / targets}
                          for batch in code]


@torch.no_grad()
def pair_log_probs(model, encoded, device_pairs):
    """Summed log-probabilities of both answers of N pairs, and their token counts: (2, N) each."""
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    results = np.zeros((2, 2, len(encoded)), np.float32)
    for start in range(0, len(order), device_pairs):
        part = order[start:start + device_pairs]
        batch = pair_batch([encoded[i] for i in part])
        sums, counts = answer_log_probs(model, {name: batch[name].to(model.head.device)
                                                for name in ("input_ids", "targets")})
        results[:, :, part] = torch.stack([sums, counts]).view(2, 2, -1).cpu().numpy()
    return results


def reference_log_probs(model, tokenizer, encoded, device_pairs, folder):
    """The reference model's log-probabilities of both answers of N pairs, (2, N): computed once and
    kept in a file, which is named by a hash of the model and the pairs."""
    parts = [starting_point(model, tokenizer.tokens), str(model.compute_dtype), encoded]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = folder / f"reference-{key}.json"
    if RANK == 0 and not path.exists():
        write_json(path, pair_log_probs(model, encoded, device_pairs)[0].tolist())
    barrier()
    return np.array(read_json(path), np.float32)


# ------------------------------------------------------------------------------------------------
# The stage


def train_round(args, number, device, build_only=False):
    """From a model and its own answers to out/dpo, or out/dpo_N before the last round."""
    folder = Path(args.out) / args.stage
    if (folder / "config.json").exists() and args.stage != "dpo":
        return say(f"{folder} is finished")
    say(f"round {number}, starting from {args.init}")
    model, tokenizer = load_base(args.init, device)
    args.size = args.size or size_of(model, device)
    fill_in(args, PRESETS.get(args.size, PUBLISHED))
    pairs_per_step(args)                            # report bad flags before minutes of sampling
    if not build_only:
        prepare_corpus(args)
    work = folder.with_name(f"{args.stage}.unfinished")
    model.compute_dtype, _ = dtype_of_run(args, model.config, work)
    pairs = prepare_pairs(model.eval(), tokenizer, args, number)
    if build_only:
        return

    encoded = [pair_ids(tokenizer, pair) for pair in pairs]
    fits = [(prompt, chosen, rejected) for prompt, chosen, rejected in encoded
            if len(prompt) + max(len(chosen), len(rejected)) <= args.seq_len + 1]
    say(f"{len(encoded) - len(fits):,} longer than {args.seq_len} tokens are left out")
    if len(fits) < 2:
        raise InputError(f"{len(fits)} pairs are left; give more, or a larger --seq-len")
    device_pairs = max(1, args.device_batch // 2)
    reference = reference_log_probs(model, tokenizer, fits, device_pairs,
                                    Path(args.out) / f"preferences_{number}")
    n = max(1, round(VALIDATION_PAIRS * len(fits)))
    batches = PairBatches(fits[n:], reference[:, n:].copy(), load_tokens(args.out, tokenizer),
                          tokenizer, args)
    validation = load_documents(args.out, "validation")
    loss_fn = functools.partial(step_loss, beta=args.beta, kind=args.loss, nll=args.nll)

    def evaluate(model, step):
        sums, counts = pair_log_probs(model, fits[:n], device_pairs)                # (2, n) each
        gains = sums - reference[:, :n]
        lost = -(gains / counts)[0].mean()
        if lost > COLLAPSED:
            raise InputError(f"step {step}: the chosen answers have lost {lost:.2f} nats per "
                             "token; lower --lr, or raise --beta or --nll")
        chosen, rejected = gains / counts if args.loss in MEANS else gains
        return {"bpb": bits_per_byte(model, tokenizer, validation),
                "validation accuracy": float((chosen > rejected).mean())}

    train(model.train(), tokenizer, batches, loss_fn, args, evaluate)
    if RANK == 0:
        plot_preferences(read_metrics(folder), folder / "preferences.png")


def parse_args():
    parser = argparse.ArgumentParser(description="Train a Qwen2.5-Coder on preference pairs.")
    training_flags(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="your own "
                        "pairs: chosen and rejected, answers to a prompt or whole conversations "
                        "that differ in the last answer (repeatable)")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server with an "
                        "LLM judge that says which of two answers is better")
    parser.add_argument("--build", action="store_true", help="only make the pairs")
    parser.add_argument("--rounds", type=int, default=1, help="how often to sample, grade and "
                        "train (default: %(default)s)")
    parser.add_argument("--loss", choices=["sigmoid", "length", "ipo", "chosen"],
                        default="sigmoid", help="length: sigmoid of means per token; chosen: "
                        "learn only the chosen answers (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=BETA, help="how much a difference from the "
                        "reference counts (default: %(default)s)")
    parser.add_argument("--nll", type=float, default=NLL, help="weight of the chosen answers' own "
                        "loss, and of that of code (default: %(default)s)")
    parser.add_argument("--weak-sandbox", action="store_true", help="run programs where the system "
                        "cannot lock them in, under resource limits alone")
    args = parser.parse_args()
    if args.rounds < 1 or not args.beta > 0 or not args.nll >= 0:
        raise InputError("--rounds and --beta must be above 0, --nll not below it")
    check_flags(args)                               # before anything is deleted or sampled
    file_hashes(args.data)
    return args


def main():
    args = parse_args()
    rounds, build_only = vars(args).pop("rounds"), vars(args).pop("build")
    rounds = 1 if build_only else rounds
    out, args.before, args.after = Path(args.out), 0, 0
    first = args.init = str(args.init or newest_model(out, ("sft",)))
    work = out / "dpo.unfinished"                   # from the first round's start to the last's end
    if (out / "dpo").exists() and not (args.fresh or build_only or work.exists()):
        return say(f"{out / 'dpo'} is finished; --fresh trains it again")
    if args.judge and "#" not in args.judge and (
            args.fresh or not (out / "preferences_1").exists()):
        first_model(args.judge)                     # before minutes of answers
    device = start_processes(args.device)
    if RANK == 0 and not build_only:
        if args.fresh:                              # out/dpo itself stays until the new one is done
            for folder in (*out.glob("dpo_[0-9]*"), *out.glob("preferences_[0-9]*"), work):
                shutil.rmtree(folder, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    args.fresh = args.fresh and build_only
    barrier()
    for number in range(1, rounds + 1):
        args.stage = "dpo" if number == rounds else f"dpo_{number}"
        train_round(argparse.Namespace(**vars(args)), number, device, build_only)
        args.init = str(out / args.stage)
    if RANK == 0 and not build_only:
        compare_models(first, args.init, args, args.device, samples=10)
    stop_processes()


if __name__ == "__main__":
    run(main)
