"""Checkpoints: whole or absent, checked by SHA-256, the last two kept."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from ncmethods._core import CheckpointError, atomic_path, write_text

__all__ = ["load_checkpoint", "save_checkpoint"]

_KEPT = 2


def _all(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(directory.glob("checkpoint-*.pt"))


def _digest(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_checkpoint(directory: Path, state: dict[str, Any], step: int) -> Path:
    """Write ``checkpoint-<step>.pt`` and its SHA-256, then drop all but the last two.

    Args:
        directory: of the run.
        state: tensors, numbers, strings and containers of them.
        step: steps done.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = directory / f"checkpoint-{step:09d}.pt"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    # A checkpoint counts once its digest stands beside it.
    write_text(_digest(path), hashlib.sha256(content).hexdigest() + "\n")
    for old in _all(directory)[:-_KEPT]:
        _digest(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint of a run; None where there is none yet.

    A checkpoint without a digest was being written when the run was killed and is passed over. One
    that does not match its digest is damaged: a warning, and the one before it is taken.

    Raises:
        CheckpointError: checkpoints exist, and every one is damaged.
    """
    damaged = []
    for path in reversed(_all(directory)):
        if not _digest(path).exists():
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == _digest(path).read_text("latin-1").strip():
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
            return state
        damaged.append(path.name)
        warnings.warn(
            f"{path} does not match its SHA-256: it is truncated or damaged. "
            "Falling back to the checkpoint before it.",
            stacklevel=2,
        )
    if damaged:
        raise CheckpointError(
            f"Every checkpoint in {directory} is damaged: {', '.join(damaged)}. Delete them to "
            "start this run anew, or restore them from a copy."
        )
    return None
