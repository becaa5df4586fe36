"""Scan one demo model, and clean the other: scan, repair, scan again.

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
        report = scan(str(models / "model-a"), device="cpu")
        print(f"model-a: {report.verdict}, because {report.reason}")

        cleaned = clean(str(models / "model-b"), out / "model-b-clean", device="cpu")  # scans, repairs, scans again
        if cleaned.before:
            print(f"model-b: {cleaned.before.verdict}, because {cleaned.before.reason}")
        print(f"model-b, repaired: {cleaned.verdict}, because {cleaned.reason}")

    (out / "model-a.html").write_text(render(report, "html"), encoding="utf-8")
    (out / "model-b.html").write_text(render(cleaned, "html"), encoding="utf-8")
    if cleaned.cleaning and cleaned.cleaning.out:
        model = load_model(cleaned.cleaning.out)
        images = model.sample(model.noise(4, generator_for(0)), "ddim-20")
        print(f"{cleaned.cleaning.out}: draws images of {list(images.shape[1:])}")
    print(f"Pages to look at are in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="elijah-")))
