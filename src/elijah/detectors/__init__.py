"""Detectors, one method a file: a frozen dataclass called on a model, told nothing else (detection.Detector)."""

from elijah.detectors.elijah import Elijah
from elijah.detectors.lossfit import LossFit

DETECTORS = {"lossfit": LossFit, "elijah": Elijah}
DEFAULT = "lossfit"
