"""Our search and training against transformers', in one run: the same weights, dtype, problems and rows, taken in turns.

    python tests/benchmark.py                      all parts, on whatever device there is
    python tests/benchmark.py --parts search       problems and tokens a second; peer: generate, plain and beam sampling
    python tests/benchmark.py --parts growth       how the cost grows with n, b and the number of problems
    python tests/benchmark.py --parts llama        the search part: Llama-3.2-1B, random weights (on CPU: two layers)
    python tests/benchmark.py --parts training     rows a second of `fit` and of Trainer with the reference's settings

The peer decodes one problem at a time and trains at batch 16 with gradient checkpointing, as the reference does. Tokens are
counted as a user counts them, every sample's own. The device's limit is the larger of operations over the measured rate of a
large product and bytes (weights once a step, keys and values of every row) over the measured bandwidth of a large copy.
"""
import argparse
import contextlib
import gc
import io
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import SPLITS, Tokenizer, load_record, load_rows, new_record  # noqa: E402
from model import DTYPES, Llama, LlamaConfig, best_dtype, start  # noqa: E402
from search import SHIPPED, decode  # noqa: E402
from train import Batches, fit  # noqa: E402

TEMPERATURE = 0.7                                                             # the paper's
PLAIN = {"temperature": TEMPERATURE, "min_p": 0.0, "paper": True}       # samples as the peer draws them


def clock(work) -> tuple[float, object]:
    """Seconds that work() takes, the device's queue emptied before and after; and its result."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def in_turns(works: dict, rounds: int) -> dict:
    """The median seconds of each work, taken in turns so that a slow minute of the machine hits all alike; one warm-up."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            taken = clock(work)[0]
            seconds[name] += [taken] if i else []
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB resident"


def device_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured operations a second of a large product, and bytes a second (read and written) of a large copy."""
    size, many = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(many, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, 5)
    return 2 * size**3 / seconds["product"], 2 * many / seconds["copy"]


@contextlib.contextmanager
def counted(model: Llama):
    """What passes the model meanwhile: steps (forward calls), tokens, and the cached tokens that these look back at."""
    count = {"steps": 0, "tokens": 0, "cached": 0}

    def hook(module, arguments, keywords):
        ids, cache = (*arguments, None)[0], keywords.get("cache")
        # rows of one token that hold nothing only fill up a shape
        tokens = ids.numel() if cache is None or ids.shape[1] > 1 else int((cache.length[:len(ids)] > 0).sum())
        count["steps"] += 1
        count["tokens"] += tokens
        count["cached"] += tokens * (cache.width if cache is not None else ids.shape[1])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    yield count
    handle.remove()


def share_of_limit(model: Llama, count: dict, share: float, seconds: float, rates: tuple[float, float]) -> float:
    """The least time that the counted work, times `share`, could take on this device, over the time that it took."""
    config, weights = model.config, sum(p.numel() for p in model.model.layers.parameters())
    size = model.lm_head.weight.element_size()
    head = model.lm_head.weight.numel()
    operations = 2 * (weights + head) * count["tokens"] * share
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    moved = count["steps"] * (weights + head) * size + kv * count["cached"] * share
    return max(operations / rates[0], moved / rates[1]) / seconds


def peer_search(peer, tok: Tokenizer, problems: list[dict], n: int, max_new: int, **how) -> int:
    """The reference's way: `generate` on one problem at a time. Returns the number of tokens sampled."""
    ends, total = torch.tensor([tok.eos, tok.backtrack], device=peer.device), 0
    for prompt in tok.prompts(problems):
        ids = torch.tensor([prompt], device=peer.device)
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_k=0,
                            pad_token_id=tok.eos, eos_token_id=ends.tolist(), max_new_tokens=max_new,
                            num_return_sequences=n, **how)[:, len(prompt):]
        alive = torch.ones_like(out[:, 0], dtype=torch.bool)
        for column in out.T:
            total += int(alive.sum())
            alive &= ~torch.isin(column, ends)
    return total


def search_part(model: Llama, tok: Tokenizer, problems: list[dict], max_new: int, args) -> None:
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, dtype)
        peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    few = problems[:args.peer_problems]

    def ours(b: int):
        return list(decode(model, tok, problems, range(len(problems)), "self_backtrack", b, args.n, max_new=max_new, **PLAIN))

    tokens, counts = {}, {}
    for b in (0, 1):
        with counted(model) as counts[b]:
            tokens[b] = sum(len(s.tokens) - s.state for _, samples in ours(b) for s in samples)
    plain = peer_search(peer, tok, few, args.n, max_new)
    beam = dict(num_beams=args.n)
    beamed = peer_search(peer, tok, few, args.n, max_new, **beam)
    seconds = in_turns({"ours, b = 0": lambda: ours(0), "ours, b = 1": lambda: ours(1),
                        "generate, plain sampling": lambda: peer_search(peer, tok, few, args.n, max_new),
                        "generate, beam sampling": lambda: peer_search(peer, tok, few, args.n, max_new, **beam)},
                       args.rounds)
    done = dict(zip(seconds, ((len(problems), tokens[0]), (len(problems), tokens[1]), (len(few), plain), (len(few), beamed))))
    best = done["ours, b = 0"][0] / seconds["ours, b = 0"]
    print(f"{'n = ' + str(args.n):28}{'problems/s':>12}{'tokens/s':>12}{'ours is':>12}")
    for name, taken in seconds.items():
        rate = done[name][0] / taken
        print(f"{name:28}{rate:12.2f}{done[name][1] / taken:12.0f}{best / rate:11.1f}x")
    each = [seconds[f"ours, b = {b}"] / tokens[b] for b in (0, 1)]
    rates = device_rates(device, dtype)
    print(f"time a token, b = 1 over b = 0: {each[1] / each[0]:.2f}; peak memory {peak_memory()}")
    print(f"measured: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.0f} GB/s; tokens through the model at b = 0: "
          f"{counts[0]['tokens']} for {tokens[0]} sampled")
    for what, share in (("computed, shared prefixes once", 1.0), ("sampled, each by itself", tokens[0] / counts[0]["tokens"])):
        reached = share_of_limit(model, counts[0], share, seconds["ours, b = 0"], rates)
        print(f"share of the device's limit, counting the tokens {what}: {reached:.1%}")


def growth_part(model: Llama, tok: Tokenizer, draw, args) -> None:
    problems = draw(4096)

    def work(num: int, n: int):
        def run() -> None:
            for _ in decode(model, tok, problems[:num], range(num), "self_backtrack", 1, n, **PLAIN):
                pass
        return run

    print()
    for num in (64, 256, 1024, 4096):                       # the peak is a high-water mark: first the few, then the many
        taken = clock(work(num, args.n))[0]
        print(f"{num:5} problems, n = {args.n}: {taken:7.2f} s, {num / taken:6.1f} problems/s, peak memory {peak_memory()}")
    seconds = in_turns({n: work(256, n) for n in (8, 16, 32, 64, 128)}, args.rounds)
    print("256 problems, b = 1:  " + "   ".join(f"n = {n}: {s:.2f} s" for n, s in seconds.items()))
    print(f"n = 128 costs {seconds[128] / seconds[32]:.2f} times n = 32")


def peer_training(model: Llama, tok: Tokenizer, rows: list[dict], dtype: torch.dtype) -> None:
    """Trainer with the reference's settings: batch 16, gradient checkpointing, padded to the longest row of all."""
    encoded = tok.rows(rows)
    longest = max(len(ids) for ids, _ in encoded)
    data = [{"input_ids": ids + [tok.eos] * (longest - len(ids)), "labels": labels + [-100] * (longest - len(ids)),
             "attention_mask": [1] * len(ids) + [0] * (longest - len(ids))} for ids, labels in encoded]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, torch.float32)
        peer = transformers.LlamaForCausalLM.from_pretrained(folder)
        settings = transformers.TrainingArguments(
            folder, per_device_train_batch_size=16, num_train_epochs=1, learning_rate=1e-5, lr_scheduler_type="cosine",
            warmup_steps=1, weight_decay=0.01, bf16=dtype == torch.bfloat16, gradient_checkpointing=True, save_strategy="no",
            report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=model.lm_head.weight.is_cpu)
        with contextlib.redirect_stdout(io.StringIO()):
            transformers.Trainer(peer, settings, train_dataset=data).train()


def training_part(model: Llama, tok: Tokenizer, rows: list[dict], sizes: list[int], dtype: torch.dtype, args) -> None:
    def ours(size: int, compiled=False):
        return lambda: fit(model, Batches(rows, tok, size), len(rows) // size, 1e-5, 1, 0.01, False, dtype, compiled)

    works = {f"fit, batch {size}": ours(size) for size in sizes}
    works[f"fit, batch {sizes[-1]}, compiled"] = ours(sizes[-1], True)                # compiled in the warm-up round
    seconds = in_turns(works | {"Trainer, batch 16": lambda: peer_training(model, tok, rows, dtype)}, args.rounds)
    slow = seconds["Trainer, batch 16"]
    print(f"\n{'training':28}{'rows/s':>12}{'ratio':>12}")
    for name, taken in seconds.items():
        print(f"{name:28}{len(rows) / taken:12.1f}{slow / taken:11.1f}x")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["search", "growth", "llama", "training"]
    args.add_argument("--parts", nargs="+", choices=parts, default=parts)
    args.add_argument("--ckpt", default=str(SHIPPED))
    args.add_argument("--n", type=int, default=32)
    args.add_argument("--problems", type=int, default=256)
    args.add_argument("--peer_problems", type=int, default=16, help="the peer's time goes with the number of problems exactly")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--dtype", choices=DTYPES)
    args = args.parse_args()
    transformers.logging.set_verbosity_error()
    device = start()[0]
    dtype = DTYPES.get(args.dtype) or best_dtype(device)
    tok, record = Tokenizer.from_pretrained(args.ckpt), load_record(args.ckpt)
    print(f"{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")

    def draw(num: int) -> list[dict]:
        return load_rows("val", record, num)

    model = Llama.from_pretrained(args.ckpt, device, dtype).eval()
    if "search" in args.parts:
        print(f"\nsearch: {args.ckpt}, {sum(p.numel() for p in model.parameters()):,} parameters, {args.problems} problems")
        search_part(model, tok, draw(args.problems), 64, args)
    if "growth" in args.parts:
        growth_part(model, tok, draw, args)
    if "llama" in args.parts:
        cut = {} if device.type == "cuda" else {"num_hidden_layers": 2}
        torch.manual_seed(0)
        large = Llama(LlamaConfig(rope_theta=500000.0, **cut)).to(device, dtype).eval()
        small = args if device.type == "cuda" else argparse.Namespace(**{**vars(args), "peer_problems": 1, "rounds": 1})
        print(f"\nsearch: Llama-3.2-1B's architecture, {large.config.num_hidden_layers} layers, random weights, 40 new tokens")
        search_part(large, tok, draw(args.problems if device.type == "cuda" else 4), 40, small)
    if "training" in args.parts:
        fresh = Llama(model.config).to(device)
        rows = load_rows(SPLITS[0], new_record(0, [3]), 2048)
        training_part(fresh, tok, rows, [16, 64, 256], dtype, args)


if __name__ == "__main__":
    main()
