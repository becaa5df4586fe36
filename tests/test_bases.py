"""bases: small models of every kind are made, trained, attacked, sampled, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import equal, weights
from diffusers import DiffusionPipeline

from elijah.attacks import VillanDiffusion
from elijah.attacks.poisoning import Tuning
from elijah.bases import KINDS, new_model, train_autoencoder
from elijah.data import load_images
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.loading import load_model
from elijah.training import Optimiser, train
from elijah.trigger import make_target, make_trigger


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=16, channels=3, limit=64)


@pytest.fixture(scope="module")
def autoencoder(digits: torch.Tensor) -> Any:
    return train_autoencoder(digits, steps=60, seed=0, channels=(8, 16, 16), lr=3e-3)


def tiny(kind: str, autoencoder: Any) -> Model:
    shape = (3, 4, 4) if kind == "ldm" else (3, 16, 16)
    return new_model(shape, seed=0, channels=(8, 8), kind=kind, autoencoder=autoencoder if kind == "ldm" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_life_of_every_kind(kind: str, digits: torch.Tensor, autoencoder: Any, tmp_path: Path) -> None:
    base = train(digits, Optimiser(4, lr=1e-3), seed=0, batch_size=8, model=tiny(kind, autoencoder))
    trigger = make_trigger("box-4", base.image_shape)
    attack = VillanDiffusion(trigger, make_target("corner", trigger), mode="bare", tuning=Tuning(steps=4, batch_size=8))
    attacked = attack(base, digits, generator=generator_for(1))
    assert base.image_shape == (3, 16, 16) and attacked.kind == kind and not equal(weights(base), weights(attacked))
    attacked.save(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert (loaded.kind, loaded.sample_shape) == (kind, base.sample_shape)
    sampler = "pc-4" if kind == "ncsn" else "dpm++2-4"
    e = attack.start(base, base.noise(3, generator_for(2)))
    ours, theirs = (m.pixels(m.sample(e, sampler, seed=3)) for m in (attacked, loaded))
    assert ours.shape == (3, 3, 16, 16) and torch.allclose(ours, theirs, atol=1e-4)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3)


def test_the_training_of_the_exploding_kind_lowers_its_loss(digits: torch.Tensor) -> None:
    base = tiny("ncsn", None)
    trained = train(digits, Optimiser(60, lr=5e-3), seed=0, batch_size=16, model=base)
    x0, e = base.prepare(digits), torch.randn(64, 3, 16, 16, generator=generator_for(1))
    t = torch.linspace(0, 1999, 64).long()
    with torch.no_grad():
        before, after = ((m.eps(m.diffuse(x0, e, t), t) - e).square().mean().item() for m in (base, trained))
    assert after < 0.8 * before
    frequencies = dict(trained.network.named_parameters())["time_proj.weight"]
    assert torch.equal(frequencies, dict(base.network.named_parameters())["time_proj.weight"])


def test_the_autoencoder_is_better_than_grey(digits: torch.Tensor, autoencoder: Any) -> None:
    model = tiny("ldm", autoencoder)
    x = digits.float() / 127.5 - 1
    z = model.encode(x)
    assert z.shape == (64, 3, 4, 4) and z.std() == pytest.approx(1.0, abs=0.2)
    assert (model.decode(z) - x).square().mean() < 0.8 * (x - x.mean()).square().mean()


@pytest.mark.parametrize(("kind", "with_autoencoder"), [("ldm", False), ("ddpm", True), ("vae", False)])
def test_kinds_that_do_not_fit(kind: str, with_autoencoder: bool, autoencoder: Any) -> None:
    with pytest.raises(ElijahError, match="unknown kind"):
        new_model((3, 8, 8), seed=0, kind=kind, autoencoder=autoencoder if with_autoencoder else None)


@pytest.mark.parametrize(
    ("kind", "channels", "error"), [("ddpm", None, 0.01), ("ddpm", (8, 16), 0.1), ("ncsn", (16, 24), 0.1)]
)
def test_a_new_network_answers_with_its_input(kind: str, channels: tuple[int, ...] | None, error: float) -> None:
    model = new_model((3, 16, 16), seed=0, channels=channels, kind=kind)
    e, t = model.noise(8, generator_for(0)), torch.full((8,), model.T - 1)
    assert (model.eps(model.s[-1] * e, t) - e).square().mean().sqrt() < error


def test_the_largest_sigma_of_a_new_network() -> None:
    """Up to 380, as VillanDiffusion has it, or what is asked for; other kinds have none."""
    usual, other = (new_model((1, 8, 8), seed=0, channels=(8, 8), kind="ncsn", sigma_max=s) for s in (None, 22.0))
    assert float(usual.s[-1]) == pytest.approx(380, rel=1e-3) and float(other.s[-1]) == pytest.approx(22, rel=1e-3)
    assert float(other.s[0]) == pytest.approx(float(usual.s[0]))
