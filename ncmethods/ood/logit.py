"""Scores of the logits alone: MSP, MaxLogit, Energy, GEN, KLMatching."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer, Train, samples, train_logits

__all__ = ["GEN", "MSP", "Energy", "KLMatching", "MaxLogit"]


def check_positive(**values: float) -> None:
    """Raise unless each is a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be positive and finite, got {value}.")


class MSP(Scorer):
    """−max_c softmax(l/T)_c, the negative confidence; in [−1, −1/K].

    ``fit(train=None, head=None, *, temperature=1.0)``; nothing is estimated.

    References:
        Hendrycks and Gimpel, ICLR 2017, arXiv:1610.02136.
    """

    needs: ClassVar = frozenset({"logits"})
    temperature: float

    @classmethod
    def fit(
        cls, train: Train | None = None, head: nn.Module | None = None, *, temperature: float = 1.0
    ) -> MSP:
        """The scorer; ``train`` plays no part."""
        check_positive(temperature=temperature)
        return cls(head, temperature=temperature)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative largest probabilities [N]."""
        return -F.softmax(logits / self.temperature, dim=1).amax(1)


class MaxLogit(Scorer):
    """−max_c l_c.

    ``fit(train=None, head=None)``; nothing is estimated.

    References:
        Hendrycks et al., ICML 2022, arXiv:1911.11132.
    """

    needs: ClassVar = frozenset({"logits"})

    @classmethod
    def fit(cls, train: Train | None = None, head: nn.Module | None = None) -> MaxLogit:
        """The scorer; ``train`` plays no part."""
        return cls(head)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative largest logits [N]."""
        return -logits.amax(1)


class Energy(Scorer):
    """−T log Σ_c exp(l_c/T).

    ``fit(train=None, head=None, *, temperature=1.0)``; nothing is estimated.

    References:
        Liu et al., NeurIPS 2020, arXiv:2010.03759.
    """

    needs: ClassVar = frozenset({"logits"})
    temperature: float

    @classmethod
    def fit(
        cls, train: Train | None = None, head: nn.Module | None = None, *, temperature: float = 1.0
    ) -> Energy:
        """The scorer; ``train`` plays no part."""
        check_positive(temperature=temperature)
        return cls(head, temperature=temperature)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Free energies [N]."""
        return -self.temperature * (logits / self.temperature).logsumexp(1)


class GEN(Scorer):
    """Σ over the M largest probabilities of p^γ (1 − p)^γ: a generalised entropy, ≥ 0.

    ``fit(train=None, head=None, *, gamma=0.1, top=100)``; ``top`` is M, all classes where K is
    smaller. Nothing is estimated.

    References:
        Liu et al., CVPR 2023 (γ = 0.1 and M = 100 in the authors' code).
    """

    needs: ClassVar = frozenset({"logits"})
    gamma: float
    top: int

    @classmethod
    def fit(
        cls,
        train: Train | None = None,
        head: nn.Module | None = None,
        *,
        gamma: float = 0.1,
        top: int = 100,
    ) -> GEN:
        """The scorer; ``train`` plays no part."""
        check_positive(gamma=gamma, top=top)
        if top != int(top):
            raise InputError(f"top is a number of classes, got {top}.")
        return cls(head, gamma=gamma, top=top)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Entropies [N]."""
        log_p = F.log_softmax(logits, dim=1)
        top, place = log_p.topk(min(self.top, log_p.shape[1]), dim=1)
        # log(1 − p); of the largest from the others, since a sure p rounds to 1.
        rest = log_p.scatter(1, place[:, :1], -math.inf).logsumexp(1, keepdim=True)
        log_rest = torch.cat((rest, torch.log1p(-top[:, 1:].exp())), dim=1)
        return (self.gamma * (top + log_rest)).exp().sum(1)


class KLMatching(Scorer):
    """min_k KL(p ‖ d_k), d_k the mean probabilities of the samples that are predicted as k.

    ``fit(train, head=None)`` needs samples with logits, or ``head``: better held-out ones than
    those of the training, whose probabilities are too sharp. Classes that are never predicted play
    no part.

    References:
        Hendrycks et al., ICML 2022, arXiv:1911.11132.
    """

    needs: ClassVar = frozenset({"logits"})
    log_typical: Tensor  # [K', K], log d_k

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None) -> KLMatching:
        """The scorer fitted on ``train``."""
        data = samples(train, cls.__name__)
        p = F.softmax(train_logits(data, head, cls.__name__).double(), dim=1)
        bad = int((~p.isfinite().all(1)).sum())
        if bad:
            raise InputError(f"{bad} rows of logits hold NaN or +Inf. Leave them out.")
        K, guess = p.shape[1], p.argmax(1)
        n = torch.bincount(guess, minlength=K)
        d = p.new_zeros(K, K).index_add_(0, guess, p)[n > 0] / n[n > 0, None]
        return cls(head, log_typical=d.clamp(min=torch.finfo(torch.float32).tiny).log())

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Divergences [N], in nats."""
        p = F.softmax(logits, dim=1)
        cross = p @ self.log_typical.to(p.dtype).T  # [N, K']
        entropy: Tensor = torch.special.entr(p).sum(1)
        return -entropy - cross.amax(1)
