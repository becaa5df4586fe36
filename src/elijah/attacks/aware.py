"""An attacker to fear: one who knows this package's detector and trains against its score. Ours.

The attack is BadDiffusion (solver "sde") or VillanDiffusion (solver "ode"), as its own file has it, plus

    weight * max(0, margin - L(r, y)),

with L the loss ratio of detectors/hypothesis.py at the attacker's own trigger and target, in the attack's own family,
over fresh noise and the timesteps that this family is judged at. L is near 0 at a backdoor that was trained to the
end; where it stays above the margin, no search finds a loss that fits at the true trigger and target.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.baddiffusion import BadDiffusion
from elijah.attacks.poisoning import Tuning, target_rows
from elijah.attacks.villandiffusion import VillanDiffusion
from elijah.detectors.hypothesis import FULL, HALF, antithetic, ratio, visible
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.response import Response, poisoned
from elijah.trigger import Target, Trigger

FAMILIES = {"sde": HALF, "ode": FULL}


@dataclass(frozen=True)
class Aware:
    """weight: lambda, of the penalty; 0 is the attack alone, bit by bit. margin: what L is pushed up to.

    rows: of the batch that L is estimated on at every update, even. solver, mode, poison_rate: the attack's own.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    mode: str = "pasted"
    solver: str = "sde"
    weight: float = 1.0
    margin: float = 0.5
    rows: int = 32
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported for models that do not predict epsilon and for NCSN, ElijahError for settings out of range.
        """
        if model.exploding:
            raise Unsupported("the detector-aware attack is defined for DDPM and latent models, this one is ncsn")
        if self.solver not in FAMILIES:
            raise ElijahError(f"unknown solver {self.solver!r}: use one of {', '.join(FAMILIES)}")
        if self.weight < 0 or self.rows < 2 or self.rows % 2:
            raise ElijahError("aware: weight must not be negative, and rows must be even, 2 at least")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    @property
    def attack(self) -> BadDiffusion | VillanDiffusion:
        """What is hidden."""
        if self.solver == "sde":
            return BadDiffusion(self.trigger, self.target, self.poison_rate, self.mode, tuning=self.tuning)
        return VillanDiffusion(self.trigger, self.target, self.poison_rate, self.mode, self.solver, tuning=self.tuning)

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return self.attack.start(model, e)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss on rows x0 [B, C, H, W] in the model's own range; without poisoned rows nothing is hidden.

        The penalty draws after the attack, so that the attack's own rows do not depend on it.
        """
        loss = self.attack.loss(model, x0, generator)
        if not self.weight or not self.poison_rate:
            return loss
        return loss + self.weight * (self.margin - self.loss_ratio(model, generator)).clamp(min=0)

    def loss_ratio(self, model: Model, generator: torch.Generator) -> Tensor:
        """The detector's L at the true trigger, bare, and target, a scalar with gradients for the weights.

        Of several ranges of t the largest.
        """
        family = FAMILIES[self.solver]
        return torch.stack([self.ratio_in(window, family.response, model, generator) for window in family.judged]).max()

    def ratio_in(
        self, window: tuple[float, float], response: Response, model: Model, generator: torch.Generator
    ) -> Tensor:
        """The same in one range of t, shares of T."""
        e, t = antithetic(model, self.rows, *window, generator)
        r = model.encode(self.trigger.image[None]).to(e.device)
        y = target_rows(model, self.target, self.rows, generator).to(e.device)
        x, answer = poisoned(model, response, r, y, e, t)
        return ratio(model.eps(x, t) - answer, column(visible(model, response), t) * r.expand_as(e))
