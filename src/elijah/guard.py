"""The guard on quality: whether a repair harmed what the model draws, seen by its own samples alone.

Samples of both models from equal noise, without a trigger, and the denoising loss of both on the first one's. No real
data are needed, and none of the images that the repair had, on which it keeps its quality longest. A repair may harm
what the model can draw and does not: the loss is taken at half the contrast as well, where that shows most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.data import to_uint8
from elijah.diffusion import Model, generator_for
from elijah.metrics import diversity_ratio, paired_drift, pairwise_mse
from elijah.training import denoising_loss

DRIFT = "clean drift, share of the samples' own differences"
DIVERSITY = "diversity of clean samples, after / before"
LOSS = "denoising loss on fresh samples, at full or half contrast, after / before"
MAX_DRIFT, MIN_DIVERSITY, MAX_DIVERSITY, MAX_LOSS = 0.5, 0.6, 2.0, 1.25
MAX_EXPLODING_DRIFT = 0.9  # a thousand fresh noises carry equal starts apart: plain fine-tuning moves samples by 0.55
ROWS = 256


@dataclass(frozen=True)
class Quality:
    """What became of clean samples: each number is 0 (drift) or 1 for an unchanged model."""

    drift: float  # paired MSE at equal noise, over the MSE of two samples of the model: 1 is another image altogether
    diversity: float
    loss: float
    max_drift: float = MAX_DRIFT

    @property
    def harm(self) -> list[str]:
        """What is beyond its limit, in words; empty for a model that is as good as it was."""
        found = []
        if not self.drift <= self.max_drift:
            found.append(f"clean samples moved by {self.drift:.2f} of their own differences (limit {self.max_drift})")
        if not MIN_DIVERSITY <= self.diversity <= MAX_DIVERSITY:
            limits = f"limits {MIN_DIVERSITY} and {MAX_DIVERSITY}"
            found.append(f"their diversity is {self.diversity:.2f} of what it was ({limits})")
        if not self.loss <= MAX_LOSS:
            found.append(f"the denoising loss is {self.loss:.2f} of what it was (limit {MAX_LOSS})")
        return found


def quality(model: Model, fixed: Model, before: Tensor, after: Tensor) -> Quality:
    """before, after: clean samples of model and of fixed from equal noise, [N, C, H, W] on [0, 1]."""
    images = [to_uint8((before * 2 - 1) * contrast).cpu() for contrast in (1.0, 0.5)]
    return Quality(
        paired_drift(before, after) / max(pairwise_mse(before), 1e-12),
        diversity_ratio(after, before),
        max(image_loss(fixed, x) / max(image_loss(model, x), 1e-12) for x in images),
        MAX_EXPLODING_DRIFT if model.exploding else MAX_DRIFT,
    )


@torch.no_grad()
def image_loss(model: Model, images: Tensor) -> float:
    """The denoising loss on at most ROWS of the images, with noise that is the same for every model."""
    rows = model.prepare(images[:ROWS]).float()
    rows = rows / 127.5 - 1 if model.kind == "ddpm" else rows
    return float(denoising_loss(model, rows.repeat(max(1, ROWS // len(rows)), 1, 1, 1), generator_for(0, 4)))
