"""NC-FSCIL: few-shot sessions that train the projection onto fixed vertices, on features alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncmethods._core import InputError
from ncmethods.losses import dot_regression

__all__ = ["Finetune", "finetune_lr", "finetune_neck", "session_set"]


@dataclass(frozen=True)
class Finetune:
    """Hyperparameters of one session; the defaults are the authors' for the last of CIFAR-100."""

    steps: int = 200
    """Batches; the authors give 50 to the first session and 200 to the last."""
    lr: float = 0.25
    """Peak learning rate of SGD with momentum 0.9 and weight decay 5e-4."""
    batch_size: int = 64
    """Over all ranks; the authors' 8 per GPU are 64 on their eight."""
    weight: float = 10.0
    """Factor on the dot-regression loss."""
    balance: str = "batch"
    """As in losses.dot_regression; "batch" is the authors' longer targets for rare classes."""
    mix: float = 0.0
    """Probability of mixing the projected features of a batch in halves, on CIFAR 0.75."""
    warmup: int = 5
    """Steps of linear warm-up from a tenth."""
    cooldown: int = 5
    """Last steps, at a thousandth of the peak."""


def finetune_lr(config: Finetune, step: int) -> float:
    """Learning rate of a step, counted from 1: warm-up, cosine to 1 %, the last steps at 0.1 %."""
    until = config.steps - config.cooldown
    if step > until:
        return config.lr * 1e-3
    rate = config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / until)))
    if step < config.warmup:
        rate *= 1 - (1 - step / config.warmup) * 0.9
    return rate


def session_set(
    novel: tuple[Tensor, Tensor], means: Tensor, *, base: int, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """What a session trains on: its shots, and what is remembered of earlier classes.

    Args:
        novel: backbone features [n, D] and labels [n] of the session's shots.
        means: of the earlier classes [seen, D], numbered by arrival.
        base: how many of those are of the base session; they come once.
        copies: of each earlier novel class.

    Returns:
        features [n + base + copies·(seen − base), D] and labels.

    Raises:
        InputError: labels of earlier classes among the shots, or a base that is out of range.
    """
    x, y = novel
    seen = len(means)
    if not 1 <= base <= seen or copies < 1:
        raise InputError(f"base lies in 1 … {seen} and copies is at least 1, got {base}, {copies}.")
    if len(y) and int(y.min()) < seen:
        raise InputError(
            f"The shots hold class {int(y.min())}, of which a mean is kept: {seen} came before."
        )
    again = torch.arange(base, seen).repeat(copies)
    old = torch.cat([torch.arange(base), again]).to(y.device)
    return torch.cat([x, means[old].to(x)]), torch.cat([y, old])


def finetune_neck(
    neck: nn.Module,
    rows: Tensor,
    features: Tensor,
    labels: Tensor,
    config: Finetune | None = None,
    *,
    seed: int = 0,
) -> list[float]:
    """Train ``neck`` in place so that features meet the vertices of their classes.

    Args:
        neck: [N, D_in] → [N, D]; the backbone before it stays as it is.
        rows: unit vertices of the classes that have been seen [seen, D].
        features: of the backbone [N, D_in], as :func:`session_set` gives them.
        labels: int64 [N].
        config: hyperparameters.
        seed: of the order and the mixing; the global random state is not touched.

    Returns:
        The loss of each step.

    Raises:
        InputError: no features, labels without a vertex, or fewer steps than the cool-down.

    References:
        Yang et al., ICLR 2023, arXiv:2302.03004, and the authors' code at
        NeuralCollapseApplications/FSCIL@37a5475. A batch is drawn from a shuffled pass; theirs
        drops the last incomplete one, ours keeps it where there is no other.
    """
    config = Finetune() if config is None else config
    if config.steps <= config.cooldown:
        raise InputError(
            f"steps must exceed the cool-down of {config.cooldown}, got {config.steps}."
        )
    if not len(features):
        raise InputError("The session has no features to train on.")
    rng = torch.Generator().manual_seed(seed)
    size = min(config.batch_size, len(features))
    order = torch.empty(0, dtype=torch.int64)
    optimizer = torch.optim.SGD(neck.parameters(), config.lr, momentum=0.9, weight_decay=5e-4)
    neck.train()
    history = []
    for step in range(1, config.steps + 1):
        if len(order) < size:
            order = torch.randperm(len(features), generator=rng)
        batch, order = order[:size].to(features.device), order[size:]
        for group in optimizer.param_groups:
            group["lr"] = finetune_lr(config, step)
        z, y = neck(features[batch]), labels[batch]
        if config.mix and float(torch.rand((), generator=rng)) < config.mix:
            other = torch.randperm(size, generator=rng).to(z.device)
            z = (z + z[other]) / 2
            both = [dot_regression(z, t, rows, balance=config.balance) for t in (y, y[other])]
            loss = torch.stack(both).mean()
        else:
            loss = dot_regression(z, y, rows, balance=config.balance)
        loss = config.weight * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(loss.detach())
    neck.eval()
    return torch.stack(history).tolist()
