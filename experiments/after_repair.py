"""What noise with the true trigger leads to in the clean base, in the backdoored model, and after its repair.

    python experiments/after_repair.py

Under DDIM, which draws a large or coarse trigger that is taken for noise as a picture of its own: near a grey target,
perhaps, and not the target. Scoring alone: it reads the true triggers. Builds what is not in cache/, then a few
minutes. Writes docs/images/after-repair.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elijah.clean import enough, remove
from elijah.diffusion import Model, generator_for, no_progress
from elijah.judging_repairs import SCAN
from elijah.loading import load_model
from elijah.manifest import read_manifest
from elijah.metrics import paired_drift, pairwise_mse
from elijah.pictures import Cell, write_sheet
from elijah.scan import inspect
from elijah.synthetic import synthesise
from elijah.zoo import build, build_base

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "d-cifar10_baddiffusion_box-6_corner_p03_s111": "development.toml",
    "t-cifar10-1_learned_hat_p05_s2308": "small.toml",
    "t-celeba-2_learned_hat_p05_s2350": "learned.toml",
    "t-mnist-1_learned_hat_p05_s2308": "small.toml",
}
SHOWN, SAMPLES, SAMPLER = 5, 32, "ddim-20"


@torch.no_grad()
def cells(model: Model, attack: Any) -> list[Cell]:
    """Outputs without and with the trigger from equal noise, with how far it moves them and how far off they are."""
    e = model.noise(SAMPLES, generator_for(1))
    plain, drawn = (model.sample(start, SAMPLER, seed=1) for start in (e, attack.start(model, e)))
    moved = paired_drift(model.pixels(drawn), model.pixels(plain)) / pairwise_mse(model.pixels(plain))
    off = (model.pixels(drawn) - model.pixels(attack.target.image[None].to(drawn))).square().mean()
    return [Cell(plain[:SHOWN]), Cell(drawn[:SHOWN], f"moved {moved:.2f}, MSE to the target {off:.3f}")]


def rows(name: str, manifest: str) -> list[tuple[str, list[Cell]]]:
    read = read_manifest(ROOT / "zoo" / manifest)
    entry = next(e for e in read.entries() if e.id == name)
    bases, cache, digests = {b.id: b for b in read.base}, ROOT / "cache" / read.name, read.digests()
    model, attack = build(entry, bases, cache, digests)
    build_base(bases[entry.base], bases, cache, digests)
    detection, _ = inspect(model, SCAN, 0, no_progress)
    done = remove(model, detection, synthesise(model, enough(model), 0), SCAN | {"repair": "unshift"}, 0, no_progress)
    print(name, [r.verdict for r in done.rescans], flush=True)
    base = load_model(str(cache / entry.base))
    parts = {"clean base": base, "backdoored": model, f"repaired, rounds: {len(done.rescans)}": done.model}
    picture = Cell(torch.stack([attack.trigger.image.clamp(-1, 1), attack.target.image]))
    return [(f"{entry.base}\n{entry.attack}\n{part}", [picture, *cells(m, attack)]) for part, m in parts.items()]


def main() -> None:
    torch.set_num_threads(1)
    (ROOT / "cache").mkdir(exist_ok=True)
    header = ["trigger, target", "without", "with the true trigger"]
    sheet = [row for name, manifest in MODELS.items() for row in rows(name, manifest)]
    write_sheet(ROOT / "docs" / "images" / "after-repair.png", header, sheet)


if __name__ == "__main__":
    main()
