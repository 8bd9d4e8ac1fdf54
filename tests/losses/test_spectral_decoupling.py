import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses.spectral_decoupling import spectral_decoupling

f64 = torch.float64
LOGITS = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 0])


def test_it_is_half_the_mean_squared_length():
    want = sum(float(z @ z) for z in LOGITS) / 16
    assert spectral_decoupling(LOGITS, LABELS).item() == pytest.approx(want, rel=1e-12)
    z = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(spectral_decoupling(z, LABELS), z)
    torch.testing.assert_close(grad, LOGITS / 8, rtol=1e-12, atol=0)


def test_weights_of_the_public_forms():
    """One logit, as in the authors' code: c·mean(z²) = 2c·ours. DomainBed: c·mean over N and K."""
    one = LOGITS[:, :1]
    ours = spectral_decoupling(one, LABELS * 0)
    torch.testing.assert_close(2 * 0.3 * ours, 0.3 * one.square().mean(), rtol=1e-12, atol=0)
    domainbed = 0.1 * (LOGITS**2).mean()
    ours = 2 * 0.1 / 5 * spectral_decoupling(LOGITS, LABELS)
    torch.testing.assert_close(ours, domainbed, rtol=1e-12, atol=0)


def test_cross_entropy_with_it_has_a_finite_minimum():
    """K = 2, z = (a, −a): d/da [log(1 + e^{−2a}) + λ a²] = 0 at λ a = σ(−2a)."""
    lam, y = 0.1, torch.tensor([0])
    z = torch.zeros(1, 2, dtype=f64, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=0.5)
    for _ in range(2000):
        optimizer.zero_grad()
        (F.cross_entropy(z, y) + lam * spectral_decoupling(z, y)).backward()
        optimizer.step()
    a = z[0, 0].item()
    assert a == pytest.approx(-z[0, 1].item(), rel=1e-9)
    assert lam * a == pytest.approx(torch.sigmoid(torch.tensor(-2 * a)).item(), rel=1e-6)


def test_errors():
    with pytest.raises(InputError, match="< num_classes = 3"):
        spectral_decoupling(LOGITS[:, :3], LABELS)
    with pytest.raises(InputError, match="2-D"):
        spectral_decoupling(LOGITS[0], LABELS)
