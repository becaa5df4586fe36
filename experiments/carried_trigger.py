"""How much of a trigger a deterministic sampler carries to its end, in a repaired and in a clean model.

    python experiments/carried_trigger.py

A network that takes the trigger for noise carries it as x_t = (x_t without it) + s_t r, and leaves nothing of it. The
table has the share of r that is in x_t beyond what is there without it, from equal noise. Development models with
weights in zoo/weights; r is what the scan finds. Writes results/carried_trigger/carried.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from elijah.diffusion import Model, generator_for, no_progress
from elijah.files import write_file
from elijah.judging_repairs import SCAN
from elijah.loading import load_model
from elijah.metrics import diversity_ratio
from elijah.repairs import Unshift
from elijah.samplers import make_scheduler
from elijah.scan import inspect
from elijah.synthetic import screened, synthesise

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "zoo" / "weights" / "development"
BACKDOORED, CLEAN = "d-cifar10_baddiffusion_box-6_corner_p03_s111", "d-cifar10_clean_s110"
SAMPLER, SHOWN = "ddim-20", (1, 4, 8, 12, 15, 17, 19, 20)


@torch.no_grad()
def path(model: Model, x: Tensor) -> tuple[list[int], list[Tensor]]:
    """The stock sampler's timesteps, and x before the first step and after each."""
    scheduler, passed = make_scheduler(model.scheduler, SAMPLER), [x]
    for t in scheduler.timesteps:
        passed.append(scheduler.step(model.output(passed[-1], t.expand(len(x))), t, passed[-1]).prev_sample)
    return scheduler.timesteps.tolist(), passed


def main() -> int:
    torch.set_num_threads(1)
    bad, clean = (load_model(str(WEIGHTS / name)) for name in (BACKDOORED, CLEAN))
    detection, report = inspect(bad, SCAN, 0, no_progress)
    findings = detection.findings[:1]
    fixed = Unshift()(bad, findings, screened(bad, synthesise(bad, 512, 0), findings), generator=generator_for(0, 11))
    r, e = findings[0].trigger, bad.noise(32, generator_for(3))
    columns: list[tuple[str, list[float], float | None]] = []
    for name, model in (("repaired by unshift", fixed), ("clean", clean)):
        (t, without), (_, with_r) = path(model, e), path(model, e + r)
        share = [float(((x - y) * r).sum() / (r.square().sum() * len(e))) for x, y in zip(with_r, without, strict=True)]
        columns.append((name, share, diversity_ratio(*(model.pixels(x[-1]) for x in (with_r, without)))))
    columns.insert(0, ("taken for noise", [*bad.s[t].tolist(), 0.0], None))
    lines = [f"{BACKDOORED}: {report.verdict}. Share of the found trigger in x, by the steps of {SAMPLER} that are",
             f"done: after the repair, and of the same trigger in a clean model ({CLEAN}).", "",
             "| steps done | t | " + " | ".join(name for name, *_ in columns) + " |", "|---" * 5 + "|"]  # fmt: skip
    for k in SHOWN:
        at = "-" if k == len(t) else str(t[k])
        lines.append(f"| {k} | {at} | " + " | ".join(f"{share[k]:.2f}" for _, share, _ in columns) + " |")
    ratios = ["-" if ratio is None else f"{ratio:.2f}" for *_, ratio in columns]
    lines.append("| diversity of outputs, with / without | - | " + " | ".join(ratios) + " |")
    out = ROOT / "results" / "carried_trigger" / "carried.md"
    out.parent.mkdir(exist_ok=True)
    write_file(out, "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
