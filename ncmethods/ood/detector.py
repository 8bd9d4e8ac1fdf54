"""Detector: model, scorer and threshold in one: images in, verdicts out, saved as one file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncmethods import __version__
from ncmethods._core import InputError, atomic_path, check_choice, find_head, is_head, unwrap
from ncmethods.features import FeatureSet, _split, extract
from ncmethods.ood._scorer import Scorer, Train, _below, _rows_only
from ncmethods.ood.calibration import Threshold
from ncmethods.stats import ClassStats, FrozenStats

__all__ = ["Detector", "Verdict"]


class Verdict(NamedTuple):
    """What a Detector says of N images."""

    score: Tensor
    """[N], higher = more out-of-distribution; NaN for an image that is broken."""
    p_value: Tensor
    """float64 [N]: how rare so high a score is among in-distribution images."""
    flag: Tensor
    """bool [N]: whether to distrust the image."""
    label: Tensor
    """int64 [N]: the predicted class; −1 for an image that is broken."""


class Detector(nn.Module):
    """``detector(images) -> Verdict(score, p_value, flag, label)``.

    Images are uint8 [N, C, H, W] with values 0 to 255, which are normalised by ``mean`` and
    ``std``, or floating point, which are taken as normalised already; one image [C, H, W] counts
    as a batch of one. The model runs in eval mode and without gradients. An image whose features
    or logits are not finite is flagged, with the smallest p-value there is.

    At most a share ``threshold.alpha`` of in-distribution images is flagged, in the sense and under
    the conditions of :class:`Threshold`. How many others are found is not promised.

    Args:
        model: a Classifier, or any image model that :func:`ncmethods.features.capture` can watch.
        scorer: fitted on features of this model.
        threshold: calibrated on scores of this scorer, with a group per class or without groups;
            None if :meth:`calibrate` follows.
        mean: of each channel on the scale 0 to 1, for uint8 images.
        std: likewise.
        size: (H, W) that images must have; any if None.
        classes: names, kept for those who read the labels.
        name: dotted name of the model's head, where several fit.

    Raises:
        InputError: parts that do not fit each other.
    """

    threshold: Threshold | None
    sketch: Tensor | None  # hashes of the rows of the fit, the smallest _SKETCH of them, ascending

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        threshold: Threshold | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.images = _Images(mean, std, size)
        self.num_classes, self.dim = _widths(model, name)
        self.classes, self.name = None if classes is None else list(classes), name
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise InputError(f"{len(self.classes)} names for {self.num_classes} classes.")
        if threshold is not None and len(threshold.sizes) not in (1, self.num_classes):
            raise InputError(
                f"The threshold has {len(threshold.sizes)} groups, the model {self.num_classes} "
                "classes: calibrate without groups, or with the predicted classes as groups."
            )
        device = _device(model)
        self.model, self.scorer = model, scorer.to(device)
        self.threshold = None if threshold is None else threshold.to(device)
        self.register_buffer("sketch", None)
        self._check_scorer()
        self.weights_hash = _digest(unwrap(model).state_dict())

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        scorer: type[Scorer],
        train: Train | Iterable[Any],
        held_out: FeatureSet | Iterable[Any],
        *,
        alpha: float = 0.05,
        groups: str = "none",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        name: str | None = None,
        **hyper: Any,
    ) -> Detector:
        """Fit the scorer and calibrate the threshold.

        Args:
            model: as above.
            scorer: a class such as ``ood.Mahalanobis``.
            train: what to fit on: a loader of labelled images, or a FeatureSet or ClassStats of
                this model.
            held_out: in-distribution images that neither the model nor the scorer has seen: a
                loader, or a FeatureSet with logits.
            alpha: share of false alarms that is accepted.
            groups: ``"none"``, or ``"predicted class"`` for a threshold per class.
            mean: as above, like ``std``, ``size``, ``classes`` and ``name``.
            std: of each channel.
            size: (H, W).
            classes: names.
            name: of the head.
            **hyper: of the scorer's ``fit``.

        Raises:
            InputError: features of another model, or too few images to calibrate on.

        Warns:
            UserWarning: images of ``held_out`` are in ``train`` too.
        """
        images = _Images(mean, std, size)
        data = _read(model, train, images, name)
        K, D = _widths(model, name)
        if (data.num_classes, data.dim) != (K, D):
            raise InputError(
                f"train has K = {data.num_classes} classes and D = {data.dim} features, the model "
                f"K = {K} and D = {D}: pass the features of this model."
            )
        head = _head(model, name)
        usable = is_head(head) or isinstance(head, nn.Linear)
        fitted = scorer.fit(data, head if usable else None, **hyper)
        self = cls(model, fitted, mean=mean, std=std, size=size, classes=classes, name=name)
        self.images = images  # which has seen the shape
        if isinstance(data, FeatureSet):
            self.sketch = torch.unique(_hashes(data.features))[:_SKETCH].to(_device(model))
        return self.calibrate(held_out, alpha, groups=groups)

    def calibrate(
        self,
        held_out: FeatureSet | Iterable[Any],
        alpha: float | None = None,
        *,
        groups: str | None = None,
    ) -> Detector:
        """Set the threshold anew, on other images or for another ``alpha``.

        Whether images of the fit are among them is seen by their features, bit by bit, where
        :meth:`fit` had a loader or a FeatureSet: always if it had less than 65 536 rows, by
        sampling otherwise. A changed copy of an image is not seen.

        Args:
            held_out: as in :meth:`fit`; rows with a negative label are left out.
            alpha: as it was if None.
            groups: ``"none"`` or ``"predicted class"``; as it was if None.

        Raises:
            InputError: too few images for the promise, or broken ones among them.

        Warns:
            UserWarning: some of the images were in the fit; it says how many.
        """
        old = self.threshold
        alpha = alpha if alpha is not None else 0.05 if old is None else old.alpha
        if groups is None:
            groups = "none" if old is None or len(old.sizes) == 1 else "predicted class"
        check_choice(groups, ("none", "predicted class"), "groups")
        data = _read(self.model, held_out, self.images, self.name)
        if not isinstance(data, FeatureSet) or data.logits is None or data.dim != self.dim:
            raise InputError(
                f"held_out must be a loader of images, or a FeatureSet with logits and D = "
                f"{self.dim} features, from extract(...) of this model."
            )
        if data.labels is not None and bool((data.labels < 0).any()):
            keep = data.labels >= 0
            data = data.subset(keep)
        self._warn_of_overlap(data.features)
        score, label = self._judge(data)
        K = self.num_classes
        by = {} if groups == "none" else {"groups": label, "num_groups": K}
        self.threshold = Threshold.fit(score, alpha, **by)  # type: ignore[arg-type]
        self.weights_hash = _digest(unwrap(self.model).state_dict())
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Verdict:
        """What to think of each image.

        Args:
            images: uint8 or normalised floating point, [N, C, H, W] or [C, H, W].

        Raises:
            InputError: images of another size or dtype, or no threshold yet.
        """
        if self.threshold is None:
            raise InputError("This detector has no threshold: call calibrate(held_out) first.")
        x = self.images(images.to(_device(self.model)), _dtype(self.model))
        data = extract(self.model, [x], name=self.name, out_device=x.device, progress=False)
        score, label = self._judge(data)
        groups = label.clamp(min=0) if len(self.threshold.sizes) > 1 else None
        p = self.threshold.p_value(score, groups)
        return Verdict(score, p, self.threshold.flags(p), label)

    @torch.no_grad()
    def _judge(self, data: FeatureSet) -> tuple[Tensor, Tensor]:
        """Scores [N] and labels [N]; NaN and −1 where features or logits are not finite."""
        logits = data.logits
        assert logits is not None  # extract keeps them
        device = _device(self.model)
        scores = [
            self.scorer(h.to(device), z.to(device))
            for h, z in zip(torch.split(data.features, 4096), torch.split(logits, 4096))
        ]
        fine = (data.features.isfinite().all(1) & (logits < math.inf).all(1)).to(device)
        label = logits.argmax(1).to(device)
        return torch.cat(scores).masked_fill(~fine, math.nan), label.masked_fill(~fine, -1)

    def _warn_of_overlap(self, features: Tensor) -> None:
        if self.sketch is None:
            return
        sketch = self.sketch.cpu()
        hits = int(torch.isin(_hashes(features), sketch).sum())
        if not hits:
            return
        found = f"{hits} of {len(features)} calibration images were"
        if len(sketch) == _SKETCH:
            share = (int(sketch[-1]) + 2**63) / 2**64  # of all hashes, that the sketch covers
            found = f"about {round(hits / share)} of {len(features)} calibration images were"
        warnings.warn(
            f"{found} in the fit set too: the scorer has seen them, so the threshold is too low "
            "and raises more false alarms than it promises. Hold images out.",
            stacklevel=3,
        )

    def _check_scorer(self) -> None:
        K, D, device = self.num_classes, self.dim, _device(self.model)
        try:
            with torch.no_grad():
                self.scorer(torch.zeros(1, D, device=device), torch.zeros(1, K, device=device))
        except (RuntimeError, InputError) as error:
            raise InputError(
                f"The scorer was not fitted on this model, which has D = {D} features and K = {K} "
                f"classes: {error}"
            ) from error
        if self.scorer.head is not None:
            here = _rows_only(_head(self.model, self.name))
            if _digest(here.state_dict()) != _digest(self.scorer.head.state_dict()):
                raise InputError(
                    "The head that the scorer was fitted with is not the model's: has the model "
                    "been trained since? Fit the scorer again."
                )

    def extra_repr(self) -> str:
        """Widths and preprocessing."""
        return f"K={self.num_classes}, D={self.dim}, {self.images}"

    # --- one file ----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model weights, scorer, threshold and preprocessing as one safetensors file.

        Raises:
            InputError: no threshold yet, or the model's weights have changed since it was set.
        """
        from safetensors.torch import save

        if self.threshold is None:
            raise InputError("This detector has no threshold: call calibrate(held_out) first.")
        net = unwrap(self.model)
        state = net.state_dict()
        if _digest(state) != self.weights_hash:
            raise InputError(
                "The model's weights or their dtype have changed since the threshold was set, "
                "which no longer holds: fit again."
            )
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": state,
            "scorer": {k: v for k, v in self.scorer.state_dict().items() if k[:5] != "head."},
            "threshold": self.threshold.state_dict(),
            "sketch": {} if self.sketch is None else {"rows": self.sketch},
            "probe": {} if self.images.shape is None else {"logits": self._probe()},
        }
        meta = {
            "ncmethods": __version__,
            "torch": torch.__version__,
            "sha256": self.weights_hash,
            "scorer": type(self.scorer).__name__,
            "hyper": self.scorer.hyper,
            "head": self.scorer.head is not None,
            "alpha": self.threshold.alpha,
            "images": vars(self.images),
            "classes": self.classes,
            "name": self.name,
        }
        tensors = {
            f"{part}.{key}": value.detach().cpu().contiguous().clone()
            for part, content in parts.items()
            for key, value in content.items()
        }
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, {"ncmethods.Detector": json.dumps(meta)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Detector:
        """Read what :meth:`save` wrote.

        Args:
            path: of the file.
            model: built as the saved one was; its weights are replaced by the saved ones.

        Raises:
            InputError: the file is missing or damaged, the model has other weights, or computes
                something else from them.
        """
        from safetensors import SafetensorError, safe_open

        parts: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["ncmethods.Detector"])
                for key in file.keys():  # noqa: SIM118
                    part, _, rest = key.partition(".")
                    parts.setdefault(part, {})[rest] = file.get_tensor(key)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"Cannot read {path} as a detector: {error}") from error
        state, net = parts.get("model", {}), unwrap(model)
        if _digest(state) != meta["sha256"]:
            raise InputError(f"{path} is damaged: the weights are not those that were saved.")
        _check_same(state, net.state_dict())
        net.load_state_dict(state)
        known = {one.__name__: one for one in _below(Scorer)}
        if meta["scorer"] not in known:
            raise InputError(
                f"{path} holds the scorer {meta['scorer']!r}: import the module that defines it."
            )
        head = _head(model, meta["name"]) if meta["head"] else None
        scorer = known[meta["scorer"]](head, **parts.get("scorer", {}), **meta["hyper"])
        threshold = Threshold(**parts["threshold"], alpha=meta["alpha"])
        images = meta["images"]
        shape = images.pop("shape")
        self = cls(model, scorer, threshold, **images, classes=meta["classes"], name=meta["name"])
        if "sketch" in parts:
            self.sketch = parts["sketch"]["rows"].to(_device(model))
        if "probe" in parts:
            self.images.shape = tuple(shape)
            want, got = parts["probe"]["logits"], self._probe().cpu()
            if not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
                raise InputError(
                    "The model has the saved weights but computes other logits: it was built with "
                    "other settings (a head's scale, an activation, …). Build it as the saved one."
                )
        return self

    def _probe(self) -> Tensor:
        """Logits [2, K] of two made-up images, to tell models apart that share their weights."""
        shape = (2, *(self.images.shape or ()))
        x = torch.linspace(0, 1000, math.prod(shape)).sin().view(shape)
        x = x.to(_device(self.model), _dtype(self.model))
        logits = extract(self.model, [x], name=self.name, progress=False).logits
        assert logits is not None
        return logits


class _Images:
    """The way from images to the model's input; ``shape`` is that of one image it has seen."""

    def __init__(
        self,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: Sequence[int] | None,
    ) -> None:
        if (mean is None) != (std is None) or (mean and std and len(mean) != len(std)):
            raise InputError(f"mean and std belong together, one per channel: {mean} and {std}.")
        if std is not None and not all(s > 0 for s in std):
            raise InputError(f"std must be positive, got {std}.")
        if size is not None and len(size) != 2:
            raise InputError(f"size is (H, W), got {size}.")
        self.mean = None if mean is None else [float(m) for m in mean]
        self.std = None if std is None else [float(s) for s in std]
        self.size = None if size is None else [int(s) for s in size]
        self.shape: tuple[int, ...] | None = None

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised images [N, C, H, W]."""
        x = images[None] if images.ndim == 3 else images
        wrong = x.ndim != 4 or (self.size is not None and list(x.shape[2:]) != self.size)
        if wrong or (self.mean is not None and x.shape[1] != len(self.mean)):
            C = "C" if self.mean is None else len(self.mean)
            H, W = self.size or ("H", "W")
            raise InputError(
                f"images must be [N, {C}, {H}, {W}] or one [{C}, {H}, {W}], got "
                f"{tuple(images.shape)}. Resize as in training."
            )
        if x.dtype == torch.uint8:
            if self.mean is None or self.std is None:
                raise InputError(
                    "uint8 images need mean=… and std=… of the detector; or pass images that are "
                    "floating point and normalised as in training."
                )
            mean, std = (
                torch.tensor(v, device=x.device)[:, None, None] * 255 for v in (self.mean, self.std)
            )
            x = (x.float() - mean) / std
        elif not x.is_floating_point():
            raise InputError(f"images must be uint8 or floating point, got {x.dtype}.")
        self.shape = tuple(x.shape[1:])
        return x.to(dtype)

    def of(self, loader: Iterable[Any], dtype: torch.dtype) -> Iterator[Any]:
        """The batches of a loader, normalised."""
        for batch in loader:
            x, y = _split(batch)
            yield self(x, dtype) if y is None else (self(x, dtype), y)

    def __repr__(self) -> str:
        return f"mean={self.mean}, std={self.std}, size={self.size}"


def _read(model: nn.Module, data: Any, images: _Images, name: str | None) -> Any:
    """A FeatureSet of a loader's images; features and moments as they are."""
    if isinstance(data, FeatureSet | ClassStats | FrozenStats):
        return data
    return extract(model, images.of(data, _dtype(model)), name=name)


def _head(model: nn.Module, name: str | None) -> nn.Module:
    net = unwrap(model)
    own = getattr(net, "head", None) if getattr(net, "returns_output", False) else None
    return own if isinstance(own, nn.Module) else find_head(net, name=name).module


def _widths(model: nn.Module, name: str | None) -> tuple[int, int]:
    """K and D of the model's head."""
    head: Any = _head(model, name)
    return getattr(head, "out_features", len(head.weight)), head.weight.flatten(1).shape[1]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    kinds = (p.dtype for p in model.parameters())
    return next((d for d in kinds if d.is_floating_point), torch.float32)


def _digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, Tensor):
            raise InputError(f"The model's state holds {name!r}, which is not a tensor.")
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_same(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise unless both have the same names, shapes and dtypes."""

    def kind(state: Mapping[str, Tensor], name: str) -> str:
        tensor = state.get(name)
        return "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"

    names = sorted(saved.keys() | own.keys())
    other = [n for n in names if kind(saved, n) != kind(own, n)]
    if other:
        listed = "; ".join(f"{n}: {kind(own, n)}, saved {kind(saved, n)}" for n in other[:5])
        raise InputError(
            f"The model is not built as the saved one: {len(other)} tensors differ ({listed}). "
            "Build it with the same layers, number of classes and dtype."
        )


# --- which rows were seen -------------------------------------------------------------------------

_SKETCH = 65_536
"""Hashes that are kept: of more rows the smallest, a random sample that two sets share."""


def _hashes(features: Tensor) -> Tensor:
    """A 64-bit hash of the bits of each row in float32, int64 [N]."""
    factors = _mix(torch.arange(1, features.shape[1] + 1)) | 1
    parts = []
    for rows in torch.split(features.detach().cpu().float(), 4096):
        bits = (rows + 0.0).contiguous().view(torch.int32).long()  # −0 is 0
        parts.append(_mix((bits * factors).sum(1)))
    return torch.cat(parts)


def _mix(x: Tensor) -> Tensor:
    """Scramble int64, one to one: multiplications wrap around."""
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = x * factor
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x
