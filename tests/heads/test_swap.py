"""swap_head and Classifier.from_model on other people's models."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F

from ncmethods import heads
from ncmethods._core import InputError, find_head, find_heads
from ncmethods.features import capture, extract
from ncmethods.heads import Classifier, etf_head, swap_head

MODELS = torchvision.models


def build(name, device="cpu"):
    with torch.device(device):
        return getattr(MODELS, name)(weights=None, num_classes=17)


def mlp(width=12):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


# --- swap_head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_kept(dtype):
    for training in (True, False):
        net = mlp().to(dtype).train(training)
        swap_head(net, etf_head)
        assert net[2].weight.dtype == net[2].neck.weight.dtype == dtype
        assert net[2].training is net[2].neck.training is training
        assert net(torch.randn(3, 6, dtype=dtype)).shape == (3, 4)
    with torch.device("meta"):
        net = mlp().to(dtype)
    swap_head(net, etf_head)
    assert net[2].weight.dtype == dtype


def test_a_swapped_model_in_eval_mode_does_not_mix_samples():
    net = swap_head(mlp().eval(), etf_head)
    x = torch.randn(8, 6)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_num_classes_follows_the_head():
    class HF(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(6, 12), nn.Linear(12, 4)
            self.config = SimpleNamespace(num_labels=4, hidden_size=12, problem_type=None)
            self.num_labels = self.num_classes = 4

        def forward(self, x):
            return SimpleNamespace(logits=self.classifier(self.body(x)))

    net = swap_head(HF(), etf_head, num_classes=9)
    assert (net.num_labels, net.num_classes, net.config.num_labels) == (9, 9, 9)
    assert net.config.hidden_size == 12
    assert net(torch.randn(2, 6)).logits.shape == (2, 9)
    vit = build("vit_b_16", "meta")
    assert vit.num_classes == 17
    assert swap_head(vit, etf_head, num_classes=5).num_classes == 5


def test_what_can_be_swapped_in():
    for head in (
        etf_head,
        partial(etf_head, neck="linear", dim=7),
        heads.cosine_head,
        nn.Linear,
        lambda width, K: nn.Linear(width, K, bias=False),
        etf_head(12, 4),
        nn.Linear(12, 4),
    ):
        net = swap_head(mlp(), head)
        assert net(torch.randn(3, 6)).shape == (3, 4)
    net = mlp()
    built = etf_head(12, 11)
    assert swap_head(net, built)[2] is built
    assert net(torch.randn(3, 6)).shape == (3, 11)


def test_a_swapped_head_can_be_swapped_again():
    net = swap_head(swap_head(mlp(), etf_head), heads.cosine_head, num_classes=6)
    assert isinstance(net[2], heads.CosineHead)
    assert net(torch.randn(3, 6)).shape == (3, 6)


def test_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.coarse, self.fine = nn.Linear(6, 3), nn.Linear(6, 9)

        def forward(self, x):
            return self.coarse(x), self.fine(x)

    with pytest.raises(InputError, match=r"2 layers of Two.*'coarse' \(3, 6\), 'fine' \(9, 6\)"):
        swap_head(Two(), etf_head)
    net = swap_head(Two(), etf_head, name="coarse")
    assert isinstance(net.coarse, heads.FixedHead)
    assert isinstance(net.fine, nn.Linear)
    assert [z.shape[1] for z in net(torch.randn(2, 6))] == [3, 9]
    with pytest.raises(InputError, match=r"Unknown module name 'fien'.*Did you mean 'fine'"):
        swap_head(Two(), etf_head, name="fien")


def test_heads_that_do_not_fit():
    for call, words in [
        (lambda: swap_head(mlp(), etf_head(11, 4)), "takes 11 features.*takes 12.*in_features=12"),
        (lambda: swap_head(mlp(), etf_head(12, 4), num_classes=5), "num_classes=5.*4 classes"),
        (lambda: swap_head(mlp(2), etf_head), r"needs dim ≥ 3, got 2"),
        (lambda: swap_head(nn.Linear(6, 4), etf_head), "bare linear"),
        (lambda: swap_head(mlp(), etf_head, name="1"), "Tanh has no in_features"),
        (lambda: swap_head(nn.Sequential(nn.ReLU()), etf_head), "No classifier head"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert swap_head(mlp(), etf_head(12, 4), num_classes=4)[2].out_features == 4


def test_wrapped_models():
    x = torch.randn(3, 6)
    for wrap in (nn.DataParallel, partial(torch.compile, backend="aot_eager")):
        net = mlp()
        wrapped = wrap(net)
        assert swap_head(wrapped, etf_head) is wrapped
        assert isinstance(net[2], heads.FixedHead)
        assert wrapped(x).shape == (3, 4)
        torch.testing.assert_close(wrapped.eval()(x), net.eval()(x))


def test_after_wrapping_by_ddp_it_is_too_late(one_process):
    ddp = nn.parallel.DistributedDataParallel(mlp())
    for net in (ddp, torch.compile(ddp, backend="eager")):
        with pytest.raises(InputError, match="Swap the head first, then wrap"):
            swap_head(net, etf_head)
    assert isinstance(ddp.module[2], nn.Linear)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_swapped_models_can_be_wrapped(wrap, one_process):
    torch.manual_seed(0)
    net, x, y = swap_head(mlp(), etf_head), torch.randn(8, 6), torch.arange(8) % 4
    plain = copy.deepcopy(net)
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        wrapped = torch.compile(net, backend="aot_eager", fullgraph=True)
    frame = net[2].weight.clone()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    want = F.cross_entropy(plain(x), y)
    want.backward()
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x), y)
        loss.backward()
        if not step:
            torch.testing.assert_close(loss, want)
            torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)
        optimizer.step()
    assert torch.equal(net[2].weight, frame)
    with capture(wrapped) as seen:
        assert wrapped(x).shape == (8, 4)
    assert seen.features.shape == (8, 12)


def test_state_dict_both_ways():
    """Neckless fixed rows have the state of a bias-free Linear."""
    net = swap_head(mlp(), partial(etf_head, neck=None))
    plain = swap_head(mlp(), partial(nn.Linear, bias=False))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(plain[2].weight, net[2].weight)
    cosines = F.normalize(plain[:2](x), dim=1) @ plain[2].weight.T
    torch.testing.assert_close(net(x), net[2].scale * cosines)
    net.load_state_dict(plain.state_dict())


# --- where the classifier is --------------------------------------------------------------------


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.parametrize(
    ("net", "where"),
    [
        (lambda: nn.Sequential(nn.Flatten(), mlp()), "1.2"),
        (lambda: nn.Sequential(mlp(), nn.Sequential(nn.Dropout(), nn.Linear(4, 4))), "1.1"),
        (lambda: nn.Sequential(*mlp(), nn.LogSoftmax(1)), "2"),
        (conv_net, "2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), "1"),
        (lambda: nn.ModuleDict({"model": MODELS.VisionTransformer(8, 4, 1, 1, 8, 8)}), "model"),
    ],
    ids=["nested", "two blocks", "softmax behind", "convolutions", "only one", "inside another"],
)
def test_plain_sequences_and_wrappers(net, where):
    net = net()
    found = find_head(net)
    assert found.name == (f"{where}.heads.head" if where == "model" else where)
    swap_head(net, etf_head, num_classes=3)
    assert find_head(net).name == found.name
    assert isinstance(find_head(net).module, heads.FixedHead)


def test_a_convolution_in_a_plain_sequence():
    torch.manual_seed(0)
    net, x = swap_head(conv_net(), etf_head), torch.randn(2, 3, 8, 8)
    with capture(net) as seen:
        assert net(x).shape == (2, 4)
    torch.testing.assert_close(seen.features, net[2].embed(net[:2](x)).mean((2, 3)))
    got = extract(net, [x])
    assert (got.features.shape, got.logits.shape) == ((2, 6), (2, 4))


class Noted(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        vars(self).update(attributes)

    def forward(self, x):
        return self.second(self.first(x))


def test_the_number_of_classes_that_a_model_notes_down():
    assert find_head(Noted(num_classes=3)).name == "second"
    assert find_head(Noted(config=SimpleNamespace(num_labels=3))).name == "second"
    net = swap_head(Noted(num_classes=3), etf_head, num_classes=4)
    assert (net.num_classes, net(torch.randn(2, 6)).shape) == (4, (2, 4))
    for unknown in (Noted(), Noted(num_classes=5)):
        with pytest.raises(InputError, match=r"2 layers of Noted.*'first'.*'second'.*name='…'"):
            find_head(unknown)


def test_candidates_side_by_side_are_listed():
    for box, first in (
        (nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)}), "heads.a"),
        (nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)]), "heads.0"),
    ):
        net = nn.Module()
        net.heads, net.trunk = box, nn.Linear(4, 4)
        with pytest.raises(InputError, match=rf"3 layers of Module.*'{first}' \(2, 4\)"):
            swap_head(net, etf_head)
        swap_head(net, etf_head, name=first)
        assert isinstance(net.get_submodule(first), heads.FixedHead)


def test_a_long_list_of_candidates_ends_with_the_last():
    net = nn.Module()
    net.a, net.b = nn.Sequential(*[nn.Linear(4, 4) for _ in range(15)]), nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"16 layers.*: …, 6 before these, 'a\.6'.*'b' \(4, 4\)"):
        find_head(net)


def test_convolutions_that_might_be_it_are_listed():
    net = nn.Module()
    net.a, net.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
    with pytest.raises(InputError, match=r"No classifier head.*name='…'.*'b' \(5, 4, 1, 1\)"):
        find_head(net)
    assert find_head(net, name="b").module is net.b


# --- classifiers whose logits are averaged ------------------------------------------------------


class Distilled(nn.Module):
    """What DeiT and LeViT do."""

    def __init__(self, names=("head", "head_dist"), bias=True):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.Tanh()) for _ in names)
        for name in names:
            self.add_module(name, nn.Linear(12, 4, bias=bias))
        self.names, self.num_classes = names, 4

    def forward(self, x):
        z = [self.get_submodule(n)(b(x)) for n, b in zip(self.names, self.bodies)]
        return (z[0] + z[1]) / 2


class Branches(nn.Module):
    """What CrossViT does: branches of different widths."""

    pretrained_cfg = {"classifier": ("head.0", "head.1")}

    def __init__(self):
        super().__init__()
        self.bodies = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 12)])
        self.head = nn.ModuleList([nn.Linear(8, 4), nn.Linear(12, 4)])

    def forward(self, x):
        return torch.stack([h(b(x)) for h, b in zip(self.head, self.bodies)]).mean(0)


@pytest.mark.parametrize(
    "names",
    [
        ("head", "head_dist"),
        ("cls_classifier", "distillation_classifier"),
        ("head", "dist_head"),
        ("classifier", "classifier_distill"),
    ],
)
def test_averaged_heads_are_swapped_together(names):
    torch.manual_seed(0)
    net, x = Distilled(names), torch.randn(5, 6)
    assert [f.name for f in find_heads(net)] == [*names]
    assert find_head(net).name == names[0]
    swap_head(net, partial(etf_head, generator=torch.Generator().manual_seed(0)), num_classes=3)
    one, two = (net.get_submodule(n) for n in names)
    assert [f.name for f in find_heads(net)] == [*names]
    assert torch.equal(one.weight, two.weight)
    assert one.weight.data_ptr() != two.weight.data_ptr()  # safetensors refuses shared memory
    assert one.neck is not two.neck
    assert net.num_classes == 3
    out = net(x)
    assert out.shape == (5, 3)
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    with capture(net) as seen:
        net(x)
    torch.testing.assert_close(seen.features, one.embed(net.bodies[0](x)))
    with capture(net, name=names[1]) as seen:
        net(x)
    torch.testing.assert_close(seen.features, two.embed(net.bodies[1](x)))
    swap_head(net, nn.Linear, name=names[1])
    assert isinstance(net.get_submodule(names[1]), nn.Linear)
    assert net.get_submodule(names[0]) is one
    with pytest.raises(InputError, match="fuses 2 heads"):
        Classifier.from_model(swap_head(Distilled(names), etf_head))


def test_a_distance_is_no_twin():
    net = nn.ModuleDict({"head": nn.Linear(12, 4), "head_distance": nn.Linear(12, 1)})
    assert [f.name for f in find_heads(net)] == ["head"]


def test_branches_of_different_widths():
    net, x = Branches(), torch.randn(5, 6)
    assert [f.name for f in find_heads(net)] == ["head.1", "head.0"]
    swap_head(net, etf_head, num_classes=3)
    assert [h.in_features for h in net.head] == [8, 12]
    assert net(x).shape == (5, 3)
    with pytest.raises(InputError, match=r"takes 12 features.*takes 8"):
        swap_head(Branches(), etf_head(12, 3))


@pytest.mark.parametrize("build", [Distilled, partial(Distilled, bias=False), Branches])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_classifier_of_averaged_heads(build, dtype):
    """One head on the concatenation; without a new one its logits are the model's own."""
    torch.manual_seed(0)
    net, x = build().to(dtype), torch.randn(5, 6, dtype=dtype)
    want, features = net(x), [b(x) for b in net.bodies]
    model = Classifier.from_model(copy.deepcopy(net))
    out = model(x)
    torch.testing.assert_close(out.logits, want)
    torch.testing.assert_close(
        out.features.sort(1).values, torch.cat(features, dim=1).sort(1).values
    )
    assert model.head.weight.shape == (4, sum(f.shape[1] for f in features))
    assert (model.head.bias is None) == (want is not None and find_head(net).module.bias is None)
    made = Classifier.from_model(net, etf_head, num_classes=3)
    assert made.head.in_features == model.head.in_features
    assert made(x).logits.shape == (5, 3)


def test_a_classifier_before_the_pooling():
    """CLIP's ResNets score every token and take the first; a Classifier takes the first before."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.head(self.body(x))[:, 0]

    net, x = swap_head(Tokens(), nn.Linear), torch.randn(5, 3, 6)
    with capture(net) as seen:
        want = net(x)
    assert seen.features.shape == (5, 3, 12)
    with pytest.raises(InputError, match=r"features of shape \(5, 3, 12\).*Classifier.from_model"):
        extract(net, [x])
    out = Classifier.from_model(net)(x)
    assert out.features.shape == (5, 12)
    torch.testing.assert_close(out.logits, want)
    assert swap_head(Tokens(), etf_head)(x).shape == (5, 4)


# --- auxiliary classifiers ----------------------------------------------------------------------


class Auxiliary(nn.Module):
    """What inception does, under a class that is not torchvision's."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(6, 12), nn.Linear(12, 4)
        self.AuxLogits = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4, bias=False))

    def forward(self, x):
        h = self.body(x)
        return (self.fc(h), self.AuxLogits(h)) if self.training else self.fc(h)


def test_auxiliary_classifiers_follow():
    net, x = Auxiliary().double(), torch.randn(5, 6, dtype=torch.float64)
    old = net.AuxLogits[2]
    assert swap_head(net, etf_head).AuxLogits[2] is old
    swap_head(net, etf_head, num_classes=3)
    assert isinstance(net.AuxLogits[2], nn.Linear)
    assert [z.shape for z in net(x)] == [(5, 3)] * 2
    assert net.AuxLogits[2].weight.dtype == torch.float64
    swap_head(net, etf_head, auxiliary=True)
    assert [type(m) for m in (net.fc, net.AuxLogits[2])] == [heads.FixedHead] * 2
    assert [z.shape for z in net(x)] == [(5, 3)] * 2
    with pytest.raises(InputError, match="auxiliary=True needs a builder"):
        swap_head(net, etf_head(12, 3), auxiliary=True)
    model = Classifier.from_model(net)  # a foreign class: its branch may be needed, and stays
    assert model.train()(x).logits.shape == (5, 3)


# --- transformers -------------------------------------------------------------------------------

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
TRANSFORMERS = {  # configuration, and D
    "ViTForImageClassification": (TINY, 24),
    "DeiTForImageClassification": (TINY, 24),
    "DeiTForImageClassificationWithTeacher": (TINY, 24),
    "BeitForImageClassification": (TINY, 24),
    "Dinov2ForImageClassification": (TINY, 48),
    "ResNetForImageClassification": (STAGES | {"embedding_size": 8, "layer_type": "basic"}, 16),
    "ConvNextForImageClassification": (STAGES | {"num_stages": 2}, 16),
    "SwinForImageClassification": (
        {
            "image_size": 32,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        24,
    ),
    "MobileNetV2ForImageClassification": ({"depth_multiplier": 0.25}, 1280),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options, D = TRANSFORMERS[name]
    cls = getattr(transformers, name)
    names = dict(enumerate(["cat", "dog", "eel", "fly"]))
    config = cls.config_class(**options, id2label=names, label2id={w: i for i, w in names.items()})
    net = cls(config)
    x, y = torch.randn(5, 3, 32, 32), torch.arange(5) % 3
    swap_head(net, etf_head)
    assert (net.config.num_labels, net.config.id2label) == (4, names)  # K is the same: names stay
    swap_head(net, etf_head, num_classes=3)
    assert (net.config.num_labels, len(net.config.id2label), len(net.config.label2id)) == (3, 3, 3)
    assert getattr(net, "num_labels", 3) == 3
    teacher = "Teacher" in name  # for inference only: it takes no labels
    with capture(net) as seen:
        out = net(x) if teacher else net(x, labels=y)
    assert out.logits.shape == (5, 3)
    assert seen.features.shape == (5, D)
    loss = F.cross_entropy(out.logits, y)
    if not teacher:
        torch.testing.assert_close(out.loss, loss)
    loss.backward()
    first = next(p for p in net.parameters() if p.ndim == 4)
    assert first.grad.abs().sum() > 0

    net.eval()
    got = extract(net, [{"pixel_values": x, "labels": y}])
    assert (got.features.shape, got.num_classes) == ((5, D), 3)
    if not teacher:
        torch.testing.assert_close(find_head(net).module.logits(got.features), got.logits)
    again = cls(config)  # its number of labels is now 3
    assert find_head(again).module.weight.shape[0] == 3
    swap_head(again, etf_head).load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(x).logits, got.logits)

    model = Classifier.from_model(net, etf_head).eval()
    width = 2 * D if teacher else D
    assert [z.shape for z in model(x)] == [(5, width), (5, 3)]


# --- the ReLU trap ------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [swap_head, Classifier.from_model])
@pytest.mark.parametrize("K", [3, 10, 100])
def test_relu_warning(attach, K):
    net = partial(MODELS.resnet18, num_classes=K)
    with pytest.warns(UserWarning, match=r"cosine 0\.[67]\d\d.*neck='bn'.*canonical") as caught:
        attach(net(), partial(etf_head, neck=None))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net(), etf_head)
        attach(net(), partial(etf_head, neck="linear"))
        attach(net(), partial(etf_head, neck=None, rotation="canonical"))
        attach(net(), heads.cosine_head)
        attach(net(), nn.Linear)
        attach(mlp(), partial(etf_head, neck=None))  # no ReLU


def test_relu_warning_reads_the_path_to_the_head():
    """Not what stands beside it, and what comes last counts."""

    def net(*body, **beside):
        net = nn.ModuleDict({"body": nn.Sequential(*body), **beside})
        net.fc = nn.Linear(12, 4)
        return net

    relu = nn.Linear(6, 12), nn.ReLU()
    neckless = partial(etf_head, neck=None)
    for case in (
        net(*relu),
        net(*relu, nn.Dropout()),
        net(*relu, nn.BatchNorm1d(12)),  # as in DenseNet, where a functional ReLU follows
        net(*relu, aux=nn.Linear(12, 4)),
        net(nn.Conv2d(3, 12, 3)),
    ):
        with pytest.warns(UserWarning, match="reach at most cosine 0"):
            swap_head(case, neckless)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in (
            net(*relu, nn.Linear(12, 12)),
            net(*relu, nn.LayerNorm(12)),
            net(*relu, nn.Tanh()),
            net(nn.Linear(6, 12)),
        ):
            swap_head(case, neckless)
        swap_head(net(*relu), partial(etf_head, neck=None, as_parameter=True, rotation="canonical"))
        with torch.device("meta"):
            swap_head(net(*relu), etf_head(12, 4, neck=None, rotation="canonical"))
    with pytest.warns(UserWarning, match="reach at most cosine 0"):
        swap_head(net(*relu), partial(neckless, as_parameter=True))


def test_non_negative_features_stop_where_the_warning_says():
    """The best feature of a ReLU net for a rotated row is its positive part, at cosine 0.707."""
    w = etf_head(512, 100, generator=torch.Generator().manual_seed(0)).weight
    best = nn.functional.normalize(w.clamp(min=0), dim=1)
    cap = (best * w).sum(1)
    assert cap.mean().item() == pytest.approx(0.5**0.5, abs=0.01)
    x = torch.rand(2000, 512)
    assert (nn.functional.normalize(x, dim=1) @ w.T).max() < cap.max()
    canonical = etf_head(512, 100, rotation="canonical").weight
    cap = canonical.clamp(min=0).norm(dim=1)
    torch.testing.assert_close(cap, torch.full((100,), 0.99**0.5))


# --- Classifier ---------------------------------------------------------------------------------


def test_classifier_returns_features_and_logits():
    model = Classifier(nn.Linear(6, 12), etf_head(12, 4, dim=5))
    x = torch.randn(8, 6)
    out = model(x)
    assert isinstance(out, heads.Output)
    features, logits = out
    assert (features.shape, logits.shape) == ((8, 5), (8, 4))
    assert torch.equal(logits, model.head.logits(features))
    plain = Classifier(nn.Linear(6, 12), nn.Linear(12, 4))
    out = plain(x)
    assert torch.equal(out.features, plain.backbone(x))
    assert torch.equal(out.logits, plain.head(out.features))


def test_from_model_keeps_builds_or_takes_a_head():
    x = torch.randn(8, 6)
    net = mlp()
    want, linear = net(x).detach(), net[2]
    kept = Classifier.from_model(net)
    assert kept.head is linear
    assert torch.equal(kept(x).logits, want)
    assert torch.equal(kept(x).features, nn.Sequential(*kept.backbone[:2])(x))

    built = etf_head(12, 7)
    assert Classifier.from_model(mlp(), built).head is built
    assert Classifier.from_model(mlp(), built)(x).logits.shape == (8, 7)
    made = Classifier.from_model(mlp(), etf_head, num_classes=9)
    assert made(x).logits.shape == (8, 9)
    assert Classifier.from_model(mlp(), etf_head)(x).logits.shape == (8, 4)
    named = Classifier.from_model(nn.Sequential(nn.Linear(6, 6), mlp()), etf_head, name="1.2")
    assert named(x).logits.shape == (8, 4)


def test_from_model_equals_swap_head():
    torch.manual_seed(0)
    net, head = build("resnet18"), etf_head(512, 17)
    x = torch.randn(2, 3, 32, 32)
    want = swap_head(net, head).eval()(x)
    model = Classifier.from_model(net).eval()
    torch.testing.assert_close(model(x).logits, want)
    assert model.head is head


def test_from_model_unwraps():
    class Wraps(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.body, self.fc, self.wrap = nn.Linear(6, 12), nn.Linear(12, 4), wrap

        def forward(self, x):
            return self.wrap(self.fc(self.body(x)))

    x = torch.randn(3, 6)
    for wrap in (
        lambda z: z,
        lambda z: (z, None),
        lambda z: [z],
        lambda z: SimpleNamespace(logits=z, loss=None),
    ):
        out = Classifier.from_model(Wraps(wrap), etf_head)(x)
        assert (out.features.shape, out.logits.shape) == ((3, 12), (3, 4))


def test_from_model_sees_through_wrappers():
    x = torch.randn(3, 6)
    for wrap in (nn.DataParallel, partial(torch.compile, backend="aot_eager")):
        model = Classifier.from_model(wrap(mlp()), etf_head)
        assert model(x).logits.shape == (3, 4)
        assert isinstance(model.backbone, nn.Sequential)


def test_from_model_of_a_classifier_changes_its_head():
    first = Classifier(nn.Linear(6, 12), nn.Linear(12, 4))
    second = Classifier.from_model(first, etf_head, num_classes=5)
    assert second.backbone is first.backbone
    assert second(torch.randn(3, 6)).logits.shape == (3, 5)
    assert swap_head(first, etf_head)(torch.randn(3, 6)).logits.shape == (3, 4)


def test_classifier_errors():
    conv = nn.Conv2d(3, 12, 3)
    for call, words in [
        (lambda: Classifier(conv, nn.ReLU()), "nn.Linear or have weight.*got ReLU"),
        (lambda: Classifier.from_model(nn.Linear(6, 4)), "bare head"),
        (lambda: Classifier.from_model(mlp(), etf_head(11, 4)), "takes 11 features"),
        (lambda: Classifier.from_model(nn.ReLU()), "No classifier head"),
        (
            lambda: Classifier(conv, etf_head(12, 4))(torch.randn(2, 3, 8, 8)),
            r"\[N, in_features\], got \(2, 12, 6, 6\). Pool or flatten",
        ),
        (lambda: Classifier(lambda_module({}), etf_head(12, 4))(torch.randn(2, 6)), "got dict"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def lambda_module(value):
    module = nn.Module()
    module.forward = lambda x: value
    return module


@pytest.mark.parametrize("head", [etf_head, heads.cosine_head, nn.Linear])
def test_classifier_compiles(head):
    model = Classifier(nn.Linear(6, 12), head(12, 4)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    out = compiled(x)
    assert isinstance(out, heads.Output)
    torch.testing.assert_close(tuple(out), tuple(model(x)))


def test_the_number_of_labels_decides_between_a_head_and_a_classifier():
    """As in ModernBERT: ``head.dense`` stands before ``classifier``."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(num_labels=3)
            self.body, self.head = nn.Linear(6, 16), nn.ModuleDict({"dense": nn.Linear(16, 16)})
            self.classifier = nn.Linear(16, 3)

    assert find_head(Model()).name == "classifier"
