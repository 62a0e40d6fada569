r"""Attention, and the loss over a large vocabulary, without the tensors that outgrow memory.

Attention. For each query i of a document, over the keys j that it may see, start[i] <= j <= i:

    s[i,j] = q[i].k[j] / sqrt(d)      p[i,:] = softmax(s[i,:])      out[i] = sum_j p[i,j] v[j]

Computed this way, T x T scores are written to memory and read back. FlashAttention-2 (arXiv
2307.08691) avoids that. The GPU runs many copies of a kernel, called programs, in any order. Here
each program keeps a tile of queries on the chip, loops over tiles of keys, and rescales its partial
result whenever a larger score appears (online softmax; algorithm 1, lines 8 to 13):

    new   = max(top, max_j s[:,j])                   the largest score so far
    total = total * e^(top - new) + sum_j p[:,j]     where p = e^(s - new)
    out   = out   * e^(top - new) + p v              then top = new
    at the end: out / total, and lse = top + log(total), from which the backward pass recomputes p

Backward: the scores are recomputed, tile by tile. The derivative of softmax subtracts from dp[i,:]
its mean delta[i] = sum_j p[i,j] dp[i,j], which equals out[i].d_out[i]. One kernel loops over keys
for dq, one over queries for dk and dv, so no two programs add to the same sum:

    p  = e^(s - lse)      dp = d_out v^T            ds = p * (dp - delta)
    dv = p^T d_out        dk = ds^T q / sqrt(d)     dq = ds k / sqrt(d)

The mask is never stored as a matrix. A batch is one long sequence of documents. A tile of queries
visits the tiles of keys from the start of its first query's document to its last query:

    keys        first    full              after       stop
                  |        |                 |           |
    queries       | :xxxxxx|xxxxxxxxxxxxxxxxx|xx\        |    x  seen, as are : and \
    [q0, q0 + BQ) | :xxxxxx|xxxxxxxxxxxxxxxxx|xxxxxx\    |    :  the document's start
                  | :xxxxxx|xxxxxxxxxxxxxxxxx|xxxxxxxxxx\|    \  the query itself
                   boundary   no mask needed  boundary

If another document starts among the queries, no tile of keys is seen by all of them: full = after.

Loss. With a vocabulary of 151,936 the logits of 8,192 tokens take 5 GB in fp32, and their gradient
as much again. The fused linear cross-entropy never holds them all: a chunk of tokens at a time is
multiplied with the output layer, and its logits become log-probabilities and then, in place, their
gradient.

Without a GPU, plain PyTorch computes the same. This file knows nothing but tensors.

    python kernels.py bench     # on a GPU, against others; starts no case after 7 minutes

Read first: online_softmax, _forward, attention_reference, _dkdv, linear_cross_entropy
"""

import functools
import math
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = functools.partial(triton.jit, do_not_specialize=["T"])    # one build for every length
except ImportError:                                             # macOS
    triton, jit, tl = None, lambda kernel: kernel, SimpleNamespace(constexpr=None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # kernels run as Python, on the CPU
HEAD_DIMS, DTYPES = (64, 128), (torch.float32, torch.bfloat16, torch.float16)
LOG2E = math.log2(math.e)           # e^x = 2^(x log2 e): the chip computes powers of 2
PADDING = 128                       # START, END, LSE and DELTA are padded to whole tiles
EAGER_TOKENS = 2048                 # longest sequence for which eager attention is used on a CPU
SPLIT_BELOW = 1 << 15               # keys x key-value heads; with fewer, too few tiles of dk and dv
CHUNK_LOGITS = 1 << 22              # logits held at a time on a CPU: they fit its cache
CHUNK_ROWS = 4096                   # tokens whose logits are held at a time on a GPU
BLOCK = 4096                        # logits that a program reads at a time


# ------------------------------------------------------------------------------------------------
# Attention: the idea in plain Python


def online_softmax(scores, values, tile=4):
    """sum_j softmax(scores)[j] * values[j] for one query, reading a tile of keys at a time.

    This is the loop of _forward() for one query and one channel. A tile is never seen again, yet
    the result is exact: whenever a larger score appears, the sums so far are scaled down to it.
    scores, values: lists of floats; scores may be so large that e^score overflows.
    """
    top = -math.inf             # the largest score so far
    total = 0.0                 # sum of e^(score - top) so far
    out = 0.0                   # sum of e^(score - top) * value so far
    for first in range(0, len(scores), tile):
        s = scores[first:first + tile]
        new_top = max(top, *s)
        shrink = math.exp(top - new_top)                # e^-inf = 0 for the first tile
        p = [math.exp(score - new_top) for score in s]
        total = total * shrink + sum(p)
        out = out * shrink + sum(x * value for x, value in zip(p, values[first:first + tile]))
        top = new_top
    return out / total


# ------------------------------------------------------------------------------------------------
# Attention: kernels
#
# Q, K, V, OUT ... are pointers to tensors in memory, small letters their tiles on the chip. T: the
# tokens of the whole batch; TP: T padded; H: query heads, of which G share a key-value head.
# scale is log2(e) / sqrt(d): one multiplication scales the scores and turns e^x into 2^x, so top
# and lse are exponents of 2. A kernel is compiled once for each value of a constexpr.


@jit
def _load(x, first, stride, T, ROWS: tl.constexpr, d: tl.constexpr, EDGE: tl.constexpr):
    """Rows [first, first + ROWS) of one head of x: (ROWS, d). With EDGE, zeros from row T on."""
    row = first + tl.arange(0, ROWS)
    pointers = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, d)[None, :]
    if EDGE:
        tile = tl.load(pointers, mask=(row < T)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@jit
def _store(x, tile, first, stride, T, ROWS: tl.constexpr, d: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    pointers = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, d)[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=(row < T)[:, None])


@jit
def _dot(a, b, add=None):
    """a @ b + add on the tensor cores; fp32 as three matmuls in tf32, almost as exact."""
    return tl.dot(a, b, add, input_precision="tf32x3")


@jit
def _key_tiles(START, q0, T, BQ: tl.constexpr, BK: tl.constexpr):
    """The bounds of the keys that the queries [q0, q0 + BQ) see, as in the drawing above."""
    stop = tl.minimum(q0 + BQ, T)
    first = tl.load(START + q0) // BK * BK                  # the first query sees furthest back
    after = q0 // BK * BK                                   # up to here it sees whole tiles
    full = tl.minimum(tl.cdiv(tl.load(START + stop - 1), BK) * BK, after)
    return first, full, after, stop


@jit
def _query_tiles(END, k0, T, BQ: tl.constexpr, BK: tl.constexpr):
    """The bounds of the queries that see the keys [k0, k0 + BK): the drawing, transposed."""
    stop = tl.load(END + tl.minimum(k0 + BK, T) - 1)        # the last key is seen the longest
    first = k0 // BQ * BQ
    full = tl.cdiv(k0 + BK, BQ) * BQ                        # from here on every query follows all
    after = tl.maximum(tl.load(END + k0) // BQ * BQ, full)
    return first, full, after, stop


@jit
def _walk(first, full, after, stop, SIZE: tl.constexpr, EDGE: tl.constexpr):
    """The tiles of [full, after); with EDGE, those of [first, full) and then of [after, stop).
    -> (begin, before, skip, count): tile t begins at begin + t * SIZE (+ skip if t >= before)."""
    if EDGE:
        begin, before, skip = first, (full - first) // SIZE, after - full
        count = tl.cdiv(stop - first - skip, SIZE)
    else:
        begin, before, skip, count = full, 0, 0, (after - full) // SIZE
    return begin, before, skip, count


@jit
def _forward(Q, K, V, OUT, LSE, START, scale, q_stride, k_stride, v_stride, T, TP, H, G,
             d: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Program (head, tile of queries): out and lse. The last tiles, with most keys, are first."""
    head = tl.program_id(0)
    q0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    i = q0 + tl.arange(0, BQ)
    start = tl.load(START + i)
    q = _load(Q + head * d, q0, q_stride, T, BQ, d, True)
    out = tl.zeros([BQ, d], tl.float32)
    total = tl.zeros([BQ], tl.float32)
    top = tl.full([BQ], -1e30, tl.float32)      # finite: -inf - -inf would be NaN
    first, full, after, stop = _key_tiles(START, q0, T, BQ, BK)
    for EDGE in tl.static_range(2):             # tiles without a mask, then boundary tiles
        begin, before, skip, count = _walk(first, full, after, stop, BK, EDGE)
        for t in tl.range(0, count):
            k0 = begin + t * BK + tl.where(t < before, 0, skip)
            k = _load(K + head // G * d, k0, k_stride, T, BK, d, EDGE)
            s = _dot(q, tl.trans(k))                                    # (BQ, BK)
            if EDGE:
                j = k0 + tl.arange(0, BK)[None, :]
                s = tl.where((start[:, None] <= j) & (j <= i[:, None]), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(tl.fma(s, scale, -new_top[:, None]))
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = _load(V + head // G * d, k0, v_stride, T, BK, d, EDGE)
            out = _dot(p.to(v.dtype), v, out * shrink[:, None])         # (BQ, d)
            top = new_top
    total = tl.where(total > 0, total, 1)
    _store(OUT + head * d, out / total[:, None], q0, H * d, T, BQ, d)
    tl.store(LSE + head.to(tl.int64) * TP + i, top + tl.log2(total))


@jit
def _dq(Q, K, V, OUT, D_OUT, DQ, LSE, DELTA, START, scale, q_stride, k_stride, v_stride, T, TP, H,
        G, d: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Program (head, tile of queries), as in _forward: dq, and delta for _dkdv."""
    head = tl.program_id(0)
    q0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    i = q0 + tl.arange(0, BQ)
    start = tl.load(START + i)
    q = _load(Q + head * d, q0, q_stride, T, BQ, d, True)
    d_out = _load(D_OUT + head * d, q0, H * d, T, BQ, d, True)
    out = _load(OUT + head * d, q0, H * d, T, BQ, d, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row = head.to(tl.int64) * TP + i
    tl.store(DELTA + row, delta)
    lse = tl.load(LSE + row)
    dq = tl.zeros([BQ, d], tl.float32)
    first, full, after, stop = _key_tiles(START, q0, T, BQ, BK)
    for EDGE in tl.static_range(2):
        begin, before, skip, count = _walk(first, full, after, stop, BK, EDGE)
        for t in tl.range(0, count):
            k0 = begin + t * BK + tl.where(t < before, 0, skip)
            k = _load(K + head // G * d, k0, k_stride, T, BK, d, EDGE)
            p = tl.exp2(tl.fma(_dot(q, tl.trans(k)), scale, -lse[:, None]))     # (BQ, BK)
            if EDGE:
                j = k0 + tl.arange(0, BK)[None, :]
                p = tl.where((start[:, None] <= j) & (j <= i[:, None]), p, 0.0)
            v = _load(V + head // G * d, k0, v_stride, T, BK, d, EDGE)
            ds = p * (_dot(d_out, tl.trans(v)) - delta[:, None])
            dq = _dot(ds.to(k.dtype), k, dq)                                    # (BQ, d)
    _store(DQ + head * d, dq * d ** -0.5, q0, H * d, T, BQ, d)


@jit
def _dkdv(Q, K, V, D_OUT, DK, DV, LSE, DELTA, START, END, scale, q_stride, k_stride, v_stride,
          T, TP, H, G, d: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """Program (share, tile of keys): dk and dv, summed over the query heads of a share. A share is
    all query heads of a key-value head, or only one; then the caller adds the shares up."""
    share, shares = tl.program_id(0), tl.num_programs(0)
    kv_head = share * (H // shares) // G
    k0 = tl.program_id(1) * BK
    j = k0 + tl.arange(0, BK)[:, None]
    k = _load(K + kv_head * d, k0, k_stride, T, BK, d, True)
    v = _load(V + kv_head * d, k0, v_stride, T, BK, d, True)
    dk = tl.zeros([BK, d], tl.float32)
    dv = tl.zeros([BK, d], tl.float32)
    first, full, after, stop = _query_tiles(END, k0, T, BQ, BK)
    for EDGE in tl.static_range(2):
        begin, before, skip, count = _walk(first, full, after, stop, BQ, EDGE)
        for step in tl.range(0, count * (H // shares)):     # the same tiles for each query head
            head, t = share * (H // shares) + step // count, step % count
            row = head.to(tl.int64) * TP
            q0 = begin + t * BQ + tl.where(t < before, 0, skip)
            i = q0 + tl.arange(0, BQ)
            q = _load(Q + head * d, q0, q_stride, T, BQ, d, EDGE)
            lse, delta = tl.load(LSE + row + i), tl.load(DELTA + row + i)
            p = tl.exp2(tl.fma(_dot(k, tl.trans(q)), scale, -lse[None, :]))     # (BK, BQ)
            if EDGE:
                start = tl.load(START + i)[None, :]
                p = tl.where((start <= j) & (j <= i[None, :]), p, 0.0)
            d_out = _load(D_OUT + head * d, q0, H * d, T, BQ, d, EDGE)
            dv = _dot(p.to(d_out.dtype), d_out, dv)                             # (BK, d)
            ds = p * (_dot(v, tl.trans(d_out)) - delta[None, :])
            dk = _dot(ds.to(q.dtype), q, dk)                                    # (BK, d)
    _store(DK + share * d, dk * d ** -0.5, k0, shares * d, T, BK, d)
    _store(DV + share * d, dv, k0, shares * d, T, BK, d)


# ------------------------------------------------------------------------------------------------
# Attention: from a batch to the kernels

# Queries, keys, warps and stages by kernel and head_dim, for GPUs of these architectures; 86 means
# all with 99 KB of shared memory. Those of 90 were timed, the rest chosen by the compiler's figures
# (tests/compile_kernels.py).
ARCHITECTURES = (80, 86, 90, 100)
TILES = {
    ("_forward", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
    ("_forward", 128): ((128, 32, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
    ("_dq", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 3)),
    ("_dq", 128): ((64, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("_dkdv", 64): ((64, 128, 8, 3), (64, 128, 8, 3), (128, 64, 4, 2), (64, 128, 8, 2)),
    ("_dkdv", 128): ((64, 128, 8, 3), (32, 64, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2))}
FP32_TILES = {"_forward": (32, 32, 4, 1), "_dq": (32, 32, 8, 1), "_dkdv": (32, 32, 8, 1)}


class Bounds(NamedTuple):
    """What the tokens of a packed batch see, computed once for all layers: int32, (B*T padded,)."""

    start: Tensor       # where a query's document starts in the batch; for padding, past its end
    end: Tensor         # one after the last query that sees a key


def document_bounds(document_starts, B, T, device):
    """Concatenate B sequences: document_starts (B, T), or None for one document each -> Bounds."""
    index = torch.arange(-(-B * T // PADDING) * PADDING, device=device)
    start = index - index % T                               # the first token of its sequence
    if document_starts is not None:     # they never decrease within a sequence
        start[:B * T] += document_starts.flatten()
    start[B * T:] = index.shape[0]                                      # padding sees nothing
    end = torch.searchsorted(start, index, right=True)                  # queries with start <= key
    return Bounds(start.int(), end.int())


def why_not_triton(device, head_dim=HEAD_DIMS[0], dtype=DTYPES[0]):
    """Why the Triton kernels cannot run on the device; an empty string if they can."""
    if head_dim not in HEAD_DIMS or dtype not in DTYPES:
        return f"there are no kernels for head_dim {head_dim} in {dtype}"
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" or not torch.version.cuda:
        return "" if INTERPRETED else f"{device.type} is not a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0 (Ampere)"


def tile_sizes(kernel, d, dtype, device):
    """(queries, keys, warps, stages); a GPU not in the table gets the tiles of a small one."""
    if dtype == torch.float32:
        return FP32_TILES[kernel]
    major, minor = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    arch = 80 + minor if major == 8 else 10 * major
    return TILES[kernel, d][ARCHITECTURES.index(arch if arch in ARCHITECTURES else 86)]


def _launch(kernel, heads, q, k, v, *others):
    """Run a kernel with one program per (head, tile), with the arguments that all three take."""
    (T, H, d), TP = q.shape, others[-1].shape[0]
    q, k, v = (x if x.stride(2) == 1 and x.stride(1) == d else x.contiguous() for x in (q, k, v))
    BQ, BK, warps, stages = tile_sizes(kernel.__name__, d, q.dtype, q.device)
    with torch.cuda.device_of(q):
        kernel[heads, -(-T // (BK if kernel is _dkdv else BQ))](
            q, k, v, *others, d ** -0.5 * LOG2E, q.stride(0), k.stride(0), v.stride(0), T, TP, H,
            H // k.shape[1], d=d, BQ=BQ, BK=BK, num_warps=warps, num_stages=stages)


# Custom ops: torch.compile, FSDP2 and activation checkpointing treat each as one operation.
@torch.library.custom_op("minicoder::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor
               ) -> tuple[Tensor, Tensor]:
    """Packed q (T, H, d), k and v (T, K, d) -> out (T, H, d), lse (H, T padded)."""
    out, lse = _attention_shapes(q, k, v, start, end)
    _launch(_forward, q.shape[1], q, k, v, out, lse.zero_(), start)     # zero where no tile writes
    return out, lse


@_attention.register_fake
def _attention_shapes(q, k, v, start, end):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], start.shape[0], dtype=torch.float32)


@torch.library.custom_op("minicoder::attention_backward", mutates_args=())
def _attention_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor,
                        out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradient_shapes(d_out, q, k, v, start, end, out, lse)
    d_out, (T, H, d), K = d_out.contiguous(), q.shape, k.shape[1]
    delta = torch.zeros_like(lse)           # also for padding: NaN would spread
    if split := H > K and T * K < SPLIT_BELOW:
        dk, dv = (q.new_empty(q.shape, dtype=torch.float32) for _ in "kv")
    _launch(_dq, H, q, k, v, out, d_out, dq, lse, delta, start)
    _launch(_dkdv, H if split else K, q, k, v, d_out, dk, dv, lse, delta, start, end)
    if split:
        dk, dv = (x.view(T, K, H // K, d).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv


@_attention_backward.register_fake
def _gradient_shapes(d_out, q, k, v, start, end, out, lse):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_attention.register_autograd(
    lambda ctx, d_out, _: (*_attention_backward(d_out, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def attention_reference(q, k, v, start):
    """The reference implementation of the kernels, with all scores at once: q (T, H, d), k and v
    (T, K, d), Bounds.start -> (T, H, d)."""
    T, H, d = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))    # (T, H, d)
    index = torch.arange(T, device=q.device)
    seen = (start[:T, None] <= index) & (index <= index[:, None])           # (T, T)
    s = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * d ** -0.5      # (H, T, T)
    # if a start comes after its token, that sees nothing: out is 0 (softmax of -inf alone is NaN)
    p = s.masked_fill(~seen, -1e30).softmax(-1) * seen
    return torch.einsum("hij,jhd->ihd", p, v.float()).to(q.dtype)           # (T, H, d)


def flash_attention(q, k, v, document_starts=None):
    """Causal grouped-query attention within documents: q (B, T, H, d), k, v (B, T, K, d) -> as q.

    document_starts (B, T): the index in its sequence at which each token's document starts; or the
    Bounds that document_bounds() computed from it; None: every sequence is one document. Views of
    one fused projection are read without a copy. Without a GPU the reference implementation runs,
    which holds H (B T)^2 scores. ValueError says what does not fit.
    """
    _check(q, k, v, document_starts)
    bounds = document_starts
    if not isinstance(bounds, Bounds):
        bounds = document_bounds(bounds, *q.shape[:2], q.device)
    packed = [x.flatten(0, 1) for x in (q, k, v)]                       # (B * T, heads, d)
    if why_not_triton(q.device):
        return attention_reference(*packed, bounds.start).view(q.shape)
    return _attention(*packed, *bounds)[0].view(q.shape)


def _check(q, k, v, starts):
    """Raise ValueError unless flash_attention() can take these."""
    if isinstance(starts, Bounds):
        others, fits = starts, 0 <= starts.start.shape[0] - q.shape[0] * q.shape[1] < PADDING
    else:
        others = () if starts is None else (starts,)
        fits = all(x.shape == q.shape[:2] and x.dtype in (torch.int32, torch.int64) for x in others)
    if not (fits and q.dim() == k.dim() == 4 and q.numel() and k.numel() and k.shape == v.shape
            and q.shape[:2] == k.shape[:2] and q.shape[2] % k.shape[2] == 0
            and q.shape[3] == k.shape[3] and q.shape[3] in HEAD_DIMS
            and q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
            and all(x.device == q.device for x in (k, v, *others))):
        given = zip(("q", "k", "v", "document_starts"), (q, k, v, *others))
        words = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} {x.device}" for name, x in given)
        raise ValueError(f"attention: got {words}; accepted: q (B, T, H, d), k and v (B, T, K, d), "
                         f"K divides H, d in {HEAD_DIMS}, one device and one dtype of {DTYPES}, "
                         "document_starts (B, T) integers")


# ------------------------------------------------------------------------------------------------
# Attention without Triton, and the choice


def sdpa_attention(q, k, v, mask=None):
    """The same, by PyTorch. Without a mask it is causal, and T must be S or 1."""
    B, T, H, d = q.shape
    K = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)                             # (B, K, S, d)
    if T == 1:
        # The queries of a group see the same keys, so they can take the place of positions. Each
        # key is then read once for all of them: ten times as fast on a CPU in bf16.
        q = q.view(B, K, H // K, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, 1, H, d)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != K)
    return out.transpose(1, 2)                                              # (B, T, H, d)


def attention_mask(document_starts, S, dtype):
    """The mask to add to the scores: document_starts (B, T) -> (B, 1, T, S).

    The queries are the last T of S positions, from the first of which document_starts count. Each
    attends to the positions from the start of its document up to itself.
    """
    T = document_starts.shape[1]
    position = torch.arange(S, device=document_starts.device)
    causal = position <= position[S - T:, None]                             # (T, S)
    same_document = position >= document_starts[:, :, None]                 # (B, T, S)
    mask = torch.zeros(same_document.shape, dtype=dtype, device=position.device)
    return mask.masked_fill_(~(causal & same_document), float("-inf"))[:, None]


def attention_path(device, head_dim, dtype, T, requested="auto"):
    """Which attention suits sequences of T tokens -> ("triton", "eager" or "sdpa", the reason)."""
    if requested != "auto":
        return requested, "--attention"
    problem = why_not_triton(device, head_dim, dtype)
    if not problem:
        return "triton", "this GPU runs the kernels"
    if device.type == "cpu" and T <= EAGER_TOKENS:
        return "eager", "fastest for short sequences on a CPU"
    return "sdpa", problem


# ------------------------------------------------------------------------------------------------
# Fused linear cross-entropy


@jit
def _log_probabilities(LOGITS, TARGETS, SCALE, OUT, COLUMNS, GRADIENT: tl.constexpr,
                       BLOCK: tl.constexpr):
    """Program (row of logits): the log-probability of its target. With GRADIENT, the gradient of
    -scale * log-probability overwrites the logits. Each of BLOCK lanes keeps an online softmax of
    its columns; they are combined after the loop."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * COLUMNS
    target = tl.load(TARGETS + row)
    has_target = target != -100
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, COLUMNS, BLOCK):
        column = first + lane
        x = tl.load(LOGITS + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, x)
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    best = tl.max(top, 0)
    lse = best + tl.log(tl.sum(total * tl.exp(top - best), 0))
    inside = (target >= 0) & (target < COLUMNS)         # other targets give NaN
    picked = tl.load(LOGITS + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(OUT + row, tl.where(has_target, picked - lse, 0.0))
    if GRADIENT:
        tl.debug_barrier()                  # all lanes have read `picked` before it is overwritten
        scale = tl.where(has_target, tl.load(SCALE + row), 0.0)
        for first in tl.range(0, COLUMNS, BLOCK):
            column = first + lane
            x = tl.load(LOGITS + column, mask=column < COLUMNS, other=0.0)
            p = tl.exp(x.to(tl.float32) - lse) - tl.where(column == target, 1.0, 0.0)
            tl.store(LOGITS + column, (p * scale).to(x.dtype), mask=column < COLUMNS)


def log_probabilities_reference(logits, targets, scale=None):
    """The reference implementation of log_probabilities()."""
    x = logits.float()
    has_target = targets != -100
    index = targets.clamp(min=0)[:, None]                                   # (N, 1)
    top, picked = x.amax(-1, keepdim=True), x.gather(1, index)              # (N, 1)
    powers = x.sub_(top).exp_()         # logits, powers and gradient share one buffer
    total = powers.sum(-1, keepdim=True)
    out = (picked - top - total.log())[:, 0] * has_target
    if scale is None:
        return out, None
    scale = (scale * has_target)[:, None]
    gradient = powers.mul_(scale / total).scatter_add_(1, index, -scale)
    return out, gradient.to(logits.dtype)


def log_probabilities(logits, targets, scale=None):
    """Log-probabilities of targets (N,), 0 for a target of -100 -> (log-probabilities, gradient).

    With scale (N,), gradient (N, V) is that of -(scale * log-probabilities).sum() for the logits;
    without, ignore it. The memory of the logits may be reused: do not read them afterwards.
    """
    if why_not_triton(logits.device):
        return log_probabilities_reference(logits, targets, scale)
    out = logits.new_empty(targets.shape, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _log_probabilities[len(targets),](logits, targets.contiguous(), scale, out, logits.shape[1],
                                          GRADIENT=scale is not None, BLOCK=BLOCK, num_warps=8)
    return out, logits                      # with scale, the kernel has put the gradient there


@torch.library.custom_op("minicoder::linear_log_probabilities", mutates_args=())
def _linear_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor,
                              scale: Tensor | None = None, frozen: bool = False
                              ) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, a chunk of tokens at a time: (N, D), (V, D), (N,) -> (N,).

    With scale (N,) also the gradients of -(scale * log-probabilities).sum() for hidden and, unless
    it is frozen, for weight; without, these have no rows.
    """
    out, d_hidden, d_weight = (x.zero_() for x in _linear_shapes(hidden, weight, targets, scale,
                                                                 frozen))
    d_weight, w, V = d_weight.float(), weight.to(hidden.dtype), len(weight)
    if why_not_triton(hidden.device):                   # skip targets of -100
        chunks = (targets != -100).nonzero()[:, 0].split(max(1, CHUNK_LOGITS // V))
    else:                                               # counting them would wait for the GPU
        chunks = [slice(i, i + CHUNK_ROWS) for i in range(0, len(hidden), CHUNK_ROWS)]
    for chunk in chunks:
        x = hidden[chunk]
        logits = x @ w.t()                                                  # (rows, V)
        out[chunk], gradient = log_probabilities(logits, targets[chunk],
                                                None if scale is None else scale[chunk])
        if scale is not None:
            d_hidden[chunk] = gradient @ w                                  # (rows, D)
            if not frozen:
                d_weight += gradient.t() @ x                                # (V, D)
        del logits, gradient            # before the next chunk's are computed
    return out, d_hidden, d_weight.to(weight.dtype)


@_linear_log_probabilities.register_fake
def _linear_shapes(hidden, weight, targets, scale=None, frozen=False):
    """Empty results: what torch.compile sees, and the buffers to fill."""
    out = hidden.new_empty(targets.shape, dtype=torch.float32)
    no_rows, all_rows = slice(0), slice(None)
    d_hidden = torch.empty_like(hidden[no_rows if scale is None else all_rows])
    d_weight = torch.empty_like(weight[no_rows if scale is None or frozen else all_rows])
    return out, d_hidden, d_weight


class _LinearCrossEntropy(torch.autograd.Function):
    """All losses share one incoming gradient, d_loss. So the forward pass already computes the
    gradients of hidden and weight, and the backward pass only multiplies them by it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        scale = torch.ones_like(targets).float()
        ctx.frozen = not ctx.needs_input_grad[1]
        out, *gradients = _linear_log_probabilities(hidden, weight, targets, scale, ctx.frozen)
        ctx.save_for_backward(*gradients)
        return -out.sum()

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss, None if ctx.frozen else d_weight * d_loss, None


class _LinearLogProbabilities(torch.autograd.Function):
    """Each target has its own incoming gradient, so the backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.frozen = not ctx.needs_input_grad[1]
        return _linear_log_probabilities(hidden, weight, targets)[0]

    @staticmethod
    def backward(ctx, d_out):
        _, d_hidden, d_weight = _linear_log_probabilities(*ctx.saved_tensors, -d_out, ctx.frozen)
        return d_hidden, None if ctx.frozen else d_weight, None


def linear_cross_entropy(hidden, weight, targets):
    """Sum of the next-token losses in nats: hidden (N, D), weight (V, D), targets (N,) -> ().

    Targets of -100 are skipped. Matmuls in hidden's dtype, softmax in fp32, no second derivative.
    """
    if not torch.is_grad_enabled():                         # evaluation: no gradient
        return -linear_log_probabilities(hidden, weight, targets).sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def linear_log_probabilities(hidden, weight, targets):
    """Log-probability of each target, 0 where it is -100: (N, D), (V, D), (N,) -> (N,) in fp32."""
    return _LinearLogProbabilities.apply(hidden, weight, targets)


if __name__ == "__main__":
    import runpy
    runpy.run_path(__file__.replace("kernels.py", "tests/bench_kernels.py"), run_name="__main__")
