"""What stands beside the shared subspace of digits tasks: LoRA, random directions, curvature, tickets, later models.

    python -m benchmarks.subspace_controls --only sizes      # accuracy by how many numbers train, on held-out tasks
    python -m benchmarks.subspace_controls --only curvature  # the Hessian of the whole network at the shared start
    python -m benchmarks.subspace_controls --only tickets    # rewound tickets beside the largest coordinates
    python -m benchmarks.subspace_controls --only later      # models that come one by one, old ones tested again

Tasks, networks and trainings are those of benchmarks/subspaces.py; the basis is that of 24 tasks, eight are held out.
"""

import io
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import quiet
from benchmarks.subspaces import TASKS, State, accuracy, digits, ends, inside, network, on_disk, started, task, trained
from lightning_lowrank import LoRA, LotteryTicket
from lightning_lowrank.analysis.subspaces.extension import subspace_extend
from lightning_lowrank.analysis.subspaces.fitting import fit, write_basis
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.shared_subspaces.components import components
from lightning_lowrank.maths.spectra.lanczos import krylov
from lightning_lowrank.models.basis_files import Basis

SEEN, STEPS = 24, 160
PARTS = ("sizes", "curvature", "tickets", "later")
MATRICES = ("0.weight", "2.weight", "4.weight")
ROUNDS, PRUNE = 7, 0.31


class Shared:
    """The pretrained start of a seed, its 32 tasks, and the basis of the first 24.

    Args:
        seed: Of the start.
        folder: For the files.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        begun, self.made = ends("same pretrained", seed, 300)
        self.start = begun[0]
        self.paths = [str(folder / f"task{i}.pt") for i in range(TASKS)]
        self.base = str(folder / "base0.pt")
        on_disk(folder, begun, self.made)
        self.basis = str(folder / "basis.safetensors")
        self.write(Path(self.basis), SEEN, SEEN - 1, folder)

    def write(self, file: Path, count: int, k: int, folder: Path) -> None:
        """A basis of the first tasks."""
        models = on_disk(folder, [self.start] * count, self.made[:count])
        write_basis(file, models, fit(models, [k], count, Team()).parts, self.base, Team())

    def updates(self) -> Tensor:
        """Of all tasks, whole and flat."""
        return torch.stack([flat(state) - flat(self.start) for state in self.made])


def flat(state: State) -> Tensor:
    """One vector, in float64."""
    return torch.cat([value.double().flatten() for value in state.values()])


def cells(rows: Sequence[Sequence[float]], form: str = ".3f") -> list[str]:
    """Medians and ranges over seeds."""
    return [f"{median(c):{form}} ({min(c):{form}} to {max(c):{form}})" for c in zip(*rows, strict=True)]


# How many numbers train


def with_lora(start: State, r: int, match: Sequence[str]) -> nn.Module:
    """Pairs of rank r on weights, and nothing else that trains."""
    module = started(0, start)
    module.requires_grad_(False)  # or the head would train whole
    LoRA(r, match=list(match)).prepare(module)
    return module


def ways(shared: Shared) -> dict[str, tuple[Callable[[], nn.Module], tuple[float, ...]]]:
    """What trains, and the rates that are tried."""
    start, made = shared.start, {}
    for k in (1, 4, 16, 23):
        made[f"basis of 24 tasks, k={k}"] = partial(inside, shared.basis, k, start)
    for k in (16, 64, 128, 256):
        made[f"random directions, k={k}"] = partial(inside, "random", k, start)
    made["LoRA of rank 1, hidden layer"] = partial(with_lora, start, 1, MATRICES[1:2])
    for r in (1, 2, 4):
        made[f"LoRA of rank {r}, all layers"] = partial(with_lora, start, r, MATRICES)
    found: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...]]] = {
        key: (make, (1e-2, 3e-2, 1e-1)) for key, make in made.items()
    }
    return found | {"everything": (partial(started, 0, start), (1e-3, 3e-3, 1e-2))}


def curve(module: nn.Module, data: tuple[Tensor, Tensor], number: int, rate: float) -> list[float]:
    """Accuracy on held-out digits every ten steps, for eight epochs."""
    found, (images, labels) = [], data
    generator = torch.Generator().manual_seed(number)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
    for step in range(STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                found.append(float((module(images[1200:]).argmax(1) == labels[1200:]).float().mean()))
        drawn = torch.randint(1200, (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(module(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    return found


def of_sizes(seeds: Sequence[int]) -> Table:
    """Accuracy by how many numbers train; steps of full training to what each reached."""
    headings = ("what trains", "numbers", "accuracy after 8 epochs", "steps of full training to as much")
    table = Table(*headings, title="8 held-out tasks, 1,200 examples, the best of three rates")
    rows: dict[str, list[list[float]]] = {}
    counts: dict[str, int] = {}
    for seed in seeds:
        with TemporaryDirectory() as name:
            shared = Shared(seed, Path(name))
            curves: dict[str, list[list[float]]] = {}
            for key, (make, rates) in ways(shared).items():
                counts[key] = sum(p.numel() for p in make().parameters() if p.requires_grad)
                tried = [[curve(make(), task(number), number, rate) for number in range(SEEN, TASKS)] for rate in rates]
                curves[key] = max(tried, key=lambda found: sum(one[-1] for one in found))
            for key, found in curves.items():
                ended = [one[-1] for one in found]
                steps = [reached(full, end) for full, end in zip(curves["everything"], ended, strict=True)]
                rows.setdefault(key, []).append([sum(ended) / len(ended), median(steps)])
    for key, several in rows.items():
        accuracy_cell, _ = cells(several)
        _, steps_cell = cells(several, ".0f")
        table.add_row(key, f"{counts[key]:,}", accuracy_cell, steps_cell)
    return table


def reached(found: Sequence[float], wanted: float) -> float:
    """At which step a curve is as high for the first time."""
    return next((10.0 * i for i, value in enumerate(found) if value >= wanted), float("inf"))


# Curvature


def product(state: State, data: Sequence[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Products with the Hessian of the mean loss over several data sets, by all parameters, in float64."""
    module, names = network().double(), list(state)
    sizes = [state[name].numel() for name in names]
    images = torch.cat([x for x, _ in data]).double()
    labels = torch.cat([y for _, y in data])
    point = flat(state).requires_grad_()
    parts = [part.view_as(state[name]) for name, part in zip(names, point.split(sizes), strict=True)]
    loss = cross_entropy(functional_call(module, dict(zip(names, parts, strict=True)), (images,)), labels)
    (gradient,) = torch.autograd.grad(loss, point, create_graph=True)

    def multiply(vector: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, point, vector, retain_graph=True)[0]

    return multiply


def density(multiply: Callable[[Tensor], Tensor], top: Tensor, draws: int, steps: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues outside of some eigenvectors, and how many each stands for: stochastic Lanczos quadrature."""
    nodes, weights, generator = [], [], torch.Generator().manual_seed(0)
    size, known = top.shape
    for _ in range(draws):
        begun = outside(torch.randn(size, generator=generator, dtype=torch.float64), top)
        space = krylov(lambda v: outside(multiply(v), top), begun / begun.norm(), steps)
        values, vectors = torch.linalg.eigh(space.projected)
        nodes.append(values)
        weights.append(vectors[0].square() * (size - known) / draws)
    return torch.cat(nodes), torch.cat(weights)


def outside(vector: Tensor, directions: Tensor) -> Tensor:
    """Less what lies in orthonormal columns."""
    return vector - directions @ (directions.T @ vector)


def of_curvature(seeds: Sequence[int]) -> Table:
    """The Hessian at the shared start, of the losses of pretraining and of tasks, beside updates and the basis."""
    table = Table("", "loss of pretraining", "loss of the tasks", title="whole network at the pretrained start")
    found: dict[str, list[list[float]]] = {}
    for seed in seeds:
        with TemporaryDirectory() as name:
            shared = Shared(seed, Path(name))
        seen = [(x[:1200], y[:1200]) for x, y in [digits()]]
        tasks = [(x[:200], y[:200]) for x, y in (task(i) for i in range(SEEN))]
        columns = [measured(shared, seed, data) for data in (seen, tasks)]
        for key in columns[0]:
            found.setdefault(key, []).append([column[key] for column in columns])
    for key, rows in found.items():
        table.add_row(key, *cells(rows, ".4f"))
    return table


def measured(shared: Shared, seed: int, data: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of one loss."""
    multiply, size = product(shared.start, data), len(flat(shared.start))
    operator = LinearOperator((size, size), lambda v: multiply(torch.tensor(v).flatten()).numpy(), dtype=np.float64)
    values, vectors = eigsh(operator, k=16, which="LM", v0=np.random.default_rng(0).standard_normal(size))
    top, updates = torch.tensor(vectors), shared.updates()
    nodes, weights = density(multiply, top, 6, 80)
    nodes, weights = torch.cat([torch.tensor(values), nodes]), torch.cat([torch.ones(16), weights])
    largest, mass = float(np.abs(values).max()), weights * nodes.abs()
    own = updates[:SEEN]
    weighted = components(own @ own.T, 16).weights
    basis = weighted @ own
    new = updates[SEEN:]
    early = early_updates(shared, seed)
    return {
        "largest eigenvalue": largest,
        "eigenvalues below 1 % of the largest, share of all": float(weights[nodes.abs() < 0.01 * largest].sum()) / size,
        "negative beyond 0.1 % of the largest, share of all": float(weights[nodes < -0.001 * largest].sum()) / size,
        "negative, share of the absolute sum": float(mass[nodes < 0].sum() / mass.sum()),
        "top 16, share of the squared sum": float((values**2).sum() / (weights * nodes.square()).sum()),
        "overlap of basis (16) and top 16": float((basis @ top).square().sum() / 16),
        "  chance": 16 / size,
        "update after 5 steps in top 16": share(early[5], top),
        "update after 30 steps in top 16": share(early[30], top),
        "update of a held-out task in top 16": share(new, top),
        "  in 16 components of other tasks": share(new, basis.T),
        "  in both": share(new, torch.linalg.qr(torch.cat([top, basis.T], 1))[0]),
    }


def share(updates: Tensor, directions: Tensor) -> float:
    """Of the energy of updates that lies in orthonormal columns."""
    return float(((updates @ directions).square().sum(1) / updates.square().sum(1)).mean())


def early_updates(shared: Shared, seed: int) -> dict[int, Tensor]:
    """Of held-out tasks, after a few steps."""
    begun = flat(shared.start)
    found = {}
    for steps in (5, 30):
        states = [trained(started(0, shared.start), task(i), steps, 100 * seed + i) for i in range(SEEN, TASKS)]
        found[steps] = torch.stack([flat(dict(one.state_dict())) - begun for one in states])
    return found


# Tickets


class Digits(L.LightningModule):
    """A network on one task."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def ticket(start: State, number: int) -> nn.Module:
    """Seven rounds of 300 steps from the shared start, each rewound to it: a tenth of the weights is left."""
    images, labels = task(number)
    torch.manual_seed(number)
    module = Digits(started(0, start))
    loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), 64, shuffle=True, drop_last=True)
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    method = LotteryTicket(ROUNDS, prune=PRUNE, steps_per_round=300, every_n_steps=10**6)
    trainer = L.Trainer(
        max_steps=ROUNDS * 300, callbacks=[method], accelerator="cpu", enable_progress_bar=False, **silent
    )
    trainer.fit(module, loader)
    return module.net


def masks_of(net: nn.Module) -> State:
    """What is left."""
    return {name: net.get_parameter(name).detach() != 0 for name in MATRICES}


def largest(scores: State, like: State) -> State:
    """Of each matrix as many entries as another mask has, those of the largest score."""
    found = {}
    for name, mask in like.items():
        chosen = torch.zeros(mask.numel(), dtype=torch.bool)
        chosen[scores[name].flatten().topk(int(mask.sum())).indices] = True
        found[name] = chosen.view_as(mask)
    return found


def jaccard(one: State, other: State) -> float:
    """Entries of both over entries of either."""
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    return both / sum(int((one[name] | other[name]).sum()) for name in one)


def by_chance(like: State) -> float:
    """Jaccard index of masks that are drawn with as many entries in each matrix."""
    both = sum(float(mask.float().mean()) ** 2 * mask.numel() for mask in like.values())
    return both / (2 * sum(int(mask.sum()) for mask in like.values()) - both)


def masked(start: State, masks: State, number: int) -> float:
    """Accuracy on a task, where weights outside of the masks are and stay zero."""
    module = started(0, start)
    for name, mask in masks.items():
        parameter = module.get_parameter(name)
        parameter.data *= mask
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return accuracy(trained(module, task(number), 300, number), task(number))


def of_tickets(seeds: Sequence[int]) -> tuple[Table, Table]:
    """Masks of tickets beside those of the largest scores, and what training under each mask reaches."""
    overlap, reach = Table("mask", "Jaccard index with the ticket"), Table("weights that train", "accuracy")
    indices: dict[str, list[list[float]]] = {}
    accuracies: dict[str, list[list[float]]] = {}
    for seed in seeds:
        with TemporaryDirectory() as name:
            shared = Shared(seed, Path(name))
            shares = {n: Basis(shared.basis).share(n) for n in MATRICES}
        nets = {number: ticket(shared.start, number) for number in range(SEEN, TASKS)}
        masks = {number: masks_of(net) for number, net in nets.items()}
        sums = {n: share.directions[:16].square().sum(0).view(share.mean.shape) for n, share in shares.items()}
        start = {n: shared.start[n].abs() for n in MATRICES}
        several: dict[str, list[float]] = {}
        reached_by: dict[str, list[float]] = {}
        for number, mask in masks.items():
            generator = torch.Generator().manual_seed(number)
            drawn = {n: torch.rand(m.shape, generator=generator) for n, m in mask.items()}
            scores = {
                "largest of the basis, 16 components": sums,
                "  its row sums times its column sums": {
                    n: s.sum(1, keepdim=True) * s.sum(0, keepdim=True) for n, s in sums.items()
                },
                "largest of the mean update": {n: share.mean.abs() for n, share in shares.items()},
                "largest weights at the start": start,
                "largest weights after one training": {n: shared.made[number][n].abs() for n in MATRICES},
            }
            found = {key: largest(score, mask) for key, score in scores.items()}
            others = [m for other, m in masks.items() if other != number]
            for key, one in found.items():
                several.setdefault(key, []).append(jaccard(one, mask))
            several.setdefault("tickets of other tasks", []).append(
                sum(jaccard(one, mask) for one in others) / len(others)
            )
            several.setdefault("chance", []).append(by_chance(mask))
            dense = accuracy(started(0, shared.made[number]), task(number))
            reached_by.setdefault("all", []).append(dense)
            reached_by.setdefault("ticket, after its rounds", []).append(accuracy(nets[number], task(number)))
            trials = {"ticket": mask, "drawn": largest(drawn, mask)} | {
                key: found[key] for key in ("largest of the basis, 16 components", "largest weights at the start")
            }
            for key, one in trials.items():
                reached_by.setdefault(key, []).append(masked(shared.start, one, number))
        for rows, of_tasks in ((indices, several), (accuracies, reached_by)):
            for key, each in of_tasks.items():
                rows.setdefault(key, []).append([sum(each) / len(each)])
    for table, rows in ((overlap, indices), (reach, accuracies)):
        for key, values in rows.items():
            table.add_row(key, *cells(values))
    return overlap, reach


# Later models


def of_later(seeds: Sequence[int]) -> Table:
    """A basis of 15 components of the first 16 tasks, extended by the other 16, one by one."""
    table = Table("basis of 15 components", "held of the first 16", "of the other 16", "accuracy of the first 16")
    rows: dict[str, list[list[float]]] = {}
    for seed in seeds:
        with TemporaryDirectory() as name:
            folder = Path(name)
            shared = Shared(seed, folder)
            first, whole = folder / "first.safetensors", folder / "whole.safetensors"
            shared.write(first, 16, 15, folder)
            shared.write(whole, TASKS, 15, folder)
            now = first
            for i in range(16, TASKS):
                after = folder / f"after{i}.safetensors"
                with redirect_stdout(io.StringIO()):
                    subspace_extend(str(now), [shared.paths[i]], output=str(after), json=True)
                now = after
            for key, path in {"of the first 16": first, "extended one by one": now, "of all 32": whole}.items():
                rows.setdefault(key, []).append(held(Basis(path), shared))
    for key, values in rows.items():
        table.add_row(key, *cells(values))
    return table


def held(basis: Basis, shared: Shared) -> list[float]:
    """Of the energy of both halves, and the accuracy of the first when it is rebuilt."""
    shares = {name: basis.share(name) for name in basis.shapes}
    kept, right = [], 0.0
    for i in range(TASKS):
        lost = energy = 0.0
        state = {}
        for name, share in shares.items():
            x = shared.made[i][name].double() - shared.start[name].double()
            rebuilt = share.rebuilt(share.project(x))
            lost, energy = lost + float((x - rebuilt).square().sum()), energy + float(x.square().sum())
            state[name] = (shared.start[name].double() + rebuilt).float()
        kept.append(1 - lost / energy)
        right += accuracy(network(), task(i), state) / 16 if i < 16 else 0.0
    return [sum(kept[:16]) / 16, sum(kept[16:]) / 16, right]


def main(seeds: tuple[int, ...] = (0, 1, 2), only: str = ",".join(PARTS)) -> None:
    """Print tables.

    Args:
        seeds: Of each figure.
        only: Parts to print, with commas between them.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console(width=180)
    parts: dict[str, Callable[[Sequence[int]], Any]] = {
        "sizes": of_sizes,
        "curvature": of_curvature,
        "tickets": of_tickets,
        "later": of_later,
    }
    quiet()
    for name in only.split(","):
        begun, found = time.process_time(), parts[name](seeds)
        for table in found if isinstance(found, tuple) else (found,):
            console.print(table)
        console.print(f"{name}: {time.process_time() - begun:.0f} s of the processor")


if __name__ == "__main__":
    auto_cli(main)
