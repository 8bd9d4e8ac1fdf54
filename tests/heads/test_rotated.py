"""rotated_head: the angles stay, the directions are learned."""

import copy
from functools import partial

import pytest
import torch
from moving_heads import OPTIMIZERS, digits_accuracy, works_everywhere
from scipy.linalg import orthogonal_procrustes
from torch import nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import orthogonal_frame, simplex_etf
from ncmethods.heads.rotated import RotatedHead, rotated_head
from ncmethods.heads.swap import swap_head
from ncmethods.testing import check_frame, check_head


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neck", ["bn", "linear", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_rows_turn_and_stay_an_etf(optimizer, neck, dtype):
    net = nn.Sequential(nn.Linear(6, 12), rotated_head(12, 5, neck=neck)).to(dtype)
    head = net[1]
    with torch.no_grad():  # a frame of float64 accuracy, and of the length that training gave
        head.coordinates.copy_(RotatedHead(simplex_etf(5, 12, dtype=dtype), 12).coordinates)
    before = head.weight.detach().clone()
    check_frame(before, cosine=-1 / 4)
    step = OPTIMIZERS[optimizer](net.parameters())
    x, y = torch.randn(16, 6, dtype=dtype), torch.randint(5, (16,))
    for _ in range(4):
        step.zero_grad()
        F.cross_entropy(net(x), y).backward()
        step.step()
        check_frame(head.weight.detach(), cosine=-1 / 4)
    assert (head.weight - before).abs().max() > 0.05
    assert len(set(head.basis.square().sum(0).tolist())) > 1  # the optimizer did bend the basis


def test_the_start_is_the_frame_and_any_gram_is_kept():
    for frame in (
        simplex_etf(5, 4, dtype=torch.float64),
        orthogonal_frame(5, 5, dtype=torch.float64),
        torch.randn(7, 3, dtype=torch.float64),  # more rows than dimensions
        torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64),
    ):
        K, D = frame.shape
        head = rotated_head(D, K, frame=frame, neck=None)
        torch.testing.assert_close(head.weight, frame, rtol=0, atol=1e-12)
        with torch.no_grad():
            head.basis.add_(torch.randn_like(head.basis))
        W = head.weight.detach()
        assert (W - frame).abs().max() > 0.1
        torch.testing.assert_close(W @ W.T, frame @ frame.T, rtol=1e-12, atol=1e-12)
        # one orthogonal matrix takes the frame to the rows: scipy's Procrustes leaves no residual
        R, _ = orthogonal_procrustes(frame.numpy(), W.numpy())
        torch.testing.assert_close(frame @ torch.from_numpy(R), W, rtol=0, atol=1e-11)
    assert rotated_head(9, 6, frame=frame).basis.shape == (9, 2)


def test_it_has_no_more_numbers_than_a_rotation_needs():
    assert sum(p.numel() for p in rotated_head(64, 10, neck=None).parameters()) == 64 * 9


def test_the_length_of_the_basis_does_not_matter():
    """So weight decay on it moves no row."""
    head = rotated_head(12, 5)
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.basis.mul_(1e-3)
    torch.testing.assert_close(head.weight.detach(), before, rtol=0, atol=1e-6)


def test_gradient_against_finite_differences():
    head = rotated_head(5, 3, neck=None).double()
    head.basis.requires_grad_()

    def rows(P):
        twin = copy.copy(head)
        twin._parameters = {**head._parameters, "basis": P}
        return twin.weight

    P = (head.basis + 0.3 * torch.randn(5, 2, dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradcheck(rows, (P,))
    # along its own length, and along a rotation that the loss cannot see, there is no slope
    (grad,) = torch.autograd.grad(rows(P).square().sum(), P)
    assert grad.abs().max() < 1e-12


def test_it_finds_a_rotation_that_a_fixed_frame_misses():
    """Features on the vertices of another simplex: the rows turn to them."""
    target = simplex_etf(5, 12)
    head = rotated_head(12, 5, neck=None)
    fixed = F.cross_entropy(head(target), torch.arange(5)).item()
    step = torch.optim.Adam(head.parameters(), lr=0.2)
    for _ in range(400):
        step.zero_grad()
        loss = F.cross_entropy(head(target), torch.arange(5))
        loss.backward()
        step.step()
    assert loss.item() == pytest.approx(-torch.tensor(0.99).log().item(), rel=0.05)
    assert fixed > 10 * loss.item()
    assert (head.weight * target).sum(1).min() > 0.98


def test_a_linear_layer_takes_its_state():
    head = rotated_head(12, 5, neck=None, normalize=False)
    linear = nn.Linear(12, 5, bias=False)
    missing, unexpected = linear.load_state_dict(head.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"basis", "coordinates"}
    x = torch.randn(4, 12)
    torch.testing.assert_close(linear(x), head(x))
    assert not head.state_dict()["weight"].requires_grad
    model = nn.Sequential(rotated_head(12, 5))  # also inside a model, and without the rows
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("weight") or "neck" in k}
    other = nn.Sequential(rotated_head(12, 5))
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", ["bn", "none"])
def test_everywhere(kind):
    neck = None if kind == "none" else kind
    works_everywhere(partial(rotated_head, 12, 5, neck=neck))
    check_head(partial(rotated_head, neck=neck))
    check_head(partial(rotated_head, neck=neck, learn_scale=True))


def test_swap():
    net = swap_head(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), rotated_head)
    assert net(torch.randn(5, 4)).shape == (5, 3)
    assert any(p is net[1].basis for p in net.parameters())


def test_digits():
    assert digits_accuracy(rotated_head(16, 10)) > 0.9


def test_errors():
    for call, words in [
        (lambda: rotated_head(8, 10), r"dim ≥ 9, got 8"),
        (lambda: rotated_head(8, 4, frame=torch.eye(5, 8)), r"\[4, D\].*\(5, 8\)"),
        (lambda: rotated_head(8, 4, frame=torch.eye(4, 8), dim=8), "Leave dim out"),
        (lambda: rotated_head(8, 4, frame=torch.zeros(4, 8)), "not all zero"),
        (lambda: rotated_head(8, 4, frame=torch.full((4, 8), torch.nan)), "finite"),
        (lambda: rotated_head(8, 4, frame=torch.eye(4, 8).long()), "floating"),
        (lambda: rotated_head(8, 4, neck="bm"), "Unknown neck"),
        (lambda: rotated_head(8, 4, scale=-1.0), "scale must be"),
        (lambda: rotated_head(12, 5)(torch.randn(3, 11)), "in_features = 12"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
