"""The long-tailed recipe: every method, the tables, the pages, and what a run records."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ncmethods import cli, data, losses
from ncmethods.training import TrainConfig
from ncmethods.training.sweep import CONTROL
from ncmethods.viz import ACCURACY, GEOMETRY

long_tailed = cli.load_recipe("long_tailed")
FILE = Path(cli.recipes_dir(), "long_tailed.py")
TAIL = data.TailConfig(name="digits", imbalance=10)
SHORT = TrainConfig(epochs=2, threads=1, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(out, methods, *, tail=TAIL, train=SHORT, seeds=(0,), control=False, wandb=False):
    long_tailed.main(
        long_tailed.LongTailed(
            methods=methods,
            seeds=seeds,
            out=out,
            control=control,
            wandb=wandb,
            data=tail,
            train=train,
        )
    )


def last(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def table(text):
    """The tables of table.md: a list of {method: {column: cell}}."""
    found = []
    for block in text.strip().split("\n\n"):
        head, _, *lines = (
            [c.strip() for c in row.strip("|").split("|")] for row in block.split("\n")
        )
        found.append({row[0]: dict(zip(head[1:], row[1:])) for row in lines})
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All methods and the control; the pages are left out."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_tailed.viz, "draw_run", None)
        patch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
        main(out, tuple(long_tailed.METHODS), control=True)
    return out


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """One method with pages."""
    out = tmp_path_factory.mktemp("two")
    main(out, ("ce",), seeds=(0, 1))
    return out


def test_every_method_and_the_control_give_finite_tables(everything):
    accuracy, geometry, *_ = table((everything / "table.md").read_text())
    names = [*long_tailed.METHODS, CONTROL]
    assert list(accuracy) == list(geometry) == names
    assert list(accuracy["ce"]) == list(ACCURACY)
    assert list(geometry["ce"]) == list(GEOMETRY)
    for rows in (accuracy, geometry):
        for method, cells in rows.items():
            for column, cell in cells.items():
                # Digits have no class with fewer than 20 images left.
                assert cell == "–" or math.isfinite(float(cell)), (method, column)
    for name in names:
        run = everything / name / "seed0"
        assert all(v is None or math.isfinite(v) for v in last(run).values())
        text = (run / "metrics.jsonl").read_text()
        assert not any(word in text for word in (str(everything), "time", "host", "second"))


def test_mean_sd_and_pages(two_seeds):
    accuracy, _ = table((two_seeds / "table.md").read_text())
    mean, sd = map(float, accuracy["ce"]["all %"].split(" ± "))
    one, two = (100 * last(two_seeds / "ce" / f"seed{s}")["test/accuracy"] for s in (0, 1))
    assert mean == pytest.approx((one + two) / 2, abs=0.06)
    assert sd == pytest.approx(abs(one - two) / math.sqrt(2), abs=0.06)
    page = (two_seeds / "report.html").read_text()
    assert "Comparison" in page
    assert "paired by seed" not in page  # there is one method
    for seed in (0, 1):
        page = (two_seeds / "ce" / f"seed{seed}" / "report.html").read_text()
        assert page.count("<img") == 5


def test_fixed_rows_stay_where_the_head_put_them(everything):
    row = last(everything / "etf-dr" / "seed0")
    assert row["train/angle/rare_weight_min"] == pytest.approx(math.degrees(math.acos(-1 / 9)))


def test_the_control_has_as_many_images(everything):
    config = json.loads((everything / CONTROL / "seed0/config.json").read_text())
    tail = json.loads((everything / "ce/seed0/config.json").read_text())
    counts = config["data"]["counts"]
    assert len(set(counts)) == 1
    assert 0 <= sum(tail["data"]["counts"]) - sum(counts) < 10
    assert config["data"]["groups"] == tail["data"]["groups"]  # accuracies of the same classes


def test_started_again_it_prints_the_same(two_seeds, capsys):
    kept = (two_seeds / "table.md").read_text()
    main(two_seeds, ("ce",), seeds=(0, 1))
    assert kept in capsys.readouterr().out + "\n"
    assert (two_seeds / "table.md").read_text() == kept


@pytest.mark.parametrize(
    ("profile", "groups", "names"),
    [("exp", "3/4/3", ("many", "medium", "few")), ("step", "5/5", ("many", "few"))],
)
def test_groups(tmp_path, capsys, monkeypatch, profile, groups, names):
    monkeypatch.setattr(long_tailed.viz, "draw_run", None)
    tail = replace(TAIL, profile=profile, groups=groups)
    main(tmp_path, ("ce",), tail=tail, train=replace(SHORT, epochs=1))
    row, config = (
        last(tmp_path / "ce/seed0"),
        json.loads((tmp_path / "ce/seed0/config.json").read_text()),
    )
    sizes = [int(size) for size in groups.split("/")]
    found = config["data"]["groups"]
    assert [len(found[name]) for name in names] == sizes
    assert list(itertools.chain(*found.values())) == list(
        range(10)
    )  # ranked by count, as the tail is made
    by_class = torch.tensor([row[f"test/accuracy/{name}"] for name in names])
    assert float(by_class @ torch.tensor(sizes).float()) / 10 == pytest.approx(
        mean_of_classes(tmp_path / "ce/seed0"), abs=1e-6
    )
    assert "test/accuracy/many_by_count" in row  # the field's rule stands beside the ranks
    shown = capsys.readouterr().out
    assert all(f"{n}: classes {', '.join(map(str, found[n]))}\n" in shown for n in names)
    # rare = the last group, for angles alike
    from safetensors.torch import load_file

    from ncmethods.metrics import min_angle

    rows = load_file(tmp_path / "ce/seed0/evaluation.safetensors")["weight"][found["few"]]
    assert row["train/angle/rare_weight_min"] == pytest.approx(float(min_angle(rows)), abs=1e-3)


def mean_of_classes(run):
    from safetensors.torch import load_file

    confusion = load_file(run / "evaluation.safetensors")["confusion"].double()
    return float((confusion.diagonal() / confusion.sum(1)).mean())


def test_defaults():
    config = long_tailed.LongTailed()
    assert config.methods == ("ce", "la", "etf-dr-balanced")
    assert config.seeds == (0, 1, 2)
    assert config.wandb
    assert not config.control
    assert (config.data.name, config.data.imbalance) == ("fashion-mini", 100)
    tail = config.data.load()
    assert data.class_counts(tail.train).tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert len(tail.test) == 2000


def test_the_methods_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 6, generator=generator)
    labels, weight = torch.arange(12) % 3, torch.randn(3, 6, generator=generator)
    logits, counts = features @ weight.T, torch.tensor([90, 30, 10])
    loss = {name: method.loss for name, method in long_tailed.METHODS.items()}
    assert loss["ce"](logits, labels) == F.cross_entropy(logits, labels)
    prior = (counts / counts.sum()).log()
    torch.testing.assert_close(
        loss["la"](logits, labels, counts), F.cross_entropy(logits + prior, labels)
    )
    args = (features, labels, weight)
    assert loss["etf-dr"](*args) == losses.dot_regression(*args, balance="none")
    assert loss["etf-dr-balanced"](*args) == losses.dot_regression(*args, balance="batch")
    early, late = (loss["ldam-drw"](logits, labels, counts, e, 10) for e in (7, 8))
    assert early == losses.ldam(logits, labels, counts)
    weights = losses.drw_weights(counts)
    assert late == losses.ldam(logits, labels, counts, class_weight=weights)
    heads = {name: method.head for name, method in long_tailed.METHODS.items()}
    assert heads.pop("ldam-drw") == "cosine_head"
    assert all((head == "etf_head") == name.startswith("etf") for name, head in heads.items())


def test_weights_of_the_terms():
    """Each method with a term is its loss without it, and so much of the term."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(12, 6, generator=generator), torch.arange(12) % 3
    logits, counts = torch.randn(12, 3, generator=generator), torch.tensor([90, 30, 10])
    loss = {name: method.loss for name, method in long_tailed.METHODS.items()}
    plain = F.cross_entropy(logits, labels)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    within = (features - means[labels]).square().sum(1).mean()
    apart = means - means.mean(0)
    share = within / (within + apart.square().sum(1).mean())
    unit, rows, lengths = F.normalize(features), F.normalize(apart), apart.norm(dim=1)
    nearest = torch.cdist(unit, unit).fill_diagonal_(9).min(1).values
    angles = (rows @ rows.T).fill_diagonal_(-1).max(1).values.acos()
    added = {
        "collapse": 0.1 * share,
        "anti-collapse": -0.1 * share,
        "koleo": -0.05 * nearest.log().mean(),
        "centres-live": 0.01 * within - 0.1 * angles.mean(),
        "norms": 0.1 * lengths.var(correction=0) / lengths.mean() ** 2,
    }
    for name, term in added.items():
        torch.testing.assert_close(loss[name](features, logits, labels), plain + term)
    torch.testing.assert_close(
        loss["spectral-decoupling"](logits, labels), plain + 0.01 * logits.square().sum(1).mean()
    )
    decay = 0.005 * features.square().sum(1).mean()
    adjusted = F.cross_entropy(logits + counts.log(), labels)
    torch.testing.assert_close(
        loss["etf-la-tikhonov"](features, logits, labels, counts), adjusted + decay
    )
    torch.testing.assert_close(
        loss["cdt"](logits, labels, counts),
        F.cross_entropy(logits * (counts / 90) ** 0.3, labels),
    )
    torch.testing.assert_close(
        loss["smoothing"](logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    torch.testing.assert_close(
        loss["bce"](logits, labels),
        3 * F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float()),
    )


def test_help_and_card_name_every_method(capsys):
    with pytest.raises(SystemExit):
        cli.main(["long-tailed", "--help"])
    words = re.findall(r"[\w-]+", capsys.readouterr().out)
    card = (FILE.parents[1] / "docs/methods/long-tailed.md").read_text("utf-8")
    table = re.findall(r"^\| `([\w-]+)` \|", card.split("## Use in your loop")[0], re.M)
    assert table == list(long_tailed.METHODS)
    assert set(table) <= set(words)


def test_wandb_is_named_only_where_it_is_fed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    short = replace(SHORT, epochs=1)
    main(tmp_path / "with", ("ce",), train=short, wandb=True)
    assert "wandb sync" in capsys.readouterr().out
    assert list((tmp_path / "with/ce/seed0/wandb").glob("offline-run-*"))
    monkeypatch.setattr(long_tailed.viz, "draw_run", None)
    main(tmp_path / "without", ("ce",), train=short)
    assert "W&B" not in capsys.readouterr().out
    assert not (tmp_path / "without/ce/seed0/wandb").exists()


def test_a_person_can_read_it():
    lines = FILE.read_text().splitlines()
    assert len(lines) <= 175
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_a_hub_backbone_on_grey_images(tmp_path):
    out = str(tmp_path)
    argv = ["long-tailed", "--backbone", "torchvision:resnet18", "--data.name", "digits"]
    argv += ["--data.imbalance", "10", "--train.epochs", "1", "--methods", "etf-ce", "--seeds", "0"]
    cli.main([*argv, "--no-wandb", "--data.size", "32", "--out", out])
    assert math.isfinite(last(tmp_path / "etf-ce/seed0")["train/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_default_data_learns(tmp_path, threads):
    tail = data.TailConfig()
    train = replace(SHORT, epochs=20, threads=threads)
    main(tmp_path, ("ce", "etf-dr-balanced"), tail=tail, train=train)
    rows = {m: last(tmp_path / m / "seed0") for m in ("ce", "etf-dr-balanced")}
    assert rows["ce"]["test/accuracy"] > 0.6
    few = "test/accuracy/few"
    assert rows["etf-dr-balanced"][few] > rows["ce"][few]
