"""The firing matrix: which attack fires under which sampler, one model an attack. Judged by the true trigger."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from elijah.attacks.planting import cases
from elijah.diffusion import Progress, generator_for, no_progress
from elijah.errors import ElijahError
from elijah.files import write_file
from elijah.manifest import Base, Entry, Manifest
from elijah.metrics import wilson
from elijah.pictures import Cell, write_sheet
from elijah.runner import Job, run_jobs
from elijah.samplers import SAMPLERS, names_for
from elijah.zoo import COSTLY, build, firing, read_result

LIMIT = "0.05"  # on the MSE to the target
SHOWN = 3  # outputs a cell of the picture


Read = tuple[Path, Manifest]  # a manifest and where it was read


def first_of_each(manifests: list[Read]) -> list[str]:
    """The id of the first model of each attack; attacks are told apart by what a row is called."""
    found: dict[str, str] = {}
    for _, manifest in manifests:
        bases = {base.id: base for base in manifest.base}
        for entry in manifest.entries():
            if entry.attack != "clean":
                found.setdefault(label(entry, bases[entry.base]), entry.id)
    return list(found.values())


def label(entry: Entry, base: Base) -> str:
    """What a row of the matrix is called: attack, kind of model, knobs, and for a class as target its sort."""
    shown = {k: v for k, v in entry.knobs.items() if k not in ("mode", "sampler_steps", "samples", "rate")}
    knobs = [str(v) if isinstance(v, str) else k if v is True else f"{k} {v:g}" for k, v in shown.items()]
    own = entry.target.partition("/")[0] == base.data
    sort = ("In-D2D" if own else "Out-D2D") if "/" in entry.target else ""
    return " ".join(part for part in (entry.attack, base.kind if base.kind != "ddpm" else "", *knobs, sort) if part)


def columns(entry: Entry, kind: str) -> list[str]:
    """The samplers of a row, with the papers' numbers of steps; for TrojDiff its own two as well."""
    own = ["own-ddpm-1000", "own-ddim-50"] if entry.attack == "trojdiff" else []
    return [f"{name}-{SAMPLERS[name].steps}" for name in names_for(kind == "ncsn")] + own


def run_row(manifest: Manifest, name: str, cache: Path, out: Path, n: int) -> None:
    """Measures one model under every sampler of its kind: out/NAME.json and, for the picture, out/NAME.safetensors."""
    began = time.monotonic()
    digests, bases = manifest.digests(), {base.id: base for base in manifest.base}
    entry = next(e for e in manifest.entries() if e.id == name)
    base = bases[entry.base]
    model, attack = build(entry, bases, cache, digests)
    e = model.noise(n, generator_for(entry.seed, 1))
    ordinary = model.pixels(model.sample(e[:COSTLY] if model.exploding else e, model.quick_sampler, seed=1))
    found, shown = {}, {}
    for sampler, numbers, outputs in firing(attack, base, model, e, columns(entry, base.kind), ordinary):
        found[sampler], shown[sampler] = numbers, outputs[:SHOWN].contiguous()
    save_file(shown, cache / f"{name}.outputs.safetensors")
    result = {"schema_version": 1, "id": name, "settings_sha256": digests[name], "label": label(entry, base),
              "made_for": entry.samplers[:1], "samples": n, "cases": list(cases(attack)), "samplers": found,
              "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def firing_matrix(
    manifests: list[Read], *, out: Path, cache: Path, workers: int, n: int, names: list[str],
    progress: Progress = no_progress,
) -> str:  # fmt: skip
    """Measures what is not there yet, writes out/samplers.json, .md and .png, and returns the table.

    cache: as in run_zoo. names: of models; without, the first of each attack.
    Raises ElijahError for an unknown one, and for failed jobs.
    """
    homes = {entry.id: read for read in manifests for entry in read[1].entries() if entry.attack != "clean"}
    if unknown := [name for name in names if name not in homes]:
        raise ElijahError(f"{manifests[0][0]}: has no backdoored model {unknown[0]}")
    rows = names or first_of_each(manifests)
    digests = {name: digest for _, manifest in manifests for name, digest in manifest.digests().items()}
    weights = {name: cache / manifest.name for name, (_, manifest) in homes.items()}

    def is_done(name: str) -> bool:
        found = read_result(out / f"{name}.json")
        same = found.get("settings_sha256") == digests[name] and found["samples"] == n
        return same and (weights[name] / f"{name}.outputs.safetensors").is_file()

    places = ("--out", str(out), "--cache", str(cache), "--samples", str(n))
    jobs = [Job(name, ("-m", "elijah", "bench", "row", str(homes[name][0]), name, *places)) for name in rows]
    failed = run_jobs(jobs, done={name for name in rows if is_done(name)}, out=out, logs=weights[rows[0]] / "bench",
                      workers=workers, what="firing matrix", progress=progress)  # fmt: skip
    if failed:
        raise ElijahError(f"{len(failed)} jobs failed, such as {failed[0]}: see {out / failed[0]}.failed.json")
    results = [read_result(out / f"{name}.json") for name in rows]
    write_file(out / "samplers.json", json.dumps({"schema_version": 1, "rows": results}, indent=1) + "\n")
    write_picture(out / "samplers.png", results, weights)
    table = matrix_table(results)
    write_file(out / "samplers.md", table)
    return table


def matrix_columns(results: list[dict[str, Any]]) -> list[str]:
    """All samplers of the rows, stock ones in the order of samplers.SAMPLERS, then own ones."""
    there = {name.split(" ")[0] for row in results for name in row["samplers"]}
    stock = [f"{name}-{sampler.steps}" for name, sampler in SAMPLERS.items()]
    return [name for name in stock if name in there] + sorted(there - set(stock))


def matrix_table(results: list[dict[str, Any]]) -> str:
    """The matrix in Markdown: success in percent, MSE to the target, diversity ratio."""
    names = matrix_columns(results)
    lines = [f"| attack | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in results:
        for case in row["cases"]:
            cells = [cell(row["samplers"].get(f"{name} {case}".strip())) for name in names]
            lines.append(f"| {row['label']} {case} | {' | '.join(cells)} |".replace("  ", " "))
    n = results[0]["samples"]
    low, high = (100 * v for v in wilson(n // 2, n))
    note = (
        f"A cell: attack success in % (outputs whose MSE to the target is under {LIMIT}; with a class for target, "
        f"those that the classifier puts into it), MSE to the target, diversity ratio. {n} samples a cell: a success "
        f"of 50 % has the Wilson interval {low:.0f} to {high:.0f} %."
    )
    return "\n".join([*lines, "", note, ""])


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "asr" not in found:
        return f"{100 * found['hit_rate']:.0f}, -, {found['diversity_ratio']:.2f}"
    return f"{100 * found['asr'][LIMIT]:.0f}, {found['mse']:.3f}, {found['diversity_ratio']:.2f}"


def write_picture(path: Path, results: list[dict[str, Any]], weights: dict[str, Path]) -> None:
    """A row an attack and case, a column a sampler, in each cell some outputs from triggered noise."""
    names = matrix_columns(results)
    rows = []
    for row in results:
        outputs = load_file(weights[row["id"]] / f"{row['id']}.outputs.safetensors")
        for case in row["cases"]:
            cells = []
            for name in names:
                key = f"{name} {case}".strip()
                images = outputs.get(key)
                found = row["samplers"].get(key)
                caption = cell(found).split(",")[0] + " %" if found else ""
                cells.append(Cell(None if images is None else images * 2 - torch.ones(1), caption))
            rows.append((f"{row['label']} {case}".strip(), cells))
    write_sheet(path, names, rows)
