"""Every public measure has a card, every card is whole, and the survey's calls give its numbers."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.linalg import norm

from ncmethods import metrics
from ncmethods.features import FeatureSet
from ncmethods.metrics.directional import directional_cdnv
from ncmethods.stats import ClassStats

PAGES = Path(__file__).parents[2] / "docs" / "metrics"
PARTS = ["Normalisation", "Range and collapse value", "Cannot see", "Needs", "Reference"]
CARDS = [
    (page.stem, name, body)
    for page in sorted(PAGES.glob("*.md"))
    for name, body in re.findall(
        r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page.read_text("utf-8"), re.M | re.S
    )
]


def measures() -> set[str]:
    """The public functions of the room, and the one class that measures."""
    names = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    return names | {"Monitor"}


def ids(card: object) -> str:
    return card[1] if isinstance(card, tuple) else str(card)


@pytest.mark.parametrize("name", sorted(measures()))
def test_every_measure_has_one_card(name):
    assert [found for _, found, _ in CARDS].count(name) == 1


@pytest.mark.parametrize("card", CARDS, ids=ids)
def test_card_is_whole(card):
    _, name, body = card
    formula = body.split("\n- **")[0].strip()
    assert re.match(r"[^-\s]", formula), f"{name} has no formula"
    items = re.findall(r"^- \*\*(.+?)\.\*\* (.+?)(?=^- |^```|\n\n|\Z)", body, re.M | re.S)
    assert [part for part, _ in items] == PARTS
    assert all(len(text.split()) >= 2 for _, text in items)


@pytest.mark.parametrize("card", CARDS, ids=ids)
def test_card_names_a_measure(card):
    assert card[1] in measures()


@pytest.mark.parametrize("card", CARDS, ids=ids)
def test_card_is_listed(card):
    """The index names each measure in the row of its page."""
    page, name, _ = card
    index = (PAGES / "index.md").read_text("utf-8")
    row = next(line for line in index.splitlines() if f"({page}.md)" in line)
    part_of = {"classification": "accuracy_by_class confusion_matrix nll brier ece fit_temperature"}
    listed = set(re.findall(r"`(\w+)`", row))
    assert listed & {name, *(whole for whole, parts in part_of.items() if name in parts.split())}


def test_index_lists_every_page():
    index = (PAGES / "index.md").read_text("utf-8")
    tree = index.split("```{toctree}")[1]
    pages = {page.stem for page in PAGES.glob("*.md")} - {"index"}
    assert set(re.findall(r"^([\w-]+)$", tree, re.M)) == pages


def test_sources_are_pinned():
    """A link into a repository names a commit, so that its lines stay what they were."""
    text = (PAGES / "who-computes-what.md").read_text("utf-8")
    links = re.findall(r"https://github\.com/[\w.-]+/[\w.-]+/(?:blob|tree)/(\w+)", text)
    assert len(links) > 50
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in links)


# --- who computes what ------------------------------------------------------------------------

K, D, COUNTS = 4, 9, np.array([30, 12, 7, 4])
RNG = np.random.default_rng(1)
Y = np.repeat(np.arange(K), COUNTS)
X = 2 * RNG.normal(size=(K, D))[Y] + RNG.normal(size=(len(Y), D)) * (1 + Y[:, None])
CLASSES = np.split(X, COUNTS.cumsum()[:-1])
W, B = RNG.normal(size=(K, D)), RNG.normal(size=K)

MEANS = np.stack([x.mean(0) for x in CLASSES])
COV = np.stack([np.cov(x.T, bias=True) for x in CLASSES])
V = COV.trace(axis1=1, axis2=2)
BY_CLASS, BY_SAMPLE = MEANS.mean(0), X.mean(0)  # the two μ_G
PAIRS = [(i, j) for i in range(K) for j in range(K) if i != j]
GAPS = {(i, j): MEANS[j] - MEANS[i] for i, j in PAIRS}
ETF = (np.eye(K) - 1 / K) / np.sqrt(K - 1)


def moved(center):
    return MEANS - center


def sigma_w():
    return np.average(COV, 0, COUNTS)


def sigma_b(center, shares):
    return moved(center).T @ np.diag(shares) @ moved(center)


def gram(rows, target=ETF):
    return norm(rows @ rows.T / norm(rows @ rows.T) - target)


def self_dual(means):
    return norm(W / norm(W) - means / norm(means))


def product(rows, means):
    return norm(rows @ means.T / norm(rows @ means.T) - ETF)


def cosines(means):
    return (W * means).sum(1) / norm(W, axis=1) / norm(means, axis=1)


def along(i, j):
    return np.mean(((CLASSES[i] - MEANS[i]) @ GAPS[i, j] / norm(GAPS[i, j])) ** 2)


def k_minus_one(sigma):
    """Σ_B† from the K − 1 largest eigenvalues."""
    values, vectors = np.linalg.eigh(sigma)
    vectors = vectors[:, 1 - K :]
    return vectors / values[1 - K :] @ vectors.T


ALIKE, SHARES = np.full(K, 1 / K), COUNTS / COUNTS.sum()
UNIT = moved(BY_CLASS) / norm(moved(BY_CLASS), axis=1, keepdims=True)
LOGS = [-np.log(norm(UNIT[i] - UNIT[j])) for i, j in PAIRS]
NORMS = norm(moved(BY_CLASS), axis=1)
SINGULAR = np.linalg.svd(CLASSES[0], compute_uv=False)
FEATURES, ROWS = torch.tensor(X), torch.tensor(W)
STATS = ClassStats(K, D).update(FEATURES, torch.tensor(Y))
ALL = FeatureSet(FEATURES, torch.tensor(Y), K)
M, M_SAMPLE = STATS.centered_means(), STATS.centered_means("sample")
SECOND, FIRST_COV = torch.tensor(CLASSES[0].T @ CLASSES[0]), torch.tensor(COV[0])

SURVEY = {  # what a source computes, and the call that the survey gives for it
    "nc1: demo": (
        np.trace(sigma_w() @ k_minus_one(sigma_b(BY_CLASS, ALIKE))),
        metrics.nc1_pinv(STATS, weighting="papyan-demo"),
    ),
    "nc1: peer": (
        np.trace(sigma_w() @ k_minus_one(sigma_b(BY_CLASS, ALIKE))) / K,
        metrics.nc1_pinv(STATS, weighting="papyan"),
    ),
    "nc1: Zhu": (
        np.trace(sigma_w() @ k_minus_one(sigma_b(BY_SAMPLE, ALIKE))) / K,
        metrics.nc1_pinv(STATS, weighting="zhu"),
    ),
    "nc1: Rangamani": (
        np.trace((SHARES[:, None, None] * COV).mean(0) @ k_minus_one(sigma_b(BY_SAMPLE, ALIKE))),
        metrics.nc1_pinv(STATS, weighting="zhu"),
    ),
    "nc1: He-Su": (
        np.trace(sigma_w() @ k_minus_one(sigma_b(BY_SAMPLE, SHARES))),
        K * metrics.nc1_pinv(STATS, weighting="sample"),
    ),
    "traces: peer": (
        SHARES @ V / np.trace(sigma_b(BY_CLASS, ALIKE)),
        metrics.trace_ratio(STATS, weighting="papyan"),
    ),
    "traces: shallow": (
        SHARES @ V / np.trace(sigma_b(BY_SAMPLE, ALIKE)),
        metrics.trace_ratio(STATS, weighting="zhu"),
    ),
    "traces: class average": (
        V.mean() / np.trace(sigma_b(BY_CLASS, ALIKE)),
        metrics.trace_ratio(STATS, weighting="galanti"),
    ),
    "cdnv: Galanti": (
        np.mean([(V[i] + V[j]) / 2 / norm(GAPS[i, j]) ** 2 for i, j in PAIRS]),
        metrics.cdnv(STATS),
    ),
    "directional cdnv: Luthra": (
        np.mean([along(i, j) / norm(GAPS[i, j]) ** 2 for i, j in PAIRS]),
        directional_cdnv(ALL),
    ),
    "vci: Guiding": (
        1
        - np.trace(np.linalg.inv(sigma_w() + sigma_b(BY_SAMPLE, ALIKE)) @ sigma_b(BY_SAMPLE, ALIKE))
        / min(D, K - 1),
        metrics.vci(STATS, weighting="zhu"),
    ),
    "equinorm: demo": (
        NORMS.std(ddof=1) / NORMS.mean(),
        metrics.equinorm(M) * (K / (K - 1)) ** 0.5,
    ),
    "angles: demo": (
        np.mean([abs(UNIT[i] @ UNIT[j] + 1 / (K - 1)) for i, j in PAIRS]),
        metrics.equiangular(M),
    ),
    "gram: Zhu": (gram(W), metrics.gram_etf(ROWS)),
    "gram: Zhou": (gram(W - W.mean(0)), metrics.gram_etf(ROWS - ROWS.mean(0))),
    "gram: Tirer": (gram(moved(BY_CLASS)), metrics.gram_etf(M)),
    "gram: orthogonal": (
        gram(W, np.eye(K) / np.sqrt(K)),
        metrics.gram_distance(ROWS, torch.eye(K).double()),
    ),
    "log kernel: mean": (np.mean(LOGS), metrics.log_energy(M)[0]),
    "log kernel: variance": (np.var(LOGS), metrics.log_energy(M)[1]),
    "riesz kernel": (
        np.mean([norm(UNIT[i] - UNIT[j]) ** (2 - D) for i, j in PAIRS]),
        metrics.riesz_energy(M).exp(),
    ),
    "nc3: demo": (self_dual(moved(BY_CLASS)) ** 2, metrics.self_duality(ROWS, M) ** 2),
    "nc3: Kothapalli": (self_dual(MEANS), metrics.self_duality(ROWS, STATS.means)),
    "nc3: Zhu": (product(W, moved(BY_SAMPLE)), metrics.product_duality(ROWS, M_SAMPLE)),
    "nc3: Yaras": (product(W, MEANS), metrics.product_duality(ROWS, STATS.means)),
    "nc3: Zhou": (
        product(W - W.mean(0), moved(BY_SAMPLE)),
        metrics.product_duality(ROWS - ROWS.mean(0), M_SAMPLE),
    ),
    "nc3: Jiang, raw features": (
        np.mean(1 - cosines(moved(BY_SAMPLE))),
        metrics.duality_cosine(ROWS, M_SAMPLE),
    ),
    "nc3: Wu-Papyan, cosines": (
        cosines(moved(BY_CLASS)).var(ddof=1),
        metrics.duality_spread(ROWS, M) * K / (K - 1),
    ),
    "bias: Zhu": (
        norm(W @ BY_SAMPLE + B),
        metrics.bias_duality(ROWS, torch.tensor(B), STATS.global_mean("sample")),
    ),
    "rank: Guiding": ((SINGULAR.sum() / norm(SINGULAR)) ** 2, metrics.nuclear_rank(SECOND)),
    "rank: Zhou": (SINGULAR.sum() / norm(SINGULAR), metrics.nuclear_rank(SECOND) ** 0.5),
    "rank: deep NRC": (
        norm(np.linalg.eigvalsh(COV[0])) ** 2 / np.linalg.eigvalsh(COV[0])[-1] ** 2,
        metrics.stable_rank(FIRST_COV @ FIRST_COV),
    ),
    "rank: Rangamani": (
        ((CLASSES[0] - MEANS[0]) ** 2).sum() / np.linalg.eigvalsh(COV[0])[-1],
        COUNTS[0] * metrics.stable_rank(FIRST_COV),
    ),
}


@pytest.mark.parametrize("source", SURVEY)
def test_survey_gives_the_same_number(source):
    theirs, ours = SURVEY[source]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-9)


def test_survey_kernel_trace_is_no_trace():
    """Mean ‖h‖² by sample less mean ‖μ_c‖² by class is not Tr Σ_W on unequal counts."""
    mixed = (X**2).sum(1).mean() - (MEANS**2).sum(1).mean()
    assert abs(mixed / (SHARES @ V) - 1) > 0.5
