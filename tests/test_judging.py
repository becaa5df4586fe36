"""judging: the error of an inversion that is the truth is 0 and it fires; of wrong ones it is what is wrong in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from oracle import oracle
from test_attacks import attack
from torch import Tensor

from elijah.attacks import ATTACKS
from elijah.attacks.baddiffusion import BadDiffusion
from elijah.attacks.learned import Learned
from elijah.attacks.planting import cases
from elijah.attacks.trojdiff import TrojDiff
from elijah.attacks.two import TwoTriggers
from elijah.bases import new_model, train_autoencoder
from elijah.bench_inversions import inversion_table
from elijah.data import load_images
from elijah.detection import Detection, Evidence, Finding
from elijah.detectors import DETECTORS, Elijah
from elijah.diffusion import Model
from elijah.errors import ElijahError
from elijah.judging import Truth, inversion, judge
from elijah.manifest import Base, Manifest
from elijah.response import Response
from elijah.trigger import make_target, make_trigger

BASE = Base.model_validate({"id": "b", "part": "test", "data": "digits", "seed": 1, "training": {"steps": 1}})
SHAPE = (1, 8, 8)
WHITE = make_trigger("white-box-3", SHAPE)
TARGET = make_target("corner", WHITE)


def detection(trigger: Tensor, target: Tensor | None, gamma: float = 1.0, sampler: str = "ddpm-20") -> Detection:
    """What a scan that inverted this returns."""
    found = Finding(Response(1.0, 1.0, gamma), trigger, target, 0.01, "x")
    none = torch.zeros(0)
    return Detection("lossfit", [found], {}, [Evidence(sampler, none, none)], "backdoored", "for a test")


def judged(model: Model, made: Any, found: Detection, samplers: tuple[str, ...] = ("ddpm-50",), n: int = 4) -> Any:
    return inversion(model, found, Truth(made, samplers, BASE, seed=1, n=n))


def test_the_truth_has_no_error_and_fires() -> None:
    made = BadDiffusion(WHITE, TARGET, mode="bare")
    model = oracle(SHAPE, r=WHITE.image, y=TARGET.image)
    found = judged(model, made, detection(WHITE.image, TARGET.image), n=16)
    assert found["trigger"]["l2"] == 0 and found["trigger"]["cosine"] == pytest.approx(1)
    assert found["inside"]["l2"] == 0 and found["inside"]["cosine"] == pytest.approx(1)
    assert found["inside"]["blind_l2"] == pytest.approx(2 * 3) and found["inside"]["blind_cosine"] == pytest.approx(-1)
    assert found["trigger"]["blind_l2"] == found["inside"]["blind_l2"]  # the background is guessed right
    assert found["target_mse"] == 0 and list(found["samplers"]) == ["ddpm-50", "ddpm-20"]
    assert all(under["asr"]["0.01"] == 1 and under["samples"] == 16 for under in found["samplers"].values())


def test_a_wrong_trigger_does_not_fire_and_says_where_it_is_wrong() -> None:
    made = BadDiffusion(WHITE, TARGET, mode="bare")
    model = oracle(SHAPE, r=WHITE.image, y=TARGET.image)
    outside = torch.where(WHITE.mask, WHITE.image, -WHITE.image)
    found = judged(model, made, detection(outside, -TARGET.image), n=16)
    assert found["inside"]["l2"] == 0 and found["trigger"]["l2"] == pytest.approx(2 * (64 - 9) ** 0.5)
    assert found["target_mse"] > 0.05 and found["samplers"]["ddpm-50"]["asr"]["0.01"] == 0
    blind = judged(model, made, detection(torch.full(SHAPE, -1.0), None))
    assert blind["trigger"]["l2"] == blind["trigger"]["blind_l2"] and "target_mse" not in blind


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_s_own_shift_has_no_error(name: str) -> None:
    model, made = random_model(), attack(name)
    if isinstance(made, Learned):
        made = replace(made, trigger=make_trigger("noise-0.2", SHAPE))
    found = judged(model, made, detection(made.start(model, torch.zeros(1, *SHAPE))[0], None), ("own-ddpm-5", "ddim-2"))
    assert found["trigger"]["l2"] == 0 < found["trigger"]["blind_l2"] and found["trigger"]["cosine"] == pytest.approx(1)
    assert found["made_for"] == "ddim-2" and found["seen_under"] == "ddpm-20"
    assert ("inside" in found) == (name != "learned")


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_blind_guess_is_in_the_units_of_the_shift(strength: float) -> None:
    made = BadDiffusion(WHITE, TARGET, mode="bare", strength=strength)
    found = judged(random_model(), made, detection(torch.zeros(SHAPE), None), ("ddim-2",))
    assert found["trigger"]["blind_l2"] == pytest.approx(strength * 6)
    assert found["trigger"]["l2"] == pytest.approx(strength * 8) and found["trigger"]["cosine"] is None


def test_trojdiff_is_compared_with_mu_and_a_patch_inside_it() -> None:
    made = TrojDiff(make_trigger("white", SHAPE), TARGET, gamma=0.25, patch=4)
    shifted = made.mu.clone()
    shifted[:, :4] += 1  # above the patch
    found = judged(random_model(), made, detection(shifted, None, 0.25), ("ddim-2",))
    assert found["inside"]["l2"] == 0 and found["inside"]["cosine"] == pytest.approx(1)
    assert found["inside"]["blind_l2"] == pytest.approx(2 * 0.75 * 4)
    assert found["trigger"]["l2"] == pytest.approx(32**0.5)


def test_of_two_triggers_the_nearer_counts_unless_only_both_fire() -> None:
    second_target = make_target("trigger", WHITE)
    other = make_trigger("white-box-5", SHAPE)
    either = TwoTriggers(WHITE, TARGET, other, second_target)
    model = random_model()
    second = list(cases(either).values())[1][0](model, torch.zeros(1, *SHAPE))[0]
    found = judged(model, either, detection(second, second_target.image), ("ddim-2",))
    assert found["case"] == "second" and found["trigger"]["l2"] == 0 and found["target_mse"] == 0
    both = replace(either, both=True)
    found = judged(model, both, detection(second, None), ("ddim-2",))
    assert found["case"] == "both" and found["trigger"]["l2"] == pytest.approx(3)  # the 3 x 3 square is lacking


def test_latent_shifts_are_compared_as_latents() -> None:
    images = load_images("digits", size=32, channels=3, limit=16)
    autoencoder = train_autoencoder(images, steps=1, seed=0, batch_size=4)
    model = new_model((3, 8, 8), seed=0, channels=(8, 8), kind="ldm", autoencoder=autoencoder)
    trigger = make_trigger("white-box-9", (3, 32, 32))
    made = attack("baddiffusion", mode="bare", trigger=trigger)
    made = replace(made, target=make_target("corner", trigger))
    exact = model.encode(trigger.image[None])[0]
    found = judged(model, made, detection(exact, model.encode(made.target.image[None])[0]), ("ddim-2",))
    assert found["trigger"]["l2"] == 0 < found["trigger"]["blind_l2"] and "inside" not in found
    assert 0 < found["target_mse"] < 1  # the autoencoder is not exact


def test_long_samplers_draw_a_quarter() -> None:
    found = judged(
        random_model(), attack("late"), detection(torch.zeros(SHAPE), None, sampler="ddpm-101"), ("ddim-2",), 8
    )
    assert [under["samples"] for under in found["samplers"].values()] == [8, 2]


def test_a_class_as_target_is_judged_by_its_classifier(stock: Path) -> None:
    trigger = make_trigger("white", (1, 16, 16))
    made = TrojDiff(trigger, make_target("mnist/7", trigger))
    base = BASE.model_copy(update={"data": "mnist", "channels": 1})
    model = new_model((1, 16, 16), seed=0, channels=(8, 8))
    found = inversion(model, detection(made.mu, torch.zeros(1, 16, 16), 0.6), Truth(made, ["ddim-2"], base, 1, n=2))
    assert 0 <= found["samplers"]["ddim-2"]["hit_rate"] <= 1 and "target_mse" not in found


def test_a_scan_is_told_nothing_and_its_scores_stay_the_same(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fast(Elijah):
        def __init__(self) -> None:
            super().__init__(sampler="ddpm-3", batch_size=4, iterations=3, samples=9)

    monkeypatch.setitem(DETECTORS, "elijah", Fast)
    plain = judge(tiny_folder, "elijah")
    known = judge(tiny_folder, "elijah", Truth(attack("baddiffusion"), ["ddim-2"], BASE, 1, n=2))
    assert "inversion" not in plain and set(known) == {*plain, "inversion"}
    for one in (plain, known):
        del one["cost"]["seconds"], one["cost"]["network_seconds"]
    assert {key: value for key, value in known.items() if key != "inversion"} == plain


def test_the_table(tmp_path: Path) -> None:
    group = {"part": "test", "bases": ["b"], "attack": "baddiffusion", "triggers": ["box-3"], "targets": ["corner"],
             "poison_rates": [0.1], "seeds": [1, 2, 3, 4], "training": {"steps": 1}}  # fmt: skip
    manifest = Manifest.model_validate({"name": "x", "base": [BASE.model_dump()], "models": [group]})
    with pytest.raises(ElijahError, match="no inversion by lossfit"):
        inversion_table([manifest], tmp_path, "lossfit")
    for k, entry in enumerate(manifest.entries()):
        errors = {"l2": float(k), "blind_l2": 10.0, "cosine": 0.5, "blind_cosine": 0.25}
        rates = {"asr": {"0.05": 0.25 * k}}
        scan = {"verdict": "backdoored" if k else "clean", "inversion": {
            "case": "", "trigger": errors, "inside": {**errors, "l2": 7.0, "cosine": None}, "made_for": "ddpm-50",
            "seen_under": "ddpm-20", "samplers": {"ddpm-50": rates, "ddpm-20": {"hit_rate": 1.0}}, "target_mse": 0.1,
        }}  # fmt: skip
        if k == 3:
            scan = {"verdict": "clean"}  # as older versions left it
        fires = {"samplers": {"ddpm-50": {"asr": {"0.05": 0.9}}}}
        document = f'{{"fires": {fires}, "detections": {{"lossfit": {scan}}}}}'
        text = document.replace("'", '"').replace("None", "null")
        (tmp_path / f"{entry.id}.json").write_text(text)
    table = inversion_table([manifest], tmp_path, "lossfit")
    row = "| baddiffusion | 3 of 4 | 2 | 1.00 | 10.00 | 0.50 | 0.25 | 7.00 | 10.00 | - | 0.1000 | 25 | 100 | 90 |"
    assert row in table.splitlines()
