"""What a run is made of: the model by name, and the hyperparameters of the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ncmethods import frames, heads, models
from ncmethods._core import InputError, check_choice, check_num_classes
from ncmethods.data import Sampling
from ncmethods.heads import Classifier
from ncmethods.heads.skip import PartlyTuned

__all__ = ["HEADS", "ModelConfig", "TrainConfig", "build_model", "lr_factor"]

HEADS = (
    "linear",
    *(n for n in heads.__all__ if n.endswith("_head") and n not in {"find_head", "swap_head"}),
)


@dataclass(frozen=True)
class ModelConfig:
    """A Classifier that can be built again from its description.

    Args:
        backbone: a name for :func:`ncmethods.models.build`.
        in_channels: C of the images.
        num_classes: K.
        head: ``"linear"``, or a builder in ``ncmethods.heads`` such as ``"etf_head"``.
        head_args: keyword arguments of the builder, as JSON keeps them: a ``frame`` is the name of
            a function in ``ncmethods.frames``.
        weights: start weights of the backbone, as in :func:`ncmethods.models.build`.
        tuned: dotted names of the modules of the backbone that are trained, beside the head; the
            rest is frozen and stays in eval mode. None trains all of it, () the head only.
        skip: dotted name of a module of the backbone whose pooled output is added to the features,
            as :class:`ncmethods.heads.skip.PartlyTuned` says.
        normalisation: mean and standard deviation of each channel of the images, pixels in [0, 1],
            that ``weights`` expect; None takes those of the training images.
    """

    backbone: str
    in_channels: int
    num_classes: int
    head: str = "linear"
    head_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    tuned: tuple[str, ...] | None = None
    skip: str | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None


def build_model(config: ModelConfig, *, seed: int = 0) -> Classifier:
    """The Classifier that ``config`` describes, initialised from ``seed`` alone.

    Raises:
        InputError: an unknown backbone or head.
    """
    check_choice(config.head, HEADS, "head")
    K = check_num_classes(config.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.build(config.backbone, in_channels=config.in_channels, weights=config.weights)
        builder: Any = nn.Linear if config.head == "linear" else getattr(heads, config.head)
        make = partial(builder, **_head_args(config))
        if ":" not in config.backbone:
            return _partly(config, Classifier(net, make(net.num_features, K)), make)
        model = _partly(config, Classifier.from_model(net, make, num_classes=K), make)
        if config.in_channels == 1 and config.backbone.startswith(("torchvision:", "timm:")):
            model.backbone = nn.Sequential(GrayToRGB(), model.backbone)
        return model


def _partly(config: ModelConfig, model: Classifier, make: Any) -> Classifier:
    """``model`` with what is frozen and the skip connection that ``config`` asks for, if any."""
    if config.tuned is None:
        if config.skip is not None:
            raise InputError("skip needs tuned: name the modules that are trained, as (skip,).")
        return model
    if config.skip is None:
        return Classifier(PartlyTuned(model.backbone, config.tuned), model.head)
    spec = models.input_spec(config.backbone, model.backbone)
    side = spec.size if spec else 32
    example = torch.zeros(1, 3 if ":" in config.backbone else config.in_channels, side, side)
    net = PartlyTuned(model.backbone, config.tuned, skip=config.skip, images=example)
    head: Any = model.head
    if net.num_features != head.weight.shape[1]:  # the block is wider than the last layer
        head = make(net.num_features, config.num_classes)
    return Classifier(net, head)


def _head_args(config: ModelConfig) -> dict[str, Any]:
    """The arguments of the head's builder, with the frame that a name stands for."""
    if config.head != "frame_head":
        return config.head_args
    name = config.head_args.get("frame", "")
    check_choice(name, frames.__all__, "frame")
    return config.head_args | {"frame": getattr(frames, name)}


class GrayToRGB(nn.Module):
    """Grey images for models that expect colour: [N, 1, H, W] → [N, 3, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """The one channel three times."""
        return x.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of the loop."""

    epochs: int = 40
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step over all ranks."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on all trained parameters."""
    backbone_lr: float = 1.0
    """Factor on both for the backbone, under 1 for one that has been trained before."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    milestones: tuple[float, ...] = (0.8, 0.9)
    """Fractions of the run after which the step schedule multiplies lr by gamma."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 is off."""
    mixup: float = 0.0
    """Beta(a, a) of mixup; 0 is off."""
    sampling: Sampling = "instance"
    """Classes are shown by n_c, by √n_c, equally often, or from the first to the third."""
    crop: int = 0
    """Zero padding of random crops in pixels; 0 is off."""
    flip: bool = False
    """Random horizontal mirroring."""
    views: int = 1
    """Augmented copies of each image in a batch; contrastive losses want 2, and crop or flip."""
    outliers: str = ""
    """Auxiliary outliers, two for each image of a batch, for losses that name outlier_features or
    outlier_logits: a dataset, or a pattern such as photos. Take none that you test on."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    threads: int = 0
    """CPU threads, kept with the run; 0 takes torch's default on this machine."""
    measurements: int = 10
    """How often per run accuracy and geometry are measured, the end included."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0 writes them at the end of epochs, 100 steps apart or more."""

    def __post_init__(self) -> None:
        """Check what would only fail in the middle of a run."""
        check_choice(self.schedule, ("cosine", "step", "constant"), "schedule")
        check_choice(self.sampling, get_args(Sampling), "sampling")
        for name in ("epochs", "batch_size", "measurements", "views"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be positive and finite, got {self.lr}.")
        for name in (
            "weight_decay",
            "backbone_lr",
            "warmup_epochs",
            "clip_norm",
            "mixup",
            "crop",
            "threads",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if self.checkpoint_steps < 0:
            raise InputError(f"checkpoint_steps must be at least 0, got {self.checkpoint_steps}.")

    def measured(self, epoch: int) -> bool:
        """Whether geometry is measured after ``epoch`` (counted from 1)."""
        n = min(self.measurements, self.epochs)
        return (epoch * n) // self.epochs > ((epoch - 1) * n) // self.epochs


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step as a share of the peak: linear warm-up, then the schedule.

    Args:
        config: hyperparameters.
        step: counted from 0 over the whole run.
        steps_per_epoch: of the loader.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if config.schedule == "step":
        return config.gamma ** sum(step >= m * total for m in config.milestones)
    return 1.0
