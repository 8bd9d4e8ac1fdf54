"""CollapseMetric keeps the promises of torchmetrics and reports what metrics.report does."""

import copy
import pickle

import pytest
import torch
from distributed import run_ranks
from torch import nn

from ncmethods import metrics
from ncmethods._core import InputError
from ncmethods.stats import ClassStats

torchmetrics = pytest.importorskip("torchmetrics")

from ncmethods.integrations.torchmetrics import CollapseMetric  # noqa: E402


def data(N=120, K=4, D=6):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    return 3 * torch.randn(K, D, generator=g)[y] + torch.randn(N, D, generator=g), y


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def values(found):
    return {key: float(value) for key, value in found.items()}


def expected(x, y, head=None, **options):
    stats = ClassStats(4, 6).update(x, y)
    return pytest.approx(dict(metrics.report(stats, head, **options)), rel=1e-5, abs=1e-7)


def test_computes_the_report():
    (x, y), head, counts = data(), linear(), torch.tensor([100, 10, 10, 100])
    metric = CollapseMetric(4, 6, head, counts=counts, weighting="sample")
    for a, b in zip(x.split(50), y.split(50)):
        metric.update(a, b)
    found = metric.compute()
    assert all(v.dtype == torch.float32 and v.shape == () for v in found.values())
    assert values(found) == expected(x, y, head, counts=counts, weighting="sample")
    assert {"nc3/cosine", "angle/rare_means_min"} <= set(found)
    plain = CollapseMetric(4, 6, scatter=False)
    plain.update(x, y)
    assert "nc1/pinv" not in plain.compute()


def test_compute_update_reset():
    x, y = data()
    metric = CollapseMetric(4, 6)
    metric.update(x[:40], y[:40])
    first = metric.compute()
    assert metric.compute() is first  # cached
    metric.update(x[40:], y[40:])
    assert values(metric.compute()) == expected(x, y)
    metric.reset()
    assert not metric.update_called
    metric.update(x[:40], y[:40])  # the next epoch
    assert values(metric.compute()) == values(first)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(InputError):
        metric.compute()


def test_forward_returns_the_batch_and_keeps_the_whole():
    x, y = data()
    metric = CollapseMetric(4, 6)
    for a, b in zip(x.split(40), y.split(40)):
        assert values(metric(a, b)) == expected(a, b)
    assert metric.update_count == 3
    assert values(metric.compute()) == expected(x, y)


def test_merges():
    x, y = data()
    a, b, c = (CollapseMetric(4, 6) for _ in range(3))
    a.update(x[:30], y[:30])
    b.update(x[30:70], y[30:70])
    c.update(x[70:], y[70:])
    a.compute()
    a.merge_state(b)
    a.merge_state(c.metric_state)
    assert values(a.compute()) == expected(x, y)
    assert b.stats.N == 40
    with pytest.raises(InputError, match="merge_state takes"):
        a.merge_state({"mean": x})


def test_copies_watch_the_same_head():
    (x, y), head = data(), linear()
    metric = CollapseMetric(4, 6, head)
    metric.update(x[:60], y[:60])
    twin = metric.clone()
    twin.update(x[60:], y[60:])
    with torch.no_grad():
        head.weight.mul_(torch.arange(1.0, 5.0)[:, None])
    assert values(twin.compute()) == expected(x, y, head)
    assert values(metric.compute()) == expected(x[:60], y[:60], head)
    assert not list(metric.parameters())
    # In the copy of a whole model the metric watches the copied head.
    whole = nn.ModuleDict({"head": head, "metric": CollapseMetric(4, 6, head)})
    again = copy.deepcopy(whole)
    with torch.no_grad():
        head.weight.zero_()
    again["metric"].update(x, y)
    assert values(again["metric"].compute()) == expected(x, y, again["head"])


def test_pickle_state_dict_and_casts():
    x, y = data()
    metric = CollapseMetric(4, 6, linear())
    metric.update(x[:60], y[:60])
    again = pickle.loads(pickle.dumps(metric))
    again.update(x[60:], y[60:])
    assert values(again.compute()) == expected(x, y, linear())

    assert metric.state_dict() == {}
    assert not list(metric.buffers())  # nothing that DDP would overwrite
    metric.persistent(True)
    box = nn.ModuleDict({"metric": metric})
    other = nn.ModuleDict({"metric": CollapseMetric(4, 6, linear())})
    other.load_state_dict(box.state_dict())
    other["metric"].update(x[60:], y[60:])
    assert values(other["metric"].compute()) == expected(x, y, linear())

    metric.to(torch.bfloat16).half()
    metric.to("cpu")
    assert metric.stats.means.dtype == torch.float64


def test_in_a_collection():
    x, y = data()
    both = torchmetrics.MetricCollection(
        {"collapse": CollapseMetric(4, 6), "small": CollapseMetric(4, 6, scatter=False)},
        prefix="val_",
    )
    for a, b in zip(x.split(40), y.split(40)):
        both.update(a, b)
    found = values(both.compute())
    for name in ("collapse", "small"):
        assert sum(key.startswith(f"val_{name}_") for key in found) > 5
    collapse = {k.removeprefix("val_collapse_"): v for k, v in found.items() if "small" not in k}
    assert collapse == expected(x, y)
    both.reset()
    assert both["collapse"].stats.N == 0


def watched(rank, world):
    (x, y), head = data(), linear()
    x, y = x[rank::world], y[rank::world]
    metric = CollapseMetric(4, 6, head)
    out = []
    for _ in range(2):  # two epochs
        metric.update(x[:20], y[:20])
        first = metric.compute()
        out.append((values(first), metric.compute() is first))
        assert metric.stats.N == 20  # unsynced again
        metric.update(x[20:], y[20:])
        out.append((values(metric.compute()), len(x) == metric.stats.N))
        metric.sync()
        assert metric.stats.N == 120
        metric.unsync()
        metric.reset()
    alone = CollapseMetric(4, 6, sync_on_compute=False)
    alone.update(x, y)
    assert values(alone.compute()) == expected(x, y)
    step = CollapseMetric(4, 6, dist_sync_on_step=True)
    out.append((values(step(x, y)), True))
    assert step.stats.N == 60
    return out


def test_two_ranks_report_the_whole():
    (x, y), head = data(), linear()
    parts = [torch.cat([x[0::2][:20], x[1::2][:20]]), torch.cat([y[0::2][:20], y[1::2][:20]])]
    wholes = [metrics.report(ClassStats(4, 6).update(*parts), head)]
    wholes.append(metrics.report(ClassStats(4, 6).update(x, y), head))
    for found in run_ranks(watched, 2):
        assert all(kept for _, kept in found)
        for (got, _), whole in zip(found[:4], wholes * 2):
            assert got == pytest.approx(whole, rel=2e-6, abs=1e-7)
        plain = metrics.report(ClassStats(4, 6).update(x, y))
        assert found[4][0] == pytest.approx(plain, rel=2e-6, abs=1e-7)
