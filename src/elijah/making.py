"""The commands that make models: train a clean base, attack one. Both write a new folder, or none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elijah.attacks.planting import attack_for, check_settings, plant, preset
from elijah.bases import new_model, train_autoencoder
from elijah.console import Talk
from elijah.data import load_images, to_uint8
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.files import new_folder, write_file, write_folder
from elijah.loading import find_device, load_model
from elijah.png import png_base64
from elijah.training import Optimiser, train
from elijah.trigger import Target, Trigger


@dataclass(frozen=True)
class Data:
    """Which images: source as in load_images; size and channels None: those of the model."""

    source: str
    size: int | None = None
    channels: int | None = None
    limit: int | None = None

    def load(self, image_shape: tuple[int, int, int]) -> Tensor:
        """uint8 [N, C, H, W] for a model of image_shape. Raises ElijahError when another shape was asked for."""
        channels, size, _ = image_shape
        if (self.size or size, self.channels or channels) != (size, channels):
            raise ElijahError(f"the model has {channels} channels of {size} pixels; leave --size and --channels out")
        return load_images(self.source, size=size, channels=channels, limit=self.limit)


def train_folder(
    data: Data,
    out: Path,
    settings: dict[str, Any],
    *,
    start: str | None,
    kind: str,
    autoencoder_steps: int,
    batch_size: int,
    flip: bool,
    noise_offset: float,
    prediction: str,
    resume: bool,
    half: bool,
    device: str,
    dtype: str,
    seed: int,
    talk: Talk,
) -> None:
    """Trains and writes out. settings: those of Optimiser. A killed run leaves out + ".ckpt" for resume."""
    out = new_folder(out)
    checkpoint = out.with_name(out.name + ".ckpt")
    if data.channels not in (None, 1, 3):
        raise ElijahError("--channels: 1 or 3")
    if checkpoint.exists() and not resume:
        raise ElijahError(f"{checkpoint}: left by a run that did not end; pass --resume to go on, or delete it")
    if start:
        base = load_model(start, device=device)
        images = data.load(base.image_shape)
    else:
        image_shape = (data.channels or 3, data.size or 32, data.size or 32)
        images = data.load(image_shape)
        base = fresh_model(kind, images, autoencoder_steps, prediction, find_device(device), seed, talk)
    talk.say(f"training {base.parameters:,} parameters on {len(images):,} images, {base.device}")
    try:
        trained = train(
            images,
            Optimiser(**settings),
            seed=seed,
            batch_size=batch_size,
            flip=flip,
            noise_offset=noise_offset,
            model=base,
            dtype=getattr(torch, dtype),
            checkpoint=checkpoint,
            progress=talk,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            talk.when_interrupted = f"go on from {checkpoint} with --resume"
        raise
    write_folder(out, lambda folder: trained.save(folder, half=half))
    checkpoint.unlink(missing_ok=True)
    talk.say(f"wrote {out}")


def fresh_model(
    kind: str, images: Tensor, autoencoder_steps: int, prediction: str, device: torch.device, seed: int, talk: Talk
) -> Model:
    """An untrained model for images uint8 [N, C, H, W]; a latent one with an autoencoder trained on them first."""
    if kind != "ldm":
        model = new_model((images.shape[1], *images.shape[2:]), seed=seed, prediction=prediction, kind=kind)
    else:
        if images.shape[-1] % 16:
            raise ElijahError("--kind ldm: --size must be a multiple of 16, since latents are a quarter as wide")
        talk.say(f"training an autoencoder: {autoencoder_steps:,} updates")
        autoencoder = train_autoencoder(images, steps=autoencoder_steps, seed=seed, progress=talk)
        side = images.shape[-1] // 4
        model = new_model((3, side, side), seed=seed, prediction=prediction, kind=kind, autoencoder=autoencoder)
        model.autoencoder.to(device)
    model.network.to(device)
    return model


def attack_folder(
    name: str,
    source: str,
    data: Data,
    out: Path,
    settings: dict[str, Any],
    which: str | None = None,
    *,
    half: bool,
    device: str,
    dtype: str,
    seed: int,
    talk: Talk,
) -> None:
    """Attacks source and writes out and, beside it, out + ".truth.json".

    settings: as attack_for takes them; they come before those of the preset `which`. Raises ElijahError for a setting
    that the attack lacks.
    """
    out = new_folder(out)
    settings = preset(name, which) | {key: value for key, value in settings.items() if value is not None}
    check_settings(name, settings)
    model = load_model(source, device=device)
    attack = attack_for(name, model.image_shape, {**settings, "dtype": getattr(torch, dtype)})
    images = data.load(model.image_shape)
    talk.say(f"attacking with {name}: {attack.tuning.steps:,} updates on {len(images):,} images, {model.device}")
    attacked, attack = plant(attack, model, images, generator=generator_for(seed), progress=talk)
    values = {f.name: getattr(attack, f.name) for f in fields(attack)}
    patterns = {key: value for key, value in values.items() if isinstance(value, Trigger | Target)}
    truth = {
        "schema_version": 1,
        "attack": name,
        **{k: v for k, v in (values | asdict(attack.tuning)).items() if isinstance(v, str | int | float | None)},
        **{key: pattern.name for key, pattern in patterns.items()},
        "seed": seed,
        "source": source,
        "source_revision": model.provenance.revision,
        "source_files": dict(model.provenance.files),
        "data": asdict(data),
        "half": half,
        "dtype": dtype,
        **{f"{key}_image_png": _png(pattern) for key, pattern in patterns.items()},
    }
    # The truth first: so no backdoored folder is ever there without it.
    write_file(out.with_name(out.name + ".truth.json"), json.dumps(truth, indent=2) + "\n")
    write_folder(out, lambda folder: attacked.save(folder, half=half))
    talk.say(f"wrote {out} and {out.name}.truth.json")


def _png(pattern: Trigger | Target) -> str:
    return png_base64(to_uint8(pattern.image[None])[0].permute(1, 2, 0).numpy())
