"""Distillation: stay with what an earlier network said of the same images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError

__all__ = ["distill_features", "distill_logits", "distill_relations"]


def distill_logits(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Cross-entropy of softened logits with those of the teacher, mean over samples, [].

    −mean_i Σ_k softmax(t_i/T)_k log softmax(l_i/T)_k over the teacher's classes: the student's
    first columns. There is no factor T². Its least value is the teacher's entropy, not 0.

    Args:
        logits: student's [N, K].
        teacher_logits: [N, K'], K' ≤ K; they get no gradient.
        temperature: T > 0.

    Raises:
        InputError: more teacher classes than the student's, other N, or T ≤ 0.

    References:
        Li and Hoiem, ECCV 2016, arXiv:1606.09282 (learning without forgetting).
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}.")
    _same_rows(logits, teacher_logits, "logits")
    K = teacher_logits.shape[1]
    if logits.shape[1] < K:
        raise InputError(f"The teacher has {K} classes, the student {logits.shape[1]}.")
    if not len(logits):
        return logits.sum()
    target = (teacher_logits.detach() / temperature).softmax(1)
    return F.cross_entropy(logits[:, :K] / temperature, target)


def distill_features(
    features: Tensor, teacher_features: Tensor, rows: Tensor | None = None
) -> Tensor:
    """½ mean (cos(h, t) − 1)² between student and teacher features, [].

    Dot regression onto the teacher's unit features; 0 where no row counts.

    Args:
        features: student's [N, D].
        teacher_features: [N, D]; they get no gradient.
        rows: bool [N], which samples count; all if None. The authors take those of old classes.

    Raises:
        InputError: shapes that differ.

    References:
        Yang et al., arXiv:2308.01746 (neural collapse terminus).
    """
    _same_rows(features, teacher_features, "features")
    if features.shape != teacher_features.shape:
        raise InputError(
            f"features are {tuple(features.shape)} and the teacher's "
            f"{tuple(teacher_features.shape)}: their widths must agree."
        )
    cosine = F.cosine_similarity(features, teacher_features.detach(), dim=1)
    each = 0.5 * (cosine - 1).square()
    if rows is None:
        rows = torch.ones_like(each, dtype=torch.bool)
    return (each * rows).sum() / rows.sum().clamp(min=1)


def distill_relations(
    features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float = 0.2,
    teacher_temperature: float = 0.01,
) -> Tensor:
    """Cross-entropy of the batch's similarity distributions with those of the teacher, [].

    For each sample, the softmax over the others of its cosines with them, in the student against
    in the teacher. Features may differ in width.

    Args:
        features: student's [N, D].
        teacher_features: [N, D']; they get no gradient.
        temperature: of the student, > 0.
        teacher_temperature: of the teacher, > 0.

    Raises:
        InputError: other N, or a temperature ≤ 0.

    References:
        Cha et al., ICCV 2021, arXiv:2106.14413 (Co2L, instance-wise relation distillation).
    """
    if not min(temperature, teacher_temperature) > 0:
        raise InputError(
            f"temperatures must be positive, got {temperature} and {teacher_temperature}."
        )
    _same_rows(features, teacher_features, "features")
    N = len(features)
    if N < 2:
        return features.sum() * 0
    others = ~torch.eye(N, dtype=torch.bool, device=features.device)

    def similar(h: Tensor, T: float) -> Tensor:
        u = F.normalize(h, dim=1)
        return (u @ u.T / T)[others].reshape(N, N - 1)

    return F.cross_entropy(
        similar(features, temperature),
        similar(teacher_features.detach(), teacher_temperature).softmax(1),
    )


def _same_rows(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise InputError(
            f"{what} are [N, …] for student and teacher alike, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
