"""How well a mirrored trigger fits where one was found: at a backdoor, and at what clean networks answer.

    python experiments/mirrored.py

The shipped development models with a BadDiffusion trigger and one of 32 x 32, one seed each, and three seeds of the
latter's clean network (both built if they are not there: hours, and ELIJAH_DATA). Every hypothesis of the two
families is listed. Five minutes on one core. Writes results/mirrored/mirrored.md.
"""

from __future__ import annotations

from pathlib import Path

from elijah.detection import Finding
from elijah.detectors import LossFit
from elijah.detectors.hypothesis import FAMILIES, Hypothesis
from elijah.detectors.outputs import MIRRORINGS, change
from elijah.diffusion import Model, generator_for
from elijah.files import write_file
from elijah.loading import load_model
from elijah.manifest import read_manifest
from elijah.zoo import build, build_base

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, CACHE = ROOT / "zoo" / "weights" / "development", ROOT / "cache" / "cifar10-32"
BASE, ATTACKED = "c32", "c32_baddiffusion_stop-sign-14_hat_p03_s211"


def main() -> None:
    manifest = read_manifest(ROOT / "zoo" / "cifar10-32.toml")
    bases = {base.id: base for base in manifest.base}
    build_base(bases[BASE], bases, CACHE, manifest.digests())
    build(next(e for e in manifest.entries() if e.id == ATTACKED), bases, CACHE, manifest.digests())
    shipped = [path for path in sorted(SHIPPED.glob("*_baddiffusion_*")) if path.is_dir()]
    lines = [
        "| model | seed | verdict | family | loss ratio | fits | mirrored / own | mirroring changes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, seeds in ((CACHE / BASE, (0, 1, 2)), *((path, (0,)) for path in (CACHE / ATTACKED, *shipped))):
        model = load_model(str(path))
        for seed in seeds:
            detection = LossFit()(model, generator=generator_for(seed, 1))
            for finding in detection.findings:
                if row := mirrored_row(model, finding):
                    lines.append(f"| {path.name} | {seed} | {detection.verdict} | {row} |")
                    print(lines[-1], flush=True)
    out = ROOT / "results" / "mirrored" / "mirrored.md"
    out.parent.mkdir(exist_ok=True)
    write_file(out, "\n".join(lines) + "\n")


def mirrored_row(model: Model, finding: Finding) -> str:
    """The last cells of a row; empty for other families."""
    family = next(f for f in FAMILIES if f.matches == finding.matches)
    dims = max(MIRRORINGS, key=lambda dims: change(finding.trigger, dims))
    if not family.mirrored or finding.target is None:
        return ""
    with model.frozen():
        own, other = (
            LossFit().search.score(
                model, Hypothesis(family, finding.trigger.flip(by), finding.target.flip(by)), generator_for(3)
            )
            for by in ((), dims)
        )
    fits = "yes" if finding.loss_ratio <= family.max_loss_ratio else "no"
    return f"{family.name} | {own:.3f} | {fits} | {other / own:.2f} | {change(finding.trigger, dims):.2f}"


if __name__ == "__main__":
    main()
