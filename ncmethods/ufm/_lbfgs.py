"""L-BFGS on many independent problems at once, with a line search of their own for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Fun = Callable[[Tensor], tuple[Tensor, Tensor]]

_DECREASE, _CURVATURE = 1e-4, 0.9
_PATIENCE = 100


def minimise(
    fun: Fun,
    x: Tensor,
    *,
    lower: Tensor | None = None,
    tol: float,
    steps: int,
    memory: int = 20,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Minimise B functions of P variables.

    The line search brackets the weak Wolfe conditions by bisection (Lewis and Overton 2013), which
    also serves where ReLU has kinks. With ``lower`` the variables stay ≥ 0: those that are held at
    0 by their gradient drop out of the quasi-Newton step, and the step is projected.

    Args:
        fun: x [B, P] to values [B] and gradients [B, P].
        x: start.
        lower: bool [P], which variables are ≥ 0.
        tol: on the norm of the (projected) gradient.
        steps: at most.
        memory: pairs that are kept.

    Returns:
        x [B, P], values [B], norms of the gradient [B], steps taken.
    """
    f, g = fun(x)
    pairs: list[tuple[Tensor, Tensor]] = []
    valid: list[Tensor] = []  # of each pair, 0 where a problem has dropped it
    stuck = torch.zeros_like(f, dtype=torch.bool)
    fresh = torch.ones_like(stuck)  # the step is that of steepest descent
    mark, least = f.clone(), torch.full_like(f, torch.inf)
    step = 0
    for step in range(steps):
        free = torch.ones_like(x) if lower is None else (~(lower & (x <= 0) & (g > 0))).to(x)
        p = g * free
        norm = p.norm(dim=1)
        if step % _PATIENCE == _PATIENCE - 1:  # nothing but rounding moves any more
            stuck |= (mark - f <= 1e-13 * f.abs()) & (norm > least / 2)
            mark, least = f.clone(), torch.minimum(least, norm)
        done = (norm <= tol) | stuck | ~norm.isfinite()
        if bool(done.all()):
            break
        d = -_two_loop(p, pairs, valid, free) * free
        slope = (d * p).sum(1)
        poor = ~(slope < -1e-10 * norm * d.norm(dim=1))
        fresh = poor if pairs else torch.ones_like(poor)
        d = torch.where(poor[:, None], -p, d)
        slope = (d * p).sum(1)
        first = 0.1 * x.norm(dim=1) / norm.clamp(min=1e-300)  # a tenth of where we stand
        t = torch.where(fresh, first.clamp(max=1.0), 1.0)
        found, x1, f1, g1 = _search(fun, x, f, g, d, slope, t, done, lower)
        s, y = x1 - x, g1 - g
        pairs.append((s, y))
        valid.append(found.to(f))
        if len(pairs) > memory:
            pairs.pop(0)
            valid.pop(0)
        lost = ~found & ~done
        stuck |= lost & fresh
        keep = (~(lost | poor)).to(f)
        valid = [*(v * keep for v in valid[:-1]), valid[-1]]
        x, f, g = x1, f1, g1
    free = torch.ones_like(x) if lower is None else (~(lower & (x <= 0) & (g > 0))).to(x)
    return x, f, (g * free).norm(dim=1), step + 1


def _two_loop(
    g: Tensor, pairs: list[tuple[Tensor, Tensor]], valid: list[Tensor], free: Tensor
) -> Tensor:
    """The inverse Hessian that the pairs imply, on the free variables, times g."""
    q, stack = g, []
    gamma, seen = torch.ones_like(g[:, 0]), torch.zeros_like(g[:, 0], dtype=torch.bool)
    for (s, y), ok in zip(reversed(pairs), reversed(valid)):
        s, y = s * free, y * free
        sy, yy = (s * y).sum(1), (y * y).sum(1)
        good = (ok > 0) & (sy > 1e-12 * yy.sqrt() * s.norm(dim=1)) & (yy > 0)
        rho = torch.where(good, 1 / sy.masked_fill(~good, 1.0), 0.0)
        gamma = torch.where(good & ~seen, sy / yy.clamp(min=1e-300), gamma)  # the latest pair's
        seen = seen | good
        a = rho * (s * q).sum(1)
        q = q - a[:, None] * y
        stack.append((a, rho, s, y))
    r = gamma[:, None] * q
    for a, rho, s, y in reversed(stack):
        r = r + s * (a - rho * (y * r).sum(1))[:, None]
    return r


def _search(
    fun: Fun,
    x: Tensor,
    f: Tensor,
    g: Tensor,
    d: Tensor,
    slope: Tensor,
    t: Tensor,
    done: Tensor,
    lower: Tensor | None,
    trials: int = 40,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps along d: which problems found one, and x, values and gradients after it."""
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    found = done.clone()
    x1, f1, g1 = x.clone(), f.clone(), g.clone()
    rounding = 1e-14 * f.abs()
    for _ in range(trials):
        trial = x + t[:, None] * d
        if lower is not None:
            trial = torch.where(lower, trial.clamp(min=0), trial)
        ft, gt = fun(trial)
        moved = trial - x
        if lower is None:
            after = (gt * d).sum(1)
            less = ft <= f + _DECREASE * t * slope
            # Where values differ by rounding only, slopes still tell (Hager and Zhang 2005).
            less |= (ft <= f + rounding) & (after <= (2 * _DECREASE - 1) * slope)
            flat = after >= _CURVATURE * slope
        else:
            after = (gt * moved).sum(1)
            before = (g * moved).sum(1)
            less = ft <= f + _DECREASE * before
            less |= (ft <= f + rounding) & (after <= (2 * _DECREASE - 1) * before)
            flat = torch.ones_like(less)
        now = less & flat & ~found
        # A decrease without the second condition is kept in reserve.
        better = (now | (less & ~found))[:, None]
        x1, g1 = torch.where(better, trial, x1), torch.where(better, gt, g1)
        f1 = torch.where(better[:, 0], ft, f1)
        found = found | now
        if bool(found.all()):
            break
        high = torch.where(~less, t, high)
        low = torch.where(less & ~flat, t, low)
        t = torch.where(found, t, torch.where(high.isinf(), 2 * t, (low + high) / 2))
    moved_at_all = (x1 != x).any(1)
    return (found | moved_at_all) & ~done, x1, f1, g1
