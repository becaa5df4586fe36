"""Any diffusion pipeline as one process: x_t = a(t) x0 + s(t) e.

Notation, used in the whole package:

    B C H W    batch, channels, height, width; images are float32, NCHW
    T          number of training timesteps; t is an integer, 0 ... T-1
    x0         a clean image in the model's own range, [-1, 1] for DDPM
    e          standard normal noise
    a, s       signal and noise scale, [T]; a^2 + s^2 = 1 for variance-preserving models
    eps(x, t)  the network's estimate of e, whatever it was trained to predict
    r, y       a trigger and its target, in the range of x0
    evaluation one forward of the network on one sample; its backward counts two more

Only this file, training.py, loading.py and its allowed.py and folder.py know diffusers or the hub.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from elijah.errors import ElijahError, OutOfBudget

Progress = Callable[[str, int, int], None]  # (what, done, of)

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_small"}),
    "ddim": (DDIMScheduler, {}),
}


def no_progress(what: str, done: int, of: int) -> None:
    """The progress callback that shows nothing."""


@dataclass
class Meter:
    """Counts what a search costs and stops it at a limit.

    evaluations: network evaluations so far; network_seconds: time inside the network, forward and backward.
    """

    evaluations: int = 0
    network_seconds: float = 0.0
    max_evaluations: int | None = None
    deadline: float | None = None  # time.monotonic() value

    def charge(self, evaluations: int) -> None:
        """Raises OutOfBudget when these evaluations would pass a limit, else counts them."""
        if self.max_evaluations is not None and self.evaluations + evaluations > self.max_evaluations:
            raise OutOfBudget(f"stopped at the limit of {self.max_evaluations} network evaluations")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfBudget("stopped at the time limit")
        self.evaluations += evaluations


@dataclass(frozen=True)
class Provenance:
    """Where a model came from: source as the user named it, hub revision, files read with their SHA-256."""

    source: str
    revision: str | None = None
    files: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know, such as a pickle that was left unopened


@dataclass
class Model:
    """An unconditional pipeline behind one interface.

    network maps (x [B, C, H, W], t [B]) to a tensor like x. scheduler is the folder's own diffusers scheduler.
    All randomness comes from generators that the caller passes in; results do not depend on the batch size.
    """

    network: torch.nn.Module
    scheduler: Any
    sample_shape: tuple[int, int, int]  # C, H, W
    kind: str = "ddpm"
    provenance: Provenance = field(default_factory=lambda: Provenance("memory"))
    dtype: torch.dtype = torch.float32
    meter: Meter = field(default_factory=Meter)
    max_batch: int | None = None  # samples a network call, to bound memory
    updates: int = 0  # optimiser updates that made this model from its clone()'s original

    def __post_init__(self) -> None:
        abar = self.scheduler.alphas_cumprod.to(self.device, torch.float64)
        self.a = abar.sqrt().float()  # [T]
        self.s = (1 - abar).sqrt().float()  # [T]
        previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        self.alpha = (abar / previous).float()  # [T], one step's alpha_t = 1 - beta_t
        self.prediction = str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def T(self) -> int:
        return len(self.a)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's raw output for x [B, C, H, W] at timesteps t [B]; counted, timed, in self.dtype."""
        with_backward = torch.is_grad_enabled() and (x.requires_grad or _trains(self.network))
        self.meter.charge(len(x) * (3 if with_backward else 1))
        start = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            parts = zip(x.split(self.max_batch or len(x)), t.split(self.max_batch or len(t)), strict=True)
            out = torch.cat([self.network(p, q, return_dict=False)[0].float() for p, q in parts])
        self.meter.network_seconds += time.perf_counter() - start
        if x.requires_grad and out.requires_grad:
            self._time_backward(x, out)
        return out

    def _time_backward(self, x: Tensor, out: Tensor) -> None:
        began = [0.0]

        def begin(_: Tensor) -> None:
            began[0] = time.perf_counter()

        def end(_: Tensor) -> None:
            self.meter.network_seconds += time.perf_counter() - began[0]

        out.register_hook(begin)
        x.register_hook(end)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise in x [B, C, H, W] at t [B]. v-prediction: eps = a v + s x (Salimans and Ho 2022, appendix D)."""
        out = self.output(x, t)
        if self.prediction == "v_prediction":
            return column(self.a, t) * out + column(self.s, t) * x
        return out

    def regression_target(self, x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to output for x_t = a x0 + s e: e, or v = a e - s x0."""
        if self.prediction == "v_prediction":
            return column(self.a, t) * e - column(self.s, t) * x0
        return e

    def diffuse(self, x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """x_t = a x0 + s e, [B, C, H, W]."""
        return column(self.a, t) * x0 + column(self.s, t) * e

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """n start noises [n, C, H, W], each from a seed of its own, so that a prefix does not depend on n."""
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        return torch.stack([torch.randn(self.sample_shape, generator=_seeded(k)) for k in seeds]).to(self.device)

    @torch.no_grad()
    def sample(
        self,
        start: Tensor,
        sampler: str = "ddim-20",
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress = no_progress,
    ) -> Tensor:
        """Runs a stock sampler from start [B, C, H, W] and returns x0 [B, C, H, W], not clipped.

        sampler: NAME-STEPS with a name from SAMPLERS; spacing "trailing", so that the first step is at T-1;
        clip_sample off. seed: noise of sample i comes from (seed, i) alone, whatever the batch size.
        """
        done = [
            self._sample(chunk, sampler, [_seeded(hash_seed(seed, k + i)) for i in range(len(chunk))], progress)
            for k, chunk in zip(range(0, len(start), batch_size), start.split(batch_size), strict=True)
        ]
        return torch.cat(done)

    def _sample(self, x: Tensor, sampler: str, generators: list[torch.Generator], progress: Progress) -> Tensor:
        scheduler = self.make_scheduler(sampler)
        x = x * scheduler.init_noise_sigma
        extra = {"generator": generators} if isinstance(scheduler, DDPMScheduler) else {}
        for i, t in enumerate(scheduler.timesteps):
            out = self.output(scheduler.scale_model_input(x, t), t.expand(len(x)).to(x.device))
            x = scheduler.step(out, t, x, **extra).prev_sample
            progress(f"sampling {sampler}", i + 1, len(scheduler.timesteps))
        return x

    def make_scheduler(self, sampler: str) -> Any:
        """The stock scheduler called NAME-STEPS on this model's own noise schedule, ready to step."""
        name, _, steps = sampler.partition("-")
        if name not in SAMPLERS or not steps.isdigit() or not 1 <= int(steps) <= self.T:
            raise ElijahError(f"unknown sampler {sampler!r}: use NAME-STEPS with a name of {', '.join(SAMPLERS)}")
        scheduler_class, settings = SAMPLERS[name]
        settings = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing", **settings}
        scheduler = scheduler_class.from_config(dict(self.scheduler.config), **settings)
        scheduler.set_timesteps(int(steps))
        return scheduler

    def pixels(self, x: Tensor) -> Tensor:
        """Samples [B, C, H, W] as images on [0, 1]."""
        return (x / 2 + 0.5).clamp(0, 1)

    def clone(self) -> Model:
        """A copy with weights and a meter of its own, in training mode off and gradients on."""
        network = copy.deepcopy(self.network).requires_grad_(True)
        return Model(network, self.scheduler, self.sample_shape, self.kind, self.provenance, self.dtype)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the network's weights take no gradients (gradients for its input still flow)."""
        before = [p.requires_grad for p in self.network.parameters()]
        self.network.requires_grad_(False)
        try:
            yield
        finally:
            for p, keep in zip(self.network.parameters(), before, strict=True):
                p.requires_grad_(keep)

    def save(self, directory: Path, *, half: bool = False) -> None:
        """Writes a pipeline folder that stock DiffusionPipeline.from_pretrained loads; half: weights as float16."""
        network: Any = copy.deepcopy(self.network).half() if half else self.network
        pipeline_class: Any = DDIMPipeline if isinstance(self.scheduler, DDIMScheduler) else DDPMPipeline
        pipeline_class(unet=network, scheduler=self.scheduler).save_pretrained(directory, safe_serialization=True)


def column(values: Tensor, t: Tensor) -> Tensor:
    """values [T] at t [B], shaped [B, 1, 1, 1] to multiply images."""
    return values[t][:, None, None, None]


def hash_seed(seed: int, index: int) -> int:
    """One seed for item index of stream seed (splitmix64, so that nearby pairs give unrelated seeds)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def generator_for(seed: int, index: int = 0) -> torch.Generator:
    """A CPU generator for item index of stream seed."""
    return _seeded(hash_seed(seed, index))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _trains(network: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in network.parameters())
