"""NC-FSCIL's sessions: the authors' schedule and sizes, and a neck that finds its vertices."""

import pytest
import torch

from ncmethods import frames
from ncmethods._core import InputError
from ncmethods.heads._base import ResidualNeck
from ncmethods.incremental import Finetune, finetune_lr, finetune_neck, session_set
from ncmethods.losses import dot_regression


def test_schedule_is_that_of_the_published_log():
    """CIFAR-100's last session (golden 8), from the log of NC-FSCIL@37a5475."""
    config = Finetune()
    assert finetune_lr(config, 169) == pytest.approx(0.01319874961672813, rel=1e-12)
    assert finetune_lr(config, 195) == pytest.approx(0.0025, rel=1e-12)
    assert [finetune_lr(config, n) for n in range(196, 201)] == pytest.approx([0.00025] * 5)
    rates = [finetune_lr(config, n) for n in range(1, 201)]
    assert rates[0] == pytest.approx(0.25 * 0.28, rel=1e-3)  # a tenth, and a fifth of the rest
    assert max(rates) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    ("base", "way", "shot", "copies", "sizes"),
    [  # golden 7: CIFAR-100, miniImageNet, CUB-200
        (60, 5, 5, [1] * 8, [85, 90, 95, 100, 105, 110, 115, 120]),
        (60, 5, 5, range(1, 9), [85, 95, 115, 145, 185, 235, 295, 365]),
        (100, 10, 5, range(1, 11), [150, 170, 210, 270, 350, 450, 570, 710, 870, 1050]),
    ],
)
def test_sizes_of_the_published_sessions(base, way, shot, copies, sizes):
    found = []
    for session, again in enumerate(copies):
        seen = base + way * session
        y = torch.arange(seen, seen + way).repeat_interleave(shot)
        features, labels = session_set(
            (torch.zeros(len(y), 3), y), torch.zeros(seen, 3), base=base, copies=again
        )
        assert len(features) == len(labels)
        found.append(len(labels))
    assert found == sizes


def test_a_session_holds_shots_and_means():
    means = torch.arange(8.0)[:, None].repeat(1, 2)
    shots = torch.full((3, 2), 9.0), torch.tensor([8, 8, 9])
    x, y = session_set(shots, means, base=6, copies=2)
    assert y.tolist() == [8, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 6, 7]
    assert x[3:, 0].tolist() == y[3:].tolist()
    with pytest.raises(InputError, match="class 7, of which a mean is kept"):
        session_set((shots[0], shots[1] - 1), means, base=6)
    with pytest.raises(InputError, match="base lies in"):
        session_set(shots, means, base=9)


@pytest.mark.parametrize("mix", [0.0, 0.75])
def test_the_neck_learns_its_vertices_and_repeats(mix):
    rng = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(6, 16, generator=rng)
    y = torch.arange(6).repeat(10)
    x = means[y] + 0.1 * torch.randn(60, 16, generator=rng)
    rows = frames.simplex_etf(10, 32, generator=rng)[:6]
    config = Finetune(steps=60, lr=0.05, mix=mix, batch_size=24)

    def trained():
        torch.manual_seed(0)
        neck = ResidualNeck(16, 32)
        return neck, finetune_neck(neck, rows, x, y, config, seed=3)

    (neck, losses), (_, again) = trained(), trained()
    assert losses == again
    assert len(losses) == 60
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        z = torch.nn.functional.normalize(neck(x), dim=1)
    assert bool(((z @ rows.T).argmax(1) == y).all())
    assert not neck.training


def test_longer_targets_are_the_mean_over_classes():
    """Golden 4 and the authors' ``with_len``: r² ℓ averaged is the mean of the class means."""
    h, m = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    loss = dot_regression(h, torch.tensor([0]), m, balance="none")
    assert float(loss.detach()) == pytest.approx(0.08)
    (grad,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(grad, torch.tensor([[-0.0512, 0.0384]]), atol=1e-6, rtol=0)
    assert float(grad[0] @ h[0].detach()) == pytest.approx(0, abs=1e-6)

    y = torch.tensor([0, 0, 0, 1])
    r = (len(y) / 2 / torch.bincount(y)).sqrt()
    torch.testing.assert_close(r, torch.tensor([0.8164966, 1.4142136]))
    x, rows = torch.randn(4, 8), frames.simplex_etf(4, 8)
    unit = torch.nn.functional.normalize(x, dim=1)
    target = (r[:, None] * rows[:2])[y]
    theirs = 0.5 * ((unit * target).sum(1) - r[y]).square().mean()
    ours = dot_regression(x, y, rows[:2], balance="batch")
    torch.testing.assert_close(ours, theirs)


def test_pooling_before_or_after_the_mean():
    """Golden 13: a memory of pooled means is that of the maps, pooled."""
    maps = torch.randn(20, 8, 5, 5)
    torch.testing.assert_close(
        maps.mean(0).mean((1, 2)), maps.mean((2, 3)).mean(0), atol=1e-6, rtol=0
    )


def test_errors():
    neck, rows = ResidualNeck(4, 8), frames.simplex_etf(4, 8)
    x, y = torch.randn(6, 4), torch.arange(6) % 4
    with pytest.raises(InputError, match="exceed the cool-down"):
        finetune_neck(neck, rows, x, y, Finetune(steps=5))
    with pytest.raises(InputError, match="no features"):
        finetune_neck(neck, rows, x[:0], y[:0])
    with pytest.raises(InputError):
        finetune_neck(neck, rows[:2], x, y)
