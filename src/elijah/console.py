"""A command's stderr, its progress bar, and how every way to end becomes an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from elijah import processes
from elijah.errors import ElijahError
from elijah.files import write_file


@dataclass
class Talk:
    """The progress callback of a command, and its stderr: lines, one bar on a terminal, and how far the work got."""

    quiet: bool = False
    verbose: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    when_interrupted: str = "nothing was written"
    _last: tuple[str, int, int] = ("the start", 0, 0)
    _began: float = field(default_factory=time.monotonic)
    _bar: Any = None
    _task: Any = None

    def __call__(self, what: str, done: int, of: int) -> None:
        """Shows done of of; a message with of 0 is a line of its own."""
        if of <= 0:
            self.say(what.removeprefix("note: "))
            return
        stage = what.partition(",")[0]
        fresh = stage != self._last[0].partition(",")[0]
        self._last = (what, done, of)
        if self.quiet or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._start_bar()
        if fresh:
            self._bar.reset(self._task, total=of)
        self._bar.update(self._task, description=_one_line(what), completed=done, total=of)

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(f"elijah: {_one_line(text)}", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"elijah: {_one_line(text)}", file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        """One line on stderr, and the traceback with -v."""
        self.close()
        if self.verbose:
            traceback.print_exc(file=sys.stderr)
        print(f"elijah: error: {_one_line(text)}", file=sys.stderr, flush=True)

    def position(self) -> str:
        """How far the work got."""
        what, done, of = self._last
        count = f", {done} of {of}" if of else ""
        return f"{what}{count}, after {time.monotonic() - self._began:.0f} s"


def _one_line(text: str) -> str:
    """text without line breaks and without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def run(
    body: Callable[[Talk], int],
    *,
    quiet: bool = False,
    verbose: bool = False,
    exit_zero: bool = False,
    offline: bool = False,
    divisible: bool = False,
) -> NoReturn:
    """Runs a command's body and exits with its code, or with that of its error; nothing else reaches stdout.

    divisible: whether several processes may share the work; then the first one alone talks and writes.
    """
    _hush(quiet, verbose, offline)
    talk = Talk(quiet or processes.rank() > 0, verbose)
    code = 2
    try:
        if processes.count() > 1 and not divisible:
            raise ElijahError("this command runs in one process; several can share `elijah clean` alone")
        with contextlib.redirect_stdout(sys.stderr):
            code = body(talk)
            talk.stdout.flush()
    except ElijahError as error:
        code = error.exit_code
        talk.fail(str(error))
    except KeyboardInterrupt:
        talk.fail(f"interrupted at {talk.position()}; {talk.when_interrupted}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at its end
    except (Exception, SystemExit) as error:
        hint = "" if verbose else " (run with -v for the traceback)"
        talk.fail(f"internal error: {type(error).__name__}: {error}{hint}")
    finally:
        talk.close()
    raise typer.Exit(0 if exit_zero and code in (1, 3) else code)


def _hush(quiet: bool, verbose: bool, offline: bool) -> None:
    """Keeps the libraries quiet, and offline; must run before they are imported."""
    level = "info" if verbose else "error"
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", level)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr)
    if not verbose:
        warnings.simplefilter("ignore")


def emit(text: str, output: Path | None, talk: Talk) -> None:
    """text to stdout, or to a file that is there in full or not at all."""
    talk.close()
    if processes.rank():
        return
    if output is None:
        if hasattr(talk.stdout, "buffer"):
            talk.stdout.flush()
            talk.stdout.buffer.write(text.encode())
        else:
            talk.stdout.write(text)
        return
    write_file(output, text)
    talk.say(f"wrote {output}")
