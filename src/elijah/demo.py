"""The demo: the whole story offline, on two small pipelines that ship inside the package.

Both were trained on MNIST at 16 x 16; one of them was then backdoored. The demo is told neither which nor how.
"""

from __future__ import annotations

import shutil
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path

from elijah.clean import clean
from elijah.diffusion import Progress, no_progress
from elijah.files import new_folder, write_file
from elijah.render import render
from elijah.report import Report

MODELS = ("model-a", "model-b")


def demo(out: Path, *, progress: Progress = no_progress) -> int:
    """Cleans both models (which scans, and rescans what it repaired), writes pages and a table to out.

    Returns 0 when one model was found backdoored and is clean now and the other was clean, else 1.
    A folder that an earlier demo left at out is replaced.
    """
    began = time.monotonic()
    if (out / "report.html").is_file():
        shutil.rmtree(out)
    out = new_folder(out)
    out.mkdir(exist_ok=True)
    rows: list[tuple[str, str, Report]] = []
    with as_file(files("elijah") / "models") as folder:
        for name in MODELS:
            progress(f"note: {name}", 0, 0)
            cleaned = clean(str(folder / name), out / f"{name}-clean", device="cpu", progress=progress)
            assert cleaned.before is not None
            rows.append((name, "scan", cleaned.before))
            write_file(out / f"{name}.json", cleaned.before.to_json())
            write_file(out / f"{name}.html", render(cleaned.before, "html"))
            if cleaned.cleaning:
                rows.append((name, "clean", cleaned))
                write_file(out / "report.json", cleaned.to_json())
                write_file(out / "report.html", render(cleaned, "html"))
    table = summary(rows, time.monotonic() - began)
    write_file(out / "summary.md", table)
    sys.stdout.write(table + f"\nPages to look at: {out / 'report.html'} and {out / MODELS[0]}.html\n")
    verdicts = [(step, report.verdict) for _, step, report in rows]
    return 0 if sorted(verdicts) == [("clean", "clean"), ("scan", "backdoored"), ("scan", "clean")] else 1


def summary(rows: list[tuple[str, str, Report]], seconds: float) -> str:
    """A Markdown table, a line for each step."""
    lines = [
        "| model | step | verdict | best loss ratio | pull of the trigger | network evaluations | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, step, report in rows:
        ratios = [v for k, v in report.scores.items() if k.startswith("loss_ratio")]
        pull = report.scores.get("pull")
        lines.append(
            f"| {name} | {'scan' if step == 'scan' else 'rescan after the repair'} | {report.verdict} "
            f"| {min(ratios):.3f} | {'-' if pull is None else f'{pull:.2f}'} "
            f"| {report.cost.network_evaluations:,} | {report.cost.seconds:.0f} |"
        )
    return "\n".join([*lines, "", f"{seconds:.0f} seconds in all."]) + "\n"
