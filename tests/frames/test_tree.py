"""Hierarchical and multi-centre frames: prescribed cosines, their bounds, their dimension."""

import math

import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import hierarchical, multi_centre, simplex_etf
from ncmethods.testing import check_frame

F64 = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pair(frame):
    return frame.double() @ frame.double().T


def naive_gram(levels, cosines, other):
    """Loops over pairs and levels."""
    K = len(levels[0])
    gram = torch.full((K, K), float(other), dtype=F64)
    for i in range(K):
        for j in range(K):
            for level, cosine in zip(levels, cosines, strict=True):
                if level[i] == level[j]:
                    gram[i, j] = cosine
        gram[i, i] = 1
    return gram


TREES = [
    ([[0, 0, 0, 1, 1, 1]], (0.4,), 0.1),
    ([[0, 0, 0, 1, 1, 2]], (0.4,), -0.2),
    ([[5, -1, 5, -1, 5]], (-0.3,), 0.0),
    ([[0] * 4 + [1] * 4, [0, 0, 1, 1, 2, 2, 3, 3]], (0.2, 0.7), -0.4),
    ([[0] * 5 + [1] * 3, [0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 2, 2, 3, 4, 5, 6]], (0.1, 0.3, 0.9), 0.0),
]


@pytest.mark.parametrize("rotation", ["haar", "canonical"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("levels", "cosines", "other"), TREES)
def test_cosines_are_as_prescribed(levels, cosines, other, dtype, rotation):
    K = len(levels[0])
    for D in (K, K + 3):
        options = {"rotation": rotation, "generator": seeded(0), "dtype": dtype}
        frame = hierarchical(K, D, groups=levels, sibling=cosines, other=other, **options)
        check_frame(frame)
        assert frame.shape == (K, D)
        assert frame.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        want = naive_gram(levels, cosines, other)
        torch.testing.assert_close(pair(frame), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("G", "m", "s"), [(2, 3, 0.5), (5, 2, 0.0), (4, 5, 0.9), (3, 4, -0.2)])
def test_lowest_other_in_closed_form(G, m, s):
    """Equal groups: the rows sum to zero, 1 + (m−1)s + m(G−1)·other = 0, and K − 1 suffice."""
    K = G * m
    groups = torch.arange(K) % G
    frame = hierarchical(K, K - 1, groups=groups, sibling=s, generator=seeded(0), dtype=F64)
    other = -(1 + (m - 1) * s) / (m * (G - 1))
    torch.testing.assert_close(
        pair(frame), naive_gram([groups.tolist()], (s,), other), rtol=0, atol=1e-12
    )
    assert float(frame.sum(0).abs().max()) < 1e-7


@pytest.mark.parametrize(("levels", "cosines"), [(tree, c) for tree, c, _ in TREES])
def test_bounds_are_tight(levels, cosines):
    """Just inside the interval of the error message rows exist, just outside they do not."""
    K = len(levels[0])
    with pytest.raises(InputError, match=r"other must lie in \[") as caught:
        hierarchical(K, K, groups=levels, sibling=cosines, other=-0.9999)
    low, high = map(float, str(caught.value).split("[")[-1].split("]")[0].split(","))
    eigenvalue = [
        float(torch.linalg.eigvalsh(naive_gram(levels, cosines, other))[0])
        for other in (low - 1e-4, low + 1e-4, high - 1e-4, high + 1e-4)
    ]
    assert [v > 0 for v in eigenvalue] == [False, True, True, False]
    lowest = hierarchical(K, K - 1, groups=levels, sibling=cosines, dtype=F64)
    top = torch.tensor(levels[0])
    others = pair(lowest)[top[:, None] != top]
    torch.testing.assert_close(others, torch.full_like(others, low), rtol=0, atol=1e-6)


def test_one_cosine_is_the_simplex():
    """All groups of one class, or all siblings at −1/(K−1)."""
    K = 6
    for groups, sibling in ((range(K), 0.3), ([0, 0, 1, 1, 1, 2], -1 / (K - 1))):
        frame = hierarchical(K, K - 1, groups=list(groups), sibling=sibling, dtype=F64)
        check_frame(frame, cosine=-1 / (K - 1))
    # A single group has siblings only.
    check_frame(hierarchical(K, K, groups=[0] * K, sibling=0.25, dtype=F64), cosine=0.25)


def test_haar_places_the_rows_uniformly():
    generator, draws = seeded(0), 1000
    frames = torch.stack(
        [
            hierarchical(4, 4, groups=[0, 0, 1, 1], generator=generator, dtype=F64)
            for _ in range(draws)
        ]
    )
    assert float(frames.mean(0).abs().max()) < 5 / math.sqrt(4 * draws)
    second = torch.einsum("nkd,nke->kde", frames, frames) / draws
    assert float((second - torch.eye(4) / 4).abs().max()) < 5 / math.sqrt(draws)


def test_errors_name_bounds_and_ways_out():
    groups = [0, 0, 0, 1, 1, 2]
    with pytest.raises(InputError, match="cosine of n siblings must exceed −1/"):
        hierarchical(6, 8, groups=groups, sibling=-0.6)  # three rows: −1/2
    with pytest.raises(InputError, match=r"need dim ≥ 6, .* got 5.*the lowest, -0\.39.*needs less"):
        hierarchical(6, 5, groups=groups, other=0.0)
    with pytest.raises(InputError, match=r"need dim ≥ 5, .* got 4.*spread and softmax_code"):
        hierarchical(6, 4, groups=groups)
    with pytest.raises(InputError, match=r"an integer for each of the 6 classes"):
        hierarchical(6, 8, groups=groups[:-1])
    with pytest.raises(InputError, match=r"one cosine in \[−1, 1\) for each of the 2 levels"):
        hierarchical(6, 8, groups=[groups, groups], sibling=0.5)
    with pytest.raises(InputError, match="one cosine"):
        hierarchical(6, 8, groups=groups, sibling=1.0)
    with pytest.raises(InputError, match="must nest"):
        hierarchical(4, 8, groups=[[0, 0, 1, 1], [0, 1, 1, 2]], sibling=(0.1, 0.5))
    with pytest.raises(InputError, match="Unknown rotation"):
        hierarchical(6, 8, groups=groups, rotation="none")


# --- several centres for each class ---------------------------------------------------------------


@pytest.mark.parametrize(("K", "M", "s"), [(2, 2, 0.5), (10, 3, 0.8), (5, 1, 0.5), (4, 2, -0.1)])
def test_centres_are_ordered_by_class(K, M, s):
    frame = multi_centre(K, K * M - 1, centres=M, sibling=s, generator=seeded(0), dtype=F64)
    check_frame(frame)
    assert frame.shape == (K * M, K * M - 1)
    gram = pair(frame).reshape(K, M, K, M)
    between = -(1 + (M - 1) * s) / (M * (K - 1))
    for c in range(K):
        own = gram[c, :, c]
        want = torch.full((M, M), s, dtype=F64).fill_diagonal_(1)
        torch.testing.assert_close(own, want, rtol=0, atol=1e-12)
        rest = gram[c][:, [k for k in range(K) if k != c]]
        torch.testing.assert_close(rest, torch.full_like(rest, between), rtol=0, atol=1e-12)
    # The means of the centres of each class are a simplex.
    middle = frame.reshape(K, M, -1).mean(1)
    middle = middle / middle.norm(dim=1, keepdim=True)
    check_frame(middle, cosine=-1 / (K - 1))


def test_centres_of_their_own_number():
    frame = multi_centre(3, 9, centres=[1, 3, 2], sibling=0.6, other=-0.1, dtype=F64)
    want = naive_gram([[0, 1, 1, 1, 2, 2]], (0.6,), -0.1)
    torch.testing.assert_close(pair(frame), want, rtol=0, atol=1e-13)


def test_all_centres_can_be_one_simplex():
    frame = multi_centre(4, 11, centres=3, sibling=-1 / 11, generator=seeded(0), dtype=F64)
    check_frame(frame, cosine=-1 / 11)
    assert simplex_etf(12, 11).shape == frame.shape


def test_centre_errors():
    for bad in (0, -1, 2.0, True, [1, 2], [1, 0, 2], "3"):
        with pytest.raises(InputError, match=r"centres must be an integer ≥ 1.*3 classes"):
            multi_centre(3, 9, centres=bad)
    with pytest.raises(InputError, match="need dim ≥ 5"):
        multi_centre(3, 4, centres=2)


def test_seed_decides_and_the_global_generator_is_spared():
    for build in (
        lambda g: multi_centre(3, 8, centres=2, generator=g),
        lambda g: hierarchical(4, 8, groups=[0, 0, 1, 1], generator=g),
    ):
        state = torch.get_rng_state()
        assert torch.equal(build(seeded(1)), build(seeded(1)))
        assert not torch.equal(build(seeded(1)), build(seeded(2)))
        assert torch.equal(torch.get_rng_state(), state)
