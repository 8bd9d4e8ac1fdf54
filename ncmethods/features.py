"""Features of a model: FeatureSet, and the ways to get them.

``extract`` keeps every row, ``extract_layers`` those of several layers, ``accumulate`` keeps only
the moments, ``capture`` watches a forward pass that somebody else's loop makes. ``features`` always
means the head's input after its neck and before any L2 normalisation.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ncmethods._core import (
    InputError,
    Output,
    atomic_path,
    check_choice,
    check_features,
    check_labels,
    check_logits,
    check_num_classes,
    find_head,
    is_head,
    main_output,
    no_autocast,
    unwrap,
)
from ncmethods.stats import ClassStats, FrozenStats

__all__ = [
    "Captured",
    "FeatureSet",
    "LayerWatch",
    "accumulate",
    "capture",
    "extract",
    "extract_layers",
]


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of a set of samples, with labels and logits where they are known.

    Args:
        features: [N, D] floating point.
        labels: int64 [N], or None when unknown.
        num_classes: K.
        logits: [N, K], or None.

    Raises:
        InputError: shapes or dtypes that do not fit each other.
    """

    features: Tensor
    labels: Tensor | None
    num_classes: int
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        check_num_classes(self.num_classes)
        object.__setattr__(self, "features", check_features(self.features))
        if self.labels is not None:
            object.__setattr__(self, "labels", check_labels(self.labels, len(self)))
        if self.logits is not None:
            object.__setattr__(self, "logits", check_logits(self.logits, self.num_classes))
            if len(self.logits) != len(self):
                raise InputError(
                    f"logits must have one row per sample: {len(self)} features, "
                    f"{len(self.logits)} logits."
                )

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.features)

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return self.features.shape[1]

    @cached_property
    def stats(self) -> ClassStats:
        """Class moments of these features (computed once).

        Raises:
            InputError: there are no labels.
        """
        if self.labels is None:
            raise InputError("A FeatureSet without labels has no class statistics. Pass labels.")
        return ClassStats(self.num_classes, self.dim).update(self.features, self.labels)

    def subset(self, rows: Tensor) -> FeatureSet:
        """The samples at ``rows``: indices, or a mask [N]."""
        picked = [None if t is None else t[rows] for t in (self.labels, self.logits)]
        return FeatureSet(self.features[rows], picked[0], self.num_classes, picked[1])

    @cached_property
    def frozen(self) -> FrozenStats:
        """``stats.freeze()``, computed once: what scorers and scores are fitted from."""
        return self.stats.freeze()

    def grouped(self, groups: int) -> FeatureSet:
        """These samples with a ``stats`` that keeps ``groups``, for standard errors in a report.

        Raises:
            InputError: there are no labels, or one group.
        """
        stats = ClassStats(self.num_classes, self.dim, groups=groups)
        if self.labels is None:
            raise InputError("A FeatureSet without labels has no class statistics. Pass labels.")
        new = replace(self)
        vars(new)["stats"] = stats.update(self.features, self.labels)  # where the property caches
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors (``features``, ``labels``, ``logits``): all of the file or none."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        parts = {"features": self.features, "labels": self.labels, "logits": self.logits}
        tensors = {k: v.detach().cpu().contiguous() for k, v in parts.items() if v is not None}
        fields = json.dumps({"num_classes": self.num_classes})
        with atomic_path(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"ncmethods.FeatureSet": fields})
            except SafetensorError as error:  # a full disk
                raise InputError(f"Cannot write {path}: {error}. Free some space.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureSet:
        """Read a safetensors file with ``features`` and, if known, ``labels`` and ``logits``.

        A file written by other programs needs no metadata: K is then the width of ``logits``, or
        one more than the largest label.

        Raises:
            InputError: the file is missing, damaged, or lacks ``features``.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"Cannot read {path} as safetensors features: {error}") from error
        features, labels = tensors.get("features"), tensors.get("labels")
        logits = tensors.get("logits")
        if features is None:
            raise InputError(f"{path} has no tensor 'features'; it has {sorted(tensors)}.")
        if "ncmethods.FeatureSet" in meta:
            try:
                K = json.loads(meta["ncmethods.FeatureSet"])["num_classes"]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path} is a damaged FeatureSet file: {error}") from error
        elif logits is not None:
            K = check_logits(logits).shape[1]
        elif labels is not None and len(labels):
            K = int(labels.max()) + 1
        else:
            raise InputError(f"{path} says nothing about the number of classes: add 'labels'.")
        return cls(features, labels, K, logits)


class Captured:
    """What :func:`capture` saw of the last forward pass."""

    def __init__(self) -> None:
        self._features: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """Features [N, D] of the last forward pass, with its autograd graph.

        Raises:
            InputError: no batch has passed through the head since ``capture`` began.
        """
        if self._features is None:
            raise InputError(
                "capture saw no features: run the model inside the `with capture(model)` block, "
                "and check that its forward reaches the head (name='…' picks another layer)."
            )
        return self._features

    def forget(self) -> None:
        """Let go of the last forward pass, so that ``features`` needs a new one."""
        self._features = None


class _Watched:
    """A head's ``embed`` that shows what it returns; a copy of the head has its own, unwatched."""

    def __init__(self, embed: Callable[..., Tensor], seen: Captured) -> None:
        self.embed, self.seen = embed, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.embed(*args, **kwargs)
        self.seen._features = _pooled(features)
        return features

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.embed, memo)  # a bound method, of the copied head


@contextmanager
def capture(model: nn.Module, *, name: str | None = None) -> Iterator[Captured]:
    """Watch what the rows of the classifier act on, in forward passes made by any loop.

    For a plain ``nn.Linear`` that is its input; for a head what its ``embed`` returns. Where the
    classifier acts on maps [N, D, H, W] (the 1×1 convolution of squeezenet, or a head in its
    place), D is its number of channels and the features are averaged over H and W. Of classifiers
    whose logits the model averages (distilled DeiT, CrossViT, …) it is the one that ``find_head``
    returns, so that its features and its rows belong together; ``name`` picks another.
    Works through DistributedDataParallel and ``torch.compile``; compiled code runs eagerly inside
    the block, since a compiled graph does not call hooks.

    Args:
        model: any model that has a classifier head.
        name: dotted name of the head, where :func:`ncmethods.heads.find_head` finds several.

    Yields:
        Captured, whose ``features`` are those of the last forward pass.

    Raises:
        InputError: no head, or several.
    """
    head: Any = find_head(model, name=name).module
    seen = Captured()
    with ExitStack() as stack:
        if is_head(head) and not isinstance(head.embed, nn.Module):
            before_us = vars(head).get("embed")  # another capture's, perhaps
            head.embed = _Watched(head.embed, seen)
            if before_us is None:
                stack.callback(delattr, head, "embed")
            else:
                stack.callback(setattr, head, "embed", before_us)
        elif is_head(head):

            def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
                seen._features = _pooled(output)

            stack.callback(head.embed.register_forward_hook(after).remove)
        else:

            def before(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                seen._features = _pooled(x) if isinstance(head, nn.Conv2d) else x

            handle = head.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_eager(model))
        yield seen


def _pooled(features: Tensor) -> Tensor:
    """[N, D] of maps [N, D, H, W], by the mean over positions; vectors and tokens as they are."""
    return features.flatten(2).mean(2) if features.ndim > 3 else features


def _eager(model: nn.Module) -> Any:
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


Pool = Callable[[Tensor], Tensor]


class LayerWatch:
    """Features of chosen layers in forward passes made by any loop; a context manager.

    Call :meth:`take` after each forward pass. Feature maps [N, C, H, W] and tokens [N, T, D] are
    averaged over their positions, unless ``pool`` says otherwise. Of a layer that runs several
    times in a forward pass the last run counts, and of several forward passes the last one. A
    layer's output is read as it leaves the layer, also where the next one overwrites it in place.
    Works with compiled and DDP models, like :func:`capture`.

    Args:
        model: any model; one with a classifier head where ``"head"`` is among the layers.
        layers: dotted module names; ``"head"`` stands for what the classifier's rows act on.
        pool: makes features [N, D] of an output with more than two axes; needed for maps whose
            channels come last, as in Swin: ``lambda x: x.mean((1, 2))``.
        name: dotted name of the head, where several fit.

    Raises:
        InputError: an unknown layer, or one named twice.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        pool: Pool | None = None,
        name: str | None = None,
    ) -> None:
        modules = dict(unwrap(model).named_modules())
        for layer in layers:
            check_choice(layer, ("head", *filter(None, modules)), "layer")
        if len(set(layers)) < len(layers):
            raise InputError(f"Each layer is measured once, got layers={list(layers)}.")
        self.model, self.layers = model, tuple(layers)
        self.pool, self.name = pool or _mean, name
        self._outputs: dict[str, Tensor] = {}
        self._seen: Captured | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LayerWatch:
        """Start to watch."""
        try:
            if "head" in self.layers:
                self._seen = self._stack.enter_context(capture(self.model, name=self.name))
            else:
                self._stack.enter_context(_eager(self.model))
            modules = dict(unwrap(self.model).named_modules())
            for layer in self.layers:
                if layer != "head":
                    handle = modules[layer].register_forward_hook(self._keep(layer))
                    self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off the model."""
        self._stack.close()
        self._seen = None
        self._outputs.clear()

    def take(self) -> dict[str, Tensor]:
        """Features [N, D] of each layer in the last forward pass, which is then forgotten.

        Raises:
            InputError: a layer that no forward pass has reached since the last call.
        """
        if self._seen is not None:
            self._outputs["head"] = self._features(self._seen.features)
            self._seen.forget()
        missing = [layer for layer in self.layers if layer not in self._outputs]
        if missing:
            raise InputError(
                f"No forward pass has reached {', '.join(missing)} since the last update. Call the "
                "model first."
            )
        return {layer: self._outputs.pop(layer) for layer in self.layers}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forward passes inside leave no trace."""
        outputs, seen = dict(self._outputs), copy.copy(self._seen)
        try:
            yield
        finally:
            self._outputs = outputs
            if self._seen is not None and seen is not None:
                self._seen._features = seen._features

    def _keep(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._outputs[layer] = self._features(output)

        return hook

    def _features(self, output: Any) -> Tensor:
        """Features [N, D] of a layer's output: without its graph, in memory of their own."""
        x = output if isinstance(output, Tensor) else output[0]
        with torch.no_grad(), no_autocast(x.device):
            features = x.detach() if x.dtype == torch.float64 else x.detach().float()
            features = self.pool(features) if x.ndim > 2 else features
            shared = features.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            return features.clone() if shared else features


def _mean(output: Tensor) -> Tensor:
    """The mean over positions of tokens [N, T, D] and of maps [N, C, …]."""
    return output.mean(1 if output.ndim == 3 else tuple(range(2, output.ndim)))


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int | None = None,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    out_device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> FeatureSet:
    """Features, logits and labels of every sample of a loader.

    The model runs in eval mode without gradients; the mode of each module is restored. Under DDP
    each rank keeps its shard, without the samples that a DistributedSampler repeats as padding.

    Args:
        model: a Classifier, or any model with a classifier head that :func:`capture` can watch.
        loader: yields ``x``, ``(x, y, …)`` or a dict.
        num_classes: K of the data; taken from the logits if None. Logits of another width belong
            to other classes and are left out.
        name: dotted name of the head, where several fit.
        device: where the model runs; its own device if None.
        out_device: where the result lies.
        progress: show a bar; on a terminal if None.

    Returns:
        FeatureSet in float32 (float64 for float64 models).

    Raises:
        InputError: the loader is empty or yields something else.
    """
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for features, logits, labels in _passes(model, loader, name, device, progress):
        y = None if labels is None else labels.to(out_device)
        parts.append((features.to(out_device), logits.to(out_device), y))
    if not parts:
        raise InputError("The loader yielded no batch: there is nothing to extract.")
    labelled = all(y is not None for _, _, y in parts)
    K = parts[0][1].shape[1] if num_classes is None else num_classes
    matching = parts[0][1].shape[1] == K
    keep = _own_samples(loader, sum(len(f) for f, _, _ in parts))
    return FeatureSet(
        torch.cat([f for f, _, _ in parts])[:keep],
        torch.cat([y for _, _, y in parts if y is not None])[:keep] if labelled else None,
        K,
        torch.cat([z for _, z, _ in parts])[:keep] if matching else None,
    )


def extract_layers(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str],
    num_classes: int | None = None,
    *,
    pool: Pool | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
    out_device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> dict[str, FeatureSet]:
    """:func:`extract` for several layers in one pass over the loader.

    ``"head"`` is what :func:`extract` gives, logits included where their width is K. ``"logits"``
    stands for what the model returns as logits, of whatever classes it was trained on, in place of
    features: LEEP wants those. Any other layer is read by :class:`LayerWatch`, with maps and tokens
    averaged over their positions.

    Args:
        model: as in :func:`extract`.
        loader: as in :func:`extract`.
        layers: ``"head"``, ``"logits"`` and dotted module names.
        num_classes: K of the data; taken from the logits if None.
        pool: makes features [N, D] of a layer's output with more than two axes.
        name: dotted name of the head, where several fit.
        device: where the model runs; its own device if None.
        out_device: where the results lie.
        progress: show a bar; on a terminal if None.

    Returns:
        Layer → FeatureSet of the same samples, in the order of ``layers``.

    Raises:
        InputError: no layer, one that is unknown or named twice, or an empty loader.
    """
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"Name at least one layer, and each once, got layers={list(layers)}.")
    parts: dict[str, list[Tensor]] = {layer: [] for layer in (*layers, "head", "logits")}
    labelled: list[Tensor] = []
    inner = [layer for layer in layers if layer not in ("head", "logits")]
    with LayerWatch(model, inner, pool=pool, name=name) as watch:
        for features, logits, labels in _passes(model, loader, name, device, progress):
            for layer, x in (watch.take() | {"head": features, "logits": logits}).items():
                if layer in layers or layer == "logits":
                    parts[layer].append(check_features(x.flatten(1)).to(out_device))
            if labels is not None:
                labelled.append(labels.to(out_device))
    if not parts["logits"]:
        raise InputError("The loader yielded no batch: there is nothing to extract.")
    N = sum(map(len, parts["logits"]))
    keep = _own_samples(loader, N)
    y = torch.cat(labelled)[:keep] if sum(map(len, labelled)) == N else None
    z = torch.cat(parts["logits"])[:keep]
    K = z.shape[1] if num_classes is None else num_classes
    return {
        layer: FeatureSet(
            torch.cat(parts[layer])[:keep],
            y,
            K,
            z if layer == "head" and z.shape[1] == K else None,
        )
        for layer in layers
    }


def accumulate(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int | None = None,
    *,
    scatter: bool = True,
    variances: bool = False,
    shrinkage: bool = False,
    groups: int = 0,
    name: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> ClassStats:
    """Class moments of a model's features over a loader, in memory that does not grow with N.

    Like :func:`extract` followed by ``.stats``, without keeping the features. Under DDP call
    ``all_reduce()`` on the result.

    Args:
        model: as in :func:`extract`.
        loader: yields ``(x, y, …)`` or a dict with labels.
        num_classes: K; taken from the logits if None.
        scatter: keep the [D, D] scatter.
        variances: keep the variances of each class [K, D], for diagonal Gaussians.
        shrinkage: keep what Ledoit–Wolf shrinkage needs.
        groups: deal the samples out to so many sub-statistics, for standard errors.
        name: dotted name of the head, where several fit.
        device: where the model runs; its own device if None.
        progress: show a bar; on a terminal if None.

    Raises:
        InputError: the loader is empty or has no labels.
    """
    stats: ClassStats | None = None
    left = _own_samples(loader, sys.maxsize)
    for features, logits, labels in _passes(model, loader, name, device, progress):
        if labels is None:
            raise InputError("accumulate needs labels: the loader must yield (x, y, …) or a dict.")
        if stats is None:
            K = logits.shape[1] if num_classes is None else num_classes
            stats = ClassStats(
                K,
                features.shape[1],
                scatter=scatter,
                variances=variances,
                shrinkage=shrinkage,
                groups=groups,
            )
        stats.update(features[:left], labels[:left])
        left = max(0, left - len(features))
    if stats is None:
        raise InputError("The loader yielded no batch: there is nothing to accumulate.")
    return stats


@torch.no_grad()
def _passes(
    model: nn.Module,
    loader: Iterable[Any],
    name: str | None,
    device: torch.device | str | None,
    progress: bool | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Features, logits and labels of each batch, in eval mode; modes restored at the end."""
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    watch = nullcontext() if _gives_output(model) else capture(model, name=name)
    try:
        with watch as seen:
            for batch in _progress(loader, progress):
                x, y = _split(batch)
                out = model(x.to(device, non_blocking=True))
                if isinstance(out, Output):
                    features, logits = out
                else:
                    assert seen is not None
                    features, logits = seen.features, _logits(out)
                    if features.ndim > 2 and name is None:
                        raise InputError(
                            f"The classifier acts on features of shape {tuple(features.shape)} "
                            "and the model pools its logits. Use Classifier.from_model(model), "
                            "which pools first."
                        )
                yield check_features(features.flatten(1)), check_logits(logits), y
    finally:
        for module, training in modes.items():
            module.training = training


def _gives_output(model: nn.Module) -> bool:
    return bool(getattr(unwrap(model), "returns_output", False))


def _logits(out: Any) -> Tensor:
    """The logits of a foreign model's output: ``.logits``, or the first element."""
    logits = main_output(out)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InputError(
            f"The model must return logits [N, K], an object with .logits, or a tuple that begins "
            f"with them; got {type(out).__name__}."
        )
    return logits


_X_KEYS = ("x", "image", "images", "img", "pixel_values", "inputs", "input")
_Y_KEYS = ("y", "label", "labels", "target", "targets")


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a batch: ``x``, ``(x, y, …)`` or a dict."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        x = next((batch[k] for k in _X_KEYS if k in batch), None)
        y = next((batch[k] for k in _Y_KEYS if k in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        x, y = batch[0], batch[1] if len(batch) > 1 else None
    else:
        x = y = None
    if not isinstance(x, Tensor) or not (y is None or isinstance(y, Tensor)):
        raise InputError(
            "A loader must yield x, (x, y, …) or a dict with one of "
            f"{', '.join(_X_KEYS)} and one of {', '.join(_Y_KEYS)}; got {type(batch).__name__}."
        )
    return x, None if y is None else check_labels(y, len(x))


def _own_samples(loader: Any, total: int) -> int:
    """How many of this rank's samples are its own, not padding of a DistributedSampler."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, torch.utils.data.distributed.DistributedSampler):
        return total
    size = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, size, sampler.num_replicas))
    return min(total, own)


def _progress(loader: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return loader
    from tqdm import tqdm

    bar: Callable[..., Iterable[Any]] = tqdm
    return bar(loader, desc="features", leave=False)
