"""Scans compared: other detectors, seeds and settings, or more and less effort, each on the same loaded model.

A bench is a list of runs. One job takes one model of a zoo, which must be there, performs all runs on it in one
process, one after the other, and writes out/ID.json. The scans are told nothing; only the tables know the truth.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from elijah.detectors import DEFAULT, DETECTORS, LossFit
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.files import write_file
from elijah.loading import load_model
from elijah.manifest import Manifest
from elijah.report import finite
from elijah.runner import Job, run_jobs
from elijah.scan import as_dtype, metered
from elijah.zoo import read_result

Read = tuple[Path, Manifest]  # a manifest and where it was read
FACTORS = (0.25, 0.5, 1.0, 2.0)
BATCHES = (16, 64)


@dataclass(frozen=True)
class Run:
    """One scan. batch_size: rows a network call; effort: times lossfit's default iterations."""

    name: str
    detector: str = DEFAULT
    seed: int = 0
    batch_size: int | None = None
    threads: int = 1
    dtype: str = "float32"
    effort: float = 1.0


def detector_runs(names: list[str]) -> list[Run]:
    """One run a detector. Raises ElijahError for an unknown one."""
    if unknown := [name for name in names if name not in DETECTORS]:
        raise ElijahError(f"unknown detector {unknown[0]!r}: use one of {', '.join(DETECTORS)}")
    return [Run(name, name) for name in names]


def stability_runs(seeds: int) -> list[Run]:
    """Seeds; then what should change no verdict: batch sizes, threads (the first run has one) and precision."""
    same = [Run(f"batch-{n}", batch_size=n) for n in BATCHES]
    return [*(Run(f"seed-{k}", seed=k) for k in range(seeds)), *same, Run("threads-2", threads=2),
            Run("bfloat16", dtype="bfloat16")]  # fmt: skip


def effort_runs() -> list[Run]:
    """lossfit with FACTORS of its effort."""
    return [Run(f"effort-{factor:g}", effort=factor) for factor in FACTORS]


def read_runs(text: str) -> list[Run]:
    """The runs of a JSON list of them. Raises ElijahError for anything else."""
    try:
        return [Run(**fields) for fields in json.loads(text)]
    except (TypeError, ValueError) as error:
        raise ElijahError(f"no list of scans: {error}") from error


def scaled(search: Search, factor: float) -> Search:
    """The search with factor times the iterations of all that it does; one at least."""
    counts = {f.name: getattr(search, f.name) for f in fields(search) if f.name.endswith("iterations")}
    follow, lead = (
        tuple((max(1, round(factor * n)), rows, kept) for n, rows, kept in rounds)
        for rounds in (search.follow, search.lead)
    )
    return replace(search, follow=follow, lead=lead, **{name: max(1, round(factor * n)) for name, n in counts.items()})


def perform(model: Model, run: Run) -> dict[str, Any]:
    """One run on a loaded model: verdict, scores, cost; unsupported for a kind that the detector does not cover."""
    if model.kind not in DETECTORS[run.detector].kinds:
        return {"verdict": "unsupported"}
    plain = run.effort == 1
    detector = DETECTORS[run.detector]() if plain else LossFit(search=scaled(Search(), run.effort))
    model.max_batch, model.dtype = run.batch_size, as_dtype(run.dtype)
    torch.set_num_threads(run.threads)
    with metered(model, None, None):
        began = time.monotonic()
        found = detector(model, generator=generator_for(run.seed), progress=no_progress)
        seconds = time.monotonic() - began
    torch.set_num_threads(1)
    cost = {"network_evaluations": model.meter.evaluations, "seconds": round(seconds, 3),
            "network_seconds": round(min(model.meter.network_seconds, seconds), 3)}  # fmt: skip
    return {"verdict": found.verdict, "scores": finite(found.scores), "cost": cost}


def run_model(manifest: Manifest, name: str, cache: Path, out: Path, runs: list[Run]) -> None:
    """All runs on one model, in this process: out/NAME.json. Runs of an earlier call that are not among these are kept.

    cache: the manifest's folder of weights.
    """
    entry = next((e for e in manifest.entries() if e.id == name), None)
    if entry is None:
        raise ElijahError(f"{manifest.name}: has no model {name}")
    digest, earlier = manifest.digests()[name], read_result(out / f"{name}.json")
    kept = earlier["runs"] if earlier.get("settings_sha256") == digest else {}
    model = load_model(str(cache / name), device="cpu")
    warm_up(model)
    found = {run.name: {"how": asdict(run), **perform(model, run)} for run in runs}
    result = {"schema_version": 1, "id": name, "settings_sha256": digest, "kind": model.kind,
              "entry": entry.model_dump(exclude_defaults=True), "runs": kept | found}  # fmt: skip
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def warm_up(model: Model) -> None:
    """Two forwards, so that the first run pays for no first call."""
    for _ in range(2):
        model.output(torch.zeros(8, *model.sample_shape, device=model.device), torch.zeros(8, dtype=torch.long))


def bench(
    what: str, runs: list[Run], table: Callable[[list[dict[str, Any]]], str], manifests: list[Read], *, out: Path,
    cache: Path, workers: int, only: str, progress: Progress = no_progress,
) -> str:  # fmt: skip
    """Performs the runs on every model whose weights are in cache and in whose id only is found, where that is not done
    yet; writes and returns the table of all of them, out/WHAT.md.

    Raises ElijahError where no model has weights, and for failed jobs.
    """
    homes, missing = there(manifests, cache, only)
    if not homes:
        raise ElijahError(f"no weights in {cache} of a model called like {only!r}; elijah zoo run makes them")

    def is_done(name: str) -> bool:
        found = read_result(out / f"{name}.json")
        same = found.get("settings_sha256") == homes[name][1]
        return same and all(found["runs"].get(run.name, {}).get("how") == asdict(run) for run in runs)

    listed = json.dumps([asdict(run) for run in runs])
    places = ("--out", str(out), "--cache", str(cache))
    jobs = [Job(name, ("-m", "elijah", "bench", "scans", str(path), name, listed, *places))
            for name, (path, _) in homes.items()]  # fmt: skip
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads take fifty times as long on busy cores
    with tempfile.TemporaryDirectory() as logs:
        failed = run_jobs(jobs, done={name for name in homes if is_done(name)}, out=out, logs=Path(logs),
                          workers=workers, what=f"bench {what}", progress=progress)  # fmt: skip
    if failed:
        raise ElijahError(f"{len(failed)} jobs failed, such as {failed[0]}: see {out / failed[0]}.failed.json")
    results = [read_result(out / f"{name}.json") for name in homes]
    for result in results:
        result["runs"] = {run.name: result["runs"][run.name] for run in runs}
    text = table(results) + (f"\nWithout weights, so left out: {missing} models.\n" if missing else "")
    write_file(out / f"{what}.md", text)
    return text


def there(manifests: list[Read], cache: Path, only: str) -> tuple[dict[str, tuple[Path, str]], int]:
    """The models whose weights are in the cache and made by the manifest's settings: the manifest's file and the hash
    of these settings, by id; and how many others are not there."""
    found, missing = {}, 0
    for path, manifest in manifests:
        digests = manifest.digests()
        for entry in manifest.entries():
            mark = cache / manifest.name / f"{entry.id}.sha256"
            if re.search(only, entry.id) is None:
                continue
            if mark.is_file() and mark.read_text() == digests[entry.id]:
                found[entry.id] = (path, digests[entry.id])
            else:
                missing += 1
    return found, missing
