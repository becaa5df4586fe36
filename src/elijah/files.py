"""Files and folders that are there in full or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from elijah.errors import ElijahError


def check_output(output: Path | None) -> None:
    """Raises ElijahError before the work when its result could not be written."""
    if output is not None and output.is_dir():
        raise ElijahError(f"{output}: is a folder; -o takes a file")
    if output is not None and not output.absolute().parent.is_dir():
        raise ElijahError(f"{output}: there is no folder {output.parent} to write it in")


def write_file(path: Path, text: str) -> None:
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


def new_folder(out: Path) -> Path:
    """out as an absolute path whose parent exists; raises ElijahError when something is there already."""
    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ElijahError(f"{out}: exists already; give a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ElijahError(f"{out.parent}: cannot be made ({error.strerror})") from error
    return out


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Lets write fill a temporary folder beside out, then renames it: out is complete or it is not there."""
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write(part)
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
