"""What measuring and tracking cost beside training, on the recipe's default job.

    python tests/benchmarks/bench_overhead.py

One run of ``ce`` (fashion-mini, imbalance 100, 40 epochs) with W&B offline. ``timing.jsonl`` gives,
for each epoch, the seconds of training, of the evaluation forwards and of the measures; the
tracker's calls are timed here. The target is measures + tracking ≤ 5 % of training. What W&B costs
once per run (its start and its end) and the report page stand apart. Times are CPU times of this
process on one thread: other work on the machine leaves them alone, and the disk's time is not in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import scipy.optimize  # noqa: F401  the temperature fit imports it, once per process
import torch

from ncmethods.cli import load_recipe
from ncmethods.tracking import Tracker

spent: dict[str, float] = defaultdict(float)


def timed(owner: object, name: str, key: str) -> None:
    """Let calls of ``owner.name`` add to ``spent[key]``."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        began = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent[key] += time.process_time() - began

    setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="ce")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("log", "timing", "position"):
        timed(Tracker, name, "rows")
    for name in ("__init__", "close"):
        timed(Tracker, name, "W&B start and end")
    recipe = load_recipe("long_tailed")
    timed(recipe.viz, "draw_run", "figures and page")
    from ncmethods.training import loop

    timed(loop, "save_checkpoint", "checkpoints")
    loop.time = SimpleNamespace(perf_counter=time.process_time, time=time.time)
    with tempfile.TemporaryDirectory() as out:
        recipe.main(recipe.LongTailed(methods=(args.method,), seeds=(0,), out=Path(out)))
        timing = Path(out, args.method, "seed0", "timing.jsonl").read_text().splitlines()
    epochs = [row for row in map(json.loads, timing) if "epoch" in row]
    training, forward, measure = (
        sum(row.get(key, 0.0) for row in epochs) for key in ("seconds", "forward", "measure")
    )
    print(f"\ntraining {training:.2f} s in {len(epochs)} epochs")
    for key, value in {"forwards": forward, "measures": measure, **spent}.items():
        print(f"{key:>18}: {value:6.3f} s = {100 * value / training:5.2f} % of training")
    share = (measure + spent["rows"]) / training
    print(f"measures + tracking: {100 * share:.2f} % (target: at most 5 %)")


if __name__ == "__main__":
    main()
