"""The heads themselves: geometry, scale, state, dtype, compile, DDP."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.nn import functional as F

from ncmethods import heads
from ncmethods._core import InputError, logits_of
from ncmethods.frames import simplex_etf
from ncmethods.testing import check_frame


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- etf_head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["haar", "canonical"])
@pytest.mark.parametrize("neck", ["bn", "linear", None])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    ],
    ids=["sgd", "adamw"],
)
def test_the_rows_stay_an_etf_while_the_rest_trains(neck, rotation, optimizer):
    net = nn.Sequential(nn.Linear(6, 12), heads.etf_head(12, 5, neck=neck, rotation=rotation))
    head = net[1]
    before = head.weight.clone()
    check_frame(head.weight, cosine=-1 / 4)
    assert not any(p.shape == (5, 12) for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    step = optimizer(net.parameters())
    first = copy.deepcopy(net[0].weight)
    for _ in range(3):
        step.zero_grad()
        F.cross_entropy(net(torch.randn(16, 6)), torch.randint(5, (16,))).backward()
        step.step()
    assert torch.equal(head.weight, before)
    check_frame(head.weight, cosine=-1 / 4)
    assert head.weight.grad is None
    assert not torch.equal(net[0].weight, first)


@pytest.mark.parametrize("K", [2, 10, 100, 1000])
def test_the_default_scale_gives_99_percent_at_collapse(K):
    head = heads.etf_head(K, K, neck=None).double()
    assert head.scale == pytest.approx((K - 1) / K * math.log(99 * (K - 1)), rel=1e-12)
    if K in (10, 100, 1000):
        assert head.scale == pytest.approx({10: 6.1, 100: 9.1, 1000: 11.5}[K], abs=0.05)
    p = head(7 * head.weight).softmax(1).diagonal()
    torch.testing.assert_close(p, torch.full_like(p, 0.99), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("K", "scale", "loss"), [(10, 1.0, 1.3769349), (10, 16.0, 1.7118e-7), (100, 1.0, 3.6123773)]
)
def test_cross_entropy_floor_at_collapse(K, scale, loss):
    # Golden check 10 of the losses sheet: log(1 + (K−1) e^{−sK/(K−1)}).
    head = heads.etf_head(K, K, neck=None, scale=scale).double()
    exact = simplex_etf(K, K, dtype=torch.float64)
    head.weight.copy_(exact)
    got = F.cross_entropy(head(5 * exact), torch.arange(K)).item()
    assert got == pytest.approx(loss, rel=1e-4)
    assert got == pytest.approx(math.log1p((K - 1) * math.exp(-scale * K / (K - 1))), rel=1e-9)


def test_no_scale_beats_the_floor():
    """At s = 1 no unit feature gets more than 25.2 % (K = 10), whatever it is trained for."""
    head = heads.etf_head(10, 10, neck=None, scale=1.0)
    x = torch.randn(10, 10, requires_grad=True)
    step = torch.optim.Adam([x], lr=0.1)
    for _ in range(200):
        step.zero_grad()
        F.cross_entropy(head(x), torch.arange(10)).backward()
        step.step()
    p = head(x).softmax(1).diagonal()
    assert p.max() <= 0.2523508 + 1e-6
    assert p.min() > 0.25


def test_state_dict_is_that_of_a_linear_layer():
    head, linear = heads.etf_head(12, 5, neck=None), nn.Linear(12, 5, bias=False)
    assert list(head.state_dict()) == list(linear.state_dict()) == ["weight"]
    linear.load_state_dict(head.state_dict())
    assert torch.equal(linear.weight, head.weight)
    other = heads.etf_head(12, 5, neck=None)
    assert not torch.equal(other.weight, head.weight)
    other.load_state_dict(linear.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(other(x), head(x))


def test_logits_are_scaled_cosines():
    head = heads.etf_head(12, 5, neck=None)
    x = torch.randn(7, 12)
    want = head.scale * F.cosine_similarity(x[:, None], head.weight, dim=2)
    torch.testing.assert_close(head(x), want)
    torch.testing.assert_close(head(100 * x), head(x))
    raw = heads.etf_head(12, 5, neck=None, normalize=False)
    assert raw.scale == 1
    torch.testing.assert_close(raw(x), x @ raw.weight.T)


def test_necks():
    bn, linear, wide = (
        heads.etf_head(12, 5),
        heads.etf_head(12, 5, neck="linear", dim=9),
        heads.etf_head(12, 5, dim=9),
    )
    assert isinstance(bn.neck, nn.BatchNorm1d)
    assert isinstance(linear.neck, nn.Linear)
    assert linear.weight.shape == wide.weight.shape == (5, 9)
    assert [type(m) for m in wide.neck] == [nn.Linear, nn.BatchNorm1d]
    assert wide.neck[0].bias is None
    assert isinstance(heads.etf_head(12, 5, neck=None).neck, nn.Identity)
    assert heads.etf_head(4, 5).weight.shape == (5, 4)  # K − 1 dimensions are enough
    x = 5 + 3 * torch.randn(64, 12)
    features = bn.embed(x)
    torch.testing.assert_close(features.mean(0), torch.zeros(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear.embed(x), linear.neck(x))


def test_the_generator_decides_the_rotation():
    one, two, three = (
        heads.etf_head(12, 5, generator=torch.Generator().manual_seed(s)).weight for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    canonical = heads.etf_head(12, 5, rotation="canonical").weight
    assert not canonical[:, 5:].any()


def test_errors():
    for call, words in [
        (lambda: heads.etf_head(8, 10), r"dim ≥ 9, got 8.*dim=9.*cosine_head"),
        (lambda: heads.etf_head(9, 10, rotation="canonical"), r"dim ≥ 10, got 9.*haar"),
        (lambda: heads.etf_head(12, 5, neck="batchnorm"), "Unknown neck"),
        (lambda: heads.etf_head(12, 5, neck=None, dim=8), "Without a neck.*12, got 8.*neck='bn'"),
        (lambda: heads.etf_head(12, 1), "num_classes must be an integer ≥ 2"),
        (lambda: heads.etf_head(12, 5, rotation="har"), "Did you mean 'haar'"),
        (lambda: heads.cosine_head(12, 0), "num_classes must be"),
        (lambda: heads.FixedHead(torch.eye(3).long(), 3), r"floating \[K, D\].*int64"),
        (lambda: heads.FixedHead(torch.ones(3), 3), r"\[K, D\]"),
        (lambda: heads.FixedHead(torch.full((3, 3), torch.nan), 3), "finite"),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_a_wide_frame_with_a_neck_needs_no_wide_backbone():
    """What the error for K − 1 > D advises."""
    head = heads.etf_head(8, 10, dim=9)
    assert head(torch.randn(4, 8)).shape == (4, 10)


# --- cosine_head --------------------------------------------------------------------------------


def test_cosine_head_against_torch():
    head = heads.cosine_head(12, 5, scale=7.0)
    x = torch.randn(6, 12)
    want = 7 * F.cosine_similarity(x[:, None], head.weight, dim=2)
    torch.testing.assert_close(head(x), want)
    with torch.no_grad():
        head.weight *= torch.rand(5, 1) + 0.5
    torch.testing.assert_close(head(x), want)
    assert head.scale == 7.0
    assert heads.cosine_head(12, 5).scale == 30.0
    check_frame(heads.cosine_head(12, 5).weight.detach())
    assert isinstance(head.weight, nn.Parameter)
    assert list(head.state_dict()) == ["weight"]


def test_cosine_head_learns_its_rows():
    head = heads.cosine_head(4, 3)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    step = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        step.zero_grad()
        losses.append(F.cross_entropy(head(x), y))
        losses[-1].backward()
        step.step()
    assert losses[-1] < 0.8 * losses[0]


# --- every head ---------------------------------------------------------------------------------

BUILDERS = {
    "etf-bn": lambda: heads.etf_head(12, 5),
    "etf-linear": lambda: heads.etf_head(12, 5, neck="linear", dim=7),
    "etf-none": lambda: heads.etf_head(12, 5, neck=None),
    "cosine": lambda: heads.cosine_head(12, 5),
    "cosine-bn": lambda: heads.cosine_head(12, 5, neck="bn", dim=4),
}


@pytest.fixture(params=BUILDERS)
def head(request):
    torch.manual_seed(1)
    return BUILDERS[request.param]()


def test_head_is_logits_of_embed(head):
    x = torch.randn(6, 12)
    for training in (True, False):
        head.train(training)
        features = head.embed(x)
        assert features.shape == (6, head.weight.shape[1])
        assert torch.equal(head(x), head.logits(features))
        assert torch.equal(logits_of(head, features), head(x))


def test_dtypes(head):
    head.eval()
    x = torch.randn(6, 12)
    want = head(x).detach()
    assert want.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(x)
        assert head.logits(head.embed(x).bfloat16()).dtype == torch.float32
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, want, rtol=0.05, atol=0.05 * head.scale)
    assert copy.deepcopy(head).bfloat16()(x.bfloat16()).dtype == torch.float32
    wide = copy.deepcopy(head).double()
    assert wide(x.double()).dtype == torch.float64
    torch.testing.assert_close(wide(x.double()).float(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["etf-none", "cosine"])
def test_a_dead_sample_has_no_direction(name):
    """All-zero features (dead ReLUs) give equal logits and no gradient, not one of 1e12."""
    head = BUILDERS[name]()
    x = torch.cat([torch.zeros(1, 12), torch.randn(3, 12)]).requires_grad_()
    logits = head(x)
    assert not logits[0].any()
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert not x.grad[0].any()
    assert x.grad[1:].abs().sum() > 0
    assert all(p.grad.abs().max() < 100 for p in head.parameters())


@pytest.mark.parametrize("name", ["etf-none", "cosine"])
def test_the_product_is_float32_under_autocast(name):
    """Not only the result: bfloat16 rows would move the logits by 1e-2."""
    head = BUILDERS[name]()
    x = torch.randn(6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(x)
    assert torch.equal(mixed, head(x))


def test_compile(head):
    x = torch.randn(6, 12)
    for training in (True, False):
        head.train(training)
        twin = copy.deepcopy(head)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, two = compiled(a), head(b)
        torch.testing.assert_close(one, two)
        one.sum().backward()
        two.sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(head.named_buffers()))


def test_copies(head):
    head.eval()
    x = torch.randn(3, 12)
    for same in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(same(x), head(x))
        assert repr(same) == repr(head)
    assert f"scale={head.scale:.4g}" in repr(head)


def test_device_moves(head):
    assert head.to("meta").weight.is_meta
    assert head(torch.empty(3, 12, device="meta")).shape == (3, 5)


def train_both(rank, world):
    return [train(rank, world, name) for name in ("etf-linear", "cosine")]


def train(rank, world, name):
    torch.manual_seed(0)
    model = heads.Classifier(nn.Linear(6, 12), BUILDERS[name]())
    before = model.head.weight.detach().clone()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    y = torch.arange(8) % 5
    for _ in range(2):
        optimizer.zero_grad()
        out = ddp(x[rank::world])
        F.cross_entropy(out.logits, y[rank::world]).backward()
        optimizer.step()
    # gloo sums what each rank holds: equal ranks give world × the value
    total = model.backbone.weight.detach().clone()
    dist.all_reduce(total)
    return before, model.head.weight.detach(), model.backbone.weight.detach(), total / world


def test_ddp():
    for ranks in run_ranks(train_both, 2):
        for (before, weight, backbone, mean), fixed in zip(ranks, (True, False)):
            assert torch.equal(before, weight) == fixed
            torch.testing.assert_close(backbone, mean)
    # A neck without batch statistics: two ranks train as one process does.
    torch.manual_seed(0)
    model = heads.Classifier(nn.Linear(6, 12), BUILDERS["etf-linear"]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x).logits, torch.arange(8) % 5).backward()
        optimizer.step()
    torch.testing.assert_close(ranks[0][2], model.backbone.weight.detach())


# --- logits_of ----------------------------------------------------------------------------------


class Squared(nn.Module):
    """Somebody's head: negative squared distance to learned prototypes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.project = nn.Linear(12, 4)

    def embed(self, x):
        return self.project(x)

    def logits(self, features):
        return -torch.cdist(features, self.weight).square()

    def forward(self, x):
        return self.logits(self.embed(x))


def test_logits_of_starts_from_features():
    x, own, linear = torch.randn(6, 12), Squared(), nn.Linear(12, 5)
    assert torch.equal(logits_of(own, own.embed(x)), own(x))
    assert torch.equal(logits_of(linear, x), F.linear(x, linear.weight, linear.bias))
    with pytest.raises(InputError, match="got BatchNorm1d"):
        logits_of(nn.BatchNorm1d(12), x)


def test_somebodys_head_in_a_classifier():
    model = heads.Classifier(nn.Linear(3, 12), Squared())
    x = torch.randn(6, 3)
    out = model(x)
    assert torch.equal(out.features, model.head.project(model.backbone(x)))
    assert torch.equal(out.logits, model.head(model.backbone(x)))
