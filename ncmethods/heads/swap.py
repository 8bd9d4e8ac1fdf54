"""Put a head into somebody's model, in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, find_head, unwrap

__all__ = ["HeadLike", "build_head", "swap_head", "warn_relu"]

# A built head, or a builder (in_features, num_classes) -> head.
HeadLike: TypeAlias = "nn.Module | Callable[[int, int], nn.Module]"


def build_head(head: HeadLike, old: nn.Module, num_classes: int | None) -> nn.Module:
    """The head that takes the place of ``old``, with its device, dtype and mode.

    Raises:
        InputError: ``old`` has no known width, or a built head has another one or another K.
    """
    in_features, rows = getattr(old, "in_features", None), getattr(old, "out_features", None)
    if not isinstance(in_features, int) or not isinstance(rows, int):
        raise InputError(
            f"{type(old).__name__} has no in_features and out_features, so no head can take its "
            "place. Point at the linear classifier with name='…'."
        )
    if isinstance(head, nn.Module):
        width = getattr(head, "in_features", in_features)
        if width != in_features:
            raise InputError(
                f"The head takes {width} features, but the model's classifier layer takes "
                f"{in_features}. Build it with in_features={in_features}."
            )
        K = getattr(head, "out_features", num_classes)
        if num_classes not in (None, K):
            raise InputError(
                f"num_classes={num_classes}, but the head was built with {K} classes. Pass a "
                "builder, or leave num_classes out."
            )
        built = head
    else:
        built = head(in_features, rows if num_classes is None else num_classes)
    weight = old.weight
    if isinstance(weight, Tensor):  # on the meta device a fixed frame would be lost
        built.to(None if weight.is_meta else weight.device, weight.dtype)
    return built.train(old.training)


def swap_head(
    net: nn.Module,
    head: HeadLike,
    *,
    num_classes: int | None = None,
    name: str | None = None,
) -> nn.Module:
    """Replace the classifier layer of a model in place; its forward stays x → logits.

    Device, dtype and train/eval mode are kept; ``num_classes`` and ``num_labels`` attributes are
    brought up to date.

    Args:
        net: e.g. a torchvision model.
        head: a builder such as ``heads.etf_head`` (called with the layer's in_features and K), a
            ``functools.partial`` of one, or a built head.
        num_classes: K for a builder; the model's own if None.
        name: dotted name of the classifier layer, where several fit.

    Returns:
        ``net`` itself.

    Raises:
        InputError: no classifier layer found, several found (the message lists them), or a head
            that does not fit.
    """
    target = unwrap(net)
    found = find_head(target, name=name)
    if not found.name:
        raise InputError("The model is a bare linear layer: there is nothing around its head.")
    built = build_head(head, found.module, num_classes)
    warn_relu(target, built)
    parent, _, leaf = found.name.rpartition(".")
    setattr(target.get_submodule(parent), leaf, built)
    K = getattr(built, "out_features", None)
    for holder in (target, getattr(target, "config", None)):
        for attribute in ("num_classes", "num_labels"):
            if K is not None and isinstance(getattr(holder, attribute, None), int):
                setattr(holder, attribute, K)
    return net


def warn_relu(net: nn.Module, head: nn.Module) -> None:
    """Warn when a fixed head without a neck may see non-negative features.

    For features ≥ 0 the largest cosine with a row w is ‖max(w, 0)‖: 0.707 for a rotated ETF, and
    √((K−1)/K) for the canonical one, which is as far as any rotation gets.
    """
    if not isinstance(getattr(head, "neck", None), nn.Identity) or isinstance(
        head.weight, nn.Parameter
    ):
        return
    relu = (nn.ReLU, nn.ReLU6)
    if not any(isinstance(module, relu) for module in net.modules()):
        return
    rows = head.weight.detach()  # type: ignore[operator]
    cap = torch.linalg.vector_norm(rows.clamp(min=0), dim=1) / torch.linalg.vector_norm(rows, dim=1)
    if float(cap.min()) < 0.95 * math.sqrt(1 - 1 / len(rows)):
        warnings.warn(
            "This model has ReLUs and the head has no neck: if its features are non-negative they "
            f"reach at most cosine {float(cap.min()):.3f} with the fixed rows. Use neck='bn', or "
            "rotation='canonical'.",
            stacklevel=3,
        )
