"""Any diffusion pipeline as one process: x_t = a(t) x0 + s(t) e.

Notation, used in the whole package:

    B C H W    batch, channels, height, width; images are float32, NCHW
    T          number of training timesteps; t is an integer, 0 ... T-1
    x0         a clean image in the model's own range: [-1, 1] for DDPM, [0, 1] for NCSN, latents for LDM
    e          standard normal noise
    a, s       signal and noise scale, [T]; a^2 + s^2 = 1 for variance-preserving models (DDPM, LDM); a = 1 and s the
               sigmas, rising, for variance-exploding ones (NCSN)
    eps(x, t)  the network's estimate of e, whatever it was trained to predict
    r, y       a trigger and its target, in the range of x0
    evaluation one forward of the network on one sample; its backward counts two more

Only this file, bases.py, samplers.py, training.py, loading.py and its allowed.py, weights.py and folder.py know
diffusers or the hub.
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
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, ScoreSdeVePipeline
from torch import Tensor

from elijah.errors import OutOfBudget
from elijah.samplers import correct, evenly, make_scheduler

Progress = Callable[[str, int, int], None]  # (what, done, of)


def no_progress(what: str, done: int, of: int) -> None:
    """The progress callback that shows nothing."""


MAX_VALUES = 2**22  # of input in a network call: 5,461 RGB samples at 16 x 16, 21 at 256 x 256


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
    kind: ddpm, ncsn or ldm; for ldm, autoencoder is the VQModel between pixels and x. All randomness comes from
    generators that the caller passes in; results do not depend on the batch size.
    """

    network: torch.nn.Module
    scheduler: Any
    sample_shape: tuple[int, int, int]  # C, H, W of x
    kind: str = "ddpm"
    provenance: Provenance = field(default_factory=lambda: Provenance("memory"))
    dtype: torch.dtype = torch.float32
    autoencoder: Any = None
    meter: Meter = field(default_factory=Meter)
    max_batch: int | None = None  # samples a network call, to bound memory; None: MAX_VALUES of input
    updates: int = 0  # optimiser updates that made this model from its clone()'s original

    def __post_init__(self) -> None:
        if self.exploding:
            self.s = self.scheduler.discrete_sigmas.to(self.device, torch.float32)  # [T]
            self.a = torch.ones_like(self.s)  # [T]
            self.prediction = "epsilon"
            return
        abar = self.scheduler.alphas_cumprod.to(self.device, torch.float64)
        self.a = abar.sqrt().float()
        self.s = (1 - abar).sqrt().float()
        previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        self.alpha = (abar / previous).float()  # [T], one step's alpha_t = 1 - beta_t; of preserving models alone
        self.prediction = str(self.scheduler.config.get("prediction_type", "epsilon"))

    @property
    def exploding(self) -> bool:
        """Whether the process is variance-exploding: a = 1, s without bound."""
        return self.kind == "ncsn"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, which for latent models is not the sample_shape."""
        if self.autoencoder is None:
            return self.sample_shape
        _, h, w = self.sample_shape
        factor = 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        return self.autoencoder.config.out_channels, h * factor, w * factor

    @property
    def quick_sampler(self) -> str:
        """A sampler that is good enough to look at images with.

        A network that normalises away how large its input is, as NCSN's do, cannot correct the noise that coarse steps
        of the predictor add: below some 420 steps (at snr 0.075) it grows without bound.
        """
        return "pc-500" if self.exploding else "ddim-20"

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
        """What the network answers to x [B, C, H, W] at timesteps t [B]; counted, timed, in self.dtype.

        Its raw output, eps or v; for NCSN, whose network takes sigma for t and gives the score, eps = -sigma score.
        """
        if self.exploding:
            return -column(self.s, t) * self._forward(x, self.s[t])
        return self._forward(x, t)

    def _forward(self, x: Tensor, t: Tensor) -> Tensor:
        with_backward = torch.is_grad_enabled() and (x.requires_grad or _trains(self.network))
        self.meter.charge(len(x) * (3 if with_backward else 1))
        start = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            rows = self.max_batch or max(1, MAX_VALUES // x[0].numel())
            parts = zip(x.split(rows), t.split(rows), strict=True)
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

        start: noise of variance 1, with or without a trigger; the sampler scales it. sampler: NAME-STEPS as in
        samplers.py. seed: noise of sample i comes from (seed, i) alone, whatever the batch size.
        """
        (done,) = self.sample_alike([start], sampler, seed=seed, batch_size=batch_size, progress=progress)
        return done

    def sample_alike(
        self,
        starts: list[Tensor],
        sampler: str = "ddim-20",
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress = no_progress,
    ) -> list[Tensor]:
        """sample of each of starts, side by side: the i-th samples of all get the same noise, from (seed, i)."""
        start = torch.cat(starts)
        seeds = [hash_seed(seed, i) for part in starts for i in range(len(part))]
        done = [
            self._sample(chunk, sampler, [_seeded(s) for s in seeds[k : k + batch_size]], progress)
            for k, chunk in zip(range(0, len(start), batch_size), start.split(batch_size), strict=True)
        ]
        return list(torch.cat(done).split([len(part) for part in starts]))

    def _sample(self, x: Tensor, sampler: str, generators: list[torch.Generator], progress: Progress) -> Tensor:
        scheduler = make_scheduler(self.scheduler, sampler)
        x = x * scheduler.init_noise_sigma
        if self.exploding:
            return self._predict_and_correct(x, scheduler, generators, progress)
        extra = {"generator": generators} if isinstance(scheduler, DDPMScheduler) else {}
        for i, t in enumerate(scheduler.timesteps):
            out = self._forward(scheduler.scale_model_input(x, t), t.expand(len(x)).to(x.device))
            x = scheduler.step(out, t, x, **extra).prev_sample
            progress(f"sampling {sampler}", i + 1, len(scheduler.timesteps))
        return x

    def ddim(self, x: Tensor, steps: int) -> Tensor:
        """DDIM (eta 0) in "trailing" spacing from start noise x [B, C, H, W] to x0, with gradients; preserving models.

        sample(x, "ddim-STEPS") is the same without gradients.
        """
        for now, then in evenly(self.T, steps):
            eps = self.eps(x, torch.full((len(x),), now, device=x.device))
            x0 = (x - self.s[now] * eps) / self.a[now]
            x = x0 if then < 0 else self.a[then] * x0 + self.s[then] * eps
        return x

    def _predict_and_correct(
        self, x: Tensor, scheduler: Any, generators: list[torch.Generator], progress: Progress
    ) -> Tensor:
        """Song et al. 2021, algorithm 2, as ScoreSdeVePipeline runs it; the last mean is returned, without noise."""
        mean = x
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i].expand(len(x)).to(x.device)
            for _ in range(scheduler.config.correct_steps):
                x = correct(scheduler, self._forward(x, sigma), x, generators)
            step = scheduler.step_pred(self._forward(x, sigma), t, x, generator=generators)
            x, mean = step.prev_sample, step.prev_sample_mean
            progress("sampling pc", i + 1, len(scheduler.timesteps))
        return mean

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] in the model's own range: [0, 1] for NCSN, latents [B, c, h, w] for LDM."""
        if self.autoencoder is not None:
            parts = [self.autoencoder.encode(x).latents for x in images.to(self.device).split(32)]
            return torch.cat(parts) * self.autoencoder.config.scaling_factor
        return images / 2 + 0.5 if self.exploding else images

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Samples x [B, ...] as images [B, C, H, W] in [-1, 1], not clipped: what encode undoes."""
        if self.autoencoder is not None:
            parts = [self.autoencoder.decode(z / self.autoencoder.config.scaling_factor).sample for z in x.split(32)]
            return torch.cat(parts)
        return x * 2 - 1 if self.exploding else x

    def pixels(self, x: Tensor) -> Tensor:
        """Samples x [B, ...] as images [B, C, H, W] on [0, 1]."""
        return (self.decode(x) / 2 + 0.5).clamp(0, 1)

    def prepare(self, images: Tensor) -> Tensor:
        """Training images uint8 [N, C, H, W] as what data.batch draws rows of x0 from, in the model's own range."""
        if self.kind == "ddpm":
            return images
        return torch.cat([self.encode(x.float() / 127.5 - 1).cpu() for x in images.split(256)])

    def clone(self) -> Model:
        """A copy with weights and a meter of its own, in training mode off and gradients on."""
        network = thaw(copy.deepcopy(self.network))
        return Model(
            network, self.scheduler, self.sample_shape, self.kind, self.provenance, self.dtype, self.autoencoder
        )

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
        parts: dict[str, Any] = {"unet": network, "scheduler": self.scheduler}
        if self.kind == "ldm":
            parts["vqvae"] = copy.deepcopy(self.autoencoder).half() if half else self.autoencoder
        vp: Any = DDIMPipeline if isinstance(self.scheduler, DDIMScheduler) else DDPMPipeline
        pipeline: Any = {"ddpm": vp, "ncsn": ScoreSdeVePipeline, "ldm": LDMPipeline}[self.kind]
        pipeline(**parts).save_pretrained(directory, safe_serialization=True)


def thaw(network: torch.nn.Module) -> torch.nn.Module:
    """network with gradients on for all that is trained: not for the fixed frequencies of a Fourier embedding."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.endswith("time_proj.weight"))
    return network


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
