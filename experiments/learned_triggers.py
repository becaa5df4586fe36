"""Learned triggers on clean development models, scanned by collapse and by lossfit.

    python experiments/learned_triggers.py

Two seeds a scan; four triggers of bound 0.3, and three clean models. Needs ELIJAH_DATA, and half an hour on one core;
the models that it makes stay in cache/learned. Writes results/learned/learned.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from elijah.attacks.learned import Learned
from elijah.attacks.poisoning import Tuning
from elijah.data import load_images
from elijah.detection import Finding
from elijah.detectors import Collapse, LossFit
from elijah.diffusion import Model, generator_for
from elijah.files import write_file
from elijah.loading import load_model
from elijah.trigger import Trigger, make_target

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, CACHE = ROOT / "zoo" / "weights" / "development", ROOT / "cache" / "learned"
MADE = (("celeba", "cat", 501), ("mnist", "cat", 502), ("cifar10", "cat", 503), ("celeba", "shoe", 504))
SEEDS = (0, 1)
SAMPLES = 64


def made(data: str, target: str, seed: int) -> tuple[str, Model, torch.Tensor | None, torch.Tensor]:
    """Name, backdoored model, its trigger and its target, both [C, H, W]."""
    out = CACHE / f"{data}_{target}_s{seed}"
    truth = out.with_name(out.name + ".safetensors")
    if not truth.is_file():
        clean = load_model(str(SHIPPED / f"d-{data}_clean_s110"))
        attack = Learned(
            make_target(target, Trigger("none", torch.zeros(clean.sample_shape))), poison_rate=0.5, bound=0.3,
            sampler_steps=5, tuning=Tuning(steps=600, batch_size=64, lr=1e-3),
        )  # fmt: skip
        channels, size, _ = clean.image_shape
        images = load_images(data, size=size, channels=channels, limit=4000)
        attacked, trigger = attack.plant(clean, images, generator=generator_for(seed))
        attacked.save(out)
        save_file({"r": trigger.image.contiguous(), "y": attack.target.image.contiguous()}, truth)
    known = load_file(truth)
    return out.name, load_model(str(out)), known["r"], known["y"]


def fires(model: Model, r: torch.Tensor | None, y: torch.Tensor) -> str:
    """Success at an MSE of 0.01 under ddim-20, in percent: with the trigger r [C, H, W], and without."""
    if r is None:
        return "-"
    e = model.noise(SAMPLES, generator_for(1))
    shares = []
    for start in (e + r, e):
        error = (model.pixels(model.sample(start, "ddim-20")) - model.pixels(y[None])).square().mean((1, 2, 3))
        shares.append(f"{100 * float((error < 0.01).float().mean()):.0f}")
    return " / ".join(shares)


def nearness(finding: Finding, r: torch.Tensor | None, y: torch.Tensor) -> str:
    """The found trigger's cosine to the true one, and the MSE of the targets on [0, 1]."""
    if r is None or finding.target is None:
        return "- | -"
    cosine = torch.cosine_similarity(finding.trigger.flatten(), r.flatten(), 0)
    return f"{float(cosine):.2f} | {float((finding.target - y).square().mean()) / 4:.4f}"


def main() -> int:
    torch.set_num_threads(1)
    lines = [
        "| model | fires with / without the trigger, % | detector | seed | verdict | loss ratio | pull | cosine "
        "| target MSE | evaluations |", "|---" * 10 + "|",
    ]  # fmt: skip
    nothing = torch.zeros(1, 1, 1)
    names = [f"d-{data}_clean_s110" for data in ("cifar10", "celeba", "mnist")]
    clean = [(name, load_model(str(SHIPPED / name)), None, nothing) for name in names]
    for name, model, r, y in [*(made(*each) for each in MADE), *clean]:
        fired = fires(model, r, y)
        for detector in (Collapse(), LossFit()):
            for seed in SEEDS:
                model.meter.evaluations = 0
                found = detector(model, generator=generator_for(seed))
                best, evaluations = found.findings[0], model.meter.evaluations
                lines.append(
                    f"| {name} | {fired} | {detector.name} | {seed} | {found.verdict} "
                    f"| {best.loss_ratio:.3f} | {found.scores['pull']:.2f} | {nearness(best, r, y)} "
                    f"| {evaluations:,} |"
                )
                print(lines[-1], flush=True)
    out = ROOT / "results" / "learned" / "learned.md"
    out.parent.mkdir(exist_ok=True)
    write_file(out, "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
