"""Fitting a frame to class means: the nearest simplex ETF, and which row goes to which class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncmethods._core import InputError, no_autocast
from ncmethods.frames._haar import simplex_rows

__all__ = ["assign", "nearest_etf"]


def nearest_etf(
    means: Tensor,
    *,
    prior: Tensor | None = None,
    weight: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Simplex ETF nearest to class means, in closed form.

    With ĥ_c the means, centred and scaled so that Σ_c a_c ĥ_c = 0 and Σ_c a_c ‖ĥ_c‖² = 1,
    P [D, K−1] the isometry of a frame F = √(K/(K−1)) Q Pᵀ (Q: Helmert's contrasts) and P₀ that of
    ``prior``, it minimises

        Σ_c a_c ‖ĥ_c − f_c/√K‖² + (weight/2) ‖P − P₀‖².

    On isometries both squares are linear, so P is the polar factor of
    (2/√(K−1)) Ĥᵀ diag(a) Q + weight · P₀: one decomposition. First derivatives with respect to
    ``means`` are exact, also where all singular values are equal, as they are at an ETF; higher
    ones are not.

    Args:
        means: [..., K, D], D ≥ K − 1. A row with NaN (a class without samples) has no say.
        prior: frame [K, D] that the result is pulled to, such as the last one.
        weight: δ ≥ 0 of the pull.
        class_weight: a_c ≥ 0, [K]; scaled to mean 1 here. Equal if None.

    Returns:
        frame [..., K, D] in the dtype and on the device of ``means``.

    Raises:
        InputError: shapes that do not fit, D < K − 1, a negative weight, or a weight without prior.

    References:
        Markou, Ajanthan, Gould 2024, arXiv:2411.01248 (the objective, solved there by Riemannian
        trust regions).
    """
    if means.ndim < 2 or means.shape[-2] < 2 or not means.is_floating_point():
        raise InputError(
            f"means must be floating [..., K, D] with K ≥ 2, got {means.dtype} "
            f"{tuple(means.shape)}."
        )
    K, D = means.shape[-2:]
    if D < K - 1:
        raise InputError(
            f"A simplex ETF of {K} classes needs dim ≥ {K - 1}, got means of width {D}. "
            "spread and softmax_code have frames for it, and assign fits their numbering."
        )
    if weight < 0 or (weight > 0) != (prior is not None):
        raise InputError(
            f"prior and a weight > 0 go together, got weight = {weight} and "
            f"{'no prior' if prior is None else 'a prior'}."
        )
    for name, tensor, shape in (("prior", prior, (K, D)), ("class_weight", class_weight, (K,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name} must be {list(shape)}, got {list(tensor.shape)}.")
    # MPS has no float64.
    dtype = torch.float32 if means.device.type == "mps" else torch.float64
    with no_autocast(means.device):
        seen = ~means.isnan().any(-1, keepdim=True)
        H = torch.where(seen, means.to(dtype), 0.0)
        a = seen.to(H) if class_weight is None else seen * class_weight.to(H)[:, None]
        a = K * a / _or_one(a.sum(-2, keepdim=True))  # [..., K, 1], mean 1
        size = (a * H.square()).sum((-2, -1), keepdim=True)
        H = H - (a * H).mean(-2, keepdim=True)
        spread = (a * H.square()).sum((-2, -1), keepdim=True)
        # Equal means (or a single one) say nothing; rounding must not speak for them.
        equal = spread <= (K * torch.finfo(dtype).eps) ** 2 * size
        H = a * H * torch.where(equal, 0.0, 1 / spread.masked_fill(equal, 1.0).sqrt())
        F = simplex_rows(K).to(H)  # √(K/(K−1)) Q
        A = 2 / math.sqrt(K) * H.mT @ F
        if prior is not None:
            A = A + weight * (K - 1) / K * prior.to(H).mT @ F
        return (F @ _polar(A).mT).to(means.dtype)


def _or_one(x: Tensor) -> Tensor:
    return x.masked_fill(x == 0, 1.0)


def _polar(A: Tensor) -> Tensor:
    """Orthonormal polar factor of A [..., D, r], D ≥ r, with its first derivative.

    The derivative is written down: that of an SVD divides by differences of singular values.
    """
    with torch.no_grad():
        U, S, Vh = _thin_svd(A)
        floor = S[..., :1] * max(A.shape[-2:]) * torch.finfo(S.dtype).eps
        small = floor >= S
        inverse = torch.where(small, 0.0, 1 / S.masked_fill(small, 1.0))
        pairs = S[..., :, None] + S[..., None, :]
        pairs = torch.where(pairs <= 2 * floor[..., None], torch.inf, pairs)
        P = U @ Vh
        P = 1.5 * P - 0.5 * P @ (P.mT @ P)  # one Newton–Schulz step: orthonormal to rounding
    dA = A - A.detach()  # zero; it carries the gradient
    turned = U.mT @ dA @ Vh.mT
    inside = (turned - turned.mT) / pairs
    outside = (dA @ Vh.mT - U @ turned) * inverse[..., None, :]
    result: Tensor = P + (U @ inside + outside) @ Vh
    return result


def _thin_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., D, r], S [..., r] (largest first) and Vh of A, from AᵀA where that is safe.

    LAPACK's divide and conquer may not converge where nearly all singular values are equal; the
    eigenvectors of AᵀA then are exact enough, and faster.
    """
    if not torch.compiler.is_compiling():  # a compiled graph cannot look at the values
        values, V = torch.linalg.eigh(A.mT @ A)
        values, V = values.flip(-1), V.flip(-1)
        if bool((values[..., -1] > 1e-8 * values[..., 0]).all()):
            S = values.sqrt()
            return A @ V / S[..., None, :], S, V.mT
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vh


def assign(frame: Tensor, means: Tensor) -> Tensor:
    """Which row of a frame each class should get: the numbering with the largest sum of cosines.

    ``frame[assign(frame, means)]`` has the rows in the order of the classes. A frame may have more
    rows than there are classes. Solved exactly (Hungarian method, scipy).

    Args:
        frame: rows [R, D].
        means: class means [K, D], K ≤ R; centred by you if the frame is. A row of zeros or with NaN
            takes what is left.

    Returns:
        index [K] int64, distinct, on the device of ``means``.

    Raises:
        InputError: shapes that do not fit, or fewer rows than classes.

    References:
        Crouse 2016, doi:10.1109/TAES.2016.140952 (the algorithm in scipy).
    """
    if frame.ndim != 2 or means.ndim != 2 or frame.shape[1] != means.shape[1]:
        raise InputError(
            "frame must be [R, D] and means [K, D] of one width, got "
            f"{tuple(frame.shape)} and {tuple(means.shape)}."
        )
    if len(frame) < len(means):
        raise InputError(
            f"A frame of {len(frame)} rows cannot serve {len(means)} classes one row each."
        )
    from scipy.optimize import linear_sum_assignment

    rows, M = (t.detach().cpu().double() for t in (frame, means))
    rows, M = (
        (t / torch.linalg.vector_norm(t, dim=1, keepdim=True)).nan_to_num(0.0) for t in (rows, M)
    )
    _, column = linear_sum_assignment((M @ rows.T).numpy(), maximize=True)
    return torch.as_tensor(column, dtype=torch.int64, device=means.device)
