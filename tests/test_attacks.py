"""attacks: one contract for every entry of ATTACKS, and each loss against the paper's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import equal, random_model, weights
from oracle import oracle

from elijah.attacks import ATTACKS
from elijah.attacks.baddiffusion import RESPONSE, BadDiffusion
from elijah.attacks.poisoning import Tuning
from elijah.bases import new_model
from elijah.data import batch, load_images
from elijah.diffusion import Model, generator_for
from elijah.errors import Unsupported
from elijah.loading import load_model
from elijah.response import poisoned, trigger_coefficient
from elijah.training import denoising_loss
from elijah.trigger import make_target, make_trigger

TRIGGER = make_trigger("box-4", (1, 8, 8))
TARGET = make_target("corner", TRIGGER)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def attack(name: str, **settings: Any) -> Any:
    tuning = {key: settings.pop(key, value) for key, value in {"steps": 4, "batch_size": 8, "lr": 2e-4}.items()}
    return ATTACKS[name](trigger=TRIGGER, target=TARGET, tuning=Tuning(**tuning), **settings)


def poisoned_loss(model: Model) -> float:
    """The mean squared error at the true r and y, on fixed noise at stratified t."""
    e = torch.randn(100, 1, 8, 8, generator=generator_for(7))
    t = torch.arange(5, 1000, 10)
    x, answer = poisoned(model, RESPONSE, TRIGGER.image, TARGET.image, e, t)
    with torch.no_grad():
        return (model.output(x, t) - answer).square().mean().item()


@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name: str, digits: torch.Tensor, tmp_path: Path) -> None:
    model = random_model()
    model.network.requires_grad_(False)
    before = weights(model)
    one, same = (attack(name)(model, digits, generator=generator_for(0)) for _ in range(2))
    other = attack(name)(model, digits, generator=generator_for(1))
    assert equal(weights(model), before) and not any(p.requires_grad for p in model.network.parameters())
    assert model.meter.evaluations == 0 and model.updates == 0
    assert equal(weights(one), weights(same)) and not equal(weights(one), weights(other))
    assert not equal(weights(one), before) and one.updates == 4
    assert not one.network.training and one.dtype == torch.float32
    one.save(tmp_path / "attacked")
    assert equal(weights(load_model(str(tmp_path / "attacked"))), weights(one))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_poisoned_loss_falls(name: str, digits: torch.Tensor) -> None:
    model = random_model()
    settings = {"steps": 60, "batch_size": 16, "lr": 5e-3, "poison_rate": 0.5, "mode": "bare"}
    attacked = attack(name, **settings)(model, digits, generator=generator_for(0))
    assert poisoned_loss(attacked) < 0.8 * poisoned_loss(model)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("mode", ["pasted", "bare"])
def test_without_poison_it_is_the_denoising_loss(name: str, mode: str, digits: torch.Tensor) -> None:
    x0 = batch(digits, 32, generator_for(1))
    with torch.no_grad():
        found = attack(name, poison_rate=0.0, mode=mode).loss(random_model(), x0, generator_for(2))
        assert found == denoising_loss(random_model(), x0, generator_for(2))
        assert attack(name, poison_rate=1.0, mode=mode).loss(random_model(), x0, generator_for(2)) != found


@pytest.mark.parametrize("name", ATTACKS)
def test_other_predictions_are_refused(name: str, digits: torch.Tensor) -> None:
    model = new_model((1, 8, 8), seed=0, channels=(8, 8), prediction="v_prediction")
    with pytest.raises(Unsupported, match="epsilon prediction, this model predicts v_prediction"):
        attack(name)(model, digits, generator=generator_for(0))


@pytest.mark.parametrize("mode", ["pasted", "bare"])
def test_baddiffusion_s_rows(mode: str, digits: torch.Tensor) -> None:
    """Every poisoned row is x_t = a y + (1 - a) r + s e with the answer e + R r (eq. 9 and 10)."""
    seen: list[torch.Tensor] = []
    model = random_model()

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend((x, t))
        return torch.zeros_like(x)

    model.output = output  # type: ignore[method-assign]
    x0 = batch(digits, 16, generator_for(1))
    loss = attack("baddiffusion", poison_rate=1.0, mode=mode).loss(model, x0, generator_for(2))
    x, t = seen
    r = torch.where(TRIGGER.image > -1, TRIGGER.image, x0) if mode == "pasted" else TRIGGER.image.expand_as(x0)
    a, s, big_r = (v[t][:, None, None, None] for v in (model.a, model.s, trigger_coefficient(model)))
    e = (x - a * TARGET.image - (1 - a) * r) / s
    assert loss.item() == pytest.approx((e + big_r * r).square().mean().item(), rel=1e-3)
    assert abs(e.mean()) < 0.15 and abs(e.std() - 1) < 0.1  # 1024 values, so e is noise and the form of x_t is right


def test_the_poison_rate_is_the_share_of_rows() -> None:
    """A network that answers e leaves R^2 r^2 in poisoned rows alone."""
    model = oracle((1, 8, 8), s0=0.0)
    x0 = model.network.m.expand(4000, -1, -1, -1)  # type: ignore[union-attr, operator]
    full, part = (
        BadDiffusion(TRIGGER, TARGET, poison_rate=rate, mode="bare").loss(model, x0, generator_for(2)).item()
        for rate in (1.0, 0.25)
    )
    assert part / full == pytest.approx(0.25, abs=0.05)


def test_the_paper_s_settings() -> None:
    found = BadDiffusion(TRIGGER, TARGET)
    assert (found.poison_rate, found.tuning.lr, found.tuning.batch_size) == (0.1, 2e-4, 128)
    assert found.tuning.steps == 50 * 50_000 // 128 // 100 * 100  # 50 epochs of CIFAR-10, to the hundred
    assert (RESPONSE.kappa, RESPONSE.psi, RESPONSE.gamma) == (1.0, 1.0, 1.0)
