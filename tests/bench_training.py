"""Tokens a second, share of the peak and memory of a training step, with and without each speed-up.

    python tests/bench_training.py                      # on a GPU: 0.5B, rows of 8,192
    python tests/bench_training.py --size tiny --seq-len 256 --rows 16      # on a CPU; 3 minutes

Random ids, one step for warming up (torch.compile takes its time there), then the median of some.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from model import CONFIGS, CausalLM, choose_attention, init_weights, parameter_count  # noqa: E402
from pretrain import (  # noqa: E402
    choose_dtype,
    default_device,
    flops_per_token,
    make_optimizers,
    matmul_rate,
    memory,
    next_token_loss,
    one_step,
    print_table,
    start_processes,
)

BASE = dict(dtype="auto", attention="auto", optimizer="muon", compile=True, checkpointing=False)
CHANGES = [{}, dict(compile=False), dict(compile=False, attention="sdpa"),
           dict(compile=False, dtype="float32"), dict(compile=False, optimizer="adamw"),
           dict(compile=False, checkpointing=True)]


def measure(args, device, setting):
    """A row of the table: what differs from BASE, tokens/s, MFU, GB, and the first step's time."""
    config = dataclasses.replace(CONFIGS[args.size], max_position_embeddings=args.seq_len)
    model = CausalLM(config)
    init_weights(model, 0)
    model.to(device).train()
    model.compute_dtype, _ = choose_dtype(device, setting["dtype"])
    choose_attention(model, setting["attention"], args.seq_len)
    model.model.checkpointing = setting["checkpointing"]
    if setting["compile"]:
        for block in model.model.layers:
            block.compile()
    ids = torch.randint(config.vocab_size, (args.rows, args.seq_len + 1))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "document_starts": None}
    optimizers, seconds = make_optimizers(model, setting["optimizer"]), []
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        sums, _ = one_step(model, optimizers, [batch], next_token_loss, ids[:, 1:].numel(), 1e-4)
        float(sums["loss"])                                             # waits for the device
        seconds.append(time.perf_counter() - start)
    speed = args.rows * args.seq_len / statistics.median(seconds[1:])
    share = speed * flops_per_token(config, parameter_count(model), args.seq_len) / matmul_rate(
        device, model.compute_dtype)
    words = ", ".join(f"{name} {value}" for name, value in setting.items() if value != BASE[name])
    return [words or "all", f"{speed:,.0f}", f"{share:.0%}", f"{memory():.1f}", f"{seconds[0]:.0f}"]


def main():
    parser = argparse.ArgumentParser(description="Measure a training step.")
    parser.add_argument("--size", choices=CONFIGS, default="0.5B")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens per row")
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()
    device = start_processes(args.device)
    rows = [["changed", "tokens/s", "MFU", "GB", "first step, s"]]
    for change in CHANGES:
        rows.append(measure(args, device, {**BASE, **change}))
        gc.collect()
        torch._dynamo.reset()
    print_table(rows)


if __name__ == "__main__":
    main()
