"""A small run for the tests of the loop, in this process or in one that is to be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ncmethods import tracking, training
from ncmethods.data import ImageData, Splits
from ncmethods.training import ModelConfig, Process, TrainConfig, loop

K = 4
ALONE = Process(0, 1, torch.device("cpu"))
CONFIG = TrainConfig(
    epochs=4, batch_size=32, lr=0.05, measurements=2, checkpoint_steps=2, threads=1, device="cpu"
)
CNN = ModelConfig("small_cnn", 1, K)
SAME = ("config.json", "metrics.jsonl", "weights.safetensors", "evaluation.safetensors")


def part(counts, seed):
    """Noisy images [N, 1, 8, 8] that show their class as a bright quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    images = torch.randint(0, 150, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8)
    for c in range(K):
        rows, cols = 4 * (c // 2), 4 * (c % 2)
        images[labels == c, :, rows : rows + 4, cols : cols + 4] += 60
    return ImageData(images, labels, tuple("abcd"))


def splits():
    return Splits(part([40, 30, 14, 8], 1), part([10, 10, 10, 7], 2), "quarters")


def ce(logits, labels):
    return F.cross_entropy(logits, labels)


class Net(nn.Module):
    """No BatchNorm, so that ranks see what one process sees; optionally with dropout."""

    def __init__(self, p=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Dropout(p))
        self.head = nn.Linear(24, K)

    def forward(self, x):
        return self.head(self.body(x))


def plain_net():
    return Net()


def dropout_net():
    return Net(0.5)


def run(out, model=CNN, *, loss=ce, here=ALONE, seed=0, draw=None, wandb=False, **changes):
    """fit() on the quarters; ``changes`` go to the TrainConfig."""
    return training.fit(
        model,
        loss,
        splits(),
        replace(CONFIG, **changes),
        Path(out),
        here=here,
        seed=seed,
        method="test",
        data={"name": "quarters"},
        wandb=wandb,
        draw=draw,
    )


def contents(out):
    return {name: (Path(out) / name).read_bytes() for name in SAME}


class Stopped(Exception):
    """What :func:`stopping` ends a run with."""


@contextmanager
def stopping(call):
    """Raise :class:`Stopped` at the ``call``-th step from here on, as a kill between two steps."""
    original, left = loop.lr_factor, [call]

    def factor(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        return original(*args)

    loop.lr_factor = factor
    try:
        yield
    finally:
        loop.lr_factor = original


# --- processes that die ---------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, n):
    """Die at the ``n``-th ``moment`` from now: step, write, replace, replaced or line."""
    left = [n]

    def due():
        left[0] -= 1
        return left[0] == 0

    def torn(write):
        def half(self, content):
            if due():
                write(self, content[: len(content) // 2])
                die()
            return write(self, content)

        return half

    if moment == "step":
        factor = loop.lr_factor
        loop.lr_factor = lambda *args: die() if due() else factor(*args)
    elif moment == "write":
        Path.write_bytes = torn(Path.write_bytes)
    elif moment in ("replace", "replaced"):
        rename = os.replace

        def replace_(source, target):
            now = due()
            if not (now and moment == "replace"):
                rename(source, target)
            if now:
                die()

        os.replace = replace_
    elif moment == "line":

        def append(file, row):
            if due():
                file.write(b'{"epoch": 1, "tr')
                die()
            original(file, row)

        original, tracking._append = tracking._append, append


def _life(out, moment, n, options):
    torch.set_num_threads(1)
    if moment == "draw":
        options = options | {"draw": lambda *_: die()}
    elif moment:
        arm(moment, n)
    run(out, **options)


def life(out, moment=None, n=1, **options):
    """Run in a fresh process that is killed at ``moment``; True if it got to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ncmethods.training", "torch._dynamo", "safetensors.torch", "scipy.optimize"]
    )
    process = context.Process(target=_life, args=(out, moment, n, options))
    process.start()
    process.join(120)
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with exit code {process.exitcode}")
    return process.exitcode == 0
