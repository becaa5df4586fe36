"""An untrusted model folder: where it is, and the bytes in it that may be looked at.

Nothing is believed: links stay inside, JSON is bounded and names no code, safetensors are parsed by their library.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from elijah.allowed import HUB_FILES, HUB_ID, MAX_FILES, MAX_JSON_BYTES, MAX_NOTES, PICKLES, REMOTE_CODE
from elijah.errors import ElijahError


@dataclass
class Folder:
    """A model folder, and what was read of it so far."""

    root: Path
    source: str
    revision: str | None = None
    blobs: Path | None = None  # where links may lead, in a snapshot that we took from the hub ourselves
    files: list[tuple[str, str]] = field(default_factory=list)  # (relative name, SHA-256)
    notes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of all that is in the folder

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def part(self, name: str) -> str:
        """The prefix of a component's files: its folder, or "" in the flat layout."""
        return f"{name}/" if (self.root / name).is_dir() else ""

    def survey(self) -> None:
        """Refuses links that leave the folder and notes pickles and Python files, which stay unopened."""
        self.names = sorted(self._walk())
        self.note("is a pickle: not opened", PICKLES)
        self.note("is Python code: not opened", (".py",))

    def _walk(self) -> Iterator[str]:
        count = 0
        for directory, folders, files in os.walk(self.root):
            for path in (Path(directory) / name for name in folders + files):
                name = path.relative_to(self.root).as_posix()
                count += 1
                if count > MAX_FILES:
                    raise refusal(self.source, f"more than {MAX_FILES} files: give the model's own folder")
                if path.is_symlink() and not self._keeps(path):
                    hint = "to scan a snapshot in the hub cache, give its hub id and --offline"
                    raise refusal(name, f"a link that leaves the folder; {hint}")
                yield name

    def _keeps(self, link: Path) -> bool:
        target = Path(os.path.realpath(link))
        return target.is_relative_to(self.root) or (self.blobs is not None and target.is_relative_to(self.blobs))

    def note(self, what: str, endings: tuple[str, ...]) -> None:
        """Notes the files with these endings that were not read."""
        read = dict(self.files)
        names = [n for n in self.names if n.lower().endswith(endings) and n not in read]
        self.notes += [printable(f"{name} {what}") for name in names[:MAX_NOTES]]
        if len(names) > MAX_NOTES:
            self.notes.append(f"and {len(names) - MAX_NOTES} more, of which each {what}")

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, of bounded size and naming no code of its own."""
        if not self.has(name):
            raise refusal(name, f"is missing in {self.source}, or no regular file")
        with (self.root / name).open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise refusal(name, f"larger than {MAX_JSON_BYTES} bytes")
        try:
            value = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise refusal(name, f"not JSON: {show(error)}") from error
        if not isinstance(value, dict):
            raise refusal(name, "not a JSON object")
        if code := [key for key in REMOTE_CODE if value.get(key)]:
            raise refusal(name, f"{code[0]} asks for code from elsewhere, which is never run")
        self.files.append((name, hashlib.sha256(data).hexdigest()))
        return value

    @contextmanager
    def tensors(self, name: str) -> Iterator[Any]:
        """An open safetensors file; its header has been parsed and its offsets checked by the library."""
        if not self.has(name):
            raise refusal(name, "is missing, or no regular file")
        try:
            with safe_open(self.root / name, framework="pt", device="cpu") as file:
                yield file
        except SafetensorError as error:
            with (self.root / name).open("rb") as file:
                pointer = file.read(23) == b"version https://git-lfs"
            why = "a Git LFS pointer: run git lfs pull" if pointer else f"not a sound safetensors file: {show(error)}"
            raise refusal(name, why) from error


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def show(value: object) -> str:
    """An untrusted value, short, however long or deep it is."""
    text = printable(str(value) if isinstance(value, str | Exception) else reprlib.repr(value))
    return text if len(text) <= 100 else text[:97] + "..."


def refusal(where: str, why: str, kind: type[ElijahError] = ElijahError) -> ElijahError:
    """The error to raise: one printable line, whatever the file put into it."""
    return kind(printable(f"{where}: {why}"))


def find_folder(source: str, revision: str | None, offline: bool) -> Folder:
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if HUB_ID.fullmatch(source) and not source.startswith((".", "~")) and not path.exists():
        root = _download(source, revision, offline).resolve()
        cached = root.parent.name == "snapshots"
        commit = root.name if cached else revision
        return Folder(root, source, commit, root.parent.parent / "blobs" if cached else None)
    if not source or not path.is_dir():
        raise refusal(source, "is a file: give the model's folder" if path.exists() else "no such folder")
    if revision:
        raise refusal(source, "--revision is for models on the hub, and this is a local folder")
    return Folder(path.resolve(), source)


def _download(source: str, revision: str | None, offline: bool) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=offline, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub also raises classes of its HTTP library, and that has changed between versions
        raise refusal(source, _why_no_download(error, offline)) from error


def _why_no_download(error: Exception, offline: bool) -> str:
    if isinstance(error, hub.GatedRepoError):
        return "a gated model: accept its terms on the hub, then run hf auth login"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no such folder, and no such model on the hub; for a private one, run hf auth login"
    if isinstance(error, hub.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, hub.HFValidationError):
        return "no such folder, and not a hub id"
    if isinstance(error, hub.LocalEntryNotFoundError):
        fix = "leave out --offline to download it" if offline else "and the hub cannot be reached; check the network"
        return f"no such folder, not (wholly) in the local hub cache; {fix}"
    return f"the download failed: {type(error).__name__}: {show(error)}"
