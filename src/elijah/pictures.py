"""Sheets of pictures with captions, for docs and tables."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elijah.data import to_uint8
from elijah.errors import ElijahError


class Cell(NamedTuple):
    """images: [N, C, H, W] in [-1, 1], shown side by side; None leaves the cell empty."""

    images: Tensor | None
    caption: str = ""


def write_sheet(path: Path, header: list[str], rows: list[tuple[str, list[Cell]]]) -> None:
    """A PNG: rows of (label, cells), with a title a column. Raises ElijahError without matplotlib."""
    try:
        figure_class = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ElijahError("pictures need matplotlib: pip install 'elijah-scan[bench]'") from error
    widths = [
        max((len(row[k].images) for _, row in rows if k < len(row) and row[k].images is not None), default=1)  # type: ignore[arg-type]
        for k in range(len(header))
    ]
    figure = figure_class(figsize=(2.1 + 0.62 * sum(widths), 0.3 + 0.82 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), len(header), squeeze=False, width_ratios=widths)
    for (name, row), line in zip(rows, axes, strict=True):
        for k, place in enumerate(line):
            place.set_axis_off()
            cell = row[k] if k < len(row) else Cell(None)
            place.set_title(cell.caption, fontsize=6, pad=2)
            if cell.images is not None:
                place.imshow(side_by_side(cell.images), interpolation="nearest")
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=6.5)
    for title, place in zip(header, axes[0], strict=True):
        place.text(0.5, 1.45, title, transform=place.transAxes, ha="center", fontsize=7, weight="bold")
    figure.subplots_adjust(left=2.0 / figure.get_figwidth(), right=0.995, top=1 - 0.34 / figure.get_figheight(),
                           bottom=0.01, wspace=0.06, hspace=0.32)  # fmt: skip
    figure.savefig(path)


def side_by_side(images: Tensor) -> Tensor:
    """uint8 [H, N (W + 1) - 1, 3] of images [N, C, H, W] in [-1, 1], with a white line between them."""
    rows = to_uint8(images.cpu())
    rows = rows.expand(-1, 3, -1, -1)
    wide = torch.nn.functional.pad(rows, (0, 1), value=255).permute(2, 0, 3, 1)
    return wide.reshape(rows.shape[2], -1, 3)[:, :-1].contiguous()
