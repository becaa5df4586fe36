"""Why a learned trigger is missed: the loss at the true trigger, and where the walks of collapse.py end.

    python experiments/learned_search.py

The models of zoo/small.toml's and zoo/learned.toml's test parts with learned triggers, which `elijah zoo run` builds.
Scoring alone: it reads the true triggers. Needs ELIJAH_DATA, and a few minutes. Writes results/learned/search.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from elijah.detectors.collapse import Descent
from elijah.detectors.hypothesis import Hypothesis
from elijah.diffusion import Model, generator_for, no_progress
from elijah.files import write_file
from elijah.loading import load_model
from elijah.trigger import Trigger, make_target

ROOT = Path(__file__).resolve().parent.parent
WALKS = Descent(walks=8, steps=20, centred=4, rate=0.05)


def spread(model: Model, r: Tensor) -> float:
    """V of collapse.py at a trigger r [C, H, W], over 16 outputs."""
    with torch.no_grad():
        outputs = WALKS.drawn(model, r[None], 16, generator_for(2))[0]
    return float((outputs - outputs.mean(0)).square().mean())


def loss(model: Model, h: Hypothesis) -> float:
    """The attacker's loss ratio as the detector takes it, over equal noise."""
    return WALKS.score(model, h, generator_for(3))


def cosine(r: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(r.flatten(), other.flatten(), 0))


def row(path: Path) -> str:
    """The line of one model."""
    model, true = load_model(str(path)), next(iter(load_file(f"{path}.trigger.safetensors").values()))
    target = make_target(path.name.split("_")[2], Trigger("none", torch.zeros(model.sample_shape))).image
    with model.frozen():
        truth = WALKS.hypothesis(true, target)
        ends = WALKS.walked(model, generator_for(0), no_progress)
        best = min(ends, key=lambda h: h.loss_ratio)
        (fitted,) = WALKS.refined(model, [best], generator_for(1))
        nearest = max(ends, key=lambda h: cosine(h.r, true))
        values = (
            loss(model, truth), loss(model, best), loss(model, fitted), cosine(best.r, true), cosine(nearest.r, true),
            spread(model, true), spread(model, best.r), spread(model, torch.zeros_like(true)),
        )  # fmt: skip
    return f"| {path.name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main() -> None:
    torch.set_num_threads(1)
    heads = (
        "model", "loss at the true trigger", "at the best walk's end", "fitted from there", "cosine of the best walk",
        "of the nearest walk", "V at the true trigger", "at the best walk's end", "without a trigger",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for path in sorted(p for p in (ROOT / "cache" / "small").glob("t-*_learned_*") if p.is_dir()):
        lines.append(row(path))
        print(lines[-1], flush=True)
    write_file(ROOT / "results" / "learned" / "search.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
