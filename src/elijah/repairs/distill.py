"""Distill: the network is made half of noise, and is taught the input model's clean answers again.

After Unshift the weights lie near those of the backdoored network, and a few updates on poisoned data wake the
backdoor. What a network's outputs were taught to hide its weights go on to know; a network that learns from outputs
alone does not learn it (Lee et al., Distillation Robustifies Unlearning, NeurIPS 2025). So the repair starts from

    theta' = kept theta + (1 - kept^2)^(1/2) std(theta) n,    n ~ N(0, 1),

in every weight of two or more dimensions, of a variance as before, and minimises Unshift's loss, whose teacher eps0 is
the input model without noise: it answers for images without a trigger, and for those with one as if the trigger were
noise. The smaller kept is, the less of the backdoor is left, and the more updates the clean answers take to return.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elijah.diffusion import Model, generator_for
from elijah.repairs.unshift import Unshift


@dataclass(frozen=True)
class Distill(Unshift):
    """kept: how alike the weights of the first update are to the input model's, as a correlation.

    Its rate is higher than Unshift's, and it does not end early: the clean answers need all updates.
    """

    steps: int = 400
    check_every: int = 0
    kept: float = 0.7

    def begin(self, model: Model, seed: int) -> Model:
        """theta' of the module's docstring, with noise by seed."""
        copy, g = model.clone(), generator_for(seed, 2**31 + 3)
        with torch.no_grad():
            for p in copy.network.parameters():
                if p.dim() > 1:
                    n = torch.randn(p.shape, generator=g).to(p)
                    p.mul_(self.kept).add_(n * p.std() * ((1 - self.kept**2) ** 0.5 / self.kept))
        return copy

    def rate_for(self, model: Model) -> float:
        """Three times Unshift's: the weights have far to go."""
        return 3 * super().rate_for(model)
