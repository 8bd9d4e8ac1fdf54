"""Classifier heads with a prescribed geometry, and the means to put them into a model."""

from ncmethods._core import Output, find_head, logits_of
from ncmethods.heads.classifier import Classifier
from ncmethods.heads.cosine import CosineHead, cosine_head
from ncmethods.heads.fixed import FixedHead, etf_head
from ncmethods.heads.swap import swap_head

__all__ = [
    "Classifier",
    "CosineHead",
    "FixedHead",
    "Output",
    "cosine_head",
    "etf_head",
    "find_head",
    "logits_of",
    "swap_head",
]
