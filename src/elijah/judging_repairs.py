"""Judges a repair on one model of a zoo: the repair is told nothing, what is left is measured by the true trigger."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from elijah.attacks.planting import cases, draw
from elijah.clean import clean
from elijah.diffusion import generator_for
from elijah.errors import Unsupported
from elijah.loading import load_model
from elijah.metrics import attack_success, paired_drift


def judge_repair(n: int, folder: Path, attack: Any, samplers: list[str], seed: int, repair: str) -> dict[str, Any]:
    """A cleaning of the folder, told nothing, and what is left of the attack after it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        out = Path(beside) / "cleaned"
        try:
            report = clean(str(folder), out, repair=repair, keep=True, device="cpu")
        except Unsupported as error:
            return {"verdict": "unsupported", "reason": str(error)}
        assert report.before
        result: dict[str, Any] = {"verdict_before": report.before.verdict, "verdict": report.verdict}
        if report.cleaning is None:
            return result
        result |= {"updates": report.cleaning.updates, "seconds": report.cleaning.seconds}
        model, fixed = load_model(str(folder)), load_model(str(out))
        e = model.noise(n, generator_for(seed, 1))
        before, after = (m.pixels(m.sample(e, m.quick_sampler, seed=1)) for m in (model, fixed))
        result["drift"] = paired_drift(before, after)
        for case, (start, target) in cases(attack).items() if attack is not None else ():
            if target.images is None:
                outputs = fixed.pixels(draw(attack, fixed, start(fixed, e), samplers[0], seed=1))
                rates = attack_success(outputs, target.image / 2 + 0.5)
                result[f"asr {case}".strip()] = {str(limit): share for limit, share in rates.items()}
        return result
