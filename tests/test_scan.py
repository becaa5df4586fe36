"""scan: from a folder to a report; limits, seeds, and the cost of a real model of the usual size."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import hashes, random_model
from diffusers import UNet2DModel, VQModel
from safetensors.torch import save_file

from elijah.bases import new_model
from elijah.detection import Finding
from elijah.detectors import DETECTORS, Elijah, LossFit
from elijah.detectors.search import Search
from elijah.diffusion import Model
from elijah.errors import ElijahError, Unsupported
from elijah.report import Report
from elijah.response import Response
from elijah.scan import TYPICAL_EVALUATIONS, announce, as_dtype, describe, scan

FAST: dict[str, Any] = {
    "lossfit": functools.partial(
        LossFit, search=Search(follow=((2, 4, 1),), lead=((2, 4, 1), (1, 4, 1)), score_rows=8),
        samples=4,
        samplers=("ddim-3",), careful_samplers=("ddim-4",),
    ),
    "elijah": functools.partial(Elijah, sampler="ddpm-3", batch_size=4, iterations=3, samples=9),
}  # fmt: skip
KEYS = {  # of the documented report
    "schema_version", "tool", "model", "verdict", "p_value", "false_positive_rate", "calibration", "scores", "findings",
    "evidence", "coverage", "not_covered", "cost", "settings", "seed", "errors",
}  # fmt: skip
CIFAR10 = {  # config.json of google/ddpm-cifar10-32
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2, "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "flip_sin_to_cos": False, "freq_shift": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "act_fn": "silu", "time_embedding_type": "positional",
}  # fmt: skip
SCHEDULE = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": True,
    "variance_type": "fixed_large",
}  # fmt: skip
ROOMY = 4_000_000  # KiB


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors with few steps."""
    for name, detector in FAST.items():
        detector.kinds = detector.func.kinds
        monkeypatch.setitem(DETECTORS, name, detector)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


def timeless(report: Report) -> dict[str, Any]:
    document = json.loads(report.to_json())
    for key in ("seconds", "network_seconds"):
        assert document["cost"].pop(key) >= 0
    return document


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", FAST)
def test_a_scan_of_a_folder(tiny_folder: Path, name: str) -> None:
    before = hashes(tiny_folder)
    report = scan(str(tiny_folder), detector=name, seed=3, batch_size=5)
    assert hashes(tiny_folder) == before
    document = timeless(report)
    assert set(document) >= KEYS and all(math.isfinite(n) for n in numbers(document))
    assert document["model"]["source"] == str(tiny_folder) and document["model"]["sample_shape"] == [1, 8, 8]
    assert document["model"]["kind"] == "ddpm" and document["model"]["parameters"] == random_model().parameters
    assert any(f["name"].endswith(".safetensors") for f in document["model"]["files"])
    assert document["seed"] == 3 and document["settings"]["detector"] == name
    assert document["settings"]["batch_size"] == 5 and document["settings"]["dtype"] == "float32"
    assert document["scores"] and document["coverage"] and document["not_covered"] and document["reason"]
    assert document["cost"]["network_evaluations"] > 50 and document["cost"]["device"]
    assert document["evidence"]["samples_with_png"] and document["evidence"]["samplers"]
    assert (document["findings"] == []) == (document["verdict"] == "clean") and len(document["findings"]) <= 1
    assert Report.from_json(report.to_json()) == report


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", FAST)
def test_equal_seeds_give_equal_reports(tiny_folder: Path, name: str) -> None:
    one, same = (timeless(scan(str(tiny_folder), detector=name, seed=1)) for _ in range(2))
    other = timeless(scan(str(tiny_folder), detector=name, seed=2))
    assert one == same
    assert other["scores"] != one["scores"]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_limit_gives_an_undecided_report(tiny_folder: Path, name: str) -> None:
    said: list[str] = []
    report = scan(str(tiny_folder), detector=name, max_evaluations=200, progress=lambda what, _, __: said.append(what))
    assert report.verdict == "undecided" and report.exit_code == 3 and "limit" in report.reason
    assert report.cost.network_evaluations <= 200 and report.settings["max_evaluations"] == 200
    assert any("about 200 network evaluations" in what for what in said)
    late = scan(str(tiny_folder), detector=name, max_minutes=0)
    assert late.verdict == "undecided" and late.cost.network_evaluations == 0


@pytest.mark.usefixtures("fast")
def test_limits_and_counts_are_of_one_scan() -> None:
    model = random_model()
    first = scan(model, max_evaluations=60)
    assert first.verdict == "undecided" and model.meter.max_evaluations is None and model.meter.deadline is None
    second = scan(model)
    assert second.cost.network_evaluations > 60
    again = scan(model)
    assert again.cost.network_evaluations == second.cost.network_evaluations and again.scores == second.scores
    assert again.model.source == "memory" and not again.model.files


def test_wrong_names(tiny_folder: Path) -> None:
    with pytest.raises(ElijahError, match="unknown detector 'x': use one of lossfit, collapse, elijah, terd"):
        scan(str(tiny_folder), detector="x")
    with pytest.raises(ElijahError, match="unknown dtype 'int8': use one of float32"):
        scan(str(tiny_folder), dtype="int8")
    assert as_dtype("bfloat16") is torch.bfloat16
    assert set(TYPICAL_EVALUATIONS) == set(DETECTORS)


def test_a_model_of_the_usual_size_fits_in_memory(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32's network, random, fp16, in that repository's flat layout. 25 to 45 s."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        network: Any = UNet2DModel(**CIFAR10)
    assert 35.7e6 < sum(p.numel() for p in network.parameters()) < 35.8e6
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    del network, state
    schedule = {"_class_name": "DDPMScheduler", **SCHEDULE}
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for name, content in {
        "config.json": {"_class_name": "UNet2DModel", **CIFAR10}, "scheduler_config.json": schedule,
        "model_index.json": index,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    before = hashes(tmp_path)
    command = [sys.executable, "-m", "elijah", "scan", str(tmp_path), "--max-evaluations", "200", "--format", "json"]
    with (tmp_path.parent / "report.json").open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 3
    report = Report.from_json((tmp_path.parent / "report.json").read_text())
    assert report.verdict == "undecided" and 0 < report.cost.network_evaluations <= 200
    assert 35.7e6 < report.model.parameters < 35.8e6 and report.model.sample_shape == (3, 32, 32)
    scale = 1 if sys.platform != "darwin" else 1024
    assert usage.ru_maxrss / scale < ROOMY
    assert hashes(tmp_path) == before


def of_kind(kind: str) -> Model:
    network = VQModel(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
    return new_model((3, 8, 8), seed=0, channels=(8, 8), kind=kind, autoencoder=network if kind == "ldm" else None)


@pytest.mark.parametrize("kind", ["ncsn", "ldm"])
def test_the_same_scan_takes_every_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few: Any = functools.partial(LossFit, exploding_samplers=("pc-5",), search=Search(follow=((2, 4, 1),)))
    few.kinds = LossFit.kinds
    monkeypatch.setitem(DETECTORS, "lossfit", few)
    report = scan(of_kind(kind), max_evaluations=9000)
    assert report.model.kind == kind and report.scores and report.cost.network_evaluations <= 9000
    assert all(("ve" in name) == (kind == "ncsn") for name in report.scores if name.startswith("loss_ratio"))


@pytest.mark.parametrize("kind", ["ncsn", "ldm"])
def test_kinds_that_the_baseline_does_not_cover(kind: str) -> None:
    model = of_kind(kind)
    with pytest.raises(Unsupported, match="it loads, but terd does not cover it"):
        scan(model, detector="terd")
    assert model.meter.evaluations == 0


@pytest.mark.parametrize("kind", ["ddpm", "ncsn", "ldm"])
def test_a_finding_keeps_its_trigger_in_the_units_of_the_start_noise(kind: str) -> None:
    model = of_kind(kind)
    r = 3 * torch.randn(model.sample_shape, generator=torch.Generator().manual_seed(0))  # far beyond [-1, 1]
    info = describe(model, Finding(Response(1.0, 1.0, 0.8), r.requires_grad_(True), None, 0.1, "x"))
    assert info.trigger.values is not None and info.trigger.values.shape == model.sample_shape
    assert torch.allclose(torch.from_numpy(info.trigger.values.array).float(), r, rtol=2**-10)
    assert info.trigger.patch is None
    patch = (torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    info = describe(model, Finding(Response(1.0, 1.0, 0.8), r, None, 0.1, "x", patch=patch))
    assert info.trigger.patch is not None
    assert torch.equal(torch.from_numpy(info.trigger.patch.array).float(), patch)
    assert info.trigger.norm == pytest.approx(r.norm().item()) and info.response.gamma == 0.8
    assert describe(model, Finding(Response(1.0, 1.0), r * 1e6, None, 0.1, "x")).trigger.values is None


@pytest.mark.parametrize(("kind", "says"), [("ddpm", "about 4,400 network"), ("ncsn", "about 18,000 network")])
def test_what_is_announced_knows_the_cost_of_a_sample(kind: str, says: str) -> None:
    said: list[str] = []
    model = new_model((1, 8, 8), seed=0, channels=(8, 8), kind=kind)
    announce(model, "lossfit", None, lambda what, *_: said.append(what))
    assert says in said[0] and model.meter.evaluations == 16
