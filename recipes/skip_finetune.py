"""Skip-layer fine-tuning: one block and the classifier, with a way past the frozen layers.

    ncmethods skip-finetune
    ncmethods skip-finetune --sources runs/a/ce/seed0 --block blocks.2 --data.name digits
    ncmethods skip-finetune --sources torchvision:resnet18 --block layer3 --data.name image-folder \
        --data.root photos --data.profile natural --data.n-max None --data.validation 0
    ncmethods skip-finetune --sources efficientnet-lite0 --block net._blocks.10 --size 96

Trains all of a pretrained network on the target (full), only a new classifier (linear), one block
and the classifier (layer), and the same with the block's pooled output added to the features
(skip). Each method chooses its learning rate from the same candidates on held-out images, for each
seed anew, since seeds may have networks of their own. Printed are accuracy, trained parameters, and
NC1 of the features before and after. A killed command resumes.

Without --sources it trains small networks on letters first, one for each seed.

The measured claims, with commands and seeds, stand in docs/methods/skip-finetune.md.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ncmethods import data, metrics, models, training, viz
from ncmethods._core import InputError, atomic_path, write_text
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
from ncmethods.training import cross_entropy as ce
from ncmethods.training.config import GrayToRGB

METHODS = ("full", "linear", "layer", "skip")
TABLE = {
    "all %": ("test/accuracy", 100, 1),
    "trained": ("finetune/parameters", 1, 0),
    "NC1 before": ("finetune/nc1_before", 1, 2),
    "NC1 after": ("train/nc1/pinv", 1, 2),
    "NC1 test": ("test/nc1/pinv", 1, 2),
    "rate": ("finetune/lr", 1, 3),
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
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Learning rates; each method chooses from them by held-out images, for each seed anew."""
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
    path = out / "sources" / f"{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path


def small_networks(config: SkipFinetune) -> list[str]:
    """A small_cnn for each seed, trained on letters."""
    tail = TailConfig("glyphs-mini", profile="natural")
    sweep(
        jobs_of(["ce"], {"ce": Method("linear", ce)}, tail, config.seeds),
        config.seeds,
        cache(TailConfig.load),
        backbone="small_cnn",
        candidates=[TrainConfig(epochs=15, measurements=1, device=config.train.device)],
        out=config.out / "letters",
        wandb=False,
    )
    return [str(config.out / "letters" / "ce" / f"seed{seed}") for seed in config.seeds]


def described(source: Source, method: str, block: str | None, num_classes: int) -> ModelConfig:
    """The network that a method trains.

    Raises:
        InputError: a method that needs a block, and none is named.
    """
    model = replace(source.model, num_classes=num_classes)
    if method == "full":
        return model
    if method == "linear":
        return replace(model, tuned=())
    if block is None:
        net = models.build(model.backbone, in_channels=model.in_channels)
        layers = [n for n, m in net.named_modules() if n and len([*m.children()]) > 1]
        some = ", ".join(sorted(layers, key=lambda n: n.count("."))[:24])
        raise InputError(f"Name the --block that is trained, as one of {some}.")
    return replace(model, tuned=(block,), skip=block if method == "skip" else None)


def seen_by(shape: tuple[int, int, int], tail: TailConfig) -> Splits:
    """The images of the target in the shape that a source wants."""
    splits = tail.load()

    def fit_to(part: ImageData) -> ImageData:
        images = fitted(part.images, shape).round().clamp(0, 255).to(torch.uint8)
        return replace(part, images=images)

    more = splits.validation and fit_to(splits.validation)
    return Splits(fit_to(splits.train), fit_to(splits.test), splits.name, more)


def before(
    model: ModelConfig, splits: Splits, seed: int, place: Path, device: Any
) -> dict[str, Any]:
    """Trained parameters, and NC1 of the target's training features before any step."""
    path = place / "before.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    net = build_model(model, seed=seed).to(device)
    mean, std = model.normalisation or data.channel_stats(splits.train)
    loader = data.DeviceLoader(splits.train, 256, train=False, mean=mean, std=std, device=device)
    stats = extract(net, loader, progress=False).stats
    found = {
        "finetune/parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "finetune/nc1_before": float(metrics.nc1_pinv(stats)),
    }
    write_text(path, json.dumps(found) + "\n")
    return found


def main(config: SkipFinetune) -> None:
    """Train, then print and write the comparison."""
    training.check_methods(config.methods, METHODS)
    if len(config.sources) not in (0, 1, len(config.seeds)):
        raise InputError(
            f"There are {len(config.sources)} sources and {len(config.seeds)} seeds: name one "
            "source, or one for each seed."
        )
    names = config.sources or small_networks(config)
    block = config.block if config.sources else config.block or "blocks.2"
    sources = [source_of(name, config) for name in names] * (
        1 if len(names) > 1 else len(config.seeds)
    )
    for method in config.methods:  # a block that is missing is missed before anything is trained
        training.build_model(described(sources[0], method, block, 2))
    load = cache(seen_by)
    candidates = grid(config.train, lr=config.lrs)
    runs: dict[str, list[tuple[Path, list[dict[str, Any]]]]] = {m: [] for m in config.methods}
    chosen: dict[str, dict[str, Any]] = {m: {} for m in config.methods}
    with training.process(config.train.device) as here:
        for method, (seed, source) in product(config.methods, zip(config.seeds, sources)):
            tail, best, which = config.data.drawn(seed), candidates[0], f"seed{seed}"
            splits, place = load(source.shape, tail), config.out / method / which
            model = described(source, method, block, splits.train.num_classes)
            if len(candidates) > 1:
                best, accuracies = tune(
                    model, ce, splits, candidates, config.out / "tuning" / method / which,
                    here=here, seed=seed, method=method, data=tail.record(),
                )  # fmt: skip
                chosen[method][which] = {"lr": best.lr, "held-out accuracy": accuracies}
            fit(
                model, ce, splits, best, place, here=here, seed=seed, method=method,
                data=tail.record(), wandb=config.wandb, draw=viz.draw_run,
            )  # fmt: skip
            if here.first:
                rows = read_rows(place / "metrics.jsonl")
                rows[-1] |= before(model, splits, seed, place, here.device)
                rows[-1]["finetune/lr"] = best.lr
                runs[method].append((place, rows))
                accuracy: Any = rows[-1]["test/accuracy"]
                print(f"{method} seed {seed}: accuracy {100 * accuracy:.1f} %, rate {best.lr}")
        if not here.first:
            return
    if len(candidates) > 1:
        write_text(config.out / "tuning.json", json.dumps(chosen, indent=1) + "\n")
    command = " ".join(sys.argv)
    print(viz.write_comparison(config.out, runs, [TABLE], PANELS, command=command))
