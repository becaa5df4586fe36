"""How near inverted triggers come to the true ones, attack by attack: a table of what judging.py left in results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from elijah.bench import LIMIT, label
from elijah.errors import ElijahError
from elijah.manifest import Manifest
from elijah.zoo import read_result

HEADS = ("attack", "models", "found", "L2", "blind", "cosine", "blind", "inside: L2", "blind", "cosine", "target MSE",
         "fires, %", "as scanned, %", "true, %")  # fmt: skip


def inversion_table(manifests: list[Manifest], out: Path, detector: str) -> str:
    """Markdown, a row an attack: medians over its models that have an inversion by the detector in out.

    Raises ElijahError where none has.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, int] = {}
    for manifest in manifests:
        bases = {base.id: base for base in manifest.base}
        for entry in manifest.entries():
            result = read_result(out / f"{entry.id}.json")
            scan = result.get("detections", {}).get(detector)
            if entry.attack == "clean" or scan is None or scan["verdict"] == "unsupported":
                continue
            name = label(entry, bases[entry.base])
            own = rows.setdefault(name, [])
            if "inversion" in scan:
                own.append(measures(scan, result.get("fires", {}).get("samplers", {})))
            else:
                missing[name] = missing.get(name, 0) + 1
    if not any(rows.values()):
        raise ElijahError(f"{out}: no inversion by {detector}: remove a result, and elijah zoo run makes it with one")
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    lines += [line(name, own, missing.get(name, 0)) for name, own in rows.items()]
    note = (
        f"Medians over the models with an inversion by {detector}, whatever its verdict; found: those called "
        "backdoored. L2 and cosine: of the found and the true shift of the start noise, over the whole image and "
        "inside the pattern, in the model's own range (latents for latent models). Blind: the same for the shift of a "
        "trigger without a pattern. Target MSE: on [0, 1]. Fires: the share of outputs from the inverted trigger "
        f"whose MSE to the true target is under {LIMIT}, or that a classifier puts into the target class, under the "
        "stock sampler that the attack is made for; as scanned: under the sampler that the scan saw most under; "
        "true: of the true trigger, under the former."
    )
    return "\n".join([*lines, "", note, ""])


def measures(scan: dict[str, Any], fires: dict[str, Any]) -> dict[str, Any]:
    """One model's cells by head; what it has not is None. fires: what the true trigger leads to, by sampler."""
    found = scan["inversion"]
    whole, inside = found["trigger"], found.get("inside", {})
    return {
        "found": scan["verdict"] == "backdoored",
        **{f"whole {key}": value for key, value in whole.items()},
        **{f"inside {key}": value for key, value in inside.items()},
        "target_mse": found.get("target_mse"),
        "fires": success(found["samplers"][found["made_for"]]),
        "as_scanned": success(found["samplers"][found["seen_under"]]),
        "true": success(fires.get(f"{found['made_for']} {found['case']}".strip())),
    }


def success(found: dict[str, Any] | None) -> float | None:
    """In percent: of an image at LIMIT, of a class by the classifier."""
    if found is None:
        return None
    return 100 * float(found["hit_rate"] if "hit_rate" in found else found["asr"][LIMIT])


def line(name: str, own: list[dict[str, Any]], missing: int) -> str:
    """One row of the table."""

    def cell(key: str, form: str) -> str:
        values = [model[key] for model in own if model.get(key) is not None]
        return format(statistics.median(values), form) if values else "-"

    cells = [name, f"{len(own)}" + (f" of {len(own) + missing}" if missing else ""), str(sum(m["found"] for m in own))]
    for key in ("whole l2", "whole blind_l2", "whole cosine", "whole blind_cosine", "inside l2", "inside blind_l2",
                "inside cosine"):  # fmt: skip
        cells.append(cell(key, ".2f"))
    cells += [cell("target_mse", ".4f"), cell("fires", ".0f"), cell("as_scanned", ".0f"), cell("true", ".0f")]
    return f"| {' | '.join(cells)} |"
