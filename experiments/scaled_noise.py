"""Is the scale of the noise a trigger by itself? What models of the development set answer to noise of 0.6 times its
strength, without a trigger: 0 is a clean network's answer, 1 that of TrojDiff's attacker.

    python experiments/scaled_noise.py

The models' weights are in zoo/weights. Writes results/scaled_noise/scaled_noise.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from elijah.data import batch
from elijah.diffusion import generator_for
from elijah.files import write_file
from elijah.loading import load_model
from elijah.repairs.unshift import leak
from elijah.synthetic import synthesise

ROOT = Path(__file__).resolve().parent.parent
SCALE = 0.6
BLEND = "trojdiff_hello-kitty"


def main() -> int:
    lines = [f"Leak: of the way from a clean network's answer to {SCALE} e, to the attacker's, e.", ""]
    lines += ["| model | leak |", "|---|---|"]
    for folder in sorted((ROOT / "zoo" / "weights" / "development").iterdir()):
        if not folder.is_dir() or not (BLEND in folder.name or folder.name.endswith("clean_s110")):
            continue
        model = load_model(str(folder))
        if model.kind == "ddpm":
            x0 = batch(model.prepare(synthesise(model, 64, 0)), 64, generator_for(1))
            lines.append(f"| {folder.name} | {leak(model, SCALE, x0, generator_for(0)):.2f} |")
            print(lines[-1], flush=True)
    out = ROOT / "results" / "scaled_noise"
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "scaled_noise.md", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
