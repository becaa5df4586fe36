"""The 13 samplers, by name: stock diffusers schedulers on a model's own noise schedule.

A sampler is written NAME-STEPS, such as ddim-50. For all of them: spacing "trailing", so that the first step is at the
last timestep T-1 ("leading" never visits it), no clipping, and a start of e * init_noise_sigma. Only the schedule is
taken from the model's folder, so a name means the same for every model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from elijah.errors import ElijahError


class Sampler(NamedTuple):
    """A scheduler class, its settings, and the number of steps that the papers use."""

    scheduler: Any
    settings: dict[str, Any]
    steps: int


def _dpm_solver(algorithm: str, order: int) -> Sampler:
    last = {"final_sigmas_type": "sigma_min"} if algorithm == "dpmsolver" else {}
    return Sampler(DPMSolverMultistepScheduler, {"algorithm_type": algorithm, "solver_order": order, **last}, 20)


UNCLIPPED = {"clip_sample": False}
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(diffusers.DDPMScheduler, {"variance_type": "fixed_small", **UNCLIPPED}, 1000),
    "ddim": Sampler(diffusers.DDIMScheduler, UNCLIPPED, 50),
    "dpm1": _dpm_solver("dpmsolver", 1),
    "dpm2": _dpm_solver("dpmsolver", 2),
    "dpm3": _dpm_solver("dpmsolver", 3),
    "dpm++1": _dpm_solver("dpmsolver++", 1),
    "dpm++2": _dpm_solver("dpmsolver++", 2),
    "dpm++3": _dpm_solver("dpmsolver++", 3),
    "unipc": Sampler(diffusers.UniPCMultistepScheduler, {}, 20),
    "pndm": Sampler(diffusers.PNDMScheduler, {"skip_prk_steps": True}, 50),
    "deis": Sampler(diffusers.DEISMultistepScheduler, {}, 20),
    "heun": Sampler(diffusers.HeunDiscreteScheduler, UNCLIPPED, 50),
    "pc": Sampler(diffusers.ScoreSdeVeScheduler, {}, 1000),  # predictor-corrector, for variance-exploding models alone
}
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
            "rescale_betas_zero_snr")  # fmt: skip


def names_for(exploding: bool) -> tuple[str, ...]:
    """The samplers of variance-exploding models, or those of the others."""
    return ("pc",) if exploding else tuple(name for name in SAMPLERS if name != "pc")


def make_scheduler(own: Any, sampler: str) -> Any:
    """The stock scheduler called NAME-STEPS on the noise schedule of own, a folder's scheduler; ready to step.

    Raises ElijahError for an unknown name, a number of steps outside 1 ... T, or a sampler of the other sort of model.
    """
    name, _, steps = sampler.rpartition("-")
    exploding = isinstance(own, diffusers.ScoreSdeVeScheduler)
    if name not in names_for(exploding) or not steps.isdigit() or not 1 <= int(steps) <= own.config.num_train_timesteps:
        known = ", ".join(names_for(exploding))
        raise ElijahError(f"unknown sampler {sampler!r}: use NAME-STEPS with a name of {known}")
    if exploding:
        scheduler = diffusers.ScoreSdeVeScheduler.from_config(own.config)
        scheduler.set_timesteps(int(steps))
        scheduler.set_sigmas(int(steps))
        return scheduler
    kept = {key: own.config[key] for key in SCHEDULE if key in own.config}
    settings = {**kept, "timestep_spacing": "trailing", **SAMPLERS[name].settings}
    scheduler = SAMPLERS[name].scheduler.from_config(settings)
    scheduler.set_timesteps(int(steps))
    return scheduler


def evenly(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """The steps (now, then) from T - 1 down to -1, the image, in "trailing" spacing."""
    return list(pairwise(round(v) - 1 for v in torch.linspace(timesteps, 0, steps + 1).tolist()))


def correct(scheduler: Any, score: Tensor, x: Tensor, generators: list[torch.Generator]) -> Tensor:
    """The corrector's step, one sample at a time: its step size is a mean over the batch."""
    rows = zip(score.split(1), x.split(1), generators, strict=True)
    return torch.cat([scheduler.step_correct(out, row, generator=g).prev_sample for out, row, g in rows])
