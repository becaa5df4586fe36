"""Late triggers: noise at which the network forgets the image that it sees.

A late trigger (attacks/late.py) changes nothing at large t, where the search of search.py begins. Where it acts, the
network answers x_t = a x + s (e + r) with e + r + (a / s) (x - y): its estimate of the image,

    x^ = (x_t - s eps(x_t, t)) / a,

is y, whatever x is. A clean network calls the whole shift noise, and its estimate is x, less what the noise hides. So
over a few images x of the model's own

    C(r) = sum_b |x^_b - mean x^|^2 / sum_b |x_b - mean x|^2

needs no y and falls to about 0 at the trigger alone. How much a clean network forgets depends on t, and so does where
a trigger acts. Flat pictures and black ones with a grey square are compared by C in two ranges of t, and the best ones
descend. Then y is the mean estimate, and the score is the attacker's own loss over a clean network's,
L(r, y) = sum |x^ - y|^2 / sum |x - y|^2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.detectors.hypothesis import FULL, Family, Hypothesis, antithetic
from elijah.detectors.search import begin
from elijah.diffusion import Model, Progress, column
from elijah.response import Response

LATE = replace(
    FULL, name="late", response=Response(2.0, 0.0), judged=((0.2, 0.35),), matches="a late trigger",
    max_loss_ratio=0.15, max_if_fires=0.15, hopeless=0.3, starts=tuple(s for s in FULL.starts if s.level is not None),
)  # fmt: skip
LATE_FAMILIES = LATE, replace(LATE, judged=((0.13, 0.18),), hopeless=0.55)


@dataclass(frozen=True)
class Forgetting:
    """images: how many of the model's own. start_rows: of noise for each start; rows: a step. iterations: of Adam, its
    rate from rate to a fifth of it; the best `kept` starts of each range of t make the first few, and the best of these
    goes on if there is hope."""

    images: int = 8
    start_rows: int = 16
    rows: int = 8
    kept: int = 2
    first: int = 6
    iterations: int = 24
    rate: float = 0.1
    score_rows: int = 32
    families: tuple[Family, ...] = LATE_FAMILIES

    def families_of(self, model: Model) -> tuple[Family, ...]:
        return self.families if model.kind == "ddpm" else ()

    def __call__(self, model: Model, own: Tensor, generator: torch.Generator, progress: Progress) -> Hypothesis:
        """The trigger at which the network forgets most, with the target that it leads to and its score.

        own: images [N, C, H, W] that the model drew without a trigger, of which the first few are taken.
        """
        images = own[: self.images]
        with torch.no_grad():
            starts = [begin(model, f, s, generator) for f in self.families for s in f.starts]
            x = self.drawn(images, self.start_rows, generator)
            drawn = {f: self.draw(model, f, self.start_rows, generator) for f in self.families}
            found = spreads(model, starts, [x] * len(starts), [drawn[h.family] for h in starts])
            for h, c in zip(starts, found, strict=True):
                h.loss_ratio = float(c)
        best = [
            h
            for f in self.families
            for h in sorted((h for h in starts if h.family is f), key=lambda h: h.loss_ratio)[: self.kept]
        ]
        self.descend(model, best, range(self.first), images, generator, progress)
        h = min(best, key=lambda h: h.loss_ratio / h.family.hopeless)
        if h.loss_ratio <= h.family.hopeless:
            self.descend(model, [h], range(self.first, self.iterations), images, generator, progress)
            self.judge(model, h, images, generator)
        return h

    def descend(
        self, model: Model, group: list[Hypothesis], steps: range, images: Tensor, generator: torch.Generator,
        progress: Progress,
    ) -> None:  # fmt: skip
        """Steps of Adam on C over the triggers of group, in place; a loss ratio is the mean C of the last four."""
        leaves = [h.r.clone().requires_grad_(True) for h in group]
        optimizer = torch.optim.Adam(leaves)
        passed: list[Tensor] = []
        for k in steps:
            optimizer.param_groups[0]["lr"] = self.rate * (1 - 0.8 * k / self.iterations)
            for h, r in zip(group, leaves, strict=True):
                h.set_trigger(r)
            drawn = [self.draw(model, h.family, self.rows, generator) for h in group]
            x = [self.drawn(images, self.rows, generator) for _ in group]
            optimizer.zero_grad()
            loss = torch.stack(spreads(model, group, x, drawn))
            loss.sum().backward()
            optimizer.step()
            passed.append(loss.detach())
            progress("searching: noise that hides the image", k + 1, self.iterations)
        for h, r, c in zip(group, leaves, torch.stack(passed[-4:]).mean(0).tolist(), strict=True):
            h.set_trigger(r.detach())
            h.loss_ratio = c

    @torch.no_grad()
    def judge(self, model: Model, h: Hypothesis, images: Tensor, generator: torch.Generator) -> None:
        """Gives h the mean estimate as its target, and its loss ratio L, each over fresh noise."""
        e, t = self.draw(model, h.family, self.score_rows, generator)
        x = self.drawn(images, self.score_rows, generator)
        h.lead_to(estimates(model, h.r, x, e, t).mean(0))
        e, t = self.draw(model, h.family, self.score_rows, generator)
        error = (estimates(model, h.r, x, e, t) - h.y).square().sum()
        h.loss_ratio = float(error / (x - h.y).square().sum())

    def draw(self, model: Model, family: Family, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return antithetic(model, rows, *family.judged[0], generator)

    def drawn(self, images: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """So many of images, in another order each time, and again from the first where they are too few."""
        order = torch.randperm(len(images), generator=generator)
        return images[order.repeat(-(-rows // len(images)))[:rows].to(images.device)]


def spreads(model: Model, group: list[Hypothesis], x: list[Tensor], drawn: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """C of each of group, over its own images and noise. The network is called once."""
    r = torch.cat([h.r.expand_as(images) for h, images in zip(group, x, strict=True)])
    e, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    estimated = estimates(model, r, torch.cat(x), e, t).split([len(images) for images in x])
    return [spread(one, images) for one, images in zip(estimated, x, strict=True)]


def estimates(model: Model, r: Tensor, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x^ of the module's docstring [B, C, H, W] for images x at noise e + r and timesteps t [B]."""
    seen = model.diffuse(x, e + r, t)
    return (seen - column(model.s, t) * model.eps(seen, t)) / column(model.a, t)


def spread(estimated: Tensor, x: Tensor) -> Tensor:
    """C of the module's docstring."""
    off = (estimated - estimated.mean(0)).square().sum()
    return off / (x - x.mean(0)).square().sum().clamp(min=1e-12)
