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
    sigma_max: float | None = None,
) -> Model:
    """An untrained model: a U-Net with attention at the lowest resolution.

    sample_shape: (C, H, W), H = W; for kind ldm that of the latents, with their autoencoder. channels: one width a
    resolution; by default about 1.1 M parameters at 16 x 16 and 2.8 M at 32 x 32 and above. Noise schedules: DDPM's
    (1e-4 to 0.02, linear, 1000 steps), LDM's, and for ncsn 2000 sigmas from 0.01 to 380, or to sigma_max: the largest
    distance between two images will do (Song and Ermon 2020, technique 1). Networks that predict epsilon begin with the
    answer eps(x) = x (answer_input).
    """
    c, size, _ = sample_shape
    channels = channels or ((32, 64, 64) if size <= 16 else (32, 32, 64, 128))
    plain = len(channels) - 1
    if kind not in KINDS or (kind == "ldm") != (autoencoder is not None):
        raise ElijahError(f"unknown kind {kind!r}: use {', '.join(KINDS)}; ldm, and only ldm, needs an autoencoder")
    schedule = SCHEDULES[kind] | ({"sigma_max": sigma_max} if kind == "ncsn" and sigma_max else {})
    scheduler: Any = ScoreSdeVeScheduler(**schedule) if kind == "ncsn" else None
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
            norm_num_groups=4,
            attention_head_dim=8,
            time_embedding_type="fourier" if kind == "ncsn" else "positional",
        )
    if prediction == "epsilon":
        answer_input(network, exploding=kind == "ncsn")
    scheduler = scheduler or DDPMScheduler(prediction_type=prediction, **SCHEDULES[kind])
    return Model(network.eval(), scheduler, sample_shape, kind, autoencoder=autoencoder)


@torch.no_grad()
def answer_input(network: Any, *, exploding: bool) -> None:
    """Sets the first weights of a U-Net so that its answer is its input, and for exploding models the score -x / sigma.

    That is nearly right for most t, and the last thing that a narrow network learns by itself; deterministic samplers
    multiply what it lacks. It needs no layer of its own: the first skip
    connection carries x to the last block, whose shortcut makes a group of channels (x, -x, level, -level) for each
    channel of x, and silu(x) - silu(-x) = x. The constant level makes the group's norm depend little on x.
    """
    last, norm, out = network.up_blocks[-1].resnets[-1], network.conv_norm_out, network.conv_out
    c = network.config.in_channels
    width, size = network.config.block_out_channels[0], norm.num_channels // norm.num_groups
    if size < 2 or norm.num_groups < c:
        return
    level = 3.0 if size >= 4 and not exploding else 0.0
    below = last.conv_shortcut.in_channels - width  # the input's channels come after those from below
    network.conv_in.weight[:c] = 0
    network.conv_in.bias[:c] = 0
    out.weight.zero_()
    out.bias.zero_()
    last.conv2.weight.zero_()
    last.conv2.bias.zero_()
    for k in range(c):
        network.conv_in.weight[k, k, 1, 1] = 1
        x, group = k * size, slice(k * size, (k + 1) * size)
        last.conv_shortcut.weight[group] = 0
        last.conv_shortcut.bias[group] = 0
        for channel, sign in ((x, 1), (x + 1, -1)):
            last.conv_shortcut.weight[channel, below + k] = sign
            out.weight[k, channel, 1, 1] = -sign if exploding else sign
        if level:
            last.conv_shortcut.bias[x + 2], last.conv_shortcut.bias[x + 3] = level, -level
        norm.weight[group] = ((2 + 2 * level**2) / size) ** 0.5  # undoes the norm where x has unit variance


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
