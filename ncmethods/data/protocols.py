"""Training protocols as papers and their released code state them: values, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ncmethods._core import check_choice

__all__ = ["PROTOCOLS", "Protocol", "protocol"]


@dataclass(frozen=True)
class Protocol:
    """What a recipe takes over from a paper.

    Args:
        source: where the constants stand.
        methods: of the recipe, that the paper is about.
        backbone: name for :func:`ncmethods.models.build`.
        data: fields of the recipe's data.
        train: fields of its training.
        differs: what the authors do and the recipe does not.
    """

    source: str
    methods: tuple[str, ...]
    backbone: str
    data: dict[str, Any]
    train: dict[str, Any]
    differs: str = ""

    def values(self) -> dict[str, Any]:
        """Fields of a recipe's configuration, nested as its options are."""
        return {
            "methods": self.methods,
            "backbone": self.backbone,
            "data": dict(self.data),
            "train": dict(self.train),
        }


def _cifar(name: str, imbalance: float = 100) -> dict[str, Any]:
    K = {"cifar10": 10, "cifar100": 100}[name]
    # Canonical order and the images of the LDAM-DRW generator, as the field compares them.
    return {"name": name, "imbalance": imbalance, "order": tuple(range(K)), "seed": 0}


_CROPS = {"crop": 4, "flip": True}
_LDAM = {
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 2e-4,
    "warmup_epochs": 5.0,
    "schedule": "step",
    "milestones": (0.8, 0.9),
    "gamma": 0.01,
    **_CROPS,
}
_ETF = _LDAM | {"gamma": 0.1, "mixup": 1.0}

PROTOCOLS = {
    "cifar10-lt/ldam-drw": Protocol(
        "Cao et al., NeurIPS 2019, arXiv:1906.07413, and kaidic/LDAM-DRW 2536330",
        ("ce", "drw", "ldam-drw", "vs"),
        "resnet32",
        _cifar("cifar10"),
        _LDAM,
        "Momentum without Nesterov; the best test epoch is reported.",
    ),
    "cifar100-lt/ldam-drw": Protocol(
        "Cao et al., NeurIPS 2019, arXiv:1906.07413, and kaidic/LDAM-DRW 2536330",
        ("ce", "drw", "ldam-drw", "vs"),
        "resnet32",
        _cifar("cifar100"),
        _LDAM,
        "Momentum without Nesterov; the best test epoch is reported.",
    ),
    "cifar10-lt/etf-dr": Protocol(
        "Yang et al., NeurIPS 2022, arXiv:2203.09081, and NeuralCollapseApplications/"
        "ImbalancedLearning 2ebb309",
        ("ce", "etf-dr-balanced"),
        "resnet32",
        _cifar("cifar10"),
        _ETF,
        "Their learnable baseline has frozen rows; the best test epoch is reported.",
    ),
    "cifar100-lt/etf-dr": Protocol(
        "Yang et al., NeurIPS 2022, arXiv:2203.09081, and NeuralCollapseApplications/"
        "ImbalancedLearning 2ebb309",
        ("ce", "etf-dr-balanced"),
        "resnet32_wide",
        _cifar("cifar100"),
        _ETF,
        "Their learnable baseline has frozen rows; the best test epoch is reported.",
    ),
    "cifar100-lt/mislas": Protocol(
        "Zhong et al., CVPR 2021, arXiv:2104.00466, and dvlab-research/MiSLAS 0fc381e",
        ("ce",),
        "resnet32",
        _cifar("cifar100"),
        _ETF,
        "The first stage; the second (label-aware smoothing, shifted BatchNorm, 10 epochs) is "
        "`ncmethods stage-two` without the shift.",
    ),
    "cifar100-lt/weight-balancing": Protocol(
        "Alshammari et al., CVPR 2022, arXiv:2203.14197, and the authors' LTR-weight-balancing "
        "e89f292",
        ("ce",),
        "torchvision:resnet34",
        _cifar("cifar100"),
        {
            "epochs": 320,
            "batch_size": 64,
            "lr": 0.01,
            "weight_decay": 5e-3,
            "warmup_epochs": 0.0,
            "schedule": "cosine",
            **_CROPS,
        },
        "The first stage; the second is `ncmethods stage-two --methods weight-balancing`. Their "
        "ResNet-34 has a stem for 32 × 32 images and takes the first n_c images of each class.",
    ),
}


def protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        InputError: an unknown name.
    """
    check_choice(name, PROTOCOLS, "protocol")
    return PROTOCOLS[name]
