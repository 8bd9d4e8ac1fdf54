"""The snippets of the design, as they stand."""

import pytest
import torch
from torch.nn import functional as F

from ncmethods import heads, losses, metrics, ood, transfer
from ncmethods.features import FeatureSet, accumulate, capture, extract
from ncmethods.stats import ClassStats

torchvision = pytest.importorskip("torchvision")


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32)


@pytest.fixture
def y():
    return torch.tensor([0, 3, 9, 3])


def test_1a_swap_a_head_and_keep_your_loop(x, y):
    net = torchvision.models.resnet18(num_classes=10)
    net = heads.swap_head(net, heads.etf_head)
    F.cross_entropy(net(x), y).backward()
    with capture(net) as seen:
        net(x)
    assert seen.features.shape == (4, 512)
    assert net.conv1.weight.grad.abs().sum() > 0
    assert isinstance(net.fc, heads.FixedHead)
    torch.testing.assert_close(net.fc.logits(seen.features), net(x), rtol=1e-4, atol=1e-4)

    net = torchvision.models.resnet18(num_classes=10)
    assert heads.swap_head(net, heads.etf_head(512, 10)) is net
    assert net(x).shape == (4, 10)


@pytest.mark.filterwarnings("ignore:Classes .* single sample")
def test_1b_and_2_features_and_logits_then_measure(x, y):
    model = heads.Classifier.from_model(torchvision.models.resnet18(), head=heads.etf_head(512, 10))
    out = model(x)
    loss = losses.dot_regression(out.features, y, model.head.weight, balance="batch")
    loss.backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0

    stats = ClassStats(num_classes=10, dim=512)
    stats.update(out.features, y)
    stats.all_reduce()
    report = metrics.report(stats, head=model.head)
    assert isinstance(report, dict)
    assert all(isinstance(value, float) for value in report.values())
    assert "NC1 pinv" in report.provenance
    assert report["nc1/trace_ratio"] > 0

    stats_a, stats_b = (
        ClassStats(num_classes=10, dim=512).update(out.features[rows], y[rows])
        for rows in (slice(2), slice(2, 4))
    )
    total = stats_a + stats_b
    torch.testing.assert_close(total.means, stats.means, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Classes .* single sample")
def test_3_score_out_of_distribution_inputs(x, y):
    model = heads.Classifier.from_model(torchvision.models.resnet18(), head=heads.etf_head(512, 10))
    train_loader = [(x, y), (torch.randn(4, 3, 32, 32), y)]
    id_features, ood_features, held_out_features = (torch.randn(n, 512) for n in (50, 30, 40))

    train = extract(model, train_loader, num_classes=10)
    assert isinstance(train, FeatureSet)
    moments = accumulate(model, train_loader, num_classes=10)  # bounded memory
    torch.testing.assert_close(train.stats.within, moments.within, rtol=0, atol=0)

    scorer = ood.NECO.fit(train, head=model.head)
    s_id, s_ood = scorer(id_features), scorer(ood_features)
    area, rate = ood.auroc(s_id, s_ood), ood.fpr95(s_id, s_ood, positive="ood")
    assert 0 <= area <= 1
    assert 0 <= rate <= 1
    flag = ood.Threshold.fit(scorer(held_out_features), alpha=0.05)
    p, flagged = flag.p_value(s_ood), flag(s_ood)
    assert p.shape == flagged.shape == (30,)
    assert flagged.dtype == torch.bool
    torch.testing.assert_close(flagged, p <= 0.05)

    again = ood.NECO.fit(moments, head=model.head)  # the type of `train` says that moments will do
    torch.testing.assert_close(again(ood_features), s_ood)


def test_4_rank_pretrained_models_for_a_target():
    torch.manual_seed(0)
    y = torch.arange(80) % 4
    fs_a, fs_b = (FeatureSet(q * torch.randn(4, 20)[y] + torch.randn(80, 20), y, 4) for q in (2, 0))
    train = fs_a
    assert transfer.h_score(train.stats) > transfer.h_score(fs_b.stats)
    assert transfer.logme(train.stats) > transfer.logme(fs_b.stats)
    found = transfer.rank({"resnet18": fs_a, "vit_b_16": fs_b}, scores=["ncti", "logme", "nc1"])
    assert {found.best(score) for score in ("ncti", "logme", "nc1")} == {"resnet18"}
