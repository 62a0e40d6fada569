"""Pretraining: from random weights to a model that completes and infills code.

Builds out/data and out/tokenizer if they are missing, trains with next-token prediction and
fill-in-the-middle in two phases, and leaves a Hugging Face folder of each: out/pretrain after
single files (report, section 3.2.1), out/repository after whole repositories in longer sequences
(3.2.2). Bits per byte of the validation set are measured along the way.

The training loop of every stage is here: train(). The stages differ only in where batches come from
and which loss is used. How a batch is made is in data.py, the model in model.py.

    python pretrain.py                            # size tiny: 6 to 25 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 pretrain.py       # size small on the GPUs of one machine
    python pretrain.py --source ~/my/code --out mine
    python pretrain.py --init FOLDER --lora 16 --source ~/my/code --out tuned   # docs/finetuning.md
    python pretrain.py --size mini                # an hour on 2 CPU cores
    python pretrain.py --plan 64 --device cuda    # what the published sizes would need; a second

The same command resumes an interrupted run; --fresh starts again.

Read first: one_step, train, learning_rate, make_optimizers, train_phase
"""

import argparse
import dataclasses
import functools
import math
import re
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import (DEFAULT_SOURCES, MIXTURE, Batches, documents, load_documents, load_tokens,
                  parse_mixture, prepare_data, prepare_tokenizer, print_corpus, source_flag)
from evaluate import bits_by_position, bits_per_byte, complete, compressed_bits_per_byte
from fim import FIM_RATE, infill, load
from kernels import CHUNK_LOGITS, CHUNK_ROWS
from model import (CONFIGS, CausalLM, Config, add_lora, check_vocabulary, choose_attention,
                   generate, init_weights, load_model, merge_lora, parameter_count, save_adapter,
                   save_model)
from support.checkpoint import (Log, catch_signals, check_same_run, errors_in_one_line,
                                load_resume, read_metrics, save_and_exit, save_resume,
                                starting_point, stored_dtype, trained_weights)
from support.distributed import (LOCAL_RANK, RANK, WORLD, barrier, choose_training_dtype,
                                 default_device, memory, say, seconds_of, start_processes,
                                 stop_processes, sum_over_ranks)
from support.editor import split_at_cursor
from support.files import InputError, hub_folder, move_folder, read_json, run
from support.plan import memory_plan, print_plan
from support.plots import plot_positions, plot_training
from tokenizer import ENDOFTEXT, Tokenizer

# FSDP2 warns about a view that we only read
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

# Not published. The betas are Qwen's (arXiv 2309.16609), the rest is of Qwen2.5's SFT (2412.15115)
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
MOMENTUM = 0.95                                 # of Muon; value of its author
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)       # likewise
EMBEDDING_LR = 2            # of the embedding matrix, relative to the learning rate; ours, measured
# Shares of the steps in which the learning rate rises and falls; not published; ours, measured
WARMUP, DECAY = 0.02, 0.6

# ------------------------------------------------------------------------------------------------
# One step, and the training loop


def next_token_loss(model, batch):
    """The sum of the next-token losses of a batch, in nats -> (loss, further metrics)."""
    return model(batch["input_ids"], batch["document_starts"], batch["targets"]), {}


def learning_rate(step, steps, peak, warmup=WARMUP, decay=DECAY):
    """Linear warmup, constant, then linear decay to zero over the last part of the run.

    step counts from 0. warmup, decay: shares of `steps`; with w and d steps (at least 1) of each,
    the first step has the rate peak / w, the last one peak / d, and no step has 0.
    """
    rise = (step + 1) / max(1, warmup * steps)              # 1 once the warmup is over
    fall = (steps - step) / max(1, decay * steps)           # below 1 once the decay has begun
    return peak * min(1, rise, fall)


def one_step(model, optimizers, device_batches, loss_fn, count, lr):
    """Forward and backward over the batches of a step, then one update -> (sums, gradient norm).

    device_batches: this process's share of the step, in batches of --device-batch sequences. count:
    the number of targets of the whole step, over which the loss is averaged. loss_fn: as in
    train(). lr: the learning rate, which each parameter group multiplies by its `scale`, if it has
    one. Gradients are clipped to the norm CLIP (with WORLD processes FSDP has averaged them; here
    they are summed) and are cleared after the update. sums: a dict with the sum of "loss" and of
    each metric over the batches. norm: before clipping. The results are tensors on the device:
    reading them would make the CPU wait for the GPU, so the caller reads them one step later.
    """
    device = model.head.device
    sums = {}
    # gradients add up from batch to batch: a step may be larger than what fits in memory at once
    for batch in device_batches:
        batch = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        loss, metrics = loss_fn(model, batch)
        # divided by the count of the whole step, not of the batch: then every target counts the
        # same, however the step is split. FSDP averages over processes; WORLD makes that the sum.
        (loss * (WORLD / count)).backward()
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()       # without its graph
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)     # tames rare bad batches
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1)
        optimizer.step()
        optimizer.zero_grad()               # gradients become None, which frees their memory
    if hasattr(norm, "full_tensor"):        # with FSDP, each process holds a part of the norm
        norm = norm.full_tensor()
    return sums, norm


def train(model, tokenizer, batches, loss_fn, args, evaluate=None, evaluate_first=False):
    """Train the model and leave a checkpoint folder in out/<args.stage>.

    batches(step) -> this process's batches of a step, each a dict of tensors and of `count`, its
    number of targets. loss_fn(model, batch) -> (sum of the losses, dict of metrics).
    evaluate(model, step) -> dict for the log; with evaluate_first, also before the first step. An
    interrupted run is resumed exactly; Ctrl-C and SIGTERM save a checkpoint.
    """
    work = Path(args.out) / f"{args.stage}.unfinished"      # out/<stage> exists once it is finished
    optimizers, first_step, log = start_run(model, tokenizer, args, work)
    saved_step = first_step                                 # the step of the newest checkpoint
    all_steps = args.before + args.steps + args.after       # of both phases, for the learning rate
    if evaluate:        # without torch.compile, because its tensors have shapes of their own
        evaluate = torch.compiler.set_stance("force_eager")(evaluate)
    with (errors_in_one_line(args, work), catch_signals() as signals,
          ThreadPoolExecutor(1) as background, log.bar):
        if evaluate_first and first_step == 0:
            measured = evaluate(model, 0)
            say("before: " + ", ".join(f"{name} {bits:.3f}" for name, bits in measured.items()))
        # a thread prepares the batches of the next step while this one is computed
        next_batches = background.submit(pinned_batches, batches, args.device, first_step)
        for step in range(first_step, args.steps):
            step_start = time.perf_counter()
            device_batches = next_batches.result()
            waited = time.perf_counter() - step_start       # about 0, or batches are the bottleneck
            next_batches = background.submit(pinned_batches, batches, args.device, step + 1)
            # one sum for two questions: how many targets, and was any process told to stop?
            count, stopped = sum_over_ranks(sum(batch["count"] for batch in device_batches),
                                            len(signals))
            if stopped:                     # all processes stop after the same step
                log.flush()
                save_and_exit(work, step, saved_step, model, optimizers, signals)
            lr = learning_rate(args.before + step, all_steps, args.lr)
            sums, norm = one_step(model, optimizers, device_batches, loss_fn, count, lr)
            done = step + 1
            log.flush()                     # the previous step, while the GPU computes this one
            tokens = sum(batch["input_ids"].numel() for batch in device_batches)
            log.record(done, lr, count, sums, norm, tokens=tokens,
                       seconds=time.perf_counter() - step_start, waited=waited)
            if evaluate and (done % args.eval_every == 0 or done == args.steps):
                log.flush(evaluate(model, done))
            if done % args.save_every == 0 and done < args.steps:
                log.flush()                 # raises if the loss is not finite: do not save that
                save_resume(work, done, model, optimizers)
                saved_step = done
        log.flush()                         # the last step
        finish_run(model, tokenizer, args, work, work.with_name(args.stage))
    for number in signals:      # signals that arrived in the last step, as the run is saved now
        signal.raise_signal(number)


# ------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalize(matrix, dtype):
    """The matrix with its singular values brought to about 1, by five Newton-Schulz iterations.

    An iteration replaces x = U S V^T by a x + b (x x^T) x + c (x x^T)^2 x, which is U p(S) V^T with
    p(s) = a s + b s^3 + c s^5: all directions U and V stay. With the a, b and c of NEWTON_SCHULZ,
    small s grow fast, and those above 0.01 end between 0.68 and 1.14. It starts from the matrix
    divided by its norm (all s are then at most 1; larger ones would diverge), in dtype.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.size(0) <= matrix.size(1)                 # else transpose: a smaller x x^T
    x = (matrix if wide else matrix.T).to(dtype)                            # rows <= columns
    x = x / x.norm().clamp(min=1e-7)        # all s are in [0, 1]; from large ones it diverges
    for _ in range(5):
        square = x @ x.T                                                    # (rows, rows)
        factor = torch.addmm(square, square, square, beta=b, alpha=c)       # b x x^T + c (x x^T)^2
        x = torch.addmm(x, factor, x, beta=a)                               # a x + factor x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (https://kellerjordan.github.io/posts/muon), with updates as large
    as AdamW's (arXiv 2502.16982). torch.optim.Muon does the same, but always in bf16; on a CPU
    without bf16 instructions that is three quarters of the time of a step."""

    def __init__(self, parameters, dtype, weight_decay):
        super().__init__(parameters, dict(lr=0.0, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:                        # the loss does not depend on it
                    continue
                state = self.state[parameter]
                if not state:                               # the first step
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)     # a running mean
                # Nesterov: look ahead by adding the gradient once more
                update = orthogonalize(gradient.lerp(state["momentum"], MOMENTUM), self.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])     # as in AdamW
                # the root mean square of an orthogonal matrix is 1 / sqrt(longer side), and that of
                # AdamW's updates is about 0.2: with this scale both need the same learning rate
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, kind):
    """kind "adamw": AdamW for everything; "muon": Muon for the matrices inside blocks, AdamW for
    the rest. Norms and biases have no weight decay. Muon computes in the dtype of activations. With
    it, the embedding matrix learns at EMBEDDING_LR times the learning rate."""
    block_matrices, other_matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:         # frozen, with --lora
            continue
        if parameter.dim() < 2:                 # norms and biases
            vectors.append(parameter)
        elif ".layers." in name:                # the linear layers of attention and MLP
            block_matrices.append(parameter)
        else:                                   # the embedding matrix and the output layer
            other_matrices.append(parameter)
    if kind == "muon":
        matrices = dict(params=other_matrices, scale=EMBEDDING_LR)
    else:
        matrices = dict(params=other_matrices + block_matrices)
    adamw = torch.optim.AdamW([matrices, dict(params=vectors, weight_decay=0.0)], betas=BETAS,
                              weight_decay=WEIGHT_DECAY)
    if kind == "adamw":
        return [adamw]
    return [Muon(block_matrices, model.compute_dtype or torch.float32, WEIGHT_DECAY), adamw]


# ------------------------------------------------------------------------------------------------
# Before, during and after the loop


def dtype_of_run(args, config, work):
    """The dtype of activations -> (dtype, reason): that of --dtype, else the one that the
    unfinished run in work started with, else the fastest. It is the same in all processes."""
    stored = stored_dtype(work)
    if args.dtype == "auto" and stored and not args.fresh:
        return getattr(torch, stored), "as this run started"
    return choose_training_dtype(args.device, args.dtype, args.device_batch * args.seq_len,
                                 config.hidden_size, config.intermediate_size)


def set_compute_dtype(model, dtype):
    """Let the model compute in dtype. Frozen weights are stored in it, too, so that they need no
    copy. Trained ones stay in fp32, since most updates are too small to change a bf16 number."""
    model.compute_dtype = dtype
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard(model, dtype, device):
    """Distribute weights, gradients and optimizer state over the processes (FSDP2), block by block.
    A block's weights are gathered in dtype when it is computed; gradients are summed in fp32."""
    if WORLD > 1:
        mesh = dist.init_device_mesh(device, (WORLD,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # one unit per block: whole weights of one or two blocks are in memory, not of all
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)     # what is outside of blocks


def matmul_rate(device, dtype):
    """Measured FLOP/s of a large square matmul: what counts as 100 % in the log's MFU."""
    size = 8192 if device.startswith("cuda") else 1024      # large enough for full speed
    matrix = torch.randn(size, size, device=device, dtype=dtype)    # float() below waits for it
    return 2 * size ** 3 / seconds_of(lambda: float((matrix @ matrix)[0, 0]), rounds=20)


def flops_per_token(config, parameters, T, frozen=False):
    """FLOP of a forward and backward pass: 6 per weight of a matmul (a product and a sum, three
    times; twice for frozen weights, which need no gradient), and the causal attention in sequences
    of T tokens."""
    # rows of the embedding matrix are looked up; if it is tied, it is also the output layer
    lookups = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = (4 if frozen else 6) * (parameters - lookups)
    return weights + 6 * config.num_hidden_layers * T * config.hidden_size


def start_run(model, tokenizer, args, work):
    """Choose dtype and attention, shard, and resume -> (optimizers, number of steps done, Log)."""
    device, parameters = args.device, parameter_count(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    dtype, dtype_reason = dtype_of_run(args, model.config, work)
    set_compute_dtype(model, dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    model.model.checkpointing = args.checkpoint_activations
    start = starting_point(model, tokenizer.tokens, args.out)       # while weights are whole
    shard(model, dtype, device)
    attention = choose_attention(model, args.attention, args.seq_len)
    if RANK == 0:
        if args.fresh:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    check_same_run(work, args, start)       # other flags would mix two runs in one folder
    peak = WORLD * matmul_rate(device, dtype)
    frozen = f", of which {trained:,} are trained (LoRA)" if args.lora else ""
    say(f"{args.size}: {args.batch_tokens // args.seq_len} sequences x {args.seq_len} = "
        f"{args.batch_tokens:,} tokens/step, {args.steps} steps, lr {args.lr:.1e}, "
        f"{args.optimizer}\n"
        f"{parameters:,} parameters{frozen} on {WORLD} x {device}, {peak / 1e9:,.0f} GFLOP/s in "
        f"matmuls\n"
        f"activations: {args.dtype} ({dtype_reason})\n{attention}")
    if args.compile:
        for block in model.model.layers:    # all alike, so each is compiled in the same way
            block.compile()
    optimizers = make_optimizers(model, args.optimizer)     # of sharded parameters: sharded state
    first_step = load_resume(work, model, optimizers)
    flops = flops_per_token(model.config, parameters, args.seq_len, frozen=bool(args.lora))
    return optimizers, first_step, Log(work, args, first_step, flops, peak)


def pinned_batches(batches, device, step):
    """The batches of a step; for a GPU in pinned memory, so that copies run in the background."""
    pin = device != "cpu"       # the GPU copies from pinned memory by itself
    return [{name: value.pin_memory() if pin and torch.is_tensor(value) else value
             for name, value in batch.items()} for batch in batches(step)]


def finish_run(model, tokenizer, args, work, folder):
    """Turn the folder of the unfinished run into a checkpoint folder."""
    weights = trained_weights(model)            # all processes take part
    if RANK == 0:
        if args.lora:
            for name in weights:
                if ".lora_B." in name:
                    weights[name] *= args.update_share      # and so of the product B A
            save_adapter(work / "adapter", weights, args.lora, args.init)
            base = load_model(args.init, "cpu")
            base.config, base.generation_config = model.config, model.generation_config
            merged = base.state_dict()
            merge_lora(merged, weights, args.lora)
            save_model(base, work, merged)
        else:
            save_model(model, work, weights)
        tokenizer.save(work)
        metrics = [{**row, "step": row["step"] + args.before} for row in read_metrics(work)]
        if args.before:             # one curve over both phases
            metrics = read_metrics(folder.with_name(STAGES["file"])) + metrics
        plot_training(metrics, work / "loss.png", args.before)
        if args.after:
            # The repository phase must start from this model: remove one that started from an older
            # model. The empty folder tells the same command to run it even if one is finished.
            other = folder.with_name(f"{STAGES['repository']}.unfinished")
            shutil.rmtree(other, ignore_errors=True)
            other.mkdir()
        move_folder(work, folder)   # last, so that a folder of this name is always complete
        shutil.rmtree(folder / "resume", ignore_errors=True)
    barrier()


# ------------------------------------------------------------------------------------------------
# Presets and flags

# What --size sets for each phase, unless a flag is given. batch_tokens: per step, on all devices;
# device_batch: sequences in a forward pass
PRESETS = {
    "file": {
        "tiny": dict(seq_len=256, batch_tokens=4096, device_batch=16, steps=750, lr=4e-3),
        "mini": dict(seq_len=256, batch_tokens=8192, device_batch=16, steps=1500, lr=3e-3),
        "small": dict(seq_len=1024, batch_tokens=65536, device_batch=16, steps=2000, lr=2e-3)},
    "repository": {
        "tiny": dict(seq_len=1024, batch_tokens=4096, device_batch=4, steps=550, lr=4e-3),
        "mini": dict(seq_len=1024, batch_tokens=8192, device_batch=4, steps=1500, lr=3e-3),
        "small": dict(seq_len=4096, batch_tokens=65536, device_batch=4, steps=1500, lr=2e-3)}}
# batch_tokens, lr: not published; values of Qwen (arXiv 2309.16609). steps: 5.2T and 0.3T tokens
PUBLISHED = {
    "file": dict(seq_len=8192, batch_tokens=2 ** 22, device_batch=1, steps=1_240_000, lr=3e-4),
    "repository": dict(seq_len=32768, batch_tokens=2 ** 22, device_batch=1, steps=71_500, lr=3e-4,
                       rope_theta=1e6)}
# With --lora, for all stages; ours, measured
LORA = dict(seq_len=512, batch_tokens=4096, device_batch=2, steps=50, lr=2e-4)
# With all of the update, an instruct model forgets how to answer. Half of it gains nearly as much:
# the average of the weights before and after fine-tuning (arXiv 2109.01903); ours, measured
LORA_SHARE = 0.5
# The base of the rotary embeddings, larger for longer sequences (report, figure 2: 1e4, then 1e6)
ROPE_THETA = {"file": 1e4, "repository": 1e5}
DEFAULT_SIZES = {"cpu": "tiny", "mps": "tiny", "cuda": "small"}
STAGES = {"file": "pretrain", "repository": "repository"}      # the folder of a phase


def training_flags(parser):
    """Add the flags of every stage that trains. A default of None is filled in by --size."""
    add = parser.add_argument
    # where from, where to
    add("--out", default="out", help="root folder of all stages (default: %(default)s)")
    add("--size", choices=CONFIGS, help="shape, vocabulary, sequences, batch and steps (default: "
        "tiny on CPU and MPS, small on CUDA; in sft.py and dpo.py the size of the model)")
    add("--init", metavar="FOLDER", help="checkpoint folder or hub name to start from, with its "
        "tokenizer (default: the result of the previous stage)")
    add("--fresh", action="store_true", help="start again, and prepare the data again")
    # how much (default: by --size)
    add("--steps", type=int, help="optimizer updates")
    add("--batch-tokens", type=int, help="tokens per step, on all devices")
    add("--device-batch", type=int, help="sequences in a forward pass")
    add("--seq-len", type=int, help="tokens per sequence")
    add("--lora", type=int, metavar="RANK", help="freeze the weights of --init and train small "
        "updates of this rank, such as 16: less memory and time (default size: 50 steps of 4,096 "
        "tokens in sequences of 512)")
    add("--update-share", type=float, default=1.0, help="with --lora: the share of the update that "
        "is saved; less of it forgets less (default: %(default)s)")
    add("--int8", action="store_true", help="with --lora: frozen weights in 8 bits, on a CPU")
    # how
    add("--lr", type=float, help="peak learning rate")
    add("--optimizer", choices=["muon", "adamw"], help="muon for the matrices inside blocks, adamw "
        "for the rest, or adamw for everything (default: muon; with --lora adamw)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--device", choices=["cuda", "mps", "cpu"], default=default_device(),
        help="default: %(default)s")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of activations (default: the faster one, by measurement)")
    add("--attention", choices=["auto", "triton", "sdpa"], default="auto",
        help="implementation (default: auto, the fastest one here)")
    add("--compile", action="store_true",
        help="let torch.compile fuse each block; needs a C++ compiler on a CPU")
    add("--checkpoint-activations", action="store_true",
        help="keep only the inputs of blocks and compute the rest again: less memory, more time")
    add("--save-every", type=int, help="steps between checkpoints (default: a tenth of --steps)")
    add("--eval-every", type=int, help="steps between evaluations (default: a fifth of --steps, "
        "with --lora half of them)")


def check_flags(args):
    """Raise InputError if a number that was given is too small."""
    for name in ("steps", "batch_tokens", "device_batch", "seq_len", "save_every", "eval_every",
                 "lora", "seed", "lr", "update_share"):
        value = getattr(args, name)
        smallest = 0 if name in ("seed", "lr", "update_share") else 1
        if value is not None and not value >= smallest:     # `not >=` also rejects NaN
            raise InputError(f"--{name.replace('_', '-')}: must be at least {smallest}")


def fill_in(args, preset):
    """Check the flags of a stage and fill in those that were not given."""
    check_flags(args)
    if args.int8 and not args.lora:
        raise InputError("--int8: only frozen weights can be in 8 bits; give --lora 16, too")
    preset = {"optimizer": "adamw" if args.lora else "muon", **preset}
    if args.lora:
        preset.update(LORA)
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.save_every is None:
        args.save_every = max(1, args.steps // 10)
    if args.eval_every is None:
        args.eval_every = max(1, args.steps // (2 if args.lora else 5))
    if args.batch_tokens % args.seq_len:
        raise InputError(f"--batch-tokens: must be a multiple of {args.seq_len}, the tokens of a "
                         "sequence")
    return args


def size_of(config, device):
    """The size whose presets suit a model: that of its shape, else the default."""
    for size, other in CONFIGS.items():
        if all(getattr(config, name) == getattr(other, name)
               for name in ("hidden_size", "num_hidden_layers", "intermediate_size")):
            return size
    return DEFAULT_SIZES[device]


def settings(args, phase, both=False):
    """The flags of one phase: those that were given, the rest by --size.

    both: the two phases run in one call. Then a flag that was given is that of the file phase, and
    the repository phase scales it as the presets do (tiny: --steps 75 becomes 55).
    """
    # before, after: the steps of the other phase, which main() sets if both run in one call
    args = argparse.Namespace(**vars(args), phase=phase, stage=STAGES[phase], before=0, after=0)
    args.size = args.size or DEFAULT_SIZES[args.device]
    presets = {name: PRESETS[name].get(args.size, PUBLISHED[name]) for name in PRESETS}
    if both and phase == "repository":
        for name, value in presets["repository"].items():
            given = getattr(args, name, None)
            if given is not None:
                scaled = given * value / presets["file"][name]
                setattr(args, name, scaled if name == "lr" else max(1, round(scaled)))
    return fill_in(args, {"rope_theta": ROPE_THETA[phase], **presets[phase]})


def show_plan(args, phase, devices):
    """Print memory, time and cost of the published sizes, or of --size or the size of --init."""
    if devices < 1:
        raise InputError("--plan: must be at least 1")
    if args.init and not args.size:
        config = Config.from_json(hub_folder(args.init, weights=False) / "config.json")
        args.size = size_of(config, args.device)
    sizes = [args.size] if args.size else [size for size in CONFIGS if size not in PRESETS["file"]]
    on_gpu = args.device == "cuda"              # which need not be in this machine
    dtype = torch.bfloat16
    if not on_gpu:
        config = CONFIGS[sizes[0]]
        dtype, _ = choose_training_dtype(args.device, args.dtype, 4096, config.hidden_size,
                                         config.intermediate_size)
    memories, flops = {}, {}
    for size in sizes:
        args.size = size
        one = settings(args, phase)
        config = CONFIGS[size]
        with torch.device("meta"):              # shapes without memory
            model = CausalLM(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        plan = functools.partial(
            memory_plan, config, shapes, one, devices=devices, bf16=dtype == torch.bfloat16,
            loss_rows=CHUNK_ROWS if on_gpu else max(1, CHUNK_LOGITS // config.vocab_size),
            program_gb=0.0 if on_gpu else memory())
        parts = plan()
        one.checkpoint_activations = True
        memories[size] = parts, sum(plan().values())
        flops[size] = flops_per_token(config, parameter_count(model), one.seq_len)
    print_plan(f"GB on each of {devices} x {args.device}, sequences of {one.seq_len} tokens, "
               f"--device-batch {one.device_batch}, {str(dtype)[6:]} activations, {one.optimizer}"
               + (f", LoRA of rank {args.lora}" if args.lora else ""),
               memories, flops, devices)


# ------------------------------------------------------------------------------------------------
# The file and the repository phase

# A prefix and a suffix whose middle is infilled at every evaluation, to watch the model learn
WATCHED = ("def read_numbers(path):\n    with open(path) as file:\n        ",
           "\n    return numbers\n")
WATCHED_TOKENS = 24
POSITION_PARTS = 8          # of a sequence, in the plot of bits per byte by position
GENERAL = 30_000            # characters of the standard library on which forgetting is measured


def download(name, weights=True):
    """Fetch a checkpoint from the hub: once, or once on each machine that has its own cache."""
    for my_turn in (RANK == 0, LOCAL_RANK == 0):
        if my_turn:
            hub_folder(name, weights)
        barrier()


def base_model(args, device):
    """The checkpoint that a stage starts from, in fp32; with --lora frozen, with an adapter."""
    download(args.init)
    if not args.lora:
        return load_model(args.init, device, torch.float32)
    model = load_model(args.init, device, "int8" if args.int8 else None)
    return add_lora(model, args.lora, args.seed)


def load_base(args, device):
    """base_model() and its tokenizer. InputError if they do not belong together."""
    model = base_model(args, device)
    tokenizer = Tokenizer.load(args.init)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def data_and_tokenizer(args):
    """Prepare what is missing in one process, read it in all -> (validation documents by kind,
    tokenizer)."""
    new_tokenizer = not args.init and args.size in PRESETS["file"]
    name = args.init or f"Qwen/Qwen2.5-Coder-{args.size}"
    if new_tokenizer:
        name = Path(args.out) / "tokenizer"
    sources = args.source
    manifest = Path(args.out) / "data" / "manifest.json"
    if not sources and (args.init or args.phase == "repository") and manifest.exists():
        sources = read_json(manifest).get("sources")
    if not sources:
        larger = [] if args.size in ("tiny", "mini") else ["packages", "text:packages"]
        sources = DEFAULT_SOURCES + larger
    if RANK == 0:
        table = prepare_data(args.out, sources, args.fresh and args.phase == "file")
        if args.phase == "file":
            print_corpus(args.out, table)
        if new_tokenizer:
            prepare_tokenizer(args.out, CONFIGS[args.size].vocab_size, args.fresh)
    barrier()
    if not new_tokenizer:
        download(name, weights=bool(args.init))
    validation = {"code": load_documents(args.out, "validation")}
    for kind in ("text", "math"):
        if Path(args.out, "data", f"validation_{kind}.jsonl").exists():
            validation[kind] = load_documents(args.out, f"validation_{kind}")
    if args.init and args.phase == "file" and "stdlib" not in sources:
        validation["general"] = general_documents()     # does the model forget general code?
    return validation, Tokenizer.load(name)


def general_documents():
    """The first GENERAL characters of the standard library, as documents."""
    general = []
    for document in documents("stdlib"):
        general.append(document)
        if sum(len(document["text"]) for document in general) > GENERAL:
            break
    return general


def make_model(args, tokenizer, device):
    """The model to train: from --init, or of --size with random weights, in fp32."""
    device = device if WORLD == 1 else "cpu"        # may be too large for one device: see shard()
    if args.init:
        model = base_model(args, device)
        config = model.config
        config.max_position_embeddings = max(config.max_position_embeddings, args.seq_len)
        # a larger base turns channels more slowly: angles stay familiar in longer sequences
        config.rope_theta = max(config.rope_theta, args.rope_theta)
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
    """Print how the model infills WATCHED, and how it continues the prefix alone."""
    prefix, suffix = WATCHED
    length = min(WATCHED_TOKENS, model.config.max_position_embeddings // 4)
    middle = infill(model, tokenizer, prefix, suffix, length)
    prompt = [tokenizer.special[ENDOFTEXT], *tokenizer.encode(prefix)]
    # no special tokens, with which the model might begin a FIM example
    [new_ids] = generate(model, [prompt], length, vocab_size=min(tokenizer.special.values()))
    for text, after in ((middle, suffix), (tokenizer.decode(new_ids), "")):
        line = f"{prefix}⟦{text}⟧{after}".rstrip().replace("\n", "⏎")
        if RANK == 0:
            tqdm.write(f"    {re.sub(' +', ' ', line)}"[:120])


def compare_positions(folder, models, validation, device):
    """Plot bits per byte by position, for the models before and after the repository phase."""
    T = Config.from_json(folder / "config.json").max_position_embeddings
    curves = {}
    for path in map(Path, models):
        model, tokenizer = load(path, device)
        bits = bits_by_position(model, tokenizer, validation, T, POSITION_PARTS)
        curves[f"after {path.name}"] = bits
        say(f"{path}: validation bits per byte by position, in {POSITION_PARTS} parts of {T} "
            "tokens: " + ", ".join(f"{value:.2f}" for value in bits))
    plot_positions(curves, T, folder / "positions.png")


def show_infilling(folder, out, validation, device):
    """Print how the model infills a line of the validation set, and the command to try it."""
    # loaded again: with FSDP each process holds only a part of the trained model
    model, tokenizer = load(folder, device)
    text = max((document["text"] for document in validation), key=len)
    lines = text.split("\n")
    middle = len(lines) // 2        # the first line from here on that is not short
    number = next((i for i in range(middle, len(lines)) if len(lines[i].strip()) > 12), middle)
    prefix, truth, suffix = split_at_cursor(text, folder, number + 1)
    length = min(48, model.config.max_position_embeddings // 4)
    [(completion, _)] = complete(model, tokenizer, [tokenizer.encode(prefix)], length,
                                 stop_ids={tokenizer.special[ENDOFTEXT]})
    filled = infill(model, tokenizer, prefix, suffix, length)
    before = "\n".join(lines[max(0, number - 5):number])
    after = "\n".join(lines[number + 1:number + 4])
    option = f" --out {out}" if out != "out" else ""
    print(f"\n--- ground truth, from the validation set\n{before}\n{truth}\n{after}\n"
          f"\n--- left-to-right completion, between ⟦ and ⟧\n{before}\n⟦{completion}⟧\n"
          f"\n--- infilling\n{before}\n⟦{filled}⟧\n{after}\n\n"
          f"The model is in {folder}. On a file of yours:\n  python fim.py FILE --line N{option}")


def train_phase(args, device):
    """One phase, from documents to a checkpoint folder; nothing is done if it is finished."""
    folder = Path(args.out) / args.stage
    work = folder.with_name(f"{args.stage}.unfinished")
    if args.phase == "repository" and not args.init:
        args.init = str(Path(args.out) / STAGES["file"])
        if not Path(args.init, "config.json").exists():
            raise InputError(f"{args.init}: no model to start from; run the file phase first, or "
                             "give --init")
    if folder.exists() and not args.fresh and not work.exists():
        return say(f"{folder} is finished; --fresh trains it again")
    validation, tokenizer = data_and_tokenizer(args)
    repositories = args.phase == "repository"
    tokens = load_tokens(args.out, tokenizer, args.seq_len if repositories else None)
    batches = Batches(tokens, tokenizer, args.seq_len, args.batch_tokens // args.seq_len,
                      args.device_batch, args.seed, fim_rate=args.fim_rate, rank=RANK, world=WORLD,
                      mixture=parse_mixture(args.mixture), repositories=repositories)
    say("epochs: " + ", ".join(f"{kind} {n:.2f}" for kind, n in batches.epochs(args.steps).items()))
    model = make_model(args, tokenizer, device)
    compressors = compressed_bits_per_byte(document["text"] for document in validation["code"])
    say("validation bits per byte of compressors: "
        + ", ".join(f"{name} {bits:.3f}" for name, bits in compressors.items()))

    def evaluate(model, step):
        bits = {"bpb" if kind == "code" else f"bpb {kind}": bits_per_byte(model, tokenizer, part)
                for kind, part in validation.items()}
        if step == 0:
            return bits
        watch(model, tokenizer)
        return {**bits, **compressors}

    train(model, tokenizer, batches, next_token_loss, args, evaluate,
          evaluate_first=bool(args.init))       # random weights need no measurement
    if RANK == 0 and args.phase == "repository":
        compare_positions(folder, [args.init, folder], validation["code"], device)
    if RANK == 0 and args.lora:
        measured = evaluate(load(folder, device)[0], 0)
        say(f"saved with {args.update_share:.0%} of the update: "
            + ", ".join(f"{name} {bits:.3f}" for name, bits in measured.items()))
    if RANK == 0:
        show_infilling(folder, args.out, validation["code"], device)


def main():
    parser = argparse.ArgumentParser(description="Pretrain a Qwen2.5-Coder.")
    training_flags(parser)
    parser.set_defaults(update_share=LORA_SHARE)
    source_flag(parser)
    add = parser.add_argument
    add("--fim-rate", type=float, default=FIM_RATE,
        help="share of code trained as fill-in-the-middle (default: %(default)s)")
    add("--mixture", default=":".join(map(str, MIXTURE)),
        help="shares of code, text and mathematics in the training tokens (default: %(default)s)")
    add("--phase", choices=STAGES, help="file: single files; repository: then whole repositories "
        "in long sequences, into out/repository (default: both; file with --init)")
    add("--plan", type=int, metavar="N", help="print memory, days and cost of the published "
        "sizes, or of --size or --init, on N devices; train nothing")
    args = parser.parse_args()
    parse_mixture(args.mixture)
    if not 0 <= args.fim_rate <= 1:
        raise InputError(f"--fim-rate {args.fim_rate}: must be between 0 and 1")
    phase = vars(args).pop("phase") or ("file" if args.init else None)
    devices = vars(args).pop("plan")
    if devices is not None:
        return show_plan(args, phase or "file", devices)
    if args.lora and not args.init:
        raise InputError("--lora: trains a model that exists; give --init FOLDER")
    device = start_processes(args.device)
    if args.init:                                   # a bad checkpoint is reported before any work
        download(args.init, weights=False)
        path = hub_folder(args.init, weights=False) / "config.json"
        if RANK == 0:                               # in one line, not one per process
            Config.from_json(path)
        barrier()
        args.size = args.size or size_of(Config.from_json(path), args.device)
    names = [phase] if phase else list(STAGES)
    phases = [settings(args, name, both=not phase) for name in names]
    if not phase:                                   # one learning rate schedule for both
        file_phase, repository_phase = phases
        file_phase.after = repository_phase.steps
        repository_phase.before = file_phase.steps
    for one_phase in phases:
        train_phase(one_phase, device)
    stop_processes()


if __name__ == "__main__":
    run(main)
