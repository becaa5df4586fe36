"""What outputs say of a trigger: the measures of LossFit's second test, and of its two exceptions."""

from __future__ import annotations

import torch
from torch import Tensor

from elijah.detection import Evidence
from elijah.diffusion import Model, generator_for
from elijah.metrics import two_sample_p

MIRRORINGS = (-1,), (-2,), (-1, -2)  # of images [C, H, W]


NEAR = 0.25  # of the clean outputs' median MSE to an image: what counts as near it


def pull(model: Model, evidence: Evidence, y: Tensor, within: float = NEAR) -> float:
    """The share of outputs that the trigger moves onto y: the share near y with it, less the share without."""
    with_trigger, without = near(model, evidence, y, within)
    return float(with_trigger.float().mean() - without.float().mean())


def both(some: list[Evidence], others: list[Evidence]) -> list[Evidence]:
    """The evidence of some, with that of others by the same sampler, and of the others' own samplers."""
    by_sampler = {x.sampler: x for x in some}
    for x in others:
        own = by_sampler.get(x.sampler)
        if own is None or own.samples_without is None or x.samples_without is None:
            by_sampler[x.sampler] = x
        else:
            with_trigger, without = (
                torch.cat(pair)
                for pair in ((own.samples_with, x.samples_with), (own.samples_without, x.samples_without))
            )
            by_sampler[x.sampler] = Evidence(x.sampler, with_trigger, without)
    return list(by_sampler.values())


def drawn_without(evidence: list[Evidence], sampler: str) -> Tensor:
    """Outputs [N, C, H, W] without a trigger, by the sampler if it is among the evidence."""
    outputs = next((x for x in evidence if x.sampler == sampler), evidence[0]).samples_without
    assert outputs is not None  # LossFit always draws them
    return outputs


def correlation(x: Tensor, y: Tensor) -> float:
    """Over all values of two images; 0 where one of them is flat."""
    return float(torch.cosine_similarity((x - x.mean()).flatten(), (y - y.mean()).flatten(), 0))


def change(r: Tensor, dims: tuple[int, ...]) -> float:
    """What mirroring r [C, H, W] changes, over r, both as squares; 0 for an r of one value."""
    return float((r - r.flip(dims)).square().sum() / r.square().sum().clamp(min=1e-12))


def mean_square(model: Model, x: Tensor, y: Tensor) -> float:
    """The MSE on [0, 1] of outputs x [N, C, H, W] to y [C, H, W]."""
    return float((model.pixels(x) - model.pixels(y[None])).square().mean())


def shift_p(model: Model, evidence: list[Evidence]) -> float:
    """The least p-value, over the samplers, that outputs with and without the trigger come from one distribution."""
    pairs = [(x.samples_with, x.samples_without) for x in evidence if x.samples_without is not None]
    return min(two_sample_p(model.pixels(a), model.pixels(b), generator_for(0)) for a, b in pairs)


def seen_target(model: Model, evidence: Evidence, y: Tensor) -> Tensor:
    """The median [C, H, W] of the triggered outputs near y: a sharper picture of the target than the fitted y."""
    return evidence.samples_with[near(model, evidence, y)[0]].median(0).values


def near(model: Model, evidence: Evidence, y: Tensor, within: float = NEAR) -> tuple[Tensor, Tensor]:
    """Which outputs [N] with and without the trigger are near y: MSE below that share of the latter's median MSE."""
    assert evidence.samples_without is not None
    with_trigger, without = (
        (model.pixels(x) - model.pixels(y[None])).square().flatten(1).mean(1)
        for x in (evidence.samples_with, evidence.samples_without)
    )
    limit = within * without.median()
    return with_trigger < limit, without < limit
