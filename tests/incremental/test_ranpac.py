"""RanPAC: scikit-learn's ridge on the same projection, in any order of sessions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from ncmethods._core import InputError
from ncmethods.incremental import RanPAC


def sample(n=240, k=6, d=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    means = torch.randn(k, d, generator=torch.Generator().manual_seed(9))
    return means[y] + 0.5 * torch.randn(n, d, generator=rng), y


def test_it_is_ridge_regression_on_the_projection():
    x, y = sample()
    model = RanPAC(8, 6, width=64, penalties=(10.0,)).update(x, y)
    assert model.penalty == 10.0
    z = np.maximum(x.numpy() @ model.projection.numpy(), 0)
    theirs = Ridge(alpha=10.0, fit_intercept=False).fit(z, np.eye(6)[y.numpy()])
    new, _ = sample(seed=1)
    want = np.maximum(new.numpy() @ model.projection.numpy(), 0) @ theirs.coef_.T
    np.testing.assert_allclose(model(new).detach().numpy(), want, rtol=1e-3, atol=1e-4)


def test_any_order_of_sessions_and_classes_that_have_not_come():
    x, y = sample()
    model, other = (RanPAC(8, 6, width=64, penalties=(1.0,)) for _ in range(2))
    for c in range(3):
        model.update(x[y // 2 == c], y[y // 2 == c])
    for c in (2, 0):
        other.update(x[y // 2 == c], y[y // 2 == c])
    assert not bool(torch.isin(other(x).argmax(1), torch.tensor([2, 3])).any())
    assert bool(other(x)[:, 2:4].isinf().all())
    other.update(x[y // 2 == 1], y[y // 2 == 1])
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    assert float((model(x).argmax(1) == y).double().mean()) > 0.9


def test_the_penalty_is_the_one_with_the_smallest_error_aside():
    x, y = sample(n=60)
    model = RanPAC(8, 6, width=64).update(x, y)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(60))
    held, rest = order[:12], order[12:]
    z, target = model.project(x).double().numpy(), np.eye(6)[y.numpy()]
    errors = {}
    for penalty in model.penalties:
        coef = np.linalg.solve(z[rest].T @ z[rest] + penalty * np.eye(64), z[rest].T @ target[rest])
        errors[penalty] = ((z[held] @ coef - target[held]) ** 2).mean()
    assert errors[model.penalty] == pytest.approx(min(errors.values()), rel=1e-6)


def test_errors():
    with pytest.raises(InputError, match="penalties must be positive"):
        RanPAC(8, 6, penalties=(0.0,))
    model = RanPAC(8, 6, width=16)
    with pytest.raises(InputError, match="no samples"):
        model.update(torch.zeros(0, 8), torch.zeros(0).long())
    with pytest.raises(InputError):
        model.update(torch.zeros(2, 7), torch.zeros(2).long())
    with pytest.raises(InputError):
        model(torch.zeros(2, 8))
