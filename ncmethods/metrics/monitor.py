"""Monitor: collapse by layer, from the forward passes that a loop makes anyway."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ncmethods._core import InputError, find_head, logits_of, no_autocast
from ncmethods.features import LayerWatch
from ncmethods.metrics.layerwise import effective_depth, progressive_collapse, separation_law
from ncmethods.metrics.nc4 import nearest_mean
from ncmethods.metrics.report import report
from ncmethods.stats import ClassStats

__all__ = ["Monitor"]


class Monitor:
    """Class moments of chosen layers, gathered during somebody else's forward passes.

    A context manager. Call ``update(labels)`` after each forward pass, ``compute()`` when numbers
    are wanted, ``reset()`` to begin anew, say with each epoch. Feature maps [N, C, H, W] and tokens
    [N, T, D] are averaged over their positions, unless ``pool`` says otherwise: papers differ. Of a
    layer that runs several times in a forward pass the last run counts, and of several forward
    passes the last one before ``update``. A layer's output is read as it leaves the layer, also
    where the next one overwrites it in place. Works with compiled and DDP models.

    In training the network moves while the statistic is gathered, and dropout and augmentation are
    on: the numbers are those of the batches as the network saw them. For the geometry of one fixed
    network, collect during an evaluation pass.

    ``stats`` holds the ClassStats of this rank by layer.

    Args:
        model: any model with a classifier head.
        num_classes: K.
        layers: dotted module names in order of depth, whose outputs are measured. ``"head"`` stands
            for what the classifier's rows act on.
        counts: training samples per class [K], for the angles of rare classes.
        scatter: keep the [D, D] scatter of each layer, which ``nc1/pinv``, ``nc1/vci`` and
            ``depth/slope`` need.
        samples: rows that each rank keeps of each layer, for the measures that need samples: a
            uniform draw from all rows, the same in every run, in samples × D floats per layer.
        pool: makes features [N, D] of an output with more than two axes, e.g.
            ``lambda x: x.flatten(1)``, or ``lambda x: x[:, 0]`` for a class token.
        log: called with the dictionary of each ``compute``, e.g. ``wandb.log`` or a tracker's log.
        name: dotted name of the head, where several fit.

    Raises:
        InputError: an unknown layer or one named twice, samples < 0, or no head.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        layers: Sequence[str] = ("head",),
        counts: Tensor | None = None,
        scatter: bool = True,
        samples: int = 0,
        pool: Callable[[Tensor], Tensor] | None = None,
        log: Callable[[Mapping[str, float]], Any] | None = None,
        name: str | None = None,
    ) -> None:
        self._watch = LayerWatch(model, layers, pool=pool, name=name)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise InputError(f"samples is a number of rows to keep, 0 or more, got {samples!r}.")
        self.head = find_head(model, name=name).module
        self.model, self.num_classes, self.layers = model, num_classes, tuple(layers)
        self.counts, self.scatter, self.samples = counts, scatter, samples
        self.log, self._watching = log, False
        self.reset()

    def __enter__(self) -> Monitor:
        """Start to watch."""
        self._watch.__enter__()
        self._watching = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off the model; the statistics stay."""
        self._watch.__exit__(kind, error, trace)
        self._watching = False

    def update(self, labels: Tensor) -> None:
        """Add the features of the last forward pass, with their labels int64 [N].

        Raises:
            InputError: no forward pass since the last update, or labels that do not fit.
        """
        if not self._watching:
            raise InputError("Use the monitor as a context manager: with Monitor(...) as monitor.")
        outputs = self._watch.take()
        for layer, features in outputs.items():
            if layer not in self.stats:
                self.stats[layer] = ClassStats(
                    self.num_classes, features.shape[1], scatter=self.scatter, layer=layer
                )
            self.stats[layer].update(features, labels)
        if self.samples:
            self._draw(outputs, labels)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _draw(self, outputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Reservoir sampling (Vitter's algorithm R), decided on the host: nothing waits."""
        S, n = self.samples, len(labels)
        position = torch.arange(self._drawn, self._drawn + n)
        slot = (torch.rand(n, dtype=torch.float64, generator=self._chance) * (position + 1)).long()
        slot = torch.where(position < S, position, slot).clamp(max=S)  # S: not kept
        self._drawn += n
        # Of the rows of this batch that fall into one slot the last stays.
        row = torch.full((S + 1,), -1).scatter_reduce_(0, slot, torch.arange(n), "amax")[:S]
        slot = (row >= 0).nonzero().flatten()
        row = row[slot]
        for layer, x in [*outputs.items(), ("", labels.long())]:
            if layer not in self._rows:
                self._rows[layer] = x.new_empty(S, *x.shape[1:])
            kept = self._rows[layer]
            drawn = x.index_select(0, _move(row, x.device)).to(kept)
            kept.index_copy_(0, _move(slot, kept.device), drawn)

    def compute(self) -> dict[str, float]:
        """The report of every layer under ``<layer>/``, over all ranks; also given to ``log``.

        With ``samples``, ``<layer>/nc4/ncc_accuracy``: the share of kept rows whose nearest class
        mean of that layer, over all samples, is that of their label; and ``head/nc4/agreement``
        with the logits of the head as it is now.

        With three layers or more, over depth: ``depth/slope``, ``depth/ratio`` and ``depth/r2`` of
        :func:`separation_law` and ``depth/progressive`` of :func:`progressive_collapse`, both of
        ``nc1/pinv`` where it is positive in all layers; with ``samples``, ``depth/effective`` of
        :func:`effective_depth` at its default error.

        Raises:
            InputError: nothing was collected, on any rank.
        """
        if _all_sum(torch.tensor([float(not self.stats)]))[0] > 0:
            raise InputError("The monitor has collected nothing: call update(labels) first.")
        out: dict[str, float] = {}
        whole = {layer: copy.deepcopy(stats).all_reduce() for layer, stats in self.stats.items()}
        for layer, stats in whole.items():
            head = self.head if layer == "head" else None
            out |= report(stats, head, counts=self.counts, prefix=f"{layer}/")
        if self.samples:
            out |= self._decisions(whole)
        if len(self.layers) >= 3:
            out |= self._depth(out)
        if self.log is not None:
            self.log(out)
        return out

    @torch.no_grad()
    def _decisions(self, whole: Mapping[str, ClassStats]) -> dict[str, float]:
        """NC4 of the kept rows about the class means over all samples, summed over ranks."""
        keys: list[str] = []
        hits: list[Tensor] = []
        kept = min(self._drawn, self.samples)
        y = self._rows[""][:kept]
        for layer, stats in whole.items():
            if stats.K_active < 2:
                continue
            x = self._rows[layer][:kept]
            labels = y.to(x.device)
            known = labels >= 0
            near = nearest_mean(x, stats.means)
            keys.append(f"{layer}/nc4/ncc_accuracy")
            hits.append(torch.stack(((near == labels)[known].sum(), known.sum())))
            if layer == "head":
                chosen = self._logits(x).argmax(1).to(near.device)
                keys.append(f"{layer}/nc4/agreement")
                hits.append(torch.stack(((near == chosen)[known].sum(), known.sum())))
        if not keys:
            return {}
        counted = _all_sum(torch.stack([h.cpu() for h in hits]).double())
        return {key: float(hit / n) for key, (hit, n) in zip(keys, counted) if n > 0}

    def _logits(self, features: Tensor) -> Tensor:
        """Logits [N, K] of the head; its hooks see this call, and what they held is put back."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        with self._watch.aside(), no_autocast(weight.device):
            return logits_of(self.head, features.to(weight))

    def _depth(self, found: Mapping[str, float]) -> dict[str, float]:
        """What the layers say together."""
        out: dict[str, float] = {}
        nc1 = [found.get(f"{layer}/nc1/pinv", math.nan) for layer in self.layers]
        if all(0 < value < math.inf for value in nc1):
            out = {f"depth/{key}": value for key, value in separation_law(nc1).items()}
            out["depth/progressive"] = progressive_collapse(nc1)
        keys = [f"{layer}/nc4/ncc_accuracy" for layer in self.layers]
        if all(key in found for key in keys):
            out["depth/effective"] = float(effective_depth([1 - found[key] for key in keys]))
        return out

    def reset(self) -> None:
        """Forget what was collected."""
        self.stats: dict[str, ClassStats] = {}
        self._rows: dict[str, Tensor] = {}  # kept rows [samples, D] by layer, labels under ""
        self._drawn = 0
        self._chance = torch.Generator().manual_seed(0)


def _move(index: Tensor, device: torch.device) -> Tensor:
    """A host index on ``device`` without a wait."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _all_sum(values: Tensor) -> Tensor:
    """The sum of a small tensor on the CPU over all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    nccl = dist.get_backend() == "nccl"
    there = values.to(torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu")
    dist.all_reduce(there)
    return there.cpu()
