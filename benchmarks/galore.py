"""What `GaLore` saves and what it takes: bytes, refreshes and steps.

python -m benchmarks.galore
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import GaLore, watching
from lightning_lowrank.methods.elementwise import num_bytes, state_of
from lightning_lowrank.methods.galore.bases import Bases, Basis, Projection
from lightning_lowrank.methods.galore.ranks import Side, projection_of

RATE = 2.5e-3
# Length of what is added to each direction of length 1.
TURN = 1.0
SILENT: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
    "accelerator": "cpu",
}
# Matrices of one block of a Llama of 7 billion parameters, which has 32 of them.
LLAMA = {"attention": (4096, 4096, 4), "mlp": (11008, 4096, 3)}


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """Median, after a first run that does not count."""
    work()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return median(found)


def drifted(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A matrix with singular values 1/i, and the same after all its directions have turned."""
    basis = torch.linalg.qr(torch.randn(2, size, size, generator=generator)).Q
    turned = torch.linalg.qr(basis + TURN / size**0.5 * torch.randn(2, size, size, generator=generator)).Q
    values = 1 / torch.arange(1, size + 1)
    return (basis[0] * values) @ basis[1].mT, (turned[0] * values) @ turned[1].mT


def refreshes(size: int = 1024, rank: int = 128) -> Table:
    """Time of one refresh by each way, and the share of the best energy that it captures."""
    generator = torch.Generator().manual_seed(0)
    before, now = drifted(size, generator)
    projection = Projection(rank, left=False, right=True)
    best = projection.best(now)
    old = projection.made("svd", before, None, lambda: generator)
    table = Table("basis", "ms", "of the best energy", title=f"Refresh of {size} x {size}, rank {rank}")
    ways: dict[str, tuple[Basis, Bases | None]] = {
        "full SVD": ("svd", None),
        "subspace, the first": ("subspace", None),
        "subspace, from the last": ("subspace", old),
        "random": ("random", None),
    }
    for name, (kind, last) in ways.items():
        make = partial(projection.made, kind, now, last, lambda: generator)
        share = make().captured(now) / best
        table.add_row(name, f"{1000 * seconds(make):.1f}", f"{share:.3f}")
    table.add_row("the last, as it was", "0", f"{old.captured(now) / best:.3f}")
    return table


class Transformer(CharTransformer):
    """With a rate of its own."""

    def __init__(self, rate: float, *, depth: int, width: int) -> None:
        super().__init__(vocabulary=100, depth=depth, width=width)
        self.rate = rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.0)


class Clock(L.Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._begun)


def trained(
    text: Tensor, callbacks: Sequence[L.Callback], steps: int
) -> tuple[L.LightningModule, torch.optim.Optimizer]:
    """A transformer of four blocks of width 128, and its optimizer."""
    L.seed_everything(0, verbose=False)
    module = Transformer(RATE, depth=4, width=128)
    batches = DataLoader(TensorDataset(text), 32, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_steps=steps, callbacks=list(callbacks), **SILENT)
    trainer.fit(module, batches)
    return module, trainer.optimizers[0]


def steps_of(text: Tensor) -> Table:
    """Bytes and time of training with it and without: four blocks of width 128, rank 32."""
    table = Table(
        "",
        "state of its matrices",
        "state of all",
        "median step, ms",
        "mean step, ms",
        "longest / median",
        title="Char transformer, width 128",
    )
    ways: dict[str, Callable[[], GaLore | None]] = {
        "AdamW": lambda: None,
        "GaLore": lambda: GaLore(scale=1.0, update_every=50, every_n_steps=10**6),
        "GaLore, svd, not staggered": lambda: GaLore(
            scale=1.0, update_every=50, basis="svd", stagger=False, every_n_steps=10**6
        ),
    }
    for name, make in ways.items():
        galore, clock = make(), Clock()
        module, optimizer = trained(text, [clock, *([galore] if galore else [])], 140)
        matrices = {id(p) for key, p in module.named_parameters() if key.startswith("blocks") and p.ndim == 2}
        kept = {id(p): num_bytes(state) for p, state in optimizer.state.items()}
        bases = galore.bytes_of_bases if galore else 0
        own, others = (
            sum(size for key, size in kept.items() if (key in matrices) is inside) for inside in (True, False)
        )
        times = sorted(clock.steps[20:])
        middle = median(times)
        sizes = f"{own + bases:,}", f"{own + bases + others:,}"
        table.add_row(name, *sizes, f"{1000 * middle:.1f}", f"{1000 * mean(times):.1f}", f"{times[-3] / middle:.2f}")
    return table


def peaks(rank: float = 0.25) -> Table:
    """Most memory of a training step, by torch's tracker: five linear layers of width 1024, 16 examples."""
    table = Table("", "peak", "less", title=f"Training step, float32, rank {rank:g}")
    most = []
    for name, monitors in {
        "AdamW": [],
        "GaLore": [GaLore(rank, scale=1.0, every_n_steps=10**6, match="*weight")],
    }.items():
        net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(5)))
        optimizer = torch.optim.AdamW(net.parameters())
        with watching(net, optimizer, *monitors) as watch:
            tracker = MemTracker()
            for i in range(3):
                if i == 2:
                    tracker.track_external(net, optimizer)
                with watch.batch(), tracker if i == 2 else nullcontext():
                    net(torch.ones(16, 1024)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        found = sum(kept["Total"] for kept in tracker.get_tracker_snapshot("peak").values())
        most.append(found + sum(galore.bytes_of_bases for galore in monitors))  # which the tracker does not know
        table.add_row(name, f"{most[-1] / 1e6:.1f} MB", f"{1 - most[-1] / most[0]:.0%}")
    return table


def of_large_models() -> Table:
    """Bytes of AdamW's state of the matrices of a model of 7 billion parameters in bfloat16, from steps on tensors
    without memory.
    """
    table = Table("", "rank", "state", "with bases", "saved", title="Llama 7B, bfloat16")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    sizes = {}
    sides: dict[str, Side] = {"one side": "auto", "both sides": "both"}
    ways: list[tuple[str, int, Side | None]] = [("AdamW", 4096, None)]
    ways += [(name, rank, side) for rank in (128, 256, 512, 1024) for name, side in sides.items()]
    for name, rank, projected in ways:
        state = bases = 0
        for rows, columns, count in LLAMA.values():
            projection = None if projected is None else projection_of(projected, (rows, columns), rank)
            shape = (rows, columns) if projection is None else projection.shape((rows, columns))
            state += 32 * count * num_bytes(state_of(optimizer, optimizer.param_groups[0], shape, torch.bfloat16))
            bases += 0 if projection is None else 32 * count * 2 * projection.num_entries((rows, columns))
        sizes[name] = state + bases
        saved = f"{1 - sizes[name] / sizes['AdamW']:.0%}"
        table.add_row(name, f"{rank}", f"{state / 1e9:.1f} GB", f"{sizes[name] / 1e9:.1f} GB", saved)
    return table


def main() -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, console = standard_library(), Console(width=140)
    console.print(of_large_models())
    console.print(refreshes())
    console.print(peaks())
    console.print(steps_of(text))


if __name__ == "__main__":
    main()
