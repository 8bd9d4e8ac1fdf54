"""What each head promises of its rows, for every head × {Linear, conv} × {compile, DDP, bf16}."""

import copy
from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.nn import functional as F

from ncmethods import frames, heads

K, D = 5, 12
ETF = frames.simplex_etf(K, K - 1, dtype=torch.float64)
ETF = ETF @ ETF.T
WAYS = ("plain", "compile", "bf16", "ddp")


def gram_is(head, gram, name="weight"):
    W = getattr(head, name).detach().double()
    torch.testing.assert_close(W @ W.T, gram, rtol=0, atol=3e-6)


def fixed(head, start, gram=ETF, name="weight"):
    """Rows bit for bit as they were built, without gradient, and with the right angles."""
    rows = getattr(head, name)
    assert torch.equal(rows, start[name])
    assert rows.grad is None
    assert not rows.requires_grad
    gram_is(head, gram, name)


def turned(head, start):
    assert not torch.equal(head.weight, start["weight"])
    gram_is(head, ETF)


def unit(head, start):
    assert not torch.equal(head.weight, start["weight"])
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(K))


def learned(head, start):
    """Rows are learned; what is promised is that the logits are cosines, whatever their length."""
    x = torch.randn(4, D)
    z = head.eval()(x)
    assert z.abs().max() <= head.scale * (1 + 1e-6)
    head.weight.data.mul_(3)
    torch.testing.assert_close(head(x), z)


def free_of_length(head, start):
    """Rows and bias are learned; the length of what comes in plays no part."""
    assert not torch.equal(head.weight, start["weight"])
    x = torch.randn(4, D)
    torch.testing.assert_close(head.eval()(3 * x), head(x))


def centres(head, start):
    """Two centres for each class: siblings at cosine 1/2, others at the least it allows."""
    assert torch.equal(head.rows, start["rows"])
    gram = head.rows.double() @ head.rows.double().T
    other = -(1 + 0.5) / (2 * (K - 1))
    for i in range(2 * K):
        for j in range(2 * K):
            want = 1.0 if i == j else 0.5 if i // 2 == j // 2 else other
            assert abs(float(gram[i, j]) - want) < 3e-6


def grown(head, start):
    """The rows in use are where they were; those that wait have a place each in the same frame."""
    assert torch.equal(head.weight, start["weight"])
    assert head.active.tolist() == [True] * 4 + [False]
    gram_is(head, ETF)


# name: builder, promise, whether the head is told the labels
HEADS = {
    "etf_head": (partial(heads.etf_head, learn_scale=True), fixed, False),
    "etf_head, canonical": (partial(heads.etf_head, rotation="canonical", neck=None), fixed, False),
    "etf_head, parameter": (partial(heads.etf_head, as_parameter=True), fixed, False),
    "frame_head": (
        partial(heads.frame_head, frame=frames.nonnegative_orthogonal),
        partial(fixed, gram=torch.eye(K, dtype=torch.float64)),
        False,
    ),
    "cosine_head": (heads.cosine_head, learned, False),
    "rotated_head": (heads.rotated_head, turned, False),
    "guided_head": (heads.guided_head, turned, True),
    "class_mean_head": (heads.class_mean_head, unit, True),
    "multi_centre_head": (heads.multi_centre_head, centres, False),
    "growing_head": (partial(heads.growing_head, active=3), grown, False),
    "normalized_head": (heads.normalized_head, free_of_length, False),
    "frozen_projector_head": (heads.frozen_projector_head, free_of_length, False),
    "prime_head": (heads.prime_head, partial(fixed, name="primes"), False),
}


def test_no_head_is_missing():
    builders = {n for n in heads.__all__ if n.endswith("_head")} - {"find_head", "swap_head"}
    assert {name.split(",")[0] for name in HEADS} == builders


class Net(nn.Module):
    """A layer of the kind, then the head; maps are averaged over their positions."""

    def __init__(self, kind, head):
        super().__init__()
        self.body = nn.Linear(6, D) if kind == "linear" else nn.Conv2d(6, D, 3, padding=1)
        self.head = head

    def forward(self, x):
        features = self.head.embed(self.body(x))
        logits = self.head.logits(features)
        return features, logits if logits.ndim == 2 else logits.mean((2, 3))


def trained(kind, name, way, rank=0, world=1):
    """(state of the head at the start, the net after three steps with a heavy weight decay)."""
    torch.manual_seed(0)
    net = Net(kind, HEADS[name][0](D, K))
    start = {k: v.clone() for k, v in net.head.state_dict().items()}
    start["weight"] = net.head.weight.detach().clone()
    run = net
    if way == "compile":
        torch.compiler.reset()
        run = torch.compile(net, fullgraph=True, backend="aot_eager")
    elif way == "ddp":
        run = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1.0)
    g = torch.Generator().manual_seed(1)
    shape = (12, 6) if kind == "linear" else (12, 6, 4, 3)
    x, y = torch.randn(shape, generator=g)[rank::world], (torch.arange(12) % 3)[rank::world]
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "bf16"):
            features, logits = run(x)
        assert logits.dtype == torch.float32
        if HEADS[name][2]:
            labels = y if kind == "linear" else y[:, None, None].expand(-1, 4, 3)
            net.head.observe(features, labels)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        if name == "growing_head" and step == 1:
            net.head.grow(1)
    return start, net


@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", HEADS)
def test_the_promise_holds(name, kind, way):
    start, net = trained(kind, name, way)
    assert all(p.isfinite().all() for p in net.parameters())
    if way == "compile":
        _, plain = trained(kind, name, "plain")
        torch.testing.assert_close(net.head.weight, plain.head.weight, rtol=1e-4, atol=1e-5)
    HEADS[name][1](net.head, start)


def on_ranks(rank, world):
    found = {}
    for name in HEADS:
        for kind in ("linear", "conv"):
            start, net = trained(kind, name, "ddp", rank, world)
            HEADS[name][1](copy.deepcopy(net.head), start)
            found[name, kind] = {k: v.detach().clone() for k, v in net.state_dict().items()}
    return found


def test_the_promise_holds_on_two_ranks():
    one, two = run_ranks(on_ranks, 2)
    for where, state in one.items():
        for key, value in state.items():
            if "running" in key:  # BatchNorm's statistics are those of each rank, as ever
                continue
            assert torch.equal(value.nan_to_num(), two[where][key].nan_to_num()), (where, key)
