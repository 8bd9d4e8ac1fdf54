"""FeatureNorm: the negative length."""

import torch

from ncmethods.ood.feature_norm import FeatureNorm


def test_is_the_negative_length():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]], dtype=torch.float64)
    assert FeatureNorm.fit()(x).tolist() == [-5, 0, -13]
    assert FeatureNorm.fit()(-2 * x).tolist() == [-10, 0, -26]


def test_an_overflow_is_not_the_surest_of_all():
    x = torch.tensor([[torch.inf, 0.0], [1.0, 0.0]])
    assert FeatureNorm.fit()(x).isnan().tolist() == [True, False]
