"""Two gloo ranks: what one process does, to rounding; one record; the same bytes after a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from job import CNN, SAME, Stopped, contents, run, splits, stopping
from safetensors.torch import load_file

from ncmethods.data import DeviceLoader
from ncmethods.features import FeatureSet
from ncmethods.training import (
    ModelConfig,
    Process,
    evaluate,
    gather,
    load_run,
    process,
)

PLAIN = ModelConfig("job:plain_net", 1, 4)
ROOT = Path(__file__).parents[2]


def on_ranks(rank, world, out):
    """Everything that the tests below look at, in one pair of processes."""
    here = Process(rank, world, torch.device("cpu"))
    rows = [run(out / "plain", PLAIN, here=here, epochs=8)]
    options = {"here": here, "mixup": 0.3, "crop": 1, "flip": True}
    rows.append(run(out / "cnn", CNN, **options))
    with stopping(8), pytest.raises(Stopped):
        run(out / "stopped", CNN, **options)
    run(out / "stopped", CNN, **options)
    with process("cpu") as joined:
        ids = (joined.rank, joined.world)
    shard = torch.arange(7)[rank::world]
    whole = gather(FeatureSet(shard[:, None].float(), shard, 7, torch.eye(7)[shard]), world)
    return rows, ids, whole.labels, whole.features, whole.logits


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    return out, run_ranks(on_ranks, 2, out)


def test_two_ranks_train_what_one_process_trains(ranks, tmp_path):
    out, _ = ranks
    row = run(tmp_path, PLAIN, epochs=8)
    one, two = (load_file(at / "weights.safetensors") for at in (tmp_path, out / "plain"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    last = json.loads((out / "plain/metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() == row.keys()
    for key in ("train/loss", "test/nll", "train/nc1/pinv", "train/nc2/equiangular_means"):
        assert last[key] == pytest.approx(row[key], rel=1e-3), key


def test_only_rank_0_measures_and_writes(ranks):
    out, results = ranks
    for run_number, name in enumerate(("plain", "cnn")):
        first, second = (result[0][run_number] for result in results)
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == first
        assert "test/accuracy" in first
        assert "test/accuracy" not in second
        assert second["train/loss"] == first["train/loss"]
        rows = [json.loads(line) for line in lines]
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert json.loads((out / "cnn/config.json").read_text())["world"] == 2


def test_the_record_is_that_of_the_saved_weights(ranks):
    """Uneven shards, and BatchNorm statistics that differ between the ranks while training."""
    out, results = ranks
    saved, data = load_run(out / "cnn"), splits()
    stats = {"mean": saved.preprocess.mean, "std": saved.preprocess.std, "train": False}
    loaders = (DeviceLoader(p, 1024, **stats) for p in (data.train, data.test))
    alone = evaluate(saved.model, *loaders)
    counts = torch.tensor(saved.config["data"]["counts"])
    groups = saved.config["data"]["groups"]
    expected = alone.row(counts, groups, list(groups.values())[-1] or None)
    row = results[0][0][1]
    for key, value in expected.items():
        if value == value:
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_stopped_and_resumed_on_two_ranks(ranks):
    out, _ = ranks
    assert contents(out / "stopped") == contents(out / "cnn")


def test_process_and_gather(ranks):
    _, results = ranks
    for rank, (_, ids, labels, features, logits) in enumerate(results):
        assert ids == (rank, 2)
        assert labels.tolist() == list(range(7))
        assert features.flatten().tolist() == list(range(7))
        assert torch.equal(logits, torch.eye(7))


def test_alone_without_a_group():
    with process("cpu") as here:
        assert here == Process(0, 1, torch.device("cpu"))
        assert here.first
    whole = FeatureSet(torch.ones(2, 3), torch.tensor([0, 1]), 2)
    assert gather(whole, 1) is whole


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "mps"])
def test_a_device_that_is_not_here(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device") as error, process(device):
        pass
    assert device in str(error.value)


def torchrun(*arguments, ranks=2):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return subprocess.run(
        [sys.executable, *launcher, str(ranks), "-m", "ncmethods", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )


QUICK = ("--data.name", "digits", "--data.imbalance", "10", "--train.epochs", "2")


@pytest.mark.slow
def test_the_recipe_under_torchrun(tmp_path):
    methods = ("--methods", "ce", "etf-dr-balanced", "--seeds", "0", "1", "--control")
    done = torchrun("long-tailed", *QUICK, *methods, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training images per class") == 1
    assert done.stdout.count("accuracy") == 6
    for run_ in ("ce/seed0", "ce/seed1", "etf-dr-balanced/seed1", "ce-balanced-control/seed0"):
        for name in (*SAME, "report.html"):
            assert (tmp_path / run_ / name).stat().st_size, name
    again = torchrun("long-tailed", *QUICK, *methods, "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_an_error_on_rank_0_ends_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    failed = torchrun("long-tailed", *QUICK, "--out", tmp_path / "file" / "runs")
    assert failed.returncode
    assert "Cannot write" in failed.stderr


@pytest.mark.slow
def test_three_ranks_stopped_and_resumed(tmp_path):
    run_ranks(three, 3, tmp_path)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def three(rank, world, out):
    options = {"here": Process(rank, world, torch.device("cpu")), "batch_size": 33}
    run(out / "whole", CNN, **options)
    with stopping(8), pytest.raises(Stopped):
        run(out / "stopped", CNN, **options)
    run(out / "stopped", CNN, **options)
