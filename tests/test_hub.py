"""Checkpoints and datasets by name, from a stand-in Hub on localhost through the real client; and the growing vocabulary."""
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import BACKTRACK, Tokenizer
from model import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"nums": [2, i], "target": 2 + i, "search_path": f"{i}+2={2 + i}\nGoal Reached!"} for i in range(10, 18)]


@pytest.fixture
def hub(tmp_path):
    """Serves tmp_path/hub/{models,datasets}/OWNER/NAME as the Hub does; OWNER `locked` is gated. Yields (address, requests)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            kind, *parts = self.path.strip("/").removeprefix("api/").split("?")[0].split("/")
            if kind not in ("models", "datasets"):
                kind, parts = "models", [kind, *parts]
            folder = tmp_path / "hub" / kind / parts[0] / parts[1]
            if parts[0] == "locked":
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            if not folder.is_dir():
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            if self.path.startswith("/api/"):
                files = [{"rfilename": str(f.relative_to(folder))} for f in folder.rglob("*") if f.is_file()]
                tree = [{"type": "file", "path": f["rfilename"], "oid": "0" * 40, "size": 1} for f in files]
                whole = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": files, "tags": [], "private": False}
                return self.answer(200, json.dumps(tree if "/tree/" in self.path else whole).encode())
            file = folder / "/".join(parts[4:])
            self.answer(200, file.read_bytes(), {"ETag": f'"{abs(hash(str(file))):040x}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, code: int, body: bytes, headers=()):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def python(tmp_path, address: str, code: str, **more) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", **more}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def small(tied: bool, vocab_size: int) -> Llama:
    torch.manual_seed(1)
    return Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
                             num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, eos_token_id=1))


def test_names_on_the_hub(tmp_path, hub):
    """A checkpoint and a dataset by name, then again without a network; only the files needed; one line for each failure."""
    model, dataset, parquet = (tmp_path / "hub" / name for name in
                               ("models/me/small", "datasets/me/rows", "datasets/me/parquet"))
    tok = Tokenizer.digits()
    small(True, tok.vocab_size).save_pretrained(model)
    tok.save_pretrained(model)
    (model / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "resume.safetensors"):
        (model / name).write_text("not needed")
    dataset.mkdir(parents=True)
    (dataset / "train_backtrack.json").write_text(json.dumps(ROWS))
    (dataset / "val_backtrack.json").write_text(json.dumps(ROWS[:6]))
    parquet.mkdir(parents=True)
    (parquet / "train-0001.parquet").write_bytes(b"PAR1")
    code = """if True:
        from data import Tokenizer, load_record, load_rows, read_split
        from model import Llama, UserError
        print(Llama.from_pretrained("me/small").config.vocab_size, Tokenizer.from_pretrained("me/small").backtrack)
        print([len(read_split("me/rows", split)) for split in ("train", "val", "val_new")], load_record("me/small")["source"])
        print([row["target"] for row in load_rows("me/rows:val_new", load_record("me/small"), 2, 1)])
        for name, work in {"me/nothing": Llama.from_pretrained, "locked/llama": Llama.from_pretrained,
                           "me/parquet": lambda name: read_split(name, "train"), "no name": Llama.from_pretrained}.items():
            try:
                work(name)
            except UserError as error:
                print(name, "->", " ".join(str(error).split()))
    """
    done = python(tmp_path, hub[0], code)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tok.vocab_size} {tok.backtrack}", done.stderr
    assert lines[1:3] == ["[8, 3, 3] yangxw/countdown-backtracking", "[16, 17]"]
    assert [line.split(" -> ")[0] for line in lines[3:]] == ["me/nothing", "locked/llama", "me/parquet", "no name"]
    assert "no model at me/nothing" in lines[3] and "hf auth login" in lines[4] and "parquet is not read" in lines[5]
    fetched = {path.rpartition("/")[2] for path in hub[1] if "/resolve/" in path and "/small/" in path}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    seen = len(hub[1])
    again = python(tmp_path, hub[0], code, HF_HUB_OFFLINE="1")
    assert again.stdout.splitlines()[:3] == lines[:3] and len(hub[1]) == seen


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows_by_the_mean(tmp_path, tied):
    """A checkpoint whose tokenizer lacks `<backtrack>`: after growing, transformers reads the same from what we save."""
    full = json.loads(Tokenizer.digits().tok.to_str())
    last = len(full["model"]["vocab"]) - 1
    swap = {BACKTRACK: last, next(text for text, i in full["model"]["vocab"].items() if i == last): 2}
    assert full["model"]["vocab"][BACKTRACK] == 2
    full["model"]["vocab"] = {t: swap.get(t, i) for t, i in full["model"]["vocab"].items() if t != BACKTRACK}
    full["added_tokens"] = [token for token in full["added_tokens"] if token["content"] != BACKTRACK]
    before = small(tied, last)
    before.save_pretrained(tmp_path, torch.float32)
    (tmp_path / "tokenizer.json").write_text(json.dumps(full))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tok = Tokenizer.from_pretrained(tmp_path, grow=True)
    assert (tok.backtrack, tok.vocab_size) == (last, last + 1)
    grown = Llama.from_pretrained(tmp_path, vocab_size=tok.vocab_size)
    for old, new in ((before.model.embed_tokens, grown.model.embed_tokens), (before.lm_head, grown.lm_head)):
        assert torch.equal(new.weight[:-1], old.weight)
        torch.testing.assert_close(new.weight[-1], old.weight.mean(0))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
    grown.save_pretrained(tmp_path / "new", torch.float32)
    tok.save_pretrained(tmp_path / "new")
    theirs, their_tok = (kind.from_pretrained(tmp_path / "new") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert theirs.config.vocab_size == len(their_tok) == last + 1 and their_tok.convert_tokens_to_ids(BACKTRACK) == last
    ids = torch.tensor([their_tok(f"1+2=4\n{BACKTRACK}")["input_ids"]])
    torch.testing.assert_close(grown(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert ids[0, -1] == last
    assert Llama.from_pretrained(tmp_path / "new", vocab_size=5).config.vocab_size == last + 1      # it never shrinks
