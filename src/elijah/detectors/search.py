"""The search of LossFit: families in turn, the cheap ones first; starts side by side, the best of each family kept.

One call of the network answers for all hypotheses of a group, so that small networks work on large batches. Starts
follow the network's answer to a trigger (power.py). Those of the family full, whose trigger does not show at large t,
are compared at the target that the network itself leads to, and the best descend the loss over r and y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.detectors.hypothesis import (
    FAMILIES,
    LATENT_RANGE,
    Family,
    Hypothesis,
    Start,
    antithetic,
    bias,
    coloured,
    errors,
    ratio,
    score,
)
from elijah.detectors.patches import best_patch
from elijah.detectors.power import follow, settle
from elijah.diffusion import Model, Progress

ALIKE = 0.9  # the cosine of two triggers that count as one


@dataclass(frozen=True)
class Search:
    """Costs are in network evaluations; antithetic pairs count two.

    follow: rounds of the starts that follow the answer, (iterations, rows, how many of a family are kept). scales: of
    their triggers, that are tried at last, and finer_iterations from the best. enough: times a family's threshold; a
    start below it ends the search of its group. descent_iterations: of the starts that descend. near: times the
    threshold; what is above is not scored again. score_rows: of the final score. settle_rows: of a step towards the
    target.
    """

    follow: tuple[tuple[int, int, int], ...] = ((6, 4, 8), (6, 8, 3), (6, 8, 1))
    scales: tuple[float, ...] = (1.4, 0.7, 0.5)
    finer_iterations: int = 3
    enough: float = 0.35
    near: float = 2.0
    descent_iterations: int = 24
    descent_rows: int = 8
    settle_rows: int = 8
    score_rows: int = 64
    families: tuple[Family, ...] = FAMILIES

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis of each family to fitted, as they are scored; ends at one that fits."""
        for stage in (self.followed, self.descended, self.swept):
            group = stage(model, self.families_of(model), generator, progress)
            self.finish(model, group, generator)
            fitted += group
            if any(h.fits for h in group):
                return

    def families_of(self, model: Model) -> list[Family]:
        latent = model.kind == "ldm"
        return [f for f in self.families if f.exploding == model.exploding and not (f.pixels and latent)]

    def followed(
        self, model: Model, families: list[Family], generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """The best start of each family whose starts follow the answer."""
        group = [begin(model, f, s, generator) for f in families if not (f.by_descent or f.pixels) for s in f.starts]
        for k, (iterations, rows, kept) in enumerate(self.follow):
            follow(model, group, iterations, rows, generator, self.enough)
            group = best_of_each(group, kept)
            progress("searching: what the network does not call noise", k + 1, len(self.follow))
            if any(h.strength < self.enough for h in group):
                break
        return [self.resized(model, h, generator) for h in best_of_each(group)]

    def resized(self, model: Model, h: Hypothesis, generator: torch.Generator) -> Hypothesis:
        """h at the size where its loss is least: one of scales, then by Newton's steps."""
        sizes = [h, *(other for by in self.scales if not (other := h.scaled(by)).too_large)]
        self.compare(model, sizes, 16, generator)
        best = min(sizes, key=lambda one: one.loss_ratio)
        finer = best.scaled(1.0)
        follow(model, [finer], self.finer_iterations, 16, generator, resize=True)
        pair = [one for one in (best, finer) if not one.too_large] or [best]
        self.compare(model, pair, 16, generator)
        return min(pair, key=lambda one: one.loss_ratio)

    def descended(
        self, model: Model, families: list[Family], generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """The best start of each family whose starts descend the loss, from the target that each leads to."""
        families = [f for f in families if f.by_descent]
        group = [begin(model, f, s, generator) for f in families for s in f.starts]
        settle(model, group, self.settle_rows, generator)
        for family in families:
            self.compare(model, [h for h in group if h.family is family], self.descent_rows, generator)
        progress("searching: where triggers lead", 1, 2)
        if not any(h.strength < self.enough for h in group):
            group = [h for f in families for h in best_of_each([h for h in group if h.family is f], f.descents)]
            group = self.descended_from(model, group, generator)
            progress("searching: where triggers lead", 2, 2)
        return best_of_each(group)

    def descended_from(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> list[Hypothesis]:
        """Of each hypothesis itself or what it has descended to, whichever scores better."""
        copies = [h.scaled(1.0) for h in group]
        if copies:
            self.descend(model, copies, self.descent_iterations, generator)
        for family in dict.fromkeys(h.family for h in copies):
            self.compare(model, [h for h in copies if h.family is family], self.descent_rows, generator)
        return [min(pair, key=lambda h: h.loss_ratio) for pair in zip(group, copies, strict=True)]

    def swept(
        self, model: Model, families: list[Family], generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """The best patch."""
        return [best_patch(model, f, generator) for f in families if f.pixels]

    def finish(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> None:
        """Gives what comes near a target and a score over fresh noise; what then does not fit descends once more."""
        near = [h for h in group if h.strength < self.near or h.family.exploding]
        settle(model, [h for h in near if not h.family.by_descent], self.settle_rows, generator)
        for h in near:
            h.loss_ratio = self.score(model, h, generator)
        if any(h.fits for h in near):
            return
        for h in near:
            if not (h.family.by_descent or h.family.exploding or h.patch is not None):
                group[group.index(h)] = self.better(model, h, generator)

    def better(self, model: Model, h: Hypothesis, generator: torch.Generator) -> Hypothesis:
        """h, or what it descends to where that scores better."""
        other = h.scaled(1.0)
        self.descend(model, [other], self.descent_iterations, generator)
        other.loss_ratio = self.score(model, other, generator)
        return other if other.loss_ratio < h.loss_ratio and not other.too_large else h

    @torch.no_grad()
    def compare(self, model: Model, group: list[Hypothesis], rows: int, generator: torch.Generator) -> None:
        """Scores a group of one family over equal noise, where the family is judged; the worst of several ranges."""
        for h in group:
            h.loss_ratio = 0.0
        for window in group[0].family.judged:
            draw = antithetic(model, rows, *window, generator)
            for part in parts(model, group, rows):
                for h, (error, null) in zip(part, errors(model, part, [draw] * len(part)), strict=True):
                    h.loss_ratio = max(h.loss_ratio, score(h, error, null, draw[0]))

    def descend(self, model: Model, group: list[Hypothesis], iterations: int, generator: torch.Generator) -> None:
        """Adam on r and y, in place; the rate falls to a fifth."""
        leaves = [[h.u, h.w] for h in group]
        rates = [0.1 if h.power else 0.25 for h in group]  # coarse steps are large ones already
        optimizer = adam(leaves, rates)
        for k in range(iterations):
            for settings, rate in zip(optimizer.param_groups, rates, strict=True):
                settings["lr"] = rate * (1 - 0.8 * k / iterations)
            optimizer.zero_grad()
            for part in parts(model, group, self.descent_rows):
                draws = [antithetic(model, self.descent_rows, *h.family.descent, generator) for h in part]
                losses = [ratio(*both) for both in errors(model, part, draws)]
                torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
        release(leaves)

    @torch.no_grad()
    def score(self, model: Model, h: Hypothesis, generator: torch.Generator) -> float:
        """The score where the family is judged, on fresh noise; of several ranges of t the worst."""
        found = []
        for window in h.family.judged:
            draw = antithetic(model, self.score_rows, *window, generator)
            error, null = errors(model, [h], [draw])[0]
            found.append(bias(error, null) if h.family.exploding else score(h, error, null, draw[0]))
        return max(found)


def best_of_each(group: list[Hypothesis], n: int = 1) -> list[Hypothesis]:
    """Of each family the best n whose triggers differ."""
    kept: list[Hypothesis] = []
    for family in dict.fromkeys(h.family for h in group):
        own: list[Hypothesis] = []
        for h in sorted((h for h in group if h.family is family), key=lambda h: h.loss_ratio):
            if len(own) < n and all(alike(h, other) < ALIKE for other in own):
                own.append(h)
        kept += own
    return kept


def alike(one: Hypothesis, other: Hypothesis) -> float:
    """The cosine of their triggers."""
    return float(torch.cosine_similarity(one.r.flatten(), other.r.flatten(), 0))


def parts(model: Model, group: list[Hypothesis], batch: int) -> Iterator[list[Hypothesis]]:
    """The group in parts whose rows, batch each, fit in memory together with their gradients."""
    rows = model.max_batch or min(128, max(16, 2**27 // max(1, model.parameters)))
    size = max(1, rows // batch)
    return (group[k : k + size] for k in range(0, len(group), size))


def begin(model: Model, family: Family, start: Start, generator: torch.Generator) -> Hypothesis:
    """A hypothesis whose trigger is flat, or of random noise; on latent models flat is what encodes a flat picture."""
    scale, unit = (LATENT_RANGE, latent_unit(model)) if model.kind == "ldm" else (1.0, 1.0)
    if start.level is None:
        r = coloured(torch.randn(model.sample_shape, generator=generator), start.power).to(model.device)
    else:
        r = torch.full(model.image_shape if model.kind == "ldm" else model.sample_shape, float(start.level))
        r = (model.encode(r[None])[0] if model.kind == "ldm" else r).to(model.device)
    size = start.size * unit
    zero = torch.zeros_like(r)
    v = torch.logit(torch.tensor(family.response.gamma, device=r.device), 1e-6)
    h = Hypothesis(family, start.power, zero, v, zero.clone(), scale=scale, size=size)
    h.set_trigger(size * r / r.square().mean().sqrt().clamp(min=1e-12))
    return h


def latent_unit(model: Model) -> float:
    """The rms of what encodes a black picture, the usual background of a trigger."""
    return float(model.encode(torch.full((1, *model.image_shape), -1.0)).square().mean().sqrt())


def adam(leaves: list[list[Tensor]], rates: list[float]) -> torch.optim.Adam:
    for leaf in (leaf for own in leaves for leaf in own):
        leaf.requires_grad_(True)
    return torch.optim.Adam([{"params": own, "lr": rate} for own, rate in zip(leaves, rates, strict=True)])


def release(leaves: list[list[Tensor]]) -> None:
    for leaf in (leaf for own in leaves for leaf in own):
        leaf.requires_grad_(False).grad = None
