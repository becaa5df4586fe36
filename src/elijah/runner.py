"""Runs jobs, each a process with one thread that writes one result file; resumes by what exists.

The processes are forks of one that has imported what jobs need: importing torch, diffusers and scipy takes 5 seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from elijah.diffusion import Progress, no_progress
from elijah.files import write_file

TRIES = 2
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["elijah.zoo", "elijah.bench"])


@dataclass(frozen=True)
class Job:
    """name: of its result NAME.json; command: what follows `python`, a script or -m and a module, with arguments, and
    makes the result, atomically; needs: the names of jobs that come first."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def run_jobs(
    jobs: list[Job], *, done: set[str], out: Path, logs: Path, workers: int, what: str = "jobs",
    progress: Progress = no_progress,
) -> list[str]:  # fmt: skip
    """Runs the jobs that are not in done, and returns the names of those that failed, each TRIES times.

    A failure is recorded in out/NAME.failed.json with the last lines of its log, logs/NAME.log. A job waits for those
    that it needs, and does not run when one of them failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if job.name not in done]
    finished, tries = set(done), dict.fromkeys((job.name for job in jobs), 0)
    running: dict[ForkServerProcess, Job] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for job in [j for j in waiting if finished.issuperset(j.needs)][: workers - len(running)]:
                waiting.remove(job)
                tries[job.name] += 1
                running[start(job, logs)] = job
            if not running:
                break  # what waits still needs a job that failed
            time.sleep(0.2)
            for process in [p for p in running if p.exitcode is not None]:
                job = running.pop(process)
                if process.exitcode == 0:
                    finished.add(job.name)
                    (out / f"{job.name}.failed.json").unlink(missing_ok=True)
                elif tries[job.name] < TRIES:
                    waiting.append(job)
                else:
                    failed.append(job.name)
                    record_failure(out, logs, job.name, process.exitcode or 0)
                progress(f"{what}, {len(failed)} failed", len(jobs) - len(waiting) - len(running), len(jobs))
    finally:
        for process in running:
            process.kill()
    return failed + [job.name for job in waiting]


def start(job: Job, logs: Path) -> ForkServerProcess:
    """The job as a process."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, by the process that is forked from
    process = FORKED.Process(target=perform, args=(job.command, logs / f"{job.name}.log"))
    process.start()
    return process


def perform(command: tuple[str, ...], log: Path) -> None:
    """Runs the command in this process, its output in log; ends with the process that started it, however that ends."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [part for part in command if part != "-m"]
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def record_failure(out: Path, logs: Path, name: str, code: int) -> None:
    """out/NAME.failed.json: the exit code and the end of the log."""
    lines = (logs / f"{name}.log").read_text(errors="replace").splitlines()[-5:]
    write_file(out / f"{name}.failed.json", json.dumps({"id": name, "exit_code": code, "log": lines}, indent=1) + "\n")
