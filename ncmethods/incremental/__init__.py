"""Classes that arrive one after the other: memories, measures over sessions, methods."""

from ncmethods.incremental.evaluator import (
    BaseNovel,
    IncrementalEvaluator,
    average_incremental,
    backward_transfer,
    base_novel_harmonic,
    forgetting,
    knowledge_retention,
    last,
    performance_drop,
)
from ncmethods.incremental.memory import (
    ExemplarMemory,
    FeatureMemory,
    Select,
    by_cosine,
    herding,
    herding_by_class,
)
from ncmethods.incremental.method import METHODS, Method, Step
from ncmethods.incremental.nc_fscil import Finetune, finetune_lr, finetune_neck, session_set
from ncmethods.incremental.ranpac import RanPAC
from ncmethods.incremental.vertices import Policy, Vertices, evolve
from ncmethods.incremental.weight_align import weight_align

__all__ = [
    "METHODS",
    "BaseNovel",
    "ExemplarMemory",
    "FeatureMemory",
    "Finetune",
    "IncrementalEvaluator",
    "Method",
    "Policy",
    "RanPAC",
    "Select",
    "Step",
    "Vertices",
    "average_incremental",
    "backward_transfer",
    "base_novel_harmonic",
    "by_cosine",
    "evolve",
    "finetune_lr",
    "finetune_neck",
    "forgetting",
    "herding",
    "herding_by_class",
    "knowledge_retention",
    "last",
    "performance_drop",
    "session_set",
    "weight_align",
]
