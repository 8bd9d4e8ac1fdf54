"""Our scorers in pytorch-ood's Benchmark: its numbers are ours."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ncmethods import heads, ood
from ncmethods._core import InputError
from ncmethods.features import extract

pytest.importorskip("pytorch_ood")

from pytorch_ood.api import FeaturesDetector
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics

from ncmethods.integrations.pytorch_ood import detectors

K = 4


def points(n, seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    x = torch.randn(n, 3, 6, 6, generator=rng) + shift
    return x + y[:, None, None, None] * torch.ones(3, 6, 6).index_fill(0, torch.tensor(1), -1), y


class Toy(Benchmark):
    ood_names = ["near", "far"]

    def train_set(self):
        return TensorDataset(*points(80, 0))

    def test_sets(self, known=True, unknown=True):
        x, y = points(60, 1)
        shifted = [points(40, 2 + i, shift)[0] for i, shift in enumerate((0.6, 3.0))]
        return [
            TensorDataset(torch.cat((x, far)), torch.cat((y, -torch.ones(40).long())))
            for far in shifted
        ]


def net(kind):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    if kind == "etf":
        return heads.Classifier(body, heads.etf_head(32, K, dim=12))
    return nn.Sequential(body, nn.Linear(32, K))


@pytest.mark.parametrize("kind", ["linear", "etf"])
def test_benchmark_gives_our_numbers_in_one_pass(kind):
    model, bench = net(kind), Toy()
    train = extract(model, DataLoader(bench.train_set(), batch_size=16))
    head = model.head if kind == "etf" else model[1]
    fitted = {
        "Maha": ood.Mahalanobis.fit(train, shrinkage=0.2),
        "MahaPP": ood.Mahalanobis.fit(train, normalize=True, shrinkage=0.2),
        "NECO": ood.NECO.fit(train, head, times_max_logit=True),
        "Energy": ood.Energy.fit(),
    }
    passes = []
    model.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    wrapped = detectors(model, fitted)
    assert all(isinstance(d, FeaturesDetector) for d in wrapped)
    rows = bench.evaluate(wrapped, loader_kwargs={"batch_size": 100})
    assert passes == [100, 100]  # one batch of each set, for all detectors
    assert [row["Detector"] for row in rows] == list(fitted) * 2
    for row in rows:
        data = extract(model, [bench.test_sets()[bench.ood_names.index(row["Dataset"])].tensors])
        s = fitted[row["Detector"]](data.features, data.logits)
        inside, out = s[:60], s[60:]
        want = {
            "AUROC": ood.auroc(inside, out),
            "AUPR-OUT": ood.aupr(inside, out, method="trapezoid"),
            "AUPR-IN": ood.aupr(inside, out, positive="id", method="trapezoid"),
            "FPR95TPR": ood.fpr95(inside, out, positive="ood"),
        }
        for name, value in want.items():
            assert float(row[name]) == pytest.approx(float(value), abs=1e-9)


def test_predict_takes_images_and_leaves_the_mode():
    model = net("etf").train()
    train = extract(model, DataLoader(Toy().train_set(), batch_size=16))
    (one,) = detectors(model, [ood.RelativeMahalanobis.fit(train, shrinkage=0.2)])
    assert type(one).__name__ == "RelativeMahalanobis"
    x = points(10, 3)[0]
    want = one.scorer(extract(model, [x]).features)
    torch.testing.assert_close(one(x), want)
    torch.testing.assert_close(one.to("cpu").predict(x), want)
    assert one.fit(None) is one
    assert model.training
    metrics = OODMetrics()
    metrics.update(one(x), torch.tensor([0, -1] * 5))
    assert 0 <= metrics.compute()["AUROC"] <= 1


def test_what_is_not_a_scorer():
    with pytest.raises(InputError, match="MSP is not a fitted scorer: got type"):
        detectors(net("linear"), {"MSP": ood.MSP})
