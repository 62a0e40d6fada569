"""Pretraining: random weights to a model that completes and infills code.

Builds out/data and out/tokenizer if they are missing, trains with next-token prediction and
fill-in-the-middle in two phases, measures bits per byte on held-out code, and leaves a Hugging Face
folder of each: single files in out/pretrain (report, section 3.2.1), whole repositories in longer
rows in out/repository (3.2.2). The training loop of every stage is here, once: train(). Stages
differ in where batches come from and which loss is taken. What a row is stands in data.py, the
model in model.py.

    python pretrain.py                            # size tiny: 6 to 25 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 pretrain.py       # size small on the GPUs of one machine
    python pretrain.py --source ~/my/code --out mine
    python pretrain.py --size mini                # an hour on 2 CPU cores
    python pretrain.py --plan 64 --device cuda    # what the published sizes would need; a second

The same command again goes on where it was stopped; --fresh starts anew.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from matplotlib.figure import Figure
from tqdm import tqdm

from data import (DEFAULT_SOURCES, MIXTURE, Batches, documents, load_documents, parse_mixture,
                  prepare_data, prepare_tokenizer, print_corpus, source_flag)
from evaluate import bits_by_position, bits_per_byte, compressed_bits_per_byte
from fim import FIM_RATE, gap, infill, load
from kernels import CHUNK_LOGITS, CHUNK_ROWS
from model import (CONFIGS, CausalLM, Config, check_device, check_vocabulary, choose_attention,
                   default_device, generate, init_weights, load_model, loss_head, parameter_count,
                   save_model)
from support.files import (InputError, hub_folder, move_folder, read_json, run, write_json,
                           write_text)
from tokenizer import ENDOFTEXT, Tokenizer

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")     # is read
logging.getLogger().addFilter(          # of a damaged checkpoint: load_resume() says it in a line
    lambda record: "metadata is not found" not in record.getMessage())

# What --size sets unless a flag says otherwise, for each phase. batch_tokens: per step, over all
# devices; rope_theta: as in figure 2 of the report, below 0.5B ours
PRESETS = {"file": {
    "tiny": dict(seq_len=256, batch_tokens=4096, device_batch=16, steps=750, lr=4e-3,
                 rope_theta=1e4),
    "mini": dict(seq_len=256, batch_tokens=8192, device_batch=16, steps=1500, lr=3e-3,
                 rope_theta=1e4),
    "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=2000, lr=2e-3,
                  rope_theta=1e4)},
    "repository": {
    "tiny": dict(seq_len=1024, batch_tokens=4096, device_batch=4, steps=550, lr=4e-3,
                 rope_theta=1e5),
    "mini": dict(seq_len=1024, batch_tokens=8192, device_batch=4, steps=1500, lr=3e-3,
                 rope_theta=1e5),
    "small": dict(seq_len=4096, batch_tokens=65536, device_batch=4, steps=1500, lr=2e-3,
                  rope_theta=1e5)}}
# batch_tokens and lr: not published; values of Qwen (arXiv 2309.16609). steps: 5.2T and 0.3T tokens
PUBLISHED = {
    "file": dict(seq_len=8192, batch_tokens=2 ** 22, device_batch=1, steps=1_240_000, lr=3e-4,
                 rope_theta=1e4),
    "repository": dict(seq_len=32768, batch_tokens=2 ** 22, device_batch=1, steps=71_500, lr=3e-4,
                       rope_theta=1e6)}
STAGES = {"file": "pretrain", "repository": "repository"}      # the folder of a phase
# Not published; betas: values of Qwen, as above; the others: of Qwen2.5's SFT (arXiv 2412.15115)
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.7750, 2.0315)      # of Muon's author
EMBEDDING_LR = 2            # times the learning rate, for the table and head; ours, by measurement
DIVERGED = 100              # times the usual norm of the gradient: the run is lost
# Shares of the steps in which the learning rate rises and falls; not published; ours, measured
WARMUP, DECAY = 0.02, 0.6
WATCHED = ("def read_numbers(path):\n    with open(path) as file:\n        ",
           "\n    return numbers\n")       # a gap that is filled whenever the model is measured
WATCHED_TOKENS = 24
POSITION_PARTS = 8          # of a row, in the picture of losses by position
GENERAL = 30_000            # characters of the standard library on which forgetting is measured
KEPT = 2                    # checkpoints of an unfinished run

# ------------------------------------------------------------------------------------------------
# Machine: processes, device, precision

RANK = int(os.environ.get("RANK", 0))               # this process among WORLD; torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))   # this process on its machine


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def start_processes(device):
    """Join the other processes that torchrun started -> this one's device."""
    if sys.platform == "linux":     # keep freed memory: getting it anew costs 7 % of a CPU's time
        for option in (-1, -3):     # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(option, 2 ** 31 - 1)
    if device == "mps" and WORLD > 1:
        raise InputError("several processes cannot share --device mps; use --device cpu")
    device = f"cuda:{LOCAL_RANK}" if device == "cuda" else device
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if WORLD > 1:                                   # the first may prepare data for a long time
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=6))
    return device


def stop_processes():
    if WORLD > 1:
        dist.destroy_process_group()


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 numbers itself: else bf16 would be slower than fp32."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))


def choose_dtype(device, wanted):
    """The dtype of activations -> (dtype, reason). Weights and optimizer stay in fp32."""
    if wanted != "auto":
        return getattr(torch, wanted), "--dtype"
    if device.startswith("cuda") and torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "this GPU computes in it"
    if device == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "this CPU computes in it"
    return torch.float32, ("this CPU has no bf16 instructions; with them it would be two to three "
                           "times as fast" if device == "cpu" else "no bf16 instructions here")


def matmul_rate(device, dtype):
    """Best measured FLOP/s of a large matrix product: the 100 % of the share in the log."""
    size = 8192 if device.startswith("cuda") else 1024
    a, best = torch.randn(size, size, device=device, dtype=dtype), math.inf
    for _ in range(20):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def flops_per_token(config, parameters, T):
    """6 for each weight that multiplies, and the causal attention: forward and backward."""
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (parameters - table) + 6 * config.num_hidden_layers * T * config.hidden_size


def memory():
    """Peak memory in GB: the device's where it counts its own, else this process'."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def sum_over_ranks(*numbers):
    """Sum each number over all processes; the numbers themselves with one process."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)      # by the CPUs: no GPU is waited for
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for all processes; InputError if one has ended."""
    try:
        sum_over_ranks(0)
    except RuntimeError:
        raise InputError("another process has ended, its reason stands above or below") from None


# ------------------------------------------------------------------------------------------------
# Optimizers


def orthogonal(matrix, dtype):
    """The matrix with every singular value near 1: five steps of Newton and Schulz, in a dtype.

    First the whole is divided by its norm (at least 1e-7); then each step takes a singular value s
    to as + bs^3 + cs^5 (NEWTON_SCHULZ), whose slope at 0 is as steep as can be.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix if matrix.size(0) <= matrix.size(1) else matrix.T).to(dtype)    # rows <= columns
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T                                                        # (rows, rows)
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if matrix.size(0) <= matrix.size(1) else x.T


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (https://kellerjordan.github.io/posts/muon), an update as large as
    AdamW's (arXiv 2502.16982). torch.optim.Muon is the same in bf16 alone, which took three
    quarters of a training step on a CPU without such instructions."""

    def __init__(self, parameters, dtype, weight_decay):
        super().__init__(parameters, dict(lr=0.0, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(state["momentum"], MOMENTUM), self.dtype)
                parameter.mul_(1 - lr * decay)
                parameter.add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def make_optimizers(model, kind):
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest.

    No decay on norms and biases. One learning rate serves both, times EMBEDDING_LR for the table
    beside Muon, which computes in the dtype of the activations.
    """
    inner, outer, vectors = [], [], []
    for name, parameter in model.named_parameters():
        group = vectors if parameter.dim() < 2 else inner if ".layers." in name else outer
        group.append(parameter)
    groups = [dict(params=outer, scale=EMBEDDING_LR) if kind == "muon" else
              dict(params=inner + outer), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)
    dtype = model.compute_dtype or torch.float32
    return [Muon(inner, dtype, WEIGHT_DECAY), adamw] if kind == "muon" else [adamw]


def learning_rate(step, steps, peak, warmup=WARMUP, decay=DECAY):
    """Warm-up, stable, linear decay to zero over the last part of the run."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return peak * min(1, rise, fall)


# ------------------------------------------------------------------------------------------------
# Resuming

# flags that may change between two calls of one run: it still learns the same
FREE_FLAGS = {"out", "fresh", "device_batch", "save_every", "eval_every", "device", "attention",
              "compile", "checkpoint_activations", "weak_sandbox"}


def starting_point(model, tokenizer, out):
    """What a run starts from, in a word: the beginning of each weight, the tokens, the data."""
    key = hashlib.sha256(repr(tokenizer.tokens).encode())
    for _, weight in sorted(model.state_dict().items()):
        key.update(weight.flatten()[:64].cpu().float().numpy().tobytes())
    if (made := Path(out) / "data" / "manifest.json").exists():
        key.update(made.read_bytes())
    return key.hexdigest()[:8]


def check_same_run(work, args, start):
    """Refuse to go on with another run's folder; the settings are written at the first call.
    start: the run's starting_point()."""
    settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    settings["model and data"] = start
    path = work / "run.json"
    barrier()                                           # the first process has cleared the folder
    before = read_json(path) if path.exists() else settings
    if not isinstance(before, dict):
        raise InputError(f"{path}: holds no settings of a run; --fresh starts anew")
    for name in sorted(set(settings) | set(before)):
        if settings.get(name) != before.get(name):
            raise InputError(f"{work} holds a run with {name.replace('_', '-')} "
                             f"{before.get(name)}, this one has {settings.get(name)}; give the "
                             "same flags to go on, another --out, or --fresh to start anew")
    if RANK == 0:                                       # the others' settings are the same
        write_json(path, settings)


def resume_steps(work):
    """The steps of the checkpoints under work, the newest first."""
    steps = [path.name.removeprefix("step_") for path in (work / "resume").glob("step_*")]
    return sorted((int(step) for step in steps if step.isdigit()), reverse=True)


def newest_resume(work):
    return max(resume_steps(work), default=0)


def training_state(model, optimizers):
    weights, states = dcp_state.get_state_dict(model, optimizers)
    return {"model": weights, "optimizers": states}


def save_resume(work, step, model, optimizers):
    """Write work/resume/step_N whole, then remove all but KEPT. Every process takes part."""
    target = work / "resume" / f"step_{step}"
    writing = target.with_name(f"{target.name}.writing")
    if RANK == 0:
        shutil.rmtree(writing, ignore_errors=True)      # of a try that was cut off
    barrier()
    try:                                                # CheckpointException is no Exception
        dcp.save(training_state(model, optimizers), checkpoint_id=writing, no_dist=WORLD == 1)
        if RANK == 0:
            move_folder(writing, target)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        shutil.rmtree(writing, ignore_errors=True)
        older, reason = newest_resume(work), str(error).strip().split("\n")[-1]
        raise InputError(f"{target}: cannot be written, is the disk full? ({reason}) "
                         f"{f'Step {older} is' if older else 'No earlier step is'} kept; "
                         "free some space and run the same command again") from None
    if RANK == 0:
        for older in resume_steps(work)[KEPT:]:
            shutil.rmtree(target.with_name(f"step_{older}"))


def load_resume(work, model, optimizers):
    """Continue from the newest checkpoint that is whole -> the number of steps done."""
    steps = resume_steps(work)[:KEPT] if RANK == 0 else []     # one more after a kill
    steps = [int(step) for step in sum_over_ranks(*steps, *[0] * (KEPT - len(steps)))]
    for step in filter(None, steps):                    # the same for all processes
        folder, state = work / "resume" / f"step_{step}", training_state(model, optimizers)
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=WORLD == 1)
        except (OSError, RuntimeError, EOFError, dcp.api.CheckpointException):
            say(f"{folder}: damaged, the one before it is tried")
            continue
        dcp_state.set_state_dict(model, optimizers, model_state_dict=state["model"],
                                 optim_state_dict=state["optimizers"])
        say(f"going on after step {step} of {work}")
        return step
    if any(steps):
        raise InputError(f"{work}: none of its checkpoints is whole; --fresh starts anew")
    return 0


# ------------------------------------------------------------------------------------------------
# Log and picture


def read_metrics(folder, before=math.inf):
    """The lines of metrics.jsonl up to a step; a torn last line is left out."""
    metrics, path = [], folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):      # torn, or not ours
            if (row := json.loads(line))["step"] <= before:
                metrics.append(row)
    return metrics


def log_line(row, steps, seconds):
    """One logged step as text, under 120 columns. seconds: those that are left."""
    bpb = " ".join(f"{name.removeprefix('bpb ')} {value:.3f}"
                   for name, value in row.items() if name[:3] == "bpb")
    bpb = f"  {bpb}" if bpb else ""
    line = (f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:.3f}{bpb}  "
            f"lr {row['lr']:.1e}  norm {row['grad_norm']:.2g}  "
            f"{row['tokens_per_second'] / 1e3:,.1f}k tok/s  MFU {row['mfu']:.0%}  "
            f"{row['memory_gb']:.3g} GB  {seconds / 60:.1f} min left")
    for wide, narrow in ("  ", " "), (" tok/s", "/s"), (" min left", " min"):
        line = line if len(line) <= 120 else line.replace(wide, narrow)
    return line[:120]


def draw(folder, before=0, earlier=()):
    """loss.png: training loss, and held-out bits per byte beside the compressors'. earlier: the
    rows of the phase before, which had so many steps."""
    metrics = [*earlier, *({**row, "step": row["step"] + before} for row in read_metrics(folder))]
    measured = [row for row in metrics if "bpb" in row]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    steps, losses = ([row[name] for row in metrics] for name in ("step", "loss"))
    near = len(metrics) // 20
    means = [statistics.fmean(losses[max(0, i - near):i + near + 1]) for i in range(len(losses))]
    axes[0].plot(steps, losses, color="C0", alpha=0.3, label="a step")
    axes[0].plot(steps, means, color="C0", label="mean of those around it")
    axes[0].set(title="Training", xlabel="step", ylabel="loss (nats per token)")
    if measured:
        axes[1].plot([row["step"] for row in measured], [row["bpb"] for row in measured], "o-",
                     color="C0", label="model")
        for name, colour in (("gzip", "C3"), ("bz2", "C1"), ("xz", "C2")):
            if name in measured[-1]:
                axes[1].axhline(measured[-1][name], ls="--", color=colour,
                                label=f"{name} {measured[-1][name]:.2f}")
        axes[1].set(title="Held-out code", xlabel="step", ylabel="bits per byte")
    for axis in axes:
        if before:
            axis.axvline(before, color="0.5", ls=":", label="repository phase begins")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)


# ------------------------------------------------------------------------------------------------
# The training loop


def shard(model, dtype, device):
    """Spread weights, gradients and optimizer state over the processes (FSDP2), block by block,
    each moved to its device only then. A block's weights, the norms' too, are gathered in dtype."""
    if WORLD > 1:
        mesh = dist.init_device_mesh(device, (WORLD,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)


def pinned(batches, device, step):
    """The batches of a step, for a GPU in memory from which it copies by itself."""
    return [{name: value.pin_memory() if device != "cpu" and torch.is_tensor(value) else value
             for name, value in batch.items()} for batch in batches(step)]


def one_step(model, optimizers, batch_list, loss_fn, count, lr):
    """Forward, backward and update over the batches of a step -> (sums, gradient norm).

    The loss is averaged over the targets of the whole step, wherever they are; FSDP averages
    gradients over processes, hence the factor. count: those targets; lr: of each group, times its
    `scale`; gradients are clipped to CLIP. sums: of the loss and of each of its metrics. All
    results are tensors on the device: reading them would make the CPU wait, so that happens a
    step later.
    """
    sums, device = {}, model.head.device
    for batch in batch_list:
        batch = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        loss, metrics = loss_fn(model, batch)
        (loss * (WORLD / count)).backward()
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1)
        optimizer.step()
        optimizer.zero_grad()
    return sums, norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def out_of_memory(args):
    """In one line, which flag to lower and to what."""
    rows = min(args.device_batch, args.batch_tokens // args.seq_len // WORLD)
    if rows > 1 + ("beta" in args):                 # of DPO's pairs one has two rows
        flag = f"--device-batch {rows // 2}, the step stays the same"
    elif not args.checkpoint_activations:
        flag = "--checkpoint-activations, a third more time"
    else:
        flag = f"--seq-len {args.seq_len // 2}, more processes (torchrun) or a smaller --size"
    return f"out of memory; try {flag}"


@contextlib.contextmanager
def one_line(args, work):
    """Turn what ends a run from outside of the code into one line that says how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:        # torch.OutOfMemoryError is a RuntimeError
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            problem = out_of_memory(args)
        elif "No working C++ compiler" in reason:
            problem = f"--compile: {reason}; install one, or leave the flag out"
        elif isinstance(error, dist.DistError) or WORLD > 1 and "gloo" in reason:
            problem = f"another process has ended, its reason stands above or below ({reason})"
        else:
            raise
        raise InputError(f"{problem}. Step {newest_resume(work)} is kept in {work}") from None


@contextlib.contextmanager
def catch_stops():
    """Yield a list that Ctrl-C and SIGTERM add their numbers to, instead of ending the process."""
    stops, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: stops.append(n)) for number in numbers]
    try:
        yield stops
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


class Log:
    """metrics.jsonl and the terminal: a row every so many steps, a bar where someone watches."""

    def __init__(self, work, args, first, flops, peak):
        self.work, self.args, self.flops, self.peak = work, args, flops, peak
        self.every, self.waiting = max(1, args.steps // 50), None
        self.norms, self.since = deque(maxlen=100), Counter()   # since: the last row
        if RANK == 0:
            rows = read_metrics(work, before=first)
            write_text(work / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.bar = tqdm(total=args.steps, initial=first, unit="step", disable=RANK > 0 or None)

    def note(self, step, lr, count, sums, norm, tokens, seconds, waited):
        """Keep what a step gave, sums and norm still on the device, until it is read. tokens: of
        the step on this process; seconds: of the step, of which it waited some for its batch."""
        self.waiting = step, lr, count, sums, norm
        self.since.update(steps=1, tokens=tokens, seconds=seconds, waited=waited)

    def read(self, measured=None):
        """Read what was noted; write its row every so often, and whenever there are measures."""
        if not self.waiting:
            return
        (step, lr, count, sums, norm), self.waiting = self.waiting, None
        totals = sum_over_ranks(*map(float, sums.values()))
        means, norm = {name: x / count for name, x in zip(sums, totals)}, float(norm)
        loss = means.pop("loss")
        usual = statistics.median(self.norms) if len(self.norms) > 20 else math.inf
        if not math.isfinite(loss + norm) or norm > DIVERGED * usual:
            raise InputError(
                f"step {step}: the loss is {loss:.3g}, the gradient's norm {norm:.3g}"
                + (f" where {usual:.2g} was usual" if math.isfinite(usual) else "")
                + f"; step {newest_resume(self.work)} is kept in {self.work}. Lower --lr, use "
                "--fresh")
        self.norms.append(norm)
        self.bar.update()
        if not measured and step % self.every and step < self.args.steps:
            return
        since, self.since = self.since, Counter()
        speed = WORLD * since["tokens"] / since["seconds"]
        row = {"step": step, "loss": loss, **means, "lr": lr, "grad_norm": norm,
               "tokens_per_second": speed, "mfu": speed * self.flops / self.peak, "data_share":
               since["waited"] / since["seconds"], "memory_gb": memory(), **(measured or {})}
        if RANK == 0:
            with open(self.work / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            left = (self.args.steps - step) * since["seconds"] / since["steps"]
            tqdm.write(log_line(row, self.args.steps, left))
            sys.stdout.flush()


def start(model, tokenizer, args, work):
    """What precedes the loop: choose precision and kernels, check the folder, shard, resume."""
    device, parameters = args.device, parameter_count(model)
    model.compute_dtype, why = choose_dtype(device, args.dtype)
    model.model.checkpointing = args.checkpoint_activations
    key = starting_point(model, tokenizer, args.out)
    shard(model, model.compute_dtype, device)
    attention = choose_attention(model, args.attention, args.seq_len)
    if RANK == 0:
        if args.fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    check_same_run(work, args, key)
    peak = WORLD * matmul_rate(device, model.compute_dtype)
    flops = flops_per_token(model.config, parameters, args.seq_len)
    say(f"{parameters:,} parameters on {WORLD} x {device}, {peak / 1e9:,.0f} GFLOP/s in products\n"
        f"activations in {str(model.compute_dtype)[6:]} ({why}), loss head by {loss_head(model)}\n"
        + attention)
    if args.compile:
        for block in model.model.layers:
            block.compile()
    optimizers = make_optimizers(model, args.optimizer)
    first = load_resume(work, model, optimizers)
    return optimizers, first, Log(work, args, first, flops, peak)


def stop_here(work, step, saved, model, optimizers, stops):
    """Save unless it is saved, say how to go on, and exit with the shell's code for the signal."""
    if step > saved:
        save_resume(work, step, model, optimizers)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = ["torchrun", "--nproc-per-node", str(here)] if WORLD > 1 else ["python"]
    words += ["--nnodes", str(WORLD // here), "..."] if WORLD > here else []
    words += [word for word in sys.argv if word != "--fresh"]
    say(f"stopped after step {step}; to go on: {shlex.join(words)}")
    sys.exit(128 + (stops or [signal.SIGTERM])[0])      # empty where another process was told


def finish(model, tokenizer, args, work, folder):
    """Turn the unfinished folder into a checkpoint folder."""
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=whole) if WORLD > 1 else None
    if RANK == 0:
        save_model(model, work, state)
        tokenizer.save(work)
        earlier = read_metrics(folder.with_name(STAGES["file"])) if args.before else ()
        draw(work, args.before, earlier)
        if args.after:              # what there is of the next phase came from an earlier model
            other = folder.with_name(f"{STAGES['repository']}.unfinished")
            shutil.rmtree(other, ignore_errors=True)
            other.mkdir()
        move_folder(work, folder)
        shutil.rmtree(folder / "resume", ignore_errors=True)
    barrier()


def train(model, tokenizer, batches, loss_fn, args, evaluate=None, before=False):
    """Train model and leave a checkpoint folder in out/<args.stage>.

    batches(step) -> list of dicts of tensors with a `count` of targets; loss_fn(model, batch) ->
    (loss sum, metrics); evaluate(model, step) -> dict for the log, also of step 0 if before. An
    unfinished run is resumed exactly. Ctrl-C and SIGTERM save and say how to go on.
    """
    folder = Path(args.out) / args.stage
    work = folder.with_name(f"{args.stage}.unfinished")
    optimizers, first, log = start(model, tokenizer, args, work)
    saved = first
    prepare = functools.partial(pinned, batches, args.device)
    with (one_line(args, work), catch_stops() as stops, ThreadPoolExecutor(1) as background,
          log.bar):
        if before and not first:
            with torch.compiler.set_stance("force_eager"):
                bits = evaluate(model, 0)
            say("before: " + ", ".join(f"{name} {value:.3f}" for name, value in bits.items()))
        ahead = background.submit(prepare, first)
        for step in range(first, args.steps):
            begin, done = time.perf_counter(), step + 1
            batch_list = ahead.result()
            waited, ahead = time.perf_counter() - begin, background.submit(prepare, done)
            count, stop = sum_over_ranks(sum(batch["count"] for batch in batch_list), len(stops))
            if stop:
                log.read()
                stop_here(work, step, saved, model, optimizers, stops)
            lr = learning_rate(args.before + step, args.before + args.steps + args.after, args.lr)
            sums, norm = one_step(model, optimizers, batch_list, loss_fn, count, lr)
            log.read()                              # of the step before, while this one computes
            log.note(done, lr, count, sums, norm, sum(b["input_ids"].numel() for b in batch_list),
                     time.perf_counter() - begin, waited)
            if evaluate and (done % args.eval_every == 0 or done == args.steps):
                with torch.compiler.set_stance("force_eager"):      # of shapes that do not return
                    log.read(evaluate(model, done))
            if done % args.save_every == 0 and done < args.steps:
                log.read()                          # or what is not finite would be saved
                save_resume(work, done, model, optimizers)
                saved = done
        log.read()
        finish(model, tokenizer, args, work, folder)
    for number in stops:                                # what came during the last step
        signal.raise_signal(number)


def download(name, weights=True):
    """Fetch a checkpoint from the hub, once on each machine that does not see the first one's."""
    for turn in (RANK == 0, LOCAL_RANK == 0):
        if turn:
            hub_folder(name, weights)
        barrier()


def load_base(name, device):
    """The checkpoint that a stage goes on from, in fp32, and its tokenizer."""
    download(name)
    return load(name, device, torch.float32)


def size_of(model, device):
    """Whose presets suit a model: the size with its shape, else the usual one of the device."""
    shape = "hidden_size", "num_hidden_layers", "intermediate_size"
    return next((size for size, config in CONFIGS.items()
                 if all(getattr(config, name) == getattr(model.config, name) for name in shape)),
                default_size(device))


def default_size(device):
    return "small" if device.startswith("cuda") else "tiny"


def training_flags(parser):
    """The flags of every stage that trains. None: set by --size."""
    # where from, where to
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--size", choices=CONFIGS, help="shape, vocabulary, rows, batch and steps "
                        "(default: tiny on CPU and MPS, small on CUDA; in sft.py and dpo.py that "
                        "of the model)")
    parser.add_argument("--init", metavar="FOLDER", help="checkpoint folder or hub name to start "
                        "from, with its tokenizer (default: what the stage before has left)")
    parser.add_argument("--fresh", action="store_true", help="start anew, with data made anew")
    # how much (default: by --size)
    parser.add_argument("--steps", type=int, help="optimizer updates")
    parser.add_argument("--batch-tokens", type=int, help="tokens per step, all devices")
    parser.add_argument("--device-batch", type=int, help="rows in a forward pass")
    parser.add_argument("--seq-len", type=int, help="tokens per row")
    # how
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon",
                        help="muon: blocks' matrices, adamw the rest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], default=default_device(),
                        help="default: %(default)s")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="of activations (default: bfloat16 where the device computes in it)")
    parser.add_argument("--attention", choices=["auto", "triton", "sdpa"], default="auto",
                        help="what computes it (default: auto, what is fastest here)")
    parser.add_argument("--compile", action="store_true",
                        help="let torch.compile fuse each block; needs a C++ compiler on a CPU")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="keep only the blocks' inputs, compute the rest again: less memory")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (a tenth)")
    parser.add_argument("--eval-every", type=int, help="steps between measurements (a fifth)")


def check_flags(args):
    """InputError if a number that was given is too small."""
    least = dict.fromkeys(
        ("steps", "batch_tokens", "device_batch", "seq_len", "save_every", "eval_every"), 1)
    for name, low in {**least, "seed": 0, "lr": 0.0}.items():
        if (value := getattr(args, name)) is not None and not value >= low:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {low}")


def fill_in(args, preset):
    """The flags of a stage, checked: what was not given is set by the preset of --size."""
    check_flags(args)
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name, share in (("save_every", 10), ("eval_every", 5)):
        if getattr(args, name) is None:
            setattr(args, name, max(1, args.steps // share))
    if args.batch_tokens % args.seq_len:
        raise InputError(f"--batch-tokens: must be a multiple of {args.seq_len}, the tokens of a "
                         "row")
    return args


def settings(args, phase, both=False):
    """The flags of one phase of pretraining.

    both: the two phases run in one call. Then what was given is meant for the file phase and the
    other one's stands to it as in the presets. before, after: the steps of the other phase, since
    the learning rate rises and falls once over both.
    """
    args = argparse.Namespace(**vars(args), phase=phase, stage=STAGES[phase], before=0, after=0)
    args.size = args.size or default_size(args.device)
    presets = {name: PRESETS[name].get(args.size, PUBLISHED[name]) for name in PRESETS}
    for name, value in presets[phase].items() if both and phase != "file" else ():
        if (given := getattr(args, name, None)) is not None:
            given *= value / presets["file"][name]
            setattr(args, name, given if name == "lr" else max(1, round(given)))
    return fill_in(args, presets[phase])


# ------------------------------------------------------------------------------------------------
# What a run would need

PLANNED_GPU = "H100", 80, 989e12, 2.5       # name, GB, bf16 FLOP/s by its data sheet, $ an hour
PLANNED_MFU, PLANNED_TOKENS, PLANNED_DAYS = 0.4, 5.5e12, 30


def memory_plan(config, args, devices, bf16, program=0.0):
    """GB on each of so many devices, by part, counted from the shapes; program: what is there
    before a model is. Activations are what autograd keeps; a is bytes of one."""
    with torch.device("meta"):
        model = CausalLM(config)
    weights = dict(model.named_parameters())
    P = sum(p.numel() for p in weights.values())
    blocks = sum(p.numel() for name, p in weights.items() if ".layers." in name and p.dim() > 1)
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    L, a = config.num_hidden_layers, 2 if bf16 else 4
    kept = blocks if args.optimizer == "muon" else 2 * blocks       # moments of the optimizer
    B, T = args.device_batch, args.seq_len
    keys = 2 * config.num_key_value_heads * config.head_dim
    block = 8 * D + a * (2 * D + 2 * D + keys + 4 * F)      # norms in fp32; inputs of the products
    triton = args.device == "cuda"
    scores = 0 if triton else a * config.num_attention_heads * T / 2    # a CPU keeps them
    layers = a * D * L + block + scores if args.checkpoint_activations else (block + scores) * L
    copies = a * (2 * blocks / L + P - blocks) if devices > 1 else a * P if bf16 else 0
    rows = CHUNK_ROWS if triton else max(1, CHUNK_LOGITS // V)
    return {"program": program, "weights": 4 * P / devices / 1e9,
            "gradients": 4 * P / devices / 1e9,
            "optimizer": 4 * (kept + 2 * (P - blocks)) / devices / 1e9,
            "copies": copies / 1e9, "activations": B * T * layers / 1e9,
            "head": (2 * 4 * V * D + (a + 4) * rows * V) / 1e9}


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))


def print_plan(args, phase, devices):
    """A table for the published sizes, or for --size alone: memory by part, then time and cost."""
    if devices < 1:
        raise InputError("--plan: must be at least 1")
    name, room, peak, price = PLANNED_GPU
    on_gpu = args.device == "cuda"
    bf16 = args.dtype == "bfloat16" or args.dtype == "auto" and (on_gpu or cpu_has_bf16())
    memories, times = [], []
    for size in [args.size] if args.size else list(CONFIGS)[len(PRESETS["file"]):]:
        one = settings(argparse.Namespace(**{**vars(args), "size": size}), phase)
        parts = memory_plan(CONFIGS[size], one, devices, bf16, 0.0 if on_gpu else memory())
        least = argparse.Namespace(**{**vars(one), "checkpoint_activations": True})
        least = sum(memory_plan(CONFIGS[size], least, devices, bf16, parts["program"]).values())
        everything = sum(parts.values())
        memories.append([size, *(f"{gb:.1f}" for gb in [*parts.values(), everything, least])])
        with torch.device("meta"):
            parameters = parameter_count(CausalLM(CONFIGS[size]))
        flops = flops_per_token(CONFIGS[size], parameters, one.seq_len)
        speed = peak * PLANNED_MFU / flops
        days = PLANNED_TOKENS / (speed * devices) / 86400
        times.append([size, f"{flops / 1e9:.1f}", f"{speed:,.0f}",
                      f"{PLANNED_TOKENS / PLANNED_DAYS / 86400 / devices:,.0f}", f"{days:,.0f}",
                      f"{days * 24 * devices * price / 1e6:,.2f}"])
    print(f"GB on each of {devices} x {args.device}, rows of {one.seq_len} tokens, --device-batch "
          f"{one.device_batch}, {'bf16' if bf16 else 'fp32'} activations, {args.optimizer}")
    print_table([["size", *parts, "all", "checkpointed"], *memories])
    print(f"\n{PLANNED_TOKENS / 1e12:g}T tokens on {devices} x {name} ({room} GB, "
          f"{peak / 1e12:.0f} TFLOP/s, {PLANNED_MFU:.0%} of them used, ${price} an hour)")
    print_table([["size", "GFLOP/token", "tokens/s each", f"for {PLANNED_DAYS} days", "days",
                  "million $"], *times])


# ------------------------------------------------------------------------------------------------
# The file and the repository phase


def next_token_loss(model, batch):
    return model(batch["input_ids"], batch["document_starts"], batch["targets"]), {}


def data_and_tokenizer(args):
    """Make what is missing on one process, read it on all -> (held out documents, tokenizer)."""
    ours = not args.init and args.size in PRESETS["file"]   # a tokenizer of our own
    name = Path(args.out) / "tokenizer" if ours else args.init or f"Qwen/Qwen2.5-Coder-{args.size}"
    sources, made = args.source, Path(args.out) / "data" / "manifest.json"
    if args.phase == "repository" and not sources and made.exists():
        sources = read_json(made).get("sources")
    sources = sources or DEFAULT_SOURCES + (
        [] if args.size in ("tiny", "mini") else ["packages", "text:packages"])
    if RANK == 0:
        fresh = args.fresh and args.phase == "file"
        table = prepare_data(args.out, sources, fresh)
        if args.phase == "file":
            print_corpus(args.out, table)
        if ours:
            prepare_tokenizer(args.out, CONFIGS[args.size].vocab_size, args.fresh)
    barrier()
    if not ours:
        download(name, weights=bool(args.init))
    tokenizer = Tokenizer.load(name)
    parts = {"code": "validation", "text": "validation_text", "math": "validation_math"}
    heldout = {kind: load_documents(args.out, part) for kind, part in parts.items()
               if kind == "code" or Path(args.out, "data", f"{part}.jsonl").exists()}
    if args.init and args.phase == "file" and "stdlib" not in sources:      # what may be forgotten
        heldout["general"], size = [], 0
        for document in documents("stdlib"):
            heldout["general"].append(document)
            if (size := size + len(document["text"])) > GENERAL:
                break
    return heldout, tokenizer


def make_model(args, tokenizer, device):
    """The model to train, in fp32: from --init, or random weights of --size. With one process it is
    on its device; with several on the CPU, as one device may not hold it whole: shard() moves it.
    """
    device = device if WORLD == 1 else "cpu"
    if args.init:
        model = load_model(args.init, device, torch.float32)
        config = model.config
        config.max_position_embeddings = max(config.max_position_embeddings, args.seq_len)
        config.rope_theta = max(config.rope_theta, args.rope_theta)     # tells far positions apart
        model.model.set_frequencies(config)
    else:
        end = tokenizer.special[ENDOFTEXT]
        model = CausalLM(dataclasses.replace(
            CONFIGS[args.size], bos_token_id=end, eos_token_id=end, rope_theta=args.rope_theta,
            max_position_embeddings=args.seq_len))
        init_weights(model, args.seed)
    model.to(device)
    check_vocabulary(model, tokenizer)
    return model.train()


def watch(model, tokenizer):
    """Print what the model now makes of a fixed gap and a fixed beginning, to see it learn."""
    (prefix, suffix), end = WATCHED, tokenizer.special[ENDOFTEXT]
    length = min(WATCHED_TOKENS, model.config.max_position_embeddings // 4)
    filled = infill(model, tokenizer, prefix, suffix, length)
    [new] = generate(model, [[end, *tokenizer.encode(prefix)]], length,
                     vocab_size=min(tokenizer.special.values()))    # text alone: no gap begins here
    for text, after in ((filled, suffix), (tokenizer.decode(new), "")):
        line = f"{prefix}⟦{text}⟧{after}".rstrip().replace("\n", "⏎")
        if RANK == 0:
            tqdm.write(f"    {re.sub(' +', ' ', line)}"[:120])


def draw_positions(folder, models, heldout, device):
    """positions.png: what tokens cost by their place in a row, for the model before and after."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, T = figure.subplots(), Config.from_json(folder / "config.json").max_position_embeddings
    for path in map(Path, models):
        model, tokenizer = load(path, device)
        bits = bits_by_position(model, tokenizer, heldout, T, POSITION_PARTS)
        places = [(part + 0.5) * T / POSITION_PARTS for part in range(POSITION_PARTS)]
        axes.plot(places, bits, "o-", label=f"after {path.name}")
        say(f"{path}, held-out code by place in rows of {T}: bits per byte "
            + ", ".join(f"{value:.2f}" for value in bits))
    axes.set(title="Bits per byte by place in the row", xlabel="place in the row (tokens)",
             ylabel="bits per byte of held-out code")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "positions.png", dpi=110)


def show(folder, out, heldout, device):
    """Print what the model makes of code it has not seen, beside the truth, and what to type."""
    model, tokenizer = load(folder, device)     # from the folder: FSDP holds only a part of it
    text = max(heldout, key=lambda document: len(document["text"]))["text"]     # the longest
    lines = text.split("\n")
    middle = len(lines) // 2
    at = next((i for i in range(middle, len(lines)) if len(lines[i].strip()) > 12), middle)
    prefix, truth, suffix = gap(text, at + 1, folder)
    length = min(48, model.config.max_position_embeddings // 4)
    prompt = tokenizer.encode(prefix)[-(model.config.max_position_embeddings - length):]
    [new] = generate(model, [prompt], length, vocab_size=tokenizer.vocab_size,
                     stop_ids={tokenizer.special[ENDOFTEXT]})
    filled = infill(model, tokenizer, prefix, suffix, length)
    before, after = "\n".join(lines[max(0, at - 5):at]), "\n".join(lines[at + 1:at + 4])
    print(f"\n--- held-out code, as it stands\n{before}\n{truth}\n{after}\n"
          f"\n--- completed from the left, between ⟦ and ⟧\n{before}\n⟦{tokenizer.decode(new)}⟧\n"
          f"\n--- filled in from both sides\n{before}\n⟦{filled}⟧\n{after}\n\n"
          f"The model is in {folder}. On a file of yours:\n  python fim.py FILE --line N"
          + (f" --out {out}" if out != "out" else ""))


def train_phase(args, device):
    """One phase, from documents to a checkpoint folder; left alone where it is finished."""
    folder, before = Path(args.out) / args.stage, Path(args.out) / STAGES["file"]
    if args.phase == "repository" and not args.init:
        if not (before / "config.json").exists():
            raise InputError(f"{before}: no model to go on from; run the file phase first, or give "
                             "--init")
        args.init = str(before)
    work = folder.with_name(f"{args.stage}.unfinished")
    if folder.exists() and not args.fresh and not work.exists():
        return say(f"{folder} is finished; --fresh trains it again")
    heldout, tokenizer = data_and_tokenizer(args)
    batches = Batches(load_documents(args.out, "train"), tokenizer, args.seq_len,
                      args.batch_tokens // args.seq_len, args.device_batch, args.seed,
                      args.fim_rate, RANK, WORLD, parse_mixture(args.mixture),
                      args.phase == "repository")
    say("epochs: " + ", ".join(f"{kind} {n:.2f}" for kind, n in batches.epochs(args.steps).items()))
    model = make_model(args, tokenizer, device)
    others = compressed_bits_per_byte(document["text"] for document in heldout["code"])
    say("held-out bits per byte: " + ", ".join(f"{name} {n:.3f}" for name, n in others.items()))

    def evaluate(model, step):
        bits = {f"bpb {kind}".removesuffix(" code"): bits_per_byte(model, tokenizer, documents)
                for kind, documents in heldout.items()}
        if not step:
            return bits
        watch(model, tokenizer)
        return {**bits, **others}

    train(model, tokenizer, batches, next_token_loss, args, evaluate, before=bool(args.init))
    if RANK == 0 and args.phase == "repository":
        draw_positions(folder, [args.init, folder], heldout["code"], device)
    if RANK == 0:
        show(folder, args.out, heldout["code"], device)


def main():
    parser = argparse.ArgumentParser(description="Pretrain a Qwen2.5-Coder.")
    training_flags(parser)
    source_flag(parser)
    parser.add_argument("--fim-rate", type=float, default=FIM_RATE,
                        help="share of pieces made fill-in-the-middle (default: %(default)s)")
    parser.add_argument("--mixture", default=":".join(map(str, MIXTURE)), help="parts of code, "
                        "text and mathematics in the tokens seen (default: %(default)s)")
    parser.add_argument("--phase", choices=STAGES, help="file: single files; repository: then "
                        "whole repositories in long rows, into out/repository (default: both, one "
                        "after the other; file with --init)")
    parser.add_argument("--plan", type=int, metavar="N", help="print memory, days and cost of the "
                        "published sizes, or --size, on N devices; train nothing")
    args = parser.parse_args()
    phase = vars(args).pop("phase") or ("file" if args.init else None)
    parse_mixture(args.mixture)
    if not 0 <= args.fim_rate <= 1:
        raise InputError(f"--fim-rate {args.fim_rate}: must be between 0 and 1")
    if (devices := vars(args).pop("plan")) is not None:
        return print_plan(args, phase or "file", devices)
    phases = [settings(args, name, not phase) for name in ([phase] if phase else STAGES)]
    if not phase:
        phases[0].after, phases[1].before = phases[1].steps, phases[0].steps
    device = start_processes(args.device)
    if args.init:                                   # before the data is made
        download(args.init, weights=False)
        if RANK == 0:                               # one line for all
            Config.from_json(hub_folder(args.init, weights=False) / "config.json")
    for one in phases:
        train_phase(one, device)
    stop_processes()


if __name__ == "__main__":
    run(main)
