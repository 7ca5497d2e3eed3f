"""The model against transformers, and its cache against recomputation without one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

from model import INDEX, CachedRows, KVCache, Llama, LlamaConfig, UserError, attend, read_config

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def small(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**{**SMALL, **changes})).eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# ---- What the model computes ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_transformers_opens_what_we_save_and_agrees(tmp_path, tied, scaling):
    """Logits and loss against LlamaForCausalLM's."""
    ours = small(tie_word_embeddings=tied, rope_scaling=scaling)
    ours.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_tokens(3, 64)
    close(ours(ids), theirs(ids).logits)
    labels = torch.where(torch.rand(ids.shape) < 0.4, ids, -100)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(ours(ids, labels=labels) / count, theirs(ids, labels=labels).loss)


def test_the_head_meets_few_different_shapes_in_training(saved):
    """A CPU's library keeps a kernel for each, and a long training would fill the memory."""
    ours = Llama.from_pretrained(saved)
    shapes = set()
    ours.lm_head.register_forward_hook(lambda head, given, out: shapes.add(out.shape))
    ids = torch.randint(0, 96, (8, 100))
    for count in (1, 3, 50, 64):
        labels = torch.full_like(ids, -100)
        labels.view(-1)[1 : count + 1] = 7
        ours(ids, labels=labels)
    assert len(shapes) == 1
    ours(ids, labels=ids)  # all are labelled, but the first of each row
    assert len(shapes) == 2


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_query_attention_is_what_its_formula_says(causal):
    """`attend` on a CPU, under a mask or causally."""
    generator = torch.Generator().manual_seed(0)
    B, H, K, T, S, D = 3, 6, 2, 5, 9, 4
    if causal:
        S = T
    q = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, K, S, D, generator=generator, dtype=torch.float64)
    v = torch.randn(B, K, S, D, generator=generator, dtype=torch.float64)
    sees = torch.rand(B, 1, T, S, generator=generator) < 0.5
    sees[..., 0] = True  # no token sees nothing
    if causal:
        sees = torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    keys = k.repeat_interleave(H // K, 1)  # heads 0 to 2 share the first
    values = v.repeat_interleave(H // K, 1)
    expected = (q @ keys.mT / D**0.5 + mask).softmax(-1) @ values
    torch.testing.assert_close(attend(q, k, v, None if causal else mask), expected)


# ---- Checkpoints ---------------------------------------------------------------------------------


def save_by_transformers(folder, tied: bool, shard_size: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    rope = {"rope_theta": 500000.0, **SCALING}
    config = HFConfig(**SMALL, tie_word_embeddings=tied, rope_parameters=rope)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / INDEX).exists() == (shard_size == "40KB")
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1MB", "40KB"])
def test_we_open_what_transformers_saves(tmp_path, tied, shard_size):
    theirs = save_by_transformers(tmp_path, tied, shard_size)
    ids = random_tokens(2, 50)
    close(Llama.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1MB", "40KB"])
def test_weights_come_back_to_transformers_bit_for_bit(tmp_path, tied, shard_size):
    theirs = save_by_transformers(tmp_path, tied, shard_size)
    Llama.from_pretrained(tmp_path).save_pretrained(tmp_path / "again", torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, back[key]), key


def test_saving_over_shards_leaves_no_index_of_them(tmp_path):
    save_by_transformers(tmp_path, tied=True, shard_size="40KB")
    ours = Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        ours.model.norm.weight += 1
    ours.save_pretrained(tmp_path, torch.float32)
    assert not (tmp_path / INDEX).exists()
    assert torch.equal(Llama.from_pretrained(tmp_path).model.norm.weight, ours.model.norm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_opens_in_the_precision_it_was_saved_in(tmp_path, dtype):
    model = small()
    model.save_pretrained(tmp_path, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    opened = Llama.from_pretrained(tmp_path)
    assert opened.lm_head.weight.dtype == dtype
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    for key, value in model.state_dict().items():
        assert torch.equal(value.to(dtype), opened.state_dict()[key]), key


def test_a_checkpoint_opens_in_the_precision_asked_for(tmp_path):
    small().save_pretrained(tmp_path, torch.bfloat16)
    assert (
        Llama.from_pretrained(tmp_path, dtype=torch.float64).lm_head.weight.dtype == torch.float64
    )


def test_rope_keeps_full_precision_in_a_bf16_model(tmp_path):
    """As in transformers: position 1000 takes more bits of a frequency than bf16 has."""
    small(rope_scaling=SCALING).save_pretrained(tmp_path, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = Llama.from_pretrained(tmp_path)
    torch.testing.assert_close(ours.model.rope, theirs.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_by_rows_that_are_the_mean(tmp_path, tied):
    model = small(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, torch.float32)
    grown = Llama.from_pretrained(tmp_path, vocab_size=98)
    assert grown.config.vocab_size == 98
    for old, new in (
        (model.model.embed_tokens.weight, grown.model.embed_tokens.weight),
        (model.lm_head.weight, grown.lm_head.weight),
    ):
        assert torch.equal(new[:96], old)
        torch.testing.assert_close(new[96:], old.mean(0).expand(2, -1))


# ---- config.json ---------------------------------------------------------------------------------


def test_both_spellings_of_rope_mean_the_same():
    old = read_config({**SMALL, "rope_theta": 7e4, "rope_scaling": SCALING})
    new = read_config({**SMALL, "rope_parameters": {"rope_theta": 7e4, **SCALING}})
    assert old == new
    assert old.rope_theta == 7e4
    assert old.rope_scaling == SCALING


def test_rope_of_the_default_type_is_not_scaled():
    rope = {"rope_theta": 7e4, "rope_type": "default"}
    assert read_config({**SMALL, "rope_parameters": rope}).rope_scaling is None


def test_where_config_is_silent_transformers_defaults_hold():
    """Against transformers' own LlamaConfig of the same two fields."""
    raw = {"hidden_size": 96, "num_attention_heads": 4}
    ours = read_config(raw)
    theirs = HFConfig(**raw)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "field,value,complaint",
    [
        ("model_type", "gpt2", "model_type: 'gpt2'"),
        ("mlp_bias", True, "mlp_bias: True"),
        ("hidden_act", "gelu", "hidden_act: 'gelu'"),
        ("rope_scaling", {"rope_type": "yarn"}, "RoPE of type 'yarn'"),
    ],
)
def test_what_this_llama_does_not_have_is_named(field, value, complaint):
    with pytest.raises(UserError, match=complaint):
        read_config({**SMALL, field: value})


def test_a_config_without_sizes_is_no_llamas():
    with pytest.raises(UserError, match="lacks hidden_size"):
        read_config({"model_type": "llama"})


# ---- Damaged checkpoints -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    small().save_pretrained(tmp_path)
    return tmp_path


def test_half_a_file_is_called_damaged(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        Llama.from_pretrained(saved)


def test_a_missing_file_is_called_missing(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        Llama.from_pretrained(saved)


@pytest.mark.parametrize(
    "old,new,complaint",
    [
        ('"num_hidden_layers": 3', '"num_hidden_layers": 4', "layers.3"),
        ('"num_hidden_layers": 3', '"num_hidden_layers": 2', "layers.2"),
        ('"intermediate_size": 112', '"intermediate_size": 111', "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_named(saved, old, new, complaint):
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace(old, new))
    with pytest.raises(UserError, match=complaint):
        Llama.from_pretrained(saved)


# ---- The cache -----------------------------------------------------------------------------------


def new_cache(model: Llama, slots: int) -> KVCache:
    """A cache whose unwritten slots would spoil everything that sees them."""
    weight = model.lm_head.weight
    cache = KVCache(model.config, slots, weight.device, weight.dtype)
    cache.kv[:, :, 1:] = torch.nan
    return cache


def append(model: Llama, cache: KVCache, rows: list[list], texts: list[list[int]]) -> torch.Tensor:
    """Pass texts through the model as one right-padded batch, behind rows (lists of slots); returns
    the logits after each text's last token."""
    begins = torch.tensor([len(row) for row in rows])
    longest = max(map(len, texts))
    slots = torch.zeros(len(rows), int(begins.max()) + longest, dtype=torch.int64)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, (row, text) in enumerate(zip(rows, texts)):
        row += [cache.lend() for _ in text]
        slots[number, : len(row)] = torch.tensor([slot.number for slot in row])
        ids[number, : len(text)] = torch.tensor(text)
    positions = begins[:, None] + torch.arange(longest)
    last = torch.tensor([len(text) - 1 for text in texts])
    return model(ids, None, CachedRows(cache, slots, positions), last)


def held_by(rows: list[list]) -> set[int]:
    """The numbers of all slots in rows."""
    return {slot.number for slot in sum(rows, [])}


@torch.no_grad()
def test_appends_forks_and_step_backs_equal_recomputation():
    """After each append to rows that were forked and cut at random, the logits are those of the
    model without a cache on the same tokens."""
    model = small(rope_scaling=SCALING)
    cache = new_cache(model, 600)
    generator = torch.Generator().manual_seed(3)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = [[], []]
    texts = [[], []]
    for _ in range(30):
        more = []
        for _ in texts:
            more.append(torch.randint(0, 96, (between(1, 6),), generator=generator).tolist())
        logits = append(model, cache, rows, more)
        texts = [text + new for text, new in zip(texts, more)]
        for text, got in zip(texts, logits):
            close(got, model(torch.tensor([text]))[0, -1])

        parents = [between(0, len(rows)) for _ in range(between(1, 7))]
        rows = [list(rows[parent]) for parent in parents]
        texts = [list(texts[parent]) for parent in parents]

        for row, text in zip(rows, texts):
            kept = between(0, min(len(text), 40) + 1)
            del row[kept:]
            del text[kept:]
        assert len(cache.free) == 599 - len(held_by(rows))


@torch.no_grad()
def test_many_rows_of_all_lengths_equal_recomputation():
    """More of them than attend together; the later ones are longer, and then shorter."""
    model = small()
    lengths = [*range(2, 101), *range(100, 1, -1), *[3] * 90]
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(0, 96, (length,), generator=generator).tolist() for length in lengths]
    cache = new_cache(model, sum(lengths) + 1)
    rows = [[] for _ in texts]
    append(model, cache, rows, [text[:-1] for text in texts])
    logits = append(model, cache, rows, [text[-1:] for text in texts])
    assert len(logits) > 2 * 128
    for text, got in zip(texts, logits):
        close(got, model(torch.tensor([text]))[0, -1])


@torch.no_grad()
def test_generation_equals_transformers(tmp_path):
    """Greedy decoding, token by token through the cache."""
    model = small()
    model.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = random_tokens(2, 9)
    cache = new_cache(model, 100)
    rows = [[], []]
    following = prompts.tolist()
    tokens = []
    for _ in range(30):
        step = append(model, cache, rows, following).argmax(-1, keepdim=True)
        following = step.tolist()
        tokens.append(step)
    expected = theirs.generate(
        prompts, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert torch.equal(torch.cat(tokens, 1), expected[:, 9:])


def test_all_slots_but_scratch_are_lent_once_each():
    cache = new_cache(small(), 20)
    slots = [cache.lend() for _ in range(19)]
    assert sorted(slot.number for slot in slots) == list(range(1, 20))
    assert cache.free == []


def test_a_slot_returns_when_nobody_holds_it():
    cache = new_cache(small(), 20)
    row = [cache.lend() for _ in range(5)]
    fork = list(row)
    third = row[2].number
    del row
    assert len(cache.free) == 14  # the fork still holds all five
    del fork[2:]
    assert len(cache.free) == 17
    assert third in cache.free


@torch.no_grad()
def test_padding_is_written_to_scratch_alone():
    """A batch of a long text and a short one leaves all slots but its own as they were."""
    model = small()
    cache = new_cache(model, 40)
    before = [[]]
    append(model, cache, before, [[1, 2, 3, 4, 5]])
    old = cache.kv.clone()
    rows = [[], []]
    append(model, cache, rows, [[1, 2, 3, 4, 5, 6], [7]])
    written = set()
    for slot in range(40):
        if not torch.equal(cache.kv[:, :, slot].nan_to_num(9), old[:, :, slot].nan_to_num(9)):
            written.add(slot)
    assert written == {0} | held_by(rows)
