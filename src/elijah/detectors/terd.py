"""TERD's model detection (Mo, Huang, Li, Li, Wang: TERD: A Unified Framework for Safeguarding Diffusion Models Against
Backdoors, ICML 2024), as its released code (github.com/PKU-ML/TERD) has it: a baseline.

Read in the code: BadDiffusion/reverse.py, reverse_loss.py, reverse_pipeline.py, reverse_big.py and model_detection.py,
TrojDiff/reverse.py and model_detection.py, and the scripts that set their arguments. They are two programs, one per
attack, so a user must know the attack: here the first is the default, and learn_gamma is the second.

Differences from the released code:
- Randomness: a generator that is passed in, not a global seed, so equal hyper-parameters give other numbers.
- The refinement samples on the model's own noise schedule; the code takes linear betas from 1e-4 to 0.02 for all.
- Precision is the model's dtype; the BadDiffusion code runs all but its sampler under fp16 autocast.
- v-prediction works too, through Model.eps; the code takes the network's output for e.
- Batches are 16 at every size; the script for CelebA-HQ (256 pixels) takes 2.
- A field with two values has one for images up to 32 pixels, one for larger ones. The code has them by data set:
  CIFAR-10, and CelebA (64) or CelebA-HQ (256). The second gamma_lr is CelebA's, the second clip_norm CelebA-HQ's.
- The scores leave out the constants N_m = -0.4 and N_v = 0.003 that the code subtracts "for normalization". A threshold
  over clean models moves with them.
- Where gamma was clipped to 0 the divergence is infinite; the scores take at least SMALLEST for it.
- sampler and samples only make the report's pictures and the finding's target: the code samples nothing at the end.
- The paper's detection of backdoored start noise is left out: a scan has no start noise to judge. So are score-based
  and consistency models.

Not verified, because the paper's text was out of reach: the numbers of its sections and equations; that its window of t
is the code's last 10 of 1000 (a summary has 0.01 T); and how it treats VillanDiffusion, for which no code is released
(the default's loss needs nothing of its coefficients). The rule, mean + 3 deviations of clean models for either score,
is known from quotations of the paper alone: the released code has none. gamma_clip_norm is CIFAR-10's: CelebA's
configuration was out of reach. That old diffusers' DDIM clips and steps as generate does is from memory of its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from elijah.detection import Detection, Evidence, Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import OutOfBudget
from elijah.response import Response

SMALLEST = 1e-6  # of gamma, in the divergence
Leaves = tuple[Tensor, Tensor]  # r and gamma, both [C, H, W]
Loss = Callable[[Tensor, Tensor], Tensor]  # (r, gamma) -> a scalar


@dataclass(frozen=True)
class Terd:
    """Inverts a trigger r and measures how far N(r, gamma^2) is from the start noise N(0, 1), pixel by pixel.

    learn_gamma: whether the noise of triggered inputs has a scale of its own (TrojDiff); else gamma is 1. iterations,
    lr, gamma_lr: of SGD, falling to 0 by a cosine. weight: of |r|_1, which keeps r from 0. window: how many of the last
    timesteps, and of the first, the losses look at. steps: of the sampler inside the refinement. clip_norm bounds the
    gradient there; momentum and gamma_clip_norm are the refinement's where gamma is learned. Two values: for images up
    to 32 pixels, and for larger ones.

    At these settings 960,000 network evaluations, a backward counted as two. The refinement keeps the activations of
    steps + 4 calls in memory.
    """

    kinds: ClassVar = ("ddpm",)
    learn_gamma: bool = False
    iterations: int = 3000
    refine_iterations: int = 1000
    batch_size: int = 16
    lr: float = 0.5
    gamma_lr: tuple[float, float] = (0.002, 0.001)
    weight: tuple[float, float] = (5e-5, 5e-4)
    window: int = 10
    steps: int = 10
    clip_norm: tuple[float, float] = (0.01, 0.2)
    gamma_clip_norm: float = 1.0
    momentum: float = 0.9
    samples: int = 16
    sampler: str = "ddim-20"

    def __call__(self, model: Model, *, generator: torch.Generator, progress: Progress = no_progress) -> Detection:
        """Inverts a trigger and reports the divergence's mean and variance. Stops at the model's limits."""
        noise = "gamma e + r, with a gamma for each pixel" if self.learn_gamma else "e + r"
        coverage = [f"one trigger r in start noise {noise}, whatever the answer's coefficient of r"]
        not_covered = [
            "triggers that shift the start noise little",
            "triggers that act only at small t",
            *([] if self.learn_gamma else ["noise that the attack shrinks (TrojDiff)"]),
        ]
        try:
            with model.frozen():
                r, gamma, loss = self.invert(model, generator, progress)
                start = gamma * model.noise(self.samples, generator) + r
                seed = int(torch.randint(2**31, (1,), generator=generator))
                images = model.sample(start, self.sampler, seed=seed, progress=progress)
        except OutOfBudget:
            reason = "a limit stopped the search before it could tell"
            return Detection(
                "terd", [], {}, [], "undecided", reason, complete=False, coverage=coverage, not_covered=not_covered
            )
        kl = divergence(r, gamma)
        scores = {
            "kl_mean": kl.mean().item(),
            "kl_variance": kl.var(correction=0).item(),
            "inversion_loss": loss,
        }
        scores["suspicion"] = scores["kl_mean"] + scores["kl_variance"]
        response = Response(0.0, 0.0, gamma.mean().item()) if self.learn_gamma else Response(1.0, 1.0)
        target = images.median(0).values.clamp(-1, 1)
        finding = Finding(response, r, target, loss, "not told: the method needs no response")
        shown = Evidence(self.sampler, images, None)
        reason = "the paper decides by mean + 3 deviations of the scores of clean models, and none are calibrated here"
        return Detection(
            "terd", [finding], scores, [shown], "undecided", reason, coverage=coverage, not_covered=not_covered
        )

    def invert(
        self, model: Model, generator: torch.Generator, progress: Progress = no_progress
    ) -> tuple[Tensor, Tensor, float]:
        """r and gamma [C, H, W], and the last reversed loss a pixel: 0 for a network that answers de to noises that
        differ by de, 1 for one that answers nothing. A clean network is near 0 as well.

        r starts at -U(0, 1), gamma at 0 where it is learned.
        """
        r = (-torch.rand(model.sample_shape, generator=generator)).to(model.device)
        leaves = r, torch.zeros_like(r) if self.learn_gamma else torch.ones_like(r)
        loss = 0.0
        if self.iterations:
            loss = self.estimate(model, leaves, generator, progress)
        if self.refine_iterations:
            loss = self.refine(model, leaves, generator, progress)
        return *leaves, loss / r.numel()

    def estimate(self, model: Model, leaves: Leaves, generator: torch.Generator, progress: Progress) -> float:
        """Stage one, in place: images are N(0, 1), as t near T hides them. Returns the last reversed loss."""

        def loss(r: Tensor, gamma: Tensor) -> Tensor:
            x0 = model.noise(self.batch_size, generator)
            return reversed_loss(model, x0, r, gamma, self.timesteps(model, generator, last=True), generator)

        return self._descend(model, leaves, loss, self.iterations, "estimating", progress)

    def refine(self, model: Model, leaves: Leaves, generator: torch.Generator, progress: Progress) -> float:
        """Stage two, in place: images are what a few steps of DDIM make of the trigger, and gradients flow through
        them. The loss is also taken at small t, there without the trigger. Returns the last reversed loss."""

        def loss(r: Tensor, gamma: Tensor) -> Tensor:
            x0 = self.generate(model, gamma * model.noise(self.batch_size, generator) + r, r, gamma)
            last, first = (self.timesteps(model, generator, last=last) for last in (True, False))
            at_last = reversed_loss(model, x0, r, gamma, last, generator)
            return (at_last + reversed_loss(model, x0, torch.zeros_like(r), gamma, first, generator)) / 2

        clip_norm = self.gamma_clip_norm if self.learn_gamma else self.clip_norm[is_large(model)]
        momentum = self.momentum if self.learn_gamma else 0.0
        return self._descend(model, leaves, loss, self.refine_iterations, "refining", progress, clip_norm, momentum)

    def _descend(
        self, model: Model, leaves: Leaves, loss: Loss, iterations: int, what: str, progress: Progress,
        clip_norm: float | None = None, momentum: float = 0.0,
    ) -> float:  # fmt: skip
        r, gamma = leaves
        learned = {r: self.lr} | ({gamma: self.gamma_lr[is_large(model)]} if self.learn_gamma else {})
        groups = [{"params": [leaf.requires_grad_(True)], "lr": lr} for leaf, lr in learned.items()]
        optimizer = torch.optim.SGD(groups, momentum=momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        value = 0.0
        try:
            for k in range(iterations):
                reversed_ = loss(r, gamma)
                optimizer.zero_grad()
                torch.autograd.backward(reversed_ - self.weight[is_large(model)] * r.abs().sum())
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(learned, clip_norm)
                optimizer.step()
                gamma.detach().clamp_(min=0)
                schedule.step()
                value = reversed_.item()
                progress(f"{what}, loss {value / r.numel():.4f}", k + 1, iterations)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        return value

    def timesteps(self, model: Model, generator: torch.Generator, *, last: bool) -> Tensor:
        """A batch [B] of the last timesteps of the window, or of its first."""
        low = max(0, model.T - self.window) if last else 0
        high = model.T if last else min(self.window, model.T)
        return torch.randint(low, high, (self.batch_size,), generator=generator).to(model.device)

    def generate(self, model: Model, x: Tensor, r: Tensor, gamma: Tensor) -> Tensor:
        """Images x0 [B, C, H, W] from start noise x, by DDIM with gradients.

        With gamma 1: stock DDIM as old diffusers has it, from t = 900 in even steps, x0 clipped to [-1, 1]. With a
        learned gamma: TrojDiff's own sampler, which takes the trigger out, from t = 800 in quadratic steps, unclipped.
        """
        for now, then in pairwise([*reversed(self.visited(model.T)), -1]):
            e = model.eps(x, torch.full((len(x),), now, device=x.device))
            shift = gamma * e + r if self.learn_gamma else e
            x0 = (x - model.s[now] * shift) / model.a[now]
            if not self.learn_gamma:
                x0 = x0.clamp(-1, 1)
            x = x0 if then < 0 else model.a[then] * x0 + model.s[then] * shift
        return x

    def visited(self, timesteps: int) -> list[int]:
        """The timesteps that generate visits, rising."""
        if self.learn_gamma:
            return [int(0.8 * timesteps * (k / max(1, self.steps - 1)) ** 2) for k in range(self.steps)]
        return [k * (timesteps // self.steps) for k in range(self.steps)]


def reversed_loss(model: Model, x0: Tensor, r: Tensor, gamma: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """0.5 |(e1 - eps(x1, t)) - (e2 - eps(x2, t))|^2 with x = a x0 + s gamma e + r: sum over C, H, W, mean over B.

    Both of a pair have x0 [B, C, H, W] and t [B], so whatever the attacker adds to the answer for r cancels.
    """
    noises = [model.noise(len(x0), generator) for _ in range(2)]
    one, two = (e - model.eps(model.diffuse(x0, gamma * e, t) + r, t) for e in noises)
    return 0.5 * (one - two).square().sum((1, 2, 3)).mean()


def divergence(r: Tensor, gamma: Tensor) -> Tensor:
    """KL(N(r, gamma^2) || N(0, 1)) of each pixel, [C, H, W]."""
    return (gamma.square() + r.square() - 1) / 2 - gamma.clamp(min=SMALLEST).log()


def is_large(model: Model) -> bool:
    """Whether the second of two values holds."""
    return model.sample_shape[-1] > 32
