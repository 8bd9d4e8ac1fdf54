"""Every scorer that the room exports passes the public check, and the check can fail."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from ncmethods import heads, ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.ood import GEN, MSP, NECO, Energy, KLMatching, Mahalanobis, MaxLogit, Scorer
from ncmethods.ood.cosine import ETFAngle, PrototypeCosine
from ncmethods.ood.fdbd import fDBD
from ncmethods.ood.feature_norm import FeatureNorm
from ncmethods.ood.mahalanobis import RelativeMahalanobis
from ncmethods.ood.nci import NCI
from ncmethods.ood.neighbours import KNN, NNGuide
from ncmethods.ood.separation import Separation
from ncmethods.ood.shaping import ASH, DICE, SCALE, VRA, ReAct
from ncmethods.ood.she import SHE
from ncmethods.ood.vim import Residual, ViM
from ncmethods.ood.wdiscood import WDiscOOD
from ncmethods.stats import ClassStats
from ncmethods.testing import ConformanceError, check_scorer

SCORERS = {
    "MSP": MSP.fit,
    "MSP-T": partial(MSP.fit, temperature=3.0),
    "MaxLogit": MaxLogit.fit,
    "Energy": Energy.fit,
    "Energy-T": partial(Energy.fit, temperature=3.0),
    "GEN": GEN.fit,
    "GEN-top": partial(GEN.fit, top=2),
    "KLMatching": KLMatching.fit,
    "Mahalanobis": Mahalanobis.fit,
    "Mahalanobis-unit": partial(Mahalanobis.fit, normalize=True),
    "Mahalanobis-shrunk": partial(Mahalanobis.fit, shrinkage=0.3),
    "RelativeMahalanobis": RelativeMahalanobis.fit,
    "RelativeMahalanobis-unit": partial(RelativeMahalanobis.fit, normalize=True),
    "NECO": NECO.fit,
    "NECO-raw": partial(NECO.fit, scale=False, rank=3),
    "NECO-logit": partial(NECO.fit, times_max_logit=True),
    "Residual": Residual.fit,
    "ViM": ViM.fit,
    "NCI": NCI.fit,
    "NCI-norm": partial(NCI.fit, alpha=0.1),
    "fDBD": fDBD.fit,
    "SHE": SHE.fit,
    "KNN": KNN.fit,
    "KNN-raw": partial(KNN.fit, k=3, normalize=False),
    "NNGuide": NNGuide.fit,
    "FeatureNorm": FeatureNorm.fit,
    "PrototypeCosine": PrototypeCosine.fit,
    "PrototypeCosine-origin": partial(PrototypeCosine.fit, centre=False),
    "ETFAngle": ETFAngle.fit,
    "Separation": Separation.fit,
    "ETFAngle-T": partial(ETFAngle.fit, temperature=0.1),
    "WDiscOOD": WDiscOOD.fit,
    "WDiscOOD-unit": partial(WDiscOOD.fit, normalize=True, residual_weight=1.0, rank=2),
    "ReAct": ReAct.fit,
    "ReAct-given": partial(ReAct.fit, clip=1.5),
    "VRA": VRA.fit,
    "VRA-clip": partial(VRA.fit, low=0.1, high=0.9, each=False, below="clip"),
    "ASH-b": partial(ASH.fit, variant="b", prune=0.65),
    "ASH-p": partial(ASH.fit, variant="p", prune=0.65),
    "ASH-s": partial(ASH.fit, variant="s", prune=0.65),
    "SCALE": SCALE.fit,
    "DICE": DICE.fit,
    "DICE-half": partial(DICE.fit, sparsity=0.5),
}
# What counts samples: the k-th neighbour, a quantile between two samples.
COUNTING = {"KNN", "NNGuide", "ReAct", "VRA"}
NEEDS_SAMPLES = {"KLMatching", "ViM", "SHE", "KNN", "NNGuide", "ReAct", "VRA"}
CLASSES = {name.split("-")[0] for name in SCORERS}


def linear():
    return None  # check_scorer's own, with a bias


def etf():
    return heads.etf_head(12, 5, generator=torch.Generator().manual_seed(0))


def exported():
    found = {n for n in ood.__all__ if inspect.isclass(getattr(ood, n))}
    return {n for n in found if issubclass(getattr(ood, n), Scorer)} - {"Scorer"}


def test_no_scorer_is_missing():
    assert exported() <= CLASSES


@pytest.mark.parametrize(("name", "head"), [(n, h) for n in SCORERS for h in (linear, etf)])
def test_scorer_conforms(name, head):
    multiset, compiler = name.split("-")[0] not in COUNTING, "eager" if head is linear else None
    check_scorer(SCORERS[name], head(), multiset=multiset, compiler=compiler)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
def test_scorer_compiles_to_machine_code(name):
    multiset = name.split("-")[0] not in COUNTING
    check_scorer(SCORERS[name], multiset=multiset, compiler="inductor")


# --- moments --------------------------------------------------------------------------------------


def positive(N=120, D=9, K=4):
    rng = torch.Generator().manual_seed(3)
    y = torch.arange(N) % K
    x = 3 * torch.rand(K, D, generator=rng)[y] + torch.rand(N, D, generator=rng)
    head = nn.Linear(D, K)
    head.weight.data.copy_(torch.randn(K, D, generator=rng))
    return FeatureSet(x, y, K, head(x).detach()), head


@pytest.mark.parametrize("name", [n for n in SCORERS if n.split("-")[0] not in NEEDS_SAMPLES])
def test_fit_from_moments_is_the_fit_from_samples(name):
    """Merged of three parts of unequal size, with a class that has no samples; or frozen."""
    train, head = positive()
    if name.endswith("-unit"):
        x = nn.functional.normalize(train.features, dim=1)
        parts = [ClassStats(5, 9, normalized=True).update(x, train.labels)]
    else:
        cuts = (slice(0, 10), slice(10, 77), slice(77, None))
        parts = [ClassStats(5, 9).update(train.features[c], train.labels[c]) for c in cuts]
    q = 2 * torch.rand(20, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    want = SCORERS[name](train, head=head)(q)
    whole = sum(parts)
    for given in (whole, whole.freeze()):
        got = SCORERS[name](given, head=head)(q)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(NEEDS_SAMPLES))
def test_what_moments_cannot_give_says_so(name):
    train, head = positive()
    for given in (train.stats, train.stats.freeze()):
        with pytest.raises(InputError, match=f"{name} needs the samples"):
            SCORERS[name](given, head=head)


# --- the check can fail ---------------------------------------------------------------------------


class Distance(Scorer):
    """A sound scorer, of which the classes below break one promise each."""

    center: torch.Tensor

    @classmethod
    def fit(cls, train, head=None):
        stats = train.frozen if isinstance(train, FeatureSet) else train.freeze()
        return cls(head, center=stats.mean)

    def score(self, features, logits):
        return torch.linalg.vector_norm((features - self.center).to(features.dtype), dim=1)


class InBatch(Distance):
    def score(self, features, logits):
        return super().score(features - features.mean(0, keepdim=True), logits)


class Column(Distance):
    def score(self, features, logits):
        return super().score(features, logits)[:, None]


class Root(Distance):
    def score(self, features, logits):
        return features.square().sum(1).sqrt()


class Reciprocal(Distance):
    def score(self, features, logits):
        return 1 / features.norm(dim=1)


class Half(Distance):
    def score(self, features, logits):
        return super().score(features, logits).half()


class InPlace(Distance):
    def score(self, features, logits):
        return torch.linalg.vector_norm(features.detach().clamp_(max=1.0), dim=1) + 0 * (
            features.sum(1)
        )


class Detached(Distance):
    def score(self, features, logits):
        return super().score(features.detach(), logits)


class Hyper(Distance):
    @classmethod
    def fit(cls, train, head=None):
        made = super().fit(train, head)
        return cls(head, center=made.center, size=float(made.center.norm()))

    def score(self, features, logits):
        return super().score(features, logits) / self.size


class Numbered(Distance):
    needs = frozenset({"features", "logits"})

    def score(self, features, logits):
        return super().score(features, logits) + logits[:, 0]


class FirstSample(Distance):
    @classmethod
    def fit(cls, train, head=None):
        if not isinstance(train, FeatureSet):
            raise InputError("samples")
        return cls(head, center=train.features[0].double())


class Ignoring(Distance):
    @classmethod
    def fit(cls, train, head=None):
        if not isinstance(train, FeatureSet):
            raise InputError("samples")
        return cls(head, center=train.features.double().mean(0))


class Summed(Distance):
    @classmethod
    def fit(cls, train, head=None):
        if not isinstance(train, FeatureSet):
            raise InputError("samples")
        return cls(head, center=train.features[train.labels >= 0].double().sum(0))


class Rounded(Distance):
    @classmethod
    def fit(cls, train, head=None):
        made = super().fit(train, head)
        return made if isinstance(train, FeatureSet) else cls(head, center=made.center.round())


class Branching(Distance):
    def score(self, features, logits):
        if bool((features > 5).any()):
            features = features + 0
        return super().score(features, logits)


class Private(Distance):
    @classmethod
    def fit(cls, train, head=None):
        made = super().fit(train, head)
        made.power = 2.0
        return made

    def score(self, features, logits):
        return super().score(features, logits) ** getattr(self, "power", 1.0)


class Flag(Distance):
    def score(self, features, logits):
        return super().score(features, logits) * (2.0 if self.training else 1.0)


class Borrowed(Distance):
    def __init__(self, head=None, **fitted):
        super().__init__(head, **fitted)
        self.lent = head.weight

    def score(self, features, logits):
        return super().score(features, logits) + self.lent.detach().to(features.dtype).norm()


class Wide(Distance):
    def forward(self, features, logits=None):
        if features is not None and features.ndim == 2:
            features = nn.functional.pad(features, (0, 12 - features.shape[1]))
        return super().forward(features, logits)


class Unmasked(Distance):
    """A clip hides infinity."""

    def forward(self, features, logits=None):
        x = features if features.dtype == torch.float64 else features.float()
        return self.score(x.clamp(-9, 9), torch.empty(0))


BROKEN = {
    InBatch: "rows do not see each other|chunks",
    Column: "scores are .N.",
    Root: "gradient of a zero vector is finite",
    Reciprocal: "finite",
    Half: "floats",
    InPlace: "leaves the features as they are",
    Detached: "gradient reaches",
    Hyper: "state_dict",
    Numbered: "numbering",
    FirstSample: "order",
    Ignoring: "negative label",
    Summed: "copy of all",
    Rounded: "moments",
    Branching: "compile",
    Private: "load",
    Flag: "eval",
    Borrowed: "holds its own|load",
    Wide: "another D",
    Unmasked: "inf scores NaN",
}


def test_a_sound_scorer_passes():
    check_scorer(Distance.fit)


@pytest.mark.parametrize("cls", BROKEN, ids=lambda c: c.__name__)
def test_check_scorer_fails(cls):
    with pytest.raises(ConformanceError, match=BROKEN[cls]):
        check_scorer(cls.fit)


def test_what_counts_samples_may():
    with pytest.raises(ConformanceError, match="copy of all"):
        check_scorer(partial(KNN.fit, k=3))
