"""Judges a detector on one model of a zoo: the scan is told nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elijah.errors import Unsupported
from elijah.scan import scan


def judge(folder: Path, detector: str) -> dict[str, Any]:
    """A scan of the folder, which is told nothing; for a kind that it cannot scan, the reason."""
    try:
        report = scan(str(folder), detector=detector, device="cpu")
    except Unsupported as error:
        return {"verdict": "unsupported", "reason": str(error)}
    seen = report.model.model_dump(mode="json", include={"kind", "sample_shape", "parameters"})
    return {"verdict": report.verdict, "scores": report.scores, "model": seen, "cost": report.cost.model_dump()}
