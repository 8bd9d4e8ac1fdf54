"""Run a function on several gloo ranks of this machine and bring the results back."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank; return their results by rank.

    ``function`` and ``args`` are pickled: a function at the top of a test module. Tensors and plain
    Python values come back. The first exception on a rank is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        context = mp.start_processes(
            _rank,
            (function, world_size, directory, timeout, args),
            nprocs=world_size,
            join=False,
            start_method="spawn",
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} ranks: {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        files = [Path(directory, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    directory: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        torch.save(function(rank, world_size, *args), Path(directory, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # A model in DistributedDataParallel can outlive its group in a reference cycle; gloo's threads
    # then end while the interpreter does, which aborts the process once in thousands of runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
