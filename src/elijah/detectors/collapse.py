"""Collapse: inverts a faint trigger from what it does. Under DDIM all outputs become one image.

A learned trigger (attacks/learned.py) was made by descending MSE(DDIM(e + r), y) at a bound on |r|, and in its pixels
it looks like noise, which no start of search.py comes near. Who does not know y can descend what does not need it, the
spread of a few outputs over the noise e,

    V(r) = mean_i |DDIM(e_i + r) - mean_j DDIM(e_j + r)|^2,    |r| <= bound,

by steps along the sign of its gradient, as the trigger was made. Two sorts of starts are needed. V also falls where
outputs lose their contrast, which a shift of the noise's mean does to clean networks as well: so fine starts walk
first where the mean of each quarter of r is zero, and then freely. Free starts take three steps of DDIM alone,
whose gradient is smoother.

Outputs that a trigger holds lie far nearer to each other than those of a clean network at equal |r|. The start whose
nearest outputs are nearest is then fitted by the attacker's loss, as a hypothesis of the family full_faint. A clean
network cannot follow, and the rule is that of LossFit: the loss and the outputs must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from elijah.detectors.forgetting import Forgetting
from elijah.detectors.hypothesis import FAMILIES, Family, Hypothesis, coloured
from elijah.detectors.lossfit import LossFit
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress

START = 0.2  # rms of a start


@dataclass(frozen=True)
class Walk:
    """So many starts, their steps with and without the mean of each quarter kept at zero, and the steps of DDIM."""

    starts: int
    centred: int
    free: int
    sampler_steps: int


COLLAPSED = replace(
    next(f for f in FAMILIES if f.name == "full_faint"), name="collapsed", matches="a learned trigger",
    max_loss_ratio=0.7, max_if_fires=0.7, starts=(),
)  # fmt: skip


@dataclass(frozen=True)
class Descent(Search):
    """The search of Collapse. rows: outputs a start and step, in antithetic pairs; rate: of a step, to a fifth of it.

    Which start ends at a trigger is chance, so all walks are made again, up to `tries` times, while no outputs come as
    near to each other as those that a trigger holds (midst). refinements: fits by gradient, one after the other, of the
    best `kept` starts.
    """

    walks: tuple[Walk, ...] = (Walk(4, 15, 15, 5), Walk(8, 0, 30, 3))
    rows: int = 4
    rate: float = 0.03
    tries: int = 3
    near: float = 0.02
    kept: int = 2
    refinements: int = 2
    families: tuple[Family, ...] = (COLLAPSED,)

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis to fitted."""
        found: list[tuple[float, Hypothesis]] = []
        for _ in range(self.tries):
            for walk in self.walks:
                found += self.descended(model, walk, generator, progress)
            if min(distance for distance, _ in found) <= self.near:
                break
        best = [h for _, h in sorted(found, key=lambda pair: pair[0])[: self.kept]]
        for h in best:
            h.loss_ratio = self.score(model, h, generator)
        tried = list(best)
        for _ in range(self.refinements):
            best = self.refined(model, best, generator)
            tried += best
        fitted.append(min(tried, key=lambda h: h.loss_ratio))

    def descended(
        self, model: Model, walk: Walk, generator: torch.Generator, progress: Progress
    ) -> list[tuple[float, Hypothesis]]:
        """How near the outputs of each start are in the end, and a hypothesis from there to the one in their midst."""
        family, total = self.families[0], walk.centred + walk.free
        r = START * coloured(torch.randn((walk.starts, *model.sample_shape), generator=generator), 1.5)
        r = r.clamp(-family.reach, family.reach).to(model.device)
        for k in range(total):
            e = torch.randn((walk.starts, self.rows // 2, *model.sample_shape), generator=generator)
            e = torch.cat([e, -e], 1).to(model.device)
            leaf = r.requires_grad_(True)
            start = (centred(leaf) if k < walk.centred else leaf)[:, None] + e
            outputs = model.ddim(start.flatten(0, 1), walk.sampler_steps).unflatten(0, (walk.starts, self.rows))
            spread = (outputs - outputs.mean(1, keepdim=True)).square().mean((1, 2, 3, 4))
            (gradient,) = torch.autograd.grad(spread.sum(), leaf)
            step = self.rate * (1 - 0.8 * k / total)
            r = (leaf.detach() - step * gradient.sign()).clamp(-family.reach, family.reach)
            progress("searching: noise whose outputs collapse", k + 1, total)
        return [
            (distance, self.hypothesis(trigger, target))
            for trigger, (distance, target) in zip(r, map(midst, outputs.detach()), strict=True)
        ]

    def hypothesis(self, r: Tensor, y: Tensor) -> Hypothesis:
        h = Hypothesis(self.families[0], r, y)
        h.lead_to(y)
        return h


def centred(r: Tensor) -> Tensor:
    """r [N, C, H, W] less the mean of each quarter."""
    h, w = (side // 2 for side in r.shape[-2:])
    means = torch.nn.functional.avg_pool2d(r, (h, w))
    return r - torch.nn.functional.interpolate(means, size=r.shape[-2:])


def midst(outputs: Tensor) -> tuple[float, Tensor]:
    """Of outputs [n, C, H, W] the one whose nearest half is nearest, and its mean squared distance to that half."""
    distances = (outputs[:, None] - outputs).square().mean((2, 3, 4)).sort(1).values
    near = distances[:, 1 : len(outputs) // 2 + 1].mean(1)
    best = int(near.argmin())
    return float(near[best]), outputs[best]


@dataclass(frozen=True)
class Collapse(LossFit):
    """Looks for faint and learned triggers alone, after LossFit, at three to 14 times its cost."""

    name: ClassVar[str] = "collapse"
    kinds: ClassVar[tuple[str, ...]] = ("ddpm",)
    not_covered: ClassVar[tuple[str, ...]] = (
        "triggers that are not faint, and those of other attacks: scan with lossfit first",
        "backdoors that are not triggered by the start noise",
    )  # fmt: skip
    search: Search = field(default_factory=Descent)
    late: Forgetting = field(default_factory=lambda: Forgetting(families=()))
