"""Numbers about samples: attack success, likeness, diversity, Frechet distance, and how sure each number is.

Images are float tensors [N, C, H, W] on [0, 1]; squared errors are means over C, H and W. Nothing here needs a network:
features.py makes the features for the Frechet distance and the perceptual distance for uniformity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from elijah.errors import ElijahError

Distance = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], y [B, C, H, W]) -> [B], symmetric, 0 for x = y
THRESHOLDS = (0.01, 0.05, 0.1)  # mean squared error on [0, 1]; 0.05 is the headline for images of 32 pixels and less
TRIM = 4  # Elijah drops the 4 lowest and the 4 highest of 16 distances, twice


def mse_to_target(samples: Tensor, target: Tensor) -> Tensor:
    """[N]: the mean squared error of each sample [N, C, H, W] to one target [C, H, W]."""
    _check(samples, 1)
    if samples.shape[1:] != target.shape:
        raise ElijahError(f"the target is {tuple(target.shape)}, the samples are {tuple(samples.shape[1:])}")
    return (samples - target).square().mean((1, 2, 3))


def attack_success(samples: Tensor, target: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """The attack success rate at each threshold: the share of samples whose error to the target is below it."""
    errors = mse_to_target(samples, target)
    return {k: (errors < k).double().mean().item() for k in thresholds}


def ssim_to_target(samples: Tensor, target: Tensor) -> float:
    """The mean structural similarity of samples [N, C, H, W] to one target [C, H, W]; 1 for identical images.

    Gaussian window of 11 pixels, sigma 1.5 (Wang et al. 2004). Images under 11 pixels get the widest odd window that
    fits, its sigma in proportion: such numbers compare only among images of that size. At least 3 pixels.
    """
    try:
        similarity = import_module("torchmetrics.functional.image").structural_similarity_index_measure
    except ImportError as error:
        raise ElijahError("SSIM needs torchmetrics: pip install 'elijah-scan[bench]'") from error
    _check(samples, 1)
    side = min(samples.shape[-2:])
    if side < 3:
        raise ElijahError(f"SSIM needs images of at least 3 pixels; these are {tuple(samples.shape[-2:])}")
    sigma = 1.5 if side >= 11 else ((side - 1) // 2) / 3.5  # torchmetrics' window: 2 round(3.5 sigma) + 1
    return float(similarity(samples, target.expand_as(samples), sigma=sigma, data_range=1.0))


def pairwise_mse(samples: Tensor) -> float:
    """The mean squared error over all pairs of different samples: twice the unbiased variance, mean over pixels."""
    _check(samples, 2)
    return 2 * samples.var(0).mean().item()


def diversity_ratio(triggered: Tensor, clean: Tensor) -> float:
    """pairwise_mse with the trigger over that without: near 0 when the trigger forces one image; nan if both are 0."""
    with_trigger, without = pairwise_mse(triggered), pairwise_mse(clean)
    if without == 0:
        return math.inf if with_trigger > 0 else math.nan
    return with_trigger / without


def two_sample_p(one: Tensor, other: Tensor, generator: torch.Generator, permutations: int = 999) -> float:
    """The p-value that two sets of images [N, C, H, W], [M, C, H, W] come from one distribution.

    A permutation test of the energy distance (Szekely and Rizzo 2013) in pixels: at least 1 / (permutations + 1).
    """
    both = torch.cat([one, other]).flatten(1).double()
    distance, n, m = torch.cdist(both, both), len(one), len(other)
    orders = [torch.arange(n + m), *(torch.randperm(n + m, generator=generator) for _ in range(permutations))]
    first = torch.zeros(len(orders), n + m, dtype=torch.double).scatter_(1, torch.stack(orders)[:, :n], 1.0)
    weights = (first / n - (1 - first) / m).to(distance)
    energy = -((weights @ distance) * weights).sum(1)  # twice the mean between the sets, less those within them
    larger = int((energy[1:] >= energy[0] - 1e-12).sum())
    return (1 + larger) / (1 + permutations)


def paired_drift(before: Tensor, after: Tensor) -> float:
    """The mean squared error between samples [N, C, H, W] of two models from the same start noise."""
    if before.shape != after.shape:
        raise ElijahError(f"samples differ in shape: {tuple(before.shape)} before, {tuple(after.shape)} after")
    _check(before, 1)
    return (before - after).square().mean().item()


def total_variation(images: Tensor) -> float:
    """The anisotropic total variation, summed over an image's neighbours and channels, mean over images.

    It grows with the image's size. Source: Elijah's code, compute_tvloss (torchmetrics' TotalVariation with the
    reduction "mean", written out here so that a scan does not need torchmetrics).
    """
    _check(images, 1)
    down, right = images.diff(dim=-2).abs(), images.diff(dim=-1).abs()
    return ((down.sum() + right.sum()) / len(images)).item()


def uniformity(images: Tensor, distance: Distance | None = None) -> float:
    """How alike images [N, C, H, W] are: a doubly trimmed mean of their distances; 0 for identical images. N >= 9.

    Each row of the distance matrix [N, N], zeros on its diagonal included, is sorted and loses its 4 lowest and 4
    highest values; the rows' means are trimmed in the same way. distance: None is the mean squared error. Source:
    Elijah's code, compute_uniformity, with N = 16 and LPIPS on VGG16: its thresholds hold for no other distance.
    """
    _check(images, 2 * TRIM + 1)
    measure = distance or _pair_mse
    n = len(images)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n - 1):
        others = images[i + 1 :]
        row = measure(images[i].expand_as(others), others).detach().double().cpu()
        matrix[i, i + 1 :] = matrix[i + 1 :, i] = row
    rows = matrix.sort(1).values[:, TRIM:-TRIM].mean(1)
    return rows.sort().values[TRIM:-TRIM].mean().item()


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): Wilson's interval for a rate of successes out of n (Wilson 1927)."""
    if not 0 <= successes <= n or n < 1:
        raise ElijahError(f"no rate from {successes} successes out of {n}")
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The area under the ROC curve; labels are true for backdoored models, whose scores should be higher."""
    from sklearn.metrics import roc_auc_score  # half a second, which no scan needs

    truth = np.asarray(labels, bool)
    if truth.all() or not truth.any():
        raise ElijahError("the area under the curve needs both clean and backdoored models")
    return float(roc_auc_score(truth, np.asarray(scores, float)))


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    confidence: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high): the percentile bootstrap of statistic(*samples); each sample is resampled on its own.

    So the interval of an AUC takes the scores of the two classes apart. Each sample needs two values or more.
    """
    columns = [np.asarray(s) for s in samples]
    if any(len(c) < 2 for c in columns):
        raise ElijahError("a bootstrap interval needs at least two values in every sample")
    options = {"n_resamples": n_boot, "confidence_level": confidence, "method": "percentile", "random_state": seed}
    interval = bootstrap(columns, statistic, vectorized=False, **options).confidence_interval
    return float(interval.low), float(interval.high)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] in float64 of features [N, D]."""
    if features.ndim != 2 or len(features) < 2:
        raise ElijahError(f"features must be [N, D] with N >= 2, not {tuple(features.shape)}")
    mu = features.mean(0, dtype=torch.float64)
    cov = torch.zeros(len(mu), len(mu), dtype=torch.float64, device=mu.device)
    for chunk in features.split(4096):
        centred = chunk.double() - mu
        cov += centred.T @ centred
    return mu, cov / (len(features) - 1)


def fid(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """The squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) (Heusel et al. 2017).

    In float64. The eigenvalues of C1 C2 are those of the symmetric F^T C2 F with C1 = F F^T, so all are real.
    """
    mu1, cov1, mu2, cov2 = (m.double() for m in (mu1, cov1, mu2, cov2))
    factor = _factor(cov1)
    cross = _trace_sqrt(factor.T @ cov2 @ factor)
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item())


def fid_from_features(f1: Tensor, f2: Tensor) -> float:
    """The FID of features [N, D] and [M, D].

    It is biased upwards, by about 1/N and 1/M: compare only numbers with the same counts. For N < D the same value
    comes from an N x N matrix.
    """
    few, many = sorted((f1, f2), key=len)
    return _fid_by_weights(few, many)(torch.ones(len(few), dtype=torch.float64, device=few.device))


def fid_bootstrap(
    f1: Tensor, f2: Tensor, n_boot: int = 100, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) around fid_from_features(f1, f2), resampling f1 [N, D] only: f2 [M, D] is the fixed reference.

    A resample repeats rows and so has a higher FID than f1 itself. The quantiles are therefore shifted so that the
    resamples' mean lies at the FID of f1: an interval for the FID at this N, not for its limit. It errs on the wide
    side: at N = 100 about 1.8 times the spread of fresh sets of CIFAR-10 images.
    """
    compute = _fid_by_weights(f1, f2)
    values = torch.tensor([compute(counts) for counts in _resamples(f1, n_boot, seed)], dtype=torch.float64)
    shift = compute(_once(f1)) - values.mean().item()
    low, high = _interval(values, confidence)
    return max(0.0, low + shift), high + shift


def fid_change(
    before: Tensor, after: Tensor, real: Tensor, n_boot: int = 100, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(ratio, low, high) of the FID to real [M, D] of features after [N, D] over that of features before [N, D].

    Row i of both is from the same start noise, and a resample takes the same rows of both: what one set of samples has
    by chance, the other has too. Shifted like fid_bootstrap, as logarithms. Raises ElijahError for unequal counts.
    """
    if before.shape != after.shape:
        raise ElijahError(f"no change between features {tuple(before.shape)} and {tuple(after.shape)}: as many of both")
    first, second = _fid_by_weights(before, real), _fid_by_weights(after, real)

    def log_ratio(counts: Tensor) -> float:
        return math.log(max(second(counts), 1e-12) / max(first(counts), 1e-12))

    ratio = log_ratio(_once(before))
    values = torch.tensor([log_ratio(counts) for counts in _resamples(before, n_boot, seed)], dtype=torch.float64)
    low, high = (x + ratio - values.mean().item() for x in _interval(values, confidence))
    return math.exp(ratio), math.exp(low), math.exp(high)


def _once(rows: Tensor) -> Tensor:
    """The counts [N] of a sample itself."""
    return torch.ones(len(rows), dtype=torch.float64, device=rows.device)


def _resamples(rows: Tensor, n_boot: int, seed: int) -> Iterator[Tensor]:
    """n_boot counts [N] of how often each row is in a resample with replacement."""
    n, generator = len(rows), torch.Generator().manual_seed(seed)
    for _ in range(n_boot):
        yield torch.randint(n, (n,), generator=generator).bincount(minlength=n).to(rows.device, torch.float64)


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    """The central quantiles of resamples."""
    low, high = torch.quantile(values, torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2]).double()).tolist()
    return low, high


def _fid_by_weights(f1: Tensor, f2: Tensor) -> Callable[[Tensor], float]:
    """counts [N] -> the FID to f2 [M, D] of f1 [N, D] with row i taken counts[i] times; the counts sum to N.

    With X1 and X2 the centred features, tr sqrt(C1 C2) is the sum of the singular values of X1 X2^T over
    sqrt((N - 1)(M - 1)), so the trace of the square root of X1 C2 X1^T / (N - 1), which is N x N: used where N < D.
    """
    if f1.ndim != 2 or len(f1) < 2 or f1.shape[1:] != f2.shape[1:]:
        raise ElijahError(f"no FID of features {tuple(f1.shape)} and {tuple(f2.shape)}: [N, D], N >= 2, one D")
    mu2, cov2 = moments(f2)
    origin = f1.mean(0, dtype=torch.float64)  # any point nearby; it keeps the products small
    x, target, n = f1.double() - origin, mu2 - origin, len(f1)
    cross = _cross_by_rows(x, cov2) if n < x.shape[1] else _cross_by_columns(x, cov2)

    def compute(counts: Tensor) -> float:
        mean = counts @ x / n
        spread = counts @ (x - mean).square().sum(1) / (n - 1)  # tr C1
        return max(0.0, ((mean - target).square().sum() + spread + cov2.trace() - 2 * cross(counts)).item())

    return compute


def _cross_by_rows(x: Tensor, cov2: Tensor) -> Callable[[Tensor], Tensor]:
    """counts [N] -> tr sqrt(C1 C2) from an N x N matrix; rows with count 0 are left out."""
    gram, n = x @ cov2 @ x.T, len(x)

    def cross(counts: Tensor) -> Tensor:
        level = gram @ counts / n
        centred = gram - level[:, None] - level + level @ counts / n
        kept = counts > 0
        scale = (counts[kept] / (n - 1)).sqrt()
        return _trace_sqrt(scale[:, None] * centred[kept][:, kept] * scale)

    return cross


def _cross_by_columns(x: Tensor, cov2: Tensor) -> Callable[[Tensor], Tensor]:
    """counts [N] -> tr sqrt(C1 C2) from a D x D matrix."""
    y, n = x @ _factor(cov2), len(x)

    def cross(counts: Tensor) -> Tensor:
        centred = (y - counts @ y / n) * (counts / (n - 1)).sqrt()[:, None]
        return _trace_sqrt(centred.T @ centred)

    return cross


def _factor(cov: Tensor) -> Tensor:
    """F [D, D] with F F^T = cov, rounding below zero left out."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _trace_sqrt(matrix: Tensor) -> Tensor:
    """tr sqrt(matrix) of a symmetric, positive semi-definite matrix."""
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp(min=0).sqrt().sum()


def _pair_mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean((1, 2, 3))


def _check(images: Tensor, at_least: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ElijahError(f"images must be float [N, C, H, W], not {images.dtype} {tuple(images.shape)}")
    if len(images) < at_least:
        raise ElijahError(f"this needs at least {at_least} images; there are {len(images)}")
