"""The command as a new user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ncmethods
from ncmethods import cli, data
from ncmethods.features import FeatureSet
from ncmethods.training import load_run

ROOT = Path(__file__).parents[1]
COMMANDS = ("long-tailed", "extract", "fetch", "report", "list", "copy")
TINY = ["--data.name", "digits", "--data.imbalance", "10", "--train.epochs", "1"]
TINY += ["--methods", "ce", "--seeds", "0", "--no-wandb", "--train.threads", "1"]


@pytest.fixture(autouse=True)
def the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def ends(capsys, *argv):
    """Exit code, stdout and stderr of a command that exits."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return stop.value.code, out.out, out.err


def flat(text):
    """Without the frame that the command draws around its help and errors."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    cli.main(["long-tailed", *TINY, "--out", str(out)])
    return out / "ce" / "seed0"


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["60", "100"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(capsys, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", width)
    code, out, _ = ends(capsys, *[command] * bool(command), "--help")
    assert code == 0
    assert max(len(line) for line in out.splitlines() if line[:1] in "│╭╰") <= int(width)
    assert all(c in out for c in COMMANDS) if not command else f"ncmethods {command}" in out


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in COMMANDS:
        _, out, _ = ends(capsys, command, "--help")
        for line in out.splitlines():
            words = line.strip("│ ").split("  ", 1)
            if words[0].startswith("--") and len(words) == 2:
                assert len(words[1].split("(default")[0].strip()) > 8, line


def test_help_gives_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = ends(capsys, "long-tailed", "--help")
    for default in ("ce la etf-dr-balanced", "0 1 2", "fashion-mini", "small_cnn", "cosine"):
        assert f"(default: {default})" in out, default


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Missing subcommand"),
        (["long-taild"], "Available subcommands: long-tailed"),
        (["long-tailed", "--train.epoch", "3"], "--train.epochs"),
        (["long-tailed", "--train.epochs", "many"], "invalid literal"),
        (["long-tailed", "--train.epochs", "0"], "epochs must be at least 1"),
        (["long-tailed", "--train.schedule", "linear"], "cosine"),
        (["long-tailed", "--methods", "etf-dr-balance"], "Did you mean 'etf-dr-balanced'?"),
        (["long-tailed", "--methods"], "name at least one method and one seed"),
        (["long-tailed", "--seeds"], "name at least one method and one seed"),
        (["long-tailed", "--data.name", "fashion-mni"], "Did you mean 'fashion-mini'?"),
        (["long-tailed", "--data.imbalance", "0.5"], "must be a number ≥ 1"),
        (["long-tailed", "--data.groups", "3/3"], "add up to K = 10"),
        (["long-tailed", "--train.device", "gpu"], "Unknown device 'gpu'"),
        (["long-tailed", "--backbone", "small_cn"], "Did you mean 'small_cnn'?"),
        (["extract"], "required"),
        (["extract", "small_cnn", "digits"], "--out"),
        (["extract", "runs/nowhere", "digits", "--out", "x"], "is not a run directory"),
        (["extract", "torchvision:resnet17", "digits", "--out", "x"], "resnet1"),
        (["extract", "small_cnn", "digit", "--out", "x"], "Did you mean 'digits'?"),
        (["report", "runs/nowhere"], "runs/nowhere"),
        (["fetch", "fashion-mnits"], "Did you mean 'fashion-mnist'?"),
        (["fetch", "digits"], "needs no download"),
        (["copy", "long-tail"], "Did you mean 'long_tailed'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_code_2_and_a_sentence(capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    code, out, err = ends(capsys, *argv)
    assert code == 2
    assert said in flat(out + err)


def test_a_missing_dataset_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = ends(capsys, "long-tailed", "--data.name", "cifar10")
    assert code == 2
    assert "ncmethods fetch cifar10" in err


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = ends(capsys, "long-tailed", *TINY, "--out", tmp_path / "file" / "runs")
    assert code == 2
    assert "Cannot write" in err
    code, _, err = ends(capsys, "extract", "small_cnn", "digits", "--out", tmp_path / "file" / "x")
    assert code == 2
    assert "Cannot write" in err


def test_another_config_in_out(capsys, run):
    argv = ["long-tailed", *TINY, "--train.lr", "0.3", "--out", run.parents[1]]
    code, _, err = ends(capsys, *argv)
    assert code == 2
    assert "train.lr: 0.1 there, 0.3 now" in err


def test_a_mistake_does_not_take_the_directory(capsys, tmp_path):
    argv = ["long-tailed", *TINY, "--out", str(tmp_path)]
    code, _, _ = ends(capsys, *argv, "--backbone", "small_cn")
    assert code == 2
    cli.main(argv)
    assert "report:" in capsys.readouterr().out


def test_interrupted(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.TailConfig, "load", stop)
    code, _, err = ends(capsys, "long-tailed", *TINY)
    assert code == 130
    assert "goes on from its last checkpoint" in err


# --- what works -----------------------------------------------------------------------------------


def test_list(capsys):
    cli.main(["list"])
    out = capsys.readouterr().out
    for name in ("long-tailed", "fashion-mini", "digits", "etf_head", "dot_regression", "ldam-drw"):
        assert name in out
    assert "find_head" not in out
    assert "swap_head" not in out


def test_copy(capsys, tmp_path):
    cli.main(["copy", "long-tailed", str(tmp_path / "mine")])
    made = tmp_path / "mine" / "long_tailed.py"
    assert capsys.readouterr().out.strip() == str(made)
    assert made.read_bytes() == (ROOT / "recipes/long_tailed.py").read_bytes()
    code, _, err = ends(capsys, "copy", "long-tailed", tmp_path / "mine")
    assert code == 2
    assert "exists already" in err


def test_report(capsys, run):
    page = run / "report.html"
    page.unlink()
    cli.main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().count("<img") == 5


def test_report_of_what_is_no_run(capsys, run, tmp_path):
    code, _, err = ends(capsys, "report", run.parents[1])
    assert code == 2
    assert "run directory" in err
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    code, _, err = ends(capsys, "report", tmp_path)
    assert code == 2
    assert "is not a run directory" in err
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    code, _, err = ends(capsys, "report", tmp_path)
    assert code == 2
    assert "has not finished" in err


def test_extract_a_run(capsys, run, tmp_path):
    cli.main(["extract", str(run), "digits", "--out", str(tmp_path / "f.safetensors")])
    assert "features [" in capsys.readouterr().out
    found, saved = FeatureSet.load(tmp_path / "f.safetensors"), load_run(run)
    assert found.stats.counts.tolist() == saved.config["data"]["counts"]  # the long tail
    fields = ("name", "imbalance", "profile", "n_max", "seed")
    tail = data.TailConfig(**{k: saved.config["data"][k] for k in fields}).load()
    with torch.no_grad():
        out = saved.model(saved.preprocess(tail.train.images))
    torch.testing.assert_close(found.logits, out.logits)
    torch.testing.assert_close(found.features, out.features)
    assert torch.equal(found.labels, tail.train.labels)


def test_extract_a_run_on_its_test_set_and_on_other_data(capsys, run, tmp_path):
    file = tmp_path / "f.safetensors"
    cli.main(["extract", str(run), "digits", "--split", "test", "--out", str(file)])
    found = FeatureSet.load(file)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    hits = (found.logits.argmax(1) == found.labels).double().mean()
    assert float(hits) == pytest.approx(row["test/accuracy"])
    cli.main(["extract", str(run), "fashion-mini", "--split", "test", "--out", str(file)])
    assert FeatureSet.load(file).features.shape == (2000, 64)
    code, _, err = ends(capsys, "extract", run, "digits", "--weights", "a.pt", "--out", file)
    assert code == 2
    assert "its own weights" in err


def test_extract_named_models(capsys, tmp_path):
    file = str(tmp_path / "f.safetensors")
    cli.main(["extract", "small_cnn", "digits", "--split", "test", "--out", file])
    found = FeatureSet.load(file)
    assert found.dim == 64
    assert found.num_classes == 10
    assert found.logits is None
    hub = ["extract", "torchvision:resnet18", "digits", "--size", "32", "--split", "test"]
    cli.main([*hub, "--out", file])
    found = FeatureSet.load(file)
    assert found.dim == 512
    assert found.num_classes == 10
    assert found.logits is None  # of ImageNet's classes
    assert "logits" not in capsys.readouterr().out


def test_a_factory_in_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    cli.main(["extract", "my_nets:net", "digits", "--split", "test", "--out", "f.safetensors"])
    found = FeatureSet.load("f.safetensors")
    assert found.dim == 12
    assert found.logits.shape == (len(found), 10)


def test_as_a_module_and_as_a_script(tmp_path):
    script = Path(sys.executable).with_name("ncmethods")
    starts = [[sys.executable, "-m", "ncmethods"]] + [[str(script)]] * script.exists()
    for start in starts:
        done = subprocess.run(
            [*start, "fetch", "digitz"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(ncmethods.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: Unknown dataset 'digitz'. Did you mean 'digits'?")
        assert done.stdout == ""
