"""From a folder or a hub id to a checked Model. With folder.py, the only file that opens untrusted bytes.

What is read: JSON and safetensors, nothing else. What is believed: nothing. The order is

    1. find the folder, or download its JSON and safetensors files      find_folder
    2. no link leaves the folder; note what is left unopened            Folder.survey
    3. model_index.json names allowed classes only                      _read_index
    4. the noise schedule: every field typed and bounded                _read_scheduler
    5. the network: built without memory, then run on shapes alone      _read_network
    6. the weights: headers, names and shapes, then finite values       _read_weights

Classes come from the tables of allowed.py, never from a name in a file. Where a folder holds several sets of weights,
the set that stock diffusers would load is read and the others are noted. Nothing is ever written to the folder.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
from typing import Any

import diffusers
import torch
from torch import Tensor

from elijah.allowed import (
    BUILD_ERRORS,
    DTYPES,
    LIBRARIES,
    MAX_PARAMETERS,
    NETWORKS,
    NEW_ATTENTION,
    OLD_ATTENTION,
    PICKLES,
    PIPELINES,
    REASONS,
    SAMPLER,
    SCHEDULE,
    SCHEDULERS,
    SHARD,
    STEM,
    UNET,
    WEIGHTS,
    Check,
)
from elijah.diffusion import Model, Provenance
from elijah.errors import ElijahError, Unsupported
from elijah.folder import Folder, find_folder, refusal, show


def load_model(
    source: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A checked model: network in eval mode, float32, on device, taking no gradients for its weights.

    source: a diffusers folder, else a hub id OWNER/NAME, of which revision is read; offline: from the local cache only.
    device: a torch device or "auto" (cuda, mps or cpu, the first there is). dtype: what Model computes in.
    Raises ElijahError (exit code 2) for what is missing, broken or hostile and Unsupported (3) for a sound model of a
    kind that cannot be scanned; the message is one line.
    """
    place = find_device(device)
    try:
        folder = find_folder(source, revision, offline)
        folder.survey()
        classes = _read_index(folder)
        scheduler = _read_scheduler(folder, classes.get("scheduler"))
        network = _read_network(folder, classes.get("unet"), len(scheduler.alphas_cumprod))
        network.load_state_dict(_read_weights(folder, network), assign=True)
        provenance = Provenance(source, folder.revision, tuple(folder.files), tuple(folder.notes))
        shape = _sample_shape(network.config)
        return Model(network.eval().requires_grad_(False).to(place), scheduler, shape, "ddpm", provenance, dtype)
    except OSError as error:
        raise refusal(str(error.filename or source), f"cannot be read: {error.strerror or error}") from error


def find_device(name: str) -> torch.device:
    """The device called name; raises ElijahError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(0)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise refusal(f"--device {name}", "no such device here; use --device auto or cpu") from error
    if device.type == "meta":
        raise refusal(f"--device {name}", "holds no values; use --device auto or cpu")
    return device


def _allow(name: Any, allowed: tuple[str, ...], what: str, where: str) -> str:
    """name if it is an allowed class; raises Unsupported for other stock classes, ElijahError for anything else."""
    if name is None:
        raise refusal(where, f"names no {what} class")
    if not isinstance(name, str):
        raise refusal(where, f"the {what}'s class must be a name and is {show(name)}: custom code is never run")
    if name in allowed:
        return name
    if name in REASONS:
        raise refusal(where, f"{name}, {REASONS[name]}, cannot be scanned", Unsupported)
    if (name.isidentifier() and what == "scheduler" and name.endswith("Scheduler")) or _is_stock(name):
        raise refusal(where, f"{show(name)} cannot be scanned; a {what} must be {' or '.join(allowed)}", Unsupported)
    raise refusal(where, f"{show(name)} is no {what} class of diffusers: custom code is never run")


def _is_stock(name: str) -> bool:
    return name[:1].isupper() and name in dir(diffusers)  # lists the names of lazy classes, and imports none


def _read_index(folder: Folder) -> dict[str, str]:
    """The class names of unet and scheduler in model_index.json; {} where there is no such file."""
    where = "model_index.json"
    if not (folder.root / where).exists():
        if folder.has("config.json") or folder.part("unet"):
            return {}
        raise refusal(folder.source, "not a diffusers model: no model_index.json, config.json or unet/")
    index = folder.read_json(where)
    entries = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list | dict)}
    for name, entry in entries.items():
        sound = isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)
        if not sound or (entry[0] is not None and entry[0] not in LIBRARIES):
            raise refusal(where, f"{show(name)} is {show(entry)}: only stock classes are allowed, custom code never")
    _allow(index.get("_class_name"), PIPELINES, "pipeline", where)
    for name, (library, class_name) in entries.items():
        if name not in ("unet", "scheduler"):
            if class_name is not None:
                raise refusal(where, f"a pipeline with {show(name)} cannot be scanned", Unsupported)
        elif library != "diffusers":
            raise refusal(where, f"{name} is {show([library, class_name])}: its library must be diffusers")
    return {
        "unet": _allow((entries.get("unet") or [None, None])[1], tuple(NETWORKS), "network", where),
        "scheduler": _allow((entries.get("scheduler") or [None, None])[1], tuple(SCHEDULERS), "scheduler", where),
    }


def _class_name(config: dict[str, Any], indexed: str | None, allowed: tuple[str, ...], what: str, where: str) -> str:
    """The class that model_index.json names, else the one in the component's own file; both must be allowed."""
    own = config.get("_class_name")
    if own is None and indexed is None:
        raise refusal(where, f"no _class_name, and no model_index.json says which {what} it is")
    if own is not None:
        own = _allow(own, allowed, what, where)
    return indexed or str(own)


def _take(config: dict[str, Any], fields: dict[str, Check], where: str) -> dict[str, Any]:
    """The known fields of config, checked. Like diffusers, skips those listed in _use_default_values."""
    skipped = config.get("_use_default_values") or []
    taken = {k: config[k] for k in fields if k in config and not (isinstance(skipped, list) and k in skipped)}
    for key, value in taken.items():
        if not fields[key].ok(value):
            raise refusal(where, f"{key} must be {fields[key].wants} and is {show(value)}")
    return taken


def _read_scheduler(folder: Folder, indexed: str | None) -> Any:
    """The folder's own scheduler, with a schedule that leaves some signal and adds some noise at every step."""
    where = folder.part("scheduler") + "scheduler_config.json"
    config = folder.read_json(where)
    scheduler_class = SCHEDULERS[_class_name(config, indexed, tuple(SCHEDULERS), "scheduler", where)]
    if config.get("prediction_type") in ("sample", "flow_prediction"):
        raise refusal(where, f"prediction_type {config['prediction_type']} cannot be scanned", Unsupported)
    if config.get("variance_type") in ("learned", "learned_range"):
        raise refusal(where, "a learned variance cannot be scanned", Unsupported)
    if config.get("use_flow_sigmas"):
        raise refusal(where, "use_flow_sigmas: flow matching cannot be scanned", Unsupported)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    # The class's own defaults are spelled out: a sampler of another class, made from this config, would use its own.
    fields = {k: accepted[k].default for k in SCHEDULE if k in accepted} | _take(config, SCHEDULE | SAMPLER, where)
    betas = fields["trained_betas"]
    if betas is not None and len(betas) != fields["num_train_timesteps"]:
        raise refusal(where, f"{len(betas)} trained_betas for {fields['num_train_timesteps']} num_train_timesteps")
    try:
        scheduler = scheduler_class(**{k: v for k, v in fields.items() if k in accepted})
    except BUILD_ERRORS as error:
        raise refusal(where, f"{scheduler_class.__name__} refuses these settings: {show(error)}") from error
    abar = scheduler.alphas_cumprod
    if not (torch.isfinite(abar).all() and (abar.diff() <= 0).all() and abar[0] < 1 and abar[-2] > 0 and abar[-1] >= 0):
        raise refusal(where, "not a noise schedule: alphas_cumprod must fall from below 1 and stay above 0")
    return scheduler


def _sample_shape(config: Any) -> tuple[int, int, int]:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def _read_network(folder: Folder, indexed: str | None, timesteps: int) -> Any:
    """The network on the meta device: every shape is known and no memory is taken."""
    where = folder.part("unet") + "config.json"
    config = folder.read_json(where)
    network_class = NETWORKS[_class_name(config, indexed, tuple(NETWORKS), "network", where)]
    _refuse_conditional(config, where)
    fields = _take(config, UNET, where)
    fields = {"in_channels": 3, "out_channels": 3, "sample_size": None} | fields
    if fields["sample_size"] is None:
        raise refusal(where, "no sample_size: the shape of an image is not known")
    channels = fields["in_channels"]
    if fields["out_channels"] != channels:
        what = "a learned variance" if fields["out_channels"] == 2 * channels else "a network conditioned on an image"
        why = f"out_channels {fields['out_channels']} for in_channels {channels}: {what} cannot be scanned"
        raise refusal(where, why, Unsupported)
    if fields.get("time_embedding_type") == "learned" and (fields.get("num_train_timesteps") or 0) < timesteps:
        raise refusal(where, f"num_train_timesteps is less than the schedule's {timesteps}")
    try:
        with torch.device("meta"), torch.no_grad():
            network = network_class(**fields).eval()
            x = torch.empty(1, *_sample_shape(fields))
            out = network(x, torch.zeros(1, dtype=torch.long), return_dict=False)[0]
    except BUILD_ERRORS as error:
        raise refusal(where, f"these settings make no working network: {show(error)}") from error
    if out.shape != x.shape:
        raise refusal(where, f"the network makes {list(out.shape[1:])} of {list(x.shape[1:])}")
    if sum(p.numel() for p in network.parameters()) > MAX_PARAMETERS:
        raise refusal(where, f"more than {MAX_PARAMETERS} parameters")
    return network


def _refuse_conditional(config: dict[str, Any], where: str) -> None:
    """Raises Unsupported for a UNet2DModel that is more than x_t, t -> noise."""
    blocks = [config[k] for k in ("down_block_types", "up_block_types") if isinstance(config.get(k), list)]
    skips = any(isinstance(name, str) and "Skip" in name for names in blocks for name in names)
    reasons = {
        "a class-conditional network": config.get("num_class_embeds") is not None or config.get("class_embed_type"),
        "quantised weights": config.get("quantization_config"),
        "a continuous-time (NCSN) network": config.get("time_embedding_type") == "fourier" or skips,
    }
    for reason, found in reasons.items():
        if found:
            raise refusal(where, f"{reason} cannot be scanned", Unsupported)


def _read_weights(folder: Folder, network: Any) -> dict[str, Tensor]:
    """The network's weights in float32, after their names, dtypes and shapes were found to be exactly its own."""
    part = folder.part("unet")
    names = _weight_files(folder, part)
    expected = {key: list(value.shape) for key, value in network.state_dict().items()}
    homes = {name: _check_header(folder, name, expected) for name in names}
    found = [key for keys in homes.values() for key in keys.values()]
    if missing := sorted(expected.keys() - set(found)):
        raise refusal(names[0], f"{len(missing)} tensors of the network are missing: {', '.join(missing[:3])}")
    if len(found) != len(set(found)):
        raise refusal(names[0], "a tensor occurs twice")
    state = {}
    for name, keys in homes.items():
        with (folder.root / name).open("rb") as file:
            folder.files.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
        with folder.tensors(name) as tensors:
            for old, key in keys.items():
                state[key] = tensors.get_tensor(old).to(torch.float32, copy=True)
                if not torch.isfinite(state[key]).all():
                    raise refusal(name, f"tensor {key} has values that are not finite")
    folder.note("holds other weights: not scanned", (".safetensors",))
    return state


def _weight_files(folder: Folder, part: str) -> list[str]:
    """The safetensors files that stock diffusers would load, relative to the folder."""
    present = [part + name for name in WEIGHTS if folder.has(part + name)]
    if not present:
        raise _no_weights(folder, part)
    if present[0].endswith(".safetensors"):
        return present[:1]
    index = folder.read_json(present[0]).get("weight_map")
    shards = list(index.values()) if isinstance(index, dict) else []
    if not shards or not all(isinstance(s, str) and SHARD.fullmatch(s) for s in shards):
        raise refusal(present[0], "weight_map must give plain names of safetensors files in the same folder")
    return [part + shard for shard in sorted(set(shards))]


def _no_weights(folder: Folder, part: str) -> ElijahError:
    pickles = [
        n for n in folder.names if n.lower().endswith(PICKLES) and (folder.root / n).parent == folder.root / part
    ]
    if not pickles and not folder.blobs:
        return refusal(f"{part}{STEM}.safetensors", f"is missing in {folder.source}: no weights")
    if folder.blobs:
        name, where, made = "DDPMPipeline", folder.source, "DIR"
    else:
        name, where = "UNet2DModel", str(folder.root / part)
        made = where
    where, made = json.dumps(where), json.dumps(made)  # double quotes, since the shell's are single
    call = f"{name}.from_pretrained({where}, use_safetensors=False).save_pretrained({made})"
    command = f"python -c {shlex.quote(f'from diffusers import {name}; {call}')}"
    what = f"{pickles[0]} is a pickle" if pickles else "no safetensors weights"
    why = f"{what}, and opening one runs its code; to convert it, only in a sandbox: {command}"
    return refusal(folder.source, why, Unsupported)


def _check_header(folder: Folder, name: str, expected: dict[str, list[int]]) -> dict[str, str]:
    """The tensors of one file: their name in it -> their name in the network. Reads the header alone."""
    keys = {}
    with folder.tensors(name) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (no mapping)
            old = OLD_ATTENTION.fullmatch(key)
            keys[key] = new = f"{old[1]}.{NEW_ATTENTION[old[2]]}.{old[3]}" if old and key not in expected else key
            if new not in expected:
                raise refusal(name, f"tensor {show(key)} is not part of the network that config.json describes")
            header = tensors.get_slice(key)
            if header.get_dtype() not in DTYPES:
                raise refusal(name, f"tensor {key} is {header.get_dtype()} and must be one of {', '.join(DTYPES)}")
            if header.get_shape() != expected[new]:
                raise refusal(name, f"tensor {key} is {show(header.get_shape())} and must be {expected[new]}")
    return keys
