import copy
import dataclasses
import json
import os
import pickle
from collections import namedtuple
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ncmethods import heads
from ncmethods._core import InputError
from ncmethods.features import (
    FeatureSet,
    LayerWatch,
    accumulate,
    capture,
    extract,
    extract_layers,
)
from ncmethods.stats import ClassStats


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def data():
    noise = torch.Generator().manual_seed(0)
    return torch.randn(22, 6, generator=noise), torch.arange(22) % 4


def mlp():
    """A Linear classifier behind layers whose eval mode differs from their train mode."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4)
    )


def classifier():
    return heads.Classifier(nn.Sequential(*mlp()[:-1]), heads.etf_head(12, 4, dim=7))


def batches(x, y, size=5):
    return list(zip(x.split(size), y.split(size)))


# --- FeatureSet ---------------------------------------------------------------------------------


def test_feature_set(data):
    x, y = data
    logits = torch.randn(22, 4)
    full = FeatureSet(x, y, 4, logits)
    assert (len(full), full.dim, full.num_classes) == (22, 6, 4)
    assert full.stats is full.stats
    want = ClassStats(4, 6).update(x, y)
    assert torch.equal(full.stats.within, want.within)
    with pytest.raises(dataclasses.FrozenInstanceError):
        full.features = x
    assert FeatureSet(x.half(), y.int(), 4).features.dtype == torch.float32
    assert FeatureSet(x.half(), y.int(), 4).labels.dtype == torch.int64
    assert FeatureSet(x.double(), y, 4).features.dtype == torch.float64
    assert FeatureSet(x, y, 4, logits.half()).logits.dtype == torch.float32
    assert full != FeatureSet(x.clone(), y, 4, logits)  # by identity: no tensor truth value
    with pytest.raises(InputError, match="without labels"):
        FeatureSet(x, None, 4).stats  # noqa: B018


def test_feature_set_checks_its_shapes(data):
    x, y = data
    for bad, words in [
        ((x[0], y, 4), "features must be a 2-D"),
        ((x.long(), y, 4), "floating point"),
        ((x, y[:5], 4), "22 rows"),
        ((x, y.float(), 4), "integers"),
        ((x, y, 1), "num_classes"),
        ((x, y, 4, torch.randn(22, 3)), "K = 4 columns"),
        ((x, y, 4, torch.randn(21, 4)), "22 features, 21 logits"),
        ((x, y, 4, torch.randn(22)), "2-D tensor"),
        ((x, y, 4, y[:, None].repeat(1, 4)), "floating"),
    ]:
        with pytest.raises(InputError, match=words):
            FeatureSet(*bad)


@pytest.mark.parametrize("known", ["labels+logits", "labels", "nothing"])
def test_save_and_load(tmp_path, data, known):
    x, y = data
    labels = y if "labels" in known else None
    logits = torch.randn(22, 9) if "logits" in known else None
    path = tmp_path / "new" / "f.safetensors"
    FeatureSet(x.T.contiguous().T.double(), labels, 9, logits).save(path)
    back = FeatureSet.load(path)
    assert back.num_classes == 9  # more than the labels show
    assert torch.equal(back.features, x.double())
    for got, want in ((back.labels, labels), (back.logits, logits)):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
    assert os.listdir(path.parent) == ["f.safetensors"]


def test_load_of_a_foreign_file(tmp_path, data):
    x, y = data
    path = tmp_path / "f.safetensors"

    def load(**tensors):
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        return FeatureSet.load(path)

    assert load(features=x, labels=y).num_classes == 4
    wide = load(features=x.half(), labels=y.int(), logits=torch.randn(22, 7))
    assert (wide.num_classes, wide.features.dtype) == (7, torch.float32)
    assert load(features=x, logits=torch.randn(22, 7)).labels is None
    for tensors, words in [
        ({"embeddings": x}, r"no tensor 'features'; it has \['embeddings'\]"),
        ({"features": x}, "says nothing about the number of classes"),
        ({"features": x, "labels": y[:3]}, "22 rows"),
        ({"features": x, "logits": y.float()}, "2-D tensor"),
        ({"features": x[:, 0], "labels": y}, "2-D tensor"),
    ]:
        with pytest.raises(InputError, match=words):
            load(**tensors)


def test_load_of_a_damaged_file(tmp_path, data):
    path = tmp_path / "f.safetensors"
    FeatureSet(*data, 4).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\x00" * 200, whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"Cannot read .* as safetensors"):
            FeatureSet.load(path)
    for fields in ("{", "[]", "{}", json.dumps({"num_classes": "four"})):
        safetensors.torch.save_file(
            {"features": data[0]}, path, metadata={"ncmethods.FeatureSet": fields}
        )
        with pytest.raises(InputError, match=r"damaged FeatureSet|num_classes must be"):
            FeatureSet.load(path)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="Cannot read"):
            FeatureSet.load(missing)


def test_save_where_nothing_can_be_written(tmp_path, data, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot write"):
        FeatureSet(*data, 4).save(tmp_path / "file" / "f.safetensors")
    path = tmp_path / "f.safetensors"
    FeatureSet(*data, 4).save(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"Cannot write .*No space left"):
        FeatureSet(data[0] + 1, data[1], 4).save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "file"]


# --- extract and accumulate ---------------------------------------------------------------------

Batch = namedtuple("Batch", "x y extra")
LOADERS = {
    "(x, y)": lambda x, y: (x, y),
    "[x, y]": lambda x, y: [x, y],
    "(x, y, extra)": lambda x, y: (x, y.int(), ["anything"]),
    "namedtuple": lambda x, y: Batch(x, y, None),
    "dict": lambda x, y: {"image": x, "label": y, "path": "somewhere"},
    "transformers": lambda x, y: {"pixel_values": x, "labels": y},
}


@pytest.mark.parametrize("shape", LOADERS)
@pytest.mark.parametrize("build", [mlp, classifier])
def test_extract_equals_a_plain_loop(data, shape, build):
    x, y = data
    model = build()
    got = extract(model, [LOADERS[shape](*batch) for batch in batches(x, y)])
    model.eval()
    with torch.no_grad():
        if build is mlp:
            features = model[:-1](x)
            logits = model[-1](features)
        else:
            features, logits = model(x)
    torch.testing.assert_close(got.features, features)
    torch.testing.assert_close(got.logits, logits)
    assert torch.equal(got.labels, y)
    assert got.num_classes == 4
    assert got.features.dtype == got.logits.dtype == torch.float32
    assert not got.features.requires_grad
    assert not got.logits.requires_grad


def test_extract_without_labels(data):
    for loader in (list(data[0].split(5)), [{"x": x} for x in data[0].split(5)], [(data[0],)]):
        got = extract(mlp(), loader)
        assert got.labels is None
        assert len(got) == 22


@pytest.mark.parametrize("build", [mlp, classifier])
def test_accumulate_equals_extract(data, build):
    model, loader = build(), batches(*data)
    want = extract(model, loader).stats
    got = accumulate(model, loader)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.means, want.means)
    assert torch.equal(got.within, want.within)
    assert torch.equal(got.trace, want.trace)
    flat = accumulate(model, loader, 9, scatter=False)
    assert flat.num_classes == 9
    assert torch.equal(flat.trace[:4], want.trace)
    with pytest.raises(InputError, match="no scatter"):
        flat.within  # noqa: B018


def test_accumulate_keeps_what_is_asked_for(data):
    """Class variances against numpy, and the sums for shrinkage against the definition."""
    model, loader = mlp(), batches(*data)
    x, y = extract(model, loader).features.double(), data[1]
    plain = accumulate(model, loader)
    with pytest.raises(InputError, match="variances=True"):
        plain.variances  # noqa: B018
    got = accumulate(model, loader, variances=True, shrinkage=True)
    for c in range(4):
        torch.testing.assert_close(
            got.variances[c].numpy(), x[y == c].numpy().var(0), rtol=1e-5, atol=1e-9
        )
    fourth = (x - x.mean(0)).square().sum(1).square().sum()
    torch.testing.assert_close(got.fourth, fourth, rtol=1e-5, atol=0)


# --- layers -------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Maps, tokens, and a classifier; counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        self.relu = nn.ReLU(inplace=True)  # overwrites what stem gave
        self.tokens = nn.Linear(5, 7)
        self.fc = nn.Linear(7, 11)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = self.relu(self.stem(x))
        x = self.tokens(x.flatten(2).mT)
        return self.fc(x.mean(1))


def pictures(n=9):
    noise = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 6, 6, generator=noise), torch.arange(n) % 4


def test_extract_layers_equals_plain_code_in_one_pass():
    model, (x, y) = Maps(), pictures()
    model(x)  # running statistics of its own
    model.passes = 0
    layers = ["fc", "stem", "logits", "tokens", "head"]
    got = extract_layers(model, batches(x, y, 4), layers, 4)
    assert model.passes == 3
    assert model.training
    assert list(got) == layers
    model.eval()
    with torch.no_grad():
        maps = model.stem(x).clone()
        tokens = model.tokens(maps.relu().flatten(2).mT)
        logits = model.fc(tokens.mean(1))
    want = {
        "stem": maps.mean((2, 3)),
        "tokens": tokens.mean(1),
        "head": tokens.mean(1),
        "fc": logits,
        "logits": logits,
    }
    for layer, rows in got.items():
        torch.testing.assert_close(rows.features, want[layer])
        assert torch.equal(rows.labels, y)
        assert rows.num_classes == 4
        assert rows.logits is None  # eleven classes, and the data has four
    flat = extract_layers(model, batches(x, y), ["stem"], 4, pool=lambda m: m.flatten(1))
    torch.testing.assert_close(flat["stem"].features, maps.flatten(1))
    one = extract_layers(model, [x], ["head"])["head"]
    assert one.labels is None
    torch.testing.assert_close(one.logits, logits)  # K is taken from the logits


@pytest.mark.parametrize("build", [mlp, classifier])
def test_head_among_the_layers_is_what_extract_gives(data, build):
    model, loader = build(), batches(*data)
    want = extract(model, loader)
    inner = "0" if build is mlp else "backbone.0"
    got = extract_layers(model, loader, ["head", inner])
    assert torch.equal(got["head"].features, want.features)
    assert torch.equal(got["head"].logits, want.logits)
    first = dict(model.named_modules())[inner]
    torch.testing.assert_close(got[inner].features, first(data[0]).detach())


def test_layers_of_a_shard():
    x, y = torch.arange(7 * 6.0).view(7, 6), torch.arange(7) % 4
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 4))
    rows = []
    for rank in range(2):
        sampler = DistributedSampler(TensorDataset(x, y), 2, rank, shuffle=False)
        loader = DataLoader(TensorDataset(x, y), batch_size=3, sampler=sampler)
        rows.append(extract_layers(net, loader, ["0"])["0"].features)
    together = torch.cat(rows)
    assert torch.equal(together[together[:, 0].argsort()], x)


def test_layers_that_cannot_be_had(data):
    model, loader = mlp(), batches(*data)
    for layers, words in [
        ([], "at least one layer"),
        (["head", "head"], "each once"),
        (["0", "o"], "Unknown layer 'o'"),
    ]:
        with pytest.raises(InputError, match=words):
            extract_layers(model, loader, layers)
    with pytest.raises(InputError, match="no batch"):
        extract_layers(model, [], ["0"])
    skips = Maps()
    skips.spare = nn.Identity()
    with pytest.raises(InputError, match="has reached spare"):
        extract_layers(skips, batches(*pictures()), ["spare"])
    assert not any(m._forward_hooks for m in (*model.modules(), *skips.modules()))


def test_what_runs_aside_leaves_no_trace(data):
    x, _ = data
    model = mlp().eval()
    with LayerWatch(model, ["0", "head"]) as watch:
        model(x)
        with watch.aside():
            model(x + 1)
        seen = watch.take()
        torch.testing.assert_close(seen["0"], model[0](x).detach())
        torch.testing.assert_close(seen["head"], model[:-1](x).detach())


class Watcher(nn.Module):
    """Notes mode and gradient state of every forward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        if len(x) == 1:
            raise RuntimeError("the model failed")
        return x


def test_modes_are_eval_inside_and_restored_one_by_one(data):
    x, y = data
    watcher = Watcher()
    model = nn.Sequential(watcher, *mlp())
    model.train()
    model[2].eval()  # a frozen BatchNorm
    before = {name: m.training for name, m in model.named_modules()}
    running = model[2].running_mean.clone()
    assert len(set(before.values())) == 2

    def unchanged():
        assert {name: m.training for name, m in model.named_modules()} == before
        assert torch.equal(model[2].running_mean, running)
        assert torch.is_grad_enabled()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    extract(model, batches(x, y))
    assert set(watcher.seen) == {(False, False)}
    unchanged()
    for run, loader, error in [
        (extract, [*batches(x, y), (x[:1], y[:1])], RuntimeError),
        (accumulate, [*batches(x, y), (x[:1], y[:1])], RuntimeError),
        (extract, [(x, y), ("text", y)], InputError),
        (accumulate, [(x, y), x], InputError),
        (accumulate, [(x, y), (x[:, :5], y)], RuntimeError),
    ]:
        with pytest.raises(error):
            run(model, loader)
        unchanged()


def test_what_a_loader_may_not_yield(data):
    x, y = data
    for batch, words in [
        ("text", "must yield x.*got str"),
        ([], "got list"),
        ((["a"], y), "got tuple"),
        ({"features": x}, "one of x, image.*got dict"),
        ((x, ["cat"]), "got tuple"),
        ((x, y.float()), "labels must be integers"),
        ((x, F.one_hot(y)), "1-D tensor"),
        ((x, y[:3]), "22 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            extract(mlp(), [batch])
    for run in (extract, accumulate):
        with pytest.raises(InputError, match="yielded no batch"):
            run(mlp(), [])
    with pytest.raises(InputError, match="accumulate needs labels"):
        accumulate(mlp(), [x])


class Wraps(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.fc, self.wrap = nn.Linear(6, 12), nn.Linear(12, 4), wrap

    def forward(self, x):
        return self.wrap(self.fc(self.body(x)))


def test_outputs_of_foreign_models(data):
    want = extract(Wraps(lambda z: z), [data]).features.shape
    for wrap in (lambda z: (z, None), lambda z: [z], lambda z: SimpleNamespace(logits=z)):
        got = extract(Wraps(wrap), [data])
        assert (got.features.shape, got.logits.shape) == (want, (22, 4))
    for wrap in (lambda z: {"scores": z}, lambda z: z[:, 0], lambda z: None, lambda z: z[None]):
        with pytest.raises(InputError, match="must return logits"):
            extract(Wraps(wrap), [data])


def test_classes_of_the_data_and_of_the_model(data):
    """Logits over other classes (an ImageNet model on new data) are left out."""
    x, y = data
    same, other = extract(mlp(), [(x, y)], 4), extract(mlp(), [(x, y)], 9)
    assert same.logits.shape == (22, 4)
    assert (other.num_classes, other.logits) == (9, None)
    assert torch.equal(other.stats.counts[:4], same.stats.counts)
    with pytest.raises(InputError, match="labels were ≥ num_classes = 3"):
        extract(mlp(), [(x, y)], 3).stats.counts  # noqa: B018


def test_dtypes(data):
    x, y = data
    half = extract(mlp().bfloat16(), [(x.bfloat16(), y)])
    assert half.features.dtype == half.logits.dtype == torch.float32
    wide = extract(mlp().double(), [(x.double(), y)])
    assert wide.features.dtype == wide.logits.dtype == torch.float64
    assert accumulate(mlp().bfloat16(), [(x.bfloat16(), y)]).N == 22


def test_the_head_by_name(data):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    x = data[0]
    assert torch.equal(extract(model, [data], name="0").features, x)
    torch.testing.assert_close(extract(model, [data]).features, model[0](x).detach())


def test_progress_bar(data, capsys):
    got = extract(mlp(), batches(*data), progress=True)
    assert "features" in capsys.readouterr().err
    assert len(got) == 22
    extract(mlp(), batches(*data))  # no terminal here
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [13, 12, 1])
def test_padding_of_a_distributed_sampler_is_dropped(shuffle, size):
    x = torch.arange(size * 6.0).view(size, 6)
    y = torch.arange(size) % 4
    model = nn.Linear(6, 4)  # a bare classifier: its input is the sample itself
    parts, moments = [], []
    for rank in range(2):
        sampler = DistributedSampler(
            TensorDataset(x, y), num_replicas=2, rank=rank, shuffle=shuffle, seed=3
        )
        assert len(sampler) * 2 == size + size % 2
        loader = DataLoader(TensorDataset(x, y), batch_size=3, sampler=sampler)
        parts.append(extract(model, loader))
        moments.append(accumulate(model, loader))
    together = torch.cat([part.features for part in parts])
    assert torch.equal(together[together[:, 0].argsort()], x)
    labels = torch.cat([part.labels for part in parts])
    assert torch.equal(labels[together[:, 0].argsort()], y)
    assert all(part.logits.shape == (len(part), 4) for part in parts)
    total, want = moments[0] + moments[1], ClassStats(4, 6).update(x, y)
    assert torch.equal(total.counts, want.counts)
    torch.testing.assert_close(total.means, want.means, equal_nan=True)
    torch.testing.assert_close(total.within, want.within)


# --- capture ------------------------------------------------------------------------------------


def test_capture_keeps_the_graph():
    net = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    with capture(net) as seen:
        out = net(x)
    features = seen.features
    assert features.shape == (2, 512)
    torch.testing.assert_close(net.fc(features), out)
    features.square().sum().backward()
    assert net.conv1.weight.grad.abs().sum() > 0
    assert net.fc.weight.grad is None


def test_capture_is_after_the_neck_and_before_normalisation():
    torch.manual_seed(1)
    net = heads.swap_head(mlp(), partial(heads.etf_head, dim=7, neck="linear")).eval()
    x = torch.randn(5, 6)
    with capture(net) as seen:
        out = net(x)
    torch.testing.assert_close(seen.features, net[4].neck(net[:4](x)))
    torch.testing.assert_close(net[4].logits(seen.features), out)
    norms = seen.features.norm(dim=1)
    assert (norms - 1).abs().min() > 1e-3
    seen.features.sum().backward()
    assert net[0].weight.grad is not None


class Own(nn.Module):
    """Somebody's head without a neck attribute."""

    def __init__(self, embed=None):
        super().__init__()
        self.weight, self.project = nn.Parameter(torch.randn(4, 3)), nn.Linear(12, 3)
        if embed is not None:
            self.embed = embed

    def logits(self, features):
        return features @ self.weight.T

    def forward(self, x):
        return self.logits(self.embed(x))


class OwnMethod(Own):
    def embed(self, x):
        return self.project(x).tanh()


@pytest.mark.parametrize("head", [OwnMethod, lambda: Own(nn.Linear(12, 3))])
@pytest.mark.parametrize("wrap", [nn.Sequential, heads.Classifier])
def test_capture_of_somebodys_head(head, wrap):
    model = wrap(nn.Linear(6, 12), head())
    own = model.head if wrap is heads.Classifier else model[1]
    x = torch.randn(5, 6)
    state = dict(own.__dict__)
    with capture(model) as seen:
        model(x)
    body = model.backbone if wrap is heads.Classifier else model[0]
    torch.testing.assert_close(seen.features, own.embed(body(x)))
    assert own.__dict__.keys() == state.keys()
    assert not any(m._forward_hooks for m in model.modules())


def test_captures_nest():
    """Each sees what passes while it watches, and the head is left as it was."""
    model = heads.Classifier(nn.Linear(4, 6), heads.etf_head(6, 3, neck=None)).eval()
    before = dict(vars(model.head))
    with capture(model) as outer:
        with capture(model) as inner:
            model(torch.ones(2, 4))
        assert torch.equal(inner.features, outer.features)
        model(torch.ones(5, 4))
    assert len(outer.features) == 5
    assert len(inner.features) == 2
    assert vars(model.head) == before


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_copy_made_inside_capture_is_a_model_of_its_own(blocks):
    """As an EMA made in the block: its head must not call the original's neck."""
    net = nn.Sequential(nn.Linear(6, 12), heads.etf_head(12, 5, neck="linear"))
    x = torch.randn(4, 6)
    with ExitStack() as stack:
        seen = [stack.enter_context(capture(net)) for _ in range(blocks)][-1]
        twin = copy.deepcopy(net)
        net(x)
        before = seen.features
        with torch.no_grad():
            twin[1].neck.weight.mul_(-1)
        twin(x)
        assert seen.features is before  # only the original is watched
        with torch.no_grad():
            net[1].neck.weight.zero_()
        assert twin[1].embed(torch.ones(1, 12)).abs().sum() > 0
    again = pickle.loads(pickle.dumps(copy.deepcopy(twin)))
    torch.testing.assert_close(again(x), twin(x))
    assert "embed" not in vars(net[1])


def test_capture_holds_the_last_forward():
    net, x = mlp().eval(), torch.randn(6, 6)
    with capture(net) as seen:
        net(x[:2])
        net(x[2:])
        assert seen.features.shape == (4, 12)
    net(x)
    assert seen.features.shape == (4, 12)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_capture_says_when_nothing_passed():
    with capture(mlp()) as seen, pytest.raises(InputError, match="capture saw no features: run"):
        seen.features  # noqa: B018
    net = mlp()
    with pytest.raises(RuntimeError, match="boom"), capture(net) as seen:
        raise RuntimeError("boom")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(InputError, match="No classifier head"), capture(nn.ReLU()):
        pass


def test_capture_of_keyword_calls():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(input=x)

    x = torch.randn(5, 6)
    net = Keyword()
    with capture(net) as seen:
        net(x)
    assert seen.features is x


def swapped():
    return heads.swap_head(mlp(), heads.etf_head)


@pytest.mark.parametrize("build", [mlp, swapped, classifier])
@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("first", ["before", "after"])
def test_capture_of_compiled_models(build, how, first):
    """Also when the graph was compiled before the block, and again after it."""
    torch.compiler.reset()
    net = build().eval()
    x = torch.randn(5, 6)
    want = net(x)
    with capture(net) as seen:
        net(x)
    features = seen.features
    if how == "model.compile":
        net.compile(backend="aot_eager", fullgraph=True)
        model = net
    else:
        model = torch.compile(net, backend="aot_eager", fullgraph=True)
    if first == "after":
        model(x)
    for _ in range(2):
        with capture(model) as seen:
            out = model(x)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(seen.features, features)
        assert seen.features.requires_grad
        torch.testing.assert_close(model(x), want)
    got = extract(model, [x])
    torch.testing.assert_close(got.features, features.detach())
    if build is not classifier:
        torch.testing.assert_close(got.logits, want.detach())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [mlp, swapped, classifier])
@pytest.mark.usefixtures("one_process")
def test_capture_and_extract_of_ddp(build, data):
    net = build()
    want = extract(net, batches(*data))
    ddp = nn.parallel.DistributedDataParallel(net)
    got = extract(ddp, batches(*data))
    torch.testing.assert_close(got.features, want.features)
    torch.testing.assert_close(got.logits, want.logits)
    stats = accumulate(ddp, batches(*data)).all_reduce()
    torch.testing.assert_close(stats.within, want.stats.within)
    with capture(ddp) as seen:
        ddp(data[0])
    seen.features.square().sum().backward()
    assert seen.features.shape == want.features.shape
    assert next(net.parameters()).grad is not None


def test_groups_for_standard_errors():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    samples = FeatureSet(x, y, 3)
    grouped = samples.grouped(5)
    assert (grouped.stats.groups, samples.stats.groups) == (5, 0)
    assert torch.equal(grouped.stats.within, samples.stats.within)
    assert grouped.features is samples.features
    with pytest.raises(InputError, match="integer ≥ 2, got 1"):
        samples.grouped(1)
    with pytest.raises(InputError, match="without labels"):
        FeatureSet(x, None, 3).grouped(5)
    model = heads.Classifier(nn.Linear(4, 6), heads.etf_head(6, 3, neck=None))
    assert accumulate(model, [(x, y)], 3, groups=4).groups == 4
