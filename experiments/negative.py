"""On NCSN: how well the found trigger fits, and how well its negative does, on clean networks and backdoored ones.

    python experiments/negative.py

The development models of kind ncsn, four seeds each: those that ship, and those of zoo/ncsn.toml, which `elijah zoo
run` builds. A few minutes on one core. Writes results/mirrored/negative.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from elijah.detectors.hypothesis import Hypothesis
from elijah.detectors.search import Search
from elijah.diffusion import generator_for, no_progress
from elijah.files import write_file
from elijah.loading import load_model

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    lines = ["| model | seed | loss ratio | fits | negative / own | mean of the trigger |", "|---|---|---|---|---|---|"]
    folders = ROOT / "zoo" / "weights" / "development", ROOT / "cache" / "ncsn"
    for path in [p for folder in folders for p in sorted(folder.glob("d-ncsn*_s*")) if p.is_dir()]:
        model, search = load_model(str(path)), Search()
        for seed in range(4):
            fitted: list[Hypothesis] = []
            with model.frozen():
                search(model, generator_for(seed, 1), fitted, no_progress)
                (h,) = fitted
                other = search.score(model, replace(h, r=-h.r), generator_for(3))
            ratio, fits = other / h.loss_ratio, "yes" if h.fits else "no"
            lines.append(
                f"| {path.name} | {seed} | {h.loss_ratio:.3f} | {fits} | {ratio:.1f} | {float(h.r.mean()):.2f} |"
            )
            print(lines[-1], flush=True)
    out = ROOT / "results" / "mirrored" / "negative.md"
    out.parent.mkdir(exist_ok=True)
    write_file(out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
