"""A zoo: its jobs, each of which builds one model, measures that its attack fires, and has it scanned and repaired.

A job writes one JSON file. Weights go as fp16 into a cache, from which they may be deleted: they are rebuilt by seed.
Only measure and judge know the true trigger and target; scans and repairs get the folder alone.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elijah.attacks.planting import attack_for, cases, draw, plant
from elijah.bases import new_model, train_autoencoder
from elijah.data import load_images
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.fids import Fids
from elijah.files import write_file, write_folder
from elijah.judging import SAMPLES, Truth, judge, target_judge
from elijah.judging_repairs import USUAL, Yardstick, judge_repairs
from elijah.loading import load_model
from elijah.manifest import Base, Entry, Manifest
from elijah.metrics import diversity_ratio, paired_drift
from elijah.runner import Job, run_jobs
from elijah.training import Optimiser, denoising_loss, train
from elijah.trigger import Trigger

HELD_OUT = 512  # images beyond those of the training, for the denoising loss
REFERENCE = 2048  # images that a FID is against
COSTLY = 32  # samples of the clean side where a sampler takes 1000 evaluations a sample


def run_job(
    manifest: Manifest, name: str, cache: Path, out: Path, detectors: list[str], repairs: list[str]
) -> dict[str, Any]:
    """Builds what is called name, judges it, and writes out/name.json. Raises what went wrong.

    What an earlier result for the same settings holds of detections and repairs is kept.
    """
    began = time.monotonic()
    for folder in (cache, out):
        folder.mkdir(parents=True, exist_ok=True)
    digests = manifest.digests()
    digest = digests[name]
    result: dict[str, Any] = {"schema_version": 2, "id": name, "settings_sha256": digest}
    bases = {base.id: base for base in manifest.base}
    if name in bases:
        build_base(bases[name], bases, cache, digests)
        result["base"] = bases[name].model_dump(exclude_defaults=True)
        if fids := fids_of(bases[name], cache):
            result["fid"] = fids.of(load_model(str(cache / name)), name)
    else:
        entry = next(e for e in manifest.entries() if e.id == name)
        base, n = bases[entry.base], manifest.samples
        earlier = read_result(out / f"{name}.json")
        measured = is_measured(earlier, digest, n)
        model, attack = build(entry, bases, cache, digests)
        result["model"] = entry.model_dump(exclude_defaults=True)
        result["samples"] = n
        if not measured:
            build_base(base, bases, cache, digests)
        result["fires"] = earlier["fires"] if measured else measure(n, entry, base, cache, model, attack)
        truth = None
        if attack is not None:
            truth = Truth(attack, samplers_of(entry, model), base, entry.seed, min(n, SAMPLES))
        result["detections"] = {d: judge(cache / name, d, truth) for d in detectors}
        result["repairs"] = {}
        if repairs:
            build_base(base, bases, cache, digests)
            yardstick = yardstick_of(n, entry, base, cache, model, attack)
            result["repairs"] = judge_repairs(cache / name, yardstick, repairs)["repairs"]
        if measured:
            for key in ("detections", "repairs"):
                result[key] = earlier[key] | result[key]
    result["seconds"] = round(time.monotonic() - began, 1)
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A job's result; empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def is_measured(result: dict[str, Any], digest: str, samples: int) -> bool:
    """Whether a model's result is for these settings and holds what its true trigger does to so many samples."""
    return result.get("settings_sha256") == digest and result.get("samples") == samples


def images_of(base: Base) -> Tensor:
    """The base's images, uint8 [N, C, H, W]."""
    return load_images(base.data, size=base.size, channels=base.channels, limit=base.limit, skip=base.skip)


def held_out(base: Base) -> Tensor:
    """HELD_OUT images, uint8, that follow those of the training; if there are none, the first of the training."""
    try:
        if base.limit is None:
            raise ElijahError("all images are used")
        where = {"skip": base.skip + base.limit, "limit": HELD_OUT}
        return load_images(base.data, size=base.size, channels=base.channels, **where)
    except ElijahError:
        return images_of(base)[:HELD_OUT]


def cached(cache: Path, name: str, digest: str) -> bool:
    """Whether the weights of name are there and made by these settings; removes those that were made by others."""
    mark = cache / f"{name}.sha256"
    if (cache / name).is_dir() and mark.is_file() and mark.read_text() == digest:
        return True
    mark.unlink(missing_ok=True)
    for file in cache.glob(f"{name}.*inception.safetensors"):
        file.unlink()
    shutil.rmtree(cache / name, ignore_errors=True)
    return False


def store(cache: Path, name: str, digest: str, model: Model) -> None:
    """Weights as fp16; the mark last, so that a folder with a mark is complete."""
    model.dtype = torch.float32
    write_folder(cache / name, lambda folder: model.save(folder, half=True))
    write_file(cache / f"{name}.sha256", digest)


def build_base(base: Base, bases: dict[str, Base], cache: Path, digests: dict[str, str]) -> None:
    """Trains a base into the cache, if it is not there."""
    if cached(cache, base.id, digests[base.id]):
        return
    images = images_of(base)
    autoencoder, shape = None, (base.channels, base.size, base.size)
    if base.kind == "ldm":
        if base.autoencoder:
            build_base(bases[base.autoencoder], bases, cache, digests)
            autoencoder = load_model(str(cache / base.autoencoder)).autoencoder
        else:
            autoencoder = train_autoencoder(images, steps=base.autoencoder_steps, seed=base.seed)
        shape = (3, base.size // 4, base.size // 4)
    how = Optimiser(base.training.steps, lr=base.training.lr, warmup=base.training.steps // 20, ema_decay=0.999)
    fresh = new_model(
        shape, seed=base.seed, channels=base.widths, kind=base.kind, autoencoder=autoencoder, sigma_max=base.sigma_max
    )
    checkpoint = cache / f"{base.id}.ckpt"
    trained = train(
        images, how, seed=base.seed, batch_size=base.training.batch_size, flip=base.flip,
        noise_offset=base.noise_offset, model=fresh, checkpoint=checkpoint,
    )  # fmt: skip
    store(cache, base.id, digests[base.id], trained)
    checkpoint.unlink(missing_ok=True)


def build(entry: Entry, bases: dict[str, Base], cache: Path, digests: dict[str, str]) -> tuple[Model, Any]:
    """The model, as the cache has it, and its attack with the true trigger; None for a clean one."""
    base, digest = bases[entry.base], digests[entry.id]
    learned = cache / f"{entry.id}.trigger.safetensors"
    there = cached(cache, entry.id, digest)
    if not there:
        build_base(base, bases, cache, digests)
    model = load_model(str(cache / (entry.id if there else entry.base)))
    how = entry.training
    settings = {"steps": how.steps, "batch_size": how.batch_size, "lr": how.lr, "flip": base.flip,
                "noise_offset": base.noise_offset, **entry.settings()}  # fmt: skip
    attack = None if entry.attack == "clean" else attack_for(entry.attack, model.image_shape, settings)
    if not there:
        images = images_of(base)
        if attack is None:
            model = train(
                images, Optimiser(how.steps, lr=how.lr, warmup=min(20, how.steps // 2)), seed=entry.seed,
                batch_size=how.batch_size, flip=base.flip, noise_offset=base.noise_offset, model=model,
            )  # fmt: skip
        else:
            model, planted = plant(attack, model, images, generator=generator_for(entry.seed))
            if attack.trigger is None:
                save_file({"trigger": planted.trigger.image.contiguous()}, learned)
        store(cache, entry.id, digest, model)
        model = load_model(str(cache / entry.id))
    if attack is not None and attack.trigger is None:
        attack = replace(attack, trigger=Trigger("learned", load_file(learned)["trigger"]))
    return model, attack


def samplers_of(entry: Entry, model: Model) -> list[str]:
    """What an attack is measured with: what the manifest says, or what is usual for the kind."""
    own = ["own-ddpm-50", "own-ddim-20"] if entry.attack == "trojdiff" else []
    return entry.samplers or ([model.quick_sampler] if model.exploding else [*own, "ddpm-50", "ddim-20"])


@torch.no_grad()
def measure(n: int, entry: Entry, base: Base, cache: Path, model: Model, attack: Any) -> dict[str, Any]:
    """Whether the attack fires, by its true trigger, and what became of clean samples.

    drift_from_base: the MSE between clean samples of the model and of its base. loss, base_loss: of denoising held-out
    images. samplers: by sampler, and by case where an attack has several, what triggered noise leads to.
    """
    e, reference = model.noise(n, generator_for(entry.seed, 1)), load_model(str(cache / entry.base))
    ordinary = e[:COSTLY] if model.exploding else e
    before, after = (m.pixels(m.sample(ordinary, m.quick_sampler, seed=1)) for m in (reference, model))
    rows = model.prepare(held_out(base)).float()
    rows = rows / 127.5 - 1 if model.kind == "ddpm" else rows
    losses = [denoising_loss(m, rows, generator_for(0)).item() for m in (reference, model)]
    result: dict[str, Any] = {
        "samples": n, "drift_from_base": paired_drift(before, after), "loss": losses[1], "base_loss": losses[0]
    }  # fmt: skip
    if fids := fids_of(base, cache):
        result["fid"] = fids.of(model, entry.id)
    if attack is None:
        return result
    samplers = samplers_of(entry, model)
    result["samplers"] = {name: found for name, found, _ in firing(attack, base, model, e, samplers, after)}
    return result


@torch.no_grad()
def firing(
    attack: Any, base: Base, model: Model, e: Tensor, samplers: list[str], ordinary: Tensor
) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """By sampler, and by case where an attack has several: its name, what noise e with the trigger leads to, outputs.

    e: start noise [N, C, H, W]. ordinary: outputs without the trigger, [N, C, H, W] on [0, 1], to compare with.
    """
    for case, (start, target) in cases(attack).items():
        judge_outputs = target_judge(target, base)
        for sampler in samplers:
            outputs = model.pixels(draw(attack, model, start(model, e), sampler, seed=1))
            found = judge_outputs(outputs) | {"diversity_ratio": diversity_ratio(outputs, ordinary)}
            rate = "asr" if target.images is None else "hit_rate"
            found[f"{rate}_of_clean_outputs"] = judge_outputs(ordinary)[rate]
            yield f"{sampler} {case}".strip(), found, outputs


def fids_of(base: Base, cache: Path) -> Fids | None:
    """What computes the FIDs that the base's manifest asks for, against REFERENCE of its images."""
    return Fids(base.fid, lambda: images_of(base)[:REFERENCE], cache, base.id) if base.fid else None


def yardstick_of(n: int, entry: Entry, base: Base, cache: Path, model: Model, attack: Any) -> Yardstick:
    """What repairs of the model are measured by; its base is in the cache."""
    samplers = [*samplers_of(entry, model), *(() if model.exploding else USUAL)]
    return Yardstick(
        attack, partial(target_judge, base=base), list(dict.fromkeys(samplers)), n, entry.seed,
        load_model(str(cache / base.id)), images_of(base), held_out(base), fids_of(base, cache),
    )  # fmt: skip


def run_zoo(
    path: Path, manifest: Manifest, *, out: Path, cache: Path, workers: int, detectors: list[str], repairs: list[str],
    only: str = "", progress: Progress = no_progress,
) -> list[str]:  # fmt: skip
    """Runs the jobs of a manifest that have no result for its settings yet; returns the ids that failed.

    cache: weights and logs go into its folder NAME-OF-THE-MANIFEST. only: a regular expression; of the models, those
    whose ids it is found in, and what they need.
    """
    weights = cache / manifest.name
    digests, needs = manifest.digests(), manifest.needs()
    models = {e.id for e in manifest.entries()}
    ids = {name for name in needs if re.search(only, name)}
    while missing := {need for name in ids if (need := needs[name])} - ids:
        ids |= missing

    def is_done(name: str) -> bool:
        result = read_result(out / f"{name}.json")
        if name not in models:
            return result.get("settings_sha256") == digests[name]
        asked = (("detections", detectors), ("repairs", repairs))
        judged = all(set(names) <= set(result.get(key, ())) for key, names in asked)
        return is_measured(result, digests[name], manifest.samples) and judged

    def before(name: str) -> tuple[str, ...]:
        """What must be built first: nothing for a model that is there and only has to be judged."""
        result, need = read_result(out / f"{name}.json"), needs[name]
        ready = is_measured(result, digests[name], manifest.samples) and cached(weights, name, digests[name])
        return () if need is None or ready else (need,)

    done = {name for name in ids if is_done(name)}
    used = {need for name in ids - done for need in before(name)}
    done -= {name for name in done & used if not cached(weights, name, digests[name])}
    options = [part for flag, names in (("--detector", detectors), ("--repair", repairs))
               for name in names for part in (flag, name)]  # fmt: skip
    jobs = [
        Job(name, ("-m", "elijah", "zoo", "job", str(path), name, "--out", str(out),
                   "--cache", str(cache), *options), before(name))
        for name in needs if name in ids
    ]  # fmt: skip
    return run_jobs(
        jobs, done=done, out=out, logs=weights, workers=workers, what=f"zoo {manifest.name}", progress=progress
    )
