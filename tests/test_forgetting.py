"""Late triggers: the measure in closed form, the descent, and what the scan does with what it finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import late_oracle, oracle

from elijah.detection import Evidence
from elijah.detectors import LossFit
from elijah.detectors.forgetting import LATE, Forgetting, estimates, spread, spreads
from elijah.detectors.hypothesis import HALF, Hypothesis
from elijah.detectors.search import Search
from elijah.diffusion import Model, generator_for, no_progress

SHAPE = (3, 16, 16)


def trigger() -> torch.Tensor:
    """A bright square on black, smaller than those that the search starts with."""
    r = torch.full(SHAPE, -1.0)
    r[:, 2:8, 8:14] = 0.5
    return r


def target() -> torch.Tensor:
    return torch.rand(SHAPE, generator=generator_for(7)) * 1.6 - 0.8


def drawn(model: Model, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of N(0, 0.25), noise and timesteps of the window."""
    g = generator_for(3)
    e, t = Forgetting().draw(model, LATE, rows, g)
    return 0.5 * torch.randn((rows, *SHAPE), generator=g), e, t


def test_a_clean_network_estimates_the_image_and_a_share_of_all_noise() -> None:
    """x^ = w (x + s / a (e + r)), w = a^2 s0^2 / (a^2 s0^2 + s^2), where the data is N(0, s0^2)."""
    model = oracle(SHAPE)
    m = model.network.m
    x, e, t = drawn(model)
    a, s = (v[t][:, None, None, None] for v in (model.a, model.s))
    w = a**2 * 0.25 / (a**2 * 0.25 + s**2)
    expected = m + w * (x - m + s / a * (e + trigger()))
    torch.testing.assert_close(estimates(model, trigger(), x, e, t), expected, atol=1e-4, rtol=1e-4)


def test_the_spread_is_one_where_all_is_seen_and_none_where_the_image_is_forgotten() -> None:
    x = torch.randn(5, *SHAPE)
    assert spread(x, x) == pytest.approx(1.0)
    assert spread(x / 2 + 3, x) == pytest.approx(0.25)
    assert spread(torch.ones_like(x), x) == 0


def test_the_network_forgets_at_a_late_trigger_alone() -> None:
    model = late_oracle(trigger(), target())
    x, e, t = drawn(model)
    with torch.no_grad():
        at, mirrored, clean = (
            float(spread(estimates(model, r, x, e, t), x)) for r in (trigger(), trigger().flip(-1), torch.zeros(SHAPE))
        )
    assert at < 0.02
    assert mirrored == pytest.approx(clean, rel=0.3) and clean > 0.15


def images(model: Model) -> torch.Tensor:
    return model.sample(model.noise(8, generator_for(4)), "ddim-10")


def test_the_descent_ends_at_the_trigger_with_its_target() -> None:
    model = late_oracle(trigger(), target())
    with model.frozen():
        h = Forgetting()(model, images(model), generator_for(0), no_progress)
    assert h.fits and h.loss_ratio < 0.02
    assert (h.y - target()).square().mean() < 0.01
    assert h.r.abs().max() <= 1


def test_on_a_clean_network_it_ends_early_and_fits_nothing() -> None:
    model = oracle(SHAPE)
    few, full = (Forgetting(families=(dataclasses.replace(LATE, hopeless=limit),)) for limit in (1e-6, 9.0))
    own, costs = images(model), []
    for forgetting in (few, full):
        before = model.meter.evaluations
        with model.frozen():
            assert not forgetting(model, own, generator_for(0), no_progress).fits
        costs.append(model.meter.evaluations - before)
    begun = few.start_rows * len(LATE.starts) + few.kept * 3 * few.rows * few.first
    assert costs[0] == begun
    assert costs[1] == begun + 3 * few.rows * (few.iterations - few.first) + 2 * few.score_rows


def test_triggers_side_by_side_are_told_apart_as_one_by_one() -> None:
    model, g = late_oracle(trigger(), target()), generator_for(1)
    x = torch.rand(8, *SHAPE, generator=g) - 0.5
    draws = [(torch.randn(8, *SHAPE, generator=g), torch.full((8,), t)) for t in (250, 150)]
    group = [Hypothesis(LATE, r, target()) for r in (trigger(), -trigger())]
    together = spreads(model, group, [x, x.flip(0)], draws)
    for h, images, drawn, c in zip(group, (x, x.flip(0)), draws, together, strict=True):
        torch.testing.assert_close(c, spread(estimates(model, h.r, images, *drawn), images))
    assert together[0] < 0.1 * together[1]


def test_where_a_loss_nearly_fits_and_fires_a_late_trigger_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be undecided; another family's loss fits and fires as well."""
    model, r, y = oracle(SHAPE), trigger(), target()
    near, late = Hypothesis(HALF, r, y, loss_ratio=1.07 * HALF.max_if_fires), Hypothesis(LATE, r, y, loss_ratio=0.02)
    drawing = generator_for(5)
    monkeypatch.setattr(Search, "__call__", lambda self, model, g, fitted, progress: fitted.append(near))
    monkeypatch.setattr(LossFit, "fit", lambda self, *_: [])
    monkeypatch.setattr(
        LossFit,
        "test_outputs",
        lambda self, *_, **__: [Evidence("ddim-10", y.expand(8, *SHAPE), torch.randn(8, *SHAPE, generator=drawing))],
    )
    for found, verdict in ((late, "backdoored"), (dataclasses.replace(late, loss_ratio=0.5), "undecided")):
        monkeypatch.setattr(Forgetting, "__call__", lambda self, *_, found=found: found)
        detection = LossFit()(model, generator=generator_for(0))
        assert detection.verdict == verdict
        assert ("late" in detection.findings[0].matches) == (verdict == "backdoored")


def test_images_come_again_where_they_are_too_few() -> None:
    images = torch.arange(3.0)[:, None, None, None]
    got = Forgetting().drawn(images, 8, generator_for(0)).flatten().tolist()
    assert len(got) == 8 and sorted(set(got)) == [0, 1, 2]


@pytest.mark.parametrize(("loss", "fires", "verdict"), [
    (0.02, True, "backdoored"), (0.02, False, "clean"), (0.3, True, "clean"),
])  # fmt: skip
def test_what_forgets_counts_only_if_it_fires(
    loss: float, fires: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, r, y = oracle(SHAPE), trigger(), target()

    def found(self: Forgetting, model: Model, own: torch.Tensor, *_: object) -> Hypothesis:
        assert torch.equal(own, torch.zeros(8, *SHAPE))  # what the model draws without a trigger
        return Hypothesis(LATE, r, y, loss_ratio=loss)

    def sample(starts: list[torch.Tensor], *_: object, **__: object) -> list[torch.Tensor]:
        return [y.expand_as(e) if fires and e.mean() < -0.2 else torch.zeros_like(e) for e in starts]

    monkeypatch.setattr(Forgetting, "__call__", found)
    monkeypatch.setattr(model, "sample_alike", sample)
    report = LossFit()(model, generator=generator_for(0))
    assert report.verdict == verdict
    assert ("late" in report.findings[0].matches) == (verdict == "backdoored")
    assert report.scores["loss_ratio_late"] == loss
    assert ("of a late trigger that does not fire" in report.reason) == (loss < 0.1 and not fires)


@pytest.mark.parametrize(("smaller_fits", "verdict"), [(True, "backdoored"), (False, "clean")])
def test_a_late_trigger_that_is_too_large_to_fire_is_tried_smaller(
    smaller_fits: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, r, y = oracle(SHAPE), trigger(), target()
    moved = float((0.8 * r).mean())

    def sample(starts: list[torch.Tensor], *_: object, **__: object) -> list[torch.Tensor]:
        return [y.expand_as(e) if abs(float(e.mean()) - moved) < 0.03 else torch.zeros_like(e) for e in starts]

    def judge(self: Forgetting, model: Model, h: Hypothesis, *_: object) -> None:
        h.loss_ratio = 0.05 if smaller_fits else 0.2

    monkeypatch.setattr(Forgetting, "__call__", lambda self, *_: Hypothesis(LATE, r, y, loss_ratio=0.02))
    monkeypatch.setattr(Forgetting, "judge", judge)
    monkeypatch.setattr(model, "sample_alike", sample)
    found = LossFit()(model, generator=generator_for(0))
    assert found.verdict == verdict
    if smaller_fits:
        torch.testing.assert_close(found.findings[0].trigger, 0.8 * r)
        assert found.findings[0].loss_ratio == 0.05


def test_it_is_for_ddpm_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle(SHAPE)
    monkeypatch.setattr(Forgetting, "__call__", lambda *_: pytest.fail("not asked for"))
    assert "loss_ratio_late" not in LossFit(late=Forgetting(families=()))(model, generator=generator_for(0)).scores
    model.kind = "ldm"
    assert LossFit().look_late(model, [], torch.zeros(8, *SHAPE), generator_for(0), no_progress) == []
