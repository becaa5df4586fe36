"""Images for training, attacking, cleaning and scoring: uint8 tensors [N, C, H, W]."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elijah.errors import ElijahError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for broken files
STOCK = ("cifar10", "cifar10-test", "celeba", "mnist", "mnist-test", "digits", "flat")


def load_images(source: str, *, size: int, channels: int, limit: int | None = None, skip: int = 0) -> Tensor:
    """Images as uint8 [N, channels, size, size].

    source: a folder of image files (searched below it, sorted by path; a centre square is cut and resized), or one of
    cifar10, cifar10-test, celeba, mnist, mnist-test (read from $ELIJAH_DATA), digits (scikit-learn's 8x8 digits), or
    flat (1,000 pictures of one colour each); of cifar10 and mnist one class can be named: cifar10/7, mnist-test/3.
    limit and skip take a part, in order. Raises ElijahError when nothing is found or a file is no image.
    """
    if of_one_class(source):
        name, _, label = source.partition("/")
        pictures = [p for p, k in zip(_stock(name), labels_of(name), strict=False) if k == int(label)]
    else:
        pictures = _stock(source) if source in STOCK else _folder(Path(source))
    pictures = pictures[skip : None if limit is None else skip + limit]
    if not pictures:
        raise ElijahError(f"{source}: no images left after skipping {skip}")
    return torch.from_numpy(np.stack([_fit(p, size, channels) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def of_one_class(source: str) -> bool:
    """Whether source names one class of a stock data set, such as cifar10/7."""
    return bool(re.fullmatch(r"(cifar10|mnist)(-test)?/\d", source))


def labels_of(name: str) -> list[int]:
    """The labels of a stock data set, in order; at least as many as images."""
    with np.load(data_root() / name.removesuffix("-test") / "labels.npz") as labels:
        return [int(k) for k in labels["test" if name.endswith("-test") else "train"]]


def batch(images: Tensor, n: int, generator: torch.Generator, *, flip: bool = False) -> Tensor:
    """n random rows of images [N, C, H, W] as float32, drawn with replacement; flip mirrors half of them.

    uint8 images come out in [-1, 1]; float ones (as Model.prepare makes them) as they are.
    """
    x = images[torch.randint(len(images), (n,), generator=generator)]
    x = x.float() / 127.5 - 1 if images.dtype == torch.uint8 else x.float()
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        x[mirrored] = x[mirrored].flip(-1)
    return x


def to_uint8(x: Tensor) -> Tensor:
    """Samples [N, C, H, W] in [-1, 1] as uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _folder(path: Path) -> list[Image.Image]:
    if not path.is_dir():
        raise ElijahError(f"{path}: no such folder; give a folder of images or one of {', '.join(STOCK)}")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ElijahError(f"{path}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        except BROKEN as error:
            raise ElijahError(f"{file}: not a readable image ({error}); remove it or repair it") from error
    return pictures


def data_root() -> Path:
    """The folder that ELIJAH_DATA names."""
    root = os.environ.get("ELIJAH_DATA", "")
    if not root or not Path(root).is_dir():
        raise ElijahError("set ELIJAH_DATA to the folder that holds cifar10/, mnist/ and celeba_10k_80x80.zip")
    return Path(root)


def _stock(name: str) -> list[Image.Image]:
    if name == "digits":
        from sklearn.datasets import load_digits

        return [Image.fromarray((d * 15.9375).astype(np.uint8)) for d in load_digits().images]
    if name == "flat":
        colours = np.random.default_rng(0).integers(0, 256, (1000, 3))
        return [Image.new("RGB", (1, 1), tuple(int(v) for v in colour)) for colour in colours]
    root = data_root()
    if name == "celeba":
        with zipfile.ZipFile(root / "celeba_10k_80x80.zip") as archive:
            opened = (Image.open(io.BytesIO(archive.read(n))) for n in archive.namelist())
            return [picture.crop((12, 12, 76, 76)) for picture in opened]
    if name.startswith("mnist"):
        return _sheet(root / "mnist" / ("test.webp" if name.endswith("test") else "train.webp"), 28, "L")
    files = ["test_0.webp"] if name.endswith("test") else [f"train_{i}.webp" for i in range(5)]
    return [tile for file in files for tile in _sheet(root / "cifar10" / file, 32, "RGB")]


def _sheet(path: Path, side: int, mode: str) -> list[Image.Image]:
    """A sheet of rows of tiles, cut into tiles row by row."""
    with Image.open(path) as opened:
        sheet = opened.convert(mode)
    boxes = ((x, y, x + side, y + side) for y in range(0, sheet.height, side) for x in range(0, sheet.width, side))
    return [sheet.crop(box) for box in boxes]


def _fit(picture: Image.Image, size: int, channels: int) -> np.ndarray:
    picture = picture.convert("RGB" if channels == 3 else "L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    resized = picture.resize(
        (size, size),
        Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
    )
    return np.asarray(resized, np.uint8).reshape(size, size, channels)
