"""Losses: pure functions of features, logits, labels, weight and counts, by those names."""

from ncmethods.losses._module import LossModule
from ncmethods.losses.dot_regression import dot_regression
from ncmethods.losses.ldam import drw_weights, ldam
from ncmethods.losses.logit_adjusted import logit_adjusted

__all__ = ["LossModule", "dot_regression", "drw_weights", "ldam", "logit_adjusted"]
