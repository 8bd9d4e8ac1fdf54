"""Searched frames on disk, so that a search runs once for each seed."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ncmethods._core import InputError, atomic_path

# Part of every key: raise it when a search changes what it returns.
_VERSION = 1


def folder() -> Path:
    """``$NCMETHODS_CACHE``, or ``~/.cache/ncmethods``; frames lie in a folder of their own."""
    given = os.environ.get("NCMETHODS_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "ncmethods") / "frames"


def remember(
    search: Callable[[], Tensor], key: tuple[object, ...], generator: torch.Generator | None
) -> Tensor:
    """The result of ``search()``, from disk if it ran before with this key and generator state.

    A hit leaves the generator in the state in which the search left it. Nothing is kept without a
    generator: the state of the global one hardly comes back. A damaged file is written again; a
    folder that cannot be written is left alone.
    """
    if generator is None:
        return search()
    name = hashlib.sha256(repr((_VERSION, *key)).encode() + _bytes(generator)).hexdigest()
    path = folder() / f"{name[:32]}.pt"
    try:
        content = path.read_bytes()
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() == digest:
            found = torch.load(io.BytesIO(payload), weights_only=True)
            generator.set_state(found["state"])
            rows: Tensor = found["rows"]
            return rows
    except OSError:
        pass
    rows = search()
    buffer = io.BytesIO()
    torch.save({"rows": rows, "state": generator.get_state()}, buffer)
    payload = buffer.getvalue()
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
    except (InputError, OSError):
        pass
    return rows


def _bytes(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
