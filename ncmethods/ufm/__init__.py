"""Unconstrained-features models: theory of neural collapse as small problems that are solved.

A model is data (:class:`UFM`); :func:`solve` finds its minimum numerically, :func:`predict` writes
it down where a closed form is known, and every metric of the library applies to both.
"""

from ncmethods.ufm.model import UFM, label_sets, mixup_targets
from ncmethods.ufm.predict import Prediction, predict
from ncmethods.ufm.solve import Flow, Solution, flow, solve, solve_many

__all__ = [
    "UFM",
    "Flow",
    "Prediction",
    "Solution",
    "flow",
    "label_sets",
    "mixup_targets",
    "predict",
    "solve",
    "solve_many",
]
