"""Stage two: a new or adjusted classifier on the features of finished runs, in seconds.

    ncmethods stage-two runs/long-tailed/ce/seed*
    ncmethods stage-two runs/long-tailed/ce/seed0 --methods crt post-hoc --out runs/again

Takes runs of `ncmethods long-tailed`, the seeds of one method. The backbone stays as it is: its
features are extracted once (to OUT/features), each method makes a linear classifier of them, and
accuracy, calibration and geometry are printed beside those of the runs' own classifier. Finished
results are kept when the command is repeated. The test images choose nothing.

The measured claims, with commands and seeds, stand in docs/methods/stage-two.md.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from ncmethods import losses, training, viz
from ncmethods.features import FeatureSet
from ncmethods.training import stage_two
from ncmethods.training.cached import CachedRun, check_one_method

# The classifier stage of MiSLAS; its mixup belongs to stage one, its shifted BatchNorm to images.
smoothed = partial(
    stage_two.lws,
    loss=losses.label_aware_smoothing,
    epochs=10,
    lr=0.1,
    rows=0.2,
    batch_size=128,
    weight_decay=2e-4,
)
PANELS = {key: viz.PANELS[key] for key in ("test/accuracy", "test/accuracy/few")} | {
    "test/ece": "ECE",
    "train/angle/rare_weight_min": viz.PANELS["train/angle/rare_weight_min"],
}
METHODS = ("crt", "lws", "las", "tau-norm", "ncm", "post-hoc", "weight-balancing")
FROM_FEATURES = ("crt", "ncm")  # whatever head stage one has
CORRECTED = {"la", "arb", "ldam", "drw", "vs", "cdt", "bcl", "balanced"}  # parts of method names


@dataclass(frozen=True)
class StageTwo:
    """Retrain or adjust the classifier of finished runs on their features, in seconds."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories OUT/<method>/seed<k> of one method, one for each seed."""
    methods: tuple[str, ...] = ("crt", "lws", "tau-norm", "ncm", "post-hoc", "weight-balancing")
    """Any of: crt, lws, las (lws with label-aware smoothing), tau-norm, ncm, post-hoc,
    weight-balancing. For a run without a linear head (cosine, ETF): crt, ncm."""
    out: Path = Path("runs/stage-two")
    """Results go to OUT/<method>/seed<k>, features to OUT/features, the comparison to OUT."""
    tau: float = 1.0
    """Of tau-norm: 0 is the head without its bias, 1 makes rows of one length."""
    held_out: int = 0
    """Choose tau instead, on so many images per class that the tail left out of the training set
    (ImageNet-LT has 20); where it left none, on a fifth of the training images, with a warning."""
    root: Path | None = None
    """Where the dataset's files are, if not in the usual places."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def classifier(name: str, run: CachedRun, tau: float) -> nn.Linear:
    """What the method makes of a run's training features and, but for crt and ncm, its head."""
    rows, seed = run.features("train"), run.seed
    assert rows.labels is not None
    train = FeatureSet(rows.features.to(run.device), rows.labels.to(run.device), rows.num_classes)
    if name == "crt":
        return stage_two.crt(train, seed=seed)
    if name == "ncm":
        return stage_two.ncm(train)
    head = stage_two.linear_rows(run.model.head).to(run.device)
    if name == "lws":
        return stage_two.lws(train, head, seed=seed)
    if name == "las":
        return smoothed(train, head, length=len(train), seed=seed)
    if name == "tau-norm":
        return stage_two.tau_norm(head, tau)
    if name == "post-hoc":
        return stage_two.post_hoc(head, run.counts)
    return stage_two.weight_balancing(train, head, seed=seed)


def chosen_tau(run: CachedRun, per_class: int) -> float:
    """The τ with the best accuracy, mean over classes, on images that are not the test images."""
    held_out = run.unseen(per_class)
    if held_out is None:
        warnings.warn(
            f"The tail of {run.place} left no image of some class out, so tau is chosen on images "
            "that the network was trained on, which says little. Leave --held-out away, or train "
            "stage one with a smaller --data.n-max.",
            stacklevel=3,
        )
        held_out = stage_two.hold_out_features(run.features("train"), seed=run.seed)[1]
    tau, found = stage_two.pick_tau(run.model.head, held_out)
    print(f"seed {run.seed}: tau = {tau}, held-out accuracy {100 * found[tau]:.1f} %")
    return tau


def result(name: str, run: CachedRun, config: StageTwo) -> list[dict[str, Any]]:
    """Rows of one method on one run: read if they are there, else measured and written."""
    settings: dict[str, Any] = {}
    if name == "tau-norm":
        settings = {"held_out": config.held_out} if config.held_out else {"tau": config.tau}
    rows = run.finished(config.out, name, settings)
    if rows is None:
        choose = name == "tau-norm" and config.held_out
        tau = chosen_tau(run, config.held_out) if choose else config.tau
        extra = {"stage_two/tau": tau} if name == "tau-norm" else {}
        rows = run.finish(config.out, name, classifier(name, run, tau), settings, extra)
    print(f"{name} seed {run.seed}: accuracy {100 * rows[-1]['test/accuracy']:.1f} %")
    return rows


def check_methods(run: CachedRun, methods: tuple[str, ...]) -> None:
    """Say now what would fail later; warn where stage one has corrected for the prior already."""
    training.check_methods(methods, METHODS)
    if not set(methods) <= set(FROM_FEATURES):
        stage_two.linear_rows(run.model.head)
    sampling = run.config["train"].get("sampling", "instance")
    again = ", ".join(name for name in methods if name != "ncm")
    uneven = len(set(run.data["counts"])) > 1
    if again and uneven and (sampling != "instance" or CORRECTED & set(run.method.split("-"))):
        by = run.method if sampling == "instance" else f"{run.method}, {sampling} sampling"
        warnings.warn(
            f"Two prior corrections at once: stage one ({by}) and {again} both correct for the "
            "class prior. Stage two expects runs of plain cross-entropy.",
            stacklevel=3,
        )


def main(config: StageTwo) -> None:
    """Make the classifiers, then print and write the comparison."""
    with training.process(config.device) as here:
        if not here.first:
            return
        store = config.out / "features"
        of = [CachedRun(r, store, device=here.device, root=config.root) for r in config.runs]
        check_one_method(of)
        check_methods(of[0], config.methods)
        runs = {of[0].method: [(run.place, run.rows()) for run in of]} | {
            name: [(config.out / name / f"seed{run.seed}", result(name, run, config)) for run in of]
            for name in config.methods
        }
    tables, command = (viz.ACCURACY, viz.GEOMETRY), " ".join(sys.argv)
    print(viz.write_comparison(config.out, runs, tables, PANELS, command=command))
