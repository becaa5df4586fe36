"""The report as one HTML file: nothing is loaded, nothing is run, every text is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from elijah.render import text
from elijah.report import CleanReport, Report, command

SYMBOLS = {"backdoored": "✕", "clean": "✓", "undecided": "?"}
TITLES = {"backdoored": "Backdoored", "clean": "Nothing found", "undecided": "Undecided"}


def render_html(report: Report) -> str:
    """The report as a page of its own, with its pictures inside; it needs no network and no script."""
    environment = Environment(
        loader=PackageLoader("elijah", "render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": text.number, "duration": text.duration, "label": text.label}
    before = report.before if isinstance(report, CleanReport) else None
    found = before if before and before.findings and not report.findings else report
    repaired = report.cleaning.findings if report.cleaning and found is before else []
    page = environment.get_template("report.html.j2").render(
        report=report,
        before=before,
        cleaned=isinstance(report, CleanReport),
        found=found,
        findings=repaired or found.findings,
        symbol=SYMBOLS[report.verdict],
        title=TITLES[report.verdict],
        meaning=text.MEANING[report.verdict],
        scores=text.score_lines(report),
        calibration=text.calibration_words(report),
        cleaning_rows=text.cleaning_rows(report.cleaning) if report.cleaning else [],
        cleaning_words=text.cleaning_words(report.cleaning) if report.cleaning else "",
        energy=text.energy_words,
        command=command(report),
        next_step=text.next_step(report),
    )
    return page.rstrip("\n") + "\n"
