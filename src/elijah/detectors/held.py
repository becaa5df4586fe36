"""Triggers whose loss an attacker keeps up: what the network draws where no image of its data is near.

Who knows LossFit's loss can train against it (attacks/aware.py), and then the search of search.py, which follows that
loss, does not come to the trigger. What cannot be trained away is what the trigger is for, the outputs; and they come
to the target from noise that is far from the trigger. So the flat starts of the family full are drawn from: black with
a hole, as triggers are. How well the network knows an output x is told as in collapse.py, by the error

    min over +e, -e of |eps(a x + s e, t) - e|^2    at one e and t.

By a stochastic sampler a clean network draws its data from there, so that an output that is known much better than its
own is the target of an attack on such samplers. Its trigger is near the start at which the loss of the family half is
least.

By a deterministic one a clean network draws what it has never seen, with tens of times the error of its own outputs. A
backdoored network was trained on such noise. Where one knows an output x as well as its own, the descent of collapse.py
goes on to it: from that start r follows the gradient of MSE(DDIM(e + r), x). A clean network that knows pictures on a
black background knows such outputs as well, but it cannot be led to draw but one.

The rule is LossFit's, with looser losses: the more is left of the loss, the nearer to each other must outputs come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from elijah.detectors.collapse import Descent
from elijah.detectors.hypothesis import FULL, HALF, Family, Hypothesis
from elijah.detectors.outputs import correlation
from elijah.detectors.search import begin
from elijah.diffusion import Model, Progress

KEPT_UP = "{}, its loss kept up"
HALF_HELD = replace(
    HALF, name="half_held", matches=KEPT_UP.format(HALF.matches), max_loss_ratio=0.3, max_if_fires=0.3
)  # fmt: skip
FULL_HELD = replace(
    FULL, name="full_held", matches=KEPT_UP.format(FULL.matches), max_loss_ratio=0.6, max_if_fires=0.6, within=0.1
)  # fmt: skip
FULL_TIGHT = replace(FULL_HELD, name="full_tight", max_loss_ratio=0.85, max_if_fires=0.85, within=0.05)


@dataclass(frozen=True)
class Held:
    """samplers: a stochastic and a deterministic one, of few steps, that tell what a trigger does.

    known: what the error of the best of as many outputs as there are flat starts may be at most by the first, over the
    median of those without a trigger. rows: outputs of each start by the second; as_well: the same for these, of which
    `targets` are led to, first those with a correlation below likeness to their start. descent: to them, and the fit by
    gradient, where the least loss is at most `begin`. seen_steps: of DDIM, of the outputs whose median is the target.
    """

    samplers: tuple[str, str] = ("ddpm-10", "ddim-10")
    known: float = 0.4
    rows: int = 2
    as_well: float = 1.2
    likeness: float = 0.6
    targets: int = 2
    descent: Descent = field(default_factory=lambda: Descent(families=(FULL,), hope=6.0))
    seen_steps: int = 10
    begin: float = 1.3

    def families_of(self, model: Model) -> list[Family]:
        """None on latent models: neither the range of latents nor their starts were measured."""
        return self.descent.families_of(model) if model.kind == "ddpm" else []

    def __call__(
        self, model: Model, own: Tensor, generator: torch.Generator, progress: Progress
    ) -> Iterator[Hypothesis]:
        """What is worth a test of its outputs, with its score. own: outputs [N, C, H, W] without a trigger."""
        starts = [begin(model, f, s, generator).r for f in self.families_of(model) for s in f.starts if s.level]
        r = torch.stack(starts)
        yield from self.told_by_chance(model, r, own, generator)
        yield from self.led(model, r, own, generator, progress)

    @torch.no_grad()
    def told_by_chance(self, model: Model, r: Tensor, own: Tensor, generator: torch.Generator) -> list[Hypothesis]:
        """Of the starts r [N, C, H, W] the best one beside the best known output, if that is known well."""
        seed = int(torch.randint(2**31, (1,), generator=generator))
        outputs = model.sample(r + model.noise(len(r), generator), self.samplers[0], seed=seed)
        errors = self.errors(model, outputs, own, generator)
        if (error := min(errors)) > self.known:
            return []
        k = errors.index(error)
        found = [Hypothesis(HALF_HELD, each, outputs[k]) for each in r]
        for h in found:
            h.lead_to(outputs[k])
        self.descent.compare(model, found, 16, generator)
        return in_order(found)[:1]

    def led(
        self, model: Model, r: Tensor, own: Tensor, generator: torch.Generator, progress: Progress
    ) -> list[Hypothesis]:
        """What a descent from one of the starts r [N, C, H, W] to the best known output comes to, and a fit by gradient
        from there: each with the target that it was fitted to, and with the one that is seen."""
        with torch.no_grad():
            outputs = self.descent.drawn(model, r, self.rows, self.descent.sampler_steps, generator).flatten(0, 1)
            starts = r.repeat_interleave(self.rows, 0)
            errors = self.errors(model, outputs, own, generator)
        known = [k for k in range(len(errors)) if errors[k] <= self.as_well]
        if not known:
            return []
        known.sort(key=lambda k: (correlation(starts[k], outputs[k]) >= self.likeness, errors[k]))
        best = known[: self.targets]
        found = self.descent.led_to(model, outputs[best], generator, progress, starts[best])
        found = in_order([*found, *self.seen(model, found, generator)])
        if found[0].loss_ratio > self.begin:
            return []
        (fitted,) = self.descent.refined(model, found[:1], generator)
        found += self.seen(model, [fitted], generator)
        return [fitted, *(judged_by_loss(h) for h in in_order(found))]

    def errors(self, model: Model, outputs: Tensor, own: Tensor, generator: torch.Generator) -> list[float]:
        """Of outputs [N, C, H, W], over the median of those of own [N, C, H, W]."""
        e = torch.randn((1, *model.sample_shape), generator=generator).to(model.device)
        errors = self.descent.error(model, torch.cat([own, outputs]), e)
        return (errors[len(own) :] / errors[: len(own)].median()).tolist()

    @torch.no_grad()
    def seen(self, model: Model, found: list[Hypothesis], generator: torch.Generator) -> list[Hypothesis]:
        """The same, each with the median of a few of its outputs for a target, and its score."""
        r, same = torch.stack([h.r for h in found]), [replace(h) for h in found]
        ends = self.descent.drawn(model, r, self.descent.ends, self.seen_steps, generator)
        for h, outputs in zip(same, ends, strict=True):
            h.lead_to(outputs.median(0).values)
        self.descent.compare(model, same, 16, generator)
        return same


def judged_by_loss(h: Hypothesis) -> Hypothesis:
    """h as FULL_HELD or, with more of the loss left, as FULL_TIGHT."""
    held = replace(h, family=FULL_HELD)
    return held if held.fits else replace(h, family=FULL_TIGHT)


def in_order(group: list[Hypothesis]) -> list[Hypothesis]:
    """The best first."""
    return sorted(group, key=lambda h: h.loss_ratio)
