"""ReAct, VRA, ASH, SCALE, DICE: golden values, numpy, pytorch-ood, limits, edges, warnings."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from ncmethods import heads, ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood.shaping import ASH, DICE, SCALE, VRA, ReAct, _quantile

F64 = {"dtype": torch.float64}
FITS = {
    "ReAct": ReAct.fit,
    "VRA": VRA.fit,
    "VRA-clip": partial(VRA.fit, low=0.1, high=0.9, each=False, below="clip"),
    "ASH-b": partial(ASH.fit, variant="b", prune=0.5),
    "ASH-p": partial(ASH.fit, variant="p", prune=0.5),
    "ASH-s": partial(ASH.fit, variant="s", prune=0.5),
    "SCALE": SCALE.fit,
    "DICE": partial(DICE.fit, sparsity=0.5),
}


def positive(N=60, D=10, K=4, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    x = scale * torch.rand(N, D, generator=rng, **F64) ** 2
    return FeatureSet(x, torch.arange(N) % K, K)


def linear(K=4, D=10, seed=1):
    rng = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, K).double()
    head.weight.data.copy_(torch.randn(K, D, generator=rng, **F64))
    head.bias.data.copy_(torch.randn(K, generator=rng, **F64))
    return head


def energy(x, head):
    """Of features in numpy."""
    z = x @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    return -logsumexp(z, axis=1)


TRAIN, HEAD, Q = positive(), linear(), positive(25, seed=5, scale=2.0).features
NP = Q.numpy()


# --- golden values --------------------------------------------------------------------------------


def test_ash_and_scale_golden_values():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], **F64)
    head = nn.Linear(4, 2).double()
    factor = math.exp(10 / 7)
    assert factor == pytest.approx(4.172734, abs=1e-6)
    want = {"s": [0, 0, 3 * factor, 4 * factor], "b": [0, 0, 5, 5], "p": [0, 0, 3, 4]}
    for variant, row in want.items():
        got = ASH.fit(head=head, variant=variant, prune=0.5).shaped(x)
        torch.testing.assert_close(got, torch.tensor([row], **F64))
    torch.testing.assert_close(SCALE.fit(head=head, prune=0.5).shaped(x), factor * x)
    assert want["s"][2:] == pytest.approx([12.518, 16.691], abs=5e-4)
    assert x.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("prune", [0.0, 0.25, 0.65, 0.9])
def test_ash_and_scale_are_their_definition(prune):
    k = 10 - round(10 * prune)
    rank = (-NP).argsort(1).argsort(1)
    kept = np.where(rank < k, NP, 0)
    s1, s2 = NP.sum(1, keepdims=True), kept.sum(1, keepdims=True)
    shaped = {
        "p": kept,
        "b": np.where(rank < k, s1 / k, 0),
        "s": kept * np.exp(s1 / s2),
        "scale": NP * np.exp(s1 / s2),
    }
    for variant in "pbs":
        got = ASH.fit(head=HEAD, variant=variant, prune=prune)(Q)
        np.testing.assert_allclose(got, energy(shaped[variant], HEAD), rtol=1e-10)
    got = SCALE.fit(head=HEAD, prune=prune)(Q)
    np.testing.assert_allclose(got, energy(shaped["scale"], HEAD), rtol=1e-10)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_react_is_its_definition(quantile):
    tau = np.quantile(TRAIN.features.numpy(), quantile)
    want = energy(NP.clip(max=tau), HEAD)
    np.testing.assert_allclose(ReAct.fit(TRAIN, HEAD, quantile=quantile)(Q), want, rtol=1e-10)
    np.testing.assert_allclose(ReAct.fit(head=HEAD, clip=tau)(Q), want, rtol=1e-10)
    assert not np.allclose(want, energy(NP, HEAD))


def test_vra_is_its_definition():
    x = TRAIN.features.numpy()
    low, high = np.quantile(x, 0.6, axis=0), np.quantile(x, 0.95, axis=0)
    cut = np.where(low > NP, 0, np.where(high < NP, high, NP))  # as the authors' models do
    np.testing.assert_allclose(VRA.fit(TRAIN, HEAD)(Q), energy(cut, HEAD), rtol=1e-10)
    low, high = np.quantile(x, 0.1), np.quantile(x, 0.9)
    openood = VRA.fit(TRAIN, HEAD, low=0.1, high=0.9, each=False, below="clip")
    np.testing.assert_allclose(openood(Q), energy(NP.clip(low, high), HEAD), rtol=1e-10)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_dice_is_its_definition(sparsity):
    W, b = HEAD.weight.detach().numpy(), HEAD.bias.detach().numpy()
    part = W * TRAIN.features.numpy().mean(0)
    masked = W * (part > np.quantile(part, sparsity))
    want = -np.log(np.exp(NP @ masked.T + b).sum(1))
    for train in (TRAIN, TRAIN.stats, TRAIN.stats.freeze()):
        np.testing.assert_allclose(DICE.fit(train, HEAD, sparsity=sparsity)(Q), want, rtol=1e-10)


def test_is_pytorch_ood():
    detector = pytest.importorskip("pytorch_ood.detector")
    w, b = HEAD.weight.detach().float(), HEAD.bias.detach().float()

    def head(maps):
        return maps.flatten(1) @ w.T + b

    maps, y = TRAIN.features.float()[..., None, None], TRAIN.labels
    q = Q.float()[..., None, None]
    theirs = {
        "react": detector.ReAct(None, head, percentile=0.9).fit_feature_maps(maps, y),
        "vra": detector.VRA(None, head).fit_feature_maps(maps, y),
        "scale": detector.SCALE(None, head, percentile=0.65),
        **{v: detector.ASH(None, head, variant=f"ash-{v}", percentile=0.65) for v in "bps"},
    }
    ours = {
        "react": ReAct.fit(TRAIN, HEAD),
        "vra": VRA.fit(TRAIN, HEAD, low=0.01, high=0.99, below="clip"),
        "scale": SCALE.fit(head=HEAD, prune=0.65),
        **{v: ASH.fit(head=HEAD, variant=v, prune=0.65) for v in "bps"},
    }
    for name, scorer in ours.items():
        want = theirs[name].predict_feature_maps(q)
        torch.testing.assert_close(scorer(Q).float(), want, rtol=1e-5, atol=1e-5)
    dice = detector.DICE(None, w, b, p=0.7).fit_features(TRAIN.features.float(), y)
    got = DICE.fit(TRAIN, HEAD, sparsity=0.7)(Q).float()
    torch.testing.assert_close(got, dice.predict_features(Q.float()), rtol=1e-5, atol=1e-5)


# --- quantiles ------------------------------------------------------------------------------------


def test_quantile_is_numpys():
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(2), **F64)
    for q in (0.0, 0.1, 0.5, 0.77, 1.0):
        for given in (x, x.flatten(), x.float().flatten()):
            want = np.quantile(given.double().numpy(), q, axis=0)
            np.testing.assert_allclose(_quantile(given, q, "q"), want, rtol=1e-12)
    assert float(_quantile(torch.tensor([3.0]), 0.9, "q")) == 3


def test_quantile_of_more_entries_than_torchs_takes():
    n = 2**24 + 9
    x = torch.arange(n, dtype=torch.int32).div_(2, rounding_mode="floor").float()
    place = 0.3 * (n - 1)
    low, high = (int(place) + i for i in (0, 1))
    want = low // 2 + (place - low) * (high // 2 - low // 2)
    assert float(_quantile(x, 0.3, "q")) == pytest.approx(want, rel=1e-12)


# --- limits and invariances -----------------------------------------------------------------------


def test_limits_are_the_energy():
    want = ood.Energy.fit(head=HEAD)(Q)
    for scorer in (
        ReAct.fit(head=HEAD, clip=math.inf),
        ASH.fit(head=HEAD, variant="p", prune=0.0),
        VRA.fit(FeatureSet(Q, None, 4), HEAD, low=0.0, high=1.0),
    ):
        torch.testing.assert_close(scorer(Q), want)
    every = torch.log(torch.tensor(math.e)) * Q  # nothing pruned: s₁ = s₂
    torch.testing.assert_close(SCALE.fit(head=HEAD, prune=0.0)(Q / math.e), -_lse(every))


def _lse(x):
    return (x @ HEAD.weight.detach().T + HEAD.bias.detach()).logsumexp(1)


@pytest.mark.parametrize("name", FITS)
def test_inputs_are_not_changed_and_logits_play_no_part(name):
    scorer, before = FITS[name](TRAIN, HEAD), Q.clone()
    want = scorer(Q)
    assert torch.equal(Q, before)
    assert torch.equal(scorer(Q, torch.full((25, 4), torch.nan)), want)
    turn = torch.randperm(10, generator=torch.Generator().manual_seed(3))  # units have no order
    turned = linear()
    turned.weight.data.copy_(HEAD.weight.data[:, turn])
    train = FeatureSet(TRAIN.features[:, turn], TRAIN.labels, 4)
    torch.testing.assert_close(FITS[name](train, turned)(Q[:, turn]), want)


@pytest.mark.parametrize("name", FITS)
def test_zero_and_sparse_features_are_decided_by_their_values(name):
    """More is to stay than is there: a tie among zeros, which topk breaks as it likes."""
    scorer = FITS[name](TRAIN, HEAD)
    rows = torch.zeros(3, 10, **F64)
    rows[1, 4], rows[2, 7] = 2.0, 0.5
    found = scorer(rows)
    assert found.isfinite().all()
    if name == "ASH-b":
        torch.testing.assert_close(scorer.shaped(rows), rows)  # the sum is kept, on one entry
    if name in ("ASH-b", "ASH-p", "ASH-s", "SCALE", "ReAct", "VRA", "DICE"):
        torch.testing.assert_close(found[0], -HEAD.bias.detach().logsumexp(0))


def test_ash_keeps_ties_together():
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0]], **F64)
    head = nn.Linear(4, 2).double()
    got = ASH.fit(head=head, variant="b", prune=0.5).shaped(x)
    torch.testing.assert_close(got, torch.tensor([[4, 4, 4, 0]], **F64) / 3)


def test_heads_that_normalise():
    """They do not see a factor; DICE masks the rows that act on unit features."""
    head = heads.etf_head(10, 4, neck=None).double()
    torch.testing.assert_close(SCALE.fit(head=head)(Q), ood.Energy.fit(head=head)(Q))
    p, s = (ASH.fit(head=head, variant=v)(Q) for v in "ps")
    torch.testing.assert_close(s, p)
    W = float(head.scale) * head.weight.numpy()
    part = W * TRAIN.features.numpy().mean(0)
    z = (NP / np.linalg.norm(NP, axis=1, keepdims=True)) @ (W * (part > np.quantile(part, 0.9))).T
    got = DICE.fit(TRAIN, head)(Q)
    np.testing.assert_allclose(got, -np.log(np.exp(z).sum(1)), rtol=1e-10)
    with pytest.raises(InputError, match="not linear"):
        DICE.fit(TRAIN, heads.multi_centre_head(10, 4, neck=None))


# --- signed features and other bad input ----------------------------------------------------------


@pytest.mark.parametrize("name", FITS)
def test_signed_features_warn_once(name):
    signed = FeatureSet(TRAIN.features - 0.4, TRAIN.labels, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scorer = FITS[name](signed, HEAD)
        scorer(Q)
    said = [str(w.message) for w in seen]
    assert len(said) == (0 if name == "VRA-clip" else 1)
    assert all("ReLU" in text and name.split("-")[0] in text for text in said)
    assert all(w.filename.endswith("test_shaping.py") for w in seen)


def test_signed_moments_warn():
    signed = FeatureSet(TRAIN.features - 0.4, TRAIN.labels, 4)
    with pytest.warns(UserWarning, match="ReLU"):
        DICE.fit(signed.stats, HEAD)


@pytest.mark.parametrize("name", FITS)
def test_a_head_is_needed(name):
    with pytest.raises(InputError, match=r"pass head=model\.head"):
        FITS[name](TRAIN)
    with pytest.raises(InputError, match="D = 10"):
        FITS[name](TRAIN, HEAD)(Q[:, :1])


def test_errors():
    for fit in (ReAct.fit, VRA.fit):
        with pytest.raises(InputError, match="needs the samples"):
            fit(TRAIN.stats, HEAD)
    with pytest.raises(InputError, match="or clip"):
        ReAct.fit(head=HEAD)
    with pytest.raises(InputError, match="quantile"):
        ReAct.fit(TRAIN, HEAD, quantile=90)
    with pytest.raises(InputError, match="clip must be positive"):
        ReAct.fit(head=HEAD, clip=0.0)
    with pytest.raises(InputError, match="must not exceed"):
        VRA.fit(TRAIN, HEAD, low=0.9, high=0.1)
    with pytest.raises(InputError, match="Did you mean 'clip'"):
        VRA.fit(TRAIN, HEAD, below="clap")
    with pytest.raises(InputError, match="variant of ASH"):
        ASH.fit(head=HEAD, variant="rand")
    for fit in (ASH.fit, SCALE.fit):
        with pytest.raises(InputError, match="prune"):
            fit(head=HEAD, prune=1.0)
    with pytest.raises(InputError, match="sparsity"):
        DICE.fit(TRAIN, HEAD, sparsity=2.0)
    with pytest.raises(InputError, match="as wide as the features"):
        DICE.fit(TRAIN, linear(D=9))
