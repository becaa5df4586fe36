"""Two pretrained networks that judge images: Inception-v3 for the FID, AlexNet for LPIPS.

Both are written out here, so that neither torchvision nor a download is needed; their weights are plain state dicts in
$ELIJAH_DATA/weights. Images are float tensors [N, C, H, W] on [0, 1] with C = 3, or 1 for grey.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elijah.data import data_root
from elijah.diffusion import Progress, no_progress
from elijah.errors import ElijahError

INCEPTION_FILE = "inception_fid_fp16.pth"
ALEXNET_FILE = "alexnet_features_fp16.pth"
BATCH_NORM_EPS = 0.001  # TensorFlow's Inception
LPIPS_MIN_SIDE = 32  # under 31 pixels AlexNet's last feature map would be empty


class Spec(NamedTuple):
    """One convolution with its ReLU. Stride 1 keeps the size, stride 2 pads nothing."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


Pool = Literal["average", "max", "max/2"]
Branch = list[Spec | Pool | tuple[Spec, ...]]  # a tuple's convolutions share one input; their outputs are joined


class Conv(nn.Conv2d):
    """Convolution, then ReLU; its bias holds the folded batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class Block(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, channels: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = sum(self._build(channels, branch) for branch in branches)

    def _build(self, channels: int, branch: Branch) -> int:
        for step in branch:
            if isinstance(step, str):
                continue
            specs = (step,) if isinstance(step, Spec) else step
            for name, out, kernel, stride in specs:
                padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else 0
                self.add_module(name, Conv(channels, out, kernel, stride, padding))
            channels = sum(spec.channels for spec in specs)
        return channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(x, branch) for branch in self.branches], 1)

    def _run(self, x: Tensor, branch: Branch) -> Tensor:
        for step in branch:
            if step == "average":
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif step == "max":
                x = F.max_pool2d(x, 3, 1, 1)
            elif step == "max/2":
                x = F.max_pool2d(x, 3, 2)
            elif isinstance(step, Spec):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(spec.name)(x) for spec in step], 1)
        return x


def _square(name: str, channels: int, side: int, stride: int = 1) -> Spec:
    return Spec(name, channels, (side, side), stride)


def _mixed_5(pool: int) -> list[Branch]:
    """35 x 35 pixels (figure 5 of the paper)."""
    return [
        [_square("branch1x1", 64, 1)],
        [_square("branch5x5_1", 48, 1), _square("branch5x5_2", 64, 5)],
        [_square("branch3x3dbl_1", 64, 1), _square("branch3x3dbl_2", 96, 3), _square("branch3x3dbl_3", 96, 3)],
        ["average", _square("branch_pool", pool, 1)],
    ]


def _mixed_6a() -> list[Branch]:
    """35 to 17 pixels."""
    double: Branch = [_square("branch3x3dbl_1", 64, 1), _square("branch3x3dbl_2", 96, 3)]
    return [[_square("branch3x3", 384, 3, 2)], [*double, _square("branch3x3dbl_3", 96, 3, 2)], ["max/2"]]


def _mixed_6(c: int) -> list[Branch]:
    """17 x 17 pixels, 7 x 7 convolutions in two factors (figure 6)."""
    single: Branch = [_square("branch7x7_1", c, 1), Spec("branch7x7_2", c, (1, 7)), Spec("branch7x7_3", 192, (7, 1))]
    double: Branch = [_square("branch7x7dbl_1", c, 1), Spec("branch7x7dbl_2", c, (7, 1))]
    double += [
        Spec("branch7x7dbl_3", c, (1, 7)),
        Spec("branch7x7dbl_4", c, (7, 1)),
        Spec("branch7x7dbl_5", 192, (1, 7)),
    ]
    return [[_square("branch1x1", 192, 1)], single, double, ["average", _square("branch_pool", 192, 1)]]


def _mixed_7a() -> list[Branch]:
    """17 to 8 pixels."""
    single: Branch = [_square("branch3x3_1", 192, 1), _square("branch3x3_2", 320, 3, 2)]
    double: Branch = [_square("branch7x7x3_1", 192, 1), Spec("branch7x7x3_2", 192, (1, 7))]
    return [single, [*double, Spec("branch7x7x3_3", 192, (7, 1)), _square("branch7x7x3_4", 192, 3, 2)], ["max/2"]]


def _mixed_7(pool: Pool) -> list[Branch]:
    """8 x 8 pixels, forked (figure 7)."""
    fork = (Spec("branch3x3_2a", 384, (1, 3)), Spec("branch3x3_2b", 384, (3, 1)))
    double_fork = (Spec("branch3x3dbl_3a", 384, (1, 3)), Spec("branch3x3dbl_3b", 384, (3, 1)))
    return [
        [_square("branch1x1", 320, 1)],
        [_square("branch3x3_1", 384, 1), fork],
        [_square("branch3x3dbl_1", 448, 1), _square("branch3x3dbl_2", 384, 3), double_fork],
        [pool, _square("branch_pool", 192, 1)],
    ]


class InceptionFeatures(nn.Module):
    """Inception-v3 (Szegedy et al. 2016) up to its 2,048 pooled features, as the FID uses it.

    This is TensorFlow's network of 2015-12-05: its average pools leave out the padding, and its last block has a max
    pool. Submodules are named as in torchvision; batch norms are folded into the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        blocks = {"5b": _mixed_5(32), "5c": _mixed_5(64), "5d": _mixed_5(64), "6a": _mixed_6a()}
        blocks |= {"6b": _mixed_6(128), "6c": _mixed_6(160), "6d": _mixed_6(160), "6e": _mixed_6(192)}
        blocks |= {"7a": _mixed_7a(), "7b": _mixed_7("average"), "7c": _mixed_7("max")}
        self.mixed = [f"Mixed_{name}" for name in blocks]
        channels = 192
        for name, branches in blocks.items():
            block = Block(channels, branches)
            self.add_module(f"Mixed_{name}", block)
            channels = block.channels

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3 or 1, H, W] on [0, 1], any size -> [N, 2048]."""
        x = _three_channels(images)
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.mixed:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def load_inception(path: Path | str | None = None) -> InceptionFeatures:
    """InceptionFeatures from a state dict with pytorch-fid's names, ready for use, without gradients.

    path: None is $ELIJAH_DATA/weights/inception_fid_fp16.pth. Raises ElijahError when the file is missing or another.
    """
    file = _weights_file(path, INCEPTION_FILE)
    state = _read(file)
    network = InceptionFeatures()
    try:
        network.load_state_dict(_fold(state))
    except (KeyError, RuntimeError) as error:
        raise ElijahError(f"{file}: not the weights of the FID's Inception network") from error
    for kernel in (p for p in network.parameters() if p.ndim == 4):
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def inception_features(
    images: Tensor,
    *,
    network: InceptionFeatures | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> Tensor:
    """The FID features [N, 2048], float32 on the CPU, of images [N, 3 or 1, H, W]: on [0, 1], or uint8.

    network: None loads the stock weights. For a FID like others' round samples to uint8 first, as image files do.
    """
    network = network or load_inception()
    device = next(network.parameters()).device
    parts = []
    for k, chunk in enumerate(images.split(batch_size)):
        x = chunk.to(device).float() / (1 if images.is_floating_point() else 255)
        parts.append(network(x).cpu())
        progress("inception features", min((k + 1) * batch_size, len(images)), len(images))
    return torch.cat(parts) if parts else torch.empty(0, 2048)


class Lpips(nn.Module):
    """LPIPS v0.1 on AlexNet (Zhang et al. 2018): a weighted squared distance of unit-length features of five layers.

    Images whose shorter side is under 32 pixels are enlarged to 32 first (bilinear); larger ones go in as they are.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                "0": Conv(3, 64, 11, stride=4, padding=2),
                "3": Conv(64, 192, 5, padding=2),
                "6": Conv(192, 384, 3, padding=1),
                "8": Conv(384, 256, 3, padding=1),
                "10": Conv(256, 256, 3, padding=1),
            }
        )
        self.weights = nn.ParameterList(torch.empty(1, c, 1, 1) for c in (64, 192, 384, 256, 256))
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, 3 or 1, H, W] on [0, 1] -> [B], 0 for identical images; gradients flow to both."""
        pairs = zip(self._layers(x), self._layers(y), self.weights, strict=True)
        return torch.stack([((a - b).square() * w).sum(1).mean((1, 2)) for a, b, w in pairs]).sum(0)

    def _layers(self, images: Tensor) -> list[Tensor]:
        x = _three_channels(images) * 2 - 1
        short = min(x.shape[-2:])
        if short < LPIPS_MIN_SIDE:
            size = [round(side * LPIPS_MIN_SIDE / short) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale
        layers = []
        for name, convolution in self.features.items():
            x = convolution(F.max_pool2d(x, 3, 2) if name in ("3", "6") else x)
            layers.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return layers


def lpips_available() -> bool:
    """True where load_lpips() finds both of its files."""
    try:
        _weights_file(None, ALEXNET_FILE)
        _linear_weights()
    except ElijahError:
        return False
    return True


def load_lpips(path: Path | str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The LPIPS distance: (x, y) [B, 3 or 1, H, W] on [0, 1] -> [B].

    path: AlexNet's convolutions with torchvision's names; None is $ELIJAH_DATA/weights/alexnet_features_fp16.pth. The
    five layers' weights are those inside torchmetrics. Raises ElijahError when a file is missing or another.
    """
    file = _weights_file(path, ALEXNET_FILE)
    state = _read(file)
    linear = _read(_linear_weights())
    state |= {f"weights.{i}": linear.get(f"lin{i}.model.1.weight", torch.empty(0)) for i in range(5)}
    distance = Lpips()
    try:
        distance.load_state_dict(state)
    except RuntimeError as error:
        raise ElijahError(f"{file}: not the weights of AlexNet's convolutions") from error
    return distance.eval().requires_grad_(False)


def _linear_weights() -> Path:
    package = find_spec("torchmetrics")
    if package is None or not package.submodule_search_locations:
        raise ElijahError("LPIPS needs torchmetrics: pip install 'elijah-scan[bench]'")
    return Path(package.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / "alex.pth"


def _fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NAME.conv and NAME.bn as one convolution with a bias."""
    folded = {}
    for key in (k for k in state if k.endswith(".conv.weight")):
        name = key.removesuffix(".conv.weight")
        gamma, beta, mean, var = (state[f"{name}.bn.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        scale = gamma / (var + BATCH_NORM_EPS).sqrt()
        folded[f"{name}.weight"] = state[key] * scale[:, None, None, None]
        folded[f"{name}.bias"] = beta - mean * scale
    return folded


def _weights_file(path: Path | str | None, name: str) -> Path:
    file = Path(path) if path is not None else data_root() / "weights" / name
    if not file.is_file():
        raise ElijahError(f"{file}: no such weights file; set ELIJAH_DATA to a folder with weights/{name}")
    return file


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {k: v.float() for k, v in state.items()}
    except (OSError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ElijahError(f"{file}: not a readable state dict") from error


def _three_channels(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ElijahError(f"images must be [N, 3, H, W] or [N, 1, H, W], not {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)
