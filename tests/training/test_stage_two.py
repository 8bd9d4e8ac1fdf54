"""Stage two: closed forms, the optimum of the retrained classifiers, and what each refuses."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncmethods import frames, heads, losses
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats
from ncmethods.training import NonFiniteLoss
from ncmethods.training.stage_two import (
    crt,
    hold_out_features,
    linear_rows,
    lws,
    max_norm_,
    ncm,
    norm_limit,
    pick_tau,
    post_hoc,
    tau_norm,
    unit_features,
    weight_balancing,
)

COUNTS = torch.tensor([40, 20, 10, 4])
K, D = 4, 6


def gaussians(counts=COUNTS, spread=1.0, seed=0, dtype=torch.float64):
    """Classes about random means of length ~2."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(len(counts), D, generator=torch.Generator().manual_seed(7), dtype=dtype)
    y = torch.arange(len(counts)).repeat_interleave(torch.as_tensor(counts))
    x = means[y] + spread * torch.randn(len(y), D, generator=g, dtype=dtype)
    return FeatureSet(x, y, len(counts))


def linear(bias=True, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, K, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
    return head


def ce(logits, labels):
    return F.cross_entropy(logits, labels)


def state(layer):
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


class Spy:
    """Cross-entropy that notes what it was given."""

    def __init__(self):
        self.epochs, self.weights = {}, []

    def __call__(self, logits, labels, weight, epoch):
        self.epochs.setdefault(epoch, []).append(labels)
        self.weights.append(weight.detach().clone())
        return F.cross_entropy(logits, labels)


# --- τ-normalisation -----------------------------------------------------------------------------


def test_tau_norm_is_identity_at_0_and_unit_rows_at_1():
    head, x = linear(), gaussians().features
    plain, unit = tau_norm(head, 0), tau_norm(head, 1)
    assert plain.bias is None
    torch.testing.assert_close(plain(x), x @ head.weight.T, rtol=0, atol=0)
    torch.testing.assert_close(unit.weight.norm(dim=1), torch.ones(K).double())
    # Learnable weight scaling with f = 1/‖w‖ (without bias) is the same classifier.
    f = 1 / head.weight.norm(dim=1)
    torch.testing.assert_close(unit(x), f * (x @ head.weight.T))


@pytest.mark.parametrize("tau", [-0.5, 0.3, 1.7])
def test_tau_norm_against_a_loop(tau):
    head = linear()
    rows = head.weight.detach().numpy()
    want = np.stack([w / np.linalg.norm(w) ** tau for w in rows])
    np.testing.assert_allclose(tau_norm(head, tau).weight.detach().numpy(), want, rtol=1e-12)


def test_tau_norm_keeps_a_zero_row_and_the_dtype():
    head = linear(dtype=torch.float32)
    with torch.no_grad():
        head.weight[2] = 0
    found = tau_norm(head, 1.5)
    assert found.weight.dtype == torch.float32
    assert found.weight[2].eq(0).all()
    assert found.weight.isfinite().all()
    assert head.bias is not None  # the head itself is as it was
    assert head.weight[0].norm().item() != pytest.approx(1)


def test_pick_tau_against_a_loop():
    head, held_out = linear(), gaussians(seed=3)
    taus = [0.0, 0.5, 1.0, 1.5, 2.0]
    best, found = pick_tau(head, held_out, taus)
    rows, x, y = head.weight.detach().numpy(), held_out.features.numpy(), held_out.labels.numpy()
    want = {}
    for tau in taus:
        z = x @ (rows / np.linalg.norm(rows, axis=1, keepdims=True) ** tau).T
        want[tau] = np.mean([(z.argmax(1)[y == c] == c).mean() for c in range(K)])
    assert found == pytest.approx(want)
    assert best == max(taus, key=lambda t: want[t])


def test_pick_tau_takes_the_smallest_of_ties_and_leaves_absent_classes_out():
    head = nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[4.0, 0], [0, 1], [-1, -1]]))
    x = torch.tensor([[1.0, 0], [0, 1], [0.3, 1]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])  # nothing of class 2
    # 0.3 · 4^(1−τ) < 1 first at τ = 0.2 of this grid: then all is right, for every larger τ.
    best, found = pick_tau(head, FeatureSet(x, y, 3), (0.0, 0.1, 0.2, 1.0))
    assert best == 0.2
    assert found == {0.0: 0.75, 0.1: 0.75, 0.2: 1.0, 1.0: 1.0}


# --- post-hoc logit adjustment -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_post_hoc_is_argmax_of_z_minus_tau_log_prior(bias):
    head, x = linear(bias), gaussians(seed=5).features
    for tau in (0.0, 1.0, 1.3):
        prior = COUNTS.double() / COUNTS.sum()
        want = head(x) - tau * prior.log()
        torch.testing.assert_close(post_hoc(head, COUNTS, tau)(x), want)
    torch.testing.assert_close(post_hoc(head, 7 * COUNTS)(x), post_hoc(head, COUNTS)(x))


def test_golden_post_hoc_is_fisher_consistent():
    """π = (.9, .1), p(y|x) = (.8, .2): cross-entropy says 0, adjusted by log 2.25 it says 1."""
    head = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.8, 0.2]).double().log())
    z = post_hoc(head, torch.tensor([90, 10]))(torch.zeros(1, 1).double())[0].detach()
    assert float(z[1] - z[0]) == pytest.approx(0.810930, abs=1e-6)


def test_golden_post_hoc_of_cross_entropy_is_the_optimum_of_logit_adjustment():
    """A feature with three values, one row each: both losses are solved to the end."""
    table = torch.tensor([[30, 5, 1], [6, 9, 1], [4, 1, 3]])  # [value, class]
    cell = torch.arange(9).repeat_interleave(table.flatten())
    x, y = F.one_hot(cell // 3, 3).double(), cell % 3
    prior = table.sum(0).double() / table.sum()

    def solved(shift):
        head = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.zeros_(head.weight)
        lbfgs = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

        def closure():
            lbfgs.zero_grad()
            value = F.cross_entropy(head(x) + shift, y)
            value.backward()
            return value

        lbfgs.step(closure)
        return head

    adjusted = post_hoc(solved(torch.zeros(3).double()), table.sum(0))
    torch.testing.assert_close(
        adjusted(x).softmax(1), solved(prior.log())(x).softmax(1), rtol=1e-6, atol=1e-7
    )
    # and both are p(x | y) up to a factor: the classifier for equally frequent classes.
    want = table / table.sum(0)
    torch.testing.assert_close(
        adjusted(torch.eye(3).double()).softmax(1), want.double() / want.sum(1, keepdim=True),
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip


def test_post_hoc_masks_a_class_without_samples():
    z = post_hoc(linear(), torch.tensor([5, 0, 3, 2]))(gaussians().features)
    assert z[:, 1].eq(-torch.inf).all()
    assert z[:, [0, 2, 3]].isfinite().all()
    assert z.softmax(1).isfinite().all()
    torch.testing.assert_close(post_hoc(linear(), torch.tensor([5, 0, 3, 2]), 0).bias[0],
                               linear().bias[0])  # fmt: skip


# --- nearest class mean --------------------------------------------------------------------------


def test_ncm_l2_is_sklearns_nearest_centroid():
    from sklearn.neighbors import NearestCentroid

    train, test = gaussians(spread=2.0), gaussians(seed=9, spread=2.0)
    peer = NearestCentroid().fit(train.features.numpy(), train.labels.numpy())
    layer = ncm(train)
    z = layer(test.features).detach()
    np.testing.assert_array_equal(z.argmax(1).numpy(), peer.predict(test.features.numpy()))
    distance = torch.cdist(test.features, torch.from_numpy(peer.centroids_))
    torch.testing.assert_close(z.softmax(1), (-0.5 * distance.square()).softmax(1))
    moments = ncm(ClassStats(K, D).update(train.features, train.labels))
    torch.testing.assert_close(moments.weight.double(), layer.weight, rtol=1e-6, atol=1e-6)


def test_ncm_cosine_against_sklearn():
    from sklearn.metrics.pairwise import cosine_similarity

    train, test = gaussians(spread=2.0), gaussians(seed=9, spread=2.0)
    means = np.stack([train.features[train.labels == c].numpy().mean(0) for c in range(K)])
    layer = ncm(train, "cosine")
    assert layer.bias is None
    norms = test.features.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(
        (layer(test.features) / norms).detach().numpy(),
        cosine_similarity(test.features.numpy(), means),
        rtol=1e-10,
    )


def test_ncm_on_centred_unit_features_is_the_authors():
    """cl2n of Kang et al.: distances to the class means of centred, normalised features."""
    train, test = gaussians(spread=2.0), gaussians(seed=9, spread=2.0)
    x, y, new = train.features.numpy(), train.labels.numpy(), test.features.numpy()
    mean = x.mean(0)
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x - mean, new - mean))
    centroids = np.stack([u[y == c].mean(0) for c in range(K)])
    want = ((v[:, None] - centroids) ** 2).sum(2).argmin(1)
    m = train.features.mean(0)
    z = ncm(unit_features(train))(unit_features(test, m).features)
    np.testing.assert_array_equal(z.argmax(1).numpy(), want)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ncm_masks_an_empty_class_and_takes_a_single_sample(metric):
    train = gaussians(torch.tensor([5, 0, 3, 1]))
    layer = ncm(train, metric)
    z = layer(gaussians().features).detach()
    assert not (z.argmax(1) == 1).any()
    assert z.softmax(1).isfinite().all()
    only = train.features[train.labels == 3][0]
    torch.testing.assert_close(
        layer.weight[3].detach(), only if metric == "l2" else only / only.norm()
    )
    assert int(layer(only[None]).argmax()) == 3


# --- the sampler ---------------------------------------------------------------------------------


def test_golden_batches_are_even_over_classes():
    spy, train = Spy(), gaussians()
    crt(train, loss=spy, epochs=3, batch_size=16)
    for labels in spy.epochs.values():
        y = torch.cat(labels)
        assert len(y) == K * 40  # K · max n_c, as the authors' sampler
        deviation = (torch.bincount(y).double() / len(y) - 1 / K).abs().max()
        assert deviation < 4 * math.sqrt((1 / K) * (1 - 1 / K) / len(y))
        assert max(map(len, labels)) <= 16
    other = Spy()
    crt(train, loss=other, epochs=1, batch_size=16, seed=1)
    orders = [torch.cat(labels) for labels in spy.epochs.values()]
    assert not torch.equal(torch.cat(other.epochs[0]), orders[0])
    assert not torch.equal(orders[0], orders[1])
    again = Spy()
    crt(train, loss=again, epochs=2, batch_size=16)
    assert torch.equal(torch.cat(again.epochs[1]), orders[1])  # of (seed, epoch) alone


@pytest.mark.parametrize(("sampling", "want"), [("instance", 74), ("sqrt", 74), ("balanced", 160)])
def test_length_of_an_epoch(sampling, want):
    spy = Spy()
    crt(gaussians(), loss=spy, epochs=1, sampling=sampling)
    assert len(torch.cat(spy.epochs[0])) == want
    if sampling == "instance":
        assert torch.equal(torch.bincount(torch.cat(spy.epochs[0])), COUNTS)
    spy = Spy()
    crt(gaussians(), loss=spy, epochs=1, sampling=sampling, length=33)
    assert len(torch.cat(spy.epochs[0])) == 33


# --- retrained classifiers -----------------------------------------------------------------------


def test_crt_is_sgd_as_a_naive_loop_does_it():
    """One batch per epoch: momentum, weight decay and the cosine, in numpy."""
    train = gaussians(torch.tensor([9, 6, 4, 2]))
    how = {"sampling": "instance", "batch_size": 100, "lr": 0.1, "weight_decay": 0.03}
    start = crt(train, epochs=0, **how)
    found = crt(train, epochs=5, **how)
    x = np.hstack([train.features.numpy(), np.ones((21, 1))])
    target = np.eye(K)[train.labels.numpy()]
    W = np.hstack([start.weight.detach().numpy(), start.bias.detach().numpy()[:, None]])
    velocity = np.zeros_like(W)
    for epoch in range(5):
        e = np.exp(x @ W.T)
        p = e / e.sum(1, keepdims=True)
        gradient = (p - target).T @ x / 21 + 0.03 * W
        velocity = 0.9 * velocity + gradient
        W = W - 0.1 * 0.5 * (1 + np.cos(np.pi * epoch / 5)) * velocity
    np.testing.assert_allclose(found.weight.detach().numpy(), W[:, :-1], atol=1e-12)
    np.testing.assert_allclose(found.bias.detach().numpy(), W[:, -1], atol=1e-12)


def test_crt_solves_balanced_logistic_regression():
    """Each sample is drawn n_max/n_c times an epoch: sklearn's class_weight="balanced"."""
    from sklearn.linear_model import LogisticRegression

    train = gaussians()
    found = crt(train, epochs=400, batch_size=1000, lr=0.3, weight_decay=0.02)
    x, y = train.features.numpy(), train.labels.numpy()
    peer = LogisticRegression(
        C=1 / (len(y) * 0.02), fit_intercept=False, class_weight="balanced", tol=1e-10,
        max_iter=10_000,
    ).fit(np.hstack([x, np.ones((len(y), 1))]), y)  # fmt: skip
    np.testing.assert_allclose(found.weight.detach().numpy(), peer.coef_[:, :-1], atol=2e-3)
    np.testing.assert_allclose(found.bias.detach().numpy(), peer.coef_[:, -1], atol=2e-3)


def test_crt_separates_what_can_be_separated():
    train = gaussians(spread=0.05, dtype=torch.float32)
    state_of_torch = torch.get_rng_state()
    one, two, other = crt(train), crt(train), crt(train, seed=1)
    assert torch.equal(torch.get_rng_state(), state_of_torch)
    assert (one(train.features).argmax(1) == train.labels).all()
    assert torch.equal(state(one), state(two))
    assert not torch.equal(state(one), state(other))
    start, elsewhere = crt(train, epochs=0), crt(train, epochs=0, seed=1)
    assert not torch.equal(state(start), state(elsewhere))
    assert state(start).abs().max() <= 1 / math.sqrt(D)
    assert one.weight.dtype == torch.float32
    assert one.weight.requires_grad
    assert one.weight.grad is None
    with torch.no_grad():
        assert torch.equal(state(crt(train)), state(one))


def test_lws_learns_the_scales_alone_and_finds_the_best():
    from scipy.optimize import minimize

    train, head = gaussians(spread=1.5), linear()
    found = lws(train, head, epochs=600, batch_size=1000, lr=0.1, weight_decay=0)
    f = (found.weight / head.weight).detach()
    torch.testing.assert_close(f, f[:, :1].expand_as(f))  # one number for each row
    torch.testing.assert_close(found.bias.detach() / head.bias.detach(), f[:, 0])
    z, y = head(train.features).detach().numpy(), train.labels.numpy()
    w = (1 / COUNTS.double()).numpy()[y] / K

    def risk(f):
        s = z * f
        return float((w * (np.log(np.exp(s).sum(1)) - s[np.arange(len(y)), y])).sum())

    best = minimize(risk, np.ones(K), tol=1e-12)
    assert risk(f[:, 0].numpy()) == pytest.approx(best.fun, abs=1e-6)
    assert best.fun < risk(np.ones(K)) - 0.1


def test_lws_begins_with_the_head_and_moves_its_rows_where_asked():
    train, head = gaussians(), linear()
    torch.testing.assert_close(state(lws(train, head, epochs=0)), state(head), rtol=0, atol=0)
    without = lws(train, linear(bias=False), epochs=1)
    assert without.bias.eq(0).all()
    loss = losses.label_aware_smoothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # smoothing takes the counts and corrects no prior
        moved = lws(train, head, loss=loss, rows=0.2, epochs=2)
    cosines = F.cosine_similarity(moved.weight, head.weight)
    assert (cosines < 1 - 1e-6).all()
    assert moved.weight.requires_grad
    assert head.weight.grad is None


def test_lws_with_rows_is_sgd_on_the_product():
    """Two rates, one step: f and w move by the gradients of f·(w·h + b)."""
    train, head = gaussians(), linear()
    found = lws(train, head, epochs=1, batch_size=1000, lr=0.1, rows=0.2, weight_decay=0.01)
    W, b = (p.detach().clone().requires_grad_() for p in head.parameters())
    f = torch.ones(K, dtype=torch.float64, requires_grad=True)
    x, y = train.features, train.labels
    per_sample = F.cross_entropy(f * (x @ W.T + b), y, reduction="none")
    (per_sample / COUNTS[y] / K).sum().backward()  # each class 40 times
    with torch.no_grad():
        f = f - 0.1 * (f.grad + 0.01 * f)
        W, b = (p - 0.02 * (p.grad + 0.01 * p) for p in (W, b))
    torch.testing.assert_close(found.weight.detach(), f[:, None] * W)
    torch.testing.assert_close(found.bias.detach(), f * b)


# --- weight balancing ----------------------------------------------------------------------------


def test_max_norm_is_the_authors():
    """Their MaxNorm_via_PGD, run once on this matrix, scaled by 1.5 after the limit was set.

    github.com/ShadeAlsha/LTR-weight-balancing, utils/regularizers.py,
    commit e89f29273d35bb02d58204e7e450a390920c264d
    """
    W = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, -0.8], [-1.0, 2.0]])
    limit = norm_limit(W, 0.1)
    assert limit == pytest.approx(0.95)
    grown = 1.5 * W
    found = max_norm_(grown.clone(), limit)
    want = [
        [0.5700000524520874, 0.7600001096725464],
        [0.45000001788139343, 0.6000000238418579],
        [0.5699999928474426, -0.7600000500679016],
        [-0.42485296726226807, 0.8497059345245361],
    ]
    torch.testing.assert_close(found, torch.tensor(want))
    assert torch.equal(found[1], grown[1])  # below the limit every bit stays
    torch.testing.assert_close(F.cosine_similarity(found, grown), torch.ones(4))
    assert torch.equal(max_norm_(torch.zeros(2, 3), 0.5), torch.zeros(2, 3))


def test_weight_balancing_caps_the_rows_after_every_step():
    head, spy = linear(), Spy()
    found = weight_balancing(gaussians(), head, loss=spy, epochs=2, lr=0.1, batch_size=8)
    limit = norm_limit(head.weight)
    assert torch.equal(spy.weights[0], head.weight)  # from stage one
    for seen in [*spy.weights[1:], found.weight.detach()]:
        assert (seen.norm(dim=1) <= limit * (1 + 1e-12)).all()
    assert len(spy.weights) == 2 * 10
    # Without the cap the rows are longer: it did something.
    free = weight_balancing(gaussians(), head, threshold=1.0, epochs=2, lr=0.1, batch_size=8)
    assert free.weight.norm(dim=1).max() > 1.3 * limit


def test_the_balanced_loss_of_weight_balancing():
    """Weights (1−β)/(1−β^n) with mean 1 over the samples; one plain step of it."""
    train, head = gaussians(), linear()
    found = weight_balancing(
        train, head, threshold=1.0, epochs=1, batch_size=100, lr=0.01, weight_decay=0.1
    )
    w = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS.tolist()])
    w = torch.from_numpy(w * 74 / (w * COUNTS.numpy()).sum())
    torch.testing.assert_close((w / w[0]).float(), losses.drw_weights(COUNTS) /
                               losses.drw_weights(COUNTS)[0])  # fmt: skip
    W, b = (p.detach().clone().requires_grad_() for p in head.parameters())
    y = train.labels
    (w[y] * F.cross_entropy(train.features @ W.T + b, y, reduction="none")).mean().backward()
    with torch.no_grad():
        W, b = (p - 0.01 * (p.grad + 0.1 * p) for p in (W, b))
    torch.testing.assert_close(found.weight.detach(), max_norm_(W, norm_limit(head.weight, 1.0)))
    torch.testing.assert_close(found.bias.detach(), b)


# --- small and empty classes ---------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[12, 0, 5, 1], [1, 1, 1, 1]])
def test_small_and_empty_classes(counts):
    train, head = gaussians(torch.tensor(counts)), linear()
    spy = Spy()
    made = [crt(train, loss=spy), lws(train, head), weight_balancing(train, head)]
    drawn = torch.bincount(torch.cat(spy.epochs[0]), minlength=K)
    assert torch.equal(drawn > 0, torch.tensor(counts) > 0)
    assert len(set(drawn[drawn > 0].tolist())) == 1  # evenly over the classes that are there
    assert all(state(layer).isfinite().all() for layer in made)
    predicted = made[0](train.features).argmax(1)
    assert torch.equal(predicted[train.labels == 3], torch.tensor([3]))


def test_unlabelled_samples_take_no_part():
    train = gaussians()
    y = train.labels.clone()
    y[::3] = -1
    some = FeatureSet(train.features, y, K)
    left = FeatureSet(train.features[y >= 0], y[y >= 0], K)
    spy, other = Spy(), Spy()
    crt(some, loss=spy, epochs=1)
    crt(left, loss=other, epochs=1)
    drawn, want = (torch.bincount(torch.cat(s.epochs[0]), minlength=K) for s in (spy, other))
    assert torch.equal(drawn, want)
    torch.testing.assert_close(state(ncm(some)), state(ncm(left)))


def test_held_out_features():
    counts = torch.tensor([41, 20, 2, 1])
    train = gaussians(counts)
    y = torch.cat([train.labels, torch.tensor([-1])])
    x = torch.cat([train.features, torch.zeros(1, D).double()])
    whole = FeatureSet(x, y, K, torch.arange(65.0)[:, None].expand(65, K))
    left, held = hold_out_features(whole, seed=3)
    assert torch.bincount(held.labels, minlength=K).tolist() == [8, 4, 1, 0]
    assert sorted(torch.cat([left.logits[:, 0], held.logits[:, 0]]).tolist()) == list(range(65))
    assert torch.equal(whole.features[held.logits[:, 0].long()], held.features)
    assert -1 in left.labels
    assert torch.equal(hold_out_features(whole, seed=3)[1].features, held.features)
    assert not torch.equal(hold_out_features(whole, seed=4)[1].features, held.features)
    with pytest.raises(InputError, match="No class has two samples"):
        hold_out_features(gaussians(torch.tensor([1, 1, 1, 1])))


# --- what is taken, refused and warned of --------------------------------------------------------


def test_heads_that_are_linear_in_their_features():
    head = heads.etf_head(8, K, dim=D, neck="linear", normalize=False, scale=3.0)
    x = torch.randn(5, D)
    torch.testing.assert_close(linear_rows(head)(x), head.logits(x))
    framed = heads.frame_head(D, K, frame=frames.simplex_etf, neck=None, normalize=False, scale=2.0)
    torch.testing.assert_close(linear_rows(framed)(x), framed.logits(x))
    mine = linear()
    assert linear_rows(mine) is not mine
    torch.testing.assert_close(state(linear_rows(mine)), state(mine))


@pytest.mark.parametrize(
    "head",
    [
        lambda: heads.cosine_head(D, K),
        lambda: heads.etf_head(D, K),
        lambda: heads.class_mean_head(D, K),
        lambda: heads.multi_centre_head(20, K),
    ],
    ids=["cosine", "etf", "class-mean", "multi-centre"],
)
def test_heads_that_are_not(head):
    with pytest.raises(InputError, match=r"linear in its features, .* crt and ncm make a new one"):
        tau_norm(head())


def test_two_prior_corrections_warn_by_name():
    train, head = gaussians(), linear()
    both = r"at once: sampling='balanced' and the loss logit_adjusted both correct"
    with pytest.warns(UserWarning, match=both):
        crt(train, loss=partial(losses.logit_adjusted, tau=0.5), epochs=1)
    with pytest.warns(UserWarning, match=both):
        lws(train, head, loss=losses.logit_adjusted, epochs=1)
    with pytest.warns(UserWarning, match="'sqrt' and the loss _class_balanced"):
        weight_balancing(train, head, sampling="sqrt", epochs=1)
    with pytest.warns(UserWarning, match="at once: post_hoc and the loss ldam both"):
        post_hoc(head, COUNTS, loss=losses.ldam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crt(train, loss=losses.logit_adjusted, sampling="instance", epochs=1)
        post_hoc(head, COUNTS, loss=ce)


def test_errors():
    train, head = gaussians(), linear()
    nameless = FeatureSet(train.features, None, K)
    for made in (crt, ncm, hold_out_features, partial(lws, head=head)):
        with pytest.raises(InputError, match="labels"):
            made(nameless)
    with pytest.raises(InputError, match=r"rows \(4, 6\), the features are of 4 classes and D = 2"):
        lws(FeatureSet(train.features[:, :2], train.labels, K), head)
    with pytest.raises(InputError, match="labelled samples"):
        crt(FeatureSet(train.features, -torch.ones(74).long(), K))
    with pytest.raises(InputError, match="no class means"):
        ncm(FeatureSet(train.features, -torch.ones(74).long(), K))
    with pytest.raises(InputError, match="tau must be finite"):
        tau_norm(head, math.nan)
    with pytest.raises(InputError, match="at least one candidate"):
        pick_tau(head, train, ())
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\], got 2"):
        weight_balancing(train, head, threshold=2)
    with pytest.raises(InputError, match="Unknown metric 'l1'"):
        ncm(train, "l1")
    with pytest.raises(InputError, match="length K = 4"):
        post_hoc(head, COUNTS[:2])
    with pytest.raises(InputError, match="batch_size"):
        crt(train, batch_size=0)
    with pytest.raises(InputError, match="lr must be finite"):
        crt(train, lr=math.inf)
    with pytest.raises(InputError, match="Unknown sampling"):
        crt(train, sampling="even")
    with pytest.raises(InputError, match="share must lie"):
        hold_out_features(train, share=1.0)
    bad = FeatureSet(train.features.clone().fill_(math.nan), train.labels, K)
    with pytest.raises(NonFiniteLoss, match=r"epoch 1.*NaN in the features"):
        crt(bad)
