"""Several processes on this machine that talk by gloo, and scripts that run in a process of their own.

They are forked from a server that has imported torch, Lightning and this package once, without the run-time type checks
of the tests: a process takes a tenth of a second to start, where a new interpreter takes five.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp

# Seconds after which processes that wait for each other have failed.
PATIENCE = 300
PRELOADED = ["lightning", "tests.killed_runs", "tests.monitors", "tests.trainings"]


def forked() -> ForkServerContext:
    """Processes of their own that need not import everything anew."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver")


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
    forked()
    arguments = (size, free_port(), function, root)
    context = mp.start_processes(as_rank, args=arguments, nprocs=size, join=False, start_method="forkserver")
    begun = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - begun > PATIENCE:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{size} processes wait for each other")
    return [torch.load(root / f"{rank}_of_{size}.pt", weights_only=False) for rank in range(size)]


@dataclass(frozen=True)
class Ended:
    """What is left of a script: its exit status, and what it wrote."""

    status: int | None
    stdout: str
    stderr: str


def script(path: Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a Python script as a program, in a folder."""
    said = [folder / f".{path.stem}.{stream}" for stream in ("stdout", "stderr")]
    started = (path, tuple(arguments), folder, dict(environment or {}), *said)
    process = forked().Process(target=_as_program, args=started)
    process.start()
    process.join(PATIENCE)
    process.kill()
    process.join()
    return Ended(process.exitcode, *(file.read_text() for file in said))


def _as_program(
    path: Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    with (
        stdout.open("w") as out,
        stderr.open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise
