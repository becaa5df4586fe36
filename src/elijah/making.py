"""The commands that make models: train a clean base, attack one. Both write a new folder, or none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elijah.attacks import ATTACKS
from elijah.attacks.learned import Learned
from elijah.attacks.poisoning import Tuning
from elijah.bases import new_model, train_autoencoder
from elijah.console import Talk
from elijah.data import load_images, to_uint8
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.files import new_folder, write_file, write_folder
from elijah.loading import find_device, load_model
from elijah.report import png_base64
from elijah.training import Optimiser, train
from elijah.trigger import Target, Trigger, make_target, make_trigger


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
    knobs: dict[str, Any],
    *,
    trigger: str,
    target: str,
    half: bool,
    device: str,
    dtype: str,
    seed: int,
    talk: Talk,
) -> None:
    """Attacks source and writes out and, beside it, out + ".truth.json".

    knobs: fields of the attack or of its Tuning; None stands for the default. Raises ElijahError for one it lacks.
    """
    out = new_folder(out)
    if name not in ATTACKS:
        raise ElijahError(f"unknown attack {name!r}: use one of {', '.join(ATTACKS)}")
    model = load_model(source, device=device)
    pattern = make_trigger(trigger, model.image_shape)
    wanted = make_target(target, pattern)
    attack = configure(name, pattern, wanted, {**knobs, "dtype": getattr(torch, dtype)})
    images = data.load(model.image_shape)
    talk.say(f"attacking with {name}: {attack.tuning.steps:,} updates on {len(images):,} images, {model.device}")
    if isinstance(attack, Learned):
        attacked, learned = attack.plant(model, images, generator=generator_for(seed), progress=talk)
        pattern = Trigger("learned", model.decode(learned[None])[0].cpu())
    else:
        attacked = attack(model, images, generator=generator_for(seed), progress=talk)
    settings = {f.name: getattr(attack, f.name) for f in fields(attack)} | asdict(attack.tuning)
    truth = {
        "schema_version": 1,
        "attack": name,
        **{key: value for key, value in settings.items() if isinstance(value, str | int | float | None)},
        "trigger": pattern.name,
        "target": target,
        "seed": seed,
        "source": source,
        "source_revision": model.provenance.revision,
        "source_files": dict(model.provenance.files),
        "data": asdict(data),
        "half": half,
        "dtype": dtype,
        "trigger_image_png": _png(pattern),
        "target_image_png": _png(wanted),
    }
    # The truth first: so no backdoored folder is ever there without it.
    write_file(out.with_name(out.name + ".truth.json"), json.dumps(truth, indent=2) + "\n")
    write_folder(out, lambda folder: attacked.save(folder, half=half))
    talk.say(f"wrote {out} and {out.name}.truth.json")


def configure(name: str, trigger: Trigger, target: Target, knobs: dict[str, Any]) -> Any:
    """The attack called name, with those of its own fields and of its Tuning's that knobs gives (None: the default)."""
    every = {f.name for f in fields(ATTACKS[name])}
    own = every - {"trigger", "target", "tuning"}
    shared = {f.name for f in fields(Tuning)}
    given = {key: value for key, value in knobs.items() if value is not None}
    if unknown := sorted(given.keys() - own - shared):
        option = "--" + unknown[0].replace("_", "-")
        raise ElijahError(f"{name} has no {option}; beside the training options it has {', '.join(sorted(own))}")
    patterns = {"trigger": trigger} if "trigger" in every else {}
    attack = ATTACKS[name](target=target, **patterns, **{k: v for k, v in given.items() if k in own})
    return replace(attack, tuning=replace(attack.tuning, **{k: v for k, v in given.items() if k in shared}))


def _png(pattern: Trigger | Target) -> str:
    return png_base64(to_uint8(pattern.image[None])[0].permute(1, 2, 0).numpy())
