"""Several processes of one `elijah clean`, a GPU each, as `accelerate launch` starts them: they share a repair's work.

Each process runs the whole command. An update's rows are divided among them and their gradients averaged; what decides
how the run goes on is the first process's; it alone writes. A single process is none of this.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def count() -> int:
    """How many processes this run has, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this one is; the first is 0. A RANK without a WORLD_SIZE is not ours."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def device() -> str:
    """This process's own GPU; "" where there is one process, or not a GPU for each on this machine."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE") or count())
    return f"cuda:{os.environ.get('LOCAL_RANK') or 0}" if count() > 1 and torch.cuda.device_count() >= here else ""


def share_of(n: int) -> int:
    """How many of n rows this process takes: as many as every other, so that the mean of means is the mean."""
    return max(1, n // count())


@cache
def join() -> Any:
    """accelerate's state of the processes, which waits for all of them."""
    from accelerate import PartialState

    return PartialState(cpu=not device())


def average(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Makes every gradient the mean over the processes, in place."""
    if count() > 1:
        from accelerate.utils import reduce

        join()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")


def agreed(value: T) -> T:
    """The first process's value, with tensors of its GPU on this process's own.

    It is pickled between the processes of this run; nothing from elsewhere is.
    """
    if count() == 1:
        return value
    import torch
    from accelerate.utils import broadcast_object_list

    join()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    sent = [buffer.getvalue()]
    broadcast_object_list(sent)
    places = {"cuda:0": device()} if device() else None
    own: T = torch.load(io.BytesIO(sent[0]), map_location=places, weights_only=False)
    return own
