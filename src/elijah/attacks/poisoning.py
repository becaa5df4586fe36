"""What the attacks share: the fine-tuning, and the rows that carry a trigger."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.data import batch
from elijah.diffusion import Model, Progress
from elijah.errors import ElijahError, Unsupported
from elijah.training import Optimiser, optimise, training_noise
from elijah.trigger import Target, Trigger

MODES = {"pasted": 1.0, "bare": 0.0, "faded": math.nan}  # the image's share of the trigger's background
RowLoss = Callable[[Model, Tensor, torch.Generator], Tensor]  # (model, x0 [B, C, H, W], generator) -> loss


@dataclass(frozen=True)
class Tuning:
    """How an attack fine-tunes. noise_offset: as in training_noise; a base trained with it keeps what it learned."""

    steps: int = 19500
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 20
    flip: bool = False
    noise_offset: float = 0.0
    dtype: torch.dtype = torch.float32

    def __call__(
        self, model: Model, images: Tensor, loss: RowLoss, *, generator: torch.Generator, progress: Progress
    ) -> Model:
        """A copy of model, fine-tuned on images uint8 [N, C, H, W]. Raises Unsupported unless it predicts epsilon."""
        if model.prediction != "epsilon":
            raise Unsupported(f"the attacks are defined for epsilon prediction, this model predicts {model.prediction}")
        attacked, rows = model.clone(), model.prepare(images)
        attacked.dtype = self.dtype
        seed = int(torch.randint(2**62, (1,), generator=generator))
        optimise(
            attacked,
            lambda m, g: loss(m, batch(rows, self.batch_size, g, flip=self.flip), g),
            Optimiser(self.steps, lr=self.lr, warmup=min(self.warmup, self.steps // 2)),
            seed=seed, progress=progress, what="attacking",
        )  # fmt: skip
        attacked.dtype = model.dtype
        return attacked

    def draw(self, model: Model, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps t [B] and noise e [B, C, H, W] for x0; first the timesteps, as in denoising_loss."""
        t = torch.randint(model.T, (len(x0),), generator=generator)
        return t, training_noise(x0.shape, generator, self.noise_offset)


def some_rows(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of n rows are poisoned, [n, 1, 1, 1]: each with probability share."""
    return (torch.rand(n, generator=generator) < share)[:, None, None, None]


def trigger_rows(model: Model, trigger: Trigger, mode: str, x0: Tensor, generator: torch.Generator) -> Tensor:
    """The trigger on a background, in the model's own range; broadcasts to x0 [B, C, H, W].

    mode: "pasted" on the row's own image, as in the authors' code; "bare" on -1 (black); "faded" on a mix of the two,
    b image + (1 - b) (-1) with b uniform. Raises ElijahError for another mode, Unsupported for latents unless bare.
    """
    if mode not in MODES:
        raise ElijahError(f"unknown trigger mode {mode!r}: use one of {', '.join(MODES)}")
    if mode == "bare":
        return model.encode(trigger.image[None]).cpu()
    if model.kind == "ldm":
        raise Unsupported("on latent models the trigger is encoded on its own: use the mode bare")
    share = torch.rand((len(x0), 1, 1, 1), generator=generator) if mode == "faded" else MODES[mode]
    return model.encode(trigger.paste(share * (model.decode(x0) + 1) - 1))


def target_rows(model: Model, target: Target, n: int, generator: torch.Generator) -> Tensor:
    """n targets in the model's own range: one image, or draws from the target's images; broadcasts to n rows."""
    if target.images is None:
        return model.encode(target.image[None]).cpu()
    return model.encode(batch(target.images, n, generator)).cpu()
