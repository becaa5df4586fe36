"""aware: without a weight it is the attack that it hides; with one the detector's loss ratio rises at its trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import equal, random_model, weights
from oracle import oracle

from elijah.attacks.aware import FAMILIES, Aware
from elijah.attacks.baddiffusion import BadDiffusion
from elijah.attacks.planting import PRESETS, attack_for
from elijah.attacks.poisoning import Tuning
from elijah.attacks.villandiffusion import VillanDiffusion
from elijah.bases import new_model
from elijah.data import batch, load_images
from elijah.detectors.hypothesis import Hypothesis, antithetic, errors, ratio
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError, Unsupported
from elijah.response import Response
from elijah.trigger import make_target, make_trigger

SHAPE = (1, 8, 8)
TRIGGER = make_trigger("white-box-4", SHAPE)
TARGET = make_target("corner", TRIGGER)
PLAIN: dict[str, Callable[[str], Any]] = {
    "sde": lambda mode: BadDiffusion(TRIGGER, TARGET, 0.5, mode),
    "ode": lambda mode: VillanDiffusion(TRIGGER, TARGET, 0.5, mode),
}
HIGH = {"sde": 3.0, "ode": 30.0}  # margins far above what networks this small have
QUICK = Tuning(steps=40, batch_size=8, lr=5e-3)


def aware(solver: str = "sde", **settings: Any) -> Aware:
    return replace(Aware(TRIGGER, TARGET, 0.5, "bare", solver, rows=8), **settings)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def measured(made: Aware, model: Model) -> float:
    """L, over many rows."""
    with torch.no_grad():
        return float(replace(made, rows=512).loss_ratio(model, generator_for(9)))


@pytest.mark.parametrize("mode", ["bare", "pasted"])
@pytest.mark.parametrize("solver", PLAIN)
def test_without_a_weight_it_is_its_attack_bit_by_bit(solver: str, mode: str, digits: torch.Tensor) -> None:
    model, x0 = random_model(), batch(digits, 32, generator_for(1))
    with torch.no_grad():
        plain = PLAIN[solver](mode).loss(model, x0, generator_for(2))
        none = aware(solver, mode=mode, weight=0.0).loss(model, x0, generator_for(2))
        some = aware(solver, mode=mode, weight=2.0, margin=99.0).loss(model, x0, generator_for(2))
    assert torch.equal(none, plain) and some > plain
    short = Tuning(steps=3, batch_size=8)
    one = replace(PLAIN[solver](mode), tuning=short)(model, digits, generator=generator_for(3))
    other = aware(solver, mode=mode, weight=0.0, tuning=short)(model, digits, generator=generator_for(3))
    assert equal(weights(one), weights(other))


@pytest.mark.parametrize(("solver", "kappa"), [("sde", 1.0), ("ode", 2.0)])
def test_the_loss_ratio_is_the_detector_s(solver: str, kappa: float) -> None:
    """The same number as hypothesis.errors at the truth; near 0 on an exact backdoor, near 1 on a network without."""
    made, family = aware(solver, rows=64), FAMILIES[solver]
    bad = oracle(SHAPE, r=TRIGGER.image, y=TARGET.image, response=Response(kappa, 1.0))
    g = generator_for(4)
    draws = [antithetic(bad, 64, *window, g) for window in family.judged]
    h = Hypothesis(family, TRIGGER.image, TARGET.image)
    expected = max(float(ratio(*errors(bad, [h], [draw])[0])) for draw in draws)
    assert made.loss_ratio(bad, generator_for(4)).item() == pytest.approx(expected, rel=1e-4)
    assert measured(made, bad) < 0.02
    clean = oracle(SHAPE, s0=0.0)
    at_the_mean = replace(made, target=replace(TARGET, image=torch.as_tensor(clean.network.m)))
    assert measured(at_the_mean, clean) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("solver", PLAIN)
def test_the_penalty_raises_the_loss_ratio_and_stops_at_the_margin(solver: str, digits: torch.Tensor) -> None:
    base, high = random_model(), HIGH[solver]
    plain, hidden, far = (
        aware(solver, weight=weight, margin=margin, tuning=QUICK)(base, digits, generator=generator_for(5))
        for weight, margin in ((0.0, high), (10.0, high), (10.0, -1.0))
    )
    made = aware(solver)
    before, after = measured(made, plain), measured(made, hidden)
    assert before < high / 2 and after > 0.8 * high
    assert equal(weights(far), weights(plain))  # a margin below L: no penalty, no gradient


def test_it_starts_like_its_attack_and_has_presets() -> None:
    e = torch.randn((2, *SHAPE), generator=generator_for(0))
    for solver, plain in PLAIN.items():
        assert torch.equal(aware(solver).start(random_model(), e), plain("bare").start(random_model(), e))
    solvers = [attack_for("aware", SHAPE, {**chosen, "weight": 3.0}).solver for chosen in PRESETS["aware"].values()]
    assert solvers == ["sde", "ode"]


def test_what_is_refused(digits: torch.Tensor) -> None:
    for settings, message in (({"solver": "x"}, "unknown solver"), ({"weight": -1.0}, "not be negative"),
                              ({"rows": 7}, "rows must be even")):  # fmt: skip
        with pytest.raises(ElijahError, match=message):
            aware(**settings)(random_model(), digits, generator=generator_for(0))
    with pytest.raises(Unsupported, match="this one is ncsn"):
        aware()(new_model(SHAPE, seed=0, channels=(8, 8), kind="ncsn"), digits, generator=generator_for(0))
