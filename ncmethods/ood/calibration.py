"""Thresholds with a promise: split-conformal p-values, and false discoveries in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, check_labels

__all__ = ["Threshold", "benjamini_hochberg"]


class Threshold(nn.Module):
    """Flags at most a share ``alpha`` of in-distribution inputs, on average over calibrations.

    The p-value of a score s is (1 + #{i: s_i ≥ s}) / (n + 1) over n calibration scores s_i; it is
    flagged where p ≤ alpha. The promise holds if the calibration scores and those of new
    in-distribution inputs are exchangeable: they come from the same source, and neither network
    nor scorer was fitted on them. It bounds false alarms alone: it says nothing about how many
    intruders are found, and is void when the in-distribution drifts.

    With ``groups`` (say the predicted classes) each group has its own threshold, and the promise
    holds within each: no class pays for the others.

    References:
        Split-conformal p-values for outliers: Bates et al., Annals of Statistics 2023,
        arXiv:2104.08279.
    """

    levels: Tensor  # distinct scores, ascending, [U]
    keys: Tensor  # group · (U + 1) + rank of each score, ascending, [n]
    sizes: Tensor  # scores of each group, [G]

    def __init__(self, levels: Tensor, keys: Tensor, sizes: Tensor, *, alpha: float) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise InputError(f"alpha is the share of false alarms, in (0, 1), got {alpha}.")
        self.alpha = alpha
        self.register_buffer("levels", levels)
        self.register_buffer("keys", keys)
        self.register_buffer("sizes", sizes)

    @classmethod
    def fit(
        cls,
        scores: Tensor,
        alpha: float = 0.05,
        *,
        groups: Tensor | None = None,
        num_groups: int | None = None,
    ) -> Threshold:
        """Calibrate on scores of held-out in-distribution inputs.

        Args:
            scores: [n], higher = more out-of-distribution.
            alpha: share of false alarms that is accepted, in (0, 1).
            groups: int64 [n], a group of each score, for a threshold per group.
            num_groups: G; the largest group + 1 if None.

        Raises:
            InputError: too few scores, in a group or in all, for any threshold to keep the
                promise (n < 1/alpha − 1); NaN; or groups that do not fit.
        """
        if not 0 < alpha < 1:
            raise InputError(f"alpha is the share of false alarms, in (0, 1), got {alpha}.")
        s = _checked(scores)
        bad = int(s.isnan().sum())
        if bad:
            raise InputError(
                f"{bad} of {len(s)} calibration scores are NaN: their inputs or features were not "
                "finite. Leave them out, or find out why."
            )
        G = num_groups or (1 if groups is None or not len(s) else int(groups.max()) + 1)
        group = _groups(groups, s, G)
        sizes = torch.bincount(group, minlength=G)
        few = (_flaggable(sizes, alpha) < 1).nonzero()[:, 0].tolist()
        if few:
            need = math.ceil((1 - _ROUNDING) / alpha) - 1
            where = "" if groups is None else f" in each group; too few in {few[:12]}"
            raise InputError(
                f"A threshold at alpha = {alpha:g} needs at least {need} calibration scores"
                f"{where}, got {sizes.min()}. Hold out more, accept a larger alpha"
                + (", or calibrate without groups." if groups is not None else ".")
            )
        levels, rank = torch.unique(s, return_inverse=True)
        keys = (group * (len(levels) + 1) + rank).sort().values
        return cls(levels, keys, sizes, alpha=alpha)

    def p_value(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """p-values [N] in float64; the smallest there is, 1/(n + 1), for a score that is NaN.

        Args:
            scores: [N].
            groups: int64 [N], for a threshold per group.

        Raises:
            InputError: groups are missing, or were none in the calibration.
        """
        s, G = _checked(scores).to(self.levels.device), len(self.sizes)
        if groups is None and G > 1:
            raise InputError(
                f"This threshold was calibrated with {G} groups: pass groups=…, that of each score."
            )
        group = _groups(groups, s, G)
        U = len(self.levels)
        rank = torch.searchsorted(self.levels, s, right=False).masked_fill(s.isnan(), U)
        start = torch.searchsorted(self.keys, group * (U + 1) + rank, right=False)
        n = self.sizes[group]
        return (1 + self.sizes.cumsum(0)[group] - start).double() / (n + 1)

    def forward(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """Whether to distrust each input, bool [N]."""
        return self.flags(self.p_value(scores, groups))

    def flags(self, p_values: Tensor) -> Tensor:
        """Whether p-values [N] are small enough to flag, bool [N]."""
        return p_values <= self.alpha * (1 + _ROUNDING)

    @property
    def value(self) -> Tensor:
        """Largest score of each group that is not flagged [G]. What lies above is flagged."""
        last = self.sizes.cumsum(0) - _flaggable(self.sizes, self.alpha)
        return self.levels[self.keys[last] % (len(self.levels) + 1)]

    def band(self, level: float = 0.9) -> Tensor:
        """Where the false-alarm rate of this very calibration lies with probability ``level``.

        Over calibrations of this size the rate follows Beta(l, n + 1 − l), l = ⌊(n + 1) alpha⌋,
        where scores do not tie; where they do, it lies lower.

        Returns:
            Lower and upper rate of each group, [G, 2].

        Raises:
            InputError: a level out of range.
        """
        from scipy.stats import beta

        if not 0 < level < 1:
            raise InputError(f"level lies in (0, 1), got {level}.")
        n = self.sizes.cpu()
        l = _flaggable(n, self.alpha)  # noqa: E741
        ends = beta.ppf([[(1 - level) / 2], [(1 + level) / 2]], l.numpy(), (n + 1 - l).numpy())
        return torch.from_numpy(ends).T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Threshold:
        """Follow device moves, never casts."""
        device = fn(torch.empty(0)).device
        if device.type == "mps":  # no float64 there
            device = torch.device("cpu")
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self

    def extra_repr(self) -> str:
        """Size and promise."""
        return f"alpha={self.alpha:g}, n={int(self.sizes.sum())}, groups={len(self.sizes)}"


_ROUNDING = 1e-12  # relative, so that p = 5/100 is not above alpha = 0.05


def _flaggable(sizes: Tensor, alpha: float) -> Tensor:
    """⌊(n + 1) alpha⌋ for each n: so many of n + 1 exchangeable scores are flagged."""
    return ((sizes.double() + 1) * (alpha * (1 + _ROUNDING))).floor().long()


def _checked(scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"scores must be a tensor [n], got {got}.")
    s = scores.detach()
    return (s.cpu() if s.device.type == "mps" else s).double()  # no float64 there


def _groups(groups: Tensor | None, scores: Tensor, num_groups: int) -> Tensor:
    if groups is None:
        return torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    group = check_labels(groups, len(scores)).to(scores.device)
    if bool(((group < 0) | (group >= num_groups)).any()):
        raise InputError(
            f"groups must lie in 0 … {num_groups - 1}, got {int(group.min())} … {int(group.max())}."
            " Leave scores without a group out of the calibration."
        )
    return group


def benjamini_hochberg(p_values: Tensor, q: float = 0.05) -> Tensor:
    """Which of a batch of inputs to flag so that at most a share ``q`` of the flags is wrong.

    The step-up rule: with p sorted, flag all up to the largest i with p_(i) ≤ q i / N. It holds on
    average over calibrations, for split-conformal p-values too.

    Args:
        p_values: [N] in (0, 1].
        q: share of false flags among the flags that is accepted.

    Returns:
        bool [N].

    Raises:
        InputError: p-values out of range, or ``q`` not in (0, 1).

    References:
        Benjamini and Hochberg 1995; for conformal p-values Bates et al., arXiv:2104.08279.
    """
    p = p_values.detach().double()
    if not 0 < q < 1 or p.ndim != 1 or not bool(((p > 0) & (p <= 1)).all()):
        raise InputError(
            f"benjamini_hochberg takes p-values [N] in (0, 1] and q in (0, 1), got "
            f"{tuple(p.shape)} and q = {q}."
        )
    N = len(p)
    ranked = p.sort().values
    within = ranked <= q * torch.arange(1, N + 1).to(p) / max(N, 1) * (1 + _ROUNDING)
    last = within.nonzero()[-1:, 0]
    return p <= ranked[last] if len(last) else torch.zeros(N, dtype=torch.bool, device=p.device)
