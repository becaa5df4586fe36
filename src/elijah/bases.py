"""Untrained models of each kind, small enough for one CPU core, and the training of the latent kind's autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel, VQModel
from torch import Tensor

from elijah.data import batch
from elijah.diffusion import Model, Progress, generator_for, no_progress
from elijah.errors import ElijahError

KINDS = ("ddpm", "ncsn", "ldm")
SCHEDULES: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},  # Ho et al. 2020
    "ldm": {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"},  # Rombach et al. 2022
    "ncsn": {"snr": 0.075, "sigma_min": 0.01, "sigma_max": 380.0, "correct_steps": 1},  # VillanDiffusion's NCSN
}


def new_model(
    sample_shape: tuple[int, int, int],
    *,
    seed: int,
    channels: tuple[int, ...] | None = None,
    prediction: str = "epsilon",
    kind: str = "ddpm",
    autoencoder: Any = None,
) -> Model:
    """An untrained model: a U-Net with attention at the lowest resolution.

    sample_shape: (C, H, W), H = W; for kind ldm that of the latents, with their autoencoder. channels: one width a
    resolution; by default about 1.1 M parameters at 16 x 16 and 2.8 M at 32 x 32 and above. Noise schedules: DDPM's
    (1e-4 to 0.02, linear, 1000 steps), LDM's, and for ncsn 2000 sigmas from 0.01 to 380.
    """
    c, size, _ = sample_shape
    channels = channels or ((32, 64, 64) if size <= 16 else (32, 32, 64, 128))
    plain = len(channels) - 1
    if kind not in KINDS or (kind == "ldm") != (autoencoder is not None):
        raise ElijahError(f"unknown kind {kind!r}: use {', '.join(KINDS)}; ldm, and only ldm, needs an autoencoder")
    scheduler: Any = ScoreSdeVeScheduler(**SCHEDULES[kind]) if kind == "ncsn" else None
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network: Any = UNet2DModel(
            sample_size=size,
            in_channels=c,
            out_channels=c,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            norm_num_groups=8,
            attention_head_dim=8,
            time_embedding_type="fourier" if kind == "ncsn" else "positional",
        )
    scheduler = scheduler or DDPMScheduler(prediction_type=prediction, **SCHEDULES[kind])
    return Model(network.eval(), scheduler, sample_shape, kind, autoencoder=autoencoder)


def train_autoencoder(
    images: Tensor,
    *,
    steps: int,
    seed: int,
    channels: tuple[int, ...] = (16, 32, 32),
    batch_size: int = 16,
    lr: float = 1e-3,
    progress: Progress = no_progress,
) -> Any:
    """A VQModel on images uint8 [N, C, H, W], whose latents are [3, H / f, W / f], f = 2^(len(channels) - 1).

    Loss: squared error of the reconstruction and the codebook's own. scaling_factor makes latents of unit deviation.
    """
    c = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network: Any = VQModel(
            in_channels=c,
            out_channels=c,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            latent_channels=3,
            num_vq_embeddings=512,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
    with torch.no_grad():  # codes as wide as latents are at the start: with diffusers' 1 / 512 most would never be used
        network.quantize.embedding.weight.normal_(generator=generator_for(seed, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 3 * (1 - k / steps))
        x = batch(images, batch_size, generator_for(seed, 2 + k), flip=True)
        out = network(x)
        loss = (out.sample - x).square().mean() + out.commit_loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        progress(f"training the autoencoder, loss {loss.item():.4f}", k + 1, steps)
    network.eval().requires_grad_(False)
    with torch.no_grad():
        z = network.encode(batch(images, 256, generator_for(seed, 1))).latents
    network.register_to_config(scaling_factor=float(1 / z.std()))
    return network
