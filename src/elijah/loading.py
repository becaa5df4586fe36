"""From a folder or a hub id to a checked Model. With folder.py and weights.py, all that opens untrusted bytes.

What is read: JSON and safetensors, nothing else. What is believed: nothing. The order is

    1. find the folder, or download its JSON and safetensors files      find_folder
    2. no link leaves the folder; note what is left unopened            Folder.survey
    3. model_index.json names allowed classes only                      _read_index
    4. the noise schedule: every field typed and bounded                _read_scheduler
    5. the network, and a latent model's autoencoder: built without     _read_network, _read_autoencoder
       memory, then run on shapes alone
    6. the weights of each: headers, names, shapes, then finite values  weights.read_weights

Classes come from the tables of allowed.py, never from a name in a file. Where a folder holds several sets of weights,
the set that stock diffusers would load is read and the others are noted. Nothing is ever written to the folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import torch

from elijah import processes
from elijah.allowed import (
    AUTOENCODERS,
    BUILD_ERRORS,
    EXPLODING,
    LIBRARIES,
    MAX_PARAMETERS,
    MAX_SIDE,
    NETWORKS,
    PIPELINES,
    REASONS,
    SAMPLER,
    SCHEDULE,
    SCHEDULERS,
    SIGMAS,
    UNET,
    VQ,
    Check,
)
from elijah.diffusion import Model, Provenance
from elijah.errors import Unsupported
from elijah.folder import Folder, find_folder, refusal, show
from elijah.weights import read_weights


class Index(NamedTuple):
    """What model_index.json says; without that file, what the layout does.

    kind: ddpm, ncsn or ldm; None where only the scheduler tells. network: the network's name in the folder.
    classes: class names of unet, scheduler and vqvae.
    """

    kind: str | None
    network: str
    classes: dict[str, str]


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
        index = _read_index(folder)
        scheduler = _read_scheduler(folder, index)
        part = folder.part(index.network)
        network = _read_network(folder, part, index.classes.get("unet"), scheduler)
        shape = _sample_shape(network.config)
        autoencoder = _read_autoencoder(folder, index.classes.get("vqvae"), shape) if index.kind == "ldm" else None
        _fill(network, folder, part, place)
        if autoencoder is not None:
            _fill(autoencoder, folder, "vqvae/", place)
        folder.note("holds other weights: not scanned", (".safetensors",))
        provenance = Provenance(source, folder.revision, tuple(folder.files), tuple(folder.notes))
        kind = index.kind or ("ncsn" if _explodes(scheduler) else "ddpm")
        return Model(network, scheduler, shape, kind, provenance, dtype, autoencoder)
    except OSError as error:
        raise refusal(str(error.filename or source), f"cannot be read: {error.strerror or error}") from error


def _fill(network: Any, folder: Folder, part: str, place: torch.device) -> None:
    network.load_state_dict(read_weights(folder, part, network), assign=True)
    network.eval().requires_grad_(False).to(place)


def _explodes(scheduler: Any) -> bool:
    return type(scheduler).__name__ in EXPLODING


def find_device(name: str) -> torch.device:
    """The device called name, auto: of several processes each its own; raises ElijahError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = processes.device() or name
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


def _read_index(folder: Folder) -> Index:
    """What model_index.json says, every class in it being an allowed one."""
    where = "model_index.json"
    if not (folder.root / where).exists():
        if folder.has("config.json") or folder.part("unet"):
            return Index("ldm" if folder.part("vqvae") else None, "unet", {})
        raise refusal(folder.source, "not a diffusers model: no model_index.json, config.json or unet/")
    index = folder.read_json(where)
    entries = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list | dict)}
    for name, entry in entries.items():
        sound = isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)
        if not sound or (entry[0] is not None and entry[0] not in LIBRARIES):
            raise refusal(where, f"{show(name)} is {show(entry)}: only stock classes are allowed, custom code never")
    kind = PIPELINES[_allow(index.get("_class_name"), tuple(PIPELINES), "pipeline", where)]
    network = "model" if "unet" not in entries and "model" in entries else "unet"  # model: in old repositories
    parts: dict[str, tuple[str, dict[str, Any]]] = {
        network: ("network", NETWORKS),
        "scheduler": ("scheduler", SCHEDULERS | EXPLODING),
        **({"vqvae": ("autoencoder", AUTOENCODERS)} if kind == "ldm" else {}),
    }
    for name, (library, class_name) in entries.items():
        if name not in parts:
            if class_name is not None:
                raise refusal(where, f"a pipeline with {show(name)} cannot be scanned", Unsupported)
        elif library != "diffusers":
            raise refusal(where, f"{name} is {show([library, class_name])}: its library must be diffusers")
    classes = {
        "unet" if name == network else name: _allow((entries.get(name) or [None, None])[1], tuple(allowed), what, where)
        for name, (what, allowed) in parts.items()
    }
    return Index(kind, network, classes)


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


def _read_scheduler(folder: Folder, index: Index) -> Any:
    """The folder's own scheduler, with a schedule that leaves some signal and adds some noise at every step."""
    where = folder.part("scheduler") + "scheduler_config.json"
    config = folder.read_json(where)
    known = SCHEDULERS | EXPLODING
    scheduler_class = known[_class_name(config, index.classes.get("scheduler"), tuple(known), "scheduler", where)]
    exploding = scheduler_class.__name__ in EXPLODING
    if index.kind is not None and exploding != (index.kind == "ncsn"):
        why = f"{scheduler_class.__name__} in a pipeline of kind {index.kind} cannot be scanned"
        raise refusal(where, why, Unsupported)
    if config.get("prediction_type") in ("sample", "flow_prediction"):
        raise refusal(where, f"prediction_type {config['prediction_type']} cannot be scanned", Unsupported)
    if config.get("variance_type") in ("learned", "learned_range"):
        raise refusal(where, "a learned variance cannot be scanned", Unsupported)
    if config.get("use_flow_sigmas"):
        raise refusal(where, "use_flow_sigmas: flow matching cannot be scanned", Unsupported)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    schedule, others = (SIGMAS, {}) if exploding else (SCHEDULE, SAMPLER)
    # The class's own defaults are spelled out: a sampler of another class, made from this config, would use its own.
    fields = {k: accepted[k].default for k in schedule if k in accepted} | _take(config, schedule | others, where)
    betas = fields.get("trained_betas")
    if betas is not None and len(betas) != fields["num_train_timesteps"]:
        raise refusal(where, f"{len(betas)} trained_betas for {fields['num_train_timesteps']} num_train_timesteps")
    if exploding and not fields["sigma_min"] < fields["sigma_max"]:
        raise refusal(where, f"sigma_min {fields['sigma_min']} is not below sigma_max {fields['sigma_max']}")
    try:
        scheduler = scheduler_class(**{k: v for k, v in fields.items() if k in accepted})
    except BUILD_ERRORS as error:
        raise refusal(where, f"{scheduler_class.__name__} refuses these settings: {show(error)}") from error
    if exploding:
        rising, why = scheduler.discrete_sigmas, "the sigmas must rise from above 0"
        sound = rising[0] > 0 and rising[-1] > rising[0]
    else:
        rising, why = -scheduler.alphas_cumprod, "alphas_cumprod must fall from below 1 and stay above 0"
        sound = rising[0] > -1 and rising[-2] < 0 and rising[-1] <= 0
    if not (sound and torch.isfinite(rising).all() and (rising.diff() >= 0).all()):
        raise refusal(where, f"not a noise schedule: {why}")
    return scheduler


def _sample_shape(config: Any) -> tuple[int, int, int]:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def _read_network(folder: Folder, part: str, indexed: str | None, scheduler: Any) -> Any:
    """The network on the meta device: every shape is known and no memory is taken."""
    where = part + "config.json"
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
    embedding = fields.get("time_embedding_type", "positional")
    fourier, timesteps = embedding == "fourier", scheduler.config["num_train_timesteps"]
    if fourier != _explodes(scheduler):
        sort = "a continuous-time (NCSN)" if fourier else "a discrete-time"
        why = f"time_embedding_type {embedding}: {sort} network with a {type(scheduler).__name__} cannot be scanned"
        raise refusal(where, why, Unsupported)
    if embedding == "learned" and (fields.get("num_train_timesteps") or 0) < timesteps:
        raise refusal(where, f"num_train_timesteps is less than the schedule's {timesteps}")
    with _without_memory(where):
        network = network_class(**fields).eval()
        x = torch.empty(1, *_sample_shape(fields))
        t = torch.ones(1, dtype=torch.float32 if fourier else torch.long)  # a sigma, or a timestep
        out = network(x, t, return_dict=False)[0]
    if out.shape != x.shape:
        raise refusal(where, f"the network makes {list(out.shape[1:])} of {list(x.shape[1:])}")
    _refuse_huge(network, where)
    return network


def _read_autoencoder(folder: Folder, indexed: str | None, latent_shape: tuple[int, int, int]) -> Any:
    """The autoencoder on the meta device, whose latents are of the network's shape [C, H, W]."""
    where = "vqvae/config.json"
    config = folder.read_json(where)
    network_class = AUTOENCODERS[_class_name(config, indexed, tuple(AUTOENCODERS), "autoencoder", where)]
    _refuse_conditional(config, where)
    fields = _take(config, VQ, where)
    width = fields.get("vq_embed_dim") or fields.get("latent_channels", 3)
    if width != latent_shape[0]:
        raise refusal(where, f"latents of {width} channels, and the network's in_channels are {latent_shape[0]}")
    with _without_memory(where):
        network = network_class(**fields).eval()
        latent = torch.empty(1, *latent_shape)
        image = network.decode(latent).sample
        again = network.encode(image).latents
    factor = 2 ** (len(network.config["block_out_channels"]) - 1)
    sides = [side * factor for side in latent_shape[1:]]
    if list(image.shape[1:]) != [network.config["in_channels"], *sides] or again.shape != latent.shape:
        shapes = " to ".join(str(list(x.shape[1:])) for x in (latent, image, again))
        raise refusal(where, f"not an autoencoder: it goes from {shapes}")
    if max(sides) > MAX_SIDE:
        raise refusal(where, f"images of {sides[0]} x {sides[1]}; a side may be {MAX_SIDE}")
    _refuse_huge(network, where)
    return network


@contextmanager
def _without_memory(where: str) -> Iterator[None]:
    """Inside, networks are built and run on the meta device; what goes wrong there is the settings' fault."""
    try:
        with torch.device("meta"), torch.no_grad():
            yield
    except BUILD_ERRORS as error:
        raise refusal(where, f"these settings make no working network: {show(error)}") from error


def _refuse_huge(network: Any, where: str) -> None:
    if sum(p.numel() for p in network.parameters()) > MAX_PARAMETERS:
        raise refusal(where, f"more than {MAX_PARAMETERS} parameters")


def _refuse_conditional(config: dict[str, Any], where: str) -> None:
    """Raises Unsupported for a UNet2DModel that is more than x_t, t -> noise, and for quantised weights."""
    reasons = {
        "a class-conditional network": config.get("num_class_embeds") is not None or config.get("class_embed_type"),
        "quantised weights": config.get("quantization_config"),
    }
    for reason, found in reasons.items():
        if found:
            raise refusal(where, f"{reason} cannot be scanned", Unsupported)
