"""rank: the same values as its scores, fair warnings, and orders that scipy confirms."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, weightedtau

from ncmethods import transfer
from ncmethods._core import InputError
from ncmethods.features import FeatureSet

N, K = 240, 4
LABELS = torch.arange(N) % K


def features(quality, d=20, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return quality * torch.randn(K, d, generator=rng)[LABELS] + torch.randn(N, d, generator=rng)


@pytest.fixture(scope="module")
def pool():
    return {
        name: FeatureSet(features(quality, seed=i), LABELS, K)
        for i, (name, quality) in enumerate({"good": 2.0, "fair": 0.6, "poor": 0.0}.items())
    }


def test_contract_snippet(pool):
    found = transfer.rank(pool, scores=["ncti", "logme", "nc1"])
    assert list(found.values) == [*transfer.BASELINES, "ncti", "logme", "nc1"]
    for score in found.values:
        assert found.best(score) == "good"
        assert found.ranks(score)["good"] == 1
    assert "good" in str(found)
    json.dumps(found.values)


@pytest.mark.parametrize("score", sorted(set(transfer.SCORES) - {"leep", "nce", "energy"}))
def test_values_are_those_of_the_functions(pool, score):
    found = transfer.rank(pool, scores=[score], baselines=(), pca=8)
    function = getattr(transfer, score)
    if isinstance(function, transfer.PoolScore):
        want = function(pool)
        assert found.components[score].keys() == pool.keys()
    else:
        wide = partial(function, pca=8) if score in PCA else function
        want = {
            name: wide(data if score not in MOMENTS else data.stats) for name, data in pool.items()
        }
    for name, value in found.values[score].items():
        assert value == pytest.approx(float(want[name]), rel=1e-6), name


MOMENTS = {"h_score", "logme", "nc1", "vci", "cdnv"}
PCA = {"h_score", "vci", "lda", "sfda", "transrate"}


def test_every_score_says_that_good_features_are_better_than_noise(pool):
    some = {name: pool[name] for name in ("good", "poor")}
    found = transfer.rank(some, scores=transfer.SCORES)
    left_out = {"leep", "nce", "energy"}
    assert set(found.values) == set(transfer.SCORES) - left_out
    for score in set(found.values) - {"face", "face_pool"}:  # F is large for overlap too
        assert found.ranks(score)["good"] == 1, score
    assert sum("no candidate has the source_logits" in w for w in found.warnings) == 3


def test_source_scores_and_columns(pool):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(N, 7, generator=rng) + 3 * torch.eye(K, 7)[LABELS]
    candidates = {
        "good": transfer.Candidate(pool["good"], logits, source_accuracy=0.8, parameters=10),
        "poor": transfer.Candidate(lambda: pool["poor"], source_accuracy=0.7),
    }
    found = transfer.rank(candidates, scores=["leep", "energy"])
    assert found.values["leep"]["good"] == pytest.approx(
        float(transfer.leep(logits.double().softmax(1), LABELS))
    )
    assert found.values["energy"]["good"] == pytest.approx(float(transfer.energy(logits)))
    assert math.isnan(found.values["leep"]["poor"])
    assert found.ranks("leep") == {"good": 1, "poor": None}
    assert found.values["source_accuracy"] == {"good": 0.8, "poor": 0.7}
    assert any("which poor lack" in w for w in found.warnings)


def test_candidates_are_loaded_one_at_a_time(pool):
    alive, most = [], []

    class Watched(FeatureSet):
        def __del__(self):
            alive.remove(1)

    def load(name):
        def make():
            alive.append(1)
            most.append(len(alive))
            return Watched(pool[name].features, LABELS, K)

        return make

    transfer.rank({name: transfer.Candidate(load(name)) for name in pool}, scores=["ncti"])
    assert max(most) <= 2  # the next one is loaded before the last one is let go


def test_bootstrap_draws_within_classes_and_covers_the_estimate(pool):
    found = transfer.rank(pool, scores=["logme", "ncti", "cdnv"], bootstrap=40)
    assert found.first["logme"]["good"] == 1.0
    assert sum(found.first["ncti"].values()) == pytest.approx(1.0)
    for score in ("logme", "cdnv"):
        for name in ("good", "fair"):
            low, high = found.intervals[score][name]
            assert low < high
    low, high = found.intervals["linear_probe"]["fair"]
    hits = round(found.values["linear_probe"]["fair"] * N)
    theirs = binomtest(hits, N).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=1e-5)
    again = transfer.rank(pool, scores=["logme", "ncti", "cdnv"], bootstrap=40)
    assert again.intervals == found.intervals
    other = transfer.rank(pool, scores=["logme"], bootstrap=40, seed=1)
    assert other.intervals["logme"] != found.intervals["logme"]

    from ncmethods.transfer.rank import _draws

    for rows in _draws(LABELS, 3, 0):
        assert torch.equal(LABELS[rows].sort().values, LABELS.sort().values)
        assert len(rows.unique()) < N


def test_the_bootstrap_spread_is_that_of_new_samples():
    """The standard deviation of LogME over bootstrap samples against that over fresh ones."""
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(K, 6, generator=rng)

    def fresh():
        return FeatureSet(means[LABELS] + torch.randn(N, 6, generator=rng), LABELS, K)

    values = [float(transfer.logme(fresh().stats)) for _ in range(120)]
    found = transfer.rank({"a": fresh(), "b": fresh()}, ["logme"], baselines=(), bootstrap=120)
    low, high = found.intervals["logme"]["a"]
    assert (high - low) / 3.92 == pytest.approx(np.std(values), rel=0.35)


def test_warnings_name_what_is_wrong():
    wide = FeatureSet(features(1.0, d=300), LABELS, K)
    found = transfer.rank({"a": wide, "b": wide}, scores=["h_score"], pca=None)
    text = " ".join(found.warnings)
    assert "saturate" in text
    assert "a, b" in text
    assert "the same for every candidate" in text
    assert not transfer.rank({"a": wide}, scores=["h_score"], pca=64).warnings
    y = torch.cat([torch.zeros(20), torch.full((20,), 2), torch.tensor([4.0])]).long()
    gaps = FeatureSet(torch.randn(41, 5), y, 6)
    text = " ".join(transfer.rank({"a": gaps}, scores=["logme"]).warnings)
    assert "no sample: 1, 3, 5" in text
    assert "one sample: 4" in text


def test_collapsed_constant_and_ignored_rows():
    collapsed = FeatureSet(torch.eye(K)[LABELS], LABELS, K)
    constant = FeatureSet(torch.ones(N, 3), LABELS, K)
    found = transfer.rank({"a": collapsed, "b": constant}, scores=["logme", "h_score", "vci"])
    for score in ("logme", "h_score"):
        assert found.best(score) == "a"
        assert all(math.isfinite(v) for v in found.values[score].values())
    some = LABELS.clone()
    some[::5] = -1
    x = features(1.0)
    with_ignored = transfer.rank({"a": FeatureSet(x, some, K)}, scores=["logme"])
    kept = FeatureSet(x[some >= 0], some[some >= 0], K)
    assert with_ignored.values == transfer.rank({"a": kept}, scores=["logme"]).values


def test_agreement_is_scipys_weighted_tau(pool):
    assert transfer.weighted_tau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.5669497)
    found = transfer.rank(pool, scores=["logme"])
    truth = {"good": 0.9, "fair": 0.95, "poor": 0.1}
    said = found.agreement(truth)["logme"]
    names = list(pool)
    want = weightedtau([found.values["logme"][n] for n in names], [truth[n] for n in names])
    assert said.tau == pytest.approx(want.statistic)
    assert said.choice == "good"
    assert said.regret == pytest.approx(0.05)
    with pytest.raises(InputError, match=r"missing: \['poor'\]"):
        found.agreement({"good": 1.0, "fair": 0.5})


def test_published_columns_give_published_correlations():
    """Rows of thuml/Transfer-Learning-Library@c4aa59e, examples/model_selection/README.md.

    Ten networks each, from GoogleNet to MNasNet. These three of its summary cells follow from its
    own columns; others do not (Aircraft, Pets), or copy a column (DTD).
    """
    sun = [62.0, 65.7, 64.7, 64.8, 66.0, 62.3, 63.0, 64.7, 60.5, 60.7]
    h = [71.35, 114.21, 110.39, 113.63, 116.51, 72.16, 95.80, 103.09, 75.90, 80.91]
    assert transfer.weighted_tau(h, sun) == pytest.approx(0.918, abs=6e-4)
    cars = [91.0, 92.3, 91.7, 91.7, 92.0, 91.5, 91.5, 91.0, 91.0, 88.5]
    nce = [-4.312, -4.110, -4.221, -4.218, -4.142, -4.271, -4.175, -4.151, -4.306, -4.338]
    assert transfer.weighted_tau(nce, cars) == pytest.approx(0.750, abs=6e-4)
    cifar = [96.2, 97.5, 96.8, 97.7, 97.9, 97.2, 97.4, 97.4, 95.7, 96.8]
    leep = [-1.385, -1.259, -1.010, -0.829, -0.838, -1.035, -0.934, -0.888, -1.100, -1.066]
    assert transfer.weighted_tau(leep, cifar) == pytest.approx(0.638, abs=6e-4)


def test_errors(pool):
    with pytest.raises(InputError, match="pool is empty"):
        transfer.rank({})
    with pytest.raises(InputError, match="Did you mean 'logme'"):
        transfer.rank(pool, scores=["logmee"])
    with pytest.raises(InputError, match="at least two, got 1"):
        transfer.rank({"a": pool["good"]}, scores=["ncti"])
    short = FeatureSet(features(1.0)[:100], LABELS[:100], K)
    with pytest.raises(InputError, match="good has 240 labels and short 100"):
        transfer.rank({"good": pool["good"], "short": short}, scores=["logme"])
    with pytest.raises(InputError, match="has none"):
        transfer.rank({"a": FeatureSet(features(1.0), None, K)})
    with pytest.raises(InputError, match="source_logits of 3 rows"):
        transfer.rank({"a": transfer.Candidate(pool["good"], torch.zeros(3, 5))}, scores=["leep"])
    with pytest.raises(InputError, match=r"partial\(few_shot_cdnv, shots=…\)"):
        transfer.rank(pool, scores=[transfer.few_shot_cdnv])
    bound = transfer.rank(pool, scores=[partial(transfer.few_shot_cdnv, shots=5)])
    assert bound.best("few_shot_cdnv(shots=5)") == "good"
    with pytest.raises(InputError, match="Unknown score"):
        bound.ranks("logme")
