"""The one adapter from loss functions to modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ncmethods._core import InputError, bind, check_choice

__all__ = ["LossModule"]


class LossModule(nn.Module):
    """Any loss function as an ``nn.Module``, for trainers that want one.

    Tensors among the hyperparameters (``counts``, ``class_weight``) become buffers, so they follow
    ``.to(device)`` and travel in the ``state_dict``.

    Args:
        function: a loss such as ``losses.ldam``.
        **hyper: its hyperparameters.

    ``forward`` takes the tensors by their names (``features=``, ``logits=``, ``labels=``,
    ``weight=``) and passes on those that the function asks for.

    Raises:
        InputError: a hyperparameter that the function does not have.
    """

    def __init__(self, function: Callable[..., Tensor], **hyper: Any) -> None:
        super().__init__()
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in hyper:
                check_choice(name, parameters, "hyperparameter")
        self._names = [name for name, value in hyper.items() if isinstance(value, Tensor)]
        for name in self._names:
            self.register_buffer(name, hyper.pop(name))
        self.function = partial(function, **hyper)

    def forward(self, **tensors: Tensor) -> Tensor:
        """The loss [] of the named tensors."""
        both = tensors.keys() & set(self._names)
        if both:
            raise InputError(f"{sorted(both)} were fixed when this LossModule was made.")
        available = tensors | {name: getattr(self, name) for name in self._names}
        return self.function(**bind(self.function, available))
