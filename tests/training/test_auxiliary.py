"""Runs whose batches bring auxiliary outliers: what losses get, what counts, resuming, ranks."""

import json

import pytest
import torch
from distributed import run_ranks
from job import CNN, Stopped, ce, contents, run, splits, stopping
from safetensors.torch import load_file

from ncmethods import data, losses
from ncmethods._core import InputError
from ncmethods.heads import FrozenProjector
from ncmethods.training import ModelConfig, Process, load_run

PLAIN = ModelConfig("job:plain_net", 1, 4)


def exposed(logits, labels, outlier_logits):
    return ce(logits, labels) + 0.5 * losses.outlier_exposure(outlier_logits)


def test_losses_get_the_outliers_apart(tmp_path):
    seen = []

    def spy(features, logits, labels, counts, outlier_features, outlier_logits):
        seen.append(
            [len(of) for of in (features, logits, labels, outlier_features, outlier_logits)]
        )
        assert int(labels.min()) >= 0
        assert counts.tolist() == [40, 30, 14, 8]
        return exposed(logits, labels, outlier_logits)

    row = run(tmp_path, PLAIN, loss=spy, epochs=1, outliers="gratings")
    assert seen == [[30, 30, 30, 60, 60], [31, 31, 31, 62, 62], [31, 31, 31, 62, 62]]
    confusion = load_file(tmp_path / "evaluation.safetensors")["confusion"]
    assert confusion.sum(1).tolist() == [10, 10, 10, 7]  # the test images and no other
    assert 0 <= row["test/accuracy"] <= 1
    assert json.loads((tmp_path / "config.json").read_text())["train"]["outliers"] == "gratings"


def test_a_loss_that_does_not_look_trains_as_without_them(tmp_path):
    """Without BatchNorm: there they would move its statistics."""
    rows = [run(tmp_path / str(name), PLAIN, epochs=2, outliers=name) for name in ("", "gratings")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-6)  # sums in another order


def test_exposure_takes_the_confidence_from_outliers(tmp_path):
    images = data.outliers("gratings", splits().test.images.shape[1:], n=500, seed=3)
    mean, std = data.channel_stats(splits().train)
    sure = {}
    for loss in (ce, exposed):
        out = tmp_path / loss.__name__
        run(out, PLAIN, loss=loss, epochs=30, outliers="gratings")
        with torch.no_grad():
            z = load_run(out).model.eval()((images / 255 - mean[0]) / std[0]).logits
        sure[loss.__name__] = float(z.softmax(1).amax(1).mean())
    assert sure["exposed"] < sure["ce"] - 0.2, sure


def test_a_loss_that_wants_outliers_says_so(tmp_path):
    with pytest.raises(InputError, match="exposed needs 'outlier_logits'"):
        run(tmp_path, PLAIN, loss=exposed)
    with pytest.raises(InputError, match="Did you mean 'gratings'"):
        run(tmp_path / "typo", PLAIN, loss=exposed, outliers="grating")


@pytest.mark.parametrize("stop", [2, 5, 8])  # three steps an epoch, checkpoints every two
def test_stopped_and_resumed_it_ends_with_the_same_bytes(tmp_path, stop):
    options = {"model": CNN, "loss": exposed, "outliers": "flat", "crop": 1, "mixup": 0.3}
    run(tmp_path / "unbroken", **options)
    with stopping(stop), pytest.raises(Stopped):
        run(tmp_path / "broken", **options)
    run(tmp_path / "broken", **options)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def on_ranks(rank, world, out):
    here = Process(rank, world, torch.device("cpu"))
    return run(out, PLAIN, loss=exposed, here=here, outliers="gratings")


def test_two_ranks_train_what_one_process_trains(tmp_path):
    run_ranks(on_ranks, 2, tmp_path / "two")
    run(tmp_path / "one", PLAIN, loss=exposed, outliers="gratings")
    one, two = (load_file(tmp_path / at / "weights.safetensors") for at in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


def test_embeddings_are_what_the_backbone_gives(tmp_path):
    """Before the neck: the projector of the head turns them into the features."""
    seen = []

    def spy(embeddings, features, logits, labels):
        seen.append((embeddings, features))
        return ce(logits, labels) + 0.05 * losses.koleo(embeddings, labels)

    run(tmp_path, ModelConfig("small_cnn", 1, 4, "frozen_projector_head"), loss=spy, epochs=1)
    for embeddings, features in seen:
        assert embeddings.requires_grad
        want = FrozenProjector(embeddings.shape[1])(embeddings)
        torch.testing.assert_close(features, want, rtol=0, atol=0)
        assert not torch.equal(features, embeddings)
    plain = []

    def same(embeddings, features, logits, labels):
        plain.append(torch.equal(embeddings, features))
        return ce(logits, labels)

    run(tmp_path / "linear", CNN, loss=same, epochs=1, outliers="flat")
    assert plain == [True] * 3
