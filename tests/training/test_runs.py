"""Runs are read back: the same logits and preprocessing, or an error that says what is wrong."""

import json

import pytest
import torch
from job import CNN, run, splits
from test_checkpoint import stopped

from ncmethods._core import CheckpointError, InputError
from ncmethods.data import DeviceLoader
from ncmethods.training import ModelConfig, Preprocessing, load_run


@pytest.mark.parametrize(
    "model",
    [
        CNN,
        ModelConfig("small_cnn", 1, 4, "etf_head"),
        ModelConfig("small_cnn", 1, 4, "cosine_head", {"neck": "bn", "dim": 8}),
        ModelConfig("job:dropout_net", 1, 4, "etf_head"),
        ModelConfig("torchvision:resnet18", 1, 4, "etf_head"),
    ],
    ids=lambda m: f"{m.backbone}-{m.head}",
)
def test_round_trip(tmp_path, model):
    row = run(tmp_path, model, epochs=2)
    found, data = load_run(tmp_path), splits()
    assert not found.model.training
    assert found.config["model"]["head"] == model.head
    with torch.no_grad():
        logits = found.model(found.preprocess(data.test.images)).logits
    hits = (logits.argmax(1) == data.test.labels).double().mean()
    assert float(hits) == pytest.approx(row["test/accuracy"])
    nll = torch.nn.functional.cross_entropy(logits.double(), data.test.labels)
    assert float(nll) == pytest.approx(row["test/nll"], rel=1e-5)


def test_preprocessing_is_the_loaders(tmp_path):
    run(tmp_path, epochs=1)
    preprocess, data = load_run(tmp_path).preprocess, splits()
    loader = DeviceLoader(data.test, 1024, train=False, mean=preprocess.mean, std=preprocess.std)
    [(x, _)] = loader
    assert torch.equal(preprocess(data.test.images), x)
    of_train = DeviceLoader(data.train, 8, train=False)
    assert (list(preprocess.mean), list(preprocess.std)) == (of_train.mean, of_train.std)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2, 1, 9, 8).byte()],
)
def test_preprocessing_refuses_other_images(images):
    with pytest.raises(InputError, match=r"images must be uint8 \[N, 1, 8, 8\] as in training"):
        Preprocessing([0.5], [0.2], (1, 8, 8))(images)


def test_of_an_unfinished_run(tmp_path, monkeypatch):
    stopped(tmp_path, 5, monkeypatch)
    with pytest.raises(CheckpointError, match=r"the run has not finished.*to resume it"):
        load_run(tmp_path)


def test_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run directory"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not that of a run of ncmethods"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"type": "vit"}, "data": 3}))
    with pytest.raises(CheckpointError, match="not that of a run of ncmethods"):
        load_run(tmp_path)


def test_with_damaged_weights(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="Cannot read weights"):
        load_run(tmp_path)
