"""ClassStats: the class-conditional moments that the rest of the library reads.

Counts, class means, pooled within-class scatter and per-class traces (when asked for, also class
variances and the sums for Ledoit–Wolf shrinkage) are updated batch by batch, merged with ``+``,
reduced with ``-``, and summed across ranks with ``all_reduce``. The memory does not depend on the
number of samples.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncmethods._core import (
    InputError,
    atomic_path,
    check_choice,
    check_counts,
    check_features,
    check_labels,
    check_num_classes,
)
from ncmethods._frozen import FrozenStats

__all__ = ["ClassStats", "FrozenStats", "frequency_groups", "rare_classes"]

_CHUNK = 4096  # rows gathered before they are summed, fewer above D = 1024
_FLUSH = 8192  # rows summed in float32 before they join the float64 state
_BLOCKS = 8  # block rows of the symmetric product: 36 of 64 blocks are computed
# A negative remainder up to this share of a class's trace is rounding of float32 features (2e-6 on
# each side of the minus); a larger one means that the part was never in the whole.
_CANCEL = 1e-5

_F = TypeVar("_F", bound=Callable[..., Any])


def _state(function: _F) -> _F:
    """Write the state without a graph, and never as inference tensors (they cannot be updated)."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class ClassStats(nn.Module):
    """Mergeable class moments of features: counts, means, within-class scatter, traces.

    The update is Chan's, written as one product per batch. With batch class mean m_b, running mean
    μ, n_a old and n_b new samples of the class, the rows

        z_i = (x_i − m_b) + √(n_a / (n_a + n_b)) (m_b − μ)

    satisfy Σ z zᵀ = the increase of the scatter about the mean, so nothing is ever subtracted from
    the scatter and it stays accurate at any offset and in collapse.

    Args:
        num_classes: K.
        dim: D.
        scatter: keep the pooled scatter [D, D]; without it traces and means remain.
        class_weight: weights [K] that multiply each class's part of the pooled scatter (traces
            stay unweighted). A pooled scatter cannot be re-weighted later.
        normalized: whether the features were scaled to unit norm; differing values do not mix.
        layer: name of the layer the features come from; differing names do not mix.
        variances: keep the variances of each class [K, D] too, for diagonal Gaussians (GBC, FaCe).
        shrinkage: keep what Ledoit–Wolf shrinkage needs too, ``fourth``: a number and a vector
            [D]. Needs the plain scatter.
        groups: G ≥ 2 deals the samples of each class out to G sub-statistics (``parts``) that sum
            to the whole, for the standard errors of ``metrics.jackknife``. Costs G times the memory
            and one host sync per chunk of 4096 rows.

    Rows with a negative label are skipped and counted (``ignored``). Labels ≥ K and non-finite
    rows are skipped too, counted on the device, and raise at the first read.

    The state is float64 whatever the model is cast to, and follows the device of the first batch.
    Keep it outside DistributedDataParallel.

    References:
        Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
        sample variances", STAN-CS-79-773.
    """

    _counts: Tensor
    _means: Tensor
    _trace: Tensor
    _within: Tensor | None
    _squares: Tensor | None
    _pivot: Tensor | None
    _quartic: Tensor | None
    _cubic: Tensor | None
    _rejected: Tensor
    _class_weight: Tensor | None

    @_state
    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        scatter: bool = True,
        class_weight: Tensor | Sequence[float] | None = None,
        normalized: bool = False,
        layer: str = "",
        variances: bool = False,
        shrinkage: bool = False,
        groups: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = check_num_classes(num_classes)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise InputError(f"dim must be an integer ≥ 1, got {dim!r}.")
        self.dim, self.scatter = dim, scatter
        self.normalized, self.layer = normalized, layer
        K, D, f64 = num_classes, dim, torch.float64
        self.register_buffer("_counts", torch.zeros(K, dtype=torch.int64))
        self.register_buffer("_means", torch.zeros(K, D, dtype=f64))
        self.register_buffer("_trace", torch.zeros(K, dtype=f64))
        self.register_buffer("_within", torch.zeros(D, D, dtype=f64) if scatter else None)
        self.register_buffer("_squares", torch.zeros(K, D, dtype=f64) if variances else None)
        if shrinkage and (not scatter or class_weight is not None):
            raise InputError(
                "shrinkage=True needs the plain scatter [D, D]: build ClassStats with scatter=True "
                "and without class_weight."
            )
        # Σ‖u‖⁴ [] and Σ‖u‖²u [D] of u = x − pivot, which is the mean of the first samples.
        for name, size in (("_pivot", (D,)), ("_quartic", ()), ("_cubic", (D,))):
            self.register_buffer(name, torch.zeros(size, dtype=f64) if shrinkage else None)
        self.register_buffer("_rejected", torch.zeros(3, dtype=torch.int64))
        if class_weight is not None:
            class_weight = check_counts(torch.as_tensor(class_weight, dtype=f64), K).clone()
        self.register_buffer("_class_weight", class_weight)
        self._stage: tuple[Tensor, Tensor] | None = None  # [2, rows, D] and labels not yet summed
        self._staged = 0
        self._pending: Tensor | None = None  # float32 part of the scatter, not yet in _within
        self._pending_rows = 0
        self._mirrored = True  # whether the lower triangle of _within is up to date
        self._touched = False  # whether anything was accumulated (then the device is settled)
        self._reduced = False
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 0 or groups == 1:
            raise InputError(f"groups must be 0 or an integer ≥ 2, got {groups!r}.")
        self._parts = nn.ModuleList(self._like() for _ in range(groups))

    # --- accumulate ---------------------------------------------------------------------------

    @_state
    def update(self, features: Tensor, labels: Tensor) -> ClassStats:
        """Add a batch. No host sync, and no temporary beyond the batch's own size.

        Args:
            features: [N, D], any floating dtype; computed in float32, or float64 if given so.
            labels: [N] integers; negative = ignored.

        Returns:
            self.

        Raises:
            InputError: wrong shape, dtype or length, or already reduced across ranks.
        """
        features = check_features(features, self.dim)
        labels = check_labels(labels, len(features))
        if self._reduced and _world() > 1:
            raise InputError(
                "update after all_reduce: this statistic already holds every rank's samples. "
                "Start a new ClassStats, or update before reducing."
            )
        self._settle(features.device)
        while len(features):
            features, labels = self._put(features, labels)
        return self

    def _put(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Stage as many rows as fit, sum a full stage, return the rows that are left.

        Chunks end at the same row of the stream however it is cut into batches, so the result
        does not depend on the batch size, and small batches cost one copy each.
        """
        if self._stage is not None and self._stage[0].dtype != features.dtype:
            self._drain()
        if self._stage is None:
            device = self._counts.device
            size = min(_CHUNK, max(256, _CHUNK * 1024 // self.dim))
            rows = torch.empty(2, size, self.dim, dtype=features.dtype, device=device)
            self._stage = (rows, torch.empty(size, dtype=torch.int64, device=device))
        room = len(self._stage[1]) - self._staged
        size = min(len(features), room)
        x, y = self._stage[0][0], self._stage[1]
        x[self._staged : self._staged + size].copy_(features[:size])
        y[self._staged : self._staged + size].copy_(labels[:size])
        self._staged += size
        if size == room:
            self._sum_stage()
        return features[size:], labels[size:]

    @_state
    def _sum_stage(self) -> None:
        if self._stage is not None and self._staged:
            (x, scratch), y = self._stage[0][:, : self._staged], self._stage[1][: self._staged]
            self._staged = 0
            with _full_precision(x.device):
                self._deal(x, y)
                self._add(x, y, scratch)

    def _deal(self, x: Tensor, y: Tensor) -> None:
        """Give the rows of each class to the parts in turn; class c begins with part c."""
        G = len(self._parts)
        if not G:
            return
        c = y.clamp(0, self.num_classes - 1)
        turn = nth_of_class(y) + self._counts[c] + c
        if _world() > 1 and not self._reduced:  # ranks begin apart too
            turn += dist.get_rank() * G // _world()
        turn, order = (turn % G).sort(stable=True)
        sizes = torch.bincount(turn, minlength=G).tolist()
        for part, rows in zip(self._parts, torch.split(order, sizes)):
            assert isinstance(part, ClassStats)
            if len(rows):
                part._touched = True
                part._add(x[rows], y[rows], x.new_empty(len(rows), self.dim))

    def _add(self, x: Tensor, y: Tensor, scratch: Tensor) -> None:
        """Chan's update by the rows ``x`` [B, D], which it overwrites; ``scratch`` is [B, D]."""
        K, B = self.num_classes, len(y)
        finite = x.sum(1).isfinite()
        known = (y >= 0) & (y < K)
        valid = known & finite
        self._rejected += torch.stack(((y < 0).sum(), (y >= K).sum(), (known & ~finite).sum()))
        self._add_fourth(x, valid)

        # Slots: one per class, or one per row where classes outnumber rows (a class then lives in
        # the slot of its first row). One more slot takes the rows that do not count.
        group = torch.where(valid, y, K)
        row = torch.arange(B, device=y.device)
        first = torch.full((K + 1,), B - 1, device=y.device).scatter_reduce_(0, group, row, "amin")
        lead = first[group]  # the first row of each row's class
        y = y.clamp(0, K - 1)
        if K <= B:
            M, slot, cls = K, group, None
        else:
            M, slot, cls = B, torch.where(valid, lead, B), y

        # Batch means of the slots about the first row of their class: an offset costs no digits,
        # and the outlier of one class costs none of another's.
        pivot = torch.index_select(x, 0, lead, out=scratch)
        if cls is None:
            pivot = x.index_select(0, first[:K])
        r = x.sub_(scratch)
        n_b = torch.zeros(M + 1, dtype=torch.int64, device=y.device)
        n_b = n_b.index_add_(0, slot, torch.ones_like(slot))[:M]
        s = x.new_zeros(M + 1, self.dim).index_add_(0, slot, r)[:M]
        s /= n_b.clamp(min=1)[:, None]

        n_a = self._counts if cls is None else self._counts[cls]
        old = self._means if cls is None else self._means.index_select(0, cls)
        step = (pivot - old).add_(s)  # m_b − μ, float64
        step.masked_fill_((n_b == 0)[:, None], 0)
        share = n_a / (n_a + n_b).clamp(min=1).double()  # n_a / n
        shift = x.new_zeros(M + 1, self.dim)
        shift[:M] = s - share.sqrt()[:, None] * step
        z = r.sub_(torch.index_select(shift, 0, slot, out=scratch))
        # Zero the rows that do not count, also NaN: as bits, four times faster than masked_fill_.
        bits = z.view(torch.int64 if z.dtype == torch.float64 else torch.int32)
        bits.bitwise_and_(-valid.int()[:, None])  # all ones or all zeros

        step *= (1 - share)[:, None]
        if cls is None:
            self._means += step
            self._counts += n_b
        else:
            self._means.index_add_(0, cls, step)
            self._counts.index_add_(0, cls, n_b)
        self._trace.index_add_(0, y, torch.linalg.vector_norm(z, dim=1).double().square_())
        if self._squares is not None:
            self._squares.index_add_(0, y, z.double().square())
        if self._within is not None:
            if self._class_weight is not None:
                z *= self._class_weight.sqrt().to(z.dtype)[y][:, None]
            self._add_scatter(z)

    def _add_fourth(self, x: Tensor, valid: Tensor) -> None:
        """Add rows to the sums of fourth order; the first ones set the pivot. Leaves ``x``."""
        if self._pivot is None or self._quartic is None or self._cubic is None:
            return
        u = torch.where(valid[:, None], x, x.new_zeros(())).double()  # [B, D]
        mean = u.sum(0) / valid.sum().clamp(min=1)
        self._pivot = torch.where(self._counts.sum() == 0, mean, self._pivot)
        u = u.sub_(self._pivot).mul_(valid[:, None])
        square = torch.linalg.vector_norm(u, dim=1).square_()  # [B]
        self._quartic += square @ square
        self._cubic += square @ u

    def _fourth_about(self, center: Tensor) -> tuple[Tensor, Tensor]:
        """Σ‖x − c‖⁴ [] and Σ‖x − c‖²(x − c) [D], from those about the pivot. Complete first.

        With u = x − pivot and d = pivot − c the powers of ‖u + d‖ expand into sums over u that the
        moments hold: their number, Σu, Σ‖u‖² and Σ u uᵀd.
        """
        assert self._within is not None
        assert self._pivot is not None
        assert self._quartic is not None
        assert self._cubic is not None
        n, d, M = self._counts.double(), self._pivot - center, self._means - self._pivot
        N, dd = n.sum(), d @ d
        linear = n @ M  # Σ u
        trace = self._trace.sum() + n @ M.square().sum(1)  # Σ‖u‖²
        Sd = self._within @ d + (n * (M @ d)) @ M  # Σ u (u·d)
        ud = linear @ d
        quartic = (
            self._quartic + 4 * (self._cubic @ d + d @ Sd + dd * ud) + dd * (2 * trace + N * dd)
        )
        cubic = self._cubic + (trace + 2 * ud + N * dd) * d + 2 * Sd + dd * linear
        return quartic.clamp(min=0), cubic

    def _add_scatter(self, z: Tensor) -> None:
        assert self._within is not None
        self._mirrored = False
        if z.dtype == torch.float64:
            target = self._within
        else:
            if self._pending is None:
                self._pending = torch.zeros_like(self._within, dtype=torch.float32)
            if self._pending_rows + len(z) > _FLUSH:
                self._flush()
            self._pending_rows += len(z)
            target = self._pending
        for rows, columns in self._blocks():
            target[rows, columns].addmm_(z[:, rows].T, z[:, columns])

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Block rows of the upper triangle: 36 of 64 blocks."""
        step = -(-self.dim // _BLOCKS) if self.dim >= 256 else self.dim
        return [(slice(i, i + step), slice(i, None)) for i in range(0, self.dim, step)]

    def _drain(self) -> None:
        """Sum what is staged and release the work buffers."""
        self._sum_stage()
        self._flush()
        self._stage = self._pending = None

    def _flush(self) -> None:
        if self._pending is not None and self._pending_rows:
            assert self._within is not None
            self._within += self._pending
            self._pending.zero_()
            self._pending_rows = 0

    def _settle(self, device: torch.device) -> None:
        if not self._touched and device != self._counts.device:
            self.to(device)
        self._touched = True

    # --- read ---------------------------------------------------------------------------------

    def _read(self) -> None:
        self._sum_stage()
        _, out_of_range, non_finite = self._rejected.tolist()
        if out_of_range:
            raise InputError(
                f"{out_of_range} labels were ≥ num_classes = {self.num_classes} (those rows were "
                "skipped). Build ClassStats with the right num_classes, or map the labels."
            )
        if non_finite:
            raise InputError(
                f"{non_finite} feature rows held NaN or Inf (those rows were skipped). Look for "
                "overflow in half precision or a diverged model."
            )

    @property
    def counts(self) -> Tensor:
        """Samples per class, int64 [K]."""
        self._read()
        return self._counts.clone()

    @property
    def class_weight(self) -> Tensor | None:
        """Weights [K] of the classes in the scatter, None for none."""
        return None if self._class_weight is None else self._class_weight.clone()

    @property
    def parts(self) -> tuple[ClassStats, ...]:
        """The sub-statistics of ``groups``, which sum to this one; empty without groups."""
        self._sum_stage()
        return tuple(part for part in self._parts if isinstance(part, ClassStats))

    @property
    def groups(self) -> int:
        """Number of sub-statistics that are kept, 0 for none."""
        return len(self._parts)

    @property
    def ignored(self) -> int:
        """Rows that were skipped because their label was negative."""
        self._sum_stage()
        return int(self._rejected[0])

    @property
    def active(self) -> Tensor:
        """Which classes have samples, bool [K]."""
        return self.counts > 0

    @property
    def K_active(self) -> int:
        """Number of classes with at least one sample."""
        return int(self.active.sum())

    @property
    def N(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def means(self) -> Tensor:
        """Class means, float64 [K, D]; NaN for a class without samples."""
        self._read()
        return self._means.masked_fill((self._counts == 0)[:, None], torch.nan)

    @property
    def trace(self) -> Tensor:
        """Sum of squared distances to the class mean, float64 [K]."""
        self._read()
        return self._trace.clone()

    @property
    def variances(self) -> Tensor:
        """Variances of each class along each dimension, over n_c, float64 [K, D].

        Never weighted; NaN for a class without samples.

        Raises:
            InputError: built without ``variances=True``.
        """
        self._read()
        if self._squares is None:
            raise InputError(
                "This ClassStats keeps no variances of its classes. Build it with variances=True."
            )
        return self._squares / self._counts[:, None]

    @property
    def fourth(self) -> Tensor:
        """Σ_i ‖x_i − μ‖⁴ about the mean μ of the samples, float64 [].

        Raises:
            InputError: built without ``shrinkage=True``, or there are no samples.
        """
        self._read()
        if self._quartic is None:
            raise InputError(
                "This ClassStats keeps no sums for shrinkage. Build it with shrinkage=True."
            )
        self._complete()
        return self._fourth_about(self.global_mean("sample"))[0]

    @property
    def within(self) -> Tensor:
        """Pooled within-class scatter Σ_i w_{y_i} (x_i − μ_{y_i})(x_i − μ_{y_i})ᵀ, [D, D]."""
        self._read()
        self._complete()
        if self._within is None:
            raise InputError(
                "This ClassStats keeps no scatter (scatter=False). "
                "Build it with scatter=True for measures that need the [D, D] matrix."
            )
        if not bool(self._within.diagonal().isfinite().all()):
            raise InputError(
                "The scatter overflowed float32: features differ by more than about 1e19. "
                "Pass them as float64, or scale them."
            )
        return self._within.clone()

    def _complete(self) -> None:
        """Bring the buffers up to date: sum what waits, fill the lower triangle."""
        self._sum_stage()
        self._flush()
        if not self._mirrored and self._within is not None:
            self._within.copy_(self._within.triu() + self._within.triu(1).T)
            self._mirrored = True

    @property
    def sigma_w(self) -> Tensor:
        """Within-class covariance [D, D], ``within`` over the (weighted) number of samples."""
        return self.within / self.total_weight

    @property
    def total_weight(self) -> Tensor:
        """What ``within`` is divided by: N, or the samples times their class weights, []."""
        counts = self.counts.double()
        if not counts.any():
            raise InputError("This ClassStats is empty: call update(features, labels) first.")
        return counts.sum() if self._class_weight is None else counts @ self._class_weight

    def class_shares(self, weighting: str = "class") -> Tensor:
        """Weights [K] of the class means, summing to one; zero for classes without samples.

        Args:
            weighting: ``"class"`` weighs the active classes alike, ``"sample"`` by count.
        """
        check_choice(weighting, ("class", "sample"), "weighting")
        counts = self.counts
        weight = (counts > 0).double() if weighting == "class" else counts.double()
        if not weight.any():
            raise InputError("This ClassStats is empty: call update(features, labels) first.")
        return weight / weight.sum()

    def global_mean(self, weighting: str = "class") -> Tensor:
        """Mean of the class means [D], over classes or over samples."""
        return self.class_shares(weighting) @ self._means

    def centered_means(self, weighting: str = "class") -> Tensor:
        """Class means minus the global mean, float64 [K, D]; NaN for classes without samples."""
        return self.means - self.global_mean(weighting)

    def sigma_b(self, weighting: str = "class") -> Tensor:
        """Between-class covariance [D, D] about ``global_mean(weighting)``."""
        M = (self._means - self.global_mean(weighting)) * self.class_shares(weighting).sqrt()[
            :, None
        ]
        return M.T @ M

    @property
    def sigma_t(self) -> Tensor:
        """Total covariance [D, D] of the samples, ``sigma_w + sigma_b("sample")``.

        Raises:
            InputError: with ``class_weight``, where no such identity holds.
        """
        if self._class_weight is not None:
            raise InputError(
                "sigma_t is the covariance of the samples; this statistic was accumulated with "
                "class_weight. Accumulate one without."
            )
        return self.sigma_w + self.sigma_b("sample")

    def __repr__(self) -> str:
        """Size and what was seen."""
        self._sum_stage()
        extra = ("" if self.scatter else ", scatter=False") + (
            f", layer={self.layer!r}" if self.layer else ""
        )
        N = int(self._counts.sum())
        return f"ClassStats(num_classes={self.num_classes}, dim={self.dim}, N={N}{extra})"

    # --- algebra ------------------------------------------------------------------------------

    def _combinable(self, other: ClassStats) -> None:
        fields = ["num_classes", "dim", "scatter", "normalized", "layer"]
        for field in fields + ["_reduced"] * (_world() > 1):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                raise InputError(
                    f"Cannot combine two ClassStats with different {field.lstrip('_')}: "
                    f"{ours!r} and {theirs!r}."
                )
        for name, option in (("_squares", "variances"), ("_quartic", "shrinkage")):
            ours, theirs = (getattr(s, name) is not None for s in (self, other))
            if ours != theirs:
                raise InputError(
                    f"Cannot combine two ClassStats with different {option}: {ours} and {theirs}."
                )
        a, b = self._class_weight, other._class_weight
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b.to(a.device))):  # type: ignore[union-attr]
            raise InputError("Cannot combine two ClassStats with different class_weight.")
        self._complete()
        other._complete()

    def _like(self) -> ClassStats:
        new = ClassStats(
            self.num_classes,
            self.dim,
            scatter=self.scatter,
            class_weight=self._class_weight,
            normalized=self.normalized,
            layer=self.layer,
            variances=self._squares is not None,
            shrinkage=self._quartic is not None,
        )
        new.to(self._counts.device)
        new._touched, new._reduced = True, self._reduced
        return new

    def _mean(self) -> Tensor:
        """Mean of the samples [D], zero without any."""
        return self._counts.double() @ self._means / self._counts.sum().clamp(min=1)

    def _between(self, delta: Tensor, weight: Tensor) -> Tensor:
        """Σ_c w_c δ_c δ_cᵀ with the class weights of this statistic, [D, D]."""
        Z = self._weighted(delta, weight)
        return Z.T @ Z

    def _weighted(self, delta: Tensor, weight: Tensor) -> Tensor:
        """Rows √w_c δ_c [K, D], with the class weights of this statistic."""
        if self._class_weight is not None:
            weight = weight * self._class_weight
        return delta * weight.sqrt()[:, None]

    @_state
    def __add__(self, other: ClassStats | int) -> ClassStats:
        """The statistic of both sets of samples (``sum()`` works too)."""
        if isinstance(other, int) and other == 0:
            return copy.deepcopy(self)
        if not isinstance(other, ClassStats):
            return NotImplemented
        self._combinable(other)
        if self.groups != other.groups:
            raise InputError(
                f"Cannot add two ClassStats with different groups: {self.groups} and "
                f"{other.groups}."
            )
        other = _on(other, self._counts.device)
        out = self._like()
        out._parts = nn.ModuleList(a + b for a, b in zip(self.parts, other.parts))
        n = self._counts + other._counts
        share = other._counts / n.clamp(min=1).double()
        delta = other._means - self._means
        weight = self._counts * share  # n_a n_b / n
        out._counts = n
        out._means = self._means + share[:, None] * delta
        # A class that only one side has seen keeps its mean to the last bit.
        out._means = torch.where((other._counts == 0)[:, None], self._means, out._means)
        out._means = torch.where((self._counts == 0)[:, None], other._means, out._means)
        out._trace = self._trace + other._trace + weight * delta.square().sum(1)
        out._rejected = self._rejected + other._rejected
        out._reduced = self._reduced or other._reduced
        if self._within is not None and other._within is not None:
            out._within = self._within + other._within + self._between(delta, weight)
        if self._squares is not None and other._squares is not None:
            out._squares = self._squares + other._squares + weight[:, None] * delta.square()
        if self._quartic is not None:
            out._pivot = out._mean()
            (q, v), (p, w) = (s._fourth_about(out._pivot) for s in (self, other))
            out._quartic, out._cubic = q + p, v + w
        return out

    __radd__ = __add__

    @_state
    def __sub__(self, part: ClassStats) -> ClassStats:
        """The statistic without ``part``, the statistic of samples that are in this one.

        The result keeps no groups: which of them the removed samples lay in is not known.

        Raises:
            InputError: ``part`` holds more samples of a class than this, or removing it would leave
                a class with a negative variance, so it cannot be a part of this statistic.
        """
        if not isinstance(part, ClassStats):
            return NotImplemented
        self._combinable(part)
        part = _on(part, self._counts.device)
        n = self._counts - part._counts
        if bool((n < 0).any()):
            bad = (n < 0).nonzero().flatten().tolist()
            raise InputError(
                f"Cannot remove more samples than there are: classes {bad} have fewer in the whole "
                "than in the part."
            )
        out = self._like()
        gone, kept = (n == 0), n.clamp(min=1).double()
        delta = (part._means - self._means).masked_fill((part._counts == 0)[:, None], 0)
        means = self._means - (part._counts / kept)[:, None] * delta
        out._means = means.masked_fill(gone[:, None], 0)
        delta = (part._means - out._means).masked_fill((gone | (part._counts == 0))[:, None], 0)
        weight = n * (part._counts / self._counts.clamp(min=1).double())
        out._counts = n
        trace = self._trace - part._trace - weight * delta.square().sum(1)
        # Rounding: of the traces, and of the means where samples coincide far from the origin.
        rounding = _CANCEL * self._trace + 1e-24 * self._counts * self._means.square().sum(1)
        bad = (trace < -rounding).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"What is left of classes {bad} would have a negative variance: the removed "
                "statistic is not a part of this one."
            )
        out._trace = trace.masked_fill(n <= 1, 0).clamp(min=0)
        out._rejected = (self._rejected - part._rejected).clamp(min=0)
        if self._within is not None and part._within is not None:
            out._within = self._within - part._within - self._between(delta, weight)
            out._within *= bool((n > 1).any())  # single samples: what is left is rounding
        if self._squares is not None and part._squares is not None:
            squares = self._squares - part._squares - weight[:, None] * delta.square()
            out._squares = squares.masked_fill((n <= 1)[:, None], 0).clamp(min=0)
        if self._quartic is not None:
            out._pivot = out._mean()
            (q, v), (p, w) = (s._fourth_about(out._pivot) for s in (self, part))
            several = bool(n.sum() > 1)
            out._quartic, out._cubic = several * (q - p).clamp(min=0), several * (v - w)
        return out

    @_state
    def at_least(self, min_count: int) -> ClassStats:
        """The statistic of the classes with at least ``min_count`` samples; the others are empty.

        For label sets with a long tail of classes that hardly occur, such as next tokens.

        Raises:
            InputError: smaller classes are there and the scatter is kept: they cannot be taken out
                of a pooled scatter. Build it with ``scatter=False``.
        """
        counts = self.counts
        small = counts < min_count
        if self.scatter and bool((counts[small] > 0).any()):
            raise InputError(
                f"{int((counts[small] > 0).sum())} classes have fewer than {min_count} samples; "
                "a pooled scatter cannot lose them. Build the statistic with scatter=False."
            )
        out = copy.deepcopy(self)
        for one in (out, *out.parts):
            one._counts[small] = 0
            one._means[small] = 0
            one._trace[small] = 0
            if one._squares is not None:
                one._squares[small] = 0
        return out

    @_state
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ClassStats:
        """Sum the statistic over all ranks, in place; a no-op in a single process or when done.

        Two reductions: counts and count-weighted means first, then traces and scatter, each rank
        having moved its own to the common means.

        Args:
            group: process group; the default one if None.

        Returns:
            self.
        """
        if not (dist.is_available() and dist.is_initialized()) or self._reduced:
            return self
        if dist.get_world_size(group) == 1:
            return self
        K, D = self.num_classes, self.dim
        home = self._counts.device
        self._sum_stage()
        self._flush()  # of the scatter the upper triangle is sent and mirrored when it is read
        nccl = dist.get_backend(group) == "nccl"
        wire = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

        n_r = self._counts.double()
        sums = [n_r, (self._means * n_r[:, None]).flatten(), self._rejected.double()]
        packed = torch.cat(sums).to(wire)
        dist.all_reduce(packed, group=group)
        n, total, rejected = torch.split(packed.to(home), [K, K * D, 3])
        means = total.view(K, D) / n.clamp(min=1)[:, None]

        delta = self._means - means
        parts = [self._trace + n_r * delta.square().sum(1)]
        if self._squares is not None:
            parts.append((self._squares + n_r[:, None] * delta.square()).flatten())
        if self._quartic is not None:
            self._complete()
            pivot = n @ means / n.sum().clamp(min=1)
            quartic, cubic = self._fourth_about(pivot)
            parts += [quartic[None], cubic]
            self._pivot = pivot
        blocks = self._blocks() if self._within is not None else []
        Z = self._weighted(delta, n_r)
        for rows, columns in blocks:
            block = self._within[rows, columns]  # type: ignore[index]
            parts.append(torch.addmm(block, Z[:, rows].T, Z[:, columns]).flatten())
        packed = torch.cat(parts).to(wire)
        dist.all_reduce(packed, group=group)
        packed = packed.to(home)

        self._counts, self._means = n.round().long(), means
        self._rejected = rejected.round().long()
        sent = iter(torch.split(packed, [len(p) for p in parts]))
        self._trace = next(sent).clone()
        if self._squares is not None:
            self._squares = next(sent).clone().view(K, D)
        if self._quartic is not None:
            self._quartic, self._cubic = next(sent)[0].clone(), next(sent).clone()
        for (rows, columns), values in zip(blocks, sent):
            block = self._within[rows, columns]  # type: ignore[index]
            block.copy_(values.view_as(block))
            self._mirrored = False
        self._touched = self._reduced = True
        for part in self.parts:
            part.all_reduce(group)
        return self

    def freeze(self) -> FrozenStats:
        """These moments as they are now, with decompositions that are computed once.

        Raises:
            InputError: there are no samples.
        """
        return FrozenStats(self)

    # --- storage ------------------------------------------------------------------------------

    @_state
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassStats:
        """Follow device moves of ``fn``, never its dtype casts."""
        device = fn(torch.empty(0, device=self._counts.device)).device
        if device.type == "mps":  # no float64 there
            device = torch.device("cpu")
        self._drain()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        for part in self.parts:
            part._apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._complete()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drain()
        super()._load_from_state_dict(*args, **kwargs)
        self._mirrored = self._touched = True

    def get_extra_state(self) -> Tensor:
        """Whether the state already holds every rank's samples (a resumed run must not re-sum)."""
        return torch.tensor(self._reduced)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` saved."""
        self._reduced = bool(state)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the summed state, without the work buffers."""
        self._complete()
        return self.__dict__ | {"_stage": None, "_pending": None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistic as safetensors: the whole file or none of it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        for one in (self, *self.parts):
            one._complete()
        tensors = {
            name.replace("_", "", 1): buffer.detach().cpu().contiguous()
            for name, buffer in self.named_buffers()
        }
        fields = {k: getattr(self, k) for k in ("num_classes", "dim", "scatter", "normalized")}
        fields |= {"layer": self.layer, "reduced": self._reduced, "groups": self.groups}
        fields |= {"variances": self._squares is not None, "shrinkage": self._quartic is not None}
        with atomic_path(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"ncmethods.ClassStats": json.dumps(fields)})
            except SafetensorError as error:  # a full disk
                raise InputError(f"Cannot write {path}: {error}. Free some space.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassStats:
        """Read a statistic written by :meth:`save`.

        Raises:
            InputError: the file is missing, damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = (file.metadata() or {}).get("ncmethods.ClassStats")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"Cannot read {path} as a ClassStats file: {error}") from error
        if meta is None:
            raise InputError(
                f"{path} is a safetensors file, but not one written by ClassStats.save."
            )
        try:
            fields = json.loads(meta)
            reduced = fields.pop("reduced")
            stats = cls(**fields, class_weight=tensors.get("class_weight"))
            for name, buffer in stats.named_buffers():
                buffer.copy_(tensors.pop(name.replace("_", "", 1)))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is a damaged ClassStats file: {error}") from error
        for one in (stats, *stats.parts):
            one._touched, one._reduced = True, reduced
        return stats


def nth_of_class(labels: Tensor) -> Tensor:
    """How many rows before each one have its label, int64 [N]."""
    ordered, order = labels.sort(stable=True)
    place = torch.arange(len(labels), device=labels.device)
    nth: Tensor = torch.empty_like(place).scatter_(
        0, order, place - torch.searchsorted(ordered, ordered)
    )
    return nth


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _on(stats: ClassStats, device: torch.device) -> ClassStats:
    """``stats`` on ``device``, moved as a copy if it lies elsewhere."""
    return stats if stats._counts.device == device else copy.deepcopy(stats).to(device)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


# --- groups of classes by training frequency ----------------------------------------------------


def frequency_groups(
    counts: Tensor | Iterable[int], rule: str = "thresholds"
) -> dict[str, list[int]]:
    """Class indices of the many, medium and few groups.

    Args:
        counts: training samples per class [K].
        rule: ``"thresholds"`` is the field's: many > 100, medium 20 to 100, few < 20 training
            samples. Sizes such as ``"3/4/3"`` (many/medium/few) or ``"5/5"`` (many/few) cut the
            classes ranked by count, largest first.

    Returns:
        Group name to sorted class indices; groups may be empty.

    Raises:
        InputError: a rule that is neither, or whose sizes do not add up to K.
    """
    n = check_counts(counts).tolist()
    if rule == "thresholds":
        return {
            "many": [c for c, m in enumerate(n) if m > 100],
            "medium": [c for c, m in enumerate(n) if 20 <= m <= 100],
            "few": [c for c, m in enumerate(n) if m < 20],
        }
    sizes = rule.split("/")
    names = {2: ("many", "few"), 3: ("many", "medium", "few")}.get(len(sizes))
    if names is None or not all(s.isdecimal() for s in sizes) or sum(map(int, sizes)) != len(n):
        raise InputError(
            f"groups must be 'thresholds' or two or three sizes that add up to K = {len(n)}, "
            f"such as '3/4/3', got {rule!r}."
        )
    ranked = iter(sorted(range(len(n)), key=lambda c: (-n[c], c)))
    return {name: sorted(next(ranked) for _ in range(int(s))) for name, s in zip(names, sizes)}


def rare_classes(counts: Tensor | Iterable[int]) -> list[int]:
    """Classes that count as rare when nothing else is said.

    The few group (< 20 training samples) when it holds at least two classes; otherwise the rarest
    third of the classes by rank (at least two); none when all counts are equal or K is 2.
    """
    n = check_counts(counts)
    if bool((n == n[0]).all()):
        return []
    few = frequency_groups(n)["few"]
    if len(few) >= 2:
        return few
    size = max(2, len(n) // 3)
    if size == len(n):
        return []
    return frequency_groups(n, f"{len(n) - size}/{size}")["few"]
