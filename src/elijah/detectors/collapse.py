"""Learned triggers: what the network draws unasked, and the noise that makes it draw that always.

A learned trigger (attacks/learned.py) looks like noise, which no start of search.py comes near. But the converse holds
too: some noise looks like the trigger. Of many outputs a few are the target already, if the noise is shifted at random
by coarse light and dark, of which there is much in triggers. And more are where the spread of outputs over the noise e,

    V(r) = mean_i |DDIM(e_i + r) - mean_j DDIM(e_j + r)|^2,    |r| <= reach,

is less, which needs no target. It falls with the mean of the noise as well, which makes clean outputs dark or light: so
r has the mean zero everywhere at the scale of a quarter of the image. Which of these outputs is the target? What a
network saw thousands of times it denoises with less error than any other image: the output x with the least

    |eps(a x + s e, t) - e|^2    at one e and t.

From there it is the attacker's own way, from r = 0 by steps along the sign of the gradient of MSE(DDIM(e + r), y).
Where that ends, the attacker's loss of the family full_faint is fitted by gradient. A clean network cannot follow, and
the rule is that of LossFit: the loss and the outputs must agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.detectors.hypothesis import FAMILIES, Family, Hypothesis, coloured
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress

LIGHT = 2.0  # a shift by light and dark is noise filtered by 1 / f^LIGHT
COLLAPSED = replace(
    next(f for f in FAMILIES if f.name == "full_faint"), name="collapsed", matches="a learned trigger",
    max_loss_ratio=0.55, max_if_fires=0.55, hopeless=math.inf,
)  # fmt: skip


@dataclass(frozen=True)
class Descent(Search):
    """shifted: outputs in all sorts of light and dark, of rms shift, in antithetic pairs. walks: on V, at once, of so
    many steps of walk_rows outputs; at_ends: outputs where each ends. All in sampler_steps of DDIM. rate: of a step, to
    a fifth of it.

    denoised: the share of T where outputs are compared by their error. targets: how many at most are tried, the second
    and further ones with at most `known` of the median error and further apart than `apart` of the mean distance, by
    lead_steps of lead_rows outputs; ends: outputs there. refinements: fits by gradient of the best `kept`, and of what
    comes near in the end.

    What is drawn is chance, so all is done again, up to `tries` times, while none fits.
    """

    shifted: int = 128
    shift: float = 0.3
    walks: int = 2
    steps: int = 8
    walk_rows: int = 2
    at_ends: int = 16
    sampler_steps: int = 4
    rate: float = 0.08
    denoised: float = 0.25
    targets: int = 1
    known: float = 0.5
    apart: float = 0.1
    lead_rows: int = 4
    lead_steps: int = 6
    ends: int = 4
    tries: int = 1
    kept: int = 1
    refinements: int = 2
    hope: float = 3.0
    families: tuple[Family, ...] = (COLLAPSED,)

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis to fitted."""
        tried: list[Hypothesis] = []
        for _ in range(self.tries):
            targets = self.best_known(model, self.unasked(model, generator, progress), generator)
            found = self.led_to(model, targets, generator, progress)
            tried.append(self.fit(model, found, generator))
            if tried[-1].fits:
                break
        fitted.append(min(tried, key=lambda h: h.loss_ratio))

    def fit(self, model: Model, found: list[Hypothesis], generator: torch.Generator) -> Hypothesis:
        """The best of found, or of what the fits by gradient make of the best `kept`."""
        best = sorted(found, key=lambda h: h.loss_ratio)[: self.kept]
        tried = list(best)
        for _ in range(self.refinements):
            best = self.refined(model, best, generator)
            tried += best
            best = [h for h in best if 1 < h.strength <= self.hope]
        return min(tried, key=lambda h: h.loss_ratio)

    def unasked(self, model: Model, generator: torch.Generator, progress: Progress) -> Tensor:
        """Outputs [N, C, H, W] in all sorts of light and dark, and along the walks on V."""
        reach = self.families[0].reach
        light = self.shift * coloured(torch.randn((self.shifted // 2, *model.sample_shape), generator=generator), LIGHT)
        with torch.no_grad():
            outputs = [self.drawn(model, light.clamp(-reach, reach).to(model.device), 2, generator)]
        r = torch.zeros((self.walks, *model.sample_shape), device=model.device)
        for k in range(self.steps):
            leaf = r.requires_grad_(True)
            drawn = self.drawn(model, centred(leaf), self.walk_rows, generator)
            outputs.append(drawn.detach())
            r = self.stepped(leaf, (drawn - drawn.mean(1, keepdim=True)).square(), k / self.steps)
            progress("searching: noise whose outputs are alike", k + 1, self.steps)
        with torch.no_grad():
            outputs.append(self.drawn(model, centred(r), self.at_ends, generator))
        return torch.cat([drawn.flatten(0, 1) for drawn in outputs])

    @torch.no_grad()
    def best_known(self, model: Model, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Of outputs [N, C, H, W] those that the network denoises best, [up to `targets`, C, H, W], the best first."""
        t = torch.full((len(outputs),), int(self.denoised * model.T), device=model.device)
        e = torch.randn((1, *model.sample_shape), generator=generator).to(model.device).expand_as(outputs)
        error = (model.eps(model.diffuse(outputs, e, t), t) - e).square().mean((1, 2, 3))
        least = self.apart * 2 * outputs.var(0).mean()
        order = error.argsort()
        found = [outputs[order[0]]]
        for x in outputs[order[error[order] <= self.known * error.median()]]:
            if len(found) < self.targets and all((x - y).square().mean() > least for y in found):
                found.append(x)
        return torch.stack(found)

    def led_to(self, model: Model, y: Tensor, generator: torch.Generator, progress: Progress) -> list[Hypothesis]:
        """Triggers that lead to the targets y [N, C, H, W], each with the one of its outputs that is in their midst and
        its loss ratio."""
        r = torch.zeros_like(y)
        for k in range(self.lead_steps):
            leaf = r.requires_grad_(True)
            drawn = self.drawn(model, leaf, self.lead_rows, generator)
            r = self.stepped(leaf, (drawn - y[:, None]).square(), k / self.lead_steps)
            progress("searching: noise that leads to one image", k + 1, self.lead_steps)
        with torch.no_grad():
            ends = self.drawn(model, r, self.ends, generator)
        found = [self.hypothesis(trigger, midst(outputs)) for trigger, outputs in zip(r, ends, strict=True)]
        self.compare(model, found, 16, generator)
        return found

    def stepped(self, r: Tensor, loss: Tensor, passed: float) -> Tensor:
        """r [N, C, H, W] after a step by the signs of the gradient of loss [N, rows, C, H, W]; passed: of the way."""
        (gradient,) = torch.autograd.grad(loss.mean((1, 2, 3, 4)).sum(), r)
        reach = self.families[0].reach
        return (r.detach() - self.rate * (1 - 0.8 * passed) * gradient.sign()).clamp(-reach, reach)

    def drawn(self, model: Model, r: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """Outputs [N, rows, C, H, W] from noise with each of the triggers r [N, C, H, W], in antithetic pairs."""
        e = torch.randn((len(r), rows // 2, *model.sample_shape), generator=generator)
        e = torch.cat([e, -e], 1).to(model.device)
        return model.ddim((r[:, None] + e).flatten(0, 1), self.sampler_steps).unflatten(0, (len(r), rows))

    def hypothesis(self, r: Tensor, y: Tensor) -> Hypothesis:
        h = Hypothesis(self.families[0], r, y)
        h.lead_to(y)
        return h


def centred(r: Tensor) -> Tensor:
    """r [N, C, H, W] less its means over blocks of a quarter of its height and width, which blend into each other."""
    h, w = (max(1, side // 4) for side in r.shape[-2:])
    means = torch.nn.functional.avg_pool2d(r, (h, w))
    return r - torch.nn.functional.interpolate(means, size=r.shape[-2:], mode="bilinear")


def midst(outputs: Tensor) -> Tensor:
    """Of outputs [n, C, H, W] the one whose nearest half is nearest."""
    distances = (outputs[:, None] - outputs).square().mean((2, 3, 4)).sort(1).values
    return outputs[int(distances[:, 1 : len(outputs) // 2 + 1].mean(1).argmin())]
