"""A component's weights, from safetensors alone: headers, names, dtypes and shapes first, then finite values.

Of several sets of weights, the one that stock diffusers would load is read. A pickle is named, never opened.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from typing import Any

import torch
from torch import Tensor

from elijah.allowed import DTYPES, NEW_ATTENTION, OLD_ATTENTION, PICKLES, SHARD, STEM, WEIGHTS
from elijah.errors import ElijahError, Unsupported
from elijah.folder import Folder, refusal, show


def read_weights(folder: Folder, part: str, network: Any) -> dict[str, Tensor]:
    """A network's weights in float32, after their names, dtypes and shapes were found to be exactly its own.

    part: the prefix of the component's files.
    """
    names = _weight_files(folder, part, type(network).__name__)
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
    return state


def _weight_files(folder: Folder, part: str, network_class: str) -> list[str]:
    """The safetensors files that stock diffusers would load, relative to the folder."""
    present = [part + name for name in WEIGHTS if folder.has(part + name)]
    if not present:
        raise _no_weights(folder, part, network_class)
    if present[0].endswith(".safetensors"):
        return present[:1]
    index = folder.read_json(present[0]).get("weight_map")
    shards = list(index.values()) if isinstance(index, dict) else []
    if not shards or not all(isinstance(s, str) and SHARD.fullmatch(s) for s in shards):
        raise refusal(present[0], "weight_map must give plain names of safetensors files in the same folder")
    return [part + shard for shard in sorted(set(shards))]


def _no_weights(folder: Folder, part: str, network_class: str) -> ElijahError:
    pickles = [
        n for n in folder.names if n.lower().endswith(PICKLES) and (folder.root / n).parent == folder.root / part
    ]
    if not pickles and not folder.blobs:
        return refusal(f"{part}{STEM}.safetensors", f"is missing in {folder.source}: no weights")
    if folder.blobs:
        name, where, made = "DiffusionPipeline", folder.source, "DIR"
    else:
        name, where = network_class, str(folder.root / part)
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
