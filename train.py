"""Supervised fine-tuning on D_op and D_back (paper, section 4.1). Read after search.py, before improve.py."""
import itertools, json, math, sys, time
from collections import defaultdict
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import KINDS, SPLITS, Tokenizer, generate, load_record, load_rows, new_record, read_rows, read_split
from model import DTYPES, Arguments, Llama, LlamaConfig, UserError, best_dtype, cli, number, replacing, start
from search import compare, evaluate

def deepen(model: Llama, layers: int) -> None:
    """Insert layers, spread evenly, until `model` has that many. Each new one copies the layer below and adds nothing yet, for
    its output projections are zero: the model computes what it did, and training goes on from there (Chen et al., 2016)."""
    old = model.model.layers
    source = [i * len(old) // layers for i in range(layers)]
    new = torch.nn.ModuleList(deepcopy(old[i]) for i in source)
    for below, i, layer in zip(source, source[1:], new[1:]):
        if i == below:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.model.layers, model.config.num_hidden_layers = new, layers

class Batches(Dataset):
    """Item i: 64 optimiser steps' batches, sorted by length so that little is padding; each a list of (ids, labels).
    rows: a list, of which epoch after epoch is shuffled; or the record of generated data, an endless stream.
    A step's rows depend on batch_size * accum * world alone: rank r of w takes every w-th of them, cut in `accum` parts."""
    STEPS, CONTEXT = 64, 128                                           # longer rows are cut, as in the reference

    def __init__(self, rows: list[dict] | dict, tok, batch_size: int, accum=1, seed=0, rank=0, world=1, mask="action"):
        self.rows, self.tok, self.size, self.accum = rows, tok, batch_size * accum * world, accum
        self.seed, self.rank, self.world, self.mask = seed, rank, world, mask

    def __getitem__(self, i: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        want = self.STEPS * self.size
        if isinstance(self.rows, dict):
            rows = list(generate(self.rows, "train", want, i * want))
        else:
            epochs = [divmod(at, len(self.rows)) for at in range(i * want, (i + 1) * want)]
            order = {e: np.random.default_rng([self.seed, e]).permutation(len(self.rows)) for e in {e for e, _ in epochs}}
            rows = [self.rows[order[e][at]] for e, at in epochs]
        encoded = sorted(self.tok.rows(rows, self.mask), key=lambda row: len(row[0]))
        steps = [encoded[at:at + self.size][self.rank::self.world] for at in range(0, want, self.size)]
        return [[self.pad(steps[s][a::self.accum]) for a in range(self.accum)]
                for s in np.random.default_rng([self.seed, i]).permutation(self.STEPS)]

    def pad(self, rows: list[tuple[list[int], list[int]]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, (B, T) int64, padded on the right, where causal attention never looks."""
        return tuple(pad_sequence([torch.tensor(x[:self.CONTEXT]) for x in column], True, fill).to(device)
                     for column, fill in zip(zip(*rows), (self.tok.eos, -100)))

@torch.no_grad()
def mean_loss(model: Llama, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean cross-entropy over all labelled tokens of the batches (ids, labels)."""
    total = sum(model(ids, labels=labels) for ids, labels in batches)
    return round(float(total) / sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches), 4)

def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    return lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Each of x (N, A, B) with all singular values brought to 0.7 .. 1.2 (those not near zero), by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x

class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the matrices of group 0, AdamW for the rest. Momentum is made orthogonal, so that all
    directions of a matrix learn at one speed, and scaled as AdamW's steps are. A model from scratch needs far fewer steps.
    torch.optim.Muon always multiplies in bf16, which many CPUs only emulate, slowly; this one obeys autocast."""
    @torch.no_grad()
    def step(self):
        params, lr, decay = (self.param_groups[0][key] for key in ("params", "lr", "weight_decay"))
        shapes = defaultdict(list)
        for p in params:
            if p.grad is not None:
                self.state[p].setdefault("step", torch.zeros(()))                  # without it AdamW would not load the state
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                shapes[p.shape].append((p, p.grad.lerp(momentum, 0.95)))           # Nesterov's look ahead
                p.grad = None                                                      # AdamW has nothing left to do here
        for shape, pairs in shapes.items():                                        # all matrices of a shape at once
            for (p, _), update in zip(pairs, orthogonal(torch.stack([ahead for _, ahead in pairs]))):
                p.mul_(1 - lr * decay).add_(update, alpha=-0.2 * lr * max(shape) ** 0.5)
        super().step()

# ZeRO's first stage (Rajbhandari et al., 2020): a parameter's optimizer state lives on one rank alone, which updates the
# parameter and sends it to the others. torch's ZeroRedundancyOptimizer does so, too, but its ranks exchange pickles.
def owners(params: list[torch.nn.Parameter], world: int) -> dict[torch.nn.Parameter, int]:
    """The rank that holds each parameter's optimizer state, in the order of params; all ranks hold about as many numbers."""
    load, owner = [0] * world, dict.fromkeys(params, 0)
    for p in sorted(params, key=torch.numel, reverse=True):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner

def collect(optimizer: torch.optim.AdamW, owner: dict[torch.nn.Parameter, int], rank: int) -> dict[int, dict]:
    """The state of every parameter, {number: {name: tensor}}, on rank 0's CPU; all ranks must call this together."""
    state = defaultdict(dict)
    for i, (p, who) in enumerate(owner.items()):
        matrix = isinstance(optimizer, Muon) and i < len(optimizer.param_groups[0]["params"])
        for name in ("step", "momentum") if matrix else ("step", "exp_avg", "exp_avg_sq"):
            slot = p.new_zeros(() if name == "step" else p.shape)
            if name in optimizer.state.get(p, ()):
                slot.copy_(optimizer.state[p][name])
            if dist.is_initialized():
                dist.broadcast(slot, who)
            if rank == 0:
                state[i][name] = slot.cpu()
    return state

def fit(model: Llama, batches: Batches, steps: int, lr: float, warmup: int, weight_decay: float = 0.1, muon: bool = True,
        dtype: torch.dtype = torch.float32, compiled=False, state: dict | None = None, every: int = 1000, report=None) -> None:
    """Train `model` in place; dtype is autocast's. The loss is one mean over the labelled tokens of all ranks and parts of a
    step together, so that a gradient does not depend on how a batch was cut. After each `every` steps, and the last, call
    report(loss, state): the state, {"step", "optimizer": its tensors}, given to a later call, goes on from there."""
    device, rank, world = start()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    run = torch.compile(wrapped, dynamic=True) if compiled else wrapped        # for training alone: the engine calls model
    together = dist.all_reduce if world > 1 else lambda tensor: None           # sums a tensor over the ranks, in place
    kinds = [], [], []                                       # 0: the layers' matrices; 1: embedding and head; 2: gains
    for name, p in model.named_parameters():
        kinds[2 if p.ndim == 1 else 0 if ".layers." in name else 1].append(p)
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in zip(kinds, (weight_decay, weight_decay, 0.0))]
    optimizer = (Muon if muon else torch.optim.AdamW)(groups, lr=lr, betas=(0.9, 0.95), fused=dtype != torch.float16)
    owner = owners([p for ps in kinds for p in ps], world)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first = state["step"] if state else 0
    if state:
        own = {i: state["optimizer"][i] for i, who in enumerate(owner.values()) if who == rank}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
    amp = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    items = range(first // batches.STEPS, -(-steps // batches.STEPS))
    loader = DataLoader(batches, batch_size=None, sampler=items, num_workers=8 * (device.type == "cuda"))
    stream = itertools.islice(itertools.chain.from_iterable(loader), first % batches.STEPS, None)
    mean = torch.zeros((), device=device)
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc="train", disable=rank > 0)):
        parts = [(ids.to(device), labels.to(device)) for ids, labels in next(stream)]
        labelled = sum((labels[:, 1:] != -100).sum() for _, labels in parts).clamp(min=1)
        together(labelled)
        loss = torch.zeros((), device=device)
        for i, (ids, labels) in enumerate(parts):
            wrapped.require_backward_grad_sync = i == len(parts) - 1               # DDP's ranks meet once, at the last part
            with amp():
                part = run(ids, labels=labels) / labelled
            scaler.scale(part * world).backward()                      # DDP averages over ranks; here they are to be added
            loss += part.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        for p, who in owner.items():
            if who != rank:
                p.grad = None                                                      # the optimizer passes over it
        with amp():
            scaler.step(optimizer)
        for p, who in owner.items() if world > 1 else ():
            dist.broadcast(p.detach(), who)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        together(loss)
        mean = torch.lerp(loss, mean, 0.98 if step > first else 0.0)
        if rank == 0 and step % 20 == 0:
            bar.set_postfix(loss=f"{float(mean):.4f}")                             # the one place that waits for the device
        if report and ((step + 1) % every == 0 or step + 1 == steps):
            report(float(mean), {"step": step + 1, "optimizer": collect(optimizer, owner, rank)})

def save(folder: str | Path, model: Llama, tok: Tokenizer, record: dict, state: dict | None = None) -> None:
    """A checkpoint in Hugging Face's layout, the record of its data, and what `--resume` needs. All files are complete
    before any of them moves into its place."""
    with replacing(folder) as new:
        model.save_pretrained(new)
        tok.save_pretrained(new)
        (new / "record.json").write_text(json.dumps(record) + "\n")
        if state:
            tensors = {f"weight.{key}": value.detach() for key, value in model.named_parameters()}
            tensors |= {f"{i}.{key}": value for i, slots in state["optimizer"].items() for key, value in slots.items()}
            save_file(tensors | {"step": torch.tensor(state["step"])}, new / "resume.safetensors")
    if not state:
        Path(folder, "resume.safetensors").unlink(missing_ok=True)      # of other weights than these

def load_state(folder: Path, model: Llama) -> dict:
    """Put back the fp32 weights that `save` wrote, and return fit's state. Safetensors: no pickle is ever read."""
    try:
        tensors = load_file(folder / "resume.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot resume from {folder}: {error}") from None
    step, slots = int(tensors.pop("step")), defaultdict(dict)
    for kind, name, value in ((*key.split(".", 1), value) for key, value in tensors.items()):
        if kind == "weight":
            model.get_parameter(name).data.copy_(value)
        else:
            slots[int(kind)][name] = value
    return {"step": step, "optimizer": slots}

SCRATCH = {"steps": 6000, "batch_size": 64, "lr": 3e-3, "optimizer": "muon", "warmup": 100, "weight_decay": 0.1,
           "mask": "choice", "layers": 4}
PAPER = {"steps": 46875, "batch_size": 16, "lr": 1e-5, "optimizer": "adamw", "warmup": 1, "weight_decay": 0.01,
         "mask": "action"}
"""Defaults: for a small model from scratch; for --ckpt, the paper's (3 epochs of 500,000 rows, 16 on each of two devices)."""

def main() -> None:
    args = Arguments("Train on D_op and D_back: a small model from scratch, or a checkpoint.")
    args.add_argument("--ckpt", help="a folder or Hub id to start from; without it (or --resume) a small model from scratch")
    args.add_argument("--data", help="a file, a folder of data.py, or a Hub dataset; without it rows are generated without end")
    args.add_argument("--sizes", type=int, choices=range(2, 6), nargs="+", default=[3], help="generated data: how many numbers")
    args.add_argument("--mistakes", choices=KINDS, nargs="*", default=KINDS, help="generated data: the kinds; none: D_op alone")
    args.add_argument("--out", type=Path, default="checkpoint", help="the folder to save to")
    args.add_argument("--resume", action="store_true", help="go on from what --out holds, by its settings where none are given")
    args.add_argument("--steps", type=number(int, 1))
    args.add_argument("--batch_size", type=number(int, 1), help="rows a device and accumulation step")
    args.add_argument("--grad_accum", type=number(int, 1), default=1, help="batches whose gradients are added up in a step")
    args.add_argument("--lr", type=number(float, 0, strict=True))
    args.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: for the layers' matrices")
    args.add_argument("--warmup", type=number(int, 1))
    args.add_argument("--weight_decay", type=number(float, 0))
    args.add_argument("--mask", choices=("none", "action", "choice"), help="what carries no loss in a mistake")
    args.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    args.add_argument("--compile", action="store_true", help="torch.compile: starts half a minute later, then is faster")
    args.add_argument("--dtype", choices=DTYPES, help="of autocast; the best of the device by itself")
    args.add_argument("--hidden_size", type=number(int, 32), default=96, help="32 a head")
    args.add_argument("--layers", type=number(int, 1), help="with --ckpt: grow it to so many; they add nothing at first")
    args.add_argument("--seed", type=number(int, 0), default=0)
    args.add_argument("--eval_every", type=number(int, 1), default=1200, help="steps between evaluations and checkpoints")
    args.add_argument("--num_eval", type=number(int, 1), default=200, help="problems a split in an evaluation")
    args.add_argument("--wandb", action="store_true", help="log to Weights & Biases, too, if that package is installed")
    args.set_defaults(**(PAPER if any(arg.split("=")[0] == "--ckpt" for arg in sys.argv) else SCRATCH))
    if (known := args.parse_known_args()[0]).resume:
        args.set_defaults(**load_record(known.out).get("settings", {}) | {"layers": None})       # it has the layers it has
    args = args.parse_args()
    device, rank, world = start()
    if args.wandb:
        if not find_spec("wandb"):
            raise UserError("--wandb needs a package that is not installed: pip install wandb")
        import wandb
        wandb.init(project="self-backtracking", config=vars(args), mode="disabled" if rank else None)
    torch.manual_seed(args.seed)
    begin = args.out if args.resume else args.ckpt
    tok = Tokenizer.from_pretrained(begin, grow=True) if begin else Tokenizer.digits()
    model = Llama.from_pretrained(begin, dtype=torch.float32, vocab_size=tok.vocab_size) if begin else Llama(LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 32, num_key_value_heads=args.hidden_size // 32,
        head_dim=32, max_position_embeddings=256, rope_theta=10000.0, eos_token_id=tok.eos))
    if begin and args.layers and args.layers != (depth := model.config.num_hidden_layers):
        if args.resume or args.layers < depth:
            raise UserError(f"{begin} has {depth} layers: --layers can add some to a --ckpt, and cannot take any away")
        deepen(model, args.layers)
    state = load_state(args.out, model) if args.resume else None
    if state and state["step"] >= args.steps:
        raise UserError(f"{args.out} holds all of its {state['step']} steps: give --steps more than that to go on")
    if state and args.optimizer != ("muon" if any("momentum" in slots for slots in state["optimizer"].values()) else "adamw"):
        raise UserError(f"{args.out} was not trained by {args.optimizer}, and its optimizer's state cannot be carried over")
    model.to(device).model.gradient_checkpointing = args.gradient_checkpointing
    if args.data is None:
        record = rows = new_record(args.seed, args.sizes, args.mistakes)
    elif Path(args.data).is_file():
        record, rows = {"source": args.data}, read_rows(Path(args.data))
    else:
        record, rows = load_record(args.data, "dataset"), read_split(args.data, "train")
    settings = {key: value for key, value in vars(args).items() if key not in ("ckpt", "out", "resume", "wandb")}
    settings |= {"hidden_size": model.config.hidden_size, "layers": model.config.num_hidden_layers}
    record = {**record, "settings": settings}                                      # --resume and improve.py go on with these
    with replacing(args.out):
        pass                                                           # if it cannot be written to, say so now
    batches = Batches(rows, tok, args.batch_size, args.grad_accum, args.seed, rank, world, args.mask)
    held = {} if Path(record["source"]).is_file() else {s: load_rows(s, record, args.num_eval) for s in SPLITS[1:]}
    clock = {"step": state["step"] if state else 0, "time": time.perf_counter()}
    def report(loss: float, state: dict) -> None:
        speed = (state["step"] - clock["step"]) * batches.size / (time.perf_counter() - clock["time"])
        line = {"step": state["step"], "rows": state["step"] * batches.size, "loss": round(loss, 4)}
        line["rows_per_s"] = round(speed, 1)
        if device.type == "cuda":
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)           # of this rank
        for split, rows in held.items():
            # by the paper's mask, whichever is trained with, so that losses compare
            padded = [batches.pad(tok.rows(rows[i:i + 64]), device) for i in range(0, len(rows), 64)]
            line[f"{split}_loss"] = mean_loss(model, padded)
            line[f"{split}_greedy"] = sum(row["correct"] for row in evaluate(model, tok, rows, "greedy")) / len(rows)
        if rank == 0:
            tqdm.write(json.dumps(line))
            if args.wandb:
                wandb.log(line, step=state["step"])
            save(args.out, model, tok, record, state)
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        clock.update(step=state["step"], time=time.perf_counter())
    dtype = DTYPES.get(args.dtype) or best_dtype(device)
    fit(model, batches, args.steps, args.lr, args.warmup, args.weight_decay, args.optimizer == "muon", dtype, args.compile,
        state, args.eval_every, report)
    compare(model, tok, held, ["greedy", "self_backtrack"])

if __name__ == "__main__":
    cli(main)
