"""Backbones and models by name: small ones of our own, torchvision's, timm's, or yours."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice

__all__ = [
    "SmallCNN",
    "build",
    "load_weights",
    "resnet18_narrow",
    "resnet32",
    "resnet32_wide",
    "small_cnn",
]


class SmallCNN(nn.Module):
    """Four 3×3 convolutions with BN and ReLU, then global average pooling.

    The first has stride 2; max-pooling follows the second and third (skipped once the map is one
    pixel wide). ``num_features`` is the width of the last.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        channels = (in_channels, *widths)
        self.num_features = widths[-1]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2 if i == 0 else 1, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
            )
            for i, (a, b) in enumerate(itertools.pairwise(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, num_features] of images [N, C, H, W]."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (1, 2) and min(x.shape[-2:]) > 1:
                x = F.max_pool2d(x, 2)
        return reduce(x, "n c h w -> n c", "mean")


def small_cnn(
    in_channels: int = 1, widths: tuple[int, int, int, int] = (8, 16, 32, 64)
) -> SmallCNN:
    """Backbone of the Fashion-MNIST experiments: 24.5 k weights, 64 features.

    Args:
        in_channels: C of the images.
        widths: channels of the four convolutions.
    """
    return SmallCNN(in_channels, widths)


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (option A)."""

    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.extra = stride, planes - planes_in

    def forward(self, x: Tensor) -> Tensor:
        """[N, planes_in, H, W] → [N, planes, H/stride, W/stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        left = self.extra // 2
        short = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, left, self.extra - left)
        )
        return F.relu(out + short)


class _ResNetCIFAR(nn.Module):
    def __init__(self, in_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        planes = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(_BasicBlock(planes, width << stage, stride))
                planes = width << stage
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, num_features] of images [N, C, H, W]."""
        features: Tensor = reduce(self.layers(x), "n c h w -> n c", "mean")
        return features


def resnet32(in_channels: int = 3, width: int = 16) -> nn.Module:
    """CIFAR ResNet-32 backbone (464 k parameters, 64 features) of the long-tailed literature.

    Args:
        in_channels: C of the images.
        width: channels of the first stage.

    References:
        He et al. 2016, arXiv:1512.03385, §4.2 (n = 5, identity shortcuts).
    """
    return _ResNetCIFAR(in_channels, width, 5)


def resnet32_wide(in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet-32 backbone of twice the width, 128 features: ETF + DR on CIFAR-100.

    Args:
        in_channels: C of the images.
    """
    return resnet32(in_channels, 32)


class _Narrow(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        from torchvision.models import resnet18

        super().__init__()
        self.num_features = dim
        net = resnet18()
        last: Any = net.layer4[1]
        last.conv2 = nn.Conv2d(512, dim, 3, padding=1, bias=False)
        last.bn2 = nn.BatchNorm2d(dim)
        last.downsample = nn.Sequential(nn.Conv2d(512, dim, 1, bias=False), nn.BatchNorm2d(dim))
        for conv in (last.conv2, last.downsample[0]):  # as torchvision initialises the others
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if in_channels != 3:
            net.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        net.fc = nn.Identity()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, dim] of images [N, C, H, W]."""
        features: Tensor = self.net(x)
        return features


def resnet18_narrow(in_channels: int = 3, dim: int = 10) -> nn.Module:
    """ResNet-18 of torchvision with ``dim`` channels out of its last block, as a backbone.

    With dim = K the classifier's rows are square, and the last convolution loses most of its
    weights: a fifth of the model at dim = 10.

    Args:
        in_channels: C of the images.
        dim: features D.

    References:
        Zhu et al., NeurIPS 2021, arXiv:2105.02375 (the classifier fixed, and D = K).
    """
    return _Narrow(in_channels, dim)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet32": resnet32,
    "resnet32_wide": resnet32_wide,
    "resnet18_narrow": resnet18_narrow,
}


def build(name: str, *, in_channels: int = 3, weights: str | None = None) -> nn.Module:
    """A model or backbone by name.

    Args:
        name: ``small_cnn``, ``resnet32``, ``resnet32_wide`` or ``resnet18_narrow`` (backbones),
            ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory``, a callable without
            arguments.
        in_channels: C of the images, for our backbones.
        weights: for torchvision a weights name such as ``DEFAULT`` or a file, for the others a
            file with a ``state_dict`` (safetensors or torch); None leaves the random start.

    Raises:
        InputError: an unknown name, a missing package, or weights that cannot be had.
    """
    home, _, leaf = name.partition(":")
    if not leaf:
        check_choice(name, [*BACKBONES, "torchvision:NAME", "timm:NAME", "module:factory"], "model")
        model = BACKBONES[name](in_channels=in_channels)
    elif home == "torchvision":
        from torchvision import models

        check_choice(leaf, models.list_models(module=models), "torchvision model")
        hub = weights if weights and not os.path.exists(weights) else None
        try:
            model = models.get_model(leaf, weights=hub)
        except KeyError as error:
            raise InputError(
                f"{hub!r} is neither a file nor the name of torchvision weights for {leaf}."
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot get torchvision weights {hub!r} for {leaf}: {error}. "
                "Without a network pass --weights FILE."
            ) from error
        if hub:
            return model  # type: ignore[no-any-return]
    elif home == "timm":
        try:
            import timm
        except ImportError as error:
            raise InputError("timm is not installed: pip install 'ncmethods[timm]'.") from error
        try:
            model = timm.create_model(leaf, pretrained=False)
        except RuntimeError as error:
            near = ", ".join(timm.list_models(f"*{leaf[:6]}*")[:5])
            raise InputError(f"timm has no model {leaf!r}. Near it: {near or 'none'}.") from error
    else:
        try:
            factory = getattr(importlib.import_module(home), leaf)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"Cannot import {leaf!r} from {home!r}: {error}.") from error
        model = factory()
        if not isinstance(model, nn.Module):
            raise InputError(f"{name} must return an nn.Module, got {type(model).__name__}.")
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a ``state_dict`` file (safetensors, or torch with ``weights_only=True``) into a model.

    Raises:
        InputError: a missing or damaged file, or one of another architecture.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise InputError(f"Cannot read weights from {path}: {error}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"The weights in {path} do not fit {type(model).__name__}: {error}"
        ) from error
