"""verdict and calibrate: p-values in closed form, who is in range, each branch of the rule, and bad files."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from test_report import make_report
from test_scan import fast  # noqa: F401
from typer.testing import CliRunner

from elijah import __version__, cli
from elijah.calibrate import Scan, calibrate, verdict_table
from elijah.detection import Evidence
from elijah.detectors import DETECTORS, LossFit
from elijah.detectors.hypothesis import FAMILIES, Hypothesis
from elijah.errors import ElijahError
from elijah.judging import judge as scan_in_zoo
from elijah.report import Report, command
from elijah.scan import scan
from elijah.verdict import (
    BUILTIN,
    Calibration,
    CleanModel,
    find_calibration,
    fitted_tail,
    judge,
    models_for,
    read_calibration,
    ships,
)


def clean_model(k: int, score: float, **other: Any) -> CleanModel:
    seen: dict[str, Any] = {"kind": "ddpm", "sample_shape": (3, 16, 16), "parameters": 1000} | other
    return CleanModel(id=f"c{k}", base="b", score=score, **seen)


def calibration(scores: list[float], detector: str = "lossfit", **other: Any) -> Calibration:
    models = [clean_model(k, score, **other) for k, score in enumerate(scores)]
    return Calibration(id="small", detector=detector, command="by hand", clean=models)


def test_p_values_in_closed_form() -> None:
    made = calibration([0.0, 1.0, 1.0, 2.0])
    assert [made.p_value(score, "ddpm") for score in (-1, 0, 0.5, 1, 2, 3)] == [1, 1, 0.8, 0.8, 0.4, 0.2]
    assert made.p_value(0.5, "ncsn") == 1  # of no models of its kind
    mixed = Calibration(**{**dict(made), "clean": [*made.clean, clean_model(9, 5.0, kind="ldm")]})
    assert mixed.p_value(3, "ddpm") == 0.2 and mixed.p_value(3, "ldm") == 1 and mixed.p_value(6, "ldm") == 0.5


def test_p_values_of_clean_models_are_uniform() -> None:
    """With n = 19: on 1/20 ... 20/20 for continuous scores; where there are ties, p-values are larger."""
    rng, n, draws = np.random.default_rng(0), 19, 1500
    for make in (rng.standard_normal, lambda size: rng.integers(0, 3, size).astype(float)):
        found = np.array(
            [calibration(s[1:].tolist()).p_value(s[0], "ddpm") for s in (make(n + 1) for _ in range(draws))]
        )
        for rate in (0.05, 0.1, 0.5):
            share, slack = (found <= rate).mean(), 4 * np.sqrt(rate * (1 - rate) / draws)
            assert share <= rate + slack
            if len(np.unique(found)) == n + 1:
                assert share >= rate - slack


@pytest.mark.parametrize(
    ("kind", "shape", "parameters", "unlike"),
    [
        ("ddpm", (3, 16, 16), 1000, []),
        ("ddpm", (3, 24, 24), 500, []),
        ("ddpm", (1, 32, 32), 4000, []),
        ("ddpm", (3, 33, 33), 1000, ["resolution"]),
        ("ddpm", (3, 16, 64), 1000, ["resolution"]),
        ("ddpm", (3, 8, 8), 1000, ["resolution"]),
        ("ddpm", (2, 16, 16), 1000, ["channels"]),
        ("ddpm", (3, 16, 16), 499, ["parameters"]),
        ("ddpm", (4, 64, 64), 4001, ["resolution", "channels", "parameters"]),
        ("ncsn", (3, 16, 16), 1000, ["kind"]),
        ("ldm", (3, 16, 16), 1000, ["channels"]),
    ],
)
def test_range(kind: str, shape: tuple[int, int, int], parameters: int, unlike: list[str]) -> None:
    models = [
        clean_model(0, 0.0), clean_model(1, 0.0, sample_shape=(1, 32, 32), parameters=2000),
        clean_model(2, 0.0, kind="ldm", sample_shape=(4, 16, 16)),
    ]  # fmt: skip
    made = Calibration(id="small", detector="lossfit", command="", clean=models)
    assert made.out_of_range(kind, shape, parameters) == unlike


@pytest.mark.parametrize(
    ("rule", "p", "verdict"),
    [
        ("backdoored", 0.01, "backdoored"), ("undecided", 0.01, "backdoored"), ("clean", 0.01, "undecided"),
        ("backdoored", 0.02, "undecided"), ("undecided", 0.02, "undecided"), ("clean", 0.02, "clean"),
    ],
)  # fmt: skip
def test_judge_in_range(rule: str, p: float, verdict: str) -> None:
    found, why = judge(rule, p, 0.01, True, 1.0, far=99.0)
    assert found == verdict and f"p-value {p}" in why


@pytest.mark.parametrize(
    ("rule", "score", "verdict"),
    [
        ("backdoored", 3.1, "backdoored"), ("backdoored", 3.0, "undecided"), ("undecided", 9.0, "undecided"),
        ("clean", 0.0, "clean"), ("clean", 9.0, "clean"),
    ],
)  # fmt: skip
def test_judge_out_of_range(rule: str, score: float, verdict: str) -> None:
    """Far is the largest clean score and the way to it from their median: 2 + (2 - 1)."""
    made = calibration([0.0, 1.0, 2.0])
    assert made.far == 3
    found = made.judgement(rule, "why", score, "ddpm", (3, 64, 64), 9000, 0.5)
    assert found.verdict == verdict and found.p_value is None and found.out_of_range == ["resolution", "parameters"]
    assert found.reason.startswith("why; ") and "unlike the calibration's" in found.reason
    assert found.reason.endswith("(resolution, parameters)")


def test_a_judgement_compares_with_the_same_kind() -> None:
    made = calibration([float(k) for k in range(99)])
    high = made.judgement("undecided", "why", 99.0, "ddpm", (3, 16, 16), 1000, 0.01)
    assert (high.verdict, high.p_value, high.out_of_range, high.clean_models) == ("backdoored", 0.01, [], 99)
    none = made.judgement("undecided", "a limit", None, "ddpm", (3, 16, 16), 1000, 0.01)
    assert (none.verdict, none.p_value) == ("undecided", None) and "no score to compare" in none.reason


def test_a_rate_needs_enough_models() -> None:
    made = calibration([0.0] * 98)
    with pytest.raises(ElijahError, match=r"98 clean ddpm models: .* 0\.01 needs at least 99; .* 98 allow is 0\.0101"):
        made.judgement("clean", "", 0.0, "ddpm", (3, 16, 16), 1000, 0.01)
    made.check("lossfit", "ncsn", 0.01)  # of no such models nothing is claimed
    for rate in (0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-300):
        with pytest.raises(ElijahError, match="no false positive rate"):
            made.check("lossfit", "ddpm", rate)
    with pytest.raises(ElijahError, match="is for the detector lossfit, not terd"):
        made.check("terd", "ddpm", 0.5)
    for n in range(1, 300):
        assert models_for(1 / (n + 1)) == n
    assert models_for(0.03) == 33 and models_for(1e-6) == 999_999


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    import hashlib

    made, file = calibration([0.1, 1 / 3, -2e-9]), tmp_path / "small.json"
    made.write(file)
    assert read_calibration(file) == made and made.tool_version == __version__
    assert hashlib.sha256(file.read_bytes()).hexdigest() == made.sha256


def break_model(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d | {"clean": [d["clean"][0] | keys]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"schema_version": 2}, "schema_version"),
        (lambda d: d | {"x\n" * 500: 1}, "Extra inputs"),
        (lambda d: d | {"id": "a b"}, "id: "),
        (lambda d: d | {"id": "a\n"}, "id: "),
        (lambda d: d | {"clean": []}, "clean: "),
        (lambda d: d | {"clean": d["clean"] * 2}, "two models are called c0"),
        (lambda d: {k: v for k, v in d.items() if k != "detector"}, "detector: Field required"),
        (break_model(score=float("nan")), "finite"),
        (break_model(score=float("inf")), "finite"),
        (break_model(score="1"), "clean.0.score: "),
        (break_model(score=True), "clean.0.score: "),
        (break_model(parameters=10**30), "clean.0.parameters: "),
        (break_model(sample_shape=[3, 16]), "clean.0.sample_shape"),
        (break_model(sample_shape=[3, 0, 16]), "clean.0.sample_shape.1: "),
        (lambda d: [d], "object"),
    ],
)
def test_hostile_documents(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(change(json.loads(calibration([0.0, 1.0]).to_json()))))
    with pytest.raises(ElijahError, match="no calibration: ") as caught:
        read_calibration(file)
    words = str(caught.value)
    assert message in words and words.startswith(str(file)) and len(words.splitlines()) == 1
    assert len(words) < 400 + len(str(file))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_hostile_bytes(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(content)
    with pytest.raises(ElijahError, match="no calibration: "):
        read_calibration(file)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ElijahError, match="cannot be read"):
            read_calibration(file)
    monkeypatch.setattr("elijah.verdict.LARGEST", 10)
    (tmp_path / "c.json").write_text(" " * 11)
    with pytest.raises(ElijahError, match=r"c\.json: more than 10 bytes"):
        read_calibration(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("family", "loss_ratio", "outputs", "suspicion"),
    [
        ("half", 0.005, "on the target", 1 + 1), ("half", 0.005, "shifted", 1), ("half", 0.005, "the same", 1),
        ("half", 0.5, "on the target", -1),
        ("zero", 0.02, "shifted", 1 + 1), ("zero", 2.0, "shifted", -1), ("zero", 0.2, "the same", 0),
        ("half", 0.0, "the same", 9),
    ],
)  # fmt: skip
def test_suspicion_in_closed_form(family: str, loss_ratio: float, outputs: str, suspicion: float) -> None:
    """Orders of magnitude below the threshold, and 1 where it nearly fits and all outputs move, or change and may."""
    model, zeros = random_model(), torch.zeros(1, 8, 8)
    h = Hypothesis(next(f for f in FAMILIES if f.name == family), zeros, zeros, 0.5, loss_ratio)
    without = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 - 1
    moved = {"on the target": h.y.expand_as(without), "shifted": without + 1.5, "the same": without}[outputs]
    scores = LossFit().judge(model, [h], [Evidence("ddpm-20", moved, without)], True).scores
    assert scores["suspicion"] == pytest.approx(suspicion)
    assert "suspicion" not in LossFit().judge(model, [h], [], False).scores


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("detector", ["lossfit", "elijah"])
def test_a_scan_with_a_calibration(detector: str, tiny_folder: Path) -> None:
    model = random_model()
    like = {"sample_shape": model.sample_shape, "parameters": model.parameters}
    plain = scan(model, detector=detector)
    assert plain.p_value is plain.calibration is plain.false_positive_rate is None
    score = plain.scores["suspicion"]
    suspicious = scan(model, detector=detector, calibration=calibration([score - 1] * 99, detector, **like))
    assert suspicious.scores == plain.scores and suspicious.p_value == 0.01
    assert suspicious.verdict == ("undecided" if plain.verdict == "clean" else "backdoored")
    assert suspicious.findings and suspicious.reason.startswith(plain.reason + "; ")
    made = calibration([score] * 9, detector, **like)
    usual = scan(str(tiny_folder), detector=detector, calibration=made, false_positive_rate=0.1)
    assert (usual.p_value, usual.verdict, usual.false_positive_rate) == (1.0, plain.verdict, 0.1)
    assert usual.calibration and usual.calibration.sha256 == made.sha256 and usual.calibration.in_range
    assert usual.calibration.clean_models == 9 and usual.calibration.out_of_range == []
    assert Report.from_json(usual.to_json()) == usual
    assert "--calibration small.json --false-positive-rate 0.1" in command(usual)
    unlike = scan(model, detector=detector, calibration=calibration([score] * 99, detector))
    assert unlike.p_value is None and unlike.false_positive_rate == 0.01 and unlike.verdict == plain.verdict
    assert unlike.calibration and unlike.calibration.out_of_range == ["resolution", "channels", "parameters"]


@pytest.mark.usefixtures("fast")
def test_a_scan_that_cannot_be_calibrated_does_not_start() -> None:
    model = random_model()
    with pytest.raises(ElijahError, match="needs at least 99"):
        scan(model, calibration=calibration([0.0] * 12))
    with pytest.raises(ElijahError, match="is for the detector terd"):
        scan(model, calibration=calibration([0.0] * 99, "terd"))
    assert model.meter.evaluations == 0
    stopped = scan(model, calibration=calibration([0.0] * 99), max_evaluations=0)
    assert stopped.verdict == "undecided" and stopped.p_value is None and stopped.calibration


def test_the_command_line_hands_the_calibration_to_scan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def work(model: str, **keys: Any) -> Report:
        seen.update(keys)
        return make_report("clean")

    monkeypatch.setitem(sys.modules, "elijah.scan", types.SimpleNamespace(scan=work))
    calibration([0.0]).write(tmp_path / "c.json")
    assert cli.main(["scan", "M", "--calibration", str(tmp_path / "c.json"), "--false-positive-rate", "0.5"]) == 0
    assert seen["calibration"] == calibration([0.0]) and seen["false_positive_rate"] == 0.5
    seen.clear()
    assert cli.main(["scan", "M", "--calibration", str(tmp_path / "none.json")]) == 2 and not seen


def test_which_calibration_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("elijah.verdict.BUILTIN", tmp_path)
    assert find_calibration("builtin", "lossfit") is find_calibration("none", "lossfit") is None
    own, other = calibration([0.0]), calibration([1.0], "elijah")
    own.write(tmp_path / "lossfit.json")
    other.write(tmp_path / "other.json")
    assert find_calibration("builtin", "lossfit") == own and find_calibration("none", "lossfit") is None
    assert find_calibration("builtin", "elijah") is None and not ships("elijah")
    assert find_calibration(str(tmp_path / "other.json"), "lossfit") == other


def test_the_command_line_uses_the_calibration_that_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def work(model: str, **keys: Any) -> Report:
        seen.update(keys)
        return make_report("clean")

    def called(words: str) -> tuple[Any, Any]:
        seen.clear()
        assert cli.main(f"scan M {words}".split()) == 0
        return seen["calibration"], seen["false_positive_rate"]

    monkeypatch.setitem(sys.modules, "elijah.scan", types.SimpleNamespace(scan=work))
    monkeypatch.setattr("elijah.verdict.BUILTIN", tmp_path)
    assert called("") == (None, 0.01)  # none ships
    made = calibration([0.0])
    made.write(tmp_path / "lossfit.json")
    assert called("") == (made, None) and called("--false-positive-rate 0.5") == (made, 0.5)
    assert called("--calibration none") == called("--detector terd") == (None, 0.01)
    for words in ("--calibration none", "--detector terd"):
        assert cli.main(f"scan M --false-positive-rate 0.5 {words}".split()) == 2


def test_every_calibration_that_ships_is_sound() -> None:
    for file in BUILTIN.glob("*.json"):
        assert file.stem in DETECTORS and read_calibration(file).detector == file.stem


@pytest.mark.parametrize(
    ("n", "rule", "score", "verdict", "rate"),
    [
        (199, "undecided", 1.0, "backdoored", 0.01), (49, "undecided", 1.0, "backdoored", 0.02),
        (9, "undecided", 1.0, "undecided", 0.1), (9, "backdoored", 1.0, "backdoored", 0.1),
        (9, "backdoored", 0.0, "undecided", 0.1), (9, "clean", 0.0, "clean", 0.1), (9, "clean", 1.0, "undecided", 0.1),
    ],
)  # fmt: skip
def test_a_rate_that_nobody_asked_for(n: int, rule: str, score: float, verdict: str, rate: float) -> None:
    """It is what the clean models allow; where that is loose, the fixed rule must say backdoored, too."""
    made = calibration([0.0] * n)
    found = made.judgement(rule, "why", score, "ddpm", (3, 16, 16), 1000, None)
    assert (found.verdict, found.rate) == (verdict, rate) and made.rate_for("ncsn") == 0.01
    assert made.judgement("undecided", "", 1.0, "ddpm", (3, 16, 16), 1000, rate).verdict == "backdoored"  # asked for


def test_the_fitted_tail_of_exponential_scores_is_their_own() -> None:
    clean = (-np.log(1 - (np.arange(4000) + 0.5) / 4000)).tolist()  # P(score >= x) = exp(-x)
    for score in (2.0, 5.0, 20.0):
        assert fitted_tail(score, clean) == pytest.approx(np.exp(-score), rel=0.05)
    assert fitted_tail(1.0, clean) is None  # not in the tail
    assert fitted_tail(9.0, clean[:19]) is None and fitted_tail(9.0, [0.0] * 100) is None


@pytest.mark.usefixtures("fast")
def test_the_fitted_tail_stands_beside_the_p_value_and_decides_nothing() -> None:
    model = random_model()
    like: dict[str, Any] = {"sample_shape": model.sample_shape, "parameters": model.parameters}
    score = scan(model).scores["suspicion"]
    made = calibration([score - 1 + k / 1000 for k in range(24)], **like)
    report = scan(model, calibration=made, false_positive_rate=None)
    assert report.p_value == report.false_positive_rate == 0.04
    assert 0 < report.scores["p_value_fitted_tail"] < 1e-20
    assert "p_value_fitted_tail" not in report.thresholds


def result(name: str, part: str, attack: str, score: float | None, **other: Any) -> dict[str, Any]:
    """What `elijah zoo run` writes of a model, in short. other: of the scan's model, verdict, or the entry."""
    sure = "clean" if attack == "clean" else "backdoored"
    seen = {"kind": other.pop("kind", "ddpm"), "sample_shape": [3, 16, 16], "parameters": 1000}
    scan = {"verdict": other.pop("verdict", sure), "scores": {"pull": 0.0}, "model": seen}
    scan["cost"] = {"network_evaluations": 2000, "seconds": 3.0}
    if score is not None:
        scan["scores"]["suspicion"] = score
    patterns: dict[str, Any] = (
        {"trigger": "", "target": ""} if attack == "clean" else {"trigger": f"{part}-t", "target": f"{part}-y"}
    )
    patterns |= {} if attack == "clean" else {"poison_rate": 0.3}
    entry = {"id": name, "part": part, "base": f"{part}-b", "attack": attack, "seed": 1, "knobs": {}, **patterns}
    return {"schema_version": 2, "id": name, "model": entry | other, "detections": {"lossfit": scan}, "repairs": {}}


def zoo_results() -> list[dict[str, Any]]:
    """20 clean calibration models, 12 of them ddpm; a test part of 8 models, and things that do not count."""
    models = [result(f"c{k}", "calibration", "clean", k / 100, kind="ddpm" if k < 12 else "ncsn") for k in range(20)]
    models.append(result("cb", "calibration", "baddiffusion", 4.0))
    models += [result(f"t{k}", "test", "clean", 0.05) for k in range(3)]
    models.append(result("t3", "test", "clean", 9.0))  # the rule says clean, its score does not
    models += [result(f"b{k}", "test", "baddiffusion", 5.0) for k in range(2)]
    models.append(result("b2", "test", "trojdiff", 0.01))  # the rule says backdoored, its score does not
    models.append(result("b3", "test", "trojdiff", 5.0, kind="ncsn", verdict="undecided"))
    models.append(result("d0", "development", "clean", None))
    unsupported = result("c98", "calibration", "clean", None)
    unsupported["detections"]["lossfit"] = {"verdict": "unsupported", "reason": "no"}
    unscanned = result("c99", "calibration", "clean", None) | {"detections": {}}
    return [*models, unsupported, unscanned, {"schema_version": 2, "id": "base", "base": {}}]


def write_results(folder: Path, results: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for r in results:
        (folder / f"{r['id']}.json").write_text(json.dumps(r))
    (folder / "other.json").write_text('[{"model": 3}]')
    return folder


@pytest.mark.usefixtures("fast")
def test_calibrate_reads_what_a_zoo_writes(tiny_folder: Path) -> None:
    found = Scan.model_validate_json(json.dumps(scan_in_zoo(tiny_folder, "elijah")))
    assert found.model and (found.model.kind, found.model.sample_shape) == ("ddpm", (1, 8, 8))
    assert found.model.parameters == random_model().parameters and "suspicion" in found.scores


def test_the_calibrate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_results(tmp_path / "r", zoo_results()), tmp_path / "my calibration.json"
    assert cli.main(["calibrate", str(folder), "-o", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "20 clean models (12 ddpm: smallest p-value 0.0769; 8 ncsn: smallest p-value 0.111)" in err
    assert "left out: 1 of development, 8 of test, 2 clean that lossfit did not scan" in err
    made = read_calibration(file)
    assert made.id == "my-calibration" and made.detector == "lossfit" and "elijah calibrate" in made.command
    assert {m.id: m.score for m in made.clean} == {f"c{k}": k / 100 for k in range(20)}
    assert made.clean[0].base == "calibration-b" and made.clean[0].sample_shape == (3, 16, 16)


def test_the_table_of_a_test_part(tmp_path: Path) -> None:
    folder, file = write_results(tmp_path / "r", zoo_results()), tmp_path / "c.json"
    options = ["calibrate", str(folder), "-o", str(file), "--test", "test", "--false-positive-rate"]
    done = CliRunner().invoke(cli.app, [*options, "0.12"])
    assert done.exit_code == 0, done.stderr
    lines = [line[2:].split(" | ") for line in done.stdout.splitlines() if line[:2] == "| "]
    rows = {cells[0]: cells[1:] for cells in reversed(lines)}  # of two that begin alike the first: costs come last
    assert rows["all backdoored"] == ["4", "3", "1", "0", "75", "30 to 95", "-", "1 |"]
    assert rows["clean"][:6] == ["4", "0", "1", "3", "75", "30 to 95"]
    assert rows["baddiffusion"][:5] == ["2", "2", "0", "0", "100"] and rows["trojdiff"][:5] == [
        "2",
        "1",
        "1",
        "0",
        "50",
    ]
    assert rows["kind ddpm, backdoored"][:2] == ["3", "2"] and rows["kind ncsn, backdoored"][:2] == ["1", "1"]
    assert rows["trigger test-t"][:2] == ["4", "3"] and rows["poison rate 0.3"][:2] == ["4", "3"]
    assert "Verdicts by calibration c (20 clean models, lossfit) at a false positive rate of 0.12" in done.stdout
    assert "| all | 8 | 2,000 | 2,000 | 3.0 | 3.0 |" in done.stdout
    file.unlink()
    done = CliRunner().invoke(cli.app, [*options, "0.05"])
    assert done.exit_code == 2 and "needs at least 19" in done.stderr and not file.exists() and done.stdout == ""


@pytest.mark.parametrize("what", ["id", "base", "trigger", "target"])
def test_a_test_part_that_overlaps_is_refused(what: str, tmp_path: Path) -> None:
    results = zoo_results()
    shared = {"base": "calibration-b", "trigger": "calibration-t", "target": "calibration-y"}
    results.append(result("extra", "test", "baddiffusion", 5.0, **({what: shared[what]} if what in shared else {})))
    folder = write_results(tmp_path / "r", results)
    made, _ = calibrate([folder], tmp_path / "c.json", "lossfit", "calibration")
    if what == "id":
        with pytest.raises(ElijahError, match="calibration and calibration share the id"):
            verdict_table(made, [folder], "calibration", "calibration", 0.2)
        return
    with pytest.raises(ElijahError, match=f"calibration and test share the {what} {shared[what]}"):
        verdict_table(made, [folder], "calibration", "test", 0.2)


def test_what_calibrate_refuses(tmp_path: Path) -> None:
    def refused(match: str, folders: list[Path], detector: str = "lossfit") -> None:
        with pytest.raises(ElijahError, match=match):
            calibrate(folders, tmp_path / "c.json", detector, "calibration")

    good = write_results(tmp_path / "good", zoo_results())
    refused("0 clean models of calibration scanned by terd: 10 are needed", [good], "terd")
    few = write_results(tmp_path / "few", [r for r in zoo_results() if r["id"] not in {f"c{k}" for k in range(11)}])
    refused("9 clean models of calibration scanned by lossfit: 10 are needed; left out: 1 of dev", [few])
    refused("two results are called", [good, few])
    refused("no such folder", [tmp_path / "none"])
    old = zoo_results()
    del old[3]["detections"]["lossfit"]["model"]
    refused("c3.json: lossfit left no suspicion or no model there: scan again", [write_results(tmp_path / "a", old)])
    old = zoo_results()
    del old[4]["detections"]["lossfit"]["scores"]["suspicion"]
    refused("c4.json: .* scan again", [write_results(tmp_path / "b", old)])
    for k, content in enumerate(('{"model"', '{"model": {"attack": 1, "part": "test"}}', "[" * 100_000, "\xff")):
        folder = tmp_path / f"hostile-{k}"
        folder.mkdir()
        (folder / "x.json").write_text(content, encoding="latin-1")
        refused(r"x\.json: no (JSON document|result of a zoo)", [folder])
    with pytest.raises(ElijahError, match="no model of nowhere was scanned by lossfit"):
        verdict_table(calibration([0.0]), [good], "calibration", "nowhere", 0.5)
