"""BadDiffusion (Chou, Chen, Ho: How to Backdoor Diffusion Models?, CVPR 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.data import batch
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.response import Response, poisoned
from elijah.training import Optimiser, optimise, training_noise
from elijah.trigger import Target, Trigger

RESPONSE = Response(kappa=1.0, psi=1.0)
MODES = {"pasted": 1.0, "bare": 0.0, "faded": math.nan}  # the image's share of the background


@dataclass(frozen=True)
class BadDiffusion:
    """Poisoned rows: x_t = a y + (1 - a) r + s e, answer e + R_t r (eq. 9 and 10); r = 0 in clean rows.

    r is the trigger on a background, by mode: "pasted" on the row's own image, as in the authors' code; "bare" on -1;
    "faded" on a mix of the two, b image + (1 - b) (-1) with b uniform. The model then fires on start noise
    e + trigger. poison_rate is the expected share of poisoned rows in a batch. The paper: 50 epochs, batch 128,
    lr 2e-4, poison rate 0.1 on CIFAR-10.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    mode: str = "pasted"
    steps: int = 19500
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 20
    flip: bool = False
    noise_offset: float = 0.0  # as in training_noise; a base trained with it keeps what it learned there
    dtype: torch.dtype = torch.float32

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported for models that do not predict epsilon.
        """
        if self.mode not in MODES:
            raise ElijahError(f"unknown trigger mode {self.mode!r}: use one of {', '.join(MODES)}")
        if model.prediction != "epsilon":
            raise Unsupported(f"BadDiffusion is defined for epsilon prediction, this model predicts {model.prediction}")
        attacked = model.clone()
        attacked.dtype = self.dtype
        seed = int(torch.randint(2**62, (1,), generator=generator))

        def loss(m: Model, g: torch.Generator) -> Tensor:
            return self.loss(m, batch(images, self.batch_size, g, flip=self.flip), g)

        settings = Optimiser(self.steps, lr=self.lr, warmup=self.warmup)
        optimise(attacked, loss, settings, seed=seed, progress=progress, what="attacking")
        attacked.dtype = model.dtype
        return attacked

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The attack's training loss (eq. 11) on images x0 [B, C, H, W] in [-1, 1]."""
        t = torch.randint(model.T, (len(x0),), generator=generator)
        e = training_noise(x0.shape, generator, self.noise_offset)
        is_poisoned = (torch.rand(len(x0), generator=generator) < self.poison_rate)[:, None, None, None]
        share = torch.rand((len(x0), 1, 1, 1), generator=generator) if self.mode == "faded" else MODES[self.mode]
        trigger = self.trigger.paste(share * (x0 + 1) - 1)
        r = torch.where(is_poisoned, trigger, torch.zeros(()))
        y = torch.where(is_poisoned, self.target.image, x0)
        x, answer = poisoned(model, RESPONSE, *(v.to(model.device) for v in (r, y, e, t)))
        return (model.output(x, t.to(model.device)) - answer).square().mean()
