"""Metrics against closed forms, brute force and published numbers."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from elijah import metrics
from elijah.errors import ElijahError


def images(n: int, *, shape: tuple[int, ...] = (3, 12, 12), seed: int = 0) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed"
)


# --- attack success -----------------------------------------------------------------------------------------------


def test_attack_success_counts_samples_below_each_threshold() -> None:
    target = torch.zeros(3, 8, 8)
    levels = torch.tensor([0.0, 0.05, 0.2, 0.3, 1.0])  # squared: 0, 0.0025, 0.04, 0.09, 1
    samples = levels[:, None, None, None].expand(-1, 3, 8, 8)
    assert torch.allclose(metrics.mse_to_target(samples, target), levels.square())
    assert metrics.attack_success(samples, target) == pytest.approx({0.01: 0.4, 0.05: 0.6, 0.1: 0.8})


def test_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ElijahError, match="target"):
        metrics.mse_to_target(images(2), torch.zeros(3, 1, 1))


def test_uint8_images_are_refused() -> None:
    with pytest.raises(ElijahError, match="float"):
        metrics.total_variation(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@needs_torchmetrics
@pytest.mark.parametrize("side", [3, 4, 8, 10, 11, 32])
def test_ssim_is_one_for_the_target_itself_and_less_for_noise(side: int) -> None:
    target = images(1, shape=(3, side, side))[0]
    assert metrics.ssim_to_target(target.expand(4, -1, -1, -1), target) == pytest.approx(1, abs=1e-5)
    assert metrics.ssim_to_target(images(4, shape=(3, side, side), seed=1), target) < 0.9


@needs_torchmetrics
def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b, c1 = 0.2, 0.7, 0.01**2
    value = metrics.ssim_to_target(torch.full((2, 1, 16, 16), a), torch.full((1, 16, 16), b))
    assert value == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-3)


# --- diversity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17])
def test_pairwise_mse_is_the_mean_over_pairs(n: int) -> None:
    x = images(n)
    pairs = [(x[i] - x[j]).square().mean().item() for i in range(n) for j in range(n) if i != j]
    assert metrics.pairwise_mse(x) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_diversity_ratio_falls_with_the_square_of_the_spread() -> None:
    x = images(20)
    assert metrics.diversity_ratio(0.1 * x, x) == pytest.approx(0.01, rel=1e-4)
    same = x[:1].expand(20, -1, -1, -1)
    assert metrics.diversity_ratio(same, x) == 0
    assert metrics.diversity_ratio(x, same) == math.inf
    assert math.isnan(metrics.diversity_ratio(same, same))


def test_paired_drift() -> None:
    x = images(4)
    assert metrics.paired_drift(x, x + 0.5) == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(ElijahError, match="shape"):
        metrics.paired_drift(x, x[:1])


def test_total_variation_of_stripes() -> None:
    stripes = torch.zeros(5, 3, 6, 8)
    stripes[..., ::2] = 1  # 7 steps of 1 in each of 6 rows and 3 channels
    assert metrics.total_variation(stripes) == 7 * 6 * 3


@needs_torchmetrics
def test_total_variation_is_torchmetrics_mean() -> None:
    theirs = importlib.import_module("torchmetrics.functional.image").total_variation
    assert metrics.total_variation(images(5)) == pytest.approx(theirs(images(5), reduction="mean").item(), rel=1e-5)


def naive_uniformity(x: Tensor) -> float:
    rows = []
    for a in x:
        row = sorted((a - b).square().mean().item() for b in x)
        rows.append(np.mean(row[4:-4]))
    return float(np.mean(sorted(rows)[4:-4]))


@pytest.mark.parametrize("n", [9, 16])
def test_uniformity_against_plain_loops(n: int) -> None:
    x = images(n) * torch.linspace(0, 1, n)[:, None, None, None]
    assert metrics.uniformity(x) == pytest.approx(naive_uniformity(x), rel=1e-5)


def test_uniformity_takes_a_distance_and_needs_nine_images() -> None:
    assert metrics.uniformity(images(16), lambda x, y: torch.ones(len(x))) == 1
    with pytest.raises(ElijahError, match="at least 9"):
        metrics.uniformity(images(8))


# --- intervals and ranking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_against_newcombe(k: int, n: int, expected: tuple[float, float]) -> None:
    assert metrics.wilson(k, n) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_no_rate(k: int, n: int) -> None:
    with pytest.raises(ElijahError, match="no rate"):
        metrics.wilson(k, n)


def test_auc_counts_ordered_pairs_and_ties_as_half() -> None:
    assert metrics.auc([1, 2, 2, 3], [False, False, True, True]) == pytest.approx(3.5 / 4)
    with pytest.raises(ElijahError, match="both"):
        metrics.auc([1, 2], [True, True])


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    x = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_interval(np.mean, x)
    half = 1.96 * x.std(ddof=1) / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.012)
    assert metrics.bootstrap_interval(np.mean, x, seed=0) == (low, high)


def test_bootstrap_interval_of_an_auc_resamples_each_class() -> None:
    clean, bad = [0.1, 0.2, 0.3, 0.6], [0.5, 0.7, 0.8, 0.9]

    def statistic(a: np.ndarray, b: np.ndarray) -> float:
        return metrics.auc(np.concatenate([a, b]), [False] * len(a) + [True] * len(b))

    low, high = metrics.bootstrap_interval(statistic, clean, bad, n_boot=300)
    assert low < 15 / 16 <= high == 1
    with pytest.raises(ElijahError, match="two values"):
        metrics.bootstrap_interval(statistic, clean, [1.0])


# --- Frechet distance ---------------------------------------------------------------------------------------------


def test_fid_of_diagonal_gaussians() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for standard deviations s1 and s2."""
    m1, m2 = gaussian(2, 6, 0)
    s1, s2 = gaussian(2, 6, 1).abs()
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert metrics.fid(m1, s1.square().diag(), m2, s2.square().diag()) == pytest.approx(expected.item(), rel=1e-9)


def test_fid_does_not_change_under_rotation_and_is_symmetric() -> None:
    q, _ = torch.linalg.qr(gaussian(6, 6, 2))
    (m1, c1), (m2, c2) = metrics.moments(gaussian(50, 6, 3)), metrics.moments(2 * gaussian(50, 6, 4) + 1)
    plain = metrics.fid(m1, c1, m2, c2)
    assert metrics.fid(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T) == pytest.approx(plain, rel=1e-9)
    assert metrics.fid(m2, c2, m1, c1) == pytest.approx(plain, rel=1e-9)
    assert metrics.fid(m1, c1, m1, c1) == pytest.approx(0, abs=1e-9)


def test_moments_are_numpys() -> None:
    x = gaussian(5000, 4, 5) + 100
    mu, cov = metrics.moments(x)
    np.testing.assert_allclose(mu, x.mean(0))
    np.testing.assert_allclose(cov, np.cov(x.numpy().T), rtol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(10, 15), (15, 10), (10, 80), (80, 10), (60, 80)])
def test_fid_from_features_agrees_with_the_moments_below_and_above_d(n: int, m: int) -> None:
    f1, f2 = gaussian(n, 40, 6), 1.5 * gaussian(m, 40, 7) + 0.3
    expected = metrics.fid(*metrics.moments(f1), *metrics.moments(f2))
    assert metrics.fid_from_features(f1, f2) == pytest.approx(expected, rel=1e-5)


def test_the_cross_term_is_a_nuclear_norm() -> None:
    f1, f2 = gaussian(10, 40, 8), gaussian(15, 40, 9)
    x1, x2 = f1 - f1.mean(0), f2 - f2.mean(0)
    cross = torch.linalg.svdvals(x1 @ x2.T).sum() / math.sqrt(9 * 14)
    traces = x1.square().sum() / 9 + x2.square().sum() / 14
    expected = (f1.mean(0) - f2.mean(0)).square().sum() + traces - 2 * cross
    assert metrics.fid_from_features(f1, f2) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n", [12, 60])
def test_a_weighted_row_is_a_repeated_row(n: int) -> None:
    f1, f2 = gaussian(n, 20, 10), gaussian(70, 20, 11)
    rows = torch.randint(n, (n,), generator=torch.Generator().manual_seed(12))
    counts = rows.bincount(minlength=n).double()
    expected = metrics.fid(*metrics.moments(f1[rows]), *metrics.moments(f2))
    assert metrics._fid_by_weights(f1, f2)(counts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "widest"), [(30, 2.2), (100, 1.5)])
def test_fid_bootstrap_is_no_narrower_than_fresh_samples_spread(n: int, widest: float) -> None:
    d = 50
    scale = 1 / torch.arange(1, d + 1)
    f2 = gaussian(300, d, 13) * scale
    fresh = torch.tensor([metrics.fid_from_features(1.3 * gaussian(n, d, 100 + k) * scale, f2) for k in range(60)])
    widths = []
    for k in range(4):
        f1 = 1.3 * gaussian(n, d, 500 + k) * scale
        low, high = metrics.fid_bootstrap(f1, f2, n_boot=100, seed=1)
        assert low < metrics.fid_from_features(f1, f2) < high
        widths.append(high - low)
    assert 0.7 < np.mean(widths) / (3.92 * fresh.std().item()) < widest
    assert metrics.fid_bootstrap(f1, f2, n_boot=100, seed=1) == (low, high)


def test_fid_change_is_the_ratio_and_its_interval_leaves_out_what_both_samples_share() -> None:
    scale = 1 / torch.arange(1, 51)
    real, before = gaussian(300, 50, 13) * scale, 1.3 * gaussian(100, 50, 14) * scale
    after = before + 0.1 * gaussian(100, 50, 15) * scale + 0.05
    ratio, low, high = metrics.fid_change(before, after, real, n_boot=60)
    alone = metrics.fid_from_features(before, real)
    assert ratio == pytest.approx(metrics.fid_from_features(after, real) / alone, rel=1e-6)
    assert 1 < low < ratio < high
    own = metrics.fid_bootstrap(after, real, n_boot=60)
    assert high - low < 0.5 * (own[1] - own[0]) / alone
    assert metrics.fid_change(before, before, real, n_boot=5) == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    with pytest.raises(ElijahError, match="as many of both"):
        metrics.fid_change(before[:50], after, real)


def test_features_that_make_no_fid_are_refused() -> None:
    with pytest.raises(ElijahError, match="N >= 2"):
        metrics.fid_from_features(gaussian(1, 4, 0), gaussian(9, 4, 0))
    with pytest.raises(ElijahError, match="one D"):
        metrics.fid_from_features(gaussian(5, 4, 0), gaussian(9, 5, 0))


def test_ssim_without_torchmetrics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ElijahError, match=r"pip install 'elijah-scan\[bench\]'"):
        metrics.ssim_to_target(images(2), images(1)[0])


def energy(one: Tensor, other: Tensor) -> float:
    """The energy distance as it is written, between images."""
    one, other = one.flatten(1).double(), other.flatten(1).double()
    across, a, b = torch.cdist(one, other).mean(), torch.cdist(one, one).mean(), torch.cdist(other, other).mean()
    return float(2 * across - a - b)


@pytest.mark.parametrize(("n", "m", "shift"), [(5, 5, 0.0), (6, 3, 0.0), (4, 7, 0.3), (8, 8, 2.0)])
def test_two_sample_p_counts_permutations_that_are_as_far_apart(n: int, m: int, shift: float) -> None:
    g = torch.Generator().manual_seed(n)
    one, other = torch.randn(n, 1, 2, 2, generator=g), torch.randn(m, 1, 2, 2, generator=g) + shift
    both, g = torch.cat([one, other]), torch.Generator().manual_seed(1)
    orders = [torch.randperm(n + m, generator=g) for _ in range(50)]
    larger = sum(energy(both[o[:n]], both[o[n:]]) >= energy(one, other) - 1e-12 for o in orders)
    p = metrics.two_sample_p(one, other, torch.Generator().manual_seed(1), permutations=50)
    assert p == pytest.approx((1 + larger) / 51)
    assert shift < 1 or p == pytest.approx(1 / 51)
