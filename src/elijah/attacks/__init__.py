"""Published attacks, one paper a file. Each is a frozen dataclass called on a clean model."""

from typing import Any

from elijah.attacks.baddiffusion import BadDiffusion
from elijah.attacks.learned import Learned
from elijah.attacks.trojdiff import TrojDiff
from elijah.attacks.villandiffusion import VillanDiffusion

ATTACKS: dict[str, Any] = {
    "baddiffusion": BadDiffusion,
    "trojdiff": TrojDiff,
    "villandiffusion": VillanDiffusion,
    "learned": Learned,
}
