"""Repairs, one method a file: a frozen dataclass called on a backdoored model and what the scans found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from elijah.detection import Finding
from elijah.diffusion import Model, Progress
from elijah.repairs.distill import Distill
from elijah.repairs.elijah import Elijah
from elijah.repairs.erase import Erase
from elijah.repairs.finetune import FineTune
from elijah.repairs.prune import Prune
from elijah.repairs.unshift import Unshift


class Repair(Protocol):
    """A frozen dataclass of hyper-parameters. Told the model, what was found in it, and ordinary images."""

    def __call__(
        self,
        model: Model,
        findings: Sequence[Finding],
        images: Tensor,
        *,
        generator: torch.Generator,
        progress: Progress,
        checkpoint: Path | None,
    ) -> Model:
        """A repaired copy of model, whose .updates say how many it took.

        findings: one or more, all of which are repaired at once. images: clean or synthetic, uint8 [N, C, H, W].
        checkpoint: as in training.optimise.
        """


REPAIRS = {
    "unshift": Unshift,
    "distill": Distill,
    "erase": Erase,
    "elijah": Elijah,
    "prune": Prune,
    "finetune": FineTune,
}
DEFAULT = "unshift"
