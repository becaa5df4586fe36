"""Clean: scan, repair, scan again with fresh seeds, write a new folder or none. The whole story of `elijah clean`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from elijah.data import load_images, to_uint8
from elijah.detection import Detection
from elijah.detectors import DEFAULT
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.files import new_folder, write_folder
from elijah.loading import load_model
from elijah.metrics import diversity_ratio, paired_drift
from elijah.repairs import DEFAULT as DEFAULT_REPAIR
from elijah.repairs import REPAIRS
from elijah.report import CleaningInfo, CleanReport, Report
from elijah.scan import as_dtype, inspect, picture

ROUNDS = 3  # of repair and rescan, at the most
SYNTHETIC = 128  # images that the model samples itself where no data are given
SAMPLES = 16


def clean(
    model: str,
    out: Path,
    *,
    data: str | None = None,
    synthetic: int | None = None,
    repair: str = DEFAULT_REPAIR,
    force: bool = False,
    keep: bool = False,
    detector: str = DEFAULT,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int | None = None,
    max_evaluations: int | None = None,
    max_minutes: float | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress = no_progress,
) -> CleanReport:
    """Removes what a scan of model finds and writes the repaired pipeline to out, complete or not at all.

    Repairs and rescans again, with what the rescan found, until it is clean or ROUNDS have passed.
    data: a folder or stock name of clean images; else synthetic images that the model samples itself. force: repair
    also what the scan calls clean. keep: write also what the rescan calls backdoored. The limits hold for each scan.
    Raises ElijahError when out is in use, and for what scan raises it.
    """
    if repair not in REPAIRS:
        raise ElijahError(f"unknown repair {repair!r}: use one of {', '.join(REPAIRS)}")
    if data and synthetic:
        raise ElijahError("--data and --synthetic exclude each other: give one")
    out = free_folder(out, model)
    loaded = load_model(model, revision=revision, offline=offline, device=device, dtype=as_dtype(dtype))
    settings = {"detector": detector, "device": device, "dtype": dtype, "batch_size": batch_size, "offline": offline,
                "max_evaluations": max_evaluations, "max_minutes": max_minutes, "data": data, "synthetic": synthetic,
                "repair": repair, "force": force, "keep": keep}  # fmt: skip
    images = load_images(data, size=loaded.image_shape[-1], channels=loaded.image_shape[0]) if data else None
    progress("note: scanning before the repair", 0, 0)
    detection, before = inspect(loaded, settings, seed, progress)
    if not detection.findings or (detection.verdict == "clean" and not force):
        return unrepaired(before)

    began = time.monotonic()
    if images is None:
        images = synthesise(loaded, synthetic or SYNTHETIC, seed, progress)
    fixed, found, updates, repair_seconds = loaded, detection, 0, time.monotonic() - began
    for k in range(1, ROUNDS + 1):
        began = time.monotonic()
        fixed = REPAIRS[repair]()(
            fixed, found.findings[0], images, generator=generator_for(seed, 10 * k + 1), progress=progress
        )
        fixed.network.requires_grad_(False)
        updates, repair_seconds = updates + fixed.updates, repair_seconds + time.monotonic() - began
        progress("note: scanning again with fresh seeds", 0, 0)
        found, after = inspect(fixed, settings, seed + k, progress)
        if after.verdict == "clean" or not found.findings:
            break
    written = after.verdict != "backdoored" or keep
    cleaning = CleaningInfo(
        repair=repair, data=data or "sampled from the model itself", images=len(images),
        updates=updates, seconds=repair_seconds, out=str(out) if written else None,
        **compare(loaded, fixed, detection, before, after, seed),
    )  # fmt: skip
    parts = {name: getattr(after, name) for name in Report.model_fields}
    report = CleanReport(**{**parts, "seed": seed, "cleaning": cleaning}, before=before)
    if written:
        write(out, fixed, report)
    return report


def unrepaired(before: Report) -> CleanReport:
    """The report of a cleaning that changed nothing."""
    return CleanReport(**{name: getattr(before, name) for name in Report.model_fields}, before=before)


def free_folder(out: Path, source: str) -> Path:
    """out as a path to a new folder; raises ElijahError when it is in use, unwritable, or inside the model's folder."""
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ElijahError(f"{out}: lies inside the model's folder, which is never written to; give another --out")
    out = new_folder(out)
    if not os.access(out.parent, os.W_OK):
        raise ElijahError(f"{out.parent}: cannot be written to; give another --out")
    return out


def write(out: Path, model: Model, report: CleanReport) -> None:
    """Writes the repaired pipeline and its model card to out, complete or not at all."""

    def fill(folder: Path) -> None:
        model.save(folder)
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise ElijahError(f"{out}: could not be written ({error.strerror or error}); nothing was left there") from error


def synthesise(model: Model, n: int, seed: int, progress: Progress = no_progress) -> Tensor:
    """n images uint8 [n, C, H, W] that the model itself samples from ordinary noise."""
    e = model.noise(n, generator_for(seed, 2))
    return to_uint8(model.decode(model.sample(e, model.quick_sampler, seed=seed, progress=progress))).cpu()


@torch.no_grad()
def compare(
    model: Model, fixed: Model, detection: Detection, before: Report, after: Report, seed: int
) -> dict[str, Any]:
    """The numbers and pictures before and after that need no truth: same noise, same found trigger, both models."""
    finding, sampler = (
        detection.findings[0],
        detection.evidence[0].sampler if detection.evidence else model.quick_sampler,
    )
    e = model.noise(SAMPLES, generator_for(seed, 3))
    starts = {"triggered": finding.start(e), "benign": e}
    drawn = {
        (which, name): m.sample(start, sampler, seed=seed)
        for which, m in (("before", model), ("after", fixed))
        for name, start in starts.items()
    }
    pixels = {key: model.pixels(value) for key, value in drawn.items()}
    numbers: dict[str, dict[str, float]] = {}
    for which, report in (("before", before), ("after", after)):
        triggered, benign = pixels[which, "triggered"], pixels[which, "benign"]
        numbers[which] = {
            "diversity with the found trigger / without": diversity_ratio(triggered, benign),
            "clean drift (MSE at equal noise)": paired_drift(pixels["before", "benign"], benign),
            **{name: report.scores[name] for name in report.thresholds if name in report.scores},
        }
    return {
        **numbers,
        "samples_before_png": picture(model, drawn["before", "triggered"]),
        "samples_after_png": picture(model, drawn["after", "triggered"]),
        "benign_before_png": picture(model, drawn["before", "benign"]),
        "benign_after_png": picture(model, drawn["after", "benign"]),
    }


def model_card(report: CleanReport) -> str:
    """The README.md of the new folder: what was found, what was done, what the rescan says."""
    assert report.before and report.cleaning
    done, found = report.cleaning, report.before
    rows = "\n".join(
        f"| {name} | {value:.4g} | {done.after.get(name, float('nan')):.4g} |" for name, value in done.before.items()
    )
    data = ModelCardData(library_name="diffusers", tags=["elijah", "unconditional-image-generation"])
    warning = "" if report.verdict == "clean" else f"\n**The rescan of this folder says: {report.verdict}.**\n"
    text = f"""---
{data.to_yaml()}
---

# Repaired copy of {plain(report.before.model.source)}

Elijah {report.tool.version} scanned the original, found it **{found.verdict}** ({plain(found.reason)}),
and repaired it with `{done.repair}`: {done.updates} updates on {done.images} images ({plain(done.data)}).
The rescan with fresh seeds says **{report.verdict}**: {plain(report.reason)}.
{warning}
| | before | after |
|---|---|---|
{rows}

The original folder was not changed. "Clean" means: nothing was found of what the scan covers, which is
{plain("; ".join(report.coverage))}. Not covered: {plain("; ".join(report.not_covered))}.
"""
    return str(ModelCard(text))


def plain(text: str) -> str:
    """text on one line, without the characters that Markdown and HTML read as markup."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return "".join("\\" + c if c in "`*_[]<>|\\#" else c for c in kept)
