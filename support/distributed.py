"""The machine a script runs on: processes, devices, memory, and the dtype that is fastest here."""

import ctypes
import datetime
import functools
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from support.files import InputError

RANK = int(os.environ.get("RANK", 0))               # this process among WORLD; torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))   # this process on its machine
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # options of glibc's mallopt

# What choose_inference_dtype() weighs: reading a prompt (arithmetic) against writing an answer
# one token at a time (memory traffic)
PROMPT_TOKENS, ANSWER_TOKENS = 512, 128
# Bounds that keep a measurement well under a second
LARGEST_SIDE = 2048         # of a measured weight matrix
MEASURED_FLOPS = 1e9        # of a measured matmul: a few milliseconds
MEASURED_WEIGHTS = 25e6     # that decoding is measured with: in fp32 more than caches hold


# ------------------------------------------------------------------------------------------------
# Processes


def say(*words):
    """print(), but only in the first process."""
    if RANK == 0:
        print(*words, flush=True)


def start_processes(device):
    """Join the other processes that torchrun started -> this process's device."""
    if sys.platform == "linux":     # keep freed memory: getting it again costs 7 % of the time
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
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


def sum_over_ranks(*numbers):
    """Sum each number over all processes; with one process, the numbers themselves."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)      # on the CPU: no GPU is waited for
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for all processes; InputError if one has ended."""
    try:
        sum_over_ranks(0)
    except RuntimeError:
        raise InputError("another process has ended, its reason stands above or below") from None


# ------------------------------------------------------------------------------------------------
# Devices and memory


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """Raise InputError unless tensors can be made on the device."""
    try:
        torch.empty(1, device=name).tolist()            # "meta" holds no numbers
    except (RuntimeError, AssertionError, AttributeError, ImportError):
        raise InputError(f"--device {name}: not available here, {default_device()} is") from None


def memory():
    """Peak memory in GB: the GPU's where there is one, else this process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def available_bytes():
    """Main memory that is free, as Linux estimates it; elsewhere no limit is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


# ------------------------------------------------------------------------------------------------
# The fastest dtype, by measurement. CPU flags do not tell: on a CPU with AVX-512 bf16 but without
# AMX, matmuls in bf16 may run at half the speed of fp32.


def seconds_of(function, rounds=5):
    """The shortest of a few runs, after one to warm up."""
    best = math.inf
    for i in range(rounds + 1):
        start = time.perf_counter()
        function()
        if i > 0:
            best = min(best, time.perf_counter() - start)
    return best


def training_rate(dtype, tokens, size_in, size_out):
    """FLOP/s of this CPU in the three matmuls of a linear layer with fp32 weights: the output, the
    gradient of the input and the gradient of the weights. tokens: of one forward pass."""
    size_in, size_out = min(size_in, LARGEST_SIDE), min(size_out, LARGEST_SIDE)
    rows = int(min(tokens, max(32, MEASURED_FLOPS / (2 * size_in * size_out))))
    weight = torch.randn(size_out, size_in)
    x = torch.randn(rows, size_in, dtype=dtype)
    gradient = torch.randn(rows, size_out, dtype=dtype)

    def layer():
        w = weight.to(dtype)                # as model.Linear does in every forward pass
        F.linear(x, w)                      # (rows, size_out)
        gradient @ w                        # (rows, size_in)
        gradient.T @ x                      # (size_out, size_in)

    return 3 * 2 * rows * size_in * size_out / seconds_of(layer)


def choose_training_dtype(device, wanted, tokens, size_in, size_out):
    """The dtype of activations -> (dtype, reason). Weights and optimizer state stay in fp32.

    wanted: "auto" or the name of a dtype. tokens: of one forward pass; size_in and size_out: of the
    model's largest linear layer. All processes come to the same result.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "--dtype"
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability()[0] >= 8:
            return torch.bfloat16, "this GPU has bfloat16 tensor cores"
        return torch.float32, "this GPU has no bfloat16 tensor cores"
    if device != "cpu":
        return torch.float32, f"bfloat16 has not been tried on {device}"
    barrier()                               # measure with all processes at work
    rates = [training_rate(dtype, tokens, size_in, size_out)
             for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = sum_over_ranks(*rates)
    reason = f"measured: {fp32 / 1e9:,.0f} GFLOP/s in float32, {bf16 / 1e9:,.0f} in bfloat16"
    return (torch.bfloat16 if bf16 > fp32 else torch.float32), reason


def inference_seconds(make_layer, size_in, size_out, copies):
    """Seconds to read PROMPT_TOKENS at once and write ANSWER_TOKENS one by one through `copies`
    linear layers. Prompts take arithmetic; answers read all weights for each token.

    make_layer(weight) -> (the layer as a function, the dtype of its input)."""
    layers = []
    for _ in range(copies):
        layer, dtype = make_layer(torch.randn(size_out, size_in))
        layers.append(layer)
    prompt = torch.randn(PROMPT_TOKENS, size_in, dtype=dtype)
    read = seconds_of(lambda: layers[0](prompt), rounds=3) * copies
    write = seconds_of(lambda: [layer(prompt[:1]) for layer in layers], rounds=3)
    return read + ANSWER_TOKENS * write


def choose_inference_dtype(device, stored, parameters, size_in, size_out, int8_layer=None):
    """The fastest dtype in which to run a checkpoint -> (dtype or "int8", reason).

    On a CPU the candidates are the stored one, float32 if it fits in memory, and int8 if int8_layer
    is given: a function that makes an 8-bit layer of a weight. parameters: how many the model has;
    size_in and size_out: of its largest linear layer.
    """
    if device != "cpu":
        return stored, "as stored"
    candidates = [stored]
    if stored != torch.float32 and 4 * parameters < available_bytes() / 2:
        candidates.append(torch.float32)
    if int8_layer:
        candidates.append("int8")
    if len(candidates) == 1:
        return stored, "as stored"
    size_in, size_out = min(size_in, LARGEST_SIDE), min(size_out, LARGEST_SIDE)
    copies = math.ceil(min(MEASURED_WEIGHTS, parameters) / (size_in * size_out))

    def maker(dtype):
        if dtype == "int8":
            return lambda weight: (int8_layer(weight), stored)
        return lambda weight: (functools.partial(F.linear, weight=weight.to(dtype)), dtype)

    with torch.inference_mode():
        seconds = {dtype: inference_seconds(maker(dtype), size_in, size_out, copies)
                   for dtype in candidates}
    fastest = min(seconds, key=seconds.get)
    ratios = [f"{str(dtype).removeprefix('torch.')} takes {seconds[dtype] / seconds[fastest]:.1f} "
              "times as long" for dtype in candidates if dtype != fastest]
    return fastest, "measured: " + ", ".join(ratios)
