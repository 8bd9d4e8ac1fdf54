"""How well scores tell in-distribution from out-of-distribution: AUROC, AUPR, FPR, intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice

__all__ = ["aupr", "auroc", "bootstrap", "evaluate", "fpr95", "fpr_at_tpr"]


def auroc(scores_id: Tensor, scores_ood: Tensor) -> Tensor:
    """P(s_ood > s_id) + ½ P(s_ood = s_id), float64 []: 1 is perfect, ½ is chance.

    Args:
        scores_id: in-distribution scores [N], higher = more out-of-distribution.
        scores_ood: out-of-distribution scores [M].

    Raises:
        InputError: no scores on a side, or NaN.
    """
    s, t = _checked(scores_id, scores_ood)
    s = s.sort().values
    below = torch.searchsorted(s, t, right=False) + torch.searchsorted(s, t, right=True)
    return below.double().mean() / (2 * len(s))


def aupr(
    scores_id: Tensor, scores_ood: Tensor, *, positive: str = "ood", method: str = "average"
) -> Tensor:
    """Area under the precision-recall curve, float64 [].

    It depends on the share of positives, M/(N + M) for ``"ood"``: compare on the same sets only.

    Args:
        scores_id: in-distribution scores [N], higher = more out-of-distribution.
        scores_ood: out-of-distribution scores [M].
        positive: which side is to be found, ``"ood"`` or ``"id"``.
        method: ``"average"`` is average precision, as in scikit-learn; ``"trapezoid"`` joins the
            points by lines, as pytorch-ood and OpenOOD do, which is too kind to few or tied scores.

    Raises:
        InputError: no scores on a side, NaN, or an unknown name.
    """
    check_choice(positive, ("ood", "id"), "positive")
    check_choice(method, ("average", "trapezoid"), "method")
    s, t = _checked(scores_id, scores_ood)
    hits, others = (t, s) if positive == "ood" else (-s, -t)
    cuts = torch.unique(torch.cat((hits, others))).flip(0)
    tp, fp = (
        len(x) - torch.searchsorted(x.sort().values, cuts, right=False) for x in (hits, others)
    )
    recall, precision = tp.double() / len(hits), tp.double() / (tp + fp)
    start = torch.zeros(1).to(recall)
    step = recall.diff(prepend=start)
    if method == "trapezoid":
        precision = (precision + torch.cat((start + 1, precision[:-1]))) / 2
    return (step * precision).sum()


def fpr_at_tpr(
    scores_id: Tensor, scores_ood: Tensor, *, tpr: float = 0.95, positive: str = "ood"
) -> Tensor:
    """Share of wrong alarms at the threshold that finds a share ``tpr`` of the positives, [].

    The two directions differ by a factor of two and more: pytorch-ood and OpenOOD count OOD as
    positive, the scripts of ViM, NECO, KNN and fDBD the in-distribution. Ties count as errors.

    Args:
        scores_id: in-distribution scores [N], higher = more out-of-distribution.
        scores_ood: out-of-distribution scores [M].
        tpr: in (0, 1].
        positive: ``"ood"``: the share of in-distribution that scores as high as the
            ⌈tpr·M⌉-th largest OOD score; ``"id"``: the share of OOD that scores as low as the
            ⌈tpr·N⌉-th smallest in-distribution score.

    Raises:
        InputError: no scores on a side, NaN, an unknown direction, or ``tpr`` out of range.
    """
    check_choice(positive, ("ood", "id"), "positive")
    if not 0 < tpr <= 1:
        raise InputError(f"tpr is a share in (0, 1], got {tpr}.")
    s, t = _checked(scores_id, scores_ood)
    hits, others = (t, s) if positive == "ood" else (-s, -t)
    need = max(1, math.ceil(tpr * len(hits) - 1e-9))
    cut = hits.sort(descending=True).values[need - 1]
    return (others >= cut).double().mean()


def fpr95(scores_id: Tensor, scores_ood: Tensor, *, positive: str = "ood") -> Tensor:
    """:func:`fpr_at_tpr` at 95 %."""
    return fpr_at_tpr(scores_id, scores_ood, positive=positive)


def bootstrap(
    measure: Callable[[Tensor, Tensor], Tensor | float],
    scores_id: Tensor,
    scores_ood: Tensor,
    *,
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a measure over samples: both sides are drawn anew, each by itself.

    It says how much the test images matter, not how much another training would change.

    Args:
        measure: such as :func:`auroc`, of float64 scores on the CPU.
        scores_id: in-distribution scores [N].
        scores_ood: out-of-distribution scores [M].
        level: of the interval.
        repeats: number of draws.
        seed: of the draws.

    Returns:
        Lower and upper end.

    Raises:
        InputError: no scores on a side, NaN, or a level or number of repeats out of range.
    """
    if not (0 < level < 1 and repeats >= 1):
        raise InputError(f"level lies in (0, 1) and repeats ≥ 1, got {level} and {repeats}.")
    s, t = _checked(scores_id, scores_ood)
    rng = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (len(x),), generator=rng)]

    values = torch.tensor([float(measure(drawn(s), drawn(t))) for _ in range(repeats)]).double()
    low, high = values.quantile(values.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high


def evaluate(
    scores_id: Tensor, scores_ood: Mapping[str, Tensor], *, near: Sequence[str] = ()
) -> dict[str, float]:
    """All measures for each OOD set, and their means over the sets (sets are never pooled).

    Args:
        scores_id: in-distribution scores [N], higher = more out-of-distribution.
        scores_ood: name of the set → its scores.
        near: names of the sets that are like the in-distribution; the others are far. If given,
            ``near/…`` and ``far/…`` are the means over each kind.

    Returns:
        ``SET/auroc``, ``SET/aupr`` (OOD positive, average precision), ``SET/fpr95_ood`` and
        ``SET/fpr95_id`` by the positive side, and the same under ``mean``.

    Raises:
        InputError: no set, one that is named like a mean over sets, a name in ``near`` that is
            none, or scores that cannot be used.

    Warns:
        UserWarning: an AUROC far below ½, which a wrong sign would give.
    """
    if not scores_ood:
        raise InputError("evaluate needs at least one set of out-of-distribution scores, got none.")
    taken = {"mean", "near", "far"} & set(scores_ood)
    if taken:
        raise InputError(f"{sorted(taken)} are names of means over sets: give the sets others.")
    for name in near:
        check_choice(name, scores_ood, "near set")
    rows: dict[str, dict[str, float]] = {}
    for name, t in scores_ood.items():
        rows[name] = {
            "auroc": float(auroc(scores_id, t)),
            "aupr": float(aupr(scores_id, t)),
            "fpr95_ood": float(fpr95(scores_id, t, positive="ood")),
            "fpr95_id": float(fpr95(scores_id, t, positive="id")),
        }
        if rows[name]["auroc"] < 0.25:
            warnings.warn(
                f"AUROC on {name!r} is {rows[name]['auroc']:.2f}, far below chance. Scores must be "
                "higher for out-of-distribution; those of OpenOOD and scikit-learn are negated.",
                stacklevel=2,
            )
    kinds = {"mean": list(rows)}
    if near:
        kinds["near"] = [name for name in rows if name in near]
        kinds["far"] = [name for name in rows if name not in near]
    sets = dict(rows)
    for kind, names in kinds.items():
        if names:
            rows[kind] = {
                key: sum(sets[name][key] for name in names) / len(names) for key in sets[names[0]]
            }
    return {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}


def _checked(scores_id: Tensor, scores_ood: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("scores_id", scores_id), ("scores_ood", scores_ood)):
        if not isinstance(scores, Tensor) or scores.ndim != 1 or not len(scores):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"{name} must be a tensor [N] with at least one score, got {shape}.")
        bad = int(scores.isnan().sum())
        if bad:
            raise InputError(
                f"{name} holds {bad} NaN of {len(scores)}: their features were not finite."
            )
    return scores_id.detach().cpu().double(), scores_ood.detach().cpu().double()
