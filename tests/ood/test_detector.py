"""Detector: its parts put together by hand, one file, overlap, what does not fit, bad images."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ncmethods import heads, ood
from ncmethods._core import InputError
from ncmethods.features import FeatureSet, accumulate, extract
from ncmethods.ood import detector as module
from ncmethods.ood.calibration import Threshold
from ncmethods.ood.detector import Detector, Verdict
from ncmethods.training.runs import Preprocessing

LOOK = {"mean": (0.3, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "size": (12, 12)}
K = 4


def images(n=60, seed=0):
    """uint8 images of K classes, each of a colour, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])
    noise = torch.randint(-40, 41, (n, 3, 12, 12), generator=rng)
    return (colours[y][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), y


def loader(n=60, seed=0, batch=16):
    return DataLoader(TensorDataset(*images(n, seed)), batch_size=batch)


def backbone(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def linear(seed=0, num_classes=K):
    net = backbone(seed)
    return nn.Sequential(net, nn.Linear(32, num_classes))


def etf(seed=0, **kwargs):
    net = backbone(seed)
    return heads.Classifier(net, heads.etf_head(32, K, dim=16, **kwargs))


def resnet(seed=0):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=K)


def fitted(make=linear, scorer=ood.Mahalanobis, **kwargs):
    given = {"alpha": 0.1, "shrinkage": 0.1} if scorer is ood.Mahalanobis else {"alpha": 0.1}
    return Detector.fit(make(), scorer, loader(), loader(80, seed=1), **LOOK, **given | kwargs)


def same(a: Verdict, b: Verdict):
    return all(x.equal(y) for x, y in zip(a, b))


@pytest.mark.parametrize("make", [linear, etf, resnet])
def test_is_the_parts_put_together_by_hand(make):
    model = make().train()
    detector = Detector.fit(
        model, ood.Mahalanobis, loader(), loader(80, seed=1), alpha=0.1, shrinkage=0.2, **LOOK
    )
    look = Preprocessing(LOOK["mean"], LOOK["std"], (3, 12, 12))
    sets = [
        extract(model, [(look(x), y) for x, y in loader(n, seed)])
        for n, seed in ((60, 0), (80, 1), (30, 2))
    ]
    scorer = ood.Mahalanobis.fit(sets[0], shrinkage=0.2)
    threshold = Threshold.fit(scorer(sets[1].features), 0.1)
    score = scorer(sets[2].features)
    x = images(30, 2)[0]
    got = detector(x)
    torch.testing.assert_close(got.score, score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.p_value, threshold.p_value(got.score))
    assert got.flag.equal(threshold(got.score))
    assert got.label.equal(sets[2].logits.argmax(1))
    assert same(got, detector(look(x)))  # normalised already
    assert all(m.training for m in model.modules())  # as it was
    assert not got.score.requires_grad
    assert detector.num_classes == K
    assert (detector.dim, detector.images.shape) == (sets[0].dim, (3, 12, 12))


def test_one_image_is_a_batch_of_one():
    detector, x = fitted(), images(5, 3)[0]
    one, all_ = detector(x[2]), detector(x)
    assert one.score.shape == one.flag.shape == one.label.shape == (1,)
    torch.testing.assert_close(one.score, all_.score[2:3], rtol=1e-4, atol=1e-4)
    assert detector(x[:0]).flag.shape == (0,)


def test_intruders_are_flagged_and_others_seldom():
    detector = fitted()
    assert detector(images(200, 7)[0]).flag.double().mean() < 0.25
    stripes = torch.zeros(20, 3, 12, 12, dtype=torch.uint8)
    stripes[..., ::2] = 255
    seen = detector(stripes)
    assert seen.flag.all()
    assert seen.p_value.tolist() == pytest.approx([1 / 81] * 20)


@pytest.mark.parametrize("scorer", [ood.MSP, ood.NECO, ood.KLMatching, ood.RelativeMahalanobis])
def test_any_scorer(scorer, tmp_path):
    detector = fitted(etf, scorer)
    x = images(30, 2)[0]
    detector.save(tmp_path / "d")
    assert same(Detector.load(tmp_path / "d", etf(seed=1))(x), detector(x))


def test_groups_are_the_predicted_classes():
    model = linear()
    train, held = (extract(model, _normalised(n, seed)) for n, seed in ((60, 0), (400, 1)))
    label = held.logits.argmax(1)
    if torch.bincount(label, minlength=K).min() < 9:  # an untrained net: any labels will do
        model = _Mixed(model)
        train, held = (extract(model, _normalised(n, seed)) for n, seed in ((60, 0), (400, 1)))
        label = held.logits.argmax(1)
    detector = Detector.fit(
        model, ood.MaxLogit, train, held, alpha=0.1, groups="predicted class", **LOOK
    )
    scores = ood.MaxLogit.fit()(None, held.logits)
    want = Threshold.fit(scores, 0.1, groups=label, num_groups=K)
    got = detector(images(50, 2)[0])
    torch.testing.assert_close(got.p_value, want.p_value(got.score, got.label))
    torch.testing.assert_close(detector.threshold.levels, want.levels)
    broken = torch.full((1, 3, 12, 12), float("nan"))
    assert float(detector(broken).p_value) == pytest.approx(1 / (int((label == 0).sum()) + 1))
    assert len(detector.calibrate(held, groups="none").threshold.sizes) == 1
    with pytest.raises(InputError, match="Did you mean 'predicted class'"):
        detector.calibrate(held, groups="predicted")


class _Mixed(nn.Module):
    """A net whose predictions do not hang on one class: logits less their mean on noise."""

    def __init__(self, net):
        super().__init__()
        self.body = net[0]
        self.fc = nn.Linear(32, K)
        with torch.no_grad():
            x = torch.cat([self.body.eval()(x) for x, _ in _normalised(200, 5)])
            z = x @ self.fc.weight.T
            self.fc.weight /= z.std(0)[:, None]
            self.fc.bias.copy_(-(x @ self.fc.weight.T).mean(0))

    def forward(self, x):
        return self.fc(self.body(x))


def _normalised(n, seed):
    look = Preprocessing(LOOK["mean"], LOOK["std"], (3, 12, 12))
    return [(look(x), y) for x, y in loader(n, seed)]


def test_features_and_moments_instead_of_loaders():
    model = linear()
    x, want = images(30, 2)[0], fitted()
    train, held = (extract(model, _normalised(n, seed)) for n, seed in ((60, 0), (80, 1)))
    for data in (train, train.stats, train.frozen, accumulate(model, _normalised(60, 0))):
        detector = Detector.fit(
            model, ood.Mahalanobis, data, held, alpha=0.1, shrinkage=0.1, **LOOK
        )
        torch.testing.assert_close(detector(x).score, want(x).score, rtol=1e-5, atol=1e-5)
        assert (detector.sketch is None) == (data is not train)
    marked = FeatureSet(
        torch.cat((held.features, 50 + held.features[:9])),
        torch.cat((held.labels, torch.full((9,), -1))),
        K,
        torch.cat((held.logits, held.logits[:9])),
    )
    assert detector.calibrate(marked).threshold.levels.equal(want.threshold.levels)


# --- broken input -------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [ood.Mahalanobis, ood.MaxLogit, ood.MSP])
def test_broken_images_are_flagged(scorer):
    detector = fitted(scorer=scorer)
    x = Preprocessing(LOOK["mean"], LOOK["std"], (3, 12, 12))(images(6, 2)[0])
    good = detector(x)
    x[1, 0, 3, 3], x[4] = float("nan"), float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = detector(x)
    bad = torch.tensor([False, True, False, False, True, False])
    assert seen.flag[bad].all()
    assert seen.p_value[bad].tolist() == pytest.approx([1 / 81] * 2)
    assert seen.score.isnan().equal(bad)
    assert seen.label[bad].tolist() == [-1, -1]
    torch.testing.assert_close(seen.score[~bad], good.score[~bad])


def test_images_that_do_not_fit():
    detector = fitted()
    x = images(4)[0]
    for wrong in (x[:, :, :10], x[:, :1], x[0, 0], x[None]):
        with pytest.raises(InputError, match=r"images must be \[N, 3, 12, 12\]"):
            detector(wrong)
    with pytest.raises(InputError, match="uint8 or floating point, got torch"):
        detector(x.long())
    bare = Detector(linear(), ood.MSP.fit(), detector.threshold)
    with pytest.raises(InputError, match="uint8 images need mean"):
        bare(x)
    assert bare(x.float()).flag.shape == (4,)
    with pytest.raises(InputError, match="belong together"):
        Detector(linear(), ood.MSP.fit(), mean=[0.5] * 3)
    with pytest.raises(InputError, match="std must be positive"):
        Detector(linear(), ood.MSP.fit(), mean=[0.5], std=[0.0])
    with pytest.raises(InputError, match="size is"):
        Detector(linear(), ood.MSP.fit(), size=(3, 12, 12))
    with pytest.raises(InputError, match="no threshold: call calibrate"):
        Detector(linear(), ood.MSP.fit())(x.float())


# --- the calibration set ------------------------------------------------------------------------


def test_overlap_is_counted():
    x, y = images(120, 1)
    x[:13] = images(60)[0][20:33]
    held = DataLoader(TensorDataset(x, y), batch_size=40)
    with pytest.warns(UserWarning, match="^13 of 120 calibration images were in the fit set too"):
        detector = Detector.fit(linear(), ood.MSP, loader(), held, **LOOK)
    with pytest.warns(UserWarning, match="^60 of 60 calibration images"):
        detector.calibrate(loader(batch=60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate(loader(80, seed=2))


def test_overlap_of_a_large_fit_is_estimated(monkeypatch):
    monkeypatch.setattr(module, "_SKETCH", 500)
    rng = torch.Generator().manual_seed(0)
    net = linear()

    def rows(n):
        x = torch.randn(n, 32, generator=rng)
        return FeatureSet(x, torch.arange(n) % K, K, torch.randn(n, K, generator=rng))

    train, fresh = rows(20_000), rows(3000)
    mixed = FeatureSet(
        torch.cat((fresh.features, train.features[:2000])), None, K, torch.randn(5000, K)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = Detector.fit(net, ood.MSP, train, fresh)
    assert len(detector.sketch) == 500
    with pytest.warns(UserWarning, match="about") as told:
        detector.calibrate(mixed)
    count = int(str(told[0].message).split()[1])
    assert 1300 < count < 2800  # 2000, from some 50 hits


def test_hashes_are_of_the_bits_and_spread_evenly():
    x = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0))
    h = module._hashes(x)
    assert len(h.unique()) == 20_000
    assert module._hashes(x[5:9]).equal(h[5:9])
    nudged = x.clone()
    nudged[:, 3] = torch.nextafter(x[:, 3], torch.tensor(9.0))
    assert not torch.isin(module._hashes(nudged), h).any()
    assert not torch.isin(module._hashes(x.flip(1)), h).any()
    assert module._hashes(torch.zeros(1, 7)).equal(module._hashes(-torch.zeros(1, 7)))
    below = (h.double() < 0).double().mean()
    assert abs(below - 0.5) < 0.02
    for bit in range(64):
        assert abs(((h >> bit) & 1).double().mean() - 0.5) < 0.02


def test_too_few_and_broken_calibration_images():
    with pytest.raises(InputError, match="at least 9 calibration scores, got 8"):
        Detector.fit(linear(), ood.MSP, loader(), loader(8, seed=1), alpha=0.1, **LOOK)
    x = _normalised(30, 1)
    x[0][0][2] = float("nan")
    with pytest.raises(InputError, match="1 of 30 calibration scores are NaN"):
        Detector.fit(linear(), ood.MSP, loader(), x, alpha=0.1, **LOOK)
    with pytest.raises(InputError, match="FeatureSet with logits"):
        fitted().calibrate(FeatureSet(torch.randn(30, 32), None, K))
    with pytest.raises(InputError, match="FeatureSet with logits"):
        fitted().calibrate(FeatureSet(torch.randn(30, 31), None, K, torch.randn(30, K)))


def test_calibrate_keeps_what_is_not_said():
    detector = fitted()
    detector.calibrate(loader(100, seed=3))
    assert detector.threshold.alpha == 0.1
    detector.calibrate(loader(100, seed=3), 0.02)
    assert detector.threshold.alpha == 0.02
    fresh = Detector(linear(), ood.MSP.fit(), **LOOK)
    assert fresh.calibrate(loader(100, seed=3)).threshold.alpha == 0.05


# --- parts that do not fit ----------------------------------------------------------------------


def test_scorer_or_threshold_of_another_model():
    detector = fitted()
    with pytest.raises(InputError, match=r"not fitted on this model, which has D = 16"):
        Detector(etf(), detector.scorer)
    kl = ood.KLMatching.fit(FeatureSet(torch.randn(40, 32), None, K, torch.randn(40, K)))
    with pytest.raises(InputError, match=r"not fitted on this model.* K = 6"):
        Detector(linear(num_classes=6), kl)
    other = FeatureSet(torch.randn(60, 32), torch.arange(60) % 3, 3)
    with pytest.raises(InputError, match="train has K = 3 classes and D = 32"):
        Detector.fit(linear(), ood.Mahalanobis, other, loader(80, 1), **LOOK)
    groups = Threshold.fit(torch.rand(80), groups=torch.arange(80) % 2)
    with pytest.raises(InputError, match="2 groups, the model 4"):
        Detector(linear(), ood.MSP.fit(), groups)
    with pytest.raises(InputError, match="3 names for 4 classes"):
        Detector(linear(), ood.MSP.fit(), classes=["a", "b", "c"])
    head = nn.Linear(32, K)
    with pytest.raises(InputError, match="not the model's: has the model been trained"):
        Detector(linear(), ood.MSP.fit(None, head))


# --- one file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, etf, resnet])
def test_saved_and_loaded(make, tmp_path):
    detector = fitted(make, classes=["red", "green", "blue", "yellow"])
    x = images(40, 2)[0]
    want = detector(x)
    detector.save(tmp_path / "detector.safetensors")
    model = make(seed=5)
    again = Detector.load(tmp_path / "detector.safetensors", model)
    assert same(again(x), want)
    assert again.classes == ["red", "green", "blue", "yellow"]
    assert again.threshold.alpha == 0.1
    assert again.scorer.hyper == detector.scorer.hyper
    assert again.sketch.equal(detector.sketch)
    assert again.model is model
    with pytest.warns(UserWarning, match="60 of 60"):
        again.calibrate(loader())
    assert type(again.scorer.head) is type(detector.scorer.head)
    names = load_file(tmp_path / "detector.safetensors").keys()
    assert not [n for n in names if n.startswith("scorer.head")]
    with safe_open(tmp_path / "detector.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["ncmethods.Detector"])
    assert len(meta["sha256"]) == 64
    assert meta["scorer"] == "Mahalanobis"


@pytest.mark.parametrize(
    "head", [heads.cosine_head, heads.etf_head, heads.multi_centre_head, heads.class_mean_head]
)
def test_heads_with_a_copy_in_the_scorer(head, tmp_path):
    """The scorer's copy is made of the model's head again."""

    def make(seed=0):
        built = head(32, K, generator=torch.Generator().manual_seed(seed))
        return heads.Classifier(backbone(seed), built)

    detector = fitted(make, ood.NECO, times_max_logit=True, rank=3)
    assert detector.scorer.head is not None
    detector.save(tmp_path / "d")
    again = Detector.load(tmp_path / "d", make(seed=3))
    x = images(20, 2)[0]
    assert same(again(x), detector(x))
    h = torch.randn(5, 32)
    assert again.scorer(h).equal(detector.scorer(h))


def test_the_wrong_model_is_refused(tmp_path):
    path = tmp_path / "d"
    fitted(etf).save(path)
    net = etf(seed=3)
    before = copy.deepcopy(net.state_dict())
    other = heads.Classifier(net.backbone, heads.etf_head(32, 5, dim=16))
    with pytest.raises(InputError, match=r"head.weight: .*\(5, 16\), saved .*\(4, 16\)"):
        Detector.load(path, other)
    with pytest.raises(InputError, match="not built as the saved one"):
        Detector.load(path, linear())
    with pytest.raises(InputError, match="float16"):
        Detector.load(path, copy.deepcopy(net).half())
    assert all(before[k].equal(v) for k, v in net.state_dict().items())  # untouched
    with pytest.raises(InputError, match=r"other settings \(a head's scale"):
        Detector.load(path, etf(scale=20.0))
    with pytest.raises(InputError, match="other settings"):
        Detector.load(path, etf(normalize=False))


def test_damaged_files(tmp_path):
    path = tmp_path / "d"
    detector = fitted()
    detector.save(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    tensors["model.1.weight"][0, 0] += 1e-6
    save_file(tensors, tmp_path / "flipped", meta)
    with pytest.raises(InputError, match="is damaged"):
        Detector.load(tmp_path / "flipped", linear())
    (tmp_path / "short").write_bytes(path.read_bytes()[:500])
    detector.scorer.save(tmp_path / "scorer")
    for name in ("short", "scorer", "missing"):
        with pytest.raises(InputError, match=r"Cannot read .* as a detector"):
            Detector.load(tmp_path / name, linear())
    said = json.loads(meta["ncmethods.Detector"]) | {"scorer": "Mine"}
    save_file(load_file(path), tmp_path / "mine", {"ncmethods.Detector": json.dumps(said)})
    with pytest.raises(InputError, match="'Mine': import the module"):
        Detector.load(tmp_path / "mine", linear())


def test_a_model_that_was_trained_on_is_not_saved(tmp_path):
    detector = fitted()
    with torch.no_grad():
        detector.model[1].weight += 0.01
    with pytest.raises(InputError, match="have changed since the threshold was set"):
        detector.save(tmp_path / "d")
    with pytest.raises(InputError, match="no threshold"):
        Detector(linear(), ood.MSP.fit()).save(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_moves_and_casts_the_model_alone():
    detector, x = fitted(), images(20, 2)[0]
    want = detector(x)
    wide = detector.double()
    assert wide.model[1].weight.dtype == torch.float64
    assert wide.threshold.levels.dtype == torch.float64
    assert wide.scorer.factor.dtype == torch.float64
    torch.testing.assert_close(wide(x).score, want.score.double(), rtol=1e-3, atol=1e-3)
    assert {b.device.type for b in copy.deepcopy(detector).to("meta").buffers()} == {"meta"}


def test_pickle_and_compiled_model(tmp_path):
    detector, x = fitted(), images(20, 2)[0]
    assert same(pickle.loads(pickle.dumps(detector))(x), detector(x))
    wrapped = torch.compile(detector.model, backend="eager")
    both = Detector(wrapped, detector.scorer, detector.threshold, **LOOK)
    assert same(both(x), detector(x))
    both.save(tmp_path / "d")
    assert same(Detector.load(tmp_path / "d", linear(seed=4))(x), detector(x))
