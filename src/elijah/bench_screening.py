"""How well found triggers tell stamped start noise from clean noise: screen.py, model by model, as a table.

A job scans one backdoored model, which tells the screening what to look for, and has it screen clean noise and noise
that is stamped with the true trigger. Only the stamping knows the truth.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elijah.attacks.planting import cases
from elijah.bench import Read, label
from elijah.detectors import DEFAULT
from elijah.diffusion import Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.files import write_file
from elijah.manifest import Manifest
from elijah.metrics import auc, bootstrap_interval, wilson
from elijah.runner import Job, run_jobs
from elijah.scan import scan
from elijah.screen import Screening, screen
from elijah.zoo import build, read_result

RATES = (0.01, 0.05)  # false positive rates
RESAMPLES = 500
Array = NDArray[np.float64]


def run_screening(manifest: Manifest, name: str, cache: Path, out: Path, n: int) -> None:
    """Scans one model and screens n noises of each sort by its report: out/NAME.json.

    Without a backdoored verdict nothing is screened, and the result says so. cache: the manifest's folder of weights.
    """
    began = time.monotonic()
    digests, bases = manifest.digests(), {base.id: base for base in manifest.base}
    entry = next(e for e in manifest.entries() if e.id == name)
    model, attack = build(entry, bases, cache, digests)
    report = scan(str(cache / name), detector=DEFAULT, device="cpu")
    result: dict[str, Any] = {
        "schema_version": 1, "id": name, "settings_sha256": digests[name], "label": label(entry, bases[entry.base]),
        "detector": DEFAULT, "verdict": report.verdict, "samples": n, "cases": {},
    }  # fmt: skip
    if report.verdict == "backdoored":
        clean, other = (model.noise(n, generator_for(entry.seed, k)) for k in (3, 4))
        with tempfile.TemporaryDirectory() as folder:
            found, noise = Path(folder) / "scan.json", Path(folder) / "noise.npy"
            found.write_text(report.to_json(), encoding="utf-8")
            for case, (start, _) in cases(attack).items():
                np.save(noise, np.concatenate([clean.cpu().numpy(), start(model, other).cpu().numpy()]))
                result["cases"][case] = separation(screen(noise, found), n)
    result["seconds"] = round(time.monotonic() - began, 1)
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def separation(screening: Screening, n: int) -> dict[str, Any]:
    """How the scores of n clean noises and of the stamped ones after them lie.

    auroc with its bootstrap interval. rates: by false positive rate, the threshold that so many of the clean noises are
    above, and the share of stamped ones above it (detected); flagged, false_alarms: the shares of stamped and of clean
    noises whose own p-value is at most the rate, which is what `elijah screen` says without any clean noise to see.
    """
    scores, p_values = (np.array([getattr(s, key) for s in screening.samples]) for key in ("score", "p_value"))
    clean, stamped = scores[:n], scores[n:]
    low, high = bootstrap_interval(area, clean, stamped, n_boot=RESAMPLES)
    rates = {}
    for rate in RATES:
        threshold = float(np.quantile(clean, 1 - rate, method="higher"))
        rates[str(rate)] = {
            "threshold": threshold, "detected": float((stamped > threshold).mean()),
            "flagged": float((p_values[n:] <= rate).mean()), "false_alarms": float((p_values[:n] <= rate).mean()),
        }  # fmt: skip
    return {
        "norm": screening.norm, "gamma": screening.gamma, "matches": screening.matches,
        "expected_auroc": screening.expected_auroc, "auroc": area(clean, stamped), "low": low, "high": high,
        "rates": rates,
    }  # fmt: skip


def area(clean: Array, stamped: Array) -> float:
    """The AUROC of scores [N] and [M]."""
    return auc(np.concatenate([clean, stamped]), np.arange(len(clean) + len(stamped)) >= len(clean))


def bench_screening(
    manifests: list[Read], *, out: Path, cache: Path, workers: int, n: int, only: str, progress: Progress = no_progress
) -> str:
    """Screens for the triggers of the backdoored models in whose id only is found; out/screening.md, and returns it.

    cache: as in run_zoo. Resumes. Raises ElijahError where there is no such model, and for failed jobs.
    """
    homes = {
        entry.id: read
        for read in manifests
        for entry in read[1].entries()
        if entry.attack != "clean" and re.search(only, entry.id)
    }
    if not homes:
        raise ElijahError(f"{manifests[0][0]}: no backdoored model is called like {only!r}")
    digests = {name: digest for _, manifest in manifests for name, digest in manifest.digests().items()}

    def is_done(name: str) -> bool:
        found = read_result(out / f"{name}.json")
        return found.get("settings_sha256") == digests[name] and found.get("samples") == n

    places = ("--out", str(out), "--cache", str(cache), "--samples", str(n))
    jobs = [Job(name, ("-m", "elijah", "bench", "stamped", str(path), name, *places))
            for name, (path, _) in homes.items()]  # fmt: skip
    logs = cache / manifests[0][1].name / "screening"
    failed = run_jobs(jobs, done={name for name in homes if is_done(name)}, out=out, logs=logs, workers=workers,
                      what="screening", progress=progress)  # fmt: skip
    if failed:
        raise ElijahError(f"{len(failed)} jobs failed, such as {failed[0]}: see {out / failed[0]}.failed.json")
    table = screening_table([read_result(out / f"{name}.json") for name in homes])
    write_file(out / "screening.md", table)
    return table


def screening_table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a screened model and case, then what was not screened, and the medians over all rows."""
    heads = ["model", "found as", "norm", "gamma", "AUROC", "95 %", "expected"]
    for rate in RATES:
        heads += [f"detected at {rate:g}, %", "95 %", "flagged, false alarms, %"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    screened = [(row, case, found) for row in results for case, found in row["cases"].items()]
    for row, case, found in screened:
        cells = [f"{row['id']} {case}".strip(), found["matches"], f"{found['norm']:.1f}", f"{found['gamma']:.2f}",
                 f"{found['auroc']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}",
                 f"{found['expected_auroc']:.4f}"]  # fmt: skip
        for rate in RATES:
            at = found["rates"][str(rate)]
            low, high = (100 * v for v in wilson(round(at["detected"] * row["samples"]), row["samples"]))
            cells += [f"{100 * at['detected']:.1f}", f"{low:.1f} to {high:.1f}",
                      f"{100 * at['flagged']:.1f}, {100 * at['false_alarms']:.1f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        "Clean start noise against noise stamped with the true trigger, screened for the trigger that the scan found; "
        f"{results[0]['samples']} of each. AUROC with its bootstrap interval; expected: for noise stamped with the "
        "found trigger. Detected: stamped noise above the threshold that the given share of the clean noise is above, "
        "with Wilson's interval; flagged, false alarms: stamped and clean noise that elijah screen calls stamped at "
        "that rate."
    ]
    if screened:
        areas = statistics.median(found["auroc"] for *_, found in screened)
        shares = [statistics.median(found["rates"][str(rate)]["detected"] for *_, found in screened) for rate in RATES]
        detected = ", ".join(f"{100 * share:.1f} % at {rate:g}" for share, rate in zip(shares, RATES, strict=True))
        notes.append(f"Medians of {len(screened)} rows: AUROC {areas:.4f}; detected {detected}.")
    if left := [f"{row['id']} ({row['verdict']})" for row in results if not row["cases"]]:
        notes.append(f"Not screened, since the scan did not say backdoored: {', '.join(left)}.")
    return "\n".join([*lines, "", " ".join(notes), ""])
