"""Whether faint noise can be led to the target of a learned trigger: in backdoored models, and in their clean bases.

    python experiments/led_back.py

What the last step of `elijah clean` asks of a repaired model. Models of zoo/learned-development.toml, zoo/small.toml
and zoo/learned.toml, which `elijah zoo run` builds, and the bases of each; two seeds. Scoring alone: it reads the true
targets. Needs ten minutes. Writes results/learned/led_back.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from elijah.clean import LED, MOST, lead
from elijah.files import write_file
from elijah.loading import load_model
from elijah.manifest import read_manifest
from elijah.zoo import build

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = "learned-development.toml", "small.toml", "learned.toml"
SEEDS = 2


def main() -> None:
    torch.set_num_threads(1)
    heads = ("model", f"outputs within {LED} of the clean ones' distance: of the clean base", "of the model")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    most, least, learned = 0.0, 1.0, 0
    for path in (ROOT / "zoo" / name for name in MANIFESTS):
        read = read_manifest(path)
        cache, bases, digests = ROOT / "cache" / read.name, {b.id: b for b in read.base}, read.digests()
        for entry in (e for e in read.entries() if e.attack == "learned" and (cache / e.id).is_dir()):
            model, attack = build(entry, bases, cache, digests)
            pair = load_model(str(cache / entry.base)), model
            clean, bad = ([lead(m, [attack.target.image], seed)[0][1] for seed in range(SEEDS)] for m in pair)
            most, least, learned = max(most, *clean), min(least, *bad), learned + 1
            cells = (", ".join(f"{x:.2f}" for x in shares) for shares in (clean, bad))
            lines.append(f"| {entry.id} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += ["", f"{learned} models, {SEEDS} seeds: at most {most:.2f} of the outputs of a clean base, at least "
              f"{least:.2f} of a backdoored model; `elijah clean` repairs on from {MOST}."]  # fmt: skip
    write_file(ROOT / "results" / "learned" / "led_back.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
