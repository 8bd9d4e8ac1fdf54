"""prime_head: the shortcut comes as an input of its own."""

import pytest
import torch
from moving_heads import OPTIMIZERS, digits, digits_accuracy, works_everywhere
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.heads.prime import prime_head
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def joint(head):
    """One linear layer on [h; v], as the formula has it."""
    both = nn.Linear(2 * head.weight.shape[1], head.out_features, bias=False).double()
    both.weight.data = torch.cat([head.weight, head.prime_weight], 1).detach().clone()
    return both


def test_logits_are_those_of_one_layer_on_features_and_prime():
    head = prime_head(8, 5, num_attributes=4).double()
    W, h = joint(head), torch.randn(6, 8, dtype=torch.float64)
    a = torch.tensor([0, 3, 1, 1, 2, 0])
    v = head.primes[a]
    torch.testing.assert_close(head.logits(h, a), W(torch.cat([h, v], 1)))
    torch.testing.assert_close(head.logits(h), W(torch.cat([h, 0 * v], 1)))
    a[2] = -1  # unknown: no prime
    v = v.clone()
    v[2] = 0
    torch.testing.assert_close(head.logits(h, a), W(torch.cat([h, v], 1)))
    head.eval()
    assert torch.equal(head(h, a), head(h))
    linear = nn.Linear(8, 5, bias=False)
    linear.load_state_dict({"weight": head.state_dict()["weight"]})
    torch.testing.assert_close(linear.double()(h), head(h))


def test_the_second_loss_has_no_gradient_in_the_features():
    """CE(W[h; v_a] − W[h; 0], a) as the authors' code computes it, and in closed form."""
    head = prime_head(8, 5).double()
    W, a = joint(head), torch.tensor([0, 4, 1, 1, 2, 3])
    h = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    v = head.primes[a]
    difference = W(torch.cat([h, v], 1)) - W(torch.cat([h, torch.zeros_like(v)], 1))
    long_way = F.cross_entropy(difference, a)
    (grad,) = torch.autograd.grad(long_way, h, retain_graph=True)
    assert (grad == 0).all()
    loss = head.prime_loss(a)
    torch.testing.assert_close(loss, long_way)
    assert torch.autograd.grad(loss, h, allow_unused=True)[0] is None
    (wide,) = torch.autograd.grad(long_way, W.weight)
    (mine,) = torch.autograd.grad(head.prime_loss(a), head.prime_weight)
    torch.testing.assert_close(mine, wide[:, 8:])
    assert wide[:, :8].abs().max() < 1e-15
    some = torch.where(torch.arange(6) < 2, -1, a)
    torch.testing.assert_close(head.prime_loss(some), head.prime_loss(a[2:]))
    assert head.prime_loss(torch.full((3,), -1)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_primes_stay_an_etf(optimizer, dtype):
    net = nn.Sequential(nn.Linear(6, 12), prime_head(12, 5)).to(dtype)
    head = net[1]
    before = head.primes.clone()
    check_frame(before.float(), cosine=-1 / 4)
    step = OPTIMIZERS[optimizer](net.parameters())
    for _ in range(3):
        step.zero_grad()
        a, y = torch.randint(5, (16,)), torch.randint(5, (16,))
        loss = F.cross_entropy(head(net[0](torch.randn(16, 6, dtype=dtype)), a), y)
        (loss + 0.8 * head.prime_loss(a)).backward()
        step.step()
    assert torch.equal(head.primes, before)
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_autocast():
    head = prime_head(12, 5)
    h, a = torch.randn(6, 12), torch.arange(6) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, loss = head.logits(h, a), head.prime_loss(a)
    assert torch.equal(mixed, head.logits(h, a))
    assert torch.equal(loss, head.prime_loss(a))


def test_everywhere():
    works_everywhere(lambda: prime_head(12, 5, num_attributes=3, neck="bn"))
    check_head(prime_head)
    torch.compiler.reset()
    head = prime_head(12, 5)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x, a = torch.randn(6, 12), torch.tensor([0, 1, -1, 2, 3, 4])
    torch.testing.assert_close(compiled(x, a), head(x, a))
    maps, tokens = torch.randn(6, 12, 2, 3), torch.randn(6, 4, 12)
    torch.testing.assert_close(head(maps, a)[:, :, 1, 2], head(maps[:, :, 1, 2], a))
    torch.testing.assert_close(head(tokens, a)[:, 3], head(tokens[:, 3], a))
    net = swap_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), prime_head)
    assert net(torch.randn(5, 4)).shape == (5, 3)


def test_digits():
    """Attributes that tell nothing do no harm."""

    def step(body, x, y, head):
        a = torch.randint(10, (len(y),))
        return F.cross_entropy(head(body(x), a), y) + 0.8 * head.prime_loss(a)

    assert digits_accuracy(prime_head(16, 10), step) > 0.9


def test_a_known_shortcut_is_left_to_the_prime():
    """A stripe names the class in 95 % of the training images, and nothing in the test."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    attribute = torch.where(torch.rand(len(y)) < 0.95, y, torch.randint(10, (len(y),)))
    biased = torch.cat([x, 3.0 * F.one_hot(attribute, 10)], 1)
    test = torch.cat([test_x, 3.0 * F.one_hot(torch.randint(10, (len(test_y),)), 10)], 1)
    accuracy = {}
    for primed in (False, True):
        torch.manual_seed(0)
        head = prime_head(16, 10)
        body = nn.Sequential(nn.Linear(74, 64), nn.ReLU(), nn.Linear(64, 16))
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=5e-3)
        for _ in range(10):
            for batch in torch.randperm(len(y)).split(50):
                optimizer.zero_grad()
                a = attribute[batch] if primed else None
                loss = F.cross_entropy(head(body(biased[batch]), a), y[batch])
                if primed:
                    loss = loss + 0.8 * head.prime_loss(a)
                loss.backward()
                optimizer.step()
        head.eval()
        with torch.no_grad():
            accuracy[primed] = float((head(body(test)).argmax(1) == test_y).float().mean())
    assert accuracy[True] > accuracy[False] + 0.03


def test_errors():
    head, h = prime_head(8, 5, num_attributes=3), torch.randn(4, 8)
    for call, words in [
        (lambda: prime_head(8, 5, num_attributes=6), r"≤ num_classes = 5.*got 6"),
        (lambda: prime_head(8, 5, num_attributes=1), "num_classes must be an integer ≥ 2"),
        (lambda: prime_head(3, 5), "dim ≥ 4, got 3"),
        (lambda: head.logits(h, torch.tensor([0, 1, 2, 3])), "3"),
        (lambda: head.logits(h, torch.tensor([0, 1])), "4 rows"),
        (lambda: head.logits(h, torch.zeros(4)), "integers"),
        (lambda: head.prime_loss(torch.tensor([5])), "5"),
        (lambda: head.logits(torch.randn(4, 7)), "D = 8"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
