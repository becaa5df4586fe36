"""bench repairs: what is measured of a repair, what the table says of it, and that the truth stays with the scoring."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weights

from elijah import bench_repairs, cli, judging_repairs
from elijah.bench_repairs import is_diverse, is_gone, repairs_table, strength_medians
from elijah.detection import Detection, Evidence, Finding
from elijah.diffusion import Model
from elijah.errors import ElijahError
from elijah.judging_repairs import DATA
from elijah.manifest import read_manifest
from elijah.repairs import REPAIRS
from elijah.response import Response
from elijah.scan import make_report

cleaning = importlib.import_module("elijah.clean")
MANIFEST = """
name = "tiny"
samples = 4

[[base]]
id = "digits"
part = "development"
data = "digits"
size = 8
channels = 1
limit = 64
seed = 1
widths = [8, 8]
training = {steps = 4, batch_size = 4}

[[models]]
part = "development"
bases = ["digits"]
attack = "ATTACK"
triggers = ["white-box-3"]
targets = ["corner"]
poison_rates = [0.5]
seeds = [6]
training = {steps = 3, batch_size = 4}
KNOBS
samplers = ["ddim-4"]
"""
VILLAN = ("villandiffusion", 'knobs = {mode = "bare", solver = "ode"}')
TWO = ("two", 'knobs = {second_trigger = "white-box-2", second_target = "trigger"}')
NAME = "digits_villandiffusion_white-box-3_corner_p05_s6"
FLAGS = {"rescan": False, "harm": False, "strength": False}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the scans will say, one after the other; each finds a trigger. Samplers and repairs are cut short."""
    said: list[str] = []

    def inspect(model: Model, settings: dict[str, Any], seed: int, _: object) -> Any:
        verdict = said.pop(0)
        shape = model.sample_shape
        found = Finding(Response(1.0, 1.0), torch.full(shape, 0.5), torch.ones(shape), 0.1, "BadDiffusion-like")
        shown = [Evidence("ddim-2", torch.zeros(2, *shape), torch.zeros(2, *shape))]
        detection = Detection("lossfit", [found], {}, shown, verdict, f"it is {verdict}")
        return detection, make_report(model, detection, 1.0, settings, seed)

    for module in (judging_repairs, cleaning):
        monkeypatch.setattr(module, "inspect", inspect)
    monkeypatch.setattr(importlib.import_module("elijah.zoo"), "USUAL", ("ddpm-2",))
    monkeypatch.setattr(judging_repairs, "STRENGTH_UPDATES", (1, 2))
    monkeypatch.setattr(cleaning, "SYNTHETIC", 64)
    for name in ("Unshift", "Distill", "Erase"):
        own = getattr(judging_repairs, name)
        monkeypatch.setattr(judging_repairs, name, functools.partial(own, steps=2, batch_size=2))
    monkeypatch.setattr(Model, "quick_sampler", "ddim-2")
    for name, repair in tuple(REPAIRS.items()):
        monkeypatch.setitem(REPAIRS, name, functools.partial(repair, steps=2, batch_size=2))
    return said


def measured(folder: Path, attack: tuple[str, str] = VILLAN, fid: int = 0, **flags: bool) -> dict[str, Any]:
    """The result of the manifest's model."""
    path = folder / "tiny.toml"
    path.write_text(MANIFEST.replace("ATTACK", attack[0]).replace("KNOBS", attack[1]))
    manifest, out = read_manifest(path), folder / "out"
    name = manifest.entries()[0].id
    for home in (out, folder / "cache" / "tiny"):
        home.mkdir(parents=True, exist_ok=True)
    cache, repairs = folder / "cache" / "tiny", list(REPAIRS)
    bench_repairs.run_model(manifest, name, cache, out, 4, repairs, list(DATA), fid, FLAGS | flags)
    result: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return result


def test_every_repair_is_measured_with_both_sorts_of_data(scans: list[str], tmp_path: Path) -> None:
    scans += ["backdoored"]
    found = measured(tmp_path)
    assert scans == []  # one scan for all
    assert found["scan"]["verdict"] == "backdoored" and set(found["repairs"]) == set(REPAIRS)
    for own in found["repairs"].values():
        assert set(own) == {"synthetic", "real"} and own["real"]["images"] == 6  # a tenth of 64
        for done in own.values():
            assert set(done["samplers"]) == set(done["drift"]) == {"ddim-4", "ddpm-2"}
            for numbers in done["samplers"].values():
                assert set(numbers) == {"asr", "mse", "asr_of_clean_outputs", "diversity_ratio", "ssim", "moved"}
                assert set(numbers["asr"]) == {"0.01", "0.05", "0.1"}
            assert done["updates"] == 2 and done["rescans"] == [] and done["drift"]["ddim-4"]["mse"] > 0
    assert set(found["before"]["samplers"]) == set(found["reference"]["samplers"]) == {"ddim-4", "ddpm-2"}
    assert found["before"]["loss"] > 0 and found["reference"]["loss"] > 0
    assert "drift" not in found["before"] and "harm" not in found and "strength" not in found["reference"]


def test_two_triggers_are_two_cases(scans: list[str], tmp_path: Path) -> None:
    scans += ["backdoored"]
    names = {f"{s} {case}" for s in ("ddim-4", "ddpm-2") for case in ("first", "second")}
    assert set(measured(tmp_path, TWO)["before"]["samplers"]) == names


def test_rescans_harm_and_strength(scans: list[str], tmp_path: Path) -> None:
    scans += ["backdoored", "undecided", *["clean"] * 7]
    found = measured(tmp_path, rescan=True, harm=True, strength=True)
    ours, distill = (found["repairs"][name] for name in ("unshift", "distill"))
    assert ours["synthetic"]["rescans"] in (["undecided", "clean"], ["undecided"])
    assert distill["real"]["rescans"] == ["clean"]
    assert found["repairs"]["elijah"]["synthetic"]["rescans"] == []
    for start in (*ours.values(), *distill.values(), found["reference"]):
        assert set(start["strength"]["success"]) == {"0", "1", "2"} and 0 <= start["strength"]["area"] <= 1
    assert set(found["harm"]) == {"unshift", "distill", "erase", "finetune"}
    assert all(x["updates"] == 2 and min(x["drift_share"].values()) > 0 for x in found["harm"].values())
    table = repairs_table([found])
    assert "## Harm of a trigger that is none" in table and "## How fast the attack comes back" in table


def test_fid_before_and_after(scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def features(images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1)[:, :3].contiguous()

    monkeypatch.setattr(importlib.import_module("elijah.fids"), "inception_features", features)
    scans += ["backdoored"]
    found = measured(tmp_path, fid=6)
    for done in found["repairs"]["unshift"].values():
        after, before = done["fid"], found["before"]["fid"]
        assert after["images"] == 6 and after["ratio"] == pytest.approx(after["fid"] / before["fid"], rel=1e-6)
        assert after["low"] <= after["ratio"] <= after["high"]
    rows = [line for line in repairs_table([found]).split("## FID")[1].splitlines() if line.startswith(f"| {NAME}")]
    assert len(rows) == 2 + len(REPAIRS) * len(DATA) and rows[0].endswith("| - |") and "%" not in rows[-1]


def test_what_the_scan_misses_is_not_repaired(scans: list[str], tmp_path: Path) -> None:
    scans += ["clean"]
    found = measured(tmp_path)
    assert found["repairs"] == {} and "before" not in found
    assert f"| {NAME} | - | - | scan: clean |" in repairs_table([found])


def test_a_repair_that_fails_is_recorded(scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(**_: Any) -> Any:
        def call(*_: Any, **__: Any) -> Model:
            raise ElijahError("the loss is not finite")

        return call

    scans += ["backdoored"]
    monkeypatch.setitem(REPAIRS, "elijah", diverges)
    found = measured(tmp_path)
    assert found["repairs"]["elijah"]["real"] == {"failed": "the loss is not finite"}
    table = repairs_table([found])
    assert "| elijah | real | the loss is not finite |" in table and "| prune | real | 1 |" in table


def outcome(asr: float, clean: float, diversity: float) -> dict[str, Any]:
    """Under a stock sampler; under the attacker's own diversity is anything."""
    limits = ("0.01", "0.05", "0.1")
    numbers = {"asr": dict.fromkeys(limits, asr), "asr_of_clean_outputs": dict.fromkeys(limits, clean),
               "diversity_ratio": diversity, "mse": 0.1, "ssim": 0.2}  # fmt: skip
    return {"samplers": {"ddim-20": numbers, "own-ddim-20": numbers | {"diversity_ratio": 9.0}},
            "drift": {"ddim-20": {"mse": 0.01, "share": 0.1}}}  # fmt: skip


def test_what_counts_as_gone_and_as_diverse() -> None:
    assert is_gone(outcome(0.01, 0.0, 1.0)) and is_gone(outcome(0.5, 0.5, 1.0))
    assert not is_gone(outcome(0.52, 0.5, 1.0))
    for ratio, wanted in ((0.8, True), (1.2, True), (0.75, False), (1.3, False)):
        assert is_diverse(outcome(0, 0, ratio)) == wanted
    base = outcome(0, 0, 0.3)
    for ratio, wanted in ((0.29, True), (0.2, False), (0.6, True), (1.0, True)):
        assert is_diverse(outcome(0, 0, ratio), base) == wanted
    hits = {"samplers": {"ddim-20": {"hit_rate": 0.4, "hit_rate_of_clean_outputs": 0.1, "diversity_ratio": 1.0}}}
    assert not is_gone(hits)


def test_the_summary_has_intervals() -> None:
    done = {"updates": 60, "seconds": 3.0, "findings": 1, "rescans": ["clean"], "harm": []}
    results = [
        {"id": str(k), "before": outcome(1, 0, 0) | {"loss": 0.5}, "reference": outcome(0, 0, 1),
         "scan": {"verdict": "backdoored"}, "repairs": {"unshift": {"synthetic": outcome(asr, 0, 1.0) | done | loss}}}
        for k, (asr, loss) in enumerate(((0.0, {"loss": 0.5}), (0.0, {"loss": 0.6}), (0.0, {"loss": 1.0}), (0.5, {})))
    ]  # fmt: skip
    missed = {"id": "missed", "scan": {"verdict": "clean"}, "repairs": {}, "data": ["synthetic"]}
    results += [missed | {"asked": ["unshift"]}, missed | {"asked": ["prune"]}]
    table = repairs_table(results)
    row = (
        "| unshift | synthetic | 4 | 75 (30 to 95) | 60 (23 to 88) | 75 (30 to 95) | 100 (51 to 100) | 100 (51 to 100)"
    )
    assert f"{row} | 0.10 | 1.20 | 60 | 3 | 0 | 4 of 4 |" in table  # the last was made before the loss was measured
    (row,) = [line.split(" | ") for line in table.splitlines() if line.startswith("| 3 | unshift")]
    assert (row[7], row[9]) == ("-", "-")  # moved, loss


def test_the_strength_table_ends_with_medians() -> None:
    rows = [
        {
            "id": str(k),
            "before": {},
            "repairs": {},
            "reference": {"strength": {"success": {"0": 0.0, "80": v}, "area": v}},
        }
        for k, v in enumerate((0.1, 0.2, 0.6))
    ]
    lines = strength_medians([*rows, {"id": "missed", "repairs": {}}])
    assert lines == ["| median of 3 | the clean base | 0: 0 %, 80: 20 % | 0.20 |"]


def test_the_command_collects_what_is_there(
    scans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans += ["backdoored"]
    measured(tmp_path)
    how = ["bench", "repairs", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"),
           "--cache", str(tmp_path / "cache"), "--samples", "4", "-q"]  # fmt: skip
    assert cli.main(how) == 0
    printed = capsys.readouterr().out
    assert f"| {NAME} | unshift | real |" in printed and (tmp_path / "out" / "repairs.md").read_text() == printed
    assert cli.main([*how, "--model", "nothing"]) == 2
    assert "is called like 'nothing'" in capsys.readouterr().err
    assert cli.main([*how, "--repair", "magic"]) == 2
    assert "unknown repair 'magic': use one of unshift" in capsys.readouterr().err


def test_the_attack_comes_back_on_a_copy(scans: list[str], tmp_path: Path) -> None:
    """Measuring strength leaves the cleaned model and the base as they were."""
    from elijah.loading import load_model
    from elijah.zoo import build, yardstick_of

    scans += ["clean"]
    measured(tmp_path)
    manifest, cache = read_manifest(tmp_path / "tiny.toml"), tmp_path / "cache" / "tiny"
    entry, bases = manifest.entries()[0], {base.id: base for base in manifest.base}
    model, attack = build(entry, bases, cache, manifest.digests())
    yardstick = yardstick_of(4, entry, bases["digits"], cache, model, attack)
    before = weights(model)
    judging_repairs.comes_back(yardstick, model)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    assert all(torch.equal(v, weights(load_model(str(cache / "digits")))[k])
               for k, v in weights(yardstick.reference).items())  # fmt: skip


@pytest.mark.parametrize(("option", "name"), [("--data", "stolen"), ("--repair", "prayer")])
def test_unknown_choices_are_named(option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(MANIFEST.replace("ATTACK", VILLAN[0]).replace("KNOBS", VILLAN[1]))
    assert cli.main(["bench", "repairs", str(path), "--out", str(tmp_path / "out"), option, name]) == 2
    assert f"{name!r}: use one of" in capsys.readouterr().err
