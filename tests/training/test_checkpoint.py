"""Checkpoints: whole or absent, the newest whole one wins, and what cannot be used says why."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from job import CNN, contents, run

from ncmethods._core import CheckpointError, InputError
from ncmethods.training import load_checkpoint, loop, save_checkpoint


class Stopped(Exception):
    pass


def stopped(out, step, monkeypatch, **options):
    """A run that ends after ``step`` steps, with checkpoints every 2."""

    def factor(config, at, per_epoch):
        if at == step:
            raise Stopped
        return original(config, at, per_epoch)

    original = loop.lr_factor
    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_factor", factor)
        with pytest.raises(Stopped):
            run(out, **options)
    return out


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    row = run(out)
    return row, contents(out), out


def checkpoints(out):
    return sorted(out.glob("checkpoint-*.pt"))


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_round_trip_keeps_two(tmp_path):
    state = {"weight": torch.arange(3.0), "step": 7, "names": ["a", None], "lr": 0.1}
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2, 3, 10, 200):
        save_checkpoint(tmp_path, state | {"step": step}, step)
    loaded = load_checkpoint(tmp_path)
    assert loaded["step"] == 200
    assert loaded["names"] == ["a", None]
    assert torch.equal(loaded["weight"], state["weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000010.pt",
        "checkpoint-000000010.sha256",
        "checkpoint-000000200.pt",
        "checkpoint-000000200.sha256",
    ]


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, monkeypatch, unbroken, how):
    stopped(tmp_path, 7, monkeypatch)
    assert [p.stem[-2:] for p in checkpoints(tmp_path)] == ["04", "06"]
    damage(checkpoints(tmp_path)[1], how)
    with pytest.warns(UserWarning, match="checkpoint-000000006.pt does not match its SHA-256"):
        row = run(tmp_path)
    assert row == unbroken[0]
    assert contents(tmp_path) == unbroken[1]


def test_a_damaged_digest_counts_as_damage(tmp_path, monkeypatch, unbroken):
    stopped(tmp_path, 7, monkeypatch)
    checkpoints(tmp_path)[1].with_suffix(".sha256").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="does not match"):
        run(tmp_path)
    assert contents(tmp_path) == unbroken[1]


def test_all_damaged(tmp_path, monkeypatch):
    stopped(tmp_path, 7, monkeypatch)
    for path in checkpoints(tmp_path):
        damage(path, "flipped")
    with (
        pytest.warns(UserWarning, match="does not match"),
        pytest.raises(CheckpointError, match=r"Every checkpoint in .* is damaged.*Delete them"),
    ):
        run(tmp_path)


def test_without_its_digest_it_was_being_written(tmp_path, monkeypatch, unbroken):
    stopped(tmp_path, 7, monkeypatch)
    checkpoints(tmp_path)[1].with_suffix(".sha256").unlink()
    assert load_checkpoint(tmp_path)["step"] == 4
    run(tmp_path)
    assert contents(tmp_path) == unbroken[1]


@pytest.mark.parametrize("gone", ["digests", "checkpoints"])
def test_without_any_it_starts_anew(tmp_path, monkeypatch, unbroken, gone):
    stopped(tmp_path, 7, monkeypatch)
    for path in tmp_path.glob("checkpoint-*.sha256" if gone == "digests" else "checkpoint-*"):
        path.unlink()
    run(tmp_path)
    assert contents(tmp_path) == unbroken[1]


def test_of_another_config(tmp_path, monkeypatch):
    stopped(tmp_path, 3, monkeypatch)
    with pytest.raises(CheckpointError, match=r"train\.lr: 0\.05 there, 0\.5 now") as error:
        run(tmp_path, lr=0.5, mixup=0.1)
    assert "train.mixup: 0.0 there, 0.1 now" in str(error.value)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 now"):
        run(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match=r"model\.head: 'linear' there, 'etf_head' now"):
        run(tmp_path, model=type(CNN)("small_cnn", 1, 4, "etf_head"))
    with pytest.raises(CheckpointError, match=r"; and 1 more\)"):
        run(tmp_path, lr=0.5, mixup=0.1, crop=1, flip=True, gamma=0.2)


def test_of_another_config_whose_config_json_is_gone(tmp_path, monkeypatch):
    stopped(tmp_path, 3, monkeypatch)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"train\.lr: 0\.05 there, 0\.5 now"):
        run(tmp_path, lr=0.5)


def test_damaged_config(tmp_path, monkeypatch):
    stopped(tmp_path, 3, monkeypatch)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        run(tmp_path)


def test_the_thread_count_is_kept_with_the_run(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        stopped(tmp_path, 3, monkeypatch, threads=2)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        run(tmp_path, threads=0)  # takes what the run began with
        assert torch.get_num_threads() == 2
        with pytest.raises(CheckpointError, match=r"train\.threads: 2 there, 1 now"):
            run(tmp_path, threads=1)
        torch.set_num_threads(1)
        run(tmp_path / "new", threads=0)
        config = json.loads((tmp_path / "new/config.json").read_text())
        assert config["train"]["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def test_metrics_shorter_than_the_checkpoint_knows(tmp_path, monkeypatch):
    stopped(tmp_path, 7, monkeypatch)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="the record was cut"):
        run(tmp_path)


def test_a_finished_run_does_nothing(tmp_path, unbroken):
    row, bytes_, out = unbroken
    again = tmp_path / "again"
    shutil.copytree(out, again)
    for path in checkpoints(again):
        path.unlink()
    before = {p: p.stat().st_mtime_ns for p in again.iterdir()}
    assert run(again) == row
    assert {p: p.stat().st_mtime_ns for p in again.iterdir()} == before
    assert contents(again) == bytes_
    assert row == json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])


def test_out_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write .*config\.json: Not a directory"):
        run(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["checkpoint-", "weights.safetensors", "evaluation"])
def test_disk_full(tmp_path, monkeypatch, unbroken, name):
    write = Path.write_bytes

    def full(self, content):
        if self.name.startswith(f".{name}"):
            write(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=rf"Cannot write .*{name}.*: No space left on device"):
            run(tmp_path)
    assert not list(tmp_path.glob(".*"))
    run(tmp_path)  # once there is space again
    assert contents(tmp_path) == unbroken[1]


def test_what_a_killed_writer_left_is_swept_up(tmp_path, monkeypatch):
    stopped(tmp_path, 3, monkeypatch)
    (tmp_path / ".checkpoint-000000004.pt.abc.tmp").write_bytes(b"half")
    run(tmp_path)
    assert not list(tmp_path.glob(".*"))
