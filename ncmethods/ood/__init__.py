"""Out-of-distribution scores (higher = more OOD), their evaluation and their calibration."""

from ncmethods.ood._scorer import Scorer
from ncmethods.ood.calibration import Threshold, benjamini_hochberg
from ncmethods.ood.cosine import ETFAngle, PrototypeCosine
from ncmethods.ood.detector import Detector, Verdict
from ncmethods.ood.evaluation import aupr, auroc, bootstrap, evaluate, fpr95, fpr_at_tpr
from ncmethods.ood.fdbd import fDBD
from ncmethods.ood.feature_norm import FeatureNorm
from ncmethods.ood.logit import GEN, MSP, Energy, KLMatching, MaxLogit
from ncmethods.ood.mahalanobis import Mahalanobis, RelativeMahalanobis
from ncmethods.ood.names import SCORERS, check_name, fit
from ncmethods.ood.nci import NCI
from ncmethods.ood.neco import NECO
from ncmethods.ood.neighbours import KNN, NNGuide
from ncmethods.ood.separation import Separation
from ncmethods.ood.shaping import ASH, DICE, SCALE, VRA, ReAct
from ncmethods.ood.she import SHE
from ncmethods.ood.vim import Residual, ViM
from ncmethods.ood.wdiscood import WDiscOOD

__all__ = [
    "ASH",
    "DICE",
    "GEN",
    "KNN",
    "MSP",
    "NCI",
    "NECO",
    "SCALE",
    "SCORERS",
    "SHE",
    "VRA",
    "Detector",
    "ETFAngle",
    "Energy",
    "FeatureNorm",
    "KLMatching",
    "Mahalanobis",
    "MaxLogit",
    "NNGuide",
    "PrototypeCosine",
    "ReAct",
    "RelativeMahalanobis",
    "Residual",
    "Scorer",
    "Separation",
    "Threshold",
    "Verdict",
    "ViM",
    "WDiscOOD",
    "aupr",
    "auroc",
    "benjamini_hochberg",
    "bootstrap",
    "check_name",
    "evaluate",
    "fDBD",
    "fit",
    "fpr95",
    "fpr_at_tpr",
]
