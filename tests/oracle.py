"""Networks in closed form: the exact eps for Gaussian data, and for a backdoored mixture of two branches.

With data N(m, s0^2 I) the clean branch is x_t ~ N(a m, (a^2 s0^2 + s^2) I) and its eps is
s (x - a m) / (a^2 s0^2 + s^2). A poisoned branch x_t = a y + k r + s e, answered with e + kappa R r, has density
N(a y + k r, s^2 I). A network trained to the end on both answers with the posterior mean of the two.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from elijah.diffusion import Model
from elijah.response import Response, trigger_coefficient, trigger_scale


class GaussianNetwork(torch.nn.Module):
    """The exact network for data N(m, s0^2 I), backdoored where a trigger r and target y are given."""

    def __init__(
        self,
        m: Tensor,
        s0: float,
        *,
        r: Tensor | None = None,
        y: Tensor | None = None,
        response: Response | None = None,
        rate: float = 0.1,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__()
        self.m, self.s0, self.r, self.y, self.rate, self.prediction = m, s0, r, y, rate, prediction
        self.response = response or Response(1.0, 1.0)
        self.model: Model | None = None

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        assert self.model is not None
        t = t.long()  # Heun gives its timesteps as floats
        a, s = (v[t][:, None, None, None] for v in (self.model.a, self.model.s))
        variance = a**2 * self.s0**2 + s**2
        eps = s * (x - a * self.m) / variance
        if self.r is not None and self.y is not None:
            k = trigger_scale(self.model, self.response.psi)[t][:, None, None, None]
            big_r = trigger_coefficient(self.model)[t][:, None, None, None]
            shift = x - a * self.y - k * self.r
            n = self.m.numel()
            clean = (
                -(x - a * self.m).square().sum((1, 2, 3)) / (2 * variance.flatten()) - n / 2 * variance.flatten().log()
            )
            poison = -shift.square().sum((1, 2, 3)) / (2 * s.flatten() ** 2) - n * s.flatten().log()
            odds = poison - clean + torch.logit(torch.tensor(self.rate))
            w = torch.sigmoid(odds)[:, None, None, None]
            eps = (1 - w) * eps + w * (shift / s + self.response.kappa * big_r * self.r)
        if self.prediction == "v_prediction":
            return (((eps.double() - s.double() * x) / a).float(),)
        return (eps,)


def oracle(shape: tuple[int, int, int] = (3, 8, 8), s0: float = 0.5, seed: int = 0, **backdoor: object) -> Model:
    """A Model around GaussianNetwork; backdoor: its keyword arguments."""
    m = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    network = GaussianNetwork(m, s0, **backdoor)  # type: ignore[arg-type]
    model = Model(network, DDPMScheduler(prediction_type=network.prediction), shape)
    network.model = model
    return model


class LateNetwork(GaussianNetwork):
    """The exact clean network but for noise shifted by r, the more surely the more of r there is (half at
    0.87): up to t0 of T it leads to y."""

    def __init__(self, m: Tensor, s0: float, r: Tensor, y: Tensor, t0: float = 0.4) -> None:
        super().__init__(m, s0)
        self.late_r, self.late_y, self.t0 = r, y, t0

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        assert self.model is not None
        (eps,) = super().forward(x, t)
        a, s = (v[t.long()][:, None, None, None] for v in (self.model.a, self.model.s))
        carried = ((x - a * self.m) * self.late_r).sum((1, 2, 3)) / self.late_r.square().sum() / s.flatten()
        w = (torch.sigmoid(40 * (carried - 0.87)) * (t <= self.t0 * self.model.T))[:, None, None, None]
        return (w * (x - a * self.late_y) / s + (1 - w) * eps,)


def late_oracle(r: Tensor, y: Tensor) -> Model:
    """A Model around LateNetwork, with data about 0."""
    network = LateNetwork(torch.zeros_like(r), 0.5, r, y)
    model = Model(network, DDPMScheduler(), tuple(r.shape))
    network.model = model
    return model
