"""Report -> text. Every renderer is a pure function: no clock, no files of the model, no network."""

from __future__ import annotations

from collections.abc import Callable

from elijah.render.html import render_html
from elijah.render.sarif import render_sarif
from elijah.render.text import render_text
from elijah.report import Report

RENDERERS: dict[str, Callable[[Report], str]] = {
    "text": render_text,
    "json": Report.to_json,
    "html": render_html,
    "sarif": render_sarif,
}


def render(report: Report, form: str) -> str:
    """The report as text, json, html or sarif; ends with a newline."""
    return RENDERERS[form](report)
