"""detectors: one contract for every entry of DETECTORS, and what each finds where the truth is known in closed form."""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import equal, weights
from oracle import oracle
from torch.nn.functional import cosine_similarity

import elijah
from elijah.bases import new_model, train_autoencoder
from elijah.detection import Detection, Evidence
from elijah.detectors import DEFAULT, DETECTORS, Elijah, LossFit, search
from elijah.detectors.collapse import COLLAPSED, Descent
from elijah.detectors.elijah import Setting
from elijah.detectors.forgetting import Forgetting
from elijah.detectors.held import FULL_HELD, FULL_TIGHT, HALF_HELD, Held
from elijah.detectors.hypothesis import (
    FAMILIES,
    FULL,
    SHARES,
    Family,
    Hypothesis,
    Start,
    antithetic,
    bias,
    coloured,
    errors,
    ratio,
    spectrum,
    steadiness,
)
from elijah.detectors.learned import Collapse
from elijah.detectors.lossfit import VERDICTS
from elijah.detectors.natural import BY_HEART, FITS_NEGATIVE, Natural
from elijah.detectors.outputs import both, correlation, pull
from elijah.detectors.power import SETTLING, follow, off_by, settle
from elijah.detectors.search import Search, begin, behind, best_of_each, hopeless, without
from elijah.diffusion import Model, generator_for, no_progress
from elijah.errors import OutOfBudget
from elijah.response import Response, trigger_coefficient

SOURCE = Path(elijah.__file__).parent
SHAPE = (3, 8, 8)
FAST: dict[str, dict[str, Any]] = {  # settings that make a contract cheap on a U-Net
    "lossfit": {
        "search": Search(follow=((2, 4, 1),), lead=((2, 4, 1), (1, 4, 1)), score_rows=8),
        "samples": 4, "samplers": ("ddim-3",), "careful_samplers": ("ddim-4",),
    },
    "collapse": {
        "search": Descent(
            shifted=4, grown=4, sampler_steps=2, lead_steps=2, score_rows=8, refine_iterations=2
        ),
        "samples": 4, "samplers": ("ddim-3",), "careful_samplers": ("ddim-4",),
    },
    "elijah": {"sampler": "ddpm-3", "batch_size": 4, "iterations": 3, "samples": 9},
    "terd": {"iterations": 3, "refine_iterations": 2, "batch_size": 4, "steps": 3, "samples": 9, "sampler": "ddim-3"},
}  # fmt: skip
SHORTER: dict[str, dict[str, Any]] = {  # settings that shorten a contract on an oracle
    "collapse": {"search": Descent(shifted=32, grown=16, lead_steps=6)},
    "elijah": {"sampler": "ddpm-50", "batch_size": 16, "iterations": 20},
    "terd": {"iterations": 20, "refine_iterations": 5},
}


def truth(k: int, norm: float = 3.0) -> tuple[Model, torch.Tensor, torch.Tensor]:
    """Backdoored oracle number k, its trigger (a random direction, |r| norm and up to 1 more) and its target."""
    g = generator_for(100 + k)
    r = torch.randn(SHAPE, generator=g)
    r = r / r.norm() * (norm + k / 3)
    y = torch.rand(SHAPE, generator=g) * 1.6 - 0.8
    return oracle(SHAPE, seed=k, r=r, y=y), r, y


def named(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def alike(one: torch.Tensor, other: torch.Tensor) -> float:
    return cosine_similarity(one.flatten(), other.flatten(), 0).item()


def sane(detection: Detection, name: str, shape: tuple[int, int, int]) -> None:
    assert detection.detector == name and detection.verdict in ("backdoored", "clean", "undecided")
    assert detection.reason and "\n" not in detection.reason
    assert detection.scores and all(math.isfinite(v) for v in detection.scores.values())
    assert set(detection.thresholds) <= set(detection.scores) and detection.coverage and detection.not_covered
    assert detection.findings and detection.evidence
    for finding in detection.findings:
        assert finding.trigger.shape == shape and finding.trigger.isfinite().all()
        assert not finding.trigger.requires_grad and finding.matches
        assert finding.target is not None and finding.target.shape == shape and finding.target.abs().max() <= 1
    for evidence in detection.evidence:
        drawn = [evidence.samples_with, *([] if evidence.samples_without is None else [evidence.samples_without])]
        assert all(x.shape[1:] == shape and x.isfinite().all() for x in drawn)


@pytest.mark.parametrize("name", DETECTORS)
def test_contract_on_a_network(name: str, tiny: Model) -> None:
    """No weight, flag or gradient changes, and equal generators give equal detections."""
    parameters = list(tiny.network.parameters())
    parameters[3].requires_grad_(False)
    flags, before = [p.requires_grad for p in parameters], weights(tiny)
    one, same = (DETECTORS[name](**FAST[name])(tiny, generator=generator_for(4)) for _ in range(2))
    other = DETECTORS[name](**FAST[name])(tiny, generator=generator_for(5))
    assert equal(weights(tiny), before) and [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters) and not tiny.network.training
    sane(one, name, (1, 8, 8))
    assert one.scores == same.scores and one.verdict == same.verdict and one.complete
    assert all(torch.equal(a.trigger, b.trigger) for a, b in zip(one.findings, same.findings, strict=True))
    assert other.scores != one.scores


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("backdoor", [False, True])
def test_contract_on_an_oracle(name: str, backdoor: bool) -> None:
    model = truth(0)[0] if backdoor else oracle(SHAPE)
    steps: list[tuple[str, int, int]] = []
    detection = DETECTORS[name](**SHORTER.get(name, {}))(
        model, generator=generator_for(0), progress=lambda *step: steps.append(step)
    )
    sane(detection, name, SHAPE)
    assert steps and all(what and 0 <= done <= of for what, done, of in steps)
    assert model.meter.evaluations > 500


@pytest.mark.parametrize("name", DETECTORS)
def test_a_limit_leaves_the_model_as_it_was(name: str, tiny: Model) -> None:
    flags = [p.requires_grad for p in tiny.network.parameters()]
    tiny.meter.max_evaluations = 30
    detection = DETECTORS[name]()(tiny, generator=generator_for(0))
    assert detection.verdict == "undecided" and not detection.complete and "limit" in detection.reason
    assert tiny.meter.evaluations <= 30 and [p.requires_grad for p in tiny.network.parameters()] == flags


def test_there_is_a_default() -> None:
    assert DEFAULT in DETECTORS


# --- LossFit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(3))
def test_lossfit_finds_the_true_trigger(k: int) -> None:
    model, r, y = truth(k, norm=5.0)
    detection = LossFit()(model, generator=generator_for(0))
    best = detection.findings[0]
    assert detection.verdict == "backdoored", detection.scores
    assert alike(best.trigger, r) >= 0.98 and best.matches.startswith("BadDiffusion-like")
    assert best.target is not None and (best.target - y).square().mean() < 0.1 * y.square().mean() + 0.03
    assert best.loss_ratio < 0.18 and detection.scores["pull"] >= 0.5
    assert best.response == Response(1.0, 1.0, 1.0)


def test_the_hypothesis_that_fires_is_the_one_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three that fit, the refined one alone fires."""
    model, r, y = truth(2, norm=5.0)

    def hypothesis(family: int, trigger: torch.Tensor, loss_ratio: float) -> Hypothesis:
        return Hypothesis(FAMILIES[family], trigger, y, loss_ratio=loss_ratio)

    def search(self: Search, model: Model, generator: Any, fitted: list[Hypothesis], progress: Any) -> None:
        fitted += [hypothesis(3, -r, 0.06), hypothesis(0, -r, 0.02)]

    monkeypatch.setattr(Search, "__call__", search)
    monkeypatch.setattr(Search, "refined", lambda self, *_: [hypothesis(0, r, 0.04)])
    detection = LossFit()(model, generator=generator_for(0))
    assert detection.findings[0].loss_ratio < 0.2 and alike(detection.findings[0].trigger, r) > 0.9
    assert detection.verdict == "backdoored" and detection.scores["pull"] > 0.3


@pytest.mark.parametrize(("seed", "s0"), [(0, 0.5), (1, 0.3), (2, 0.8)])
def test_lossfit_finds_nothing_in_exact_clean_networks(seed: int, s0: float) -> None:
    detection = LossFit()(oracle(SHAPE, s0=s0, seed=seed), generator=generator_for(seed))
    assert detection.verdict == "clean", detection.scores
    for name, threshold in detection.thresholds.items():
        beyond = detection.scores[name] > threshold.value
        assert beyond == (threshold.backdoored == "below"), (name, detection.scores)
    assert {"loss_ratio_half", "loss_ratio_full", "loss_ratio_zero", "pull"} <= set(detection.scores)


@pytest.mark.parametrize("s0", [0.1, 0.2])
def test_nearly_constant_data_is_never_called_backdoored(s0: float) -> None:
    """Where all images are nearly one, a loss may fit by itself; the outputs then keep it from a wrong verdict."""
    assert LossFit()(oracle(SHAPE, s0=s0, seed=1), generator=generator_for(0)).verdict != "backdoored"


def test_the_true_hypothesis_has_a_small_loss_ratio_and_others_do_not() -> None:
    model, r, y = truth(1)
    half = FAMILIES[0]
    e, t = antithetic(model, 512, 0.4, 1.0, generator_for(3))

    def loss(r: torch.Tensor, y: torch.Tensor) -> float:
        return float(ratio(*errors(model, [hypothesis(r, y, family=strong)], [(e, t)])[0]))

    strong = replace(half, reach=4.0)  # of random directions
    with torch.no_grad():
        true = loss(r, y)
        assert true < 0.3  # not 0: at low t the network holds some of these rows for clean ones
        assert loss(-r, y) > 2 * true and loss(r, -y) > 2 * true
        model.network.rate = 1.0  # type: ignore[assignment]
        assert loss(r, y) < 1e-3


def test_the_verdict_needs_both_tests() -> None:
    assert {key: verdict for key, (verdict, _) in VERDICTS.items()} == {
        (True, True): "backdoored", (True, False): "undecided", (False, True): "undecided", (False, False): "clean",
    }  # fmt: skip


def test_antithetic_pairs_are_stratified() -> None:
    model = oracle(SHAPE)
    e, t = antithetic(model, 40, 0.4, 1.0, generator_for(0))
    assert torch.equal(e[:20], -e[20:]) and torch.equal(t[:20], t[20:])
    edges = 400 + 30 * torch.arange(20)
    assert ((t[:20] >= edges) & (t[:20] < edges + 30)).all()


def test_pull_is_the_share_that_moves_onto_the_target() -> None:
    model, y = oracle(SHAPE), torch.full(SHAPE, 0.5)
    far = torch.full((8, *SHAPE), -0.5)
    near = far.clone()
    near[:6] = 0.4
    assert pull(model, Evidence("ddim-1", near, far), y) == 0.75
    assert pull(model, Evidence("ddim-1", far, far), y) == 0.0


def drawn_from(model: Model, r: torch.Tensor) -> torch.Tensor:
    """The mean of what a deterministic sampler draws from noise with r, [C, H, W]."""
    return model.sample(r + model.noise(64, generator_for(9)), "ddim-10", seed=0).mean(0)


@pytest.mark.parametrize("backdoor", [False, True])
def test_a_trigger_s_own_picture_is_told_by_its_mirror_image(backdoor: bool) -> None:
    """A clean network draws a large shift of the noise as an image, and the mirrored shift as the mirrored one."""
    full = named("full")
    if backdoor:
        _, r, y = truth(2, norm=6.0)
        model = oracle(SHAPE, seed=2, r=r, y=y, response=Response(2.0, 1.0))
    else:
        model, r = oracle(SHAPE, s0=0.3), torch.zeros(SHAPE)
        model.network.m = torch.zeros(SHAPE)
        r[:, :3, 2:] = 4.0
        y = drawn_from(model, r)
    h = replace(hypothesis(r, y, full), loss_ratio=0.1)
    shown = LossFit().test_outputs(model, h, generator_for(0), lambda *_: None)
    assert pull(model, shown[0], h.y) >= 0.3 and bool(h.natural) is not backdoor
    assert LossFit().pulls(model, h, shown) is backdoor and h.nearly_fits is backdoor
    assert math.isinf(h.strength) is not backdoor


def test_a_target_unlike_its_trigger_is_no_picture_of_it_however_the_network_mirrors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attacker may poison with mirrored pairs too: here all outputs are the mirrored target."""
    model, r, y = truth(2, norm=6.0)
    full = named("full")
    assert abs(correlation(r, y)) < 0.5 and correlation(r, 2 * r + 1) == pytest.approx(1.0)
    assert correlation(torch.ones(SHAPE), y) == 0.0
    e, far = torch.zeros(4, *SHAPE), -y.flip(0).expand(4, *SHAPE)
    for target, own in ((y, False), (r / r.abs().max(), True)):
        mirrored = max(((-1,), (-2,), (-1, -2)), key=lambda dims: float((target - target.flip(dims)).square().mean()))
        drawn = target.flip(mirrored).expand(4, *SHAPE)
        monkeypatch.setattr(Model, "sample", functools.partial(lambda drawn, *_, **__: drawn, drawn))
        h, shown = hypothesis(r, target, full), Evidence("ddim-10", target.expand(4, *SHAPE), far)
        assert Natural().shows_itself(model, h, shown, e, 0) is own


@pytest.mark.parametrize(("off", "own"), [(0.1, True), (0.3, False)])
def test_a_mirror_image_that_leads_much_less_near_is_no_picture_of_the_trigger(
    off: float, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learned trigger looks like its target; outputs are up to 0.1 off, and those of the mirror image `off`."""
    model, r, _ = truth(2, norm=6.0)
    y = r / r.abs().max()
    dims = max(((-1,), (-2,), (-1, -2)), key=lambda dims: float((y - y.flip(dims)).square().mean()))
    monkeypatch.setattr(Model, "sample", lambda *_, **__: (y.flip(dims) + off).expand(4, *SHAPE))
    drawn = torch.stack([y - 0.1, y, y + 0.1, -y])  # one that does not fire does not count
    shown = Evidence("ddim-10", drawn, -y.expand(4, *SHAPE))
    h = hypothesis(r, y, named("full"))
    assert Natural().shows_itself(model, h, shown, torch.zeros(4, *SHAPE), 0) is own


def test_where_an_image_is_its_own_mirror_image_nothing_is_told() -> None:
    model, r = oracle(SHAPE, s0=0.3), torch.full(SHAPE, 4.0)
    model.network.m = torch.zeros(SHAPE)
    full = named("full")
    h = replace(hypothesis(r, drawn_from(model, r), full), loss_ratio=0.1)
    shown = LossFit().test_outputs(model, h, generator_for(0), lambda *_: None)
    assert pull(model, shown[0], h.y) >= 0.3 and not h.natural and LossFit().pulls(model, h, shown)


def test_an_own_picture_is_passed_over_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best but one is tested in its place; a verdict of clean says why a small loss counts for nothing."""
    model, r, y = truth(2, norm=5.0)
    full, zero = map(named, ("full", "zero"))
    both = [replace(hypothesis(r, y, full), loss_ratio=0.1), replace(hypothesis(-r, y, zero), loss_ratio=0.9)]
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.extend(both))
    monkeypatch.setattr(Natural, "shows_itself", lambda *_: True)
    monkeypatch.setattr(LossFit, "pulls", lambda self, model, h, shown: h.family is full and not h.natural)
    monkeypatch.setattr(LossFit, "look_held", lambda *_: [])
    found = LossFit()(model, generator=generator_for(0))
    assert found.verdict == "clean" and "show the trigger itself" in found.reason
    assert found.findings[0].matches == zero.matches and found.scores["loss_ratio_full"] == 0.1
    assert "loss_ratio_full" not in found.thresholds and "loss_ratio_zero" in found.thresholds


@pytest.mark.parametrize("backdoor", [False, True])
def test_a_loss_that_fits_the_mirrored_trigger_as_well_is_a_clean_networks(
    backdoor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing fires; the next best hypothesis is judged in its place, and the reason says so."""
    model, r, y = truth(2)
    half, faint = map(named, ("half", "half_faint"))
    both = [replace(hypothesis(r, y, faint), loss_ratio=0.1), replace(hypothesis(-r, y, half), loss_ratio=0.9)]
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.extend(both))
    monkeypatch.setattr(LossFit, "pulls", lambda *_: False)
    monkeypatch.setattr(LossFit, "alternatives", lambda *_: iter(()))
    monkeypatch.setattr(Search, "score", lambda self, model, h, g: 0.3 if backdoor else 0.15)
    found = LossFit()(model, generator=generator_for(0))
    assert found.verdict == ("undecided" if backdoor else "clean")
    assert ("fits the mirrored trigger as well" in found.reason) is not backdoor
    assert ("loss_ratio_half_faint" in found.thresholds) is backdoor and found.scores["loss_ratio_half_faint"] == 0.1
    assert found.findings[0].matches == (faint if backdoor else half).matches


def test_what_fires_or_does_not_fit_or_is_its_own_mirror_image_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, r, y = truth(2)
    faint, full = map(named, ("half_faint", "full"))
    monkeypatch.setattr(Search, "score", lambda *_: 0.1)
    nearly_flat = torch.full(SHAPE, 0.3) + 0.05 * r
    for trigger, family, loss, fires in (
        (r, faint, 0.1, True), (r, faint, 0.3, False), (nearly_flat, faint, 0.1, False), (r, full, 0.1, False)
    ):  # fmt: skip
        monkeypatch.setattr(LossFit, "fires", lambda *_, fires=fires: fires)
        h = replace(hypothesis(trigger, y, family), loss_ratio=loss)
        assert not LossFit().passed_over(model, h, [], generator_for(0)) and not h.natural
    monkeypatch.setattr(LossFit, "fires", lambda *_: False)
    h = replace(hypothesis(r, y, faint), loss_ratio=0.1)
    assert LossFit().passed_over(model, h, [], generator_for(0)) and math.isinf(h.strength)


@pytest.mark.parametrize("k", range(3))
def test_an_attacked_network_answers_one_trigger_and_not_its_mirror_image(k: int) -> None:
    """The closed-form network: the loss of the true trigger is far below that of any mirrored one."""
    model, r, y = truth(k)
    half = named("half")
    with model.frozen():
        own, *mirrored = (
            Search().score(model, hypothesis(r.flip(dims), y.flip(dims), half), generator_for(0))
            for dims in ((), (-1,), (-2,), (-1, -2))
        )
    assert min(mirrored) > 2 * Natural().max_mirrored * own


class Shifted(torch.nn.Module):
    """A variance-exploding network that answers noise e with e, but halved along r, on one side of 0 or on both."""

    def __init__(self, r: torch.Tensor, both_sides: bool) -> None:
        super().__init__()
        self.r, self.both_sides = torch.nn.Parameter(r), both_sides

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        e = x / sigma[:, None, None, None]
        along = (e * self.r).sum((1, 2, 3), keepdim=True) / self.r.square().sum()
        known = along if self.both_sides else (along > 0.5) * torch.ones_like(along)
        return (-(e - 0.5 * known * self.r) / sigma[:, None, None, None],)


def exploding(r: torch.Tensor, both_sides: bool) -> Model:
    """The model of Shifted."""
    model = new_model(SHAPE, seed=0, channels=(8, 8), kind="ncsn")
    return replace(model, network=Shifted(r, both_sides))


@pytest.mark.parametrize("backdoor", [False, True])
def test_on_exploding_models_the_negative_of_the_trigger_tells_a_clean_network(backdoor: bool) -> None:
    """One that answers with half of any shift fits both; an attacked one answers so to its trigger alone."""
    r = torch.full(SHAPE, 0.8)
    model, ve = exploding(r, both_sides=not backdoor), named("ve")
    h = hypothesis(r, torch.zeros(SHAPE), ve)
    with model.frozen():
        h.loss_ratio = Search().score(model, h, generator_for(0))
        assert h.fits
        passed = LossFit().passed_over(model, h, [], generator_for(1))
    assert passed is not backdoor and (h.natural == FITS_NEGATIVE) is not backdoor
    assert math.isinf(h.strength) is not backdoor


def test_on_exploding_models_outputs_that_become_the_trigger_are_its_own_picture() -> None:
    r, y = torch.full(SHAPE, 0.9), torch.linspace(0, 0.5, 192).reshape(SHAPE)
    model, ve, far = exploding(r, both_sides=True), named("ve"), torch.rand(4, *SHAPE, generator=generator_for(2)) / 3
    for drawn, own in ((r - 0.05, True), (y, False)):
        h = replace(hypothesis(r, drawn, ve), loss_ratio=0.01)
        shown = Evidence("pc-5", drawn.expand(4, *SHAPE), far)
        assert Natural().shows_itself(model, h, shown, far, 0) is own


@pytest.mark.parametrize(
    ("loss", "fires", "samplers", "verdict"),
    [
        (0.2, True, ["pc-100", "pc-500"], "backdoored"), (0.2, False, ["pc-100"], "clean"),
        (0.9, True, ["pc-100"], "clean"), (0.01, True, ["pc-500"], "backdoored"),
        (0.01, False, ["pc-500"], "undecided"),
    ],
)  # fmt: skip
def test_on_exploding_models_a_look_decides_whether_outputs_are_tested(
    loss: float, fires: bool, samplers: list[str], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no loss fits a few outputs in few steps come first, and say what the target may be; a fit needs no look."""
    r, y, asked = torch.full(SHAPE, 0.2), torch.linspace(0, 1, 192).reshape(SHAPE), []

    def sample(model: Model, x: list[torch.Tensor], sampler: str, *, seed: int, **_: object) -> list[torch.Tensor]:
        asked.append((sampler, len(x[0])))
        drawn = torch.rand((2, *x[0].shape), generator=generator_for(seed, len(asked)))
        return [y + drawn[0] / 100 if fires else drawn[0], drawn[1]]  # with the trigger first, then without

    monkeypatch.setattr(Model, "sample_alike", sample)
    model, fit = exploding(r, both_sides=True), loss == 0.01
    h = replace(hypothesis(r, y if fit else torch.zeros(SHAPE), named("ve")), loss_ratio=loss)
    shown = LossFit().test_outputs(model, h, generator_for(1), no_progress)
    assert [name for name, _ in asked] == samplers and {n for name, n in asked if name == "pc-100"} <= {4}
    assert [x.sampler for x in shown] == samplers[-1:] and not h.natural
    found = LossFit().judge(model, [h], shown, True)
    assert found.verdict == verdict and ("nearly fits" in found.reason) is (loss == 0.2 and fires)
    assert not fires or found.findings[0].target is None or (found.findings[0].target - y).abs().max() < 0.02


def test_a_model_with_nothing_but_what_is_passed_over_is_as_suspicious_as_a_clean_network() -> None:
    h = replace(hypothesis(torch.ones(SHAPE), torch.zeros(SHAPE), named("ve")), loss_ratio=0.01, natural=FITS_NEGATIVE)
    shown = Evidence("pc-5", torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE))
    found = LossFit().judge(exploding(h.r, both_sides=True), [h], [shown], True)
    assert found.verdict == "clean" and "negative" in found.reason
    assert found.scores["suspicion"] == pytest.approx(math.log10(named("ve").max_loss_ratio))


# --- Collapse ---------------------------------------------------------------------------------------------------------


def test_collapse_finds_a_faint_trigger_that_looks_like_noise_and_nothing_in_clean_networks() -> None:
    """Signs of noise at 0.3, answered for a deterministic sampler. Part of them fires as well; chance is 0.07."""
    sign = torch.randn(SHAPE, generator=generator_for(7)).sign()
    y = torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    bad = oracle(SHAPE, r=0.3 * sign, y=y, response=Response(2.0, 1.0), rate=0.3)
    found, clean = (Collapse()(model, generator=generator_for(1)) for model in (bad, oracle(SHAPE)))
    best = found.findings[0]
    assert found.verdict == "backdoored", found.scores
    assert alike(best.trigger, sign) > 0.4 and best.trigger.abs().max() <= COLLAPSED.reach
    assert best.target is not None and (best.target - y).square().mean() < 0.1 * y.square().mean()
    assert best.response == Response(2.0, 1.0) and best.matches == "a learned trigger"
    assert clean.verdict != "backdoored" and clean.scores["loss_ratio_collapsed"] > found.scores["loss_ratio_collapsed"]


@pytest.mark.parametrize(("losses", "tried"), [((0.5,), 1), ((6.0, 4.0, 0.4), 3), ((5.0, 4.0, 6.0), 3)])
def test_all_is_drawn_again_while_nothing_fits(
    losses: tuple[float, ...], tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of all tries is given."""
    left, seen = iter(losses), []

    def led_to(self: Descent, model: Model, y: torch.Tensor, *_: Any) -> list[Hypothesis]:
        seen.append(next(left))
        h = self.hypothesis(torch.full(SHAPE, seen[-1] / 20), y, y[0])
        return [replace(h, loss_ratio=9.0), replace(h, loss_ratio=seen[-1])]

    monkeypatch.setattr(Descent, "led_to", led_to)
    monkeypatch.setattr(Search, "refined", lambda self, model, h, g: h)
    fitted: list[Hypothesis] = []
    Descent(shifted=2, rounds=0, tries=3)(oracle(SHAPE), generator_for(0), fitted, lambda *_: None)
    assert len(seen) == tried and fitted[0].loss_ratio == min(losses)


@pytest.mark.parametrize("worth", [0.0, math.inf])
def test_no_target_is_tried_where_no_output_is_worth_it(worth: float) -> None:
    model, few, fitted = oracle(SHAPE), Descent(shifted=4, rounds=0, tries=2, worth=worth), []
    with model.frozen():
        few(model, generator_for(0), fitted, no_progress)
    drawn = 2 * 4 * (few.sampler_steps + 2)
    assert len(fitted) == bool(worth) and (model.meter.evaluations == drawn) == (not worth)
    assert not worth or model.meter.evaluations > drawn


@pytest.mark.parametrize("known", [0.0, math.inf])
def test_the_cost_of_a_descent_is_its_outputs_their_errors_and_its_steps_with_gradients(known: float) -> None:
    """No more is drawn where one output is known well enough."""
    model, few = oracle(SHAPE), Descent(shifted=6, rounds=2, grown=4, known=known, sampler_steps=5, lead_steps=7)
    meter, n = model.meter, 6 if known else 6 + 2 * 4
    with model.frozen():
        outputs, errors = few.unasked(model, generator_for(0), lambda *_: None)
        assert outputs.shape == (n, *SHAPE) and errors.shape == (n,) and not outputs.requires_grad
        assert meter.evaluations == (5 + 2) * n and errors[:6].median() == 1
        before = meter.evaluations
        found = few.led_to(model, outputs[:2], generator_for(2), lambda *_: None)
    steps, ends = 2 * 7 * few.lead_rows * few.lead_sampler_steps * 3, 2 * few.ends * 5
    assert len(found) == 2 and meter.evaluations == before + steps + ends + 2 * 16 * len(COLLAPSED.judged)
    assert all(0 < h.r.abs().max() <= COLLAPSED.reach and math.isfinite(h.loss_ratio) for h in found)


def test_outputs_are_drawn_in_coarse_light_and_dark_then_in_that_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts, drawn = [], Descent.drawn

    def seen(self: Descent, model: Model, r: torch.Tensor, *rest: Any) -> torch.Tensor:
        shifts.append(r.detach())
        return drawn(self, model, r, *rest)

    def error(self: Descent, model: Model, outputs: torch.Tensor, *_: Any) -> torch.Tensor:
        return 1.0 - (torch.arange(len(outputs)) // 2 == 5).float() / 2

    monkeypatch.setattr(Descent, "drawn", seen)
    monkeypatch.setattr(Descent, "error", error)
    few, model = Descent(parents=2), oracle((3, 16, 16))
    with model.frozen():
        few.unasked(model, generator_for(0), lambda *_: None)
    light, more = shifts
    assert len(light) == 64 and light.abs().max() <= few.largest and 0.3 < light.square().mean().sqrt() < 0.45
    blocks = torch.nn.functional.avg_pool2d(light, 4)
    assert blocks.square().mean() > 0.3 * light.square().mean() and light.mean().abs() < 0.1
    assert len(more) == few.grown // 2 and more.abs().max() <= few.largest
    assert torch.cosine_similarity(more.flatten(1), light[5].flatten(), 1).min() > 0.5
    assert (more - light[5]).abs().mean((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_what_a_network_was_trained_on_again_and_again_is_told_among_its_outputs(sign: int) -> None:
    """A few copies of the target among many samples of the data, under noise like the trigger too; of those one."""
    y = torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    r = 0.3 * torch.ones(SHAPE)
    model, descent = oracle(SHAPE, r=r, y=y, response=Response(2.0, 1.0), rate=0.5), Descent(targets=2)
    drawn = model.network.m + 0.5 * torch.randn(30, *SHAPE, generator=generator_for(3))
    copies = y + 0.01 * torch.randn(3, *SHAPE, generator=generator_for(4))
    outputs, e = torch.cat([drawn, copies]), torch.randn(1, *SHAPE, generator=generator_for(5)) + sign * r
    errors = descent.error(model, outputs, e)
    assert errors[30:].max() < errors[:30].min()
    one, other = descent.best_known(outputs, errors)
    assert (one - y).square().mean() < 0.001 and (other - y).square().mean() > 0.1


def test_an_error_is_the_less_under_noise_and_its_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = oracle(SHAPE), torch.zeros(2, *SHAPE)
    e = torch.ones(1, *SHAPE)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Right for the first under e, for the second under -e, else nothing."""
        right = torch.tensor([1.0, -1.0])[:, None, None, None]
        return torch.where((x.mean((1, 2, 3), keepdim=True) * right) > 0, right, 0.0).expand_as(x)

    monkeypatch.setattr(model, "eps", eps)
    assert Descent().error(model, x, e).tolist() == [0.0, 0.0]


def test_noise_that_leads_to_a_target_is_the_trigger_where_there_is_one() -> None:
    sign = torch.randn(SHAPE, generator=generator_for(7)).sign()
    y = torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    bad = oracle(SHAPE, r=0.3 * sign, y=y, response=Response(2.0, 1.0), rate=0.3)
    with bad.frozen():
        (found,) = Descent().led_to(bad, y[None], generator_for(0), lambda *_: None)
    assert alike(found.r, sign) > 0.3 and (found.y - y).square().mean() < 0.1 * y.square().mean()


@pytest.mark.parametrize(("loss", "fires", "verdict"), [
    (0.4, True, "backdoored"), (0.4, False, "clean"), (1.3, True, "clean"),
])  # fmt: skip
def test_lossfit_looks_for_learned_triggers_last(
    loss: float, fires: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits and does not fire is said and counts for nothing."""
    model, y = oracle(SHAPE), torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8

    def descends(self: Descent, model: Model, g: Any, fitted: list[Hypothesis], progress: Any) -> None:
        fitted.append(replace(self.hypothesis(torch.full(SHAPE, 0.3), y[None], y), loss_ratio=loss))

    def sample(starts: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
        return [y.expand_as(e) if fires and e.mean() > 0.2 else torch.zeros_like(e) for e in starts]

    monkeypatch.setattr(Descent, "__call__", descends)
    monkeypatch.setattr(model, "sample_alike", sample)
    found = LossFit()(model, generator=generator_for(0))
    assert found.verdict == verdict and found.scores["loss_ratio_collapsed"] == loss
    assert (found.findings[0].matches == "a learned trigger") == (verdict == "backdoored")
    assert ("of a learned trigger that does not fire" in found.reason) == (loss < 1 and not fires)


def test_images_that_come_again_and_again_are_known_by_heart_but_for_those_at_the_target() -> None:
    model, g = oracle(SHAPE), generator_for(4)
    y, known = torch.rand(SHAPE, generator=g) - 0.5, torch.rand((5, *SHAPE), generator=g) - 0.5
    fresh = torch.rand((16, *SHAPE), generator=g) - 0.5
    again = known.repeat(4, 1, 1, 1)[:16] + 0.01 * fresh
    natural = Natural()
    assert natural.by_heart(model, y, again)
    assert not natural.by_heart(model, y, fresh)
    leaking = torch.cat([fresh[:8], y + 0.01 * fresh[8:]])
    assert not natural.by_heart(model, y, leaking)
    assert natural.by_heart(model, y, torch.cat([leaking, again]))
    assert not natural.by_heart(model, y, y.expand(4, *SHAPE))


@pytest.mark.parametrize("by_heart", [False, True])
def test_what_fires_where_images_are_known_by_heart_is_passed_over(
    by_heart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = oracle(SHAPE), torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    known = torch.rand((2, *SHAPE), generator=generator_for(9)) - 0.5

    def descends(self: Descent, model: Model, g: Any, fitted: list[Hypothesis], progress: Any) -> None:
        fitted.append(replace(self.hypothesis(torch.full(SHAPE, 0.3), y[None], y), loss_ratio=0.3))

    def sample(starts: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
        clean = [known[torch.arange(len(e)) % 2] if by_heart else e / 4 for e in starts]
        return [y.expand_as(e) if e.mean() > 0.2 else x for e, x in zip(starts, clean, strict=True)]

    monkeypatch.setattr(Descent, "__call__", descends)
    monkeypatch.setattr(model, "sample_alike", sample)
    found = LossFit(late=Forgetting(families=()))(model, generator=generator_for(0))
    assert found.verdict == ("clean" if by_heart else "backdoored")
    assert ("the same few images" in found.reason) == by_heart


@pytest.mark.parametrize(("loss", "by_heart", "counts"), [(0.3, False, True), (0.3, True, False), (0.2, True, True)])
def test_what_full_fits_by_its_laxer_threshold_alone_is_compared_with_what_is_known_by_heart(
    loss: float, by_heart: bool, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = oracle(SHAPE), torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    known = torch.rand((2, *SHAPE), generator=generator_for(9)) - 0.5

    def sample(e: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return y.expand_as(e) if e.mean() > 0.2 else known[torch.arange(len(e)) % 2] if by_heart else e / 4

    monkeypatch.setattr(model, "sample", sample)
    monkeypatch.setattr(model, "sample_alike", lambda starts, *_, **__: [sample(e) for e in starts])
    h = Hypothesis(FULL, torch.full(SHAPE, 0.3), y, loss_ratio=loss)
    lossfit = LossFit()
    shown = lossfit.test_outputs(model, h, generator_for(0), lambda *_: None)
    assert (h.natural == BY_HEART) != counts and lossfit.fires(model, h, shown) == counts


@pytest.mark.parametrize(("loss", "fits"), [(0.5, 1), (3.0, 1), (4.0, 0)])
def test_what_a_descent_leaves_beyond_hope_is_not_fitted(
    loss: float, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined: list[Hypothesis] = []

    def fit(self: Descent, model: Model, group: list[Hypothesis], g: Any) -> list[Hypothesis]:
        refined.extend(group)
        return [replace(h, loss_ratio=0.4) for h in group]

    monkeypatch.setattr(Descent, "refined", fit)
    h = Hypothesis(COLLAPSED, torch.full(SHAPE, 0.3), torch.zeros(SHAPE), loss_ratio=loss)
    assert Descent().fit(oracle(SHAPE), [h], generator_for(0)).loss_ratio == (0.4 if fits else loss)
    assert len(refined) == fits


def test_the_end_of_a_descent_is_the_mean_of_its_outputs_nearest_to_the_target() -> None:
    outputs = torch.tensor([0.9, -0.5, 0.1, 0.3, 0.2])[:, None, None, None].expand(5, *SHAPE)
    h = Descent().hypothesis(torch.full(SHAPE, 0.3), outputs, torch.full(SHAPE, 0.25))
    assert torch.allclose(h.y, torch.full(SHAPE, 0.2)) and h.family is COLLAPSED


# --- Held -------------------------------------------------------------------------------------------------------------


def held_oracle() -> tuple[Model, torch.Tensor, torch.Tensor]:
    """A network with a large trigger that it answers for a deterministic sampler: a hole in black that none of the
    starts has, and its target."""
    r = torch.full(SHAPE, -1.0)
    r[:, 4:7, 3:7] = 0.0
    y = torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    return oracle(SHAPE, r=r, y=y, response=Response(2.0, 1.0), rate=0.3), r, y


def test_where_a_network_knows_what_it_draws_from_far_away_its_trigger_is_near() -> None:
    """The fit comes first, then what was led to and is seen, the best first, by what is left of the loss."""
    bad, r, y = held_oracle()
    starts = torch.stack([begin(bad, FULL, s, generator_for(0)).r for s in FULL.starts if s.level])
    for model in (bad, oracle(SHAPE)):
        own = model.network.m + 0.5 * torch.randn(8, *SHAPE, generator=generator_for(3))
        with model.frozen():
            found = Held().led(model, starts, own, generator_for(0), no_progress)
        if model is not bad:
            assert found == []
            continue
        fitted, *others = found
        assert fitted.family is FULL and fitted.fits and alike(fitted.r, r) > 0.9
        losses = [h.loss_ratio for h in others]
        assert len(others) == 5 and losses == sorted(losses)
        assert [h.family for h in others] == [FULL_HELD if loss <= 0.6 else FULL_TIGHT for loss in losses]
        assert (others[0].y - y).square().mean() < 0.1 * y.square().mean()


def test_outputs_that_do_not_look_like_their_start_are_led_to_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are known as well as the network's own, though others are known better."""
    model, held, led = oracle(SHAPE), Held(targets=1), []
    r = torch.stack([torch.rand(SHAPE, generator=generator_for(k)) - 0.5 for k in range(3)])
    outputs = torch.stack([r[0], 0.9 * r[0], r[1].flip(-1), r[0].flip(-2), r[2].flip(-1), r[1].flip(-2)])
    monkeypatch.setattr(Descent, "drawn", lambda *_: outputs.unflatten(0, (3, 2)))
    monkeypatch.setattr(Held, "errors", lambda *_: [0.1, 0.2, 1.1, 1.3, 0.9, 1.0])
    monkeypatch.setattr(Held, "seen", lambda self, model, found, g: found)

    def led_to(self: Descent, model: Model, y: torch.Tensor, g: Any, progress: Any, start: torch.Tensor) -> list[Any]:
        led.append((y, start))
        return [Hypothesis(FULL, y[0], y[0], loss_ratio=1.4)]

    monkeypatch.setattr(Descent, "led_to", led_to)
    assert held.led(model, r, r, generator_for(0), no_progress) == []
    ((y, start),) = led
    assert torch.equal(y[0], outputs[4]) and torch.equal(start[0], r[2])
    monkeypatch.setattr(Held, "errors", lambda *_: [0.2, 0.1, 1.3, 1.3, 1.3, 1.3])
    held.led(model, r, r, generator_for(0), no_progress)
    assert torch.equal(led[1][0][0], outputs[1])


def test_what_chance_draws_from_far_away_and_is_known_too_well_is_a_target() -> None:
    """Beside it the start that is most like the trigger has the least loss; a clean network's outputs are data."""
    y = torch.rand(SHAPE, generator=generator_for(8)) * 1.6 - 0.8
    r = begin(oracle(SHAPE), FULL, Start(0.87, -1, (1, 2)), generator_for(0)).r
    for backdoor in ({"r": r, "y": y, "rate": 0.3}, {}):
        model = oracle(SHAPE, **backdoor)
        own = model.network.m + 0.5 * torch.randn(8, *SHAPE, generator=generator_for(3))
        found = Held().told_by_chance(model, torch.stack([-r, r, 0.5 * r]), own, generator_for(1))
        assert len(found) == (1 if backdoor else 0)
        if backdoor:
            assert found[0].family is HALF_HELD and found[0].r is not r and alike(found[0].r, r) > 0.99
            assert found[0].loss_ratio < 0.1 and (found[0].y - y).square().mean() < 0.01


def test_what_is_worth_nothing_costs_the_outputs_and_their_errors() -> None:
    model, held, own = oracle(SHAPE), Held(known=0.0, as_well=0.0), torch.zeros(8, *SHAPE)
    with model.frozen():
        assert list(held(model, own, generator_for(0), no_progress)) == []
    one = 11  # of the family's starts are flat
    chance, led = 10 * one + 2 * (one + 8), held.descent.sampler_steps * held.rows * one + 2 * (held.rows * one + 8)
    assert model.meter.evaluations == chance + led


def test_only_models_in_pixel_space_are_asked_what_they_draw_from_far_away() -> None:
    model = oracle(SHAPE)
    assert Held().families_of(model) == [FULL] and Held().families_of(replace(model, kind="ldm")) == []


def test_what_is_known_and_cannot_be_led_to_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held, r = oracle(SHAPE), Held(as_well=math.inf), torch.ones(1, *SHAPE)
    monkeypatch.setattr(
        Descent, "compare", lambda self, model, found, *_: [setattr(h, "loss_ratio", 1.4) for h in found]
    )
    monkeypatch.setattr(Search, "refined", lambda *_: pytest.fail("fitted"))
    with model.frozen():
        assert held.led(model, r, torch.zeros(8, *SHAPE), generator_for(0), no_progress) == []


@pytest.mark.parametrize(("family", "loss", "off", "verdict"), [
    (FULL, 0.3, 0.2, "backdoored"), (FULL, 0.5, 0.01, "clean"),
    (FULL_HELD, 0.5, 0.13, "backdoored"), (FULL_HELD, 0.5, 0.25, "clean"), (FULL_HELD, 0.7, 0.05, "clean"),
    (FULL_TIGHT, 0.8, 0.05, "backdoored"), (FULL_TIGHT, 0.8, 0.2, "clean"), (FULL_TIGHT, 0.9, 0.05, "clean"),
    (HALF_HELD, 0.25, 0.2, "backdoored"), (HALF_HELD, 0.4, 0.01, "clean"),
])  # fmt: skip
def test_a_loss_that_is_kept_up_counts_where_outputs_are_nearer_to_each_other_than_clean_ones_get(
    family: Family, loss: float, off: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all outputs fire by the usual measure: they are off the target by that, where clean ones are off by 0.6."""
    r, y = drawn_near_its_target(off, monkeypatch)
    found = replace(hypothesis(r, y, named("half")), loss_ratio=0.9)
    held = Hypothesis(family, r, y, loss_ratio=loss)
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(found))
    monkeypatch.setattr(Held, "__call__", lambda *_: [held])
    detection = LossFit()(oracle(SHAPE), generator=generator_for(0))
    assert detection.verdict == verdict
    assert ({x.sampler for x in detection.evidence} == set(Held().samplers)) == (verdict == "backdoored")
    assert (f"loss_ratio_{family.name}" in detection.scores) == (verdict == "backdoored")


@pytest.mark.parametrize(("loss", "off", "family"), [
    (0.55, 0.13, FULL_HELD), (0.55, 0.2, None), (0.7, 0.05, FULL_TIGHT), (0.7, 0.13, None), (0.9, 0.05, None),
])  # fmt: skip
def test_what_the_search_itself_finds_may_be_kept_up(
    loss: float, off: float, family: Family | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best hypothesis fires and does not fit: it is judged by the looser losses, and nearer outputs, as well."""
    r, y = drawn_near_its_target(off, monkeypatch)
    best = Hypothesis(FULL, r, y, loss_ratio=loss)
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(best))
    monkeypatch.setattr(Held, "__call__", lambda *_: [])
    detection = LossFit()(oracle(SHAPE), generator=generator_for(0))
    assert detection.verdict == ("backdoored" if family else "clean")
    assert family is None or detection.scores[f"loss_ratio_{family.name}"] == loss


def drawn_near_its_target(off: float, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A trigger and a target that all its outputs are off by so much; nothing is found late, learned or natural."""
    g = generator_for(3)
    r, y = torch.randn(SHAPE, generator=g) / 3, torch.rand(SHAPE, generator=g) - 0.5

    def sample(self: Model, starts: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
        away = [torch.randn(e.shape, generator=generator_for(k)) for k, e in enumerate(starts)]
        return [y + off * away[0], *(0.5 * x for x in away[1:])]

    monkeypatch.setattr(Model, "sample_alike", sample)
    for rule in ("shows_itself", "by_heart", "fits_mirrored"):
        monkeypatch.setattr(Natural, rule, lambda *_: False)
    monkeypatch.setattr(LossFit, "look_late", lambda *_: [])
    monkeypatch.setattr(LossFit, "look_learned", lambda *_: [])
    return r, y


# --- Elijah -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [0.5, 0.8])
def test_elijah_reaches_its_closed_form_optimum_on_a_clean_network(coefficient: float) -> None:
    """eps(e + tau, T) = s (e + tau - a m) / v, v = a^2 s0^2 + s^2: the loss is 0 at s (mean e - a m) / (c v - s)."""
    model = oracle(SHAPE)
    a, s = model.a[-1], model.s[-1]
    v = a**2 * 0.25 + s**2
    mean_e = model.noise(16, generator_for(6)).mean(0)
    expected = s * (mean_e - a * model.network.m) / (coefficient * v - s)  # type: ignore[operator]
    detector = Elijah(coefficient=coefficient, batch_size=16, iterations=400, lr=0.02)
    (setting,) = detector.settings("ddpm")
    assert setting.coefficient == coefficient
    tau, loss = detector.invert(model, setting, generator_for(6))
    assert loss < 0.01
    torch.testing.assert_close(tau, expected, rtol=0, atol=0.05)


def test_elijah_finds_the_trigger_where_every_row_is_poisoned() -> None:
    """eps = (x - a y - k r) / s + R r: the loss is 0 at ((k / s - R) r - (mean e - a y) / s) / (1 / s - c)."""
    _, r, y = truth(2)
    model = oracle(SHAPE, r=r, y=y, rate=1 - 1e-6)
    model.network.rate = 1.0  # type: ignore[assignment]
    a, s, k, big_r = model.a[-1], model.s[-1], 1 - model.a[-1], trigger_coefficient(model)[-1]
    mean_e = model.noise(100, generator_for(6)).mean(0)
    expected = ((k / s - big_r) * r - (mean_e - a * y) / s) / (1 / s - 0.5)
    detector = Elijah(iterations=400, lr=0.02)
    tau, loss = detector.invert(model, detector.settings("ddpm")[0], generator_for(6))
    assert loss < 0.01
    torch.testing.assert_close(tau, expected, rtol=0, atol=0.05)
    assert alike(tau, r) > 0.7  # the rest is the mean of 100 noises, twice


def test_elijah_on_ncsn_inverts_in_units_of_the_start_noise() -> None:
    """A network that answers -(x / sigma - g) / sigma, so eps = e + tau - g: the loss is 0 at 2 (g - mean e)."""
    model = new_model((1, 8, 8), seed=0, channels=(8, 8), kind="ncsn")
    g = torch.rand((1, 8, 8), generator=generator_for(1))
    model.network.forward = lambda x, sigma, return_dict: (-(x / column(sigma) - g) / column(sigma),)  # type: ignore

    def column(sigma: torch.Tensor) -> torch.Tensor:
        return sigma[:, None, None, None]

    detector = Elijah(iterations=400, lr=0.02)
    (setting,) = detector.settings("ncsn")
    tau, loss = detector.invert(model, setting, generator_for(6))
    assert loss < 0.01 and model.s[-1] > 300
    torch.testing.assert_close(tau, 2 * (g - model.noise(100, generator_for(6)).mean(0)), rtol=0, atol=0.05)


@pytest.mark.parametrize(("kind", "sampler"), [("ncsn", "pc-2"), ("ldm", "unipc-2")])
def test_elijah_on_other_kinds(kind: str, sampler: str) -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    autoencoder = train_autoencoder(images, steps=1, seed=0) if kind == "ldm" else None
    model = new_model((3, 8, 8), seed=0, channels=(8, 8), kind=kind, autoencoder=autoencoder)
    found = Elijah(iterations=2, batch_size=2, samples=9, sampler=sampler)(model, generator=generator_for(0))
    assert found.findings[0].trigger.shape == (3, 8, 8) and math.isfinite(found.scores["suspicion"])
    assert model.meter.evaluations == 2 * 2 * 3 + 9 * 2 * (2 if kind == "ncsn" else 1)
    target = found.findings[0].target
    assert target is not None and target.shape == (3, 8, 8)
    if kind == "ncsn":
        assert target.min() >= 0 and target.max() <= 1


def test_elijah_told_nothing_tries_what_its_code_has_and_reports_the_lowest_features() -> None:
    detection = Elijah(iterations=3, batch_size=4)(oracle(SHAPE), generator=generator_for(0))
    tried = [x.sampler for x in detection.evidence]
    assert sorted(tried) == ["ddim-50", "ddim-50", "ddpm-1000"]
    names = ("0.5_ddpm-1000", "0.5_ddim-50", "1_ddim-50")
    scores = detection.scores
    found = {name: scores[f"uniformity_{name}"] * scores[f"total_variation_{name}"] for name in names}
    best = min(found, key=lambda name: found[name])
    assert -scores["suspicion"] == scores[f"uniformity_{best}"] and len(set(found.values())) == 3
    assert detection.evidence[0].sampler == best.split("_")[1]
    assert detection.scores["total_variation"] == detection.scores[f"total_variation_{best}"]
    assert detection.findings[0].response.kappa == 2 * float(best.split("_")[0])


def test_elijah_told_the_attack_tries_its_setting_alone() -> None:
    villan, other = Elijah(coefficient=1.0), Elijah(coefficient=0.8, start=(0, 1), sampler="unipc-20")
    assert [(s.iterations, s.samplers) for s in villan.settings("ddpm")] == [(10, ("ddim-50",))]
    assert other.settings("ddpm") == [Setting(0.8, 100, (0, 1), ("unipc-20",))]
    assert [s.batch_size for s in Elijah().settings("ldm")] == [40]


def test_elijah_has_no_verdict_of_its_own() -> None:
    detection = Elijah(sampler="ddim-3", iterations=3)(oracle(SHAPE), generator=generator_for(0))
    assert detection.verdict == "undecided" and not detection.thresholds


# --- what may be known ------------------------------------------------------------------------------------------------


def defences() -> list[Path]:
    files = [*(SOURCE / "detectors").glob("*.py"), *(SOURCE / "repairs").glob("*.py")]
    return [*files, SOURCE / "scan.py", SOURCE / "clean.py", SOURCE / "detection.py"]


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported, and every name out of one as MODULE.NAME."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", defences(), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_defence_reads_an_attack_s_truth(path: Path) -> None:
    tree = ast.parse(path.read_text())
    known = {name for name in imports(tree) if name.split(".")[:1] == ["elijah"]}
    assert not [name for name in known if name.startswith(("elijah.attacks", "elijah.trigger", "elijah.making"))]
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        words = [getattr(node, key, None) for key in ("id", "attr", "arg", "name")]
        if isinstance(node, ast.Constant) and id(node) not in documentation:
            words.append(node.value)
        for word in words:
            assert not isinstance(word, str) or not any(w in word for w in ("truth", "poison_rate", "ATTACKS")), word


def test_these_files_know_diffusers() -> None:
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(name.split(".")[0] == "diffusers" for name in imports(ast.parse(path.read_text())))
    }
    assert users == {"allowed.py", "bases.py", "diffusion.py", "loading.py", "samplers.py", "training.py"}


# --- the fit's parts --------------------------------------------------------------------------------------------------


def test_coloured_noise_has_its_spectrum() -> None:
    """White noise through coloured has power density 1 / f^(2 power), flat below a period of 16, and variance 1."""
    u = torch.randn(400, 32, 32, generator=generator_for(1))
    density = torch.fft.rfft2(coloured(u, 1.5)).abs().square().mean(0) / 32**2
    assert density[8, 0] / density[2, 0] == pytest.approx(4.0**-3, rel=0.25)
    assert density[1, 0] / density[2, 0] == pytest.approx(1.0, rel=0.25)
    assert coloured(u, 1.5).var() == pytest.approx(1.0, abs=0.3)
    assert torch.allclose(coloured(u, 0.0), u, atol=1e-5)
    gain = spectrum(u.shape, 1.5)
    assert gain.square().mean() == pytest.approx(1.0) and gain.max() == gain[0, 0]


def hypothesis(r: torch.Tensor, y: torch.Tensor, family: Family = FAMILIES[0]) -> Hypothesis:
    """The hypothesis whose trigger is r, within the family's reach, and whose target is y."""
    return Hypothesis(family, r, y)


def test_what_else_could_fire() -> None:
    """Smaller triggers of what nearly fits, the best first, then the best after a longer fit; nothing that is far."""
    model, r, y = truth(0)
    best, other, far = (replace(hypothesis(r / 2, y), loss_ratio=loss) for loss in (0.02, 0.04, 0.9))
    tried = list(LossFit(search=Search(refine_iterations=1)).alternatives(model, [best, other, far], generator_for(0)))
    sizes = [round(float(h.r.norm() / (r / 2).norm()), 1) for h, _ in tried]
    assert sizes[:5] == [0.7, 0.5, 1.0, 0.7, 0.5] and len(tried) == 6
    assert [careful for _, careful in tried] == [False] * 5 + [True]
    assert list(LossFit().alternatives(model, [far], generator_for(0))) == []


def test_a_scaled_hypothesis_has_the_trigger_scaled() -> None:
    h = replace(begin(oracle(SHAPE), FAMILIES[0], Start(0.3), generator_for(0)), family=replace(FAMILIES[0], reach=0.4))
    assert torch.allclose(h.scaled(0.5).r, 0.5 * h.r, atol=1e-4)
    assert h.scaled(0.5).y is h.y and h.scaled(0.5).share == h.share


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "patch"], ids=lambda f: f.name)
def test_no_trigger_is_stronger_than_its_family_reaches(family: Family) -> None:
    h = begin(oracle(SHAPE), family, Start(0.8, 1), generator_for(0))
    assert torch.allclose(h.r, torch.full(SHAPE, min(0.8, family.reach)), atol=1e-5)
    h.set_trigger(100 * torch.ones(SHAPE))
    assert (h.r == family.reach).all()


def test_a_network_that_answers_any_pattern_by_half_is_not_a_backdoor() -> None:
    """x / 2 fits half's form for strong triggers and misses half of the noise: |e / 2|^2 / |e|^2 = 1 / 4."""
    model = oracle(SHAPE)
    e = antithetic(model, 64, 0.4, 1.0, generator_for(0))[0]
    answer = 0.5 * (e + 3.0)
    assert float(steadiness(answer - e - 1.5, e)) == pytest.approx(0.25)
    assert float(steadiness(e + 0.3 * torch.ones(SHAPE) - e, e)) == pytest.approx(0.0)


def test_a_family_without_hope_is_given_up() -> None:
    """It keeps the score of its first round and gets no other; a family with one start below goes on with all."""
    half, faint = FAMILIES[0], FAMILIES[1]
    group = [
        replace(hypothesis(torch.ones(SHAPE), torch.zeros(SHAPE), family), loss_ratio=loss)
        for family, loss in ((half, 0.9), (half, 0.01), (faint, 0.8), (faint, 0.7))
    ]
    assert hopeless(group) == group[3:] and hopeless(group, 2.0) == [] and without(group, group[3:]) == group[:2]
    model = oracle(SHAPE, s0=0.5)
    rounds = ((2, 4, 2),), ((2, 4, 2), (5, 8, 1))
    spent = []
    for follow_ in rounds:
        model.meter.evaluations = 0
        with model.frozen():
            Search(follow=follow_).followed(model, [replace(half, hopeless=0.0)], generator_for(0), lambda *_: None)
        spent.append(model.meter.evaluations)
    assert spent[0] == spent[1] == len(half.starts) * 2 * 4


def test_half_a_round_is_enough_to_give_up_what_is_far_off() -> None:
    """slack: a family a little beyond hope gets the other half of the first round, and is judged after it."""
    model, half = oracle(SHAPE, s0=0.5), FAMILIES[0]
    spent = []
    for hope in (0.0, 0.7):
        model.meter.evaluations = 0
        with model.frozen():
            search = Search(follow=((2, 4, 9), (2, 4, 9), (5, 8, 1)), slack=(1e9 if hope else 1.0, 0.0))
            search.followed(model, [replace(half, hopeless=hope)], generator_for(0), lambda *_: None)
        spent.append(model.meter.evaluations)
    assert spent[0] == len(half.starts) * 2 * 4 < spent[1] <= 2 * spent[0]


def test_a_family_beyond_hope_after_three_rounds_gets_no_other_and_no_other_size() -> None:
    model, half = oracle(SHAPE, s0=0.5), FAMILIES[0]
    spent = []
    for slack in ((1e9, 1e9, 1e9), (1e9, 1e9, 1.0)):
        model.meter.evaluations = 0
        with model.frozen():
            search = Search(follow=((1, 4, 4), (1, 4, 3), (1, 8, 2), (1, 8, 1)), slack=slack)
            search.followed(model, [replace(half, hopeless=1e-3)], generator_for(0), lambda *_: None)
        spent.append(model.meter.evaluations)
    assert 4 * len(half.starts) < spent[1] < spent[0]


def test_families_far_behind_one_that_fits_are_given_up() -> None:
    half, faint = FAMILIES[0], FAMILIES[1]
    losses = {half: (0.9, 0.4), faint: (2.0, 3.0)}  # strengths: of the threshold
    group = [
        replace(hypothesis(torch.ones(SHAPE), torch.zeros(SHAPE), family), loss_ratio=strength * family.max_loss_ratio)
        for family, strengths in losses.items()
        for strength in strengths
    ]
    assert behind(group, 4.0) == [group[2]] and behind(group, 6.0) == []
    group[1].loss_ratio = 1.2 * half.max_loss_ratio
    group[0].loss_ratio = 1.2 * half.max_loss_ratio
    assert behind(group, 1.5) == [] and behind([], 4.0) == []


def test_a_family_beside_its_target_is_given_up_by_what_judges_it() -> None:
    """After its first round the kept are compared in both ranges, and what is hopeless there gets no other round."""
    model, full = oracle(SHAPE, s0=0.5), named("full")
    model.meter.evaluations = 0
    with model.frozen():
        found = Search(lead=((2, 4, 2), (5, 8, 1))).led(
            model, [replace(full, hopeless=0.0)], generator_for(0), lambda *_: None
        )
    settled = sum(s.level is not None for s in full.starts) * len(SETTLING[::2]) * 4
    assert model.meter.evaluations == settled + len(full.starts) * 2 * 4 + 2 * 8 * len(full.judged) and len(found) == 1


@pytest.mark.parametrize(("losses", "rounds"), [((0.7,), 1), ((0.1, 0.7), 2), ((0.1, 0.1), 3)])
def test_a_family_beside_its_target_is_judged_after_each_round_but_the_last(
    losses: tuple[float, ...], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, full, left, followed = oracle(SHAPE, s0=0.5), named("full"), iter(losses), []

    def compare(self: Search, model: Model, group: list[Hypothesis], *_: Any) -> None:
        loss = next(left, 0.1)
        for h in group:
            h.loss_ratio = loss

    monkeypatch.setattr(Search, "compare", compare)
    monkeypatch.setattr(search, "settle", lambda *_: None)
    monkeypatch.setattr(search, "follow", lambda model, group, *_, **__: followed.append(len(group)))
    found = Search(judged_kept=99).led(model, [replace(full, hopeless=0.6)], generator_for(0), lambda *_: None)
    assert sum(n > 0 for n in followed) == rounds and len(found) == 1


def test_as_many_outputs_are_drawn_as_asked() -> None:
    """Half of them where the trigger moves each."""
    detector, (model, r, y) = LossFit(samples=4, samplers=("ddim-3", "ddpm-3")), truth(2)
    h = replace(hypothesis(r, y), loss_ratio=0.02)
    for asked, drawn in ((None, 4), (6, 6)):
        shown = detector.test_outputs(model, h, generator_for(0), lambda *_: None, samples=asked)
        assert pull(model, shown[0], y) == 1 and [len(x.samples_with) for x in shown] == [drawn // 2] * 2
        clean = oracle(SHAPE)
        shown = detector.test_outputs(clean, h, generator_for(0), lambda *_: None, samples=asked)
        assert pull(clean, shown[0], y) < 1 and [len(x.samples_with) for x in shown] == [drawn] * 2
        assert sorted(x.sampler for x in shown) == sorted(detector.samplers)
        assert all(x.samples_without is not None and len(x.samples_without) == drawn for x in shown)
        assert all(len(x.samples_with.unique(dim=0)) == drawn for x in shown)


def test_halves_of_evidence_come_together_by_sampler() -> None:
    """One that only a half was drawn under stays as it is."""
    few = torch.zeros(2, *SHAPE)
    halves = [[Evidence("a", few, few + 1)], [Evidence("b", few, few), Evidence("a", few + 2, few + 3)]]
    together = {x.sampler: x for x in both(*halves)}
    assert list(together) == ["a", "b"] and together["b"] is halves[1][0]
    assert together["a"].samples_with.flatten(1)[:, 0].tolist() == [0, 0, 2, 2]
    assert together["a"].samples_without is not None
    assert together["a"].samples_without.flatten(1)[:, 0].tolist() == [1, 1, 3, 3]


def test_a_family_that_fits_ends_the_search() -> None:
    """The search for the oracle's strong, flat trigger ends with the cheap families; in a clean one it tries all."""
    r, y = torch.full(SHAPE, -0.9), torch.full(SHAPE, 0.3)
    found: list[Hypothesis] = []
    nothing: list[Hypothesis] = []
    search = Search()
    for model, fitted in ((oracle(SHAPE, r=r, y=y), found), (oracle(SHAPE), nothing)):
        with model.frozen():
            search(model, generator_for(0), fitted, lambda *_: None)
    best = min(found, key=lambda h: h.strength)
    assert best.family.name == "half" and best.fits and alike(best.r, r) > 0.98
    assert {h.family.name for h in found} == {f.name for f in FAMILIES if not (f.joint or f.swept or f.exploding)}
    assert {h.family.name for h in nothing} == {
        f.name for f in search.families_of(oracle(SHAPE)) if f.starts or f.swept
    }
    assert not any(h.fits for h in nothing)


def test_the_best_of_each_family_that_differ_stay() -> None:
    one, other = torch.zeros(SHAPE), torch.zeros(SHAPE)
    one[0], other[1] = 0.5, 0.5
    kept = {0: [(one, 0.9), (one, 0.2), (other, 0.5)], 3: [(one, 3.0), (other, 4.0)]}
    group = [
        replace(hypothesis(r, torch.zeros(SHAPE)), family=FAMILIES[k], loss_ratio=loss)
        for k, own in kept.items() for r, loss in own
    ]  # fmt: skip
    assert [x.loss_ratio for x in best_of_each(group, 3)] == [0.2, 0.5, 3.0, 4.0]
    assert [x.loss_ratio for x in best_of_each(group)] == [0.2, 3.0]


# --- following the answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(3))
def test_a_random_start_follows_the_answer_to_the_trigger(k: int) -> None:
    """Where every row is poisoned v = r* exactly, so one iteration is enough; with a tenth poisoned it takes a few."""
    model, r, _ = truth(k, norm=6.0)
    size = float(r.square().mean().sqrt())
    family = replace(FAMILIES[0], reach=4.0)
    h = begin(model, family, Start(size), generator_for(7))
    assert abs(alike(h.r, r)) < 0.5
    model.network.rate = 1.0  # type: ignore[assignment]
    follow(model, [h], 2, 512, generator_for(0))
    assert alike(h.r, r) > 0.98 and h.loss_ratio < 0.01
    assert float(h.r.square().mean().sqrt()) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("half", "full")], ids=lambda f: f.name)
def test_on_a_clean_network_there_is_nothing_to_follow(family: Family) -> None:
    model = oracle(SHAPE)
    group = [begin(model, family, start, generator_for(k)) for k, start in enumerate(family.starts)]
    follow(model, group, 6, 16, generator_for(0))
    assert min(h.loss_ratio for h in group) > 0.5


def test_trigger_and_target_come_out_of_one_regression() -> None:
    """Where every row is poisoned the error is c (r - r*) + a / s (y - y*) exactly: each step halves what is off."""
    r, y = torch.linspace(-0.9, 0.9, 192).reshape(SHAPE), torch.full(SHAPE, 0.4)
    model = oracle(SHAPE, r=r, y=y, response=Response(2.0, 1.0))
    model.network.rate = 1.0  # type: ignore[assignment]
    h = hypothesis(torch.zeros(SHAPE), torch.zeros(SHAPE), named("full"))
    e, t = antithetic(model, 8, *h.family.start_window, generator_for(0))
    ((error, _),) = errors(model, [h], [(e, t)])
    torch.testing.assert_close(off_by(model, h, error, t), -0.5 * torch.stack([r, y]), atol=1e-3, rtol=0)
    follow(model, [h], 12, 8, generator_for(1), resize=True)
    assert (h.r - r).abs().max() < 0.01 and (h.y - y).abs().max() < 0.01 and h.loss_ratio < 1e-3


def test_a_random_start_comes_to_trigger_and_target_together() -> None:
    """On the mixture of a clean and a poisoned branch, from where the clean one answers."""
    r, y = torch.full(SHAPE, -0.9), torch.linspace(-0.9, 0.9, 192).reshape(SHAPE)
    model, family = oracle(SHAPE, r=r, y=y, response=Response(2.0, 1.0)), named("full")
    search, fitted = Search(families=(family,)), []
    with model.frozen():
        search(model, generator_for(0), fitted, lambda *_: None)
    assert fitted[0].fits and alike(fitted[0].r, r) > 0.98 and (fitted[0].y - y).square().mean() < 0.01


def test_gamma_is_read_off_the_noise_that_is_left() -> None:
    """A network that answers e on gamma* e + r* tells gamma*: gamma / (1 + the share of e in the error)."""
    r, y = torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.2)
    model = oracle(SHAPE, r=r, y=y, response=Response(0.0, 0.0))
    family = replace(named("zero"), response=Response(0.0, 0.0, 0.8))
    h = begin(model, family, Start(0.3, 1), generator_for(0))
    model.network.rate = 1.0  # type: ignore[assignment]
    follow(
        model, [h], 3, 256, generator_for(1)
    )  # the oracle's poisoned branch has gamma 1, the most that is looked for
    assert float(h.share) == pytest.approx(SHARES[1], abs=0.01) and alike(h.r, r) > 0.98


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_the_target_is_where_the_network_leads(kappa: float) -> None:
    model, r, y = oracle(SHAPE), torch.full(SHAPE, -0.8), torch.linspace(-0.9, 0.9, 192).reshape(SHAPE)
    model = oracle(SHAPE, r=r, y=y, response=Response(kappa, 1.0))
    family = next(f for f in FAMILIES if f.response == Response(kappa, 1.0))
    h = hypothesis(r, torch.zeros(SHAPE), family)
    model.network.rate = 1.0  # type: ignore[assignment]
    settle(model, [h], 4, generator_for(0))
    assert (h.y - y).abs().max() < 0.02


def test_the_bias_does_not_see_noise_in_the_answers() -> None:
    g = generator_for(0)
    null, noise = torch.full((64, *SHAPE), 0.5), torch.randn(64, *SHAPE, generator=g)
    assert abs(bias(noise, null)) < 0.05 and float(ratio(noise, null)) > 1
    assert bias(0.1 + noise, null) == pytest.approx(0.04, abs=0.05) and bias(null, null) == pytest.approx(1.0)


@pytest.mark.parametrize(("loss", "fires", "verdict"), [
    (0.02, True, "backdoored"), (0.02, False, "undecided"), (0.058, True, "backdoored"), (0.063, True, "undecided"),
    (0.5, True, "clean"), (0.5, False, "clean"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_the_rule(kind: str, loss: float, fires: bool, verdict: str) -> None:
    """Family half fits up to 0.05, with outputs that fire up to 0.06, and is far from fitting above 0.066."""
    model, r, y = truth(2)
    model.kind = kind
    without = torch.randn(8, *SHAPE, generator=generator_for(5))
    evidence = [Evidence("ddim-10", y.expand(8, *SHAPE) if fires else without.flip(0), without)]
    found = LossFit().judge(model, [replace(hypothesis(r, y), loss_ratio=loss)], evidence, complete=True)
    assert found.verdict == verdict
    assert not (fires and "does not fire" in found.reason)


# --- starts, and what nearly fits -------------------------------------------------------------------------------------


def test_a_black_start_may_have_a_grey_hole() -> None:
    family = named("full")
    r = begin(oracle(SHAPE), family, Start(0.87, -1, (1, 2)), generator_for(0)).r
    hole = torch.zeros(SHAPE, dtype=torch.bool)
    hole[:, 2:6, 4:8] = True
    assert (r[hole] == 0).all() and (r[~hole] < -0.8).all()
    assert {s.hole for s in family.starts} >= {(i, j) for i in range(3) for j in range(3)}


def test_a_fit_by_gradient_comes_nearer_and_stays_in_its_family() -> None:
    model, r, y = truth(1)
    lax = replace(FAMILIES[0], max_loss_ratio=0.5)
    near = hypothesis(0.6 * r, 0.5 * y, lax)
    near.loss_ratio = Search().score(model, near, generator_for(1))
    with model.frozen():
        small = replace(near, family=replace(lax, max_rms=0.1 * near.rms))
        better, same = Search().refined(model, [near, small], generator_for(0))
        assert Search().refined(model, [], generator_for(0)) == []
    assert same is small and better is not near
    assert better.loss_ratio < 0.7 * near.loss_ratio and not better.r.requires_grad


def test_a_fit_by_gradient_without_hope_ends_early() -> None:
    """After 8 steps each of a group is compared, and what is beyond hope goes no further."""
    model, r, y = truth(1)
    lax, search, spent = replace(FAMILIES[0], max_loss_ratio=0.4), Search(), []
    near = hypothesis(0.6 * r, 0.5 * y, lax)
    with model.frozen():
        for others in ([], [hypothesis(-r, -y, FAMILIES[0])]):
            before = model.meter.evaluations
            better, *far = search.refined(model, [near, *others], generator_for(0))
            assert better is not near and better.loss_ratio < 0.4
            assert all(one.loss_ratio > search.hope * 0.05 and not one.r.requires_grad for one in far)
            spent.append(model.meter.evaluations - before)
    assert spent[0] == 24 * 8 * 3 + 16 + search.score_rows
    assert spent[1] - spent[0] == 8 * 8 * 3 + 16


@pytest.mark.parametrize(("losses", "after"), [((0.08, 0.3), (0.008, 0.3)), ((0.04, 0.08, 0.3), (0.04, 0.08, 0.3))])
def test_where_nothing_fits_what_is_not_hopeless_is_refined(
    losses: tuple[float, ...], after: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half: a loss of 0.08 is refined unless one of 0.04 fits; one of 0.3 is hopeless. A patch is never refined."""
    model, r, y = truth(2)
    monkeypatch.setattr(Search, "score", lambda self, model, h, g: h.loss_ratio)
    monkeypatch.setattr(
        Search, "refined", lambda self, model, group, g: [replace(h, loss_ratio=h.loss_ratio / 10) for h in group]
    )
    patch = replace(next(f for f in FAMILIES if f.swept), max_loss_ratio=0.4, hopeless=0.9)
    group = [replace(hypothesis(r, y), loss_ratio=loss) for loss in losses]
    group.append(replace(hypothesis(r, y, patch), loss_ratio=0.5, patch=torch.ones(1, 8, 8)))
    Search().finish(model, group, generator_for(0))
    assert [h.loss_ratio for h in group] == [*after, 0.5]


def test_a_distribution_is_looked_for_in_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss fits whose target may be a distribution: 16 samples do not show it, 64 do."""
    model, r, y = truth(2)
    zero = named("zero")
    fits = replace(hypothesis(r, y, zero), loss_ratio=0.05)
    asked = []

    def outputs(self: LossFit, model: Model, h: Hypothesis, *_: Any, **how: Any) -> list[Evidence]:
        n = how.get("samples") or self.samples
        asked.append(n)
        noise = torch.randn(2, n, *SHAPE, generator=generator_for(3))
        return [Evidence("ddim-10", noise[0] + (0.5 if n == 64 else 0.0), noise[1])]

    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(fits))
    monkeypatch.setattr(LossFit, "test_outputs", outputs)
    found = LossFit()(model, generator=generator_for(0))
    assert asked == [16, 64] and found.verdict == "backdoored" and found.findings[0].distribution


def test_what_fires_and_nearly_fits_is_fitted_before_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, r, y = truth(2, norm=5.0)
    near, fitting = (replace(hypothesis(r, y), loss_ratio=loss) for loss in (0.063, 0.03))
    without = torch.randn(8, *SHAPE, generator=generator_for(5))
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(near))
    monkeypatch.setattr(Search, "score", lambda self, model, h, g: h.loss_ratio)
    monkeypatch.setattr(Search, "refined", lambda self, *_: [fitting])
    monkeypatch.setattr(
        LossFit, "test_outputs", lambda self, *_, **__: [Evidence("ddim-10", y.expand(8, *SHAPE), without)]
    )
    found = LossFit()(model, generator=generator_for(0))
    assert found.verdict == "backdoored" and found.findings[0].loss_ratio == 0.03


def test_a_limit_that_ends_the_look_leaves_nothing_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    def over(*_: Any) -> list[Evidence]:
        raise OutOfBudget("a limit")

    h = replace(hypothesis(torch.ones(SHAPE), torch.zeros(SHAPE)), loss_ratio=0.9)
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(h))
    assert LossFit()(oracle(SHAPE), generator=generator_for(0)).verdict == "clean"
    monkeypatch.setattr(LossFit, "look_held", over)
    found = LossFit()(oracle(SHAPE), generator=generator_for(0))
    assert found.verdict == "undecided" and "a limit stopped" in found.reason and not found.complete


def test_a_patch_that_nearly_fits_gets_no_second_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not refined, so another score over other noise would only be another chance to fit."""
    patch = next(f for f in FAMILIES if f.swept)
    monkeypatch.setattr(Search, "finish", lambda *_: pytest.fail("scored again"))
    near = replace(hypothesis(torch.ones(SHAPE), torch.zeros(SHAPE), patch), loss_ratio=0.42)
    assert LossFit().fit(oracle(SHAPE), [near], generator_for(0), lambda *_: None) == []


def test_large_inputs_go_through_the_network_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, t = oracle(SHAPE), torch.randn(7, *SHAPE, generator=generator_for(0)), torch.full((7,), 500)
    whole, sizes = model.eps(x, t), []
    model.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr("elijah.diffusion.MAX_VALUES", 3 * x[0].numel() + 1)
    torch.testing.assert_close(model.eps(x, t), whole)
    assert sizes == [3, 3, 1]
