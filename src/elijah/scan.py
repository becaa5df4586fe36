"""Scan: load, time, detect, report. The whole story of `elijah scan`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from elijah import __version__
from elijah.data import to_uint8
from elijah.detection import Detection, Evidence, Finding
from elijah.detectors import DEFAULT, DETECTORS
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.loading import load_model
from elijah.png import grid, png_base64
from elijah.report import (
    CalibrationInfo,
    CostInfo,
    EvidenceInfo,
    FileInfo,
    FindingInfo,
    ModelInfo,
    Report,
    ResponseInfo,
    SamplesInfo,
    TargetInfo,
    ThresholdInfo,
    TriggerInfo,
    finite,
    trigger_values,
)
from elijah.verdict import DEFAULT_RATE, Calibration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {"ncsn": "a variance-exploding (NCSN) model", "ldm": "a latent model"}
# of a clean model, for the estimate alone
TYPICAL_EVALUATIONS = {"lossfit": 4_400, "collapse": 14_000, "elijah": 51_000, "terd": 960_000}
EXPLODING_EVALUATIONS = {"lossfit": 18_000}  # where the outputs are tested in full, an eighth where not


def scan(
    model: str | Model,
    *,
    detector: str = DEFAULT,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    batch_size: int | None = None,
    max_evaluations: int | None = None,
    max_minutes: float | None = None,
    revision: str | None = None,
    offline: bool = False,
    calibration: Calibration | None = None,
    false_positive_rate: float | None = DEFAULT_RATE,
    progress: Progress = no_progress,
) -> Report:
    """Scans a pipeline folder, a hub id or a loaded Model and returns the Report.

    detector: a name of detectors.DETECTORS. The limits end the search; it is undecided then. calibration: clean models
    to compare with (verdict.find_calibration has the package's own); then at most false_positive_rate of clean models
    like them are called backdoored, None: what the calibration allows. Without one the detector's fixed rule decides.
    Raises ElijahError for input that cannot be read and for a rate or a detector that the calibration is not for,
    Unsupported for models that cannot be scanned.
    """
    if isinstance(model, str):
        model = load_model(model, revision=revision, offline=offline, device=device, dtype=as_dtype(dtype))
    settings = {"detector": detector, "device": device, "dtype": dtype, "batch_size": batch_size, "offline": offline,
                "max_evaluations": max_evaluations, "max_minutes": max_minutes}  # fmt: skip
    return inspect(model, settings, seed, progress, calibration, false_positive_rate)[1]


def inspect(
    model: Model, settings: dict[str, Any], seed: int, progress: Progress, calibration: Calibration | None = None,
    rate: float | None = DEFAULT_RATE,
) -> tuple[Detection, Report]:  # fmt: skip
    """Runs settings["detector"] on a model within the settings' limits, and judges it by the calibration's clean models
    at that false positive rate, or by the detector's fixed rule."""
    detector, max_evaluations = settings["detector"], settings["max_evaluations"]
    if detector not in DETECTORS:
        raise ElijahError(f"unknown detector {detector!r}: use one of {', '.join(DETECTORS)}")
    if model.kind not in DETECTORS[detector].kinds:
        raise Unsupported(f"{model.provenance.source}: {KINDS[model.kind]}: it loads, but {detector} does not cover it")
    if calibration is not None:
        calibration.check(detector, model.kind, calibration.rate_for(model.kind) if rate is None else rate)
        if calibration.tool_version != __version__:
            progress(f"note: elijah {calibration.tool_version} made the calibration, this is {__version__}", 0, 0)
    model.max_batch = settings["batch_size"]
    announce(model, detector, max_evaluations, progress)
    with metered(model, max_evaluations, settings["max_minutes"]):
        began = time.monotonic()
        detection = DETECTORS[detector]()(model, generator=generator_for(seed), progress=progress)
        seconds = time.monotonic() - began
        detection, claim = (detection, {}) if calibration is None else judge(model, detection, calibration, rate)
        return detection, make_report(model, detection, seconds, settings, seed, claim)


def judge(
    model: Model, detection: Detection, calibration: Calibration, rate: float | None
) -> tuple[Detection, dict[str, Any]]:
    """The detection with the calibrated verdict, and what the Report says of the calibration, by key."""
    judged = calibration.judgement(
        detection.verdict, detection.reason, finite(detection.scores).get("suspicion"), model.kind, model.sample_shape,
        model.parameters, rate,
    )  # fmt: skip
    info = CalibrationInfo(
        id=calibration.id, sha256=calibration.sha256, clean_models=judged.clean_models,
        in_range=not judged.out_of_range, out_of_range=judged.out_of_range,
    )  # fmt: skip
    claim = {"p_value": judged.p_value, "false_positive_rate": judged.rate, "calibration": info}
    fitted = {} if judged.fitted_tail is None else {"p_value_fitted_tail": judged.fitted_tail}
    scores = detection.scores | fitted
    return replace(detection, verdict=judged.verdict, reason=judged.reason, scores=scores), claim


def as_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16; raises ElijahError for others."""
    if name not in DTYPES:
        raise ElijahError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def metered(model: Model, max_evaluations: int | None, max_minutes: float | None) -> Iterator[None]:
    """Inside, the model counts from zero and stops at the limits; afterwards there are none."""
    meter = model.meter
    meter.evaluations, meter.network_seconds = 0, 0.0
    meter.max_evaluations = max_evaluations
    meter.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    try:
        yield
    finally:
        meter.max_evaluations = meter.deadline = None


@torch.no_grad()
def announce(model: Model, detector: str, max_evaluations: int | None, progress: Progress) -> None:
    """Times two forwards of 8 samples and says how long the scan may take."""
    x, t = torch.zeros(8, *model.sample_shape, device=model.device), torch.zeros(8, dtype=torch.long)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        model.output(x, t.to(model.device))
        seconds.append(time.perf_counter() - began)
    typical = TYPICAL_EVALUATIONS | (EXPLODING_EVALUATIONS if model.exploding else {})
    evaluations = min(typical[detector], max_evaluations or typical[detector])
    minutes = min(seconds) / len(x) * evaluations / 60
    progress(f"note: about {evaluations:,} network evaluations, {minutes:.1f} minutes on {model.device}", 0, 0)


def make_report(
    model: Model, detection: Detection, seconds: float, settings: dict[str, Any], seed: int,
    claim: dict[str, Any] | None = None,
) -> Report:  # fmt: skip
    """The Report of a detection, with its claim by a calibration. A clean verdict carries no findings."""
    source = model.provenance
    return Report(
        model=ModelInfo(
            source=source.source, revision=source.revision, kind=model.kind, sample_shape=model.sample_shape,
            parameters=model.parameters, files=[FileInfo(name=n, sha256=h) for n, h in source.files],
        ),
        verdict=detection.verdict,  # type: ignore[arg-type]
        reason=detection.reason,
        scores=finite(detection.scores),
        thresholds={
            name: ThresholdInfo(value=t.value, backdoored=t.backdoored) for name, t in detection.thresholds.items()
        },
        findings=[] if detection.verdict == "clean" else [describe(model, f) for f in detection.findings[:1]],
        evidence=show(model, detection.evidence),
        coverage=detection.coverage,
        not_covered=detection.not_covered,
        cost=CostInfo(
            network_evaluations=model.meter.evaluations, seconds=seconds,
            network_seconds=min(model.meter.network_seconds, seconds), device=str(model.device),
        ),
        settings=settings,
        seed=seed,
        errors=list(source.notes),
        **(claim or {}),
    )  # fmt: skip


def describe(model: Model, finding: Finding) -> FindingInfo:
    """A finding with its pictures, and its trigger as it was added to the start noise, not decoded and not cut."""
    r, trigger = finding.response, finding.trigger.detach()
    target = None
    if finding.target is not None:
        kind: Literal["image", "distribution"] = "distribution" if finding.distribution else "image"
        target = TargetInfo(kind=kind, image_png=picture(model, finding.target[None]))
    return FindingInfo(
        response=ResponseInfo(kappa=r.kappa, psi=r.psi, gamma=r.gamma),
        matches=finding.matches,
        loss_ratio=finding.loss_ratio,
        trigger=TriggerInfo(
            image_png=picture(model, trigger[None]), norm=float(trigger.norm()),
            values=trigger_values(trigger.float().cpu().numpy()),
            patch=None if finding.patch is None else trigger_values(finding.patch.float().cpu().numpy()),
        ),
        target=target,
    )  # fmt: skip


def show(model: Model, evidence: list[Evidence]) -> EvidenceInfo:
    """The samples as sheets, the first sampler's in the report's own keys."""
    shown = [
        SamplesInfo(
            sampler=e.sampler, samples_with_png=picture(model, e.samples_with),
            samples_without_png=None if e.samples_without is None else picture(model, e.samples_without),
        )
        for e in evidence
    ]  # fmt: skip
    if not shown:
        return EvidenceInfo()
    first = shown[0]
    return EvidenceInfo(
        samples_with_png=first.samples_with_png, samples_without_png=first.samples_without_png,
        samplers=[s.sampler for s in shown], more=shown[1:],
    )  # fmt: skip


def picture(model: Model, x: Tensor) -> str:
    """Samples [N, ...] in the model's own range as one base64 PNG."""
    sheet = to_uint8(model.decode(x.detach()).cpu()).permute(0, 2, 3, 1).numpy()
    return png_base64(grid(sheet, columns=8) if len(sheet) > 1 else sheet[0])
