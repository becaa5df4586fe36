"""clean: which verdicts write what, and that a folder is complete or not there at all."""

from __future__ import annotations

import errno
import functools
import importlib
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import equal, hashes, random_model, weights
from diffusers import DiffusionPipeline
from oracle import oracle
from PIL import Image

from elijah import guard
from elijah.card import plain
from elijah.clean import Removal, clean, compare
from elijah.detection import Detection, Evidence, Finding, Threshold
from elijah.detectors.outputs import pull
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.loading import load_model
from elijah.repairs import REPAIRS, Unshift
from elijah.report import CleanReport, Report
from elijah.response import Response
from elijah.scan import make_report

cleaning = importlib.import_module("elijah.clean")  # elijah.clean itself is the function
STILL_FIRE, LED_BACK = cleaning.still_fire, cleaning.led_back
Verdicts = Callable[..., list[int]]
LIMITS = {name: getattr(guard, name) for name in ("MAX_DRIFT", "MIN_DIVERSITY", "MAX_DIVERSITY", "MAX_LOSS")}
FORK = multiprocessing.get_context("fork")  # a child has this process's stubs, and torch
SHAPE = (1, 8, 8)


def detection(verdict: str, *, findings: bool = True, k: int = 0) -> Detection:
    """What scan k says: each one finds another trigger. "undecided, fires": one that moves outputs, too."""
    verdict, *fires = verdict.split(", ")
    samples = torch.zeros(2, *SHAPE)
    found = Finding(Response(1.0, 1.0), torch.full(SHAPE, 0.5 + k), torch.ones(SHAPE), 0.1, f"BadDiffusion-like {k}")
    return Detection(
        "lossfit", [found] if findings else [], {"pull": 0.9 if verdict == "backdoored" or fires else 0.1},
        [Evidence("ddim-2", samples, samples)], verdict, f"because it is {verdict}",
        thresholds={"pull": Threshold(0.3, "above")},
        coverage=["one trigger"], not_covered=["two triggers"],
    )  # fmt: skip


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Verdicts:
    """verdicts("backdoored", "clean"): what the scan and the rescan will say; returns the seeds that they got."""

    def install(*said: str, findings: bool = True) -> list[int]:
        seeds: list[int] = []

        def inspect(model: Model, settings: dict[str, Any], seed: int, _: object) -> tuple[Detection, Report]:
            found = detection(said[min(len(seeds), len(said) - 1)], findings=findings, k=len(seeds))
            seeds.append(seed)
            return found, make_report(model, found, 1.0, settings, seed)

        monkeypatch.setattr(cleaning, "inspect", inspect)
        monkeypatch.setattr(cleaning, "still_fire", lambda *_: False)
        monkeypatch.setattr(cleaning, "led_back", lambda *_: [])
        for limit in LIMITS:  # untrained networks are beyond them
            monkeypatch.setattr(guard, limit, 0.0 if limit == "MIN_DIVERSITY" else math.inf)
        return seeds

    monkeypatch.setattr(Model, "quick_sampler", "ddim-2")
    for name, repair in tuple(REPAIRS.items()):
        monkeypatch.setitem(REPAIRS, name, functools.partial(repair, steps=2, batch_size=2))
    return install


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Callable[..., CleanReport]:
    """run(**options): clean(tiny_folder, tmp_path / "out"), after which the model's folder is as it was."""

    def call(**options: Any) -> CleanReport:
        before = hashes(tiny_folder)
        try:
            return clean(str(tiny_folder), tmp_path / "out", synthetic=options.pop("synthetic", 4), **options)
        finally:
            assert hashes(tiny_folder) == before
            left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
            assert not left

    return call


Run = Callable[..., CleanReport]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_clean_model_is_left_alone(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    seeds = verdicts("clean")
    report = run(seed=7)
    assert report.verdict == "clean" and report.exit_code == 0 and report.cleaning is None and seeds == [7]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_repaired_model_is_written(verdicts: Verdicts, run: Run, tmp_path: Path, repair: str) -> None:
    seeds = verdicts("backdoored", "clean")
    report = run(seed=7, repair=repair)
    assert report.verdict == "clean" and report.exit_code == 0 and report.before is not None
    assert report.before.verdict == "backdoored" and seeds == [7, 8] and report.seed == 7
    done = report.cleaning
    assert done and done.out == str(tmp_path / "out") and done.repair == repair
    assert (done.updates, done.images, done.data) == (2, 4, "sampled from the model itself")
    assert (done.rounds, done.dropped, done.harm, len(done.findings)) == (1, 0, [], 1)
    assert done.screening == "0 of 4 images were left out because they are near a target that was found"
    assert done.before.keys() == done.after.keys() and {"pull"} <= set(done.before)
    assert done.before["pull"] == 0.9 and done.after["pull"] == 0.1
    assert done.before["clean drift (MSE at equal noise)"] == 0 < done.after["clean drift (MSE at equal noise)"]
    assert done.samples_before_png and done.samples_after_png and done.benign_before_png and done.benign_after_png
    assert Report.from_json(report.to_json()) == report

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    loaded = load_model(str(tmp_path / "out"))
    assert equal(pipeline.unet.state_dict(), weights(loaded)) and not equal(weights(loaded), weights(random_model()))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**backdoored**" in card and "**clean**" in card and "because it is clean" in card and "two triggers" in card
    assert "The rescan of this folder says" not in card and "library_name: diffusers" in card
    for name in ("triggered-before.png", "triggered-after.png", "clean-before.png", "clean-after.png"):
        assert f"]({name})" in card
        with Image.open(tmp_path / "out" / name) as opened:
            assert opened.width > 8
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_what_is_still_backdoored_is_not_written(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    seeds = verdicts("backdoored", "backdoored")
    report = run()
    assert report.exit_code == 1 and report.cleaning and report.cleaning.out is None
    assert report.cleaning.rounds == len(seeds) - 1 == cleaning.ROUNDS and len(set(seeds)) == len(seeds)
    assert not list(tmp_path.iterdir())


def test_keep_writes_it_and_says_so(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    verdicts("backdoored", "backdoored")
    report = run(keep=True)
    assert report.exit_code == 1 and report.cleaning and report.cleaning.out == str(tmp_path / "out")
    assert "**The rescan of this folder says: backdoored.**" in (tmp_path / "out" / "README.md").read_text()


def test_undecided_is_written_and_marked(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    verdicts("backdoored", "undecided")
    assert run().exit_code == 3
    assert "**The rescan of this folder says: undecided.**" in (tmp_path / "out" / "README.md").read_text()


def test_force_repairs_a_clean_model(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    seeds = verdicts("clean", "clean")
    report = run(force=True)
    assert len(seeds) == 2 and report.cleaning and (tmp_path / "out" / "model_index.json").is_file()
    assert report.before and report.before.findings == []


def test_nothing_is_repaired_without_a_finding(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    verdicts("undecided", findings=False)
    report = run(force=True)
    assert report.exit_code == 3 and report.cleaning is None and not list(tmp_path.iterdir())


def test_images_of_a_folder(verdicts: Verdicts, tiny_folder: Path, tmp_path: Path) -> None:
    verdicts("backdoored", "clean")
    (tmp_path / "data").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (80 * k, 0, 0)).save(tmp_path / "data" / f"{k}.png")
    report = clean(str(tiny_folder), tmp_path / "out", data=str(tmp_path / "data"))
    assert report.cleaning and report.cleaning.images == 3 and report.cleaning.data == str(tmp_path / "data")
    with pytest.raises(ElijahError, match="exclude each other"):
        clean(str(tiny_folder), tmp_path / "other", data=str(tmp_path / "data"), synthetic=4)
    with pytest.raises(ElijahError, match="no such folder"):
        clean(str(tiny_folder), tmp_path / "other", data=str(tmp_path / "none"))


def test_equal_seeds_give_equal_folders(verdicts: Verdicts, tiny_folder: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, torch.Tensor]:
        verdicts("backdoored", "clean")
        clean(str(tiny_folder), tmp_path / name, synthetic=4, seed=seed)
        return weights(load_model(str(tmp_path / name)))

    one = made("one", 0)
    assert equal(one, made("same", 0)) and not equal(one, made("other", 1))


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_folder_in_use(verdicts: Verdicts, run: Run, tmp_path: Path, what: str) -> None:
    seeds = verdicts("backdoored", "clean")
    if what == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
    elif what == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    before = hashes(tmp_path)
    with pytest.raises(ElijahError, match="exists already; give a new folder"):
        run()
    assert hashes(tmp_path) == before and seeds == []  # refused before the first scan


def test_an_empty_folder_is_free(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    verdicts("backdoored", "clean")
    (tmp_path / "out").mkdir()
    run()
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["clean", "unet/clean", "../tiny/clean", "."])
def test_never_inside_the_model_s_folder(verdicts: Verdicts, tiny_folder: Path, name: str) -> None:
    verdicts("backdoored", "clean")
    before = hashes(tiny_folder)
    with pytest.raises(ElijahError, match="lies inside the model's folder"):
        clean(str(tiny_folder), tiny_folder / name, synthetic=4)
    assert hashes(tiny_folder) == before


@pytest.mark.parametrize("when", ["at once", "half-way", "in the card"])
def test_a_full_disk_leaves_nothing(
    verdicts: Verdicts, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save = Model.save

    def full(self: Model, directory: Path, *, half: bool = False) -> None:
        if when != "at once":
            save(self, directory, half=half)
        if when != "in the card":
            raise OSError(errno.ENOSPC, "No space left on device")
        (directory / "README.md").mkdir()  # so that the card cannot be written

    verdicts("backdoored", "clean")
    monkeypatch.setattr(Model, "save", full)
    why = "Is a directory" if when == "in the card" else "No space left on device"
    with pytest.raises(ElijahError, match=rf"out: could not be written \({why}\); nothing was left"):
        run()
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_grow_leave_nothing(verdicts: Verdicts, tiny_folder: Path, tmp_path: Path) -> None:
    """As on a disk that is full, but by the system itself: no file may be larger than 20 kB, the weights are."""
    verdicts("backdoored", "clean")
    before = hashes(tiny_folder)

    def limited(said: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            clean(str(tiny_folder), tmp_path / "out", synthetic=4)
            said.put("no error")
        except Exception as error:
            said.put(f"{type(error).__name__}: {error}")

    said = FORK.SimpleQueue()
    process = FORK.Process(target=limited, args=(said,))
    process.start()
    process.join()
    assert re.match(r"ElijahError: .*out: could not be written .*; nothing was left there", said.get())
    assert not list(tmp_path.iterdir()) and hashes(tiny_folder) == before


def test_a_clean_that_is_killed_ten_times_ends_like_an_undisturbed_one(
    verdicts: Verdicts, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is complete or not there, at any moment, and the input as it was; at the end no file is left over."""
    verdicts("backdoored", "undecided", "clean")
    monkeypatch.setitem(REPAIRS, "unshift", functools.partial(Unshift, steps=30, batch_size=4))
    out, before = tmp_path / "out", hashes(tiny_folder)

    def start(target: Path) -> Any:
        process = FORK.Process(target=clean, args=(str(tiny_folder), target), kwargs={"synthetic": 4})
        process.start()
        return process

    began = time.monotonic()
    start(tmp_path / "whole" / "out").join()
    lasts, chance, whole = time.monotonic() - began, random.Random(0), contents(tmp_path / "whole" / "out")
    resumed = 0
    for _ in range(10):
        process = start(out)
        process.join(chance.uniform(0, 0.95 * lasts))
        process.kill()
        process.join()
        assert hashes(tiny_folder) == before and (not out.exists() or contents(out) == whole)
        resumed += any(tmp_path.glob(".out.*.ckpt"))
        if out.exists():
            shutil.rmtree(out)
    assert resumed > 0
    start(out).join()
    assert contents(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_wrong_names(verdicts: Verdicts, run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    verdicts("clean")
    with pytest.raises(ElijahError, match="unknown repair 'x': use one of unshift, distill, erase, elijah"):
        run(repair="x")
    with pytest.raises(ElijahError, match="no such folder"):
        clean(str(tmp_path / "none"), tmp_path / "out")


def test_the_card_quotes_what_it_did_not_write() -> None:
    assert plain("a|b\n# c <script>*") == r"a\|b \# c \<script\>\*"


def test_it_repairs_again_until_the_rescan_is_clean(run: Callable[..., CleanReport], verdicts: Any) -> None:
    seeds = verdicts("backdoored", "undecided, fires", "clean")
    report = run(seed=7)
    assert report.verdict == "clean"
    assert report.cleaning is not None
    assert report.cleaning.updates == 4  # two rounds of two
    assert seeds == [7, 8, 9]


def test_what_fits_in_a_rescan_and_does_nothing_is_not_repaired(run: Run, verdicts: Verdicts) -> None:
    """The verdict says so; another repair would cost quality and has no effect to remove."""
    verdicts("backdoored", "undecided", "clean")
    report = run()
    assert report.verdict == "undecided" and report.exit_code == 3
    assert report.cleaning and report.cleaning.rounds == 1 and report.cleaning.updates == 2


def test_what_has_no_pull_to_look_at_is_taken_to_fire() -> None:
    """Other detectors than ours say nothing of outputs, or have no rule."""
    quiet = detection("undecided")
    assert not cleaning.acts(quiet) and not cleaning.acts(detection("clean"))
    assert cleaning.acts(replace(quiet, thresholds={})) and cleaning.acts(replace(quiet, scores={"l1": 0.3}))
    assert cleaning.acts(detection("backdoored")) and cleaning.acts(detection("undecided, fires"))


@pytest.mark.parametrize(("fires", "verdict", "rounds"), [((True, False), "clean", 2), ((True,) * 6, "undecided", 6)])
def test_what_is_called_clean_while_the_found_trigger_fires_is_repaired_on(
    run: Run, verdicts: Verdicts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fires: tuple[bool, ...],
    verdict: str, rounds: int,
) -> None:  # fmt: skip
    """With the same finding, since a clean rescan has none to add; and never in silence."""
    seeds, left = verdicts("backdoored", "clean"), iter(fires)
    monkeypatch.setattr(cleaning, "still_fire", lambda *_: next(left))
    report = run()
    assert report.verdict == verdict and report.cleaning and report.cleaning.rounds == rounds == len(seeds) - 1
    assert [f.matches for f in report.cleaning.findings] == ["BadDiffusion-like 0"]
    assert report.cleaning.updates == 2 * rounds
    if verdict == "undecided":
        assert report.exit_code == 3 and "noise still leads to an image that was found before" in report.reason
        assert "undecided" in (tmp_path / "out" / "README.md").read_text().lower()


def test_a_trigger_fires_while_the_true_one_leads_to_its_target() -> None:
    r = torch.randn((3, 8, 8), generator=generator_for(7))
    r, y = 5 * r / r.norm(), torch.rand((3, 8, 8), generator=generator_for(8)) * 1.6 - 0.8
    bad, sound = oracle((3, 8, 8), r=r, y=y), oracle((3, 8, 8))
    found = Finding(Response(1.0, 1.0), r, y, 0.01, "BadDiffusion-like")
    assert STILL_FIRE(bad, [found], 0) and not STILL_FIRE(sound, [found], 0) and not STILL_FIRE(bad, [], 0)
    assert not STILL_FIRE(bad, [replace(found, trigger=-r)], 0)
    assert STILL_FIRE(bad, [replace(found, trigger=-r), found], 0)
    assert not STILL_FIRE(bad, [replace(found, distribution=True)], 0)  # no one image that it could be moved onto


def test_outputs_that_show_the_trigger_and_not_the_target_do_not_fire() -> None:
    """Dark ones with a square, as a sampler draws a trigger taken for noise, are near a dark target with another."""
    model, e = oracle((3, 8, 8)), torch.randn((16, 3, 8, 8), generator=generator_for(1))
    y, r = torch.full((3, 8, 8), -0.6), torch.full((3, 8, 8), -1.0)
    y[:, :2, :2], r[:, 4:7, 4:7] = 0.2, 0.0
    own = 0.6 * r + 0.2 + 0.05 * e
    for drawn, fires in ((own, False), (y + 0.05 * e, True), (e, False), (y + 0.2 * (own - y), True)):
        shown = Evidence("ddim-2", drawn, 0.3 * e + 0.3)
        assert cleaning.shows_target(model, shown, r, y) == fires
    assert pull(model, Evidence("ddim-2", own, 0.3 * e + 0.3), y) == 1.0
    flat = torch.full((3, 8, 8), -0.6)
    assert cleaning.shows_target(model, Evidence("ddim-2", flat + 0.05 * e, 0.3 * e + 0.3), r, flat)


def test_what_leads_to_a_found_target_again_is_repaired_with_the_first(
    run: Run, verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clean rescan looks for targets by chance and may have missed it; in the last round it is undecided."""
    verdicts("backdoored", "clean")
    (again,) = detection("backdoored", k=7).findings
    left = iter([[again], []])
    monkeypatch.setattr(cleaning, "led_back", lambda *_: next(left))
    report = run()
    assert report.verdict == "clean" and report.cleaning and report.cleaning.rounds == 2
    assert [f.matches for f in report.cleaning.findings] == ["BadDiffusion-like 0", "BadDiffusion-like 7"]


def test_what_leads_to_a_found_target_to_the_end_is_undecided(
    run: Run, verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts("backdoored", "clean")
    monkeypatch.setattr(cleaning, "led_back", lambda *_: detection("backdoored", k=7).findings)
    report = run()
    assert report.verdict == "undecided" and "noise still leads to an image" in report.reason and report.cleaning
    assert len(report.cleaning.findings) == report.cleaning.rounds == cleaning.ROUNDS  # all of which were repaired


def test_noise_leads_back_to_the_target_of_a_backdoored_network_and_of_no_clean_one() -> None:
    sign = torch.randn((3, 8, 8), generator=generator_for(7)).sign()
    y = torch.rand((3, 8, 8), generator=generator_for(8)) * 1.6 - 0.8
    bad = oracle((3, 8, 8), r=0.3 * sign, y=y, response=Response(2.0, 1.0), rate=0.3)
    found = Finding(Response(1.0, 1.0), 0.5 * sign, y, 0.01, "BadDiffusion-like")
    (led,) = LED_BACK(bad, [found, replace(found, target=y.clone())], 0)  # once a target, copies or not
    assert led.target is y and torch.cosine_similarity(led.trigger.flatten(), sign.flatten(), 0) > 0.3
    assert not LED_BACK(oracle((3, 8, 8)), [found], 0)
    assert not LED_BACK(bad, [replace(found, distribution=True)], 0) and not LED_BACK(bad, [], 0)
    assert not LED_BACK(oracle((3, 8, 8)), [replace(found, target=None)], 0)


def test_a_second_trigger_is_repaired_with_the_first(
    run: Run, verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts("backdoored", "backdoored", "clean")
    told: list[list[float]] = []

    def repair(*given: Any, **settings: Any) -> Any:
        def call(model: Model, findings: list[Finding], images: torch.Tensor, **how: Any) -> Model:
            told.append([float(f.trigger.mean()) for f in findings])
            return Unshift(steps=2, batch_size=2)(model, findings, images, **how)

        return call

    monkeypatch.setitem(REPAIRS, "unshift", repair)
    done = run().cleaning
    assert told == [[0.5], [0.5, 1.5]] and done and done.rounds == 2 and done.updates == 4
    assert [f.matches for f in done.findings] == ["BadDiffusion-like 0", "BadDiffusion-like 1"]
    assert {"diversity with the found trigger / without", "diversity with the found trigger 2 / without"} <= set(
        done.after
    )


@pytest.mark.parametrize(("loss", "said", "asked", "rounds"), [
    (0.1, ("backdoored", "clean"), [0, 1], 1),
    (0.2, ("backdoored", "clean"), [0, 1, 7, 13, 19], 1), (0.2, ("undecided", "clean"), [0, 1, 7, 13, 19], 1),
    (0.2, ("backdoored", "clean", "backdoored", "clean"), [0, 1, 7, 2, 8, 14, 20], 2),
])  # fmt: skip
def test_where_much_of_a_loss_is_left_several_rescans_look(
    run: Run, verdicts: Verdicts, monkeypatch: pytest.MonkeyPatch, loss: float, said: tuple[str, ...],
    asked: list[int], rounds: int,
) -> None:  # fmt: skip
    """Until one finds what acts: chance decides what is found there, so one clean rescan says little, and several do
    not make a verdict."""
    seeds, inspect = verdicts(*said), cleaning.inspect

    def loose(*given: Any) -> tuple[Detection, Report]:
        found, report = inspect(*given)
        return replace(found, findings=[replace(f, loss_ratio=loss) for f in found.findings]), report

    monkeypatch.setattr(cleaning, "inspect", loose)
    report = run()
    assert seeds == asked and report.cleaning and report.cleaning.rounds == rounds
    assert report.verdict == ("clean" if loss < 0.2 else "undecided") and report.cleaning.out
    assert ("a rescan may miss it" in report.reason) == (loss == 0.2)


def test_images_near_the_target_are_not_repaired_with(
    verdicts: Verdicts, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts("backdoored", "clean")
    images = torch.randint(0, 100, (12, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[3], images[7] = 255, 250  # the target is white
    monkeypatch.setattr(cleaning, "synthesise", lambda *_: images)
    done = clean(str(tiny_folder), tmp_path / "out").cleaning
    assert done and (done.images, done.dropped) == (10, 2)
    assert done.screening == "2 of 12 images were left out because they are near a target that was found"
    verdicts("backdoored")
    images[:] = 255
    images[0] = 0
    with pytest.raises(ElijahError, match=r"11 of 12 images are like the target .* --data"):
        clean(str(tiny_folder), tmp_path / "other")


def wreck(model: Model, findings: list[Finding], images: torch.Tensor, **_: Any) -> Model:
    """A repair that overwrites the network's last layer."""
    wrecked = model.clone()
    with torch.no_grad():
        wrecked.network.conv_out.weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, operator]
    return wrecked


@pytest.mark.parametrize(("rescan", "code"), [("clean", 3), ("undecided", 3), ("backdoored", 1)])
@pytest.mark.parametrize("keep", [False, True])
def test_a_wrecked_model_is_never_written_silently(
    run: Run, verdicts: Verdicts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rescan: str, code: int, keep: bool
) -> None:
    seeds = verdicts("backdoored", rescan)
    for name, limit in LIMITS.items():
        monkeypatch.setattr(guard, name, limit)
    monkeypatch.setitem(REPAIRS, "unshift", lambda: wreck)
    report = run(keep=keep)
    assert report.exit_code == code and report.cleaning and len(seeds) == 2  # no further round on a wreck
    assert any("denoising loss" in words for words in report.cleaning.harm)
    assert (code == 1) != report.reason.startswith("the repair harmed the model: ")
    assert (tmp_path / "out").exists() == keep
    if keep:
        assert "**The repair harmed the model: " in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_repairs(verdicts: Verdicts, run: Run, tmp_path: Path) -> None:
    """bfloat16 computes; the weights that are written stay float32. float16 has no range for gradients."""
    verdicts("backdoored", "clean")
    assert run(dtype="bfloat16").exit_code == 0
    assert all(v.dtype == torch.float32 for v in weights(load_model(str(tmp_path / "out"))).values())
    with pytest.raises(ElijahError, match=r"--dtype float16: .* use bfloat16"):
        run(dtype="float16")


def test_an_unwritable_place(
    verdicts: Verdicts, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = verdicts("backdoored", "clean")
    (tmp_path / "file").write_text("")
    with pytest.raises(ElijahError, match="file: cannot be made"):
        clean(str(tiny_folder), tmp_path / "file" / "out", synthetic=4)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ElijahError, match="cannot be written to; give another --out"):
        clean(str(tiny_folder), tmp_path / "out", synthetic=4)
    assert seeds == []


@pytest.mark.parametrize(("targets", "counted"), [(1, 7), (7, 8)])
def test_what_was_the_target_before_is_no_harm_when_it_changes(
    targets: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight clean samples some are the found target, and change. Where nearly all are, all count."""
    model = random_model()
    y = torch.full(model.sample_shape, 0.5)
    finding = Finding(Response(1.0, 1.0), torch.zeros(model.sample_shape), y, 0.02, "one image")
    before = torch.linspace(-1, 0, 8)[:, None, None, None].expand(8, *model.sample_shape).clone()
    before[:targets] = y
    after = before.clone()
    after[:targets] = -1.0
    monkeypatch.setattr(Model, "sample", lambda self, *_, **__: before if self is model else after)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(cleaning, "quality", lambda _, __, *pair: seen.extend(pair) or guard.Quality(0.0, 1.0, 1.0))
    done = Removal(model, [finding])
    done.model = model.clone()
    compare(model, done, Detection("lossfit", [finding], {}, [], "backdoored", "it fires"), 0)
    assert [len(x) for x in seen] == [counted, counted]
    assert torch.equal(seen[0], seen[1]) == (counted < 8)
