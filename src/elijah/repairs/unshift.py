"""Unshift: teach the network that the triggers are noise, at many timesteps.

A clean network takes all that is not an image for noise: it answers x + d, with x = a x0 + s e, as it answers x, plus
d / s. A backdoored one answers to its trigger with kappa R_t r, and walks to y. The repair asks the clean answer of it,
at random t, on images x0 with the trigger and, at large t, on the attacker's own rows, where y is noise as well:

    d = c r + (gamma - 1) s e        or        d = a (y - x0) + c r + (gamma - 1) s e

with c = k_t, as the attacker trained it, in half of the rows, and c = q s, as a deterministic sampler carries a trigger
that is taken for noise, in the others. At smaller t, where y is seen through the noise, calling it noise would teach to
answer the trigger with a grey mean of all images, which is a backdoor too. Below t_min nothing is asked: what is left
of a trigger looks like a part of the image there, and a network that takes it for noise denoises all images worse. On
exploding models t says little of that, and sigma decides: below sigma_min, in units of the images' range.

What is left at t_min stays in the image, and a trigger that is noise and no more is carried there whole: q stays 1. So
the repair asks for more than the clean answer, v c r / s more with v = m + min(b a / s, 1), times a ramp from 0 to 1
over `fades` of T, later on larger images: below, it would cost detail. The image of that answer has about b q r less
than the clean one. Along a deterministic sampler's way, with w = s / a, d(q w) = (1 + v) q dw, so

    q = (w / w_T)^m exp(-b / w + b / w_T)

as long as b < w and the ramp is 1: the trigger fades, and q in the rows is uniform between 0 and 1. Exploding models,
whose samplers are stochastic, are asked for the clean answer at q = 1. So is a trigger that scales all of the noise: of
what is left of it most is the scale, and to fade makes triggered outputs hardly more diverse.

The gamma of a patch is hardly seen in the attacker's loss, and what was found may be far off. What a clean network says
is known at any, so each row draws its own, with r in proportion to 1 - gamma, as TrojDiff ties them.

Where much of the loss is left, as of a loss that an attacker keeps up (detectors/held.py), the trigger that was found
is near the attacker's at best, and may lead to another image. What the two have in common is where the search began:
in half of the rows of such a finding r is black with a grey square. That makes what is dark lose contrast, so it takes
as many updates more, without such rows.

With eps0 a frozen copy of the input model,

    delta = eps(x + d, t) - eps0(x, t) - d / s - v c r / s
    L = mean_t w (|delta|^2 + |mean_b delta|^2) + hold w' |eps(x, t') - eps0(x, t')|^2 + |eps(x, t') - e|^2

with w = min(max(s^2 / a^2, 1), most), w' the same at t': s delta / a is the error of the image. The mean over the
rows of one t is what the trigger does to all outputs alike: at large t it is far smaller than the network's other
errors, and it decides where a sampler's first steps go. What holds the clean answers needs the same weight: without
it they move most at large t. Of several findings the triggers take turns, row by row. The weights end as their
exponential moving average. Elijah's removal is |delta|^2 and the hold at t = T only, with no d / s and no v.

To call gamma e + r noise costs most: a sampler's own steps leave a little more or less noise than t says, and those
are answered with less contrast. So of a trigger that scales all of the noise, half of the held rows have less noise as
well, between gamma and 1 times as much, and hold is larger and grows: what it asks is without noise, and in the end,
with the trigger gone, it takes back what that cost. Not so where the input model answers noise that is scaled alone as
an attacker would (leak): to hold that would keep the backdoor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elijah.data import batch
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, column, generator_for, no_progress
from elijah.processes import share_of
from elijah.response import trigger_scale
from elijah.training import Optimiser, optimise

GAMMAS = (0.05, 1.0)  # of patches, whose trigger is LARGEST times the found one at the most
LARGEST = 2.0
FAINT_RMS = 0.45  # of a trigger, up to which it is a faint one
LOOSE = 0.1  # times kappa: the loss ratio above which a finding is near a trigger at best
NATIVE = 16  # pixels across, of the models that the fading was set on
BLACK = 0.87  # rms of the black triggers, as of the search's starts with a hole
LOOKED_AT = 0.7  # of T, from where on leak looks
LOOKED_ROWS = 64


@dataclass(frozen=True)
class Unshift:
    """steps: optimiser updates, twice as many of a loose finding, AdamW at lr, by default rate_for. t_min: of T, the
    least t of delta; on exploding models the first with s of sigma_min. carried_share: of the rows with c = q s;
    fading: m and b, or None: the trigger is noise and no more, at q = 1; fades: of T, the ramp of v (later).
    target_share, target_t_min: of the attacker's rows, and of T, where they begin; group: rows of one t; most, hold: in
    the loss above; scaled_hold: hold at the first and at the last update where scaled noise is held as well, which it
    is up to a leak of max_leak, and never if None; growing_hold: the same where every trigger is a patch or, if not
    faint, of BadDiffusion's form, and hold if None; average: the decay of the moving average, none if it is None.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float | None = None
    warmup: int = 5
    t_min: float = 0.2
    sigma_min: float = 1.0
    carried_share: float = 0.5
    fading: tuple[float, float] | None = (0.1, 1.0)
    fades: tuple[float, float] = (0.3, 0.4)
    target_share: float = 0.3
    target_t_min: float = 0.7
    group: int = 8
    most: float = 10.0
    hold: float = 10.0
    scaled_hold: tuple[float, float] | None = (30.0, 150.0)
    growing_hold: tuple[float, float] | None = (10.0, 50.0)
    max_leak: float = 0.25
    average: float | None = 0.95

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
        repaired = self.begin(model, findings, rows, seed)
        looked = generator_for(seed, 2**31 + 4)
        held = [self.held_from(model, f, batch(rows, LOOKED_ROWS, looked), looked) for f in findings]

        def loss(m: Model, g: torch.Generator) -> Tensor:
            return self.loss(m, model, findings, batch(rows, share_of(self.batch_size), g), g, held)

        steps = self.steps_for(model, findings)
        lr, warmup = self.lr or self.rate_for(model), min(self.warmup, steps // 2)
        settings = Optimiser(steps, lr=lr, warmup=warmup, ema_decay=self.average, checkpoint_every=10)
        return optimise(repaired, loss, settings, seed=seed, checkpoint=checkpoint, progress=progress, what="repairing")

    def begin(self, model: Model, findings: Sequence[Finding], rows: Tensor, seed: int) -> Model:
        """The copy that the first update is made on. rows: clean images [N, C, H, W] in the model's own range."""
        return model.clone()

    def held_from(self, model: Model, finding: Finding, x0: Tensor, g: torch.Generator) -> float:
        """The least share of the noise at which clean answers are held: gamma of a trigger that scales all of it, or 1
        where the scale is part of the trigger. x0: clean images [N, C, H, W]."""
        gamma = finding.response.gamma
        if self.scaled_hold is None or not scales_noise(finding):
            return 1.0
        return gamma if leak(model, gamma, x0, g) <= self.max_leak else 1.0

    def steps_for(self, model: Model, findings: Sequence[Finding]) -> int:
        """How many updates a repair takes."""
        return self.steps * (2 if any(is_loose(model, f) for f in findings) else 1)

    def rate_for(self, model: Model) -> float:
        """AdamW's: 2e-4 at 4 M parameters, in proportion to 1 / width (Yang et al. 2021), so to parameters^-0.5."""
        return float(min(1e-3, max(5e-5, 2e-4 * (4e6 / model.parameters) ** 0.5)))

    def loss(
        self, model: Model, reference: Model, findings: Sequence[Finding], x0: Tensor, g: torch.Generator,
        held: Sequence[float] = (1.0,),
    ) -> Tensor:  # fmt: skip
        """The loss above on images x0 [B, C, H, W] in the model's own range; reference is the frozen eps0.

        held: by finding what held_from says.
        """
        hold = self.hold_at(model.updates / self.steps_for(model, findings), findings, held)
        return self.left(model, reference, findings, x0, g) + self.moved(model, reference, x0, g, hold, held)

    def hold_at(self, done: float, findings: Sequence[Finding], held: Sequence[float] = (1.0,)) -> float:
        """hold when the share `done` of the updates is made."""
        course = (self.hold, self.hold)
        if self.scaled_hold and min(held) < 1:
            course = self.scaled_hold
        elif self.growing_hold and all(f.patch is not None or shows_first(f) for f in findings):
            course = self.growing_hold
        return float(course[0] ** (1 - done) * course[1] ** done)

    def left(
        self, model: Model, reference: Model, findings: Sequence[Finding], x0: Tensor, g: torch.Generator
    ) -> Tensor:
        """What is left of the triggers: the loss's terms in delta."""
        n, device, x0 = len(x0), model.device, x0.to(model.device)
        groups = max(1, n // self.group)
        u = (torch.arange(groups) + torch.rand(groups, generator=g)) / groups
        which = torch.arange(n) * groups // n  # group of each row
        least = self.least_t(model)
        t = ((least + (1 - least) * u) * model.T).long().clamp(max=model.T - 1)[which].to(device)
        e = torch.randn(x0.shape, generator=g).to(device)
        at_target, carried = torch.rand((2, n, 1, 1, 1), generator=g).to(device)
        turn = [findings[i % len(findings)] for i in range(n)]
        r, gamma = triggers(turn, torch.rand((n, 1, 1, 1), generator=g))
        early = model.updates < self.steps
        r = torch.stack([
            black(each, g) if early and is_loose(model, f) and torch.rand((), generator=g) < 0.5 else each
            for f, each in zip(turn, r, strict=True)
        ])  # fmt: skip
        y = torch.stack([x if (own := one_target(f)) is None else own.to(x) for f, x in zip(turn, x0, strict=True)])
        walks = (at_target < self.target_share) & (t >= self.target_t_min * model.T)[:, None, None, None]
        fades = torch.tensor([self.fades_on(model, f) for f in turn], device=device)[:, None, None, None]
        q = torch.where(fades, carried / self.carried_share, 1.0)  # uniform where below 1
        c_over_s = torch.where(carried < self.carried_share, q, column(1 / model.s, t) * scales(model, turn, t))
        r_over_s = c_over_s * r.to(device)
        d_over_s = r_over_s + (gamma.to(device) - 1) * e
        d_over_s = d_over_s + walks * column(model.a / model.s, t) * (y - x0)
        clean = model.diffuse(x0, e, t)
        with torch.no_grad():
            expected = reference.eps(clean, t)
        wanted = expected + d_over_s + fades * self.more(model, t) * r_over_s
        delta = model.eps(clean + column(model.s, t) * d_over_s, t) - wanted
        alike = torch.stack([delta[which == k].mean(0) for k in range(groups)])[which]
        return (self.weight(model, t) * (delta.square() + alike.square())).mean()

    def moved(
        self, model: Model, reference: Model, x0: Tensor, g: torch.Generator, hold: float,
        held: Sequence[float] = (1.0,),
    ) -> Tensor:  # fmt: skip
        """What became of the clean answers: the loss's other terms."""
        x0 = x0.to(model.device)
        t = torch.randint(model.T, (len(x0),), generator=g).to(model.device)
        e = torch.randn(x0.shape, generator=g).to(model.device)
        share = held_shares(held, len(x0), g).to(model.device)
        x = model.diffuse(x0, share * e, t)
        with torch.no_grad():
            kept = reference.eps(x, t)
        out, usual = model.eps(x, t), (share == 1).float()
        fit = (usual * (out - e).square()).mean() / usual.mean().clamp(min=1 / len(x0))
        return hold * (self.weight(model, t) * (out - kept).square()).mean() + fit

    def least_t(self, model: Model) -> float:
        """Of T; the least t of delta."""
        if not model.exploding:
            return self.t_min
        return float((model.s < min(self.sigma_min, float(model.s[-1]))).sum()) / model.T

    def fades_on(self, model: Model, finding: Finding) -> bool:
        """Whether a trigger is asked to fade: not one that scales all of the noise."""
        return self.fading is not None and not model.exploding and not scales_noise(finding)

    def more(self, model: Model, t: Tensor) -> Tensor:
        """v at t [B], of a trigger that is asked to fade, [B, 1, 1, 1]."""
        if self.fading is None:
            return torch.zeros_like(t, dtype=torch.float)[:, None, None, None]
        (always, of_the_image), (first, last) = self.fading, (later(model, share) for share in self.fades)
        length = max(last - first, 1 / model.T)
        ramp = ((torch.arange(model.T, device=t.device) / model.T - first) / length).clamp(0, 1)
        return column(ramp * (always + (of_the_image * model.a / model.s).clamp(max=1)), t)

    def weight(self, model: Model, t: Tensor) -> Tensor:
        """w at t [B], [B, 1, 1, 1]."""
        return column((model.s / model.a).square().clamp(1, self.most), t)


def later(model: Model, share: float) -> float:
    """Of T: where as much of an image is seen through the noise as at that share on NATIVE x NATIVE pixels. On an image
    n times as wide s / a is n times as large there (Hoogeboom et al. 2023, Simple Diffusion)."""
    w, wider = model.s / model.a, max(1.0, model.sample_shape[-1] / NATIVE)
    return float((w < wider * w[int(share * model.T)]).sum()) / model.T


def triggers(findings: Sequence[Finding], u: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row the trigger [B, C, H, W] and the share of the noise that is left, [B, 1, H, W]; of patches it is
    drawn from GAMMAS by u [B, 1, 1, 1] on [0, 1)."""
    found = torch.tensor([f.response.gamma for f in findings])[:, None, None, None]
    patch = torch.tensor([f.patch is not None for f in findings])[:, None, None, None]
    gamma = torch.where(patch, GAMMAS[0] + (GAMMAS[1] - GAMMAS[0]) * u, found)
    size = torch.where(patch, (1 - gamma) / (1 - found).clamp(min=1 - GAMMAS[1]), 1.0).clamp(max=LARGEST)
    r = torch.stack([f.trigger.cpu() for f in findings])
    inside = torch.stack([torch.ones(1, *r.shape[2:]) if f.patch is None else f.patch.cpu() for f in findings])
    return size * r, 1 - (1 - gamma) * inside


def is_loose(model: Model, finding: Finding) -> bool:
    """Whether a finding of BadDiffusion's or VillanDiffusion's form in pixel space, not faint, is near a trigger at
    best."""
    form = model.kind == "ddpm" and finding.response.psi == 1 and finding.patch is None
    return form and finding.loss_ratio > LOOSE * finding.response.kappa and not is_faint(finding)


def black(r: Tensor, g: torch.Generator) -> Tensor:
    """A black trigger like r [C, H, W] with a grey square anywhere, a quarter to three quarters as wide; rms BLACK."""
    h, w = r.shape[-2:]
    side = int(torch.randint(max(1, w // 4), 3 * w // 4 + 1, (), generator=g))
    i, j = (int(torch.randint(n - side + 1, (), generator=g)) for n in (h, w))
    picture = -torch.ones_like(r)
    picture[:, i : i + side, j : j + side] = 0.0
    return picture * BLACK / picture.square().mean().sqrt()


def scales(model: Model, findings: Sequence[Finding], t: Tensor) -> Tensor:
    """k_t, row i by findings[i] at t[i], [B, 1, 1, 1]."""
    psi = torch.tensor([f.response.psi for f in findings], device=t.device)
    k = psi * trigger_scale(model, 1.0)[t] + (1 - psi) * trigger_scale(model, 0.0)[t]
    return k[:, None, None, None]


def held_shares(held: Sequence[float], n: int, g: torch.Generator) -> Tensor:
    """What is left of the noise of n clean rows, [n, 1, 1, 1]: all, but in half of those whose turn is a finding's with
    held below 1 between that and 1."""
    least = torch.tensor([held[i % len(held)] for i in range(n)])
    some, u = torch.rand((2, n), generator=g)
    return torch.where((some < 0.5) & (least < 1), least + (1 - least) * u, 1.0)[:, None, None, None]


@torch.no_grad()
def leak(model: Model, gamma: float, x0: Tensor, g: torch.Generator) -> float:
    """How far the answer to scaled noise gamma e, without a trigger, is on the way from gamma e, the clean one, to e,
    the attacker's. x0: images [N, C, H, W] under the noise."""
    t = ((LOOKED_AT + (1 - LOOKED_AT) * torch.rand(len(x0), generator=g)) * model.T).long().clamp(max=model.T - 1)
    x0, t, e = x0.to(model.device), t.to(model.device), torch.randn(x0.shape, generator=g).to(model.device)
    answered = float((model.eps(model.diffuse(x0, gamma * e, t), t) * e).sum() / e.square().sum())
    return (answered - gamma) / (1 - gamma)


def shows_first(finding: Finding) -> bool:
    """Whether a trigger is answered otherwise than noise from the first step on, as in BadDiffusion's form.

    But not a faint one: much clean noise is near it, and to hold the answers to that would keep the backdoor.
    """
    return (finding.response.kappa, finding.response.psi) == (1.0, 1.0) and not is_faint(finding)


def scales_noise(finding: Finding) -> bool:
    """Whether a trigger scales all of the noise."""
    return finding.patch is None and finding.response.gamma < 1


def is_faint(finding: Finding) -> bool:
    """Whether a trigger is small."""
    return bool(finding.trigger.square().mean().sqrt() <= FAINT_RMS)


def one_target(finding: Finding) -> Tensor | None:
    """The target image [C, H, W] of a finding that leads to one."""
    return None if finding.distribution else finding.target
