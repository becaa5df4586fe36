"""One full scan of a pipeline with the exact configuration of google/ddpm-cifar10-32 (35.7 M parameters).

    python experiments/ddpm_cifar10_32.py

The weights are random (seeded): what is measured is that the size works and what it costs, not a verdict on that model.
Writes results/ddpm_cifar10_32/scan.json; the split of the time is in its cost.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from elijah.diffusion import Model
from elijah.scan import scan

ROOT = Path(__file__).resolve().parent.parent
FOLDER, RESULT = ROOT / "cache" / "ddpm-cifar10-32-random", ROOT / "results" / "ddpm_cifar10_32" / "scan.json"


def build() -> None:
    """The folder, in the layout that Model.save writes."""
    if FOLDER.is_dir():
        return
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        network = UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        )  # fmt: skip
    scheduler = DDPMScheduler(variance_type="fixed_large")
    Model(network, scheduler, (3, 32, 32)).save(FOLDER)


def main() -> int:
    build()
    report = scan(str(FOLDER), device="cpu", progress=lambda what, k, n: print(what, k, n, file=sys.stderr, flush=True))
    cost = report.cost
    result = {
        "parameters": report.model.parameters,
        "verdict": report.verdict,
        "scores": report.scores,
        "cost": cost.model_dump(),
        "share_outside_the_network": 1 - cost.network_seconds / cost.seconds,
        "seconds_per_1000_evaluations": 1000 * cost.seconds / cost.network_evaluations,
        "threads": torch.get_num_threads(),
        "load_average_at_the_end": os.getloadavg(),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
