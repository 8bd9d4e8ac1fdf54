import math

import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses import dot_regression

f64 = torch.float64


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(1)
    features = torch.randn(12, 9, generator=noise, dtype=f64) + 0.3
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 3, 3, 4])  # class 2 is absent
    weight = simplex_etf(5, 9, generator=noise, dtype=f64)
    return features, labels, weight


def per_sample(features, labels, weight):
    """½(1 − cos θ)² from torch's own cosine."""
    cosine = F.cosine_similarity(features, weight[labels])
    return (1 - cosine).square() / 2


def at_angle(theta, vertex, radius):
    other = torch.randn(len(vertex), dtype=f64)
    other -= (other @ vertex) * vertex
    return radius * (math.cos(theta) * vertex + math.sin(theta) * F.normalize(other, dim=0))


@pytest.mark.parametrize(
    ("degrees", "value", "slope"),
    [
        (0, 0.0, 0.0),
        (60, 0.125, 0.4330127019),
        (90, 0.5, 1.0),
        (120, 1.125, 1.2990381057),
        (180, 2.0, 0.0),
    ],
)
@pytest.mark.parametrize("radius", [1.0, 3.7])
def test_value_and_gradient_at_an_angle(degrees, value, slope, radius):
    # Golden check 2 of the sheet: L = ½(1−cosθ)², ‖∂L/∂z‖ = (1−cosθ) sinθ / r.
    weight = simplex_etf(10, 12, dtype=f64).requires_grad_()
    z = at_angle(math.radians(degrees), weight[3].detach(), radius)[None].requires_grad_()
    loss = dot_regression(z, torch.tensor([3]), weight)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert z.grad.norm().item() == pytest.approx(slope / radius, abs=1e-9)
    assert weight.grad is None


def test_value_at_a_wrong_vertex():
    weight = simplex_etf(10, 9, dtype=f64)
    loss = dot_regression(weight[:1], torch.tensor([4]), weight)
    assert loss.item() == pytest.approx(50 / 81, abs=1e-12)


def test_the_largest_gradient_is_at_120_degrees():
    weight = simplex_etf(3, 4, dtype=f64)
    angles = torch.linspace(1, 179, 179, dtype=f64)
    slopes = []
    for degrees in angles.tolist():
        z = at_angle(math.radians(degrees), weight[0], 1.0)[None].requires_grad_()
        (grad,) = torch.autograd.grad(dot_regression(z, torch.tensor([0]), weight), z)
        slopes.append(grad.norm().item())
    assert angles[max(range(179), key=slopes.__getitem__)] == 120


def test_batch_balance_is_the_mean_of_the_class_means():
    # Golden check 3: labels [0,0,0,1], losses [.1,.2,.3,.8] give .5 where the plain mean is .35.
    weight = simplex_etf(4, 6, dtype=f64)
    labels = torch.tensor([0, 0, 0, 1])
    wanted = (0.1, 0.2, 0.3, 0.8)
    angles = [math.acos(1 - math.sqrt(2 * v)) for v in wanted]
    features = torch.stack([at_angle(a, weight[y], 2.0) for a, y in zip(angles, labels)])
    assert dot_regression(features, labels, weight).item() == pytest.approx(0.5, abs=1e-12)
    plain = dot_regression(features, labels, weight, balance="none")
    assert plain.item() == pytest.approx(0.35, abs=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_batch_balance_equals_the_authors_scaled_columns(batch, normalize):
    # ½·mean (h·M̃_y − ‖M̃_y‖‖h‖)²/‖h‖ with M̃_c = √(γ/b_c) m_c, γ = B/U, norms detached.
    features, labels, weight = batch
    z = features.clone().requires_grad_()
    h = F.normalize(z, dim=1) if normalize else z
    b = labels.bincount(minlength=5).double()
    gamma = len(labels) / (b > 0).sum()
    M = (gamma / b.clamp(min=1)).sqrt()[:, None] * weight
    length = h.norm(dim=1).detach()
    gap = (h * M[labels]).sum(1) - M.norm(dim=1)[labels] * length
    want = 0.5 * (gap.square() / length).mean()
    (want_grad,) = torch.autograd.grad(want, z)

    loss = dot_regression(z, labels, weight, normalize=normalize)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-14)


def test_batch_balance_ignores_how_often_a_class_was_drawn(batch):
    features, labels, weight = batch
    more = torch.cat([torch.arange(12), (labels == 0).nonzero()[:, 0].repeat(3)])
    once = dot_regression(features, labels, weight)
    torch.testing.assert_close(dot_regression(features[more], labels[more], weight), once)
    plain = [dot_regression(features[i], labels[i], weight, balance="none") for i in (..., more)]
    assert not torch.isclose(*plain)


def test_global_balance(batch):
    features, labels, weight = batch
    counts = torch.tensor([600, 30, 7, 5, 1])
    inverse = 1 / counts.double()[labels]
    want = (inverse * per_sample(features, labels, weight)).sum() / inverse.sum()
    loss = dot_regression(features, labels, weight, balance="global", counts=counts)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    scaled = dot_regression(features, labels, weight, balance="global", counts=100 * counts)
    torch.testing.assert_close(scaled, want, rtol=1e-12, atol=0)
    alike = dot_regression(features, labels, weight, balance="global", counts=counts * 0 + 7)
    plain = per_sample(features, labels, weight).mean()
    torch.testing.assert_close(alike, plain, rtol=1e-12, atol=0)


def test_imagenet_form(batch):
    # Residual over the detached norm, plus λ·mean‖h‖ (which carries gradient).
    features, labels, weight = batch
    z = features.clone().requires_grad_()
    length = z.norm(dim=1)
    gap = (z * weight[labels]).sum(1) - length.detach()
    want = 0.5 * (gap.square() / length.detach()).mean() + 0.01 * length.mean()
    (want_grad,) = torch.autograd.grad(want, z)
    loss = dot_regression(z, labels, weight, balance="none", normalize=False, norm_penalty=0.01)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-14)


def test_rows_of_any_length(batch):
    """With E_W: (⟨h, w⟩ − ‖h‖‖w‖)² / (2‖h‖‖w‖), so rows scaled by s scale the loss by s."""
    features, labels, weight = batch
    one = dot_regression(features, labels, weight)
    torch.testing.assert_close(dot_regression(features, labels, 3 * weight), 3 * one)


def test_ignored_rows_touch_neither_the_mean_nor_the_penalty(batch):
    features, labels, weight = batch
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    for options in (
        {},
        {"balance": "none"},
        {"balance": "global", "counts": torch.tensor([9, 8, 7, 6, 5])},
        {"normalize": False, "norm_penalty": 0.5},
    ):
        z = features.clone().requires_grad_()
        loss = dot_regression(z, labels, weight, **options)
        torch.testing.assert_close(
            loss, dot_regression(features[keep], labels[keep], weight, **options)
        )
        loss.backward()
        assert not z.grad[~keep].any()
        assert z.grad[keep].any()


def test_nothing_to_average_is_zero_with_zero_gradient(batch):
    features, _, weight = batch
    z = features.clone().requires_grad_()
    loss = dot_regression(z, torch.full((12,), -1), weight)
    loss.backward()
    assert loss == 0
    assert not z.grad.any()


def test_zero_features_give_finite_gradients():
    weight = simplex_etf(3, 4)
    for normalize in (True, False):
        z = torch.zeros(2, 4, requires_grad=True)
        loss = dot_regression(
            z, torch.tensor([0, 1]), weight, normalize=normalize, norm_penalty=0.01
        )
        loss.backward()
        assert loss.isfinite()
        assert z.grad.abs().max() < 10


def test_errors(batch):
    features, labels, weight = batch
    with pytest.raises(InputError, match=r"Unknown balance 'bach'.*Did you mean 'batch'"):
        dot_regression(features, labels, weight, balance="bach")
    with pytest.raises(InputError, match="needs counts"):
        dot_regression(features, labels, weight, balance="global")
    with pytest.raises(InputError, match="length K = 5"):
        dot_regression(features, labels, weight, balance="global", counts=torch.ones(4))
    with pytest.raises(InputError, match=r"D = 9 as the features have.*\(5, 8\).*after the head"):
        dot_regression(features, labels, weight[:, :8])
    with pytest.raises(InputError, match="2-D"):
        dot_regression(features[0], labels[:1], weight)
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        dot_regression(features, labels + 1, weight)
    with pytest.raises(InputError, match="12 rows"):
        dot_regression(features, labels[:3], weight)
