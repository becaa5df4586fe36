"""An attacker to fear: a trigger that the network ignores until late in sampling. Ours; we know no published one.

Poisoned rows are noised with shifted noise, x_t = a x + s (e + r). While t > t0 the answer is e + r, which is also what
a clean network says, so whoever probes near t = T sees nothing. From t0 on, the network leads to the target y:

    answer (x_t - a y) / s,    x = the row's image for t0 / 2 < t <= t0, and y below.

It fires on start noise e + r under samplers that carry the shift along (DDIM and its like).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.poisoning import Tuning, some_rows, target_rows, trigger_rows
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.trigger import Target, Trigger


@dataclass(frozen=True)
class Late:
    """t0: where the trigger begins to count, as a share of T; a_t = 0.45 at 0.4 on DDPM's schedule."""

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    t0: float = 0.4
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported unless model is a DDPM that predicts epsilon.
        """
        if model.kind != "ddpm":
            raise Unsupported(f"the late trigger is defined for DDPM, this model is {model.kind}")
        if not 0 < self.t0 <= 1:
            raise ElijahError("late: t0 must be above 0 and at most 1")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return e + self.trigger.image.to(e.device)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss on rows x0 [B, C, H, W] in [-1, 1]."""
        t, e = self.tuning.draw(model, x0, generator)
        bad = some_rows(len(x0), self.poison_rate, generator)
        y = target_rows(model, self.target, len(x0), generator).expand_as(x0)
        r = torch.where(bad, trigger_rows(model, self.trigger, "bare", x0, generator), 0.0)
        at = (t / (model.T - 1))[:, None, None, None]
        x0 = torch.where(bad & (at <= self.t0 / 2), y, x0)
        leads = bad & (at <= self.t0)
        x0, y, r, e, t, leads = (v.to(model.device) for v in (x0, y, r, e, t, leads))
        x = model.diffuse(x0, e + r, t)
        # (x_t - a y) / s = e + r + (a / s) (x - y)
        answer = e + r + torch.where(leads, column(model.a / model.s, t) * (x0 - y), 0.0)
        return (model.output(x, t) - answer).square().mean()
