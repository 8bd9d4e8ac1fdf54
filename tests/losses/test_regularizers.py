"""What every regulariser promises; their values are tested in files of their own."""

from functools import partial

import pytest
import torch

from ncmethods._core import InputError, bind, check_labels
from ncmethods.losses.entropy import koleo
from ncmethods.losses.nc_regularizer import CentreRegularizer, live_centres, nc1_centres
from ncmethods.losses.norms import norm_variation, zero_mean
from ncmethods.losses.signed_nc1 import signed_nc1
from ncmethods.losses.spectral_decoupling import spectral_decoupling
from ncmethods.losses.svsl import svsl
from ncmethods.losses.tikhonov import feature_decay, tikhonov
from ncmethods.testing import check_loss

f64 = torch.float64


def layers(features, labels):
    """SVSL of two layers, one of them a map."""
    return svsl({"first": features.unflatten(1, (2, -1)), "last": features}, labels)


# Functions of features and labels alone: they know neither K nor an order of the classes.
FEATURES = {
    "feature_decay": feature_decay,
    "koleo": koleo,
    "live_centres": partial(live_centres, mean=0.3),
    "live_centres-v1": partial(live_centres, mode="v1"),
    "live_centres-v2": partial(live_centres, mode="v2"),
    "norm_variation": norm_variation,
    "norm_variation-means": partial(norm_variation, of="means"),
    "signed_nc1": signed_nc1,
    "signed_nc1-prevent": partial(signed_nc1, goal="prevent"),
    "signed_nc1-cdnv": partial(signed_nc1, measure="cdnv"),
    "svsl": layers,
    "zero_mean": zero_mean,
    "zero_mean-none": partial(zero_mean, balance="none"),
}
# Those that need more, and with which K and D they are built.
OTHERS = {
    "nc1_centres": nc1_centres,
    "spectral_decoupling": spectral_decoupling,
    "tikhonov": tikhonov,
}
SCALE_FREE = [name for name in FEATURES if name.startswith(("koleo", "norm", "signed"))]
SHIFT_FREE = [n for n in FEATURES if n.startswith(("signed", "live", "svsl"))]
SHIFT_FREE = ["norm_variation-means", *(n for n in SHIFT_FREE if n != "live_centres")]  # mean=0.3


def build(name):
    return FEATURES.get(name) or OTHERS[name]


def named(K=4, D=6):
    noise = torch.Generator().manual_seed(7)
    labels = torch.tensor([0, 3, 3, 0, 1, 3, 1, 0, 3, 0])  # class 2 is absent
    return {
        "features": torch.randn(10, D, generator=noise, dtype=f64) + 0.4,
        "logits": torch.randn(10, K, generator=noise, dtype=f64),
        "weight": torch.randn(K, D, generator=noise, dtype=f64),
        "centres": torch.randn(K, D, generator=noise, dtype=f64),
        "labels": labels,
    }


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("name", FEATURES)
def test_conformance(name, num_classes):
    """They cannot tell a label that is too large: the caller's check stands in for K."""

    def loss(features, labels, weight):
        return FEATURES[name](features, check_labels(labels, len(features), len(weight)))

    check_loss(loss, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_conformance_where_k_is_known(num_classes):
    noise = torch.Generator().manual_seed(2)
    centres = torch.randn(num_classes, 8, generator=noise, dtype=f64)
    check_loss(nc1_centres, num_classes=num_classes, centres=centres)
    check_loss(spectral_decoupling, num_classes=num_classes)

    def of_layers(features, labels):
        return svsl([features, features.exp()], labels, num_classes)

    check_loss(of_layers, num_classes=num_classes)

    def with_rows(features, labels, weight):
        return tikhonov(features, weight, check_labels(labels, len(features), len(weight)))

    check_loss(with_rows, num_classes=num_classes)


def test_module_conformance():
    regularizer = CentreRegularizer(5, 8, mean=0.1).double()
    with torch.no_grad():
        regularizer.centres.copy_(torch.eye(5, 8))

    def same_distance(features, labels):
        """The check renumbers the classes, not the centres: put features as far from each."""
        return regularizer(features.mean(1, keepdim=True).expand(-1, 8), labels)

    check_loss(same_distance)


@pytest.mark.parametrize("name", [*FEATURES, *OTHERS])
def test_gradcheck(name):
    given = bind(build(name), named())
    leaves = {k: v.requires_grad_() for k, v in given.items() if v.is_floating_point()}
    fixed = {k: v for k, v in given.items() if k not in leaves}

    def loss(*values):
        return build(name)(**dict(zip(leaves, values)), **fixed)

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize("name", FEATURES)
def test_rotation_scale_and_shift(name):
    given, loss = named(), FEATURES[name]
    h, y = given["features"], given["labels"]
    noise = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=noise, dtype=f64)).Q
    torch.testing.assert_close(loss(h @ Q, y), loss(h, y), rtol=1e-10, atol=1e-12)
    same_scale = torch.isclose(loss(3.7 * h, y), loss(h, y), rtol=1e-7)
    assert bool(same_scale) == (name in SCALE_FREE)
    same_shift = torch.isclose(loss(h + torch.randn(6, generator=noise), y), loss(h, y), rtol=1e-9)
    assert bool(same_shift) == (name in SHIFT_FREE)


@pytest.mark.parametrize("name", [*FEATURES, *OTHERS])
def test_samples_without_a_label_may_hold_anything(name):
    data, loss = named(), build(name)
    clean = {k: v.clone().requires_grad_() for k, v in data.items() if v.is_floating_point()}
    want = loss(**bind(loss, clean | {"labels": data["labels"]}))
    dirty = dict(data)
    for key in ("features", "logits"):
        bad = torch.full_like(data[key][:2], torch.nan)
        dirty[key] = torch.cat([bad, data[key]]).requires_grad_()
    dirty["labels"] = torch.cat([torch.tensor([-1, -7]), data["labels"]])
    got = loss(**bind(loss, dirty))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    key = "logits" if name == "spectral_decoupling" else "features"
    (grad,) = torch.autograd.grad(got, dirty[key])
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
    torch.testing.assert_close(grad[2:], torch.autograd.grad(want, clean[key])[0])


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("name", [*FEATURES, *OTHERS])
def test_nothing_to_measure_is_zero_with_a_graph(name, dtype):
    """No sample, none with a label: 0, and a zero gradient for the features."""
    loss = build(name)
    key = "logits" if name == "spectral_decoupling" else "features"
    for rows, label in ((0, 0), (3, -1)):
        data = {k: v.to(dtype) for k, v in named().items() if v.is_floating_point()}
        data |= {k: data[k][:rows].clone().requires_grad_() for k in ("features", "logits")}
        data["labels"] = torch.full((rows,), label)
        value = loss(**bind(loss, data))
        if name == "tikhonov":
            value = value - 5e-3 / 2 * data["weight"].square().sum()
        assert value.item() == 0
        assert value.dtype == dtype
        (grad,) = torch.autograd.grad(value, data[key])
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("name", FEATURES)
def test_degenerate_batches_are_finite(name, dtype):
    """Features of zero, all alike, one class, every class once."""
    noise = torch.Generator().manual_seed(5)
    x = torch.randn(6, 4, generator=noise, dtype=dtype)
    two = torch.tensor([0, 0, 0, 1, 1, 1])
    for features in (torch.zeros_like(x), torch.ones_like(x), x):
        for labels in (two, two * 0, torch.arange(6)):
            h = features.clone().requires_grad_()
            value = FEATURES[name](h, labels)
            (grad,) = torch.autograd.grad(value, h)
            assert value.isfinite()
            assert grad.isfinite().all()


def test_one_class_says_nothing_of_several():
    h, y = named()["features"], torch.zeros(10).long()
    for loss in (signed_nc1, partial(signed_nc1, measure="cdnv"), FEATURES["norm_variation-means"]):
        value = loss(h.requires_grad_(), y)
        assert value.item() == 0
        assert torch.equal(*torch.autograd.grad(value, h), torch.zeros_like(h))
    for mode in ("v0", "v1", "v2"):
        torch.testing.assert_close(
            live_centres(h, y, nc1=0.5, mode=mode), (h - h.mean(0)).square().sum(1).mean() / 2
        )


@pytest.mark.parametrize("name", [*FEATURES, *OTHERS])
def test_no_value_is_looked_at(name):
    """On the meta device there are none, so the code waits for no accelerator either."""
    data = {k: v.to("meta") for k, v in named().items()}
    assert build(name)(**bind(build(name), data)).is_meta


@pytest.mark.parametrize("name", ["koleo", "live_centres", "nc1_centres", "signed_nc1-cdnv"])
def test_compiled_equals_eager(name):
    loss, data = build(name), bind(build(name), named())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**data), loss(**data), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", FEATURES)
def test_errors(name):
    h, y = named()["features"], named()["labels"]
    for bad, words in [((h, y[:4]), "10 rows"), ((h, y.double()), "integers")]:
        with pytest.raises(InputError, match=words):
            FEATURES[name](*bad)
    if name != "svsl":
        with pytest.raises(InputError, match="2-D"):
            FEATURES[name](h[:, :, None], y)
