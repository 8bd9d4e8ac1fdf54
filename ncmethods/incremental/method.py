"""Method: what a class-incremental method does in a session, and the losses of the known ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import logits_of
from ncmethods.features import FeatureSet
from ncmethods.heads import Classifier, lda, ncm
from ncmethods.incremental.ranpac import RanPAC
from ncmethods.incremental.vertices import Policy, evolve
from ncmethods.incremental.weight_align import weight_align
from ncmethods.losses import (
    distill_features,
    distill_logits,
    distill_relations,
    dot_regression,
    fnc2,
)

__all__ = ["METHODS", "Method", "Step"]

Loss = Callable[..., Tensor]
"""Of any of the names that ``training.fit`` binds."""
Classify = Callable[[Tensor], Tensor]
"""From features [N, D] to logits [N, seen]."""


@dataclass(frozen=True)
class Step:
    """What a method knows when a session begins. Classes are numbered by arrival."""

    index: int
    """Of the session, from 0."""
    seen: int
    """Classes so far, those of this session among them."""
    before: int = 0
    """Classes of the earlier sessions."""
    base: int = 0
    """Classes of the first session."""
    old: Classifier | None = None
    """The frozen model after the last session, in eval mode."""
    means: Tensor | None = None
    """Class means of the new classes under it [seen − before, D]."""


def _own_head(model: Classifier, _known: FeatureSet | None, _step: Step) -> Classify:
    return partial(logits_of, model.head)


@dataclass(frozen=True)
class Method:
    """One method; a new one is one of these.

    Args:
        loss: from what a session knows, the loss that it trains with.
        head: ``"linear"``, whose rows grow with the classes, ``"etf"``, fixed vertices behind a
            neck, or ``"cosine"``, learned unit rows behind the same neck.
        memory: whether exemplars of earlier classes are trained on.
        train: hyperparameters that are part of the method, fields of ``TrainConfig``.
        later: the same for all sessions but the first.
        policy: which vertices new classes get.
        finish: changes the trained model in place before it is used.
        classify: from the model, the features that are remembered (exemplars and this session's)
            and the step, the classifier of features that is tested; the model's head if None.
        frozen: the backbone is trained in the first session only; then ``classify`` has the
            features of all training images so far, as no exemplars are kept but moments could be.
    """

    loss: Callable[[Step], Loss]
    head: str = "linear"
    memory: bool = True
    train: Mapping[str, Any] = field(default_factory=dict)
    later: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = "fixed"
    finish: Callable[[Classifier, Step], None] | None = None
    classify: Callable[[Classifier, FeatureSet, Step], Classify] = _own_head
    frozen: bool = False


# --- losses ---------------------------------------------------------------------------------------


def cross_entropy(_step: Step) -> Loss:
    """Cross-entropy over all classes so far."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    return loss


def icarl(step: Step, *, weight: float = 1.0) -> Loss:
    """Cross-entropy and distilled logits; the original has a logistic loss in place of both."""
    old = step.old

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        value = F.cross_entropy(logits, labels)
        return (
            value if old is None else value + weight * distill_logits(logits, _of(old, images)[1])
        )

    return loss


def wa(step: Step) -> Loss:
    """(1 − λ) cross-entropy + λ distilled logits, λ the share of the old classes."""
    old, share = step.old, step.before / step.seen

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        value = F.cross_entropy(logits, labels)
        if old is None:
            return value
        return (1 - share) * value + share * distill_logits(logits, _of(old, images)[1])

    return loss


def terminus(
    step: Step,
    *,
    pull: Literal["dr", "ce"] = "dr",
    distill: float = 10.0,
    evolving: bool = False,
) -> Loss:
    """Features onto fixed vertices, and those of old classes where the last model had them.

    ``pull`` is dot regression, or cross-entropy over scaled cosines; distillation grows with
    √(old/base classes). With ``evolving`` the targets of new classes move from their means under
    the old model to their vertices as the session goes on.
    """
    old, keep = step.old, 0.0
    if old is not None:
        keep = distill * math.sqrt(step.before / step.base)

    def loss(
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor,
        images: Tensor,
        epoch: int,
        epochs: int,
    ) -> Tensor:
        rows = weight
        if evolving and step.means is not None:
            new = evolve(step.means.to(rows), rows[step.before :], (epoch + 1) / epochs)
            rows = torch.cat([rows[: step.before], new])
        if pull == "dr":
            value = dot_regression(features, labels, rows)
        else:
            value = F.cross_entropy(logits, labels)
        if old is None:
            return value
        return value + keep * distill_features(features, _of(old, images)[0], labels < step.before)

    return loss


def focal_contrast(step: Step, *, distill: float = 1.0) -> Loss:
    """FNC² onto fixed vertices, and the similarities of a batch as the last model had them."""
    old = step.old

    def loss(features: Tensor, labels: Tensor, weight: Tensor, images: Tensor) -> Tensor:
        value = fnc2(features, labels, weight)
        return (
            value
            if old is None
            else value + distill * distill_relations(features, _of(old, images)[0])
        )

    return loss


@torch.no_grad()
def _of(old: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of the frozen model, which goes where the images are."""
    features, logits = old.to(images.device)(images)
    return features.float(), logits.float()


# --- classifiers ----------------------------------------------------------------------------------


def align(model: Classifier, step: Step) -> None:
    """New rows as long as the old ones."""
    head: Any = model.head
    if step.before:
        head.weight.data = weight_align(head.weight.data, step.before)


def nearest_exemplars(_model: Classifier, known: FeatureSet, _step: Step) -> Classify:
    """The nearest mean of the remembered unit features, by angle (iCaRL)."""
    unit = FeatureSet(F.normalize(known.features, dim=1), known.labels, known.num_classes)
    return ncm(unit, "cosine")


def nearest_mean(_model: Classifier, known: FeatureSet, _step: Step) -> Classify:
    """The nearest class mean by angle."""
    return ncm(known.stats, "cosine")


def streaming_lda(_model: Classifier, known: FeatureSet, _step: Step) -> Classify:
    """LDA with one covariance, from moments."""
    return lda(known.stats)


def projected_ridge(_model: Classifier, known: FeatureSet, _step: Step) -> Classify:
    """Ridge regression on random projections."""
    assert known.labels is not None
    return RanPAC(known.dim, known.num_classes).update(known.features, known.labels)


EVEN = {"sampling": "balanced"}
METHODS: dict[str, Method] = {
    "finetune": Method(cross_entropy, memory=False),
    "replay": Method(cross_entropy),
    "replay-balanced": Method(cross_entropy, train=EVEN),
    "replay-distill": Method(partial(terminus, pull="ce"), train=EVEN),  # etf-ce without vertices
    "cosine-distill": Method(
        partial(terminus, pull="ce"), head="cosine", train=EVEN
    ),  # learned rows
    "icarl": Method(icarl, classify=nearest_exemplars),
    "wa": Method(wa, finish=align),
    "etf-dr": Method(terminus, head="etf", train=EVEN),
    "etf-ce": Method(partial(terminus, pull="ce"), head="etf", train=EVEN),
    "etf-dr-hungarian": Method(terminus, head="etf", train=EVEN, policy="hungarian"),
    "etf-dr-expand": Method(terminus, head="etf", train=EVEN, policy="expand"),
    "nct": Method(
        partial(terminus, evolving=True, distill=50.0),
        head="etf",
        train=EVEN,
        later={"backbone_lr": 0.005},
    ),
    "fnc2": Method(focal_contrast, head="etf", train=EVEN),
    "ncm": Method(cross_entropy, frozen=True, classify=nearest_mean),
    "slda": Method(cross_entropy, frozen=True, classify=streaming_lda),
    "ranpac": Method(cross_entropy, frozen=True, classify=projected_ridge),
}
"""Name → method. ``finetune`` and ``replay`` train all columns so far."""
