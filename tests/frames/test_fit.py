"""nearest_etf and assign."""

import itertools
import math

import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import (
    assign,
    nearest_etf,
    orthogonal_frame,
    simplex_etf,
    spread,
)
from ncmethods.frames._haar import haar_isometry, helmert
from ncmethods.testing import check_frame

F64 = torch.float64
SIZES = [(2, 1), (4, 3), (5, 9), (10, 64)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=seeded(seed))


def objective(P, means, prior=None, weight=0.0, class_weight=None):
    """The sum of squares itself, at an isometry P [D, K−1]."""
    K = len(means)
    a = torch.ones(K, dtype=F64) if class_weight is None else class_weight / class_weight.mean()
    H = means - (a[:, None] * means).sum(0) / K
    H = H / (a[:, None] * H**2).sum().sqrt()
    F = math.sqrt(K / (K - 1)) * helmert(K) @ P.T
    value = (a * (H - F / math.sqrt(K)).square().sum(1)).sum()
    if prior is not None:
        value = value + weight / 2 * (P - isometry(prior)).square().sum()
    return value


def isometry(frame):
    K = len(frame)
    return math.sqrt((K - 1) / K) * frame.T @ helmert(K)


def descend(P, steps=250, **problem):
    """Riemannian gradient descent on the Stiefel manifold (QR retraction); the lowest value."""
    best = math.inf
    for _ in range(steps):
        P = P.detach().requires_grad_()
        value = objective(P, **problem)
        best = min(best, value.item())
        (slope,) = torch.autograd.grad(value, P)
        P = P.detach()
        symmetric = (P.T @ slope + slope.T @ P) / 2
        QR = torch.linalg.qr(P - slope + P @ symmetric)
        P = QR.Q * QR.R.diagonal().sign()
    return best


@pytest.mark.parametrize("extra", ["plain", "prior", "class_weight", "both"])
@pytest.mark.parametrize(("K", "D"), SIZES)
def test_no_isometry_is_better(K, D, extra):
    """Golden check 21: cost ≤ that of any iterate; and gradient descent gets there."""
    means = noise(K, D) + 3
    problem = {"means": means}
    if extra in ("prior", "both"):
        problem |= {"prior": simplex_etf(K, D, generator=seeded(1), dtype=F64), "weight": 0.7}
    if extra in ("class_weight", "both"):
        problem["class_weight"] = torch.arange(1, K + 1).double() ** 2
    frame = nearest_etf(**problem)
    check_frame(frame, cosine=-1 / (K - 1))
    P = isometry(frame)
    cost = float(objective(P, **problem))
    generator = seeded(2)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(20):
            near = P + size * torch.randn(D, K - 1, dtype=F64, generator=generator)
            U, _, Vh = torch.linalg.svd(near, full_matrices=False)
            assert cost <= float(objective(U @ Vh, **problem)) + 1e-12
    starts = [haar_isometry(D, K - 1, generator) for _ in range(3)]
    found = min(descend(start, **problem) for start in starts)
    assert cost <= found + 1e-12
    if D > 1:  # a sign cannot be turned by small steps
        assert found == pytest.approx(cost, abs=1e-3)


@pytest.mark.parametrize(("K", "D"), SIZES)
def test_an_etf_returns_itself(K, D):
    F = simplex_etf(K, D, generator=seeded(0), dtype=F64)
    torch.testing.assert_close(nearest_etf(7 * F + noise(D)), F, rtol=0, atol=1e-12)
    torch.testing.assert_close(nearest_etf(F, prior=F, weight=2.0), F, rtol=0, atol=1e-12)
    orthogonal = torch.linalg.qr(noise(D, D, seed=1)).Q
    means = noise(K, D, seed=2)
    torch.testing.assert_close(  # equivariance
        nearest_etf(means @ orthogonal), nearest_etf(means) @ orthogonal, rtol=0, atol=1e-11
    )
    torch.testing.assert_close(nearest_etf(5 * means - 2), nearest_etf(means), rtol=0, atol=1e-11)


def test_limits_of_the_prior():
    means, prior = noise(6, 9), simplex_etf(6, 9, generator=seeded(1), dtype=F64)
    free = nearest_etf(means)
    torch.testing.assert_close(
        nearest_etf(means, prior=prior, weight=1e-9), free, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        nearest_etf(means, prior=prior, weight=1e9), prior, rtol=0, atol=1e-6
    )
    # Means that say nothing leave the prior; without one any simplex will do.
    torch.testing.assert_close(
        nearest_etf(torch.ones(6, 9, dtype=F64), prior=prior, weight=0.1), prior, rtol=0, atol=1e-12
    )
    check_frame(nearest_etf(torch.zeros(6, 9)), cosine=-1 / 5)
    single = torch.full((6, 9), torch.nan, dtype=F64)
    for seed in range(5):
        single[2] = noise(9, seed=seed)
        kept = nearest_etf(single, prior=prior, weight=0.1)
        torch.testing.assert_close(kept, prior, rtol=0, atol=1e-12)


def test_a_class_of_weight_zero_has_no_say():
    """Nor has one whose mean is missing; its row follows from the others."""
    means, weights = noise(5, 8), torch.tensor([1.0, 1, 0, 1, 1])
    frame = nearest_etf(means, class_weight=weights)
    moved, missing = means.clone(), means.clone()
    moved[2], missing[2] = 1e3, torch.nan
    for same in (
        nearest_etf(moved, class_weight=weights),
        nearest_etf(missing),
        nearest_etf(missing, class_weight=7 * weights),
    ):
        torch.testing.assert_close(same, frame, rtol=0, atol=1e-12)
    check_frame(nearest_etf(torch.full((5, 8), torch.nan)), cosine=-1 / 4)
    equal = nearest_etf(means, class_weight=torch.full((5,), 3))
    torch.testing.assert_close(equal, nearest_etf(means), rtol=0, atol=1e-12)


def test_batches_dtypes_and_inputs():
    means = noise(2, 3, 5, 8)
    frames = nearest_etf(means)
    assert frames.shape == means.shape
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(frames[i, j], nearest_etf(means[i, j]), rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        low = nearest_etf(means[0, 0].to(dtype))
        assert low.dtype == dtype
        check_frame(low)
    before = means.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(nearest_etf(means), frames)
    assert torch.equal(means, before)


@pytest.mark.parametrize("at", ["generic", "etf", "square"])
def test_gradients(at):
    """Also where all singular values are equal, where autograd through an SVD gives NaN."""
    K, D = (4, 3) if at == "square" else (4, 6)
    means = noise(K, D)
    if at == "etf":
        means = simplex_etf(K, D, generator=seeded(0), dtype=F64)
    prior = simplex_etf(K, D, generator=seeded(3), dtype=F64)
    weights = torch.arange(1.0, K + 1, dtype=F64)
    for options in ({}, {"prior": prior, "weight": 0.4}, {"class_weight": weights}):
        assert torch.autograd.gradcheck(
            lambda m, options=options: nearest_etf(m, **options), (means.clone().requires_grad_(),)
        )
    low = torch.zeros(K, D, requires_grad=True)  # rank 0: no derivative, but no NaN
    nearest_etf(low).sum().backward()
    assert bool(low.grad.isfinite().all())


def test_it_compiles_in_one_graph():
    means = noise(5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(nearest_etf, fullgraph=True, backend="eager")
    leaves = [means.clone().requires_grad_() for _ in range(2)]
    frames = [build(leaf) for build, leaf in zip((nearest_etf, compiled), leaves, strict=True)]
    torch.testing.assert_close(frames[0], frames[1], rtol=0, atol=1e-12)
    slope = noise(5, 8, seed=1)
    grads = [torch.autograd.grad(f, leaf, slope)[0] for f, leaf in zip(frames, leaves, strict=True)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-11)


def test_rank_deficient_means_still_give_a_simplex():
    means = noise(6, 1) @ noise(1, 9)
    frame = nearest_etf(means)
    check_frame(frame, cosine=-1 / 5)
    cost = float(objective(isometry(frame), means))
    assert cost <= descend(haar_isometry(9, 5, seeded(0)), means=means) + 1e-12


def test_nearest_errors():
    means = noise(6, 9)
    with pytest.raises(InputError, match=r"needs dim ≥ 5, got means of width 4.*assign"):
        nearest_etf(means[:, :4])
    for bad in (means[0], means.long(), means[:1]):
        with pytest.raises(InputError, match=r"floating \[..., K, D\]"):
            nearest_etf(bad)
    for bad in ({"weight": 0.5}, {"prior": means}, {"prior": means, "weight": -1.0}):
        with pytest.raises(InputError, match="prior and a weight > 0 go together"):
            nearest_etf(means, **bad)
    with pytest.raises(InputError, match=r"prior must be \[6, 9\], got \[5, 9\]"):
        nearest_etf(means, prior=means[:5], weight=1.0)
    with pytest.raises(InputError, match=r"class_weight must be \[6\]"):
        nearest_etf(means, class_weight=torch.ones(5))


# --- assign ---------------------------------------------------------------------------------------


def total(frame, means, order):
    cosines = torch.nn.functional.cosine_similarity(frame[list(order)], means, dim=1)
    return float(cosines.sum())


@pytest.mark.parametrize(("K", "rows"), [(2, 2), (4, 4), (6, 6), (3, 6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_assign_is_the_best_of_all_numberings(K, rows, seed):
    frame = spread(rows, 3, steps=30, restarts=1, generator=seeded(seed), cache=False).double()
    means = noise(K, 3, seed=seed)
    order = assign(frame, means)
    assert order.dtype == torch.int64
    assert len(set(order.tolist())) == K
    best = max(total(frame, means, p) for p in itertools.permutations(range(rows), K))
    assert total(frame, means, order.tolist()) == pytest.approx(best, abs=1e-12)


def test_assign_finds_the_permutation():
    frame = orthogonal_frame(8, 12, generator=seeded(0))
    shuffled = torch.randperm(8, generator=seeded(1))
    means = 4 * frame[shuffled] + 0.1 * torch.randn(8, 12, generator=seeded(2))
    assert torch.equal(assign(frame, means), shuffled)
    lengths = torch.arange(1.0, 9)[:, None]
    assert torch.equal(assign(frame, lengths * means), shuffled)  # angles only
    # Classes without a direction take what is left.
    means[2], means[5] = 0, torch.nan
    order = assign(frame, means)
    seen = torch.tensor([0, 1, 3, 4, 6, 7])
    assert torch.equal(order[seen], shuffled[seen])
    assert sorted(order.tolist()) == list(range(8))


def test_assign_errors():
    frame = orthogonal_frame(4, 6)
    with pytest.raises(InputError, match="4 rows cannot serve 5 classes"):
        assign(frame, torch.randn(5, 6))
    with pytest.raises(InputError, match="of one width"):
        assign(frame, torch.randn(4, 5))
