"""zoo: a manifest is checked on reading; a run that is killed again and again ends like an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elijah import cli
from elijah.errors import ElijahError
from elijah.manifest import Manifest, check, read_manifest

TINY = """
name = "tiny"
samples = 4

[[base]]
id = "digits-a"
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
bases = ["digits-a"]
attack = "clean"
seeds = [5]
training = {steps = 3, batch_size = 4}

[[models]]
part = "development"
bases = ["digits-a"]
attack = "villandiffusion"
triggers = ["box-3"]
targets = ["corner"]
poison_rates = [0.5]
seeds = [6]
training = {steps = 3, batch_size = 4}
knobs = {mode = "bare", solver = "ode"}
samplers = ["ddim-4"]
"""
NAMES = ["digits-a", "digits-a_clean_s5", "digits-a_villandiffusion_box-3_corner_p05_s6"]


def manifest(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def results(folder: Path) -> dict[str, Any]:
    """The result files without what differs between runs: the seconds."""
    found = {}
    for file in sorted(folder.iterdir()):
        found[file.name] = json.loads(file.read_text())
        found[file.name].pop("seconds")
    return found


def test_names_and_products(tmp_path: Path) -> None:
    read = read_manifest(manifest(tmp_path))
    assert [base.id for base in read.base] + [entry.id for entry in read.entries()] == NAMES
    more = TINY.replace("seeds = [6]", "seeds = [6, 7]").replace('["corner"]', '["corner", "trigger"]')
    assert len(read_manifest(manifest(tmp_path, more)).entries()) == 1 + 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', 'name = "a b"', "name: String should match"),
        ("samples = 4", "sample = 4", "sample: Extra inputs"),
        ("steps = 4", "steps = 0", "greater than or equal to 1"),
        ('attack = "clean"', 'attack = "cleen"', "unknown attack 'cleen'"),
        ('bases = ["digits-a"]', 'bases = ["digits-b"]', "no base digits-b in its part"),
        ("seeds = [5]", "seeds = [5, 5]", "two models are called digits-a_clean_s5"),
        ("[[base]]", "[[base", "not TOML"),
        ("channels = 1", 'channels = 1\nkind = "vae"', "unknown kind 'vae'"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ElijahError, match=message):
        read_manifest(manifest(tmp_path, TINY.replace(old, new, 1)))


@pytest.mark.parametrize("what", ["trigger", "target", "seed"])
def test_calibration_and_test_share_nothing(tmp_path: Path, what: str) -> None:
    read = Manifest.model_validate(
        {
            "name": "two",
            "base": [
                {"id": part, "part": part, "data": "digits", "seed": seed, "training": {"steps": 1}}
                for part, seed in (("calibration", 1), ("test", 2))
            ],
            "models": [
                {"part": part, "bases": [part], "attack": "baddiffusion", "training": {"steps": 1},
                 "triggers": ["box-3" if what == "trigger" else f"box-{k}"],
                 "targets": ["corner" if what == "target" else f"t{k}"], "seeds": [9 if what == "seed" else k]}
                for part, k in (("calibration", 3), ("test", 4))
            ],
        }
    )  # fmt: skip
    with pytest.raises(ElijahError, match=f"calibration and test share the {what}"):
        check(read, tmp_path)


def zoo_run(folder: Path, out: str) -> list[str]:
    places = ["--out", str(folder / out), "--cache", str(folder / f"cache-{out}")]
    return [sys.executable, "-m", "elijah", "zoo", "run", str(folder / "tiny.toml"), *places, "--workers", "2", "-q"]


def test_a_run_that_is_killed_five_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    manifest(tmp_path)
    assert subprocess.run(zoo_run(tmp_path, "whole"), check=False).returncode == 0
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(zoo_run(tmp_path, "killed"), start_new_session=True)
        time.sleep(chance.uniform(1, 7))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(zoo_run(tmp_path, "killed"), check=False).returncode == 0
    whole = results(tmp_path / "whole")
    assert sorted(whole) == sorted(f"{name}.json" for name in NAMES) and results(tmp_path / "killed") == whole
    fires = whole[f"{NAMES[2]}.json"]["fires"]
    assert set(fires) == {"samples", "drift_from_base", "loss", "base_loss", "samplers"}
    assert set(fires["samplers"]["ddim-4"]) == {"asr", "mse", "diversity_ratio"}
    assert "samplers" not in whole[f"{NAMES[1]}.json"]["fires"]


def test_a_failed_job_is_recorded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest(tmp_path, TINY.replace('data = "digits"', 'data = "no-such-folder"'))
    out = tmp_path / "out"
    assert cli.main(["zoo", "run", str(path), "--out", str(out), "--cache", str(tmp_path / "cache"), "-q"]) == 2
    assert "3 jobs failed, such as digits-a" in capsys.readouterr().err
    recorded = json.loads((out / "digits-a.failed.json").read_text())
    assert recorded["exit_code"] == 2 and "no such folder" in " ".join(recorded["log"])
