"""Vertices: rows that stay, that are chosen, that move; and what a prefix of an ETF looks like."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ncmethods import frames, metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.incremental import Vertices, evolve


def test_rows_that_were_given_stay_bit_identical():
    places = Vertices(10, 64, generator=torch.Generator().manual_seed(0))
    given = [places.add(2).clone() for _ in range(5)]
    for early, late in itertools.pairwise(given):
        assert torch.equal(early, late[: len(early)])
    assert [len(rows) for rows in given] == [2, 4, 6, 8, 10]  # logits are as wide as the classes
    rows = given[-1].double()
    torch.testing.assert_close(rows, places.frame.double())
    gram = rows @ rows.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(10).double(), atol=1e-6, rtol=0)
    off = gram[~torch.eye(10, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, -1 / 9), atol=1e-6, rtol=0)
    assert float(rows.sum(0).norm()) < 1e-5
    assert float(rows[:6].sum(0).norm()) == pytest.approx(1.632993, abs=1e-5)  # golden 2


def test_a_collapsed_prefix_is_an_etf_of_its_own_after_centring():
    """Golden 3: six of ten classes, features on their vertices."""
    rows = Vertices(10, 64, generator=torch.Generator().manual_seed(1)).add(6).double()
    data = FeatureSet(rows.repeat(4, 1), torch.arange(6).repeat(4), 6)
    means = data.stats.means
    centred = data.stats.centered_means()

    def cosines(m):
        u = m / m.norm(dim=1, keepdim=True)
        return (u @ u.T)[~torch.eye(6, dtype=torch.bool)]

    torch.testing.assert_close(
        cosines(means), torch.full((30,), -1 / 9).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        cosines(centred), torch.full((30,), -0.2).double(), atol=1e-6, rtol=0
    )
    own = torch.cosine_similarity(centred, rows, dim=1)
    torch.testing.assert_close(own, torch.full((6,), 0.9622504).double(), atol=1e-6, rtol=0)
    assert float(metrics.equiangular(centred)) == pytest.approx(0, abs=1e-6)


def test_hungarian_takes_the_best_free_vertices():
    rng = torch.Generator().manual_seed(0)
    places = Vertices(12, 16, policy="hungarian", generator=rng)
    places.add(4)
    first = places.rows.clone()
    free = places.frame[4:]
    means = torch.randn(3, 16, generator=rng)
    rows = places.add(3, means)
    assert torch.equal(rows[:4], first)
    cost = torch.nn.functional.normalize(means, dim=1) @ free.T
    _, best = linear_sum_assignment(cost.numpy(), maximize=True)
    torch.testing.assert_close(rows[4:], free[torch.as_tensor(best)])
    assert len(torch.unique(places.rows, dim=0)) == 7
    near = free[[5, 2]] + 0.01  # means close to vertices get them
    again = Vertices(12, 16, policy="hungarian", generator=torch.Generator().manual_seed(0))
    again.add(4)
    torch.testing.assert_close(again.add(2, near)[4:], free[[5, 2]])


def test_expanding_keeps_a_simplex_and_moves_little():
    places = Vertices(4, 16, policy="expand", generator=torch.Generator().manual_seed(0))
    old = places.add(4).clone()
    means = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    rows = places.add(2, means)
    gram = rows.double() @ rows.double().T
    want = torch.full((6, 6), -1 / 5).double().fill_diagonal_(1)
    torch.testing.assert_close(gram, want, atol=1e-5, rtol=0)
    moved = torch.cosine_similarity(rows[:4], old, dim=1)
    haar = frames.simplex_etf(6, 16, generator=torch.Generator().manual_seed(2))
    assert float(moved.min()) > 0.8 > float(torch.cosine_similarity(haar[:4], old, dim=1).max())


def test_targets_evolve_from_means_to_vertices():
    rows = frames.simplex_etf(4, 8, generator=torch.Generator().manual_seed(0))[:2]
    means = torch.randn(2, 8)
    torch.testing.assert_close(evolve(means, rows, 1.0), rows)
    torch.testing.assert_close(evolve(means, rows, 0.0), torch.nn.functional.normalize(means))
    orthogonal = torch.eye(4)[2:3], torch.eye(4)[:1]  # golden 11
    half = evolve(*orthogonal, 0.5)[0]
    assert half[0] == pytest.approx(math.sqrt(0.5))
    assert half[2] == pytest.approx(math.sqrt(0.5))
    with pytest.raises(InputError, match="t runs from 0 to 1"):
        evolve(means, rows, 1.5)
    with pytest.raises(InputError, match="must agree"):
        evolve(means, rows[:1], 0.5)


def test_state_round_trip():
    places = Vertices(8, 16, policy="hungarian", generator=torch.Generator().manual_seed(0))
    places.add(3)
    other = Vertices(8, 16, policy="hungarian")
    other.load_state_dict({k: v.clone() for k, v in places.state_dict().items()})
    means = torch.randn(2, 16)
    assert torch.equal(places.add(2, means), other.add(2, means))


def test_errors():
    places = Vertices(4, 8)
    places.add(3)
    with pytest.raises(InputError, match=r"2 classes arrive and 1 of 4 vertices are free"):
        places.add(2)
    chosen = Vertices(4, 8, policy="hungarian")
    chosen.add(2)
    with pytest.raises(InputError, match="places classes by their means"):
        chosen.add(1)
    with pytest.raises(InputError, match=r"means must be \[1, 8\]"):
        chosen.add(1, torch.zeros(2, 8))
    with pytest.raises(InputError, match="policy"):
        Vertices(4, 8, policy="nearest")
    narrow = Vertices(4, 3, policy="expand")
    narrow.add(4)
    with pytest.raises(InputError, match="5 classes need dim ≥ 4"):
        narrow.add(1, torch.ones(1, 3))
