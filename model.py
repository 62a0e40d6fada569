"""The Qwen2.5-Coder decoder: ids to logits, logits to ids, and checkpoint folders.

A Llama-like transformer: token embedding, then blocks of grouped-query attention (biases on
q, k, v only) and SwiGLU, each behind an RMSNorm and added to the residual stream; rotary
positions; the head is the embedding again in sizes up to 3B (report, table 1; facts that table 1
gets wrong are taken from the published config.json files). All names are those of the published
checkpoints, so loading and saving need no key map.

    B batch rows   T tokens in a row   D hidden_size   H query heads   K key-value heads
    d head_dim     V vocabulary rows   S positions that are seen, those in the cache included
    L blocks       F intermediate_size
    Heads always stay in the third place: (B, T, H, d).

What the sizes have in common, and where they differ:

            D / L   F / D   H / K   share of the weights in embedding and head
    0.5B     37      5.4      7     28 %
    1.5B     55      5.8      6     15 %
    3B       57      5.4      8     10 %
    7B      128      5.3      7     14 %    (not tied from here on)
    14B     107      2.7      5     11 %
    32B      80      5.4      5      5 %
    tiny     48      2.7      3     33 %    (README: what other shapes of its size gave)

This file knows ids only, not text (tokenizer.py), and nothing about training (pretrain.py).
It is imported, not run: `python fim.py FILE` and `python evaluate.py` use a trained model.
"""

import dataclasses
import math
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from kernels import (attention_path, linear_cross_entropy, linear_log_probabilities, make_attention,
                     why_not_triton)
from support.files import InputError, hub_folder, read_json, weight_names, write_json

SHARD_BYTES = 5e9       # a larger model is saved in several files with an index

# ------------------------------------------------------------------------------------------------
# Configurations


ROPE_NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
                "beta_slow")        # of rope_scaling; but for the first they may be missing or null


@dataclasses.dataclass
class Config:
    """The fields of a published config.json that change what the model computes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 151936            # rows of the embedding; more than there are tokens
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict = None           # {"type": "yarn", "factor", "original_max_position_..."}
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int = 151643
    eos_token_id: int = 151643          # or a list, as read

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Read a config.json; InputError says what makes it something else than Qwen2."""
        data = read_json(path)
        if not isinstance(data, dict) or data.get("model_type") != "qwen2":
            found = data.get("model_type") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path}: model_type is {found!r}, expected 'qwen2'")

        def require(holds, problem):
            if not holds:
                raise InputError(f"{path}: {problem}")

        rope = data.get("rope_parameters") or {}            # where transformers 5 keeps them
        require(isinstance(rope, dict), "rope_parameters is not a dictionary")
        scaled = rope if rope.get("rope_type", "default") != "default" else None
        # what a file leaves out has the defaults of transformers
        data = {"tie_word_embeddings": False, "rope_theta": rope.get("rope_theta", 1e4),
                "rope_scaling": scaled, "rms_norm_eps": 1e-6,
                **{name: value for name, value in data.items() if value is not None}}
        given = {}
        for field in dataclasses.fields(cls):
            value = given[field.name] = data.get(field.name, field.default)
            require(value is not dataclasses.MISSING, f"lacks {field.name}")
            number = (int, float) if field.type is float else int
            if field.type in (int, float) and "token_id" not in field.name:
                require(isinstance(value, number) and value > 0, f"{field.name} is {value!r}")
        config = cls(**given)
        H, scaling = config.num_attention_heads, config.rope_scaling or {}
        require(config.hidden_size % H == 0, f"hidden_size is not a multiple of {H} heads")
        require(H % config.num_key_value_heads == 0, "heads are not a multiple of key-value heads")
        require(data.get("hidden_act", "silu") == "silu", "hidden_act is not silu")
        require(not data.get("use_sliding_window"), "use_sliding_window is not supported")
        require(data.get("head_dim") in (None, config.head_dim), "head_dim is not hidden/heads")
        require(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}, an odd number")
        require(not scaling or isinstance(scaling, dict) and "yarn" in scaling.values()
                and scaling.get("factor"), "rope_scaling is not yarn with a factor")
        numbers = [value for name in ROPE_NUMBERS if (value := scaling.get(name)) is not None]
        require(all(isinstance(value, (int, float)) and value > 0 for value in numbers),
                "rope_scaling has what is no number above 0")
        return config

    def to_json(self, path, dtype):
        """Write a config.json that transformers and vLLM read as Qwen2."""
        write_json(path, {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "attention_dropout": 0.0, "use_sliding_window": False, "use_cache": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **dataclasses.asdict(self)})


UNTIED = dict(vocab_size=152064, tie_word_embeddings=False)
CONFIGS = {
    "tiny": Config(192, 4, 3, 1, 512, vocab_size=4096, rope_theta=1e4),
    "mini": Config(320, 6, 5, 1, 896, vocab_size=4096, rope_theta=1e4),
    "small": Config(512, 10, 8, 2, 1536, vocab_size=16384, rope_theta=1e4),
    "0.5B": Config(896, 24, 14, 2, 4864),
    "1.5B": Config(1536, 28, 12, 2, 8960),
    "3B": Config(2048, 36, 16, 2, 11008),
    "7B": Config(3584, 28, 28, 4, 18944, **UNTIED),
    "14B": Config(5120, 48, 40, 8, 13824, **UNTIED, rms_norm_eps=1e-5),
    "32B": Config(5120, 64, 40, 8, 27648, **UNTIED, rms_norm_eps=1e-5),
}

# ------------------------------------------------------------------------------------------------
# Positions


def rotary_frequencies(config):
    """How far each pair of channels turns per position (d/2,), and a factor on cos and sin.

    Plain RoPE: theta^(-2i/d). YaRN (arXiv 2309.00071) keeps the fast pairs, slows the slow ones
    down by `factor`, blends those between, and scales attention scores by (0.1 ln(factor) + 1)^2.
    """
    d, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    # on the CPU also when load_model() builds the model on "meta"
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d)
    if not scaling:
        return frequencies, 1.0
    length = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = scaling["factor"]

    def channel(turns):     # the pair that makes so many turns within the original length
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(channel(scaling.get("beta_slow") or 1)), d - 1)
    slow = ((torch.arange(d // 2, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    scale = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
    return frequencies / factor * slow + frequencies * (1 - slow), scale


def rotate(x, cos, sin):
    """Turn channel i against channel i + d/2: x (B, T, H, d), cos and sin (B, T, 1, d).

    The first half becomes x1 cos - x2 sin, the second x2 cos + x1 sin; the sin that is given holds
    the signs: its first half is negative.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)                         # (x2, x1)
    return torch.addcmul(x * cos, swapped, sin)


# ------------------------------------------------------------------------------------------------
# The decoder


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: weights stay in fp32 for the optimizer,
    activations may be bf16. This is what autocast does, in two lines."""

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32: (..., D) -> (..., D)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
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
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                # (B, T, H, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                # (B, T, K, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)                            # (B, all so far, K, d)
        return self.o_proj(attend(q, k, v).flatten(2))                  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, size = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, size, bias=False)
        self.up_proj = Linear(D, size, bias=False)
        self.down_proj = Linear(size, D, bias=False)

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
    """Embedding, blocks and the last norm: ids (B, T) -> hidden (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False      # keep only the blocks' inputs for the backward
        self.set_frequencies(config)

    def set_frequencies(self, config):
        """Set how positions turn queries and keys (on the CPU: move the model afterwards)."""
        frequencies, self.rotary_scale = rotary_frequencies(config)
        signed = torch.cat([-frequencies, frequencies])     # cos(-a) = cos(a), sin(-a) = -sin(a)
        self.register_buffer("frequencies", signed, persistent=False)               # (d,)

    def rotary(self, input_ids, document_starts, past, dtype):
        """cos and sin for rotate(), (B or 1, T, 1, d); a document's positions start at 0."""
        T = input_ids.shape[1]
        index = torch.arange(past, past + T, device=input_ids.device)[None]         # (1, T)
        if document_starts is not None:
            index = index - document_starts                                         # (B, T)
        angles = index[:, :, None, None] * self.frequencies                         # (B, T, 1, d)
        cos, sin = angles.cos(), angles.sin()
        if self.rotary_scale != 1:
            cos, sin = cos * self.rotary_scale, sin * self.rotary_scale
        return cos.to(dtype), sin.to(dtype)

    def forward(self, input_ids, document_starts=None, cache=None, dtype=None, attention="auto"):
        x = self.embed_tokens(input_ids).to(dtype=dtype)                            # (B, T, D)
        (B, T), past = input_ids.shape, cache.length if cache is not None else 0
        # what depends on positions alone is made once for all layers
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
    """The decoder and its head.

    compute_dtype: the activations' dtype, if not that of the weights. attention: "auto" leaves the
    choice to kernels.attention_path, "triton", "sdpa" and "formula" name one.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype, self.attention = None, "auto"
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight      # (V, D)

    def forward(self, input_ids, document_starts=None, targets=None, reduce="sum", cache=None,
                last=False):
        """ids (B, T) -> logits (B, T, V), or (B, 1, V) with last=True.

        With targets (B, T), -100 = no loss: their loss summed, in nats; with reduce="none" the
        log-probability of each target (B, T). Then the logits are never all there at once.
        """
        hidden = self.model(input_ids, document_starts, cache, self.compute_dtype,
                            self.attention)                                         # (B, T, D)
        if targets is None:
            hidden = hidden[:, -1:] if last else hidden
            return F.linear(hidden, self.head.to(hidden.dtype))             # (B, T or 1, V)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()                      # (B * T, D)
        if reduce == "sum":
            return linear_cross_entropy(rows, self.head, wanted)                    # ()
        return linear_log_probabilities(rows, self.head, wanted).view(targets.shape)


def init_weights(model, seed):
    """Normal weights with the published deviation, zero biases; the same anywhere for a seed."""
    generator = torch.Generator().manual_seed(seed % 2 ** 63)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, model.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def choose_attention(model, wanted, T):
    """Set what computes attention -> in words, what that is for rows of T tokens, and why.

    wanted: "auto", "triton" or "sdpa". InputError: triton is wanted and does not run here.
    """
    place = model.head.device, model.config.head_dim, model.compute_dtype or model.head.dtype
    if wanted == "triton" and (problem := why_not_triton(*place)):
        raise InputError(f"--attention triton: {problem}; --attention sdpa runs anywhere")
    model.attention = wanted
    return "attention by {} ({})".format(*attention_path(*place, T, wanted))


def loss_head(model):
    """In a word, what computes the losses."""
    return "torch" if why_not_triton(model.head.device) else "triton"


# ------------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """Keys (rotated) and values of what the model has read: per layer (B, capacity, K, d)."""

    def __init__(self, model, B, capacity):
        config, weight = model.config, model.head
        shape = (B, capacity, config.num_key_value_heads, config.head_dim)
        make = dict(dtype=model.compute_dtype or weight.dtype, device=weight.device)
        self.k = [torch.empty(shape, **make) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, **make) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def append(self, layer, k, v):
        end = self.length + k.shape[1]
        self.k[layer][:, self.length:end] = k
        self.v[layer][:, self.length:end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def keep(self, rows):
        """Forget all rows of the batch but these, one named twice becomes two."""
        for kept in (self.k, self.v):
            kept[:] = [tensor[rows] for tensor in kept]


def choose(logits, temperature, top_k, top_p, chance):
    """Choose one id per row: logits (B, V), chance (B, 1) in [0, 1) -> (B,).

    Temperature 0: the likeliest. top_k: only the k best (0: all). top_p: of these only the fewest
    best that reach this share of their probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)                              # (B, V)
    if top_k or top_p < 1:                                  # sorting takes longest: only if asked
        best, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        best[:, top_k or len(best[0]):] = 0
        best /= best.sum(-1, keepdim=True)
        before = best.cumsum(-1) - best
        before[:, 0] = -1                                   # the likeliest always stays
        probabilities = best.new_zeros(best.shape).scatter(1, ids, best * (before < top_p))
    reached = probabilities.cumsum(-1)                      # the first that passes chance * all
    place = (reached <= chance * reached[:, -1:]).sum(-1)
    return place.clamp(max=logits.shape[1] - 1)


def pad_left(prompts, device):
    """Prompts -> input_ids (B, T) and document_starts (B, T), None if all are equally long.

    Each padding id is a document of its own, so nothing in the prompt sees it.
    """
    T = max(map(len, prompts))
    padding = torch.tensor([[T - len(prompt)] for prompt in prompts], device=device)    # (B, 1)
    input_ids = torch.tensor([[p[0]] * (T - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.minimum(torch.arange(T, device=device)[None], padding)               # (B, T)
    return input_ids, starts if padding.any() else None


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
             stop_ids=(), stop=None, vocab_size=None, seed=0, on_token=None):
    """Continue each prompt (a list of ids) -> the new ids of each, without the stop id.

    stop(new_ids) -> bool ends a row early. vocab_size: rows from there on have no token and are
    never chosen. on_token(row, id) sees each id as it comes. Shorter prompts are padded on the
    left, as if another document stood before them, so a batch gives what each prompt gives alone.
    """
    if not prompts or not all(prompts):
        raise InputError("generate: an empty prompt; give at least one id")
    B, device = len(prompts), model.head.device
    once = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    input_ids, starts = pad_left(list(once), device)
    cache = KVCache(model, len(once), input_ids.shape[1] + max_new_tokens)
    generators = [torch.Generator().manual_seed((seed + row) % 2 ** 63) for row in range(B)]
    new, rows = [[] for _ in prompts], list(range(B))       # rows: those that still go on
    for _ in range(max_new_tokens):
        logits = model(input_ids, starts, cache=cache, last=True)[:, -1].float()    # (B, V)
        if len(logits) < len(rows):             # the same prompts were read once: a row for each
            shared = [once[tuple(prompt)] for prompt in prompts]
            logits, starts = logits[shared], None if starts is None else starts[shared]
            cache.keep(shared)
        if vocab_size:
            logits[:, vocab_size:] = float("-inf")
        chance = temperature and torch.stack(                   # the likeliest needs none
            [torch.rand(1, generator=generators[row]) for row in rows]).to(device)  # (B, 1)
        chosen, going = choose(logits, temperature, top_k, top_p, chance), []       # (B,)
        for place, (row, token) in enumerate(zip(rows, chosen.tolist())):
            if token in stop_ids:
                continue
            new[row].append(token)
            if on_token:
                on_token(row, token)
            if not (stop and stop(new[row])):
                going.append(place)
        if not going:
            break
        input_ids, starts = chosen[:, None], None if starts is None else starts[:, -1:]     # (B, 1)
        if len(going) < len(rows):
            rows, input_ids = [rows[place] for place in going], input_ids[going]
            starts = None if starts is None else starts[going]
            cache.keep(going)
    return new


@torch.no_grad()
def generate_naive(model, prompt, max_new_tokens):
    """Greedy generation by reading everything again for each token: the twin of generate()."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=model.head.device))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt):]


# ------------------------------------------------------------------------------------------------
# Checkpoint folders


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """Raise InputError unless tensors can be made on the device."""
    try:
        torch.empty(1, device=name).tolist()            # "meta" holds no numbers
    except (RuntimeError, AssertionError, AttributeError, ImportError):
        raise InputError(f"--device {name}: not available here, {default_device()} is") from None


def check_vocabulary(model, tokenizer):
    """Raise InputError if the tokenizer has ids for which the model has no rows."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only "
                         f"{model.config.vocab_size} rows; they do not belong together")


def load_model(folder_or_hub_name, device=None, dtype=None):
    """Read a published or own checkpoint: every tensor must fit by name and shape.

    The files are memory-mapped; dtype None keeps theirs. A stored lm_head.weight is ignored when
    the configuration ties it to the embedding. InputError names file and tensor.
    """
    folder = hub_folder(folder_or_hub_name)
    config = Config.from_json(folder / "config.json")
    with torch.device("meta"):
        model = CausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    device, state = device or default_device(), {}
    check_device(device)
    for file in (folder / name for name in weight_names(folder)):
        if not file.exists():
            raise InputError(f"{file}: no such file; the folder holds no whole checkpoint")
        try:
            with safe_open(file, framework="pt") as tensors:
                names = sorted(set(tensors.keys()) - ignored)
            for name in names:
                with safe_open(file, framework="pt") as tensors:    # anew: frees what was copied
                    tensor = tensors.get_tensor(name)
                if (shape := tuple(tensor.shape)) != shapes.get(name):
                    raise InputError(f"{file}: {name} has shape {shape}, config.json asks for "
                                     f"{shapes.get(name, 'no such tensor')}")
                if not tensor.is_floating_point():
                    raise InputError(f"{file}: {name} holds {tensor.dtype}, not floats")
                state[name] = tensor.to(device, dtype)
        except SafetensorError as error:
            raise InputError(f"{file}: cut off or damaged ({error}); "
                             "copy or download it again") from None
    if missing := sorted(set(shapes) - set(state)):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def save_model(model, folder, state=None):
    """Write config.json, generation_config.json and the weights, sharded above SHARD_BYTES.

    state: the full weights by name, where the model itself holds only a part of them (FSDP).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous()
             for name, tensor in (state or model.state_dict()).items()}
    model.config.to_json(folder / "config.json", next(iter(state.values())).dtype)
    write_json(folder / "generation_config.json", {
        "bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id,
        "max_new_tokens": 2048})
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else "model"
        places.update(dict.fromkeys(shard, f"{file}.safetensors"))
        # beside, then renamed: the tensors may be memory-mapped from the file that is replaced
        try:
            save_file(shard, folder / f"{file}.writing", metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"{folder}: cannot be written, is the disk full? ({error})") from None
        os.replace(folder / f"{file}.writing", folder / f"{file}.safetensors")
    for old in folder.glob("model*.safetensors*"):          # of a save in other shards
        if old.name not in places.values():
            old.unlink()
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": places})
