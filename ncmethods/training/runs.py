"""Run directories: reading back what :func:`ncmethods.training.fit` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncmethods._core import CheckpointError, InputError
from ncmethods.heads import Classifier
from ncmethods.models import load_weights
from ncmethods.training.config import ModelConfig, build_model

__all__ = ["Preprocessing", "Run", "load_run", "read_json"]


@dataclass(frozen=True)
class Preprocessing:
    """Images as the model was trained on them: uint8 [N, C, H, W] → float32 [N, C, H, W]."""

    mean: Sequence[float]
    std: Sequence[float]
    shape: tuple[int, int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 images.

        Raises:
            InputError: another dtype, or other channels or size than in training.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images must be uint8 [N, {', '.join(map(str, self.shape))}] as in training, "
                f"got {images.dtype} {tuple(images.shape)}."
            )
        mean, std = (torch.tensor(v, device=images.device) * 255 for v in (self.mean, self.std))
        return (images.float() - mean[:, None, None]) / std[:, None, None]


@dataclass(frozen=True)
class Run:
    """A trained model with what is needed to use it."""

    model: Classifier
    config: dict[str, Any]
    preprocess: Preprocessing


def read_json(path: Path) -> Any:
    """Contents of a JSON file of a run.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a run directory: it has no {path.name}. "
            "A run lives in OUT/<method>/seed<k>."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Classifier (eval mode, CPU), config and preprocessing of a finished run.

    Args:
        directory: ``OUT/<method>/seed<k>``.

    Raises:
        CheckpointError: not a run directory, or the run has not finished.
        InputError: weights that are damaged or do not fit.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    try:
        spec = ModelConfig(**config["model"] | {"weights": None})
        data = config["data"]
        preprocess = Preprocessing(data["mean"], data["std"], tuple(data["image_shape"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory}/config.json is not that of a run of ncmethods ({error})."
        ) from error
    weights = directory / "weights.safetensors"
    if not weights.exists():
        raise CheckpointError(
            f"{directory} has no weights.safetensors: the run has not finished. "
            "Start the same command again to resume it."
        )
    model = build_model(spec)
    load_weights(model, weights)
    return Run(model.eval(), config, preprocess)
