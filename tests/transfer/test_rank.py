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


# Fine-tuned accuracy, H-score, LEEP, LogME, NCE of ten networks from GoogleNet to MNasNet; then the
# weighted τ of each that the page prints. thuml/Transfer-Learning-Library@c4aa59e,
# examples/model_selection/README.md. None: a cell that does not follow from its own columns (ties
# that rounding made). Aircraft and Pets reproduce nowhere, and DTD copies a column.
PUBLISHED = {
    "caltech101": (
        """91.7 75.88 -1.462 1.228 -0.665 94.3 93.73 -1.119 1.387 -0.560
        91.8 91.65 -1.020 1.262 -0.616 93.1 92.54 -0.899 1.305 -0.603
        93.2 92.91 -0.875 1.324 -0.605 91.9 75.02 -0.979 1.172 -0.609
        92.5 86.37 -0.864 1.212 -0.580 93.4 89.90 -0.914 1.228 -0.590
        89.1 75.82 -1.115 1.150 -0.693 91.5 77.00 -1.043 1.178 -0.690""",
        (0.721, 0.127, None, 0.810),
    ),
    "cifar10": (
        """96.2 5.911 -1.385 0.293 -1.139 97.5 6.363 -1.259 0.349 -1.060
        96.8 6.567 -1.010 0.388 -1.007 97.7 6.901 -0.829 0.463 -0.838
        97.9 6.945 -0.838 0.469 -0.851 97.2 6.210 -1.035 0.302 -1.006
        97.4 6.547 -0.934 0.343 -0.946 97.4 6.706 -0.888 0.369 -0.866
        95.7 5.928 -1.100 0.291 -1.089 96.8 6.018 -1.066 0.304 -1.086""",
        (0.800, 0.638, 0.785, 0.714),
    ),
    "cifar100": (
        """83.2 29.33 -3.234 1.037 -2.751 86.6 36.47 -2.995 1.070 -2.615
        84.5 40.20 -2.612 1.099 -2.516 87.0 43.80 -2.365 1.130 -2.285
        87.6 44.19 -2.410 1.133 -2.369 84.8 32.13 -2.665 1.029 -2.504
        85.0 37.51 -2.494 1.051 -2.418 86.0 39.75 -2.470 1.061 -2.305
        80.8 30.36 -2.800 1.039 -2.653 83.9 32.05 -2.732 1.051 -2.643""",
        (0.775, 0.659, None, 0.654),
    ),
    "cars": (
        """91.0 41.47 -4.612 1.246 -4.312 92.3 73.68 -4.268 1.259 -4.110
        91.7 72.94 -4.366 1.253 -4.221 91.7 73.98 -4.281 1.255 -4.218
        92.0 76.17 -4.215 1.260 -4.142 91.5 45.82 -4.437 1.249 -4.271
        91.5 63.40 -4.286 1.252 -4.175 91.0 70.50 -4.319 1.251 -4.151
        91.0 51.12 -4.463 1.250 -4.306 88.5 51.91 -4.423 1.254 -4.338""",
        (0.638, 0.703, 0.654, 0.750),
    ),
    "sun397": (
        """62.0 71.35 -3.744 1.621 -3.055 65.7 114.21 -3.372 1.648 -2.844
        64.7 110.39 -3.198 1.638 -2.894 64.8 113.63 -3.103 1.642 -2.837
        66.0 116.51 -3.056 1.646 -2.822 62.3 72.16 -3.311 1.614 -2.945
        63.0 95.80 -3.165 1.623 -2.903 64.7 103.09 -3.205 1.624 -2.896
        60.5 75.90 -3.338 1.617 -2.968 60.7 80.91 -3.234 1.625 -2.933""",
        (0.918, 0.581, 0.748, 0.873),
    ),
}


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_columns_give_published_correlations(dataset):
    text, printed = PUBLISHED[dataset]
    accuracy, *scores = np.array(text.split(), dtype=float).reshape(10, 5).T
    for values, want in zip(scores, printed):
        if want is not None:
            assert transfer.weighted_tau(values, accuracy) == pytest.approx(want, abs=6e-4)


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
