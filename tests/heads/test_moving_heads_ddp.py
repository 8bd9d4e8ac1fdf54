"""Two ranks train each moving head as one process with all samples does."""

from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.nn import functional as F

from ncmethods.heads.class_mean import class_mean_head
from ncmethods.heads.growing import growing_head
from ncmethods.heads.guided import guided_head
from ncmethods.heads.multi_centre import multi_centre_head
from ncmethods.heads.prime import prime_head
from ncmethods.heads.rotated import rotated_head

WITH_LABELS = {
    "guided": partial(guided_head, neck="linear"),
    "guided-differentiable": partial(guided_head, neck="linear", differentiable=True),
    "class_mean": partial(class_mean_head, neck="linear"),
    "class_mean-centred": partial(class_mean_head, neck="linear", center=True),
}
HEADS = WITH_LABELS | {
    "rotated": partial(rotated_head, neck="linear"),
    "growing": partial(growing_head, neck="linear", active=3),
    "multi_centre": partial(multi_centre_head, neck="linear", learn_rows=True, pool="logsumexp"),
    "prime": partial(prime_head, neck="linear"),
}


def train(rank, world, name):
    torch.manual_seed(0)
    head = HEADS[name](6, 4).double()
    model = nn.parallel.DistributedDataParallel(head) if world > 1 else head
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, weight_decay=0.01)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 2, 1, 0, 1])  # class 2 on one rank only, class 3 on none
    mine, labels = x[rank::world], y[rank::world]
    given = (labels,) if name in WITH_LABELS else ()
    if name == "prime":
        given = (y.roll(1)[rank::world],)
    for step in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(mine, *given), labels)
        if name == "prime":
            loss = loss + 0.8 * head.prime_loss(*given)
        loss.backward()
        optimizer.step()
        if name == "growing" and step == 1:
            head.grow(1, means=torch.ones(1, 6, dtype=torch.float64))
    return {key: value.detach() for key, value in head.state_dict().items()}


def train_all(rank, world):
    return {name: train(rank, world, name) for name in HEADS}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(train_all, 2)


@pytest.mark.parametrize("name", HEADS)
def test_ddp(ranks, name):
    alone = train(0, 1, name)
    for rank in ranks:
        assert set(rank[name]) == set(alone)
        for key, want in alone.items():
            torch.testing.assert_close(rank[name][key], want, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_gradient_through_the_rows_counts(ranks):
    one, two = (ranks[0][name]["neck.weight"] for name in ("guided", "guided-differentiable"))
    assert (one - two).abs().max() > 1e-6
