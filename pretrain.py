"""Pretraining: random weights to a model that completes and infills code.

Builds out/data and out/tokenizer if they are missing, trains with next-token prediction and
fill-in-the-middle (the file phase of the report, section 3.2.1; the repository phase, 3.2.2, goes
on from there), measures bits per byte on held-out code, and leaves a Hugging Face folder in
out/pretrain (out/repository). The training loop of every stage is here, once: train(). Stages
differ in where batches come from and which loss is taken. What a row is stands in data.py, the
model in model.py.

    python pretrain.py                            # size tiny: about 5 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 pretrain.py       # size small on the GPUs of one machine
    python pretrain.py --source ~/my/code --out mine
    python pretrain.py --phase repository         # then whole repositories in long rows; 2 minutes

The same command again goes on where it was stopped; --fresh starts anew.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
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
from evaluate import bits_per_byte, compressed_bits_per_byte
from fim import FIM_RATE, gap, infill, load
from model import (CONFIGS, CausalLM, check_device, check_vocabulary, choose_attention,
                   default_device, generate, init_weights, load_model, loss_head, parameter_count,
                   save_model)
from tokenizer import (ENDOFTEXT, InputError, Tokenizer, hub_folder, move_folder, read_json, run,
                       write_json, write_text)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant

# What --size sets unless a flag says otherwise, for each phase. batch_tokens: per step, over all
# devices; rope_theta: of the model that comes out; of the repository phase of tiny and small: ours
PRESETS = {"file": {
    "tiny": dict(seq_len=256, batch_tokens=4096, device_batch=16, steps=1400, lr=4e-3),
    "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=3000, lr=2e-3)},
    "repository": {
    "tiny": dict(seq_len=1024, batch_tokens=4096, device_batch=4, steps=140, lr=1e-3,
                 rope_theta=1e5),
    "small": dict(seq_len=4096, batch_tokens=65536, device_batch=4, steps=300, lr=5e-4,
                  rope_theta=1e5)}}
# batch_tokens and lr: not published; values of Qwen (arXiv 2309.16609). steps: 5.2T and 0.3T tokens
PUBLISHED = {
    "file": dict(seq_len=8192, batch_tokens=2 ** 22, device_batch=1, steps=1_240_000, lr=3e-4),
    "repository": dict(seq_len=32768, batch_tokens=2 ** 22, device_batch=1, steps=71_500, lr=3e-5,
                       rope_theta=1e6)}
STAGES = {"file": "pretrain", "repository": "repository"}      # the folder of a phase
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0   # not published; values of Qwen, as above
WARMUP, DECAY = 0.02, 0.6       # shares of the steps; not published; ours, by measurement
GENERAL = 30_000            # characters of the standard library on which forgetting is measured
SLOW_CPU_SHARE = 1 / 3      # of the steps, on a CPU without bf16: it is about three times slower

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
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=6))
    return device


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
    return torch.float32, "no bf16 instructions here"


def matmul_rate(device, dtype):
    """Best measured FLOP/s of a large matrix product: the 100 % of the share in the log."""
    size = 8192 if device.startswith("cuda") else 2048
    a, best = torch.randn(size, size, device=device, dtype=dtype), math.inf
    for _ in range(6):
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
    total = torch.tensor(numbers, dtype=torch.float64,
                         device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    sum_over_ranks(0)


# ------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizers(model, kind):
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest.

    No decay on norms and biases. With match_rms_adamw one learning rate serves both.
    """
    inner, outer, vectors = [], [], []
    for name, parameter in model.named_parameters():
        group = vectors if parameter.dim() < 2 else inner if ".layers." in name else outer
        group.append(parameter)
    decay = dict(weight_decay=WEIGHT_DECAY)
    groups = [dict(params=outer if kind == "muon" else inner + outer, **decay),
              dict(params=vectors, weight_decay=0.0)]
    adamw = [torch.optim.AdamW(groups, betas=BETAS, eps=1e-8)]
    muon = [torch.optim.Muon(inner, adjust_lr_fn="match_rms_adamw", **decay)]
    return muon + adamw if kind == "muon" else adamw


def learning_rate(step, steps, peak, warmup=WARMUP, decay=DECAY):
    """Warm-up, stable, linear decay to zero over the last part of the run."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return peak * min(1, rise, fall)


# ------------------------------------------------------------------------------------------------
# Resuming

# flags that may change between two calls of one run: it still learns the same
FREE_FLAGS = {"out", "fresh", "device_batch", "save_every", "eval_every", "device", "attention"}


def check_same_run(work, args):
    """Refuse to go on with another run's folder; the settings are written at the first call."""
    settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    settings = json.loads(json.dumps(settings))         # as it will be read back
    path = work / "run.json"
    barrier()                                           # the first process has cleared the folder
    before = read_json(path) if path.exists() else settings
    for name in sorted(set(settings) | set(before)):
        if settings.get(name) != before.get(name):
            raise InputError(f"{work} holds a run with --{name.replace('_', '-')} "
                             f"{before.get(name)}, this one has {settings.get(name)}; give the "
                             "same flags to go on, another --out, or --fresh to start anew")
    barrier()
    if RANK == 0:
        write_json(path, settings)


def newest_resume(work):
    """The step of the newest whole checkpoint under work, 0 if there is none."""
    steps = [path.name.removeprefix("step_") for path in (work / "resume").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def training_state(model, optimizers):
    weights, states = dcp_state.get_state_dict(model, optimizers)
    return {"model": weights, "optimizers": states}


def save_resume(work, step, model, optimizers):
    """Write work/resume/step_N whole, then remove the older ones. Every process takes part."""
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
        for other in target.parent.glob("step_*"):
            if other != target:
                shutil.rmtree(other)


def load_resume(work, model, optimizers):
    """Continue from the newest checkpoint -> the number of steps done."""
    [step] = sum_over_ranks(newest_resume(work) if RANK == 0 else 0)    # the same for all
    step = int(step)
    if step:
        folder, state = work / "resume" / f"step_{step}", training_state(model, optimizers)
        try:
            dcp.load(state, checkpoint_id=folder, no_dist=WORLD == 1)
        except (OSError, RuntimeError, EOFError, dcp.api.CheckpointException):
            raise InputError(f"{folder}: damaged, the run cannot go on from it; "
                             "--fresh starts anew") from None
        dcp_state.set_state_dict(model, optimizers, model_state_dict=state["model"],
                                 optim_state_dict=state["optimizers"])
        say(f"going on after step {step} of {work}")
    return step


# ------------------------------------------------------------------------------------------------
# Log and picture


def read_metrics(folder, before=math.inf):
    """The lines of metrics.jsonl up to a step; a torn last line is left out."""
    metrics, path = [], folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            metrics.append(json.loads(line))
    return [line for line in metrics if line["step"] <= before]


def log_line(row, steps, seconds):
    """One logged step as text, under 120 columns. seconds: those that are left."""
    bpb = " ".join(f"{name.removeprefix('bpb ')} {value:.3f}"
                   for name, value in row.items() if name[:3] == "bpb")
    bpb = f"  {bpb}" if bpb else ""
    line = (f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:.3f}{bpb}  "
            f"lr {row['lr']:.1e}  norm {row['grad_norm']:.2g}  "
            f"{row['tokens_per_second'] / 1e3:,.1f}k tok/s  MFU {row['mfu']:.0%}  "
            f"{row['memory_gb']:.3g} GB  {seconds / 60:.1f} min left")
    return line if len(line) <= 120 else line.replace("  ", " ")


def draw(folder):
    """loss.png: training loss, and held-out bits per byte beside the compressors'."""
    metrics = read_metrics(folder)
    measured = [row for row in metrics if "bpb" in row]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color="C0")
    axes[0].set(title="Training", xlabel="step", ylabel="loss (nats per token)")
    if measured:
        axes[1].plot([row["step"] for row in measured], [row["bpb"] for row in measured], "o-",
                     color="C0", label="model")
        for name, colour in (("gzip", "C3"), ("bz2", "C1"), ("xz", "C2")):
            if name in measured[-1]:
                axes[1].axhline(measured[-1][name], ls="--", color=colour,
                                label=f"{name} {measured[-1][name]:.2f}")
        axes[1].set(title="Held-out code", xlabel="step", ylabel="bits per byte")
        axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)


# ------------------------------------------------------------------------------------------------
# The training loop


def shard(model, dtype):
    """Spread weights, gradients and optimizer state over the processes (FSDP2), block by block."""
    if WORLD > 1:
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = dist.init_device_mesh(kind, (WORLD,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)


def one_step(model, optimizers, batch_list, loss_fn, count, lr):
    """Forward, backward and update over the batches of a step -> (loss sum, gradient norm).

    The loss is averaged over the targets of the whole step, wherever they are; FSDP averages
    gradients over processes, hence the factor.
    """
    total, device = 0.0, model.head.device
    for batch in batch_list:
        batch = {name: value.to(device) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        loss, _ = loss_fn(model, batch)
        (loss * (WORLD / count)).backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return float(total), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


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
        self.path, self.args, self.flops, self.peak = work / "metrics.jsonl", args, flops, peak
        self.every, self.seconds = max(1, args.steps // 50), []
        if RANK == 0:
            rows = read_metrics(work, before=first)
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.bar = tqdm(total=args.steps, initial=first, unit="step",
                        disable=RANK > 0 or not sys.stderr.isatty())

    def step(self, done, seconds, values, measured):
        """Note a step; every so often, and whenever it was measured, write its row."""
        self.seconds.append(seconds)
        self.bar.update()
        if not measured and done % self.every and done < self.args.steps:
            return
        each, self.seconds = sum(self.seconds) / len(self.seconds), []
        speed = self.args.batch_tokens / each
        row = {"step": done, **values, "tokens_per_second": speed, "memory_gb": memory(),
               "mfu": speed * self.flops / self.peak, **measured}
        if RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            tqdm.write(log_line(row, self.args.steps, each * (self.args.steps - done)))
            sys.stdout.flush()


def start(model, args, work):
    """What precedes the loop: choose precision and kernels, check the folder, shard, resume."""
    device, parameters = str(model.head.device), parameter_count(model)
    model.compute_dtype, why = choose_dtype(device, args.dtype)
    attention = choose_attention(model, args.attention, args.seq_len)
    if RANK == 0:
        if args.fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    check_same_run(work, args)
    peak = WORLD * matmul_rate(device, model.compute_dtype)
    flops = flops_per_token(model.config, parameters, args.seq_len)
    say(f"{parameters:,} parameters on {WORLD} x {device}, {peak / 1e9:,.0f} GFLOP/s in products\n"
        f"activations in {str(model.compute_dtype)[6:]} ({why}), loss head by {loss_head(model)}\n"
        + attention)
    shard(model, model.compute_dtype)
    optimizers = make_optimizers(model, args.optimizer)
    first = load_resume(work, model, optimizers)
    return optimizers, first, Log(work, args, first, flops, peak)


def stop_here(work, step, saved, model, optimizers, stops):
    """Save unless it is saved, say how to go on, and exit with the shell's code for the signal."""
    if step > saved:
        save_resume(work, step, model, optimizers)
    words = ["torchrun", "--nproc-per-node", str(WORLD)] if WORLD > 1 else ["python"]
    words += [word for word in sys.argv if word != "--fresh"]
    say(f"stopped after step {step}; to go on: {shlex.join(words)}")
    sys.exit(128 + (stops or [signal.SIGTERM])[0])      # empty where another process was told


def finish(model, tokenizer, work, folder):
    """Turn the unfinished folder into a checkpoint folder."""
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=whole) if WORLD > 1 else None
    if RANK == 0:
        save_model(model, work, state)
        tokenizer.save(work)
        draw(work)
        move_folder(work, folder)
        shutil.rmtree(folder / "resume", ignore_errors=True)
    barrier()


def train(model, tokenizer, batches, loss_fn, args, evaluate=None):
    """Train model and leave a checkpoint folder in out/<args.stage>.

    batches(step) -> list of dicts of tensors with a `count` of targets; loss_fn(model, batch) ->
    (loss sum, metrics); evaluate(model, step) -> dict for the log. An unfinished run is resumed
    exactly. Ctrl-C and SIGTERM save and say how to go on.
    """
    folder = Path(args.out) / args.stage
    work = folder.with_name(f"{args.stage}.unfinished")
    optimizers, first, log = start(model, args, work)
    saved = first
    with catch_stops() as stops, ThreadPoolExecutor(1) as background, log.bar:
        ahead = background.submit(batches, first)
        for step in range(first, args.steps):
            begin, done = time.perf_counter(), step + 1
            batch_list, ahead = ahead.result(), background.submit(batches, done)
            count, stop = sum_over_ranks(sum(batch["count"] for batch in batch_list), len(stops))
            if stop:
                stop_here(work, step, saved, model, optimizers, stops)
            lr = learning_rate(step, args.steps, args.lr)
            loss, norm = one_step(model, optimizers, batch_list, loss_fn, count, lr)
            [loss] = sum_over_ranks(loss)
            if not math.isfinite(loss + norm):
                raise InputError(f"step {done}: the loss is {loss}, the gradient's norm {norm}; "
                                 f"step {saved} is kept in {work}. Lower --lr, use --fresh")
            seconds, measured = time.perf_counter() - begin, {}
            if evaluate and (done % args.eval_every == 0 or done == args.steps):
                measured = evaluate(model, done)
            log.step(done, seconds, dict(loss=loss / count, lr=lr, grad_norm=norm), measured)
            if done % args.save_every == 0 and done < args.steps:
                save_resume(work, done, model, optimizers)
                saved = done
        finish(model, tokenizer, work, folder)


def training_flags(parser):
    """The flags of every stage that trains. None: set by --size."""
    # where from, where to
    parser.add_argument("--out", default="out",
                        help="root folder of the stages (default: %(default)s)")
    parser.add_argument("--size", choices=CONFIGS, help="shape, vocabulary, rows, batch and steps "
                        "(default: tiny on CPU and MPS, small on CUDA)")
    parser.add_argument("--init", metavar="FOLDER", help="checkpoint folder or hub name to start "
                        "from, with its tokenizer (default: random weights)")
    parser.add_argument("--fresh", action="store_true", help="start anew, data and tokenizer too")
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
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (a tenth)")
    parser.add_argument("--eval-every", type=int, help="steps between measurements (a fifth)")


def fill_in(args):
    """Set the flags that were not given from the preset of the size."""
    args.size = args.size or ("small" if args.device == "cuda" else "tiny")
    preset = PRESETS[args.phase].get(args.size, PUBLISHED[args.phase])
    for name, value in {"rope_theta": None, **preset}.items():
        if getattr(args, name, None) is None:
            if name == "steps" and args.device == "cpu" and not cpu_has_bf16():
                value = round(value * SLOW_CPU_SHARE)
                say(f"this CPU has no bf16: {value} steps by default, to stay within minutes")
            setattr(args, name, value)
    args.save_every = args.save_every or max(1, args.steps // 10)
    args.eval_every = args.eval_every or max(1, args.steps // 5)
    least = dict.fromkeys(
        ("steps", "batch_tokens", "device_batch", "seq_len", "save_every", "eval_every"), 1)
    for name, low in {**least, "seed": 0, "lr": 0.0}.items():
        if not getattr(args, name) >= low:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {low}")
    if args.batch_tokens % args.seq_len:
        raise InputError("--batch-tokens: must be a multiple of --seq-len")


# ------------------------------------------------------------------------------------------------
# The file and the repository phase


def next_token_loss(model, batch):
    return model(batch["input_ids"], batch["document_starts"], batch["targets"]), {}


def data_and_tokenizer(args):
    """Make what is missing on one process, read it on all -> (train, held out, tokenizer)."""
    ours = not args.init and args.size in PRESETS["file"]   # a tokenizer of our own
    vocab_size = CONFIGS[args.size].vocab_size if ours else None
    name = Path(args.out) / "tokenizer" if vocab_size else args.init
    name = name or f"Qwen/Qwen2.5-Coder-{args.size}"
    sources, made = args.source, Path(args.out) / "data" / "manifest.json"
    if args.phase == "repository" and not sources and made.exists():
        sources = read_json(made)["sources"]
    sources = sources or DEFAULT_SOURCES + (
        [] if args.size == "tiny" else ["packages", "text:packages"])
    if RANK == 0:
        fresh = args.fresh and args.phase == "file"
        print_corpus(args.out, prepare_data(args.out, sources, fresh))
        if vocab_size:
            prepare_tokenizer(args.out, vocab_size, args.fresh)
    if LOCAL_RANK == 0 and not vocab_size:              # one download a machine
        hub_folder(name, weights=bool(args.init))
    barrier()
    tokenizer = Tokenizer.load(name)
    parts = {"code": "validation", "text": "validation_text", "math": "validation_math"}
    heldout = {kind: load_documents(args.out, part) for kind, part in parts.items()
               if Path(args.out, "data", f"{part}.jsonl").exists()}
    if args.init and args.phase == "file" and "stdlib" not in sources:      # what may be forgotten
        heldout["general"], size = [], 0
        for document in documents("stdlib"):
            heldout["general"].append(document)
            if (size := size + len(document["text"])) > GENERAL:
                break
    return load_documents(args.out, "train"), heldout, tokenizer


def make_model(args, tokenizer, device):
    """The model to train, in fp32, on its device: from --init, or random weights of --size."""
    if args.init:
        model = load_model(args.init, device, torch.float32)
        if args.seq_len > model.config.max_position_embeddings:
            model.config.max_position_embeddings = args.seq_len
        if args.rope_theta:                                 # so that far positions are told apart
            model.config.rope_theta = max(model.config.rope_theta, args.rope_theta)
            model.model.set_frequencies(model.config)
            model.to(device)
    else:
        end = tokenizer.special[ENDOFTEXT]
        model = CausalLM(dataclasses.replace(CONFIGS[args.size], bos_token_id=end, eos_token_id=end,
                                             max_position_embeddings=args.seq_len))
        init_weights(model, args.seed)
        model.to(device)
    check_vocabulary(model, tokenizer)
    return model.train()


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


def main():
    parser = argparse.ArgumentParser(description="Pretrain a Qwen2.5-Coder.")
    training_flags(parser)
    source_flag(parser)
    parser.add_argument("--fim-rate", type=float, default=FIM_RATE,
                        help="share of pieces made fill-in-the-middle (default: %(default)s)")
    parser.add_argument("--mixture", default=":".join(map(str, MIXTURE)), help="parts of code, "
                        "text and mathematics in the tokens seen (default: %(default)s)")
    parser.add_argument("--phase", choices=STAGES, default="file", help="file: single files; "
                        "repository: then files of a repository together, in long rows, into "
                        "out/repository (default: %(default)s)")
    args = parser.parse_args()
    args.stage = STAGES[args.phase]
    folder, before = Path(args.out) / args.stage, Path(args.out) / STAGES["file"]
    if args.phase == "repository" and not args.init:
        if not (before / "config.json").exists():
            raise InputError(f"{before}: no model to go on from; run the file phase first, or give "
                             "--init")
        args.init = str(before)
    work = folder.with_name(f"{args.stage}.unfinished")
    if folder.exists() and not args.fresh and not work.exists():
        return say(f"{folder} is finished; --fresh trains it again")
    fill_in(args)
    parse_mixture(args.mixture)
    if not 0 <= args.fim_rate <= 1:
        raise InputError(f"--fim-rate {args.fim_rate}: must be between 0 and 1")
    device = start_processes(args.device)
    train_documents, heldout, tokenizer = data_and_tokenizer(args)
    batches = Batches(train_documents, tokenizer, args.seq_len, args.batch_tokens // args.seq_len,
                      args.device_batch, args.seed, args.fim_rate, RANK, WORLD,
                      parse_mixture(args.mixture), args.phase == "repository")
    say("epochs: " + ", ".join(f"{kind} {n:.2f}" for kind, n in batches.epochs(args.steps).items()))
    model = make_model(args, tokenizer, device)
    others = compressed_bits_per_byte(document["text"] for document in heldout["code"])
    say("held-out bits per byte: " + ", ".join(f"{name} {n:.3f}" for name, n in others.items()))

    def evaluate(model, step):
        names = {"code": "bpb", **{kind: f"bpb {kind}" for kind in ("text", "math", "general")}}
        return {**{names[kind]: bits_per_byte(model, tokenizer, documents)
                   for kind, documents in heldout.items()}, **others}

    if args.init and newest_resume(work) == 0:
        say("before: " + ", ".join(f"{name} {bits:.3f}" for name, bits in evaluate(model, 0).items()
                                   if name not in others))
    train(model, tokenizer, batches, next_token_loss, args, evaluate)
    if RANK == 0:
        show(folder, args.out, heldout["code"], device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
