"""Classifier: a backbone and a head that return features and logits together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ncmethods._core import InputError, Output, find_head, is_head, logits_of
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
        if not (is_head(head) or isinstance(head, nn.Linear)):
            raise InputError(
                "head must be an nn.Linear or have weight, embed and logits, got "
                f"{type(head).__name__}."
            )
        self.backbone, self.head = backbone, head

    def forward(self, x: Any) -> Output:
        """Features after the head's neck, and logits."""
        out = self.backbone(x)
        out = getattr(out, "logits", out[0] if isinstance(out, (tuple, list)) else out)
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
            model: e.g. a torchvision classifier; its classifier layer is replaced in place by the
                identity.
            head: a built head, a builder such as ``heads.etf_head``, or None to keep the model's.
            num_classes: K for a builder; the model's own if None.
            name: dotted name of the classifier layer, where several fit.

        Raises:
            InputError: no classifier layer found, several found, or a head that does not fit.
        """
        found = find_head(model, name=name)
        if head is None:
            built = found.module
        else:
            built = build_head(head, found.module, num_classes)
            warn_relu(model, built)
        parent, _, leaf = found.name.rpartition(".")
        if not found.name:
            raise InputError("The model is a bare head: wrap its backbone with Classifier(...).")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
        return cls(model, built)
