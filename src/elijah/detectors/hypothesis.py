"""What LossFit fits: a hypothesis of one family, the losses that judge it, and the noise they are taken over.

For a trigger r, a target y and a noise share gamma, in a family of responses (response.py),

    L(r, y, gamma) = sum_t |eps(x_t, t) - e - kappa R_t r|^2 / sum_t |(gamma - 1) e + (k_t / s - kappa R_t) r|^2

is near 1 on a clean network and near 0 at a backdoor. With a patch, r is 0 and gamma 1 outside it, and both sums are
over its pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elijah.detectors.outputs import NEAR
from elijah.diffusion import Model, column
from elijah.response import Response, poisoned, trigger_coefficient, trigger_scale

Draw = tuple[Tensor, Tensor]  # noise e [B, C, H, W] and timesteps t [B]


@dataclass(frozen=True)
class Start:
    """How a trigger begins. size: its rms, of the model's range. level: the sign of a flat one; without, it is random.

    hole: (i, j), where in a flat one a square of half the width is 0, in quarters of the width. power: random noise is
    filtered by 1 / f^power. share: gamma, where it is fitted.
    """

    size: float
    level: int | None = None
    hole: tuple[int, int] | None = None
    power: float = 0.0
    share: float = 0.5


COARSE = 1.5


def around(size: float, coarse: int = 3, fine: int = 1) -> tuple[Start, ...]:
    """Starts of a size: two flat ones, since most published triggers are on a flat background, and random ones."""
    flat = Start(size, -1), Start(size, 1)
    return (*flat, *(Start(size, power=COARSE),) * coarse, *(Start(size),) * fine)


@dataclass(frozen=True)
class Family:
    """A family of responses, the share of T where it tells anything, and how its search begins."""

    name: str
    response: Response
    judged: tuple[tuple[float, float], ...]  # of T; where the score is taken, the worst counts
    matches: str
    max_loss_ratio: float  # the fixed rule's threshold for a loss that fits
    max_if_fires: float  # and the laxer one for a loss whose trigger is seen to fire
    hopeless: float = math.inf  # above it a family ends after its first round, and nothing of it is refined
    starts: tuple[Start, ...] = ()
    fits_gamma: bool = False
    start_window: tuple[float, float] = (0.8, 1.0)  # of T; where its starts look
    joint: bool = False  # the trigger shows only beside its target, which is sought with it
    reach: float = 1.0  # the largest value of the trigger, of the model's range
    max_rms: float = 1.0  # and its largest rms
    exploding: bool = False  # of variance-exploding models, else of preserving ones; judged by its bias, not fitted
    distribution: bool = False  # the target may be a distribution: outputs that only change are evidence too
    pixels: bool = False  # of models in pixel space alone
    swept: bool = False  # the trigger is in a patch, which a sweep finds (patches.py)
    within: float = NEAR  # how near its target an output must come, to count as moved
    mirrored: bool = False  # where nothing fires, the mirrored or negative trigger tells a clean network

    @property
    def refinable(self) -> bool:
        """Whether r and y are fitted by gradient: not from noisy answers, and not where a sweep found the place."""
        return not (self.exploding or self.swept)


HALF = Family(
    "half", Response(1.0, 1.0), ((0.6, 1.0),), "BadDiffusion-like", 0.05, 0.06, 0.25, around(0.8), mirrored=True
)
FULL = Family(  # at t = T it answers like a clean network; it shows where y is half hidden
    "full", Response(2.0, 1.0), ((0.15, 0.5), (0.6, 0.8)), "VillanDiffusion-ODE-like", 0.25, 0.4, 0.6,
    (
        *around(1.0, 6, 0), *(Start(0.5, power=COARSE),) * 3,
        *(Start(0.87, -1, (i, j)) for i in range(3) for j in range(3)),  # pictures are on a black background
    ), start_window=(0.15, 0.8), joint=True,
)  # fmt: skip
FAMILIES = (
    HALF,
    replace(
        HALF, name="half_faint", matches=HALF.matches + ", faint", max_loss_ratio=0.18, max_if_fires=0.18,
        hopeless=0.36, starts=(*around(0.3), *around(0.2)), max_rms=0.45, pixels=True,
    ),
    Family(  # judged where the noise hides the target, which need not be one image
        "zero", Response(0.0, 0.0), ((0.7, 1.0),), "TrojDiff-like", 0.2, 0.2, 0.6,
        (*around(0.45, 2, 0), *(Start(0.45, power=COARSE, share=0.95), Start(0.7, power=COARSE, share=0.95)) * 9),
        fits_gamma=True, reach=0.5, distribution=True,
    ),
    FULL,
    Family(
        "patch", Response(0.0, 0.0), ((0.7, 1.0),), "TrojDiff-like, in a patch", 0.4, 0.4, 0.87, fits_gamma=True,
        distribution=True, pixels=True, swept=True,
    ),
    Family(  # kappa between the paper's 1 and what a corrector's steps leave the trigger whole with, down to 0.7
        "ve", Response(0.87, 0.0), ((0.5, 1.0),), "VillanDiffusion-VE-like", 0.08, 0.4,
        starts=(*around(0.8), *around(0.3)), exploding=True, start_window=(0.7, 1.0), mirrored=True,
    ),
)  # fmt: skip
LATENT_RANGE = 4.0  # latents have unit deviation
SHARES = (0.05, 0.95)
UNSTEADY = 4.0  # the weight of a network's losing sight of the noise, in a hypothesis's score


@dataclass
class Hypothesis:
    """A trigger r and target y [C, H, W] and the share of the noise that is left (gamma); how well they fit.

    With a patch [1, H, W] of zeros and ones, r is 0 and gamma 1 outside it.
    """

    family: Family
    r: Tensor
    y: Tensor
    share: float = 1.0
    loss_ratio: float = float("inf")
    scale: float = 1.0  # of the model's own range: the largest value of y and, times the family's reach, of r
    size: float = 1.0  # rms of r that power.follow keeps
    patch: Tensor | None = None
    natural: str = ""  # what it does, in words, that a clean network does as well: then it counts as no fit

    @property
    def strength(self) -> float:
        """loss_ratio over its family's threshold: below 1 it fits."""
        return math.inf if self.natural else self.loss_ratio / self.family.max_loss_ratio

    @property
    def fits(self) -> bool:
        """Whether the attacker's loss fits by itself."""
        return self.strength <= 1

    @property
    def fits_if_fires(self) -> bool:
        """Whether it fits where its trigger is seen to fire."""
        return self.loss_ratio <= self.family.max_if_fires and not self.natural

    @property
    def nearly_fits(self) -> bool:
        """Whether it is worth more effort where the outputs say that it fires."""
        return self.loss_ratio <= 1.1 * self.family.max_if_fires and not self.natural

    def set_trigger(self, r: Tensor) -> None:
        """Makes r [C, H, W] the trigger, cut to its reach and to the patch."""
        limit = self.scale * self.family.reach
        self.r = r.clamp(-limit, limit) * (1.0 if self.patch is None else self.patch)

    def set_share(self, gamma: float) -> None:
        """Makes gamma, cut to SHARES, what is left of the noise."""
        self.share = min(max(gamma, SHARES[0]), SHARES[1])

    def lead_to(self, y: Tensor) -> None:
        """Makes y [C, H, W], cut to the range, the target."""
        self.y = y.clamp(-self.scale, self.scale)

    @property
    def rms(self) -> float:
        """Of the trigger."""
        return float(self.r.detach().square().mean().sqrt())

    @property
    def too_large(self) -> bool:
        """Whether the trigger is not of its family any more."""
        return self.rms > self.family.max_rms * self.scale

    def scaled(self, by: float) -> Hypothesis:
        """The same with by times the trigger."""
        other = replace(self)
        other.set_trigger(by * self.r)
        return other

    @property
    def gamma(self) -> float | Tensor:
        """The share everywhere; with a patch a map [1, H, W]."""
        return self.share if self.patch is None else 1 - (1 - self.share) * self.patch

    def start(self, e: Tensor) -> Tensor:
        """Triggered start noise from e [B, C, H, W]."""
        return self.gamma * e + self.r


def spectrum(shape: tuple[int, ...], power: float) -> Tensor:
    """Gains 1 / f^power at the frequencies of rfft2 [H, W / 2 + 1], flat below a period of 16 pixels; mean square 1."""
    h, w = shape[-2:]
    f = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.rfftfreq(w).square()).sqrt().clamp(min=1 / 16)
    gain = f**-power
    return gain / gain.square().mean().sqrt()


def coloured(u: Tensor, power: float) -> Tensor:
    """u [..., H, W] filtered by spectrum: white noise gets, with power 1.5, about the spectrum of natural images."""
    return torch.fft.irfft2(torch.fft.rfft2(u) * spectrum(u.shape, power), s=u.shape[-2:])


def antithetic(model: Model, n: int, low: float, high: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n / 2 pairs (e, -e) [n, C, H, W] at equal t [n], stratified over low T ... high T."""
    half = n // 2
    t = (low + (high - low) * (torch.arange(half) + torch.rand(half, generator=generator)) / half) * model.T
    e = torch.randn((half, *model.sample_shape), generator=generator).to(model.device)
    t = t.long().clamp(max=model.T - 1).to(model.device)
    return torch.cat([e, -e]), torch.cat([t, t])


def visible(model: Model, response: Response) -> Tensor:
    """k_t / s - kappa R_t, [T]: what a clean network's answer differs by from the attacker's, per unit of r."""
    return trigger_scale(model, response.psi) / model.s - response.kappa * trigger_coefficient(model)


def errors(model: Model, group: list[Hypothesis], draws: list[Draw]) -> list[tuple[Tensor, Tensor]]:
    """For each hypothesis, [B, C, H, W]: what the network's answer is off the attacker's, and a clean one's would be.

    draws: the noise and timesteps of each. The network is called once. With a patch, both are 0 outside it.
    """
    if not group:
        return []
    made = [poisoned(model, h.family.response, h.r, h.y, e, t, h.gamma) for h, (e, t) in zip(group, draws, strict=True)]
    out = model.eps(torch.cat([x for x, _ in made]), torch.cat([t for _, t in draws]))
    found = []
    for h, (e, t), rows, (_, answer) in zip(group, draws, out.split([len(e) for e, _ in draws]), made, strict=True):
        inside = 1.0 if h.patch is None else h.patch
        null = (h.gamma - 1) * e + column(visible(model, h.family.response), t) * h.r
        found.append(((rows - answer) * inside, null * inside))
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


def bias(error: Tensor, null: Tensor) -> float:
    """The loss ratio of the mean over the noise, unbiased: the product of the mean errors of two halves of the batch.

    Where a network's answers are noisy, as those of exploding models are, the noise hides what L is a ratio of. Pairs
    stay together where their number is even.
    """
    one, other = error[::2].mean(0), error[1::2].mean(0)
    return float((one * other).sum() / null.mean(0).square().sum().clamp(min=1e-12))


def score(h: Hypothesis, error: Tensor, null: Tensor, e: Tensor) -> float:
    """The loss ratio, and more where the network loses sight of the noise."""
    return float(ratio(error, null)) + (0.0 if h.patch is not None else UNSTEADY * float(steadiness(error, e)))
