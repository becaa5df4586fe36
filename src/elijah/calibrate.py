"""Calibrate: a zoo's scans of clean models -> the document that scans are judged by, and how well those verdicts do.

Reads results as `elijah zoo run` writes them, JSON only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from elijah.errors import ElijahError
from elijah.verdict import Calibration, CleanModel, Name, Side, first_error, read_bounded

FEWEST = 10  # clean models


class Loose(BaseModel):
    """Only the keys that are needed, of the right types."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True, strict=True)


class Entry(Loose):
    """What a result says of the model's making."""

    id: Name
    part: str
    base: Name
    attack: str
    trigger: str = ""
    target: str = ""
    poison_rate: float = 0.0


class Scanned(Loose):
    """The model as the scan saw it. sample_shape: C, H, W."""

    kind: Name
    sample_shape: tuple[Side, Side, Side]
    parameters: int


class Cost(Loose):
    """What a scan cost, where the result says it."""

    network_evaluations: int | None = None
    seconds: float | None = None


class Scan(Loose):
    """One detector's scan."""

    verdict: str
    reason: str = ""
    scores: dict[str, float] = {}
    model: Scanned | None = None
    cost: Cost = Cost()


UNSUPPORTED = Scan(verdict="unsupported")


class Result(Loose):
    """One model's result."""

    model: Entry
    detections: dict[str, Scan] = {}


def read_results(folders: list[Path]) -> dict[Path, Result]:
    """The results of models in folders, by file; other JSON files there, such as those of bases, are left out.

    Raises ElijahError for a folder that is not there, a file that is no sound JSON or result, and an id that is there
    twice.
    """
    found: dict[Path, Result] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ElijahError(f"{folder}: no such folder of results")
        for file in sorted(folder.glob("*.json")):
            text = read_bounded(file)
            try:
                document = json.loads(text)
                model = document.get("model") if isinstance(document, dict) else None
                if isinstance(model, dict) and {"attack", "part"} <= set(model):
                    found[file] = Result.model_validate_json(text)
            except ValidationError as error:
                raise ElijahError(f"{file}: no result of a zoo: {first_error(error)}") from error
            except (ValueError, RecursionError) as error:
                raise ElijahError(f"{file}: no JSON document") from error
    name, count = next(iter(Counter(r.model.id for r in found.values()).most_common(1)), ("", 0))
    if count > 1:
        raise ElijahError(f"two results are called {name}: give each model once")
    return found


def scored(file: Path, result: Result, detector: str) -> tuple[Scanned, Scan, float]:
    """A scan with its suspicion; raises ElijahError where an older version made it."""
    scan = result.detections[detector]
    if scan.model is None or "suspicion" not in scan.scores:
        raise ElijahError(
            f"{file}: {detector} left no suspicion or no model there: scan again (remove the file, then elijah zoo run)"
        )
    return scan.model, scan, scan.scores["suspicion"]


def calibrate(folders: list[Path], output: Path, detector: str, part: str) -> tuple[Calibration, str]:
    """The calibration from the clean models of a part that the detector scanned, not written yet, and what was taken.

    Raises ElijahError as read_results does, for scans without suspicion, and for fewer than FEWEST clean models.
    """
    results = read_results(folders)
    clean = {f: r for f, r in results.items() if r.model.part == part and r.model.attack == "clean"}
    taken = {f: r for f, r in clean.items() if r.detections.get(detector, UNSUPPORTED).verdict != "unsupported"}
    others = Counter(r.model.part for r in results.values() if r.model.part != part)
    counts = ", ".join(f"{n} of {name}" for name, n in sorted(others.items())) or "none of other parts"
    left = f"left out: {counts}, {len(clean) - len(taken)} clean that {detector} did not scan"
    if len(taken) < FEWEST:
        raise ElijahError(f"{len(taken)} clean models of {part} scanned by {detector}: {FEWEST} are needed; {left}")
    models = []
    for file, result in taken.items():
        seen, _, score = scored(file, result, detector)
        models.append(CleanModel(id=result.model.id, base=result.model.base, score=score, **seen.model_dump()))
    command = ["elijah", "calibrate", *map(str, folders), "-o", str(output), "--detector", detector, "--part", part]
    name = re.sub(r"[^\w.-]+", "-", output.stem)[:100] or "calibration"
    made = Calibration(id=name, detector=detector, command=shlex.join(command)[:10_000], clean=models)
    kinds = Counter(m.kind for m in models)
    words = "; ".join(f"{n} {kind}: smallest p-value {1 / (n + 1):.3g}" for kind, n in sorted(kinds.items()))
    return made, f"{len(models)} clean models ({words}); {left}"


def check_apart(results: list[Result], part: str, test: str) -> None:
    """Raises ElijahError when models of the two parts share an id, a base, a trigger or a target."""
    for what in ("id", "base", "trigger", "target"):
        one, other = ({getattr(r.model, what) for r in results if r.model.part == p} - {""} for p in (part, test))
        if shared := sorted(one & other):
            raise ElijahError(f"{part} and {test} share the {what} {shared[0]}: {test} would be no test")


def verdict_table(calibration: Calibration, folders: list[Path], part: str, test: str, rate: float) -> str:
    """Markdown: how the calibrated verdicts on the models of the part test come out, as rates.rates_table has it.

    Raises ElijahError when there are none, for scans without suspicion, for a rate that the calibration cannot claim,
    and when the two parts share an id, a base, a trigger or a target.
    """
    from elijah.rates import Judged, rates_table  # imports torch

    results = read_results(folders)
    check_apart(list(results.values()), part, test)
    rows, missing, detector = [], 0, calibration.detector
    for file, result in results.items():
        model = result.model
        if model.part != test:
            continue
        if detector not in result.detections:
            missing += 1
            continue
        kind, verdict, cost = "unsupported", "undecided", result.detections[detector].cost
        if result.detections[detector].verdict != "unsupported":
            seen, scan, score = scored(file, result, detector)
            kind, verdict = (
                seen.kind,
                calibration.judgement(
                    scan.verdict, scan.reason, score, seen.kind, seen.sample_shape, seen.parameters, rate
                ).verdict,
            )
        rows.append(Judged(verdict, model.base, model.attack, kind, model.trigger, model.poison_rate,
                           cost.network_evaluations, cost.seconds))  # fmt: skip
    if not rows:
        raise ElijahError(f"no model of {test} was scanned by {detector}")
    note = (
        f"Verdicts by calibration {calibration.id} ({len(calibration.clean)} clean models, {detector}) at a "
        f"false positive rate of {rate:g} on the part {test}."
    )
    note += f" Not scanned: {missing}." if missing else ""
    return "\n".join([note, "", rates_table(rows)])


def share(verdicts: list[str], right: str) -> tuple[str, str, str]:
    """How many of the verdicts are right, their share in percent, and its interval."""
    if not verdicts:
        return "-", "-", "-"
    from elijah.metrics import wilson  # imports torch

    k, n = verdicts.count(right), len(verdicts)
    low, high = wilson(k, n)
    return f"{k} of {n}", f"{100 * k / n:.0f}", f"{100 * low:.0f} to {100 * high:.0f}"
