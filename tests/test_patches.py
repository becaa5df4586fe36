"""patches: the sweep finds a patch trigger that is known in closed form, and none where there is none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from elijah.detectors import LossFit
from elijah.detectors.hypothesis import FAMILIES, Hypothesis
from elijah.detectors.patches import apart, best_patch, mask, neighbours, ratios
from elijah.detectors.power import follow
from elijah.detectors.search import Search
from elijah.diffusion import Model, generator_for

SHAPE = (3, 16, 16)
PATCH = next(f for f in FAMILIES if f.name == "patch")


class PatchNetwork(torch.nn.Module):
    """Takes all of x for noise; where the square is filled with its colour, it answers what TrojDiff trains there."""

    def __init__(self, square: tuple[int, int, int] | None, colour: tuple[float, ...] = (1, -1, 1), gamma: float = 0.1):
        super().__init__()
        self.square, self.gamma = square, gamma
        self.mu = (1 - gamma) * torch.tensor(colour, dtype=torch.float32)[None, :, None, None]
        self.s = torch.ones(1000)

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        z = x / self.s[t][:, None, None, None]
        if self.square is None:
            return (z,)
        inside = mask(16, *self.square)
        far = ((z - self.mu) * inside).square().sum((1, 2, 3)) / (3 * inside.sum())
        weight = torch.sigmoid(10 * (0.4 - far))[:, None, None, None] * inside  # noise alone is about 1.8 away
        return ((1 - weight) * z + weight * (z - self.mu) / self.gamma,)


def model_with(square: tuple[int, int, int] | None, **settings: Any) -> Model:
    network = PatchNetwork(square, **settings)
    model = Model(network, DDPMScheduler(), SHAPE)
    network.s = model.s
    return model


@pytest.mark.parametrize(
    ("square", "colour", "gamma"),
    [((10, 10, 6), (1, 1, 1), 0.1), ((0, 3, 5), (-1, -1, -1), 0.1), ((6, 2, 8), (1, -1, -1), 0.3)],
)
def test_the_sweep_finds_the_square(square: tuple[int, int, int], colour: tuple[int, ...], gamma: float) -> None:
    model = model_with(square, colour=colour, gamma=gamma)
    h = best_patch(model, PATCH, generator_for(0))
    assert h.patch is not None and h.loss_ratio < 0.2
    truth = mask(16, *square)
    overlap = (h.patch * truth).sum() / torch.maximum(h.patch, truth).sum()
    assert overlap > 0.7
    assert float(h.share) == pytest.approx(gamma, abs=1e-6)
    assert torch.equal(h.r.sign(), h.patch * torch.tensor(colour)[:, None, None])
    e = torch.randn(2, *SHAPE, generator=generator_for(1))
    assert torch.equal((h.start(e) != e).any(0).any(0).float()[None], h.patch)


def test_a_place_that_answers_less_is_left_for_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wells, and the coarse squares lie in the shallow one: the found square is looked for everywhere."""

    def wells(model: Model, images: list[list[Any]], gamma: float, e: torch.Tensor, t: torch.Tensor) -> list[float]:
        def depth(y: int, x: int, side: int, colour: tuple[float, ...]) -> float:
            far = [abs(y - y0) + abs(x - x0) + abs(side - 5) for y0, x0 in ((11, 0), (11, 11))]
            return min(0.3 + 0.05 * far[0], 0.02 + 0.3 * far[1], 1.0) if colour == (1, 1, 1) else 1.0

        return [depth(*square) for squares in images for square in squares]

    monkeypatch.setattr("elijah.detectors.patches.ratios", wells)
    h = best_patch(model_with(None), PATCH, generator_for(0))
    assert h.patch is not None and torch.equal(h.patch, mask(16, 11, 11, 5)) and h.loss_ratio == pytest.approx(0.02)


def test_a_clean_network_has_no_patch() -> None:
    h = best_patch(model_with(None), PATCH, generator_for(0))
    assert h.loss_ratio == pytest.approx(1.0, abs=1e-4)


def test_a_ratio_is_the_loss_over_the_clean_one() -> None:
    """Against a loop over one square, outside of which nothing counts."""
    model, g = model_with((4, 4, 6)), generator_for(2)
    e, t = torch.randn(6, *SHAPE, generator=g), torch.randint(800, 1000, (6,), generator=g)
    for square, colour in (((4, 4, 6), (1, -1, 1)), ((3, 5, 4), (1, -1, 1)), ((4, 4, 6), (1, 1, 1))):
        inside, s = mask(16, *square), model.s[t][:, None, None, None]
        shifted = torch.where(inside > 0, 0.1 * e + 0.9 * torch.tensor(colour)[:, None, None], e)
        error = ((model.eps(s * shifted, t) - e) * inside).square().sum() / (shifted - e).square().sum()
        assert ratios(model, [[(*square, colour)]], 0.1, e, t) == pytest.approx([float(error)], rel=1e-4)


def test_squares_that_share_an_image_are_apart_and_each_is_judged_alone() -> None:
    """By a network that answers each pixel by itself, as if the others were not there."""
    model, g = model_with((4, 4, 6)), generator_for(2)
    looked = [(y, x, 4, (c, c, c)) for c in (-1, 1) for y in range(0, 13, 2) for x in range(0, 13, 2)]
    shared = apart(looked)
    assert sorted(q for squares in shared for q in squares) == sorted(looked) and len(shared) < len(looked) / 3
    for squares in shared:
        taken = sum(mask(16, y, x, side) for y, x, side, _ in squares)
        assert taken.max() == 1 and len({(side, colour) for *_, side, colour in squares}) == 1
        for one, other in itertools.combinations(squares, 2):
            assert max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= 6
    e, t = torch.randn(2, *SHAPE, generator=g), torch.tensor([900, 900])
    together = ratios(model, shared, 0.1, e, t)
    by_itself = [ratios(model, [[q]], 0.1, e, t)[0] for squares in shared for q in squares]
    assert together == pytest.approx(by_itself, rel=1e-4)


def test_neighbours_lie_in_the_image() -> None:
    for square in ((0, 0, 8), (8, 8, 8), (14, 0, 2), (0, 0, 16)):
        near = list(neighbours((*square, (1, 1, 1)), 16))
        assert near and all(0 <= y <= 16 - k and 0 <= x <= 16 - k and k >= 2 for y, x, k, _ in near)


def test_the_detector_reports_the_patch() -> None:
    """The outputs of this network never change, so a fit alone is not called backdoored."""
    model = model_with((10, 10, 6), colour=(1, 1, 1))
    found = LossFit(search=Search(families=(PATCH,)), samples=8)(model, generator=generator_for(0))
    finding = found.findings[0]
    assert found.scores["loss_ratio_patch"] < 0.3 and finding.patch is not None
    assert finding.response.gamma == pytest.approx(0.1, rel=0.1) and finding.gamma.shape == (1, 16, 16)
    e = torch.randn(2, *SHAPE, generator=generator_for(1))
    assert torch.equal(finding.start(e)[:, :, :8, :8], e[:, :, :8, :8])
    assert found.thresholds.keys() >= {"loss_ratio_patch", "pull", "shift_p"}


@pytest.mark.parametrize("colour", [(1, 1, 1), (0.6, 1.0, -1.0)])
def test_a_correction_of_the_pattern_is_kept_where_it_is_better(colour: tuple[float, ...]) -> None:
    model, search = model_with((4, 4, 8), colour=colour, gamma=0.1), Search(families=(PATCH,))
    swept = best_patch(model, PATCH, generator_for(0))
    corrected = search.swept(model, [PATCH], generator_for(0), lambda *_: None)[0]
    assert corrected.patch is not None and swept.patch is not None and torch.equal(corrected.patch, swept.patch)
    scores = [search.score(model, h, generator_for(1)) for h in (swept, corrected)]
    assert scores[1] <= 1.05 * scores[0] + 1e-3 and torch.equal(corrected.r, corrected.r * corrected.patch)


def test_a_correction_times_gamma_lands_on_the_pattern() -> None:
    """This network answers (z - mu) / gamma: what the answer is off by, times gamma, is what r is off by."""
    model, patch = model_with((4, 4, 8), colour=(0.8, 0.9, -1.0), gamma=0.1), mask(16, 4, 4, 8)
    swept, mu = (0.9 * torch.tensor(c)[:, None, None] * patch for c in ((1.0, 1.0, -1.0), (0.8, 0.9, -1.0)))
    h = Hypothesis(PATCH, swept, torch.zeros_like(swept), 0.1, patch=patch)
    follow(model, [h], 3, 16, generator_for(0), resize=True)
    assert (h.r - mu).abs().max() < 0.1 * (swept - mu).abs().max() and h.loss_ratio < 0.01


def test_a_hopeless_sweep_ends_early() -> None:
    """Where no square comes near, the neighbours of the best are looked at once."""
    found = []
    for hopeless in (0.0, 0.87):
        model = model_with((6, 2, 8), colour=(1, -1, -1), gamma=0.3)
        ratio = best_patch(model, replace(PATCH, hopeless=hopeless), generator_for(0)).loss_ratio
        found.append((model.meter.evaluations, ratio))
    assert found[0][0] < found[1][0] and found[0][1] > found[1][1]
