"""Are advised ranks better than uniform ones? MiniLM sorts docstrings by package, with LoRA under a budget.

python -m benchmarks.rank_advice    # 20 minutes on one core

A short run of full fine-tuning advises; then LoRA of the same number of parameters, at ranks that are advised, uniform,
or drawn at random, at each of a few rates and for a few seeds.
"""

import argparse
import logging
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from benchmarks.lora import SILENT, Whole
from examples.fine_tuning import docstring_tokens
from lightning_lowrank import LoRA, RankAdvice, RankAdvisor

# Numbers of uniform rank 1 and 4 on all linear layers of the blocks.
BUDGETS = (41_472, 165_888)
RATES = (3e-3, 5.5e-3, 1e-2)
WAYS = ("updates", "uniform", "random", "gradients")
ADVISING_STEPS, ADVISING_RATE = 30, 1e-4


def advisor(train: Dataset[Any]) -> RankAdvisor:
    """That has seen a short run of full fine-tuning."""
    L.seed_everything(0, verbose=False)
    found = RankAdvisor(max(BUDGETS), least=0, match="minilm.encoder.*.weight", exclude="*LayerNorm*")
    loader = DataLoader(train, 16, shuffle=True, drop_last=True)
    L.Trainer(max_steps=ADVISING_STEPS, callbacks=[found], **SILENT).fit(Whole(ADVISING_RATE), loader)
    return found


def at_random(advice: RankAdvice, seed: int) -> dict[str, int]:
    """Ranks of the same cost at most: one direction after the other to a weight that is drawn."""
    draw, spent = random.Random(seed), 0
    ranks = dict.fromkeys(advice.ranks, 0)
    names = list(ranks)
    while True:
        name = draw.choice(names)
        spent += advice.energies[name].cost("lora")
        if spent > advice.budget:
            return {name: rank for name, rank in ranks.items() if rank}
        ranks[name] += 1


def learned(ranks: Mapping[str, int], rate: float, seed: int, steps: int, data: tuple[Any, TensorDataset]) -> float:
    """Accuracy on docstrings that were held out."""
    L.seed_everything(seed, verbose=False)
    module = Whole(rate)
    lora = LoRA(ranks, every_n_steps=10**6, seed=seed)
    loader = DataLoader(data[0], 16, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, callbacks=[lora], **SILENT).fit(module, loader)
    return module.accuracy(data[1])


def measured(steps: int, seeds: int, words: Sequence[str], console: Console) -> None:
    """The table; seed by seed, so that what is broken off says something."""
    data = docstring_tokens(100)
    held, train = random_split(data, [0.3, 0.7], torch.Generator().manual_seed(0))
    parts = (train, TensorDataset(*data[held.indices]))
    seen = advisor(train)
    by_updates = {budget: seen.advise(budget) for budget in BUDGETS}
    by_gradients = {budget: seen.advise(budget, by="gradients") for budget in BUDGETS}
    console.print(*by_updates.values(), *by_gradients.values())

    def ranks(way: tuple[int, str], seed: int) -> Mapping[str, int]:
        budget, word = way
        advice = by_updates[budget]
        drawn = at_random(advice, seed)
        return {"updates": advice.patterns, "gradients": by_gradients[budget].patterns, "random": drawn}.get(
            word, advice.uniform
        )

    ways = [(budget, word) for budget in BUDGETS for word in words]
    found: dict[tuple[int, str], dict[float, list[float]]] = {way: {rate: [] for rate in RATES} for way in ways}
    for seed in range(seeds):
        for way in ways:
            for rate in RATES:
                found[way][rate].append(learned(ranks(way, seed), rate, seed, steps, parts))
            print(time.strftime("%X"), seed, way, found[way], file=sys.stderr, flush=True)
    title = f"MiniLM, {steps} steps, {seeds} seeds, {len(parts[1])} held-out docstrings: accuracy"
    table = Table(
        "parameters", "ranks", "energy of the update", *(f"{rate:g}" for rate in RATES), "at the best", title=title
    )
    for way in ways:
        advice, taken = by_updates[way[0]], ranks(way, 0)
        best = max(found[way].values(), key=mean)
        cells = [f"{mean(each):.3f}" for each in found[way].values()]
        cost, share = advice.cost_of(taken), advice.captured(taken)
        table.add_row(f"{cost}", way[1], f"{share:.2f}", *cells, ", ".join(f"{one:.3f}" for one in best))
    console.print(table)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measured(options.steps, options.seeds, options.ways, Console(width=120))


if __name__ == "__main__":
    main()
