import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncmethods import heads, metrics
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.stats import ClassStats, rare_classes

NC1 = {"nc1/pinv", "nc1/trace_ratio", "nc1/cdnv", "nc1/vci"}
SCATTER = {"nc1/pinv", "nc1/vci", "nc1/pinv/debiased"}


def nc2(rows):
    names = ("equinorm", "equiangular", "gram_etf")
    return {f"nc2/{name}_{rows}{suffix}" for name in names for suffix in ("", "_uncentred")}


NC3 = {"nc3/self_duality", "nc3/cosine"}
CLOSED = {f"nc1/{name}/debiased" for name in ("pinv", "trace_ratio", "cdnv")}
NC4 = {"nc4/agreement", "nc4/ncc_accuracy"}
RARE_MEANS = {"angle/rare_means_min", "angle/rare_means_min/debiased"}
RARE = RARE_MEANS | {"angle/rare_weight_min"}
COUNTS = torch.tensor([900, 300, 50, 10, 5])


@pytest.fixture
def samples():
    noise = torch.Generator().manual_seed(0)
    means = 2 * simplex_etf(5, 8, generator=noise)
    labels = torch.arange(60) % 5
    return means[labels] + torch.randn(60, 8, generator=noise), labels


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(8, 5)


def stats_of(features, labels, **options):
    return ClassStats(5, 8, **options).update(features, labels)


def test_the_keys_are_exactly_the_documented_ones(samples, head):
    stats, data = stats_of(*samples), FeatureSet(*samples, 5)
    means, weight = nc2("means"), nc2("weight")
    for keys, call in [
        (NC1 | CLOSED | means, (stats,)),
        (NC1 | CLOSED | means | {"nc4/ncc_accuracy"}, (data,)),
        (NC1 | CLOSED | means | weight | NC3, (stats, head)),
        (NC1 | CLOSED | means | weight | NC3 | NC4, (data, head)),
    ]:
        assert metrics.report(*call).keys() == keys
        rare = RARE_MEANS if len(call) == 1 else RARE
        assert metrics.report(*call, counts=COUNTS).keys() == keys | rare
    flat = stats_of(*samples, scatter=False)
    assert metrics.report(flat).keys() == ((NC1 | CLOSED) - SCATTER) | means
    unlabelled = FeatureSet(samples[0], None, 5)
    with pytest.raises(InputError, match="without labels"):
        metrics.report(unlabelled)
    text = metrics.report.__doc__
    for part in ("nc1/{pinv,trace_ratio,cdnv,vci}", "nc3/{self_duality,cosine}"):
        assert part in text


def test_the_values_are_those_of_the_functions(samples, head):
    data = FeatureSet(*samples, 5)
    stats, W = data.stats, head.weight.detach()
    out = metrics.report(data, head, counts=COUNTS)
    M, mu = stats.centered_means(), stats.means
    logits = head(samples[0]).detach()
    rare = [3, 4]
    assert rare_classes(COUNTS) == rare
    want = {
        "nc1/pinv": metrics.nc1_pinv(stats),
        "nc1/trace_ratio": metrics.trace_ratio(stats),
        "nc1/cdnv": metrics.cdnv(stats),
        "nc1/vci": metrics.vci(stats),
        "nc1/pinv/debiased": metrics.debiased_nc1(stats),
        "nc1/trace_ratio/debiased": metrics.debiased_trace_ratio(stats),
        "nc1/cdnv/debiased": metrics.debiased_cdnv(stats),
        "angle/rare_means_min/debiased": metrics.debiased_angle(stats, *rare),
        "nc3/self_duality": metrics.self_duality(W, M),
        "nc3/cosine": metrics.duality_cosine(W, M),
        "nc4/agreement": metrics.agreement(samples[0], logits, mu),
        "nc4/ncc_accuracy": (torch.cdist(samples[0].double(), mu).argmin(1) == samples[1])
        .double()
        .mean(),
        "angle/rare_means_min": metrics.min_angle(M[rare]),
        "angle/rare_weight_min": metrics.min_angle(W[rare]),
    }
    for name, measure in [
        ("equinorm", metrics.equinorm),
        ("equiangular", metrics.equiangular),
        ("gram_etf", metrics.gram_etf),
    ]:
        want[f"nc2/{name}_means"] = measure(M)
        want[f"nc2/{name}_means_uncentred"] = measure(mu)
        want[f"nc2/{name}_weight"] = measure(W.double() - W.double().mean(0))
        want[f"nc2/{name}_weight_uncentred"] = measure(W)
    assert out == pytest.approx({key: float(value) for key, value in want.items()})
    assert all(type(value) is float for value in out.values())


def test_weighting(samples):
    features, labels = samples
    keep = (labels > 1) | (torch.arange(60) < 20)
    stats = stats_of(features[keep], labels[keep])
    by_class, by_sample = metrics.report(stats), metrics.report(stats, weighting="sample")
    assert by_sample["nc1/pinv"] == pytest.approx(
        float(metrics.nc1_pinv(stats, weighting="sample")), rel=1e-12
    )
    assert by_sample["nc1/pinv"] != by_class["nc1/pinv"]
    assert by_sample["nc1/cdnv"] == pytest.approx(by_class["nc1/cdnv"], rel=1e-12)
    assert "class-weighted Σ_B" in by_class.provenance
    assert "sample-weighted Σ_B" in by_sample.provenance


def test_provenance(samples):
    report = metrics.report(stats_of(*samples, layer="layer4"))
    assert report.provenance == (
        "NC1 pinv, sample-weighted Σ_W, class-weighted Σ_B, rank 4, raw features of layer4, "
        "N = 60, 5 of 5 classes, n_c ≥ 12"
    )
    unit = stats_of(F.normalize(samples[0]), samples[1], normalized=True)
    assert "unit features" in metrics.report(unit).provenance
    weighted = stats_of(*samples, class_weight=torch.ones(5))
    assert "class_weight-weighted Σ_W" in metrics.report(weighted).provenance
    many = ClassStats(9, 8).update(*samples)
    assert many.num_classes == 9
    assert "rank 4" in metrics.report(many).provenance
    assert "5 of 9 classes" in metrics.report(many).provenance
    narrow = ClassStats(5, 2).update(samples[0][:, :2], samples[1])
    assert "rank 2" in metrics.report(narrow).provenance
    flat = metrics.report(stats_of(*samples, scatter=False))
    assert flat.provenance == "raw features, N = 60, 5 of 5 classes, n_c ≥ 12"
    for same in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert (same, same.provenance) == (report, report.provenance)


def test_unit(samples):
    raw = stats_of(*samples)
    unit = stats_of(F.normalize(samples[0]), samples[1], normalized=True)
    report = metrics.report(raw, unit=unit)
    plain = NC1 | nc2("means")
    closed = {key.replace("/debiased", "/unit/debiased") for key in CLOSED}
    assert report.keys() == plain | CLOSED | {f"{key}/unit" for key in plain} | closed
    alone = metrics.report(unit)
    assert {key: report[f"{key}/unit"] for key in plain} == {key: alone[key] for key in plain}
    assert report["nc1/pinv/unit/debiased"] == alone["nc1/pinv/debiased"]
    assert report["nc1/cdnv/unit"] != report["nc1/cdnv"]
    with pytest.raises(InputError, match="normalized=True"):
        metrics.report(raw, unit=raw)


def test_prefix(samples, head):
    plain = metrics.report(FeatureSet(*samples, 5), head, counts=COUNTS)
    named = metrics.report(FeatureSet(*samples, 5), head, counts=COUNTS, prefix="train/")
    assert named == {f"train/{key}": value for key, value in plain.items()}
    assert named.provenance == plain.provenance


def test_rare_classes(samples, head):
    stats = stats_of(*samples)
    M, W = stats.centered_means(), head.weight.detach()

    def angles(**options):
        out = metrics.report(stats, head, **options)
        return {key: value for key, value in out.items() if key in RARE}

    def of(classes):
        return {
            "angle/rare_means_min": float(metrics.min_angle(M[classes])),
            "angle/rare_weight_min": float(metrics.min_angle(W[classes])),
        }

    RARE = {"angle/rare_means_min", "angle/rare_weight_min"}

    assert angles(counts=COUNTS) == of([3, 4])  # fewer than 20
    assert angles(counts=COUNTS * 100) == of([3, 4])  # the rarest third, at least two
    assert angles(counts=COUNTS, rare=[0, 1, 2]) == of([0, 1, 2])
    assert angles(rare=range(5)) == of(list(range(5)))
    assert angles(counts=torch.full((5,), 9)) == {}
    assert angles(rare=[2]) == {}
    assert angles() == {}
    assert angles(counts=COUNTS) != angles(rare=[0, 1, 2])
    with pytest.raises(InputError, match="length K = 5"):
        angles(counts=COUNTS[:4])
    with pytest.raises(InputError, match=r"rare must hold classes 0…4, got \[1, 7\]"):
        angles(rare=[1, 7])
    with pytest.raises(InputError, match="rare must hold"):
        angles(rare=[-1, 0])


def test_rare_angle_of_means_needs_their_samples(samples, head):
    keep = samples[1] != 4
    stats = stats_of(samples[0][keep], samples[1][keep])
    out = metrics.report(stats, head, counts=COUNTS)
    assert out.keys() & RARE == {"angle/rare_weight_min"}


def test_fewer_than_two_classes(samples, head):
    features, _ = samples
    labels = torch.full((60,), 2)
    data = FeatureSet(features, labels, 5)
    assert metrics.report(data).keys() == set()
    assert metrics.report(data, head).keys() == nc2("weight")
    assert metrics.report(data.stats).provenance == "raw features, N = 60, 1 of 5 classes, n_c ≥ 60"


def test_report_before_update(head):
    for data in (ClassStats(5, 8), FeatureSet(torch.zeros(0, 8), torch.zeros(0).long(), 5)):
        with pytest.raises(InputError, match="empty: call update"):
            metrics.report(data, head)


def test_a_head_of_another_shape(samples):
    stats = stats_of(*samples)
    for head in (nn.Linear(7, 5), nn.Linear(8, 6), heads.etf_head(8, 5, dim=6), nn.ReLU()):
        with pytest.raises(InputError, match=r"head\.weight must be \[K, D\] = \[5, 8\].*neck"):
            metrics.report(stats, head)
    with pytest.raises(InputError, match="FeatureSet or a ClassStats, got Tensor"):
        metrics.report(samples[0])


def test_nc4_takes_logits_from_the_samples_or_the_head(samples, head):
    features, labels = samples
    with_bias = head(features).detach()
    own = metrics.report(FeatureSet(features, labels, 5, -with_bias), head)
    made = metrics.report(FeatureSet(features, labels, 5), head)
    given = metrics.report(FeatureSet(features, labels, 5, with_bias))
    assert made["nc4/agreement"] == given["nc4/agreement"] != own["nc4/agreement"]
    wide = metrics.report(FeatureSet(features, labels, 5), copy.deepcopy(head).double())
    assert wide["nc4/agreement"] == made["nc4/agreement"]
    with torch.no_grad():
        head.bias[0] = 100.0
    assert (
        metrics.report(FeatureSet(features, labels, 5), head)["nc4/agreement"]
        == (metrics.nearest_mean(features, stats_of(features, labels).means) == 0).double().mean()
    )


def test_a_collapsed_etf_head_agrees_with_itself():
    head = heads.etf_head(8, 5, neck=None)
    labels = torch.arange(20) % 5
    out = metrics.report(FeatureSet(3 * head.weight[labels], labels, 5), head)
    assert out["nc1/pinv"] < 1e-10
    assert out["nc2/gram_etf_means"] < 1e-6
    assert out["nc2/gram_etf_weight"] < 1e-6
    assert out["nc3/self_duality"] < 1e-6
    assert out["nc4/agreement"] == out["nc4/ncc_accuracy"] == 1
    with torch.no_grad():
        head.weight.neg_()
    assert (
        metrics.report(FeatureSet(-3 * head.weight[labels], labels, 5), head)["nc4/agreement"] == 0
    )


def test_ignored_labels_do_not_enter_the_accuracy(samples):
    features, labels = samples
    with_ignored = torch.cat([labels, torch.full((10,), -1)])
    more = torch.cat([features, torch.randn(10, 8)])
    a = metrics.report(FeatureSet(features, labels, 5))
    b = metrics.report(FeatureSet(more, with_ignored, 5))
    assert b == pytest.approx(a, rel=1e-9)
