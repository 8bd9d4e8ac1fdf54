import numpy as np
import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses.norms import norm_variation, zero_mean
from ncmethods.metrics import equinorm

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
CENTRES = torch.cos(2 * torch.arange(1, 21, dtype=f64)).reshape(4, 5)
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 0])


def class_means():
    return np.stack([FEATURES.numpy()[LABELS.numpy() == c].mean(0) for c in (0, 1, 3)])


def test_zero_mean():
    by_class = np.sum(class_means().mean(0) ** 2)
    assert zero_mean(FEATURES, LABELS).item() == pytest.approx(by_class, rel=1e-12)
    by_sample = np.sum(FEATURES.numpy().mean(0) ** 2)
    assert zero_mean(FEATURES, LABELS, balance="none").item() == pytest.approx(by_sample, rel=1e-12)
    assert abs(by_class - by_sample) > 1e-3


def test_zero_mean_of_one_sample_per_class_is_the_authors_term_on_centres():
    # `zero_center` of https://github.com/Pepper-lll/NCfeature at
    # a11c2c51263ed5c06d152f8a439bf21c1913f668, run once on these centres.
    for balance in ("batch", "none"):
        value = zero_mean(CENTRES, torch.arange(4), balance=balance)
        assert value.item() == pytest.approx(0.14840366932106777, rel=1e-12)


def test_zero_mean_of_a_long_tail():
    """Class means that cancel: only the mean over classes sees it."""
    etf = simplex_etf(3, 4, dtype=f64)
    labels = torch.tensor([0] * 20 + [1] * 4 + [2])
    assert zero_mean(etf[labels], labels).item() < 1e-25
    # Σ π_c m_c with π = (20, 4, 1)/25: ‖·‖² = Σπ² − (1/2)Σ_{c≠c'} ππ' = 417/625 − 104/625.
    value = zero_mean(etf[labels], labels, balance="none")
    assert value.item() == pytest.approx(313 / 625, rel=1e-12)


def test_variation_of_lengths():
    lengths = np.linalg.norm(FEATURES.numpy(), axis=1)
    want = lengths.var() / lengths.mean() ** 2
    assert norm_variation(FEATURES, LABELS).item() == pytest.approx(want, rel=1e-12)
    unit = torch.nn.functional.normalize(FEATURES, dim=1)
    assert norm_variation(3 * unit, LABELS).item() < 1e-25
    two = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=f64)  # mean 2, deviation 1
    assert norm_variation(two, torch.tensor([0, 0])).item() == pytest.approx(0.25, rel=1e-12)


def test_variation_of_class_means():
    M = class_means()
    lengths = np.linalg.norm(M - M.mean(0), axis=1)
    want = lengths.var() / lengths.mean() ** 2
    got = norm_variation(FEATURES, LABELS, of="means").item()
    assert got == pytest.approx(want, rel=1e-12)
    assert got == pytest.approx(equinorm(torch.from_numpy(M - M.mean(0))).item() ** 2, rel=1e-10)
    etf = simplex_etf(5, 7, dtype=f64)
    y = torch.arange(15) % 5
    assert norm_variation(2 + 4 * etf[y], y, of="means").item() < 1e-25


@pytest.mark.parametrize("of", ["samples", "means"])
def test_descent_makes_lengths_equal(of):
    h = FEATURES.clone().requires_grad_()
    optimizer = torch.optim.SGD([h], lr=1.0)
    first = norm_variation(h, LABELS, of=of).item()
    for _ in range(200):
        optimizer.zero_grad()
        norm_variation(h, LABELS, of=of).backward()
        optimizer.step()
    assert norm_variation(h, LABELS, of=of) < 1e-3 * first


def test_errors():
    with pytest.raises(InputError, match=r"Unknown balance 'batsh'.*'batch'"):
        zero_mean(FEATURES, LABELS, balance="batsh")
    with pytest.raises(InputError, match=r"Unknown of 'mean'.*'means'"):
        norm_variation(FEATURES, LABELS, of="mean")
