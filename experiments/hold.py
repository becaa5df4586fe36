"""Settings of a repair, what they cost and what they leave of the attack, on models of the development set: how hard
the clean answers are held, and where those to scaled noise too; from where on a trigger is asked to fade.

    ELIJAH_DATA=... python experiments/hold.py
    ELIJAH_DATA=... python experiments/hold.py patches
    ELIJAH_DATA=... python experiments/hold.py half
    ELIJAH_DATA=... python experiments/hold.py fading

The models' weights are in zoo/weights; their bases' images are not. Writes results/repair_hold/hold.md, patches.md,
half.md and fading.md.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import torch

from elijah.bench_repairs import drift_of, worst_cells
from elijah.diffusion import generator_for, no_progress
from elijah.files import write_file
from elijah.judging import target_judge
from elijah.judging_repairs import SCAN, USUAL, Yardstick
from elijah.manifest import read_manifest
from elijah.repairs import Unshift
from elijah.scan import inspect
from elijah.synthetic import screened, synthesise
from elijah.zoo import build, held_out, images_of, samplers_of

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "d-cifar10_trojdiff_hello-kitty_cat_p03_s113", "d-mnist_trojdiff_hello-kitty_mnist-7_p05_s115",
    "d-cifar10_villandiffusion_glasses_corner_p05_s122",
)  # fmt: skip
HALF = (
    "d-cifar10_baddiffusion_box-6_corner_p03_s111", "d-celeba_baddiffusion_glasses_cat_p03_s112",
    "d-cifar10_villandiffusion_stop-sign-8_cat_p03_s119", "d-celeba_villandiffusion_box-6_corner_p03_s120",
)  # fmt: skip
MORE = {
    "patches": (
        "d-celeba_trojdiff_white_corner_p05_s114", "d-cifar10_trojdiff_white_mnist-7_p05_s118",
        "d-mnist_trojdiff_white_mnist-7_p05_s116",
    ),
    "half": HALF,
    "fading": (*HALF, "d-cifar10_trojdiff_hello-kitty_cat_p03_s113", "d-celeba_trojdiff_white_corner_p05_s114"),
}  # fmt: skip
REPAIRS = {
    "10, last weights": Unshift(scaled_hold=None, average=None), "10": Unshift(scaled_hold=None),
    "50": Unshift(scaled_hold=None, hold=50.0), "30 to 150, scaled noise as well": Unshift(max_leak=math.inf),
    "as it is": Unshift(),
}  # fmt: skip
GROWING_REPAIRS = {"10": Unshift(growing_hold=None), "10 to 50, as it is": Unshift()} | {
    f"{first:g} to {last:g}": Unshift(growing_hold=(first, last)) for first, last in ((10.0, 150.0), (30.0, 150.0))
}
FADING = {
    "noise and no more": Unshift(fading=None), "fades from 0.1 T": Unshift(fades=(0.1, 0.2)),
    "from 0.3 T, as it is": Unshift(),
}  # fmt: skip
HEAD = """\
Success: of 32 outputs from true triggered noise, under the worst of the samplers, at an MSE of 0.01, or as a classifier
says of a class. Diversity: of triggered outputs over clean ones, the value farthest from 1 under stock samplers. Moved:
how far the trigger moves outputs, and drift: how far the repair moves clean ones, both over two clean samples'
difference, the largest. Loss: of denoising unseen images, after over before.

| model | setting | success, % | of clean outputs, % | diversity | moved | drift | loss |
|---|---|---|---|---|---|---|---|"""


def main() -> int:
    torch.set_num_threads(1)
    what, lines = (sys.argv[1:] or ["hold"])[0], [HEAD]
    settings = FADING if what == "fading" else GROWING_REPAIRS if what in MORE else REPAIRS
    for name in MORE.get(what, MODELS):
        manifest = read_manifest(ROOT / "zoo" / "development.toml")
        entry, bases = next(e for e in manifest.entries() if e.id == name), {base.id: base for base in manifest.base}
        base = bases[entry.base]
        model, attack = build(entry, bases, ROOT / "zoo" / "weights" / manifest.name, manifest.digests())
        samplers = list(dict.fromkeys([*samplers_of(entry, model), *USUAL]))
        rates = partial(target_judge, base=base)
        yardstick = Yardstick(
            attack, rates, samplers, 32, entry.seed, model, images_of(base), held_out(base), None
        )  # fmt: skip
        findings = inspect(model, SCAN, 0, no_progress)[0].findings[:1]
        images = screened(model, synthesise(model, 512, 0), findings)
        plain, loss = yardstick.plain(model), yardstick.outcome(model)["loss"]
        for setting, repair in settings.items():
            fixed = repair(model, findings, images, generator=generator_for(0, 11))
            found = yardstick.outcome(fixed, plain)
            success, of_clean, diversity, _, moved = worst_cells(found)
            numbers = f"{success.split(' / ')[0]} | {of_clean} | {diversity} | {moved} | {drift_of(found):.3f}"
            lines.append(f"| {name} | {setting} | {numbers} | {found['loss'] / loss:.3f} |")
            print(lines[-1], flush=True)
    out = ROOT / "results" / "repair_hold"
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / f"{what}.md", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
