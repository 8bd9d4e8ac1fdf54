"""TransRate: closed forms, tllib's code run once, a plain loop, class sizes on both sides of D."""

import math

import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer._blocks import class_blocks
from ncmethods.transfer.transrate import transrate

F64 = torch.float64


def waves(N, D, K):
    """Features that need no generator: the same on every machine."""
    i, d = torch.arange(N, dtype=F64)[:, None], torch.arange(D, dtype=F64)
    y = torch.arange(N) * 7 % 11 % K
    x = torch.sin(1.7 * (i + 1) * (d + 1) + 0.3 * i)
    return FeatureSet(x + torch.cos(2.3 * y.double()[:, None] * (d + 1)), y, K)


def plain(data, eps=1e-4, weighting="class"):
    """The formula in numpy: D × D determinants, class by class."""
    x, y = data.features.double().numpy(), data.labels.numpy()
    x = x - x.mean(0)

    def rate(z):
        G = np.eye(z.shape[1]) + z.T @ z / (len(z) * eps)
        return np.linalg.slogdet(G)[1] / 2

    found = np.unique(y)
    rates = [rate(x[y == c]) for c in found]
    shares = None if weighting == "class" else [np.mean(y == c) for c in found]
    return rate(x) - np.average(rates, weights=shares)


def test_golden_values():
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=F64)
    data = FeatureSet(x, torch.tensor([0, 0, 1, 1]), 2)
    assert float(transrate(data)) == pytest.approx(0, abs=1e-12)
    one_hot = FeatureSet(torch.eye(3, dtype=F64).repeat(4, 1), torch.arange(12) % 3, 3)
    want = math.log(1 + 1 / 3e-4) - 0.5 * math.log(1 + 2 / 3e-4)
    assert want == pytest.approx(3.7095154, abs=1e-7)
    assert float(transrate(one_hot)) == pytest.approx(want, rel=1e-12)


# tllib.ranking.transrate, run once in float64 on waves(N, D, K):
# github.com/thuml/Transfer-Learning-Library/blob/c4aa59eb565650a552b809411601d0589efbbfe4
#   /tllib/ranking/transrate.py
@pytest.mark.parametrize(
    ("shape", "eps", "want"),
    [
        ((60, 5, 4), 1e-4, 1.1102150207374422),
        ((60, 5, 4), 0.1, 0.7929551830034489),
        ((24, 40, 3), 1e-4, 63.016108077378384),
        ((24, 40, 3), 0.1, 12.835944682237763),
    ],
)
def test_is_tllibs_value(shape, eps, want):
    data = waves(*shape)
    assert float(transrate(data, eps=eps)) == pytest.approx(want, rel=1e-10)
    float32 = FeatureSet(data.features.float(), data.labels, data.num_classes)
    assert float(transrate(float32, eps=eps)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("weighting", ["class", "sample"])
def test_unequal_classes_gaps_and_single_samples(weighting):
    g = torch.Generator().manual_seed(0)
    sizes = [1, 40, 0, 3, 12, 0, 13, 5, 200]  # below and above D = 12, and gaps
    y = torch.arange(9).repeat_interleave(torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=g)]
    x = torch.randn(9, 12, generator=g, dtype=F64)[y] + torch.randn(
        len(y), 12, generator=g, dtype=F64
    )
    data = FeatureSet(x, y, 9)
    got = transrate(data, weighting=weighting)
    assert float(got) == pytest.approx(plain(data, weighting=weighting), rel=1e-11)
    ignored = FeatureSet(torch.cat((x, x[:7] + 50)), torch.cat((y, torch.full((7,), -1))), 9)
    torch.testing.assert_close(transrate(ignored, weighting=weighting), got)


def test_blocks_hold_every_row_once():
    g = torch.Generator().manual_seed(1)
    y = torch.randint(30, (400,), generator=g)
    y[y == 4] = 29  # a gap and a larger class
    x = torch.randn(400, 3, generator=g)
    seen, calls = {}, 0
    for classes, block in class_blocks(x, y, torch.ones(3)):
        calls += 1
        for c, rows in zip(classes.tolist(), block, strict=True):
            assert c not in seen
            n = int((y == c).sum())
            seen[c] = n
            torch.testing.assert_close(rows[:n], x[y == c].double() - 1)
            assert (rows[n:] == 0).all()
    assert seen == {c: int((y == c).sum()) for c in range(30) if c != 4}
    assert calls < 12


def test_invariances():
    data = waves(60, 5, 4)
    want = transrate(data)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    for x in (data.features @ Q + 100, torch.nn.functional.pad(data.features, (0, 7))):
        torch.testing.assert_close(
            transrate(FeatureSet(x, data.labels, 4)), want, rtol=1e-9, atol=0
        )
    torch.testing.assert_close(transrate(data, pca=5), want)
    torch.testing.assert_close(transrate(data, eps=1e-4), transrate(
        FeatureSet(10 * data.features, data.labels, 4), eps=1e-2))  # fmt: skip
    few = transrate(data, pca=2)
    assert few.isfinite()
    assert few != want


def test_degenerate_features():
    y = torch.arange(12) % 3
    assert float(transrate(FeatureSet(torch.ones(12, 4), y, 3))) == 0
    noise = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=F64)
    for scale in (1e-6, 1e3, 1e9):  # at 1e9 I + G has no Cholesky factor
        data = FeatureSet(scale * noise, y[:6], 3)
        assert transrate(data).isfinite()
        if scale < 1e9:
            assert float(transrate(data)) == pytest.approx(plain(data), rel=1e-6)
    line = 1e9 * noise[:, :1].repeat(1, 5)
    assert transrate(FeatureSet(line, y[:6], 3)).isfinite()
    small = FeatureSet(line / 1e6, y[:6], 3)
    want = plain(FeatureSet(line[:, :1] / 1e6 * 5**0.5, y[:6], 3))
    assert float(transrate(small)) == pytest.approx(want, rel=1e-5)
    with pytest.raises(InputError, match="eps"):
        transrate(small, eps=0)
    with pytest.raises(InputError, match="weighting"):
        transrate(small, weighting="size")
    with pytest.raises(InputError, match="labels"):
        transrate(FeatureSet(small.features, None, 3))
