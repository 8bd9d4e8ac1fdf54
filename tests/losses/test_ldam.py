import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses import drw_weights, ldam

f64 = torch.float64
# CIFAR-10, exponential profile, imbalance 100.
CIFAR = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
MARGINS = [
    0.158114, 0.179697, 0.204238, 0.232091, 0.263829, 0.299768, 0.340675, 0.387221, 0.440497, 0.5,
]  # fmt: skip
WEIGHTS = [
    0.05061, 0.07690, 0.12113, 0.19504, 0.31881, 0.52459, 0.86835, 1.44263, 2.40922, 3.99272,
]  # fmt: skip


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(3)
    cosine = 2 * torch.rand(20, 10, generator=noise, dtype=f64) - 1
    return cosine, torch.arange(20) % 10


def direct(cosine, labels, margins, scale=30.0, weight=None):
    """Cao et al.: −log e^{s(z_y − Δ_y)} / (e^{s(z_y − Δ_y)} + Σ_{j≠y} e^{s z_j}), a sum per row."""
    losses = []
    for z, y in zip(cosine, labels.tolist()):
        top = torch.exp(scale * (z[y] - margins[y]))
        rest = sum(torch.exp(scale * z[j]) for j in range(len(z)) if j != y)
        losses.append(-torch.log(top / (top + rest)))
    losses = torch.stack(losses)
    if weight is None:
        return losses.mean()
    w = weight[labels]
    return (w * losses).sum() / w.sum()


def test_margins_of_cifar():
    # Golden check 4, read off the loss: at equal cosines CE(s·(−Δ e_y)) = log(1 + 9 e^{sΔ}).
    labels = torch.arange(10)
    for y, margin in enumerate(MARGINS):
        loss = ldam(torch.zeros(1, 10, dtype=f64), labels[y : y + 1], CIFAR)
        delta = torch.log(torch.expm1(loss) / 9) / 30
        assert delta.item() == pytest.approx(margin, abs=1e-6)


@pytest.mark.parametrize("scale", [30.0, 4.0])
@pytest.mark.parametrize("max_margin", [0.5, 0.2, 0.0])
def test_it_equals_the_printed_formula(batch, scale, max_margin):
    cosine, labels = batch
    margins = max_margin * (50 / CIFAR.double()) ** 0.25
    want = direct(cosine, labels, margins, scale)
    got = ldam(scale * cosine, labels, CIFAR, max_margin=max_margin, scale=scale)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if not max_margin:
        torch.testing.assert_close(got, F.cross_entropy(scale * cosine, labels))


def test_class_weights_are_a_weighted_mean(batch):
    cosine, labels = batch
    labels = labels.clamp(max=7)
    margins = 0.5 * (50 / CIFAR.double()) ** 0.25
    weight = drw_weights(CIFAR)
    want = direct(cosine, labels, margins, weight=weight.double())
    got = ldam(30 * cosine, labels, CIFAR, class_weight=weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert abs(got - ldam(30 * cosine, labels, CIFAR)) > 0.01


def test_a_class_without_training_samples_has_no_margin(batch):
    cosine, labels = batch
    counts = CIFAR.clone()
    counts[9] = 0  # now class 8 with 83 is the rarest
    margins = 0.5 * (83 / counts.double().clamp(min=1)) ** 0.25
    margins[9] = 0
    got = ldam(30 * cosine, labels, counts)
    torch.testing.assert_close(got, direct(cosine, labels, margins), rtol=1e-10, atol=1e-12)


def test_gradient_reaches_the_logits(batch):
    cosine, labels = batch
    z = (30 * cosine).requires_grad_()
    margins = 0.5 * (50 / CIFAR.double()) ** 0.25
    (got,) = torch.autograd.grad(ldam(z, labels, CIFAR), z)
    (want,) = torch.autograd.grad(direct(z / 30, labels, margins), z)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_drw_weights():
    # Golden check 5.
    weights = drw_weights(CIFAR)
    torch.testing.assert_close(weights, torch.tensor(WEIGHTS), rtol=0, atol=6e-6)
    assert weights.sum().item() == pytest.approx(10)
    assert torch.equal(drw_weights(CIFAR, beta=0), torch.ones(10))
    near = drw_weights(CIFAR, beta=1 - 1e-12).double() * CIFAR
    torch.testing.assert_close(near / near[0], torch.ones(10, dtype=f64), rtol=1e-3, atol=0)
    with pytest.raises(InputError, match=r"Classes \[1, 2\] have no training samples"):
        drw_weights(torch.tensor([3, 0, 0, 1]))


def test_errors(batch):
    cosine, labels = batch
    for bad, words in [
        ((cosine[0], labels[:1], CIFAR), "2-D tensor"),
        ((cosine, labels[:4], CIFAR), "20 rows"),
        ((cosine, labels + 1, CIFAR), "labels must be < num_classes = 10"),
        ((cosine, labels, CIFAR[:3]), "length K = 10"),
    ]:
        with pytest.raises(InputError, match=words):
            ldam(*bad)
