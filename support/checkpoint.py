"""The folder of an unfinished run: settings, log, and checkpoints from which it is resumed.

A checkpoint can be loaded by any number of processes; it is written as a whole or not at all.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import warnings
from collections import Counter, deque
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from tqdm import tqdm

from support.distributed import RANK, WORLD, barrier, memory, say, sum_over_ranks
from support.files import InputError, move_folder, read_json, write_json, write_text

# Expected with one process
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
# A damaged checkpoint: load_resume() reports it in one line of its own
logging.getLogger().addFilter(
    lambda record: "metadata is not found" not in record.getMessage())

KEPT = 2                    # checkpoints of an unfinished run
DIVERGED = 100              # times the usual gradient norm: the run has diverged
# Flags that may change when a run is resumed, as the weights do not depend on them
FREE_FLAGS = {"out", "fresh", "device_batch", "save_every", "eval_every", "device", "attention",
              "compile", "checkpoint_activations", "weak_sandbox"}


def starting_point(model, tokens, out=None):
    """A fingerprint of what a run starts from: the first numbers of each weight, the tokens of the
    vocabulary and, if out is given, the data in out/data."""
    key = hashlib.sha256(repr(tokens).encode())
    for _, weight in sorted(model.state_dict().items()):
        key.update(weight.flatten()[:64].cpu().float().numpy().tobytes())
    manifest = Path(out, "data", "manifest.json") if out else None
    if manifest and manifest.exists():
        key.update(manifest.read_bytes())
    return key.hexdigest()[:8]


def check_same_run(work, args, start):
    """Raise InputError if the folder work holds a run with other settings; the first call writes
    them to work/run.json. start: the run's starting_point()."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    settings["model and data"] = start
    path = work / "run.json"
    barrier()                               # with --fresh, the first process has emptied the folder
    before = read_json(path) if path.exists() else settings
    if not isinstance(before, dict):
        raise InputError(f"{path}: expected the settings of a run; --fresh starts again")
    for name in sorted(set(settings) | set(before)):
        if settings.get(name) != before.get(name):
            raise InputError(f"{work} holds a run with {name.replace('_', '-')} "
                             f"{before.get(name)}, this one has {settings.get(name)}; give the "
                             "same flags to resume it, another --out, or --fresh to start again")
    if RANK == 0:                           # the settings of the other processes are the same
        write_json(path, settings)


def stored_dtype(work):
    """The dtype that the unfinished run in work was started with, or None."""
    path = work / "run.json"
    settings = read_json(path) if path.exists() else {}
    dtype = settings.get("dtype") if isinstance(settings, dict) else None
    return dtype if dtype in ("float32", "bfloat16") else None


# ------------------------------------------------------------------------------------------------
# Checkpoints


def resume_steps(work):
    """The steps of the checkpoints in work, the newest first."""
    steps = [path.name.removeprefix("step_") for path in (work / "resume").glob("step_*")]
    return sorted((int(step) for step in steps if step.isdigit()), reverse=True)


def newest_resume(work):
    return max(resume_steps(work), default=0)


def training_state(model, optimizers):
    """What training changes: not the frozen weights, which --init has."""
    options = dcp_state.StateDictOptions(ignore_frozen_params=True)
    weights, states = dcp_state.get_state_dict(model, optimizers, options=options)
    return {"model": weights, "optimizers": states}


def save_resume(work, step, model, optimizers):
    """Write work/resume/step_N as a whole, then remove old ones. All processes take part."""
    target = work / "resume" / f"step_{step}"
    writing = target.with_name(f"{target.name}.writing")
    if RANK == 0:
        shutil.rmtree(writing, ignore_errors=True)      # of an interrupted attempt
    barrier()
    try:                                    # CheckpointException is not an Exception
        dcp.save(training_state(model, optimizers), checkpoint_id=writing, no_dist=WORLD == 1)
        if RANK == 0:
            move_folder(writing, target)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        shutil.rmtree(writing, ignore_errors=True)
        older = newest_resume(work)
        kept = f"Step {older} is" if older else "No earlier step is"
        reason = str(error).strip().split("\n")[-1]
        raise InputError(f"{target}: cannot be written, is the disk full? ({reason}) {kept} kept; "
                         "free some space and run the same command again") from None
    if RANK == 0:
        for older in resume_steps(work)[KEPT:]:
            shutil.rmtree(target.with_name(f"step_{older}"))


def load_resume(work, model, optimizers):
    """Load the newest checkpoint that is not damaged -> the number of steps done."""
    # The first process decides, so that all try the same. A killed run may leave one too many.
    steps = resume_steps(work)[:KEPT] if RANK == 0 else []
    steps = [int(step) for step in sum_over_ranks(*steps, *[0] * (KEPT - len(steps)))]
    for step in filter(None, steps):
        folder = work / "resume" / f"step_{step}"
        state = training_state(model, optimizers)
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=WORLD == 1)
        except (OSError, RuntimeError, EOFError, dcp.api.CheckpointException):
            say(f"{folder} is damaged; trying the one before it")
            continue
        all_trained = all(weight.requires_grad for weight in model.parameters())
        dcp_state.set_state_dict(model, optimizers, model_state_dict=state["model"],
                                 optim_state_dict=state["optimizers"],
                                 options=dcp_state.StateDictOptions(strict=all_trained))
        say(f"resuming after step {step} of {work}")
        return step
    if any(steps):
        raise InputError(f"{work}: all of its checkpoints are damaged; --fresh starts again")
    return 0


def trained_weights(model):
    """The weights that are trained, on the CPU; with several processes whole, in the first one."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True,
                                         ignore_frozen_params=True)
    return dcp_state.get_model_state_dict(model, options=options)


# ------------------------------------------------------------------------------------------------
# How a run ends early


@contextlib.contextmanager
def errors_in_one_line(args, work):
    """Turn out-of-memory, compiler and process errors into one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:        # torch.OutOfMemoryError is a RuntimeError
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            problem = f"out of memory; try {memory_advice(args)}"
        elif "No working C++ compiler" in reason:
            problem = f"--compile: {reason}; install one, or leave the flag out"
        elif isinstance(error, dist.DistError) or WORLD > 1 and "gloo" in reason:
            problem = f"another process has ended, its reason stands above or below ({reason})"
        else:
            raise
        raise InputError(f"{problem}. Step {newest_resume(work)} is kept in {work}") from None


def memory_advice(args):
    """Which flag to change, and to what, to need less memory."""
    sequences = min(args.device_batch, args.batch_tokens // args.seq_len // WORLD)
    smallest = 2 if "beta" in args else 1               # a preference pair is two sequences
    if sequences > smallest:
        return f"--device-batch {sequences // 2}, the step stays the same"
    if not args.checkpoint_activations:
        return "--checkpoint-activations, a third more time"
    return f"--seq-len {args.seq_len // 2}, more processes (torchrun) or a smaller --size"


@contextlib.contextmanager
def catch_signals():
    """Yield a list to which Ctrl-C and SIGTERM append their number instead of ending the run."""
    signals = []
    caught = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda n, _: signals.append(n)) for number in caught]
    try:
        yield signals
    finally:
        for number, handler in zip(caught, handlers):
            signal.signal(number, handler)


def save_and_exit(work, step, saved_step, model, optimizers, signals):
    """Save, print how to resume, and exit with the shell's exit code for the signal."""
    if step > saved_step:
        save_resume(work, step, model, optimizers)
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = ["torchrun", "--nproc-per-node", str(per_machine)] if WORLD > 1 else ["python"]
    if WORLD > per_machine:
        words += ["--nnodes", str(WORLD // per_machine), "..."]
    words += [word for word in sys.argv if word != "--fresh"]
    say(f"stopped after step {step}; to resume: {shlex.join(words)}")
    # the list is empty if another process received the signal
    sys.exit(128 + (signals[0] if signals else signal.SIGTERM))


# ------------------------------------------------------------------------------------------------
# The log


def read_metrics(folder, last_step=math.inf):
    """The rows of metrics.jsonl up to a step; lines cut off by a crash are left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["step"] <= last_step:
                metrics.append(row)
    return metrics


def log_line(row, steps, seconds_left):
    """A row of metrics.jsonl as a line of at most 120 characters."""
    bits = [f"{name.removeprefix('bpb ')} {value:.3f}" for name, value in row.items()
            if name.startswith("bpb")]
    columns = [f"step {row['step']:>{len(str(steps))}}/{steps}", f"loss {row['loss']:.3f}",
               *([" ".join(bits)] if bits else []), f"lr {row['lr']:.1e}",
               f"norm {row['grad_norm']:.2g}", f"{row['tokens_per_second'] / 1e3:,.1f}k tok/s",
               f"MFU {row['mfu']:.0%}", f"{row['memory_gb']:.3g} GB",
               f"{seconds_left / 60:.1f} min left"]
    line = "  ".join(columns)
    for wide, narrow in ("  ", " "), (" tok/s", "/s"), (" min left", " min"):
        line = line if len(line) <= 120 else line.replace(wide, narrow)
    return line[:120]


class Log:
    """Writes metrics.jsonl and prints progress, some 50 rows per run.

    record() keeps the results of a step, whose tensors may still be computing; flush() reads them.
    """

    def __init__(self, work, args, first_step, flops_per_token, peak_flops):
        self.work, self.args = work, args
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.every = max(1, args.steps // 50)
        self.recorded = None
        self.norms = deque(maxlen=100)      # of the last steps, to tell when one is extreme
        self.since = Counter()              # steps, tokens and seconds since the last row
        if RANK == 0:
            rows = read_metrics(work, last_step=first_step)
            write_text(work / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=RANK > 0 or None)

    def record(self, step, lr, count, sums, norm, *, tokens, seconds, waited):
        """Keep the results of a step until flush(). tokens: of this process; seconds: the step
        took, of which it waited some for its batches."""
        self.recorded = step, lr, count, sums, norm
        self.since.update(steps=1, tokens=tokens, seconds=seconds, waited=waited)

    def flush(self, measured=None):
        """Read the recorded step, if there is one. Write a row every so often, and whenever
        something was measured. InputError: the run has diverged."""
        if self.recorded is None:
            return
        step, lr, count, sums, norm = self.recorded
        self.recorded = None
        totals = sum_over_ranks(*map(float, sums.values()))
        means = {name: total / count for name, total in zip(sums, totals)}
        loss = means.pop("loss")
        norm = float(norm)
        self.check_divergence(step, loss, norm)
        self.bar.update()
        if not measured and step % self.every and step < self.args.steps:
            return
        since, self.since = self.since, Counter()
        speed = WORLD * since["tokens"] / since["seconds"]
        row = {"step": step, "loss": loss, **means, "lr": lr, "grad_norm": norm,
               "tokens_per_second": speed, "mfu": speed * self.flops_per_token / self.peak_flops,
               "data_share": since["waited"] / since["seconds"], "memory_gb": memory(),
               **(measured or {})}
        if RANK == 0:
            with open(self.work / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            seconds_left = (self.args.steps - step) * since["seconds"] / since["steps"]
            tqdm.write(log_line(row, self.args.steps, seconds_left))
            sys.stdout.flush()

    def check_divergence(self, step, loss, norm):
        usual = statistics.median(self.norms) if len(self.norms) > 20 else math.inf
        if math.isfinite(loss + norm) and norm <= DIVERGED * usual:
            self.norms.append(norm)
            return
        comparison = f" where {usual:.2g} was usual" if math.isfinite(usual) else ""
        raise InputError(f"step {step}: the loss is {loss:.3g}, the gradient norm {norm:.3g}"
                         f"{comparison}; step {newest_resume(self.work)} is kept in {self.work}. "
                         "Lower --lr, and use --fresh")
