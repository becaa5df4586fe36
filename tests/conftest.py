"""What the tests share: one thread, a tiny random pipeline, and the hashes of a folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from elijah.bases import new_model
from elijah.diffusion import Model

torch.set_num_threads(1)  # kernels then add in one order, so equal seeds give equal bits


def random_model() -> Model:
    """An untrained U-Net for 8 x 8 grey images: 20 thousand parameters, milliseconds a forward."""
    return new_model((1, 8, 8), seed=0, channels=(8, 8))


def weights(model: Model) -> dict[str, torch.Tensor]:
    """A copy of the network's weights."""
    return {name: value.detach().clone() for name, value in model.network.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 and modification time of everything below folder, and of it."""
    paths = [folder, *folder.rglob("*")]
    contents = {p: p.read_bytes() if p.is_file() else b"" for p in paths}
    return {str(p): f"{hashlib.sha256(c).hexdigest()} {p.lstat().st_mtime_ns}" for p, c in contents.items()}


@pytest.fixture
def tiny() -> Model:
    return random_model()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """random_model() as a pipeline folder; never written to by a test."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_model().save(folder)
    return folder


@pytest.fixture
def stock() -> Path:
    """The folder of stock data; skips where ELIJAH_DATA names none."""
    root = os.environ.get("ELIJAH_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("needs the stock pictures: set ELIJAH_DATA to their folder")
    return Path(root)
