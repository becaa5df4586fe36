"""A figure of a zoo's scans: how suspicious each model is, a row an attack, clean models first. An SVG; no torch."""

from __future__ import annotations

from html import escape
from pathlib import Path

from elijah.calibrate import read_results
from elijah.errors import ElijahError

WIDTH, LEFT, ROW, TOP = 760, 150, 34, 46  # pixels
CLEAN, BAD = "#2563a8", "#c2410c"


def suspicion_figure(folders: list[Path], detector: str, part: str | None = None) -> str:
    """SVG: a dot a model at its suspicion; filled: called backdoored, pale: undecided, open: clean.

    Raises ElijahError as read_results does, and when the detector left no suspicion there.
    """
    rows: dict[str, list[tuple[float, str]]] = {}
    for result in read_results(folders).values():
        scan = result.detections.get(detector)
        if scan and "suspicion" in scan.scores and part in (None, result.model.part):
            rows.setdefault(result.model.attack, []).append((scan.scores["suspicion"], scan.verdict))
    if not rows:
        raise ElijahError(f"{detector} left no suspicion in these results")
    names = sorted(rows, key=lambda name: (not name.startswith("clean"), name))
    values = [value for own in rows.values() for value, _ in own]
    low, high = min(*values, -0.5), max(*values, 0.5)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 30)

    height = TOP + ROW * len(names) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20">Suspicion by {escape(detector)}: 0 is the threshold of the loss; outputs that move '
        "add up to 1</text>",
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP - 12}" y2="{height - 34}" stroke="#888"/>',
    ]
    for k, name in enumerate(names):
        y = TOP + ROW * k + ROW / 2
        colour = CLEAN if name.startswith("clean") else BAD
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)} ({len(rows[name])})</text>'
        )
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 30}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        for i, (value, verdict) in enumerate(sorted(rows[name])):
            fill = {"backdoored": colour, "undecided": colour + "55"}.get(verdict, "none")
            parts.append(
                f'<circle cx="{x(value):.1f}" cy="{y + (i % 5 - 2) * 3:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'
            )
    ticks = [low + (high - low) * k / 4 for k in range(5)]
    parts += [f'<text x="{x(v):.1f}" y="{height - 16}" text-anchor="middle" fill="#555">{v:.1f}</text>' for v in ticks]
    return "\n".join([*parts, "</svg>", ""])
