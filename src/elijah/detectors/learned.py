"""Collapse: the detector for learned triggers alone, with more outputs (collapse.py) than LossFit has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from elijah.detectors.collapse import Descent
from elijah.detectors.forgetting import Forgetting
from elijah.detectors.held import Held
from elijah.detectors.lossfit import LossFit
from elijah.detectors.search import Search


@dataclass(frozen=True)
class Collapse(LossFit):
    """Looks for faint and learned triggers alone, after LossFit, at one to five times its cost."""

    name: ClassVar[str] = "collapse"
    kinds: ClassVar[tuple[str, ...]] = ("ddpm",)
    not_covered: ClassVar[tuple[str, ...]] = (
        "triggers that are not faint, and those of other attacks: scan with lossfit first",
        "backdoors that are not triggered by the start noise",
    )  # fmt: skip
    search: Search = field(
        default_factory=lambda: Descent(shifted=256, rounds=3, targets=4, tries=3, kept=2, refinements=3)
    )
    late: Forgetting = field(default_factory=lambda: Forgetting(families=()))
    learned: Descent = field(default_factory=lambda: Descent(families=()))
    held: Held = field(default_factory=lambda: Held(descent=Descent(families=())))
