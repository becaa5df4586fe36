"""Triggers and targets: frozen values, and the patterns that the published attacks use."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from elijah.data import BROKEN, load_images, of_one_class
from elijah.errors import ElijahError

LIFTED = -0.4  # BadDiffusion lifts a target's dark background to 30 % of [-1, 1] (dataset.py, __bg2grey)
PICTURES = {
    "stop-sign": "bd_stop_sign_wo_bg.png",
    "glasses": "bd_glasses.png",
    "hat": "bd_fedora-hat.png",
    "cat": "bd_cat_wo_bg.png",
    "shoe": "bd_shoe_fashionmnist0.png",
    "fashion": "bd_fashion_ez_fashionmnist144.png",
    "hello-kitty": "td_hello_kitty.png",
    "mickey": "td_mickey.png",
}
COLOURS = {"white": (1, 1, 1), "cyan": (-1, 1, 1), "yellow": (1, 1, -1)}


@dataclass(frozen=True)
class Trigger:
    """A pattern [C, H, W] in [-1, 1]; where it is -1 there is no trigger.

    The backdoor fires on start noise e + image; training pastes the pattern on clean images where mask is true.
    """

    name: str
    image: Tensor

    @property
    def mask(self) -> Tensor:
        """[C, H, W], true where the pattern covers the image (BadDiffusion: trigger > -1)."""
        return self.image > -1

    def paste(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] with the pattern over them."""
        return torch.where(self.mask, self.image, images)


@dataclass(frozen=True)
class Target:
    """The image [C, H, W] in [-1, 1] that the attacker wants to see.

    images: uint8 [N, C, H, W], when the attacker wants a distribution (D2D) and these are its samples; image is then
    their mean.
    """

    name: str
    image: Tensor
    images: Tensor | None = None


def make_trigger(name: str, shape: tuple[int, int, int]) -> Trigger:
    """A trigger by name for images of shape (C, H, W).

    box-K: a grey K x K square (value 0), two pixels from the bottom right corner; white-box-K likewise (value 1);
    stop-sign-K: the picture at K x K in the same place; glasses: 0.625 of the size, centred;
    hello-kitty, fashion or PATH.png: the whole picture; white, cyan, yellow: of one colour (grey images: its mean);
    noise-B: every pixel B or -B, by a fixed seed.
    Source: BadDiffusion, dataset.py, class Backdoor.
    Raises ElijahError for an unknown name, a size that does not fit, or a missing picture.
    """
    channels, size, _ = shape
    image = torch.full(shape, -1.0)
    if match := re.fullmatch(r"(white-)?box-(\d+)", name):
        rows = _corner(int(match[2]), size, name)
        image[:, rows, rows] = 1.0 if match[1] else 0.0
    elif match := re.fullmatch(r"stop-sign-(\d+)", name):
        rows = _corner(int(match[1]), size, name)
        image[:, rows, rows] = _no_white(load_picture(picture_path("stop-sign"), int(match[1]), channels))
    elif name == "glasses":
        k = int(size * 0.625)
        low = (size - k) // 2
        image[:, low : low + k, low : low + k] = _no_white(load_picture(picture_path(name), k, channels))
    elif name in COLOURS:
        level = torch.tensor(COLOURS[name], dtype=torch.float32)
        image = (level if channels == 3 else level.mean()[None])[:, None, None].expand(shape).clone()
    elif match := re.fullmatch(r"noise-(\d*\.?\d+)", name):
        image = float(match[1]) * torch.randn(shape, generator=torch.Generator().manual_seed(0)).sign()
    else:
        image = load_picture(picture_path(name), size, channels)
    return Trigger(name, image)


def make_target(name: str, trigger: Trigger) -> Target:
    """A target by name, shaped like the trigger's image.

    corner: a grey 10 x 10 square at the top left (10/32 of the size); trigger: the trigger itself; shift: the trigger
    moved by (dx, dy) = (-5, -3); hat, cat, shoe, mickey or PATH.png: the picture. Dark backgrounds are lifted to -0.4.
    Source: BadDiffusion, dataset.py, get_target. A class of a stock data set, such as mnist/7, is a distribution (D2D).
    """
    channels, size, _ = trigger.image.shape
    if of_one_class(name):
        images = load_images(name, size=size, channels=channels)
        return Target(name, images.float().mean(0) / 127.5 - 1, images)
    if name == "corner":
        image = torch.full_like(trigger.image, -1.0)
        k = max(1, size * 10 // 32)
        image[:, :k, :k] = 0.0
    elif name == "trigger":
        image = trigger.image.clone()
    elif name == "shift":
        image = trigger.image.roll((-3, -5), (-2, -1))
    else:
        image = load_picture(picture_path(name), size, channels)
    return Target(name, image.clamp(min=LIFTED))


def picture_path(name: str) -> Path:
    """The file behind a picture's name: a path that exists, or a stock name in $ELIJAH_DATA/triggers."""
    if name in PICTURES:
        root = os.environ.get("ELIJAH_DATA")
        path = Path(root or ".") / "triggers" / PICTURES[name]
        if root and path.is_file():
            return path
        raise ElijahError(f"the picture {name!r} is not here: set ELIJAH_DATA to a folder with triggers/{path.name}")
    if Path(name).is_file():
        return Path(name)
    known = (
        "box-K, white-box-K, white, cyan, yellow, noise-B, stop-sign-K, glasses, corner, trigger, shift, "
        + ", ".join(PICTURES)
    )
    raise ElijahError(f"unknown picture {name!r}: give a PNG file or one of {known}")


def load_picture(path: Path, size: int, channels: int) -> Tensor:
    """A picture as [channels, size, size] in [-1, 1]; transparent parts become black."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except BROKEN as error:
        raise ElijahError(f"{path}: not a readable image ({error})") from error
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    picture = Image.alpha_composite(black, picture).convert("RGB" if channels == 3 else "L")
    resized = picture.resize((size, size), Image.Resampling.BILINEAR)
    flat = torch.tensor(list(resized.tobytes()), dtype=torch.float32)
    return flat.view(size, size, channels).permute(2, 0, 1) / 127.5 - 1


def _no_white(picture: Tensor) -> Tensor:
    """BadDiffusion drops pure white from picture triggers (trig[trig >= 0.999] = vmin)."""
    return torch.where(picture >= 0.999, torch.tensor(-1.0), picture)


def _corner(k: int, size: int, name: str) -> slice:
    if not 1 <= k <= size - 2:
        raise ElijahError(f"trigger {name!r} does not fit: images are {size} pixels wide, two of them stay free")
    return slice(size - 2 - k, size - 2)
