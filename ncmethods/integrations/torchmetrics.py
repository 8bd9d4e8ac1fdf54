"""CollapseMetric: the report as a torchmetrics metric, reduced across ranks instead of gathered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.metrics.report import report
from ncmethods.stats import ClassStats

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        'torchmetrics is not installed: pip install "ncmethods[torchmetrics]".'
    ) from error

__all__ = ["CollapseMetric"]


class CollapseMetric(Metric):  # type: ignore[misc]
    """Report of all features seen since the last reset, as a dictionary of float tensors.

    ``update(features, labels)`` feeds one ClassStats, and ``compute()`` is its
    :func:`ncmethods.metrics.report`. Across ranks the moments are summed, K·D + D² numbers whatever
    N is: ``dist_sync_fn`` is not used, and nothing is gathered. ``forward`` adds the batch and
    returns the report of that batch alone, at the price of a report.

    The state stays float64. It is no buffer, so that DistributedDataParallel does not overwrite
    it, and is left out of ``state_dict`` until ``persistent(True)``.

    Args:
        num_classes: K.
        dim: D.
        head: nn.Linear or a head of this library, for NC3 and the angles of its rows. It is watched
            and not owned: its parameters are not parameters of the metric, and a copy of the metric
            watches the same head.
        counts: training samples per class [K], which say which classes are rare.
        scatter: keep the [D, D] scatter, for ``nc1/pinv`` and ``nc1/vci``.
        weighting: of the classes, by a name that :func:`ncmethods.metrics.report` takes.
        **kwargs: of ``torchmetrics.Metric``, such as ``process_group`` or ``sync_on_compute``.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        num_classes: int,
        dim: int,
        head: nn.Module | None = None,
        *,
        counts: Tensor | None = None,
        scatter: bool = True,
        weighting: str = "class",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.dim, self.scatter = num_classes, dim, scatter
        self.counts, self.weighting = counts, weighting
        self._head = None if head is None else _Watched(head)
        self._persistent["stats"] = False
        self._held = [self._empty()]  # this rank's statistic and, while synced, that of all ranks

    def _empty(self) -> ClassStats:
        return ClassStats(self.num_classes, self.dim, scatter=self.scatter)

    @property
    def stats(self) -> ClassStats:
        """The statistic that ``compute`` reads: this rank's, or that of all ranks while synced."""
        return self._held[-1]

    @property
    def metric_state(self) -> dict[str, Any]:
        """The statistic, under ``"stats"``."""
        return {"stats": self.stats}

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features [N, D] and labels [N], as ``ClassStats.update`` takes them."""
        self.stats.update(features, labels)

    def compute(self) -> dict[str, Tensor]:
        """The report of all ranks, each value a float tensor []."""
        return self._report(self.stats)

    def _report(self, stats: ClassStats) -> dict[str, Tensor]:
        head = None if self._head is None else self._head.module
        found = report(stats, head, counts=self.counts, weighting=self.weighting)
        return {key: torch.tensor(value, device=self.device) for key, value in found.items()}

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Add a batch and return the report of this batch alone."""
        self.update(features, labels)
        batch = self._empty().update(features, labels)
        if self.dist_sync_on_step:
            batch.all_reduce(self.process_group)
        self._forward_cache = self._report(batch)
        return self._forward_cache

    def reset(self) -> None:
        """Forget what was accumulated."""
        super().reset()
        self._held = [self._empty()]

    def merge_state(self, incoming_state: CollapseMetric | dict[str, Any]) -> None:
        """Add the samples that another CollapseMetric, or its ``metric_state``, has seen."""
        if isinstance(incoming_state, CollapseMetric):
            incoming_state = incoming_state.metric_state
        if not isinstance(incoming_state, dict) or "stats" not in incoming_state:
            raise InputError(
                "merge_state takes a CollapseMetric or its metric_state, got "
                f"{type(incoming_state).__name__}."
            )
        self._held[-1] = self.stats + incoming_state["stats"]
        self._computed = None

    # --- across ranks -------------------------------------------------------------------------

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Sum over all ranks into a copy; ``unsync`` goes back to this rank's statistic."""
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)
        if self._is_synced and len(self._held) == 1:
            group = process_group or self.process_group
            self._held.append(copy.deepcopy(self.stats).all_reduce(group))

    def unsync(self, should_unsync: bool = True) -> None:
        """Go back to this rank's statistic."""
        super().unsync(should_unsync)
        if not self._is_synced:
            del self._held[1:]

    # --- devices and storage ------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Take the statistic along to another device; its dtype stays."""
        super()._apply(fn, *args, **kwargs)
        for stats in self._held:
            stats._apply(fn)
        return self

    def state_dict(
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The statistic under ``stats.``, after ``persistent(True)``; nothing otherwise."""
        out: dict[str, Any] = super().state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if self._persistent["stats"]:
            self.stats.state_dict(destination=out, prefix=f"{prefix}stats.", keep_vars=keep_vars)
        return out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mine = [key for key in state_dict if key.startswith(f"{prefix}stats.")]
        state = {key.removeprefix(f"{prefix}stats."): state_dict.pop(key) for key in mine}
        if state:
            self.stats.load_state_dict(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Watched:
    """A module that is not registered as a part of its holder, nor copied with it alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        return _Watched(memo.get(id(self.module), self.module))
