"""Our search and training against transformers', in one run: the same weights, dtype, problems and
rows, taken in turns.

    python tests/benchmark.py                    all parts, on whatever device there is
    python tests/benchmark.py --parts search     problems and tokens a second; the peer is generate,
                                                 with plain and with beam sampling
    python tests/benchmark.py --parts growth     how the cost grows with n, b and the problems
    python tests/benchmark.py --parts llama      the search part: Llama-3.2-1B's architecture,
                                                 random weights (on a CPU: two layers)
    python tests/benchmark.py --parts training   rows a second of `fit`, and of Trainer with the
                                                 reference's settings

The peer decodes one problem at a time and trains at batch 16 with gradient checkpointing, as the
reference does. Tokens are counted as a user counts them, every sample's own. The device's limit is
the larger of operations over the measured rate of a large product and bytes (weights once a step,
keys and values of every row) over the measured bandwidth of a large copy.
"""

import argparse
import contextlib
import gc
import io
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Tokenizer, load_record, load_rows, new_record  # noqa: E402
from model import DTYPES, Llama, LlamaConfig, best_dtype, device_rank_world  # noqa: E402
from search import PAPER_SEARCH, SHIPPED, Settings, search_all  # noqa: E402
from train import PAPER_TRAINING, Batches, fit  # noqa: E402

# ---- Measuring -----------------------------------------------------------------------------------


def processor(device: torch.device) -> str:
    """The name of what computes: the GPU's, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # Linux alone has it
    if about.exists():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(work: Callable) -> float:
    """Seconds that work() takes, the device's queue emptied before and after."""
    gc.collect()
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def in_turns(works: dict, rounds: int) -> dict:
    """The median seconds of each work, after a warm-up. They take turns, so that a slow minute of
    the machine hits all alike."""
    seconds = {name: [] for name in works}
    for round in range(rounds + 1):
        for name, work in works.items():
            taken = clock(work)
            if round > 0:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_memory() -> str:
    """The most that was held at any time so far."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB resident"


def device_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product; bytes a second, read and written, of a large copy."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 2048
    count = 2**30 if on_gpu else 2**27
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}
    seconds = in_turns(works, rounds=5)
    return 2 * size**3 / seconds["product"], 2 * count / seconds["copy"]


@contextlib.contextmanager
def counted(model: Llama):
    """What passes the model meanwhile: steps (forward calls), tokens, and the slots of the cache
    that these look at. Slot 0 holds no token: it fills up a shape."""
    count = {"steps": 0, "tokens": 0, "cached": 0}

    def hook(module, arguments, keywords):
        cached_rows = keywords["cached_rows"]
        tokens = int((cached_rows.new_slots > 0).sum())
        count["steps"] += 1
        count["tokens"] += tokens
        count["cached"] += tokens * cached_rows.slots.shape[1]

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    yield count
    handle.remove()


def share_of_limit(model: Llama, count: dict, share: float, seconds: float, rates: tuple) -> float:
    """The least time that the counted work, times `share`, could take on this device, over the time
    that it took."""
    config = model.config
    head = model.lm_head.weight
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    weights = layers + head.numel()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    operations = 2 * weights * count["tokens"] * share
    moved = weights * count["steps"] + per_token * count["cached"] * share
    operations_a_second, bytes_a_second = rates
    least = max(operations / operations_a_second, moved * head.itemsize / bytes_a_second)
    return least / seconds


# ---- Search --------------------------------------------------------------------------------------


def peer_search(
    peer, tokenizer: Tokenizer, problems: list[dict], settings: Settings, **beams
) -> int:
    """The reference's way: `generate` on one problem at a time. Returns the number of tokens
    sampled."""
    ends = torch.tensor([tokenizer.eos, tokenizer.backtrack], device=peer.device)
    total = 0
    for prompt in tokenizer.prompts(problems):
        ids = torch.tensor([prompt], device=peer.device)
        sequences = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            pad_token_id=tokenizer.eos,
            eos_token_id=ends.tolist(),
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=settings.n,
            **beams,
        )
        responses = sequences[:, len(prompt) :]
        alive = torch.ones_like(responses[:, 0], dtype=torch.bool)
        for column in responses.T:
            total += int(alive.sum())
            alive &= ~torch.isin(column, ends)
    return total


def search(model: Llama, tokenizer: Tokenizer, problems: list[dict], settings: Settings) -> int:
    """Our way. Returns the number of tokens sampled, those that samples share once for each."""
    total = 0
    for _, responses in search_all(model, tokenizer, problems, range(len(problems)), settings):
        total += sum(path.count * (len(path.tokens) - path.inherited) for path in responses)
    return total


def as_peer(model: Llama) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' model."""
    head = model.lm_head.weight
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, head.dtype)
        peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=head.dtype)
    return peer.to(head.device).eval()


def search_part(
    model: Llama, tokenizer: Tokenizer, problems: list[dict], settings: Settings, args
) -> None:
    peer = as_peer(model)
    few = problems[: args.peer_problems]
    straight = replace(settings, b=0)
    stepping_back = replace(settings, b=1)
    works = {
        "ours, b = 0": lambda: search(model, tokenizer, problems, straight),
        "ours, b = 1": lambda: search(model, tokenizer, problems, stepping_back),
        "generate, plain sampling": lambda: peer_search(peer, tokenizer, few, settings),
        "generate, beam sampling": lambda: peer_search(
            peer, tokenizer, few, settings, num_beams=settings.n
        ),
    }
    tokens = {}
    for name, work in works.items():
        with counted(model) as count:
            tokens[name] = work()
        if name == "ours, b = 0":
            count_straight = count
    seconds = in_turns(works, args.rounds)

    title = f"n = {settings.n}"
    best = len(problems) / seconds["ours, b = 0"]
    print(f"{title:28}{'problems/s':>12}{'tokens/s':>12}{'ours is':>12}")
    for name, taken in seconds.items():
        done = len(problems if name.startswith("ours") else few)
        rate = done / taken
        print(f"{name:28}{rate:12.2f}{tokens[name] / taken:12.0f}{best / rate:11.1f}x")

    straight_each = seconds["ours, b = 0"] / tokens["ours, b = 0"]
    back_each = seconds["ours, b = 1"] / tokens["ours, b = 1"]
    ratio = back_each / straight_each
    print(f"time a token, b = 1 over b = 0: {ratio:.2f}; peak memory {peak_memory()}")

    head = model.lm_head.weight
    rates = device_rates(head.device, head.dtype)
    sampled = tokens["ours, b = 0"]
    passed = count_straight["tokens"]
    print(f"measured: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.0f} GB/s; ", end="")
    print(f"tokens through the model at b = 0: {passed} for {sampled} sampled")
    shares = {"computed, shared prefixes once": 1.0, "sampled, each by itself": sampled / passed}
    for what, share in shares.items():
        reached = share_of_limit(model, count_straight, share, seconds["ours, b = 0"], rates)
        print(f"share of the device's limit, counting the tokens {what}: {reached:.1%}")


def growth_part(model: Llama, tokenizer: Tokenizer, draw: Callable, args) -> None:
    """How time and memory grow with the problems, and time with n. The peak of memory is the
    highest so far, so that the few problems come first."""
    most = max(args.problems, 4096)
    problems = draw(most)
    settings = Settings(**PAPER_SEARCH, n=args.n, b=1)
    print()
    for num in (64, 256, 1024, 4096, 16384):
        if num > most:
            break
        taken = clock(partial(search, model, tokenizer, problems[:num], settings))
        rate = num / taken
        what = f"{num:5} problems, n = {args.n}: {taken:7.2f} s, {rate:6.1f} problems/s"
        print(f"{what}, peak memory {peak_memory()}", flush=True)

    few = problems[:256]
    works = {}
    for n in (8, 16, 32, 64, 128):
        works[n] = partial(search, model, tokenizer, few, replace(settings, n=n))
    seconds = in_turns(works, args.rounds)
    words = [f"n = {n}: {taken:.2f} s" for n, taken in seconds.items()]
    print("256 problems, b = 1:  " + "   ".join(words))
    print(f"n = 128 costs {seconds[128] / seconds[32]:.2f} times n = 32")


def llama_part(tokenizer: Tokenizer, draw: Callable, device, dtype: torch.dtype, args) -> None:
    """The search part on Llama-3.2-1B's architecture; on a CPU with fewer layers and problems."""
    config = LlamaConfig()
    problems = args.problems
    if device.type != "cuda":
        config.num_hidden_layers = 2
        problems = 4
        args = argparse.Namespace(**{**vars(args), "peer_problems": 1, "rounds": 1})
    torch.manual_seed(0)
    large = Llama(config).to(device, dtype).eval()
    layers = config.num_hidden_layers
    print(f"\nsearch: Llama-3.2-1B's architecture, {layers} layers, random weights, 40 new tokens")
    settings = Settings(**PAPER_SEARCH, n=args.n, max_new_tokens=40, cache_gib=args.cache_gib)
    search_part(large, tokenizer, draw(problems), settings, args)


# ---- Training ------------------------------------------------------------------------------------


def peer_training(model: Llama, tokenizer: Tokenizer, rows: list[dict], dtype: torch.dtype) -> None:
    """Trainer with the reference's settings: batch 16, gradient checkpointing, padded to the
    longest row of all."""
    encoded = tokenizer.encode_rows(rows)
    longest = max(len(ids) for ids, _ in encoded)
    examples = []
    for ids, labels in encoded:
        padding = longest - len(ids)
        example = {
            "input_ids": ids + [tokenizer.eos] * padding,
            "labels": labels + [-100] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
        }
        examples.append(example)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, torch.float32)
        peer = transformers.LlamaForCausalLM.from_pretrained(folder)
        settings = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            weight_decay=0.01,
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=model.lm_head.weight.is_cpu,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            transformers.Trainer(peer, settings, train_dataset=examples).train()


def training_part(
    model: Llama, tokenizer: Tokenizer, rows: list[dict], dtype: torch.dtype, args
) -> None:
    def ours(size: int, compiled: bool = False) -> Callable:
        batches = Batches(rows, tokenizer, size)
        steps = len(rows) // size
        return lambda: fit(model, batches, steps, PAPER_TRAINING, dtype, compiled)

    works = {f"fit, batch {size}": ours(size) for size in (16, 64, 256)}
    works["fit, batch 256, compiled"] = ours(256, compiled=True)  # compiled in the warm-up
    works["Trainer, batch 16"] = lambda: peer_training(model, tokenizer, rows, dtype)
    seconds = in_turns(works, args.rounds)
    slow = seconds["Trainer, batch 16"]
    print(f"\n{'training':28}{'rows/s':>12}{'ratio':>12}")
    for name, taken in seconds.items():
        print(f"{name:28}{len(rows) / taken:12.1f}{slow / taken:11.1f}x")


# ---- The command ---------------------------------------------------------------------------------

PARTS = ("search", "growth", "llama", "training")


def arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    args = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    args.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args.add_argument("--ckpt", default=str(SHIPPED))
    args.add_argument("--n", type=int, default=32)
    problems = "of the search part; growth goes up to 4096, and to 16384 if these are as many"
    args.add_argument("--problems", type=int, default=256, help=problems)
    few = "the peer's time goes with the number of problems exactly"
    args.add_argument("--peer_problems", type=int, default=16, help=few)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--dtype", choices=DTYPES)
    cache = "the llama part's, for keys and values: 128 states of 32 samples need 6"
    args.add_argument("--cache_gib", type=float, default=8.0, help=cache)
    return args.parse_args()


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    device = device_rank_world()[0]
    dtype = DTYPES.get(args.dtype) or best_dtype(device)
    tokenizer = Tokenizer.from_pretrained(args.ckpt)
    record = load_record(args.ckpt)
    print(
        f"{processor(device)}: {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, ",
        end="",
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")

    def draw(num: int) -> list[dict]:
        return load_rows("val", record, num)

    model = Llama.from_pretrained(args.ckpt, device, dtype).eval()
    if "search" in args.parts:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"\nsearch: {args.ckpt}, {parameters:,} parameters, {args.problems} problems")
        search_part(model, tokenizer, draw(args.problems), Settings(**PAPER_SEARCH, n=args.n), args)
    if "growth" in args.parts:
        growth_part(model, tokenizer, draw, args)
    if "llama" in args.parts:
        llama_part(tokenizer, draw, device, dtype, args)
    if "training" in args.parts:
        fresh = Llama(model.config).to(device)
        rows = load_rows("train", new_record(0, [3]), 2048)
        training_part(fresh, tokenizer, rows, dtype, args)


if __name__ == "__main__":
    main()
