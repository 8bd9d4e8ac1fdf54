"""Closed forms: minima that can be written down, up to one rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.frames import orthogonal_frame, simplex_etf
from ncmethods.ufm.model import UFM

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A minimum in closed form. Rows are given up to a rotation: compare Gram matrices or norms.

    Args:
        features: mean feature of each row of the targets (class means), [M, r].
        weight: rows of the last layer [K, r], None with SupCon; with more than one layer it lives
            in the space of its inputs, not in that of ``features``.
        bias: [K], or None.
        logits: [M, K], with bias; None with SupCon.
        singular_values: of the logits without bias, one row for each sample, [r].
        loss: value of the objective, with penalties.
    """

    features: Tensor
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    singular_values: Tensor
    loss: float


def predict(model: UFM) -> Prediction:
    """The global minimum of a model in closed form.

    Known here, with κ = √(λ_H Π λ_W) and Ỹ the targets with one column per sample:

    * squared error, ridge, any linear depth, any counts and targets, bias none or free: the logits
      keep the singular vectors of Ỹ (centred over the samples with a free bias), and each singular
      value σ shrinks to the s that minimises (s − σ)²/2N + (L+1)/2 · (κ s)^{2/(L+1)}. With one
      layer that is s = [σ − Nκ]₊. One-hot targets give the orthogonal frame (no bias), the simplex
      ETF (free bias), the norms of imbalanced classes, and the law of neural regression collapse.
    * the same with two layers and ReLU between them, balanced one-hot targets, no bias: same loss
      and logits; the features of the first layer are not unique, and are given as the linear ones.
    * squared error, h ≥ 0, one-hot targets, one layer, no bias: the same, on orthogonal features.
    * squared error, one layer, balanced classes, bias with ridge: as above, and along 1 the value
      s₁ = [1 − c − c/λ_b]₊ with c = K √(nλ_Hλ_W) beside 1 − c: ETF up to λ_b = c/(1−c), on the way
      to an orthogonal frame beyond.
    * CE, label smoothing, focal, ridge, one layer, balanced classes, any bias: a simplex ETF whose
      margin s solves p_y(s) = target_y − (K−1)√(nλ_Hλ_W) (focal: the same with its slope).
    * CE and label smoothing, h ≥ 0, ridge, one layer, no bias, any counts: orthogonal features with
      p_k = target_y − N √(λ_Hλ_W (K−1)/(K n_k)); a class for which this falls to 1/K vanishes.
    * CE and label smoothing on the sphere: a simplex ETF.
    * SupCon: a simplex ETF if balanced, an orthogonal frame for h ≥ 0 and any counts.

    Args:
        model: the model.

    Returns:
        the prediction.

    Raises:
        InputError: no closed form is known for this model, or it does not fit in its dimensions.

    References:
        Tirer and Bruna 2022, arXiv:2202.08087 (frames, two layers). Andriopoulos et al. 2024,
        arXiv:2409.04180 (regression). Zhu et al. 2021, arXiv:2105.02375 (CE). Zhou et al. 2022,
        arXiv:2210.02192 (other losses). Yaras et al. 2022, arXiv:2209.09211 (sphere). Kini et al.
        2024, arXiv:2306.07960 (SupCon with ReLU). Beyond these the forms follow from von Neumann's
        trace inequality.
    """
    if model.weight is not None or model.anchor is not None:
        raise _unknown("with a fixed classifier or an anchor")
    if model.loss == "supcon":
        return _contrastive(model)
    if model.constraint == "sphere":
        return _sphere(model)
    if model.loss in ("mse", "regression"):
        return _squared(model)
    return _entropy(model)


def _unknown(what: str) -> InputError:
    return InputError(f"No closed form is known here {what}. Call solve(model) for its answer.")


def _room(model: UFM, rank: int, what: str) -> None:
    width = min(model.dim, model.hidden) if model.depth > 1 else model.dim
    if width < rank:
        raise InputError(
            f"The closed form needs D ≥ {rank} for {what}, got {width}. Widen dim, or call "
            "solve(model) for the answer in few dimensions."
        )


def _shrunk(value: Tensor, N: float, kappa: float, depth: int) -> Tensor:
    """Argmin over s ≥ 0 of (s − σ)²/2N + (L+1)/2 · (κ s)^{2/(L+1)}, elementwise."""
    s: Tensor
    if depth == 1:
        s = (value - N * kappa).clamp(min=0)
        return s
    power = 2 / (depth + 1)
    scale: float = kappa**power

    def slope(s: Tensor) -> Tensor:
        return (s - value) / N + scale * s.clamp(min=1e-300) ** (power - 1)

    def cost(s: Tensor) -> Tensor:
        return (s - value).square() / (2 * N) + (depth + 1) / 2 * (kappa * s) ** power

    # The slope falls, then rises: its larger zero, if any, lies right of its minimum.
    turn = (N * scale * (1 - power)) ** (1 / (2 - power))
    low = torch.full_like(value, turn)
    s = _root(slope, low, value.clamp(min=turn))
    s = torch.where(slope(low) < 0, s, 0.0)
    s = torch.where(cost(s) < cost(torch.zeros_like(s)), s, 0.0)
    return s


def _root(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Zero of a function that rises through it between low and high, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        up = f(middle) > 0
        low, high = torch.where(up, low, middle), torch.where(up, middle, high)
    return (low + high) / 2


def _squared(model: UFM) -> Prediction:
    K, n, N, L = model.num_classes, model.numbers, float(model.N), model.depth
    if len(set(model.penalty_h.tolist())) > 1:
        raise _unknown("for squared error with a penalty of its own for each class")
    if float(model.penalty_h[0]) == 0 or bool((model.penalty_w == 0).any()):
        raise _unknown("without penalties on features and layers: the scale is not determined")
    if model.constraint == "nonnegative" and not (
        model.one_hot and L == 1 and model.bias == "none"
    ):
        raise _unknown("for squared error with h ≥ 0 and targets, layers or a bias of this kind")
    if model.relu and not (model.one_hot and L == 2 and model.bias == "none" and model.balanced):
        raise _unknown(
            "for layers with ReLU, but for two of them on balanced classes without bias (deeper "
            "ones may have minima of low rank)"
        )
    tied = model.bias == "ridge"
    if tied and not (model.one_hot and L == 1 and model.balanced):
        raise _unknown("for a bias with ridge, but for one layer on balanced classes")
    kappa = math.sqrt(float(model.penalty_h[0] * model.penalty_w.prod()))
    T, root = model.table, n.sqrt()
    mean = n @ T / N if model.bias != "none" else torch.zeros(K, dtype=torch.float64)
    # Ỹ has column √n_m (t_m − b) for the n_m equal columns of row m.
    U, sigma, Vh = torch.linalg.svd(((T - mean) * root[:, None]).T, full_matrices=False)
    s = _shrunk(sigma, N, kappa, L)
    bias = None if model.bias == "none" else mean
    extra = 0.0
    if tied:
        size, lam = float(root[0]), model.ridge_b
        along = max(size - N * kappa * (1 + 1 / lam), 0.0)  # √n s₁
        U = torch.linalg.eigh(T - 1 / K)[1].flip(1)  # the last column is along 1
        Vh = U.T
        s = torch.full_like(s, max(size - N * kappa, 0.0))
        s[-1] = along
        beta = (1 - along / size) / (1 + lam) / K
        bias = torch.full((K,), beta, dtype=torch.float64)
        extra = lam / 2 * K * beta**2
    keep = s > 1e-12 * math.sqrt(N)
    _room(model, K if model.constraint == "nonnegative" else int(keep.sum()), "its rank")
    U, s, Vh = U[:, keep], s[keep], Vh[keep]
    q = (kappa * s) ** (2 / (L + 1))  # λ σ² of every factor
    features = Vh.T * (q / model.penalty_h[0]).sqrt() / root[:, None]
    logits = ((U * s) @ Vh).T / root[:, None]
    if bias is not None:
        logits = logits + bias
    fit = float((n * (logits - T).square().sum(1)).sum()) / (2 * N)
    loss = fit + float((L + 1) / 2 * q.sum()) + extra
    return Prediction(features, U * (q / model.penalty_w[-1]).sqrt(), bias, logits, s, loss)


def _entropy(model: UFM) -> Prediction:
    K, lam_h, lam_w = model.num_classes, float(model.penalty_h[0]), float(model.penalty_w[0])
    if model.constraint == "nonnegative" and model.loss in ("ce", "label-smoothing"):
        return _entropy_of_axes(model)
    if model.loss == "pick-all-label" or not (model.one_hot and model.balanced):
        raise _unknown(f"for {model.loss} with unequal counts or targets that are no classes")
    if model.depth > 1 or model.constraint != "ridge":
        raise _unknown(f"for {model.loss} with more than one layer or h ≥ 0")
    if lam_h * lam_w == 0:
        raise _unknown("without penalties on features and layers: the scale is not determined")
    _room(model, K - 1, "a simplex ETF")
    n = float(model.numbers[0])
    kappa = math.sqrt(n * lam_h * lam_w)
    goal = 1 - model.epsilon * (K - 1) / K if model.loss == "label-smoothing" else 1.0
    if model.loss == "focal":
        gamma = model.gamma

        def rise(s: Tensor) -> Tensor:  # dℓ/ds + κ(K−1) with ℓ = (1−p)^γ (−log p)
            p = 1 / (1 + (K - 1) * torch.exp(-s))
            pull = gamma * (1 - p) ** gamma * p * torch.log(p) - (1 - p) ** (gamma + 1)
            return pull + kappa * (K - 1)

        def cost(s: Tensor) -> Tensor:
            p = 1 / (1 + (K - 1) * torch.exp(-s))
            return (1 - p) ** gamma * -torch.log(p) + kappa * (K - 1) * s

        zero = torch.zeros(1, dtype=torch.float64)
        far = min(700.0, float(cost(zero)) / (kappa * (K - 1)))  # the penalty alone costs as much
        grid = torch.linspace(0, far, 100_001, dtype=torch.float64)
        i = int(cost(grid).argmin())  # the slope may change its sign more than once
        s = zero if i == 0 else _root(rise, grid[i - 1], grid[min(i + 1, len(grid) - 1)])
        margin = float(s)
    else:
        p = goal - kappa * (K - 1)
        margin = math.log(p * (K - 1) / (1 - p)) if p > 1 / K else 0.0
    etf = simplex_etf(K, K - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    etf = etf * math.sqrt((K - 1) / K)  # Gram matrix I − 11ᵀ/K
    ratio = math.sqrt(lam_w / (n * lam_h))
    features, weight = etf * math.sqrt(margin * ratio), etf * math.sqrt(margin / ratio)
    logits = features @ weight.T
    fit = _fit(model, logits)
    bias = None if model.bias == "none" else torch.zeros(K, dtype=torch.float64)
    values = torch.full((K - 1,), margin * math.sqrt(n), dtype=torch.float64)
    loss = fit + kappa * (K - 1) * margin
    return Prediction(features, weight, bias, logits, values, loss)


def _entropy_of_axes(model: UFM) -> Prediction:
    """CE with h ≥ 0: each class has an axis of its own, and a problem in one margin.

    On its axis the column of W is m (e_k − 1/K)/a for the length a and the margin m of class k, so
    the penalties cost √(n_kλ_Hλ_W) √((K−1)/K) m.
    """
    if not (model.one_hot and model.depth == 1 and model.bias == "none"):
        raise _unknown(f"for {model.loss} with h ≥ 0 and layers, a bias or targets of this kind")
    if float(model.penalty_h.min() * model.penalty_w[0]) == 0:
        raise _unknown("without penalties on features and layers: the scale is not determined")
    K, n, N = model.num_classes, model.numbers, float(model.N)
    _room(model, K, "an axis for each class")
    lam_w, each = model.penalty_w[0], n * model.penalty_h
    goal = 1 - model.epsilon * (K - 1) / K if model.loss == "label-smoothing" else 1.0
    cost = (each * lam_w * (K - 1) / K).sqrt()
    p = goal - cost * N / n
    margin = torch.where(p > 1 / K, (p * (K - 1) / (1 - p)).clamp(min=1).log(), 0.0)
    power = margin * math.sqrt((K - 1) / K)  # ‖v‖ a, with v the column of W
    lengths = (power * (lam_w / each).sqrt()).sqrt()
    columns = torch.eye(K, dtype=torch.float64) - 1 / K
    weight = columns * margin / lengths.masked_fill(lengths == 0, 1.0)
    features = torch.diag(lengths)
    logits = features @ weight.T
    y = torch.arange(K)
    smooth = model.epsilon if model.loss == "label-smoothing" else 0.0
    fit = (n * F.cross_entropy(logits, y, reduction="none", label_smoothing=smooth)).sum() / N
    values = torch.linalg.svdvals(logits * n.sqrt()[:, None])
    return Prediction(features, weight, None, logits, values, float(fit + (cost * margin).sum()))


def _fit(model: UFM, logits: Tensor) -> float:
    """Mean softmax loss of balanced classes with these logits [K, K]."""
    y = torch.arange(model.num_classes)
    smooth = model.epsilon if model.loss == "label-smoothing" else 0.0
    each = F.cross_entropy(logits, y, reduction="none", label_smoothing=smooth)
    if model.loss == "focal":
        each = (-torch.expm1(-each)) ** model.gamma * each
    return float(each.mean())


def _sphere(model: UFM) -> Prediction:
    K = model.num_classes
    if model.loss not in ("ce", "label-smoothing") or not (model.one_hot and model.balanced):
        raise _unknown("on the sphere, but for CE and label smoothing on balanced classes")
    if model.dim < K - 1:
        raise InputError(
            f"On the sphere the closed form needs D ≥ K − 1 = {K - 1}, got {model.dim}. With more "
            "classes the minimum tends to frames.softmax_code as τ → 0: call solve(model)."
        )
    scale = K / (K - 1) / model.temperature  # gap between the label's logit and the others
    if model.loss == "label-smoothing":
        goal = 1 - model.epsilon * (K - 1) / K
        if 1 / (1 + (K - 1) * math.exp(-scale)) > goal:
            raise _unknown(
                "for label smoothing at a temperature at which the simplex ETF overshoots the "
                "target: raise the temperature"
            )
    etf = simplex_etf(K, K - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = etf @ etf.T / model.temperature
    values = torch.linalg.svdvals(logits)[: K - 1] * math.sqrt(float(model.numbers[0]))
    return Prediction(etf, etf, None, logits, values, _fit(model, logits))


def _contrastive(model: UFM) -> Prediction:
    K, n, N = model.num_classes, model.numbers, float(model.N)
    generator = torch.Generator().manual_seed(0)
    if model.constraint == "nonnegative":
        _room(model, K, "an orthogonal frame")
        rows, cosine = orthogonal_frame(K, K, dtype=torch.float64, generator=generator), 0.0
    elif model.balanced:
        _room(model, K - 1, "a simplex ETF")
        rows = simplex_etf(K, K - 1, dtype=torch.float64, generator=generator)
        cosine = -1 / (K - 1)
    else:
        raise _unknown("for SupCon on unequal counts without h ≥ 0")
    anchors = n >= 2  # a sample without a partner is no anchor
    each = torch.log(n - 1 + (N - n) * math.exp((cosine - 1) / model.temperature))
    loss = (n * each)[anchors].sum() / n[anchors].sum().clamp(min=1)
    values = torch.linalg.svdvals(rows * n.sqrt()[:, None])
    return Prediction(rows, None, None, None, values, float(loss))
