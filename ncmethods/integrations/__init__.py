"""Adapters for other libraries, each imported on first use.

``integrations.torchmetrics.CollapseMetric``, ``integrations.lightning.CollapseCallback`` and
``integrations.pytorch_ood.as_pytorch_ood``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["lightning", "pytorch_ood", "torchmetrics"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; adapters: {', '.join(__all__)}"
    )
