"""Whether the guard on quality sees a repair's harm: what it measures on a model's own samples, beside the denoising
loss on images that nobody trained on, after three or four repairs of each of five development models.

    ELIJAH_DATA=... python experiments/guard.py

The DDPM models' weights are in zoo/weights; the NCSN model is built in cache, in about ten minutes, unless it is there.
Writes results/guard/guard.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from elijah.clean import enough
from elijah.data import to_uint8
from elijah.diffusion import Model, generator_for, no_progress
from elijah.files import write_file
from elijah.guard import image_loss, quality
from elijah.judging_repairs import SCAN
from elijah.manifest import read_manifest
from elijah.repairs import REPAIRS, Unshift
from elijah.scan import inspect
from elijah.synthetic import screened, synthesise
from elijah.zoo import build, held_out

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "d-ncsn-22_villandiffusion_hello-kitty_corner_p05_s130": ("ncsn", "cache"),
    "d-cifar10_baddiffusion_box-6_corner_p03_s111": ("development", "zoo/weights"),
    "d-celeba_trojdiff_white_corner_p05_s114": ("development", "zoo/weights"),
    "d-mnist_trojdiff_hello-kitty_mnist-7_p05_s115": ("development", "zoo/weights"),
    "d-mnist_villandiffusion_glasses_corner_p05_s121": ("development", "zoo/weights"),
}
HEAD = """\
Drift, diversity: of clean samples, as the guard has them. Loss: of denoising, after over before: on the images that the
repair had; on fresh samples of the model, and on those at half contrast, of which the guard takes the larger; on images
that nobody trained on. Harm: what the guard says.

| model | repair | drift | diversity | loss, its images | fresh samples | half contrast | unseen images | harm |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    torch.set_num_threads(1)
    lines = [HEAD]
    for name, (which, cache) in MODELS.items():
        manifest = read_manifest(ROOT / "zoo" / f"{which}.toml")
        entry, bases = next(e for e in manifest.entries() if e.id == name), {base.id: base for base in manifest.base}
        model, _ = build(entry, bases, ROOT / cache / manifest.name, manifest.digests())
        repairs = {"unshift": Unshift(), "prune": REPAIRS["prune"](), "finetune": REPAIRS["finetune"]()}
        if model.exploding:  # where sigma is 0.2 T's, as it was
            repairs = {"unshift from 0.2 T": Unshift(sigma_min=float(model.s[model.T // 5]))} | repairs
        detection = inspect(model, SCAN, 0, no_progress)[0]
        findings, sampler = detection.findings[:1], detection.evidence[0].sampler
        images = screened(model, synthesise(model, enough(model), 0), findings)
        before, unseen = drawn(model, sampler), held_out(bases[entry.base])
        fresh = [to_uint8((before * 2 - 1) * contrast) for contrast in (1.0, 0.5)]
        for repair, run in repairs.items():
            fixed = run(model, findings, images, generator=generator_for(0, 11))
            seen = quality(model, fixed, before, drawn(fixed, sampler))
            losses = (image_loss(fixed, x) / image_loss(model, x) for x in (images, *fresh, unseen))
            numbers = " | ".join(f"{x:.2f}" for x in (seen.drift, seen.diversity, *losses))
            lines.append(f"| {name} | {repair} | {numbers} | {'; '.join(seen.harm) or '-'} |")
            print(lines[-1], flush=True)
    out = ROOT / "results" / "guard"
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "guard.md", "\n".join(lines) + "\n")
    return 0


@torch.no_grad()
def drawn(model: Model, sampler: str) -> torch.Tensor:
    """Clean samples as clean's guard draws them, [N, C, H, W] on [0, 1]."""
    e = model.noise(8 if model.exploding else 16, generator_for(0, 3))
    return model.pixels(model.sample(e, sampler, seed=0))


if __name__ == "__main__":
    sys.exit(main())
