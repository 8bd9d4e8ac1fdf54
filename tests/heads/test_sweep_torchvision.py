"""Every classification architecture of torchvision takes a head.

All of them are built without memory on the meta device, which knows shapes but no numbers; a small
model of each family runs for real.
"""

import copy
import re
import warnings
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from ncmethods._core import find_auxiliary, find_head, find_heads
from ncmethods.features import accumulate, capture, extract
from ncmethods.heads import Classifier, FixedHead, cosine_head, etf_head, swap_head
from ncmethods.heads.swap import widths

MODELS = torchvision.models
NAMES = MODELS.list_models(module=MODELS)
OLD, NEW = 17, 11


class Shapes(TorchFunctionMode):
    """Weights on the meta device; the arithmetic of constructors stays real (RegNet needs it)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(name, **more):
    if name in ("googlenet", "inception_v3"):
        more.setdefault("init_weights", False)
    return getattr(MODELS, name)(weights=None, num_classes=OLD, **more)


def on_meta(name, **more):
    with Shapes():
        return build(name, **more).to("meta")


def image(name, batch=1):
    side = {"inception_v3": 299}.get(name, 224 if re.match("vit|maxvit|alexnet|vgg", name) else 64)
    return torch.zeros(batch, 3, side, side, device="meta")


def classifiers(net):
    """Names of the layers with as many outputs as the model was built for."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {n for n, m in layers.items() if widths(m)[1] == OLD}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name):
    """Swapped, captured and split, with another number of classes, told nothing but the head."""
    net, x = on_meta(name).eval(), image(name)
    (found,) = find_heads(net)
    old, D = found.module, widths(found.module)[0]
    assert classifiers(net) == {found.name, *(f.name for _, f in find_auxiliary(net))}
    assert swap_head(net, etf_head, num_classes=NEW) is net
    assert find_head(net) == (found.name, net.get_submodule(found.name))
    head = find_head(net).module
    assert isinstance(head, FixedHead)
    assert (head.in_features, head.out_features) == (D, NEW)
    assert head.weight.device.type == "cpu"  # on the meta device the frame would be lost
    assert not classifiers(net)
    assert getattr(net, "num_classes", NEW) == NEW
    with torch.no_grad(), capture(net.to("meta")) as seen:
        assert net(x).shape == (1, NEW)
    assert seen.features.shape == (1, D)
    model = Classifier.from_model(net, cosine_head, num_classes=5).eval().to("meta")
    with torch.no_grad():
        out = model(x)
    assert (out.features.shape, out.logits.shape) == ((1, D), (1, 5))
    assert widths(old) == (D, OLD)


def test_the_sweep_is_complete():
    assert len(NAMES) >= 80
    assert {"squeezenet1_0", "inception_v3", "googlenet", "maxvit_t", "swin_v2_b"} <= {*NAMES}


# --- one of each family, for real ---------------------------------------------------------------

FAMILIES = {  # the classifier's width
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin": 24,
    "vgg": 12,
    "vit": 24,
}


def small(name):
    if name == "vit":
        return MODELS.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=OLD)
    if name == "swin":
        return MODELS.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=OLD)
    if name == "vgg":  # its classifier, narrower
        net = MODELS.VGG(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), OLD, init_weights=False)
        net.avgpool = nn.AdaptiveAvgPool2d(2)
        net.classifier[0], net.classifier[3] = nn.Linear(16, 12), nn.Linear(12, 12)
        net.classifier[6] = nn.Linear(12, OLD)
        return net
    return build(name, **({"aux_logits": False} if name == "googlenet" else {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_run(name):
    torch.manual_seed(0)
    net, D = small(name), FAMILIES[name]
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    fresh = copy.deepcopy(net)
    with capture(net) as seen:  # in train mode, and before the swap
        assert net(x).shape == (4, OLD)
    assert seen.features.shape == (4, D)

    swap_head(net, etf_head, num_classes=NEW)
    with capture(net) as seen:
        logits = net(x)
    assert logits.shape == (4, NEW)
    assert seen.features.shape == (4, D)
    nn.functional.cross_entropy(logits, y).backward()
    first = next(net.parameters())  # the layer that is farthest from the head
    assert first.grad.abs().sum() > 0
    assert torch.isfinite(first.grad).all()

    swap_head(fresh, etf_head, num_classes=NEW)  # another rotation
    fresh.load_state_dict(net.state_dict())
    net.eval(), fresh.eval()
    torch.testing.assert_close(fresh(x), net(x))

    got = extract(net, [(x, y)], NEW)
    with torch.no_grad(), capture(net) as seen:
        want = net(x)
    torch.testing.assert_close(got.logits, want)
    torch.testing.assert_close(got.features, seen.features)
    assert accumulate(net, [(x, y)], NEW).dim == D
    head = find_head(net).module
    if name != "squeezenet1_1":  # whose features are averaged over positions
        torch.testing.assert_close(head.logits(got.features), want)

    model = Classifier.from_model(net).eval()  # keeps the head
    out = model(x)
    assert model.head is head
    if name != "squeezenet1_1":
        torch.testing.assert_close(out.logits, want)
        torch.testing.assert_close(out.features, got.features)


# --- squeezenet: a convolution, a ReLU, a pooling -----------------------------------------------


def test_squeezenet_before_the_swap():
    torch.manual_seed(0)
    net = build("squeezenet1_1").eval()
    x = torch.randn(2, 3, 64, 64)
    maps = net.features(x)
    assert maps.shape[-1] > 1
    with capture(net) as seen:
        net(x)
    torch.testing.assert_close(seen.features, maps.mean((2, 3)))
    conv = net.classifier[1]
    with pytest.warns(UserWarning, match="SqueezeNet cuts its logits at zero"):
        model = Classifier.from_model(net)
    out = model(x)
    torch.testing.assert_close(out.features, maps.mean((2, 3)))
    torch.testing.assert_close(out.logits, conv(maps).mean((2, 3)))  # pooling commutes, ReLU aside


def test_squeezenet_after_the_swap():
    torch.manual_seed(0)
    net = swap_head(build("squeezenet1_1"), etf_head).eval()
    x = torch.randn(2, 3, 64, 64)
    head, maps = net.classifier[1], net.features(x)
    each = maps.movedim(1, -1).flatten(0, 2)  # one row per position
    want = head(each).unflatten(0, (2, -1)).mean(1)
    torch.testing.assert_close(net(x), want)
    assert (want < 0).any()  # a ReLU would have cut them
    with capture(net) as seen:
        net(x)
    features = head.embed(each).unflatten(0, (2, -1)).mean(1)
    torch.testing.assert_close(seen.features, features)
    assert find_head(net).name == "classifier.1"
    assert isinstance(net.classifier[2], nn.Identity)
    assert [*net.state_dict()][-1].startswith("classifier.1.")


def test_squeezenet_with_a_linear_head():
    """The control run: nn.Linear becomes the 1×1 convolution that acts the same."""
    torch.manual_seed(0)
    net, linear = build("squeezenet1_1").eval(), nn.Linear(512, NEW)
    swap_head(net, linear)
    conv, x = net.classifier[1], torch.randn(2, 3, 48, 48)
    assert isinstance(conv, nn.Conv2d)
    want = linear(net.features(x).mean((2, 3)))
    torch.testing.assert_close(net(x), want)
    assert conv.weight.requires_grad
    assert conv.weight.device.type == conv.bias.device.type == "cpu"
    assert swap_head(net, partial(nn.Linear, bias=False)).classifier[1].bias is None
    assert net.num_classes == NEW


# --- inception and googlenet: auxiliary classifiers ---------------------------------------------

AUXILIARY = {"inception_v3": ["AuxLogits.fc"], "googlenet": ["aux1.fc2", "aux2.fc2"]}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_classifiers(name):
    """Not the head; they follow its number of classes, and are swapped only on request."""
    x = image(name, batch=2)
    net = on_meta(name)
    assert [f.name for _, f in find_auxiliary(net)] == AUXILIARY[name]
    before = [net.get_submodule(n) for n in AUXILIARY[name]]
    swap_head(net, etf_head)
    assert [net.get_submodule(n) for n in AUXILIARY[name]] == before  # K is the same
    swap_head(net, etf_head, num_classes=NEW)
    for n, old in zip(AUXILIARY[name], before):
        assert type(net.get_submodule(n)) is nn.Linear
        assert widths(net.get_submodule(n)) == (old.in_features, NEW)
    net.to("meta").train()
    with capture(net) as seen:
        out = net(x)  # a named tuple in train mode
    assert {tuple(z.shape) for z in out} == {(2, NEW)}
    assert seen.features.shape == (2, net.fc.in_features)
    net.eval()
    assert net(x).shape == (2, NEW)

    swap_head(net, etf_head, num_classes=5, auxiliary=True)
    assert all(isinstance(net.get_submodule(n), FixedHead) for n in AUXILIARY[name])
    assert find_head(net).name == "fc"
    assert [f.name for _, f in find_auxiliary(net)] == AUXILIARY[name]
    out = net.to("meta").train()(x)
    assert {tuple(z.shape) for z in out} == {(2, 5)}
    with pytest.raises(ValueError, match="auxiliary=True needs a builder"):
        swap_head(net, etf_head(net.fc.in_features, 5), auxiliary=True)


@pytest.mark.parametrize("name", AUXILIARY)
def test_a_classifier_leaves_them_out(name):
    """Output has no place for their logits, and parameters without gradients stop DDP."""
    model = Classifier.from_model(on_meta(name), etf_head, num_classes=NEW).to("meta").train()
    assert not find_auxiliary(model)
    out = model(image(name, batch=2))
    assert (out.logits.shape, out.features.shape[1]) == ((2, NEW), model.head.in_features)
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- the ReLU trap, in each family --------------------------------------------------------------

RELU = {  # whether the features come out of a ReLU
    "alexnet": True,
    "convnext_tiny": False,  # GELU, then LayerNorm
    "densenet121": True,  # a functional one, after BatchNorm
    "efficientnet_b0": False,  # SiLU
    "efficientnet_v2_s": False,
    "googlenet": True,  # functional
    "inception_v3": True,
    "maxvit_t": False,  # Tanh
    "mnasnet0_5": True,
    "mobilenet_v2": True,  # ReLU6
    "mobilenet_v3_small": False,  # Hardswish, though there are ReLUs inside
    "regnet_y_400mf": True,
    "resnet18": True,
    "resnext50_32x4d": True,
    "shufflenet_v2_x0_5": True,
    "squeezenet1_1": True,
    "swin_t": False,
    "vgg11": True,
    "vit_b_16": False,
    "wide_resnet50_2": True,
}


@pytest.mark.parametrize("name", RELU)
def test_relu_warning(name):
    net = on_meta(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap_head(net, partial(etf_head, neck=None))
    assert len(caught) == RELU[name]
    assert all(re.search(r"cosine 0\.[67]", str(w.message)) for w in caught)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("swin", "vit", "vgg")])
def test_the_warning_is_true(name):
    """The features of the small models are non-negative where, and only where, it warns."""
    torch.manual_seed(0)
    net = small(name)
    with torch.no_grad(), capture(net) as seen:
        net(torch.randn(4, 3, 64, 64))
    assert bool((seen.features >= 0).all()) == RELU[name]
