"""multi_centre_head: several rows for each class."""

from functools import partial

import numpy as np
import pytest
import torch
from moving_heads import OPTIMIZERS, digits_accuracy, works_everywhere
from scipy.special import logsumexp
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError, is_head
from ncmethods.heads.fixed import etf_head
from ncmethods.heads.multi_centre import MultiCentreHead, multi_centre_head
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("pool", ["max", "logsumexp"])
@pytest.mark.parametrize("centres", [3, [1, 4, 2, 1]])
def test_logits_against_a_loop(pool, centres):
    head = multi_centre_head(16, 4, centres=centres, pool=pool, neck=None, scale=7.0).double()
    x = torch.randn(6, 16, dtype=torch.float64)
    each = [3] * 4 if centres == 3 else centres
    want = np.empty((6, 4))
    for i in range(6):
        start = 0
        for c, m in enumerate(each):
            rows = head.rows[start : start + m].numpy()
            cos = rows @ x[i].numpy() / np.linalg.norm(x[i]) / np.linalg.norm(rows, axis=1)
            want[i, c] = 7 * cos.max() if pool == "max" else logsumexp(7 * cos) - np.log(m)
            start += m
    np.testing.assert_allclose(head(x).numpy(), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(head(100 * x), head(x))


def test_weight_is_the_mean_of_the_centres():
    head = multi_centre_head(16, 4, centres=[1, 4, 2, 1]).double()
    parts = head.rows.split([1, 4, 2, 1])
    torch.testing.assert_close(head.weight, torch.stack([p.mean(0) for p in parts]))
    assert is_head(head)
    even = multi_centre_head(16, 4, centres=3, sibling=0.4).double()
    # ‖mean of M unit rows at cosine ρ‖² = (1 + (M − 1)ρ)/M, and the means are a simplex
    norms = even.weight.square().sum(1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1.8 / 3), rtol=0, atol=1e-6)
    check_frame(F.normalize(even.weight).float(), cosine=-1 / 3)


@pytest.mark.parametrize("pool", ["max", "logsumexp"])
def test_one_centre_is_the_etf_head_and_equal_centres_count_once(pool):
    x = torch.randn(5, 12)
    etf = etf_head(12, 5, neck=None)
    one = multi_centre_head(12, 5, centres=1, neck=None, pool=pool)
    assert one.scale == pytest.approx(etf.scale, rel=1e-9)
    check_frame(one.rows, cosine=-1 / 4)
    for M in (1, 3):
        rows = etf.weight.repeat_interleave(M, 0)
        head = MultiCentreHead(rows, [M] * 5, 12, neck=None, pool=pool, scale=etf.scale)
        torch.testing.assert_close(head(x), etf(x))


def test_logsumexp_tends_to_max():
    head = multi_centre_head(12, 3, centres=3, neck=None, scale=2000.0)
    x = torch.randn(4, 12)
    soft = MultiCentreHead(head.rows, [3] * 3, 12, neck=None, scale=2000.0, pool="logsumexp")
    gap = head(x) - soft(x)
    assert gap.min() > -1e-3
    assert gap.max() <= np.log(3) + 1e-3


def test_the_scale_gives_99_percent_on_a_centre():
    for K, M in ((3, 2), (10, 4)):
        head = multi_centre_head(K * M, K, centres=M, neck=None).double()
        p = head(head.rows).softmax(1)[torch.arange(K * M), head.owner]
        torch.testing.assert_close(p, torch.full_like(p, 0.99), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learn_rows", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fixed_rows_stay_and_learned_ones_move(optimizer, learn_rows, dtype):
    net = nn.Sequential(nn.Linear(6, 12), multi_centre_head(12, 5, learn_rows=learn_rows)).to(dtype)
    before = net[1].rows.detach().clone()
    step = OPTIMIZERS[optimizer](net.parameters())
    for _ in range(3):
        step.zero_grad()
        loss = F.cross_entropy(net(torch.randn(16, 6, dtype=dtype)), torch.randint(5, (16,)))
        loss.backward()
        step.step()
    assert torch.equal(net[1].rows, before) != learn_rows
    assert loss.isfinite()
    assert any(p is net[1].rows for p in net.parameters()) == learn_rows
    cosines = F.normalize(before.double()) @ F.normalize(before.double()).T
    if not learn_rows:
        inside = cosines[torch.arange(0, 10, 2), torch.arange(1, 10, 2)]
        torch.testing.assert_close(inside, torch.full_like(inside, 0.5), rtol=0, atol=1e-6)


def test_only_the_nearest_centre_learns_under_max():
    head = multi_centre_head(12, 5, centres=3, learn_rows=True, neck=None)
    x = torch.randn(1, 12)
    head(x)[0, 2].backward()
    moved = head.rows.grad.abs().sum(1).nonzero().flatten().tolist()
    cosines = F.cosine_similarity(x, head.rows.detach())[6:9]
    assert moved == [6 + int(cosines.argmax())]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neck": None, "centres": [1, 2, 1, 3, 1]},
        {"learn_rows": True, "centres": 4, "pool": "logsumexp"},
    ],
)
def test_everywhere(options):
    works_everywhere(partial(multi_centre_head, 12, 5, **options))
    check_head(partial(multi_centre_head, **options))


def test_swap_and_maps():
    net = swap_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), multi_centre_head)
    assert net(torch.randn(5, 4)).shape == (5, 3)
    head = multi_centre_head(8, 3).eval()
    maps = torch.randn(2, 8, 3, 4)
    want = head(maps.permute(0, 2, 3, 1).reshape(-1, 8)).reshape(2, 3, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(head(maps), want)


@pytest.mark.parametrize("options", [{}, {"learn_rows": True, "pool": "logsumexp", "centres": 3}])
def test_digits(options):
    assert digits_accuracy(multi_centre_head(20, 10, **options)) > 0.9


def test_errors():
    for call, words in [
        (lambda: multi_centre_head(8, 5), "dim"),
        (lambda: multi_centre_head(8, 5, centres=0), "centres must be an integer"),
        (lambda: multi_centre_head(8, 5, centres=[1, 2]), "each of the 5 classes"),
        (lambda: multi_centre_head(12, 5, pool="mean"), "Unknown pool"),
        (lambda: multi_centre_head(12, 5, sibling=1.0), "sibling"),
        (lambda: MultiCentreHead(torch.eye(5), [2, 2], 5), r"\[4, D\]"),
        (lambda: MultiCentreHead(torch.eye(4), [4, 0], 4), "each ≥ 1"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_a_low_scale_warns_unless_it_is_learned():
    with pytest.warns(UserWarning, match="scale"):
        multi_centre_head(64, 20, scale=1.0)
    multi_centre_head(64, 20, scale=1.0, learn_scale=True)
