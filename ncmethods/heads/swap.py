"""Put a head into somebody's model, in place."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ncmethods._core import InputError, find_auxiliary, find_heads, unwrap
from ncmethods.heads.fixed import FixedHead

__all__ = ["HeadLike", "build_head", "swap_head", "warn_relu"]

# A built head, or a builder (in_features, num_classes) -> head.
HeadLike: TypeAlias = "nn.Module | Callable[[int, int], nn.Module]"


_RELU = (nn.ReLU, nn.ReLU6)
_OTHER = (nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Mish, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU)


def widths(layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a classifier layer, or None where it has no such thing."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    D, K = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (D, K) if isinstance(D, int) and isinstance(K, int) else None


def build_head(head: HeadLike, old: nn.Module, num_classes: int | None) -> nn.Module:
    """The head that takes the place of ``old``, with its device, dtype and mode.

    Raises:
        InputError: ``old`` has no known width, or a built head has another one or another K.
    """
    shape = widths(old)
    if shape is None:
        raise InputError(
            f"{type(old).__name__} has no in_features and out_features, so no head can take its "
            "place. Point at the linear classifier with name='…'."
        )
    in_features, rows = shape
    if isinstance(head, nn.Module):
        width, K = widths(head) or (in_features, num_classes)
        if width != in_features:
            raise InputError(
                f"The head takes {width} features, but the model's classifier layer takes "
                f"{in_features}. Build it with in_features={in_features}."
            )
        if num_classes not in (None, K):
            raise InputError(
                f"num_classes={num_classes}, but the head was built with {K} classes. Pass a "
                "builder, or leave num_classes out."
            )
        built = head
    else:
        built = head(in_features, rows if num_classes is None else num_classes)
    weight = old.weight
    if isinstance(weight, Tensor):  # on the meta device a fixed frame would be lost
        built.to(None if weight.is_meta else weight.device, weight.dtype)
    return built.train(old.training)


def swap_head(
    net: nn.Module,
    head: HeadLike,
    *,
    num_classes: int | None = None,
    name: str | None = None,
    auxiliary: bool = False,
) -> nn.Module:
    """Replace the classifier layer of a model in place; its forward stays x → logits.

    Device, dtype and train/eval mode are kept; ``num_classes`` and ``num_labels`` attributes are
    brought up to date. Classifiers whose logits the model averages (distilled DeiT, LeViT,
    CrossViT, …) are swapped together: copies of one head where their widths agree, hence the same
    rows. A 1×1 convolution (squeezenet) is replaced by the head acting at each position; a ReLU
    right behind it, which would cut the logits at zero, is taken out. Auxiliary classifiers
    (inception, googlenet, VOLO) stay linear; they are made anew where K changes.

    Args:
        net: e.g. a torchvision, timm or transformers model.
        head: a builder such as ``heads.etf_head`` (called with the layer's in_features and K), a
            ``functools.partial`` of one, or a built head.
        num_classes: K for a builder; the model's own if None.
        name: dotted name of the classifier layer, where several fit; only that one is replaced.
        auxiliary: put a head of the builder into the auxiliary classifiers too.

    Returns:
        ``net`` itself.

    Raises:
        InputError: no classifier layer found, several found (the message lists them), a head
            that does not fit, a built head with ``auxiliary``, or a model already wrapped by
            DistributedDataParallel.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in net.modules()):
        raise InputError(
            "DistributedDataParallel has already taken note of the old classifier's parameters. "
            "Swap the head first, then wrap the model."
        )
    if auxiliary and isinstance(head, nn.Module):
        raise InputError("auxiliary=True needs a builder such as heads.etf_head, got a built head.")
    target = unwrap(net)
    found = find_heads(target, name=name)
    if not found[0].name:
        raise InputError("The model is a bare linear layer: there is nothing around its head.")
    first = build_head(head, found[0].module, num_classes)
    warn_relu(target, first, found[0].name)
    width, before = widths(first), widths(found[0].module)
    made = [first]
    for _, old in found[1:]:
        same = before is not None and (widths(old) or before)[0] == before[0]
        made.append(build_head(copy.deepcopy(first) if same else head, old, num_classes))
    K = width[1] if width else None
    for _, (path, old) in find_auxiliary(target):
        if auxiliary:
            _put(target, path, build_head(head, old, K))
        elif K is not None and before is not None and (widths(old) or before)[1] != K:
            _put(target, path, build_head(nn.Linear, old, K))
    for (path, _), built in zip(found, made):
        _put(target, path, built)
        _rename(target, path, K)
    return net


def _put(net: nn.Module, path: str, head: nn.Module) -> None:
    """Set the module at ``path``; where a convolution was, the head must act on maps."""
    where, _, leaf = path.rpartition(".")
    if isinstance(net.get_submodule(path), nn.Conv2d):
        if isinstance(head, nn.Linear):
            head = _as_conv(head)
        behind = relu_behind(net, path)
        if behind:
            setattr(net.get_submodule(where), behind, nn.Identity())
    setattr(net.get_submodule(where), leaf, head)


def relu_behind(net: nn.Module, path: str) -> str | None:
    """Name of the ReLU that follows the module at ``path`` in an ``nn.Sequential``, if any."""
    where, _, leaf = path.rpartition(".")
    parent = net.get_submodule(where)
    if not isinstance(parent, nn.Sequential):
        return None
    names = [name for name, _ in parent.named_children()]
    behind = names[names.index(leaf) + 1 :][:1]
    return behind[0] if behind and isinstance(parent.get_submodule(behind[0]), _RELU) else None


def _rename(net: nn.Module, path: str, num_classes: int | None) -> None:
    """Bring ``num_classes`` and ``num_labels`` of the modules around the head up to date."""
    parts = path.split(".")
    around = [net.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    for holder in [h for m in around for h in (m, getattr(m, "config", None))]:
        for attribute in ("num_classes", "num_labels"):
            if num_classes is not None and isinstance(getattr(holder, attribute, None), int):
                with contextlib.suppress(AttributeError):  # a property that follows the head
                    setattr(holder, attribute, num_classes)


def _as_conv(linear: nn.Linear) -> nn.Conv2d:
    """The 1×1 convolution with the weights of ``linear``."""
    D, K = linear.in_features, linear.out_features
    conv = nn.Conv2d(D, K, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
    conv.bias = linear.bias
    return conv.train(linear.training)


def warn_relu(net: nn.Module, head: nn.Module, path: str) -> None:
    """Warn when a fixed head without a neck will probably see non-negative features.

    For features ≥ 0 the largest cosine with a row w is ‖max(w, 0)‖: 0.707 for a rotated ETF, and
    √((K−1)/K) for the canonical one, which is as far as any rotation gets.

    Args:
        net: the model that still has its old classifier.
        head: the new one.
        path: dotted name of the old one.
    """
    if not isinstance(head, FixedHead) or not isinstance(head.neck, nn.Identity):
        return
    rows = head.weight.detach()
    if rows.is_meta or not _ends_in_relu(net, path):
        return
    cap = torch.linalg.vector_norm(rows.clamp(min=0), dim=1) / torch.linalg.vector_norm(rows, dim=1)
    if float(cap.min()) < 0.95 * math.sqrt(1 - 1 / len(rows)):
        warnings.warn(
            "This model has ReLUs and the head has no neck: if its features are non-negative they "
            f"reach at most cosine {float(cap.min()):.3f} with the fixed rows. Use neck='bn', or "
            "rotation='canonical'.",
            stacklevel=3,
        )


def _ends_in_relu(net: nn.Module, path: str) -> bool:
    """Whether the last thing before the head that sets the features' sign is probably a ReLU.

    Read from the modules in their order, since nothing has run yet: another activation, a
    LayerNorm or a Linear behind the last ReLU gives features of both signs. Convolutions and
    BatchNorm do not count, because networks often call a functional ReLU after them; nor do
    modules beside the ReLU in a block, whose order is not that of the calls.
    """
    last, where = False, ""
    auxiliary = tuple(root for root, _ in find_auxiliary(net))
    seen = conv = False
    for name, module in net.named_modules():
        if name == path:
            break
        if auxiliary and name.startswith(auxiliary):
            continue
        conv |= isinstance(module, nn.Conv2d)
        if isinstance(module, _RELU):
            last, seen, where = True, True, name.rpartition(".")[0]
        elif isinstance(module, _OTHER):
            last, seen = False, True
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Linear)):
            beside = name.rpartition(".")[0] == where
            if not beside or isinstance(net.get_submodule(where), nn.Sequential):
                last = False
    return last if seen else conv
