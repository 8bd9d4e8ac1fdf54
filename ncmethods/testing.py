"""Conformance checks: does a frame, head, loss, metric or scorer keep its promises?

They are the checks that the library's own parts pass, and are meant for yours: call one in a test
of any framework. A broken promise raises :class:`ConformanceError`, which says what was promised
and what was found; it is an ``AssertionError`` too.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, NCError, bind, is_head, logits_of
from ncmethods.features import FeatureSet
from ncmethods.frames import simplex_etf
from ncmethods.ood import Scorer
from ncmethods.stats import ClassStats

__all__ = [
    "ConformanceError",
    "check_frame",
    "check_head",
    "check_loss",
    "check_metric",
    "check_scorer",
]


class ConformanceError(NCError, AssertionError):
    """A frame, head, loss, metric or scorer does not do what its protocol promises."""


def _need(condition: bool | Tensor, promise: str) -> None:
    if not condition:
        raise ConformanceError(promise)


def _same(got: Tensor, want: Tensor, promise: str, tolerance: float = 1e-5) -> None:
    """Raise unless two tensors agree to ``tolerance``, relative to the larger of ``want`` and 1."""
    _need(
        got.shape == want.shape,
        f"{promise}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ.",
    )
    if want.numel() == 0:
        return
    got, want = got.detach().double(), want.detach().double()
    gap = float((got - want).abs().max())
    bound = tolerance * max(1.0, float(want.abs().max()))
    _need(gap <= bound, f"{promise}: they differ by {gap:.3g} (allowed {bound:.3g}).")


def check_frame(frame: Tensor, *, cosine: float | None = None) -> None:
    """Check that ``frame`` is a plain finite [K, D] tensor of unit rows.

    Args:
        frame: rows [K, D].
        cosine: the cosine of every pair of rows, e.g. −1/(K−1) for a simplex ETF; None to leave
            the angles free.

    Raises:
        ConformanceError: a promise is broken. Allowed error: 1e-6 in float32, 1e-12 in float64.
    """
    _need(
        isinstance(frame, Tensor) and frame.ndim == 2 and frame.is_floating_point(),
        "A frame is a floating 2-D tensor [K, D].",
    )
    _need(len(frame) >= 2, "A frame has at least two rows.")
    _need(frame.isfinite().all(), "A frame is finite.")
    _need(not frame.requires_grad, "A frame takes no gradient.")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(frame.dtype, 1e-2)
    gram = frame.double() @ frame.double().T
    _same(gram.diagonal(), torch.ones_like(gram.diagonal()), "The rows have unit norm", tolerance)
    if cosine is not None:
        want = torch.full_like(gram, cosine).fill_diagonal_(1)
        _same(gram, want, f"Every pair of rows has cosine {cosine:.6g}", tolerance)


def check_head(
    build: Callable[[int, int], nn.Module], in_features: int = 12, num_classes: int = 5
) -> None:
    """Check that ``build(in_features, num_classes)`` makes a head that keeps the Head protocol.

    Shapes; ``head(x) == head.logits(head.embed(x))`` in both modes; finite gradients; a weight that
    is no parameter stays as it is under an optimizer with weight decay; ``state_dict``, ``pickle``
    and ``deepcopy`` carry the whole head; one sample and none; float64, and float32 logits under
    bfloat16 autocast (heads only, ``nn.Linear`` follows torch).

    Args:
        build: a builder such as ``heads.etf_head``, or a ``functools.partial`` of one.
        in_features: width to build it for.
        num_classes: K to build it for.

    Raises:
        ConformanceError: a promise is broken.
    """
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(8, in_features, generator=noise)
    y = torch.arange(8) % num_classes
    head: Any = build(in_features, num_classes)
    _need(isinstance(head, nn.Module), "A head is an nn.Module.")
    _need(
        is_head(head) or isinstance(head, nn.Linear),
        "A head is an nn.Linear or has weight, embed and logits.",
    )
    _need(isinstance(head.weight, Tensor), "head.weight is a tensor.")
    D = head.weight.shape[-1]
    _need(tuple(head.weight.shape) == (num_classes, D), "head.weight is [K, D].")
    _need(head.in_features == in_features, "head.in_features is the width it was built for.")
    _need(head.out_features == num_classes, "head.out_features is K.")
    _need("weight" in head.state_dict(), "head.weight is in the state_dict.")

    def embed(model: Any, inputs: Tensor) -> Tensor:
        return model.embed(inputs) if is_head(model) else inputs

    for training in (True, False):
        head.train(training)
        features = embed(head, x)
        _need(tuple(features.shape) == (8, D), "embed gives features [N, D].")
        logits = logits_of(head, features)
        _need(tuple(logits.shape) == (8, num_classes), "logits are [N, K].")
        _need(logits.isfinite().all(), "Logits of finite inputs are finite.")
        _same(head(x), logits, "head(x) equals head.logits(head.embed(x))")
    for rows in (0, 1):
        _need(len(head(x[:rows])) == rows, f"In eval mode a batch of {rows} passes.")

    before = head.weight.detach().clone()
    head.train()
    inputs = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([*head.parameters(), inputs], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(head(inputs), y).backward()  # type: ignore[no-untyped-call]
        grad = torch.zeros_like(inputs) if inputs.grad is None else inputs.grad
        _need(grad.isfinite().all(), "Gradients of the inputs are finite.")
        _need(grad.abs().sum() > 0, "A gradient reaches the inputs.")
        optimizer.step()
    learned = any(p is head.weight for p in head.parameters())
    if not learned and not head.weight.requires_grad:
        _need(torch.equal(head.weight, before), "Optimizer steps leave a fixed weight as it is.")

    head.eval()
    want = head(x)
    fresh = build(in_features, num_classes)
    fresh.load_state_dict(head.state_dict())
    for how, other in (
        ("load_state_dict", fresh.eval()),
        ("copy.deepcopy", copy.deepcopy(head)),
        ("pickle", pickle.loads(pickle.dumps(head))),
    ):
        _same(other(x), want, f"{how} restores the same head")

    wide = copy.deepcopy(head).double()
    _need(wide(x.double()).dtype == torch.float64, "A float64 head gives float64 logits.")
    _same(wide(x.double()), want, "float64 logits equal float32 logits", 1e-4)
    if is_head(head):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            mixed = logits_of(head, embed(head, x))
        _need(mixed.dtype == torch.float32, "Under autocast logits are float32.")
        _same(mixed, want, "Logits under bfloat16 autocast are near those without", 0.05)


def check_loss(
    loss: Callable[..., Tensor], *, num_classes: int = 5, dim: int = 8, **extra: Any
) -> None:
    """Check that ``loss`` is a pure function of tensors with the protocol's names.

    It gets what it names of ``features, logits, labels, weight, counts``. Then: a finite scalar of
    at least float32 with finite gradients; inputs untouched; the order of samples and the numbering
    of classes do not matter; samples with a negative label do not count; batches of one class, of
    one sample, with absent classes, in half precision and under autocast work; float64 is computed
    in float64; labels that are floating, or ≥ K where the loss takes what tells K, are an
    InputError.

    Args:
        loss: the function; bind other hyperparameters with ``functools.partial``.
        num_classes: K of the trial data.
        dim: D of the trial data.
        **extra: further named tensors; those of length K are renumbered with the classes.

    Raises:
        ConformanceError: a promise is broken.
        InputError: the loss needs a name that is not available.
    """
    K, N = num_classes, 4 * num_classes
    noise = torch.Generator().manual_seed(0)
    data: dict[str, Tensor] = {
        "features": torch.randn(N, dim, generator=noise, dtype=torch.float64),
        "logits": torch.randn(N, K, generator=noise, dtype=torch.float64),
        "labels": torch.cat(
            [torch.arange(K - 1), torch.randint(K - 1, (N - K + 1,), generator=noise)]
        ),
        "weight": simplex_etf(K, dim, generator=noise, dtype=torch.float64),
        "counts": torch.arange(K, 0, -1) * 10,
        **extra,
    }
    _need("labels" in inspect.signature(loss).parameters, "A loss takes labels.")

    def run(**changed: Tensor) -> Tensor:
        return loss(**bind(loss, data | changed))

    def check(promise: str, **changed: Tensor) -> Tensor:
        """Value of the loss on changed data, after looking at its gradients."""
        leaves = {
            name: (data | changed)[name].detach().clone().requires_grad_()
            for name in ("features", "logits")
        }
        value = run(**(changed | leaves))
        _need(isinstance(value, Tensor) and value.ndim == 0, f"{promise}: the loss is a scalar [].")
        _need(value.isfinite(), f"{promise}: the loss is finite, got {value.item()}.")
        _need(value.dtype.itemsize >= 4, f"{promise}: the loss is at least float32.")
        value.backward()  # type: ignore[no-untyped-call]
        grads = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        _need(bool(grads), f"{promise}: a gradient reaches the features or the logits.")
        _need(all(g.isfinite().all() for g in grads), f"{promise}: gradients are finite.")
        return value.detach()

    before = {name: value.clone() for name, value in data.items()}
    whole = check("Plain batch")
    _need(whole.dtype == torch.float64, "float64 inputs are computed in float64.")
    _same(run(), whole, "Two calls give the same value", 0.0)
    _need(
        all(torch.equal(value, before[name]) for name, value in data.items()),
        "A loss leaves its inputs as they are.",
    )

    order = torch.randperm(N, generator=noise)
    samples = {name: data[name][order] for name in ("features", "logits", "labels")}
    _same(run(**samples), whole, "The order of the samples does not matter", 1e-12)

    number = torch.arange(K).roll(1)  # new number of each class
    old = number.argsort()
    classes = {n: v[old] for n, v in data.items() if n not in samples and len(v) == K}
    classes |= {"labels": number[data["labels"]], "logits": data["logits"][:, old]}
    _same(run(**classes), whole, "The numbering of the classes does not matter", 1e-12)

    ignored = {name: torch.cat([data[name], data[name][:3]]) for name in ("features", "logits")}
    skip = torch.cat([data["labels"], torch.tensor([-1, -100, -1])])
    _same(run(labels=skip, **ignored), whole, "Negative labels do not count", 1e-12)

    check("A batch of one class", labels=torch.zeros_like(data["labels"]))
    one = {name: data[name][:1] for name in samples}
    check("A batch of one sample", **one)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)):
        low = {name: data[name].to(dtype) for name in ("features", "logits", "weight")}
        _same(check(f"{dtype} inputs", **low), whole, f"{dtype} inputs agree", tolerance)
    single = {name: data[name].float() for name in ("features", "logits", "weight")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = check("Under autocast", **single)
    _same(mixed, whole, "The loss under autocast is computed in float32", 1e-5)

    names = inspect.signature(loss).parameters
    knows = any(name in names for name in ("logits", "weight", "counts"))
    for bad, promise in (
        (data["labels"].double(), "Floating labels raise InputError."),
        (data["labels"] + (K if knows else 0.5), "Labels ≥ K raise InputError (on the CPU)."),
        (data["labels"][:-1], "Labels of another length raise InputError."),
    ):
        try:
            run(labels=bad)
        except InputError:
            continue
        except Exception as error:
            raise ConformanceError(f"{promise} Got {type(error).__name__}: {error}") from error
        raise ConformanceError(f"{promise} Got a value.")


def check_metric(
    metric: Callable[..., Tensor], *, num_classes: int = 5, dim: int = 8, **extra: Any
) -> None:
    """Check that ``metric`` is a pure function that measures classes, not their numbering.

    It gets what it names of ``stats, features, labels, logits, means, weight, rows``. Then: a
    finite float scalar; inputs untouched; the numbering of classes does not matter;
    nor, for samples, their order. A function of ``stats`` gives the same for a statistic merged of
    two, for one with a further class without samples, and after a shift of all features.

    Args:
        metric: the function; bind its options with ``functools.partial``.
        num_classes: K of the trial data.
        dim: D of the trial data.
        **extra: further arguments by name.

    Raises:
        ConformanceError: a promise is broken.
        InputError: the metric needs a name that is not available.
    """
    K, N = num_classes, 20 * num_classes
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(K, dim, generator=noise, dtype=torch.float64)
    labels = torch.arange(N) % K
    spread = torch.randn(N, dim, generator=noise, dtype=torch.float64)
    features = 3 + 2 * weight[labels] + spread

    def data(x: Tensor, y: Tensor, W: Tensor, classes: int = K) -> dict[str, Any]:
        stats = ClassStats(classes, dim).update(x, y)
        logits = (x - 3) @ W.T
        named = {"features": x, "labels": y, "logits": logits, "weight": W, "rows": W}
        return named | {"stats": stats, "means": stats.means} | extra

    def run(given: dict[str, Any]) -> Tensor:
        return metric(**bind(metric, given))

    given = data(features, labels, weight)
    before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor)}
    whole = run(given)
    _need(isinstance(whole, Tensor) and whole.ndim == 0, "A metric is a scalar tensor [].")
    _need(whole.is_floating_point() and whole.isfinite(), "A metric is a finite float.")
    _need(
        all(torch.equal(given[name], value) for name, value in before.items()),
        "A metric leaves its inputs as they are.",
    )
    number = torch.arange(K).roll(1)  # new number of each class
    renumbered = data(features, number[labels], weight[number.argsort()])
    _same(run(renumbered), whole, "The numbering of the classes does not matter", 1e-9)
    order = torch.randperm(N, generator=noise)
    shuffled = data(features[order], labels[order], weight)
    _same(run(shuffled), whole, "The order of the samples does not matter", 1e-9)

    if "stats" in bind(metric, given):
        merged = data(features, labels, weight)
        half = N // 3
        merged["stats"] = ClassStats(K, dim).update(features[:half], labels[:half]) + ClassStats(
            K, dim
        ).update(features[half:], labels[half:])
        _same(run(merged), whole, "A merged statistic gives the same", 1e-9)
        more = data(features, labels, weight)
        more["stats"] = ClassStats(K + 1, dim).update(features, labels)
        _same(run(more), whole, "A class without samples changes nothing", 1e-9)
        far = data(features, labels, weight)
        far["stats"] = ClassStats(K, dim).update(features + 1000, labels)
        _same(run(far), whole, "A shift of all features changes nothing", 1e-6)


def check_scorer(
    fit: Callable[..., Scorer],
    head: nn.Module | None = None,
    *,
    num_classes: int = 5,
    dim: int = 12,
    multiset: bool = True,
    compiler: str | None = "eager",
) -> None:
    """Check that ``fit(train, head=head)`` gives a scorer that keeps the Scorer protocol.

    The fit: twice the same; from moments what it is from samples, or an InputError; the order of
    samples and the numbering of classes do not matter, nor rows with a negative label, nor a second
    copy of all; nothing that it was given changes, or is held on to.

    The scores: [N], finite and at least float32, also of zero vectors and in half precision and
    under autocast; float64 agrees; each row alone; NaN for a row with NaN or infinity and for no
    other; logits of the head and logits that are passed count the same. Gradients are finite and
    reach the input. Another D or K, missing features or logits are an InputError.

    The module: ``.half()``, ``.to``, ``.eval()`` change nothing; ``state_dict`` carries all that
    was fitted; ``save`` and ``load``, ``pickle``, ``deepcopy`` restore it to the bit;
    ``torch.compile(fullgraph=True)`` gives the same.

    The trial features are non-negative, as after a ReLU.

    Args:
        fit: e.g. ``ood.NECO.fit``, or a ``functools.partial`` of it.
        head: with rows [num_classes, dim]; an ``nn.Linear`` with bias if None.
        num_classes: K of the trial data.
        dim: D of the trial data.
        multiset: whether a second copy of all samples leaves the scores as they are; False for
            what counts samples, such as the k-th neighbour.
        compiler: backend of ``torch.compile``; None leaves that out.

    Raises:
        ConformanceError: a promise is broken.
    """
    K, N = num_classes, 30 * num_classes
    noise = torch.Generator().manual_seed(0)
    if head is None:
        head = nn.Linear(dim, K)
        with torch.no_grad():
            head.weight.copy_(torch.randn(K, dim, generator=noise) / dim**0.5)
            head.bias.copy_(torch.randn(K, generator=noise) / 10)
    rows: Any = head
    W = rows.weight.detach().double()
    y = torch.arange(N) % K
    spread = torch.randn(N, dim, generator=noise, dtype=torch.float64)
    features = (1 + 4 * F.normalize(W, dim=1)[y] + spread / 2).relu()
    x = (2 * torch.randn(40, dim, generator=noise, dtype=torch.float64)).abs()
    x = torch.cat([features[:10] + 0.1, x, torch.zeros(1, dim, dtype=torch.float64)])

    def data(z: Tensor, labels: Tensor = y, by: nn.Module = head) -> FeatureSet:
        """Samples with their logits, in float32 as extract gives them."""
        return FeatureSet(z.float(), labels, K, _logits(by, z.float()))

    train, q = data(features), x.float()
    kept = copy.deepcopy((train, head.state_dict(), q))
    scorer = fit(train, head=head)
    _need(isinstance(scorer, Scorer), "fit returns a Scorer.")
    scores = scorer(q)
    tell = type(scorer).__name__
    _need(isinstance(scores, Tensor) and scores.shape == (len(q),), f"{tell}: scores are [N].")
    _need(scores.is_floating_point() and scores.dtype.itemsize >= 4, f"{tell}: floats.")
    _need(scores.isfinite().all(), f"{tell}: scores of finite features are finite.")
    _need(torch.equal(q, kept[2]), f"{tell}: a score leaves the features as they are.")

    # --- the scores --------------------------------------------------------------------------
    _same(scorer(q), scores, f"{tell}: two calls give the same", 0.0)
    wide = scorer(x)
    _same(scores, wide, f"{tell}: float32 agrees with float64", 1e-4)
    for low in (torch.float16, torch.bfloat16):
        _same(scorer(q.to(low)), scorer(q.to(low).float()), f"{tell}: {low} is computed wider", 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _same(scorer(q), scores, f"{tell}: autocast changes nothing", 1e-6)
    order = torch.randperm(len(q), generator=noise)
    _same(scorer(q[order]), scores[order], f"{tell}: rows do not see each other")
    parts = torch.cat([scorer(part) for part in (q[:1], q[:0], q[1:8], q[8:])])
    _same(parts, scores, f"{tell}: chunks, of one row and of none too, give what the whole gives")
    for bad in (torch.nan, torch.inf, -torch.inf):
        torn = q.clone()
        torn[3, 2] = bad
        found = scorer(torn)
        _need(found[3].isnan(), f"{tell}: a row with {bad} scores NaN, got {float(found[3])}.")
        sound = torch.arange(len(q)) != 3
        _same(found[sound], scores[sound], f"{tell}: a row with {bad} leaves the others alone")
    for of, leaf in (("features", x[:-1].clone()), ("a zero vector", torch.zeros(1, dim))):
        total = scorer(leaf.requires_grad_()).sum()
        _need(total.requires_grad, f"{tell}: a gradient reaches {of}.")
        total.backward()
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        _need(grad.isfinite().all(), f"{tell}: the gradient of {of} is finite.")
        _need(len(leaf) == 1 or bool(grad.abs().sum() > 0), f"{tell}: a gradient reaches {of}.")

    logits = _logits(head, q)
    _same(scorer(q, logits), scores, f"{tell}: logits of the head may be passed")
    if "features" in scorer.needs:
        _refuses(lambda: scorer(None, logits), f"{tell}: missing features raise InputError.")
    else:
        _same(scorer(None, logits), scores, f"{tell}: logits are enough")
    if "logits" in scorer.wants():
        try:
            alone = fit(train)
        except InputError:
            pass
        else:
            _same(alone(q, logits), scores, f"{tell}: fitted without a head it takes logits")
            _refuses(lambda: alone(q), f"{tell}: missing logits raise InputError.")
        _refuses(lambda: scorer(q, logits[:, 1:]), f"{tell}: another K raises InputError.")
        if "features" in scorer.needs:
            _refuses(lambda: scorer(q, logits[1:]), f"{tell}: another N raises InputError.")
    if scorer.sizes()[0] is not None:
        _refuses(lambda: scorer(q[:, 1:]), f"{tell}: another D raises InputError.")
        _refuses(lambda: scorer(q[:, :1]), f"{tell}: D = 1 raises InputError.")
    _refuses(lambda: scorer(q[0]), f"{tell}: features that are not 2-D raise InputError.")

    # --- the module --------------------------------------------------------------------------
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scorer.safetensors"
        scorer.save(path)
        loaded = [one.load(path, head=copy.deepcopy(head)) for one in (type(scorer), Scorer)]
    for other in loaded:
        _need(type(other) is type(scorer), f"{tell}: load gives the class that was saved.")
        _same(other(q), scores, f"{tell}: load restores what was saved", 0.0)
    for how, other in (
        ("copy.deepcopy", copy.deepcopy(scorer)),
        ("pickle", pickle.loads(pickle.dumps(scorer))),
        (".half()", copy.deepcopy(scorer).half()),
        (".to(torch.bfloat16)", copy.deepcopy(scorer).to(torch.bfloat16)),
        (".double()", copy.deepcopy(scorer).double()),
        (".train()", copy.deepcopy(scorer).train()),
        (".eval()", copy.deepcopy(scorer).eval()),
    ):
        _same(other(q), scores, f"{tell}: {how} gives the same scores", 0.0)
    elsewhere = fit(data(1.5 * features), head=head)
    elsewhere.load_state_dict(scorer.state_dict())
    _same(elsewhere(q), scores, f"{tell}: the state_dict carries all that was fitted", 0.0)
    if torch.cuda.is_available():
        there = copy.deepcopy(scorer).cuda()(q.cuda())
        _same(there.cpu(), scores, f"{tell}: a GPU gives the same", 1e-4)
    if compiler is not None:
        torch.compiler.reset()  # it gives up after eight modules
        compiled = torch.compile(scorer, fullgraph=True, backend=compiler)
        try:
            found = compiled(q)
        except Exception as error:
            raise ConformanceError(f"{tell}: torch.compile(fullgraph=True): {error}") from error
        _same(found, scores, f"{tell}: torch.compile gives the same")

    # --- the fit -----------------------------------------------------------------------------
    _same(fit(train, head=head)(q), scores, f"{tell}: two fits give the same", 0.0)
    try:
        moments = fit(train.stats, head=head)
    except InputError:
        pass
    else:
        _same(moments(x), wide, f"{tell}: moments give what samples give")
    stir = torch.randperm(N, generator=noise)
    for change, same in (
        ("order of the samples", data(features[stir], y[stir])),
        ("rows with a negative label", data(torch.cat([features, 9 * x]), _ignored(y, len(x)))),
        *([("copy of all samples", data(features.repeat(2, 1), y.repeat(2)))] * multiset),
    ):
        _same(fit(same, head=head)(x), wide, f"{tell}: the {change} does not matter")
    number = torch.arange(K).roll(1)  # new number of each class
    renamed: Any = copy.deepcopy(head)
    with torch.no_grad():
        for name in ("weight", "bias"):
            part = getattr(renamed, name, None)
            if isinstance(part, Tensor):
                part.copy_(part.clone()[number.argsort()])
    if torch.equal(_logits(renamed, q), logits[:, number.argsort()]):  # its rows can be moved
        other = fit(data(features, number[y], renamed), head=renamed)
        clear = x[:-1]  # a zero vector may tie all classes
        _same(other(clear), wide[:-1], f"{tell}: the numbering of the classes does not matter")

    given, state, _ = kept
    intact = all(torch.equal(state[name], value) for name, value in head.state_dict().items())
    intact = intact and torch.equal(given.features, train.features)
    _need(intact, f"{tell}: a fit leaves its samples and its head as they are.")
    moved: Any = copy.deepcopy(head)
    lent = FeatureSet(train.features.clone(), y.clone(), K, _logits(head, train.features))
    holding = fit(lent, head=moved)
    with torch.no_grad():
        moved.weight.mul_(2)
        lent.features.mul_(2)
    _same(holding(q), scores, f"{tell}: a fitted scorer holds its own copies", 0.0)


def _logits(head: nn.Module, features: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(head, features)


def _ignored(labels: Tensor, more: int) -> Tensor:
    """``labels``, then some that do not count."""
    return torch.cat([labels, labels.new_full((more,), -1)])


def _refuses(call: Callable[[], Any], promise: str) -> None:
    """Raise unless the call ends in an InputError."""
    try:
        call()
    except InputError:
        return
    except Exception as error:
        raise ConformanceError(f"{promise} Got {type(error).__name__}: {error}") from error
    raise ConformanceError(f"{promise} Got a value.")
