"""Runs the jobs of a manifest, one process with one thread each; resumes by what exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from elijah.diffusion import Progress, no_progress
from elijah.files import write_file
from elijah.zoo import Manifest

TRIES = 2


def run_zoo(
    path: Path, manifest: Manifest, *, out: Path, cache: Path, workers: int, detectors: list[str],
    progress: Progress = no_progress,
) -> list[str]:  # fmt: skip
    """Runs what has no out/ID.json yet and returns the ids that failed, each TRIES times.

    A failure is recorded in out/ID.failed.json with the last lines of its log, and tried again by the next run. A model
    waits for its base.
    """
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    needs = {base.id: "" for base in manifest.base} | {entry.id: entry.base for entry in manifest.entries()}
    waiting, total = [name for name in needs if not (out / f"{name}.json").exists()], len(needs)
    running: dict[subprocess.Popen[bytes], str] = {}
    tries, failed = dict.fromkeys(needs, 0), []
    try:
        while waiting or running:
            ready = [n for n in waiting if not needs[n] or (out / f"{needs[n]}.json").exists()]
            for name in ready[: workers - len(running)]:
                waiting.remove(name)
                tries[name] += 1
                running[start(path, name, out, cache, detectors)] = name
            if not running:
                break  # what waits still needs a base that failed
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                name = running.pop(process)
                if process.returncode == 0:
                    (out / f"{name}.failed.json").unlink(missing_ok=True)
                elif tries[name] < TRIES:
                    waiting.append(name)
                else:
                    failed.append(name)
                    record_failure(out, cache, name, process.returncode)
                done = total - len(waiting) - len(running)
                progress(f"zoo {manifest.name}, {len(failed)} failed", done, total)
    finally:
        for process in running:
            process.kill()
    return failed + waiting


def start(path: Path, name: str, out: Path, cache: Path, detectors: list[str]) -> subprocess.Popen[bytes]:
    """One job as a process, its output in the cache's log."""
    command = [sys.executable, "-m", "elijah", "zoo", "job", str(path), name, "--out", str(out), "--cache", str(cache)]
    command += [part for detector in detectors for part in ("--detector", detector)]
    with (cache / f"{name}.log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def record_failure(out: Path, cache: Path, name: str, code: int) -> None:
    """out/NAME.failed.json: the exit code and the end of the log."""
    lines = (cache / f"{name}.log").read_text(errors="replace").splitlines()[-5:]
    write_file(out / f"{name}.failed.json", json.dumps({"id": name, "exit_code": code, "log": lines}, indent=1) + "\n")
