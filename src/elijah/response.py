"""The one form of all published noise-trigger attacks, as a family of responses.

A backdoored network is trained on

    x_t = a y + k_t r + gamma s e,    k_t = psi (1 - a) + (1 - psi) s,    answer  e + kappa R_t r

with trigger r, target y and R_t = (1 - sqrt(alpha_t)) s / (1 - alpha_t), the coefficient of BadDiffusion
(Chou et al., CVPR 2023, eq. 9). A clean network calls the whole shift noise and answers
e + (gamma - 1) e + (k_t / s) r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elijah.diffusion import Model, column


@dataclass(frozen=True)
class Response:
    """kappa, psi, gamma of the form above."""

    kappa: float
    psi: float
    gamma: float = 1.0


def trigger_coefficient(model: Model) -> Tensor:
    """R_t, [T]: 0.0050 at t = 0 and 0.5025 at t = 999 on DDPM's schedule.

    On variance-exploding models sigma_t / (sigma_t + sigma_{t-1}) (VillanDiffusion), 1 at t = 0 and then about 0.5.
    """
    if model.exploding:
        return model.s / (model.s + torch.cat([torch.zeros_like(model.s[:1]), model.s[:-1]]))
    one_minus_alpha = (1 - model.alpha).clamp(min=1e-12)
    return (1 - model.alpha.sqrt()) * model.s / one_minus_alpha


def trigger_scale(model: Model, psi: float) -> Tensor:
    """k_t, [T]: how much of the trigger is in x_t."""
    return psi * (1 - model.a) + (1 - psi) * model.s


def poisoned(
    model: Model, response: Response, r: Tensor, y: Tensor, e: Tensor, t: Tensor, gamma: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_t and the attacker's regression target for it, both [B, C, H, W].

    r, y: broadcast to e [B, C, H, W]; t [B]; gamma: in place of response.gamma when it is being fitted.
    """
    g = response.gamma if gamma is None else gamma
    x = column(model.a, t) * y + column(trigger_scale(model, response.psi), t) * r + g * column(model.s, t) * e
    return x, e + response.kappa * column(trigger_coefficient(model), t) * r
