"""Target geometries: unit rows [K, D] that a classifier or the class means can be held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_num_classes

__all__ = ["orthogonal_frame", "simplex_etf", "softmax_code"]


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simplex equiangular tight frame: K unit rows, every pair at cosine −1/(K−1).

    Built in float64: Helmert's [K, K−1] orthonormal contrasts, scaled by √(K/(K−1)), times a
    Haar-distributed isometry of R^{K−1} into R^D. It exists for every ``dim ≥ K − 1``.

    Args:
        num_classes: K ≥ 2.
        dim: D.
        rotation: ``"haar"`` draws the isometry (QR of a Gaussian matrix with fixed signs);
            ``"canonical"`` centres the K unit axes and pads with zeros, which needs D ≥ K.
        generator: CPU generator for the Haar isometry; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D too small for a simplex, or an unknown rotation.

    References:
        Papyan, Han, Donoho 2020, arXiv:2008.08186 (definition of the simplex ETF). The Haar draw:
        Mezzadri 2007, arXiv:math-ph/0609050, section "A correct and efficient algorithm".
    """
    K = check_num_classes(num_classes)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    least = K if rotation == "canonical" else K - 1
    if dim < least:
        raise InputError(
            f"A {rotation} simplex ETF of {K} classes needs dim ≥ {least}, got {dim}. "
            f"Widen the features (etf_head(..., dim={least}) adds a linear neck), or drop the "
            "simplex: cosine_head learns its rows in any dimension."
            + (" rotation='haar' needs only K − 1." if dim == K - 1 else "")
        )
    if rotation == "canonical":
        rows = torch.eye(K, dim, dtype=torch.float64)
        rows[:, :K] -= 1 / K
    else:
        rows = _helmert(K) @ _haar_isometry(dim, K - 1, generator).T
    return (rows * math.sqrt(K / (K - 1))).to(dtype)


def orthogonal_frame(
    num_classes: int,
    dim: int,
    *,
    rotation: str = "haar",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Orthonormal frame: K unit rows, every pair at cosine 0; needs ``dim ≥ K``.

    The geometry of class means that are *not* centred (bias-free or non-negative features);
    centring it gives a simplex ETF.

    Args:
        num_classes: K ≥ 2.
        dim: D ≥ K.
        rotation: ``"haar"`` draws the rows from the Haar measure, ``"canonical"`` takes the axes.
        generator: CPU generator for the Haar draw; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: D < K, or an unknown rotation.

    References:
        Mezzadri 2007, arXiv:math-ph/0609050, section "A correct and efficient algorithm".
    """
    K = check_num_classes(num_classes)
    check_choice(rotation, ("haar", "canonical"), "rotation")
    if dim < K:
        raise InputError(
            f"An orthogonal frame of {K} classes needs dim ≥ {K}, got {dim}. "
            "simplex_etf needs only K − 1."
        )
    if rotation == "canonical":
        return torch.eye(K, dim, dtype=dtype)
    return _haar_isometry(dim, K, generator).T.to(dtype)


def softmax_code(
    num_classes: int,
    dim: int,
    *,
    steps: int = 1500,
    restarts: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Softmax code: K unit rows with the largest one-vs-rest margin that ``dim`` allows.

    The margin is min_k dist(w_k, conv{w_j, j ≠ k}). It takes over from the simplex ETF where there
    are more classes than D + 1. Known optima are built: a simplex ETF for K ≤ D + 1; for K ≤ 2D a
    simplex of 2D − K + 2 rows beside K − D − 1 antipodal pairs, orthogonal to it and to each other
    (margin 1; K = 2D is the orthoplex); the regular K-gon for D = 2.

    Everything else is searched for, in float64: Adam on rows and directions with an annealed
    log-sum-exp, from several starts at once, of which the best is returned. That is a good local
    optimum, not a proof. ``metrics.one_vs_rest_margin`` tells the margin that was reached,
    ``metrics.min_angle`` the smallest angle, in degrees. Each step holds a few tensors of
    ``restarts`` · K² numbers.

    Args:
        num_classes: K ≥ 2.
        dim: D; at least 2 where K > 2.
        steps: of the search.
        restarts: starts that are searched side by side; if None, 40 000 / K², from 1 to 32.
        generator: CPU generator for the starts and the rotation; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D]. The best code is unique at most up to rotations and the numbering of its rows.

    Raises:
        InputError: more than two rows in one dimension; ``dim``, ``steps`` or ``restarts`` < 1.

    References:
        Jiang et al. 2023, arXiv:2310.05351 (softmax codes). Alcala et al. 2026, arXiv:2603.20587
        (D + 2 ≤ K ≤ 2D).
    """
    K = check_num_classes(num_classes)
    if restarts is None:
        restarts = max(1, min(32, 40_000 // K**2))
    for name, value in (("dim", dim), ("steps", steps), ("restarts", restarts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer ≥ 1, got {value!r}.")
    if dim == 1 and K > 2:
        raise InputError(
            f"One dimension has two unit rows, got num_classes = {K}. A code of three or more "
            "classes needs dim ≥ 2."
        )
    if dim >= K - 1:
        return simplex_etf(K, dim, generator=generator, dtype=dtype)
    if 2 * dim >= K:
        pairs = K - dim - 1
        n = K - 2 * pairs
        rows = torch.zeros(K, dim, dtype=torch.float64)
        rows[:n, : n - 1] = _helmert(n) * math.sqrt(n / (n - 1))
        axes = torch.eye(pairs, dtype=torch.float64)
        rows[n:, n - 1 :] = torch.stack((axes, -axes), dim=1).flatten(0, 1)
    elif dim == 2:
        angle = torch.arange(K, dtype=torch.float64) * (2 * math.pi / K)
        rows = torch.stack((angle.cos(), angle.sin()), dim=1)
    else:
        return _search_code(K, dim, steps, restarts, generator).to(dtype)
    return (rows @ _haar_isometry(dim, dim, generator).T).to(dtype)


def _search_code(
    num_classes: int, dim: int, steps: int, restarts: int, generator: torch.Generator | None
) -> Tensor:
    """Rows [K, D] of the best of several searches for a softmax code.

    dist(w_k, conv{w_j}) is the maximum over unit directions h_k of min_j ⟨w_k − w_j, h_k⟩, so rows
    and directions together maximise min_{k, j≠k} ⟨w_k − w_j, h_k⟩: cross-entropy in the limit of
    large scale. The minimum is softened, with β from 2 to 10⁴.
    """
    first, last = 2.0, 1e4

    def unit_and_gaps(points: Tensor) -> tuple[Tensor, Tensor]:
        U = F.normalize(points, dim=-1)
        S = U[1] @ U[0].mT  # [R, K, K]: ⟨h_k, w_j⟩
        return U, (S - S.diagonal(dim1=-2, dim2=-1)[..., None]).masked_fill(same, -math.inf)

    with torch.inference_mode(False), torch.enable_grad():
        same = torch.eye(num_classes, dtype=torch.bool)
        start = torch.randn(restarts, num_classes, dim, dtype=torch.float64, generator=generator)
        points = torch.stack((start, start)).requires_grad_()  # rows and directions [2, R, K, D]
        optimizer = torch.optim.Adam([points], betas=(0.9, 0.99))
        for step in range(steps):
            beta = first * (last / first) ** (step / steps)
            optimizer.param_groups[0]["lr"] = 0.1 * 1e-3 ** (step / steps)
            gaps = unit_and_gaps(points)[1] * beta
            optimizer.zero_grad()
            gaps.flatten(1).logsumexp(1).div(beta).sum().backward()
            optimizer.step()
    U, gaps = unit_and_gaps(points.detach())
    best: Tensor = U[0, gaps.flatten(1).amax(1).argmin()]
    return best


def _helmert(num_classes: int) -> Tensor:
    """Orthonormal basis [K, K−1] of the contrasts: columns orthogonal to the ones vector."""
    j = torch.arange(1, num_classes, dtype=torch.float64)
    below = torch.ones(num_classes, num_classes - 1, dtype=torch.float64).triu()
    below[1:].diagonal().copy_(-j)
    return below / (j * (j + 1)).sqrt()


def _haar_isometry(dim: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """Haar-distributed [dim, rank] matrix with orthonormal columns, float64."""
    gaussian = torch.randn(dim, rank, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    signs = R.diagonal().sign()
    isometry: Tensor = Q * torch.where(signs == 0, torch.ones_like(signs), signs)
    return isometry
