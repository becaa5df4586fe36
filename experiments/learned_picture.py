"""What the search for learned triggers sees, in clean networks and in backdoored ones.

    python experiments/learned_picture.py

Outputs in light and dark, those that the network knows best, and where the descent to the best one ends. Development
models of zoo/learned-development.toml, which `elijah zoo run` builds. The search reads no truth; the first column is
the target, for who looks. Half a minute. Writes docs/images/learned.png.
"""

from __future__ import annotations

from pathlib import Path

import torch

from elijah.detectors.collapse import Descent
from elijah.diffusion import generator_for, no_progress
from elijah.loading import load_model
from elijah.manifest import read_manifest
from elijah.pictures import Cell, write_sheet
from elijah.zoo import build

ROOT = Path(__file__).resolve().parent.parent
MODELS = "d-celeba_learned_hello-kitty_p05_s192", "d-cifar10_learned_shoe_p05_s190", "d-mnist_learned_cat_p05_s190"
SEARCH, SHOWN = Descent(), 6


def row(path: Path, target: torch.Tensor) -> list[Cell]:
    """target: [C, H, W]."""
    model, g = load_model(str(path)), generator_for(0)
    with model.frozen():
        outputs, errors = SEARCH.unasked(model, g, no_progress)
        known = errors.argsort()[:SHOWN]
        (h,) = SEARCH.led_to(model, SEARCH.best_known(outputs, errors), g, no_progress)
        with torch.no_grad():
            (ends,) = SEARCH.drawn(model, h.r[None], SHOWN, SEARCH.sampler_steps, g)
        fitted = SEARCH.fit(model, [h], g)
    print(path.name, float(errors.min()), fitted.loss_ratio, flush=True)
    return [
        Cell(target[None]), Cell(outputs[:SHOWN]),
        Cell(outputs[known], f"error {errors[known[0]]:.2f} of the median's"),
        Cell(ends, f"the attacker's loss {fitted.loss_ratio:.2f} of a clean network's"),
    ]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    read = read_manifest(ROOT / "zoo" / "learned-development.toml")
    cache, bases, entries = ROOT / "cache" / read.name, {b.id: b for b in read.base}, {e.id: e for e in read.entries()}
    sheet = []
    for name in MODELS:
        _, attack = build(entries[name], bases, cache, read.digests())
        for label, path in (("clean base", cache / entries[name].base), ("backdoored", cache / name)):
            sheet.append((f"{entries[name].base}\n{label}", row(path, attack.target.image)))
    header = ["target", "drawn in light and dark", "known best", "noise is led to the first of these"]
    write_sheet(ROOT / "docs" / "images" / "learned.png", header, sheet)


if __name__ == "__main__":
    main()
