"""samplers: each of the 13 carries noise to the data's own distribution, where the exact network is known."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model
from diffusers import DDPMScheduler, ScoreSdeVeScheduler
from oracle import oracle
from torch import Tensor

from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.samplers import SAMPLERS, make_scheduler, names_for

SHAPE, M, S0 = (3, 8, 8), 0.3, 0.4


class Score(torch.nn.Module):
    """The exact score of N(M, S0^2) data under variance-exploding noise: takes sigma, as NCSN networks do."""

    def forward(self, x: Tensor, sigma: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (-(x - M) / (S0**2 + sigma[:, None, None, None] ** 2),)


def exploding() -> Model:
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=2000, snr=0.075, sigma_min=0.01, sigma_max=50.0)
    return Model(Score(), scheduler, SHAPE, "ncsn")


def test_there_are_thirteen() -> None:
    assert len(SAMPLERS) == 13 and names_for(True) == ("pc",) and len(names_for(False)) == 12


@pytest.mark.parametrize("name", names_for(False))
def test_noise_becomes_the_data(name: str) -> None:
    model = oracle(SHAPE, s0=S0)
    steps = 100
    out = model.sample(model.noise(64, generator_for(1)), f"{name}-{steps}", seed=2)
    assert (out.mean(0) - model.network.m).square().mean().sqrt() < 0.1  # type: ignore[operator]
    assert (out - model.network.m).std() == pytest.approx(S0, rel=0.15)  # type: ignore[operator]
    assert model.meter.evaluations >= 64 * steps


def test_the_predictor_corrector_makes_the_data() -> None:
    model = exploding()
    out = model.sample(model.noise(64, generator_for(1)), "pc-200", seed=2)
    assert out.mean() == pytest.approx(M, abs=0.05) and out.std() == pytest.approx(S0, rel=0.2)
    assert model.meter.evaluations == 64 * 200 * 2  # one correction and one prediction a step


@pytest.mark.parametrize("name", ["pc-5", "ddpm-5", "heun-5", "unipc-5"])
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    model = exploding() if name.startswith("pc") else random_model()
    e = model.noise(5, generator_for(3))
    whole, parts = (model.sample(e, name, seed=4, batch_size=b) for b in (5, 2))
    assert torch.allclose(whole, parts, atol=1e-5, rtol=1e-4)


def test_the_exploding_process_in_our_notation() -> None:
    """x_t = x0 + sigma e, and eps is e where x0 is a point."""
    model = exploding()
    x0, e, t = torch.full((4, *SHAPE), M), torch.randn(4, *SHAPE), torch.tensor([0, 500, 1000, 1999])
    x = model.diffuse(x0, e, t)
    assert torch.equal(model.a, torch.ones(2000)) and float(model.s[-1]) == pytest.approx(50.0, rel=1e-4)
    share = (model.s**2 / (model.s**2 + S0**2))[t][:, None, None, None]
    assert torch.allclose(model.eps(x, t), share * e, atol=1e-4)
    assert torch.equal(model.pixels(torch.tensor([-1.0, 0.25, 2.0])), torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(model.encode(torch.tensor([-1.0, 0.0])), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("name", ["ddim-20", "pc-0", "pc-2001", "pc"])
def test_a_sampler_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ElijahError, match="unknown sampler"):
        make_scheduler(exploding().scheduler, name)


@pytest.mark.parametrize("name", names_for(False))
def test_they_start_at_the_end_and_do_not_clip(name: str) -> None:
    own = DDPMScheduler(beta_end=0.03, clip_sample=True, timestep_spacing="leading")
    scheduler = make_scheduler(own, f"{name}-20")
    assert int(scheduler.timesteps[0]) == 999 and not scheduler.config.get("clip_sample", False)
    assert torch.allclose(scheduler.alphas_cumprod, own.alphas_cumprod)
