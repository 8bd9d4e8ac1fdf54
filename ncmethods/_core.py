"""What every room may use: errors, checks, atomic files, Output, find_head, binding by name."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NCError(ValueError):
    """Base of every error that the library raises on purpose."""


class InputError(NCError):
    """An argument that cannot be used; the message says what to pass instead."""


class DataError(NCError):
    """A dataset that is missing, truncated or not what its name promises."""


class CheckpointError(NCError):
    """A checkpoint or run directory that cannot be used."""


class Output(NamedTuple):
    """What a Classifier returns: the head's input after its neck, and the logits."""

    features: Tensor  # [N, D]
    logits: Tensor  # [N, K]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_choice(name: str, options: Iterable[str], what: str) -> str:
    """Return ``name`` if it is one of ``options``, else raise with the nearest spelling."""
    known = list(options)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"Unknown {what} {name!r}.{hint} Choose from: {', '.join(known)}.")


def check_num_classes(num_classes: int) -> int:
    """Return ``num_classes`` if it is an integer of at least 2."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise InputError(f"num_classes must be an integer ≥ 2, got {_describe(num_classes)}.")
    return num_classes


def check_features(features: Tensor, dim: int | None = None) -> Tensor:
    """Return ``features`` as a floating [N, D] tensor of at least float32.

    Raises:
        InputError: not a floating 2-D tensor, or D differs from ``dim``.
    """
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(
            f"features must be a 2-D tensor [N, D], got {_describe(features)}. "
            "Flatten or pool other axes first."
        )
    if not features.is_floating_point():
        raise InputError(
            f"features must be floating point, got {_describe(features)}. Call .float() first."
        )
    if dim is not None and features.shape[1] != dim:
        raise InputError(
            f"features must have D = {dim} columns, got {_describe(features)}. "
            "Was the statistic or head made for another layer?"
        )
    return features if features.dtype == torch.float64 else features.float()


def check_labels(labels: Tensor, rows: int | None = None, num_classes: int | None = None) -> Tensor:
    """Return ``labels`` as an int64 [N] tensor.

    Values are looked at only on the CPU and only if ``num_classes`` is given: no host sync.

    Raises:
        InputError: not a 1-D integer tensor, its length differs from ``rows``, or a label is
            ≥ ``num_classes``.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        raise InputError(
            f"labels must be a 1-D tensor [N] of class indices, got {_describe(labels)}. "
            "One-hot or mixed labels: pass argmax(1), or mix the losses."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, got {_describe(labels)}. Call .long() first.")
    if rows is not None and labels.shape[0] != rows:
        raise InputError(
            f"labels must have one entry per row: {rows} rows, got {_describe(labels)}."
        )
    if (
        num_classes is not None
        and _readable(labels)
        and len(labels)
        and int(labels.max()) >= num_classes
    ):
        raise InputError(
            f"labels must be < num_classes = {num_classes} (negative = ignored), got "
            f"{int(labels.max())}. Are logits, counts or weight those of another label set?"
        )
    return labels.long()


def check_logits(logits: Tensor, num_classes: int | None = None) -> Tensor:
    """Return ``logits`` as a floating [N, K] tensor of at least float32.

    Raises:
        InputError: not a floating 2-D tensor, or K differs from ``num_classes``.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise InputError(f"logits must be a floating 2-D tensor [N, K], got {_describe(logits)}.")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise InputError(f"logits must have K = {num_classes} columns, got {_describe(logits)}.")
    return logits if logits.dtype == torch.float64 else logits.float()


def _readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without a host sync or a break in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_counts(counts: Tensor | Iterable[int], num_classes: int | None = None) -> Tensor:
    """Return training ``counts`` [K] as a tensor; values are checked when they lie on the CPU.

    Raises:
        InputError: not 1-D, wrong length, negative or non-finite entries, or nothing counted.
    """
    tensor = counts if isinstance(counts, Tensor) else torch.as_tensor(list(counts))
    if tensor.ndim != 1 or (num_classes is not None and tensor.shape[0] != num_classes):
        want = "[K]" if num_classes is None else f"of length K = {num_classes}"
        raise InputError(
            f"counts must be the training samples per class, a 1-D tensor {want}, "
            f"got {_describe(tensor)}."
        )
    if _readable(tensor) and not (
        bool((tensor >= 0).all()) and bool(torch.isfinite(tensor).all()) and bool(tensor.sum() > 0)
    ):
        raise InputError(f"counts must be finite, ≥ 0 and not all zero, got {tensor.tolist()}.")
    return tensor


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place.

    A reader sees the old file or the whole new one, never a part, whatever kills the writer.

    Raises:
        InputError: the directory cannot be written or is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(
            f"Cannot write {target}: {error.strerror or error}. "
            "Choose another output directory, or free the space or the permission."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
        fsync_dir(target.parent)
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync_dir(directory: Path) -> None:
    """Make a rename in ``directory`` durable, where the platform can."""
    if os.name == "posix":
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


# --- functions bound by argument name ---------------------------------------------------------


def bind(function: Callable[..., Tensor], available: Mapping[str, Any]) -> dict[str, Any]:
    """Pick from ``available`` what ``function`` names among its parameters.

    Hyperparameters keep their defaults or come bound with ``functools.partial``.

    Raises:
        InputError: a required parameter is not available.
    """
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if available.get(name) is not None:
            given[name] = available[name]
        elif parameter.default is parameter.empty:
            label = getattr(function, "__name__", None) or getattr(
                getattr(function, "func", None), "__name__", repr(function)
            )
            raise InputError(
                f"{label} needs {name!r}, which is not available here "
                f"(available: {', '.join(k for k, v in available.items() if v is not None)}). "
                "Bind it with functools.partial."
            )
    return given


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off; the meta device has none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


# --- models ------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_head(module: nn.Module) -> bool:
    """Whether ``module`` follows the Head protocol: ``weight``, ``embed`` and ``logits``."""
    return all(hasattr(module, name) for name in ("weight", "embed", "logits"))


def check_head(head: nn.Module) -> nn.Module:
    """Return ``head`` if it is an ``nn.Linear`` or follows the Head protocol."""
    if not (is_head(head) or isinstance(head, nn.Linear)):
        raise InputError(
            "head must be an nn.Linear or have weight, embed and logits, got "
            f"{type(head).__name__}."
        )
    return head


def logits_of(head: nn.Module, features: Tensor) -> Tensor:
    """Logits [N, K] of ``features`` [N, D], the head's input after its neck."""
    logits: Tensor = head.logits(features) if is_head(check_head(head)) else head(features)  # type: ignore[operator]
    return logits


def main_output(out: Any) -> Any:
    """What matters of a model's output: its ``.logits``, or the first element of a tuple."""
    return getattr(out, "logits", out[0] if isinstance(out, (tuple, list)) else out)


class Found(NamedTuple):
    """A classifier head inside a model: its dotted name and the module."""

    name: str
    module: nn.Module


# Attributes that hold the classifier in torchvision, timm and transformers, outermost first.
_HOMES = ("head", "fc", "classifier", "heads", "last_linear", "output", "linear")


def find_head(
    model: nn.Module, *, num_classes: int | None = None, name: str | None = None
) -> Found:
    """Find the classifier head of ``model``.

    The order of search: ``name`` if given; a module with the Head protocol; the last ``nn.Linear``
    under an attribute that usually holds the classifier (``fc``, ``classifier``, ``head``, …); a
    model's only ``nn.Linear``, or the last layer of an ``nn.Sequential``.

    Args:
        model: any module, also compiled or wrapped by DDP.
        num_classes: keep only candidates with this many outputs.
        name: dotted path of the head, as in ``model.named_modules()``.

    Raises:
        InputError: nothing fits, or several do; the message lists them.
    """
    net = unwrap(model)
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if name is not None:
        if name not in modules:
            fitting = [n for n, m in modules.items() if isinstance(m, nn.Linear) or is_head(m)]
            check_choice(name, fitting, "module name")
        return Found(name, modules[name])

    heads = [Found(n, m) for n, m in modules.items() if is_head(m)]
    linears = [Found(n, m) for n, m in modules.items() if isinstance(m, nn.Linear)]
    if num_classes is not None:
        heads = [f for f in heads if _rows(f.module) == num_classes]
        linears = [f for f in linears if _rows(f.module) == num_classes]
    if len(heads) == 1:
        return heads[0]
    candidates = heads or linears
    if not heads:
        for home in _HOMES:
            inside = [f for f in linears if f.name == home or f.name.startswith(f"{home}.")]
            if inside:
                return inside[-1]
        if isinstance(net, nn.Sequential) and linears and linears[-1].module is net[-1]:
            return linears[-1]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        size = "" if num_classes is None else f" with {num_classes} outputs"
        raise InputError(
            f"No classifier head{size} found in {type(net).__name__}: it has no nn.Linear"
            f"{size} and no ncmethods head. Pass name='…' to point at it."
        )
    listed = ", ".join(f"{f.name!r} {tuple(_shape(f.module))}" for f in candidates)
    raise InputError(
        f"{len(candidates)} layers of {type(net).__name__} could be the classifier: {listed}. "
        "Pick one with name='…'."
    )


def _shape(module: nn.Module) -> torch.Size:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise InputError(f"{type(module).__name__}.weight must be a tensor, got {type(weight)}.")
    return weight.shape


def _rows(module: nn.Module) -> int:
    return int(_shape(module)[0])
