"""The guard: what it takes for harm, from a model's own samples alone."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_model
from oracle import oracle

from elijah import guard
from elijah.diffusion import Model, generator_for
from elijah.guard import Quality, image_loss, quality

SHAPE = (1, 8, 8)


def test_an_unchanged_model_is_unharmed() -> None:
    model, before = random_model(), torch.rand(6, *SHAPE, generator=generator_for(1))
    seen = quality(model, model.clone(), before, before)
    assert (seen.drift, seen.diversity, seen.loss) == pytest.approx((0, 1, 1)) and not seen.harm


def test_the_loss_is_the_worse_of_full_and_half_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On samples of the model itself; what a repair had to train on is not asked for."""
    before, looked = torch.tensor([0.0, 1.0, 0.5]).reshape(3, 1, 1, 1).expand(3, *SHAPE), []

    def loss(model: Model, images: torch.Tensor) -> float:
        looked.append(images[:, 0, 0, 0].tolist())
        faint = images.float().std() < 100
        return 2.0 if model is not fixed else 5.0 if faint else 2.0

    monkeypatch.setattr(guard, "image_loss", loss)
    model, fixed = oracle(SHAPE), oracle(SHAPE)
    seen = quality(model, fixed, before, before)
    assert seen.loss == 2.5 and len(seen.harm) == 1 and "denoising loss is 2.50" in seen.harm[0]
    assert {tuple(x) for x in looked} == {(0, 255, 128), (64, 191, 128)}


def test_a_network_that_forgot_what_it_never_draws_is_harmed() -> None:
    """Two optimal networks of bright data: one sees all that is near the grey mean as noise, to be drawn bright."""
    before = torch.full((4, *SHAPE), 0.9)
    knows, forgot = oracle(SHAPE, s0=0.5), oracle(SHAPE, s0=0.02)
    for model in knows, forgot:
        model.network.m = torch.full(SHAPE, 0.8)  # type: ignore[assignment]
    seen = quality(knows, forgot, before, before)
    full = torch.full((4, *SHAPE), 230, dtype=torch.uint8)
    assert image_loss(forgot, full) < image_loss(knows, full)
    assert seen.loss > 1.25 and seen.harm and seen.drift == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_harm(bad: float) -> None:
    assert len(Quality(bad, bad, bad).harm) == 3
