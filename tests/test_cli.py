"""Every command line at tiny size, and what bad input gets: one line on stderr, exit code 2, and
nothing that was saved is lost."""

import json
import signal
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import improve
import search
import train
from model import Interruptible, Llama, best_dtype, cli, device_rank_world

ROOT = Path(__file__).parent.parent
TINY = "--batch_size 4 --hidden_size 32 --layers 1 --num_eval 2 --eval_every 3".split()
TRAIN = [*TINY, "--steps", "6"]


def run(capsys, monkeypatch, module, *args) -> tuple[int, str, str]:
    """Run a program's command line in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
    capsys.readouterr()
    code = 0
    try:
        cli(module.main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def program(capsys, monkeypatch):
    """program(module, *args) must succeed; it returns what was printed."""

    def succeed(module, *args) -> str:
        code, out, err = run(capsys, monkeypatch, module, *args)
        assert code == 0, err
        return out

    return succeed


@pytest.fixture
def complaint(capsys, monkeypatch):
    """complaint(module, *args) must fail with code 2 and one line; it returns that line."""

    def fail(module, *args) -> str:
        code, _, err = run(capsys, monkeypatch, module, *args)
        lines = [line for line in err.splitlines() if "error: " in line or "Traceback" in line]
        assert code == 2, err
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert err.endswith(lines[0] + "\n")
        return lines[0]

    return fail


def script(name: str, *args, **environment) -> subprocess.CompletedProcess:
    """Run a program as a user does."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    environment = {**os.environ, "NO_COLOR": "1", **environment}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint that train.py wrote. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "small"
    done = script("train.py", *TRAIN, "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder.parent / "printed").write_text(done.stdout)
    return folder


@pytest.fixture
def ckpt(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "ckpt"))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- data.py -------------------------------------------------------------------------------------


def test_data_writes_the_rows_of_a_stream_and_their_record(program, tmp_path):
    folder = tmp_path / "data"
    printed = program(data, "--num", 300, "--num_val", 20, "--sizes", 2, 3, "--out", folder)
    assert "300" in printed
    assert files_of(folder).keys() == {"record.json", "train.jsonl", "val.jsonl", "val_new.jsonl"}
    record = data.new_record(0, [2, 3])
    assert record_of(folder) == record
    for split, num in {"train": 300, "val": 20, "val_new": 20}.items():
        rows = data.read_rows(folder / f"{split}.jsonl")
        assert rows == list(data.generate(record, split, num))


# ---- train.py ------------------------------------------------------------------------------------


def test_show_without_a_number_prints_a_row_of_every_kind(program):
    printed = program(data, "--show")
    kinds = {line for line in printed.splitlines() if line.startswith("D_")}
    expected = {f"D_back, {kind}" for kind in data.KINDS} | {"D_op, solution", "D_op, detour"}
    assert kinds == expected
    assert printed.count("###Question") == len(expected)


def test_training_logs_and_saves(trained):
    log = log_of(trained)
    assert [line["step"] for line in log] == [3, 6]
    assert [line["rows"] for line in log] == [12, 24]
    for line in log:
        assert {"loss", "rows_per_s", "val_loss", "val_new_loss"} <= line.keys()
        assert 0 <= line["val_greedy"] <= 1
    expected = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(trained).keys() == {*expected, "record.json", "resume.pt", "log.jsonl"}


def test_a_checkpoint_remembers_its_data_and_settings(trained):
    record = record_of(trained)
    settings = record.pop("settings")
    assert record == data.new_record(0, [3])
    given = {"steps": 6, "batch_size": 4, "layers": 1, "hidden_size": 32}
    assert settings.items() >= {**train.SCRATCH_FLAGS, **given}.items()


def test_training_ends_with_a_table(trained):
    printed = (trained.parent / "printed").read_text()
    for decoder in ("greedy", "self_backtrack"):
        for split in ("val", "val_new"):
            assert f"{decoder}, {split} " in printed


def test_a_resumed_run_does_only_the_steps_that_are_left(program, no_table, ckpt):
    program(train, *TINY, "--resume", "--out", ckpt, "--steps", 9)
    assert [line["step"] for line in log_of(ckpt)] == [3, 6, 9]


@pytest.fixture
def no_table(monkeypatch) -> None:
    """The table at the end of training takes longer than so little training."""
    monkeypatch.setattr(train, "compare", lambda *args: None)


class Fitted:
    """Stands in for `fit`, and notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, batches, steps, training, **settings):
        self.calls.append({"batches": batches, "steps": steps, **asdict(training), **settings})


@pytest.fixture
def fitted(monkeypatch, no_table) -> Fitted:
    fitted = Fitted()
    monkeypatch.setattr(train, "fit", fitted)
    monkeypatch.setattr(improve, "fit", fitted)
    return fitted


def test_a_run_that_is_over_shows_its_table_once_more(capsys, monkeypatch, ckpt):
    before = files_of(ckpt)
    tables = []
    monkeypatch.setattr(train, "compare", lambda *args: tables.append(args))
    code, _, err = run(capsys, monkeypatch, train, "--resume", "--out", ckpt)
    assert code == 0 and len(tables) == 1
    assert f"note: {ckpt} is at step 6 of 6: increase --steps\n" in err
    assert files_of(ckpt) == before


def test_a_run_of_another_size_cannot_be_resumed(complaint, fitted, ckpt):
    args = ("--resume", "--out", ckpt, "--steps", 9, "--layers", 2)
    assert "has other --hidden_size and --layers: (32, 1)" in complaint(train, *args)


def test_a_run_cannot_be_resumed_by_another_optimizer(complaint, fitted, ckpt):
    args = ("--resume", "--out", ckpt, "--steps", 9, "--optimizer", "adamw")
    assert "was trained by muon" in complaint(train, *args)


def test_a_run_that_saved_no_state_cannot_be_resumed(complaint, fitted, ckpt):
    (ckpt / "resume.pt").unlink()
    assert "cannot resume from" in complaint(train, "--resume", "--out", ckpt, "--steps", 9)


def test_resuming_takes_the_first_runs_settings_but_what_is_given_wins(program, fitted, ckpt):
    state = torch.load(ckpt / "resume.pt", weights_only=True)
    changed = {"optimizer": "muon", "steps": 40, "lr": 0.125, "grad_accum": 2, "seed": 5}
    state["record"]["settings"] |= {
        **train.CKPT_FLAGS,
        "epochs": None,
        **changed,
        "sizes": [2],
        "mistakes": ["exploratory"],
    }
    torch.save(state, ckpt / "resume.pt")
    program(train, "--resume", "--out", ckpt, "--num_eval", 1, "--warmup", 7)
    [call] = fitted.calls
    expected = {"steps": 40, "lr": 0.125, "warmup": 7}
    expected |= {"weight_decay": 0.01, "optimizer": "muon"}
    assert call.items() >= expected.items()
    batches = call["batches"]
    assert (batches.rows_per_step, batches.accum, batches.seed) == (32, 2, 5)
    assert batches.mask == "action"
    stream = {"seed": 5, "sizes": [2], "mistakes": ["exploratory"]}
    assert batches.rows.items() >= stream.items()


def test_a_checkpoint_is_fine_tuned_by_the_papers_settings(program, fitted, ckpt, tmp_path):
    program(train, "--ckpt", ckpt, "--num_eval", 2, "--out", tmp_path / "out")
    [call] = fitted.calls
    expected = {"steps": 93750, "lr": 1e-5, "warmup": 1}
    expected |= {"weight_decay": 0.01, "optimizer": "adamw"}
    assert call.items() >= expected.items()
    assert call["batches"].rows_per_step == 16
    assert call["batches"].mask == "action"


def test_a_flag_overrules_the_papers_settings(program, fitted, ckpt, tmp_path):
    program(train, f"--ckpt={ckpt}", "--lr", 0.5, "--num_eval", 2, "--out", tmp_path / "out")
    assert fitted.calls[0].items() >= {"steps": 93750, "lr": 0.5, "optimizer": "adamw"}.items()


def test_epochs_with_a_checkpoint_are_of_as_many_rows_as_asked(program, fitted, ckpt, tmp_path):
    """Three epochs are the paper's; 16 rows a step."""
    flags = ("--num_train", 800, "--num_eval", 2)
    program(train, f"--ckpt={ckpt}", *flags, "--out", tmp_path / "out")
    assert fitted.calls[0]["steps"] == 150


def test_a_model_from_scratch_has_settings_of_its_own(program, fitted, tmp_path):
    program(train, "--num_eval", 2, "--out", tmp_path / "out")
    [call] = fitted.calls
    expected = {"steps": 6000, "lr": 3e-3, "warmup": 100}
    expected |= {"weight_decay": 0.1, "optimizer": "muon"}
    assert call.items() >= expected.items()
    assert call["batches"].rows_per_step == 64
    assert call["batches"].mask == "choice"


def test_flags_reach_the_loop(program, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: name)  # as if there were a compiler
    flags = "--dtype bf16 --compile --optimizer adamw --grad_accum 3 --eval_every 7 --mistakes"
    program(train, *flags.split(), "--num_eval", 2, "--out", tmp_path / "out")
    [call] = fitted.calls
    expected = {"dtype": torch.bfloat16, "compiled": True, "optimizer": "adamw", "report_every": 7}
    assert call.items() >= expected.items()
    assert call["batches"].rows_per_step == 3 * 64
    assert call["batches"].rows["mistakes"] == []


def test_the_record_tells_the_size_of_the_model_not_of_the_defaults(
    program, no_table, ckpt, tmp_path
):
    args = "--batch_size 4 --num_eval 2 --steps 2".split()
    program(train, "--ckpt", ckpt, *args, "--out", tmp_path / "out")
    settings = record_of(tmp_path / "out")["settings"]
    assert (settings["layers"], settings["hidden_size"]) == (1, 32)


def test_wandb_is_asked_for_only_where_it_is_wanted(complaint, monkeypatch, fitted, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = complaint(train, "--wandb", "--num_eval", 2, "--out", tmp_path / "out")
    assert line == "error: --wandb needs a package that is not installed: pip install wandb"
    assert fitted.calls == []


def test_training_says_that_it_cannot_write_before_it_starts(complaint, fitted, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in complaint(train, *TRAIN, "--out", tmp_path / "file")
    assert fitted.calls == []
    assert (tmp_path / "file").read_text() == "mine"


# ---- From data to improvement --------------------------------------------------------------------


@pytest.fixture
def dataset(program, tmp_path) -> Path:
    folder = tmp_path / "data"
    program(data, "--num", 100, "--num_val", 8, "--sizes", 2, 3, "--out", folder)
    return folder


def test_training_on_a_folder_of_data(program, no_table, dataset, tmp_path):
    out = tmp_path / "out"
    program(train, *TRAIN, "--data", dataset, "--out", out)
    record = record_of(out)
    assert record.pop("settings")["data"] == str(dataset)
    assert record == data.new_record(0, [2, 3])
    program(train, *TINY, "--resume", "--out", out, "--steps", 7)
    assert record_of(out)["settings"]["data"] == str(dataset)
    assert log_of(out)[-1]["step"] == 7


def test_training_on_a_file_of_rows(program, dataset, tmp_path):
    """It has no validation problems, so that none are measured."""
    out = tmp_path / "out"
    file = dataset / "train.jsonl"
    program(train, *TRAIN, "--data", file, "--out", out)
    assert record_of(out)["source"] == str(file)
    program(train, *TINY, "--resume", "--out", out, "--steps", 7)
    assert record_of(out)["source"] == str(file)
    assert log_of(out)[-1].keys() == {"step", "rows", "loss", "rows_per_s"}


def test_a_checkpoint_of_a_file_works_from_another_folder(
    program, searched, dataset, tmp_path, capsys, monkeypatch
):
    """It draws its tree and says why there is no table; it can be improved."""
    out = tmp_path / "out"
    monkeypatch.chdir(dataset)
    program(train, *TRAIN, "--data", "train.jsonl", "--out", out)
    monkeypatch.chdir("/")
    flags = ("--n", 2, "--max_new_tokens", 9)
    code, printed, err = run(capsys, monkeypatch, search, "--ckpt", out, *flags)
    assert (code, printed[:8]) == (0, "numbers ")
    assert err == f"note: no table, because {dataset}/train.jsonl has no validation splits\n"
    program(improve, *IMPROVE, "--ckpt", out, "--out", tmp_path / "better", "--rounds", 1)
    assert searched == [data.read_rows(dataset / "train.jsonl")[:12]]
    program(train, *TINY, "--resume", "--out", out, "--steps", 7)


def test_improvement_on_problems_of_a_file(program, monkeypatch, dataset, ckpt, tmp_path):
    """Problems alone are enough; the checkpoint's own are not touched."""
    rows = data.read_rows(dataset / "val.jsonl")
    problems = [{"nums": row["nums"], "target": row["target"]} for row in rows]
    file = tmp_path / "problems.json"
    file.write_text(json.dumps(problems))
    searched = []
    monkeypatch.setattr(improve, "solved_rows", lambda found, _: searched.append(found) or rows)
    args = ("--ckpt", ckpt, "--data", file, "--out", tmp_path / "better", "--rounds", 1)
    program(improve, *IMPROVE, *args)
    assert searched == [problems]


def test_training_on_a_folder_measures_on_what_it_holds(
    program, monkeypatch, fitted, dataset, tmp_path
):
    rows = turn_around(dataset / "val.jsonl")
    measured = []
    monkeypatch.setattr(train, "compare", lambda *given: measured.append(given[2]))
    args = ("--data", dataset, "--num_eval", 5, "--out", tmp_path / "out")
    program(train, *TINY, *args)
    assert [validation["val"] for validation in measured] == [rows[:5]]


def test_a_run_that_goes_on_with_other_batches_says_so(capsys, monkeypatch, no_table, ckpt):
    args = ("--resume", "--out", ckpt, "--no-gradient_checkpointing", "--steps")
    assert run(capsys, monkeypatch, train, *args, 8)[2] == ""
    code, _, err = run(capsys, monkeypatch, train, *args, 9, "--batch_size", 2)
    assert code == 0 and "note: 2 rows a step, not as many as before" in err


def test_a_run_that_goes_on_with_another_model_is_told(
    capsys, monkeypatch, no_table, searched, ckpt, tmp_path
):
    out = tmp_path / "better"
    run(capsys, monkeypatch, improve, *IMPROVE, "--ckpt", ckpt, "--out", out, "--rounds", 1)
    for module, args in ((improve, ("--out", out, "--rounds", 2)), (train, ("--out", ckpt))):
        code, _, err = run(capsys, monkeypatch, module, "--resume", *args, "--ckpt", ckpt)
        assert code == 0 and "--ckpt has no effect" in err


def test_an_improvement_that_goes_on_is_told_nothing_where_there_is_a_checkpoint(
    capsys, monkeypatch, searched, ckpt, tmp_path
):
    """A folder of the name that --ckpt has by default."""
    shutil.copytree(ckpt, tmp_path / "here" / "checkpoint")
    monkeypatch.chdir(tmp_path / "here")
    run(capsys, monkeypatch, improve, *IMPROVE, "--rounds", 1)
    assert run(capsys, monkeypatch, improve, "--resume", "--rounds", 2)[2] == ""


def test_an_improvement_that_begins_anew_says_what_it_replaces(
    capsys, monkeypatch, searched, ckpt, tmp_path
):
    args = (*IMPROVE, "--ckpt", ckpt, "--out", tmp_path / "better", "--rounds", 1)
    for expected in (False, True):
        code, _, err = run(capsys, monkeypatch, improve, *args)
        assert code == 0 and ("will replace the run in" in err) == expected


@pytest.mark.parametrize("flags", [["--num_train", 30], ["--num_train", 1000], []])
def test_epochs_are_counted_in_rows_and_rows_are_drawn(program, fitted, dataset, tmp_path, flags):
    """100 rows, 4 a step."""
    args = ("--data", dataset, "--out", tmp_path / "out", "--epochs", 3, *flags)
    program(train, *TINY, *args)
    [call] = fitted.calls
    kept = call["batches"].rows
    rows = data.read_rows(dataset / "train.jsonl")
    assert len(kept) == (30 if 30 in flags else 100)
    assert kept != rows[:30]
    assert all(row in rows for row in kept)
    assert call["steps"] == -(-3 * len(kept) // 4)


@pytest.fixture
def searched(monkeypatch) -> list[list[dict]]:
    """The problems of each round of improve.py, all of which are taken for solved: so small a model
    solves none."""
    rounds = []

    def solved_rows(rows, answers):
        rounds.append(rows)
        return rows

    monkeypatch.setattr(improve, "solved_rows", solved_rows)
    return rounds


IMPROVE = "--num 12 --n 2 --num_eval 2 --batch_size 4".split()


def test_improvement_logs_and_saves(program, searched, ckpt, tmp_path):
    out = tmp_path / "better"
    printed = program(improve, *IMPROVE, "--ckpt", ckpt, "--out", out, "--rounds", 2)
    for title in ("before", "round 1", "round 2"):
        assert title in printed
    log = log_of(out)
    assert len(log) == 3
    for line in log:
        for split in ("val", "val_new"):
            assert {f"{split}_greedy", f"{split}_self_backtrack"} <= line.keys()
    weights = (out / "model.safetensors").read_bytes()
    assert weights != (ckpt / "model.safetensors").read_bytes()


def test_improvement_goes_on_after_its_last_round(program, searched, ckpt, tmp_path):
    """To the same weights and the same log as without a stop, and by the same settings."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    program(improve, *IMPROVE, "--ckpt", ckpt, "--out", once, "--rounds", 2, "--seed", 3)
    program(improve, *IMPROVE, "--ckpt", ckpt, "--out", twice, "--rounds", 1, "--seed", 3)
    program(improve, "--out", twice, "--resume", "--rounds", 2)
    assert searched[:2] == searched[2:]
    assert log_of(once) == log_of(twice)
    assert record_of(once) == record_of(twice)
    weights = [load_file(folder / "model.safetensors") for folder in (once, twice)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_improvement_that_is_over_changes_nothing(complaint, program, searched, ckpt, tmp_path):
    args = ("--out", tmp_path / "better", "--rounds", 1)
    program(improve, *IMPROVE, "--ckpt", ckpt, *args)
    before = files_of(tmp_path / "better")
    program(improve, *args, "--resume")
    assert files_of(tmp_path / "better") == before
    assert "no run of this program" in complaint(train, "--out", tmp_path / "better", "--resume")


def test_a_round_is_saved_before_it_is_measured(program, searched, ckpt, tmp_path, monkeypatch):
    """Who is stopped in the table loses no search; the table is made when it goes on."""
    args = ("--ckpt", ckpt, "--out", tmp_path / "better", "--rounds", 1)
    measure = improve.measure
    measured = []

    def stop(*given):
        measured.append(given[-1])
        if measured == [0, 1]:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(improve, "measure", stop)
    with pytest.raises(AssertionError, match="stopped by SIGINT"):
        program(improve, *IMPROVE, *args)
    program(improve, *args, "--resume")
    assert measured == [0, 1, 1]
    assert len(searched) == 1
    assert [line["round"] for line in log_of(tmp_path / "better")] == [0, 1]


def test_improvement_on_few_problems_begins_anew_at_their_end(
    program, searched, dataset, ckpt, tmp_path
):
    """100 rows, 60 a round."""
    args = ("--ckpt", ckpt, "--data", dataset / "train.jsonl", "--out", tmp_path / "better")
    program(improve, *IMPROVE, "--num", 60, *args, "--rounds", 3)
    rows = data.read_rows(dataset / "train.jsonl")
    assert searched == [rows[:60], rows[60:], rows[20:80]]


def test_improvement_searches_fresh_rows_in_every_round(program, searched, ckpt, tmp_path):
    """Those of a stream that training never drew, one after the other."""
    program(improve, *IMPROVE, "--ckpt", ckpt, "--out", tmp_path / "better", "--rounds", 2)
    stream = list(data.generate(data.new_record(1_000_000, [3]), "train", 24))
    assert searched == [stream[:12], stream[12:]]
    assert record_of(tmp_path / "better")["seed"] == 1_000_000


def test_improvement_that_goes_on_searches_other_rows(program, searched, ckpt, tmp_path):
    for source, target in (("ckpt", "better"), ("better", "best")):
        args = ("--ckpt", tmp_path / source, "--out", tmp_path / target, "--rounds", 1)
        program(improve, *IMPROVE, *args)
    first, second = searched
    assert not any(row in first for row in second)


def test_improvement_of_a_checkpoint_of_a_dataset(program, no_table, searched, dataset, tmp_path):
    """It searches the dataset's training rows."""
    out = tmp_path / "out"
    record = {"source": str(dataset)}
    program(train, *TRAIN, "--data", dataset, "--out", out)
    (out / "record.json").write_text(json.dumps(record))
    program(improve, *IMPROVE, "--ckpt", out, "--out", tmp_path / "better", "--rounds", 1)
    assert searched == [data.read_rows(dataset / "train.jsonl")[:12]]


def test_improvement_on_a_folder_of_data(program, no_table, searched, dataset, ckpt, tmp_path):
    """It searches the rows that the folder holds."""
    rows = turn_around(dataset / "train.jsonl")
    out = tmp_path / "better"
    program(improve, *IMPROVE, "--ckpt", ckpt, "--data", dataset, "--out", out, "--rounds", 2)
    assert searched == [rows[:12], rows[12:24]]
    assert record_of(out)["source"] == "generated"  # where the model is measured, as before
    program(improve, "--out", out, "--resume", "--rounds", 3)
    assert searched[2] == rows[24:36]


@pytest.mark.parametrize("optimizer,lr", [("muon", 2e-4), ("adamw", 1e-5)])
def test_improvement_trains_as_its_checkpoint_was_trained(
    program, fitted, searched, ckpt, tmp_path, optimizer, lr
):
    record = record_of(ckpt)
    record["settings"] |= {"optimizer": optimizer, "mask": "none"}
    (ckpt / "record.json").write_text(json.dumps(record))
    program(improve, *IMPROVE, "--ckpt", ckpt, "--out", tmp_path / "better", "--rounds", 1)
    [call] = fitted.calls
    expected = {"lr": lr, "optimizer": optimizer, "weight_decay": 0.0, "warmup": 10}
    expected["dtype"] = best_dtype(device_rank_world()[0])
    assert call.items() >= expected.items()
    assert call["batches"].mask == "none"
    kept = len(call["batches"].rows)
    assert call["steps"] == -(-kept * 3 // 4)  # three epochs of batches of four


def test_rows_of_each_round_come_in_an_order_of_their_own(
    program, fitted, searched, ckpt, tmp_path
):
    args = ("--ckpt", ckpt, "--out", tmp_path / "better", "--rounds", 2, "--seed", 3)
    program(improve, *IMPROVE, *args)
    assert [call["batches"].seed for call in fitted.calls] == [4, 5]


def test_improvement_that_solves_nothing_says_so(complaint, ckpt, tmp_path):
    args = ("--ckpt", ckpt, "--out", tmp_path / "better", *IMPROVE)
    assert "solved nothing" in complaint(improve, *args)
    assert not (tmp_path / "better" / "model.safetensors").exists()


# ---- search.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", search.DECODERS)
def test_search_writes_a_line_a_problem(program, trained, tmp_path, decoder):
    out = tmp_path / "rows.jsonl"
    args = f"--data val_new --num 5 --offset 2 --decoder {decoder} --n 3 --max_new_tokens 12"
    printed = program(search, "--ckpt", trained, *args.split(), "--out", out)
    assert f"{decoder}, val_new" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert {"response", "score", "correct", "reason", "verified", "tokens"} <= row.keys()
    problems = list(data.generate(data.new_record(0, [3]), "val_new", 7))[2:]
    expected = [(problem["nums"], problem["target"]) for problem in problems]
    assert [(row["nums"], row["target"]) for row in rows] == expected


EVALUATION = "--data val_new --num 6 --offset 2 --decoder greedy --max_new_tokens 12".split()


@pytest.mark.parametrize("torn", ["", '{"number": 5, "nu'])
def test_who_is_stopped_goes_on_where_the_file_of_answers_ends(
    program, trained, tmp_path, capsys, monkeypatch, torn
):
    """No answer is lost or doubled, not even with half a line at the end of the file."""
    whole = tmp_path / "whole.jsonl"
    program(search, "--ckpt", trained, *EVALUATION, "--out", whole)
    out = tmp_path / "rows.jsonl"
    out.write_text("an older file\n")
    judge = search.judge
    judged = []

    def stop_at_the_fourth(*given):
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append(given)
        return judge(*given)

    monkeypatch.setattr(search, "judge", stop_at_the_fourth)
    args = ("--ckpt", trained, *EVALUATION, "--out", out)
    code, _, err = run(capsys, monkeypatch, search, *args)
    assert (code, err.splitlines()[-1]) == (130, "stopped by SIGINT")
    part = tmp_path / "rows.jsonl.part"
    assert len(part.read_text().splitlines()) == 1 + 3  # the settings, and the answers
    assert out.read_text() == "an older file\n"

    part.write_text(part.read_text() + torn)
    monkeypatch.setattr(search, "judge", lambda *given: judged.append(given) or judge(*given))
    program(search, *args, "--resume")
    assert len(judged) == 6
    assert out.read_text() == whole.read_text()
    assert not part.exists()


@pytest.fixture
def stopped_evaluation(trained, tmp_path, monkeypatch, capsys) -> tuple:
    """The command line of an evaluation that was stopped before its first answer."""

    def stop(*given):
        raise KeyboardInterrupt

    args = ("--ckpt", trained, *EVALUATION, "--out", tmp_path / "rows.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(search, "judge", stop)
        run(capsys, patch, search, *args)
    return args


@pytest.mark.parametrize(
    "line,expected",
    [
        ('{"number": 2}', "lacks correct"),
        ("3", "is no answer"),
        ("[", "is no answer"),
        ('{ANSWERS, "correct": true, "verified": true, "tokens": 1}', "other problems"),
        ('{ANSWERS, "correct": null, "verified": true, "tokens": 1}', "must be true or false"),
        ("\udcff", "is no answer"),
    ],
)
def test_a_file_of_other_answers_is_not_gone_on_with(
    complaint, tmp_path, stopped_evaluation, line, expected
):
    args = stopped_evaluation
    with open(tmp_path / "rows.jsonl.part", "a", errors="surrogateescape") as part:
        part.write(line.replace("ANSWERS", '"number": 2, "nums": [1], "target": 1') + "\n")
    assert expected in complaint(search, *args, "--resume")


def test_answers_that_were_not_gone_on_with_are_not_thrown_away(
    complaint,
    program,
    tmp_path,
    stopped_evaluation,
):
    args = stopped_evaluation
    assert "from a stopped run" in complaint(search, *args)
    (tmp_path / "rows.jsonl.part").write_text("")  # a disk was full: nothing is lost
    program(search, *args)
    assert "is complete" in complaint(search, *args, "--resume")


@pytest.mark.parametrize("flags", [["--decoder", "beam"], ["--max_new_tokens", "9"]])
def test_answers_of_other_settings_are_not_gone_on_with(
    complaint, program, tmp_path, stopped_evaluation, flags
):
    args = stopped_evaluation
    name = flags[0].removeprefix("--")
    assert f"other settings: {name}" in complaint(search, *args, *flags, "--resume")
    program(search, *args, "--batch_size", 1, "--resume")  # which changes no answer


def test_a_setting_that_is_no_more_is_named(complaint, tmp_path, stopped_evaluation):
    """As an older version may have written it."""
    part = tmp_path / "rows.jsonl.part"
    made_by, *answers = part.read_text().splitlines(keepends=True)
    part.write_text("".join([json.dumps({**json.loads(made_by), "old": 2}) + "\n", *answers]))
    assert complaint(search, *stopped_evaluation, "--resume").endswith("other settings: old")


def test_answers_of_another_checkpoint_are_not_gone_on_with(
    complaint, tmp_path, trained, stopped_evaluation
):
    """Nor those of weights that have been replaced."""
    other = shutil.copytree(trained, tmp_path / "other")
    args = [*stopped_evaluation, "--ckpt", other, "--resume"]
    message = complaint(search, *args)
    assert message.endswith("other settings: ckpt")
    model = Llama.from_pretrained(other)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(other)
    assert "other settings: ckpt, weights" in complaint(search, *args)


def turn_around(file: Path) -> list[dict]:
    """Its rows, the last one first: then they are not those that the folder's record gives."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    return data.read_rows(file)


def test_search_takes_problems_of_a_file_and_of_a_dataset(program, trained, dataset, tmp_path):
    rows = turn_around(dataset / "val.jsonl")
    file = tmp_path / "problems.jsonl"
    file.write_text('{"nums": [3, 4], "target": 7}\n{"nums": [5, 4], "target": 20}\n')
    nums = [row["nums"] for row in rows]
    for source, expected in ((file, [[3, 4], [5, 4]]), (f"{dataset}:val", nums)):
        out = tmp_path / "rows.jsonl"
        program(search, "--ckpt", trained, "--data", source, "--n", 2, "--num", 8, "--out", out)
        assert [json.loads(line)["nums"] for line in out.read_text().splitlines()] == expected


def test_search_draws_the_tree_of_a_problem(program, trained):
    args = "--numbers 3 5 7 --target 22 --n 4".split()
    printed = program(search, "--ckpt", trained, *args)
    assert printed.startswith("numbers [3, 5, 7]  target 22")
    assert "\033" not in printed  # no colours where no terminal is


def test_search_shows_a_problem_of_a_size_that_the_model_knows(program, trained):
    """It has been trained on three numbers."""
    printed = program(search, "--ckpt", trained, "--num", 1, "--n", 2)
    [first] = data.generate(data.new_record(0, [3]), "val_new", 1)
    assert printed.startswith(f"numbers {first['nums']}  target {first['target']}")


def test_search_without_arguments_shows_a_tree_and_a_table_in_100_columns():
    """The shipped checkpoint, from another folder."""
    done = script("search.py", "--num", 4)
    assert done.returncode == 0, done.stderr
    assert "target" in done.stdout and ", selected" in done.stdout
    assert "self_backtrack, val_new" in done.stdout
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 100


def test_a_measurement_that_was_stopped_goes_on(trained, tmp_path):
    out = tmp_path / "lines.jsonl"
    command = ["assets/measure.py", "--ckpt", trained, "--num", 2, "--lines", "greedy", "beam"]
    assert script(*command, "--out", out).returncode == 0
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    kept = {**whole[2], "seconds": -1.0}
    dtype = str(best_dtype(device_rank_world()[0]))
    made_by = json.dumps([str(trained), 2, 300, ["greedy", "beam"], dtype]) + "\n"
    Path(f"{out}.part").write_text(made_by + json.dumps([2, kept]) + "\n" + '[3, {"deco')
    other = script(*command[:3], *command[5:], "--num", 3, "--out", out, "--resume")
    assert (other.returncode, "is of another command or dtype" in other.stderr) == (2, True)
    assert script(*command, "--out", out, "--resume").returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["seconds"] < 0 for line in lines] == [False, False, True, False]
    for line in whole + lines:
        del line["seconds"]
    assert lines == whole
    assert not list(tmp_path.glob("*.part"))


def test_a_reader_who_leaves_causes_no_traceback(trained):
    args = ["--ckpt", str(trained), "--numbers", "3", "4", "--target", "7", "--n", "1"]
    program = subprocess.Popen(
        [sys.executable, ROOT / "search.py", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    program.stdout.close()
    assert "Traceback" not in program.stderr.read()
    assert program.wait() == 1


@pytest.mark.parametrize(
    "flags,changed",
    [
        ([], {}),
        (["--no-proportional", "--no-last_line"], {"proportional": False, "last_line": False}),
        (["--independent"], {"independent": True}),
        (["--paper"], search.PAPER_SEARCH),
        (["--last_line", "--paper"], {**search.PAPER_SEARCH, "last_line": True}),
    ],
)
def test_each_of_our_rules_has_a_flag(monkeypatch, flags, changed):
    monkeypatch.setattr(sys, "argv", ["search.py", *flags])
    options = search.arguments()
    expected = {**asdict(search.Settings()), **changed}
    assert {name: getattr(options, name) for name in expected} == expected


# ---- Bad input -----------------------------------------------------------------------------------

BAD_SEARCHES = [
    ("--n 0", "--n: 0 is not at least 1"),
    ("--b -1", "--b: -1 is not at least 0"),
    ("--n x", "--n: invalid whole number value: 'x'"),
    ("--decoder x", "invalid choice: 'x'"),
    ("--min_p 2", "--min_p is a share, so at most 1, not 2"),
    ("--top_p 1.5", "--top_p is a share, so at most 1, not 1.5"),
    ("--top_k -1", "--top_k: -1 is not at least 0"),
    ("--temperature 0", "--temperature: 0 is not at least 0.001"),
    ("--temperature -1", "not at least 0.001"),
    ("--temperature nan", "not at least"),
    ("--temperature inf", "too large"),
    ("--cache_gib 0", "--cache_gib: 0 is not above 0"),
    ("--cache_gib 1e-9", "the cache is too small"),
    ("--cache_gib 1e-5", "the cache is too small"),
    ("--seed 99999999999999999999", "too large"),
    ("--numbers 3 0 --target 9", "--numbers: 0 is not at least 1"),
    ("--numbers 3 -4 --target 9", "-4 is not at least 1"),
    ("--numbers 3 4 --target 9.5", "--target: invalid whole number value: '9.5'"),
    ("--numbers 3 4", "--numbers and --target"),
    ("--target 9", "--numbers and --target"),
    ("--numbers 3 4 --target 7 --data val", "--numbers and --target"),
    ("--data nosuchsplit", "nosuchsplit is none of them"),
    ("--ckpt no/such", "no model at no/such"),
    ("--ckpt checkpoint", "no such file or folder: checkpoint (train.py makes"),
    ("--ckpt /no/such/folder", "no such file or folder: /no/such/folder"),
    ("--ckpt {tmp}/empty", "cannot be read"),
    ("--data val --out /proc/no/rows.jsonl --num 1 --n 1", "/proc/no"),
    ("--data val --out {tmp}", "--out wants a file"),
    ("--data val --out {tmp}/pipe", "--out wants a file"),
    ("--data :val", ":val is none of them"),
    ("--data :train", ":train is none of them"),
    ("--out {tmp}/x", "--out wants a file"),
    ("--html {tmp}", "--html wants a file"),
    ("--html {tmp}/x --data val", "--html wants a file, and goes without --data"),
    ("--html /proc/no/page.html --n 1", "/proc/no"),
    ("--data {tmp}/rows.jsonl", "rows.jsonl, line 2 cannot be read"),
    ("--data {tmp}/column.jsonl", "row 1 lacks the column target"),
    ("--data {tmp}/none.jsonl", "holds no rows"),
    ("--data {tmp}/list.jsonl", "holds no rows"),
    ("--data {tmp}/zero.jsonl", "nums must be positive whole numbers"),
    ("--data {tmp}/half.jsonl", "target must be a whole number"),
    ("--data {tmp}/good.jsonl --offset 1", "has no row number 1"),
]
FILES = {
    "rows": '{"nums": [3], "target": 3}\n{"nums": [3], "tar',
    "column": '{"nums": [3, 4]}',
    "none": "",
    "list": "[]",
    "zero": '{"nums": [3, 0], "target": 3}',
    "half": '{"nums": [3, 1], "target": 3.5}',
    "good": '{"nums": [3, 4], "target": 7}',
}


@pytest.fixture
def bad_files(tmp_path) -> Path:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, text in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("args,expected", BAD_SEARCHES)
def test_bad_input_to_search_gets_one_line(complaint, trained, bad_files, args, expected):
    args = args.format(tmp=bad_files).split()
    if "--ckpt" not in args:
        args += ["--ckpt", trained]
    assert expected in complaint(search, *args)


BAD_TRAININGS = [
    ("--steps 0", "--steps: 0 is not at least 1"),
    ("--batch_size x", "--batch_size: invalid whole number value: 'x'"),
    ("--lr 0", "--lr: 0 is not above 0"),
    ("--weight_decay -1", "-1 is not at least 0"),
    ("--hidden_size 31", "31 is not at least 32"),
    ("--layers 0", "--layers: 0 is not at least 1"),
    ("--sizes 1", "--sizes: invalid choice: 1"),
    ("--mistakes x", "--mistakes: invalid choice: 'x'"),
    ("--mask x", "--mask: invalid choice: 'x'"),
    ("--any_target 2", "--any_target is a share, so at most 1, not 2.0"),
    ("--optimizer sgd", "--optimizer: invalid choice: 'sgd'"),
    ("--dtype fp8", "--dtype: invalid choice: 'fp8'"),
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--ckpt {tmp}/empty --layers 2", "of a model from scratch"),
    ("--ckpt {tmp}/empty", "cannot be read"),
    ("--data {tmp}/none.jsonl", "holds no rows"),
    ("--data {tmp}/good.jsonl", "row 1 lacks the column search_path"),
    ("--data {tmp}/empty", "holds no JSON with 'train' in its name"),
    ("--data no/such", "no dataset at no/such"),
    ("--epochs 2", "--epochs of generated rows, which never end, wants --num_train"),
    ("--num_train 9", "--num_train is of --data, or says how many rows --epochs are of"),
    ("--steps 2 --epochs 1 --num_train 80", "--steps and --epochs both"),
    ("--data {tmp}/good.jsonl --sizes 3", "of generated rows, not --data's"),
    ("--data {tmp}/good.jsonl --any_target 7", "of generated rows, not --data's"),
    ("--resume --out {tmp}/new", "cannot resume from"),
    ("--resume --out {tmp}/empty", "cannot resume from"),
]


@pytest.mark.parametrize("args,expected", BAD_TRAININGS)
def test_bad_input_to_training_gets_one_line(complaint, fitted, bad_files, args, expected):
    args = args.format(tmp=bad_files).split()
    if "--out" not in args:
        args += ["--out", bad_files / "out"]
    assert expected in complaint(train, *args)
    assert fitted.calls == []


def test_a_compiler_is_looked_for_before_the_first_step(complaint, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    assert "wants a C++ compiler" in complaint(train, "--compile", "--out", tmp_path / "out")
    assert fitted.calls == []


def test_ranks_that_torchrun_has_not_started_get_one_line(complaint, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "started by torchrun" in complaint(train, "--out", tmp_path / "out")


@pytest.mark.parametrize("module", [search, train, improve, data])
def test_help_fits_a_screen_and_says_no_default_that_is_none(monkeypatch, capsys, module):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 100
    text = " ".join(lines)
    assert "default: None" not in text and "default: False" not in text
    assert "(default: " in text


def test_improvement_asks_for_training_first(complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder: checkpoint (train.py makes" in complaint(improve)


BAD_DATA = [
    ("--num 0", "--num: 0 is not at least 1"),
    ("--sizes 6", "--sizes: invalid choice: 6"),
    ("--seed -1", "-1 is not at least 0"),
    ("--num 10 --out {tmp}/good.jsonl", "cannot write"),
]


@pytest.mark.parametrize("args,expected", BAD_DATA)
def test_bad_input_to_data_gets_one_line(complaint, bad_files, args, expected):
    assert expected in complaint(data, *args.format(tmp=bad_files).split())
    assert (bad_files / "good.jsonl").read_text() == FILES["good"]


BAD_IMPROVEMENTS = [
    ("--rounds 0", "--rounds: 0 is not at least 1"),
    ("--lr 0", "--lr: 0 is not above 0"),
    ("--ckpt no/such", "no model at no/such"),
    ("--ckpt checkpoint", "no such file or folder: checkpoint (train.py makes"),
    ("--out {tmp}/good.jsonl", "cannot write"),
]


@pytest.mark.parametrize("args,expected", BAD_IMPROVEMENTS)
def test_bad_input_to_improvement_gets_one_line(complaint, trained, bad_files, args, expected):
    args = args.format(tmp=bad_files).split()
    if "--ckpt" not in args:
        args += ["--ckpt", trained]
    assert expected in complaint(improve, *args)


# ---- Damage --------------------------------------------------------------------------------------


def take_away(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def writing(text: str):
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def add_a_layer(path: Path) -> None:
    config = json.loads(path.read_text())
    config["num_hidden_layers"] += 1
    path.write_text(json.dumps(config))


def name_a_file_as_source(path: Path) -> None:
    path.write_text(json.dumps({"source": str(path)}))


DAMAGES = [
    ("model.safetensors", take_away, "is missing"),
    ("model.safetensors", cut_off, "is damaged"),
    ("config.json", add_a_layer, "do not fit"),
    ("config.json", writing("{"), "cannot be read"),
    ("config.json", writing("{}"), "lacks hidden_size"),
    ("tokenizer.json", writing("{}"), "tokenizer.json cannot be read"),
    ("tokenizer.json", take_away, "tokenizer.json cannot be read"),
    ("tokenizer_config.json", writing("[1]"), "tokenizer_config.json cannot be read"),
    ("record.json", writing("[1]"), "record.json cannot be read"),
    ("record.json", take_away, "no dataset at yangxw/countdown-backtracking"),
    ("record.json", name_a_file_as_source, "data was the file"),
]


@pytest.mark.parametrize("name,damage,expected", DAMAGES)
def test_damaged_checkpoints_get_one_line(complaint, ckpt, name, damage, expected):
    damage(ckpt / name)
    assert expected in complaint(search, "--ckpt", ckpt, "--data", "val", "--num", 2)


def no_space(*args, **settings):
    raise OSError(28, "No space left on device")


def test_a_failure_while_saving_leaves_the_old_files(complaint, monkeypatch, ckpt):
    before = files_of(ckpt)
    monkeypatch.setattr(torch, "save", no_space)
    assert "No space left" in complaint(train, *TRAIN, "--out", ckpt)
    assert files_of(ckpt) == before


def test_a_failure_while_writing_rows_leaves_the_old_files(complaint, monkeypatch, dataset):
    before = files_of(dataset)
    monkeypatch.setattr(data, "tqdm", no_space)
    assert "No space left" in complaint(data, "--num", 10, "--out", dataset)
    assert files_of(dataset) == before


def test_damaged_rows_cost_no_checkpoint(complaint, ckpt, bad_files):
    before = files_of(ckpt)
    args = (*TRAIN, "--out", ckpt, "--data", bad_files / "rows.jsonl")
    assert "cannot be read" in complaint(train, *args)
    assert files_of(ckpt) == before


def test_a_resume_that_cannot_be_costs_no_checkpoint(complaint, ckpt):
    cut_off(ckpt / "resume.pt")
    before = files_of(ckpt)
    assert "cannot resume from" in complaint(train, "--resume", "--out", ckpt, "--steps", 9)
    assert files_of(ckpt) == before


@pytest.mark.parametrize(
    "entry,value", [("step", "3"), ("record", None), ("log", {}), ("log", [1])]
)
def test_a_resume_file_of_other_content_is_refused(complaint, fitted, ckpt, entry, value):
    state = torch.load(ckpt / "resume.pt", weights_only=True)
    torch.save({**state, entry: value}, ckpt / "resume.pt")
    assert f"{entry} must be" in complaint(train, "--resume", "--out", ckpt, "--steps", 9)


@pytest.mark.parametrize(
    "name,value", [("lr", "x"), ("batch_size", 0), ("unheard", 3), ("steps", -1)]
)
def test_settings_of_a_resume_file_are_checked_as_flags_are(complaint, fitted, ckpt, name, value):
    state = torch.load(ckpt / "resume.pt", weights_only=True)
    state["record"]["settings"][name] = value
    torch.save(state, ckpt / "resume.pt")
    assert name in complaint(train, "--resume", "--out", ckpt)
    assert fitted.calls == []


def test_a_run_into_a_folder_that_holds_another_begins_a_new_log(program, no_table, ckpt):
    program(train, *TRAIN, "--out", ckpt, "--eval_every", 2)
    assert [line["step"] for line in log_of(ckpt)] == [2, 4, 6]


def test_a_folder_that_is_removed_meanwhile_is_made_anew(program, no_table, monkeypatch, tmp_path):
    measure = train.Reporter.measure

    def remove(*given):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return measure(*given)

    monkeypatch.setattr(train.Reporter, "measure", remove)
    program(train, *TRAIN, "--out", tmp_path / "out")
    assert [line["step"] for line in log_of(tmp_path / "out")] == [3, 6]


def test_an_error_of_the_disk_is_one_line(complaint, fitted, monkeypatch, tmp_path):
    """Wherever it comes from; here from a rank that saves nothing."""
    monkeypatch.setattr(train, "fit", no_space)
    assert "No space left" in complaint(train, "--num_eval", 2, "--out", tmp_path / "out")


# ---- Signals -------------------------------------------------------------------------------------


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number,code", STOPS)
def test_who_is_stopped_says_so_in_one_line(capsys, number, code):
    before = [signal.getsignal(other) for other, _ in STOPS]
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: signal.raise_signal(number))
    assert [signal.getsignal(other) for other, _ in STOPS] == before
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


def test_a_signal_that_was_ignored_stays_ignored():
    """As nohup wants it of a closed terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    steps = Interruptible(range(3))
    try:
        cli(lambda: [signal.raise_signal(signal.SIGHUP) for _ in steps])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps.stopped_by == 0


def test_a_signal_during_the_last_save_is_not_forgotten(capsys, monkeypatch, no_table, tmp_path):
    save = train.save

    def signalled(folder, *given):
        save(folder, *given)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "save", signalled)
    args = (*TINY, "--steps", 3, "--out", tmp_path / "out")
    code, _, err = run(capsys, monkeypatch, train, *args)
    assert (code, err.splitlines()[-1]) == (143, "stopped by SIGTERM")
    assert [line["step"] for line in log_of(tmp_path / "out")] == [3]
    assert "val_greedy" in log_of(tmp_path / "out")[0]


def test_a_terminal_that_lacks_a_character_shows_another(trained):
    """As a pipe on Windows does; a tree is drawn with characters that it lacks."""
    command = [sys.executable, search.__file__, "--ckpt", str(trained), "--numbers", "3", "4"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command += ["--target", "7", "--n", "2"]
    shown = subprocess.run(command, capture_output=True, env=environment)
    assert shown.returncode == 0 and b"Traceback" not in shown.stderr
    assert b"??" in shown.stdout  # where a branch of the tree begins


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_lack_of_memory_is_one_line(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: not enough memory")


def test_a_fault_of_the_program_is_no_lack_of_memory():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        cli(fail)


def test_memory_that_is_not_there_is_one_line(complaint, trained):
    args = "--data val --num 1 --cache_gib 1000000".split()
    assert "not enough memory" in complaint(search, "--ckpt", trained, *args)
