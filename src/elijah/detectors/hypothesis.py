"""What LossFit fits: a hypothesis of one family, the losses that judge it, and the noise they are taken over.

For a trigger r, a target y and a noise share gamma, in a family of responses (response.py),

    L(r, y, gamma) = sum_t |eps(x_t, t) - e - kappa R_t r|^2 / sum_t |(gamma - 1) e + (k_t / s - kappa R_t) r|^2

is near 1 on a clean network and near 0 at a backdoor. With a patch, r is 0 and gamma 1 outside it, and both sums are
over its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.diffusion import Model, column
from elijah.response import Response, poisoned, trigger_coefficient, trigger_scale

Draw = tuple[Tensor, Tensor]  # noise e [B, C, H, W] and timesteps t [B]


@dataclass(frozen=True)
class Start:
    """How a trigger begins. level: of a flat one, of the family's reach; without, it is random.

    by_mean: whether it minimises the batch's mean residual (search.py) in place of the loss ratio.
    """

    power: float = 1.5
    level: float | None = None
    lr: float = 0.1  # Adam's
    by_mean: bool = True


FLAT = (Start(0.0, -0.8, 0.25), Start(0.0, 0.8, 0.25))  # what stands out from a background needs no coarse gradient
COARSE, FINE = Start(), Start(0.0, lr=0.25)
WHOLE = tuple(Start(level=level, by_mean=False) for level in (-0.8, 0.8, None, None))


@dataclass(frozen=True)
class Family:
    """A family of responses, the share of T where it tells anything, and how its fit begins."""

    name: str
    response: Response
    window: tuple[float, float]  # of T; the fit's timesteps
    first_target: str  # the sampler whose outputs from e + r begin y; without one y begins as 0
    matches: str
    max_loss_ratio: float  # the fixed rule's threshold for a loss that fits
    max_if_fires: float  # and the laxer one for a loss whose trigger is seen to fire
    fits_gamma: bool = False
    starts: tuple[Start, ...] = (*FLAT, *(COARSE, FINE) * 3)
    start_window: tuple[float, float] = (0.8, 1.0)  # of T; where its starts look
    starts_with_y: bool = False  # whether y is fitted there too
    reach: float = 1.0  # the largest value of the trigger, of the model's range
    exploding: bool = False  # of variance-exploding models, else of preserving ones
    judged: tuple[tuple[float, float], ...] = ()  # of T; where the score is taken, the worst counts; else the window
    distribution: bool = False  # the target may be a distribution: outputs that only change are evidence too
    pixels: bool = False  # of models in pixel space alone

    @property
    def start_judged(self) -> tuple[float, float]:
        """Of T; where starts are compared."""
        return self.window if self.starts_with_y else self.start_window


REACH = 1.2  # r = REACH tanh(...) cut to [-1, 1]: so that -1, the usual background, is not at infinity
FAINT = 0.35  # a clean network fits strong triggers better than faint ones, which are therefore searched by themselves

HALF = Family("half", Response(1.0, 1.0), (0.4, 1.0), "ddpm-20", "BadDiffusion-like", 0.1, 0.2)
FULL = Family(  # at t = T it answers like a clean network; it shows where y is half hidden, so its starts fit y too
    "full", Response(2.0, 1.0), (0.15, 0.65), "ddim-10", "VillanDiffusion-ODE-like", 0.3, 0.3,
    starts=WHOLE, start_window=(0.45, 0.8), starts_with_y=True, judged=((0.15, 0.65), (0.6, 0.8)),
)  # fmt: skip
FAMILIES = (
    HALF,
    replace(
        HALF, name="half_faint", matches=HALF.matches + ", faint", judged=((0.45, 1.0),), max_loss_ratio=0.2,
        max_if_fires=0.2, reach=FAINT, starts=(*FLAT, COARSE, COARSE, FINE, FINE),
    ),
    FULL,
    replace(
        FULL, name="full_faint", matches=FULL.matches + ", faint", reach=FAINT, max_loss_ratio=0.55, max_if_fires=0.55
    ),
    Family(  # judged where the noise hides the target, which need not be one image
        "zero", Response(0.0, 0.0, 0.6), (0.15, 1.0), "ddpm-20", "TrojDiff-like", 0.2, 0.2, fits_gamma=True,
        starts=(COARSE,) * 8 + (Start(0.0, by_mean=False),) * 4, reach=0.5,
        judged=((0.7, 1.0),), distribution=True,
    ),
    Family(
        "patch", Response(0.0, 0.0, 0.1), (0.7, 1.0), "ddpm-20", "TrojDiff-like, in a patch", 0.4, 0.4, fits_gamma=True,
        distribution=True, pixels=True,
    ),
    Family(
        "ve", Response(1.0, 0.0), (0.3, 1.0), "", "VillanDiffusion-VE-like", 0.3, 0.3, exploding=True, reach=0.5,
    ),
)  # fmt: skip
LATENT_RANGE = 4.0  # latents have unit deviation


@dataclass
class Hypothesis:
    """What is being fitted, and how well it does.

    r = reach REACH tanh(coloured(u, power)) cut to [-reach, reach], y = tanh(w), both times scale; gamma = sigmoid(v).
    With a patch [1, H, W] of zeros and ones, r is 0 and gamma 1 outside it.

    With a power above 0, equal steps in u are large ones in the coarse structure of r and small ones in its finest.
    Without it the search ends in pixel noise on RGB networks, whose answers to fine patterns are the least exact.
    """

    family: Family
    power: float
    u: Tensor
    v: Tensor
    w: Tensor
    loss_ratio: float = float("inf")
    scale: float = 1.0  # of the model's own range: the largest value of r and y
    began: Start = COARSE
    patch: Tensor | None = None

    @property
    def strength(self) -> float:
        """loss_ratio over its family's threshold: below 1 it fits."""
        return self.loss_ratio / self.family.max_loss_ratio

    @property
    def fits(self) -> bool:
        """Whether the attacker's loss fits by itself."""
        return self.strength <= 1

    @property
    def nearly_fits(self) -> bool:
        """Whether it is worth more effort where the outputs say that it fires."""
        return self.loss_ratio <= 1.25 * self.family.max_if_fires

    @property
    def r(self) -> Tensor:
        wide = REACH * coloured(self.u, self.power).tanh()
        cut = wide + (wide.clamp(-1, 1) - wide).detach()  # lets gradients through
        r = self.scale * self.family.reach * cut
        return r if self.patch is None else r * self.patch

    @property
    def y(self) -> Tensor:
        return self.scale * self.w.tanh()

    def lead_to(self, y: Tensor, limit: float) -> None:
        """Makes y [C, H, W] the target; values beyond limit times the range are cut."""
        self.w = torch.atanh((y / self.scale).clamp(-limit, limit))

    def scaled(self, by: float) -> Hypothesis:
        """The same with by times the trigger."""
        wide = torch.atanh((by * self.r / self.scale / self.family.reach / REACH).clamp(-0.99, 0.99))
        return replace(self, u=coloured(wide, self.power, inverse=True), v=self.v.clone(), w=self.w.clone())

    @property
    def share(self) -> Tensor:
        """What is left of the noise where the trigger is, a scalar."""
        return torch.sigmoid(self.v) if self.family.fits_gamma else torch.ones_like(self.v)

    @property
    def gamma(self) -> Tensor:
        """The same everywhere: a scalar, with a patch a map [1, H, W]."""
        return self.share if self.patch is None else 1 - (1 - self.share) * self.patch

    def start(self, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return self.gamma * e + self.r


def spectrum(u: Tensor, power: float) -> Tensor:
    """Gains 1 / f^power at the frequencies of rfft2 [H, W / 2 + 1], flat below a period of 16 pixels; mean square 1."""
    h, w = u.shape[-2:]
    f = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.rfftfreq(w).square()).sqrt().clamp(min=1 / 16)
    gain = f**-power
    return (gain / gain.square().mean().sqrt()).to(u.device)


def coloured(u: Tensor, power: float, *, inverse: bool = False) -> Tensor:
    """u [C, H, W] filtered by spectrum: white noise gets, with power 1.5, about the spectrum of natural images.

    inverse: what gives u when it is filtered.
    """
    gain = spectrum(u, power)
    return torch.fft.irfft2(torch.fft.rfft2(u) * (1 / gain if inverse else gain), s=u.shape[-2:])


def antithetic(model: Model, n: int, low: float, high: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n / 2 pairs (e, -e) [n, C, H, W] at equal t [n], stratified over low T ... high T."""
    half = n // 2
    t = (low + (high - low) * (torch.arange(half) + torch.rand(half, generator=generator)) / half) * model.T
    e = torch.randn((half, *model.sample_shape), generator=generator).to(model.device)
    t = t.long().clamp(max=model.T - 1).to(model.device)
    return torch.cat([e, -e]), torch.cat([t, t])


def clean_answer(model: Model, response: Response, r: Tensor, gamma: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """What a clean network's answer differs by from the attacker's, [B, C, H, W]: the denominator of L."""
    per_t = trigger_scale(model, response.psi) / model.s - response.kappa * trigger_coefficient(model)
    return (gamma - 1) * e + column(per_t, t) * r


def errors(model: Model, group: list[Hypothesis], draws: list[Draw]) -> list[tuple[Tensor, Tensor]]:
    """For each hypothesis, [B, C, H, W]: what the network's answer is off the attacker's, and a clean one's would be.

    draws: the noise and timesteps of each. The network is called once. With a patch, both are 0 outside it.
    """
    made = [poisoned(model, h.family.response, h.r, h.y, e, t, h.gamma) for h, (e, t) in zip(group, draws, strict=True)]
    out = model.eps(torch.cat([x for x, _ in made]), torch.cat([t for _, t in draws]))
    found = []
    for h, (e, t), rows, (_, answer) in zip(group, draws, out.split([len(e) for e, _ in draws]), made, strict=True):
        inside = 1.0 if h.patch is None else h.patch
        found.append(((rows - answer) * inside, clean_answer(model, h.family.response, h.r, h.gamma, e, t) * inside))
    return found


def ratio(error: Tensor, null: Tensor) -> Tensor:
    """L of the module's docstring."""
    return error.square().sum() / null.square().sum().clamp(min=1e-12)


def steadiness(error: Tensor, e: Tensor) -> Tensor:
    """|half the difference of the errors of e and -e|^2 / |e|^2, over antithetic pairs: near 0 where noise is seen.

    Far from all data a network answers with little of the noise, whatever the trigger: that is no backdoor.
    """
    half = len(e) // 2
    return ((error[:half] - error[half:]) / 2).square().sum() / e[:half].square().sum()
