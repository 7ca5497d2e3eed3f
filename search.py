"""Self-backtracking: search by sampling, stepping back and branching. Read after data.py, before train.py.

The model says `<backtrack>` when its last action was a mistake. The search of the paper's section 4.2 believes it: it samples
n continuations of a state; each that ends in `<backtrack>` drops its last action, and what is left becomes a new state to
branch from; after b such rounds the finished answer with the best mean log-probability wins. No verifier takes part.
"""
import itertools, json, math, os, re, sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import BACKTRACK, GOAL, Tokenizer, load_rows, load_record
from model import DTYPES, Arguments, KVCache, Llama, UserError, best_dtype, cli, number, replacing, start

SHIPPED = Path(__file__).parent / "assets" / "checkpoint"
EXAMPLE = {"nums": [18, 6, 29], "target": 79}
DECODERS = ("greedy", "beam", "best_of_n", "majority", "self_backtrack")

# ---- Verification: exact, on integers, and never part of the search ------------------------------------------------------
def verify(nums: list[int], target: int, response: str) -> tuple[bool, str]:
    """Does the response solve the problem? (True, "") or (False, which step fails and why).
    Every action must be `a op b=c` on numbers that are there, each copy used once, with the right result (division exact,
    nothing negative); all numbers must be used, the last result be the target, and `Goal Reached!` end the response."""
    *actions, end = response.split("\n")
    left = Counter(nums)
    for i, text in enumerate(actions, 1):
        step = re.fullmatch(r"([0-9]{1,20})([-+*/])([0-9]{1,20})=([0-9]{1,20})", text)
        if not step:
            return False, f"step {i}: {text!r} is no action"
        a, op, b, result = int(step[1]), step[2], int(step[3]), int(step[4])
        for x in (a, b):
            if not left[x]:
                return False, f"step {i}: {text}: there is no {x} (left)"
            left[x] -= 1
        right = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else "not whole"}[op]
        if right != result:
            return False, f"step {i}: {text}: false, it is {right}"
        left[result] += 1
    if end != GOAL:
        return False, f"the end: {end!r} in place of {GOAL!r}"
    left = list(left.elements())
    return (True, "") if left == [target] else (False, f"the end: {left} are left in place of the target {target} alone")

def mix(key: torch.Tensor, part: torch.Tensor | int) -> torch.Tensor:
    """Hash `part` into int64 keys (splitmix64's finaliser; products wrap, shifts are made logical by masks)."""
    x = key * 31 + part - 0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)

def uniform(key: torch.Tensor) -> torch.Tensor:
    """Keys -> fp32 uniform in [0, 1). A sample's randomness depends on its keys alone, never on who shares its batch."""
    return (mix(key, 0) >> 40 & (1 << 24) - 1).float() / (1 << 24)

# ---- The engine: cached decoding of many rows ----------------------------------------------------------------------------
class Sample(NamedTuple):
    """One response that was sampled: its tokens from the prompt's end on, `state` of them inherited from its state."""
    tokens: tuple[int, ...]
    logps: tuple[float, ...]          # log-probability of each token at temperature 1
    state: int
    round: int
    end: str                          # GOAL, BACKTRACK, or "" where the length limit cut it off or it ended elsewhere

    @property
    def score(self) -> float:
        """Mean log-probability of all tokens, end-of-text included: the paper's measure, no verifier in it."""
        return sum(self.logps) / len(self.logps)

def prefill(model: Llama, prompts: list[list[int]], room: int) -> tuple[KVCache, torch.Tensor]:
    """Run prompts through the model once, together: a cache with a row each, and the logits after each prompt, (P, V)."""
    device = model.lm_head.weight.device
    length = torch.tensor([len(p) for p in prompts], device=device)
    ids = pad_sequence([torch.tensor(p, device=device) for p in prompts], batch_first=True)
    cache = KVCache(model.config, len(prompts), ids.shape[1] + room, device, model.lm_head.weight.dtype)
    logits = model(ids, cache=cache, keep=length - 1)
    cache.rollback(length)                                                     # the padding goes out of sight
    return cache, logits

def draw(logits: torch.Tensor, row: torch.Tensor, u: torch.Tensor, temperature: float):
    """A token for each sample, (S,), and its log-probability at temperature 1; sample s is on row[s] of logits (R, V).
    The token is where the cumulative distribution passes the sample's uniform u (S,). Temperature 0 is greedy decoding."""
    logps = logits.float().log_softmax(-1)
    if temperature == 0:
        return (token := logps.argmax(-1)[row]), logps[row, token]
    cumulative = (logps / temperature).softmax(-1).cumsum(-1)
    u = u * cumulative[row, -1]                                                # rounding leaves the last a little off 1
    token = torch.searchsorted(cumulative[row], u[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return token, logps[row, token]

def share(row: torch.Tensor, token: torch.Tensor, vocab: int):
    """Samples that are the same so far are one row: the rows that samples (S,) on rows `row` need after drawing `token`.
    Returns parents (R,), the old row that each new row continues; its token (R,); and each sample's new row (S,). The
    first child of a row stays in its place, where it costs nothing; the others fill the gaps: R children, R places."""
    child, of = torch.unique(row * vocab + token, return_inverse=True)         # sorted: children stand by their parents
    parent = child // vocab
    stays = (parent < len(child)) & (parent != torch.cat([parent.new_tensor([-1]), parent[:-1]]))
    free = torch.ones_like(stays)
    free[parent[stays]] = False
    place = torch.empty_like(child)
    place[stays], place[~stays] = parent[stays], free.nonzero()[:, 0]
    order = place.argsort()
    return parent[order], child[order] % vocab, place[of]

def expand(model: Llama, tok: Tokenizer, cache: KVCache, logits: torch.Tensor, keys: torch.Tensor, n: int,
           temperature: float, max_new: int, parked: KVCache | None):
    """Sample n continuations of the states in cache rows 0..F-1, whose next-token logits are (F, V), each to its end.
    keys (F,) int64 are the states' random keys. Rows fork where their samples part and leave the batch when all their
    samples have ended; those that ended in `<backtrack>` are kept in `parked`, to branch from. Returns, for the F * n
    samples in order: tokens and log-probabilities (F * n, max_new), lengths and parked rows (-1: none), (F * n,)."""
    S, device = len(keys) * n, logits.device
    live = torch.arange(S, device=device)
    row = live // n
    key = mix(keys[row], live % n)
    tokens = torch.full((S, max_new), tok.eos, device=device)
    logps = torch.zeros((S, max_new), device=device)
    length, parking, kept = torch.full_like(live, max_new), torch.full_like(live, -1), 0
    for t in range(max_new):
        token, logp = draw(logits, row, uniform(mix(key[live], t)), temperature)
        tokens[live, t], logps[live, t] = token, logp
        back, ended = token == tok.backtrack, (token == tok.backtrack) | (token == tok.eos)
        length[live[ended]] = t + 1
        if parked is not None and back.any():
            rows, which = torch.unique(row[back], return_inverse=True)
            parked.fork(rows, source=cache, at=kept)
            parking[live[back]] = kept + which
            kept += len(rows)
        live, row, token = live[~ended], row[~ended], token[~ended]
        if not len(live) or t == max_new - 1:
            break
        parents, token, row = share(row, token, logits.shape[1])
        cache.fork(parents)
        logits = model(token[:, None], cache=cache)[:, 0]
    return tokens, logps, length, parking

# ---- Self-backtracking (paper, section 4.2) ------------------------------------------------------------------------------
def roll_back(tokens: tuple[int, ...], tok: Tokenizer) -> tuple[int, ...]:
    """Drop `<backtrack>` and the last action: the state to branch from ends with the newline of the action before."""
    end = len(tokens) - 2                                  # before the action's last token, be it its newline or not
    while end > 0 and not tok.ends_line[tokens[end - 1]]:
        end -= 1
    return tokens[:max(end, 0)]

def finish(tokens: tuple[int, ...], tok: Tokenizer) -> str:
    """How a response ended: GOAL, BACKTRACK or ""."""
    goal = tokens[-1] == tok.eos and tok.decode(tokens).split("\n")[-1] == GOAL
    return GOAL if goal else BACKTRACK if tokens[-1] == tok.backtrack else ""

@torch.inference_mode()
def self_backtrack(model: Llama, tok: Tokenizer, problems: list[dict], keys: list[int], b: int, n: int, temperature: float,
                   max_new: int, limit: int | None = None, seed: int = 0) -> list[list[Sample]]:
    """Every sample of the search, for each problem {nums, target}; the random numbers are keyed by seed and `keys`.
    A problem's frontier holds at most `limit` states, by default int(sqrt(n)) as in the reference's first version. The prompt
    counts as visited: who steps back from the first action opens no branch, for n samples of the prompt are there already."""
    prompts = tok.prompts(problems)
    cache, logits = prefill(model, prompts, (b + 1) * max_new)
    parked = KVCache(model.config, len(prompts), cache.kv.shape[4], logits.device, cache.kv.dtype) if b else None
    problem_keys = mix(torch.full((len(keys),), seed, device=logits.device), torch.tensor(keys, device=logits.device))
    frontier = [(p, 0, (), (), None) for p in range(len(prompts))]    # problem, rank in its frontier, tokens, logps, parked row
    visited, found = [{()} for _ in prompts], [[] for _ in prompts]
    for round in range(b + 1):
        owner, rank = torch.tensor([state[:2] for state in frontier], device=logits.device).T
        state_keys = mix(mix(problem_keys[owner], round), rank)
        drawn = expand(model, tok, cache, logits, state_keys, n, temperature, max_new, parked if round < b else None)
        branches, joined = [], Counter()
        for i, (tokens, logps, length, parking) in enumerate(zip(*(x.tolist() for x in drawn))):
            p, _, state, before, _ = frontier[i // n]
            tokens, logps = state + tuple(tokens[:length]), before + tuple(logps[:length])
            found[p].append(Sample(tokens, logps, len(state), round, finish(tokens, tok)))
            if tokens[-1] == tok.backtrack and round < b and joined[p] < (limit or math.isqrt(n)):
                state = roll_back(tokens, tok)
                if state not in visited[p]:
                    visited[p].add(state)
                    branches.append((p, joined[p], state, logps[:len(state)], parking))
                    joined[p] += 1
        if not branches:
            break
        # A branch starts from its parent's row, cut back; only its last token runs again, for a cache holds no logits.
        rows, lengths, last = zip(*((row, len(prompts[p]) + len(state) - 1, state[-1]) for p, _, state, _, row in branches))
        cache.fork(torch.tensor(rows, device=logits.device), source=parked)
        cache.rollback(torch.tensor(lengths, device=logits.device))
        logits = model(torch.tensor(last, device=logits.device)[:, None], cache=cache)[:, 0]
        frontier = branches
    return found

@torch.inference_mode()
def beam_search(model: Llama, tok: Tokenizer, problems: list[dict], n: int, max_new: int) -> list[list[Sample]]:
    """The n most probable responses by beam search. A beam that ends leaves, and the problem goes on with one beam fewer."""
    cache, logits = prefill(model, tok.prompts(problems), max_new)
    (P, V), device = logits.shape, logits.device
    total = torch.tensor([[0.0] + [-torch.inf] * (n - 1)] * P, device=device)  # of each beam; -inf: there is none
    row = torch.arange(P, device=device)[:, None].expand(P, n)                 # of the cache
    logps = torch.zeros((P, n, max_new), device=device)
    tokens, room, found = logps.long(), torch.full((P,), n, device=device), [[] for _ in range(P)]
    for t in range(max_new):
        logp = logits.float().log_softmax(-1)
        total, best = (total[..., None] + logp[row]).flatten(1).topk(n)        # (P, n) of (P, n * V)
        parent, token = best // V, best % V
        tokens, logps = (x.gather(1, parent[..., None].expand_as(x)) for x in (tokens, logps))
        row = row.gather(1, parent)
        tokens[..., t], logps[..., t] = token, logp[row, token]
        total[torch.arange(n, device=device) >= room[:, None]] = -torch.inf
        ended = total.isfinite() & ((token == tok.eos) | (token == tok.backtrack) | (t == max_new - 1))
        for p, i in ended.nonzero().tolist():
            done = tuple(tokens[p, i, :t + 1].tolist())
            found[p].append(Sample(done, tuple(logps[p, i, :t + 1].tolist()), 0, 0, finish(done, tok)))
        room = room - ended.sum(1)
        total[ended] = -torch.inf
        live = total.isfinite()
        if not live.any():
            break
        cache.fork(row[live])
        logits = model(token[live][:, None], cache=cache)[:, 0]
        row = (live.flatten().cumsum(0) - 1).view(P, n).clamp(min=0)
    return found

# ---- Decoders, selection, evaluation -------------------------------------------------------------------------------------
def decode(model: Llama, tok: Tokenizer, problems: list[dict], keys: list[int], decoder: str = "self_backtrack", b: int = 1,
           n: int = 32, temperature: float = 0.7, max_new: int = 64, **search) -> list[list[Sample]]:
    """The samples of each problem by one of DECODERS. Best of n is self-backtracking that never steps back (b = 0)."""
    if decoder == "beam":
        return beam_search(model, tok, problems, n, max_new)
    n, temperature = (1, 0.0) if decoder == "greedy" else (n, temperature)
    return self_backtrack(model, tok, problems, keys, b * (decoder == "self_backtrack"), n, temperature, max_new, **search)

def select(samples: list[Sample], decoder: str) -> Sample | None:
    """The answer among the samples that reached the goal: the best score; for `majority` the most votes, then the score."""
    candidates = [sample for sample in samples if sample.end == GOAL]
    votes = Counter(sample.tokens for sample in candidates if decoder == "majority")
    return max(candidates, key=lambda sample: (votes[sample.tokens], sample.score), default=None)

def judge(tok: Tokenizer, problem: dict, samples: list[Sample], decoder: str) -> dict:
    """The answer selected, whether and why (not) it is right; `verified`: is any candidate, and `solution`: which."""
    nums, target, answer = problem["nums"], problem["target"], select(samples, decoder)
    response = tok.decode(answer.tokens) if answer else ""
    correct, reason = verify(nums, target, response) if answer else (False, "no sample reached the goal")
    texts = dict.fromkeys(tok.decode(s.tokens) for s in sorted(samples, key=lambda s: -s.score) if s.end == GOAL)
    solution = next((text for text in texts if verify(nums, target, text)[0]), None)
    return {"nums": nums, "target": target, "response": response, "score": answer and answer.score, "correct": correct,
            "reason": reason, "verified": solution is not None, "solution": solution,
            "tokens": sum(len(sample.tokens) - sample.state for sample in samples)}

def evaluate(model: Llama, tok: Tokenizer, problems: list[dict], decoder: str, offset=0, batch_size=64, **search) -> list[dict]:
    """`judge`'s row for every problem. Its samples are keyed by offset + i, so that neither batches nor ranks change them."""
    (_, rank, world), rows = start(), []
    mine = range(rank, len(problems), world)
    with tqdm(total=len(mine), desc=decoder, unit=" problems", leave=False, disable=rank > 0) as bar:
        for at in range(0, len(mine), batch_size):
            batch = [problems[i] for i in mine[at:at + batch_size]]
            found = decode(model, tok, batch, [offset + i for i in mine[at:at + batch_size]], decoder, **search)
            rows += [judge(tok, problem, samples, decoder) for problem, samples in zip(batch, found)]
            bar.update(len(batch))
    parts = gather(rows, model.lm_head.weight.device)
    return [parts[i % world][i // world] for i in range(len(problems))]

def gather(rows: list, device: torch.device) -> list[list]:
    """Every rank's rows, on every rank; as JSON bytes, for torch's own gathering of objects would unpickle."""
    if not dist.is_initialized():
        return [rows]
    text = json.dumps(rows).encode()
    longest = torch.tensor(len(text), device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    mine = torch.tensor(list(text.ljust(int(longest))), dtype=torch.uint8, device=device)       # JSON may end in blanks
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [json.loads(bytes(part.tolist())) for part in parts]

def interval(p: float, n: int, z: float = 1.96) -> str:
    """A share p of n problems in percent, with Wilson's 95 % interval."""
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2)
    low, high = (100 * abs(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:6.1f} [{low:4.1f}, {high:5.1f}]"

def compare(model: Llama, tok: Tokenizer, splits: dict[str, list[dict]], decoders: list[str], title="", **search) -> list[dict]:
    """Evaluate every decoder on the problems of every split and print a table, one line for each; the last one's rows."""
    rows, log = [], partial(print, flush=True) if start()[1] == 0 else lambda line: None
    log(f"{title:34}{'selected % [95 %]':>20}{'verified % [95 %]':>20}{'tokens':>13}")
    for split, decoder in itertools.product(splits, decoders):
        rows = evaluate(model, tok, splits[split], decoder, **search)
        selected, verified, tokens = (sum(row[key] for row in rows) / len(rows) for key in ("correct", "verified", "tokens"))
        log(f"{f'{decoder}, {split}':34}{interval(selected, len(rows))}{interval(verified, len(rows))}{tokens:13.1f}")
    return rows

def draw_tree(tok: Tokenizer, problem: dict, samples: list[Sample], answer: Sample | None, width: int = 5) -> str:
    """The actions of all samples as one tree, at most `width` branches a state, the most sampled first (100 columns)."""
    through, ends = Counter(), defaultdict(Counter)                # samples that pass an action; notes at an action, counted
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    for sample in samples:
        text = tok.decode(sample.tokens)
        path = tuple(text.removesuffix(BACKTRACK).removesuffix(GOAL).removesuffix("\n").split("\n"))
        through.update(path[:d] for d in range(1, len(path) + 1))
        note, colour = sample.end or "cut off", 33
        if sample.end == GOAL:
            right, why = verify(problem["nums"], problem["target"], text)
            note = f"goal {sample.score:.3f}, {'right' if right else why.split(': ')[-1]}"
            note, colour = note + " <= chosen" * (sample.tokens == answer.tokens), 32 if right else 31
        ends[path][note, colour] += 1
        if sample.state:
            state = tuple(tok.decode(sample.tokens[:sample.state]).split("\n")[:-1])
            ends[state][f"round {sample.round + 1} from here", 36] += 1

    def walk(path: tuple[str, ...], indent: str):
        children = sorted((c for c in through if c[:-1] == path), key=lambda c: -through[c])
        for child in children[:width]:
            last = child == children[-1]
            notes = [f"{note} x{count}" if plain else f"\033[{colour}m{note}\033[0m x{count}"
                     for (note, colour), count in ends[child].items()]
            yield f"{indent + ('└─ ' if last else '├─ ') + child[-1][:22]:30}{through[child]:<5}{'; '.join(notes)}"
            yield from walk(child, indent + ("   " if last else "│  "))
        if children[width:]:
            yield f"{indent}└─ {len(children) - width} more, x{sum(through[c] for c in children[width:])}"

    nobody = "" if answer else "  (no sample reached the goal)"
    head = f"numbers {problem['nums']}  target {problem['target']}{nobody}\n{'action':30}samples"
    return "\n".join([head, *walk((), "")])

def main() -> None:
    args = Arguments("Search with a checkpoint: one problem and its tree, an evaluation (--data), or by default both.")
    args.add_argument("--ckpt", default=str(SHIPPED), help="a folder or Hub id")
    args.add_argument("--numbers", type=number(int, 1), nargs="+", help="search this one problem and draw its tree")
    args.add_argument("--target", type=number(int, 0))
    args.add_argument("--data", help="val (seen targets), val_new (new targets), or a file of JSON Lines with nums, target")
    args.add_argument("--num", type=number(int, 1), default=200, help="problems")
    args.add_argument("--offset", type=number(int, 0), default=0, help="problems to pass over")
    args.add_argument("--decoder", choices=DECODERS, default="self_backtrack")
    args.add_argument("--b", type=number(int, 0), default=1, help="how often to step back")
    args.add_argument("--n", type=number(int, 1), default=32, help="samples a state; beams")
    args.add_argument("--temperature", type=number(float, 0.001), default=0.7)
    args.add_argument("--limit", type=number(int, 1), help="states in a frontier; int(sqrt(n)) by default")
    args.add_argument("--seed", type=number(int, 0), default=0)
    args.add_argument("--batch_size", type=number(int, 1), default=64, help="problems decoded together")
    args.add_argument("--max_new_tokens", type=number(int, 1), default=64, help="in a round")
    args.add_argument("--dtype", choices=DTYPES, help="the best of the device by itself")
    args.add_argument("--out", help="write one JSON line a problem to this file")
    args = args.parse_args()
    if (args.numbers is None) != (args.target is None) or args.numbers and args.data:
        raise UserError("--numbers and --target go together, and --data goes without them")
    if args.out and (args.data is None or Path(args.out).is_dir()):
        raise UserError("--out wants a file, and --data beside it")
    device, rank, _ = start()
    tok, record = Tokenizer.from_pretrained(args.ckpt), load_record(args.ckpt)
    model = Llama.from_pretrained(args.ckpt, device, DTYPES.get(args.dtype) or best_dtype(device)).eval()
    search = {key: getattr(args, key) for key in ("b", "n", "temperature", "limit", "seed")} | {"max_new": args.max_new_tokens}
    if args.data is None and rank == 0:
        problem = {"nums": args.numbers, "target": args.target} if args.numbers else EXAMPLE
        [samples] = decode(model, tok, [problem], [0], args.decoder, **search)
        print(draw_tree(tok, problem, samples, select(samples, args.decoder)), end="\n\n")
    names = [args.data] if args.data else [] if args.numbers else ["val", "val_new"]
    splits = {name: load_rows(name, record, args.num, args.offset) for name in names}
    decoders = [args.decoder] if args.data else ["greedy", args.decoder]
    with replacing(Path(args.out).parent) if args.out else nullcontext() as new:      # an unwritable folder is told at once
        if splits:
            rows = compare(model, tok, splits, decoders, offset=args.offset, batch_size=args.batch_size, **search)
        if args.out and rank == 0:
            (new / Path(args.out).name).write_text("".join(json.dumps(row) + "\n" for row in rows))

if __name__ == "__main__":
    cli(main)
