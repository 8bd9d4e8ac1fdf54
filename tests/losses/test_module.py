import copy
import functools
import pickle

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from ncmethods import losses
from ncmethods._core import InputError, bind
from ncmethods.frames import simplex_etf
from ncmethods.losses import LossModule

COUNTS = torch.tensor([40, 9, 3])


@pytest.fixture
def tensors():
    noise = torch.Generator().manual_seed(4)
    return {
        "features": torch.randn(6, 4, generator=noise),
        "logits": torch.randn(6, 3, generator=noise),
        "labels": torch.tensor([0, 0, 0, 1, 1, 2]),
        "weight": simplex_etf(3, 4, generator=noise),
    }


def open_ended(logits, labels, **options):
    return cross_entropy(logits, labels, **options)


def foreign(logits, labels, temperature):
    return cross_entropy(logits / temperature, labels)


def test_it_calls_the_function_with_what_it_names(tensors):
    for function, hyper in [
        (losses.dot_regression, {"balance": "none"}),
        (losses.dot_regression, {"balance": "global", "counts": COUNTS}),
        (losses.logit_adjusted, {"counts": COUNTS, "tau": 0.5}),
        (losses.ldam, {"counts": COUNTS, "max_margin": 0.2}),
        (foreign, {"temperature": 2.0}),
        (open_ended, {"label_smoothing": 0.1}),
    ]:
        module = LossModule(function, **hyper)
        want = function(**bind(functools.partial(function, **hyper), tensors) | hyper)
        assert torch.equal(module(**tensors), want)


def test_counts_are_buffers(tensors):
    module = LossModule(losses.ldam, counts=COUNTS, class_weight=torch.tensor([0.2, 1.0, 1.8]))
    assert set(module.state_dict()) == {"counts", "class_weight"}
    assert not list(module.parameters())
    other = LossModule(losses.ldam, counts=torch.ones(3).long(), class_weight=torch.ones(3))
    assert other(**tensors) != module(**tensors)
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(**tensors), module(**tensors))
    assert module.to("meta").counts.is_meta
    assert LossModule(losses.ldam, counts=COUNTS).half().counts.dtype == torch.int64


def test_wrong_names(tensors):
    with pytest.raises(InputError, match=r"Unknown hyperparameter 'max_margn'.*'max_margin'"):
        LossModule(losses.ldam, counts=COUNTS, max_margn=0.2)
    with pytest.raises(InputError, match=r"Unknown hyperparameter 'count'.*'counts'"):
        LossModule(losses.ldam, count=COUNTS)
    with pytest.raises(InputError, match=r"ldam needs 'counts'.*available: features, logits"):
        LossModule(losses.ldam)(**tensors)
    with pytest.raises(InputError, match=r"\['counts'\] were fixed"):
        LossModule(losses.ldam, counts=COUNTS)(**tensors, counts=COUNTS)


def test_mixed_labels_are_soft_labels(tensors):
    """λL(y_a) + (1−λ)L(y_b), as the loop mixes, is the loss of the soft label λe_a + (1−λ)e_b."""
    loss, lam = losses.logit_adjusted, 0.3
    y_a, y_b = tensors["labels"], tensors["labels"].flip(0)
    a, b = (loss(**bind(loss, tensors | {"counts": COUNTS, "labels": y})) for y in (y_a, y_b))
    soft = lam * one_hot(y_a, 3) + (1 - lam) * one_hot(y_b, 3)
    want = cross_entropy(tensors["logits"] + (COUNTS / COUNTS.sum()).log(), soft)
    torch.testing.assert_close(lam * a + (1 - lam) * b, want)


def test_mixed_dot_regression_counts_each_label_set_on_its_own(tensors):
    """Each of the two terms is a mean over the classes of its own labels."""
    loss, lam = losses.dot_regression, 0.3
    y_a, y_b = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([2, 1, 2, 2, 2, 2])
    cosine = cosine_similarity(tensors["features"][:, None], tensors["weight"], dim=2)
    value = (1 - cosine).square() / 2  # [N, K]
    want = lam * (value[:4, 0].mean() + value[4:, 1].mean()) / 2
    want = want + (1 - lam) * (value[[0, 2, 3, 4, 5], 2].mean() + value[1, 1]) / 2
    a, b = (loss(**bind(loss, tensors | {"labels": y})) for y in (y_a, y_b))
    torch.testing.assert_close(lam * a + (1 - lam) * b, want)


@pytest.mark.parametrize("name", ["dot_regression", "logit_adjusted", "ldam"])
def test_compiled_losses_equal_eager_ones(tensors, name):
    loss = getattr(losses, name)
    given = bind(loss, tensors | {"counts": COUNTS})
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), loss(**given))


@pytest.mark.parametrize("name", ["dot_regression", "logit_adjusted", "ldam"])
def test_autocast_casts_back(tensors, name):
    """bfloat16 inputs, as they leave an autocast forward, give a float32 loss."""
    loss = getattr(losses, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = {k: v.bfloat16() for k, v in tensors.items() if v.is_floating_point()}
        value = loss(**bind(loss, tensors | low | {"counts": COUNTS}))
    assert value.dtype == torch.float32
    rounded = {k: v.float() for k, v in low.items()}
    torch.testing.assert_close(value, loss(**bind(loss, tensors | rounded | {"counts": COUNTS})))
