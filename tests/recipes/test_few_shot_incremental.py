"""The few-shot recipe: sessions on features, what they leave, and what a session cannot do."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ncmethods import cli, data
from ncmethods._core import InputError
from ncmethods.features import FeatureSet
from ncmethods.incremental import Finetune
from ncmethods.training import TrainConfig

recipe = cli.load_recipe("few_shot_incremental")
CONFIG = recipe.FewShotIncremental(
    methods=tuple(recipe.METHODS),
    orders=(0,),
    dim=32,
    wandb=False,
    data=data.StreamConfig("digits", base=6, increment=2, shots=5),
    train=TrainConfig(epochs=4, batch_size=64, lr=0.05, threads=1, device="cpu", measurements=1),
    finetune=Finetune(steps=60, lr=0.1),
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("few")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe.main(replace(CONFIG, out=out))
    torch.set_num_threads(threads)
    return out


def rows(out, name):
    return json.loads((out / name / "order0-seed0" / "result.json").read_text())["rows"]


def test_every_method_has_every_session(done):
    for name in recipe.METHODS:
        of = rows(done, name)
        assert [row["classes"] for row in of] == [6, 8, 10]
        assert {"base", "novel", "harmonic"} <= of[-1].keys()
        for t in range(3):
            assert (done / name / "order0-seed0" / f"session{t}.safetensors").exists()
    assert len(list(done.glob("base-*"))) == 2  # each base is trained once
    assert (done / "report.html").stat().st_size > 10_000


def test_what_the_sheet_says_of_forgetting_and_novelty(done):
    last = {name: rows(done, name)[-1] for name in recipe.METHODS}
    assert last["finetune"]["base"] < 0.3
    assert last["etf"]["novel"] < 0.05  # a vertex without training attracts nobody
    assert last["ncm"]["accuracy"] > last["finetune"]["accuracy"] + 0.2
    assert last["nc-fscil"]["novel"] > last["etf"]["novel"] + 0.1
    assert last["nc-fscil"]["base"] > 0.5


def test_the_neck_alone_moves(done):
    first, last = (
        load_file(done / "nc-fscil" / "order0-seed0" / f"session{t}.safetensors") for t in (0, 2)
    )
    assert first.keys() == last.keys()
    assert all("backbone" not in name for name in first)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_lost_session_comes_back_the_same(done, tmp_path):
    shutil.copytree(done, tmp_path / "again")
    leaf = tmp_path / "again" / "nc-fscil" / "order0-seed0"
    before = (leaf / "session2.safetensors").read_bytes()
    whole = (leaf / "result.json").read_bytes()
    for name in ("session2.safetensors", "result.json"):
        (leaf / name).unlink()
    recipe.main(replace(CONFIG, out=tmp_path / "again", methods=("nc-fscil",)))
    assert (leaf / "session2.safetensors").read_bytes() == before
    assert (leaf / "result.json").read_bytes() == whole


def test_tuning_picks_for_the_methods_that_train(tmp_path, capsys):
    config = replace(
        CONFIG,
        out=tmp_path,
        methods=("ncm", "nc-fscil"),
        lrs=(0.01, 0.05),
        train=replace(CONFIG.train, epochs=1),
    )
    recipe.main(config)
    said = capsys.readouterr().out
    assert "nc-fscil: lr" in said
    assert "ncm: lr" not in said
    assert (tmp_path / "tuning" / "base-etf").is_dir()


def test_bad_input(done, tmp_path):
    with pytest.raises(InputError, match="other settings"):
        recipe.main(replace(CONFIG, out=done, finetune=Finetune(steps=61)))
    with pytest.raises(InputError, match="Did you mean 'nc-fscil'"):
        recipe.main(replace(CONFIG, out=tmp_path, methods=("nc-fsci",)))
    with pytest.raises(InputError, match="wanted of class"):
        recipe.main(replace(CONFIG, out=tmp_path, data=replace(CONFIG.data, shots=100_000)))
    with pytest.raises(InputError, match="10 classes arrive and there are 5 vertices"):
        recipe.main(replace(CONFIG, out=tmp_path, capacity=5))


def test_features_from_files(tmp_path):
    """Any frozen backbone; here pixels. The nearest mean by angle, against numpy."""
    import numpy as np

    digits = data.load("digits")
    files = []
    for name, part in (("train", digits.train), ("test", digits.test)):
        files.append(tmp_path / f"{name}.safetensors")
        FeatureSet(part.images.flatten(1).float(), part.labels, 10).save(files[-1])
    config = replace(
        CONFIG, out=tmp_path / "out", methods=("ncm", "slda", "ranpac"), features=tuple(files)
    )
    recipe.main(config)
    last = {name: rows(tmp_path / "out", name)[-1] for name in config.methods}
    assert last["slda"]["accuracy"] > 0.6

    stream = config.data.stream(digits, 0)
    parts = [(s.train.images.flatten(1).double().numpy(), s.train_labels.numpy()) for s in stream]
    x, y = (np.concatenate(of) for of in zip(*parts))
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    test = stream[2].test_seen
    found = (test.images.flatten(1).double().numpy() @ means.T).argmax(1)
    want = (found == test.labels.numpy()).mean()
    assert last["ncm"]["accuracy"] == pytest.approx(want, abs=0.005)  # float32 rows

    with pytest.raises(InputError, match="nc-fscil: these train a base network"):
        recipe.main(replace(config, methods=("ncm", "nc-fscil")))
    with pytest.raises(InputError, match="takes two files"):
        recipe.main(replace(config, features=tuple(files[:1])))
