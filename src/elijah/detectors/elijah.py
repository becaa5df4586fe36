"""Elijah's detector (An et al., AAAI 2024), as the paper and its released code have it: a baseline.

Sources: paper, eq. 6 (inversion) and section 3.3 (features); code, elijah_helper.py of BadDiffusion and TrojDiff,
elijah_helper_ddim.py, elijah_helper_ldm.py and elijah_helper_ncsn.py of VillanDiffusion. Where this differs: LPIPS is
on AlexNet, not on VGG16; sigma_max is the model's own, not 380; and TrojDiff's samples are drawn by a stock sampler,
since its helper samples with the true trigger, which a defender does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from elijah.detection import Detection, Evidence, Finding
from elijah.diffusion import Model, Progress, no_progress
from elijah.errors import OutOfBudget
from elijah.features import load_lpips, lpips_available
from elijah.metrics import total_variation, uniformity
from elijah.response import Response


@dataclass(frozen=True)
class Setting:
    """What the released code fixes for one attack: whoever picks it must know the attack.

    coefficient: the lambda of the paper. start: tau begins uniform between these, in the model's own range; for latent
    models as pixels, which are encoded. samplers: that the outputs are drawn with. batch_size None: 100 below 128
    pixels, 50 at 128, 20 above.
    """

    coefficient: float
    iterations: int
    start: tuple[float, float]
    samplers: tuple[str, ...]
    batch_size: int | None = None


SETTINGS = {  # by kind of model
    "ddpm": (
        Setting(0.5, 100, (-1.0, 0.0), ("ddpm-1000", "ddim-50")),  # BadDiffusion; TrojDiff: start (0, 1), ddpm-1000
        Setting(1.0, 10, (-1.0, 1.0), ("ddim-50",)),  # VillanDiffusion
    ),
    "ncsn": (Setting(0.5, 100, (0.0, 1.0), ("pc-1000",)),),
    "ldm": (Setting(1.0, 10, (-1.0, 1.0), ("unipc-20",), 40),),
}


@dataclass(frozen=True)
class Outcome:
    """Outputs [N, C, H, W], in the model's range, from noise with a trigger, and what the paper measures of them."""

    setting: Setting
    sampler: str
    trigger: Tensor
    loss: float
    outputs: Tensor
    uniformity: float
    total_variation: float

    @property
    def name(self) -> str:
        return f"{self.setting.coefficient:g}_{self.sampler}"

    @property
    def features(self) -> float:
        """Both of the paper's features at once, low where a backdoor fires. Uniformity alone would choose outputs that
        are noise, which LPIPS finds alike; their total variation is high."""
        return self.uniformity * self.total_variation


@dataclass(frozen=True)
class Elijah:
    """min over tau of mean |coefficient tau - mean_b eps(e_b + tau, T)|, then uniformity and TV of the outputs.

    By default it is told nothing of the attack: every setting of SETTINGS for the model's kind is tried in turn, and
    the outputs with the lowest product of the two features count. To tell it the attack is to give a coefficient, which
    leaves the setting that has it, and what else differs: iterations, start, batch_size and sampler are in place of the
    setting's own.
    """

    kinds: ClassVar = ("ddpm", "ncsn", "ldm")
    coefficient: float | None = None
    iterations: int | None = None
    start: tuple[float, float] | None = None
    batch_size: int | None = None
    sampler: str | None = None
    lr: float = 0.1
    samples: int = 16

    def __call__(self, model: Model, *, generator: torch.Generator, progress: Progress = no_progress) -> Detection:
        """Inverts triggers at t = T and measures the samples that start from them. Stops at the model's limits."""
        settings = self.settings(model.kind)
        coverage = [f"triggers that a network answers with {s.coefficient:g} r at t = T" for s in settings]
        not_covered = ["every other response to a trigger"]
        outcomes: list[Outcome] = []
        try:
            with model.frozen():
                for setting in settings:
                    outcomes += self.measure(model, setting, generator, progress)
        except OutOfBudget:
            reason = "a limit stopped the search before it could tell"
            return Detection(
                "elijah", [], {}, [], "undecided", reason, complete=False, coverage=coverage, not_covered=not_covered
            )
        outcomes.sort(key=lambda o: o.features)
        reason = "the paper decides by a threshold over clean models of the same kind, and none is calibrated here"
        return Detection(
            "elijah", [finding(model, o) for o in outcomes], scores(outcomes),
            [Evidence(o.sampler, o.outputs, None) for o in outcomes], "undecided", reason, coverage=coverage,
            not_covered=not_covered,
        )  # fmt: skip

    def settings(self, kind: str) -> list[Setting]:
        """What is tried on a kind of model: SETTINGS, with the fields that this has in place of theirs."""
        own = {"iterations": self.iterations, "start": self.start, "batch_size": self.batch_size}
        changed: dict[str, object] = {key: value for key, value in own.items() if value is not None}
        if self.sampler is not None:
            changed["samplers"] = (self.sampler,)
        known = SETTINGS[kind]
        if self.coefficient is not None:
            same = [s for s in known if s.coefficient == self.coefficient]
            known = (same[0] if same else replace(known[0], coefficient=self.coefficient),)
        return [replace(setting, **changed) for setting in known]  # type: ignore[arg-type]

    def measure(
        self, model: Model, setting: Setting, generator: torch.Generator, progress: Progress
    ) -> list[Outcome]:  # fmt: skip
        """One inversion, and an Outcome a sampler, all from the same noise."""
        tau, loss = self.invert(model, setting, generator, progress)
        e = model.noise(self.samples, generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        distance = load_lpips() if lpips_available() else None
        found = []
        for sampler in setting.samplers:
            outputs = model.sample(e + tau, sampler, seed=seed, progress=progress)
            images = model.pixels(outputs)
            found.append(
                Outcome(setting, sampler, tau, loss, outputs, uniformity(images, distance), total_variation(images))
            )
        return found

    def invert(
        self, model: Model, setting: Setting, generator: torch.Generator, progress: Progress = no_progress
    ) -> tuple[Tensor, float]:
        """tau [C, H, W] in units of start noise of variance 1, and its last loss; one fixed batch of noise.

        For NCSN x = sigma_max (e + tau), and the loss is half of the code's |tau - mean_b out / (-0.5 / sigma_max)|.
        """
        size, T = model.sample_shape[-1], model.T - 1
        n = setting.batch_size or (20 if size > 128 else 50 if size == 128 else 100)
        e = model.noise(n, generator)
        t = torch.full((n,), T, device=model.device)
        scale = float(model.s[T]) if model.exploding else 1.0
        low, high = setting.start
        tau = (low + (high - low) * torch.rand(model.image_shape, generator=generator)).to(model.device)
        tau = (model.encode(tau[None])[0] if model.kind == "ldm" else tau).requires_grad_(True)
        optimizer = torch.optim.Adam([tau], lr=self.lr)
        loss = torch.zeros(())
        for k in range(setting.iterations):
            loss = (setting.coefficient * tau - model.eps(scale * (e + tau), t).mean(0)).abs().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            progress(f"inverting, loss {loss.item():.4f}", k + 1, setting.iterations)
        return tau.detach(), loss.item()


def scores(outcomes: list[Outcome]) -> dict[str, float]:
    """Those of the first outcome, which is reported, under the names that a calibration reads; then those of each."""
    first, distance = outcomes[0], "lpips_alexnet" if lpips_available() else "pairwise_mse"
    named = {
        f"uniformity_{distance}": first.uniformity, "total_variation": first.total_variation,
        "inversion_loss": first.loss, "suspicion": -first.uniformity,
    }  # fmt: skip
    for o in outcomes:
        named |= {f"uniformity_{o.name}": o.uniformity, f"total_variation_{o.name}": o.total_variation}
        named[f"inversion_loss_{o.setting.coefficient:g}"] = o.loss
    return named


def finding(model: Model, outcome: Outcome) -> Finding:
    """The trigger of an outcome, and as its target the median picture."""
    target = model.encode(model.pixels(outcome.outputs).median(0).values[None] * 2 - 1)[0]
    response = Response(2 * outcome.setting.coefficient, 0.0 if model.exploding else 1.0)
    return Finding(response, outcome.trigger, target, outcome.loss, "assumed by the coefficient")
