"""Checkpoints and datasets by name, from a stand-in Hub on localhost through the real client; and
the vocabulary that grows by `<backtrack>`."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from data import BACKTRACK, Tokenizer, load_record, load_rows, read_split
from model import Llama, LlamaConfig, UserError

ROOT = Path(__file__).parent.parent


def small(tied: bool, vocab_size: int) -> Llama:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        eos_token_id=1,
    )
    return Llama(config)


# ---- The stand-in --------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
NOT_FOUND = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does, from the folder server.folder/{models,datasets}/OWNER/NAME; what
    belongs to OWNER `locked` is gated. server.asked collects the paths asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind, *parts = self.path.strip("/").removeprefix("api/").split("?")[0].split("/")
        if kind not in ("models", "datasets"):  # a model's file: /OWNER/NAME/resolve/...
            parts = [kind, *parts]
            kind = "models"
        owner, name, *rest = parts
        folder = self.server.folder / kind / owner / name
        if owner == "locked":
            self.answer(403, b"{}", GATED)
        elif not folder.is_dir():
            self.answer(401, b"{}", NOT_FOUND)
        elif self.path.startswith("/api/"):
            self.answer(200, self.description(f"{owner}/{name}", folder), {})
        else:
            path = folder / "/".join(rest[2:])  # after resolve/REVISION
            headers = {"ETag": f'"{abs(hash(str(path))):040x}"', "X-Repo-Commit": COMMIT}
            self.answer(200, path.read_bytes(), headers)

    do_HEAD = do_GET

    def description(self, name: str, folder: Path) -> bytes:
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [str(path.relative_to(folder)) for path in files]
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": path, "oid": "0" * 40, "size": 1} for path in names]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": path} for path in names]
        repository = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return json.dumps(repository).encode()

    def answer(self, code: int, body: bytes, headers: dict) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server: its folder, the paths it was asked for, and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = tmp_path_factory.mktemp("hub")
    server.asked = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


# ---- Names on the Hub ----------------------------------------------------------------------------

ROWS = []
for number in range(10, 18):
    path = f"{number}+2={number + 2}\nGoal Reached!"
    ROWS.append({"nums": [2, number], "target": number + 2, "search_path": path})
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def write_model(folder: Path) -> None:
    tokenizer = Tokenizer.digits()
    small(True, tokenizer.vocab_size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json"):
        (folder / name).write_text("not needed")
    (folder / "resume.pt").write_text("not needed")


def write_datasets(folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "train_backtrack.json").write_text(json.dumps(ROWS))
    (folder / "rows" / "val_backtrack.json").write_text(json.dumps(ROWS[:6]))
    (folder / "parquet").mkdir()
    (folder / "parquet" / "train-0001.parquet").write_bytes(b"PAR1")


def complaint_about(work, *args) -> str:
    """The message of the UserError that it ends with."""
    try:
        work(*args)
    except UserError as error:
        return str(error)
    return "no complaint"


def look_up() -> dict:
    """What the names of a model and a dataset lead to, and what is said of names that are bad."""
    record = load_record("me/small")
    return {
        "vocab_size": Llama.from_pretrained("me/small").config.vocab_size,
        "backtrack": Tokenizer.from_pretrained("me/small").backtrack,
        "source": record["source"],
        "rows": {split: read_split("me/rows", split) for split in ("train", "val", "val_new")},
        "some rows": load_rows("me/rows:val_new", record, 2, 1),
        "nothing": complaint_about(Llama.from_pretrained, "me/nothing"),
        "no name": complaint_about(Llama.from_pretrained, "no name"),
        "gated": complaint_about(Llama.from_pretrained, "locked/llama"),
        "parquet": complaint_about(read_split, "me/parquet", "train"),
    }


def looked_up(hub, offline: str) -> dict:
    """`look_up` by another process: the client reads its environment only once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(hub.folder / "cache"),
        "HF_HUB_OFFLINE": offline,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def online(hub) -> dict:
    write_model(hub.folder / "models" / "me" / "small")
    write_datasets(hub.folder / "datasets" / "me")
    return looked_up(hub, offline="0")


def test_a_model_opens_by_its_name(online):
    tokenizer = Tokenizer.digits()
    assert online["vocab_size"] == tokenizer.vocab_size
    assert online["backtrack"] == tokenizer.backtrack


def test_a_model_without_a_record_counts_as_made_of_the_references_data(online):
    assert online["source"] == "yangxw/countdown-backtracking"


def test_a_dataset_is_read_by_its_name(online):
    assert online["rows"] == {"train": ROWS, "val": ROWS[:3], "val_new": ROWS[3:6]}
    assert online["some rows"] == ROWS[4:6]


def test_names_that_lead_nowhere_are_named(online):
    assert "no model at me/nothing" in online["nothing"]
    assert "no such file or folder: no name" in online["no name"]
    assert "parquet becomes JSON by" in online["parquet"]


def test_who_has_no_access_is_told_how_to_get_it(online):
    assert "locked/llama is gated" in online["gated"]
    assert "hf auth login" in online["gated"]


def test_only_the_files_that_are_needed_are_fetched(online, hub):
    fetched = set()
    for path in hub.asked:
        if "/resolve/" in path and "/small/" in path:
            fetched.add(path.rpartition("/")[2])
    assert fetched == NEEDED


def test_what_was_fetched_once_opens_without_a_network(online, hub):
    hub.asked.clear()
    offline = looked_up(hub, offline="1")
    assert hub.asked == []
    for what in ("vocab_size", "backtrack", "source", "rows", "some rows"):
        assert offline[what] == online[what]


# ---- A vocabulary that grows ---------------------------------------------------------------------


@pytest.fixture
def without_backtrack(tmp_path) -> Path:
    """A folder with the digits' tokenizer, but for `<backtrack>`; the last token has its id."""
    raw = json.loads(Tokenizer.digits().backend.to_str())
    vocabulary = raw["model"]["vocab"]
    number = vocabulary.pop(BACKTRACK)
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = number
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != BACKTRACK]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


SIZE = Tokenizer.digits().vocab_size  # with `<backtrack>`


def test_a_tokenizer_without_backtrack_is_named(without_backtrack):
    with pytest.raises(UserError, match="lacks <backtrack>"):
        Tokenizer.from_pretrained(without_backtrack)


def test_a_tokenizer_grows_by_backtrack(without_backtrack):
    tokenizer = Tokenizer.from_pretrained(without_backtrack, add_backtrack=True)
    assert (tokenizer.backtrack, tokenizer.vocab_size) == (SIZE - 1, SIZE)


def test_a_tokenizer_that_knows_backtrack_keeps_its_number(tmp_path):
    Tokenizer.digits().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path, add_backtrack=True)
    assert tokenizer.backtrack == Tokenizer.digits().backtrack
    assert tokenizer.vocab_size == SIZE


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_grow_by_their_mean(tmp_path, tied):
    before = small(tied, SIZE - 1)
    before.save_pretrained(tmp_path, torch.float32)
    grown = Llama.from_pretrained(tmp_path, vocab_size=SIZE)
    assert grown.config.vocab_size == SIZE
    for old, new in (
        (before.model.embed_tokens.weight, grown.model.embed_tokens.weight),
        (before.lm_head.weight, grown.lm_head.weight),
    ):
        assert torch.equal(new[:-1], old)
        torch.testing.assert_close(new[-1], old.mean(0))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied


def test_a_vocabulary_never_shrinks(tmp_path):
    small(True, SIZE).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path, vocab_size=5).config.vocab_size == SIZE


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_what_has_grown(without_backtrack, tmp_path, tied):
    """Against transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small(tied, SIZE - 1).save_pretrained(without_backtrack, torch.float32)
    tokenizer = Tokenizer.from_pretrained(without_backtrack, add_backtrack=True)
    grown = Llama.from_pretrained(without_backtrack, vocab_size=SIZE)
    grown.save_pretrained(tmp_path / "grown", torch.float32)
    tokenizer.save_pretrained(tmp_path / "grown")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert theirs.config.vocab_size == len(their_tokenizer) == SIZE
    input_ids = torch.tensor([their_tokenizer(f"1+2=4\n{BACKTRACK}")["input_ids"]])
    assert input_ids[0, -1] == tokenizer.backtrack
    expected = theirs(input_ids).logits
    torch.testing.assert_close(grown(input_ids), expected, atol=1e-4, rtol=0)


if __name__ == "__main__":
    print(json.dumps(look_up()))
