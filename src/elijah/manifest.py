"""A zoo's manifest: which clean and backdoored models exist. A TOML file, checked on reading.

    [[base]]    a clean base:   id, part, kind, data, size, channels, limit, skip, seed, noise_offset, flip, training
    [[models]]  a group:        part, bases x attack x triggers x targets x poison_rates x seeds, training, knobs

The calibration part and the test part share no base, trigger, target or seed; development is free. Attack "clean"
trains the base further on clean images.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elijah.attacks import ATTACKS
from elijah.attacks.planting import check_settings
from elijah.bases import KINDS
from elijah.errors import ElijahError
from elijah.samplers import names_for

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
    """A clean base; seed also fixes the order of its data. size: of the images; latents are a quarter as wide."""

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
    sigma_max: float | None = Field(None, gt=1)  # of bases of kind ncsn, in place of new_model's
    training: Training
    autoencoder_steps: int = Field(2000, ge=1)  # of latent bases
    fid: int = Field(0, ge=0)  # samples for the FID of the base and of each of its models; 0: none
    autoencoder: str | None = None  # the latent base whose autoencoder is used, in place of a new one


class Group(Strict):
    """Models of one attack: the product of its lists. knobs: fields of the attack, as `elijah attack` has them.

    samplers: which to measure the attack with, the one that it is made for first; without, those of Base's kind.
    """

    part: Part
    bases: list[str] = Field(min_length=1)
    attack: str
    triggers: list[str] = [""]
    targets: list[str] = [""]
    poison_rates: list[float] = [0.0]
    seeds: list[int] = Field(min_length=1)
    training: Training
    knobs: dict[str, Any] = {}
    samplers: list[str] = []


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
    samplers: list[str]

    def settings(self) -> dict[str, Any]:
        """The attack's settings, as planting.attack_for takes them, without those of its training."""
        patterns = {"trigger": self.trigger or None, "target": self.target or None}
        return {**{k: v for k, v in patterns.items() if v}, "poison_rate": self.poison_rate, **self.knobs}


class Manifest(Strict):
    """A read and checked manifest."""

    name: str = Field(pattern=r"^[\w-]+$")
    base: list[Base] = Field(min_length=1)
    models: list[Group] = []
    samples: int = Field(64, ge=2)  # drawn to measure that an attack fires

    def entries(self) -> list[Entry]:
        """All models, in the manifest's order."""
        return [entry for group in self.models for entry in expand(group)]

    def needs(self) -> dict[str, str | None]:
        """What must be built before what: a model's base, and a latent base's autoencoder's base."""
        return {b.id: b.autoencoder for b in self.base} | {e.id: e.base for e in self.entries()}

    def digests(self) -> dict[str, str]:
        """By id: a hash of all settings that a model depends on. Results and weights with another one are stale."""
        found: dict[str, str] = {}
        items: list[Base | Entry] = [*self.base, *self.entries()]
        for item in items:
            need = item.autoencoder if isinstance(item, Base) else item.base
            settings = [item.model_dump(exclude_defaults=True), found.get(need or "", "")]
            found[item.id] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return found


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
    for k, base in enumerate(manifest.base):
        if base.kind not in KINDS:
            raise ElijahError(f"{path}: {base.id}: unknown kind {base.kind!r}: use one of {', '.join(KINDS)}")
        earlier = {b.id for b in manifest.base[:k] if b.kind == "ldm"}
        if base.sigma_max and base.kind != "ncsn":
            raise ElijahError(f"{path}: {base.id}: sigma_max is for kind ncsn, this base is {base.kind}")
        if base.autoencoder and (base.kind != "ldm" or base.autoencoder not in earlier):
            raise ElijahError(f"{path}: {base.id}: no latent base {base.autoencoder} before it, or it is not latent")
    for entry in entries:
        check_entry(entry, bases, path)
    for what in ("trigger", "target", "seed"):
        used = {
            part: {getattr(e, what) for e in entries if e.part == part and (e.attack != "clean" or what == "seed")}
            | ({b.seed for b in manifest.base if b.part == part} if what == "seed" else set())
            for part in ("calibration", "test")
        }
        if shared := sorted((used["calibration"] & used["test"]) - {""}):
            raise ElijahError(f"{path}: calibration and test share the {what} {shared[0]}")


def check_entry(entry: Entry, bases: dict[str, Base], path: Path) -> None:
    """Raises ElijahError for a base of another part, and for an attack, setting or sampler that there is not."""
    if entry.base not in bases or bases[entry.base].part != entry.part:
        raise ElijahError(f"{path}: {entry.id}: no base {entry.base} in its part, {entry.part}")
    known = names_for(bases[entry.base].kind == "ncsn")
    for sampler in entry.samplers:
        if sampler.removeprefix("own-").rpartition("-")[0] not in known:
            raise ElijahError(f"{path}: {entry.id}: unknown sampler {sampler!r}: use NAME-STEPS of {', '.join(known)}")
    if entry.attack == "clean":
        return
    if entry.attack not in ATTACKS:
        raise ElijahError(f"{path}: {entry.id}: unknown attack {entry.attack!r}")
    try:
        check_settings(entry.attack, entry.settings())
    except ElijahError as error:
        raise ElijahError(f"{path}: {entry.id}: {error}") from error


def expand(group: Group) -> list[Entry]:
    """The models of a group."""
    shared = {key: getattr(group, key) for key in ("part", "attack", "training", "knobs", "samplers")}
    lists = (group.bases, group.triggers, group.targets, group.poison_rates, group.seeds)
    return [
        Entry(id=name_of(base, group.attack, trigger, target, rate, seed), base=base, trigger=trigger, target=target,
              poison_rate=rate, seed=seed, **shared)
        for base, trigger, target, rate, seed in itertools.product(*lists)
    ]  # fmt: skip


def name_of(base: str, attack: str, trigger: str, target: str, rate: float, seed: int) -> str:
    """A file name for a model."""
    stems = [Path(p).stem if p.lower().endswith(".png") else p for p in (trigger, target) if p]
    parts = [base, attack, *(re.sub(r"[^\w-]+", "-", stem) for stem in stems)]
    return "_".join([*parts, *([f"p{rate:g}".replace(".", "")] if rate else []), f"s{seed}"])
