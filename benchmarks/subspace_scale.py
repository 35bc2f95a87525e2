"""What `subspace fit` takes of time and memory for many large checkpoints: written to disk, and fitted by processes.

    python -m benchmarks.subspace_scale FOLDER                    # 500 models of 10 M parameters: 20 GB
    python -m benchmarks.subspace_scale FOLDER --models "[100]"   # fewer of them

Each model is a common start, eight common directions with strengths of its own, and noise of the same energy.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor

SHARED, BLOCKS, WORDS = 8, 3, 1000
State = dict[str, Tensor]


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """Of the matrices of a small transformer: 10 M numbers at a width of 512."""
    block = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    found = {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    return {"table": (WORDS, width)} | found


def drawn(width: int, scale: float, seed: int) -> State:
    """Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes(width).items()}


def written(folder: Path, models: int, width: int) -> list[str]:
    """Paths of models on disk, one in memory at a time; those that are there stay as they are."""
    start, directions = drawn(width, 0.05, 0), [drawn(width, 0.001, 1 + i) for i in range(SHARED)]
    save_file(start, folder / "base.safetensors")
    paths = [folder / f"model{i}.safetensors" for i in range(models)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        strengths = torch.randn(SHARED, generator=torch.Generator().manual_seed(100 + i)) / SHARED**0.5
        model = drawn(width, 0.001, 1000 + i)
        for name, value in model.items():
            value += start[name]
            for strength, direction in zip(strengths, directions, strict=True):
                value.add_(direction[name], alpha=float(strength))
        save_file(model, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return [str(path) for path in paths]


def peak(pids: list[int], found: dict[int, int]) -> None:
    """Keep the most memory that each process has had, in bytes, but for files that are mapped."""
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        found[pid] = max(found.get(pid, 0), 1024 * kilobytes)


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return found
    return found + [one for child in children for one in descendants(int(child))]


def timed(command: list[str]) -> None:
    """Run a command, and print its time and the memory of its largest processes."""
    memory: dict[int, int] = {}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            peak(descendants(process.pid), memory)
            time.sleep(0.05)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    largest = sorted(memory.values(), reverse=True)[:4]
    print(
        f"  status {process.returncode}: {time.monotonic() - begun:.0f} s, {seconds:.0f} s of processors, peaks of "
        f"processes {[f'{one / 1e6:.0f} MB' for one in largest]}",
        flush=True,
    )


def main(folder: Path, models: tuple[int, ...] = (500,), width: int = 512, processes: tuple[int, ...] = (1, 2)) -> None:
    """Print a line for each number of models, of processes, and with and without a basis.

    Args:
        folder: For the files, which stay; those that are there are not written again.
        models: How many.
        width: Of each: 36 of its squares and a thousand of it are the parameters.
        processes: How many share the work, on one thread each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    paths = written(folder, max(models), width)
    size = Path(paths[0]).stat().st_size
    print(f"{len(paths)} models of {size / 1e6:.0f} MB there in {time.monotonic() - begun:.0f} s", flush=True)
    for count in models:
        fit = ["subspace", "fit", *paths[:count], "--base", str(folder / "base.safetensors"), "--json"]
        for several in processes:
            for output in ([], ["-o", str(folder / "basis.safetensors")]):
                launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={several}"]
                what = "with a basis of 16" if output else "without a basis"
                print(f"{count} models, {several} process(es), {what}", flush=True)
                run = ["-m", "lightning_lowrank.analysis"]
                timed([sys.executable, *(launch if several > 1 else []), *run, *fit, *output])


if __name__ == "__main__":
    auto_cli(main)
