import json
import logging
import math
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ncmethods import tracking
from ncmethods._core import CheckpointError, InputError
from ncmethods.tracking import Tracker, read_rows


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tracking, "_offline_until_exit", False)


def rows(epochs=range(4)):
    return [{"epoch": e, "train/loss": 1 / (e + 1), "nc1": math.nan} for e in epochs]


def write(directory, epochs=range(4), **kwargs):
    with Tracker(directory, **kwargs) as tracker:
        for row in rows(epochs):
            tracker.log(row)
        return tracker.position()


def inspect(directory):
    """The records of each W&B segment of a run, oldest first, by their type."""
    segments = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        out = subprocess.run(
            [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        segments.append([json.loads(line) for line in out.splitlines()])
    return segments


def of(segment, kind):
    return [record[kind] for record in segment if record["type"] == kind]


def history(segment):
    items = [record["item"] for record in of(segment, "history")]
    return [{k: v for k, v in item.items() if not k.startswith("_")} for item in items]


# --- metrics.jsonl -----------------------------------------------------------------------------


def test_rows_are_plain_json_with_null_for_what_is_not_finite(tmp_path):
    with Tracker(tmp_path, wandb=False) as tracker:
        tracker.log(
            {
                "epoch": torch.tensor(3),
                "b": np.float64(0.1),
                "a": torch.tensor(0.5, requires_grad=True),
                "n": np.int64(7),
                "nan": torch.tensor(math.nan),
                "inf": -math.inf,
                "text": "Σ_W",
                "none": None,
                "flag": True,
            }
        )
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == (
        '{"epoch": 3, "b": 0.1, "a": 0.5, "n": 7, "nan": null, "inf": null, '
        '"text": "Σ_W", "none": null, "flag": true}\n'
    )
    assert read_rows(tmp_path / "metrics.jsonl")[0]["nan"] is None


def test_each_row_is_on_file_at_once(tmp_path):
    with Tracker(tmp_path, wandb=False) as tracker:
        for n, row in enumerate(rows(), start=1):
            tracker.log(row)
            assert len(read_rows(tmp_path / "metrics.jsonl")) == n


def test_two_runs_write_the_same_bytes_whatever_the_name_place_and_sink(tmp_path):
    write(tmp_path / "a", wandb=False)
    write(tmp_path / "b", name="other", config={"lr": 0.1})
    a, b = ((tmp_path / d / "metrics.jsonl").read_bytes() for d in "ab")
    assert a == b
    assert len(a) > 0


@pytest.mark.parametrize(
    "row", [{"x": torch.zeros(2)}, {"x": [1.0]}, {1: 2.0}, {"x": {"y": 1}}, {"x": np.zeros(3)}]
)
def test_what_is_not_a_scalar_is_refused_and_not_written(tmp_path, row):
    with Tracker(tmp_path, wandb=False) as tracker:
        with pytest.raises(InputError, match="one scalar per name"):
            tracker.log(row)
        assert tracker.position() == 0


def test_resume_truncates_to_the_checkpoint_and_ends_in_the_same_bytes(tmp_path):
    write(tmp_path / "whole", range(6), wandb=False)
    offset = write(tmp_path / "cut", range(3), wandb=False)
    with Tracker(tmp_path / "cut", offset=offset, wandb=False) as tracker:
        tracker.log({"epoch": 99})  # after the checkpoint: lost with the kill
        tracker.timing({"seconds": 1.5})
    with open(tmp_path / "cut/metrics.jsonl", "ab") as file:
        file.write(b'{"epoch": 100, "tor')
    assert read_rows(tmp_path / "cut/metrics.jsonl")[-1] == {"epoch": 99}
    assert write(tmp_path / "cut", range(3, 6), offset=offset, wandb=False) > offset
    whole, cut = ((tmp_path / d / "metrics.jsonl").read_bytes() for d in ("whole", "cut"))
    assert whole == cut
    assert read_rows(tmp_path / "cut/timing.jsonl") == [{"seconds": 1.5}]


def test_a_new_run_starts_an_empty_record(tmp_path):
    write(tmp_path, range(9), wandb=False)
    write(tmp_path, range(2), wandb=False)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_a_record_shorter_than_the_checkpoint_is_an_error_and_stays_as_it_is(tmp_path):
    offset = write(tmp_path, wandb=False)
    for directory, kept in ((tmp_path, offset + 1), (tmp_path / "gone", 1)):
        with pytest.raises(CheckpointError, match="was cut"):
            Tracker(directory, offset=kept)
    assert (tmp_path / "metrics.jsonl").stat().st_size == offset


def test_other_ranks_touch_nothing(tmp_path):
    with Tracker(tmp_path / "run", enabled=False) as tracker:
        tracker.log({"x": 1})
        tracker.timing({"x": 1})
        tracker.figures({"f": Figure()})
        tracker.table("t", ["a"], [[1]])
        tracker.summary({"x": 1})
        assert tracker.position() == 0
    assert not (tmp_path / "run").exists()


def test_read_rows_refuses_what_is_not_a_record(tmp_path):
    with pytest.raises(InputError, match="Cannot read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_rows(tmp_path / "bad.jsonl")


def test_an_unwritable_directory_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Choose another output directory"):
        Tracker(tmp_path / "file" / "run")


def test_a_full_disk_is_an_input_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(tmp_path, wandb=False) as tracker:
        tracker.log({"epoch": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (tracker.position() + 5, hard))
        try:
            for _ in range(2):
                with pytest.raises(InputError, match=r"Cannot write .*metrics\.jsonl"):
                    tracker.log({"epoch": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tracker.log({"epoch": 2})  # once there is space again
    assert read_rows(tmp_path / "metrics.jsonl") == [{"epoch": 0}, {"epoch": 2}]


# --- W&B ---------------------------------------------------------------------------------------


def test_wandb_reads_back_the_rows_the_config_and_the_epoch_axis(tmp_path, caplog):
    write(tmp_path, name="s0", group="ce", config={"lr": 0.1, "data": {"name": "digits"}})
    (segment,) = inspect(tmp_path)
    assert history(segment) == read_rows(tmp_path / "metrics.jsonl")
    run = of(segment, "run")[0]
    assert run["run_id"] == (tmp_path / "wandb-id").read_text().strip()
    assert (
        run["config"]["update"] | {"lr": 0.1, "data": {"name": "digits"}}
        == (run["config"]["update"])
    )
    assert (run["run_group"], run["display_name"]) == ("ce", "s0")
    metrics = of(segment, "metric")
    assert metrics[0]["name"] == "epoch"
    assert (metrics[1]["glob_name"], metrics[1]["step_metric"]) == ("*", "epoch")
    assert of(segment, "exit")[0].get("exit_code", 0) == 0
    assert not [r for r in caplog.records if r.name == "ncmethods"]


def test_a_resumed_run_opens_a_new_segment_with_the_same_id_and_goes_on_counting(tmp_path):
    offset = write(tmp_path, range(2))
    write(tmp_path, range(2, 5), offset=offset)
    first, second = inspect(tmp_path)
    assert of(first, "run")[0]["run_id"] == of(second, "run")[0]["run_id"]
    assert history(first) + history(second) == read_rows(tmp_path / "metrics.jsonl")
    assert [r["step"].get("num", 0) for r in of(second, "history")] == [2, 3, 4]


def test_figures_table_and_summary_reach_wandb(tmp_path, caplog):
    before = "matplotlib.pyplot" in sys.modules  # other packages' tests import it
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    with Tracker(tmp_path) as tracker:
        tracker.log({"epoch": 0})
        tracker.figures({"heat/means": figure})
        tracker.log({"epoch": 1})
        tracker.table("final", ["method", "accuracy"], [["ce", 0.5], ["etf", None]])
        tracker.summary({"accuracy": torch.tensor(0.25)})
    assert not [r for r in caplog.records if r.name == "ncmethods"]
    (segment,) = inspect(tmp_path)
    first, second, last = history(segment)
    assert first == {"epoch": 0}
    assert second["epoch"] == 1  # the figure rides along with the next row
    assert second["heat/means._type"] == "image-file"
    png = next(tmp_path.glob("wandb/offline-*/files/media/images/heat/*.png"))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert last["final._type"] == "table-file"
    assert (last["final.nrows"], last["final.ncols"]) == (2, 2)
    assert any(s.get("update", {}).get("accuracy") == 0.25 for s in of(segment, "summary"))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_an_error_in_the_run_marks_it_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path) as tracker:
        tracker.log({"epoch": 1 / 0})
    assert of(inspect(tmp_path)[0], "exit")[0]["exit_code"] == 1


def test_the_sink_leaves_the_process_and_its_random_streams_alone(tmp_path):
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            (sys.exit, sys.excepthook, sys.stdin, os.getcwd()),
        )

    before = state()
    with Tracker(tmp_path) as tracker:
        tracker.log({"epoch": 0})
        tracker.figures({"f": Figure(figsize=(1, 1))})
    assert state() == before


def test_wandb_mode_disabled_writes_the_record_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
)
def test_offline_unless_a_key_or_the_mode_says_otherwise(tmp_path, monkeypatch, environment, mode):
    import wandb

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = []

    def init(**kwargs):
        seen.append(kwargs)
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", init)
    for name in ("a", "b"):
        write(tmp_path / name)
    first = [mode] if mode == "offline" else ["online", "offline"]
    assert [s["mode"] for s in seen] == [*first, "offline"]  # the second run no longer tries


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "a" * 40])
def test_online_without_key_or_server_goes_on_offline_without_a_prompt(
    tmp_path, monkeypatch, caplog, key
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    write(tmp_path)
    assert [r.message for r in caplog.records if "works offline" in r.message]
    (segment,) = inspect(tmp_path)
    assert history(segment) == read_rows(tmp_path / "metrics.jsonl")


class Broken:
    def __init__(self, where):
        self.where = where

    def __getattr__(self, name):
        if name == self.where:
            raise RuntimeError(f"{name} fails")
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("where", ["import", "init", "define_metric", "log", "summary", "finish"])
def test_a_failing_sink_warns_once_and_the_record_goes_on(tmp_path, monkeypatch, caplog, where):
    import wandb

    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif where == "init":
        monkeypatch.setattr(wandb, "init", lambda **kwargs: 1 / 0)
    else:
        monkeypatch.setattr(wandb, "init", lambda **kwargs: Broken(where))
    with Tracker(tmp_path) as tracker:
        for row in rows():
            tracker.log(row)
        tracker.summary({"a": 1})
        tracker.table("t", ["a"], [[1]])
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "W&B is off" in record.message


@pytest.mark.slow
def test_the_death_of_the_wandb_service_costs_neither_rows_nor_time(tmp_path):
    code = """if True:
        import os, pathlib, sys, time
        from ncmethods.tracking import Tracker
        with Tracker(sys.argv[1]) as tracker:
            tracker.log({"epoch": 0})
            for file in pathlib.Path("/proc/self/task").glob("*/children"):
                for pid in file.read_text().split():
                    os.kill(int(pid), 9)
            time.sleep(0.5)
            for epoch in range(1, 6):
                tracker.log({"epoch": epoch})
    """
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 6


def test_importing_the_room_does_not_import_wandb_or_matplotlib():
    code = "import sys, ncmethods.tracking; print({'wandb', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
