"""Centres: Liu et al.'s NC1 and NC2, with their code's values.

https://github.com/Pepper-lll/NCfeature/blob/a11c2c51263ed5c06d152f8a439bf21c1913f668/losses.py
(`NC1Loss`, `NC2Loss`, `NC2Loss_v1`, `NC2Loss_v2`, `zero_center`; float64, on the CPU.)
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses import nc_regularizer
from ncmethods.losses.nc_regularizer import (
    CentreRegularizer,
    live_centres,
    nc1_centres,
    nc2_max_min_angle,
)

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
CENTRES = torch.cos(2 * torch.arange(1, 21, dtype=f64)).reshape(4, 5)
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 0])  # class 2 is absent
MODES = ["v0", "v1", "v2"]
# What the authors' functions gave: value, gradient norms, a row of the gradient.
NC1 = 3.8287633838871526
NC1_GRAD_NORMS = 1.2370776289158305, 1.6087615455155257
NC1_FEATURE_3 = [
    -0.18702111286192924, -0.01880453618249192, -0.10383725952404523, -0.13419940573072375,
    0.26331388539664824,
]  # fmt: skip
NC2 = {
    "v0": (-1.2163512416567994, 0.6830707523295934, [
        -0.19496690803218653, 0.1942048453465675, 0.03333144396598433, -0.22194639527455295,
        0.15139313658710934]),
    "v1": (-1.1977203424149878, 0.872059074218132, [
        -0.11716087669001282, 0.011303356060829314, 0.10775316495585262, -0.10098563350947026,
        -0.023703461112502322]),
    "v2": (2.318698174650311, 0.7531583406701462, [
        -0.22396706461173596, 0.21475863480226268, 0.04522481162344665, -0.25239895938333823,
        0.16484524536688708]),
}  # fmt: skip
ZERO_CENTER = 0.14840366932106777


def naive_nc1(h, y, mu):
    total = 0.0
    for c in range(len(mu)):
        own = [np.sum((x - mu[c]) ** 2) for x, label in zip(h, y) if label == c]
        total += np.mean(own) if own else 0.0
    return total / len(mu)


def naive_angles(mu):
    """Angle between each pair of centred rows; NaN on the diagonal."""
    centred = mu - mu.mean(0)
    out = np.full((len(mu), len(mu)), np.nan)
    for i in range(len(mu)):
        for j in range(len(mu)):
            if i != j:
                lengths = np.linalg.norm(centred[i]) * np.linalg.norm(centred[j])
                out[i, j] = np.arccos(centred[i] @ centred[j] / lengths)
    return out


def test_nc1_equals_the_authors_code():
    h, mu = FEATURES.clone().requires_grad_(), CENTRES.clone().requires_grad_()
    loss = nc1_centres(h, LABELS, mu)
    assert loss.item() == pytest.approx(NC1, rel=1e-12)
    grads = torch.autograd.grad(loss, [h, mu])
    assert [g.norm().item() for g in grads] == pytest.approx(NC1_GRAD_NORMS, rel=1e-12)
    assert grads[0][3].tolist() == pytest.approx(NC1_FEATURE_3, rel=1e-10)
    assert loss.item() == pytest.approx(naive_nc1(FEATURES.numpy(), LABELS, CENTRES.numpy()))


def test_gradient_of_nc1():
    # ∂/∂h_i = 2 (h_i − μ_y)/(K b_y); ∂/∂μ_c = −2 (mean of class c − μ_c)/K, 0 for an absent class.
    h, mu = FEATURES.clone().requires_grad_(), CENTRES.clone().requires_grad_()
    to_h, to_mu = torch.autograd.grad(nc1_centres(h, LABELS, mu), [h, mu])
    b = torch.tensor([3, 2, 0, 3], dtype=f64)
    want = 2 * (FEATURES - CENTRES[LABELS]) / (4 * b[LABELS][:, None])
    torch.testing.assert_close(to_h, want, rtol=1e-12, atol=0)
    for c in (0, 1, 3):
        mean = FEATURES[c == LABELS].mean(0)
        torch.testing.assert_close(to_mu[c], 2 * (CENTRES[c] - mean) / 4, rtol=1e-12, atol=1e-15)
    assert torch.equal(to_mu[2], torch.zeros(5, dtype=f64))


def test_nc1_at_the_centres_and_far_from_the_origin():
    assert nc1_centres(CENTRES[LABELS], LABELS, CENTRES) == 0  # golden check 12
    far = 1000 + 1e-3 * FEATURES.float()
    centres = torch.full((4, 5), 1000.0)
    exact = naive_nc1(far.double().numpy(), LABELS, centres.double().numpy())
    assert nc1_centres(far, LABELS, centres).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_nc2_equals_the_authors_code(mode):
    value, norm, row = NC2[mode]
    mu = CENTRES.clone().requires_grad_()
    loss = nc2_max_min_angle(mu, mode=mode)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, mu)
    assert grad.norm().item() == pytest.approx(norm, rel=1e-10)
    assert grad[0].tolist() == pytest.approx(row, rel=1e-9)


def test_nc2_equals_the_printed_angles():
    angles = naive_angles(CENTRES.numpy())
    mean = -np.nanmin(angles, axis=1).mean()
    assert nc2_max_min_angle(CENTRES).item() == pytest.approx(mean, rel=1e-12)
    least = -np.nanmin(angles)
    assert nc2_max_min_angle(CENTRES, mode="v1").item() == pytest.approx(least, rel=1e-12)
    gram = np.cos(angles)
    np.fill_diagonal(gram, -1 / 3)
    frobenius = np.linalg.norm(gram)
    assert nc2_max_min_angle(CENTRES, mode="v2").item() == pytest.approx(frobenius, rel=1e-12)


def test_nc2_at_an_etf():
    # Golden check 12: −arccos(−1/(K−1)), for K = 10 96.37937°.
    etf = simplex_etf(10, 12, dtype=f64)
    noise = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=noise, dtype=f64)).Q
    shift = torch.randn(12, generator=noise, dtype=f64)
    for mode in ("v0", "v1"):
        assert nc2_max_min_angle(etf, mode=mode).item() == pytest.approx(-1.6821373, abs=5e-8)
        moved = nc2_max_min_angle(7.3 * etf @ Q + shift, mode=mode)
        assert moved.item() == pytest.approx(math.radians(-96.37937), abs=1e-7)
    for K in (3, 10):
        v2 = nc2_max_min_angle(simplex_etf(K, K, dtype=f64), mode="v2")
        assert v2.item() == pytest.approx(K / (K - 1), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_nc2_does_not_mind_order_rotation_scale_and_shift(mode):
    noise = torch.Generator().manual_seed(3)
    mu = torch.randn(9, 6, generator=noise, dtype=f64)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=noise, dtype=f64)).Q
    want = nc2_max_min_angle(mu, mode=mode)
    for same in (mu.flip(0), mu @ Q, 5 * mu, mu + 3):
        torch.testing.assert_close(nc2_max_min_angle(same, mode=mode), want, rtol=1e-9, atol=0)
    assert torch.autograd.gradcheck(
        lambda m: nc2_max_min_angle(m, mode=mode), mu.clone().requires_grad_()
    )


@pytest.mark.parametrize("mode", MODES)
def test_tiles_equal_the_whole(mode, monkeypatch):
    mu = torch.randn(23, 6, generator=torch.Generator().manual_seed(4), dtype=f64)
    want = nc2_max_min_angle(mu, mode=mode)
    monkeypatch.setattr(nc_regularizer, "TILE", 5)
    assert torch.equal(nc2_max_min_angle(mu, mode=mode), want)


def test_centres_in_one_direction_get_no_gradient():
    """Beyond a cosine of 0.99999 the clamp holds, as in the authors' code."""
    mu = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [-2.0, 0.0]], dtype=f64, requires_grad=True)
    loss = nc2_max_min_angle(mu, mode="v1")
    assert loss.item() == pytest.approx(-math.acos(0.99999))
    (grad,) = torch.autograd.grad(loss, mu)
    assert torch.equal(grad, torch.zeros_like(mu))
    two = nc2_max_min_angle(torch.eye(2, dtype=f64))
    assert two.item() == pytest.approx(-math.acos(-0.99999))


def test_descent_on_nc2_ends_at_an_etf():
    mu = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=f64).requires_grad_()
    optimizer = torch.optim.SGD([mu], lr=0.2)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 400)
        optimizer.zero_grad()
        nc2_max_min_angle(mu).backward()
        optimizer.step()
    smallest = math.degrees(np.nanmin(naive_angles(mu.detach().numpy())))
    assert smallest == pytest.approx(math.degrees(math.acos(-1 / 3)), abs=1.0)


# --- learned centres ----------------------------------------------------------------------------


def regularizer(**hyper):
    module = CentreRegularizer(4, 5, **hyper).double()
    with torch.no_grad():
        module.centres.copy_(CENTRES)
    return module


def test_the_module_is_the_weighted_sum():
    loss = regularizer(nc1=0.03, nc2=0.2, mean=0.5)(FEATURES, LABELS)
    want = 0.03 * NC1 + 0.2 * NC2["v0"][0] + 0.5 * ZERO_CENTER
    assert loss.item() == pytest.approx(want, rel=1e-12)
    defaults = regularizer(mode="v1")(FEATURES, LABELS)
    assert defaults.item() == pytest.approx(0.01 * NC1 + 0.1 * NC2["v1"][0], rel=1e-12)


def test_nc2_reaches_only_the_centres():
    """§0.7 of the sheet: the features feel NC1 alone; the centres feel both."""
    h = FEATURES.clone().requires_grad_()
    with_nc2, without = regularizer(mean=1.0), regularizer(nc2=0.0)
    both = torch.autograd.grad(with_nc2(h, LABELS), [h, with_nc2.centres])
    alone = torch.autograd.grad(without(h, LABELS), [h, without.centres])
    assert torch.equal(both[0], alone[0])
    assert (both[1] - alone[1]).norm() > 0.01
    only = regularizer(nc1=0.0)
    (grad,) = torch.autograd.grad(only(h, LABELS), h)
    assert torch.equal(grad, torch.zeros_like(h))
    assert regularizer(nc1=0.0)(FEATURES, LABELS).requires_grad


def test_param_group_takes_the_authors_step():
    """They: own SGD of rate 0.5, after grad *= 1/λ₁. We: one optimizer, whatever its defaults."""
    net = torch.nn.Linear(5, 5).double()
    theirs, ours = regularizer(), regularizer()
    (grad,) = torch.autograd.grad(theirs(FEATURES, LABELS), theirs.centres)
    want = theirs.centres - 0.5 * grad / 0.01
    optimizer = torch.optim.SGD(
        [{"params": net.parameters()}, ours.param_group()],
        lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True,
    )  # fmt: skip
    ours(FEATURES, LABELS).backward()
    optimizer.step()
    torch.testing.assert_close(ours.centres, want, rtol=1e-12, atol=1e-14)
    with pytest.raises(InputError, match="nc1 is 0"):
        regularizer(nc1=0.0).param_group()


def test_training_moves_features_to_centres_far_apart():
    """Free features: NC1 falls, the centres spread, and the features follow."""
    noise = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 4
    h = torch.randn(24, 6, generator=noise, dtype=f64).requires_grad_()
    module = CentreRegularizer(4, 6, generator=noise).double()
    optimizer = torch.optim.SGD([{"params": [h], "lr": 50.0}, module.param_group(lr=0.1)])
    for _ in range(400):
        optimizer.zero_grad()
        module(h, y).backward()
        optimizer.step()
    means = torch.stack([h[y == c].mean(0) for c in range(4)]).detach()
    assert nc1_centres(h, y, means) < 0.01
    assert np.nanmin(naive_angles(means.numpy())) > math.radians(100)  # ETF: 109.5°


def test_the_centres_are_a_parameter_of_the_module():
    a, b = (CentreRegularizer(3, 400, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(a.centres, b.centres)
    assert [n for n, _ in a.named_parameters()] == list(a.state_dict()) == ["centres"]
    assert abs(a.centres.mean()) < 0.1
    assert a.centres.std().item() == pytest.approx(1, abs=0.05)
    other = CentreRegularizer(3, 400)
    other.load_state_dict(a.state_dict())
    x, y = torch.randn(6, 400), torch.arange(6) % 3
    for same in (other, copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert torch.equal(same(x, y), a(x, y))
    assert "3 centres in R^400" in repr(a)


def test_precision_of_the_module():
    module = CentreRegularizer(4, 5, mean=0.2)
    x = FEATURES.float()
    want = module(x, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, LABELS), want)
        assert module(x.bfloat16(), LABELS).dtype == torch.float32
    assert module(x.double(), LABELS).dtype == f64


# --- live centres -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_live_centres_are_the_batch_means(mode):
    present = [0, 1, 3]
    means = torch.stack([FEATURES[c == LABELS].mean(0) for c in present])
    y = torch.tensor([present.index(c) for c in LABELS.tolist()])
    want = 0.3 * naive_nc1(FEATURES.numpy(), y, means.numpy())
    want += 0.7 * nc2_max_min_angle(means, mode=mode).item()
    want += 0.2 * means.mean(0).square().sum().item()
    got = live_centres(FEATURES, LABELS, nc1=0.3, nc2=0.7, mean=0.2, mode=mode)
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_live_nc2_reaches_the_features():
    h = FEATURES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(live_centres(h, LABELS, nc1=0.0, nc2=1.0), h)
    assert grad.norm() > 0.1
    for c in (0, 1, 3):  # it moves means: the same step for each sample of a class
        own = grad[c == LABELS]
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=1e-10, atol=1e-12)


def test_errors():
    for call, words in [
        (lambda: nc1_centres(FEATURES, LABELS, CENTRES[:, :3]), "D = 5 as the features"),
        (lambda: nc1_centres(FEATURES, LABELS, CENTRES[0]), r"\[K, D\]"),
        (lambda: nc1_centres(FEATURES, LABELS, CENTRES[:3]), "< num_classes = 3"),
        (lambda: nc2_max_min_angle(CENTRES[:1]), "two centres"),
        (lambda: nc2_max_min_angle(CENTRES.long()), "floating"),
        (lambda: nc2_max_min_angle(CENTRES, mode="v4"), "Unknown mode 'v4'.*v0, v1, v2"),
        (lambda: live_centres(FEATURES, LABELS, mode="v4"), "Unknown mode"),
        (lambda: CentreRegularizer(1, 5), "num_classes"),
        (lambda: CentreRegularizer(4, 0), "dim must be"),
        (lambda: CentreRegularizer(4, 5, nc2=-0.1), "nc2 must be"),
        (lambda: CentreRegularizer(4, 5, mode="v9"), "Unknown mode"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
