"""The two costly pieces of a decoder, tensors to tensors: attention and the loss head.

Attention is here in plain PyTorch, as a formula: softmax of the scores times the values. In bf16 on
a CPU and over short rows that is also the fastest way to train.

The loss head gives the next-token loss without ever holding all the logits: with 151,936 vocabulary
rows those of 8,192 tokens take 5 GB in fp32, and their gradient as much again. So a chunk of tokens
at a time is multiplied with the head, turned into its loss and at once into its gradient.

This file knows no configurations, models or text. It is imported, not run.
"""

import torch
import torch.nn.functional as F

CHUNK_LOGITS = 1 << 22          # logits held at a time: 16 MB in fp32, they stay in a CPU's cache
PLAIN_ATTENTION_TOKENS = 512    # in a row; up to here the plain formula beats SDPA, measured


def attention_mask(document_starts, keys, dtype):
    """What each query sees, as numbers to add to its scores: (B, T), keys -> (B, 1, T, keys).

    The queries are the last T of `keys` positions; each sees from its document's start to itself.
    """
    T = document_starts.shape[1]
    index = torch.arange(keys, device=document_starts.device)
    seen = index <= index[keys - T:, None]                              # (T, keys)
    seen = seen & (index >= document_starts[:, :, None])                # (B, T, keys)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))[:, None]


def runs_plain(x, T):
    """Whether the plain formula is the fastest attention: bf16 on a CPU, short rows."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and T <= PLAIN_ATTENTION_TOKENS


def make_mask(input_ids, document_starts, past, x):
    """The mask that attention() needs for these tokens after `past` others; None: plain causal."""
    B, T = input_ids.shape
    if document_starts is None and (T == 1 or not past and not runs_plain(x, T)):
        return None
    if document_starts is None:
        document_starts = torch.zeros(1, T, dtype=torch.long, device=x.device)
    return attention_mask(document_starts, past + T, x.dtype)


def attention_reference(q, k, v, mask):
    """Attention as a formula: q (B, T, H, d), k and v (B, S, K, d), mask (1 or B, 1, T, S)."""
    B, T, H, d = q.shape
    S, K = k.shape[1], k.shape[2]
    rows = H // K * T           # the query heads that share a key-value head are more rows for it
    q = q.transpose(1, 2).reshape(B * K, rows, d) * d ** -0.5
    k, v = (x.transpose(1, 2).reshape(B * K, S, d) for x in (k, v))
    scores = (q @ k.transpose(1, 2)).view(B, H, T, S) + mask
    out = scores.softmax(-1).view(B * K, rows, S) @ v                   # (B*K, H/K*T, d)
    return out.view(B, H, T, d).transpose(1, 2)                         # (B, T, H, d)


def _chunks(hidden, weight, targets):
    """Yield slices of rows with their logits in fp32, and the mask and indices of their targets."""
    rows = max(1, CHUNK_LOGITS // weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = (hidden[part] @ weight.t()).float()                        # (rows, V)
        kept = targets[part] != -100
        yield part, logits, kept, targets[part].clamp(min=0)[:, None]       # (rows, 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a sum of losses is softmax - one_hot: it is made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        w = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part, logits, kept, index in _chunks(hidden, w, targets):
            # logits, powers and gradient are one buffer, overwritten in place: (rows, V)
            top, picked = logits.amax(-1, keepdim=True), logits.gather(1, index)
            powers = logits.sub_(top).exp_()
            total = powers.sum(-1, keepdim=True)                            # (rows, 1)
            loss += ((total.log() + top - picked)[:, 0] * kept).sum()
            gradient = powers.mul_(kept[:, None] / total)
            gradient.scatter_add_(1, index, -kept[:, None].float())
            gradient = gradient.to(hidden.dtype)
            d_hidden[part] = gradient @ w                                   # (rows, D)
            d_weight += gradient.t() @ hidden[part]                         # (V, D)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss, None


class _LinearLogProbabilities(torch.autograd.Function):
    """Each target has its own incoming gradient, so here the logits are made again for it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        out = hidden.new_empty(targets.shape, dtype=torch.float32)
        for part, logits, kept, index in _chunks(hidden, weight.to(hidden.dtype), targets):
            out[part] = (logits.gather(1, index)[:, 0] - logits.logsumexp(-1)) * kept
        return out

    @staticmethod
    def backward(ctx, d_out):
        hidden, weight, targets = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part, logits, kept, index in _chunks(hidden, w, targets):
            gradient = logits.softmax(-1).neg_()
            gradient.scatter_add_(1, index, torch.ones_like(gradient[:, :1]))   # one_hot - softmax
            gradient = gradient.mul_((d_out[part] * kept)[:, None]).to(hidden.dtype)
            d_hidden[part] = gradient @ w                                   # (rows, D)
            d_weight += gradient.t() @ hidden[part]                         # (V, D)
        return d_hidden, d_weight.to(weight.dtype), None


def linear_cross_entropy_reference(hidden, weight, targets):
    """The twin of linear_cross_entropy() that holds all the logits."""
    logits = (hidden @ weight.to(hidden.dtype).t()).float()                 # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def linear_cross_entropy(hidden, weight, targets):
    """Sum of the next-token losses in nats: hidden (N, D), weight (V, D), targets (N,) -> ().

    Targets of -100 are left out. The product runs in hidden's dtype, the softmax in fp32.
    """
    if not torch.is_grad_enabled():                         # measuring only: no gradient
        return -linear_log_probabilities(hidden, weight, targets).sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def linear_log_probabilities(hidden, weight, targets):
    """Log-probability of each target, 0 where it is -100: (N, D), (V, D), (N,) -> (N,) in fp32."""
    return _LinearLogProbabilities.apply(hidden, weight, targets)
