"""Models of one shape, stacked: their parameters as one vector each, and their objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods.losses import supcon
from ncmethods.ufm.model import UFM

Parts = dict[str, Tensor]


def kind(model: UFM) -> Hashable:
    """Models with one kind can be stacked."""
    contrast = model.temperature if model.loss == "supcon" else None
    parts = tuple(model.shapes.items())
    return (model.loss, model.constraint, model.bias, model.relu, parts, contrast, model.folded)


class Batch:
    """Objectives of B models of one kind, as functions of x [B, P].

    ``x`` is scaled by the root of the penalties, where they are positive, so that the ridge is
    ½‖x‖² and features and layers are on one footing.
    """

    def __init__(self, models: Sequence[UFM], *, scaled: bool = True) -> None:
        self.model = one = models[0]
        self.models = models
        self.sizes = [math.prod(shape) for shape in one.shapes.values()]
        index = [m.index for m in models]
        n, self.N = [m.numbers for m in models], _f64([float(m.N) for m in models])
        folded = [c if m.folded else torch.ones_like(c) for c, m in zip(n, models)]
        self.multiple = torch.stack([c[i] for c, i in zip(folded, index)])  # samples per feature
        self.labels = torch.stack(index)
        T = torch.stack([m.table[i] for m, i in zip(models, index)])  # [B, M', K]
        if one.loss == "label-smoothing":
            share = _f64([m.epsilon for m in models])[:, None, None]
            T = (1 - share) * T + share * T.sum(-1, keepdim=True) / one.num_classes
        self.targets = T
        self.gamma = _f64([m.gamma for m in models])[:, None]
        self.tau = _f64([m.temperature for m in models])[:, None, None]
        self.fixed = None
        if one.weight is not None:
            self.fixed = torch.stack([_cast(m.weight) for m in models if m.weight is not None])
        self.anchor = [m.anchor for m in models]
        self.penalty = self._penalty(models, index)
        self.scale = torch.ones_like(self.penalty)
        if scaled:  # the bias keeps its unit: its penalty may be tiny
            P = self.penalty.clone()
            P[:, P.shape[1] - (one.num_classes if one.bias != "none" else 0) :] = 0
            self.scale = torch.where(P > 0, P.clamp(min=1e-300).rsqrt(), 1.0)
        lower = torch.zeros(self.penalty.shape[1], dtype=torch.bool)
        lower[: self.sizes[0]] = one.constraint == "nonnegative"
        self.lower = lower if bool(lower.any()) else None

    def _penalty(self, models: Sequence[UFM], index: Sequence[Tensor]) -> Tensor:
        """λ of each entry of x, [B, P]; a folded feature has that of its samples together."""
        shapes = self.model.shapes
        if self.model.constraint == "sphere" or self.model.loss == "supcon":
            return torch.zeros(len(models), sum(self.sizes), dtype=torch.float64)
        rows = []
        for m, i, multiple in zip(models, index, self.multiple):
            parts = [(m.penalty_h[i] * multiple).repeat_interleave(m.dim)]
            for name, size in list(zip(shapes, self.sizes))[1:]:
                value = m.ridge_b if name == "bias" else float(m.penalty_w[int(name[5:])])
                parts.append(torch.full((size,), value, dtype=torch.float64))
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def start(self, generators: Sequence[torch.Generator], size: float) -> Tensor:
        """Random x [B, P]: Gaussian features and layers with rows of length ``size``, bias 0."""
        rows = []
        for generator in generators:
            parts = []
            for name, shape in self.model.shapes.items():
                part = torch.randn(shape, dtype=torch.float64, generator=generator)
                part = part * (size / math.sqrt(shape[-1]))
                if name == "bias":
                    part = torch.zeros_like(part)
                if name == "features" and self.lower is not None:
                    part = part.abs()
                parts.append(part.flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows) / self.scale

    def parts(self, x: Tensor) -> Parts:
        """What x [B, P] stands for, on the sphere where the model is."""
        out = {}
        pieces = torch.split(x * self.scale, self.sizes, dim=1)
        for (name, shape), piece in zip(self.model.shapes.items(), pieces):
            out[name] = piece.reshape(len(x), *shape)
        if self.model.constraint == "sphere":
            out = {name: F.normalize(part, dim=-1) for name, part in out.items()}
        if self.fixed is not None:
            out["layer0"] = self.fixed
        return out

    def activations(self, parts: Parts) -> list[Tensor]:
        """Inputs of the layers, and the logits, each [B, M', ·]."""
        out, last = [parts["features"]], self.model.depth - 1
        for i in range(self.model.depth if "layer0" in parts else 0):
            z = out[-1] @ parts[f"layer{i}"].mT
            out.append(z.relu() if self.model.relu and i < last else z)
        if self.model.constraint == "sphere":
            out[-1] = out[-1] / self.tau
        if "bias" in parts:
            out[-1] = out[-1] + parts["bias"][:, None]
        return out

    def fit(self, parts: Parts) -> Tensor:
        """1/N Σ ℓ, [B]."""
        model = self.model
        if model.loss == "supcon":
            one = torch.func.vmap(lambda h, y: supcon(h, y, temperature=model.temperature))
            value: Tensor = one(parts["features"], self.labels)
            return value
        z = self.activations(parts)[-1]
        if model.loss in ("mse", "regression"):
            each = (z - self.targets).square().sum(-1) / 2
        else:
            each = -(self.targets * z.log_softmax(-1)).sum(-1)
            if model.loss == "focal":
                miss = (-torch.expm1(-each)).clamp(min=torch.finfo(torch.float64).tiny)
                each = miss**self.gamma * each
        return (self.multiple * each).sum(1) / self.N

    def value(self, x: Tensor) -> Tensor:
        """The objectives [B]."""
        parts = self.parts(x)
        total = self.fit(parts) + (self.penalty * (x * self.scale).square()).sum(1) / 2
        if any(a is not None for a in self.anchor):
            gaps = []
            for h, a, m in zip(parts["features"], self.anchor, self.multiple):
                gap = h.new_zeros(())
                if a is not None:
                    gap = a[1] / 2 * (m * (h - _cast(a[0])).square().sum(1)).sum()
                gaps.append(gap)
            total = total + torch.stack(gaps) / self.N
        return total

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objectives [B] and their gradients [B, P]."""
        return with_gradient(self.value, x)


def with_gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B] of independent problems and their gradients [B, P]."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        f = value(x)
        (g,) = torch.autograd.grad(f.sum(), x)
    return f.detach(), g


def _f64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
