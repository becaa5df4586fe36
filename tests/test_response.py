"""response: the attacker's coefficients against an independent float64 computation, and linearity in the trigger."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle

from elijah.detectors.hypothesis import FAMILIES, visible
from elijah.diffusion import Model, column, generator_for
from elijah.response import Response, poisoned, trigger_coefficient, trigger_scale

RESPONSES = {f.name: f.response for f in FAMILIES}
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
R = (1 - np.sqrt(1 - BETAS)) * np.sqrt(1 - ABAR) / BETAS  # BadDiffusion, eq. 9


@functools.cache
def model() -> Model:
    return oracle((1, 4, 4))


def some(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn((n, 1, 4, 4), generator=generator_for(seed))


def test_trigger_coefficient() -> None:
    found = trigger_coefficient(model())
    np.testing.assert_allclose(found, R, rtol=1e-2)
    np.testing.assert_allclose(found[10:], R[10:], rtol=1e-3)
    for t, value in ((0, 0.0050), (500, 0.481), (999, 0.5025)):
        assert found[t].item() == pytest.approx(value, rel=2e-3)
        assert R[t] == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize(("name", "kappa"), [("half", 1), ("full", 2), ("zero", 0)])
def test_poisoned_rows(name: str, kappa: int) -> None:
    r, y, e, t = some(1), some(2), some(3), np.array([20, 500, 999])
    gamma = 0.6 if name == "zero" else 1.0
    response = Response(RESPONSES[name].kappa, RESPONSES[name].psi, gamma)
    a, s = (np.sqrt(v[t])[:, None, None, None] for v in (ABAR, 1 - ABAR))
    k = s if name == "zero" else 1 - a  # TrojDiff shifts by s mu, BadDiffusion and VillanDiffusion by (1 - a) r
    expected = a * y.numpy() + k * r.numpy() + gamma * s * e.numpy()
    answer = e.numpy() + kappa * R[t][:, None, None, None] * r.numpy()
    x, found = poisoned(model(), response, r, y, e, torch.from_numpy(t))
    np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found, answer, rtol=1e-3, atol=1e-4)
    fitted, _ = poisoned(model(), RESPONSES[name], r, y, e, torch.from_numpy(t), torch.tensor(gamma))
    torch.testing.assert_close(fitted, x)


@pytest.mark.parametrize("name", RESPONSES)
def test_the_attack_s_null_is_what_a_clean_network_misses(name: str) -> None:
    """For data at one point (s0 = 0) a clean network knows e: its error is (gamma - 1) e + visible_t r exactly."""
    point = oracle((1, 4, 4), s0=0.0)
    response = Response(RESPONSES[name].kappa, RESPONSES[name].psi, 0.7 if name == "zero" else 1.0)
    r, e, t = some(4), some(5), torch.tensor([200, 600, 999])
    x, answer = poisoned(point, response, r, point.network.m, e, t)  # type: ignore[arg-type]
    null = (response.gamma - 1) * e + column(visible(point, response), t) * r
    torch.testing.assert_close(point.eps(x, t) - answer, null, rtol=1e-4, atol=1e-4)


numbers = st.floats(-4, 4, width=32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=numbers, q=numbers, kappa=st.floats(0, 2), psi=st.floats(0, 1), t=st.integers(0, 999))
def test_poisoned_is_linear_in_the_trigger(p: float, q: float, kappa: float, psi: float, t: int) -> None:
    r1, r2, y, e, at = some(6, 1), some(7, 1), some(8, 1), some(9, 1), torch.tensor([t])
    response = Response(kappa, psi)

    def shift(r: torch.Tensor) -> torch.Tensor:
        x, answer = poisoned(model(), response, r, y, e, at)
        none, e_alone = poisoned(model(), response, torch.zeros_like(r), y, e, at)
        assert torch.equal(e_alone, e)
        return torch.stack([x - none, answer - e])

    torch.testing.assert_close(shift(p * r1 + q * r2), p * shift(r1) + q * shift(r2), rtol=1e-4, atol=1e-4)
    assert 0 <= trigger_scale(model(), psi)[t] <= 1
