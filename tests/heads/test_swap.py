"""swap_head and Classifier.from_model on other people's models."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from ncmethods import heads
from ncmethods._core import InputError, find_head
from ncmethods.heads import Classifier, etf_head, swap_head

MODELS = torchvision.models
# Input side, and the classifier's attribute path.
TORCHVISION = {
    "resnet18": (32, "fc"),
    "vgg11": (32, "classifier.6"),
    "mobilenet_v3_small": (32, "classifier.3"),
    "densenet121": (32, "classifier"),
    "efficientnet_b0": (32, "classifier.1"),
    "vit_b_16": (224, "heads.head"),
    "swin_t": (32, "head"),
    "convnext_tiny": (32, "classifier.2"),
    "googlenet": (32, "fc"),
    "inception_v3": (75, "fc"),
}
SMALL = ("resnet18", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0")


def build(name, device="cpu"):
    extra = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False, "aux_logits": False}
    with torch.device(device):
        return getattr(MODELS, name)(weights=None, num_classes=17, **extra)


def mlp(width=12):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))


# --- swap_head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION)
def test_swap_in_torchvision(name):
    side, where = TORCHVISION[name]
    device = "cpu" if name in SMALL else "meta"
    net = build(name, device)
    width = net.get_submodule(where).in_features
    assert swap_head(net, etf_head) is net
    head = net.get_submodule(where)
    assert isinstance(head, heads.FixedHead)
    assert find_head(net) == (where, head)
    assert (head.in_features, head.out_features) == (width, 17)
    if device == "meta":
        assert head.weight.device.type == "cpu"  # the frame is not lost
        head.to("meta")
    net.eval()
    assert net(torch.zeros(1, 3, side, side, device=device)).shape == (1, 17)


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
