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
        recipe: the command that takes it.
    """

    source: str
    methods: tuple[str, ...]
    backbone: str
    data: dict[str, Any]
    train: dict[str, Any]
    differs: str = ""
    recipe: str = "long-tailed"

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


def _large(
    source: str,
    methods: tuple[str, ...],
    backbone: str,
    name: str,
    differs: str,
    recipe: str = "long-tailed",
    **train: Any,
) -> Protocol:
    """A published set at 224 pixels. Theirs are random-resized crops, ours centres that flip."""
    train = {"warmup_epochs": 0.0, "schedule": "cosine", "flip": True} | train
    crops = (
        "Random-resized crops and colour jitter; tests on the centre of images of 256 pixels, and "
        "momentum without Nesterov. "
    )
    return Protocol(
        source, methods, f"torchvision:{backbone}", {"name": name, "size": 224}, train,
        crops + differs, recipe,
    )  # fmt: skip


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
_LA = _LDAM | {"gamma": 0.1, "crop": 2}
_LA_DIFFERS = (
    "Their ResNet-32 has blocks of 1 × 1, 3 × 3 and 1 × 1 convolutions and learned shortcuts; "
    "decay of kernels and the classifier only; pixels shifted to −½ … ½; batches of exactly 128; "
    "their own draw of the images. The post-hoc form is `ncmethods stage-two --methods post-hoc`."
)
_KANG = (
    "Kang et al., ICLR 2020, arXiv:1910.09217, and facebookresearch/classifier-balancing f162ade"
)
_MISLAS = "Zhong et al., CVPR 2021, arXiv:2104.00466, and dvlab-research/MiSLAS 0fc381e"
_MISLAS_NEXT = (
    "The best test epoch. The first stage; the second (10 epochs, label-aware smoothing, shifted "
    "BatchNorm) is `ncmethods stage-two --methods las` without the shift."
)
_BCL = (
    "Zhu et al., CVPR 2022, arXiv:2207.09052, and FlamieZhu/Balanced-Contrastive-Learning f72d070"
)
_BCL_DIFFERS = (
    "Our two views are shifted by up to 32 pixels in place of those crops. Theirs add a third view "
    "for the classifier, with RandAugment, and colour and grey jitter of the other two; "
    "projections of 1024 numbers; a cosine classifier of scale 30. The best epoch on validation "
    "images, which for iNaturalist are the test images."
)

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
    "cifar10-lt/mislas": Protocol(
        _MISLAS, ("ce",), "resnet32", _cifar("cifar10"), _ETF, _MISLAS_NEXT
    ),
    "cifar100-lt/mislas": Protocol(
        _MISLAS, ("ce",), "resnet32", _cifar("cifar100"), _ETF, _MISLAS_NEXT
    ),
    "cifar10-lt/logit-adjustment": Protocol(
        "Menon et al., ICLR 2021, arXiv:2007.07314, and google-research logit_adjustment 1d4d2f1",
        ("ce", "la"),
        "resnet32",
        _cifar("cifar10"),
        # They add 10⁻⁴ ‖w‖², whose gradient is that of a decay of 2 · 10⁻⁴.
        _LA
        | {
            "epochs": 1241,
            "warmup_epochs": 20.0,
            "milestones": (604 / 1241, 926 / 1241, 1128 / 1241),
        },
        _LA_DIFFERS,
    ),
    "cifar100-lt/logit-adjustment": Protocol(
        "Menon et al., ICLR 2021, arXiv:2007.07314, and google-research logit_adjustment 1d4d2f1",
        ("ce", "la"),
        "resnet32",
        _cifar("cifar100"),
        _LA
        | {
            "epochs": 1419,
            "warmup_epochs": 22.0,
            "milestones": (691 / 1419, 1059 / 1419, 1290 / 1419),
        },
        _LA_DIFFERS,
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
    "imagenet-lt/decoupling": _large(
        _KANG,
        ("ce", "balanced-sampling"),
        "resnext50_32x4d",
        "imagenet-lt",
        "The best epoch on validation images. The first stage; the second (10 epochs) is "
        "`ncmethods stage-two`.",
        epochs=90,
        batch_size=512,
        lr=0.2,
        weight_decay=5e-4,
    ),
    "inaturalist18/decoupling": _large(
        _KANG,
        ("ce",),
        "resnet50",
        "inaturalist18",
        "No colour jitter here; also 200 epochs. The best test epoch. The first stage; the second "
        "(30 epochs) is `ncmethods stage-two`.",
        epochs=90,
        batch_size=512,
        lr=0.2,
        weight_decay=1e-4,
    ),
    "imagenet-lt/mislas": _large(
        _MISLAS,
        ("ce",),
        "resnet50",
        "imagenet-lt",
        _MISLAS_NEXT,
        epochs=180,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        mixup=0.2,
    ),
    "places-lt/mislas": _large(
        _MISLAS,
        ("ce",),
        "resnet152",
        "places-lt",
        "Their ResNet-152 comes trained and stays as it is, but for one more block and the "
        "classifier; ours begins at random and trains as a whole. " + _MISLAS_NEXT,
        epochs=90,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        mixup=0.2,
    ),
    "inaturalist18/mislas": _large(
        _MISLAS,
        ("ce",),
        "resnet50",
        "inaturalist18",
        _MISLAS_NEXT,
        epochs=200,
        batch_size=256,
        lr=0.1,
        weight_decay=1e-4,
        mixup=0.2,
    ),
    "imagenet-lt/etf-dr": _large(
        "Yang et al., NeurIPS 2022, arXiv:2203.09081, and NeuralCollapseApplications/"
        "ImbalancedLearning 2ebb309",
        ("ce", "etf-dr-balanced"),
        "resnet50",
        "imagenet-lt",
        "Their last stage is twice as wide (4096 features), which are not normalised, with 0.01 "
        "times their mean length in the loss; the best test epoch.",
        epochs=90,
        batch_size=1024,
        lr=0.1,
        weight_decay=5e-4,
        mixup=0.2,
    ),
    "imagenet-lt/nc-regularizer": _large(
        "Liu et al., AISTATS 2023, arXiv:2302.12453, and the defaults of Pepper-lll/NCfeature "
        "a11c2c5",
        ("ce", "centres"),
        "resnext50_32x4d",
        "imagenet-lt",
        "The centres keep their rate of 0.5; re-weighting from epoch 70 is an option of theirs; "
        "the best epoch on validation images.",
        epochs=90,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=5.0,
    ),
    "imagenet-lt/bcl": _large(
        _BCL,
        ("la-cosine", "bcl"),
        "resnext50_32x4d",
        "imagenet-lt",
        _BCL_DIFFERS,
        "contrastive",
        epochs=90,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        views=2,
        crop=32,
    ),
    "inaturalist18/bcl": _large(
        _BCL,
        ("la-cosine", "bcl"),
        "resnet50",
        "inaturalist18",
        _BCL_DIFFERS,
        "contrastive",
        epochs=100,
        batch_size=256,
        lr=0.2,
        weight_decay=1e-4,
        views=2,
        crop=32,
    ),
}


def protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        InputError: an unknown name.
    """
    check_choice(name, PROTOCOLS, "protocol")
    return PROTOCOLS[name]
