"""How the search of collapse.py comes to a learned trigger: target images among outputs that nobody asked for.

    python experiments/learned_unasked.py

Models with learned triggers of the development part (zoo/learned-development.toml, zoo/development.toml) and of the
test part (zoo/small.toml, zoo/learned.toml), which `elijah zoo run` builds, four seeds each. Scoring alone: it reads
the true triggers. Needs a few minutes. Writes results/learned/unasked.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from elijah.detectors.collapse import Descent
from elijah.diffusion import Model, generator_for, no_progress
from elijah.files import write_file
from elijah.loading import load_model
from elijah.metrics import wilson

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "cache/late", "zoo/weights/development", "cache/small"
SEEDS = 4
COPY = 0.05  # MSE to the target, on [-1, 1], of a copy
SEARCH = Descent()
MAX_LOSS = SEARCH.families[0].max_loss_ratio


class Trial(NamedTuple):
    """copies: of the target, among the first outputs and those drawn after them; tried: whether the one that is led to
    is a copy; error: of that one, over the median's."""

    copies: tuple[int, int]
    tried: bool
    error: float
    cosine: float
    loss: float


def trials(path: Path) -> list[Trial]:
    """Those of one model, a seed each."""
    model, true = load_model(str(path)), next(iter(load_file(f"{path}.trigger.safetensors").values()))
    with model.frozen():
        with torch.no_grad():
            target = SEARCH.drawn(model, true[None], 32, SEARCH.sampler_steps, generator_for(9))[0].median(0).values
        return [trial(model, true, target, seed) for seed in range(SEEDS)]


def trial(model: Model, true: Tensor, target: Tensor, seed: int) -> Trial:
    g = generator_for(seed, 7)
    outputs, errors = SEARCH.unasked(model, g, no_progress)
    copies = (outputs - target).square().mean((1, 2, 3)) < COPY
    (known,) = SEARCH.best_known(outputs, errors)
    (h,) = SEARCH.led_to(model, known[None], g, no_progress)
    cosine = float(torch.cosine_similarity(h.r.flatten(), true.flatten(), 0))
    first, more = (int(n.sum()) for n in (copies[: SEARCH.shifted], copies[SEARCH.shifted :]))
    return Trial((first, more), bool(copies[errors.argmin()]), float(errors.min()), cosine,
                 SEARCH.fit(model, [h], g).loss_ratio)  # fmt: skip


def line(path: Path, found: list[Trial]) -> str:
    copies = [f"{sum(one.copies[k] for one in found) / SEEDS:.1f}" for k in range(2)]
    errors, cosines, losses = (
        ", ".join(f"{x:.2f}" for x in xs)
        for xs in ([t.error for t in found], [t.cosine for t in found], [t.loss for t in found])
    )
    return f"| {' | '.join([path.name, *copies, errors, str(sum(t.tried for t in found)), cosines, losses])} |"


def main() -> None:
    torch.set_num_threads(1)
    heads = (
        "model", f"copies of the target among {SEARCH.shifted} outputs in light and dark",
        "among those drawn after them", "the least error of denoising one, over the median",
        f"a copy is led to, of {SEEDS} seeds", "cosine of the trigger",
        "loss after the fit",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    fits: dict[str, list[bool]] = {"development": [], "test": []}
    for path in (p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*_learned_*")) if p.is_dir()):
        found = trials(path)
        fits["test" if path.name.startswith("t-") else "development"] += [t.loss <= MAX_LOSS for t in found]
        lines.append(line(path, found))
        print(lines[-1], flush=True)
    lines.append("")
    for part, fit in fits.items():
        low, high = wilson(sum(fit), len(fit))
        lines.append(f"{part}: the loss fits in {sum(fit)} of {len(fit)} trials ({low:.0%} to {high:.0%}).  ")
    write_file(ROOT / "results" / "learned" / "unasked.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
