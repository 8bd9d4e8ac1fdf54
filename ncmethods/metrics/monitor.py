"""Monitor: collapse by layer, from the forward passes that a loop makes anyway."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ncmethods._core import InputError, check_choice, find_head, unwrap
from ncmethods.features import Captured, capture
from ncmethods.metrics.report import report
from ncmethods.stats import ClassStats

__all__ = ["Monitor"]


class Monitor:
    """Class moments of chosen layers, gathered during somebody else's forward passes.

    A context manager. Call ``update(labels)`` after each forward pass, ``compute()`` when numbers
    are wanted, ``reset()`` to begin anew, say with each epoch. Feature maps [N, C, H, W] and tokens
    [N, T, D] are averaged over their positions.

    In training the network moves while the statistic is gathered, and dropout and augmentation are
    on: the numbers are those of the batches as the network saw them. For the geometry of one fixed
    network, collect during an evaluation pass.

    Args:
        model: any model with a classifier head.
        num_classes: K.
        layers: dotted module names in order of depth, whose outputs are measured. ``"head"`` stands
            for what the classifier's rows act on.
        counts: training samples per class [K], for the angles of rare classes.
        scatter: keep the [D, D] scatter of each layer, which ``nc1/pinv`` and ``nc1/vci`` need.
        log: called with the dictionary of each ``compute``, e.g. ``wandb.log`` or a tracker's log.
        name: dotted name of the head, where several fit.

    Raises:
        InputError: an unknown layer, or no head.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        layers: Sequence[str] = ("head",),
        counts: Tensor | None = None,
        scatter: bool = True,
        log: Callable[[Mapping[str, float]], Any] | None = None,
        name: str | None = None,
    ) -> None:
        modules = dict(unwrap(model).named_modules())
        for layer in layers:
            check_choice(layer, ("head", *filter(None, modules)), "layer")
        self.head = find_head(model, name=name).module
        self.model, self.num_classes, self.layers = model, num_classes, tuple(layers)
        self.counts, self.scatter, self.log, self.name = counts, scatter, log, name
        self.stats: dict[str, ClassStats] = {}
        self._outputs: dict[str, Tensor] = {}
        self._seen: Captured | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        """Start to watch."""
        self._seen = self._stack.enter_context(capture(self.model, name=self.name))
        modules = dict(unwrap(self.model).named_modules())
        for layer in self.layers:
            if layer != "head":
                handle = modules[layer].register_forward_hook(self._keep(layer))
                self._stack.callback(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off the model; the statistics stay."""
        self._stack.close()

    def _keep(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def update(self, labels: Tensor) -> None:
        """Add the features of the last forward pass, with their labels int64 [N].

        Raises:
            InputError: no forward pass since the last update, or labels that do not fit.
        """
        if self._seen is None:
            raise InputError("Use the monitor as a context manager: with Monitor(...) as monitor.")
        if "head" in self.layers:
            self._outputs["head"] = self._seen.features
            self._seen.forget()
        missing = [layer for layer in self.layers if layer not in self._outputs]
        if missing:
            raise InputError(
                f"No forward pass has reached {', '.join(missing)} since the last update. Call the "
                "model first, then update(labels)."
            )
        for layer in self.layers:
            features = _pooled(self._outputs.pop(layer))
            if layer not in self.stats:
                self.stats[layer] = ClassStats(
                    self.num_classes, features.shape[1], scatter=self.scatter, layer=layer
                )
            self.stats[layer].update(features, labels)

    def compute(self) -> dict[str, float]:
        """The report of every layer under ``<layer>/``, over all ranks; also given to ``log``.

        Raises:
            InputError: nothing was collected.
        """
        if not self.stats:
            raise InputError("The monitor has collected nothing: call update(labels) first.")
        out: dict[str, float] = {}
        for layer, stats in self.stats.items():
            head = self.head if layer == "head" else None
            whole = copy.deepcopy(stats).all_reduce()
            out |= report(whole, head, counts=self.counts, prefix=f"{layer}/")
        if self.log is not None:
            self.log(out)
        return out

    def reset(self) -> None:
        """Forget what was collected."""
        self.stats.clear()


def _pooled(output: Tensor) -> Tensor:
    """Features [N, D] without their graph: the mean over positions of maps and tokens."""
    x = output.detach()
    if x.ndim == 4:
        return x.float().mean((2, 3))
    return x.float().mean(1) if x.ndim == 3 else x
