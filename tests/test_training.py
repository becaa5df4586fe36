"""training: the loss falls, equal seeds give equal bits, and a killed run goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import equal, random_model, weights
from oracle import oracle

from elijah.bases import new_model
from elijah.data import batch, load_images
from elijah.diffusion import Model, generator_for
from elijah.errors import ElijahError
from elijah.training import Optimiser, denoising_loss, optimise, train, training_noise

STEPS, EVERY = 12, 5


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits", size=8, channels=1, limit=64)


def run(
    images: torch.Tensor, seed: int = 0, *, steps: int = STEPS, lr: float = 2e-3, killed_at: int | None = None,
    checkpoint: Path | None = None, ema: float | None = 0.8,
) -> Model:  # fmt: skip
    def progress(_: str, done: int, __: int) -> None:
        if done == killed_at:
            raise KeyboardInterrupt

    settings = Optimiser(steps, lr=lr, warmup=3, ema_decay=ema, checkpoint_every=EVERY)
    return train(
        images, settings, seed=seed, batch_size=8, model=random_model(), checkpoint=checkpoint, progress=progress
    )


def loss_of(model: Model, images: torch.Tensor) -> float:
    with torch.no_grad():
        return denoising_loss(model, batch(images, 256, generator_for(9)), generator_for(8)).item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_falls(digits: torch.Tensor, prediction: str) -> None:
    base = new_model((1, 8, 8), seed=0, channels=(8, 8), prediction=prediction)
    before = weights(base)
    trained = train(digits, Optimiser(60, lr=5e-3), seed=0, batch_size=16, model=base)
    assert loss_of(trained, digits) < 0.8 * loss_of(base, digits)
    assert equal(weights(base), before) and trained.updates == 60 and not trained.network.training


def test_the_exact_network_has_the_least_loss() -> None:
    """E loss = E[1 - s^2 / (a^2 s0^2 + s^2)] over t for eps; a shifted network is worse."""
    model = oracle((1, 8, 8))
    x0 = model.network.m + 0.5 * torch.randn(4000, 1, 8, 8, generator=generator_for(1))  # type: ignore[operator]
    expected = (1 - model.s**2 / (model.a**2 * 0.25 + model.s**2)).mean().item()
    found = denoising_loss(model, x0, generator_for(2)).item()
    assert found == pytest.approx(expected, rel=0.1)  # 4000 timesteps of very unequal loss
    model.network.m = model.network.m + 0.3  # type: ignore[operator, assignment]
    assert denoising_loss(model, x0, generator_for(2)).item() > 1.1 * found


def test_equal_seeds_give_equal_weights(digits: torch.Tensor) -> None:
    one, same, other = run(digits, 0), run(digits, 0), run(digits, 1)
    assert equal(weights(one), weights(same))
    assert not equal(weights(one), weights(other))


@pytest.mark.parametrize(("killed_at", "ema"), [(3, 0.8), (7, None), (7, 0.8), (10, 0.8)])
def test_a_killed_run_goes_on(digits: torch.Tensor, tmp_path: Path, killed_at: int, ema: float | None) -> None:
    """Killed after update 3 (no checkpoint yet), 7 (one) and 10 (just before the second is written)."""
    checkpoint = tmp_path / "run.ckpt"
    undisturbed = run(digits, ema=ema)
    with pytest.raises(KeyboardInterrupt):
        run(digits, killed_at=killed_at, checkpoint=checkpoint, ema=ema)
    assert checkpoint.is_file() == (killed_at > EVERY) and not list(tmp_path.glob("*.part"))
    done: list[int] = []
    settings = Optimiser(STEPS, lr=2e-3, warmup=3, ema_decay=ema, checkpoint_every=EVERY)
    model, arguments = random_model(), {"seed": 0, "batch_size": 8, "checkpoint": checkpoint}
    resumed = train(digits, settings, model=model, progress=lambda _, k, __: done.append(k), **arguments)  # type: ignore[arg-type]
    assert done[0] == (EVERY + 1 if killed_at > EVERY else 1) and done[-1] == STEPS
    assert equal(weights(resumed), weights(undisturbed)) and resumed.updates == STEPS


def test_a_checkpoint_of_another_length_is_refused(digits: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.ckpt"
    run(digits, checkpoint=checkpoint)
    with pytest.raises(ElijahError, match="made for 12 steps, not 20"):
        run(digits, steps=20, checkpoint=checkpoint)


def test_the_average_lags_behind(digits: torch.Tensor) -> None:
    assert not equal(weights(run(digits, ema=0.8)), weights(run(digits, ema=None)))


def test_what_is_called_after_each_update(digits: torch.Tensor) -> None:
    """It sees the number of the update, and the weights after it."""
    seen: list[tuple[int, int]] = []
    kept: list[dict[str, torch.Tensor]] = []

    def each(k: int, m: Model) -> None:
        seen.append((k, m.updates))
        kept.append({name: p.clone() for name, p in weights(m).items()})

    def loss(m: Model, g: torch.Generator) -> torch.Tensor:
        return denoising_loss(m, batch(digits, 4, g), g)

    model = optimise(random_model(), loss, Optimiser(3), seed=0, each=each)
    assert seen == [(1, 1), (2, 2), (3, 3)] and model.updates == 3
    assert equal(kept[2], weights(model)) and not equal(kept[0], kept[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    calls: list[int] = []

    def loss(m: Model, _: torch.Generator) -> torch.Tensor:
        calls.append(1)
        return next(m.network.parameters()).sum() * (bad if len(calls) == 3 else 0.0)

    with pytest.raises(ElijahError, match="repairing: the loss is not finite after 2 updates; try a smaller --lr"):
        optimise(random_model(), loss, Optimiser(9), seed=0, what="repairing")


def test_new_models() -> None:
    assert equal(
        weights(new_model((1, 8, 8), seed=3, channels=(8, 8))), weights(new_model((1, 8, 8), seed=3, channels=(8, 8)))
    )
    assert not equal(weights(random_model()), weights(new_model((1, 8, 8), seed=1, channels=(8, 8))))
    state = torch.get_rng_state()
    large = new_model((3, 16, 16), seed=0)
    assert torch.equal(torch.get_rng_state(), state)  # no global seed is touched
    assert 0.8e6 < large.parameters < 1.4e6 and large.T == 1000 and large.sample_shape == (3, 16, 16)


def test_a_broken_checkpoint_is_one_line(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.ckpt"
    checkpoint.write_bytes(b"not a checkpoint")
    images = load_images("digits", size=8, channels=1, limit=16)
    with pytest.raises(ElijahError, match="delete it") as caught:
        train(images, Optimiser(2), seed=0, model=new_model((1, 8, 8), seed=0, channels=(8, 8)), checkpoint=checkpoint)
    assert "\n" not in str(caught.value)


def test_offset_noise_shifts_a_quarter_of_the_rows_channel_by_channel() -> None:
    plain = training_noise(torch.Size((4000, 3, 4, 4)), generator_for(1))
    shifted = training_noise(torch.Size((4000, 3, 4, 4)), generator_for(1), 0.5)
    shift = shifted - plain
    rows = shift.abs().amax((1, 2, 3)) > 0
    assert torch.equal(plain, torch.randn(4000, 3, 4, 4, generator=generator_for(1)))
    assert rows.float().mean() == pytest.approx(0.25, abs=0.03)
    assert (shift - shift.mean((2, 3), keepdim=True)).abs().max() < 1e-5  # one value a row and channel
    assert shift[rows].mean((2, 3)).std() == pytest.approx(0.5, rel=0.05)
    assert torch.corrcoef(shift[rows].mean((2, 3)).T)[0, 1].abs() < 0.1  # channels are independent
