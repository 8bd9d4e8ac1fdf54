"""Threshold: golden values, coverage in simulation, groups, ties, broken scores; discoveries."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from ncmethods._core import InputError
from ncmethods.ood.calibration import Threshold, _flaggable, benjamini_hochberg

F64 = {"dtype": torch.float64}
NAN, INF = float("nan"), float("inf")


def naive(calibration, scores):
    s = np.asarray(calibration, dtype=float)
    return [(1 + (s >= x).sum()) / (len(s) + 1) for x in np.asarray(scores, dtype=float)]


def test_golden_values():
    flag = Threshold.fit(torch.arange(1.0, 100), alpha=0.05)
    s = torch.tensor([95.5, 95.0, 200.0, -1.0])
    assert flag.p_value(s).tolist() == pytest.approx([0.05, 0.06, 0.01, 1.0], abs=1e-15)
    assert flag(s).tolist() == [True, False, True, False]
    assert flag.value.tolist() == [95]
    with pytest.raises(InputError, match="at least 19 calibration scores, got 18"):
        Threshold.fit(torch.arange(18.0), alpha=0.05)
    assert Threshold.fit(torch.arange(19.0), alpha=0.05).value.tolist() == [18]


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.2, 0.3, 1 / 3, 0.7])
def test_value_flag_and_refusal_agree_for_every_size(alpha):
    """With distinct scores the threshold is the ⌈(n+1)(1−α)⌉-th smallest, in exact fractions."""
    from fractions import Fraction

    share = Fraction(alpha).limit_denominator(1000)
    for n in range(1, 240):
        scores = torch.arange(1.0, n + 1)
        if (n + 1) * share < 1:
            with pytest.raises(InputError, match="at least"):
                Threshold.fit(scores, alpha)
            continue
        flag = Threshold.fit(scores, alpha)
        want = n + 1 - (n + 1) * share // 1
        assert flag.value.tolist() == [float(want)]
        assert flag(torch.tensor([want, want + 0.5])).tolist() == [False, True]


def test_many_scores_do_not_lose_digits():
    """(n + 1)·α = 1 048 576.95, which float32 rounds up to a whole number."""
    assert _flaggable(torch.tensor([20_971_538, 19]), 0.05).tolist() == [1_048_576, 1]


@pytest.mark.parametrize("seed", range(3))
def test_p_values_are_those_of_a_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    calibration = (3 * torch.randn(50, generator=rng)).round()
    scores = torch.cat(((3 * torch.randn(40, generator=rng)).round(), torch.randn(20) * 4))
    flag = Threshold.fit(calibration, alpha=0.1)
    got = flag.p_value(scores)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, naive(calibration, scores), rtol=1e-15)
    assert flag(scores).tolist() == (got <= 0.1 + 1e-9).tolist()
    assert (flag(scores) == (scores > flag.value)).all()


def test_p_values_of_exchangeable_draws_are_uniform():
    """Ranks of n + 1 exchangeable scores: each p of 1/(n+1), …, 1 as often as the next."""
    n, splits = 19, 4000
    draws = torch.randn(splits, n + 1, generator=torch.Generator().manual_seed(0)) ** 3
    p = [Threshold.fit(row[:n], 0.05).p_value(row[n:]) for row in draws]
    ranks = (torch.cat(p) * (n + 1)).round().long()
    counts = np.bincount(ranks, minlength=n + 2)[1:]
    assert scipy_stats.chisquare(counts).pvalue > 0.01
    assert counts.sum() == splits


@pytest.mark.parametrize("levels", [None, 3])
def test_false_alarms_stay_below_alpha(levels):
    """500 splits; with ties they are fewer, and never more."""
    rng = torch.Generator().manual_seed(1)
    alpha, n, rates = 0.1, 59, []
    for _ in range(500):
        s = torch.randn(n + 400, generator=rng)
        s = s if levels is None else (s * levels).round()
        rates.append(float(Threshold.fit(s[:n], alpha)(s[n:]).double().mean()))
    error = np.std(rates) / 500**0.5
    assert error < 0.002
    assert np.mean(rates) < alpha + 3 * error
    if levels is None:  # (n + 1) α = 6 is whole: the promise is met exactly
        assert np.mean(rates) > alpha - 3 * error
    else:
        assert np.mean(rates) < 0.09


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.05), (500, 0.05), (1000, 0.05), (30, 0.1)])
def test_band_is_that_of_beta(n, alpha):
    l = int((n + 1) * alpha + 1e-9)  # noqa: E741
    flag = Threshold.fit(torch.arange(float(n)), alpha)
    want = scipy_stats.beta(l, n + 1 - l).ppf([0.05, 0.95])
    np.testing.assert_allclose(flag.band(), [want], rtol=1e-12)
    # Uniform scores: the rate of a threshold is one minus it.
    draws = torch.rand(4000, n, generator=torch.Generator().manual_seed(2), **F64)
    rates = 1 - draws.sort(1).values[:, n - l]
    np.testing.assert_allclose(rates.quantile(torch.tensor([0.05, 0.95], **F64)), want, rtol=0.08)
    one = Threshold.fit(draws[0], alpha)
    assert one.value.item() == pytest.approx(1 - rates[0].item(), abs=1e-12)


def test_band_golden():
    """90 % bands of the reference sheet, in per cent."""
    for n, want in ((99, (2.0, 9.0)), (500, (3.5, 6.7)), (1000, (3.9, 6.2)), (4000, (4.5, 5.6))):
        got = 100 * Threshold.fit(torch.arange(float(n))).band()[0]
        assert got.tolist() == pytest.approx(want, abs=0.06)
    with pytest.raises(InputError, match="level"):
        Threshold.fit(torch.arange(30.0)).band(1.2)


def test_groups_are_fits_of_their_own():
    rng = torch.Generator().manual_seed(4)
    groups = torch.randint(3, (200,), generator=rng)
    scores = (torch.randn(200, generator=rng) * (1 + groups) * 3).round()
    new, where = torch.randn(90, generator=rng) * 8, torch.randint(3, (90,), generator=rng)
    together = Threshold.fit(scores, 0.1, groups=groups)
    p, flags = together.p_value(new, where), together(new, where)
    for g in range(3):
        alone = Threshold.fit(scores[groups == g], 0.1)
        torch.testing.assert_close(p[where == g], alone.p_value(new[where == g]))
        assert (flags[where == g] == alone(new[where == g])).all()
        assert together.value[g] == alone.value[0]
        torch.testing.assert_close(together.band()[g], alone.band()[0])
    assert "groups=3" in repr(together)


def test_groups_keep_the_promise_within_each():
    """A rare class that scores high: without groups its false alarms are many times alpha."""
    rng = torch.Generator().manual_seed(5)
    plain, grouped = [], []
    for _ in range(200):
        groups = torch.cat((torch.zeros(400), torch.ones(60))).long()
        s = torch.randn(920, generator=rng) + 2 * groups.repeat(2)
        flag = Threshold.fit(s[:460], 0.1)
        plain.append(float(flag(s[460:][groups == 1]).double().mean()))
        flag = Threshold.fit(s[:460], 0.1, groups=groups)
        grouped.append(float(flag(s[460:], groups)[groups == 1].double().mean()))
    assert np.mean(plain) > 0.4
    assert np.mean(grouped) == pytest.approx(6 / 61, abs=0.012)  # ⌊61 · 0.1⌋ of 61


def test_one_group_may_be_named():
    s = torch.arange(30.0)
    flag = Threshold.fit(s, groups=torch.zeros(30, dtype=torch.int64))
    assert flag.p_value(s, torch.zeros(30, dtype=torch.int64)).equal(flag.p_value(s))


def test_broken_and_infinite_scores():
    calibration = torch.cat((torch.arange(28.0), torch.tensor([INF, -INF])))
    flag = Threshold.fit(calibration, alpha=0.1)
    got = flag.p_value(torch.tensor([NAN, INF, -INF, 3e38]))
    assert got.tolist() == pytest.approx([1 / 31, 2 / 31, 1.0, 2 / 31], abs=1e-15)
    assert flag(torch.tensor([NAN])).all()
    groups = torch.arange(60) % 2
    flag = Threshold.fit(torch.arange(60.0), groups=groups)
    nan = torch.tensor([NAN, NAN])
    assert flag.p_value(nan, torch.tensor([0, 1])).tolist() == pytest.approx([1 / 31] * 2)


def test_refusals():
    s = torch.arange(40.0)
    with pytest.raises(InputError, match=r"too few in \[1\], got 10.*without groups"):
        Threshold.fit(s, groups=(torch.arange(40) >= 30).long())
    with pytest.raises(InputError, match=r"too few in \[1, 2\], got 0"):
        Threshold.fit(s, groups=torch.zeros(40, dtype=torch.int64), num_groups=3)
    with pytest.raises(InputError, match="got 0"):
        Threshold.fit(s[:0])
    with pytest.raises(InputError, match="1 of 40 calibration scores are NaN"):
        Threshold.fit(s.clone().index_fill_(0, torch.tensor([7]), NAN))
    for alpha in (0, 1, 5):
        with pytest.raises(InputError, match="alpha is the share"):
            Threshold.fit(s, alpha)
    with pytest.raises(InputError, match=r"\(40, 1\)"):
        Threshold.fit(s[:, None])
    with pytest.raises(InputError, match=r"0 … 39, got -1 … 39"):
        Threshold.fit(s, groups=torch.arange(40).index_fill_(0, torch.tensor([0]), -1))
    with pytest.raises(InputError, match="one entry per row"):
        Threshold.fit(s, groups=torch.arange(39))
    flag = Threshold.fit(s, 0.2, groups=torch.arange(40) % 2)
    with pytest.raises(InputError, match="calibrated with 2 groups: pass groups"):
        flag(s)
    for wrong in (-1, 2):
        with pytest.raises(InputError, match=r"groups must lie in 0 … 1"):
            flag(s[:1], torch.tensor([wrong]))
    with pytest.raises(InputError, match=r"groups must lie in 0 … 0"):
        Threshold.fit(s)(s[:1], torch.tensor([1]))
    with pytest.raises(InputError, match=r"\(40, 1\)"):
        Threshold.fit(s).p_value(s[:, None])


def test_moves_but_does_not_cast():
    flag = Threshold.fit(torch.linspace(0, 1, 40, **F64), groups=torch.arange(40) % 2)
    want = flag.p_value(torch.linspace(0, 1, 9, **F64), torch.arange(9) % 2)
    for cast in (flag.half(), flag.bfloat16(), flag.float(), flag.to(torch.float16)):
        assert cast is flag
        assert flag.levels.dtype == torch.float64
        assert flag.keys.dtype == flag.sizes.dtype == torch.int64
        assert flag.p_value(torch.linspace(0, 1, 9, **F64), torch.arange(9) % 2).equal(want)
    moved = copy.deepcopy(flag).to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    whole = torch.nn.Sequential(flag).half()
    assert whole[0].levels.dtype == torch.float64


def test_state_and_pickle():
    flag = Threshold.fit(torch.randn(50), 0.1, groups=torch.arange(50) % 2)
    s, g = torch.randn(30), torch.arange(30) % 2
    state = flag.state_dict()
    assert sorted(state) == ["keys", "levels", "sizes"]
    for copied in (
        pickle.loads(pickle.dumps(flag)),
        copy.deepcopy(flag),
        Threshold(**state, alpha=flag.alpha),
    ):
        assert copied.alpha == 0.1
        assert copied.p_value(s, g).equal(flag.p_value(s, g))
        assert copied(s, g).equal(flag(s, g))


@pytest.mark.parametrize("seed", range(5))
def test_false_discovery_is_scipys(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate((rng.uniform(size=60), rng.uniform(size=20) ** 6))
    p = np.ceil(p * 100) / 100 if seed % 2 else p  # ties
    for q in (0.01, 0.05, 0.2, 0.5):
        want = scipy_stats.false_discovery_control(p, method="bh") <= q * (1 + 1e-12)
        got = benjamini_hochberg(torch.from_numpy(p), q)
        assert got.tolist() == want.tolist()


def test_false_discovery_golden_and_edges():
    # p_(i) ≤ q i/N first fails at i = 1 and 2 and holds at 3: all three are flagged.
    p = torch.tensor([0.9, 0.03, 0.02, 0.03, 0.8], **F64)
    assert benjamini_hochberg(p, 0.05).tolist() == [False, True, True, True, False]
    assert not benjamini_hochberg(torch.ones(4)).any()
    assert benjamini_hochberg(torch.full((4,), 0.05, **F64), 0.05).all()
    assert benjamini_hochberg(torch.ones(0)).shape == (0,)
    for bad in (torch.tensor([0.0, 0.5]), torch.tensor([1.5]), torch.tensor([NAN]), p[:, None]):
        with pytest.raises(InputError, match="p-values"):
            benjamini_hochberg(bad)
    with pytest.raises(InputError, match="q = 1"):
        benjamini_hochberg(p, 1)


def test_false_discovery_of_conformal_p_values_is_controlled():
    """Folders of 100 images with 20 intruders: a share of at most q of the flags is wrong."""
    rng, q, wrong = torch.Generator().manual_seed(7), 0.2, []
    for _ in range(300):
        flag = Threshold.fit(torch.randn(200, generator=rng))
        s = torch.randn(100, generator=rng)
        s[:20] += 3
        found = benjamini_hochberg(flag.p_value(s), q)
        wrong.append(float(found[20:].sum()) / max(1, int(found.sum())))
    error = np.std(wrong) / 300**0.5
    assert 0.5 * q < np.mean(wrong) < 0.8 * q + 3 * error  # BH keeps q times the share of nulls
