"""Skip-layer fine-tuning: what moves, what the classifier sees, and the command end to end."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from ncmethods import cli, data, metrics, models, training
from ncmethods._core import CheckpointError, InputError
from ncmethods.features import extract
from ncmethods.heads import Classifier
from ncmethods.heads.skip import PartlyTuned, skip_layer
from ncmethods.tracking import read_rows
from ncmethods.training import ModelConfig, TrainConfig, build_model, load_run

SKIP = cli.load_recipe("skip_finetune")
SHORT = TrainConfig(epochs=2, batch_size=32, measurements=1, threads=1, device="cpu")
FEW = data.TailConfig("fashion-mini", profile="balanced", n_max=8, validation=4)
FROZEN = {"full": set(), "linear": {0, 1, 2, 3}, "layer": {0, 1, 3}, "skip": {0, 1, 3}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small network trained on a few digits, of 28 × 28."""
    out = tmp_path_factory.mktemp("source") / "ce" / "seed0"
    splits = data.load("digits", size=28)
    splits = splits._replace(
        train=splits.train.subset(torch.arange(300)), test=splits.test.subset(torch.arange(100))
    )
    with training.process("cpu") as here:
        training.fit(
            ModelConfig("small_cnn", 1, 10), SKIP.ce, splits, SHORT, out, here=here, wandb=False
        )
    return out


@pytest.fixture(scope="module")
def ran(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("ran")
    threads = torch.get_num_threads()
    main(source, out)
    torch.set_num_threads(threads)
    return out


def main(source, out, **options):
    given = {"sources": (str(source),), "block": "blocks.2", "seeds": (0,), "lrs": (0.03, 0.1)}
    options = given | {"wandb": False, "data": FEW, "train": SHORT} | options
    with pytest.MonkeyPatch.context() as patch:  # pages take longer than the runs
        patch.setattr(SKIP.viz, "draw_run", None)
        patch.setattr("ncmethods.viz.run.comparison_page", lambda *args, **kwargs: None)
        SKIP.main(SKIP.SkipFinetune(out=out, **options))


def block_of(key):
    """Number of the block of small_cnn that a key of a state belongs to; None for the head."""
    parts = key.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None


# --- the connection -------------------------------------------------------------------------------


class Two(nn.Module):
    """Maps of 5 channels, then of ``width``, then features [N, width]."""

    def __init__(self, width=3, inplace=False):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5))
        self.act = nn.ReLU(inplace=inplace)
        self.second = nn.Conv2d(5, width, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.act(self.first(x))).amax((2, 3))


@pytest.mark.parametrize("width", [3, 5, 8])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_features_are_a_padded_sum(width, inplace):
    torch.manual_seed(0)
    net, x = Two(width, inplace).double().eval(), torch.randn(4, 2, 7, 7).double()
    h, s = net(x).detach().numpy(), net.first(x).detach().numpy().mean((2, 3))
    wide = max(width, 5)
    expected = torch.zeros(4, wide).double().numpy()
    expected[:, :width] += h
    expected[:, :5] += s
    model = PartlyTuned(net, ["first"], skip="first", images=x[:1])
    assert model.num_features == wide
    torch.testing.assert_close(model(x).detach(), torch.from_numpy(expected))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_tokens_vectors_and_another_pool():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3)
    tokens = nn.Sequential(nn.Linear(3, 5), nn.Flatten(), nn.Linear(30, 2), nn.ReLU(inplace=True))
    h, z = tokens(x), tokens[0](x)
    mean = PartlyTuned(tokens, ["0"], skip="0", images=x)(x)
    torch.testing.assert_close(mean, F.pad(h, (0, 3)) + z.sum(1) / 6)
    first = PartlyTuned(tokens, ["0"], skip="0", images=x, pool=lambda z: z[:, 0])(x)
    torch.testing.assert_close(first, F.pad(h, (0, 3)) + z[:, 0])
    vector = PartlyTuned(tokens, ["2"], skip="2", images=x)(x)  # overwritten by the ReLU
    torch.testing.assert_close(vector, h + tokens[2](z.flatten(1)))


def test_the_gradient_has_a_way_past_what_is_behind_the_block():
    """With weights of zero behind it, a block learns by the skip connection only."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 7, 7)
    for skip in (None, "first"):
        net = Two()
        nn.init.zeros_(net.second.weight)
        model = PartlyTuned(net, ["first"], skip=skip, images=x)
        model(x).square().sum().backward()
        moved = net.first[1].weight.grad
        assert bool(moved.abs().max() > 1e-3) == (skip is not None)
        assert net.second.weight.grad is None


def test_what_is_frozen_stays_in_eval_mode():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    model = Classifier(PartlyTuned(net, ["2"]), nn.Linear(4, 2)).train()
    x = torch.randn(9, 3) + 1
    model(x)
    assert [m.training for m in net] == [False, False, True, False]
    assert net[0].num_batches_tracked == 0
    assert net[2].num_batches_tracked == 1
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2
    assert not any(m.training for m in model.eval().modules())


def test_a_model_of_torchvision():
    net = models.build("torchvision:resnet18").eval()
    x = torch.rand(2, 3, 64, 64)
    seen = []
    with net.layer3.register_forward_hook(lambda *call: seen.append(call[-1])):
        net(x)
    fc = net.fc
    model = skip_layer(net, "layer3", images=x[:1], num_classes=7)
    out = model(x)
    h = model.backbone.net(x)
    torch.testing.assert_close(fc(h).sum(), net.eval()(x).matmul(fc.weight.T).add(fc.bias).sum())
    expected = h.clone()
    expected[:, :256] += seen[0].flatten(2).mean(2)
    torch.testing.assert_close(out.features, expected)
    assert out.logits.shape == (2, 7)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    inside = {f"backbone.net.layer3.{n}" for n, _ in net.layer3.named_parameters()}
    assert trained == inside | {"head.weight", "head.bias"}


def test_a_block_wider_than_the_features_widens_the_head():
    narrow = ModelConfig("resnet18_narrow", 3, 4, tuned=("net.layer2",), skip="net.layer2")
    model = build_model(narrow)
    assert model(torch.rand(2, 3, 32, 32)).features.shape == (2, 128)
    assert model.head.weight.shape == (4, 128)
    grey = ModelConfig("torchvision:resnet18", 1, 4, tuned=("layer1",), skip="layer1")
    assert build_model(grey)(torch.rand(2, 1, 32, 32)).features.shape == (2, 512)


def test_names_that_cannot_be():
    x = torch.randn(1, 2, 7, 7)
    with pytest.raises(InputError, match=r"no block 'frist'\. Near it: first"):
        PartlyTuned(Two(), ["frist"])
    with pytest.raises(InputError, match=r"no block 'seconds'\. Near it: second"):
        PartlyTuned(Two(), [], skip="seconds", images=x)
    with pytest.raises(InputError, match=r"act \(ReLU\) has no parameters"):
        PartlyTuned(Two(), ["act"])
    with pytest.raises(InputError, match="does not reach unused"):
        PartlyTuned(Two(), ["unused"], skip="unused", images=x)
    with pytest.raises(InputError, match="skip needs images"):
        PartlyTuned(Two(), ["first"], skip="first")
    with pytest.raises(InputError, match="skip needs tuned"):
        build_model(ModelConfig("small_cnn", 1, 3, skip="blocks.1"))


# --- the command ----------------------------------------------------------------------------------


def test_only_what_is_named_moves(source, ran):
    start = load_file(source / "weights.safetensors")
    heads = []
    for method in SKIP.METHODS:
        end = load_file(ran / method / "seed0" / "weights.safetensors")
        plain = {key.replace("backbone.net.", "backbone."): value for key, value in end.items()}
        assert plain.keys() == start.keys()
        for key, value in plain.items():
            same = torch.equal(value, start[key])  # BatchNorm's statistics too
            assert same == (block_of(key) in FROZEN[method]), f"{method}: {key}"
        heads.append(plain["head.weight"])
    assert all(not torch.equal(heads[0], other) for other in heads[1:])


def test_all_start_with_the_same_network(source, ran):
    splits = SKIP.seen_by((1, 28, 28), FEW.drawn(0))
    of = SKIP.source_of(str(source), SKIP.SkipFinetune(out=ran))
    built = {m: build_model(SKIP.described(of, m, "blocks.2", 10)) for m in SKIP.METHODS}
    first = built["full"].head.weight
    assert all(torch.equal(first, model.head.weight) for model in built.values())
    run = load_run(source)
    x = run.preprocess(splits.test.images[:50])
    features = run.model(x).features
    for method in ("full", "linear", "layer"):
        torch.testing.assert_close(built[method].eval()(x).features, features)
    assert not torch.allclose(built["skip"].eval()(x).features, features)
    about = json.loads((ran / "skip/seed0/config.json").read_text())
    assert (about["data"]["mean"], about["data"]["std"]) == (
        list(run.preprocess.mean),
        list(run.preprocess.std),
    )


def test_a_run_reloads_with_the_same_logits(ran):
    """Against what the loop measured with the network in memory."""
    test = SKIP.seen_by((1, 28, 28), FEW.drawn(0)).test
    for method in SKIP.METHODS:
        run = load_run(ran / method / "seed0")
        with torch.no_grad():
            logits = run.model(run.preprocess(test.images)).logits
        row = read_rows(ran / method / "seed0" / "metrics.jsonl")[-1]
        nll = float(F.cross_entropy(logits.double(), test.labels))
        assert row["test/nll"] == pytest.approx(nll, rel=1e-5)
        confusion = load_file(ran / method / "seed0/evaluation.safetensors")["confusion"]
        assert torch.equal(confusion, metrics.confusion_matrix(logits, test.labels))
        frozen = {n for n, p in run.model.named_parameters() if not p.requires_grad}
        assert {block_of(n) for n in frozen} == FROZEN[method]


def test_the_table(source, ran):
    table, differences = (ran / "table.md").read_text().strip().split("\n\n")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.split("\n")]
    assert [line[0] for line in lines[2:]] == list(SKIP.METHODS)
    assert all(math.isfinite(float(cell)) for line in lines[2:] for cell in line[1:])
    assert differences.startswith("| minus full |")
    found = dict(zip([line[0] for line in lines[2:]], [line[1:] for line in lines[2:]]))
    total = sum(p.numel() for p in load_run(source).model.parameters())
    block = 9 * 16 * 32 + 2 * 32
    assert [int(found[m][1]) for m in SKIP.METHODS] == [total, 650, 650 + block, 650 + block]
    row = read_rows(ran / "linear/seed0/metrics.jsonl")[-1]
    before = {m: json.loads((ran / m / "seed0/before.json").read_text()) for m in SKIP.METHODS}
    nc1 = {m: of["finetune/nc1_before"] for m, of in before.items()}
    assert nc1["full"] == nc1["linear"] == nc1["layer"] != nc1["skip"]
    assert row["train/nc1/pinv"] == pytest.approx(nc1["linear"], rel=1e-4)  # nothing moved
    run = load_run(source)
    train = SKIP.seen_by((1, 28, 28), FEW.drawn(0)).train
    stats = extract(run.model, [(run.preprocess(train.images), train.labels)], 10).stats
    assert nc1["full"] == pytest.approx(float(metrics.nc1_pinv(stats)), rel=1e-4)


def test_methods_are_tuned_alike(ran):
    chosen = json.loads((ran / "tuning.json").read_text())
    assert list(chosen) == list(SKIP.METHODS)
    for method, by_seed in chosen.items():
        of = by_seed["seed0"]
        tried = of["held-out accuracy"]
        assert list(tried) == ["lr=0.03", "lr=0.1"]
        assert tried[f"lr={of['lr']}"] == max(tried.values())
        assert (
            json.loads((ran / method / "seed0/config.json").read_text())["train"]["lr"] == of["lr"]
        )


def test_finished_runs_are_read_and_older_ones_too(source, ran):
    """A run whose config.json has no such fields yet is what it was."""
    before = (ran / "skip/seed0/weights.safetensors").stat().st_mtime_ns
    path = source / "config.json"
    about = json.loads(path.read_text())
    for name in ("tuned", "skip", "normalisation"):
        assert about["model"].pop(name) is None
    path.write_text(json.dumps(about))
    splits = data.load("digits", size=28)
    splits = splits._replace(
        train=splits.train.subset(torch.arange(300)), test=splits.test.subset(torch.arange(100))
    )
    with training.process("cpu") as here:
        model = ModelConfig("small_cnn", 1, 10)
        training.fit(model, SKIP.ce, splits, SHORT, source, here=here, wandb=False)
        other = replace(model, tuned=())
        with pytest.raises(CheckpointError, match="tuned"):
            training.fit(other, SKIP.ce, splits, SHORT, source, here=here, wandb=False)
    main(source, ran, methods=("skip",))
    assert (ran / "skip/seed0/weights.safetensors").stat().st_mtime_ns == before


def test_a_tuned_run_is_a_source_again(ran, tmp_path):
    of = SKIP.source_of(str(ran / "skip/seed0"), SKIP.SkipFinetune(out=tmp_path, size=20))
    assert of.shape == (1, 20, 20)
    model = build_model(of.model)
    run = load_run(ran / "skip/seed0")
    x = torch.randn(3, 1, 20, 20)
    torch.testing.assert_close(model.eval()(x).features, run.model.backbone.net(x))


def test_what_the_command_refuses(source, tmp_path):
    for options, message in (
        ({"methods": ()}, "at least one method"),
        ({"methods": ("skipp",)}, "Did you mean 'skip'"),
        ({"sources": ("small_cnn",)}, "small_cnn is not a run directory"),
        ({"sources": ("a", "b")}, "2 sources and 1 seeds"),
        ({"block": None, "methods": ("layer",)}, r"--block that is trained, as one of blocks"),
        ({"block": "block.2", "methods": ("layer",)}, r"Near it: blocks\.2"),
    ):
        with pytest.raises(InputError, match=message):
            main(source, tmp_path, **options)
    assert not (tmp_path / "tuning").exists() or not any(
        (tmp_path / "tuning").rglob("*.safetensors")
    )


def test_without_arguments_it_asks_for_nothing():
    config = SKIP.SkipFinetune()
    assert config.sources == ()
    splits = SKIP.seen_by((1, 28, 28), config.data.drawn(0))
    assert data.class_counts(splits.train).tolist() == [20] * 10
    assert len(splits.validation) == 200
