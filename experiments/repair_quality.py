"""What the repairs' settings cost in detail, on two models of the development set: the denoising loss on unseen images.

    ELIJAH_DATA=... python experiments/repair_quality.py

The models' weights are in zoo/weights; their bases' images are not. Writes results/repair_quality/loss.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from elijah.diffusion import generator_for, no_progress
from elijah.files import write_file
from elijah.guard import image_loss
from elijah.judging_repairs import SCAN
from elijah.manifest import read_manifest
from elijah.repairs import Distill, Unshift
from elijah.scan import inspect
from elijah.synthetic import screened, synthesise
from elijah.zoo import build, held_out

ROOT = Path(__file__).resolve().parent.parent
PLAIN, SCALED = "d-celeba_baddiffusion_glasses_cat_p03_s112", "d-cifar10_trojdiff_hello-kitty_cat_p03_s113"
PLAIN_REPAIRS = {  # synthetic images, and the repair; Unshift with twice its updates, where the costs show more
    "unshift, t from 0.1 T, 128 images": (128, Unshift(steps=200, t_min=0.1)),
    "unshift, t from 0.1 T, 512 images": (512, Unshift(steps=200, t_min=0.1)),
    "unshift, t from 0.2 T, 512 images": (512, Unshift(steps=200)),
    "distill, t from 0.2 T, 512 images": (512, Distill()),
    "distill, the same, noise in all blocks": (512, Distill(kept=(0.7,))),
}
SCALED_REPAIRS = {
    f"unshift, t from {begin} T": (512, Unshift(t_min=begin)) for begin in (0.2, 0.3, 0.4, 0.5, 0.6)
}  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    lines = [*table(PLAIN, PLAIN_REPAIRS), "", *table(SCALED, SCALED_REPAIRS)]
    write_file(ROOT / "results" / "repair_quality" / "loss.md", "\n".join(lines) + "\n")
    return 0


def table(name: str, repairs: Mapping[str, tuple[int, Unshift]]) -> list[str]:
    """The lines for one model."""
    manifest = read_manifest(ROOT / "zoo" / "development.toml")
    entry, bases = next(e for e in manifest.entries() if e.id == name), {base.id: base for base in manifest.base}
    model, _ = build(entry, bases, ROOT / "zoo" / "weights" / manifest.name, manifest.digests())
    unseen = held_out(bases[entry.base])
    detection, report = inspect(model, SCAN, 0, no_progress)
    before, findings = image_loss(model, unseen), detection.findings[:1]
    lines = [f"{name}: {report.verdict}; denoising loss on unseen images {before:.4f}", "",
             "| repair | updates | loss, after / before |", "|---|---|---|"]  # fmt: skip
    for setting, (n, repair) in repairs.items():
        images = screened(model, synthesise(model, n, 0), findings)
        fixed = repair(model, findings, images, generator=generator_for(0, 11))
        lines.append(f"| {setting} | {fixed.updates} | {image_loss(fixed, unseen) / before:.3f} |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    sys.exit(main())
