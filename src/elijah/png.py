"""Pictures as base64 PNG, as reports hold them, from and to uint8 arrays."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST_PNG = 4096  # pixels a side; a larger picture in a report file is not opened


def grid(images: NDArray[np.uint8], *, columns: int = 8, gap: int = 1) -> NDArray[np.uint8]:
    """images [N, H, W, C] (C 1 or 3) on a sheet [rows, width, 4], gap transparent pixels between them."""
    n, h, w, c = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4), np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (h + gap), k % columns * (w + gap)
        sheet[top : top + h, left : left + w, :3] = image[..., :3] if c >= 3 else image[..., :1]
        sheet[top : top + h, left : left + w, 3] = 255
    return sheet


def png_base64(image: NDArray[np.uint8]) -> str:
    """image uint8 [H, W] or [H, W, C] (C 1, 3 or 4) as a base64 PNG."""
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png_pixels(png: str | None) -> NDArray[np.uint8] | None:
    """The picture [H, W, 3] of a base64 PNG, None when there is none, when it is broken or too large."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(png or "", validate=True)), formats=["PNG"]) as opened:
            if max(opened.size) > LARGEST_PNG:
                return None
            return np.asarray(opened.convert("RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        return None
