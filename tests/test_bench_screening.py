"""bench screening: its numbers against closed forms, and one that a report of the true trigger makes perfect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from test_screen import SHAPE, draw, pattern, scanned
from test_zoo import NAMES, TINY, manifest

from elijah import bench_screening, cli
from elijah.attacks.planting import attack_for
from elijah.bench_screening import area, run_screening, screening_table, separation
from elijah.bench_screening import bench_screening as bench
from elijah.errors import ElijahError
from elijah.manifest import read_manifest
from elijah.screen import screen

BACKDOORED = NAMES[2]


def separated(tmp_path: Path, length: float, n: int) -> dict[str, Any]:
    """What separation says where the found trigger is the true one, of this norm."""
    r = pattern(length)
    np.save(tmp_path / "noise.npy", np.concatenate([draw(n, 1), draw(n, 2, r)]))
    (tmp_path / "scan.json").write_text(scanned(r, verdict="backdoored").to_json())
    return separation(screen(tmp_path / "noise.npy", tmp_path / "scan.json"), n)


def test_a_strong_trigger_is_told_apart_without_error(tmp_path: Path) -> None:
    found = separated(tmp_path, 12.0, 200)
    assert [found[key] for key in ("auroc", "low", "high", "expected_auroc")] == pytest.approx([1, 1, 1, 1])
    for at in found["rates"].values():
        assert at["detected"] == at["flagged"] == 1 and at["false_alarms"] < 0.12


def test_a_weak_trigger_is_told_apart_as_the_closed_forms_say(tmp_path: Path) -> None:
    """Scores are N(0, |r|^2) and N(|r|^2, |r|^2), and so AUROC Phi(|r| / sqrt 2), detection Phi(|r| - z)."""
    found = separated(tmp_path, 1.5, 4000)
    expected = norm.cdf(1.5 / np.sqrt(2))
    assert found["auroc"] == pytest.approx(expected, abs=0.015) and found["low"] < expected < found["high"]
    assert found["high"] - found["low"] < 0.03
    for rate, at in found["rates"].items():
        power = norm.cdf(1.5 + norm.ppf(float(rate)))
        assert at["detected"] == pytest.approx(power, abs=0.06) and at["flagged"] == pytest.approx(power, abs=0.03)
        assert at["false_alarms"] == pytest.approx(float(rate), abs=0.015)


def test_at_most_the_rate_of_clean_noise_is_above_the_threshold(tmp_path: Path) -> None:
    r, n = pattern(1.5), 100
    noise = np.concatenate([draw(n, 1), draw(n, 2, r)])
    found = separated(tmp_path, 1.5, n)
    scores = noise[:n].reshape(n, -1) @ pattern(1.5).ravel()
    for rate, at in found["rates"].items():
        above = (scores > at["threshold"]).mean()
        assert float(rate) - 0.01 <= above <= float(rate)


def test_area() -> None:
    assert area(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert area(np.array([0.0, 3.0]), np.array([1.0, 2.0])) == 0.5


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A manifest of colour images, so that test_screen's reports fit."""
    return manifest(tmp_path, TINY.replace("channels = 1", "channels = 3"))


def test_a_row_and_the_table(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stamping knows the true trigger, the screening the report's: a report of the true one separates fully."""
    read, out, cache = read_manifest(zoo), tmp_path / "out", tmp_path / "cache"
    (cache / "tiny").mkdir(parents=True)
    out.mkdir()
    true = attack_for("villandiffusion", SHAPE, {"trigger": "box-3", "target": "corner"}).trigger.image.numpy()
    told: list[tuple[str, dict[str, Any]]] = []

    def scan(folder: str, **settings: Any) -> Any:
        told.append((folder, settings))
        return scanned(true, verdict="backdoored")

    monkeypatch.setattr(bench_screening, "scan", scan)
    run_screening(read, BACKDOORED, cache / "tiny", out, 100)
    assert told == [(str(cache / "tiny" / BACKDOORED), {"detector": "lossfit", "device": "cpu"})]
    result = json.loads((out / f"{BACKDOORED}.json").read_text())
    assert result["verdict"] == "backdoored" and result["cases"][""]["auroc"] == 1
    how = ["--out", str(out), "--cache", str(cache), "--samples", "100", "-q"]
    assert cli.main(["bench", "screening", str(zoo), *how]) == 0  # only collects: the row is there
    table = capsys.readouterr().out
    assert table == (out / "screening.md").read_text() and f"| {BACKDOORED} | BadDiffusion-like |" in table
    assert "1.0000 | 1.0000 to 1.0000" in table and "Medians of 1 rows: AUROC 1.0000; detected 100.0 % at 0.01" in table


def test_without_a_backdoored_verdict_nothing_is_screened(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(bench_screening, "scan", lambda *_, **__: scanned(pattern(3.0), verdict="undecided"))
    run_screening(read_manifest(zoo), BACKDOORED, tmp_path / "cache" / "tiny", tmp_path, 100)
    result = json.loads((tmp_path / f"{BACKDOORED}.json").read_text())
    assert result["cases"] == {} and result["verdict"] == "undecided"
    assert f"Not screened, since the scan did not say backdoored: {BACKDOORED} (undecided)" in screening_table([result])


def test_no_model_to_screen_is_said(zoo: Path, tmp_path: Path) -> None:
    where = {"out": tmp_path, "cache": tmp_path, "workers": 1, "n": 100}
    with pytest.raises(ElijahError, match="no backdoored model is called like 'clean'"):
        bench([(zoo, read_manifest(zoo))], only="clean", **where)  # type: ignore[arg-type]
