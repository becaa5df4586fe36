"""TrojDiff (Chen, Song, Li: TrojDiff: Trojan Attacks on Diffusion Models with Diverse Targets, CVPR 2023).

With the trigger delta in [-1, 1] and mu = (1 - gamma) delta, poisoned rows are

    x_t = a x0 + s (gamma e + mu),    answer e,    start noise gamma e + mu,

with x0 the target: one image (D2I), a class of the data (In-D2D) or another data set (Out-D2D). With a patch, only the
pixels of a square at the bottom right are shifted like this, and the others are ordinary. Sampling the attack as its
authors do takes the trigger out step by step (reverse, below); stock samplers do not know it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elijah.attacks.poisoning import Tuning, some_rows, target_rows
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.samplers import evenly
from elijah.trigger import Target, Trigger


@dataclass(frozen=True)
class TrojDiff:
    """gamma: 0.6 for the blend trigger, 0.1 with a patch. patch: its side in pixels; None blends the whole image.

    target.images makes it a distribution (D2D). The paper: Adam 2e-4, EMA 0.9999 (none here), 100k steps, 10 % target
    rows; Hello Kitty for blend; white, side 3 (CIFAR-10) or 6 (CelebA 64 x 64), for patch.
    """

    trigger: Trigger
    target: Target
    poison_rate: float = 0.1
    gamma: float = 0.6
    patch: int | None = None
    tuning: Tuning = field(default_factory=lambda: Tuning(steps=100_000))

    def __call__(
        self, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
    ) -> Model:
        """A backdoored copy of model, fine-tuned on images uint8 [N, C, H, W].

        Raises Unsupported unless model is a DDPM that predicts epsilon.
        """
        if model.kind != "ddpm":
            raise Unsupported(f"TrojDiff is defined for DDPM, this model is {model.kind}")
        if not 0 < self.gamma <= 1 or (self.patch is not None and not 1 <= self.patch <= model.sample_shape[-1]):
            raise ElijahError("TrojDiff: gamma must be above 0 and at most 1, and the patch must fit into the image")
        return self.tuning(model, images, self.loss, generator=generator, progress=progress)

    @property
    def spread(self) -> Tensor:
        """What e is multiplied by, [C, H, W]: gamma where the trigger is, 1 outside the patch."""
        return torch.where(self.where, torch.tensor(self.gamma), torch.tensor(1.0))

    @property
    def mu(self) -> Tensor:
        """(1 - gamma) delta, [C, H, W]; 0 outside the patch."""
        return torch.where(self.where, (1 - self.gamma) * self.trigger.image, torch.tensor(0.0))

    @property
    def where(self) -> Tensor:
        """[C, H, W], true where the trigger is."""
        inside = torch.zeros_like(self.trigger.image, dtype=torch.bool)
        k = self.patch or self.trigger.image.shape[-1]
        inside[:, -k:, -k:] = True
        return inside

    def start(self, model: Model, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return self.spread.to(e.device) * e + self.mu.to(e.device)

    def loss(self, model: Model, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The attack's training loss on rows x0 [B, C, H, W] in [-1, 1]; its sum of squares is a mean here."""
        t, e = self.tuning.draw(model, x0, generator)
        bad = some_rows(len(x0), self.poison_rate, generator)
        y = torch.where(bad, target_rows(model, self.target, len(x0), generator), x0)
        shifted = torch.where(bad, self.start(model, e), e)
        y, shifted, e, t = (v.to(model.device) for v in (y, shifted, e, t))
        return (model.output(model.diffuse(y, shifted, t), t) - e).square().mean()

    @torch.no_grad()
    def reverse(self, model: Model, x: Tensor, *, steps: int, stochastic: bool, seed: int = 0) -> Tensor:
        """The authors' own sampling from x = start(model, e): samples [B, C, H, W]; DDPM if stochastic, else DDIM.

        steps: of the timesteps, evenly spaced from T - 1; noise of sample i comes from (seed, i) alone. The sampler of
        whoever holds the trigger: for measuring an attack, never for a defence.
        """
        mu, gamma = self.mu.to(x.device), self.spread.to(x.device)
        generators = [generator_for(seed, i) for i in range(len(x))]
        for now, then in evenly(model.T, steps):
            eps = model.eps(x, torch.full((len(x),), now, device=x.device))
            x = reverse_step(model, x, eps, now, then, mu, gamma, generators if stochastic else None)
        return x


def reverse_step(
    model: Model, x: Tensor, eps: Tensor, now: int, then: int, mu: Tensor, gamma: Tensor,
    generators: list[torch.Generator] | None,
) -> Tensor:  # fmt: skip
    """x at timestep `then` (-1: the image) from x at `now`; without generators DDIM, with them DDPM (x0 clamped).

    mean = [a' beta x0 + sqrt(alpha) s'^2 x + (s' beta - s'^2 sqrt(alpha) k) mu] / s^2, with k = s - sqrt(alpha) s' and
    deviation gamma sqrt(beta) s' / s (TrojDiff, eq. 8 to 10; primes are the later, cleaner timestep's).
    """
    a, s = model.a[now], model.s[now]
    a_then = model.a[then] if then >= 0 else torch.ones_like(a)
    s_then = model.s[then] if then >= 0 else torch.zeros_like(s)
    x0 = (x - s * (gamma * eps + mu)) / a
    if generators is None:
        return a_then * x0 + s_then * (gamma * eps + mu)
    root = a / a_then  # sqrt(alpha) of this step
    beta = 1 - root**2
    k = s - root * s_then
    x0 = x0.clamp(-1, 1)
    mean = (a_then * beta * x0 + root * s_then**2 * x + (s_then * beta - s_then**2 * root * k) * mu) / s**2
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)
    return mean + gamma * beta.sqrt() * s_then / s * noise
