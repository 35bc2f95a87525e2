"""What `GaLore` saves, what it takes, and what it loses: bytes, refreshes, steps, and the loss of a char transformer.

python -m benchmarks.galore [--steps 300] [--seeds 3]
python -m benchmarks.galore --rates    # the loss at each of five rates instead
"""

import argparse
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

RATE, RANK = 2.5e-3, 16
RATES = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
# Length of what is added to each direction of length 1.
TURN = 1.0
BASES: tuple[Basis, ...] = ("subspace", "svd", "random")
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
    text: Tensor,
    callbacks: Sequence[L.Callback],
    steps: int,
    *,
    seed: int = 0,
    rate: float = RATE,
    depth: int = 2,
    width: int = 64,
) -> tuple[L.LightningModule, torch.optim.Optimizer]:
    """A transformer and its optimizer."""
    L.seed_everything(seed, verbose=False)
    module = Transformer(rate, depth=depth, width=width)
    batches = DataLoader(TensorDataset(text), 32, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_steps=steps, callbacks=list(callbacks), **SILENT)
    trainer.fit(module, batches)
    return module, trainer.optimizers[0]


@torch.no_grad()
def loss_of(module: L.LightningModule, text: Tensor) -> float:
    """Mean over held-out text."""
    return mean(
        float(nn.functional.cross_entropy(module(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())) for x in text.split(64)
    )


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
        module, optimizer = trained(text, [clock, *([galore] if galore else [])], 140, depth=4, width=128)
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


def losses(text: Tensor, steps: int, seeds: int) -> Table:
    """Held-out loss at one effective rate, by basis."""
    kept, held = text[:-512], text[-512:]
    ways: dict[str, Basis | None] = {"AdamW": None, **{f"GaLore, {basis}": basis for basis in BASES}}
    table = Table(
        "",
        "held-out loss",
        "each seed",
        "captured at the end",
        title=f"{steps} steps at rate {RATE}, rank {RANK} of 64",
    )
    for name, basis in ways.items():
        found, captured = [], []
        for seed in range(seeds):
            galore = GaLore(RANK, 50, 1.0, basis=basis) if basis else None
            found.append(loss_of(trained(kept, [galore] if galore else [], steps, seed=seed)[0], held))
            if galore is not None and galore.latest is not None:
                captured.append(median(galore.latest.values["galore_captured"].values()))
        each = ", ".join(f"{one:.3f}" for one in found)
        table.add_row(name, f"{mean(found):.3f}", each, f"{mean(captured):.2f}" if captured else "")
    return table


def rates(text: Tensor, steps: int, seeds: int) -> Table:
    """Held-out loss at each of five effective rates: mean and range over seeds."""
    kept, held = text[:-512], text[-512:]
    table = Table(
        "", *(f"{rate:g}" for rate in RATES), title=f"Held-out loss after {steps} steps by rate, {seeds} seeds"
    )
    ways: dict[str, Basis | None] = {"AdamW": None, "GaLore, subspace": "subspace", "GaLore, random": "random"}
    for name, basis in ways.items():
        cells = []
        for rate in RATES:
            callbacks = [[GaLore(RANK, 50, 1.0, basis=basis)] if basis else [] for _ in range(seeds)]
            runs = (trained(kept, given, steps, seed=i, rate=rate)[0] for i, given in enumerate(callbacks))
            found = [loss_of(module, held) for module in runs]
            cells.append(f"{mean(found):.3f} ({max(found) - min(found):.3f})")
        table.add_row(name, *cells)
    return table


def of_large_models(rank: int = 1024) -> Table:
    """Bytes of AdamW's state of the matrices of a model of 7 billion parameters in bfloat16, from steps on tensors
    without memory.
    """
    table = Table("", "state", "with bases", "saved", title=f"Llama 7B, bfloat16, rank {rank}")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    sizes = {}
    ways: dict[str, Side | None] = {"AdamW": None, "one side": "auto", "both sides": "both"}
    for name, projected in ways.items():
        state = bases = 0
        for rows, columns, count in LLAMA.values():
            projection = None if projected is None else projection_of(projected, (rows, columns), rank)
            shape = (rows, columns) if projection is None else projection.shape((rows, columns))
            state += 32 * count * num_bytes(state_of(optimizer, optimizer.param_groups[0], shape, torch.bfloat16))
            bases += 0 if projection is None else 32 * count * 2 * projection.num_entries((rows, columns))
        sizes[name] = state + bases
        table.add_row(
            name, f"{state / 1e9:.1f} GB", f"{sizes[name] / 1e9:.1f} GB", f"{1 - sizes[name] / sizes['AdamW']:.0%}"
        )
    return table


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rates", action="store_true")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, console = standard_library(), Console(width=140)
    if given.rates:
        console.print(rates(text, given.steps, given.seeds))
        return
    console.print(of_large_models())
    console.print(refreshes())
    console.print(peaks())
    console.print(steps_of(text))
    console.print(losses(text, given.steps, given.seeds))


if __name__ == "__main__":
    main()
