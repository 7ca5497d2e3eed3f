"""Files as strangers have them: each is read for what it says, or refused in one line."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from byte_pairs import BOS, byte_pairs
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import model
import search
import train
from data import (
    GOAL,
    Tokenizer,
    doubtful_rows,
    generate,
    load_record,
    load_rows,
    new_record,
    read_rows,
    read_split,
    verify,
)
from model import Llama, LlamaConfig, UserError, read_config
from search import Settings
from train import Batches, Training, fit

TOK = Tokenizer.digits()
ROW = {"nums": [3, 5, 8, 6], "target": 48, "search_path": "8*6=48\n5-3=2\n48/2=24\n<backtrack>"}


def tiny(**changes) -> Llama:
    torch.manual_seed(0)
    config = {
        "vocab_size": TOK.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    return Llama(LlamaConfig(**{**config, **changes}))


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint, to be changed."""
    tiny().save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(new_record(0, [3])))
    return tmp_path


def change(path, **fields) -> None:
    values = json.loads(path.read_text())
    values.update(fields)
    path.write_text(json.dumps(values))


# ---- Rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"search_path": ROW["search_path"] + "\n"},
        {"search_path": "\n " + ROW["search_path"]},
        {"nums": "[3, 5, 8, 6]"},
        {"target": "48"},
        {"nums": [3.0, 5.0, 8.0, 6.0], "target": 48.0},
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_other_spellings_of_a_row_are_read_as_the_row(tmp_path, changes, mark):
    (tmp_path / "rows.jsonl").write_text(mark + json.dumps({**ROW, **changes}) + "\n")
    assert read_rows(tmp_path / "rows.jsonl") == [ROW]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("whole", [[ROW, ROW], {"data": [ROW, ROW]}])
def test_a_file_may_be_one_list_or_hold_it_as_data(tmp_path, whole, indent):
    (tmp_path / "rows.json").write_text(json.dumps(whole, indent=indent))
    assert read_rows(tmp_path / "rows.json") == [ROW, ROW]


@pytest.mark.parametrize("value", [51.5, True, "x", None, [], math.inf, 1e400, "[" * 9999])
def test_what_is_no_whole_number_is_refused(tmp_path, value):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "target": value}))
    with pytest.raises(UserError, match="target must be a whole number"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_hundred_thousand_brackets_are_refused_in_one_line(tmp_path):
    (tmp_path / "rows.json").write_text("[" * 100_000)
    for read in (read_rows, model.read_json):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / "rows.json")


def test_doubtful_rows_are_counted_and_the_first_is_named():
    paths = [
        "8*6=48\n" + GOAL,  # does not use all numbers
        "8 * 6 = 48\n<backtrack>",
        "8*6=48\n",
        "8*6=47\n<backtrack>",  # as it should be
        "8*6=48\n" + GOAL,
    ]
    lines = doubtful_rows([{**ROW, "search_path": path} for path in paths])
    assert len(lines) == 3
    assert lines[0].startswith("2 of 5 rows end in 'Goal Reached!', but do not solve")
    assert lines[0].endswith("the first is row 1")
    assert "1 of 5 rows have blanks around a sign: the first is row 2" in lines
    assert any(line.startswith("1 of 5 rows end neither") for line in lines)


def test_it_is_said_how_many_rows_are_cut(tmp_path, capsys):
    """And what the tokenizer does not know is said before the first step."""
    long = {**ROW, "nums": [7] * 90}
    (tmp_path / "rows.json").write_text(json.dumps([ROW, long, ROW]))
    options = argparse.Namespace(data=str(tmp_path / "rows.json"), num_train=None)
    train.training_rows(options, TOK)
    assert "1 of 3 rows are truncated at 128 tokens" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text(json.dumps([ROW, {**ROW, "search_path": "3×4=12"}]))
    with pytest.raises(UserError, match="does not know '×'"):
        train.training_rows(options, TOK)


def test_generated_rows_are_not_doubtful():
    assert doubtful_rows(list(generate(new_record(0, [3, 4]), "train", 600))) == []


def test_files_in_subfolders_and_named_dev_are_found(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "my_train.json").write_text(json.dumps([ROW] * 3))
    problem = {"nums": ROW["nums"], "target": ROW["target"]}
    (tmp_path / "deep" / "dev.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(ROW))
    assert len(read_split(str(tmp_path), "train")) == 3
    assert read_split(str(tmp_path), "val") == [problem]  # the first half
    assert read_split(str(tmp_path), "val_new") == [ROW]


def test_parquet_is_named_with_a_command_that_turns_it_into_json(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="to_json"):
        read_split(str(tmp_path), "train")


def test_it_is_said_how_many_rows_there_were(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(ROW)] * 5))
    assert len(load_rows(str(tmp_path / "rows.jsonl"), {}, 10, 2)) == 3
    assert "has only 3 rows from 2 on" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["03+3=6", "3+3=06", "3+03=6"])
def test_numbers_with_leading_zeros_are_no_actions(line):
    assert verify([3, 3], 6, f"{line}\n{GOAL}").failed_action == 1


def test_large_results_are_right_if_they_are():
    a, b = 10**15 + 1, 10**15 - 1
    assert verify([a, b], a * b, f"{a}*{b}={a * b}\n{GOAL}").correct


# ---- The tokenizer -------------------------------------------------------------------------------


def test_padding_and_truncation_in_a_tokenizers_file_are_switched_off(checkpoint):
    backend = Tokenizer.from_pretrained(checkpoint).backend
    backend.enable_padding(length=99)
    backend.enable_truncation(max_length=5)
    backend.save(str(checkpoint / "tokenizer.json"))
    assert Tokenizer.from_pretrained(checkpoint).prompts([ROW, ROW]) == TOK.prompts([ROW, ROW])


@pytest.mark.parametrize("config", [{"eos_token": None}, {}, None])
def test_end_of_text_falls_back_on_the_models_config(checkpoint, config):
    other = TOK.backend.token_to_id("=")  # not a name that would be guessed
    change(checkpoint / "config.json", eos_token_id=other)
    (checkpoint / "tokenizer_config.json").unlink()
    if config is not None:
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(checkpoint).eos == other


@pytest.mark.parametrize("eos_token", [{"content": 3}, 3, []])
def test_an_end_of_text_that_is_no_text_is_refused(checkpoint, eos_token):
    change(checkpoint / "config.json", eos_token_id=None)
    change(checkpoint / "tokenizer_config.json", eos_token=eos_token)
    with pytest.raises(UserError, match="end-of-text"):
        Tokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "record.json"])
def test_half_a_surrogate_pair_is_refused_on_reading(checkpoint, name):
    """No text that is written or encoded may hold one."""
    change(checkpoint / name, eos_token="\ud800")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        model.read_json(checkpoint / name)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "record.json"])
@pytest.mark.parametrize("text", ["[]", '""', '[["eos_token", "x"]]', "3"])
def test_json_that_is_no_object_is_refused_on_reading(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} cannot be read: it holds no JSON object"):
        model.read_json(checkpoint / name)


def test_a_character_that_the_tokenizer_does_not_know_is_named():
    with pytest.raises(UserError, match="does not know 'G' in .*Goal reached!"):
        TOK.encode_rows([{**ROW, "search_path": "8*6=48\nGoal reached!"}])


@pytest.mark.parametrize("decoder", search.DECODERS)
def test_logits_that_are_no_numbers_end_a_search_in_one_line(decoder):
    llama = tiny()
    llama.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        list(search.search_all(llama, TOK, [ROW], [0], search.Settings(decoder=decoder, n=4)))


@pytest.mark.parametrize("decoder", search.DECODERS)
def test_ids_without_a_token_are_never_drawn(decoder):
    """A vocabulary that is padded to 64, in which those ids are the most probable."""
    llama = tiny(vocab_size=64, tie_word_embeddings=False).eval()
    with torch.no_grad():
        direction = llama.model(torch.randint(0, 20, (8, 8))).mean((0, 1))
        llama.lm_head.weight[TOK.vocab_size :] = 5 * direction / direction.norm()
    settings = Settings(decoder=decoder, n=4, max_new_tokens=8, cache_gib=0.01)
    for _, responses in search.search_all(llama, TOK, [ROW], [0], settings):
        drawn = {token for response in responses for token in response.tokens}
        assert max(drawn) < TOK.vocab_size
    [prompt] = TOK.prompts([ROW])
    for response in search.search_slowly(llama, TOK, prompt, 0, settings):
        assert max(response.tokens) < TOK.vocab_size


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600)])
def test_what_is_saved_may_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        tiny().save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()} == {mode}


def test_a_model_with_fewer_embeddings_than_tokens_is_refused():
    with pytest.raises(UserError, match="5 embeddings"):
        next(search.search_all(tiny(vocab_size=5), TOK, [ROW], [0], Settings(cache_gib=0.01)))


def test_what_a_tokenizer_came_with_is_saved_again(checkpoint, tmp_path):
    """Against transformers, of a tokenizer with begin-of-text that has grown by `<backtrack>`."""
    ours = byte_pairs()
    ours.backend.save(str(checkpoint / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": BOS, "special": True},
        "eos_token": "<|end_of_text|>",
        "additional_special_tokens": ["###"],
        "model_max_length": 4321,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages[0].content }}!",
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").write_text('{"top_p": 0.9}')
    out = tmp_path / "saved"
    Tokenizer.from_pretrained(checkpoint, add_backtrack=True).save_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.bos_token == BOS
    assert theirs.eos_token == theirs.pad_token == "<|end_of_text|>"
    assert theirs.model_max_length == 4321
    assert "###" in theirs.all_special_tokens
    chat = [{"role": "user", "content": "3+5"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "3+5!"
    assert theirs("3+5=8<backtrack>")["input_ids"] == ours.backend.encode("3+5=8<backtrack>").ids
    assert GenerationConfig.from_pretrained(out).top_p == 0.9


def test_a_chat_template_in_a_file_of_its_own_is_saved_again(checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").write_text("{{ 'ä' }}", encoding="utf-8")
    Tokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'ä' }}"


def test_a_token_with_a_huge_number_is_refused(checkpoint):
    """An embedding for it would fill the memory."""
    tokens = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["="] = 2**31
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="token 2147483648"):
        Tokenizer.from_pretrained(checkpoint)


# ---- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(checkpoint, number):
    llama = tiny()
    with torch.no_grad():
        llama.model.norm.weight[3] = number
    llama.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="model.norm.weight holds NaN or infinite numbers"):
        Llama.from_pretrained(checkpoint)


def test_a_tensor_of_nothing_is_refused(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(0)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="do not fit its config.json"):
        Llama.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "field,value",
    [
        ("vocab_size", ""),
        ("hidden_size", -3),
        ("num_hidden_layers", 1_000_000),
        ("num_attention_heads", 2.5),
        ("num_key_value_heads", 0),
        ("head_dim", 31),
        ("head_dim", 2**30),
        ("rope_scaling", 3),
        ("rms_norm_eps", "small"),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", {}),
        ("rope_theta", math.nan),
        ("rope_scaling", {"rope_type": "llama3", "factor": 0}),
        ("rope_scaling", {"rope_type": "llama3"}),
    ],
)
def test_each_field_of_config_json_is_checked(checkpoint, field, value):
    raw = json.loads((checkpoint / "config.json").read_text())
    read_config(raw)  # which is right
    with pytest.raises(UserError, match="config.json"):
        read_config({**raw, field: value})


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", 3, None])
def test_an_index_may_name_only_files_beside_it(checkpoint, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not map weights to files beside it"):
        Llama.from_pretrained(checkpoint)


def test_an_index_that_names_a_pipe_does_not_wait_for_it(checkpoint):
    os.mkfifo(checkpoint / "pipe.safetensors")
    index = {"weight_map": {"lm_head.weight": "pipe.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="pipe.safetensors is missing"):
        Llama.from_pretrained(checkpoint)


def test_a_checkpoint_that_is_saved_while_it_is_read_is_not_mixed(checkpoint, monkeypatch):
    """Its files are opened once for each tensor, and here another one takes their place."""
    opened = []

    def open_and_replace(path, **settings):
        opened.append(path)
        if len(opened) == 4:
            tiny().save_pretrained(checkpoint)
        return safe_open(path, **settings)

    monkeypatch.setattr(model, "safe_open", open_and_replace)
    with pytest.raises(UserError, match="was saved anew while it was read"):
        Llama.from_pretrained(checkpoint)
    Llama.from_pretrained(checkpoint)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_remember_their_record(checkpoint, monkeypatch, capsys, sharded):
    if sharded:
        monkeypatch.setattr(
            model, "save_torch_state_dict", partial(save_torch_state_dict, max_shard_size=4096)
        )
    record = new_record(0, [3])
    train.save(checkpoint, tiny(), TOK, record, [])
    assert (checkpoint / "model.safetensors.index.json").exists() == sharded
    Llama.from_pretrained(checkpoint)
    assert capsys.readouterr().err == ""
    change(checkpoint / "record.json", held_out=[50])
    Llama.from_pretrained(checkpoint)
    line = f"note: {checkpoint}/record.json is not the one its weights were saved with\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "field,value",
    [
        ("sizes", [7]),
        ("sizes", []),
        ("any_target", 1.5),
        ("any_target", "0.5"),
        ("held_out", [1_000_000]),
        ("held_out", [18.0]),
        ("held_out", list(range(10, 101))),
        ("mistakes", ["exploratry"]),
        ("seed", -1),
        ("seed", "x"),
        ("source", None),
        ("settings", []),
        ("operators", 4),
        ("max_number", -1),
    ],
)
def test_each_field_of_record_json_is_checked(checkpoint, field, value):
    load_record(checkpoint)  # which is right
    change(checkpoint / "record.json", **{field: value})
    with pytest.raises(UserError, match=f"{field} must be"):
        load_record(checkpoint)


def test_a_checkpoint_of_another_task_is_told(checkpoint, capsys):
    """Validation problems are drawn by data.py as it is now."""
    record = load_record(checkpoint)
    assert (record["operators"], record["max_number"]) == ("+-*/", 99)
    place = checkpoint / "record.json"
    older = {key: record[key] for key in record if key not in ("operators", "max_number")}
    place.write_text(json.dumps(older))
    assert load_record(checkpoint) == older
    assert capsys.readouterr().err == ""
    change(place, operators="+-*/%", max_number=20)
    load_record(checkpoint)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"note: {place} says operators +-*/%, but data.py now has +-*/: ")
    assert second.startswith(f"note: {place} says max_number 20, but data.py now has 99: ")
    train.save(
        checkpoint, tiny(), TOK, json.loads(place.read_text()), [], {"step": 1, "optimizer": {}}
    )
    train.load_state(checkpoint)  # --resume does
    first, second = capsys.readouterr().err.splitlines()
    assert "resume.pt says operators +-*/%" in first
    assert "resume.pt says max_number 20" in second


@pytest.mark.parametrize("text", ["{}", '{"source": "generated"}'])
def test_a_record_without_what_it_needs_is_refused(checkpoint, text):
    (checkpoint / "record.json").write_text(text)
    with pytest.raises(UserError, match="lacks"):
        load_record(checkpoint)


# ---- Training ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(monkeypatch):
    llama = tiny()
    rows = list(islice(generate(new_record(0, [3]), "train", 64), 64))
    reports = []
    with pytest.raises(UserError, match="not finite at step"):
        fit(
            llama,
            Batches(rows, TOK, 4),
            40,
            Training(lr=1e9, warmup=1),
            report_every=7,
            report=lambda *given: reports.append(given),
        )
    assert reports == []


def test_validation_rows_without_a_response_are_enough_to_measure(checkpoint):
    """Of problems alone there is no loss to report, but accuracy."""
    problem = {"nums": [3, 5, 8], "target": 48}
    validation = {"val": [problem]}
    reporter = train.Reporter(
        checkpoint, tiny(), TOK, Batches([ROW], TOK, 1), {}, validation, [], 0
    )
    found = reporter.measure("val", torch.device("cpu"))
    assert found.keys() == {"val_greedy"}


def test_validation_rows_are_read_before_the_first_step():
    """Or a text that the tokenizer does not know would end a run that has saved nothing."""
    validation = {"val": [{**ROW, "search_path": "3 + 5=8"}]}
    with pytest.raises(UserError, match="does not know"):
        train.Reporter(None, tiny(), TOK, Batches([ROW], TOK, 1), {}, validation, [], 0)


@pytest.mark.parametrize("world,expected", [("1", "mps"), ("2", "cpu")])
def test_gloo_has_tensors_of_the_cpu(monkeypatch, world, expected):
    """Several ranks of a machine whose accelerator it does not know."""
    accelerator = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: accelerator)
    monkeypatch.setattr(model.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert model.device_rank_world()[0] == torch.device(expected)


DEFAULT_GROUP = """
import inspect
import model
import torch.distributed as dist
model.device_rank_world()
import torch._dynamo  # as DistributedDataParallel does
from torch.distributed.nn import functional
print(inspect.signature(functional.broadcast).parameters["group"].default)
dist.destroy_process_group()
"""


def test_nothing_holds_the_group_of_processes_to_the_end(tmp_path):
    """Its threads would live into the interpreter's end, and may abort it."""
    script = tmp_path / "script.py"
    script.write_text(DEFAULT_GROUP)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script],
        env={**os.environ, "PYTHONPATH": str(Path(model.__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\nNone\n", done.stderr


# ---- Writing -------------------------------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("old_is_sharded,new_is_sharded", [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("killed_at", range(8))
def test_who_is_killed_between_two_moves_has_saved(
    tmp_path, monkeypatch, old_is_sharded, new_is_sharded, killed_at
):
    """In a process of its own, which is killed before its move number killed_at: whoever reads the
    folder next finishes it."""
    shards = partial(save_torch_state_dict, max_shard_size=4096)

    def save(folder, seed: int, sharded: bool, state) -> None:
        with monkeypatch.context() as patch:
            if sharded:
                patch.setattr(model, "save_torch_state_dict", shards)
            config = tiny().config
            torch.manual_seed(seed)
            weights = Llama(config)
            train.save(folder, weights, TOK, new_record(seed, [3]), [{"step": seed}], state)

    state = {"step": 1, "optimizer": {}}
    save(tmp_path / "old", 1, old_is_sharded, state)
    save(tmp_path / "new", 2, new_is_sharded, None)  # which has no resume.pt
    folder = tmp_path / "both"
    save(folder, 1, old_is_sharded, state)
    if os.fork() == 0:
        left = [killed_at]
        replace = os.replace

        def replace_or_die(source, target):
            if Path(source).parent.parent == folder:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
        save(folder, 2, new_is_sharded, None)
        os._exit(0)
    os.wait()
    opened = Llama.from_pretrained(folder)
    for name, value in Llama.from_pretrained(tmp_path / "new").named_parameters():
        assert torch.equal(opened.get_parameter(name), value)
    left_over = contents(folder).keys() - contents(tmp_path / "new").keys()
    assert all("-of-" in name for name in left_over), (
        left_over
    )  # older shards, which no index names
    for name in ("record.json", "log.jsonl", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_who_is_killed_before_its_files_are_complete_leaves_the_old_ones(tmp_path):
    train.save(tmp_path, tiny(), TOK, new_record(1, [3]), [])
    before = contents(tmp_path)
    if os.fork() == 0:
        torch.save = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
        train.save(tmp_path, tiny(), TOK, new_record(2, [3]), [], {"step": 1, "optimizer": {}})
    os.wait()
    Llama.from_pretrained(tmp_path)  # who only reads removes nothing
    [left_behind] = tmp_path.glob(".saving-*")
    model.settle(tmp_path, before_save=True)
    assert not left_behind.exists()
    assert contents(tmp_path) == before


def test_an_older_tokenizers_files_do_not_stay_beside_a_new_one(checkpoint):
    (checkpoint / "generation_config.json").write_text("{}")
    TOK.save_pretrained(checkpoint)
    assert not (checkpoint / "generation_config.json").exists()


def test_a_new_model_does_not_keep_the_files_of_an_older_models_tokenizer(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{}")
    train.save(checkpoint, tiny(), TOK, new_record(1, [3]), [])
    assert not (checkpoint / "chat_template.jinja").exists()


def test_a_complete_save_does_not_replace_a_later_one(tmp_path):
    """Not even if the number of the killed process is meanwhile another's."""
    complete = tmp_path / f".saved-{os.getppid()}-abcdefgh"
    complete.mkdir()
    (complete / "tokenizer.json").write_text("old")
    (complete / "other.json").write_text("old")
    model.settle(tmp_path)  # its process may still be at it
    assert complete.exists()
    TOK.save_pretrained(tmp_path)
    assert not complete.exists()
    assert (tmp_path / "other.json").exists()
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == TOK.vocab_size


def test_a_folder_in_the_place_of_a_file_is_named_and_blocks_no_other_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match="rows.jsonl there is a folder"):
        with model.replacing(tmp_path) as staging:
            (staging / "rows.jsonl").write_text("{}")
    with model.replacing(tmp_path) as staging:
        (staging / "others.jsonl").write_text("{}")
    assert (tmp_path / "others.jsonl").read_text() == "{}"
    assert not list(tmp_path.glob(".sav*"))


def test_a_broken_pipe_is_no_fault_of_the_folder(tmp_path):
    """It is of what is printed while files are written: nobody reads on."""
    with pytest.raises(BrokenPipeError), model.replacing(tmp_path):
        raise BrokenPipeError


def test_what_a_killed_process_left_behind_is_swept(tmp_path):
    """And not what a living one is writing."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    names = [f".saving-{killed.pid}-abcdefgh", f".saving-{os.getppid()}-abcdefgh"]
    own = [".saving-my-work", f".saved-{killed.pid}-notes"]  # of the user
    for name in names + own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    TOK.save_pretrained(tmp_path)
    assert [(tmp_path / name).exists() for name in names + own] == [False, True, True, True]
    assert (tmp_path / "tokenizer.json").exists()
