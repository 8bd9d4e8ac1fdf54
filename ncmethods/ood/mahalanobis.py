"""Mahalanobis distance to the nearest class, plain and relative to the whole training set."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.ood._scorer import Scorer, Train, from_nearest, moments, samples, unit_features
from ncmethods.stats import FrozenStats

__all__ = ["Mahalanobis", "RelativeMahalanobis"]


class Mahalanobis(Scorer):
    """min_c (h − μ_c)ᵀ Σ_W⁻¹ (h − μ_c), a squared distance.

    Σ_W is the pooled within-class covariance over N. Directions in which training features do not
    vary (dead units, collapsed classes, N < D) count as if they had 1e-8 of the largest variance:
    scores stay finite, and whatever moves there scores high. With few samples use ``shrinkage``.

    Fitted from moments. ``fit(train, head=None, *, normalize=False, shrinkage=0.0)``:

    - ``normalize``: scale features to unit length first ("Mahalanobis++");
    - ``shrinkage``: s in [0, 1] of (1 − s) Σ_W + s tr(Σ_W)/D · I.

    References:
        Lee et al., NeurIPS 2018, arXiv:1807.03888 (one layer, no input perturbation).
        ``normalize``: Müller and Hein, ICML 2025, arXiv:2505.18032.
    """

    normalize: bool
    center: Tensor  # [D], near the mean
    factor: Tensor  # F [D, D], F Fᵀ = Σ_W⁻¹
    whitened: Tensor  # class means (μ_c − center) F, [K', r]: 0 in the other D − r coordinates
    total: ClassVar[bool] = False
    """Whether the distance to the mean of all samples is subtracted."""

    @classmethod
    def fit(
        cls,
        train: Train,
        head: nn.Module | None = None,
        *,
        normalize: bool = False,
        shrinkage: float = 0.0,
    ) -> Mahalanobis:
        """The scorer fitted on ``train``; see the class for its hyperparameters."""
        if not 0 <= shrinkage <= 1:
            raise InputError(f"shrinkage must lie in [0, 1], got {shrinkage}.")
        stats = moments(train, unit=normalize)
        centred = (stats.means - stats.center)[stats.active]
        if cls.total:
            factor, G = stats.relative_whiteners(shrinkage)
            more = {"factor_total": G, "offset": (stats.center - stats.mean) @ G}
        else:
            factor, more = stats.whitener("within", shrinkage), {}
        if len(centred) < factor.shape[1]:  # turn the class means into the first K' coordinates
            factor = factor @ torch.linalg.qr((centred @ factor).T, mode="complete")[0]
        return cls(
            head,
            center=stats.center,
            factor=factor,
            whitened=(centred @ factor)[:, : len(centred)],
            normalize=normalize,
            shrinkage=shrinkage,
            **more,
        )

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Squared distances [N] to the nearest class mean."""
        return self._nearest(self._centred(features))

    def _centred(self, features: Tensor) -> Tensor:
        x = F.normalize(features, dim=1) if self.normalize else features
        return x - self.center.to(x.dtype)

    def _nearest(self, x: Tensor) -> Tensor:
        z, means = x @ self.factor.to(x.dtype), self.whitened.to(x.dtype)
        inside, outside = z[:, : means.shape[1]], z[:, means.shape[1] :]
        near: Tensor = torch.linalg.vector_norm(from_nearest(inside, means), dim=1)
        far: Tensor = torch.linalg.vector_norm(outside, dim=1)
        return near.square() + far.square()

    @classmethod
    def leave_one_out(cls, train: Train, *, normalize: bool = False) -> Tensor:
        """Score of every training sample under the fit without it, in closed form, float64 [N].

        What a held-out set would give to calibrate a threshold, without holding out: with
        r = x − μ_c, S the within-class scatter, A = S⁻¹, q = rᵀAr and a = n_c/(n_c − 1), the sample
        is at a²q/(1 − aq) from its own class and at uᵀAu + a (uᵀAr)²/(1 − aq), u = x − μ_k, from
        class k, both times N − 1.

        It holds where the features do not depend on these samples: a frozen backbone that was
        trained on others. A network sees its own training images too favourably, and this does not
        undo it. The thresholds that come of it are approximate: leave-one-out scores are not
        exchangeable to the letter.

        Args:
            train: a FeatureSet, all of it labelled.
            normalize: as in :meth:`fit`.

        Raises:
            InputError: moments only, a class with one sample, or too few samples for S⁻¹.
        """
        data = samples(train, f"{cls.__name__}.leave_one_out")
        data = unit_features(data) if normalize else data
        stats = data.frozen
        N, D = stats.N, stats.dim
        assert data.labels is not None  # or there were no moments
        single = ((stats.counts == 1).nonzero()[:, 0]).tolist()
        if single or N - int(stats.active.sum()) <= D:
            raise InputError(
                f"leave_one_out needs at least 2 samples in each class (single: {single[:10]}) and "
                f"more than D + K samples in all, got N = {N} with D = {D}. Calibrate on held-out "
                "samples instead."
            )
        center, active = stats.mean, stats.active.nonzero()[:, 0]
        slot = torch.zeros(stats.num_classes, dtype=torch.int64).index_put_(
            (active,), torch.arange(len(active))
        )
        A_half = stats.whitener("within") / N**0.5
        means = (stats.means[active] - center) @ A_half
        scores = []
        for x, y in zip(torch.split(data.features, 4096), torch.split(data.labels, 4096)):
            own, n = slot[y], stats.counts[y].double()
            z = (x.double() - center) @ A_half
            r = z - means[own]
            q, a = r.square().sum(1), n / (n - 1)
            left = (1 - a * q)[:, None]
            distances = torch.cdist(z, means, compute_mode="donot_use_mm_for_euclid_dist").square()
            # uᵀAr with u = z − m_k: a product with every class mean.
            along = (z * r).sum(1, keepdim=True) - r @ means.T
            distances += a[:, None] * along.square() / left
            distances[torch.arange(len(y)), own] = a.square() * q / left[:, 0]
            scores.append((N - 1) * distances.amin(1) - cls._total_left_out(stats, x))
        return torch.cat(scores)

    @classmethod
    def _total_left_out(cls, stats: FrozenStats, x: Tensor) -> Tensor:
        """What is subtracted from the distances of ``x`` [n, D], each under the fit without it."""
        return x.new_zeros(len(x), dtype=torch.float64)


class RelativeMahalanobis(Mahalanobis):
    """Mahalanobis distance to the nearest class minus that to the mean of all samples.

    min_c (h − μ_c)ᵀ Σ_W⁻¹ (h − μ_c) − (h − μ)ᵀ Σ_T⁻¹ (h − μ): directions in which all features
    vary alike say nothing about classes and cancel. It can be negative. What is left are the
    discriminants, K − 1 directions at most, and only those are computed, unless a covariance is
    close to singular or shrunk.

    Fitted from moments; hyperparameters and ``leave_one_out`` as in :class:`Mahalanobis`.

    References:
        Ren et al., arXiv:2106.09022.
    """

    factor: Tensor  # F [D, r]
    factor_total: Tensor  # G [D, r], ‖zF‖² − ‖zG‖² = zᵀΣ_W⁻¹z − zᵀΣ_T⁻¹z
    offset: Tensor  # (center − μ) G, [r]
    total = True

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """Differences [N] of squared distances."""
        x = self._centred(features)
        far = torch.addmm(self.offset.to(x.dtype), x, self.factor_total.to(x.dtype))
        length: Tensor = torch.linalg.vector_norm(far, dim=1)
        return self._nearest(x) - length.square()

    @classmethod
    def _total_left_out(cls, stats: FrozenStats, x: Tensor) -> Tensor:
        N = stats.N
        a = N / (N - 1)
        r = (x.double() - stats.mean) @ stats.whitener("total") / N**0.5
        q: Tensor = r.square().sum(1)
        return (N - 1) * a**2 * q / (1 - a * q)
