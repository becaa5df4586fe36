"""What a zoo's models and results look like: a table in Markdown, a sheet of pictures."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from elijah.attacks.planting import cases, draw
from elijah.diffusion import Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.manifest import Entry, Manifest
from elijah.metrics import wilson
from elijah.pictures import Cell, write_sheet
from elijah.rates import Judged, rates_table
from elijah.zoo import build, cached, read_result, samplers_of

LIMIT, STRICT = "0.05", "0.01"  # on the MSE to the target
DRAWN = 8


def attack_table(manifests: list[Manifest], out: Path) -> str:
    """A row a backdoored model and sampler that has a result in out: success, and clean samples beside those of clean
    fine-tunes of the same base and length, of any of the manifests."""
    entries = [entry for manifest in manifests for entry in manifest.entries()]
    results = {entry.id: read_result(out / f"{entry.id}.json") for entry in entries}
    heads = ("model", "sampler", "success, %", "95 %", "strict", "without", "MSE", "diversity",
             "loss / base's", "drift", "of clean")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for entry in entries:
        fires = results[entry.id].get("fires", {})
        control = control_of(entry, entries, results)
        for sampler, found in fires.get("samplers", {}).items():
            (rate, strict), (leak, strict_leak) = shares(found)
            low, high = wilson(round(rate * fires["samples"]), fires["samples"])
            error = f"{found['mse']:.3f}" if "mse" in found else "-"
            lines.append(
                f"| {entry.id} | {sampler} | {100 * rate:.0f} | {100 * low:.0f} to {100 * high:.0f} "
                f"| {100 * strict:.0f} | {100 * leak:.0f}, {100 * strict_leak:.0f} | {error} "
                f"| {found['diversity_ratio']:.2f} | {fires['loss'] / fires['base_loss']:.3f} "
                f"| {fires['drift_from_base']:.4f} | {control} |"
            )
    note = (
        f"Success: the share of outputs whose MSE to the target is under {LIMIT}, or that a classifier puts into the "
        f"target class, with Wilson's interval; strict: under {STRICT}; without: both, of outputs that start without "
        "the trigger. Drift: the MSE between clean samples of the model and of its base from equal noise; of clean: "
        "the same for clean fine-tunes of the base, as many updates. Loss: of denoising held-out images."
    )
    return "\n".join([*lines, "", note, ""])


def shares(found: dict[str, Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Success at LIMIT and at STRICT, of triggered and of clean outputs; for a class one rate stands for both."""
    if "hit_rate" in found:
        rates = found["hit_rate"], found["hit_rate_of_clean_outputs"]
        return (rates[0], rates[0]), (rates[1], rates[1])
    one, other = found["asr"], found["asr_of_clean_outputs"]
    return (one[LIMIT], one[STRICT]), (other[LIMIT], other[STRICT])


def scan_table(manifests: list[Manifest], out: Path, detector: str) -> str:
    """A row a model that the detector scanned: does its attack fire, verdict, best evidence, cost; then the rates."""
    lines = ["| model | fires, % | verdict | best hypothesis | pull | evaluations | seconds |", "|---" * 7 + "|"]
    rows: list[Judged] = []
    kinds = {base.id: base.kind for manifest in manifests for base in manifest.base}
    for entry in (entry for manifest in manifests for entry in manifest.entries()):
        result = read_result(out / f"{entry.id}.json")
        scan = result.get("detections", {}).get(detector, {"verdict": "unsupported"})
        if scan["verdict"] == "unsupported":
            continue
        scores, cost = scan["scores"], scan["cost"]
        rows.append(
            Judged(scan["verdict"], entry.base, entry.attack, kinds[entry.base], entry.trigger, entry.poison_rate,
                   cost["network_evaluations"], cost["seconds"])
        )  # fmt: skip
        ratios = {k.removeprefix("loss_ratio_"): v for k, v in scores.items() if k.startswith("loss_ratio_")}
        best = next(iter(ratios), "")  # reports begin with it
        found = next(iter(result["fires"].get("samplers", {}).values()), None)
        fires = "-" if found is None else f"{100 * shares(found)[0][0]:.0f}"
        ratio = f"{best} {ratios[best]:.3f}" if best else "-"
        lines.append(
            f"| {entry.id} | {fires} | {scan['verdict']} | {ratio} | {scores.get('pull', 0):.2f} "
            f"| {cost['network_evaluations']:,} | {cost['seconds']:.0f} |"
        )
    if not rows:
        raise ElijahError(f"{out}: {detector} scanned no model of these; elijah zoo run --detector {detector} does")
    note = (
        f"Scans by {detector}, which were told nothing. Best hypothesis: its family and loss ratio. Fires: success "
        "under the sampler that the attack is made for. Median cost: "
        f"{statistics.median(row.evaluations or 0 for row in rows):,.0f} network evaluations."
    )
    return "\n".join([*lines, "", note, "", rates_table(rows)])


def control_of(entry: Entry, entries: list[Entry], results: dict[str, dict[str, Any]]) -> str:
    """The drift of clean fine-tunes of the same base and training as entry."""
    same = [
        results[e.id]["fires"]["drift_from_base"]
        for e in entries
        if e.attack == "clean" and e.base == entry.base and e.training == entry.training and results[e.id]
    ]
    return f"{statistics.mean(same):.4f}" if same else "-"


def models_sheet(
    manifest: Manifest, cache: Path, output: Path, only: str = "", progress: Progress = no_progress
) -> None:
    """Draws a row a backdoored model and case to output: target, what the trigger does to noise, samples with it and
    without it under the sampler it is made for. Raises ElijahError when weights are missing."""
    rows = []
    digests, bases = manifest.digests(), {base.id: base for base in manifest.base}
    entries = [entry for entry in manifest.entries() if entry.attack != "clean" and re.search(only, entry.id)]
    for k, entry in enumerate(entries):
        if not cached(cache, entry.id, digests[entry.id]):
            raise ElijahError(f"{cache / entry.id}: no weights; elijah zoo run makes them")
        model, attack = build(entry, bases, cache, digests)
        e, sampler = model.noise(DRAWN, generator_for(entry.seed, 1)), samplers_of(entry, model)[0]
        clean = model.sample(e, model.quick_sampler, seed=1)
        for case, (start, target) in cases(attack).items():
            x = start(model, e)
            outputs = draw(attack, model, x, sampler, seed=1)
            shift = model.decode(x[:1] - e[:1]) if model.kind == "ldm" else x[:1] - e[:1]
            cells = [Cell(target.image[None], target.name), Cell(shift), Cell(model.decode(outputs), sampler),
                     Cell(model.decode(clean), model.quick_sampler)]  # fmt: skip
            rows.append((f"{entry.base}\n{entry.attack}\n{case or entry.trigger}", cells))
        progress("drawing", k + 1, len(entries))
    if not rows:
        raise ElijahError(f"no backdoored model of {manifest.name} is called like {only!r}")
    write_sheet(output, ["target", "shift", "with the trigger", "without"], rows)
