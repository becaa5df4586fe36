"""FIDs of a zoo: what is kept, when it is made anew, and what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from elijah import fids
from elijah.bases import new_model
from elijah.diffusion import Model
from elijah.fids import Fids
from elijah.metrics import fid_from_features
from elijah.zoo import cached


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were sent through Inception, call by call; its place is taken by three pixels of each image."""
    calls: list[int] = []

    def features(images: Tensor) -> Tensor:
        calls.append(len(images))
        return (images / (1 if images.is_floating_point() else 255)).flatten(1)[:, :3].contiguous()

    monkeypatch.setattr(fids, "inception_features", features)
    monkeypatch.setattr(Model, "quick_sampler", "ddim-2")
    return calls


def test_features_of_named_models_and_of_the_images_are_made_once(asked: list[int], tmp_path: Path) -> None:
    images, model = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), new_model((1, 8, 8), seed=0, channels=(8, 8))
    judge = Fids(6, lambda: images, tmp_path, "base")
    first = judge.of(model, "one")
    assert asked == [6, 12]
    assert judge.of(model, "one") == first
    assert asked == [6, 12]
    assert first["images"] == 6
    assert first["fid"] == pytest.approx(fid_from_features(judge.features(model), judge.real()))
    assert asked == [6, 12, 6]


def test_the_change_is_from_the_features_before(asked: list[int], tmp_path: Path) -> None:
    images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)
    model, other = (new_model((1, 8, 8), seed=0, channels=(8, 8)) for _ in range(2))
    for parameter in other.network.parameters():
        parameter.data.add_(0.05)
    judge = Fids(6, lambda: images, tmp_path, "base")
    before = judge.features(model, "one")
    same, changed = judge.beside(model, before), judge.beside(other, before)
    assert same["ratio"] == pytest.approx(1.0)
    assert changed["ratio"] == pytest.approx(changed["fid"] / same["fid"], rel=1e-6)
    assert changed["fid"] != pytest.approx(same["fid"], rel=1e-3)


def test_features_go_with_the_weights_that_they_are_of(tmp_path: Path) -> None:
    for name in ("base", "base.images", "base2"):
        (tmp_path / f"{name}.inception.safetensors").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "base.sha256").write_text("new")
    assert cached(tmp_path, "base", "new")
    assert len(list(tmp_path.glob("*.inception.safetensors"))) == 3
    assert not cached(tmp_path, "base", "other")
    assert [file.name for file in tmp_path.glob("*.inception.safetensors")] == ["base2.inception.safetensors"]
