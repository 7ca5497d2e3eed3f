"""Models of real size against transformers. Minutes; not run by pytest.

    python tests/full_size.py                       Llama-3.2-1B's exact configuration, with random
                                                    weights: 5 GB on disk, 11 GB of memory
    python tests/full_size.py --size 3B --layers 4  3B's, cut in depth
    python tests/full_size.py --ckpt FOLDER         a real checkpoint
    python tests/full_size.py --save FOLDER         only write a model of that size, with the digit
                                                    tokenizer, to train on

Prints the largest difference of the logits, whether greedy decoding with the cache gives
transformers' tokens, once straight on and once after straying and stepping back, and the peak
memory of loading with one more row of embedding (of a model cut in depth, where the embedding is
most of it, this means little).

Of a real checkpoint also: whether its own tokenizer gives the same tokens, what it writes, the loss
of a training step, and the logits of what that step has made, when saved and opened in
transformers. Exits with 1 if one is wrong.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Tokenizer, load_rows, new_record  # noqa: E402
from model import CachedRows, KVCache, Llama, Slot, read_config  # noqa: E402
from train import PAPER_TRAINING, Batches, fit, save  # noqa: E402

SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "3B": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOLERANCE = 1e-4  # of fp32 logits of random weights, and of losses
TOLERANCE_TRAINED = 1e-3  # of fp32 logits of trained weights, which are much larger
TEXT = "The capital of France is Paris, and the capital of Italy is"
STRAY = [11, 12, 13]  # any three tokens

# ---- Loading -------------------------------------------------------------------------------------

LOAD = """
import re, sys
from model import Llama

def peak():  # Linux alone has it
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024

folder, vocab_size = sys.argv[1], int(sys.argv[2])
before = peak()
model = Llama.from_pretrained(folder, vocab_size=vocab_size)
assert model.lm_head.weight.shape[0] == vocab_size
sum(float(parameter.sum()) for parameter in model.parameters())  # touches every page
print((peak() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


def loading_peak(folder: str, vocab_size: int) -> float:
    """The peak memory of a process that loads the checkpoint, its vocabulary grown to a size, over
    the memory of the model."""
    command = [sys.executable, "-c", LOAD, folder, str(vocab_size)]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(loaded.stdout)


# ---- Decoding with the cache ---------------------------------------------------------------------


def feed(
    model: Llama, cache: KVCache, rows: list[list[Slot]], texts: list[list[int]]
) -> torch.Tensor:
    """Append texts, all of one length, to rows, which are lists of slots, all of one length; the
    logits after each, (B, V)."""
    for row, text in zip(rows, texts):
        row.extend(cache.lend() for _ in text)
    length = len(rows[0])
    slots = torch.zeros(len(rows), length, dtype=torch.int64)
    for numbers, row in zip(slots, rows):
        numbers[:] = torch.tensor([slot.number for slot in row])
    positions = torch.arange(length - len(texts[0]), length).expand(len(rows), -1)
    cached_rows = CachedRows(cache, slots, positions)
    return model(torch.tensor(texts), cached_rows=cached_rows)[:, -1]


@torch.inference_mode()
def greedy(model: Llama, prompt: list[int], new: int) -> list[list[int]]:
    """Two rows of `new` tokens: one goes straight on from the prompt, one has strayed for three
    tokens first and stepped back."""
    slots = len(prompt) + len(STRAY) + 2 * new
    cache = KVCache(model.config, slots, "cpu", torch.float32)
    straight = []
    logits = feed(model, cache, [straight], [prompt])
    astray = list(straight)  # a fork copies the list of slots
    feed(model, cache, [astray], [STRAY])
    del astray[len(prompt) :]  # a step back cuts it
    tokens = [logits.argmax(-1).expand(2)]
    while len(tokens) < new:
        texts = tokens[-1][:, None].tolist()
        logits = feed(model, cache, [straight, astray], texts)
        tokens.append(logits.argmax(-1))
    return torch.stack(tokens, 1).tolist()


@torch.inference_mode()
def largest_difference(ours: Llama, theirs: transformers.LlamaForCausalLM, ids) -> float:
    """Of the logits; a row that our vocabulary has grown by is left out."""
    expected = theirs(ids).logits
    return float((ours(ids)[..., : expected.shape[-1]] - expected).abs().max())


def compare_greedy(ours: Llama, theirs, ids: torch.Tensor, new: int) -> tuple[bool, list[int]]:
    """Are both rows what transformers decodes? And what that is."""
    expected = theirs.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
    expected = expected[0, ids.shape[1] :].tolist()
    return greedy(ours, ids[0].tolist(), new) == [expected, expected], expected


# ---- Random weights ------------------------------------------------------------------------------


def full_config(size: str, layers: int | None) -> transformers.LlamaConfig:
    shape = dict(SHAPES[size])
    if layers:
        shape["num_hidden_layers"] = layers
    return transformers.LlamaConfig(
        vocab_size=128256,
        intermediate_size=8192,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
        **shape,
    )


def write_random(config: transformers.LlamaConfig, folder: str) -> None:
    tokenizer = Tokenizer.digits()
    config.eos_token_id = tokenizer.eos
    Llama(read_config(config.to_dict())).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_random(config: transformers.LlamaConfig, size: str, whole: bool) -> bool:
    """Prints what is found; returns whether all is right."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.save_pretrained(folder, max_shard_size="2GB")
        ratio = loading_peak(folder, config.vocab_size + 1)
        ours = Llama.from_pretrained(folder, dtype=torch.float32)
        ids = torch.randint(0, 128000, (1, 64))
        difference = largest_difference(ours, theirs, ids)
        equal, _ = compare_greedy(ours, theirs, ids, 16)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(f"Llama-3.2-{size}, {config.num_hidden_layers} layers, {parameters:,} parameters")
    print(f"logits: largest difference {difference:.1e}")
    print(f"greedy, straight on and after a step back: equal: {equal}")
    print(f"loading: {ratio:.2f} times the model at its peak")
    return difference <= TOLERANCE and equal and (ratio <= 1.2 or not whole)


# ---- A real checkpoint ---------------------------------------------------------------------------


def open_theirs(folder: str) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def grow(theirs: transformers.LlamaForCausalLM, vocab_size: int) -> None:
    """What `Llama.from_pretrained` does: new rows of the embedding, and of a head that is not tied,
    are the mean of the old."""
    old = theirs.config.vocab_size
    theirs.resize_token_embeddings(vocab_size, mean_resizing=False)
    for layer in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
        layer.weight[old:] = layer.weight[:old].mean(0)


def training_loss(model: Llama, batches: Batches) -> float:
    """The loss that `fit` reports of one step; the model has taken it."""
    losses = []
    fit(model, batches, 1, PAPER_TRAINING, report=lambda loss, *rest: losses.append(loss))
    return losses[0]


def check_checkpoint(folder: str) -> bool:
    """Prints what is found; returns whether all is right."""
    tokenizer = Tokenizer.from_pretrained(folder, add_backtrack=True)
    ours = Llama.from_pretrained(folder, dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    theirs = open_theirs(folder)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{folder}, {ours.config.num_hidden_layers} layers, {parameters:,} parameters")
    ratio = loading_peak(folder, ours.config.vocab_size + 1)
    print(f"loading: {ratio:.2f} times the model at its peak")

    tokens = tokenizer.backend.encode(TEXT).ids
    same_tokens = tokens == transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    print(f"tokens of a text: equal: {same_tokens}")
    ids = torch.tensor([tokens])
    difference = largest_difference(ours, theirs, ids)
    print(f"logits: largest difference {difference:.1e}")
    equal, written = compare_greedy(ours, theirs, ids, 16)
    print(f"greedy, straight on and after a step back: equal: {equal}")
    print(repr(TEXT), "->", repr(tokenizer.decode(written)))

    record = new_record(seed=0, sizes=[4])
    batches = Batches(load_rows("train", record, 256), tokenizer, 16)
    grow(theirs, tokenizer.vocab_size)
    [(ids, labels)] = batches[0][0]  # the only part of the first step
    with torch.inference_mode():
        expected = float(theirs(ids, labels=labels).loss)
    loss = training_loss(ours, batches)
    print(f"loss of a training step: {loss:.6f}, transformers: {expected:.6f}")

    with tempfile.TemporaryDirectory() as saved:
        save(saved, ours, tokenizer, record, [])
        ours.save_pretrained(saved, torch.float32)  # in place of bf16
        trained = largest_difference(ours, open_theirs(saved), ids)
        reopened = transformers.AutoTokenizer.from_pretrained(saved)
    same_token = reopened.convert_tokens_to_ids("<backtrack>") == tokenizer.backtrack
    print(f"the model after it, saved and opened: largest difference {trained:.1e}", end="")
    print(f"; <backtrack> is token {tokenizer.backtrack} there, too: {same_token}")
    close = max(difference, trained) <= TOLERANCE_TRAINED and abs(loss - expected) <= TOLERANCE
    return same_tokens and equal and close and same_token


# ---- The command ---------------------------------------------------------------------------------


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--size", choices=SHAPES, default="1B")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--ckpt", help="a folder with a real checkpoint")
    parser.add_argument("--save", help="a folder for our model with random weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.ckpt:
        right = check_checkpoint(args.ckpt)
    elif args.save:
        write_random(full_config(args.size, args.layers), args.save)
        right = True
    else:
        config = full_config(args.size, args.layers)
        right = check_random(config, args.size, whole=args.layers is None)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
