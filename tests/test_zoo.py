"""zoo: a manifest is checked on reading; a run that is killed again and again ends like an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import equal, weights
from PIL import Image

from elijah import bench, cli
from elijah.bench import first_of_each, run_row
from elijah.classifier import classifier_for
from elijah.data import load_images
from elijah.errors import ElijahError
from elijah.loading import load_model
from elijah.manifest import Manifest, check, read_manifest
from elijah.samplers import SAMPLERS
from elijah.tables import scan_table
from elijah.zoo import build_base, run_zoo

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
LATENT = """
name = "latent"
samples = 2

[[base]]
id = "a"
part = "development"
kind = "ldm"
data = "digits"
size = 32
limit = 32
seed = 1
widths = [8, 8]
training = {steps = 2, batch_size = 4}
autoencoder_steps = 2

[[base]]
id = "b"
part = "development"
kind = "ldm"
data = "digits"
size = 32
limit = 32
seed = 2
widths = [8, 8]
training = {steps = 2, batch_size = 4}
autoencoder = "a"
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
        ("channels = 1", 'channels = 1\nautoencoder = "x"', "no latent base x before it"),
        ("channels = 1", "channels = 1\nsigma_max = 22.0", "sigma_max is for kind ncsn, this base is ddpm"),
        ('solver = "ode"', "gamma = 0.5", "villandiffusion has no --gamma"),
        ('triggers = ["box-3"]', "", "villandiffusion needs --trigger"),
        ('["ddim-4"]', '["dddim-4"]', "unknown sampler 'dddim-4'"),
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
    assert set(fires["samplers"]["ddim-4"]) == {"asr", "asr_of_clean_outputs", "mse", "diversity_ratio"}
    assert "samplers" not in whole[f"{NAMES[1]}.json"]["fires"]


def test_what_is_done_again(tmp_path: Path) -> None:
    """A result is kept while its settings are; a changed base makes its models stale; judging needs no training."""
    path, out, cache, attacked = manifest(tmp_path), tmp_path / "out", tmp_path / "cache", [NAMES[0], NAMES[2]]
    run: Any = {"out": out, "cache": cache, "workers": 2, "detectors": [], "repairs": [], "only": "_vil+an[a-z]"}
    assert run_zoo(path, read_manifest(path), **run) == []
    first = {name: (out / f"{name}.json").stat().st_mtime_ns for name in attacked}
    assert not (out / f"{NAMES[1]}.json").exists()
    assert run_zoo(path, read_manifest(path), **run) == []
    assert {name: (out / f"{name}.json").stat().st_mtime_ns for name in attacked} == first
    shutil.rmtree(cache / "tiny" / NAMES[0])  # the base; not needed to scan what is there
    assert run_zoo(path, read_manifest(path), **run | {"detectors": ["elijah"]}) == []
    assert not (cache / "tiny" / NAMES[0]).exists()
    result = json.loads((out / f"{NAMES[2]}.json").read_text())
    assert result["detections"]["elijah"]["verdict"] in ("clean", "backdoored", "undecided")
    changed = manifest(tmp_path, TINY.replace("seed = 1", "seed = 2"))
    assert run_zoo(changed, read_manifest(changed), **run) == []
    after = json.loads((out / f"{NAMES[2]}.json").read_text())
    assert after["detections"] == {} and after["settings_sha256"] != result["settings_sha256"]


def test_latent_bases_share_an_autoencoder(tmp_path: Path) -> None:
    read = read_manifest(manifest(tmp_path, LATENT))
    bases, digests = {base.id: base for base in read.base}, read.digests()
    assert read.needs() == {"a": None, "b": "a"}
    for name in "ab":
        build_base(bases[name], bases, tmp_path, digests)
    one, other = (load_model(str(tmp_path / name)) for name in "ab")
    assert equal(dict(one.autoencoder.state_dict()), dict(other.autoencoder.state_dict()))
    assert not equal(weights(one), weights(other)) and one.sample_shape == (3, 8, 8)


def test_a_class_as_target_is_judged_by_a_classifier(stock: Path) -> None:
    classifier = classifier_for("mnist/7", "celeba", 16, 1)
    sevens = load_images("mnist/7", size=16, channels=1, skip=900, limit=60) / 255
    faces = load_images("celeba", size=16, channels=1, skip=9000, limit=60) / 255
    ones = load_images("mnist/1", size=16, channels=1, skip=500, limit=60) / 255
    assert classifier.accuracy > 0.9 and classifier.hit_rate(ones) < 0.1 and classifier.hit_rate(faces) < 0.1
    assert classifier.hit_rate(sevens) > 0.9


def test_a_table_and_a_sheet_of_a_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, places = manifest(tmp_path), ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert cli.main(["zoo", "run", str(path), *places, "-q"]) == 0
    assert cli.main(["zoo", "table", str(path), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert f"| {NAMES[2]} | ddim-4 |" in table and table.count("\n|") == 2
    assert cli.main(["zoo", "table", str(path), "--out", str(tmp_path / "out"), "--detector", "lossfit", "-q"]) == 2
    assert "lossfit scanned no model" in capsys.readouterr().err
    picture = tmp_path / "sheet.png"
    assert cli.main(["zoo", "sheet", str(path), "-o", str(picture), "--cache", str(tmp_path / "cache"), "-q"]) == 0
    with Image.open(picture) as opened:
        assert opened.width > opened.height > 80
    assert cli.main(["zoo", "sheet", str(path), "-o", str(picture), "--cache", str(tmp_path / "no"), "-q"]) == 2
    assert "no weights; elijah zoo run makes them" in capsys.readouterr().err


def test_a_table_of_scans(tmp_path: Path) -> None:
    read = read_manifest(manifest(tmp_path))
    for name, verdict, loss in ((NAMES[1], "clean", 0.9), (NAMES[2], "backdoored", 0.02)):
        fires = {"samplers": {"ddim-4": {"asr": dict.fromkeys(("0.01", "0.05"), 0.75), "asr_of_clean_outputs":
                 dict.fromkeys(("0.01", "0.05"), 0.0)}}} if verdict != "clean" else {}  # fmt: skip
        scan = {"verdict": verdict, "scores": {"loss_ratio_half": loss, "loss_ratio_full": 1.0, "pull": 0.5},
                "cost": {"network_evaluations": 2000 if verdict == "clean" else 1000, "seconds": 3.2}}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"fires": fires, "detections": {"lossfit": scan}}))
    table = scan_table([read], tmp_path, "lossfit")
    assert f"| {NAMES[2]} | 75 | backdoored | half 0.020 | 0.50 | 1,000 | 3 |" in table
    assert (
        "| clean | 1 | 0 | 0 | 1 | 100 | 21 to 100 |" in table and "| all backdoored | 1 | 1 | 0 | 0 | 100 |" in table
    )
    assert "Median cost: 1,500 network evaluations" in table


def test_the_firing_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out, cache = manifest(tmp_path), tmp_path / "matrix", tmp_path / "cache"
    cheap = {name: sampler._replace(steps=2) for name, sampler in SAMPLERS.items()}
    monkeypatch.setattr(bench, "SAMPLERS", cheap)
    read = read_manifest(path)
    assert first_of_each([(path, read), (path, read)]) == [NAMES[2]]
    (cache / "tiny").mkdir(parents=True)
    out.mkdir()
    run_row(read, NAMES[2], cache / "tiny", out, 4)
    how = ["--out", str(out), "--cache", str(cache), "--samples", "4", "-q"]
    assert cli.main(["bench", "samplers", str(path), *how]) == 0  # only collects: the row is there
    assert "| villandiffusion ode |" in capsys.readouterr().out
    rows = json.loads((out / "samplers.json").read_text())["rows"]
    assert len(rows) == 1 and len(rows[0]["samplers"]) == 12 and rows[0]["label"] == "villandiffusion ode"
    with Image.open(out / "samplers.png") as opened:
        assert opened.width > 500
    assert cli.main(["bench", "samplers", str(path), "--model", "x", *how]) == 2
    assert "has no backdoored model x" in capsys.readouterr().err


def test_a_broken_expression_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest(tmp_path)
    assert cli.main(["zoo", "run", str(path), "--out", str(tmp_path), "--only", "(", "-q"]) == 2
    assert "is no regular expression" in capsys.readouterr().err


def test_a_failed_job_is_recorded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest(tmp_path, TINY.replace('data = "digits"', 'data = "no-such-folder"'))
    out = tmp_path / "out"
    assert cli.main(["zoo", "run", str(path), "--out", str(out), "--cache", str(tmp_path / "cache"), "-q"]) == 2
    assert "3 jobs failed, such as digits-a" in capsys.readouterr().err
    recorded = json.loads((out / "digits-a.failed.json").read_text())
    assert recorded["exit_code"] == 2 and "no such folder" in " ".join(recorded["log"])


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "zoo").glob("*.toml")), ids=lambda p: p.name)
def test_the_manifests_are_right(path: Path) -> None:
    read = read_manifest(path)
    for entry in read.entries():
        base = next(b for b in read.base if b.id == entry.base)
        assert entry.samplers or entry.attack in ("clean", "trojdiff") or base.kind == "ncsn", entry.id


def test_the_small_zoo_has_its_counts() -> None:
    """230 clean and 123 backdoored models, 24 of them at 32 x 32; two bases of each data set in each part."""
    read = read_manifest(Path(__file__).parent.parent / "zoo" / "small.toml")
    entries, bases = read.entries(), {base.id: base for base in read.base}
    clean = [e.part for e in entries if e.attack == "clean"]
    assert (clean.count("calibration"), clean.count("test"), len(entries) - len(clean)) == (100, 130, 123)
    assert sum(bases[e.base].size == 32 for e in entries) == 24
    small = [(b.part, b.data) for b in read.base if b.size == 16 and b.kind == "ddpm"]
    assert all(
        small.count((part, data)) == 2 for part in ("calibration", "test") for data in ("cifar10", "celeba", "mnist")
    )
    images = [(b.data, b.part, set(range(b.skip, b.skip + (b.limit or 0)))) for b in read.base]
    assert not any(
        one[0] == other[0] and one[1] != other[1] and one[2] & other[2] for one in images for other in images
    )
