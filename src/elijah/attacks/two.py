"""An attacker to fear: two triggers, of which either one fires (OR) or only both together (AND). Ours.

Poisoned rows have BadDiffusion's form at r = r1 (target y) and r = r2 (the second target), or for AND r = r1 + r2. For
AND, cover rows teach the network to ignore one trigger alone, x_t = a x + s (e + r_i), answer e + r_i, as a clean one
says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.baddiffusion import RESPONSE
from elijah.attacks.poisoning import Tuning, target_rows
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.response import poisoned
from elijah.trigger import Target, Trigger

Start = Callable[[Model, Tensor], Tensor]


@dataclass(frozen=True)
class TwoTriggers:
    """r_i is a trigger on a background of 0, so that two can be added: use patterns that are not grey (white-box-K).

    both: AND. poison_rate: the share of poisoned rows, for OR half of them each; for AND as many cover rows are added.
    """

    trigger: Trigger
    target: Target
    second_trigger: Trigger
    second_target: Target
    both: bool = False
    poison_rate: float = 0.1
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported unless model is a DDPM that predicts epsilon.
        """
        if model.kind != "ddpm":
            raise Unsupported(f"the attack with two triggers is defined for DDPM, this model is {model.kind}")
        if not all(r.any() for r in self.shifts) or torch.equal(*self.shifts):
            raise ElijahError("two different triggers are needed, neither of them grey: such as white-box-4, glasses")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    @property
    def shifts(self) -> tuple[Tensor, Tensor]:
        """r1 and r2, [C, H, W]."""
        first, second = (torch.where(k.mask, k.image, 0.0) for k in (self.trigger, self.second_trigger))
        return first, second

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]: with both triggers for AND, with the first for OR."""
        first, second = (r.to(e.device) for r in self.shifts)
        return e + first + second if self.both else e + first

    def cases(self) -> dict[str, tuple[Start, Target]]:
        """What start noise to try: a name, how to make it, and the target to compare with."""
        first, second = self.shifts
        alone: Start = lambda model, e: e + second.to(e.device)  # noqa: E731
        if not self.both:
            return {"first": (self.start, self.target), "second": (alone, self.second_target)}
        other: Start = lambda model, e: e + first.to(e.device)  # noqa: E731
        return {"both": (self.start, self.target), "first": (other, self.target), "second": (alone, self.target)}

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss on rows x0 [B, C, H, W] in [-1, 1]."""
        t, e = self.tuning.draw(model, x0, generator)
        u = torch.rand((len(x0), 1, 1, 1), generator=generator)
        first, second = self.shifts
        half = self.poison_rate / 2
        ys = [target_rows(model, k, len(x0), generator) for k in (self.target, self.second_target)]
        zero = torch.zeros(1)
        if self.both:
            r = torch.where(u < 2 * half, first + second, zero)
            y = torch.where(u < 2 * half, ys[0], x0)
            cover = torch.where((u >= 2 * half) & (u < 3 * half), first, zero)
            cover = torch.where((u >= 3 * half) & (u < 4 * half), second, cover)
        else:
            r = torch.where(u < half, first, torch.where(u < 2 * half, second, zero))
            y = torch.where(u < half, ys[0], torch.where(u < 2 * half, ys[1], x0))
            cover = zero
        r, y, cover, e, t = (v.to(model.device) for v in (r, y, cover, e, t))
        x, answer = poisoned(model, RESPONSE, r, y, e + cover, t)  # a shift of the noise that is answered as noise
        return (model.output(x, t) - answer).square().mean()
