"""One-vs-rest margin: how far each row lies from the convex hull of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ncmethods._core import InputError
from ncmethods.metrics._tiles import unit

__all__ = ["one_vs_rest_margin"]


def one_vs_rest_margin(rows: Tensor, *, steps: int = 2000, tol: float = 1e-9) -> Tensor:
    """Smallest distance of a unit row to the convex hull of the others, [].

    All K problems are solved at once by accelerated projected gradient on the simplex; the result
    is an upper bound that is within ``tol`` of the optimum by its duality gap, or after ``steps``.
    Simplex ETF: K/(K−1); orthoplex: 1; regular n-gon: 1 − cos(2π/n).

    Args:
        rows: [K, D]; normalised here.
        steps: at most.
        tol: duality gap at which to stop, in squared distance.

    Raises:
        InputError: fewer than two rows.

    References:
        Jiang et al. 2023, arXiv:2310.05351, Definition of the one-vs-rest distance.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"rows must be [K, D] with K ≥ 2, got shape {tuple(rows.shape)}.")
    W = unit(rows.detach().double())
    if not bool(W.isfinite().all()):
        raise InputError("rows must be finite and not zero: a zero row has no direction.")
    K = len(W)
    G = W @ W.T
    step = 1 / torch.linalg.matrix_norm(G, 2)
    off = ~torch.eye(K, dtype=torch.bool, device=W.device)
    P = off.double() / (K - 1)  # row k: weights of the others
    Y, t = P, 1.0
    for i in range(steps):
        Z = _simplex(Y - step * (Y @ G - G), off)
        t_next = 0.5 * (1 + (1 + 4 * t * t) ** 0.5)
        Y, P, t = Z + (t - 1) / t_next * (Z - P), Z, t_next
        if i % 20 == 19:
            slope = P @ G - G  # gradient of ½‖p W − w_k‖²
            best = slope.masked_fill(~off, torch.inf).min(1).values
            if float(((P * slope).sum(1) - best).max()) < tol:
                break
    distance: Tensor = torch.linalg.vector_norm(P @ W - W, dim=1)
    return distance.min()


def _simplex(V: Tensor, allowed: Tensor) -> Tensor:
    """Euclidean projection of each row onto the probability simplex over the allowed entries."""
    ordered = V.masked_fill(~allowed, -torch.inf).sort(1, descending=True).values
    cumulative = ordered.nan_to_num(neginf=0).cumsum(1) - 1
    index = torch.arange(1, V.shape[1] + 1, device=V.device, dtype=V.dtype)
    rho = (ordered - cumulative / index > 0).sum(1, keepdim=True)
    theta = cumulative.gather(1, rho - 1) / rho
    return (V - theta).clamp(min=0) * allowed
