"""The page that search.py --html writes: what it holds, and, in a real browser if one is installed,
what it shows. And the README and search.py's first lines, which tell of the same search."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from oracles import count_solutions

import search
from data import Tokenizer, prompt_text
from model import Llama
from search import Settings

PROBLEM = search.EXAMPLE
SETTINGS = Settings(cache_gib=0.1)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def searched() -> tuple:
    """The shipped model, its tokenizer and the samples of a search."""
    tokenizer = Tokenizer.from_pretrained(search.SHIPPED)
    model = Llama.from_pretrained(search.SHIPPED, dtype=torch.float32).eval()
    [(_, responses)] = search.search_all(model, tokenizer, [PROBLEM], [0], SETTINGS)
    return model, tokenizer, responses


@pytest.fixture(scope="module")
def page_file(searched, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    model, tokenizer, responses = searched
    search.write_page(model, tokenizer, PROBLEM, responses, SETTINGS, path)
    return path


@pytest.fixture(scope="module")
def page(page_file) -> dict:
    [line] = re.findall(r"^const page = (.*);$", page_file.read_text(), re.MULTILINE)
    return json.loads(line)


def test_the_readme_has_the_tree_of_this_search(searched, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, tokenizer, responses = searched
    readme = (Path(search.__file__).parent / "README.md").read_text(encoding="utf-8")
    [quoted] = re.findall(r"^numbers \[.*?(?=^\.\.\.$)", readme, re.MULTILINE | re.DOTALL)
    assert search.draw_tree(tokenizer, PROBLEM, responses, SETTINGS).startswith(quoted)


def test_the_first_lines_of_search_tell_of_this_search(searched):
    _, tokenizer, responses = searched
    ways = []  # (round, the state's lines, all lines, samples)
    for response in responses:
        texts = [response.tokens[: response.inherited], response.tokens]
        state, text = [tokenizer.decode(tokens).replace("\n", " ").strip() for tokens in texts]
        ways.append((response.round, state, text, response.count))
    sampled = Counter()  # round 0, by their texts
    stepped_back = Counter()  # in round 0, by what is left without the last action
    new_samples = Counter()  # round 1, by the states that they continue
    goals = Counter()  # candidates, by their states and texts
    for in_round, state, text, count in ways:
        if in_round == 0:
            sampled[text] += count
            assert text.endswith("<backtrack>")
            stepped_back[" ".join(text.split()[:-2])] += count
        else:
            new_samples[state] += count
        if text.endswith(" Goal Reached!"):  # on a line of its own
            goals[state, text] += count

    first_lines = search.__doc__
    told = re.findall(r"(\d\S+=.*<backtrack>) +(\d+) samples$", first_lines, re.MULTILINE)
    assert len(told) == 4
    assert all(sampled[text] == int(count) for text, count in told)
    told = re.findall(r"(\S.*\S)  +(\d+) stepped back: (\d+) new samples", first_lines)
    assert len(told) == 3
    for name, back, new in told:
        state = re.sub("frontier +|the prompt", "", name)
        assert (stepped_back[state], new_samples[state]) == (int(back), int(new))
    [(text, of_these, of_the_prompt)] = re.findall(
        r"round 1 +(\S.*!) +(\d+) of these 10 samples, (\d+) of the 85", first_lines
    )
    assert goals == {("52-38=14", text): int(of_these), ("", text): int(of_the_prompt)}


def test_a_round_of_the_page_is_the_tree_of_the_samples_so_far(searched, page):
    _, tokenizer, responses = searched
    assert len(page["rounds"]) == 2
    for last_round, shown in enumerate(page["rounds"]):
        so_far = [response for response in responses if response.round <= last_round]
        tree = search.Tree(tokenizer, PROBLEM, so_far)
        counts = {tuple(node): count for node, (count, _) in zip(page["nodes"], shown) if count}
        assert counts == {node: count for node, count in tree.chosen.items() if count}
        assert page["answers"][last_round] == (list(tree.answer) if tree.answer else None)
        ended = sum(count for _, told in shown for _, colour, count in told if colour != "branched")
        assert ended == sum(response.count for response in so_far)


def test_the_page_tells_what_the_model_thinks_after_each_action(searched, page):
    model, tokenizer, _ = searched
    prompt = prompt_text(PROBLEM["nums"], PROBLEM["target"])
    for node, chance in list(zip(page["nodes"], page["chances"]))[:20]:
        [encoding] = tokenizer.encode([prompt + "".join(action + "\n" for action in node)])
        with torch.no_grad():
            chances = model(torch.tensor([encoding.ids]))[0, -1].softmax(-1)
        assert chance == pytest.approx(float(chances[tokenizer.backtrack]), abs=1e-3)


ONE = ("1 program", "right")
LOST = ("lost", "wrong")
SAID = [  # of the numbers 52, 11, 26, 78 and the target 35
    ((), ONE),
    (("78*11=858",), ONE),
    (("78*11=858", "858+52=910"), ONE),
    (("78*11=858", "858+52=910", "910/26=35"), ONE),
    (("78*11=858", "858/26=33"), LOST),
    (("78/26=3",), LOST),
    (("78/26=4",), ("false, it is 3", "wrong")),
    (("52-53=1",), ("there is no 53 (left)", "wrong")),
    (("52+52=104",), ("there is no 52 (left)", "wrong")),
    (("26/52=0",), ("the rules do not allow it", "wrong")),
    (("52",), ("'52' is no action", "wrong")),
]


@pytest.mark.parametrize("actions,expected", SAID)
def test_what_the_solver_says_of_where_actions_lead(actions, expected):
    assert search.solver_says([52, 11, 26, 78], 35, actions) == expected


def test_the_solver_counts_programs_and_is_not_asked_for_too_many_numbers():
    nums, target = [1, 2, 3, 4], 10
    expected = count_solutions(nums, target)
    assert search.solver_says(nums, target, ()) == (f"{expected} programs", "right")
    expected = count_solutions([3, 3, 4], target)
    assert search.solver_says(nums, target, ("1+2=3",)) == (f"{expected} programs", "right")
    assert search.solver_says([1] * 7, 7, ()) == ("not asked", "dim")
    assert search.solver_says([1] * 7, 7, ("1+1=3",)) == ("false, it is 2", "wrong")


def test_no_text_of_the_model_ends_the_script(searched, tmp_path):
    model, tokenizer, responses = searched
    path = tmp_path / "page.html"
    search.write_page(model, tokenizer, PROBLEM, responses, SETTINGS, path)
    assert path.read_text().count("<script") == path.read_text().count("</script>") == 1
    assert "<backtrack>" not in path.read_text().split("<script>")[1].split("\n")[1]
    assert "http" not in path.read_text()  # it needs no network


# ---- In a browser --------------------------------------------------------------------------------


def dom(path: Path, script: str, tmp_path: Path) -> str:
    """The page as a browser has it after a script."""
    if BROWSER is None:
        pytest.skip("no browser is installed")
    changed = tmp_path / "changed.html"
    changed.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --dump-dom".split()
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{changed}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(text: str) -> list[str]:
    tree = text.split('id="tree"')[1].split("<p ")[0]
    return re.findall(r'<div class="node[^"]*">.*?</div>', tree)


def key(name: str) -> str:
    return f'document.dispatchEvent(new KeyboardEvent("keydown", {{key: "{name}"}}));'


def test_the_browser_shows_each_round(page_file, page, tmp_path):
    left, right = key("ArrowLeft"), key("ArrowRight")
    for script, shown_round in (("", 1), (left, 0), (left * 3, 0), (left + right * 2, 1)):
        text = dom(page_file, script, tmp_path)
        [told] = re.findall(r'id="shown">([^<]*)<', text)
        assert told.startswith(f"after round {shown_round} of 1")
        shown = page["rounds"][shown_round]
        several = [count > 1 for count, _ in shown]
        branched = [any(colour == "branched" for _, colour, _ in told) for _, told in shown]
        rows = rows_of(text)[1:]  # without the head
        assert "the prompt" in rows[0]
        least = sum(map(max, several, branched))
        assert least <= len(rows) <= least + 4  # the prompt; the answer's way
        reached = any(colour in ("right", "wrong") for _, told in shown for _, colour, _ in told)
        assert told.endswith("no sample has reached the goal") != reached


def test_the_browser_shows_actions_of_a_single_sample_if_asked(page_file, page, tmp_path):
    text = dom(page_file, 'document.getElementById("few").click();', tmp_path)
    any_at_all = [count > 0 for count, _ in page["rounds"][1]]
    assert len(rows_of(text)) == sum(any_at_all) + 2  # the head and the prompt


def test_the_answers_way_is_marked(searched, page_file, tmp_path):
    _, tokenizer, responses = searched
    rows = rows_of(dom(page_file, key("ArrowRight"), tmp_path))
    marked = [row for row in rows if 'class="node way"' in row]
    actions = search.node_of(tokenizer.decode(search.select(responses).tokens))
    assert len(marked) == len(actions) + 1
    assert all(action in row for action, row in zip(["the prompt", *actions], marked))
