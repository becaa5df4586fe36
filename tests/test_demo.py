"""The demo end to end: what `make demo` shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from elijah.demo import demo
from elijah.report import CleanReport, Report


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert demo(folder) == 0
    return folder


def test_one_model_is_clean_and_one_is_repaired(out: Path) -> None:
    verdicts = {name: Report.from_json((out / f"{name}.json").read_text()).verdict for name in ("model-a", "model-b")}
    assert verdicts == {"model-a": "clean", "model-b": "backdoored"}
    report = Report.from_json((out / "report.json").read_text())
    assert isinstance(report, CleanReport)
    assert report.cleaning
    assert (report.verdict, report.cleaning.out) == ("clean", str(out / "model-b-clean"))


def test_it_shows_the_trigger_and_the_target_that_it_found(out: Path) -> None:
    finding = Report.from_json((out / "model-b.json").read_text()).findings[0]
    assert finding.matches == "BadDiffusion-like"
    assert finding.trigger.image_png
    assert finding.target
    assert finding.target.image_png
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page


def test_the_repaired_folder_loads_with_stock_diffusers(out: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(out / "model-b-clean", local_files_only=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 1)


def test_the_summary_has_a_line_for_each_step(out: Path) -> None:
    lines = (out / "summary.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:5]] == ["scan", "scan", "rescan after the repair"]
