"""What a detector returns: the triggers it inverted, its scores, and what the model did with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from elijah.diffusion import Model, Progress
from elijah.response import Response


@dataclass(frozen=True)
class Finding:
    """One hypothesis: a backdoor that starts at gamma e + trigger and ends at target.

    trigger [C, H, W]: what is added to the start noise. target [C, H, W] in [-1, 1], None where the method finds none;
    with distribution the mean of what is drawn. loss_ratio: the attacker's loss at this hypothesis over that of a clean
    network (1: clean, 0: fully backdoored). patch [1, H, W]: where response.gamma holds, 1 elsewhere; None: everywhere.
    """

    response: Response
    trigger: Tensor
    target: Tensor | None
    loss_ratio: float
    matches: str  # the published attack that responds like this
    distribution: bool = False
    patch: Tensor | None = None

    @property
    def gamma(self) -> Tensor:
        """The share of the noise that is left, a scalar or a map [1, H, W]."""
        gamma = torch.tensor(self.response.gamma)
        return gamma if self.patch is None else 1 - (1 - gamma) * self.patch

    def start(self, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return self.gamma.to(e.device) * e + self.trigger.to(e.device)


@dataclass(frozen=True)
class Evidence:
    """Samples [N, C, H, W] in the model's range from triggered start noise and from the same e, under one sampler.

    samples_without is None where a method does not draw any."""

    sampler: str
    samples_with: Tensor
    samples_without: Tensor | None


@dataclass(frozen=True)
class Threshold:
    """A score speaks for a backdoor when it is on this side of value."""

    value: float
    backdoored: Literal["below", "above"]


@dataclass(frozen=True)
class Detection:
    """Findings best first (also on a clean model: its best hypotheses), scores by name, evidence by sampler.

    verdict and reason: what the detector's documented fixed rule says; undecided where there is no rule.
    thresholds: the rule, by score. complete: false when a limit stopped the search.
    """

    detector: str
    findings: list[Finding]
    scores: dict[str, float]
    evidence: list[Evidence]
    verdict: str  # backdoored | clean | undecided
    reason: str
    complete: bool = True
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    coverage: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)


class Detector(Protocol):
    """A frozen dataclass of hyper-parameters. Told nothing but the model."""

    def __call__(self, model: Model, *, generator: torch.Generator, progress: Progress) -> Detection: ...
