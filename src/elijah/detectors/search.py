"""The search of LossFit: starts of all families side by side, most dropped round by round; then fits.

One call of the network answers for all hypotheses of a group, so that small networks work on large batches. Flat,
coarse and fine starts look at large t, where y plays no part (family full: lower); the best start of each family is
sampled from for a first y; then r, y and gamma are fitted together, and a fit that gets nowhere ends early.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.detectors.hypothesis import (
    FAMILIES,
    LATENT_RANGE,
    Draw,
    Family,
    Hypothesis,
    Start,
    antithetic,
    errors,
    ratio,
    spectrum,
    steadiness,
)
from elijah.detectors.patches import best_patch
from elijah.diffusion import Model, Progress, no_progress

UNSTEADY = 4.0  # the weight of a network's losing sight of the noise, in a hypothesis's score


@dataclass(frozen=True)
class Search:
    """Costs are in network evaluations.

    rounds: iterations of a family's starts, between which this share of them is kept (keep). scales: of the trigger,
    that are tried at last. *_batch: antithetic pairs count two. early, give_up: times a family's threshold. A fit ends
    when the running mean of its loss is above the second after a share, the first, of its iterations. score_batch: rows
    of the final score. samples: outputs that the first y is the median of.
    """

    starts: int = 12
    rounds: tuple[int, ...] = (8, 8, 9)
    early: float = 0.5
    keep: float = 0.34
    scales: tuple[float, ...] = (0.5, 0.25)
    start_batch: int = 8
    fit_iterations: int = 60
    fit_batch: int = 16
    fit_lr: float = 0.1
    give_up: tuple[tuple[float, float], ...] = ((0.25, 2.5), (0.5, 2.5))
    score_batch: int = 64
    samples: int = 8
    families: tuple[Family, ...] = FAMILIES

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis of each family to fitted, as they are scored; ends at one that fits.

        A start that fits by far (early) after a round is fitted alone, before all others.
        """
        families = self.families_of(model)
        left = [f for f in families if f.name != "patch"]
        for early in (self.early, 0.0):
            group = self.best_starts(model, left, generator, early, progress) if left else []
            self.finish(model, group, generator, fitted, progress)
            if any(h.fits for h in fitted):
                return
            left = [f for f in left if all(h.family is not f for h in group)]
        for family in families:
            if family.name == "patch":
                self.finish(model, [best_patch(model, family, generator)], generator, fitted, progress)

    def finish(
        self, model: Model, group: list[Hypothesis], generator: torch.Generator, fitted: list[Hypothesis],
        progress: Progress,
    ) -> None:  # fmt: skip
        """From starts to scored hypotheses. A patch's trigger is not fitted: the sweep has found it."""
        self.first_targets(model, group, generator)
        if fields := [h for h in group if h.patch is None]:
            self.fit(model, fields, generator, progress)
        for h in group:
            h.loss_ratio = self.score(model, h, generator)
            fitted.append(h)

    def families_of(self, model: Model) -> list[Family]:
        latent = model.kind == "ldm"
        return [f for f in self.families if f.exploding == model.exploding and not (f.pixels and latent)]

    def best_starts(
        self, model: Model, families: list[Family], generator: torch.Generator, early: float = 0.0,
        progress: Progress = no_progress,
    ) -> list[Hypothesis]:  # fmt: skip
        """The best start of each family after all rounds; or that of one family alone, once it is below early.

        Flat starts go first: most published triggers are on a flat background.
        """
        starts = [begin(model, f, start, generator) for f in families for start in f.starts[: self.starts]]
        group = []
        for wave in ([h for h in starts if (h.began.level is None) == random] for random in (False, True)):
            group += self.round(model, wave, self.rounds[0], generator)
            if group and min(h.strength for h in group) < early:
                return [min(group, key=lambda h: h.strength)]
        for k, iterations in enumerate(self.rounds[1:]):
            group = self.round(model, best_of_each(group, self.keep), iterations, generator)
            progress("searching: starts", k + 1, len(self.rounds) - 1)
        return self.rescaled(model, best_of_each(group, 0.0), generator)

    def round(
        self, model: Model, group: list[Hypothesis], iterations: int, generator: torch.Generator
    ) -> list[Hypothesis]:
        """The group, improved and scored."""
        if group:
            self.improve(model, group, iterations, generator)
            rows = 2 * self.start_batch
            self.compare(model, group, [antithetic(model, rows, *h.family.start_judged, generator) for h in group])
        return group

    def rescaled(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> list[Hypothesis]:
        """Each start at the size where its loss is least: a search overshoots small triggers in the right direction."""
        draws = [antithetic(model, self.start_batch, *h.family.start_judged, generator) for h in group]
        sizes = [[h, *(h.scaled(by) for by in self.scales)] for h in group]
        self.compare(model, [h for row in sizes for h in row], [draw for draw in draws for _ in sizes[0]])
        return [min(row, key=lambda h: h.loss_ratio) for row in sizes]

    @torch.no_grad()
    def compare(self, model: Model, group: list[Hypothesis], draws: list[Draw]) -> None:
        """Scores every hypothesis over its draw."""
        size = len(draws[0][0])
        left = iter(draws)
        for part in parts(model, group, size):
            own = [next(left) for _ in part]
            for h, (error, null), (e, _) in zip(part, errors(model, part, own), own, strict=True):
                h.loss_ratio = score(h, error, null, e)

    def improve(self, model: Model, group: list[Hypothesis], iterations: int, generator: torch.Generator) -> None:
        """Adam on r and, where the family's starts fit it, y; in place."""
        leaves = [[h.u, *([h.w] if h.family.starts_with_y else [])] for h in group]
        optimizer = adam(leaves, [h.began.lr for h in group])
        for _ in range(iterations):
            optimizer.zero_grad()
            for part in parts(model, group, self.start_batch):
                draws = [antithetic(model, self.start_batch, *h.family.start_window, generator) for h in part]
                losses = [
                    mean_residual(error, h) if h.began.by_mean else ratio(error, null)
                    for (error, null), h in zip(errors(model, part, draws), part, strict=True)
                ]
                torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
        release(leaves)

    def first_targets(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> None:
        """Makes the median of a few outputs that start with the trigger the target of each hypothesis."""
        e, seed = model.noise(self.samples, generator), int(torch.randint(2**31, (1,), generator=generator))
        for sampler in dict.fromkeys(h.family.first_target for h in group if h.family.first_target):
            own = [h for h in group if h.family.first_target == sampler]
            outputs = model.sample(torch.cat([h.start(e) for h in own]), sampler, seed=seed)
            for h, rows in zip(own, outputs.split(len(e)), strict=True):
                h.lead_to(rows.median(0).values, 0.95)

    def fit(
        self, model: Model, group: list[Hypothesis], generator: torch.Generator, progress: Progress = no_progress
    ) -> None:
        """Fits r, y and gamma together, in place; the rate falls to a fifth, the window opens downwards."""
        leaves = [[h.u, h.w, h.v] for h in group]
        optimizer, live = adam(leaves, [self.fit_lr] * len(group)), list(group)
        recent: dict[int, list[float]] = {id(h): [] for h in group}
        for k in range(self.fit_iterations):
            done = k / self.fit_iterations
            for settings in optimizer.param_groups:
                settings["lr"] = self.fit_lr * (1 - 0.8 * done)
            optimizer.zero_grad()
            for part in parts(model, live, self.fit_batch):
                draws = [antithetic(model, self.fit_batch, *window_of(h.family, done), generator) for h in part]
                losses = [ratio(*both) for both in errors(model, part, draws)]
                torch.autograd.backward(torch.stack(losses).sum())
                for h, loss in zip(part, losses, strict=True):
                    recent[id(h)] = [*recent[id(h)], loss.item()][-10:]
            optimizer.step()
            for share, limit in self.give_up:
                if k + 1 == round(share * self.fit_iterations):
                    live = [h for h in live if statistics.mean(recent[id(h)]) <= limit * h.family.max_loss_ratio]
            progress("searching: fits", k + 1, self.fit_iterations)
            if not live:
                break
        release(leaves)

    @torch.no_grad()
    def score(self, model: Model, h: Hypothesis, generator: torch.Generator) -> float:
        """The score where the family is judged, on fresh noise; of several ranges of t the worst."""
        draws = [
            antithetic(model, self.score_batch, *window, generator) for window in h.family.judged or (h.family.window,)
        ]
        return max(score(h, *errors(model, [h], [draw])[0], draw[0]) for draw in draws)


def score(h: Hypothesis, error: Tensor, null: Tensor, e: Tensor) -> float:
    """The loss ratio, and more where the network loses sight of the noise."""
    return float(ratio(error, null)) + (0.0 if h.patch is not None else UNSTEADY * float(steadiness(error, e)))


def best_of_each(group: list[Hypothesis], share: float) -> list[Hypothesis]:
    """Of each family the best share, one at least."""
    kept = []
    for family in dict.fromkeys(h.family for h in group):
        own = sorted((h for h in group if h.family is family), key=lambda h: h.loss_ratio)
        kept += own[: max(1, math.ceil(share * len(own)))]
    return kept


def parts(model: Model, group: list[Hypothesis], batch: int) -> Iterator[list[Hypothesis]]:
    """The group in parts whose rows, batch each, fit in memory together with their gradients."""
    rows = model.max_batch or min(128, max(16, 2**27 // max(1, model.parameters)))
    size = max(1, rows // batch)
    return (group[k : k + size] for k in range(0, len(group), size))


def begin(model: Model, family: Family, start: Start, generator: torch.Generator) -> Hypothesis:
    """A hypothesis: a flat trigger where the start has a level, else a random one."""
    u = (torch.randn(model.sample_shape, generator=generator) * 0.5).to(model.device)
    if start.level is not None:
        u = torch.full_like(u, start.level / float(spectrum(u, start.power)[0, 0]))
    v, w = torch.logit(torch.tensor(family.response.gamma, device=u.device), 1e-6), torch.zeros_like(u)
    scale = LATENT_RANGE if model.kind == "ldm" else 1.0
    return Hypothesis(family, start.power, u, v, w, scale=scale, began=start)


def window_of(family: Family, done: float) -> tuple[float, float]:
    """Where a fit looks: the upper fifth of the family's window at first, all of it from the middle on."""
    low, high = family.window
    first = low + 0.8 * (high - low)
    return low + (first - low) * max(0.0, 1 - 2 * done), high


def mean_residual(error: Tensor, h: Hypothesis) -> Tensor:
    """|mean_b(eps - answer)|^2 / |r|^2: the residual averaged over the batch, for starts at large t."""
    return error.mean(0).square().sum() / h.r.square().sum().clamp(min=1e-12)


def adam(leaves: list[list[Tensor]], rates: list[float]) -> torch.optim.Adam:
    for leaf in (leaf for own in leaves for leaf in own):
        leaf.requires_grad_(True)
    return torch.optim.Adam([{"params": own, "lr": rate} for own, rate in zip(leaves, rates, strict=True)])


def release(leaves: list[list[Tensor]]) -> None:
    for leaf in (leaf for own in leaves for leaf in own):
        leaf.requires_grad_(False).grad = None
