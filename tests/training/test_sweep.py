"""Methods × seeds: what is trained, how it is tuned, and what a second call does."""

import json
from dataclasses import replace

import pytest
import torch
from job import ALONE, CNN, CONFIG, ce, part, splits

from ncmethods import data, training
from ncmethods._core import InputError
from ncmethods.training import Job, Method, grid, jobs_of, loop, sweep, tune

TAIL = data.TailConfig("quarters", imbalance=2)
METHODS = {"ce": Method("linear", ce), "etf": Method("etf_head", ce, {"scale": 5.0})}


def trained(out, jobs, seeds=(0, 1), lrs=(0.05,), **options):
    configs = [replace(CONFIG, lr=lr, epochs=2) for lr in lrs]
    return sweep(
        jobs,
        seeds,
        lambda tail: splits(),
        backbone="small_cnn",
        candidates=configs,
        out=out,
        wandb=False,
        **options,
    )


def test_a_grid_is_every_combination_and_one_configuration_without_values():
    assert grid(CONFIG) == grid(CONFIG, lr=()) == [CONFIG]
    found = grid(CONFIG, lr=(0.1, 0.2), weight_decay=(), momentum=(0.0, 0.5))
    assert [(c.lr, c.momentum) for c in found] == [(0.1, 0.0), (0.1, 0.5), (0.2, 0.0), (0.2, 0.5)]
    assert {c.weight_decay for c in found} == {CONFIG.weight_decay}


def test_every_method_with_every_seed_once(tmp_path, monkeypatch, capsys):
    jobs = jobs_of(("ce", "etf"), METHODS, TAIL, (0, 1))
    groups = {"all": [0, 1, 2, 3]}
    runs = trained(tmp_path, jobs, groups=groups)
    assert {name: [place for place, _ in of] for name, of in runs.items()} == {
        name: [tmp_path / name / f"seed{seed}" for seed in (0, 1)] for name in ("ce", "etf")
    }
    shown = capsys.readouterr().out
    assert "40, 30, 14, 8 training images per class\nall: classes 0, 1, 2, 3\n" in shown
    config = json.loads((tmp_path / "etf/seed1/config.json").read_text())
    assert config["model"]["head_args"] == {"scale": 5.0}
    assert config["data"]["seed"] == 1  # each seed draws its own images
    assert not (tmp_path / "tuning.json").exists()
    for of in runs.values():
        for place, rows in of:
            assert rows[-1] == json.loads((place / "result.json").read_text())
            percent = 100 * rows[-1]["test/accuracy"]
            seed = place.name.removeprefix("seed")
            assert f"{place.parent.name} seed {seed}: accuracy {percent:.1f} %\n" in shown

    monkeypatch.setattr(loop, "build_model", None)  # nothing is trained again
    assert trained(tmp_path, jobs, groups=groups) == runs


def test_a_method_has_its_own_backbone(tmp_path):
    method = Method("linear", ce, backbone="job:plain_net")
    trained(tmp_path, [Job("plain", method, [TAIL])], seeds=(0,))
    config = json.loads((tmp_path / "plain/seed0/config.json").read_text())
    assert config["model"]["backbone"] == "job:plain_net"


def test_tuning_takes_the_best_on_held_out_training_images(tmp_path, monkeypatch, capsys):
    seen = []
    original = training.sweep.__globals__["fit"]

    def fit(model, loss, parts, config, out, **rest):
        seen.append((out.relative_to(tmp_path).as_posix(), config.lr, len(parts.train), parts.test))
        return original(model, loss, parts, config, out, **rest)

    monkeypatch.setitem(training.sweep.__globals__, "fit", fit)
    lrs = (1e-5, 0.05)
    trained(tmp_path, jobs_of(("ce",), METHODS, TAIL, (3, 4)), seeds=(3, 4), lrs=lrs)
    N = len(splits().train)
    left = N - (8 + 6 + 3 + 2)  # a fifth of 40, 30, 14, 8
    assert [(place, lr, n) for place, lr, n, _ in seen] == [
        ("tuning/ce/lr=1e-05", 1e-5, left),
        ("tuning/ce/lr=0.05", 0.05, left),
        ("ce/seed3", 0.05, N),
        ("ce/seed4", 0.05, N),
    ]
    held = seen[0][3].images
    inside = (splits().train.images[:, None] == held).flatten(2).all(2).any(0)
    assert inside.all(), "tuning looks at training images only"
    said = json.loads((tmp_path / "tuning.json").read_text())["ce"]
    assert said["chosen"] == "lr=0.05"
    accuracies = said["held-out accuracy"]
    assert accuracies["lr=0.05"] > accuracies["lr=1e-05"]
    assert "ce: lr=0.05 (held-out accuracy: lr=1e-05" in capsys.readouterr().out


def test_tuning_averages_over_classes_and_survives_divergence(tmp_path):
    def diverges(logits, labels, epoch):
        return ce(logits, labels) * (float("nan") if diverges.now else 1)

    configs = [replace(CONFIG, lr=lr, epochs=1, warmup_epochs=0) for lr in (0.2, 0.1)]
    original = training.sweep.__globals__["fit"]

    def fit(model, loss, parts, config, out, **rest):
        diverges.now = config.lr == 0.2
        return original(model, loss, parts, config, out, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.sweep.__globals__, "fit", fit)
        best, accuracies = tune(CNN, diverges, splits(), configs, tmp_path, here=ALONE)
    assert best is configs[1]
    assert accuracies["lr=0.2"] == 0
    from safetensors.torch import load_file

    table = load_file(tmp_path / "lr=0.1/evaluation.safetensors")["confusion"].double()
    assert accuracies["lr=0.1"] == pytest.approx(
        float((table.diagonal() / table.sum(1)).mean()), abs=1e-6
    )
    assert table.sum(1).tolist() == [8, 6, 3, 2]


@pytest.mark.parametrize(
    ("names", "seeds", "said"),
    [
        ((), (0,), "at least one method"),
        (("ce",), (), "at least one seed"),
        (("ce", "ce"), (0,), "none of them twice"),
        (("ce",), (1, 1), "none of them twice"),
        (("cee",), (0,), "Did you mean 'ce'"),
    ],
)
def test_nothing_to_train(names, seeds, said):
    with pytest.raises(InputError, match=said):
        jobs_of(names, METHODS, TAIL, seeds)


def test_hold_out_is_seeded_and_keeps_every_class():
    whole = part([40, 30, 14, 2], 1)
    one, again, other = (data.hold_out(whole, "x", seed=seed) for seed in (0, 0, 1))
    assert data.class_counts(one.test).tolist() == [8, 6, 3, 1]
    assert len(one.train) + len(one.test) == len(whole)
    assert torch.equal(one.test.images, again.test.images)
    assert not torch.equal(one.test.images, other.test.images)
    with pytest.raises(data.datasets.DataError, match="at least 2 images"):
        data.hold_out(part([40, 30, 14, 1], 1), "x")


def test_validation_images_choose_where_there_are_any(tmp_path):
    train, test, name, _ = splits()
    wrong = replace(train, labels=3 - train.labels)  # who learns the training set best, fails here
    for validation, best in ((train, 0.05), (wrong, 1e-5)):
        found, accuracies = tune(
            CNN, ce, data.Splits(train, test, name, validation),
            grid(replace(CONFIG, epochs=3), lr=(1e-5, 0.05)), tmp_path / str(best), here=ALONE,
        )  # fmt: skip
        assert found.lr == best
        assert len(set(accuracies.values())) == 2
    record = json.loads((tmp_path / "0.05" / "lr=0.05" / "config.json").read_text())
    assert "held_out" not in record["data"]
    assert sum(record["data"]["counts"]) == len(train)


def test_a_method_has_its_own_hyperparameters(tmp_path):
    method = Method("linear", ce, train={"mixup": 0.5, "sampling": "sqrt"})
    trained(tmp_path, [Job("mixed", method, [TAIL])], seeds=(0,), lrs=(0.05, 0.1))
    for run in ("mixed/seed0", "tuning/mixed/lr=0.1"):
        config = json.loads((tmp_path / run / "config.json").read_text())["train"]
        assert (config["mixup"], config["sampling"]) == (0.5, "sqrt")


def test_a_head_that_cannot_be_says_so_before_anything_is_trained(tmp_path):
    narrow = Method("etf_head", ce, {"dim": 2, "neck": "linear"})
    jobs = [Job("ce", METHODS["ce"], [TAIL]), Job("narrow", narrow, [TAIL])]
    with pytest.raises(InputError, match="dim"):
        trained(tmp_path, jobs, seeds=(0,))
    assert not (tmp_path / "ce").exists()
