"""loading: every layout gives the same network, every hostile folder one line and the right exit code."""

from __future__ import annotations

import hashlib
import json
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub
import pytest
import torch
from hostile import HOSTILE, INDEX, SCHEDULER, WEIGHTS, bomb, code, edit, marker, put, sound_files, tensors, write_sound
from hostile import original as build_original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from elijah import loading
from elijah.allowed import HUB_FILES
from elijah.diffusion import Model
from elijah.errors import ElijahError, Unsupported
from elijah.loading import load_model
from elijah.samplers import make_scheduler

EXACT = 2e-6  # on eps: the same weights, but kernels may differ between weights with and without gradients
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEM = "diffusion_pytorch_model"


def half() -> dict[str, torch.Tensor]:
    return {k: v.half() for k, v in tensors().items()}


def flat(folder: Path) -> Path:
    for name, content in sound_files().items():
        put(folder, name.removeprefix("unet/").removeprefix("scheduler/"), content)
    return folder


def flat_without_index(folder: Path) -> Path:
    (flat(folder) / "model_index.json").unlink()
    return folder


def fp16_variant(folder: Path) -> Path:
    (write_sound(folder) / WEIGHTS).unlink()
    return put(folder, f"unet/{STEM}.fp16.safetensors", save(half())).parent.parent


def bf16_plain(folder: Path) -> Path:
    put(write_sound(folder), WEIGHTS, save({k: v.bfloat16() for k, v in tensors().items()}))
    return folder


def sharded(folder: Path, *, variant: str = "", index: str = f"{STEM}.safetensors.index.json") -> Path:
    (write_sound(folder) / WEIGHTS).unlink()
    values = half() if variant else tensors()
    names = sorted(values)
    shards = [f"{STEM}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        put(folder, f"unet/{shard}", save({k: values[k] for k in part}))
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    return put(folder, f"unet/{index}", json.dumps({"metadata": {}, "weight_map": weight_map}).encode()).parent.parent


def sharded_fp16(folder: Path) -> Path:
    return sharded(folder, variant=".fp16", index=f"{STEM}.safetensors.index.fp16.json")


def old_attention(folder: Path) -> Path:
    """Weights as the google/ddpm repositories name them."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    values = tensors()
    for to, old in new.items():
        values = {k.replace(f".{to}.", f".{old}."): v for k, v in values.items()}
    assert values.keys() != tensors().keys()
    put(write_sound(folder), WEIGHTS, save(values))
    return folder


def links_inside(folder: Path) -> Path:
    (write_sound(folder) / WEIGHTS).rename(folder / "weights")
    (folder / WEIGHTS).symlink_to("../weights")
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], float]] = {  # builder, tolerance on weights and eps
    "subfolders": (write_sound, 0),
    "flat": (flat, 0),
    "flat_without_index": (flat_without_index, 0),
    "fp16_variant": (fp16_variant, 1e-2),
    "bf16_plain": (bf16_plain, 5e-2),
    "sharded": (sharded, 0),
    "sharded_fp16": (sharded_fp16, 1e-2),
    "old_attention": (old_attention, 0),
    "links_inside": (links_inside, 0),
}


@pytest.fixture(scope="module")
def original() -> Model:
    return build_original()


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 500, 999])


@torch.no_grad()
def eps(model: Model, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model.eps(*inputs)


def tree(root: Path) -> list[tuple[Any, ...]]:
    """All that could change in a tree, apart from access times."""
    paths = [root, *sorted(root.rglob("*"))] if root.exists() else []
    small = (p.is_file() and p.stat().st_size < 2**30 for p in paths)
    data = (hashlib.sha256(p.read_bytes()).hexdigest() if ok else None for p, ok in zip(paths, small, strict=True))
    return [(p, s.st_mode, s.st_size, s.st_mtime_ns, d) for p, s, d in zip(paths, (p.lstat() for p in paths), data)]  # noqa: B905


# --- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, tmp_path: Path, original: Model, inputs: Any) -> None:
    build, tolerance = LAYOUTS[layout]
    folder = build(tmp_path / "model")
    before = tree(tmp_path)
    model = load_model(str(folder))
    assert torch.allclose(eps(model, inputs), eps(original, inputs), rtol=0, atol=tolerance or EXACT)
    weights = model.network.state_dict()
    assert all(torch.allclose(weights[k], w, rtol=tolerance, atol=tolerance) for k, w in tensors().items())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.network.parameters())
    assert not model.network.training
    assert (model.sample_shape, model.kind, model.prediction, model.T) == ((1, 8, 8), "ddpm", "epsilon", 1000)
    assert torch.equal(model.a, original.a)
    assert model.provenance.notes == ()
    assert tree(tmp_path) == before


def test_provenance_names_the_files_read_with_their_sha256(tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "model")
    provenance = load_model(str(folder)).provenance
    assert provenance.source == str(folder)
    assert provenance.revision is None
    assert dict(provenance.files) == {name: hashlib.sha256(data).hexdigest() for name, data in sound_files().items()}
    shards = load_model(str(sharded(tmp_path / "sharded"))).provenance.files
    assert len(shards) == 6
    assert all(hashlib.sha256((tmp_path / "sharded" / n).read_bytes()).hexdigest() == d for n, d in shards)


def test_what_stays_unopened_is_noted(tmp_path: Path, original: Model, inputs: Any) -> None:
    folder = write_sound(tmp_path / "model")
    put(folder, f"unet/{STEM}.bin", bomb(folder))
    put(folder, "train.py", code(folder))
    put(folder, f"unet/{STEM}.fp16.safetensors", save({k: v * 0 for k, v in half().items()}))
    model = load_model(str(folder))
    assert torch.allclose(eps(model, inputs), eps(original, inputs), atol=EXACT)
    assert model.provenance.notes == (
        f"unet/{STEM}.bin is a pickle: not opened",
        "train.py is Python code: not opened",
        f"unet/{STEM}.fp16.safetensors holds other weights: not scanned",
    )
    assert not marker(folder).exists()


def test_a_name_that_looks_like_a_pickle_in_capitals_is_noted(tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "model")
    put(folder, "OLD.PT", bomb(folder))
    assert load_model(str(folder)).provenance.notes == ("OLD.PT is a pickle: not opened",)


def test_the_command_that_converts_a_pickle_runs(tmp_path: Path, original: Model, inputs: Any) -> None:
    """Taken from the message, split as a shell would, on a real pickle of our own and a folder with a quote in it."""
    folder = write_sound(tmp_path / "it's $(mine)")
    (folder / WEIGHTS).unlink()
    torch.save(tensors(), folder / f"unet/{STEM}.bin")
    with pytest.raises(Unsupported) as caught:
        load_model(str(folder))
    _, flag, command = shlex.split(str(caught.value).partition("sandbox: ")[2])
    assert flag == "-c"
    exec(command, {})
    assert torch.allclose(eps(load_model(str(folder)), inputs), eps(original, inputs), atol=EXACT)


def test_the_set_of_weights_is_the_one_that_diffusers_loads(tmp_path: Path, inputs: Any) -> None:
    from diffusers import UNet2DModel

    folder = sharded(tmp_path / "model")
    put(folder, WEIGHTS, save({k: v * 0 for k, v in tensors().items()}))
    stock = UNet2DModel.from_pretrained(folder / "unet")
    assert torch.equal(load_model(str(folder)).network.conv_in.weight, stock.conv_in.weight)


def test_v_prediction_is_turned_into_eps(tmp_path: Path, original: Model, inputs: Any) -> None:
    model = load_model(str(edit(tmp_path / "model", SCHEDULER, prediction_type="v_prediction")))
    x, t = inputs
    with torch.no_grad():
        v = original.network(x, t, return_dict=False)[0]
    abar = original.scheduler.alphas_cumprod[t][:, None, None, None]
    assert torch.allclose(eps(model, inputs), abar.sqrt() * v + (1 - abar).sqrt() * x, atol=1e-6)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    model = load_model(str(edit(tmp_path / "model", "unet/config.json", sample_size=[8, 12])))
    assert model.sample_shape == (1, 8, 12)


@pytest.mark.parametrize("name", sorted(loading.SCHEDULERS))
def test_every_allowed_scheduler_keeps_its_class_and_its_schedule(name: str, tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "model")
    settings = loading.SCHEDULERS[name](beta_end=0.03, num_train_timesteps=50)
    settings.save_pretrained(folder / "scheduler")
    edit(folder, "model_index.json", scheduler=["diffusers", name])
    model = load_model(str(folder))
    assert type(model.scheduler) is loading.SCHEDULERS[name]
    assert torch.equal(model.scheduler.alphas_cumprod, settings.alphas_cumprod)
    assert model.scheduler.config["beta_end"] == 0.03
    assert torch.equal(make_scheduler(model.scheduler, "ddim-10").alphas_cumprod, settings.alphas_cumprod)


def test_defaults_of_the_scheduler_class_reach_other_samplers(tmp_path: Path) -> None:
    """Heun's beta_start is not DDIM's: a file that leaves it out must not change the schedule of a sampler."""
    folder = edit(tmp_path / "model", SCHEDULER, _class_name="HeunDiscreteScheduler", beta_start=..., beta_end=...)
    edit(folder, "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    model = load_model(str(folder))
    assert torch.equal(make_scheduler(model.scheduler, "ddim-10").alphas_cumprod, model.scheduler.alphas_cumprod)
    assert model.scheduler.config["beta_start"] == 0.00085


def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path: Path, original: Model, inputs: Any) -> None:
    load_model(str(flat(tmp_path / "model"))).save(tmp_path / "again")
    assert torch.allclose(eps(load_model(str(tmp_path / "again")), inputs), eps(original, inputs), atol=EXACT)


def test_nothing_is_printed_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(edit(tmp_path / "model", "unet/config.json", some_unknown_key=1)))
    assert capfd.readouterr().out == ""


# --- the other kinds --------------------------------------------------------------------------------------------------


def answers(model: Model) -> torch.Tensor:
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    return eps(model, (x, torch.tensor([0, 500, 999])))


def renamed(folder: Path, kind: str, subfolder: str) -> Path:
    """The network under "model" in model_index.json, as old repositories have it; "" for the flat layout."""
    for name, content in sound_files(kind).items():
        put(folder, name.replace("unet/", subfolder), content)
    return edit(folder, INDEX, unet=..., model=["diffusers", "UNet2DModel"])


def flat_ncsn(folder: Path) -> Path:
    """As google/ncsnpp-celebahq-256 is laid out."""
    for name, content in sound_files("ncsn").items():
        put(folder, name.removeprefix("unet/").removeprefix("scheduler/"), content)
    return folder


def without_index(folder: Path) -> Path:
    (folder / INDEX).unlink()
    return folder


OTHER_KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "ncsn": ("ncsn", lambda folder: write_sound(folder, "ncsn")),
    "ncsn_without_index": ("ncsn", lambda folder: without_index(write_sound(folder, "ncsn"))),
    "ncsn_flat": ("ncsn", flat_ncsn),
    "ncsn_flat_without_index": ("ncsn", lambda folder: without_index(flat_ncsn(folder))),
    "ncsn_model": ("ncsn", lambda folder: renamed(folder, "ncsn", "model/")),
    "ncsn_model_flat": ("ncsn", lambda folder: renamed(folder, "ncsn", "")),
    "ldm": ("ldm", lambda folder: write_sound(folder, "ldm")),
    "ldm_without_index": ("ldm", lambda folder: without_index(write_sound(folder, "ldm"))),
    "ddpm_model": ("ddpm", lambda folder: renamed(folder, "ddpm", "model/")),
}


@pytest.mark.parametrize("layout", OTHER_KINDS)
def test_every_kind_is_recognised_and_gives_the_same_network(layout: str, tmp_path: Path) -> None:
    kind, build = OTHER_KINDS[layout]
    folder = build(tmp_path / "model")
    before, first, model = tree(tmp_path), build_original(kind), load_model(str(folder))
    known = loading.SIGMAS if kind == "ncsn" else loading.SCHEDULE
    assert tree(tmp_path) == before
    assert (model.kind, model.sample_shape, model.image_shape) == (kind, first.sample_shape, first.image_shape)
    assert torch.equal(model.s, first.s)
    assert type(model.scheduler) is type(first.scheduler)
    assert all(model.scheduler.config[k] == v for k, v in first.scheduler.config.items() if k in known)
    assert torch.allclose(answers(model), answers(first), rtol=0, atol=EXACT)
    assert not any(p.requires_grad for p in model.network.parameters())
    assert model.provenance.notes == ()
    assert len(model.provenance.files) == len(list(folder.rglob("*.*")))


def test_the_autoencoder_is_loaded_frozen(tmp_path: Path) -> None:
    model, first = load_model(str(write_sound(tmp_path / "model", "ldm"))), build_original("ldm")
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z = first.encode(images)
    assert z.shape == (2, 3, 8, 8)
    assert torch.allclose(model.encode(images), z, atol=EXACT)
    assert torch.allclose(model.decode(z), first.decode(z), atol=1e-5)
    assert not model.autoencoder.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    assert model.autoencoder.state_dict().keys() == first.autoencoder.state_dict().keys()


@pytest.mark.parametrize("kind", ["ddpm", "ncsn", "ldm"])
def test_stock_diffusers_loads_what_a_loaded_model_saves(kind: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    load_model(str(write_sound(tmp_path / "model", kind))).save(tmp_path / "again")
    stock, first = DiffusionPipeline.from_pretrained(tmp_path / "again"), build_original(kind)
    parts = [(stock.unet, first.network)] + ([(stock.vqvae, first.autoencoder)] if kind == "ldm" else [])
    for part, network in parts:
        values = part.state_dict()
        assert all(torch.equal(values[k], v) for k, v in network.state_dict().items())
        assert len(values) == len(network.state_dict())
    again = load_model(str(tmp_path / "again"))
    assert again.kind == kind
    assert torch.allclose(answers(again), answers(first), rtol=0, atol=EXACT)


def test_the_sigmas_are_the_folders_own(tmp_path: Path) -> None:
    folder = edit(write_sound(tmp_path / "model", "ncsn"), SCHEDULER, sigma_max=50, snr=0.2, num_train_timesteps=30)
    model = load_model(str(edit(folder, SCHEDULER, sigma_min=..., correct_steps=2, beta_start="ignored")))
    assert model.T == 30
    assert [round(float(model.s[i]), 4) for i in (0, -1)] == [0.01, 50]
    assert (model.scheduler.config["snr"], model.scheduler.config["correct_steps"]) == (0.2, 2)


def test_the_blocks_of_ncsnpp_load(tmp_path: Path) -> None:
    """NCSN++ with its skip connections, as google/ncsnpp-celebahq-256 has them, old names of the attention included."""
    from diffusers import ScoreSdeVeScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=None,
        attention_head_dim=None,
        norm_eps=1e-6,
        mid_block_scale_factor=2**0.5,
        time_embedding_type="fourier",
    )
    first = Model(network.eval(), ScoreSdeVeScheduler(), (3, 16, 16), "ncsn")
    first.save(tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    values = network.state_dict()
    for new, name in old.items():
        values = {k.replace(f".{new}.", f".{name}."): v for k, v in values.items()}
    put(tmp_path / "model", WEIGHTS, save(values))
    model = load_model(str(tmp_path / "model"))
    assert torch.allclose(answers(model), answers(first), rtol=1e-4, atol=1e-4)


def test_an_autoencoder_with_a_codebook_of_its_own_width_loads(tmp_path: Path) -> None:
    """The network works on what the codebook holds, which need not be as wide as the encoder's output."""
    from diffusers import LDMPipeline, VQModel

    first = build_original("ldm")
    fields = {**first.autoencoder.config, "latent_channels": 4, "vq_embed_dim": 3}
    LDMPipeline(
        vqvae=VQModel(**{k: v for k, v in fields.items() if not k.startswith("_")}),
        unet=first.network,
        scheduler=first.scheduler,
    ).save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model")).encode(torch.zeros(1, 1, 16, 16)).shape == (1, 3, 8, 8)


# --- the hub ----------------------------------------------------------------------------------------------------------


def hub_cache(root: Path) -> Path:
    """A snapshot as the hub cache lays it out: links into the blobs of the same repository."""
    snapshot = root / "models--owner--name" / "snapshots" / COMMIT
    for i, (name, content) in enumerate(sound_files().items()):
        blob = put(snapshot.parent.parent, f"blobs/{i}", content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def fake_download(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr("elijah.folder.snapshot_download", download)
    return calls


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_id_is_downloaded(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Model, inputs: Any
) -> None:
    calls = fake_download(monkeypatch, hub_cache(tmp_path))
    model = load_model("owner/name", revision="main", offline=offline)
    assert torch.allclose(eps(model, inputs), eps(original, inputs), atol=EXACT)
    assert (model.provenance.source, model.provenance.revision) == ("owner/name", COMMIT)
    (call,) = calls
    assert (call["repo_id"], call["revision"], call["local_files_only"]) == ("owner/name", "main", offline)
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in call["allow_patterns"])


def test_the_hub_patterns_fetch_what_is_read_and_no_more() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [*sound_files("ldm"), "config.json", f"unet/{STEM}-00001-of-00002.safetensors", f"{STEM}.fp16.safetensors"]
    wanted += ["model/config.json", f"model/{STEM}.safetensors", f"vqvae/{STEM}.fp16.safetensors"]
    others = [f"unet/{STEM}.bin", "pytorch_model.bin", "vae/config.json", "README.md", "a.py", "big.safetensors"]
    others += [f"vqvae/{STEM}.bin", "vqvae/a.py", "vqvae/b.safetensors", "model/optimizer.pt", "bert/config.json"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=HUB_FILES)) == wanted


def test_links_of_a_snapshot_are_followed_only_into_its_own_blobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(tmp_path)
    with pytest.raises(ElijahError, match="a link that leaves the folder"):
        load_model(str(snapshot))  # given by path, it may be anybody's
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(put(tmp_path, "models--owner--other/blobs/1", sound_files()[WEIGHTS]))
    fake_download(monkeypatch, snapshot)
    with pytest.raises(ElijahError, match=f"{WEIGHTS}: a link that leaves the folder"):
        load_model("owner/name")


def test_a_hub_model_without_safetensors_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / WEIGHTS).unlink()
    fake_download(monkeypatch, snapshot)
    with pytest.raises(Unsupported, match=r"DiffusionPipeline.from_pretrained.*owner/name.*use_safetensors=False"):
        load_model("owner/name")


def test_a_model_that_is_not_cached_says_so_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real snapshot_download, which must not look at the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ElijahError, match=r"owner/name: .*leave out --offline") as caught:
        load_model("owner/name", offline=True)
    assert caught.value.exit_code == 2


def test_failures_of_the_hub_are_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    causes = {
        hub.LocalEntryNotFoundError("a\nb"): "check the network",
        hub.HFValidationError("a\nb"): "not a hub id",
        ConnectionResetError("a\nb"): "the download failed: ConnectionResetError",
        KeyError("a\nb"): "the download failed: KeyError",
    }
    for kind, remedy in {
        hub.RepositoryNotFoundError: "no such model on the hub",
        hub.GatedRepoError: "accept its terms",
        hub.RevisionNotFoundError: "no such revision",
    }.items():
        causes[kind.__new__(kind)] = remedy
    for cause, remedy in causes.items():
        fake_download(monkeypatch, cause)
        with pytest.raises(ElijahError, match=f"^owner/name: .*{remedy}") as caught:
            load_model("owner/name")
        assert caught.value.exit_code == 2
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "source", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c", "", "x" * 5000]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_download(monkeypatch, AssertionError())
    with pytest.raises(ElijahError) as caught:
        load_model(source)
    assert caught.value.exit_code == 2
    assert calls == []


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ElijahError, match="--revision"):
        load_model(str(write_sound(tmp_path / "model")), revision="main")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_line_and_left_alone(name: str, tmp_path: Path) -> None:
    build, exit_code = HOSTILE[name]
    folder = build(tmp_path / "model")
    before = tree(tmp_path)
    with pytest.raises(ElijahError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert caught.value.exit_code == exit_code, message
    assert message.isprintable()
    assert 10 < len(message) < 600
    assert not marker(folder).exists()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "wrong_library": r"model_index.json: scheduler is \['os', 'system'\]",
        "custom_pipeline": "model_index.json: .*my_pipeline.*custom code is never run",
        "text_conditioned": "StableDiffusionPipeline, text-conditioned",
        "edm_scheduler": "EDMEulerScheduler, an EDM process",
        "class_conditional": "unet/config.json: a class-conditional network",
        "learned_variance": "unet/config.json: out_channels 2 for in_channels 1: a learned variance",
        "link_weights": f"{WEIGHTS}: a link that leaves the folder",
        "nan_beta": "scheduler/scheduler_config.json: beta_start must be a number from 0 to 1 and is nan",
        "truncated_weights": f"{WEIGHTS}: not a sound safetensors file: .*",
        "lfs_pointer": "git lfs pull",
        "nan_weights": f"{WEIGHTS}: tensor conv_in.bias has values that are not finite",
        "missing_tensor": "1 tensors of the network are missing: conv_in.bias",
        "extra_tensor": r"tensor a\?\?\[31mb is not part of the network",
        "wrong_shape": r"tensor conv_in.bias is \[9\] and must be \[8\]",
        "integer_weights": "tensor conv_in.bias is I32",
        "too_many_parameters": "more than 5000000000 parameters",
        "wrong_groups": "make no working network: .*divisible",
        "fourier_with_preserving_scheduler": "unet/config.json: .*NCSN.* network with a DDPMScheduler cannot",
        "positional_with_exploding_scheduler": "time_embedding_type positional: .* with a ScoreSdeVeScheduler",
        "exploding_scheduler_in_pixel_pipeline": "ScoreSdeVeScheduler in a pipeline of kind ddpm cannot be scanned",
        "sigmas_fall": "scheduler/scheduler_config.json: sigma_min 380.0 is not below sigma_max 0.01",
        "sigma_is_text": "sigma_max must be a number from 1e-06 to 100000 and is 380",
        "no_fourier_weights": "1 tensors of the network are missing: time_proj.weight",
        "autoencoder_nan": f"vqvae/{STEM}.safetensors: tensor quantize.embedding.weight has values that are not finite",
        "autoencoder_other_latents": "vqvae/config.json: latents of 4 channels, and the network's in_channels are 3",
        "autoencoder_other_embedding": "vqvae/config.json: latents of 4 channels",
        "autoencoder_too_many_parameters": "vqvae/config.json: more than 5000000000 parameters",
        "autoencoder_huge_image": "vqvae/config.json: images of 2048 x 2048",
        "autoencoder_only_pickle": f"vqvae/{STEM}.bin is a pickle.*VQModel.from_pretrained.*use_safetensors=False",
        "variational_autoencoder": "AutoencoderKL, a variational autoencoder, cannot be scanned",
        "autoencoder_wrong_class": "'?MyVQModel'? is no autoencoder class of diffusers",
        "autoencoder_uneven": r"not an autoencoder: it goes from \[3, 8, 8\] to \[1, 32, 32\] to \[3, 8, 8\]",
        "autoencoder_link": f"vqvae/{STEM}.safetensors: a link that leaves the folder",
        "only_pickle": f"unet/{STEM}.bin is a pickle.*UNet2DModel.from_pretrained.*use_safetensors=False",
        "image_conditioned": "out_channels 1 for in_channels 6: a network conditioned on an image cannot be scanned",
        "fifo": "unet/config.json: is missing in .*, or no regular file",
        "missing": "no such folder",
    }.items(),
)
def test_a_refusal_says_which_file_and_why(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ElijahError, match=words):
        load_model(str(HOSTILE[name][0](tmp_path / "model")))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", ""])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ElijahError, match="--device"):
        load_model(str(tmp_path), device=device)


def test_device_auto_is_one_that_works(tmp_path: Path, original: Model) -> None:
    model = load_model(str(write_sound(tmp_path / "model")), device="auto", dtype=torch.bfloat16)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else model.device.type)
    assert model.dtype == torch.bfloat16
    assert next(model.network.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("scratch") / "model")


def refused_or_loaded(folder: Path) -> None:
    """Any exception but ElijahError fails the test."""
    try:
        model = load_model(str(folder))
    except ElijahError as error:
        assert str(error).isprintable()
    else:
        assert all(torch.isfinite(p).all() for p in model.network.parameters())


def header_bytes() -> int:
    return 8 + int(struct.unpack("<Q", sound_files()[WEIGHTS][:8])[0])


QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(data=st.data())
def test_a_corrupt_header_is_refused_or_harmless(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(sound_files()[WEIGHTS])
    places = st.integers(0, 15) | st.integers(0, header_bytes() - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.sampled_from(b'\x00\xff09-[]{}",:') | st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, 12) | st.integers(0, len(content))) :]
    put(scratch, WEIGHTS, bytes(content))
    refused_or_loaded(scratch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("Scheduler"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@QUICK
@given(data=st.data(), kind=st.sampled_from(["ddpm", "ncsn", "ldm"]))
def test_any_value_in_any_field_is_refused_or_harmless(scratch: Path, data: st.DataObject, kind: str) -> None:
    folder, sound = scratch.parent / kind, sound_files(kind)
    for name, content in sound.items():
        put(folder, name, content)
    name = data.draw(st.sampled_from([n for n in sorted(sound) if n.endswith(".json")]))
    fields = [*json.loads(sound[name]), "_use_default_values", "auto_map"]
    edit(folder, name, **{data.draw(st.sampled_from(fields)): data.draw(JSON)})
    refused_or_loaded(folder)
