"""Classifier: a backbone and a head that return features and logits together."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import (
    Found,
    InputError,
    Output,
    check_head,
    find_auxiliary,
    find_heads,
    is_head,
    logits_of,
    main_output,
    unwrap,
)
from ncmethods.heads.swap import HeadLike, build_head, relu_behind, warn_relu, widths

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Backbone plus head: ``model(x) -> Output(features [N, D], logits [N, K])``.

    Args:
        backbone: maps inputs to [N, in_features]; a tuple's first element or ``.logits`` is taken.
        head: an ``nn.Linear`` or a head of this library.
    """

    returns_output = True

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, check_head(head)

    def forward(self, x: Any) -> Output:
        """Features after the head's neck, and logits.

        Raises:
            InputError: the backbone returns something else than [N, in_features].
        """
        out = main_output(self.backbone(x))
        if not isinstance(out, Tensor) or out.ndim != 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"The backbone must return features [N, in_features], got {got}. Pool or flatten "
                "its output."
            )
        features: Tensor = self.head.embed(out) if is_head(self.head) else out  # type: ignore
        return Output(features, logits_of(self.head, features))

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        head: HeadLike | None = None,
        *,
        num_classes: int | None = None,
        name: str | None = None,
    ) -> Classifier:
        """Split a classification model into backbone and head, or give it another head.

        The head acts on what the model returns with its classifier left out: for a 1×1 convolution
        (squeezenet) after the pooling behind it. Where a model averages several classifiers
        (distilled DeiT, CrossViT, …), it acts on their concatenated inputs. Auxiliary classifiers
        of torchvision and timm models are taken out, since Output has no place for their logits.

        Args:
            model: e.g. a torchvision classifier, also compiled or wrapped by DDP (the wrapper is
                left behind); its classifier layer is replaced in place by the identity.
            head: a built head, a builder such as ``heads.etf_head``, or None to keep the model's.
            num_classes: K for a builder; the model's own if None.
            name: dotted name of the classifier layer, where several fit.

        Raises:
            InputError: no classifier layer found, several found, or a head that does not fit.
        """
        net = unwrap(model)
        found = find_heads(net, name=name)
        path, old = found[0]
        if not path:
            raise InputError("The model is a bare head: wrap its backbone with Classifier(...).")
        if head is None:
            built = _joined([f.module for f in found], weights=True)
            _warn_other_logits(net, found[0])
        else:
            built = build_head(head, _joined([f.module for f in found]), num_classes)
            warn_relu(net, built, path)
        if isinstance(net, Classifier) and old is net.head:
            return cls(net.backbone, built)
        before, total = 0, sum(_width(f.module) for f in found)
        for place, module in found:
            slot: nn.Module = nn.Identity()
            if len(found) > 1:
                slot = _Slot(before, total - before - _width(module), len(found))
                before += _width(module)
            _put(net, place, slot)
        for branch in _removable(net):
            _put(net, branch, None)
        return cls(net, built)


class _Slot(nn.Module):
    """Puts one of n averaged features into its place of their concatenation: the mean is that."""

    def __init__(self, before: int, after: int, parts: int) -> None:
        super().__init__()
        self.room, self.parts = (before, after), parts

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] → [N, ΣD], times n."""
        return F.pad(self.parts * x, self.room)


def _width(layer: nn.Module) -> int:
    shape = widths(layer)
    if shape is None:
        raise InputError(
            f"{type(layer).__name__} has no in_features and out_features, so the model cannot be "
            "split there. Point at the linear classifier with name='…'."
        )
    return shape[0]


def _joined(layers: list[nn.Module], *, weights: bool = False) -> nn.Module:
    """One layer on the concatenated inputs: the only one, or the mean of several linear ones."""
    first = layers[0]
    if len(layers) == 1 and not isinstance(first, nn.Conv2d):
        return first
    if weights and (len(layers) > 2 or any(is_head(m) for m in layers)):
        raise InputError(
            f"The model fuses {len(layers)} heads, which are not one head. Pass head=… to put one "
            "on their concatenated features, or keep the model as it is: capture and extract take "
            "it."
        )
    rows, n = cast(Tensor, first.weight), len(layers)
    D, K = sum(_width(m) for m in layers), (widths(first) or (0, 0))[1]
    one = nn.Linear(D, K, device="meta").to_empty(device=rows.device).to(rows.dtype)
    if weights:
        W = torch.cat([cast(Tensor, m.weight).detach().flatten(1) for m in layers], dim=1) / n
        biases = [m.bias.detach() for m in layers if isinstance(m.bias, Tensor)]
        b = nn.Parameter(torch.stack(biases).sum(0) / n) if biases else None
        one.weight, one.bias = nn.Parameter(W), cast(nn.Parameter, b)
        one.requires_grad_(rows.requires_grad)
    return one.train(first.training)


def _removable(net: nn.Module) -> list[str]:
    """Auxiliary branches of torchvision and timm, whose models take None for them."""
    known = type(net).__module__.startswith(("torchvision.", "timm."))
    return [branch for branch, _ in find_auxiliary(net)] if known else []


def _warn_other_logits(net: nn.Module, found: Found) -> None:
    """Warn where a model does more with its classifier's logits than a Classifier does."""
    more = ""
    if isinstance(found.module, nn.Conv2d) and relu_behind(net, found.name):
        more = "cuts its logits at zero before it pools them"
    elif any(isinstance(net.get_submodule(b), nn.Linear) for b in _removable(net)):  # VOLO
        more = "adds the logits of an auxiliary classifier to its own"
    if more:
        warnings.warn(
            f"{type(net).__name__} {more}; a Classifier does not, so its logits differ.",
            stacklevel=3,
        )


def _put(net: nn.Module, path: str, module: nn.Module | None) -> None:
    where, _, leaf = path.rpartition(".")
    setattr(net.get_submodule(where), leaf, module)
