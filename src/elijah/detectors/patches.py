"""Where a patch trigger is: a sweep of squares over the start noise, without gradients.

TrojDiff's patch shifts a square of the noise to a nearly constant colour, s (gamma e + mu), and the network answers e
there. Gradients from random patterns do not find it; a square of about the right place, size and colour already shows
in the answer. Colours are grey and those whose channels are all -1 or 1 (of grey images in steps of a third); what the
network does not call noise (power.py) then corrects them, pixel by pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from elijah.detectors.hypothesis import Family, Hypothesis, antithetic
from elijah.diffusion import Model, column

Square = tuple[int, int, int, tuple[float, ...]]  # top, left, side, level of each channel
GAMMAS = (0.1, 0.3, 0.5)
FEW = 16  # squares of the first look that are looked at again


@torch.no_grad()
def best_patch(
    model: Model, family: Family, generator: torch.Generator, *, pairs: int = 2, climbs: int = 5
) -> Hypothesis:
    """The square that the network answers most like a trigger's, as a hypothesis; its loss ratio is that of the sweep.

    Squares of half and of a quarter of the width, half of their side apart, all with one noise, several to an image;
    the best FEW alone with all pairs; from the best three to their neighbours, `climbs` times, or once if that is
    hopeless. What is not is looked for everywhere, half a side apart, and climbs again: a network answers its patch at
    other places too, less. Then gamma.
    """
    size, channels = model.sample_shape[-1], model.sample_shape[0]
    levels = (-1.0, -2 / 3, -1 / 3, 1 / 3, 2 / 3, 1.0) if channels == 1 else (-1.0, 1.0)
    colours = (*itertools.product(levels, repeat=channels), (0.0,) * channels)
    e, t = antithetic(model, 2 * pairs, 0.8, 1.0, generator)
    looked = [
        (y, x, side, colour)
        for side in (size // 2, size // 4)
        for y in range(0, size - side + 1, max(1, side // 2))
        for x in range(0, size - side + 1, max(1, side // 2))
        for colour in colours
    ]
    tried: dict[Square, float] = {}
    best = climb(model, family, tried, seen(model, looked, e, t), e, t, climbs)
    if tried[best] <= family.hopeless:
        y, x, side, colour = best
        step = max(1, side // 2)
        places = [*range(0, size - side, step), size - side]
        elsewhere = [(y, x, side, colour) for y in places for x in places]
        best = climb(model, family, tried, seen(model, elsewhere, e, t), e, t, climbs)
    y, x, side, colour = best
    found = [(alone(model, [(y, x, side, colour)], g, e, t)[0], g) for g in GAMMAS]
    ratio, gamma = min(found)
    patch = mask(size, y, x, side).to(model.device)
    level = torch.tensor(colour, dtype=torch.float32, device=model.device)[:, None, None] * (1 - gamma)
    return Hypothesis(family, level * patch, torch.zeros_like(level * patch), gamma, ratio, patch=patch)


def seen(model: Model, looked: list[Square], e: Tensor, t: Tensor) -> list[Square]:
    """The FEW best of the squares at the first noise."""
    images = apart(looked)
    shown = [q for squares in images for q in squares]
    first = dict(zip(shown, ratios(model, images, GAMMAS[0], e[:1], t[:1]), strict=True))
    return sorted(first, key=lambda q: first[q])[:FEW]


def apart(squares: Iterable[Square]) -> list[list[Square]]:
    """The squares as images of several: of one side and colour, half a side or more between them."""
    images: list[list[Square]] = []
    for q in squares:
        y, x, side, colour = q
        for image in images:
            same = image[0][2:] == (side, colour)
            if same and all(max(abs(y - top), abs(x - left)) >= side + side // 2 for top, left, *_ in image):
                image.append(q)
                break
        else:
            images.append([q])
    return images


def climb(
    model: Model, family: Family, tried: dict[Square, float], new: Iterable[Square], e: Tensor, t: Tensor, climbs: int
) -> Square:
    """The best of the new squares, those in tried, and what is reached from the best three; adds all to tried."""
    for k in range(climbs + 1):
        fresh = [q for q in dict.fromkeys(new) if q not in tried]
        tried |= dict(zip(fresh, alone(model, fresh, GAMMAS[0], e, t), strict=True))
        top = sorted(tried, key=lambda q: tried[q])[:3]
        if k > 0 and tried[top[0]] > family.hopeless:
            break
        new = [near for q in top for near in neighbours(q, model.sample_shape[-1])]
    return top[0]


def neighbours(q: Square, size: int) -> Iterable[Square]:
    """Squares that lie in the image: moved by a quarter of the side or by a pixel, and larger or smaller."""
    y, x, side, colour = q
    for step in {max(1, side // 4), 1}:
        for dy, dx in ((-step, 0), (step, 0), (0, -step), (0, step)):
            if 0 <= y + dy <= size - side and 0 <= x + dx <= size - side:
                yield y + dy, x + dx, side, colour
    for grow in (-2, -1, 1, 2):
        for back in {0, grow // 2, grow}:  # what stays in place: the top left corner, the middle, the bottom right
            k, top, left = side + grow, y - back, x - back
            if k >= 2 and min(top, left) >= 0 and max(top, left) + k <= size:
                yield top, left, k, colour


def mask(size: int, y: int, x: int, side: int) -> Tensor:
    """[1, size, size], 1 inside the square."""
    inside = torch.zeros(1, size, size)
    inside[:, y : y + side, x : x + side] = 1
    return inside


def alone(model: Model, squares: list[Square], gamma: float, e: Tensor, t: Tensor) -> list[float]:
    """ratios of squares that are each alone in an image."""
    return ratios(model, [[q] for q in squares], gamma, e, t)


def ratios(
    model: Model, images: list[list[Square]], gamma: float, e: Tensor, t: Tensor, batch: int = 32
) -> list[float]:
    """For each square, |eps - e|^2 over |(gamma - 1) e + mu|^2 inside it, at the noise e [N, C, H, W] and t [N].

    images: the squares that an image has; their ratios come in the order of the squares.
    """
    found: list[float] = []
    for k in range(0, len(images), batch):
        part = images[k : k + batch]
        shift = torch.zeros(len(part), *e.shape, device=e.device)  # [S, N, C, H, W]
        for rows, squares in zip(shift, part, strict=True):
            for y, x, side, colour in squares:
                mu = (1 - gamma) * torch.tensor(colour, dtype=torch.float32, device=e.device)[:, None, None]
                inside = ..., slice(y, y + side), slice(x, x + side)
                rows[inside] = (gamma - 1) * e[inside] + mu
        seen_at = column(model.s, t) * (e + shift)
        error = model.eps(seen_at.flatten(0, 1), t.repeat(len(part))).view_as(shift) - e
        own: list[Tensor] = []
        for rows, off, squares in zip(shift.square(), error.square(), part, strict=True):
            for y, x, side, _ in squares:
                inside = ..., slice(y, y + side), slice(x, x + side)
                own.append(off[inside].sum() / rows[inside].sum())
        found += torch.stack(own).tolist()
    return found
