"""Does `ReLoRA` learn what full rank learns? A char transformer from the same warm start, each way at each rate.

python -m benchmarks.relora     # 4 minutes on one core
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from statistics import mean, median

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.galore_losses import Text, held_out
from benchmarks.lora import SILENT
from examples.char_transformer import standard_library
from lightning_lowrank import LoRA, RankMonitor, ReLoRA
from lightning_lowrank.watching.monitor import Monitor

RANK, CYCLES, WARM_START = 4, 6, 100
RATES = (3e-3, 1e-2)


def lora(rank: int) -> LoRA:
    """All that is not adapted trains, as with ReLoRA."""
    return LoRA(rank, train_also="*", detail="standard", every_n_steps=10)


def ways(steps: int) -> dict[str, Callable[[], Monitor]]:
    """Who trains, of whom each knows the numerical rank of what it added."""
    every = steps // CYCLES

    def whole() -> Monitor:
        return RankMonitor(["displacement"], statistics=["numerical_rank"], every_n_steps=10, match="blocks.*")

    return {
        "full rank": whole,
        f"LoRA, r = {RANK}": lambda: lora(RANK),
        f"ReLoRA, r = {RANK}, {CYCLES} cycles": lambda: ReLoRA(
            every, every // 10, r=RANK, detail="standard", every_n_steps=10
        ),
        f"LoRA, r = {CYCLES * RANK}": lambda: lora(CYCLES * RANK),
    }


def trained(module: Text, text: Tensor, steps: int, callbacks: list[L.Callback]) -> Text:
    """After some steps."""
    loader = DataLoader(TensorDataset(text), 32, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, callbacks=callbacks, **SILENT).fit(module, loader)
    return module


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_lowrank").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text = standard_library()
    held = TensorDataset(text[-512:])
    named = ways(options.steps)
    losses: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in options.rates} for name in named}
    ranks: dict[str, list[float]] = {name: [] for name in named}
    begun = []
    for seed in options.seeds:
        L.seed_everything(seed, verbose=False)
        start = trained(Text(3e-3), text[:-512], WARM_START, [])
        begun.append(held_out(start, held))
        for name, way in named.items():
            for rate in options.rates:
                L.seed_everything(seed, verbose=False)
                module, monitor = Text(rate), way()
                module.load_state_dict(start.state_dict())
                losses[name][rate].append(held_out(trained(module, text[:-512], options.steps, [monitor]), held))
                found = monitor.latest.values if monitor.latest else {}
                kept = found.get("lora_update_rank") or found.get("displacement_numerical_rank") or {"": float("nan")}
                ranks[name].append(median(kept.values()))
            print(time.strftime("%X"), seed, name, losses[name], ranks[name], file=sys.stderr, flush=True)
    title = f"Held-out loss after {options.steps} steps, {len(options.seeds)} seeds; {mean(begun):.3f} before"
    table = Table("", "rank of what was added", *(f"{rate:g}" for rate in options.rates), "at the best", title=title)
    for name, by_rate in losses.items():
        best = min(by_rate.values(), key=mean)
        cells = [f"{mean(each):.3f}" for each in by_rate.values()]
        table.add_row(name, f"{median(ranks[name]):g}", *cells, ", ".join(f"{loss:.3f}" for loss in best))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
