"""Batches, gradients, resuming, two processes against one."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from data import Tokenizer, generate, new_record
from model import Llama, LlamaConfig
from train import Batches, Muon, deepen, fit, learning_rate, load_state, mean_loss, orthogonal, owners, save

TOK, RECORD = Tokenizer.digits(), new_record(0, [3])
ROOT = Path(__file__).parent.parent


def tiny(dtype=torch.float32) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=TOK.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2, head_dim=16)).to(dtype)


def rows_of(parts) -> list[tuple[int, ...]]:
    """The rows of a step's (ids, labels) parts, without end-of-text and padding, sorted."""
    return sorted(tuple(i for i in row if i != TOK.eos) for ids, _ in parts for row in ids.tolist())


@pytest.mark.parametrize("rows", [RECORD, list(generate(RECORD, "train", 100))], ids=["stream", "list"])
def test_a_steps_rows_do_not_depend_on_ranks_or_accumulation(rows):
    whole = Batches(rows, TOK, 8)[1]
    assert len(whole) == 64 and all(len(parts) == 1 and len(parts[0][0]) == 8 for parts in whole)
    parts = Batches(rows, TOK, 2, accum=4)[1]
    ranks = [Batches(rows, TOK, 4, rank=r, world=2)[1] for r in range(2)]
    for s in range(64):
        assert rows_of(whole[s]) == rows_of(parts[s]) == rows_of(ranks[0][s] + ranks[1][s])


def test_a_list_is_gone_through_once_an_epoch():
    rows = list(generate(RECORD, "train", 256))
    seen = [x for i in range(2) for parts in Batches(rows, TOK, 4)[i] for x in rows_of(parts)]
    assert sorted(seen[:256]) == sorted(seen[256:]) and seen[:256] != seen[256:]
    other = [x for parts in Batches(rows, TOK, 4, seed=1)[0] for x in rows_of(parts)]
    assert sorted(other) == sorted(seen[:256]) and other != seen[:256]


def test_batches_are_bucketed_and_labelled():
    item = Batches(RECORD, TOK, 16)[0]
    padding = sum(int((ids == TOK.eos).sum()) - 16 for [(ids, _)] in item)
    assert padding < 0.02 * sum(ids.numel() for [(ids, _)] in item)
    for [(ids, labels)] in item:
        assert ((labels == ids) | (labels == -100)).all() and (labels[:, 0] == -100).all()
        assert ((labels == TOK.eos).sum(1) == 1).all()                       # the first end-of-text; none of the padding


def test_the_loss_is_the_mean_over_labelled_tokens():
    model, batches = tiny(torch.float64), [parts[0] for parts in Batches(RECORD, TOK, 4)[0][:3]]
    total = count = 0
    for ids, labels in batches:
        logps = model(ids).log_softmax(-1).detach()
        for row in range(len(ids)):
            for t in range(1, ids.shape[1]):
                if labels[row, t] != -100:
                    total, count = total - float(logps[row, t - 1, ids[row, t]]), count + 1
    assert abs(mean_loss(model, batches) - total / count) < 1e-4


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("c++"), reason="torch.compile needs a C++ compiler"))])
def test_one_step_equals_pytorchs_own(tmp_path, monkeypatch, compiled):
    """A step of `fit` with AdamW, in four parts, against transformers' loss on the whole batch and a plain AdamW."""
    model, gradients, clip = tiny(), [], torch.nn.utils.clip_grad_norm_
    theirs = LlamaForCausalLM.from_pretrained(save_for_transformers(model, tmp_path))

    def recording(parameters, norm):
        gradients.extend(p.grad.clone() for p in model.parameters())
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    fit(model, Batches(RECORD, TOK, 2, accum=4), 1, 1e-3, warmup=1, muon=False, compiled=compiled)
    [ids, labels] = Batches(RECORD, TOK, 8)[0][0][0]
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    theirs(input_ids=ids, labels=labels).loss.backward()
    names = dict(theirs.named_parameters())
    for (key, _), gradient in zip(model.named_parameters(), gradients):
        assert (gradient - names[key].grad).norm() < 1e-5 * gradient.norm(), key
    clip(theirs.parameters(), 1.0)
    optimizer.step()
    expected = theirs.state_dict()
    for key, value in model.state_dict().items():
        assert (value - expected[key]).abs().max() < 2e-5, key


def test_orthogonal_sets_all_singular_values_to_about_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 20), (3, 20, 50), (3, 50, 20)):
        x = torch.randn(shape) * 1e-3
        values = torch.linalg.svdvals(orthogonal(x))
        assert 0.5 < values.min() and values.max() < 1.3, shape
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        nearest = torch.nn.functional.cosine_similarity(orthogonal(x).flatten(1), (u @ v).flatten(1))
        assert nearest.min() > 0.95, shape


def test_muon_equals_pytorchs_muon_and_adamw():
    """Ten steps on the same gradients; torch.optim.Muon multiplies in bf16, so the sum of the steps agrees to a percent."""
    ours = tiny()
    before, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    inner = [[p for p in model.model.layers.parameters() if p.ndim == 2] for model in (ours, theirs)]
    outer = [[p for p in model.parameters() if p.ndim == 1 or p.shape[0] == TOK.vocab_size] for model in (ours, theirs)]
    muon = Muon([{"params": inner[0], "weight_decay": 0.1}, {"params": outer[0]}], lr=1e-2, weight_decay=0.0, fused=True)
    peers = [torch.optim.Muon(inner[1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW(outer[1], lr=1e-2, weight_decay=0.0)]
    for step in range(10):
        for group in (*inner, *outer):
            torch.manual_seed(step)
            for p in group:
                p.grad = torch.randn_like(p)
        for optimizer in (muon, *peers):
            optimizer.step()
    for old, a, b in zip(before.parameters(), ours.parameters(), theirs.parameters()):
        assert (a - b).norm() < 0.01 * (a - old).norm()


def save_for_transformers(model, folder):
    model.save_pretrained(folder, torch.float32)
    return folder


def test_learning_rate():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) <= 1 and rates.index(max(rates)) in range(8, 12)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001


def test_a_deeper_model_computes_the_same_and_trains_all_its_layers(tmp_path):
    model, ids = tiny(), torch.arange(24).view(2, 12)
    for p in model.model.layers.parameters():
        p.data += torch.randn_like(p) / 10                                   # layers that do something
    before, old = model(ids), copy.deepcopy(model.model.layers.state_dict())
    deepen(model, 5)
    assert torch.equal(model(ids), before) and model.config.num_hidden_layers == len(model.model.layers) == 5
    new = copy.deepcopy(model.model.layers.state_dict())
    for at, source in enumerate((0, 0, 0, 1, 1)):                            # 0 and 3 are the old ones
        same = [key for key in old if key[0] == str(source) and torch.equal(new[f"{at}{key[1:]}"], old[key])]
        assert len(same) == (9 if at in (0, 3) else 7), at                   # all but the two output projections
    fit(model, Batches(RECORD, TOK, 8), 3, 1e-2, warmup=1)
    assert all(not torch.equal(value, new[key]) for key, value in model.model.layers.state_dict().items() if "o_proj" in key)
    model.save_pretrained(tmp_path, torch.float32)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, tied):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=TOK.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied)
    first = Llama(config)
    second = copy.deepcopy(first)
    batches = Batches(RECORD, TOK, 4)
    fit(first, batches, 90, 1e-2, warmup=5)

    class Interrupted(Exception):
        pass

    def stop(loss, state):
        save(tmp_path, second, TOK, RECORD, state)
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(second, batches, 90, 1e-2, warmup=5, every=70, report=stop)
    third = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    state = load_state(tmp_path, third)
    assert state["step"] == 70
    fit(third, batches, 90, 1e-2, warmup=5, state=state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    save(tmp_path, first, TOK, RECORD)                               # weights that no state belongs to: the old one must go
    assert not (tmp_path / "resume.safetensors").exists() and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_checkpointing_changes_no_gradient(dtype):
    [(ids, labels)], gradients, calls = Batches(RECORD, TOK, 4)[0][0], [], []
    for on in (False, True):
        model = tiny(dtype)
        model.model.gradient_checkpointing = on
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(len(gradients)))
        model(ids, labels=labels).backward()
        gradients.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            model(ids)
    assert calls == [0, 1, 1, 1, 2]                                  # once more in the backward pass, never without one
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_optimizer_state_is_shared_out_evenly():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (7, 100, 30, 30, 30, 5)]
    owner = owners(params, 2)
    load = [sum(p.numel() for p in params if owner[p] == rank) for rank in (0, 1)]
    assert list(owner) == params and sum(load) == 202 and max(load) <= 107
    assert set(owners(params, 1).values()) == {0}


def test_a_checkpoint_saved_by_trainer_opens(tmp_path):
    theirs = LlamaForCausalLM.from_pretrained(save_for_transformers(tiny(), tmp_path / "ours"))
    TOK.save_pretrained(tmp_path / "ours")
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                                  disable_tqdm=True)
    [(ids, labels)] = Batches(RECORD, TOK, 4)[0][0]
    data = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels)]
    trainer = Trainer(theirs, arguments, train_dataset=data,
                      processing_class=AutoTokenizer.from_pretrained(tmp_path / "ours"))
    trainer.train()
    trainer.save_model(tmp_path / "theirs")
    opened, tok = Llama.from_pretrained(tmp_path / "theirs"), Tokenizer.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(opened(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    assert all(torch.equal(value, opened.state_dict()[key]) for key, value in theirs.state_dict().items())
    assert (tok.vocab_size, tok.eos, tok.backtrack) == (TOK.vocab_size, TOK.eos, TOK.backtrack)


WORKER = """
import json, sys; sys.path.insert(0, {root!r}); sys.path.insert(0, {tests!r})
import torch
from model import start
from search import evaluate
from train import Batches, fit, save
from test_train import RECORD, TOK, tiny
from data import generate
device, rank, world = start()
result, clip = {{}}, torch.nn.utils.clip_grad_norm_
for dtype in (torch.float64, torch.float32):
    for muon in (True, False):
        model, gradients, losses = tiny(dtype), [], []
        def recording(parameters, norm):                 # Adam would hide a gradient of the wrong scale
            gradients.extend([] if gradients else [p.grad.double().flatten().tolist() for p in model.parameters()])
            return clip(parameters, norm)
        def report(loss, state):
            losses.append(loss)
            if rank == 0 and state["step"] == 10 and dtype == torch.float32:
                save({out!r} + f".{{muon}}", model, TOK, RECORD, state)
        torch.nn.utils.clip_grad_norm_ = recording
        batches = Batches(RECORD, TOK, 8 // world, accum=1, rank=rank, world=world)
        fit(model, batches, 20, 1e-2, warmup=2, muon=muon, every=5, report=report)
        weights = [p.double().flatten().tolist() for p in model.parameters()]
        result[f"{{str(dtype)[6:]}} {{muon}}"] = gradients, weights, losses
rows = evaluate(tiny(torch.float64), TOK, list(generate(RECORD, "val", 9)), "self_backtrack", b=1, n=4, max_new=12)
if rank == 0:
    json.dump([result, rows], open({out!r}, "w"))
if world > 1:
    torch.distributed.destroy_process_group()            # as `cli` does: else gloo's threads may abort the exit
"""


def test_two_processes_equal_one(tmp_path):
    results = []
    for world in (1, 2):
        out, script = tmp_path / f"{world}.json", tmp_path / f"{world}.py"
        script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        results.append(json.loads(out.read_text()))
    (one, rows1), (two, rows2) = results
    for kind, near in (("float64", 1e-10), ("float32", 1e-6)):
        for muon in (True, False):
            for name, a, b in zip(("gradient", "weights", "loss"), one[f"{kind} {muon}"], two[f"{kind} {muon}"]):
                a, b = (torch.cat([torch.tensor(x, dtype=torch.float64).flatten() for x in v]) for v in (a, b))
                bound = near if name == "gradient" else 100 * near               # twenty steps let rounding grow
                assert (a - b).norm() <= bound * a.norm(), (kind, muon, name)
            if kind == "float32":                        # what two ranks saved at step 10, one goes on with
                folder = tmp_path / f"2.json.{muon}"
                model = Llama.from_pretrained(folder, dtype=torch.float32)
                state = load_state(folder, model)
                fit(model, Batches(RECORD, TOK, 8), 20, 1e-2, warmup=2, muon=muon, state=state)
                for a, b in zip(one[f"float32 {muon}"][1], model.parameters()):
                    torch.testing.assert_close(torch.tensor(a), b.detach().flatten(), atol=1e-4, rtol=1e-3)
    assert [(r["nums"], r["tokens"]) for r in rows1] == [(r["nums"], r["tokens"]) for r in rows2]
