"""Protocols: constants as the released code states them, and options that exist."""

from dataclasses import fields

import pytest

from ncmethods import cli, data, models
from ncmethods._config import filled
from ncmethods._core import InputError
from ncmethods.training import TrainConfig, lr_factor

LongTailed = cli.load_recipe("long_tailed").LongTailed
METHODS = cli.load_recipe("long_tailed").METHODS


@pytest.mark.parametrize("name", data.PROTOCOLS)
def test_every_value_is_an_option_of_the_recipe(name):
    found = data.protocol(name)
    config = filled(LongTailed(), found.values(), name)
    assert set(config.methods) <= set(METHODS)
    assert config.backbone in models.BACKBONES or config.backbone.startswith("torchvision:")
    assert set(found.train) <= {f.name for f in fields(TrainConfig)}
    assert config.data.order == tuple(range(10 if "cifar10-" in name else 100))
    assert config.data.seed == 0  # the images of the LDAM-DRW generator
    assert (config.train.crop, config.train.flip) == (4, True)


@pytest.mark.parametrize(
    ("name", "epochs", "rates", "decay", "mixup"),
    [
        # Rates at epochs 1 (of 5 of warm-up), 100, 161 and 181, counted from 1.
        ("cifar10-lt/ldam-drw", 200, [0.02, 0.1, 1e-3, 1e-5], 2e-4, 0),
        ("cifar100-lt/etf-dr", 200, [0.02, 0.1, 1e-2, 1e-3], 2e-4, 1),
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
