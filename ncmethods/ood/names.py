"""Scorers by the names that commands and tables use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ncmethods._core import check_choice
from ncmethods.ood._scorer import Scorer, Train
from ncmethods.ood.cosine import ETFAngle, PrototypeCosine
from ncmethods.ood.fdbd import fDBD
from ncmethods.ood.feature_norm import FeatureNorm
from ncmethods.ood.logit import GEN, MSP, Energy, KLMatching, MaxLogit
from ncmethods.ood.mahalanobis import Mahalanobis, RelativeMahalanobis
from ncmethods.ood.nci import NCI
from ncmethods.ood.neco import NECO
from ncmethods.ood.neighbours import KNN, NNGuide
from ncmethods.ood.separation import Separation
from ncmethods.ood.shaping import ASH, DICE, SCALE, VRA, ReAct
from ncmethods.ood.she import SHE
from ncmethods.ood.vim import Residual, ViM
from ncmethods.ood.wdiscood import WDiscOOD

__all__ = ["SCORERS", "check_name", "fit"]

SCORERS: dict[str, Callable[..., Scorer]] = {
    "msp": MSP.fit,
    "maxlogit": MaxLogit.fit,
    "energy": Energy.fit,
    "gen": GEN.fit,
    "klmatching": KLMatching.fit,
    "mahalanobis": Mahalanobis.fit,
    "mahalanobis++": partial(Mahalanobis.fit, normalize=True),
    "relative": RelativeMahalanobis.fit,
    "relative++": partial(RelativeMahalanobis.fit, normalize=True),
    "vim": ViM.fit,
    "residual": Residual.fit,
    "neco": NECO.fit,
    "nci": NCI.fit,
    "fdbd": fDBD.fit,
    "knn": KNN.fit,
    "nnguide": NNGuide.fit,
    "she": SHE.fit,
    "prototype-cosine": PrototypeCosine.fit,
    "etf-angle": ETFAngle.fit,
    "wdiscood": WDiscOOD.fit,
    "feature-norm": FeatureNorm.fit,
    "separation": Separation.fit,
    "react": ReAct.fit,
    "vra": VRA.fit,
    "ash-b": partial(ASH.fit, variant="b"),
    "ash-s": partial(ASH.fit, variant="s"),
    "scale": SCALE.fit,
    "dice": DICE.fit,
}
"""Name → ``fit``, with the hyperparameters of the literature."""


def check_name(name: str) -> str:
    """``name`` if it is a scorer's, else an error with the nearest one."""
    return check_choice(name, SCORERS, "scorer")


def fit(name: str, train: Train, head: nn.Module | None = None) -> Scorer:
    """The scorer of that name, fitted.

    Args:
        name: one of ``SCORERS``.
        train: samples, or moments where those are enough.
        head: of the model, for scores that use logits or rows.

    Raises:
        InputError: an unknown name, or what the scorer needs is missing.
    """
    return SCORERS[check_name(name)](train, head=head)
