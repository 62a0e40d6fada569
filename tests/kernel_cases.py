"""What the Triton kernels compute: on a GPU if there is one, else in Triton's interpreter.

    pytest tests/kernel_cases.py                              # on a GPU
    TRITON_INTERPRET=1 pytest tests/kernel_cases.py           # on a CPU
    CASES=256 TRITON_INTERPRET=1 pytest tests/kernel_cases.py -k random

test_kernels.py runs this file in a process of its own, because the interpreter changes all of
Triton. Here the interpreter is made strict: bf16 is rounded as the hardware does, no access may
leave the tensors that a kernel was given, and uninitialized memory holds NaN.
"""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import flash_attention, linear_cross_entropy
from model import CausalLM, Config, generate, init_weights

# numpy warns about 2^x = inf where the mask then puts 0, and in padding, which is never stored
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("_forward", "_dq", "_dkdv")
if kernels.why_not_triton(torch.device(DEVICE)):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
torch.use_deterministic_algorithms(True, warn_only=True)        # fills new memory with NaN
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # SDPA's math stays in the dtype

# ------------------------------------------------------------------------------------------------
# A strict interpreter

if kernels.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = {name: getattr(builder, name)
                for name in ("cast_impl", "create_dot", "create_masked_load",
                             "create_masked_store")}
    original_arguments = executor._init_args_hst
    tensors = []                # (first, last + 1) address of each tensor of the current launch

    def cast(self, source, dtype):
        """fp32 to bf16 to the nearest, ties to even; the interpreter cuts the bits off."""
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return original["cast_impl"](self, source, dtype)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        bits = np.where(np.isnan(source.data), bits | 0x400000, rounded)
        return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)

    def dot(self, a, b, *rest):
        """The interpreter multiplies the bits of bf16 as if they were integers: use fp32."""
        a, b = (original["cast_impl"](self, x, tl.float32) if x.dtype == tl.bfloat16 else x
                for x in (a, b))
        return original["create_dot"](self, a, b, *rest)

    def arguments(self, args, kwargs):
        tensors.clear()
        for x in args:
            if torch.is_tensor(x):
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
                tensors.append((x.data_ptr(), x.data_ptr() + x.element_size() * (1 + last)))
        return original_arguments(self, args, kwargs)

    def check(pointers, mask):
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if used.size:
            low, high = int(used.min()), int(used.max())
            assert any(first <= low and high < end for first, end in tensors), "out of bounds"

    def load(self, pointers, mask, *rest):
        check(pointers, mask)
        return original["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    builder.cast_impl, builder.create_dot, executor._init_args_hst = cast, dot, arguments
    builder.create_masked_load, builder.create_masked_store = load, store


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 to 64 in the interpreter, so that a short sequence has many; not on a GPU."""
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
# The expected results


def starts_from_lengths(lengths):
    """document_starts of one sequence of documents: (1, T)."""
    starts = np.cumsum([0, *lengths[:-1]])
    return torch.from_numpy(np.repeat(starts, lengths))[None]


def random_starts(rng, T):
    """One document, single tokens, or documents of random length: (T,)."""
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


def by_sdpa(parts, d_out, starts, dtype):
    """out and gradients by PyTorch's plain implementation in a dtype."""
    parts = [x.detach().to(dtype).transpose(1, 2).requires_grad_() for x in parts]
    index = torch.arange(d_out.shape[1], device=starts.device)
    visible = (starts[:, :, None] <= index) & (index <= index[:, None])         # (B, T, T)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*parts, attn_mask=visible[:, None], enable_gqa=True)
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
    scores, and every p that the backward pass recomputes has its rounding; SDPA keeps p.
    """
    starts = starts.to(DEVICE).expand(d_out.shape[:2])
    exact = by_sdpa(parts, d_out, starts, torch.float64)
    plain = by_sdpa(parts, d_out, starts, d_out.dtype)
    ours = by_kernels(parts, d_out, starts)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), ours, plain, exact):
        assert x.isfinite().all(), name
        size = scale if name == "dk" else 1
        slack = SLACK[d_out.dtype]
        if name == "dv" and d_out.dtype == torch.float32:
            slack *= max(lse_error, scale / 5)
        our_error, plain_error = error(x, z, size), error(y, z, size)
        assert our_error <= 2 * plain_error + slack, (name, our_error, plain_error)


# ------------------------------------------------------------------------------------------------
# Attention

CASES = int(os.environ.get("CASES", 10))


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed, small_tiles):
    rng = random.Random(seed)
    small_tiles(rng)
    T, B = int(2 ** rng.uniform(0, 6.6 if kernels.INTERPRETED else 11)), rng.choice((1, 1, 2, 3))
    H, K = rng.choice(((1, 1), (2, 2), (4, 2), (3, 1), (6, 2)))
    d, dtype = rng.choice((64, 64, 128)), rng.choice(kernels.DTYPES)
    scale, fused = rng.choice((1, 1, 30)), rng.random() < 0.5
    parts, d_out = make(B, T, H, K, d, dtype, seed, scale, fused)
    starts = torch.stack([random_starts(rng, T) for _ in range(B)])
    assert_right(parts, d_out, starts.to(rng.choice((torch.int32, torch.int64))), scale)


@pytest.mark.parametrize("lengths,d,dtype", [
    ([1], 64, torch.bfloat16), ([1] * 17, 128, torch.float16),      # single tokens
    ([32, 32, 16], 64, torch.float32),                              # on the edge of a tile,
    ([31, 32, 17], 64, torch.float32),                              # before
    ([33, 32, 15], 64, torch.float32),                              # and after it
    ([3] * 10 + [75] + [2] * 10, 64, torch.float32),
    ([128], 64, torch.float16), ([129], 128, torch.bfloat16)])
def test_document_layouts_with_the_tiles_of_the_table(lengths, d, dtype):
    assert_right(*make(1, sum(lengths), 2, 1, d, dtype, fused=True), starts_from_lengths(lengths))


@pytest.mark.parametrize("scale,lse_error", [(1000, 1), (1, 10)])
def test_extreme_scores(scale, lse_error, small_tiles):
    """Large scores throughout, or one key with all of the weight."""
    (q, k, v), d_out = make(1, 70, 2, 1, 64, scale=scale)
    k = k.detach().clone()
    if scale == 1:
        k[:, 3] = 40 * q.detach()[:, 60, :1]
    parts = [q, k.requires_grad_(), v]
    assert_right(parts, d_out, torch.zeros(1, 70, dtype=torch.long), scale, lse_error)


def test_tokens_that_see_nothing_give_zeros(small_tiles):
    parts, d_out = make(1, 80, 2, 1, 64)
    starts = torch.zeros(1, 80, dtype=torch.long, device=DEVICE)
    starts[:, 20:] = 50                         # tokens 20 to 49 do not even see themselves
    starts[:, 75:] = 80                         # and neither do the last five
    ours = by_kernels(parts, d_out, starts)
    exact = by_sdpa(parts, d_out, starts.clamp(max=torch.arange(80, device=DEVICE)), torch.float64)
    for x, y in zip(ours, exact):
        for blind in (slice(20, 50), slice(75, 80)):
            assert not x[:, blind].any()
        for part in (slice(0, 20), slice(50, 75)):
            assert torch.allclose(x[:, part].double(), y[:, part], atol=1e-5)


def test_memory_layout_of_the_inputs_does_not_matter(small_tiles):
    """Transposed inputs, an expanded gradient, and views with NaN in the memory behind them."""
    parts, d_out = make(2, 20, 2, 1, 64)
    expected = by_kernels(parts, d_out, None)
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    views = [torch.full((2, 128, *x.shape[2:]), float("nan"), device=DEVICE)[:, :20] for x in parts]
    for view, x in zip(views, parts):
        view.copy_(x.detach())
    for inputs in (transposed, views):
        results = by_kernels([x.requires_grad_() for x in inputs], d_out, None)
        for x, y in zip(results, expected):
            assert torch.equal(x, y)
    same = torch.randn(1, 1, 2, 64, device=DEVICE).expand_as(d_out)
    for x, y in zip(by_kernels(parts, same, None), by_kernels(parts, same.contiguous(), None)):
        assert torch.equal(x, y)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="the tiles are counted in the interpreter")
@pytest.mark.parametrize("lengths,boundary,whole", [([256], 8, 28), ([64] * 4, 8, 4)])
def test_only_visible_tiles_are_visited(lengths, boundary, whole, monkeypatch):
    """Of n tiles of 32, a document has n on the diagonal and n (n - 1) / 2 without a mask."""
    for kernel in KERNELS:
        monkeypatch.setitem(kernels.FP32_TILES, kernel, (32, 32, 4, 2))
    walk, counts = kernels._walk, {0: 0, 1: 0}

    def counted(*arguments):
        begin, before, skip, count = walk(*arguments)
        counts[int(arguments[-1])] += max(int(count), 0)
        return begin, before, skip, count

    monkeypatch.setattr(kernels, "_walk", counted)
    by_kernels(*make(1, 256, 1, 1, 64), starts_from_lengths(lengths))
    assert counts == {0: 3 * whole, 1: 3 * boundary}            # by each of the three kernels


def test_offsets_are_64_bits_wide():
    """Tokens so far apart that their offsets pass 2^31 elements; only a few pages are used."""
    stride = 2 ** 31 // 60
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 3 * 2 * 2 ** 31:
        pytest.skip("needs 13 GB of free GPU memory")
    far = torch.empty_strided((1, 64, 3 * 64), (64 * stride, stride, 1), dtype=torch.float16,
                              device=DEVICE)
    near = torch.randn(1, 64, 3 * 64, dtype=torch.float16, device=DEVICE)
    far.copy_(near)
    out = [flash_attention(*(part.unflatten(-1, (1, 64)) for part in x.split(64, -1)))
           for x in (far, near)]
    assert torch.equal(*out)


# ------------------------------------------------------------------------------------------------
# Fused linear cross-entropy


def loss_inputs(N, D, V, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(DEVICE, dtype).requires_grad_()
                      for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets.to(DEVICE)


@pytest.mark.parametrize("V,dtype", list(zip((7, 4096, 9001), kernels.DTYPES)))
def test_log_probabilities_equal_the_reference(V, dtype):
    hidden, weight, targets = loss_inputs(9, 16, V, dtype)
    logits, scale = (hidden @ weight.t()).detach(), torch.linspace(-2, 3, 9, device=DEVICE)
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    (loss * scale).sum().backward()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for function in (kernels.log_probabilities, kernels.log_probabilities_reference):
        out, gradient = function(logits.clone(), targets, scale)
        assert torch.allclose(out.double(), -loss, atol=1e-5) and not out[::4].any()
        assert gradient.dtype == dtype
        assert torch.allclose(gradient.double(), exact.grad, atol=tolerance)
    strided = torch.stack([targets, targets], dim=1)[:, 0]
    out, _ = kernels.log_probabilities(logits, strided)                     # without a gradient
    assert torch.allclose(out.double(), -loss, atol=1e-5)


def test_losses_of_huge_logits_are_finite():
    logits = torch.full((2, 5000), -3e4, device=DEVICE)
    logits[:, 4999] = 3e4
    targets, scale = torch.tensor([4999, 0], device=DEVICE), torch.ones(2, device=DEVICE)
    out, gradient = kernels.log_probabilities(logits, targets, scale)
    assert out.tolist() == [0, -6e4] and gradient[0].abs().max() == 0 and gradient[1, 0] == -1


def test_targets_outside_the_vocabulary_give_nan():
    logits = torch.zeros(4, 50, device=DEVICE)
    out, _ = kernels.log_probabilities(logits, torch.tensor([-1, 50, 49, -100], device=DEVICE))
    assert out[:2].isnan().all() and out[2:].isfinite().all()


# ------------------------------------------------------------------------------------------------
# As operations of PyTorch, and in the model


@pytest.fixture
def model():
    model = CausalLM(Config(**{**SMALL, "hidden_size": 128, "num_attention_heads": 2,
                               "num_key_value_heads": 1}))
    init_weights(model, 0)
    return model.to(DEVICE)


def test_the_model_is_the_same_with_triton_and_sdpa(model, small_tiles, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 20)
    ids = torch.arange(2 * 33, device=DEVICE).view(2, 33) * 5 % 96
    starts = torch.cat([starts_from_lengths([11, 21]), starts_from_lengths([5, 27])]).to(DEVICE)
    results, texts = [], []
    for model.attention in ("triton", "sdpa"):
        loss = model(ids[:, :-1], starts, ids[:, 1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append(torch.cat([loss.detach()[None], *(x.flatten() for x in gradients)]))
        texts.append(generate(model, [[5, 17, 3], [88, 42, 9, 61, 30, 2, 64], [11]], 8))
    assert torch.allclose(*results, atol=1e-4) and texts[0] == texts[1]


def test_the_custom_ops_compile_to_one_graph_for_every_length(small_tiles):
    def loss(q, k, v, weight, targets):
        hidden = flash_attention(q, k, v).flatten(0, 1).flatten(1)          # (B * T, H * d)
        return linear_cross_entropy(hidden, weight, targets)

    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    weight = torch.randn(7, 2 * 64, device=DEVICE).requires_grad_()
    for T in (20, 33):
        parts, _ = make(1, T, 2, 1, 64)
        inputs = [*parts, weight]
        targets = torch.arange(T, device=DEVICE) % 7
        results = [torch.autograd.grad(function(*inputs, targets), inputs)
                   for function in (loss, compiled)]
        for eager, gradient in zip(*results):
            assert torch.allclose(eager, gradient, atol=1e-5)
    assert backend.frame_count == 1
