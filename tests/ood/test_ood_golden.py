"""Golden checks of interoperation that no other file holds: OpenOOD's metrics, a GPU's scores."""

import pytest
import torch
from torch import nn

from ncmethods import ood
from ncmethods.features import FeatureSet

F64 = {"dtype": torch.float64}
# compute_all_metrics(−score, label, …) of OpenOOD on the scores below, of which the second row has
# many ties: FPR95, AUROC, AUPR of inliers, of outliers. openood/evaluators/metrics.py, run once,
# github.com/Jingkang50/OpenOOD at 3c35632ee91b54b09d1f085d04f94744cece7d0b.
OPENOOD = {
    None: [0.5833333333333334, 0.7623809523809524, 0.8577916715612318, 0.728233327111406],
    2: [0.5833333333333334, 0.7623809523809524, 0.8642349012775843, 0.7241071428571428],
}


class Given(ood.Scorer):
    """The first feature is the score."""

    def score(self, features, logits):
        return features[:, 0]


@pytest.mark.parametrize("levels", OPENOOD)
def test_openoods_metrics_of_the_confidence_are_ours_of_the_score(levels):
    s, t = torch.sin(torch.arange(60, **F64)), 0.8 + torch.sin(1.7 * torch.arange(35, **F64))
    if levels is not None:
        s, t = ((x * levels).round() / levels for x in (s, t))
    scorer = Given()
    assert torch.equal(scorer.confidence(s[:, None]), -s)
    inside, outside = scorer(s[:, None]), scorer(t[:, None])
    ours = [
        ood.fpr95(inside, outside, positive="ood"),
        ood.auroc(inside, outside),
        ood.aupr(inside, outside, positive="id", method="trapezoid"),
        ood.aupr(inside, outside, method="trapezoid"),
    ]
    assert [float(x) for x in ours] == pytest.approx(OPENOOD[levels], abs=1e-12)


def positive(N=300, D=16, K=5):
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    means = 3 * torch.rand(K, D, generator=rng)
    x = means[y] + torch.rand(N, D, generator=rng)
    head = nn.Linear(D, K).requires_grad_(False)
    head.weight.copy_(means - means.mean(0))
    head.bias.fill_(1.0)
    return FeatureSet(x, y, K, head(x)), head, 3 * torch.rand(40, D, generator=rng)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(ood.SCORERS))
def test_fit_and_scores_on_a_gpu_are_those_of_the_cpu(name):
    train, head, q = positive()
    want = ood.SCORERS[name](train, head=head)(q, head(q))
    there = FeatureSet(train.features.cuda(), train.labels.cuda(), 5, train.logits.cuda())
    scorer = ood.SCORERS[name](there, head=head.cuda())
    got = scorer.cuda()(q.cuda(), head(q.cuda()))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
