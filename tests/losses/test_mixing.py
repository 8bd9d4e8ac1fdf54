from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError
from ncmethods.losses._module import LossModule
from ncmethods.losses.dot_regression import dot_regression
from ncmethods.losses.focal import focal
from ncmethods.losses.logit_adjusted import logit_adjusted
from ncmethods.losses.mixing import cutmix_box, mixed, remix_labels, remix_lambda
from ncmethods.losses.mse import mse
from ncmethods.losses.smoothing import label_smoothing
from ncmethods.testing import check_loss

f64 = torch.float64
COUNTS = torch.tensor([500, 120, 40, 12, 5])
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
OTHER = torch.tensor([4, 0, 2, 1, 3, 0, 1, 0, 0, 2, 1, 0])
LOGITS = (4 * torch.sin(torch.arange(60, dtype=f64) ** 2 * 0.37)).reshape(12, 5)


def soft(lam):
    """Mixed one-hot targets, for λ of the batch or of each sample."""
    lam = torch.as_tensor(lam, dtype=f64).reshape(-1, 1)
    return lam * F.one_hot(LABELS, 5) + (1 - lam) * F.one_hot(OTHER, 5)


# --- mixed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, torch.tensor(0.3, dtype=f64)])
def test_cross_entropy_of_soft_targets(lam):
    z = LOGITS.clone().requires_grad_()
    got = mixed(partial(focal, gamma=0), LABELS, OTHER, lam, logits=z)
    want = F.cross_entropy(z, soft(lam))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_any_loss_and_any_tensors():
    features = LOGITS[:, :4].clone()
    weight = torch.eye(5, dtype=f64)[:, :4] + 0.1
    for loss, tensors in [
        (dot_regression, {"features": features, "weight": weight}),
        (partial(logit_adjusted, tau=0.5), {"logits": LOGITS, "counts": COUNTS}),
        (LossModule(label_smoothing, epsilon=0.2), {"logits": LOGITS, "features": features}),
        (mse, {"logits": LOGITS}),
    ]:
        got = mixed(loss, LABELS, OTHER, 0.3, **tensors)
        a, b = loss(labels=LABELS, **tensors), loss(labels=OTHER, **tensors)
        torch.testing.assert_close(got, 0.3 * a + 0.7 * b, rtol=1e-12, atol=0)
        assert mixed(loss, LABELS, LABELS, 0.3, **tensors) == pytest.approx(a.item(), rel=1e-12)
        assert abs(got - a) > 1e-3


def test_lambda_for_each_sample_needs_a_loss_for_each_sample():
    lam = torch.linspace(0, 1, 12, dtype=f64)

    def each(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")

    got = mixed(each, LABELS, OTHER, lam, logits=LOGITS)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, soft(lam)), rtol=1e-12, atol=0)
    with pytest.raises(InputError, match=r"needs a loss of that shape, got one of shape \(\)"):
        mixed(label_smoothing, LABELS, OTHER, lam, logits=LOGITS)


def test_conformance_of_a_mixed_loss():
    def loss(logits, labels):
        return mixed(label_smoothing, labels, labels.clone(), 0.3, logits=logits)

    check_loss(loss)
    z = (LOGITS / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixed(focal, LABELS, OTHER, 0.3, logits=x), z)


# --- Remix ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_i", "n_j", "lam", "want"),
    [(5000, 50, 0.3, 0), (5000, 50, 0.7, 0.7), (50, 5000, 0.7, 1), (50, 5000, 0.3, 0.3),
     (100, 60, 0.3, 0.3)],
)  # fmt: skip
def test_golden_values(n_i, n_j, lam, want):
    # Golden check 14, κ = 3, τ = 0.5.
    pair = torch.tensor([0]), torch.tensor([1])
    got = remix_lambda(*pair, torch.tensor([n_i, n_j]), lam)
    assert got.tolist() == pytest.approx([want])


# remix_data of imbalanced-DL (not the authors', whose code was not found), κ = 3, τ = 0.5, counts
# of CIFAR-10-LT, labels 0…9 twice against SECOND: the pairs whose weight it changes, and to what.
# https://github.com/ntucllab/imbalanced-DL/blob/caa43d92f2d765a75e0e3e646f6ec16b1a5260b2/imbalanceddl/strategy/_remix_drw.py#L10
CIFAR = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
SECOND = torch.tensor([4, 5, 3, 9, 7, 4, 3, 6, 9, 7, 1, 2, 6, 8, 0, 2, 5, 8, 1, 0])
PEER = {
    0.3: ([0, 1, 3, 4, 12, 13], 0.0),
    0.45: ([0, 1, 3, 4, 12, 13], 0.0),
    0.5: ([], 0.0),
    0.7: ([6, 14, 15, 18, 19], 1.0),
    0.9: ([6, 14, 15, 18, 19], 1.0),
}


@pytest.mark.parametrize("lam", PEER)
def test_it_agrees_with_imbalanced_dl(lam):
    changed, value = PEER[lam]
    want = [value if i in changed else lam for i in range(20)]
    got = remix_lambda(torch.arange(10).repeat(2), SECOND, CIFAR, lam)
    assert got.tolist() == pytest.approx(want)


def test_remix_follows_the_definition_everywhere():
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    n = COUNTS.tolist()
    for kappa, tau in [(3.0, 0.5), (10.0, 0.9), (1.5, 0.2)]:
        for lam in (0.0, 0.05, 0.3, 0.5, 0.85, 1.0):
            want = []
            for i, j in zip(a.tolist(), b.tolist()):
                if n[i] / n[j] >= kappa and lam < tau:
                    want.append(0.0)
                elif n[i] / n[j] <= 1 / kappa and 1 - lam < tau:
                    want.append(1.0)
                else:
                    want.append(lam)
            got = remix_lambda(a, b, COUNTS, lam, kappa=kappa, tau=tau)
            np.testing.assert_allclose(got, want, rtol=1e-6)
            one = remix_lambda(a, b, COUNTS, torch.full((25,), lam), kappa=kappa, tau=tau)
            np.testing.assert_allclose(one, want, rtol=1e-6)
            # The pair turned round is the same mixture.
            turned = remix_lambda(b, a, COUNTS, 1 - lam, kappa=kappa, tau=tau)
            np.testing.assert_allclose(1 - turned, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lam", [0.3, 0.7])
def test_changed_labels_do_the_same_as_changed_weights(lam):
    weight = remix_lambda(LABELS, OTHER, COUNTS, torch.tensor(lam, dtype=f64))
    assert len(weight.unique()) == 2  # some pairs change, some do not
    one, other = remix_labels(LABELS, OTHER, COUNTS, lam)
    got = mixed(partial(focal, gamma=0), one, other, lam, logits=LOGITS)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, soft(weight)), rtol=1e-12, atol=0)
    # And sample by sample, for a loss that is no cross-entropy.
    for i in range(12):
        row = {"logits": LOGITS[i : i + 1]}
        got = mixed(mse, one[i : i + 1], other[i : i + 1], lam, **row)
        a, b = mse(labels=LABELS[i : i + 1], **row), mse(labels=OTHER[i : i + 1], **row)
        torch.testing.assert_close(got, weight[i] * a + (1 - weight[i]) * b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_unmixed_images_keep_their_label(lam):
    one, other = remix_labels(LABELS, OTHER, COUNTS, lam)
    got = mixed(focal, one, other, lam, logits=LOGITS)
    assert got == focal(LOGITS, LABELS if lam else OTHER)


def test_left_out_labels_stay_so():
    a, b = torch.tensor([0, -1, -1, 0]), torch.tensor([-1, 4, -1, 4])
    assert remix_lambda(a, b, COUNTS, 0.3).tolist() == pytest.approx([0.3, 0.3, 0.3, 0])
    one, other = remix_labels(a, b, COUNTS, 0.3)
    assert one.tolist() == [0, -1, -1, 4]
    assert other.tolist() == [-1, 4, -1, 4]
    there = [t.to("meta") for t in (LABELS, OTHER, COUNTS)]  # nothing looks at values
    assert remix_labels(*there, 0.3)[0].shape == (12,)


# --- CutMix -----------------------------------------------------------------------------------

# rand_bbox and the exact λ of the authors' code: height, width, λ, centre -> rows, columns, λ.
# https://github.com/clovaai/CutMix-PyTorch/blob/2d8eb68faff7fe4962776ad51d175c3b01a25734/train.py#L279
AUTHORS = [
    ((32, 32, 0.4, (5, 30)), (0, 17, 18, 32, 0.767578125)),
    ((28, 28, 0.7, (14, 14)), (7, 21, 7, 21, 0.75)),
    ((33, 20, 0.15, (0, 19)), (0, 15, 10, 20, 0.7727272727272727)),
    ((32, 32, 0.97, (31, 31)), (29, 32, 29, 32, 0.9912109375)),
]


@pytest.mark.parametrize(("given", "want"), AUTHORS)
def test_box_agrees_with_the_authors_code(given, want):
    assert cutmix_box(*given) == pytest.approx(want)


def test_lam_is_the_share_of_pixels_that_stay():
    rng = np.random.default_rng(0)
    for _ in range(50):
        H, W = (int(v) for v in rng.integers(1, 40, 2))
        lam = float(rng.uniform())
        box = cutmix_box(H, W, lam, (int(rng.integers(H)), int(rng.integers(W))))
        pixels = np.ones((H, W))
        pixels[box.top : box.bottom, box.left : box.right] = 0
        assert box.lam == pytest.approx(pixels.mean())
        assert box.lam >= lam - 1e-12  # rounding and the border only make the box smaller
    assert cutmix_box(32, 32, 1.0, (3, 3)).lam == 1
    assert cutmix_box(32, 32, 0.0, (16, 16)) == (0, 32, 0, 32, 0)


# --- errors -----------------------------------------------------------------------------------


def test_errors():
    for call, words in [
        (lambda: mixed(focal, LABELS, OTHER[:3], 0.3, logits=LOGITS), "one shape"),
        (lambda: remix_lambda(LABELS, OTHER[:3], COUNTS, 0.3), "12 rows"),
        (lambda: remix_lambda(LABELS, OTHER, COUNTS[:4], 0.3), "must be < num_classes = 4"),
        (lambda: remix_labels(LABELS, OTHER, -COUNTS, 0.3), "≥ 0"),
        (lambda: cutmix_box(32, 32, 1.2, (3, 3)), "lam in"),
        (lambda: cutmix_box(32, 32, 0.5, (32, 3)), "centre inside"),
        (lambda: cutmix_box(0, 32, 0.5, (0, 3)), "centre inside"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
