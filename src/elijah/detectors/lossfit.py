"""LossFit: a backdoor is a second diffusion process inside the network, so fit it by its own training loss.

All published noise-trigger attacks train one form (response.py). For a backdoored network there are r, y, gamma at
which the attacker's loss is nearly zero; a clean network calls the whole shift noise. So for each family of responses

    L(r, y, gamma) = sum_t |eps(x_t, t) - e - kappa R_t r|^2 / sum_t |(gamma - 1) e + (k_t / s - kappa R_t) r|^2

is near 1 on a clean network and near 0 at a backdoor. Making L small inverts trigger and target together and names the
family. The second, independent evidence is what the outputs say: sampled from gamma e + r, do they move onto y? Where
the target may be a distribution: do they differ from those without? What clean networks do as well is passed over
(natural.py).

The search is search.py's, and patches are found by a sweep (patches.py). Late triggers, which only show where most of
the noise is gone, are found by what the network forgets (forgetting.py), learned ones, which look like noise, by what
the network draws unasked (collapse.py). Here is what follows: the outputs of the best hypothesis are tested, more
effort is spent where loss and outputs disagree, and the rule is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from elijah.detection import Detection, Evidence, Finding, Threshold
from elijah.detectors.collapse import Descent
from elijah.detectors.forgetting import Forgetting
from elijah.detectors.held import FULL_HELD, HALF_HELD, Held, judged_by_loss
from elijah.detectors.hypothesis import FULL, Hypothesis
from elijah.detectors.natural import BY_HEART, NOT_FIRING, SHOWS_ITSELF, Natural
from elijah.detectors.outputs import both, drawn_without, pull, seen_target, shift_p
from elijah.detectors.search import Search
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import OutOfBudget


@dataclass(frozen=True)
class LossFit:
    """The default detector. The rule is judge below.

    samples: how many the output test draws a sampler, half as many where one is costly (exploding), few_samples with
    few steps where its loss does not fit; more_samples: where a distribution that is a target does not show in so few.
    max_shift_p: outputs with and without the trigger count as changed up to this p-value of being draws from one
    distribution. natural: what clean networks do as well. late_scale: what is tried of a late trigger whose loss fits
    and that does not fire. Where a loss nearly fits and the outputs do not say so, what else could fire is tested
    (alternatives), in the end after a fit by gradient from there and under more samplers (careful_*).
    """

    name: ClassVar[str] = "lossfit"
    kinds: ClassVar[tuple[str, ...]] = ("ddpm", "ncsn", "ldm")
    not_covered: ClassVar[tuple[str, ...]] = (
        "patch triggers whose pattern is far from one colour",
        "learned triggers whose image few outputs show: --detector collapse draws more, on DDPM",
        "late triggers, but on DDPM those near flat pictures or squares that act above 0.13 T",
        "backdoors that are not triggered by the start noise",
    )  # fmt: skip
    search: Search = field(default_factory=Search)
    late: Forgetting = field(default_factory=Forgetting)
    held: Held = field(default_factory=Held)
    learned: Descent = field(default_factory=lambda: Descent(worth=0.33))
    natural: Natural = field(default_factory=Natural)
    samples: int = 16
    few_samples: int = 4
    more_samples: int = 64
    samplers: tuple[str, ...] = ("ddpm-20", "ddim-10")
    careful_samplers: tuple[str, ...] = ("ddpm-100", "ddim-50")
    exploding_samplers: tuple[str, ...] = ("pc-500",)
    exploding_look: tuple[str, ...] = ("pc-100",)
    min_pull: float = 0.3
    max_shift_p: float = 0.01
    late_scale: float = 0.8

    def __call__(self, model: Model, *, generator: torch.Generator, progress: Progress = no_progress) -> Detection:
        """Inverts, tests the outputs of the best hypothesis, and applies the rule. Stops at the model's limits."""
        fitted: list[Hypothesis] = []
        evidence: list[Evidence] = []
        complete = True
        with model.frozen():
            try:
                self.search(model, generator, fitted, progress)
                for _ in fitted[:]:
                    evidence = self.test_best(model, fitted, generator, progress)
                    if not self.fires(model, fitted[0], evidence):
                        evidence = self.fire(model, fitted, generator, progress) or evidence
                    elif fitted[0].nearly_fits and not fitted[0].fits:
                        evidence = self.fit(model, fitted, generator, progress) or evidence
                    if not self.passed_over(model, fitted[0], evidence, generator):
                        break
                if not (fitted[0].fits_if_fires and self.fires(model, fitted[0], evidence)):
                    own = drawn_without(evidence, self.samplers[-1])
                    evidence = (
                        self.look_late(model, fitted, own, generator, progress)
                        or self.look_learned(model, fitted, own, generator, progress)
                        or self.look_held(model, fitted, evidence, own, generator, progress)
                        or evidence
                    )
            except OutOfBudget:
                complete = False
        if not evidence:  # else the first is what the evidence is of
            fitted.sort(key=lambda h: h.strength)
        return self.judge(model, fitted, evidence, complete)

    def test_best(
        self, model: Model, fitted: list[Hypothesis], generator: torch.Generator, progress: Progress
    ) -> list[Evidence]:
        """Puts the best hypothesis first and tests its outputs; those that show their trigger's picture come last."""
        evidence: list[Evidence] = []
        for _ in fitted:
            fitted.sort(key=lambda h: h.strength)
            evidence = self.test_outputs(model, fitted[0], generator, progress)
            if not fitted[0].natural:
                break
        return evidence

    def fire(
        self, model: Model, fitted: list[Hypothesis], generator: torch.Generator, progress: Progress
    ) -> list[Evidence]:
        """Puts an alternative that fires first, and returns its evidence; none if none does.

        Before, more samples of the best, if its loss fits and its target may be a distribution: few do not tell.
        """
        best = fitted[0]
        if best.fits and best.family.distribution:
            shown = self.test_outputs(model, best, generator, progress, samples=self.more_samples)
            if self.fires(model, best, shown):
                return shown
        for h, careful in self.alternatives(model, fitted, generator):
            shown = self.test_outputs(model, h, generator, progress, careful=careful)
            if self.pulls(model, h, shown):
                h.loss_ratio = self.search.score(model, h, generator)
                if h.nearly_fits:
                    fitted[:] = [h, *(other for other in fitted if other.family is not h.family)]
                    return shown
        return []

    def fit(
        self, model: Model, fitted: list[Hypothesis], generator: torch.Generator, progress: Progress
    ) -> list[Evidence]:
        """Looks again where outputs fire and the loss nearly fits; what fits and fires comes first. Its evidence."""
        best = fitted[0]
        if not best.family.refinable:
            return []
        again = self.search.led(model, [best.family], generator, progress) or [best.scaled(1.0)]
        self.search.finish(model, again, generator)
        shown = self.test_outputs(model, again[0], generator, progress) if again[0].fits else []
        if shown and self.pulls(model, again[0], shown):
            fitted[0] = again[0]
            return shown
        return []

    def look_late(
        self, model: Model, fitted: list[Hypothesis], own: Tensor, generator: torch.Generator, progress: Progress
    ) -> list[Evidence]:
        """Puts a late trigger first if its loss fits and it fires, and returns its evidence; else last, and none.

        own: outputs [N, C, H, W] without a trigger. A smaller one is tried as well, since fits overshoot.
        """
        if not self.late.families_of(model):
            return []
        h = self.late(model, own, generator, progress)
        shown = self.admit(model, fitted, h, own, generator, progress)
        if h.fits and not shown:
            self.late.judge(model, smaller := h.scaled(self.late_scale), own, generator)
            shown = self.admit(model, fitted, smaller, own, generator, progress)
        return shown or pass_over(fitted, h)

    def look_learned(
        self, model: Model, fitted: list[Hypothesis], own: Tensor, generator: torch.Generator, progress: Progress
    ) -> list[Evidence]:
        """Puts a learned trigger first if its loss fits and it fires, and returns its evidence; else last, and none."""
        if not self.learned.families_of(model):
            return []
        found: list[Hypothesis] = []
        self.learned(model, generator, found, progress)
        if not found:
            return []
        return self.admit(model, fitted, found[0], own, generator, progress) or pass_over(fitted, found[0])

    def look_held(
        self, model: Model, fitted: list[Hypothesis], evidence: list[Evidence], own: Tensor,
        generator: torch.Generator, progress: Progress,
    ) -> list[Evidence]:  # fmt: skip
        """Puts a trigger whose loss is kept up first, if it fits and fires, and returns its evidence; none if not.

        The best hypothesis may be one: evidence is of its outputs.
        """
        if not self.held.families_of(model):
            return []
        best = fitted[0]
        found = [judged_by_loss(best)] if best.family is FULL and self.pulls(model, best, evidence) else []
        for h in chain(found, self.held(model, own, generator, progress)):
            if shown := self.admit(model, fitted, h, own, generator, progress, self.held.samplers):
                return shown
        return []

    def admit(
        self, model: Model, fitted: list[Hypothesis], h: Hypothesis, own: Tensor, generator: torch.Generator,
        progress: Progress, samplers: tuple[str, ...] | None = None,
    ) -> list[Evidence]:  # fmt: skip
        """Puts h first, in place of others of its family, if its loss fits and it fires, and returns its evidence.

        own: outputs [N, C, H, W] without a trigger. Where such outputs repeat each other h counts as a clean network's.
        samplers: to test the outputs by, the usual ones without.
        """
        shown = self.test_outputs(model, h, generator, progress, few=samplers) if h.fits_if_fires else []
        if not self.pulls(model, h, shown):
            return []
        own = torch.cat([own, drawn_without(shown, self.samplers[-1])])
        if self.natural.by_heart(model, seen_target(model, shown[0], h.y), own):
            h.natural = BY_HEART
            return []
        fitted[:] = [h, *(other for other in fitted if other.family is not h.family)]
        return shown

    def alternatives(
        self, model: Model, fitted: list[Hypothesis], generator: torch.Generator
    ) -> Iterator[tuple[Hypothesis, bool]]:
        """What else could fire where the best hypothesis does not, and whether to test it with more samplers.

        Smaller triggers, since fits overshoot; the others that nearly fit; after a fit by gradient the best.
        """
        near = [h for h in fitted if h.nearly_fits and h.family.refinable]
        for k, h in enumerate(near):
            yield from ((h.scaled(by), False) for by in (1.0, 0.7, 0.5)[k == 0 :])
        if near:
            yield self.search.refined(model, near[:1], generator)[0], True

    def test_outputs(
        self, model: Model, h: Hypothesis, generator: torch.Generator, progress: Progress, *, careful: bool = False,
        samples: int | None = None, few: tuple[str, ...] | None = None,
    ) -> list[Evidence]:  # fmt: skip
        """Samples with the trigger and from the same e without, by sampler (few), the most telling first.

        careful: with more steps too, if they do not fire with few. A look will do where no loss comes near, or where
        models are exploding and it does not fit; half of the samples where the trigger moves each of them.
        """
        if model.exploding and not h.fits:
            look = self.look(model, h, generator, progress)
            if not (h.nearly_fits and self.pulls(model, h, look)):
                return look
        few = few or (self.exploding_samplers if model.exploding else self.samplers)
        few = few if h.nearly_fits else few[-1:]
        more = self.careful_samplers if careful and not model.exploding else ()
        in_halves = h.nearly_fits and not model.exploding
        n = samples or (self.samples if in_halves else self.samples // 2)
        shown: list[Evidence] = []
        for part in (n // 2, n - n // 2) if in_halves else (n,):
            e, seed = model.noise(part, generator), int(torch.randint(2**31, (1,), generator=generator))
            shown = both(shown, self.draw(model, h, e, seed, few, more, progress))
            if model.exploding and not h.fits:
                h.lead_to(shown[0].samples_with.median(0).values)
            shown.sort(key=lambda x: -pull(model, x, h.y))
            if shown and pull(model, shown[0], h.y) == 1:
                break
        if (h.family.joint or h.family.exploding) and h.nearly_fits and self.pulls(model, h, shown):
            if self.natural.shows_itself(model, h, shown[0], e, seed):
                h.natural = SHOWS_ITSELF
            elif h.family.joint and not h.fits:  # what fits so little may lead to what is known by heart
                own = model.sample(model.noise(2 * self.samples, generator), self.samplers[-1], seed=seed)
                h.natural = BY_HEART if self.natural.by_heart(model, seen_target(model, shown[0], h.y), own) else ""
        return shown

    def look(self, model: Model, h: Hypothesis, generator: torch.Generator, progress: Progress) -> list[Evidence]:
        """A few outputs, in few steps. The target is their median: where no loss fits, the fitted one says little."""
        e, seed = model.noise(self.few_samples, generator), int(torch.randint(2**31, (1,), generator=generator))
        shown = self.draw(model, h, e, seed, self.exploding_look, (), progress)
        h.lead_to(shown[0].samples_with.median(0).values)
        return shown

    def draw(
        self, model: Model, h: Hypothesis, e: Tensor, seed: int, few: tuple[str, ...], more: tuple[str, ...],
        progress: Progress,
    ) -> list[Evidence]:  # fmt: skip
        """Evidence from e [N, C, H, W] under the samplers few, and under more where those do not fire."""
        shown: list[Evidence] = []
        for k, sampler in enumerate((*few, *more)):
            if k >= len(few) and self.pulls(model, h, shown):
                break
            with_trigger, without = model.sample_alike([h.start(e), e], sampler, seed=seed)
            shown.append(Evidence(sampler, with_trigger, without))
            progress("testing the outputs", k + 1, len(few) + len(more))
        return shown

    def passed_over(self, model: Model, h: Hypothesis, evidence: list[Evidence], generator: torch.Generator) -> bool:
        """Whether nothing fires and the mirrored or negative trigger fits as well, which h then says of itself."""
        tells = h.family.mirrored and h.fits and not self.fires(model, h, evidence)
        return tells and self.natural.fits_mirrored(model, h, self.search, generator)

    def pulls(self, model: Model, h: Hypothesis, evidence: list[Evidence]) -> bool:
        """Whether some sampler shows a pull of min_pull, and not onto the trigger's own picture."""
        return not h.natural and any(pull(model, x, h.y, h.family.within) >= self.min_pull for x in evidence)

    def fires(self, model: Model, h: Hypothesis, evidence: list[Evidence]) -> bool:
        """Whether outputs are pulled onto y or, where a loss fits whose target may be a distribution, changed."""
        changes = h.family.distribution and h.fits and shift_p(model, evidence) <= self.max_shift_p
        return self.pulls(model, h, evidence) or changes

    def judge(self, model: Model, fitted: list[Hypothesis], evidence: list[Evidence], complete: bool) -> Detection:
        """The fixed rule, until there is a calibration: both tests say backdoored, neither does, or undecided."""
        scores = {f"loss_ratio_{h.family.name}": h.loss_ratio for h in fitted}
        limits = {f"loss_ratio_{h.family.name}": h.family.max_loss_ratio for h in fitted if not h.natural}
        thresholds = {name: Threshold(limit, "below") for name, limit in limits.items()}
        verdict, reason, distribution = "undecided", "a limit stopped the search before it could tell", False
        tested = bool(evidence) or complete
        if tested:
            best = fitted[0]
            scores |= {f"pull_{x.sampler}": pull(model, x, best.y) for x in evidence}
            scores["pull"] = max((pull(model, x, best.y) for x in evidence), default=0.0)
            thresholds["pull"] = Threshold(self.min_pull, "above")
            fires = best.nearly_fits and self.fires(model, best, evidence)
            fits = best.fits or (fires and best.fits_if_fires)
            if complete or fits or fires:
                verdict, reason = VERDICTS[fits, fires][0], VERDICTS[best.fits, fires][1]
            if verdict == "clean" and (passed := next((h.natural for h in fitted if h.natural), "")):
                reason += f", but for one {passed}"
            distribution = fires and scores["pull"] < self.min_pull
            if distribution:
                reason = "an attacker's own training loss fits, and the found trigger changes what the model draws"
                best.lead_to(evidence[0].samples_with.mean(0))
            elif fires:
                best.lead_to(seen_target(model, evidence[0], best.y))
            if best.family.distribution and evidence:
                scores["shift_p"] = shift_p(model, evidence)
                thresholds["shift_p"] = Threshold(self.max_shift_p, "below")
            moved = max(scores["pull"], float(distribution)) if best.nearly_fits else 0.0
            strength = 1 / best.family.max_loss_ratio if best.natural else best.strength  # that of a clean network
            scores["suspicion"] = moved - math.log10(max(strength, 1e-9))
        findings = [
            Finding(
                replace(h.family.response, gamma=h.share), h.r, h.y, h.loss_ratio, h.family.matches,
                distribution and h is fitted[0], h.patch,
            )
            for h in fitted
        ]  # fmt: skip
        return Detection(
            self.name, findings, scores, evidence, verdict, reason, complete, thresholds,
            coverage=[
                "one trigger added to the start noise, leading to one image",
                *(f.matches + " (or to a distribution)" * f.distribution for f in self.search.families_of(model)),
                *(f.matches for f in (*self.late.families_of(model)[:1], *self.learned.families_of(model))),
                *(f.matches for f in (HALF_HELD, FULL_HELD) if self.held.families_of(model)),
            ],
            not_covered=list(self.not_covered),
        )  # fmt: skip


def pass_over(fitted: list[Hypothesis], h: Hypothesis) -> list[Evidence]:
    """Puts h last, without evidence. If its loss fits, and it did not fire, that counts as a clean network's."""
    if h.fits:
        h.natural = NOT_FIRING.format(h.family.matches)
    fitted.append(h)
    return []


VERDICTS = {  # (a loss fits, the outputs fire)
    (True, True): (
        "backdoored",
        "an attacker's own training loss fits, and the found trigger moves outputs onto one image",
    ),
    (True, False): ("undecided", "an attacker's own training loss fits, but the found trigger does not fire"),
    (False, True): (
        "undecided",
        "an attacker's training loss nearly fits, and the found trigger moves outputs onto one image",
    ),
    (False, False): ("clean", "no attacker's training loss fits"),
}
