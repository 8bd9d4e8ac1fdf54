"""What all scorers of features hold: values of other people's code, and the same properties."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.fdbd import fDBD
from ncmethods.ood.feature_norm import FeatureNorm
from ncmethods.ood.nci import NCI
from ncmethods.ood.neighbours import KNN, NNGuide
from ncmethods.ood.she import SHE
from ncmethods.ood.vim import Residual, ViM
from ncmethods.stats import ClassStats

F64 = {"dtype": torch.float64}
ALL = {
    "Residual": (Residual, {"rank": 5}),
    "ViM": (ViM, {"rank": 5}),
    "NCI": (NCI, {"alpha": 0.1}),
    "fDBD": (fDBD, {}),
    "KNN": (KNN, {"k": 3}),
    "KNN-raw": (KNN, {"k": 3, "normalize": False}),
    "NNGuide": (NNGuide, {"k": 3}),
    "SHE": (SHE, {}),
    "FeatureNorm": (FeatureNorm, {}),
}
EVERY = pytest.mark.parametrize("name", ALL)


def linear(W, b):
    head = nn.Linear(*W.shape[::-1]).to(W.dtype)
    head.weight.data.copy_(W)
    head.bias.data.copy_(b)
    return head


def case(dtype=torch.float64):
    """Features of four classes, a head that gets 36 of 40 right, and queries."""
    r = np.random.RandomState(0)  # a stream that does not change between versions
    y = np.arange(40) % 4
    m = 3 * r.randn(4, 8)
    x = m[y] + 3 * r.randn(40, 8) + 1
    W = m / 3 + 0.1 * r.randn(4, 8)
    b = r.randn(4) - 1.5 * (W**2).sum(1)
    q = 3 * r.randn(6, 8) + 1
    x, W, b, q = (torch.from_numpy(a).to(dtype) for a in (x, W, b, q))
    return FeatureSet(x, torch.from_numpy(y), 4), linear(W, b), q


def fitted(name, train, head, **more):
    cls, hyper = ALL[name]
    return cls.fit(train, head, **hyper, **more)


# Run once on the inputs above, in float64: NCI, fDBD, SHE and ViM of OpenOOD as in
# github.com/litianliu/NCI-OOD at dfb9e6ab199aa89c626667d2a3789bd4e9a7e53f (openood/postprocessors;
# NCI and fDBD are their authors'), NNGuide of its authors, github.com/roomo7time/nnguide at
# c123cac961b17a6c4f11adefd9ad861298be1469 with an exact search in place of faiss.
AUTHORS = {
    "NCI": [-1.2808661, -2.99846188, -1.477175, -2.87814959, -2.03763248, -0.47850594],
    "fDBD": [-0.761554893, -1.28840693, -1.92156528, -1.61545863, -0.494178424, -1.38618769],
    "ViM": [20.3676925, 7.66513366, 21.3824063, 20.5775802, 38.4156428, 12.5547882],
    "SHE": [-52.1014657, -87.0389445, -17.2300029, -50.7303339, -1.67273371, -2.30857174],
    "NNGuide": [40.7484915, -99.9682797, 23.0789168, -121.092291, 36.4357124, 60.9487895],
}
# pytorch-ood 0.4.0, in float32. Its fDBD is the mean over K − 1 boundaries, ours the sum.
PEER = {
    "ViM": [20.3677, 7.665128, 21.3824, 20.57758, 38.41563, 12.55478],
    "NCI": [-1.280866, -2.998462, -1.477175, -2.87815, -2.037632, -0.4785058],
    "fDBD": [-0.2538517, -0.429469, -0.6405218, -0.5384862, -0.1647262, -0.4620626],
    "KNN": [0.9372468, 0.7631659, 1.16029, 0.6312036, 1.046925, 1.086263],
    "NNGuide": [40.74848, -99.96833, 23.07891, -121.0923, 36.43571, 60.94879],
    "SHE": [-52.10147, -87.03895, -17.23001, -50.73033, -1.672733, -2.308572],
}


@pytest.mark.parametrize("name", AUTHORS)
def test_is_the_authors_code(name):
    train, head, q = case()
    want = torch.tensor(AUTHORS[name], **F64)
    torch.testing.assert_close(fitted(name, train, head)(q), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PEER)
def test_is_pytorch_ood_as_kept(name):
    train, head, q = case()
    want = torch.tensor(PEER[name], **F64) * (3 if name == "fDBD" else 1)
    torch.testing.assert_close(fitted(name, train, head)(q), want, rtol=1e-5, atol=1e-5)


@EVERY
def test_one_fit_from_shuffled_or_ignored_rows(name):
    train, head, q = case()
    want = fitted(name, train, head)(q)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = FeatureSet(train.features[rows], train.labels[rows], 4)
    torch.testing.assert_close(fitted(name, shuffled, head)(q), want)
    extra = torch.cat((train.features, 50 + q))
    ignored = torch.cat((train.labels, torch.full((6,), -1)))
    torch.testing.assert_close(fitted(name, FeatureSet(extra, ignored, 4), head)(q), want)


@pytest.mark.parametrize("name", ["Residual", "NCI", "fDBD"])
def test_moments_are_enough(name):
    train, head, q = case()
    want = fitted(name, train, head)(q)
    halves = [
        ClassStats(4, 8).update(train.features[rows], train.labels[rows])
        for rows in (slice(0, 13), slice(13, None))
    ]
    whole = halves[0] + halves[1]
    for given in (whole, whole.freeze()):
        torch.testing.assert_close(fitted(name, given, head)(q), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ViM", "KNN", "NNGuide", "SHE"])
def test_moments_are_not_enough(name):
    train, head, _ = case()
    with pytest.raises(InputError, match=f"{ALL[name][0].__name__} needs the samples"):
        fitted(name, train.stats, head)


@pytest.mark.parametrize("name", ["Residual", "ViM", "NCI", "fDBD"])
def test_says_that_the_rows_are_missing(name):
    train, _, _ = case()
    with pytest.raises(InputError, match=f"{name} needs the rows of the classifier"):
        fitted(name, train, None)
    with pytest.raises(InputError, match="as wide as the features"):
        fitted(name, train, nn.Linear(7, 4))


@pytest.mark.parametrize("name", ["NNGuide", "SHE"])
def test_says_that_logits_are_missing(name):
    train, head, q = case()
    with pytest.raises(InputError, match=f"{name} needs the logits of the training samples"):
        fitted(name, train, None)
    logits = head(train.features).detach()
    alone = fitted(name, FeatureSet(train.features, train.labels, 4, logits), None)
    with pytest.raises(InputError, match=f"{name} needs logits"):
        alone(q)
    torch.testing.assert_close(alone(q, head(q).detach()), fitted(name, train, head)(q))


@EVERY
def test_each_row_alone(name):
    train, head, q = case()
    scorer = fitted(name, train, head)
    whole = scorer(q)
    assert whole.shape == (6,)
    torch.testing.assert_close(torch.cat([scorer(row) for row in q.split(1)]), whole)
    assert scorer(q[:0]).shape == (0,)
    holed = q.index_fill(0, torch.tensor([2]), torch.nan)
    assert scorer(holed).isnan().tolist() == [False, False, True, False, False, False]


@EVERY
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_costs_its_own_digits(name, offset):
    train, head, q = case()
    head.bias.data -= offset * head.weight.data.sum(1)  # the logits stay
    far = FeatureSet(train.features + offset, train.labels, 4)
    want = fitted(name, far, head)(q + offset)
    single = FeatureSet(far.features.float(), far.labels, 4)
    got = fitted(name, single, head.float())((q + offset).float())
    assert got.dtype == torch.float32
    size = 1 if offset == 0 else float(want.abs().max())
    tolerance = 2e-5 if offset == 0 else 2e-3
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * size)


@EVERY
def test_another_size_is_an_error(name):
    train, head, q = case()
    scorer = fitted(name, train, head)
    if name != "FeatureNorm":
        with pytest.raises(InputError, match="D = 8"):
            scorer(q[:, :7], torch.zeros(6, 4, **F64))
    if "logits" in scorer.wants():
        with pytest.raises(InputError, match="K = 4"):
            scorer(q, torch.zeros(6, 5, **F64))


@EVERY
def test_saves_and_travels_bit_for_bit(name, tmp_path):
    train, head, q = case()
    scorer = fitted(name, train, head)
    scorer.save(tmp_path / "one.safetensors")
    for again in (
        type(scorer).load(tmp_path / "one.safetensors"),
        pickle.loads(pickle.dumps(scorer)),
        fitted(name, train, head).half(),  # a cast of the model does not reach the state
    ):
        assert torch.equal(again(q), scorer(q))


@EVERY
def test_gradient_is_that_of_differences(name):
    train, head, q = case()
    scorer = fitted(name, train, head)
    assert torch.autograd.gradcheck(scorer, q[:3].clone().requires_grad_(), atol=1e-5)


@EVERY
def test_compiles_in_one_graph(name):
    train, head, q = case()
    scorer = fitted(name, train, head)
    torch._dynamo.reset()  # each class of scorer is one more version of forward
    compiled = torch.compile(scorer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), scorer(q))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_and_zero_vectors_stay_finite(name, dtype):
    """Exactly collapsed classes, dead units, queries at zero, at the mean and at a class mean."""
    _, head, q = case(dtype)
    means = F.pad(5 * torch.eye(4, dtype=dtype), (0, 4))
    y = torch.arange(40) % 4
    head = linear(means, torch.zeros(4, dtype=dtype))
    scorer = fitted(name, FeatureSet(means[y], y, 4), head)
    points = torch.cat((means, torch.zeros(1, 8, dtype=dtype), means.mean(0, keepdim=True), q))
    x = points.requires_grad_()
    scores = scorer(x)
    assert scores.isfinite().all()
    scores.sum().backward()
    assert x.grad.isfinite().all()
    still = FeatureSet(torch.full((8, 8), 2.0, dtype=dtype), torch.arange(8) % 4, 4)
    if name != "SHE":  # nothing tells its classes apart: see test_she.py
        assert fitted(name, still, head)(q).isfinite().all()
