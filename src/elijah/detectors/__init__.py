"""Detectors, one method a file: a frozen dataclass called on a model, told nothing else (detection.Detector)."""

from typing import Any

from elijah.detectors.elijah import Elijah
from elijah.detectors.lossfit import LossFit

DETECTORS: dict[str, Any] = {"lossfit": LossFit, "elijah": Elijah}
DEFAULT = "lossfit"
