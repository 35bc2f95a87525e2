"""Several processes on this machine that talk by gloo."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp

# Seconds after which processes that wait for each other have failed.
PATIENCE = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_rank(rank: int, size: int, port: int, function: Callable[[int, int, Path], Any], root: Path) -> None:
    """In a process of its own: what the function gives is saved by rank."""
    environment = {
        "LOCAL_RANK": rank,
        "RANK": rank,
        "NODE_RANK": 0,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    torch.save(function(rank, size, root), root / f"{rank}_of_{size}.pt")


def together(function: Callable[[int, int, Path], Any], root: Path, size: int = 2) -> list[Any]:
    """What the function gives on each of some processes; none of them may wait for ever."""
    context = mp.spawn(as_rank, args=(size, free_port(), function, root), nprocs=size, join=False)
    begun = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - begun > PATIENCE:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{size} processes wait for each other")
    return [torch.load(root / f"{rank}_of_{size}.pt", weights_only=False) for rank in range(size)]
