"""What the benches of bench_detectors.py found, in Markdown. Here the truth is known: an entry's attack."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from elijah.detectors import DEFAULT
from elijah.metrics import bootstrap_interval
from elijah.rates import VERDICTS, Judged, cells

Result = dict[str, Any]
FEATURE = re.compile(r"(uniformity|total_variation)_\d")  # of elijah, by setting; low where a backdoor fires


def detectors_table(results: list[Result]) -> str:
    """A line a model and detector; then what each detector is worth, and how much longer the others take than the
    default."""
    lines = header("model", "detector", "verdict", "suspicion", "evaluations", "seconds", "outside the network, %")
    for result in results:
        for name, run in scanned(result).items():
            lines.append(row(result["id"], name, run["verdict"], number(run, "suspicion"), *costs(run)))
    kinds = sorted({result["kind"] for result in results})
    groups = {"all": results, **({k: [r for r in results if r["kind"] == k] for k in kinds} if len(kinds) > 1 else {})}
    lines += ["", *header("detector", "models", "backdoored + clean", "AUROC", "95 %", "TPR at no false positive, %",
                          *(f"called {verdict}" for verdict in VERDICTS))]  # fmt: skip
    names = list(dict.fromkeys(name for result in results for name in scanned(result)))
    for name in names:
        for group, own in groups.items():
            lines += worth(name, group, [r for r in own if name in scanned(r)])
    lines += ["", *areas(results, names)]
    lines += ["", *header("detector", "models", "evaluations, median", "seconds, median", "outside the network, %",
                          f"seconds over {DEFAULT}'s, median", "95 %", "range")]  # fmt: skip
    lines += [spent(name, [r for r in results if name in scanned(r)]) for name in names]
    note = (
        "All detectors ran on a model in one process with one thread, one after the other. Suspicion: what is compared "
        "with that of clean models; AUROC: how well it tells backdoored models from clean ones; TPR at "
        "no false positive: the share of backdoored models more suspicious than every clean one. A detector without a "
        "rule of its own calls every model undecided. Intervals: bootstrap over models, as if they were independent. "
        "AUROC by attack: with the numbers of backdoored and of clean models; the features of elijah are those of its "
        "settings, coefficient and sampler, of which the attack's own is what knowing the attack would give."
    )
    return "\n".join([*lines, "", note, ""])


def worth(name: str, group: str, results: list[Result]) -> list[str]:
    """A detector's line: what its suspicion tells of these models, and its verdicts; none where none was scanned."""
    told = [(r["entry"]["attack"] != "clean", r["runs"][name]["scores"].get("suspicion")) for r in results]
    bad = [score for backdoored, score in told if backdoored and score is not None]
    good = [score for backdoored, score in told if not backdoored and score is not None]
    area, interval, found = "-", "-", "-"
    if bad and good:
        area, found = f"{area_under(bad, good):.3f}", f"{100 * np.mean(np.array(bad) > max(good)):.0f}"
        if min(len(bad), len(good)) > 1:
            low, high = bootstrap_interval(area_under, bad, good)
            interval = f"{low:.3f} to {high:.3f}"
    verdicts = [r["runs"][name]["verdict"] for r in results]
    truth = [backdoored for backdoored, _ in told]
    counts = [both(verdict, verdicts, truth) for verdict in VERDICTS]
    return [row(name, group, f"{len(bad)} + {len(good)}", area, interval, found, *counts)] if results else []


def areas(results: list[Result], names: list[str]) -> list[str]:
    """The AUROC of each detector's suspicion and features, over all attacks and for each alone, with its models."""
    attacks = sorted({r["entry"]["attack"] for r in results} - {"clean"})
    lines = header("detector", "score", "AUROC for all attacks", *attacks)
    for name in names:
        runs = [(r["entry"]["attack"], r["runs"][name]["scores"]) for r in results if name in scanned(r)]
        found = dict.fromkeys(key for _, scores in runs for key in scores if FEATURE.match(key))
        for key in ("suspicion", *sorted(found)):
            sign = 1 if key == "suspicion" else -1
            known = [(attack, sign * scores[key]) for attack, scores in runs if key in scores]
            good = [value for attack, value in known if attack == "clean"]
            cells = []
            for wanted in (attacks, *([attack] for attack in attacks)):
                bad = [value for attack, value in known if attack in wanted]
                cells.append(f"{area_under(bad, good):.2f} ({len(bad)} + {len(good)})" if bad and good else "-")
            lines.append(row(name, key, *cells))
    return lines


def both(verdict: str, verdicts: list[str], truth: list[bool]) -> str:
    """How many backdoored and how many clean models got the verdict."""
    found = [backdoored for v, backdoored in zip(verdicts, truth, strict=True) if v == verdict]
    return f"{sum(found)} + {len(found) - sum(found)}"


def area_under(bad: ArrayLike, good: ArrayLike) -> float:
    """The AUROC: how often a backdoored model is more suspicious than a clean one; a tie counts half."""
    difference = np.asarray(bad)[:, None] - np.asarray(good)
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def spent(name: str, results: list[Result]) -> str:
    """A detector's line: what its scans cost, and against the default's scan of the same model."""
    runs = [r["runs"][name] for r in results]
    ratios = [
        r["runs"][name]["cost"]["seconds"] / r["runs"][DEFAULT]["cost"]["seconds"]
        for r in results
        if DEFAULT in scanned(r) and name != DEFAULT
    ]
    ratio, interval, span = "-", "-", "-"
    if ratios:
        ratio, span = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
        if len(ratios) > 1:
            low, high = bootstrap_interval(lambda x: float(np.median(x)), ratios)
            interval = f"{low:.2f} to {high:.2f}"
    return row(name, str(len(runs)), median(runs, "network_evaluations", ",.0f"), median(runs, "seconds", ".1f"),
               f"{statistics.median(map(outside, runs)):.1f}", ratio, interval, span)  # fmt: skip


def stability_table(results: list[Result]) -> str:
    """A line a model: verdicts by seed, and under other settings; then how many differ from the first run's."""
    groups: dict[str, Callable[[str], bool]] = {
        "seed": lambda name: name.startswith("seed-"), "batch size": lambda name: name.startswith("batch-"),
        "threads": lambda name: name.startswith("threads-"), "precision": lambda name: name == "bfloat16",
    }  # fmt: skip
    lines = header("model", "first run", "seeds: backdoored, undecided, clean", "suspicion over seeds",
                   *(what for what in groups if what != "seed"))  # fmt: skip
    changes: dict[str, list[tuple[str, str]]] = {what: [] for what in groups}
    for result in results:
        runs = scanned(result)
        if not runs:
            continue
        first, *others = runs
        verdict = runs[first]["verdict"]
        for what, belongs in groups.items():
            changes[what] += [(verdict, runs[name]["verdict"]) for name in others if belongs(name)]
        seeds = [run for name, run in runs.items() if groups["seed"](name)]
        counts = ", ".join(str(sum(run["verdict"] == v for run in seeds)) for v in VERDICTS)
        suspicions = [run["scores"]["suspicion"] for run in seeds if "suspicion" in run["scores"]]
        span = f"{min(suspicions):.2f} to {max(suspicions):.2f}" if suspicions else "-"
        settings = (
            ", ".join(run["verdict"] for name, run in runs.items() if belongs(name))
            for what, belongs in groups.items()
            if what != "seed"
        )
        lines.append(row(result["id"], verdict, counts, span, *settings))
    lines += ["", *header("what differs", "scans", "another verdict", "backdoored for clean or clean for backdoored")]
    for what, pairs in changes.items():
        other = [pair for pair in pairs if pair[0] != pair[1]]
        lines.append(row(what, str(len(pairs)), str(len(other)), str(sum("undecided" not in pair for pair in other))))
    note = f"Scans by {DEFAULT}. First run: seed 0, one thread, float32, the default batch; the others differ in one."
    return "\n".join([*lines, "", note, ""])


def effort_table(results: list[Result]) -> str:
    """A line an effort: what it costs and how often it is right."""
    lines = header("effort", "evaluations, median", "mean", "seconds, median", "backdoored models", "TPR, %", "95 %",
                   "by base", "clean models", "TNR, %", "95 %", "by base")  # fmt: skip
    for name in dict.fromkeys(name for result in results for name in scanned(result)):
        own = [(judged(r, r["runs"][name]), r["runs"][name]) for r in results if name in scanned(r)]
        runs = [run for _, run in own]
        mean = statistics.mean(run["cost"]["network_evaluations"] for run in runs)
        shares: list[str] = []
        for truth in ("backdoored", "clean"):
            rows = [found for found, _ in own if found.truth == truth]
            shares += [str(len(rows)), *(cells(rows)[4:7] if rows else ["-"] * 3)]
        lines.append(row(f"{runs[0]['how']['effort']:g}", median(runs, "network_evaluations", ",.0f"), f"{mean:,.0f}",
                         median(runs, "seconds", ".1f"), *shares))  # fmt: skip
    note = (
        f"Effort: times the default number of iterations of {DEFAULT}'s search, of its starts and its fits. TPR: "
        "backdoored models called backdoored; TNR: clean models called clean, by the fixed rule. Undecided counts as "
        "wrong. Intervals: Wilson's, and from resampling bases."
    )
    return "\n".join([*lines, "", note, ""])


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "detectors": detectors_table, "stability": stability_table, "effort": effort_table
}  # fmt: skip


def judged(result: Result, run: dict[str, Any]) -> Judged:
    """A run's verdict beside what the model is."""
    entry, cost = result["entry"], run["cost"]
    return Judged(run["verdict"], entry["base"], entry["attack"], result["kind"], entry.get("trigger", ""),
                  entry.get("poison_rate", 0.0), cost["network_evaluations"], cost["seconds"])  # fmt: skip


def scanned(result: Result) -> dict[str, dict[str, Any]]:
    """The runs that could scan the model's kind."""
    return {name: run for name, run in result["runs"].items() if run["verdict"] != "unsupported"}


def outside(run: dict[str, Any]) -> float:
    """The share of the wall time, in percent, that was spent outside the network."""
    return 100 * (1 - run["cost"]["network_seconds"] / run["cost"]["seconds"])


def costs(run: dict[str, Any]) -> tuple[str, str, str]:
    cost = run["cost"]
    return f"{cost['network_evaluations']:,}", f"{cost['seconds']:.1f}", f"{outside(run):.1f}"


def median(runs: list[dict[str, Any]], key: str, form: str) -> str:
    return format(statistics.median(run["cost"][key] for run in runs), form)


def number(run: dict[str, Any], key: str) -> str:
    return f"{run['scores'][key]:.3f}" if key in run["scores"] else "-"


def header(*heads: str) -> list[str]:
    return [row(*heads), "|---" * len(heads) + "|"]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
