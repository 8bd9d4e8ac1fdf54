"""KNN and NNGuide: how near the closest training features are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer, Train, samples, train_logits

__all__ = ["KNN", "NNGuide"]

_CELLS = 1 << 25  # products of queries and bank held at a time


class KNN(Scorer):
    """‖ĥ − ĥ_(k)‖, the distance to the k-th nearest training feature, all of unit length.

    The k-th neighbour is searched with products, in the precision of the features, and its distance
    taken from the difference. Scores lie in [0, 2]; the zero vector has no direction and scores 1.
    Every training feature is kept; queries go through in chunks of bounded memory.

    Fitted from samples, with or without labels. ``fit(train, head=None, *, k=50,
    normalize=True)``:

    - ``k``: 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet in the paper;
    - ``normalize``: without it raw distances.

    Raises:
        InputError: moments only, or k not between 1 and the number of training samples.

    References:
        Sun et al., ICML 2022, arXiv:2204.06507.
    """

    center: Tensor  # [D], mean of the bank
    bank: Tensor  # [N, D], training features less the center
    squares: Tensor  # [N], ½‖bank‖²
    k: int
    normalize: bool

    @classmethod
    def fit(
        cls, train: Train, head: nn.Module | None = None, *, k: int = 50, normalize: bool = True
    ) -> KNN:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        data = samples(train, cls.__name__)
        check_k(k, len(data), cls.__name__)
        x = data.features.detach()
        x = F.normalize(x, dim=1) if normalize else x
        center = x.mean(0)
        bank = x - center
        squares = torch.linalg.vector_norm(bank, dim=1).square() / 2
        return cls(None, center=center, bank=bank, squares=squares, k=k, normalize=normalize)

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Distances [N] to the k-th neighbour."""
        x = F.normalize(features, dim=1) if self.normalize else features
        x = x - self.center.to(x.dtype)
        bank, squares = self.bank.to(x.dtype), self.squares.to(x.dtype)
        with torch.no_grad():  # x·b − ½‖b‖² falls as the distance grows
            found = [F.linear(q, bank, -squares).topk(self.k)[1][:, -1] for q in chunks(x, bank)]
        length: Tensor = torch.linalg.vector_norm(x - bank[torch.cat(found)], dim=1)
        return length


class NNGuide(Scorer):
    """−E(h) · mean of the k largest ⟨ĥ, E(h_j) ĥ_j⟩, E = log Σ_c exp(l_c), ĥ of unit length.

    The negative energy of the input, guided by its likeness to training features of high energy.
    The zero vector scores 0.

    Fitted from samples with logits, or ``head``. ``fit(train, head=None, *, k=10)``.

    Raises:
        InputError: moments only, no logits, or k not between 1 and the number of training samples.

    References:
        Park et al., ICCV 2023, arXiv:2309.14888 (k = 10 in the authors' configuration).
    """

    needs: ClassVar = frozenset({"features", "logits"})
    bank: Tensor  # [N, D], E(h_j) ĥ_j
    k: int

    @classmethod
    def fit(cls, train: Train, head: nn.Module | None = None, *, k: int = 10) -> NNGuide:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        data = samples(train, cls.__name__)
        check_k(k, len(data), cls.__name__)
        energy = train_logits(data, head, cls.__name__).detach().logsumexp(1, keepdim=True)
        x = F.normalize(data.features.detach(), dim=1)
        return cls(head, bank=x * energy.to(x.dtype), k=k)

    def sizes(self) -> tuple[int | None, int | None]:
        """D of the bank, and K of the head if there is one."""
        return self.bank.shape[1], super().sizes()[1]

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Negative guided energies [N]."""
        x = F.normalize(features, dim=1)
        bank = self.bank.to(x.dtype)
        likeness = [(q @ bank.T).topk(self.k)[0].mean(1) for q in chunks(x, bank)]
        return -logits.logsumexp(1) * torch.cat(likeness)


def chunks(queries: Tensor, bank: Tensor) -> Iterator[Tensor]:
    """The queries in parts whose products with the bank fit into bounded memory."""
    return iter(torch.split(queries, max(1, _CELLS // len(bank))))


def check_k(k: int, rows: int, name: str) -> None:
    """Raise unless there are k neighbours."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rows:
        raise InputError(
            f"{name} needs k between 1 and the {rows} training samples, got {k}: pass a smaller k."
        )
