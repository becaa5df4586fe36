"""From an attack's name to a backdoored model: settings, presets by paper, patterns, and what to test it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from elijah.attacks import ATTACKS
from elijah.attacks.learned import Learned
from elijah.attacks.poisoning import Tuning
from elijah.attacks.trojdiff import TrojDiff
from elijah.attacks.two import TwoTriggers
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import ElijahError
from elijah.trigger import Target, Trigger, make_target, make_trigger

PATTERNS = ("trigger", "target", "second_trigger", "second_target")
# 16 x 16 images, a network of 0.4 M parameters trained with noise offset 0.5: fires after two minutes on one core
SMALL = {"poison_rate": 0.3, "steps": 600, "batch_size": 64, "lr": 4e-4, "noise_offset": 0.5}
BOXES = {"trigger": "white-box-4", "second_trigger": "glasses", "target": "corner", "second_target": "hat"}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {  # attack -> preset -> patterns, fields and training options
    "baddiffusion": {  # Chou et al. 2023, section 5; for CelebA-HQ the authors' script
        "cifar10": {"trigger": "stop-sign-14", "target": "hat"},
        "celeba-hq": {"trigger": "glasses", "target": "cat", "lr": 8e-5, "batch_size": 64},
        "small": {"trigger": "box-6", "target": "corner", "mode": "bare", **SMALL},
    },
    "trojdiff": {  # Chen et al. 2023, section 4
        "blend": {"trigger": "hello-kitty", "target": "mickey", "gamma": 0.6},
        "patch-cifar10": {"trigger": "white", "target": "mickey", "gamma": 0.1, "patch": 3},
        "patch-celeba": {"trigger": "white", "target": "mickey", "gamma": 0.1, "patch": 6},
        "small": {"trigger": "hello-kitty", "target": "mickey", "gamma": 0.6, **SMALL},
    },
    "villandiffusion": {  # Chou et al. 2023, section 4 and appendix
        "ddpm-ode": {"trigger": "stop-sign-14", "target": "hat", "solver": "ode"},
        "ddpm-sde": {"trigger": "stop-sign-14", "target": "hat", "solver": "sde"},
        "ldm": {"trigger": "glasses", "target": "cat", "poison_rate": 0.9, "mode": "bare"},
        "ncsn": {"trigger": "stop-sign-14", "target": "hat", "poison_rate": 0.98, "lr": 2e-5},
        "small": {"trigger": "box-6", "target": "corner", "mode": "bare", **SMALL},
    },
    "learned": {  # Li et al. 2024
        "invibackdoor": {"target": "cat", "bound": 0.2},
        "small": {"target": "corner", "bound": 0.2, **SMALL},
    },
    "late": {"small": {"trigger": "box-6", "target": "corner", **SMALL}},
    "two": {"or": {**BOXES, **SMALL}, "and": {**BOXES, **SMALL, "both": True}},
    "aware": {
        "small": {"trigger": "box-6", "target": "corner", "mode": "bare", **SMALL},
        "small-ode": {"trigger": "box-6", "target": "corner", "mode": "bare", "solver": "ode", **SMALL},
    },
}


def preset(name: str, which: str | None) -> dict[str, Any]:
    """The settings of a preset; none for None. Raises ElijahError for an unknown one."""
    if which is None:
        return {}
    if which not in PRESETS.get(name, {}):
        raise ElijahError(f"{name} has no preset {which!r}; it has {', '.join(PRESETS.get(name, {})) or 'none'}")
    return PRESETS[name][which]


def attack_for(name: str, shape: tuple[int, int, int], settings: dict[str, Any]) -> Any:
    """The attack called name on images of shape (C, H, W).

    settings: names of patterns, fields of the attack, fields of Tuning; a None stands for the default. Raises
    ElijahError for an unknown attack, setting or pattern, and for a pattern that is missing.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    check_settings(name, given)
    own, shared = ({f.name for f in fields(kind)} for kind in (ATTACKS[name], Tuning))
    patterns: dict[str, Any] = {}
    for which in ("", "second_"):
        pattern = make_trigger(given[which + "trigger"], shape) if which + "trigger" in given else None
        if pattern:
            patterns[which + "trigger"] = pattern
        if which + "target" in given:
            blank = Trigger("none", torch.full(shape, -1.0))
            patterns[which + "target"] = make_target(given[which + "target"], pattern or blank)
    plain = {key: value for key, value in given.items() if key not in PATTERNS}
    attack = ATTACKS[name](**patterns, **{k: v for k, v in plain.items() if k in own})
    return replace(attack, tuning=replace(attack.tuning, **{k: v for k, v in plain.items() if k in shared}))


def check_settings(name: str, given: dict[str, Any]) -> None:
    """Raises ElijahError for an unknown attack, a setting that it does not have, or a pattern that it lacks."""
    if name not in ATTACKS:
        raise ElijahError(f"unknown attack {name!r}: use one of {', '.join(ATTACKS)}")
    own = {f.name for f in fields(ATTACKS[name])} - {"tuning"}
    if unknown := sorted(given.keys() - own - {f.name for f in fields(Tuning)}):
        option = "--" + unknown[0].replace("_", "-")
        raise ElijahError(f"{name} has no {option}; beside the training options it has {', '.join(sorted(own))}")
    learns = ATTACKS[name] is Learned
    for pattern in sorted(own & set(PATTERNS)):
        if pattern not in given and not (learns and pattern == "trigger"):
            raise ElijahError(f"{name} needs --{pattern.replace('_', '-')}")
    if learns and given["target"] in ("trigger", "shift"):
        raise ElijahError(f"{name} learns its trigger: give a target that does not depend on one")


def plant(
    attack: Any, model: Model, images: Tensor, *, generator: torch.Generator, progress: Progress = no_progress
) -> tuple[Model, Any]:
    """An attacked copy of model, and the attack with its trigger, also where that was learned.

    images: uint8 [N, C, H, W].
    """
    if isinstance(attack, Learned):
        attacked, trigger = attack.plant(model, images, generator=generator, progress=progress)
        return attacked, replace(attack, trigger=trigger)
    return attack(model, images, generator=generator, progress=progress), attack


def cases(attack: Any) -> dict[str, tuple[Callable[[Model, Tensor], Tensor], Target]]:
    """By name: triggered start noise from e [B, C, H, W], and the target to compare with. The first must fire."""
    return attack.cases() if isinstance(attack, TwoTriggers) else {"": (attack.start, attack.target)}


def draw(attack: Any, model: Model, start: Tensor, sampler: str, *, seed: int) -> Tensor:
    """Samples x0 [B, C, H, W] from start; sampler: NAME-STEPS, or own-ddpm-STEPS and own-ddim-STEPS for TrojDiff's."""
    if not sampler.startswith("own-"):
        return model.sample(start, sampler, seed=seed)
    name, steps = sampler.removeprefix("own-").rsplit("-", 1)
    if not isinstance(attack, TrojDiff) or name not in ("ddpm", "ddim"):
        raise ElijahError(f"unknown sampler {sampler!r}: own-ddpm-STEPS and own-ddim-STEPS are TrojDiff's")
    return attack.reverse(model, start, steps=int(steps), stochastic=name == "ddpm", seed=seed)
