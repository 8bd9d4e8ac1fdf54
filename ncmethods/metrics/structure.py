"""Structure beside and below the classes: equal roles, label sets, fine classes inside coarse ones.

Each function needs samples and returns a plain ``dict[str, float]``. By layer: one call per layer.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from ncmethods._core import InputError, check_choice, check_counts, check_features, check_labels
from ncmethods.features import FeatureSet
from ncmethods.metrics.nc1 import trace_ratio
from ncmethods.stats import ClassStats

__all__ = ["clusterability", "coarse_to_fine", "group_collapse", "tag_mean_collapse"]

_ROWS = 2048  # of a tile of label sets


def _finite(features: Tensor) -> Tensor:
    """``features`` in float64, without a graph."""
    features = check_features(features).detach().double()
    if not bool(features.isfinite().all()):
        raise InputError("features hold NaN or Inf. Look for overflow in half precision.")
    return features


def group_collapse(
    vectors: Tensor, groups: Tensor, *, frequency: Tensor | None = None
) -> dict[str, float]:
    """Whether entities that play the same role share one vector: words, class embeddings, patches.

    Args:
        vectors: one per entity [E, D].
        groups: the role of each entity, int64 [E]; negative = left out.
        frequency: how often each entity occurs [E], > 0 for one at least.

    Returns:
        ``ratio``: Tr Σ_W/Tr Σ_B of the groups (:func:`trace_ratio`), 0 where a group shares one
        vector. ``direction_ratio``: the same of the vectors at unit norm, 0 where a group shares
        one direction, whatever the norms. ``residual``: σ_G/σ_1 of the centred vectors, what is
        left beyond the G − 1 directions that G points span; absent where D or E leaves no such
        direction. ``norm_frequency``, if ``frequency`` is given: Spearman's rank correlation of
        norm and frequency over the entities; NaN where one of them is constant.

    Raises:
        InputError: shapes that do not fit, NaN or Inf, or fewer than two groups with entities.

    References:
        Laurent, von Brecht, Bresson 2023, arXiv:2305.16162 (feature collapse; its code prints the
        first three σ for three groups).
    """
    X = _finite(vectors)
    y = check_labels(groups, len(X)).to(X.device)
    keep = y >= 0
    X, roles = X[keep], torch.unique(y[keep], return_inverse=True)
    G = len(roles[0])
    if G < 2:
        raise InputError(f"Group collapse compares groups: at least two need entities, got {G}.")

    def ratio(rows: Tensor) -> float:
        return float(trace_ratio(ClassStats(G, X.shape[1], scatter=False).update(rows, roles[1])))

    out = {"ratio": ratio(X), "direction_ratio": ratio(F.normalize(X, dim=1))}
    S = torch.linalg.svdvals(torch.linalg.qr(X - X.mean(0), mode="r")[1])
    if min(X.shape[1], len(X) - 1) >= G:
        out["residual"] = float(S[G - 1] / S[0])
    if frequency is not None:
        from scipy.stats import rankdata

        counts = check_counts(frequency, len(keep)).to(keep.device)[keep]
        ranks = [
            torch.from_numpy(rankdata(v.double().cpu().numpy()))
            for v in (torch.linalg.vector_norm(X, dim=1), counts)
        ]
        varied = all(bool((r != r[0]).any()) for r in ranks)
        rho = float(torch.corrcoef(torch.stack(ranks))[0, 1]) if varied else math.nan
        out["norm_frequency"] = rho
    return out


def tag_mean_collapse(
    features: Tensor, tags: Tensor, *, centred: bool = True, min_count: int = 1
) -> dict[str, float]:
    """Multi-label collapse: the mean of a label set is a scaled average of single-label means.

    For each label set S of two or more tags let m_S be the mean of its samples and a_S the average
    of the means of its tags, each taken over the samples with that tag alone. At collapse
    m_S = C·a_S with one C for all sets of the same size.

    Args:
        features: [N, D].
        tags: which labels each sample has, bool or 0/1 [N, K]; rows without a tag are left out.
        centred: measure m_S and a_S from the mean of the single-label means; False from the
            origin, as the authors' code does.
        min_count: samples that a label set needs to be looked at.

    Returns:
        ``cosine`` and ``cosine_min``: mean and least cos(m_S, a_S), 1 at collapse. ``angle``: mean
        angle in degrees. ``angle_ratio``: that over the mean angle from m_S to the averages of all
        compared sets of its size, own included: 0 at collapse, 1 without relation; absent where
        no size has two sets. ``scale``: mean C, the least-squares C of each set; ``scale/m`` for
        the sets of m tags; ``scale_spread``: root mean square of C/(mean C of its size) − 1, 0 at
        collapse. ``sets``: how many were compared; ``left_out``: sets of two or more tags that
        were not, because a tag never stands alone, for ``min_count``, or because a_S vanishes (all
        K tags, when centred).

    Raises:
        InputError: shapes that do not fit, tags that are not 0/1, NaN or Inf, or no set to compare.

    References:
        Li, Li, Wang, Qu 2024, arXiv:2310.15903 (tag-wise average property).
    """
    X = _finite(features)
    if tags.ndim != 2 or len(tags) != len(X) or not bool(((tags == 0) | (tags == 1)).all()):
        raise InputError(f"tags must be bool or 0/1 [N = {len(X)}, K], got {tuple(tags.shape)}.")
    T = tags.bool().to(X.device)
    tagged = T.any(1)
    sets, index = torch.unique(T[tagged], dim=0, return_inverse=True)  # [S, K]
    stats = ClassStats(max(len(sets), 2), X.shape[1], scatter=False).update(X[tagged], index)
    means, enough = stats.means[: len(sets)], stats.counts[: len(sets)] >= min_count
    size = sets.sum(1)
    alone = enough & (size == 1)
    single = X.new_zeros(T.shape[1], X.shape[1])
    single[sets[alone].int().argmax(1)] = means[alone]
    known = sets[alone].any(0)  # [K] tags that stand alone somewhere
    center = single[known].mean(0) if centred and len(single[known]) else X.new_zeros(X.shape[1])
    average = (sets.double() @ (single - center)) / size[:, None]
    norm = torch.linalg.vector_norm(average, dim=1)
    reach: Tensor = torch.linalg.vector_norm(single[known] - center)
    several = size >= 2
    compared = several & enough & ~(sets & ~known).any(1) & (norm > 1e-9 * reach)
    if not bool(compared.any()):
        raise InputError(
            f"No label set of two or more tags can be compared with its single tags: {len(sets)} "
            f"sets, {int(known.sum())} tags that stand alone (in ≥ {min_count} samples)."
        )
    m, M, A = size[compared], means[compared] - center, average[compared]
    u, v = F.normalize(M, dim=1), F.normalize(A, dim=1)
    cosine = (u * v).sum(1)
    # 2·atan2 keeps small angles exact where arccos loses half of the digits.
    gap, joint = torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1)
    angle = torch.rad2deg(2 * torch.atan2(gap, joint))
    others, peers = [], []
    for block, b in zip(torch.split(u, _ROWS), torch.split(m, _ROWS)):
        same = b[:, None] == m
        peers.append(same.sum(1))
        angles = torch.rad2deg((block @ v.T).clamp(-1, 1).acos())
        others.append((angles * same).sum(1) / peers[-1])
    base, crowd = torch.cat(others), torch.cat(peers) > 1
    scale = (M * A).sum(1) / A.square().sum(1)
    out = {
        "cosine": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "angle": float(angle.mean()),
        "scale": float(scale.mean()),
    }
    if bool(crowd.any()):
        out["angle_ratio"] = float(angle[crowd].mean() / base[crowd].mean())
    typical = torch.empty_like(scale)
    for tag_count in torch.unique(m).tolist():
        typical[m == tag_count] = scale[m == tag_count].mean()
        out[f"scale/{tag_count}"] = float(scale[m == tag_count].mean())
    return out | {
        "scale_spread": float((scale / typical - 1).square().mean().sqrt()),
        "sets": float(len(m)),
        "left_out": float(several.sum() - len(m)),
    }


def clusterability(
    features: Tensor,
    labels: Tensor,
    *,
    clusters: int | None = None,
    normalize: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """How well k-means finds the labels without seeing them: by layer, or for finer labels.

    Args:
        features: [N, D].
        labels: int64 [N], of the classes trained on or of finer ones; negative = left out.
        clusters: k; the number of different labels if None.
        normalize: scale features to unit norm first.
        seed: of k-means (ten starts).

    Returns:
        ``ari``, adjusted Rand index, 0 for chance, and ``nmi``, normalised mutual information
        (arithmetic mean), which grows with k also by chance; both 1 where clusters are labels.

    Raises:
        InputError: shapes that do not fit, NaN or Inf, fewer samples than clusters, k < 1.

    References:
        Nguyen, Kornblith 2023, arXiv:2311.07864 (clusters of hidden representations by layer; the
        scores here are scikit-learn's).
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    X = _finite(features)
    y = check_labels(labels, len(X)).to(X.device)
    X, y = X[y >= 0], y[y >= 0]
    k = len(torch.unique(y)) if clusters is None else clusters
    if not 1 <= k <= len(X):
        raise InputError(f"clusters must lie in 1 … N = {len(X)}, got {k}.")
    found = _k_means(F.normalize(X, dim=1) if normalize else X, k, seed)
    truth, guess = y.cpu().numpy(), found.cpu().numpy()
    return {
        "ari": float(adjusted_rand_score(truth, guess)),
        "nmi": float(normalized_mutual_info_score(truth, guess)),
    }


def _k_means(X: Tensor, k: int, seed: int) -> Tensor:
    """Cluster of each row, int64 [N]."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(k, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        # Fewer different points than clusters is what full collapse looks like, not an error.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = model.fit_predict(X.cpu().numpy())  # centres them itself
    return torch.from_numpy(found).long().to(X.device)


def coarse_to_fine(
    train: FeatureSet,
    test: FeatureSet,
    coarse: Tensor,
    *,
    fine: Tensor | None = None,
    embed: str = "none",
    seed: int = 0,
) -> dict[str, float]:
    """Cluster-and-linear-probe: the fine classes in the features of a coarsely trained network.

    The training features of each coarse class are clustered, without labels, into as many clusters
    as it has fine classes. A linear probe learns the clusters. On test samples the clusters of a
    coarse class are matched to its fine classes, the best way (Hungarian), and the hits counted.

    The probe is linear discriminant analysis about the clusters with a ridge of 10⁻³ of the mean
    variance: scale-free, so structure far below the distances of the coarse classes counts.

    Args:
        train: features with coarse labels; num_classes is the number of coarse classes.
        test: features with fine labels; num_classes is that of fine classes.
        coarse: the coarse class of each fine class, int64 [num_classes of test].
        fine: fine labels of ``train`` [N], used only for ``upper``.
        embed: what is clustered: the features (``"none"``) or a two-dimensional t-SNE of them
            (``"tsne"``: finds clusters of odd shapes, slow beyond some ten thousand samples).
        seed: of k-means and t-SNE.

    Returns:
        ``accuracy`` of the fine classes on the test set; ``chance``, that of guessing inside the
        right coarse class; ``coarse``, the share of test samples whose cluster lies in their coarse
        class; ``upper``, if ``fine`` is given, the accuracy of the same probe with fine labels.
        The matching sees test labels, so accuracy lies a little above chance for small test sets.

    Raises:
        InputError: labels missing or out of range, another D, a coarse class with fewer training
            samples than fine classes, or no test samples.

    References:
        Yang, Steinhardt, Hu 2023, arXiv:2306.17105 (cluster fine classes of coarsely trained
        networks; probe and clustering here are ours).
    """
    from scipy.optimize import linear_sum_assignment

    check_choice(embed, ("none", "tsne"), "embed")
    parent = check_labels(coarse, test.num_classes, train.num_classes).cpu()
    if train.labels is None or test.labels is None or bool((parent < 0).any()):
        raise InputError(
            "train needs coarse labels, test fine labels, and each fine class a parent."
        )
    X, y = _labelled(train)
    Z, truth = _labelled(test)
    if Z.shape[1] != X.shape[1] or not len(Z):
        raise InputError(f"test must hold samples of D = {X.shape[1]}, got {tuple(Z.shape)}.")
    children = [(parent == c).nonzero()[:, 0] for c in range(train.num_classes)]
    pseudo = torch.empty_like(y)
    for c, members in enumerate(children):  # clusters are numbered as the fine classes of c
        inside = (y == c).nonzero()[:, 0]
        if len(inside) and not 1 <= len(members) <= len(inside):
            raise InputError(
                f"Coarse class {c} has {len(inside)} training samples and {len(members)} fine "
                "classes: it needs at least one fine class, and a sample for each."
            )
        if len(inside):
            rows = X[inside] if embed == "none" else _tsne(X[inside], seed)
            pseudo[inside] = members.to(y.device)[_k_means(rows, len(members), seed)]
    found, truth = _probe(X, pseudo, Z, test.num_classes).cpu(), truth.cpu()
    hits = 0
    for members in children:
        table = [[int(((found == k) & (truth == f)).sum()) for f in members] for k in members]
        if table:
            rows_, columns = linear_sum_assignment(table, maximize=True)
            hits += sum(table[r][f] for r, f in zip(rows_, columns))
    siblings = torch.tensor([len(children[c]) for c in parent.tolist()])
    out = {
        "accuracy": hits / len(truth),
        "chance": float(siblings[truth].double().reciprocal().mean()),
        "coarse": float((parent[found] == parent[truth]).double().mean()),
    }
    if fine is not None:
        fine = check_labels(fine, len(train), test.num_classes).to(X.device)[train.labels >= 0]
        best = _probe(X, fine, Z, test.num_classes).cpu()
        out["upper"] = float((best == truth).double().mean())
    return out


def _labelled(data: FeatureSet) -> tuple[Tensor, Tensor]:
    """Features in float64 and labels, without the ignored."""
    assert data.labels is not None
    X = _finite(data.features)
    y = check_labels(data.labels, len(X), data.num_classes).to(X.device)
    return X[y >= 0], y[y >= 0]


def _tsne(X: Tensor, seed: int) -> Tensor:
    """Two t-SNE coordinates of each row, centred and scaled first: t-SNE works in float32."""
    from sklearn.manifold import TSNE

    X = X - X.mean(0)
    size = X.square().mean().sqrt()
    X = X / torch.where(size > 0, size, 1)
    perplexity = min(30.0, (len(X) - 1) / 3)
    if perplexity < 1:
        return X
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return torch.from_numpy(model.fit_transform(X.cpu().numpy())).double()


def _probe(X: Tensor, labels: Tensor, Z: Tensor, num_classes: int) -> Tensor:
    """Class of each row of Z by linear discriminant analysis on X, equal priors, int64 [M]."""
    stats = ClassStats(num_classes, X.shape[1]).update(X, labels)
    active = stats.active
    sigma, center = stats.sigma_w, stats.global_mean()
    ridge = 1e-3 * sigma.diagonal().mean()
    if float(ridge) == 0:  # no variance left: any scale gives the nearest mean
        ridge = torch.ones_like(ridge)
    sigma.diagonal().add_(ridge)
    M = stats.means[active] - center
    W = torch.linalg.solve(sigma, M.T)  # [D, K']
    scores = (Z - center) @ W - 0.5 * (M * W.T).sum(1)
    return active.nonzero()[:, 0][scores.argmax(1)]
