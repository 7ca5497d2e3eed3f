"""Batches, gradients, optimizers and resuming, against PyTorch and transformers; and two processes
against one."""

import copy
import gc
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

import train
from data import Tokenizer, generate, new_record
from model import Llama, LlamaConfig, UserError, device_rank_world, in_worker, is_main
from search import Settings, evaluate
from train import Batches, Training, fit

TOKENIZER = Tokenizer.digits()
RECORD = new_record(9, [3])
SHORT = Training(lr=1e-2, warmup=5)
OPTIMIZERS = ("muon", "adamw")
ROOT = Path(__file__).parent.parent


def tiny(dtype: torch.dtype = torch.float32, tied: bool = True) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    return Llama(config).to(dtype)


def in_transformers(model: Llama, folder: Path) -> LlamaForCausalLM:
    """The same model, opened by transformers."""
    model.save_pretrained(folder, torch.float32)
    return LlamaForCausalLM.from_pretrained(folder)


# ---- Batches -------------------------------------------------------------------------------------


def rows_in(step: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """The rows of a step's parts, without end-of-text and padding, sorted."""
    rows = []
    for input_ids, _ in step:
        for row in input_ids.tolist():
            rows.append(tuple(token for token in row if token != TOKENIZER.eos))
    return sorted(rows)


@pytest.mark.parametrize(
    "rows", [RECORD, list(generate(RECORD, "train", 100))], ids=["stream", "list"]
)
def test_a_steps_rows_do_not_depend_on_ranks_or_accumulation(rows):
    whole = Batches(rows, TOKENIZER, 8)[1]
    in_parts = Batches(rows, TOKENIZER, 2, accum=4)[1]
    rank_0 = Batches(rows, TOKENIZER, 4, rank=0, world=2)[1]
    rank_1 = Batches(rows, TOKENIZER, 4, rank=1, world=2)[1]
    assert len(whole) == len(in_parts) == len(rank_0) == len(rank_1) == 16
    for step in range(16):
        expected = rows_in(whole[step])
        assert len(expected) == 8
        assert [len(part[0]) for part in in_parts[step]] == [2, 2, 2, 2]
        assert rows_in(in_parts[step]) == expected
        assert rows_in(rank_0[step] + rank_1[step]) == expected


def items_of(batches: Batches, count: int) -> list[list[tuple[int, ...]]]:
    """The rows of each of the first items, sorted."""
    items = []
    for number in range(count):
        rows = []
        for step in batches[number]:
            rows += rows_in(step)
        items.append(sorted(rows))
    return items


def together(items: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """The rows of all items, sorted."""
    rows = []
    for item in items:
        rows += item
    return sorted(rows)


def test_a_list_is_gone_through_once_an_epoch():
    """256 rows, 64 an item: every four items are an epoch."""
    rows = list(generate(RECORD, "train", 256))
    items = items_of(Batches(rows, TOKENIZER, 4), 8)
    once = sorted(tuple(input_ids[:-1]) for input_ids, _ in TOKENIZER.encode_rows(rows))
    assert together(items[:4]) == once
    assert together(items[4:]) == once
    assert items[4] != items[0]


def test_the_seed_decides_on_the_order_of_a_list():
    rows = list(generate(RECORD, "train", 256))
    items = items_of(Batches(rows, TOKENIZER, 4), 4)
    assert items_of(Batches(rows, TOKENIZER, 4), 4) == items
    other_items = items_of(Batches(rows, TOKENIZER, 4, seed=1), 4)
    assert other_items[0] != items[0]
    assert together(other_items) == together(items)


def padding(item: list[list[torch.Tensor]]) -> float:
    """The share of padding in all tokens of an item."""
    padded = 0
    tokens = 0
    for step in item:
        for input_ids, _ in step:
            padded += int((input_ids == TOKENIZER.eos).sum()) - len(input_ids)
            tokens += input_ids.numel()
    return padded / tokens


def test_batches_hold_rows_of_like_length():
    assert padding(Batches(RECORD, TOKENIZER, 16)[0]) < 0.04


def test_the_steps_of_an_item_are_not_in_the_order_of_their_lengths():
    widths = [step[0].shape[2] for step in Batches(RECORD, TOKENIZER, 16)[0]]
    assert widths != sorted(widths)


def test_labels_are_tokens_and_padding_has_none():
    for [(input_ids, labels)] in Batches(RECORD, TOKENIZER, 16)[0]:
        assert ((labels == input_ids) | (labels == -100)).all()
        assert (labels[:, 0] == -100).all()
        ends = (labels == TOKENIZER.eos).sum(1)
        assert (ends == 1).all()  # the first end-of-text; none of the padding


def test_labels_follow_the_mask():
    rows = list(generate(RECORD, "train", 64))
    labelled = {}
    for mask in ("action", "choice", "none"):
        item = Batches(rows, TOKENIZER, 4, mask=mask)[0]
        labelled[mask] = sum(int((step[0][1] != -100).sum()) for step in item)
    assert labelled["action"] < labelled["choice"] < labelled["none"]


def test_rows_are_cut_at_the_length_of_the_context():
    row = {"nums": [1, 2], "target": 3, "search_path": "1+2=3\n" * 40}
    [[part], *_] = Batches([row], TOKENIZER, 1)[0]
    [(input_ids, labels)] = TOKENIZER.encode_rows([row])
    assert part.tolist() == [[input_ids[:128]], [labels[:128]]]


class Tied:
    """Something that only a collection of garbage frees; it counts who has freed it."""

    def __init__(self, freed: torch.Tensor):
        self.freed = freed  # by the process that made it, by another
        self.maker = os.getpid()
        self.itself = self

    def __del__(self):
        self.freed[int(os.getpid() != self.maker)] += 1


def begin_and_collect(parents_group: int) -> None:
    in_worker()
    assert os.getpgrp() != parents_group  # whose signals are for the parent alone
    gc.collect()


def test_a_worker_frees_nothing_that_it_has_inherited():
    freed = torch.zeros(2, dtype=torch.int64).share_memory_()
    gc.disable()
    try:
        Tied(freed)
        own_group = (os.getpgrp(),)
        worker = multiprocessing.get_context("fork").Process(
            target=begin_and_collect, args=own_group
        )
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        assert freed.tolist() == [0, 0]
        on_gpu = SimpleNamespace(type="cuda")
        items = Batches(list(generate(RECORD, "train", 64)), TOKENIZER, 2)
        stream = train.stream_batches(items, 0, 16, on_gpu)  # nor is there any to inherit
        assert freed.tolist() == [1, 0]
        expected = train.stream_batches(items, 0, 16, torch.device("cpu"))
        for step, expected_step in zip(stream, expected, strict=True):
            assert [part.tolist() for part in step] == [part.tolist() for part in expected_step]
    finally:
        gc.enable()


# ---- The loss, the gradient and a step -----------------------------------------------------------


def test_the_loss_is_the_mean_over_labelled_tokens():
    """Against a sum of log-probabilities, token by token."""
    model = tiny(torch.float64)
    batches = [step[0] for step in Batches(RECORD, TOKENIZER, 4)[0][:3]]
    losses = []
    for input_ids, labels in batches:
        logps = model(input_ids).log_softmax(-1).detach()
        for row in range(len(input_ids)):
            for place in range(1, input_ids.shape[1]):
                if labels[row, place] != -100:
                    losses.append(-float(logps[row, place - 1, input_ids[row, place]]))
    assert abs(train.mean_loss(model, batches) - sum(losses) / len(losses)) < 1e-4
    [input_ids, _] = batches[0]
    assert train.mean_loss(model, [(input_ids, torch.full_like(input_ids, -100))]) is None


@pytest.fixture
def gradients(monkeypatch) -> list[list[torch.Tensor]]:
    """The gradients of each step of `fit`, before they are clipped."""
    recorded = []
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, norm):
        parameters = list(parameters)
        recorded.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    return recorded


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_with_adamw_equal_pytorchs_own(tmp_path, monkeypatch, gradients, compiled):
    """Three steps of `fit`, each in four parts, against transformers' loss of whole batches and a
    plain torch.optim.AdamW. Of the compiler only what is in Python: C++ has a test of its own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny()
    theirs = in_transformers(model, tmp_path)
    before = copy.deepcopy(theirs.state_dict())
    batches = Batches(RECORD, TOKENIZER, 2, accum=4, seed=3)  # parts with different label counts
    fit(model, batches, 3, Training(lr=1e-3, warmup=1, optimizer="adamw"), compiled=compiled)

    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    names = [name for name, _ in model.named_parameters()]
    whole_batches = Batches(RECORD, TOKENIZER, 8, seed=3)[0]
    labels_of_parts = {int((labels != -100).sum()) for _, labels in batches[0][0]}
    assert len(labels_of_parts) > 1  # a mean over parts would be another one
    for step, lr in enumerate((1e-3, 0.75e-3, 0.25e-3)):  # half a cosine
        input_ids, labels = whole_batches[step][0]
        optimizer.zero_grad()
        theirs(input_ids=input_ids, labels=labels).loss.backward()
        for name, gradient in zip(names, gradients[step]):
            expected = theirs.get_parameter(name).grad
            assert (gradient - expected).norm() < 1e-3 * expected.norm(), (step, name)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, value in model.state_dict().items():
        expected = theirs.state_dict()[name]
        assert (value - expected).norm() < 0.01 * (expected - before[name]).norm(), name


def rows_of_one_length(count: int) -> list[dict]:
    rows = {}
    for row in generate(RECORD, "train", 256):
        [(input_ids, _)] = TOKENIZER.encode_rows([row])
        rows.setdefault(len(input_ids), []).append(row)
    return max(rows.values(), key=len)[:count]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile wants a C++ compiler")
def test_a_compiled_step_equals_one_that_is_not(gradients):
    """At a single shape, for a compiler takes half a minute for each."""
    for compiled in (False, True):
        batches = Batches(rows_of_one_length(16), TOKENIZER, 2)
        fit(tiny(), batches, 1, Training(lr=1e-3, warmup=1), compiled=compiled)
    for plain, compiled in zip(*gradients):
        assert (plain - compiled).norm() < 1e-5 * plain.norm()


def changes(model: Llama) -> torch.Tensor:
    """By how much each weight differs from what it was at first."""
    pairs = zip(model.parameters(), tiny().parameters())
    return torch.cat([(new - old).detach().flatten() for new, old in pairs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_half_precision_trains_almost_as_full_precision_does(dtype, optimizer):
    """Ten steps, against the same in fp32: the weights move in nearly the same direction."""
    moved = {}
    for precision in (torch.float32, dtype):
        model = tiny()
        fit(
            model,
            Batches(RECORD, TOKENIZER, 8, seed=3),
            10,
            Training(lr=1e-2, warmup=1, optimizer=optimizer),
            dtype=precision,
        )
        moved[precision] = changes(model)
    similarity = torch.nn.functional.cosine_similarity(moved[dtype], moved[torch.float32], dim=0)
    assert similarity > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_gradients_overflow_in_fp16_is_skipped(optimizer, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    model = tiny()
    training = Training(lr=1e-2, warmup=1, optimizer=optimizer)
    fit(model, Batches(RECORD, TOKENIZER, 8), 1, training, dtype=torch.float16)
    assert not changes(model).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_checkpointing_changes_no_gradient(dtype):
    [(input_ids, labels)] = Batches(RECORD, TOKENIZER, 4)[0][0]
    kept = []
    for checkpointing in (False, True):
        model = tiny(dtype)
        model.model.gradient_checkpointing = checkpointing
        model(input_ids, labels=labels).backward()
        kept.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*kept):
        assert torch.equal(plain, recomputed)


def test_gradient_checkpointing_computes_each_layer_once_more_backward():
    [(input_ids, labels)] = Batches(RECORD, TOKENIZER, 4)[0][0]
    model = tiny()
    model.model.gradient_checkpointing = True
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(input_ids, labels=labels)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(input_ids)
    assert len(calls) == 3


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert 1.9 < max(rates) <= 2
    assert rates.index(max(rates)) in range(8, 12)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    for step, rate in enumerate(rates):  # whichever is lower, so that there is no jump
        assert rate == pytest.approx(min(0.2 * (step + 1), 1 + math.cos(math.pi * step / 100)))
    assert rates[50] == pytest.approx(1.0)
    assert rates[75] == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert rates[-1] < 0.001


# ---- Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 20, 50), (3, 50, 20)])
def test_orthogonal_sets_all_singular_values_to_about_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(train.orthogonal(torch.randn(shape) * 1e-3))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 20, 20), (3, 20, 50), (3, 50, 20)])
def test_orthogonal_is_near_to_the_nearest_orthogonal_matrix(shape):
    """Against the singular value decomposition: that matrix is U V."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    ours = train.orthogonal(x).flatten(1)
    assert torch.nn.functional.cosine_similarity(ours, (u @ v).flatten(1)).min() > 0.95


def kinds_of_parameters(model: Llama) -> tuple[list, list, list]:
    """The layers' matrices; embedding and head; the norms' gains."""
    matrices = []
    tables = []
    gains = []
    for parameter in model.parameters():
        if parameter.ndim == 1:
            gains.append(parameter)
        elif TOKENIZER.vocab_size in parameter.shape:
            tables.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, tables, gains


def random_gradients(model: Llama, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_muon_equals_pytorchs_muon_and_adamw():
    """Ten steps on the same gradients. torch.optim.Muon multiplies in bf16, so that the matrices
    agree to a percent; all else is torch.optim.AdamW's."""
    ours = tiny(tied=False)
    before = copy.deepcopy(ours)
    theirs = copy.deepcopy(ours)
    optimizer = train.make_optimizer(ours, Training(lr=1e-2), fused=True)
    matrices, tables, gains = kinds_of_parameters(theirs)
    adamw_groups = [
        {"params": tables, "weight_decay": 0.1},
        {"params": gains, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(adamw_groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(10):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        optimizer.step()
        muon.step()
        adamw.step()
    all_kinds = [kinds_of_parameters(model) for model in (before, ours, theirs)]
    for tolerance, *kind in zip((0.01, 1e-4, 1e-4), *all_kinds):
        for old, own, expected in zip(*kind):
            assert (own - expected).norm() < tolerance * (expected - old).norm()


def test_muon_scales_its_steps_as_adamw_does():
    """A matrix's step has a root mean square of 0.2 times the learning rate, as AdamW's has."""
    model = tiny()
    before = copy.deepcopy(model)
    random_gradients(model, 0)
    train.make_optimizer(model, Training(lr=1e-2, weight_decay=0.0), fused=True).step()
    for old, new in zip(kinds_of_parameters(before)[0], kinds_of_parameters(model)[0]):
        assert 0.15e-2 < (new - old).square().mean().sqrt() < 0.25e-2


# ---- Saving and resuming -------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, tied, optimizer):
    """To the last bit; it is interrupted in the middle of an item of 16 steps."""
    whole = tiny(tied=tied)
    interrupted = copy.deepcopy(whole)
    batches = Batches(RECORD, TOKENIZER, 4)
    settings = {"steps": 40, "training": replace(SHORT, optimizer=optimizer)}
    losses = []  # moving averages
    fit(whole, batches, **settings, report=lambda loss, *rest: losses.append(loss))

    def stop(loss, state, evaluates):
        train.save(tmp_path, interrupted, TOKENIZER, RECORD, [], state)
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(interrupted, batches, **settings, report_every=27, report=stop)
    (tmp_path / "model.safetensors").unlink()  # it is not needed
    state = train.load_state(tmp_path)
    resumed = train.rebuild(tmp_path, state)
    assert state["step"] == 27
    fit(resumed, batches, **settings, state=state, report=lambda loss, *_: losses.append(loss))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name
        assert not torch.equal(value, interrupted.get_parameter(name)), name


def run_in_two_parts(model, batches, settings: dict, steps: int, later: dict) -> list[dict]:
    """Stop after so many steps, and go on by settings that may differ; the states of both ends."""
    states = []

    def stop(loss, state, evaluates):
        states.append(copy.deepcopy(state))
        if len(states) == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(model, batches, **settings, report_every=steps, report=stop)
    fit(model, batches, **settings | later, state=copy.deepcopy(states[0]), report=stop)
    return states


def test_a_run_in_fp16_goes_on_with_its_scale(monkeypatch):
    """Which is doubled after every five steps, and halved where a gradient overflows."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**12, growth_interval=5)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    batches = Batches(RECORD, TOKENIZER, 4)
    settings = {"steps": 30, "training": SHORT, "dtype": torch.float16}
    whole = tiny()
    interrupted = copy.deepcopy(whole)
    ends = []
    fit(whole, batches, **settings, report=lambda *given: ends.append(given[1]["scaler"]))
    states = run_in_two_parts(interrupted, batches, settings, 17, {})
    assert states[0]["scaler"]["scale"] != 2.0**12
    assert states[1]["scaler"] == ends[0]
    for name, value in whole.named_parameters():
        assert torch.equal(value, interrupted.get_parameter(name)), name


def test_a_run_goes_on_with_the_weight_decay_that_it_is_given():
    batches = Batches(RECORD, TOKENIZER, 4)
    settings = {"steps": 9, "training": SHORT}
    later = {"training": replace(SHORT, weight_decay=0.3)}
    states = run_in_two_parts(tiny(), batches, settings, 4, later)
    decays = []
    for state in states:
        groups = state["optimizer"]["param_groups"]
        decays.append([group["weight_decay"] for group in groups])
    assert decays == [[0.1, 0.1, 0.0], [0.3, 0.3, 0.0]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stops_is_saved_and_resumes_to_the_last_bit(
    tmp_path, monkeypatch, number
):
    """It goes on to the end of a step, is saved without being evaluated, and then stops."""
    whole = tiny()
    stopped = copy.deepcopy(whole)
    batches = Batches(RECORD, TOKENIZER, 4)
    fit(whole, batches, 30, SHORT)
    learning_rate = train.learning_rate
    raised = []

    def stop_at_7(step, *settings):
        if step == 7 and not raised:
            raised.append(number)
            signal.raise_signal(number)
        return learning_rate(step, *settings)

    def save(loss, state, evaluates):
        assert not evaluates
        train.save(tmp_path, stopped, TOKENIZER, RECORD, [], state)

    monkeypatch.setattr(train, "learning_rate", stop_at_7)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(stopped, batches, 30, SHORT, report=save)
    assert stop.value.args == (number,)
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    (tmp_path / "model.safetensors").unlink()  # it is not needed
    state = train.load_state(tmp_path)
    resumed = train.rebuild(tmp_path, state)
    assert state["step"] == 8
    fit(resumed, batches, 30, SHORT, state=state)
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name
    del stop
    assert signal.getsignal(number) == handler


def test_a_second_signal_stops_at_once(monkeypatch):
    def stop(step, *settings):
        signal.raise_signal(signal.SIGTERM)
        reached.append(f"step {step}, after the first")
        signal.raise_signal(signal.SIGTERM)
        reached.append(f"step {step}, after the second")
        return 1e-2

    reached = []
    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), Batches(RECORD, TOKENIZER, 2), 8, SHORT)
    assert reached == ["step 0, after the first"]


def test_reports_come_every_so_many_steps_and_after_the_last():
    reports = []
    fit(
        tiny(),
        Batches(RECORD, TOKENIZER, 2),
        8,
        SHORT,
        report_every=3,
        report=lambda loss, state, evaluates: reports.append((loss, state["step"])),
    )
    assert [step for _, step in reports] == [3, 6, 8]
    assert all(1 < loss < 5 for loss, _ in reports)


def test_saving_without_a_state_takes_the_old_state_away(tmp_path):
    """It belongs to other weights."""
    train.save(tmp_path, tiny(), TOKENIZER, RECORD, [], {"step": 1, "optimizer": {}})
    assert (tmp_path / "resume.pt").exists()
    train.save(tmp_path, tiny(), TOKENIZER, RECORD, [])
    assert not (tmp_path / "resume.pt").exists()
    assert (tmp_path / "model.safetensors").exists()


@pytest.fixture
def largest_file():
    """largest_file(size): no file may grow larger, as on a disk that is all but full."""
    resource = pytest.importorskip("resource")  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.55, 0.75, 0.99])
def test_a_disk_that_is_full_is_named_and_leaves_the_old_files(tmp_path, largest_file, share):
    """The weights in bf16 have half the size of resume.pt; they may still be written."""
    torch.manual_seed(0)
    model = tiny()
    model.model.embed_tokens = torch.nn.Embedding(24, 4000)  # one large tensor
    state = {"step": 1, "optimizer": {}}
    train.save(tmp_path, model, TOKENIZER, RECORD, [], state)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    largest_file(int(share * len(before["resume.pt"])))
    with pytest.raises(UserError, match="cannot write"):
        train.save(tmp_path, model, TOKENIZER, {"other": "record"}, [], state)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"no archive", pickle.dumps({"step": 1}, protocol=2)])
def test_a_damaged_state_is_named(tmp_path, content):
    (tmp_path / "resume.pt").write_bytes(content)
    with pytest.raises(UserError, match="cannot resume from"):
        train.load_state(tmp_path)


def test_a_state_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot resume from .*: nothing has been saved there yet"):
        train.load_state(tmp_path)


class Intruder:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_state_with_code_in_it_is_not_run(tmp_path):
    torch.save({"weights": {}, "step": Intruder(tmp_path / "made")}, tmp_path / "resume.pt")
    with pytest.raises(UserError, match="cannot resume from"):
        train.load_state(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_saved_by_trainer_opens(tmp_path):
    """Against transformers' Trainer."""
    theirs = in_transformers(tiny(), tmp_path / "ours")
    TOKENIZER.save_pretrained(tmp_path / "ours")
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    [(input_ids, labels)] = Batches(RECORD, TOKENIZER, 4)[0][0]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(input_ids, labels)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    trainer = Trainer(theirs, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "theirs")

    opened = Llama.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(opened(input_ids), theirs(input_ids).logits, atol=1e-5, rtol=0)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, opened.state_dict()[name]), name
    again = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert again.vocab_size == TOKENIZER.vocab_size
    assert (again.eos, again.backtrack) == (TOKENIZER.eos, TOKENIZER.backtrack)


# ---- Two processes -------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def train_on(world: int, rank: int, model: Llama, optimizer: str, **settings) -> None:
    """Twenty steps, of the same rows whatever the number of processes."""
    batches = Batches(RECORD, TOKENIZER, 8 // world, rank=rank, world=world)
    fit(model, batches, 20, replace(SHORT, warmup=2, optimizer=optimizer), **settings)


def weights_of(model: Llama) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def whole_run(out: Path, dtype: torch.dtype, optimizer: str) -> dict:
    """Gradients of the first step, all losses, the weights at the end; saved on the way, too."""
    _, rank, world = device_rank_world()
    model = tiny(dtype)
    gradients = []
    losses = []
    clip = torch.nn.utils.clip_grad_norm_

    def recording(parameters, norm):  # Adam would hide a gradient of the wrong scale
        if not gradients:
            gradients.extend(parameter.grad.clone() for parameter in model.parameters())
        return clip(parameters, norm)

    def report(loss, state, evaluates):
        losses.append(torch.tensor(loss, dtype=torch.float64))
        if rank == 0 and state["step"] == 10:
            train.save(out, model, TOKENIZER, RECORD, [], state)

    torch.nn.utils.clip_grad_norm_ = recording
    try:
        train_on(world, rank, model, optimizer, report_every=5, report=report)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    return {"gradients": gradients, "losses": losses, "weights": weights_of(model)}


def resumed_run(folder: Path, optimizer: str) -> list[torch.Tensor]:
    """The weights at the end of a run that goes on from what was saved."""
    _, rank, world = device_rank_world()
    state = train.load_state(folder)
    model = train.rebuild(folder, state)
    train_on(world, rank, model, optimizer, state=state)
    return weights_of(model)


def all_runs(out: Path) -> dict:
    """What two processes are to do as one does."""
    _, rank, world = device_rank_world()
    results = {}
    for name in OPTIMIZERS:
        for kind, dtype in DTYPES.items():
            results[name, kind] = whole_run(out / f"{world}-{name}-{kind}", dtype, name)
        if world > 1:
            dist.barrier()  # what rank 0 saved is complete
        results[name, "resumed"] = resumed_run(out / f"{world}-{name}-float32", name)
    problems = list(generate(RECORD, "val", 9))
    settings = Settings(b=1, n=4, max_new_tokens=12)
    results["answers"] = evaluate(tiny(torch.float64), TOKENIZER, problems, settings)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict, Path]:
    """What one process and what two processes found, and where they saved."""
    out = tmp_path_factory.mktemp("runs")
    one = all_runs(out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the models here are on the CPU
    done = subprocess.run(
        [*torchrun, __file__, str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return one, torch.load(out / "two.pt", weights_only=True), out


def relative_difference(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    ours = torch.cat([tensor.flatten().double() for tensor in ours])
    expected = torch.cat([tensor.flatten().double() for tensor in expected])
    return float((ours - expected).norm() / expected.norm())


ROUNDING = [  # a loss is added up in fp32 whatever the model; twenty steps let rounding grow
    ("float64", "gradients", 1e-10),
    ("float64", "losses", 1e-6),
    ("float64", "weights", 1e-8),
    ("float32", "gradients", 1e-6),
    ("float32", "losses", 1e-4),
    ("float32", "weights", 1e-4),
]


@pytest.mark.parametrize("kind,what,rounding", ROUNDING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_train_as_one_does(runs, optimizer, kind, what, rounding):
    one, two, _ = runs
    difference = relative_difference(two[optimizer, kind][what], one[optimizer, kind][what])
    assert difference < rounding


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_go_on_with_what_two_have_saved(runs, optimizer):
    one, two, _ = runs
    expected = one[optimizer, "float32"]["weights"]
    assert relative_difference(two[optimizer, "resumed"], expected) < 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_goes_on_with_what_two_have_saved(runs, optimizer):
    one, _, out = runs
    resumed = resumed_run(out / f"2-{optimizer}-float32", optimizer)
    assert relative_difference(resumed, one[optimizer, "float32"]["weights"]) < 1e-4


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shared_optimizer_goes_on_and_is_saved_again(group_of_one, name):
    """Where the model is: on a GPU a fused kernel takes step counts of that GPU alone."""
    model = tiny().to(device_rank_world()[0])
    batches = Batches(RECORD, TOKENIZER, 4)
    settings = {"steps": 8, "training": replace(SHORT, optimizer=name)}
    whole = copy.deepcopy(model)
    ends = []
    fit(whole, batches, **settings, report=lambda *given: ends.append(given[1]["optimizer"]))
    states = run_in_two_parts(model, batches, settings, 4, {})
    torch.testing.assert_close(states[1]["optimizer"], ends[0], rtol=0, atol=0)
    for name, value in whole.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def test_a_shared_optimizer_has_its_state_once(group_of_one):
    model = tiny()
    optimizer = train.make_optimizer(model, SHORT, fused=True)
    [(input_ids, labels)] = Batches(RECORD, TOKENIZER, 4)[0][0]
    model(input_ids, labels=labels).backward()
    optimizer.step()
    train.load_optimizer(optimizer, train.optimizer_state(optimizer))
    assert not optimizer.state
    assert len(optimizer.optim.state) == len(list(model.parameters()))


def test_two_processes_search_as_one_does(runs):
    one, two, _ = runs
    assert two["answers"] == one["answers"]


if __name__ == "__main__":  # one of the two processes
    folder = Path(sys.argv[1])
    found = all_runs(folder)
    if is_main():
        torch.save(found, folder / "two.pt")
    dist.destroy_process_group()  # as `cli` does: else gloo's threads may abort the exit
