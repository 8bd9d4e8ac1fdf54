"""Classifier heads with a prescribed geometry, and the means to put them into a model."""

from ncmethods._core import Output, find_head, logits_of
from ncmethods.heads.analytic import lda, ncm, ridge
from ncmethods.heads.class_mean import ClassMeanHead, class_mean_head
from ncmethods.heads.classifier import Classifier
from ncmethods.heads.cosine import CosineHead, cosine_head
from ncmethods.heads.export import to_conv, to_linear
from ncmethods.heads.fixed import FixedHead, class_lengths, etf_head, frame_head
from ncmethods.heads.growing import GrowingHead, growing_head
from ncmethods.heads.guided import GuidedHead, guided_head
from ncmethods.heads.multi_centre import MultiCentreHead, multi_centre_head
from ncmethods.heads.normalized import (
    FrozenProjector,
    NormalizedHead,
    frozen_projector_head,
    normalized_head,
)
from ncmethods.heads.prime import PrimeHead, prime_head
from ncmethods.heads.rotated import RotatedHead, rotated_head
from ncmethods.heads.skip import PartlyTuned, skip_layer
from ncmethods.heads.swap import swap_head

__all__ = [
    "ClassMeanHead",
    "Classifier",
    "CosineHead",
    "FixedHead",
    "FrozenProjector",
    "GrowingHead",
    "GuidedHead",
    "MultiCentreHead",
    "NormalizedHead",
    "Output",
    "PartlyTuned",
    "PrimeHead",
    "RotatedHead",
    "class_lengths",
    "class_mean_head",
    "cosine_head",
    "etf_head",
    "find_head",
    "frame_head",
    "frozen_projector_head",
    "growing_head",
    "guided_head",
    "lda",
    "logits_of",
    "multi_centre_head",
    "ncm",
    "normalized_head",
    "prime_head",
    "ridge",
    "rotated_head",
    "skip_layer",
    "swap_head",
    "to_conv",
    "to_linear",
]
