"""repairs: one contract for every entry of REPAIRS, Unshift's loss against its closed form, and when it ends."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import equal, random_model, weights
from hypothesis import given
from hypothesis import strategies as st
from oracle import oracle

from elijah import training
from elijah.bases import new_model
from elijah.data import load_images, to_uint8
from elijah.detection import Finding
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.metrics import paired_drift
from elijah.repairs import DEFAULT, REPAIRS, Distill, Erase, Prune, Unshift
from elijah.repairs.erase import OUTER, erasing
from elijah.repairs.unshift import black, held_shares, is_loose, later, leak, triggers
from elijah.response import Response
from elijah.trigger import make_trigger

SHAPE = (1, 8, 8)
NONE = torch.empty(0, *SHAPE)
USES = {  # of a finding
    **{key: {"trigger", "target", "response", "loss_ratio"} for key in ("unshift", "distill", "erase")},
    "elijah": {"trigger"}, "prune": {"trigger", "response"}, "finetune": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def found(seed: int = 0, **changes: Any) -> Finding:
    r, y = torch.randn((2, *SHAPE), generator=generator_for(seed)).clamp(-1, 1)
    return replace(Finding(Response(1.0, 1.0), r, y, 0.1, "BadDiffusion-like"), **changes)


def repaired(
    name: str, finding: Finding | list[Finding], images: torch.Tensor, *, seed: int = 0, model: Model | None = None,
    checkpoint: Path | None = None, progress: Progress = no_progress,
) -> Model:  # fmt: skip
    rows: dict[str, Any] = (
        {"batch_size": 16, "group": 2} if name in ("unshift", "distill", "erase") else {"batch_size": 4}
    )
    repair = REPAIRS[name](steps=3, **rows)
    findings = finding if isinstance(finding, list) else [finding]
    fixed: Model = repair(
        model or random_model(),
        findings,
        images,
        generator=generator_for(seed),
        progress=progress,
        checkpoint=checkpoint,
    )
    return fixed


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
    """What the method says it uses counts, and how the finding is called never."""
    one = weights(repaired(name, found(), digits))
    assert equal(one, weights(repaired(name, found(loss_ratio=0.09, matches="something else"), digits)))
    assert equal(one, weights(repaired(name, found(loss_ratio=0.9), digits))) != ("loss_ratio" in USES[name])
    assert equal(one, weights(repaired(name, found(trigger=found(1).trigger), digits))) != ("trigger" in USES[name])
    assert equal(one, weights(repaired(name, found(target=found(1).target), digits))) != ("target" in USES[name])
    assert equal(one, weights(repaired(name, found(target=None), digits))) != ("target" in USES[name])
    response = found(response=Response(2.0, 0.0, 0.5))
    assert equal(one, weights(repaired(name, response, digits))) != ("response" in USES[name])


@pytest.mark.parametrize("name", REPAIRS)
def test_all_findings_are_repaired_at_once(name: str, digits: torch.Tensor) -> None:
    one, two = (weights(repaired(name, f, digits)) for f in (found(), [found(), found(1)]))
    assert equal(one, two) != (name != "finetune")
    assert equal(one, weights(repaired(name, [found(), found()], digits)))
    patch = found(1, patch=torch.ones(1, *SHAPE[1:]), response=Response(0.0, 0.0, 0.3), target=None)
    mixed = repaired(name, [found(), patch], digits)
    assert all(torch.isfinite(v).all() for v in weights(mixed).values())


@pytest.mark.parametrize("name", REPAIRS)
def test_a_killed_repair_goes_on(
    name: str, digits: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its checkpoint it ends like one that was not killed, its number of updates too."""
    whole = repaired(name, found(), digits)
    file = tmp_path / "repair.ckpt"
    every = functools.partial(training.Optimiser, checkpoint_every=1)
    for module in ("finetune", "elijah", "unshift"):
        monkeypatch.setattr(
            f"elijah.repairs.{module}.Optimiser", lambda *a, **k: every(*a, **(k | {"checkpoint_every": 1}))
        )
    calls = 0

    def kill(what: str, done: int, of: int) -> None:
        nonlocal calls
        calls += 1
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repaired(name, found(), digits, checkpoint=file, progress=kill)
    assert calls == 3 and file.is_file()
    again = repaired(name, found(), digits, checkpoint=file)
    assert equal(weights(again), weights(whole)) and again.updates == 3


@pytest.mark.parametrize("name", REPAIRS)
def test_variance_exploding_models_are_repaired_too(name: str, digits: torch.Tensor) -> None:
    """They take sigma for t, and have a frequency that no update may touch."""
    model = new_model(SHAPE, seed=0, channels=(8, 8), kind="ncsn")
    fixed = repaired(name, found(response=Response(1.0, 0.0)), digits, model=model)
    assert fixed.updates == 3 and all(torch.isfinite(v).all() for v in weights(fixed).values())
    changed = {key for key, value in weights(fixed).items() if not torch.equal(value, weights(model)[key])}
    assert changed and not any("time_proj" in key for key in changed)


@pytest.mark.parametrize(("largest", "least"), [(22.0, 1.0), (380.0, 1.0), (0.5, 0.5)])
def test_where_exploding_models_are_asked_sigma_decides(
    largest: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the range of the images what is left of a trigger looks like a part of them; t itself says little of it."""
    model, asked = new_model(SHAPE, seed=0, channels=(8, 8), kind="ncsn", sigma_max=largest), []
    k = round(Unshift().least_t(model) * model.T)
    assert model.s[k] >= 0.99999 * least > model.s[k - 1]
    assert Unshift(t_min=0.3).least_t(oracle(SHAPE)) == 0.3
    monkeypatch.setattr(Model, "eps", lambda _, x, t: asked.append(t) or torch.zeros_like(x))
    Unshift().left(model, model, [found(response=Response(0.87, 0.0))], torch.rand(64, *SHAPE), generator_for(1))
    assert min(t.min() for t in asked) >= k


def test_there_is_a_default() -> None:
    assert DEFAULT in REPAIRS and set(USES) == set(REPAIRS)


def test_pruned_channels_stay_off(digits: torch.Tensor) -> None:
    """Those that answer the trigger most, of all convolutions but the last; the rest is fine-tuned."""
    model, share = random_model(), 0.2
    prune = Prune(steps=3, batch_size=4, share=share)
    ranks = prune.ranked(model, [found()], generator_for(0))
    assert [value for value, _, _ in ranks] == sorted((value for value, _, _ in ranks), reverse=True)
    assert {"conv_in"} < {name for _, name, _ in ranks} and not any(name == "conv_out" for _, name, _ in ranks)
    fixed = dict(prune(model, [found()], digits, generator=generator_for(0)).network.named_modules())
    off = {(name, channel) for _, name, channel in ranks[: round(share * len(ranks))]}
    for _, name, channel in ranks:
        assert bool(fixed[name].weight[channel].any()) != ((name, channel) in off)


@pytest.mark.parametrize("s0", [0.02, 0.5])
@pytest.mark.parametrize("response", [Response(1, 1), Response(2, 1), Response(0, 0, 0.7)])
@pytest.mark.parametrize("target", ["one", "distribution", "none"])
@pytest.mark.parametrize("fading", [None, (0.2, 0.5)])
def test_unshift_s_loss_in_closed_form(
    s0: float, response: Response, target: str, fading: tuple[float, float] | None
) -> None:
    """For Gaussian data eps(x + d) - eps(x) = s d / v, v = a^2 s0^2 + s^2: what is left is (1 - s^2 / v) d / s.

    It vanishes for s0 = 0, where the clean network calls the whole shift noise, but for what is asked of the trigger
    beyond that, if it leaves the noise as it is.
    """
    model, one, fades = oracle(SHAPE, s0=s0), target == "one", fading is not None and response.gamma == 1
    finding = found(response=response, distribution=target == "distribution")
    finding = replace(finding, target=None) if target == "none" else finding
    rows = {"t_min": 0.1, "carried_share": 0.2, "target_share": 0.4, "target_t_min": 0.3}
    repair = Unshift(**rows, group=16, most=7.0, fading=fading)
    x0 = torch.rand(64, *SHAPE, generator=generator_for(1)) - 0.5
    g = generator_for(2)
    t = ((0.1 + 0.9 * (torch.arange(4) + torch.rand(4, generator=g)) / 4) * 1000).long().repeat_interleave(16)
    e = torch.randn(x0.shape, generator=g)
    at_target, carried = torch.rand((2, 64, 1, 1, 1), generator=g)
    torch.rand(64, generator=g)  # the gamma of patches
    t_held = torch.randint(1000, (64,), generator=g)
    e_held = torch.randn(x0.shape, generator=g)
    a, s = (v[t][:, None, None, None] for v in (model.a, model.s))
    k = response.psi * (1 - a) + (1 - response.psi) * s
    q = carried / 0.2 if fades else torch.ones_like(carried)
    r_over_s = torch.where(carried < 0.2, q, k / s) * finding.trigger
    d_over_s = r_over_s + (response.gamma - 1) * e
    walks = (at_target < 0.4) & (t >= 300)[:, None, None, None] & torch.tensor(one)
    d_over_s = d_over_s + walks * a / s * ((found().target if one else x0) - x0)
    ramp = ((t / 1000 - 0.3) / 0.1).clamp(0, 1)[:, None, None, None]
    more = ramp * (fading[0] + (fading[1] * a / s).clamp(max=1)) if fades else 0.0
    delta = -(1 - s**2 / (a**2 * s0**2 + s**2)) * d_over_s - more * r_over_s
    alike = delta.unflatten(0, (4, 16)).mean(1).repeat_interleave(16, 0)
    left = ((s / a).square().clamp(1, 7) * (delta.square() + alike.square())).mean().item()
    held = (model.eps(model.diffuse(x0, e_held, t_held), t_held) - e_held).square().mean().item()
    loss = repair.loss(model, model, [finding], x0, generator_for(2)).item()
    assert loss == pytest.approx(left + held, rel=1e-3)
    assert left < 1e-3 if s0 == 0.02 and not fades else left > 1e-3


def test_what_is_asked_to_fade() -> None:
    """Patches and what leaves the noise as it is; not what scales all of it."""
    model, blend = oracle(SHAPE), found(response=Response(0.0, 0.0, 0.7))
    assert Unshift().fades_on(model, found()) and Unshift().fades_on(model, replace(blend, patch=torch.ones(1, 8, 8)))
    assert not Unshift().fades_on(model, blend) and not Unshift(fading=None).fades_on(model, found())
    clean, x0 = oracle(SHAPE, s0=0.02), torch.zeros(64, *SHAPE)
    rows = ([blend], [blend, found()], [found()])  # of two, each in its own rows
    losses = [Unshift().left(clean, clean, findings, x0, generator_for(1)).item() for findings in rows]
    assert losses[0] < 1e-3 < losses[1] < 0.7 * losses[2]


def test_a_trigger_fades_along_a_deterministic_sampler_s_way() -> None:
    """Of a network that answers as it is asked, q is what the docstring's formula says, at every t."""
    model, m, b = oracle(SHAPE), 0.1, 1.0
    w = (model.s / model.a).double()
    more = Unshift(fading=(m, b)).more(model, torch.arange(model.T)).flatten().double()
    least = int(Unshift().fades[1] * model.T)
    assert w[least] > b and not more[: int(Unshift().fades[0] * model.T)].any() and 0 < more[350] < more[400]
    share = float(w[-1])  # q w = c / a, which a step of DDIM moves by what eps has of r times the step of w
    for t in range(model.T - 1, least, -1):
        share += float((1 + more[t]) * share / w[t] * (w[t - 1] - w[t]))
    expected = float((w[least] / w[-1]) ** m * torch.exp(-b / w[least] + b / w[-1]))
    assert share / float(w[least]) == pytest.approx(expected, rel=0.02)
    ve = new_model(SHAPE, seed=0, channels=(8, 8), kind="ncsn")
    assert not Unshift().fades_on(ve, found()) and not Distill().more(model, torch.arange(5)).any()


def test_on_larger_images_a_trigger_fades_later() -> None:
    """Where s / a is as many times larger as they are wider than 16 pixels; on smaller ones nothing changes."""
    small, large = oracle((3, 16, 16)), oracle((3, 64, 64))
    w = small.s / small.a
    assert later(small, 0.3) == later(oracle((3, 8, 8)), 0.3) == 0.3
    k = round(later(large, 0.3) * large.T)
    assert w[k - 1] < 4 * w[300] <= w[k]
    t = torch.arange(large.T)
    assert not Unshift().more(large, t[:k]).any() and Unshift().more(large, t[k + 1 :]).all()
    at_once = Unshift(fades=(0.3, 0.3)).more(small, torch.arange(small.T))
    assert at_once.isfinite().all() and not at_once[:300].any() and at_once[301:].all()


def test_what_a_loose_finding_is_near() -> None:
    """A trigger on a black background, which half of its rows have; not so faint ones, patches, or other responses."""
    model, g = oracle(SHAPE), generator_for(2)
    ode = found(response=Response(2.0, 1.0), loss_ratio=0.21)
    assert is_loose(model, ode) and is_loose(model, found(loss_ratio=0.11))
    others: list[dict[str, Any]] = [
        {"loss_ratio": 0.19}, {"trigger": 0.5 * ode.trigger}, {"patch": torch.ones(1, *SHAPE[1:])},
        {"response": Response(0.87, 0.0)}, {"response": Response(0.0, 0.0, 0.7)},
    ]  # fmt: skip
    assert not any(is_loose(model, replace(ode, **changes)) for changes in others)
    assert not is_loose(replace(model, kind="ldm"), ode)

    for _ in range(20):
        r = black(torch.zeros(3, 16, 16), g)
        hole = (r == 0).all(0)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert r.square().mean().sqrt() == pytest.approx(0.87) and r[:, ~hole].std() < 1e-6 and r.max() == 0
        assert rows == columns and 4 <= rows <= 12 and hole.sum() == rows * columns

    asked: list[torch.Tensor] = []
    teacher = oracle(SHAPE)

    def eps(self: Model, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return torch.zeros_like(x)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Model, "eps", eps)
        for finding in (ode, replace(ode, loss_ratio=0.1)):
            Unshift(target_share=0.0, carried_share=0.0).left(
                model, teacher, [finding], torch.zeros(64, *SHAPE), generator_for(1)
            )  # fmt: skip
    clean, loose, _, near = asked
    rows = ((loose - near).abs().amax((1, 2, 3)) > 1e-3).sum()
    assert 16 < rows < 48 and not torch.equal(clean, near)


def test_a_loose_finding_takes_as_many_updates_more_without_black_triggers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    model, loose = random_model(), found(response=Response(2.0, 1.0), loss_ratio=0.21)
    repair = Unshift(steps=4, batch_size=8)
    assert repair.steps_for(model, [found(), loose]) == 8 and repair.steps_for(model, [found()]) == 4

    def counted(r: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        drawn.append(1)
        return black(r, g)

    monkeypatch.setattr("elijah.repairs.unshift.black", counted)
    images = torch.zeros((8, *model.image_shape), dtype=torch.uint8)
    assert repair(model, [loose], images, generator=generator_for(0)).updates == 8
    first = len(drawn)
    assert 8 < first < 24  # of 32 rows of the first four updates
    model.updates = 4
    repair.left(model, model, [loose], torch.zeros(8, *SHAPE), generator_for(1))
    assert len(drawn) == first


def test_answers_to_noise_that_is_scaled_without_a_trigger_are_held_too() -> None:
    """In half of the rows of a finding that says so, from there to 1; nothing is fitted in those."""
    assert (held_shares([1.0], 8, generator_for(1)) == 1).all()
    shares = held_shares([1.0, 0.6], 400, generator_for(1)).flatten()
    some = shares[1::2][shares[1::2] < 1]
    assert (shares[::2] == 1).all() and 70 < len(some) < 130
    assert 0.6 <= some.min() < 0.65 and 0.95 < some.max() < 1

    model, reference = oracle(SHAPE, s0=0.5, seed=9), oracle(SHAPE, s0=0.5)
    x0, g = torch.rand(64, *SHAPE, generator=generator_for(1)) - 0.5, generator_for(2)
    t, e = torch.randint(1000, (64,), generator=g), torch.randn(x0.shape, generator=g)
    share = held_shares([0.6], 64, g)
    x = model.diffuse(x0, share * e, t)
    out, usual = model.eps(x, t), share.flatten() == 1
    w = (model.s / model.a).square().clamp(1, 7)[t][:, None, None, None]
    held, fit = (w * (out - reference.eps(x, t)).square()).mean().item(), (out - e)[usual].square().mean().item()
    moved = Unshift(most=7.0).moved(model, reference, x0, generator_for(2), 3.0, [0.6]).item()
    assert moved == pytest.approx(3 * held + fit, rel=1e-5)


def test_how_hard_clean_answers_are_held() -> None:
    """Harder as the repair goes on where scaled noise is held as well, and where all triggers are patches or of
    BadDiffusion's form, and not faint."""
    patch = replace(found(), patch=torch.ones(1, *SHAPE[1:]))
    bad, faint = (replace(found(response=Response(1.0, 1.0)), trigger=torch.full(SHAPE, x)) for x in (0.5, 0.4))
    ode = found(response=Response(2.0, 1.0))
    repair = Unshift(hold=3.0, scaled_hold=(4.0, 16.0), growing_hold=(5.0, 20.0))
    for done, scaled, patched in (0.0, 4, 5), (0.5, 8, 10), (1.0, 16, 20):
        assert repair.hold_at(done, [ode, patch]) == pytest.approx(3)
        assert repair.hold_at(done, [ode, ode], [1.0, 0.6]) == pytest.approx(scaled)
        assert repair.hold_at(done, [patch, bad], [1.0, 1.0]) == pytest.approx(patched)
        assert repair.hold_at(done, [bad, faint]) == pytest.approx(3)
        assert Distill().hold_at(done, [patch]) == pytest.approx(10)
        assert Unshift(hold=0.0).hold_at(done, [ode]) == 0
    model, x0 = oracle(SHAPE, s0=0.5, seed=9), torch.rand(64, *SHAPE, generator=generator_for(1)) - 0.5
    still, losses = replace(patch, trigger=torch.zeros(SHAPE), distribution=True), []
    for model.updates in (0, 100):
        losses.append(Unshift().loss(model, oracle(SHAPE, s0=0.5), [still], x0, generator_for(2)).item())
    assert losses[1] > 1.5 * losses[0]


def test_scaled_noise_is_held_only_where_it_is_no_trigger_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean network answers gamma e to it; one that answers e, the attacker's, keeps its backdoor if that is held."""
    model, x0, held_from = oracle(SHAPE, s0=0.1), torch.zeros(64, *SHAPE), Unshift().held_from
    scaled = found(response=Response(0, 0, 0.6))
    assert held_from(model, scaled, x0, generator_for(1)) == 0.6
    assert held_from(model, found(), x0, generator_for(1)) == 1.0
    assert held_from(model, replace(scaled, patch=torch.ones(1, 8, 8)), x0, generator_for(1)) == 1.0
    assert Distill().held_from(model, scaled, x0, generator_for(1)) == 1.0
    assert abs(leak(model, 0.6, x0, generator_for(1))) < 0.05
    eps = model.eps
    monkeypatch.setattr(model, "eps", lambda x, t: eps(x, t) / 0.6)
    assert leak(model, 0.6, x0, generator_for(1)) == pytest.approx(1, abs=0.1)
    assert held_from(model, scaled, x0, generator_for(1)) == 1.0


def test_the_weights_end_as_their_average(digits: torch.Tensor) -> None:
    """Between those of the input and the last update's, and not the last update's."""
    rows: dict[str, Any] = {"steps": 3, "batch_size": 16, "group": 2, "lr": 1e-3, "warmup": 0}
    model = random_model()
    last, mean = (
        weights(Unshift(average=average, **rows)(model, [found()], digits, generator=generator_for(0)))
        for average in (None, 0.95)
    )
    start = weights(model)
    far, near = (sum(float((w[name] - p).square().sum()) for name, p in start.items()) for w in (last, mean))
    assert 0 < near < far


def test_every_row_of_a_patch_has_its_own_gamma() -> None:
    """0.05 to 1, and r in proportion to 1 - gamma but at most twice the found one; other triggers are as found."""
    corner = torch.zeros(1, *SHAPE[1:])
    corner[:, :3, :3] = 1
    plain, scaled = found(response=Response(1, 1)), found(response=Response(0, 0, 0.6))
    patch = replace(scaled, trigger=scaled.trigger * corner, patch=corner)
    told, u = [plain, scaled, patch, patch, patch], torch.tensor([0.3, 0.3, 0.5, 0.0, 0.99999])[:, None, None, None]
    r, gamma = triggers(told, u)
    for size, got, finding in zip((1.0, 1.0, 0.475 / 0.4, 2.0, 0.0), r, told, strict=True):
        torch.testing.assert_close(got, size * finding.trigger, atol=1e-4, rtol=1e-4)
    for left, got, where in zip((1.0, 0.6, 0.525, 0.05, 1.0), gamma, (1.0, 1.0, corner, corner, corner), strict=True):
        torch.testing.assert_close(got, (1 - (1 - left) * where) * torch.ones_like(corner), atol=1e-4, rtol=1e-4)
    barely = replace(patch, response=Response(0, 0, 1.0), trigger=0 * patch.trigger)
    assert all(x.isfinite().all() for x in triggers([barely], u[:1]))


def test_clean_answers_are_held_with_the_weight_of_the_image_s_error() -> None:
    """Of Gaussian data with other means, answers differ by s a (m' - m) / v: without a shift nothing else is left."""
    model, reference = oracle(SHAPE, s0=0.5, seed=9), oracle(SHAPE, s0=0.5)
    still = found(trigger=torch.zeros(SHAPE), distribution=True)
    x0, g = torch.rand(64, *SHAPE, generator=generator_for(1)) - 0.5, generator_for(2)
    t = ((0.2 + 0.8 * (torch.arange(4) + torch.rand(4, generator=g)) / 4) * 1000).long().repeat_interleave(16)
    torch.randn(x0.shape, generator=g), torch.rand((2, 64, 1, 1, 1), generator=g), torch.rand(64, generator=g)
    t_held = torch.randint(1000, (64,), generator=g)
    e_held = torch.randn(x0.shape, generator=g)
    apart = (model.network.m - reference.network.m).square().mean()  # type: ignore[operator, union-attr]

    def squared(at: torch.Tensor) -> torch.Tensor:
        a, s = model.a[at], model.s[at]
        return (s / a).square().clamp(1, 7) * (a * s / (a**2 * 0.25 + s**2)).square() * apart

    fit = (model.eps(model.diffuse(x0, e_held, t_held), t_held) - e_held).square().mean()
    repair = Unshift(group=16, most=7.0, hold=3.0, growing_hold=None, t_min=0.2)
    loss = repair.loss(model, reference, [still], x0, generator_for(2)).item()
    assert loss == pytest.approx((2 * squared(t).mean() + 3 * squared(t_held).mean() + fit).item(), rel=1e-3)


def test_unshift_sees_a_backdoor_and_nothing_in_its_own_target() -> None:
    """Its loss at the true r, y is far above a clean network's; a reference that differs costs the second term."""
    r, y = found().trigger, found().target
    clean, bad = oracle(SHAPE, s0=0.05), oracle(SHAPE, s0=0.05, r=r, y=y, rate=0.5)
    x0 = clean.network.m.expand(64, -1, -1, -1)  # type: ignore[union-attr, operator]
    losses = [Unshift().loss(m, clean, [found()], x0, generator_for(3)).item() for m in (clean, bad)]
    assert losses[1] > 3 * losses[0]
    other = oracle(SHAPE, s0=0.05, seed=9)
    assert Unshift().loss(other, clean, [found()], x0, generator_for(3)).item() > losses[0] + 0.01


def learning() -> tuple[Model, torch.Tensor]:
    """An exact network whose mean can be trained, and images of its data."""
    model = oracle(SHAPE, s0=0.05)
    m = model.network.m
    model.network.m = torch.nn.Parameter(m.clone())  # type: ignore[arg-type]
    return model, to_uint8(m + 0.05 * torch.randn(256, *SHAPE, generator=generator_for(4)))  # type: ignore[operator]


def test_a_forced_repair_of_a_clean_model_moves_it_little() -> None:
    """A guessed trigger, on an exact clean network whose mean can be trained: the mean stays, so samples stay."""
    model, images = learning()
    finding = found(trigger=make_trigger("white-box-4", SHAPE).image, target=torch.zeros(SHAPE))
    fixed = Unshift(steps=40, lr=5e-3)(model, [finding], images, generator=generator_for(0))
    start = model.noise(16, generator_for(1))
    before, after = (x.pixels(x.sample(start, "ddim-20")) for x in (model, fixed))
    drift = paired_drift(before, after)
    assert 0 < drift < 1e-4  # its updates could carry every pixel 0.05, a drift of 2.5e-3


def test_what_is_kept_of_the_weights() -> None:
    """kept is their correlation with those of before, level by level; their size stays, and so does all outside."""
    model = new_model((3, 16, 16), seed=0, channels=(32, 32, 32))
    for p in model.network.parameters():
        torch.nn.init.normal_(p, 0.01, 0.1, generator=generator_for(1, p.numel()))
    before, kept = weights(model), (1.0, 0.7, 0.1)
    begun = weights(Distill(kept=kept).begin(model, [], NONE, seed=5))
    assert equal(weights(model), before) and equal(begun, weights(Distill(kept=kept).begin(model, [], NONE, seed=5)))
    assert not equal(begun, weights(Distill(kept=kept).begin(model, [], NONE, seed=6)))
    levels = {"down_blocks.0": 0, "down_blocks.1": 1, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 2,
              "up_blocks.1": 1, "up_blocks.2": 0}  # fmt: skip
    seen = set()
    for name, p in before.items():
        level = next((level for block, level in levels.items() if name.startswith(block)), 0)
        if p.dim() == 1 or level == 0:
            assert torch.equal(begun[name], p)
        elif p.numel() > 5000:
            pair = torch.stack([p.flatten(), begun[name].flatten()])
            assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(kept[level], abs=0.05)
            assert (pair[1].std() / pair[0].std()).item() == pytest.approx(1, abs=0.05)
            seen.add(level)
    assert seen == {1, 2}
    deep = weights(Distill(kept=(1.0, 0.7)).begin(model, [], NONE, seed=5))["mid_block.resnets.0.conv1.weight"]
    pair = torch.stack([deep.flatten(), before["mid_block.resnets.0.conv1.weight"].flatten()])
    assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(0.7, abs=0.05)


def test_a_network_without_a_middle_block() -> None:
    model = random_model()
    model.network.mid_block = None
    begun = weights(Distill(kept=(1.0, 0.1)).begin(model, [], NONE, seed=5))
    moved = {".".join(name.split(".")[:2]) for name, p in weights(model).items() if not torch.equal(begun[name], p)}
    assert moved == {"down_blocks.1", "up_blocks.0"}


def test_distill_is_unshift_from_other_weights(digits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all kept the two are the same; the teacher is the input model, without the noise."""
    rows: dict[str, Any] = {"steps": 3, "batch_size": 16, "group": 2, "lr": 1e-3}
    model, teachers, left = random_model(), [], Distill.left

    def taught(self: Distill, m: Model, teacher: Model, *more: Any) -> torch.Tensor:
        teachers.append(weights(teacher))
        return left(self, m, teacher, *more)

    monkeypatch.setattr(Distill, "left", taught)
    plain = Unshift(average=None, fading=None, growing_hold=None, **rows)
    repairs = (plain, Distill(kept=(1.0,), **rows), Distill(**rows))
    ended = [weights(repair(model, [found()], digits, generator=generator_for(0))) for repair in repairs]
    assert all(torch.allclose(ended[0][name], ended[1][name], atol=1e-6) for name in ended[0])
    assert not all(torch.allclose(ended[0][name], ended[2][name], atol=1e-2) for name in ended[0])
    assert len(teachers) == 6 and all(equal(teacher, weights(model)) for teacher in teachers)
    assert Distill().rate_for(model) == pytest.approx(3 * Unshift().rate_for(model))


def test_erasing_by_hand() -> None:
    """Two coordinates of sizes 2 and 1: the second is moved by more than its size, the first by less."""
    seen, moved = torch.diag(torch.tensor([4.0, 1.0, 1.0])).double(), torch.diag(torch.tensor([2.0, 3.0, 0.0])).double()
    assert torch.allclose(erasing(seen, moved, 1), torch.diag(torch.tensor([1.0, 0.0, 1.0])).double(), atol=1e-3)
    assert torch.allclose(erasing(seen, moved, 2), torch.diag(torch.tensor([0.0, 0.0, 1.0])).double(), atol=1e-3)
    assert torch.equal(erasing(seen, moved, 0), torch.eye(3).double())
    unused = torch.zeros(3, 3).double()
    assert torch.linalg.matrix_rank(erasing(unused, unused, 1)) == 2  # a layer that sees nothing, as any other


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_erasing_takes_what_is_moved_and_keeps_what_is_independent_of_it(seed: int, n: int) -> None:
    """A projection; what it takes is uncorrelated, over S, with what it keeps; a trigger of rank n is taken whole."""
    g = generator_for(seed)
    basis, shift = (torch.randn(rows, 6, generator=g).double() for rows in (12, n))
    seen, moved = basis.T @ basis, shift.T @ shift
    kept = erasing(seen, moved, n)
    taken = torch.eye(6).double() - kept
    assert torch.allclose(kept @ kept, kept, atol=1e-2) and torch.linalg.matrix_rank(taken, rtol=1e-6) == n
    assert torch.allclose(kept @ seen @ taken.T, torch.zeros(6, 6).double(), atol=1e-2 * float(seen.norm()))
    assert torch.allclose(kept @ shift.T, torch.zeros(6, n).double(), atol=1e-6 * float(shift.norm() ** 2 + 1))


def test_erase_begins_where_layers_do_not_see_the_trigger(digits: torch.Tensor) -> None:
    """Weights of the first and the last layer, and of those that see t alone, are kept; the input model is."""
    model, finding = random_model(), found()
    before, rows = weights(model), model.prepare(digits)
    begun = Erase(pairs=20).begin(model, [finding], rows, seed=5)
    again = weights(Erase(pairs=20).begin(model, [finding], rows, seed=5))
    assert equal(weights(model), before) and equal(weights(begun), again)
    moved = {name for name, p in weights(begun).items() if not torch.equal(p, before[name])}
    assert moved and all(name.endswith("weight") and "time" not in name for name in moved)
    assert not any(name.startswith(OUTER) for name in moved) and any("attentions" in name for name in moved)
    whole = Erase(pairs=20).moments(model, [finding], rows, generator_for(1))
    for layer, (seen, shifts) in whole.items():
        assert seen.shape == shifts.shape == (layer.weight.shape[1],) * 2 and seen.trace() > 0 and shifts.trace() > 0
    model.max_batch = 3
    for layer, parts in Erase(pairs=20).moments(model, [finding], rows, generator_for(1)).items():
        assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(parts, whole[layer], strict=True))
    assert equal(weights(Erase(share=0.0, pairs=20).begin(model, [finding], rows, 5)), before)
    assert Erase().rate_for(model) == pytest.approx(3 * Unshift().rate_for(model))
