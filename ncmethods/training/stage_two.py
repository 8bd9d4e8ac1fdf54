"""Stage two: a linear classifier made anew on features that stay as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, bind, check_counts, check_head
from ncmethods.data import ClassSampler, Sampling, class_counts
from ncmethods.features import FeatureSet
from ncmethods.heads import ncm, to_linear
from ncmethods.metrics import accuracy_by_class
from ncmethods.stats import nth_of_class
from ncmethods.training._prior import corrects, name_of, warn_twice
from ncmethods.training.loop import NonFiniteLoss, cross_entropy

__all__ = [
    "crt",
    "hold_out_features",
    "linear_rows",
    "lws",
    "max_norm_",
    "ncm",
    "norm_limit",
    "pick_tau",
    "post_hoc",
    "tau_norm",
    "unit_features",
    "weight_balancing",
]

Loss = Callable[..., Tensor]
TAUS = tuple(round(0.1 * i, 1) for i in range(21))
"""The grid of τ in the released code of Kang et al."""


# --- retrained on cached features ----------------------------------------------------------------


def crt(
    train: FeatureSet,
    *,
    loss: Loss | None = None,
    epochs: int = 10,
    lr: float = 0.2,
    batch_size: int = 512,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    sampling: Sampling = "balanced",
    length: int | None = None,
    seed: int = 0,
) -> nn.Linear:
    """Classifier re-training: a new linear layer, trained on evenly sampled classes.

    Everything follows from ``seed``: the initial weights and the batches. The learning rate falls
    to 0 along a cosine. A class without samples is never drawn; its row is trained as a negative.

    Args:
        train: features and labels, taken in eval mode without augmentation.
        loss: a function of any of ``features, logits, labels, weight, bias, counts, epoch,
            epochs``, by these names; cross-entropy if None.
        epochs: passes of ``length`` samples.
        lr: at the start.
        batch_size: samples per step, at most.
        momentum: of SGD.
        weight_decay: on all parameters.
        sampling: shares of the classes, see ``data.class_shares``.
        length: samples of an epoch. None takes N, but K · max n_c (over the classes with samples)
            for ``balanced``, as the authors' sampler does.
        seed: ≥ 0.

    Returns:
        features → logits, of the features' dtype and on their device.

    Raises:
        InputError: no labels, or a value out of its range.
        NonFiniteLoss: the loss is NaN or infinite.

    Warns:
        UserWarning: even sampling with a loss that corrects for the class prior too.

    References:
        Kang et al., ICLR 2020, arXiv:1910.09217 (cRT).
    """
    plan = _Plan(epochs, batch_size, momentum, weight_decay, sampling, length, seed)
    layer = _layer((train.num_classes, train.dim), train.features)
    g, edge = torch.Generator().manual_seed(seed), 1 / math.sqrt(train.dim)
    with torch.no_grad():  # torch's default for nn.Linear, from a generator of our own
        for p in layer.parameters():
            p.copy_(torch.empty(p.shape, dtype=p.dtype).uniform_(-edge, edge, generator=g))
    learned = [{"params": list(layer.parameters()), "lr": lr}]
    _train(train, learned, lambda: (layer.weight, layer.bias), loss or cross_entropy, plan)
    return layer


def lws(
    train: FeatureSet,
    head: nn.Module,
    *,
    loss: Loss | None = None,
    epochs: int = 5,
    lr: float = 0.2,
    rows: float = 0.0,
    batch_size: int = 512,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    sampling: Sampling = "balanced",
    length: int | None = None,
    seed: int = 0,
) -> nn.Linear:
    """Learnable weight scaling: logits f_c (w_c · h + b_c), where only the K scales f are learned.

    f starts at 1, so the classifier starts as it is. With ``rows`` > 0 and label-aware smoothing as
    the loss it is the classifier stage of MiSLAS: scales and rows learn together.

    Args:
        train: features and labels, as in :func:`crt`.
        head: of stage one, linear in its features (see :func:`linear_rows`).
        loss: as in :func:`crt`.
        epochs: as in :func:`crt`.
        lr: of the scales.
        rows: learning rate of weight and bias as a share of ``lr``; 0 leaves them as they are.
        batch_size: as in :func:`crt`.
        momentum: as in :func:`crt`.
        weight_decay: on all that is learned: the scales are drawn towards 0, not 1.
        sampling: as in :func:`crt`.
        length: as in :func:`crt`.
        seed: of the batches.

    Returns:
        features → logits, with the scales folded into weight and bias.

    Raises:
        InputError: as :func:`crt`; a head that is not linear, or of another shape.
        NonFiniteLoss: the loss is NaN or infinite.

    Warns:
        UserWarning: as :func:`crt`.

    References:
        Kang et al., ICLR 2020, arXiv:1910.09217 (LWS). Zhong et al., CVPR 2021, arXiv:2104.00466
        (MiSLAS).
    """
    plan = _Plan(epochs, batch_size, momentum, weight_decay, sampling, length, seed)
    layer = _rows_for(train, head)
    f = torch.ones_like(layer.bias, requires_grad=True)
    learned: list[dict[str, Any]] = [{"params": [f], "lr": lr}]
    if rows:
        learned.append({"params": list(layer.parameters()), "lr": rows * lr})
    layer.requires_grad_(bool(rows))

    def scaled() -> tuple[Tensor, Tensor]:
        return f[:, None] * layer.weight, f * layer.bias

    _train(train, learned, scaled, loss or cross_entropy, plan)
    with torch.no_grad():
        for p, folded in zip(layer.parameters(), scaled()):
            p.copy_(folded)
    return layer.requires_grad_(True)


def weight_balancing(
    train: FeatureSet,
    head: nn.Module,
    *,
    loss: Loss | None = None,
    threshold: float = 0.1,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 0.1,
    sampling: Sampling = "instance",
    length: int | None = None,
    seed: int = 0,
) -> nn.Linear:
    """Second stage of weight balancing: class-balanced loss, weight decay, and a cap on the rows.

    After every step a row longer than t is scaled back to t (:func:`max_norm_`); t follows from the
    rows of stage one (:func:`norm_limit`).

    Args:
        train: features and labels, as in :func:`crt`.
        head: of stage one, linear in its features: the start.
        loss: as in :func:`crt`; if None, cross-entropy weighted by (1−β)/(1−β^{n_c}), β = 0.9999,
            with the weights scaled to mean 1 over the samples.
        threshold: share s of t = min + s (max − min) of the norms of ``head``'s rows.
        epochs: as in :func:`crt`.
        lr: as in :func:`crt`.
        batch_size: as in :func:`crt`.
        momentum: as in :func:`crt`.
        weight_decay: on weight and bias.
        sampling: as in :func:`crt`; the loss is balanced, so every sample is drawn once.
        length: as in :func:`crt`.
        seed: of the batches.

    Returns:
        features → logits.

    Raises:
        InputError: as :func:`lws`, or a threshold outside [0, 1].
        NonFiniteLoss: the loss is NaN or infinite.

    Warns:
        UserWarning: even sampling beside the balanced loss.

    References:
        Alshammari et al., CVPR 2022, arXiv:2203.14197. Weights: Cui et al., CVPR 2019,
        arXiv:1901.05555.
    """
    plan = _Plan(epochs, batch_size, momentum, weight_decay, sampling, length, seed)
    layer = _rows_for(train, head)
    limit = norm_limit(layer.weight, threshold)
    _train(
        train,
        [{"params": list(layer.parameters()), "lr": lr}],
        lambda: (layer.weight, layer.bias),
        loss or _class_balanced,
        plan,
        after=lambda: max_norm_(layer.weight, limit),
    )
    return layer


def norm_limit(weight: Tensor, threshold: float = 0.1) -> float:
    """Cap of the MaxNorm projection: min + threshold · (max − min) of the row norms of ``weight``.

    Raises:
        InputError: a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must lie in [0, 1], got {threshold}.")
    norms = weight.detach().double().norm(dim=1)
    low, high = float(norms.min()), float(norms.max())
    return low + threshold * (high - low)


@torch.no_grad()
def max_norm_(weight: Tensor, limit: float) -> Tensor:
    """Scale the rows of ``weight`` [K, D] that are longer than ``limit`` back to it, in place.

    Shorter rows keep every bit.
    """
    return weight.mul_((limit / weight.norm(dim=1, keepdim=True)).clamp(max=1))


# --- closed forms --------------------------------------------------------------------------------


def tau_norm(head: nn.Module, tau: float = 1.0) -> nn.Linear:
    """τ-normalised classifier: rows w_c / ‖w_c‖^τ, no bias.

    τ = 0 is the classifier without its bias, τ = 1 gives unit rows: learnable weight scaling with
    f_c = 1/‖w_c‖. A row of norm 0 stays 0.

    Args:
        head: linear in its features (see :func:`linear_rows`).
        tau: see :func:`pick_tau`.

    Raises:
        InputError: a head that is not linear, or τ that is not finite.

    References:
        Kang et al., ICLR 2020, arXiv:1910.09217 (τ-normalised classifier).
    """
    if not math.isfinite(tau):
        raise InputError(f"tau must be finite, got {tau}.")
    W = linear_rows(head).weight.detach()
    layer = _layer(W.shape, W, bias=False)
    with torch.no_grad():
        layer.weight.copy_(_tau_rows(W, tau))
    return layer


def _tau_rows(weight: Tensor, tau: float) -> Tensor:
    W = weight.detach().double()
    norms = W.norm(dim=1, keepdim=True)
    return W * torch.where(norms > 0, norms, 1).pow(-tau)


def pick_tau(
    head: nn.Module, held_out: FeatureSet, taus: Sequence[float] = TAUS
) -> tuple[float, dict[float, float]]:
    """The τ of :func:`tau_norm` with the best accuracy, mean over classes, on held-out features.

    Choose on images that neither backbone nor head was trained on. Where they were, nearly all are
    classified right for a range of τ, and the choice says little (:func:`hold_out_features`). Never
    choose on the test set. Of equally good ones it is the smallest.

    Args:
        head: linear in its features.
        held_out: features and labels.
        taus: candidates, in rising order.

    Returns:
        τ, and the accuracy of each candidate.

    Raises:
        InputError: no candidate, no labels, or a head that is not linear.
    """
    if not len(taus):
        raise InputError("taus must name at least one candidate.")
    W, x = linear_rows(head).weight.detach(), held_out.features.double()
    y = _labels(held_out)
    found = {
        tau: float(accuracy_by_class(x @ _tau_rows(W.to(x.device), tau).T, y).nanmean())
        for tau in taus
    }
    return max(found, key=lambda tau: found[tau]), found


def post_hoc(
    head: nn.Module, counts: Tensor, tau: float = 1.0, *, loss: Loss | None = None
) -> nn.Linear:
    """Post-hoc logit adjustment: the bias loses τ log π_c, with π = counts / Σ counts.

    For a head that was trained with plain cross-entropy. A class with count 0 takes no part: its
    bias becomes −∞.

    Args:
        head: linear in its features (see :func:`linear_rows`).
        counts: training samples per class [K].
        tau: strength; 0 changes nothing.
        loss: what the head was trained with, to be warned of a second correction.

    Raises:
        InputError: a head that is not linear, or counts of another length.

    Warns:
        UserWarning: ``loss`` corrects for the class prior already.

    References:
        Menon et al., ICLR 2021, arXiv:2007.07314 (post-hoc logit adjustment).
    """
    if loss is not None and corrects(loss):
        warn_twice("post_hoc", f"the loss {name_of(loss)}", stacklevel=3)
    old = linear_rows(head)
    n = check_counts(counts, len(old.weight)).to(old.weight.device).double()
    layer = _layer(old.weight.shape, old.weight)
    with torch.no_grad():
        layer.weight.copy_(old.weight)
        shift = torch.where(n > 0, -tau * (n / n.sum()).log() if tau else n * 0, -torch.inf)
        layer.bias.copy_(shift if old.bias is None else old.bias.double() + shift)
    return layer


# --- features ------------------------------------------------------------------------------------


def unit_features(data: FeatureSet, mean: Tensor | None = None) -> FeatureSet:
    """Features (h − mean)/‖h − mean‖ without logits: what NCM acts on in the authors' code.

    Args:
        data: any set.
        mean: [D]; the mean of ``data`` if None. Pass the training set's for every other set.
    """
    centred = data.features.double()
    centred = centred - (centred.mean(0) if mean is None else mean.to(centred))
    unit = F.normalize(centred, dim=1, eps=1e-300).to(data.features.dtype)
    return FeatureSet(unit, data.labels, data.num_classes)


def hold_out_features(
    train: FeatureSet, *, share: float = 0.2, seed: int = 0
) -> tuple[FeatureSet, FeatureSet]:
    """A seeded split of each class: about a ``share`` is held out, at least one of two samples.

    A class with one sample keeps it. Unlabelled samples (negative) stay in the first part. The
    backbone has seen both parts: a held-out fifth of its own training set is no fresh data.

    Args:
        train: features and labels.
        share: of each class, in (0, 1).
        seed: of the choice.

    Returns:
        What is left, and what is held out.

    Raises:
        InputError: no labels, a share out of range, or no class with two samples.
    """
    if not 0 < share < 1:
        raise InputError(f"share must lie between 0 and 1, got {share}.")
    y = _labels(train)
    g = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(y), generator=g).to(y.device)
    nth = torch.empty_like(y)
    nth[shuffled] = nth_of_class(y[shuffled])
    n = class_counts(y, train.num_classes).to(y.device)
    quota = (n * share).round().clamp(min=1).where(n > 1, 0)
    held = (nth < quota[y.clamp(min=0)]) & (y >= 0)
    if not bool(held.any()):
        raise InputError("No class has two samples, so none can be held out.")
    left, out = (
        FeatureSet(
            train.features[part],
            y[part],
            train.num_classes,
            None if train.logits is None else train.logits[part],
        )
        for part in (~held, held)
    )
    return left, out


def linear_rows(head: nn.Module) -> nn.Linear:
    """A copy of ``head`` as the ``nn.Linear`` from features (behind any neck) to logits.

    Taken: ``nn.Linear``, and heads whose logits are affine in the features, such as
    ``etf_head(normalize=False)``, with their scale in the rows. Refused: heads that normalise their
    features (cosine, ETF by default), and heads with several rows per class.

    Raises:
        InputError: a head that is not linear in its features.
    """
    if isinstance(head, nn.Linear):
        return copy.deepcopy(head)
    bare: Any = copy.deepcopy(check_head(head))
    bare.embed, bare.in_features = _same, bare.weight.shape[1]
    try:
        return to_linear(bare)
    except InputError as error:
        raise InputError(
            f"Stage two needs a head whose logits are linear in its features, such as nn.Linear; "
            f"those of {type(head).__name__} are not. crt and ncm make a new one from features."
        ) from error


def _same(features: Tensor) -> Tensor:
    return features


# --- the loop ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    epochs: int
    batch_size: int
    momentum: float
    weight_decay: float
    sampling: Sampling
    length: int | None
    seed: int


@torch.enable_grad()
def _train(
    train: FeatureSet,
    learned: list[dict[str, Any]],
    rows: Callable[[], tuple[Tensor, Tensor]],
    loss: Loss,
    plan: _Plan,
    after: Callable[[], object] | None = None,
) -> None:
    """SGD on ``learned``, where ``rows()`` is the weight and bias that they give."""
    x, y, peaks = train.features.detach(), _labels(train), [group["lr"] for group in learned]
    if plan.epochs < 0 or plan.batch_size < 1 or plan.seed < 0 or plan.length == 0:
        raise InputError(f"epochs and seed must be ≥ 0, batch_size and length ≥ 1: got {plan}.")
    if not all(math.isfinite(lr) and lr >= 0 for lr in peaks):
        raise InputError(f"lr must be finite and ≥ 0, got {peaks}.")
    counts = class_counts(y, train.num_classes)
    if not bool(counts.any()):
        raise InputError("There are no labelled samples to train on.")
    if plan.sampling != "instance" and corrects(loss):
        warn_twice(f"sampling={plan.sampling!r}", f"the loss {name_of(loss)}", stacklevel=4)
    length = plan.length or int(counts.sum())
    if plan.length is None and plan.sampling == "balanced":
        length = int(counts.max()) * int((counts > 0).sum())
    sampler = ClassSampler(
        y, plan.sampling, length=length, epochs=max(1, plan.epochs), seed=plan.seed
    )
    steps, counts = math.ceil(length / plan.batch_size), counts.to(x.device)
    optimizer = torch.optim.SGD(
        learned, lr=0.0, momentum=plan.momentum, weight_decay=plan.weight_decay
    )
    for epoch in range(plan.epochs):
        total = x.new_zeros(())
        batches = torch.from_numpy(sampler.order(epoch)).to(x.device).tensor_split(steps)
        for step, batch in enumerate(batches):
            progress = (epoch + step / steps) / plan.epochs
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * progress))
            features, (weight, bias) = x[batch], rows()
            available = {
                "features": features,
                "logits": F.linear(features, weight, bias),
                "labels": y[batch],
                "weight": weight,
                "bias": bias,
                "counts": counts,
                "epoch": epoch,
                "epochs": plan.epochs,
            }
            value = loss(**bind(loss, available))
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after is not None:
                after()
            total += value.detach()
        if not bool(total.isfinite()):
            raise NonFiniteLoss(
                f"The loss of stage two became NaN or infinite in epoch {epoch + 1}. Lower lr "
                f"(now {peaks[0]:g}, with features of norm {float(x.norm(dim=1).mean()):.3g}), or "
                "look for NaN in the features."
            )


def _layer(shape: Sequence[int], like: Tensor, *, bias: bool = True) -> nn.Linear:
    """An ``nn.Linear`` [K, D] of the dtype and on the device of ``like``, values not yet set."""
    K, D = shape
    layer = nn.Linear(D, K, bias=bias, device="meta", dtype=like.dtype)
    return layer.to_empty(device=like.device)


def _rows_for(train: FeatureSet, head: nn.Module) -> nn.Linear:
    """``head`` as a linear layer with a bias, of the features' dtype and on their device."""
    old = linear_rows(head)
    if old.weight.shape != (train.num_classes, train.dim):
        raise InputError(
            f"head has rows {tuple(old.weight.shape)}, the features are of {train.num_classes} "
            f"classes and D = {train.dim}: they belong to another model."
        )
    layer = _layer((train.num_classes, train.dim), train.features)
    with torch.no_grad():
        layer.weight.copy_(old.weight)
        layer.bias.zero_() if old.bias is None else layer.bias.copy_(old.bias)
    return layer


def _labels(data: FeatureSet) -> Tensor:
    if data.labels is None:
        raise InputError("Stage two needs labels: this FeatureSet has none.")
    return data.labels


# --- losses, and what they correct ---------------------------------------------------------------


def _class_balanced(
    logits: Tensor, labels: Tensor, counts: Tensor, *, beta: float = 0.9999
) -> Tensor:
    """Cross-entropy with weights (1−β)/(1−β^{n_c}), of mean 1 over the training samples."""
    n = counts.double()
    w = torch.where(n > 0, (1 - beta) / (1 - beta ** n.clamp(min=1)), 0)
    w = (w * n.sum() / (n @ w)).to(logits.dtype)
    return (w[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()
