"""Transferability: which pretrained model, or which of its layers, suits my data?

    ncmethods transfer
    ncmethods transfer --models torchvision:resnet18 timm:vit_tiny_patch16_224 --root photos
    ncmethods transfer --models efficientnet-lite0 --layers _blocks.4 _blocks.10 head --size 96
    ncmethods transfer --models runs/a/ce/seed0 runs/b/ce/seed0 small_cnn=random
    ncmethods transfer --models a.safetensors b.safetensors --accuracies accuracies.json

Every candidate sees the same images of the target once; its features are kept in OUT/features, so
that another score takes seconds. No candidate is trained on the target: simple classifiers on the
same features (nearest centre, neighbours, a ridge probe) stand beside the scores as baselines.

Without --models it trains two small networks, on clothes and on letters, and asks which layer of
which one knows most about handwritten digits, with an untrained network for a control.

The measured claims, and which score to trust when, stand in docs/methods/transferability.md.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ncmethods import __version__, data, heads, models, tracking, training, transfer, viz
from ncmethods._core import InputError, check_choice, find_head, unwrap, write_text
from ncmethods.data import ImageData, TailConfig
from ncmethods.data.datasets import OWN_TAIL
from ncmethods.data.outliers import batches_as
from ncmethods.features import FeatureSet, extract_layers
from ncmethods.training import Method, TrainConfig, jobs_of, sweep
from ncmethods.training import cross_entropy as ce
from ncmethods.viz import Details, Heading, Image, Section, Table, Text

DEFAULT = ("ncti", "logme", "h_score", "gbc", "parc", "cdnv", "nc1", "leep")
DEMO_LAYERS = ("blocks.1", "blocks.2", "head")


@dataclass(frozen=True)
class Transferability:
    """Rank pretrained models, or their layers, by how well they should do on a dataset."""

    models: tuple[str, ...] = ()
    """torchvision:NAME, timm:NAME, efficientnet-lite0 (1, 2), run directories, features as
    *.safetensors; MODEL=FILE takes other weights, MODEL=random none, for a control. Without any,
    two small networks are trained."""
    data: str | None = None
    """The target: a dataset that `ncmethods list` prints; with --root it is image-folder, else
    digits."""
    layers: tuple[str, ...] = ()
    """Modules, as layer3 layer4 head, in order of depth: each of each model is a candidate of its
    own. head is what the classifier acts on, and what is taken if none is named."""
    scores: tuple[str, ...] = DEFAULT
    """Names that `ncmethods list` prints. Baselines are always there."""
    pca: int = 64
    """Principal coordinates for scores that saturate where there are few samples; 0 for all."""
    per_class: int = 100
    """Images of each class at most, drawn with --seed; 0 for all."""
    bootstrap: int = 20
    """Samples drawn with replacement, for intervals; 0 for none."""
    accuracies: Path | None = None
    """A JSON object of candidate: accuracy (after fine-tuning, say), to judge the scores by."""
    out: Path = Path("runs/transfer")
    """Directory for transfer.json, table.md, report.html and features."""
    root: Path | None = None
    """Where the dataset's files are, if not in the usual places."""
    split: Literal["train", "test"] = "train"
    """Which images of the target."""
    size: int | None = None
    """Side of the images; None takes what each model was trained on."""
    weights: str = "DEFAULT"
    """Of named models without =WEIGHTS: the published ones, or for torchvision another name."""
    batch_size: int = 64
    """Images per step."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    seed: int = 0
    """Of the choice of images, the bootstrap, and the weights of random models."""
    wandb: bool = True
    """Weights & Biases, offline unless a key is set; --no-wandb leaves it out."""

    @property
    def target(self) -> str:
        """The name of the data."""
        return self.data or ("image-folder" if self.root else "digits")


# --- the target -----------------------------------------------------------------------------------


def stratified(labels: Tensor, num_classes: int, per_class: int, seed: int) -> Tensor:
    """Indices of at most ``per_class`` samples of each class, in order; all of them for 0."""
    if not per_class:
        return torch.arange(len(labels))
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes).clamp(max=per_class)
    return data.long_tail_indices(labels, counts.tolist(), seed=seed).sort().values


class Target:
    """Labelled images, and what of them a model sees."""

    def __init__(self, config: Transferability) -> None:
        name = config.target
        size = (config.size or 224) if name in OWN_TAIL else None  # image files are read at a size
        splits = data.load(name, config.root, size=size)
        whole: ImageData = getattr(splits, config.split)
        rows = stratified(whole.labels, whole.num_classes, config.per_class, config.seed)
        self.images = whole.subset(rows)

    @cached_property
    def digest(self) -> str:
        """Of pixels and labels."""
        return hash_of({"images": self.images.images, "labels": self.images.labels})

    def batches(
        self, see: Seen, size: int, rows: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the model saw its own, and labels, in order or at ``rows``."""
        return batches_as(self.images, see.shape, see.mean, see.std, size, rows)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and bytes."""
    whole = hashlib.sha256()
    for name, t in tensors.items():
        whole.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        whole.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


# --- candidates -----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Images as a model wants them."""

    mean: Sequence[float]
    std: Sequence[float]
    shape: tuple[int, int, int]


class Subject(NamedTuple):
    """A model, its images, and what is known of it."""

    model: nn.Module
    see: Seen
    has_classes: bool = True  # of its own: its logits mean something
    calibrate: bool = False  # BatchNorm has seen no image yet
    source_accuracy: float | None = None


def subject(name: str, config: Transferability, target: Target) -> Subject:
    """The model that a name stands for.

    Raises:
        InputError: an unknown name, weights that cannot be had, or no classifier.
    """
    if (Path(name) / "config.json").exists():
        run = training.load_run(name)
        rows = tracking.read_rows(Path(name) / "metrics.jsonl")
        accuracy: Any = rows[-1].get("test/accuracy") if rows else None
        how = run.preprocess
        see = Seen(how.mean, how.std, resized(how.shape, config.size))
        return Subject(run.model, see, source_accuracy=accuracy)
    base, _, given = name.partition("=")
    weights = None if given == "random" else given or config.weights
    channels, *_, side = target.images.images.shape[1:]
    accuracy, has_classes = None, weights is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if base.startswith("efficientnet-lite") and base in models.BACKBONES:
            model = models.efficientnet_lite(int(base[-1]), weights=weights)
        elif base in models.BACKBONES:
            if weights in models.PRETRAINED:
                raise InputError(
                    f"Nobody has published weights of {base}. Name a run directory, {base}=FILE, "
                    f"or {base}=random for a control."
                )
            backbone: Any = models.build(base, in_channels=channels, weights=weights)
            model = heads.Classifier(backbone, nn.Linear(backbone.num_features, 2))
            has_classes = False
        elif base.startswith(("torchvision:", "timm:")):
            model = models.build(base, weights=weights)
        elif ":" in base:  # package.module:factory, which has its own weights
            model = models.build(base, weights=weights if given else None)
        else:
            raise InputError(
                f"{name} is not a run directory (OUT/<method>/seed<k>) or a file, and otherwise a "
                f"model is one of {', '.join(models.BACKBONES)}, torchvision:NAME, timm:NAME."
            )
    find_head(model)  # or say now that there is none
    spec = models.input_spec(base, model)
    if spec is None:
        mean, std = data.channel_stats(target.images)
        see = Seen(mean, std, resized((channels, side, side), config.size))
    else:
        see = Seen(spec.mean, spec.std, resized((3, spec.size, spec.size), config.size))
    if base.startswith("torchvision:") and weights:
        accuracy = imagenet_accuracy(base.partition(":")[2], weights)
    return Subject(model, see, has_classes, weights is None, accuracy)


def resized(shape: tuple[int, int, int], size: int | None) -> tuple[int, int, int]:
    """``shape`` with another side."""
    return shape if size is None else (shape[0], size, size)


def imagenet_accuracy(name: str, weights: str) -> float | None:
    """What torchvision says of its weights, top 1 of ImageNet-1K."""
    from torchvision import models as vision

    known = vision.get_model_weights(name)
    if weights not in (*models.PRETRAINED, *known.__members__):
        return None
    one: Any = known["DEFAULT" if weights in models.PRETRAINED else weights]
    percent = one.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if percent is None else percent / 100


def calibrated(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: Any) -> None:
    """Give BatchNorm layers the statistics of a few batches: they were never shown an image."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    with torch.no_grad():
        for x, _ in batches:
            model(x.to(device))
    model.eval()


def layers_of(model: nn.Module, wanted: Sequence[str], name: str) -> dict[str, str]:
    """Those of the wanted layers that a model has, and their names in it.

    What stands under ``backbone.`` in a run is found without that.

    Raises:
        InputError: none of them.
    """
    names = [n for n, _ in unwrap(model).named_modules() if n]
    known = {n.removeprefix("backbone."): n for n in names} | {n: n for n in names}
    known["head"] = "head"
    found = {layer: known[layer] for layer in wanted if layer in known}
    if not found:
        raise InputError(no_layer(wanted[0], model, name))
    return found


def no_layer(layer: str, model: nn.Module, name: str) -> str:
    """That a model has no such layer, and which it has near it."""
    inside = [n.removeprefix("backbone.") for n, _ in unwrap(model).named_modules() if n]
    near = difflib.get_close_matches(layer, inside, n=8, cutoff=0.3) or inside[:8]
    return f"{name} has no layer {layer}. Near it: {', '.join(near)}."


class Extracted(NamedTuple):
    """Where the features of a model are."""

    paths: dict[str, Path]  # by layer, and of the source logits under "logits"
    parameters: int
    source_accuracy: float | None


def extracted(name: str, config: Transferability, target: Target, device: Any) -> Extracted:
    """Features of a model, from OUT/features where they are there already.

    Raises:
        InputError: a model, weights or layers that cannot be had.
    """
    one = subject(name, config, target)
    model = one.model.eval()
    layers = layers_of(model, config.layers or ("head",), name)
    for layer in config.layers:
        if len(config.models) == 1 and layer not in layers:
            raise InputError(no_layer(layer, model, name))
    if one.has_classes and "head" in layers:
        layers["logits"] = "logits"
    key = {
        "model": name,
        "weights": hash_of(model.state_dict()),
        "target": target.digest,
        "see": [list(one.see.mean), list(one.see.std), list(one.see.shape)],
        "calibrated": [config.batch_size, config.seed] if one.calibrate else [],
        "ncmethods": __version__,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    short = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[-40:]
    place = config.out / "features" / f"{short}-{digest}"
    paths = {layer: place / f"{layer}.safetensors" for layer in layers}
    missing = [layer for layer, path in paths.items() if not path.exists()]
    if missing:
        C, H, W = one.see.shape
        print(f"{name}: {len(target.images)} images as {C}×{H}×{W}, {', '.join(missing)}")
        model.to(device)
        if one.calibrate:
            rng = torch.Generator().manual_seed(config.seed)
            some = torch.randperm(len(target.images), generator=rng)[:256]
            calibrated(model, target.batches(one.see, config.batch_size, some), device)
        batches = target.batches(one.see, config.batch_size)
        wanted = [layers[layer] for layer in missing]
        found = extract_layers(model, batches, wanted, target.images.num_classes)
        write_text(place / "about.json", json.dumps(key, indent=1) + "\n")
        for layer, rows in zip(missing, found.values()):
            FeatureSet(rows.features, rows.labels, rows.num_classes).save(paths[layer])
    return Extracted(paths, sum(p.numel() for p in model.parameters()), one.source_accuracy)


def loaded(path: Path, config: Transferability) -> FeatureSet:
    """Features from a file of the user, as many of each class as are wanted."""
    rows = FeatureSet.load(path)
    if rows.labels is None:
        raise InputError(f"{path} has no labels: transferability is to known classes.")
    keep = stratified(rows.labels, rows.num_classes, config.per_class, config.seed)
    return FeatureSet(rows.features[keep], rows.labels[keep], rows.num_classes)


def pool_of(
    named: Mapping[str, str], config: Transferability, device: Any
) -> dict[str, transfer.Candidate]:
    """Every candidate by name; features are read from disk when their turn comes."""
    target: Target | None = None
    pool: dict[str, transfer.Candidate] = {}
    for name, model in named.items():
        if Path(model).is_file():
            pool[name] = transfer.Candidate(partial(loaded, Path(model), config))
            continue
        target = target or Target(config)
        of = extracted(model, config, target, device)
        logits = FeatureSet.load(of.paths["logits"]).features if "logits" in of.paths else None
        for layer, path in of.paths.items():
            if layer == "logits":
                continue
            pool[f"{name}@{layer}" if config.layers else name] = transfer.Candidate(
                partial(FeatureSet.load, path),
                source_logits=logits if layer == "head" else None,
                source_accuracy=None if config.layers else of.source_accuracy,
                parameters=None if config.layers else of.parameters,
            )
    for layer in config.layers:
        if target and not any(name.endswith(f"@{layer}") for name in pool):
            raise InputError(f"None of the models has a layer {layer}.")
    return pool


def small_networks(config: Transferability) -> dict[str, str]:
    """Two networks trained here, and one that is not, by name."""
    found: dict[str, str] = {}
    for source in ("fashion-mini", "glyphs-mini"):
        tail = TailConfig(source, profile="natural")
        sweep(
            jobs_of(["ce"], {"ce": Method("linear", ce)}, tail, [config.seed]),
            [config.seed],
            cache(TailConfig.load),
            backbone="small_cnn",
            candidates=[TrainConfig(epochs=15, measurements=1, device=config.device)],
            out=config.out / "sources" / source,
            wandb=False,
        )
        found[source] = str(config.out / "sources" / source / "ce" / f"seed{config.seed}")
    return found | {"untrained": "small_cnn=random"}


# --- what comes of it -----------------------------------------------------------------------------


def depth_of(ranking: transfer.Ranking) -> dict[str, dict[str, dict[str, float]]]:
    """Model → layer → within-class variability and accuracy of the probe, in order of depth."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ranking.candidates:
        model, _, layer = name.rpartition("@")
        of = {score: values[name] for score, values in ranking.values.items()}
        row = {"NC1": -of["nc1"], "probe accuracy": of["linear_probe"]} if "nc1" in of else {}
        found.setdefault(model, {})[layer] = row
    return {model: of for model, of in found.items() if model and len(of) > 1 and all(of.values())}


def accuracies_of(path: Path, candidates: Sequence[str]) -> dict[str, float]:
    """Accuracies that the user knows.

    Raises:
        InputError: no JSON object of numbers, or a candidate without one.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): float(value) for name, value in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object of candidate: accuracy: {error}") from error
    for name in candidates:
        check_choice(name, found, f"candidate (in {path})")
    return found


def plain(value: Any) -> Any:
    """``value`` for JSON: NaN as None, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def write(
    ranking: transfer.Ranking, known: Mapping[str, float] | None, config: Transferability
) -> None:
    """transfer.json, table.md, report.html, the tracker, and the terminal."""
    agreement = ranking.agreement(known) if known else {}
    ranks = {score: ranking.ranks(score) for score in ranking.values}
    depth = depth_of(ranking)
    settings = json.loads(json.dumps(asdict(config), default=str))
    record = {
        "command": shlex.join(["ncmethods", *sys.argv[1:]]),
        "ncmethods": __version__,
        "settings": settings,
        "values": ranking.values,
        "ranks": ranks,
        "intervals": ranking.intervals,
        "first": ranking.first,
        "components": ranking.components,
        "agreement": {score: one._asdict() for score, one in agreement.items()},
        "depth": depth,
        "warnings": ranking.warnings,
    }
    write_text(config.out / "transfer.json", json.dumps(plain(record), indent=1) + "\n")
    columns, lines = ranking.table()
    text = viz.text_table(columns, lines)
    judged = (
        ["score", "weighted τ", "regret", "its first choice"],
        [
            [score, f"{one.tau:.3f}", f"{one.regret:.4f}", one.choice]
            for score, one in agreement.items()
        ],
    )
    if agreement:
        text += "\n\n" + viz.text_table(*judged)
    write_text(config.out / "table.md", text + "\n")

    scored = {score: of for score, of in ranking.values.items() if score != "parameters"}
    figures = {"ranks": viz.rank_heatmap({s: ranks[s] for s in scored}, ranking.candidates)}
    for score in ranking.intervals:
        figures[f"intervals/{score}"] = viz.score_intervals(
            ranking.values[score], ranking.intervals[score], title=score
        )
    if depth:
        figures["depth"] = viz.depth_curves(depth)
    if known:
        figures["accuracy"] = viz.accuracy_scatter(
            scored, known, {score: one.tau for score, one in agreement.items()}
        )
    sections: list[Section] = [
        Text(
            f"{len(ranking.candidates)} candidates on {config.target}. Higher is better in every "
            "column; the rank stands in brackets. Baselines come first: a score that does not "
            "beat the probe is worth its speed only."
        ),
        Table(columns, lines),
        *(Text(f"Warning. {note}") for note in ranking.warnings),
        Image(figures["ranks"], "Ranks; 1 is the best."),
    ]
    if known:
        sections += [
            Heading("Against accuracies"),
            Table(*judged, "Regret: accuracy that the first choice of a score loses."),
            Image(figures["accuracy"], "Each score against the accuracies that were given."),
        ]
    if depth:
        sections += [
            Heading("By depth"),
            Image(figures["depth"], "Variability within classes, and the probe, by layer."),
        ]
    sections.append(Heading("Intervals"))
    for score in ranking.intervals:
        kind = "binomial" if score in transfer.BASELINES else "as wide as over bootstrap samples"
        caption = f"{score} with its 95 % interval, {kind}."
        sections.append(Image(figures[f"intervals/{score}"], caption))
    sections += [Details("Settings", settings), Details("Command", str(record["command"]))]
    title = f"Transferability to {config.target}"
    page = viz.html_report(config.out / "report.html", title=title, sections=sections)

    with tracking.Tracker(
        config.out, name=f"transfer-{config.target}", group="transfer", config=settings,
        wandb=config.wandb,
    ) as tracker:  # fmt: skip
        flat = {f"{s}/{name}": v for s, of in ranking.values.items() for name, v in of.items()}
        tracker.log(flat | {f"tau/{score}": one.tau for score, one in agreement.items()})
        tracker.table("ranking", columns, lines)
        tracker.figures(figures)
    print(f"\n{text}")
    for note in ranking.warnings:
        print(f"! {note}")
    print(f"\nreport: {page}")


def main(config: Transferability) -> None:
    """Extract what is missing, rank, then print and write the comparison."""
    for score in config.scores:
        check_choice(score, transfer.SCORES, "score")
    if len(set(config.models)) < len(config.models):
        raise InputError(f"A candidate is named twice: {', '.join(config.models)}.")
    if len(config.models) == 1 and len(config.layers) < 2:
        raise InputError(
            f"There is one candidate, {config.models[0]}: nothing to compare. Name more --models, "
            "or --layers of this one; MODEL=random makes a control."
        )
    named = {name: name for name in config.models}
    if not named:
        named = small_networks(config)
        config = replace(config, layers=config.layers or DEMO_LAYERS, size=config.size or 28)
    with training.process(config.device) as here:
        if not here.first:
            return
        pool = pool_of(named, config, here.device)
        known = config.accuracies and accuracies_of(config.accuracies, list(pool))
        ranking = transfer.rank(
            pool,
            [score for score in config.scores if score not in transfer.BASELINES],
            pca=config.pca or None,
            bootstrap=config.bootstrap,
            seed=config.seed,
        )
        write(ranking, known or None, config)
