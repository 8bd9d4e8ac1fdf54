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
        if scores.ndim != 1 or bool(scores.isnan().any()):
            raise InputError(
                f"scores must be [n] without NaN, got {tuple(scores.shape)} with "
                f"{int(scores.isnan().sum())} NaN."
            )
        group = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        if groups is not None:
            group = check_labels(groups, len(scores), num_groups).to(scores.device)
            if bool((group < 0).any()):
                raise InputError("groups must be ≥ 0: leave scores without a group out.")
        G = num_groups or (int(group.max()) + 1 if len(group) else 1)
        sizes = torch.bincount(group, minlength=G)
        need = math.ceil(1 / alpha - 1 - 1e-9)
        if int(sizes.min()) < need:
            few = (sizes < need).nonzero()[:, 0].tolist()
            where = "" if groups is None else f" in each group; too few in {few[:12]}"
            raise InputError(
                f"A threshold at alpha = {alpha:g} needs at least {need} calibration scores"
                f"{where}, got {sizes.min()}. Hold out more, accept a larger alpha"
                + (", or calibrate without groups." if groups is not None else ".")
            )
        levels, rank = torch.unique(scores.detach().double(), return_inverse=True)
        keys = (group * (len(levels) + 1) + rank).sort().values
        return cls(levels, keys, sizes, alpha=alpha)

    def p_value(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """p-values [N] in float64; the smallest there is, 1/(n + 1), for a score that is NaN.

        Raises:
            InputError: groups are missing, or were none in the calibration.
        """
        if (groups is None) != (len(self.sizes) == 1):
            raise InputError(
                f"This threshold was calibrated with {len(self.sizes)} group(s): "
                + ("pass groups=… too." if groups is None else "leave groups away.")
            )
        s = scores.detach().double().nan_to_num(nan=math.inf)
        group = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        if groups is not None:
            group = check_labels(groups, len(s), len(self.sizes))
        U = len(self.levels)
        rank = torch.searchsorted(self.levels, s, right=False)
        start = torch.searchsorted(self.keys, group * (U + 1) + rank, right=False)
        n = self.sizes[group]
        return (1 + self.sizes.cumsum(0)[group] - start).double() / (n + 1)

    def forward(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """Whether to distrust each input, bool [N]."""
        return self.p_value(scores, groups) <= self.alpha * (1 + 1e-12)

    @property
    def value(self) -> Tensor:
        """Largest score of each group that is not flagged, [G]: flagged is what lies above."""
        allowed = ((self.sizes + 1) * self.alpha * (1 + 1e-12)).floor().long()  # flagged of n + 1
        last = self.sizes.cumsum(0) - allowed
        return self.levels[self.keys[last] % (len(self.levels) + 1)]

    def band(self, level: float = 0.9) -> Tensor:
        """Where the false-alarm rate of this very calibration lies with probability ``level``.

        Over calibrations of this size the rate follows Beta(l, n + 1 − l), l = ⌊(n + 1) alpha⌋.

        Returns:
            Lower and upper rate of each group, [G, 2].
        """
        from scipy.stats import beta

        n = self.sizes.cpu().double()
        l = ((n + 1) * self.alpha * (1 + 1e-12)).floor()  # noqa: E741
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
    within = ranked <= q * torch.arange(1, N + 1).to(p) / max(N, 1) * (1 + 1e-12)
    last = within.nonzero()[-1:, 0]
    return p <= ranked[last] if len(last) else torch.zeros(N, dtype=torch.bool, device=p.device)
