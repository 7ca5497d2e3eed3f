"""Self-backtracking: search by sampling, stepping back and branching. Read after data.py, before train.py.

The model says `<backtrack>` when its last action was a mistake. The search of the paper's section 4.2 believes it: it samples
n continuations of a state; each that ends in `<backtrack>` drops its last action, and what is left becomes a new state to
branch from; after b such rounds the finished answer with the best score (`rate`) wins. No verifier takes part.
"""
import itertools, json, math, os, re, sys
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import BACKTRACK, GOAL, Tokenizer, calculate, load_rows, load_record
from model import DTYPES, Arguments, KVCache, Llama, UserError, best_dtype, cli, number, replacing, start

SHIPPED = Path(__file__).parent / "assets" / "checkpoint"
EXAMPLE = {"nums": [1, 27, 49, 3], "target": 63}      # never trained on; the shipped model solves it by stepping back
PAPER = {"temperature": 0.7, "min_p": 0.0, "paper": True}
CACHE_BYTES = 2 ** 33
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
        if (right := calculate(a, op, b)) != result:
            return False, f"step {i}: {text}: false, it is {'not whole' if right is None else right}"
        left[result] += 1
    if end != GOAL:
        return False, f"the end: {end!r} in place of {GOAL!r}"
    left = list(left.elements())
    return (True, "") if left == [target] else (False, f"the end: {left} left, not {target} alone")

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
    score: float                      # by `rate`

def rate(tokens: tuple[int, ...], logps: tuple[float, ...], tok: Tokenizer, paper: bool) -> float:
    """The score of a response: the mean log-probability of its tokens, end-of-text included, as in the paper, and no verifier
    in it. Ours adds the log-probability of the last line: where `Goal Reached!` stands the model could have said `<backtrack>`,
    and this is how sure it is of the last step."""
    last = next((i for i in range(len(tokens), 0, -1) if tok.ends_line[tokens[i - 1]]), 0)           # where that line begins
    return sum(logps) / len(logps) + (0.0 if paper else sum(logps[last:]))

def prefill(model: Llama, texts: list[list[int]], source: KVCache | None = None, rows: list[int] = ()):
    """A cache with a row for each of texts, lists of tokens, and the logits after each, (P, V). Prompts run through the model;
    of a branch, which begins row rows[i] of `source` already, only the last token does, for a cache holds no logits."""
    device, length = model.lm_head.weight.device, [len(text) for text in texts]
    cache = KVCache(model.config, len(texts), max(length), device, model.lm_head.weight.dtype)
    length = torch.tensor(length, device=device)
    if source is not None:
        cache.fork(torch.tensor(rows, device=device), source)
        cache.rollback(length - 1)
    ids = pad_sequence([torch.tensor(text if source is None else text[-1:], device=device) for text in texts], batch_first=True)
    logits = model(ids, cache=cache, keep=length - 1 - cache.length)           # at each row's last new token
    cache.rollback(length)                                                     # the padding goes out of sight
    return cache, logits

def draw(logits: torch.Tensor, row: torch.Tensor, u: torch.Tensor, fresh: torch.Tensor, temperature: float, min_p: float):
    """A token for each sample, (S,), and its log-probability at temperature 1; sample s is on row[s] of logits (R, V).
    Tokens less than min_p times as probable as the best, at temperature 1, are out of the question (Nguyen et al., 2024).
    The token is where the cumulative distribution passes the sample's uniform u (S,). How far u fell into the
    token's share is uniform again: the third result, to draw from next; `fresh` (S,), uniform, renews what rounding spent."""
    logps = logits.float().log_softmax(-1)
    rare = logps.exp() < min_p * logps.amax(-1, keepdim=True).exp()
    share = (logps / temperature).masked_fill(rare, -torch.inf).softmax(-1)
    cumulative = share.cumsum(-1)
    u = u.clamp(max=1 - 2 ** -23) * cumulative[row, -1]        # below the last, which rounding leaves a little off 1
    token = torch.searchsorted(cumulative[row], u[:, None], right=True)[:, 0]
    share, above = share[row, token].clamp(min=1e-30), cumulative[row, token] - u      # above u the share goes on for so much
    return token, logps[row, token], (1 - (above - fresh * 2 ** -22) / share) % 1       # of u's 24 bits each token spends some

def places(parent: torch.Tensor) -> torch.Tensor:
    """The rows (C,) for children of rows `parent` (C,), sorted. They fill rows 0..C-1: the first child of a row stays in its
    place, if that is below C, and costs nothing; the others fill the gaps. Parents 1 1 3 -> places 1 0 2."""
    every, first = torch.arange(len(parent), device=parent.device), parent != torch.cat([parent.new_tensor([-1]), parent[:-1]])
    return parent.masked_scatter(~first | (parent >= len(parent)), every[~torch.isin(every, parent)])

State = namedtuple("State", "problem round rank tokens logps row", defaults=((), (), None))
"""To expand: whose it is, when, its rank in the frontier; the response so far, up to an action's end; a row that begins so."""

Samples = namedtuple("Samples", "number row key code")
"""What the engine knows of its samples, tensors (S,): which of its state's samples, the row it is on, its random key, and its
code, uniform in [0, 1), from which its tokens are to be drawn."""
Rows = namedtuple("Rows", "state step room tokens logps")
"""What it knows of its rows, tensors (R,): the number of the row's state, tokens since that, their limit; the tokens and their
log-probabilities, (R, max_new)."""

class Engine:
    """Expands many states together: n samples of each, or the n best beams (`temperature` None), until each ends. Samples that
    are the same so far share a row of the cache, which forks where they part. States may join at any step.
    Samples are spread evenly (arithmetic sampling, Vilnis et al., 2023): each is drawn from one code, and a state's n codes are
    1 / n apart. All responses tile [0, 1) in order, those that begin with a path of probability p an interval of length p: so
    floor(n * p) or ceil(n * p) samples take it, and more of them differ than of `independent` ones, the paper's, which draw
    every token anew. On average both follow the model."""
    def __init__(self, model: Llama, tok: Tokenizer, n: int, temperature: float | None, min_p: float, independent: bool,
                 longest: int, max_new: int):
        self.model, self.tok, self.n, self.max_new = model, tok, n, max_new
        self.temperature, self.min_p, self.independent = temperature, min_p, independent
        head = model.lm_head.weight
        self.cache, self.parked = (KVCache(model.config, n, longest + max_new, head.device, head.dtype) for _ in range(2))
        self.logits = head.new_zeros(0, len(head))                             # (R, V): after each row of the cache
        self.flying = {}                                        # number of a state: (the state, its samples that have ended)
        one, many = (torch.zeros(shape, dtype=torch.int64, device=head.device) for shape in (0, (0, max_new)))
        self.samples, self.rows = Samples(one, one, one, one.float()), Rows(one, one, one, many, many.float())
        self.numbers, self.unused, self.spare = itertools.count(), itertools.count(), []       # of states; of rows in `parked`

    def admit(self, states: list[State], cache: KVCache, logits: torch.Tensor, keys: torch.Tensor) -> None:
        """Begin to expand F states, given a cache with their rows, the logits after them (F, V) and their random keys (F,)."""
        every, numbers = torch.arange(len(states), device=keys.device), [next(self.numbers) for _ in states]
        self.flying |= {number: (state, {}) for number, state in zip(numbers, states)}
        room = torch.tensor([self.max_new - len(state.tokens) for state in states], device=keys.device)
        tokens = torch.zeros(len(states), self.max_new, dtype=torch.int64, device=keys.device)
        of, i = torch.cartesian_prod(every, torch.arange(self.n, device=keys.device)).T
        samples = Samples(i, len(self.logits) + of, mix(keys[of], i), (i + uniform(keys[of])) / self.n)
        rows = Rows(numbers[0] + every, torch.zeros_like(every), room, tokens, tokens.float())
        self.samples = Samples(*map(torch.cat, zip(self.samples, samples)))
        self.rows = Rows(*map(torch.cat, zip(self.rows, rows)))
        self.cache.fork(every, cache, len(self.logits) + every)
        self.logits = torch.cat([self.logits, logits])

    def beams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Put each state's best continuations, n less its ended beams, in place of its samples; returns what `draw` does."""
        (state, t, _, _, logps), logp, n = self.rows, self.logits.float().log_softmax(-1), self.n
        numbers, of = torch.unique(state, return_inverse=True)
        rank = F.one_hot(of).cumsum(0).gather(1, of[:, None])[:, 0] - 1         # of a row among its state's
        rows, total = of.new_zeros(len(numbers), n), logp.new_full((len(numbers), n, logp.shape[1]), -torch.inf)
        rows[of, rank], total[of, rank] = torch.arange(len(of), device=of.device), logps.sum(1, keepdim=True) + logp
        total, best = total.flatten(1).topk(n)                                  # a state's rows side by side: n of n * V
        left = torch.tensor([n - len(self.flying[number][1]) for number in numbers.tolist()], device=of.device)
        which, place = ((total != -torch.inf) & (torch.arange(n, device=of.device) < left[:, None])).nonzero().T
        row, token = rows[which, best[which, place] // logp.shape[1]], best[which, place] % logp.shape[1]
        number = t[row] * n + place                                             # unique, and in the order in which beams end
        self.samples = Samples(number, row, *[torch.zeros_like(row)] * 2)
        return token, logp[row, token]

    def step(self, b: int) -> list[tuple[State, dict]]:
        """Draw a token for every sample. Returns the states whose samples have all ended, with these samples by number: tokens,
        log-probabilities and a row of `parked` to branch from, -1 but for those that say `<backtrack>` before round b."""
        if self.temperature is None:
            token, logp = self.beams()                                         # beams are new samples
        else:
            fresh = uniform(mix(self.samples.key, self.rows.step[self.samples.row]))
            u = fresh if self.independent else self.samples.code
            token, logp, code = draw(self.logits, self.samples.row, u, fresh, self.temperature, self.min_p)
            self.samples = self.samples._replace(code=code)
        (sample, row, key, code), vocab, members = self.samples, self.logits.shape[1], defaultdict(list)
        child, of = torch.unique(row * vocab + token, return_inverse=True)     # sorted: children stand by their parents
        parent, token = child // vocab, child % vocab
        state, t, room, tokens, logps = (x[parent] for x in self.rows)
        tokens.scatter_(1, t[:, None], token[:, None])
        logps.scatter_(1, t[:, None], torch.zeros_like(logps[:, 0]).scatter(0, of, logp)[:, None])
        t, back, kept = t + 1, token == self.tok.backtrack, torch.full_like(t, -1)
        if some := [c for c, i in zip(back.nonzero()[:, 0].tolist(), state[back].tolist()) if self.flying[i][0].round < b]:
            free = [self.spare.pop() if self.spare else next(self.unused) for _ in some]
            kept[some] = torch.tensor(free, device=t.device)
            self.parked.fork(parent[some], self.cache, kept[some])
        ended = back | (token == self.tok.eos) | (t == room)
        for c, i in zip(of[ended[of]].tolist(), sample[ended[of]].tolist()):
            members[c].append(i)                                               # the samples on each child that ended
        over = zip(ended.nonzero()[:, 0].tolist(), *(x[ended].tolist() for x in (state, t, tokens, logps, kept)))
        for c, whose, length, text, scores, held in over:
            self.flying[whose][1].update(dict.fromkeys(members[c], (tuple(text[:length]), tuple(scores[:length]), held)))
        place = torch.full_like(t, -1)
        place[~ended] = places(parent[~ended])
        order, row = place.argsort()[int(ended.sum()):], place[of]             # those that ended, at -1, come first
        self.samples = Samples(*(x[row >= 0] for x in (sample, row, key, code)))
        self.rows, self.logits = Rows(*(x[order] for x in (state, t, room, tokens, logps))), self.logits[:0]
        if len(order):
            self.cache.fork(parent[order])
            # Rows in 16s and columns in 8s, so that shapes recur: libraries build, and keep, a kernel for every new one.
            fill = min(-len(order) % 16, len(self.cache.length) - len(order))
            self.cache.length[len(order):len(order) + fill] = 0
            self.cache.width = min(-(-self.cache.width // 8) * 8, self.cache.kv.shape[4] - 1)
            self.logits = self.model(F.pad(token[order], (0, fill))[:, None], cache=self.cache)[:len(order), 0]
        return [self.flying.pop(number) for number in set(state[ended].tolist()) - set(self.rows.state.tolist())]

# ---- Self-backtracking (paper, section 4.2) ------------------------------------------------------------------------------
def roll_back(tokens: tuple[int, ...], tok: Tokenizer) -> tuple[int, ...]:
    """Drop `<backtrack>` and the last action: the state to branch from ends with the newline of the action before."""
    end = len(tokens) - 2                                  # before the action's last token, be it its newline or not
    while end > 0 and not tok.ends_line[tokens[end - 1]]:
        end -= 1
    return tokens[:max(end, 0)]

@torch.inference_mode()
def self_backtrack(model: Llama, tok: Tokenizer, problems: list[dict], keys: list[int], b: int, n: int, temperature: float,
                   min_p: float, paper: bool, max_new: int, limit: int | None = None, seed: int = 0,
                   batch_size: int | None = None) -> Iterator[tuple[int, list[Sample]]]:
    """(i, every sample of the search) of problem i {nums, target}, when it is done; seed and keys[i] key its random numbers.
    A frontier holds at most `limit` states, by default int(sqrt(n)) as in the reference's first version. Stepping back from the
    first action leads to the prompt, which may be sampled once more; for the `paper`, it has been visited already. At most
    `batch_size` states are expanded at a time, with n rows each at most, by default as many as CACHE_BYTES hold for sure, up to
    128; parked rows, to branch from, come on top."""
    prompts, limit = tok.prompts(problems), limit or math.isqrt(n)
    engine = Engine(model, tok, n, temperature, min_p, paper, max(map(len, prompts), default=0), max_new)
    batch_size = batch_size or min(128, max(1, CACHE_BYTES // engine.cache.kv.nbytes))      # a new cache has n rows
    frontier = {p: [State(p, 0, 0)] for p in range(len(problems))}
    fresh, branches = deque(state for [state] in frontier.values()), deque()
    visited, found, done = defaultdict(lambda: {()} if paper else set()), defaultdict(list), {}
    while fresh or branches or engine.flying:
        for queue, parked in ((branches, engine.parked), (fresh, None)):       # branches first: they hold parked rows
            if queue and len(engine.flying) <= batch_size * 3 // 4:            # in groups, not one by one
                group = [queue.popleft() for _ in range(min(len(queue), batch_size - len(engine.flying)))]
                parts = torch.tensor([(seed, keys[s.problem], s.round, s.rank) for s in group], device=engine.logits.device).T
                texts, rows = [prompts[state.problem] + list(state.tokens) for state in group], [state.row for state in group]
                engine.admit(group, *prefill(model, texts, parked, rows), reduce(mix, parts))
                engine.spare += rows if parked else []
        done |= engine.step(b)
        for p in {state.problem for state in done if all(other in done for other in frontier[state.problem])}:
            following, rows = [], set()                                        # a problem's round is over
            for state in frontier[p]:
                made = {}
                for _, (new, scores, row) in sorted(done.pop(state).items()):
                    tokens, logps = state.tokens + new, state.logps + scores
                    if tokens not in made:
                        goal = tokens[-1] == tok.eos and tok.decode(tokens).split("\n")[-1] == GOAL
                        end = GOAL if goal else BACKTRACK if tokens[-1] == tok.backtrack else ""
                        score = rate(tokens, logps, tok, paper)
                        made[tokens] = Sample(tokens, logps, len(state.tokens), state.round, end, score)
                    found[p].append(made[tokens])
                    rows.add(row)
                    if tokens[-1] == tok.backtrack and state.round < b and len(following) < limit:
                        back = roll_back(tokens, tok)
                        if back not in visited[p]:
                            visited[p].add(back)
                            following.append(State(p, state.round + 1, len(following), back, logps[:len(back)], row))
            engine.spare += rows - {-1} - {state.row for state in following}
            branches += following
            frontier[p] = following
            if not following:
                yield p, found.pop(p)

# ---- Decoders, selection, evaluation -------------------------------------------------------------------------------------
def decode(model: Llama, tok: Tokenizer, problems: list[dict], keys: list[int], decoder: str = "self_backtrack", b: int = 1,
           n: int = 32, temperature: float = 1.5, min_p: float = 0.02, paper=False, max_new: int = 64, **other) -> Iterator:
    """(i, samples) of each problem, when it is done, by one of DECODERS. The others are self-backtracking that never steps back
    (b = 0): best of n; beam search, which keeps the n most probable beams in place of samples; greedy, with one beam.
    Temperature and min_p are what found most on the shipped model; PAPER is the paper's rule."""
    n, temperature = {"greedy": (1, None), "beam": (n, None)}.get(decoder, (n, temperature))
    return self_backtrack(model, tok, problems, keys, b * (decoder == "self_backtrack"), n, temperature, min_p, paper, max_new,
                          **other)

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

def evaluate(model: Llama, tok: Tokenizer, problems: list[dict], decoder: str, offset=0, **search) -> list[dict]:
    """`judge`'s row for every problem. Its samples are keyed by offset + i, so that neither batches nor ranks change them."""
    _, rank, world = start()
    own, keys = problems[rank::world], range(offset + rank, offset + len(problems), world)
    bar = tqdm(decode(model, tok, own, keys, decoder, **search), decoder, len(own), unit=" problems", leave=False, disable=rank)
    rows = {i: judge(tok, own[i], samples, decoder) for i, samples in bar}
    parts = gather([rows[i] for i in range(len(own))], model.lm_head.weight.device)
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

def compare(model: Llama, tok: Tokenizer, splits: dict[str, list[dict]], decoders: list[str], title="", **search) -> dict:
    """Evaluate every decoder on the problems of every split and print a table, one line for each; {(split, decoder): rows}."""
    results, log = {}, partial(print, flush=True) if start()[1] == 0 else lambda line: None
    log(f"{title:34}{'selected % [95 %]':>20}{'verified % [95 %]':>20}{'tokens':>13}")
    for split, decoder in itertools.product(splits, decoders):
        rows = results[split, decoder] = evaluate(model, tok, splits[split], decoder, **search)
        selected, verified, tokens = (sum(row[key] for row in rows) / len(rows) for key in ("correct", "verified", "tokens"))
        log(f"{f'{decoder}, {split}':34}{interval(selected, len(rows))}{interval(verified, len(rows))}{tokens:13.1f}")
    return results

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
        if sample.round:
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
    again = "".join(f"  ({note} x{count})" for (note, _), count in ends[()].items())               # the prompt, sampled again
    head = f"numbers {problem['nums']}  target {problem['target']}{nobody}{again}\n{'action':30}samples"
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
    args.add_argument("--temperature", type=number(float, 0.001), default=1.5)
    args.add_argument("--min_p", type=number(float, 0), default=0.02, help="samples leave out tokens that much rarer")
    args.add_argument("--paper", action="store_true", help="independent samples, the mean as score; temperature 0.7, min_p 0")
    args.add_argument("--limit", type=number(int, 1), help="states in a frontier; int(sqrt(n)) by default")
    args.add_argument("--seed", type=number(int, 0), default=0)
    args.add_argument("--batch_size", type=number(int, 1), help="states expanded together; by itself what 8 GiB hold, to 128")
    args.add_argument("--max_new_tokens", dest="max_new", type=number(int, 1), default=64, help="of a whole response")
    args.add_argument("--dtype", choices=DTYPES, help="the best of the device by itself")
    args.add_argument("--out", help="write one JSON line a problem to this file")
    args.set_defaults(**(PAPER if "--paper" in sys.argv else {}))
    args = args.parse_args()
    if (args.numbers is None) != (args.target is None) or args.numbers and args.data:
        raise UserError("--numbers and --target go together, and --data goes without them")
    if args.min_p > 1:
        raise UserError(f"--min_p is a share of the best token's probability, so at most 1, not {args.min_p}")
    if args.out and (args.data is None or Path(args.out).is_dir()):
        raise UserError("--out wants a file, and --data beside it")
    device, rank, _ = start()
    tok, record = Tokenizer.from_pretrained(args.ckpt), load_record(args.ckpt)
    model = Llama.from_pretrained(args.ckpt, device, DTYPES.get(args.dtype) or best_dtype(device)).eval()
    flags = "b", "n", "temperature", "min_p", "paper", "limit", "seed", "batch_size", "max_new"
    search = {flag: getattr(args, flag) for flag in flags}
    if args.data is None and rank == 0:
        problem = {"nums": args.numbers, "target": args.target} if args.numbers else EXAMPLE
        [(_, samples)] = decode(model, tok, [problem], [0], args.decoder, **search)
        print(draw_tree(tok, problem, samples, select(samples, args.decoder)), end="\n\n")
    names = [args.data] if args.data else [] if args.numbers else ["val", "val_new"]
    splits = {name: load_rows(name, record, args.num, args.offset) for name in names}
    decoders = [args.decoder] if args.data else list(dict.fromkeys(["greedy", args.decoder]))
    with replacing(Path(args.out).parent) if args.out else nullcontext() as new:      # an unwritable folder is told at once
        if splits:
            results = compare(model, tok, splits, decoders, offset=args.offset, **search)
        if args.out and rank == 0:
            (new / Path(args.out).name).write_text("".join(json.dumps(row) + "\n" for row in results[args.data, args.decoder]))

if __name__ == "__main__":
    cli(main)
