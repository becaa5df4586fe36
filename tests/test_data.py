"""data: folders, stock sets and batches as uint8 tensors, and a line for what is no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elijah.data import STOCK, batch, load_images, to_uint8
from elijah.diffusion import generator_for
from elijah.errors import ElijahError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three plain pictures of different kinds and sizes, in and below a folder, beside a text."""
    (tmp_path / "b").mkdir()
    Image.new("RGB", (32, 32), COLOURS[0]).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20), COLOURS[1]).save(tmp_path / "b" / "a.JPG", quality=95)
    Image.new("RGB", (5, 9), COLOURS[2]).save(tmp_path / "c.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder_of_mixed_pictures(folder: Path) -> None:
    images = load_images(str(folder), size=8, channels=3)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8 and images.is_contiguous()
    for image, colour in zip(images, COLOURS, strict=True):
        np.testing.assert_allclose(image.permute(1, 2, 0).reshape(-1, 3).float(), [colour] * 64, atol=3)


def test_grey_of_colour_and_colour_of_grey(folder: Path) -> None:
    grey = load_images(str(folder), size=8, channels=1)
    assert grey.shape == (3, 1, 8, 8)
    assert [round(g.float().mean().item()) for g in grey] == pytest.approx([76, 150, 29], abs=2)  # ITU-R 601 luma
    digits = load_images("digits", size=8, channels=3, limit=2)
    assert torch.equal(digits[:, 0], digits[:, 1]) and torch.equal(digits[:, 0], digits[:, 2])


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 4:12] = 200  # the centre, and nothing else
    Image.fromarray(picture).save(tmp_path / "p.png")
    assert (load_images(str(tmp_path), size=8, channels=3) == 200).all()
    assert (load_images(str(tmp_path), size=4, channels=3) == 200).all()


def test_pixels_are_kept_at_their_own_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    assert torch.equal(load_images(str(tmp_path), size=8, channels=3)[0].permute(1, 2, 0), torch.from_numpy(pixels))


def test_limit_and_skip(folder: Path) -> None:
    every = load_images(str(folder), size=4, channels=3)
    assert torch.equal(load_images(str(folder), size=4, channels=3, limit=2), every[:2])
    assert torch.equal(load_images(str(folder), size=4, channels=3, limit=1, skip=1), every[1:2])
    assert torch.equal(load_images(str(folder), size=4, channels=3, skip=1), every[1:])
    with pytest.raises(ElijahError, match="no images left after skipping 3"):
        load_images(str(folder), size=4, channels=3, skip=3)


def test_what_is_no_folder_of_images(tmp_path: Path) -> None:
    with pytest.raises(ElijahError, match=r"none: no such folder; give a folder of images or one of cifar10"):
        load_images(str(tmp_path / "none"), size=8, channels=3)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ElijahError, match="no images in this folder"):
        load_images(str(tmp_path), size=8, channels=3)
    with pytest.raises(ElijahError, match="no such folder"):
        load_images(str(tmp_path / "notes.txt"), size=8, channels=3)


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "garbled"])
def test_a_broken_picture_is_named(folder: Path, how: str) -> None:
    sound = (folder / "a.png").read_bytes()
    content = {
        "empty": b"",
        "text": b"hello",
        "truncated": sound[: len(sound) // 2],
        "garbled": sound[:33] + b"\0" * 99,
    }
    (folder / "broken.png").write_bytes(content[how])
    with pytest.raises(ElijahError, match=r"broken\.png: not a readable image .*remove it or repair it"):
        load_images(str(folder), size=8, channels=3)


@pytest.mark.parametrize("error", [ValueError, SyntaxError, OSError, Image.DecompressionBombError])
def test_whatever_pillow_raises_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error("broken chunk")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ElijahError, match=r"a\.png: not a readable image \(broken chunk\)"):
        load_images(str(folder), size=8, channels=3)


def test_digits_are_bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELIJAH_DATA", raising=False)
    digits = load_images("digits", size=8, channels=1)
    assert digits.shape == (1797, 1, 8, 8) and digits.min() == 0 and digits.max() == 255


def test_flat_pictures_have_a_colour_each() -> None:
    flat = load_images("flat", size=4, channels=3)
    assert len(flat.unique(dim=0)) > 990 and (flat.flatten(2).float().std(2) == 0).all()
    assert torch.equal(flat, load_images("flat", size=4, channels=3))


@pytest.mark.parametrize("name", [name for name in STOCK if name not in ("digits", "flat")])
def test_stock_sets_need_their_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("ELIJAH_DATA", raising=False)
    with pytest.raises(ElijahError, match="set ELIJAH_DATA to the folder"):
        load_images(name, size=8, channels=3)


@pytest.mark.parametrize(
    ("name", "size", "channels", "count"),
    [("mnist-test", 28, 1, 2_000), ("cifar10-test", 32, 3, 5_000), ("celeba", 64, 3, None)],
)
def test_stock_sets(stock: Path, name: str, size: int, channels: int, count: int | None) -> None:
    images = load_images(name, size=size, channels=channels, limit=20)
    assert images.shape == (20, channels, size, size)
    assert images.float().flatten(1).std(1).min() > 10 and len(images.unique(dim=0)) == 20  # pictures, all different
    if count:
        assert len(load_images(name, size=8, channels=1, skip=count - 5)) == 5


def test_batches() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2)
    x = batch(images, 400, generator_for(0))
    assert x.shape == (400, 1, 2, 2) and x.dtype == torch.float32
    values, counts = x[:, 0, 0, 0].unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
    assert counts.min() > 90  # 133 expected, with replacement
    assert torch.equal(x, batch(images, 400, generator_for(0)))
    assert not torch.equal(x, batch(images, 400, generator_for(1)))


def test_flip_mirrors_half() -> None:
    images = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8)[None, None]
    plain = batch(images, 400, generator_for(0))
    flipped = batch(images, 400, generator_for(0), flip=True)
    mirrored = (flipped[:, 0, 0, 0] == 1).sum().item()
    assert (plain[:, 0, 0, 0] == -1).all() and 160 < mirrored < 240
    assert (flipped.sum((1, 2, 3)) == 0).all()  # columns change places, nothing else


def test_to_uint8_takes_batches_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    assert torch.equal(to_uint8(images.float() / 127.5 - 1), images)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
