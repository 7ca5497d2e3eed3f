"""The language model: Llama, written by hand. Read this file first, then data.py.

Self-backtracking (arXiv 2502.04404) in five files:

    model.py     a language model, and a key/value cache in which stepping back copies nothing
    data.py      what it is trained on: solutions, and mistakes that end in `<backtrack>`
    search.py    sample answers; where the model says `<backtrack>`, drop its last line and branch
    train.py     the training loop
    improve.py   expert iteration: train on what the search found

Modules have Hugging Face's names, so that checkpoints can be exchanged with transformers.

Shapes: B rows of a batch, T new tokens, S positions that they attend to, H query heads, K key/value
heads, D head size, C hidden size, V vocabulary size. (In data.py a row is a training example.)
"""

import argparse
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass
class LlamaConfig:
    """The fields of Hugging Face's config.json that determine what Llama computes. (The defaults
    are the sizes of Llama-3.2-1B; its rope_scaling comes with its checkpoint.)"""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


# ---- The model -----------------------------------------------------------------------------------


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """(D / 2,) fp32: the angle, in radians, by which one position rotates each pair of dimensions.

    Llama 3 lowers the slow frequencies to extend its context. A pair that makes fewer than
    `low_freq_factor` turns over the original context rotates `factor` times more slowly. A pair
    that makes more than `high_freq_factor` turns is left as it is. Pairs in between are blended.
    """
    # on the CPU even if `load_llama` builds the model on the meta device: no file has this buffer
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, lowered; 1: fast, kept
    return torch.lerp(frequency / scaling["factor"], frequency, share_kept)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: rotate x (B, H, T, D) by angles, given their cos and sin (B or 1, 1, T, D / 2).
    Dimension i is paired with dimension i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Grouped-query attention of q (B, H, T, D) over k, v (B, K, S, D); returns (B, H, T, D).
    mask (B, 1, T, S), of q's dtype, is 0 where a token may attend and -inf where it may not.
    Without a mask attention is causal, and S = T."""
    is_grouped = q.shape[1] != k.shape[1]  # H query heads share K key heads
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
    if q.is_cpu:  # where PyTorch's own kernel trains far more slowly in bf16
        return attend_on_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim  # the same for the values
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cached_rows):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cached_rows is None:
            x = attend(q, k, v)
        else:
            x = cached_rows.attend(self.layer_idx, q, k, v)
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))


class LlamaMLP(nn.Module):
    """SwiGLU: one projection of x gates another."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, cached_rows):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cached_rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, layers, last norm: token ids (B, T) -> hidden states (B, T, C)."""

    gradient_checkpointing = False  # keep only each layer's input; recompute the rest in backward
    compiled_layer = None  # LlamaDecoderLayer.forward, compiled (set by `fit` in train.py)

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("rope", rope_frequencies(config), persistent=False)

    def forward(
        self, input_ids: torch.Tensor, cached_rows: "CachedRows | None" = None
    ) -> torch.Tensor:
        T = input_ids.shape[1]
        if cached_rows is None:
            positions = torch.arange(T, device=input_ids.device)[None]  # (1, T)
        else:
            positions = cached_rows.positions  # (B, T)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        # (B or 1, 1, T, 1) * (D / 2,) -> (B or 1, 1, T, D / 2), in fp32
        angles = positions[:, None, :, None] * self.rope
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)
        for layer in self.layers:
            x = self.run_layer(layer, x, cos, sin, cached_rows)
        return self.norm(x)

    def run_layer(self, layer: LlamaDecoderLayer, x, cos, sin, cached_rows):
        """One layer: compiled and with gradient checkpointing, as the attributes above say. The
        layer is compiled rather than the model, so that all layers share the compiled code. A
        search always uses the plain layer."""
        run = layer
        if self.compiled_layer and cached_rows is None:
            run = partial(self.compiled_layer, layer)
        if self.gradient_checkpointing and x.requires_grad:
            return checkpoint(run, x, cos, sin, cached_rows, use_reentrant=False)
        return run(x, cos, sin, cached_rows)


class Llama(nn.Module):
    """Llama with its language-model head; transformers' LlamaForCausalLM by another name."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        cached_rows: "CachedRows | None" = None,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V), in the weights' dtype.

        labels (B, T) int64, -100 for no loss: return the *sum* of the cross-entropies instead, a
            scalar in fp32 or wider. Logits are computed at labelled positions only.
        cached_rows: continue after cached tokens; the new keys and values are added to the cache.
        last (B,) int64: return the logits at this one position of each row only, (B, V).
        """
        hidden = self.model(input_ids, cached_rows)  # (B, T, C)
        if labels is not None:
            targets = labels[:, 1:].flatten()  # position t predicts the token at t + 1
            chosen = loss_positions(targets)
            logits = self.lm_head(hidden[:, :-1].flatten(0, 1)[chosen])  # (chosen, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, targets[chosen], reduction="sum")
        if last is not None:
            hidden = hidden[torch.arange(len(last), device=last.device), last]  # (B, C)
        return self.lm_head(hidden)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device="cpu", dtype: torch.dtype | None = None, vocab_size: int = 0
    ) -> "Llama":
        """Open a folder or a Hub id in Hugging Face's layout; `dtype` None keeps the file's. If the
        embedding and the head have fewer than vocab_size rows, new rows are added, each the mean of
        the old ones: this is how `<backtrack>` joins a vocabulary. Raises UserError."""
        return load_llama(checkpoint_folder(name), device, dtype, vocab_size)

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype = torch.bfloat16, record: str = ""
    ) -> None:
        """Write config.json and model.safetensors (above 5 GB: shards with an index). A hash of
        `record`, the text of record.json, is stored with the weights, so that a record.json that
        does not belong to them is noticed. Raises UserError."""
        save_llama(self, Path(folder), dtype, record)


# ---- The cache -----------------------------------------------------------------------------------


class KVCache:
    """The keys and values of every layer, with one slot for each token.

    A row of a batch has no keys and values of its own. It is a list of slots, one for each of its
    tokens, and rows that were forked from one row share the slots of their common beginning. So
    forking and stepping back copy no key or value:

        row [3, 5, 6]  takes two different tokens     -> [3, 5, 6, 9] and [3, 5, 6, 4]: a fork
        row [3, 5, 6, 4]  drops its last two tokens   -> [3, 5]: a step back

    (What is left has no logits to sample from. So its last token is fed again, into a new slot.)

    (This is the idea of paged attention, Kwon et al. 2023, with pages of one token. But its kernels
    read keys and values where they are. Here `read` gathers those of the rows into a buffer, layer
    after layer, each time that they attend.)
    """

    def __init__(self, config: LlamaConfig, slots: int, device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, config.head_dim)
        # On a CPU the part of a large cache that is never used takes no memory.
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        # Slot 0 belongs to no token. Padding tokens write to it, and the empty columns of a row
        # read it. Attention gives these columns the weight 0, but 0 * NaN would be NaN, so slot 0
        # must be finite from the start.
        self.kv[:, :, 0] = 0
        self.free = list(range(slots - 1, 0, -1))
        self.buffer = self.kv.new_empty(0)  # what `read` returns lies here

    @staticmethod
    def bytes_per_slot(config: LlamaConfig, dtype: torch.dtype) -> int:
        vectors = config.num_hidden_layers * 2 * config.num_key_value_heads
        return vectors * config.head_dim * dtype.itemsize

    def lend(self) -> "Slot":
        """A free slot, for one token. Raises UserError if none is left."""
        if not self.free:
            raise UserError("the cache is too small for this search: increase --cache_gib")
        return Slot(self.free.pop(), self.free)

    def read(self, layer_idx: int, slots: torch.Tensor) -> torch.Tensor:
        """The keys and values in slots (B, S): (2, B, S, K, D). The same as
        `self.kv[layer_idx][:, slots]`, but in a buffer that is reused: much faster on a CPU."""
        stored = self.kv[layer_idx].flatten(2)  # (2, slots, K * D)
        needed = 2 * slots.numel() * stored.shape[2]
        if len(self.buffer) < needed:
            self.buffer = stored.new_empty(needed * 3 // 2)  # larger, so that it seldom grows
        seen = self.buffer[:needed].view(2, slots.numel(), -1)
        for vectors, out in zip(stored, seen):  # keys, then values
            torch.index_select(vectors, 0, slots.flatten(), out=out)
        return seen.view(2, *slots.shape, *self.kv.shape[3:])


class Slot:
    """A token's place in the cache. Python counts the references to it: when the last one goes, it
    calls `__del__`, and the place is free again. (A cycle of references would keep it alive, so
    search.py makes none.)"""

    __slots__ = ("number", "free")

    def __init__(self, number: int, free: list[int]):
        self.number = number
        self.free = free

    def __del__(self):
        self.free.append(self.number)


class CachedRows:
    """What attention needs while T new tokens of each row pass the model: in which slots of the
    cache all tokens of the rows are.

    slots (B, S) int64: the slot numbers of each row's tokens, in order and with the new ones; 0
        where there is no token.
    positions (B, T) int64: those of the new tokens in their rows. A row with fewer than T new
        tokens is padded. Padding has positions beyond the row's end, where slots are 0.

    Two rows, one with two new tokens, the other with one new token and padding:

        slots       [3, 5, 6, 9]    positions    [2, 3]    new_slots    [6, 9]
                    [3, 7, 0, 0]                 [1, 2]                 [7, 0]
    """

    def __init__(self, cache: KVCache, slots: torch.Tensor, positions: torch.Tensor):
        self.cache = cache
        self.slots = slots
        self.positions = positions
        # (B, T): a row's token at position p has the slot in column p; padding has slot 0
        self.new_slots = slots.gather(1, positions)
        # On a CPU rows attend in blocks of 128, each over as many columns as its longest row has:
        # adjacent rows began together and are of similar length. On a GPU all attend at once, over
        # all columns, because finding the longest row would mean waiting for the GPU.
        rows_at_once = 128 if slots.is_cpu else len(slots)
        self.blocks = []  # [(which rows, their slots, their mask), ...]
        for begin in range(0, len(slots), rows_at_once):
            rows = slice(begin, begin + rows_at_once)
            width = int(positions[rows].max()) + 1 if slots.is_cpu else slots.shape[1]
            columns = torch.arange(width, device=slots.device)
            is_later = columns > positions[rows][:, None, :, None]  # (rows, 1, T, width)
            mask = torch.zeros(is_later.shape, device=slots.device, dtype=cache.kv.dtype)
            mask.masked_fill_(is_later, -torch.inf)
            self.blocks.append((rows, slots[rows, :width], mask))

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Write the new tokens' k, v (B, K, T, D) into the cache, and let their queries q
        (B, H, T, D) attend, causally, to all cached tokens of their rows. Returns (B, H, T, D)."""
        keys, values = self.cache.kv[layer_idx]  # (slots, K, D)
        keys[self.new_slots] = k.transpose(1, 2)
        values[self.new_slots] = v.transpose(1, 2)
        attended = []
        for rows, slots, mask in self.blocks:
            all_k, all_v = self.cache.read(layer_idx, slots).transpose(2, 3)  # (rows, K, width, D)
            attended.append(attend(q[rows], all_k, all_v, mask))
        return torch.cat(attended)


# ---- For speed on a CPU --------------------------------------------------------------------------


def attend_on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """Causal attention, written out. Query heads that share a key head are stacked along T, so that
    there is one product per key head: with H = 8 and K = 2, heads 0 to 3 are 4 * T queries of key
    head 0."""
    B, H, T, D = q.shape
    K = k.shape[1]
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    stacked = (q * D**-0.5).reshape(B, K, H // K * T, D)
    scores = stacked @ k.transpose(-1, -2)  # (B, K, H/K * T, T)
    scores = scores.view(B, H, T, T).masked_fill(~sees, -torch.inf)
    weights = scores.softmax(-1).view(B, K, H // K * T, T)
    return (weights @ v).view(B, H, T, D)


def loss_positions(targets: torch.Tensor) -> torch.Tensor:
    """The positions whose logits the loss needs: where targets, 1-D int64, are not -100.

    On a CPU other positions are added, up to a multiple of 64, because PyTorch builds and caches a
    kernel for every new size of a matrix product there. Their target is -100, so cross_entropy
    ignores them."""
    labelled = (targets != -100).nonzero()[:, 0]
    if not targets.is_cpu:
        return labelled
    missing = -len(labelled) % 64  # up to the next multiple
    unlabelled = (targets == -100).nonzero()[:, 0]
    return torch.cat([labelled, unlabelled[:missing]])


# ==== Plumbing: a first reading may stop here =====================================================

# ---- Checkpoints on disk and on the Hub ----------------------------------------------------------

# Options of Hugging Face's Llama that have one value here.
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
INDEX = "model.safetensors.index.json"  # of a checkpoint in several files
MOST_TOKENS = 2**24  # in a vocabulary
RESUME = "resume.pt"  # the state of a run that can be resumed, see train.py
NEEDED = ["*config.json", "*.jinja", "tokenizer.json", "record.json", "model*.safetensors*"]


def is_whole(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high  # isinstance would take True for a number


def is_list(value, holds) -> bool:
    return isinstance(value, list) and all(holds(one) for one in value)


def is_token(value) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return all(is_whole(token, 0, MOST_TOKENS) for token in tokens)


# What a field of a file must be: in words, and as a function that checks a value.
SIZE = ("1 or more, and not huge", partial(is_whole, low=1, high=2**20))
LENGTH = ("1 or more", partial(is_whole, low=1, high=2**31))
POSITIVE = ("above 0", lambda value: type(value) in (int, float) and 0 < value < 1e18)
COUNT = ("a whole number", partial(is_whole, low=0, high=2**62))
BOOL = ("true or false", lambda value: isinstance(value, bool))
TEXT = ("text", lambda value: isinstance(value, str))
OBJECT = ("an object", lambda value: isinstance(value, dict))
OBJECTS = ("a list of objects", lambda value: is_list(value, OBJECT[1]))
TOKEN = ("a token", is_token)

CONFIG_FIELDS = {
    "vocab_size": ("1 or more", partial(is_whole, low=1, high=MOST_TOKENS)),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": ("1 to 256", partial(is_whole, low=1, high=257)),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": POSITIVE,
    "initializer_range": POSITIVE,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,  # one of these two may hold the following five
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": LENGTH,
    "tie_word_embeddings": BOOL,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKEN,
    "pad_token_id": TOKEN,
}


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_fields(values: dict, fields: dict, place: str, needed=()) -> None:
    """Raises UserError if a field of a file is not what it must be, or a needed one is missing."""
    for field, (what, holds) in fields.items():
        if field in needed and field not in values:
            raise UserError(f"{place} lacks {field}")
        if field in values and not holds(values[field]):
            raise UserError(f"{place}: {field} must be {what}, not {str(values[field])[:80]!r}")


def read_config(raw: dict) -> LlamaConfig:
    """config.json's content, in either spelling of the RoPE fields, as LlamaConfig. Raises
    UserError for what is no Llama."""
    raw = {key: value for key, value in raw.items() if value is not None}
    check_fields(raw, CONFIG_FIELDS, "config.json", ("hidden_size", "num_attention_heads"))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"config.json says {key}: {raw[key]!r}; this Llama has {value!r} only")
    if rope_type not in ("default", "llama3"):
        raise UserError(f"config.json is no Llama's: RoPE of type {rope_type!r}")
    check_fields(rope, CONFIG_FIELDS, "config.json", LLAMA3 if rope_type == "llama3" else ())
    names = [field.name for field in dataclasses.fields(LlamaConfig)]
    values = {name: raw[name] for name in names if name in raw}
    # where config.json does not say these, what transformers would take
    heads = raw["num_attention_heads"]
    values["num_key_value_heads"] = raw.get("num_key_value_heads", heads)
    values["head_dim"] = raw.get("head_dim", raw["hidden_size"] // heads)
    values["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    values["rms_norm_eps"] = raw.get("rms_norm_eps", 1e-6)
    values["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    values["rope_scaling"] = None
    if rope_type == "llama3":
        values["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    if values["num_attention_heads"] % values["num_key_value_heads"] or values["head_dim"] % 2:
        raise UserError(
            "config.json: num_key_value_heads must divide num_attention_heads, head_dim be even"
        )
    return LlamaConfig(**values)


def load_llama(folder: Path, device, dtype: torch.dtype | None, vocab_size: int) -> Llama:
    """See Llama.from_pretrained."""
    config = read_config(read_json(folder / "config.json"))
    new_rows = max(vocab_size - config.vocab_size, 0)
    config.vocab_size += new_rows
    with torch.device("meta"):  # no memory: the files' tensors become the weights
        model = Llama(config)
    weights = read_weights(folder, device, dtype, new_rows)
    embedding = weights.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:
        weights["lm_head.weight"] = embedding  # the file has it once
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # it names what is missing, left over or of another shape
        reason = str(error).split(":", 1)[-1]
        message = f"the weights in {folder} do not fit its config.json: {reason}"
        raise UserError(message) from None
    if config.tie_word_embeddings:  # assigning made two parameters of it
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)  # the buffer `rope`; the weights are there


def save_llama(model: Llama, folder: Path, dtype: torch.dtype, record: str) -> None:
    """See Llama.save_pretrained."""
    weights = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config = {"architectures": ["LlamaForCausalLM"], **FIXED, **dataclasses.asdict(model.config)}
    config["dtype"] = str(dtype).removeprefix("torch.")
    with replacing(folder) as staging:
        metadata = {"record": fingerprint(record)} if record else None
        save_torch_state_dict(weights, staging, metadata=metadata)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(record: str) -> str:
    return hashlib.sha256(record.encode()).hexdigest()[:16]


def is_file_name(value) -> bool:
    if not isinstance(value, str) or len(value.encode()) > 255:
        return False
    return value == Path(value).name and value not in ("", "..")


def read_weights(folder: Path, device, dtype: torch.dtype | None, new_rows: int) -> dict:
    """All tensors of a checkpoint by name; embedding and head with so many new rows, their mean. A
    file is opened anew for each tensor, so that what has been read of it need not stay in memory.
    Raises UserError."""
    paths = weight_files(folder)
    opened = [identity(path) for path in paths]
    weights = {}
    for path in paths:
        try:
            open_file = partial(safe_open, path, framework="pt", device=str(device))
            with open_file() as file:
                keys = [key for key in file.keys() if "rotary" not in key]
                check_record(folder, file.metadata())
            # those that grow come first: growing needs memory for the old and the new tensor
            keys.sort(key=lambda key: ".layers." in key)
            for key in keys:
                with open_file() as file:
                    value = file.get_tensor(key).to(dtype)
                # aminmax makes no copy of the tensor
                if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
                    raise UserError(f"{path}: {key} holds NaN or infinite numbers")
                if new_rows and key in ("model.embed_tokens.weight", "lm_head.weight"):
                    mean = value.mean(0, keepdim=True, dtype=torch.float32).to(value.dtype)
                    value = torch.cat([value, mean.expand(new_rows, -1)])
                weights[key] = value
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
    if opened != [identity(path) for path in paths]:  # tensors of two models
        raise UserError(f"{folder} was saved anew while it was read: try again")
    return weights


def weight_files(folder: Path) -> list[Path]:
    """Raises UserError."""
    names = ["model.safetensors"]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        check_record(folder, index.get("metadata"))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not is_list(list(weight_map.values()), is_file_name):
            raise UserError(f"{folder / INDEX} does not map weights to files beside it")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():  # a named pipe would never end
            raise UserError(f"{folder / name} is missing")
    return [folder / name for name in names]


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def check_record(folder: Path, metadata) -> None:
    """Warn if weights were saved with another record.json than the one beside them."""
    named = metadata.get("record") if isinstance(metadata, dict) else None
    path = folder / "record.json"
    if named and path.is_file():
        if fingerprint(path.read_text(encoding="utf-8", errors="replace")) != named:
            note(f"{path} is not the one its weights were saved with")


def checkpoint_folder(
    name: str | Path, repo_type: str = "model", patterns: list[str] | None = None
) -> Path:
    """The folder `name` itself, or the cached download of the Hub's model or dataset of that name:
    of the files that match patterns, or of all that are needed. Raises UserError."""
    if Path(name).is_dir():
        with suppress(OSError):  # it may be read-only
            settle(Path(name))
        return Path(name)
    if str(name).startswith((".", "/", "~")) or str(name).strip("/").count("/") != 1:
        hint = "train.py makes the folder checkpoint; a Hub id is OWNER/NAME"
        raise UserError(f"no such file or folder: {name} ({hint})")
    try:
        patterns = patterns or NEEDED
        return Path(snapshot_download(str(name), repo_type=repo_type, allow_patterns=patterns))
    except GatedRepoError:
        address = f"https://huggingface.co/{name}"
        message = f"{name} is gated: ask for access at {address}, then `hf auth login`"
        raise UserError(message) from None
    except Exception as error:  # no network, no such repository, no disk: the client has dozens
        reason = str(error).split("\n")[0]
        message = f"no {repo_type} at {name}: no such folder, and from the Hub: {reason}"
        raise UserError(message) from None


def read_json(path: Path) -> dict:
    """A file's JSON object. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise TypeError("it holds no JSON object")
        json.dumps(values, ensure_ascii=False).encode()  # ValueError of a lone surrogate
        return values
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


# only other programs use these; Tokenizer saves them again as it read them
CARRIED = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
# {pattern: names}. If a new save has a file that matches the pattern, files of these names that an
# older save has left are deleted: they would be mistaken for parts of the new one.
STALE = {"model*.safetensors": (RESUME, INDEX, "model.safetensors"), "tokenizer.json": CARRIED}
UNFINISHED = re.compile(r"\.(saving|saved)-(\d+)-\w{8}")  # state, number of the process


@contextmanager
def replacing(folder: str | Path):
    """A temporary folder to write files into. When all are complete they replace those in `folder`.
    If the program is killed meanwhile, either the old files are left, or `settle` moves the new
    ones to their places: the temporary folder is .saving-PID-... while files are written, and
    .saved-PID-... while they are moved. (An empty file is not moved: see STALE. May be nested:
    `folder` is then the outer temporary one.) Raises UserError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder, before_save=True)
        with tempfile.TemporaryDirectory(prefix=f".saving-{os.getpid()}-", dir=folder) as own:
            staging = Path(own) / "files"
            staging.mkdir()
            yield staging
            for file in staging.iterdir():
                # safetensors writes for the owner alone; a new folder's mode follows the umask
                file.chmod(staging.stat().st_mode & 0o666)
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(f"{file.name} there is a folder")
            for pattern, names in STALE.items():
                if list(staging.glob(pattern)):
                    for name in names:
                        # where the new save has none: an empty file, which means `delete the old`
                        (staging / name).touch()
            complete = staging.rename(folder / Path(own).name.replace(".saving", ".saved"))
            move(complete, folder)
    except BrokenPipeError:  # of what was printed meanwhile
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from None


def move(complete: Path, folder: Path) -> None:
    """Move files to their places, weights last. If interrupted, it can be done once more."""
    for file in sorted(complete.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        with suppress(FileNotFoundError):  # another process moves them, too
            if file.stat().st_size == 0:
                (folder / file.name).unlink(missing_ok=True)
                file.unlink()
            else:
                os.replace(file, folder / file.name)
    with suppress(FileNotFoundError):
        complete.rmdir()


def check_writable(folder: Path) -> None:
    """Raises UserError if a save into this folder would fail: better now than after hours."""
    if is_main():
        with replacing(folder):
            pass


def settle(folder: Path, before_save: bool = False) -> None:
    """Finish the saves that killed processes left behind in a folder: complete ones are moved to
    their places. before_save: incomplete ones are removed, and complete ones are moved even if
    their process may be running, lest they replace the new save later."""
    for left_behind in folder.glob(".sav*-*-*"):
        name = UNFINISHED.fullmatch(left_behind.name)
        if not name:
            continue
        state, pid = name[1], int(name[2])
        is_alive = pid != os.getpid() and is_running(pid)  # a save of this process has failed
        if state == "saved" and (before_save or not is_alive):
            move(left_behind, folder)
        elif state == "saving" and before_save and not is_alive:
            shutil.rmtree(left_behind, ignore_errors=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


# ---- Device, ranks, precision --------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_rank_world() -> tuple[torch.device, int, int]:
    """The best device available, this process's rank, and the number of ranks: more than one under
    torchrun. The first call sets up their process group. Raises UserError."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif world > 1:
        device = torch.device("cpu")  # gloo exchanges no other device's tensors
    if world > 1 and not dist.is_initialized():
        # Imported before there is a group: else the group becomes a default argument of functions
        # there, and its threads go on after `destroy_process_group`.
        import_module("torch.distributed.nn.functional")
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except ValueError as error:  # some of torchrun's variables are set, but not all
            raise UserError(f"several processes are started by torchrun: {error}") from None
    return device, rank, world


def is_main() -> bool:
    """Is this rank 0, which prints and saves?"""
    return int(os.environ.get("RANK", 0)) == 0


def no_bar() -> bool | None:
    """For tqdm's `disable`: rank 0 shows a bar, if it has a terminal (which None means)."""
    return None if is_main() else True


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the hardware has units for it; else fp16 on cuda, and fp32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        units = torch.cpu.get_capabilities()
        if units.get("amx_bf16") or units.get("avx512_bf16"):
            return torch.bfloat16
    return torch.float32


# ---- The command line: errors in one line --------------------------------------------------------


class UserError(Exception):
    """An error that the user can mend. `cli` prints it as one line and exits with code 2."""


def note(text: str) -> None:
    """Print a line on stderr, on rank 0 only."""
    if is_main():
        print("note:", text, file=sys.stderr)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, but not None and False."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Arguments(argparse.ArgumentParser):
    def __init__(self, description: str):
        settings = {"usage": "%(prog)s [flags]", "formatter_class": Help}
        super().__init__(description=description, allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")  # one line, in place of the whole usage


def at_least(low: int | float):
    """An argparse type: numbers of low's type that are at least low."""
    return number_type(type(low), lambda value: value >= low, f"at least {low:g}")


def above(low: float):
    """An argparse type: floats above low."""
    return number_type(float, lambda value: value > low, f"above {low:g}")


def number_type(whole_or_real: type, fits, bound: str):
    high = 2**40 if whole_or_real is int else 1e7

    def parse(text: str):
        value = whole_or_real(text)  # argparse turns a ValueError into a line of its own
        if value >= high:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not fits(value):  # nan never does
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = "whole number" if whole_or_real is int else "number"
    return parse


# of Ctrl-C, of a scheduler, of a closed terminal (which Windows lacks)
SIGNALS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]


class Interruptible:
    """Iterates over steps. A signal that would stop the program is only remembered, as
    `stopped_by`, so that the step can be finished and saved. A second one stops at once."""

    def __init__(self, steps):
        self.steps = steps
        self.stopped_by = 0  # the number of the signal, or 0

    def __iter__(self):
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        for signum in before:
            if before[signum] != signal.SIG_IGN:
                signal.signal(signum, self.take)
        try:
            yield from self.steps
            if self.stopped_by:  # during the last step
                raise KeyboardInterrupt(self.stopped_by)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def take(self, signum, frame) -> None:
        if self.stopped_by:
            raise KeyboardInterrupt(signum)
        self.stopped_by = signum
        note("stopping soon; a second signal stops at once")


def in_worker(*_) -> None:
    """What a worker process does first: leave signals to its parent, which will end it, and exempt
    the objects it inherited from garbage collection (see stream_batches in train.py)."""
    gc.freeze()
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal, and `timeout`, signal the whole group of processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in SIGNALS[1:]:
        signal.signal(signum, signal.SIG_DFL)


def in_one_line(error: Exception) -> str:
    """The message of an error that the user can mend; a bug is raised again, with its traceback."""
    message = " ".join(str(error).split())  # for instance an OSError, of a full disk
    # PyTorch's words on CUDA, MPS and the CPU
    lacks_memory = re.search("out of memory|allocate memory", message)
    if lacks_memory or isinstance(error, MemoryError):
        return f"not enough memory, see README: {message[:100]}"
    if isinstance(error, RuntimeError):
        raise error
    return message


def cli(main) -> None:
    """Run a program's `main()`. An error that the user can mend becomes one line on stderr and exit
    code 2; a signal becomes one line and the usual exit code: 130 of Ctrl-C, 143 of SIGTERM."""
    own_pid = os.getpid()

    def terminate(signum, frame):
        if os.getpid() != own_pid:  # a worker that has just been forked: see `in_worker`
            os._exit(128 + signum)
        raise KeyboardInterrupt(signum)

    before = {signum: signal.getsignal(signum) for signum in SIGNALS[1:]}
    for signum in before:
        if before[signum] != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signum, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is another
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show becomes `?`
    try:
        main()
        sys.stdout.flush()  # while a broken pipe can still be caught
    except BrokenPipeError:  # the reader has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        print("error:", in_one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        signum = stop.args[0] if stop.args else signal.SIGINT
        print(f"stopped by {signal.Signals(signum).name}", file=sys.stderr)
        sys.exit(128 + signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
