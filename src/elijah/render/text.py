"""The report for a person at a terminal, to be read in ten seconds; and the words that the HTML page shares.

Plain text without control codes: what comes out of a model's name or of its files cannot steer the terminal.
"""

from __future__ import annotations

import shlex
import textwrap

import numpy as np
from numpy.typing import NDArray

from elijah.png import png_pixels
from elijah.report import CleaningInfo, CleanReport, CostInfo, FindingInfo, Report, clean_name

WIDTH = 100
LABEL = 13
REGIONS = [
    ["at the top left", "at the top", "at the top right"],
    ["at the left", "in the middle", "at the right"],
    ["at the bottom left", "at the bottom", "at the bottom right"],
]
MEANING = {
    "backdoored": "This model hides a trigger.",
    "clean": "Nothing was found within the coverage below. That is no proof that the model is safe.",
    "undecided": "The scan could not tell. Treat the model as untrusted until a scan decides.",
}


def plain(text: str) -> str:
    """text on one line, with everything that a terminal would obey written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float) -> str:
    """value with three digits that matter; integers in full, with commas."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 600:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def label(name: str) -> str:
    """A score's name in words."""
    return name.replace("_", " ")


def score_lines(report: Report) -> list[tuple[str, str, str, bool]]:
    """(name, value, rule, whether it speaks for a backdoor) of every score, those with a rule first."""
    lines = []
    for name, value in sorted(report.scores.items(), key=lambda item: item[0] not in report.thresholds):
        rule = report.thresholds.get(name)
        if rule is None:
            lines.append((label(name), number(value), "", False))
            continue
        fires = value < rule.value if rule.backdoored == "below" else value > rule.value
        lines.append((label(name), number(value), f"backdoored {rule.backdoored} {number(rule.value)}", fires))
    return lines


def energy_words(png: str | None) -> str:
    """Where a pattern differs from its background, read from its picture; empty when there is none to read."""
    pixels = png_pixels(png)
    if pixels is None:
        return ""
    image = pixels.astype(np.float64)
    energy = np.square(image - np.median(image, (0, 1))).sum(-1)  # [H, W]
    if energy.max() < 100:
        return "the same at every pixel"
    shares = np.array([[window.sum() for window in _windows(row.T)] for row in _windows(energy)]) / energy.sum()
    row, column = divmod(int(shares.argmax()), 3)
    if shares.max() < 0.5:
        return "spread over the whole picture"
    return f"{shares.max():.0%} of its energy {REGIONS[row][column]}"


def _windows(a: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The first, the middle and the last half of a's rows."""
    half, quarter = len(a) // 2, len(a) // 4
    return [a[:half], a[quarter : quarter + half], a[len(a) - half :]]


def finding_words(finding: FindingInfo) -> str:
    """One finding in a sentence or two."""
    where = energy_words(finding.trigger.image_png)
    words = f"{finding.matches}: added to the start noise with norm {number(finding.trigger.norm)}"
    words += f", {where}" if where else ""
    if finding.target:
        kind = "one image" if finding.target.kind == "image" else "a distribution of images"
        words += f"; it leads to {kind}"
    response = finding.response
    form = f"kappa {number(response.kappa)}, psi {number(response.psi)}, gamma {number(response.gamma)}"
    return f"{words}. Loss ratio {number(finding.loss_ratio)} (1 clean, 0 fully backdoored; {form})."


def cost_words(cost: CostInfo) -> str:
    """Evaluations and seconds, and how much of them the network took."""
    share = f", {min(1.0, cost.network_seconds / cost.seconds):.0%} of it inside the network" if cost.seconds else ""
    return f"{cost.network_evaluations:,} network evaluations in {duration(cost.seconds)} on {cost.device}{share}"


def calibration_words(report: Report) -> str:
    """What the scores were compared with."""
    calibration = report.calibration
    if calibration is None:
        return "none: the verdict follows the detector's fixed thresholds, there is no p-value"
    words = f"{calibration.clean_models} clean models ({calibration.id})"
    if not calibration.in_range:
        words += "; this model is unlike them: " + ", ".join(calibration.out_of_range)
    if report.p_value is not None:
        words += f"; p-value {number(report.p_value)}"
    if report.false_positive_rate is not None:
        words += f", false positive rate {number(report.false_positive_rate)}"
    return words


def cleaning_rows(cleaning: CleaningInfo) -> list[tuple[str, str, str]]:
    """(name, before, after) of every number that was taken of either model."""
    names = [*cleaning.before, *(n for n in cleaning.after if n not in cleaning.before)]

    def cell(numbers: dict[str, float], name: str) -> str:
        return number(numbers[name]) if name in numbers else "-"

    return [(label(n), cell(cleaning.before, n), cell(cleaning.after, n)) for n in names]


def cleaning_words(cleaning: CleaningInfo) -> str:
    """What the repair did."""
    rounds = f" in {cleaning.rounds} rounds" if cleaning.rounds > 1 else ""
    work = f"{cleaning.updates:,} updates{rounds}, {duration(cleaning.seconds)}"
    return f"{cleaning.repair}, {work} on {cleaning.images:,} images; data: {cleaning.data}; {cleaning.screening}"


def next_step(report: Report) -> str:
    """The command that a person most likely wants next, empty when there is none."""
    source = report.model.source
    if report.cleaning:
        if report.verdict == "clean":
            return ""
        return shlex.join(["elijah", "clean", source, "--out", clean_name(source) + "-2", "--data", "FOLDER_OF_IMAGES"])
    if report.verdict == "backdoored" and not isinstance(report, CleanReport):
        return shlex.join(["elijah", "clean", source, "--out", clean_name(source)])
    if report.verdict == "undecided":
        limited = report.settings.get("max_evaluations") or report.settings.get("max_minutes")
        return shlex.join(["elijah", "scan", source, *([] if limited else ["--seed", str(report.seed + 1)])])
    return ""


def headline(report: Report) -> str:
    """The verdict and what it is about, such as "CLEAN after repair"."""
    words = report.verdict.upper()
    if isinstance(report, CleanReport):
        words += " after the repair" if report.cleaning else ", nothing was repaired"
    return words


def render_text(report: Report) -> str:
    """The report as lines of at most 100 characters, verdict first."""
    lines = [f"{headline(report)}  {plain(report.model.source)}", ""]
    rows: list[tuple[str, str]] = [("why", report.reason), ("means", MEANING[report.verdict])]
    for name, value, rule, fires in score_lines(report):
        rows.append(("scores", f"{name} {value}" + (f"  ({rule}{': yes' if fires else ': no'})" if rule else "")))
    rows.append(("calibration", calibration_words(report)))
    rows += [("trigger", finding_words(finding)) for finding in report.findings]
    if report.evidence.samplers:
        rows.append(("outputs", "drawn with " + ", ".join(report.evidence.samplers) + "; pictures: --format html"))
    if report.cleaning:
        rows += _cleaning(report, report.cleaning)
    rows.append(("cost", cost_words(report.cost)))
    rows += [("looked for", text) for text in report.coverage]
    rows += [("not covered", text) for text in report.not_covered]
    rows += [("errors", text) for text in report.errors]
    if step := next_step(report):
        rows.append(("next", step))
    before = ""
    for name, text in rows:
        lines += _row("" if name == before else name, text)
        before = name
    return "\n".join(lines) + "\n"


def _cleaning(report: Report, cleaning: CleaningInfo) -> list[tuple[str, str]]:
    found = report.before.verdict if isinstance(report, CleanReport) and report.before else "not recorded"
    table = [("", "before", "after"), ("verdict", found, report.verdict), *cleaning_rows(cleaning)]
    name, before = (max(len(row[k]) for row in table) for k in (0, 1))
    rows = [("repair", cleaning_words(cleaning)), ("written", cleaning.out or "nothing")]
    rows += [("repaired", finding_words(finding)) for finding in cleaning.findings]
    rows += [("harm", words) for words in cleaning.harm]
    return [
        *rows,
        *(
            ("change", f"{a:<{name}}  {b:>{before}} -> {c}" if a else f"{a:<{name}}  {b:>{before}}    {c}")
            for a, b, c in table
        ),
    ]


def _row(name: str, text: str) -> list[str]:
    """One labelled row; commands and tables stay on one line, prose is wrapped."""
    text = plain(text)
    wrapped = (
        [text]
        if name in ("next", "change", "")
        else textwrap.wrap(text, WIDTH - LABEL - 2, break_long_words=False, break_on_hyphens=False)
    )
    return [f"  {name if k == 0 else '':<{LABEL}}{line}" for k, line in enumerate(wrapped or [""])]
