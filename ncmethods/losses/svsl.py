"""Within-class variability of intermediate layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ncmethods._core import InputError, check_labels, check_num_classes, no_autocast
from ncmethods.losses._class_means import class_means

__all__ = ["svsl"]


def svsl(
    layers: Mapping[str, Tensor] | Iterable[Tensor],
    labels: Tensor,
    num_classes: int | None = None,
) -> Tensor:
    """Mean over layers and classes of the squared distance from the class mean of the batch.

    (1/L) Σ_l (1/K) Σ_c (1/b_c) Σ_{i ∈ c} ‖h_i^l − m_c^l‖², the norm over all entries of a layer's
    map. Classes without samples add 0. The means carry gradient.

    Args:
        layers: outputs [N, …] of the chosen layers, by name or in a list.
        labels: int64 [N]; negative labels are left out.
        num_classes: K. The classes of the batch if None, which gives more weight to a batch with
            few of them.

    Returns:
        loss [], without its α.

    Raises:
        InputError: no layer, layers of another length than ``labels``, or labels ≥ K.

    References:
        Ben-Shaul and Dekel, 2022, arXiv:2201.08924 (stochastic variability-simplification loss),
        as their code has it.
    """
    if isinstance(layers, Tensor):
        raise InputError(
            f"layers must be a list or dict of tensors, got one {tuple(layers.shape)}."
        )
    outputs = list(layers.values() if isinstance(layers, Mapping) else layers)
    if not outputs or not all(isinstance(x, Tensor) and x.ndim >= 2 for x in outputs):
        got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in outputs]
        raise InputError(f"layers must hold at least one tensor [N, …], got {got}.")
    labels = check_labels(
        labels, None, None if num_classes is None else check_num_classes(num_classes)
    )
    with no_autocast(outputs[0].device):
        batches = [class_means(output.flatten(1), labels) for output in outputs]
        K = batches[0].classes.clamp(min=1) if num_classes is None else num_classes
        spreads = [batch.spread().sum() / K for batch in batches]
        return sum(spreads[1:], spreads[0]) / len(spreads)
