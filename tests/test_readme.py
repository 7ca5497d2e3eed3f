"""The README and the notes: their tables are those of results.jsonl, their commands have flags that
exist, and what they point to is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assets"))

import tables  # noqa: E402

PAGES = (ROOT / "README.md", ROOT / "assets" / "NOTES.md")
PROGRAMS = ("search.py", "train.py", "improve.py", "data.py", "assets/measure.py")


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    copies = {name: tmp_path / page.name for name, page in zip(("README", "NOTES"), PAGES)}
    for page, (name, copy) in zip(PAGES, copies.items()):
        copy.write_text(page.read_text())
        monkeypatch.setattr(tables, name, copy)
    tables.main()
    for page, copy in zip(PAGES, copies.values()):
        assert copy.read_text() == page.read_text()
        assert page.read_text().count("<!-- end -->") >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def flags_of() -> dict[str, set[str]]:
    flags = {}
    for program in PROGRAMS:
        command = [sys.executable, str(ROOT / program), "--help"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        flags[program] = set(re.findall(r"--[a-z_]+", printed))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page, flags_of):
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun) .*", text, re.MULTILINE)
    commands += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("...", ""))
        program = next((word for word in words if word in PROGRAMS), None)
        if program:
            own = words[words.index(program) :]
            assert {word for word in own if word.startswith("--")} <= flags_of[program], command
