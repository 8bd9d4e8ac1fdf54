"""CollapseCallback: collapse by layer during Lightning's own training or validation passes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.features import _split
from ncmethods.metrics.monitor import Monitor

__all__ = ["CollapseCallback"]


def _callback() -> Any:
    """The Callback class of ``lightning`` or of ``pytorch_lightning``, of the one that is in use.

    Their trainers accept only their own.
    """
    packages = ["lightning.pytorch", "pytorch_lightning"]
    for package in sorted(packages, key=lambda package: package not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError as error:
            cause = error
    raise ImportError('Lightning is not installed: pip install "ncmethods[lightning]".') from cause


class CollapseCallback(_callback()):  # type: ignore[misc]
    """Log the report of chosen layers once an epoch, from the forward passes that Lightning makes.

    A :class:`ncmethods.metrics.Monitor` watches the LightningModule during the epoch; there is no
    extra pass. At the end of the epoch the report over all ranks is logged with ``log_dict`` under
    ``<on>/<layer>/``, e.g. ``val/head/nc1/pinv``, and kept in ``last``. The batch must be
    ``(x, y, …)`` or a dict with labels; override ``labels_of`` for others. Of several validation
    loaders the first is measured. A DistributedSampler that repeats samples to even out the ranks
    repeats them here too.

    Args:
        num_classes: K.
        layers: dotted names in the LightningModule, in order of depth; ``"head"`` stands for what
            the classifier's rows act on.
        counts: training samples per class [K], for the angles of rare classes.
        every_n_epochs: measure the last of each n epochs; ``trainer.validate`` always measures.
        on: ``"train"`` or ``"val"``. Training batches are seen while the network moves.
        samples: rows to keep of each layer on each rank, for NC4 and effective depth.
        scatter: keep the [D, D] scatter of each layer.
        name: dotted name of the head, where several fit.

    Raises:
        InputError: ``on`` is something else, or every_n_epochs < 1.
    """

    def __init__(
        self,
        num_classes: int,
        layers: Sequence[str] = ("head",),
        counts: Tensor | None = None,
        every_n_epochs: int = 1,
        on: str = "val",
        samples: int = 0,
        scatter: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise InputError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        self.on = check_choice(on, ("train", "val"), "on")
        self.num_classes, self.every_n_epochs = num_classes, every_n_epochs
        self.options: dict[str, Any] = {"layers": layers, "counts": counts, "samples": samples}
        self.options |= {"scatter": scatter, "name": name}
        self.monitor: Monitor | None = None
        self.last: dict[str, float] = {}
        self._stack = ExitStack()

    def labels_of(self, batch: Any) -> Tensor:
        """Labels int64 [N] of a batch as the LightningModule gets it."""
        labels = _split(batch)[1]
        if labels is None:
            raise InputError(
                "CollapseCallback needs labels: batches (x, y, …) or a dict, or override labels_of."
            )
        return labels

    # --- the epoch ------------------------------------------------------------------------------

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        fitting = trainer.state.fn == "fit"
        if trainer.sanity_checking or (
            fitting and (trainer.current_epoch + 1) % self.every_n_epochs
        ):
            return
        self.monitor = Monitor(pl_module, self.num_classes, **self.options)
        self._watch(pl_module)

    def _watch(self, pl_module: Any) -> None:
        if self.monitor is not None:
            self._stack.enter_context(self.monitor)
            if getattr(pl_module, "_compiler_ctx", None):  # a compiled graph calls no hooks
                self._stack.enter_context(torch.compiler.set_stance("force_eager"))

    def _step(self, batch: Any) -> None:
        if self.monitor is not None:
            self.monitor.update(self.labels_of(batch))

    def _end(self, pl_module: Any) -> None:
        self._stack.close()
        if self.monitor is not None:
            self.last = {f"{self.on}/{key}": v for key, v in self.monitor.compute().items()}
            self.monitor = None
            # The values are those of all ranks already; sync_dist tells Lightning so.
            pl_module.log_dict(self.last, sync_dist=True)

    # --- hooks ----------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        if self.on == "train":
            self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch."""
        if self.on == "train":
            self._step(batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the report."""
        if self.on == "train":
            self._end(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Rest while a validation interrupts the training epoch."""
        if self.on == "train":
            self._stack.close()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on."""
        if self.on == "train":
            self._watch(pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        if self.on == "val":
            self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        if self.on == "val" and dataloader_idx == 0:
            self._step(batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the report."""
        if self.on == "val":
            self._end(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self._stack.close()
        self.monitor = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks off."""
        self._stack.close()
        self.monitor = None
