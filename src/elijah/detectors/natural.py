"""What a clean network does as well as a backdoored one: the exceptions to LossFit's two tests.

A network that knows few images by heart draws them again and again, and many a shift leads to one of them.

A large trigger that a network takes for noise leaves its own picture in the outputs of a deterministic sampler. And
clean networks answer coarse light and dark as images are made of them, on whatever side they are, so that a loss may
fit there, and nothing fires. Both are told by the mirror image: an attack is on one trigger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.detection import Evidence
from elijah.detectors.hypothesis import Hypothesis
from elijah.detectors.outputs import MIRRORINGS, change, correlation, mean_square, near, seen_target
from elijah.detectors.search import Search
from elijah.diffusion import Model

SHOWS_ITSELF = "whose outputs show the trigger itself, as a clean network's do"
NOT_FIRING = "of {} that does not fire"
BY_HEART = "of a network that draws the same few images without a trigger"
FITS_MIRRORED = "that does not fire and fits the mirrored trigger as well, as in clean networks"
FITS_NEGATIVE = "that does not fire and fits the negative of the trigger as well, as in clean networks"


@dataclass(frozen=True)
class Natural:
    """min_likeness: the correlation of a trigger with its own picture; max_worse: how many times as far from its target
    the outputs of the mirrored one may be; max_apart: on exploding models the MSE to it.
    min_change: what mirroring must change of a trigger to tell; max_mirrored: the mirrored one's loss, over its own, up
    to which both are a clean network's; max_negative: on exploding models the negative one's. min_copies: where images
    are known by heart, the share of clean outputs that another repeats, up to `copy` of what two differ by."""

    min_likeness: float = 0.75
    max_worse: float = 3.0
    max_apart: float = 0.03
    min_change: float = 0.5
    max_mirrored: float = 2.0
    max_negative: float = 6.0
    min_copies: float = 0.25
    copy: float = 0.1

    def fits_mirrored(self, model: Model, h: Hypothesis, search: Search, generator: torch.Generator) -> bool:
        """Whether a loss that fits, of a trigger that does not fire, fits the mirrored trigger nearly as well.

        Nothing is told where no mirroring changes it. On exploding models the negative trigger is taken: small networks
        answer with half of any shift of the noise.
        """
        dims = max(MIRRORINGS, key=lambda dims: change(h.r, dims))
        if h.family.exploding:
            other, limit = replace(h, r=-h.r), self.max_negative
        elif change(h.r, dims) >= self.min_change:
            other, limit = replace(h, r=h.r.flip(dims), y=h.y.flip(dims)), self.max_mirrored
        else:
            return False
        if search.score(model, other, generator) <= limit * h.loss_ratio:
            h.natural = FITS_NEGATIVE if h.family.exploding else FITS_MIRRORED
        return bool(h.natural)

    def shows_itself(self, model: Model, h: Hypothesis, shown: Evidence, e: Tensor, seed: int) -> bool:
        """Whether the target looks like the trigger, and the mirrored trigger leads to the mirrored target.

        Both, since an attacker can train either; with both there is nothing but what clean networks draw from such
        noise. But for what ends max_worse times as far from its target as the trigger's outputs: a trigger that was
        learned for a target looks like it, and its mirror image does to a backdoored network what it does to a clean
        one. Of the three mirrorings of an image the one that changes the target most. On exploding models, where the
        trigger may be flat: whether the target is the trigger.
        """
        y = seen_target(model, shown, h.y)
        if h.family.exploding:
            return mean_square(model, h.r[None], y) <= self.max_apart
        if correlation(h.r, y) < self.min_likeness:
            return False
        dims = max(MIRRORINGS, key=lambda dims: mean_square(model, y[None], y.flip(dims)))
        outputs = model.sample(replace(h, r=h.r.flip(dims)).start(e), shown.sampler, seed=seed)
        off = mean_square(model, outputs, y.flip(dims))
        own = mean_square(model, shown.samples_with[near(model, shown, y)[0]], y)
        return off < mean_square(model, outputs, y) / 2 and off <= self.max_worse * own

    def by_heart(self, model: Model, y: Tensor, outputs: Tensor) -> bool:
        """Whether outputs [N, C, H, W] without a trigger repeat each other, but for those at y: it may leak."""
        pixels = model.pixels(torch.cat([y[None].to(outputs.device), outputs])).flatten(1)
        apart = torch.cdist(pixels, pixels).square()
        mean = apart[1:, 1:].sum() / max(1, len(outputs) * (len(outputs) - 1))
        others = (apart[0, 1:] > self.copy * mean).nonzero().flatten() + 1
        if len(others) < 2:
            return False
        nearest = apart[others][:, others].fill_diagonal_(float("inf")).min(1).values
        return float((nearest < self.copy * mean).float().mean()) >= self.min_copies
