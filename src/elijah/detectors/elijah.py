"""Elijah's detector (An et al., AAAI 2024), as the paper and its released code have it: a baseline.

Differences from the released code are named where they are. Sources: paper, eq. 6 (inversion) and section 3.3
(features); code, BadDiffusion/elijah_helper.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elijah.detection import Detection, Evidence, Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import OutOfBudget
from elijah.features import load_lpips, lpips_available
from elijah.metrics import total_variation, uniformity
from elijah.response import Response

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Elijah:
    """min over tau of mean |coefficient tau - mean_b eps(e_b + tau, T)|, then uniformity and TV of the outputs.

    coefficient: the lambda of the paper, 0.5 for BadDiffusion and TrojDiff, 1 for VillanDiffusion; a user must know the
    attack to choose it. batch_size None: 100 below 128 pixels, 50 at 128, 20 above, as in the code.
    """

    kinds: ClassVar = ("ddpm",)
    coefficient: float = 0.5
    iterations: int = 100
    lr: float = 0.1
    batch_size: int | None = None
    samples: int = 16
    sampler: str = "ddpm-1000"

    def __call__(self, model: Model, *, generator: torch.Generator, progress: Progress = no_progress) -> Detection:
        """Inverts a trigger at t = T and measures the samples that start from it. Stops at the model's limits."""
        coverage = [f"triggers that a network answers with {self.coefficient} r at t = T"]
        not_covered = ["every other response to a trigger"]
        try:
            with model.frozen():
                tau, loss = self.invert(model, generator, progress)
                e = model.noise(self.samples, generator)
                seed = int(torch.randint(2**31, (1,), generator=generator))
                images = model.pixels(model.sample(e + tau, self.sampler, seed=seed, progress=progress))
        except OutOfBudget:
            reason = "a limit stopped the search before it could tell"
            return Detection(
                "elijah", [], {}, [], "undecided", reason, complete=False, coverage=coverage, not_covered=not_covered
            )
        distance, name = (load_lpips(), "lpips_alexnet") if lpips_available() else (None, "pairwise_mse")
        scores = {
            f"uniformity_{name}": uniformity(images, distance),
            "total_variation": total_variation(images),
            "inversion_loss": loss,
        }
        scores["suspicion"] = -scores[f"uniformity_{name}"]
        finding = Finding(
            Response(2 * self.coefficient, 1.0),
            tau,
            images.median(0).values * 2 - 1,
            loss,
            "assumed by the coefficient",
        )
        shown = Evidence(self.sampler, images * 2 - 1, None)
        reason = "the paper decides by a threshold over clean models of the same kind, and none is calibrated here"
        return Detection(
            "elijah", [finding], scores, [shown], "undecided", reason, coverage=coverage, not_covered=not_covered
        )

    def invert(
        self, model: Model, generator: torch.Generator, progress: Progress = no_progress
    ) -> tuple[Tensor, float]:
        """tau [C, H, W] and its last loss. Starts at -U(0, 1); one fixed batch of noise."""
        size = model.sample_shape[-1]
        n = self.batch_size or (20 if size > 128 else 50 if size == 128 else 100)
        e = model.noise(n, generator)
        t = torch.full((n,), model.T - 1, device=model.device)
        tau = (-torch.rand(model.sample_shape, generator=generator)).to(model.device).requires_grad_(True)
        optimizer = torch.optim.Adam([tau], lr=self.lr)
        loss = torch.zeros(())
        for k in range(self.iterations):
            loss = (self.coefficient * tau - model.eps(e + tau, t).mean(0)).abs().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            progress(f"inverting, loss {loss.item():.4f}", k + 1, self.iterations)
        return tau.detach(), loss.item()
