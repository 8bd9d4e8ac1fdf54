"""Classifier: a backbone and a head that return features and logits together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ncmethods._core import (
    InputError,
    Output,
    check_head,
    find_head,
    is_head,
    logits_of,
    main_output,
    unwrap,
)
from ncmethods.heads.swap import HeadLike, build_head, warn_relu

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
        found = find_head(net, name=name)
        if not found.name:
            raise InputError("The model is a bare head: wrap its backbone with Classifier(...).")
        if head is None:
            built = found.module
        else:
            built = build_head(head, found.module, num_classes)
            warn_relu(net, built)
        if isinstance(net, Classifier) and found.module is net.head:
            return cls(net.backbone, built)
        parent, _, leaf = found.name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        return cls(net, built)
