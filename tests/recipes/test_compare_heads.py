"""The comparison of heads: every method trains, and is what it is called."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ncmethods import cli, data, frames, heads, losses, models
from ncmethods.tracking import read_rows
from ncmethods.training import ModelConfig, TrainConfig, build_model

recipe = cli.load_recipe("compare_heads")
SHORT = TrainConfig(epochs=1, threads=1, device="cpu", measurements=1)
DIGITS = data.TailConfig("digits", profile="natural", imbalance=1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(out, methods, **options):
    options = {"seeds": (0,), "wandb": False, "data": DIGITS, "train": SHORT} | options
    recipe.main(recipe.CompareHeads(methods=methods, out=out, **options))


def test_every_method_gives_a_finite_table(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.viz, "draw_run", None)
    monkeypatch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
    methods = tuple(m for m in recipe.METHODS if m not in ("narrow", "softmax-code"))
    main(tmp_path, methods)
    accuracy, geometry, differences = (tmp_path / "table.md").read_text().strip().split("\n\n")
    for table in (accuracy, geometry):
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.split("\n")]
        assert [row[0] for row in lines[2:]] == list(methods)
        assert all(math.isfinite(float(cell)) for row in lines[2:] for cell in row[1:])
    assert differences.startswith("| minus linear |")
    for method in methods:
        assert read_rows(tmp_path / method / "seed0/metrics.jsonl")[-1]["test/accuracy"] > 0.1


def test_pages_and_the_rates_that_were_tried(tmp_path):
    main(tmp_path, ("linear", "guided"), lrs=(0.1, 0.2))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 4 + 2 * 3
    assert page.count("Differences to the first method, paired by seed") == 1
    assert {p.name for p in (tmp_path / "tuning/guided").iterdir()} == {"lr=0.1", "lr=0.2"}
    assert (tmp_path / "guided/seed0/report.html").exists()


def head_of(name, K=10):
    method = recipe.METHODS[name]
    config = ModelConfig("small_cnn", 1, K, method.head, dict(method.head_args))
    return build_model(config).head


def test_the_methods_are_what_they_are_called():
    features = torch.randn(12, 6).double()
    labels, weight = torch.arange(12) % 3, frames.simplex_etf(3, 6, dtype=torch.float64)
    logits = features @ weight.T
    for name, method in recipe.METHODS.items():
        if name == "etf-dr":
            assert method.loss(features, labels, weight) == losses.dot_regression(
                features, labels, weight, balance="batch"
            )
        else:
            assert method.loss(logits, labels) == F.cross_entropy(logits, labels)
    kinds = {
        "cosine": heads.CosineHead,
        "rotated": heads.RotatedHead,
        "guided": heads.GuidedHead,
        "class-mean": heads.ClassMeanHead,
    }
    for name, kind in kinds.items():
        assert type(head_of(name)) is kind
    assert isinstance(head_of("linear"), torch.nn.Linear)
    canonical = frames.simplex_etf(10, 64, rotation="canonical")
    torch.testing.assert_close(head_of("canonical").weight, canonical)
    orthogonal = head_of("orthogonal").weight
    assert (orthogonal >= 0).all()
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(10))


def test_a_softmax_code_where_no_simplex_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "softmax_code", partial(frames.softmax_code, steps=50))
    rows = head_of("softmax-code", K=80).weight
    assert rows.shape == (80, 64)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(80))


def test_narrow_has_as_many_features_as_classes():
    method = recipe.METHODS["narrow"]
    config = ModelConfig(method.backbone, 1, 10, method.head, dict(method.head_args))
    model = build_model(config)
    out = model(torch.zeros(2, 1, 28, 28))
    assert out.features.shape == out.logits.shape == (2, 10)
    assert (out.features >= 0).all()
    wide = models.build("torchvision:resnet18")
    weights = [sum(p.numel() for p in net.parameters()) for net in (model.backbone, wide)]
    weights[0] += 2 * 64 * 49  # one input channel instead of three
    weights[1] -= 513 * 1000
    assert 1 - weights[0] / weights[1] == pytest.approx(0.207, abs=5e-4)


def test_a_person_can_read_it():
    lines = Path(cli.recipes_dir(), "compare_heads.py").read_text().splitlines()
    assert len(lines) <= 120
