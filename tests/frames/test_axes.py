"""Frames on the axes: orthoplex, Hadamard rows, non-negative orthogonal rows."""

import math

import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import (
    hadamard,
    nonnegative_orthogonal,
    orthogonal_frame,
    orthoplex,
    simplex_etf,
)
from ncmethods.metrics.margin import one_vs_rest_margin
from ncmethods.testing import check_frame


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- orthoplex -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["haar", "canonical"])
@pytest.mark.parametrize(("K", "D"), [(2, 1), (3, 2), (6, 3), (5, 3), (100, 50), (4, 9)])
def test_orthoplex_has_cosines_0_and_minus_1(K, D, rotation):
    frame = orthoplex(K, D, rotation=rotation, generator=seeded(0), dtype=torch.float64)
    check_frame(frame)
    want = torch.eye(K, dtype=torch.float64)
    for k in range(max(0, K - D)):
        want[k, k + D] = want[k + D, k] = -1
    torch.testing.assert_close(frame @ frame.T, want, rtol=0, atol=1e-12)
    if K == 2 * D:
        assert float(one_vs_rest_margin(frame)) == pytest.approx(2 if D == 1 else 1, abs=1e-6)
    single = orthoplex(K, D, rotation=rotation, generator=seeded(0))
    assert torch.equal(single, frame.float())


def test_orthoplex_is_haar():
    """First and second moments: E W = 0, E w wᵀ = I / D; QR without signs breaks the first."""
    generator, draws = seeded(0), 1500
    frames = torch.stack(
        [orthoplex(5, 3, generator=generator, dtype=torch.float64) for _ in range(draws)]
    )
    assert float(frames.mean(0).abs().max()) < 5 / math.sqrt(3 * draws)
    second = torch.einsum("nkd,nke->kde", frames, frames) / draws
    assert float((second - torch.eye(3) / 3).abs().max()) < 5 / math.sqrt(draws)


# --- Hadamard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["signs", "canonical"])
@pytest.mark.parametrize(
    ("K", "D", "used"),
    [(2, 2, 2), (2, 3, 2), (5, 8, 8), (8, 8, 8), (10, 768, 768), (10, 100, 96), (100, 512, 512)],
)
def test_hadamard_rows(K, D, used, rotation):
    frame = hadamard(K, D, rotation=rotation, generator=seeded(0), dtype=torch.float64)
    check_frame(frame, cosine=0.0)
    size = torch.zeros(D, dtype=torch.float64)
    size[:used] = 1 / math.sqrt(used)
    torch.testing.assert_close(frame.abs(), size.expand(K, D), rtol=0, atol=1e-15)


def test_hadamard_is_scipys():
    from scipy.linalg import hadamard as reference

    for n in (2, 8, 64):
        want = torch.from_numpy(reference(n)).double() / math.sqrt(n)
        for K in (n // 2 + 1, n):
            frame = hadamard(K, n, rotation="canonical", dtype=torch.float64)
            torch.testing.assert_close(frame, want[:K], rtol=0, atol=1e-15)
    # Fewer rows in a wider space are the first rows of the wide matrix.
    want = torch.from_numpy(reference(64))[:10] / 8
    assert torch.equal(hadamard(10, 64, rotation="canonical"), want.float())


def test_signs_take_the_constant_row_away():
    """A constant row draws every non-negative feature: an untrained network knows one class."""
    features = torch.rand(500, 64, generator=seeded(1))
    plain = (features @ hadamard(10, 64, rotation="canonical").T).argmax(1)
    assert bool((plain == 0).all())
    signed = (features @ hadamard(10, 64, generator=seeded(0)).T).argmax(1)
    assert float(signed.bincount(minlength=10).max()) < 350


# --- non-negative --------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["permutation", "canonical"])
@pytest.mark.parametrize(("K", "D"), [(2, 2), (3, 7), (10, 64), (10, 10), (100, 512)])
def test_every_dimension_belongs_to_one_class(K, D, rotation):
    frame = nonnegative_orthogonal(K, D, rotation=rotation, generator=seeded(0))
    check_frame(frame, cosine=0.0)
    assert bool((frame >= 0).all())
    assert bool(((frame > 0).sum(0) == 1).all())
    sizes = (frame > 0).sum(1)
    assert set(sizes.tolist()) <= {D // K, -(-D // K)}
    want = (frame > 0) / sizes[:, None].sqrt()  # equal values
    torch.testing.assert_close(frame, want, rtol=0, atol=1e-7)
    if rotation == "canonical":
        assert torch.equal((frame > 0).float().argmax(0), torch.arange(D) * K // D)


def reachable(frame):
    """Cosine that free non-negative features reach with each row, by gradient ascent."""
    raw = torch.full(frame.shape, 0.1, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.98**step
        loss = -(F.normalize(raw.square(), dim=1) * frame).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (F.normalize(raw.detach().square(), dim=1) * frame).sum(1)


def test_features_after_a_relu_reach_it():
    """1 for non-negative rows; √((K−1)/K) for a canonical simplex; near √½ for a rotated one."""
    K, D, f64 = 10, 200, torch.float64
    own = reachable(nonnegative_orthogonal(K, D, generator=seeded(0), dtype=f64))
    assert float(own.min()) == pytest.approx(1, abs=1e-4)
    canonical = reachable(simplex_etf(K, D, rotation="canonical", dtype=f64))
    torch.testing.assert_close(
        canonical, torch.full((K,), math.sqrt(9 / 10), dtype=f64), rtol=0, atol=1e-4
    )
    for rotated in (simplex_etf, orthogonal_frame):
        frame = rotated(K, D, generator=seeded(0), dtype=f64)
        best = reachable(frame)
        torch.testing.assert_close(best, frame.relu().norm(dim=1), rtol=0, atol=1e-3)
        assert float(best.mean()) == pytest.approx(math.sqrt(0.5), abs=0.02)


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [orthoplex, hadamard, nonnegative_orthogonal])
def test_seed_and_errors(build):
    one = build(6, 16, generator=seeded(3))
    assert one.dtype == torch.float32
    assert torch.equal(one, build(6, 16, generator=seeded(3)))
    assert not torch.equal(one, build(6, 16, generator=seeded(4)))
    wide = build(6, 16, generator=seeded(3), dtype=torch.float64)
    assert torch.equal(one, wide.float())
    state = torch.get_rng_state()
    build(6, 16, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match=r"Unknown rotation 'canonicl'.*'canonical'"):
        build(6, 16, rotation="canonicl")
    with pytest.raises(InputError, match="num_classes must be an integer ≥ 2"):
        build(1, 16)
    with pytest.raises(InputError, match="dim must be an integer ≥ 1"):
        build(6, 0)


def test_errors_name_the_way_out():
    with pytest.raises(InputError, match=r"6 rows, got num_classes = 7: it needs dim ≥ 4.*spread"):
        orthoplex(7, 3)
    with pytest.raises(InputError, match=r"dim ≥ 16, the next power of two, got 12.*only K"):
        hadamard(10, 12)
    with pytest.raises(InputError, match=r"dim ≥ 16.*got 9.*simplex_etf needs K − 1"):
        hadamard(10, 9)
    with pytest.raises(InputError, match=r"needs dim ≥ 10, got 9.*simplex_etf"):
        nonnegative_orthogonal(10, 9)
