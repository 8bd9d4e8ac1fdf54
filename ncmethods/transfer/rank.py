"""rank: which of these pretrained models, or layers, suits my data?"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmethods._core import InputError, check_choice
from ncmethods.features import FeatureSet
from ncmethods.transfer._inputs import PoolScore, labelled

__all__ = ["BASELINES", "Agreement", "Candidate", "Ranking", "rank", "weighted_tau"]

BASELINES = ("nearest_centre", "knn", "linear_probe")
"""Simple classifiers on the features: what a score must beat to be worth its name."""
_NEW = ("source_accuracy", "parameters")  # columns that come from no score
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Candidate:
    """One pretrained model, or one of its layers, seen on the target data.

    Args:
        data: features and labels of the target images; or a function that loads them, so that a
            ranking holds those of one candidate at a time.
        source_logits: [N, Z] of the source classifier, for LEEP, NCE and energy.
        source_accuracy: of the model on its own data, shown beside the scores.
        parameters: their number, shown beside the scores.
    """

    data: FeatureSet | Callable[[], FeatureSet]
    source_logits: Tensor | None = None
    source_accuracy: float | None = None
    parameters: int | None = None


class Agreement(NamedTuple):
    """How a score orders candidates whose accuracy is known."""

    tau: float
    """Kendall's τ weighted towards the best, in [−1, 1]; NaN for a constant score."""
    regret: float
    """Accuracy that its first choice loses on the best candidate, ≥ 0; a tie counts as its mean."""
    choice: str
    """Its first choice."""


@dataclass(frozen=True)
class Ranking:
    """Scores of every candidate, higher = better transfer."""

    candidates: tuple[str, ...]
    values: dict[str, dict[str, float]]
    """Score → candidate → value; NaN where it is not defined."""
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Intervals of 95 %, of baselines binomial (Wilson), of scores as wide as the middle 95 % of
    the bootstrap samples, about the value (repeated samples flatter every score)."""
    first: dict[str, dict[str, float]] = field(default_factory=dict)
    """Share of the bootstrap samples in which the candidate came first."""
    components: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Raw components of pool-level scores, which no pool changes, by score and candidate."""
    warnings: tuple[str, ...] = ()
    """What stands against these numbers."""

    def ranks(self, score: str) -> dict[str, int | None]:
        """Places from 1, the best; equal values share the better place; None for NaN."""
        of = self.values[check_choice(score, self.values, "score")]
        return {
            name: None if v != v else 1 + sum(w > v for w in of.values()) for name, v in of.items()
        }

    def best(self, score: str) -> str:
        """The candidate with the largest value, the first of equals.

        Raises:
            InputError: the score is NaN for all.
        """
        of = self.values[check_choice(score, self.values, "score")]
        known = {name: v for name, v in of.items() if v == v}
        if not known:
            raise InputError(f"{score} is NaN for every candidate.")
        return max(known, key=lambda name: known[name])

    def agreement(self, accuracies: Mapping[str, float]) -> dict[str, Agreement]:
        """Weighted τ and regret of every score against accuracies, after fine-tuning say.

        Candidates without a value are left out of a score's τ.

        Raises:
            InputError: an accuracy is missing, or there are fewer than two.
        """
        missing = [name for name in self.candidates if name not in accuracies]
        if missing or len(self.candidates) < 2:
            raise InputError(
                "agreement needs an accuracy of each of two candidates or more; missing: "
                f"{missing}."
            )
        found = {}
        for score, of in self.values.items():
            known = {name: v for name, v in of.items() if v == v}
            if len(known) < 2:
                continue
            truth = [accuracies[name] for name in known]
            top = max(known.values())
            picked = [accuracies[name] for name, v in known.items() if v == top]
            regret = max(accuracies[name] for name in self.candidates) - sum(picked) / len(picked)
            tau = weighted_tau(list(known.values()), truth)
            found[score] = Agreement(tau, regret, self.best(score))
        return found

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column names, and a line of text for each candidate: value, and rank in brackets."""
        columns, lines = ["candidate", *self.values], []
        places = {score: self.ranks(score) for score in self.values}
        for name in self.candidates:
            cells = [name]
            for score, of in self.values.items():
                place, shown = places[score][name], f"{of[name]:.4g}"
                shown = shown if score == "parameters" else f"{shown} ({place})"
                cells.append("–" if place is None else shown)
            lines.append(cells)
        return columns, lines

    def __str__(self) -> str:
        columns, lines = self.table()
        width = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, width)) for line in (columns, *lines)]
        return "\n".join([*text, *(f"! {note}" for note in self.warnings)])


def rank(
    pool: Mapping[str, FeatureSet | Candidate],
    scores: Sequence[str | Callable[..., Any]] = ("ncti", "logme", "h_score"),
    *,
    baselines: Sequence[str] = BASELINES,
    pca: int | None = 64,
    bootstrap: int = 0,
    seed: int = 0,
) -> Ranking:
    """Score every candidate on the same target samples.

    Scores are computed from float64 moments that one candidate's scores share, or from samples
    where that is unavoidable; candidates whose ``data`` is a function are loaded one at a time.

    Args:
        pool: candidates by name, with features of the same samples in the same order.
        scores: names from ``ncmethods.transfer.__all__``, or functions. Their parameters say what
            they are given: ``stats``, ``data``, ``labels``, ``source_probs``, ``source_logits``,
            ``num_classes``; bind others with ``functools.partial``.
        baselines: likewise; they stand in the table whatever the scores, () leaves them out.
        pca: principal coordinates for scores with that keyword, which saturate where N is not
            much larger than D; None gives the papers' formulas.
        bootstrap: samples drawn with replacement in each class, for intervals; 0 for none.
        seed: of the draws.

    Raises:
        InputError: an empty pool, an unknown score, candidates of different samples, or a
            pool-level score of one candidate.
    """
    if not pool:
        raise InputError("The pool is empty: there is nothing to rank.")
    names = [*baselines, *(s for s in scores if s not in baselines)]
    found = dict(_resolve(score) for score in names)
    candidates = {k: v if isinstance(v, Candidate) else Candidate(v) for k, v in pool.items()}
    raw: dict[str, dict[str, list[Any]]] = {score: {} for score in found}
    notes: dict[str, list[str]] = {}
    first: tuple[str, Tensor] | None = None
    for name, candidate in candidates.items():
        whole = candidate.data() if callable(candidate.data) else candidate.data
        keep = None if whole.labels is None else whole.labels >= 0
        data, logits = labelled(whole), candidate.source_logits
        if logits is not None and len(logits) != len(whole):
            raise InputError(
                f"{name} has {len(whole)} samples and source_logits of {len(logits)} rows."
            )
        if logits is not None and keep is not None:
            logits = logits[keep]
        assert data.labels is not None
        first = first or (name, data.labels)
        if not torch.equal(first[1], data.labels):
            raise InputError(
                f"Candidates are compared on the same samples in the same order: {first[0]} has "
                f"{len(first[1])} labels and {name} {len(data.labels)}, and they are not equal."
            )
        _warn(notes, name, data, pca, found)
        for score in found:
            raw[score][name] = []
        for rows in (None, *_draws(data.labels, bootstrap, seed)):
            part = data if rows is None else data.subset(rows)
            z = logits if rows is None or logits is None else logits[rows]
            for score, function in found.items():
                if rows is None or score not in BASELINES:
                    raw[score][name].append(_one(function, part, z, pca))
    return _ranking(candidates, found, raw, notes, 0 if first is None else len(first[1]))


def weighted_tau(scores: Sequence[float], accuracies: Sequence[float]) -> float:
    """Kendall's τ with hyperbolic weights on the best ranks, in [−1, 1], as the literature has it.

    ``scipy.stats.weightedtau(scores, accuracies)`` with its defaults.
    """
    from scipy.stats import weightedtau

    return float(weightedtau(scores, accuracies).statistic)


def _resolve(score: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """Name and function of a score."""
    if isinstance(score, str):
        room = importlib.import_module("ncmethods.transfer")
        check_choice(score, room.SCORES, "score")
        return score, getattr(room, score)
    inner, bound = score, ""
    while isinstance(inner, partial):
        bound = ", ".join(f"{k}={v}" for k, v in inner.keywords.items()) + bound
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    return (f"{name}({bound})" if bound else name), score


def _one(
    function: Callable[..., Any], data: FeatureSet, logits: Tensor | None, pca: int | None
) -> dict[str, float] | None:
    """Components of a pool-level score, else its value as the component ""; None without inputs."""
    if isinstance(function, PoolScore):
        return {k: float(v) for k, v in function.components(data).items()}
    have: dict[str, Callable[[], Any]] = {
        "data": lambda: data,
        "stats": lambda: data.frozen,
        "labels": lambda: data.labels,
        "num_classes": lambda: data.num_classes,
        "pca": lambda: pca,
        "source_logits": lambda: logits,
        "source_probs": lambda: None if logits is None else logits.double().softmax(1),
    }
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        # What functools.partial bound has become a keyword with a default.
        if name in have and (parameter.default is parameter.empty or name == "pca"):
            bound = name == "pca" and isinstance(function, partial) and "pca" in function.keywords
            value = None if bound else have[name]()
            if value is not None:
                given[name] = value
            elif parameter.default is parameter.empty:
                return None
        elif parameter.default is parameter.empty:
            label = _resolve(function)[0]
            raise InputError(f"{label} needs {name!r}: pass functools.partial({label}, {name}=…).")
    return {"": float(function(**given))}


def _draws(labels: Tensor, times: int, seed: int) -> list[Tensor]:
    """Rows [N] drawn with replacement within each class."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    start = (counts.cumsum(0) - counts)[labels[order]]  # of the class of each sorted sample
    size = counts[labels[order]]
    rng = torch.Generator().manual_seed(seed)
    u = [torch.rand(len(labels), generator=rng, dtype=torch.float64) for _ in range(times)]
    return [order[start + (v.to(size.device) * size).long()] for v in u]


def _warn(
    notes: dict[str, list[str]],
    name: str,
    data: FeatureSet,
    pca: int | None,
    found: Mapping[str, Callable[..., Any]],
) -> None:
    """Collect what stands against the scores of one candidate, by reason."""
    assert data.labels is not None
    counts = torch.bincount(data.labels, minlength=data.num_classes)
    for what, bad in (("no sample", counts == 0), ("one sample", counts == 1)):
        if bool(bad.any()):
            classes = ", ".join(map(str, bad.nonzero()[:8, 0].tolist()))
            key = f"Classes with {what}: {classes}{'…' if int(bad.sum()) > 8 else ''}"
            notes.setdefault(key + "; what they say of a variance is nothing.", [])
    cut = [s for s, f in found.items() if _takes(f, "pca")]
    dim = data.dim if pca is None else min(pca, data.dim)
    if cut and len(data) - int((counts > 0).sum()) <= dim:
        notes.setdefault(
            f"N = {len(data)} leaves no more than {dim} directions within classes: "
            f"{', '.join(cut)} saturate (pass a smaller pca). Of",
            [],
        ).append(name)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return not isinstance(function, PoolScore) and name in inspect.signature(function).parameters


def _ranking(
    candidates: Mapping[str, Candidate],
    found: Mapping[str, Callable[..., Any]],
    raw: Mapping[str, Mapping[str, list[Any]]],
    notes: Mapping[str, list[str]],
    N: int,
) -> Ranking:
    """Combine what was computed for each candidate."""
    warnings = [
        f"{reason} {', '.join(names)}." if names else reason for reason, names in notes.items()
    ]
    values: dict[str, dict[str, float]] = {}
    for column in _NEW:
        given = {name: getattr(c, column) for name, c in candidates.items()}
        if any(v is not None for v in given.values()):
            values[column] = {k: float("nan") if v is None else float(v) for k, v in given.items()}
    result = Ranking(tuple(candidates), values)
    for score, function in found.items():
        of = raw[score]
        without = [name for name, repeats in of.items() if repeats[0] is None]
        if len(without) == len(of):
            warnings.append(f"{score} is left out: no candidate has the source_logits it needs.")
            continue
        if without:
            warnings.append(f"{score} needs source_logits, which {', '.join(without)} lack.")
        # One dictionary for the data, then one for each bootstrap sample.
        runs = [
            _combined(function, {k: r[b] for k, r in of.items()})
            for b in range(len(next(iter(of.values()))))
        ]
        values[score] = runs[0]
        if isinstance(function, PoolScore):
            result.components[score] = {name: of[name][0] for name in of}
        finite = [v for v in runs[0].values() if v == v]
        top = max(finite, default=0.0)
        tied = [k for k, v in runs[0].items() if abs(top - v) <= 1e-6 * abs(top)]
        if 1 < len(tied) == len(finite):
            warnings.append(f"{score} is the same for every candidate: it ranks nothing.")
        elif len(tied) > 1 and score not in BASELINES:
            warnings.append(f"{score} is the same for {', '.join(tied)}: it cannot choose.")
        if score in BASELINES:
            result.intervals[score] = {k: _wilson(v, N) for k, v in runs[0].items()}
        elif len(runs) > 1:
            result.intervals[score] = {k: _about(runs[0][k], [r[k] for r in runs[1:]]) for k in of}
            result.first[score] = _firsts(runs[1:])
    return Ranking(
        result.candidates,
        values,
        result.intervals,
        result.first,
        result.components,
        tuple(warnings),
    )


def _combined(
    function: Callable[..., Any], parts: Mapping[str, dict[str, float] | None]
) -> dict[str, float]:
    if isinstance(function, PoolScore):
        tensors = {
            name: {k: torch.tensor(v, dtype=torch.float64) for k, v in (of or {}).items()}
            for name, of in parts.items()
        }
        return {name: float(v) for name, v in function.combine(tensors).items()}
    return {name: float("nan") if of is None else of[""] for name, of in parts.items()}


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n samples."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5
    return middle - half, middle + half


def _about(value: float, repeats: Iterable[float]) -> tuple[float, float]:
    """The middle 95 % of the repeats that are numbers, moved so that their mean is ``value``."""
    known = torch.tensor([v for v in repeats if v == v], dtype=torch.float64)
    if not len(known):
        return float("nan"), float("nan")
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    bias = float(known.mean()) - value
    return low - bias, high - bias


def _firsts(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Share of the runs in which each candidate has the largest value; ties share."""
    shares = dict.fromkeys(runs[0], 0.0)
    for of in runs:
        known = {k: v for k, v in of.items() if v == v}
        top = [k for k, v in known.items() if v == max(known.values())]
        for k in top:
            shares[k] += 1 / len(top)
    return {k: share / len(runs) for k, share in shares.items()}
