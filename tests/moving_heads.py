"""What the tests of the heads with a moving or growing geometry share."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
}


def works_everywhere(build: Callable[[], nn.Module], in_features: int = 12) -> None:
    """Compile in one graph, float64, bfloat16 and autocast, copies, pickle and state, meta."""
    torch.compiler.reset()  # the heads share a forward; its recompilations are counted together
    head = build()
    x = torch.randn(6, in_features)
    for training in (True, False):
        head.train(training)
        twin = copy.deepcopy(head)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, two = compiled(a), head(b)
        torch.testing.assert_close(one, two)
        for z in (one, two):
            z.masked_fill(z.isinf(), 0).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    head.eval()
    want = head(x).detach()
    assert want.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head.logits(head.embed(x).float())
        assert head(x).dtype == torch.float32
    if isinstance(head.neck, nn.Identity):
        assert torch.equal(mixed, want)  # also the product inside is float32
    low = copy.deepcopy(head).bfloat16()(x.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, want, rtol=0.1, atol=0.1 * float(want[want.isfinite()].std()))
    wide = copy.deepcopy(head).double()(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), want, rtol=1e-4, atol=1e-4)
    fresh = build()
    fresh.load_state_dict(head.state_dict())
    for same in (fresh.eval(), copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(same(x), want)
        assert repr(same) == repr(head)
    assert head.to("meta")(x.to("meta")).shape == want.shape


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: 1,000 to train on, 797 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def digits_accuracy(
    head: nn.Module,
    step: Callable[[nn.Module, Tensor, Tensor, nn.Module], Tensor] | None = None,
    epochs: int = 12,
) -> float:
    """Test accuracy of a small network with ``head``; ``step(body, x, y, head)`` gives the loss."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, head.in_features))
    net = nn.Sequential(body, head)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            if step is None:
                loss = F.cross_entropy(net(x[batch]), y[batch])
            else:
                loss = step(body, x[batch], y[batch], head)
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        return float((net(test_x).argmax(1) == test_y).float().mean())
