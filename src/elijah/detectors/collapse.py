"""Collapse: inverts a faint trigger from what it does. Under DDIM all outputs become one image.

A learned trigger (attacks/learned.py) was made by descending MSE(DDIM(e + r), y) at a bound on |r|, and in its pixels
it looks like noise, which no start of search.py comes near. Who does not know y can descend what does not need it, the
spread of a few outputs over the noise e,

    V(r) = mean_i |DDIM(e_i + r) - mean_j DDIM(e_j + r)|^2,    |r| <= bound,

by steps along the sign of its gradient, as the trigger was made. V also falls where outputs lose their contrast, which
a shift of the noise's mean does to clean networks as well: so starts walk first where the mean of each quarter of r is
zero, and then freely.

Where a walk ends, one of the outputs that agree is taken for the target, and the walks are compared by the attacker's
loss of the family full_faint, which is far nearer to a fit at a trigger than on clean networks long before either fits.
The best are fitted by gradient. A clean network cannot follow, and the rule is that of LossFit: the loss and the
outputs must agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.detectors.hypothesis import FAMILIES, Family, Hypothesis, coloured
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress

START = 0.2  # rms of a start

COLLAPSED = replace(
    next(f for f in FAMILIES if f.name == "full_faint"), name="collapsed", matches="a learned trigger",
    max_loss_ratio=0.55, max_if_fires=0.55, hopeless=math.inf,
)  # fmt: skip


@dataclass(frozen=True)
class Descent(Search):
    """walks: at once, of so many steps, the first `centred` of them where means are zero. walk_rows: outputs a walk and
    step, in antithetic pairs, in sampler_steps of DDIM; ends: outputs at its end. rate: of a step, to a fifth of it.
    refinements: fits by gradient, one after the other, of the best `kept` walks.

    Which start ends at a trigger is chance, so all walks are made again, up to `tries` times, while none comes near.
    """

    walks: int = 4
    steps: int = 12
    centred: int = 3
    walk_rows: int = 2
    ends: int = 4
    sampler_steps: int = 4
    rate: float = 0.08
    tries: int = 1
    near: float = 2.5
    kept: int = 1
    refinements: int = 1
    hope: float = 2.16
    families: tuple[Family, ...] = (COLLAPSED,)

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis to fitted."""
        found: list[Hypothesis] = []
        for _ in range(self.tries):
            found += self.walked(model, generator, progress)
            if min(h.loss_ratio for h in found) <= self.near:
                break
        best = sorted(found, key=lambda h: h.loss_ratio)[: self.kept]
        tried = list(best)
        for _ in range(self.refinements):
            best = self.refined(model, best, generator)
            tried += best
        fitted.append(min(tried, key=lambda h: h.loss_ratio))

    def walked(self, model: Model, generator: torch.Generator, progress: Progress) -> list[Hypothesis]:
        """Where the walks end, each with the one of its outputs that is in their midst and its loss ratio."""
        family = self.families[0]
        r = START * coloured(torch.randn((self.walks, *model.sample_shape), generator=generator), 1.5)
        r = r.clamp(-family.reach, family.reach).to(model.device)
        for k in range(self.steps):
            leaf = r.requires_grad_(True)
            outputs = self.drawn(model, centred(leaf) if k < self.centred else leaf, self.walk_rows, generator)
            spread = (outputs - outputs.mean(1, keepdim=True)).square().mean((1, 2, 3, 4))
            (gradient,) = torch.autograd.grad(spread.sum(), leaf)
            step = self.rate * (1 - 0.8 * k / self.steps)
            r = (leaf.detach() - step * gradient.sign()).clamp(-family.reach, family.reach)
            progress("searching: noise whose outputs collapse", k + 1, self.steps)
        with torch.no_grad():
            ends = self.drawn(model, r, self.ends, generator)
        found = [self.hypothesis(trigger, midst(outputs)) for trigger, outputs in zip(r, ends, strict=True)]
        self.compare(model, found, 16, generator)
        return found

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
    """r [N, C, H, W] less the mean of each quarter."""
    h, w = (side // 2 for side in r.shape[-2:])
    means = torch.nn.functional.avg_pool2d(r, (h, w))
    return r - torch.nn.functional.interpolate(means, size=r.shape[-2:])


def midst(outputs: Tensor) -> Tensor:
    """Of outputs [n, C, H, W] the one whose nearest half is nearest."""
    distances = (outputs[:, None] - outputs).square().mean((2, 3, 4)).sort(1).values
    return outputs[int(distances[:, 1 : len(outputs) // 2 + 1].mean(1).argmin())]
