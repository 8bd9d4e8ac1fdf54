"""AUROC, AUPR, FPR, intervals: golden values, scikit-learn, pytorch-ood, invariances, errors."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ncmethods import ood
from ncmethods._core import InputError
from ncmethods.ood.evaluation import aupr, auroc, bootstrap, evaluate, fpr95, fpr_at_tpr


def drawn(seed, n=60, m=35, levels=None):
    """Scores of both sides; with ``levels`` rounded so that many tie."""
    rng = torch.Generator().manual_seed(seed)
    s, t = torch.randn(n, generator=rng), 0.8 + torch.randn(m, generator=rng)
    return (s, t) if levels is None else tuple((x * levels).round() / levels for x in (s, t))


def joined(s, t):
    return np.r_[np.zeros(len(s)), np.ones(len(t))], torch.cat((s, t)).numpy()


def test_golden_auroc():
    s, t = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    # 9 pairs: t > s in 4, t = s in 4.
    assert float(auroc(s, t)) == pytest.approx(2 / 3, abs=1e-15)
    assert auroc(s, t).dtype == torch.float64
    assert float(auroc(torch.ones(4), torch.ones(7))) == 0.5


def test_golden_fpr():
    s, t = torch.arange(1.0, 21), torch.tensor([19.5, 18.5, 30, 5])
    assert float(fpr95(s, t, positive="id")) == 0.5
    assert float(fpr95(s, t, positive="ood")) == 0.8
    assert float(fpr95(s, t)) == 0.8
    assert float(fpr_at_tpr(s, t, tpr=0.75)) == pytest.approx(2 / 20)  # threshold 18.5
    assert float(fpr_at_tpr(s, t, tpr=1e-12)) == 0  # one hit is the least


def test_golden_aupr_average_precision_and_trapezoid():
    t, s = torch.tensor([4.0, 2.0]), torch.tensor([3.0, 1.0])  # labels 1, 0, 1, 0 from the top
    assert float(aupr(s, t)) == pytest.approx(5 / 6, abs=1e-15)
    assert float(aupr(s, t, method="trapezoid")) == pytest.approx(19 / 24, abs=1e-15)
    same = torch.ones(5)
    assert float(aupr(same, same)) == 0.5
    assert float(aupr(same, same, method="trapezoid")) == 0.75


@pytest.mark.parametrize("levels", [None, 2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_is_scikit_learns(seed, levels):
    s, t = drawn(seed, levels=levels)
    y, scores = joined(s, t)
    assert float(auroc(s, t)) == pytest.approx(roc_auc_score(y, scores), abs=1e-14)
    assert float(aupr(s, t)) == pytest.approx(average_precision_score(y, scores), abs=1e-14)
    assert float(aupr(s, t, positive="id")) == pytest.approx(
        average_precision_score(1 - y, -scores), abs=1e-14
    )
    for sign, truth, positive in ((1, y, "ood"), (-1, 1 - y, "id")):
        fpr, tpr, _ = roc_curve(truth, sign * scores, drop_intermediate=False)
        for share in (0.5, 0.8, 0.95, 1.0):
            want = fpr[np.argmax(tpr >= share - 1e-12)]
            got = fpr_at_tpr(s, t, tpr=share, positive=positive)
            assert float(got) == pytest.approx(want, abs=1e-14)


# OODMetrics of pytorch-ood 0.4.0 on drawn(seed, levels=…): AUROC, AUPR-IN, AUPR-OUT, FPR95TPR.
KEPT = {
    (0, None): [0.69142857142857, 0.77746032140662, 0.6021867154383, 0.85],
    (1, 2): [0.8352380952381, 0.88971841443808, 0.77458165842094, 0.71666666666667],
    (2, 0.5): [0.66547619047619, 0.84013822434875, 0.6161982034193, 0.83333333333333],
}


@pytest.mark.parametrize(("seed", "levels"), KEPT)
def test_is_pytorch_oods(seed, levels):
    s, t = drawn(seed, levels=levels)
    ours = [
        auroc(s, t),
        aupr(s, t, positive="id", method="trapezoid"),
        aupr(s, t, method="trapezoid"),
        fpr95(s, t, positive="ood"),
    ]
    assert [float(x) for x in ours] == pytest.approx(KEPT[seed, levels], abs=1e-12)


def test_kept_values_are_those_of_pytorch_ood():
    metrics = pytest.importorskip("pytorch_ood.metrics")
    for (seed, levels), kept in KEPT.items():
        s, t = drawn(seed, levels=levels)
        theirs = metrics.OODMetrics()
        theirs.update(torch.cat((s, t)), torch.cat((torch.zeros(len(s)), -torch.ones(len(t)))))
        found = theirs.compute()
        names = ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95TPR")
        assert [float(found[name]) for name in names] == pytest.approx(kept, abs=1e-12)


MEASURES = [
    auroc,
    aupr,
    lambda s, t: aupr(s, t, positive="id"),
    lambda s, t: aupr(s, t, method="trapezoid"),
    fpr95,
    lambda s, t: fpr95(s, t, positive="id"),
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("levels", [None, 2])
def test_only_the_order_matters(measure, levels):
    s, t = (x.double() for x in drawn(5, levels=levels))
    want = measure(s, t)
    for map_ in (torch.exp, lambda x: x**3, lambda x: 1000 * x - 7):
        assert measure(map_(s), map_(t)) == want
    assert measure(s.flip(0), t[torch.randperm(len(t))]) == want


def test_negation_swaps_the_sides():
    s, t = drawn(6, levels=2)
    assert float(auroc(-s, -t)) == pytest.approx(1 - float(auroc(s, t)), abs=1e-15)
    assert float(auroc(t, s)) == pytest.approx(1 - float(auroc(s, t)), abs=1e-15)
    assert aupr(-t, -s, positive="id") == aupr(s, t, positive="ood")
    assert fpr95(-t, -s, positive="id") == fpr95(s, t, positive="ood")


def test_perfect_and_infinite_scores():
    s, t = torch.tensor([-float("inf"), 0.0, 1.0]), torch.tensor([2.0, float("inf")])
    for measure in MEASURES[:4]:
        assert measure(s, t) == 1
    assert fpr95(s, t) == 0
    assert fpr95(s, t, positive="id") == 0
    assert auroc(torch.tensor([float("inf")]), torch.tensor([float("inf")])) == 0.5


def test_dtype_and_gradient_do_not_matter():
    s, t = drawn(7, levels=2)
    s = s.requires_grad_()
    assert auroc(s.half(), t.long().half()) == auroc(s.double(), t.long())
    assert not auroc(s, t).requires_grad


def test_evaluate_means_over_sets_not_samples():
    s, near = drawn(1)
    _, far = drawn(2, m=500)
    found = evaluate(s, {"a": near, "b": far + 3, "c": far + 1}, near=["a"])
    assert found["a/auroc"] == float(auroc(s, near))
    assert found["a/aupr"] == float(aupr(s, near))
    assert found["a/fpr95_ood"] == float(fpr95(s, near, positive="ood"))
    assert found["a/fpr95_id"] == float(fpr95(s, near, positive="id"))
    for key in ("auroc", "aupr", "fpr95_ood", "fpr95_id"):
        row = [found[f"{name}/{key}"] for name in "abc"]
        assert found[f"mean/{key}"] == pytest.approx(np.mean(row))
        assert found[f"near/{key}"] == row[0]
        assert found[f"far/{key}"] == pytest.approx(np.mean(row[1:]))
    assert len(found) == 24
    assert set(evaluate(s, {"a": near})) == {
        f"{name}/{key}"
        for name in ("a", "mean")
        for key in ("auroc", "aupr", "fpr95_ood", "fpr95_id")
    }
    assert "far/auroc" not in evaluate(s, {"a": near}, near=["a", "a"])


def test_evaluate_warns_of_a_wrong_sign():
    s = torch.arange(20.0)
    with pytest.warns(UserWarning, match=r"'b' is 0\.00, far below chance"):
        found = evaluate(s, {"a": s, "b": s - 100})
    assert found["mean/auroc"] == 0.25


def test_bootstrap_covers():
    """The truth lies in nominal 90 % intervals of 120 data sets about as often as it should."""
    truth = 0.5 * (1 + torch.erf(torch.tensor(0.8 / 2)))  # P(N(0.8, 1) > N(0, 1))
    hits = []
    for seed in range(120):
        low, high = bootstrap(auroc, *drawn(100 + seed), level=0.9, repeats=150, seed=seed)
        assert low < high
        hits.append(low <= truth <= high)
    # Binomial(120, 0.9) has sd 2.7 %; percentile intervals are a little short.
    assert 0.82 <= np.mean(hits) <= 0.97


def test_bootstrap_is_that_of_numpy_and_repeats():
    s, t = drawn(8)
    got = bootstrap(auroc, s, t, seed=3)
    assert got == bootstrap(auroc, s, t, seed=3) != bootstrap(auroc, s, t, seed=4)
    rng = np.random.default_rng(0)
    x, y = rng.choice(s, (3000, len(s))), rng.choice(t, (3000, len(t)))
    values = (y[:, None, :] > x[:, :, None]).mean((1, 2))
    np.testing.assert_allclose(got, np.quantile(values, [0.025, 0.975]), atol=0.02)
    wide = bootstrap(lambda a, b: float(a.mean() - b.mean()), s, t, level=0.99, repeats=50)
    assert wide[0] < float(s.mean() - t.mean()) < wide[1]


def test_errors():
    s, t = drawn(9)
    for measure in MEASURES:
        with pytest.raises(InputError, match=r"scores_ood .* at least one score"):
            measure(s, t[:0])
        with pytest.raises(InputError, match="1 NaN of 60"):
            measure(s.clone().index_fill_(0, torch.tensor([3]), float("nan")), t)
    with pytest.raises(InputError, match=r"\(60, 1\)"):
        auroc(s[:, None], t)
    with pytest.raises(InputError, match="list"):
        auroc([1.0], t)
    with pytest.raises(InputError, match="Unknown positive 'out'"):
        aupr(s, t, positive="out")
    with pytest.raises(InputError, match=r"Unknown method 'trapez'.*'trapezoid'"):
        aupr(s, t, method="trapez")
    with pytest.raises(InputError, match="Unknown positive"):
        fpr95(s, t, positive="ID")
    for tpr in (0, 1.5, -1):
        with pytest.raises(InputError, match="tpr is a share"):
            fpr_at_tpr(s, t, tpr=tpr)
    with pytest.raises(InputError, match="at least one set"):
        evaluate(s, {})
    with pytest.raises(InputError, match="Unknown near set"):
        evaluate(s, {"a": t}, near=["b"])
    with pytest.raises(InputError, match=r"\['mean'\] are names of means"):
        evaluate(s, {"a": t, "mean": t})
    with pytest.raises(InputError, match="level"):
        bootstrap(auroc, s, t, level=1.0)
    with pytest.raises(InputError, match="repeats"):
        bootstrap(auroc, s, t, repeats=0)


def test_is_public():
    assert ood.auroc is auroc
