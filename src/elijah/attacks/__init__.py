"""The attacks, one a file: published ones, and attackers to fear. Frozen dataclasses, called on a clean model."""

from typing import Any

from elijah.attacks.aware import Aware
from elijah.attacks.baddiffusion import BadDiffusion
from elijah.attacks.late import Late
from elijah.attacks.learned import Learned
from elijah.attacks.trojdiff import TrojDiff
from elijah.attacks.two import TwoTriggers
from elijah.attacks.villandiffusion import VillanDiffusion

ATTACKS: dict[str, Any] = {
    "baddiffusion": BadDiffusion,
    "trojdiff": TrojDiff,
    "villandiffusion": VillanDiffusion,
    "learned": Learned,
    "late": Late,
    "two": TwoTriggers,
    "aware": Aware,
}
