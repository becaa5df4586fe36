"""screen: the test's numbers against simulation and closed forms, the command's exit codes, hostile files of noise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kstest, ncx2, norm
from test_report import make_clean_report, make_report

from elijah import cli
from elijah.errors import ElijahError
from elijah.metrics import auc
from elijah.render.text import plain
from elijah.report import EvidenceInfo, FindingInfo, Report, ResponseInfo, TriggerInfo, trigger_values
from elijah.screen import DRAWS, Screening, likelihood_ratio, matched_filter, read_noise, render, score, screen

SHAPE = (3, 8, 8)
BASE = make_report(evidence=EvidenceInfo())
Array = NDArray[np.float64]


def draw(n: int, seed: int, r: Array | float = 0.0, gamma: float = 1.0) -> Array:
    """n samples of clean noise, or of noise stamped with r."""
    return r + gamma * np.random.default_rng(seed).standard_normal((n, *SHAPE))


def scored(z: Array, r: Array, gamma: float) -> Array:
    return score(z.reshape(len(z), -1), r.ravel(), gamma)


def pattern(length: float) -> Array:
    """A trigger [C, H, W] of this norm, as a report gives it back: a square at the bottom right, some noise beside."""
    r = 0.1 * np.random.default_rng(9).standard_normal(SHAPE)
    r[:, 4:7, 4:7] += 1
    values = trigger_values(r * length / np.linalg.norm(r))
    assert values is not None
    return values.array


def scanned(
    r: Array | None, *, gamma: float = 1.0, patch: Array | None = None, verdict: str = "undecided", **changes: Any
) -> Report:
    """The report of a scan that found r."""
    model = BASE.model.model_copy(update={"sample_shape": SHAPE})
    values = None if r is None else trigger_values(r)
    finding = FindingInfo(
        response=ResponseInfo(kappa=1, psi=1, gamma=gamma), matches="BadDiffusion-like", loss_ratio=0.04,
        trigger=TriggerInfo(norm=1.0, values=values, patch=None if patch is None else trigger_values(patch)),
    )  # fmt: skip
    kept = {name: getattr(BASE, name) for name in Report.model_fields}
    return Report(**{**kept, "verdict": verdict, "model": model, "findings": [finding], **changes})


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """files(noise, report) writes both and returns their paths."""

    def write(noise: Any, report: Report) -> tuple[Path, Path]:
        np.save(tmp_path / "noise.npy", noise)
        (tmp_path / "scan.json").write_text(report.to_json(), encoding="utf-8")
        return tmp_path / "noise.npy", tmp_path / "scan.json"

    return write


# --- the test -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_matched_filter_keeps_its_false_positive_rate(rate: float) -> None:
    r, n = pattern(3.0), 20_000
    clean = scored(draw(n, 1), r, 1.0)
    test = matched_filter(float(np.linalg.norm(r)), rate)
    share = (clean > test.threshold).mean()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert kstest(test.p_values(clean), "uniform").pvalue > 0.001
    assert test.p_values(np.array([test.threshold])) == pytest.approx(rate)


@pytest.mark.parametrize("length", [0.5, 1.5, 3.0])
def test_the_matched_filter_s_auroc(length: float) -> None:
    r, n = pattern(length), 10_000
    scores = [scored(draw(n, 2), r, 1.0), scored(draw(n, 3, r), r, 1.0)]
    seen = auc(np.concatenate(scores), [False] * n + [True] * n)
    expected = matched_filter(float(np.linalg.norm(r)), 0.01).auroc
    assert expected == pytest.approx(norm.cdf(length / math.sqrt(2)), abs=1e-3)
    assert seen == pytest.approx(expected, abs=0.012)


def closed_form(scores: Array, length: float, n: int, gamma: float) -> Array:
    """The p-values of the likelihood ratio: completing the square makes it c - k |z - m|^2, m = r / (1 - gamma^2)."""
    k, shift = (1 / gamma**2 - 1) / 2, length / (1 - gamma**2)
    c = k * shift**2 - length**2 / (2 * gamma**2) - n * math.log(gamma)
    return ncx2.cdf((c - scores) / k, n, shift**2)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.98])
def test_the_likelihood_ratio_against_simulation_and_closed_form(gamma: float) -> None:
    r, n = pattern(1.5), 4000
    length = float(np.linalg.norm(r))
    test = likelihood_ratio(length, r.size, gamma, 0.05)
    clean, stamped = scored(draw(n, 4), r, gamma), scored(draw(n, 5, r, gamma), r, gamma)
    direct = norm.logpdf(draw(9, 4), r, gamma).sum((1, 2, 3)) - norm.logpdf(draw(9, 4)).sum((1, 2, 3))
    assert clean[:9] == pytest.approx(direct)
    assert abs((clean > test.threshold).mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / n)
    assert auc(np.concatenate([clean, stamped]), [False] * n + [True] * n) == pytest.approx(test.auroc, abs=0.02)
    assert test.p_values(clean) == pytest.approx(closed_form(clean, length, r.size, gamma), abs=0.003)
    assert closed_form(np.array([test.threshold]), length, r.size, gamma) == pytest.approx(0.05, abs=0.001)


def test_draws_limit_what_can_be_said() -> None:
    test = likelihood_ratio(3.0, 192, 0.8, 0.01)
    assert test.clean is not None and len(test.clean) == DRAWS
    low, at, over = test.p_values(np.array([-1e9, test.threshold, 1e9]))
    assert (low, over) == (1.0, 1 / (DRAWS + 1)) and at > 0.01
    assert test.p_values(np.nextafter([test.threshold], np.inf))[0] <= 0.01  # so stamped is: p-value at most the rate
    same = likelihood_ratio(3.0, 192, 0.8, 0.01)
    assert (same.threshold, same.auroc) == (test.threshold, test.auroc)
    assert likelihood_ratio(3.0, 192, 0.8, 1 / (DRAWS + 1)).threshold == test.clean[-1]
    with pytest.raises(ElijahError, match="must not be below 1 / 1000001"):
        likelihood_ratio(3.0, 192, 0.8, 0.99 / (DRAWS + 1))


def test_a_p_value_is_never_0() -> None:
    assert 0 < matched_filter(1.0, 0.01).p_values(np.array([1e6]))[0] < 1e-300


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_screen(gamma: float, files: Callable[..., tuple[Path, Path]]) -> None:
    r = pattern(12.0)
    noise = np.concatenate([draw(3, 6), draw(2, 7, r, gamma)])
    for dtype in ("float16", ">f4") if gamma == 1 else (np.float64,):
        result = screen(*files(noise.astype(dtype), scanned(r, gamma=gamma)))
        assert [s.stamped for s in result.samples] == [False] * 3 + [True] * 2
        assert [s.p_value <= 0.01 for s in result.samples] == [s.stamped for s in result.samples]
        assert (result.stamped, result.share_stamped, result.exit_code) == (2, 0.4, 1)
        assert result.norm == pytest.approx(12, abs=0.01) and result.expected_auroc > 0.999
        assert result.expected_by_chance == pytest.approx(0.05)
    assert (result.method, result.draws) == (("matched filter", None) if gamma == 1 else ("likelihood ratio", DRAWS))
    assert Screening.model_validate_json(result.to_json()) == result
    one = screen(*files(np.asfortranarray(noise[4]), scanned(r, gamma=gamma)))
    assert one.samples[0].score == pytest.approx(result.samples[4].score)


def test_a_patch_is_judged_by_what_is_inside_it(files: Callable[..., tuple[Path, Path]]) -> None:
    patch = np.zeros((1, 8, 8))
    patch[:, 4:7, 4:7] = 1
    inside = np.broadcast_to(patch > 0, SHAPE)
    for level in (0.0, 0.9):  # a grey patch moves nothing, but it still shrinks the noise
        r, e = level * inside, draw(20, 21)
        stamped = np.where(inside, 0.1 * e + r, e)
        result = screen(*files(np.concatenate([e, stamped]), scanned(r, gamma=0.1, patch=patch)))
        direct = norm.logpdf(stamped, r, 0.1) - norm.logpdf(stamped)
        assert [s.score for s in result.samples[20:]] == pytest.approx(direct[:, inside].sum(1), rel=0.01)
        assert all(s.stamped for s in result.samples[20:]) and result.expected_auroc > 0.999
        assert sum(s.stamped for s in result.samples[:20]) <= 2


def test_large_files_are_read_in_parts(
    monkeypatch: pytest.MonkeyPatch, files: Callable[..., tuple[Path, Path]]
) -> None:
    r, noise = pattern(2.0), draw(7, 8)
    path, _ = files(noise, scanned(r))
    monkeypatch.setattr("elijah.screen.AT_ONCE", 3 * r.size)
    parts = list(read_noise(path, SHAPE))
    assert [len(p) for p in parts] == [3, 3, 1] and np.array_equal(np.concatenate(parts), noise)


def test_scale_divides(files: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    r = pattern(12.0)
    noise, report = map(str, files(50 * draw(2, 10, r), scanned(r)))
    assert cli.main(["screen", noise, "--report", report]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "sample 0 has standard deviation 65.9" in err and "--scale" in err
    assert cli.main(["screen", noise, "--report", report, "--scale", "50"]) == 1
    for scale in ("0", "-1", "nan", "inf", "1e-320"):
        assert cli.main(["screen", noise, "--report", report, "--scale", scale]) == 2
    for rate in ("0", "1", "nan", "x"):
        assert cli.main(["screen", noise, "--report", report, "--false-positive-rate", rate]) == 2
    assert "internal" not in capsys.readouterr().err


def test_exit_codes_and_streams(files: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Each in a process of its own, which says at its end what it imported."""
    code = "import sys; from elijah.cli import main; c = main(); print(*sys.modules, file=sys.stderr); sys.exit(c)"
    r, out = pattern(12.0), tmp_path / "out.txt"

    def run(*words: str) -> tuple[int, str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code, "screen", *words], check=False, capture_output=True, text=True, timeout=60
        )
        *said, modules = done.stderr.splitlines()
        assert not {"torch", "diffusers", "scipy"} & set(modules.split())
        return done.returncode, done.stdout, said

    noise, report = map(str, files(draw(2, 11, r), scanned(r)))
    status, document, said = run(noise, "--report", report, "--format", "json")
    assert (status, json.loads(document)["stamped"], said) == (1, 2, [])
    noise, report = map(str, files(draw(2, 11), scanned(r, gamma=0.9)))
    assert run(noise, "--report", report, "-o", str(out)) == (0, "", [f"elijah: wrote {out}"])
    assert out.read_text().startswith("NOT STAMPED")
    status, nothing, said = run(noise, "--report", str(tmp_path / "none.json"), "-q")
    assert (status, nothing, len(said)) == (2, "", 1)


def test_text_is_safe_and_short(files: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    hostile, r = "\x1b[31m\n\u202e", pattern(12.0)
    report = scanned(r, gamma=0.9)
    finding = report.findings[0].model_copy(update={"matches": hostile})
    paths = files(
        draw(2, 13, r), scanned(r, findings=[finding], model=report.model.model_copy(update={"source": hostile}))
    )
    assert cli.main(["screen", str(paths[0]), "--report", str(paths[1])]) == 1
    text = capsys.readouterr().out
    assert text == render(screen(*paths)) and text.endswith("\n")
    assert all(c == "\n" or c.isprintable() for c in text) and text.count(plain(hostile)) == 2
    assert "1,000,000 of clean noise" in text and "2 of 2 samples (100.0%)" in text


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(noise: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that a refusal gives."""
    assert cli.main(["screen", str(noise), "--report", str(report)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "internal error" not in err and len(err) < 500
    return err


def header(text: str, *, version: int = 1, length: int | None = None) -> bytes:
    """The start of a .npy file with this header, or one that only claims to be of some length."""
    size = (len(text) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def fields(descr: str = "'<f4'", shape: str = "(1, 3, 8, 8)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


BYTES = bytes(4 * 3 * 8 * 8)
RAW: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no .npy file"),
    "pickle": (b"\x80\x04K\x01.", "is no .npy file"),
    "zip": (b"PK\x03\x04" + BYTES, "is no .npy file"),
    "magic alone": (b"\x93NUMPY", "is broken"),
    "version": (header(fields(), version=9) + BYTES, "is broken"),
    "truncated header": (header(fields())[:40], "is broken"),
    "truncated data": (header(fields()) + BYTES[:-1], "is broken"),
    "long header": (header(" " * 20_000 + fields(), version=2) + BYTES, "its header is longer than"),
    "claimed header": (header(fields(), version=2, length=2**32 - 1) + BYTES, "its header is longer than"),
    "deep header": (header("(" * 9000), "is broken"),
    "code": (header("__import__('os').system('true')\n") + BYTES, "is broken"),
    "huge shape": (header(fields(shape=f"({2**40}, 3, 8, 8)")) + BYTES, "is broken"),
    "overflowing shape": (header(fields(shape=f"({2**61}, 3, 8, 8)")) + BYTES, "is broken"),
    "beyond integers": (header(fields(shape=f"({10**30}, 3, 8, 8)")) + BYTES, "is broken"),
    "negative shape": (header(fields(shape="(-1, -3, 8, 8)")) + BYTES, "is broken"),
    "no samples": (header(fields(shape="(0, 3, 8, 8)")) + BYTES, "has 0 samples"),
    "objects": (header(fields("'|O'")) + BYTES, "is broken, or no array of numbers"),
    "strange type": (header(fields("'<f3'")) + BYTES, "is broken"),
    "type no string": (header(fields("{}")) + BYTES, "holds []"),
    "structure": (header(fields("[('a', '<f4')]")) + BYTES, "holds [('a', '<f4')]; noise must be float16"),
}


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes(name: str, files: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    noise, report = files(draw(1, 14), scanned(pattern(3.0)))
    content, why = RAW[name]
    noise.write_bytes(content)
    assert f"{noise}: {why}" in refused(noise, report, capsys)


ARRAYS: dict[str, tuple[Any, str]] = {
    "pickled objects": (np.array([{}, print], dtype=object), "is broken, or no array of numbers"),
    "integers": (np.ones((1, *SHAPE), np.int64), "holds int64"),
    "complex": (np.ones((1, *SHAPE), np.complex128), "holds complex128"),
    "text": (np.full((1, *SHAPE), "x" * 3), "holds <U3"),
    "other size": (np.zeros((2, 3, 8, 9)), "has shape [2, 3, 8, 9]; the trigger's is [3, 8, 8]"),
    "flat": (np.zeros(192), "has shape [192]"),
    "a number": (np.float32(1), "has shape []"),
    "five axes": (np.zeros((1, 1, *SHAPE)), "has shape [1, 1, 3, 8, 8]"),
    "many axes": (np.zeros((1,) * 60), "has shape [1, 1, 1"),
    "nan": (np.where(draw(1, 15) > 2, np.nan, draw(1, 15)), "has values that are not finite"),
    "inf": (np.where(draw(1, 15) > 2, np.inf, draw(1, 15)), "has values that are not finite"),
    "constant": (np.ones((1, *SHAPE)), "sample 0 has standard deviation 0"),
    "one of them": (np.concatenate([draw(2, 16), 9 * draw(1, 17)]), "sample 2 has standard deviation"),
    "enormous": (1e300 * draw(1, 18), "sample 0 has standard deviation"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_unfit_arrays(name: str, files: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    array, why = ARRAYS[name]
    noise, report = files(array, scanned(pattern(3.0)))
    assert f"{noise}: {why}" in refused(noise, report, capsys)


def test_unfit_paths(
    files: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    noise, report = files(draw(1, 19), scanned(pattern(3.0)))
    assert "no such file" in refused(tmp_path / "none.npy", report, capsys)
    assert "no regular file" in refused(tmp_path, report, capsys)
    assert "cannot be read" in refused(noise, tmp_path, capsys)
    monkeypatch.setattr("elijah.screen.MOST_SAMPLES", 0)
    assert "has 1 samples" in refused(noise, report, capsys)
    monkeypatch.setattr("elijah.screen.LARGEST_FILE", 100)
    assert "larger than 100 bytes" in refused(noise, report, capsys)
    monkeypatch.setattr("elijah.report.LARGEST_REPORT", 100)
    assert "not a report: more than 100 bytes" in refused(noise, report, capsys)


def test_reports_without_a_trigger(files: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    r = pattern(3.0)
    cases = [
        (scanned(r, verdict="clean", findings=[]), "no findings (clean), so there is no trigger to screen for"),
        (scanned(r, findings=[]), "no findings (undecided), so there is no trigger to screen for"),
        (make_clean_report(), "give a report of that scan"),
        (scanned(None), "holds the trigger's picture but not its values; scan the model again"),
        (scanned(0 * r), "the trigger is 0 everywhere"),
        (scanned(r, gamma=0.5, patch=np.zeros((1, 8, 8))), "the trigger is 0 everywhere"),
        *((scanned(r, gamma=gamma), "gamma is") for gamma in (0.0, -1.0, 1e-300, 1.5, 1e300)),
    ]
    for report, why in cases:
        noise, path = files(draw(1, 20), report)
        line = refused(noise, path, capsys)
        assert f"{path}: " in line and why in line
