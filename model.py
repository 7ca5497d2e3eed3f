"""The language model: Llama, written by hand. Read this file first, then data.py.

Self-backtracking (arXiv 2502.04404) adds one token to its vocabulary, `<backtrack>`, and one operation to its KV cache,
`rollback`. Modules carry Hugging Face's names, so that state dicts and checkpoints pass from here to transformers and back.
Shapes: B rows, T new tokens, S tokens in sight, H query heads, K key/value heads, D head size, C hidden size, V vocabulary.
"""
import argparse, dataclasses, json, math, os, sys, tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open

# ---- What every program here shares: errors in one line, the device, the ranks -------------------------------------------
class UserError(Exception):
    """What the user gave cannot be used. `cli` prints the message as one line and exits with code 2."""

class Arguments(argparse.ArgumentParser):
    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")                     # one line, in place of the whole usage

def cli(main) -> None:
    """Run a program's `main()`; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()                                             # while a broken pipe can still be caught
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                            # nobody reads on: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def number(kind: type, low: float, strict: bool = False):
    """An argparse type: an int or a finite float that is at least `low` (`strict`: above it)."""
    def parse(text: str):
        value = kind(text)                                             # argparse turns a ValueError into a line of its own
        if not low <= value < (2 ** 62 if kind is int else math.inf) or strict and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if strict else 'at least'} {low}, or too large")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse

def start() -> tuple[torch.device, int, int]:
    """(device, rank, world size): the best device there is; more than one rank when torchrun started the program."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world

def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware itself multiplies it, by its own report; else fp16 on cuda and fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    units = {"amx_bf16", "avx512_bf16"} if device.type == "cpu" else set()
    return torch.bfloat16 if any(map(torch.cpu.get_capabilities().get, units)) else torch.float32

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INDEX = "model.safetensors.index.json"
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

@dataclasses.dataclass
class LlamaConfig:
    """The fields of Hugging Face's config.json that decide what Llama computes (defaults: Llama-3.2-1B)."""
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

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """Read config.json's content, in either spelling of the RoPE fields. Raises UserError for what is no Llama."""
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for key, value in FIXED.items():
            if raw.get(key, value) != value:
                raise UserError(f"config.json says {key}: {raw[key]!r}; this Llama has {value!r} only")
        if kind not in ("default", "llama3") or not {"hidden_size", "num_attention_heads"} <= raw.keys():
            raise UserError(f"config.json is no Llama's (RoPE of type {kind!r}; it must be default or llama3)")
        raw = {"tie_word_embeddings": False, **raw}                           # transformers' own default
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if kind == "llama3" else None
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
        raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        return cls(**{field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw})

class KVCache:
    """Keys and values of every layer, preallocated, with a length for each row.
    kv: (2, layers, rows, K, max_len, D); length: (rows,) int64, the tokens that a row holds. What lies beyond a row's
    length is never seen, which makes the method's two operations cheap: `fork` copies rows, `rollback` sets lengths."""
    def __init__(self, config: LlamaConfig, rows: int, max_len: int, device, dtype: torch.dtype):
        shape = (2, config.num_hidden_layers, rows, config.num_key_value_heads, max_len, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.dense = self.kv.new_empty(0)               # where `update` puts what a layer sees, on a CPU
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.width = 0                                  # no row in use is longer; kept on the host, so no layer asks

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Write k, v (B, K, T, D) at positions (B, T) of rows 0..B-1; return all that these rows hold, (B, K, S, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.kv[0, layer][rows, :, positions] = k.transpose(1, 2)
        self.kv[1, layer][rows, :, positions] = v.transpose(1, 2)
        held = self.kv[:, layer, :len(k), :, :self.width]
        if held.is_cpu:      # bf16 products copy a view slowly, and fresh memory is slow, too: one buffer, layer after layer
            if len(self.dense) < held.numel():
                self.dense = self.kv.new_empty(self.kv[:, layer].numel())
            held = self.dense[:held.numel()].view(held.shape).copy_(held)
        return held.unbind()

    def fork(self, parents: torch.Tensor, source: "KVCache | None" = None, to: torch.Tensor | None = None) -> None:
        """Row i (or to[i]) becomes a copy of row parents[i] (N,) int64 of this cache, in which no other rows stay in use, or of
        another, `source`. Rows that stay where they are cost nothing. The cache doubles when it has too few rows."""
        source, rows = source or self, len(parents)
        to = torch.arange(rows, device=parents.device) if to is None else to
        if (more := int(to.max()) + 1 - len(self.length)) > 0:
            more = max(more, len(self.length))
            self.kv = F.pad(self.kv, (0, 0, 0, 0, 0, 0, 0, more))              # zeros: what is masked must still be finite
            self.length = F.pad(self.length, (0, more))
        if source is self:
            to, parents = to[to != parents], parents[to != parents]
        width = min(source.width, self.kv.shape[4])
        self.kv[:, :, to, :, :width] = source.kv[:, :, parents, :, :width]
        self.length[to] = source.length[parents]
        self.width = int(self.length[:rows].max()) if source is self else max(self.width, width)

    def rollback(self, length: torch.Tensor) -> None:
        """Cut all rows in use, 0..N-1, back to `length` (N,) int64 tokens. Nothing is recomputed: the rest is out of sight."""
        self.length[:len(length)] = length
        self.width = int(length.max()) if len(length) else 0

# ---- The model -----------------------------------------------------------------------------------------------------------
def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """(D / 2,) fp32: radians by which a position turns each pair; with Llama 3's stretch of the low frequencies."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    if (s := config.rope_scaling) is None:
        return frequency
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)      # full turns within the old context
    smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequency / s["factor"], frequency, smooth.clamp(0, 1))      # slow ones stretched, fast ones kept

def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: turn x (B, H, T, D) by the angles whose cos and sin (B, 1, T, D / 2) are given; i is paired with i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention of q (B, H, T, D) over k, v (B, K, S, D) where mask (B or 1, T, S) is true; (B, H, T, D)."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=q.shape[1] != k.shape[1])
    # On CPUs plain products are far faster in bf16. The heads of a group share keys: folded into time, nothing is repeated.
    (B, H, T, D), K, S = q.shape, k.shape[1], k.shape[2]
    scores = (q * D ** -0.5).reshape(B, K, -1, D) @ k.transpose(-1, -2)                        # (B, K, H/K * T, S)
    scores = scores.view(B, H, T, S).masked_fill(~mask[:, None], -torch.inf)
    return (scores.softmax(-1).view(B, K, -1, S) @ v).view(B, H, T, D)

class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(C, K * D, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, rope, mask, positions, layer, cache):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(layer, k, v, positions)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))

class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))      # SwiGLU

class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))

class LlamaModel(nn.Module):
    """Embedding, layers, last norm: token ids (B, T) -> hidden states (B, T, C)."""
    gradient_checkpointing = False                # keep only each layer's input for the backward pass; compute the rest again

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("rope", rope_frequencies(config), persistent=False)

    def forward(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        B, T = input_ids.shape
        positions = torch.arange(T, device=input_ids.device).expand(B if cache is not None else 1, T)
        if cache is not None:
            positions = positions + cache.length[:B, None]
            cache.width += T
        seen = torch.arange(T if cache is None else cache.width, device=input_ids.device)
        mask = seen <= positions[..., None]                           # a token sees the positions up to its own
        angles = positions[:, None, :, None] * self.rope.float()      # (B or 1, 1, T, D / 2)
        x = self.embed_tokens(input_ids)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.gradient_checkpointing and x.requires_grad else layer
            x = run(x, rope, mask, positions, i, cache)
        if cache is not None:
            cache.length[:B] += T
        return self.norm(x)

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

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, cache: KVCache | None = None,
                keep: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V), in the weights' dtype.
        labels (B, T) int64, -100 for no loss: return the *sum* of the cross-entropies instead, () fp32, with the vocabulary
            projection at labelled positions only.
        cache: the tokens continue rows 0..B-1 of it, each from its own length, and are appended.
        keep (B,) int64: return the logits at that one position of each row only, (B, V)."""
        hidden = self.model(input_ids, cache)
        if labels is not None:
            at = labels[:, 1:] != -100                               # position t predicts the token at t + 1
            logits = self.lm_head(hidden[:, :-1][at])
            exact = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(exact), labels[:, 1:][at], reduction="sum")
        if keep is not None:
            hidden = hidden[torch.arange(len(keep), device=keep.device), keep]
        return self.lm_head(hidden)

    @classmethod
    def from_pretrained(cls, name: str | Path, device="cpu", dtype: torch.dtype | None = None, vocab_size=0) -> "Llama":
        """Open a folder or a Hub id in Hugging Face's layout; `dtype` None keeps the file's. Where the embedding and the head
        have fewer than vocab_size rows, they grow by rows that are the mean of the others. Raises UserError."""
        folder = checkpoint_folder(name)
        config = LlamaConfig.from_dict(read_json(folder / "config.json"))
        more, config.vocab_size = max(vocab_size - config.vocab_size, 0), max(vocab_size, config.vocab_size)
        with torch.device("meta"):                                     # no memory: the files' tensors become the weights
            model = cls(config)
        index, state = folder / INDEX, {}
        for file in sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]:
            try:
                reader = partial(safe_open, folder / file, framework="pt", device=str(device))
                with reader() as tensors:
                    keys = sorted((k for k in tensors.keys() if "rotary" not in k), key=lambda k: ".layers." in k)
                for key in keys:
                    with reader() as tensors:                          # a mapping for each tensor, gone when the tensor is
                        state[key] = value = tensors.get_tensor(key).to(dtype)
                    if more and key in ("model.embed_tokens.weight", "lm_head.weight"):         # first, while there is room
                        mean = value.mean(0, keepdim=True, dtype=torch.float32).to(value.dtype)
                        state[key] = torch.cat([value, mean.expand(more, -1)])
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / file} is missing or damaged: {error}") from None
        if model.config.tie_word_embeddings and "model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:                                  # names what is missing, left over or of another shape
            raise UserError(f"the weights in {folder} do not fit its config.json: {str(error).split(':', 1)[-1]}") from None
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.to(device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors (beyond 5 GB: shards with their index). Raises UserError."""
        state = {key: value.detach().to(dtype) for key, value in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        config = {"architectures": ["LlamaForCausalLM"], **FIXED, **dataclasses.asdict(self.config), "dtype": str(dtype)[6:]}
        with replacing(folder) as new:
            save_torch_state_dict(state, new)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if not (new / INDEX).exists():
                Path(folder, INDEX).unlink(missing_ok=True)             # of older shards, which would win over one file

# ---- Checkpoints on disk -------------------------------------------------------------------------------------------------
NEEDED = {"model": ["*config.json", "tokenizer.json", "record.json", "model*.safetensors*"], "dataset": ["*.json", "*.jsonl"]}

def checkpoint_folder(name: str | Path, kind: str = "model") -> Path:
    """The folder `name` itself, or the cached download of the Hub's model or dataset of that name. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), repo_type=kind, allow_patterns=NEEDED[kind]))
    except GatedRepoError:
        raise UserError(f"{name} is gated: ask for access at https://huggingface.co/{name}, then `hf auth login`") from None
    except Exception as error:                  # no network, no such repository, no disk: the client has dozens
        raise UserError(f"no {kind} at {name}: no such folder, and from the Hub: {str(error).splitlines()[0]}") from None

def read_json(path: Path) -> dict:
    """A file's JSON object. Raises UserError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None

@contextmanager
def replacing(folder: str | Path):
    """A new folder to write files into; they move to `folder`, over the old ones, only when all of them are complete."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
            yield Path(new)
            for file in Path(new).iterdir():
                os.replace(file, Path(folder) / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {folder}: {error}") from None
