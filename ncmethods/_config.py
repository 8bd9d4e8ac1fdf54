"""Configurations as nested dataclasses: filled from JSON, and written as JSON."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ncmethods._core import InputError, check_choice

T = TypeVar("T")


def filled(config: T, values: Mapping[str, Any], where: str) -> T:
    """``config`` with the given fields replaced, nested ones too; lists become tuples.

    Args:
        config: a dataclass instance.
        values: by field, nested as the dataclasses are.
        where: they come from, for errors.

    Raises:
        InputError: a field that does not exist.
    """
    old_config: Any = config
    hints = typing.get_type_hints(type(config))
    new: dict[str, Any] = {}
    for name, value in values.items():
        check_choice(name, [f.name for f in fields(old_config)], f"option in {where}")
        old = getattr(config, name)
        if is_dataclass(old):
            value = filled(old, value, where)
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and Path in (hints[name], *typing.get_args(hints[name])):
            value = Path(value)
        new[name] = value
    made: T = replace(old_config, **new)
    return made


def as_json(config: Any) -> str:
    """A configuration as text that :func:`read` takes back."""
    return json.dumps(asdict(config), indent=1, default=str) + "\n"


def read(path: Path) -> dict[str, Any]:
    """What :func:`as_json` wrote.

    Raises:
        InputError: not such a file.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the configuration {path}: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one JSON object, got {type(values).__name__}.")
    return values
