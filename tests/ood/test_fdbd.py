"""fDBD: golden value, numpy, duplicate rows, memory."""

import numpy as np
import pytest
import torch
from test_feature_scorers import case, linear

from ncmethods.features import FeatureSet
from ncmethods.ood.fdbd import fDBD, inverse_distances

F64 = {"dtype": torch.float64}


def test_golden_value_and_the_mean():
    head = linear(torch.eye(2, **F64), torch.zeros(2, **F64))
    train = FeatureSet(torch.tensor([[1, 1], [-1, -1]], **F64), torch.tensor([0, 1]), 2)
    scorer = fDBD.fit(train, head)
    assert float(scorer(torch.tensor([[3, 1]], **F64))) == pytest.approx(-(5**-0.5), rel=1e-12)
    assert float(scorer(torch.zeros(1, 2, **F64))) == 0  # on the boundary, and at the mean
    moved = fDBD.fit(FeatureSet(train.features + torch.tensor([1.0, 0]), train.labels, 2), head)
    at_mean = float(moved(torch.tensor([[1, 0]], **F64)))
    assert at_mean == pytest.approx(-(2**-0.5) / 1e-8, rel=1e-9)


def test_is_the_distance_to_the_boundaries():
    """Each distance as that to the projection on the boundary, in a plain loop."""
    train, head, q = case()
    W, b = head.weight.detach().numpy(), head.bias.detach().numpy()
    mu = train.features.numpy().mean(0)
    want = []
    for h in q.numpy():
        best = np.argmax(W @ h + b)
        total = 0.0
        for c in set(range(4)) - {best}:
            normal, level = W[best] - W[c], b[best] - b[c]
            foot = h - (normal @ h + level) / (normal @ normal) * normal
            assert (W[best] - W[c]) @ foot + level == pytest.approx(0, abs=1e-9)
            total += np.linalg.norm(h - foot)
        want.append(-total / np.linalg.norm(h - mu))
    np.testing.assert_allclose(fDBD.fit(train, head)(q), want, rtol=1e-10)


def test_scale_and_shift_of_the_rows_change_nothing():
    train, head, q = case()
    want = fDBD.fit(train, head)(q)
    scaled = linear(9 * head.weight.detach(), 9 * head.bias.detach())
    torch.testing.assert_close(fDBD.fit(train, scaled)(q), want)
    shifted = linear(head.weight.detach() + 3, head.bias.detach() - 1)
    torch.testing.assert_close(fDBD.fit(train, shifted)(q), want)
    larger = FeatureSet(10 * train.features, train.labels, 4)
    grown = linear(head.weight.detach() / 10, head.bias.detach())
    torch.testing.assert_close(fDBD.fit(larger, grown)(10 * q), want)


@pytest.mark.parametrize("spread", [1e-4, 1e-5])
def test_rows_that_nearly_coincide(spread):
    """Minority collapse: the inverse distances keep their digits where squares cancel."""
    rows = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), **F64)
    rows[3:] = rows[3] + spread * rows[3:]
    want = 1 / torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    want.fill_diagonal_(0)
    torch.testing.assert_close(inverse_distances(rows), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_rows_that_coincide_have_no_boundary(rounding):
    train, head, q = case()
    c = int(head(q).argmax(1)[0])
    W = torch.cat((head.weight.detach(), head.weight.detach()[[c]] * (1 + rounding)))
    five = linear(W, torch.cat((head.bias.detach(), head.bias.detach()[[c]])))
    scorer = fDBD.fit(FeatureSet(train.features, train.labels, 5), five)
    assert scorer.inverse[c, 4] == scorer.inverse[4, c] == 0
    scores, logits = scorer(q), five(q).detach()
    assert scores.isfinite().all()
    # The copy is one more boundary for the others, and none for its original.
    plain, copied = fDBD.fit(train, head)(q), logits[:, :4].argmax(1) == c
    assert copied.any()
    assert not copied.all()
    torch.testing.assert_close(scores[copied], plain[copied], rtol=1e-6, atol=0)
    assert (scores[~copied] < plain[~copied]).all()
    all_same = linear(torch.ones(4, 8, **F64), torch.arange(4.0, **F64))
    assert not fDBD.fit(train, all_same)(q).any()


def test_no_tensor_of_pairs_times_dimensions():
    """K = 400, D = 300: the differences would hold 48 million numbers, the distances 160 000."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    rows = torch.randn(400, 300, generator=torch.Generator().manual_seed(0), **F64)
    with Watch():
        inverse_distances(rows)
    assert max(sizes) == 160_000
