import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import multi_centre, simplex_etf
from ncmethods.heads import multi_centre_head
from ncmethods.losses import dot_regression
from ncmethods.losses.multi_centre import multi_centre_regression
from ncmethods.testing import check_loss

f64 = torch.float64


@pytest.fixture
def batch():
    """Four classes with 2, 1, 3 and 2 centres; class 1 is absent."""
    noise = torch.Generator().manual_seed(1)
    centres = [2, 1, 3, 2]
    rows = multi_centre(4, 9, centres=centres, generator=noise, dtype=f64)
    owner = torch.arange(4).repeat_interleave(torch.tensor(centres))
    features = torch.randn(9, 9, generator=noise, dtype=f64) + 0.2
    return features, torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3]), rows, owner


def per_sample(features, labels, rows, owner):
    losses = []
    for h, y in zip(features, labels.tolist()):
        cosines = [F.cosine_similarity(h, r, dim=0) for r, o in zip(rows, owner.tolist()) if o == y]
        losses.append((1 - max(cosines)).square() / 2)
    return torch.stack(losses)


def test_it_equals_the_loops(batch):
    features, labels, rows, owner = batch
    each = per_sample(*batch)
    got = multi_centre_regression(*batch, balance="none")
    torch.testing.assert_close(got, each.mean(), rtol=1e-12, atol=0)
    want = torch.stack([each[labels == c].mean() for c in (0, 2, 3)]).mean()
    torch.testing.assert_close(multi_centre_regression(*batch), want, rtol=1e-12, atol=0)
    mixed = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    got = multi_centre_regression(features, labels, 5 * rows[mixed], owner[mixed])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    lengths = features.norm(dim=1).mean()
    got = multi_centre_regression(*batch, norm_penalty=0.3)
    torch.testing.assert_close(got, want + 0.3 * lengths, rtol=1e-12, atol=0)


@pytest.mark.parametrize("balance", ["batch", "none"])
def test_one_centre_each_is_dot_regression(batch, balance):
    features, labels, _, _ = batch
    frame = simplex_etf(4, 9, dtype=f64)
    x = features.clone().requires_grad_()
    got = multi_centre_regression(x, labels, frame, torch.arange(4), balance=balance)
    want = dot_regression(x, labels, frame, balance=balance)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


def test_assigned_centres_are_dot_regression_on_the_rows(batch):
    features, labels, rows, owner = batch
    place = torch.tensor([0, 1, 1, 0, 3, 4, 5, 6, 7])
    assert torch.equal(owner[place], labels)
    got = multi_centre_regression(*batch, assigned=place, balance="none")
    want = dot_regression(features, place, rows, balance="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    nearest = multi_centre_regression(*batch, balance="none")
    assert got > nearest
    torch.testing.assert_close(
        multi_centre_regression(*batch, assigned=place * 0 - 1, balance="none"), nearest
    )
    some = torch.where(torch.arange(9) < 4, place, -1)
    each = per_sample(*batch)
    one = (1 - F.cosine_similarity(features, rows[place])).square() / 2
    torch.testing.assert_close(
        multi_centre_regression(*batch, assigned=some, balance="none"),
        torch.cat([one[:4], each[4:]]).mean(),
    )


def test_it_fits_the_head():
    head = multi_centre_head(12, 4, centres=[1, 2, 1, 3], dim=9)
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(16) % 4
    features = head.embed(x)
    loss = multi_centre_regression(features, y, head.rows, head.owner)
    loss.backward()
    assert x.grad.any(1).all()
    # On their centres, features have no loss and the head's logits are right.
    at = head.rows[head.owner.argsort()]
    labels = head.owner
    assert multi_centre_regression(3 * at, labels, head.rows, head.owner) < 1e-12
    assert torch.equal(head.logits(at).argmax(1), labels)


def test_only_features_move_and_only_towards_the_nearest(batch):
    features, labels, rows, owner = batch
    x, w = features.clone().requires_grad_(), rows.clone().requires_grad_()
    multi_centre_regression(x, labels, w, owner).backward()
    assert w.grad is None
    near = (F.normalize(x, dim=1) @ rows.T).masked_fill(owner != labels[:, None], -2).argmax(1)
    z = F.normalize(features, dim=1)
    tangent = rows[near] - (rows[near] * z).sum(1, keepdim=True) * z
    cosine = F.cosine_similarity(-x.grad, tangent)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_invariance_to_length(batch):
    features, labels, rows, owner = batch
    size = torch.linspace(0.01, 99, 9, dtype=f64)[:, None]
    got = multi_centre_regression(size * features, labels, rows, owner)
    torch.testing.assert_close(got, multi_centre_regression(*batch))


def test_ignored_rows_leave_no_trace(batch):
    features, labels, rows, owner = batch
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    for options in ({}, {"balance": "none"}, {"norm_penalty": 0.5}):
        z = features.clone()
        z[0] = torch.nan
        z.requires_grad_()
        loss = multi_centre_regression(z, labels, rows, owner, **options)
        want = multi_centre_regression(features[keep], labels[keep], rows, owner, **options)
        torch.testing.assert_close(loss, want)
        loss.backward()
        assert not z.grad[~keep].any()
        assert z.grad[keep].isfinite().all()


def test_nothing_labelled_and_zero_features(batch):
    features, labels, rows, owner = batch
    x = features.clone().requires_grad_()
    loss = multi_centre_regression(x, labels * 0 - 1, rows, owner, norm_penalty=0.1)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    x = torch.zeros(9, 9, dtype=f64, requires_grad=True)
    multi_centre_regression(x, labels, rows, owner, norm_penalty=0.1).backward()
    assert x.grad.abs().max() < 10


def test_gradients(batch):
    features, labels, rows, owner = batch
    x = features.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: multi_centre_regression(x, labels, rows, owner, norm_penalty=0.1), x
    )


@pytest.mark.parametrize("balance", ["batch", "none"])
def test_conformance(balance):
    def two_each(features, labels, weight):
        rows = torch.cat([weight, weight.roll(1, 1)])
        owner = torch.arange(len(weight)).repeat(2)
        return multi_centre_regression(features, labels, rows, owner, balance=balance)

    for K in (2, 5):
        check_loss(two_each, num_classes=K)


def test_errors(batch):
    features, labels, rows, owner = batch
    with pytest.raises(InputError, match="rows must be floating"):
        multi_centre_regression(features, labels, rows[:, :3], owner)
    with pytest.raises(InputError, match="class of each of the 8 rows"):
        multi_centre_regression(features, labels, rows, owner[:4])
    for bad in (torch.tensor([0, 0, 2, 2, 2, 3, 3, 3]), owner - 1):
        with pytest.raises(InputError, match="owner must give every row a class"):
            multi_centre_regression(features, labels, rows, bad)
    with pytest.raises(InputError, match="labels must be < num_classes = 4"):
        multi_centre_regression(features, labels + 1, rows, owner)
    with pytest.raises(InputError, match="assigned must be < 8"):
        multi_centre_regression(features, labels, rows, owner, assigned=labels + 6)
    with pytest.raises(InputError, match="Unknown balance"):
        multi_centre_regression(features, labels, rows, owner, balance="global")
