"""Collapse-aware training methods for PyTorch.

Rooms are imported on first use: ``import ncmethods`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = (
    "data",
    "features",
    "frames",
    "heads",
    "incremental",
    "integrations",
    "losses",
    "metrics",
    "models",
    "ood",
    "stats",
    "testing",
    "tracking",
    "training",
    "transfer",
    "ufm",
    "viz",
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    rooms = ", ".join(_ROOMS)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; rooms: {rooms}")


def __dir__() -> list[str]:
    return sorted(__all__)
