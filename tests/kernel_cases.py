"""The Triton kernels themselves: on a GPU where there is one, else in Triton's interpreter.

    pytest tests/kernel_cases.py                              # on a GPU
    TRITON_INTERPRET=1 pytest tests/kernel_cases.py           # on a CPU
    CASES=256 TRITON_INTERPRET=1 pytest tests/kernel_cases.py -k random

test_kernels.py runs one of the first two in a process of its own: the interpreter changes all of
Triton. It is made strict here: bf16 rounds as hardware does, no access may leave the tensors that a
kernel was given, and memory that nobody wrote holds NaN.
"""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import (
    Bounds,
    document_bounds,
    flash_attention,
    linear_cross_entropy,
    linear_log_probabilities,
)
from model import CausalLM, Config, generate, init_weights

# numpy warns of 2^x = inf where the mask then puts 0, and of rows past the last, never stored
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("_forward", "_dq", "_dkdv")
if kernels.why_not_triton(torch.device(DEVICE)):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
torch.use_deterministic_algorithms(True, warn_only=True)        # new memory is filled with NaN
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # SDPA's math stays in the dtype

# ------------------------------------------------------------------------------------------------
# A strict interpreter

if kernels.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock = {name: getattr(builder, name)
             for name in ("cast_impl", "create_dot", "create_masked_load", "create_masked_store")}
    stock_arguments, allowed = executor._init_args_hst, []

    def cast(self, source, wanted):
        """fp32 to bf16 to the nearest, ties to even; the interpreter cuts the bits off."""
        if source.dtype.scalar != tl.float32 or wanted.scalar != tl.bfloat16:
            return stock["cast_impl"](self, source, wanted)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        bits = np.where(np.isnan(source.data), bits | 0x400000, rounded)
        return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    def dot(self, a, b, *rest):
        """bf16 products; the interpreter multiplies their bits as if they were whole numbers."""
        a, b = (stock["cast_impl"](self, x, tl.float32) if x.dtype == tl.bfloat16 else x
                for x in (a, b))
        return stock["create_dot"](self, a, b, *rest)

    def arguments(self, args, kwargs):
        """Note from where to where each tensor of this launch goes."""
        allowed[:] = [(x.data_ptr(), x.data_ptr() + x.element_size() * (1 + sum(
            (size - 1) * stride for size, stride in zip(x.shape, x.stride()))))
            for x in args if torch.is_tensor(x)]
        return stock_arguments(self, args, kwargs)

    def check(pointers, mask):
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        low, high = (int(used.min()), int(used.max())) if used.size else (0, 0)
        assert not used.size or any(a <= low and high < b for a, b in allowed), "out of bounds"

    def load(self, pointers, mask, *rest):
        check(pointers, mask)
        return stock["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return stock["create_masked_store"](self, pointers, value, mask, *rest)

    builder.cast_impl, builder.create_dot, executor._init_args_hst = cast, dot, arguments
    builder.create_masked_load, builder.create_masked_store = load, store


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 to 64 in the interpreter, so that short rows have many; a GPU keeps its own."""
    def choose(rng):
        for kernel in KERNELS if kernels.INTERPRETED else ():
            tile = (rng.choice((16, 32, 64)), rng.choice((16, 32, 64)), 4, 2)
            monkeypatch.setitem(kernels.FP32_TILES, kernel, tile)
            monkeypatch.setattr(kernels, "SPLIT_BELOW", rng.choice((0, 1 << 15)))
            for d in kernels.HEAD_DIMS:
                monkeypatch.setitem(kernels.TILES, (kernel, d), (tile,) * 4)

    choose(random.Random(0))
    return choose


# ------------------------------------------------------------------------------------------------
# What is right


def starts_from_lengths(lengths):
    return torch.tensor([start for start, n in zip(np.cumsum([0, *lengths]), lengths)
                         for _ in range(n)])


def random_starts(rng, T):
    """One document, single tokens, or documents of random length."""
    share = rng.choice((0, 0, 0.02, 0.1, 0.5, 1))
    starts = [0]
    for i in range(1, T):
        starts.append(i if rng.random() < share else starts[-1])
    return torch.tensor(starts)


def make(B, T, H, K, d, dtype=torch.float32, seed=0, scale=1.0, fused=False):
    """q, k, v that need gradients, and d_out; fused: as views of one projection."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(B, T, (H + 2 * K) * d, generator=generator)
    flat[..., :H * d] *= scale
    flat = flat.to(DEVICE, dtype)
    parts = [x.unflatten(-1, (-1, d)) for x in flat.split([H * d, K * d, K * d], dim=-1)]
    parts = [(x if fused else x.contiguous()).detach().requires_grad_() for x in parts]
    return parts, torch.randn(B, T, H, d, generator=generator).to(DEVICE, dtype)


def visible(starts, T):
    index = torch.arange(T, device=starts.device)
    return (starts[:, :, None] <= index) & (index <= index[:, None])           # (B, T, T)


def by_sdpa(parts, d_out, starts, dtype):
    """out and gradients by PyTorch's plain path in a dtype."""
    parts = [x.detach().to(dtype).transpose(1, 2).requires_grad_() for x in parts]
    mask = visible(starts, d_out.shape[1])[:, None]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    grads = torch.autograd.grad(out, parts, d_out.to(dtype).transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *grads)]


def by_kernels(parts, d_out, starts):
    out = flash_attention(*parts, starts)
    return [out.detach(), *torch.autograd.grad(out, parts, d_out)]


def error(x, exact, size):
    """Relative, but to no less than half of `size`: dq and dk of short documents vanish."""
    return float((x - exact).norm() / max(exact.norm(), 0.5 * size * x.numel() ** 0.5))


SLACK = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}    # where SDPA is exact


def assert_right(parts, d_out, starts, scale=1, lse_error=1):
    """Within twice the error that SDPA makes in the same dtype; float64 is the truth.

    scale: that of q, to which dk is proportional. lse_error: lse is an fp32 number as large as the
    scores, and every p that the backward makes again has its rounding; SDPA keeps p.
    """
    starts = starts.to(DEVICE).expand(d_out.shape[:2])
    exact = by_sdpa(parts, d_out, starts, torch.float64)
    plain = by_sdpa(parts, d_out, starts, d_out.dtype)
    ours = by_kernels(parts, d_out, starts)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), ours, plain, exact):
        assert x.isfinite().all(), name
        size, slack = (scale if name == "dk" else 1), SLACK[d_out.dtype]
        if name == "dv" and d_out.dtype == torch.float32:
            slack *= max(lse_error, scale / 5)
        found, others = error(x, z, size), error(y, z, size)
        print(f"{name} {found:.2e} {others:.2e}", end="  ")
        assert found <= 2 * others + slack, (name, found, others)


# ------------------------------------------------------------------------------------------------
# Attention

CASES = int(os.environ.get("CASES", 12))


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed, small_tiles):
    rng = random.Random(seed)
    small_tiles(rng)
    T, B = int(2 ** rng.uniform(0, 7.3 if kernels.INTERPRETED else 11)), rng.choice((1, 1, 2, 3))
    H, K = rng.choice(((1, 1), (2, 2), (4, 2), (3, 1), (6, 2)))
    d, dtype = rng.choice((64, 64, 128)), rng.choice(kernels.DTYPES)
    scale, fused = rng.choice((1, 1, 30)), rng.random() < 0.5
    parts, d_out = make(B, T, H, K, d, dtype, seed, scale, fused)
    starts = torch.stack([random_starts(rng, T) for _ in range(B)])
    assert_right(parts, d_out, starts.to(rng.choice((torch.int32, torch.int64))), scale)


LENGTHS = {"single tokens": [1] * 130, "on the edge of a tile": [64, 64, 32],
           "one before it": [63, 64, 33], "one behind it": [65, 64, 31],
           "one long among short": [3] * 20 + [150] + [2] * 20, "edge at the end": [1, 127]}


@pytest.mark.parametrize("name", LENGTHS)
def test_document_layouts(name):
    starts = starts_from_lengths(LENGTHS[name])
    assert_right(*make(1, len(starts), 2, 1, 64, fused=True), starts[None])


@pytest.mark.parametrize("T,d", [(1, 64), (2, 128), (15, 64), (16, 128), (17, 64), (63, 128),
                                 (64, 64), (65, 128), (127, 64), (128, 128), (129, 64), (257, 128)])
def test_lengths_with_the_tiles_of_the_table(T, d):
    dtype = (torch.bfloat16, torch.float16)[T % 2]
    assert_right(*make(1, T, 2, 1, d, dtype), torch.zeros(1, T, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("T,H,K", [(1000, 14, 2), (1000, 12, 2), (4097, 1, 1)])
def test_long_rows(T, H, K):
    rng = random.Random(T)
    starts = starts_from_lengths([rng.randint(1, 200) for _ in range(T)])[None, :T]
    assert_right(*make(1, T, H, K, 64, torch.bfloat16), starts)


@pytest.mark.parametrize("kind", ["large", "equal", "one key wins"])
def test_extreme_scores(kind, small_tiles):
    parts, d_out = make(1, 70, 2, 1, 64, scale=1000 if kind == "large" else 1)
    q, k, v = (x.detach() for x in parts)
    if kind == "equal":
        k[:] = k[:, :1]
    if kind == "one key wins":
        k[:, 3] = 40 * q[:, 60, :1]
    parts = [x.requires_grad_() for x in (q, k, v)]
    assert_right(parts, d_out, torch.zeros(1, 70, dtype=torch.long),
                 1000 if kind == "large" else 1, lse_error=10 if kind == "one key wins" else 1)


def test_rows_that_see_nothing_give_zeros(small_tiles):
    parts, d_out = make(1, 80, 2, 1, 64)
    starts = torch.zeros(1, 80, dtype=torch.long, device=DEVICE)
    starts[:, 20:50] = 50                       # the tokens from 20 to 49 do not see themselves
    starts[:, 50:] = 50
    starts[:, 75:] = 80                         # and the last five see nothing either
    out, dq, dk, dv = by_kernels(parts, d_out, starts)
    for blind in (slice(20, 50), slice(75, 80)):
        for x in (out, dq, dk, dv):
            assert not x[:, blind].any()
    exact = by_sdpa(parts, d_out, starts.clamp(max=torch.arange(80, device=DEVICE)), torch.float64)
    for x, y in zip((out, dq, dk, dv), exact):
        for part in (slice(0, 20), slice(50, 75)):
            assert torch.allclose(x[:, part].double(), y[:, part], atol=1e-5)


def test_nothing_behind_the_last_row_leaks(small_tiles):
    """What stands in memory behind a view's last row is NaN, and no access reaches it."""
    parts, d_out = make(1, 37, 2, 1, 64)
    larger = [torch.full((1, 128, *x.shape[2:]), float("nan"), device=DEVICE) for x in parts]
    views = [big[:, :37] for big in larger]
    for view, x in zip(views, parts):
        view.copy_(x.detach())
    assert_right([view.requires_grad_() for view in views], d_out, torch.zeros(1, 37).long())


def test_strides_of_the_inputs_do_not_matter(small_tiles):
    parts, d_out = make(2, 40, 4, 2, 64)
    wanted = by_kernels(parts, d_out, None)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
              for x in parts]
    for x, y in zip(by_kernels(turned, d_out, None), wanted):
        assert torch.equal(x, y)
    same = torch.randn(1, 1, 4, 64, device=DEVICE).expand_as(d_out)     # an expanded gradient
    for x, y in zip(by_kernels(parts, same, None), by_kernels(parts, same.contiguous(), None)):
        assert torch.equal(x, y)


def test_packed_is_what_each_document_is_alone(small_tiles):
    lengths = [5, 1, 40, 33, 16]
    parts, d_out = make(1, sum(lengths), 4, 2, 64, fused=True)
    together = by_kernels(parts, d_out, starts_from_lengths(lengths)[None].to(DEVICE))
    place = 0
    for length in lengths:
        part = slice(place, place + length)
        alone = by_kernels([x.detach()[:, part].requires_grad_() for x in parts], d_out[:, part],
                           None)
        for x, y in zip(together, alone):
            assert torch.allclose(x[:, part], y, atol=2e-6)
        place += length


@pytest.mark.parametrize("split_below", [0, 1 << 15])
def test_both_ways_of_adding_up_a_group(split_below, monkeypatch):
    """dk and dv of a key-value head: inside one program, or of each query head and then added."""
    monkeypatch.setattr(kernels, "SPLIT_BELOW", split_below)
    assert_right(*make(2, 70, 6, 2, 64, torch.bfloat16), torch.zeros(2, 70, dtype=torch.long))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="the tiles are counted in the interpreter")
@pytest.mark.parametrize("lengths,boundary,whole", [([256], 8, 28), ([64] * 4, 8, 4)])
def test_only_tiles_that_are_seen_are_walked(lengths, boundary, whole, monkeypatch):
    """Of n tiles of 32 a document has n on the diagonal and n (n - 1) / 2 seen in whole."""
    for kernel in KERNELS:
        monkeypatch.setitem(kernels.FP32_TILES, kernel, (32, 32, 4, 2))
    walk, counts = kernels._walk, {0: 0, 1: 0}

    def note(*arguments):
        found = walk(*arguments)
        counts[int(arguments[-1])] += max(int(found[-1]), 0)
        return found

    monkeypatch.setattr(kernels, "_walk", note)
    by_kernels(*make(1, 256, 1, 1, 64), starts_from_lengths(lengths)[None])
    assert counts == {0: 3 * whole, 1: 3 * boundary}            # by each of the three kernels


def test_order_of_the_batch_does_not_matter_and_two_runs_are_the_same(small_tiles):
    parts, d_out = make(3, 50, 2, 1, 64, torch.float16)
    starts = torch.stack([random_starts(random.Random(i), 50) for i in range(3)]).to(DEVICE)
    wanted, order = by_kernels(parts, d_out, starts), [2, 0, 1]
    for x, y in zip(by_kernels(parts, d_out, starts), wanted):
        assert torch.equal(x, y)
    moved = by_kernels([x.detach()[order].requires_grad_() for x in parts], d_out[order],
                       starts[order])
    for x, y in zip(moved, wanted):
        assert torch.allclose(x, y[order], atol=2e-3)


def test_gradients_are_slopes(small_tiles):
    """A step along a direction changes the output as the gradients say."""
    parts, d_out = make(1, 33, 2, 1, 64)
    _, *grads = by_kernels(parts, d_out, None)
    for i, gradient in enumerate(grads):
        direction = torch.randn_like(gradient)
        at = [[x.detach() + (sign * 1e-2 * direction if i == j else 0) for j, x in enumerate(parts)]
              for sign in (1, -1)]
        up, down = (float((flash_attention(*p) * d_out).double().sum()) for p in at)
        assert (up - down) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


def test_bounds_of_documents():
    start, end = document_bounds(torch.tensor([[0, 0, 2], [0, 1, 1]]), 2, 3, "cpu")
    assert start[:6].tolist() == [0, 0, 2, 3, 4, 4] and end[:6].tolist() == [2, 2, 3, 4, 6, 6]
    assert len(start) == len(end) == 128 and set(start[6:].tolist()) == {128}
    whole = document_bounds(None, 2, 3, "cpu")
    assert whole.start[:6].tolist() == [0, 0, 0, 3, 3, 3] and isinstance(whole, Bounds)


def test_offsets_are_64_bits_wide():
    """Rows so far apart that their offsets pass 2^31 elements; only a few pages are ever used."""
    stride = 2 ** 31 // 60
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 3 * 2 * 2 ** 31:
        pytest.skip("needs 13 GB of free GPU memory")
    flat = torch.empty_strided((1, 64, 3 * 64), (64 * stride, stride, 1), dtype=torch.float16,
                               device=DEVICE)
    small = torch.randn(1, 64, 3 * 64, dtype=torch.float16, device=DEVICE)
    flat.copy_(small)
    for far, near in zip(*(flash_attention(*(x.unflatten(-1, (1, 64)) for x in y.split(64, -1)))
                           for y in (flat, small))):
        assert torch.equal(far, near)


# ------------------------------------------------------------------------------------------------
# The loss head


def head(N, D, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D, generator=generator).to(DEVICE, dtype).requires_grad_()
                      for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets.to(DEVICE)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("V", [7, 4096, 9001])
def test_log_probabilities_equal_the_reference(V, dtype):
    hidden, weight, targets = head(9, 16, V, dtype)
    logits, scale = (hidden @ weight.t()).detach(), torch.linspace(-2, 3, 9, device=DEVICE)
    out, gradient = kernels.log_probabilities(logits.clone(), targets, scale)
    wanted, slope = kernels.log_probabilities_reference(logits.clone(), targets, scale)
    assert torch.allclose(out, wanted, atol=1e-5) and not out[::4].any()
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    (loss * scale).sum().backward()
    assert torch.allclose(out.double(), -loss, atol=1e-5)
    assert gradient.dtype == slope.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for x in (gradient, slope):
        assert torch.allclose(x.double(), exact.grad, atol=tolerance)
    assert torch.equal(kernels.log_probabilities(logits, targets)[0], out)      # without a gradient


def test_losses_of_huge_logits_are_finite():
    logits = torch.full((2, 5000), -3e4, device=DEVICE)
    logits[:, 4999] = 3e4
    targets, scale = torch.tensor([4999, 0], device=DEVICE), torch.ones(2, device=DEVICE)
    out, gradient = kernels.log_probabilities(logits, targets, scale)
    assert out.tolist() == [0, -6e4] and gradient[0].abs().max() == 0 and gradient[1, 0] == -1


def test_wrong_targets_are_not_taken_for_others():
    """Neither -100 nor a column: NaN, on a GPU as in the interpreter; nobody's logit is read."""
    logits = torch.zeros(4, 50, device=DEVICE)
    out, _ = kernels.log_probabilities(logits, torch.tensor([-1, 50, 49, -100], device=DEVICE))
    assert out[:2].isnan().all() and out[2:].isfinite().all()


def test_strided_targets_are_read_right():
    targets = torch.tensor([[3, 0], [1, 0], [-100, 0]], device=DEVICE)[:, 0]
    logits = torch.arange(30., device=DEVICE).view(3, 10).sin()
    out, _ = kernels.log_probabilities(logits.clone(), targets)
    assert torch.allclose(out[:2], logits.log_softmax(-1)[[0, 1], [3, 1]]) and out[2] == 0


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("summed", [True, False])
def test_linear_cross_entropy_in_chunks(rows, summed, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
    hidden, weight, targets = head(11, 16, 300, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none")
    if summed:
        value, true = linear_cross_entropy(hidden, weight, targets), losses.sum()
    else:
        scale = torch.linspace(-1, 2, 11, device=DEVICE)
        value = (linear_log_probabilities(hidden, weight, targets) * scale).sum()
        true = -(losses * scale).sum()
    assert torch.allclose(value.double(), true, rtol=1e-5)
    found = torch.autograd.grad(value, (hidden, weight))
    for x, y in zip(found, torch.autograd.grad(true, exact)):
        assert torch.allclose(x.double(), y, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# As one op among others


def test_ops_are_well_behaved(small_tiles):
    parts, _ = make(1, 40, 2, 1, 64)
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in parts]
    bounds = document_bounds(None, 1, 40, torch.device(DEVICE))
    torch.library.opcheck(kernels._attention, (*packed, *bounds))
    out, lse = kernels._attention(*(x.detach() for x in packed), *bounds)
    arguments = (out.clone(), *(x.detach() for x in packed), *bounds, out, lse)
    torch.library.opcheck(kernels._attention_backward, arguments)
    hidden, weight, targets = (x.detach() for x in head(5, 8, 30, torch.float32))
    for scale in (None, torch.ones(5, device=DEVICE)):
        torch.library.opcheck(kernels._linear_log_probabilities, (hidden, weight, targets, scale))


@pytest.fixture
def model():
    config = Config(**{**SMALL, "hidden_size": 128, "num_attention_heads": 2,
                       "num_key_value_heads": 1})
    model = CausalLM(config)
    init_weights(model, 0)
    return model.to(DEVICE)


def batch(step, T=32):
    """Two rows that a model can learn, cut into documents."""
    first = torch.arange(T + 1) * 5 + step
    ids = torch.stack([first, first + 7]) % 96
    starts = torch.zeros(2, T, dtype=torch.long)
    starts[0, 11:], starts[1, 20:] = 11, 20
    return ids[:, :-1].to(DEVICE), starts.to(DEVICE), ids[:, 1:].to(DEVICE)


def test_whole_graph_compiles(model, small_tiles):
    ids, starts, targets = batch(0)
    eager = model(ids, starts, targets)
    eager.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, starts, targets)
    loss.backward()
    assert torch.allclose(loss, eager)
    for p, gradient in zip(model.parameters(), wanted):
        assert torch.allclose(p.grad, gradient, atol=1e-5)


def test_one_graph_serves_every_length():
    """Dynamic shapes: nothing of the ops turns a length into a number."""
    compiled, graphs = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    loss = torch.compile(lambda q, k, v: flash_attention(q, k, v).sum(), backend=count,
                         fullgraph=True, dynamic=True)
    for T in (20, 130, 270, 400):
        parts = [x.detach() for x in make(1, T, 2, 1, 64)[0]]
        compiled.append(float(loss(*parts)))
        assert compiled[-1] == pytest.approx(float(flash_attention(*parts).sum()), abs=1e-3)
    assert len(graphs) == 1


def test_checkpointing_can_keep_the_attention(small_tiles, monkeypatch):
    """Selective activation checkpointing runs the kept op once, plain checkpointing twice."""
    from torch.utils import checkpoint

    parts, d_out = make(1, 24, 2, 1, 64)
    calls, launch = [], kernels._launch

    def note(kernel, *args):
        calls.append(kernel.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(kernels, "_launch", note)

    def policy(context, op, *args, **kwargs):
        kept = op == torch.ops.minicoder.attention.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if kept else \
            checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def selective():
        return checkpoint.create_selective_checkpoint_contexts(policy)

    wanted = by_kernels(parts, d_out, None)
    for contexts, forwards in ((checkpoint.noop_context_fn, 2), (selective, 1)):
        calls.clear()
        out = checkpoint.checkpoint(lambda *x: flash_attention(*x) * 2, *parts,
                                    use_reentrant=False, context_fn=contexts)
        grads = torch.autograd.grad(out, parts, d_out / 2)
        assert calls.count("_forward") == forwards and calls.count("_dq") == 1
        for x, y in zip((out / 2, *grads), wanted):
            assert torch.allclose(x, y, atol=1e-6)


def test_training_curves_are_the_same_both_ways(model, small_tiles):
    curves = {}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for model.attention in ("triton", "sdpa"):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        curves[model.attention] = []
        for step in range(6):
            ids, starts, targets = batch(step)
            loss = model(ids, starts, targets) / targets.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[model.attention].append(float(loss.detach()))
    assert curves["triton"] == pytest.approx(curves["sdpa"], abs=2e-5)
    assert curves["sdpa"][-1] < 0.9 * curves["sdpa"][0]


def test_generation_is_the_same_both_ways(model, small_tiles):
    prompts, ids = [[5, 17, 3], [88, 42, 9, 61, 30, 2, 64], [11]], {}
    for model.attention in ("triton", "sdpa"):
        ids[model.attention] = generate(model, prompts, 12)
    assert ids["triton"] == ids["sdpa"] and len(ids["sdpa"][0]) == 12


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_whole_graph_compiles_to_gpu_code(model):
    model.compute_dtype = torch.bfloat16
    ids, starts, targets = batch(0)
    with torch.no_grad():
        eager, compiled = (f(ids, starts, targets)
                           for f in (model, torch.compile(model, fullgraph=True)))
    assert torch.allclose(eager, compiled, rtol=1e-2)
