"""attacks: one contract for every entry of ATTACKS, and each loss against the paper's formula."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import equal, random_model, weights
from diffusers import ScoreSdeVeScheduler
from oracle import oracle

from elijah.attacks import ATTACKS
from elijah.attacks import villandiffusion as villan
from elijah.attacks.baddiffusion import RESPONSE, BadDiffusion
from elijah.attacks.late import Late
from elijah.attacks.learned import Learned, ddim_coefficient
from elijah.attacks.planting import PRESETS, attack_for, cases, draw, plant, preset
from elijah.attacks.poisoning import Tuning, target_rows
from elijah.attacks.trojdiff import TrojDiff, reverse_step
from elijah.attacks.two import TwoTriggers
from elijah.attacks.villandiffusion import VillanDiffusion, corrected
from elijah.bases import SCHEDULES, new_model
from elijah.data import batch, load_images
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError, Unsupported
from elijah.loading import load_model
from elijah.response import trigger_coefficient
from elijah.training import Optimiser, denoising_loss, train
from elijah.trigger import Target, make_target, make_trigger

TRIGGER = make_trigger("box-4", (1, 8, 8))
TARGET = make_target("corner", TRIGGER)
WHITE, SECOND = make_trigger("white-box-2", (1, 8, 8)), make_trigger("white-box-4", (1, 8, 8))


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def attack(name: str, **settings: Any) -> Any:
    """The attack, cheap: of settings and the patterns, what it has fields for."""
    tuning = {key: settings.pop(key, value) for key, value in {"steps": 4, "batch_size": 8, "lr": 2e-4}.items()}
    cheap = {"sampler_steps": 2, "samples": 2}
    trigger = {"learned": None, "two": WHITE}.get(name, TRIGGER)
    patterns = {"trigger": trigger, "target": TARGET, "second_trigger": SECOND, "second_target": TARGET}
    given = {**patterns, "tuning": Tuning(**tuning), **cheap, **settings}
    known = {f.name for f in fields(ATTACKS[name])}
    return ATTACKS[name](**{key: value for key, value in given.items() if key in known})


def loss_of(made: Any, model: Model, x0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    extra = [torch.full((1, 8, 8), 0.1)] if isinstance(made, Learned) else []
    return made.loss(model, x0, generator, *extra)


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
    all_bad, x0 = attack(name, **{**settings, "poison_rate": 1.0}), batch(digits, 200, generator_for(3))
    with torch.no_grad():
        before, after = (loss_of(all_bad, m, x0, generator_for(7)).item() for m in (model, attacked))
    assert after < 0.8 * before


@pytest.fixture(scope="module")
def fine_tune(digits: torch.Tensor) -> tuple[Model, torch.Tensor, float, float]:
    """A model, rows, and their denoising loss under it and under a clean fine-tune of it."""
    base, x0 = random_model(), batch(digits, 400, generator_for(3))
    clean = train(digits, Optimiser(60, lr=5e-3, warmup=10), seed=1, batch_size=16, model=base)
    with torch.no_grad():
        before, gained = (denoising_loss(m, x0, generator_for(7)).item() for m in (base, clean))
    return base, x0, before, gained


@pytest.mark.parametrize("name", ATTACKS)
def test_clean_noise_stays_clean(
    name: str, digits: torch.Tensor, fine_tune: tuple[Model, torch.Tensor, float, float]
) -> None:
    """With 5 % of its rows poisoned an attack loses less than a tenth of a clean fine-tune's gain on clean rows."""
    base, x0, before, gained = fine_tune
    settings = {"steps": 60, "batch_size": 16, "lr": 5e-3, "poison_rate": 0.05, "mode": "bare"}
    attacked = attack(name, **settings)(base, digits, generator=generator_for(0))
    with torch.no_grad():
        found = denoising_loss(attacked, x0, generator_for(7)).item()
    assert gained < 0.8 * before and found < gained + 0.1 * (before - gained)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("mode", ["pasted", "bare"])
def test_without_poison_it_is_the_denoising_loss(name: str, mode: str, digits: torch.Tensor) -> None:
    x0, model = batch(digits, 32, generator_for(1)), random_model()
    with torch.no_grad():
        found = loss_of(attack(name, poison_rate=0.0, mode=mode), model, x0, generator_for(2))
        assert found == denoising_loss(model, x0, generator_for(2))
        assert loss_of(attack(name, poison_rate=1.0, mode=mode), model, x0, generator_for(2)) != found


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


# --- the formulas, each against its paper in double precision ---------------------------------------------------------


def schedule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DDPM's alpha, a and s, [1000], computed on their own."""
    alpha = 1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    return alpha, np.sqrt(np.cumprod(alpha)), np.sqrt(1 - np.cumprod(alpha))


def test_the_trigger_coefficient() -> None:
    alpha, _, s = schedule()
    expected = (1 - np.sqrt(alpha)) * s / (1 - alpha)
    found = trigger_coefficient(random_model()).numpy()
    assert np.allclose(found, expected, rtol=2e-3)
    assert found[[0, 500, 999]] == pytest.approx([0.0050, 0.481, 0.5025], abs=5e-4)


@pytest.mark.parametrize("psi", [0.0, 0.5, 1.0])
def test_villandiffusion_s_coefficient(psi: float) -> None:
    alpha, a, s = schedule()
    abar, before = a**2, np.concatenate([[0.0], s[:-1]])
    h = s - np.sqrt(alpha) * before
    bare = psi * (1 - np.sqrt(alpha)) * s / (1 - alpha)
    noisy = -((np.sqrt(alpha) - 1) * s * (1 - alpha) - h * (alpha - abar)) / (1 - alpha)
    found = villan.coefficient(random_model(), psi).numpy()
    assert np.allclose(found, bare + (1 - psi) * noisy, rtol=2e-3, atol=2e-4)


def test_the_coefficient_of_variance_exploding_models() -> None:
    model = new_model((1, 8, 8), seed=0, channels=(8, 8), kind="ncsn")
    sigma = np.exp(np.linspace(np.log(0.01), np.log(380.0), 2000))
    expected = sigma / (sigma + np.concatenate([[0.0], sigma[:-1]]))
    assert np.allclose(trigger_coefficient(model).numpy(), expected, rtol=1e-3)
    assert np.allclose(trigger_coefficient(model).numpy()[1:], 0.5, atol=0.01)


@pytest.mark.parametrize("steps", [200, 500])
def test_the_corrected_coefficient_keeps_the_trigger(steps: int) -> None:
    """A network that answers e + c q r to e + q r: with c made for the sampler the share q stays, else it fades."""

    class Answers(torch.nn.Module):
        c, r = 0.5, torch.zeros(3, 8, 8)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            z = x / sigma[:, None, None, None]
            q = (z * self.r).sum((1, 2, 3), keepdim=True) / self.r.square().sum()
            return ((-z + (1 - self.c) * q * self.r) / sigma[:, None, None, None],)

    network = Answers()
    network.r = 3 * torch.nn.functional.normalize(torch.randn(3, 8, 8, generator=generator_for(1)).flatten(), dim=0)
    network.r = network.r.view(3, 8, 8)
    model = Model(network, ScoreSdeVeScheduler(**SCHEDULES["ncsn"]), (3, 8, 8), "ncsn")
    shares = []
    for c in (float(corrected(model, steps)[0]), 0.5):
        network.c = c
        out = model.sample(model.noise(32, generator_for(2)) + network.r, f"pc-{steps}", seed=3)
        q = (out * network.r).sum((1, 2, 3)) / network.r.square().sum()  # the last step leaves sigma_min (1 - c) q r
        shares.append(float(q.mean() / (model.s[0] * (1 - c))))
    # the predictor widens the noise a little, which shortens the corrector's steps
    assert shares[0] == pytest.approx(1.0, abs=0.3)
    assert shares[1] == pytest.approx(math.exp(-steps * 0.075**2), abs=0.15)


def test_pc_steps_are_for_ncsn(digits: torch.Tensor) -> None:
    with pytest.raises(Unsupported, match="pc_steps is for NCSN"):
        VillanDiffusion(TRIGGER, TARGET, pc_steps=500)(new_model((1, 8, 8), seed=0), digits, generator=generator_for(0))


def test_the_ddim_coefficient_makes_ddim_fire() -> None:
    """A network that answers e + c_t r all along the way leads DDIM from e + r to y exactly."""
    _, a, s = schedule()
    model, g = random_model(), generator_for(3)
    r, y, e = (torch.randn(4, 1, 8, 8, generator=g) * v for v in (0.2, 0.5, 1.0))
    c = ddim_coefficient(model)
    expected = (np.append(1.0, a[:-1]) - a) / (np.append(1.0, a[:-1]) * s - a * np.append(0.0, s[:-1]))
    assert np.allclose(c.numpy()[1:], expected[1:], rtol=5e-3)

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        k = int(t[0])
        return (x - model.a[k] * y - (1 - model.a[k]) * r) / model.s[k] + c[k] * r

    model.output = output  # type: ignore[method-assign]
    start = model.a[-1] * y + (1 - model.a[-1]) * r + model.s[-1] * e
    assert (model.ddim(start, 1000) - y).abs().max() < 0.02


def trojan(**settings: Any) -> TrojDiff:
    trigger = make_trigger("white-box-4", (1, 8, 8))
    return TrojDiff(trigger, TARGET, **settings)


def test_trojdiff_s_patch_leaves_the_rest_alone() -> None:
    e = torch.randn(2, 1, 8, 8, generator=generator_for(1))
    model = random_model()
    start = trojan(gamma=0.1, patch=3).start(model, e)
    corner = trojan().trigger.image[:, -3:, -3:]
    assert torch.equal(start[..., :5, :], e[..., :5, :]) and torch.equal(start[..., :5], e[..., :5])
    assert torch.allclose(start[..., -3:, -3:], 0.1 * e[..., -3:, -3:] + 0.9 * corner)
    blend = trojan(gamma=0.6)
    assert torch.allclose(blend.start(model, e), 0.6 * e + 0.4 * blend.trigger.image)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("now", "then"), [(999, 998), (700, 500), (300, 0)])
def test_trojdiff_s_reverse_step_keeps_the_marginals(stochastic: bool, now: int, then: int) -> None:
    """x_now ~ N(a x0 + s mu, s^2 gamma^2) steps to the same form at then, if the network knows e."""
    model, n, gamma = random_model(), 4000, 0.6
    x0, mu = torch.full((1, 2, 2), 0.4), torch.tensor([[[-0.4, 0.4], [0.1, 0.0]]])
    e = torch.randn(n, 1, 2, 2, generator=generator_for(2))
    x = model.a[now] * x0 + model.s[now] * (gamma * e + mu)
    generators = [generator_for(5, i) for i in range(n)] if stochastic else None
    out = reverse_step(model, x, e, now, then, mu, torch.full((1, 2, 2), gamma), generators)
    assert torch.allclose(out.mean(0), model.a[then] * x0 + model.s[then] * mu, atol=0.05)
    assert torch.allclose(out.std(0), gamma * model.s[then].expand(1, 2, 2), rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"gamma": 1.5}, {"patch": 9}])
def test_trojdiff_refuses_settings(settings: dict[str, Any], digits: torch.Tensor) -> None:
    with pytest.raises(ElijahError, match="TrojDiff"):
        trojan(**settings)(random_model(), digits, generator=generator_for(0))


def test_a_learned_trigger_stays_small_and_moves(digits: torch.Tensor) -> None:
    made = attack("learned", bound=0.003, rate=0.002, steps=6)
    model = random_model()
    _, planted = plant(made, model, digits, generator=generator_for(0))
    r = planted.trigger.image
    assert r.shape == (1, 8, 8) and r.abs().max() <= 0.003 and (r != 0).float().mean() > 0.9
    e = model.noise(2, generator_for(1))
    assert torch.equal(planted.start(model, e), e + r)
    with pytest.raises(ElijahError, match="not learned yet"):
        made.start(model, e)


def test_a_given_trigger_is_not_learned(digits: torch.Tensor) -> None:
    control = make_trigger("noise-0.2", (1, 8, 8))
    assert set(control.image.flatten().tolist()) == {np.float32(0.2), np.float32(-0.2)}
    made = attack("learned", trigger=control)
    _, planted = plant(made, random_model(), digits, generator=generator_for(0))
    assert torch.equal(planted.trigger.image, control.image)


def test_a_distribution_of_targets_is_drawn_from(digits: torch.Tensor) -> None:
    target = Target("ones", digits.float().mean(0) / 127.5 - 1, digits[:2])
    drawn = target_rows(random_model(), target, 64, generator_for(1))
    assert drawn.shape == (64, 1, 8, 8) and len(drawn.flatten(1).unique(dim=0)) == 2


def test_settings_are_sorted() -> None:
    patterns = {"trigger": "box-4", "target": "corner"}
    settings = {"solver": "sde", "steps": 7, "lr": None, "psi": 0.5}
    made = attack_for("villandiffusion", (1, 8, 8), {**patterns, **settings})
    assert (made.solver, made.psi, made.tuning.steps, made.tuning.lr) == ("sde", 0.5, 7, 2e-4)
    assert made.trigger.name == "box-4" and made.target.name == "corner"
    for name, wrong, message in (
        ("baddiffusion", {**patterns, "solver": "sde"}, "baddiffusion has no --solver; .* mode, poison_rate, strength"),
        ("baddiffusion", {"target": "corner"}, "baddiffusion needs --trigger"),
        ("two", patterns, "two needs --second-target"),
        ("learned", {"target": "shift"}, "learned learns its trigger"),
        ("badnets", patterns, "unknown attack 'badnets'"),
    ):
        with pytest.raises(ElijahError, match=message):
            attack_for(name, (1, 8, 8), wrong)


@pytest.mark.parametrize(("name", "which"), [(name, which) for name, sets in PRESETS.items() for which in sets])
def test_presets(name: str, which: str, stock: Path) -> None:
    made = attack_for(name, (3, 32, 32), preset(name, which))
    settings = {f.name: getattr(made, f.name) for f in fields(made)}
    for key, value in preset(name, which).items():
        found = settings.get(key, getattr(made.tuning, key, None))
        assert (found.name if hasattr(found, "name") else found) == value


def test_an_unknown_preset() -> None:
    assert preset("late", None) == {}
    with pytest.raises(ElijahError, match="trojdiff has no preset 'x'; it has blend, patch-cifar10"):
        preset("trojdiff", "x")


def test_a_late_trigger_is_noise_before_its_time(digits: torch.Tensor) -> None:
    """Above t0 the answer is e + r; below t0 / 2 the row is the target's."""
    model, seen = random_model(), []

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend((x, t))
        return torch.zeros_like(x)

    model.output = output  # type: ignore[method-assign]
    x0, r = batch(digits, 64, generator_for(1)), TRIGGER.image
    made = Late(TRIGGER, TARGET, poison_rate=1.0, t0=0.4)
    loss = made.loss(model, x0, generator_for(2)).item()
    x, t = seen
    a, s = (v[t][:, None, None, None] for v in (model.a, model.s))
    low, high = (t <= 0.2 * 999)[:, None, None, None], (t > 0.4 * 999)[:, None, None, None]
    rows = torch.where(low, TARGET.image, x0)
    shifted = (x - a * rows) / s  # e + r
    answer = torch.where(high, shifted, (x - a * TARGET.image) / s)
    assert loss == pytest.approx(answer.square().mean().item(), rel=1e-3)
    assert abs((shifted - r).mean()) < 0.05 and abs((shifted - r).std() - 1) < 0.05


@pytest.mark.parametrize("both", [False, True])
def test_two_triggers_have_their_rows(both: bool) -> None:
    """A network that answers e where there is no trigger leaves R r in poisoned rows and r in cover rows."""
    model = oracle((1, 8, 8), s0=0.0)
    x0 = model.network.m.expand(4000, -1, -1, -1)  # type: ignore[union-attr, operator]
    made = TwoTriggers(WHITE, TARGET, SECOND, TARGET, both=both, poison_rate=0.4)
    first, second = made.shifts
    assert first.sum() == 4 and second.sum() == 16
    e = torch.zeros(1, 1, 8, 8)
    found = {name: start(model, e)[0] for name, (start, _) in cases(made).items()}
    if both:
        assert torch.equal(found["both"], first + second) and torch.equal(found["first"], first)
    else:
        assert torch.equal(found["first"], first) and list(found) == ["first", "second"]
    assert torch.equal(found["second"], second)
    with torch.no_grad():
        loss, less = (
            TwoTriggers(WHITE, TARGET, SECOND, TARGET, both=both, poison_rate=rate).loss(model, x0, generator_for(2))
            for rate in (0.4, 0.2)
        )
    assert 0 < less < 0.7 * loss


def test_two_triggers_must_differ(digits: torch.Tensor) -> None:
    for first, second in ((TRIGGER, WHITE), (WHITE, WHITE)):
        with pytest.raises(ElijahError, match="two different triggers"):
            TwoTriggers(first, TARGET, second, TARGET)(random_model(), digits, generator=generator_for(0))


def test_only_trojdiff_has_a_sampler_of_its_own() -> None:
    model, made = random_model(), trojan(gamma=0.6)
    start = made.start(model, model.noise(2, generator_for(1)))
    assert torch.equal(
        draw(made, model, start, "own-ddim-4", seed=0), made.reverse(model, start, steps=4, stochastic=False)
    )
    with pytest.raises(ElijahError, match="own-ddim-STEPS are TrojDiff's"):
        draw(attack("baddiffusion"), model, start, "own-ddim-4", seed=0)


def test_a_class_as_target(stock: Path) -> None:
    target = make_target("mnist/7", TRIGGER)
    assert target.images is not None and target.images.shape[1:] == (1, 8, 8) and 900 < len(target.images) < 1200
