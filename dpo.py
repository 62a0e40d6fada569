"""Direct preference optimization: of two answers to a question, prefer the one that passes tests.

The last step of section 4.2 of the report. The model answers small tasks (support/tasks.py) several
times, the sandbox grades the answers, and an answer that passes is paired with the failed answer
most similar to it. Pairs may also come from a file or from an LLM judge. The loss compares the
model with the reference model: a frozen copy from before training, whose log-probabilities are
computed once, at the start. The training loop is in pretrain.py; asking and grading are in sft.py.

    python dpo.py                       # sample, grade, pair, train, measure; 12 to 18 minutes
    python dpo.py --rounds 3            # three rounds, each from the model of the one before
    python dpo.py --build               # only make the pairs: out/preferences_1
    python dpo.py --data FILE           # your own pairs, in TRL's formats (JSON Lines)
    python dpo.py --init FOLDER --lora 16 --problems mbpp.jsonl     # with tests of your own
    python dpo.py --judge http://localhost:8000/v1      # pairs from the verdicts of a larger model

Read first: dpo_loss, preference_loss, closest, balanced, PairBatches
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (Batches, Contamination, default_benchmarks, generator, load_documents,
                  load_tokens, made_from)
from evaluate import bits_per_byte, complete, edit_similarity
from fim import newest_model
from pretrain import (check_flags, dtype_of_run, fill_in, load_base, next_token_loss,
                      set_compute_dtype, size_of, train, training_flags)
from sft import (ANSWER_TOKENS, answer_stop_ids, compare_models, prepare_corpus, prompt_of, solve,
                 problem_prompt)
from support.benchmarks import training_problems
from support.chats import ask_judge, file_hashes, normalize_pair, print_manifest, read_data
from support.checkpoint import read_metrics, starting_point
from support.distributed import RANK, WORLD, barrier, say, start_processes, stop_processes
from support.files import InputError, read_rows, run, whole_folder, write_json, write_text
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
MEANS = ("length", "ipo")   # the losses that use means per token, not sums
COLLAPSED = 1.0             # nats per token that the chosen answers may lose

# ------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=BETA,
             kind="sigmoid"):
    """The loss of each pair (P,), from the log-probabilities, (P,) each, of its chosen and rejected
    answers under the model that is trained (the policy) and under the reference model.

    kind "sigmoid": of log-probabilities summed over tokens (arXiv 2305.18290, equation 7).
    "length": the same loss of their means per token (arXiv 2411.15124, section 5). "ipo": of means,
    too; pulls their margin to 1 / (2 beta) (arXiv 2310.12036, equation 17).
    """
    # how much more than the reference model the policy prefers the chosen answer
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)    # (P,)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * margin)         # "chosen" only logs it


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
    preference = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                          beta, kind)
    # Making the rejected answer less likely is enough to lower the DPO loss, and the chosen one may
    # become less likely, too. The chosen answer's own loss, in nats per token, prevents that.
    chosen_sums, rejected_sums = sums.chunk(2)
    chosen_loss = -chosen_sums / counts.chunk(2)[0]                                 # (P,)
    losses = chosen_loss if kind == "chosen" else preference + nll * chosen_loss
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    metrics = {"loss/preference": preference, "loss/chosen": chosen_loss,
               "rewards/chosen": chosen_reward, "rewards/rejected": rejected_reward,
               "rewards/margins": chosen_reward - rejected_reward,
               "rewards/accuracies": (chosen_reward > rejected_reward).float(),
               "logps/chosen": chosen_sums, "logps/rejected": rejected_sums}
    return losses.sum(), {name: values.sum() for name, values in metrics.items()}


def step_loss(model, batch, beta, kind, nll):
    """The loss of a batch of pairs or of FIM sequences, and its metrics. In each step, the mean
    loss per token of FIM sequences has the same weight as that of the chosen answers."""
    if "reference" in batch:
        return preference_loss(model, batch, beta=beta, kind=kind, nll=nll)
    loss, _ = next_token_loss(model, batch)
    loss = batch["weight"] * loss                       # see PairBatches
    return loss if kind == "chosen" else nll * loss, {"loss/code": loss}


# ------------------------------------------------------------------------------------------------
# Where pairs come from: the sandbox, a file, or an LLM judge
#
# A pair is {"prompt": messages, "chosen": text, "rejected": text}, as in support/chats.py.

TASKS = 5000                # that are answered in a round; not published; ours
SAMPLES = 4                 # of each task; likewise
TEMPERATURE = 0.8           # likewise
PAIRS_PER_TASK = 4          # at most; likewise
FORMAT = 2                  # of out/preferences_N; an older one is refused


def closest(passed, failed, most=PAIRS_PER_TASK):
    """At most `most` pairs of an answer that passed and one that failed: the most similar pair,
    then the most similar one of the answers that are left, and so on; no answer is used twice. The
    fewer the differences, the clearer why one of them failed. Similarity: `edit_similarity` of
    their words."""
    words = {text: re.findall(r"\w+|[^\w\s]", text) for text in passed + failed}
    ranked = sorted(itertools.product(passed, failed), reverse=True,
                    key=lambda pair: edit_similarity(*(words[text] for text in pair)))
    pairs = []
    while ranked and len(pairs) < most:
        good, bad = ranked[0]
        pairs.append((good, bad))
        ranked = [(a, b) for a, b in ranked if a != good and b != bad]
    return pairs


def balanced(pairs):
    """Drop pairs, those with the largest difference in length first, until chosen and rejected
    answers are equally long on average: else the model learns to prefer a length."""
    def excess(pair):
        return len(pair["chosen"]) - len(pair["rejected"])

    remaining = sorted(pairs, key=excess)
    total = sum(excess(pair) for pair in remaining)
    while remaining and abs(total) > len(remaining):        # more than one character on average
        dropped = remaining.pop(-1 if total > 0 else 0)
        total -= excess(dropped)
    return remaining


def problems_of_file(path, counts):
    """The problems of --problems that share no text with a benchmark or with MBPP's test split."""
    problems, ids = training_problems(path)
    contamination = Contamination([*default_benchmarks(), path], skip=ids)
    clean = [problem for problem in problems         # a solution is not needed
             if not contamination.hit(problem["prompt"]
                                      + (problem.get("canonical_solution") or ""))]
    counts.update({"problems": len(problems), "contaminated": len(problems) - len(clean)})
    return clean


def sampled_pairs(model, tokenizer, args, number, counts):
    """Pairs from the model's answers to --problems, or to new tasks of the grammar, none of them
    held out."""
    tokens = None
    if args.problems:
        tasks = problems_of_file(args.problems, counts)
        tokens = args.seq_len // 2
    else:
        tasks = training_tasks(f"{args.seed} preferences {number}", TASKS)
    results = solve(model, tokenizer, tasks, args.weak_sandbox, SAMPLES, tokens,
                    temperature=TEMPERATURE, seed=args.seed + number - 1)
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
        pairs += [{"prompt": problem_prompt(task), "chosen": chosen, "rejected": rejected,
                   "source": "sandbox"} for chosen, rejected in closest(good, bad)]
    return pairs


def judged_pairs(model, tokenizer, args, counts):
    """Pairs of two answers to questions in out/instructions that no test can grade: chosen is the
    answer that an LLM judge prefers in both orders."""
    if "#" not in args.judge:
        first_model(args.judge)                         # report a server that is down at once
    rows = [row for _, row in read_rows(Path(args.out) / "instructions" / "train.jsonl")]
    questions = [row["messages"][:-1] for row in rows
                 if row["source"] != "tasks" and not row["tools"]]
    questions = questions[-TASKS:]                      # the best conversations come last
    prompts = [prompt_of(tokenizer, question) for question in questions]
    answers = complete(model, tokenizer, prompts, ANSWER_TOKENS, (), answer_stop_ids(tokenizer),
                       samples=2, temperature=TEMPERATURE, seed=args.seed)
    return ask_judge(questions, answers, counts,
                     lambda requests: ask_all(args.judge, requests, temperature=0.0))


def collect_pairs(model, tokenizer, args, number):
    """The pairs of --data and --judge, or without both those of the sandbox; and a summary."""
    counts = Counter()
    given, summary = read_data(args.data, normalize_pair, assistant_parts, "chosen and rejected")
    ours = judged_pairs(model, tokenizer, args, counts) if args.judge else []
    if not given and not args.judge:
        ours = sampled_pairs(model, tokenizer, args, number, counts)
    if not given and not ours:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
        raise InputError(f"no pairs: {reasons}; train the model longer (python sft.py --fresh "
                         "--steps N), try another judge, or give pairs with --data")
    pairs = balanced(ours) + given                      # the user's own pairs are not filtered
    counts["pairs"] = len(ours) + len(given)
    counts["dropped for equal lengths"] = counts["pairs"] - len(pairs)
    # by a hash: the first ones, for validation, are random, and pairs of a prompt stay together
    pairs.sort(key=lambda pair: hashlib.sha256(json.dumps(pair["prompt"]).encode()).digest())
    return pairs, {"counts": counts, "kept": len(pairs), **summary}


def prepare_pairs(model, tokenizer, args, number):
    """Make out/preferences_N unless it exists, print a summary -> its pairs."""
    folder = Path(args.out) / f"preferences_{number}"
    settings = {"format": FORMAT, "init": args.init, "seed": args.seed, "judge": args.judge,
                "weights": starting_point(model, tokenizer.tokens), "data": file_hashes(args.data),
                "problems": file_hashes(filter(None, [args.problems]))}
    if RANK == 0 and (args.fresh or not folder.exists()):
        pairs, summary = collect_pairs(model, tokenizer, args, number)
        with whole_folder(folder) as new:
            write_text(new / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
            write_json(new / "manifest.json", {**settings, **summary})
    barrier()                                           # then the first one has written the pairs
    print_manifest(made_from(folder, settings), str(folder))
    return [row for _, row in read_rows(folder / "pairs.jsonl")]


# ------------------------------------------------------------------------------------------------
# Pairs -> batches


def pair_ids(tokenizer, pair):
    """A pair -> the ids of its prompt, chosen answer and rejected answer, with <|im_end|>."""
    end = tokenizer.special["<|im_end|>"]
    return (prompt_of(tokenizer, pair["prompt"], pair.get("tools")),
            [*tokenizer.encode(pair["chosen"]), end], [*tokenizer.encode(pair["rejected"]), end])


def pair_batch(pairs):
    """P pairs of ids -> input_ids and targets (2 P, T): first the sequences with chosen answers,
    then those with rejected ones. Only answers have targets. T is a multiple of 32, since every new
    shape costs time and memory."""
    sequences = [(prompt, chosen) for prompt, chosen, _ in pairs]
    sequences += [(prompt, rejected) for prompt, _, rejected in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences) - 1
    T = math.ceil(longest / 32) * 32
    inputs = torch.zeros(len(sequences), T, dtype=torch.long)   # no answer attends to its padding
    targets = torch.full((len(sequences), T), -100)
    for i, (prompt, answer) in enumerate(sequences):
        ids = torch.tensor(prompt + answer)
        inputs[i, :len(ids) - 1] = ids[:-1]
        # the target of a position is the id after it
        targets[i, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
    return {"input_ids": inputs, "targets": targets, "count": len(pairs)}


def batches_by_length(encoded, indices, device_pairs):
    """Yield (indices of P pairs, their batch): pairs of similar length, which need less padding."""
    ordered = sorted(indices, key=lambda i: sum(map(len, encoded[i])))
    for start in range(0, len(ordered), device_pairs):
        part = ordered[start:start + device_pairs]
        yield part, pair_batch([encoded[i] for i in part])


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
        self.encoded, self.reference = encoded, reference
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
        share = self.pairs // WORLD                     # of each process
        first = step * self.pairs + RANK * share
        indices = [self.pair_index(first + j) for j in range(share)]
        batches = []
        for part, batch in batches_by_length(self.encoded, indices, self.device_pairs):
            batches.append({**batch, "reference": self.reference[:, part].flatten()})   # (2 P,)
        code = self.code(step)
        targets = sum(batch["count"] for batch in code)
        # train() divides the loss by the sum of all counts: the number of pairs. The weight makes
        # the mean loss per FIM target count once for each pair.
        return batches + [{**batch, "count": 0, "weight": share / targets} for batch in code]


@torch.no_grad()
def pair_log_probs(model, encoded, device_pairs):
    """Summed log-probabilities of both answers of N pairs, and their token counts: (2, N) each."""
    results = torch.zeros(2, 2, len(encoded))
    for part, batch in batches_by_length(encoded, range(len(encoded)), device_pairs):
        sums, counts = answer_log_probs(model, {name: batch[name].to(model.head.device)
                                                for name in ("input_ids", "targets")})
        results[:, :, part] = torch.stack([sums, counts]).view(2, 2, -1).cpu()
    return results


# ------------------------------------------------------------------------------------------------
# The stage


def train_round(args, number, device, build_only=False):
    """From a model and its own answers to out/dpo in the last round, out/dpo_N in others."""
    folder = Path(args.out) / args.stage
    if (folder / "config.json").exists() and args.stage != "dpo":
        return say(f"{folder} is finished")
    say(f"round {number}, starting from {args.init}")
    model, tokenizer = load_base(args, device)
    args.size = args.size or size_of(model.config, args.device)
    fill_in(args, PRESETS.get(args.size, PUBLISHED))
    pairs_per_step(args)                            # report bad flags before minutes of sampling
    work = folder.with_name(f"{args.stage}.unfinished")
    set_compute_dtype(model, dtype_of_run(args, model.config, work)[0])
    pairs = prepare_pairs(model.eval(), tokenizer, args, number)
    if build_only:
        return

    prepare_corpus(args)
    encoded = [pair_ids(tokenizer, pair) for pair in pairs]
    fits = [(prompt, chosen, rejected) for prompt, chosen, rejected in encoded
            if len(prompt) + max(len(chosen), len(rejected)) <= args.seq_len + 1]
    say(f"{len(encoded) - len(fits):,} longer than {args.seq_len} tokens are left out")
    if len(fits) < 2:
        raise InputError(f"{len(fits)} pairs are left; give more, or a larger --seq-len")
    # The model is its own reference: train() will load the weights of a resumed run, but later.
    device_pairs = max(1, args.device_batch // 2)
    reference, _ = pair_log_probs(model, fits, device_pairs)                        # (2, N)
    n = max(1, round(VALIDATION_PAIRS * len(fits)))
    batches = PairBatches(fits[n:], reference[:, n:], load_tokens(args.out, tokenizer), tokenizer,
                          args)
    validation = load_documents(args.out, "validation")
    loss_fn = functools.partial(step_loss, beta=args.beta, kind=args.loss, nll=args.nll)

    def evaluate(model, step):
        sums, counts = pair_log_probs(model, fits[:n], device_pairs)                # (2, n) each
        gains = sums - reference[:, :n]
        mean_gains = gains / counts                                                 # per token
        lost = -mean_gains[0].mean()                                                # chosen answers
        if lost > COLLAPSED:
            raise InputError(f"step {step}: the chosen answers have lost {lost:.2f} nats per "
                             "token; lower --lr, or raise --beta or --nll")
        chosen, rejected = mean_gains if args.loss in MEANS else gains
        return {"bpb": bits_per_byte(model, tokenizer, validation),
                "validation accuracy": float((chosen > rejected).float().mean())}

    train(model.train(), tokenizer, batches, loss_fn, args, evaluate)
    if RANK == 0:
        plot_preferences(read_metrics(folder), folder / "preferences.png")


def main():
    parser = argparse.ArgumentParser(description="Train a Qwen2.5-Coder on preference pairs.")
    training_flags(parser)
    add = parser.add_argument
    add("--data", action="append", metavar="FILE", help="your own pairs: chosen and rejected, as "
        "answers or as conversations (repeatable)")
    add("--problems", metavar="FILE", help="sample answers to these problems with tests, such as "
        "those of MBPP, of which only the training split is used (default: tasks of a grammar)")
    add("--judge", metavar="URL", help="an OpenAI-compatible server with an LLM judge that says "
        "which of two answers is better")
    add("--build", action="store_true", help="only make the pairs")
    add("--rounds", type=int, default=1,
        help="how often to sample, grade and train (default: %(default)s)")
    add("--loss", choices=["sigmoid", "length", "ipo", "chosen"], default="sigmoid", help="length: "
        "sigmoid of means per token; chosen: learn only the chosen answers (default: %(default)s)")
    add("--beta", type=float, default=BETA,
        help="how much a difference from the reference counts (default: %(default)s)")
    add("--nll", type=float, default=NLL, help="weight of the loss of chosen answers, and of the "
        "loss on code (default: %(default)s)")
    add("--weak-sandbox", action="store_true",
        help="where the system has no sandbox: run programs under resource limits only")
    args = parser.parse_args()
    if args.rounds < 1 or not args.beta > 0 or not args.nll >= 0:
        raise InputError("--rounds and --beta must be above 0, --nll at least 0")
    check_flags(args)                               # before anything is deleted or sampled
    file_hashes(filter(None, [*(args.data or []), args.problems]))      # a missing file, early
    build_only = vars(args).pop("build")
    rounds = vars(args).pop("rounds")
    if build_only:                                  # the answers of later rounds need training
        rounds = 1
    out = Path(args.out)
    args.before, args.after = 0, 0                  # steps of other phases: there are none
    first = args.init = str(args.init or newest_model(out, ("sft",)))
    work = out / "dpo.unfinished"                   # from the first round's start to the last's end
    if (out / "dpo").exists() and not (args.fresh or build_only or work.exists()):
        return say(f"{out / 'dpo'} is finished; --fresh trains it again")
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
