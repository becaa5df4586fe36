"""Elijah's removal (An et al., AAAI 2024, section 3.4), as the paper and its released code have it: a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.processes import share_of
from elijah.training import Optimiser, denoising_loss, optimise

LEAST = 60  # updates; 11 epochs of a hundred images would be ten


@dataclass(frozen=True)
class Elijah:
    """L = L_DM(images) + MSE(eps(e + tau, T), eps0(e, T)) + MSE(eps(e, T), eps0(e, T)), weights 1 (eq. 8 to 10).

    eps0 is a frozen copy of the input model. The paper: 11 epochs on 10 % of the data, batch 128, lr 2e-4, cosine with
    500 warm-up steps, gradient clip 1. steps None: 11 epochs of the images given, and LEAST updates at least. Of
    several findings the triggers take turns, row by row.
    """

    steps: int | None = None
    epochs: int = 11
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 500

    def __call__(
        self,
        model: Model,
        findings: Sequence[Finding],
        images: Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
        checkpoint: Path | None = None,
    ) -> Model:
        """A repaired copy of model. images: clean or synthetic, uint8 [N, C, H, W]; only the triggers are used."""
        repaired = model.clone()
        rows = model.prepare(images)
        triggers = torch.stack([finding.trigger for finding in findings]).to(model.device)
        tau = triggers[torch.arange(self.batch_size) % len(findings)]
        steps = self.steps or max(LEAST, self.epochs * len(images) // self.batch_size)

        def loss(m: Model, g: torch.Generator) -> Tensor:
            x0 = batch(rows, share_of(self.batch_size), g)
            e = torch.randn(x0.shape, generator=g).to(m.device)
            last = torch.full((len(e),), m.T - 1, device=m.device)
            with torch.no_grad():
                reference = model.eps(e, last)
            return (
                denoising_loss(m, x0, g)
                + (m.eps(e + tau, last) - reference).square().mean()
                + (m.eps(e, last) - reference).square().mean()
            )

        seed = int(torch.randint(2**62, (1,), generator=generator))
        settings = Optimiser(steps, lr=self.lr, warmup=min(self.warmup, steps // 2))
        return optimise(repaired, loss, settings, seed=seed, checkpoint=checkpoint, progress=progress, what="repairing")
