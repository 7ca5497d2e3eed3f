"""The model against transformers, and its cache against recomputation without one."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

from model import KVCache, Llama, LlamaConfig, UserError

SCALING = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
             num_key_value_heads=2, head_dim=16, initializer_range=0.2)


def small(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**{**SMALL, **changes})).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_transformers_opens_what_we_save_and_agrees(tmp_path, tied, scaling):
    ours = small(tie_word_embeddings=tied, rope_scaling=scaling)
    ours.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (3, 64))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    labels = torch.where(torch.rand(ids.shape) < 0.4, ids, -100)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(ours(ids, labels=labels) / count, theirs(ids, labels=labels).loss)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1MB", "40KB"])
def test_we_open_what_transformers_saves(tmp_path, tied, shard):
    torch.manual_seed(1)
    config = HFConfig(**SMALL, tie_word_embeddings=tied, rope_parameters={"rope_theta": 500000.0, **SCALING})
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    ours = Llama.from_pretrained(tmp_path)
    ids = torch.randint(0, 96, (2, 50))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path, torch.float32)                      # over it: no index of older shards may stay
    assert torch.equal(Llama.from_pretrained(tmp_path).model.norm.weight, ours.model.norm.weight)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    ours.save_pretrained(tmp_path / "again", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())


def test_both_spellings_of_rope_are_read():
    old = LlamaConfig.from_dict({**SMALL, "rope_theta": 7e4, "rope_scaling": {**SCALING}})
    new = LlamaConfig.from_dict({**SMALL, "rope_parameters": {"rope_theta": 7e4, **SCALING}})
    assert old == new and old.rope_theta == 7e4 and old.rope_scaling == SCALING
    assert LlamaConfig.from_dict({**SMALL, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}).rope_scaling is None
    for bad in ({"model_type": "gpt2"}, {"mlp_bias": True}, {"rope_scaling": {"rope_type": "yarn"}}):
        with pytest.raises(UserError):
            LlamaConfig.from_dict({**SMALL, **bad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_on_disk(tmp_path, dtype):
    model = small()
    model.save_pretrained(tmp_path, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    opened = Llama.from_pretrained(tmp_path)
    assert opened.lm_head.weight.dtype == dtype and opened.lm_head.weight is opened.model.embed_tokens.weight
    assert all(torch.equal(value.to(dtype), opened.state_dict()[key]) for key, value in model.state_dict().items())
    assert Llama.from_pretrained(tmp_path, dtype=torch.float64).lm_head.weight.dtype == torch.float64


@torch.no_grad()
def test_cache_fork_and_rollback_equal_recomputation():
    """Random forks, rollbacks and appends; after each the logits are those of the plain model on the same tokens."""
    model, generator = small(rope_scaling=SCALING), torch.Generator().manual_seed(3)

    def random(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    cache, texts = KVCache(model.config, 2, 64, "cpu", torch.float32), [[], []]
    parked, stored = KVCache(model.config, 1, 64, "cpu", torch.float32), []
    for turn in range(60):
        kind = turn % 4
        if kind == 0:                                                  # append, as a right-padded batch, then cut the padding
            more = [random(0, 96, int(random(1, 6, 1))).tolist() for _ in texts]
            width = max(map(len, more))
            logits = model(torch.tensor([m + [0] * (width - len(m)) for m in more]), cache=cache,
                           keep=torch.tensor([len(m) - 1 for m in more]))
            texts = [text + m for text, m in zip(texts, more)]
            cache.rollback(torch.tensor([len(text) for text in texts]))
            for text, got in zip(texts, logits):
                torch.testing.assert_close(got, model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=0)
        elif kind == 1:
            parents = random(0, len(texts), int(random(1, 7, 1)))
            cache.fork(parents)
            texts = [texts[p] for p in parents.tolist()]
        elif kind == 2:
            lengths = torch.tensor([int(random(0, min(len(text), 40) + 1, 1)) for text in texts])
            cache.rollback(lengths)
            texts = [text[:n] for text, n in zip(texts, lengths.tolist())]
        else:                                                          # keep a row aside, and later bring it back
            row = random(0, len(texts), 1)
            parked.fork(row, cache, torch.tensor([len(stored)]))
            stored.append(texts[int(row)])
            back = random(0, len(stored), 3)
            cache.fork(back, source=parked)
            texts = [stored[i] for i in back.tolist()]


def test_generation_equals_transformers(tmp_path):
    """Greedy decoding, token by token through the cache."""
    model = small()
    model.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.randint(0, 96, (2, 9))
    cache, step, tokens = KVCache(model.config, 2, 40, "cpu", torch.float32), prompt, []
    with torch.no_grad():
        for _ in range(30):
            step = model(step, cache=cache)[:, -1:].argmax(-1)
            tokens.append(step)
    expected = theirs.generate(prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 9:])


def test_damaged_checkpoints_are_named(tmp_path):
    small().save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", (tmp_path / "config.json").read_text()
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Llama.from_pretrained(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(UserError, match="layers.3"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"intermediate_size": 112', '"intermediate_size": 111'))
    with pytest.raises(UserError, match="size mismatch"):
        Llama.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        Llama.from_pretrained(tmp_path)
