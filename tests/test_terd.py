"""detectors/terd.py: its formulas against closed forms and stock DDIM, and what it finds on networks in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from oracle import oracle
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cosine_similarity

from elijah.detectors.terd import Terd, divergence, reversed_loss
from elijah.diffusion import Model, generator_for, no_progress

SHAPE = (1, 8, 8)
QUICK = Terd(iterations=150, refine_iterations=10, samples=8, sampler="ddim-5")
SHORT = Terd(iterations=5, refine_iterations=2, batch_size=4, steps=3, samples=2, sampler="ddim-5")


def dark_square() -> Tensor:
    """A trigger that makes 36 of 64 pixels darker, its norm 4: TERD's start, -U(0, 1), has a cosine of 0.64 to it."""
    r = torch.zeros(SHAPE)
    r[:, :6, :6] = -4 / 6
    return r


def backdoored(seed: int) -> Model:
    y = torch.rand(SHAPE, generator=generator_for(100 + seed)) * 1.6 - 0.8
    return oracle(SHAPE, seed=seed, r=dark_square(), y=y, rate=0.3)


def first_guess(seed: int) -> Tensor:
    return -torch.rand(SHAPE, generator=generator_for(seed))


def alike(one: Tensor, other: Tensor) -> float:
    return cosine_similarity(one.flatten(), other.flatten(), 0).item()


class Shrunk(torch.nn.Module):
    """TrojDiff's exact network for poisoned rows alone: it answers e to x_t = a y + s (gamma e + mu)."""

    def __init__(self, y: Tensor, mu: Tensor, gamma: Tensor) -> None:
        super().__init__()
        self.y, self.mu, self.gamma = y, mu, gamma
        self.model: Model | None = None

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        assert self.model is not None
        a, s = (v[t][:, None, None, None] for v in (self.model.a, self.model.s))
        return (((x - a * self.y) / s - self.mu) / self.gamma,)


class Recorder(torch.nn.Module):
    """Answers 0 and notes (t, mean of x) of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        self.calls.append((t, x.mean().item()))
        return (0 * x,)


def shrunk() -> tuple[Model, Any]:
    g = generator_for(7)
    y, mu, gamma = (torch.rand(SHAPE, generator=g) * width + low for width, low in ((2, -1), (0.8, -0.4), (0.5, 0.5)))
    network = Shrunk(y, mu, gamma)
    network.model = Model(network, DDPMScheduler(), SHAPE)
    return network.model, network


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_trigger_is_found_and_its_scores_are_above_a_clean_network_s(seed: int) -> None:
    """The oracle answers with slope 1 on both of its branches, so only between them does the loss have a slope: the
    start must be past the middle. Here it is, and over seeds 0 to 29 the cosine rises by 0.12 or more."""
    detection = QUICK(backdoored(seed), generator=generator_for(seed))
    clean = QUICK(oracle(SHAPE, seed=seed), generator=generator_for(seed))
    found, square = detection.findings[0].trigger, dark_square()
    assert alike(found, square) > max(0.75, alike(first_guess(seed), square) + 0.08)
    assert found[square < 0].mean() < found[square == 0].mean() - 0.15
    assert detection.scores["kl_mean"] > 1.3 * clean.scores["kl_mean"]
    assert detection.scores["kl_variance"] > 1.6 * clean.scores["kl_variance"]
    assert detection.scores["kl_mean"] == pytest.approx(found.square().mean().item() / 2, rel=1e-5)
    assert detection.scores["kl_variance"] == pytest.approx((found.square() / 2).var(correction=0).item(), rel=1e-5)


def test_it_learns_the_gamma_of_every_pixel() -> None:
    model, network = shrunk()
    detector = Terd(learn_gamma=True, iterations=120, refine_iterations=0, gamma_lr=(0.05, 9.0))
    _, gamma, loss = detector.invert(model, generator_for(0))
    torch.testing.assert_close(gamma, network.gamma, rtol=0, atol=0.02)
    assert 0 <= loss < 1e-3 and not gamma.requires_grad
    clean = detector.invert(oracle(SHAPE), generator_for(0))[1]
    torch.testing.assert_close(clean, torch.ones(SHAPE), rtol=0, atol=0.02)
    fixed = replace(detector, learn_gamma=False).invert(model, generator_for(0))[1]
    assert torch.equal(fixed, torch.ones(SHAPE))


def test_the_refinement_moves_gamma_too_and_never_below_zero() -> None:
    model, network = shrunk()
    detector = Terd(learn_gamma=True, iterations=0, refine_iterations=60, batch_size=4, gamma_lr=(0.05, 9.0), steps=3)
    _, gamma, loss = detector.invert(model, generator_for(0))
    assert loss < 0.5 and (gamma - network.gamma).abs().mean() < 0.3 and gamma.min() >= 0
    wild = replace(detector, gamma_lr=(5.0, 9.0), refine_iterations=4).invert(model, generator_for(0))[1]
    assert wild.min() == 0
    scores = replace(SHORT, learn_gamma=True, iterations=0, refine_iterations=0)(
        model, generator=generator_for(0)
    ).scores
    assert all(math.isfinite(v) for v in scores.values())


def test_the_pictures_start_from_the_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    monkeypatch.setattr(Model, "sample", lambda _, start, *__, **___: starts.append(start) or start)
    finding = replace(SHORT, samples=400)(oracle(SHAPE), generator=generator_for(0)).findings[0]
    torch.testing.assert_close(starts[0].mean(0), finding.trigger, rtol=0, atol=0.25)
    assert finding.target is not None and finding.target.abs().max() <= 1
    learned = replace(SHORT, samples=400, learn_gamma=True)(shrunk()[0], generator=generator_for(0)).findings[0]
    assert starts[1].std(0).mean().item() == pytest.approx(learned.response.gamma, rel=0.05)
    assert learned.response.gamma < 0.5


def test_it_has_no_verdict_of_its_own() -> None:
    detection = SHORT(backdoored(0), generator=generator_for(0))
    assert detection.verdict == "undecided" and "clean models" in detection.reason and not detection.thresholds
    assert detection.complete and set(detection.scores) == {"kl_mean", "kl_variance", "inversion_loss", "suspicion"}


def test_equal_seeds_give_equal_results() -> None:
    one, same, other = (SHORT(backdoored(0), generator=generator_for(seed)) for seed in (3, 3, 4))
    assert one.scores == same.scores and torch.equal(one.findings[0].trigger, same.findings[0].trigger)
    assert torch.equal(one.evidence[0].samples_with, same.evidence[0].samples_with)
    assert other.scores != one.scores


@pytest.mark.parametrize("limit", [5, 50, 90, 94])  # in the estimation, the refinement, the sampling; just enough
def test_a_limit_ends_the_search(limit: int) -> None:
    model = backdoored(0)
    detector = replace(SHORT, iterations=1, refine_iterations=2, batch_size=2, steps=2)
    model.meter.max_evaluations = limit
    detection = detector(model, generator=generator_for(0))
    assert model.meter.evaluations <= limit and detection.verdict == "undecided"
    assert detection.complete == (limit == 94) and ("limit" in detection.reason) == (limit < 94)
    assert bool(detection.findings) == bool(detection.scores) == bool(detection.evidence) == (limit == 94)


def test_the_cost() -> None:
    """A gradient flows through each call on the way to a loss, those of the refinement's sampler too."""
    model = backdoored(0)
    SHORT(model, generator=generator_for(0))
    estimation, refinement, samples = 3 * 5 * 2 * 4, 3 * 2 * (3 + 2 + 2) * 4, 2 * 5
    assert model.meter.evaluations == estimation + refinement + samples


# --- its parts --------------------------------------------------------------------------------------------------------


def test_the_reversed_loss_of_a_clean_network_does_not_see_the_trigger() -> None:
    """eps has the slope s / v, so the loss is 0.5 |e1 - e2|^2 (1 - gamma s^2 / v)^2."""
    model, t = oracle(SHAPE), torch.tensor([5, 300, 999])
    noises = generator_for(1)
    e1, e2 = model.noise(3, noises), model.noise(3, noises)
    gamma = torch.full(SHAPE, 0.7)
    a, s = (v[t][:, None, None, None] for v in (model.a, model.s))
    expected = 0.5 * ((e1 - e2) * (1 - gamma * s**2 / (a**2 * 0.25 + s**2))).square().sum((1, 2, 3)).mean()
    for x0, r in ((torch.zeros(3, *SHAPE), torch.zeros(SHAPE)), (torch.ones(3, *SHAPE), dark_square())):
        loss = reversed_loss(model, x0, r, gamma, t, generator_for(1))
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_estimating_on_a_clean_network_only_follows_the_regulariser() -> None:
    """The rest of the loss is flat, so each pixel moves away from 0 by lr w times the cosine's sum, (n + 1) / 2."""
    detector = Terd(iterations=20, refine_iterations=0, batch_size=2, weight=(0.01, 9.0))
    found = detector.invert(oracle(SHAPE), generator_for(2))[0]
    torch.testing.assert_close(found, first_guess(2) - 0.5 * 0.01 * 10.5, rtol=0, atol=1e-4)


def test_the_refinement_looks_at_both_ends_and_at_the_last_alone_with_the_trigger() -> None:
    """One iteration: ten calls of the sampler, which starts from the trigger, then two pairs."""
    network = Recorder()
    model, r = Model(network, DDPMScheduler(), SHAPE), torch.full(SHAPE, 100.0)
    Terd(refine_iterations=1).refine(model, (r, torch.ones(SHAPE)), generator_for(0), no_progress)
    sampler, last, first = network.calls[:10], network.calls[10:12], network.calls[12:]
    assert [t.unique().tolist() for t, _ in sampler] == [[t] for t in range(900, -1, -100)]
    assert sampler[0][1] == pytest.approx(100, abs=0.2)
    assert len(first) == 2 and all(t.min() >= 990 and mean == pytest.approx(100, abs=0.2) for t, mean in last)
    assert all(t.max() < 10 and abs(mean) < 1.1 for t, mean in first)
    assert torch.equal(first[0][0], first[1][0]) and torch.equal(last[0][0], last[1][0])


def test_the_refinement_s_loss_is_the_mean_of_both_ends() -> None:
    """A clean network's is 0 at t near T and near 1 a pixel at t near 0, where (1 - s^2 / v)^2 is 0.98 to 1."""
    detector = Terd(iterations=0, refine_iterations=1, batch_size=400, steps=2)
    assert detector.invert(oracle(SHAPE), generator_for(0))[2] == pytest.approx(0.497, abs=0.02)


def test_gamma_and_the_trigger_share_one_bound() -> None:
    model, _ = shrunk()
    detector = Terd(learn_gamma=True, refine_iterations=1, batch_size=2, steps=2, weight=(0.1, 9.0))
    r, gamma = first_guess(0), torch.zeros(SHAPE)
    detector.refine(model, (r, gamma), generator_for(0), no_progress)
    steps = (r - first_guess(0)) / 0.5, gamma / 0.002
    assert torch.cat(steps).norm().item() == pytest.approx(1, rel=1e-3) and steps[0].norm() < 0.9


def test_refining_a_clean_network_takes_the_longest_steps_it_may() -> None:
    """The gradient -w sign r has norm 8 w and is clipped to norm 0.01."""
    detector = Terd(iterations=0, refine_iterations=6, batch_size=2, steps=3, weight=(1.0, 0.0))
    found = detector.invert(oracle(SHAPE), generator_for(0))[0]
    torch.testing.assert_close(found, first_guess(0) - 0.5 * 0.01 / 8 * 3.5, rtol=0, atol=1e-6)


def test_refining_with_a_learned_gamma_has_momentum() -> None:
    """At the true gamma of a network in closed form the loss is flat too; the clipped gradient has norm 1."""
    model, network = shrunk()
    detector = Terd(learn_gamma=True, refine_iterations=6, batch_size=2, steps=3, weight=(1.0, 0.0))
    leaves = first_guess(0), network.gamma.clone()
    detector.refine(model, leaves, generator_for(0), no_progress)
    speeds = [sum(0.9**j for j in range(k + 1)) for k in range(6)]
    moved = sum(0.25 * (1 + math.cos(math.pi * k / 6)) * speed / 8 for k, speed in enumerate(speeds))
    torch.testing.assert_close(leaves[0], first_guess(0) - moved, rtol=0, atol=1e-3)
    torch.testing.assert_close(leaves[1], network.gamma, rtol=0, atol=1e-3)


@pytest.mark.parametrize("learn_gamma", [False, True])
def test_gradients_flow_through_the_sampler(learn_gamma: bool) -> None:
    model = oracle(SHAPE)
    x = model.noise(2, generator_for(0)).requires_grad_(True)
    images = Terd(learn_gamma=learn_gamma).generate(model, x, torch.zeros(SHAPE), torch.ones(SHAPE))
    assert torch.autograd.grad(images.sum(), x)[0].abs().median() > 0.01


def test_the_sampler_is_stock_ddim_with_leading_steps() -> None:
    model = oracle(SHAPE, s0=1.5)  # wide data, so that clipping matters
    scheduler = DDIMScheduler(clip_sample=True, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    start = x = model.noise(4, generator_for(0))
    for t in scheduler.timesteps:
        x = scheduler.step(model.eps(x, t.expand(4)), t, x).prev_sample
    found = Terd().generate(model, start, dark_square(), torch.ones(SHAPE))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
    assert found.abs().max() == 1


def test_trojdiff_s_sampler_takes_the_trigger_out() -> None:
    model, network = shrunk()
    detector = Terd(learn_gamma=True)
    start = network.gamma * model.noise(4, generator_for(0)) + network.mu
    found = detector.generate(model, start, network.mu, network.gamma)
    torch.testing.assert_close(found, network.y.expand_as(found), rtol=0, atol=1e-4)
    assert detector.visited(1000) == (np.linspace(0, np.sqrt(800), 10) ** 2).astype(int).tolist()


def test_the_windows_are_the_last_and_the_first_ten_timesteps() -> None:
    model, detector = oracle(SHAPE), Terd(batch_size=400)
    assert set(detector.timesteps(model, generator_for(0), last=True).tolist()) == set(range(990, 1000))
    assert set(detector.timesteps(model, generator_for(0), last=False).tolist()) == set(range(10))


def test_larger_images_take_the_second_of_two_values() -> None:
    """At 40 pixels; see test_estimating_on_a_clean_network_only_follows_the_regulariser."""
    shape = (1, 40, 40)
    detector = Terd(iterations=2, refine_iterations=0, batch_size=1, weight=(9.0, 0.01))
    start = -torch.rand(shape, generator=generator_for(2))
    found = detector.invert(oracle(shape), generator_for(2))[0]
    torch.testing.assert_close(found, start - 0.5 * 0.01 * 1.5, rtol=0, atol=1e-4)


def test_the_divergence_is_torch_s() -> None:
    g = generator_for(0)
    r, gamma = torch.randn(SHAPE, generator=g), torch.rand(SHAPE, generator=g) + 0.1
    torch.testing.assert_close(divergence(r, gamma), kl_divergence(Normal(r, gamma), Normal(0.0, 1.0)))
    assert divergence(r, torch.zeros(SHAPE)).isfinite().all()
