"""The report document: what it refuses, what it keeps, what other versions get."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from elijah import report as documents
from elijah.errors import ElijahError
from elijah.png import grid, png_base64, png_pixels
from elijah.report import (
    EXIT_CODES,
    CleaningInfo,
    CleanReport,
    CostInfo,
    EvidenceInfo,
    FileInfo,
    FindingInfo,
    ModelInfo,
    Report,
    ResponseInfo,
    SamplesInfo,
    TargetInfo,
    ThresholdInfo,
    TriggerInfo,
    TriggerValues,
    command,
    finite,
    json_schema,
    read_report,
    trigger_values,
)

KEYS = [  # contract: the JSON report
    *(
        "schema_version",
        "tool",
        "model",
        "verdict",
        "reason",
        "p_value",
        "false_positive_rate",
        "calibration",
        "scores",
    ),
    *(
        "thresholds",
        "findings",
        "evidence",
        "coverage",
        "not_covered",
        "cost",
        "settings",
        "seed",
        "errors",
        "cleaning",
    ),
]


def picture(seed: int, n: int = 1) -> str:
    """A PNG of n random images with a bright square at the bottom right."""
    images = np.random.default_rng(seed).integers(0, 40, (n, 32, 32, 3), dtype=np.uint8)
    images[:, 16:30, 16:30] = [200, 30, 30]
    return png_base64(grid(images) if n > 1 else images[0])


def pattern() -> NDArray[np.float64]:
    """The trigger [3, 32, 32] of make_report(): values beyond [-1, 1] and of norm 41.25."""
    r = np.random.default_rng(1).standard_normal((3, 32, 32))
    return r * 41.25 / np.linalg.norm(r)


def make_report(verdict: str = "backdoored", **changes: Any) -> Report:
    """A full report, as a scan of a BadDiffusion model would give it."""
    finding = FindingInfo(
        response=ResponseInfo(kappa=1, psi=1),
        matches="BadDiffusion-like",
        loss_ratio=0.0421,
        trigger=TriggerInfo(image_png=picture(1), norm=41.25, values=trigger_values(pattern())),
        target=TargetInfo(kind="image", image_png=picture(2)),
    )
    more = SamplesInfo(sampler="ddpm-1000", samples_with_png=picture(5, 16), samples_without_png=picture(6, 16))
    evidence = EvidenceInfo(
        samples_with_png=picture(3, 16),
        samples_without_png=picture(4, 16),
        samplers=["ddim-20", "ddpm-1000"],
        more=[more],
    )
    files = [
        FileInfo(name="unet/config.json", sha256="a" * 64),
        FileInfo(name="unet/diffusion_pytorch_model.safetensors", sha256="b" * 64),
    ]
    values: dict[str, Any] = {
        "model": ModelInfo(
            source="./models/m 1", kind="ddpm", sample_shape=(3, 32, 32), parameters=2812345, files=files
        ),
        "verdict": verdict,
        "reason": "the attacker's loss falls to 4 % of a clean network's and the outputs collapse to one image",
        "scores": {"loss_ratio": 0.0421, "output_diversity": 0.031, "evaluations": 9000.0},
        "thresholds": {
            "loss_ratio": ThresholdInfo(value=0.5, backdoored="below"),
            "output_diversity": ThresholdInfo(value=0.2, backdoored="below"),
        },
        "findings": [finding] if verdict == "backdoored" else [],
        "evidence": evidence,
        "coverage": ["additive triggers on the start noise that lead to one image, at every norm up to 60"],
        "not_covered": ["patch triggers that replace noise", "targets that are a distribution of images"],
        "cost": CostInfo(network_evaluations=9120, seconds=312.5, network_seconds=300.1, device="cpu"),
        "settings": {"detector": "lossfit", "device": "auto", "dtype": "float32", "batch_size": 8, "offline": True},
        "seed": 7,
        "errors": ["unet/diffusion_pytorch_model.bin: a pickle, not opened"],
    }
    return Report(**{**values, **changes})


def make_clean_report(verdict: str = "clean") -> CleanReport:
    """The report of a repair of make_report()."""
    cleaning = CleaningInfo(
        repair="unshift",
        data="sampled from the model itself",
        images=128,
        updates=100,
        seconds=61.0,
        before={"loss_ratio": 0.0421, "clean drift": 0.0},
        after={"loss_ratio": 0.97, "clean drift": 0.0012},
        samples_before_png=picture(3, 16),
        samples_after_png=picture(7, 16),
        benign_before_png=picture(8, 16),
        benign_after_png=picture(9, 16),
        out="m-clean",
    )
    after = make_report(verdict, cleaning=cleaning)
    return CleanReport(**{k: getattr(after, k) for k in Report.model_fields}, before=make_report())


def test_the_json_has_the_contract_s_keys_in_order() -> None:
    document = json.loads(make_report().to_json())
    assert list(document) == KEYS
    assert document["schema_version"] == 1
    assert list(document["model"]) == ["source", "revision", "kind", "sample_shape", "parameters", "files"]
    assert document["model"]["sample_shape"] == [3, 32, 32]
    assert list(document["findings"][0]) == ["response", "matches", "loss_ratio", "trigger", "target"]
    assert list(document["findings"][0]["trigger"]) == ["image_png", "norm", "gamma_map_png", "values", "patch"]
    assert list(document["findings"][0]["trigger"]["values"]) == ["version", "shape", "dtype", "base64"]
    assert set(document["cost"]) == {"network_evaluations", "seconds", "network_seconds", "device"}
    assert document["calibration"] is None and document["cleaning"] is None


@pytest.mark.parametrize("report", [make_report(), make_report("clean"), make_report("undecided"), make_clean_report()])
def test_round_trip(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again == report
    assert type(again) is type(report)
    assert again.to_json() == report.to_json()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False)
)


@settings(max_examples=60, deadline=None)
@given(
    source=st.text(),
    verdict=st.sampled_from(sorted(EXIT_CODES)),
    scores=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    p_value=st.none() | st.floats(0, 1),
    chosen=st.dictionaries(st.text(), st.one_of(scalars, st.text(), st.lists(st.text()))),
    notes=st.lists(st.text()),
)
def test_any_report_survives_json(
    source: str, verdict: str, scores: dict[str, float], p_value: float | None, chosen: dict[str, Any], notes: list[str]
) -> None:
    model = ModelInfo(source=source, kind="ddpm", sample_shape=(1, 8, 8), parameters=3)
    report = make_report(
        verdict, model=model, findings=[], scores=scores, p_value=p_value, settings=chosen, coverage=notes, errors=notes
    )
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(bad: float) -> None:
    for changes in ({"scores": {"x": bad}}, {"p_value": bad}, {"settings": {"x": bad}}, {"settings": {"x": [bad]}}):
        with pytest.raises(ValidationError):
            make_report(**changes)
    assert finite({"x": bad, "y": 1.0}) == {"y": 1.0}


def test_a_clean_report_has_no_findings() -> None:
    with pytest.raises(ValidationError, match="no findings"):
        make_report("clean", findings=make_report().findings)


def test_a_file_name_that_is_no_utf8_is_kept_as_an_escape() -> None:
    assert FileInfo(name="a\udcff", sha256="0" * 64).name == "a\\udcff"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "[" * 100_000,
        "{}",
        '{"schema_version": 2}',
        '{"schema_version": "1"}',
        '{"schema_version": 1}',
        make_report().to_json().replace('"undecided"', '"?"').replace('"backdoored"', '"safe"'),
        make_report().to_json().replace('"seed": 7', '"seed": 7, "extra": 1'),
        make_report().to_json().replace("iVBORw0KGgo", "javascript:"),
        make_report().to_json().replace("312.5", "NaN"),
        make_report().to_json().replace("312.5", "1e999"),
    ],
)
def test_what_is_no_report_gets_one_line(text: str) -> None:
    with pytest.raises(ElijahError) as caught:
        Report.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_exit_codes() -> None:
    assert [make_report(v).exit_code for v in ("clean", "backdoored", "undecided")] == [0, 1, 3]


def test_the_command_runs_it_again() -> None:
    words = shlex.split(command(make_report()))
    assert words[:3] == ["elijah", "scan", "./models/m 1"]
    assert words[3:] == [
        *("--detector", "lossfit", "--device", "auto", "--dtype", "float32", "--batch-size", "8", "--offline"),
        *("--seed", "7"),
    ]
    assert shlex.split(command(make_clean_report()))[:5] == ["elijah", "clean", "./models/m 1", "--out", "m-clean"]


def test_pictures() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(png_pixels(png_base64(image)), image)
    grey = png_pixels(png_base64(np.full((4, 5, 1), 9, np.uint8)))
    assert grey is not None and grey.shape == (4, 5, 3) and (grey == 9).all()
    sheet = grid(np.full((5, 4, 4, 1), 7, np.uint8), columns=3, gap=2)
    assert sheet.shape == (10, 16, 4)
    assert (sheet[..., 3] == 255).sum() == 5 * 16
    assert png_pixels(None) is None
    assert png_pixels("iVBORw0KGgo=") is None
    assert png_pixels(base64.b64encode(b"GIF89a").decode()) is None


def test_the_trigger_s_own_values_are_kept() -> None:
    values = Report.from_json(make_report().to_json()).findings[0].trigger.values
    assert values is not None and values.shape == (3, 32, 32)
    assert values.array == pytest.approx(pattern(), rel=2**-11, abs=2**-24)
    assert np.linalg.norm(values.array) == pytest.approx(41.25, rel=1e-4)
    for r in (np.full((1, 2, 2), 7e4), np.full((1, 2, 2), np.nan), np.zeros((1, 2048, 2049))):
        assert trigger_values(r) is None


def test_a_report_of_an_earlier_version_has_no_values() -> None:
    document = json.loads(make_report().to_json())
    del document["findings"][0]["trigger"]["values"]
    assert Report.from_json(json.dumps(document)).findings[0].trigger.values is None


def encoded(*values: float) -> str:
    return base64.b64encode(np.array(values, "<f2").tobytes()).decode()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base64": encoded(1, 2, 3)}, "6 bytes where shape [1, 2, 2] takes 8"),
        ({"base64": encoded(1, 2, 3, 4, 5)}, "10 bytes"),
        ({"base64": encoded(1, 2, 3, float("nan"))}, "not finite"),
        ({"base64": encoded(1, 2, 3, float("-inf"))}, "not finite"),
        ({"base64": "?" * 12}, "base64"),
        ({"base64": "\u00e9"}, "ASCII"),
        ({"base64": "A" * 12_000_000}, "at most"),
        ({"shape": [1, 2]}, "shape"),
        ({"shape": [1, 2, 0]}, "greater than or equal to 1"),
        ({"shape": [1, 2, 1e30]}, "shape"),
        ({"shape": [4096, 4096, 4096]}, "more than 4194304 values"),
        ({"shape": [1, 1, 4]}, "of shape [1, 1, 4] for a model of [1, 2, 2]"),
        ({"dtype": "object"}, "float16"),
        ({"version": 2}, "version"),
        ({"extra": 1}, "extra"),
    ],
)
@pytest.mark.parametrize("key", ["values", "patch"])
def test_hostile_values_get_one_line(key: str, changes: dict[str, Any], why: str) -> None:
    document = json.loads(make_report().to_json())
    document["model"]["sample_shape"] = [1, 2, 2]
    document["findings"][0]["trigger"]["values"] = None
    values = {"version": 1, "shape": [1, 2, 2], "dtype": "float16", "base64": encoded(1, 2, 3, 4)}
    document["findings"][0]["trigger"][key] = values
    assert getattr(Report.from_json(json.dumps(document)).findings[0].trigger, key) == TriggerValues(**values)
    values.update(changes)
    with pytest.raises(ElijahError) as caught:
        Report.from_json(json.dumps(document))
    assert why in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_report_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.json"
    file.write_text(make_report().to_json())
    assert read_report(file) == make_report()
    monkeypatch.setattr(documents, "LARGEST_REPORT", 99)
    with pytest.raises(ElijahError, match=r"r\.json: not a report: more than 99 bytes"):
        read_report(file)


def test_the_schema_describes_the_document() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == [*KEYS, "before"]
    assert list(schema["$defs"]["Report"]["properties"]) == KEYS
    assert schema["additionalProperties"] is False
