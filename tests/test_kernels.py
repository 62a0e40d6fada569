"""pytest tests/test_kernels.py"""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import (
    attention_mask,
    formula_attention,
    linear_cross_entropy,
    linear_log_probabilities,
)


def head_inputs(rows=37, D=8, V=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (rows,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 150, 1 << 22])
def test_linear_cross_entropy_is_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", chunk)
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 0.5).backward()
    wanted = [p.detach().double().requires_grad_() for p in (hidden, weight)]
    expected = F.cross_entropy(wanted[0] @ wanted[1].t(), targets, reduction="sum")
    (expected * 0.5).backward()
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    for ours, theirs in zip((hidden, weight), wanted):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 150, 1 << 22])
def test_log_probabilities_and_their_gradient(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", chunk)
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    out = linear_log_probabilities(hidden, weight, targets)
    scale = torch.linspace(-1, 2, len(targets))
    (out * scale).sum().backward()
    wanted = [p.detach().double().requires_grad_() for p in (hidden, weight)]
    expected = -F.cross_entropy(wanted[0] @ wanted[1].t(), targets, reduction="none")
    (expected * scale.double()).sum().backward()
    assert torch.allclose(out.double(), expected, atol=1e-5) and out[0] == 0
    for ours, theirs in zip((hidden, weight), wanted):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


def test_loss_of_large_logits_is_finite():
    hidden, weight = torch.full((3, 4), 1e3), torch.ones(5, 4)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, -100, 4]))
    assert torch.allclose(loss, 2 * torch.tensor(5.0).log(), atol=1e-3)


def test_loss_without_targets_is_zero():
    hidden, weight, _ = head_inputs(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full((len(hidden),), -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_bf16_hidden_gives_fp32_weight_gradients():
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    exact = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    half = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(half, weight, targets)
    loss.backward()
    assert weight.grad.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert abs(float(loss) / float(exact) - 1) < 0.02


def test_mask_shows_the_past_of_the_own_document():
    starts = torch.tensor([[0, 0, 2, 2]])
    seen = attention_mask(starts, 4, torch.float32)[0, 0] == 0
    assert seen.tolist() == [[True, False, False, False], [True, True, False, False],
                             [False, False, True, False], [False, False, True, True]]
    later = attention_mask(starts[:, 2:], 4, torch.float32)[0, 0] == 0     # the last two queries
    assert later.tolist() == seen[2:].tolist()


def test_reference_equals_sdpa_with_expanded_heads():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 6, 8, generator=generator)
    k, v = (torch.randn(2, 7, 2, 8, generator=generator) for _ in range(2))
    mask = attention_mask(torch.tensor([[0, 0, 3, 3, 3], [1, 1, 1, 5, 5]]), 7, torch.float32)
    expanded = (x.repeat_interleave(3, dim=2).transpose(1, 2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *expanded, attn_mask=mask)
    assert torch.allclose(formula_attention(q, k, v, mask), expected.transpose(1, 2), atol=1e-6)
