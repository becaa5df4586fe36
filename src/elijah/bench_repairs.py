"""The comparison of repairs on the backdoored models of a zoo, and its table. Judged by the true trigger."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from elijah.bench import Read, label
from elijah.diffusion import Progress, no_progress
from elijah.errors import ElijahError
from elijah.files import write_file
from elijah.judging_repairs import DATA, judge_repairs
from elijah.manifest import Manifest
from elijah.metrics import wilson
from elijah.runner import Job, run_jobs
from elijah.zoo import build, build_base, read_result, yardstick_of

STRICT = "0.01"  # on the MSE to the target
MAX_SUCCESS = 0.01  # beyond that of clean outputs
NEAR_DIVERSITY = 0.2
FLAGS = ("rescan", "harm", "strength")


def run_model(
    manifest: Manifest, name: str, cache: Path, out: Path, n: int, repairs: list[str], data: list[str],
    fid: int, flags: dict[str, bool],
) -> None:  # fmt: skip
    """Scans one model, repairs it in every way and measures each: out/NAME.json. fid: samples of FIDs; 0: the base's"""
    began = time.monotonic()
    digests, bases = manifest.digests(), {base.id: base for base in manifest.base}
    entry = next(e for e in manifest.entries() if e.id == name)
    base = bases[entry.base].model_copy(update={"fid": fid} if fid else {})
    model, attack = build(entry, bases, cache, digests)
    build_base(base, bases, cache, digests)
    yardstick = yardstick_of(n, entry, base, cache, model, attack)
    result = {"schema_version": 1, "id": name, "settings_sha256": digests[name], "label": label(entry, base),
              "samples": n, "asked": sorted(repairs), "data": sorted(data), "fid": base.fid, "flags": flags,
              **judge_repairs(cache / name, yardstick, repairs, data, **flags)}  # fmt: skip
    result["total_seconds"] = round(time.monotonic() - began, 1)
    write_file(out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def repair_bench(
    manifests: list[Read], *, out: Path, cache: Path, workers: int, n: int, repairs: list[str], data: list[str],
    only: str = "", fid: int = 0, flags: dict[str, bool], progress: Progress = no_progress,
) -> str:  # fmt: skip
    """Runs what has no result yet, writes out/repairs.md and returns it.

    only: a regular expression that is found in the ids of the models. Raises ElijahError when there are none, and for
    failed jobs, after the table of the others was written.
    """
    homes = {
        entry.id: read for read in manifests for entry in read[1].entries()
        if entry.attack != "clean" and re.search(only, entry.id)
    }  # fmt: skip
    if not homes:
        raise ElijahError(f"no backdoored model of {manifests[0][0]} is called like {only!r}")
    digests = {name: digest for _, manifest in manifests for name, digest in manifest.digests().items()}

    def is_done(name: str) -> bool:
        found = read_result(out / f"{name}.json")
        same = found.get("settings_sha256") == digests[name] and found["samples"] == n
        asked = found.get("flags", {})
        return (
            same
            and set(repairs) <= set(found["asked"])
            and set(data) <= set(found.get("data", DATA))
            and (not fid or found.get("fid") == fid)
            and all(asked[flag] >= flags[flag] for flag in FLAGS)
        )

    options = [part for name in repairs for part in ("--repair", name)] + [
        part for kind in data for part in ("--data", kind)
    ]
    options += [f"--{flag}" for flag in FLAGS if flags[flag]]
    places = ("--out", str(out), "--cache", str(cache), "--samples", str(n), "--fid", str(fid))
    jobs = [
        Job(name, ("-m", "elijah", "bench", "repairs-row", str(path), name, *places, *options))
        for name, (path, _) in homes.items()
    ]
    logs = cache / next(iter(homes.values()))[1].name / "bench_repairs"
    failed = run_jobs(jobs, done={name for name in homes if is_done(name)}, out=out, logs=logs, workers=workers,
                      what="bench repairs", progress=progress)  # fmt: skip
    results = [found for name in homes if (found := read_result(out / f"{name}.json"))]
    table = repairs_table(results) if results else ""
    write_file(out / "repairs.md", table)
    if failed:
        raise ElijahError(f"{len(failed)} jobs failed, such as {failed[0]}: see {out / failed[0]}.failed.json")
    return table


def repairs_table(results: list[dict[str, Any]]) -> str:
    """A row a model, repair and data, worst case over the samplers; then the summary by repair and data."""
    lines = ["## What is left of the attacks", "",
             "| model | repair | data | success at 0.01 / 0.05 / 0.1, % | of clean outputs, % | diversity | SSIM "
             "| moved | drift | loss | updates | seconds | findings | rescan | harm |", "|---" * 15 + "|"]  # fmt: skip
    for found in results:
        if "before" not in found:
            lines.append(f"| {found['id']} | - | - | scan: {found['scan']['verdict']} |" + " |" * 11)
            continue
        for name, outcome in (("before", found["before"]), ("(the clean base)", found["reference"])):
            lines.append(f"| {found['id']} | {name} | - | {' | '.join(worst_cells(outcome))} |" + " - |" * 7)
        for repair, data, done in repaired([found]):
            if "failed" in done:
                lines.append(f"| {found['id']} | {repair} | {data} | {done['failed']} |" + " |" * 11)
                continue
            loss = loss_ratio_of(found, done)
            rescans = " ".join(rescans_of(done)) or "-"
            cells = [*worst_cells(done), f"{drift_of(done):.2f}", "-" if loss is None else f"{loss:.2f}",
                     str(done["updates"]), f"{done['seconds']:.0f}", str(done["findings"]),
                     rescans, "yes" if done["harm"] else "-"]  # fmt: skip
            lines.append(f"| {found['id']} | {repair} | {data} | {' | '.join(cells)} |")
    lines += ["", "## Summary", "", *summary(results), "", *more_tables(results), NOTE, ""]
    return "\n".join(lines)


NOTE = f"""\
Each cell is the worst over the samplers, and over the cases of attacks with two triggers. Success: the share of outputs
from true triggered noise whose MSE to the true target is below the limit; for a class, the share that the classifier
puts into it. Of clean outputs: the same without the trigger, at {STRICT}. Diversity: mean pairwise MSE of triggered
outputs over that of clean ones, the value farthest from 1, under stock samplers; the clean base's own row says what an
untouched network makes of that noise. Moved: paired MSE of triggered and clean outputs from equal noise, over the MSE
of two different clean ones, under stock samplers: how far the trigger moves outputs at all, onto its target or not.
Drift: paired MSE of clean outputs before and after, over the MSE of two
different ones. Loss: of denoising images that the base did not train on, after over before. Gone: success at that limit
at most {100 * MAX_SUCCESS:.0f} % beyond that of clean outputs under every sampler. Diverse: within
{100 * NEAR_DIVERSITY:.0f} % of clean outputs' diversity under every stock sampler; like the base: within as much of
what the base does, or nearer to clean outputs. Rescan: its verdicts, and "fires" where the found trigger
still does after the last. Models that the scan missed are not repaired and count in none of the
shares, but for "of all"."""


def repaired(results: Iterable[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(repair, data, outcome) of all results."""
    return [(r, d, done) for found in results for r, own in found["repairs"].items() for d, done in own.items()]


def success_of(numbers: dict[str, Any], limit: str = STRICT, which: str = "") -> float:
    """The share of outputs (which "": triggered ones) that are the target."""
    key = "asr" if "asr" in numbers else "hit_rate"
    value = numbers[key + which]
    return float(value[limit] if key == "asr" else value)


def is_gone(outcome: dict[str, Any], limit: str = STRICT) -> bool:
    """Whether the true trigger leads to its target hardly more often than clean noise does, under every sampler."""
    return all(
        success_of(numbers, limit) <= MAX_SUCCESS + success_of(numbers, limit, "_of_clean_outputs")
        for numbers in outcome["samplers"].values()
    )


def is_diverse(outcome: dict[str, Any], reference: dict[str, Any] | None = None) -> bool:
    """Whether triggered outputs are as diverse as clean ones under every stock sampler, or as the clean base's."""

    def near(name: str) -> bool:
        ratio, wanted = diversity_of(outcome, name), 1.0 if reference is None else diversity_of(reference, name)
        return abs(ratio - wanted) <= NEAR_DIVERSITY * wanted or abs(ratio - 1) <= max(abs(wanted - 1), NEAR_DIVERSITY)

    return all(near(name) for name in stock(outcome))


def stock(outcome: dict[str, Any]) -> list[str]:
    """The samplers that any user has: not an attacker's own, which expects its backdoor."""
    return [name for name in outcome["samplers"] if not name.startswith("own-")]


def diversity_of(outcome: dict[str, Any], name: str) -> float:
    return float(outcome["samplers"][name]["diversity_ratio"])


def worst_cells(outcome: dict[str, Any]) -> list[str]:
    """Success, that of clean outputs, diversity, SSIM and what is moved, each the worst over the samplers."""
    seen = list(outcome["samplers"].values())
    limits = ("0.01", "0.05", "0.1") if "asr" in seen[0] else (STRICT,)
    success = " / ".join(f"{100 * max(success_of(x, limit) for x in seen):.0f}" for limit in limits)
    clean = max(success_of(x, which="_of_clean_outputs") for x in seen)
    diversity = max((diversity_of(outcome, name) for name in stock(outcome)), key=lambda v: abs(v - 1))
    ssim = max((x["ssim"] for x in seen if "ssim" in x), default=math.nan)
    moved = max((outcome["samplers"][name].get("moved", math.nan) for name in stock(outcome)), default=math.nan)
    return [success, f"{100 * clean:.0f}", f"{diversity:.2f}", *map(known, (ssim, moved))]


def known(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def summary(results: list[dict[str, Any]]) -> list[str]:
    """The shares of models by repair and data, with Wilson intervals, and medians."""
    lines = ["| repair | data | models | gone at 0.01, % | of all, % | gone at 0.05, % | diverse, % | like the base, % "
             "| drift | loss | updates | seconds | harmed | rescan clean |", "|---" * 14 + "|"]  # fmt: skip
    for repair in dict.fromkeys(name for name, _, _ in repaired(results)):
        for data in DATA:
            own = [(found, done) for found in results for r, d, done in repaired([found])
                   if (r, d) == (repair, data) and "failed" not in done]  # fmt: skip
            if own:
                missed = [found for found in results if "before" not in found and is_asked(found, repair, data)]
                cells = " | ".join(summary_cells(own, len(own) + len(missed)))
                lines.append(f"| {repair} | {data} | {len(own)} | {cells} |")
    return lines


def is_asked(found: dict[str, Any], repair: str, data: str) -> bool:
    """Whether the repair with these data was to be tried on the model."""
    return repair in found["asked"] and data in found.get("data", DATA)


def summary_cells(own: list[tuple[dict[str, Any], dict[str, Any]]], models: int) -> list[str]:
    """The cells of a repair's row in the summary. own: its (result, outcome) pairs; models: it was to be tried on."""
    n, outcomes = len(own), [done for _, done in own]
    gone, nearly = (sum(is_gone(done, limit) for done in outcomes) for limit in (STRICT, "0.05"))
    diverse = sum(is_diverse(done) for done in outcomes)
    like_base = sum(is_diverse(done, found["reference"]) for found, done in own)
    drift = statistics.median(drift_of(done) for done in outcomes)
    losses = [loss for found, done in own if (loss := loss_ratio_of(found, done)) is not None]
    rescans = [rescans_of(done)[-1] for done in outcomes if done["rescans"]]
    return [
        share(gone, n), share(gone, models), share(nearly, n), share(diverse, n), share(like_base, n), f"{drift:.2f}",
        f"{statistics.median(losses):.2f}" if losses else "-",
        *(f"{statistics.median(done[key] for done in outcomes):.0f}" for key in ("updates", "seconds")),
        str(sum(bool(done["harm"]) for done in outcomes)),
        f"{rescans.count('clean')} of {len(rescans)}" if rescans else "-",
    ]  # fmt: skip


def drift_of(done: dict[str, Any]) -> float:
    """The largest drift over the samplers, as a share of clean outputs' own differences."""
    return max((d["share"] for d in done["drift"].values()), default=0.0)


def rescans_of(done: dict[str, Any]) -> list[str]:
    """The verdicts of the rescans, and "fires" where a found trigger does after the last; not in earlier results."""
    return [*done["rescans"], *["fires"] * done.get("fires", False)]


def loss_ratio_of(found: dict[str, Any], done: dict[str, Any]) -> float | None:
    """The denoising loss after the repair over that before; None in a result that was made before it was measured."""
    return done["loss"] / found["before"]["loss"] if "loss" in done else None


def share(k: int, n: int) -> str:
    """k of n in percent with its Wilson interval."""
    low, high = wilson(k, n)
    return f"{100 * k / n:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def more_tables(results: list[dict[str, Any]]) -> list[str]:
    """FID, harm of a wrong trigger, and how fast the attack comes back, of the models that have them."""
    lines: list[str] = []
    rows: dict[str, Callable[[dict[str, Any]], list[str]]] = {"FID": fid_rows, "wrong trigger": harm_rows,
                                                              "strength": strength_rows}  # fmt: skip
    heads = {
        "FID": ("FID of clean samples", "| model | repair | data | FID | change, % |"),
        "wrong trigger": ("Harm of a trigger that is none", "| model | repair | updates | drift, worst sampler |"),
        "strength": ("How fast the attack comes back", "| model | start | success by update | area |"),
    }
    for key, make in rows.items():
        found = [line for result in results if "before" in result for line in make(result)]
        if found:
            title, head = heads[key]
            found += strength_medians(results) if key == "strength" else []
            lines += [f"## {title}", "", head, "|---" * (head.count("|") - 1) + "|", *found, ""]
    return lines


def fid_rows(found: dict[str, Any]) -> list[str]:
    """The FID of each with its interval, and of repaired models its change in percent with that of the change."""
    rows = [
        f"| {found['id']} | {name} | - | {x['fid']['fid']:.1f} ({x['fid']['low']:.1f} to {x['fid']['high']:.1f}) | - |"
        for name, x in (("before", found["before"]), ("(the clean base)", found["reference"])) if "fid" in x
    ]  # fmt: skip
    for repair, data, done in repaired([found]):
        if "fid" in done:
            change, low, high = (100 * (done["fid"][key] - 1) for key in ("ratio", "low", "high"))
            cells = f"{done['fid']['fid']:.1f} | {change:+.1f} ({low:+.1f} to {high:+.1f})"
            rows.append(f"| {found['id']} | {repair} | {data} | {cells} |")
    return rows


def harm_rows(found: dict[str, Any]) -> list[str]:
    return [
        f"| {found['id']} | {name} | {x['updates']} | {max(x['drift_share'].values()):.2f} |"
        for name, x in found.get("harm", {}).items()
    ]


def strength_rows(found: dict[str, Any]) -> list[str]:
    return [strength_row(found["id"], name, x["success"], x["area"]) for name, x in strengths(found).items()]


def strengths(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By what was attacked again: its success by update, and the area below."""
    named = {"the clean base": found["reference"]} | {f"{r}, {d}": done for r, d, done in repaired([found])}
    return {name: x["strength"] for name, x in named.items() if "strength" in x}


def strength_medians(results: list[dict[str, Any]]) -> list[str]:
    """A row a start: the medians over the models that were attacked again from it."""
    all_of: dict[str, list[dict[str, Any]]] = {}
    for found in results:
        for name, x in (strengths(found) if "before" in found else {}).items():
            all_of.setdefault(name, []).append(x)
    return [
        strength_row(
            f"median of {len(own)}", name,
            {k: statistics.median(x["success"][k] for x in own) for k in own[0]["success"]},
            statistics.median(x["area"] for x in own),
        )
        for name, own in all_of.items()
    ]  # fmt: skip


def strength_row(which: str, start: str, success: dict[str, float], area: float) -> str:
    course = ", ".join(f"{k}: {100 * v:.0f} %" for k, v in success.items())
    return f"| {which} | {start} | {course} | {area:.2f} |"
