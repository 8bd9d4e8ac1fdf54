"""What the methods are made of: losses of a session, aligned rows, classifiers of features."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncmethods import frames, losses
from ncmethods._core import InputError, bind
from ncmethods.features import FeatureSet
from ncmethods.heads import Classifier
from ncmethods.incremental import METHODS, Step, weight_align
from ncmethods.incremental.method import nearest_exemplars, terminus


def old_model(seen=2):
    torch.manual_seed(0)
    return Classifier(nn.Flatten(), nn.Linear(12, seen)).eval()


def given(seen=4, n=10):
    torch.manual_seed(1)
    x = torch.randn(n, 12)
    return {
        "features": torch.randn(n, 12, requires_grad=True),
        "logits": torch.randn(n, seen, requires_grad=True),
        "labels": torch.arange(n) % seen,
        "weight": frames.simplex_etf(seen, 12) if seen < 13 else torch.randn(seen, 12),
        "images": x,
        "counts": torch.full((seen,), 3),
        "epoch": 0,
        "epochs": 4,
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_loss_in_the_first_session_and_later(name):
    first, later = Step(0, 2, base=2), Step(1, 4, 2, 2, old_model(), torch.randn(2, 12))
    for step, of in ((first, given(2)), (later, given())):
        loss = METHODS[name].loss(step)
        value = loss(**bind(loss, of))
        assert value.shape == ()
        assert bool(value.isfinite())
        value.backward()
        grads = [of[k].grad for k in ("features", "logits") if of[k].grad is not None]
        assert any(bool(g.any()) for g in grads)


def test_distillation_grows_with_the_old_classes():
    """Golden 11: √(n_old/n_base) of B50-inc10, sessions 1 to 5."""
    found = []
    for before in (50, 60, 70, 80, 90):
        step = Step(1, before + 10, before, 50, old_model(before))
        of = given(before + 10, 200)
        at = bind(terminus(step, distill=1.0), of)
        whole = terminus(step, distill=1.0)(**at)
        none = terminus(step, distill=0.0)(**at)
        teacher = step.old(of["images"]).features
        each = losses.distill_features(of["features"], teacher, of["labels"] < before)
        found.append(float(((whole - none) / each).detach()))
    assert found == pytest.approx([1, 1.0954, 1.1832, 1.2649, 1.3416], abs=1e-3)


def test_evolving_targets_start_at_the_means_of_the_new_classes():
    means = torch.randn(2, 12)
    step = Step(1, 4, 2, 2, None, means)
    of = given() | {"epoch": 3}  # t = 1
    loss = terminus(step, evolving=True)
    plain = losses.dot_regression(of["features"], of["labels"], of["weight"])
    torch.testing.assert_close(loss(**bind(loss, of)), plain)
    early = loss(**bind(loss, of | {"epoch": 0}))
    rows = of["weight"].clone()
    rows[2:] = F.normalize(0.75 * F.normalize(means, dim=1) + 0.25 * rows[2:], dim=1)
    torch.testing.assert_close(early, losses.dot_regression(of["features"], of["labels"], rows))


def test_kd_worked_example():
    """Golden 12: logits (2, 0) against a teacher's (0, 2) at T = 2, without T²."""
    z, t = torch.tensor([[2.0, 0.0, 5.0]]), torch.tensor([[0.0, 2.0]])
    value = losses.distill_logits(z, t)
    assert float(value) == pytest.approx(1.0443202, abs=1e-6)
    p = (t / 2).softmax(1)
    kl = F.kl_div((z[:, :2] / 2).log_softmax(1), p, reduction="batchmean")
    assert float(kl) == pytest.approx(0.4621172, abs=1e-6)
    entropy = -(p * p.log()).sum()
    assert float(value) == pytest.approx(float(kl + entropy), abs=1e-6)


def test_weight_aligning():
    rows = torch.diag(torch.tensor([5.0, 5.0, 10.0, 20.0]))  # golden 12: γ = 1/3
    aligned = weight_align(rows, 2)
    torch.testing.assert_close(aligned[:2], rows[:2])
    torch.testing.assert_close(aligned[2:], rows[2:] / 3)
    for old in (0, 4):
        with pytest.raises(InputError, match="old lies in"):
            weight_align(rows, old)


def test_features_and_relations_are_kept():
    torch.manual_seed(0)
    h, t = torch.randn(6, 5), torch.randn(6, 5)
    cosine = F.cosine_similarity(h, t)
    torch.testing.assert_close(losses.distill_features(h, t), 0.5 * (cosine - 1).square().mean())
    some = torch.tensor([True, False, False, True, False, False])
    torch.testing.assert_close(
        losses.distill_features(h, t, some), 0.5 * (cosine[some] - 1).square().mean()
    )
    assert float(losses.distill_features(h, t, torch.zeros(6, dtype=torch.bool))) == 0
    assert float(losses.distill_features(3 * t, t)) == pytest.approx(0, abs=1e-12)

    def similar(x, T):
        u = F.normalize(x, dim=1)
        return [[(u[i] @ u[j] / T).item() for j in range(6) if j != i] for i in range(6)]

    student = torch.tensor(similar(h, 0.2)).log_softmax(1)
    teacher = torch.tensor(similar(t, 0.01)).softmax(1)
    want = -(teacher * student).sum(1).mean()
    torch.testing.assert_close(losses.distill_relations(h, t), want, rtol=1e-4, atol=1e-4)
    turned = torch.linalg.qr(torch.randn(5, 5)).Q
    torch.testing.assert_close(
        losses.distill_relations(h @ turned, t),
        losses.distill_relations(h, t),
        rtol=1e-4,
        atol=1e-4,
    )


def test_bad_teachers():
    z = torch.randn(4, 3)
    with pytest.raises(InputError, match="teacher has 5 classes"):
        losses.distill_logits(z, torch.randn(4, 5))
    with pytest.raises(InputError, match="temperature must be positive"):
        losses.distill_logits(z, z, temperature=0)
    with pytest.raises(InputError, match="widths must agree"):
        losses.distill_features(z, torch.randn(4, 5))
    with pytest.raises(InputError, match="student and teacher alike"):
        losses.distill_relations(z, torch.randn(3, 3))
    with pytest.raises(InputError, match="temperatures must be positive"):
        losses.distill_relations(z, z, temperature=0)
    assert float(losses.distill_relations(z[:1], z[:1])) == 0
    assert float(losses.distill_logits(z[:0], z[:0])) == 0


def test_nearest_exemplars_is_the_nearest_mean_of_unit_features():
    torch.manual_seed(0)
    y = torch.arange(40) % 4
    x = torch.randn(4, 6)[y] * torch.rand(40, 1) * 5
    known, new = FeatureSet(x, y, 4), torch.randn(20, 6)
    unit = F.normalize(x, dim=1)
    means = F.normalize(torch.stack([unit[y == c].mean(0) for c in range(4)]), dim=1)
    want = torch.cdist(F.normalize(new, dim=1), means).argmin(1)
    got = nearest_exemplars(SimpleNamespace(), known, Step(0, 4))(new).argmax(1)
    assert torch.equal(got, want)
    assert math.isfinite(float(got.sum()))
