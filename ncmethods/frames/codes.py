"""More classes than D + 1: frames that are searched for where no closed form is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames._cache import remember
from ncmethods.frames._haar import check_dim, check_positive, haar_isometry, simplex_rows
from ncmethods.frames.simplex import simplex_etf

__all__ = ["softmax_code", "spread"]

# Hard gaps [R, K, K] of unit points [P, R, K, D]; the largest one is what a search makes small.
Gaps = Callable[[Tensor], Tensor]


def softmax_code(
    num_classes: int,
    dim: int,
    *,
    steps: int = 1500,
    restarts: int | None = None,
    cache: bool = True,
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
        cache: keep the result of a search with a given generator in ``$NCMETHODS_CACHE`` or
            ``~/.cache/ncmethods``, and take it from there the next time.
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
    return _code(_rest_gaps, num_classes, dim, steps, restarts, cache, generator, dtype)


def spread(
    num_classes: int,
    dim: int,
    *,
    steps: int = 1500,
    restarts: int | None = None,
    cache: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Spread frame: K unit rows with the smallest largest cosine that ``dim`` allows.

    Also known as a best spherical code, the Tammes problem (D = 3), or, in the neural-collapse
    literature, a Grassmannian frame. Where there is a closed form it is that of
    :func:`softmax_code`: the simplex ETF for K ≤ D + 1 (largest cosine −1/(K−1)), largest cosine 0
    for D + 2 ≤ K ≤ 2D, the regular K-gon for D = 2.

    Everything else is searched for, as there, but on the pairwise cosines alone, and sharpened at
    the end: ``metrics.min_angle`` tells the smallest angle that was reached, in degrees.

    Args:
        num_classes: K ≥ 2.
        dim: D; at least 2 where K > 2.
        steps: of the search.
        restarts: starts that are searched side by side; if None, 80 000 / K², from 1 to 64.
        cache: as in :func:`softmax_code`.
        generator: CPU generator for the starts and the rotation; the global one if None.
        dtype: of the result.

    Returns:
        frame [K, D].

    Raises:
        InputError: more than two rows in one dimension; ``dim``, ``steps`` or ``restarts`` < 1.

    References:
        Gao et al. 2023, arXiv:2304.08914 (as the limit of training). H. Cohn, *Table of spherical
        codes*, hdl.handle.net/1721.1/142661.
    """
    return _code(_pair_gaps, num_classes, dim, steps, restarts, cache, generator, dtype)


def _code(
    gaps: Gaps,
    num_classes: int,
    dim: int,
    steps: int,
    restarts: int | None,
    cache: bool,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Tensor:
    K, dim = check_dim(num_classes, dim)
    if restarts is None:
        share = 2 if gaps is _pair_gaps else 1
        restarts = max(1, share * min(32, 40_000 // K**2))
    check_positive("steps", steps)
    check_positive("restarts", restarts)
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
        rows[:n, : n - 1] = simplex_rows(n)
        axes = torch.eye(pairs, dtype=torch.float64)
        rows[n:, n - 1 :] = torch.stack((axes, -axes), dim=1).flatten(0, 1)
    elif dim == 2:
        angle = torch.arange(K, dtype=torch.float64) * (2 * math.pi / K)
        rows = torch.stack((angle.cos(), angle.sin()), dim=1)
    else:
        key = (gaps.__name__, K, dim, steps, restarts)
        return remember(
            lambda: _search(gaps, K, dim, steps, restarts, generator),
            key,
            generator if cache else None,
        ).to(dtype)
    return (rows @ haar_isometry(dim, dim, generator).T).to(dtype)


def _rest_gaps(U: Tensor) -> Tensor:
    """⟨w_j − w_k, h_k⟩ for rows and directions U = (w, h): minus the one-vs-rest margins.

    dist(w_k, conv{w_j}) is the maximum over unit directions h_k of min_j ⟨w_k − w_j, h_k⟩, so rows
    and directions together maximise min_{k, j≠k} ⟨w_k − w_j, h_k⟩: cross-entropy in the limit of
    large scale.
    """
    S = U[1] @ U[0].mT  # [R, K, K]: ⟨h_k, w_j⟩
    return S - S.diagonal(dim1=-2, dim2=-1)[..., None]


def _pair_gaps(U: Tensor) -> Tensor:
    """Cosines ⟨w_k, w_j⟩."""
    return U[0] @ U[0].mT


def _search(
    gaps: Gaps,
    num_classes: int,
    dim: int,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Rows [K, D] of the best of several searches for a small largest gap."""
    start = torch.randn(restarts, num_classes, dim, dtype=torch.float64, generator=generator)
    if gaps is _rest_gaps:
        return _best(gaps, _anneal(gaps, torch.stack((start, start)), steps, 2.0))[0]
    # From β = 2 all starts can end in one basin (13 points in space), from 30 few in the best one
    # (24-cell): half of them each. The rows that win are made sharp.
    first = torch.where(torch.arange(restarts) % 2 == 0, 2.0, 30.0).double()[:, None, None]
    best = _best(gaps, _anneal(gaps, start[None], steps, first))
    sharp = _anneal(gaps, best[:, None], 1 + steps // 3, 1e4, last=1e6, rate=1e-4, fall=1e-2)
    return sharp[0, 0]


def _anneal(
    gaps: Gaps,
    points: Tensor,
    steps: int,
    first: float | Tensor,
    *,
    last: float = 1e4,
    rate: float = 0.1,
    fall: float = 1e-3,
) -> Tensor:
    """Unit points [P, R, K, D] after Adam on the largest gap of each of R searches.

    The maximum is softened to a log-sum-exp whose β rises from ``first`` to ``last``, while the
    step falls from ``rate`` by the factor ``fall``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        points = points.clone().requires_grad_()
        optimizer = torch.optim.Adam([points], betas=(0.9, 0.99))
        for step in range(steps):
            beta = first * (last / first) ** (step / steps)
            optimizer.param_groups[0]["lr"] = rate * fall ** (step / steps)
            soft = _off_diagonal(gaps, F.normalize(points, dim=-1)) * beta
            optimizer.zero_grad()
            largest = soft.flatten(1).logsumexp(1)[:, None, None] / beta
            largest.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return F.normalize(points.detach(), dim=-1)


def _best(gaps: Gaps, points: Tensor) -> Tensor:
    """Points [P, K, D] of the search with the smallest largest gap."""
    best: Tensor = points[:, _off_diagonal(gaps, points).flatten(1).amax(1).argmin()]
    return best


def _off_diagonal(gaps: Gaps, points: Tensor) -> Tensor:
    same = torch.eye(points.shape[-2], dtype=torch.bool)
    return gaps(points).masked_fill(same, -math.inf)
