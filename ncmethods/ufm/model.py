"""The model: what is minimised, over what, and for which samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice, check_counts, check_num_classes

__all__ = ["UFM", "label_sets", "mixup_targets"]

LOSSES = ("ce", "mse", "label-smoothing", "focal", "supcon", "pick-all-label", "regression")
CONSTRAINTS = ("ridge", "sphere", "nonnegative")
BIASES = ("none", "free", "ridge")


@dataclass(frozen=True, eq=False)
class UFM:
    """An unconstrained-features model: a loss over free features and the layers that read them.

    With features h_i, layers W_1 … W_L, bias b and logits z_i = W_L … W_1 h_i + b it is

        1/N Σ_i ℓ(z_i, t_i) + ½ Σ_i λ_H ‖h_i‖² + ½ Σ_l λ_W ‖W_l‖² + ½ λ_b ‖b‖².

    The sum over features is not divided by N: papers that write λ/2N ‖H‖² have ``ridge_h = λ/N``,
    and λ/2K ‖W‖² is ``ridge_w = λ/K``.

    Args:
        num_classes: K ≥ 2, the number of outputs.
        dim: D, of the features.
        counts: samples for each row of the targets (of each class): one number, or [M].
            ``data.long_tail_counts`` has the balanced, step and exponential profiles.
        loss: ``"ce"``, ``"mse"`` and ``"regression"`` (½‖z − t‖²), ``"label-smoothing"``,
            ``"focal"``, ``"pick-all-label"`` (softmax loss summed over the labels of a sample), or
            ``"supcon"``, which has no layers.
        ridge_w: λ_W, one number or one per layer.
        ridge_h: λ_H, one number or one per row of the targets; λ/(K n_k) is the penalty of the
            layer-peeled model, which weighs classes alike.
        ridge_b: λ_b, with ``bias="ridge"``.
        constraint: ``"ridge"`` is the formula above; ``"nonnegative"`` adds h ≥ 0; ``"sphere"``
            puts features and rows on the unit sphere instead of the penalties. The features of
            SupCon are on the sphere in any case.
        bias: ``"none"``, ``"free"`` (without penalty) or ``"ridge"``.
        depth: L ≥ 1.
        relu: rectify between the layers.
        width: of the hidden layers; D if None.
        targets: t [M, K] with M rows: mixed labels, label sets of 0 and 1, regression targets (see
            :func:`mixup_targets`, :func:`label_sets`). One-hot if None, then M = K.
        weight: fixed rows [K, D] of the only layer, such as a frame; learned if None.
        folded: one feature for each row of the targets in the place of its samples. The minimum is
            the same for losses that are convex in the logits; the size no longer depends on N.
        epsilon: share ε of the uniform distribution, for ``"label-smoothing"``.
        gamma: γ of ``"focal"``.
        temperature: τ, what cosines are divided by (``"sphere"`` and ``"supcon"``).
        anchor: features H₀ [N, D] and β ≥ 0 of a further term β/2N ‖H − H₀‖², the perturbed model.

    Raises:
        InputError: parts that do not fit each other; the message says which.

    References:
        Mixon, Parshall, Pi, arXiv:2011.11619 (the first such model). Tirer and Bruna 2022,
        arXiv:2202.08087 (penalties, bias, depth). Fang et al. 2021, arXiv:2101.12699
        (layer-peeled model). Tirer, Huang, Niles-Weed 2023, arXiv:2210.16658 (perturbed model).
    """

    num_classes: int
    dim: int
    counts: int | Sequence[int] | Tensor = 1
    loss: str = "ce"
    ridge_w: float | Sequence[float] = 5e-3
    ridge_h: float | Sequence[float] = 5e-3
    ridge_b: float = 0.0
    constraint: str = "ridge"
    bias: str = "none"
    depth: int = 1
    relu: bool = False
    width: int | None = None
    targets: Tensor | None = None
    weight: Tensor | None = None
    folded: bool = False
    epsilon: float = 0.1
    gamma: float = 2.0
    temperature: float = 1.0
    anchor: tuple[Tensor, float] | None = None

    def __post_init__(self) -> None:
        K = check_num_classes(self.num_classes)
        check_choice(self.loss, LOSSES, "loss")
        check_choice(self.constraint, CONSTRAINTS, "constraint")
        check_choice(self.bias, BIASES, "bias")
        for name, size in (("dim", self.dim), ("depth", self.depth), ("width", self.hidden)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{name} must be an integer ≥ 1, got {size!r}.")
        if self.targets is not None and (self.targets.ndim != 2 or self.targets.shape[1] != K):
            raise InputError(
                f"targets must be [M, K] with K = {K}, got {tuple(self.targets.shape)}."
            )
        if self.targets is None and self.loss in ("pick-all-label", "regression"):
            raise InputError(
                f"loss={self.loss!r} needs targets [M, K]: "
                + ("see label_sets." if self.loss == "pick-all-label" else "a row per sample.")
            )
        n = self.numbers
        if bool((n < 1).any()) or bool((n != n.round()).any()):
            raise InputError(f"counts must be whole numbers ≥ 1, got {n.tolist()}.")
        self._check_penalties()
        self._check_parts()

    def _check_penalties(self) -> None:
        for name, value, size in (
            ("ridge_w", self.ridge_w, self.depth),
            ("ridge_h", self.ridge_h, self.rows),
            ("ridge_b", self.ridge_b, 1),
        ):
            given = torch.as_tensor(value, dtype=torch.float64)
            if given.ndim and len(given) != size:
                raise InputError(f"{name} must be a number or {size} of them, got {len(given)}.")
            if not bool(((given >= 0) & given.isfinite()).all()):
                raise InputError(f"{name} must be finite and ≥ 0, got {value}.")
        if (self.bias == "ridge") != (self.ridge_b > 0):
            raise InputError(
                f"bias='ridge' and ridge_b > 0 go together, got bias={self.bias!r} and ridge_b="
                f"{self.ridge_b}. A bias without penalty is bias='free'."
            )
        if not 0 <= self.epsilon <= 1:
            raise InputError(f"epsilon must lie in [0, 1], got {self.epsilon}.")
        if not self.gamma >= 0 or not self.temperature > 0:
            raise InputError(
                f"gamma ≥ 0 and temperature > 0, got {self.gamma} and {self.temperature}."
            )

    def _check_parts(self) -> None:
        alone = self.depth == 1 and self.bias == "none" and self.weight is None
        if self.loss == "supcon" and not (
            alone and self.targets is None and not self.folded and self.constraint != "ridge"
        ):
            raise InputError(
                "loss='supcon' acts on unit features alone: constraint='sphere' (or 'nonnegative' "
                "for rectified features), one-hot targets, no bias, layers, weight or folding."
            )
        if self.constraint == "sphere" and (self.depth > 1 or self.bias != "none"):
            raise InputError("constraint='sphere' goes with depth=1 and bias='none'.")
        if self.weight is not None and (
            self.depth > 1 or tuple(self.weight.shape) != (self.num_classes, self.dim)
        ):
            raise InputError(
                f"weight must be [K, D] = [{self.num_classes}, {self.dim}] with depth=1, got "
                f"{tuple(self.weight.shape)} with depth={self.depth}."
            )
        if self.loss == "focal" and not self.one_hot:
            raise InputError("loss='focal' needs one-hot targets.")
        if self.relu and self.depth == 1:
            raise InputError(
                "relu=True acts between layers: depth ≥ 2, or constraint='nonnegative'."
            )
        if self.anchor is not None:
            H, beta = self.anchor
            if tuple(H.shape) != (self.rows_of_features, self.dim) or not beta >= 0:
                raise InputError(
                    f"anchor must be (H₀ [{self.rows_of_features}, {self.dim}], β ≥ 0), got "
                    f"{tuple(H.shape)} and β = {beta}."
                )

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return self.dim if self.width is None else self.width

    @property
    def one_hot(self) -> bool:
        """Whether the targets are the classes, one row each in their order."""
        return self.targets is None or torch.equal(
            self.targets.double().cpu(), torch.eye(self.num_classes, dtype=torch.float64)
        )

    @property
    def table(self) -> Tensor:
        """Targets [M, K] in float64."""
        if self.targets is None:
            return torch.eye(self.num_classes, dtype=torch.float64)
        return self.targets.detach().cpu().double()

    @property
    def rows(self) -> int:
        """M, the number of rows of the targets."""
        return self.num_classes if self.targets is None else len(self.targets)

    @property
    def numbers(self) -> Tensor:
        """Samples of each row of the targets, float64 [M]."""
        if isinstance(self.counts, int):
            return check_counts([self.counts] * self.rows).double()
        return check_counts(self.counts, self.rows).detach().cpu().double()

    @property
    def N(self) -> int:
        """Number of samples."""
        return int(self.numbers.sum())

    @property
    def balanced(self) -> bool:
        """Whether all rows of the targets have as many samples and one penalty."""
        return all(len(set(t.tolist())) == 1 for t in (self.numbers, self.penalty_h))

    @property
    def index(self) -> Tensor:
        """Row of the targets that each feature belongs to, int64."""
        rows = torch.arange(self.rows)
        return rows if self.folded else rows.repeat_interleave(self.numbers.long())

    @property
    def rows_of_features(self) -> int:
        """How many features there are, N, or M if folded."""
        return self.rows if self.folded else self.N

    @property
    def penalty_h(self) -> Tensor:
        """λ_H of a sample of each row of the targets, float64 [M]."""
        return torch.as_tensor(self.ridge_h, dtype=torch.float64).expand(self.rows)

    @property
    def penalty_w(self) -> Tensor:
        """λ_W of each layer, float64 [L]."""
        return torch.as_tensor(self.ridge_w, dtype=torch.float64).expand(self.depth)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What is optimised, and its shape; layer l is ``layer0`` … ``layer{L−1}``."""
        out: dict[str, tuple[int, ...]] = {"features": (self.rows_of_features, self.dim)}
        if self.loss != "supcon" and self.weight is None:
            widths = [self.dim, *[self.hidden] * (self.depth - 1), self.num_classes]
            for i, (wide, high) in enumerate(itertools.pairwise(widths)):
                out[f"layer{i}"] = (high, wide)
        if self.bias != "none":
            out["bias"] = (self.num_classes,)
        return out

    @property
    def threshold(self) -> float:
        """Largest λ_H^½ Π λ_W^½ · N/√n_k (K √(nλ_Hλ_W) of a balanced model of one layer).

        From 1 on the minimum of the balanced MSE model of one layer is at zero.
        """
        product = (self.penalty_h * self.penalty_w.prod()).sqrt()
        return float((product * self.N / self.numbers.sqrt()).max())


def mixup_targets(num_classes: int, shares: Sequence[float] = (0.5,)) -> Tensor:
    """Targets of mixup: the K classes, then a e_i + (1−a) e_j of each pair i < j and share a.

    Args:
        num_classes: K.
        shares: values of a in (0, 1).

    Returns:
        float64 [K + A · K(K−1)/2, K].

    Raises:
        InputError: a share outside (0, 1).
    """
    eye = torch.eye(check_num_classes(num_classes), dtype=torch.float64)
    if not all(0 < a < 1 for a in shares):
        raise InputError(f"shares must lie in (0, 1), got {list(shares)}.")
    pairs = itertools.product(itertools.combinations(range(num_classes), 2), shares)
    return torch.stack([*eye, *(a * eye[i] + (1 - a) * eye[j] for (i, j), a in pairs)])


def label_sets(num_classes: int, sizes: Sequence[int] = (1, 2)) -> Tensor:
    """Multi-hot targets: all sets of labels of the given sizes, in lexicographic order.

    Args:
        num_classes: K.
        sizes: numbers of labels, each from 1 to K.

    Returns:
        float64 [Σ_s (K choose s), K].

    Raises:
        InputError: a size outside 1 … K.
    """
    eye = torch.eye(check_num_classes(num_classes), dtype=torch.float64)
    if not sizes or not all(1 <= s <= num_classes for s in sizes):
        raise InputError(f"sizes must lie in 1 … K = {num_classes}, got {list(sizes)}.")
    if sum(math.comb(num_classes, s) for s in sizes) > 100_000:
        raise InputError("More than 100 000 label sets: take smaller sets or fewer classes.")
    sets = [c for s in sizes for c in itertools.combinations(range(num_classes), s)]
    return torch.stack([eye[list(c)].sum(0) for c in sets])
