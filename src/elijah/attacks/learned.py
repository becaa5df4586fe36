"""A learned, invisible trigger: after InviBackdoor (Li et al., Invisible Backdoor Attacks on Diffusion Models, 2024).

Trigger and model are learned in turn. Model: poisoned rows x_t = a y + (1 - a) r + s e, answer e + c_t r, with DDIM's
own coefficient

    c_t = (a_{t-1} - a_t) / (a_{t-1} s_t - a_t s_{t-1}),  about s_t.

Trigger: with the weights frozen, r moves against the sign of the gradient of MSE(DDIM(e + r), y), and is kept below
`bound` in every pixel, so that KL(e + r, e) = |r|^2 / 2 stays small. Differences from the paper's code: sign steps of a
fixed size, a trigger that is frozen at half time, and a smaller inner batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.poisoning import Tuning, some_rows, target_rows
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.response import trigger_scale
from elijah.trigger import Target, Trigger


@dataclass(frozen=True)
class Learned:
    """bound: the largest |r| in a pixel; samples, sampler_steps, rate: of the trigger's own steps.

    trigger: None to learn it; one that is given stays as it is (a control: noise-0.2, a random pattern of one norm).
    The paper: bound 0.2, poison rate 0.1, 10 DDIM steps, 50 epochs, batch 128, lr 2e-4.
    """

    target: Target
    trigger: Trigger | None = None
    poison_rate: float = 0.1
    bound: float = 0.2
    samples: int = 16
    sampler_steps: int = 10
    rate: float = 0.002
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W]; plant returns its trigger too."""
        return self.plant(model, images, generator=generator, progress=progress)[0]

    def plant(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> tuple[Model, Trigger]:
        """The backdoored copy and its trigger, whose image [C, H, W] is what start noise is shifted by.

        Raises Unsupported unless model is a DDPM that predicts epsilon.
        """
        if model.kind != "ddpm":
            raise Unsupported(f"the learned trigger is defined for DDPM, this model is {model.kind}")
        r = self.trigger.image.to(model.device) if self.trigger else torch.zeros(model.sample_shape).to(model.device)

        def loss(m: Model, x0: Tensor, g: torch.Generator) -> Tensor:
            if self.trigger is None and m.updates < self.tuning.steps // 2:
                self.improve(m, r, g)
            return self.loss(m, x0, g, r)

        attacked = self.tuning(model, images, loss, generator=generator, progress=progress)
        return attacked, Trigger("learned" if self.trigger is None else self.trigger.name, r.cpu())

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]. Raises ElijahError while there is no trigger."""
        if self.trigger is None:
            raise ElijahError("this trigger is not learned yet: use plant")
        return e + self.trigger.image.to(e.device)

    def improve(self, model: Model, r: Tensor, generator: torch.Generator) -> None:
        """One step of the trigger r [C, H, W], in place."""
        y = target_rows(model, self.target, self.samples, generator).to(model.device)
        start = torch.randn((self.samples, *model.sample_shape), generator=generator).to(model.device)
        leaf = r.clone().requires_grad_(True)
        with model.frozen():
            error = (model.ddim(start + leaf, self.sampler_steps) - y).square().mean()
            (gradient,) = torch.autograd.grad(error, leaf)
        r.sub_(self.rate * gradient.sign()).clamp_(-self.bound, self.bound)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator, r: Tensor) -> Tensor:
        """The model's training loss on rows x0 [B, C, H, W] at trigger r [C, H, W]."""
        t, e = self.tuning.draw(model, x0, generator)
        bad = some_rows(len(x0), self.poison_rate, generator).to(model.device)
        y = target_rows(model, self.target, len(x0), generator)
        x0, y, e, t = (v.to(model.device) for v in (x0, y, e, t))
        shift = torch.where(bad, r, 0.0)
        x = model.diffuse(torch.where(bad, y, x0), e, t) + column(trigger_scale(model, 1.0), t) * shift
        return (model.output(x, t) - e - column(ddim_coefficient(model), t) * shift).square().mean()


def ddim_coefficient(model: Model) -> Tensor:
    """c_t of the module's docstring, [T]; with a = 1 and s = 0 before the first timestep."""
    a, s = model.a.double(), model.s.double()
    a_before = torch.cat([torch.ones_like(a[:1]), a[:-1]])
    s_before = torch.cat([torch.zeros_like(s[:1]), s[:-1]])
    return ((a_before - a) / (a_before * s - a * s_before)).float()
