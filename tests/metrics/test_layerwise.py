"""Separation law, effective depth and progressive collapse against closed forms."""

import math

import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.metrics.layerwise import effective_depth, progressive_collapse, separation_law
from ncmethods.metrics.nc1 import nc1_pinv
from ncmethods.stats import ClassStats


def test_separation_law_recovers_a_geometric_decay():
    law = separation_law([8.0 * 0.5**i for i in range(6)])
    assert law == pytest.approx({"slope": -math.log(2), "ratio": 0.5, "r2": 1.0})
    rough = separation_law([8.0, 5.0, 1.0, 1.1])
    slope, _ = np.polyfit(range(4), np.log([8.0, 5.0, 1.0, 1.1]), 1)
    r = np.corrcoef(range(4), np.log([8.0, 5.0, 1.0, 1.1]))[0, 1]
    assert rough["slope"] == pytest.approx(slope)
    assert rough["r2"] == pytest.approx(r**2)
    assert separation_law(10 * torch.tensor([8.0, 5.0, 1.0, 1.1])) == pytest.approx(rough)
    with pytest.raises(InputError, match="3 layers"):
        separation_law([1.0, 0.0, 2.0])


def test_separation_law_of_layers_that_halve_the_spread():
    """Means kept, deviations halved by each layer: NC1 falls to a quarter."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    means = torch.randn(3, 5, dtype=torch.float64, generator=g)[y]
    noise = torch.randn(60, 5, dtype=torch.float64, generator=g)
    for c in range(3):
        noise[y == c] -= noise[y == c].mean(0)
    fuzziness = [
        nc1_pinv(ClassStats(3, 5).update(means + noise * 0.5**depth, y)) for depth in range(4)
    ]
    law = separation_law(torch.stack(fuzziness))
    assert law == pytest.approx({"slope": -2 * math.log(2), "ratio": 0.25, "r2": 1.0})


def test_effective_depth():
    assert effective_depth([0.5, 0.2, 0.009, 0.0]) == 2
    assert effective_depth({"a": 0.5, "b": 0.2}) == 2
    assert effective_depth([0.5, 0.2], eps=0.2) == 1
    assert effective_depth([0.0, 0.2, 0.0]) == 0  # the first one, whatever follows
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        effective_depth([1.5])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        effective_depth([])


def test_progressive_collapse_counts_the_falling_steps():
    assert progressive_collapse([3.0, 2.0, 1.0, 0.5]) == 1
    assert progressive_collapse([0.5, 1.0, 2.0]) == 0
    assert progressive_collapse({"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.1}) == pytest.approx(2 / 3)
    assert progressive_collapse(torch.tensor([1.0, 1.0, 0.5])) == 0.5  # a tie is no fall
    g = np.random.default_rng(0)
    values = g.normal(size=30)
    naive = np.mean([values[i + 1] < values[i] for i in range(29)])
    assert progressive_collapse(values.tolist()) == pytest.approx(naive)
    # Only the order counts.
    assert progressive_collapse(np.exp(values).tolist()) == progressive_collapse(values.tolist())
    for bad in ([1.0], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(InputError, match="at least 2 values"):
            progressive_collapse(bad)
