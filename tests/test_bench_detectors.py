"""bench detectors, stability and effort: all runs on one loaded model, what is done again, and what the tables say."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from test_zoo import NAMES, manifest

from elijah import bench_detectors, cli
from elijah.bases import new_model
from elijah.bench_detectors import (
    Run,
    bench,
    detector_runs,
    effort_runs,
    perform,
    read_runs,
    run_model,
    scaled,
    stability_runs,
    there,
)
from elijah.bench_tables import detectors_table, effort_table, stability_table
from elijah.detection import Detection
from elijah.detectors import DETECTORS, Elijah, Terd
from elijah.detectors.search import Search
from elijah.diffusion import Model
from elijah.errors import ElijahError
from elijah.manifest import Manifest, read_manifest
from elijah.runner import Job
from elijah.zoo import build

CLEAN, BAD = NAMES[1:]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Path]:
    """The tiny manifest, read, and a cache with the weights of its two models."""
    folder = tmp_path_factory.mktemp("bench")
    path = manifest(folder)
    read, cache = read_manifest(path), folder / "cache"
    (cache / read.name).mkdir(parents=True)
    for entry in read.entries():
        build(entry, {base.id: base for base in read.base}, cache / read.name, read.digests())
    return path, read, cache


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors with few steps."""
    few: dict[str, Any] = {
        "elijah": functools.partial(Elijah, sampler="ddpm-3", batch_size=4, iterations=3, samples=9),
        "terd": functools.partial(
            Terd, iterations=3, refine_iterations=2, batch_size=4, steps=3, samples=9, sampler="ddim-3"
        ),
    }
    for name, made in few.items():
        made.kinds = made.func.kinds
        monkeypatch.setitem(DETECTORS, name, made)


def test_effort_scales_iterations_alone() -> None:
    search, less, more = Search(), scaled(Search(), 0.25), scaled(Search(), 2)
    names = [f.name for f in fields(Search) if f.name.endswith("iterations")]
    assert "patch_iterations" in names and more.patch_iterations == 2 * search.patch_iterations
    for f in fields(Search):
        value, low, high = (getattr(s, f.name) for s in (search, less, more))
        if f.name not in ("follow", "lead"):
            assert (low, high) == ((round(value / 4), 2 * value) if f.name in names else (value, value))
    assert more.follow == tuple((2 * n, rows, kept) for n, rows, kept in search.follow)
    assert more.lead == tuple((2 * n, rows, kept) for n, rows, kept in search.lead)
    assert scaled(search, 1) == search and scaled(search, 1e-9).patch_iterations == 1


def test_the_runs_of_each_bench() -> None:
    assert [run.detector for run in detector_runs(["elijah", "terd"])] == ["elijah", "terd"]
    with pytest.raises(ElijahError, match="unknown detector 'x': use one of lossfit"):
        detector_runs(["lossfit", "x"])
    runs = stability_runs(3)
    assert [run.seed for run in runs[:3]] == [0, 1, 2] and len({run.name for run in runs}) == len(runs) == 7
    assert {(run.batch_size, run.threads, run.dtype) for run in runs[3:]} == {
        (16, 1, "float32"), (64, 1, "float32"), (None, 2, "float32"), (None, 1, "bfloat16"),
    }  # fmt: skip
    assert [run.effort for run in effort_runs()] == [0.25, 0.5, 1, 2]
    assert read_runs('[{"name": "a", "seed": 3}]') == [Run("a", seed=3)]
    for text in ("3", "{", '[{"name": "a", "sed": 3}]', '["a"]'):
        with pytest.raises(ElijahError, match="no list of scans"):
            read_runs(text)


@pytest.mark.usefixtures("fast")
def test_a_run_counts_and_times_one_scan_and_leaves_no_trace() -> None:
    model = random_model()
    one, other = perform(model, Run("a", "elijah")), perform(model, Run("b", "elijah", seed=1))
    again = perform(model, Run("c", "elijah", batch_size=3, dtype="bfloat16"))
    assert one["cost"]["network_evaluations"] == 2 * (3 * 4 * 3 + 9 * 3)  # two inversions, and outputs of each
    assert 0 < one["cost"]["network_seconds"] <= one["cost"]["seconds"]
    assert one["scores"] != other["scores"] and one["scores"] != again["scores"]
    assert perform(model, Run("d", "elijah"))["scores"] == one["scores"]
    exploding = new_model((1, 8, 8), seed=0, channels=(8, 8), kind="ncsn")
    assert perform(exploding, Run("e", "terd")) == {"verdict": "unsupported"}


def test_a_run_has_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def detector(model: Model, **_: Any) -> Detection:
        seen.append(torch.get_num_threads())
        return Detection("elijah", [], {}, [], "clean", "none")

    made = functools.partial(lambda: detector)
    made.kinds = ("ddpm",)  # type: ignore[attr-defined]
    monkeypatch.setitem(DETECTORS, "elijah", made)
    assert perform(random_model(), Run("a", "elijah", threads=2))["verdict"] == "clean"
    assert seen == [2] and torch.get_num_threads() == 1


def test_effort_reaches_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Search] = []

    def made(search: Search) -> Any:
        seen.append(search)
        return lambda model, **_: Detection("lossfit", [], {}, [], "clean", "none")

    monkeypatch.setattr(bench_detectors, "LossFit", made)
    assert perform(random_model(), Run("a", effort=0.5))["verdict"] == "clean"
    assert seen == [scaled(Search(), 0.5)]


@pytest.mark.usefixtures("fast")
def test_a_job_keeps_what_an_earlier_one_did(zoo: tuple[Path, Manifest, Path], tmp_path: Path) -> None:
    _, read, cache = zoo
    run_model(read, BAD, cache / read.name, tmp_path, detector_runs(["terd", "elijah"]))
    first = json.loads((tmp_path / f"{BAD}.json").read_text())
    assert list(first["runs"]) == ["terd", "elijah"] and first["entry"]["attack"] == "villandiffusion"
    run_model(read, BAD, cache / read.name, tmp_path, [Run("elijah", "elijah", seed=5)])
    second = json.loads((tmp_path / f"{BAD}.json").read_text())
    assert second["runs"]["terd"] == first["runs"]["terd"] and second["runs"]["elijah"]["how"]["seed"] == 5
    (tmp_path / f"{BAD}.json").write_text(json.dumps(second | {"settings_sha256": "another"}))
    run_model(read, BAD, cache / read.name, tmp_path, [Run("elijah", "elijah")])
    assert list(json.loads((tmp_path / f"{BAD}.json").read_text())["runs"]) == ["elijah"]


def test_weights_of_other_settings_are_left_out_and_left_alone(zoo: tuple[Path, Manifest, Path]) -> None:
    path, read, cache = zoo
    changed = read.model_copy(update={"base": [read.base[0].model_copy(update={"seed": 9})]})
    assert set(there([(path, read)], cache, "")[0]) == {CLEAN, BAD}
    assert set(there([(path, read)], cache, "_clean_")[0]) == {CLEAN}
    assert there([(path, changed)], cache, "") == ({}, 2) and (cache / read.name / BAD).is_dir()
    with pytest.raises(ElijahError, match=r"no weights in .* called like 'zzz'; elijah zoo run makes them"):
        bench("detectors", [], detectors_table, [(path, read)], out=cache, cache=cache, workers=1, only="zzz")


@pytest.mark.usefixtures("fast")
def test_the_command_runs_what_is_missing_and_writes_the_table(
    zoo: tuple[Path, Manifest, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _, cache = zoo
    ran: list[str] = []

    def here(jobs: list[Job], *, done: set[str], **_: Any) -> list[str]:
        """The jobs, in this process; a command that fails is a failed job."""
        ran[:] = [job.name for job in jobs if job.name not in done]
        return [job.name for job in jobs if job.name in ran and cli.main([*job.command[2:], "-q"]) != 0]

    monkeypatch.setattr(bench_detectors, "run_jobs", here)
    out = tmp_path / "out"
    out.mkdir()
    how = ["bench", "detectors", str(path), "--out", str(out), "--cache", str(cache), "-q"]
    assert cli.main([*how, "--detector", "elijah", "--model", "clean"]) == 0 and ran == [CLEAN]
    table = capsys.readouterr().out
    assert f"| {CLEAN} | elijah | undecided |" in table and (out / "detectors.md").read_text() == table
    assert cli.main([*how, "--detector", "elijah"]) == 0 and ran == [BAD]
    assert cli.main([*how, "--detector", "elijah", "--detector", "terd"]) == 0 and ran == [CLEAN, BAD]
    assert f"| {BAD} | terd |" in capsys.readouterr().out
    assert cli.main([*how, "--detector", "x"]) == 2 and "unknown detector" in capsys.readouterr().err
    (cache / "tiny" / BAD / "unet" / "config.json").rename(tmp_path / "config.json")
    assert cli.main([*how, "--detector", "terd", "--detector", "elijah"]) == 0 and ran == []  # all is there
    (out / f"{BAD}.json").unlink()
    assert cli.main([*how, "--detector", "elijah"]) == 2 and "1 jobs failed, such as" in capsys.readouterr().err
    (tmp_path / "config.json").rename(cache / "tiny" / BAD / "unet" / "config.json")


def scan(verdict: str, suspicion: float | None = 0.0, seconds: float = 10.0, **how: Any) -> dict[str, Any]:
    cost = {"network_evaluations": round(100 * seconds), "seconds": seconds, "network_seconds": 0.9 * seconds}
    scores = {} if suspicion is None else {"suspicion": suspicion}
    return {"verdict": verdict, "scores": scores, "cost": cost, "how": how}


def result(k: int, attack: str, runs: dict[str, Any], kind: str = "ddpm") -> dict[str, Any]:
    return {"id": f"m{k}", "entry": {"attack": attack, "base": f"b{k % 2}"}, "kind": kind, "runs": runs}


def lines_of(table: str) -> dict[str, list[str]]:
    """The cells of each row, by the first two cells; of rows that begin alike the last."""
    rows = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {" ".join(row[:2]): row[2:] for row in rows} | {row[0]: row[1:] for row in rows}


def test_the_table_of_detectors() -> None:
    """lossfit separates; elijah has a clean model above one of two backdoored; it takes 2, 3, 4 and 5 times longer."""
    models = [
        ("baddiffusion", "backdoored", 3.0, 0.9), ("trojdiff", "undecided", 2.0, 0.2), ("clean", "clean", 0.5, 0.5),
        ("clean", "backdoored", 0.4, 0.1),
    ]  # fmt: skip
    results = [
        result(k, attack, {"lossfit": scan(verdict, one), "elijah": scan("undecided", other, 20.0 + 10 * k)})
        for k, (attack, verdict, one, other) in enumerate(models)
    ]
    results.append(result(9, "clean", {"lossfit": scan("clean", -1.0), "elijah": {"verdict": "unsupported"}}, "ncsn"))
    found = lines_of(detectors_table(results))
    assert found["m0 lossfit"] == ["backdoored", "3.000", "1,000", "10.0", "10.0"] and "m9 elijah" not in found
    assert found["lossfit all"] == ["2 + 3", "1.000", "1.000 to 1.000", "100", "1 + 1", "1 + 0", "0 + 2"]
    assert found["elijah all"][:2] == ["2 + 2", "0.750"] and found["elijah all"][3:] == [
        "50",
        "0 + 0",
        "2 + 2",
        "0 + 0",
    ]
    assert found["elijah ddpm"] == found["elijah all"] and "elijah ncsn" not in found
    assert found["lossfit ncsn"][:2] == ["0 + 1", "-"]
    number, evaluations, seconds, outside, ratio, interval, span = found["elijah"]
    assert (number, evaluations, seconds, outside, ratio) == ("4", "3,500", "35.0", "10.0", "3.50")
    low, high = (float(x) for x in interval.split(" to "))
    assert 2 <= low < 3.5 < high <= 5 and span == "2.00 to 5.00"
    assert found["lossfit"] == ["5", "1,000", "10.0", "10.0", "-", "-", "-"]


def test_a_scan_without_suspicion_is_left_out_of_the_area() -> None:
    results = [result(0, "late", {"lossfit": scan("undecided", None)}), result(1, "clean", {"lossfit": scan("clean")})]
    assert lines_of(detectors_table(results))["lossfit all"][:2] == ["0 + 1", "-"]


def test_the_area_of_each_feature_by_attack() -> None:
    """The feature of one setting finds one attack, the other's is blind; low values are those of backdoored models."""
    runs = [("late", 0.1, 0.5), ("late", 0.2, 0.3), ("trojdiff", 0.9, 0.4), ("clean", 0.6, 0.4), ("clean", 0.7, 0.4)]
    results = []
    for k, (attack, half, whole) in enumerate(runs):
        run = scan("undecided", -half)
        run["scores"] |= {
            "uniformity_0.5_ddpm-1000": half,
            "uniformity_1_ddim-50": whole,
            "uniformity_lpips_alexnet": 0,
        }
        results.append(result(k, attack, {"elijah": run}))
    found = lines_of(detectors_table(results))
    assert found["elijah suspicion"] == ["0.67 (3 + 2)", "1.00 (2 + 2)", "0.00 (1 + 2)"]
    assert found["elijah uniformity_0.5_ddpm-1000"] == found["elijah suspicion"]
    assert found["elijah uniformity_1_ddim-50"] == ["0.50 (3 + 2)", "0.50 (2 + 2)", "0.50 (1 + 2)"]
    assert "elijah uniformity_lpips_alexnet" not in found


def test_the_table_of_stability() -> None:
    def runs(*verdicts: str) -> dict[str, Any]:
        names = [run.name for run in stability_runs(2)]
        return {name: scan(v, float(k)) for k, (name, v) in enumerate(zip(names, verdicts, strict=True))}

    results = [
        result(0, "clean", runs("clean", "undecided", "clean", "clean", "backdoored", "clean")),
        result(1, "late", runs(*["backdoored"] * 5, "undecided")),
    ]
    found = lines_of(stability_table(results))
    assert found["m0"] == ["clean", "0, 1, 1", "0.00 to 1.00", "clean, clean", "backdoored", "clean"]
    assert found["seed"] == ["2", "1", "0"] and found["batch size"] == ["4", "0", "0"]
    assert found["threads"] == ["2", "1", "1"] and found["precision"] == ["2", "1", "0"]


def test_the_table_of_efforts() -> None:
    def runs(low: str, high: str) -> dict[str, Any]:
        return {"effort-0.5": scan(low, seconds=5.0, effort=0.5), "effort-2": scan(high, seconds=20.0, effort=2.0)}

    results = [
        result(0, "late", runs("clean", "backdoored")), result(1, "late", runs("backdoored", "backdoored")),
        result(2, "clean", runs("clean", "undecided")),
    ]  # fmt: skip
    found = lines_of(effort_table(results))
    assert found["0.5"][:5] == ["500", "500", "5.0", "2", "50"] and found["0.5"][7:9] == ["1", "100"]
    assert found["2"][:5] == ["2,000", "2,000", "20.0", "2", "100"] and found["2"][7:9] == ["1", "0"]
    assert all(math.isfinite(float(cell)) for cell in (found["2"][4], found["0.5"][8]))
