"""Long-tailed classification: what a remedy does to accuracy, calibration and geometry, together.

    ncmethods long-tailed
    ncmethods long-tailed --methods ce etf-dr-balanced --data.imbalance 50 --seeds 0 1

Trains every method with every seed on a long-tailed subset of the data, tests on the whole balanced
test set, and prints mean ± sd of the last epoch (no checkpoint is chosen by its test accuracy). All
methods share one backbone and one training budget. ``--control`` adds plain cross-entropy on
equally many but balanced images: what imbalance alone costs. A killed command resumes.

The measured claims, with commands and seeds, stand in docs/methods/long-tailed.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ncmethods import data, losses, viz
from ncmethods._core import InputError, check_choice, write_text
from ncmethods.stats import frequency_groups
from ncmethods.tracking import Tracker, read_rows
from ncmethods.training import ModelConfig, TrainConfig, fit, process


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(logits, labels)


def ldam_drw(logits: Tensor, labels: Tensor, counts: Tensor, epoch: int, epochs: int) -> Tensor:
    """LDAM, re-weighted in the last fifth of training (the authors: from epoch 160 of 200)."""
    late = losses.drw_weights(counts) if epoch >= 0.8 * epochs else None
    return losses.ldam(logits, labels, counts, class_weight=late)


class Method(NamedTuple):
    """A head and the loss that trains under it."""

    head: str
    loss: Callable[..., Tensor]


METHODS = {
    "ce": Method("linear", ce),
    "la": Method("linear", losses.logit_adjusted),
    "ldam-drw": Method("cosine_head", ldam_drw),
    "etf-ce": Method("etf_head", ce),
    "etf-la": Method("etf_head", losses.logit_adjusted),
    "etf-dr": Method("etf_head", partial(losses.dot_regression, balance="none")),
    "etf-dr-balanced": Method("etf_head", partial(losses.dot_regression, balance="batch")),
}
CONTROL = "ce-balanced-control"


@dataclass(frozen=True)
class LongTailed:
    """Train long-tailed methods side by side and report accuracy and geometry."""

    methods: tuple[str, ...] = ("ce", "la", "etf-dr-balanced")
    """Any of: ce, la, ldam-drw, etf-ce, etf-la, etf-dr, etf-dr-balanced."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed."""
    out: Path = Path("runs/long-tailed")
    """Runs go to OUT/<method>/seed<k>, the comparison to OUT."""
    control: bool = False
    """Also train cross-entropy on equally many balanced images."""
    backbone: str = "small_cnn"
    """small_cnn, resnet32, torchvision:NAME, timm:NAME or package.module:factory."""
    wandb: bool = True
    """Weights & Biases, offline unless a key is set; --no-wandb leaves it out."""
    data: data.TailConfig = field(default_factory=data.TailConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(config: LongTailed) -> None:
    """Train, then print and write the comparison."""
    if not (config.methods and config.seeds):
        raise InputError("There is nothing to train: name at least one method and one seed.")
    for name in config.methods:
        check_choice(name, METHODS, "method")
    load = cache(data.TailConfig.load)
    tails = [config.data.drawn(seed) for seed in config.seeds]
    train = load(tails[0]).train
    counts, channels = data.class_counts(train), train.images.shape[1]
    groups = frequency_groups(counts, config.data.groups)
    jobs = [(name, METHODS[name], tails) for name in config.methods]
    if config.control:
        each = len(train) // train.num_classes
        even = [replace(tail, profile="balanced", n_max=each) for tail in tails]
        jobs.append((CONTROL, METHODS["ce"], even))

    results: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in jobs}
    with process(config.train.device) as here:
        if here.first:
            print(f"{config.data.name}: {counts.tolist()} training images per class")
            print("groups: " + ", ".join(f"{name} {of}" for name, of in groups.items()))
        for name, method, tails in jobs:
            for seed, tail in zip(config.seeds, tails):
                spec = ModelConfig(config.backbone, channels, len(counts), method.head)
                row = fit(
                    spec,
                    method.loss,
                    load(tail),
                    config.train,
                    config.out / name / f"seed{seed}",
                    here=here,
                    seed=seed,
                    method=name,
                    data=tail.record(),
                    groups=groups,
                    wandb=config.wandb,
                    finish=finish,
                )
                results[name].append(row)
                if here.first:
                    print(f"{name} seed {seed}: accuracy {100 * row['test/accuracy']:.1f} %")
        if here.first:
            compare(config, results)


def finish(tracker: Tracker, directory: Path) -> None:
    """Figures and final table of one run, for its page and for W&B."""
    rows = read_rows(directory / "metrics.jsonl")
    figures = viz.run_figures(directory, rows)
    tracker.figures(figures)
    tracker.table("final", ("measure", "value"), sorted(rows[-1].items()))
    viz.run_page(directory, rows, figures)


def compare(config: LongTailed, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the two tables and write them with the comparison page."""
    tables = [viz.summary(results, columns) for columns in (viz.ACCURACY, viz.GEOMETRY)]
    text = "\n\n".join(viz.text_table(*table) for table in tables)
    write_text(config.out / "table.md", text + "\n")
    directories = {m: [config.out / m / f"seed{s}" for s in config.seeds] for m in results}
    runs = {m: [(p, read_rows(p / "metrics.jsonl")) for p in of] for m, of in directories.items()}
    page = config.out / "report.html"
    viz.comparison_page(page, tables, runs, viz.PANELS, command=" ".join(sys.argv))
    print(f"\n{text}\n\nreport: {page}\ntable:  {config.out / 'table.md'}")
    if config.wandb:
        print(f"W&B:    {config.out}/<method>/seed<k>/wandb (offline: `wandb sync` sends it)")
