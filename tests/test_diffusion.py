"""diffusion: the process against closed forms, samplers, seeds, budgets, saving."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, random_model, weights
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, PNDMScheduler
from numpy.typing import NDArray
from oracle import oracle

from elijah.diffusion import Model, column, generator_for, hash_seed
from elijah.errors import ElijahError, OutOfBudget
from elijah.loading import load_model
from elijah.samplers import make_scheduler

S0 = 0.5


def schedule() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """a, s [T] of DDPM's schedule in float64, from its betas."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return np.sqrt(abar), np.sqrt(1 - abar)


def mean(model: Model) -> NDArray[np.float64]:
    return model.network.m.double().numpy()  # type: ignore[union-attr, operator, return-value]


def exact_eps(model: Model, x: NDArray[np.float64], t: int, s0: float = S0) -> NDArray[np.float64]:
    """E[e | x_t = x] for data N(m, s0^2): the regression of e on x."""
    a, s = (v[t] for v in schedule())
    return s * (x - a * mean(model)) / (a**2 * s0**2 + s**2)


def starts(model: Model, n: int) -> torch.Tensor:
    return model.noise(n, generator_for(5))


def test_the_process_preserves_variance(tiny: Model) -> None:
    torch.testing.assert_close(
        tiny.a.double() ** 2 + tiny.s.double() ** 2, torch.ones(1000).double(), rtol=0, atol=2e-7
    )
    a, s = schedule()
    np.testing.assert_allclose(tiny.a, a, rtol=2e-4)  # diffusers multiplies the betas up in float32
    np.testing.assert_allclose(tiny.s, s, rtol=2e-4)
    assert tiny.a[-1].item() ** 2 == pytest.approx(4.04e-5, rel=0.01)
    np.testing.assert_allclose(tiny.alpha, 1 - np.linspace(1e-4, 0.02, 1000), rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_eps_is_the_closed_form(prediction: str, t: int) -> None:
    model = oracle(prediction=prediction)
    x = starts(model, 4)
    found = model.eps(x, torch.full((4,), t))
    np.testing.assert_allclose(found, exact_eps(model, x.double().numpy(), t), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_network_at_the_regression_target_is_right(prediction: str) -> None:
    """An output equal to the regression target gives back the e that was mixed in."""
    model = oracle(prediction=prediction)
    x0, e, t = torch.rand(4, 3, 8, 8) - 0.5, starts(model, 4), torch.tensor([0, 300, 700, 999])
    model.output = lambda x, t: model.regression_target(x0, e, t)  # type: ignore[method-assign]
    torch.testing.assert_close(model.eps(model.diffuse(x0, e, t), t), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim-10", "ddpm-20"])
def test_both_parametrisations_sample_alike(sampler: str) -> None:
    one, other = (oracle(prediction=p) for p in ("epsilon", "v_prediction"))
    start = starts(one, 8)
    torch.testing.assert_close(
        one.sample(start, sampler, seed=3), other.sample(start, sampler, seed=3), rtol=0, atol=1e-3
    )


def test_ddim_10_follows_its_own_recursion() -> None:
    model = oracle()
    start = starts(model, 4)
    a, s = (np.append(v, last) for v, last in zip(schedule(), (1.0, 0.0), strict=True))  # index -1: no noise is left
    x = start.double().numpy()
    for t in range(999, 0, -100):
        e = exact_eps(model, x, t)
        x = a[t - 100] * (x - s[t] * e) / a[t] + s[t - 100] * e
    np.testing.assert_allclose(model.sample(start, "ddim-10"), x, atol=2e-3)


def test_ddim_with_gradients_is_the_stock_sampler() -> None:
    """Per pixel the oracle's map from noise to image is affine with a positive slope, which the gradient shows."""
    model = oracle()
    start = starts(model, 3)
    leaf = start.clone().requires_grad_(True)
    images = model.ddim(leaf, 10)
    torch.testing.assert_close(images.detach(), model.sample(start, "ddim-10"), rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(images.sum(), leaf)
    shifted = model.ddim(start + 0.5, 10)
    torch.testing.assert_close((shifted - images.detach()) / 0.5, gradient, rtol=1e-3, atol=1e-3)
    assert (gradient > 0).all()


def test_ddim_reaches_the_data() -> None:
    """500 steps from 4096 noises: mean m and std s0, within 4 standard errors and 1 % for the steps' size."""
    model = oracle((1, 2, 2))
    x = model.sample(starts(model, 4096), "ddim-500", batch_size=4096).double().numpy()
    error = S0 / np.sqrt(len(x))
    np.testing.assert_allclose(x.mean(0), mean(model), atol=4 * error + 0.005)
    np.testing.assert_allclose(x.std(0), S0, atol=4 * error / np.sqrt(2) + 0.005)


@pytest.mark.parametrize("sampler", ["ddim-10", "ddpm-20"])
def test_samples_do_not_depend_on_the_batch(sampler: str) -> None:
    model = oracle()
    start = starts(model, 7)
    whole = model.sample(start, sampler, seed=1)
    torch.testing.assert_close(model.sample(start, sampler, seed=1, batch_size=2), whole, rtol=0, atol=1e-6)
    model.max_batch = 3
    torch.testing.assert_close(model.sample(start, sampler, seed=1), whole, rtol=0, atol=1e-6)
    other = model.sample(start, sampler, seed=2)
    assert torch.equal(other, whole) == sampler.startswith("ddim")  # DDIM adds no noise


@pytest.mark.parametrize("sampler", ["ddpm-5", "ddim-5"])
def test_what_is_sampled_alike_gets_the_same_noise(sampler: str) -> None:
    model = oracle((1, 4, 4))
    one, other = starts(model, 3), 2 * starts(model, 2)
    found = model.sample_alike([one, other, one], sampler, seed=5, batch_size=4)
    for start, drawn in zip((one, other, one), found, strict=True):
        torch.testing.assert_close(drawn, model.sample(start, sampler, seed=5), rtol=0, atol=1e-6)


def test_a_real_network_samples_alike_in_any_batch(tiny: Model) -> None:
    start = starts(tiny, 5)
    whole = tiny.sample(start, "ddpm-3", seed=1)
    assert torch.equal(tiny.sample(start, "ddpm-3", seed=1), whole)
    near = 1e-4 * whole.abs().max().item()  # its kernels round differently at another batch size
    torch.testing.assert_close(tiny.sample(start, "ddpm-3", seed=1, batch_size=2), whole, rtol=0, atol=near)
    tiny.max_batch = 2
    torch.testing.assert_close(tiny.sample(start, "ddpm-3", seed=1), whole, rtol=0, atol=near)


def test_equal_starts_get_noise_of_their_own() -> None:
    model = oracle()
    x = model.sample(starts(model, 1).expand(3, -1, -1, -1), "ddpm-5", batch_size=2)
    assert (x[0] - x[1]).abs().max() > 0.01 and (x[0] - x[2]).abs().max() > 0.01


def test_noise_has_the_prefix_property() -> None:
    model = oracle()
    many, few = model.noise(64, generator_for(1)), model.noise(5, generator_for(1))
    assert torch.equal(many[:5], few)
    assert not torch.equal(model.noise(5, generator_for(2)), few)
    assert abs(many.mean()) < 0.04 and abs(many.std() - 1) < 0.03  # 12288 values: 4 standard errors
    assert len({hash_seed(a, b) for a in range(50) for b in range(50)}) == 2500


def test_the_meter_counts_forwards_and_backwards(tiny: Model) -> None:
    x, t = starts(tiny, 4), torch.tensor([1, 2, 3, 4])
    tiny.network.requires_grad_(False)
    tiny.eps(x, t)
    assert tiny.meter.evaluations == 4
    x.requires_grad_(True)
    with torch.no_grad():
        tiny.eps(x, t)
    assert tiny.meter.evaluations == 8
    out, forward = tiny.eps(x, t), tiny.meter.network_seconds
    assert tiny.meter.evaluations == 20
    torch.autograd.backward(out.sum())
    assert tiny.meter.network_seconds > forward > 0
    tiny.network.requires_grad_(True)
    tiny.eps(x.detach(), t)
    assert tiny.meter.evaluations == 32
    tiny.meter.evaluations = 0
    tiny.sample(x.detach(), "ddim-5")
    assert tiny.meter.evaluations == 20


def test_limits_stop_before_they_are_passed(tiny: Model) -> None:
    x, t = starts(tiny, 4), torch.tensor([1, 2, 3, 4])
    tiny.meter.max_evaluations = 7
    with torch.no_grad():
        tiny.eps(x, t)
        with pytest.raises(OutOfBudget, match="limit of 7 network evaluations"):
            tiny.eps(x, t)
        assert tiny.meter.evaluations == 4
        tiny.eps(x[:3], t[:3])
        assert tiny.meter.evaluations == 7
        tiny.meter.max_evaluations = None
        tiny.meter.deadline = time.monotonic() + 60
        tiny.eps(x, t)
        tiny.meter.deadline = time.monotonic() - 1
        with pytest.raises(OutOfBudget, match="time limit"):
            tiny.eps(x, t)


def test_frozen_restores_each_flag(tiny: Model) -> None:
    parameters = list(tiny.network.parameters())
    parameters[0].requires_grad_(False)
    before = [p.requires_grad for p in parameters]
    x = starts(tiny, 1).requires_grad_(True)
    with pytest.raises(KeyError), tiny.frozen():
        assert not any(p.requires_grad for p in parameters)
        torch.autograd.backward(tiny.eps(x, torch.tensor([5])).square().sum())
        raise KeyError
    assert [p.requires_grad for p in parameters] == before and not all(before) and any(before)
    assert x.grad is not None and x.grad.abs().sum() > 0 and all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", ["ddim", "ddim-", "ddim-0", "ddim-1001", "pc-10", "ddim-x", ""])
def test_unknown_samplers(tiny: Model, name: str) -> None:
    with pytest.raises(ElijahError, match="unknown sampler"):
        tiny.sample(starts(tiny, 1), name)


def test_samplers_begin_at_the_last_timestep_and_do_not_clip(tiny: Model) -> None:
    for name in ("ddim-10", "ddpm-20"):
        scheduler = make_scheduler(tiny.scheduler, name)
        assert scheduler.timesteps[0] == 999
        assert not scheduler.config.clip_sample
        assert torch.equal(scheduler.alphas_cumprod, tiny.scheduler.alphas_cumprod)


def test_clone_is_independent(tiny: Model) -> None:
    tiny.network.requires_grad_(False)
    before = weights(tiny)
    copy = tiny.clone()
    assert equal(weights(copy), before) and all(p.requires_grad for p in copy.network.parameters())
    assert copy.meter is not tiny.meter and copy.updates == 0
    with torch.no_grad():
        for p in copy.network.parameters():
            p.add_(1)
    copy.meter.charge(3)
    assert equal(weights(tiny), before) and tiny.meter.evaluations == 0
    assert not any(p.requires_grad for p in tiny.network.parameters())


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("half", [False, True])
def test_saved_folders_load_in_stock_diffusers(tmp_path: Path, scheduler: type, half: bool) -> None:
    model = random_model()
    model.scheduler = scheduler(beta_end=0.015)
    before = weights(model)
    model.save(tmp_path / "m", half=half)
    assert equal(weights(model), before) and model.network.dtype == torch.float32  # type: ignore[comparison-overlap]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    stored = pipeline.unet.state_dict()
    expected = {k: v.half().float() if half else v for k, v in before.items()}
    assert equal({k: v.float() for k, v in stored.items()}, expected)
    assert isinstance(pipeline.scheduler, scheduler) and pipeline.scheduler.config.beta_end == 0.015
    loaded = load_model(str(tmp_path / "m"))
    assert equal(weights(loaded), expected)
    torch.testing.assert_close(loaded.a, Model(model.network, model.scheduler, (1, 8, 8)).a)
    assert not list(tmp_path.rglob("*.bin"))


def test_low_precision_stays_near(tiny: Model) -> None:
    x, t = starts(tiny, 4), torch.tensor([1, 300, 600, 999])
    with torch.no_grad():
        full = tiny.eps(x, t)
        tiny.dtype = torch.bfloat16
        low = tiny.eps(x, t)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.05 * full.abs().max()


def test_pixels_and_column(tiny: Model) -> None:
    assert tiny.pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0.5, 1, 1]
    assert column(tiny.a, torch.tensor([0, 999])).shape == (2, 1, 1, 1)
