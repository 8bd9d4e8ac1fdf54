"""Losses without a softmax: squared error to one-hot targets, and one-vs-all logistic loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_labels, check_logits
from ncmethods.losses._average import BALANCES, average

__all__ = ["binary_cross_entropy", "mse"]


def mse(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor | None = None,
    *,
    balance: str = "none",
    target: float = 1.0,
    true_weight: float = 1.0,
) -> Tensor:
    """Half the squared distance of the logits from M e_y, summed over classes, mean over samples.

    Per sample ℓ = ½ [k (z_y − M)² + Σ_{c≠y} z_c²]. With k = M = 1 this is ½‖z − e_y‖², the fit
    term of the unconstrained-features literature; :func:`torch.nn.functional.mse_loss` of one-hot
    targets is 2/K times it.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.
        counts: training samples per class [K], for ``balance="global"``.
        balance: how samples are averaged. ``"none"`` is the plain mean; ``"batch"`` the mean over
            the classes of the batch of their mean; ``"global"`` Σ ℓ_i/n_{y_i} / Σ 1/n_{y_i} with
            the training ``counts`` (a count below 1 is taken as 1).
        target: M, what the label's logit is pulled to.
        true_weight: k, the weight of the label's logit. Hui and Belkin use k = 15, M = 30 on
            ImageNet.

    Returns:
        loss [], 0 if no sample is labelled.

    Raises:
        InputError: shapes that do not fit, labels ≥ K, an unknown balance, ``"global"`` without
            counts, or k ≤ 0.

    References:
        Rescaling: Hui & Belkin, ICLR 2021, arXiv:2006.07322. Collapse under it: Zhou et al.,
        ICML 2022, arXiv:2203.01238; Han et al., ICLR 2022, arXiv:2106.02073.
    """
    check_choice(balance, BALANCES, "balance")
    if not true_weight > 0:
        raise InputError(f"true_weight must be > 0, got {true_weight}: 1 is the plain square.")
    z = check_logits(logits)
    K = z.shape[1]
    labels = check_labels(labels, len(z), K)
    y = labels.clamp(min=0)
    own = true_weight**0.5 * (_own(z, y) - target)
    error = z.scatter(1, y[:, None], own[:, None])  # [N, K]
    return 0.5 * average(error.square().sum(1), labels, K, balance, counts)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """One logistic loss for each class: Σ_c softplus((1 − 2·1[c = y]) z_c), mean over samples.

    The sum over classes, not their mean: K times torch's mean-reduced
    ``binary_cross_entropy_with_logits`` of one-hot targets.

    Args:
        logits: [N, K].
        labels: int64 [N]; negative labels are left out.

    Returns:
        loss [], 0 if no sample is labelled.

    Raises:
        InputError: shapes that do not fit, or labels ≥ K.
    """
    z = check_logits(logits)
    labels = check_labels(labels, len(z), z.shape[1])
    y = labels.clamp(min=0)
    margin = (-z).scatter(1, y[:, None], _own(z, y)[:, None])  # [N, K]
    return average(-F.logsigmoid(margin).sum(1), labels, z.shape[1])


def _own(z: Tensor, y: Tensor) -> Tensor:
    """The label's logit [N]; unlike that of ``gather`` the gradient is deterministic on a GPU."""
    return -F.nll_loss(z, y, reduction="none")
