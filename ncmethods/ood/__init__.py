"""Out-of-distribution scores (higher = more OOD), their evaluation and their calibration."""

from ncmethods.ood._scorer import Scorer
from ncmethods.ood.calibration import Threshold, benjamini_hochberg
from ncmethods.ood.evaluation import aupr, auroc, bootstrap, evaluate, fpr95, fpr_at_tpr
from ncmethods.ood.logit import GEN, MSP, Energy, KLMatching, MaxLogit
from ncmethods.ood.mahalanobis import Mahalanobis, RelativeMahalanobis
from ncmethods.ood.neco import NECO

__all__ = [
    "GEN",
    "MSP",
    "NECO",
    "Energy",
    "KLMatching",
    "Mahalanobis",
    "MaxLogit",
    "RelativeMahalanobis",
    "Scorer",
    "Threshold",
    "aupr",
    "auroc",
    "benjamini_hochberg",
    "bootstrap",
    "evaluate",
    "fpr95",
    "fpr_at_tpr",
]
