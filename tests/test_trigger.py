"""trigger: where each pattern lies, what it is worth, and what names mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from elijah.errors import ElijahError
from elijah.trigger import PICTURES, Target, Trigger, make_target, make_trigger

SHAPE = (3, 32, 32)


@pytest.mark.parametrize(("name", "k", "value"), [("box-14", 14, 0.0), ("white-box-3", 3, 1.0), ("box-30", 30, 0.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_boxes(name: str, k: int, value: float, channels: int) -> None:
    trigger = make_trigger(name, (channels, 32, 32))
    expected = torch.full((channels, 32, 32), -1.0)
    expected[:, 30 - k : 30, 30 - k : 30] = value
    assert torch.equal(trigger.image, expected) and trigger.name == name
    assert torch.equal(trigger.mask, expected > -1) and trigger.mask.sum() == channels * k * k


def test_the_norm_of_the_paper_s_box() -> None:
    assert make_trigger("box-14", SHAPE).image.norm().item() == pytest.approx(49.84, abs=0.01)


def test_paste_covers_the_pattern_alone() -> None:
    trigger = make_trigger("box-4", (1, 8, 8))
    images = torch.rand(5, 1, 8, 8) - 0.5
    pasted = trigger.paste(images)
    assert (pasted[:, :, 2:6, 2:6] == 0).all()
    outside = ~trigger.mask.expand_as(images)
    assert torch.equal(pasted[outside], images[outside])


@pytest.mark.parametrize("name", ["box-31", "box-0", "box-999", "white-box-31"])
def test_boxes_that_do_not_fit(name: str) -> None:
    with pytest.raises(ElijahError, match="does not fit: images are 32 pixels wide"):
        make_trigger(name, SHAPE)


@pytest.mark.parametrize("name", ["box", "box--3", "Box-3", "circle", "box-3.5", "", "no/such/file.png"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ElijahError, match=r"unknown picture .*give a PNG file or one of box-K"):
        make_trigger(name, SHAPE)
    with pytest.raises(ElijahError, match="unknown picture"):
        make_target(name, make_trigger("box-3", SHAPE))


def test_corner_target() -> None:
    target = make_target("corner", make_trigger("box-3", SHAPE)).image
    assert (target[:, :10, :10] == 0).all() and (target == 0).sum() == 300
    assert target.unique().tolist() == pytest.approx([-0.4, 0.0])
    assert (make_target("corner", make_trigger("box-3", (1, 16, 16))).image == 0).sum() == 25


def test_trigger_target_is_lifted() -> None:
    trigger = make_trigger("white-box-5", SHAPE)
    target = make_target("trigger", trigger).image
    assert torch.equal(target == 1, trigger.mask)
    assert target[~trigger.mask].unique().tolist() == pytest.approx([-0.4])
    assert trigger.image.min() == -1  # the trigger itself stays as it was


def test_shift_target_moves_left_and_up() -> None:
    target = make_target("shift", make_trigger("box-4", SHAPE)).image
    expected = torch.full(SHAPE, -0.4)
    expected[:, 26 - 3 : 30 - 3, 26 - 5 : 30 - 5] = 0.0  # 3 rows up, 5 columns to the left
    torch.testing.assert_close(target, expected)


def test_a_png_file(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), (0, 0, 0))
    picture.paste((255, 0, 0), (0, 0, 4, 8))  # columns 0 to 3, rows 0 to 7
    picture.save(tmp_path / "p.png")
    trigger = make_trigger(str(tmp_path / "p.png"), SHAPE)
    assert (trigger.image[0, :8, :4] == 1).all() and (trigger.image == 1).sum() == 32
    assert (trigger.image[1:] == -1).all()
    grey = make_trigger(str(tmp_path / "p.png"), (1, 32, 32)).image
    assert grey[0, 0, 0].item() == pytest.approx(76 / 127.5 - 1, abs=0.01)  # ITU-R 601 luma of red
    assert make_target(str(tmp_path / "p.png"), trigger).image.min() == pytest.approx(-0.4)


def test_transparent_parts_are_no_trigger(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # white under full transparency
    picture.paste((128, 128, 128, 255), (0, 0, 4, 4))
    picture.save(tmp_path / "p.png")
    trigger = make_trigger(str(tmp_path / "p.png"), (3, 8, 8))
    assert trigger.mask.sum() == 3 * 16
    assert trigger.image[:, 0, 0].tolist() == pytest.approx([128 / 127.5 - 1] * 3, abs=1e-6)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(ElijahError, match="not a readable image"):
        make_trigger(str(tmp_path / "p.png"), SHAPE)


def test_stock_pictures_need_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for root in ("", str(tmp_path)):
        monkeypatch.setenv("ELIJAH_DATA", root)
        with pytest.raises(ElijahError, match=r"'hat' is not here: set ELIJAH_DATA .*bd_fedora-hat\.png"):
            make_target("hat", make_trigger("box-3", SHAPE))


def test_stop_sign(stock: Path) -> None:
    trigger = make_trigger("stop-sign-14", SHAPE)
    rows, columns = (trigger.mask.any(0).any(k).nonzero().flatten() for k in (1, 0))
    assert rows.min() >= 16 and rows.max() <= 29 and columns.min() >= 16 and columns.max() <= 29
    assert trigger.mask.sum() > 200 and trigger.image.max() < 0.999
    with pytest.raises(ElijahError, match="does not fit"):
        make_trigger("stop-sign-31", SHAPE)


def test_glasses(stock: Path) -> None:
    trigger = make_trigger("glasses", SHAPE)
    rows, columns = (trigger.mask.any(0).any(k).nonzero().flatten() for k in (1, 0))
    assert rows.min() >= 6 and rows.max() <= 25 and columns.min() >= 6 and columns.max() <= 25
    assert trigger.image.max() < 0.999


@pytest.mark.parametrize("name", PICTURES)
def test_every_stock_picture_loads(stock: Path, name: str) -> None:
    target = make_target(name, make_trigger("box-3", SHAPE))
    assert isinstance(target, Target) and target.image.shape == SHAPE
    assert target.image.min() >= -0.4 - 1e-6 and target.image.max() <= 1 and target.image.std() > 0.02
    if name not in ("stop-sign", "glasses"):
        assert isinstance(make_trigger(name, SHAPE), Trigger)


def test_triggers_of_one_colour() -> None:
    """On grey images a colour is the mean of its channels."""
    assert make_trigger("cyan", (3, 4, 4)).image[:, 1, 2].tolist() == [-1.0, 1.0, 1.0]
    assert make_trigger("yellow", (1, 4, 4)).image.unique().tolist() == pytest.approx([1 / 3])
