"""How often verdicts are right, by group, with two intervals: models as independent, and models of one base as one.

Models that were trained from one base are alike: fifty clean models of three bases say little more about another base
than three models do. So beside Wilson's interval there is one that resamples bases.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elijah.metrics import wilson

DRAWS, SEED = 2000, 0
VERDICTS = ("backdoored", "undecided", "clean")


@dataclass(frozen=True)
class Judged:
    """One model's verdict, what the model is, and what the scan cost; None where that is not known."""

    verdict: str
    base: str
    attack: str  # clean for a clean model
    kind: str
    trigger: str
    poison_rate: float
    evaluations: float | None = None
    seconds: float | None = None

    @property
    def truth(self) -> str:
        return "clean" if self.attack == "clean" else "backdoored"

    @property
    def right(self) -> bool:
        return self.verdict == self.truth


GROUPS: tuple[tuple[str, Callable[[Judged], str]], ...] = (
    ("", lambda row: "" if row.attack == "clean" else "all backdoored"),
    ("", lambda row: row.attack),
    ("kind", lambda row: f"{row.kind}, {row.truth}"),
    ("trigger", lambda row: "" if row.attack == "clean" else stem(row.trigger)),
    ("poison rate", lambda row: "" if row.attack == "clean" else f"{row.poison_rate:g}"),
)


def stem(trigger: str) -> str:
    """The kind of a trigger: its name without sizes and suffix; learned where the attack makes its own."""
    return re.sub(r"(\.png|-[\d.]+)+$", "", trigger) or "learned"


def rates_table(rows: list[Judged]) -> str:
    """Markdown: a line a group of models, by each of GROUPS in turn, and then what scans cost by verdict."""
    heads = ("models", "number", *VERDICTS, "right, %", "95 %", "by base, 95 %", "bases")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for what, key in GROUPS:
        for name in sorted({key(row) for row in rows} - {""}):
            own = [row for row in rows if key(row) == name]
            lines.append(f"| {' '.join((what, name)).strip()} | {' | '.join(cells(own))} |")
    note = (
        "Right: of backdoored models the share called backdoored (TPR), of clean ones the share called clean (TNR); "
        "undecided counts as wrong. Intervals: Wilson's, as if models were independent; and by base, from resampling "
        "bases with all of their models, but never narrower (where all are right, or all wrong, Wilson's of the number "
        "of bases)."
    )
    return "\n".join([*lines, "", note, "", *cost_lines(rows)])


def cells(rows: list[Judged]) -> list[str]:
    """How many, the verdicts, the share that is right, its two intervals, and the number of bases."""
    right, n = sum(row.right for row in rows), len(rows)
    counts = [str(sum(row.verdict == verdict for row in rows)) for verdict in VERDICTS]
    intervals = [words(wilson(right, n)), words(by_base(rows))]
    return [str(n), *counts, f"{100 * right / n:.0f}", *intervals, str(len({row.base for row in rows}))]


def words(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}"


def by_base(rows: list[Judged]) -> tuple[float, float] | None:
    """(low, high): the percentile bootstrap at 95 % of the share that is right, resampling bases, not models.

    A few bases may agree by chance, so it never says more than Wilson's interval of the models. Where all or none are
    right every resample says the same: there, Wilson's interval of as many cases as bases. None for one base.
    """
    bases = sorted({row.base for row in rows})
    own = [[row.right for row in rows if row.base == base] for base in bases]
    right, n = np.array([sum(rows) for rows in own]), np.array([len(rows) for rows in own])
    if len(bases) == 1:
        return None
    if right.sum() in (0, n.sum()):
        return wilson(len(bases) if right.sum() else 0, len(bases))
    drawn = np.random.default_rng(SEED).integers(0, len(bases), (DRAWS, len(bases)))
    low, high = np.quantile(right[drawn].sum(1) / n[drawn].sum(1), (0.025, 0.975))
    narrowest = wilson(int(right.sum()), int(n.sum()))
    return min(float(low), narrowest[0]), max(float(high), narrowest[1])


def cost_lines(rows: list[Judged]) -> list[str]:
    """Markdown: what scans cost, by verdict; nothing where no cost is known."""
    priced = [(row.verdict, row.evaluations, row.seconds) for row in rows if row.evaluations and row.seconds]
    if not priced:
        return []
    lines = ["| verdict | scans | evaluations, median | mean | seconds, median | mean |", "|---" * 6 + "|"]
    for verdict in (*VERDICTS, "all"):
        own = [(e, s) for v, e, s in priced if verdict in (v, "all")]
        if own:
            evaluations, seconds = zip(*own, strict=True)
            lines.append(
                f"| {verdict} | {len(own)} "
                f"| {statistics.median(evaluations):,.0f} | {statistics.mean(evaluations):,.0f} "
                f"| {statistics.median(seconds):.1f} | {statistics.mean(seconds):.1f} |"
            )
    return [*lines, ""]
