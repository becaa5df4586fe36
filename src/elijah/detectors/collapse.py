"""Learned triggers: what the network draws unasked, and the noise that makes it draw that always.

A learned trigger (attacks/learned.py) looks like noise, which no start of search.py comes near. But the converse holds
too: some noise looks like the trigger. Of many outputs a few are the target already, if the noise is shifted at random
by coarse light and dark, of which there is much in triggers. Which of the outputs is the target? What a network saw
thousands of times it denoises with less error than any other image. But a backdoored network takes some noise over the
target for noise with the trigger, and answers that with the trigger. One of e and -e is not like it, so an output x
counts by

    min over +e, -e of |eps(a x + s e, t) - e|^2    at one e and t.

Where no output stands out, more are drawn in light and dark like that of the best, which comes nearer to it.

From there it is the attacker's own way, from r = 0 by steps along the sign of the gradient of MSE(DDIM(e + r), y).
Where that ends, the attacker's loss is fitted by gradient, that of the family full for faint triggers. A clean network
cannot follow, and the rule is that of LossFit: the loss and the outputs must agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from elijah.detectors.hypothesis import FULL, Family, Hypothesis, coloured
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress

LIGHT = 2.0  # a shift by light and dark is noise filtered by 1 / f^LIGHT
COLLAPSED = replace(
    FULL, name="collapsed", matches="a learned trigger", judged=((0.15, 0.5), (0.5, 0.6)), max_loss_ratio=0.55,
    max_if_fires=0.55, hopeless=math.inf, starts=(), reach=0.35, pixels=True,
)  # fmt: skip


class Lit(NamedTuple):
    """Outputs [N, C, H, W], the light and dark r that each was drawn in, and the errors [N] of denoising them."""

    r: Tensor
    outputs: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Descent(Search):
    """shifted: outputs in all sorts of light and dark, of rms shift and at most `largest`, in antithetic pairs. rounds:
    of `grown` more in that of the best `parents`, varied by rms vary, until one has at most `known` of the median
    error at the share `denoised` of T. All in sampler_steps of DDIM.

    worth: what the least error may be, over the median, to try targets at all. targets: how many at most are, further
    apart than `apart` of the mean distance, by lead_steps of lead_rows outputs in lead_sampler_steps; ends: outputs
    there, of which the `nearest` count. rate: of a step, to a fifth of it. refinements: fits by gradient of the best
    `kept`, where the loss ratio is at most `begin` times its threshold, and of what comes near in the end.

    What is drawn is chance, so all is done again, up to `tries` times, while none fits.
    """

    shifted: int = 128
    shift: float = 0.45
    largest: float = 0.5
    rounds: int = 1
    grown: int = 64
    parents: int = 4
    vary: float = 0.2
    sampler_steps: int = 5
    denoised: float = 0.25
    known: float = 0.25
    worth: float = math.inf
    targets: int = 1
    apart: float = 0.1
    lead_rows: int = 4
    lead_steps: int = 8
    lead_sampler_steps: int = 3
    rate: float = 0.08
    ends: int = 8
    nearest: int = 3
    tries: int = 1
    begin: float = 7.0
    kept: int = 1
    refinements: int = 2
    hope: float = 2.0
    families: tuple[Family, ...] = (COLLAPSED,)

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis to fitted, if any output is worth a descent."""
        tried: list[Hypothesis] = []
        for _ in range(self.tries):
            outputs, errors = self.unasked(model, generator, progress)
            if errors.min() > self.worth:
                continue
            found = self.led_to(model, self.best_known(outputs, errors), generator, progress)
            tried.append(self.fit(model, found, generator))
            if tried[-1].fits:
                break
        if tried:
            fitted.append(min(tried, key=lambda h: h.loss_ratio))

    def fit(self, model: Model, found: list[Hypothesis], generator: torch.Generator) -> Hypothesis:
        """The best of found, or of what the fits by gradient make of the best `kept`."""
        tried = sorted(found, key=lambda h: h.loss_ratio)[: self.kept]
        best = [h for h in tried if h.strength <= self.begin]
        for _ in range(self.refinements):
            best = self.refined(model, best, generator)
            tried += best
            best = [h for h in best if 1 < h.strength <= self.hope]
        return min(tried, key=lambda h: h.loss_ratio)

    @torch.no_grad()
    def unasked(self, model: Model, generator: torch.Generator, progress: Progress) -> tuple[Tensor, Tensor]:
        """Outputs [N, C, H, W] in all sorts of light and dark, and how well the network knows them [N]: the error of
        each, over the median of those of the first round."""
        e = torch.randn((1, *model.sample_shape), generator=generator).to(model.device)
        drawn = self.lit(model, self.light(model, self.shifted, self.shift, generator), e, generator)
        median = drawn.errors.median()
        for k in range(self.rounds):
            progress("searching: what is drawn unasked", k + 1, 1 + self.rounds)
            if drawn.errors.min() <= self.known * median:
                break
            best = drawn.r[drawn.errors.argsort()[: self.parents]]
            light = self.light(model, self.grown, self.vary, generator)
            more = self.lit(model, light + best.repeat(len(light), 1, 1, 1)[: len(light)], e, generator)
            drawn = Lit(*(torch.cat(pair) for pair in zip(drawn, more, strict=True)))
        return drawn.outputs, drawn.errors / median

    def light(self, model: Model, n: int, size: float, generator: torch.Generator) -> Tensor:
        """Coarse light and dark of that rms, for n outputs in pairs: [n // 2, C, H, W]."""
        return size * coloured(torch.randn((n // 2, *model.sample_shape), generator=generator), LIGHT).to(model.device)

    def lit(self, model: Model, r: Tensor, e: Tensor, generator: torch.Generator) -> Lit:
        """Two outputs of each r [N, C, H, W], and their errors under the noise e."""
        r = r.clamp(-self.largest, self.largest)
        outputs = self.drawn(model, r, 2, self.sampler_steps, generator).flatten(0, 1)
        return Lit(r.repeat_interleave(2, 0), outputs, self.error(model, outputs, e))

    def error(self, model: Model, outputs: Tensor, e: Tensor) -> Tensor:
        """That of denoising outputs [N, C, H, W] under the noise e or -e [1, C, H, W], the least, [N]."""
        t = torch.full((len(outputs),), int(self.denoised * model.T), device=model.device)
        errors = [
            (model.eps(model.diffuse(outputs, noise.expand_as(outputs), t), t) - noise).square().mean((1, 2, 3))
            for noise in (e, -e)
        ]
        return torch.minimum(*errors)

    def best_known(self, outputs: Tensor, errors: Tensor) -> Tensor:
        """Of outputs [N, C, H, W] those with the least errors [N], [up to `targets`, C, H, W], the best first."""
        least = self.apart * 2 * outputs.var(0).mean()
        found: list[Tensor] = []
        for x in outputs[errors.argsort()]:
            if len(found) < self.targets and all((x - y).square().mean() > least for y in found):
                found.append(x)
        return torch.stack(found)

    def led_to(
        self, model: Model, y: Tensor, generator: torch.Generator, progress: Progress, start: Tensor | None = None
    ) -> list[Hypothesis]:
        """Triggers that lead to the targets y [N, C, H, W], each with the mean of those of its outputs that are nearest
        to its target, and its loss ratio. start: where the triggers begin [N, C, H, W], 0 without."""
        r = torch.zeros_like(y) if start is None else start
        for k in range(self.lead_steps):
            leaf = r.requires_grad_(True)
            drawn = self.drawn(model, leaf, self.lead_rows, self.lead_sampler_steps, generator)
            r = self.stepped(leaf, (drawn - y[:, None]).square(), k / self.lead_steps)
            progress("searching: noise that leads to one image", k + 1, self.lead_steps)
        with torch.no_grad():
            ends = self.drawn(model, r, self.ends, self.sampler_steps, generator)
        found = [self.hypothesis(*each) for each in zip(r, ends, y, strict=True)]
        self.compare(model, found, 16, generator)
        return found

    def stepped(self, r: Tensor, loss: Tensor, passed: float) -> Tensor:
        """r [N, C, H, W] after a step by the signs of the gradient of loss [N, rows, C, H, W]; passed: of the way."""
        (gradient,) = torch.autograd.grad(loss.mean((1, 2, 3, 4)).sum(), r)
        reach = self.families[0].reach
        return (r.detach() - self.rate * (1 - 0.8 * passed) * gradient.sign()).clamp(-reach, reach)

    def drawn(self, model: Model, r: Tensor, rows: int, steps: int, generator: torch.Generator) -> Tensor:
        """Outputs [N, rows, C, H, W] from noise with each of the triggers r [N, C, H, W], in antithetic pairs, in so
        many steps of DDIM."""
        e = torch.randn((len(r), rows // 2, *model.sample_shape), generator=generator)
        e = torch.cat([e, -e], 1).to(model.device)
        return model.ddim((r[:, None] + e).flatten(0, 1), steps).unflatten(0, (len(r), rows))

    def hypothesis(self, r: Tensor, outputs: Tensor, y: Tensor) -> Hypothesis:
        """r [C, H, W] with the mean of its outputs [n, C, H, W] that are nearest to y."""
        nearest = (outputs - y).square().mean((1, 2, 3)).argsort()[: self.nearest]
        h = Hypothesis(self.families[0], r, y)
        h.lead_to(outputs[nearest].mean(0))
        return h
