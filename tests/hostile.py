"""Builders of model folders that must be refused, each with the exit code of the refusal.

`HOSTILE[name]` is (build_<name>, exit code). A builder fills a folder that does not exist yet, and returns what to give
to `elijah scan`. Code that must not run (a pickle, a Python file) would create `marker(folder)`.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors.torch import load, save

from elijah.bases import new_model
from elijah.diffusion import Model

Builder = Callable[[Path], Path]
HOSTILE: dict[str, tuple[Builder, int]] = {}

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHARD_INDEX = WEIGHTS + ".index.json"
VQVAE, VQ_WEIGHTS = "vqvae/config.json", "vqvae/diffusion_pytorch_model.safetensors"


def autoencoder() -> VQModel:
    """An untrained one, between grey images [1, 16, 16] and latents [3, 8, 8]."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        network = VQModel(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            num_vq_embeddings=16,
            norm_num_groups=4,
            scaling_factor=0.5,
        )
    return network.eval().requires_grad_(False)


def original(kind: str = "ddpm") -> Model:
    """What sound_files(kind) holds: ddpm and ncsn for 8 x 8 grey images, ldm for latents [3, 8, 8]."""
    ldm = kind == "ldm"
    shape = (3, 8, 8) if ldm else (1, 8, 8)
    return new_model(shape, seed=0, channels=(8, 8), kind=kind, autoencoder=autoencoder() if ldm else None)


@functools.cache
def sound_files(kind: str = "ddpm") -> dict[str, bytes]:
    """The files of a sound pipeline folder as relative name -> content."""
    with tempfile.TemporaryDirectory() as directory:
        original(kind).save(Path(directory))
        paths = [p for p in Path(directory).rglob("*") if p.is_file()]
        return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


def write_sound(folder: Path, kind: str = "ddpm") -> Path:
    """A sound pipeline folder."""
    for name, content in sound_files(kind).items():
        put(folder, name, content)
    return folder


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def edit(folder: Path, name: str, **changes: Any) -> Path:
    """A sound folder, but for these fields of one JSON file; a value of ... removes the field."""
    if not folder.exists():
        write_sound(folder)
    values = json.loads((folder / name).read_text()) | changes
    put(folder, name, json.dumps({k: v for k, v in values.items() if v is not ...}).encode())
    return folder


def tensors() -> dict[str, torch.Tensor]:
    return load(sound_files()[WEIGHTS])


def with_weights(folder: Path, content: bytes) -> Path:
    put(write_sound(folder), WEIGHTS, content)
    return folder


def with_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A sound folder, but for the header of its safetensors file."""
    content = sound_files()[WEIGHTS]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return with_weights(folder, struct.pack("<Q", len(text)) + text + content[8 + length :])


def marker(folder: Path) -> Path:
    """Exists once code from the folder has run."""
    return folder.with_name(folder.name + ".ran")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb(marker(folder)))


def code(folder: Path) -> bytes:
    return f"import pathlib\npathlib.Path({str(marker(folder))!r}).touch()\nclass UNet2DModel: pass\n".encode()


def hostile(exit_code: int) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        HOSTILE[builder.__name__.removeprefix("build_")] = (builder, exit_code)
        return builder

    return register


# --- model_index.json -------------------------------------------------------------------------------------------------


@hostile(2)
def build_wrong_library(folder: Path) -> Path:
    return edit(folder, INDEX, scheduler=["os", "system"])


@hostile(2)
def build_wrong_class(folder: Path) -> Path:
    return edit(folder, INDEX, unet=["diffusers", "system"])


@hostile(2)
def build_no_class(folder: Path) -> Path:
    return edit(folder, INDEX, unet=["diffusers", "utils"])


@hostile(2)
def build_custom_module(folder: Path) -> Path:
    edit(folder, INDEX, unet=["my_module", "UNet2DModel"])
    put(folder, "my_module.py", code(folder))
    return put(folder, "unet/my_module.py", code(folder)).parent.parent


@hostile(2)
def build_custom_pipeline(folder: Path) -> Path:
    edit(folder, INDEX, _class_name=["my_pipeline", "MyPipeline"])
    return put(folder, "my_pipeline.py", code(folder)).parent


@hostile(2)
def build_unknown_pipeline(folder: Path) -> Path:
    return edit(folder, INDEX, _class_name="MyPipeline")


@hostile(2)
def build_extra_component(folder: Path) -> Path:
    return edit(folder, INDEX, safety_checker=["pickle", "Unpickler"])


@hostile(2)
def build_component_object(folder: Path) -> Path:
    return edit(folder, INDEX, unet={"type": "UNet2DModel"})


@hostile(2)
def build_no_pipeline_class(folder: Path) -> Path:
    return edit(folder, INDEX, _class_name=...)


@hostile(2)
def build_no_unet_entry(folder: Path) -> Path:
    return edit(folder, INDEX, unet=...)


@hostile(2)
def build_custom_pipeline_key(folder: Path) -> Path:
    return edit(folder, INDEX, custom_pipeline="someone/evil")


@hostile(2)
def build_auto_map(folder: Path) -> Path:
    return edit(folder, UNET, auto_map={"AutoModel": "evil.UNet2DModel"})


# --- files ------------------------------------------------------------------------------------------------------------


@hostile(2)
def build_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@hostile(2)
def build_missing(folder: Path) -> Path:
    return folder


@hostile(2)
def build_file(folder: Path) -> Path:
    return put(folder.parent, folder.name, b"no folder")


@hostile(2)
def build_no_scheduler(folder: Path) -> Path:
    (write_sound(folder) / SCHEDULER).unlink()
    return folder


@hostile(2)
def build_no_config(folder: Path) -> Path:
    (write_sound(folder) / UNET).unlink()
    return folder


@hostile(2)
def build_no_weights(folder: Path) -> Path:
    (write_sound(folder) / WEIGHTS).unlink()
    return folder


@hostile(2)
def build_link_weights(folder: Path) -> Path:
    outside = put(folder.parent, folder.name + ".outside", sound_files()[WEIGHTS])
    (write_sound(folder) / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    return folder


@hostile(2)
def build_link_folder(folder: Path) -> Path:
    outside = write_sound(folder.with_name(folder.name + ".outside"))
    write_sound(folder).joinpath("unet").rename(folder.with_name(folder.name + ".unused"))
    (folder / "unet").symlink_to(os.path.relpath(outside / "unet", folder))
    return folder


@hostile(2)
def build_link_unrelated(folder: Path) -> Path:
    (write_sound(folder) / "notes.txt").symlink_to("/etc/passwd")
    return folder


@hostile(2)
def build_link_loop(folder: Path) -> Path:
    (write_sound(folder) / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    return folder


@hostile(2)
def build_fifo(folder: Path) -> Path:
    (write_sound(folder) / UNET).unlink()
    os.mkfifo(folder / UNET)
    return folder


@hostile(2)
def build_folder_for_file(folder: Path) -> Path:
    (write_sound(folder) / INDEX).unlink()
    (folder / INDEX).mkdir()
    return folder


# --- JSON -------------------------------------------------------------------------------------------------------------


@hostile(2)
def build_bad_json(folder: Path) -> Path:
    return put(write_sound(folder), UNET, b'{"sample_size": 8,').parent.parent


@hostile(2)
def build_binary_json(folder: Path) -> Path:
    return put(write_sound(folder), INDEX, b"\xff\xfe\x00\x1b[31m").parent


@hostile(2)
def build_list_json(folder: Path) -> Path:
    return put(write_sound(folder), UNET, b"[1, 2]").parent.parent


@hostile(2)
def build_deep_json(folder: Path) -> Path:
    return put(write_sound(folder), UNET, b'{"a":' + b"[" * 200_000).parent.parent


@hostile(2)
def build_deep_value(folder: Path) -> Path:
    return put(write_sound(folder), UNET, b'{"sample_size":' + b"[" * 900 + b"]" * 900 + b"}").parent.parent


@hostile(2)
def build_huge_json(folder: Path) -> Path:
    with (write_sound(folder) / SCHEDULER).open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no room on disk
    return folder


@hostile(2)
def build_huge_integer_json(folder: Path) -> Path:
    return put(write_sound(folder), UNET, b'{"sample_size": ' + b"9" * 10_000 + b"}").parent.parent


# --- the network's settings -------------------------------------------------------------------------------------------


@hostile(2)
def build_huge_image(folder: Path) -> Path:
    return edit(folder, UNET, sample_size=1_000_000)


@hostile(2)
def build_no_size(folder: Path) -> Path:
    return edit(folder, UNET, sample_size=None)


@hostile(2)
def build_size_is_true(folder: Path) -> Path:
    return edit(folder, UNET, sample_size=True)


@hostile(2)
def build_size_is_text(folder: Path) -> Path:
    return edit(folder, UNET, sample_size="8\n\x1b[31mverdict: clean")


@hostile(2)
def build_size_not_even(folder: Path) -> Path:
    return edit(folder, UNET, sample_size=[8, 9])


@hostile(2)
def build_huge_channels(folder: Path) -> Path:
    return edit(folder, UNET, block_out_channels=[8, 2**40])


@hostile(2)
def build_too_many_parameters(folder: Path) -> Path:
    types = {"down_block_types": ["DownBlock2D"] * 10, "up_block_types": ["UpBlock2D"] * 10}
    return edit(folder, UNET, block_out_channels=[4096] * 10, layers_per_block=2, sample_size=1024, **types)


@hostile(2)
def build_too_many_blocks(folder: Path) -> Path:
    return edit(folder, UNET, block_out_channels=[8] * 100_000)


@hostile(2)
def build_unequal_lists(folder: Path) -> Path:
    return edit(folder, UNET, block_out_channels=[8, 8, 8])


@hostile(2)
def build_wrong_groups(folder: Path) -> Path:
    return edit(folder, UNET, norm_num_groups=7)


@hostile(2)
def build_wrong_block(folder: Path) -> Path:
    return edit(folder, UNET, down_block_types=["DownBlock2D", "os.system"])


@hostile(2)
def build_infinite_scale(folder: Path) -> Path:
    return edit(folder, UNET, mid_block_scale_factor=float("inf"))


@hostile(2)
def build_wrong_network_class(folder: Path) -> Path:
    return edit(folder, UNET, _class_name="Popen")


# --- the noise schedule -----------------------------------------------------------------------------------------------


@hostile(2)
def build_nan_beta(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_start=float("nan"))


@hostile(2)
def build_infinite_beta(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_end=float("inf"))


@hostile(2)
def build_negative_beta(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_start=-0.1)


@hostile(2)
def build_beta_above_one(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_end=1.5)


@hostile(2)
def build_no_noise(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_start=0, beta_end=0)


@hostile(2)
def build_no_signal(folder: Path) -> Path:
    return edit(folder, SCHEDULER, beta_start=0.9, beta_end=1)


@hostile(2)
def build_wrong_trained_betas(folder: Path) -> Path:
    return edit(folder, SCHEDULER, trained_betas=[0.1, 0.2, 0.3])


@hostile(2)
def build_huge_timesteps(folder: Path) -> Path:
    return edit(folder, SCHEDULER, num_train_timesteps=10**12)


@hostile(2)
def build_wrong_prediction(folder: Path) -> Path:
    return edit(folder, SCHEDULER, prediction_type="backdoor")


@hostile(2)
def build_huge_solver_order(folder: Path) -> Path:
    edit(folder, INDEX, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    return edit(folder, SCHEDULER, _class_name="DPMSolverMultistepScheduler", solver_order=10**12)


# --- weights ----------------------------------------------------------------------------------------------------------


@hostile(2)
def build_truncated_weights(folder: Path) -> Path:
    return with_weights(folder, sound_files()[WEIGHTS][:-100])


@hostile(2)
def build_empty_weights(folder: Path) -> Path:
    return with_weights(folder, b"")


@hostile(2)
def build_truncated_header(folder: Path) -> Path:
    return with_weights(folder, sound_files()[WEIGHTS][:200])


@hostile(2)
def build_lying_header(folder: Path) -> Path:
    return with_weights(folder, struct.pack("<Q", 10**6) + sound_files()[WEIGHTS][8:])


@hostile(2)
def build_huge_header(folder: Path) -> Path:
    return with_weights(folder, struct.pack("<Q", 2**63) + sound_files()[WEIGHTS][8:])


@hostile(2)
def build_trailing_bytes(folder: Path) -> Path:
    return with_weights(folder, sound_files()[WEIGHTS] + b"more than the header says")


@hostile(2)
def build_overlapping_offsets(folder: Path) -> Path:
    def overlap(header: dict[str, Any]) -> None:
        header["conv_in.bias"]["data_offsets"] = header["conv_out.bias"]["data_offsets"]

    return with_header(folder, overlap)


@hostile(2)
def build_outside_offsets(folder: Path) -> Path:
    def leave(header: dict[str, Any]) -> None:
        begin, end = header["conv_in.bias"]["data_offsets"]
        header["conv_in.bias"]["data_offsets"] = [begin + 2**40, end + 2**40]

    return with_header(folder, leave)


@hostile(2)
def build_unknown_dtype(folder: Path) -> Path:
    return with_header(folder, lambda header: header["conv_in.bias"].update(dtype="F99"))


@hostile(2)
def build_integer_weights(folder: Path) -> Path:
    return with_weights(folder, save(tensors() | {"conv_in.bias": torch.zeros(8, dtype=torch.int32)}))


@hostile(2)
def build_pickle_in_disguise(folder: Path) -> Path:
    return with_weights(folder, bomb(folder))


@hostile(2)
def build_lfs_pointer(folder: Path) -> Path:
    return with_weights(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 87732\n")


@hostile(2)
def build_missing_tensor(folder: Path) -> Path:
    return with_weights(folder, save({k: v for k, v in tensors().items() if k != "conv_in.bias"}))


@hostile(2)
def build_extra_tensor(folder: Path) -> Path:
    return with_weights(folder, save(tensors() | {"a\n\x1b[31mb": torch.zeros(1)}))


@hostile(2)
def build_wrong_shape(folder: Path) -> Path:
    return with_weights(folder, save(tensors() | {"conv_in.bias": torch.zeros(9)}))


@hostile(2)
def build_nan_weights(folder: Path) -> Path:
    return with_weights(folder, save(tensors() | {"conv_in.bias": torch.full((8,), float("nan"))}))


@hostile(2)
def build_infinite_weights(folder: Path) -> Path:
    return with_weights(folder, save(tensors() | {"conv_in.bias": torch.full((8,), float("inf"))}))


@hostile(2)
def build_overflowing_weights(folder: Path) -> Path:
    huge = torch.full((8,), 1e300, dtype=torch.float64)
    return with_weights(folder, save(tensors() | {"conv_in.bias": huge}))


@hostile(2)
def build_twice_named_tensor(folder: Path) -> Path:
    values = tensors()
    name = next(k for k in values if k.endswith("to_q.bias"))
    return with_weights(folder, save(values | {name.replace("to_q", "query"): values[name].clone()}))


@hostile(2)
def build_escaping_shard(folder: Path) -> Path:
    put(folder.parent, folder.name + ".safetensors", sound_files()[WEIGHTS])
    shard = f"../../{folder.name}.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(), shard)}
    return put(write_sound(folder), SHARD_INDEX, json.dumps(index).encode()).parent.parent


@hostile(2)
def build_missing_shard(folder: Path) -> Path:
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(), "part-00001-of-00002.safetensors")}
    return put(write_sound(folder), SHARD_INDEX, json.dumps(index).encode()).parent.parent


@hostile(2)
def build_empty_shard_index(folder: Path) -> Path:
    return put(write_sound(folder), SHARD_INDEX, b'{"weight_map": {}}').parent.parent


@hostile(2)
def build_wrong_shard_map(folder: Path) -> Path:
    index = {"weight_map": {"conv_in.bias": ["a.safetensors"]}}
    return put(write_sound(folder), SHARD_INDEX, json.dumps(index).encode()).parent.parent


# --- a variance-exploding model ---------------------------------------------------------------------------------------


@hostile(2)
def build_sigmas_fall(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, sigma_min=380.0, sigma_max=0.01)


@hostile(2)
def build_sigmas_equal(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, sigma_min=1.0, sigma_max=1.0 + 1e-12)


@hostile(2)
def build_sigma_is_text(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, sigma_max="380")


@hostile(2)
def build_sigma_zero(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, sigma_min=0)


@hostile(2)
def build_nan_sigma(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, sigma_max=float("nan"))


@hostile(2)
def build_huge_correct_steps(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), SCHEDULER, correct_steps=10**12)


@hostile(2)
def build_no_fourier_weights(folder: Path) -> Path:
    values = load(sound_files("ncsn")[WEIGHTS])
    del values["time_proj.weight"]
    return put(write_sound(folder, "ncsn"), WEIGHTS, save(values)).parent.parent


@hostile(2)
def build_two_networks(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), INDEX, model=["my_module", "UNet2DModel"])


# --- a latent model's autoencoder -------------------------------------------------------------------------------------


@hostile(2)
def build_no_autoencoder(folder: Path) -> Path:
    return edit(folder, INDEX, _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])


@hostile(2)
def build_no_autoencoder_entry(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), INDEX, vqvae=...)


@hostile(2)
def build_autoencoder_wrong_class(folder: Path) -> Path:
    edit(write_sound(folder, "ldm"), INDEX, vqvae=["diffusers", "MyVQModel"])
    return edit(folder, VQVAE, _class_name="MyVQModel")


@hostile(2)
def build_autoencoder_own_class(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, _class_name="Popen")


@hostile(2)
def build_autoencoder_nan(folder: Path) -> Path:
    values = load(sound_files("ldm")[VQ_WEIGHTS])
    values["quantize.embedding.weight"][0, 0] = float("nan")
    return put(write_sound(folder, "ldm"), VQ_WEIGHTS, save(values)).parent.parent


@hostile(2)
def build_autoencoder_extra_tensor(folder: Path) -> Path:
    values = load(sound_files("ldm")[VQ_WEIGHTS]) | {"loss.logvar": torch.zeros(1)}
    return put(write_sound(folder, "ldm"), VQ_WEIGHTS, save(values)).parent.parent


@hostile(2)
def build_autoencoder_swapped(folder: Path) -> Path:
    return put(write_sound(folder, "ldm"), VQ_WEIGHTS, sound_files("ldm")[WEIGHTS]).parent.parent


@hostile(2)
def build_autoencoder_other_latents(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, latent_channels=4)


@hostile(2)
def build_autoencoder_other_embedding(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, vq_embed_dim=4)


@hostile(2)
def build_autoencoder_other_images(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, in_channels=3)


@hostile(2)
def build_autoencoder_uneven(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, block_out_channels=[8] * 4)


@hostile(2)
def build_autoencoder_huge_channels(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, block_out_channels=[8, 2**40])


@hostile(2)
def build_autoencoder_huge_codebook(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, num_vq_embeddings=2**40)


@hostile(2)
def build_autoencoder_huge_image(folder: Path) -> Path:
    return edit(edit(write_sound(folder, "ldm"), UNET, sample_size=1024), VQVAE, sample_size=1024)


@hostile(2)
def build_autoencoder_too_many_parameters(folder: Path) -> Path:
    types = {"down_block_types": ["DownEncoderBlock2D"] * 7, "up_block_types": ["UpDecoderBlock2D"] * 7}
    return edit(write_sound(folder, "ldm"), VQVAE, block_out_channels=[4096] * 7, layers_per_block=2, **types)


@hostile(2)
def build_autoencoder_no_scale(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, scaling_factor=0)


@hostile(2)
def build_autoencoder_link(folder: Path) -> Path:
    outside = put(folder.parent, folder.name + ".outside", sound_files("ldm")[VQ_WEIGHTS])
    (write_sound(folder, "ldm") / VQ_WEIGHTS).unlink()
    (folder / VQ_WEIGHTS).symlink_to(outside)
    return folder


# --- sound, but of a kind that cannot be scanned ----------------------------------------------------------------------


@hostile(3)
def build_only_pickle(folder: Path) -> Path:
    (write_sound(folder) / WEIGHTS).unlink()
    return put(folder, "unet/diffusion_pytorch_model.bin", bomb(folder)).parent.parent


@hostile(3)
def build_class_conditional(folder: Path) -> Path:
    return edit(folder, UNET, num_class_embeds=10)


@hostile(3)
def build_class_embedding(folder: Path) -> Path:
    return edit(folder, UNET, class_embed_type="timestep")


@hostile(3)
def build_learned_variance(folder: Path) -> Path:
    return edit(folder, UNET, out_channels=2)


@hostile(3)
def build_learned_variance_scheduler(folder: Path) -> Path:
    return edit(folder, SCHEDULER, variance_type="learned_range")


@hostile(3)
def build_image_conditioned(folder: Path) -> Path:
    return edit(folder, UNET, in_channels=6)


@hostile(3)
def build_text_conditioned(folder: Path) -> Path:
    return edit(folder, INDEX, _class_name="StableDiffusionPipeline", tokenizer=["transformers", "CLIPTokenizer"])


@hostile(3)
def build_text_conditioned_network(folder: Path) -> Path:
    return edit(folder, UNET, _class_name="UNet2DConditionModel")


@hostile(3)
def build_other_stock_pipeline(folder: Path) -> Path:
    return edit(folder, INDEX, _class_name="ConsistencyModelPipeline")


@hostile(3)
def build_extra_stock_component(folder: Path) -> Path:
    return edit(folder, INDEX, vae=["diffusers", "AutoencoderKL"])


@hostile(3)
def build_autoencoder_in_pixel_pipeline(folder: Path) -> Path:
    return edit(folder, INDEX, vqvae=["diffusers", "VQModel"])


@hostile(3)
def build_fourier_with_preserving_scheduler(folder: Path) -> Path:
    return edit(folder, UNET, time_embedding_type="fourier")


@hostile(3)
def build_positional_with_exploding_scheduler(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), UNET, time_embedding_type="positional")


@hostile(3)
def build_exploding_scheduler_in_pixel_pipeline(folder: Path) -> Path:
    return edit(write_sound(folder, "ncsn"), INDEX, _class_name="DDPMPipeline")


@hostile(3)
def build_exploding_latent(folder: Path) -> Path:
    edit(write_sound(folder, "ldm"), INDEX, scheduler=["diffusers", "ScoreSdeVeScheduler"])
    return put(folder, SCHEDULER, sound_files("ncsn")[SCHEDULER]).parent.parent


@hostile(3)
def build_autoencoder_only_pickle(folder: Path) -> Path:
    (write_sound(folder, "ldm") / VQ_WEIGHTS).unlink()
    return put(folder, "vqvae/diffusion_pytorch_model.bin", bomb(folder)).parent.parent


@hostile(3)
def build_variational_autoencoder(folder: Path) -> Path:
    edit(write_sound(folder, "ldm"), INDEX, vqvae=["diffusers", "AutoencoderKL"])
    return edit(folder, VQVAE, _class_name="AutoencoderKL")


@hostile(3)
def build_autoencoder_quantised(folder: Path) -> Path:
    return edit(write_sound(folder, "ldm"), VQVAE, quantization_config={"quant_method": "bitsandbytes"})


@hostile(3)
def build_edm_scheduler(folder: Path) -> Path:
    return edit(folder, INDEX, scheduler=["diffusers", "EDMEulerScheduler"])


@hostile(3)
def build_unknown_scheduler(folder: Path) -> Path:
    return edit(folder, SCHEDULER, _class_name="NewestScheduler")


@hostile(3)
def build_predicts_sample(folder: Path) -> Path:
    return edit(folder, SCHEDULER, prediction_type="sample")


@hostile(3)
def build_flow_matching(folder: Path) -> Path:
    edit(folder, INDEX, scheduler=["diffusers", "UniPCMultistepScheduler"])
    return edit(folder, SCHEDULER, _class_name="UniPCMultistepScheduler", use_flow_sigmas=True)


@hostile(3)
def build_quantised(folder: Path) -> Path:
    return edit(folder, UNET, quantization_config={"quant_method": "bitsandbytes"})
