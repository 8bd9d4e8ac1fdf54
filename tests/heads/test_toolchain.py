"""Heads in people's tool chains: compile, AMP, DDP, EMA, formats, state, export, optimizers."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ncmethods import heads
from ncmethods._core import InputError
from ncmethods.frames import orthogonal_frame
from ncmethods.heads.export import to_conv, to_linear
from ncmethods.heads.fixed import frame_head

K, D = 5, 12
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])
LENGTHS = (0.5, 1.0, 1.0, 2.0, 3.0)
ETF = 1.25 * (torch.eye(K, dtype=torch.float64) - 1 / K)
# Every builder, and the Gram matrix of its rows (None: the rows are learned).
BUILDERS = {
    "etf": (heads.etf_head, ETF),
    "etf-none": (partial(heads.etf_head, neck=None), ETF),
    "etf-linear": (partial(heads.etf_head, neck="linear", dim=7), ETF),
    "etf-mlp": (partial(heads.etf_head, neck="mlp", dim=7), ETF),
    "etf-raw": (partial(heads.etf_head, normalize=False, rotation="canonical"), ETF),
    "etf-parameter": (partial(heads.etf_head, as_parameter=True, learn_scale=True), ETF),
    "etf-lengths": (
        partial(heads.etf_head, lengths=torch.tensor(LENGTHS)),
        torch.tensor(LENGTHS).double()[:, None] * ETF * torch.tensor(LENGTHS).double(),
    ),
    "frame": (partial(frame_head, frame=orthogonal_frame), torch.eye(K).double()),
    "cosine": (partial(heads.cosine_head, neck="bn", learn_scale=True), None),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def backbone(kind):
    return nn.Linear(6, D) if kind == "linear" else nn.Conv2d(6, D, 3, padding=1)


def batch(kind, n=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape = (n, 6) if kind == "linear" else (n, 6, 4, 3)
    return torch.randn(shape, generator=g), torch.arange(n) % K


def loss_of(logits, y):
    """Cross-entropy; maps are averaged over their positions, as squeezenet does."""
    return F.cross_entropy(logits if logits.ndim == 2 else logits.mean((2, 3)), y)


def check_rows(head, gram):
    """The rows are the frame they were built as, to float32, and take no gradient."""
    if gram is None:
        assert head.weight.requires_grad
        return
    W = head.weight.detach().double()
    torch.testing.assert_close(W @ W.T, gram, rtol=0, atol=2e-6)
    assert head.weight.grad is None
    assert not head.weight.requires_grad


def model_of(name, kind):
    return nn.Sequential(backbone(kind), BUILDERS[name][0](D, K))


def train(model, kind, steps=3, *, rank=0, world=1, bf16=False):
    """SGD with a weight decay that would halve a free row within a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1.0)
    x, y = batch(kind)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(x[rank::world])
        assert logits.dtype == torch.float32
        loss_of(logits, y[rank::world]).backward()
        optimizer.step()
    return model


# --- invariants before and after optimizer steps --------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("how", ["plain", "compile", "bf16"])
def test_invariants(name, kind, how):
    model, gram = model_of(name, kind), BUILDERS[name][1]
    before = copy.deepcopy(model.state_dict())
    check_rows(model[1], gram)
    run = model
    if how == "compile":
        torch.compiler.reset()
        twin = copy.deepcopy(model)
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(run, kind, bf16=how == "bf16")
    check_rows(model[1], gram)
    after = model.state_dict()
    assert torch.equal(before["1.weight"], after["1.weight"]) == (gram is not None)
    for parameter, value in model.named_parameters():
        if value.requires_grad:  # everything else does train
            assert value.grad is not None
            assert not torch.equal(before[parameter], after[parameter]), parameter
    if how == "compile":
        torch.testing.assert_close(after, train(twin, kind).state_dict())
        model.eval(), twin.eval()
        x = batch(kind)[0]
        torch.testing.assert_close(run(x), twin(x))


@pytest.mark.parametrize("name", BUILDERS)
def test_channels_last(name):
    one = model_of(name, "conv")
    two = copy.deepcopy(one).to(memory_format=torch.channels_last)
    x = batch("conv")[0]
    got = two(x.to(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, one(x))


# --- distributed ----------------------------------------------------------------------------------


def sharded(rank, world):
    """as_parameter under FSDP2: rows are sharded, trained around, and gathered whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, D), heads.etf_head(D, K, neck="linear", as_parameter=True))
    before = model[1].weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    local = model[1].weight.to_local().numel()
    train(model, "linear", rank=rank, world=world)
    return before, local, model[1].weight.full_tensor().detach()


def invariants_on(rank, world):
    """Rows of every head before wrapping and after it, and the state after steps."""
    out = {}
    for name in BUILDERS:
        for kind in ("linear", "conv"):
            torch.manual_seed(rank)  # every rank draws another frame …
            model = model_of(name, kind)
            drawn = model[1].weight.detach().clone()
            ddp = nn.parallel.DistributedDataParallel(model)  # … and takes that of rank 0
            wrapped = model[1].weight.detach().clone()
            train(ddp, kind, rank=rank, world=world)
            check_rows(model[1], BUILDERS[name][1])
            out[name, kind] = drawn, wrapped, copy.deepcopy(model.state_dict())
    # FSDP2 of torch 2.6 needs an accelerator.
    return out, sharded(rank, world) if TORCH >= (2, 7) else None


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(invariants_on, 2)


@pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 of torch 2.6 needs an accelerator")
def test_fsdp_shards_the_rows(two_ranks):
    for rank, (_, (before, local, after)) in enumerate(two_ranks):
        assert torch.equal(before, after)
        assert local == (3, 2)[rank] * D  # 5 rows on two ranks


def test_ddp_takes_the_frame_of_rank_0(two_ranks):
    ranks = [ddp for ddp, _ in two_ranks]
    for key in ranks[0]:
        (drawn, wrapped, state), (drawn_1, wrapped_1, state_1) = ranks[0][key], ranks[1][key]
        if "canonical" not in str(BUILDERS[key[0]][0]):
            assert not torch.equal(drawn, drawn_1)
        assert torch.equal(wrapped, drawn)
        assert torch.equal(wrapped_1, drawn)
        gram = BUILDERS[key[0]][1]
        assert torch.equal(state["1.weight"], drawn) == (gram is not None)
        for entry in state:
            if "running" not in entry:  # BatchNorm's statistics are those of each rank
                torch.testing.assert_close(state[entry], state_1[entry])
        if key[0] == "etf-linear":  # no batch statistics: two ranks train as one process does
            torch.manual_seed(0)
            alone = train(model_of(*key), key[1]).state_dict()
            torch.testing.assert_close(state, alone)


# --- averaged models ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.3, 0.999])
@pytest.mark.parametrize("name", BUILDERS)
def test_averaged_models_keep_the_frame(name, decay, use_buffers):
    """An average of equal frames is that frame, bit by bit; without use_buffers it is copied."""
    model, gram = model_of(name, "linear"), BUILDERS[name][1]
    average = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    ema = AveragedModel(model, use_buffers=use_buffers, **average)
    frame = model[1].weight.detach().clone()
    for _ in range(4):
        train(model, "linear", steps=1)
        ema.update_parameters(model)
    head = ema.module[1]
    check_rows(head, gram)
    assert torch.equal(head.weight.detach(), frame) == (gram is not None)
    assert not torch.equal(ema.module[0].weight, model[0].weight)
    update_bn([batch("linear")[0]], ema)
    assert ema(batch("linear")[0]).isfinite().all()


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_parameter", [False, True])
def test_state_both_ways_with_a_linear_layer(as_parameter):
    head = heads.etf_head(D, K, neck=None, as_parameter=as_parameter)
    linear = nn.Linear(D, K, bias=False)
    linear.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(linear.weight, head.weight)
    other = heads.etf_head(D, K, neck=None, as_parameter=not as_parameter)
    other.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(other.weight, head.weight)
    assert other.weight.requires_grad is False
    # a neck has parameters that a linear layer lacks: fold it
    deep = heads.etf_head(D, K, neck="linear", normalize=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*neck\.weight"):
        nn.Linear(D, K).load_state_dict(deep.state_dict())
    full = nn.Linear(D, K)
    full.load_state_dict(to_linear(deep).state_dict(), strict=True)
    torch.testing.assert_close(full(torch.ones(2, D)), deep(torch.ones(2, D)))


@pytest.mark.parametrize("strict", [False, True])
def test_the_state_of_a_trained_classifier_does_not_replace_the_frame(strict):
    plain = nn.Sequential(nn.Linear(6, D), nn.Linear(D, K))
    model = model_of("etf", "linear")
    frame = model[1].weight.clone()
    with pytest.raises(InputError, match=r"1\.weight and 1\.bias are the state of an nn\.Linear"):
        model.load_state_dict(plain.state_dict(), strict=strict)
    assert torch.equal(model[1].weight, frame)
    body = {n: v for n, v in plain.state_dict().items() if n not in ("1.weight", "1.bias")}
    model.load_state_dict(body, strict=False)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model[1].weight, frame)


@pytest.mark.parametrize("name", BUILDERS)
def test_copies(name):
    model = train(model_of(name, "linear"), "linear").eval()
    x = batch("linear")[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(same(x), model(x))
        check_rows(same[1], BUILDERS[name][1])
        assert str(same) == str(model)


@pytest.mark.parametrize("name", BUILDERS)
def test_meta_device(name):
    """Shapes without values; then storage, and the frame comes from the state."""
    source = train(model_of(name, "linear"), "linear").eval()
    if name == "frame":  # its scale is read off the rows
        builder = partial(BUILDERS[name][0], scale=float(source[1].scale))
        with torch.device("meta"), pytest.raises(InputError, match="pass scale="):
            BUILDERS[name][0](D, K)
    else:
        builder = BUILDERS[name][0]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, D), builder(D, K))
    assert model[1].weight.is_meta
    assert str(model) == str(source)
    assert model(torch.empty(3, 6, device="meta")).shape == (3, K)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = batch("linear")[0]
    torch.testing.assert_close(model.eval()(x), source(x))
    check_rows(model[1], BUILDERS[name][1])
    with torch.device("meta"):
        assigned = nn.Sequential(nn.Linear(6, D), builder(D, K))
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned.eval()(x), model(x))
    assert source.to("meta")(torch.empty(3, 6, device="meta")).shape == (3, K)


# --- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
    "adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.5),
    "adamw": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, amsgrad=True),
    "adamw-foreach": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, foreach=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, weight_decay=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.5),
    "nadam": partial(torch.optim.NAdam, lr=0.1, weight_decay=0.5),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["etf", "etf-parameter", "etf-none"])
def test_optimizers_accept_the_model(name, optimizer):
    model = model_of(name, "linear")
    frame, body = model[1].weight.clone(), model[0].weight.detach().clone()
    step = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(step, 1.0, 4, cycle_momentum=False)
    x, y = batch("linear")

    def closure():
        step.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    for _ in range(3):
        step.step(closure)
        schedule.step()
    assert torch.equal(model[1].weight, frame)
    assert not torch.equal(model[0].weight, body)
    again = OPTIMIZERS[optimizer](model.parameters())
    again.load_state_dict(step.state_dict())


def test_what_has_no_parameters():
    """The whole model always has some; a head without neck and scale has none."""
    head = heads.etf_head(D, K, neck=None)
    assert list(head.parameters()) == []
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(head.parameters(), lr=0.1)
    groups = [{"params": nn.Linear(6, D).parameters()}, {"params": head.parameters(), "lr": 1.0}]
    assert len(torch.optim.SGD(groups, lr=0.1).param_groups) == 2
    counted = list(heads.etf_head(D, K, neck=None, as_parameter=True).parameters())
    assert [p.requires_grad for p in counted] == [False]


# --- one plain layer ------------------------------------------------------------------------------

FOLDED = {
    "none": {"neck": None},
    "bn": {"neck": "bn"},
    "bn-dim": {"neck": "bn", "dim": 7},
    "linear": {"neck": "linear", "dim": 7},
    "lengths": {"neck": "bn", "lengths": torch.tensor(LENGTHS), "scale": 3.0},
    "scale": {"neck": "linear", "learn_scale": True, "scale": 2.5},
    "parameter": {"neck": None, "as_parameter": True, "rotation": "canonical"},
}


def trained_head(build=heads.etf_head, **options):
    """A float64 head whose BatchNorm has seen data and whose affine is not 1, 0."""
    head = build(D, K, **options).double()
    with torch.no_grad():
        for parameter in head.neck.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for _ in range(5):
        head(5 + 3 * torch.randn(64, D, dtype=torch.float64))
    return head


@pytest.mark.parametrize("options", FOLDED.values(), ids=FOLDED)
def test_a_head_that_does_not_normalise_folds_exactly(options):
    head = trained_head(normalize=False, **options)
    state = copy.deepcopy(head.state_dict())
    linear, conv = to_linear(head), to_conv(head)
    assert head.training
    torch.testing.assert_close(head.state_dict(), state, rtol=0, atol=0)
    assert type(linear) is nn.Linear
    assert type(conv) is nn.Conv2d
    assert linear.weight.dtype == torch.float64
    assert (linear.bias is None) == (options["neck"] is None)
    head.eval()
    x, maps = 10 * torch.randn(40, D).double() + 5, 10 * torch.randn(3, D, 4, 5).double()
    torch.testing.assert_close(linear(x), head(x), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(conv(maps), head(maps), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(to_linear(head, argmax=True)(x), head(x), rtol=1e-12, atol=1e-10)


def test_folding_by_hand():
    """W' = s W diag(γ/√(σ²+ε)), b' = s W (β − γ μ/√(σ²+ε))."""
    head = trained_head(normalize=False, scale=2.0)
    bn = head.neck
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    linear = to_linear(head)
    want = 2 * head.weight * factor
    torch.testing.assert_close(linear.weight, want, rtol=1e-12, atol=1e-12)
    bias = 2 * head.weight @ (bn.bias - factor * bn.running_mean)
    torch.testing.assert_close(linear.bias, bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "options"),
    [(heads.etf_head, options) for options in FOLDED.values()]
    + [(heads.cosine_head, FOLDED[name]) for name in ("none", "bn-dim", "scale")],
)
def test_a_head_that_normalises_folds_up_to_its_argmax(build, options):
    head = trained_head(build, **options).eval()
    with pytest.raises(InputError, match=r"normalises its features.*argmax=True"):
        to_linear(head)
    linear, conv = to_linear(head, argmax=True), to_conv(head, argmax=True)
    x, maps = 5 + 3 * torch.randn(5000, D).double(), torch.randn(3, D, 4, 5).double()
    got, want = linear(x), head(x)
    assert torch.equal(got.argmax(1), want.argmax(1))
    # one positive factor per sample: the norm of its feature
    norm = head.embed(x).norm(dim=1, keepdim=True)
    torch.testing.assert_close(got, norm * want, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(
        conv(maps), head.embed(maps).norm(dim=1, keepdim=True) * head(maps), rtol=1e-10, atol=1e-9
    )
    assert (got.softmax(1) - want.softmax(1)).abs().max() > 0.1  # probabilities do differ


def test_what_does_not_fold():
    with pytest.raises(InputError, match=r"neck of FixedHead is not affine.*neck='bn'"):
        to_linear(heads.etf_head(D, K, neck="mlp", normalize=False))
    with pytest.raises(InputError, match="not affine"):
        to_linear(heads.etf_head(D, K, neck="mlp"), argmax=True)
    with pytest.raises(InputError, match="meta device"):
        to_linear(heads.etf_head(D, K).to("meta"))
    with pytest.raises(InputError, match=r"nn\.Linear or have weight"):
        to_linear(nn.BatchNorm1d(D))

    class Nearest(nn.Module):
        """Several rows compete: no linear layer."""

        def __init__(self):
            super().__init__()
            self.weight, self.in_features = nn.Parameter(torch.randn(K, D)), D

        def embed(self, x):
            return x

        def logits(self, h):
            return -torch.cdist(h, self.weight)

    with pytest.raises(InputError, match="not linear in its features"):
        to_linear(Nearest(), argmax=True)


def test_linear_layers_fold_to_themselves():
    for bias in (True, False):
        linear = nn.Linear(D, K, bias=bias)
        assert torch.equal(to_linear(linear).weight, linear.weight)
        assert (to_linear(linear).bias is None) == (not bias)
    half = heads.etf_head(D, K, normalize=False).bfloat16()
    assert to_linear(half).weight.dtype == torch.bfloat16


def test_a_folded_head_takes_the_place_of_the_head():
    model = nn.Sequential(nn.Linear(6, D), heads.etf_head(D, K, normalize=False))
    train(model, "linear").eval()
    x = batch("linear")[0]
    want = model(x)
    heads.swap_head(model, to_linear(model[1]))
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


# --- torch.export and ONNX ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", BUILDERS)
def test_export(name, kind):
    """The head itself exports, with a free batch size, and the program holds the frame."""
    torch.compiler.reset()  # torch 2.6 counts the recompilations of other tests
    model = train(model_of(name, kind), kind).eval()
    x = batch(kind)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about pytree and the like
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        ran = program.module()
        torch.testing.assert_close(ran(x), model(x))
        torch.testing.assert_close(ran(x[:3]), model(x[:3]))
    assert "1.weight" in program.state_dict


def test_export_of_the_folded_layer():
    torch.compiler.reset()
    head = trained_head(normalize=False).float().eval()
    x = torch.randn(4, D)
    program = torch.export.export(to_linear(head), (x,))
    torch.testing.assert_close(program.module()(x), head(x), rtol=1e-5, atol=1e-5)
    operators = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert operators == [torch.ops.aten.linear.default]


def test_onnx_of_the_folded_layer():
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    head = trained_head(normalize=False).float().eval()
    x, file = torch.randn(4, D), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(to_linear(head), (x,), file, dynamo=False)
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), head(x), rtol=1e-5, atol=1e-5)
