"""The study of one pass on made-up features: its numbers are its peers', a class is forgotten."""

import json

import pytest
import torch

from ncmethods import cli
from ncmethods._core import InputError
from ncmethods.features import FeatureSet

study = cli.load_recipe("one_pass", "studies")
K, D = 4, 12


def made(n, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(K, D, generator=torch.Generator().manual_seed(9))
    y = torch.arange(n) % K
    return FeatureSet((means[y] + torch.randn(n, D, generator=rng)).relu() + shift, y, K)


@pytest.fixture
def config(tmp_path):
    """Features lie where the study would put those of the network."""
    place = tmp_path / "features"
    place.mkdir()
    for part, (n, shift) in {"train": (600, 0), "test": (300, 0), "far": (200, 2.0)}.items():
        name = "digits" if part == "far" else "fashion-mini"
        made(n, shift, len(part)).save(place / f"efficientnet-lite0-96-{name}-{part}.safetensors")
    return study.OnePass(out=tmp_path, forget=2)


def test_every_number_is_its_peers_and_a_class_is_forgotten(config, capsys):
    study.main(config)
    record = json.loads((config.out / "one-pass.json").read_text())
    known = {k: v for k, v in record["differences"].items() if v is not None}
    assert len(known) == 8
    assert max(known.values()) < 1e-6
    assert record["forgotten"]["rows"] < 1e-6
    assert record["forgotten"]["distances"] < 1e-9
    assert record["accuracy"] > 0.9
    assert record["auroc"] > 0.9
    assert record["false_alarms"] < 0.12
    said = capsys.readouterr().out
    assert "moments, in one pass" in said
    assert "Class 2 was taken out" in said
    assert (config.out / "report.html").stat().st_size > 10_000


def test_features_that_numpy_cannot_invert_are_named(config):
    path = config.out / "features" / "efficientnet-lite0-96-fashion-mini-train.safetensors"
    train = FeatureSet.load(path)
    dead = train.features.clone()
    dead[:, :3] = 0
    FeatureSet(dead, train.labels, K).save(path)
    with pytest.raises(InputError, match="span fewer than 12 directions"):
        study.main(config)


def test_the_command_knows_its_studies(capsys):
    for argv in (["study"], ["study", "list"]):
        cli.main(argv)
        assert "one-pass: One pass, four answers" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "one-pas"])
    assert stop.value.code == 2
    assert "Did you mean 'one-pass'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "one-pass", "--help"])
    assert stop.value.code == 0
    assert "--forget" in capsys.readouterr().out
