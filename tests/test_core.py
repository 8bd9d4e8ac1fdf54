import errno
import functools
import os
import stat

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ncmethods import _core
from ncmethods._core import (
    CheckpointError,
    DataError,
    InputError,
    NCError,
    atomic_path,
    bind,
    check_choice,
    check_counts,
    check_features,
    check_labels,
    find_head,
    logits_of,
    unwrap,
    write_text,
)


def test_every_error_is_a_value_error():
    for error in (InputError, DataError, CheckpointError):
        assert issubclass(error, NCError)
        assert issubclass(error, ValueError)


# --- checks -------------------------------------------------------------------------------------


def test_check_choice():
    assert check_choice("haar", ("haar", "canonical"), "rotation") == "haar"
    with pytest.raises(InputError, match=r"Unknown rotation 'har'\. Did you mean 'haar'\? Choose"):
        check_choice("har", ("haar", "canonical"), "rotation")
    with pytest.raises(InputError, match=r"'zzz'\. Choose from: haar, canonical"):
        check_choice("zzz", iter(("haar", "canonical")), "rotation")


def test_check_features():
    x = torch.randn(3, 4)
    assert check_features(x, 4) is x
    assert check_features(x.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        assert check_features(x.to(dtype)).dtype == torch.float32
    for bad, words in [
        (x[0], "2-D tensor"),
        (x[None], "2-D tensor"),
        (x.tolist(), "2-D tensor"),
        (x.int(), "floating point"),
        (x.to(torch.complex64), "floating point"),
        (x[:, :3], r"D = 4 columns.*\(3, 3\)"),
    ]:
        with pytest.raises(InputError, match=words):
            check_features(bad, 4)


def test_check_labels():
    y = torch.tensor([0, 1, 2])
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        assert check_labels(y.to(dtype), 3).tolist() == [0, 1, 2]
        assert check_labels(y.to(dtype)).dtype == torch.int64
    for bad, words in [
        (y.float(), "must be integers"),
        (y.bool(), "must be integers"),
        (y[None], "1-D tensor"),
        (F.one_hot(y), "argmax"),
        ([0, 1, 2], "1-D tensor"),
        (y[:2], r"3 rows.*\(2,\)"),
    ]:
        with pytest.raises(InputError, match=words):
            check_labels(bad, 3)


def test_check_counts():
    assert check_counts([5, 0, 2], 3).tolist() == [5, 0, 2]
    assert check_counts(torch.tensor([5.0, 1.0])).tolist() == [5.0, 1.0]
    for bad in ([1, 2], [[1, 2, 3]], [0, 0, 0], [1, -1, 2], [1.0, float("nan"), 2.0], []):
        with pytest.raises(InputError, match="counts must be"):
            check_counts(bad, 3)


# --- atomic files -------------------------------------------------------------------------------


def test_atomic_path_writes_whole_or_nothing(tmp_path):
    target = tmp_path / "new" / "deeper" / "run.json"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert not target.exists()
        temporary.write_text("one")
    assert target.read_text() == "one"

    def fails():
        with atomic_path(target) as temporary:
            temporary.write_text("half of tw")
            raise KeyError("the writer failed")

    with pytest.raises(KeyError):
        fails()
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["run.json"]

    assert write_text(target, "two — ≥") == target
    assert target.read_text(encoding="utf-8") == "two — ≥"
    assert os.listdir(target.parent) == ["run.json"]


def test_atomic_path_keeps_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_atomic_path_names_an_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for target in (tmp_path / "file" / "run.json", "/proc/nowhere/run.json"):
        with pytest.raises(InputError, match=r"Cannot write .*run\.json.*Choose another output"):
            write_text(target, "x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_path_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    target = write_text(tmp_path / "run.json", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(_core.os, call, full)
        with pytest.raises(InputError, match=r"Cannot write .*run\.json: No space left on device"):
            write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


# --- bind ---------------------------------------------------------------------------------------


def squared(features, labels, weight, *, scale=1.0, counts=None):
    return features, labels, weight, scale, counts


def test_bind_by_name():
    have = {"labels": 1, "features": 0, "weight": 2, "logits": 3}
    assert bind(squared, have) == {"features": 0, "labels": 1, "weight": 2}
    assert squared(**bind(squared, have)) == (0, 1, 2, 1.0, None)
    assert bind(squared, have | {"counts": 4})["counts"] == 4
    assert bind(lambda logits: logits, have) == {"logits": 3}
    assert bind(lambda *args, **kwargs: 0, have) == {}


def test_bind_partial():
    have = {"features": 0, "labels": 1}
    assert bind(functools.partial(squared, weight=9), have) == have
    assert bind(functools.partial(squared, weight=9, scale=2.0), have) == have


def test_bind_says_what_is_missing():
    with pytest.raises(InputError, match=r"squared needs 'weight'.*available: features, labels\)"):
        bind(squared, {"features": 0, "labels": 1, "weight": None})
    with pytest.raises(InputError, match=r"squared needs 'features'.*functools\.partial"):
        bind(functools.partial(squared, weight=9), {"labels": 1})


# --- models -------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "alexnet": "classifier.6",
    "mobilenet_v3_small": "classifier.3",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "convnext_tiny": "classifier.2",
    "shufflenet_v2_x0_5": "fc",
    "googlenet": "fc",
    "inception_v3": "fc",
}


@pytest.mark.parametrize(("builder", "where"), TORCHVISION.items(), ids=TORCHVISION)
def test_find_head_in_torchvision(builder, where):
    extra = {"init_weights": False} if builder in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        net = getattr(torchvision.models, builder)(weights=None, num_classes=17, **extra)
    name, module = find_head(net)
    assert name == where
    assert module.out_features == 17
    assert module is net.get_submodule(name)
    assert find_head(net, num_classes=17) == (name, module)
    with pytest.raises(InputError, match="No classifier head with 18 outputs"):
        find_head(net, num_classes=18)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def embed(self, x):
        return x

    def logits(self, features):
        return 2 * features @ self.weight.T

    def forward(self, x):
        return self.logits(self.embed(x))


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)


def test_find_head_in_other_models():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert find_head(net) == ("2", net[2])
    with_head = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), Head())
    assert find_head(with_head) == ("2", with_head[2])
    alone = nn.Linear(4, 3)
    assert find_head(alone) == ("", alone)
    deep = nn.Module()
    deep.trunk, deep.probe = nn.Conv2d(1, 1, 1), nn.Linear(4, 3)
    assert find_head(deep) == ("probe", deep.probe)


def test_find_head_lists_the_candidates():
    net = Twins()
    with pytest.raises(
        InputError,
        match=r"2 layers of Twins could be.*'first' \(8, 4\), 'second' \(3, 8\).*name='…'",
    ):
        find_head(net)
    assert find_head(net, num_classes=3).name == "second"
    assert find_head(net, name="first") == ("first", net.first)
    with pytest.raises(InputError, match=r"Unknown module name 'secnd'.*Did you mean 'second'"):
        find_head(net, name="secnd")
    with pytest.raises(InputError, match="No classifier head found in Conv2d"):
        find_head(nn.Conv2d(1, 1, 1))


def test_find_head_sees_through_wrappers():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(net, backend="eager")
    for wrapped in (compiled, nn.DataParallel(net), nn.DataParallel(compiled)):
        assert unwrap(wrapped) is net
        assert find_head(wrapped) == ("2", net[2])
        assert find_head(wrapped, name="0").module is net[0]


def test_logits_of_never_embeds_again():
    x = torch.randn(5, 4)
    linear, head = nn.Linear(4, 3), Head()
    torch.testing.assert_close(logits_of(linear, x), linear(x))
    torch.testing.assert_close(logits_of(head, x), head.logits(x))
    with pytest.raises(InputError, match=r"nn\.Linear or have weight.*got ReLU"):
        logits_of(nn.ReLU(), x)
