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
    """How a trigger begins. size: its rms, of the model's range. level: the sign of a flat one; without, it is random.

    power: random noise is filtered by 1 / f^power, and so are the steps of its fit.
    """

    size: float
    level: int | None = None
    power: float = 0.0


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
    starts: tuple[Start, ...] = ()
    fits_gamma: bool = False
    start_window: tuple[float, float] = (0.8, 1.0)  # of T; where its starts look
    by_descent: bool = False  # whether starts descend the loss, y included; else they follow the answer (power.py)
    descents: int = 1  # how many starts do
    reach: float = 1.0  # the largest value of the trigger, of the model's range
    max_rms: float = 1.0  # and its largest rms
    exploding: bool = False  # of variance-exploding models, else of preserving ones; judged by its bias, not fitted
    distribution: bool = False  # the target may be a distribution: outputs that only change are evidence too
    pixels: bool = False  # of models in pixel space alone

    @property
    def descent(self) -> tuple[float, float]:
        """Of T; where hypotheses descend."""
        return self.start_window if self.by_descent else self.judged[0]


REACH = 1.2  # r = REACH tanh(...) cut to [-1, 1]: so that -1, the usual background, is not at infinity
FAINT = 0.35  # a clean network fits strong triggers better than faint ones, which are therefore searched by themselves

HALF = Family("half", Response(1.0, 1.0), ((0.6, 1.0),), "BadDiffusion-like", 0.05, 0.06, around(0.8))
FULL = Family(  # at t = T it answers like a clean network; it shows where y is half hidden
    "full", Response(2.0, 1.0), ((0.15, 0.5), (0.6, 0.8)), "VillanDiffusion-ODE-like", 0.3, 0.27,
    (*around(1.0, 2, 0), *around(0.5, 0, 0)), start_window=(0.2, 0.8), by_descent=True,
)  # fmt: skip
FAMILIES = (
    HALF,
    replace(
        HALF, name="half_faint", matches=HALF.matches + ", faint", max_loss_ratio=0.18, max_if_fires=0.18,
        starts=(*around(0.3), *around(0.2)), max_rms=0.45,
    ),
    Family(  # judged where the noise hides the target, which need not be one image
        "zero", Response(0.0, 0.0, 0.5), ((0.7, 1.0),), "TrojDiff-like", 0.2, 0.2,
        (*around(0.45, 7, 3), *around(0.3, 4, 0)), fits_gamma=True, reach=0.5, distribution=True,
    ),
    FULL,
    replace(
        FULL, name="full_faint", matches=FULL.matches + ", faint", max_loss_ratio=0.75, max_if_fires=0.75,
        starts=around(0.25, 5, 2), descents=2, reach=FAINT,
    ),
    Family(
        "patch", Response(0.0, 0.0, 0.1), ((0.7, 1.0),), "TrojDiff-like, in a patch", 0.4, 0.4, fits_gamma=True,
        distribution=True, pixels=True,
    ),
    Family(
        "ve", Response(1.0, 0.0), ((0.5, 1.0),), "VillanDiffusion-VE-like", 0.06, 0.06,
        (*around(0.3), *around(0.15)), exploding=True, start_window=(0.5, 1.0), reach=0.5,
    ),
)  # fmt: skip
LATENT_RANGE = 4.0  # latents have unit deviation
SHARES = (0.05, 0.95)
UNSTEADY = 4.0  # the weight of a network's losing sight of the noise, in a hypothesis's score


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
    size: float = 1.0  # rms of r that power.follow keeps
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

    def set_trigger(self, r: Tensor) -> None:
        """Makes r [C, H, W] the trigger, cut to its reach."""
        wide = torch.atanh((r / self.scale / self.family.reach).clamp(-1, 1) / REACH)
        self.u = coloured(wide, self.power, inverse=True)

    def set_share(self, gamma: float) -> None:
        """Makes gamma, cut to SHARES, what is left of the noise."""
        self.v = torch.logit(torch.tensor(gamma, device=self.v.device).clamp(*SHARES))

    def lead_to(self, y: Tensor, limit: float) -> None:
        """Makes y [C, H, W] the target; values beyond limit times the range are cut."""
        self.w = torch.atanh((y / self.scale).clamp(-limit, limit))

    @property
    def too_large(self) -> bool:
        """Whether the trigger is not of its family any more."""
        return float(self.r.square().mean().sqrt()) > self.family.max_rms * self.scale

    def scaled(self, by: float) -> Hypothesis:
        """The same with by times the trigger."""
        other = replace(self, v=self.v.clone(), w=self.w.clone())
        other.set_trigger(by * self.r)
        return other

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
