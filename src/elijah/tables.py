"""What a zoo's models and results look like: a table in Markdown, a sheet of pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from elijah.attacks.planting import cases, draw
from elijah.diffusion import Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.manifest import Entry, Manifest
from elijah.metrics import wilson
from elijah.pictures import Cell, write_sheet
from elijah.zoo import build, cached, read_result, samplers_of

LIMIT = "0.05"  # on the MSE to the target
DRAWN = 8


def attack_table(manifests: list[Manifest], out: Path) -> str:
    """A row a backdoored model and sampler that has a result in out: success, and clean samples beside those of clean
    fine-tunes of the same base and length, of any of the manifests."""
    entries = [entry for manifest in manifests for entry in manifest.entries()]
    results = {entry.id: read_result(out / f"{entry.id}.json") for entry in entries}
    lines = ["| model | sampler | success, % | 95 % | MSE | diversity | clean loss / base | drift | clean fine-tune |",
             "|---" * 9 + "|"]  # fmt: skip
    for entry in entries:
        fires = results[entry.id].get("fires", {})
        control = control_of(entry, entries, results)
        for sampler, found in fires.get("samplers", {}).items():
            rate = found["asr"][LIMIT] if "asr" in found else found["hit_rate"]
            low, high = wilson(round(rate * fires["samples"]), fires["samples"])
            extra = f" (clean {100 * found['hit_rate_of_clean_outputs']:.0f})" if "hit_rate" in found else ""
            error = f"{found['mse']:.3f}" if "mse" in found else "-"
            lines.append(
                f"| {entry.id} | {sampler} | {100 * rate:.0f}{extra} | {100 * low:.0f} to {100 * high:.0f} | {error} "
                f"| {found['diversity_ratio']:.2f} | {fires['loss'] / fires['base_loss']:.3f} "
                f"| {fires['drift_from_base']:.4f} | {control} |"
            )
    note = (
        f"Success: the share of outputs whose MSE to the target is under {LIMIT}, or that a classifier puts into the "
        "target class (in brackets: of clean outputs), with Wilson's interval. Drift: the MSE between clean samples of "
        "the model and of its base from equal noise; last column: the same for clean fine-tunes of the base, as many "
        "updates. Clean loss: of denoising held-out images."
    )
    return "\n".join([*lines, "", note, ""])


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
    entries = [entry for entry in manifest.entries() if entry.attack != "clean" and only in entry.id]
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
        raise ElijahError(f"no backdoored model of {manifest.name} has {only!r} in its id")
    write_sheet(output, ["target", "shift", "with the trigger", "without"], rows)
