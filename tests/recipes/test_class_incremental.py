"""The class-incremental recipe: orders of methods, exact resume, refusals."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ncmethods import cli, data
from ncmethods._core import CheckpointError, InputError
from ncmethods.tracking import read_rows
from ncmethods.training import TrainConfig

recipe = cli.load_recipe("class_incremental")
STREAM = data.StreamConfig("digits", increment=4)
SHORT = TrainConfig(
    epochs=3, batch_size=64, lr=0.05, threads=1, device="cpu", measurements=1, warmup_epochs=0.5
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(out, *methods, **options):
    return recipe.ClassIncremental(
        methods=methods,
        **{"orders": (0,), "out": out, "wandb": False, "data": STREAM, "train": SHORT} | options,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs of six methods with one seed."""
    out = tmp_path_factory.mktemp("inc")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe.main(config(out, "finetune", "replay-balanced", "etf-ce", "wa", "slda", "nct"))
    torch.set_num_threads(threads)
    return out


def result(out, name, leaf="order0-seed0"):
    return json.loads((out / name / leaf / "result.json").read_text())


def test_sessions_are_runs_and_the_last_one_is_short(done):
    of = result(done, "replay-balanced")
    assert [row["classes"] for row in of["rows"]] == [4, 8, 10]
    assert of["evaluator"]["boundaries"] == [0, 4, 8, 10]
    for t, seen in enumerate((4, 8, 10)):
        place = done / "replay-balanced" / "order0-seed0" / f"session{t}"
        about = json.loads((place / "config.json").read_text())
        assert len(about["data"]["classes"]) == about["model"]["num_classes"] == seen
        memory = json.loads((place / "memory.json").read_text())
        assert len(memory) == len(set(memory)) == 20 * seen
    # Old images come from the memory, new ones are all there are.
    counts = about["data"]["counts"]
    assert counts[:8] == [20] * 8
    assert min(counts[8:]) > 100
    assert (done / "report.html").stat().st_size > 10_000
    assert "replay-balanced" in (done / "table.md").read_text()
    rows = read_rows(done / "nct" / "summary" / "metrics.jsonl")
    assert [row["inc/session"] for row in rows] == [0, 1, 2]


def test_the_first_session_fixes_the_normalisation(done):
    means = {
        json.dumps(json.loads(path.read_text())["data"]["mean"])
        for path in (done / "replay-balanced").rglob("config.json")
    }
    assert len(means) == 1


def test_forgetting_without_a_memory_and_little_with_one(done):
    """Of the sheet's ordering what a small stream must show, with wide margins."""
    last = {
        name: result(done, name)["rows"][-1]
        for name in ("finetune", "replay-balanced", "etf-ce", "slda")
    }
    assert last["finetune"]["accuracy"] < 0.35
    assert last["finetune"]["forgetting/chaudhry"] > 0.6
    assert last["replay-balanced"]["accuracy"] > last["finetune"]["accuracy"] + 0.3
    assert last["etf-ce"]["accuracy"] > last["replay-balanced"]["accuracy"] - 0.15
    assert last["slda"]["accuracy"] > last["finetune"]["accuracy"] + 0.2


def test_rows_of_old_classes_stay_on_fixed_vertices(done):
    from safetensors.torch import load_file

    leaf = done / "nct" / "order0-seed0"
    rows = [
        load_file(leaf / f"session{t}" / "weights.safetensors")["head.weight"] for t in range(3)
    ]
    for early, late in itertools.pairwise(rows):
        assert torch.equal(early, late[: len(early)])
    assert rows[-1].shape == (10, 64)


def test_frozen_methods_train_once(done):
    leaf = done / "slda" / "order0-seed0"
    assert (leaf / "session0" / "weights.safetensors").exists()
    assert not (leaf / "session1" / "weights.safetensors").exists()


def test_a_lost_session_comes_back_the_same(done, tmp_path):
    shutil.copytree(done, tmp_path / "again")
    leaf = tmp_path / "again" / "etf-ce" / "order0-seed0"
    before = {p.name: p.read_bytes() for p in (leaf / "session2").glob("*.safetensors")}
    whole = (leaf / "result.json").read_bytes()
    shutil.rmtree(leaf / "session2")
    (leaf / "result.json").unlink()
    recipe.main(config(tmp_path / "again", "etf-ce"))
    assert (leaf / "result.json").read_bytes() == whole
    assert {p.name: p.read_bytes() for p in (leaf / "session2").glob("*.safetensors")} == before


def test_killed_in_a_session_it_ends_as_if_not(done, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "ncmethods", "class-incremental", "--methods", "etf-ce"]
    command += ["--orders", "0", "--data.name", "digits", "--data.increment", "4", "--no-wandb"]
    command += ["--train.epochs", "3", "--train.threads", "1", "--train.device", "cpu"]
    command += ["--train.warmup-epochs", "0.5", "--train.checkpoint-steps", "5", "--out", str(out)]
    leaf = out / "etf-ce" / "order0-seed0"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list((leaf / "session1").glob("checkpoint-*.pt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (leaf / "result.json").exists()
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    # Other steps between checkpoints, the same numbers.
    assert (leaf / "result.json").read_bytes() == (
        done / "etf-ce" / "order0-seed0" / "result.json"
    ).read_bytes()
    weights = [p / "etf-ce/order0-seed0/session2/weights.safetensors" for p in (out, done)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_tuning_uses_held_out_training_images(tmp_path, capsys):
    recipe.main(
        config(tmp_path, "replay-balanced", lrs=(0.02, 0.05), train=replace(SHORT, epochs=1))
    )
    said = capsys.readouterr().out
    assert "held-out average" in said
    place = tmp_path / "tuning" / "replay-balanced" / "lr0.02" / "session0"
    kept = json.loads((place / "config.json").read_text())["data"]["counts"]
    whole = tmp_path / "replay-balanced" / "order0-seed0" / "session0" / "config.json"
    for a, b in zip(kept, json.loads(whole.read_text())["data"]["counts"]):
        assert a == pytest.approx(0.8 * b, abs=1)


def test_bad_input(done, tmp_path):
    with pytest.raises(InputError, match="Did you mean 'finetune'"):
        recipe.main(config(tmp_path, "finetun"))
    with pytest.raises(InputError, match="none twice"):
        recipe.main(config(tmp_path, "wa", "wa"))
    with pytest.raises(InputError, match=r"10 classes arrive and there are 6 vertices"):
        recipe.main(config(tmp_path / "a", "etf-ce", capacity=6, train=replace(SHORT, epochs=1)))
    with pytest.raises(InputError, match="total=5 has no place for 10"):
        recipe.main(config(tmp_path / "b", "replay", total=5, train=replace(SHORT, epochs=1)))
    with pytest.raises(InputError, match="wanted of class"):
        recipe.main(config(tmp_path / "c", "replay", data=replace(STREAM, shots=100_000)))
    with pytest.raises(CheckpointError, match="another configuration"):
        recipe.main(config(done, "finetune", train=replace(SHORT, lr=0.01)))
    with pytest.raises(InputError, match="a first session of 10 is all"):
        recipe.main(config(tmp_path / "d", "replay", data=replace(STREAM, base=10)))
