"""The optimisation loop that training, attacks and repairs share, and the training of a clean base.

Update k of a run draws all its randomness from (seed, k), so a run that was killed goes on as if it had not been. Of
several processes (processes.py) each draws its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from elijah import processes
from elijah.bases import new_model
from elijah.data import batch
from elijah.diffusion import Model, Progress, generator_for, no_progress, thaw
from elijah.errors import ElijahError

Loss = Callable[[Model, torch.Generator], Tensor]


@dataclass(frozen=True)
class Optimiser:
    """How an optimisation runs. AdamW, cosine learning rate with a linear warm-up, gradient norm clipped."""

    steps: int
    lr: float = 2e-4
    warmup: int = 0
    clip: float = 1.0
    ema_decay: float | None = None  # weights end as their exponential moving average
    checkpoint_every: int = 200


def optimise(
    model: Model,
    loss: Loss,
    settings: Optimiser,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = no_progress,
    what: str = "training",
    each: Callable[[int, Model], None] | None = None,
) -> Model:
    """Minimises loss(model, generator) over the network's weights, in place.

    seed: update k draws from (seed, k). checkpoint: a file written now and then and read if it is there, so that a
    killed run resumes; deleted by the caller. each(k, model): called after update k, from 1.
    Raises ElijahError when the loss stops being finite.
    """
    network = thaw(model.network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=1e-6)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup, settings.steps)
    ema = EMAModel(network.parameters(), decay=settings.ema_decay) if settings.ema_decay else None
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    first = model.updates = _resume(checkpoint, parts, settings) if checkpoint else 0
    for k in range(first, settings.steps):
        value = loss(model, generator_for(seed, k + settings.steps * processes.rank()))
        if not torch.isfinite(value):
            raise ElijahError(f"{what}: the loss is not finite after {k} updates; try a smaller --lr")
        optimizer.zero_grad()
        torch.autograd.backward(value)
        processes.average(network.parameters())
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        model.updates = k + 1
        if ema:
            ema.step(network.parameters())
        progress(f"{what}, loss {value.item():.4f}", k + 1, settings.steps)
        if each:
            each(k + 1, model)
        if checkpoint and (k + 1) % settings.checkpoint_every == 0 and processes.rank() == 0:
            _write_checkpoint(checkpoint, parts, k + 1, settings)
    if ema:
        ema.copy_to(network.parameters())
    network.eval()
    return model


def _write_checkpoint(path: Path, parts: dict[str, Any], done: int, settings: Optimiser) -> None:
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    part_file = path.with_name(path.name + ".part")
    try:
        torch.save({"done": done, "steps": settings.steps, "states": states}, part_file)
        part_file.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on how far it got
        part_file.unlink(missing_ok=True)
        raise ElijahError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error


def _resume(path: Path, parts: dict[str, Any], settings: Optimiser) -> int:
    if not path.is_file():
        return 0
    try:
        saved = torch.load(path, weights_only=True)
        if saved["steps"] == settings.steps:
            for name, state in saved["states"].items():
                parts[name].load_state_dict(state)
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, EOFError, UnpicklingError) as error:
        raise ElijahError(f"{path}: not a checkpoint of this training ({type(error).__name__}); delete it") from error
    if saved["steps"] != settings.steps:
        raise ElijahError(
            f"{path}: made for {saved['steps']} steps, not {settings.steps}; delete it or use that number"
        )
    return int(saved["done"])


def training_noise(shape: torch.Size, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise of shape [B, C, H, W]; with offset, a quarter of the rows are shifted channel by channel.

    The shift is offset * N(0, 1) ("offset noise", Guttenberg 2023). A small network sees the mean of e vary by
    1 / sqrt(H W) only and learns last how to answer to it; the shifted rows teach that in a few hundred updates.
    """
    e = torch.randn(shape, generator=generator)
    if offset:
        shifted = torch.rand((shape[0], 1, 1, 1), generator=generator) < 0.25
        e = e + offset * shifted * torch.randn((*shape[:2], 1, 1), generator=generator)
    return e


def denoising_loss(model: Model, x0: Tensor, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """The DDPM training loss (Ho et al. 2020, eq. 14) on clean images x0 [B, C, H, W] in [-1, 1].

    offset: as in training_noise.
    """
    t = torch.randint(model.T, (len(x0),), generator=generator).to(model.device)
    x0 = x0.to(model.device)
    e = training_noise(x0.shape, generator, offset).to(model.device)
    out = model.output(model.diffuse(x0, e, t), t)
    return (out - model.regression_target(x0, e, t)).square().mean()


def train(
    images: Tensor,
    settings: Optimiser,
    *,
    seed: int,
    batch_size: int = 64,
    flip: bool = False,
    model: Model | None = None,
    noise_offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    checkpoint: Path | None = None,
    progress: Progress = no_progress,
) -> Model:
    """A clean base from images uint8 [N, C, H, W]; with model, that model trained further (a copy of it)."""
    c, h, w = images.shape[1:]
    trained = model.clone() if model else new_model((c, h, w), seed=seed)
    trained.dtype = dtype
    rows = trained.prepare(images)

    def loss(m: Model, generator: torch.Generator) -> Tensor:
        return denoising_loss(m, batch(rows, batch_size, generator, flip=flip), generator, noise_offset)

    return optimise(trained, loss, settings, seed=seed, checkpoint=checkpoint, progress=progress)
