"""Energies of logits that are made anew of shaped features: ReAct, VRA, ASH, SCALE, DICE."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet
from ncmethods.ood._scorer import (
    Scorer,
    Train,
    _rows_only,
    head_logits,
    linear_rows,
    moments,
    samples,
)
from ncmethods.ood.cosine import unit
from ncmethods.stats import FrozenStats

__all__ = ["ASH", "DICE", "SCALE", "VRA", "ReAct"]


class Shaping(Scorer):
    """−log Σ_c exp(l_c), l the head's logits of ``shaped(features)``.

    Logits that a call brings are not looked at.
    """

    head: nn.Module

    def shaped(self, features: Tensor) -> Tensor:
        """The features [N, D] that the head sees; a new tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define shaped.")

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Energies [N]."""
        return -head_logits(self.head, self.shaped(features)).logsumexp(1)


class ReAct(Shaping):
    """Energy of min(h, τ): no unit of the feature counts more than τ.

    ``fit(train, head, *, quantile=0.9, clip=None)``:

    - ``quantile``: τ is this quantile of all entries of the training features (of the samples,
      then); 0.9 in OpenOOD, 0.99 in ViM's code;
    - ``clip``: τ itself; ``train`` may then be None.

    τ = ∞ is the energy score. Made for features after a ReLU; a fit on signed ones warns.

    References:
        Sun et al., NeurIPS 2021, arXiv:2111.12797.
    """

    clip: Tensor  # []

    @classmethod
    def fit(
        cls,
        train: Train | None = None,
        head: nn.Module | None = None,
        *,
        quantile: float = 0.9,
        clip: float | None = None,
    ) -> ReAct:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        head = _check_shaping(cls.__name__, head, train)
        if clip is not None:
            if not clip > 0:
                raise InputError(f"clip must be positive, got {clip}.")
            return cls(head, clip=torch.tensor(float(clip), dtype=torch.float64))
        x = _check_samples(cls.__name__, train, "clip=…").features
        return cls(head, clip=_quantile(x.flatten(), quantile, "quantile"), quantile=quantile)

    def shaped(self, features: Tensor) -> Tensor:
        """min(h, τ)."""
        return features.clamp(max=self.clip.to(features.dtype))


class VRA(Shaping):
    """Energy of features whose units are cut from both sides: small ones to 0, large ones to high.

    h_d → 0 below low_d, high_d above high_d, and as it is between.

    ``fit(train, head, *, low=0.6, high=0.95, each=True, below="zero")`` needs samples:

    - ``low``, ``high``: quantiles of the training features at which they are cut;
    - ``each``: for each unit its own quantiles; else one pair for all;
    - ``below``: ``"zero"`` as the authors have it, ``"clip"`` raises small entries to low.

    OpenOOD's form is ``low=0.1, high=0.9, each=False, below="clip"``, pytorch-ood's
    ``low=0.01, high=0.99, below="clip"``. The variants VRA+ and VRA++ are not here.

    References:
        Xu et al., NeurIPS 2023, arXiv:2302.11716.
    """

    low: Tensor  # [D] or []
    high: Tensor  # [D] or []
    below: str

    @classmethod
    def fit(
        cls,
        train: Train,
        head: nn.Module | None = None,
        *,
        low: float = 0.6,
        high: float = 0.95,
        each: bool = True,
        below: str = "zero",
    ) -> VRA:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        check_choice(below, ("zero", "clip"), "below")
        head = _check_shaping(cls.__name__, head, train, signed=below == "clip")
        if not low <= high:
            raise InputError(f"low must not exceed high, got {low} and {high}.")
        x = _check_samples(cls.__name__, train).features
        x = x if each else x.flatten()
        return cls(
            head,
            low=_quantile(x, low, "low"),
            high=_quantile(x, high, "high"),
            each=each,
            below=below,
        )

    def shaped(self, features: Tensor) -> Tensor:
        """Features between the two cuts."""
        low, high = self.low.to(features.dtype), self.high.to(features.dtype)
        if self.below == "clip":
            return features.maximum(low).minimum(high)
        return features.masked_fill(features < low, 0.0).minimum(high)


class ASH(Shaping):
    """Energy of pruned features: of each feature only its largest entries are left.

    Of the D entries the k = D − round(``prune``·D) largest stay, with s₁ the sum of all entries and
    s₂ of those that stay:

    - ``variant="p"``: as they are;
    - ``"b"``: each becomes s₁/k, so the sum is kept;
    - ``"s"``: each is multiplied by exp(s₁/s₂).

    Entries that equal the smallest one that stays, stay too; zeros do not, and k in "b" counts what
    stays. So it is decided by the values alone. A zero feature stays zero.

    ``fit(train=None, head, *, variant="s", prune=0.9)``; nothing is estimated. The authors take
    "s" with 0.9 on ImageNet and 0.95 on CIFAR; OpenOOD "b" with 0.9. Made for features after a
    ReLU; a fit on signed ones warns. A head that normalises features does not see the factor of
    "s".

    References:
        Djurisic et al., ICLR 2023, arXiv:2209.09858.
    """

    variant: str
    prune: float

    @classmethod
    def fit(
        cls,
        train: Train | None = None,
        head: nn.Module | None = None,
        *,
        variant: str = "s",
        prune: float = 0.9,
    ) -> ASH:
        """The scorer; of ``train`` only the signs are looked at."""
        check_choice(variant, ("b", "p", "s"), "variant of ASH")
        _check_share(prune=prune)
        head = _check_shaping(cls.__name__, head, train)
        return cls(head, variant=variant, prune=prune)

    def shaped(self, features: Tensor) -> Tensor:
        """Pruned features."""
        least = _largest(features, self.prune)[:, -1:]
        stays = (features >= least) & (features != 0)
        kept = features * stays  # a product: what is not a number stays so
        if self.variant == "p":
            return kept
        if self.variant == "b":
            mean = features.sum(1, keepdim=True) / stays.sum(1, keepdim=True).clamp(min=1)
            return mean * stays
        return kept * _sharper(features, kept)


class SCALE(Shaping):
    """Energy of h·exp(s₁/s₂), s₁ the sum of all entries and s₂ of the largest.

    s₂ adds the D − round(``prune``·D) largest entries of each feature; nothing is pruned. A zero
    feature stays zero.

    ``fit(train=None, head, *, prune=0.85)``; nothing is estimated. Made for features after a ReLU;
    a fit on signed ones warns. A head that normalises features does not see the factor: the score
    is then the energy.

    References:
        Xu et al., ICLR 2024, arXiv:2310.00227 (0.85 in the authors' code).
    """

    prune: float

    @classmethod
    def fit(
        cls, train: Train | None = None, head: nn.Module | None = None, *, prune: float = 0.85
    ) -> SCALE:
        """The scorer; of ``train`` only the signs are looked at."""
        _check_share(prune=prune)
        return cls(_check_shaping(cls.__name__, head, train), prune=prune)

    def shaped(self, features: Tensor) -> Tensor:
        """Scaled features."""
        return features * _sharper(features, _largest(features, self.prune))


class DICE(Scorer):
    """Energy of logits of which only the strongest entries of the rows are left.

    The contribution of an entry is w_cd·μ_d, its part of the logit of the mean feature μ. Entries
    whose contribution is not above the ``sparsity`` quantile of all K·D become 0.

    Fitted from moments. ``fit(train, head, *, sparsity=0.9)``. The authors take 0.9 on CIFAR and
    0.7 on ImageNet. The head must be linear, in the features or in the features at unit length;
    its logits on the axes are the rows. Made for features after a ReLU; a fit on signed ones warns.

    References:
        Sun and Li, ECCV 2022, arXiv:2111.09805.
    """

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    normalize: bool

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None, *, sparsity: float = 0.9) -> DICE:
        """The scorer fitted on ``train``; see the class for its hyperparameter."""
        head = _check_shaping(cls.__name__, head, train)
        stats = moments(train)
        linear_rows(head, cls.__name__, stats.dim)  # of the same width
        W, b, normalize = _linear_form(head, cls.__name__, stats.dim)
        part = W * stats.mean.to(W)
        W = W * (part > _quantile(part.flatten(), sparsity, "sparsity"))
        return cls(None, weight=W, bias=b, sparsity=sparsity, normalize=normalize)

    def sizes(self) -> tuple[int | None, int | None]:
        """D of the rows; logits are made anew."""
        return self.weight.shape[1], None

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Energies [N]."""
        x = unit(features) if self.normalize else features
        return -(x @ self.weight.to(x.dtype).T + self.bias.to(x.dtype)).logsumexp(1)


def _largest(x: Tensor, prune: float) -> Tensor:
    """The D − round(``prune``·D) largest entries of each row, [N, k], falling."""
    D = x.shape[1]
    return x.topk(max(1, D - round(D * prune)), dim=1).values


def _sharper(x: Tensor, kept: Tensor) -> Tensor:
    """exp(s₁/s₂) [N, 1], the sums of two sets of entries; 1 where s₂ vanishes."""
    s1, s2 = x.sum(1, keepdim=True), kept.sum(1, keepdim=True)
    return torch.where(s2 == 0, 0.0, s1 / s2.masked_fill(s2 == 0, 1.0)).exp()


def _quantile(x: Tensor, q: float, name: str) -> Tensor:
    """Quantile along the first axis, as numpy's default, float64; for tensors of any size."""
    if not 0 <= q <= 1:
        raise InputError(f"{name} is a quantile in [0, 1], got {q}.")
    place = q * (len(x) - 1)
    below, above = math.floor(place), math.ceil(place)
    # torch.quantile takes 2²⁴ entries, and kthvalue n² steps on a falling sequence.
    ends = np.partition(x.numpy(force=True), [below, above], axis=0)[[below, above]]
    low, high = torch.from_numpy(ends).to(x.device, torch.float64)
    between: Tensor = low.lerp(high, place - below)
    return between


def _linear_form(head: nn.Module, name: str, dim: int) -> tuple[Tensor, Tensor, bool]:
    """W [K, D], b [K], float64, and whether features are scaled to unit length before them."""
    rows: nn.Module = _rows_only(head).double()
    device = next((t.device for t in (*rows.parameters(), *rows.buffers())), None)
    eye = torch.eye(dim, dtype=torch.float64, device=device)
    with torch.no_grad():
        b = head_logits(rows, torch.zeros_like(eye[:1]))[0]
        W = (head_logits(rows, eye) - b).T
        angles = torch.arange(3 * dim, dtype=torch.float64, device=device).reshape(3, dim)
        x = 2 * (angles.square() + 1).cos()  # features without pattern
        want = head_logits(rows, x)
        for normalize in (False, True):
            if torch.allclose((unit(x) if normalize else x) @ W.T + b, want):
                return W, b, normalize
    raise InputError(
        f"{name} masks the rows of a linear classifier; the logits of {type(head).__name__} are "
        "not linear in the features. Use another score."
    )


def _check_share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is a share of the entries in [0, 1), got {value}.")


def _check_samples(name: str, train: Train | None, instead: str = "") -> FeatureSet:
    if train is None:
        raise InputError(f"{name} needs training features{instead and f', or {instead}'}.")
    return samples(train, name)


def _check_shaping(
    name: str, head: nn.Module | None, train: Train | None, *, signed: bool = False
) -> nn.Module:
    """The head, after a warning where the training features are signed.

    Raises:
        InputError: there is no head.
    """
    if head is None:
        raise InputError(
            f"{name} makes logits of shaped features and needs the classifier: pass "
            "head=model.head."
        )
    if train is None or signed:
        return head
    if isinstance(train, FeatureSet):
        negative = bool((train.features < 0).any())
    else:
        means = (train if isinstance(train, FrozenStats) else train.freeze()).means
        negative = bool((means < 0).any())
    if negative:
        warnings.warn(
            f"{name} is made for features after a ReLU; these have negative entries (a BatchNorm "
            "neck, a transformer, GELU or SiLU give such), where its scores can be worse than "
            "chance.",
            stacklevel=3,
        )
    return head
