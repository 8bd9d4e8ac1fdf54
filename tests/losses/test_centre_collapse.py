import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.losses.centre_collapse import centre_collapse
from ncmethods.testing import check_loss

f64 = torch.float64
COUNTS = torch.tensor([100, 40, 20, 5, 1])


def waves(*shape, phase=0.0):
    i = torch.arange(math.prod(shape), dtype=f64)
    return (torch.sin(1.7 * i + phase) + torch.cos(0.31 * i * i + phase)).reshape(shape)


@pytest.fixture
def batch():
    """Two maps of 4 × 7 pixels; class 4 is absent, some pixels are ignored."""
    labels = (torch.arange(56).square() % 7).reshape(2, 4, 7)
    labels = torch.where(labels == 4, -1, labels)
    labels[0, 0, :3] = 3
    return waves(2, 6, 4, 7), labels, simplex_etf(5, 6, rotation="canonical", dtype=f64)


# dvlab-research/Parametric-Contrastive-Learning fe56535, GPaCo/Seg/mmseg/models/decode_heads/
# uper_head_ceco.py: its centre and loss lines run once in float64, projections left out (255 is the
# ignored label there). Loss, norm of the gradient. https://github.com/dvlab-research/
# Parametric-Contrastive-Learning/blob/fe56535ecd716e56a72e75c4e818f2059e557584/GPaCo/Seg/mmseg/
# models/decode_heads/uper_head_ceco.py
@pytest.mark.parametrize(
    ("scale", "smoothing", "value", "norm"),
    [
        (5.0, 0.0, 3.4965685755937916, 1.6238687417307434),
        (1.0, 0.5, 2.4405143196113217, 0.1646094353498121),
    ],
)
def test_values_of_the_authors_code(batch, scale, smoothing, value, norm):
    maps, labels, frame = batch
    x = maps.clone().requires_grad_()
    loss = centre_collapse(x, labels, frame, COUNTS, scale=scale, smoothing=smoothing)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-11)  # they add 1e-12 to a divisor
    assert x.grad.norm().item() == pytest.approx(norm, rel=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy_of_the_centres(batch, smoothing):
    maps, labels, frame = batch
    pixels = maps.movedim(1, -1)
    centres = torch.stack([pixels[labels == c].mean(0) for c in range(4)])
    logits = 5 * F.normalize(centres, dim=1) @ frame.T + (COUNTS.double() / 166).log()
    want = F.cross_entropy(logits, torch.arange(4), label_smoothing=smoothing * 5 / 4)
    got = centre_collapse(maps, labels, frame, COUNTS, smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)  # a floor of 1e-12 under π


def test_value_at_the_frame():
    # Equal counts: centre on its vertex, log(1 + (K−1) e^{−sK/(K−1)}).
    K, s = 5, 5.0
    frame = simplex_etf(K, 8, dtype=f64)
    got = centre_collapse(3 * frame, torch.arange(K), frame, torch.ones(K), scale=s)
    assert got.item() == pytest.approx(math.log(1 + (K - 1) * math.exp(-s * K / (K - 1))))


def test_a_class_counts_once(batch):
    """Neither the number of pixels, nor which map they are in, nor their spread has a say."""
    maps, labels, frame = batch
    one = centre_collapse(maps, labels, frame, COUNTS)
    x, y = maps.movedim(1, -1).reshape(-1, 6), labels.reshape(-1)
    torch.testing.assert_close(centre_collapse(x, y, frame, COUNTS), one)
    more = torch.cat([torch.arange(56), (y == 1).nonzero()[:, 0].repeat(9)])
    torch.testing.assert_close(centre_collapse(x[more], y[more], frame, COUNTS), one)
    apart = torch.zeros_like(x)
    apart[(y == 2).nonzero()[:2, 0]] = torch.tensor([[50.0], [-50.0]], dtype=f64)
    torch.testing.assert_close(centre_collapse(x + apart, y, frame, COUNTS), one)
    torch.testing.assert_close(centre_collapse(7 * x, y, frame, 3 * COUNTS), one)
    assert not torch.isclose(centre_collapse(x + (y == 2)[:, None], y, frame, COUNTS), one)


def test_other_numbers_of_axes(batch):
    maps, labels, frame = batch
    one = centre_collapse(maps, labels, frame, COUNTS)
    flat = centre_collapse(maps.flatten(2), labels.flatten(1), frame, COUNTS)
    deep = centre_collapse(maps[..., None], labels[..., None], frame, COUNTS)
    torch.testing.assert_close(flat, one)
    torch.testing.assert_close(deep, one)


def test_ignored_pixels_leave_no_trace(batch):
    maps, labels, frame = batch
    z = maps.clone()
    z[(labels < 0)[:, None].expand_as(z)] = torch.nan
    z.requires_grad_()
    loss = centre_collapse(z, labels, frame, COUNTS)
    torch.testing.assert_close(loss, centre_collapse(maps, labels, frame, COUNTS))
    loss.backward()
    ignored = (labels < 0)[:, None].expand_as(z)
    assert ignored.any()
    assert not z.grad[ignored].any()
    assert z.grad.isfinite().all()


def test_nothing_labelled_is_zero(batch):
    maps, labels, frame = batch
    x = maps.clone().requires_grad_()
    loss = centre_collapse(x, torch.full_like(labels, -1), frame, COUNTS)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_a_count_of_zero_stays_finite(batch):
    maps, labels, frame = batch
    counts = COUNTS.clone()
    counts[1] = 0
    for smoothing in (0.0, 0.2):
        x = maps.float().requires_grad_()
        loss = centre_collapse(x, labels, frame.float(), counts, smoothing=smoothing)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


def test_a_centre_of_zero_has_a_finite_gradient():
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
    loss = centre_collapse(x, torch.tensor([1, 1]), torch.eye(2), torch.ones(2))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert x.grad.abs().max() < 10


def test_gradients(batch):
    maps, labels, frame = batch
    x, w = maps.clone().requires_grad_(), frame.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: centre_collapse(x, labels, w, COUNTS, smoothing=0.1), (x, w)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_conformance(smoothing):
    for K in (2, 5):
        check_loss(partial(centre_collapse, smoothing=smoothing), num_classes=K)


def test_half_precision_maps(batch):
    maps, labels, frame = batch
    want = centre_collapse(maps, labels, frame, COUNTS)
    low = maps.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = centre_collapse(low, labels, frame.bfloat16(), COUNTS)
        single = centre_collapse(maps.float(), labels, frame.float(), COUNTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0)
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=0)


def test_errors(batch):
    maps, labels, frame = batch
    with pytest.raises(InputError, match=r"same places.*\[2, 6, 2, 7\].*F.interpolate"):
        centre_collapse(maps[:, :, :2], labels, frame, COUNTS)
    with pytest.raises(InputError, match="D = 6"):
        centre_collapse(maps, labels, frame[:, :5], COUNTS)
    with pytest.raises(InputError, match="length K = 5"):
        centre_collapse(maps, labels, frame, COUNTS[:3])
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        centre_collapse(maps, labels + 2, frame, COUNTS)
    with pytest.raises(InputError, match="smoothing must be in"):
        centre_collapse(maps, labels, frame, COUNTS, smoothing=1.0)
