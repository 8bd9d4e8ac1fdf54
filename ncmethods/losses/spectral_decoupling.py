"""Spectral decoupling: an L2 penalty on the logits."""

from __future__ import annotations

from torch import Tensor

from ncmethods._core import check_labels, check_logits, no_autocast
from ncmethods.losses._class_means import known_rows, mean_of

__all__ = ["spectral_decoupling"]


def spectral_decoupling(logits: Tensor, labels: Tensor) -> Tensor:
    """½ · mean_i ‖z_i‖², the sum over the K logits of a sample.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.

    Returns:
        loss [], without its λ.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.

    References:
        Pezeshki et al., NeurIPS 2021, arXiv:2011.09468 (one logit for two classes; the sum over K
        logits is ours).
    """
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    with no_autocast(z.device):
        z, known = known_rows(z, labels)
        return mean_of(z.square().sum(1), known) / 2
