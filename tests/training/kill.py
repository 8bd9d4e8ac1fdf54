"""SIGKILL a run at random moments until it ends at last, and compare it with an unbroken one.

    python tests/training/kill.py --kills 20 --world 1
    python tests/training/kill.py --kills 20 --world 2

The command is the recipe as a user starts it (torchrun with gloo for two ranks). Launcher and ranks
are killed together; the ranks lead process groups of their own, so they are found by the directory
in their command line. A kill counts when the training had begun and had not ended. Afterwards every
file that a run promises must have the same bytes as without kills, and no temporary file may be
left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAME = ("config.json", "metrics.jsonl", "weights.safetensors", "evaluation.safetensors")


def command(out: Path, world: int, options: list[str]) -> list[str]:
    """The recipe on fashion-mini with every augmentation, about 250 steps."""
    recipe = ["-m", "ncmethods", "long-tailed", "--methods", "etf-dr-balanced", "--seeds", "0"]
    recipe += ["--train.epochs", "25", "--train.mixup", "0.2", "--train.crop", "2", "--train.flip"]
    recipe += ["--train.device", "cpu", "--out", str(out), *options]
    if world == 1:
        return [sys.executable, *recipe]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(world)]
    return [sys.executable, "-m", *torchrun, "--master-port", str(port), *recipe]


def start(out: Path, world: int, options: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command(out, world, options),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )


def family(out: Path) -> list[int]:
    """Processes with ``out`` in their command line: the launcher and the ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words:
            found.append(int(path.parent.name))
    return found


def kill(process: subprocess.Popen[bytes], out: Path) -> None:
    """End them all, the launcher first so that it starts no other."""
    process.kill()
    while left := family(out):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.01)
    process.wait()


def starts(run: Path) -> list[int]:
    """Steps at which the run began or went on, from timing.jsonl."""
    path = run / "timing.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines if line.startswith(b"{")]
    return [row["step"] for row in rows if row.get("event") == "start"]


def newest(run: Path) -> int:
    """Step of the newest checkpoint file, 0 if there is none."""
    return max((int(p.stem.split("-")[1]) for p in run.glob("checkpoint-*.pt")), default=0)


def torture(
    kills: int, world: int, *, options: list[str], seed: int, longest: float, where: Path
) -> dict[str, object]:
    """Run once in peace and once under fire; returns what happened."""
    rng = random.Random(seed)
    log, run = where / "log", where / "killed/etf-dr-balanced/seed0"
    peace = start(where / "peace", world, options, log)
    if peace.wait():
        raise SystemExit(f"the unbroken run failed:\n{log.read_text()[-3000:]}")
    hits: list[int] = []  # newest checkpoint at each kill
    early = attempts = 0
    while True:
        attempts += 1
        before = len(starts(run))
        process = start(where / "killed", world, options, log)
        if len(hits) < kills:
            while process.poll() is None and len(starts(run)) == before:
                time.sleep(0.002)
                if rng.random() < 2e-4:  # now and then before training begins
                    break
            training = len(starts(run)) > before
            time.sleep(rng.uniform(0, longest) if training else 0)
            if process.poll() is None and not (run / "result.json").exists():
                kill(process, where / "killed")
                hits += [newest(run)] if training else []
                early += not training
                continue
        if process.wait():
            raise SystemExit(f"a restarted run failed:\n{log.read_text()[-3000:]}")
        break
    peaceful = where / "peace/etf-dr-balanced/seed0"
    same = {n: (peaceful / n).read_bytes() == (run / n).read_bytes() for n in SAME}
    same["table.md"] = (where / "peace/table.md").read_bytes() == (
        where / "killed/table.md"
    ).read_bytes()
    return {
        "world": world,
        "kills in training": len(hits),
        "kills before it": early,
        "newest checkpoint at each kill": hits,
        "resumed at": starts(run),
        "identical": same,
        "litter": [str(p.relative_to(where)) for p in (where / "killed").rglob("*.tmp")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds of training per life")
    parser.add_argument("options", nargs="*", help="more options of the recipe, after --")
    args = parser.parse_args()
    options = args.options or ["--train.checkpoint-steps", "3"]
    where = Path(tempfile.mkdtemp(prefix="ncmethods-kill-"))
    result = torture(
        args.kills,
        args.world,
        options=options,
        seed=args.seed,
        longest=args.longest,
        where=where,
    )
    print(json.dumps(result, indent=1))
    good = all(result["identical"].values()) and not result["litter"]  # type: ignore[attr-defined]
    if not good or result["kills in training"] < args.kills:  # type: ignore[operator]
        raise SystemExit(f"FAILED or ended too early: look at {where}")
    shutil.rmtree(where)


if __name__ == "__main__":
    main()
