"""The stage-two recipe: what it makes of finished runs, keeps, refuses and warns of."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ncmethods import cli, data, features, training
from ncmethods._core import CheckpointError, InputError
from ncmethods.tracking import read_rows
from ncmethods.training import TrainConfig, stage_two
from ncmethods.training.cached import CachedRun, check_one_method
from ncmethods.viz import ACCURACY, GEOMETRY

recipe, long_tailed = cli.load_recipe("stage_two"), cli.load_recipe("long_tailed")
TAIL = data.TailConfig("digits", imbalance=10, n_max=60)
SHORT = TrainConfig(epochs=3, threads=1, device="cpu", measurements=1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """OUT of ``ncmethods long-tailed``: linear and cosine heads, with and without a correction."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_tailed.viz, "draw_run", None)
        patch.setattr(long_tailed.viz, "write_comparison", lambda *args, **kwargs: "")
        for methods, seeds in ((("ce",), (0, 1)), (("la", "ldam-drw", "etf-ce"), (0,))):
            config = long_tailed.LongTailed(
                methods=methods, seeds=seeds, out=out, wandb=False, data=TAIL, train=SHORT
            )
            long_tailed.main(config)
    return out


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    """Every method on two seeds; the page is left out."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
        main(out, runs, methods=recipe.METHODS)
    return out


def main(out, runs, *names, **options):
    names = names or ("ce/seed0", "ce/seed1")
    config = recipe.StageTwo(runs=tuple(runs / n for n in names), out=out, device="cpu")
    recipe.main(replace(config, **options))


def last(place):
    return read_rows(place / "metrics.jsonl")[-1]


def cells(block):
    head, _, *lines = ([c.strip() for c in r.strip("|").split("|")] for r in block.split("\n"))
    return {row[0]: dict(zip(head[1:], row[1:])) for row in lines}


def test_tables_begin_with_the_runs_own_classifier(runs, done):
    accuracy, geometry, minus = map(cells, (done / "table.md").read_text().strip().split("\n\n"))
    assert list(accuracy) == list(geometry) == ["ce", *recipe.METHODS]
    assert list(minus) == list(recipe.METHODS)
    assert list(accuracy["crt"]) == list(ACCURACY)
    assert list(geometry["crt"]) == list(GEOMETRY)
    own = [100 * last(runs / f"ce/seed{s}")["test/accuracy"] for s in (0, 1)]
    shown = float(accuracy["ce"]["all %"].split(" ± ")[0])
    assert shown == pytest.approx(sum(own) / 2, abs=0.06)
    for method in recipe.METHODS:
        row = last(done / method / "seed1")
        assert all(v is None or math.isfinite(v) for v in row.values())
        # Features stay as they are, so all that depends on them alone does.
        for key in ("train/nc1/pinv", "test/nc1/pinv", "train/angle/rare_means_min"):
            assert row[key] == pytest.approx(last(runs / "ce/seed1")[key], rel=1e-4)


def test_a_result_reads_like_a_run(runs, done):
    splits = replace(TAIL, seed=0).load()
    for method in recipe.METHODS:
        place = done / method / "seed0"
        found = training.load_run(place)
        assert found.config["method"] == method
        assert found.config["stage_one"]["method"] == "ce"
        with torch.no_grad():
            out = found.model(found.preprocess(splits.test.images))
        hits = (out.logits.argmax(1) == splits.test.labels).double().mean()
        assert float(hits) == pytest.approx(last(place)["test/accuracy"])
        kept = features.FeatureSet.load(
            next((done / "features").glob("seed0-*")) / "test.safetensors"
        )
        torch.testing.assert_close(kept.features, out.features, rtol=1e-4, atol=1e-5)
    assert load_file(done / "tau-norm/seed0/head.safetensors").keys() == {"weight"}


def test_the_methods_are_what_they_are_called(runs, done):
    run = CachedRun(runs / "ce/seed0", done / "features")
    train, test = run.features("train"), run.features("test")
    head, counts = run.model.head, torch.tensor(run.data["counts"])
    prior = counts / counts.sum()
    assert torch.equal(data.class_counts(train.labels), counts)
    torch.testing.assert_close(train.logits, head(train.features).detach(), rtol=1e-4, atol=1e-4)

    def made(name):
        return load_file(done / name / "seed0/head.safetensors")

    torch.testing.assert_close(made("post-hoc")["bias"], head.bias.detach() - prior.log())
    torch.testing.assert_close(made("post-hoc")["weight"], head.weight.detach())
    unit = torch.nn.functional.normalize(head.weight.detach())
    torch.testing.assert_close(made("tau-norm")["weight"], unit)
    torch.testing.assert_close(made("ncm")["weight"], train.stats.means.float())
    torch.testing.assert_close(made("crt")["weight"], stage_two.crt(train).weight.detach())
    direction = torch.nn.functional.cosine_similarity(made("lws")["weight"], head.weight)
    torch.testing.assert_close(direction, torch.ones(10))
    direction = torch.nn.functional.cosine_similarity(made("las")["weight"], head.weight)
    assert (direction < 1 - 1e-5).any()
    norms = made("weight-balancing")["weight"].norm(dim=1)
    assert norms.max() <= stage_two.norm_limit(head.weight) * (1 + 1e-5)
    distance = torch.cdist(test.features, train.stats.means.float())
    hits = (distance.argmin(1) == test.labels).double().mean()
    assert float(hits) == pytest.approx(last(done / "ncm/seed0")["test/accuracy"])


def test_repeated_it_reads_what_is_there(runs, done, capsys, monkeypatch):
    kept = (done / "table.md").read_text()

    def never(*args, **kwargs):
        raise AssertionError("this was there already")

    monkeypatch.setattr(recipe, "classifier", never)
    monkeypatch.setattr("ncmethods.training.cached.extract", never)
    monkeypatch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
    main(done, runs, methods=recipe.METHODS)
    assert kept in capsys.readouterr().out + "\n"
    assert (done / "table.md").read_text() == kept
    with pytest.raises(CheckpointError, match=r"tau-norm.seed0 holds .* other settings"):
        main(done, runs, methods=("tau-norm",), tau=0.5)


def test_what_was_killed_is_made_again_to_the_same_bytes(runs, done, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.viz, "write_comparison", lambda *args, **kwargs: "")
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    place = out / "weight-balancing/seed0"
    names = ("config.json", "metrics.jsonl", "weights.safetensors", "evaluation.safetensors")
    kept = {name: (place / name).read_bytes() for name in names}
    (place / "metrics.jsonl").unlink()  # the last file that is written
    (place / "weights.safetensors").write_bytes(b"torn")
    main(out, runs, methods=("weight-balancing",))
    assert {name: (place / name).read_bytes() for name in names} == kept
    assert not list(out.rglob("*.tmp"))


def test_another_run_under_the_same_out_is_refused(runs, done, tmp_path):
    other = tmp_path / "ce" / "seed0"
    shutil.copytree(runs / "ce/seed1", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 0}))
    with pytest.raises(CheckpointError, match="another run"):
        main(done, tmp_path, "ce/seed0", methods=("crt",))


# --- choosing τ ----------------------------------------------------------------------------------


def test_tau_is_chosen_on_images_that_nobody_saw(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe.viz, "write_comparison", lambda *args, **kwargs: "")
    run = CachedRun(runs / "ce/seed0", tmp_path / "features")
    seen, held_out = run.features("train"), run.unseen(5)
    assert data.class_counts(held_out.labels).tolist() == [5] * 10
    assert torch.cdist(held_out.features, seen.features).min() > 0
    images = replace(TAIL, seed=0, profile="balanced", n_max=70).load()
    pool = run.model(training.load_run(runs / "ce/seed0").preprocess(images.train.images))
    distance = torch.cdist(held_out.features, pool.features.detach()).min(1).values
    assert distance.max() < 1e-3  # all are of the dataset's training set

    def no_test(self, split, features=CachedRun.features):
        assert split == "train", "tau was chosen on the test images"
        return features(self, split)

    with monkeypatch.context() as patch:
        patch.setattr(CachedRun, "features", no_test)
        tau = recipe.chosen_tau(run, 5)
    assert tau == stage_two.pick_tau(run.model.head, held_out)[0]
    main(tmp_path, runs, "ce/seed0", methods=("tau-norm",), held_out=5)
    assert f"seed 0: tau = {tau}, held-out accuracy" in capsys.readouterr().out
    assert last(tmp_path / "tau-norm/seed0")["stage_two/tau"] == tau


def test_without_images_left_it_warns(runs, tmp_path):
    run = CachedRun(runs / "ce/seed0", tmp_path)
    run.data |= {"counts": [1000] * 10, "order": None}
    assert run.unseen(3) is None
    run = CachedRun(runs / "ce/seed0", tmp_path)
    run.unseen = lambda per_class: None
    with pytest.warns(UserWarning, match="network was trained on, which says little"):
        tau = recipe.chosen_tau(run, 3)
    held_out = stage_two.hold_out_features(run.features("train"), seed=0)[1]
    assert tau == stage_two.pick_tau(run.model.head, held_out)[0]


# --- what is refused and warned of ---------------------------------------------------------------


def test_heads_that_are_not_linear(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.viz, "write_comparison", lambda *args, **kwargs: "")
    with pytest.raises(InputError, match=r"those of CosineHead are not. crt and ncm make"):
        main(tmp_path, runs, "ldam-drw/seed0", methods=("ncm", "tau-norm"))
    assert not list(tmp_path.iterdir())  # said before anything was made
    for name, neck in (("ldam-drw", False), ("etf-ce", True)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            main(tmp_path / name, runs, f"{name}/seed0", methods=("ncm",))
        place = tmp_path / name / "ncm/seed0"
        assert last(place)["test/accuracy"] > 0.2
        # With a neck between, the new rows do not act on what the backbone gives.
        assert (place / "weights.safetensors").exists() != neck
    assert training.load_run(tmp_path / "ldam-drw/ncm/seed0").config["model"]["head"] == "linear"


@pytest.mark.parametrize("method", ["la", "ldam-drw"])
def test_two_prior_corrections_warn_by_name(runs, tmp_path, method):
    run = CachedRun(runs / method / "seed0", tmp_path)
    with pytest.warns(UserWarning, match=rf"at once: stage one \({method}\) and crt both"):
        recipe.check_methods(run, ("crt", "ncm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe.check_methods(run, ("ncm",))
        recipe.check_methods(CachedRun(runs / "ce/seed0", tmp_path), ("crt", "post-hoc"))
        run.data["counts"] = [20] * 10  # the balanced control
        recipe.check_methods(run, ("crt",))
    run = CachedRun(runs / "ce/seed0", tmp_path)
    run.config["train"]["sampling"] = "balanced"
    with pytest.warns(UserWarning, match=r"\(ce, balanced sampling\) and post-hoc both"):
        recipe.check_methods(run, ("post-hoc",))


def test_runs_that_do_not_go_together(runs, tmp_path):
    with pytest.raises(InputError, match=r"ce.seed0 and .*la.seed0 .*method: 'ce' and 'la'"):
        main(tmp_path, runs, "ce/seed0", "la/seed0")
    with pytest.raises(InputError, match=r"Each seed may come once, got .*\[0, 0\]"):
        main(tmp_path, runs, "ce/seed0", "ce/seed0")
    with pytest.raises(InputError, match="at least one run directory"):
        recipe.main(recipe.StageTwo(runs=(), out=tmp_path, device="cpu"))
    one, two = (CachedRun(runs / f"ce/seed{s}", tmp_path) for s in (0, 1))
    for key, value in (("imbalance", 50), ("classes", ["a"]), ("name", "cifar10")):
        changed = CachedRun(runs / "ce/seed1", tmp_path)
        changed.data[key] = value
        with pytest.raises(InputError, match=rf"\(data.{key}: "):
            check_one_method([one, changed])
    check_one_method([one, two])


def test_runs_that_cannot_be_used(runs, tmp_path):
    with pytest.raises(CheckpointError, match="is not a run directory"):
        main(tmp_path / "out", tmp_path)
    half = tmp_path / "ce/seed0"
    half.mkdir(parents=True)
    shutil.copy(runs / "ce/seed0/config.json", half)
    with pytest.raises(CheckpointError, match="has not finished"):
        main(tmp_path / "out", tmp_path, "ce/seed0")
    run = CachedRun(runs / "ce/seed0", tmp_path / "features")
    run.data["counts"][0] -= 1
    with pytest.raises(InputError, match="other images than those that"):
        run.features("train")


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("crtt",), "Did you mean 'crt'"),
        ((), "at least one method"),
        (("crt", "crt"), "none twice"),
    ],
)
def test_methods_by_name(runs, tmp_path, methods, said):
    with pytest.raises(InputError, match=said):
        main(tmp_path, runs, methods=methods)


def test_on_the_command_line(runs, tmp_path, capsys):
    argv = ["stage-two", str(runs / "ce/seed0"), "--methods", "post-hoc", "--device", "cpu"]
    cli.main([*argv, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "post-hoc seed 0: accuracy" in said
    assert f"report: {tmp_path / 'report.html'}" in said
    assert (tmp_path / "report.html").read_text().count("<img") == 4 + 3 * 2
    with pytest.raises(SystemExit):
        cli.main(["stage-two", "--help"])
    assert "RUN [RUN ...]" in capsys.readouterr().out
    cli.main(["list"])
    assert f"methods of stage-two: {', '.join(recipe.METHODS)}" in capsys.readouterr().out


def test_a_person_can_read_it():
    lines = Path(cli.recipes_dir(), "stage_two.py").read_text().splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 100
