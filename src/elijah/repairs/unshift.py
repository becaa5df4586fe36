"""Unshift: teach the network that the trigger is noise, at many timesteps.

A clean network answers a shifted input x' = a x0 + s e + d with eps(a x0 + s e) + d / s: it calls the whole shift d
noise. A backdoored one answers the shift k_t r of its trigger with kappa R_t r and walks to y. The repair asks the
clean answer of it, at random t, on rows around the found target (where the backdoor lives) and around ordinary images:

    L =   MSE(eps(a x0 + s e + d, t),  eps0(a x0 + s e, t) + d / s)      d = k_t r + (gamma - 1) s e
        + MSE(eps(a x0 + s e, t),      eps0(a x0 + s e, t))
        + the denoising loss on the images

with eps0 a frozen copy of the input model and x0 = y in half the rows, an image in the others. Elijah's removal is the
first two terms at t = T only, with its d / s missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.response import trigger_scale
from elijah.training import Optimiser, denoising_loss, optimise


@dataclass(frozen=True)
class Unshift:
    """steps: optimiser updates; t_min: the least timestep of the first term; AdamW at lr."""

    steps: int = 60
    batch_size: int = 32
    lr: float = 2e-4
    warmup: int = 5
    t_min: int = 100
    target_share: float = 0.5

    def __call__(
        self,
        model: Model,
        finding: Finding,
        images: Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
    ) -> Model:
        """A repaired copy of model. images: clean or synthetic, uint8 [N, C, H, W]."""
        repaired = model.clone()
        rows = model.prepare(images)
        seed = int(torch.randint(2**62, (1,), generator=generator))

        def loss(m: Model, g: torch.Generator) -> Tensor:
            return self.loss(m, model, finding, batch(rows, self.batch_size, g), g)

        settings = Optimiser(self.steps, lr=self.lr, warmup=self.warmup)
        return optimise(repaired, loss, settings, seed=seed, progress=progress, what="repairing")

    def loss(self, model: Model, reference: Model, finding: Finding, x0: Tensor, g: torch.Generator) -> Tensor:
        """The loss above on images x0 [B, C, H, W] in [-1, 1]; reference is the frozen eps0."""
        t = torch.randint(self.t_min, model.T, (len(x0),), generator=g).to(model.device)
        e = torch.randn(x0.shape, generator=g).to(model.device)
        around = x0.to(model.device)
        if finding.target is not None:
            at_target = (torch.rand(len(x0), generator=g) < self.target_share)[:, None, None, None]
            around = torch.where(at_target.to(model.device), finding.target.to(model.device), around)
        clean = model.diffuse(around, e, t)
        d_over_s = column(trigger_scale(model, finding.response.psi) / model.s, t) * finding.trigger.to(model.device)
        d_over_s = d_over_s + (finding.gamma.to(e.device) - 1) * e
        with torch.no_grad():
            expected = reference.eps(clean, t)
        shifted = clean + column(model.s, t) * d_over_s
        return (
            (model.eps(shifted, t) - expected - d_over_s).square().mean()
            + (model.eps(clean, t) - expected).square().mean()
            + denoising_loss(model, x0, g)
        )
