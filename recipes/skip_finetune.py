"""Skip-layer fine-tuning: one block and the classifier, with a way past the frozen layers.

    ncmethods skip-finetune
    ncmethods skip-finetune --sources runs/a/ce/seed0 --block blocks.2 --data.name digits
    ncmethods skip-finetune --sources torchvision:resnet18 --block layer3 --data.name image-folder \
        --data.root photos
    ncmethods skip-finetune --sources efficientnet-lite0 --block net._blocks.10 --size 96

Trains all of a pretrained network on the target (full), only a new classifier (linear), one block
and the classifier (layer), and the same with the block's pooled output added to the features
(skip). Each method chooses its learning rate from the same candidates on held-out images. Printed
are accuracy, trained parameters, and NC1 of the features before and after. A killed command resumes.

Without --sources it trains small networks on letters first, one for each seed.

The measured claims, with commands and seeds, stand in docs/methods/skip-finetune.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods import data, metrics, models, training, viz
from ncmethods._core import InputError, atomic_path, check_choice, write_text
from ncmethods.data import ImageData, Splits, TailConfig
from ncmethods.data.outliers import fitted
from ncmethods.features import extract
from ncmethods.heads.skip import PartlyTuned
from ncmethods.tracking import read_rows
from ncmethods.training import (
    Method,
    ModelConfig,
    TrainConfig,
    build_model,
    fit,
    grid,
    jobs_of,
    sweep,
    tune,
)
from ncmethods.training.config import GrayToRGB


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, labels)


METHODS = ("full", "linear", "layer", "skip")
TABLE = {
    "all %": ("test/accuracy", 100, 1),
    "trained": ("finetune/parameters", 1, 0),
    "NC1 before": ("finetune/nc1_before", 1, 2),
    "NC1 after": ("train/nc1/pinv", 1, 2),
    "NC1 test": ("test/nc1/pinv", 1, 2),
    "rate": ("finetune/lr", 1, 4),
}
PANELS = {
    "test/accuracy": "accuracy",
    "train/nc1/pinv": "NC1, training set",
    "test/nc1/pinv": "NC1, test set",
}


@dataclass(frozen=True)
class SkipFinetune:
    """Fine-tune all, the classifier, one block, or one block with a skip connection."""

    sources: tuple[str, ...] = ()
    """What is fine-tuned: run directories (one, or one for each seed), torchvision:NAME, timm:NAME,
    efficientnet-lite0 (1, 2), or NAME=FILE with the weights of a model. Without any, a small_cnn is
    trained on glyphs-mini for each seed."""
    block: str | None = None
    """Dotted name of the block that layer and skip train, as layer3; without --sources blocks.2."""
    methods: tuple[str, ...] = METHODS
    """Any of: full, linear, layer, skip."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed."""
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Learning rates to choose from by held-out images of the first seed, for each method alike."""
    size: int | None = None
    """Side of the images; None takes what the source was trained on."""
    out: Path = Path("runs/skip-finetune")
    """Runs go to OUT/<method>/seed<k>, the comparison to OUT."""
    wandb: bool = True
    """Weights & Biases, offline unless a key is set; --no-wandb leaves it out."""
    data: TailConfig = field(
        default_factory=lambda: TailConfig(
            "fashion-mini", profile="balanced", n_max=20, validation=20
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=30, batch_size=32))


class Source(NamedTuple):
    """A pretrained network, and the images that it wants."""

    model: ModelConfig  # its number of classes is that of the target later
    shape: tuple[int, int, int]


def source_of(name: str, config: SkipFinetune) -> Source:
    """The network that a name stands for; the weights of a run's backbone go to OUT/sources.

    Raises:
        InputError: an unknown name, or weights that cannot be had.
    """
    side = config.size
    if (Path(name) / "config.json").exists():
        run = training.load_run(name)
        spec: dict[str, Any] = run.config["model"]
        C, H, W = run.preprocess.shape
        weights = weights_of(run.model.backbone, spec["backbone"], C, name, config.out)
        seen = (list(run.preprocess.mean), list(run.preprocess.std))
        model = ModelConfig(spec["backbone"], C, 2, weights=str(weights), normalisation=seen)
        return Source(model, (C, side or H, side or W))
    base, _, file = name.partition("=")
    ours = ":" not in base and not base.startswith("efficientnet-lite")
    if ours and (base not in models.BACKBONES or not file):
        raise InputError(
            f"{name} is not a run directory (OUT/<method>/seed<k>), and otherwise a source is "
            "torchvision:NAME, timm:NAME, efficientnet-lite0 (1, 2), or NAME=FILE with weights."
        )
    expects = None if ours else models.input_spec(base, models.build(base))
    if expects is None:
        C, *_, H = data.load(config.data.name, config.data.root).train.images.shape[1:]
        C = C if ours else 3
        return Source(ModelConfig(base, C, 2, weights=file or None), (C, side or H, side or H))
    seen = (list(expects.mean), list(expects.std))
    model = ModelConfig(base, 3, 2, weights=file or "DEFAULT", normalisation=seen)
    return Source(model, (3, side or expects.size, side or expects.size))


def weights_of(backbone: nn.Module, name: str, channels: int, run: str, out: Path) -> Path:
    """A file that :func:`ncmethods.models.build` takes, with the weights of a run's backbone."""
    from safetensors.torch import save

    net: Any = backbone
    if isinstance(net, nn.Sequential) and isinstance(net[0], GrayToRGB):
        net = net[1]
    net = net.net if isinstance(net, PartlyTuned) else net
    state = models.build(name, in_channels=channels).state_dict() | net.state_dict()
    content = save({k: v.detach().contiguous().clone() for k, v in state.items()})
    digest = training_digest(content)
    path = out / "sources" / f"{digest}.safetensors"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path
