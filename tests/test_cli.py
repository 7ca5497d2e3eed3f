"""Every command line at tiny size, and what bad input gets: one line on stderr, exit code 2, nothing lost."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import improve
import search
import train
from model import cli

ROOT = Path(__file__).parent.parent
TRAIN = ("--steps", 6, "--batch_size", 4, "--hidden_size", 32, "--layers", 1, "--num_eval", 4, "--eval_every", 3)


def run(capsys, monkeypatch, module, *args) -> tuple[int, str, str]:
    """Run a program's command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
    capsys.readouterr()
    try:
        cli(module.main)
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "small"
    subprocess.run([sys.executable, ROOT / "train.py", *map(str, TRAIN), "--out", folder], check=True, capture_output=True)
    return folder


def test_train_logs_saves_and_resumes(ckpt, tmp_path, capsys, monkeypatch):
    lines = [json.loads(line) for line in (ckpt / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and {"loss", "val_loss", "val_new_greedy"} <= lines[0].keys()
    record = json.loads((ckpt / "record.json").read_text())
    settings = record.pop("settings")
    given = {"steps": 6, "batch_size": 4, "layers": 1}
    assert record == data.new_record(0, [3]) and settings.items() >= {**train.SCRATCH, **given}.items()
    shutil.copytree(ckpt, tmp_path / "more")
    code, out, _ = run(capsys, monkeypatch, train, *TRAIN, "--resume", "--out", tmp_path / "more", "--steps", 9)
    assert code == 0 and '"step": 9' in out and '"step": 6' not in out and "self_backtrack, val_new" in out
    code, _, err = run(capsys, monkeypatch, train, "--resume", "--out", tmp_path / "more", "--steps", 9, "--layers", 2)
    assert code == 2 and "has 1 layers" in err
    code, _, err = run(capsys, monkeypatch, train, *TRAIN, "--ckpt", ckpt, "--layers", 2, "--out", tmp_path / "deep")
    assert code == 0 and json.loads((tmp_path / "deep" / "config.json").read_text())["num_hidden_layers"] == 2, err
    settings = json.loads((tmp_path / "deep" / "record.json").read_text())["settings"]
    assert (settings["layers"], settings["hidden_size"]) == (2, 32)                     # the model's, not the flags' defaults
    code, _, err = run(capsys, monkeypatch, train, "--resume", "--out", tmp_path / "more")
    assert code == 2 and err.count("\n") == 1 and "all of its 9 steps" in err


def test_resuming_takes_the_first_runs_settings(ckpt, tmp_path, capsys, monkeypatch):
    fitted = []
    monkeypatch.setattr(train, "fit", lambda model, batches, steps, *settings: fitted.append((batches, steps, *settings)))
    shutil.copytree(ckpt, tmp_path / "more")
    record = json.loads((tmp_path / "more" / "record.json").read_text())
    given = {"optimizer": "muon", "steps": 40, "lr": 0.125, "grad_accum": 2, "seed": 5, "sizes": [2]}
    record["settings"] |= {**train.PAPER, **given}
    (tmp_path / "more" / "record.json").write_text(json.dumps(record))
    code, _, err = run(capsys, monkeypatch, train, "--resume", "--out", tmp_path / "more", "--num_eval", 1, "--warmup", 7)
    [(batches, steps, lr, warmup, decay, *_)] = fitted
    assert code == 0 and (batches.size, batches.accum, batches.mask, batches.seed) == (32, 2, "action", 5), err
    assert batches.rows.items() >= {"seed": 5, "sizes": [2]}.items()
    assert (steps, lr, warmup, decay) == (40, 0.125, 7, 0.01)          # what is given wins
    code, _, err = run(capsys, monkeypatch, train, "--resume", "--out", tmp_path / "more", "--optimizer", "adamw")
    assert code == 2 and err.count("\n") == 1 and "was not trained by adamw" in err


def test_data_then_train_then_search_then_improve(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "data", tmp_path / "out"
    code, printed, _ = run(capsys, monkeypatch, data, "--num", 300, "--num_val", 20, "--sizes", 2, 3, "--out", folder)
    assert code == 0 and "300" in printed
    assert sorted(p.name for p in folder.iterdir()) == ["record.json", "train.jsonl", "val.jsonl", "val_new.jsonl"]
    rows = data.read_rows(folder / "train.jsonl")
    assert rows == list(data.generate(data.new_record(0, [2, 3]), "train", 300))
    code, _, err = run(capsys, monkeypatch, train, *TRAIN, "--data", folder, "--out", out)
    assert code == 0, err
    assert json.loads((out / "record.json").read_text())["sizes"] == [2, 3]
    code, printed, err = run(capsys, monkeypatch, train, *TRAIN, "--resume", "--out", out, "--steps", 7)
    assert code == 0 and json.loads((out / "record.json").read_text())["settings"]["data"] == str(folder), err
    monkeypatch.setattr(improve, "harvest", lambda rows, answers: rows)      # so small a model solves nothing
    code, printed, err = run(capsys, monkeypatch, improve, "--ckpt", out, "--out", tmp_path / "better", "--rounds", 1,
                             "--num", 12, "--n", 2, "--num_eval", 3)
    assert json.loads((tmp_path / "better" / "record.json").read_text())["seed"] == 1_000_000    # a second run draws other rows
    assert code == 0 and "round" in printed and (tmp_path / "better" / "model.safetensors").exists(), err
    log = [json.loads(line) for line in (tmp_path / "better" / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log] == [0, 1] and "val_new_self_backtrack" in log[1]
    code, printed, _ = run(capsys, monkeypatch, train, *TRAIN, "--ckpt", out, "--data", folder / "train.jsonl", "--out", out)
    assert code == 0
    code, printed, err = run(capsys, monkeypatch, train, *TRAIN, "--resume", "--out", out, "--steps", 7)
    assert code == 0 and json.loads((out / "record.json").read_text())["source"] == str(folder / "train.jsonl"), err


def test_a_reader_who_leaves_causes_no_traceback(ckpt):
    program = subprocess.Popen([sys.executable, ROOT / "search.py", "--ckpt", ckpt, "--numbers", "3", "4", "--target", "7"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    assert "Traceback" not in program.stderr.read() and program.wait() == 1


@pytest.mark.parametrize("decoder", search.DECODERS)
def test_search_writes_a_line_a_problem(ckpt, tmp_path, capsys, monkeypatch, decoder):
    out = tmp_path / "rows.jsonl"
    code, printed, err = run(capsys, monkeypatch, search, "--ckpt", ckpt, "--data", "val_new", "--num", 5, "--offset", 2,
                             "--decoder", decoder, "--n", 3, "--max_new_tokens", 12, "--out", out)
    assert code == 0 and f"{decoder}, val_new" in printed, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    assert {"nums", "target", "response", "score", "correct", "reason", "verified", "tokens"} <= rows[0].keys()
    assert {row["target"] for row in rows} <= set(data.HELD_OUT)
    expected = list(data.generate(data.new_record(0, [3]), "val_new", 7))[2:]
    assert [row["nums"] for row in rows] == [row["nums"] for row in expected]


def test_search_draws_a_tree_within_100_columns(ckpt, capsys, monkeypatch):
    code, printed, _ = run(capsys, monkeypatch, search, "--ckpt", ckpt, "--numbers", 3, 5, 7, "--target", 22, "--n", 4)
    assert code == 0 and printed.startswith("numbers [3, 5, 7]  target 22") and "\033" not in printed


def test_search_without_arguments_shows_a_tree_and_a_table():
    printed = subprocess.run([sys.executable, ROOT / "search.py", "--num", "4"], check=True, capture_output=True, text=True,
                             cwd="/", env={**os.environ, "NO_COLOR": "1"}).stdout
    assert "target" in printed and "<= chosen" in printed and "self_backtrack, val_new" in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 100


@pytest.mark.parametrize("args,complaint", [
    ("--n 0", "--n: 0 is not at least 1"), ("--b -1", "--b: -1 is not at least 0"),
    ("--n x", "--n: invalid whole number value: 'x'"), ("--decoder x", "invalid choice: 'x'"),
    ("--min_p 2", "at most 1, not 2"),
    ("--temperature 0", "--temperature: 0 is not at least 0.001"), ("--temperature -1", "not at least 0.001"),
    ("--temperature nan", "not at least"), ("--temperature inf", "too large"), ("--seed 99999999999999999999", "too large"),
    ("--numbers 3 0 --target 9", "--numbers: 0 is not at least 1"), ("--numbers 3 -4 --target 9", "-4 is not at least 1"),
    ("--numbers 3 4 --target 9.5", "--target: invalid whole number value: '9.5'"),
    ("--numbers 3 4", "--numbers and --target"), ("--data nosuchsplit", "nosuchsplit is none of them"),
    ("--ckpt no/such", "no model at no/such"), ("--ckpt /no/such/folder", "no model at /no/such/folder"),
    ("--data val --out /proc/no/rows.jsonl --num 1 --n 1", "cannot write"),
    ("--data val --out {tmp}", "--out wants a file"), ("--out {tmp}/x", "--out wants a file"),
    ("--ckpt {tmp}/empty", "cannot be read"),
    ("--data {tmp}/rows.jsonl", "rows.jsonl, line 2 cannot be read"),
    ("--data {tmp}/column.jsonl", "row 1 lacks the column target"),
    ("--data {tmp}/none.jsonl", "row 1 lacks the column nums"), ("--data {tmp}/list.jsonl", "row 1 lacks the column nums"),
    ("--data {tmp}/zero.jsonl", "nums must be positive whole numbers"),
    ("--data {tmp}/half.jsonl", "target must be a whole number")])
def test_bad_input_gets_one_line(ckpt, tmp_path, capsys, monkeypatch, args, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name, text in (("none", ""), ("list", "[]"), ("rows", '{"nums": [3], "target": 3}\n{"nums": [3], "tar'),
                       ("column", '{"nums": [3, 4]}'), ("zero", '{"nums": [3, 0], "target": 3}'),
                       ("half", '{"nums": [3, 1], "target": 3.5}')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    args = args.format(tmp=tmp_path).split()
    code, _, err = run(capsys, monkeypatch, search, *([] if "--ckpt" in args else ["--ckpt", ckpt]), *args)
    lines = [line for line in err.splitlines() if line.strip() and "problems/s" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and complaint in err, err


@pytest.mark.parametrize("damage,complaint", [
    (lambda f: (f / "model.safetensors").unlink(), "is missing or damaged"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "missing or damaged"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('rs": 1', 'rs": 2')), "do not fit"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    (lambda f: (f / "config.json").write_text("{}"), "is no Llama's"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    (lambda f: (f / "record.json").write_text("[1]"), "record.json cannot be read"),
    (lambda f: (f / "record.json").unlink(), "no dataset at yangxw/countdown-backtracking"),
    (lambda f: (f / "record.json").write_text(json.dumps({"source": str(f / "config.json")})), "data was a file")])
def test_damaged_checkpoints_get_one_line(ckpt, tmp_path, capsys, monkeypatch, damage, complaint):
    folder = tmp_path / "copy"
    shutil.copytree(ckpt, folder)
    damage(folder)
    code, _, err = run(capsys, monkeypatch, search, "--ckpt", folder, "--data", "val", "--num", 2)
    assert code == 2 and len(err.strip().splitlines()) == 1 and complaint in err, err


def test_what_was_saved_survives_a_failure(ckpt, tmp_path, capsys, monkeypatch):
    """A crash while writing, a file in the folder's place, a resume that cannot be: the old files stay as they were."""
    folder = tmp_path / "copy"
    shutil.copytree(ckpt, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "file").write_text("mine")
    for args, complaint in ((("--out", tmp_path / "file"), "cannot write"),
                            (("--out", tmp_path / "new", "--resume"), "no model at"),
                            (("--out", folder, "--data", tmp_path / "file"), "cannot be read")):
        code, _, err = run(capsys, monkeypatch, train, *TRAIN, *args)
        assert code == 2 and complaint in err, err
    monkeypatch.setattr(train, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = run(capsys, monkeypatch, train, *TRAIN, "--out", folder)
    assert code == 2 and "No space left" in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and (tmp_path / "file").read_text() == "mine"


def test_training_says_that_it_cannot_write_before_it_starts(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trained first"))
    assert run(capsys, monkeypatch, train, *TRAIN, "--out", tmp_path / "file")[0] == 2
    assert run(capsys, monkeypatch, data, "--num", 10, "--out", tmp_path / "file")[0] == 2
    assert run(capsys, monkeypatch, data, "--num", 10, "--sizes", 6, "--out", tmp_path / "new")[0] == 2


def test_a_checkpoint_is_fine_tuned_as_in_the_paper(ckpt, tmp_path, capsys, monkeypatch):
    """--ckpt brings the paper's settings, a flag overrules them, improve.py follows; wandb only if asked, one line without."""
    seen = []
    monkeypatch.setattr(train, "fit", lambda model, batches, *rest: seen.append((batches.size, *rest[:5])))
    small = ("--num_eval", 2, "--out", tmp_path / "out")
    for args in (("--ckpt", ckpt), (f"--ckpt={ckpt}", "--lr", "0.5"), ()):
        assert run(capsys, monkeypatch, train, *small, *args)[0] == 0
    assert seen == [(16, 46875, 1e-5, 1, 0.01, False), (16, 46875, 0.5, 1, 0.01, False), (64, 6000, 3e-3, 100, 0.1, True)]
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    code, _, err = run(capsys, monkeypatch, train, *small, "--wandb")
    assert code == 2 and err.strip() == "error: --wandb needs a package that is not installed: pip install wandb"
    monkeypatch.setattr(improve, "fit", lambda *_, muon, **__: seen.append((_[3], muon)))
    monkeypatch.setattr(improve, "harvest", lambda rows, answers: rows)
    for optimizer in ("muon", "adamw"):
        record = {**data.new_record(0, [3]), "settings": {"optimizer": optimizer}}
        (Path(shutil.copytree(ckpt, tmp_path / optimizer)) / "record.json").write_text(json.dumps(record))
        args = ("--num", 2, "--n", 2, "--num_eval", 2, "--rounds", 1, "--out", tmp_path / "better")
        assert run(capsys, monkeypatch, improve, *args, "--ckpt", tmp_path / optimizer)[0] == 0
    assert seen[3:] == [(2e-3, True), (1e-5, False)]
