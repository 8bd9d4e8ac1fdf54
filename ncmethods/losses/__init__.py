"""Losses and regularisers: pure functions of features, logits, labels, weight, counts, by name."""

from ncmethods.losses._module import LossModule
from ncmethods.losses.bcl import balanced_contrastive
from ncmethods.losses.centre_collapse import centre_collapse
from ncmethods.losses.distillation import (
    distill_features,
    distill_logits,
    distill_relations,
)
from ncmethods.losses.dot_regression import dot_regression
from ncmethods.losses.entropy import koleo
from ncmethods.losses.exposure import outlier_exposure, separation
from ncmethods.losses.fnc2 import fnc2
from ncmethods.losses.focal import focal
from ncmethods.losses.ldam import drw_weights, ldam
from ncmethods.losses.logit_adjusted import logit_adjusted
from ncmethods.losses.mixing import CutMixBox, cutmix_box, mixed, remix_labels, remix_lambda
from ncmethods.losses.mse import binary_cross_entropy, mse
from ncmethods.losses.multi_centre import multi_centre_regression
from ncmethods.losses.nc_regularizer import (
    CentreRegularizer,
    live_centres,
    nc1_centres,
    nc2_max_min_angle,
)
from ncmethods.losses.norms import norm_variation, zero_mean
from ncmethods.losses.pick_all_label import pick_all_label
from ncmethods.losses.signed_nc1 import signed_nc1
from ncmethods.losses.smoothing import label_aware_smoothing, label_smoothing
from ncmethods.losses.spectral_decoupling import spectral_decoupling
from ncmethods.losses.supcon import prototype_supcon, supcon
from ncmethods.losses.svsl import svsl
from ncmethods.losses.targeted import k_positive_supcon, targeted_supcon
from ncmethods.losses.tikhonov import feature_decay, tikhonov
from ncmethods.losses.vector_scaling import vector_scaling

__all__ = [
    "CentreRegularizer",
    "CutMixBox",
    "LossModule",
    "balanced_contrastive",
    "binary_cross_entropy",
    "centre_collapse",
    "cutmix_box",
    "distill_features",
    "distill_logits",
    "distill_relations",
    "dot_regression",
    "drw_weights",
    "feature_decay",
    "fnc2",
    "focal",
    "k_positive_supcon",
    "koleo",
    "label_aware_smoothing",
    "label_smoothing",
    "ldam",
    "live_centres",
    "logit_adjusted",
    "mixed",
    "mse",
    "multi_centre_regression",
    "nc1_centres",
    "nc2_max_min_angle",
    "norm_variation",
    "outlier_exposure",
    "pick_all_label",
    "prototype_supcon",
    "remix_labels",
    "remix_lambda",
    "separation",
    "signed_nc1",
    "spectral_decoupling",
    "supcon",
    "svsl",
    "targeted_supcon",
    "tikhonov",
    "vector_scaling",
    "zero_mean",
]
