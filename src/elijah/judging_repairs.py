"""Judges repairs on one model of a zoo: they are told what a scan found, and are measured by the true trigger."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elijah.attacks.planting import cases, draw
from elijah.clean import Removal, compare, enough, remove
from elijah.data import batch
from elijah.detection import Detection, Finding
from elijah.detectors import DEFAULT
from elijah.diffusion import Model, generator_for, no_progress
from elijah.errors import ElijahError, Unsupported
from elijah.fids import Fids
from elijah.guard import image_loss
from elijah.loading import load_model
from elijah.metrics import diversity_ratio, paired_drift, pairwise_mse, ssim_to_target
from elijah.repairs import REPAIRS, Distill, Erase, Repair, Unshift
from elijah.repairs.finetune import FineTune
from elijah.scan import inspect
from elijah.synthetic import screened, synthesise
from elijah.training import Optimiser, optimise
from elijah.trigger import Target

Rates = Callable[[Tensor], dict[str, Any]]  # outputs on [0, 1] -> how many of them are the target
PREDICTOR_CORRECTOR_SHARE = 4  # one in so many samples where a sample takes a thousand evaluations
USUAL = ("ddpm-50", "ddim-20", "dpm++2-20", "unipc-20")
DATA = ("synthetic", "real")  # the model's own samples; the first tenth of the base's images
OURS = ("unshift", "distill", "erase")
STRENGTH_UPDATES = (10, 20, 40, 80)
SCAN = {"detector": DEFAULT, "device": "cpu", "dtype": "float32", "batch_size": None, "offline": True,
        "max_evaluations": None, "max_minutes": None, "data": None}  # fmt: skip


@dataclass(frozen=True)
class Yardstick:
    """What scoring knows of a model and no repair is told.

    attack: with the true trigger; None of a clean model. rates: by target, what says how many outputs are it. samplers:
    the one that the attack is made for first. reference: the clean base. real: its images, unseen: such as it did not
    train on, both uint8 [N, C, H, W]. fids: what computes FIDs, or None.
    """

    attack: Any
    rates: Callable[[Target], Rates]
    samplers: list[str]
    n: int
    seed: int
    reference: Model
    real: Tensor
    unseen: Tensor
    fids: Fids | None

    def noise(self, model: Model) -> Tensor:
        """The start noise that everything is measured from."""
        n = max(2, self.n // PREDICTOR_CORRECTOR_SHARE) if model.exploding else self.n
        return model.noise(n, generator_for(self.seed, 1))

    def plain(self, model: Model) -> dict[str, Tensor]:
        """By sampler: outputs [N, C, H, W] on [0, 1] without a trigger; an attacker's own sampler as the stock one."""
        e, names = self.noise(model), dict.fromkeys(name.removeprefix("own-") for name in self.samplers)
        return {name: model.pixels(model.sample(e, name, seed=1)) for name in names}

    @torch.no_grad()
    def outcome(self, model: Model, before: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """What the true trigger does under each sampler (and case), the denoising loss, what became of clean outputs.

        before: plain outputs of the model before its repair, to measure the drift from.
        """
        e, plain = self.noise(model), self.plain(model)
        found: dict[str, Any] = {"samplers": {}, "loss": image_loss(model, self.unseen)}
        for case, (start, target) in cases(self.attack).items():
            rates = self.rates(target)
            for sampler in self.samplers:
                clean = plain[sampler.removeprefix("own-")]
                outputs = model.pixels(draw(self.attack, model, start(model, e), sampler, seed=1))
                numbers = rates(outputs)
                key = "asr" if "asr" in numbers else "hit_rate"
                numbers |= {f"{key}_of_clean_outputs": rates(clean)[key]}
                numbers["diversity_ratio"] = diversity_ratio(outputs, clean)
                numbers["moved"] = paired_drift(outputs, clean) / max(pairwise_mse(clean), 1e-12)
                if target.images is None:
                    numbers["ssim"] = ssim_to_target(outputs, (target.image / 2 + 0.5).to(outputs))
                found["samplers"][f"{sampler} {case}".strip()] = numbers
        if before is not None:
            found["drift"] = {
                name: {"mse": paired_drift(before[name], x), "share": paired_drift(before[name], x) / spread}
                for name, x in plain.items() if (spread := pairwise_mse(before[name])) > 0
            }  # fmt: skip
        return found


def judge_repairs(
    folder: Path, yardstick: Yardstick, repairs: list[str], data: Sequence[str] = DATA, *, rescan: bool = False,
    harm: bool = False, strength: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One scan of the folder that is told nothing, then every repair with each of data.

    real: the first tenth of the base's. rescan: ours as `elijah clean` does it, with rescans until one is clean. harm:
    what a repair of a trigger that is none does, beside plain fine-tuning. strength: how fast the same attack comes
    back.
    """
    model = load_model(str(folder))
    try:
        detection, report = inspect(model, SCAN, 0, no_progress)
    except Unsupported as error:
        return {"scan": {"verdict": "unsupported", "reason": str(error)}, "repairs": {}}
    result: dict[str, Any] = {
        "scan": {"verdict": report.verdict, "reason": report.reason, "scores": report.scores,
                 "seconds": report.cost.seconds}, "repairs": {},
    }  # fmt: skip
    if report.verdict == "clean" or not detection.findings or yardstick.attack is None:
        return result
    before = yardstick.plain(model)
    result |= {"before": yardstick.outcome(model), "reference": yardstick.outcome(yardstick.reference)}
    if fids := yardstick.fids:
        features = fids.features(model, folder.name)
        result["before"]["fid"] = fids.of(model, folder.name)
        result["reference"]["fid"] = fids.of(yardstick.reference, fids.base)
    images = {
        "synthetic": synthesise(model, enough(model), 0),
        "real": yardstick.real[: max(1, len(yardstick.real) // 10)],
    }
    for name in repairs:
        result["repairs"][name] = {}
        for kind in data:
            try:
                done = repair_of(model, detection, images[kind], name, rescan=rescan and name in OURS)
            except ElijahError as error:  # too few images were left, or it diverged
                result["repairs"][name][kind] = {"failed": str(error)}
                continue
            found = yardstick.outcome(done.model, before)
            found |= {"updates": done.updates, "seconds": done.seconds, "images": len(done.images), "harm": done.harm,
                      "findings": len(done.findings), "rescans": [r.verdict for r in done.rescans],
                      "fires": done.fires}  # fmt: skip
            if fids:
                found["fid"] = fids.beside(done.model, features)
            if strength and name in OURS:
                found["strength"] = comes_back(yardstick, done.model)
            result["repairs"][name][kind] = found
    if strength:
        result["reference"]["strength"] = comes_back(yardstick, yardstick.reference)
    if harm:
        result["harm"] = wrong_trigger(yardstick, model, detection.findings[0], images["synthetic"], before)
    return result


def repair_of(model: Model, detection: Detection, images: Tensor, name: str, *, rescan: bool) -> Removal:
    """One round of a repair, or with rescan all rounds as `elijah clean` does them."""
    if rescan:
        return remove(model, detection, images, SCAN | {"repair": name}, 0, no_progress)
    done, began = Removal(model, [detection.findings[0]]), time.monotonic()
    done.images = screened(model, images, done.findings)
    done.model = REPAIRS[name]()(model, done.findings, done.images, generator=generator_for(0, 11))
    done.model.network.requires_grad_(False)
    done.updates, done.seconds = done.model.updates, time.monotonic() - began
    done.numbers, measured = compare(model, done, detection, 0)
    done.harm = measured.harm
    return done


def wrong_trigger(
    yardstick: Yardstick, model: Model, finding: Finding, images: Tensor, before: dict[str, Tensor]
) -> dict[str, Any]:
    """The clean drift after a repair of a random trigger, as large as the found one, and after plain fine-tuning.

    Fine-tuning takes as many updates as Unshift; the repairs lead away from one of the images.
    """
    g = generator_for(yardstick.seed, 5)
    noise = torch.randn(finding.trigger.shape, generator=g) * (1 if finding.patch is None else finding.patch)
    wrong = replace(
        finding, trigger=noise * finding.trigger.norm() / noise.norm(), distribution=False,
        target=model.encode(images[:1].float() / 127.5 - 1)[0],
    )  # fmt: skip
    found = {}
    repairs: dict[str, Repair] = {
        "unshift": Unshift(),
        "distill": Distill(),
        "erase": Erase(),
        "finetune": FineTune(steps=Unshift().steps),
    }
    for name, repair in repairs.items():
        fixed = repair(model, [wrong], images, generator=generator_for(0, 11), progress=no_progress, checkpoint=None)
        after = yardstick.plain(fixed)
        drift = {key: paired_drift(before[key], x) / pairwise_mse(before[key]) for key, x in after.items()}
        found[name] = {"updates": fixed.updates, "drift_share": drift}
    return found


def comes_back(yardstick: Yardstick, model: Model) -> dict[str, Any]:
    """How fast the same attack with the same trigger succeeds again: success by update, and its mean over updates."""
    attack, success = yardstick.attack, {0: rate_of(yardstick, model)}
    loss = partial(attack.loss, r=attack.trigger.image) if hasattr(attack, "bound") else attack.loss
    attacked, rows = model.clone(), model.prepare(yardstick.real)

    def each(k: int, m: Model) -> None:
        if k in STRENGTH_UPDATES:
            m.network.eval()
            success[k] = rate_of(yardstick, m)
            m.network.train()

    last, tuning = STRENGTH_UPDATES[-1], attack.tuning
    optimise(
        attacked, lambda m, g: loss(m, batch(rows, tuning.batch_size, g, flip=tuning.flip), g),
        Optimiser(last, lr=tuning.lr, warmup=5), seed=yardstick.seed, each=each,
    )  # fmt: skip
    x = torch.tensor(sorted(success))
    area = torch.trapezoid(torch.tensor([success[int(k)] for k in x]), x) / last
    return {"success": {str(k): v for k, v in success.items()}, "area": float(area)}


@torch.no_grad()
def rate_of(yardstick: Yardstick, model: Model) -> float:
    """The success of the first case under the first sampler: MSE below 0.01, or hits of the target class."""
    start, target = next(iter(cases(yardstick.attack).values()))
    outputs = draw(yardstick.attack, model, start(model, yardstick.noise(model)), yardstick.samplers[0], seed=1)
    numbers = yardstick.rates(target)(model.pixels(outputs))
    return float(numbers["asr"]["0.01"] if "asr" in numbers else numbers["hit_rate"])
