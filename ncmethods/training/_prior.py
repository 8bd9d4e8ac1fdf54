"""Two corrections for the class prior at once: noticed and named."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

NO_CORRECTION = {"label_aware_smoothing"}  # takes the counts, and corrects no prior


def name_of(loss: Callable[..., Any]) -> str:
    """Name of the function or class inside any partials."""
    while isinstance(loss, partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)


def corrects(loss: Callable[..., Any]) -> bool:
    """Whether ``loss`` corrects for the class prior: it takes the counts, by name.

    Of a class of modules it is ``forward`` that takes them.
    """
    kind = loss.func if isinstance(loss, partial) else loss
    called = kind.forward if isinstance(kind, type) and issubclass(kind, nn.Module) else loss
    return name_of(loss) not in NO_CORRECTION and "counts" in inspect.signature(called).parameters


def warn_twice(one: str, other: str, *, stacklevel: int) -> None:
    """Warn that ``one`` and ``other`` both favour rare classes."""
    warnings.warn(
        f"Two prior corrections at once: {one} and {other} both correct for the class prior, so "
        "rare classes are favoured twice.",
        stacklevel=stacklevel + 1,
    )
