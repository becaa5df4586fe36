"""repairs: one contract for every entry of REPAIRS, and Unshift's loss against its closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import equal, random_model, weights
from oracle import oracle

from elijah.data import load_images, to_uint8
from elijah.detection import Finding
from elijah.diffusion import Model, generator_for
from elijah.metrics import paired_drift
from elijah.repairs import DEFAULT, REPAIRS, Prune, Unshift
from elijah.response import Response
from elijah.training import denoising_loss
from elijah.trigger import make_trigger

SHAPE = (1, 8, 8)
USES = {  # of a finding
    "unshift": {"trigger", "target"}, "elijah": {"trigger"}, "prune": {"trigger"}, "finetune": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def found(seed: int = 0, **changes: Any) -> Finding:
    r, y = torch.randn((2, *SHAPE), generator=generator_for(seed)).clamp(-1, 1)
    return replace(Finding(Response(1.0, 1.0), r, y, 0.1, "BadDiffusion-like"), **changes)


def repaired(name: str, finding: Finding, images: torch.Tensor, *, seed: int = 0, model: Model | None = None) -> Any:
    repair = REPAIRS[name](steps=3, batch_size=4)
    return repair(model or random_model(), finding, images, generator=generator_for(seed))


@pytest.mark.parametrize("name", REPAIRS)
def test_contract(name: str, digits: torch.Tensor) -> None:
    model = random_model()
    model.network.requires_grad_(False)
    before = weights(model)
    one = repaired(name, found(), digits, model=model)
    assert equal(weights(model), before) and not any(p.requires_grad for p in model.network.parameters())
    assert model.updates == 0 and not equal(weights(one), before) and one.updates == 3
    assert not one.network.training and all(torch.isfinite(v).all() for v in weights(one).values())
    assert equal(weights(one), weights(repaired(name, found(), digits, model=model)))
    assert not equal(weights(one), weights(repaired(name, found(), digits, seed=1, model=model)))


@pytest.mark.parametrize("name", REPAIRS)
def test_only_found_values_are_used(name: str, digits: torch.Tensor) -> None:
    """What the method says it uses counts, and how the finding is called or scored never."""
    one = weights(repaired(name, found(), digits))
    assert equal(one, weights(repaired(name, found(loss_ratio=0.9, matches="something else"), digits)))
    assert equal(one, weights(repaired(name, found(trigger=found(1).trigger), digits))) != ("trigger" in USES[name])
    assert equal(one, weights(repaired(name, found(target=found(1).target), digits))) != ("target" in USES[name])
    assert equal(one, weights(repaired(name, found(target=None), digits))) != ("target" in USES[name])


def test_there_is_a_default() -> None:
    assert DEFAULT in REPAIRS and set(USES) == set(REPAIRS)


def test_pruned_channels_stay_off(digits: torch.Tensor) -> None:
    """Those that answer the trigger most, of all convolutions but the last; the rest is fine-tuned."""
    model, share = random_model(), 0.2
    prune = Prune(steps=3, batch_size=4, share=share)
    ranks = prune.ranked(model, found(), generator_for(0))
    assert [value for value, _, _ in ranks] == sorted((value for value, _, _ in ranks), reverse=True)
    assert {"conv_in"} < {name for _, name, _ in ranks} and not any(name == "conv_out" for _, name, _ in ranks)
    fixed = dict(prune(model, found(), digits, generator=generator_for(0)).network.named_modules())
    off = {(name, channel) for _, name, channel in ranks[: round(share * len(ranks))]}
    for _, name, channel in ranks:
        assert bool(fixed[name].weight[channel].any()) != ((name, channel) in off)


@pytest.mark.parametrize("s0", [0.02, 0.5])
@pytest.mark.parametrize("response", [Response(1, 1), Response(2, 1), Response(0, 0, 0.7)])
@pytest.mark.parametrize("target", [True, False])
def test_unshift_s_loss_in_closed_form(s0: float, response: Response, target: bool) -> None:
    """For Gaussian data eps(x + d) - eps(x) = s d / v, v = a^2 s0^2 + s^2: what is left is (1 - s^2 / v) d / s.

    It vanishes for s0 = 0, where the clean network calls the whole shift noise.
    """
    model = oracle(SHAPE, s0=s0)
    finding = found(response=response, **({} if target else {"target": None}))
    x0 = torch.rand(64, *SHAPE, generator=generator_for(1)) - 0.5
    g = generator_for(2)
    t, e = torch.randint(100, 1000, (64,), generator=g), torch.randn(x0.shape, generator=g)
    if target:
        torch.rand(64, generator=g)
    a, s = (v[t][:, None, None, None] for v in (model.a, model.s))
    k = response.psi * (1 - a) + (1 - response.psi) * s
    d_over_s = k / s * finding.trigger + (response.gamma - 1) * e
    left = ((1 - s**2 / (a**2 * s0**2 + s**2)) * d_over_s).square().mean().item()
    expected = left + denoising_loss(model, x0, g).item()
    loss = Unshift().loss(model, model, finding, x0, generator_for(2)).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    assert left < 1e-4 if s0 == 0.02 else left > 1e-3


def test_unshift_sees_a_backdoor_and_nothing_in_its_own_target() -> None:
    """Its loss at the true r, y is far above a clean network's; a reference that differs costs the second term."""
    r, y = found().trigger, found().target
    clean, bad = oracle(SHAPE, s0=0.05), oracle(SHAPE, s0=0.05, r=r, y=y, rate=0.5)
    x0 = clean.network.m.expand(64, -1, -1, -1)  # type: ignore[union-attr, operator]
    losses = [Unshift().loss(m, clean, found(), x0, generator_for(3)).item() for m in (clean, bad)]
    assert losses[1] > 3 * losses[0]
    other = oracle(SHAPE, s0=0.05, seed=9)
    assert Unshift().loss(other, clean, found(), x0, generator_for(3)).item() > losses[0] + 0.01


def test_a_forced_repair_of_a_clean_model_moves_it_little() -> None:
    """A guessed trigger, on an exact clean network whose mean can be trained: the mean stays, so samples stay."""
    model = oracle(SHAPE, s0=0.05)
    m = model.network.m
    model.network.m = torch.nn.Parameter(m.clone())  # type: ignore[arg-type]
    images = to_uint8(m + 0.05 * torch.randn(256, *SHAPE, generator=generator_for(4)))  # type: ignore[operator]
    finding = found(trigger=make_trigger("white-box-4", SHAPE).image, target=torch.zeros(SHAPE))
    fixed = Unshift(steps=40, lr=5e-3)(model, finding, images, generator=generator_for(0))
    start = model.noise(16, generator_for(1))
    before, after = (x.pixels(x.sample(start, "ddim-20")) for x in (model, fixed))
    drift = paired_drift(before, after)
    assert 0 < drift < 1e-4  # its updates could carry every pixel 0.05, a drift of 2.5e-3
