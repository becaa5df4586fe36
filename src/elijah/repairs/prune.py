"""Pruning: switch off the channels that answer the trigger most, then fine-tune. A baseline.

The idea is that of Diff-Cleanse (2024): a backdoor sits in few channels, which the inverted trigger points out. Its
authors remove channels with a pruning library; here the convolutions' output channels are set to 0, and kept there,
with stock torch. How channels are ranked is ours: by how much the trigger changes their mean activation at t = T, in
units of the activation's own deviation over noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from elijah.detection import Finding
from elijah.diffusion import Model, Progress, column, no_progress
from elijah.repairs.finetune import FineTune


@dataclass(frozen=True)
class Prune(FineTune):
    """share: of all output channels of convolutions that are switched off; noises: that they are ranked by."""

    share: float = 0.05
    noises: int = 32

    def __call__(
        self,
        model: Model,
        findings: Sequence[Finding],
        images: Tensor,
        *,
        generator: torch.Generator,
        progress: Progress = no_progress,
        checkpoint: Path | None = None,
    ) -> Model:
        """A pruned and fine-tuned copy of model. images: clean or synthetic, uint8 [N, C, H, W]."""
        pruned = model.clone()
        found = self.ranked(pruned, findings, generator)
        worst = found[: round(self.share * len(found))]

        def switch_off(_: int, m: Model) -> None:
            modules = dict(m.network.named_modules())
            with torch.no_grad():
                for _change, name, channel in worst:
                    for parameter in modules[name].parameters():
                        parameter[channel] = 0

        switch_off(0, pruned)
        return self.tune(pruned, images, generator, progress, checkpoint, switch_off)

    @torch.no_grad()
    def ranked(
        self, model: Model, findings: Sequence[Finding], generator: torch.Generator
    ) -> list[tuple[float, str, int]]:
        """All output channels of convolutions but the network's last, those that answer a trigger most first.

        Each as (how much, module, channel); of several findings the largest answer counts.
        """
        e = model.noise(self.noises, generator)
        plain, stamped = activations(model, e), [activations(model, finding.start(e)) for finding in findings]
        ranks = []
        for name, before in plain.items():
            after = torch.stack([seen[name].mean(0) for seen in stamped])  # [findings, C]
            change = ((after - before.mean(0)).abs() / before.std(0).clamp(min=1e-6)).amax(0)
            ranks += [(value, name, channel) for channel, value in enumerate(change.tolist())]
        return sorted(ranks, reverse=True)


def activations(model: Model, start: Tensor) -> dict[str, Tensor]:
    """By convolution, but for the last: the mean of each output channel, [B, C], at t = T from start noise."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.mean((2, 3))}))
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Conv2d) and name != "conv_out"
    ]
    try:
        t = torch.full((len(start),), model.T - 1, device=start.device)
        model.eps(column(model.s, t) * start, t)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
