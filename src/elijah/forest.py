"""A random forest that knows one attack: setting (b) of An et al., AAAI 2024, on any detector's scores.

It is trained on clean models and on models of one attack, all of one part of a zoo, and tested on the clean models and
the models of all other attacks of another part: does what tells one attack apart tell others? Each attack is the known
one in turn. Reads results as `elijah zoo run` writes them, JSON only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sklearn.ensemble import RandomForestClassifier

from elijah.calibrate import UNSUPPORTED, check_apart, read_results, share
from elijah.detectors.hypothesis import FAMILIES
from elijah.errors import ElijahError

# A detector's scores, in order, with what stands for one that a scan has not: what an ideal clean network shows.
FEATURES: dict[str, dict[str, float]] = {
    "lossfit": {
        **{f"loss_ratio_{family.name}": 1.0 for family in FAMILIES},
        **{"pull": 0.0, "shift_p": 1.0, "suspicion": 0.0},
    },
    "elijah": {"uniformity_lpips_alexnet": 1.0, "uniformity_pairwise_mse": 1.0, "total_variation": 0.0},
    "terd": {"kl_mean": 0.0, "kl_variance": 0.0},
}


@dataclass(frozen=True)
class Sample:
    """A model as the forest sees it."""

    attack: str
    features: list[float]


def features(scores: dict[str, float], detector: str) -> list[float]:
    """A scan's scores in the order of FEATURES. Raises ElijahError for a detector that has none there."""
    if detector not in FEATURES:
        raise ElijahError(f"a forest knows no scores of {detector}: use one of {', '.join(FEATURES)}")
    return [scores.get(name, fill) for name, fill in FEATURES[detector].items()]


def verdicts(train: list[Sample], test: list[Sample]) -> list[str]:
    """What a forest trained on one list says of each model of the other; always the same for the same lists."""
    if not test:
        return []
    forest = RandomForestClassifier(random_state=0)
    forest.fit([sample.features for sample in train], [sample.attack != "clean" for sample in train])
    return ["backdoored" if bad else "clean" for bad in forest.predict([sample.features for sample in test])]


def forest_table(folders: list[Path], detector: str, part: str, test: str) -> str:
    """Markdown, a row for each attack that a forest is trained on: what it finds of the others, and what it clears.

    Raises ElijahError where results cannot be read, where the two parts share an id, a base, a trigger or a target,
    and where one of them has no clean model that the detector scanned.
    """
    results = list(read_results(folders).values())
    check_apart(results, part, test)
    samples: dict[str, list[Sample]] = {}
    for name in (part, test):
        scans = [(r.model.attack, r.detections.get(detector, UNSUPPORTED)) for r in results if r.model.part == name]
        samples[name] = [Sample(a, features(s.scores, detector)) for a, s in scans if s.verdict != "unsupported"]
        if not any(sample.attack == "clean" for sample in samples[name]):
            raise ElijahError(
                f"no clean model of {name} was scanned by {detector}: elijah zoo run --detector does that"
            )
    heads = ("trained on", "clean + backdoored", "others found", "TPR, %", "95 %", "cleared", "TNR, %", "95 %",
             "known found")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for attack in sorted({s.attack for own in samples.values() for s in own} - {"clean"}):
        lines.append(f"| {attack} | {' | '.join(row(attack, samples[part], samples[test], part))} |")
    note = (
        f"Random forests on {detector}'s scores ({', '.join(FEATURES[detector])}), trained on clean models and models "
        f"of one attack of the part {part}, tested on the part {test}, with Wilson's intervals. Others: of all other "
        "attacks; known: of the attack that it was trained on."
    )
    return "\n".join([*lines, "", note, ""])


def row(attack: str, train: list[Sample], test: list[Sample], part: str) -> list[str]:
    """The cells after the attack's name."""
    clean, known = ([s for s in train if s.attack == name] for name in ("clean", attack))
    if not known:
        return [f"no model in {part}", *["-"] * 7]
    said = list(zip(test, verdicts([*clean, *known], test), strict=True))
    others = [verdict for sample, verdict in said if sample.attack not in ("clean", attack)]
    cleared = [verdict for sample, verdict in said if sample.attack == "clean"]
    same = [verdict for sample, verdict in said if sample.attack == attack]
    return [f"{len(clean)} + {len(known)}", *share(others, "backdoored"), *share(cleared, "clean"),
            share(same, "backdoored")[0]]  # fmt: skip
