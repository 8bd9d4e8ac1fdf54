"""Runs that show each image in several views: what losses get, ranks, resuming, refusals."""

import json

import pytest
import torch
from distributed import run_ranks
from job import CNN, Stopped, ce, contents, run, stopping
from safetensors.torch import load_file

from ncmethods import losses
from ncmethods._core import CheckpointError, InputError
from ncmethods.training import ModelConfig, Process, TrainConfig

PLAIN = ModelConfig("job:plain_net", 1, 4)
VIEWS = {"views": 2, "crop": 1, "flip": True}


def test_losses_get_the_views_and_how_many(tmp_path):
    seen = []

    def spy(features, logits, labels, views, epoch):
        seen.append((len(features), views, torch.equal(*labels.chunk(2)), features.detach()))
        return ce(logits, labels)

    run(tmp_path, PLAIN, loss=spy, epochs=1, **VIEWS)  # 92 images in three batches
    assert [entry[:3] for entry in seen] == [(60, 2, True), (62, 2, True), (62, 2, True)]
    assert all((f[: len(f) // 2] != f[len(f) // 2 :]).any() for *_, f in seen)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["views"] == 2
    run(tmp_path / "one", PLAIN, loss=spy, epochs=1)
    assert [entry[:2] for entry in seen[3:]] == [(30, 1), (31, 1), (31, 1)]


def test_a_loss_that_can_take_views_is_told_of_them(tmp_path):
    """k_positive_supcon has views = 1 by itself; twins then would be drawn like any other."""
    losses_seen = []

    def contrast(features, labels, views=1):
        value = losses.k_positive_supcon(features, labels, positives=0, views=views)
        losses_seen.append(float(value.detach()))
        return value

    run(tmp_path, PLAIN, loss=contrast, epochs=1, **VIEWS)
    assert min(losses_seen) > 0  # without views there would be no positive, and the loss 0


class Projected(torch.nn.Module):
    """A loss with parameters, BatchNorm, and draws of its own."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(dim, 8), torch.nn.BatchNorm1d(8))

    def forward(self, features, logits, labels, views):
        z = self.layers(features)
        return ce(logits, labels) + losses.k_positive_supcon(z, labels, positives=2, views=views)


@pytest.mark.parametrize("stop", [2, 5, 8])  # three steps an epoch, checkpoints every two
def test_stopped_and_resumed_it_ends_with_the_same_bytes(tmp_path, stop):
    options = {"model": CNN, "loss": Projected, **VIEWS}
    run(tmp_path / "unbroken", **options)
    with stopping(stop), pytest.raises(Stopped):
        run(tmp_path / "broken", **options)
    run(tmp_path / "broken", **options)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def on_ranks(rank, world, out):
    return run(out, PLAIN, here=Process(rank, world, torch.device("cpu")), epochs=6, **VIEWS)


def test_two_ranks_train_what_one_process_trains(tmp_path):
    """Cross-entropy; a contrastive loss compares the images of its own rank alone."""
    run_ranks(on_ranks, 2, tmp_path / "two")
    run(tmp_path / "one", PLAIN, epochs=6, **VIEWS)
    one, two = (load_file(tmp_path / at / "weights.safetensors") for at in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 2}, "2 views without crop or flip"),
        ({"views": 2, "crop": 1, "mixup": 0.2}, "1 with mixup"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, PLAIN, **options)


def test_no_view_at_all():
    with pytest.raises(InputError, match="views must be at least 1, got 0"):
        TrainConfig(views=0)


def test_a_result_from_before_there_were_views_stays_one(tmp_path):
    row = run(tmp_path, PLAIN, epochs=1)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["train"].pop("views") == 1
    (tmp_path / "config.json").write_text(json.dumps(record))
    kept = contents(tmp_path)
    assert run(tmp_path, PLAIN, epochs=1) == row
    assert contents(tmp_path) == kept
    with pytest.raises(CheckpointError, match=r"train.views: 1 there, 2 now"):
        run(tmp_path, PLAIN, epochs=1, **VIEWS)
