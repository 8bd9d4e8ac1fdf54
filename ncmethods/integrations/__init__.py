"""Adapters for other libraries, each imported on first use.

``integrations.torchmetrics.CollapseMetric``, ``integrations.lightning.CollapseCallback``,
``integrations.pytorch_ood.detectors``, ``integrations.openood.Postprocessor`` and
``integrations.sklearn.OutlierDetector``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["lightning", "openood", "pytorch_ood", "sklearn", "torchmetrics"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; adapters: {', '.join(__all__)}"
    )
