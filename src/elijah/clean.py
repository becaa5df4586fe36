"""Clean: scan, repair, scan again with fresh seeds, write a new folder or none. The whole story of `elijah clean`."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from elijah import processes
from elijah.card import PICTURES, model_card
from elijah.data import load_images
from elijah.detection import Detection, Evidence, Finding
from elijah.detectors import DEFAULT, LossFit
from elijah.detectors.hypothesis import Hypothesis
from elijah.detectors.outputs import correlation, pull, seen_target
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.files import new_folder, write_folder
from elijah.guard import DIVERSITY, DRIFT, LOSS, Quality, quality
from elijah.loading import load_model
from elijah.metrics import diversity_ratio, paired_drift
from elijah.repairs import DEFAULT as DEFAULT_REPAIR
from elijah.repairs import REPAIRS
from elijah.repairs.unshift import is_loose, one_target
from elijah.report import CleaningInfo, CleanReport, Report, finite
from elijah.scan import as_dtype, describe, inspect, picture
from elijah.synthetic import LEAST, no_target, screened, screening_words, synthesise

ROUNDS = 6  # of repair and rescan, at the most
SEEDS = 4  # of a rescan where much of a finding's loss is left
SYNTHETIC = 512  # images that the model samples itself where no data are given; an eighth if they are costly
NEAR_AT_BEST = (
    "much of the loss of what was repaired is left, as attackers who know this detector leave it: their trigger may be"
    " another, and a rescan may miss it"
)
SAMPLES = 16
LED = 0.1  # of the clean outputs' median MSE to a found target: what a clean network cannot be led within
MOST = 0.1  # of the outputs, from where on a repaired model is repaired again
# once, so with more outputs and steps than in a scan
LEADING = replace(LossFit().learned, lead_steps=12, lead_rows=8, lead_sampler_steps=4, sampler_steps=4)
Checkpoint = Callable[[str], Path]  # by what the repair is made from: where it is kept while it runs


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

    Repairs and rescans again, with what the rescans found added, until nothing that was found fires any more and no
    faint noise leads to its target, or ROUNDS have passed; where it does all the same the verdict is undecided, and
    where much of the loss of what was found is left. A repair that harms the model's own clean samples (guard.py) makes
    the verdict undecided too, and nothing is written. data: a folder or stock name of clean images; else synthetic
    images that the model samples itself. force: repair also what the scan calls clean. keep: write also what the rescan
    calls backdoored, or the repair harmed. The limits hold for each scan. dtype bfloat16: the repair too computes in
    it, on weights in float32. A run that was killed in a repair goes on there when it is started again, from a file
    beside out. Raises ElijahError when out is in use, and for what scan raises it.
    """
    if repair not in REPAIRS:
        raise ElijahError(f"unknown repair {repair!r}: use one of {', '.join(REPAIRS)}")
    if processes.count() > 1 and device != "auto":
        raise ElijahError(f"--device {device}: several processes take a GPU each, or all the CPU; leave --device out")
    if data and synthetic:
        raise ElijahError("--data and --synthetic exclude each other: give one")
    if dtype == "float16":
        raise ElijahError("--dtype float16: its range is too small for a repair's gradients; use bfloat16")
    out = free_folder(out, model)
    loaded = load_model(model, revision=revision, offline=offline, device=device, dtype=as_dtype(dtype))
    settings = {"detector": detector, "device": device, "dtype": dtype, "batch_size": batch_size, "offline": offline,
                "max_evaluations": max_evaluations, "max_minutes": max_minutes, "data": data, "synthetic": synthetic,
                "repair": repair, "force": force, "keep": keep}  # fmt: skip
    images = load_images(data, size=loaded.image_shape[-1], channels=loaded.image_shape[0]) if data else None
    progress("note: scanning before the repair", 0, 0)
    detection, before = processes.agreed(inspect(loaded, settings, seed, progress))
    if not detection.findings or (detection.verdict == "clean" and not force):
        return unrepaired(before)

    began = time.monotonic()
    if images is None:
        images = processes.agreed(synthesise(loaded, synthetic or enough(loaded), seed, progress))
    sampling = time.monotonic() - began
    try:
        done = remove(loaded, detection, images, settings, seed, progress, checkpoint=beside(out))
        report = report_of(loaded, done, detection, before, len(images), settings, seed, sampling)
        if (report.verdict != "backdoored" and not done.harm) or keep:
            report = with_folder(report, out)
            if processes.rank() == 0:
                write(out, done.model, report)
    except Exception:
        forget(out)
        raise
    forget(out)
    return report


@dataclass
class Removal:
    """What remove did. findings: all that were repaired; numbers: of compare, on the last model.

    fires: whether one of the findings still does, or a faint trigger leads to the target of one, although the last
    rescan found nothing that does.
    """

    model: Model
    findings: list[Finding] = field(default_factory=list)
    rescans: list[Report] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))  # that the last repair had, after screening
    updates: int = 0
    seconds: float = 0.0
    harm: list[str] = field(default_factory=list)
    fires: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)


def remove(
    model: Model, detection: Detection, images: Tensor, settings: dict[str, Any], seed: int, progress: Progress,
    *, checkpoint: Checkpoint | None = None,
) -> Removal:  # fmt: skip
    """Repairs model of the detection's best finding, rescans, and again with what the rescan found: ROUNDS at the most.

    Each repair starts from the last one's model and is told of all findings so far, so that none comes back. Ends when
    nothing that was found fires any more, also where the rescan is undecided for its loss alone: every repair costs
    quality, and what does nothing gives it nothing to remove. And when the guard says that the model was harmed. A
    rescan that finds nothing looks for a target by chance; the targets that were found are asked for (led_back), and
    where much of a finding's loss is left several rescans look.
    """
    done, found, new = Removal(model), detection, True
    for k in range(1, ROUNDS + 1):
        began = time.monotonic()
        done.findings += found.findings[:1] if new else []
        done.images = screened(model, images, done.findings)
        fixed = REPAIRS[settings["repair"]]()(
            done.model, done.findings, done.images, generator=generator_for(seed, 10 * k + 1), progress=progress,
            checkpoint=checkpoint(fingerprint(model, done, settings, seed)) if checkpoint else None,
        )  # fmt: skip
        fixed.network.requires_grad_(False)
        done.model = fixed
        done.updates, done.seconds = done.updates + fixed.updates, done.seconds + time.monotonic() - began
        done.numbers, measured = processes.agreed(compare(model, done, detection, seed))
        done.harm = measured.harm
        progress("note: scanning again with fresh seeds", 0, 0)
        found, after = rescan(fixed, done.findings, settings, seed + k, progress)
        done.rescans.append(after)
        new, done.fires = bool(found.findings) and acts(found), False
        if done.harm:
            break
        if not new:
            led = processes.agreed(led_back(fixed, done.findings, seed + k))
            done.fires = bool(led) or processes.agreed(still_fire(fixed, done.findings, seed + k))
            if not done.fires:
                break
            done.findings += led if k < ROUNDS else []
            progress("note: noise still leads to an image that was found: repairing on", 0, 0)
    return done


def rescan(
    model: Model, findings: list[Finding], settings: dict[str, Any], seed: int, progress: Progress
) -> tuple[Detection, Report]:
    """The scan of a model that was repaired of findings. Where one of these is loose, chance decides what a scan finds:
    then the first of up to SEEDS scans that finds what acts, or the last."""
    for k in range(SEEDS if any(is_loose(model, f) for f in findings) else 1):
        found, after = processes.agreed(inspect(model, settings, seed + k * ROUNDS, progress))
        if found.findings and acts(found):
            break
    return found, after


def acts(found: Detection) -> bool:
    """Whether what was found does anything to the outputs, as far as its detector looked."""
    pull, limit = found.scores.get("pull"), found.thresholds.get("pull")
    seen = pull is None or limit is None or pull >= limit.value
    return found.verdict == "backdoored" or (found.verdict == "undecided" and seen)


def report_of(
    model: Model, done: Removal, detection: Detection, before: Report, drawn: int, settings: dict[str, Any], seed: int,
    sampling: float,
) -> CleanReport:  # fmt: skip
    """The report of a removal, of which nothing is written yet. drawn: how many images there were before screening."""
    after = done.rescans[-1]
    scores = {
        key: {name: report.scores[name] for name in report.thresholds if name in report.scores}
        for key, report in (("before", before), ("after", after))
    }
    dropped = drawn - len(done.images)
    cleaning = CleaningInfo(
        repair=settings["repair"], data=settings["data"] or "sampled from the model itself", images=len(done.images),
        dropped=dropped, screening=screening_words(done.findings, len(done.images), dropped),
        rounds=len(done.rescans), updates=done.updates, seconds=done.seconds + sampling, harm=done.harm,
        findings=[describe(model, finding) for finding in done.findings],
        **{**done.numbers, **{key: done.numbers[key] | scores[key] for key in scores}},
    )  # fmt: skip
    parts = {name: getattr(after, name) for name in Report.model_fields} | {"seed": seed, "cleaning": cleaning}
    if done.fires:
        why = f"{after.reason}, but noise still leads to an image that was found before"
        parts |= {"verdict": "undecided", "reason": why}
    elif before.verdict != "clean" and after.verdict == "clean" and any(is_loose(model, f) for f in done.findings):
        parts |= {"verdict": "undecided", "reason": f"{after.reason}, but {NEAR_AT_BEST}"}
    if done.harm and after.verdict != "backdoored":
        parts |= {"verdict": "undecided", "reason": f"the repair harmed the model: {'; '.join(done.harm)}"}
    return CleanReport(**parts, before=before)


def with_folder(report: CleanReport, out: Path) -> CleanReport:
    """The report, saying that out was written."""
    assert report.cleaning
    return report.model_copy(update={"cleaning": report.cleaning.model_copy(update={"out": str(out)})})


def enough(model: Model) -> int:
    """How many synthetic images to repair with, where the user does not say."""
    return SYNTHETIC // 8 if model.exploding else SYNTHETIC


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
    """Writes the repaired pipeline, its model card and the card's pictures to out, complete or not at all."""

    def fill(folder: Path) -> None:
        model.save(folder)
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
        for name, png in PICTURES.items():
            if content := getattr(report.cleaning, png):
                (folder / name).write_bytes(base64.b64decode(content))

    try:
        write_folder(out, fill)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ElijahError(f"{out}: could not be written ({why}); nothing was left there") from error


def beside(out: Path) -> Checkpoint:
    """Where the repairs for out are kept while they run: hidden files beside it."""
    return lambda made_from: out.with_name(f".{out.name}.{made_from}.ckpt")


def forget(out: Path) -> None:
    """Deletes what is kept beside out while it is made: checkpoints, and half-written folders of killed runs."""
    if processes.rank():
        return
    ours = re.compile(rf"\.{re.escape(out.name)}\.([0-9a-f]{{16}}\.ckpt(\.part)?|[a-z0-9_]{{8}})")
    for path in out.parent.iterdir():
        if ours.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def fingerprint(model: Model, done: Removal, settings: dict[str, Any], seed: int) -> str:
    """Names what a repair is made from, so that no other one goes on from its checkpoint."""
    parts = [*(digest for _, digest in model.provenance.files), settings["repair"], settings["dtype"], str(seed),
             str(len(done.rescans))]  # fmt: skip
    digest = hashlib.sha256(" ".join(parts).encode())
    for finding in done.findings:
        target = finding.trigger if finding.target is None else finding.target
        digest.update(torch.stack([finding.trigger, target]).detach().float().cpu().numpy().tobytes())
    digest.update(done.images.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def still_fire(model: Model, findings: list[Finding], seed: int) -> bool:
    """Whether a found trigger moves outputs onto its image, under a stochastic or a deterministic sampler. Where the
    target is a distribution nothing tells, and the rescan has to."""
    e = model.noise(SAMPLES // 2 if model.exploding else SAMPLES, generator_for(seed, 4))
    for sampler in LossFit.exploding_samplers if model.exploding else LossFit.samplers:
        without = model.sample(e, sampler, seed=seed)
        for f in findings:
            if (y := one_target(f)) is not None:
                shown = Evidence(sampler, model.sample(f.start(e), sampler, seed=seed), without)
                if shows_target(model, shown, f.trigger, y.to(e)):
                    return True
    return False


def shows_target(model: Model, shown: Evidence, r: Tensor, y: Tensor) -> bool:
    """Whether outputs are pulled onto y [C, H, W], and not by the trigger's own picture alone.

    That is what a deterministic sampler draws of a large trigger r [C, H, W] that a network takes for noise, and it may
    be as dark as y. So where no output is so near that it can only be y, they have to look like y rather than like r.
    """
    if pull(model, shown, y) < LossFit.min_pull:
        return False
    seen = seen_target(model, shown, y)
    return pull(model, shown, y, LED) >= LossFit.min_pull or correlation(seen, y) >= correlation(seen, r.to(seen))


def led_back(model: Model, findings: list[Finding], seed: int) -> list[Finding]:
    """Faint triggers that lead outputs as near to a found target as no clean network can be led, one a target."""
    targets: list[Tensor] = []
    for f in findings:
        if (y := one_target(f)) is not None and not any(torch.equal(y.to(other), other) for other in targets):
            targets.append(y.to(model.device))
    if not targets or not LEADING.families_of(model):
        return []
    return [
        Finding(h.family.response, h.r, y, h.loss_ratio, h.family.matches)
        for y, (h, share) in zip(targets, lead(model, targets, seed), strict=True) if share >= MOST
    ]  # fmt: skip


def lead(model: Model, targets: list[Tensor], seed: int) -> list[tuple[Hypothesis, float]]:
    """For each target [C, H, W] the faint trigger that collapse.py comes to, which is an attacker's way too, and the
    share of outputs that it pulls within LED of the target."""
    g, sampler = generator_for(seed, 5), LossFit.samplers[-1]
    with model.frozen():
        led = LEADING.led_to(model, torch.stack(targets), g, no_progress)
    with torch.no_grad():
        e = model.noise(SAMPLES, g)
        *outputs, without = model.sample_alike([*(h.start(e) for h in led), e], sampler, seed=seed)
    return [
        (h, pull(model, Evidence(sampler, drawn, without), y, LED))
        for h, y, drawn in zip(led, targets, outputs, strict=True)
    ]


@torch.no_grad()
def compare(model: Model, done: Removal, detection: Detection, seed: int) -> tuple[dict[str, Any], Quality]:
    """Numbers and pictures before and after that need no truth: same noise, same found triggers, both models.

    The pictures are of the first finding. Samples that are a found target before count for nothing: they ought to
    change.
    """
    sampler = detection.evidence[0].sampler if detection.evidence else model.quick_sampler
    e = model.noise(SAMPLES // 2 if model.exploding else SAMPLES, generator_for(seed, 3))
    drawn = {
        which: [m.sample(start, sampler, seed=seed) for start in (e, *(f.start(e) for f in done.findings))]
        for which, m in (("before", model), ("after", done.model))
    }
    pixels = {which: [model.pixels(x) for x in samples] for which, samples in drawn.items()}
    clean = no_target(model, pixels["before"][0], done.findings)
    clean = clean if clean.float().mean() >= LEAST else torch.ones_like(clean)
    measured = quality(model, done.model, pixels["before"][0][clean], pixels["after"][0][clean])
    numbers = {}
    for which, seen in (("before", Quality(0.0, 1.0, 1.0)), ("after", measured)):
        benign, *triggered = pixels[which]
        numbers[which] = finite({
            **{
                f"diversity with the found trigger{f' {k}' if k > 1 else ''} / without": diversity_ratio(x, benign)
                for k, x in enumerate(triggered, 1)
            },
            "clean drift (MSE at equal noise)": paired_drift(pixels["before"][0], benign),
            DRIFT: seen.drift, DIVERSITY: seen.diversity, LOSS: seen.loss,
        })  # fmt: skip
    return {
        **numbers,
        "samples_before_png": picture(model, drawn["before"][1]),
        "samples_after_png": picture(model, drawn["after"][1]),
        "benign_before_png": picture(model, drawn["before"][0]),
        "benign_after_png": picture(model, drawn["after"][0]),
    }, measured
