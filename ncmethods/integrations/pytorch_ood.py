"""Our scorers as detectors of pytorch-ood, for its Benchmark and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.features import extract
from ncmethods.ood._scorer import Scorer, head_logits
from ncmethods.ood.detector import _head

try:
    from pytorch_ood.api import DetectorInfo, FeaturesDetector, Task
except ImportError as error:
    raise ImportError(
        'pytorch-ood is not installed: pip install "ncmethods[pytorch_ood]".'
    ) from error

__all__ = ["detectors"]


def detectors(
    model: nn.Module,
    scorers: Sequence[Scorer] | Mapping[str, Scorer],
    *,
    name: str | None = None,
) -> list[Any]:
    """A ``pytorch_ood.api.FeaturesDetector`` for each fitted scorer, all with one encoder.

    ``Benchmark.evaluate(detectors(model, scorers))`` passes images through the model once for all
    of them. The sign is the same, higher = more out-of-distribution. Logits, where a score needs
    them, are those of the model's head. Fitting is ours: their ``fit`` does nothing.

    Args:
        model: a Classifier, or any model that :func:`ncmethods.features.capture` can watch; it runs
            in eval mode and without gradients.
        scorers: fitted on features of this model; the keys of a mapping are the names in the
            benchmark's results, the names of the classes otherwise.
        name: dotted name of the model's head, where several fit.

    Raises:
        InputError: something that is not a fitted scorer.
    """
    named = (
        scorers.items()
        if isinstance(scorers, Mapping)
        else [(type(scorer).__name__, scorer) for scorer in scorers]
    )
    encoder, head = _Encoder(model, name), _head(model, name)
    found = []
    for key, scorer in named:
        if not isinstance(scorer, Scorer):
            raise InputError(f"{key} is not a fitted scorer: got {type(scorer).__name__}.")
        # The benchmark names a result by the detector's class.
        found.append(type(key, (_Adapter,), {})(scorer, encoder, head))
    return found


class _Encoder(nn.Module):
    """Images to features [N, D]."""

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        return extract(
            self.model, [x], name=self.name, out_device=x.device, progress=False
        ).features


class _Adapter(FeaturesDetector):  # type: ignore[misc]
    info = DetectorInfo(tasks={Task.CLASSIFICATION})

    def __init__(self, scorer: Scorer, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.scorer, self.encoder, self.head = scorer, encoder, head

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Scores [N] of features [N, D]."""
        needed = "logits" in self.scorer.wants()
        scores: Tensor = self.scorer(x, head_logits(self.head, x) if needed else None)
        return scores

    def predict(self, x: Tensor) -> Tensor:
        """Scores [N] of images."""
        device = next((p.device for p in self.encoder.parameters()), x.device)
        scores: Tensor = self.predict_features(self.encoder(x.to(device)))
        return scores
