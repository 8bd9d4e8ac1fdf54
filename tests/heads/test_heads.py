"""The heads themselves: geometry, scale, necks, dense input, state, dtype, bad input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncmethods import heads, losses
from ncmethods._core import InputError, logits_of
from ncmethods.frames import orthogonal_frame, simplex_etf, softmax_code
from ncmethods.heads.fixed import class_lengths, frame_head
from ncmethods.testing import check_frame, check_head


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
    ("K", "scale", "loss"),
    [
        (10, 1.0, 1.3769349),
        (10, 16.0, 1.7118e-7),
        (100, 1.0, 3.6123773),
        (1000, 1.0, 5.908),
        (1000, 16.0, 1.1e-4),
    ],
)
@pytest.mark.filterwarnings("ignore:scale=1 is too small")
def test_cross_entropy_floor_at_collapse(K, scale, loss):
    # Golden check 19: log(1 + (K−1) e^{−sK/(K−1)}). The values are those of the sheets.
    exact = simplex_etf(K, K, dtype=torch.float64)
    head = frame_head(K, K, frame=exact, neck=None, scale=scale).double()
    head.weight.copy_(exact)
    got = F.cross_entropy(head(5 * exact), torch.arange(K)).item()
    assert got == pytest.approx(loss, rel=0.05 if loss == 1.1e-4 else 1e-4)
    assert got == pytest.approx(math.log1p((K - 1) * math.exp(-scale * K / (K - 1))), rel=1e-9)


@pytest.mark.parametrize(("K", "scale"), [(2, 0.3), (3, 0.7), (17, 2.5), (300, 9.0)])
def test_cross_entropy_floor_in_every_dimension(K, scale):
    """The same value for a wide frame, a minimal one, and for features at the vertices only."""
    want = math.log1p((K - 1) * math.exp(-scale * K / (K - 1)))
    for D in (K - 1, K + 9):
        head = heads.FixedHead(simplex_etf(K, D, dtype=torch.float64), D, neck=None, scale=scale)
        loss = F.cross_entropy(head(head.weight), torch.arange(K)).item()
        assert loss == pytest.approx(want, rel=1e-9)
        near = F.cross_entropy(head(head.weight + 0.1 * torch.randn(K, D)), torch.arange(K))
        assert near.item() > want


@pytest.mark.filterwarnings("ignore:scale=1 is too small")
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


@pytest.mark.parametrize(
    ("K", "scale", "floor"),
    [(10, 1.0, "1.377"), (1000, 5.0, "2.041"), (100, 4.0, "1.008"), (2, 0.3, "0.437")],
)
def test_a_scale_too_small_warns_with_the_floor(K, scale, floor):
    frame = simplex_etf(K, 1000)
    for build in (
        lambda **more: heads.etf_head(1000, K, scale=scale, **more),
        lambda **more: frame_head(1000, K, frame=frame, scale=scale, **more),
        lambda **more: heads.cosine_head(1000, K, scale=scale, **more),
    ):
        with pytest.warns(UserWarning, match=rf"too small for {K} classes.*below {floor}") as seen:
            build()
        assert seen[0].filename == __file__
        build(learn_scale=True)  # it will grow
    heads.etf_head(1000, K, scale=scale, normalize=False)  # the features bring their own length
    heads.etf_head(1000, K, scale=scale, lengths=torch.ones(K))


@pytest.mark.parametrize("K", [2, 3, 4, 10, 100, 1000])
def test_when_the_scale_is_too_small(K):
    """The rule: p < 1/2 at collapse, or more than half the loss of guessing for K ≤ 3."""
    p = 0.5 if K > 3 else K**-0.5
    edge = (K - 1) / K * math.log((K - 1) * p / (1 - p))  # p = 1/(1 + (K−1) e^{−sK/(K−1)})
    heads.etf_head(K, K, scale=edge + 1e-6)
    with pytest.warns(UserWarning, match=f"too small for {K} classes"):
        heads.etf_head(K, K, scale=edge - 1e-6)


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
    mlp = heads.etf_head(12, 5, neck="mlp", dim=9)
    first, last = mlp.neck[0], mlp.neck[2]
    assert first.weight.shape == (12, 12)
    assert last.weight.shape == (9, 12)
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(mlp.embed(x), hidden @ last.weight.T + last.bias)
    own = nn.Sequential(nn.Linear(12, 9), nn.GELU())
    assert heads.etf_head(12, 5, neck=own, dim=9).neck is own


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
        (lambda: heads.etf_head(12, 5, scale=0.0), "scale must be a positive number, got 0.0"),
        (lambda: heads.etf_head(12, 5, normalize=False, scale=-1.0), "positive number, got -1.0"),
        (lambda: heads.cosine_head(12, 5, scale=math.nan), "positive number, got nan"),
        (lambda: heads.etf_head(12, 5, lengths=torch.ones(4)), r"5 positive numbers.*\[1.0, 1.0,"),
        (lambda: heads.etf_head(12, 5, lengths=torch.arange(5)), "5 positive numbers"),
        (
            lambda: heads.etf_head(12, 5)(torch.ones(4, 11)),
            r"in_features = 12 on axis 1.*\(4, 11\)",
        ),
        (lambda: heads.etf_head(12, 5)(torch.ones(4, 7, 7, 12)), r"axis 1.*Channels are axis 1"),
        (lambda: heads.etf_head(12, 5)(torch.ones(4, 12, 7)), r"in_features = 12 on axis 2"),
        (
            lambda: heads.etf_head(12, 5, dim=9).logits(torch.ones(4, 12)),
            r"D = 9 .*\(4, 12\).*embed",
        ),
        (lambda: heads.cosine_head(12, 5)(torch.ones(4, 11)), "in_features = 12"),
        (lambda: frame_head(12, 5, frame=torch.eye(4, 12)), r"\(5, 12\), got \(4, 12\)"),
        (lambda: frame_head(12, 5, frame=simplex_etf(5, 12), dim=9), r"\(5, 9\), got \(5, 12\)"),
        (lambda: frame_head(12, 5, frame=simplex_etf(5, 9), neck=None), r"in_features = 12, got 9"),
        (lambda: frame_head(12, 5, frame=simplex_etf, dim=3), "needs dim ≥ 4, got 3"),
        (
            lambda: frame_head(12, 5, frame=2 * simplex_etf(5, 12)),
            "unit length, got 2 to 2.*lengths=",
        ),
        (
            lambda: frame_head(12, 5, frame=torch.full((5, 12), torch.inf)),
            "finite, got torch.float32",
        ),
        (lambda: frame_head(12, 5, frame=torch.eye(5, 12).long()), "floating and finite"),
        (lambda: frame_head(2, 2, frame=torch.eye(2)[[0, 0]]), "Two rows of the frame coincide"),
        (
            lambda: losses.dot_regression(torch.ones(1, 12), torch.tensor([5]), simplex_etf(5, 12)),
            "num_classes = 5.*got 5.*another label set",
        ),
        (
            lambda: losses.logit_adjusted(torch.ones(1, 5), torch.tensor([7]), torch.ones(5)),
            "num_classes = 5.*got 7",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            call()


def test_a_wide_frame_with_a_neck_needs_no_wide_backbone():
    """What the error for K − 1 > D advises."""
    head = heads.etf_head(8, 10, dim=9)
    assert head(torch.randn(4, 8)).shape == (4, 10)


# --- scale, lengths -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [heads.etf_head, heads.cosine_head])
def test_a_learned_scale_stays_positive(build):
    torch.manual_seed(3)
    fixed = build(12, 5, neck=None, scale=4.0)
    torch.manual_seed(3)
    head = build(12, 5, neck=None, scale=4.0, learn_scale=True)
    x, y = torch.randn(6, 12), torch.arange(6) % 5
    torch.testing.assert_close(head(x), fixed(x))
    assert [n for n, _ in head.named_parameters() if n != "weight"] == ["log_scale"]
    loss = F.cross_entropy(head(x), y)
    loss.backward()
    # d loss/d log s = Σ (∂loss/∂z) z, for any head whose logits are s·cosine
    z = fixed(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    torch.testing.assert_close(head.log_scale.grad, (grad * z).sum().detach())
    step = torch.optim.SGD([head.log_scale], lr=3.0)
    for sign in (1, -1):
        for _ in range(5):
            step.zero_grad()
            (sign * head.scale / head.scale.detach()).backward()
            step.step()
            assert head.scale > 0
    head.scale = 3.0
    torch.testing.assert_close(head.scale.detach(), torch.tensor(3.0))
    other = build(12, 5, neck=None, learn_scale=True)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(x), head(x))


def test_the_scale_can_be_set():
    head = heads.etf_head(12, 5, neck=None)
    x = torch.randn(6, 12)
    before = head(x) / head.scale
    head.scale = 2
    torch.testing.assert_close(head(x), 2 * before)
    with pytest.raises(InputError, match="positive"):
        head.scale = 0


def test_lengths():
    lengths = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    torch.manual_seed(3)
    unit = heads.etf_head(12, 5, neck=None)
    torch.manual_seed(3)
    head = heads.etf_head(12, 5, neck=None, lengths=lengths)
    torch.testing.assert_close(head.weight.norm(dim=1), lengths)
    x = torch.randn(6, 12)
    torch.testing.assert_close(head(x), unit(x) * lengths)
    assert list(head.state_dict()) == ["weight"]


def test_lengths_from_counts():
    # NC-FSCIL's rule on the counts (6, 3, 1): γ = 10/3, √(γ/n); an absent class has 1.
    got = class_lengths(torch.tensor([6, 3, 0, 1]))
    want = [math.sqrt(10 / 3 / 6), math.sqrt(10 / 3 / 3), 1.0, math.sqrt(10 / 3)]
    torch.testing.assert_close(got, torch.tensor(want))
    torch.testing.assert_close(class_lengths(torch.full((4,), 7)), torch.ones(4))
    with pytest.raises(InputError, match="counts"):
        class_lengths(torch.tensor([1, -1]))


# --- frame_head ---------------------------------------------------------------------------------


def orthoplex(K, D):
    """Somebody's builder without a generator: ±e_i."""
    return torch.cat([torch.eye(D), -torch.eye(D)])[:K]


@pytest.mark.parametrize(
    ("frame", "K", "dim", "cosine"),
    [
        (orthogonal_frame, 5, 12, 0.0),
        (orthoplex, 20, 10, 0.0),
        (simplex_etf, 7, 6, -1 / 6),
        (softmax_code, 6, 2, 0.5),  # regular hexagon: cos 60°
    ],
)
def test_any_frame_is_a_head_in_one_line(frame, K, dim, cosine):
    head = frame_head(12, K, frame=frame, dim=dim)
    check_frame(head.weight)
    assert head.weight.shape == (K, dim)
    assert head.scale == pytest.approx(math.log(99 * (K - 1)) / (1 - cosine), rel=1e-5)
    p = head.logits(3 * head.weight).softmax(1).diagonal()
    assert p.min() >= 0.99 - 1e-5
    if cosine == -1 / (K - 1) or frame is orthogonal_frame:  # every pair is a closest one
        torch.testing.assert_close(p, torch.full_like(p, 0.99), rtol=0, atol=1e-5)
    check_head(lambda width, classes: frame_head(width, classes, frame=torch.eye(classes, width)))


def test_a_frame_tensor_or_a_builder():
    g = torch.Generator()
    one = frame_head(12, 5, frame=orthogonal_frame, generator=g.manual_seed(1))
    rows = orthogonal_frame(5, 12, generator=g.manual_seed(1))
    assert torch.equal(one.weight, rows)
    two = frame_head(12, 5, frame=rows)
    assert torch.equal(two.weight, rows)
    assert two.weight.data_ptr() != rows.data_ptr()
    assert frame_head(12, 5, frame=rows.double()).weight.dtype == torch.float32
    frame_head(12, 5, frame=rows.bfloat16())  # unit to what bfloat16 can say
    narrow = frame_head(12, 5, frame=simplex_etf(5, 4), neck="linear")
    assert narrow(torch.randn(3, 12)).shape == (3, 5)
    etf = heads.etf_head(12, 5, generator=g.manual_seed(2))
    same = frame_head(12, 5, frame=simplex_etf, generator=g.manual_seed(2))
    assert torch.equal(same.weight, etf.weight)
    assert same.scale == pytest.approx(etf.scale, rel=1e-5)
    assert frame_head(12, 5, frame=rows, normalize=False).scale == 1


def test_the_default_scale_of_a_frame_sees_every_pair():
    """The closest pair may lie in any tile of the comparison (K > 1024) and across tiles."""
    K = 2100
    for i, j in ((3, 7), (5, 2099), (1500, 1600)):
        rows = torch.eye(K, dtype=torch.float64)
        rows[j, i], rows[j, j] = 0.6, 0.8
        head = frame_head(K, K, frame=rows, neck=None)
        assert head.scale == pytest.approx(math.log(99 * (K - 1)) / 0.4, rel=1e-6)


def test_the_canonical_simplex_needs_no_matrix():
    """⟨h, f_c⟩ = √(K/(K−1)) (h_c − mean of h_1 … h_K): O(K) for a sample."""
    K = 7
    head = heads.etf_head(12, K, neck=None, rotation="canonical", normalize=False)
    h = torch.randn(6, 12)[:, :K]
    want = math.sqrt(K / (K - 1)) * (h - h.mean(1, keepdim=True))
    torch.testing.assert_close(head(F.pad(h, (0, 5), value=9.0)), want)


# --- dense input --------------------------------------------------------------------------------


def test_dense_input(head):
    """Maps, volumes and tokens are many samples: the same numbers, channels where they were."""
    maps, tokens = torch.randn(3, 12, 4, 5), torch.randn(3, 6, 12)
    D, K = head.weight.shape[1], 5
    for training in (True, False):
        for x, axis in ((maps, 1), (tokens, -1), (maps[:, :, None], 1)):
            head.train(training)
            twin = copy.deepcopy(head)
            rows = x.movedim(axis, -1).reshape(-1, 12)
            features, logits = head.embed(x), head(x)
            assert features.shape == tuple(D if n == 12 else n for n in x.shape)
            torch.testing.assert_close(features.movedim(axis, -1).reshape(-1, D), twin.embed(rows))
            torch.testing.assert_close(logits.movedim(axis, -1).reshape(-1, K), twin(rows))
            torch.testing.assert_close(head.logits(features), logits)
    assert head(maps[:0]).shape == (0, 5, 4, 5)
    assert head(tokens[:0]).shape == (0, 6, 5)
    assert head(maps[:1, :, :1, :1]).shape == (1, 5, 1, 1)


def test_the_batchnorm_neck_on_maps_is_batchnorm2d():
    head, bn = heads.etf_head(12, 5), nn.BatchNorm2d(12)
    x = 3 + 2 * torch.randn(4, 12, 6, 6)
    torch.testing.assert_close(head.embed(x), bn(x))
    torch.testing.assert_close(head.neck.running_mean, bn.running_mean)
    torch.testing.assert_close(head.neck.running_var, bn.running_var)


def test_pooled_logits_are_logits_of_pooled_features():
    """Where nothing is normalised, averaging over positions commutes with the head."""
    head = heads.etf_head(12, 5, neck="linear", normalize=False)
    x = torch.randn(4, 12, 6, 6)
    torch.testing.assert_close(head(x).mean((2, 3)), head(x.mean((2, 3))))


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
    "etf-mlp": lambda: heads.etf_head(12, 5, neck="mlp", dim=7),
    "etf-scale": lambda: heads.etf_head(12, 5, dim=7, learn_scale=True),
    "etf-lengths": lambda: heads.etf_head(12, 5, lengths=torch.arange(1, 6), as_parameter=True),
    "etf-raw": lambda: heads.etf_head(12, 5, neck="linear", normalize=False),
    "frame": lambda: frame_head(12, 5, frame=orthogonal_frame),
    "cosine-scale": lambda: heads.cosine_head(12, 5, neck="linear", dim=4, learn_scale=True),
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
    torch.testing.assert_close(
        mixed, want, rtol=0.05, atol=0.05 * float(torch.as_tensor(head.scale).detach())
    )
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


def test_copies(head):
    head.eval()
    x = torch.randn(3, 12)
    for same in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(same(x), head(x))
        assert repr(same) == repr(head)
    learned = head.log_scale is not None
    assert ("scale=learned" if learned else f"scale={head.scale:.4g}") in repr(head)


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
