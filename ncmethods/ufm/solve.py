"""Numerical minima: L-BFGS over many models at once, and the gradient flow of one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.stats import ClassStats
from ncmethods.ufm._batch import Batch, kind, with_gradient
from ncmethods.ufm._lbfgs import minimise
from ncmethods.ufm.model import UFM

__all__ = ["Flow", "Solution", "flow", "solve", "solve_many"]


@dataclass(frozen=True, eq=False)
class Solution:
    """Features and layers at which a solver or a flow stands.

    Args:
        model: what was minimised.
        features: float64 [N, D] in the order of the targets' rows, [M, D] if folded.
        layers: W_1 … W_L, each [D', D]; empty with SupCon.
        bias: [K], or None.
        loss: value of the objective, with penalties.
        grad_norm: norm of its gradient in variables scaled so that the penalty is ½‖x‖².
        steps: that were taken.
        converged: whether ``grad_norm`` is below the tolerance.
    """

    model: UFM
    features: Tensor
    layers: tuple[Tensor, ...]
    bias: Tensor | None
    loss: float
    grad_norm: float
    steps: int
    converged: bool

    @property
    def labels(self) -> Tensor:
        """Row of the targets of each feature, int64 [N], [M] if folded."""
        return self.model.index

    @property
    def weight(self) -> Tensor:
        """Rows [K, D'] of the last layer, the classifier.

        Raises:
            InputError: the model has none (SupCon).
        """
        if not self.layers:
            raise InputError("loss='supcon' has no classifier: its solution is features alone.")
        return self.layers[-1]

    @property
    def head(self) -> nn.Linear:
        """The last layer as a module, for ``metrics.report``."""
        K, D = self.weight.shape
        head = nn.Linear(D, K, bias=self.bias is not None, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(self.weight)
            if self.bias is not None:
                head.bias.copy_(self.bias)
        return head

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the layers, the features first; each [N, D'], [M, D'] if folded."""
        out = [self.features]
        for W in self.layers[:-1]:
            z = out[-1] @ W.T
            out.append(z.relu() if self.model.relu else z)
        return tuple(out)

    @property
    def logits(self) -> Tensor:
        """[N, K], [M, K] if folded; on the sphere cosines over τ."""
        z = self.inputs[-1] @ self.weight.T
        if self.model.constraint == "sphere":
            z = z / self.model.temperature
        return z if self.bias is None else z + self.bias

    @property
    def means(self) -> Tensor:
        """Mean feature of each row of the targets (class means), [M, D]."""
        return self.mean_of(self.features)

    def mean_of(self, rows: Tensor) -> Tensor:
        """Mean over the samples of each row of the targets, of one of ``inputs`` or of logits."""
        size = torch.bincount(self.labels, minlength=self.model.rows).to(rows)
        total = rows.new_zeros(self.model.rows, rows.shape[1]).index_add_(0, self.labels, rows)
        return total / size[:, None]

    @property
    def stats(self) -> ClassStats:
        """Class moments of the features, for every metric of the library."""
        return self.stats_of(0)

    def stats_of(self, layer: int) -> ClassStats:
        """Class moments of the input of a layer, counted from 0.

        Raises:
            InputError: the targets are no classes.
        """
        if not self.model.one_hot:
            raise InputError(
                "Class moments need one-hot targets; this model has mixed, multi-hot or real ones. "
                "Read features and means."
            )
        rows, labels = self.inputs[layer], self.labels
        if self.model.folded:
            each = self.model.numbers.long()
            rows, labels = rows.repeat_interleave(each, 0), labels.repeat_interleave(each)
        return ClassStats(self.model.num_classes, rows.shape[1]).update(rows, labels)


def solve(
    model: UFM,
    *,
    seed: int = 0,
    restarts: int = 1,
    tol: float = 1e-9,
    steps: int = 5000,
    start: float = 1.0,
) -> Solution:
    """A minimum of the model by L-BFGS in float64: the best of several random starts.

    For one linear layer with ridge every local minimum is a global one. Elsewhere it is the best
    minimum that was found.

    Args:
        model: the model.
        seed: of the starts.
        restarts: number of starts, minimised side by side.
        tol: on the norm of the gradient, see :class:`Solution`.
        steps: at most.
        start: length of the random rows at the start.

    Returns:
        the solution; ``converged`` says whether ``tol`` was reached.

    Warns:
        UserWarning: the solver did not reach ``tol``, or the model lies outside the conditions of
            its theorem; the message names the condition.

    Raises:
        InputError: ``restarts``, ``steps``, ``tol`` or ``start`` not positive.
    """
    return _solve([model], seed, restarts, tol, steps, start)[0]


def solve_many(
    models: Sequence[UFM],
    *,
    seed: int = 0,
    restarts: int = 1,
    tol: float = 1e-9,
    steps: int = 5000,
    start: float = 1.0,
) -> list[Solution]:
    """:func:`solve` of many models, batched over those of one shape: a phase diagram is one call.

    Models that differ in penalties, counts (when folded), targets or constants of the loss only are
    minimised together; others one kind after the other. All start from the same draws.

    Args:
        models: the models.
        seed: of the starts.
        restarts: number of starts of each model.
        tol: on the norm of the gradient.
        steps: at most.
        start: length of the random rows at the start.

    Returns:
        solutions in the order of the models.

    Warns:
        UserWarning: as :func:`solve`, once for each condition and once for what has not converged.

    Raises:
        InputError: ``restarts``, ``steps``, ``tol`` or ``start`` not positive.
    """
    return _solve(models, seed, restarts, tol, steps, start)


def _solve(
    models: Sequence[UFM], seed: int, restarts: int, tol: float, steps: int, start: float
) -> list[Solution]:
    for name, value in (("restarts", restarts), ("steps", steps), ("tol", tol), ("start", start)):
        if not value > 0:
            raise InputError(f"{name} must be > 0, got {value}.")
    for message in dict.fromkeys(m for model in models for m in outside(model)):
        warnings.warn(message, UserWarning, stacklevel=3)
    kinds: dict[object, list[int]] = {}
    for i, model in enumerate(models):
        kinds.setdefault(kind(model), []).append(i)
    found: dict[int, Solution] = {}
    for members in kinds.values():
        batch = Batch([models[i] for i in members for _ in range(restarts)])
        draws = [torch.Generator().manual_seed(seed + r) for _ in members for r in range(restarts)]
        x, f, norm, taken = minimise(
            batch.with_gradient, batch.start(draws, start), lower=batch.lower, tol=tol, steps=steps
        )
        if batch.lower is not None:
            x, f, norm, taken = _nudged(batch, draws, (x, f, norm, taken), tol, steps)
        best = f.nan_to_num(torch.inf).view(-1, restarts).argmin(1)
        parts = batch.parts(x)
        for j, i in enumerate(members):
            row = j * restarts + int(best[j])
            one = {name: part[row] for name, part in parts.items()}
            found[i] = solution(models[i], one, float(f[row]), float(norm[row]), taken, tol)
    failed = [i for i in found if not found[i].converged]
    if failed:
        worst = max(found[i].grad_norm for i in failed)
        warnings.warn(
            f"{len(failed)} of {len(models)} models did not converge in {steps} steps: the largest "
            f"gradient norm is {worst:.1e}, tol = {tol:.1e}. Raise steps, take more restarts, or "
            "accept it (kinks of ReLU can keep the norm up).",
            UserWarning,
            stacklevel=3,
        )
    return [found[i] for i in range(len(models))]


_Found = tuple[Tensor, Tensor, Tensor, int]


def _nudged(
    batch: Batch, draws: Sequence[torch.Generator], found: _Found, tol: float, steps: int
) -> _Found:
    """Minimise again from the minimum plus noise of its size, until that fails three times.

    Features of a class that a projection has set to 0 all at once sit on a saddle.
    """
    x, f, norm, taken = found
    idle = 0
    while idle < 3:
        noise = torch.stack([torch.randn(x.shape[1], generator=g).double() for g in draws])
        beside = x + x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5 * noise
        assert batch.lower is not None
        beside = torch.where(batch.lower, beside.abs(), beside)
        y, fy, norm_y, more = minimise(
            batch.with_gradient, beside, lower=batch.lower, tol=tol, steps=steps
        )
        taken += more
        better = fy < f - 1e-10 * f.abs()
        x, f, norm = (
            torch.where(better[:, None], y, x),
            torch.where(better, fy, f),
            torch.where(better, norm_y, norm),
        )
        idle = 0 if bool(better.any()) else idle + 1
    return x, f, norm, taken


def solution(
    model: UFM, parts: dict[str, Tensor], loss: float, norm: float, steps: int, tol: float
) -> Solution:
    """What the parts of one model are."""
    H = parts["features"]
    if model.loss == "supcon":
        H = F.normalize(H, dim=-1)
    layers = tuple(parts[f"layer{i}"] for i in range(model.depth) if f"layer{i}" in parts)
    return Solution(model, H, layers, parts.get("bias"), loss, norm, steps, norm <= tol)


def outside(model: UFM) -> list[str]:
    """Conditions of the theorems that a model does not meet, one sentence each."""
    K, D = model.num_classes, model.dim
    if not model.one_hot or model.weight is not None:
        return []
    out = []
    frame = model.constraint == "nonnegative" or (
        model.loss in ("mse", "regression") and model.bias != "free"
    )
    least, name = (K, "orthogonal frame") if frame else (K - 1, "simplex ETF")
    width = min(D, model.hidden) if model.depth > 1 else D
    if width < least:
        out.append(
            f"D ≥ {least} does not hold (D = {width}, K = {K}): no {name} fits, and the solver's "
            "answer is another geometry."
        )
    plain = model.constraint != "sphere" and model.loss != "supcon"
    if plain and model.depth == 1 and model.loss == "mse" and model.threshold >= 1:
        out.append(
            f"N √(λ_Hλ_W/n_k) < 1 does not hold for every class (largest value "
            f"{model.threshold:.3g}; K √(nλ_Hλ_W) when balanced): classes collapse to zero."
        )
    return out


@dataclass(frozen=True, eq=False)
class Flow:
    """A gradient flow at given times.

    Args:
        time: [T].
        loss: objective with penalties, [T].
        solutions: where the flow stands, one for each time.
    """

    time: Tensor
    loss: Tensor
    solutions: list[Solution]


def flow(
    model: UFM,
    times: Tensor | Sequence[float],
    *,
    seed: int = 0,
    start: float = 1.0,
    central: bool = False,
    tolerance: float = 1e-8,
) -> Flow:
    """Gradient flow ẋ = −∇f(x) of features, layers and bias from a random start, in float64.

    Args:
        model: with constraint ``"ridge"`` (penalties may be 0), or SupCon.
        times: increasing, from 0 on; the first is where the start is recorded if it is 0.
        seed: of the start.
        start: length of the random rows at the start.
        central: keep the classifier at its least-squares optimum W*(H) for the features of each
            moment, the central path; for MSE, one layer, no bias, ``ridge_w`` > 0. Features then
            follow −N ∇_H f(W*(H), H), one sample's own gradient.
        tolerance: relative, of the integrator (scipy's LSODA).

    Returns:
        the flow.

    Raises:
        InputError: times not increasing, a constraint that the flow would leave, a central path of
            another model, or an integrator that gave up.

    References:
        Han, Papyan, Donoho 2022, arXiv:2106.02073 (central path).
    """
    moments = torch.as_tensor(times, dtype=torch.float64)
    if moments.ndim != 1 or not len(moments) or float(moments[0]) < 0:
        raise InputError(f"times must be [T] from 0 on, got {tuple(moments.shape)}.")
    if bool((moments.diff() <= 0).any()) or float(moments[-1]) == 0:
        raise InputError("times must increase, and end beyond 0.")
    if model.constraint == "nonnegative" or (
        model.constraint == "sphere" and model.loss != "supcon"
    ):
        raise InputError(f"The flow is of free variables, not of constraint={model.constraint!r}.")
    if central and not (
        model.loss in ("mse", "regression")
        and (model.depth, model.bias, model.weight) == (1, "none", None)
        and float(model.penalty_w[0]) > 0
    ):
        raise InputError(
            "central=True needs squared error, one learned layer, no bias and ridge_w > 0."
        )
    from scipy.integrate import solve_ivp

    batch = Batch([model], scaled=False)
    x0 = batch.start([torch.Generator().manual_seed(seed)], start)
    size, D = batch.sizes[0], model.dim

    def whole(h: Tensor) -> Tensor:
        if not central:
            return h
        H = h.view(-1, D)
        P = (H * batch.multiple[0][:, None]).T / model.N
        A = P @ H + model.penalty_w[0] * torch.eye(D, dtype=torch.float64)
        W: Tensor = torch.linalg.solve(A, P @ batch.targets[0]).T
        return torch.cat([h, W.reshape(1, -1)], 1)

    def speed(_: float, y: object) -> object:
        h = torch.as_tensor(y, dtype=torch.float64)[None]
        g = with_gradient(lambda x: batch.value(whole(x)), h)[1]
        return (-g[0] * (model.N if central else 1)).numpy()

    first = x0[:, :size] if central else x0
    done = solve_ivp(
        speed,
        (0.0, float(moments[-1])),
        first[0].numpy(),
        method="LSODA",
        t_eval=moments.numpy(),
        rtol=tolerance,
        atol=1e-3 * tolerance,
    )
    if not done.success:
        raise InputError(f"The integrator gave up: {done.message} Shorten times or start smaller.")
    path = torch.as_tensor(done.y.T, dtype=torch.float64)
    solutions = []
    for row in path:
        x = whole(row[None])
        f, g = batch.with_gradient(x)
        one = {name: part[0] for name, part in batch.parts(x).items()}
        solutions.append(solution(model, one, float(f), float(g.norm()), 0, 1e-9))
    losses = torch.tensor([s.loss for s in solutions], dtype=torch.float64)
    return Flow(moments, losses, solutions)
