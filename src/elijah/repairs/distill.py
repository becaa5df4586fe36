"""Distill: the deeper levels of the network are made noise, and learn the input model's clean answers again.

After Unshift the weights lie near those of the backdoored network, and a few updates on poisoned data wake the
backdoor. What a network's outputs were taught to hide its weights go on to know; a network that learns from outputs
alone does not learn it (Lee et al., Distillation Robustifies Unlearning, NeurIPS 2025). So the repair starts from

    theta' = kept theta + (1 - kept^2)^(1/2) std(theta) n,    n ~ N(0, 1),

in every weight of two or more dimensions, of a variance as before, and minimises Unshift's loss, whose teacher eps0 is
the input model without noise: it answers for images without a trigger, and for those with one as if the trigger were
noise. kept falls with the level of the U-Net. At full resolution all is kept: what is fine in an image is decided there
and would take a whole training to return; what tells a trigger from noise is mostly below, and returns in few updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elijah.detection import Finding
from elijah.diffusion import Model, generator_for
from elijah.repairs.unshift import Unshift


@dataclass(frozen=True)
class Relearn(Unshift):
    """Unshift from other weights, by begin: more updates at a higher rate, which the clean answers need.

    The trigger is noise and no more, scaled noise is not held, hold does not grow, and no average is taken: so Distill
    and Erase were measured.
    """

    steps: int = 400
    fading: tuple[float, float] | None = None
    scaled_hold: tuple[float, float] | None = None
    growing_hold: tuple[float, float] | None = None
    average: float | None = None

    def rate_for(self, model: Model) -> float:
        """Three times Unshift's: the weights have far to go."""
        return 3 * super().rate_for(model)


@dataclass(frozen=True)
class Distill(Relearn):
    """kept: by level of the U-Net, how alike the first update's weights are to the input model's, as a correlation.

    The last is that of all deeper levels.
    """

    kept: tuple[float, ...] = (1.0, 0.7, 0.1)

    def begin(self, model: Model, findings: Sequence[Finding], rows: Tensor, seed: int) -> Model:
        """theta' of the module's docstring, with noise by seed."""
        copy, g = model.clone(), generator_for(seed, 2**31 + 3)
        with torch.no_grad():
            for level, block in blocks(copy.network):
                kept = self.kept[min(level, len(self.kept) - 1)]
                for p in block.parameters():
                    if p.dim() > 1:
                        n = p.std() * torch.randn(p.shape, generator=g).to(p)
                        p.mul_(kept).add_((1 - kept**2) ** 0.5 * n)
        return copy


def blocks(network: Any) -> Iterator[tuple[int, torch.nn.Module]]:
    """The blocks of a UNet2DModel, each with its level: 0 at full resolution, 1 at half of it."""
    deepest = len(network.down_blocks) - 1
    yield from enumerate(network.down_blocks)
    if network.mid_block is not None:
        yield deepest, network.mid_block
    for k, block in enumerate(network.up_blocks):
        yield deepest - k, block
