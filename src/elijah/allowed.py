"""What a model folder may hold: allowed classes, the fields of their configurations with bounds, file names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers

MAX_JSON_BYTES = 10_000_000
MAX_FILES = 100_000  # in the folder, all levels
MAX_PARAMETERS = 5_000_000_000
MAX_TIMESTEPS = 100_000
MAX_NOTES = 20  # of one sort

PIPELINES = {  # and the kind of Model that each makes
    "DDPMPipeline": "ddpm",
    "DDIMPipeline": "ddpm",
    "PNDMPipeline": "ddpm",
    "ScoreSdeVePipeline": "ncsn",
    "LDMPipeline": "ldm",
}
NETWORKS: dict[str, Any] = {"UNet2DModel": diffusers.UNet2DModel}
AUTOENCODERS: dict[str, Any] = {"VQModel": diffusers.VQModel}
EXPLODING: dict[str, Any] = {"ScoreSdeVeScheduler": diffusers.ScoreSdeVeScheduler}  # with the fields of SIGMAS
SCHEDULERS: dict[str, Any] = {  # variance-preserving, discrete, all with the fields of SCHEDULE
    "DDPMScheduler": diffusers.DDPMScheduler,
    "DDIMScheduler": diffusers.DDIMScheduler,
    "PNDMScheduler": diffusers.PNDMScheduler,
    "DPMSolverMultistepScheduler": diffusers.DPMSolverMultistepScheduler,
    "DPMSolverSinglestepScheduler": diffusers.DPMSolverSinglestepScheduler,
    "UniPCMultistepScheduler": diffusers.UniPCMultistepScheduler,
    "DEISMultistepScheduler": diffusers.DEISMultistepScheduler,
    "HeunDiscreteScheduler": diffusers.HeunDiscreteScheduler,
}
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "latent_diffusion")  # of sound model_index.json entries
REASONS = {  # stock classes with a reason better than "not on the list"
    "LDMSuperResolutionPipeline": "conditioned on an image",
    "KarrasVePipeline": "a variance-exploding model",
    "KarrasVeScheduler": "a variance-exploding process",
    "EDMEulerScheduler": "an EDM process",
    "EDMDPMSolverMultistepScheduler": "an EDM process",
    "DiTPipeline": "class-conditional",
    "StableDiffusionPipeline": "text-conditioned",
    "StableDiffusionXLPipeline": "text-conditioned",
    "UNet2DConditionModel": "text-conditioned",
    "AutoencoderKL": "a variational autoencoder",
}
REMOTE_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

STEM = "diffusion_pytorch_model"
WEIGHTS = (  # in the order of stock diffusers: plain before half precision, an index before a single file
    f"{STEM}.safetensors.index.json",
    f"{STEM}.safetensors",
    f"{STEM}.safetensors.index.fp16.json",
    f"{STEM}.safetensors.fp16.index.json",
    f"{STEM}.fp16.safetensors",
)
HUB_FILES = [
    "model_index.json",
    "scheduler_config.json",
    "scheduler/scheduler_config.json",
    *(
        f"{part}{name}"
        for part in ("", "unet/", "model/", "vqvae/")
        for name in ("config.json", *WEIGHTS, f"{STEM}*-of-*.safetensors")
    ),
]
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
DTYPES = ("F16", "BF16", "F32", "F64")
OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")  # before diffusers 0.15
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
BUILD_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError)


class Check(NamedTuple):
    """What a configuration field must be, in words and as a test."""

    wants: str
    ok: Callable[[Any], bool]


def _integer(low: int, high: int) -> Check:
    return Check(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def _number(low: float, high: float) -> Check:
    return Check(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def _one_of(*names: str) -> Check:
    return Check(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def _several(item: Check, low: int, high: int) -> Check:
    count = str(low) if low == high else f"{low} to {high}"
    wants = f"a list of {count}, each {item.wants}"
    return Check(wants, lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(item.ok, v)))


def _either(*checks: Check) -> Check:
    return Check(" or ".join(c.wants for c in checks), lambda v: any(c.ok(v) for c in checks))


FLAG = Check("true or false", lambda v: type(v) is bool)
NULL = Check("null", lambda v: v is None)
MAX_SIDE = 1024
SIDE = _integer(2, MAX_SIDE)
ACTIVATION = _one_of("silu", "swish", "mish", "gelu", "relu")
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")

UNET: dict[str, Check] = {  # the fields of UNet2DModel; others are dropped, as diffusers does
    "sample_size": _either(SIDE, _several(SIDE, 2, 2)),
    "in_channels": _integer(1, 64),
    "out_channels": _integer(1, 128),
    "center_input_sample": FLAG,
    "time_embedding_type": _one_of("positional", "learned", "fourier"),
    "time_embedding_dim": _either(_integer(1, 65536), NULL),
    "freq_shift": _integer(0, 1),
    "flip_sin_to_cos": FLAG,
    "down_block_types": _several(_one_of(*DOWN), 1, 10),
    "mid_block_type": _either(_one_of("UNetMidBlock2D"), NULL),
    "up_block_types": _several(_one_of(*UP), 1, 10),
    "block_out_channels": _several(_integer(4, 4096), 1, 10),
    "layers_per_block": _integer(1, 16),
    "mid_block_scale_factor": _number(1e-3, 1e3),
    "downsample_padding": _integer(0, 1),
    "downsample_type": _one_of("conv", "resnet"),
    "upsample_type": _one_of("conv", "resnet"),
    "dropout": _number(0, 1),
    "act_fn": ACTIVATION,
    "attention_head_dim": _either(_integer(1, 4096), NULL),
    "norm_num_groups": _either(_integer(1, 4096), NULL),  # null with the blocks of NCSN++
    "attn_norm_num_groups": _either(_integer(1, 4096), NULL),
    "norm_eps": _number(1e-12, 1),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
    "add_attention": FLAG,
    "num_train_timesteps": _either(_integer(2, MAX_TIMESTEPS), NULL),
}
IMAGE_CHANNELS = Check("1 or 3", lambda v: type(v) is int and v in (1, 3))
VQ: dict[str, Check] = {  # the fields of VQModel
    "in_channels": IMAGE_CHANNELS,
    "out_channels": IMAGE_CHANNELS,
    "down_block_types": _several(_one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, 10),
    "up_block_types": _several(_one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, 10),
    "block_out_channels": _several(_integer(4, 4096), 1, 10),
    "layers_per_block": _integer(1, 16),
    "act_fn": ACTIVATION,
    "latent_channels": _integer(1, 64),
    "sample_size": _either(SIDE, _several(SIDE, 2, 2)),
    "num_vq_embeddings": _integer(2, 65536),
    "norm_num_groups": _integer(1, 4096),
    "vq_embed_dim": _either(_integer(1, 64), NULL),
    "scaling_factor": _number(1e-4, 1e4),
    "norm_type": _one_of("group", "spatial"),
    **dict.fromkeys(("mid_block_add_attention", "lookup_from_codebook", "force_upcast"), FLAG),
}
SCHEDULE: dict[str, Check] = {  # what a(t), s(t) and the meaning of the output depend on
    "num_train_timesteps": _integer(2, MAX_TIMESTEPS),
    "beta_start": _number(0, 1),
    "beta_end": _number(0, 1),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
    "trained_betas": _either(_several(_number(0, 1), 2, MAX_TIMESTEPS), NULL),
    "prediction_type": _one_of("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": FLAG,
}
SIGMAS: dict[str, Check] = {  # the fields of ScoreSdeVeScheduler
    "num_train_timesteps": _integer(2, MAX_TIMESTEPS),
    "snr": _number(1e-6, 1),
    "sigma_min": _number(1e-6, 1e5),
    "sigma_max": _number(1e-6, 1e5),
    "sampling_eps": _number(1e-9, 0.5),
    "correct_steps": _integer(0, 100),
}
SAMPLER: dict[str, Check] = {  # how the folder's own scheduler steps; kept, so that a cleaned copy samples alike
    "variance_type": _either(_one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), NULL),
    "timestep_spacing": _one_of("linspace", "leading", "trailing"),
    "steps_offset": _integer(0, 1000),
    "dynamic_thresholding_ratio": _number(0, 1),
    "clip_sample_range": _number(0, 1e6),
    "sample_max_value": _number(0, 1e6),
    "solver_order": _integer(1, 3),
    "solver_type": _one_of("midpoint", "heun", "bh1", "bh2", "logrho"),
    "algorithm_type": _one_of("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "lambda_min_clipped": _number(float("-inf"), 0),
    "disable_corrector": _several(_integer(0, 1000), 0, 1000),
    **dict.fromkeys(("clip_sample", "thresholding", "set_alpha_to_one", "skip_prk_steps", "lower_order_final"), FLAG),
    **dict.fromkeys(("euler_at_final", "predict_x0", "use_karras_sigmas", "use_exponential_sigmas"), FLAG),
    **dict.fromkeys(("use_beta_sigmas", "use_lu_lambdas"), FLAG),
}
