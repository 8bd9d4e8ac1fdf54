"""Monitor: what it gathers equals what a second pass would."""

import pytest
import torch
from distributed import run_ranks
from torch import nn

from ncmethods import heads, metrics
from ncmethods._core import InputError
from ncmethods.features import accumulate
from ncmethods.models import small_cnn


def model():
    torch.manual_seed(0)
    return heads.Classifier(small_cnn(1), heads.etf_head(64, 4)).eval()


def batches(N=40):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 12, 12, generator=g)
    return list(zip(x.split(8), (torch.arange(N) % 4).split(8)))


def test_equals_a_pass_of_its_own():
    net, logged = model(), []
    with metrics.Monitor(
        net, 4, layers=["backbone.blocks.1", "head"], log=logged.append
    ) as monitor:
        for x, y in batches():
            net(x)
            monitor.update(y)
        found = monitor.compute()
    assert logged == [found]
    expected = metrics.report(accumulate(net, batches(), 4), head=net.head, prefix="head/")
    assert {k: v for k, v in found.items() if k.startswith("head/")} == pytest.approx(expected)
    inner = nn.Sequential(net.backbone.blocks[0], net.backbone.blocks[1])
    pooled = torch.cat([inner(x).mean((2, 3)) for x, _ in batches()])
    stats = monitor.stats["backbone.blocks.1"]
    assert torch.allclose(stats.global_mean(), pooled.mean(0).double(), atol=1e-6)
    assert stats.N == 40
    assert stats.layer == "backbone.blocks.1"


def test_does_not_disturb_training_and_leaves_no_hooks():
    net = model().train()
    parameter = next(net.backbone.parameters())
    (x, y), *_ = batches()
    net(x).logits.sum().backward()
    expected = parameter.grad.clone()
    net.zero_grad()
    before = {n: len(m._forward_hooks) for n, m in net.named_modules()}
    with metrics.Monitor(net, 4, layers=["backbone", "head"]) as monitor:
        out = net(x)
        monitor.update(y)
        out.logits.sum().backward()
    assert torch.allclose(parameter.grad, expected)
    assert {n: len(m._forward_hooks) for n, m in net.named_modules()} == before
    monitor.reset()
    with pytest.raises(InputError, match="collected nothing"):
        monitor.compute()


def test_mistakes_have_messages():
    net = model()
    (x, y), *_ = batches()
    with pytest.raises(InputError, match=r"Did you mean 'backbone\.blocks\.1'"):
        metrics.Monitor(net, 4, layers=["backbone.block.1"])
    monitor = metrics.Monitor(net, 4, layers=["backbone"])
    with pytest.raises(InputError, match="context manager"):
        monitor.update(y)
    with monitor, pytest.raises(InputError, match="reached backbone"):
        monitor.update(y)
    with metrics.Monitor(net, 4) as monitor:
        net(x)
        monitor.update(y)
        with pytest.raises(InputError, match="saw no features"):
            monitor.update(y)


def watched(rank, world):
    net = model()
    with metrics.Monitor(net, 4) as monitor:
        for x, y in batches()[rank::world]:
            net(x)
            monitor.update(y)
        first = monitor.compute()
        net(x)
        monitor.update(y)  # a compute does not end the collection
    return first


def test_two_ranks_report_the_whole():
    net = model()
    with metrics.Monitor(net, 4) as monitor:
        for x, y in batches():
            net(x)
            monitor.update(y)
        alone = monitor.compute()
    for found in run_ranks(watched, 2):
        # N < D: VCI is 0 up to what float32 features leave of it.
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)
