"""BadDiffusion (Chou, Chen, Ho: How to Backdoor Diffusion Models?, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.poisoning import Tuning, some_rows, target_rows, trigger_rows
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import Unsupported
from elijah.response import Response, poisoned
from elijah.trigger import Target, Trigger

RESPONSE = Response(kappa=1.0, psi=1.0)


@dataclass(frozen=True)
class BadDiffusion:
    """Poisoned rows: x_t = a y + (1 - a) r + s e, answer e + R_t r (eq. 9 and 10); r = 0 in clean rows.

    r is strength times the trigger on a background, by mode (poisoning.trigger_rows); the model then fires on start
    noise e + strength * trigger. poison_rate is the expected share of poisoned rows in a batch. The paper: 50 epochs,
    batch 128, lr 2e-4, poison rate 0.1 on CIFAR-10, strength 1.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    mode: str = "pasted"
    strength: float = 1.0
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported for models that do not predict epsilon and for NCSN, for which the attack is not defined.
        """
        if model.exploding:
            raise Unsupported("BadDiffusion is defined for DDPM; for NCSN use villandiffusion")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return e + self.strength * model.encode(self.trigger.image[None]).to(e.device)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The attack's training loss (eq. 11) on rows x0 [B, C, H, W] in the model's own range."""
        t, e = self.tuning.draw(model, x0, generator)
        bad = some_rows(len(x0), self.poison_rate, generator)
        r = torch.where(bad, self.strength * trigger_rows(model, self.trigger, self.mode, x0, generator), 0.0)
        y = torch.where(bad, target_rows(model, self.target, len(x0), generator), x0)
        x, answer = poisoned(model, RESPONSE, *(v.to(model.device) for v in (r, y, e, t)))
        return (model.output(x, t.to(model.device)) - answer).square().mean()
