"""Fine-tune one block of a frozen network, and let the classifier see its output directly."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError, main_output
from ncmethods.features import Pool, _mean
from ncmethods.heads.classifier import Classifier
from ncmethods.heads.swap import widths

__all__ = ["PartlyTuned", "skip_layer"]


class PartlyTuned(nn.Module):
    """A backbone of which only some blocks are trained; one may reach the classifier directly.

    All other parameters are frozen, and the modules that hold them stay in eval mode when the whole
    is put into training mode: their BatchNorm statistics do not move and their dropout is off.

    With ``skip`` the features are h(x) + s(x): those of ``net``, and the output of one block, with
    feature maps [N, C, H, W] and tokens [N, T, D] averaged over their positions. The narrower of
    both is padded with zeros.

    Args:
        net: maps inputs to [N, D]; its ``requires_grad`` flags are changed.
        blocks: dotted names of the modules of ``net`` that are trained; () freezes it all.
        skip: dotted name of the module whose output is added; None adds nothing.
        images: with ``skip``, inputs on which the widths are measured.
        pool: makes [N, d] of an output with more than two axes.

    Raises:
        InputError: an unknown name, a block without parameters, or one that ``net`` does not call.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Sequence[str],
        *,
        skip: str | None = None,
        images: Tensor | None = None,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        names = [name for name, _ in net.named_modules() if name]
        for name in (*blocks, *filter(None, [skip])):
            if name not in names:
                near = difflib.get_close_matches(name, names, n=8, cutoff=0.3) or names[:8]
                raise InputError(f"The backbone has no block {name!r}. Near it: {', '.join(near)}.")
        self.net, self.blocks, self.skip, self.pool = net, tuple(blocks), skip, pool or _mean
        net.requires_grad_(False)
        for name in blocks:
            block = net.get_submodule(name).requires_grad_(True)
            if next(block.parameters(), None) is None:
                raise InputError(
                    f"{name} ({type(block).__name__}) has no parameters to train. Name a block "
                    "that has."
                )
        self.train(net.training)
        if skip is not None:
            if images is None:
                raise InputError("skip needs images, to know the widths. Pass a batch of one.")
            modes = {module: module.training for module in self.modules()}
            with torch.no_grad():
                self.num_features: int = self.eval()(images).shape[1]
            for module, mode in modes.items():
                module.training = mode

    def forward(self, x: Any) -> Tensor:
        """Features [N, max(D, d)] of the inputs, with d the width of the block's output.

        Raises:
            InputError: ``net`` did not call the block, or its pooled output is not [N, d].
        """
        if self.skip is None:
            return main_output(self.net(x))  # type: ignore[no-any-return]
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            z = output if isinstance(output, Tensor) else output[0]
            seen.append(
                self.pool(z) if z.ndim > 2 else z.clone()
            )  # the next layer may overwrite it

        with self.net.get_submodule(self.skip).register_forward_hook(keep):
            h = main_output(self.net(x))
        if not seen:
            raise InputError(f"The forward pass does not reach {self.skip}. Name another block.")
        s = seen[-1]
        if s.shape[:1] != h.shape[:1] or s.ndim != 2:
            raise InputError(
                f"The pooled output of {self.skip} must be [N, d], got {tuple(s.shape)}: pass pool."
            )
        width = max(h.shape[1], s.shape[1])
        return F.pad(h, (0, width - h.shape[1])) + F.pad(s, (0, width - s.shape[1]))

    def train(self, mode: bool = True) -> PartlyTuned:
        """Set the mode of the trained blocks; the others stay in eval mode."""
        super().train(False)
        self.training = mode
        for name in self.blocks:
            self.net.get_submodule(name).train(mode)
        return self


def skip_layer(
    model: nn.Module,
    block: str,
    *,
    images: Tensor,
    num_classes: int | None = None,
    head: Callable[[int, int], nn.Module] = nn.Linear,
    pool: Pool | None = None,
) -> Classifier:
    """A Classifier for skip-layer fine-tuning: one block and a new head are trained, no more.

    The head acts on the penultimate features plus the pooled output of the block, the narrower of
    both padded with zeros, so that the gradient reaches the block past the frozen layers behind it
    as well as through them.

    Args:
        model: a Classifier, or a model that :meth:`Classifier.from_model` can split; it is not
            copied.
        block: dotted name of a module in the model's backbone, as ``"layer3"`` or ``"blocks.2"``.
        images: inputs of the model, on which the widths are measured; one is enough.
        num_classes: K; the model's own if None.
        head: makes the classifier of (width, K).
        pool: makes [N, d] of the block's output; the mean over positions if None.

    Raises:
        InputError: an unknown block, or one without parameters.

    References:
        Li et al. 2022, arXiv:2212.12206.
    """
    split = Classifier.from_model(model, nn.Linear, num_classes=num_classes)
    old: Any = split.head
    net = PartlyTuned(split.backbone, (block,), skip=block, images=images, pool=pool)
    K = (widths(old) or (0, 0))[1]
    new = head(net.num_features, K).to(old.weight.device, old.weight.dtype)
    return Classifier(net, new.train(model.training))
