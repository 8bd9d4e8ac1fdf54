"""The directions of the Fashion-MNIST-LT experiment that hold with large margins."""

import dataclasses

import pytest

from ncmethods import data
from ncmethods.cli import load_recipe
from ncmethods.tracking import read_rows
from ncmethods.training import TrainConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not data.available("fashion-mnist"), reason="needs dataset-fashion-mnist (apt)"
    ),
]


@pytest.mark.parametrize(
    ("profile", "n_max", "groups"), [("exp", 2000, "3/4/3"), ("step", 1000, "5/5")]
)
def test_rare_angles_and_few_shot_accuracy_move_as_published(tmp_path, profile, n_max, groups):
    recipe = load_recipe("long_tailed")
    methods = ("ce", "la", "etf-dr-balanced")
    config = recipe.LongTailed(
        methods=methods,
        seeds=(0,),
        out=tmp_path,
        wandb=False,
        data=data.TailConfig("fashion-mnist", profile=profile, n_max=n_max, groups=groups),
        train=dataclasses.replace(TrainConfig(), epochs=28, measurements=1),
    )
    recipe.main(config)
    last = {m: read_rows(tmp_path / m / "seed0" / "metrics.jsonl")[-1] for m in methods}
    angle = {m: row["train/angle/rare_means_min"] for m, row in last.items()}
    few = {m: row["test/accuracy/few"] for m, row in last.items()}
    assert angle["etf-dr-balanced"] > angle["ce"] + 30
    assert few["la"] > few["ce"]
    assert few["etf-dr-balanced"] > few["ce"]
    if profile == "step":
        assert angle["ce"] < 30
