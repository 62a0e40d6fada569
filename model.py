"""The Qwen2.5-Coder decoder: ids to logits, logits to ids, and checkpoint folders.

A Llama-like transformer: token embedding, then blocks of grouped-query attention (with biases on
q, k and v) and a SwiGLU MLP, each behind an RMSNorm and added to the residual stream; rotary
position embeddings. In sizes up to 3B the output layer is the embedding matrix again (report,
table 1; where it is wrong, the published config.json files are followed). Modules and tensors
have the names of the published checkpoints, so loading and saving need no mapping.

    B  sequences in a batch    T  tokens in a sequence    S  positions seen, with those in the cache
    D  hidden_size             H  query heads             K  key-value heads
    d  head_dim                V  vocab_size              F  intermediate_size
    Heads are always the third dimension: (B, T, H, d).

This file knows ids only, not text (tokenizer.py), and nothing about training (pretrain.py). It is
imported, not run: `python fim.py FILE` and `python evaluate.py` use a trained model.

Read first: eager_attention, Attention, Block, Decoder, Int8Linear, LoRALinear, KVCache, generate
"""

import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import (attention_mask, attention_path, document_bounds, flash_attention,
                     linear_cross_entropy, linear_log_probabilities, sdpa_attention,
                     why_not_triton)
from support.batching import Batch
from support.distributed import check_device, choose_inference_dtype, default_device
from support.files import (InputError, hub_folder, read_config, read_json, read_tensors,
                           write_json, write_tensors)

EAGER_TILE = 128            # queries per tile in eager attention on a CPU
LORA_ALPHA = 32             # the update is scaled by alpha / rank; PEFT's usual value


@dataclasses.dataclass
class Config:
    """The fields of a published config.json that change what the model computes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 151936            # rows of the embedding matrix: more than there are tokens
    tie_word_embeddings: bool = True    # the output layer is the embedding matrix
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict = None           # {"type": "yarn", "factor", "original_max_position_..."}
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int = 151643
    eos_token_id: int = 151643          # or a list of ids

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self):
        """How many tokens fit. YaRN multiplies the original length by its factor, while the model
        cards leave max_position_embeddings as it was."""
        if not self.rope_scaling:
            return self.max_position_embeddings
        original = self.rope_scaling["original_max_position_embeddings"]
        return max(self.max_position_embeddings, int(original * self.rope_scaling["factor"]))

    @classmethod
    def from_json(cls, path):
        """Read a config.json. InputError: it is not one of Qwen2, and why."""
        return cls(**read_config(path, dataclasses.fields(cls)))

    def to_json(self, path, dtype):
        """Write a config.json that transformers and vLLM read as Qwen2."""
        write_json(path, {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "attention_dropout": 0.0, "use_sliding_window": False, "use_cache": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **dataclasses.asdict(self)})


UNTIED = dict(vocab_size=152064, tie_word_embeddings=False)
CONFIGS = {     # hidden_size, layers, query heads, key-value heads, intermediate_size
    "tiny": Config(192, 4, 3, 1, 512, vocab_size=4096, rope_theta=1e4),
    "mini": Config(320, 6, 5, 1, 896, vocab_size=4096, rope_theta=1e4),
    "small": Config(512, 10, 8, 2, 1536, vocab_size=16384, rope_theta=1e4),
    "0.5B": Config(896, 24, 14, 2, 4864),       # 28 % of its weights are the embedding matrix
    "1.5B": Config(1536, 28, 12, 2, 8960),
    "3B": Config(2048, 36, 16, 2, 11008),
    "7B": Config(3584, 28, 28, 4, 18944, **UNTIED),
    "14B": Config(5120, 48, 40, 8, 13824, **UNTIED, rms_norm_eps=1e-5),
    "32B": Config(5120, 64, 40, 8, 27648, **UNTIED, rms_norm_eps=1e-5),
}

# ------------------------------------------------------------------------------------------------
# Attention


def eager_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(d) + mask) v: q (B, T, H, d), k and v (B, S, K, d) -> (B, T, H, d).

    mask (1 or B, 1, T, S) is 0 where a query may attend and -inf elsewhere. H / K query heads form
    a group that shares one key-value head; their queries are stacked, so that each key-value head
    takes part in one large matmul.
    """
    B, T, H, d = q.shape
    S, K = k.shape[1:3]
    q = q.transpose(1, 2).reshape(B * K, H // K * T, d) / math.sqrt(d)      # (B*K, H/K*T, d)
    k = k.transpose(1, 2).reshape(B * K, S, d)                              # (B*K, S, d)
    v = v.transpose(1, 2).reshape(B * K, S, d)                              # (B*K, S, d)
    scores = (q @ k.transpose(1, 2)).view(B, H, T, S) + mask                # (B, H, T, S)
    weights = scores.softmax(-1)                                            # sums to 1 over S
    out = weights.view(B * K, H // K * T, S) @ v                            # (B*K, H/K*T, d)
    return out.view(B, H, T, d).transpose(1, 2)                             # (B, T, H, d)


def tiled_attention(q, k, v, mask):
    """eager_attention() on EAGER_TILE queries at a time, each tile with only the keys up to its
    last query. That computes half of the scores, and those of a tile stay in the CPU's cache."""
    T, S = mask.shape[2:]
    tiles = []
    for first in range(0, T, EAGER_TILE):
        stop = min(first + EAGER_TILE, T)
        keys = S - T + stop
        tiles.append(eager_attention(q[:, first:stop], k[:, :keys], v[:, :keys],
                                     mask[:, :, first:stop, :keys]))
    return torch.cat(tiles, dim=1)                                          # (B, T, H, d)


def make_attention(path, document_starts, B, T, past, x):
    """The function attend(q, k, v) that all layers use: B sequences of T tokens after `past` cached
    ones. x gives the dtype and the device.

    Which positions are seen is the same in all layers, so the mask (or for the Triton kernels the
    bounds of the documents) is computed here, once. The kernels take whole sequences only: with a
    cache, PyTorch's operations run.
    """
    if path == "triton" and past == 0 and T > 1:
        bounds = document_bounds(document_starts, B, T, x.device)
        return functools.partial(flash_attention, document_starts=bounds)
    eager = path == "eager" and T > 1       # for a single token it would copy the whole cache
    if document_starts is None:
        if T == 1 or (past == 0 and not eager):
            return sdpa_attention           # causal without a mask
        # one document; eager attention, or to cached positions, needs the mask spelled out
        document_starts = torch.zeros(1, T, dtype=torch.long, device=x.device)
    mask = attention_mask(document_starts, past + T, x.dtype)
    return functools.partial(tiled_attention if eager else sdpa_attention, mask=mask)


# ------------------------------------------------------------------------------------------------
# Rotary position embeddings (RoPE)


def rotary_frequencies(config):
    """The angle by which each pair of channels turns per position (d/2,), and a factor for cos and
    sin.

    Plain RoPE: theta^(-2i/d) for pair i. YaRN (arXiv 2309.00071) extends the context: it keeps the
    fast pairs, slows the slow ones down by `factor`, interpolates between, and scales cos and sin.
    """
    d, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    # on the CPU even when load_model() builds the model on the "meta" device
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    if not scaling:
        return frequencies, 1.0
    factor = scaling["factor"]
    length = scaling["original_max_position_embeddings"]

    def pair_that_turns(turns):     # the i for which length * theta^(-2i/d) = turns * 2 pi
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), d - 1)
    # 0: kept, 1: slowed down by the whole factor                           (d/2,)
    slow = ((torch.arange(d // 2, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    scale = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1   # section 3.4
    return frequencies / factor * slow + frequencies * (1 - slow), scale


def rotate(x, cos, sin):
    """Rotate each pair of channels (i, i + d/2) of x (B, T, H, d): (x1, x2) becomes
    (x1 cos - x2 sin, x2 cos + x1 sin).

    cos and sin come from Decoder.rotary(): (B, T, 1, d), the d/2 angles twice. The first half of
    `sin` holds -sin, the second half +sin.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)                             # (x2, x1)
    return torch.addcmul(x * cos, swapped, sin)         # the first half of sin is negative


# ------------------------------------------------------------------------------------------------
# The decoder


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input. Weights stay in fp32 for the
    optimizer while activations may be bf16; this is what autocast does."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32: (..., D) -> (..., D)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: project, rotate, attend, project: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.q_proj = Linear(D, H * d)
        self.k_proj = Linear(D, K * d)
        self.v_proj = Linear(D, K * d)
        self.o_proj = Linear(H * d, D, bias=False)

    def forward(self, x, rotary, attend, cache=None, layer=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, H, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, K, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, K, d)
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                # (B, S, K, d)
        out = attend(q, k, v)                                               # (B, T, H, d)
        return self.o_proj(out.flatten(2))                                  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, attend, cache=None, layer=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False      # keep only the inputs of blocks for the backward pass
        self.set_frequencies(config)

    def set_frequencies(self, config):
        """Set the rotary frequencies, on the CPU: move the model to its device afterwards."""
        frequencies, self.rotary_scale = rotary_frequencies(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)     # (d/2,)

    def rotary(self, input_ids, document_starts, past, dtype):
        """cos and sin for rotate(), (B or 1, T, 1, d). Each document begins at position 0."""
        T = input_ids.shape[1]
        position = torch.arange(past, past + T, device=input_ids.device)[None]      # (1, T)
        if document_starts is not None:
            position = position - document_starts                                   # (B, T)
        angle = position[:, :, None, None] * self.inv_freq                          # (B, T, 1, d/2)
        cos = angle.cos() * self.rotary_scale
        sin = angle.sin() * self.rotary_scale
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def forward(self, input_ids, document_starts=None, cache=None, dtype=None, attention="auto"):
        B, T = input_ids.shape
        past = 0 if cache is None else cache.length
        x = self.embed_tokens(input_ids).to(dtype=dtype)                            # (B, T, D)
        # what depends on positions only is computed once for all layers
        rotary = self.rotary(input_ids, document_starts, past, x.dtype)
        path, _ = attention_path(x.device, rotary[0].shape[-1], x.dtype, T, attention)
        attend = make_attention(path, document_starts, B, T, past, x)
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, attend, use_reentrant=False)
            else:
                x = block(x, rotary, attend, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class CausalLM(nn.Module):
    """The decoder and its output layer.

    compute_dtype: the dtype of activations; None: that of the weights. attention: "auto" leaves
    the choice to attention_path(); "triton", "sdpa" and "eager" name an implementation.
    generation_config: what generation_config.json holds.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None
        self.attention = "auto"
        self.dtype_reason = "as stored"
        self.output = None                  # with 8-bit weights: the output layer, see quantize()
        self.generation_config = {"bos_token_id": config.bos_token_id,
                                  "eos_token_id": config.eos_token_id, "max_new_tokens": 2048}
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype_name(self):
        return "int8" if self.output is not None else str(self.dtype).removeprefix("torch.")

    @property
    def dtype(self):
        """That of activations and of the KV cache."""
        return self.compute_dtype or self.model.norm.weight.dtype

    @property
    def head(self):
        """The weights of the output layer, (V, D)."""
        if self.output is not None:
            return (self.output.int8 * self.output.scale.T).to(self.dtype)
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def new_cache(self, starts):
        """An empty KVCache for sequences that start at these positions, (B, 1)."""
        return KVCache(self, starts)

    def forward(self, input_ids, document_starts=None, targets=None, reduce="sum", cache=None,
                last=False):
        """ids (B, T) -> logits (B, T, V), or (B, 1, V) with last=True.

        document_starts (B, T): the index in its sequence at which each token's document starts.
        With targets (B, T), -100 where there is none, not all logits are held at once: the result
        is the sum of the losses in nats or, with reduce="none", the log-probabilities (B, T), which
        are the losses with a minus sign.
        """
        hidden = self.model(input_ids, document_starts, cache, self.compute_dtype,
                            self.attention)                                         # (B, T, D)
        if targets is None:
            hidden = hidden[:, -1:] if last else hidden
            if self.output is not None:
                return self.output(hidden)                                          # (B, T or 1, V)
            return F.linear(hidden, self.head.to(hidden.dtype))                     # (B, T or 1, V)
        hidden = hidden.flatten(0, 1)                                               # (B*T, D)
        if reduce == "sum":
            return linear_cross_entropy(hidden, self.head, targets.flatten())       # ()
        log_probs = linear_log_probabilities(hidden, self.head, targets.flatten())  # (B*T,)
        return log_probs.view(targets.shape)


def init_weights(model, seed):
    """Normal weights with the published standard deviation, and zero biases: the same on every
    machine for the same seed."""
    generator = torch.Generator().manual_seed(seed % 2 ** 63)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, model.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def parameter_count(model):
    """The number of weights of a model as it is published: before quantize() or add_lora()."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CausalLM(model.config).parameters())


def choose_attention(model, requested, T):
    """Set the attention implementation for sequences of T tokens -> a log line that names it and
    the reason. requested: "auto", "triton" or "sdpa". InputError: triton does not run here."""
    target = model.device, model.config.head_dim, model.dtype
    if requested == "triton":
        problem = why_not_triton(*target)
        if problem:
            raise InputError(f"--attention triton: {problem}; --attention sdpa runs anywhere")
    model.attention = requested
    path, reason = attention_path(*target, T, requested)
    return f"attention: {path} ({reason})"


# ------------------------------------------------------------------------------------------------
# 8-bit weights, for inference on a CPU


def to_int8(x):
    """x (..., n) as int8 and one scale for each row, (..., 1): x is about int8 * scale.

    A row's largest number becomes 127 or -127. The error of each number is at most half a scale, so
    in a row with one very large number all other numbers lose most of their precision. A row is
    only the weights of one output, or one token, so this costs little.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return (x / scale).round_().to(torch.int8), scale


def int8_matmul(x, int8, scale):
    """x (tokens, n) times 8-bit weights (m, n) with scale (1, m) -> (tokens, m)."""
    x8, x_scale = to_int8(x)                                                # (tokens, n)
    sums = torch._int_mm(x8, int8.T)                                        # (tokens, m) int32
    return (sums * x_scale * scale).to(x.dtype)


class Int8Matmul(torch.autograd.Function):
    """int8_matmul() for LoRA, which trains through it. The gradient uses the 8-bit weights and
    ignores that x was rounded."""

    @staticmethod
    def forward(ctx, x, int8, scale):
        ctx.save_for_backward(int8, scale)
        return int8_matmul(x, int8, scale)

    @staticmethod
    def backward(ctx, d_out):
        int8, scale = ctx.saved_tensors
        return (d_out * scale.to(d_out.dtype)) @ int8.to(d_out.dtype), None, None


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights: (..., n) -> (..., m).

    To generate a token, a CPU has to read every weight from memory, and spends more time waiting
    for memory than computing. One byte per weight instead of two halves that. The input is made
    int8, too, each token with a scale of its own, because processors multiply int8 by int8 and add
    up in int32:

        sum_j x_j w_ij  is about  x_scale * w_scale_i * sum_j x8_j w8_ij
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        int8, scale = to_int8(weight.detach())
        bias = None if bias is None else bias.detach()
        # not saved: checkpoints hold the original weights
        self.register_buffer("int8", int8, persistent=False)                # (m, n)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)       # (1, m)
        self.register_buffer("bias", bias, persistent=False)                # (m,)

    def forward(self, x):
        multiply = Int8Matmul.apply if torch.is_grad_enabled() else int8_matmul
        out = multiply(x.flatten(0, -2), self.int8, self.scale)             # (tokens, m)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out.view(*x.shape[:-1], -1)


def replace_linear_layers(model, make):
    """Replace each linear layer of the blocks by make(layer), in place."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, make(layer))


def quantize(model):
    """Give a model 8-bit weights, in place: its linear layers and its output layer. The embedding
    matrix stays as it is for looking up ids, since that reads only a few of its rows."""
    model.output = Int8Linear(model.head)
    if not model.config.tie_word_embeddings:
        del model.lm_head
    replace_linear_layers(model, lambda layer: Int8Linear(layer.weight, layer.bias))
    return model


# ------------------------------------------------------------------------------------------------
# LoRA: fine-tuning with few trainable weights


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained update of low rank: W x + (alpha / r) B A x.

    Fine-tuning changes W (m, n) little, and the product of B (m, r) and A (r, n) can express most
    of that change with r (m + n) numbers instead of m n (arXiv 2106.09685). Only A and B have
    gradients and optimizer state, so W may be stored in bf16 or int8. B starts at zero: training
    begins with the unchanged model. If A did so too, neither would get a gradient.
    """

    def __init__(self, base, rank, generator):
        super().__init__()
        m, n = (base.int8 if isinstance(base, Int8Linear) else base.weight).shape
        self.base = base
        self.lora_A = Linear(n, rank, bias=False)
        self.lora_B = Linear(rank, m, bias=False)
        nn.init.uniform_(self.lora_A.weight, -n ** -0.5, n ** -0.5, generator)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = LORA_ALPHA / rank      # updates of about the same size, whatever the rank

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(model, rank, seed=0):
    """Freeze a model, and give all linear layers of its blocks a trainable update, in place."""
    generator = torch.Generator().manual_seed(seed % 2 ** 63)
    model.requires_grad_(False)
    replace_linear_layers(model, lambda layer: LoRALinear(layer, rank, generator))
    return model


def merge_lora(weights, adapter, rank):
    """Add an adapter to a model's weights, both as {name: tensor}: each W becomes
    W + (alpha / r) B A, with which the model runs as fast as before."""
    for layer in {name.split(".lora_")[0] for name in adapter}:
        A, B = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        W = weights[f"{layer}.weight"]
        update = LORA_ALPHA / rank * B.float() @ A.float()                  # (m, n)
        weights[f"{layer}.weight"] = (W.float() + update).to(W.dtype)


def save_adapter(folder, adapter, rank, base):
    """Write an adapter as a folder that `peft` opens. base: folder or hub name of the model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter}   # q_proj, ...
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(layers)})
    write_tensors(folder, {f"base_model.model.{name}": tensor for name, tensor in adapter.items()},
                  name="adapter_model", config="adapter_config.json")


# ------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def generate_naive(model, prompt, max_new_tokens):
    """Greedy generation without a cache: the model reads everything again for each token. This is
    the reference implementation of generate()."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=model.device))               # (1, T, V)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt):]


class KVCache:
    """Keys (rotated) and values of the positions read so far, for the B sequences of a batch.

    k and v hold a tensor (B, capacity, K, d) for each layer; the first `length` positions are
    filled. All sequences end at the same position. `starts` (B, 1) says where each one starts;
    ragged: whether they differ.
    """

    def __init__(self, model, starts):
        self.model = model
        config = model.config
        shape = (len(starts), 0, config.num_key_value_heads, config.head_dim)
        options = dict(dtype=model.dtype, device=starts.device)
        self.k = [torch.empty(shape, **options) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, **options) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.set_starts(starts)

    def set_starts(self, starts):
        self.starts, self.ragged = starts, bool(starts.any())

    def append(self, layer, k, v):
        """Store the keys and values of new tokens, (B, T, K, d) -> those of all, (B, S, K, d).
        Decoder.forward() raises `length` once all layers have stored theirs."""
        end = self.length + k.shape[1]
        capacity = self.k[layer].shape[1]
        if end > capacity:                  # more than needed, so that this copy is rare
            # F.pad counts from the last dimension; this adds positions at the end
            more = (0, 0, 0, 0, 0, end + end // 2 - capacity)
            self.k[layer] = F.pad(self.k[layer], more)
            self.v[layer] = F.pad(self.v[layer], more)
        self.k[layer][:, self.length:end] = k
        self.v[layer][:, self.length:end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def select(self, indices):
        """Keep these sequences of the batch, in this order; one that is named twice is copied.
        Positions that hold only padding, for all of them, are dropped."""
        first = int(self.starts[indices].min())
        self.set_starts(self.starts[indices] - first)
        self.k = [k[indices, first:] for k in self.k]
        self.v = [v[indices, first:] for v in self.v]
        self.length -= first

    def first(self, length):
        """A copy of the first positions."""
        copy = KVCache(self.model, self.starts)
        copy.k = [k[:, :length].clone() for k in self.k]
        copy.v = [v[:, :length].clone() for v in self.v]
        copy.length = length
        return copy

    def join(self, other):
        """Add the sequences of another cache. The shorter one is moved to the right, so that all
        end at the same position. Its keys stay right: they are rotated by their distance from
        `starts`, which moves, too."""
        length = max(self.length, other.length)

        def joined(ours, theirs):
            ours = F.pad(ours[:, :self.length], (0, 0, 0, 0, length - self.length, 0))
            theirs = F.pad(theirs[:, :other.length], (0, 0, 0, 0, length - other.length, 0))
            return torch.cat([ours, theirs])                                # (B + B', length, K, d)

        self.k = [joined(ours, theirs) for ours, theirs in zip(self.k, other.k)]
        self.v = [joined(ours, theirs) for ours, theirs in zip(self.v, other.v)]
        self.set_starts(torch.cat([self.starts + length - self.length,
                                   other.starts + length - other.length]))
        self.length = length


def sample(logits, temperature, top_k, top_p, uniform):
    """Draw one id per sequence: logits (B, V) -> (B,).

    uniform: for each sequence a tensor (1,) with a random number in [0, 1), as a list or stacked
    (B, 1); not used at temperature 0, which takes the most likely id. top_k keeps only the k most
    likely ids (0: all), whose probabilities are then divided by their sum. top_p keeps only the
    smallest set of most likely ids whose probabilities reach it, at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)                                      # (B, V)
    if top_k or top_p < 1:                                  # sorting is slow: only if needed
        best, ids = probs.sort(dim=-1, descending=True, stable=True)
        best[:, top_k or len(best[0]):] = 0
        best /= best.sum(-1, keepdim=True)
        before = best.cumsum(-1) - best                     # probability of all more likely ids
        before[:, 0] = -1                                   # the most likely id always stays
        probs = best.new_zeros(best.shape).scatter(1, ids, best * (before < top_p))
    uniform = torch.stack(list(uniform)).to(probs.device)                           # (B, 1)
    cumulative = probs.cumsum(-1)
    # how many ids do not exceed the random number: the index of the first one that does
    chosen = (cumulative <= uniform * cumulative[:, -1:]).sum(-1)
    return chosen.clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, samples=1, temperature=0.0, top_k=0, top_p=1.0,
             stop_ids=(), vocab_size=None, seeds=None, on_token=None, on_end=None, batch_size=None):
    """Continue prompts (lists of ids) -> the new ids of each sample, without the stop id, in this
    order: the `samples` of the first prompt, those of the second, ...

    At most batch_size samples are generated together (None: all); when one ends, the next one
    joins. Each gets what it would get alone. seeds: one per sample (None: 0, 1, ...). Ids from
    vocab_size on have no token and are never drawn. on_token(i, id) is called with each id of
    sample i and may return True to end it; on_end(i, new_ids) is called whenever one ends.
    """
    if not prompts or not all(prompts):
        raise InputError("generate: an empty prompt; give at least one id")
    outputs = [[] for _ in range(len(prompts) * samples)]
    generators = [torch.Generator().manual_seed(seed % 2 ** 63)
                  for seed in seeds or range(len(outputs))]

    def accept(i, token):
        """Take the next id of sample i -> whether the sample continues."""
        if token not in stop_ids:
            outputs[i].append(token)
            ended = on_token is not None and on_token(i, token)
            if len(outputs[i]) < max_new_tokens and not ended:
                return True
        if on_end:
            on_end(i, outputs[i])
        return False

    batch = Batch(model)
    waiting = list(range(len(outputs))) if max_new_tokens > 0 else []
    active = []                             # the samples that are in the batch
    while waiting or active:
        room = (batch_size or len(outputs)) - len(active)
        joining, waiting = waiting[:room], waiting[room:]
        if joining:
            batch.join([prompts[i // samples] for i in joining])
            active += joining
        logits = batch.logits.float()                                               # (B, V)
        if vocab_size:
            logits[:, vocab_size:] = float("-inf")
        uniform = [torch.rand(1, generator=generators[i]) for i in active] if temperature else []
        next_ids = sample(logits, temperature, top_k, top_p, uniform)               # (B,)
        unfinished = [b for b, token in enumerate(next_ids.tolist()) if accept(active[b], token)]
        active = [active[b] for b in unfinished]
        batch.step(next_ids, unfinished)
    return outputs


# ------------------------------------------------------------------------------------------------
# Checkpoint folders


def check_vocabulary(model, tokenizer):
    """Raise InputError if the tokenizer has ids for which the model has no embedding."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only "
                         f"{model.config.vocab_size} embeddings; they do not belong together")


def load_model(folder_or_hub_name, device=None, dtype=None, int8=False):
    """Load a published checkpoint or one of ours: every tensor must fit by name and shape.

    dtype: None keeps the stored one (that of the embedding matrix, if several are stored); "int8"
    quantizes the weights; "auto" measures which one is fastest for inference, int8 included only if
    `int8` is true. InputError names the file and the tensor.
    """
    folder = hub_folder(folder_or_hub_name)
    config = Config.from_json(folder / "config.json")
    with torch.device("meta"):
        model = CausalLM(config)
    device = device or default_device()
    check_device(device)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # some published folders hold a copy of the embedding matrix as lm_head.weight
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = read_tensors(folder, shapes, ignored)
    stored = state["model.embed_tokens.weight"].dtype
    if dtype == "auto":
        dtype, model.dtype_reason = choose_inference_dtype(
            device, stored, parameter_count(model), config.hidden_size, config.intermediate_size,
            Int8Linear if int8 else None)
    elif dtype:
        model.dtype_reason = "--dtype"
    if dtype == "int8" and device != "cpu":
        raise InputError(f"--dtype int8: runs on a CPU only, not on {device}")
    for name in list(state):                # one by one: each releases its memory-mapped original
        state[name] = state[name].to(device, stored if dtype in (None, "int8") else dtype)
    model.load_state_dict(state, assign=True)
    del state                               # so that quantize() can release the weights
    if dtype == "int8":
        quantize(model)
    path = folder / "generation_config.json"
    if path.exists():
        model.generation_config = read_json(path)
        if not isinstance(model.generation_config, dict):
            raise InputError(f"{path}: expected an object")
    return model.to(device).eval()


def save_model(model, folder, state=None):
    """Write config.json, generation_config.json and the weights.

    state: all weights by name, where the model itself holds only a part of them (FSDP).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous()
             for name, tensor in (state or model.state_dict()).items()}
    model.config.to_json(folder / "config.json", next(iter(state.values())).dtype)
    write_json(folder / "generation_config.json", model.generation_config)
    write_tensors(folder, state)
