"""Resist: Unshift, and against being taught the backdoor again.

After Unshift alone the weights lie near those of the backdoored network, and a few updates on poisoned data wake the
backdoor. So a simulated attacker runs along: from the repair's present weights theta he takes one update of AdamW after
another on the attacker's own loss with the found trigger and target (response.py), delta being how far he has got, and
starts afresh every attack_steps. The repair asks that the triggers are dead also where he has got to, theta + delta,

    L = 1/2 left(theta) + resist/2 left_late(theta + delta) + moved(theta),

with left and moved the terms of Unshift's loss, and the gradient by theta at a fixed delta: first-order meta-learning
(Finn et al., ICML 2017), as against the fine-tuning of language models (Tamirisa et al., ICLR 2025). left_late has
t >= 0.5 T, where outputs are decided, and mostly the attacker's own rows. The last updates are Unshift's alone.

The further the weights move the harder the attack, and the more clean samples move: hold is three times Unshift's. A
network that is pushed so far may take up another trigger than the found ones. So that it calls every shift noise, a
part of the rows of left(theta) is shifted by what nobody found: random colours and smooth patterns of any size up to
one and a half times the trigger's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import interpolate

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.processes import share_of
from elijah.repairs.unshift import Unshift, one_target, rate_for
from elijah.response import poisoned
from elijah.training import Optimiser, optimise


@dataclass(frozen=True)
class Resist(Unshift):
    """resist: how much the attacked weights count; attack_steps: updates of one attacker, by the repair's own rate.

    last: updates at the end without him. others: of the rows, those with a random shift. It never ends early:
    check_every is not used.
    """

    hold: float = 30.0
    resist: float = 0.5
    attack_steps: int = 20
    last: int = 80
    others: float = 0.3

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
        """A repaired copy of model. images: clean or synthetic, uint8 [N, C, H, W]."""
        rows = model.prepare(images)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        rate = self.lr or rate_for(model)
        attacker = Attacker(rate)
        late = replace(self, t_min=0.5, carried_share=0.2, target_share=0.7)
        alone = self.steps - self.last  # from here on

        def loss(m: Model, g: torch.Generator) -> Tensor:
            x0 = batch(rows, share_of(self.batch_size), g)
            turn = self.with_others(findings, len(x0), g)
            if m.updates >= alone:
                return self.loss(m, model, turn, x0, g)
            if m.updates % self.attack_steps == 0:
                attacker.start(m.network)
            half = len(x0) // 2
            finding = findings[m.updates // self.attack_steps % len(findings)]
            attacked = attacker.step(m, finding, x0[half:], g)
            left = self.left(m, model, turn[:half], x0[:half], g) + self.resist * late.left(
                attacked, model, findings, x0[half:], g
            )
            return left / 2 + self.moved(m, model, x0, g)

        settings = Optimiser(
            self.steps, lr=rate, warmup=min(self.warmup, self.steps // 2), checkpoint_every=self.attack_steps
        )  # an attacker's state is not kept: a killed repair goes on where one starts
        return optimise(
            model.clone(), loss, settings, seed=seed, checkpoint=checkpoint, progress=progress, what="repairing"
        )

    def with_others(self, findings: Sequence[Finding], n: int, g: torch.Generator) -> list[Finding]:
        """n findings, one a row: the found ones in turn, but for a share that have a random shift and no target."""
        turn = [findings[i % len(findings)] for i in range(n)]
        other = torch.rand(n, generator=g) < self.others
        return [other_shift(f, g) if random else f for f, random in zip(turn, other.tolist(), strict=True)]


def other_shift(finding: Finding, g: torch.Generator) -> Finding:
    """A colour and a smooth pattern in place of the trigger, at 0 to 1.5 of its root mean square; without a target."""
    c, h, w = finding.trigger.shape
    pattern = interpolate(torch.randn((1, c, 4, 4), generator=g), (h, w), mode="bilinear")[0]
    shift = torch.randn((c, 1, 1), generator=g) + torch.rand((), generator=g) * pattern
    size = 1.5 * torch.rand((), generator=g) * finding.trigger.square().mean().sqrt().cpu()
    shift = shift * size / shift.square().mean().sqrt()
    response = replace(finding.response, gamma=1.0)
    return replace(finding, trigger=shift.to(finding.trigger), target=None, response=response, patch=None)


@dataclass
class Attacker:
    """AdamW without decay on the attacker's loss; change: what his updates add to the weights, by name."""

    lr: float

    def start(self, network: torch.nn.Module) -> None:
        """From the network's present weights."""
        self.change = {
            name: torch.zeros_like(p).requires_grad_(p.requires_grad) for name, p in network.named_parameters()
        }
        self.trained = [c for c in self.change.values() if c.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.lr, weight_decay=0.0)

    def step(self, model: Model, finding: Finding, x0: Tensor, g: torch.Generator) -> Model:
        """One update, on as many rows as x0 [B, C, H, W]; the model at its weights plus the change, held fixed."""
        value = attack_loss(at(model, self.change), finding, x0.to(model.device), g)
        for change, gradient in zip(self.trained, torch.autograd.grad(value, self.trained), strict=True):
            change.grad = gradient
        self.optimizer.step()
        return at(model, {name: change.detach() for name, change in self.change.items()})


def at(model: Model, change: dict[str, Tensor]) -> Model:
    """The model at its weights plus the change; gradients reach both."""
    return replace(model, network=Changed(model.network, change))


class Changed(torch.nn.Module):
    """A network at other weights, its own plus change, without a copy of it."""

    def __init__(self, network: torch.nn.Module, change: dict[str, Tensor]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, *args: Any, **settings: Any) -> Any:
        moved = {name: p + self.change[name] for name, p in self.network.named_parameters()}
        return functional_call(self.network, moved, args, settings)


def attack_loss(model: Model, finding: Finding, x0: Tensor, g: torch.Generator) -> Tensor:
    """The attacker's loss with the found trigger at random t; where it leads to no one image, x0 are his targets."""
    y = x0 if (target := one_target(finding)) is None else target.to(x0)
    t = torch.randint(model.T, (len(x0),), generator=g).to(model.device)
    e = torch.randn(x0.shape, generator=g).to(model.device)
    x, answer = poisoned(model, finding.response, finding.trigger.to(e), y, e, t, finding.gamma.to(e))
    return (model.eps(x, t) - answer).square().mean()
