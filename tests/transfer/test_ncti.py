"""NCTI: the authors' code run once, scikit-learn, the combination over a pool, bad input."""

import math

import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.transfer.ncti import ncti, ncti_components
from ncmethods.transfer.rank import weighted_tau

F64 = torch.float64
NAMES = ("seli", "ncc", "vc")


def waves(N, D, K, scale=1.0):
    """Features that need no generator: the same on every machine."""
    i, d = torch.arange(N, dtype=F64)[:, None], torch.arange(D, dtype=F64)
    y = torch.arange(N) * 7 % 11 % K
    x = torch.sin(1.7 * (i + 1) * (d + 1) + 0.3 * i)
    return FeatureSet(scale * (x + 0.1 * torch.cos(2.3 * y.double()[:, None] * (d + 1))), y, K)


def values(data, **more):
    parts = ncti_components(data, **more)
    assert tuple(parts) == NAMES
    assert all(v.shape == () and v.dtype == F64 for v in parts.values())
    return [float(v) for v in parts.values()]


# NCTI_Score(x, y) of
# github.com/BUserName/NCTI/blob/b18d39514a3f2a7a949500b467a38b93de1428e4/metrics.py,
# run with scikit-learn 1.9.1. λ is 9.7e-8, 0.52, 0.96 and 1e-10.
@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((200, 80, 5, 1.0), [88.13641838650146, 0.8966185986136433, 3.596574379393454]),
        ((200, 80, 5, 0.2), [61.91283939628587, 0.6452617749221787, 3.5850278816075245]),
        ((150, 70, 3, 0.05), [27.449953693807167, 0.6694916901637341, 3.1520428760779797]),
        ((400, 66, 7, 3.0), [171.15630589315515, 0.8345650964713437, 4.177170240758742]),
    ],
)
def test_are_the_authors_values(shape, want):
    data = waves(*shape)
    assert values(data) == pytest.approx(want, rel=1e-10)
    paper = values(data, log=False)
    assert paper[:2] == pytest.approx(want[:2], rel=1e-10)
    assert math.log(paper[2]) == pytest.approx(want[2], rel=1e-10)
    float32 = FeatureSet(data.features.float(), data.labels, data.num_classes)
    assert values(float32) == pytest.approx(want, rel=1e-4)


def test_discriminant_is_scikit_learns():
    """In the principal coordinates of few dimensions, with shrinkage."""
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    data = waves(120, 30, 4, 0.3)
    x, y = data.features.numpy(), data.labels.numpy()
    pca = PCA(9, svd_solver="full").fit(x)
    z = pca.transform(x)
    lam = math.exp(-pca.explained_variance_[:32].sum())
    assert 0.01 < lam < 0.9
    rule = LinearDiscriminantAnalysis(solver="eigen", shrinkage=lam).fit(z, y)
    P, t = rule.predict_proba(z), rule.transform(z)
    want = [
        np.linalg.norm(t - t.mean(0), ord="nuc"),
        P[np.arange(120), y].mean(),
        math.log(sum(np.linalg.norm(P[y == c], ord="nuc") for c in range(4))),
    ]
    assert values(data, pca=9) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_invariances_and_gaps(scale):
    data = waves(200, 80, 5, scale)
    want = values(data)
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(80, 80, generator=g, dtype=F64))[0]
    assert values(FeatureSet(data.features @ Q + 9, 4 - data.labels, 5)) == pytest.approx(
        want, rel=1e-8
    )
    assert values(FeatureSet(data.features, 2 * data.labels, 10)) == pytest.approx(want, rel=1e-10)
    order = torch.randperm(200, generator=g)
    assert values(data.subset(order)) == pytest.approx(want, rel=1e-8)
    more = FeatureSet(
        torch.cat((data.features, data.features[:3] + 5)),
        torch.cat((data.labels, torch.full((3,), -1))),
        5,
    )
    assert values(more) == pytest.approx(want, rel=1e-8)


def pool(**triples):
    return {
        name: dict(zip(NAMES, torch.tensor(t, dtype=F64), strict=True))
        for name, t in triples.items()
    }


def test_combination():
    found = ncti.combine(pool(a=[1.0, 0.2, 5.0], b=[3.0, 0.8, 4.0], c=[2.0, 0.5, 9.0]))
    # a: 0 + 0 − 0.2, b: 1 + 1 − 0, c: 0.5 + 0.5 − 1
    assert {k: float(v) for k, v in found.items()} == pytest.approx({"a": -0.2, "b": 2.0, "c": 0.0})
    # An affine map of a component, the same for all, changes nothing.
    moved = ncti.combine(pool(a=[12.0, -1.8, 35.0], b=[16.0, -1.2, 32.0], c=[14.0, -1.5, 47.0]))
    for name, value in found.items():
        assert float(moved[name]) == pytest.approx(float(value), abs=1e-12)


def test_published_correlation_on_cifar10():
    """NCTI of eleven models and their accuracies after fine-tuning: the paper's table says 0.843.

    Values: a reproduction with the authors' code, content/posts/Transferability.md at be39e55 of
    github.com/responsible-ai-datascience-ipParis/responsible-ai-datascience-ipParis.github.io.
    Accuracies: tw_group1.py of NCTI at b18d395.
    """
    both = {
        "resnet152": (2.0, 97.53),
        "resnet101": (1.799, 97.39),
        "densenet201": (1.434, 97.02),
        "densenet169": (1.146, 96.77),
        "resnet34": (0.757, 96.12),
        "resnet50": (0.709, 96.28),
        "densenet121": (0.655, 96.45),
        "mnasnet1_0": (0.031, 92.59),
        "googlenet": (-0.251, 95.54),
        "mobilenet_v2": (-0.444, 94.74),
        "inception_v3": (-0.732, 96.18),
    }
    found = weighted_tau(*map(list, zip(*both.values(), strict=True)))
    assert found == pytest.approx(0.8426, abs=5e-5)


def test_pool_of_features():
    models = {f"s{s}": waves(200, 80, 5, s) for s in (0.1, 0.5, 3.0)}
    direct = ncti(models)
    parts = {name: ncti_components(data) for name, data in models.items()}
    for name, value in ncti.combine(parts).items():
        assert -1 <= float(value) <= 2
        torch.testing.assert_close(value, direct[name])


def test_too_few_candidates_and_constant_components():
    with pytest.raises(InputError, match="at least two"):
        ncti({"only": waves(60, 5, 3)})
    same = ncti.combine(pool(a=[1.0, 0.2, 5.0], b=[3.0, 0.2, 4.0]))
    assert all(v.isnan() for v in same.values())


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_degenerate_features(scale):
    y = torch.arange(30) % 3
    collapsed = FeatureSet(scale * torch.eye(3, dtype=F64)[y], y, 3)
    seli, ncc, vc = values(collapsed)
    assert math.isfinite(seli)
    assert ncc == pytest.approx(1)
    assert vc == pytest.approx(math.log(3 * 10**0.5))  # three blocks [10, 3] of rank 1
    constant = FeatureSet(torch.full((30, 4), scale), y, 3)
    seli, ncc, vc = values(constant)
    assert seli == pytest.approx(0, abs=1e-6)
    assert ncc == pytest.approx(1 / 3)
    assert vc == pytest.approx(math.log(3 * (10 / 3) ** 0.5))
    for N, D in ((20, 100), (70, 3)):  # fewer samples or fewer dimensions than 64
        assert all(map(math.isfinite, values(waves(N, D, 3, scale))))
    single = FeatureSet(waves(30, 4, 3).features, torch.tensor([0] + [1] * 14 + [2] * 15), 3)
    assert all(map(math.isfinite, values(single)))
    with pytest.raises(InputError, match="at least two"):
        ncti_components(FeatureSet(constant.features, torch.zeros(30, dtype=torch.int64), 3))


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_fewer_samples_than_directions(scale):
    """Directions beyond the rank of the data are dropped, whatever the dtype."""
    data = waves(20, 100, 3, scale)
    want = values(data, pca=19)
    assert values(data) == pytest.approx(want, rel=1e-6)
    float32 = FeatureSet(data.features.float(), data.labels, 3)
    assert values(float32) == pytest.approx(want, rel=1e-2)
