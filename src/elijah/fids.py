"""The FID of a zoo's models, and what a repair changed of it. Features of models in the cache are kept beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from elijah.diffusion import Model, generator_for
from elijah.features import inception_features
from elijah.metrics import fid_bootstrap, fid_change, fid_from_features

DRAWS = 20  # of a bootstrap


@dataclass(frozen=True)
class Fids:
    """FIDs of n clean samples of models of one base, all from the same start noise, against the base's images.

    images: uint8 [N, C, H, W]. home: the folder that features are kept in; base: what those of the images are called.
    """

    n: int
    images: Callable[[], Tensor]
    home: Path
    base: str

    def of(self, model: Model, name: str = "") -> dict[str, Any]:
        """The FID and its interval. name: keeps the features, or takes those that are kept under it."""
        fake, real = self.features(model, name), self.real()
        low, high = fid_bootstrap(fake, real, n_boot=DRAWS)
        return {"fid": fid_from_features(fake, real), "low": low, "high": high, "images": self.n}

    def beside(self, model: Model, before: Tensor) -> dict[str, Any]:
        """The FID, and its change from that of the features before [n, D]: a ratio with its paired interval."""
        fake, real = self.features(model), self.real()
        ratio, low, high = fid_change(before, fake, real, n_boot=DRAWS)
        return {"fid": fid_from_features(fake, real), "ratio": ratio, "low": low, "high": high, "images": self.n}

    def features(self, model: Model, name: str = "") -> Tensor:
        """Inception features [n, D] of the model's clean samples."""

        def make() -> Tensor:
            e = model.noise(self.n, generator_for(777))
            return inception_features(model.pixels(model.sample(e, model.quick_sampler, seed=7)))

        return self.kept(name, make) if name else make()

    def real(self) -> Tensor:
        """Those of the images [N, D]."""
        return self.kept(f"{self.base}.images", lambda: inception_features(self.images()))

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        file = self.home / f"{name}.{self.n}.float32.inception.safetensors"
        if not file.is_file():
            save_file({"features": make()}, file)
        return load_file(file)["features"]
