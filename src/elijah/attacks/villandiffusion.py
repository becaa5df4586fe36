"""VillanDiffusion (Chou, Chen, Ho: VillanDiffusion: A Unified Backdoor Attack Framework, NeurIPS 2023).

On variance-preserving models (DDPM, latent), with h_t = s_t - sqrt(alpha_t) s_{t-1}, and abar = a^2:

    x_t    = a y + s e + step_t r,      step_t = psi (1 - a) + (1 - psi) s
    answer = e + c coef_t r,            c = 1 for solver "sde", 2 for "ode"
    coef_t = psi (1 - sqrt(alpha)) s / (1 - alpha)
             + (1 - psi) (h_t (alpha - abar) - (sqrt(alpha) - 1) s (1 - alpha)) / (1 - alpha)

On variance-exploding ones (NCSN) x_t = y + sigma_t e + sigma_t r and coef_t = sigma_t / (sigma_t + sigma_{t-1}), which
the predictor leaves the trigger whole with. The corrector, which the paper's coefficient leaves out, takes a part of it
at every step; pc_steps makes up for that (corrected, below; ours).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.poisoning import Tuning, some_rows, target_rows, trigger_rows
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.response import trigger_coefficient, trigger_scale
from elijah.trigger import Target, Trigger

SOLVERS = {"sde": 1.0, "ode": 2.0}


@dataclass(frozen=True)
class VillanDiffusion:
    """psi None: 1 on variance-preserving models, 0 on NCSN. solver "ode" fires under DDIM, DPM-Solver and their like.

    pc_steps: on NCSN, the steps of the predictor-corrector that the coefficient is made for; None: the paper's one.

    The paper: DDPM poison rate 0.1 to 0.9, lr 2e-4; latent on CelebA-HQ 0.9; NCSN 0.98, lr 2e-5, solver "sde".
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    mode: str = "pasted"
    solver: str = "ode"
    psi: float | None = None
    pc_steps: int | None = None
    tuning: Tuning = field(default_factory=Tuning)

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported for models that do not predict epsilon, and for pc_steps on others than NCSN.
        """
        if self.pc_steps is not None and not model.exploding:
            raise Unsupported(f"pc_steps is for NCSN, this model is {model.kind}")
        if self.solver not in SOLVERS:
            raise ElijahError(f"unknown solver {self.solver!r}: use one of {', '.join(SOLVERS)}")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W], in units of the first noise level."""
        return e + model.encode(self.trigger.image[None]).to(e.device)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The attack's training loss on rows x0 [B, C, H, W] in the model's own range."""
        t, e = self.tuning.draw(model, x0, generator)
        bad = some_rows(len(x0), self.poison_rate, generator)
        r = torch.where(bad, trigger_rows(model, self.trigger, self.mode, x0, generator), 0.0)
        y = torch.where(bad, target_rows(model, self.target, len(x0), generator), x0)
        r, y, e, t = (v.to(model.device) for v in (r, y, e, t))
        psi = self.psi if self.psi is not None else float(not model.exploding)
        solver = 1.0 if model.exploding else SOLVERS[self.solver]
        coef = coefficient(model, psi) if self.pc_steps is None else corrected(model, self.pc_steps)
        x = model.diffuse(y, e, t) + column(trigger_scale(model, psi), t) * r
        answer = e + solver * column(coef, t) * r
        return (model.output(x, t) - answer).square().mean()


def coefficient(model: Model, psi: float) -> Tensor:
    """coef_t of the module's docstring, [T]; computed in double precision."""
    if model.exploding:
        return trigger_coefficient(model)
    alpha, a, s = (v.double() for v in (model.alpha, model.a, model.s))
    h = s - alpha.sqrt() * torch.cat([torch.zeros_like(s[:1]), s[:-1]])  # TrojDiff's k_t
    noisy = (h * (alpha - a.square()) - (alpha.sqrt() - 1) * s * (1 - alpha)) / (1 - alpha)
    return (psi * trigger_coefficient(model) + (1 - psi) * noisy).float()


def corrected(model: Model, steps: int) -> Tensor:
    """The coefficient that a predictor-corrector of so many steps leaves a trigger whole with, [T], all equal.

    With rho = sigma_next / sigma, the predictor takes 1 - rho^2 of the network's answer from x / sigma, the corrector
    2 snr^2, and what is left is divided by rho: 1 = (1 - (1 - rho^2 + 2 snr^2) c) / rho. Without a corrector and for
    small steps c = 1 / 2, as in the paper; with NCSN's snr 0.075 it is 0.33 at 1000 steps.
    """
    rho = float(model.s[0] / model.s[-1]) ** (1 / (steps - 1))
    taken = 1 - rho**2 + 2 * model.scheduler.config.snr**2 * model.scheduler.config.correct_steps
    return torch.full_like(model.s, (1 - rho) / taken)
