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
    by_cosine,
    herding,
    herding_by_class,
)

__all__ = [
    "BaseNovel",
    "ExemplarMemory",
    "FeatureMemory",
    "IncrementalEvaluator",
    "average_incremental",
    "backward_transfer",
    "base_novel_harmonic",
    "by_cosine",
    "forgetting",
    "herding",
    "herding_by_class",
    "knowledge_retention",
    "last",
    "performance_drop",
]
