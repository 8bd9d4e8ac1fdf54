"""Scorer: a fitted module that maps features to scores, higher = more out-of-distribution."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import (
    InputError,
    atomic_path,
    check_features,
    check_head,
    check_logits,
    logits_of,
    no_autocast,
)
from ncmethods.features import FeatureSet
from ncmethods.stats import ClassStats, FrozenStats

__all__ = ["Scorer", "Train"]

Train: TypeAlias = FeatureSet | ClassStats | FrozenStats
"""What a scorer is fitted on: samples, or moments where those are enough."""

S = TypeVar("S", bound="Scorer")


class Scorer(nn.Module):
    """A fitted out-of-distribution score.

    A subclass has a classmethod ``fit(train, head=None, **hyper)`` that returns ``cls(head, …)``,
    and a method ``score(features, logits)``. It does not override ``__init__``, so that any scorer
    can be saved and loaded.

    The state keeps its precision: ``.to(device)`` moves it, ``.half()`` and the like do not cast
    it. Scores are computed in the dtype of the features, float32 at least; each row alone, so
    chunks give what the whole gives.

    Args:
        head: the classifier's head, for logits that a call does not bring; a frozen copy is kept,
            without the neck.
        fitted: tensors, kept as buffers, and hyperparameters (numbers, strings, booleans, None).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    """What ``score`` uses: ``"features"``, ``"logits"`` or both."""

    def __init__(self, head: nn.Module | None = None, **fitted: Any) -> None:
        super().__init__()
        self.hyper: dict[str, Any] = {}
        for name, value in fitted.items():
            if isinstance(value, Tensor):
                # As they load: other strides round otherwise.
                kept = value.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(name, kept)
            else:
                self.hyper[name] = value
                setattr(self, name, value)
        self.head = None if head is None else _rows_only(head)

    @classmethod
    def fit(cls, *args: Any, **kwargs: Any) -> Any:
        """``fit(train, head=None, **hyper)``: the scorer fitted on ``train``."""
        raise NotImplementedError(f"{cls.__name__} must define fit.")

    def wants(self) -> frozenset[str]:
        """What this instance uses; ``needs`` unless a hyperparameter adds to it."""
        return self.needs

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Scores [N] of checked features [N, D] and logits [N, K]; what is not needed is empty."""
        raise NotImplementedError(f"{type(self).__name__} must define score.")

    def forward(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """Scores [N], higher = more out-of-distribution.

        NaN where a feature is not finite, or a logit is NaN or +∞; logits of −∞ are no class.

        Args:
            features: [N, D]; None where only logits are needed.
            logits: [N, K]; taken from the fitted head if None.

        Raises:
            InputError: what the score needs is missing, or has another D or K than in the fit.
        """
        name, (D, K) = type(self).__name__, self.sizes()
        by_features, by_logits = ("features" in self.needs, "logits" in self.wants())
        makes_logits = by_logits and logits is None
        if features is not None:
            features = check_features(features, D if by_features or makes_logits else None)
        if makes_logits:
            if self.head is None or features is None:
                raise InputError(
                    f"{name} needs logits: pass them, or pass features to a scorer that was fitted "
                    "with head=model.head."
                )
            logits = head_logits(self.head, features)
        if by_features and features is None:
            raise InputError(f"{name} needs features [N, D], got None.")
        x = features if by_features and features is not None else torch.empty(0)
        z = check_logits(logits, K) if by_logits and logits is not None else torch.empty(0)
        if by_features and by_logits and len(x) != len(z):
            raise InputError(f"{name} got {len(x)} rows of features and {len(z)} of logits.")
        with no_autocast((x if by_features else z).device):
            scores = self.score(x, z)
        # Whatever the formula made of rows that are not finite: a clipped infinity looks sound.
        if by_features:
            scores = scores.masked_fill(~x.sum(1).isfinite(), torch.nan)
        if by_logits:
            scores = scores.masked_fill(~z.amax(1).isfinite(), torch.nan)
        return scores

    def sizes(self) -> tuple[int | None, int | None]:
        """D and K of the fit, by which inputs are checked; None where any will do.

        D is the length of the buffer ``center``, K that of the head's logits.
        """
        center, weight = self._buffers.get("center"), getattr(self.head, "weight", None)
        K = getattr(self.head, "out_features", None)
        tells = weight if center is None else center
        return None if tells is None else tells.shape[-1], K

    def confidence(self, features: Tensor | None, logits: Tensor | None = None) -> Tensor:
        """The negative score, as OpenOOD and scikit-learn have it: higher = in-distribution."""
        score: Tensor = self(features, logits)
        return -score

    # --- storage ------------------------------------------------------------------------------

    def _apply(self: S, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S:
        """Follow device moves, never casts; MPS has no float64."""
        device = fn(torch.empty(0)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                low = device.type == "mps" and buffer.dtype == torch.float64
                self._buffers[name] = buffer.to(device, torch.float32 if low else buffer.dtype)
        if self.head is not None:
            self.head.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors: the whole file or none of it."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The safetensors file that :meth:`save` writes."""
        from safetensors.torch import save

        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        kind = None if self.head is None else type(self.head).__name__
        meta = {"scorer": type(self).__name__, "hyper": self.hyper, "head": kind}
        content: bytes = save(
            tensors or {"_": torch.zeros(0)}, {"ncmethods.Scorer": json.dumps(meta)}
        )
        return content

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str], head: nn.Module | None = None) -> S:
        """Read what :meth:`save` wrote.

        Args:
            path: of the file.
            head: a head of the same kind as in the fit, whose tensors are then replaced by the
                saved ones; a plain ``nn.Linear`` is rebuilt without it.

        Raises:
            InputError: the file is missing, damaged, of another scorer, or needs ``head``.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["ncmethods.Scorer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"Cannot read {path} as a scorer: {error}") from error
        known = {one.__name__: one for one in [cls, *_below(cls)]}
        if meta["scorer"] not in known:
            raise InputError(f"{path} holds the scorer {meta['scorer']!r}, not a {cls.__name__}.")
        rows = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        if meta["head"] == "Linear":
            K, D = rows["weight"].shape
            head = nn.Linear(D, K, bias="bias" in rows)
        elif meta["head"] is not None and type(head).__name__ != meta["head"]:
            raise InputError(
                f"{path} was fitted with a {meta['head']}: pass one as head=…, got "
                f"{type(head).__name__}."
            )
        elif meta["head"] is None:
            head = None
        fitted = {k: v for k, v in tensors.items() if k != "_" and not k.startswith("head.")}
        scorer: S = known[meta["scorer"]](head, **fitted, **meta["hyper"])
        if scorer.head is not None:
            scorer.head.to(rows["weight"].dtype).load_state_dict(rows)
        return scorer


# --- what a fit asks of its arguments ---------------------------------------------------------


def moments(train: Train, *, unit: bool = False) -> FrozenStats:
    """The moments of ``train``; with ``unit`` those of its features scaled to unit length.

    Raises:
        InputError: there are no labels, or ``unit`` is asked of raw moments.
    """
    if isinstance(train, FeatureSet):
        frozen = train.frozen
        if not unit:
            return frozen
        made: FrozenStats = frozen.cached("unit", lambda: unit_features(train).frozen)
        return made
    frozen = train if isinstance(train, FrozenStats) else train.freeze()
    if unit != frozen.normalized:
        raise InputError(
            "Moments of unit features cannot be had from raw ones: pass a FeatureSet, or a "
            "ClassStats(..., normalized=True) that was updated with features of unit length."
            if unit
            else "This ClassStats holds features of unit length (normalized=True): fit with "
            "normalize=True, or on raw features."
        )
    return frozen


def unit_features(train: FeatureSet) -> FeatureSet:
    """The same samples with features of unit length."""
    return FeatureSet(F.normalize(train.features, dim=1), train.labels, train.num_classes)


def samples(train: Train, name: str) -> FeatureSet:
    """``train`` without rows whose label is negative.

    Raises:
        InputError: ``train`` holds moments only, or rows that are not finite.
    """
    if not isinstance(train, FeatureSet):
        raise InputError(
            f"{name} needs the samples: pass a FeatureSet (from extract(...)), got "
            f"{type(train).__name__}, which holds moments only."
        )
    keep = torch.ones(len(train), dtype=torch.bool) if train.labels is None else train.labels >= 0
    if not bool(keep.all()):
        train = train.subset(keep)
    if not len(train):
        raise InputError(f"{name} needs at least one training sample, got none.")
    bad = int((~train.features.sum(1).isfinite()).sum())
    if bad:
        raise InputError(f"{bad} training rows hold NaN or Inf. Leave them out, or mend the model.")
    return train


def train_logits(train: FeatureSet, head: nn.Module | None, name: str) -> Tensor:
    """Logits [N, K] of the training samples, their own or the head's.

    Raises:
        InputError: neither is there.
    """
    if train.logits is not None:
        return train.logits
    if head is None:
        raise InputError(
            f"{name} needs the logits of the training samples: extract(...) keeps them, or pass "
            "head=model.head."
        )
    with torch.no_grad():
        return head_logits(_rows_only(head), train.features)


def linear_rows(head: nn.Module | None, name: str, dim: int) -> tuple[Tensor, Tensor]:
    """Rows [K, D] and biases [K] of the classifier in float64; zeros where it has no bias.

    Raises:
        InputError: no head, or rows of another width.
    """
    if head is None:
        raise InputError(f"{name} needs the rows of the classifier: pass head=model.head.")
    found: Any = check_head(head)
    W, b = found.weight.detach().double(), getattr(found, "bias", None)
    if W.ndim != 2 or W.shape[1] != dim:
        raise InputError(
            f"{name} needs rows [K, {dim}] as wide as the features, got {tuple(W.shape)}. Are the "
            "features those that the head acts on?"
        )
    return W, W.new_zeros(len(W)) if b is None else b.detach().double()


def from_nearest(z: Tensor, means: Tensor) -> Tensor:
    """Z − m of the nearest of ``means`` [K, d] to each row of ``z`` [N, d], [N, d].

    A difference, since the products that find the mean lose digits in collapse.
    """
    nearest = (means.square().sum(1) - 2 * (z @ means.T)).argmin(1)
    return z - means.index_select(0, nearest)


def head_logits(head: nn.Module, features: Tensor) -> Tensor:
    """Logits [N, K] of features, in the precision of the head."""
    weight: Any = head.weight
    with no_autocast(features.device):
        return check_logits(logits_of(head, features.to(weight.dtype)))


def _rows_only(head: nn.Module) -> nn.Module:
    """A frozen copy of ``head`` that makes logits of features; the neck stays behind."""
    weight: Any = check_head(head).weight
    neck = getattr(head, "neck", None)
    memo: dict[int, Any] = {} if neck is None else {id(neck): nn.Identity()}
    rows = copy.deepcopy(head, memo).requires_grad_(False).eval()
    return rows if weight.dtype in (torch.float32, torch.float64) else rows.float()


def _below(cls: type[S]) -> list[type[S]]:
    return [c for one in cls.__subclasses__() for c in (one, *_below(one))]
