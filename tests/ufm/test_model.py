"""The object itself: its objective, batching, what it refuses, and what a solution gives."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ncmethods import losses, metrics
from ncmethods._core import InputError
from ncmethods.ufm import UFM, label_sets, mixup_targets, predict, solve, solve_many
from ncmethods.ufm._batch import Batch

LOSSES = {
    "ce": lambda z, y: F.cross_entropy(z, y),
    "mse": lambda z, y: losses.mse(z, y),
    "label-smoothing": lambda z, y: losses.label_smoothing(z, y, epsilon=0.3),
    "focal": lambda z, y: losses.focal(z, y, gamma=1.5),
    "pick-all-label": lambda z, y: losses.pick_all_label(z, F.one_hot(y, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("depth", [1, 3])
def test_objective_is_that_of_the_library(name, depth):
    """Loss, layers and penalties against losses.* and losses.tikhonov."""
    counts = (4, 2, 1)
    model = UFM(
        3, 5, counts, name, ridge_w=0.1, ridge_h=0.2, ridge_b=0.3, bias="ridge", depth=depth,
        relu=depth > 1, targets=torch.eye(3), epsilon=0.3, gamma=1.5,
    )  # fmt: skip
    batch = Batch([model])
    x = batch.start([torch.Generator().manual_seed(0)], 1.0)
    x[:, -3:] = torch.tensor([0.3, -0.2, 0.5])
    parts = {k: v[0] for k, v in batch.parts(x).items()}
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    z, rest = parts["features"], 0.0
    for i in range(depth - 1):
        z = (z @ parts[f"layer{i}"].T).relu()
        rest += 0.05 * parts[f"layer{i}"].square().sum()
    W, b = parts[f"layer{depth - 1}"], parts["bias"]
    fit = LOSSES[name](z @ W.T + b, y)
    ridge = losses.tikhonov(parts["features"], W, bias=b, feature=0.2 * 7, row=0.1, offset=0.3)
    torch.testing.assert_close(batch.value(x)[0], fit + ridge + rest, rtol=1e-12, atol=0)


def test_objective_of_supcon():
    model = UFM(3, 5, (4, 2, 3), "supcon", constraint="sphere", temperature=0.2)
    batch = Batch([model, model])
    x = batch.start([torch.Generator().manual_seed(s) for s in (0, 1)], 2.0)
    y = model.index
    for row, value in zip(batch.parts(x)["features"], batch.value(x)):
        torch.testing.assert_close(value, losses.supcon(row, y, temperature=0.2))


def test_folding_changes_nothing():
    model = UFM(4, 6, (7, 5, 3, 2), "ce", ridge_w=2e-3, ridge_h=1e-3, bias="free")
    whole, folded = solve(model), solve(replace(model, folded=True))
    assert whole.features.shape == (17, 6)
    assert folded.features.shape == (4, 6)
    assert whole.loss == pytest.approx(folded.loss, abs=1e-12)
    torch.testing.assert_close(
        whole.means @ whole.means.T, folded.means @ folded.means.T, rtol=0, atol=1e-6
    )
    assert whole.stats.counts.tolist() == folded.stats.counts.tolist() == [7, 5, 3, 2]


def test_a_phase_diagram_is_one_call():
    """Batched over penalties, losses and counts = one by one."""
    models = [
        UFM(3, 4, n, loss, ridge_w=w, ridge_h=1e-3, folded=True)
        for loss in ("mse", "ce")
        for w in (1e-3, 1e-2)
        for n in (3, (6, 3, 1))
    ]
    models.append(UFM(3, 5, 2, "mse", ridge_w=1e-3))
    found = solve_many(models)
    assert [s.model for s in found] == models
    for s in found:
        assert s.converged
        assert s.loss == pytest.approx(solve(s.model).loss, abs=1e-11)
    assert solve_many([]) == []


def test_what_a_solution_gives():
    s = solve(UFM(4, 6, 5, "mse", ridge_w=2e-3, ridge_h=1e-3, bias="free", depth=2, width=7))
    assert s.features.shape == (20, 6)
    assert [tuple(W.shape) for W in s.layers] == [(7, 6), (4, 7)]
    assert [tuple(h.shape) for h in s.inputs] == [(20, 6), (20, 7)]
    assert s.features.dtype == torch.float64
    report = metrics.report(s.stats_of(1), head=s.head)
    assert report["nc1/trace_ratio"] < 1e-10
    assert report["nc3/self_duality"] < 1e-5
    torch.testing.assert_close(s.head(s.inputs[1]), s.logits)
    assert (s.logits.argmax(1) == s.labels).all()


def test_seeds_and_restarts():
    model = UFM(3, 4, 2, "ce")
    a, b, c = solve(model, seed=1), solve(model, seed=1), solve(model, seed=2)
    assert torch.equal(a.features, b.features)
    assert not torch.allclose(a.features, c.features)
    low = UFM(5, 2, 2, constraint="sphere", temperature=0.2)
    with pytest.warns(UserWarning, match="D ≥ 4 does not hold"):
        several = solve(low, restarts=6, tol=1e-8).loss
    with pytest.warns(UserWarning, match="D ≥ 4 does not hold"):
        assert several <= min(solve(low, seed=i, tol=1e-8).loss for i in range(6)) + 1e-9


def test_the_solver_says_when_it_has_not_converged():
    with pytest.warns(UserWarning, match="1 of 1 models did not converge in 3 steps"):
        s = solve(UFM(5, 6, 3), steps=3)
    assert not s.converged
    assert s.steps == 3
    assert s.grad_norm > 1e-9


def test_minimum_is_one():
    """The gradient in the variables of the model vanishes there, by finite differences."""
    s = solve(UFM(3, 4, 2, "label-smoothing", ridge_w=1e-2, ridge_h=1e-2), tol=1e-11)
    batch = Batch([s.model], scaled=False)
    x = torch.cat([s.features.flatten(), s.weight.flatten()])[None]
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        d = 1e-4 * torch.randn(x.shape, dtype=torch.float64, generator=g)
        assert abs(float(batch.value(x + d) - batch.value(x - d))) < 1e-11
        assert batch.value(x + d) > batch.value(x) - 1e-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be"),
        ({"dim": 0}, "dim must be"),
        ({"depth": 0}, "depth must be"),
        ({"loss": "hinge"}, "Unknown loss"),
        ({"constraint": "ball"}, "Unknown constraint"),
        ({"bias": "yes"}, "Unknown bias"),
        ({"counts": (1, 2)}, "counts must be"),
        ({"counts": (1, 2, 0)}, "≥ 1"),
        ({"counts": (1, 2, 1.5)}, "whole numbers"),
        ({"ridge_w": -1.0}, "ridge_w must be finite"),
        ({"ridge_w": (1.0, 1.0)}, "ridge_w must be a number or 1"),
        ({"ridge_h": (1.0, 1.0)}, "ridge_h must be a number or 3"),
        ({"bias": "ridge"}, "go together"),
        ({"ridge_b": 1.0}, "go together"),
        ({"epsilon": 2.0}, "epsilon"),
        ({"temperature": 0.0}, "temperature"),
        ({"targets": torch.eye(4)}, r"\[M, K\]"),
        ({"loss": "regression"}, "needs targets"),
        ({"loss": "pick-all-label"}, "label_sets"),
        ({"loss": "supcon"}, "acts on unit features alone"),
        ({"loss": "focal", "targets": mixup_targets(3)}, "one-hot"),
        ({"constraint": "sphere", "bias": "free"}, "depth=1 and bias='none'"),
        ({"weight": torch.eye(3)}, r"weight must be \[K, D\]"),
        ({"relu": True}, "between layers"),
        ({"anchor": (torch.eye(3), 1.0)}, "anchor must be"),
    ],
)
def test_bad_models(change, message):
    with pytest.raises(InputError, match=message):
        UFM(**{"num_classes": 3, "dim": 4, **change})


def test_bad_calls():
    model = UFM(3, 4)
    for wrong in ({"restarts": 0}, {"steps": 0}, {"tol": 0.0}, {"start": -1.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be > 0"):
            solve(model, **wrong)
    with pytest.raises(InputError, match="shares"):
        mixup_targets(3, (1.0,))
    with pytest.raises(InputError, match="sizes"):
        label_sets(3, (4,))
    with pytest.raises(InputError, match="100 000"):
        label_sets(60, (10,))
    mixed = solve(UFM(3, 4, targets=mixup_targets(3)))
    with pytest.raises(InputError, match="one-hot targets"):
        _ = mixed.stats
    contrast = solve(UFM(3, 4, 2, "supcon", constraint="sphere"))
    with pytest.raises(InputError, match="no classifier"):
        _ = contrast.weight


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.eye(3, 4)},
        {"anchor": (torch.zeros(3, 4), 1.0)},
        {"loss": "ce", "counts": (3, 2, 1)},
        {"loss": "ce", "depth": 2},
        {"loss": "focal", "constraint": "nonnegative"},
        {"loss": "ce", "constraint": "nonnegative", "bias": "free"},
        {"loss": "ce", "constraint": "nonnegative", "ridge_w": 0.0},
        {"loss": "ce", "ridge_h": 0.0},
        {"loss": "mse", "ridge_h": 0.0},
        {"loss": "mse", "ridge_h": (0.1, 0.2, 0.1)},
        {"loss": "mse", "relu": True, "depth": 3},
        {"loss": "mse", "constraint": "nonnegative", "bias": "free"},
        {"loss": "mse", "bias": "ridge", "ridge_b": 1.0, "depth": 2},
        {"loss": "mse", "bias": "ridge", "ridge_b": 1.0, "counts": (1, 2, 3)},
        {"loss": "pick-all-label", "targets": torch.eye(3)},
        {"loss": "focal", "constraint": "sphere"},
        {"loss": "label-smoothing", "constraint": "sphere", "temperature": 0.05},
        {"loss": "supcon", "constraint": "sphere", "counts": (3, 2, 1)},
    ],
)
def test_no_closed_form(change):
    model = UFM(**{"num_classes": 3, "dim": 4, **change})
    with pytest.raises(InputError, match="No closed form is known here"):
        predict(model)
