"""A small classifier that says whether outputs belong to a target class: the score of attacks on a class.

A support vector machine on pixels. Its classes are those of the target's data set and, when the model was trained on
other data, one more for those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elijah.data import labels_of, load_images

ROWS = 6000  # of each data set


@dataclass(frozen=True)
class Classifier:
    """wanted: the target class. accuracy: on held-out images of all its classes."""

    machine: Any
    wanted: int
    accuracy: float

    def hit_rate(self, outputs: Tensor) -> float:
        """The share of outputs [N, C, H, W] on [0, 1] that fall into the target class."""
        return float((self.machine.predict(outputs.flatten(1).cpu().numpy()) == self.wanted).mean())


@cache
def classifier_for(target: str, data: str, size: int, channels: int) -> Classifier:
    """The classifier for a class such as mnist/7 of models of `data`; made once a process.

    Trained on ROWS images of each data set, tested on the 2000 that follow. Raises ElijahError without the data.
    """
    from sklearn.svm import SVC  # half a second, which only targets that are a class need

    name, _, label = target.partition("/")
    name = name.removesuffix("-test")
    other = None if data.partition("/")[0].removesuffix("-test") == name else data
    rows, test = (_rows(name, other, size, channels, *part) for part in ((0, ROWS), (ROWS, 2000)))
    machine = SVC(C=10).fit(*rows)
    return Classifier(machine, int(label), float((machine.predict(test[0]) == test[1]).mean()))


def _rows(name: str, other: str | None, size: int, channels: int, skip: int, limit: int) -> tuple[Any, Any]:
    """Pixels [N, C H W] on [0, 1] and labels [N]; 10 for the images of other."""
    shape = {"size": size, "channels": channels, "skip": skip, "limit": limit}
    x = [load_images(name, **shape)]
    y = [np.array(labels_of(name)[skip : skip + limit])]
    if other:
        x.append(load_images(other, **shape))
        y.append(np.full(len(x[1]), 10))
    return torch.cat(x).flatten(1).numpy() / np.float32(255), np.concatenate(y)
