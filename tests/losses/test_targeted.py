import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from ncmethods._core import InputError, check_labels
from ncmethods.frames import assign, simplex_etf
from ncmethods.losses.supcon import prototype_supcon, supcon
from ncmethods.losses.targeted import k_positive_supcon, targeted_supcon
from ncmethods.testing import check_loss

f64 = torch.float64


def waves(*shape, phase=0.0):
    i = torch.arange(math.prod(shape), dtype=f64)
    return (torch.sin(1.7 * i + phase) + torch.cos(0.31 * i * i + phase)).reshape(shape)


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 4])
    return torch.randn(10, 6, generator=noise, dtype=f64), labels, simplex_etf(5, 6, dtype=f64)


# LTH14/targeted-supcon c4f15eb, moco/builder.py (class KCL), run once in float64 with one process,
# 5 classes, stub encoders and a full queue of 20 keys: loss, norm of its gradient in the queries.
# https://github.com/LTH14/targeted-supcon/blob/
# c4f15ebf67756088f40b672d7612b341529c7447/moco/builder.py
MOCO = {
    "features": waves(8, 6),
    "own": waves(8, 6, phase=0.5),
    "keys": waves(20, 6, phase=3.0),
    "key_labels": torch.arange(20) % 4,
    "labels": torch.tensor([0, 0, 1, 2, 0, 3, 1, 4]),
}
TARGETS = waves(5, 6, phase=2.0)
ASSIGNMENT = [2, 3, 4, 0, 1]  # of the authors' centroids waves(5, 6, phase=4.0)


def test_values_of_the_authors_code():
    x = MOCO["features"].clone().requires_grad_()
    loss = k_positive_supcon(**MOCO | {"features": x}, positives=None)
    assert loss.item() == pytest.approx(9.827833993688591, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.norm().item() == pytest.approx(0.7410218319742912, rel=1e-10)

    rows = F.normalize(TARGETS, dim=1)
    order = assign(rows, waves(5, 6, phase=4.0))
    assert order.tolist() == ASSIGNMENT
    for positives in (None, 6):  # five keys of each class: six are all of them
        loss = targeted_supcon(**MOCO | {"features": x}, weight=rows[order], positives=positives)
        assert loss.item() == pytest.approx(8.888521707940978, rel=1e-12)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.norm().item() == pytest.approx(0.6255083574441295, rel=1e-10)


def test_the_mean_over_draws_is_that_of_the_authors_code():
    # Their mean over 6000 draws with two positives: 6.6024 ± 0.0090 (standard error).
    noise = torch.Generator().manual_seed(0)
    rows = TARGETS[ASSIGNMENT]
    draws = [targeted_supcon(**MOCO, weight=rows, positives=2, generator=noise) for _ in range(500)]
    draws = torch.stack(draws)
    # Exactly: with fixed numbers of positives the mean takes the class's mean in their place.
    z = F.normalize(MOCO["features"], dim=1)
    entries = F.normalize(torch.cat([MOCO["keys"], rows]), dim=1)
    s = torch.cat([(z * F.normalize(MOCO["own"], dim=1)).sum(1, keepdim=True), z @ entries.T], 1)
    log_q = (s / 0.07).log_softmax(1)
    want = 0
    for i, y in enumerate(MOCO["labels"].tolist()):
        k = 2 if y < 4 else 0  # class 4 has no key
        mine = log_q[i, 1:21][MOCO["key_labels"] == y]
        from_class = k * mine.mean() if k else 0
        want -= (log_q[i, 0] + from_class + 0.2 * log_q[i, 21 + y]) / (k + 2) / 8
    assert want.item() == pytest.approx(6.6024, abs=4 * 0.0090)
    error = draws.std() / math.sqrt(500)
    assert error > 0
    assert abs(draws.mean() - want) < 4 * error


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7])
def test_each_draw_takes_k_of_the_class(k):
    x = waves(6, 4)
    keys, key_labels = waves(9, 4, phase=1.0), torch.tensor([0, 0, 0, 0, 1, 1, 2, -1, 0])
    noise = torch.Generator().manual_seed(k)
    only = torch.tensor([0, -1, -1, -1, -1, -1])  # one anchor, of class 0, with five keys
    own = waves(6, 4, phase=2.0)
    z, e = F.normalize(x, dim=1)[0], F.normalize(torch.cat([own[:1], keys]), dim=1)
    seen = torch.tensor([True] * 8 + [False, True])
    log_q = (e @ z / 0.07).masked_fill(~seen, -math.inf).log_softmax(0)
    mine = [1, 2, 3, 4, 9]
    possible = {
        round(-log_q[[0, *chosen]].mean().item(), 9)
        for chosen in itertools.combinations(mine, min(k, 5))
    }
    call = partial(k_positive_supcon, keys=keys, key_labels=key_labels, own=own, positives=k)
    found = {round(call(x, only, generator=noise).item(), 9) for _ in range(120)}
    assert found == possible


def test_in_a_batch_all_positives_are_supcon(batch):
    features, labels, weight = batch
    for T in (0.07, 0.5):
        got = k_positive_supcon(features, labels, positives=None, temperature=T)
        torch.testing.assert_close(got, supcon(features, labels, temperature=T))
        got = targeted_supcon(
            features, labels, weight, positives=None, target_weight=1.0, temperature=T
        )
        torch.testing.assert_close(got, prototype_supcon(features, labels, weight, temperature=T))


def test_other_views_always_are_positives():
    x = waves(8, 5)  # four images, two views
    labels = torch.tensor([0, 0, 0, 1]).repeat(2)
    s = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T / 0.07
    log_q = s.fill_diagonal_(-math.inf).log_softmax(1)
    twins = log_q[torch.arange(8), torch.arange(8).roll(4)]
    got = k_positive_supcon(x, labels, positives=0, views=2)  # SimCLR
    torch.testing.assert_close(got, -twins.mean())
    # With one of the class beside it, the mean over draws takes the class's mean.
    same = (labels[:, None] == labels) & ~torch.eye(8, dtype=torch.bool)
    same[torch.arange(8), torch.arange(8).roll(4)] = False
    number = same.sum(1)
    mine = log_q.masked_fill(~same, 0).sum(1) / number.clamp(min=1)
    want = -torch.where(number > 0, (twins + mine) / 2, twins).mean()
    noise = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [k_positive_supcon(x, labels, positives=1, views=2, generator=noise) for _ in range(400)]
    )
    assert abs(draws.mean() - want) < 4 * draws.std() / 20
    assert draws.std() > 0


def test_draws_are_seeded(batch):
    features, labels, weight = batch
    values = [
        targeted_supcon(
            features, labels, weight, positives=1, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (5, 5, 6)
    ]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_weight_of_the_target_is_linear(batch):
    features, labels, weight = batch
    zero, half, one = (
        targeted_supcon(features, labels, weight, positives=None, target_weight=w)
        for w in (1e-12, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (zero + one) / 2)
    assert one > zero


def test_no_gradient_to_keys_and_targets():
    keys, rows = MOCO["keys"].clone().requires_grad_(), TARGETS.clone().requires_grad_()
    x, own = MOCO["features"].clone().requires_grad_(), MOCO["own"].clone().requires_grad_()
    loss = targeted_supcon(
        **MOCO | {"features": x, "keys": keys, "own": own}, weight=rows, positives=None
    )
    loss.backward()
    assert x.grad.any()
    assert keys.grad is None
    assert rows.grad is None
    assert own.grad is None


def test_the_target_pulls():
    """A lone sample with its target descends onto it."""
    rows = simplex_etf(4, 5, dtype=f64)
    x = waves(1, 5).requires_grad_()
    sgd = torch.optim.SGD([x], lr=0.5)
    for _ in range(300):
        sgd.zero_grad()
        targeted_supcon(x, torch.tensor([2]), rows, target_weight=1.0, temperature=0.5).backward()
        sgd.step()
    assert F.cosine_similarity(x.detach(), rows[2:3]) > 0.999


def test_invariance_to_length():
    size = torch.linspace(0.1, 50, 20, dtype=f64)[:, None]
    scaled = {
        "features": size[:8] * MOCO["features"],
        "own": size[3:11] * MOCO["own"],
        "keys": size * MOCO["keys"],
    }
    for weight in (TARGETS, 7 * TARGETS):
        torch.testing.assert_close(
            targeted_supcon(**MOCO | scaled, weight=weight, positives=None),
            targeted_supcon(**MOCO, weight=TARGETS, positives=None),
        )


@pytest.mark.parametrize("queue", [False, True])
def test_ignored_rows_leave_no_trace(batch, queue):
    features, labels, weight = batch
    labels = labels.clone()
    labels[[0, 7]] = torch.tensor([-1, -100])
    keep = labels >= 0
    z = features.clone()
    z[0] = torch.nan
    z.requires_grad_()
    extra = {"keys": MOCO["keys"].clone(), "key_labels": MOCO["key_labels"].clone()}
    extra["keys"][3], extra["key_labels"][3] = torch.nan, -1
    without = {k: torch.cat([v[:3], v[4:]]) for k, v in extra.items()}
    if not queue:
        extra = without = {}
    loss = targeted_supcon(z, labels, weight, positives=None, **extra)
    want = targeted_supcon(features[keep], labels[keep], weight, positives=None, **without)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert not z.grad[~keep].any()
    assert z.grad[keep].isfinite().all()


def test_without_a_positive_there_is_nothing(batch):
    features, _, _ = batch
    x = features[:3].clone().requires_grad_()
    loss = k_positive_supcon(x, torch.tensor([0, 1, 2]))
    loss = loss + k_positive_supcon(
        x, torch.tensor([0, 1, -1]), keys=features[4:], key_labels=-torch.ones(6).long()
    )
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_small_temperature(batch):
    features, labels, weight = batch
    x = features.float().requires_grad_()
    loss = targeted_supcon(x, labels, weight.float(), positives=None, temperature=1e-3)
    loss.backward()
    want = targeted_supcon(features, labels, weight, positives=None, temperature=1e-3)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
    assert x.grad.isfinite().all()


def test_gradients():
    x = MOCO["features"].clone().requires_grad_()
    data = {name: value for name, value in MOCO.items() if name != "features"}
    for call in (k_positive_supcon, partial(targeted_supcon, weight=TARGETS)):
        bound = partial(call, positives=None, **data)
        assert torch.autograd.gradcheck(lambda x, f=bound: f(x), x)


def test_conformance():
    def bounded(features, labels, weight):  # without targets it cannot know K
        return k_positive_supcon(features, check_labels(labels, None, len(weight)), positives=None)

    for K in (2, 5):
        check_loss(bounded, num_classes=K)
        check_loss(partial(targeted_supcon, positives=None), num_classes=K)


def test_errors(batch):
    features, labels, weight = batch
    for options, words in [
        ({"keys": features}, "go together"),
        ({"own": features}, "own needs them"),
        ({"views": 3}, "views = 3 must divide the 10 rows"),
        ({"views": 2, "keys": features, "key_labels": labels}, "is 1 where there are keys"),
        ({"positives": -1}, "positives must be an integer ≥ 0"),
        ({"positives": 2.0}, "positives must be an integer ≥ 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"keys": features[:, :2], "key_labels": labels}, r"keys must be floating .* D = 6"),
        ({"keys": features, "key_labels": labels[:4]}, "10 rows"),
        ({"keys": features, "key_labels": labels, "own": features[:3]}, r"own must be \[N, D\]"),
    ]:
        with pytest.raises(InputError, match=words):
            k_positive_supcon(features, labels, **options)
    with pytest.raises(InputError, match="D = 6"):
        targeted_supcon(features, labels, weight[:, :3])
    with pytest.raises(InputError, match="labels must be < num_classes = 5"):
        targeted_supcon(features, labels + 1, weight)
