"""Direct preference optimization: of two answers to a question, the one that passes its tests.

The last step of section 4.2 of the report, in one file. The model answers small tasks several
times, the sandbox grades the answers, and an answer that passes is preferred to the failing one
that is most like it. Pairs also come from a file or from a judge. The loss needs what the model
thought of both before (the reference), which is computed once and stored.

The loop is pretrain.py's train(), the tasks are sft.py's, the sandbox is evaluate.py's.

    python dpo.py                       # sample, grade, pair, train, measure; 12 to 18 minutes
    python dpo.py --rounds 3            # ... and again with the better model
    python dpo.py --build               # out/preferences_1 alone: the pairs and why others fell out
    python dpo.py --data FILE           # pairs of your own: prompt, chosen, rejected (JSON lines)
    python dpo.py --judge http://localhost:8000/v1      # pairs by what a larger model prefers
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import random
import re
import shutil
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import Batches, ask_all, first_model, generator, load_documents, made_from, user
from evaluate import bits_per_byte, bootstrap, complete, edit_similarity
from fim import control_stops, newest_model, python_tree
from pretrain import (RANK, WORLD, barrier, check_flags, choose_dtype, fill_in, load_base,
                      next_token_loss, read_metrics, say, size_of, start_processes,
                      stop_processes, train, training_flags)
from sft import (ASKED_TOKENS, check_messages, compare, file_hashes, prompt_of, solve,
                 task_conversation, training_tasks)
from support.files import (InputError, read_json, read_rows, run, whole_folder, write_json,
                           write_text)

PRESETS = {"tiny": dict(seq_len=256, batch_tokens=16384, device_batch=16, steps=200, lr=5e-4),
           "mini": dict(seq_len=256, batch_tokens=16384, device_batch=16, steps=200, lr=3e-4),
           "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=100, lr=5e-5)}
# Of the report's parent and of the released script (arXiv 2412.15115, section 4.2; finetuning/dpo)
PUBLISHED = dict(seq_len=3072, batch_tokens=3072 * 1024, device_batch=4, steps=1000, lr=7e-7)
BETA, NLL = 1, 10               # ours, by measurement; beta of the released script: 0.1
TASKS, SAMPLES, TEMPERATURE = 5000, 4, 0.8      # not published; ours
PAIRS_A_TASK = 4
HELD_OUT_PAIRS = 0.1
CODE_ROWS = 0.25                # rows of code with gaps for each pair, that they be not forgotten
COLLAPSED = 1.0                 # nats per token that the chosen answers may lose

# ------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=BETA,
             kind="sigmoid"):
    """Log-probabilities of chosen and rejected answers, (P,) each -> the loss of each pair (P,).

    sigmoid: of the answers' sums (arXiv 2305.18290, equation 7). length: the same of their means
    per token (arXiv 2411.15124, section 5). ipo: a margin of 1 / (2 beta) between the means
    (arXiv 2310.12036, equation 17).
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)    # (P,)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * margin)


MEANS = ("length", "ipo")       # the losses that compare means per token, not sums


def log_probabilities(model, batch):
    """A batch of 2 P rows -> what each answer's tokens sum to, in fp32, and how many they are."""
    known = model(batch["input_ids"], targets=batch["targets"], reduce="none")      # (2 P, T)
    return known.sum(1), (batch["targets"] != -100).sum(1)                          # (2 P,) each


def preference_loss(model, batch, beta, kind, nll):
    """The loss of a batch of P pairs, summed, and its metrics under their usual names."""
    sums, counts = log_probabilities(model, batch)                                  # (2 P,)
    size = counts if kind in MEANS else 1
    policy, reference = ((x / size).chunk(2) for x in (sums, batch["reference"]))   # (P,) each
    own = -(sums / counts).chunk(2)[0]              # of the chosen answers, in nats per token
    preference = dpo_loss(*policy, *reference, beta, kind)
    losses = own if kind == "chosen" else preference + nll * own
    with torch.no_grad():
        chosen, rejected = (beta * (a - b) for a, b in zip(policy, reference))
        metrics = {"loss/preference": preference, "loss/chosen": own,
                   "rewards/chosen": chosen, "rewards/rejected": rejected,
                   "rewards/margins": chosen - rejected,
                   "rewards/accuracies": (chosen > rejected).float(),
                   "logps/chosen": sums.chunk(2)[0], "logps/rejected": sums.chunk(2)[1]}
    return losses.sum(), {name: values.sum() for name, values in metrics.items()}


def step_loss(model, batch, beta, kind, nll):
    """Of a batch of pairs, or of rows of code: their mean per token, which counts for each pair of
    the step as much as its chosen answer does. pairs: the batch's part of the step's, by tokens."""
    if "reference" in batch:
        return preference_loss(model, batch, beta, kind, nll)
    loss, _ = next_token_loss(model, batch)
    loss = loss / (batch["targets"] != -100).sum() * batch["pairs"]
    return loss * (1 if kind == "chosen" else nll), {"loss/code": loss}


# ------------------------------------------------------------------------------------------------
# Pairs: {"prompt": messages, "chosen": text, "rejected": text, "source": where from}


def same_code(a, b):
    """Whether two answers differ in comments and blanks alone."""
    trees = [python_tree(textwrap.dedent(text.removeprefix("```python\n").removesuffix("```")))
             for text in (a, b)]
    with contextlib.suppress(RecursionError):           # of an expression with a thousand parts
        if all(trees):
            return ast.dump(trees[0]) == ast.dump(trees[1])
    return a.strip() == b.strip()


def pieces(text):
    return re.findall(r"\w+|[^\w\s]", text)


def closest(passed, failed, most=PAIRS_A_TASK):
    """Pairs of one that passes and one that fails, the most alike (`edit_similarity` of their
    `pieces`) first, none used twice."""
    ranked = sorted(((-edit_similarity(pieces(a), pieces(b)), a, b)
                     for a in passed for b in failed), key=lambda row: row[0])
    used, pairs = set(), []
    for _, a, b in ranked:
        if len(pairs) < most and not {a, b} & used:
            used |= {a, b}
            pairs.append((a, b))
    return pairs


def sampled_pairs(model, tokenizer, args, number, counts):
    """Pairs of answers to new tasks of the grammar, none held out, by what the sandbox says."""
    tasks = training_tasks(f"{args.seed} preferences {number}", TASKS)
    answers = solve(model, tokenizer, tasks, args.weak_sandbox, SAMPLES,
                    temperature=TEMPERATURE, seed=args.seed)
    pairs = []
    for task, found in zip(tasks, answers):
        counts["answers"] += len(found)
        counts["that pass"] += sum(passed for _, _, passed in found)
        texts = {f"```python\n{text.rstrip()}\n```": passed for text, ends, passed in found if ends}
        passing, failing = ([text for text, passed in texts.items() if passed == wanted]
                            for wanted in (True, False))
        counts["tasks that are always solved"] += bool(passing) and not failing
        counts["tasks that are never solved"] += bool(failing) and not passing
        prompt = task_conversation(task)["messages"][:-1]
        pairs += [{"prompt": prompt, "chosen": a, "rejected": b, "source": "sandbox"}
                  for a, b in closest(passing, failing)]
    if not pairs:
        what, do = ("nothing", "train it longer first: python sft.py --fresh --steps N") if not (
            counts["that pass"]) else ("everything", "there is nothing to prefer here")
        raise InputError(f"no pairs: the model solves {what} of {len(tasks)} tasks; {do}, or give "
                         "pairs with --data")
    return pairs


JUDGE = ("Which answer to the question is better?\n\nQuestion:\n{}\n\nAnswer A:\n{}\n\nAnswer B:\n"
         "{}\n\nAnswer with the one letter A or B, or with the word tie.")


def verdict(answer):
    """What a judge has said: A, B, tie, or "" for anything else."""
    letters = set(re.findall(r"\b[AB]\b", answer))
    return "tie" if re.search(r"(?i)\btie\b", answer) else letters.pop() if (
        len(letters) == 1) else ""


def judged_pairs(model, tokenizer, args, counts):
    """Pairs of two answers to questions of out/instructions that no test decides: the one that a
    judge prefers in both orders."""
    path = Path(args.out) / "instructions" / "train.jsonl"
    if not path.exists():
        raise InputError(f"{path}: no questions for the judge; run `python sft.py --build` first")
    questions = [row["messages"][:-1] for _, row in read_rows(path) if row["source"] != "tasks"]
    questions = random.Random(args.seed).sample(questions, min(TASKS, len(questions)))
    prompts = [prompt_of(tokenizer, question) for question in questions for _ in range(2)]
    answers = complete(model, tokenizer, prompts, ASKED_TOKENS, (), control_stops(tokenizer),
                       temperature=TEMPERATURE, seed=args.seed)
    texts = [text if ends else "" for text, ends in answers]        # what was cut off is no answer
    rows = [(question, a, b) for question, a, b in zip(questions, texts[::2], texts[1::2])
            if a.strip() and b.strip() and a != b]
    asked = [user(JUDGE.format(question[-1]["content"], *two)) for question, a, b in rows
             for two in ((a, b), (b, a))]
    said = [verdict(answer) for answer in ask_all(args.judge, asked, temperature=0.0)]
    pairs = []
    for (question, a, b), first, second in zip(rows, said[::2], said[1::2]):
        if {first, second} == {"A", "B"}:
            chosen, rejected = (a, b) if first == "A" else (b, a)
            pairs.append({"prompt": question, "chosen": chosen, "rejected": rejected,
                          "source": "judge"})
        else:
            counts["no answer of the judge" if "" in (first, second) else "tie"] += 1
    if not pairs:
        raise InputError(f"{args.judge}: prefers none of {len(rows)} pairs in both orders; give "
                         "another judge")
    return pairs


def read_pairs(path, broken):
    """The pairs of a file: prompt, chosen and rejected, strings or lists of messages. broken:
    reason -> lines of what is left out."""
    pairs, first = [], "it is empty"
    for number, row in read_rows(path):
        prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
        if isinstance(prompt, str):
            prompt = user(prompt)
        chosen, rejected = (answer[-1].get("content") if isinstance(answer, list) and answer
                            and isinstance(answer[-1], dict) else answer
                            for answer in (chosen, rejected))
        answer = [{"role": "assistant", "content": chosen}]
        fault = "a prompt that is no list" if not isinstance(prompt, list) else check_messages(
            prompt + answer) or check_messages(prompt + [{**answer[0], "content": rejected}])
        if fault:
            broken[fault].append(f"{path}, line {number}")
            first = f"{fault}, line {number}" if number == 1 else first
        else:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                          "source": "file"})
    if not pairs:
        raise InputError(f"{path}: no pair ({first}); expected prompt, chosen and rejected")
    return pairs


def balanced(pairs):
    """Drop pairs, the most uneven first, until chosen and rejected answers are equally long on the
    whole: else length is what is learned."""
    def longer(pair):
        return len(pair["chosen"]) - len(pair["rejected"])

    kept = sorted(pairs, key=longer)
    total = sum(map(longer, kept))
    while kept and abs(total) > len(kept):
        total -= longer(kept.pop(-1 if total > 0 else 0))
    return kept


def prepare_pairs(model, tokenizer, args, number):
    """Make out/preferences_N unless it is there, print what it holds -> its pairs."""
    folder = Path(args.out) / f"preferences_{number}"
    made_by = {"init": args.init, "weights": weights_hash(model), "seed": args.seed,
               "judge": args.judge, "data": file_hashes(args.data)}
    if RANK == 0 and (args.fresh or not folder.exists()):
        counts, broken = Counter(), defaultdict(list)
        pairs = [pair for path in args.data or [] for pair in read_pairs(path, broken)]
        if args.judge:
            pairs += judged_pairs(model, tokenizer, args, counts)
        if not pairs:
            pairs = sampled_pairs(model, tokenizer, args, number, counts)
        counts["pairs"] = len(pairs)
        distinct = list({json.dumps(pair): pair for pair in pairs}.values())
        different = [pair for pair in distinct if not same_code(pair["chosen"], pair["rejected"])]
        given = [pair for pair in different if pair["source"] == "file"]        # as they are
        kept = given + balanced([pair for pair in different if pair["source"] != "file"])
        kept.sort(key=lambda pair: hashlib.sha256(json.dumps(pair["prompt"]).encode()).digest())
        counts.update({"the same twice": len(pairs) - len(distinct), "differ in nothing that runs":
                       len(distinct) - len(different), "dropped for equal lengths":
                       len(different) - len(kept)})
        with whole_folder(folder) as new:
            write_text(new / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in kept))
            write_json(new / "manifest.json", {**made_by, "counts": counts, "kept": len(kept),
                       "broken": {why: [len(lines), lines[0]] for why, lines in broken.items()}})
    barrier()
    manifest = made_from(folder, made_by)
    say(", ".join(f"{n:,} {what}" for what, n in manifest["counts"].items())
        + f": {manifest['kept']:,} kept in {folder}")
    for reason, (count, first) in manifest["broken"].items():
        say(f"left out: {count} with {reason}, the first in {first}")
    return [row for _, row in read_rows(folder / "pairs.jsonl")]


def weights_hash(model):
    key = hashlib.sha256(str(model.compute_dtype).encode())
    for _, weight in sorted(model.state_dict().items()):
        key.update(weight.cpu().float().numpy().tobytes())
    return key.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Pairs -> batches


def pair_ids(tokenizer, pair):
    """A pair as (ids of the prompt, of the chosen answer, of the rejected one), each answer with
    the <|im_end|> that closes it."""
    end = tokenizer.special["<|im_end|>"]
    return (prompt_of(tokenizer, pair["prompt"]), [*tokenizer.encode(pair["chosen"]), end],
            [*tokenizer.encode(pair["rejected"]), end])


def pair_batch(pairs):
    """P pairs of ids -> input_ids and targets (2 P, T): the chosen rows, then the rejected ones.
    T is a multiple of 32, as every new shape costs a CPU time and memory."""
    rows = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    T = math.ceil(longest / 32) * 32
    inputs = torch.zeros(len(rows), T, dtype=torch.long)    # what follows an answer is never seen
    targets = torch.full((len(rows), T), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor(prompt + answer)
        inputs[row, :len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1:len(ids) - 1] = ids[len(prompt):]
    return {"input_ids": inputs, "targets": targets, "count": len(pairs)}


def pairs_per_step(args):
    """The pairs of a step, over all processes; InputError unless all get as many."""
    pairs = args.batch_tokens // (2 * args.seq_len)
    if pairs % WORLD or not pairs:
        raise InputError(f"--batch-tokens: {pairs} pairs of two rows of {args.seq_len} tokens "
                         f"cannot be shared evenly by {WORLD} processes")
    return pairs


class PairBatches:
    """batches(step) -> the step's pairs for one rank, each epoch in an order of its own, those of
    like length together, and rows of code with gaps."""

    def __init__(self, encoded, reference, documents, tokenizer, args):
        """encoded: pair_ids of N pairs; reference: the log-probabilities of both answers (2, N)."""
        self.encoded, self.reference = encoded, torch.from_numpy(reference)
        self.seed, self.device_pairs = args.seed, max(1, args.device_batch // 2)
        self.pairs = pairs_per_step(args)
        rows = WORLD * max(1, int(self.pairs * CODE_ROWS / WORLD))
        self.code = Batches(documents, tokenizer, args.seq_len, rows, args.device_batch, self.seed,
                            1.0, RANK, WORLD, (1, 0, 0))

    def number(self, index):
        epoch, place = divmod(index, len(self.encoded))
        return int(generator(self.seed, "pairs", epoch).permutation(len(self.encoded))[place])

    def __call__(self, step):
        share = self.pairs // WORLD
        first = step * self.pairs + RANK * share
        numbers = sorted((self.number(first + j) for j in range(share)),
                         key=lambda i: sum(map(len, self.encoded[i])))
        parts = [numbers[j:j + self.device_pairs] for j in range(0, share, self.device_pairs)]
        pairs = [{**pair_batch([self.encoded[i] for i in part]),
                  "reference": self.reference[:, part].flatten()} for part in parts]    # (2 P,)
        code = self.code(step)
        count = sum(rows["count"] for rows in code)
        return pairs + [{**rows, "count": 0, "pairs": share * rows["count"] / count}
                        for rows in code]


@torch.no_grad()
def answers_known(model, encoded, device_pairs):
    """What a model gives both answers of N pairs, and how many tokens they have: (2, N) each."""
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    known = np.zeros((2, 2, len(encoded)), np.float32)
    for start in range(0, len(order), device_pairs):
        part = order[start:start + device_pairs]
        batch = pair_batch([encoded[i] for i in part])
        found = log_probabilities(model, {name: batch[name].to(model.head.device)
                                          for name in ("input_ids", "targets")})
        known[:, :, part] = torch.stack(found).view(2, 2, -1).cpu().numpy()
    return known


def reference_log_probabilities(model, encoded, device_pairs, folder):
    """What the reference gives both answers of N pairs, (2, N): computed once, kept in a file that
    is named by the hash of its weights and of the pairs."""
    key = hashlib.sha256(json.dumps([weights_hash(model), encoded]).encode()).hexdigest()[:16]
    path = folder / f"reference-{key}.json"
    if RANK == 0 and not path.exists():
        write_json(path, answers_known(model, encoded, device_pairs)[0].tolist())
    barrier()
    return np.array(read_json(path), np.float32)


# ------------------------------------------------------------------------------------------------
# The stage


def draw_preferences(folder):
    """preferences.png: the loss of the pairs, which starts at ln 2, the rewards, the accuracy."""
    rows = read_metrics(folder)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].axhline(math.log(2), ls="--", color="C3", label="ln 2: nothing learned")
    axes[2].set_ylim(0, 1.03)
    for axis, title, unit, names in zip(
            axes, ("Loss of pairs", "Rewards", "Pairs told apart"),
            ("nats a pair", "nats an answer", "share of the pairs"),
            (["loss/preference"], ["rewards/chosen", "rewards/rejected"], ["rewards/accuracies"])):
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(folder / "preferences.png", dpi=110)


def train_round(args, number, device, build_only=False):
    """From a model and its own answers to out/dpo, or out/dpo_N before the last round."""
    folder = Path(args.out) / args.stage
    if (folder / "config.json").exists() and args.stage != "dpo":
        return say(f"{folder} is finished")
    say(f"round {number}, starting from {args.init}")
    model, tokenizer = load_base(args.init, device)
    args.size = args.size or size_of(model, device)
    fill_in(args, PRESETS.get(args.size, PUBLISHED))
    pairs_per_step(args)                            # an error before minutes of answers
    model.compute_dtype, _ = choose_dtype(device, args.dtype)
    pairs = prepare_pairs(model.eval(), tokenizer, args, number)
    if build_only:
        return
    encoded = [pair_ids(tokenizer, pair) for pair in pairs]
    fits = [pair for pair in encoded
            if len(pair[0]) + max(map(len, pair[1:])) <= args.seq_len + 1]
    say(f"{len(encoded) - len(fits):,} longer than {args.seq_len} tokens are left out")
    if len(fits) < 2:
        raise InputError(f"{len(fits)} pairs are left; give more, or a larger --seq-len")
    device_pairs = max(1, args.device_batch // 2)
    reference = reference_log_probabilities(model, fits, device_pairs,
                                            Path(args.out) / f"preferences_{number}")
    held = max(1, round(HELD_OUT_PAIRS * len(fits)))
    batches = PairBatches(fits[held:], reference[:, held:].copy(),
                          load_documents(args.out, "train"), tokenizer, args)
    heldout = load_documents(args.out, "validation")
    loss_fn = functools.partial(step_loss, beta=args.beta, kind=args.loss, nll=args.nll)

    def evaluate(model, step):
        sums, counts = answers_known(model, fits[:held], device_pairs)      # (2, P) each
        gains = sums - reference[:, :held]
        lost = -(gains / counts)[0].mean()
        if lost > COLLAPSED:
            raise InputError(f"step {step}: the chosen answers have lost {lost:.2f} nats per "
                             "token; lower --lr, or raise --beta or --nll")
        chosen, rejected = gains / counts if args.loss in MEANS else gains
        return {"bpb": bits_per_byte(model, tokenizer, heldout),
                "unseen pairs told apart": float((chosen > rejected).mean())}

    train(model.train(), tokenizer, batches, loss_fn, args, evaluate)
    if RANK == 0:
        draw_preferences(folder)


def print_gains(before, after):
    """What each measure with a value for each problem has gained, and its interval."""
    for name in before:
        if isinstance(before[name], list):
            gains = [b - a for a, b in zip(before[name], after[name])]
            low, high = bootstrap(gains)
            print(f"{name}: {sum(gains) / len(gains):+.1f} (95 % between {low:+.1f} and "
                  f"{high:+.1f})")


def parse_args():
    parser = argparse.ArgumentParser(description="Teach a Qwen2.5-Coder what to prefer.")
    training_flags(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="pairs of your "
                        "own: prompt, chosen, rejected (repeatable)")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server that says "
                        "which of two answers is better")
    parser.add_argument("--build", action="store_true", help="make the pairs alone")
    parser.add_argument("--rounds", type=int, default=1, help="how often to sample, grade and "
                        "train (default: %(default)s)")
    parser.add_argument("--loss", choices=["sigmoid", "length", "ipo", "chosen"],
                        default="sigmoid", help="length: sigmoid of means per token; chosen: "
                        "learn the chosen answers alone (default: %(default)s)")
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
        old = [*out.glob("dpo_[0-9]*"), *out.glob("preferences_[0-9]*"), work]
        for folder in old if args.fresh else []:
            shutil.rmtree(folder, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    args.fresh = args.fresh and build_only
    barrier()
    for number in range(1, rounds + 1):
        args.stage = "dpo" if number == rounds else f"dpo_{number}"
        train_round(argparse.Namespace(**vars(args)), number, device, build_only)
        args.init = str(out / args.stage)
    if RANK == 0 and not build_only:
        print_gains(*compare([first, args.init], args, args.device, samples=10))
    stop_processes()


if __name__ == "__main__":
    run(main)
