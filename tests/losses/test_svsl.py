import numpy as np
import pytest
import torch
from torch import nn

from ncmethods._core import InputError
from ncmethods.losses.svsl import svsl

f64 = torch.float64
FEATURES = torch.sin(torch.arange(1, 41, dtype=f64)).reshape(8, 5)
MAPS = torch.cos(torch.arange(1, 97, dtype=f64)).reshape(8, 3, 2, 2)
LABELS = torch.tensor([0, 0, 1, 3, 3, 3, 1, 0])  # class 2 is absent
# Sum over the two layers of `ConsistancyLoss(num_layers=2, num_classes=4, alpha_coef=1.0)`, the
# first author's code, float64:
# https://github.com/idobenshaul10/MFOML_CourseExamples/blob/
# db16607972d73662bb5c798978392f6a56e986bc/NeuralCollapse/Vision/losses.py
VALUE = 1.9717063280963192
GRAD_NORMS = 0.5243217012832283, 0.3344456695490387


@pytest.mark.parametrize("as_dict", [True, False])
def test_it_equals_the_authors_code(as_dict):
    maps, features = MAPS.clone().requires_grad_(), FEATURES.clone().requires_grad_()
    layers = {"layer4": maps, "avgpool": features} if as_dict else (maps, features)
    loss = svsl(layers, LABELS, 4)
    assert loss.item() == pytest.approx(VALUE, rel=1e-12)
    grads = torch.autograd.grad(loss, [maps, features])
    assert [g.norm().item() for g in grads] == pytest.approx(GRAD_NORMS, rel=1e-12)


def test_it_equals_the_printed_formula():
    total = 0.0
    for layer in (MAPS, FEATURES):
        x = layer.flatten(1).numpy()
        for c in (0, 1, 3):
            own = x[LABELS.numpy() == c]
            total += np.mean([np.sum((v - own.mean(0)) ** 2) for v in own]) / 4 / 2
    assert svsl([MAPS, FEATURES], LABELS, 4).item() == pytest.approx(total, rel=1e-12)
    # Without K it divides by the three classes that are there.
    assert svsl([MAPS, FEATURES], LABELS).item() == pytest.approx(total * 4 / 3, rel=1e-12)


def test_layers_count_alike():
    both = svsl([MAPS, FEATURES], LABELS)
    mean = (svsl([MAPS], LABELS) + svsl([FEATURES], LABELS)) / 2
    torch.testing.assert_close(both, mean, rtol=1e-12, atol=0)
    mixed = svsl([MAPS.float(), FEATURES], LABELS)
    torch.testing.assert_close(mixed, both, rtol=1e-6, atol=0)


def test_gradient_pulls_to_the_class_mean():
    # ∂/∂h_i = 2 (h_i − m_y)/(L K b_y): the part through the mean sums to zero.
    h = FEATURES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(svsl([h], LABELS, 4), h)
    for c, b in ((0, 3), (1, 2), (3, 3)):
        own = FEATURES[c == LABELS]
        want = 2 * (own - own.mean(0)) / (4 * b)
        torch.testing.assert_close(grad[c == LABELS], want, rtol=1e-10, atol=1e-14)


def test_with_hooks_in_a_loop():
    """Outputs of two layers of a network; a step of descent lowers the term."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    seen = {}
    for name in ("1", "3"):
        layer = net.get_submodule(name)
        layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    values = []
    for _ in range(20):
        net(FEATURES.float())
        loss = svsl(seen, LABELS, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    assert net[4].weight.grad is None


def test_errors():
    for call, words in [
        (lambda: svsl([], LABELS), "at least one tensor"),
        (lambda: svsl(FEATURES, LABELS), r"list or dict of tensors, got one \(8, 5\)"),
        (lambda: svsl([FEATURES[:, 0]], LABELS), r"at least one tensor \[N, …\], got \[\(8,\)\]"),
        (lambda: svsl([FEATURES, "x"], LABELS), "str"),
        (lambda: svsl([FEATURES], LABELS, 3), "< num_classes = 3"),
        (lambda: svsl([FEATURES], LABELS, 1), "num_classes must be"),
        (lambda: svsl([FEATURES, MAPS[:4]], LABELS), "4 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
