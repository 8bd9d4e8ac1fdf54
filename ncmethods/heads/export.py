"""A trained head as one plain layer, for deployment."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_head, is_head, logits_of

__all__ = ["to_conv", "to_linear"]


@torch.no_grad()
def to_linear(head: nn.Module, *, argmax: bool = False) -> nn.Linear:
    """The ``nn.Linear`` that gives a head's logits in eval mode: neck, rows and scale in one.

    With an affine neck h = Ax + b (none, BatchNorm, Linear and their products) and logits Wh + c,
    the layer has weight WA and bias Wb + c. A and W are read off a float64 copy of the head at
    zero and at the unit vectors, and the result is compared with it at random points, so every head
    that is affine can be folded, and no other.

    Logits of a normalised feature, W h/‖h‖, are not affine. ``argmax=True`` drops the norm: each
    sample's logits are multiplied by its ‖h‖ > 0, so their order and the predicted class stay;
    probabilities, temperatures and thresholds do not.

    Args:
        head: an ``nn.Linear`` or a head of this library.
        argmax: accept a layer that is equal only up to one positive factor per sample.

    Returns:
        A layer of the dtype and on the device of ``head.weight``; without bias where it is zero.

    Raises:
        InputError: a head that normalises, without ``argmax``; a neck that is not affine (MLP); a
            head with more than one row per class; a head on the meta device.
    """
    weight: Tensor = check_head(head).weight  # type: ignore[assignment]
    if weight.is_meta:
        raise InputError("The head is on the meta device: load its state before folding it.")
    twin = copy.deepcopy(head).to("cpu", torch.float64).eval()
    A, b = _affine(twin.embed if is_head(twin) else nn.Identity(), twin.in_features)  # type: ignore[arg-type]
    if A is None:
        raise InputError(
            f"The neck of {type(head).__name__} is not affine, so it does not fold into a linear "
            "layer. Export the head as it is, or use neck='bn' or neck='linear'."
        )
    W, c = _affine(lambda h: logits_of(twin, h), len(A.T))
    if W is None:
        W, c = _affine(lambda h: logits_of(twin, h) * h.norm(dim=1, keepdim=True), len(A.T))
        if W is None:
            raise InputError(
                f"The logits of {type(head).__name__} are not linear in its features, so no linear "
                "layer has them. Export the head as it is."
            )
        if not argmax:
            raise InputError(
                f"{type(head).__name__} normalises its features, so no linear layer has its "
                "logits. argmax=True gives one with the same predicted classes and other "
                "probabilities."
            )
    bias = b @ W + c
    folded = nn.Linear(
        len(A), W.shape[1], bias=bool(bias.any()), device="meta", dtype=weight.dtype
    ).to_empty(device=weight.device)
    folded.weight.copy_((A @ W).T)
    if folded.bias is not None:
        folded.bias.copy_(bias)
    return folded


def to_conv(head: nn.Module, *, argmax: bool = False) -> nn.Conv2d:
    """The 1×1 convolution that gives a head's logits on maps [N, in_features, H, W].

    Args:
        head: as for :func:`to_linear`.
        argmax: as for :func:`to_linear`.

    Raises:
        InputError: as :func:`to_linear`.
    """
    linear = to_linear(head, argmax=argmax)
    conv = nn.Conv2d(
        linear.in_features,
        linear.out_features,
        1,
        bias=linear.bias is not None,
        device="meta",
        dtype=linear.weight.dtype,
    ).to_empty(device=linear.weight.device)
    conv.load_state_dict(
        {n: t[..., None, None] if t.ndim == 2 else t for n, t in linear.state_dict().items()}
    )
    return conv


def _affine(function: Callable[[Tensor], Tensor], width: int) -> tuple[Tensor | None, Tensor]:
    """A [width, E] and b [E] with f(x) = xA + b, or None for A if f is not of this form."""
    b = function(torch.zeros(1, width, dtype=torch.float64))
    if not bool(b.isfinite().all()):
        raise InputError(
            "Some logits are −∞: the head has classes that wait. Activate them all, or export the "
            "head as it is."
        )
    A = function(torch.eye(width, dtype=torch.float64)) - b
    x = torch.randn(16, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, want = function(x), x @ A + b
    affine = torch.allclose(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    return (A if affine else None), b[0]
