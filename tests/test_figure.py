"""figure: every scanned model is a dot, at its suspicion, in the row of its attack."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from elijah.errors import ElijahError
from elijah.figure import suspicion_figure


def write(folder: Path, name: str, attack: str, suspicion: float, verdict: str) -> None:
    model = {"id": name, "part": "test", "base": "b", "attack": attack}
    scan = {"verdict": verdict, "scores": {"suspicion": suspicion}}
    (folder / f"{name}.json").write_text(json.dumps({"model": model, "detections": {"lossfit": scan}}))


def test_dots_lie_in_order_and_wear_their_verdict(tmp_path: Path) -> None:
    for name, attack, suspicion, verdict in (
        ("a", "clean", -0.4, "clean"), ("b", "clean", -0.2, "clean"), ("c", "x<y", 1.9, "backdoored"),
        ("d", "x<y", 0.3, "undecided"),
    ):  # fmt: skip
        write(tmp_path, name, attack, suspicion, verdict)
    svg = suspicion_figure([tmp_path], "lossfit")
    ElementTree.fromstring(svg)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" fill="([^"]+)"', svg)
    assert len(dots) == 4 and "x&lt;y (2)" in svg and "clean (2)" in svg
    assert [fill for *_, fill in dots][:2] == ["none", "none"] and dots[-1][2] != dots[-2][2]
    assert float(dots[0][0]) < float(dots[1][0]) < float(dots[2][0]) < float(dots[3][0])
    assert float(dots[1][1]) < float(dots[2][1])  # clean models first


def test_without_scans_there_is_nothing_to_draw(tmp_path: Path) -> None:
    write(tmp_path, "a", "clean", -0.4, "clean")
    for detector, part in (("terd", None), ("lossfit", "calibration")):
        with pytest.raises(ElijahError, match="left no suspicion"):
            suspicion_figure([tmp_path], detector, part)
