"""`ncmethods ood` and `ncmethods score`, end to end on a tiny run."""

import csv
import json

import pytest
import torch
from PIL import Image

from ncmethods import cli, data, losses, ood, viz
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.training import CachedRun, loop

OOD, SCORE = cli.load_recipe("ood_detection"), cli.load_recipe("score")
TRAIN = ["--train.epochs", "6", "--train.threads", "1", "--train.device", "cpu"]
DATA = ["--data.n-max", "60", "--data.validation", "40"]
FEW = ["msp", "relative", "knn", "neco"]


def run_ood(out, *more):
    cli.main([
        "ood", "--methods", "ce", "--seeds", "0", "--no-wandb", "--ood", "gratings",
        "--out", str(out), *TRAIN, *DATA, *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("ood")
    run_ood(out, "--scorers", *FEW)
    return out


def rows(out, name="ce-seed0"):
    return json.loads((out / "scores" / f"{name}.json").read_text())["rows"]


def test_classes_left_out_are_near_and_were_never_trained_on(trained):
    found = rows(trained)
    assert list(found) == FEW
    run = CachedRun(trained / "ce" / "seed0", trained / "features")
    assert run.data["without"] == ["Coat", "Sneaker"]
    assert "Coat" not in run.data["classes"]
    assert len(run.counts) == 8
    for row in found.values():
        assert {"Coat/auroc", "Sneaker/auroc", "gratings/auroc", "near/auroc"} <= set(row)
        assert row["near/auroc"] == pytest.approx(
            (row["Coat/auroc"] + row["Sneaker/auroc"]) / 2, abs=1e-12
        )
        assert row["far/auroc"] == row["gratings/auroc"]
        assert 0 <= row["false_alarms"] <= row["false_alarms/worst_class"] <= 1
    held_out, test, note = run.calibration()
    assert (len(held_out), note) == (8 * 40, "")
    assert len(test) == len(run.features("test"))


def test_numbers_are_those_of_the_features(trained):
    run = CachedRun(trained / "ce" / "seed0", trained / "features")
    scorer = ood.fit("neco", run.features("train"), run.model.head)
    test, calibration = run.features("test"), run.calibration()[0]
    images = data.outliers("gratings", (1, 28, 28), n=2000)
    far = run.images("again", images)
    with torch.no_grad():
        s, t = scorer(test.features), scorer(far.features)
        flag = ood.Threshold.fit(scorer(calibration.features), 0.05)
    row = rows(trained)["neco"]
    assert row["gratings/auroc"] == pytest.approx(float(ood.auroc(s, t)), abs=1e-12)
    assert row["gratings/found"] == pytest.approx(float(flag(t).double().mean()), abs=1e-12)
    assert row["false_alarms"] == pytest.approx(float(flag(s).double().mean()), abs=1e-12)


def test_pages_and_a_second_call(trained, capsys, monkeypatch):
    assert "relative" in (trained / "table.md").read_text()
    for page in (trained / "report.html", trained / "scores" / "ce-seed0.html"):
        assert "<img" in page.read_text() or page.name == "report.html"
    monkeypatch.setattr(ood, "fit", None)  # nothing is fitted again
    run_ood(trained, "--scorers", *FEW)
    assert "| knn" in capsys.readouterr().out


def test_finished_runs_of_any_recipe(trained, tmp_path, capsys):
    run = trained / "ce" / "seed0"
    cli.main([
        "ood", "--run", str(run), "--ood", "flat", "digits", "--scorers", "energy", "--no-wandb",
        "--out", str(tmp_path), "--alpha", "0.1",
    ])  # fmt: skip
    assert {"flat/auroc", "digits/found"} <= set(rows(tmp_path)["energy"])
    assert "energy" in capsys.readouterr().out


def test_mistakes(tmp_path, capsys):
    for more, said in (
        (["--scorers", "nneco"], "Did you mean 'neco'"),
        (["--data.without", "Coats"], "Did you mean 'Coat'"),
        (["--ood", "grating"], "Did you mean 'gratings'"),
        (["--methods", "oe", "--ood", "flat", "photos"], "saw photos as outliers in training"),
    ):
        with pytest.raises(SystemExit):
            run_ood(tmp_path, *more)
        assert said in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    images = data.load("fashion-mini").test
    place = tmp_path / "images"
    (place / "below").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(images.images[i, 0].numpy()).save(place / f"{i:02}.png")
    stripes = data.outliers("gratings", (3, 40, 60), n=4)
    for i, image in enumerate(stripes):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / "below" / f"x,{i}.jpg")
    (place / "bad.png").write_bytes(b"no image")
    (place / "read me.txt").write_text("not an image")
    return place


def score(trained, folder, out, *more):
    cli.main([
        "score", "--run", str(trained / "ce" / "seed0"), "--images", str(folder), "--out", str(out),
        "--features", str(trained / "features"), "--device", "cpu", *more,
    ])  # fmt: skip


def test_score_a_folder(trained, folder, tmp_path, capsys):
    out = tmp_path / "new" / "scores.csv"
    score(trained, folder, out, "--scorer", "knn")
    found = list(csv.DictReader(out.read_text("utf-8").splitlines()))
    assert len(found) == 25
    bad = next(row for row in found if row["path"].endswith("bad.png"))
    assert (bad["flag"], bad["score"]) == ("1", "")
    assert "cannot be read" in bad["note"]
    run = CachedRun(trained / "ce" / "seed0", trained / "features")
    scorer = ood.fit("knn", run.features("train"))
    images = data.load("fashion-mini").test.images[:20]
    want = scorer(run.images("first", images).features)
    got = [float(row["score"]) for row in found if row["path"][-6:-4].isdigit()]
    torch.testing.assert_close(torch.tensor(got), want.float(), rtol=1e-4, atol=1e-5)
    for row in found:
        if row["score"]:
            assert (float(row["p_value"]) <= 0.05) == (row["flag"] == "1")
            assert row["label"] in run.data["classes"]
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size[0] > 300
    assert "25 files" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["scores.csv", "scores.png"]


def test_score_goes_on_where_it_was_stopped(trained, folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "scores.jsonl"
    score(trained, folder, whole, "--batch-size", "4", "--sheet", "0")
    judged = []
    rows_of = SCORE.rows_of

    def stops(judge, paths, pool):
        judged.extend(paths)
        if len(judged) > 12:
            raise KeyboardInterrupt
        return rows_of(judge, paths, pool)

    monkeypatch.setattr(SCORE, "rows_of", stops)
    with pytest.raises(SystemExit):
        score(trained, folder, out, "--batch-size", "4", "--sheet", "0")
    part = tmp_path / "scores.jsonl.part"
    with part.open("a") as file:
        file.write('{"path": "torn')
    assert not out.exists()
    monkeypatch.setattr(SCORE, "rows_of", rows_of)
    with pytest.raises(SystemExit):  # other settings
        score(trained, folder, out, "--alpha", "0.2")
    score(trained, folder, out, "--batch-size", "4", "--sheet", "0")
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_score_a_list_and_its_mistakes(trained, folder, tmp_path, capsys):
    paths = tmp_path / "files.txt"
    paths.write_text(f"{folder / '03.png'}\n\n{folder / 'gone.png'}\n", encoding="utf-8")
    out = tmp_path / "s.jsonl"
    score(trained, paths, out)
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["path"].endswith("03.png")
    assert "No such file" in second["note"]
    capsys.readouterr()
    for more, said in (
        (["--out", str(tmp_path / "s.txt")], ".csv, .jsonl"),
        (["--scorer", "neko"], "Did you mean 'neco'"),
        (["--alpha", "0.0001"], "at least 9999"),
        (["--images", str(tmp_path / "nowhere")], "neither a folder nor a text file"),
    ):
        with pytest.raises(SystemExit):
            score(trained, paths, tmp_path / "other.csv", *more)
        assert said in capsys.readouterr().err


def test_methods_trained_for_detection(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "OUTLIERS", 200)
    monkeypatch.setattr(viz, "draw_run", lambda *_: {})  # pages take most of the time
    monkeypatch.setattr(OOD, "write_page", lambda *_: None)
    scorers, methods = ["feature-norm", "separation"], {"entropy": "", "separation": "photos"}
    run_ood(tmp_path, "--methods", *methods, "--scorers", *scorers, "--train.epochs", "4")
    for method, shown in methods.items():
        found = rows(tmp_path, f"{method}-seed0")
        assert list(found) == scorers
        assert all(0 <= row["far/auroc"] <= 1 for row in found.values())
        run = CachedRun(tmp_path / method / "seed0", tmp_path / "features")
        assert run.config["train"]["outliers"] == shown
        assert run.rows()[-1]["test/accuracy"] > 0.4  # of eight classes
    capsys.readouterr()
    with pytest.raises(SystemExit):  # a finished run too
        cli.main([
            "ood", "--run", str(run.place), "--ood", "photos", "--no-wandb",
            "--out", str(tmp_path / "again"),
        ])  # fmt: skip
    assert "saw photos as outliers" in capsys.readouterr().err


def test_separation_begins_in_the_second_half():
    g = torch.Generator().manual_seed(0)
    h, z, o, oz, w = (torch.randn(6, n, generator=g) for n in (5, 3, 5, 3, 5))
    y, w = torch.arange(6) % 3, w[:3]
    exposed = OOD.exposure(z, y, oz)
    first, second = (OOD.separated(h, z, y, w, o, oz, epoch, 30) for epoch in (14, 15))
    assert torch.equal(first, exposed)
    assert torch.equal(second, exposed + losses.separation(h, y, w, o))


def test_leave_out_keeps_the_order_of_the_others():
    whole = data.load("fashion-mini").test
    rest = data.leave_out(whole, ("Coat", "Trouser"))
    assert rest.classes == tuple(c for c in whole.classes if c not in ("Coat", "Trouser"))
    for c, name in enumerate(rest.classes):
        mine = whole.images[whole.labels == whole.classes.index(name)]
        assert torch.equal(rest.images[rest.labels == c], mine)
    with pytest.raises(InputError, match="leaves 1 classes"):
        data.leave_out(whole, whole.classes[1:])


def test_features_from_files(tmp_path, capsys):
    """What `ncmethods extract` writes, from any model: no run, no classifier's rows."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    means = 4 * torch.randn(4, 8, generator=rng)

    def saved(name, x, labels=None):
        path = tmp_path / f"{name}.safetensors"
        FeatureSet(x, labels, 4, x[:, :4]).save(path)
        return path

    files = (
        saved("train", means[y] + torch.randn(400, 8, generator=rng), y),
        saved("test", means[y] + torch.randn(400, 8, generator=rng), y),
        saved("strange", 4 * torch.randn(300, 8, generator=rng)),
    )
    out = tmp_path / "out"
    config = OOD.OodDetection(
        features=files, out=out, wandb=False, scorers=("mahalanobis", "msp", "nci")
    )
    OOD.main(config)
    said = capsys.readouterr().out
    assert "nci left out" in said
    assert "calibrates, the other half is tested" in said
    rows = json.loads((out / "scores" / "features.json").read_text())["rows"]
    assert set(rows) == {"mahalanobis", "msp"}
    assert rows["mahalanobis"]["strange/auroc"] > 0.9
    assert 0 < rows["mahalanobis"]["false_alarms"] < 0.15
    with pytest.raises(InputError, match="got 2"):
        OOD.main(OOD.OodDetection(features=files[:2], out=tmp_path / "b", wandb=False))
    lost = (*files[:2], tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="There is no file"):
        OOD.main(OOD.OodDetection(features=lost, out=tmp_path / "b", wandb=False))
    with pytest.raises(InputError, match="not both"):
        OOD.main(OOD.OodDetection(features=files, run=(out,), out=out, wandb=False))
