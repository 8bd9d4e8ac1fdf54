"""Frames with prescribed cosines inside and between groups of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.frames._haar import check_dim, place

__all__ = ["hierarchical", "multi_centre"]


def hierarchical(
    num_classes: int,
    dim: int,
    *,
    groups: Tensor | Sequence[int] | Sequence[Sequence[int]],
    sibling: float | Sequence[float] = 0.5,
    other: float | None = None,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Hierarchical frame: one cosine for classes of one group, another for all other pairs.

    The Gram matrix is written down and factored (one eigendecomposition), so all cosines are exact.
    A deeper tree has several levels of groups, from coarse to fine, and one sibling cosine for
    each; a pair takes that of the finest level on which it shares a group.

    Args:
        num_classes: K ≥ 2.
        dim: D; at least the rank of the Gram matrix, which is K, or K − 1 at the lowest ``other``.
        groups: group of each class [K], or one such row for each level [L, K], coarse to fine.
        sibling: cosine of two classes of one group; L of them for L levels. Less than 1.
        other: cosine of two classes without a common group; if None, the lowest that the others
            allow, as in a simplex.
        rotation: ``"haar"`` turns the rows by a Haar isometry, ``"canonical"`` pads them.
        generator: CPU generator for the Haar draw; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: levels that do not nest, cosines that no unit rows have (the message gives the
            bounds), or D less than the rank.

    References:
        Tong, Davis 2023, arXiv:2303.05689 (hierarchy-aware frame, from a matrix of tree distances).
    """
    K, D = check_dim(num_classes, dim)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    levels = torch.as_tensor(groups)
    levels = levels[None] if levels.ndim == 1 else levels
    cosines = [float(c) for c in ([sibling] if isinstance(sibling, int | float) else sibling)]
    if levels.ndim != 2 or levels.shape[1] != K or levels.is_floating_point():
        raise InputError(
            f"groups must hold an integer for each of the {K} classes, [K] or [L, K], got "
            f"{levels.dtype} {tuple(levels.shape)}."
        )
    if len(cosines) != len(levels) or not all(-1 <= c < 1 for c in cosines):
        raise InputError(
            f"sibling must be one cosine in [−1, 1) for each of the {len(levels)} levels of "
            f"groups, got {sibling!r}."
        )
    shared = levels[:, :, None] == levels[:, None, :]  # [L, K, K]
    if bool((shared[1:] & ~shared[:-1]).any()):
        raise InputError(
            "Levels of groups must nest, from coarse to fine: classes that share a group on one "
            "level must share one on every level before it."
        )
    inner = torch.zeros(K, K, dtype=torch.float64)  # Gram matrix without the pairs of no group
    for same, cosine in zip(shared, cosines, strict=True):
        inner[same] = cosine
    inner.fill_diagonal_(1)
    apart = (~shared[0]).double()
    low, high = _bounds(inner, apart, cosines)
    if other is None:
        other = low
    gram = inner + other * apart
    values, vectors = torch.linalg.eigh(gram)
    slack = 16 * K * torch.finfo(torch.float64).eps * float(values[-1])
    if float(values[0]) < -slack:
        raise InputError(
            f"No unit rows have sibling = {sibling} and other = {other}: with these groups and "
            f"sibling cosines, other must lie in [{low:.6g}, {high:.6g}]."
        )
    keep = values > slack
    rank = int(keep.sum())
    if rank > D:
        raise InputError(
            f"These cosines need dim ≥ {rank}, the rank of their Gram matrix, got {D}. "
            "Widen the features with a neck"
            + (
                f"; other = None (the lowest, {low:.6g}) needs less."
                if other > low + 1e-9
                else ", or take fewer rows; spread and softmax_code take any number of rows."
            )
        )
    return place(vectors[:, keep] * values[keep].sqrt(), D, rotation, generator).to(dtype)


def _bounds(inner: Tensor, apart: Tensor, cosines: list[float]) -> tuple[float, float]:
    """The interval of c for which inner + c · apart is positive semi-definite.

    With inner = LLᵀ it is so where I + c · L⁻¹ apart L⁻ᵀ is.
    """
    L, info = torch.linalg.cholesky_ex(inner)
    if int(info) or float(L.diagonal().min()) < 1e-6:
        raise InputError(
            f"No unit rows have sibling = {cosines}: the cosine of n siblings must exceed "
            "−1/(n−1), and that of a finer level should not be below that of the coarser one."
        )
    half = torch.linalg.solve_triangular(L, apart, upper=False)
    ends = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))
    if float(ends[-1]) <= 0:  # one group: no pair is apart
        return 0.0, 0.0
    return max(-1.0, -1 / float(ends[-1])), min(1.0, -1 / float(ends[0]))


def multi_centre(
    num_classes: int,
    dim: int,
    *,
    centres: int | Sequence[int] = 2,
    sibling: float = 0.5,
    other: float | None = None,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multi-centre frame: M unit rows for each class, at one cosine inside and one between classes.

    A hierarchical frame whose groups are the classes. Rows are ordered by class: row c·M + m is
    centre m of class c. With ``sibling = -1/(K·M − 1)`` all K·M rows are one simplex.

    Args:
        num_classes: K ≥ 2.
        dim: D; at least K·M − 1 at the lowest ``other``, else K·M.
        centres: M, or one number for each class.
        sibling: cosine of two centres of one class, less than 1.
        other: cosine of centres of different classes; if None, the lowest that ``sibling`` allows.
        rotation: ``"haar"`` or ``"canonical"``, as in :func:`hierarchical`.
        generator: CPU generator for the Haar draw; the global one if None.
        dtype: of the result.

    Returns:
        frame [K·M, D], or [Σ M_c, D].

    Raises:
        InputError: as :func:`hierarchical`; ``centres`` that are no integers ≥ 1.
    """
    K, D = check_dim(num_classes, dim)
    each = list(centres) if isinstance(centres, Sequence) else [centres] * K
    if len(each) != K or not all(type(m) is int and m >= 1 for m in each):
        raise InputError(
            f"centres must be an integer ≥ 1, or one for each of the {K} classes, got {centres!r}."
        )
    owner = torch.arange(K).repeat_interleave(torch.tensor(each))
    return hierarchical(
        len(owner),
        D,
        groups=owner,
        sibling=sibling,
        other=other,
        rotation=rotation,
        generator=generator,
        dtype=dtype,
    )
