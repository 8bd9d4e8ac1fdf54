"""growing_head: vertices that wait for their class."""

import itertools
from functools import partial

import pytest
import torch
from moving_heads import OPTIMIZERS, digits, works_everywhere
from torch import nn
from torch.nn import functional as F

from ncmethods import metrics
from ncmethods._core import InputError
from ncmethods.frames import simplex_etf
from ncmethods.heads.export import to_linear
from ncmethods.heads.fixed import FixedHead, etf_head
from ncmethods.heads.growing import GrowingHead, growing_head
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neck", ["bn", "linear", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_stay_through_training_and_growth(optimizer, neck, dtype):
    net = nn.Sequential(nn.Linear(6, 12), growing_head(12, 9, active=3, neck=neck)).to(dtype)
    head = net[1]
    rows, used = head.weight.clone(), 3
    check_frame(rows.float(), cosine=-1 / 8)
    step = OPTIMIZERS[optimizer](net.parameters())
    for new in (0, 2, 1):
        if new:
            grown = head.grow(new, means=torch.randn(new, 12, dtype=dtype))
            assert grown.tolist() == list(range(used, used + new))
            rows[used:] = head.weight[used:]
            used += new
        for _ in range(2):
            step.zero_grad()
            logits = net(torch.randn(16, 6, dtype=dtype))
            F.cross_entropy(logits, torch.randint(used, (16,))).backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())
            step.step()
        assert torch.equal(head.weight, rows)  # bit for bit, the used and the waiting ones
        check_frame(head.weight.float(), cosine=-1 / 8)
        assert logits[:, :used].isfinite().all()
        assert (logits[:, used:] == -torch.inf).all()
    assert head.active.tolist() == [True] * 6 + [False] * 3


def test_waiting_classes_have_probability_zero_and_the_others_those_of_their_own_frame():
    head = growing_head(16, 10, active=[1, 4, 7], neck=None).double()
    small = FixedHead(head.weight[[1, 4, 7]], 16, neck=None, scale=head.scale)
    x = torch.randn(5, 16, dtype=torch.float64)
    p = head(x).softmax(1)
    torch.testing.assert_close(p[:, [1, 4, 7]], small(x).softmax(1))
    assert not p[:, [0, 2, 3, 5, 6, 8, 9]].any()
    everything = growing_head(16, 10, neck=None, generator=torch.Generator().manual_seed(1))
    fixed = etf_head(16, 10, neck=None, generator=torch.Generator().manual_seed(1))
    assert torch.equal(everything(x.float()), fixed(x.float()))
    assert everything.scale == fixed.scale


def test_a_part_of_the_rows_is_an_etf_after_centring():
    # Golden check 18 of the heads sheet: 7 of 50, uncentred 0.33604704.
    head = growing_head(64, 50, active=7).double()
    with torch.no_grad():
        head.weight.copy_(simplex_etf(50, 64, dtype=torch.float64))
    rows = head.weight[head.active]
    assert metrics.gram_etf(rows).item() == pytest.approx(0.33604704, abs=1e-8)
    centred = rows - rows.mean(0)
    assert metrics.gram_etf(centred).item() < 1e-7
    check_frame(F.normalize(centred), cosine=-1 / 6)


def test_means_choose_the_rows():
    """Against all ways to deal out the free rows."""
    head = growing_head(6, 6, active=2, neck=None).double()
    before, means = head.weight.clone(), torch.randn(3, 6, dtype=torch.float64)
    cosines = F.normalize(means) @ F.normalize(before[2:]).T
    deals = list(itertools.permutations(range(4), 3))
    best = max(deals, key=lambda deal: float(cosines[range(3), list(deal)].sum()))
    assert list(best) != [0, 1, 2]
    assert head.activate([4, 2, 3], means=means).tolist() == [4, 2, 3]
    assert torch.equal(head.weight[[4, 2, 3]], before[2:][list(best)])
    assert torch.equal(head.weight[:2], before[:2])
    (left,) = {0, 1, 2, 3} - set(best)
    assert torch.equal(head.weight[5], before[2 + left])
    assert head.active.tolist() == [True] * 5 + [False]


def test_growth_between_forward_and_backward():
    net = nn.Sequential(nn.Linear(4, 8), growing_head(8, 6, active=3))
    loss = F.cross_entropy(net(torch.randn(9, 4)), torch.arange(9) % 3)
    net[1].grow(2, means=torch.randn(2, 8))
    loss.backward()
    assert net[0].weight.grad.isfinite().all()


def test_state_and_compiled_code_take_growth():
    torch.compiler.reset()
    head = growing_head(12, 5, active=2)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 12)
    for used in (2, 3, 5):
        if used > 2:
            head.grow(used - int(head.active.sum()))
        head.eval()
        torch.testing.assert_close(compiled(x), head(x))
        assert int(compiled(x).isfinite()[0].sum()) == used
        fresh = growing_head(12, 5, active=2)
        fresh.load_state_dict(head.state_dict())
        assert torch.equal(fresh.active, head.active)
        assert torch.equal(fresh.eval()(x), head(x))


def test_everywhere():
    def build():
        torch.manual_seed(3)
        head = growing_head(12, 5, active=2)
        head.grow(1, means=torch.randn(1, 12))
        return head

    works_everywhere(build)
    check_head(growing_head)
    check_head(partial(growing_head, neck="linear", learn_scale=True))
    assert "3 in use" in repr(build())
    assert build()(torch.randn(2, 12, 3, 4)).isinf().sum(1).unique().tolist() == [2]


def test_swap():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    swap_head(net, partial(growing_head, active=3), num_classes=6)
    assert net(torch.randn(5, 4)).argmax(1).max() < 3
    net[1].grow(3)
    assert net(torch.randn(5, 4)).isfinite().all()


def test_digits_in_two_sessions():
    """Five classes, then all ten; the rows of the first five are where they were."""
    x, y, test_x, test_y = digits()
    head = growing_head(16, 10, active=5)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), head)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    first = head.weight[:5].clone()
    for classes in (5, 10):
        if classes == 10:
            net.eval()
            with torch.no_grad():
                h = head.embed(net[:3](x))
            head.grow(5, means=torch.stack([h[y == c].mean(0) for c in range(5, 10)]))
        net.train()
        mine = (y < classes).nonzero().flatten()
        for _ in range(10):
            for batch in mine[torch.randperm(len(mine))].split(50):
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        net.eval()
        shown = test_y < classes
        with torch.no_grad():
            accuracy = (net(test_x[shown]).argmax(1) == test_y[shown]).float().mean()
        assert accuracy > 0.9
    assert torch.equal(head.weight[:5], first)


def test_errors():
    head = growing_head(8, 5, active=[0, 3])
    for call, words in [
        (lambda: growing_head(8, 10), r"dim ≥ 9, got 8"),
        (lambda: growing_head(8, 5, active=6), "from 1 to 5.*got 6"),
        (lambda: growing_head(8, 5, active=[0, 5]), "from 0 to 4"),
        (lambda: GrowingHead(torch.eye(3), 3, active=0), "got 0"),
        (lambda: head.grow(4), "from 1 to 3.*larger num_classes"),
        (lambda: head.grow(True), "got True"),
        (lambda: head.activate([1, 3]), r"Classes \[3\] are in use"),
        (lambda: head.activate([1, 1]), "distinct"),
        (lambda: head.activate([-1]), "from 0 to 4"),
        (lambda: head.activate(torch.tensor([1.0])), "integers"),
        (lambda: head.grow(2, means=torch.ones(2, 7)), r"\[2, 8\]"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert head.active.tolist() == [True, False, False, True, False]


def test_waiting_classes_do_not_fold_into_a_linear_layer():
    head = growing_head(12, 6, active=3, neck=None).eval()
    with pytest.raises(InputError, match="classes that wait"):
        to_linear(head, argmax=True)
    head.grow(3)
    x = torch.randn(20, 12)
    folded = to_linear(head, argmax=True)
    assert torch.equal(folded(x).argmax(1), head(x).argmax(1))
