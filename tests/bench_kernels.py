"""Time the kernels on this GPU, next to PyTorch's attention on the same documents.

    python kernels.py bench             # one table; begins no case after 7 minutes
    python kernels.py tiles             # other tiles for the attention kernels, the fastest first

Rates count the pairs of tokens that see each other: 4 H d FLOP each in the forward pass, 2.5 times
that in the backward pass. A dash: that implementation does not support the case.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402
from kernels import flash_attention, linear_cross_entropy, sdpa_attention  # noqa: E402
from support.files import InputError, run  # noqa: E402

SECONDS = 420                   # after that no further case is begun
BF16 = torch.bfloat16
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
    sequences = []
    for _ in range(B):
        lengths = (torch.randn(T, generator=generator) + 5.99).exp().long().clamp(1, T)
        ends = lengths.cumsum(0)
        starts = torch.cat([torch.zeros(1).long(), ends[ends < T]])
        sequences.append(starts[torch.searchsorted(starts, torch.arange(T), right=True) - 1])
    return torch.stack(sequences)


def milliseconds(function):
    import triton
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def matmul_rate():
    """FLOP/s of a product of two 8192 x 8192 matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=BF16)
    return 2 * 8192 ** 3 / milliseconds(lambda: a @ b) * 1e3


def inputs(B, T, H, K, d):
    """q, k, v that need gradients, and d_out."""
    generator = torch.Generator("cuda").manual_seed(0)
    *parts, d_out = [torch.randn(B, T, heads, d, device="cuda", dtype=BF16, generator=generator)
                     for heads in (H, K, K, H)]
    return [x.requires_grad_() for x in parts], d_out


def implementations(starts, packed):
    """name -> attend(q, k, v): ours, and those of PyTorch that take the documents of starts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = starts.shape
    bounds = kernels.document_bounds(starts, B, T, starts.device)
    mask = kernels.attention_mask(starts, T, BF16) if packed else None

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return sdpa_attention(q, k, v, mask)
        return attend

    def visible(b, h, i, j):
        return (j <= i) & (j >= starts[b, i])

    block_mask = create_block_mask(visible, B if packed else None, None, T, T, device="cuda")
    torch._functorch.config.donated_buffer = False          # the backward pass is timed by itself
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v):
        enable_gqa = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa).transpose(1, 2)

    return {"ours": lambda q, k, v: flash_attention(q, k, v, bounds),
            "flash": sdpa(SDPBackend.FLASH_ATTENTION), "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
            "flex": flex}


def bench_attention(name):
    """Print TFLOP/s of the forward and the backward pass, one line for each implementation."""
    B, T, H, K, d, packed = CASES[name]
    starts = document_starts(B, T) if packed else torch.zeros(B, T).long()
    pairs = int((torch.arange(T) - starts + 1).sum())
    parts, d_out = inputs(B, T, H, K, d)
    expected = flash_attention(*parts, starts.cuda()).detach()
    print(name)
    for label, attend in implementations(starts.cuda(), packed).items():
        try:
            out = attend(*parts)
            if float((out.detach() - expected).abs().max()) > 0.05:
                raise ValueError("differs from ours")
            forward = milliseconds(lambda: attend(*parts))
            backward = milliseconds(
                lambda: torch.autograd.grad(out, parts, d_out, retain_graph=True))
            print(f"    {label:8}{4 * H * d * pairs / forward / 1e9:8.0f} forward"
                  f"{10 * H * d * pairs / backward / 1e9:8.0f} backward", flush=True)
        except Exception as error:              # each implementation has its own errors
            print(f"    {label:8}       - {str(error).strip().splitlines()[0][:80]}", flush=True)
            torch.cuda.empty_cache()


def unfused_loss(hidden, weight, targets):
    """The same loss from all logits at once."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()                 # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def bench_loss(D):
    """Print milliseconds and peak memory of the loss and its gradients."""
    hidden = torch.randn(16384, D, device="cuda", dtype=BF16).requires_grad_()
    weight = (torch.randn(151936, D, device="cuda") * D ** -0.5).requires_grad_()
    targets = torch.randint(151936, (16384,), device="cuda")
    for loss in (linear_cross_entropy, unfused_loss):
        def gradients():
            torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

        gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        print(f"{loss.__name__}, D {D}: {milliseconds(gradients):.1f} ms, {peak:.2f} GB")


def bench():
    begin = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; TFLOP/s; "
          f"matmul {matmul_rate() / 1e12:.0f}")
    for D in (896, 1536):
        bench_loss(D)
    for name in CASES:
        if time.time() - begin < SECONDS:
            bench_attention(name)
    print(f"matmul afterwards {matmul_rate() / 1e12:.0f}")


def tiles():
    """Time each attention kernel with other tiles on causal sequences of 8k, to choose TILES."""
    for H, K, d in ((14, 2, 64), (12, 2, 128)):
        parts, d_out = inputs(4, 8192, H, K, d)
        q, k, v = (x.detach().flatten(0, 1) for x in parts)
        start, end = kernels.document_bounds(None, 4, 8192, q.device)
        out, lse = kernels._attention(q, k, v, start, end)
        d_out, delta = d_out.flatten(0, 1), torch.zeros_like(lse)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        arguments = {"_forward": (H, q, k, v, out, lse, start),
                     "_dq": (H, q, k, v, out, d_out, dq, lse, delta, start),
                     "_dkdv": (K, q, k, v, d_out, dk, dv, lse, delta, start, end)}
        for name in arguments:
            original, times = kernels.TILES[name, d], []
            for shape in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                kernels.TILES[name, d] = (shape,) * 4           # whichever GPU this is
                try:
                    times.append((milliseconds(lambda: kernels._launch(
                        getattr(kernels, name), *arguments[name])), shape))
                except Exception:                               # too large for this GPU
                    continue
            kernels.TILES[name, d] = original
            print(name, d, *(f"{shape} {ms:.2f} ms;" for ms, shape in sorted(times)[:6]))


def main():
    parser = argparse.ArgumentParser(description="Time the kernels on this GPU.")
    parser.add_argument("what", choices=["bench", "tiles"], help="bench: next to PyTorch's; tiles: "
                        "other tiles than those in kernels.TILES")
    what = parser.parse_args().what
    if not torch.cuda.is_available():
        raise InputError(f"{what}: needs a CUDA GPU, there is none here")
    if what == "bench":
        bench()
    else:
        tiles()


if __name__ == "__main__":
    run(main)
