"""The contrastive recipe: its losses against what they claim, both stages, tables, resuming."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from torch.nn import functional as F

from ncmethods import cli, data, losses
from ncmethods._core import InputError
from ncmethods.training import TrainConfig, load_run
from ncmethods.training.sweep import CONTROL
from ncmethods.viz import ACCURACY, GEOMETRY

recipe = cli.load_recipe("contrastive")
TAIL = data.TailConfig(name="digits", imbalance=10, n_max=40)
SHORT = TrainConfig(epochs=1, views=2, crop=1, threads=1, device="cpu", measurements=1)
f64 = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_pages(monkeypatch):
    monkeypatch.setattr(recipe.viz, "draw_run", None)
    monkeypatch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)


def main(out, *methods, **options):
    config = recipe.Contrastive(
        methods=methods, seeds=(0,), out=out, wandb=False, data=TAIL, train=SHORT
    )
    recipe.main(replace(config, **options))


def last(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def tables(text):
    """The tables of table.md: a list of {method: {column: cell}}."""
    found = []
    for block in text.strip().split("\n\n"):
        head, _, *lines = ([c.strip() for c in r.strip("|").split("|")] for r in block.split("\n"))
        found.append({row[0]: dict(zip(head[1:], row[1:])) for row in lines})
    return found


# --- the losses -----------------------------------------------------------------------------------


def waves(*shape, phase=0.0):
    i = torch.arange(math.prod(shape), dtype=f64)
    return (torch.sin(1.7 * i + phase) + torch.cos(0.31 * i * i + phase)).reshape(shape)


def filled(module, phase):
    with torch.no_grad():
        for j, p in enumerate(module.parameters()):
            p.copy_(0.3 * waves(*p.shape, phase=phase + j))


def test_bcl_equals_the_authors_code():
    """The whole of it: MLPs of features and of rows, cosine classifier, both losses, 1 and 0.35.

    FlamieZhu/Balanced-Contrastive-Learning f72d070, run once in float64 with BCLModel (identity as
    the encoder, feat_dim 128), LogitAdjust on the logits of both views, and BalSCL at τ = 0.07.
    https://github.com/FlamieZhu/Balanced-Contrastive-Learning/blob/
    f72d0703794bcec8b00da86774c9d780dc721701/main.py and models/resnext.py, loss/ there.
    """
    K, D = 5, 6
    loss = recipe.BCL(K, D).double()
    filled(loss.project, 2.0), filled(loss.project_rows, 12.0)
    h, w = waves(14, D).requires_grad_(), waves(K, D, phase=1.0).requires_grad_()
    labels, counts = torch.tensor([0, 0, 1, 1, 1, 2, 0]).repeat(2), torch.tensor([50, 20, 9, 4, 2])
    value = loss(h, 30 * F.normalize(h) @ F.normalize(w).T, labels, w, counts)
    value.backward()
    assert value.item() == pytest.approx(18.102056378269996, rel=1e-12)
    assert h.grad.norm().item() == pytest.approx(4.330563005864003, rel=1e-10)
    assert w.grad.norm().item() == pytest.approx(3.2136604778233635, rel=1e-10)
    of_rows = torch.cat([p.grad.flatten() for p in loss.project_rows.parameters()]).norm()
    assert of_rows.item() == pytest.approx(0.4124565974432912, rel=1e-10)


@pytest.fixture
def batch():
    """Two views of nine images of four classes (none of class 3), features, classifier, counts."""
    noise = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]).repeat(2)
    h = torch.randn(18, 6, generator=noise, dtype=f64).requires_grad_()
    weight = torch.randn(4, 6, generator=noise, dtype=f64).requires_grad_()
    return h, labels, weight, torch.zeros(4, dtype=f64), torch.tensor([90, 30, 10, 3])


def test_supcon_la_is_the_sum_of_its_parts(batch):
    h, labels, weight, _, counts = batch
    loss, logits = recipe.SupConLA(4, 6).double(), h @ weight.T
    la = F.cross_entropy(logits + (counts / counts.sum()).log(), labels)
    contrast = losses.supcon(loss.project(h), labels, temperature=0.07)
    torch.testing.assert_close(loss(h, logits, labels, counts), la + 0.35 * contrast)


@pytest.mark.parametrize("kind", ["SupCon", "KCL", "TSC"])
def test_features_learn_from_the_contrast_alone_and_the_classifier_from_the_probe(batch, kind):
    h, labels, weight, bias, _ = batch
    loss = getattr(recipe, kind)(4, 6).double()
    torch.manual_seed(0)
    loss(h, labels, weight, bias, 2).backward()
    of_h, of_weight = h.grad.clone(), weight.grad.clone()
    h.grad = weight.grad = None
    torch.manual_seed(0)
    if kind == "TSC":  # its class means have moved: from the start again
        loss.centroids.zero_()
    loss.contrast(loss.project(h), labels, 2).backward()
    torch.testing.assert_close(of_h, h.grad)
    assert of_h.norm() > 1e-3
    F.cross_entropy(h.detach() @ weight.T, labels).backward()
    torch.testing.assert_close(of_weight, weight.grad)


def test_kcl_has_its_twin_and_six_positives(batch):
    """In classes of at most seven others, twin and six are all; in larger ones they are fewer."""
    h, labels, *_ = batch
    few = labels.clone()
    few[(torch.arange(18) % 9) == 3] = 3  # classes of six, six, four and two
    kcl, z = recipe.KCL(4, 6).double(), h.detach()
    torch.testing.assert_close(
        kcl.contrast(z, few, 2), losses.supcon(z, few, temperature=0.07), rtol=1e-12, atol=0
    )
    many = torch.zeros(18, dtype=torch.int64)
    drawn = {float(kcl.contrast(z, many, 2)) for _ in range(3)}
    assert len(drawn) == 3


def test_tsc_matches_targets_to_moving_class_means(batch):
    """Against numpy and all numberings, over three steps; a class that is not shown stays."""
    _, labels, *_ = batch
    tsc, noise = recipe.TSC(4, 6).double(), torch.Generator().manual_seed(2)
    cosines = (tsc.targets @ tsc.targets.T).numpy()
    np.testing.assert_allclose(cosines, np.full((4, 4), -1 / 3) + np.eye(4) * 4 / 3, atol=1e-6)
    means = np.zeros((4, recipe.WIDTH))
    for _ in range(3):
        z = torch.randn(18, recipe.WIDTH, generator=noise, dtype=f64)
        few = torch.where(labels == 0, 1, labels)  # as one class: up to eleven positives
        torch.manual_seed(0)
        value = tsc.contrast(z, few, 2)
        unit = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
        for c in (1, 2):
            mean = unit[few.numpy() == c].mean(0)
            means[c] = 0.9 * means[c] + 0.1 * mean / np.linalg.norm(mean)
            means[c] /= np.linalg.norm(means[c])
        np.testing.assert_allclose(tsc.centroids.numpy(), means, atol=1e-12)
        targets = tsc.targets.numpy()
        best = max(
            itertools.permutations(range(4)),
            key=lambda order: sum(means[c] @ targets[order[c]] for c in (1, 2)),
        )
        one, two, three, four = best
        values = []
        for order in (best, (four, two, three, one), (one, three, two, four)):
            torch.manual_seed(0)
            rows = tsc.targets[list(order)]
            values.append(losses.targeted_supcon(z, few, rows, views=2, temperature=0.07).item())
        assert value.item() == pytest.approx(values[0], rel=1e-12)
        assert values[1] == pytest.approx(values[0], rel=1e-12)  # targets of classes not shown
        assert abs(values[2] - values[0]) > 1e-3


def centroids_of(rank, world):
    torch.manual_seed(0)
    tsc, z = recipe.TSC(4, 6), torch.randn(12, recipe.WIDTH)
    labels = torch.tensor([0, 1, 2, 0, 1, 2] * 2)
    tsc.contrast(z[6 * rank : 6 * (rank + 1)] if world > 1 else z, labels[: 12 // world], 1)
    return tsc.centroids


def test_class_means_are_those_of_all_ranks():
    first, second = run_ranks(centroids_of, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, centroids_of(0, 1))


# --- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All methods and the control."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.viz, "draw_run", None)
        patch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
        main(out, *recipe.METHODS, control=True)
    return out


def test_every_method_both_stages_and_the_control_give_finite_tables(everything):
    accuracy, geometry, differences = tables((everything / "table.md").read_text())
    again = {name: [name, f"{name}-crt"] for name in recipe.TWO_STAGES}
    names = [n for name in recipe.METHODS for n in again.get(name, [name])] + [CONTROL]
    assert list(accuracy) == list(geometry) == names
    assert list(differences) == names[1:]
    assert list(accuracy["bcl"]) == list(ACCURACY)
    assert list(geometry["bcl"]) == list(GEOMETRY)
    for rows in (accuracy, geometry):
        for method, cells in rows.items():
            for column, cell in cells.items():
                assert cell == "–" or math.isfinite(float(cell)), (method, column)
    assert all((everything / name / "seed0/weights.safetensors").exists() for name in names)
    counts = {
        name: json.loads((everything / name / "seed0/config.json").read_text())["data"]["counts"]
        for name in ("bcl", CONTROL)
    }
    assert len(set(counts[CONTROL])) == 1
    assert 0 <= sum(counts["bcl"]) - sum(counts[CONTROL]) < 10


@pytest.mark.parametrize("name", recipe.TWO_STAGES)
def test_the_second_stage_keeps_the_backbone_and_has_another_classifier(everything, name):
    first, second = (load_run(everything / n / "seed0").model for n in (name, f"{name}-crt"))
    kept = first.backbone.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in second.backbone.state_dict().items())
    assert not torch.equal(first.head.weight, second.head.weight)
    record = json.loads((everything / f"{name}-crt/seed0/config.json").read_text())
    assert record["stage_one"]["method"] == name
    rows = [last(everything / n / "seed0") for n in (name, f"{name}-crt")]
    assert rows[0]["train/nc1/pinv"] == pytest.approx(rows[1]["train/nc1/pinv"], rel=1e-4)


def test_all_see_two_views(everything):
    for name in recipe.METHODS:
        record = json.loads((everything / name / "seed0/config.json").read_text())
        assert record["train"]["views"] == 2, name


def test_started_again_it_prints_the_same_and_trains_nothing(everything, capsys):
    kept = (everything / "table.md").read_text()
    files = {p: p.stat().st_mtime_ns for p in everything.rglob("*.safetensors")}
    main(everything, *recipe.METHODS, control=True)
    assert kept in capsys.readouterr().out + "\n"
    assert {p: p.stat().st_mtime_ns for p in everything.rglob("*.safetensors")} == files


def test_with_even_sampling_the_classifier_is_even_already(tmp_path):
    main(tmp_path, "ce", train=replace(SHORT, sampling="balanced"))
    (accuracy, *_) = tables((tmp_path / "table.md").read_text())
    assert list(accuracy) == ["ce"]


def test_learning_rates_are_chosen_for_each_method(tmp_path):
    main(tmp_path, "ce", "supcon", lrs=(0.01, 0.1), data=replace(TAIL, imbalance=3))
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    assert list(tuned) == ["ce", "supcon"]
    assert all(set(of["held-out accuracy"]) == {"lr=0.01", "lr=0.1"} for of in tuned.values())


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"Did you mean 'bcl'\?"):
        main(tmp_path, "bcll")
    with pytest.raises(InputError, match="2 views without crop or flip"):
        main(tmp_path, "bcl", train=replace(SHORT, crop=0))


def test_defaults():
    config = recipe.Contrastive()
    assert config.methods == ("ce", "la", "la-cosine", "bcl", "supcon")
    assert config.seeds == (0, 1, 2)
    assert (config.train.views, config.train.crop, config.train.flip) == (2, 2, True)
    assert config.data == data.TailConfig()


def test_the_help_names_every_method():
    lines = Path(cli.recipes_dir(), "contrastive.py").read_text()
    shown = lines.split("class Contrastive")[1].split("seeds:")[0]
    assert set(recipe.METHODS) <= set(re.findall(r"[a-z-]+", shown))
