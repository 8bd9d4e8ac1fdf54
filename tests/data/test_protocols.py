"""Protocols: constants as the released code states them, and options that exist."""

from dataclasses import fields

import pytest

from ncmethods import cli, data, models
from ncmethods._config import filled
from ncmethods._core import InputError
from ncmethods.training import TrainConfig, lr_factor

LongTailed = cli.load_recipe("long_tailed").LongTailed
RECIPES = {
    "long-tailed": (LongTailed, cli.load_recipe("long_tailed").METHODS),
    "contrastive": (
        cli.load_recipe("contrastive").Contrastive,
        cli.load_recipe("contrastive").METHODS,
    ),
}


def started(name):
    """The recipe's options as ``--protocol`` sets them."""
    recipe = data.protocol(name).recipe
    return cli.starting_point(RECIPES[recipe][0], [recipe, "--protocol", name])


@pytest.mark.parametrize("name", data.PROTOCOLS)
def test_every_value_is_an_option_of_the_recipe(name):
    found = data.protocol(name)
    config = started(name)
    assert set(config.methods) <= set(RECIPES[found.recipe][1])
    if config.backbone not in models.BACKBONES:
        from torchvision.models import list_models

        assert config.backbone.removeprefix("torchvision:") in list_models()
    assert set(found.train) <= {f.name for f in fields(TrainConfig)}
    assert config.train.flip
    assert config.data.name == name.split("/")[0].replace("cifar10-lt", "cifar10").replace(
        "cifar100-lt", "cifar100"
    )
    if config.data.name.startswith("cifar"):
        assert config.data.order == tuple(range(int(config.data.name[5:])))
        assert config.data.seed == 0  # the images of the LDAM-DRW generator
        assert config.train.crop == (2 if name.endswith("logit-adjustment") else 4)
        assert config.data.shape == "exp"
    else:
        assert (config.data.size, config.data.shape) == (224, "natural")
        assert config.train.crop == (32 if found.recipe == "contrastive" else 0)
        assert "Random-resized crops" in found.differs


def test_a_protocol_of_another_recipe():
    with pytest.raises(InputError, match=r"imagenet-lt/bcl is for `ncmethods contrastive`, not lo"):
        cli.starting_point(LongTailed, ["long-tailed", "--protocol", "imagenet-lt/bcl"])


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "decay", "mixup"),
    [
        # classifier-balancing f162ade, config/ImageNet_LT/feat_uniform.yaml and
        # config/iNaturalist18/feat_unifrom.yaml
        ("imagenet-lt/decoupling", 90, 512, 0.2, 5e-4, 0),
        ("inaturalist18/decoupling", 90, 512, 0.2, 1e-4, 0),
        # MiSLAS 0fc381e, config/{imagenet,places,ina2018}/*_stage1_mixup.yaml
        ("imagenet-lt/mislas", 180, 256, 0.1, 5e-4, 0.2),
        ("places-lt/mislas", 90, 256, 0.1, 5e-4, 0.2),
        ("inaturalist18/mislas", 200, 256, 0.1, 1e-4, 0.2),
        # ImbalancedLearning 2ebb309, config/imagenet/Res50_imagenetLT_ETF_DR.yaml
        ("imagenet-lt/etf-dr", 90, 1024, 0.1, 5e-4, 0.2),
        # NCfeature a11c2c5, defaults of train.py
        ("imagenet-lt/nc-regularizer", 90, 256, 0.1, 5e-4, 0),
        # Balanced-Contrastive-Learning f72d070, defaults of main.py and commands of README.md
        ("imagenet-lt/bcl", 90, 256, 0.1, 5e-4, 0),
        ("inaturalist18/bcl", 100, 256, 0.2, 1e-4, 0),
    ],
)
def test_large_sets_as_published(name, epochs, batch, lr, decay, mixup):
    train = started(name).train
    assert (train.epochs, train.batch_size, train.lr) == (epochs, batch, lr)
    assert (train.weight_decay, train.mixup) == (decay, mixup)
    warm = 5 if name.endswith("nc-regularizer") else 0
    assert lr_factor(train, 0, 100) == pytest.approx(1 / (100 * warm + 1))
    half = (epochs + warm) * 50  # the middle of the cosine
    assert lr_factor(train, half, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "epochs", "rates", "decay", "mixup"),
    [
        # Rates at epochs 1 (of 5 of warm-up), 100, 161 and 181, counted from 1.
        ("cifar10-lt/ldam-drw", 200, [0.02, 0.1, 1e-3, 1e-5], 2e-4, 0),
        ("cifar100-lt/etf-dr", 200, [0.02, 0.1, 1e-2, 1e-3], 2e-4, 1),
        ("cifar10-lt/mislas", 200, [0.02, 0.1, 1e-2, 1e-3], 2e-4, 1),
        ("cifar100-lt/mislas", 200, [0.02, 0.1, 1e-2, 1e-3], 2e-4, 1),
    ],
)
def test_schedules_as_published(name, epochs, rates, decay, mixup):
    train = filled(LongTailed(), data.protocol(name).values(), name).train
    assert (train.epochs, train.batch_size, train.weight_decay) == (epochs, 128, decay)
    assert train.mixup == mixup
    per_epoch = 85  # of CIFAR-100-LT at R = 100
    found = [train.lr * lr_factor(train, e * per_epoch, per_epoch) for e in (0, 99, 160, 180)]
    assert found[1:] == pytest.approx(rates[1:])
    assert found[0] < rates[0]  # ours warms up step by step, theirs epoch by epoch


@pytest.mark.parametrize(
    ("name", "epochs", "warm", "drops"),
    [
        # google-research 1d4d2f1, logit_adjustment/utils.py: dataset_mappings
        ("cifar10-lt/logit-adjustment", 1241, 20, (604, 926, 1128)),
        ("cifar100-lt/logit-adjustment", 1419, 22, (691, 1059, 1290)),
    ],
)
def test_logit_adjustment_as_published(name, epochs, warm, drops):
    train = started(name).train
    assert (train.epochs, train.batch_size, train.weight_decay) == (epochs, 128, 2e-4)
    per_epoch = 97
    rates = [train.lr * lr_factor(train, e * per_epoch, per_epoch) for e in range(epochs)]
    assert rates[warm // 2] == pytest.approx(0.05, rel=1e-3)
    for last, drop in zip((0.1, 1e-2, 1e-3), drops):
        assert rates[drop - 1] == pytest.approx(last)
        assert rates[drop] == pytest.approx(last / 10)


def test_weight_balancing_ends_at_nothing():
    name = "cifar100-lt/weight-balancing"
    train = filled(LongTailed(), data.protocol(name).values(), name).train
    assert (train.epochs, train.batch_size, train.lr) == (320, 64, 0.01)
    assert train.weight_decay == 5e-3
    assert lr_factor(train, 0, 100) == 1
    assert lr_factor(train, 319 * 100, 100) < 1e-4


def test_an_unknown_protocol():
    with pytest.raises(InputError, match=r"Unknown protocol 'cifar10'. Did you mean"):
        data.protocol("cifar10")
