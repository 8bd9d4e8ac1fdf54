"""Groups, label sets and fine classes against closed forms, scikit-learn and the authors' code."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.metrics import structure
from ncmethods.metrics.nc1 import cdnv
from ncmethods.metrics.structure import (
    clusterability,
    coarse_to_fine,
    group_collapse,
    tag_mean_collapse,
)

f64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def etf(K, D):
    return simplex_etf(K, D, dtype=f64, generator=torch.Generator().manual_seed(K))


def turn(D, seed=9):
    return torch.linalg.qr(draw(D, D, seed=seed))[0]


# --- groups -------------------------------------------------------------------------------------


def test_group_collapse_of_three_types():
    roles = torch.arange(60) % 3
    frequency = 1 / (1 + torch.arange(60)).double()  # Zipf
    points = 2 * etf(3, 8)
    one = group_collapse(points[roles], roles)
    assert one["ratio"] < 1e-24
    assert one["direction_ratio"] < 1e-24
    assert one["residual"] < 1e-14
    assert "norm_frequency" not in one
    # The same directions with norms that follow the frequency: only the directions have collapsed.
    scaled = group_collapse(points[roles] * frequency[:, None], roles, frequency=frequency)
    assert scaled["ratio"] > 0.1
    assert scaled["direction_ratio"] < 1e-20
    assert scaled["norm_frequency"] == pytest.approx(1)
    noisy = group_collapse(points[roles] + draw(60, 8), roles)
    assert noisy["ratio"] > 0.1
    assert noisy["direction_ratio"] > 0.1
    assert noisy["residual"] > 0.1


def test_group_collapse_matches_numpy_and_scikit_learn():
    X, roles, frequency = draw(50, 6) + 3, torch.arange(50) % 4, torch.arange(50) // 3 + 1
    X[roles == 1] += 2
    found = group_collapse(X, roles, frequency=frequency)

    def ratio(rows):
        means = np.stack([rows[roles == g].mean(0) for g in range(4)])
        within = ((rows - means[roles]) ** 2).sum() / 50
        return within / ((means - means.mean(0)) ** 2).sum(1).mean()

    rows = X.numpy()
    assert found["ratio"] == pytest.approx(ratio(rows), rel=1e-9)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found["direction_ratio"] == pytest.approx(ratio(unit), rel=1e-9)
    S = PCA(svd_solver="full").fit(rows).singular_values_
    assert found["residual"] == pytest.approx(S[3] / S[0], rel=1e-10)
    rho = spearmanr(np.linalg.norm(rows, axis=1), frequency.numpy()).statistic
    assert found["norm_frequency"] == pytest.approx(rho, rel=1e-10)


@pytest.mark.filterwarnings("ignore:No class has two samples")
def test_group_collapse_properties():
    X, roles = draw(40, 6), torch.arange(40) % 3
    frequency = torch.arange(1, 41)
    whole = group_collapse(X, roles, frequency=frequency)
    assert group_collapse(3 * X @ turn(6), roles, frequency=frequency) == pytest.approx(whole)
    moved = group_collapse(X + 1000, roles)
    assert moved["ratio"] == pytest.approx(whole["ratio"], rel=1e-9)
    assert moved["residual"] == pytest.approx(whole["residual"], rel=1e-9)
    low = group_collapse(X.float(), roles, frequency=frequency)
    assert low == pytest.approx(whole, rel=1e-5)
    # Ignored entities, roles without entities and another numbering change nothing.
    more = torch.cat([X, draw(2, 6, seed=1) * 50])
    role = torch.cat([7 - 3 * roles, torch.tensor([-1, -100])])
    count = torch.cat([frequency, torch.tensor([1, 1])])
    assert group_collapse(more, role, frequency=count) == pytest.approx(whole, rel=1e-12)
    assert "residual" not in group_collapse(X[:, :2], roles)  # three points span all of a plane
    assert "residual" not in group_collapse(X[:3], roles[:3])
    assert math.isnan(group_collapse(X, roles, frequency=torch.ones(40))["norm_frequency"])
    same = group_collapse(torch.ones(40, 6), roles)
    assert math.isnan(same["ratio"])
    assert math.isnan(same["residual"])


def test_group_collapse_bad_input():
    X, roles = draw(10, 4), torch.arange(10) % 2
    with pytest.raises(InputError, match="at least two"):
        group_collapse(X, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(InputError, match="at least two"):
        group_collapse(X, -1 - roles)
    with pytest.raises(InputError, match="10 rows"):
        group_collapse(X, roles[:-1])
    with pytest.raises(InputError, match="NaN"):
        group_collapse(X / 0, roles)
    with pytest.raises(InputError, match="counts"):
        group_collapse(X, roles, frequency=torch.ones(9))


# --- label sets ---------------------------------------------------------------------------------


def label_sets(K, sizes):
    """All label sets of the given sizes, bool [S, K]."""
    chosen = [c for m in sizes for c in itertools.combinations(range(K), m)]
    sets = torch.zeros(len(chosen), K, dtype=torch.bool)
    for row, members in zip(sets, chosen):
        row[list(members)] = True
    return sets


def tagged(K=5, D=7, scales=(1.0, 0.8, 0.5), noise=0.0, samples=4, shift=0.0):
    """Means of the sets of m tags at scales[m − 1] times the average of the single ones."""
    sets = label_sets(K, range(1, len(scales) + 1))
    size = sets.sum(1)
    points = 3 * etf(K, D)
    means = torch.tensor(scales, dtype=f64)[size - 1, None] * (sets.double() @ points)
    means = means / size[:, None]
    spread = draw(len(sets), samples, D)
    X = means[:, None] + noise * (spread - spread.mean(1, keepdim=True)) + shift
    return X.reshape(-1, D), sets.repeat_interleave(samples, 0)


def test_scaled_averages_are_collapse():
    for shift in (0.0, 1000.0):
        found = tag_mean_collapse(*tagged(noise=0.5, shift=shift))
        assert found["cosine"] == pytest.approx(1, abs=1e-12)
        assert found["cosine_min"] == pytest.approx(1, abs=1e-12)
        assert found["angle"] < 1e-5
        assert found["angle_ratio"] < 1e-6
        assert found["scale/2"] == pytest.approx(0.8, rel=1e-9)
        assert found["scale/3"] == pytest.approx(0.5, rel=1e-9)
        assert found["scale"] == pytest.approx(0.65, rel=1e-9)  # ten sets of each size
        assert found["scale_spread"] < 1e-9
        assert (found["sets"], found["left_out"]) == (20, 0)


def test_the_scale_must_be_common():
    X, tags = tagged(scales=(1.0, 0.8))
    X[(tags[:, 0]) & (tags.sum(1) == 2)] *= 1.5  # 4 of 10 pairs
    found = tag_mean_collapse(X, tags, centred=False)
    assert found["cosine_min"] == pytest.approx(1, abs=1e-12)
    assert found["scale/2"] == pytest.approx(0.96, rel=1e-9)
    # C is 1.2 in four sets and 0.8 in six: a standard deviation of √(0.4·0.6)·0.4 around 0.96.
    assert found["scale_spread"] == pytest.approx(math.sqrt(0.24) * 0.4 / 0.96, rel=1e-9)


def test_pick_all_label_loss_on_free_features_ends_in_scaled_averages():
    """The optimum of that loss, found by L-BFGS, has the property (arXiv:2310.15903)."""
    K, D = 4, 5
    sets = label_sets(K, (1, 2)).repeat(2, 1)
    H, W = draw(len(sets), D).requires_grad_(), draw(K, D, seed=1).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [H, W],
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
        history_size=50,
    )

    def closure():
        optimiser.zero_grad()
        loss = -(sets * (H @ W.T).log_softmax(1)).sum() / len(sets)
        loss = loss + 0.03 * (H.square().sum() / len(sets) + W.square().sum())
        loss.backward()
        return loss

    assert tag_mean_collapse(H.detach(), sets)["cosine_min"] < 0.5  # not by construction
    optimiser.step(closure)
    assert float(H.grad.abs().max()) < 1e-7
    for centred in (True, False):
        found = tag_mean_collapse(H.detach(), sets, centred=centred)
        assert found["cosine_min"] == pytest.approx(1, abs=1e-6)
        assert found["scale_spread"] < 1e-4
        assert abs(found["scale"] - 1) > 0.05


def test_tag_means_match_the_authors_code():
    """``angle_metric``, run once on these points: uncentred, sets of two, all pairs present.

    github.com/Heimine/NC_MLab/blob/d824232a232bfdd56d3d0f1cac69877b4f2deeca/utility.py
    """
    K, D = 4, 6
    sets, d = label_sets(K, (1, 2)), torch.arange(D, dtype=f64)
    tags = sets.repeat_interleave(5, 0)
    points = torch.stack([2 * torch.cos(1.7 * (k + 1) * (d + 1)) for k in range(K)])
    row = torch.arange(len(tags), dtype=f64)[:, None]
    X = tags.double() @ points / tags.sum(1)[:, None] + 0.6 * torch.sin(0.9 * row * (d + 1)) + 0.3
    found = tag_mean_collapse(X, tags, centred=False)
    assert found["angle_ratio"] == pytest.approx(0.11086738350607378, rel=1e-10)
    assert found["angle_ratio"] != pytest.approx(
        tag_mean_collapse(X, tags)["angle_ratio"], rel=0.05
    )


@pytest.mark.parametrize("rows", [1, 3, 2048])
def test_tag_means_match_a_naive_loop(monkeypatch, rows):
    monkeypatch.setattr(structure, "_ROWS", rows)
    X, tags = tagged(scales=(1.0, 0.8, 0.5))
    X = (X + draw(*X.shape, seed=4)).numpy()
    T = tags.numpy()
    single = {k: X[(T.sum(1) == 1) & T[:, k]].mean(0) for k in range(5)}
    center = np.mean(list(single.values()), 0)
    cosine, scale, angle, base = [], {2: [], 3: []}, [], []

    def degrees(a, b):
        return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    averages = {
        S: np.mean([single[k] - center for k in S], 0)
        for m in (2, 3)
        for S in itertools.combinations(range(5), m)
    }
    for S, a in averages.items():
        inside = (np.isin(range(5), S) == T).all(1)
        m = X[inside].mean(0) - center
        cosine.append(a @ m / np.linalg.norm(a) / np.linalg.norm(m))
        scale[len(S)].append(a @ m / (a @ a))
        angle.append(degrees(a, m))
        base.append(np.mean([degrees(m, b) for R, b in averages.items() if len(R) == len(S)]))
    found = tag_mean_collapse(torch.from_numpy(X), tags)
    assert found["cosine"] == pytest.approx(np.mean(cosine), rel=1e-9)
    assert found["cosine_min"] == pytest.approx(np.min(cosine), rel=1e-9)
    assert found["angle"] == pytest.approx(np.mean(angle), rel=1e-9)
    assert found["angle_ratio"] == pytest.approx(np.mean(angle) / np.mean(base), rel=1e-9)
    assert found["scale/2"] == pytest.approx(np.mean(scale[2]), rel=1e-9)
    assert found["scale/3"] == pytest.approx(np.mean(scale[3]), rel=1e-9)
    spread = [c / np.mean(scale[m]) - 1 for m in (2, 3) for c in scale[m]]
    assert found["scale_spread"] == pytest.approx(np.sqrt(np.mean(np.square(spread))), rel=1e-9)


def test_tag_mean_invariances():
    X, tags = tagged()
    X = X + draw(*X.shape, seed=4)
    whole, plain = tag_mean_collapse(X, tags), tag_mean_collapse(X, tags, centred=False)
    assert tag_mean_collapse(3 * X @ turn(7) + 20, tags) == pytest.approx(whole, rel=1e-9)
    assert tag_mean_collapse(3 * X @ turn(7), tags, centred=False) == pytest.approx(plain)
    moved = tag_mean_collapse(X + 20, tags, centred=False)
    assert moved["cosine"] > plain["cosine"] + 0.05  # an offset looks like collapse from the origin
    assert tag_mean_collapse(X, tags[:, [2, 0, 1, 4, 3]]) == pytest.approx(whole, rel=1e-9)
    assert tag_mean_collapse(X, tags.double()) == whole
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    assert tag_mean_collapse(X[order], tags[order]) == pytest.approx(whole, rel=1e-9)
    assert tag_mean_collapse(X.float(), tags) == pytest.approx(whole, rel=1e-4)


def test_label_sets_that_cannot_be_compared():
    X, tags = tagged()
    whole = tag_mean_collapse(X, tags)
    # Rows without tags are left out.
    more, empty = torch.cat([X, 50 * draw(3, 7)]), torch.zeros(3, 5, dtype=torch.bool)
    assert tag_mean_collapse(more, torch.cat([tags, empty])) == whole
    # Tag 4 never stands alone: 4 of 10 pairs and 6 of 10 triples are out.
    keep = ~(tags[:, 4] & (tags.sum(1) == 1))
    found = tag_mean_collapse(X[keep], tags[keep], centred=False)
    assert (found["sets"], found["left_out"]) == (10, 10)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    # All tags at once: the centred average vanishes and has no direction.
    every = torch.cat([tags, torch.ones(1, 5, dtype=torch.bool)])
    found = tag_mean_collapse(torch.cat([X, draw(1, 7)]), every)
    assert (found["sets"], found["left_out"]) == (20, 1)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    # A set of one sample, below min_count.
    drop = (tags == torch.tensor([True, True, False, False, False])).all(1)
    drop[drop.nonzero()[0]] = False
    found = tag_mean_collapse(X[~drop], tags[~drop], min_count=2)
    assert (found["sets"], found["left_out"]) == (19, 1)
    # A single set of its size has no other to be told from.
    alone = tags.sum(1) == 1
    alone |= (tags == torch.tensor([True, True, False, False, False])).all(1)
    found = tag_mean_collapse(X[alone], tags[alone])
    assert found["sets"] == 1
    assert "angle_ratio" not in found


def test_tag_mean_bad_input():
    X, tags = tagged()
    with pytest.raises(InputError, match="No label set"):
        tag_mean_collapse(X[tags.sum(1) == 1], tags[tags.sum(1) == 1])
    with pytest.raises(InputError, match="0 tags that stand alone"):
        tag_mean_collapse(X[tags.sum(1) > 1], tags[tags.sum(1) > 1])
    with pytest.raises(InputError, match="No label set"):
        tag_mean_collapse(X, torch.zeros_like(tags))
    with pytest.raises(InputError, match="No label set"):
        tag_mean_collapse(X, tags, min_count=5)
    with pytest.raises(InputError, match="0/1"):
        tag_mean_collapse(X, 0.5 * tags)
    with pytest.raises(InputError, match="0/1"):
        tag_mean_collapse(X, tags[:-1])
    with pytest.raises(InputError, match="NaN"):
        tag_mean_collapse(X / 0, tags)


# --- clusters -----------------------------------------------------------------------------------


def test_clusterability_matches_scikit_learn():
    X, y = draw(90, 5), torch.arange(90) % 3
    X = X + 2 * draw(3, 5, seed=1)[y]
    found = clusterability(X, y, seed=3)
    rows = X.numpy()
    guess = KMeans(3, n_init=10, random_state=3).fit_predict(rows)
    assert 0.05 < found["ari"] < 0.95
    assert found["ari"] == pytest.approx(adjusted_rand_score(y.numpy(), guess))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(y.numpy(), guess))
    other = clusterability(X, y, clusters=6, seed=3)
    guess = KMeans(6, n_init=10, random_state=3).fit_predict(rows)
    assert other["ari"] == pytest.approx(adjusted_rand_score(y.numpy(), guess))


def test_clusterability_finds_classes_and_nothing_else():
    y = torch.arange(200) % 4
    points = 4 * etf(4, 6)
    layers = [float(s) * points[y] + draw(200, 6) for s in (0, 0.3, 2)]
    scores = [clusterability(x, y) for x in layers]
    assert abs(scores[0]["ari"]) < 0.05
    assert scores[0]["ari"] < scores[1]["ari"] < scores[2]["ari"] == 1
    assert scores[2]["nmi"] == pytest.approx(1)
    assert clusterability(points[y], y) == {"ari": 1, "nmi": pytest.approx(1)}
    # More clusters than different points is what collapse looks like, without a warning.
    assert clusterability(points[y], y, clusters=7)["ari"] == pytest.approx(1)
    moved = clusterability((100 * layers[2] @ turn(6) + 1000).float(), (y + 1) % 4)
    assert moved["ari"] == 1
    # At unit norm the scale of a sample does not count.
    scale = (2 * draw(200, 1, seed=5)).exp()
    assert clusterability(scale * layers[2], y, normalize=True)["ari"] > 0.9
    assert clusterability(scale * layers[2], y)["ari"] < 0.5
    ignored = torch.cat([y, torch.tensor([-1, -1])])
    assert clusterability(torch.cat([layers[2], draw(2, 6)]), ignored)["ari"] == 1


def test_clusterability_bad_input():
    X, y = draw(9, 4), torch.arange(9) % 3
    for k in (0, 10):
        with pytest.raises(InputError, match="clusters"):
            clusterability(X, y, clusters=k)
    with pytest.raises(InputError, match="clusters"):
        clusterability(X, -1 - y)
    with pytest.raises(InputError, match="NaN"):
        clusterability(X / 0, y)


# --- fine classes -------------------------------------------------------------------------------

PARENT = torch.tensor([0, 1, 2, 0, 1, 2, 0])  # three fine classes in coarse class 0


def sets(inner, noise, N=700, D=20, parent=PARENT):
    """Coarse means at distance ~2, fine means ``inner`` away from them, noise of ``noise``."""
    far = etf(3, D)
    near = torch.linalg.qr(draw(D, D, seed=1))[0][: len(parent)] * inner

    def part(seed):
        fine = torch.randint(
            len(parent), (N,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
        )
        return far[parent[fine]] + near[fine] + noise * draw(N, D, seed=seed), fine

    (X, f), (Z, g) = part(2), part(3)
    return FeatureSet(X, parent[f], 3), FeatureSet(Z, g, len(parent)), f


def test_fine_classes_far_below_the_class_distance_are_found():
    train, test, fine = sets(inner=1e-3, noise=1e-4)
    assert float(cdnv(train.stats)) < 1e-5  # collapsed by every measure of classes
    found = coarse_to_fine(train, test, PARENT, fine=fine)
    assert found["accuracy"] > 0.99
    assert found["coarse"] == 1
    assert found["upper"] > 0.99
    naive = np.mean([1 / PARENT.eq(PARENT[f]).sum() for f in test.labels])
    assert found["chance"] == pytest.approx(naive, rel=1e-12)


def test_a_blob_for_each_coarse_class_gives_chance():
    train, test, fine = sets(inner=0.0, noise=1e-4, N=3000)
    found = coarse_to_fine(train, test, PARENT, fine=fine)
    assert found["chance"] - 0.02 < found["accuracy"] < found["chance"] + 0.06
    assert abs(found["upper"] - found["chance"]) < 0.06
    assert found["coarse"] == 1


def test_clusters_need_not_be_the_fine_classes():
    """Sub-clusters that have nothing to do with the fine labels give chance as well."""
    train, test, _ = sets(inner=1e-3, noise=1e-4, N=3000)
    g = torch.Generator().manual_seed(8)
    members = [PARENT.eq(c).nonzero()[:, 0] for c in range(3)]
    labels = torch.stack(
        [
            m[torch.randint(len(m), (), generator=g)]
            for m in (members[c] for c in PARENT[test.labels].tolist())
        ]
    )
    found = coarse_to_fine(train, FeatureSet(test.features, labels, 7), PARENT)
    assert abs(found["accuracy"] - found["chance"]) < 0.06


def test_between_the_controls_it_grows_with_the_distance():
    scores = [
        coarse_to_fine(*sets(inner=d * 1e-3, noise=1e-3)[:2], PARENT)["accuracy"] for d in (0, 3, 8)
    ]
    assert scores[0] < scores[1] < scores[2]
    assert scores[2] > 0.98


def test_coarse_to_fine_invariances():
    train, test, fine = sets(inner=1e-3, noise=3e-4)
    whole = coarse_to_fine(train, test, PARENT, fine=fine)
    Q = turn(20)

    def moved(data, dtype=f64):
        x = 50 * data.features @ Q + 1000
        return FeatureSet(x.to(dtype), data.labels, data.num_classes)

    found = coarse_to_fine(moved(train), moved(test), PARENT, fine=fine)
    assert found == pytest.approx(whole, abs=0.005)
    # Float32 holds 1000 to 6e-5: enough for structure of 0.05.
    low = coarse_to_fine(moved(train, torch.float32), moved(test, torch.float32), PARENT)
    assert low["accuracy"] == pytest.approx(whole["accuracy"], abs=0.01)
    number = torch.tensor([3, 0, 6, 2, 1, 5, 4])  # new number of each fine class
    renamed = FeatureSet(test.features, number[test.labels], 7)
    found = coarse_to_fine(train, renamed, PARENT[number.argsort()])
    assert found["accuracy"] == pytest.approx(whole["accuracy"], abs=0.005)
    ignored = FeatureSet(
        torch.cat([test.features, 9 * draw(2, 20)]),
        torch.cat([test.labels, torch.tensor([-1, -2])]),
        7,
    )
    assert coarse_to_fine(train, ignored, PARENT, fine=fine) == whole


def test_one_fine_class_each_counts_the_coarse_hits():
    train, test, _ = sets(inner=0.0, noise=0.6, parent=torch.arange(3))
    found = coarse_to_fine(train, test, torch.arange(3))
    assert found["accuracy"] == found["coarse"] < 1
    assert found["chance"] == 1


def test_full_collapse_is_chance_without_a_warning():
    train, test, fine = sets(inner=0.0, noise=0.0)
    found = coarse_to_fine(train, test, PARENT, fine=fine)
    assert found["coarse"] == 1
    assert found["accuracy"] < found["chance"] + 0.1


def test_t_sne_first():
    train, test, _ = sets(inner=1e-3, noise=1e-4, N=240)
    near = coarse_to_fine(train, test, PARENT, embed="tsne")["accuracy"]
    assert near > 0.95
    # t-SNE itself works in float32.
    far = FeatureSet(1e-30 * (train.features + 1e5), train.labels, 3)
    there = FeatureSet(1e-30 * (test.features + 1e5), test.labels, 7)
    assert coarse_to_fine(far, there, PARENT, embed="tsne")["accuracy"] > 0.95


def test_the_probe_is_linear_discriminant_analysis():
    y = torch.arange(400) % 4
    X = 1.5 * draw(4, 6, seed=1)[y] + draw(400, 6) @ draw(6, 6, seed=2)
    Z = 3 * draw(300, 6, seed=3)
    LDA = LinearDiscriminantAnalysis(priors=[0.25] * 4).fit(X.numpy(), y.numpy())
    same = structure._probe(X, y, Z, 4).numpy() == LDA.predict(Z.numpy())
    assert same.mean() > 0.98  # but for the ridge
    assert set(structure._probe(X, 2 * y, Z, 9).tolist()) <= {0, 2, 4, 6}


def test_coarse_to_fine_bad_input():
    train, test, _ = sets(inner=1e-3, noise=1e-4, N=60)
    with pytest.raises(InputError, match="labels"):
        coarse_to_fine(train, test, PARENT[:-1])
    with pytest.raises(InputError, match="num_classes"):
        coarse_to_fine(train, test, PARENT + 1)
    with pytest.raises(InputError, match="a parent"):
        coarse_to_fine(train, test, PARENT - 1)
    with pytest.raises(InputError, match="coarse labels"):
        coarse_to_fine(FeatureSet(train.features, None, 3), test, PARENT)
    with pytest.raises(InputError, match="D = 20"):
        coarse_to_fine(train, FeatureSet(test.features[:, :4], test.labels, 7), PARENT)
    with pytest.raises(InputError, match="D = 20"):
        coarse_to_fine(train, FeatureSet(test.features[:0], test.labels[:0], 7), PARENT)
    few = FeatureSet(train.features[:2], torch.zeros(2, dtype=torch.int64), 3)
    with pytest.raises(InputError, match="a sample for each"):
        coarse_to_fine(few, test, PARENT)
    with pytest.raises(InputError, match="at least one fine class"):
        coarse_to_fine(train, test, torch.tensor([0, 1, 1, 0, 1, 1, 0]))
    with pytest.raises(InputError, match="tsne"):
        coarse_to_fine(train, test, PARENT, embed="umap")
