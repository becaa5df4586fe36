"""Detectors, one method a file: a frozen dataclass called on a model, told nothing else (detection.Detector)."""

from typing import Any

from elijah.detectors.elijah import Elijah
from elijah.detectors.learned import Collapse
from elijah.detectors.lossfit import LossFit
from elijah.detectors.terd import Terd

DETECTORS: dict[str, Any] = {"lossfit": LossFit, "collapse": Collapse, "elijah": Elijah, "terd": Terd}
DEFAULT = "lossfit"
