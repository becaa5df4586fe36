"""Plain fine-tuning on clean images: the floor that every repair has to beat. It knows nothing of the trigger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.processes import share_of
from elijah.training import Optimiser, denoising_loss, optimise


@dataclass(frozen=True)
class FineTune:
    """steps: optimiser updates of AdamW at lr, on the denoising loss (Ho et al. 2020, eq. 14)."""

    steps: int = 100
    batch_size: int = 32
    lr: float = 2e-4
    warmup: int = 5

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
        """A fine-tuned copy of model. images: clean or synthetic, uint8 [N, C, H, W]; findings are not used."""
        return self.tune(model.clone(), images, generator, progress, checkpoint)

    def tune(
        self, model: Model, images: Tensor, generator: torch.Generator, progress: Progress, checkpoint: Path | None,
        each: Callable[[int, Model], None] | None = None,
    ) -> Model:  # fmt: skip
        """The model, fine-tuned in place; each is called after every update."""
        rows = model.prepare(images)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        settings = Optimiser(self.steps, lr=self.lr, warmup=min(self.warmup, self.steps // 2))
        return optimise(
            model, lambda m, g: denoising_loss(m, batch(rows, share_of(self.batch_size), g), g), settings,
            seed=seed, checkpoint=checkpoint, progress=progress, what="repairing", each=each,
        )  # fmt: skip
