"""forest: a separable set is learned, an attack that looks like clean models is not found, shared parts are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elijah import cli
from elijah.detectors.hypothesis import FAMILIES
from elijah.errors import ElijahError
from elijah.forest import FEATURES, Sample, features, forest_table, verdicts


def result(part: str, attack: str, k: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    """As elijah zoo run writes it."""
    patterns = {} if attack == "clean" else {"trigger": f"box-{part}", "target": f"hat-{part}"}
    model = {"id": f"{part}-{attack}-{k}", "part": part, "base": f"base-{part}", "attack": attack, **patterns}
    scan = {"verdict": "undecided", "reason": "", "scores": scores}
    return {"model": model | changes, "detections": {"lossfit": scan}}


def zoo(test: str = "test") -> list[dict[str, Any]]:
    """Six clean models a part, whose losses stay high; a and b fall and pull, c looks clean, d is in the test alone."""
    made = []
    for part in ("calibration", test):
        for k in range(6):
            noise = 0.01 * k
            low = {"loss_ratio_half": 0.05 + noise, "pull": 1 - noise, "suspicion": 2.0}
            high = {"loss_ratio_half": 0.8 - noise, "pull": noise, "suspicion": -1.0}
            made.append(result(part, "clean", k, high))
            made.append(result(part, "a", k, low))
            if k < 4:
                made.append(result(part, "b", k, low))
                made.append(result(part, "c", k, high))
        made.append(result(part, "unscanned", 0, {}))
        made[-1]["detections"] = {}
    both = {"loss_ratio_half": 0.1, "loss_ratio_full": 0.1, "pull": 0.9, "suspicion": 1.5}
    made += [result(test, "d", k, both) for k in range(2)]
    return made


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for one in results:
        (folder / f"{one['model']['id']}.json").write_text(json.dumps(one))
    return folder


def rows(table: str) -> dict[str, list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_every_family_has_its_place_and_what_was_not_reached_looks_clean() -> None:
    names = list(FEATURES["lossfit"])
    assert {f"loss_ratio_{family.name}" for family in FAMILIES} <= set(names)
    found = features({"pull": 0.5, "loss_ratio_full": 0.25, "pull_ddpm-20": 9.0}, "lossfit")
    assert found[names.index("pull")] == 0.5 and found[names.index("loss_ratio_full")] == 0.25
    assert found[names.index("loss_ratio_half")] == 1 and found[names.index("shift_p")] == 1 and 9.0 not in found
    assert features({"total_variation": 3.0, "uniformity_pairwise_mse": 2.0}, "elijah")[1:] == [2.0, 3.0]
    with pytest.raises(ElijahError, match="no scores of x"):
        features({}, "x")


def test_a_separable_set_is_learned() -> None:
    train = [Sample("clean", [1.0, 0.1 * k]) for k in range(9)] + [Sample("a", [0.0, 0.1 * k]) for k in range(9)]
    said = verdicts(train, [Sample("b", [0.1, 0.5]), Sample("clean", [0.9, 0.5]), Sample("b", [0.2, 0.0])])
    assert said == ["backdoored", "clean", "backdoored"]
    assert verdicts(train, []) == []


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "r", zoo())
    assert cli.main(["bench", "forest", str(folder), "--detector", "lossfit", "-q"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["a"] == ["6 + 6", "6 of 10", "60", "31 to 83", "6 of 6", "100", "61 to 100", "6 of 6"]
    assert found["b"][:3] == ["6 + 4", "8 of 12", "67"] and found["b"][-1] == "4 of 4"
    assert found["c"][0] == "6 + 4" and found["c"][-1] != "4 of 4"  # nothing tells c from clean
    assert found["d"] == ["no model in calibration", *["-"] * 7]
    assert "unscanned" not in found


def test_another_part_can_be_trained_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", zoo())
    swapped = rows(forest_table([folder], "lossfit", "test", "calibration"))
    assert swapped["d"][:2] == ["6 + 2", "10 of 14"] and swapped["d"][-1] == "-"


@pytest.mark.parametrize("what", ["base", "trigger", "target"])
def test_parts_that_share_are_refused(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"calibration": "base-test", "trigger": "box-test", "target": "hat-test", "base": "base-test"}[what]
    folder = write(tmp_path / "r", [*zoo(), result("calibration", "e", 0, {"pull": 0.1}, **{what: shared})])
    assert cli.main(["bench", "forest", str(folder)]) == 2
    assert f"calibration and test share the {what} {shared}" in capsys.readouterr().err


def test_a_part_without_clean_scans_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", [r for r in zoo() if r["model"]["attack"] != "clean"])
    with pytest.raises(ElijahError, match="no clean model of calibration was scanned by lossfit"):
        forest_table([folder], "lossfit", "calibration", "test")
