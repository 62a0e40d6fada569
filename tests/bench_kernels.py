"""Times of the kernels on this GPU, beside PyTorch's attentions for the same documents.

    python kernels.py bench             # one table; no case is begun after 7 minutes
    python kernels.py tiles             # other tiles for the attention kernels, the fastest first

Rates count the pairs of tokens that see each other: 4 H d FLOP each forward, 2.5 times that
backward. Every rate is also given as a share of a large matrix product's in the same run. What a
rival does not support is a dash; efficient gets its keys and values repeated for each query head.
"""

import argparse
import inspect
import itertools
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402
from kernels import (  # noqa: E402
    attention_mask,
    flash_attention,
    linear_cross_entropy,
    sdpa_attention,
)
from support.files import InputError, run  # noqa: E402

SECONDS = 420                   # after that no further case is begun
BF16 = torch.bfloat16
RIVALS = ("FLASH", "CUDNN", "EFFICIENT", "Flex", "varlen")
CASES = {                       # B, T, H, K, d, packed
    "causal 1k, 16 heads, d 128": (32, 1024, 16, 16, 128, False),
    "causal 8k, 16 heads, d 128": (4, 8192, 16, 16, 128, False),
    "causal 16k, 16 heads, d 128": (2, 16384, 16, 16, 128, False),
    "causal 8k, 1.5B (12/2, 128)": (4, 8192, 12, 2, 128, False),
    "causal 8k, 0.5B (14/2, 64)": (4, 8192, 14, 2, 64, False),
    "packed 32k, 1.5B (12/2, 128)": (1, 32768, 12, 2, 128, True),
    "packed 32k, 0.5B (14/2, 64)": (1, 32768, 14, 2, 64, True)}


def document_starts(B, T):
    """Documents of log-normal length, half of them shorter than 400 tokens: (B, T)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(B):
        lengths = (torch.randn(T, generator=generator) + 5.99).exp().long().clamp(1, T)
        ends = lengths.cumsum(0)
        starts = torch.cat([torch.zeros(1).long(), ends[ends < T]])
        rows.append(starts[torch.searchsorted(starts, torch.arange(T), right=True) - 1])
    return torch.stack(rows)


def attentions(B, T, H, K, starts):
    """name -> attend(q, k, v) for (B, T, heads, d): ours, and what PyTorch has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    mask = None if starts is None else attention_mask(starts, T, BF16)
    bounds = kernels.document_bounds(starts, B, T, torch.device("cuda"))
    index = torch.arange(T, device="cuda")
    first = index.new_zeros(B, T) if starts is None else starts

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return sdpa_attention(q, k, v, mask)
        return attend

    def efficient(q, k, v):
        k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa_attention(q, k, v, mask)

    def seen(b, h, i, j):
        return (j <= i) & (j >= first[b, i])

    blocks = create_block_mask(seen, B if starts is not None else None, None, T, T, device="cuda")
    torch._functorch.config.donated_buffer = False          # the backward is timed by itself
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=H != K).transpose(1, 2)

    places = torch.nonzero((first == index).flatten())[:, 0]
    places = torch.cat([places, places.new_tensor([B * T])]).int()
    longest = int(places.diff().max())

    def varlen(q, k, v):
        known = inspect.signature(varlen_attn).parameters       # torch 2.11 has no enable_gqa
        grouped = {"enable_gqa": H != K} if "enable_gqa" in known else {}
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(q, k, v, places, places, longest, longest, window_size=(-1, 0),
                           **grouped).unflatten(0, (B, T))

    return {"ours": lambda q, k, v: flash_attention(q, k, v, bounds),
            "FLASH": sdpa(SDPBackend.FLASH_ATTENTION), "CUDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
            "EFFICIENT": efficient, "Flex": flex, "varlen": varlen}


def milliseconds(call):
    import triton
    return triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")


def matmul_rate():
    """FLOP/s of a product of 8192 x 8192 random numbers."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=BF16)
    return 2 * 8192 ** 3 / milliseconds(lambda: a @ b) * 1e3


def inputs(B, T, H, K, d):
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [torch.randn(B, T, heads, d, device="cuda", dtype=BF16, generator=generator)
             for heads in (H, K, K, H)]
    return [x.requires_grad_() for x in parts[:3]], parts[3]


def both_ways(attend, parts, d_out):
    """Milliseconds forward and backward."""
    out = attend(*parts)
    return (milliseconds(lambda: attend(*parts)),
            milliseconds(lambda: torch.autograd.grad(out, parts, d_out, retain_graph=True)))


def bench_attention(name, peak):
    """Two lines of the table: TFLOP/s, ours as a share of the matrix product, over each rival."""
    B, T, H, K, d, packed = CASES[name]
    starts = document_starts(B, T).cuda() if packed else None
    first = torch.zeros(B, T).long().cuda() if starts is None else starts
    pairs = int((torch.arange(T, device="cuda") - first + 1).sum())
    parts, d_out = inputs(B, T, H, K, d)
    rates, found = {}, attentions(B, T, H, K, starts)
    ours = found["ours"](*parts).detach()
    for rival, attend in found.items():
        try:
            difference = float((attend(*parts).detach() - ours).abs().max())
            if difference > 0.05:
                raise ValueError(f"computes something else, differs by {difference:.2g}")
            forward, backward = both_ways(attend, parts, d_out)
            rates[rival] = (4 * H * d * pairs / forward / 1e9, 10 * H * d * pairs / backward / 1e9)
        except Exception as error:              # whatever a rival says of what it lacks
            print(f"  {name}, {rival}: {str(error).strip().splitlines()[0][:110]}")
            torch.cuda.empty_cache()
    rows = []
    for i, way in enumerate(("forward", "backward")):
        ours = rates["ours"][i]
        row = [f"{name:30}{way:9}{ours:8.0f}{ours * 1e12 / peak:8.0%}"]
        for rival in RIVALS:
            rate = rates.get(rival, [0, 0])[i]
            row.append(f"{rate:.0f} {ours / rate:.2f}x" if rate else "-")
        rows.append("".join(f"{cell:>14}" for cell in row))
    return rows


def all_logits(hidden, weight, targets):
    """The loss as usual, from all the logits at once."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()                 # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def bench_head(name, loss, hidden, weight, targets):
    """Milliseconds and peak memory of a loss and its gradients."""
    def run():
        torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    print(f"loss head, {name:22}{milliseconds(run):8.1f} ms {peak:8.2f} GB")


def bench():
    begin = time.time()
    device = torch.cuda.get_device_name()
    peak = matmul_rate()
    print(f"{device}, torch {torch.__version__}, bf16; matrix product {peak / 1e12:.0f} TFLOP/s")
    for D in (896, 1536):
        hidden = torch.randn(16384, D, device="cuda", dtype=BF16).requires_grad_()
        weight = (torch.randn(151936, D, device="cuda") * D ** -0.5).requires_grad_()
        targets = torch.randint(151936, (16384,), device="cuda")
        for name, loss in (("chunks", linear_cross_entropy),
                           ("all logits", all_logits)):
            bench_head(f"D {D}, {name}", loss, hidden, weight, targets)
    del hidden, weight
    rows = []
    for name in CASES:
        if time.time() - begin > SECONDS:
            print(f"  {name}: left out, {SECONDS} seconds are over")
            continue
        rows += bench_attention(name, peak)
    print("\nTFLOP/s; behind a rival's, how many times as fast ours is\n"
          f"{'':39}{'ours':>8}{'matmul':>8}" + "".join(f"{rival:>14}" for rival in RIVALS))
    print(*rows, sep="\n")
    print(f"matrix product afterwards {matmul_rate() / 1e12:.0f} TFLOP/s; "
          f"{time.time() - begin:.0f} s in all")


def tiles():
    """Time each attention kernel with other tiles on causal rows of 8k: what TILES should hold."""
    for H, K, d in ((14, 2, 64), (12, 2, 128)):
        parts, d_out = inputs(4, 8192, H, K, d)
        q, k, v = (x.detach().flatten(0, 1) for x in parts)
        start, end = kernels.document_bounds(None, 4, 8192, q.device)
        out, lse = kernels._attention(q, k, v, start, end)
        d_out, delta = d_out.flatten(0, 1), torch.zeros_like(lse)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        others = {"_forward": (H, q, k, v, out, lse, start),
                  "_dq": (H, q, k, v, out, d_out, dq, lse, delta, start),
                  "_dkdv": (K, q, k, v, d_out, dk, dv, lse, delta, start, end)}
        for kernel in others:
            kept, times = kernels.TILES[kernel, d], []
            for shape in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                kernels.TILES[kernel, d] = (shape,) * 4         # for whatever GPU this is
                try:
                    times.append((milliseconds(lambda: kernels._launch(
                        getattr(kernels, kernel), *others[kernel])), shape))
                except Exception:                               # too large for this GPU
                    continue
            kernels.TILES[kernel, d] = kept
            print(kernel, d, *(f"{shape} {ms:.2f} ms;" for ms, shape in sorted(times)[:6]))


def main():
    parser = argparse.ArgumentParser(description="Time the kernels on this GPU.")
    parser.add_argument("what", choices=["bench", "tiles"], help="bench: beside PyTorch's; tiles: "
                        "other tiles than those in kernels.TILES")
    what = parser.parse_args().what
    if not torch.cuda.is_available():
        raise InputError(f"{what}: needs a CUDA GPU, there is none here")
    bench() if what == "bench" else tiles()


if __name__ == "__main__":
    run(main)
