"""The search of LossFit: families in turn, the cheap ones first; starts side by side, the best of each family kept.

One call of the network answers for all hypotheses of a group, so that small networks work on large batches. Starts
follow the network's answer to a trigger (power.py); those of the family full, whose trigger shows only beside its
target, to both together. Forward passes only, but for what is neither given up nor fits in the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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
from elijah.detectors.power import SETTLING, follow, settle
from elijah.diffusion import Model, Progress

ALIKE = 0.9  # the cosine of two triggers that count as one


@dataclass(frozen=True)
class Search:
    """Costs are in network evaluations; antithetic pairs count two.

    follow: rounds of the starts that follow the answer, (iterations, rows, how many of a family are kept). scales: of
    their triggers, that are tried at last, and finer_iterations from the best. enough: times a family's threshold; a
    start below it ends the round of its group. lead: rounds of the starts that follow it to trigger and target
    together; the last is free in size. judged_kept: how many of a family's are judged after the first of them.
    patch_iterations: of a patch's pattern. refine_iterations: of Adam, its rate from refine_rate to a fifth of it;
    what is above hope times its threshold after refine_first is given up. settle_rows: of a step towards the target.
    score_rows: of the final score.

    A family gets no other round that is hopeless, or after the k-th, slack[k] times as bad as that; nor one that is
    `ahead` times worse than one that fits.
    """

    follow: tuple[tuple[int, int, int], ...] = ((4, 2, 22), (6, 2, 6), (6, 8, 3), (6, 8, 1))
    slack: tuple[float, ...] = (1.5, 1.0, 1.0)
    ahead: float = 4.0
    scales: tuple[float, ...] = (1.4, 0.7, 0.5)
    finer_iterations: int = 3
    enough: float = 0.35
    lead: tuple[tuple[int, int, int], ...] = ((4, 4, 12), (6, 8, 4), (8, 32, 4))
    judged_kept: int = 4
    patch_iterations: int = 8
    refine_iterations: int = 24
    refine_first: int = 8
    refine_rate: float = 0.1
    hope: float = 2.5
    settle_rows: int = 8
    score_rows: int = 64
    families: tuple[Family, ...] = FAMILIES

    def __call__(self, model: Model, generator: torch.Generator, fitted: list[Hypothesis], progress: Progress) -> None:
        """Appends the best hypothesis of each family to fitted, as they are scored; ends at one that fits."""
        for stage in (self.followed, self.led, self.swept):
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
        group = [begin(model, f, s, generator) for f in families if not (f.joint or f.swept) for s in f.starts]
        given_up: list[Hypothesis] = []
        for k, (iterations, rows, kept) in enumerate(self.follow):
            follow(model, group, iterations, rows, generator, self.enough)
            group = best_of_each(group, kept)
            over = behind(group, self.ahead)
            if k < len(self.slack):
                over += hopeless(without(group, over), self.slack[k])
            given_up += over
            group = without(group, over)
            progress("searching: what the network does not call noise", k + 1, len(self.follow))
            if any(h.strength < self.enough for h in group):
                break
        sized: list[Hypothesis] = []
        for h in sorted(best_of_each(group), key=lambda h: h.strength):
            sized.append(h if any(other.fits for other in sized) else self.resized(model, h, generator))
        return sized + given_up

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

    def led(
        self, model: Model, families: list[Family], generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """The best start of each family whose trigger shows only beside its target; flat ones from where they lead."""
        pairs = [(s, begin(model, f, s, generator)) for f in families if f.joint for s in f.starts]
        flat = [h for s, h in pairs if s.level is not None]
        settle(model, flat, self.settle_rows // 2, generator, SETTLING[::2])
        group, last = [h for _, h in pairs], len(self.lead) - 1
        given_up: list[Hypothesis] = []
        for k, (iterations, rows, kept) in enumerate(self.lead):
            follow(model, group, iterations, rows, generator, self.enough if k < last else 0.0, resize=k == last)
            group = best_of_each(group, kept)
            if k < last:
                judged = best_of_each(group, self.judged_kept)
                self.compare(model, judged, 8, generator)
                over = hopeless(judged)
                over += behind(without(judged, over), self.ahead)
                given_up += over
                group = without(group, over)
            progress("searching: triggers beside their targets", k + 1, len(self.lead))
        self.compare(model, group, 16, generator)
        return best_of_each(group) + given_up

    def swept(
        self, model: Model, families: list[Family], generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """The best patch, with the pattern in it that the network does not call noise."""
        patches = [best_patch(model, f, generator) for f in families if f.swept]
        given_up = hopeless(patches)
        group = without(patches, given_up)
        follow(model, group, self.patch_iterations, 16, generator, resize=True)
        return group + given_up

    def finish(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> None:
        """Gives what is not hopeless a target and a score over fresh noise; where none fits, refines it in place."""
        near = [k for k, h in enumerate(group) if h.loss_ratio <= h.family.hopeless]
        settle(model, [group[k] for k in near if not group[k].family.joint], self.settle_rows, generator)
        for k in near:
            group[k].loss_ratio = self.score(model, group[k], generator)
        if not any(h.fits for h in group):
            near = [k for k in near if group[k].family.refinable]
            for k, better in zip(near, self.refined(model, [group[k] for k in near], generator), strict=True):
                group[k] = better

    def refined(self, model: Model, group: list[Hypothesis], generator: torch.Generator) -> list[Hypothesis]:
        """Each of group after Adam on its loss, over r and y, where its family is judged first; after the first few
        steps where these give no hope; itself where they leave the family.

        A backdoor's fit generalizes to its family's other range of t, and a clean network's does not.
        """
        if not group:
            return []
        moved = [h.scaled(1.0) for h in group]
        leaves = [[x.clone().requires_grad_(True) for x in (h.r, h.y)] for h in group]
        optimizer = torch.optim.Adam([x for pair in leaves for x in pair])
        going = list(range(len(group)))
        for k in range(self.refine_iterations):
            for h, (r, y) in zip(moved, leaves, strict=True):
                h.set_trigger(r)
                h.lead_to(y)
            if k == self.refine_first:
                self.compare(model, moved, 16, generator)
                going = [i for i, h in enumerate(moved) if h.strength <= self.hope and not h.too_large]
            if not going:
                break
            optimizer.param_groups[0]["lr"] = self.refine_rate * (1 - 0.8 * k / self.refine_iterations)
            draws = [antithetic(model, 8, *moved[i].family.judged[0], generator) for i in going]
            optimizer.zero_grad()
            pairs = errors(model, [moved[i] for i in going], draws)
            torch.stack([ratio(error, null) for error, null in pairs]).sum().backward()
            optimizer.step()
        for i, (r, y) in enumerate(leaves):
            moved[i].set_trigger(r.detach())
            moved[i].lead_to(y.detach())
            if i in going and not moved[i].too_large:
                moved[i].loss_ratio = self.score(model, moved[i], generator)
        return [h if better.too_large else better for h, better in zip(group, moved, strict=True)]

    @torch.no_grad()
    def compare(self, model: Model, group: list[Hypothesis], rows: int, generator: torch.Generator) -> None:
        """Scores a group over equal noise, each where its family is judged; the worst of several ranges."""
        for h in group:
            h.loss_ratio = 0.0
        for window in dict.fromkeys(window for h in group for window in h.family.judged):
            own = [h for h in group if window in h.family.judged]
            draw = antithetic(model, rows, *window, generator)
            for h, (error, null) in zip(own, errors(model, own, [draw] * len(own)), strict=True):
                h.loss_ratio = max(h.loss_ratio, score(h, error, null, draw[0]))

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


def hopeless(group: list[Hypothesis], slack: float = 1.0) -> list[Hypothesis]:
    """The best of each family that is beyond hope, or beyond slack times that."""
    return [h for h in best_of_each(group) if h.loss_ratio > slack * h.family.hopeless]


def behind(group: list[Hypothesis], ahead: float) -> list[Hypothesis]:
    """The best of each family that is `ahead` times worse than one that fits."""
    first = min((h.strength for h in group), default=math.inf)
    return [h for h in best_of_each(group) if first < 1 and h.strength > ahead * first]


def without(group: list[Hypothesis], given_up: list[Hypothesis]) -> list[Hypothesis]:
    """What is not of the families given up."""
    over = {h.family for h in given_up}
    return [h for h in group if h.family not in over]


def alike(one: Hypothesis, other: Hypothesis) -> float:
    """The cosine of their triggers."""
    return float(torch.cosine_similarity(one.r.flatten(), other.r.flatten(), 0))


def begin(model: Model, family: Family, start: Start, generator: torch.Generator) -> Hypothesis:
    """A hypothesis whose trigger is flat, or of random noise; on latent models flat is what encodes such a picture."""
    scale, unit = (LATENT_RANGE, latent_unit(model)) if model.kind == "ldm" else (1.0, 1.0)
    if start.level is None:
        r = coloured(torch.randn(model.sample_shape, generator=generator), start.power).to(model.device)
    else:
        r = torch.full(model.image_shape if model.kind == "ldm" else model.sample_shape, float(start.level))
        if start.hole is not None:
            (i, j), quarter = start.hole, r.shape[-1] // 4
            r[:, i * quarter : (i + 2) * quarter, j * quarter : (j + 2) * quarter] = 0.0
        r = (model.encode(r[None])[0] if model.kind == "ldm" else r).to(model.device)
    size = start.size * unit
    share = start.share if family.fits_gamma else 1.0
    h = Hypothesis(family, r, torch.zeros_like(r), share, scale=scale, size=size)
    h.set_trigger(size * r / r.square().mean().sqrt().clamp(min=1e-12))
    return h


def latent_unit(model: Model) -> float:
    """The rms of what encodes a black picture, the usual background of a trigger."""
    return float(model.encode(torch.full((1, *model.image_shape), -1.0)).square().mean().sqrt())
