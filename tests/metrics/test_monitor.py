"""Monitor: what it gathers equals what a second pass would."""

import math

import numpy as np
import pytest
import torch
from distributed import run_ranks
from scipy.stats import kstest
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ncmethods import heads, metrics
from ncmethods._core import InputError
from ncmethods.features import accumulate, extract
from ncmethods.metrics.layerwise import effective_depth, progressive_collapse, separation_law
from ncmethods.models import small_cnn

BLOCKS = ["backbone.blocks.0", "backbone.blocks.1", "head"]


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
    assert {k: v for k, v in found.items() if k.startswith("head/")} == pytest.approx(
        expected, nan_ok=True
    )
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


class Lines(nn.Module):
    """Three layers and a head with a bias, whose features are known."""

    def __init__(self, offset=50.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.fc = nn.Linear(5, 3)
        nn.init.constant_(self.c.bias, offset)
        with torch.no_grad():
            self.fc.bias -= self.fc.weight.sum(1) * offset

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x).relu()).relu()))

    def layers(self, x):
        """Outputs of a, b, c by hand, in numpy."""
        out, x = [], x.numpy()
        for layer in (self.a, self.b, self.c):
            x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            out.append(x)
            x = np.maximum(x, 0)
        return out


def rows(N=90, K=3):
    g = torch.Generator().manual_seed(2)
    y = torch.arange(N) % K
    return torch.randn(K, 6, generator=g)[y] + 0.8 * torch.randn(N, 6, generator=g), y


def gather(net, x, y, *, batch=8, **options):
    with metrics.Monitor(net, 3, **options) as monitor:
        for a, b in zip(x.split(batch), y.split(batch)):
            net(a)
            monitor.update(b)
        return monitor, monitor.compute()


def test_decisions_match_scikit_learn():
    net, (x, y) = Lines(), rows()
    labels = torch.where(torch.arange(90) < 6, -100, y)  # ignored rows do not count
    outputs = net.layers(x)
    with torch.no_grad():  # a head that agrees in part, and needs its bias
        z = torch.tensor(outputs[-1])
        net.fc.weight.copy_(torch.stack([z[y == c].mean(0) for c in (1, 0, 2)]))
        net.fc.weight -= net.fc.weight.mean(0)
        net.fc.bias.copy_(-50 * net.fc.weight.sum(1))
        net.fc.weight[:2] += 0.8 * net.fc.weight[:2].flip(0)
    _, found = gather(net, x, labels, layers=["a", "b", "c", "head"], samples=90)
    known = labels.numpy() >= 0
    for name, z in zip(["a", "b", "c", "head"], [*outputs, outputs[-1]]):
        z = z.astype(np.float64)[known]
        near = NearestCentroid().fit(z, y[known].numpy()).predict(z)
        accuracy = (near == y[known].numpy()).mean()
        assert 0.5 < accuracy < 1
        assert found[f"{name}/nc4/ncc_accuracy"] == pytest.approx(accuracy)
    chosen = net(x).argmax(1).numpy()[known]  # with the bias
    agreement = (near == chosen).mean()
    assert found["head/nc4/agreement"] == pytest.approx(agreement)
    assert "c/nc4/agreement" not in found
    without = outputs[-1][known] @ net.fc.weight.detach().numpy().T
    assert len({agreement, accuracy, (near == without.argmax(1)).mean(), 0, 1}) == 5


def test_few_samples_are_judged_by_the_means_of_all():
    net, (x, y) = Lines(), rows(600)
    monitor, found = gather(net, x, y, samples=40, batch=7)
    kept, labels = monitor._rows["head"].numpy(), monitor._rows[""].numpy()
    z = net.layers(x)[-1]
    where = [int(np.abs(z - row).sum(1).argmin()) for row in kept]
    assert len(set(where)) == 40
    np.testing.assert_allclose(z[where], kept, rtol=1e-5)
    assert (y[where].numpy() == labels).all()
    means = np.stack([z[y.numpy() == c].mean(0) for c in range(3)])
    near = ((kept[:, None] - means) ** 2).sum(-1).argmin(1)
    assert found["head/nc4/ncc_accuracy"] == pytest.approx((near == labels).mean())
    again, _ = gather(net, x, y, samples=40, batch=7)
    assert torch.equal(again._rows["head"], monitor._rows["head"])
    monitor.reset()
    with monitor:
        net(x[:6])
        monitor.update(y[:6])
        found = monitor.compute()
    z, y = z[:6], y[:6].numpy()
    means = np.stack([z[y == c].mean(0) for c in range(3)])
    near = ((z[:, None] - means) ** 2).sum(-1).argmin(1)
    assert found["head/nc4/ncc_accuracy"] == pytest.approx((near == y).mean())


def test_the_draw_is_uniform():
    """Also where the classes come in turn, which an even stride would not survive."""
    net = nn.Sequential(nn.Identity(), nn.Linear(1, 2))
    x = torch.arange(20000.0)[:, None]
    with metrics.Monitor(net, 2, layers=["0"], samples=2000, scatter=False) as monitor:
        for a in x.split(150):
            net(a)
            monitor.update(a[:, 0].long() % 2)
    kept = monitor._rows["0"][:, 0]
    assert len(kept.unique()) == 2000
    assert torch.equal(monitor._rows[""], kept.long() % 2)
    assert kstest(kept.numpy() / 20000, "uniform").pvalue > 0.01
    assert abs(int(monitor._rows[""].sum()) - 1000) < 4 * math.sqrt(500)


def test_depth_is_read_from_three_layers():
    net, (x, y) = Lines(), rows()
    layers = ["a", "b", "c"]
    _, found = gather(net, x, y, layers=layers, samples=90)
    nc1 = [found[f"{name}/nc1/pinv"] for name in layers]
    errors = [1 - found[f"{name}/nc4/ncc_accuracy"] for name in layers]
    expected = {f"depth/{key}": value for key, value in separation_law(nc1).items()}
    expected["depth/progressive"] = progressive_collapse(nc1)
    expected["depth/effective"] = effective_depth(errors)
    assert {k: v for k, v in found.items() if k.startswith("depth/")} == pytest.approx(expected)
    assert "depth/effective" not in gather(net, x, y, layers=layers)[1]
    only = gather(net, x, y, layers=layers, samples=9, scatter=False)[1]
    assert {k for k in only if k.startswith("depth/")} == {"depth/effective"}
    assert not any(k.startswith("depth/") for k in gather(net, x, y, layers=layers[:2])[1])
    constant = gather(net, x * 0, y, layers=layers)[1]  # NC1 is NaN: no line
    assert not any(k.startswith("depth/") for k in constant)


def test_agrees_with_the_report_on_samples():
    net = model()
    with metrics.Monitor(net, 4, samples=40) as monitor:
        for x, y in batches():
            net(x)
            monitor.update(y)
        found = monitor.compute()
    expected = metrics.report(extract(net, batches(), 4), head=net.head, prefix="head/")
    for key in ("head/nc4/agreement", "head/nc4/ncc_accuracy"):
        assert found[key] == pytest.approx(expected[key])


def test_reading_does_not_pose_as_a_forward_pass():
    net, (x, y) = Lines(offset=0), rows(16)
    with metrics.Monitor(net, 3, layers=["fc", "head"], samples=16) as monitor:
        net(x[:8])
        monitor.update(y[:8])
        monitor.compute()  # runs the head, which hooks watch
        with pytest.raises(InputError, match="saw no features"):
            monitor.update(y[:8])
        net(x[8:])
        monitor.compute()
        monitor.update(y[8:])
        found = monitor.compute()
    expected = gather(net, x, y, layers=["fc", "head"], samples=16)[1]
    plain = {key: value for key, value in expected.items() if "debiased" not in key}
    assert {key: found[key] for key in plain} == pytest.approx(plain, rel=1e-4)


def test_reads_a_layer_as_it_leaves_it():
    """An in-place ReLU behind it, two calls in one pass, several passes before an update."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
            self.conv, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = self.act(self.flat(self.flat(x)))
            return self.fc(self.act(self.conv(x.view(-1, 1, 2, 3))).mean((2, 3)))

    torch.manual_seed(0)
    net, (x, y) = Net(), rows(12)
    with metrics.Monitor(net, 3, layers=["flat", "conv"]) as monitor:
        net(2 * x)
        net(x)
        monitor.update(y)
    with torch.no_grad():
        flat = net.flat(net.flat(x))
        conv = net.conv(flat.relu().view(-1, 1, 2, 3))
    for name, z in (("flat", flat), ("conv", conv.mean((2, 3)))):
        assert z.min() < 0
        torch.testing.assert_close(
            monitor.stats[name].global_mean("sample"), z.double().mean(0), atol=1e-6, rtol=1e-5
        )


def test_pooling_is_the_callers_choice():
    net, (x, y) = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(12, 3)), rows(12)
    with metrics.Monitor(
        net, 3, layers=["0", "head"], pool=lambda z: z.flatten(1), samples=12
    ) as monitor:
        z = net[0](x.view(-1, 1, 2, 3))
        net(x.view(-1, 1, 2, 3))
        monitor.update(y)
    assert monitor.stats["0"].dim == 12
    torch.testing.assert_close(monitor._rows["0"], z.detach().flatten(1))
    tokens = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 3))
    for pool, expected in ((None, lambda z: z.mean(1)), (lambda z: z[:, 0], lambda z: z[:, 0])):
        with metrics.Monitor(tokens, 3, layers=["0"], pool=pool, samples=3) as monitor:
            tokens(x.view(3, 4, 6))
            monitor.update(y[:3])
        z = tokens[0](x.view(3, 4, 6)).detach()
        torch.testing.assert_close(monitor._rows["0"], expected(z))


@pytest.mark.parametrize("mode", ["autocast", "inference", "double", "compiled"])
def test_precisions_and_modes(mode):
    net, (x, y) = Lines(), rows()
    _, expected = gather(net, x, y, layers=["a", "head"], samples=30)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            monitor, found = gather(net, x, y, layers=["a", "head"], samples=30)
        assert monitor.stats["a"].means.dtype == torch.float64
        assert found["a/nc1/pinv"] == pytest.approx(expected["a/nc1/pinv"], rel=0.05)
        return
    if mode == "inference":
        with torch.inference_mode():
            monitor, found = gather(net, x, y, layers=["a", "head"], samples=30)
        with monitor:  # and then an ordinary pass
            net(x)
            monitor.update(y)
        assert monitor.stats["a"].N == 180
    elif mode == "double":
        monitor, found = gather(net.double(), x.double(), y, layers=["a", "head"], samples=30)
        assert monitor._rows["a"].dtype == torch.float64
    else:
        compiled = torch.compile(net, backend="eager")
        compiled(x)
        _, found = gather(compiled, x, y, layers=["a", "head"], samples=30)
    # The head's features lie at 50, which costs float32 some digits.
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6, nan_ok=True)


def test_nothing_waits_for_the_device_and_nothing_keeps_the_graph():
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket is not torch.ops.aten._local_scalar_dense
            return func(*args, **(kwargs or {}))

    net, (x, y) = Lines(), rows(40)
    with metrics.Monitor(net, 3, layers=["a", "b", "head"], samples=6) as monitor:
        for _ in range(3):
            net(x)
            assert not any(z.requires_grad for z in monitor._watch._outputs.values())
            with Reads():
                monitor.update(y)
        assert monitor._watch._seen._features is None
        assert not monitor._watch._outputs
        with pytest.raises(AssertionError), Reads():
            monitor.stats["a"].counts.sum().item()  # the check can fail
    assert all(z.shape[0] == 6 and not z.requires_grad for z in monitor._rows.values())


def test_an_exception_leaves_no_hooks():
    net, (x, _) = Lines(), rows(8)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

    with pytest.raises(RuntimeError, match="shapes"), metrics.Monitor(net, 3, layers=["a", "head"]):
        net(x[:, : hooks()])  # two hooks: two columns for a layer of six
    assert hooks() == 0
    monitor = metrics.Monitor(net, 3, layers=["a", "b"])
    del net.b
    with pytest.raises(KeyError), monitor:
        pass
    assert hooks() == 0


def test_wrong_options_have_messages():
    with pytest.raises(InputError, match="once"):
        metrics.Monitor(Lines(), 3, layers=["a", "a"])
    for samples in (-1, 0.5, True):
        with pytest.raises(InputError, match="rows to keep"):
            metrics.Monitor(Lines(), 3, samples=samples)


def watched(rank, world):
    net = nn.parallel.DistributedDataParallel(model(), broadcast_buffers=False)
    with metrics.Monitor(net, 4, layers=BLOCKS, samples=24) as monitor:
        for x, y in batches()[rank::world]:
            net(x)
            monitor.update(y)
        first = monitor.compute()
        net(x)
        monitor.update(y)  # a compute does not end the collection
        counts = monitor.compute()
        assert int(monitor.stats["head"].counts.sum()) == [32, 24][rank]
        assert counts != first
    if rank == 1:
        monitor.reset()
    with pytest.raises(InputError, match="collected nothing"):  # on every rank, none waits
        monitor.compute()
    return first


def test_two_ranks_report_the_whole():
    net = model()
    with metrics.Monitor(net, 4, layers=BLOCKS, samples=40) as monitor:
        for x, y in batches():
            net(x)
            monitor.update(y)
        alone = monitor.compute()
    assert {"depth/effective", "depth/slope", "head/nc4/agreement"} <= set(alone)
    for found in run_ranks(watched, 2):
        # N < D: VCI is 0 up to what float32 features leave of it.
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-5, nan_ok=True)
