"""The command line: options, exit codes, what goes to which stream. Imports torch only inside a command that needs it.

Exit codes: 0 clean or done, 1 backdoored, 2 an error of any sort, 3 undecided or a kind that cannot be scanned.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from elijah import __version__
from elijah.errors import ElijahError

if TYPE_CHECKING:
    import torch

    from elijah.report import Report
    from elijah.trigger import Target, Trigger

app = typer.Typer(
    help="Find and remove backdoors in diffusion models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Form(StrEnum):
    """How a report is written."""

    text = "text"
    json = "json"
    html = "html"
    sarif = "sarif"


class Dtype(StrEnum):
    """What the network computes in; half-precision weights are read into it."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Prediction(StrEnum):
    """What a new network is trained to predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder or a hub id OWNER/NAME.")]
FormOption = Annotated[Form, typer.Option("--format", help="How the report is written.")]
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to FILE, not stdout.")]
DetectorOption = Annotated[str, typer.Option(metavar="NAME", help="The method that looks for triggers.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What the network computes in.")]
SeedOption = Annotated[int, typer.Option(help="All randomness comes from this number.")]
ScanBatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows for each network call.")]
EvaluationsOption = Annotated[int | None, typer.Option(min=1, help="Stop at so many network evaluations.")]
MinutesOption = Annotated[float | None, typer.Option(min=0, callback=_finite, help="Stop after so many minutes.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network; hub models from the cache.")]
ExitZeroOption = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 in place of 1 and 3 (never of 2).")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="More on stderr, tracebacks too.")]
DataOption = Annotated[str, typer.Option(metavar="DIR", help="A folder of images, or cifar10, celeba, mnist, digits.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use the first so many images.")]
RateOption = Annotated[float, typer.Option(min=0, max=1, callback=_finite, help="Share of poisoned rows.")]
HalfOption = Annotated[bool, typer.Option("--half", help="Store the weights as float16.")]


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


def _run(
    body: Callable[[Talk], int],
    *,
    quiet: bool = False,
    verbose: bool = False,
    exit_zero: bool = False,
    offline: bool = False,
) -> NoReturn:
    """Runs a command's body and exits with its code, or with that of its error; nothing else reaches stdout."""
    _hush(quiet, verbose, offline)
    talk = Talk(quiet, verbose)
    code = 2
    try:
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


def _check_output(output: Path | None) -> None:
    """Raises ElijahError before the work when its result could not be written."""
    if output is not None and output.is_dir():
        raise ElijahError(f"{output}: is a folder; -o takes a file")
    if output is not None and not output.absolute().parent.is_dir():
        raise ElijahError(f"{output}: there is no folder {output.parent} to write it in")


def _emit(text: str, output: Path | None, talk: Talk) -> None:
    """text to stdout, or to a file that is there in full or not at all."""
    talk.close()
    if output is None:
        if hasattr(talk.stdout, "buffer"):
            talk.stdout.flush()
            talk.stdout.buffer.write(text.encode())
        else:
            talk.stdout.write(text)
        return
    _write_file(output, text)
    talk.say(f"wrote {output}")


def _write_file(path: Path, text: str) -> None:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ElijahError(f"{path}: cannot be written ({error.strerror})") from error


def _new_folder(out: Path) -> Path:
    """out as an absolute path whose parent exists; raises ElijahError when something is there already."""
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ElijahError(f"{out}: exists already; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElijahError(f"{out.parent}: cannot be made ({error.strerror})") from error
    return out


def _write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Lets write fill a temporary folder beside out, then renames it: out is complete or it is not there."""
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write(part)
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _place(device: str) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ElijahError(f"--device {device}: no such device here; use auto or cpu") from error


def _finish(report: Report, form: Form, output: Path | None, talk: Talk) -> int:
    from elijah.render import render

    _emit(render(report, form.value), output, talk)
    return report.exit_code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"elijah {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find and remove backdoors in diffusion models."""


@app.command()
def scan(
    model: ModelArgument,
    form: FormOption = Form.text,
    output: OutputOption = None,
    detector: DetectorOption = "lossfit",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    batch_size: ScanBatchOption = None,
    max_evaluations: EvaluationsOption = None,
    max_minutes: MinutesOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    exit_zero: ExitZeroOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Look for a backdoor. Exit 0: nothing found, 1: backdoored, 2: error, 3: undecided or not supported."""

    def body(talk: Talk) -> int:
        _check_output(output)
        from elijah.scan import scan as run

        limits: dict[str, Any] = {"max_evaluations": max_evaluations, "max_minutes": max_minutes}
        how: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype.value, "batch_size": batch_size}
        report = run(model, detector=detector, revision=revision, offline=offline, progress=talk, **how, **limits)
        return _finish(report, form, output, talk)

    _run(body, quiet=quiet, verbose=verbose, exit_zero=exit_zero, offline=offline)


@app.command()
def clean(
    model: ModelArgument,
    out: OutOption,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Clean images to repair with.")] = None,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="Repair with so many of the model's own samples.")
    ] = None,
    repair: Annotated[str, typer.Option(metavar="NAME", help="The method that removes the backdoor.")] = "unshift",
    force: Annotated[bool, typer.Option("--force", help="Repair a model that looks clean, too.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Write DIR though it is still backdoored.")] = False,
    form: FormOption = Form.text,
    output: OutputOption = None,
    detector: DetectorOption = "lossfit",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    batch_size: ScanBatchOption = None,
    max_evaluations: EvaluationsOption = None,
    max_minutes: MinutesOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    exit_zero: ExitZeroOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove a backdoor and scan again; the result is a new folder, the model is never changed in place."""
    if data is not None and synthetic is not None:
        raise typer.BadParameter("give --data or --synthetic, not both")

    def body(talk: Talk) -> int:
        _check_output(output)
        from elijah.clean import clean as run

        limits: dict[str, Any] = {"max_evaluations": max_evaluations, "max_minutes": max_minutes}
        how: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype.value, "batch_size": batch_size}
        what: dict[str, Any] = {"data": data, "synthetic": synthetic, "repair": repair, "force": force, "keep": keep}
        report = run(
            model, out, detector=detector, revision=revision, offline=offline, progress=talk, **what, **how, **limits
        )
        return _finish(report, form, output, talk)

    _run(body, quiet=quiet, verbose=verbose, exit_zero=exit_zero, offline=offline)
