"""Tokens per second and memory of a training step, with and without each speed-up.

    python tests/bench_training.py                      # on a GPU: 0.5B, sequences of 8,192
    python tests/bench_training.py --size tiny --seq-len 256 --rows 16 --forwards 1     # on a CPU

Random ids in packed documents, half of them shorter than 400 tokens. After one step to warm up, in
which torch.compile takes its time, the median of some is printed. MFU counts only the attention of
tokens that see each other.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from bench_kernels import document_starts  # noqa: E402

import pretrain  # noqa: E402
from model import CONFIGS, CausalLM, choose_attention, init_weights, parameter_count  # noqa: E402
from support.distributed import choose_training_dtype, default_device, memory  # noqa: E402

BASE = dict(dtype="auto", attention="auto", optimizer="muon", compile=True, checkpointing=False)
CHANGES = [{}, dict(optimizer="adamw"), dict(compile=False),
           dict(compile=False, attention="sdpa"), dict(compile=False, checkpointing=True),
           dict(compile=False, dtype="float32")]


def measure(args, device, settings):
    """Tokens per second, their share of the peak (MFU), and the seconds of the first step."""
    config = dataclasses.replace(CONFIGS[args.size], max_position_embeddings=args.seq_len)
    model = CausalLM(config)
    init_weights(model, 0)
    model.to(device).train()
    model.compute_dtype, _ = choose_training_dtype(
        device, settings["dtype"], args.rows * args.seq_len, config.hidden_size,
        config.intermediate_size)
    choose_attention(model, settings["attention"], args.seq_len)
    model.model.checkpointing = settings["checkpointing"]
    if settings["compile"]:
        for block in model.model.layers:
            block.compile()
    optimizers = pretrain.make_optimizers(model, settings["optimizer"])
    ids = torch.randint(config.vocab_size, (args.rows, args.seq_len + 1))
    starts = document_starts(args.rows, args.seq_len)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "document_starts": starts}
    tokens = args.forwards * args.rows * args.seq_len
    seconds = []
    for _ in range(args.steps + 1):
        begin = time.perf_counter()
        sums, _ = pretrain.one_step(model, optimizers, [batch] * args.forwards,
                                    pretrain.next_token_loss, tokens, 1e-4)
        float(sums["loss"])                                             # waits for the device
        seconds.append(time.perf_counter() - begin)
    speed = tokens / statistics.median(seconds[1:])
    visible = float((torch.arange(args.seq_len) - starts + 1).float().mean())   # keys of a query
    flops = pretrain.flops_per_token(config, parameter_count(model), 2 * visible)
    share = speed * flops / pretrain.matmul_rate(device, model.compute_dtype)
    return speed, share, seconds[0]


def main():
    parser = argparse.ArgumentParser(description="Measure a training step.")
    parser.add_argument("--size", choices=CONFIGS, default="0.5B")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--rows", type=int, default=4, help="sequences in a forward pass")
    parser.add_argument("--forwards", type=int, default=8, help="forward passes in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()
    device = pretrain.start_processes(args.device)
    print(f"{'changed':36}{'tokens/s':>10}{'MFU':>6}{'GB':>7}{'first step, s':>15}")
    for change in CHANGES:
        label = ", ".join(f"{name} {value}" for name, value in change.items()) or "nothing"
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        try:
            speed, share, seconds = measure(args, device, {**BASE, **change})
            print(f"{label:36}{speed:10,.0f}{share:6.0%}{memory():7.1f}{seconds:15.0f}")
        except torch.OutOfMemoryError:
            print(f"{label:36} out of memory")
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
