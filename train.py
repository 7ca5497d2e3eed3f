"""Supervised fine-tuning on D_op and D_back (paper, section 4.1). Read after search.py.

The paper's loss is L_SFT + L_backtrack: the cross-entropy over the solutions of D_op, and over the
beginnings and the `<backtrack>` of D_back. As in the reference, it is one mean over all labelled
tokens of a step, regardless of the kind of row. Which tokens have a label: `no_loss_spans` in
data.py.

    python train.py                                         a small model: 10-20 minutes on 2 cores
    python train.py --ckpt unsloth/Llama-3.2-1B --data yangxw/countdown-backtracking --grad_accum 2
    torchrun --nproc_per_node=2 -- train.py                 on two devices: twice the rows a step
"""

import argparse
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import KINDS, MASKS, Tokenizer, doubtful_rows, generate, load_record, load_validation
from data import new_record, read_rows, read_split, warn_of_changed_task, whole_path
from model import COUNT, DTYPES, OBJECT, OBJECTS, RESUME, Arguments, Interruptible, Llama
from model import LlamaConfig, LlamaDecoderLayer, UserError, above, at_least, best_dtype
from model import (
    check_fields,
    check_writable,
    cli,
    device_rank_world,
    in_worker,
    no_bar,
    note,
    read_config,
)
from model import read_json, replacing, settle
from search import Settings, compare, evaluate

# ---- 1. The loop ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How to train. The defaults are those of a small model from scratch."""

    batch_size: int = 64  # rows of a micro-batch (see Batches) on each device
    lr: float = 3e-3  # the peak of the learning rate
    warmup: int = 100  # steps until lr is reached
    weight_decay: float = 0.1  # not on the norms
    optimizer: str = "muon"  # or "adamw"
    mask: str = "choice"  # the loss mask: see `no_loss_spans` in data.py


# The paper's, for 32 rows a step: use two devices, or two micro-batches (--grad_accum 2), of 16.
PAPER_TRAINING = Training(
    batch_size=16, lr=1e-5, warmup=1, weight_decay=0.01, optimizer="adamw", mask="action"
)


def fit(
    model: Llama,
    batches: "Batches",
    steps: int,
    training: Training,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    state: dict | None = None,
    report_every: int = 1000,
    report=None,
) -> None:
    """Train `model` in place, for `steps` steps of the optimizer.

    dtype: what autocast computes in.
    report: called as report(loss, state, evaluates), with evaluates True, after every
        `report_every` steps and after the last one; with evaluates False if a signal stops the run.
    state: to resume a run, the state that report got: {"step", "optimizer", "scaler", "loss"}."""
    world = device_rank_world()[2]
    device = model.lm_head.weight.device
    model.model.compiled_layer = torch.compile(LlamaDecoderLayer.forward) if compiled else None
    # In fp16 GradScaler skips a step whose gradients overflow (see Stepper). But it always calls a
    # fused optimizer, and leaves skipping to its kernel, which Muon's matrices do not have. So in
    # fp16 no optimizer is fused.
    optimizer = make_optimizer(model, training, fused=dtype != torch.float16)
    first_step = state["step"] if state else 0
    stepper = Stepper(model, optimizer, dtype)
    if state:
        load_optimizer(optimizer, state["optimizer"])
        if state.get("scaler"):  # of fp16 alone
            stepper.scaler.load_state_dict(state["scaler"])
    stream = stream_batches(batches, first_step, steps, device)
    progress = tqdm(range(first_step, steps), "train", steps, initial=first_step, disable=no_bar())
    smooth_loss = state.get("loss") if state else None  # a moving average
    interruptible = Interruptible(progress)
    for step in interruptible:
        lr_now = learning_rate(step, steps, training.lr, training.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr_now
        micro_batches = [batch.to(device, non_blocking=True) for batch in next(stream)]
        loss = stepper.take_step(micro_batches)
        smooth_loss = loss if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss

        # Look at the loss, and ask the other ranks, only now and then: that waits for the device.
        must_report = (step + 1) % report_every == 0 or step + 1 == steps
        stopped_alone = world == 1 and interruptible.stopped_by  # no need to ask other ranks
        if not (must_report or stopped_alone or step % 20 == 0):
            continue
        if not math.isfinite(smooth_loss):
            raise UserError(f"the loss is not finite at step {step + 1}: try a smaller --lr")
        progress.set_postfix(loss=f"{float(smooth_loss):.4f}", lr=f"{lr_now:.1e}")

        # All ranks report together, and stop together if any of them got a signal.
        must_stop = bool(sum_over_ranks(torch.tensor(interruptible.stopped_by, device=device)))
        if report and (must_report or must_stop):
            new_state = {
                "step": step + 1,
                "optimizer": optimizer_state(optimizer),
                "scaler": stepper.scaler.state_dict(),
                "loss": float(smooth_loss),
            }
            report(float(smooth_loss), new_state, must_report)
        if must_stop:
            raise KeyboardInterrupt(interruptible.stopped_by or signal.SIGTERM)


class Stepper:
    """Takes a step of the optimizer. On one device, in fp32, with one micro-batch a step, it is
    this:

        loss = model(input_ids, labels=labels) / num_labels
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    The rest is for several devices (DistributedDataParallel), for several micro-batches (whose
    gradients are added up), and for autocast to bf16 or fp16."""

    def __init__(self, model: Llama, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        device = model.lm_head.weight.device
        self.world = device_rank_world()[2]
        self.model = model
        self.optimizer = optimizer
        self.parallel = model
        if self.world > 1:
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        # In fp16 small gradients would become 0, so the loss (and with it every gradient) is scaled
        # up. If a scaled gradient overflows, GradScaler skips the step.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def take_step(self, micro_batches: list[torch.Tensor]) -> torch.Tensor:
        """micro_batches: (2, B, T) int64 each. Returns the loss: one mean over the labelled tokens
        of all ranks and micro-batches."""
        num_labels = sum((labels[:, 1:] != -100).sum() for _, labels in micro_batches)
        num_labels = sum_over_ranks(num_labels).clamp(min=1)
        loss = self.add_gradients(micro_batches, num_labels)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.autocast():  # for Muon's matrix products
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return sum_over_ranks(loss)

    def add_gradients(
        self, micro_batches: list[torch.Tensor], num_labels: torch.Tensor
    ) -> torch.Tensor:
        """Forward and backward. The loss of a micro-batch is the sum of its cross-entropies divided
        by num_labels, which counts the labels of all micro-batches and ranks. So the gradients of
        all of them must be added up. DDP takes the mean over ranks, so multiply by their number.
        Returns this rank's share of the loss."""
        step_loss = torch.zeros((), device=num_labels.device)
        for number, (input_ids, labels) in enumerate(micro_batches, 1):
            # ranks exchange gradients once a step, at its last micro-batch
            waits = self.world > 1 and number < len(micro_batches)
            with self.parallel.no_sync() if waits else nullcontext():
                with self.autocast():
                    loss = self.parallel(input_ids, labels=labels) / num_labels
                self.scaler.scale(loss * self.world).backward()
            step_loss += loss.detach()
        return step_loss


def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """The smaller of a linear warm-up, which reaches lr after `warmup` steps, and half a cosine
    from lr to zero over all steps."""
    return lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' values. It replaces `value`, too."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@torch.no_grad()
def mean_loss(model: Llama, batches: list[torch.Tensor]) -> float | None:
    """Mean cross-entropy over all labelled tokens of batches (2, B, T). None if there are none, for
    instance because rows are truncated within their prompts."""
    total_loss = 0.0
    labelled = 0
    for input_ids, labels in batches:
        total_loss += float(model(input_ids, labels=labels))
        labelled += int((labels[:, 1:] != -100).sum())
    return round(total_loss / labelled, 4) if labelled else None


# ---- 2. Batches ----------------------------------------------------------------------------------


class Batches(Dataset):
    """Training rows as batches. An item holds the rows of 16 optimizer steps. A step is a list of
    `accum` micro-batches, whose gradients are added up. A micro-batch is a tensor (2, B, T) int64
    of input_ids and labels.

        item 0   step 0   micro-batch 0   (2, B, T)
                          micro-batch 1   (2, B, T)
                 step 1   micro-batch 0   (2, B, T)
                          ...

    A worker process makes one item at a time. The rows of an item are sorted by length before they
    are divided into steps, so that there is little padding. (Rows of D_back are shorter: some steps
    have far more of them than others. Of the last item a run may take only some of the 16 steps,
    which are in random order.) All ranks draw the same rows, batch_size * accum * world a step, and
    each takes its share. So the gradient of a step depends only on this product, not on how it is
    split over ranks and micro-batches.

    rows: a list, read epoch after epoch, and shuffled for each; or the record of generated data, an
        endless random stream.
    """

    STEPS = 16
    CONTEXT = 128  # longer rows are truncated, as in the reference

    def __init__(
        self, rows, tokenizer, batch_size, accum=1, seed=0, rank=0, world=1, mask="action"
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.rows_per_step = batch_size * accum * world
        self.accum = accum
        self.seed = seed
        self.rank = rank
        self.world = world
        self.mask = mask

    def __getitem__(self, item_number: int) -> list[list[torch.Tensor]]:
        """For each of 16 steps, its `accum` batches."""
        count = self.STEPS * self.rows_per_step
        encoded = self.tokenizer.encode_rows(self.draw(item_number * count, count), self.mask)
        encoded.sort(key=lambda row: len(row[0]))
        steps = []
        for begin in range(0, count, self.rows_per_step):
            step_rows = encoded[begin : begin + self.rows_per_step]
            # a rank takes every world-th row, a micro-batch every accum-th of these
            own_rows = step_rows[self.rank :: self.world]
            steps.append([self.pad_rows(own_rows[i :: self.accum]) for i in range(self.accum)])
        order = np.random.default_rng([self.seed, item_number]).permutation(self.STEPS)
        return [steps[step] for step in order]

    def draw(self, begin: int, count: int) -> list[dict]:
        """Rows begin .. begin + count of the stream, or of the epochs one after the other."""
        if isinstance(self.rows, dict):
            return list(generate(self.rows, "train", count, begin))
        drawn_rows = []
        while len(drawn_rows) < count:
            epoch, place = divmod(begin + len(drawn_rows), len(self.rows))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            wanted = order[place : place + count - len(drawn_rows)]  # up to the end of the epoch
            drawn_rows += [self.rows[index] for index in wanted]
        return drawn_rows

    def pad_rows(self, encoded: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """(2, B, T). Padding is on the right, where causal attention lets no token see it, and has
        no label."""
        longest = min(max(len(input_ids) for input_ids, _ in encoded), self.CONTEXT)
        eos = [self.tokenizer.eos] * longest
        no_label = [-100] * longest
        padded_ids = [(input_ids + eos)[:longest] for input_ids, _ in encoded]
        padded_labels = [(labels + no_label)[:longest] for _, labels in encoded]
        return torch.tensor([padded_ids, padded_labels])


def stream_batches(batches: Batches, first_step: int, steps: int, device: torch.device):
    """Yields the micro-batches of one step after another, from first_step on. If there is a GPU,
    worker processes make them, on all cores but one."""
    on_gpu = device.type == "cuda"
    # those that this process may use, where the system tells
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores_per_rank = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step // batches.STEPS, math.ceil(steps / batches.STEPS)),
        num_workers=max(cores_per_rank - 1, 1) if on_gpu else 0,
        pin_memory=on_gpu,
        worker_init_fn=in_worker,
    )
    # before workers are forked: one that collects garbage with CUDA tensors in it would crash
    gc.collect()
    stream = itertools.chain.from_iterable(loader)
    return itertools.islice(stream, first_step % batches.STEPS, None)


# ---- 3. The optimizer ----------------------------------------------------------------------------


def make_optimizer(model: Llama, training: Training, fused: bool):
    """AdamW, or Muon for the layers' matrices and AdamW for the rest. With several ranks each keeps
    the optimizer's state for its own share of the parameters, updates these, and sends them to the
    others (the first stage of ZeRO)."""
    matrices, embeddings, gain_vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            gain_vectors.append(parameter)
        elif ".layers." in name:
            matrices.append(parameter)
        else:
            embeddings.append(parameter)  # and the head
    decay = training.weight_decay
    param_groups = [
        {"params": matrices, "weight_decay": decay, "orthogonal": True, "momentum": 0.95},
        {"params": embeddings, "weight_decay": decay, "orthogonal": False},
        {"params": gain_vectors, "weight_decay": 0.0, "orthogonal": False},
    ]
    uses_muon = training.optimizer == "muon"
    optimizer_class = Muon if uses_muon else torch.optim.AdamW
    betas = (0.9, 0.95 if uses_muon else 0.999)
    hyperparameters = {"lr": training.lr, "betas": betas, "fused": fused}
    if dist.is_initialized():
        return ZeroRedundancyOptimizer(param_groups, optimizer_class, **hyperparameters)
    return optimizer_class(param_groups, **hyperparameters)


def optimizer_state(optimizer) -> dict:
    """The state of the whole optimizer, on rank 0. All ranks must call this together."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() > 0:
            return {}
    return optimizer.state_dict()


def load_optimizer(optimizer, saved: dict) -> None:
    """Load what `optimizer_state` returned, but keep the current weight decay."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()  # a second copy; the state in use is that of optimizer.optim
        for parameter, state in optimizer.optim.state.items():
            # left on the CPU, where the fused kernel of a GPU does not take it
            state["step"] = state["step"].to(parameter.device)
    for group, decay in zip(optimizer.param_groups, decays):
        group["weight_decay"] = decay


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the parameter groups that say "orthogonal"; AdamW for others.

    The update of a matrix is the moving average of its gradients, made orthogonal. So all
    singular directions change equally fast, and training from scratch needs far fewer steps. The
    entries of an update are about 0.2 * lr in size, as with AdamW (Liu et al., 2025). (Why not
    torch.optim.Muon? It always multiplies in bf16, which is slow on CPUs without units for it. Here
    autocast decides.)
    """

    @torch.no_grad()
    def step(self):
        """Matrices first, whose gradients are then taken away, so that AdamW passes them over."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self.step_matrices(group)
        super().step()

    def step_matrices(self, group: dict) -> None:
        momentum = group["momentum"]
        by_shape = defaultdict(list)  # shape: [(matrix, its update before it is orthogonal), ...]
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if not state:
                state["step"] = torch.zeros(())  # AdamW.load_state_dict expects one
                state["average"] = torch.zeros_like(matrix)
            state["average"].lerp_(matrix.grad, 1 - momentum)
            look_ahead = matrix.grad.lerp(state["average"], momentum)  # Nesterov's momentum
            by_shape[matrix.shape].append((matrix, look_ahead))
            matrix.grad = None
        for shape, pairs in by_shape.items():  # all matrices of one shape together
            updates = orthogonal(torch.stack([look_ahead for _, look_ahead in pairs]))
            # the entries of an orthogonal matrix are about 1 / sqrt(longer side) in size
            step_size = 0.2 * group["lr"] * max(shape) ** 0.5
            for (matrix, _), update in zip(pairs, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-step_size)


def orthogonal(matrix_stack: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix in a stack (N, A, B) to 0.7 .. 1.2, except those
    near zero, by five Newton-Schulz steps with Muon's coefficients."""
    if matrix_stack.shape[1] > matrix_stack.shape[2]:
        return orthogonal(matrix_stack.mT).mT
    matrix_stack = matrix_stack / matrix_stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = matrix_stack @ matrix_stack.mT
        matrix_stack = 3.4445 * matrix_stack + (2.0315 * gram @ gram - 4.775 * gram) @ matrix_stack
    return matrix_stack


# ==== Plumbing: a first reading may stop here =====================================================

# ---- Saving and resuming -------------------------------------------------------------------------


def save(folder, model: Llama, tokenizer: Tokenizer, record: dict, log: list, state=None) -> None:
    """Write a checkpoint in Hugging Face's layout, the record of its data, log.jsonl, and
    resume.pt: what `--resume` needs besides config.json and the tokenizer. Raises UserError."""
    record_text = json.dumps(record) + "\n"
    with replacing(folder) as staging:
        model.save_pretrained(staging, record=record_text)
        tokenizer.save_pretrained(staging)
        (staging / "record.json").write_text(record_text)
        (staging / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if state:
            weights = {name: value.detach() for name, value in model.named_parameters()}
            state = {**state, "weights": weights, "record": record, "log": log}
            try:
                torch.save(state, staging / RESUME)
            except RuntimeError as error:  # PyTorch's error for a full disk
                raise OSError(error) from None


STATE_FIELDS = {"step": COUNT, "round": COUNT, "optimizer": OBJECT, "settings": OBJECT}
STATE_FIELDS |= {"scaler": OBJECT, "weights": OBJECT, "record": OBJECT, "log": OBJECTS}
STATE_FIELDS |= {"loss": ("a number", lambda value: isinstance(value, float))}


def load_state(folder: Path, needed=("step", "optimizer")) -> dict:
    """Read what `save` wrote: the state that it got, and "weights" in fp32, "record" and "log".
    Raises UserError."""
    path = folder / RESUME
    try:
        settle(folder)
        state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # for damaged files PyTorch raises a dozen kinds
        # of PyTorch's message the first line, without the ways out that it then counts
        reason = "it is damaged: " + str(error).split("\n")[0].split(" (1)")[0]
        if not path.exists():
            reason = "nothing has been saved there yet"
        raise UserError(f"cannot resume from {path}: {reason}") from None
    needed = {*needed, "weights", "record", "log"}
    if not needed <= state.keys():
        raise UserError(f"cannot resume from {path}: it holds no run of this program")
    check_fields(state, STATE_FIELDS, f"cannot resume: {path}")
    warn_of_changed_task(state["record"], str(path))
    return state


def rebuild(folder: Path, state: dict) -> Llama:
    """The model of a saved run, with fp32 weights. Raises UserError."""
    model = Llama(read_config(read_json(folder / "config.json")))
    try:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state["weights"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot resume: the weights do not fit config.json: {error}") from None
    return model


@dataclass
class Reporter:
    """Evaluates, logs and saves, when `fit` calls it."""

    out: Path  # where to save
    model: Llama
    tokenizer: Tokenizer
    batches: Batches
    record: dict
    validation: dict[str, list[dict]]  # the problems of each split
    log: list[dict]  # the lines reported so far (if the run is resumed)
    last_step: int
    wandb: ModuleType | None = None  # where lines are logged, too
    last_time: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        """Encode the validation rows that have a response. (Now, because a text that the tokenizer
        does not know would end the run.)"""
        self.encoded = {}
        for split, rows in self.validation.items():
            with_response = [row for row in rows if "search_path" in row]
            self.encoded[split] = self.tokenizer.encode_rows(with_response)

    def __call__(self, loss: float, state: dict, evaluates: bool) -> None:
        device, rank, _ = device_rank_world()
        seconds = time.perf_counter() - self.last_time
        steps = state["step"] - self.last_step
        rows_per_step = self.batches.rows_per_step
        log_line = {"step": state["step"], "rows": state["step"] * rows_per_step}
        log_line["loss"] = round(loss, 4)
        log_line["rows_per_s"] = round(steps * rows_per_step / seconds, 1)
        if device.type == "cuda":  # of this rank
            log_line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if evaluates:
            for split in self.validation:
                log_line |= self.measure(split, device)
        if rank == 0:
            self.log.append(log_line)
            save(self.out, self.model, self.tokenizer, self.record, self.log, state)
            tqdm.write(json.dumps(log_line))
            if self.wandb:
                self.wandb.log(log_line, step=state["step"])
            if not evaluates:
                tqdm.write(f"saved after step {state['step']}: --resume continues", file=sys.stderr)
        self.last_step = state["step"]
        self.last_time = time.perf_counter()

    def measure(self, split: str, device: torch.device) -> dict:
        """The loss, always under the paper's mask, and the accuracy of greedy decoding. (By the
        weights in fp32; they are saved in bf16.)"""
        rows = self.validation[split]
        encoded = self.encoded[split]
        batches = []
        for begin in range(0, len(encoded), 64):
            batches.append(self.batches.pad_rows(encoded[begin : begin + 64]).to(device))
        judged = evaluate(self.model, self.tokenizer, rows, Settings(decoder="greedy"))
        correct = sum(row["correct"] for row in judged)
        found = {f"{split}_greedy": correct / len(rows)}
        if batches:  # none if the rows are only problems
            found[f"{split}_loss"] = mean_loss(self.model, batches)
        return found


# ---- The command ---------------------------------------------------------------------------------


# The defaults of the flags: a small model from scratch, on three numbers (see --sizes) ...
SCRATCH_FLAGS = {**asdict(Training()), "hidden_size": 96, "layers": 4, "steps": 6000}
# ... and with --ckpt the paper's
CKPT_FLAGS = {**asdict(PAPER_TRAINING), "epochs": 3, "num_train": 500_000}


def arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line, and with --resume the state of the run: its saved settings are then the
    defaults. Raises UserError."""
    options = flags()
    given = typed_flags()
    from_checkpoint = "--ckpt" in given and "--resume" not in given
    defaults = dict(CKPT_FLAGS if from_checkpoint else SCRATCH_FLAGS)
    if given & {"--steps", "--epochs"}:  # one of them determines the length
        defaults |= {"steps": None, "epochs": None}
    options.set_defaults(**defaults)
    known = options.parse_known_args()[0]
    state = None
    if known.resume:
        state = load_state(known.out)
        settings = as_flags(state["record"].get("settings", {}))
        options = options.parse_args(settings + sys.argv[1:])
    else:
        options = options.parse_args()
    check_flags(given, options)
    return options, state


def flags() -> Arguments:
    options = Arguments("Train on D_op and D_back: a small model from scratch, or a checkpoint.")
    add = options.add_argument_group("the model: a checkpoint, or one from scratch").add_argument
    add("--ckpt", metavar="C", help="a folder or Hub id to start from")
    add("--hidden_size", metavar="N", type=at_least(32), help="if from scratch; 32 a head")
    add("--layers", metavar="N", type=at_least(1), help="if from scratch")
    add = options.add_argument_group("the rows (paper, section 4.1)").add_argument
    add("--data", type=whole_path, help="a file, a folder or a dataset on the Hub")
    add("--num_train", metavar="N", type=at_least(1), help="rows drawn at random; else all")
    add("--sizes", type=int, choices=range(2, 6), nargs="+", default=[3], help="how many numbers")
    add("--mistakes", choices=KINDS, nargs="*", default=KINDS, metavar="KIND", help="in D_back")
    add(
        "--any_target",
        metavar="P",
        type=at_least(0.0),
        default=0.0,
        help="share of problems with targets 1 to 299",
    )
    add("--mask", choices=MASKS, help="which part of mistakes and detours carries no loss")
    add = options.add_argument_group("the loop").add_argument
    add("--steps", metavar="N", type=at_least(1), help="optimizer steps")
    add("--epochs", metavar="N", type=at_least(1), help="passes over the rows (or: --steps)")
    add("--batch_size", metavar="N", type=at_least(1), help="rows of a device's micro-batch")
    add("--grad_accum", metavar="N", type=at_least(1), default=1, help="micro-batches of a step")
    add("--lr", metavar="X", type=above(0.0), help="the peak learning rate")
    add("--warmup", metavar="N", type=at_least(1), help="steps until --lr is reached")
    add("--optimizer", choices=("muon", "adamw"), help="muon: for matrices")
    add("--weight_decay", metavar="X", type=at_least(0.0), help="not on the norms")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of rows and weights")
    add = options.add_argument_group("what is written").add_argument
    add("--out", metavar="DIR", type=Path, default="checkpoint", help="the folder to save to")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    add("--eval_every", metavar="N", type=at_least(1), default=1200, help="steps; saves, too")
    add("--num_eval", metavar="N", type=at_least(1), default=200, help="problems a split")
    add("--wandb", action="store_true", help="log to Weights & Biases, too")
    add = options.add_argument_group("the machine").add_argument
    switch = argparse.BooleanOptionalAction  # a resumed run can switch it off: --no-compile
    add("--gradient_checkpointing", action=switch, help="saves memory")
    add("--compile", action=switch, help="faster, after half a minute")
    add("--dtype", choices=DTYPES, help="of autocast; default: the device's best")
    return options


def typed_flags() -> set[str]:
    """The names of the flags on the command line: `--lr` of --lr=1e-3."""
    return {argument.split("=")[0] for argument in sys.argv}


def check_flags(given: set[str], options) -> None:
    """Reject flags, or warn about them, if they have no effect. Raises UserError."""
    if options.resume and "--ckpt" in given:
        note(f"--resume continues the run in {options.out}: --ckpt has no effect")
    if "--ckpt" in given and given & {"--hidden_size", "--layers"}:
        raise UserError("--hidden_size and --layers are of a model from scratch, not --ckpt's")
    if options.data and given & {"--sizes", "--mistakes", "--any_target"}:
        raise UserError("--sizes, --mistakes and --any_target are of generated rows, not --data's")
    if {"--steps", "--epochs"} <= given:
        raise UserError("--steps and --epochs both say how long to train: give one of them")
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")
    if options.compile and not any(map(shutil.which, compilers)):
        raise UserError("--compile wants a C++ compiler, and there is none")
    generates = options.data is None and options.epochs is None  # and takes as many as it needs
    if not options.resume and "--num_train" in given and generates:
        raise UserError("--num_train is of --data, or says how many rows --epochs are of")


def as_flags(settings: dict) -> list[str]:
    """Settings as a command line, so that they are checked like typed ones."""
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            words.append(f"--{name}")
            words += map(str, value)
        elif isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def build_model(options, state: dict | None, tokenizer: Tokenizer) -> Llama:
    """The model to train, in fp32: the resumed run's, the checkpoint, or a new small one."""
    if state:
        return rebuild(options.out, state)
    if options.ckpt:
        return Llama.from_pretrained(options.ckpt, "cpu", torch.float32, tokenizer.vocab_size)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=math.ceil(options.hidden_size * 8 / 3 / 32) * 32,  # these are fast
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        num_key_value_heads=options.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=10000.0,
        eos_token_id=tokenizer.eos,
    )
    return Llama(config)


def check_run(options, state: dict, config: LlamaConfig, rows_per_step: int) -> None:
    """Warn if a run is resumed with other settings. Raises UserError if they are impossible."""
    size = config.hidden_size, config.num_hidden_layers
    if size != (options.hidden_size, options.layers):
        raise UserError(f"{options.out} has other --hidden_size and --layers: {size}")
    if state["step"] >= options.steps:
        note(f"{options.out} is at step {state['step']} of {options.steps}: increase --steps")
    if state["log"]:
        last = state["log"][-1]
        if last.get("rows") != last.get("step", 0) * rows_per_step:
            note(f"{rows_per_step} rows a step, not as many as before: some come again, or never")
    saved_by = state["record"].get("settings", {}).get("optimizer")
    if saved_by not in (None, options.optimizer):
        raise UserError(
            f"{options.out} was trained by {saved_by}: its state does not fit {options.optimizer}"
        )


def training_rows(options, tokenizer: Tokenizer) -> tuple[list[dict] | dict, dict]:
    """The rows, or the record of their endless stream; and the record of their source."""
    if options.data is None:
        if options.any_target > 1:
            raise UserError(f"--any_target is a share, so at most 1, not {options.any_target}")
        record = new_record(options.seed, options.sizes, options.mistakes, options.any_target)
        return record, record
    if Path(options.data).is_file():
        rows = read_rows(Path(options.data))
    else:
        rows = read_split(options.data, "train")
    for line in doubtful_rows(rows):
        note(line)
    if options.num_train and options.num_train < len(rows):
        rows = random.Random(options.seed).sample(rows, options.num_train)
    encoded = tokenizer.encode_rows(rows)  # complains of text that it does not know
    too_long = sum(len(input_ids) > Batches.CONTEXT for input_ids, _ in encoded)
    if too_long:
        note(f"{too_long} of {len(rows)} rows are truncated at {Batches.CONTEXT} tokens")
    return rows, load_record(options.data, "dataset")


def number_of_steps(options, rows, rows_per_step: int) -> int:
    """Raises UserError."""
    if options.epochs is None:
        return options.steps
    count = options.num_train if isinstance(rows, dict) else len(rows)
    if count is None:
        raise UserError("--epochs of generated rows, which never end, wants --num_train")
    return math.ceil(options.epochs * count / rows_per_step)


def start_wandb(options):
    """The wandb package, with a run begun. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        line = "--wandb needs a package that is not installed: pip install wandb"
        raise UserError(line) from None
    wandb.init(project="self-backtracking", config=vars(options))
    return wandb


def main() -> None:
    options, state = arguments()
    device, rank, world = device_rank_world()
    wandb = start_wandb(options) if options.wandb and rank == 0 else None
    torch.manual_seed(options.seed)
    origin = options.out if state else options.ckpt
    tokenizer = Tokenizer.digits()
    if origin:
        tokenizer = Tokenizer.from_pretrained(origin, add_backtrack=True)
    model = build_model(options, state, tokenizer)
    rows, record = training_rows(options, tokenizer)
    batches = Batches(
        rows,
        tokenizer,
        options.batch_size,
        options.grad_accum,
        options.seed,
        rank,
        world,
        options.mask,
    )
    options.steps = number_of_steps(options, rows, batches.rows_per_step)
    if state:
        check_run(options, state, model.config, batches.rows_per_step)
    elif (options.out / RESUME).exists():
        note(f"the first save will replace the run in {options.out}: --resume would continue it")
    model.to(device)
    model.model.gradient_checkpointing = options.gradient_checkpointing
    dtype = DTYPES.get(options.dtype) or best_dtype(device)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{parameters:,} parameters on {device}, in {str(dtype)[6:]}; saves to {options.out}")

    settings = vars(options).copy()
    for name in ("ckpt", "out", "resume", "wandb", "epochs"):  # `steps` has the length
        del settings[name]
    settings["hidden_size"] = model.config.hidden_size
    settings["layers"] = model.config.num_hidden_layers
    record = {**record, "settings": settings}  # --resume and improve.py use these
    check_writable(options.out)
    source = {"source": options.data} if options.data else record
    validation = load_validation(source, options.num_eval)
    first_step = state["step"] if state else 0
    log = state["log"] if state else []
    reporter = Reporter(
        options.out, model, tokenizer, batches, record, validation, log, first_step, wandb
    )
    training = Training(**{name: getattr(options, name) for name in asdict(Training())})
    fit(
        model,
        batches,
        options.steps,
        training,
        dtype=dtype,
        compiled=options.compile,
        state=state,
        report_every=options.eval_every,
        report=reporter,
    )
    compare(model, tokenizer, validation, ["greedy", "self_backtrack"], Settings())


if __name__ == "__main__":
    cli(main)
