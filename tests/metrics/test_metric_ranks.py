"""Every measure of a statistic that 2 or 3 gloo ranks accumulated equals that of one process."""

import warnings

import pytest
import torch
from distributed import run_ranks
from test_properties import COUNTED, DEBIASED, MEASURES, outcome, trial

from ncmethods import metrics
from ncmethods.stats import ClassStats


def shards(y, world_size):
    """Uneven: the first rank has none of class 1, the last of three has no sample at all."""
    rank = torch.arange(len(y)) % 3 // 2  # two thirds and one third
    rank[y == 1] = 1
    return [(rank == r).nonzero().flatten() for r in range(world_size)]


def measured(c):
    values = {name: outcome(MEASURES[name], c) for name in MEASURES}
    return values, dict(metrics.report(c.stats))


def on_ranks(rank, world_size):
    warnings.filterwarnings("ignore", "Classes .* single sample")
    out = {}
    for dtype in (torch.float32, torch.float64):
        for gaps in (False, True):
            c = trial(dtype, gaps)
            rows, test_rows = (shards(y, world_size)[rank] for y in (c.y, c.yt))
            stats = ClassStats(*c.W.shape).update(c.x[rows], c.y[rows])
            test = ClassStats(*c.W.shape).update(c.xt[test_rows], c.yt[test_rows])
            local = int(stats.N), bool(stats.counts[1] > 0)
            both = c.but(given=stats.all_reduce(), given_test=test.all_reduce())
            out[dtype, gaps] = (*measured(both), local)
    return out


@pytest.mark.filterwarnings("ignore:Classes .* single sample")
@pytest.mark.parametrize("world_size", [2, 3])
def test_measures_on_ranks(world_size):
    ranks = run_ranks(on_ranks, world_size)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        for gaps in (False, True):
            c = trial(dtype, gaps)
            sizes, seen = zip(*(result[dtype, gaps][2] for result in ranks))
            assert sum(sizes) == len(c.y)
            assert len(set(sizes)) == world_size
            assert (0 in sizes) == (world_size == 3)
            assert not seen[0]
            want, want_report = measured(c)
            assert sum(isinstance(value, str) for value in want.values()) == 0
            for values, report, _ in (result[dtype, gaps] for result in ranks):
                for name, value in values.items():
                    rtol = 0 if name in COUNTED else bound
                    if name == "one_vs_rest_margin":
                        rtol = 1e-5  # iterated to 1e-9 in squared distance
                    torch.testing.assert_close(
                        value, want[name], rtol=rtol, atol=rtol, equal_nan=True,
                        msg=lambda m, n=name: f"{n}: {m}",
                    )  # fmt: skip
                    assert value.isfinite().all() or (gaps and name in DEBIASED)
                    assert torch.equal(
                        value.nan_to_num(), ranks[0][dtype, gaps][0][name].nan_to_num()
                    )
                assert report == pytest.approx(want_report, rel=bound, abs=bound, nan_ok=True)
