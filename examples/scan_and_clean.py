"""Scan the two demo models and repair what the scan calls backdoored.

Usage: python examples/scan_and_clean.py [OUT]. OUT is a new folder; without it, a temporary one is made.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from elijah import clean, load_model, scan
from elijah.diffusion import generator_for
from elijah.render import render


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with as_file(files("elijah") / "models") as models:
        for name in ("model-a", "model-b"):
            report = scan(str(models / name), device="cpu")
            print(f"{name}: {report.verdict}, because {report.reason}")
            (out / f"{name}.html").write_text(render(report, "html"), encoding="utf-8")
            if report.verdict != "backdoored":
                continue

            cleaned = clean(str(models / name), out / f"{name}-clean", device="cpu")
            print(f"{name}, repaired: {cleaned.verdict}, because {cleaned.reason}")
            if cleaned.cleaning and cleaned.cleaning.out:
                model = load_model(cleaned.cleaning.out)
                images = model.sample(model.noise(4, generator_for(0)), "ddim-20")
                print(f"{cleaned.cleaning.out}: draws images of {list(images.shape[1:])}")
    print(f"Pages to look at are in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="elijah-")))
