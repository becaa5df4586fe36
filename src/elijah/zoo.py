"""The zoo: which clean and backdoored models exist (a TOML manifest), and the job that builds and judges one of them.

    [[base]]    a clean base:   id, part, kind, data, size, channels, limit, skip, seed, noise_offset, flip, training
    [[models]]  a group:        part, bases x attack x triggers x targets x poison_rates x seeds, training, knobs

The calibration part and the test part share no base, trigger, target or seed; development is free. Attack "clean"
trains the base further on clean images. Every job writes one JSON file and keeps its weights as fp16 in a cache from
which they can be deleted: they are rebuilt by seed.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import tomllib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from elijah.attacks import ATTACKS
from elijah.attacks.learned import Learned
from elijah.attacks.trojdiff import TrojDiff
from elijah.bases import KINDS, new_model
from elijah.data import load_images
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.files import write_file, write_folder
from elijah.loading import load_model
from elijah.making import configure
from elijah.metrics import attack_success, diversity_ratio, mse_to_target, paired_drift
from elijah.scan import scan
from elijah.training import Optimiser, train
from elijah.trigger import Target, make_target, make_trigger

Part = Literal["calibration", "test", "development"]


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(Strict):
    """Updates, rows an update, and AdamW's rate."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(5e-4, gt=0)


class Base(Strict):
    """A clean base; seed also fixes the order of its data."""

    id: str = Field(pattern=r"^[\w-]+$")
    part: Part
    kind: str = "ddpm"
    data: str
    size: int = Field(16, ge=8)
    channels: Literal[1, 3] = 3
    limit: int | None = None
    skip: int = 0
    seed: int
    noise_offset: float = 0.0
    flip: bool = False
    widths: tuple[int, ...] | None = None
    training: Training


class Group(Strict):
    """Models of one attack: the product of its lists. knobs: fields of the attack, as `elijah attack` has them."""

    part: Part
    bases: list[str] = Field(min_length=1)
    attack: str
    triggers: list[str] = [""]
    targets: list[str] = [""]
    poison_rates: list[float] = [0.0]
    seeds: list[int] = Field(min_length=1)
    training: Training
    knobs: dict[str, Any] = {}
    sampler: str = "ddpm-50"


class Entry(Strict):
    """One model: what Group's product gives."""

    id: str
    part: Part
    base: str
    attack: str
    trigger: str
    target: str
    poison_rate: float
    seed: int
    training: Training
    knobs: dict[str, Any]
    sampler: str


class Manifest(Strict):
    """A read and checked manifest."""

    name: str = Field(pattern=r"^[\w-]+$")
    base: list[Base] = Field(min_length=1)
    models: list[Group] = []
    samples: int = Field(64, ge=2)  # drawn to measure that an attack fires

    def entries(self) -> list[Entry]:
        """All models, in the manifest's order."""
        return [entry for group in self.models for entry in expand(group)]


def read_manifest(path: Path) -> Manifest:
    """The manifest in a TOML file. Raises ElijahError for what is wrong in it, the first thing first."""
    try:
        manifest = Manifest.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ElijahError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ElijahError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ElijahError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    check(manifest, path)
    return manifest


def check(manifest: Manifest, path: Path) -> None:
    """Raises ElijahError for unknown names, two models of one id, and parts that share what they must not."""
    bases = {base.id: base for base in manifest.base}
    entries = manifest.entries()
    ids = [base.id for base in manifest.base] + [entry.id for entry in entries]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise ElijahError(f"{path}: two models are called {twice}")
    if base := next((b for b in manifest.base if b.kind not in KINDS), None):
        raise ElijahError(f"{path}: {base.id}: unknown kind {base.kind!r}: use one of {', '.join(KINDS)}")
    for entry in entries:
        if entry.base not in bases or bases[entry.base].part != entry.part:
            raise ElijahError(f"{path}: {entry.id}: no base {entry.base} in its part, {entry.part}")
        if bases[entry.base].kind == "ldm":
            raise ElijahError(f"{path}: {entry.id}: latent bases are not supported yet")
        if entry.attack not in (*ATTACKS, "clean"):
            raise ElijahError(f"{path}: {entry.id}: unknown attack {entry.attack!r}")
    for what in ("base", "trigger", "target", "seed"):
        used = {
            part: {getattr(e, what) for e in entries if e.part == part and (e.attack != "clean" or what == "seed")}
            | ({b.seed for b in manifest.base if b.part == part} if what == "seed" else set())
            for part in ("calibration", "test")
        }
        if shared := sorted((used["calibration"] & used["test"]) - {""}):
            raise ElijahError(f"{path}: calibration and test share the {what} {shared[0]}")


def expand(group: Group) -> list[Entry]:
    """The models of a group."""
    shared = {key: getattr(group, key) for key in ("part", "attack", "training", "knobs", "sampler")}
    lists = (group.bases, group.triggers, group.targets, group.poison_rates, group.seeds)
    return [
        Entry(id=name_of(base, group.attack, trigger, target, rate, seed), base=base, trigger=trigger, target=target,
              poison_rate=rate, seed=seed, **shared)
        for base, trigger, target, rate, seed in itertools.product(*lists)
    ]  # fmt: skip


def name_of(base: str, attack: str, trigger: str, target: str, rate: float, seed: int) -> str:
    """A file name for a model."""
    parts = [base, attack, *(re.sub(r"[^\w-]+", "-", Path(p).stem if "." in p else p) for p in (trigger, target) if p)]
    return "_".join([*parts, *([f"p{rate:g}".replace(".", "")] if rate else []), f"s{seed}"])


def run_job(manifest: Manifest, name: str, cache: Path, out: Path, detectors: list[str]) -> None:
    """Builds what is called name, judges it, and writes out/name.json. Raises what went wrong."""
    began = time.monotonic()
    base = next((b for b in manifest.base if b.id == name), None)
    if base is not None:
        build_base(base, cache)
        result: dict[str, Any] = {"base": base.model_dump()}
    else:
        entry = next(e for e in manifest.entries() if e.id == name)
        base = next(b for b in manifest.base if b.id == entry.base)
        build_base(base, cache)
        model, stamp, target = build(entry, base, cache)
        result = {"model": entry.model_dump(), "fires": fires(manifest.samples, entry, cache, model, stamp, target),
                  "detections": {detector: judge(cache / name, detector) for detector in detectors}}  # fmt: skip
    result = {"schema_version": 1, "id": name, **result, "seconds": round(time.monotonic() - began, 1)}
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def images_of(base: Base) -> Tensor:
    """The base's images, uint8 [N, C, H, W]."""
    return load_images(base.data, size=base.size, channels=base.channels, limit=base.limit, skip=base.skip)


def build_base(base: Base, cache: Path) -> None:
    """Trains a base into the cache, if it is not there."""
    if (cache / base.id).is_dir():
        return
    shape = (base.channels, base.size, base.size)
    how = Optimiser(base.training.steps, lr=base.training.lr, warmup=base.training.steps // 20, ema_decay=0.999)
    fresh = new_model(shape, seed=base.seed, channels=base.widths, kind=base.kind)
    checkpoint = cache / f"{base.id}.ckpt"
    trained = train(
        images_of(base), how, seed=base.seed, batch_size=base.training.batch_size, flip=base.flip,
        noise_offset=base.noise_offset, model=fresh, dtype=torch.bfloat16, checkpoint=checkpoint,
    )  # fmt: skip
    trained.dtype = torch.float32
    write_folder(cache / base.id, lambda folder: trained.save(folder, half=True))
    checkpoint.unlink(missing_ok=True)


def build(entry: Entry, base: Base, cache: Path) -> tuple[Model, Any, Target | None]:
    """The model, in the cache too; what turns noise into triggered start noise; and its target."""
    clean, images, how = load_model(str(cache / base.id)), images_of(base), entry.training
    tuning = {"steps": how.steps, "batch_size": how.batch_size, "lr": how.lr, "flip": base.flip,
              "noise_offset": base.noise_offset, "dtype": torch.bfloat16}  # fmt: skip
    if entry.attack == "clean":
        settings = Optimiser(how.steps, lr=how.lr, warmup=min(20, how.steps // 2))
        model = train(
            images, settings, seed=entry.seed, batch_size=how.batch_size, flip=base.flip,
            noise_offset=base.noise_offset, model=clean, dtype=torch.bfloat16,
        )  # fmt: skip
        stamp, target = None, None
    else:
        trigger = make_trigger(entry.trigger or "box-4", clean.image_shape)
        target = make_target(entry.target, trigger)
        knobs = {**entry.knobs, **tuning, "poison_rate": entry.poison_rate}
        attack = configure(entry.attack, trigger, target, knobs)
        if isinstance(attack, Learned):
            model, r = attack.plant(clean, images, generator=generator_for(entry.seed))
            stamp = lambda e: e + r  # noqa: E731
        else:
            model = attack(clean, images, generator=generator_for(entry.seed))
            stamp = attack.start if isinstance(attack, TrojDiff) else lambda e: e + attack.stamp(clean)
    model.dtype = torch.float32
    if not (cache / entry.id).is_dir():
        write_folder(cache / entry.id, lambda folder: model.save(folder, half=True))
    return load_model(str(cache / entry.id)), stamp, target


def fires(n: int, entry: Entry, cache: Path, model: Model, stamp: Any, target: Target | None) -> dict[str, Any]:
    """Whether the attack works, by its true trigger, and how far clean samples moved from those of the base."""
    e, reference = model.noise(n, generator_for(entry.seed, 1)), load_model(str(cache / entry.base))
    before, after = (m.pixels(m.sample(e, m.quick_sampler, seed=1)) for m in (reference, model))
    result: dict[str, Any] = {"sampler": entry.sampler, "samples": n, "drift_from_base": paired_drift(before, after)}
    if target is not None and target.images is None:
        outputs, wanted = model.pixels(model.sample(stamp(e), entry.sampler, seed=1)), target.image / 2 + 0.5
        result["asr"] = {str(limit): share for limit, share in attack_success(outputs, wanted).items()}
        result["mse"] = float(mse_to_target(outputs, wanted).mean())
        result["diversity_ratio"] = diversity_ratio(outputs, before)
    return result


def judge(folder: Path, detector: str) -> dict[str, Any]:
    """A scan of the folder, which is told nothing."""
    report = scan(str(folder), detector=detector, device="cpu")
    return {"verdict": report.verdict, "scores": report.scores, "cost": report.cost.model_dump()}
