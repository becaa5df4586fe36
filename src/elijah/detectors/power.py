"""Where a trigger points and where it leads, by fixed-point iterations: forward passes only.

Trigger. On x = k_t r + gamma s e a clean network calls the shift noise, so

    q(r) = sum_b c (eps - e - kappa R_t r) / sum_b c^2,    c = k_t / s - kappa R_t,

the mean residual in units of what it is per unit of r on a clean network, is r itself. Near a trigger r* it is r - r*:
the network knows the shift as r* and calls the rest noise. So v = r - q(r), what is not called noise, is about 0 on a
clean network and r* at a backdoor. Far from r* a backdoored network leaks some of r* into v, which is enough to follow:

    r <- A v / rms(v)

is a power iteration, at a fixed size A, for the shift that the network knows best. A few iterations over a few samples
turn most random starts to the trigger.

Target. At a trigger r a backdoored network's estimate of x0 is its target y, whatever x0 was put in. So

    y <- mean_b (x_t - k_t r - gamma s (eps - kappa R_t r)) / a,    x_t = a y + k_t r + gamma s e,

walks to the target in a step each at falling t.

Both. Where a trigger shows only beside its target (kappa 2, whose answer at t = T is a clean network's), the residual
is regressed on what a wrong r and a wrong y are called,

    eps - e - kappa R_t r  ~  c_t dr + (a / s) dy    (c_t as above, least squares over the samples of each pixel)

and half of both is taken off: a step of Newton's, damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elijah.detectors.hypothesis import Draw, Hypothesis, antithetic, errors, score, visible
from elijah.diffusion import Model, column
from elijah.response import poisoned, trigger_coefficient, trigger_scale

DAMPING = 0.5  # of steps over r and y together
SETTLING = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of T


@torch.no_grad()
def follow(
    model: Model, group: list[Hypothesis], iterations: int, rows: int, generator: torch.Generator, enough: float = 0.0,
    *, resize: bool = False,
) -> None:  # fmt: skip
    """Turns the triggers of group to what the network does not call noise, in place, each to the best that it passed.

    rows: of noise an iteration. Ends early at a hypothesis whose strength is below enough. resize: r <- v as it is,
    Newton's step, which ends at r* from near it and at 0 on a clean network.
    """
    best = {id(h): (float("inf"), h.r, h.y, h.share) for h in group}
    for _ in range(iterations):
        draws = [antithetic(model, rows, *h.family.start_window, generator) for h in group]
        for h, (error, null), (e, t) in zip(group, errors(model, group, draws), draws, strict=True):
            h.loss_ratio = score(h, error, null, e)
            best[id(h)] = min(best[id(h)], (h.loss_ratio, h.r, h.y, h.share), key=lambda kept: kept[0])
            off = off_by(model, h, error, t)
            if h.family.fits_gamma:
                h.set_share(h.share / max(0.05, 1 + noise_share(error, e if h.patch is None else e * h.patch)))
            if resize:
                h.set_trigger(h.r - h.share * off[0])
            else:
                v = h.r - off[0]
                h.set_trigger(h.size * v / v.square().mean().sqrt().clamp(min=1e-12))
            if h.family.joint:
                h.lead_to(h.y - off[1])
        if any(best[id(h)][0] < enough * h.family.max_loss_ratio for h in group):
            break
    for h in group:
        h.loss_ratio, h.r, h.y, h.share = best[id(h)]


def off_by(model: Model, h: Hypothesis, error: Tensor, t: Tensor) -> Tensor:
    """What the error [B, C, H, W] says that r is off by and, of joint families, y: [1 or 2, C, H, W]; half of both."""
    columns = [visible(model, h.family.response)[t]]
    if h.family.joint:
        columns.append((model.a / model.s)[t])
    found = torch.linalg.lstsq(torch.stack(columns, 1), error.flatten(1)).solution.unflatten(1, error.shape[1:])
    return DAMPING * found if h.family.joint else found


def noise_share(error: Tensor, e: Tensor) -> float:
    """How much of the noise is in the error, over antithetic pairs: gamma - 1 on a clean network, 0 at a trigger."""
    half = len(e) // 2
    odd = (error[:half] - error[half:]) / 2
    return float((odd * e[:half]).sum() / e[:half].square().sum())


@torch.no_grad()
def settle(
    model: Model, group: list[Hypothesis], rows: int, generator: torch.Generator, shares: tuple[float, ...] = SETTLING
) -> None:
    """Makes the network's own estimate of x0 at each trigger its target, in place; shares: of T, falling."""
    for share in shares if group else ():
        draws = [antithetic(model, rows, share, share, generator) for _ in group]
        made = [
            poisoned(model, h.family.response, h.r, h.y, e, t, h.gamma) for h, (e, t) in zip(group, draws, strict=True)
        ]
        out = model.eps(torch.cat([x for x, _ in made]), torch.cat([t for _, t in draws]))
        for h, draw, (x, _), eps in zip(group, draws, made, out.split(rows), strict=True):
            h.lead_to(estimate(model, h, x, eps, draw).mean(0))


def estimate(model: Model, h: Hypothesis, x: Tensor, eps: Tensor, draw: Draw) -> Tensor:
    """x0 [B, C, H, W], if the answer eps to x were the attacker's."""
    t, response = draw[1], h.family.response
    e = eps - response.kappa * column(trigger_coefficient(model), t) * h.r
    shift = column(trigger_scale(model, response.psi), t) * h.r
    return (x - shift - h.gamma * column(model.s, t) * e) / column(model.a, t)
