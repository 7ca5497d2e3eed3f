"""Long checks of what cannot be shown by a few examples. They are not part of the test suite.

    python tests/campaigns.py answers           a million damaged answers against another verifier
    python tests/campaigns.py files             damaged files of every kind that is read
    python tests/campaigns.py kills             runs that are killed, resumed and compared
    python tests/campaigns.py pairs             trainings by two processes, none of which may fail

Each prints what it found, and exits with 1 if it found a fault. Needs fork, so not on Windows.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import conftest  # noqa: F401  it finds the five files, and sets one thread
import torch
from huggingface_hub import save_torch_state_dict
from oracles import is_right
from safetensors import safe_open
from tqdm import tqdm

import data
import improve
import model
import train
from data import BACKTRACK, GOAL, Tokenizer
from model import Llama, UserError, cli

ROOT = Path(__file__).parent.parent

# ---- Damaged answers -----------------------------------------------------------------------------


def damage_answer(rng: random.Random, row: dict, response: str) -> str:
    """What a model, or a liar, might write in place of a right answer."""
    kind = rng.randrange(8)
    at = rng.randrange(len(response))
    lines = response.split("\n")
    if kind == 0:
        return response[:at] + rng.choice("0123456789+-*/= \n.()e") + response[at + 1 :]
    if kind == 1:
        return response[:at] + response[at + 1 :]
    if kind == 2:
        return response[:at] + rng.choice("00123456789+-*/=\n") + response[at:]
    if kind == 3:
        rng.shuffle(lines)
    elif kind == 4:
        del lines[rng.randrange(len(lines))]
    elif kind == 5:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif kind == 6:  # other numbers, some of them large
        a, b = rng.choice([row["nums"][0], rng.randrange(10**22)]), rng.choice(row["nums"])
        lines.insert(0, f"{a}*{b}={a * b}")
    else:  # the operands the other way about
        place = rng.randrange(len(lines))
        for operator in "+-*/":
            left, _, right = lines[place].partition(operator)
            b, _, result = right.partition("=")
            if result:
                lines[place] = f"{b}{operator}{left}={result}"
                break
    return "\n".join(lines)


def answers(num: int) -> Counter:
    rng = random.Random(0)
    record = data.new_record(0, [2, 3, 4], mistakes=[])
    solved = [row for row in data.generate(record, "train", 4000) if GOAL in row["search_path"]]
    found = Counter()
    for _ in tqdm(range(num), "answers"):
        row = rng.choice(solved)
        response = row["search_path"]
        for _ in range(rng.randrange(1, 3)):
            response = damage_answer(rng, row, response or " ")
        if rng.random() < 0.05:  # or a row of mistakes, with a goal all the same
            response = response.replace(BACKTRACK, GOAL)
        ours = data.verify(row["nums"], row["target"], response).correct
        theirs = is_right(row["nums"], row["target"], response)
        found["right" if theirs else "wrong"] += 1
        if ours != theirs:
            found["FAULT"] += 1
            tqdm.write(f"{row['nums']} {row['target']} {response!r}: {ours}, not {theirs}")
    return found


# ---- Damaged files -------------------------------------------------------------------------------

ODD = [None, True, False, 0, -1, 1, 2, 7, 31, 1000, 2**24, 2**30, 2**31, 2**63, 2**70, 10**400]
ODD += [0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "3", "\ud800", "../x", "/dev/zero"]
ODD += [[], {}, [[]], [0], [1000000], ["x"], [None], {"x": 1}, {"content": 3}, "a" * 5000]


def places_of(value, place=()) -> list[tuple]:
    """Of all values within a value, the keys that lead to them."""
    found = [place] if place else []
    if isinstance(value, dict):
        for key in value:
            found += places_of(value[key], (*place, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 50)):
            found += places_of(value[index], (*place, index))
    return found


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Other values where values are."""
    value = copy.deepcopy(json.loads(content))
    for _ in range(rng.randrange(1, 4)):
        places = places_of(value)
        if not places:
            break
        *way, last = rng.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        if rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(value).encode()


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(content))
        size = rng.randrange(1, 9)
        kind = rng.randrange(5)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at : at + size]
        elif kind == 2:
            content[at:at] = rng.randbytes(size)
        elif kind == 3:
            content[at:at] = rng.choice([b"[" * 50000, b"{", b'"', b"\xef\xbb\xbf", b"9" * 5000])
        else:
            content[at:] = b""
        content = content or bytearray(b" ")
    return bytes(content)


def damage_file(rng: random.Random, name: str, content: bytes) -> bytes:
    if name == "model.safetensors":  # eight bytes of size, a header in JSON, the tensors
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size]
        if rng.random() < 0.5:
            header = damage_json(rng, header)
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
        return damage_bytes(rng, content[: 8 + size]) + content[8 + size :]
    if name == "rows.jsonl":
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = damage_json(rng, lines[at]) if rng.random() < 0.5 else b"\n".join(lines[:at])
        content = b"\n".join(lines) or b" "
        return content if rng.random() < 0.7 else damage_bytes(rng, content)
    return damage_json(rng, content) if rng.random() < 0.5 else damage_bytes(rng, content)


def read_rows(folder: Path) -> None:
    rows = data.read_rows(folder / "rows.jsonl")
    data.doubtful_rows(rows)
    Tokenizer.digits().encode_rows(rows)


def read_record(folder: Path) -> None:
    record = data.load_record(folder)
    if record["source"] == "generated" and max(record["sizes"]) < 4:
        data.load_rows("train", record, 2)


READERS = {  # a file's name: what reads it
    "config.json": Llama.from_pretrained,
    "tokenizer.json": Tokenizer.from_pretrained,
    "tokenizer_config.json": Tokenizer.from_pretrained,
    "model.safetensors.index.json": Llama.from_pretrained,
    "model.safetensors": Llama.from_pretrained,
    "record.json": read_record,
    "rows.jsonl": read_rows,
}


def make_files(folder: Path, sharded: bool) -> None:
    config = model.LlamaConfig(24, 32, 32, 1, 1, 1, 32, 64)
    config.rope_scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama = Llama(config)
    for parameter in llama.parameters():
        parameter.data.normal_()
    if sharded:
        weights = llama.state_dict()
        del weights["lm_head.weight"]
        save_torch_state_dict(weights, folder, max_shard_size=8192)
        values = model.dataclasses.asdict(config)
        (folder / "config.json").write_text(json.dumps(values))
    else:
        llama.save_pretrained(folder)
    Tokenizer.digits().save_pretrained(folder)
    record = data.new_record(0, [2, 3])
    (folder / "record.json").write_text(json.dumps(record))
    rows = data.generate(record, "train", 20)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


class TooSlow(BaseException):
    pass


def give_up(*_):
    raise TooSlow


def files(num: int, kinds: list[str]) -> Counter:
    """Every reading ends within ten seconds and 4 GiB more than at first, by itself or with a
    UserError, and opens nothing outside its folder."""
    found = Counter()
    signal.signal(signal.SIGALRM, give_up)
    opened = []
    model.safe_open = lambda path, **given: opened.append(Path(path)) or safe_open(path, **given)
    # Weights are read, so they need not be drawn first, which is what takes longest.
    torch.nn.init.normal_ = torch.nn.init.kaiming_uniform_ = lambda tensor, *_, **__: tensor
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)
    model.note = data.note = lambda text: None
    for name in kinds:
        rng = random.Random(name)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            make_files(folder, name.endswith("index.json"))
            content = (folder / name).read_bytes()
            READERS[name](folder)
            for _ in tqdm(range(num), name, mininterval=5):
                damaged = damage_file(rng, name, content)
                (folder / name).write_bytes(damaged)
                opened.clear()
                signal.alarm(10)
                try:
                    READERS[name](folder)
                    outcome = "read"
                except UserError:
                    outcome = "refused"
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    outcome = "FAULT"
                    tqdm.write(f"{name} {error!r:.300}: {damaged[:600]!r}")
                finally:
                    signal.alarm(0)
                if any(path.resolve().parent != folder.resolve() for path in opened):
                    outcome = "FAULT"
                    tqdm.write(f"{name}: opened {opened}")
                found[f"{name} {outcome}"] += 1
                found[outcome] += outcome == "FAULT"
    return found


# ---- Kills ---------------------------------------------------------------------------------------

TINY = "--hidden_size 32 --layers 1 --num_eval 2 --dtype fp32 --batch_size 4"
RUNS = {
    "training": (train, f"{TINY} --steps 24 --eval_every 3"),
    "improvement": (
        improve,
        "--num 6 --n 2 --num_eval 2 --batch_size 4 --rounds 3 --epochs 1 --b 1",
    ),
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(work: Path, program, args: list[str], ranks=1, dies_at: int | None = None) -> list[int]:
    """Fork a run, of so many processes; returns their numbers. dies_at: rank 0 is killed before it
    moves, renames or removes a file for that many times."""
    port = free_port()
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [program.__name__ + ".py", *args]
        torch.set_num_threads(1)
        train.compare = lambda *given: None  # the table at the end
        improve.solved_rows = lambda rows, _: rows  # so small a model solves nothing
        if dies_at is not None and rank == 0:
            die_at_move(dies_at)
        code = 0
        try:
            cli(program.main)
        except SystemExit as end:
            code = end.code
        except BaseException:  # of a rank whose peer is gone
            traceback.print_exc()
            code = 1
        os._exit(code or 0)
    return children


def die_at_move(number: int) -> None:
    left = [number]

    def deadly(function):
        def dying(*given, **settings):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **settings)

        return dying

    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def state_of(folder: Path) -> dict:
    model.settle(folder)
    state = torch.load(folder / model.RESUME, weights_only=True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}
    return {**{f"fp32 {key}": value for key, value in state["weights"].items()}, **saved}


def kills(num: int, name: str, ranks: int, work: Path) -> Counter:
    """Half of the runs are killed at any moment, half between two moves of a save; then they go on,
    by themselves, and end as a run that nobody killed."""
    program, flags = RUNS[name]
    args = flags.split()
    if program is improve:
        args += ["--ckpt", str(work / "start")]
    whole = work / f"{name}-{ranks}"
    begin = time.perf_counter()
    codes = wait(start(work, program, [*args, "--out", str(whole)], ranks))
    assert codes == [0] * ranks, (work / "log").read_text()[-2000:]
    seconds = time.perf_counter() - begin
    expected = state_of(whole)
    rng = random.Random(name)
    found = Counter()
    for trial in tqdm(range(num), f"{name}, {ranks} process(es)"):
        out = work / f"{name}-{ranks}-{trial}"
        codes = []
        for attempt in range(20):
            resumes = list(out.glob(model.RESUME)) or list(out.glob(".saved-*/" + model.RESUME))
            again = ["--resume"] if resumes else []
            dies = attempt == 0 or rng.random() < 0.5
            dies_at = rng.randrange(120) if dies and trial % 2 else None
            children = start(work, program, [*args, "--out", str(out), *again], ranks, dies_at)
            if dies and not trial % 2:
                time.sleep(rng.random() * seconds)
                for child in children:
                    os.kill(child, signal.SIGKILL)
            elif dies:  # when rank 0 is gone, the others are killed, too
                os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT)
                for child in children[1:]:
                    os.kill(child, signal.SIGKILL)
            codes = wait(children)
            found["kills"] += -signal.SIGKILL in codes
            if codes == [0] * ranks:
                break
        same = codes == [0] * ranks
        if same:
            state = state_of(out)
            same = state.keys() == expected.keys()
            same = same and all(torch.equal(state[key], expected[key]) for key in state)
        left = [path.name for path in out.glob(".*")]
        if not same or left:
            tqdm.write(f"{out}: exit codes {codes}, left over: {left}")
        found["bit-identical" if same and not left else "FAULT"] += 1
        shutil.rmtree(out)
    return found


# ---- Two processes -------------------------------------------------------------------------------


def pairs(num: int, work: Path) -> Counter:
    """As torchrun starts them, to the very end of their interpreters."""
    found = Counter()
    rows = work / "rows.jsonl"  # of a file, so that there is no table at the end
    rows.write_text("\n".join(map(json.dumps, data.generate(data.new_record(0, [3]), "train", 99))))
    flags = f"{TINY} --steps 3 --eval_every 2 --data {rows} --out".split()
    for _ in tqdm(range(num), "pairs"):
        processes = []
        port = free_port()
        for rank in "01":
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = open(work / rank, "w")
            command = [sys.executable, ROOT / "train.py", *flags, work / "out"]
            environment = {**os.environ, **environment}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait() for process in processes]
        printed = [(work / rank).read_text() for rank in "01"]
        failed = codes != [0, 0] or any("Traceback" in text for text in printed)
        found["FAULT" if failed else "fine"] += 1
        if failed:
            tqdm.write(f"{codes} {printed[0][-2000:]} {printed[1][-2000:]}")
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("campaign", choices=("answers", "files", "kills", "pairs"))
    options.add_argument("--num", type=int, help="answers; files of a kind; runs")
    options.add_argument("--kinds", nargs="+", default=list(READERS), choices=READERS)
    options = options.parse_args()
    if options.campaign == "answers":
        found = answers(options.num or 1_000_000)
    elif options.campaign == "files":
        found = files(options.num or 100_000, options.kinds)
    else:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            if options.campaign == "pairs":
                found = pairs(options.num or 200, work)
            else:
                flags = [*TINY.split(), "--steps", "3", "--out", f"{work}/start"]
                trained = start(work, train, flags)
                assert wait(trained) == [0]
                found = Counter()
                for name, share in {"training": 0.5, "improvement": 0.15}.items():
                    for ranks in (1, 2):
                        num = max(int((options.num or 100) * share), 1)
                        for key, count in kills(num, name, ranks, work).items():
                            found[f"{name}, {ranks} process(es): {key}"] += count
                            found["FAULT"] += count * (key == "FAULT")
    for key, count in sorted(found.items()):
        print(f"{count:9} {key}")
    sys.exit(1 if found["FAULT"] else 0)


if __name__ == "__main__":
    main()
