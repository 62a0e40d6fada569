"""Pretraining: random weights to a model that completes and infills code.

Builds out/data and out/tokenizer if they are missing, trains a Qwen2.5-Coder with next-token
prediction and fill-in-the-middle (the file phase of the report, section 3.2.1), measures it on
held-out code beside gzip, bz2 and xz, and leaves a Hugging Face folder in out/pretrain.

The training loop of every stage is here, once: train(). Stages differ in two arguments, where
batches come from and which loss is taken. What a row is stands in data.py, the model in model.py.

    torchrun pretrain.py                          # size tiny: under 6 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 pretrain.py       # size small on the GPUs of one machine
    python pretrain.py --source ~/my/code --out mine
    python pretrain.py --size 0.5B --init Qwen/Qwen2.5-Coder-0.5B --source ~/my/code --out mine

The same command again goes on where it was stopped; --fresh starts anew.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import Batches, load_documents, prepare, report, source_flag
from evaluate import bits_per_byte, compressed_bits_per_byte
from fim import FIM_RATE, infill, load
from model import (CONFIGS, CausalLM, default_device, generate, init_weights, load_model,
                   parameter_count, save_model)
from tokenizer import (ENDOFTEXT, InputError, Tokenizer, move_folder, read_json, run, whole_folder,
                       write_json)

# What --size sets unless a flag says otherwise. batch_tokens: per step, over all devices.
PRESETS = {
    "tiny": dict(seq_len=256, batch_tokens=4096, device_batch=16, steps=1000, lr=4e-3),
    "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=3000, lr=2e-3)}
# not published: peak learning rate and batch of Qwen (arXiv 2309.16609), steps of the 5.2T tokens
PUBLISHED = dict(seq_len=8192, batch_tokens=2 ** 22, device_batch=1, steps=1_240_000, lr=3e-4)
SLOW_CPU_SHARE = 1 / 3      # of the steps, on a CPU without bf16: it is about three times slower

# ------------------------------------------------------------------------------------------------
# Machine: processes, device, precision


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print on the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def start_processes(device):
    """Join the other processes that torchrun started -> this one's device."""
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 numbers itself: else bf16 would be slower than fp32."""
    features = Path("/proc/cpuinfo")
    words = features.read_text().split() if features.exists() else []
    return bool({"avx512_bf16", "amx_bf16"} & set(words))


def choose_dtype(device, wanted):
    """The dtype of activations -> (dtype, reason). Weights and optimizer stay in fp32."""
    if wanted != "auto":
        return getattr(torch, wanted), "--dtype"
    if device.startswith("cuda"):
        fits = torch.cuda.get_device_capability()[0] >= 8
        return ((torch.bfloat16, "this GPU computes in it") if fits else
                (torch.float32, "this GPU has no bf16"))
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
    rows = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (parameters - rows) + 6 * config.num_hidden_layers * T * config.hidden_size


def memory():
    """Peak memory in GB: the device's where it counts its own, else this process'."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def sum_over_ranks(*numbers):
    """Sum each number over all processes; the numbers themselves with one process."""
    if rank_and_world()[1] == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    if rank_and_world()[1] > 1:
        dist.barrier()


# ------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizers(model, kind, weight_decay):
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest.

    No decay on norms and biases. With match_rms_adamw one learning rate serves both. Betas and
    decay are not published; values of Qwen (arXiv 2309.16609).
    """
    inner, outer, vectors = [], [], []
    for name, parameter in model.named_parameters():
        group = vectors if parameter.dim() < 2 else inner if ".layers." in name else outer
        group.append(parameter)
    adam = dict(betas=(0.9, 0.95), eps=1e-8)
    if kind == "adamw":
        return [torch.optim.AdamW([dict(params=inner + outer, weight_decay=weight_decay),
                                   dict(params=vectors, weight_decay=0.0)], **adam)]
    return [torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=outer, weight_decay=weight_decay),
                               dict(params=vectors, weight_decay=0.0)], **adam)]


def learning_rate(step, steps, peak, warmup=0.02, decay=0.6):
    """Warm-up, stable, linear decay to zero over the last part of the run."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return peak * min(1, rise, fall)


# ------------------------------------------------------------------------------------------------
# Resuming

# flags that may change between two calls of one run without changing what it computes
FREE_FLAGS = {"out", "fresh", "device_batch", "save_every", "eval_every", "device"}


def check_same_run(work, args):
    """Refuse to go on with another run's folder; the settings are written at the first call."""
    settings = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in FREE_FLAGS},
                                     default=str))
    path = work / "run.json"
    if path.exists():
        before = read_json(path)
        for name in sorted(set(settings) | set(before)):
            if settings.get(name) != before.get(name):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{work} holds a run with {flag} {before.get(name)}, this one has "
                                 f"{settings.get(name)}; give the same flags to go on, another "
                                 "--out, or --fresh to start anew")
    barrier()
    if rank_and_world()[0] == 0:
        write_json(path, settings)


def training_state(model, optimizers):
    weights, states = dcp_state.get_state_dict(model, optimizers)
    return {"model": weights, "optimizers": states}


def save_resume(work, step, model, optimizers):
    """Write work/resume/step_N whole, then remove the older ones. Every process takes part."""
    target, first = work / "resume" / f"step_{step}", rank_and_world()[0] == 0
    try:
        with whole_folder(target) if first else contextlib.nullcontext() as folder:
            barrier()
            dcp.save(training_state(model, optimizers), no_dist=rank_and_world()[1] == 1,
                     checkpoint_id=folder or target.with_name(target.name + ".writing"))
            barrier()
    except (Exception, dcp.api.CheckpointException) as error:
        older, reason = newest_resume(work), str(error).strip().splitlines()[-1]
        raise InputError(f"{target}: cannot be written, is the disk full? ({reason}) "
                         f"{f'Step {older} is' if older else 'No earlier step is'} kept; "
                         "free some space and run the same command again") from None
    if first:
        for other in target.parent.glob("step_*"):
            if other != target:
                shutil.rmtree(other)


def newest_resume(work):
    """The step of the newest whole checkpoint under work, 0 if there is none."""
    steps = [path.name.removeprefix("step_") for path in (work / "resume").glob("step_*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def load_resume(work, model, optimizers):
    """Continue from the newest checkpoint -> the number of steps done."""
    step = newest_resume(work)
    if step:
        state = training_state(model, optimizers)
        dcp.load(state, no_dist=rank_and_world()[1] == 1,
                 checkpoint_id=work / "resume" / f"step_{step}")
        dcp_state.set_state_dict(model, optimizers, model_state_dict=state["model"],
                                 optim_state_dict=state["optimizers"])
        say(f"going on after step {step} of {work}")
    return step


# ------------------------------------------------------------------------------------------------
# Log and picture


def read_metrics(folder, before=math.inf):
    """The lines of metrics.jsonl up to a step; a torn last line is left out."""
    metrics = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            metrics.append(json.loads(line))
    return [line for line in metrics if line["step"] <= before]


def log_line(row, args, seconds_left):
    """One logged step as text, under 120 columns."""
    bpb = f"  bpb {row['bpb']:.3f}" if "bpb" in row else ""
    left = next(f"{seconds_left / unit:.{int(unit > 1)}f} {name}" for unit, name in
                ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
                if seconds_left >= 1.5 * unit or unit == 1)
    step = f"{row['step']:>{len(str(args.steps))}}/{args.steps}"
    return (f"step {step}  loss {row['loss']:.3f}{bpb}  lr {row['lr']:.1e}  "
            f"norm {row['grad_norm']:.2g}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{row['mfu']:.0%} of peak  {row['memory_gb']:.1f} GB  {left} left")


def draw(folder):
    """loss.png: training loss, and held-out bits per byte beside the compressors'."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(folder)
    measured = [row for row in metrics if "bpb" in row]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    axes[0].plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color="C0")
    axes[0].set(title="Training", xlabel="step", ylabel="loss (nats per token)")
    if measured:
        axes[1].plot([row["step"] for row in measured], [row["bpb"] for row in measured], "o-",
                     color="C0", label="model")
        for name, colour in (("gzip", "C3"), ("bz2", "C1"), ("xz", "C2")):
            if name in measured[-1]:
                axes[1].axhline(measured[-1][name], ls="--", color=colour,
                                label=f"{name} {measured[-1][name]:.2f}")
        axes[1].set(title="Held-out code", xlabel="step", ylabel="bits per byte", ylim=(0.8, None))
        axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The training loop


def shard(model, dtype):
    """Spread weights, gradients and optimizer state over the processes (FSDP2), block by block."""
    world = rank_and_world()[1]
    if world > 1:
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = dist.init_device_mesh(kind, (world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)


def to_device(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def one_step(model, optimizers, batch_list, loss_fn, count, lr, clip=1.0):
    """Forward, backward and update over the batches of a step -> (loss sum, gradient norm).

    The loss is averaged over the targets of the whole step, wherever they are; FSDP averages
    gradients over processes, hence the factor.
    """
    world, total, device = rank_and_world()[1], 0.0, model.head.device
    for batch in batch_list:
        loss, _ = loss_fn(model, to_device(batch, device))
        (loss * (world / count)).backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
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
    yield stops
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


class Log:
    """metrics.jsonl and the terminal: a row every so many steps, a bar where someone watches."""

    def __init__(self, work, args, first, flops, peak):
        self.path, self.args, self.flops, self.peak = work / "metrics.jsonl", args, flops, peak
        self.every, self.times, self.begin = max(1, args.steps // 50), [], time.perf_counter()
        self.writes = rank_and_world()[0] == 0
        if self.writes:
            rows = read_metrics(work, before=first)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.bar = tqdm(total=args.steps, initial=first, unit="step",
                        disable=not (self.writes and sys.stderr.isatty()))

    def step(self, done, evaluate=None, **values):
        """Note one step; every so often, and whenever it is evaluated, write its row."""
        now = time.perf_counter()
        self.times.append(now - self.begin)
        self.bar.update()
        if evaluate or done % self.every == 0 or done == self.args.steps:
            seconds = sum(self.times) / len(self.times)
            speed = self.args.batch_tokens / seconds
            row = {"step": done, **values, "tokens_per_second": speed, "memory_gb": memory(),
                   "mfu": speed * self.flops / self.peak, **(evaluate() if evaluate else {})}
            if self.writes:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                self.bar.clear()
                print(log_line(row, self.args, seconds * (self.args.steps - done)), flush=True)
            self.times = []
        self.begin = time.perf_counter()


def start(model, args, work):
    """What precedes the loop: check the folder, choose precision, shard, resume -> all it needs."""
    if rank_and_world()[0] == 0:
        work.mkdir(parents=True, exist_ok=True)
    barrier()
    check_same_run(work, args)
    device, world, parameters = str(model.head.device), rank_and_world()[1], parameter_count(model)
    model.compute_dtype, why = choose_dtype(device, args.dtype)
    peak = world * matmul_rate(device, model.compute_dtype)
    name = str(model.compute_dtype).removeprefix("torch.")
    say(f"{parameters:,} parameters on {world} x {device}, activations in {name} ({why}), "
        f"{peak / 1e9:,.0f} GFLOP/s at best")
    flops = flops_per_token(model.config, parameters, args.seq_len)
    shard(model, model.compute_dtype)
    optimizers = make_optimizers(model, args.optimizer, args.weight_decay)
    first = load_resume(work, model, optimizers)
    return optimizers, first, Log(work, args, first, flops, peak)


def finish(model, tokenizer, work, folder):
    """Turn the unfinished folder into a checkpoint folder."""
    rank, world = rank_and_world()
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=whole) if world > 1 else None
    if rank == 0:
        save_model(model, work, state)
        tokenizer.save(work)
        draw(work)
        shutil.rmtree(work / "resume", ignore_errors=True)
        move_folder(work, folder)
    barrier()


def train(model, tokenizer, batches, loss_fn, args, evaluate=None):
    """Train model and leave a checkpoint folder in out/<args.stage>.

    batches(step) -> list of dicts of tensors with a `count` of targets; loss_fn(model, batch) ->
    (loss sum, metrics); evaluate(model, step) -> dict for the log. An unfinished run is resumed
    exactly. Ctrl-C and SIGTERM save, say how to go on, and exit with the shell's code for them.
    """
    folder = Path(args.out) / args.stage
    work = folder.with_name(f"{args.stage}.unfinished")
    optimizers, first, log = start(model, args, work)
    with catch_stops() as stops, ThreadPoolExecutor(1) as background, log.bar:
        ahead = background.submit(batches, first)
        for step in range(first, args.steps):
            batch_list, ahead = ahead.result(), background.submit(batches, step + 1)
            count, stop = sum_over_ranks(sum(batch["count"] for batch in batch_list), len(stops))
            if stop:
                if step > newest_resume(work):
                    save_resume(work, step, model, optimizers)
                say(f"stopped after step {step}; to go on: {' '.join(['python', *sys.argv])}")
                sys.exit(128 + (stops or [signal.SIGTERM])[0])
            lr = learning_rate(step, args.steps, args.lr)
            loss, norm = one_step(model, optimizers, batch_list, loss_fn, count, lr)
            [loss] = sum_over_ranks(loss)
            if not math.isfinite(loss):
                raise InputError(f"step {step + 1}: the loss is {loss}; step {newest_resume(work)} "
                                 f"is kept in {work}. Lower --lr and start again with --fresh")
            done = step + 1
            measured = evaluate and (done % args.eval_every == 0 or done == args.steps)
            log.step(done, partial(evaluate, model, done) if measured else None,
                     loss=loss / count, lr=lr, grad_norm=norm)
            if done % args.save_every == 0 and done < args.steps:
                save_resume(work, done, model, optimizers)
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
    # how much
    parser.add_argument("--steps", type=int, help="optimizer updates")
    parser.add_argument("--batch-tokens", type=int, help="tokens per step, over all devices")
    parser.add_argument("--device-batch", type=int, help="rows per forward pass on one device")
    parser.add_argument("--seq-len", type=int, help="tokens per row")
    # how
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon",
                        help="muon: blocks' matrices, adamw the rest (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], default=default_device(),
                        help="default: %(default)s")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="of activations (default: bfloat16 where the device computes in it)")
    parser.add_argument("--save-every", type=int,
                        help="steps between checkpoints (default: a tenth of all)")
    parser.add_argument("--eval-every", type=int,
                        help="steps between measurements (default: a fifth of all)")


def fill_in(args):
    """Set the flags that were not given from the preset of the size."""
    args.size = args.size or ("small" if args.device == "cuda" else "tiny")
    for name, value in PRESETS.get(args.size, PUBLISHED).items():
        if getattr(args, name) is None:
            if name == "steps" and args.device == "cpu" and not cpu_has_bf16():
                value = round(value * SLOW_CPU_SHARE)
                say(f"this CPU has no bf16: {value} steps by default, to stay within minutes")
            setattr(args, name, value)
    args.save_every = args.save_every or max(1, args.steps // 10)
    args.eval_every = args.eval_every or max(1, args.steps // 5)
    for name in ("steps", "batch_tokens", "device_batch", "seq_len", "save_every", "eval_every"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(args, name)}: must be at least 1")
    if args.batch_tokens % args.seq_len:
        raise InputError(f"--batch-tokens {args.batch_tokens} is not a multiple of "
                         f"--seq-len {args.seq_len}")


# ------------------------------------------------------------------------------------------------
# The file phase


def next_token_loss(model, batch):
    return model(batch["input_ids"], batch["document_starts"], batch["targets"]), {}


def prepare_data(args):
    """Make what is missing on one process, read it on all -> (train, held-out, tokenizer)."""
    published = args.size not in PRESETS
    vocab_size = None if args.init or published else CONFIGS[args.size].vocab_size
    sources = args.source or (["stdlib"] if args.size == "tiny" else ["stdlib", "packages"])
    if rank_and_world()[0] == 0:
        report(args.out, prepare(args.out, sources, vocab_size, args.fresh))
    barrier()
    from_hub = args.init or f"Qwen/Qwen2.5-Coder-{args.size}"
    tokenizer = Tokenizer.load(Path(args.out) / "tokenizer" if vocab_size else from_hub)
    return load_documents(args.out, "train"), load_documents(args.out, "validation"), tokenizer


def make_model(args, tokenizer, device):
    """The model to train, in fp32, on its device: from --init, or random weights of --size."""
    if args.init:
        model = load_model(args.init, device, torch.float32)
    else:
        model = CausalLM(dataclasses.replace(
            CONFIGS[args.size], max_position_embeddings=args.seq_len,
            eos_token_id=tokenizer.special[ENDOFTEXT]))
        init_weights(model, args.seed)
        model.to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only "
                         f"{model.config.vocab_size} rows; they do not belong together")
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, args.seq_len)
    return model.train()


def show(folder, out, heldout, device):
    """Print what the model makes of code it has not seen, beside the truth, and what to type."""
    model, tokenizer = load(folder, device)
    lines = max(heldout, key=lambda document: len(document["text"]))["text"].split("\n")
    middle = len(lines) // 2
    at = next((i for i in range(middle, len(lines)) if len(lines[i].strip()) > 12), middle)
    prefix, suffix = "\n".join(lines[:at]) + "\n", "\n" + "\n".join(lines[at + 1:])
    length = min(48, model.config.max_position_embeddings // 4)
    prompt = tokenizer.encode(prefix)[length - model.config.max_position_embeddings:]
    [new] = generate(model, [prompt], length, vocab_size=tokenizer.vocab_size,
                     stop_ids={tokenizer.special[ENDOFTEXT]})
    filled = infill(model, tokenizer, prefix, suffix, length)
    before, after = "\n".join(lines[max(0, at - 5):at]), "\n".join(lines[at + 1:at + 4])
    print(f"\n--- held-out code, as it stands\n{before}\n{lines[at]}\n{after}\n"
          f"\n--- completed from the left, between ⟦ and ⟧\n{before}\n⟦{tokenizer.decode(new)}⟧\n"
          f"\n--- one line filled in from both sides\n{before}\n⟦{filled}⟧\n{after}\n\n"
          f"The model is in {folder}. On a file of yours:\n  python fim.py FILE --line N"
          + (f" --out {out}" if out != "out" else ""))


def main():
    parser = argparse.ArgumentParser(description="Pretrain a Qwen2.5-Coder.")
    training_flags(parser)
    source_flag(parser)
    parser.add_argument("--fim-rate", type=float, default=FIM_RATE,
                        help="share of pieces made fill-in-the-middle (default: %(default)s)")
    parser.set_defaults(stage="pretrain")
    args = parser.parse_args()
    folder = Path(args.out) / args.stage
    rank, world = rank_and_world()
    if folder.exists() and not args.fresh:
        return say(f"{folder} is finished; --fresh trains it again")
    fill_in(args)
    device = start_processes(args.device)
    if args.fresh and rank == 0:
        shutil.rmtree(folder.with_name(f"{args.stage}.unfinished"), ignore_errors=True)
    train_documents, heldout, tokenizer = prepare_data(args)
    batches = Batches(train_documents, tokenizer, args.seq_len, args.batch_tokens // args.seq_len,
                      args.device_batch, args.seed, args.fim_rate, rank, world)
    model = make_model(args, tokenizer, device)
    others = compressed_bits_per_byte([document["text"] for document in heldout])
    say("held-out bits per byte: " + ", ".join(f"{name} {n:.3f}" for name, n in others.items()))

    def evaluate(model, step):
        return {"bpb": bits_per_byte(model, tokenizer, heldout), **others}

    train(model, tokenizer, batches, next_token_loss, args, evaluate)
    if rank == 0:
        show(folder, args.out, heldout, device)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
