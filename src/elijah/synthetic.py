"""Images to repair with: the model's own samples, and what is left out of them so that no target slips in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elijah.data import to_uint8
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError

NEAR = 0.25  # of the images' median MSE to a target: what is nearer counts as the target, as in the detector's pull
SAME = 0.01  # an MSE on [0, 1] that is the target however near the others are: the strictest limit of attack_success
LEAST = 0.25  # of the images must be left


def synthesise(model: Model, n: int, seed: int, progress: Progress = no_progress) -> Tensor:
    """n images uint8 [n, C, H, W] that the model itself samples from ordinary noise."""
    e = model.noise(n, generator_for(seed, 2))
    return to_uint8(model.decode(model.sample(e, model.quick_sampler, seed=seed, progress=progress))).cpu()


def screened(model: Model, images: Tensor, findings: Sequence[Finding]) -> Tensor:
    """The images uint8 [N, C, H, W] but for those near the target of a finding.

    Near: their MSE is below SAME, or below NEAR of the images' median. A finding that leads to a distribution, or to no
    known target, has no image to compare with, and nothing is left out for it: what protects there is that the images
    come from noise without the trigger. Raises ElijahError when fewer than LEAST of the images are left.
    """
    kept = no_target(model, images.float() / 255, findings)
    if kept.float().mean() < LEAST:
        raise ElijahError(
            f"{int((~kept).sum())} of {len(images)} images are like the target that was found: too few are left to "
            "repair with; give clean images with --data, or more of its own with --synthetic"
        )
    return images[kept]


def no_target(model: Model, pixels: Tensor, findings: Sequence[Finding]) -> Tensor:
    """Which of pixels [N, C, H, W] on [0, 1] are not near the target of a finding: bool [N]."""
    kept = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    for finding in findings:
        if finding.target is not None and not finding.distribution:
            errors = (pixels - model.pixels(finding.target[None]).to(pixels)).square().flatten(1).mean(1)
            kept &= errors >= max(SAME, NEAR * float(errors.median()))
    return kept


def screening_words(findings: Sequence[Finding], images: int, dropped: int) -> str:
    """What screened did, for the report."""
    without = sum(finding.distribution or finding.target is None for finding in findings)
    if without == len(findings):
        return "nothing was screened out: the trigger leads to no single image that could be compared with"
    words = f"{dropped} of {images + dropped} images were left out because they are near a target that was found"
    return words + (f"; {without} of {len(findings)} triggers lead to no single image" if without else "")
