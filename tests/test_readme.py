"""README.md and docs: every command that they show is one that the program takes."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from elijah.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BREAKS = {"|", "||", "&&", ";", ">", ">>", "2>", "<", "&"}


def shell_lines(page: Path) -> list[str]:
    """The lines of the page's ```sh blocks, continued lines joined, prompts dropped."""
    blocks = re.findall(r"^ *```(?:sh|bash|shell|console)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


def commands(page: Path) -> list[list[str]]:
    """The words after each `elijah` that a block runs, up to a pipe or redirection."""
    found = []
    for line in shell_lines(page):
        try:
            words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
        except ValueError:  # an apostrophe in what a program printed
            continue
        starts = [i for i, w in enumerate(words) if w == "elijah" or w.endswith("/bin/elijah")]
        for i in starts:
            before = words[i - 1] if i else ";"
            if before not in BREAKS and "=" not in before:
                continue
            split = shlex.split(line, comments=True)
            at = next(k for k, w in enumerate(split) if w == "elijah" or w.endswith("/bin/elijah"))
            end = next((k for k in range(at, len(split)) if split[k].rstrip(";") in BREAKS), len(split))
            found.append([w.rstrip(";") for w in split[at + 1 : end]])
    return found


@functools.cache
def help_text(name: str) -> str:
    """The help of a command, or of a group's command such as "zoo run"."""
    done = subprocess.run(
        [sys.executable, "-m", "elijah", *name.split(), "--help"],
        check=False, capture_output=True, text=True, timeout=60,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, f"elijah {name}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_parses(page: Path) -> None:
    program = typer.main.get_command(app)
    for words in commands(page):
        if words[:1] in (["--help"], ["--version"]):
            continue
        command, name, rest = program.commands[words[0]], words[0], words[1:]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
        shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", help_text(name)))
        used = {w.split("=")[0] for w in rest if re.match(r"--?[a-z]", w)}
        assert used <= shown, f"{page.name}: elijah {shlex.join(words)}: no such option: {sorted(used - shown)}"
        if "--help" not in rest:
            command.make_context(name, list(rest))  # raises for wrong values and missing arguments; runs nothing


def test_the_readme_shows_the_story() -> None:
    shown = {words[0] for words in commands(ROOT / "README.md") if words}
    assert {"scan", "clean"} <= shown


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme and "make test" in readme and {"demo", "test"} <= targets
    for page in PAGES:
        for line in shell_lines(page):
            if line.startswith("make "):
                words = [w for w in shlex.split(line, comments=True)[1:] if "=" not in w and not w.startswith("-")]
                assert set(words) <= targets, f"{page.name}: {line}"
