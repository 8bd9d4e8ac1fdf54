"""CollapseCallback logs what a pass of its own would give, in one process and on two ranks."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from ncmethods import heads, metrics
from ncmethods._core import InputError
from ncmethods.features import extract
from ncmethods.stats import ClassStats

pl = pytest.importorskip("lightning.pytorch")

from ncmethods.integrations.lightning import CollapseCallback  # noqa: E402

# Lightning says that it runs on a CPU, without a logger and with few workers.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("User", "Deprecation", "Future")
]
LAYERS = ("net.body.0", "net.body.2", "head")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.fc = heads.etf_head(8, 4, neck=None)

    def forward(self, x):
        return self.fc(self.body(x))


class Module(pl.LightningModule):
    def __init__(self, lr=0.0, as_dict=False, fail=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr, self.as_dict, self.fail = Net(), lr, as_dict, fail

    def training_step(self, batch, _):
        x, y = (batch["image"], batch["label"]) if self.as_dict else batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.fail:
            raise RuntimeError("stop")
        return loss

    def validation_step(self, batch, _, dataloader_idx=0):
        self.log("loss", self.training_step(batch, 0), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def data(N, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % 4
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return centers[y] + torch.randn(N, 6, generator=g), y


class Dicts(torch.utils.data.TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"image": x, "label": y}


def loader(N, seed, as_dict=False):
    return torch.utils.data.DataLoader(
        (Dicts if as_dict else torch.utils.data.TensorDataset)(*data(N, seed)), batch_size=8
    )


def fit(module, *callbacks, epochs=1, **options):
    options = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 1} | options
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    as_dict = module.as_dict
    trainer.fit(module, loader(48, 0, as_dict), loader(32, 1, as_dict))
    return trainer


def by_hand(module, N, seed):
    """Reports of the same layers from passes of our own."""
    net, (x, y) = module.net, data(N, seed)
    with torch.no_grad():
        a = net.body[0](x)
        b = net.body[2](a.relu())
    out = {}
    for layer, z in zip(LAYERS, (a, b, b)):
        stats = ClassStats(4, z.shape[1], layer=layer).update(z, y)
        head = net.fc if layer == "head" else None
        out |= metrics.report(stats, head, prefix=f"{layer}/")
    found = metrics.report(extract(net, loader(N, seed)), net.fc)
    return out | {f"head/nc4/{key}": found[f"nc4/{key}"] for key in ("agreement", "ncc_accuracy")}


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def check(found, on, expected):
    got = {key.removeprefix(f"{on}/"): float(v) for key, v in found.items() if key.startswith(on)}
    expected = {key: value for key, value in expected.items() if "debiased" not in key}
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert {"depth/effective", "depth/slope", "depth/progressive"} <= set(got)


@pytest.mark.parametrize("as_dict", [False, True])
def test_logs_both_passes_of_an_epoch(as_dict):
    """Also with the head's `embed` wrapped by both, and a validation in mid-epoch."""
    module = Module(as_dict=as_dict)
    both = [CollapseCallback(4, LAYERS, on=on, samples=48) for on in ("train", "val")]
    trainer = fit(module, *both, val_check_interval=3)
    assert hooks(module) == 0
    assert "embed" not in vars(module.net.fc)
    logged = trainer.callback_metrics
    assert "loss" in logged
    check(logged, "train", by_hand(module, 48, 0))
    check(logged, "val", by_hand(module, 32, 1))
    assert both[0].last == pytest.approx(
        {k: float(v) for k, v in logged.items() if k.startswith("train/")}, nan_ok=True
    )


def test_measures_the_last_of_every_n_epochs():
    module, seen = Module(lr=0.1), []

    class Count(CollapseCallback):
        def _end(self, pl_module):
            if self.monitor is not None:
                seen.append((self.on, pl_module.current_epoch, self.monitor.stats["head"].N))
            super()._end(pl_module)

    train, val = Count(4, on="train", every_n_epochs=2), Count(4, every_n_epochs=3)
    trainer = fit(module, train, val, epochs=6)
    assert seen == [
        ("train", 1, 48),
        ("val", 2, 32),
        ("train", 3, 48),
        ("val", 5, 32),
        ("train", 5, 48),
    ]
    seen.clear()
    trainer.validate(module, [loader(32, 1), loader(16, 2)], verbose=False)
    assert [(on, n) for on, _, n in seen] == [("val", 32)]  # always, and of the first loader
    assert val.last["val/head/nc1/pinv"] == pytest.approx(
        by_hand(module, 32, 1)["head/nc1/pinv"], rel=1e-4
    )


def test_an_exception_takes_the_hooks_off():
    module, callback = Module(fail=True), CollapseCallback(4, LAYERS, on="train")
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, callback, num_sanity_val_steps=0)
    assert hooks(module) == 0
    assert "embed" not in vars(module.net.fc)
    assert callback.monitor is None


def test_a_compiled_module_is_watched():
    """It runs eagerly while it is watched: a graph made before would not call the hooks."""
    eager = []

    class Traced(Module):
        def training_step(self, batch, i):
            if not torch.compiler.is_compiling():
                eager.append((self.trainer.current_epoch, i))
            return super().training_step(batch, i)

    module = Traced()
    callback = CollapseCallback(4, LAYERS, on="train", samples=48, every_n_epochs=2)
    compiled = torch.compile(module, backend="eager")
    compiled.as_dict = False
    fit(compiled, callback, epochs=2, limit_val_batches=0, num_sanity_val_steps=0)
    assert eager == [(1, i) for i in range(6)]
    check(callback.last, "train", by_hand(module, 48, 0))


def test_bad_options_and_batches_have_messages():
    with pytest.raises(InputError, match="Did you mean 'train'"):
        CollapseCallback(4, on="trian")
    with pytest.raises(InputError, match="at least 1"):
        CollapseCallback(4, every_n_epochs=0)
    with pytest.raises(InputError, match="override labels_of"):
        CollapseCallback(4).labels_of(torch.ones(3, 2))


def main():
    """Two ranks, each with every other sample; called as a program."""
    both = [CollapseCallback(4, LAYERS, on=on, samples=48) for on in ("train", "val")]
    trainer = fit(Module(), *both, strategy="ddp_fork", devices=2)
    found = {key: float(v) for key, v in trainer.callback_metrics.items()}
    print("\n" + json.dumps({key: v for key, v in found.items() if v == v}))


def test_two_ranks_report_the_whole():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for on, N, seed in (("train", 48, 0), ("val", 32, 1)):
        check(found, on, by_hand(Module(), N, seed))
    assert "sync_dist" not in done.stderr


if __name__ == "__main__":
    main()
