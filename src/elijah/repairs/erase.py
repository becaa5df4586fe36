"""Erase: what the triggers move in the network is taken out of its weights, which learn the clean answers again.

After Unshift the network still sees its triggers, and a few updates on poisoned data teach it again what to answer
them. So for the input h of each layer, pixel by pixel, over the attacker's rows x' and clean x with equal noise,

    S = E[h h^T],    D = E[(h' - h) (h' - h)^T],    D v_i = lambda_i S v_i,    v_i^T S v_j = 1 if i = j, else 0:

v_i^T h are the coordinates of h, independent and of unit size on clean images, and lambda_i says how far the triggers
move each. The share of them with the largest lambda is erased from what the layer sees, and the rest kept as it is,

    W' = W (1 - sum_i S v_i v_i^T),

which is the projection of LEACE (Belrose et al., NeurIPS 2023) with other directions. Then Unshift's loss follows, as
in Distill: the weights have far to go. Left out are the first layer, which sees the noise itself, the last, which all
of the answer passes, and those that see t alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, generator_for
from elijah.repairs.distill import Relearn
from elijah.repairs.unshift import one_target, scales, triggers

OUTER = ("conv_in", "conv_out")
RIDGE = 1e-4  # of S's mean diagonal, added to it: some coordinates, or all of a layer's, are not used


@dataclass(frozen=True)
class Erase(Relearn):
    """share: of the coordinates that each layer loses. pairs: of rows that they are measured on."""

    share: float = 0.3
    pairs: int = 192

    def begin(self, model: Model, findings: Sequence[Finding], rows: Tensor, seed: int) -> Model:
        """A copy whose layers do not see the triggers; rows: clean images [N, C, H, W] in the model's own range."""
        copy, g = model.clone(), generator_for(seed, 2**31 + 5)
        for layer, (seen, moved) in self.moments(copy, findings, rows, g).items():
            weight = layer.weight.data
            kept = erasing(seen, moved, round(self.share * len(seen))).to(weight)
            layer.weight.data = torch.einsum("oi...,ij->oj...", weight, kept).contiguous()
        return copy

    @torch.no_grad()
    def moments(
        self, model: Model, findings: Sequence[Finding], rows: Tensor, g: torch.Generator
    ) -> dict[nn.Conv2d | nn.Linear, tuple[Tensor, Tensor]]:
        """By layer S and D, each [C, C], summed over the rows and their pixels."""
        seen: dict[nn.Conv2d | nn.Linear, list[Tensor]] = {}

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            h = inputs[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs[0]
            if h.dim() > 2:  # else it sees t alone
                seen.setdefault(layer, []).append(h.float().flatten(0, -2))

        hooks = [
            layer.register_forward_hook(look)
            for name, layer in model.network.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and name not in OUTER
        ]
        sums: dict[nn.Conv2d | nn.Linear, tuple[Tensor, Tensor]] = {}
        try:
            for left in range(self.pairs, 0, -self.batch_size):
                clean, triggered, t = self.pair(model, findings, batch(rows, min(left, self.batch_size), g), g)
                model.eps(clean, t)
                before = {layer: torch.cat(parts) for layer, parts in seen.items()}
                seen.clear()
                model.eps(triggered, t)
                for layer, h in before.items():
                    moved = torch.cat(seen[layer]) - h
                    old = sums.get(layer, (0.0, 0.0))
                    sums[layer] = (old[0] + (h.T @ h).double(), old[1] + (moved.T @ moved).double())
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    def pair(
        self, model: Model, findings: Sequence[Finding], x0: Tensor, g: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean rows and the attacker's [N, C, H, W], row by row of another finding, with equal e and t, and t [N].

        The attacker's are all at the target: what leads there is to be erased as well.
        """
        n, least = len(x0), self.least_t(model)
        t = ((least + (1 - least) * torch.rand(n, generator=g)) * model.T).long().clamp(max=model.T - 1)
        e, turn = torch.randn(x0.shape, generator=g), [findings[i % len(findings)] for i in range(n)]
        r, gamma = triggers(turn, torch.rand((n, 1, 1, 1), generator=g))
        y = torch.stack([x if (own := one_target(f)) is None else own.to(x) for f, x in zip(turn, x0, strict=True)])
        x0, y, r, gamma, e, t = (x.to(model.device) for x in (x0, y, r, gamma, e, t))
        return model.diffuse(x0, e, t), model.diffuse(y, gamma * e, t) + scales(model, turn, t) * r, t


def erasing(seen: Tensor, moved: Tensor, n: int) -> Tensor:
    """The projection [C, C] that takes from an input the n coordinates that are moved most, by S and D of the module's
    docstring, [C, C] each."""
    one = torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
    seen = seen + RIDGE * seen.diagonal().mean().clamp(min=1e-6) * one
    inverse = torch.linalg.inv(torch.linalg.cholesky(seen))
    directions = torch.linalg.eigh(inverse @ moved @ inverse.T).eigenvectors  # by rising lambda
    v = inverse.T @ directions[:, len(seen) - n :]
    return one - seen @ v @ v.T
