"""Hyperparameters, the learning rate, and models from their descriptions."""

import itertools
import math
import random

import pytest
import torch
from job import K

from ncmethods import heads
from ncmethods._core import InputError
from ncmethods.training import ModelConfig, TrainConfig, build_model, lr_factor
from ncmethods.training.config import HEADS


def factors(config, per_epoch=10):
    return [lr_factor(config, step, per_epoch) for step in range(config.epochs * per_epoch)]


def test_warm_up_is_linear_and_reaches_the_peak():
    found = factors(TrainConfig(epochs=5, warmup_epochs=2))
    rises = [b - a for a, b in itertools.pairwise(found[:21])]
    assert all(r == pytest.approx(1 / 21) for r in rises)
    assert found[0] > 0
    assert found[20] == max(found) == 1


def test_cosine_falls_to_almost_nothing():
    found = factors(TrainConfig(epochs=20))
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert 0 < found[-1] < 1e-3
    half = found[10 + 190 // 2]
    assert half == pytest.approx(0.5, abs=1e-9)


def test_steps_and_constant():
    step = TrainConfig(
        epochs=10, schedule="step", milestones=(0.5, 0.8), gamma=0.1, warmup_epochs=0
    )
    found = factors(step)
    assert found[:50] == [1] * 50
    assert found[50:80] == [0.1] * 30
    assert found[80:] == pytest.approx([0.01] * 20)
    assert set(factors(TrainConfig(schedule="constant", warmup_epochs=0))) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_tiny_runs_and_long_warm_ups(schedule):
    for epochs, per_epoch, warmup in ((1, 1, 1), (1, 2, 5), (2, 3, 100), (1, 1, 0)):
        config = TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=warmup)
        found = factors(config, per_epoch)
        assert all(0 < f <= 1 for f in found), found


def test_measured_about_ten_times_and_at_the_end():
    for epochs in range(1, 240):
        config = TrainConfig(epochs=epochs)
        at = [epoch for epoch in range(1, epochs + 1) if config.measured(epoch)]
        assert len(at) == min(10, epochs)
        assert at[-1] == epochs
        gaps = [b - a for a, b in zip([0, *at], at)]
        assert max(gaps) - min(gaps) <= 1
    assert sum(TrainConfig(epochs=7, measurements=1).measured(e) for e in range(1, 8)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("measurements", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", -1.0),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("warmup_epochs", -1.0),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
        ("mixup", -0.2),
        ("crop", -1),
        ("threads", -1),
        ("checkpoint_steps", -1),
        ("schedule", "linear"),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(InputError, match=name):
        TrainConfig(**{name: value})


# --- models ---------------------------------------------------------------------------------------


def weights(config, seed=0):
    return build_model(config, seed=seed).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a
    )


@pytest.mark.parametrize("head", HEADS)
def test_the_seed_alone_decides(head):
    args = {"frame": "simplex_etf"} if head == "frame_head" else {}
    config = ModelConfig("small_cnn", 1, K, head, args)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    random.seed(1)
    first = weights(config, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(weights(config, 5), first)
    assert not same(weights(config, 6), first)


def test_every_builder_is_a_head_that_can_be_named():
    builders = {n for n in heads.__all__ if n.endswith("_head")} - {"find_head", "swap_head"}
    assert set(HEADS) == builders | {"linear"}
    with pytest.raises(InputError, match="Unknown head 'guided'"):
        build_model(ModelConfig("small_cnn", 1, K, "guided"))


def test_a_frame_is_named():
    args = {"frame": "nonnegative_orthogonal", "neck": None}
    rows = build_model(ModelConfig("small_cnn", 1, K, "frame_head", args)).head.weight
    assert (rows >= 0).all()
    for wrong in ({}, {"frame": "nonnegative"}):
        with pytest.raises(InputError, match="Unknown frame"):
            build_model(ModelConfig("small_cnn", 1, K, "frame_head", wrong))


def test_head_arguments():
    model = build_model(ModelConfig("small_cnn", 3, K, "etf_head", {"dim": 16, "scale": 7.0}))
    assert model.head.weight.shape == (K, 16)
    assert model.head.scale == 7
    assert model(torch.zeros(2, 3, 16, 16)).logits.shape == (2, K)


@pytest.mark.parametrize("head", ["etf_head", "linear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_backbone(head, channels):
    model = build_model(ModelConfig("torchvision:resnet18", channels, K, head)).eval()
    out = model(torch.randn(2, channels, 32, 32))
    assert out.features.shape == (2, 512)
    assert out.logits.shape == (2, K)


def test_a_factory():
    model = build_model(ModelConfig("job:plain_net", 1, 3, "etf_head"))
    assert model(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("small_cn", 1, K), "Did you mean 'small_cnn'"),
        (ModelConfig("torchvision:resnet81", 3, K), "Unknown torchvision model"),
        (ModelConfig("no.such.module:net", 3, K), "Cannot import 'net'"),
        (ModelConfig("job:no_net", 3, K), "Cannot import 'no_net'"),
        (ModelConfig("small_cnn", 1, K, "etf_haed"), "Did you mean 'etf_head'"),
        (ModelConfig("small_cnn", 1, 1), "num_classes must be an integer ≥ 2"),
        (ModelConfig("small_cnn", 1, K, weights="no-such-file.pt"), "Cannot read weights"),
    ],
)
def test_what_cannot_be_built(config, message):
    with pytest.raises(InputError, match=message):
        build_model(config)
