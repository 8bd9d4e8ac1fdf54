"""Our scorers as postprocessors of OpenOOD, for its Evaluator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.features import extract
from ncmethods.ood._scorer import Scorer, head_logits
from ncmethods.ood.detector import _head

try:
    from openood.postprocessors import BasePostprocessor
except ImportError as error:
    raise ImportError(
        "OpenOOD is not installed, and no registry has it: install it from its repository, "
        "Jingkang50/OpenOOD."
    ) from error

__all__ = ["Postprocessor"]


class Postprocessor(BasePostprocessor):  # type: ignore[misc]
    """A fitted scorer as an OpenOOD postprocessor: ``Evaluator(net, postprocessor=…)``.

    OpenOOD's confidence is higher = in-distribution, the negative of our score. Fitting is ours:
    its ``setup`` and its search of hyperparameters on outliers do nothing. The prediction is the
    largest logit of the network's head.

    Args:
        scorer: fitted on features of the network that is evaluated.
        name: dotted name of the network's head, where several fit.

    Raises:
        InputError: something that is not a fitted scorer.
    """

    APS_mode = False

    def __init__(self, scorer: Scorer, *, name: str | None = None) -> None:
        if not isinstance(scorer, Scorer):
            raise InputError(f"Pass a fitted scorer, got {type(scorer).__name__}.")
        super().__init__(config=None)
        self.scorer, self.name = scorer, name

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Predicted classes [N] and confidences [N] of a batch of images."""
        features = extract(
            net, [data], name=self.name, out_device=data.device, progress=False
        ).features
        logits = head_logits(_head(net, self.name), features)
        self.scorer.to(data.device)
        return logits.argmax(1), self.scorer.confidence(features, logits)
